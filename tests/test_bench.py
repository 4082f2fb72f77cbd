"""The benchmark: its peers compute the same losses, and a run writes what it should."""

import json

import pytest
import torch

from bench import report, targets
from bench.__main__ import main
from bench.measure import Timing, take_turns
from bench.peers import disagreement, losses, make_inputs
from bench.run import Key, Run
from bench.shapes import CASES, LOSSES, Case


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4), ("bfloat16", 0.1)])
def test_peers_compute_the_same_loss(name, dtype, tolerance):
    device = torch.device("cpu")
    inputs = make_inputs(Case(32, 50, dtype), device)
    loss = losses(device)[name]
    input = inputs.cosines if loss.cosines else inputs.logits
    assert disagreement(loss.ours, loss.eager, input, inputs.target) < tolerance
    assert input.grad is None


def test_disagreement_sees_a_gradient():
    inputs = make_inputs(Case(8, 5, "float64"), torch.device("cpu"))

    def shifted(input, target):
        return torch.nn.functional.cross_entropy(input, target) + 0.1 * (input - input.detach()).sum()

    loss = losses(torch.device("cpu"))["cross_entropy"]
    assert disagreement(loss.ours, shifted, inputs.logits, inputs.target) > 0.1


def test_run_writes_numbers_and_picture(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(Case, "seconds", 0.0)  # the fewest turns
    main(
        [
            "--shapes",
            "8x5,6x40",
            "--dtype",
            "float32,bfloat16",
            "--no-compile",
            "--device",
            "cpu",
            "--out",
            str(tmp_path),
        ]
    )
    printed = capsys.readouterr().out
    assert "8x5 float32" in printed and "piecewise" in printed
    (data,), (picture,) = tmp_path.glob("*.json"), tmp_path.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(data.read_text())
    assert found["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    measured = {(row["rows"], row["dtype"], row["loss"], row["peer"]) for row in found["timings"]}
    for rows in (8, 6):
        for dtype in ("float32", "bfloat16"):
            assert {(rows, dtype, loss, "ours") for loss in LOSSES} <= measured
            assert {(rows, dtype, "-", floor) for floor in ("copy", "clone", "F.cross_entropy")} <= measured
    assert all(0 < row["best"] <= row["median"] for row in found["timings"])


def test_take_turns_counts_only_what_it_times():
    calls = []
    timings = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.0, torch.device("cpu"))
    assert set(timings) == {"a", "b"}
    turns, steps = timings["a"].turns, timings["a"].steps_per_turn
    assert turns == 3
    assert calls.count("a") == 2 + turns * (steps + 1)  # two to calibrate, one to warm up each turn


def test_targets_are_judged_the_right_way_round():
    def run(ours, other):
        timings = {}
        for case in CASES:
            for floor in ("copy", "clone", "F.cross_entropy"):
                timings[Key(case, "-", floor)] = Timing(1.0 if floor != "F.cross_entropy" else other, 1.0, 1, 1)
            for loss in LOSSES:
                for peer in ("eager", "compile"):
                    timings[Key(case, loss, peer)] = Timing(other, other, 1, 1)
                timings[Key(case, loss, "ours")] = Timing(ours, ours, 1, 1)
        header = {
            "device_type": "cpu",
            "device": "",
            "backend": "cpu",
            "cpus": 1,
            "threads": 1,
            "isa": None,
            "versions": {},
            "commit": None,
        }
        return Run({**header, "uncommitted_changes": False, "date": ""}, timings, {}, [], [])

    fast, slow = run(1.0, 20.0), run(10.0, 1.0)
    assert len(targets.check(fast)) == 30
    assert all(outcome.reached and outcome.missed_by <= 1 for outcome in targets.check(fast))
    missed = [outcome for outcome in targets.check(slow) if outcome.target.peer != "float32"]
    assert not any(outcome.reached for outcome in missed)
    by_peer = {outcome.target.peer: outcome for outcome in missed}
    assert by_peer["copy"].value == pytest.approx(10.0) and by_peer["copy"].missed_by == pytest.approx(10 / 1.9)
    assert by_peer["compile"].value == pytest.approx(0.1) and by_peer["compile"].missed_by == pytest.approx(27.0)
    assert "missed by 27.00x" in report.text(slow)
    assert "WARNING" not in report.text(slow)
    assert "not valid" in report.text(slow._replace(others=[0.0, 0.5]))
    assert "not valid" in report.text(slow._replace(header={**slow.header, "backend": "reference"}))


def test_schedule_prints_its_parts(capsys, monkeypatch):
    from bench import schedule

    monkeypatch.setattr(schedule, "NETWORKS", dict([next(iter(schedule.NETWORKS.items()))]))
    schedule.main(["--seconds", "0", "--device", "cpu"])
    printed = capsys.readouterr().out
    for part in ("with MILS, no attempt", "an attempt, rejected", "restore", "accepted / ", "rejected / "):
        assert part in printed
    assert "others kept" in printed
