"""The example trains, on real images, with every loss; and says what is wrong with a command line."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts import check_picture, command, script

import mlkernels

pytestmark = pytest.mark.usefixtures("threads_put_back")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return script("train_images")


def test_every_loss_learns_digits(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--loss", "all", "--epochs", "3", "--batch", "32", "--limit", "640", "--threads", "1"]
    runs = example.main([*options, "--out", str(tmp_path)])
    assert [run.loss for run in runs] == list(example.LOSSES)
    for run in runs:
        # Chance is 10 %. Three epochs are 60 steps.
        assert run.final["accuracy"] > 0.9, f"{run.loss}: {run.final}"
        assert run.train_loss[-1] < run.train_loss[0], run.loss
        assert run.final["accuracy"] <= run.final["top_3"]
        assert run.final["accuracy"] <= run.final["close_enough_0.1"]
        assert run.final["macro_f1"] > 0.88
        assert run.final["nmi"] > 0.8
        assert all(0 < share < 1 for share in run.loss_share), run.loss
    record = json.loads((tmp_path / "train_images.json").read_text())
    assert record["options"]["epochs"] == 3
    assert record["options"]["seed"] == 0
    assert [run["final"] for run in record["runs"]] == [run.final for run in runs]
    assert all(len(run["train_loss"]) == 3 for run in record["runs"])
    check_picture(tmp_path / "train_images.png", 600)
    shown = capsys.readouterr().out
    assert shown.count("\nsphereface") == 4  # three epochs and the comparison
    assert str(tmp_path / "train_images.png") in shown


def test_runs_repeat(example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "plot", lambda *_: None)  # the slow part

    def run(*more: str) -> tuple[list[float], dict[str, float]]:
        options = ["--loss", "two_scale", "--epochs", "1", "--threads", "1", "--limit", "320", "--out", str(tmp_path)]
        (result,) = example.main([*options, *more])
        return result.train_loss, result.final

    assert run() == run()
    assert run() != run("--seed", "1")


def test_two_scale_trains_its_scales(example: ModuleType) -> None:
    torch.manual_seed(0)
    images = torch.randn(8, 1, 8, 8)
    network = example.Network(images, 10, "linear")
    objective = example.TwoScale(network, None)
    features, output = network(images)
    objective(network, features, output, torch.arange(8)).backward()
    assert [name for name, _ in objective.named_parameters()] == ["loss.scale_low", "loss.scale_high"]
    assert objective.loss.scale_low.grad != 0
    log_p = objective.log_probabilities(network, output)
    # R is still R at the start, and R1 = R: plain probabilities.
    torch.testing.assert_close(log_p, output.log_softmax(1))


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (5, 9), (1, 1)])
def test_network_takes_any_size(example: ModuleType, size: tuple[int, int]) -> None:
    features, output = example.Network(torch.zeros(2, 1, *size), 7, "cosine")(torch.randn(2, 1, *size))
    assert features.shape == (2, example.FEATURES)
    assert output.shape == (2, 7)
    assert output.abs().max() <= 1 + 1e-6


def test_backend_that_is_not_here(
    example: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlkernels, "available_backends", lambda: {"reference": None, "cuda": "no GPU was found"})
    with pytest.raises(SystemExit):
        example.main(["--backend", "cuda"])
    assert "--backend: cuda cannot be used here: no GPU was found" in capsys.readouterr().err


def test_divergence_is_said(example: ModuleType, tmp_path: Path) -> None:
    options = ["--loss", "cross_entropy", "--epochs", "2", "--lr", "1e30", "--limit", "256", "--threads", "1"]
    with pytest.raises(SystemExit, match="cross_entropy: the training loss is nan in epoch 1: try a lower --lr"):
        example.main([*options, "--out", str(tmp_path)])


def test_as_a_command(tmp_path: Path) -> None:
    """A process of its own, on idx files, with the reference backend."""
    from mlkernels import data

    images = data.digits(normalize=False)
    for part, pixels, labels in (
        ("train", images.train_images, images.train_labels),
        ("t10k", images.test_images, images.test_labels),
    ):
        sizes = struct.pack(">3I", len(labels), 8, 8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(
            bytes([0, 0, 8, 3]) + sizes + bytes(pixels.flatten().tolist())
        )
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + sizes[:4] + bytes(labels.tolist()))
    out = tmp_path / "out" / "deep"
    options = ["--data", tmp_path, "--loss", "focal", "--epochs", "2", "--batch", "32", "--threads", "1", "--out", out]
    done = command("train_images", "--backend", "reference", *map(str, options))
    assert "Images(train=1347, test=450, size=8x8, classes=10" in done.stdout
    assert "batch/s" not in done.stderr  # no bar where nobody watches
    (run,) = json.loads((out / "train_images.json").read_text())["runs"]
    assert run["final"]["accuracy"] > 0.9
