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


PAGES = {
    page.relative_to(ROOT): re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if page.name != "migrating.md"  # section by section in test_migrating.py, with the libraries that are installed
}


@pytest.mark.parametrize("page", [page for page, blocks in PAGES.items() if blocks], ids=str)
def test_pages(page, tmp_path, monkeypatch):
    """The blocks of one page build on each other, from top to bottom."""
    monkeypatch.chdir(tmp_path)
    scope = {}
    for block in PAGES[page]:
        exec(compile(block, str(page), "exec"), scope)


def test_the_guide_has_blocks_to_run():
    for name in ("losses", "schedules", "distributed", "heads", "loss-search"):
        assert len(PAGES[Path("docs", f"{name}.md")]) >= 3, name
