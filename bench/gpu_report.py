"""What a run on a GPU found, beside what was asked for: text, JSON and a picture."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .measure import Timing

OURS = ("triton", "cuda")  # this package's backends on a GPU
LOSSES = ["cross_entropy", "modulated", "arcface", "two_scale", "piecewise"]
MODES = ["forward", "single", "split"]
DTYPES = ["bfloat16", "float32"]

LABEL, LOSS, SAVED, UPSTREAM = 8, 4, 8, 4  # bytes per row
OF_COPY = ": of copy"


class Problem(NamedTuple):
    """Logits of one shape, classes in dimension 1, and one dtype."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.dtype}"

    @property
    def classes(self) -> int:
        return self.shape[1]

    @property
    def rows(self) -> int:
        return math.prod(self.shape) // self.classes

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def nbytes(self) -> int:
        """u: one pass over the logits."""
        return self.rows * self.classes * self.torch_dtype.itemsize


def floor_bytes(problem: Problem, mode: str) -> int:
    """What has to be read and written once per direction."""
    u, rows = problem.nbytes, problem.rows
    if mode == "forward":
        return u + rows * LABEL
    if mode == "single":
        return 2 * u + rows * LABEL
    forward, backward = LABEL + LOSS + SAVED, LABEL + SAVED + UPSTREAM
    return 3 * u + rows * (forward + backward)


# ---- what was found --------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One measured thing."""

    problem: Problem
    loss: str
    mode: str
    by: str  # a backend of ours, or a peer
    timing: Timing
    fraction: float  # of the copy bandwidth, at the floor's bytes


class Small(NamedTuple):
    """A small problem: seconds per forward and backward, from a CUDA graph and without one."""

    problem: Problem
    loss: str
    by: str
    graph: float | None
    plain: float


class Half(NamedTuple):
    """Relative error of a float16 gradient against float64, and the share of its elements that are wrongly zero."""

    loss: str
    by: str
    way: str
    error: float
    zeros: float


class Copies(NamedTuple):
    """A training state copied: seconds from a CUDA graph, which is the device's share, and as the host calls it."""

    what: str  # save, restore, refused
    by: str
    nbytes: int  # of the state
    tensors: int
    graph: float | None
    plain: float
    bandwidth: float  # of the copy, in the same turns

    @property
    def fraction(self) -> float:
        """Of the copy bandwidth."""
        return 2 * self.nbytes / (self.graph or self.plain) / self.bandwidth


@dataclass
class Report:
    """Everything of one run."""

    header: dict[str, Any]
    copies: list[float] = field(default_factory=list)  # bytes per second, by problem
    rows: list[Row] = field(default_factory=list)
    small: list[Small] = field(default_factory=list)
    half: list[Half] = field(default_factory=list)
    states: list[Copies] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def find(self, problem: Problem, loss: str, mode: str, by: str) -> Row | None:
        return next((row for row in self.rows if row[:4] == (problem, loss, mode, by)), None)

    def fastest(self, problem: Problem, loss: str, mode: str) -> Row | None:
        """Of our backends: the one that a measured choice takes."""
        own = [row for row in self.rows if row[:3] == (problem, loss, mode) and row.by in OURS]
        return min(own, key=lambda row: row.timing.median, default=None)

    def problems(self) -> list[Problem]:
        return list(dict.fromkeys(row.problem for row in self.rows))

    def backends(self) -> list[str]:
        found = {row.by for row in (*self.rows, *self.small, *self.half)}
        return [name for name in OURS if name in found]


