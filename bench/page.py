"""``python -m bench.page``: docs/benchmarks.md, from the JSON in bench/results alone."""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path

from . import linear
from .cases import Problem
from .charts import time_text
from .measure import Key
from .report import FOLDER, Report, load, markdown

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"

INTRO = """# Benchmarks

<!-- Written by `python -m bench.page` from the JSON in bench/results: to change it, change that. -->

A step is a loss and its `backward()`. Everything in one table was measured by turns in one run, after its results were
held against the reference; on a machine that others use too, what can be compared is what stands in one row.

- *ours* is the median of fresh processes, beside it the best and the worst of them: where a gradient lies in memory is
  drawn anew in each. A ratio is the median of the ratios within each process, *least* the smallest; over 1 ours is
  faster.
- *eager* is the loss as a careful user writes it (`bench/peers.py`), *compile* that chain under `torch.compile`.
- Of linear heads, `linear` is what the package picks by itself, `tiles` the strategy that keeps no logits; *MB* is the
  most that a step takes beyond input, weight and their gradients.
- *copy* is `copy_` of as many bytes as the logits have: a step that reads the logits once and writes a gradient has as
  much to move.

On your own machine:

    python -m bench --quick            # under a minute
    python -m bench                    # some minutes; --help lists losses, shapes, peers
    python -m bench --suites linear    # linear heads; the runs below know the suite by its old name, heads
    python -m bench compare A B        # two results, line by line
    python -m bench.page               # this page

Nothing has been measured on a GPU yet; what is predicted stands in `bench/NOTES.md`, of [linear heads](heads.md) with
its assumptions on their page, and `bench/gpu.sh first` measures it. Tiles of their logits are float32: in half
precision they are not built, as no table measured on a GPU says where that would cost no accuracy.
"""


def _ratio(value: float) -> str:
    return f"{value:.2g}" if value < 99.5 else f"{value:.0f}"


def _ratios(results: Report, own: Key, other: Key) -> tuple[str, str]:
    """The median of the processes' and the smallest; nothing where a thing is its own peer."""
    found = [] if own == other else results.ratios(own, other)
    return (_ratio(statistics.median(found)), _ratio(min(found))) if found else ("", "")


def _cells(results: Report, key: Key, peers: list[str]) -> dict[str, str]:
    problem, times = key.problem, results.medians(key)
    dtype = "" if problem.dtype == "float32" else f" {problem.dtype}"
    cells = {
        "logits": "×".join(map(str, problem.sizes)) + dtype,
        "loss": f"`{key.loss}`" + (f", {key.by}" if key.by in linear.STRATEGIES else ""),
        "ours": time_text(statistics.median(times)),
        "best … worst": f"{time_text(min(times))} … {time_text(max(times))}",
        "copy": time_text(results.copy(problem)),
    }
    own = "F.cross_entropy"
    cells[f"{own} / ours"], cells[f"{own}: least"] = _ratios(
        results, key, key._replace(loss="cross_entropy", by="eager")
    )
    for peer in peers:
        once = (peer, key.loss) == ("eager", "cross_entropy")  # that is F.cross_entropy
        ratios = ("", "") if once else _ratios(results, key, key._replace(by=peer))
        cells[f"{peer} / ours"], cells[f"{peer}: least"] = ratios
    if problem.features:
        memory = results.memory()
        cells["MB"] = _megabytes(memory.get(key))
        cells["eager MB"] = _megabytes(memory.get(key._replace(by="eager")))
    return cells


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.0f}"


def table(results: Report, problems: list[Problem], ours: list[str]) -> list[str]:
    """Of one kind of problem, Markdown; what is said of a problem stands in its first line."""
    keys = [key for key in results.measured() if key.mode == "step" and key.problem in problems and key.loss != "-"]
    peers = [by for by in dict.fromkeys(key.by for key in keys) if by not in ours]
    several = results.processes > 1
    titles: list[str] = []
    rows = []
    for problem in problems:
        own = [_cells(results, key, peers) for key in keys if key.problem == problem and key.by in ours]
        for k, cells in enumerate(own):
            shown = {title: cell for title, cell in cells.items() if several or not re.search("worst|least", title)}
            titles = titles or [re.sub(".*: ", "", title) for title in shown]
            rows.append([*(shown | ({"logits": "", "copy": ""} if k > 0 else {})).values()])
    return markdown(titles, rows) if rows else []


def section(results: Report) -> list[str]:
    """One run: where, its tables, its pictures, its misses."""
    header = results.header
    versions = header["versions"]
    isa = f" ({header['isa']})" if header.get("isa") else ""
    lines = [f"## {header['device']}, {header['date'][:10]}", ""]
    command = f"By `{header['command']}`: " if header.get("command") else ""
    commit = (header["commit"] or "unknown")[:10]
    where = (
        f"{header['threads']} threads of {header['cpus']} processors{isa}, torch {versions['torch']}, commit {commit}"
    )
    lines.append(f"{command}{where}; `bench/results/{header['name']}.json`.")
    for caveat in header["caveats"]:
        lines += ["", f"**{caveat}**"]
    lines += ["", f"<!-- chart: {header['name']} -->", ""]
    for of_linear in (False, True):
        problems = [one for one in results.problems() if bool(one.features) == of_linear]
        problems.sort(key=lambda one: (one.dtype != "float32", one.classes, one.rows))
        if problems:
            lines += [*table(results, problems, list(linear.STRATEGIES) if of_linear else header["backends"]), ""]
    targets = header.get("targets") or []
    missed = [one for one in targets if not one["reached"]]
    if targets:
        reached = f"{len(targets) - len(missed)} of the {len(targets)} targets that this run measured were reached."
        lines += [reached + (" Missed:" if missed else ""), ""]
        for one in missed:
            wanted = f"{'at least' if one['value'] < one['bound'] else 'at most'} {one['bound']:g}"
            lines += [f"- {one['what']}: {one['value']:.3g}, wanted {wanted}"]
        lines += [""] if missed else []
    return lines


def page(folder: Path = FOLDER) -> str:
    """All of it, the newest run first."""
    found = sorted(map(load, folder.glob("*.json")), key=lambda one: one.header["date"], reverse=True)
    return "\n".join([INTRO, *(line for one in found for line in section(one))]).rstrip() + "\n"


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else PAGE).write_text(page())
