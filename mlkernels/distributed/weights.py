"""A classifier's weight in a file, safetensors or torch's own, which no rank ever holds whole."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..checks import check_plain, wrong_type

#: A classifier's weight, or a part of it, or a file that has one.
Source: TypeAlias = Tensor | str | os.PathLike[str]

_SAFETENSORS, _TORCH = ".safetensors", (".pt", ".pth")
#: The names that the safetensors format has for dtypes.
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
#: The longest header that those who read the format take.
_LONGEST = 100_000_000
#: What torch.save's files begin with: they are zip archives.
_ARCHIVE = b"PK\x03\x04"
#: Rows of a shard that are copied at a time.
_ROWS = 1 << 12


# ---- written ---------------------------------------------------------------------------------------------------------


def part_of(path: str | os.PathLike[str]) -> Path:
    """Where a file is written until it is whole, of the kind that the suffix of its path says."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path takes a str or an os.PathLike, got {type(path).__name__}")
    path = Path(path)
    if path.suffix not in (_SAFETENSORS, *_TORCH):
        raise ValueError(f"path must end in .safetensors, or in .pt or .pth for a torch file, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must lie in a directory that exists, got {path}")
    return path.with_name(f"{path.stem}.part{path.suffix}")


def create(path: Path, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """A file with one tensor, ``weight``, that has its size and no contents yet; where these begin."""
    if path.suffix in _TORCH:
        from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second, and sympy

        with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save({"weight": torch.empty(shape, dtype=dtype, device="cpu")}, path)
        return int(torch._C.PyTorchFileReader(os.fspath(path)).get_record_offset("data/0"))  # type: ignore[attr-defined]
    size = shape[0] * shape[1] * dtype.itemsize
    header = json.dumps({"weight": {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    return 8 + len(header)


def write_rows(path: Path, start: int, first: int, rows: Tensor) -> None:
    """Rows of that tensor from the first on, whose contents begin at start."""
    with path.open("r+b") as file:
        file.seek(start + first * rows[:1].nbytes)
        for part in rows.detach().split(_ROWS):
            file.write(part.cpu().contiguous().view(-1).view(torch.uint8).numpy())


# ---- read ------------------------------------------------------------------------------------------------------------


def opened(source: Source | Sequence[Source]) -> list[tuple[str, Tensor]]:
    """The shards of a weight, (C_r, D) each, and what each is called; of files nothing is read before it is used."""
    takes = "a floating tensor (C, D) or the path of a file with one"
    if isinstance(source, (Tensor, str, os.PathLike)):
        each = {"source": source}
    elif isinstance(source, Sequence) and not isinstance(source, bytes):
        each = {f"source[{at}]": shard for at, shard in enumerate(source)}
    else:
        raise wrong_type("source", f"{takes}, or a sequence of these", source)
    shards = []
    for name, shard in each.items():
        if isinstance(shard, (str, os.PathLike)):
            name, shard = os.fspath(shard), _mapped(Path(shard))
        elif not isinstance(shard, Tensor):
            raise wrong_type(name, takes, shard)
        check_plain(name, shard, "torch.distributed.checkpoint loads what is sharded")
        if not shard.is_floating_point():
            raise TypeError(f"{name} must be floating, got {shard.dtype}")
        if shard.layout != torch.strided or shard.is_nested or shard.is_meta:
            kind = "nested" if shard.is_nested else "meta" if shard.is_meta else str(shard.layout)
            raise TypeError(f"{name} takes a dense tensor that has values, got a {kind.removeprefix('torch.')} one")
        if shard.dim() != 2:
            raise ValueError(f"{name} must be (C, D), got {tuple(shard.shape)}")
        shards.append((name, shard))
    if not shards:
        raise ValueError("source must hold a weight, got an empty sequence")
    return shards


def check_fits(name: str, rows: Tensor, first: int, dtype: torch.dtype) -> None:
    """Whether what is finite in these classes stays so in a linear head's dtype."""
    if torch.finfo(rows.dtype).max <= torch.finfo(dtype).max:
        return
    lost = sum(int((part.isfinite() & ~part.to(dtype).isfinite()).sum()) for part in rows.split(_ROWS))
    if lost:
        raise ValueError(
            f"{name} must fit into {dtype}: {lost} finite numbers of {rows.dtype}, of classes [{first}, "
            f"{first + len(rows)}), are too large"
        )


def _mapped(path: Path) -> Tensor:
    """The weight in a file, by what it holds and not by its name."""
    with path.open("rb") as file:
        archive = file.read(len(_ARCHIVE)) == _ARCHIVE
    found = _torch_file(path) if archive else _safetensors(path)
    if isinstance(found, dict):
        found = found.get("state_dict_softmax_fc", found)
    must = f"{path} must hold a weight: a tensor, 'weight' in a state dict, or the only matrix there"
    if isinstance(found, dict):
        matrices = [name for name, tensor in found.items() if isinstance(tensor, Tensor) and tensor.dim() == 2]
        name = "weight" if "weight" in found or len(matrices) != 1 else matrices[0]
        if name not in found:
            raise ValueError(f"{must}, got {sorted(map(str, found))}")
        found = found[name]
    if not isinstance(found, Tensor):
        raise ValueError(f"{must}, got {found if isinstance(found, str) else type(found).__name__}")
    return found


def _torch_file(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of archives, of pickles, and of all that these may call
        first = str(error).partition("\n")[0]
        raise ValueError(f"{path} must be a whole torch file of tensors (weights_only=True), got {first}") from error


def _safetensors(path: Path) -> dict[str, Tensor | str]:
    """The tensors by name; of a dtype that no weight has, that."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        # Ahead of everything: of a file of another kind these are any eight bytes.
        if not 8 + length <= size or length > _LONGEST:
            raise ValueError(
                f"{path} must be a whole safetensors file, or one of torch.save since 1.6: it has {size} bytes, and by "
                f"the first of them a header of {length}"
            )
        try:
            header = dict(json.loads(file.read(length)))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} must be a safetensors file, but its header is no JSON object: {error}") from error
    header.pop("__metadata__", None)
    whole = torch.from_file(os.fspath(path), shared=False, size=size, dtype=torch.uint8)
    return {name: _tensor(path, whole, 8 + length, name, about) for name, about in header.items()}


def _tensor(path: Path, whole: Tensor, start: int, name: str, about: Any) -> Tensor | str:
    """What a header says of a tensor, looked at."""
    try:
        shape, (first, last), dtype = about["shape"], about["data_offsets"], _DTYPES.get(about["dtype"])
        if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
            raise ValueError("sizes are integers")
        if dtype is None:
            return str(about["dtype"])
        if last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{last - first} bytes")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} must be a safetensors file, but its header says of {name!r} {about}") from error
    if len(whole) < start + last:
        raise ValueError(f"{path} must have {start + last} bytes, got {len(whole)}: it was cut off")
    data = whole[start + first : start + last]
    # Files need not be aligned, tensors are.
    data = data.clone() if (start + first) % dtype.itemsize else data
    return data.view(dtype).view(shape)
