"""The scripts that train through a linear head: a policy and a language model learn, with memory to spare."""

from __future__ import annotations

import sys

import pytest
import torch.distributed as dist
from scripts import command, script

pytestmark = pytest.mark.usefixtures("threads_put_back")


def test_policy_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    """From clicks alone, among 1500 items; both ways of the gradient are one gradient."""
    rates = script("policy_gradient").main(["--items", "1500", "--batch", "128", "--steps", "60"])
    assert list(rates) == ["log_prob", "row_weight"]
    for way, (chance, learned) in rates.items():
        assert chance < 0.05, way
        assert learned > 0.4, way
    assert rates["log_prob"] == pytest.approx(rates["row_weight"], abs=0.02)
    tables = capsys.readouterr().out.split("\nby ")[1:]
    ranks, entropies = ([[float(line.split()[k]) for line in t.splitlines()[2:]] for t in tables] for k in (4, 3))
    for rank, entropy in zip(ranks, entropies, strict=True):
        assert rank[-1] < rank[0] / 10
        assert entropy[-1] < entropy[0] - 2


def test_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Better than the words' frequencies with every loss; a z-loss holds log Z; the linear head takes less memory."""
    found = script("lm_head").main(["--words", "4096", "--width", "32", "--steps", "60"])
    perplexity = {name: values[0] for name, values in found.items()}
    losses = ("cross entropy", "focal", "z-loss")
    for name in losses:
        assert perplexity[name] < 0.7 * perplexity["frequencies"], name
    assert len({perplexity[name] for name in losses}) == 3
    assert found["z-loss"][1] < found["cross entropy"][1] - 1
    assert "|log Z|" in capsys.readouterr().out
    if sys.platform.startswith("linux"):
        assert 0 < found["linear head"][1] < found["whole logits"][1] / 2  # the logits are 64 MB


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
@pytest.mark.parametrize("by", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")])
def test_faces_in_parallel(by: tuple[str, ...]) -> None:
    """In two processes of its own, or torchrun's."""
    lines = command("face_parallel", "--classes", "200", "--steps", "60", "--lr", "0.2", by=by).stdout.splitlines()
    (scores,) = (line for line in lines if line.startswith("verification"))
    before, after = (float(word) for word in scores.split()[1::2])
    assert after > before + 0.01
    assert "2 ranks, 200 classes, 100 of them on rank 0" in lines
    assert lines[-1].endswith("a rank sends 68 KiB")


def test_faces(capsys: pytest.CaptureFixture[str]) -> None:
    """The update in the tile is the stored gradient's, in two thirds of the memory; bfloat16 and samples learn too."""
    options = "--classes 500 --features 32 --sample 150 --batch 128 --steps 110 --concentration 60 --lr 0.1"
    found = script("face_head").main(options.split())
    assert {way: result.bytes for way, result in found.items()} == {
        "stored": 384, "tile": 257, "bfloat16": 129, "sample": 257,
    }  # fmt: skip
    for way, result in found.items():
        assert result.after > result.before + 0.01, way
    assert found["tile"].after == pytest.approx(found["stored"].after, abs=2e-3)
    lines = [line for line in capsys.readouterr().out.splitlines() if "step   108" in line]
    losses = {line.split()[0]: float(line.split()[-1]) for line in lines}
    assert losses["tile"] == pytest.approx(losses["stored"], abs=0.02)
    assert losses["bfloat16"] == pytest.approx(losses["stored"], abs=0.05)
