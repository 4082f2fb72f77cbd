"""``python -m bench.tune``: measures on the GPU at hand what the tables of the package say, and writes them.

``sizes.json`` first: Triton's launch sizes.

A row of a table there is the largest number of classes it serves (0: any, block by block), how many elements a program
holds, and its warps. Each row's candidates are timed in bfloat16 as a fraction of the copy bandwidth, a mean with its
gradient and the split way alike; one whose kernels spill registers, or that fails, is not taken.

Then ``choice.json``: which of Triton and CUDA serves how many classes under ``backend=None``, where both are there.
They take turns on large batches in three modes, and on small ones from a CUDA graph; the mean of the ratios counts.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlkernels.backends import CHOICE, LAYOUTS, check_choice
from mlkernels.backends.triton import replay, tiles
from mlkernels.backends.triton import rows as kernels

from .ahead import compile_ahead, few_rows, visit
from .cases import Problem, floor_bytes, make_inputs, with_classes
from .measure import captured, first_line, step_of, take_turns
from .options import ON_GPU, gpu, usable
from .peers import ours
from .report import describe

MODES = ["forward", "step", "split"]
Table = dict[str, list[list[int]]]

PATH = Path(tiles.__file__).parent / "sizes.json"
LISTS = ["classes_side_by_side", "rows_side_by_side"]
ELEMENTS, COPIED = 2**28, 2**30  # of a problem's logits; bytes of the copy
LONGEST = 32768  # classes that may fit on chip; whether they do is measured
MARGIN = 1.02  # a new size must be that much better than the old one
BUDGET, COMPILING, SECONDS = 165.0, 100.0, 0.15  # seconds
CHOOSING = 45.0  # of those that follow
CHOICE_AT = {
    "classes_side_by_side": (10, 100, 1000, 4096, 16384, 32768, 50257, 65536, 128256, 262144),
    "rows_side_by_side": (19, 150),
}
FEW_ROWS, FEW_ROWS_UP_TO = 128, 1024  # where launches count


class Candidate(NamedTuple):
    """One way to launch the rows that an entry of a table serves."""

    table: str
    limit: int
    row: tuple[int, int] | None  # elements and warps; None: without an entry, block by block
    classes: tuple[int, ...]  # what it is measured at

    def __str__(self) -> str:
        what = "no entry" if self.row is None else f"{self.row[0]:>6} elements, {self.row[1]:>2} warps"
        served = f"C <= {self.limit}" if self.limit else "any C"
        return f"{self.table:<21} {served:<11} {what:<25} measured at C = {', '.join(map(str, self.classes))}"


def measured_at(name: str, limit: int) -> tuple[int, ...]:
    """The numbers of classes that stand for a row."""
    if name == "rows_side_by_side":
        return (19,) if limit else (150,)
    if limit == 0:
        return (128256,)
    return (100, 1000) if limit <= 2048 else (limit,)


def candidates(table: Table) -> list[list[Candidate]]:
    """By row, the row as it is first."""
    found = []
    for name in LISTS:
        for limit, elements, warps in table[name]:
            # A long row on chip is one tile, whatever the table says.
            sizes = [elements] if limit > 2048 else [elements, elements // 2, elements * 2]
            counts = [warps, *(w for w in (warps // 2, warps * 2) if 1 <= w <= 32)]
            at = measured_at(name, limit)
            found.append([Candidate(name, limit, (size, count), at) for size in sizes for count in counts])
        if name == LISTS[0] and all(limit < LONGEST for limit, _, _ in table[name]):
            rows: list[tuple[int, int] | None] = [None, (LONGEST, 16), (LONGEST, 32)]
            found.append([Candidate(name, LONGEST, row, (LONGEST,)) for row in rows])
    return found


def with_row(table: Table, candidate: Candidate) -> Table:
    """The table with this row in the place of that with its limit, or added."""
    name, limit, row, _ = candidate
    if row is None:
        return table
    rows = [one for one in table[name] if one[0] != limit] + [[limit, *row]]
    return {**table, name: sorted(rows, key=lambda one: one[0] or math.inf)}


def use(table: Table) -> None:
    """Launches go by this table from now on, on every architecture."""
    tiles._sizes = lambda architecture: table  # type: ignore[assignment]
    tiles.tile.cache_clear()
    replay.forget()


def problem_of(table: str, classes: int, elements: int) -> Problem:
    """About so many elements, the classes or the rows side by side."""
    if table == "classes_side_by_side":
        return with_classes(classes, "bfloat16", elements)
    side = min(512, math.isqrt(elements // classes))
    return Problem((max(1, elements // classes // side**2), classes, side, side), "bfloat16")


class Recorder:
    """A kernel that remembers how many registers its launches spilled at most."""

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self.spills = 0

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        launched = self.kernel[grid]

        def run(*arguments: Any, **options: Any) -> Any:
            compiled = launched(*arguments, **options)
            self.spills = max(self.spills, getattr(compiled, "n_spills", None) or 0)
            return compiled

        return run


def prepare(table: Table, candidate: Candidate, kind: str, elements: int) -> None:
    """Compiles what a candidate runs; in a process of its own."""
    use(with_row(table, candidate))
    for classes in candidate.classes:
        problem = problem_of(candidate.table, classes, elements)
        visit(few_rows(problem), ["cross_entropy", "piecewise"], kind, "triton", MODES)


def rate(table: Table, candidate: Candidate, copied: tuple[Tensor, Tensor], elements: int) -> float:
    """The fraction of the copy bandwidth, a mean over problems and modes; 0 where the kernels spill."""
    device = copied[0].device
    use(with_row(table, candidate))
    original = kernels.visit
    kernels.visit = recorder = Recorder(original)
    fractions = []
    try:
        for classes in candidate.classes:
            problem = problem_of(candidate.table, classes, elements)
            # For its spills: the heaviest kernels.
            visit(few_rows(problem), ["piecewise"], device.type, "triton", MODES)
            sets = [make_inputs(problem, False, device)]
            function = ours(device, "triton")["cross_entropy"]
            steps = {mode: step_of(function, sets, mode) for mode in ("step", "split")}
            timings = take_turns({**steps, "copy": lambda: copied[0].copy_(copied[1])}, SECONDS, device)
            if recorder.spills:
                return 0.0
            bandwidth = 2 * copied[0].nbytes / timings["copy"].median
            fractions += [floor_bytes(problem, mode) / timings[mode].median / bandwidth for mode in steps]
    finally:
        kernels.visit = original
    return math.prod(fractions) ** (1 / len(fractions))


def tune(
    table: Table,
    rate_of: Callable[[Table, Candidate], float],
    deadline: float,
    say: Callable[[str], None],
) -> tuple[Table, list[str]]:
    """The table with the best candidates, and what each row was measured on. What has no time left stays as it is."""
    best = {name: [list(row) for row in table[name]] for name in LISTS}
    notes = []
    for group in candidates(table):
        found: dict[Candidate, float] = {}
        for candidate in group:
            if time.perf_counter() > deadline:
                break
            try:
                found[candidate] = rate_of(best, candidate)
            except Exception as error:
                say(f"{candidate}: {first_line(error)}")
                continue
            say(f"{candidate}: {found[candidate]:.1%}" if found[candidate] else f"{candidate}: spills")
        old = found.get(group[0], 0.0)
        chosen = max(found, key=lambda one: found[one], default=group[0])
        if found.get(chosen, 0.0) <= MARGIN * old:
            chosen = group[0]
        best = with_row(best, chosen)
        measured = f"{found[chosen]:.1%} of a copy" if found.get(chosen) else "not measured: kept"
        notes.append(f"{' '.join(str(chosen).split())}: {measured}, {len(found)} of {len(group)} candidates ran")
    return best, notes


# ---- the choice between the backends ---------------------------------------------------------------------------------


def problems_at(layout: str, classes: int, elements: int) -> list[Problem]:
    """What stands for so many classes: many rows, and a few where the launches count as well."""
    found = [problem_of(layout, classes, elements)]
    few = layout != "rows_side_by_side" and classes <= FEW_ROWS_UP_TO
    return [*found, Problem((FEW_ROWS, classes), "bfloat16")] if few else found


def prepare_choice(layout: str, classes: int, kind: str, elements: int) -> None:
    """Compiles Triton's kernels for it; in a process of its own."""
    for problem in problems_at(layout, classes, elements):
        visit(few_rows(problem), ["cross_entropy", "piecewise"], kind, "triton", MODES)


