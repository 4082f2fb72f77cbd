"""The scripts that compare methods over seeds: they learn, repeat, record, and say what a command line lacks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from scripts import check_picture, script

import mlkernels

pytestmark = pytest.mark.usefixtures("threads_put_back")

NAMES = ("two_scale", "modulated", "margins")


def check_written(out: Path, name: str, runs: int) -> dict:
    check_picture(out / f"{name}.png", 300)
    record = json.loads((out / f"{name}.json").read_text())
    assert len(record["runs"]) == runs
    assert record["options"]["out"] == str(out)
    assert record["torch"] == torch.__version__
    assert record["images"].startswith("Images(train=")
    return record


# ---- two scales ------------------------------------------------------------------------------------------------------


def test_two_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The order that the paper reports: two scales learn faster than one, the less so the larger eta is."""
    runs = script("two_scale").main(["--seeds", "2", "--steps", "200", "--eta", "0.01,1", "--out", str(tmp_path)])
    record = check_written(tmp_path, "two_scale", 2 * 7)
    methods = ["cross entropy", "R2 := R1", "eta = 0.01", "eta = 1", "relative", "fixed", "separation"]
    assert [run.method for run in runs[::2]] == methods
    accuracy = {method: [r.final["test accuracy"] for r in runs if r.method == method] for method in methods}
    mean = {method: sum(values) / 2 for method, values in accuracy.items()}
    assert mean["eta = 0.01"] > mean["eta = 1"] > mean["R2 := R1"] > 0.7
    assert mean["eta = 0.01"] > mean["R2 := R1"] + 0.05
    assert min(mean.values()) > 0.7
    for run in runs:
        assert run.step == list(range(10, 201, 10))
        assert run.final["test accuracy"] == run.test_accuracy[-1]
        assert run.close_enough[0] == pytest.approx(run.final["test accuracy"], abs=0.005)  # a = 0: but for ties
        assert run.close_enough == sorted(run.close_enough)
        assert run.close_enough[-1] == 1.0
        assert run.final["close .1"] == run.close_enough[2]
    ends = {run.method: (run.low[-1], run.high[-1]) for run in runs}
    assert ends["cross entropy"] == (1.0, 1.0)
    assert ends["R2 := R1"][0] == ends["R2 := R1"][1] < 1
    assert ends["separation"][0] == 1.0
    assert ends["separation"][1] > 10
    assert ends["fixed"][1] == pytest.approx(10 * ends["fixed"][0])
    assert ends["eta = 0.01"][1] != pytest.approx(10 * ends["eta = 0.01"][0], rel=1e-6)
    assert record["options"]["eta"] == [0.01, 1.0]
    shown = capsys.readouterr().out
    assert f"{mean['relative']:.4f} ± " in shown


def test_two_scale_baseline_has_one_scale() -> None:
    """By the formula: cross entropy at R1/R, the gradient of R2 being none."""
    two_scale = script("two_scale")
    network = torch.nn.Sequential(torch.nn.Linear(4, 5, bias=False), torch.nn.ReLU(), torch.nn.Linear(5, 3, bias=False))
    loss = two_scale.methods([0.01])["R2 := R1"](network)
    with torch.no_grad():
        network[0].weight.mul_(2.0)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    value = loss(network(x), y, network)
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(network(x) / 2, y))
    value.backward()
    assert loss.scale_high.grad == 0
    assert two_scale.scales(loss, network) == (pytest.approx(0.5), pytest.approx(0.5))


# ---- modulated cross entropy -----------------------------------------------------------------------------------------


def test_modulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modulated = script("modulated")
    options = ["--seeds", "2", "--steps", "60", "--beta", "2,4", "--gamma", "3,5", "--lr", "3e-3"]
    runs = modulated.main([*options, "--out", str(tmp_path)])
    record = check_written(tmp_path, "modulated", 2 * 5)
    names = ["cross entropy", "focal, gamma = 2", "beta = 2, gamma = 3", "beta = 4, gamma = 3"]
    assert [run.loss for run in runs[::2]] == [*names, f"beta = {record['beta']:g}, gamma = 5"]
    for run in runs:
        assert run.test_accuracy > 0.85, run
        assert run.test_f1 > 0.85
        assert run.test_nmi > 0.75
        assert run.validation_f1 > 0.7
    # What the loss is for: rows that are well classified weigh less.
    share = {name: sum(r.easy_weight for r in runs if r.loss == name) for name in names}
    assert share["beta = 2, gamma = 3"] < share["beta = 4, gamma = 3"] < share["cross entropy"]

    scores = {2.0: 0.0, 4.0: 0.0}
    for run in runs[4:8]:
        scores[run.beta] += run.validation_f1 + run.validation_nmi
    assert record["beta"] == max(scores, key=lambda beta: scores[beta]), "chosen on the images held out"
    shown = capsys.readouterr().out
    assert f"chosen on the images held out: beta = {record['beta']:g}, gamma = {record['gamma']:g}" in shown


