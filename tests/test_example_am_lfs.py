"""The comparison of AM-LFS with its baselines runs, repeats, and says what is wrong with a command line."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts import command, script

from mlkernels import data
from mlkernels.search import Record

pytestmark = pytest.mark.usefixtures("threads_put_back")

SMALL = ["--candidates", "8", "--pieces", "4", "--limit", "600", "--width", "32", "--threads", "1"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return script("am_lfs")


def test_comparison(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [*SMALL, "--noise", "20", "--seeds", "2", "--epochs", "6", "--lr", "0.02", "--batch", "32"]
    results = example.main([*options, "--out", str(tmp_path)])
    assert [result.method for result in results] == list(example.METHODS) * 2
    assert [(result.noise, result.seed) for result in results[::5]] == [(20, 0), (20, 1)]
    # Chance is 10 %.
    assert all(result.test > 0.6 for result in results), results
    content = json.loads((tmp_path / "am_lfs.json").read_text())
    assert [result["test"] for result in content["results"]] == [result.test for result in results]
    assert (tmp_path / "am_lfs_20.png").read_bytes()[:4] == b"\x89PNG"
    for seed, found in (("0", results[4]), ("1", results[9])):
        record = Record.from_json(json.dumps(content["records"]["20"][seed]))
        assert record.theta.shape == (6, 8, 4, 4)
        assert record.mu[-1].ne(record.mu[0]).all()
        assert found.held_out == pytest.approx(float(record.rewards[-1].max()))
    shown = capsys.readouterr().out
    assert "20 % noise" in shown
    for method in example.METHODS:
        assert sum(line.startswith(f"{method} ") and "±" in line for line in shown.splitlines()) == 1


def test_runs_repeat(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "plot", lambda *_: None)  # the slow part

    def run(*more: str) -> list[tuple[float, float]]:
        results = example.main([*SMALL, "--noise", "10", "--epochs", "2", "--out", str(tmp_path), *more])
        return [(result.held_out, result.test) for result in results]

    first = run()
    assert first == run()
    assert first != run("--seed", "1")
    assert first != run("--search", "tau")


def test_wrong_labels(example: ModuleType) -> None:
    options, images = example.parse(["--limit", "1000"])
    clean, noisy = (example.prepare(images, options, noise, 3) for noise in (0, 20))
    assert len(clean.train[1]) == 800
    assert len(clean.held_out[1]) == 200
    differ = clean.train[1] != noisy.train[1]
    assert int(differ.sum()) == 160, "each to another class"
    assert noisy.train[1][differ].unique().numel() == 10
    for one, other in zip(clean.held_out + clean.test, noisy.held_out + noisy.test, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(clean.train[0], noisy.train[0])
    pixels = {tuple(row) for row in clean.train[0].tolist()}
    assert not any(tuple(row) in pixels for row in clean.held_out[0].tolist()), "nothing rewarded was trained on"


def test_as_a_command(tmp_path: Path) -> None:
    """A process of its own."""
    options = [*SMALL, "--noise", "0", "--epochs", "1", "--population", "1", "--out", str(tmp_path / "deep" / "out")]
    done = command("am_lfs", *options)
    assert repr(data.digits()) in done.stdout
    assert "candidate/s" not in done.stderr  # no bar where nobody watches
    assert (tmp_path / "deep" / "out" / "am_lfs.json").exists()
