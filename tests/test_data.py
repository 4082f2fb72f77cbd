"""The loaders: real files where they are there, files written here for everything else."""

from __future__ import annotations

import builtins
import gzip
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlkernels import data

CODES = {
    torch.uint8: (0x08, "B"),
    torch.int8: (0x09, "b"),
    torch.int16: (0x0B, "h"),
    torch.int32: (0x0C, "i"),
    torch.float32: (0x0D, "f"),
    torch.float64: (0x0E, "d"),
}


def idx(tensor: Tensor) -> bytes:
    """The file that holds the tensor, by another way than the loader's."""
    code, letter = CODES[tensor.dtype]
    sizes = struct.pack(f">{tensor.dim()}I", *tensor.shape)
    elements = tensor.flatten().tolist()
    return bytes([0, 0, code, tensor.dim()]) + sizes + struct.pack(f">{len(elements)}{letter}", *elements)


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
def test_idx_round_trip(tmp_path: Path, dtype: torch.dtype, compress: bool) -> None:
    tensor = (torch.arange(24).reshape(2, 3, 4) * 5 - (0 if dtype is torch.uint8 else 60)).to(dtype)
    if dtype.is_floating_point:
        tensor = tensor / 7
    # The name says nothing: both are called the same.
    path = tmp_path / "values"
    path.write_bytes(gzip.compress(idx(tensor)) if compress else idx(tensor))
    loaded = data.load_idx(path)
    assert loaded.dtype == dtype
    assert torch.equal(loaded, tensor)
    loaded.zero_()  # its own memory, and writable
    assert torch.equal(data.load_idx(str(path)), tensor)


def test_idx_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.write_bytes(bytes([0, 0, 0x0D, 2]) + struct.pack(">2I", 0, 5))
    assert data.load_idx(path).shape == (0, 5)


VALID = idx(torch.arange(6, dtype=torch.uint8).reshape(2, 3))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not an idx file: it starts with nothing"),
        (b"\x00\x00\x08", "not an idx file: it starts with 00 00 08"),
        (b"PNG" + VALID, "not an idx file: it starts with 50 4e 47 00"),
        (b"\x00\x00\x0a" + VALID[3:], "unknown idx element type 0x0a"),
        (b"\x00\x00\x08\x00", "at least one dimension"),
        (VALID[:9], "truncated: 2 dimensions need a header of 12 bytes, the file has 9"),
        (VALID[:-1], r"truncated: \(2, 3\) of torch.uint8 is 6 bytes, the file holds 5"),
        (VALID + b"\x00", r"too long: \(2, 3\) of torch.uint8 is 6 bytes, the file holds 7"),
        (bytes([0, 0, 8, 4]) + b"\xff" * 16, "truncated"),  # 2^128 bytes, by its header
        (gzip.compress(VALID, mtime=0)[:-9], "damaged gzip"),
        (gzip.compress(VALID, mtime=0)[:10] + b"\xff" * 20, "damaged gzip"),
        (gzip.compress(b"text", mtime=0), "not an idx file"),
    ],
)
def test_idx_errors_name_the_file(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "broken-idx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        data.load_idx(path)
    assert str(path) in str(caught.value)


def test_idx_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        data.load_idx(tmp_path / "nothing-here")


def write(directory: Path, **replaced: Tensor) -> None:
    """A data set of 20 + 6 images in MNIST's four files, one of them compressed and one under its other name."""
    generator = torch.Generator().manual_seed(1)
    parts: dict[str, Tensor] = {
        "train_images": torch.randint(256, (20, 5, 4), generator=generator, dtype=torch.uint8),
        "train_labels": (torch.arange(20) % 3).to(torch.uint8),
        "test_images": torch.randint(256, (6, 5, 4), generator=generator, dtype=torch.uint8),
        "test_labels": (torch.arange(6) % 3).to(torch.uint8),
        **replaced,
    }
    (directory / "train-images.idx3-ubyte").write_bytes(idx(parts["train_images"]))
    (directory / "train-labels-idx1-ubyte").write_bytes(idx(parts["train_labels"]))
    (directory / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(parts["test_images"])))
    (directory / "t10k-labels-idx1-ubyte").write_bytes(idx(parts["test_labels"]))


def test_mnist(tmp_path: Path) -> None:
    write(tmp_path)
    raw = data.mnist(tmp_path, normalize=False)
    assert raw.train_images.shape == (20, 1, 5, 4)
    assert raw.test_images.shape == (6, 1, 5, 4)
    assert raw.train_images.dtype == torch.uint8
    assert raw.train_labels.dtype == torch.int64
    assert raw.train_labels.tolist() == [k % 3 for k in range(20)]
    assert (raw.classes, raw.names) == (3, ("0", "1", "2"))

    images = data.load("mnist", tmp_path)
    mean, deviation = raw.train_images.double().mean(), raw.train_images.double().std(correction=0)
    torch.testing.assert_close(images.train_images.double(), (raw.train_images - mean) / deviation, atol=1e-5, rtol=0)
    # The test images know the training set's mean only.
    torch.testing.assert_close(images.test_images.double(), (raw.test_images - mean) / deviation, atol=1e-5, rtol=0)
    assert repr(images) == "Images(train=20, test=6, size=5x4, classes=3, dtype=float32)"


def test_equal_pixels_stay_finite(tmp_path: Path) -> None:
    write(tmp_path, train_images=torch.full((20, 5, 4), 9, dtype=torch.uint8))
    assert data.mnist(tmp_path).train_images.abs().max() == 0


