"""What a run found, beside what was asked for: text, JSON and a picture."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

import mlkernels
from mlkernels.backends import native

from . import linear
from .cases import MODES, Problem, floor_bytes
from .measure import Key, Run, Timing
from .options import ON_GPU
from .peers import HEADLINE
from .peers import PEERS as LOSS_PEERS

OF_COPY = ": of copy"
PEERS = [*dict.fromkeys([*LOSS_PEERS, *linear.PEERS])]
FOLDER = Path(__file__).parent / "results"  # what the page, its pictures and compare read


# ---- where ---------------------------------------------------------------------------------------------------------


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def device_name(device: torch.device) -> str:
    """What the machine calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe(device: torch.device, backends: list[str]) -> dict[str, Any]:
    """Where and with what a run was made."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "backends": backends,
        "isa": native.cpu_isa(),
        "available": mlkernels.available_backends(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "versions": {
            "mlkernels": mlkernels.__version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
        },
        "system": platform.platform(terse=True),
    }


# ---- what was found --------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """The runs of all processes; a time is the median of theirs, a ratio that of the ratios within each."""

    header: dict[str, Any]
    runs: list[Run]

    @property
    def processes(self) -> int:
        return sum(bool(run.timings) for run in self.runs)

    def measured(self) -> list[Key]:
        return list(dict.fromkeys(key for run in self.runs for key in run.timings))

    def problems(self) -> list[Problem]:
        return list(dict.fromkeys(key.problem for key in self.measured()))

    def own(self, problem: Problem) -> list[tuple[str, str]]:
        """Losses (or copies) and who computes them, peers apart."""
        found = ((key.loss, key.by) for key in self.measured() if key.problem == problem and key.loss != "-")
        return list(dict.fromkeys(one for one in found if one[1] not in PEERS))

    def medians(self, key: Key) -> list[float]:
        """Of each process that measured it."""
        return [run.timings[key].median for run in self.runs if key in run.timings]

    def median(self, key: Key) -> float | None:
        return statistics.median(found) if (found := self.medians(key)) else None

    def ratios(self, key: Key, other: Key) -> list[float]:
        """How many times as long as this the other takes, in each process."""
        both = (run.timings for run in self.runs if key in run.timings and other in run.timings)
        return [timings[other].median / timings[key].median for timings in both]

    def ratio(self, key: Key, other: Key) -> float | None:
        return statistics.median(found) if (found := self.ratios(key, other)) else None

    def fractions(self, key: Key) -> list[float]:
        """Of the floor, in each process: a copy's time for the bytes of a step, or the products of a linear head."""
        if key.problem.features:
            return self.ratios(key, Key(key.problem, "-", "step", "products"))
        need = floor_bytes(key.problem, key.mode)
        runs = (run for run in self.runs if key in run.timings and key.problem in run.bandwidth)
        return [need / run.timings[key].median / run.bandwidth[key.problem] for run in runs]

    def fraction(self, key: Key) -> float | None:
        return statistics.median(found) if (found := self.fractions(key)) else None

    def copy(self, problem: Problem) -> float:
        """Of as many bytes as the logits have, seconds."""
        rates = [run.bandwidth[problem] for run in self.runs if problem in run.bandwidth]
        return 2 * problem.nbytes / statistics.median(rates)

    def memory(self) -> dict[Key, int]:
        """The most bytes that any process took."""
        return {key: max(run.memory.get(key, 0) for run in self.runs) for run in self.runs for key in run.memory}

    def fastest(self, key: Key) -> Key | None:
        """The same by the one of our backends that takes least: a measured choice takes that."""
        found = [(time, by) for by in self.header["backends"] if (time := self.median(key._replace(by=by)))]
        return key._replace(by=min(found)[1]) if found else None

    def failures(self) -> list[str]:
        return list(dict.fromkeys(what for run in self.runs for what in run.failures))

    def skipped(self) -> list[str]:
        return list(dict.fromkeys(what for run in self.runs for what in run.skipped))

    def caveats(self) -> list[str]:
        """Why these numbers must not be published, if so."""
        found = []
        if "reference" in self.header["backends"]:
            found.append("This is the reference backend, not a kernel: `python -m mlkernels` says why.")
        spare = max(0, (self.header["cpus"] or 1) - self.header["threads"])
        busy = max((run.load.others_busy for run in self.runs), default=0.0)
        if self.header["device_type"] == "cpu" and busy > spare + 0.1:
            found.append(
                f"Other programs kept up to {busy:.1f} CPUs busy meanwhile: times are wrong, ratios in a run less so."
            )
        return found


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
    def wanted(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:<5g}"

    @property
    def missed_by(self) -> float:
        """The factor that is missing; at most 1 where it was reached."""
        return self.bound / self.value if self.at_least else self.value / self.bound

    def __str__(self) -> str:
        verdict = "reached" if self.reached else f"missed by {self.missed_by:.2f}x"
        return f"{self.what:<64} {self.value:>8.3g}  {self.wanted} {verdict}"


