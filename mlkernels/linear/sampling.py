"""A part of the classes at a time: the positives of a batch, and others at random."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..checks import check_size
from ..numbering import IGNORE_INDEX, MASK, Slot, consts_of, structure_of

Correction: TypeAlias = Literal["importance"]
#: Labels of ignored rows among sampled classes.
IGNORED = -1


class Draws(nn.Module):
    """A stream of random numbers whose state is two integers, the same on all ranks, each of which draws its own."""

    def __init__(self, seed: int | None = None, rank: int = 0) -> None:
        super().__init__()
        self.seed = int(torch.randint(2**62, ())) if seed is None else seed
        self.count, self.rank = 0, rank

    def generator(self, device: torch.device, counts: bool = True) -> torch.Generator:
        """For the next draw; one that does not count is made again."""
        name = f"{self.seed} {self.count} {self.rank}".encode()
        self.count += counts
        return torch.Generator(device).manual_seed(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big"))

    def get_extra_state(self) -> dict[str, int]:
        """Seed and how often it was drawn from."""
        return {"seed": self.seed, "count": self.count}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Goes on where another one was."""
        self.seed, self.count = state["seed"], state["count"]


class Sample(NamedTuple):
    """What was drawn, by the labels of all rows on all ranks. The sampled classes of all ranks are numbered one rank
    after another, those of a rank with the batch's positives first, in ascending order.

    Attributes:
        classes: (K,), of this rank's shard. positives: 0-d, how many of them are.
        label: (N,), among the sampled classes of all ranks.
        starts: where each rank's begin among them, and where the last one's end.
        first: of this rank's shard among all classes. share: 0-d, of its classes that are no positives the drawn ones.
        unique: each class that is a positive, once: the class, its number among the sampled ones, and whether the entry
            is one: (N,) each.
    """

    classes: Tensor
    positives: Tensor
    label: Tensor
    starts: tuple[int, ...]
    rank: int
    first: int
    share: Tensor
    unique: tuple[Tensor, Tensor, Tensor]

    def others(self) -> tuple[Tensor, Tensor]:
        """Which of this rank's classes are no positives, and their numbers among the sampled ones."""
        index = torch.arange(len(self.classes), device=self.classes.device)
        return index >= self.positives, index + self.starts[self.rank]

    def vector(self, of_classes: Tensor) -> Tensor:
        """(C,) of all classes to those that are sampled: right at labels, which is what gradients need, and at this
        rank's; what others have drawn is 0, and not read."""
        at, number, there = self.unique
        values = torch.where(there, of_classes[at], 0)
        found = values.new_zeros(self.starts[-1]).index_add(0, number, values)
        drawn, own = self.others()
        return found.index_add(0, own, torch.where(drawn, of_classes.detach()[self.classes + self.first], 0))

    def bound(
        self, numbers: Sequence[float], params: dict[int, Tensor], whole: frozenset[int], correction: Correction | None
    ) -> tuple[list[float], dict[int, Tensor]]:
        """A loss's numbers and tensors for the sampled classes; whole: the slots of tensors that no class indexes."""
        numbers = list(numbers)
        numbers[IGNORE_INDEX] = IGNORED
        params = {slot: self.vector(p) if p.dim() == 1 and slot not in whole else p for slot, p in params.items()}
        if correction is not None:
            drawn, own = self.others()
            # Before the scale, which all adjustments are.
            more = torch.where(drawn, -self.share.log() / _one_scale(numbers, params), 0)
            given = params.get(Slot.ADJUSTMENT, more.new_zeros(self.starts[-1]))
            params[Slot.ADJUSTMENT] = given.index_add(0, own, more.to(given.dtype))
            numbers[MASK] = int(numbers[MASK]) | 1 << Slot.ADJUSTMENT
            params = dict(sorted(params.items()))
        return numbers, params


