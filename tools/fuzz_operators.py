"""Malformed calls of the compiled operators: ``python -m tools.fuzz_operators [--calls 1e5] [--seed 0]``.

    python -m tools.fuzz_operators --calls 1e5      # prints every call that ends the process
    python -m tools.fuzz_operators --case 1234      # one of them, in this process

``torch.ops.mlkernels.*`` are called as no Python of the package would: a legal call, of which some arguments are
replaced by tensors of other dtypes, sizes and strides, by none, by other counts and numbers. Each must return or raise;
what ends the process, or what a build with ``MLKERNELS_SANITIZE=address,undefined`` reports, is a fault. Calls run in a
process of their own, which says where it is.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_opcheck  # noqa: E402
from table import plain_numbers  # noqa: E402

import mlkernels  # noqa: E402, F401
from mlkernels.backends import native  # noqa: E402
from mlkernels.numbering import INPUT, PER_CLASS, REDUCTION  # noqa: E402

DTYPES = [
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.float8_e4m3fn),
]  # fmt: skip
NUMBERS = [0.0, -1.0, 1.0, 2.0, 3.0, 7.0, 0.5, 1e300, -1e300, 2.0**63, -(2.0**63), 2.0**23, float("nan"), float("inf")]
INTEGERS = [0, -1, 1, 2, 3, 5, 7, 64, 2**23, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)]
PER_CALL = (
    "piece_statistics", "piece_gradient", "linear_statistics", "linear_gradient", "row_finish",
    "linear_loss_with_gradients", "linear_rows", "linear_rows_backward", "buffer_like",
)  # fmt: skip


def legal(rng: random.Random) -> tuple[str, list[Any]]:
    """An operator, and arguments that it takes."""
    name = rng.choice([*test_opcheck.OPERATORS * 2, *PER_CALL, "multi_copy_"])
    dtype = rng.choice([torch.float32, torch.float64])
    # Features and weight of linear heads in bfloat16, where the machine multiplies these.
    pairs = dtype == torch.float32 and native.cpu_isa() == "avx512_bf16" and rng.random() < 0.5
    if name in test_opcheck.OPERATORS:
        loss = rng.choice(test_opcheck.FEW)
        shape, reduction = rng.choice(["rows", "dense"]), rng.randrange(3)
        arguments, needs = test_opcheck.flattened(loss, rng.choice(loss.forms), reduction, dtype, shape)
        given = list(arguments)
        if name == "softmax_loss":
            given.append(rng.random() < 0.5)
        if name == "softmax_loss_with_gradients":
            given.append(needs)
        if name == "softmax_loss_backward":
            rows = given[1].shape
            up = [
                torch.ones(rows if reduction == 0 else (), dtype=dtype),
                *(torch.ones(rows, dtype=dtype) for _ in "123"),
            ]
            saved = torch.zeros(given[1].numel() if rng.random() < 0.8 else 0, 2, dtype=dtype)
            given = [*up, *given, saved, needs]
        return name, given
    if name in ("row_finish", "linear_loss_with_gradients", "linear_rows", "linear_rows_backward"):
        loss = rng.choice(test_opcheck.FEW)
        (_, target, numbers, params), needs = test_opcheck.flattened(loss, "shared", dtype=dtype)
        sums = [torch.rand(2 if numbers[1] else 1, 6, dtype=dtype) for _ in "STU"]
        rows = [torch.rand(6, dtype=dtype) for _ in range(8)]
        if name != "row_finish":
            x, weight = torch.rand(2, 6, 2, dtype=dtype)
            workspace = rng.choice((rng.randint(-2, 240), 240, 1 << 60))
            normalize = not pairs and rng.random() < 0.5
            if pairs:
                x, weight = x.bfloat16(), weight.bfloat16()
            plan = [*(rng.randint(1, 6) for _ in range(4)), rng.randrange(2)]
            bias, needs = None if normalize else rows[0], needs | (1 if normalize else 3) << INPUT + 1
            given = [x, weight, bias, normalize, target, workspace, plan, numbers, params]
            if name == "linear_rows":
                return name, [*given, rng.random() < 0.5]
            if name == "linear_rows_backward":
                up = [rows[1] if numbers[REDUCTION] == 0 else rows[1].sum(), *rows[2:5]]
                return name, [*given, torch.rand(5 + 3 * len(sums[0]), 6, dtype=dtype), *up, needs]
            return name, [*given, needs]
        return name, [target, *rows[:2], *sums, rows[2], numbers, params, 6, *rows[3:], True, needs ^ 1 << INPUT]
    n, c, width, count = rng.randint(0, 5), rng.randint(0, 7), rng.randint(0, 5) * (1 + pairs), rng.randint(1, 2)

    def of(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=dtype)

    label, rows = torch.randint(-1, 9, (n,)), of(n)
    known = [of(n), of(count, n), of(count, n), of(count, n), of(n), of(n), label + 1, label * 0]
    x, weight = (of(k, width).to(torch.bfloat16 if pairs else dtype) for k in (n, c))
    of_classes = [plain_numbers(*PER_CLASS, SOFTCAP=5.0), [of(c + 1) for _ in PER_CLASS]]
    linear = [x, weight, of(c), None if pairs else of(c), label, 1, *of_classes, of(400), False, [2, 2, 2]]
    return name, {
        "piece_statistics": [of(n, c), of(n), label, 1, of(count, n), *of_classes, *known],
        "piece_gradient": [of(n, c), label, 1, False, *of_classes, rows, rows, rows, rows, rows],
        "linear_statistics": [*linear, of(n), of(count, n), c + 1, 15],
        "linear_gradient": [*linear, rows, rows, None, rows, rows, rows, of(n, width), of(c, width), of(c), True, True],
        "buffer_like": [of(n), [n, c]],
        "multi_copy_": [[of(n), of(c, n)], [of(n), of(c, n)], torch.tensor(True)],
    }[name]  # fmt: skip


def other(rng: random.Random, value: Any) -> Any:
    """What should not be there."""
    if isinstance(value, Tensor):
        return other_tensor(rng, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([*INTEGERS, rng.getrandbits(24), value ^ 1 << rng.randrange(24)])
    if isinstance(value, float):
        return rng.choice(NUMBERS)
    if not isinstance(value, list):
        return torch.rand(3)
    value = list(value)
    way = rng.randrange(6)
    if way == 0 and value:
        del value[rng.randrange(len(value)) :]
    elif way == 1 and value:
        value.insert(rng.randrange(len(value)), value[0])
    elif way == 2:
        rng.shuffle(value)
    elif value:
        at = rng.randrange(len(value))
        value[at] = other(rng, value[at])
        if value[at] is None:
            del value[at]
    return value


def other_tensor(rng: random.Random, value: Tensor) -> Tensor | None:
    way = rng.randrange(10)
    sizes = list(value.shape)
    if way == 0:
        return None
    if way == 1:
        return value.to(rng.choice(DTYPES))
    if way == 2:
        return value.reshape(-1)[: rng.randrange(value.numel() + 1)]
    if way == 3 and sizes:
        sizes[rng.randrange(len(sizes))] = rng.choice([0, 1, 2, 9, 100])
        return torch.zeros(sizes, dtype=value.dtype)
    if way == 4:
        return torch.zeros(1, dtype=value.dtype).expand(rng.choice([sizes, [9, *sizes], [2**20], [*sizes, 1]]))
    if way == 5 and value.numel():
        storage = torch.rand(200).to(value.dtype)
        return storage.as_strided(sizes, [rng.choice([0, 1, 2, 3]) for _ in sizes]) if value.numel() < 60 else value.t()
    if way == 6:
        return value.transpose(0, -1) if sizes else value.reshape(1)
    if way == 7:
        return (
            torch.empty_strided([1] * rng.choice([1, 2, 17]), [rng.choice([0, 1, 2**61])] * 1 or [1])
            if not sizes
            else (value[..., :1].as_strided([1] * len(sizes), [2**61] * len(sizes)) if value.numel() else value)
        )
    if way == 8 and not value.is_complex() and value.numel():
        filled = value.clone()
        filled.view(-1)[rng.randrange(value.numel())] = rng.choice(
            [-1, 2, 100] if not value.is_floating_point() else [-1e30]
        )
        return filled
    return torch.rand([rng.choice([0, 1, 2, 6]) for _ in range(rng.randrange(5))]).to(value.dtype)


def run(seed: int) -> str:
    """What became of a call: "returned", or the name of what it raised."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    try:
        name, arguments = legal(rng)
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
            at = rng.randrange(len(arguments))
            arguments[at] = other(rng, arguments[at])
    except (RuntimeError, IndexError, TypeError, ValueError):  # torch itself has no such tensor
        return "not a call"
    try:
        getattr(torch.ops.mlkernels, name).default(*arguments)
    except Exception as error:
        return type(error).__name__
    return "returned"


