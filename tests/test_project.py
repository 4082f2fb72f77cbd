"""What the project says of itself in several places, it says alike."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

import mlkernels

ROOT = Path(__file__).parents[1]
SOURCES = ("mlkernels", "csrc", "bench", "tools", "tests", "docs", "examples")  # not copies, in build/


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
    # What the package index shows are the Pythons that it tries.
    tried = set(re.findall(r'"(3\.\d+)"', workflow))
    assert set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)) == tried
    # And the one that the Makefile installs.
    assert found(r"^TORCH := torch==(.+)$", read("Makefile")) in workflow


@pytest.mark.parametrize(
    "page", sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", read(page)):
        assert ((ROOT / page).parent / link).exists(), link


def test_links_out_are_addresses():
    """Whether somebody answers there is for docs/releasing.md to ask."""
    text = "\n".join(
        read(str(p)) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("mlkernels/**/*.py")]
    )
    links = set(re.findall(r"\b\w+://[^\s)>\"`']+", text))
    assert len(links) > 20
    for link in links:
        assert re.fullmatch(r"https://[\w-]+(\.[\w-]+)+(/[\w.~/-]*)?", link), link
        if "arxiv" in link:  # the year and the month of its number
            assert re.fullmatch(r"https://arxiv\.org/abs/\d\d(0[1-9]|1[0-2])\.\d{4,5}", link), link


def test_the_conda_recipe_asks_for_what_the_project_does():
    yaml = pytest.importorskip("yaml")
    recipe = yaml.safe_load(found(r"```yaml\n((?s:.*?))```", read("docs/releasing.md")))
    project = read("pyproject.toml")
    assert recipe["context"]["version"] == mlkernels.__version__
    assert recipe["package"]["name"] == found(r'^name = "([^"]+)"', project)
    assert recipe["about"]["license"] == found(r'^license = "([^"]+)"', project)
    assert recipe["about"]["summary"] == found(r'^description = "([^"]+)"', project)
    torch = found(r'"torch(>=[\d.]+)"', project)
    assert recipe["requirements"]["run"] == [
        f'python {found(r"""requires-python = "([^"]+)""", project)}', "numpy", f"pytorch {torch}"
    ]  # fmt: skip
    built_with = {one.replace(" ", "") for one in recipe["requirements"]["host"]}
    assert {*re.findall(r'"([^"]+)"', found(r"^requires = \[(.*?)\]", project)), f"pytorch{torch}"} <= built_with


def test_the_map_has_every_file():
    page = read("docs/architecture.md")
    for path in [*ROOT.glob("mlkernels/**/*.py"), *ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/*.h")]:
        if path.stem not in ("__init__", "__main__"):
            assert path.name in page, path
    for name in re.findall(r"`([\w/]+\.(?:py|h|cpp|cu))`", page):
        assert (ROOT / name).exists() or any(True for at in SOURCES for _ in (ROOT / at).glob(f"**/{name}")), name


def imported_at_import(path: Path) -> set[str]:
    """The modules of the package that a module imports when it is imported itself: not in functions, not for types."""
    package = ("mlkernels", *path.relative_to(ROOT / "mlkernels").parent.parts)
    found, todo = set(), [*ast.parse(path.read_text()).body]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            names = [(*base, alias.name) for alias in node.names] + [base] * (node.module is not None)
            found |= {".".join(filter(None, name)) for name in names}
        elif isinstance(node, (ast.Try, ast.If)) and "TYPE_CHECKING" not in ast.unparse(getattr(node, "test", node)):
            todo += [*node.body, *node.orelse]
    return found


def test_no_import_circle():
    """An arrow goes one way; a package's own __init__ says what it offers, and counts as the modules that it names."""
    paths = {
        p.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): p for p in ROOT.glob("mlkernels/**/*.py")
    }
    modules = {name.removesuffix(".__init__"): imported_at_import(path) for name, path in paths.items()}
    graph = {name: (found & modules.keys()) - {name} for name, found in modules.items() if name != "mlkernels"}
    order = [*graphlib.TopologicalSorter(graph).static_order()]
    assert order.index("mlkernels.numbering") < order.index("mlkernels.call") < order.index("mlkernels.softmax")
    assert order.index("mlkernels.softmax") < order.index("mlkernels.functional") < order.index("mlkernels.modules")
