"""Several losses on one model: added up, or in turn, each with an optimizer of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .checks import check_function, check_number, check_several, check_size
from .positional import by_name

__all__ = ["Alternating", "JointLoss", "Turn"]


class _Called(nn.Module):
    """A plain function among modules."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: Any, target: Any, *more: Any, **batch: Any) -> Tensor:
        loss: Tensor = self.function(input, target, *more, **batch)
        return loss

    def extra_repr(self) -> str:
        return str(getattr(self.function, "__name__", self.function))


@by_name
class JointLoss(nn.Module):
    r"""Several losses at once.

    * ``"fixed"``: :math:`\sum_k a_k L_k`.
    * ``"trainable"``: :math:`a L_1 + (1-a) L_2`, where a is the sigmoid of the parameter ``logit``. It moves towards
      the smaller loss.
    * ``"uncertainty"``: :math:`\sum_k e^{-s_k} L_k + s_k/2`, ``log_variance`` = s is trained. For losses that are
      >= 0: where an :math:`L_k` is negative it is unbounded below.

    Args:
        losses: modules or functions, each called with ``(input, target)``. The parameters of modules are among this
            one's; a function brings none.
        weights: the :math:`a_k`, one number per loss; for ``"trainable"`` and ``"uncertainty"`` those at the start,
            there :math:`a, 1-a` and :math:`e^{-s_k}`. None: all 1 (``"trainable"``: one half each).
        mode: ``"fixed"``, ``"trainable"`` or ``"uncertainty"``.
        inputs: where the model's output is a tuple: for each loss the index of the part that it takes; or a tuple of
            indices, of which the first is its input and the others follow the target (a two-scale loss's norm, say); or
            None for the whole output. None: every loss takes the whole output.

    Example:
        >>> import torch, mlkernels
        >>> losses = [mlkernels.CrossEntropyLoss(), mlkernels.CenterLoss(num_features=2, num_classes=3)]
        >>> loss = mlkernels.JointLoss(losses, weights=[1.0, 0.003], inputs=[0, 1])
        >>> logits, features = torch.randn(4, 3), torch.randn(4, 2)
        >>> loss((logits, features), torch.tensor([0, 1, 2, 0])).shape
        torch.Size([])
        >>> [name for name, _ in loss.named_parameters()]
        ['losses.1.centers']
        >>> joint = mlkernels.JointLoss([mlkernels.CrossEntropyLoss(), mlkernels.FocalLoss()], mode="trainable")
        >>> optimizer = torch.optim.SGD(joint.parameters(), lr=0.1)
        >>> [round(float(weight.detach()), 4) for weight in joint.weights]
        [0.5, 0.5]

    Source: Kendall et al., Multi-Task Learning Using Uncertainty to Weigh Losses, for ``"uncertainty"``.
    """

    logit: nn.Parameter
    log_variance: nn.Parameter

    def __init__(
        self,
        losses: Sequence[Callable[[Any, Any], Tensor]],
        *,
        weights: Sequence[float] | None = None,
        mode: Literal["fixed", "trainable", "uncertainty"] = "fixed",
        inputs: Sequence[int | tuple[int, ...] | None] | None = None,
    ) -> None:
        super().__init__()
        if mode not in ("fixed", "trainable", "uncertainty"):
            raise ValueError(f"mode must be 'fixed', 'trainable' or 'uncertainty', got {mode!r}")
        check_several("losses", losses, "modules or functions")
        if len(losses) == 0:
            raise ValueError("losses must hold at least one loss, got none")
        for loss in losses:
            check_function("losses", loss)
        if mode == "trainable" and len(losses) != 2:
            raise ValueError(f"losses must be two under mode='trainable', got {len(losses)}")
        if weights is None:
            weights = [0.5, 0.5] if mode == "trainable" else [1.0] * len(losses)
        check_several("weights", weights, "numbers", per="loss", count=len(losses))
        weights = [check_number("weights", weight) for weight in weights]
        if inputs is not None:
            check_several("inputs", inputs, "indices", per="loss", count=len(losses))
        for part in inputs or ():
            if part == () or isinstance(part, bool) or not isinstance(part, int | tuple | None):
                raise ValueError(f"inputs must be indices, tuples of indices or None, got {part!r}")
        if mode != "fixed" and min(weights) <= 0:
            raise ValueError(f"weights must be > 0 under mode={mode!r}, got {weights}")
        if mode == "trainable" and not math.isclose(sum(weights), 1.0):
            raise ValueError(f"weights must add up to 1 under mode='trainable', got {weights}")
        self.losses = nn.ModuleList(loss if isinstance(loss, nn.Module) else _Called(loss) for loss in losses)
        self.mode = mode
        self.inputs = [None] * len(losses) if inputs is None else list(inputs)
        self.fixed = weights
        if mode == "trainable":
            self.logit = nn.Parameter(torch.empty(()))
        elif mode == "uncertainty":
            self.log_variance = nn.Parameter(torch.empty(len(weights)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The weights of the losses as at the start; the losses themselves have their own."""
        if self.mode == "trainable":
            self.logit.fill_(math.log(self.fixed[0] / self.fixed[1]))
        elif self.mode == "uncertainty":
            self.log_variance.copy_(torch.tensor([-math.log(weight) for weight in self.fixed], device="cpu"))

    def forward(self, input: Any, target: Any, **batch: Any) -> Tensor:
        """The weighted sum of the losses of (input, target). ``batch`` goes to each of them: ``row_weight`` and
        ``normalizer``, where all take them."""
        each: list[Tensor] = []
        for loss, part in zip(self.losses, self.inputs, strict=True):
            first, *more = part if isinstance(part, tuple) else (part,)
            each.append(
                loss(input if first is None else input[first], target, *(input[index] for index in more), **batch)
            )
        first_term, *terms = (weight * loss for weight, loss in zip(self.weights, each, strict=True))
        total = sum(terms, first_term)
        return total + 0.5 * self.log_variance.sum() if self.mode == "uncertainty" else total

    @property
    def weights(self) -> Sequence[float | Tensor]:
        """The factors of the losses now, numbers, or 0-d tensors where they are trained."""
        if self.mode == "trainable":
            # sigmoid(-x) keeps 1 - a where a rounds to 1.
            logit = self.logit.reshape(())
            return torch.sigmoid(logit), torch.sigmoid(-logit)
        return self.fixed if self.mode == "fixed" else torch.exp(-self.log_variance).unbind()

    def extra_repr(self) -> str:
        """The mode, and the weights where they are fixed."""
        return f"weights={self.fixed}, mode='fixed'" if self.mode == "fixed" else f"mode={self.mode!r}"


class Turn(NamedTuple):
    """What :meth:`Alternating.step` did: the loss's value, 0-d and detached, and which loss it was."""

    loss: Tensor
    which: int


@by_name
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
        check_several("turns", turns, "pairs of a loss and an optimizer")
        if not turns:
            raise ValueError("turns must hold at least one pair of a loss and an optimizer, got none")
        for index, turn in enumerate(turns):
            if not (isinstance(turn, Sequence) and len(turn) == 2 and callable(turn[0])) or not isinstance(
                turn[1], torch.optim.Optimizer
            ):
                raise TypeError(f"turns[{index}] must be a pair of a loss and a torch.optim.Optimizer, got {turn!r}")
            check_function(f"turns[{index}]", turn[0], "a loss and an optimizer")
        periods = [1] * len(turns) if periods is None else periods
        check_several("periods", periods, "integers", per="turn", count=len(turns))
        periods = [check_size(f"periods[{at}]", period) for at, period in enumerate(periods)]
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
