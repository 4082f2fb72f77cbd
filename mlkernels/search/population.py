"""Many models trained as one: stacked parameters, one forward under vmap, one loss, one backward, one optimizer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Unpack

from ..call import PerCall
from ..checks import check_row_weight, check_size
from ..modules import PiecewiseLoss
from ..ops import multi_copy_
from .state import held, put, without

# Optimizers of torch whose step treats every number by itself: stacked parameters are then G optimizers at once.
_ELEMENTWISE = frozenset(
    getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")
)
# What those keep once per parameter, not once per number; alike for all candidates, since they start alike.
_PER_PARAMETER = frozenset({"step", "mu_product", "eta", "mu"})
_NAMES = ("params", "param_names")


class Population(nn.Module):
    r"""G copies of a model that are trained side by side, each by its own loss.

    ``population(input)`` gives every model the same input and returns its outputs stacked, (G, N, C) where the model
    gives (N, C). Parameters are stacked, so that one backward serves all models, and ``optimizer``, of the type and
    with the options and state of the one given, makes exactly the steps of G optimizers. Parameters that the optimizer
    does not hold are shared; buffers (the statistics of batch norm) each model has for itself. Dropout draws a mask for
    each model. Memory is G times that of parameters, buffers, optimizer state and activations.

    The model's forward must be one that :func:`torch.func.vmap` takes: no branches on the values of tensors, buffers
    written in place. What treats all parameters as one treats all models as one: ``clip_grad_norm_`` clips the norm
    over the whole population, and a GradScaler leaves out a step of all where one overflows.

    Args:
        model: copied as it is now; not changed but by :meth:`copy_to_model`. Its mode, training or evaluation, is the
            population's.
        optimizer: holds parameters of the model only; SGD, Adam, AdamW, Adamax, NAdam, RAdam, Adagrad, Adadelta,
            RMSprop, Rprop or ASGD of ``torch.optim``. Others mix the numbers of a parameter, or may do so.
        size: G >= 1.

    Raises:
        TypeError: an optimizer that does not treat every number by itself, or a model wrapped for data parallelism.
        ValueError: the optimizer holds other parameters, or none; a norm layer has momentum=None.

    Example:
        >>> import torch
        >>> from mlkernels.search import LossSearch, Population
        >>> model = torch.nn.Linear(4, 3)
        >>> population = Population(model, torch.optim.SGD(model.parameters(), lr=0.1), size=5)
        >>> search = LossSearch(candidates=5)
        >>> loss = search.loss(search.sample())  # five losses
        >>> output = population(torch.randn(8, 4))
        >>> output.shape
        torch.Size([5, 8, 3])
        >>> loss(output, torch.randint(3, (8,))).backward()
        >>> population.optimizer.step()
        >>> population.copy_to_model(2)
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, size: int) -> None:
        super().__init__()
        check_population(model, optimizer)
        size = check_size("size", size)
        names_of = {parameter: name for name, parameter in model.named_parameters()}
        self.size = size
        # In a tuple: the model is no part of this module, its parameters are not to be trained or moved.
        self._of = model, optimizer
        self._twins: dict[Tensor, nn.Parameter] = {
            p: nn.Parameter(_stack(p, size), p.requires_grad) for p in held(optimizer)
        }
        self.stacked = nn.ParameterList(self._twins.values())
        self._stacked_buffers = {name: _stack(buffer, size) for name, buffer in model.named_buffers()}
        self._state: dict[str, Tensor] = {name: self._twins[p] for p, name in names_of.items() if p in self._twins}
        self._shared = {name: p.detach() for p, name in names_of.items() if p not in self._twins}
        self.optimizer = _stack_optimizer(optimizer, self._twins, size)
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output with a dimension G in front; every model gets the same arguments."""
        model = self._of[0]

        def one(stacked: dict[str, Tensor], buffers: dict[str, Tensor]) -> Any:
            return functional_call(model, (self._shared, stacked, buffers), args, kwargs)

        return vmap(one, randomness="different")(self._state, self._stacked_buffers)

    def train(self, mode: bool = True) -> Population:
        """Training or evaluation, for the model too: it is what runs."""
        self.training = mode
        self._of[0].train(mode)
        return self

    def copy_to_model(self, index: int) -> None:
        """Make the model and its optimizer those of one of the population, in place."""
        if not 0 <= index < self.size:
            raise ValueError(f"index must be in [0, {self.size}), got {index}")
        model, optimizer = self._of
        buffers = dict(model.named_buffers())
        live = [parameter.detach() for parameter in self._twins] + [buffers[name] for name in self._stacked_buffers]
        found = [twin.detach() for twin in self._twins.values()] + list(self._stacked_buffers.values())
        multi_copy_(live, [stacked[index] for stacked in found])
        for parameter, twin in self._twins.items():
            if twin in self.optimizer.state:
                state = self.optimizer.state[twin]
                put(optimizer.state[parameter], {k: v[index] if _is_stacked(k, v) else v for k, v in state.items()})
        for group, stacked in zip(optimizer.param_groups, self.optimizer.param_groups, strict=True):
            put(group, without(stacked, _NAMES), keep=_NAMES)

    def extra_repr(self) -> str:
        """How many of what."""
        return f"{self.size} x {type(self._of[0]).__name__}"


class PopulationLoss(PiecewiseLoss):
    r"""G piecewise-linear losses, one for each model of a :class:`Population`, in one call.

    :math:`L = \sum_g L_g`, where :math:`L_g` is what :class:`mlkernels.PiecewiseLoss` with the g-th tables and the same
    ``reduction`` makes of the g-th model's logits: the gradient of every model is that of its own loss. With
    ``reduction="none"`` the result is (G, N).

    Args:
        t_slope, t_bias, tau_slope, tau_bias: (G, M), or None for the identity; at least one is given.
        scale, tau_min, clamp: as in :class:`mlkernels.PiecewiseLoss`, the same for all, and so are its other options.

    Example:
        >>> import torch
        >>> from mlkernels.search import PopulationLoss
        >>> loss = PopulationLoss(tau_slope=torch.tensor([[1.0], [0.5]]))
        >>> logits, target = torch.zeros(2, 1, 2), torch.tensor([0])
        >>> loss(logits, target)  # -log 0.5 - log 0.25
        tensor(2.0794)
    """

    def forward(  # type: ignore[override]
        self, input: Tensor, target: Tensor, norm: Tensor | None = None, **batch: Unpack[PerCall]
    ) -> Tensor:
        """The loss of (G, N, C, ...) logits and one batch of labels, (N, ...). ``norm``: (G, N, 1). ``row_weight``, (N,
        ...), and ``normalizer`` are the same for all models."""
        tables = (self.t_slope, self.t_bias, self.tau_slope, self.tau_bias)
        size = next(table.shape[0] for table in tables if isinstance(table, Tensor))
        if input.dim() < 3 or input.shape[0] != size:
            raise ValueError(f"input must be (G, N, C, ...) with G = {size} models, got {tuple(input.shape)}")
        labels = target.expand(size, *target.shape)
        group = torch.arange(size, device=target.device).view(size, *[1] * target.dim()).expand_as(labels)
        if isinstance(weight := batch.get("row_weight"), Tensor):
            check_row_weight(weight, input, target.shape)
            batch["row_weight"] = weight.expand_as(labels).flatten(0, 1)
        loss = super().forward(
            input.flatten(0, 1),
            labels.flatten(0, 1),
            group.flatten(0, 1),
            None if norm is None else norm.flatten(0, 1),
            **batch,
        )
        if self.reduction == "none":
            return loss.view_as(labels)
        # The mean is over the rows of all models; they have the same labels, so each has its G-th part of the weight.
        return size * loss if self.reduction == "mean" and batch.get("normalizer") is None else loss


def check_population(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Whether they can be stacked; see :class:`Population`."""
    check_unwrapped(model, ": it would average the gradients of different losses")
    if type(optimizer) not in _ELEMENTWISE:
        names = ", ".join(sorted(kind.__name__ for kind in _ELEMENTWISE))
        raise TypeError(
            f"optimizer must treat every number by itself to train a population, one of {names}; got "
            f"{type(optimizer).__name__}, which may mix the models: train them one after another (population=1)"
        )
    if strange := strangers(optimizer, [model]):
        raise ValueError(
            f"optimizer must hold parameters of the model only to train a population, got others of {strange}"
        )
    if not any(parameter.requires_grad for parameter in held(optimizer)):
        raise ValueError("optimizer must hold a parameter that requires a gradient, got none")
    for name, module in model.named_modules():
        # The average over all batches so far needs their number on the host.
        if isinstance(module, _NormBase) and module.track_running_stats and module.momentum is None:
            raise ValueError(
                f"momentum of {name or type(module).__name__} must be a number to train a population, got None: give "
                "it one, or train one after another (population=1)"
            )


