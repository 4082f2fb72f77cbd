"""Piecewise tables and their groups: what they must be, and the loss that is made of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .checks import UNSIGNED, check_device, check_floating, check_index_dtype, widened, wrong_type
from .numbering import HeadKind, Slot, TransformKind
from .spec import ClampName, Number, Spec, spec


def piecewise(
    t_slope: Tensor | None,
    t_bias: Tensor | None,
    tau_slope: Tensor | None,
    tau_bias: Tensor | None,
    norm: Number | None,
    scale: Number,
    tau_min: float,
    clamp: ClampName,
) -> tuple[Spec, tuple[Number | None, ...]]:
    """The structure and the values of a loss whose t and tau are tables, or the identity where there are none."""
    t_slope, t_bias = _pair("t", t_slope, t_bias)
    tau_slope, tau_bias = _pair("tau", tau_slope, tau_bias)
    transform = TransformKind.IDENTITY if t_slope is None else TransformKind.PIECEWISE
    head = HeadKind.LOG if tau_slope is None else HeadKind.TAU
    values: tuple[Number | None, ...] = (scale,)
    if t_slope is not None:
        values = (t_slope, t_bias, norm, -1.0, 1.0, *values)
    elif norm is not None:
        raise ValueError("norm divides the argument of t: it needs t_slope or t_bias, got neither")
    if tau_slope is not None:
        values = (*values, tau_slope, tau_bias, tau_min)
    return spec(transform, head=head, clamp=clamp, function="piecewise_cross_entropy"), values


def _pair(name: str, slope: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A slope and a bias; of which one is None, by the identity's."""
    for suffix, table in (("slope", slope), ("bias", bias)):
        if table is not None and not isinstance(table, Tensor):
            raise wrong_type(f"{name}_{suffix}", "a floating tensor of shape (M,) or (G, M)", table)
    if slope is None and bias is not None:
        slope = torch.ones_like(bias)
    if bias is None and slope is not None:
        bias = torch.zeros_like(slope)
    return slope, bias


def table_groups(spec: Spec, params: Mapping[int, Tensor]) -> int | None:
    """Piecewise tables: slope and bias alike, (M,) or (G, M); returns the number of groups, None where all are (M,)."""
    names = {slot: word for slot, _, word in spec.values}
    counts = []
    for first, second in zip(spec.tables[::2], spec.tables[1::2], strict=True):
        for slot in (first, second):
            table, name = params[slot], names[slot]
            check_floating(name, table)
            if table.dim() not in (1, 2) or table.numel() == 0:
                raise ValueError(f"{name} must be (M,) or (G, M) with at least one piece, got {tuple(table.shape)}")
        if params[first].shape != params[second].shape:
            raise ValueError(
                f"{names[second]} must have the shape of {names[first]}, {tuple(params[first].shape)}, "
                f"got {tuple(params[second].shape)}"
            )
        if params[first].dim() == 2:
            counts.append(params[first].shape[0])
    if any(count != counts[0] for count in counts):
        raise ValueError(f"the tables of t and of tau must have the same number of groups, got {sorted(counts)}")
    return counts[0] if counts else None


def check_tables(spec: Spec, params: dict[int, Tensor], input: Tensor, target: Tensor) -> None:
    """The tables, and their group exactly when one is (G, M), as read. A pair that is (M,) is every group's."""
    group = params.get(Slot.GROUP)
    count = table_groups(spec, params)
    for slot, _, word in spec.values:
        if slot in spec.tables:
            check_device(word, params[slot], input)
    if group is None:
        if count is not None:
            raise ValueError(f"group is required where tables are (G, M): one index in [0, {count}) per row")
        return
    if count is None:
        raise ValueError("group is only for tables of shape (G, M)")
    check_index_dtype("group", group)
    if group.shape != target.shape:
        raise ValueError(f"group must have target's shape {tuple(target.shape)}, got {tuple(group.shape)}")
    check_device("group", group, input)
    for slot in spec.tables:
        if params[slot].dim() == 1:  # one table for all groups
            params[slot] = params[slot].expand(count, -1)
    if group.dtype in UNSIGNED:
        params[Slot.GROUP] = widened("group", group, count)