class ClassSampler(Draws):
    """Draws the classes that a loss sees: all positives, and others of each shard up to a number, without replacement.

    Args:
        sample: how many of a shard, or as many as there are positives if these are more.
        correction: see :class:`mlkernels.LinearLoss`.
        offsets: where each rank's classes begin, and where the last one's end.
    """

    bounds: Tensor

    def __init__(
        self,
        sample: int,
        correction: Correction | None,
        offsets: Sequence[int],
        device: torch.device,
        rank: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(seed, rank)
        self.sample, self.correction, self.offsets = sample, correction, tuple(offsets)
        self.register_buffer("bounds", torch.tensor(self.offsets, device=device), persistent=False)

    def extra_repr(self) -> str:
        """Options."""
        return f"sample={self.sample}, correction={self.correction!r}"

    @torch.no_grad()
    def _drawn(self, own: Tensor, local: Tensor, size: int, generator: torch.Generator) -> Tensor:
        """So many classes of this shard that are no positives, in the order in which they were drawn."""
        classes = self.offsets[self.rank + 1] - self.offsets[self.rank]
        key = torch.rand(classes + 1, generator=generator, device=local.device)
        key[torch.where(own, local, classes)] = torch.inf  # of rows whose label is another's, the one that there is not
        return key[:classes].topk(size, largest=False).indices

    def draw(self, label: Tensor, ignored: int) -> Sample:
        """By the labels (N,) of all rows. It waits for a GPU only where there are more rows than ``sample``."""
        ranks, end, rank = len(self.offsets) - 1, self.offsets[-1], self.rank
        # Under no_grad a checkpoint may be recomputed, with gradients, by the same classes.
        generator = self.generator(label.device, torch.is_grad_enabled())
        kept = (label != ignored) & (label >= 0) & (label < end)
        ordered, order = torch.where(kept, label, end).sort()
        there = ordered < end
        there[1:] &= ordered[1:] != ordered[:-1]
        # Positives, each once, ahead of each entry.
        ahead = torch.cat([there.new_zeros(1), there]).cumsum(0)
        before = ahead[torch.searchsorted(ordered, self.bounds)]
        many = before.diff()
        caps = self.bounds.diff()
        sizes = [min(b - a, self.sample) for a, b in zip(self.offsets, self.offsets[1:], strict=False)]
        if len(label) > self.sample:
            sizes = torch.minimum(caps, many.clamp(min=self.sample)).tolist()
        starts = torch.cat([caps.new_zeros(1), torch.minimum(caps, many.clamp(min=self.sample)).cumsum(0)])
        owner = torch.bucketize(ordered, self.bounds[1:], right=True).clamp(max=ranks - 1)
        number = starts[owner] + ahead[torch.searchsorted(ordered, ordered)] - before[owner]
        placed = torch.empty_like(number).index_copy_(0, order, number)
        total = sum(sizes)
        compact = torch.where(kept, placed, torch.where(label == ignored, IGNORED, total))

        size, first = sizes[rank], self.offsets[rank]
        own = there & (owner == rank)
        others = self._drawn(own, ordered - first, size, generator)
        index = torch.arange(size, device=label.device)
        classes = others.new_zeros(size + 1)
        classes[:size] = others[(index - many[rank]).clamp(min=0)] if size else others
        classes[torch.where(own, number - starts[rank], size)] = torch.where(own, ordered - first, 0)
        share = (size - many[rank]).double() / (caps[rank] - many[rank])
        unique = (torch.where(there, ordered, 0), torch.where(there, number, 0), there)
        ends = tuple(sum(sizes[:at]) for at in range(ranks + 1))
        return Sample(classes[:size], many[rank], compact, ends, rank, first, share, unique)


def check_sample(sample: int | None, correction: Correction | None) -> int | None:
    """How many classes are drawn, which is returned, and what makes up for the others."""
    if sample is not None:
        sample = check_size("sample", sample)
    if correction not in (None, "importance"):
        raise ValueError(f"sample_correction must be 'importance' or None, got {correction!r}")
    if correction is not None and sample is None:
        raise ValueError("sample_correction makes up for classes that are not drawn: it goes with sample=")
    return sample


def _one_scale(numbers: Sequence[float], params: dict[int, Tensor]) -> Tensor | float:
    """The scale of all rows, which is what a correction of classes can be divided by."""
    consts = consts_of(numbers)
    if consts[Slot.SMOOTHING]:
        raise ValueError("sample_correction takes no label_smoothing, which would spread over the correction too")
    scale = params.get(Slot.SCALE)
    if structure_of(numbers).scales > 1 or (scale is not None and scale.dim() > 0):
        raise ValueError("sample_correction takes one scale for all rows, not one per row or class, nor two")
    return consts[Slot.SCALE] if scale is None else scale.detach()