#: On a CPU of two cores, float32: how many times as long as ours the peers of cross_entropy, modulated and arcface
#: take, torch.compile of any of them, and ours as a multiple of copy or clone.
CPU_TARGETS: dict[tuple[int, ...], tuple[tuple[float, float, float], float | None, tuple[str, float] | None]] = {
    (128, 10): ((1, 3, 3.5), None, None),
    (128, 100): ((1, 3, 3.5), None, None),
    (256, 1000): ((2, 4, 8), None, None),
    (1024, 8000): ((4, 4, 10), 2.7, ("copy", 1.9)),
    (1024, 32000): ((2.2, 2.2, 6), None, ("clone", 1.25)),
}


def _cpu_outcomes(report: Report) -> Iterator[Outcome]:
    for problem in report.problems():
        for k, loss in enumerate(HEADLINE):
            key = Key(problem, loss, "step", "cpu")
            if problem.dtype == "bfloat16" and (
                wide := report.ratio(key._replace(problem=problem._replace(dtype="float32")), key)
            ):
                yield Outcome(f"{problem}, {loss}: cpu / float32", wide, 1, False)
            if problem.dtype != "float32" or problem.shape not in CPU_TARGETS:
                continue
            eager, compiled, floor = CPU_TARGETS[problem.shape]
            for by, bound in (("eager", eager[k]), ("compile", compiled)):
                if bound is not None and (found := report.ratio(key, key._replace(by=by))) is not None:
                    yield Outcome(f"{problem}, {loss}: {by} / cpu", found, bound, True)
            own = report.median(key)
            if floor is None or own is None:
                continue
            if floor[0] == "clone":
                found = report.ratio(key, Key(problem, "-", "step", "clone"))
            else:
                found = report.copy(problem) / own
            if found:
                yield Outcome(f"{problem}, {loss}: cpu / {floor[0]}", 1 / found, floor[1], False)


#: A linear head's rows, features, classes and dtype; the loss; who; at most how many times another's time, or MB.
LINEAR_TARGETS: list[tuple[str, str, str, str, float]] = [
    ("1024x64x200000 float32", "cross_entropy", "linear", "eager", 0.40),
    ("1024x64x200000 float32", "cross_entropy", "linear", "chunked64", 1.0),
    ("1024x64x200000 float32", "cross_entropy", "linear", "chunked256", 1.0),
    ("1024x64x200000 float32", "cross_entropy", "linear", "MB", 110),
    ("1024x64x200000 float32", "cross_entropy", "tiles", "eager", 0.5),
    ("1024x64x200000 float32", "cross_entropy", "tiles", "MB", 20),
    ("1024x64x200000 float32", "arcface", "linear", "eager", 0.18),
    ("512x512x50000 float32", "cross_entropy", "linear", "eager", 0.82),
    ("1024x64x200000 bfloat16", "cross_entropy", "linear", "eager", 0.6),
    ("512x512x50000 bfloat16", "cross_entropy", "linear", "eager", 0.9),
    ("8192x4096x128256 bfloat16", "cross_entropy", "linear", "products", 1.1),
    ("8192x4096x151936 bfloat16", "cross_entropy", "linear", "products", 1.6),
    ("8192x4096x151936 bfloat16", "cross_entropy", "linear", "MB", 6442),
]


def _linear_outcomes(report: Report) -> Iterator[Outcome]:
    problems = {str(problem): problem for problem in report.problems()}
    for problem, loss, by, other, bound in LINEAR_TARGETS:
        if problem not in problems:
            continue
        key = Key(problems[problem], loss, "step", by)
        beside = key._replace(by=other, loss="-" if other == "products" else loss)
        size = report.memory().get(key)
        found = (size and size / 1e6) if other == "MB" else report.ratio(beside, key)
        if found is not None:
            yield Outcome(f"{problem}, {loss}: {by} {'in' if other == 'MB' else '/'} {other}", found, bound, False)