# ---- targets ---------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What was asked for and what was measured."""

    what: str
    value: float
    bound: float
    at_least: bool

    @property
    def reached(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def missed_by(self) -> float:
        """The factor that is missing; at most 1 where it was reached."""
        return self.bound / self.value if self.at_least else self.value / self.bound

    def __str__(self) -> str:
        verdict = "reached" if self.reached else f"missed by {self.missed_by:.2f}x"
        return f"{self.what:<64} {self.value:>8.3g}  {'>=' if self.at_least else '<='} {self.bound:<5g} {verdict}"


def wanted_fraction(problem: Problem, mode: str, by: str) -> float | None:
    """Of the copy bandwidth; None where nothing was asked for."""
    alone = len(problem.shape) == 2
    if (by, mode, problem.dtype, alone) == ("cuda", "single", "bfloat16", True) and problem.classes >= 1000:
        return 0.92
    if problem.classes < 256:
        return 0.80
    if problem.classes <= 32768:
        return 0.90
    return 0.85 if mode == "split" and problem.classes >= 128256 else None


def wanted_ratio(row: Row) -> float | None:
    """How many times as long as the faster of ours a peer was to take."""
    if row.by == "eager":
        return 3.0 if row.loss == "cross_entropy" else 8.0
    if row.by == "liger":
        return 1.6 if row.problem.classes == 128256 else 1.4
    return {"compile": 1.2, "quack": 1.0}.get(row.by)


def check(report: Report) -> list[Outcome]:
    """What was asked for and this run measured."""
    found = []
    for row in report.rows:
        if row.by in OURS and (bound := wanted_fraction(row.problem, row.mode, row.by)) is not None:
            what = f"{row.problem}, {row.loss}, {row.mode}, {row.by}{OF_COPY}"
            found.append(Outcome(what, row.fraction, bound, True))
    for row in report.rows:
        own = report.fastest(row.problem, row.loss, row.mode)
        if row.by not in OURS and own is not None and (bound := wanted_ratio(row)) is not None:
            what = f"{row.problem}, {row.loss}: {row.by} / {own.by}"
            found.append(Outcome(what, row.timing.median / own.timing.median, bound, True))
    found += [
        Outcome(f"{one.problem}, {one.loss}, {one.by}: us from a CUDA graph", one.graph * 1e6, bound, False)
        for one in report.small
        if one.graph is not None and (bound := {"triton": 15.0, "cuda": 10.0}.get(one.by)) is not None
    ]
    eager = {one.problem: one.plain for one in report.small if one.by == "eager"}
    found += [
        Outcome(f"{one.problem}: F.cross_entropy / cuda, no graphs", eager[one.problem] / one.plain, 1.0, True)
        for one in report.small
        if (one.loss, one.by) == ("cross_entropy", "cuda") and one.problem in eager
    ]
    for state in report.states:
        if state.by == "multi_copy_" and state.what == "refused" and state.graph is not None:
            found.append(
                Outcome(f"{state.tensors} tensors, refused: us from a CUDA graph", state.graph * 1e6, 5, False)
            )
        elif state.by == "multi_copy_" and state.what != "refused":
            found.append(Outcome(f"{state.tensors} tensors, {state.what}{OF_COPY}", state.fraction, 0.85, True))
    errors = {(one.loss, one.by, one.way): one.error for one in report.half}
    for (loss, by, way), error in errors.items():
        if way == "scaled mean" and errors.get((loss, by, "split")):
            ratio = error / errors[loss, by, "split"]
            found.append(Outcome(f"float16, {loss}, {by}: error under a loss scale / split", ratio, 1.05, False))
    return found


# ---- what comes out --------------------------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """Everything, for other programs."""
    return {
        "schema": "gpu 2",
        **report.header,
        "copy_gb_s": [rate / 1e9 for rate in report.copies],
        "rows": [
            {
                "shape": row.problem.shape,
                "dtype": row.problem.dtype,
                "loss": row.loss,
                "mode": row.mode,
                "by": row.by,
                **row.timing._asdict(),
                "floor_bytes": floor_bytes(row.problem, row.mode),
                "of_copy": row.fraction,
            }
            for row in report.rows
        ],
        "small": [{**one._asdict(), "problem": str(one.problem)} for one in report.small],
        "half": [one._asdict() for one in report.half],
        "states": [{**one._asdict(), "of_copy": one.fraction} for one in report.states],
        "failures": report.failures,
        "skipped": report.skipped,
        "targets": [{**one._asdict(), "reached": one.reached} for one in check(report)],
    }


def _cell(report: Report, problem: Problem, loss: str, by: str) -> str:
    parts = []
    for mode in MODES:
        row, bound = report.find(problem, loss, mode, by), wanted_fraction(problem, mode, by)
        missed = row is not None and bound is not None and row.fraction < bound
        parts.append("-" if row is None else f"{100 * row.fraction:.0f}{'*' if missed else ''}")
    return "/".join(parts)


def _ratios(report: Report, problem: Problem, loss: str, peer: str) -> str:
    """A peer's time over each of ours."""
    row = report.find(problem, loss, "single", peer)
    if row is None:
        return ""
    own = (report.find(problem, loss, "single", by) for by in report.backends())
    return "/".join("-" if one is None else f"{row.timing.median / one.timing.median:.2f}" for one in own)


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def _rate(rates: list[float]) -> str:
    return f"{min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f} GB/s" if rates else "not measured"


def text(report: Report) -> str:
    """The table for a terminal."""
    header, backends = report.header, report.backends()
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items() if version)
    commit = (header["commit"] or "no commit")[:10]
    lines = [
        f"{header['device']}, backends {' and '.join(backends) or '-'}; {versions}; {header['date']}; {commit}",
        f"copy {_rate(report.copies)}; percent of it at the floor's bytes, forward/single visit/split; * below target",
        f"{'':<24}{'':<8}" + "".join(f"{name:>15}" for name in LOSSES),
    ]
    for problem in report.problems():
        for by in backends:
            # A problem's name once: the lines of its backends stand together.
            cells = "".join(f"{_cell(report, problem, loss, by):>15}" for loss in LOSSES)
            lines.append(f"{str(problem) if by == backends[0] else '':<24}{by:<8}{cells}")
    peers = dict.fromkeys((row.problem, row.by) for row in report.rows if row.by not in OURS)
    if peers:
        title = f"Times as long as ours ({'/'.join(backends)}), forward + backward of a mean"
        lines += ["", f"{title} (poly1: a loss of one's own on our row losses):"]
    for problem, peer in peers:
        cells = "".join(f"{_ratios(report, problem, loss, peer):>15}" for loss in LOSSES)
        lines.append(f"{problem!s:<24}{peer:<8}{cells}".rstrip())
    if report.small:
        lines += ["", "Small problems, forward + backward, us (CUDA graph / without):"]
    for problem, by in dict.fromkeys((one.problem, one.by) for one in report.small):
        cells = ", ".join(
            f"{'F.cross_entropy' if by == 'eager' else one.loss} {_us(one.graph)}/{_us(one.plain)}"
            for one in report.small
            if (one.problem, one.by) == (problem, by)
        )
        lines.append(f"{problem!s:<24}{by:<8}{cells}")
    if report.states:
        first = report.states[0]
        lines += [
            "",
            f"A training state, {first.nbytes / 1e9:.2f} GB in {first.tensors} tensors, us (CUDA graph / call):",
        ]
    for state in report.states:
        share = "" if state.what == "refused" else f"  {state.fraction:.1%} of copy"
        lines.append(f"  {state.what:<9}{state.by:<15}{_us(state.graph):>8} / {_us(state.plain)}{share}")
    if report.half:
        lines += ["", "float16 gradients against float64 (relative error, share lost to zero):"]
    lines += [f"  {one.loss:<14} {one.by:<7} {one.way:<12} {one.error:.2e}  {one.zeros:.1%}" for one in report.half]
    outcomes = check(report)
    of_copy = [one for one in outcomes if one.what.endswith(OF_COPY)]
    others = [one for one in outcomes if not one.what.endswith(OF_COPY)]
    for name, some in (("bandwidth", of_copy), ("other", others)):
        lines += ["", f"Targets, {name}: {sum(one.reached for one in some)} of {len(some)} reached"]
        missed = sorted((one for one in some if not one.reached), key=lambda one: -one.missed_by)
        # The table marks those of the bandwidth; here are the worst.
        lines += [f"  {one}" for one in (missed[:5] if some is of_copy else missed)]
    lines += [f"FAILED: {what}" for what in report.failures]
    lines += [f"skipped, no time: {what}" for what in report.skipped]
    return "\n".join(lines)


