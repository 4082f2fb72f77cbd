"""The two-scale loss with its scales, and the size of a network, R, in which they are measured."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from typing_extensions import Unpack

from . import functional as F
from .call import Options, PerCall
from .checks import accumulated, check_kind, check_number, check_scalar
from .loss_module import FamilyLoss
from .positional import by_name
from .tracing import traced

__all__ = ["TwoScaleLoss", "cached_weight_norm", "weight_norm_product"]


class TwoScaleLoss(FamilyLoss, of=F.two_scale_cross_entropy):
    r"""Two-scale cross entropy with its scales; see :func:`mlkernels.two_scale_cross_entropy`.

    With R = ``logit_norm``, the network's size now, and :math:`R(\alpha^0)` = ``initial_norm``, its size at the start:

    * ``"trainable"`` (14): :math:`z = (r/R)X`, r = R1 where :math:`\delta X<\eta`, else R2; both are trained. At the
      start :math:`R_1 = R(\alpha^0)`, :math:`R_2 = 10\,R_1`.
    * ``"fixed"`` (16): the same, neither trained.
    * ``"separation"`` (17): z = X where :math:`\delta X < \eta`, else :math:`R_s X`; :math:`R_s` is trained, 10 at the
      start. It has no use for ``initial_norm`` and ``logit_norm``, and leaves them unread.

    The scales are ``scale_low`` and ``scale_high``: under ``parametrization="absolute"`` R1 and R2 themselves, in
    float64; under ``"relative"`` :math:`\rho_i` with :math:`R_i = \rho_i R(\alpha^0)`, 1 and 10 at the start. The two
    are the same loss but train differently: :math:`dL/dR_1 \propto 1/R`, so that for a deep network (R = 10^24.7 for
    WRN-28-10) R1 stands still; there take ``"relative"``. r/R is formed from logarithms in float64, then rounded.

    The single-scale baseline, :math:`R_2 := R_1`, is ``eta=math.inf``: every row takes R1.

    Args:
        initial_norm: :math:`R(\alpha^0) > 0`: a number, a 0-d tensor, or the model, for its
            :func:`weight_norm_product` now. None: R = 1, the logits are used as they come, and ``forward`` takes no
            norm.
        eta: the threshold on the confidence :math:`\delta X`.
        variant: ``"trainable"``, ``"fixed"`` or ``"separation"``.
        parametrization: ``"absolute"`` or ``"relative"``.
        detach_norm: no gradient by R. It would only move weights along themselves.
        **common: as in :mod:`mlkernels.functional`.

    Example:
        >>> import torch, mlkernels
        >>> model = torch.nn.Linear(2, 3)
        >>> loss = mlkernels.TwoScaleLoss(model, parametrization="relative")
        >>> optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
        >>> logits, target = model(torch.randn(8, 2)), torch.randint(3, (8,))
        >>> loss(logits, target, model).backward()  # R is that of the model now
        >>> loss.probabilities(logits, model).shape  # at R1: those to predict with
        torch.Size([8, 3])
        >>> loss.scale_low, loss.scale_high
        (Parameter containing:
        tensor(1., requires_grad=True), Parameter containing:
        tensor(10., requires_grad=True))

    Source: the two-scale loss, equations (9), (13), (14), (16), (17) and the numerical section.
    """

    eta: float
    scale_low: Tensor
    scale_high: Tensor
    log_unit: Tensor

    def __init__(
        self,
        initial_norm: float | Tensor | nn.Module | None = None,
        *,
        eta: float = 0.01,
        variant: Literal["trainable", "fixed", "separation"] = "trainable",
        parametrization: Literal["absolute", "relative"] = "absolute",
        detach_norm: bool = True,
        **common: Unpack[Options],
    ) -> None:
        if variant not in ("trainable", "fixed", "separation"):
            raise ValueError(f"variant must be 'trainable', 'fixed' or 'separation', got {variant!r}")
        if parametrization not in ("absolute", "relative"):
            raise ValueError(f"parametrization must be 'absolute' or 'relative', got {parametrization!r}")
        super().__init__({"eta": eta}, common, scale_low=1.0, scale_high=1.0)
        self.variant, self.parametrization, self.detach_norm = variant, parametrization, detach_norm
        self.normalized = initial_norm is not None and variant != "separation"
        given = isinstance(initial_norm, Tensor | nn.Module)
        for name, value in self._start(initial_norm).items():
            # What the loss starts from is known even where a default device of "meta" keeps no number.
            kept = value if given else value.to(torch.get_default_device())
            trained = (name == "scale_low" and variant == "trainable") or (name == "scale_high" and variant != "fixed")
            self._keep(name, nn.Parameter(kept) if trained else kept)
            self._initial[name] = value.clone()

    def _start(self, initial_norm: float | Tensor | nn.Module | None) -> dict[str, Tensor]:
        """The scales, and their unit."""
        separation = self.variant == "separation"
        log_initial = torch.zeros((), dtype=torch.float64, device="cpu")
        if initial_norm is not None and not separation:
            if not isinstance(initial_norm, Tensor | nn.Module):
                number = check_number("initial_norm", initial_norm, "logit_norm")
                initial_norm = torch.tensor(number, dtype=torch.float64, device="cpu")
            log_initial = cast(Tensor, _log_norm("initial_norm", initial_norm, detach=True)).reshape(())
        # The unit of the scales, and the scales in that unit.
        absolute = self.parametrization == "absolute" and not separation
        log_unit = torch.zeros_like(log_initial) if absolute else log_initial
        low = log_initial.exp() if absolute else torch.ones((), device=log_initial.device)
        # Once, not in a step: a synchronisation does not matter here.
        finite = traced(low) or low.is_meta or bool(log_initial.isfinite() & (low > 0) & (10 * low < math.inf))
        if not finite:
            raise ValueError(
                f"initial_norm must be finite and > 0, got 10^{float(log_initial) / math.log(10):.1f}"
                + ("; a norm beyond float64 takes parametrization='relative'" if absolute else "")
            )
        return {"scale_low": low, "scale_high": 10 * low, "log_unit": log_unit}

    def reset_parameters(self, initial_norm: float | Tensor | nn.Module | None = None) -> None:
        """The scales as at the start: those of ``initial_norm``, or of the one that the loss was built with.

        A model on the meta device has no norm: give it again once it has its weights.
        """
        if initial_norm is not None:
            self._initial.update(self._start(initial_norm))
        super().reset_parameters()

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        logit_norm: float | Tensor | nn.Module | None = None,
        *,
        log_norm: float | Tensor | None = None,
        **batch: Unpack[PerCall],
    ) -> Tensor:
        """The loss.

        Args:
            input: (N, C, ...) logits X. target: (N, ...) class indices.
            logit_norm: R > 0, the network's size now: the model, for its :func:`weight_norm_product` now, or that
                product itself, a number or 0-d.
            log_norm: log R instead, where R is beyond float64: ``weight_norm_product(model, log=True)``, which is what
                is used of a model.
            **batch: ``row_weight`` and ``normalizer``.
        """
        low, high = self._scales(input, logit_norm, log_norm)
        return F.two_scale_cross_entropy(input, target, low, high, **self._arguments(batch))

    def probabilities(
        self,
        input: Tensor,
        logit_norm: float | Tensor | nn.Module | None = None,
        *,
        log_norm: float | Tensor | None = None,
    ) -> Tensor:
        r"""Test-time probabilities, :math:`\operatorname{softmax}(R_1 X/R)`: a row's scale would depend on its label.

        Args: as in ``forward``; R is that of the model as it is at test time.

        Returns: of input's shape; float32 for half inputs.
        """
        low, _ = self._scales(input, logit_norm, log_norm)
        return torch.softmax(input.to(low.dtype) * low, 1 if input.dim() > 1 else 0)

    def _scales(
        self, input: Tensor, logit_norm: float | Tensor | nn.Module | None, log_norm: float | Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """R1/R and R2/R in the precision of the loss, by which the functional has no norm left to divide by."""
        accumulate = accumulated(input.dtype)
        if self.variant == "separation":
            return self.scale_low.to(accumulate), self.scale_high.to(accumulate)
        if logit_norm is not None and log_norm is not None:
            raise ValueError("log_norm is the logarithm of logit_norm: give one of them, got both")
        if self.normalized != (logit_norm is not None or log_norm is not None):
            raise ValueError(
                "logit_norm (or log_norm) is required where the loss was built with an initial_norm, got neither: "
                "loss(input, target, model) takes the model's norm now"
                if self.normalized
                else "logit_norm has no meaning where the loss was built without an initial_norm"
            )
        factor = self.log_unit
        for name, value in (("logit_norm", logit_norm), ("log_norm", log_norm)):
            if value is not None:
                factor = factor - _log_norm(name, value, self.detach_norm)
        factor = factor.exp()
        return (self.scale_low * factor).to(accumulate), (self.scale_high * factor).to(accumulate)

    def extra_repr(self) -> str:
        """The options, and what of the common arguments is not at its default."""
        return (
            f"{super().extra_repr()}, variant={self.variant!r}, parametrization={self.parametrization!r}, "
            f"detach_norm={self.detach_norm}"
        )


def _log_norm(name: str, value: float | Tensor | nn.Module, detach: bool) -> float | Tensor:
    """log R of a model, a number or a tensor, those in float64; a ``log_norm`` is one already."""
    logarithm = name == "log_norm"
    if isinstance(value, nn.Module):
        if logarithm:
            raise ValueError("log_norm must be a number or a floating 0-d tensor, got a model: that is a logit_norm")
        return weight_norm_product(value, log=True, detach=detach)
    value = check_scalar(name, value, "logit_norm" if name == "initial_norm" else name)
    if not isinstance(value, Tensor):
        return value if logarithm else math.log(value)
    value = (value.detach() if detach else value).double()
    return value if logarithm else value.log()


# ---- the size of a network -------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """log R as it was, and what it was computed from: kept alive, so that no identity is given twice."""

    model: nn.Module
    parameters: list[Tensor]
    seen: list[tuple[int, int]]  # the identity and the version of each
    log_norm: Tensor


_Key = tuple[int, tuple[type[nn.Module], ...], bool]
#: None outside of `cached_weight_norm`.
_entries: ContextVar[dict[_Key, _Entry] | None] = ContextVar("entries", default=None)


@contextmanager
def cached_weight_norm() -> Iterator[None]:
    """Inside, :func:`weight_norm_product` of a network is computed once, for everything in a step that asks for it.

    That there is a scope, and no cache that watches the weights, is for safety: torch does not count what a ``fused``
    optimizer, ``parameter.data`` or the replay of a CUDA graph writes, so nobody can tell in general whether R is still
    right. Put the forward passes of one step inside, and ``optimizer.step()`` after it. Changes that torch counts are
    noticed inside too. Under torch.compile it does nothing.

    A differentiable R is one graph for all who ask, so like any graph it takes one ``backward``.

    Example:
        >>> import torch, mlkernels
        >>> model = torch.nn.Linear(2, 3)
        >>> loss = mlkernels.TwoScaleLoss(model)
        >>> logits, target = model(torch.randn(8, 2)), torch.randint(3, (8,))
        >>> with mlkernels.cached_weight_norm():
        ...     value = loss(logits, target, model)
        ...     probabilities = loss.probabilities(logits, model)  # R is there already
    """
    if traced():
        yield
        return
    token = _entries.set({})
    try:
        yield
    finally:
        _entries.reset(token)


@by_name
def weight_norm_product(
    model: nn.Module,
    *,
    log: bool = False,
    detach: bool = False,
    layers: tuple[type[nn.Module], ...] = (nn.Linear, _ConvNd),
) -> Tensor:
    r"""The product over a network's layers of the norms of their parameters, :math:`R = \prod_l \lVert\alpha^l\rVert`.

    :math:`\alpha^l` is weight and bias of a layer as one vector. With homogeneous activations and no biases the logits
    scale by R, so that :math:`X/R` depends on the weights' directions only. It is accumulated as :math:`\log R` in
    float64 on the weights' device, without a synchronisation: R of a WRN-28-10 is near the end of float32's range.

    Of parameters that are sharded over ranks (``fully_shard``, any ``DTensor``) it is the norm of the whole, the same
    on every rank; all ranks call it, and where it is differentiated, go back through it. A gradient is the mean of the
    ranks' then, as FSDP's own are. Under ``FullyShardedDataParallel`` call it in the forward pass, or within its
    ``summon_full_params``.

    Args:
        model: layers are its ``layers`` modules, itself included; norm layers and embeddings are none. Layers that
            share their weight are one layer with all their biases; a reparametrised weight counts as it is used.
        log: return :math:`\log R`.
        detach: without a gradient, as under ``torch.no_grad()``.
        layers: the module types that count, each by its ``weight`` and ``bias``.

    Returns:
        0-d, float64, differentiable by every weight and bias unless detached. A layer that is all zero makes it 0
        (log: -inf).

    Raises:
        TypeError: no module: of weights, without their layers, it is not known what belongs to which.
        ValueError: the model has no such layer, or ``FullyShardedDataParallel`` shows only a shard of it now.

    Example:
        >>> import torch, mlkernels
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(layer.weight, 3.0)
        >>> product = mlkernels.weight_norm_product(torch.nn.Sequential(layer, torch.nn.ReLU()))
        >>> round(product.item(), 4)
        4.2426

    Source: the two-scale loss, equation (9).
    """
    check_kind("model", model, nn.Module, "an nn.Module, whose layers are multiplied")
    grouped = _parameters_by_layer(model, layers)
    if not grouped:
        names = ", ".join(layer.__name__.lstrip("_") for layer in layers)
        raise ValueError(f"model must have a layer of type {names}, got {type(model).__name__} with none")
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
        log_norm = _cached(model, layers, grouped)
        return log_norm if log else log_norm.exp()


def _parameters_by_layer(model: nn.Module, layers: tuple[type[nn.Module], ...]) -> list[list[Tensor]]:
    # Keyed by identity; the lists keep a reparametrised weight, made anew at each access, alive.
    by_weight: dict[int, list[Tensor]] = {}
    for module in model.modules():
        if isinstance(module, layers):
            weight, bias = cast(Tensor, module.weight), getattr(module, "bias", None)
            _check_whole(module, weight)
            parameters = by_weight.setdefault(id(weight), [weight])
            if bias is not None and all(bias is not other for other in parameters):
                parameters.append(bias)
    return list(by_weight.values())


def _cached(model: nn.Module, layers: tuple[type[nn.Module], ...], grouped: list[list[Tensor]]) -> Tensor:
    parameters = [parameter for group in grouped for parameter in group]
    entries = None if traced(*parameters) else _entries.get()
    # Inference tensors have no version.
    if entries is None or any(parameter.is_inference() for parameter in parameters):
        return _log_product(grouped)
    key = id(model), layers, torch.is_grad_enabled()
    seen = [(id(parameter), parameter._version) for parameter in parameters]
    if key not in entries or entries[key].seen != seen:
        entries[key] = _Entry(model, parameters, seen, _log_product(grouped))
    return entries[key].log_norm


def _check_whole(module: nn.Module, weight: Tensor) -> None:
    """FullyShardedDataParallel puts plain flat shards in the place of parameters, or leaves them without memory."""
    flat = getattr(weight, "_fsdp_flattened", False) and weight.dim() < 2
    if flat or ("weight" not in module._parameters and weight.numel() and weight.untyped_storage().nbytes() == 0):
        raise ValueError(
            f"model must be whole, got a {type(module).__name__} of which FullyShardedDataParallel shows a shard: call "
            "this in its forward pass or within FullyShardedDataParallel.summon_full_params(model), or use fully_shard"
        )


def _log_product(grouped: list[list[Tensor]]) -> Tensor:
    device = grouped[0][0].device
    each = iter(_norms([parameter for group in grouped for parameter in group]))
    norms = []
    for parameters in grouped:
        own = [next(each).to(device) for _ in parameters]
        norms.append(own[0] if len(own) == 1 else torch.linalg.vector_norm(torch.stack(own)))
    return torch.stack(norms).log().sum()


def _norms(parameters: list[Tensor]) -> list[Tensor]:
    """Norms in float64: of a sharded parameter its shards' first, then the whole's, by one exchange for all of them."""
    module = sys.modules.get("torch.distributed.tensor")
    found = []
    sharded: dict[tuple[Any, tuple[int, ...]], list[int]] = {}
    for index, parameter in enumerate(parameters):
        if module is not None and isinstance(parameter, module.DTensor):
            if any(placement.is_partial() for placement in parameter.placements):
                raise ValueError(f"model must hold whole or sharded parameters, got {parameter.placements}")
            dims = tuple(dim for dim, each in enumerate(parameter.placements) if not each.is_replicate())
            sharded.setdefault((parameter.device_mesh, dims), []).append(index)
            parameter = parameter.to_local()
        found.append(torch.linalg.vector_norm(parameter, dtype=torch.float64))
    for (mesh, dims), which in sharded.items():
        shards = torch.stack([found[index] for index in which])
        whole: Tensor = _WholeNorms.apply(shards, mesh, dims)  # type: ignore[no-untyped-call]
        for index, norm in zip(which, whole.unbind(), strict=True):
            found[index] = norm
    return found


class _WholeNorms(torch.autograd.Function):
    """Norms of shards (n,) to those of the whole parameters, on every rank of a mesh."""

    @staticmethod
    def forward(ctx: Any, shards: Tensor, mesh: Any, dims: tuple[int, ...]) -> Tensor:
        total = shards.square()
        for dim in dims:
            torch.distributed.all_reduce(total, group=mesh.get_group(dim))
        whole = total.sqrt()
        ctx.mesh = mesh
        ctx.save_for_backward(shards, whole)
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        shards, whole = ctx.saved_tensors
        upstream = upstream.clone()
        for dim in range(ctx.mesh.ndim):
            torch.distributed.all_reduce(upstream, group=ctx.mesh.get_group(dim))
        upstream /= ctx.mesh.size()
        return torch.where(whole > 0, upstream * shards / whole, 0), None, None