def ratio_at(layout: str, classes: int, device: torch.device, elements: int) -> float:
    """Triton's time over CUDA's: the geometric mean over problems, losses and modes."""
    ratios = []
    for problem in problems_at(layout, classes, elements):
        sets = [make_inputs(problem, False, device)]
        for name in ("cross_entropy", "piecewise"):
            functions = {by: ours(device, by)[name] for by in ON_GPU}
            # A cosine loss on logits is as much work, and its numbers do not matter here.
            if problem.rows == FEW_ROWS and device.type == "cuda":
                graph = {by: captured(step_of(function, sets, "step")) for by, function in functions.items()}
                kinds = {by: {"graph": step} for by, step in graph.items()}
            else:
                kinds = {by: {mode: step_of(f, sets, mode) for mode in MODES} for by, f in functions.items()}
            steps = {f"{by} {mode}": step for by, modes in kinds.items() for mode, step in modes.items()}
            times = {key: timing.median for key, timing in take_turns(steps, SECONDS, device).items()}
            ratios += [times[f"triton {mode}"] / times[f"cuda {mode}"] for mode in kinds["cuda"]]
    return math.prod(ratios) ** (1 / len(ratios))


def chosen_at(rows: list[Any], classes: int) -> str:
    """What a list of the table says of so many classes."""
    return str(next(name for limit, name in rows if limit == 0 or classes <= limit))


