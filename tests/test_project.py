"""What the project says of itself in several places, it says alike."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mlkernels

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    assert match, pattern
    return match[1]


def test_one_version():
    version = mlkernels.__version__
    assert found(r"^version: (.+)$", read("CITATION.cff")) == version
    assert found(r"^## \[(\d[^\]]*)\]", read("CHANGELOG.md")) == version


def test_ci_tries_the_oldest_that_is_promised():
    project, workflow = read("pyproject.toml"), read(".github/workflows/ci.yml")
    python, torch = found(r'requires-python = ">=([\d.]+)"', project), found(r'"torch>=([\d.]+)"', project)
    assert re.search(rf'python: "{python}", torch: "{torch}\.0"', workflow)
    # And the one that the Makefile installs.
    assert found(r"^TORCH := torch==(.+)$", read("Makefile")) in workflow


@pytest.mark.parametrize(
    "page", sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", read(page)):
        assert ((ROOT / page).parent / link).exists(), link


def test_the_map_has_every_file():
    page = read("docs/architecture.md")
    for path in [*ROOT.glob("mlkernels/**/*.py"), *ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/*.h")]:
        if path.stem not in ("__init__", "__main__"):
            assert path.name in page, path
    for name in re.findall(r"`([\w/]+\.(?:py|h|cpp|cu))`", page):
        assert list(ROOT.glob(f"*/**/{name}")) or (ROOT / name).exists(), name