@pytest.mark.parametrize(
    ("replaced", "says"),
    [
        ({"train_labels": torch.zeros(19, dtype=torch.uint8)}, "has 20 images, train-labels-idx1-ubyte 19 labels"),
        ({"test_labels": torch.zeros(6, 1, dtype=torch.uint8)}, "t10k-labels-idx1-ubyte: expected 1-d uint8, got 2-d"),
        ({"test_labels": torch.zeros(6, dtype=torch.int32)}, "expected 1-d uint8, got 1-d torch.int32"),
        ({"train_images": torch.zeros(20, 20, dtype=torch.uint8)}, "train-images.idx3-ubyte: expected 3-d uint8"),
        ({"test_images": torch.zeros(6, 4, 4, dtype=torch.uint8)}, r"\(4, 4\), where the training images are \(5, 4\)"),
        (
            {"test_images": torch.zeros(0, 5, 4, dtype=torch.uint8), "test_labels": torch.zeros(0, dtype=torch.uint8)},
            "no images",
        ),
    ],
)
def test_mnist_errors(tmp_path: Path, replaced: dict[str, Tensor], says: str) -> None:
    write(tmp_path, **replaced)
    with pytest.raises(ValueError, match=says):
        data.mnist(tmp_path)


def test_missing_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist") as caught:
        data.fashion_mnist(tmp_path)
    assert str(tmp_path) in str(caught.value)
    write(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="no t10k-labels-idx1-ubyte"):
        data.mnist(tmp_path)


def test_fashion_mnist_refuses_other_classes(tmp_path: Path) -> None:
    write(tmp_path, test_labels=torch.full((6,), 10, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"label 10 is out of range \[0, 10\)"):
        data.fashion_mnist(tmp_path)


@pytest.mark.skipif(not data.FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist() -> None:
    images = data.load("fashion-mnist", normalize=False)
    assert repr(images) == "Images(train=60000, test=10000, size=28x28, classes=10, dtype=uint8)"
    assert images.test_labels.bincount().tolist() == [1000] * 10
    assert images.names[int(images.train_labels[0])] == "ankle boot"
    assert len(images.names) == 10


def test_digits() -> None:
    images = data.digits(normalize=False)
    assert images.train_images.shape[1:] == (1, 8, 8)
    assert images.train_images.dtype == torch.uint8
    assert int(images.train_images.max()) == 16
    assert len(images.train_labels) + len(images.test_labels) == 1797
    # Stratified: a quarter of every class.
    counts = images.train_labels.bincount() + images.test_labels.bincount()
    assert torch.equal(images.test_labels.bincount(), (counts / 4).round().long())
    normalized = data.load("digits").train_images
    assert abs(float(normalized.mean())) < 1e-5
    assert abs(float(normalized.std()) - 1) < 1e-3


def test_digits_split_is_disjoint_and_repeats() -> None:
    from sklearn.datasets import load_digits

    def rows(images: Tensor) -> list[tuple[float, ...]]:
        return [tuple(row) for row in images.flatten(1).tolist()]

    first, again, other = (data.digits(seed=seed, normalize=False) for seed in (0, 0, 1))
    assert torch.equal(first.train_images, again.train_images)
    assert torch.equal(first.test_labels, again.test_labels)
    assert not torch.equal(first.test_images, other.test_images)
    # Every image of the source once: so none is in both parts.
    everything = sorted(rows(first.train_images) + rows(first.test_images))
    assert everything == sorted(tuple(row) for row in load_digits().data.tolist())


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, float("nan")])
def test_digits_fraction(fraction: float) -> None:
    with pytest.raises(ValueError, match="test_fraction must be in"):
        data.digits(test_fraction=fraction)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError("No module named 'sklearn'")
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install scikit-learn"):
        data.digits()


def test_load_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name must be one of 'digits', 'fashion-mnist', 'mnist', got 'cifar'"):
        data.load("cifar")
    with pytest.raises(ValueError, match="take no directory"):
        data.load("digits", tmp_path)
    with pytest.raises(ValueError, match="mnist needs the directory"):
        data.load("mnist")


def test_batches() -> None:
    x, y = torch.arange(20.0).reshape(10, 2), torch.arange(10)
    in_order = list(data.batches(x, y, size=4))
    assert [len(b) for _, b in in_order] == [4, 4, 2]
    assert torch.equal(torch.cat([b for _, b in in_order]), y)
    assert in_order[0][0].data_ptr() == x.data_ptr()  # a view

    def shuffled(seed: int) -> list[tuple[Tensor, ...]]:
        return list(data.batches(x, y, size=4, generator=torch.Generator().manual_seed(seed)))

    once = torch.cat([b for _, b in shuffled(3)])
    assert sorted(once.tolist()) == list(range(10))
    assert not torch.equal(once, y)
    assert torch.equal(once, torch.cat([b for _, b in shuffled(3)]))
    for a, b in shuffled(3):
        assert torch.equal(a[:, 0], 2.0 * b)  # rows stay together

    generator = torch.Generator().manual_seed(3)
    passes = [torch.cat([b for _, b in data.batches(x, y, size=4, generator=generator)]) for _ in range(2)]
    assert not torch.equal(*passes)  # each pass in another order
    assert [len(b) for _, b in data.batches(x, y, size=4, drop_last=True)] == [4, 4]
    assert list(data.batches(x[:0], size=4)) == []


def test_batches_errors_come_at_once() -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"share their first dimension, got \[3, 2\]"):
        data.batches(x, x[:2], size=1)
    with pytest.raises(ValueError, match="got none"):
        data.batches(size=1)
    with pytest.raises(ValueError, match="size must be >= 1, got 0"):
        data.batches(x, size=0)
