"""Results as they lie in bench/results: read for the page, the pictures, and to compare two of them."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .cases import Problem
from .measure import Key

FOLDER = Path(__file__).parent / "results"
#: Of the first schema, whose times are each one process's.
OLD_NAMES = {"ours": "cpu", "copy_": "copy"}


@dataclass(frozen=True)
class Results:
    """One run: where, and how long what took in each process."""

    name: str
    header: dict[str, Any]
    times: dict[Key, list[float]]
    copies: dict[Problem, list[float]]  # bytes per second
    memory: dict[Key, float]  # bytes

    def median(self, key: Key) -> float | None:
        return statistics.median(self.times[key]) if key in self.times else None

    def ratios(self, key: Key, other: Key) -> list[float]:
        """How many times as long as this the other takes, in each process."""
        return [b / a for a, b in zip(self.times.get(key, ()), self.times.get(other, ()), strict=False)]

    @property
    def backends(self) -> list[str]:
        found = self.header["backends"]
        return found if isinstance(found, list) else [self.header["backend"]]

    @cached_property
    def problems(self) -> list[Problem]:
        """From few classes to many, logits before heads."""
        found = dict.fromkeys(key.problem for key in self.times)
        return sorted(found, key=lambda one: (one.features > 0, one.dtype != "float32", one.classes, one.rows))

    def losses(self, problem: Problem) -> list[str]:
        """Those that one of our backends, or head's strategies, has taken."""
        return list(dict.fromkeys(key.loss for key in self.times if key.problem == problem and key.loss != "-"))

    def copy(self, problem: Problem) -> float | None:
        """Of as many bytes as the logits have, seconds."""
        rates = self.copies.get(problem)
        return 2 * problem.nbytes / statistics.median(rates) if rates else None


def _problem(line: dict[str, Any]) -> Problem:
    shape = line.get("shape") or [line["rows"], line["classes"]]
    return Problem(tuple(shape), line["dtype"], line.get("features", 0))


def _key(line: dict[str, Any]) -> Key:
    if line.get("peer") == "F.cross_entropy":
        return Key(_problem(line), "cross_entropy", "step", "eager")
    by = line.get("by") or OLD_NAMES.get(line["peer"], line["peer"])
    return Key(_problem(line), line["loss"], line.get("mode", "step"), by)


def load(path: Path) -> Results:
    """A file that ``python -m bench`` wrote, of this schema or the first."""
    data = json.loads(path.read_text())
    times = {_key(one): [p["median"] for p in one.get("processes", [one])] for one in data["timings"]}
    copies = {_problem(one): [rate * 1e9 for rate in one["gb_s"]] for one in data.get("copies", [])}
    for key in [key for key in times if key.by == "copy"]:
        copies[key.problem] = [2 * key.problem.nbytes / time for time in times.pop(key)]
    memory = {_key(one): one["bytes"] for one in data.get("memory", [])}
    header = {name: value for name, value in data.items() if name not in ("timings", "copies", "memory", "apart")}
    return Results(path.stem, header, times, copies, memory)