def wanted_fraction(problem: Problem, mode: str, by: str) -> float | None:
    """On a GPU, of the copy bandwidth; None where nothing was asked for."""
    if by not in ON_GPU or mode == "graph" or problem.small:
        return None
    if (by, mode, problem.dtype, len(problem.shape)) == ("cuda", "step", "bfloat16", 2) and problem.classes >= 1000:
        return 0.92
    if problem.classes < 256:
        return 0.80
    if problem.classes <= 32768:
        return 0.90
    return 0.85 if mode == "split" and problem.classes >= 128256 else None


def wanted_ratio(key: Key) -> float | None:
    """On a GPU, how many times as long as the faster of ours a peer was to take."""
    if key.problem.small or key.problem.features:
        return None
    if key.by == "eager":
        return 3.0 if key.loss == "cross_entropy" else 8.0
    if key.by == "liger":
        return 1.6 if key.problem.classes == 128256 else 1.4
    return {"compile": 1.2, "quack": 1.0}.get(key.by)


def _gpu_outcomes(report: Report) -> Iterator[Outcome]:
    for key in report.measured():
        problem, loss, mode, by = key
        what, time = f"{problem}, {loss}, {mode}, {by}", report.median(key) or math.nan
        if by == "multi_copy_":
            if loss != "refused" and mode == "step" and (found := report.fraction(key)) is not None:
                graph = report.fraction(key._replace(mode="graph"))
                yield Outcome(f"training state, {loss}{OF_COPY}", graph or found, 0.85, True)
            elif loss == "refused" and mode == "graph":
                yield Outcome("training state, refused: us from a CUDA graph", time * 1e6, 5, False)
        elif (bound := wanted_fraction(problem, mode, by)) is not None and loss != "poly1":
            yield Outcome(f"{what}{OF_COPY}", report.fraction(key) or math.nan, bound, True)
        elif mode == "graph" and by in ON_GPU:
            yield Outcome(f"{what}: us", time * 1e6, {"triton": 15.0, "cuda": 10.0}[by], False)
        elif (bound := wanted_ratio(key)) is not None and loss != "-" and (own := report.fastest(key)) is not None:
            yield Outcome(f"{problem}, {loss}: {by} / {own.by}", report.ratio(own, key) or math.nan, bound, True)
        elif (
            problem.small
            and (loss, mode, by) == ("cross_entropy", "step", "eager")
            and (found := report.ratio(key._replace(by="cuda"), key)) is not None
        ):
            yield Outcome(f"{problem}: F.cross_entropy / cuda, no graphs", found, 1.0, True)


def check(report: Report) -> list[Outcome]:
    """What was asked for and this run measured."""
    on_device = _gpu_outcomes if report.header["device_type"] == "cuda" else _cpu_outcomes
    return [*on_device(report), *_linear_outcomes(report)]


# ---- text ------------------------------------------------------------------------------------------------------------


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _columns(report: Report) -> dict[str, Callable[[Key], str]]:
    """Of the table: by title, the cell of a line, whose key has the mode "step"."""
    keys = report.measured()
    modes = [mode for mode in MODES if any(key.mode == mode and key.by not in PEERS for key in keys)]
    columns: dict[str, Callable[[Key], str]] = {"step": lambda key: time_text(report.median(key))}
    if report.processes > 1:
        columns["best"] = lambda key: time_text(min(report.medians(key), default=None))
        columns["worst"] = lambda key: time_text(max(report.medians(key), default=None))
    for mode in modes:
        if mode == "graph":
            columns["graph"] = lambda key: time_text(report.median(key._replace(mode="graph")))
        else:
            title = "of floor" if modes == ["step"] else f"{mode} %"
            columns[title] = lambda key, mode=mode: _number(report.fraction(key._replace(mode=mode)), ".0%")
    if memory := report.memory():
        columns["MB"] = lambda key: f"{memory[key] / 1e6:,.0f}" if key in memory else "-"
    columns["F.ce/ours"] = lambda key: _number(report.ratio(key, key._replace(loss="cross_entropy", by="eager")), ".2f")
    for by in dict.fromkeys(key.by for key in keys if key.by in PEERS):
        columns[f"{by}/ours"] = lambda key, by=by: _number(report.ratio(key, key._replace(by=by)), ".2f")
        if report.processes > 1:
            columns[f"{by} least"] = lambda key, by=by: _number(
                min(report.ratios(key, key._replace(by=by)), default=None), ".2f"
            )
    return columns


