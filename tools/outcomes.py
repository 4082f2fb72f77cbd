"""What became of every test, kept as it goes, so that a run that is cut off has lost nothing; and counts by file.

    python -m pytest -p tools.outcomes --outcomes=FILE ...             writes FILE anew
    python -m pytest -p tools.outcomes --outcomes=FILE --resume ...    adds to FILE, without what has an end there
    python -m tools.outcomes FILE                                      the counts

``make test-versions`` uses it.
"""

from __future__ import annotations

import platform
import sys
from collections import Counter, defaultdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

DONE = ("passed", "skipped")
ENDS = (*DONE, "failed", "error")


def versions() -> str:
    """Of what decides how a test ends."""
    there = {name: metadata.version(name) for name in ("torch", "triton", "numpy") if find_spec(name)}
    return ", ".join(f"{name} {version}" for name, version in {"Python": platform.python_version(), **there}.items())


def read(path: Path) -> dict[str, str]:
    """How each test ended; of several runs, in the last."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        end, _, name = line.partition(" ")
        if end in ENDS and "::" in name:
            found[name] = end
    return found


def table(ends: dict[str, str]) -> list[str]:
    """Counts by file, and of all."""
    files: dict[str, Counter[str]] = defaultdict(Counter)
    for name, end in ends.items():
        files[name.split("::")[0]][end] += 1
    rows = [*sorted(files.items()), (f"{len(files)} files", sum(files.values(), Counter()))]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}" + "".join(f"{count[end]:>7} {end}" for end in ENDS) for name, count in rows]


class Recorder:
    """Writes, in the process that xdist's workers report to."""

    def __init__(self, path: Path, earlier: dict[str, str]) -> None:
        self.path, self.earlier = path, earlier
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a" if earlier else "w", buffering=1)
        print(f"# {versions()}", file=self.file)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["earlier"] = self.earlier  # a worker that replaces another has to collect the same

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One line for a test, and another for what goes wrong in tearing it down."""
        if report.when not in ("setup", "teardown"):  # also that of a worker that died
            print(report.outcome, report.nodeid, file=self.file)
        elif not report.passed:
            print("error" if report.failed else report.outcome, report.nodeid, file=self.file)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section(f"{self.path}: {versions()}")
        terminalreporter.write_line("\n".join(table(read(self.path))))


class Resumer:
    def __init__(self, earlier: dict[str, str]) -> None:
        self.done = {name for name, end in earlier.items() if end in DONE}

    @pytest.hookimpl(trylast=True)  # conftest.py draws some of all
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.done])
        items[:] = [item for item in items if item.nodeid not in self.done]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("outcomes")
    group.addoption("--outcomes", metavar="FILE", help="write what became of every test, as it goes")
    group.addoption("--resume", action="store_true", help="leave out what passed or was skipped, by that file")


def pytest_configure(config: pytest.Config) -> None:
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        earlier = worker.get("earlier", {})
    elif config.getoption("outcomes"):
        path = config.invocation_params.dir / config.getoption("outcomes")
        earlier = read(path) if config.getoption("resume") else {}
        config.pluginmanager.register(Recorder(path, earlier))
    else:
        return
    config.pluginmanager.register(Resumer(earlier))


if __name__ == "__main__":
    print("\n".join(table(read(Path(sys.argv[1])))))
