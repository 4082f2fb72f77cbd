"""Every example in the package's docstrings, and every block of code in the docs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import mlkernels

ROOT = Path(__file__).parent.parent
# Modules that are scripts, or that need a device to be imported, and libraries that are no modules.
SKIPPED = re.compile(r"\.__main__$|\.triton\b|\._cpu$|\._cuda$")


def module_names():
    found = (module.name for module in pkgutil.walk_packages(mlkernels.__path__, "mlkernels."))
    return [
        "mlkernels",
        *(name for name in found if not SKIPPED.search(name)),
    ]


@pytest.mark.parametrize("name", module_names())
def test_docstrings(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_there_are_examples():
    assert sum(doctest.testmod(importlib.import_module(name)).attempted for name in module_names()) > 60


@pytest.mark.parametrize(
    "page, fewest", [("losses.md", 11), ("schedules.md", 7), ("distributed.md", 5), ("heads.md", 5)]
)
def test_pages(page, fewest):
    """The blocks of one page build on each other, from top to bottom."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= fewest
    scope = {}
    for block in blocks:
        exec(compile(block, f"docs/{page}", "exec"), scope)
