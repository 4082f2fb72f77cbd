"""Batches: the observation set, and how much a batch holds."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

Batch = tuple[Any, Any]


def observe(
    observation: Any, model: nn.Module, generator: torch.Generator, rank: int, world: int
) -> Callable[[], Batch]:
    """The observation set as a function."""
    pair = isinstance(observation, (tuple, list)) and len(observation) == 2
    if pair and isinstance(observation[1], (int, np.integer)):
        dataset, n = observation
        check_samples(dataset, n, world)
        return lambda: draw(dataset, int(n), model, generator, rank, world)
    if pair and isinstance(observation[1], Tensor):
        if observation[1].numel() == 0:
            raise ValueError("observation must hold at least one sample, got none")
        return lambda: (observation[0], observation[1])
    if not callable(observation):
        wanted = "(dataset, n), (input, target tensor) or a function that returns the latter"
        raise TypeError(f"observation takes {wanted}, got {type(observation).__name__}")

    def call() -> Batch:
        batch = observation()
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(f"observation must return (input, target), got {type(batch).__name__}")
        return batch[0], batch[1]

    return call


def check_samples(dataset: Any, n: int, world: int) -> None:
    """Whether n different samples can be drawn of a data set, at least one per rank."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(f"observation takes a dataset with a length and indices, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError("observation must hold at least one sample, got an empty dataset")
    if isinstance(n, bool) or not world <= n <= len(dataset):
        ranks = "" if world == 1 else f" ({world} ranks)"
        raise ValueError(f"observation must draw from {world}{ranks} to {len(dataset)} samples, got {n}")


def draw(dataset: Any, n: int, model: nn.Module, generator: torch.Generator, rank: int, world: int) -> Batch:
    """n samples, of those a rank's part, on the model's device."""
    seed = torch.randint(2**62, (1,), generator=generator, device="cpu").tolist()[0]
    rows = random.Random(seed).sample(range(len(dataset)), n)[rank::world]
    if isinstance(dataset, TensorDataset):
        # One copy per tensor; the data set may lie on a GPU.
        batch: Any = dataset[torch.tensor(rows).to(dataset.tensors[0].device, non_blocking=True)]
    elif hasattr(dataset, "__getitems__"):
        batch = default_collate(dataset.__getitems__(rows))
    else:
        batch = default_collate([dataset[row] for row in rows])
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError("observation's dataset must hold pairs (input, target); for others give a function")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return _to(batch[0], device), _to(batch[1], device)


def kept_rows(name: str, loss: Callable[[Any, Any], Tensor], targets: list[Any]) -> list[float | Tensor] | None:
    """What a loss's mean over each batch is divided by; None where it is a sum."""
    parts = [part for part in loss.modules() if hasattr(part, "reduction")] if isinstance(loss, nn.Module) else []
    reductions = {str(part.reduction) for part in parts}
    ignored = {int(cast(Any, part.ignore_index)) for part in parts if hasattr(part, "ignore_index")}
    weights = [cast(Tensor, part.weight) for part in parts if getattr(part, "weight", None) is not None]
    if len(reductions) > 1 or len(ignored) > 1 or (weights and len(parts) > 1):
        raise ValueError(
            f"counts must be given where the parts of {name} differ: reduction {sorted(reductions)}, "
            f"ignore_index {sorted(ignored)}, class weights in {len(weights)} of {len(parts)}"
        )
    if reductions == {"sum"}:
        return None
    ignore_index = next(iter(ignored), -100)
    # Losses that ignore no rows, multi-margin for one, divide by their number.
    weight = weights[0] if weights and ignored else None
    rows: list[float | Tensor] = []
    for target in targets:
        if not isinstance(target, Tensor):
            raise TypeError(f"counts must be given where target is no tensor, got {type(target).__name__}")
        if target.is_floating_point():  # class probabilities (N, C, ...), or a number per row
            rows.append(float(target.numel() // (target.shape[1] if target.dim() > 1 else 1)))
            continue
        label = target.long()
        kept = label.ne(ignore_index)
        if weight is not None:
            kept = torch.where(kept, weight[label.clamp(0, len(weight) - 1)], 0)
        rows.append(kept.sum())
    return rows


def _to(value: Any, device: torch.device) -> Any:
    """Tensors in nested containers, on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to(item, device) for item in value]
    return value
