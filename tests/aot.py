"""Compiles ahead of time, without a GPU, what the Triton backend launches; ``test_compile_targets.py`` runs this.

    python tests/aot.py [--full | --spread] [--target sm_90] [--jobs 2]

prints one JSON object per compiled kernel. What is compiled is what is launched: losses of the table are called on meta
tensors, every launch is recorded, and Triton's own binder turns its arguments into a specialisation. That needs the
compiler, so it is a process of its own: under TRITON_INTERPRET=1 ``triton.jit`` makes functions that nothing compiles.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from allpairspy import AllPairs
from table import BY_NAME, LOSSES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import mlkernels
from mlkernels import ops
from mlkernels.backends.triton import launch, sums, tiles
from mlkernels.linear import pieces
from mlkernels.numbering import PER_CLASS, Reduction

# By name: the package exports functions that are called like its modules.
call = importlib.import_module("mlkernels.call")

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TILE = ("CHUNKS", "ROWS", "LANES", "VECTOR")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


# ---- calls -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A call of the package, and the backward pass after it."""

    classes: int
    rows: int = 4096
    # rows: (N, C). strided: (n, C, d1, d2), where it is rows that are neighbours. sliced: (N, C) out of wider rows that
    # begin at odd addresses.
    layout: str = "rows"
    dtype: str = "bf16"
    loss: str = "cross_entropy"
    form: str = "number"
    half_parameters: bool = False
    reduction: str = "mean"
    # train: by the logits. all: by the parameters too. parameters: by those alone.
    mode: str = "train"
    stats: bool = False
    entropy: bool = True  # with statistics: whether its gradient comes back, too
    backward: bool = True
    upstream: str = "contiguous"  # expanded
    labels: torch.dtype = torch.int64
    weight: bool = False
    row_weight: bool = False
    normalizer: str = ""  # number, tensor
    smoothing: float = 0.0
    adjustment: bool = False
    softcap: float | None = None
    tile: tiles.Tile | None = None  # another than the package's

    def run(self) -> None:
        shape: tuple[int, ...] = (self.rows, self.classes)
        if self.layout == "strided":
            shape = (max(1, self.rows // 256), self.classes, 16, 16)
        dtype = DTYPES[self.dtype]
        if self.layout == "sliced":
            input = torch.empty(self.rows, self.classes + 3, dtype=dtype, device="meta")[:, 1 : 1 + self.classes]
        else:
            input = torch.empty(shape, dtype=dtype, device="meta")
        target = torch.empty((shape[0], *shape[2:]), dtype=self.labels, device="meta")
        loss = BY_NAME[self.loss]
        own = torch.bfloat16 if self.half_parameters else torch.float32
        params = {
            # A parameter has one of these forms; tables and norms, which have only one, are what values() says.
            name: value.to("meta").requires_grad_(self.mode in ("all", "parameters"))
            if isinstance(value, torch.Tensor)
            else value
            for name, value in loss.values(self.form, torch.empty(target.shape), self.classes, dtype=own).items()
        }
        vector = lambda there: torch.empty(self.classes, device="meta") if there else None
        options: dict[str, Any] = {
            "reduction": self.reduction,
            "weight": vector(self.weight),
            "label_smoothing": self.smoothing,
            "logit_adjustment": vector(self.adjustment),
            "softcap": self.softcap,
            "row_weight": torch.empty(target.shape, device="meta") if self.row_weight else None,
            "return_stats": self.stats,
        }
        if self.reduction == "mean" and self.normalizer:
            options["normalizer"] = 12.5 if self.normalizer == "number" else torch.empty((), device="meta")
        if loss.groups:
            options["group"] = torch.empty(target.shape, dtype=torch.int64, device="meta")
        input.requires_grad_(self.mode in ("train", "all"))
        value: Any = mlkernels.softmax_loss(input, target, **loss.compose(params), **options)
        outputs = [value[0], *value[1][: 2 + self.entropy]] if self.stats else [value]
        outputs = [output for output in outputs if output.requires_grad]
        if outputs and self.backward:
            grads = [torch.empty((), device="meta", dtype=output.dtype).expand(output.shape) for output in outputs]
            if self.upstream == "contiguous":
                grads = [grad.contiguous() for grad in grads]
            torch.autograd.backward(outputs, grads)


@dataclass(frozen=True)
class LinearCase:
    """A call of a linear head, and the backward pass after it: the kernels of pieces."""

    dtype: str = "bf16"
    loss: str = "cross_entropy"
    everything: bool = False  # that takes registers
    tile: None = None

    def run(self) -> None:
        rows, classes, width = 512, 4096, 64
        draw = lambda *shape: torch.empty(shape, dtype=DTYPES[self.dtype], device="meta", requires_grad=True)
        target = torch.empty(rows, dtype=torch.int64, device="meta")
        loss, vector = BY_NAME[self.loss], torch.empty(classes, device="meta")
        form = "number" if self.loss == "cross_entropy" else "shared"
        found = loss.values(form, torch.zeros(rows), classes, dtype=torch.float32)
        params = {n: v.to("meta").requires_grad_() if isinstance(v, torch.Tensor) else v for n, v in found.items()}
        options: dict[str, Any] = {"group": target} if loss.groups else {}
        if self.everything:
            options |= {"weight": vector, "label_smoothing": 0.1, "logit_adjustment": vector, "softcap": 30.0}
            options |= {"z_loss": 0.1, "reduction": "none", "return_stats": True}
        value = mlkernels.linear_softmax_loss(
            draw(rows, width), draw(classes, width), target, normalize=self.everything, backend="triton",
            memory=20 << 20, **loss.compose(params), **options,
        )  # fmt: skip
        outputs = [value[0], *value[1][:3]] if self.everything else [value]
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])