def picture(report: Report, path: Path) -> None:
    """A panel per mode and dtype: percent of the copy bandwidth over the number of classes, by loss and backend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dtypes = [dtype for dtype in DTYPES if any(problem.dtype == dtype for problem in report.problems())]
    figure = Figure(figsize=(14, 0.8 + 3.6 * max(1, len(dtypes))), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(max(1, len(dtypes)), len(MODES), squeeze=False, sharey=True)
    for line, dtype in zip(grid, dtypes, strict=False):
        own = sorted((p for p in report.problems() if p.dtype == dtype), key=lambda p: (len(p.shape) > 2, p.classes))
        names = [f"{p.classes}" if len(p.shape) == 2 else f"{p.classes}, images" for p in own]
        # Images are another layout: a gap before them, so that no line leads there.
        places = [place + (len(p.shape) > 2) for place, p in enumerate(own)]
        gap = next((place for place, p in enumerate(own) if len(p.shape) > 2), len(own))

        def with_gap(values: list[Any], gap: int = gap) -> list[Any]:
            return [*values[:gap], math.nan, *values[gap:]] if gap < len(values) else values

        for axes, mode in zip(line, MODES, strict=True):
            for by in report.backends():
                dashed = by != "cuda"
                for k, loss in enumerate(LOSSES):
                    rows = [report.find(problem, loss, mode, by) for problem in own]
                    heights = [math.nan if row is None else 100 * row.fraction for row in rows]
                    axes.plot(
                        with_gap(places), with_gap(heights), marker="o", markersize=3, linewidth=1, color=f"C{k}",
                        linestyle="--" if dashed else "-", label=f"{loss.replace('_', ' ')}, {by}",
                    )  # fmt: skip
                bounds = [100 * (wanted_fraction(problem, mode, by) or math.nan) for problem in own]
                axes.step(
                    with_gap(places), with_gap(bounds), where="mid", color="grey" if dashed else "black", linestyle=":",
                    linewidth=1, label=f"target, {by}",
                )  # fmt: skip
            axes.set(title=f"{dtype}, {mode}", ylim=(0, 120))
            axes.set_xticks(places, names, rotation=60, ha="right", rotation_mode="anchor")
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("% of copy bandwidth")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    figure.suptitle(
        f"{report.header['device']}: bytes at the floor over time, in percent of a copy ({_rate(report.copies)}), "
        "by number of classes",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def stem(header: dict[str, Any]) -> str:
    """The name of a run's files."""
    device = re.sub(r"[^a-z0-9]+", "-", header["device"].lower()).strip("-")
    return f"{device}-{header['date'][:19].replace(':', '')}"


def write_json(report: Report, folder: Path) -> Path:
    """Whole or not at all: a run may be stopped at any time."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem(report.header)}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(as_json(report), indent=1) + "\n")
    part.replace(path)
    return path
