"""Scenes of test_class_parallel.py: weights in files, written and read by any number of ranks, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import mlkernels
from mlkernels.distributed import ClassParallelLoss

CLASSES, WIDTH = 23, 5


def drawn(classes: int = CLASSES, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(classes, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def linear_of(
    group: dist.ProcessGroup, classes: int = CLASSES, dtype: torch.dtype = torch.float64
) -> ClassParallelLoss:
    return ClassParallelLoss(mlkernels.CrossEntropyLoss(), WIDTH, classes, process_group=group, dtype=dtype)


def files(group: dist.ProcessGroup, folder: Path) -> None:
    """One file that no rank holds whole, of the kind that its name says; shards; more classes."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    for dtype, suffix in ((torch.float64, "safetensors"), (torch.bfloat16, "pt")):
        weight = drawn(dtype=dtype)
        path, second = folder / f"weight-{ranks}.{suffix}", folder / f"second-{rank}.pt"
        linear = linear_of(group, dtype=dtype)
        linear.load_weight(weight)
        assert linear.export_weight(path) is None
        assert torch.equal(linear.export_weight(), weight)
        if suffix == "pt":
            assert torch.equal(torch.load(path)["weight"], weight)
        other = linear_of(group, CLASSES + 5, dtype)
        others = other.export_weight()
        assert len(others.unique(dim=0)) == len(others), "ranks drew the same rows"
        other.load_weight(path)
        assert torch.equal(other.export_weight(), torch.cat([weight, others[CLASSES:]]))
        # insightface's ranks write one torch file each.
        torch.save({"step": 1, "state_dict_softmax_fc": {"weight": weight[9:]}}, second)
        dist.barrier(group)
        other.load_weight([weight[:9], second])
        assert torch.equal(other.export_weight(), torch.cat([weight, others[CLASSES:]]))
    assert not [*folder.glob(f"weight-{ranks}.part.*")]


def exported(groups: dict[int, dist.ProcessGroup], folder: Path) -> None:
    """By four ranks, of which some have no class; loaded by three, two and one."""
    for classes in (CLASSES, 5, 1):
        for suffix in ("safetensors", "pth"):
            path, weight = folder / f"of-four-{classes}.{suffix}", drawn(classes)
            linear = linear_of(groups[4], classes)
            linear.load_weight(weight)
            linear.export_weight(path)
            for ranks in (3, 2, 1):
                if dist.get_rank() < ranks:
                    other = linear_of(groups[ranks], classes)
                    other.load_weight(path)
                    assert torch.equal(other.export_weight(), weight)