def linear(everywhere: bool) -> Iterator[LinearCase]:
    """Tiles of float32 whose gradient is bfloat16; and with all there is."""
    yield LinearCase(loss="two_scale_margin_modulated", dtype="fp32", everything=True)
    if not everywhere:
        yield LinearCase()
        yield LinearCase(loss="piecewise_groups", dtype="fp32")


def _rows(classes: int) -> int:
    return 4096 if classes <= 16384 else 256  # below 2^31 elements


def sizes(architecture: str, side_by_side: bool, itemsize: int, every: bool) -> list[int]:
    """Numbers of classes, one for each tile that there is; or only the largest for each amount of work of a thread."""
    found: dict[Any, int] = {}
    for exponent in range(19):
        unit = 1 if side_by_side else min(16, 2**exponent)
        tile = tiles.tile(architecture, 2**exponent, side_by_side, itemsize, unit, True)
        found[tile if every else (tile.rows * tile.cols, tile.warps, tile.on_chip)] = 2**exponent
    return list(found.values())


def every_tile(architecture: str, full: bool) -> Iterator[Case]:
    """Every tile: plain cross entropy, and in the full set also with everything that takes registers."""
    for dtype, layout in itertools.product(DTYPES if full else ("bf16", "fp32"), ("rows", "strided")):
        for classes in sizes(architecture, layout == "strided", DTYPES[dtype].itemsize, full):
            plain = Case(classes, _rows(classes), layout, dtype)
            yield replace(plain, backward=full)
            if full:
                yield replace(plain, reduction="none")
                yield replace(plain, mode="eval")
                yield replace(plain, mode="eval", stats=True)
                yield heaviest(plain)


def heaviest(case: Case) -> Case:
    """With everything that takes registers."""
    return replace(
        case, loss="two_scale_margin_modulated", form="shared", mode="all", reduction="none", stats=True, weight=True,
        row_weight=True, smoothing=0.1, adjustment=True, softcap=30.0,
    )  # fmt: skip


def widest(architecture: str, plain: bool = True) -> int:
    """The longest rows that are held on chip."""
    classes = sizes(architecture, False, 2, True)
    return max(c for c in classes if tiles.tile(architecture, c, False, 2, 16, plain).on_chip)


