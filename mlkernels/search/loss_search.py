"""The search over losses: a normal distribution over piecewise-linear t and tau, moved by its samples' rewards."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import Unpack

from ..call import Options
from ..checks import check_generator, check_number, check_size, unknown_keywords
from ..modules import PiecewiseLoss
from ..positional import by_name
from .population import PopulationLoss
from .ranks import Ranks
from .record import ROWS, SETTINGS, Record, Round, identity, settings_of
from .trainer import Reward, Train, Trainer

_ROUNDS = ("theta", "rewards", "best", "mu")
_SEARCHED = {"both": (1.0, 1.0, 1.0, 1.0), "t": (1.0, 1.0, 0.0, 0.0), "tau": (0.0, 0.0, 1.0, 1.0)}


@by_name
class LossSearch:
    r"""The search for a loss while the model is trained, AM-LFS.

    The losses are :math:`L = -\log\tau(p^t_y)` of :func:`mlkernels.piecewise_cross_entropy`, each a point
    :math:`\theta = [a^t, b^t, a^\tau, b^\tau]` of 4M numbers. In every epoch

    * B candidates are drawn, :math:`\theta_i \sim N(\mu, \sigma^2 I)`, with :math:`\mu` the identity at first;
    * each trains the current model for one epoch: parameters, buffers and the optimizer's state are those of the
      winner of the epoch before;
    * its reward is taken, for instance the accuracy on held-out data, and with rewards :math:`r_i` normalised to zero
      mean and unit variance, :math:`g = \frac1B\sum_i r_i\,(\theta_i - \mu)/\sigma^2` is the gradient that Adam
      ascends with :math:`\mu`;
    * the model with the largest reward, the first of equal ones, goes on.

    There is no training anew: after the last epoch the model is the result. :meth:`step` does one epoch, :meth:`run`
    many; :meth:`sample` and :meth:`update` are the two halves of an epoch, for a loop of one's own.

    A reward that is not finite says that its candidate failed, which is common (a loss may diverge): it counts as the
    smallest finite one and cannot win. If no reward is finite that is an error. If all are equal, g is exactly 0; Adam
    then still moves :math:`\mu` by its momentum.

    Args:
        pieces: M >= 1, the bins of t and of tau.
        candidates: B >= 2.
        sigma: the standard deviation of every number of :math:`\theta`.
        lr: Adam's learning rate for :math:`\mu`. 0 never moves it: random search around the identity.
        search: ``"both"``, ``"t"`` or ``"tau"``; what is not searched stays the identity.
        generator: draws the candidates and the seeds of the epochs; on the CPU. None: one that is seeded from torch's
            global generator.
        progress: a bar that counts candidates; None: if tqdm is installed and stderr is a terminal.
        scale, tau_min, clamp: and all other options as in :class:`mlkernels.PiecewiseLoss`, for every candidate. t is
            defined on [-1, 1], that is on cosines, which want a ``scale``; beyond, the outer pieces go on.

    Attributes:
        record: a :class:`Record`: every candidate, reward and :math:`\mu`.

    Example:
        >>> import torch
        >>> from mlkernels import metrics
        >>> from mlkernels.search import LossSearch
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(64, 4), torch.randint(3, (64,))
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        >>> def train(model, optimizer, loss):
        ...     for rows in torch.randperm(64).split(16):
        ...         optimizer.zero_grad()
        ...         loss(model(x[rows]), y[rows]).backward()
        ...         optimizer.step()
        >>> def reward(model):
        ...     return (model(x).argmax(-1) == y).float().mean(-1)
        >>> search = LossSearch(candidates=4, search="tau")
        >>> record = search.run(model, optimizer, train, reward, epochs=2)
        >>> record.rewards.shape
        torch.Size([2, 4])
        >>> float(reward(model)) == float(record.rewards[-1].max())
        True
        >>> search.loss()  # what was found
        PiecewiseLoss(t_slope=None, t_bias=None, tau_slope=(6,), tau_bias=(6,), scale=1.0, tau_min=1e-06, clamp='min')

    Source: Li et al., AM-LFS, equations (16), (17), (19), (20) and algorithm 1.
    """

    def __init__(
        self,
        pieces: int = 6,
        candidates: int = 32,
        sigma: float = 0.2,
        lr: float = 0.05,
        generator: torch.Generator | None = None,
        search: Literal["both", "t", "tau"] = "both",
        *,
        progress: bool | None = None,
        scale: float | Tensor = 1.0,
        tau_min: float = 1e-6,
        clamp: str = "min",
        **common: Unpack[Options],
    ) -> None:
        if unknown := {name: value for name, value in common.items() if name not in Options.__annotations__}:
            raise unknown_keywords(type(self), unknown, Options.__annotations__)
        pieces, candidates = check_size("pieces", pieces), check_size("candidates", candidates, 2)
        sigma, lr, tau_min = check_number("sigma", sigma), check_number("lr", lr), check_number("tau_min", tau_min)
        if search not in _SEARCHED:
            raise ValueError(f"search must be one of {', '.join(map(repr, _SEARCHED))}, got {search!r}")
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, ())))
        check_generator(generator, "candidates are drawn")
        if progress and find_spec("tqdm") is None:
            raise ImportError("progress=True needs tqdm: pip install tqdm")
        self.generator, self.progress = generator, progress
        self.record = Record(pieces, candidates, sigma, lr, search, tau_min, clamp)
        self._options: dict[str, Any] = {"scale": scale, "tau_min": tau_min, "clamp": clamp, **common}
        self._searched = torch.tensor(_SEARCHED[search], dtype=torch.float64).unsqueeze(1)
        self._mu = identity(pieces)
        self._adam = torch.optim.Adam([self._mu], lr=lr)
        self.loss()  # an option that is refused is refused here

    # ---- the distribution --------------------------------------------------------------------------------------------

    @property
    def mu(self) -> Tensor:
        """Slopes and biases of t, then of tau, (4, M), as a copy."""
        return self._mu.clone()

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return len(self.record.rounds)

    def sample(self) -> Tensor:
        """(B, 4, M) candidates, float64 on the CPU. Advances the generator, nothing else."""
        record = self.record
        shape = record.candidates, 4, record.pieces
        noise = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return self._mu + record.sigma * self._searched * noise

    def update(self, theta: Tensor, rewards: Tensor | Sequence[float]) -> Round:
        r"""Move :math:`\mu` by the candidates' rewards, and record them.

        Args:
            theta: (B, 4, M), as :meth:`sample` drew them.
            rewards: (B,), larger is better; not finite: failed.

        Returns:
            The epoch's :class:`Round`; ``best`` is the number of the candidate that goes on.

        Raises:
            ValueError: wrong shapes, or no finite reward; nothing has changed then.
        """
        record = self.record
        theta = torch.as_tensor(theta, dtype=torch.float64).cpu()
        found = torch.as_tensor(rewards, dtype=torch.float64).cpu()
        wanted = (record.candidates, 4, record.pieces)
        if theta.shape != wanted:
            raise ValueError(f"theta must be (B, 4, M) = {wanted}, got {tuple(theta.shape)}")
        if found.shape != wanted[:1]:
            raise ValueError(f"rewards must be (B,) = {wanted[:1]}, got {tuple(found.shape)}")
        best, normal = winner(found), normalised(counted(found))
        gradient = (normal.view(-1, 1, 1) * (theta - self._mu)).mean(0) / record.sigma**2
        self._mu.grad = -gradient
        self._adam.step()
        self._mu.grad = None
        record.rounds.append(Round(self.epoch, theta.clone(), found.clone(), best, self.mu))
        return record.rounds[-1]

    @overload
    def loss(self, theta: None = None) -> PiecewiseLoss: ...

    @overload
    def loss(self, theta: Tensor) -> PiecewiseLoss | PopulationLoss: ...

    def loss(self, theta: Tensor | None = None) -> PiecewiseLoss | PopulationLoss:
        r"""The loss of a candidate, with this search's options, in float32 on the CPU.

        Args:
            theta: (4, M), or (G, 4, M) for a :class:`PopulationLoss`; None: :math:`\mu`, what is found so far.
        """
        theta = self._mu if theta is None else theta
        pieces = self.record.pieces
        if theta.dim() not in (2, 3) or theta.shape[-2:] != (4, pieces):
            raise ValueError(f"theta must be (4, {pieces}) or (G, 4, {pieces}), got {tuple(theta.shape)}")
        rows = [row.contiguous() for row in theta.detach().float().unbind(-2)]
        tables: dict[str, Any] = {
            name: row for name, row, searched in zip(ROWS, rows, self._searched, strict=True) if searched
        }
        kind: type[PiecewiseLoss] = PiecewiseLoss if theta.dim() == 2 else PopulationLoss
        return kind(**tables, **self._options)

    # ---- the epochs --------------------------------------------------------------------------------------------------

    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train: Train,
        reward: Reward,
        *,
        population: int = 1,
        process_group: dist.ProcessGroup | None = None,
        extras: Sequence[Any] = (),
    ) -> Round:
        """One epoch of the search; afterwards model, optimizer and extras are the winner's.

        ``train(model, optimizer, loss)`` trains for one epoch, in place. ``reward(model)`` is called in evaluation mode
        without gradients. Every candidate starts from the same state, and with torch's global generators seeded alike:
        where batches, masks and augmentation are drawn from those (as ``DataLoader`` and ``torch.randperm`` do by
        default), all candidates of an epoch see the same. Afterwards the global generators are as they were before.

        Args:
            model: any module. Its gradients are cleared.
            optimizer: any, of the model's parameters.
            train, reward: see above; larger rewards are better. They may be called with a :class:`Population`, its
                optimizer and a :class:`PopulationLoss`, which take the same calls; the reward is then (G,).
            population: how many candidates are trained at once. 1: one after another, in the model itself; the bits of
                a training loop of one's own. More: as a :class:`Population`, with its conditions, and memory for it.
            process_group: split the candidates over its ranks, each with a model of its own on a device of its own;
                ``torch.distributed.group.WORLD`` for all. Every rank calls this. Candidates, seeds and the state at the
                start are those of rank 0; the result is that of one process. ``train`` must not communicate.
            extras: whatever else changes in training and has a ``state_dict``: a loss's module, a scheduler that is
                stepped within the epoch, a GradScaler. Not with population > 1.

        Returns:
            The epoch's :class:`Round`.

        Raises:
            ValueError, TypeError: arguments against the above, or no finite reward.
            RuntimeError: another rank failed; the message says how.

        What ``train`` and ``reward`` raise passes on. After any error everything is as it was before the call: model,
        optimizer, extras, the distribution and all generators.
        """
        ranks = Ranks(process_group)
        drawn_from = self.generator.get_state()
        try:
            with Trainer(model, optimizer, train, reward, population, extras, ranks) as trainer:
                rewards, theta = self._earn(trainer, ranks)
                trainer.adopt(winner(rewards) % ranks.size)
        except BaseException:
            self.generator.set_state(drawn_from)
            raise
        return self.update(theta, rewards)

    def run(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train: Train,
        reward: Reward,
        *,
        epochs: int,
        callback: Callable[[Round], object] | None = None,
        population: int = 1,
        process_group: dist.ProcessGroup | None = None,
        extras: Sequence[Any] = (),
    ) -> Record:
        """Epochs of :meth:`step` until ``epochs`` are done in all, those before a checkpoint included.

        Args:
            model, optimizer, train, reward, population, process_group, extras: as in :meth:`step`.
            epochs: in all, >= 1.
            callback: is called after each epoch with its :class:`Round`: to save a checkpoint, to step a scheduler.

        Returns:
            The :attr:`record`.

        Raises:
            ValueError, TypeError, RuntimeError: as in :meth:`step`; the epochs before the error stay done.
        """
        epochs = check_size("epochs", epochs)
        while self.epoch < epochs:
            last = self.step(
                model, optimizer, train, reward, population=population, process_group=process_group, extras=extras
            )
            if callback is not None:
                callback(last)
        return self.record

    def _earn(self, trainer: Trainer, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """Rewards and candidates of an epoch, the same on every rank."""
        seed = int(torch.randint(2**63 - 1, (), generator=self.generator))
        here = (*settings_of(self.record).values(), self.epoch)
        there, mu, theta, seed = ranks.broadcast((here, self._mu, self.sample(), seed))
        trainer.start_alike()

        def work() -> list[float]:
            if here != there or not torch.allclose(self._mu, mu):
                raise ValueError(
                    f"the searches of all ranks must be alike, load a checkpoint on every rank: rank {ranks.rank} has "
                    f"{(*SETTINGS, 'epoch')} = {here}, rank 0 {there}{'; their means differ' if here == there else ''}"
                )
            with self._bar(len(mine), ranks) as done:
                return trainer.earn(theta[mine], self.loss, seed, done)

        mine = list(range(ranks.rank, len(theta), ranks.size))
        rewards = torch.empty(len(theta), dtype=torch.float64)
        for rank, found in enumerate(ranks.collect(work)):
            rewards[rank :: ranks.size] = torch.tensor(found, dtype=torch.float64)
        return rewards, theta

    @contextmanager
    def _bar(self, total: int, ranks: Ranks) -> Iterator[Callable[[int, float], object]]:
        if self.progress is False or ranks.rank > 0 or find_spec("tqdm") is None:
            yield lambda count, best: None
            return
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

        disable = None if self.progress is None else False  # None: no bar where nobody watches
        unit = "candidate" if ranks.size == 1 else f"candidate of rank {ranks.rank}"
        with tqdm(total=total, desc=f"epoch {self.epoch + 1}", unit=unit, disable=disable, leave=False) as bar:

            def done(count: int, best: float) -> None:
                bar.set_postfix_str(f"best {best:.4g}", refresh=False)
                bar.update(count)

            yield done

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the search goes on from, its record too; tensors and plain Python, copied.

        Save it with the state of the model and of the optimizer: together they resume to the bit.

        Example:
            >>> from mlkernels.search import LossSearch
            >>> search, other = LossSearch(candidates=4), LossSearch(candidates=4)
            >>> _ = search.update(search.sample(), [0.1, 0.3, 0.2, 0.3])
            >>> other.load_state_dict(search.state_dict())
            >>> bool((other.sample() == search.sample()).all())
            True
        """
        state: dict[str, Any] = {name: getattr(self.record, name) for name in (*SETTINGS, *_ROUNDS)}
        return copy.deepcopy(state | {"adam": self._adam.state_dict(), "generator": self.generator.get_state()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another search's state; both have the same settings.

        Raises:
            ValueError: other settings (another number of pieces or candidates, another sigma, ...), or not a state of
                a search; nothing has changed then.
        """
        missing = [name for name in (*SETTINGS, *_ROUNDS, "adam", "generator") if name not in state]
        if missing:
            raise ValueError(f"state must be that of a LossSearch, got one without {', '.join(missing)}")
        for name, value in settings_of(self.record).items():
            if state[name] != value:
                raise ValueError(f"state must be of a search with {name}={value!r}, got {name}={state[name]!r}")
        count, (candidates, pieces) = len(state["best"]), (self.record.candidates, self.record.pieces)
        wanted = ((count, candidates, 4, pieces), (count, candidates), (count,), (count + 1, 4, pieces))
        for name, shape in zip(_ROUNDS, wanted, strict=True):
            got = tuple(state[name].shape) if isinstance(state[name], Tensor) else type(state[name]).__name__
            if got != shape:
                raise ValueError(f"{name} of state must be a tensor of {shape}, got {got}")
        state = copy.deepcopy(state)
        mu = torch.empty_like(self._mu)
        adam = torch.optim.Adam([mu], lr=self.record.lr)
        adam.load_state_dict(state["adam"])
        # The last that may fail, and does so before it changes anything.
        self.generator.set_state(state["generator"])
        mu.copy_(state["mu"][-1])
        self._mu, self._adam = mu, adam
        rounds = zip(state["theta"], state["rewards"], state["best"].tolist(), state["mu"][1:], strict=True)
        self.record.rounds[:] = [Round(epoch, *values) for epoch, values in enumerate(rounds)]

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in settings_of(self.record).items())
        return f"LossSearch({settings}, epoch={self.epoch})"


def counted(rewards: Tensor) -> Tensor:
    """Rewards with the smallest finite one in the place of those that are not finite."""
    finite = rewards.isfinite()
    if not bool(finite.any()):
        raise ValueError(f"rewards must have a finite one, got {rewards.tolist()}: every candidate failed")
    return rewards.where(finite, rewards[finite].min())


def normalised(rewards: Tensor) -> Tensor:
    """To zero mean and unit variance; equal rewards to zeros."""
    centred = rewards - rewards.mean()
    # The mean of equal numbers may be off by a rounding error, which Adam would take for a direction.
    return torch.zeros_like(rewards) if rewards.min() == rewards.max() else centred / (centred.std(correction=0) + 1e-8)


def winner(rewards: Tensor) -> int:
    """The candidate with the largest reward, the first of equal ones."""
    counted(rewards)
    found = rewards.where(rewards.isfinite(), -math.inf)
    # argmax of the rewards themselves need not give the first.
    return int((found == found.max()).nonzero()[0])
