"""Piecewise tables and their groups: what they must be."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .checks import UNSIGNED, check_device, check_floating, check_index_dtype, widened
from .numbering import HeadKind, Slot, TransformKind
from .spec import Spec


def _table_slots(spec: Spec) -> list[tuple[int, int]]:
    """The pairs of slope and bias."""
    pairs = []
    if spec.ids.transform == TransformKind.PIECEWISE:
        pairs.append((int(Slot.TRANSFORM_A), int(Slot.TRANSFORM_B)))
    if spec.ids.head == HeadKind.TAU:
        pairs.append((int(Slot.HEAD_A), int(Slot.HEAD_B)))
    return pairs


def table_groups(spec: Spec, params: Mapping[int, Tensor]) -> int | None:
    """Piecewise tables: slope and bias alike, (M,) or (G, M); returns the number of groups, None where all are (M,)."""
    names = {slot: word for (slot, _), word in zip(spec.slots, spec.words, strict=True)}
    counts = []
    for first, second in _table_slots(spec):
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
    for (slot, _), word in zip(spec.slots, spec.words, strict=True):
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
