"""SGD's step within the backward of a head, a tile of classes at a time: the weight's gradient is never whole."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Never

from ..backends.reference import Finished
from ..positional import by_name
from . import threads
from .autograd import chunks_of
from .loop import Known, Linear, Sums, finish_chunk
from .products import add_at, add_product, multiply_into
from .sampling import Draws

#: From here on an upstream gradient of a reduced loss is a GradScaler's, and would be taken for the weight's.
SCALER_FROM = 1024.0
#: Bytes of the gradient of the classes that step together: from the products to the step it stays in a cache.
STEP = 4 << 20
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@by_name
class TileSGD(Optimizer):
    r"""SGD for the weight of a linear head, which steps in the loss's backward: the weight's gradient is never whole.

    The backward goes through tiles of classes. As soon as a tile's gradient g is complete, and all products that read
    its part w of the weight are made, w steps, as by ``torch.optim.SGD``, to the bit:

    .. math::

        g \leftarrow g + \lambda w, \qquad b \leftarrow \mu b + (1 - d) g \ (\text{at first } g), \qquad
        w \leftarrow w - \eta\, b \ (\text{Nesterov: } g + \mu b)

    with the learning rate :math:`\eta`, momentum :math:`\mu`, dampening d and weight decay :math:`\lambda`. A bias and
    the loss's parameters get ordinary gradients, those at the old weight, as the features do.

    Args:
        lr: > 0 or 0. momentum, dampening, weight_decay, nesterov, maximize: as ``torch.optim.SGD``'s.
        stochastic_rounding: for a bfloat16 weight: the step is taken in float32, on a gradient that is not rounded, and
            weight and momentum are rounded up or down at random, right on average. To the nearest, steps of less than
            half a unit in the last place are lost. The draws' state is in the head's ``state_dict``.

    It is given to a head, ``LinearLoss(..., tile_update=TileSGD(0.1))``, and belongs to that one. ``param_groups`` has
    the one group, which learning rate schedulers take; its numbers count as they are when the backward runs. The
    momentum is in the head's ``state_dict``, the group in this ``state_dict()``.

    Raises:
        TypeError: an option of ``torch.optim.SGD`` that is not here. ValueError: a number out of range.
        RuntimeError: :meth:`step`, for it is the backward that steps.

    Example:
        >>> import torch, mlkernels
        >>> sgd = mlkernels.TileSGD(lr=0.1, momentum=0.9)
        >>> head = mlkernels.LinearLoss(mlkernels.CrossEntropyLoss(), 8, 1000, tile_update=sgd)
        >>> scheduler = torch.optim.lr_scheduler.StepLR(sgd, step_size=10)
        >>> before = head.weight.detach().clone()
        >>> head(torch.randn(4, 8), torch.tensor([1, 2, 3, 999])).backward()
        >>> head.weight.grad is None, torch.equal(head.weight, before)
        (True, False)
        >>> scheduler.step()
    """

    def __init__(
        self,
        lr: float,
        *,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        **unknown: Never,
    ) -> None:
        if unknown:
            raise TypeError(
                f"TileSGD takes no {next(iter(unknown))!r}: it takes lr, momentum, dampening, weight_decay, nesterov, "
                "maximize and stochastic_rounding"
            )
        for name, number in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if isinstance(number, Tensor):
                raise TypeError(f"{name} takes a number, got a tensor: a scheduler writes numbers into param_groups")
            if not number >= 0:
                raise ValueError(f"{name} must be >= 0, got {number}")
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError(f"nesterov takes momentum > 0 and dampening 0, got {momentum} and {dampening}")
        self.stochastic_rounding = stochastic_rounding
        numbers = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        # The weight joins when a head has one.
        super().__init__([{"params": []}], {**numbers, "nesterov": nesterov, "maximize": maximize})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "stochastic_rounding": self.stochastic_rounding}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: it steps the weight of one head."""
        if self.param_groups:
            raise RuntimeError("TileSGD steps the weight of one linear head: give others to an optimizer of theirs")
        super().add_param_group(param_group)

    def step(self, closure: Any = None) -> NoReturn:
        """Refused: the step was taken in the backward."""
        raise RuntimeError(
            "TileSGD steps in the loss's backward(): there is no step() to call, and no gradient to scale"
        )

    def check_free(self) -> None:
        """Whether no head has it yet."""
        if self.param_groups[0]["params"]:
            raise ValueError("tile_update takes a TileSGD of its own for every linear head, got one that another has")

    def bind(self, weight: nn.Parameter) -> None:
        """Makes a head's weight the one that is stepped."""
        self.check_free()
        self.param_groups[0]["params"].append(weight)

    def numbers(self) -> dict[str, Any]:
        """What the next step is made by."""
        group = self.param_groups[0]
        return {**{name: group[name] for name in self.defaults}, "stochastic_rounding": self.stochastic_rounding}