def essentials(architecture: str) -> Iterator[Case]:
    """Each kernel in each of its ways."""
    longest = widest(architecture)
    yield Case(longest)  # in one visit, and again if the upstream gradient is not 1
    yield Case(131072, 256, dtype="fp32")
    yield heaviest(Case(widest(architecture, plain=False)))  # in two visits
    yield heaviest(Case(131072, 256))
    yield Case(16, loss="piecewise_groups", mode="parameters", reduction="sum")
    yield Case(64, layout="strided", mode="eval")
    yield Case(1000, backward=False)  # a multiple of 8, not of 16
    for classes in (1000, 4096):
        yield Case(classes, 512, backward=False)  # so few rows that each program counts their labels
    # Twice a row's number is no 32-bit integer.
    yield Case(2, 2**30 + 8, loss="two_scale_margin_modulated", form="shared", mode="all", reduction="none")


def fewest(architecture: str) -> Iterator[Case]:
    """Each kernel, held on chip, streamed, side by side, with all that takes registers: for a chip beside sm_90."""
    yield Case(widest(architecture), backward=False)
    yield Case(131072, 256, dtype="fp32")
    yield heaviest(Case(131072, 256))
    yield Case(16, loss="piecewise_groups", mode="parameters", reduction="sum")
    yield Case(64, layout="strided", mode="eval")


#: What calls differ in, for the pairs.
AXES: dict[str, list[Any]] = {
    "shape": ["short", "odd", "widest", "long", "strided", "strided long", "sliced", "huge"],
    "dtype": ["bf16", "fp32", "fp16", "fp64"],
    "loss": ["cross_entropy", "two_scale_margin_modulated", "piecewise_groups", "target_logit", "margin_norm_combined"],
    "form": ["number", "shared", "class", "row"],
    "half_parameters": [False, True],
    "reduction": ["mean", "none", "sum"],
    "mode": ["train", "all", "eval", "parameters"],
    "stats": [False, True],
    "entropy": [False, True],
    "upstream": ["contiguous", "expanded"],
    "labels": [torch.int64, torch.int32],
    "weight": [False, True],
    "row_weight": [False, True],
    "normalizer": ["", "number", "tensor"],
    "smoothing": [0.0, 0.1],
    "adjustment": [False, True],
    "softcap": [None, 30.0],
}
#: The same for every run of the tests: pairs of fewer shapes and losses.
FEWER = AXES | {
    "shape": ["odd", "widest", "long", "huge"],
    "loss": ["cross_entropy", "two_scale_margin_modulated", "piecewise_groups"],
    "dtype": ["bf16", "fp32", "fp64"],
    "mode": ["all", "eval", "parameters"],
    "upstream": ["contiguous"],
    "labels": [torch.int64],
}


def paired(architecture: str, axes: dict[str, list[Any]]) -> Iterator[Case]:
    """Any two values of two axes come together once."""
    shapes = {
        "short": (16, 4096, "rows"),
        "odd": (1001, 77, "rows"),
        "widest": (widest(architecture), 4096, "rows"),
        "long": (131072, 256, "rows"),
        "strided": (19, 4096, "strided"),
        "strided long": (150, 4096, "strided"),
        "sliced": (1000, 4096, "sliced"),
        "huge": (131072, 17000, "rows"),
    }
    for values in AllPairs(list(axes.values())):
        choice = dict(zip(axes, values, strict=True))
        classes, rows, layout = shapes[choice.pop("shape")]
        yield Case(classes, rows, layout, **choice)