def test_images_held_out_are_not_trained_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    modulated = script("modulated")
    seen = []

    def watched(images: torch.Tensor, labels: torch.Tensor, size: int, seed: int) -> Iterator[tuple]:
        seen.append(images)
        return endless(images, labels, size, seed)

    endless = modulated.common.endless
    monkeypatch.setattr(modulated.common, "endless", watched)
    monkeypatch.setattr(modulated, "plot", lambda *_: modulated.plt.figure())
    options = ["--seeds", "1", "--steps", "1", "--beta", "2", "--gamma", "3", "--limit", "200"]
    modulated.main([*options, "--out", str(tmp_path)])
    assert [len(images) for images in seen] == [180] * 3
    assert all(torch.equal(seen[0], images) for images in seen), "the same for every loss"


def test_weight_of_a_row() -> None:
    """The formula of the modulated loss's docs, times cross entropy's gradient."""
    modulated = script("modulated")
    p = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    rows, target = torch.stack([p.log(), (1 - p).log()], 1), torch.zeros(3, dtype=torch.long)
    found = modulated.weight_of(mlkernels.ModulatedCrossEntropyLoss(beta=4.0, gamma=5.0, reduction="sum"), rows, target)
    weights = torch.tensor([1.004, 1.394, 0.0241], dtype=torch.float64)
    torch.testing.assert_close(found, weights * math.sqrt(2) * (1 - p), rtol=1e-2, atol=0)


# ---- margins ---------------------------------------------------------------------------------------------------------


def test_margins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    margins = script("margins")
    runs = margins.main(["--steps", "250", "--batch", "32", "--out", str(tmp_path)])
    record = check_written(tmp_path, "margins", 6)
    assert [run.loss for run in runs] == ["softmax", "sphereface", "cosface", "arcface", "center", "lgm"]
    for run in runs:
        assert run.accuracy > 0.8, run
        assert 0 < run.within < 20
        assert 0 < run.between <= 36  # ten classes
    by_name = {run.loss: run for run in runs}
    assert by_name["center"].compactness < 0.75 * by_name["softmax"].compactness, "that is what centers are for"
    assert by_name["lgm"].compactness < 0.75 * by_name["softmax"].compactness
    assert record["runs"][0]["accuracy"] == runs[0].accuracy
    assert "sphereface" in capsys.readouterr().out


