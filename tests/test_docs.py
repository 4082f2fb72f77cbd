"""The site and README: every public name has its place, pictures and figures are what the library and the JSON give."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mlkernels
from bench import errors, page

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
REFERENCE = "\n".join(one.read_text() for one in sorted(DOCS.glob("api/*.md")))


@pytest.mark.parametrize(
    "module", ["mlkernels", *(f"mlkernels.{name}" for name in ("metrics", "distributed", "schedule", "search"))]
)
def test_every_public_name_is_in_the_reference(module):
    for name in importlib.import_module(module).__all__:
        assert re.search(rf"\b{re.escape(module)}\.{name}\b", REFERENCE), name


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def curves():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("docs_curves", DOCS / "_ext" / "curves.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_curve_is_shown(curves):
    shown = re.findall(r"<!-- curve: (\w+) -->", (DOCS / "losses.md").read_text())
    assert sorted(shown) == sorted(curves.CURVES)


def test_what_is_drawn_on_the_right_is_the_slope_of_the_left(curves):
    for name, one in curves.CURVES.items():
        x = one.points
        if x is curves._p:
            x = x.logit()
        elif x is curves._angle:
            x = torch.deg2rad(x).cos()
        for label, loss in one.losses.items():
            value, slope = one.of(loss)
            found = (value[2:] - value[:-2]) / (x[2:] - x[:-2])
            if one.points is curves._p:  # w = -dL/d log p, and d log p / d logit is 1 - p
                found = -found / (1 - one.points[1:-1])
            elif one.gradient != "dL/dx":
                found = -found
            # But at the kinks, and where a difference of floats has no digits.
            near = (found - slope[1:-1]).abs() <= 0.03 * slope.abs().max()
            assert near.double().mean() > 0.93, (name, label)


def test_a_picture_takes_the_color_of_the_page(curves):
    svg = curves.inline(curves.figure("focal"), "two panels")
    assert svg.startswith('<figure class="curve" role="img" aria-label="two panels"><svg ')
    assert "currentColor" in svg and curves.INK not in svg and not re.search(r"<svg [^>]*\bwidth=", svg)


# ---- figures ---------------------------------------------------------------------------------------------------------


def test_benchmarks_are_those_of_the_json():
    assert (DOCS / "benchmarks.md").read_text() == page.page(), "python -m bench.page"


def test_readme_measured_what_the_page_has():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 150
    measured = readme.split("## Measured")[1].split("\n## ")[0]
    lines = [line for line in measured.splitlines() if line.startswith("|")]
    assert len(lines) > 8
    assert set(lines) <= set((DOCS / "benchmarks.md").read_text().splitlines())


def test_errors_are_as_small_as_the_page_says():
    for name in errors.LOSSES:
        for rest, ours, eager in errors.errors(name, torch.float32):
            if rest > 1e-7:  # beyond, float32 itself ends
                assert max(ours) < 1e-6, (name, rest, ours)
            if rest < 1e-4:
                assert min(eager) > 1e-3, (name, rest, eager)


def test_weights_of_the_readings_of_a_lost_formula():
    """docs/losses.md's table of w = -dL/dl, to the digits that it gives."""
    table = [
        line for line in (DOCS / "losses.md").read_text().splitlines() if line.startswith("| ") and "w(.01)" in line
    ]
    lines = (DOCS / "losses.md").read_text().split(table[0] + "\n")[1].split("\n\n")[0].splitlines()[1:]
    p = torch.tensor([float(one) for one in re.findall(r"w\(([.\d]+)\)", table[0])], dtype=torch.float64)
    for line in lines:
        reading, *given = [cell.strip(" *") for cell in line.strip("|").split("|")]
        numbers = re.match(r"\((.*?)\)", reading)[1].replace("·", "1").replace("1/.7", str(1 / 0.7)).split(", ")
        alpha, beta, gamma, kappa = map(float, numbers)
        logits = torch.stack([p.log(), (1 - p).log()], 1).requires_grad_()
        target = torch.zeros(len(p), dtype=torch.long)
        loss = mlkernels.modulated_cross_entropy(
            logits, target, alpha=alpha, beta=beta, gamma=gamma, kappa=kappa, reduction="sum"
        )
        loss.backward()
        found = (-logits.grad[:, 0] / (1 - p)).tolist()  # dl/df_y = 1 - p
        for w, shown in zip(found, given, strict=True):
            digits = len(shown.split("e")[0].replace(".", "").lstrip("0"))
            assert abs(w / float(shown) - 1) <= 0.51 * 10.0 ** (1 - digits) * (1 if shown != "1" else 1e-9), (
                reading,
                w,
                shown,
            )


# ---- the site --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    any(importlib.util.find_spec(one) is None for one in ("sphinx", "furo", "myst_parser", "math_core", "matplotlib")),
    reason="the site's tools are not installed: the extra docs",
)
def test_the_site_builds(tmp_path):
    """Without a warning, and nothing on a page comes from elsewhere."""
    line = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "trees"]
    done = subprocess.run([*line, DOCS, tmp_path / "site"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for one in (tmp_path / "site").rglob("*.html"):
        fetched = re.findall(r'<(?:link|script|img|iframe)\b[^>]*(?:src|href)="([^"]+)"', one.read_text())
        assert not [url for url in fetched if url.startswith(("http:", "https:", "//"))], one