def cases(name: str, full: bool, spread: bool = False) -> Iterator[Case | LinearCase]:
    yield from linear(everywhere=name != "sm_90" and not full)
    if full:
        yield LinearCase(loss="two_scale_margin_modulated", dtype="fp64", everything=True)
        yield from essentials(name)
        yield from every_tile(name, True)
        yield from paired(name, AXES)
        yield Case(16, 2**21, mode="eval", reduction="sum")  # more parts than one program adds up
        for loss in LOSSES:
            for form, mode in itertools.product(loss.forms, ("train", "all")):
                yield Case(1024, loss=loss.name, form=form, mode=mode)
    elif spread or name == "sm_90":
        yield from essentials(name)
        yield from every_tile(name, False)
        yield from paired(name, FEWER)
    else:
        yield from fewest(name)


# ---- from calls to specialisations -----------------------------------------------------------------------------------


@dataclass
class Launch:
    """A kernel as it is launched, and as Triton compiles it."""

    target: str
    kernel: JITFunction
    arguments: dict[str, Any]
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        return repr((self.target, self.kernel.__name__, self.signature, self.constants, self.attributes, self.options))

    def known(self, name: str, *path: int) -> int:
        """What an integer is known to be a multiple of."""
        at = (list(self.signature).index(name), *path)
        return self.constants.get(at) or dict(self.attributes.get(at, ())).get("tt.divisibility", 1)

    @property
    def given(self) -> dict[str, Any]:
        """The arguments by name, those of the classes each by its own."""
        return self.arguments | dict(zip(PER_CLASS.values(), self.arguments.get("vectors", ()), strict=False))

    @property
    def does(self) -> str:
        """What sets it apart, in words."""
        given = self.given
        words = [
            name
            for name in (
                "losses", "save", "stats", "grad", "by_parameter", "bins", "saved", "group", "weight", "weight_sum",
                "logit_adjustment", "row_weight", "normalizer", "divisors", "factors", "t_tables", "tau_tables",
            )
            if given.get(name) is not None
        ]  # fmt: skip
        upstream = given.get("upstream")
        upstream = upstream if isinstance(upstream, tuple) else (upstream,)  # of a visit; or of count
        words += [f"upstream{i}" for i, u in enumerate(upstream) if u is not None]
        return " ".join(words + [f"{k}={int(v)}" for k, v in given.items() if k.isupper() and v and k not in TILE])

    @property
    def plain(self) -> bool:
        """Whether nothing but logits and labels is read, and nothing but losses and the gradient by logits written."""
        given = self.given
        more = (
            "stats",
            "weight",
            "row_weight",
            "logit_adjustment",
            "by_parameter",
            "saved",
            "group",
            "t_tables",
            "tau_tables",
        )
        return (
            "input" in given
            and not given["MODES"]
            and not given["CAPPED"]
            and all(given[name] is None for name in more)
        )

    @property
    def pairs(self) -> bool:
        """Whether logits of two bytes, whose rows are side by side and aligned, must be read by twos."""
        given = self.arguments
        places = self.strides("in")
        aligned = (
            1 in places[1:]
            and all(p % 2 == 0 or p == 1 for p in places)
            and (given["DIMS"] == 1 or given["d1"] % 2 == 0)
        )
        return given["ACROSS"] and given["input"].element_size() == 2 and aligned and given["rows"] % 2 == 0

    def strides(self, which: str) -> list[int]:
        """Of the classes, and of the three dimensions that rows have."""
        return [self.arguments[f"{which}_{name}"] for name in ("class", "outer", "middle", "inner")]

    def wide_tile(self, name: str) -> int:
        """The same of a linear head's tile, whose rows are aligned; a gradient of fewer bytes is written narrower."""
        tensor, given = self.arguments.get(name), self.arguments
        if tensor is None or "tile" not in given or given["VECTOR"] * tensor.element_size() < 16:
            return 0
        return given["CHUNKS"]

    def wide(self, name: str, which: str) -> int:
        """How many 128-bit accesses a thread must make to a tensor of aligned rows; 0: none."""
        given = self.arguments
        tensor = given.get(name)
        if tensor is None or tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return 0
        places = self.strides(which)
        aligned = all(p * tensor.element_size() % 16 == 0 for p in (given["classes"], *places[1:]))
        if not (places[0] == 1 and aligned and self.known(name) % 16 == 0):
            return 0
        threads = TARGETS[self.target].warp_size * self.options["num_warps"]
        return max(1, math.prod(given[k] for k in TILE) * tensor.element_size() // (16 * threads))


def launches(name: str, calls: Callable[[], None]) -> list[Launch]:
    """What calls launch on a target."""
    target = TARGETS[name]
    backend = make_backend(target)
    found: list[Launch] = []

    def launcher(kernel: JITFunction, grid: Any) -> Callable[..., None]:
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)

        def record(*arguments: Any, **options: Any) -> None:
            bound, specialisation, rest = bind(*arguments, **options)
            packed = kernel._pack_args(backend, options, bound, specialisation, rest)
            chosen, signature, constants, attributes = packed
            found.append(Launch(name, kernel, bound, signature, constants, attributes, chosen.__dict__))

        return record

    # The operators as they are: nothing is replayed, and meta tensors are no reason to ask a dispatcher.
    operators = {function.__name__: function for function in launch._FUNCTIONS}
    kernels = ops.Kernels(*(operators[name] for name in ops._FAKES), refresh=operators["softmax_loss_refresh"])
    kept = JITFunction.__getitem__, tiles.architecture, call.choose, ops.triton, pieces.refusal
    JITFunction.__getitem__ = launcher  # type: ignore[method-assign]
    tiles.architecture, call.choose = lambda device: name, lambda *arguments: "triton"
    ops.triton = lambda: kernels  # type: ignore[assignment]
    pieces.refusal = lambda *arguments: None
    call._calls.clear()  # they hold kernels
    try:
        calls()
    finally:
        JITFunction.__getitem__, tiles.architecture, call.choose, ops.triton, pieces.refusal = kept
        call._calls.clear()
    assert found, "nothing was launched"
    return found


