"""The size of a network, R: the product of its layers' norms."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .checks import traced

__all__ = ["cached_weight_norm", "weight_norm_product"]


@dataclass(frozen=True)
class _Entry:
    """log R as it was, and what it was computed from: kept alive, so that no identity is given twice."""

    model: nn.Module
    parameters: list[Tensor]
    versions: list[int]
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
        return _log_norm(grouped)
    key = id(model), layers, torch.is_grad_enabled()
    versions = [parameter._version for parameter in parameters]
    entry = entries.get(key)
    if entry is not None and entry.versions == versions and _same(entry.parameters, parameters):
        return entry.log_norm
    log_norm = _log_norm(grouped)
    entries[key] = _Entry(model, parameters, versions, log_norm)
    return log_norm


def _same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def _check_whole(module: nn.Module, weight: Tensor) -> None:
    """FullyShardedDataParallel puts plain flat shards in the place of parameters, or leaves them without memory."""
    flat = getattr(weight, "_fsdp_flattened", False) and weight.dim() < 2
    if flat or ("weight" not in module._parameters and weight.numel() and weight.untyped_storage().nbytes() == 0):
        raise ValueError(
            f"model must be whole, got a {type(module).__name__} of which FullyShardedDataParallel shows a shard: call "
            "this in its forward pass or within FullyShardedDataParallel.summon_full_params(model), or use fully_shard"
        )


def _log_norm(grouped: list[list[Tensor]]) -> Tensor:
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
