"""One update of a model: forward, loss, backward and its optimizers' steps, over one batch or several as if one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ..checks import check_function, check_kind
from .means import ADDED_UP, Counts, LossFunction, Shares, shares
from .observation import Batch


class Update:
    """How a model is updated; called with a loss and batches; the arguments are those of :class:`MILS`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        forward: Callable[[nn.Module, Any], Any] | None,
        autocast: torch.autocast | None,
        scaler: torch.amp.GradScaler | None,
        before_step: Callable[[], object] | None,
    ) -> None:
        check_kind("model", model, nn.Module, "an nn.Module")
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
        if not isinstance(optimizers, Sequence) or not all(isinstance(one, Optimizer) for one in optimizers):
            raise TypeError(f"optimizer takes an optimizer or a sequence of them, got {type(optimizer).__name__}")
        if not optimizers:
            raise ValueError("optimizer must hold at least one optimizer, got none")
        for name, function in (("forward", forward), ("before_step", before_step)):
            if function is not None:
                check_function(name, function)
        if autocast is not None:  # others can be entered only once
            check_kind("autocast", autocast, torch.autocast, "a torch.autocast")
        if scaler is not None:
            check_kind("scaler", scaler, torch.amp.GradScaler, "a torch.amp.GradScaler")
        if any(isinstance(one, LBFGS) for one in optimizers) and (len(optimizers) > 1 or scaler is not None):
            raise ValueError("optimizer must be alone and without a scaler if it is LBFGS, which steps by a closure")
        self.model, self.optimizers, self.scaler = model, list(optimizers), scaler
        self.forward, self.before_step = forward, before_step
        self.autocast: AbstractContextManager[Any] = nullcontext() if autocast is None else autocast

    def __call__(self, name: str, loss_function: LossFunction, batches: list[Batch], counts: Counts) -> Tensor:
        """One step of every optimizer by the loss of the batches, which it returns."""
        losses: list[Tensor] = []

        def closure() -> Tensor:
            losses.append(self._gradients(name, loss_function, batches, counts))
            if self.before_step is not None:
                if self.scaler is not None:
                    for optimizer in self.optimizers:
                        self.scaler.unscale_(optimizer)
                self.before_step()
            return losses[-1]

        if isinstance(self.optimizers[0], LBFGS):
            self.optimizers[0].step(cast(Any, closure))
            return losses[0]
        closure()
        for optimizer in self.optimizers:
            optimizer.step() if self.scaler is None else self.scaler.step(optimizer)
        if self.scaler is not None:
            self.scaler.update()
        return losses[0]

    def _gradients(self, name: str, loss_function: LossFunction, batches: list[Batch], counts: Counts) -> Tensor:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if len(batches) == 1:
            return self._backward(name, loss_function, batches[0])
        if getattr(loss_function, "tile_update", None) is not None:
            raise ValueError(
                f"{name} steps in its backward (tile_update), so {len(batches)} batches would be as many steps"
            )
        parts: list[Tensor] = []
        with shares(name, loss_function, [target for _, target in batches], counts) as of_all:
            for k, batch in enumerate(batches):
                # All but the last batch without an exchange between ranks.
                last = k == len(batches) - 1
                with nullcontext() if last else getattr(self.model, "no_sync", nullcontext)():
                    parts.append(self._backward(name, loss_function, batch, of_all, k))
        loss = torch.stack(parts).sum()
        return torch.where(of_all.kept > 0, loss, math.nan) if isinstance(of_all.kept, Tensor) else loss

    def _backward(
        self, name: str, loss_function: LossFunction, batch: Batch, of_all: Shares = ADDED_UP, k: int = 0
    ) -> Tensor:
        input, target = batch
        with self.autocast:
            loss = loss_function(self.output(input), target, **of_all.keywords)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"{name} must return a scalar loss, got {got}")
        loss = of_all.of(k, loss)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        loss = loss.detach()
        return loss.reshape(()) if loss.dim() else loss

    def output(self, input: Any) -> Any:
        return self.model(input) if self.forward is None else self.forward(self.model, input)
