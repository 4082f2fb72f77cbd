"""Logits that are a product: what a loss of the family is called with in their place, so that any of them can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from typing_extensions import Never

from .. import fast_path
from ..backends.reference import RowStats
from ..call import Common, bind
from ..checks import accumulated, check_flag
from ..numbering import IGNORE_INDEX, REDUCTION, Reduction, Slot, slots_of
from ..softmax import Asked, ProductLogits
from ..spec import Number, Spec
from ..tracing import functorch_level, is_dual, is_jit_tracing, traced
from . import graph, threads
from .autograd import WHOLE, fast_path_backward, has_hooks, linear_loss
from .loop import Call, Wanted, planned
from .pieces import CPU, pieces_for
from .plan import DEFAULT, Cut, workspace
from .sampling import ClassSampler, Sample
from .update import Updating


def _refused(self: ProductLogits, *_: object) -> Never:
    raise TypeError(f"loss calculates with the logits of a linear head: {self.instead}")


class LinearLogits(ProductLogits):
    """The logits x W^T + b, or the cosines of x and W, of which there is never more than a part.

    Args:
        input: (N, ..., D). weight: (C, D). bias: (C,) or None. normalize: cosines.
        cut: strategy, memory and compact, see :func:`mlkernels.linear_softmax_loss`.
        begin: what hands out an ``Updating``, where the backward is to step the weight.
        sampler: what draws the classes that the loss sees, where it sees some.
    """

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        normalize: bool = False,
        return_stats: bool = False,
        cut: Cut = DEFAULT,
        begin: Callable[[], Updating] | None = None,
        sampler: ClassSampler | None = None,
    ):
        check_flag("return_stats", return_stats)
        self.begin, self.sampler = begin, sampler
        self.sample: Sample | None = None
        #: Weight and bias of the classes that the loss sees.
        self.part = weight, bias
        self.input, self.weight, self.bias, self.normalize = input, weight, bias, normalize
        self.return_stats, self.cut = return_stats, cut
        forced = begin or sampler or cut.strategy or cut.memory
        #: What the fast path takes, where a head may be one that it serves.
        self.plain = None if forced else (input, weight, bias, normalize, return_stats)
        #: The row statistics of the loss that was taken, where they were asked for.
        self.stats: RowStats | None = None
        self.visits = 0

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"loss reads .{name} of the logits of a linear head, which have none: {self.instead}")

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], *_: Any) -> Never:
        raise TypeError(f"loss calls {function.__name__}() on the logits of a linear head: {cls.instead}")

    @property
    def dtype(self) -> torch.dtype:
        return self.input.dtype

    @property
    def device(self) -> torch.device:
        return self.input.device

    def shaped(self) -> Tensor:
        """Of the shape (N, C, ...) that these logits would have, in no memory: for checks."""
        leading, classes = self.input.shape[:-1], self.weight.shape[0]
        return self.input.detach().new_empty(()).expand(leading[0], classes, *leading[1:])

    def loss(self, target: Tensor, asked: Asked) -> tuple[Tensor, RowStats | None]:
        """The loss and its row statistics, in the shape of target."""
        numbers, params, tables, return_stats, backend = asked
        x, weight, bias = self.input, self.weight, self.bias
        given = [t for t in (x, weight, bias, target, *params) if t is not None]
        compiled = torch.compiler.is_compiling()
        if not compiled and (
            functorch_level() is not None or (forward_ad._current_level >= 0 and any(map(is_dual, given)))
        ):
            raise RuntimeError(f"linear heads know no torch.func transforms and no forward-mode AD: {WHOLE}")
        if not compiled and is_jit_tracing():
            raise RuntimeError(f"linear heads know no torch.jit.trace, only torch.compile and torch.export: {WHOLE}")
        if traced(*given) and self.graphs():
            return self.in_graph(target, asked)
        if traced(*given) and not compiled:
            raise RuntimeError(
                "a linear head with tile_update= or sample= looks at numbers as it runs, which fake tensors and those "
                "that make_fx records do not show: trace it without"
            )
        pieces = pieces_for(target.device, backend)
        self.visits += 1
        with_stats = return_stats or self.return_stats
        accumulate = accumulated(x.dtype)
        flat, per_row = by_rows(numbers, params, tables)
        update = None if self.begin is None else self.begin()
        call = Call(list(numbers), tuple(flat), per_row, self.normalize, with_stats, pieces, accumulate, update=update)
        if self.sampler is not None and torch.is_grad_enabled() and has_hooks():
            raise RuntimeError(
                "sample= draws classes in each forward, and hooks on saved tensors (checkpointing) would have them "
                "drawn again: leave the linear head out of the checkpoint"
            )
        classes = self.most(target.numel(), call, flat)
        label = self.labels(call, target.reshape(-1))
        if self.sampler is not None:
            call, label, flat, classes = self.sampled(self.sampler, call, label, flat, tables)
        call = planned(call, self.cut, classes, x, weight, label)
        loss, *stats = self.run(call, x.reshape(target.numel(), weight.shape[1]), label, list(flat.values()))
        if with_stats and self.sample is not None:
            stats[3] = self.classes_of(self.sample, stats[3])
        return self.shown(loss, stats, target, return_stats)

    def shown(
        self, loss: Tensor, stats: Sequence[Tensor], target: Tensor, return_stats: bool
    ) -> tuple[Tensor, RowStats | None]:
        """In the shape of target; the statistics, where there are any, are kept too."""
        if stats:
            self.stats = RowStats(*(row.reshape(target.shape) for row in stats))
        return loss if loss.dim() == 0 else loss.reshape(target.shape), self.stats if return_stats else None

    def resolved(
        self, spec: Spec, values: Sequence[Number | None], target: Tensor, group: Tensor | None, common: Common
    ) -> fast_path.Resolved | None:
        """What the fast path asks of a kind of call that it has not seen before."""
        checked: Common = {**common, "backend": "reference"}
        bound = bind(spec, values, self.shaped(), target, group, **checked)[0]
        pieces, reduction = pieces_for(self.device, common.get("backend")), bound.numbers[REDUCTION]
        later = self.return_stats or reduction == Reduction.NONE
        grad = torch.is_grad_enabled()
        tiles = [grad and t is not None and t.requires_grad for t in (self.input, self.weight, self.bias)]
        slots = tuple(slots_of(bound.numbers))
        wanted = Wanted(tiles[0], tiles[1], tiles[2], tuple(s for s in slots if bound.needs >> s & 1))
        needs = threads.needs_of(wanted)
        if pieces is not CPU or bound.half or (needs and bound.apart and reduction != Reduction.NONE):
            return None
        x, weight = self.input, self.weight
        call = Call(bound.numbers, slots, frozenset(), self.normalize, self.return_stats, pieces, x.dtype)
        plan = threads.planned(target.numel(), weight.shape[0], x, weight, call, DEFAULT)
        keep, rows = plan.stored and any(tiles) and not later, min(plan.rows, x.shape[0])
        size = workspace(plan, keep, rows, weight.shape[0], x.shape[1], int(self.normalize))
        of_backward = call._replace(plan=plan), wanted, not later
        return of_backward, bound.numbers, needs, False, later, (*threads.cut(plan), size)

    def take_stats(self, stats: Sequence[Tensor]) -> None:
        """Of the fast path."""
        self.visits += 1
        self.stats = RowStats(*stats)

    def graphs(self) -> bool:
        """Whether a graph may hold this head."""
        return self.begin is None and self.sampler is None

    def in_graph(self, target: Tensor, asked: Asked) -> tuple[Tensor, RowStats | None]:
        """The same as one operator."""
        self.visits += 1
        numbers, params, tables, return_stats, backend = asked
        with_stats = return_stats or self.return_stats
        slots, rows = slots_of(numbers), 0
        flat = list(params)
        for i, slot in enumerate(slots):
            # Dynamo finds no member of an enumeration in a set.
            of_group = slot == Slot.GROUP or slot == Slot.ROW_WEIGHT
            if of_group or (params[i].dim() > 1 and not any(slot == table for table in tables)):
                flat[i], rows = params[i].reshape(-1, 1), rows | 1 << int(slot)
        x = self.input.reshape(target.numel(), self.weight.shape[1])
        loss, *stats = graph.linear_loss(
            x, self.weight, self.bias, target.reshape(-1), flat, numbers, rows, self.normalize, with_stats,
            *self.cut, backend,
        )  # fmt: skip
        return self.shown(loss, stats, target, return_stats)

    def most(self, rows: int, call: Call, params: dict[int, Tensor]) -> int:
        """How many classes the loop has."""
        return self.weight.shape[0]

    def labels(self, call: Call, target: Tensor) -> Tensor:
        """(N,), of all rows that the loop has."""
        return target

    def sampled(
        self, sampler: ClassSampler, call: Call, label: Tensor, params: dict[int, Tensor], tables: tuple[int, ...]
    ) -> tuple[Call, Tensor, dict[int, Tensor], int]:
        """Call, labels and tensors for the classes that are drawn now, and how many these are at most on a rank."""
        sample = sampler.draw(label, int(call.numbers[IGNORE_INDEX]))
        numbers, params = sample.bound(call.numbers, params, call.per_row.union(tables), sampler.correction)
        self.sample = sample
        self.part = (
            self.weight.index_select(0, sample.classes),
            None if self.bias is None else self.bias.index_select(0, sample.classes),
        )
        if call.update is not None:
            call.update.classes = sample.classes
        most = max(b - a for a, b in zip(sample.starts, sample.starts[1:], strict=False))
        return call._replace(numbers=numbers, slots=tuple(params)), sample.label, params, most

    def classes_of(self, sample: Sample, number: Tensor) -> Tensor:
        """The classes that these are among the sampled ones."""
        return torch.where(number < 0, number, sample.classes[number.clamp(min=0)])

    def run(self, call: Call, x: Tensor, target: Tensor, params: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The loss of each row or of all, and the row statistics."""
        run = linear_loss
        if torch.compiler.is_compiling():
            run = torch.compiler.disable(run)  # a graph break: the loop is no graph
        given = [x, self.leaf(call), self.part[1], target, *params]
        if not torch.is_grad_enabled():
            # A Function is told what requires a gradient, not whether there will be one.
            given = [t if t is None else t.detach() for t in given]
        return run(call, *given)

    def leaf(self, call: Call) -> Tensor:
        """The weight as autograd is to see it: one that steps in the backward gets no gradient."""
        weight = self.part[0]
        return weight if call.update is None else weight.detach().requires_grad_()


for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "matmul", "neg", "pow", "gt", "ge", "lt", "le",
    "getitem", "len", "iter",
):  # fmt: skip
    setattr(LinearLogits, f"__{_name}__", _refused)


fast_path.serve_linear(LinearLogits, LinearLogits.take_stats, fast_path_backward)


def by_rows(
    numbers: Sequence[float], params: Sequence[Tensor], tables: tuple[int, ...]
) -> tuple[dict[int, Tensor], frozenset[int]]:
    """A loss's tensors by slot, those that have a row each as (rows, 1), and which these are."""
    by_slot = dict(zip(slots_of(numbers), params, strict=True))
    per_row = frozenset(
        slot
        for slot, tensor in by_slot.items()
        if slot in (Slot.GROUP, Slot.ROW_WEIGHT) or (slot not in tables and tensor.dim() > 1)
    )
    return {slot: t.reshape(-1, 1) if slot in per_row else t for slot, t in by_slot.items()}, per_row
