"""Results as they lie in bench/results: read for the page, the pictures, and to compare two of them."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from .cases import Problem
from .measure import Key, Run, Timing
from .report import Report

FOLDER = Path(__file__).parent / "results"


def _problem(line: dict[str, Any]) -> Problem:
    return Problem(tuple(line["shape"]), line["dtype"], line["features"])


def _key(line: dict[str, Any]) -> Key:
    return Key(_problem(line), line["loss"], line["mode"], line["by"])


def load(path: Path) -> Report:
    """A file that ``python -m bench`` wrote."""
    data = json.loads(path.read_text())
    runs: defaultdict[int, Run] = defaultdict(Run)
    for line in data["timings"]:
        for process, one in enumerate(line["processes"]):
            runs[process].timings[_key(line)] = Timing(**one)
    for line in data["copies"]:
        for process, rate in enumerate(line["gb_s"]):
            runs[process].bandwidth[_problem(line)] = rate * 1e9
    for line in data["memory"]:
        runs[0].memory[_key(line)] = line["bytes"]
    header = {name: value for name, value in data.items() if name not in ("timings", "copies", "memory", "apart")}
    return Report({"name": path.stem, **header}, list(runs.values()))