def of_case(name: str, case: Case | LinearCase) -> list[Launch]:
    if case.tile is None:
        return launches(name, case.run)
    kept, tiles.tile = tiles.tile, lambda *_: case.tile  # type: ignore[assignment]
    try:
        return launches(name, case.run)
    finally:
        tiles.tile = kept


# ---- compiling -------------------------------------------------------------------------------------------------------


def executed(sass: str) -> int:
    """The fewest instructions from a kernel's entry to its end: what a loss without branches of its own takes. A
    program that has counted itself and is not the last ends there."""
    code = [
        (int(address, 16), bool(guard), text)
        for address, guard, text in re.findall(r"(?m)^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z].*?);", sass)
    ]
    index = {address: i for i, (address, _, _) in enumerate(code)}
    reached, wave, count, ends, counted = {0}, [0], 0, 0, False
    while wave:
        count += 1
        following = set()
        for i in wave:
            _, guarded, text = code[i]
            counted |= text.startswith("ATOM")
            if text.startswith("EXIT"):
                if not guarded or counted:
                    return count
                ends = count  # where nothing else ends it, the last of these does
            if text.startswith("BRA"):
                following.add(index[int(re.findall(r"0x([0-9a-f]+)", text)[-1], 16)])
            if guarded or not text.startswith("BRA"):
                following.add(i + 1)
        wave = sorted(following - reached)
        reached |= following
    return ends


