"""Pictures of a run: the bandwidth that was reached, time against classes, memory against classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .cases import LOSSES, floor_bytes
from .measure import Key
from .peers import HEADLINE
from .report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ["#2f7ed8", "#e0752d", "#3a9f5b", "#b04fc4", "#c23b4e", "#7a6a3a", "#1aa3a3", "#8a8f98"]
STYLES = ["-", "--", ":", "-."]


def _scaled(value: float, units: Sequence[str], step: float = 1000.0) -> str:
    """12000 as "12 k": at most three digits and a unit."""
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value, power = value / step, power + 1
    return f"{value:.3g} {units[power]}".rstrip()


def size_text(nbytes: float) -> str:
    return _scaled(nbytes, ["B", "kB", "MB", "GB", "TB"])


def time_text(seconds: float) -> str:
    return _scaled(seconds * 1e9, ["ns", "µs", "ms", "s"])


def count_text(count: float) -> str:
    return f"{count:,.0f}"


def _axis(axes: Axes, which: str, values: Sequence[float], text: Callable[[float], str], own: bool = False) -> None:
    """Logarithmic, with a word at each power of ten (or at the values themselves) and not 10³."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    ticks = sorted(set(values)) if own else [10.0**power for power in range(low, high + 1)]
    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(ticks, [text(tick) for tick in ticks])
    axis.set_ticks([], minor=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _steps(results: Report) -> list[Key]:
    """What can be shown beside each other: steps of losses that have a peer, by everyone."""
    steps = (key for key in results.measured() if key.mode == "step" and not key.problem.features)
    return [key for key in steps if key.loss in HEADLINE]


def _who(results: Report, keys: Sequence[Key]) -> list[str]:
    found = dict.fromkeys(key.by for key in keys)
    return sorted(found, key=lambda by: (by not in results.header["backends"] and by not in ("linear", "tiles"), by))


def _color(loss: str) -> str:
    return COLORS[LOSSES.index(loss) % len(COLORS)]


def roofline(results: Report, axes: Axes) -> None:
    """Bytes that a step has to move, over its time, beside what a copy of the same size reaches."""
    keys = _steps(results)
    who = _who(results, keys)
    sizes, rates = [], []
    for by, marker in zip(who, "os^Dv*", strict=False):
        for loss in dict.fromkeys(key.loss for key in keys):
            points = [
                (floor_bytes(key.problem, "step"), results.median(key)) for key in keys if key[1::2] == (loss, by)
            ]
            x, y = [size for size, _ in points], [size / time for size, time in points if time]
            sizes, rates = sizes + x, rates + y
            face = _color(loss) if by in results.header["backends"] else "none"
            label = f"{loss.replace('_', ' ')}, {by}"
            axes.plot(
                x, y, marker, color=_color(loss), markerfacecolor=face, label=label, markersize=6, linestyle="none"
            )
    problems = results.problems()
    for dtype, style in zip(dict.fromkeys(problem.dtype for problem in problems), STYLES, strict=False):
        own = sorted((problem for problem in problems if problem.dtype == dtype), key=lambda one: one.nbytes)
        x = [2 * problem.nbytes for problem in own]
        y = [size / results.copy(problem) for size, problem in zip(x, own, strict=True)]
        axes.plot(x, y, style, color="#8a8f98", label=f"copy, {dtype}")
        sizes, rates = sizes + x, rates + y
    _axis(axes, "x", sizes, size_text)
    _axis(axes, "y", rates, lambda rate: f"{rate / 1e9:g} GB/s")
    axes.set(xlabel="bytes that a step has to move", title="bandwidth reached")


def times(results: Report, axes: Axes, dtype: str = "float32") -> None:
    """A step's time for each row, against the number of classes."""
    keys = [key for key in _steps(results) if key.problem.dtype == dtype and len(key.problem.shape) == 2]
    found: list[float] = []
    for by, style in zip(_who(results, keys), STYLES, strict=False):
        for loss in dict.fromkeys(key.loss for key in keys):
            own = sorted((key.problem.classes, key) for key in keys if key[1::2] == (loss, by))
            values = [(results.median(key) or math.nan) / key.problem.rows for _, key in own]
            if values:
                label = f"{loss.replace('_', ' ')}, {by}"
                axes.plot([c for c, _ in own], values, style, marker="o", markersize=4, color=_color(loss), label=label)
                found += values
    _axis(axes, "x", [key.problem.classes for key in keys], count_text, own=True)
    _axis(axes, "y", found, time_text)
    axes.set(xlabel="classes", title=f"time of a row, {dtype}")


def memory(results: Report, axes: Axes) -> None:
    """The most bytes that a linear head's step had beside its inputs, against the number of classes."""
    found = {key: size for key, size in results.memory().items() if key.mode == "step" and size > 0}
    dtype = next(iter(found)).problem.dtype  # the first, or lines would join what is no series
    found = {key: size for key, size in found.items() if key.problem.dtype == dtype}
    for k, by in enumerate(_who(results, list(found))):
        for loss in dict.fromkeys(key.loss for key in found if key.by == by):
            own = sorted((key.problem.classes, size) for key, size in found.items() if key[1::2] == (loss, by))
            label = f"{loss.replace('_', ' ')}, {by}"
            axes.plot(*zip(*own, strict=True), STYLES[LOSSES.index(loss) % 4], marker="o", color=COLORS[k], label=label)
    _axis(axes, "x", [key.problem.classes for key in found], count_text, own=True)
    _axis(axes, "y", list(found.values()), size_text)
    axes.set(xlabel="classes", title=f"memory of a step beside its inputs, {dtype}")


def figure(results: Report) -> Figure:
    """The panels that the run has something for."""
    from matplotlib.figure import Figure

    panels = [roofline, times] if _steps(results) else []
    panels += [memory] if any(results.memory().values()) else []
    drawn = Figure(figsize=(4.6 * max(1, len(panels)), 4.2), layout="constrained")
    labels: dict[str, object] = {}
    for panel, axes in zip(panels, drawn.subplots(1, max(1, len(panels)), squeeze=False)[0], strict=False):
        panel(results, axes)
        axes.title.set_size(10)
        handles, names = axes.get_legend_handles_labels()
        labels |= dict(zip(names, handles, strict=True))
    columns = max(2, 2 * len(panels))
    drawn.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return drawn
