"""Real data sets from files on disk, as tensors; nothing is downloaded.

``digits`` comes with scikit-learn and is the default everywhere; ``fashion-mnist`` is the Debian package
``dataset-fashion-mnist``; ``mnist`` is any directory with four files in the idx format. A data set is small enough to
be held whole, so that a batch is an index: see :func:`batches`.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["FASHION_MNIST", "Images", "batches", "digits", "fashion_mnist", "load", "load_idx", "mnist"]

#: Where Debian's ``dataset-fashion-mnist`` puts its files.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

_FASHION_NAMES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
# The third byte of an idx file. The format has no other types.
_DTYPES = {
    0x08: torch.uint8,
    0x09: torch.int8,
    0x0B: torch.int16,
    0x0C: torch.int32,
    0x0D: torch.float32,
    0x0E: torch.float64,
}


@dataclass(frozen=True, eq=False)
class Images:
    """A data set of labelled images, split.

    Attributes:
        train_images: (N, 1, H, W), float32 normalised or uint8 as stored.
        train_labels: (N,), int64 in [0, classes).
        test_images: (M, 1, H, W), normalised by the training images' mean and deviation.
        test_labels: (M,), int64.
        classes: their number.
        names: one per class.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int
    names: tuple[str, ...]

    def __repr__(self) -> str:
        size = "x".join(str(n) for n in self.train_images.shape[2:])
        kind = str(self.train_images.dtype).removeprefix("torch.")
        return (
            f"Images(train={len(self.train_labels)}, test={len(self.test_labels)}, size={size}, "
            f"classes={self.classes}, dtype={kind})"
        )


def load_idx(path: str | PathLike[str]) -> Tensor:
    """A file in the idx format, plain or compressed by gzip (told by its content, not by its name).

    The format: two zero bytes, a byte for the type, a byte for the number of dimensions, the sizes as big-endian 32-bit
    integers, then the elements, big-endian, the last dimension fastest.

    Returns:
        A tensor of the file's type and shape, its own memory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an idx file, an unknown type, truncated, too long, or damaged gzip; the message names the file.

    Example:
        >>> import pathlib, tempfile
        >>> from mlkernels.data import load_idx
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = pathlib.Path(directory) / "labels-idx1-ubyte"
        ...     size = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 1, 4]))
        ...     load_idx(path)
        tensor([7, 1, 4], dtype=torch.uint8)
    """
    path = Path(path)
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: damaged gzip file: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(f"{path}: not an idx file: it starts with {content[:4].hex(' ') or 'nothing'}, not 00 00")
    dtype = _DTYPES.get(content[2])
    if dtype is None:
        known = ", ".join(f"{code:#04x}" for code in _DTYPES)
        raise ValueError(f"{path}: unknown idx element type {content[2]:#04x}; the format has {known}")
    dims = content[3]
    if dims == 0:
        raise ValueError(f"{path}: an idx file has at least one dimension, this one has 0")
    start = 4 + 4 * dims
    if len(content) < start:
        raise ValueError(
            f"{path}: truncated: {dims} dimensions need a header of {start} bytes, the file has {len(content)}"
        )
    shape = [int.from_bytes(content[4 + 4 * k : 8 + 4 * k], "big") for k in range(dims)]
    # Compared before anything is allocated: a damaged header can ask for any size.
    wanted, held = math.prod(shape) * dtype.itemsize, len(content) - start
    if held != wanted:
        fault = "truncated" if held < wanted else "too long"
        raise ValueError(f"{path}: {fault}: {tuple(shape)} of {dtype} is {wanted} bytes, the file holds {held}")
    if wanted == 0:
        return torch.empty(shape, dtype=dtype)
    elements = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start)
    # Big-endian on disk; every machine that torch runs on is little-endian.
    return elements.view(-1, dtype.itemsize).flip(1).view(dtype).reshape(shape)