class TileUpdate(nn.Module):
    """What a head keeps to step by: the momentum, which classes have any, and the state of the roundings' draws."""

    momentum_buffer: Tensor
    stepped: Tensor

    def __init__(
        self,
        optimizer: TileSGD,
        weight: nn.Parameter,
        sharded: Callable[[Tensor], Tensor] | None = None,
        rank: int = 0,
        seed: int | None = None,
    ) -> None:
        """sharded: what makes a tensor of all ranks of this one's part, where each has a part of the weight."""
        super().__init__()
        self.optimizer = optimizer
        self._check_dtype(weight)
        optimizer.bind(weight)
        if optimizer.defaults["momentum"]:
            own = _local(weight.detach())
            for name, like, dtype in (("momentum_buffer", own, own.dtype), ("stepped", own[:, :1], torch.bool)):
                zeros = torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
                self.register_buffer(name, zeros if sharded is None else sharded(zeros))
        if optimizer.stochastic_rounding:
            self.draws = Draws(seed, rank)
        #: The class from which on a backward that was interrupted has not stepped.
        self.interrupted: int | None = None
        self._watch()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._watch()

    def _watch(self) -> None:
        (weight,) = self.optimizer.param_groups[0]["params"]
        weight.register_post_accumulate_grad_hook(_trained_elsewhere)

    def get_extra_state(self) -> dict[str, Any]:
        """Whether a state is half of one step and half of the next."""
        return {"interrupted": self.interrupted}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """As it was saved."""
        self.interrupted = state["interrupted"]

    @torch.no_grad()
    def reset(self) -> None:
        """As before the first step."""
        if self.optimizer.defaults["momentum"]:
            self.momentum_buffer.zero_()
            self.stepped.zero_()
        self.interrupted = None

    def _check_dtype(self, weight: Tensor) -> None:
        if weight.dtype not in _DTYPES:
            raise TypeError(
                f"tile_update takes a weight of float32, float64 or bfloat16, got {weight.dtype}: gradients in float16 "
                "need a GradScaler, whose factor cannot be taken back from a step that was taken"
            )
        if self.optimizer.stochastic_rounding and weight.dtype != torch.bfloat16:
            raise TypeError(f"stochastic_rounding takes a weight of bfloat16, got {weight.dtype}")

    def begun(self, parameter: nn.Parameter, weight: Tensor) -> Updating:
        """What a forward gives its backward, all checked that can be known now; weight: what is stepped of the head's
        parameter, it or this rank's shard."""
        (bound,) = self.optimizer.param_groups[0]["params"]
        if bound is not parameter:
            raise RuntimeError(
                "tile_update steps the Parameter that its linear head was made with, and weight is another one now: "
                "FSDP and fully_shard, which replace it, are refused (ClassParallelLoss spreads a weight over ranks), "
                "and so is load_state_dict(assign=True)"
            )
        self._check_dtype(weight)
        if self.interrupted is not None:
            raise RuntimeError(
                f"a backward was interrupted within tile_update: classes from {self.interrupted} on have not made the "
                "step that those before have made. Load a state (load_state_dict, Snapshot.restore) or reset_parameters"
            )
        if self.optimizer.param_groups[0]["momentum"] and not self.optimizer.defaults["momentum"]:
            raise ValueError("momentum must be > 0 when TileSGD is made, if it is to be > 0 later: there is no buffer")
        device = weight.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            raise RuntimeError(
                "tile_update refuses autocast to float16: it needs a GradScaler, whose factor cannot be taken "
                "back from a step that was taken; autocast to bfloat16"
            )
        if averaged_by_ddp(parameter):
            raise RuntimeError(
                "tile_update refuses DistributedDataParallel around a linear head: each rank would step its own copy "
                "of the weight. Wrap the backbone alone and spread the classes, ClassParallelLoss(..., tile_update=...)"
            )
        return Updating(self, weight.detach())

    def step(
        self, weight: Tensor, classes: slice | Tensor, gradient: Tensor, generator: torch.Generator | None
    ) -> None:
        """The step of some rows of the weight, given their gradient, which is overwritten."""
        group = self.optimizer.param_groups[0]
        momentum = fresh = None
        rows = weight[classes]
        if group["momentum"]:
            momentum, stepped = _local(self.momentum_buffer), _local(self.stepped)
            fresh = ~stepped[classes] if group["dampening"] else None
            stepped[classes] = True
        of_rows = None if momentum is None else momentum[classes]
        if generator is None:
            sgd_(rows, gradient.to(rows.dtype), of_rows, fresh, group)
        else:
            exact, buffer = rows.float(), None if of_rows is None else of_rows.float()
            sgd_(exact, gradient, buffer, fresh, group)
            rows.copy_(rounded(exact, generator))
            if of_rows is not None and buffer is not None:
                of_rows.copy_(rounded(buffer, generator))
        if isinstance(classes, Tensor):  # copies were stepped
            weight.index_copy_(0, classes, rows)
            if momentum is not None and of_rows is not None:
                momentum.index_copy_(0, classes, of_rows)


