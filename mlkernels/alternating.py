"""Several losses on one model, each with an optimizer of its own, in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Alternating", "Turn"]


class Turn(NamedTuple):
    """What :meth:`Alternating.step` did: the loss's value, 0-d and detached, and which loss it was."""

    loss: Tensor
    which: int


class Alternating:
    r"""Alternating optimization: step i minimises one loss :math:`L_k`, with its own optimizer, and the next another.

    Unlike a joint loss, no loss is weighed against another: each has its own learning rate, momentum and parameters,
    which may be all of the model's or a part of them.

    Args:
        model: called with a batch's input; any callable, so that a closure can hold a forward pass of your own.
        turns: for each loss a pair of the loss, called with (the model's output, target), and its optimizer. Parameters
            that a loss has itself belong into its optimizer.
        periods: how many steps each loss has in its turn, >= 1. None: one each.
        scaler: a ``torch.amp.GradScaler``, for float16.

    Raises:
        ValueError: no turns, or periods that do not fit them.
        TypeError: a turn that is not a loss and an optimizer.

    Every step has a forward pass of its own, and starts without gradients (``None``) in all of the optimizers'
    parameters, so that one loss's gradient never enters another one's step. The model's mode is left as it is. It never
    waits for a device. If the model or a loss raises, the turn is not over.

    Example:
        >>> import torch, mlkernels
        >>> model, center = torch.nn.Linear(4, 3), mlkernels.CenterLoss(num_features=3, num_classes=3)
        >>> classify = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> contract = torch.optim.SGD([*model.parameters(), *center.parameters()], lr=0.01)
        >>> turns = [(mlkernels.CrossEntropyLoss(), classify), (center, contract)]
        >>> alternating = mlkernels.Alternating(model, turns, periods=[2, 1])
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> [alternating.step(x, y).which for _ in range(6)]
        [0, 0, 1, 0, 0, 1]

    Source: the question of several losses, its third example; :meth:`step_all` is the second.
    """

    def __init__(
        self,
        model: Callable[[Any], Any],
        turns: Sequence[tuple[Callable[[Any, Any], Tensor], torch.optim.Optimizer]],
        *,
        periods: Sequence[int] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable, got {type(model).__name__}")
        if not turns:
            raise ValueError("turns must hold at least one pair of a loss and an optimizer, got none")
        for index, turn in enumerate(turns):
            if not (isinstance(turn, Sequence) and len(turn) == 2 and callable(turn[0])) or not isinstance(
                turn[1], torch.optim.Optimizer
            ):
                raise TypeError(f"turns[{index}] must be a pair of a loss and a torch.optim.Optimizer, got {turn!r}")
        periods = [1] * len(turns) if periods is None else list(periods)
        if len(periods) != len(turns):
            raise ValueError(f"periods must be one per turn, {len(turns)}, got {len(periods)}")
        for period in periods:
            if isinstance(period, bool) or not isinstance(period, int) or period < 1:
                raise ValueError(f"periods must be integers >= 1, got {periods}")
        self.model, self.scaler, self.periods = model, scaler, periods
        self.losses = [loss for loss, _ in turns]
        self.optimizers = [optimizer for _, optimizer in turns]
        #: For each step of a round the loss that has it.
        self._round = [index for index, period in enumerate(periods) for _ in range(period)]
        self._position = 0

    @property
    def turn(self) -> int:
        """The index of the loss whose step is next."""
        return self._round[self._position]

    def step(self, input: Any, target: Any) -> Turn:
        """One step, of the loss whose turn it is; for its scheduler, say, see the result's ``which``."""
        found = self._step(self.turn, input, target)
        self._position = (self._position + 1) % len(self._round)
        return found

    def step_all(self, input: Any, target: Any) -> list[Turn]:
        """One step of every loss in order, all on this batch, each after a forward pass of its own.

        Whose turn is next stays as it was.
        """
        return [self._step(index, input, target) for index in range(len(self.losses))]

    def _step(self, which: int, input: Any, target: Any) -> Turn:
        optimizer, scaler = self.optimizers[which], self.scaler

        def closure() -> Tensor:
            for each in self.optimizers:
                each.zero_grad()
            value = self.losses[which](self.model(input), target)
            (value if scaler is None else scaler.scale(value)).backward()
            return value.detach()

        if scaler is not None:
            found = closure()
            scaler.step(optimizer)
            scaler.update()
        else:
            # As a closure, for those that evaluate a step several times (LBFGS).
            found = optimizer.step(closure)  # type: ignore[assignment, arg-type]
        return Turn(found, which)

    def state_dict(self) -> dict[str, Any]:
        """Whose turn it is. Model, losses, optimizers and scaler have states of their own."""
        return {"periods": list(self.periods), "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where the state was taken.

        Raises:
            ValueError: it is of other periods, or no such state; nothing is changed then.
        """
        position = state.get("position")
        if state.get("periods") != self.periods:
            raise ValueError(f"state must be of periods {self.periods}, got {state.get('periods')}")
        if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position < len(self._round):
            raise ValueError(f"state's position must be an integer in [0, {len(self._round)}), got {position!r}")
        self._position = position

    def __repr__(self) -> str:
        turns = ", ".join(
            f"{period} x {loss!r} by {type(optimizer).__name__}"
            for loss, optimizer, period in zip(self.losses, self.optimizers, self.periods, strict=True)
        )
        return f"Alternating({turns})"