def check_unwrapped(model: nn.Module, why: str) -> None:
    """No model that ranks train together."""
    if isinstance(model, DistributedDataParallel):
        raise TypeError(f"model must not be wrapped by DistributedDataParallel{why}; give model.module")


def strangers(optimizer: torch.optim.Optimizer, modules: Sequence[nn.Module]) -> list[tuple[int, ...]]:
    """The shapes of parameters that an optimizer holds and no module has."""
    own = {parameter for module in modules for parameter in module.parameters()}
    return [tuple(parameter.shape) for parameter in held(optimizer) if parameter not in own]


def _stack(tensor: Tensor, size: int) -> Tensor:
    return tensor.detach().expand(size, *tensor.shape).clone(memory_format=torch.contiguous_format)


def _is_stacked(key: str, value: Any) -> bool:
    """Of an optimizer's state."""
    return isinstance(value, Tensor) and key not in _PER_PARAMETER


def _stack_optimizer(
    optimizer: torch.optim.Optimizer, twins: dict[Tensor, nn.Parameter], size: int
) -> torch.optim.Optimizer:
    groups = [
        copy.deepcopy(without(group, _NAMES)) | {"params": [twins[parameter] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]
    kind = cast(Any, type(optimizer))
    stacked = cast(torch.optim.Optimizer, kind(groups))
    stacked.state.clear()  # what some optimizers make at once
    for parameter, twin in twins.items():
        if parameter in optimizer.state:
            stacked.state[twin] = {
                k: _stack(v, size) if _is_stacked(k, v) else copy.deepcopy(v)
                for k, v in optimizer.state[parameter].items()
            }
    return stacked