def in_flight(sass: str) -> int:
    """The most bytes that a thread has asked for and not yet used, somewhere in the kernel."""
    most = bytes_ = 0
    waited: set[int] = set()
    for text in re.findall(r"(?m)^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?);", sass):
        operation, _, operands = text.partition(" ")
        into, *sources = [int(n) for n in re.findall(r"\bR(\d+)\b", operands)] or [-1]
        if operation.startswith(("ST", "ATOM", "RED")):
            sources.append(into)
        if waited.intersection(sources):
            waited, bytes_ = set(), 0
        if operation.startswith("LDG"):
            bits = int((re.findall(r"\.[USB]?(8|16|64|128|256)\b", operation) or ["32"])[-1])
            waited.update(range(into, into + max(1, bits // 32)))
            bytes_ += bits // 8
            most = max(most, bytes_)
    return most


def resident(registers: int, warps: int) -> int:
    """Warps on a multiprocessor, of blocks of so many: 65536 registers, 64 warps."""
    return min(64, 2**16 // (32 * -(-registers // 8) * 8)) // warps * warps


def fused(ptx: str) -> int:
    """How many products are fused into the addition of what another thread sent, here or by the assembler, which may do
    that where no rounding is said: each of the threads would round its own."""
    sent: set[str] = set()
    products: set[str] = set()
    count = 0
    for operation, operands in re.findall(r"(?m)^\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)\s+([^;]*);", ptx):
        into, *sources = re.findall(r"%\w+", operands) or [""]
        exchanged = bool(sent.intersection(sources))
        if operation.startswith("shfl.sync.bfly") or (operation.startswith("mov") and exchanged):  # idx moves a layout
            sent.add(into)
        elif operation in ("mul.f32", "mul.f64"):
            products.add(into)
        elif operation.startswith("fma"):
            count += sources[-1] in sent and operands.endswith(sources[-1])
        elif operation.startswith("add"):
            count += exchanged and bool(products.intersection(sources))
    return count


def measured(target: GPUTarget, assembly: dict[str, Any]) -> dict[str, int]:
    """Registers, spills and 128-bit accesses of a compiled kernel."""
    if target.backend == "hip":
        text = assembly["amdgcn"]
        number = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))  # type: ignore[union-attr]
        return {
            "registers": number("vgpr_count"),
            # Scalar registers are spilled into lanes of a vector register, whatever room a stack has for them.
            "spills": number("vgpr_spill_count") + len(re.findall(r"\bscratch_(?:load|store)", text)),
            "loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", text)),
            "stores": len(re.findall(r"\b(?:global|buffer)_store_dwordx4\b", text)),
            "halves": len(re.findall(r"\b(?:global|buffer)_load_(?:d16_hi_)?[us]?short\w*", text)),
            "narrow": 2 * len(re.findall(r"\b(?:global|buffer)_load_[us]short\w*", text))
            + 4 * len(re.findall(r"\b(?:global|buffer)_load_dword\b", text)),
        }
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(assembly["cubin"])
        file.flush()
        dump = lambda what: subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout
        usage, code = dump("--dump-resource-usage"), dump("--dump-sass")
    registers, stack, local = map(
        int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()  # type: ignore[union-attr]
    )  # fmt: skip
    wide = lambda name: sum(int(bits) // 128 for bits in re.findall(rf"\b{name}\.E\S*\.(128|256)\b", code))
    return {
        "registers": registers,
        "spills": stack + local,
        "loads": wide("LDG"),
        "stores": wide("STG"),
        "executed": executed(code),
        "fused": fused(assembly["ptx"]),
        "in_flight": in_flight(code),
        "halves": len(re.findall(r"\bLDG\.E\S*\.U16\b", code)),
        # Bytes; 32 bits are what has no suffix, and STRONG what the last program alone reads, of the others.
        "narrow": 2 * len(re.findall(r"\bLDG\.E\S*\.U16\b", code))
        + 4 * len(re.findall(r"\bLDG\.E(?!\S*\.(?:[US]?8|[US]?16|64|128|256|STRONG)\b)", code)),
    }


def built(one: Launch) -> dict[str, Any]:
    """What the compiler made of it."""
    source = ASTSource(one.kernel, one.signature, one.constants, one.attributes)
    made = triton.compile(source, target=TARGETS[one.target], options=one.options)
    found = measured(TARGETS[one.target], made.asm) | {"shared": made.metadata.shared}
    if "in_flight" in found:
        found["warps_resident"] = resident(found["registers"], one.options["num_warps"])
    return found


def compiled(one: Launch) -> dict[str, Any]:
    """The specialisation's row of the table."""
    given = one.given
    dtype = getattr(given.get("input", given.get("tile")), "dtype", None)
    row = {
        "kernel": one.kernel.__name__,
        "target": one.target,
        "tile": "x".join(str(given[k]) for k in TILE) if "ROWS" in given else str(given["BLOCK"]),
        "warps": one.options["num_warps"],
        "dtype": next((n for n, d in DTYPES.items() if d == dtype), ""),
        "does": one.does,
        "wide_loads": one.wide("input", "in") if "input" in given else one.wide_tile("tile"),
        "wide_stores": one.wide("grad", "out") if "grad" in given else one.wide_tile("out"),
    }
    others = ("weight", "row_weight", "logit_adjustment", "group", "t_tables", "tau_tables")
    if "input" in given and row["wide_loads"] and not given["MODES"] and all(given[name] is None for name in others):
        # Labels and sums are wide too; but where little else is read there are fewer narrow loads than logits.
        row["narrow_limit"] = row["wide_loads"] * 16
    once = one.plain and given["ON_CHIP"] and not given["CONDITIONAL"]
    if once and not given["ACROSS"] and given["classes"] >= 256 and given["UNIT"] >= 8:
        threads = TARGETS[one.target].warp_size * one.options["num_warps"]
        row["elements"] = given["ROWS"] * given["classes"] / threads  # of a thread
        if given["divisors"] is None and given["normalizer"] is None and given["REDUCTION"] == Reduction.MEAN:
            row["labels"] = sums.FEW.value // threads  # that it counts
    if "input" in given and one.pairs:
        # Beside the logits it is the label's own logit that is read alone, one per row.
        threads = TARGETS[one.target].warp_size * one.options["num_warps"]
        row["halves_limit"] = math.prod(given[k] for k in TILE) // threads
    begun = time.monotonic()
    try:
        row |= built(one)
        if "in_flight" in row:
            row["flight"] = row["in_flight"] * 32 * row["warps_resident"]
        if one.plain and one.options.get("maxnreg"):
            free = built(replace(one, options={**one.options, "maxnreg": None}))
            row["unbound"] = {name: free[name] for name in ("registers", "spills", "warps_resident")}
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
    return row | {"seconds": round(time.monotonic() - begun, 2)}


@triton.jit
def _nothing(x):
    tl.store(x, 0.0)


def why_not(name: str) -> str | None:
    """Why this Triton cannot compile for the target: not even the smallest kernel."""
    try:
        target = TARGETS[name]
        triton.compile(ASTSource(_nothing, {"x": "*fp32"}, {}, {}), target=target)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None


_work: list[tuple[Launch, dict[str, Any]]] = []  # for the workers, which are forks


def _one(index: int) -> dict[str, Any]:
    one, more = _work[index]
    return compiled(one) | more


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true", help="every tile, loss, form and pair of options on each target")
    parser.add_argument("--spread", action="store_true", help="on each target what there is on sm_90")
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--list", action="store_true", help="what there would be to compile")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seen: set[str] = set()
    for name in arguments.target or TARGETS:
        reason = why_not(name)
        print(json.dumps({"target": name, "unavailable": reason}), flush=True)
        if reason is not None:
            continue
        for case in cases(name, arguments.full, arguments.spread):
            for one in of_case(name, case):
                if one.key not in seen:
                    seen.add(one.key)
                    _work.append((one, {"case": repr(case)}))
        if name == "sm_90":
            # Rows that do not fit: the checks must see it.
            spilling = Case(65536, 256, dtype="fp32", tile=tiles.Tile(16, 1, 1024, 4, 32, True))
            _work.extend((one, {"bad": True}) for one in of_case(name, spilling)[-1:])
    if arguments.list:
        for one, more in _work:
            print(one.target, one.kernel.__name__, one.does, more)
        return
    with multiprocessing.get_context("fork").Pool(arguments.jobs) as pool:
        for row in pool.imap_unordered(_one, range(len(_work))):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