def inside(first: int, count: int, place: str) -> None:
    """Runs calls and keeps the seed of the present one in a file."""
    torch.set_num_threads(2)
    became: collections.Counter[str] = collections.Counter()
    with open(place, "r+b", buffering=0) as file:
        for seed in range(first, first + count):
            os.pwrite(file.fileno(), b"%020d" % seed, 0)
            became[run(seed)] += 1
    print(dict(became), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="fuzz_operators", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--calls", type=float, default=1e4)
    parser.add_argument("--seed", type=int, default=0, help="of the first call; the next ones follow")
    parser.add_argument("--case", type=int, help="this seed alone, in this process")
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        inside(int(arguments.inside[0]), int(arguments.inside[1]), arguments.inside[2])
        return 0
    if arguments.case is not None:
        print(run(arguments.case))
        return 0
    seed, end, faults = arguments.seed, arguments.seed + int(arguments.calls), []
    with tempfile.NamedTemporaryFile() as place:
        while seed < end:
            place.seek(0)
            place.write(b"%020d" % seed)
            place.flush()
            command = [sys.executable, "-m", "tools.fuzz_operators", "--inside", str(seed), str(end - seed), place.name]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            print(done.stdout, end="")
            if done.returncode == 0:
                break
            at = int(Path(place.name).read_text())
            faults.append(at)
            said = [line for line in done.stderr.splitlines() if "ERROR" in line or "rror" in line or " #" in line]
            print(f"--case {at}: ended with {done.returncode}", *said[:12], sep="\n    ", flush=True)
            seed = at + 1
    print(f"{int(arguments.calls)} calls, {len(faults)} ended the process")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
