"""A classifier whose classes are spread over ranks, and a loss of the family on its output."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement
from torch.nn.functional import pad

from ..backends.reference import RowStats
from ..linear.functional import Strategy, check_call, check_classifier, loss_of
from ..linear.module import LinearModule, check_k, streamed_topk
from ..linear.plan import Cut
from ..linear.sampling import ClassSampler, Correction, check_sample
from ..linear.update import TileSGD, TileUpdate, averaged_by_ddp
from ..positional import by_name
from ..tracing import PLAIN_TENSORS
from . import agreement, weights
from .group import Group, Traffic, check_untraced, offsets, padded
from .logits import ShardedLogits
from .weights import Source


@by_name
class ClassParallelLoss(LinearModule):
    r"""A classifier and a loss of the family on its output, the classes spread over ranks: no rank has all of the
    weight, and nobody has the logits.

    Of P ranks rank r has the rows :math:`[o_r, o_{r+1})` of W (C, D), as ``torch.chunk`` cuts them (the last shards may
    be smaller, or empty), and its own batch. It is called as :class:`mlkernels.LinearLoss` is, on all ranks, and
    gives what that would give for all batches together: a reduced loss is the same on every rank, and "mean" divides
    by what counts on all of them; ``"none"`` and the row statistics are those of the rank's own rows.

    Gradients: the ranks together minimise the average J of what they call ``backward`` on. ``weight.grad`` is
    :math:`\partial J/\partial W`, of the rank's own rows of W; the features get :math:`P\,\partial J/\partial x`, so
    that a backbone under DDP or FSDP over the same ranks, which average, has the gradient of J. The loss's own
    parameters get :math:`\partial J/\partial\theta`, the same on all ranks to the bit.

    Args:
        loss, in_features, num_classes, bias, normalize, strategy, memory, compact, device, dtype: as
            :class:`mlkernels.LinearLoss`; num_classes is C of all ranks.
        tile_update, sample, sample_correction: too; each rank steps its own classes, and draws so many of them.
        process_group: the ranks that share the classes; None: all. device_mesh: the same, as a mesh of one dimension.

    ``weight`` is a DTensor, ``Shard(0)``: ``torch.distributed.checkpoint`` saves it, and loads it on any number of
    ranks.

    Raises:
        TypeError, ValueError, IndexError: a bad argument, on every rank, with the rank it came from.
        ValueError: ranks that disagree on sizes, dtype, loss or options, by name.

    Example:
        >>> import torch, mlkernels
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> classifier = mlkernels.distributed.ClassParallelLoss(mlkernels.ArcFaceLoss(), 8, 1000, normalize=True)
        >>> features = torch.randn(4, 8, requires_grad=True)
        >>> classifier(features, torch.tensor([1, 2, 3, 999])).backward()
        >>> classifier.weight.grad.to_local().shape
        torch.Size([1000, 8])
        >>> dist.destroy_process_group()

    Source: the classes spread over devices are Deng et al., "ArcFace" (2019), and An et al., "Partial FC" (2021).
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        in_features: int,
        num_classes: int,
        *,
        process_group: dist.ProcessGroup | None = None,
        device_mesh: DeviceMesh | None = None,
        bias: bool = False,
        normalize: bool | None = None,
        strategy: Strategy | None = None,
        memory: int | None = None,
        compact: bool = False,
        tile_update: TileSGD | None = None,
        sample: int | None = None,
        sample_correction: Correction | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("ClassParallelLoss needs torch.distributed: call init_process_group() first")
        if device_mesh is not None:
            if process_group is not None:
                raise ValueError("device_mesh and process_group say the same: give one of them")
            if device_mesh.ndim != 1:
                raise ValueError(f"device_mesh must have one dimension, got {device_mesh.ndim}: take mesh['name']")
            process_group = device_mesh.get_group()
        group = Group(process_group)
        with group.telling():
            cut = Cut(strategy, memory, compact)
            super().__init__(loss, in_features, num_classes, bias, normalize, cut, tile_update)
            sample = check_sample(sample, sample_correction)
            at = torch.empty(0, device=device, dtype=dtype)
        self._group = group
        group.meet(
            {
                "in_features": self.in_features, "num_classes": self.num_classes, "dtype": str(at.dtype),
                "bias": bias, "normalize": self.normalize, **self._cut._asdict(),
                "tile_update": tile_update and tile_update.numbers(),
                "sample": sample, "sample_correction": sample_correction, **agreement.of_module(loss),
            }
        )  # fmt: skip
        if device_mesh is None:
            device_mesh = DeviceMesh.from_group(group.process_group, at.device.type)  # type: ignore[arg-type]
        self._mesh = device_mesh
        starts = offsets(self.num_classes, group.size)
        #: Where this rank's classes begin, and behind which they end.
        self.first_class, self.last_class = starts[group.rank], starts[group.rank + 1]
        own = self.last_class - self.first_class
        weight = torch.empty(own, self.in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(self._sharded(weight))
        vector = nn.Parameter(self._sharded(weight.new_empty(own))) if bias else None
        self.register_parameter("bias", vector)
        if tile_update is not None:
            self.update = TileUpdate(tile_update, self.weight, self._sharded, group.rank, self._seed())
        if sample is not None:
            self.sampler = ClassSampler(sample, sample_correction, starts, at.device, group.rank, self._seed())
        self.reset_parameters()

    def _sharded(self, local: Tensor) -> DTensor:
        shape = torch.Size((self.num_classes, *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self._mesh, [ShardPlacement(0)], run_check=False, shape=shape, stride=stride)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Of whole tensors, as LinearLoss saves them, this rank's classes."""
        for name, own in self.state_dict().items():
            given = state_dict.get(prefix + name)
            if not isinstance(own, DTensor) or not isinstance(given, Tensor) or type(given) not in PLAIN_TENSORS:
                continue
            if given.shape == own.shape:
                state_dict[prefix + name] = self._sharded(given[self.first_class : self.last_class].to(own.to_local()))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws weight and bias as ``nn.Linear`` does: from rank 0's generator, other numbers on every rank."""
        generator = torch.Generator(self.weight.device).manual_seed(self._seed() + self._group.rank)
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        for own in self._own():
            if own is not None:
                own.uniform_(-bound, bound, generator=generator)
        if self.update is not None:
            self.update.reset()

    def _seed(self) -> int:
        """From rank 0's generator, on all ranks."""
        seed = torch.randint(2**62, (1,), device=self.weight.device)
        return int(self._group.gathered(seed, "seed")[0])

    def _own(self) -> tuple[Tensor, Tensor | None]:
        """This rank's part of weight and bias."""
        bias = None if self.bias is None else cast(DTensor, self.bias).to_local()
        return cast(DTensor, self.weight).to_local(), bias

    def forward(self, input: Tensor, target: Tensor, **per_call: Any) -> Tensor | tuple[Tensor, RowStats]:
        """The loss of this rank's (..., D) features and labels; ``per_call`` goes to the loss (``logit_norm``,
        ``norm``, ``group``, ``row_weight``, ``normalizer``), but for ``return_stats``. To be called on all ranks, also
        by one that has no rows."""
        result: Tensor | tuple[Tensor, RowStats]
        if torch.compiler.is_compiling():  # a graph break: collectives and the loop are no graph
            result = torch.compiler.disable(self.forward)(input, target, **per_call)
            return result
        check_untraced("class-parallel linear heads know", input, target)
        return_stats = per_call.pop("return_stats", False)
        with self._group.telling():
            if averaged_by_ddp(self.weight):
                raise RuntimeError(
                    "DistributedDataParallel takes the shards of a ClassParallelLoss for replicas, which it averages: "
                    "mlkernels.distributed.data_parallel(module) is one that leaves them alone; or wrap the backbone"
                )
            weight, bias = self._own()
            check_classifier(input, weight, bias, self.normalize, module=True, shard=True)
            cut = check_call(input, target, self._cut)
            input = input if input.dim() > 1 else input.unsqueeze(0)
            logits = ShardedLogits(
                self._group, self.num_classes, input, weight, bias, normalize=self.normalize,
                return_stats=return_stats, cut=cut, **self._called_with(weight),
            )  # fmt: skip
        with logits.telling():
            result = loss_of(logits, target, self.loss, return_stats, per_call, type(self))
        return result

    @torch.no_grad()
    def topk(self, input: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest logits of each of this rank's rows over the classes of all ranks, and these classes, (..., k)
        each, largest first; on all ranks, k and the width alike."""
        group = self._group
        check_untraced("class-parallel linear heads know", input)
        with group.telling():
            check_classifier(input, *self._own(), self.normalize, module=True, shard=True)
            k = check_k(k, self.num_classes)
            rows = input.reshape(input.shape[:-1].numel(), self.in_features)
        sizes = [n for n, _ in group.meet({"call": "topk", "k": k, "dtype": str(input.dtype)}, (rows.shape[0], 0))]
        every = group.gathered(padded(rows, max(sizes), 0), "features").flatten(0, 1)
        values, classes = streamed_topk(every, *self._own(), k, self.normalize)
        lacking, split = (0, k - values.shape[1]), (group.size, max(sizes))
        best, which = (
            group.exchanged(t.unflatten(0, split), "topk").movedim(0, 1).flatten(1)[: rows.shape[0]]
            for t in (pad(values, lacking, value=-math.inf), pad(classes + self.first_class, lacking))
        )
        values, at = best.topk(k, 1)
        shape = (*input.shape[:-1], k)
        return values.reshape(shape), which.gather(1, at).reshape(shape)

    @torch.no_grad()
    def export_weight(self, path: str | os.PathLike[str] | None = None) -> Tensor | None:
        """The whole weight: without a path as a tensor (C, D), on every rank; with one as a file that all ranks reach,
        into which each writes its own rows: safetensors, or for ``.pt`` and ``.pth`` a state dict that ``torch.load``
        reads. It is written beside its place and takes that once it is whole. On all ranks, alike."""
        group = self._group
        with group.telling():
            part = None if path is None else weights.part_of(path)
        group.meet({"call": "export_weight", "path": None if path is None else os.fspath(path)})
        if part is None or path is None:
            return cast(DTensor, self.weight).full_tensor()
        start = 0
        try:
            with group.telling():
                if group.rank == 0:
                    start = weights.create(part, (self.num_classes, self.in_features), self.weight.dtype)
            start = group.meet({"call": "export_weight"}, (start, 0))[0][0]
            with group.telling():
                weights.write_rows(part, start, self.first_class, self._own()[0])
            group.meet({"call": "export_weight"})
            with group.telling():
                if group.rank == 0:
                    part.replace(path)
            group.meet({"call": "export_weight"})
        except Exception:
            if group.rank == 0:
                with suppress(OSError):
                    part.unlink()
            raise
        return None

    @torch.no_grad()
    def load_weight(self, source: Source | Sequence[Source]) -> None:
        """Takes over a weight of the same width: a tensor (C, D); a safetensors file, or one of ``torch.save``, with
        one, alone or as ``weight`` of a state dict; or shards of either kind in the order of their classes, as
        insightface's ranks write them. What a file holds tells its kind, not its name. Files are mapped: a rank reads
        its own rows. Where there are fewer classes than this one has, the others stay as they are: as
        :meth:`reset_parameters` drew them. On all ranks, alike; where it raises, on all of them, no class has changed.

        Raises:
            TypeError, ValueError: what is no weight, is not of this module's sizes, is cut off, or overflows in its
                dtype. OSError: a file that cannot be read.
        """
        (own, _), placed = self._own(), []
        with self._group.telling():
            shards = weights.opened(source)
            shapes = [tuple(shard.shape) for _, shard in shards]
            width, count = shapes[0][1], sum(shape[0] for shape in shapes)
            if any(shape[1] != width for shape in shapes):
                raise ValueError(f"source must hold shards of one width, got {shapes}")
            if width != self.in_features or count > self.num_classes:
                raise ValueError(
                    f"source must be (C, {self.in_features}) with C <= {self.num_classes}, got {(count, width)}"
                )
            start = 0
            for name, shard in shards:
                low, high = max(self.first_class, start), min(self.last_class, start + len(shard))
                if low < high:
                    rows = shard[low - start : high - start]
                    weights.check_fits(name, rows, low, own.dtype)
                    placed.append((own[low - self.first_class : high - self.first_class], rows))
                start += len(shard)
        self._group.meet({"call": "load_weight", "source": (count, width)})
        for classes, rows in placed:
            classes.copy_(rows)

    def communication(self) -> Traffic:
        """How many collectives this rank has taken part in, and how many bytes it has sent, by what for, since the last
        time that this was asked."""
        return self._group.traffic()

    def extra_repr(self) -> str:
        """Sizes and options."""
        return f"{super().extra_repr()}, classes=[{self.first_class}, {self.last_class})"