def rows_of(winners: dict[int, str]) -> list[list[Any]]:
    """The shortest list that says this of the measured numbers of classes; others go with the next larger one."""
    rows: list[list[Any]] = []
    for classes, name in sorted(winners.items()):
        if rows and rows[-1][1] == name:
            rows.pop()
        rows.append([classes, name])
    rows[-1][0] = 0
    return rows


def choose_backends(
    table: dict[str, list[Any]], ratio_of: Callable[[str, int], float], deadline: float, say: Callable[[str], None]
) -> tuple[dict[str, list[Any]], list[str]]:
    """The table with the faster backends, and what was measured. What has no time left, or fails, stays as it is."""
    best, notes = {}, []
    for layout in LAYOUTS:
        winners = {}
        for classes in CHOICE_AT[layout]:
            winners[classes] = chosen_at(table[layout], classes)
            what = f"{layout}, C = {classes}"
            if time.perf_counter() > deadline:
                say(f"{what}: no time left")
                continue
            try:
                ratio = ratio_of(layout, classes)
            except Exception as error:
                say(f"{what}: {first_line(error)}")
                continue
            # What it says already is left in a tie, so that noise does not write tables.
            if not 1 / MARGIN <= ratio <= MARGIN:
                winners[classes] = "cuda" if ratio > 1 else "triton"
            notes.append(f"{what}: triton's time / cuda's {ratio:.2f}, {winners[classes]}")
            say(notes[-1])
        best[layout] = rows_of(winners)
    return best, notes


