"""What a run found, as text, JSON and a picture."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from .run import Run
from .shapes import Case
from .targets import Outcome, check

COLUMNS = {
    "ours": 11,
    "fastest": 11,
    "GB/s": 8,
    "of copy": 10,
    "ours/copy": 11,
    "ours/clone": 11,
    "eager/ours": 12,
    "compile/ours": 14,
    "F.ce/ours": 11,
}
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}
COLOURS = {"ours": "#1b6ca8", "eager": "#c9c9c9", "compile": "#e8a33d"}


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def header_text(run: Run) -> str:
    """One line on where and with what."""
    header = run.header
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items() if version)
    commit = (header["commit"] or "no commit")[:10] + (" with changes" if header["uncommitted_changes"] else "")
    where = f"{header['device']}, {header['threads']} threads"
    isa = f" ({header['isa']})" if header["backend"] == "cpu" else ""
    return f"{where}, backend {header['backend']}{isa}; {versions}; {commit}; {header['date']}"


def _case_text(run: Run, case: Case) -> str:
    floors = {peer: run.median(case, "-", peer) for peer in ("copy", "clone", "F.cross_entropy")}
    rate = 2 * case.nbytes / floors["copy"] / 1e9 if floors["copy"] else math.nan
    times = ", ".join(f"{peer} {_time(seconds)}" for peer, seconds in floors.items())
    lines = [
        "",
        f"{case}  (logits {case.nbytes / 1e6:.2f} MB; {times}; copy_ {rate:.1f} GB/s)",
        "  " + f"{'loss':<14}" + "".join(f"{name:>{width}}" for name, width in COLUMNS.items()),
    ]
    for loss in run.losses(case):
        ours = run.median(case, loss, "ours")
        if ours is None:
            continue
        best = next(timing.best for key, timing in run.timings.items() if key == (case, loss, "ours"))
        copy, clone = (1 / (run.ratio(case, loss, peer) or math.nan) for peer in ("copy", "clone"))
        cells = [
            _time(ours),
            _time(best),
            f"{2 * case.nbytes / ours / 1e9:.1f}",
            f"{1 / copy:.0%}",
            *map(_times, (copy, clone)),
            *(_times(run.ratio(case, loss, peer)) for peer in ("eager", "compile", "F.cross_entropy")),
        ]
        line = f"  {loss:<14}"
        lines.append(line + "".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True)))
    return "\n".join(lines)


def text(run: Run) -> str:
    """The tables for a terminal."""
    parts = [
        header_text(run),
        "A step is a loss and its backward(). GB/s count what copy_ does: one read and one write of the logits.",
        f"The hypervisor took up to {max(run.stolen, default=0.0):.2f} CPUs meanwhile.",
        *(f"WARNING: {caveat}" for caveat in run.caveats()),
        *(_case_text(run, case) for case in run.cases()),
    ]
    outcomes = check(run)
    if outcomes:
        reached = sum(outcome.reached for outcome in outcomes)
        but = " (not valid: see the WARNING above)" if run.caveats() else ""
        parts += ["", f"Targets: {reached} of {len(outcomes)} reached{but}", *(f"  {outcome}" for outcome in outcomes)]
    return "\n".join(parts)


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    case, loss, peer, bound = outcome.target
    return {
        **case._asdict(),
        "loss": loss,
        "ratio": f"ours/{peer}" if outcome.target.is_floor else f"{peer}/ours",
        "bound": bound,
        "value": outcome.value,
        "reached": outcome.reached,
        "missed_by": max(1.0, outcome.missed_by),
    }


def as_json(run: Run) -> dict[str, Any]:
    """Everything, for other programs."""
    return {
        "schema": 1,
        **run.header,
        "others_busy": run.others_busy,
        "stolen": max(run.stolen, default=0.0),
        "caveats": run.caveats(),
        "timings": [
            {**key.case._asdict(), "loss": key.loss, "peer": key.peer, **timing._asdict()}
            for key, timing in run.timings.items()
        ],
        "disagreements": [
            {**key.case._asdict(), "loss": key.loss, "peer": key.peer, "relative": value}
            for key, value in run.disagreements.items()
        ],
        "targets": [_outcome_json(outcome) for outcome in check(run)],
    }


def picture(run: Run, path: Path) -> None:
    """A panel per case: the time of each loss and peer in multiples of copy_."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = run.cases()
    columns = min(4, len(cases))
    figure = Figure(figsize=(4.2 * columns + 0.6, 3.3 * math.ceil(len(cases) / columns) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(math.ceil(len(cases) / columns), columns, squeeze=False).ravel()
    for axes, case in zip(grid, cases, strict=False):
        names = run.losses(case)
        copy = run.median(case, "-", "copy") or math.nan
        for place, (peer, colour) in enumerate(COLOURS.items()):
            times = [(run.median(case, name, peer) or math.nan) / copy for name in names]
            heights = [row + 0.27 * (place - 1) for row in range(len(names))]
            bars = axes.barh(heights, times, 0.25, color=colour, label={"compile": "torch.compile"}.get(peer, peer))
            labels = ["" if math.isnan(value) else f"{value:.2g}" for value in times]
            axes.bar_label(bars, labels, padding=2, fontsize=6, zorder=4, bbox=WHITE)
        for peer, style in (("copy", "-"), ("clone", "--"), ("F.cross_entropy", ":")):
            seconds = run.median(case, "-", peer)
            if seconds:
                axes.axvline(seconds / copy, color="black", linestyle=style, linewidth=1, label=f"{peer}", zorder=3)
        axes.set(xscale="log", yticks=range(len(names)), title=f"{case}, copy {_time(copy)}")
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0.8), high * 1.6)
        axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        axes.invert_yaxis()
        axes.title.set_fontsize(9)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(cases) :]:
        axes.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    header = run.header
    figure.suptitle(
        f"forward + backward in multiples of copy_ of the logits (log scale)\n{header['device']}, "
        f"{header['threads']} threads, torch {header['versions']['torch']}"
        + ("; NOT VALID: disturbed or without kernels" if run.caveats() else ""),
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def write(run: Run, folder: Path) -> list[Path]:
    """The JSON and the picture; the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", run.header["device"].lower()).strip("-")
    stem = f"{device}-{run.header['date'][:19].replace(':', '')}"
    data, image = folder / f"{stem}.json", folder / f"{stem}.png"
    data.write_text(json.dumps(as_json(run), indent=1) + "\n")
    try:
        picture(run, image)
    except ImportError:
        return [data]  # no matplotlib: the numbers are worth as much
    return [data, image]
