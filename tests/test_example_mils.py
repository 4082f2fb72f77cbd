"""The example of MILS compares on real images, repeats, and says what is wrong with a command line."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from scripts import script

pytestmark = pytest.mark.usefixtures("threads_put_back")

SMALL = ["--seeds", "2", "--epochs", "2", "--limit", "640", "--batch", "32", "--participation", "0.3"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return script("mils")


def test_compares_on_digits(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = example.main([*SMALL, "--out", str(tmp_path)])
    assert [(run.seed, run.method) for run in runs] == [(s, m) for s in (0, 1) for m in example.METHODS]
    for run in runs:
        assert run.test_error[-1] < 0.2, run  # chance is 0.9
        assert len(run.attempts) == len(run.acceptances) == 2
        tried = sum(run.attempts)
        if run.method in ("primary", "auxiliary"):
            assert tried == 0
        else:
            assert 3 < tried < 25, run  # of 40 steps
            assert (sum(run.acceptances) == tried) == (run.method == "undecided")
    curves = {method: [run.test_error for run in runs if run.method == method] for method in example.METHODS}
    assert len({str(curve) for curve in curves.values()}) == 4
    shown = capsys.readouterr().out
    assert "sums over 2 seeds" in shown and shown.count("\nscheduled ") == 1 and "±" in shown
    record = json.loads((tmp_path / "mils.json").read_text())
    assert [run["test_error"] for run in record["runs"]] == [run.test_error for run in runs]
    assert (tmp_path / "mils.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_runs_repeat_and_no_attempt_is_plain(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "plot", lambda *_: None)  # the slow part
    monkeypatch.setattr(example, "METHODS", ("primary", "scheduled"))

    def errors(*more: str) -> list[list[float]]:
        runs = example.main([*SMALL, "--seeds", "1", "--out", str(tmp_path), *more])
        return [run.test_error for run in runs]

    assert errors() == errors()
    primary, scheduled = errors("--participation", "0")
    assert primary == scheduled


def test_divergence_is_said(example: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="primary: the logits are not finite after epoch 1: try a lower --lr"):
        example.main([*SMALL, "--lr", "1e38", "--out", str(tmp_path)])
