"""A plugin for pytest on a GPU: ``python -m pytest -p bench.spread --seconds 60 -n 15 --maxschedchunk 1``.

So many seconds, then what came out is said; each test function in turn, so that each has run where the time does not
suffice for all. A process whose device is broken ends, for an illegal access fails whatever comes after it:
pytest-xdist says at which test, and starts another.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter

import pytest
from xdist.workermanage import NodeManager


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=0.0, help="the run is interrupted after so many")


def pytest_configure(config: pytest.Config) -> None:
    """The alarm is a Ctrl-C, which a process in the background would not hear."""
    if not hasattr(config, "workerinput"):
        NodeManager.EXIT_TIMEOUT = 2  # for a test that hangs
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, config.getoption("--seconds"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """No function comes again before every other has come."""
    before: Counter[str] = Counter()
    turns = {}
    for item in items:
        function = item.nodeid.split("[")[0]
        turns[item] = before[function]
        before[function] += 1
    items.sort(key=turns.__getitem__)


def pytest_runtest_teardown() -> None:
    """Not torch imported for this alone: it takes seconds."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"the device is broken: {error}", file=sys.__stderr__)
        os._exit(1)
