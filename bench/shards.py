"""``python -m bench.shards SECONDS [PYTEST ARGUMENTS]``: pytest in as many processes as there are CPUs, for so long.

Tests of Triton's kernels spend their time compiling them, seconds for each, and a process compiles on one CPU. Every
process collects the same tests and takes the next that none has taken: each test function in turn, so that each has run
where the time does not suffice for all. One whose device is broken ends, for an illegal access fails whatever comes
after it, and another takes its place.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import pytest

FOLDER = "MLKERNELS_SHARDS"  # where the processes meet: what is taken, and what came out
PROCESSES = 15
SHOWN = 12  # failures at length; of the others a line
LINES = 30  # of a failure
BROKEN = 86  # exit status


# ---- one of the processes, a plugin of its pytest --------------------------------------------------------------------


def in_turn(names: Sequence[str]) -> list[int]:
    """Where these tests are in an order in which no function comes again before every other has come."""
    before: Counter[str] = Counter()
    order = []
    for index, name in enumerate(names):
        function = name.split("[")[0]
        order.append((before[function], index))
        before[function] += 1
    return [index for _, index in sorted(order)]


def device_is_broken() -> bool:
    """Whether a kernel went wrong after which nothing works."""
    torch = sys.modules.get("torch")  # not imported for this alone: it takes seconds
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class Worker:
    """Takes tests and writes down what came of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.results = (folder / f"{os.getpid()}.jsonl").open("a", buffering=1)

    def write(self, **what: Any) -> None:
        self.results.write(json.dumps(what) + "\n")

    def takes(self, test: str) -> bool:
        """Whether none had taken it."""
        try:
            (self.folder / hashlib.sha1(test.encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed:
            return None  # not collected: pytest says so
        self.write(collected=len(session.items))
        for index in in_turn([item.nodeid for item in session.items]):
            item = session.items[index]
            if not self.takes(item.nodeid):
                continue
            self.write(test=item.nodeid, outcome="started")
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            if device_is_broken():
                self.write(test=item.nodeid, outcome="failed", text="the device is broken after it")
                os._exit(BROKEN)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        text = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext
        self.write(test=report.nodeid, outcome=report.outcome, text=text, seconds=report.duration)


def pytest_configure(config: pytest.Config) -> None:
    """pytest calls this where the module is one of its plugins."""
    if FOLDER in os.environ:
        config.pluginmanager.register(Worker(Path(os.environ[FOLDER])))


# ---- all of them -----------------------------------------------------------------------------------------------------


def results(folder: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """How many tests there are, and the last or worst that was written of each."""
    count, found = 0, {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # cut off with its process
                one = json.loads(line)
                count = max(count, one.get("collected", 0))
                if "test" in one and found.get(one["test"], {}).get("outcome") != "failed":
                    found[one["test"]] = one
    return count, found


def summary(count: int, found: dict[str, dict[str, Any]], seconds: float) -> Iterator[str]:
    """Failures, reasons of those that were skipped, the slowest, and one line for all."""
    failed = {test: one["text"] for test, one in found.items() if one["outcome"] == "failed"}
    for index, (test, text) in enumerate(failed.items()):
        lines = text.strip().splitlines() or [""]
        errors = [line for line in lines if line.startswith("E ")] or lines[-1:]
        yield f"FAILED {test}: {errors[0].removeprefix('E').strip()[:200]}"
        if index < SHOWN:
            yield from (f"    {line}" for line in lines[-LINES:])
    reasons = Counter(one["text"].splitlines()[0] for one in found.values() if one["outcome"] == "skipped")
    yield from (f"skipped {number}: {reason}" for reason, number in reasons.most_common())
    slowest = sorted((one for one in found.values() if "seconds" in one), key=lambda one: -one["seconds"])[:5]
    yield from (f"{one['seconds']:6.1f} s  {one['test']}" for one in slowest)
    outcomes = Counter(one["outcome"] for one in found.values())
    said = [f"{outcomes[name]} {name}" for name in ("passed", "failed", "skipped") if outcomes[name]]
    if late := count - sum(outcomes[name] for name in ("passed", "failed", "skipped")):
        said.append(f"{late} of {count} not run: no time left")
    yield f"{', '.join(said) or 'no tests'} in {seconds:.0f} s"


def run(start: Callable[[], subprocess.Popen[bytes]], processes: int, folder: Path, deadline: float) -> None:
    """Until all have ended; one that a test ended is replaced, that test having failed."""
    running, spare = [start() for _ in range(processes)], 2 * processes
    try:
        while running and time.monotonic() < deadline:
            time.sleep(0.1)
            for process in [one for one in running if one.poll() is not None]:
                running.remove(process)
                path = folder / f"{process.pid}.jsonl"
                last = path.read_text().splitlines()[-1:] if path.exists() else []
                one = json.loads(last[0]) if last else {}
                if one.get("outcome") == "started":
                    one |= {"outcome": "failed", "text": f"its process ended with status {process.returncode}"}
                    with path.open("a") as file:
                        file.write(json.dumps(one) + "\n")
                elif process.returncode != BROKEN:
                    continue
                if spare:
                    spare -= 1
                    running.append(start())
    finally:
        for process in running:
            process.kill()
            process.wait()


def main(given: list[str] | None = None) -> int:
    """Runs them and prints what came out; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.shards", description="pytest in many processes.")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--processes", type=int, default=max(1, min(PROCESSES, (os.cpu_count() or 2) - 1)))
    options, arguments = parser.parse_known_args(given)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # torch.compile would start as many processes again in each.
        environment = {**os.environ, FOLDER: name, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
        # In the order of the files: which test a process takes is decided here.
        plugins = ["-p", "bench.shards", "-p", "no:cacheprovider", "-p", "no:randomly"]
        command = [sys.executable, "-m", "pytest", "-q", *plugins, *arguments]
        logs: list[TextIO] = []

        def start() -> subprocess.Popen[bytes]:
            logs.append((folder / f"{len(logs)}.log").open("w+"))
            return subprocess.Popen(command, env=environment, stdout=logs[-1], stderr=subprocess.STDOUT)

        run(start, options.processes, folder, begun + options.seconds)
        count, found = results(folder)
        if not count:
            logs[0].seek(0)
            print(logs[0].read()[-4000:])
        print("\n".join(summary(count, found, time.monotonic() - begun)))
        for log in logs:
            log.close()
    good = count > 0 and len(found) == count
    return 0 if good and all(one["outcome"] in ("passed", "skipped") for one in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