def _safetensors(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def refused(group: dist.ProcessGroup, folder: Path) -> None:
    """What is no weight: an error that names it, on all ranks, and no class has changed."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    folder = folder / f"{ranks}-{rank}"  # what is in them is the same
    folder.mkdir()
    weight = drawn()
    linear = linear_of(group)
    linear.load_weight(weight)

    def about(dtype: str = "F64", shape: object = (23, 5), end: object = 920) -> dict[str, object]:
        return {"weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}

    def written(name: str, data: bytes) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    def saved(name: str, value: object) -> Path:
        torch.save(value, folder / name)
        return folder / name

    whole = saved("whole.pt", {"weight": weight}).read_bytes()
    unaligned = _safetensors(folder / "odd.safetensors", json.dumps(about()).encode() + b"  ", weight.numpy().tobytes())
    linear.load_weight(unaligned)
    assert torch.equal(linear.export_weight(), weight)
    large = weight.clone()
    large[-1, 0] = -1e300
    single = linear_of(group, dtype=torch.float32)
    before = single.export_weight()
    for source, error, words in (
        # What is no file.
        (3, TypeError, r"source takes a floating tensor \(C, D\) or the path .*, got int"),
        (None, TypeError, "source takes .*, got NoneType"),
        (b"weight.pt", TypeError, "source takes .*, got bytes"),
        (weight.numpy(), TypeError, r"source takes .*, got ndarray: write torch\.as_tensor\(source\)"),
        ([], ValueError, "source must hold a weight, got an empty sequence"),
        ([weight, 3], TypeError, r"source\[1\] takes .*, got int"),
        (weight.long(), TypeError, "source must be floating, got torch.int64"),
        (weight.to(torch.complex64), TypeError, "source must be floating, got torch.complex64"),
        (weight.to_sparse(), TypeError, "source takes a dense tensor that has values, got a sparse_coo one"),
        (weight.to("meta"), TypeError, "source takes a dense tensor that has values, got a meta one"),
        ([weight, weight[0]], ValueError, r"source\[1\] must be \(C, D\), got \(5,\)"),
        ([weight[:3], weight[:3, :4]], ValueError, r"source must hold shards of one width, got \[\(3, 5\), \(3, 4\)\]"),
        (weight[:, :4], ValueError, r"source must be \(C, 5\) with C <= 23, got \(23, 4\)"),
        ([weight, weight], ValueError, r"source must be \(C, 5\) with C <= 23, got \(46, 5\)"),
        # What is no safetensors file.
        (folder / "nowhere.safetensors", OSError, "No such file or directory: .*nowhere.safetensors"),
        (folder, OSError, "Is a directory"),
        (written("empty.safetensors", b""), ValueError, "empty.safetensors must be a whole .*: it has 0 bytes"),
        (written("junk.safetensors", b"hello world, this is junk"), ValueError, "junk.safetensors .* a header of 8"),
        (written("cut.safetensors", unaligned.read_bytes()[:50]), ValueError, "cut.safetensors .* it has 50 bytes"),
        (written("end.safetensors", unaligned.read_bytes()[:-1]), ValueError, "end.safetensors must have .* cut off"),
        (_safetensors(folder / "long.safetensors", b"", length=2**63), ValueError, f"a header of {2**63}"),
        (_safetensors(folder / "text.safetensors", b"no json"), ValueError, "text.safetensors .* is no JSON object"),
        (_safetensors(folder / "deep.safetensors", b"[" * 100_000), ValueError, "is no JSON object"),
        (_safetensors(folder / "list.safetensors", [1]), ValueError, "is no JSON object"),
        (_safetensors(folder / "less.safetensors", {"weight": {"dtype": "F64"}}), ValueError, "says of 'weight' {"),
        (_safetensors(folder / "shape.safetensors", about(shape=[-23, -5])), ValueError, "says of 'weight' {"),
        (_safetensors(folder / "size.safetensors", about(end=919)), ValueError, "says of 'weight' {"),
        (_safetensors(folder / "type.safetensors", about("I64")), ValueError, "must hold a weight.*, got I64"),
        (_safetensors(folder / "bias.safetensors", {"a": about(shape=[115])["weight"]}, bytes(920)), ValueError,
         r"must hold a weight: .*, got \['a'\]"),
        (_safetensors(folder / "none.safetensors", {}), ValueError, r"must hold a weight: .*, got \[\]"),
        # What is no torch file.
        (written("junk.pt", b"junk"), ValueError, "junk.pt must be a whole .*: it has 4 bytes"),
        (written("cut.pt", whole[:-100]), ValueError, "cut.pt must be a whole torch file"),
        (written("old.pt", pickle.dumps({"weight": 1})), ValueError, "old.pt must be a whole"),
        (saved("code.pt", Path), ValueError, "code.pt must be .* of tensors"),
        (saved("list.pt", [weight]), ValueError, "list.pt must hold a weight: .*, got list"),
        (saved("two.pt", {"a": weight, "b": weight}), ValueError, r"two.pt must hold .*, got \['a', 'b'\]"),
        (saved("int.pt", {"weight": weight.long()}), TypeError, "int.pt must be floating, got torch.int64"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            linear.load_weight(source)
        if ranks > 1:  # of one rank alone
            with pytest.raises(error, match=words if rank == 1 else f"rank 1: .*{words}"):
                linear.load_weight(source if rank == 1 else weight[:1])
    with pytest.raises(ValueError, match=r"source must fit into torch.float32: 1 finite .*, of classes .* 23\)"):
        single.load_weight(large)
    assert torch.equal(single.export_weight(), before)
    large[-1, 0] = torch.inf  # it is what it is
    single.load_weight(large)
    assert torch.equal(single.export_weight(), large.float())
    assert torch.equal(linear.export_weight(), weight)

    nowhere = folder.parent / "nowhere"
    for path, error, words in (
        (nowhere / "weight.safetensors", OSError, "path must lie in a directory that exists, .*nowhere"),
        (nowhere / "weight.pt", OSError, "path must lie in a directory that exists, .*nowhere"),
        (folder.parent / "weight.bin", ValueError, r"path must end in .safetensors, or in .pt or .pth .*weight.bin"),
        (3, TypeError, r"path takes a str or an os.PathLike, got int"),
    ):
        with pytest.raises(error, match=words):
            linear.export_weight(path)
    there = folder.parent / f"weight-{ranks}.safetensors"
    before = there.read_bytes()
    if ranks > 1:
        with pytest.raises(ValueError, match="path must be the same on all ranks"):
            linear.export_weight(there if rank else None)
    assert there.read_bytes() == before, "an export that is refused leaves the file that was there"
    assert linear_of(group, np.int64(CLASSES)).num_classes == CLASSES