class Updating:
    """A forward whose backward is to step; it waits as long as it is alive and has not."""

    def __init__(self, update: TileUpdate, weight: Tensor):
        self.update, self.weight = update, weight
        #: The rows of the weight that are sampled, if they are: the only ones that move.
        self.classes: Tensor | None = None
        self.version, self.done = weight._version, False
        #: Of a tile of the weight: its gradient and what the step makes of it.
        self.temporaries = 6 if update.optimizer.stochastic_rounding else 2
        #: How many classes step together where threads share them; 0: a tile's.
        self.at_once = 0
        _waiting.setdefault(update, weakref.WeakSet()).add(self)

    def cut(self, itemsize: int, width: int, memory: int) -> int:
        """Halves the memory: one for products, which is returned, one for as many classes as step together."""
        half = max(1, memory // 2)
        of_class = itemsize * max(width, 1)
        self.at_once = max(1, min(STEP // of_class, half // (of_class * self.temporaries)))
        return half

    def check(self) -> None:
        """Whether the backward may begin: nothing has changed yet when this raises."""
        if self.done:
            raise RuntimeError(
                "tile_update has stepped in this loss's backward: a second one (retain_graph=True) would step again, "
                "from another weight"
            )
        if self.weight._version != self.version:
            raise RuntimeError(
                "weight has changed since this loss was computed, by another loss's backward or in place: under "
                "tile_update every loss has its backward before the next one is computed; gradients do not accumulate"
            )
        # Those of an older weight have no backward any more.
        if sum(not other.done and other.version == self.version for other in _waiting[self.update]) > 1:
            raise RuntimeError(
                "two losses of a linear head with tile_update wait for a backward: gradients do not accumulate. One "
                "loss per step; evaluate under torch.no_grad(), or delete a loss that is not to be differentiated"
            )

    def later(self, sums: Sums, linear: Linear, known: Known | None, upstream: Sequence[Tensor | None]) -> None:
        """All gradients but the weight's, and its step."""
        update, loss = self.update, upstream[0]
        if loss is not None and loss.dim() == 0 and loss.device.type == "cpu" and abs(loss.item()) >= SCALER_FROM:
            raise RuntimeError(
                f"tile_update refuses an upstream gradient of {loss.item():g}: a GradScaler's factor cannot be taken "
                "back from a step that was taken"
            )
        kind = _Shared if linear.call.plan.parts else _Chunk
        chunks = [] if known is None else [kind(sums, linear, *each) for each in chunks_of(linear, known, upstream)]
        generator = None
        if update.optimizer.stochastic_rounding:
            generator = update.draws.generator(self.weight.device)
        step = max(1, min(linear.classes, self.at_once or linear.call.plan.classes))
        gradient = linear.x.new_empty((step, linear.x.shape[1]), dtype=linear.call.dtype)
        self.done = True
        for start in range(0, linear.classes, step):
            tile = slice(start, min(start + step, linear.classes))
            of_tile = gradient[: tile.stop - start]
            for chunk in chunks:
                chunk.add(tile, of_tile)
            if not chunks:
                of_tile.zero_()
            update.interrupted = start
            update.step(self.weight, tile if self.classes is None else self.classes[tile], of_tile, generator)
        update.interrupted = None
        update.optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers look at
        for chunk in chunks:
            chunk.finish()


class _Shared:
    """A chunk of rows on its way through all tiles, where threads share the classes of each."""

    def __init__(self, sums: Sums, linear: Linear, part: slice, known: Known, upstream: Finished):
        self.sums, self.linear, self.part, self.values = sums, linear, part, linear.of(part)
        _, row = finish_chunk(linear, part, self.values, known, sums, upstream)
        assert row is not None
        self.row = row
        self.of_features = None if sums.input is None else torch.empty_like(sums.input[part])

    def add(self, tile: slice, of_tile: Tensor) -> None:
        """A tile's gradient: to the features and the bias, and to that of the tile's weight."""
        sums, part = self.sums, self.part
        db = None if sums.bias is None else sums.bias[tile]
        threads.gradients(self.linear, part, self.values, self.row, self.of_features, of_tile, db, classes=tile)
        if sums.input is not None and self.of_features is not None:
            sums.input[part] += self.of_features

    def finish(self) -> None:
        """Nothing stands apart."""


class _Chunk(_Shared):
    """The same by pieces, a tile of the plan at a time."""

    def __init__(self, sums: Sums, linear: Linear, part: slice, known: Known, upstream: Finished):
        super().__init__(sums, linear, part, known, upstream)
        self.label, self.target = linear.own_target(part, self.values.label, self.row.target)
        # Of the old weight, and added in the end, as everywhere.
        wanted = sums.input is not None and linear.classes > 0
        self.of_features = self.target.unsqueeze(1) * linear.part(self.label) if wanted else None
        self.bounds: Tensor | None = None
        self.order = torch.arange(0)
        if linear.x.device.type == "cpu":
            ascending, self.order = self.label.sort(stable=True)
            step = linear.call.plan.classes
            self.bounds = torch.searchsorted(ascending, torch.arange(0, linear.classes + step, step))

    def add(self, tile: slice, of_tile: Tensor) -> None:
        linear, start, weight, x = self.linear, tile.start, self.linear.part(tile), self.linear.x[self.part]
        f = linear.product(self.part, start, weight)
        gradient = linear.gradient(self.part, self.values, start, f, self.row, False)
        self.sums.add_tile(self.part, start, weight, gradient)
        (multiply_into if self.part.start == 0 else add_product)(of_tile, gradient.T, x)
        label, target = self.label - start, self.target
        if self.bounds is not None:
            at = start // linear.call.plan.classes
            rows = self.order[self.bounds[at] : self.bounds[at + 1]]
            label, target, features = label[rows], target[rows], x[rows]
        else:
            here = (label >= 0) & (label < of_tile.shape[0])
            label, target, features = torch.where(here, label, 0), torch.where(here, target, 0), x
        add_at(of_tile, label, target.unsqueeze(1) * features)
        if linear.inverse is not None and self.part.stop == linear.x.shape[0]:
            linear.along_lengths(of_tile, start, weight)

    def finish(self) -> None:
        sums = self.sums
        self.linear.call.pieces.add_lost(sums.input, self.part, self.row, sums.common)
        if sums.input is not None and self.of_features is not None:
            sums.input[self.part] += self.of_features
        if sums.bias is not None and sums.bias.numel():
            add_at(sums.bias, self.label, self.target)


def sgd_(rows: Tensor, gradient: Tensor, momentum: Tensor | None, fresh: Tensor | None, group: dict[str, Any]) -> None:
    """The operations of torch.optim.SGD in its order, in place of rows, momentum and gradient.

    fresh: which rows have no momentum yet, where that makes a difference.
    """
    if group["maximize"]:
        gradient = gradient.neg_()
    if group["weight_decay"]:
        gradient.add_(rows, alpha=group["weight_decay"])
    if momentum is not None:
        momentum.mul_(group["momentum"]).add_(gradient, alpha=1 - group["dampening"])
        if fresh is not None:
            momentum.copy_(torch.where(fresh, gradient, momentum))
        gradient = gradient.add_(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum
    rows.add_(gradient, alpha=-group["lr"])


def rounded(exact: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down at random: up with the probability that makes the mean exact."""
    # The 16 bits that are cut off, and as many random ones, carry into what stays; four to a draw.
    noise = torch.empty(-(-exact.numel() // 4), dtype=torch.int64, device=exact.device)
    noise = noise.random_(-(2**63), None, generator=generator).view(torch.int16)[: exact.numel()].view(exact.shape)
    bits = noise.int().bitwise_and_(0xFFFF).add_(exact.contiguous().view(torch.int32)).bitwise_and_(-0x10000)
    return torch.where(exact.isfinite(), bits.view(torch.float32), exact).bfloat16()


#: By head, the forwards that wait for a backward. No attribute: a copy or a snapshot of a head has none of them.
_waiting: weakref.WeakKeyDictionary[TileUpdate, weakref.WeakSet[Updating]] = weakref.WeakKeyDictionary()


def _trained_elsewhere(weight: Tensor) -> None:
    weight.grad = None
    raise RuntimeError(
        "weight is stepped by tile_update, and has got a gradient from elsewhere: a weight that is tied may be trained "
        "by its linear head alone (detach it there), or without tile_update"
    )


def averaged_by_ddp(weight: Tensor) -> bool:
    """Whether DistributedDataParallel, in whose forward pass this is, takes a parameter for a replicated one."""
    parallel = sys.modules.get("torch.nn.parallel.distributed")
    active = None if parallel is None else parallel.DistributedDataParallel._get_active_ddp_module()
    if active is None:
        return False
    return any(p is weight for name, p in active.module.named_parameters() if name not in active.parameters_to_ignore)


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard of what may be a DTensor."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()
