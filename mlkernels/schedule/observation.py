"""The observation set, by which an attempt is judged."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

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
        return partial(draw, dataset, int(n), model, generator, rank, world)
    if pair and isinstance(observation[1], Tensor):
        if observation[1].numel() == 0:
            raise ValueError("observation must hold at least one sample, got none")
        return partial(tuple, observation)
    if not callable(observation):
        wanted = "(dataset, n), (input, target tensor) or a function that returns the latter"
        raise TypeError(f"observation takes {wanted}, got {type(observation).__name__}")
    return partial(_returned, observation)


def _returned(observation: Callable[[], Any]) -> Batch:
    return _pair(observation(), "observation must return (input, target), got {}")


def _pair(batch: Any, must: str) -> Batch:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(must.format(type(batch).__name__))
    return batch[0], batch[1]


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
    input, target = _pair(batch, "observation's dataset must hold pairs (input, target); for others give a function")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return _to(input, device), _to(target, device)


def _to(value: Any, device: torch.device) -> Any:
    """Tensors in nested containers, on a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to(item, device) for item in value]
    return value
