"""Losses in turns: an auxiliary loss may take a step, and keeps it only if it helped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from ..checks import check_function, check_generator, check_number, check_several
from ..positional import by_name
from .means import Counts, LossFunction
from .modes import Randomness, evaluation
from .observation import Batch, observe
from .snapshot import Snapshot
from .update import Update

#: Flips of the coin that are drawn at once: an iteration without an attempt takes one from a list.
_COINS = 256


class Step(NamedTuple):
    """What one iteration did.

    Attributes:
        loss: 0-d, detached, on its device: the loss whose step stayed.
        used: that loss's name: ``"primary"`` or an auxiliary's.
        accepted: whether an auxiliary loss was kept; None where none was tried.
    """

    loss: Tensor
    used: str
    accepted: bool | None


class Statistics(NamedTuple):
    """Counts since the last reset.

    Attributes:
        iterations: calls of :meth:`MILS.step`.
        attempts: those in which an auxiliary loss took a step.
        acceptances: those in which it stayed.
        non_finite: those that were rejected because of a NaN or an infinity.
        by_auxiliary: per auxiliary loss (attempts, acceptances).
    """

    iterations: int
    attempts: int
    acceptances: int
    non_finite: int
    by_auxiliary: dict[str, tuple[int, int]]

    @property
    def ratio(self) -> float:
        """Acceptances per attempt; NaN without attempts."""
        return self.acceptances / self.attempts if self.attempts else math.nan


@by_name
class MILS:
    r"""Multiple independent losses scheduling: with probability P an auxiliary loss takes the step on trial.

    Each iteration, with a batch :math:`(x, y)`: with probability :math:`1-P` step with the primary loss; else draw an
    observation set :math:`D_o`, save the state, and step with the auxiliary loss on the same batch. If

    .. math:: \operatorname{acc}_{D_o}(\text{after}) > \operatorname{acc}_{D_o}(\text{before})

    the step stays; if not, the state is restored and the primary loss steps on the same batch. A rejected attempt
    leaves the run as if it had not been made, to the bit: MILS has a generator of its own for the coin and
    :math:`D_o`, and the global generators are put back.

    An iteration without an attempt is a plain training step and adds no synchronisation. An attempt costs two passes
    over the observation set, one save, at most one restore and one step more, and waits for the device once.

    Args:
        model: any module, also under DDP, FSDP2 or ``torch.compile``.
        optimizer: one, or a sequence of which each steps in every iteration.
        primary: called with (the model's output, target); returns a scalar. Every loss receives the whole output: where
            that is a tuple, ``JointLoss([loss], inputs=[1])`` hands on a part of it.
        auxiliary: a loss as ``primary``; or several, in a sequence or by names, which take turns by attempts.
        observation: :math:`D_o`: ``(dataset, n)``, n different samples drawn anew for each attempt; or a fixed
            ``(input, target)``; or a function that returns such a pair. The paper takes training samples, as many as
            a batch.
        participation: P in [0, 1]; may be assigned later. The paper takes 0.01 to 0.2.
        accept: ``"improves"`` (more correct than before) or ``"not_worse"`` (as many, or more). Ties are common, and
            where all are correct already ``"improves"`` cannot accept.
        extras: more to save and restore, whatever :class:`Snapshot` takes. Model, optimizers, scaler and the losses
            (centers, trained scales) need not be named. Nor need a learning rate scheduler: call its ``step()`` after
            this one's, once per iteration.
        generator: a CPU generator for the coin and :math:`D_o`; None: a new one, seeded by ``torch.initial_seed()``,
            under ``torch.distributed`` by the first rank's.
        forward: called with (model, input), returns the output; None: ``model(input)``.
        logits: selects from the output the (N, C, ...) logits that are scored; None: the output is the logits.
        autocast: entered around forward passes and losses, for instance ``torch.autocast("cuda")``.
        scaler: scales the losses; skips and updates are its own.
        before_step: called with no arguments when the gradients are there, unscaled: the place to clip them.
        restore_rng: put the global generators (torch's on the CPU and on the model's devices, Python's, NumPy's) back
            after a rejected attempt.
        process_group: over it the coin agrees and the correct counts are summed before a decision; None: all ranks,
            where ``torch.distributed`` is initialised. Ranks that train models of their own pass a group of one each.
            Every rank of it constructs MILS and steps together.

    Raises:
        TypeError, ValueError: a bad argument, by name, before anything starts.

    Example:
        >>> import torch, mlkernels
        >>> from mlkernels.schedule import MILS
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(64, 5)
        >>> y = x[:, :3].argmax(1)
        >>> model = torch.nn.Linear(5, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> mils = MILS(model, optimizer, primary=mlkernels.CrossEntropyLoss(), auxiliary=mlkernels.MultiMarginLoss(),
        ...             observation=(torch.utils.data.TensorDataset(x, y), 32), participation=0.5)
        >>> for _ in range(40):
        ...     loss, used, accepted = mils.step(x, y)
        >>> statistics = mils.statistics(reset=True)
        >>> statistics.iterations, 10 < statistics.attempts < 30, 0 <= statistics.ratio <= 1
        (40, True, True)
        >>> mils
        MILS(Linear, 'CrossEntropyLoss', auxiliary=['MultiMarginLoss'], participation=0.5, accept='improves')

    Source: Multiple Independent Losses Scheduling, algorithm 4.3. Its formulas did not survive in the text at hand: the
    algorithm is reconstructed from the description.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        primary: LossFunction,
        auxiliary: LossFunction | Sequence[LossFunction] | Mapping[str, LossFunction],
        observation: Callable[[], Batch] | Batch | tuple[Dataset[Any], int],
        participation: float = 0.01,
        accept: Literal["improves", "not_worse"] = "improves",
        extras: Sequence[Any] = (),
        generator: torch.Generator | None = None,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        logits: Callable[[Any], Tensor] | None = None,
        autocast: torch.autocast | None = None,
        scaler: torch.amp.GradScaler | None = None,
        before_step: Callable[[], object] | None = None,
        restore_rng: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._update = Update(
            model, optimizer, forward=forward, autocast=autocast, scaler=scaler, before_step=before_step
        )
        check_function("primary", primary, "a function of (output, target)")
        if accept not in ("improves", "not_worse"):
            raise ValueError(f"accept must be 'improves' or 'not_worse', got {accept!r}")
        if logits is not None:
            check_function("logits", logits)
        if generator is not None:
            check_generator(generator, "the coin is flipped")

        self.model, self.optimizers, self.primary = model, self._update.optimizers, primary
        self.auxiliary = _named(auxiliary)
        self.accept, self.restore_rng, self.scaler = accept, restore_rng, scaler
        self.participation = participation
        self._logits = logits
        losses = (primary, *self.auxiliary.values())
        self._losses = [loss for loss in losses if isinstance(loss, nn.Module)]
        self._group = process_group
        self._world, self._rank = 1, 0
        if dist.is_available() and dist.is_initialized():
            self._world, self._rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        self._generator = self._agreed(generator)
        self._observe = observe(observation, model, self._generator, self._rank, self._world)
        scalers = [] if scaler is None else [scaler]
        others = _Others(loss for loss in losses if not isinstance(loss, nn.Module))
        self._snapshot = Snapshot(model, *self.optimizers, *self._losses, others, *scalers, *extras)
        self._coins: list[float] = []
        self._attempts = 0  # ever: whose turn it is among the auxiliary losses
        self._clear_statistics()

    # ---- the public calls --------------------------------------------------------------------------------------------

    @property
    def participation(self) -> float:
        """P, the probability of an attempt."""
        return self._participation

    @participation.setter
    def participation(self, value: float) -> None:
        self._participation = check_number("participation", value)

    def step(self, input: Any, target: Any) -> Step:
        """One iteration: gradients are cleared, the batch passes forward and back, every optimizer steps.

        Args:
            input: whatever the model takes. target: whatever the losses take.

        Raises:
            ValueError: a loss that is no scalar. Whatever is raised within an attempt (by the model, a loss, the
                observation set) passes on after the state has been restored, the coin and the generator of the
                observation set too; the attempt is not counted.
        """
        return self._iterate([(input, target)], None)

    def accumulate(self, batches: Iterable[Batch], *, counts: Sequence[float | Tensor] | None = None) -> Step:
        r"""One iteration over several batches (input, target): one step, as if they were one batch.

        The loss is :math:`\sum_k n_k L_k / \sum_k n_k`. An attempt and the step that follows a rejection use all of
        the batches. DDP and its like exchange gradients once; over ranks they average, whatever each rank's rows are.

        Args:
            batches: pairs, one or more.
            counts: :math:`n_k`, >= 0, what each batch's mean is over, tokens for instance: numbers or tensors of one
                element. None: the rows that the loss keeps, whose label is not its ``ignore_index`` (-100 where it has
                none), each by its class's weight where it has a 1-D ``weight``. Losses with ``reduction="sum"`` are
                added up. A batch without such rows adds nothing. A mean of several divisors, class weights for one term
                and rows for a z-loss or for another loss, is that of one batch where all losses are of this package.

        Raises:
            ValueError: no batches, counts that do not fit them, or a loss of which it cannot be seen what it divides
                by, which so needs counts. TypeError: targets that are no tensors, without counts. Otherwise as
                :meth:`step`.
        """
        batches = [(input, target) for input, target in batches]
        if not batches:
            raise ValueError("batches must hold at least one (input, target), got none")
        if counts is not None:
            counts = [n.reshape(()) if isinstance(n, Tensor) and n.numel() == 1 else n for n in counts]
            check_several("counts", counts, "numbers", per="batch", count=len(batches))
            numbers = [check_number("counts", n) for n in counts if not isinstance(n, Tensor)]
            shaped = all(n.dim() == 0 for n in counts if isinstance(n, Tensor))
            nothing = len(numbers) == len(counts) and not sum(numbers)
            if not shaped or nothing or not all(0 <= n < math.inf for n in numbers):
                raise ValueError(f"counts must be >= 0 and not all 0, got {counts}")
        return self._iterate(batches, counts)

    def statistics(self, *, reset: bool = False) -> Statistics:
        """Counts since the last reset; with ``reset`` at the end of each epoch they are that epoch's."""
        by_auxiliary = {name: (tried, kept) for name, (tried, kept) in self._counts.items()}
        attempts, acceptances = map(sum, zip(*by_auxiliary.values(), strict=True))
        result = Statistics(self._iterations, attempts, acceptances, self._non_finite, by_auxiliary)
        if reset:
            self._clear_statistics()
        return result

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on with the same coins and observation sets, and the counts.

        Model, optimizer and whatever else is trained have state_dicts of their own.
        """
        return {
            "generator": self._generator.get_state(),
            "coins": list(self._coins),
            "attempts": self._attempts,
            "iterations": self._iterations,
            "non_finite": self._non_finite,
            "counts": {name: list(pair) for name, pair in self._counts.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken.

        Raises:
            ValueError: not such a dictionary, or one of other auxiliary losses; nothing has been changed then.
        """
        wanted = self.state_dict()
        if set(state_dict) != set(wanted):
            raise ValueError(f"state_dict must have the keys {sorted(wanted)}, got {sorted(state_dict)}")
        if list(state_dict["counts"]) != list(self.auxiliary):
            names = list(self.auxiliary), list(state_dict["counts"])
            raise ValueError(f"state_dict must be of the auxiliary losses {names[0]}, got {names[1]}")
        self._generator.set_state(state_dict["generator"].cpu())
        self._coins = list(state_dict["coins"])
        self._attempts = state_dict["attempts"]
        self._iterations, self._non_finite = state_dict["iterations"], state_dict["non_finite"]
        self._counts = {name: list(pair) for name, pair in state_dict["counts"].items()}

    def __repr__(self) -> str:
        losses = ", ".join(map(repr, self.auxiliary))
        options = f"participation={self.participation}, accept={self.accept!r}"
        return f"MILS({type(self.model).__name__}, {_name(self.primary)!r}, auxiliary=[{losses}], {options})"

    # ---- one iteration -----------------------------------------------------------------------------------------------

    def _iterate(self, batches: list[Batch], counts: Counts) -> Step:
        accepted = None
        coin = self._coin()
        if coin < self._participation:
            names = list(self.auxiliary)
            name = names[self._attempts % len(names)]
            drawn = self._generator.get_state()
            try:
                loss, accepted, finite = self._attempt(name, batches, counts)
            except BaseException:
                self._generator.set_state(drawn)
                self._coins.append(coin)
                raise
            self._attempts += 1
            self._counts[name][0] += 1
            self._counts[name][1] += accepted
            self._non_finite += not finite
            if accepted:
                self._iterations += 1
                return Step(loss, name, True)
        loss = self._update("primary", self.primary, batches, counts)
        self._iterations += 1
        return Step(loss, "primary", accepted)

    def _attempt(self, name: str, batches: list[Batch], counts: Counts) -> tuple[Tensor, bool, bool]:
        """A step with an auxiliary loss, undone unless accepted: the loss, whether it was, whether all was finite."""
        randomness = Randomness(self.model) if self.restore_rng else None
        gradients = self._gathering()
        # Saved before anything else: drawing and scoring may change buffers too (DDP broadcasts them).
        self._snapshot.save()
        accepted = False
        try:
            input, target = self._observe()
            before, _ = self._score(input, target)
            loss = self._update(f"auxiliary {name!r}", self.auxiliary[name], batches, counts)
            # An autocast around all this keeps its casts of weights, from before the step.
            torch.clear_autocast_cache()
            after, broken = self._score(input, target)
            accepted, finite = self._decide(before, after, broken | ~loss.isfinite().to(broken.device))
        finally:
            if not accepted:
                try:
                    self._snapshot.restore()
                finally:  # a part's own load_state_dict may fail
                    self._clear_gradients()
                    for parameter, gradient in gradients:
                        parameter.grad = gradient
                    if randomness is not None:
                        randomness.restore()
        return loss, accepted, finite

    def _gathering(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Copies of the gradients that no optimizer here clears: they add up from iteration to iteration."""
        stepped = {id(p) for one in self.optimizers for group in one.param_groups for p in group["params"]}
        parameters = {id(p): p for module in (self.model, *self._losses) for p in module.parameters()}
        others = [p for key, p in parameters.items() if key not in stepped]
        # Copies: under DDP a gradient may be a view of a bucket, which the attempt fills anew.
        return [(p, p.grad.clone()) for p in others if p.grad is not None]

    def _clear_gradients(self) -> None:
        """Also of parameters that no optimizer here steps: an attempt's must not be added to theirs."""
        for module in (self.model, *self._losses):
            module.zero_grad(set_to_none=True)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    # ---- the decision ------------------------------------------------------------------------------------------------

    def _score(self, input: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        """How many rows are right in evaluation mode, and whether a logit is NaN; 0-d on the device."""
        with evaluation(self.model), torch.no_grad(), self._update.autocast:
            output = self._update.output(input)
            logits = output if self._logits is None else self._logits(output)
        if not isinstance(logits, Tensor):
            raise TypeError(f"logits must select a tensor from the model's output, got {type(logits).__name__}")
        if not isinstance(target, Tensor) or logits.dim() < 2 or target.shape != logits.shape[:1] + logits.shape[2:]:
            got = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise ValueError(f"observation must have one label per row of logits {tuple(logits.shape)}, got {got}")
        if target.numel() == 0:
            raise ValueError("observation must hold at least one sample, got none")
        highest, prediction = logits.max(1)
        broken = highest.isnan()  # the maximum of a row with a NaN
        return ((prediction == target) & ~broken).sum(), broken.any()

    def _decide(self, before: Tensor, after: Tensor, broken: Tensor) -> tuple[bool, bool]:
        """Whether to accept, and whether all was finite: the one look at the device."""
        if self._world > 1:
            counts = torch.stack((before, after, broken.to(before.dtype)))
            dist.all_reduce(counts, group=self._group)
            before, after, broken = counts.unbind()
        better = after > before if self.accept == "improves" else after >= before
        verdict = int(torch.where(broken > 0, 2, better.long()).item())
        return verdict == 1, verdict != 2

    # ---- chance ------------------------------------------------------------------------------------------------------

    def _coin(self) -> float:
        if not self._coins:
            draws = torch.rand(_COINS, generator=self._generator, dtype=torch.float64, device="cpu")
            self._coins = draws.tolist()
        return self._coins.pop()

    def _agreed(self, generator: torch.Generator | None) -> torch.Generator:
        """The generator, in the same state on all ranks."""
        given = generator is not None
        if generator is None:
            # Not the seed itself: a shuffling generator of the same seed would draw the same numbers.
            generator = torch.Generator().manual_seed((torch.initial_seed() + 0x4D494C53) % 2**63)
        if self._world > 1:
            states: list[Any] = [None] * self._world
            dist.all_gather_object(states, generator.get_state(), group=self._group)
            if given and not all(torch.equal(states[0], state) for state in states):
                raise ValueError("generator must be in the same state on all ranks, got different ones")
            generator.set_state(states[0])
        return generator

    def _clear_statistics(self) -> None:
        self._iterations = self._non_finite = 0
        self._counts = {name: [0, 0] for name in self.auxiliary}


def _name(loss: Any) -> str:
    return str(getattr(loss, "__name__", type(loss).__name__))


def _named(auxiliary: Any) -> dict[str, LossFunction]:
    """The auxiliary losses by names."""
    if isinstance(auxiliary, Mapping):
        named = dict(auxiliary)
    else:
        # A module that is itself a sequence (nn.Sequential, nn.ModuleList of losses): the former is called, not walked.
        several = isinstance(auxiliary, (Sequence, nn.ModuleList))
        named = {}
        for loss in auxiliary if several else [auxiliary]:
            name = base = _name(loss)
            while name in named:
                name = f"{base}_{len(named)}"
            named[name] = loss
    if not named:
        raise ValueError("auxiliary must hold at least one loss, got none")
    for name, loss in named.items():
        if not isinstance(name, str) or name == "primary":
            raise ValueError(f"auxiliary must have names other than 'primary', got {name!r}")
        check_function("auxiliary", loss, "functions of (output, target)")
    return named


class _Others(nn.Module):
    """Losses that are no modules, for a snapshot: an object among them may have attributes that change."""

    def __init__(self, losses: Iterable[LossFunction]) -> None:
        super().__init__()
        self.losses = list(losses)