def test_spread_by_hand() -> None:
    """Two classes, on the axes: an angle of 90 degrees between; 0 and 10 degrees within."""
    ten = math.radians(10)
    features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [-math.sin(ten), math.cos(ten)], [math.sin(ten), math.cos(ten)]])
    within, between, compactness = script("margins").spread(features, torch.tensor([0, 0, 1, 1]), 2)
    assert within == pytest.approx(5.0, abs=1e-3)
    assert between == pytest.approx(90.0, abs=1e-3)
    distance = math.hypot(2.0, math.cos(ten))
    assert compactness == pytest.approx((1.0 + math.sin(ten)) / 2 / distance, rel=1e-5)


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("two_scale", ["--eta", "0.01"]),
        ("modulated", ["--beta", "4", "--gamma", "5"]),
        ("margins", ["--loss", "arcface,lgm"]),
    ],
)
def test_runs_repeat(name: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script(name)
    monkeypatch.setattr(module, "plot", lambda *_: module.plt.figure())  # the slow part
    common = ["--seeds", "2", "--steps", "20", "--limit", "320", "--batch", "32", "--out", str(tmp_path)]

    def run() -> list:
        return module.main([*common, *options])

    first = run()
    assert first == run()
    assert first[0] != first[1], "another seed is another run"


#: What those of NAMES all say.
REFUSED = [
    (["--data", "/nowhere"], "--data: no train-images-idx3-ubyte[.gz] in /nowhere"),
    (["--seeds", "0"], "--seeds: must be >= 1, got 0"),
    (["--steps", "-3"], "--steps: must be >= 1, got -3"),
    (["--batch", "many"], "--batch: invalid"),
    (["--lr", "nan"], "--lr: must be > 0, got nan"),
    (["--limit", "0"], "--limit: must be >= 1, got 0"),
    (["--out", __file__], "--out: "),
]


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        *((name, *case) for name in NAMES for case in REFUSED),
        ("two_scale", ["--eta", "0.1,x"], "--eta: invalid float value: '0.1,x'"),
        ("two_scale", ["--eta", "nan"], "--eta: must be numbers, got [nan]"),
        ("modulated", ["--beta", "4,0"], "--beta: must be > 0, got 0.0"),
        ("modulated", ["--gamma", ""], "--gamma: invalid"),
        ("modulated", ["--limit", "19"], "--limit: a tenth is held out, so at least 20 images, got 19"),
        ("margins", ["--loss", "softmax,hinge"], "--loss: no loss 'hinge'; there are softmax, sphereface"),
        ("am_lfs", ["--data", "/nowhere"], "no train-images-idx3-ubyte[.gz] in /nowhere"),
        ("am_lfs", ["--noise", "10,95"], "--noise: must be from 0 to 90, got 95"),
        ("am_lfs", ["--noise", "some"], "--noise: invalid"),
        ("am_lfs", ["--epochs", "0"], "--epochs: must be > 0, got 0"),
        ("am_lfs", ["--lr", "nan"], "--lr: must be > 0, got nan"),
        ("am_lfs", ["--candidates", "1"], "--candidates: must be >= 2, got 1"),
        ("am_lfs", ["--limit", "5"], "--limit: must be from 10 to 1347, got 5"),
        ("am_lfs", ["--limit", "5000"], "--limit: must be from 10 to 1347, got 5000"),
        ("am_lfs", ["--search", "all"], "--search: invalid choice: 'all'"),
        ("am_lfs", ["--out", __file__], "--out: "),
        ("mils", ["--participation", "1.5"], "--participation: must be in [0, 1], got 1.5"),
        ("mils", ["--auxiliary", "hinge"], "--auxiliary: invalid choice: 'hinge'"),
        ("mils", ["--accept", "always"], "--accept: invalid choice: 'always'"),
        ("mils", ["--seeds", "0"], "--seeds: must be >= 1, got 0"),
        ("mils", ["--data", "/nowhere"], "no train-images-idx3-ubyte[.gz] in /nowhere"),
        ("mils", ["--lr", "nan"], "--lr: must be > 0, got nan"),
        ("mils", ["--out", __file__], "--out: "),
        ("train_images", ["--loss", "hinge"], "no loss 'hinge'; there are cross_entropy, focal"),
        ("train_images", ["--loss", "focal,"], "no loss ''"),
        ("train_images", ["--data", "/nowhere"], "no train-images-idx3-ubyte[.gz] in /nowhere"),
        ("train_images", ["--epochs", "0"], "--epochs: must be >= 1, got 0"),
        ("train_images", ["--batch", "many"], "--batch: invalid"),
        ("train_images", ["--lr", "-1"], "--lr: must be > 0, got -1.0"),
        ("train_images", ["--lr", "nan"], "--lr: must be > 0, got nan"),
        ("train_images", ["--backend", "abacus"], "--backend: invalid choice: 'abacus'"),
        ("train_images", ["--out", __file__], "--out: "),
    ],
)
def test_bad_arguments(
    name: str, arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        script(name).main(["--out", str(tmp_path), *arguments])
    assert left.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_divergence_is_said(name: str, tmp_path: Path) -> None:
    """Rather than a table of nonsense."""
    options = ["--steps", "30", "--seeds", "1", "--lr", "1e30", "--limit", "320", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="try a lower --lr"):
        script(name).main(options)


def test_mean_and_deviation() -> None:
    common = script("_common")
    assert common.mean_std([0.5, 0.7]) == "0.6000 ± 0.1414"
    assert common.mean_std([0.5]) == "0.5000"
