"""A classifier's weight in one file, which no rank ever holds whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor

#: The names that the safetensors format has for dtypes.
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def write_header(path: str | os.PathLike[str], shape: tuple[int, int], dtype: torch.dtype) -> None:
    """A safetensors file with one tensor, ``weight``, that has its size and no contents yet."""
    size = shape[0] * shape[1] * dtype.itemsize
    header = json.dumps({"weight": {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    with Path(path).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


def write_rows(path: str | os.PathLike[str], first: int, rows: Tensor) -> None:
    """Rows of the tensor that such a file has."""
    start, _, _ = _described(path)
    with Path(path).open("r+b") as file:
        file.seek(start + first * rows[:1].nbytes)
        file.writelines(
            part.view(-1).view(torch.uint8).numpy().tobytes()
            for part in rows.detach().cpu().contiguous().split(1 << 16)
        )


def mapped(path: str | os.PathLike[str]) -> Tensor:
    """The weight (C, D) in a file, of which nothing is read before it is used: a safetensors file with one tensor, or a
    torch file with a tensor or a state dict, as insightface's ranks write them."""
    if Path(path).suffix != ".safetensors":
        return _weight_of(torch.load(path, map_location="cpu", mmap=True, weights_only=True), path)
    start, shape, dtype = _described(path)
    size = shape[0] * shape[1] * dtype.itemsize
    if Path(path).stat().st_size < start + size:
        raise ValueError(f"{path} must have {start + size} bytes, got {Path(path).stat().st_size}: it was cut off")
    whole = torch.from_file(os.fspath(path), shared=False, size=start + size, dtype=torch.uint8)
    return whole[start:].view(dtype).view(shape)


def _weight_of(found: object, path: str | os.PathLike[str]) -> Tensor:
    """The weight in what a torch file holds."""
    if isinstance(found, dict):
        found = found.get("state_dict_softmax_fc", found)
    if isinstance(found, dict):
        matrices = [tensor for tensor in found.values() if isinstance(tensor, Tensor) and tensor.dim() == 2]
        found = found.get("weight", matrices[0] if len(matrices) == 1 else None)
    if not isinstance(found, Tensor) or found.dim() != 2 or not found.is_floating_point():
        raise ValueError(f"{path} must hold a floating (C, D), as a tensor or as 'weight' of a state dict")
    return found


def _described(path: str | os.PathLike[str]) -> tuple[int, tuple[int, int], torch.dtype]:
    """Where the tensor begins, its shape and its dtype."""
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    tensors = {name: about for name, about in header.items() if name != "__metadata__"}
    if len(tensors) != 1:
        raise ValueError(f"{path} must hold one tensor, the weight, got {sorted(tensors)}")
    (about,) = tensors.values()
    if len(about["shape"]) != 2 or about["dtype"] not in _DTYPES:
        raise ValueError(f"{path} must hold a floating (C, D), got {about['dtype']} of {tuple(about['shape'])}")
    return 8 + length + about["data_offsets"][0], tuple(about["shape"]), _DTYPES[about["dtype"]]