def text(report: Report) -> str:
    """The tables for a terminal."""
    header, columns = report.header, _columns(report)
    widths = {title: max(12, len(title) + 2) for title in columns}
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items() if version)
    commit = (header["commit"] or "no commit")[:10] + (" with changes" if header["uncommitted_changes"] else "")
    isa = f" ({header['isa']})" if "cpu" in header["backends"] else ""
    where = f"{header['device']}, {header['threads']} threads, {' and '.join(header['backends']) or 'no backend'}{isa}"
    stolen = max((run.load.stolen for run in report.runs), default=0.0)
    lines = [f"{where}; {versions}; {commit}; {header['date']}"]
    lines.append(
        "A step is a loss and its backward(). Its floor is a copy of as many bytes, or a linear head's three products."
    )
    lines.append(f"Medians of {report.processes} processes; {stolen:.2f} CPUs went to other machines.")
    lines += [f"WARNING: {caveat}" for caveat in report.caveats()]
    for problem in report.problems():
        floors = {by: report.median(Key(problem, "-", "step", by)) for by in ("clone", "products")}
        copy = report.copy(problem)
        floors = {"copy": copy, **floors}
        if problem.features:
            floors.pop("copy")  # nobody copies the logits
        said = ", ".join(f"{by} {time_text(time)}" for by, time in floors.items() if time)
        rate = f"copy {2e-9 * problem.nbytes / copy:.1f} GB/s"
        lines += ["", f"{problem}  (logits {problem.nbytes / 1e6:.2f} MB; {said}; {rate})"]
        lines.append(f"  {'loss':<14}{'by':<14}" + "".join(f"{title:>{widths[title]}}" for title in columns))
        for loss, by in report.own(problem):
            key = Key(problem, loss, "step", by)
            cells = "".join(f"{cell(key):>{widths[title]}}" for title, cell in columns.items())
            lines.append(f"  {loss:<14}{by:<14}{cells}")
    outcomes = check(report)
    valid = " (not valid: see the WARNING above)" if report.caveats() else ""
    if outcomes:
        lines += ["", f"Targets: {sum(one.reached for one in outcomes)} of {len(outcomes)} reached{valid}"]
    missed = sorted((one for one in outcomes if not one.reached), key=lambda one: -one.missed_by)
    lines += [f"  {one}" for one in missed]
    lines += [f"FAILED: {what}" for what in report.failures()]
    lines += [f"skipped, no time: {what}" for what in report.skipped()]
    return "\n".join(lines)


# ---- files -----------------------------------------------------------------------------------------------------------


def _key_json(key: Key) -> dict[str, Any]:
    return {**key.problem._asdict(), "loss": key.loss, "mode": key.mode, "by": key.by}


def as_json(report: Report) -> dict[str, Any]:
    """Everything, for other programs; of each process its own."""

    def timings(key: Key) -> list[dict[str, Any]]:
        return [run.timings[key]._asdict() for run in report.runs if key in run.timings]

    return {
        "schema": 3,
        **report.header,
        "caveats": report.caveats(),
        "processes": [run.load._asdict() for run in report.runs],
        "copies": [
            {**one._asdict(), "gb_s": [run.bandwidth[one] / 1e9 for run in report.runs if one in run.bandwidth]}
            for one in report.problems()
        ],
        "timings": [
            {**_key_json(key), "of_copy": report.fraction(key), "processes": timings(key)} for key in report.measured()
        ],
        "memory": [{**_key_json(key), "bytes": size} for run in report.runs for key, size in run.memory.items()],
        "apart": [{**_key_json(key), "relative": value} for run in report.runs for key, value in run.apart.items()],
        "targets": [{**one._asdict(), "reached": one.reached} for one in check(report)],
        "failures": report.failures(),
        "skipped": report.skipped(),
    }


def _problem(line: dict[str, Any]) -> Problem:
    return Problem(tuple(line["shape"]), line["dtype"], line["features"])


def _key(line: dict[str, Any]) -> Key:
    by = "linear" if line["by"] == "head" else line["by"]  # as older files have it
    return Key(_problem(line), line["loss"], line["mode"], by)


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


def write_json(content: dict[str, Any], folder: Path, prefix: str = "") -> Path:
    """What begins with a header: whole or not at all, for a run may be stopped at any time."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", content["device"].lower()).strip("-")
    path = folder / f"{prefix}{device}-{content['date'][:19].replace(':', '')}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
    return path
