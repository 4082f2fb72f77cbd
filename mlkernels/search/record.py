"""What a search has drawn, earned and found."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: The rows of theta, each a table of M numbers.
ROWS = ("t_slope", "t_bias", "tau_slope", "tau_bias")
SETTINGS = ("pieces", "candidates", "sigma", "lr", "search", "tau_min", "clamp")


class Round(NamedTuple):
    """One epoch of a search.

    Attributes:
        epoch: from 0.
        theta: (B, 4, M), the candidates: slopes and biases of t, then of tau.
        rewards: (B,), as they came; not finite where a candidate failed.
        best: whose model goes on.
        mu: (4, M), the mean after the update.
    """

    epoch: int
    theta: Tensor
    rewards: Tensor
    best: int
    mu: Tensor

    def __repr__(self) -> str:
        return f"Round(epoch={self.epoch}, best={self.best}, reward={float(self.rewards[self.best]):g})"


@dataclass(eq=False, repr=False)
class Record:
    """The course of a search, on the CPU in float64.

    Attributes:
        pieces, candidates, sigma, lr, search, tau_min, clamp: the settings of the :class:`LossSearch`.
        rounds: one :class:`Round` per epoch.

    Example:
        >>> from mlkernels.search import LossSearch, Record
        >>> search = LossSearch(pieces=2, candidates=4)
        >>> theta = search.sample()
        >>> search.update(theta, [0.1, 0.3, 0.2, 0.3]).best
        1
        >>> record = Record.from_json(search.record.to_json())
        >>> record
        Record(pieces=2, candidates=4, sigma=0.2, lr=0.05, search='both', tau_min=1e-06, clamp='min', rounds: 1)
        >>> record.rounds[0]
        Round(epoch=0, best=1, reward=0.3)
        >>> record.mu.shape, record.theta.shape, record.best
        (torch.Size([2, 4, 2]), torch.Size([1, 4, 4, 2]), tensor([1]))
    """

    pieces: int
    candidates: int
    sigma: float
    lr: float
    search: str
    tau_min: float
    clamp: str
    rounds: list[Round] = field(default_factory=list)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in settings_of(self).items())
        return f"Record({settings}, rounds: {len(self.rounds)})"

    @property
    def mu(self) -> Tensor:
        """The means, (E + 1, 4, M), from the identity before the first epoch to what is found after the last."""
        return torch.stack([identity(self.pieces), *(round.mu for round in self.rounds)])

    @property
    def theta(self) -> Tensor:
        """Every candidate, (E, B, 4, M)."""
        return _stacked([round.theta for round in self.rounds], self.candidates, 4, self.pieces)

    @property
    def rewards(self) -> Tensor:
        """Of each candidate, (E, B)."""
        return _stacked([round.rewards for round in self.rounds], self.candidates)

    @property
    def best(self) -> Tensor:
        """The winners' numbers, (E,)."""
        return torch.tensor([round.best for round in self.rounds], dtype=torch.int64)

    def t(self, x: Tensor, epoch: int = -1) -> Tensor:
        """The found t at x: that of :math:`\\mu` after ``epoch`` epochs (0: the identity; -1: all of them)."""
        return _piecewise(self.mu[epoch, :2], x, -1.0)

    def tau(self, x: Tensor, epoch: int = -1) -> Tensor:
        """The found tau at x; see :meth:`t`."""
        return _piecewise(self.mu[epoch, 2:], x, 0.0)

    def to_json(self) -> str:
        """Everything, every number to the bit; a reward that is NaN becomes null, infinite ones strings."""
        rounds = [
            {
                "theta": round.theta.tolist(),
                "rewards": [_to_json(reward) for reward in round.rewards.tolist()],
                "best": round.best,
                "mu": round.mu.tolist(),
            }
            for round in self.rounds
        ]
        return json.dumps(settings_of(self) | {"rounds": rounds}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """The record that :meth:`to_json` wrote.

        Raises:
            ValueError: text is not one.
        """
        content = json.loads(text)
        if not isinstance(content, dict) or {*SETTINGS, "rounds"} - content.keys():
            raise ValueError(f"text must be a record with {', '.join(SETTINGS)} and rounds, got {text[:80]!r}")
        record = cls(*(content[name] for name in SETTINGS))
        candidates, pieces = record.candidates, record.pieces
        for epoch, round in enumerate(content["rounds"]):
            theta, mu = (torch.tensor(round[name], dtype=torch.float64) for name in ("theta", "mu"))
            found = [math.nan if reward is None else float(reward) for reward in round["rewards"]]
            rewards = torch.tensor(found, dtype=torch.float64)
            if theta.shape != (candidates, 4, pieces) or mu.shape != (4, pieces) or rewards.shape != (candidates,):
                raise ValueError(
                    f"round {epoch} of text does not fit candidates={candidates} and pieces={pieces}: theta is "
                    f"{tuple(theta.shape)}, mu {tuple(mu.shape)}, rewards {tuple(rewards.shape)}"
                )
            record.rounds.append(Round(epoch, theta, rewards, int(round["best"]), mu))
        return record


def identity(pieces: int) -> Tensor:
    """(4, M): slopes 1, biases 0."""
    return torch.tensor([[1.0], [0.0], [1.0], [0.0]], dtype=torch.float64).repeat(1, pieces)


def _piecewise(table: Tensor, x: Tensor, low: float) -> Tensor:
    """:math:`a_k x + b_k` on the k-th of M equal bins of [low, 1]; the outer pieces go on outside."""
    slope, bias = table.unbind()
    pieces = len(slope)
    k = ((x - low) * (pieces / (1 - low))).floor().clamp(0, pieces - 1).long()
    return slope[k] * x + bias[k]


def settings_of(record: Record) -> dict[str, Any]:
    """The settings of a search, by name."""
    return {name: getattr(record, name) for name in SETTINGS}


def _stacked(found: list[Tensor], *shape: int) -> Tensor:
    return torch.stack(found) if found else torch.empty(0, *shape, dtype=torch.float64)


def _to_json(reward: float) -> float | str | None:
    return reward if math.isfinite(reward) else None if math.isnan(reward) else str(reward)
