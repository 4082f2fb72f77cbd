"""The candidates of one epoch on one rank: each trained from the same state, the best one kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_function, check_kind, check_size
from ..modules import PiecewiseLoss
from ..schedule import Snapshot
from .population import Population, PopulationLoss, check_population, check_unwrapped, strangers
from .ranks import Ranks

Train = Callable[[Any, torch.optim.Optimizer, Any], object]
Reward = Callable[[Any], Any]
Losses = Callable[[Tensor], "PiecewiseLoss | PopulationLoss"]


class Trainer:
    """A context in which candidates are trained. Left by an error, everything is as it was when it was entered."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train: Train,
        reward: Reward,
        population: int,
        extras: Sequence[Any],
        ranks: Ranks,
    ) -> None:
        check_kind("model", model, nn.Module, "an nn.Module")
        check_kind("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
        check_function("train", train)
        check_function("reward", reward)
        check_size("population", population)
        if population > 1 and extras:
            raise ValueError(
                f"extras are for candidates one after another, got {len(extras)} with population={population}"
            )
        for index, extra in enumerate(extras):
            if not (hasattr(extra, "state_dict") and hasattr(extra, "load_state_dict")):
                raise TypeError(f"extras[{index}] must have a state_dict, got {type(extra).__name__}")
        if ranks.size > 1:
            check_unwrapped(model, ", since every rank trains its own")
        if strange := strangers(optimizer, [part for part in (model, *extras) if isinstance(part, nn.Module)]):
            raise ValueError(
                f"optimizer holds parameters of {strange} that are neither the model's nor those of a module in "
                "extras: they would not be put back between candidates"
            )
        if population > 1:
            check_population(model, optimizer)
        self._model, self._optimizer, self._train, self._reward = model, optimizer, train, reward
        self._population, self._ranks = population, ranks
        self._parts = (model, optimizer, *extras)
        self._start, self._winner = Snapshot(*self._parts), Snapshot(*self._parts)
        self._modes = [(module, module.training) for module in model.modules()]
        self._device = next(model.parameters()).device
        self._generators = _generators(model)
        self._generator_states = [generator.get_state() for generator in self._generators]

    def __enter__(self) -> Trainer:
        self._start.save()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        if kind is not None:
            self._start.restore()
        self._reset()
        for generator, state in zip(self._generators, self._generator_states, strict=True):
            generator.set_state(state)

    def start_alike(self) -> None:
        """Let all ranks start from rank 0's state."""
        self._ranks.broadcast_state(self._parts, 0)
        if self._ranks.rank > 0:
            self._start.save()

    def earn(self, theta: Tensor, losses: Losses, seed: int, done: Callable[[int, float], object]) -> list[float]:
        """The rewards of candidates, (n, 4, M). ``done`` is told how many more, and the best reward so far."""
        rewards: list[float] = []
        best = -math.inf
        for first in range(0, len(theta), self._population):
            chunk = theta[first : first + self._population]
            if first:
                self._start.restore()
            self._reset()
            for generator in self._generators:
                generator.manual_seed(seed)
            if self._population == 1:
                crowd, found = None, self._one(self._model, self._optimizer, losses(chunk[0]), 1)
            else:
                crowd = Population(self._model, self._optimizer, len(chunk))
                found = self._one(crowd, crowd.optimizer, losses(chunk), len(chunk))
            finite = [reward if math.isfinite(reward) else -math.inf for reward in found]
            if max(finite) > best:
                best = max(finite)
                if crowd is not None:
                    crowd.copy_to_model(finite.index(best))
                self._winner.save()
            rewards += found
            done(len(chunk), best)
        return rewards

    def adopt(self, source: int) -> None:
        """Go on with the best candidate of rank ``source``."""
        if self._ranks.rank == source:
            self._winner.restore()
        self._ranks.broadcast_state(self._parts, source)

    def _one(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: PiecewiseLoss, size: int) -> list[float]:
        self._train(model, optimizer, loss.to(self._device))
        model.eval()
        with torch.no_grad():
            return _numbers(self._reward(model), size)

    def _reset(self) -> None:
        """No gradients, and the modes that the model came with: training may have left others."""
        for part in self._parts:
            if isinstance(part, nn.Module | torch.optim.Optimizer):
                part.zero_grad(set_to_none=True)
        for module, mode in self._modes:
            module.training = mode


def _generators(model: nn.Module) -> list[torch.Generator]:
    """The global generators of the CPU and of the devices that the model is on."""
    found = [torch.default_generator]
    for device in {parameter.device for parameter in model.parameters()} - {torch.device("cpu")}:
        of_device = getattr(torch.get_device_module(device), "default_generators", ())
        found += of_device[device.index : device.index + 1] if of_device and device.index is not None else []
    return found


def _numbers(reward: Any, size: int) -> list[float]:
    try:
        values = torch.as_tensor(reward, dtype=torch.float64).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"reward must return a number per model, got {type(reward).__name__}") from error
    if values.shape != (size,) and not (size == 1 and values.numel() == 1):
        wanted = "one number" if size == 1 else f"{size} numbers, one for each model of the population"
        raise ValueError(f"reward must return {wanted}, got shape {tuple(values.shape)}")
    return [float(value) for value in values.reshape(-1)]