def mnist(directory: str | PathLike[str], *, normalize: bool = True) -> Images:
    """MNIST, or any data set in its four files: ``{train,t10k}-{images-idx3,labels-idx1}-ubyte``, plain or ``.gz``.

    Args:
        directory: where the files are (``train-images.idx3-ubyte``, as some archives spell it, is found too).
        normalize: float32 images with the training set's mean 0 and deviation 1; otherwise uint8 as stored.

    Returns:
        :class:`Images` with (N, 1, H, W) images; the classes are 0 ... the largest label.

    Raises:
        FileNotFoundError: a file is missing; the message says which, and where it was looked for.
        ValueError: a file is not what its name says, or images and labels differ in number.

    Example:
        >>> from mlkernels import data
        >>> data.mnist("/nowhere")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no train-images-idx3-ubyte[.gz] in /nowhere: pass the directory with the four MNIST files
    """
    return _from_idx(Path(directory), None, normalize, "pass the directory with the four MNIST files")


def fashion_mnist(directory: str | PathLike[str] | None = None, *, normalize: bool = True) -> Images:
    """Fashion-MNIST: 60 000 + 10 000 grey 28 x 28 images of ten kinds of clothing.

    Args:
        directory: where its four idx files are; None: :data:`FASHION_MNIST`, where Debian's package puts them.
        normalize: as in :func:`mnist`, and so are results and errors; what to install is in the message.

    Example:
        >>> from mlkernels import data
        >>> clothes = data.fashion_mnist()  # doctest: +SKIP
        >>> clothes  # doctest: +SKIP
        Images(train=60000, test=10000, size=28x28, classes=10, dtype=float32)

    Source: Xiao, Rasul and Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms.
    """
    hint = "apt install dataset-fashion-mnist, or pass the directory with its four files"
    return _from_idx(FASHION_MNIST if directory is None else Path(directory), _FASHION_NAMES, normalize, hint)