def text_of(sizes: dict[str, Any]) -> str:
    """sizes.json or choice.json: a list of rows on a line."""
    blocks = []
    for architecture, entry in sizes.items():
        lines = [f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in entry.items() if name != "measured"]
        if "measured" in entry:
            note = json.dumps(entry["measured"], indent=2).replace("\n", "\n    ")
            lines.append(f'    "measured": {note}')
        blocks.append(f"  {json.dumps(architecture)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def tune_sizes(architecture: str, device: torch.device, started: float, say: Callable[[str], None]) -> int:
    """Measures Triton's launch sizes and writes them; the exit status."""
    sizes = json.loads(PATH.read_text())
    table = {name: rows for name, rows in tiles._sizes(architecture).items() if name in LISTS}
    every = [candidate for group in candidates(table) for candidate in group]
    say(f"compiling for {len(every)} candidates")
    compile_ahead(
        [functools.partial(prepare, table, candidate, device.type, ELEMENTS) for candidate in every], COMPILING, say
    )
    copied = tuple(torch.zeros(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    best, notes = tune(table, lambda table, candidate: rate(table, candidate, copied, ELEMENTS), started + BUDGET, say)
    if not any("of a copy" in note for note in notes):
        print("bench.tune: no candidate ran; sizes.json is left as it was", file=sys.stderr)
        use(table)
        return 1
    sizes[architecture] = {**best, "measured": {**_described(device), "dtype": "bfloat16", "rows": notes}}
    PATH.write_text(text_of(sizes))
    print("\n".join(notes))
    print(f"wrote {architecture} of {PATH}")
    use(best)  # and the backends are compared at those
    return 0


def tune_choice(architecture: str, device: torch.device, say: Callable[[str], None]) -> int:
    """Measures which backend is faster where and writes it; the exit status."""
    if usable(device) != list(ON_GPU):
        print(f"bench.tune: choice.json is left as it was: of {' and '.join(ON_GPU)} only {usable(device)} can be used")
        return 0
    table = json.loads(CHOICE.read_text())
    check_choice(table, str(CHOICE))
    sizes = [(layout, classes) for layout in LAYOUTS for classes in CHOICE_AT[layout]]
    compile_ahead([functools.partial(prepare_choice, *one, device.type, ELEMENTS) for one in sizes], CHOOSING, say)
    before = {**table["default"], **table.get(architecture, {})}
    deadline = time.perf_counter() + CHOOSING
    best, notes = choose_backends(before, lambda *at: ratio_at(*at, device, ELEMENTS), deadline, say)
    if not notes:
        print("bench.tune: nothing could be compared; choice.json is left as it was", file=sys.stderr)
        return 1
    table[architecture] = {**best, "measured": {**_described(device), "dtype": "bfloat16", "rows": notes}}
    check_choice(table, "what was measured")
    CHOICE.write_text(text_of(table))
    print(f"wrote {architecture} of {CHOICE}")
    return 0


def _described(device: torch.device) -> dict[str, Any]:
    header = describe(device, usable(device))
    return {name: header[name] for name in ("device", "date", "commit", "versions")}


def main(given: list[str] | None = None) -> int:
    """Measures and writes; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description="Measures the package's tables.")
    parser.add_argument("--dry-run", action="store_true", help="lists the candidates; needs no GPU")
    parser.add_argument("--only", choices=("sizes", "choice"), help="one of the two tables; default: both")
    options = parser.parse_args(given)
    if options.dry_run:
        for group in candidates(json.loads(PATH.read_text())["default"]):
            print("\n".join(map(str, group)))
        for layout in LAYOUTS:
            print(f"triton or cuda, {layout}, at C = {', '.join(map(str, CHOICE_AT[layout]))}")
        return 0
    device = gpu()
    if device is None:
        print("bench.tune: no GPU here (torch.cuda.is_available() is False)", file=sys.stderr)
        return 1
    started = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - started:5.0f} s] {what}", flush=True)

    architecture = tiles.architecture(device)
    status = 0
    if options.only != "choice":
        status |= tune_sizes(architecture, device, started, say)
    if options.only != "sizes":
        status |= tune_choice(architecture, device, say)
    return status


if __name__ == "__main__":
    sys.exit(main())