def digits(*, test_fraction: float = 0.25, seed: int = 0, normalize: bool = True) -> Images:
    """The 1797 handwritten 8 x 8 digits that scikit-learn ships with.

    Args:
        test_fraction: of each class, in (0, 1); the split is stratified.
        seed: of the split; the same seed gives the same split everywhere.
        normalize: as in :func:`mnist`; the images as stored are 0 to 16.

    Returns:
        :class:`Images` with (N, 1, 8, 8) images.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: test_fraction is outside (0, 1).

    Example:
        >>> from mlkernels import data
        >>> data.digits()
        Images(train=1347, test=450, size=8x8, classes=10, dtype=float32)

    Source: UCI, Optical Recognition of Handwritten Digits (its test set).
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be in (0, 1), got {test_fraction}")
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install scikit-learn") from error
    images, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    images, labels = images.to(torch.uint8).reshape(-1, 1, 8, 8), labels.long()
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        rows = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(rows), generator=generator)
        held_out[rows[order[: round(test_fraction * len(rows))]]] = True
    names = tuple(map(str, range(10)))
    return _split(images[~held_out], labels[~held_out], images[held_out], labels[held_out], names, normalize)


def load(name: str, directory: str | PathLike[str] | None = None, *, normalize: bool = True) -> Images:
    """A data set by its name.

    Args:
        name: ``"digits"``, ``"fashion-mnist"`` or ``"mnist"``.
        directory: of its files; ``mnist`` needs one, ``digits`` takes none. normalize: as in :func:`mnist`.

    Raises:
        ValueError: an unknown name, or a directory given or missing against the above.
        FileNotFoundError, ImportError: as the data set's own function.

    Example:
        >>> from mlkernels import data
        >>> data.load("digits").names[:3]
        ('0', '1', '2')
    """
    if name == "digits":
        if directory is not None:
            raise ValueError(f"digits come with scikit-learn and take no directory, got {str(directory)!r}")
        return digits(normalize=normalize)
    if name == "fashion-mnist":
        return fashion_mnist(directory, normalize=normalize)
    if name == "mnist":
        if directory is None:
            raise ValueError("mnist needs the directory with its four idx files, got None")
        return mnist(directory, normalize=normalize)
    raise ValueError(f"name must be one of 'digits', 'fashion-mnist', 'mnist', got {name!r}")


def batches(
    *tensors: Tensor, size: int, generator: torch.Generator | None = None, drop_last: bool = False
) -> Iterator[tuple[Tensor, ...]]:
    """Batches of tensors that share their first dimension; one pass.

    Args:
        tensors: each (N, ...), on any one device.
        size: rows per batch, >= 1; the last batch may be smaller.
        generator: a generator shuffles, and is advanced; None: in order.
        drop_last: leave the smaller last batch out.

    Returns:
        An iterator of tuples: views where the order is kept, copies where it is shuffled.

    Raises:
        ValueError: no tensors, different lengths, or size < 1.

    Example:
        >>> import torch
        >>> from mlkernels import data
        >>> [tuple(x.shape) for x, y in data.batches(torch.zeros(5, 2), torch.arange(5), size=2)]
        [(2, 2), (2, 2), (1, 2)]
    """
    # Not itself a generator function: a bad argument is an error here, not at the first batch.
    lengths = [len(tensor) for tensor in tensors]
    if len(set(lengths)) != 1:
        raise ValueError(f"tensors must share their first dimension, got {lengths or 'none'}")
    if size < 1:
        raise ValueError(f"size must be >= 1, got {size}")
    return _batches(tensors, size, generator, drop_last)


def _batches(
    tensors: tuple[Tensor, ...], size: int, generator: torch.Generator | None, drop_last: bool
) -> Iterator[tuple[Tensor, ...]]:
    count = len(tensors[0])
    order = None
    if generator is not None:
        order = torch.randperm(count, generator=generator, device=generator.device).to(tensors[0].device)
    for start in range(0, count - count % size if drop_last else count, size):
        rows = slice(start, start + size)
        yield tuple(tensor[rows] if order is None else tensor[order[rows]] for tensor in tensors)


def _from_idx(directory: Path, names: tuple[str, ...] | None, normalize: bool, hint: str) -> Images:
    parts: list[Tensor] = []
    for part in ("train", "t10k"):
        paths = [_find(directory, part, kind, hint) for kind in ("images-idx3", "labels-idx1")]
        images, labels = (load_idx(path) for path in paths)
        for path, tensor, dims in zip(paths, (images, labels), (3, 1), strict=True):
            if tensor.dim() != dims or tensor.dtype != torch.uint8:
                raise ValueError(f"{path}: expected {dims}-d uint8, got {tensor.dim()}-d {tensor.dtype}")
        if len(images) != len(labels):
            raise ValueError(f"{paths[0]} has {len(images)} images, {paths[1].name} {len(labels)} labels")
        if len(images) == 0:
            raise ValueError(f"{paths[0]}: no images")
        if parts and images.shape[1:] != parts[0].shape[2:]:
            wanted, got = tuple(parts[0].shape[2:]), tuple(images.shape[1:])
            raise ValueError(f"{paths[0]}: images of {got}, where the training images are {wanted}")
        if names is not None and int(labels.max()) >= len(names):
            raise ValueError(f"{paths[1]}: label {int(labels.max())} is out of range [0, {len(names)})")
        parts += [images.unsqueeze(1), labels.long()]
    classes = 1 + max(int(labels.max()) for labels in parts[1::2])
    return _split(parts[0], parts[1], parts[2], parts[3], names or tuple(map(str, range(classes))), normalize)


def _find(directory: Path, part: str, kind: str, hint: str) -> Path:
    for name in (f"{part}-{kind}-ubyte", f"{part}-{kind.replace('-', '.')}-ubyte"):
        for path in (directory / name, directory / f"{name}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(f"no {part}-{kind}-ubyte[.gz] in {directory}: {hint}")


def _split(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, names: tuple[str, ...], normalize: bool
) -> Images:
    if normalize:
        train, test = train.float(), test.float()
        # One mean and one deviation for all pixels: most border pixels never vary.
        deviation, mean = torch.std_mean(train, correction=0)
        deviation = deviation.clamp_min(torch.finfo(torch.float32).tiny)
        train, test = train.sub_(mean).div_(deviation), test.sub_(mean).div_(deviation)
    return Images(train, train_labels, test, test_labels, len(names), names)
