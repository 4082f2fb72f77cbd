"""The GPU benchmark without a GPU: what it counts, what it writes, and that its code runs, on the CPU and on fakes."""

import contextlib
import functools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, tune
from bench.measure import Timing
from mlkernels import softmax
from mlkernels.backends.triton import launch

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
HEADER = {
    "device": "NVIDIA Nothing 1",
    "backend": "triton",
    "versions": {"torch": "2.11.0", "triton": None},
    "commit": None,
    "date": "2026-11-22T17:00:00+00:00",
}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


# ---- what is counted -------------------------------------------------------------------------------------------------


def test_floor_bytes():
    small = gpu.Problem((1024, 1000), "bfloat16")  # u = 2 048 000
    assert gpu.floor_bytes(small, "forward") == 2_048_000 + 8_192
    assert gpu.floor_bytes(small, "single") == 4_096_000 + 8_192
    # Twice the labels, the losses, (m, log S) written and read, the upstream gradient: 40 bytes a row.
    assert gpu.floor_bytes(small, "split") == 6_144_000 + 40_960
    # C = 2 in bfloat16: the label is half of what a single visit moves.
    assert gpu.floor_bytes(gpu.Problem((10, 2), "bfloat16"), "single") == 160
    images = gpu.Problem((8, 19, 1024, 2048), "float32")
    assert (images.rows, images.classes) == (16_777_216, 19)
    assert gpu.floor_bytes(images, "forward") == 4 * 318_767_104 + 8 * 16_777_216


def test_problems():
    found = gpu.problems(gpu.CASES, 2**30)
    assert len(found) == 2 * (len(gpu.CLASSES) + 1)
    assert [problem.dtype for problem in found[:13]] == ["bfloat16"] * 13
    assert found[0].shape == (2**22, 256)
    assert all(problem.rows % 16 == 0 for problem in found)
    # Logits, gradient and the copies of an eager chain fit 78 GiB.
    assert max(problem.nbytes for problem in found) == 4 * 2**30


def test_input_sets():
    assert gpu.input_sets(gpu.Problem((2**20, 1024), "bfloat16"), 50 * 2**20) == 1
    assert gpu.input_sets(gpu.Problem((2**14, 1024), "bfloat16"), 50 * 2**20) == 7  # 32 MiB each, 200 MiB wanted
    assert gpu.input_sets(gpu.Problem((8, 8), "bfloat16"), 50 * 2**20) == 64


@pytest.mark.parametrize("classes", [*gpu.CLASSES, 3000])
def test_few_rows_are_specialised_like_many(classes):
    def parts(rows):
        return launch._gathered(torch.empty(launch._chunks(rows)[1], 2, device="meta"))[1]

    def kind(number):
        return number if number == 1 else number % 16 == 0

    class NoLaunch:
        def __getitem__(self, grid):
            return lambda *arguments, **options: None

    original, launch.kernels.total = launch.kernels.total, NoLaunch()
    try:
        (many,) = [one for one in gpu.problems([str(classes)], 2**30) if one.dtype == "bfloat16"]
        few = gpu.few_rows(many)
        assert few.rows <= many.rows and few.rows <= 2**14
        assert kind(parts(few.rows)) == kind(parts(many.rows))
        assert few.rows % 16 == many.rows % 16 == 0
    finally:
        launch.kernels.total = original


def test_inputs_are_confident_on_every_other_row():
    one = gpu.make_inputs(gpu.Problem((64, 50), "float32"), False, CPU)
    assert one.input.is_leaf and one.input.requires_grad
    right = one.input.argmax(1) == one.target
    assert right[::2].all() and right[1::2].float().mean() < 0.3
    images = gpu.make_inputs(gpu.Problem((2, 5, 4, 6), "bfloat16"), True, CPU)
    assert images.target.shape == images.upstream.shape == (2, 4, 6)
    assert images.input.abs().max() <= 1


# ---- that it runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """Peers everywhere, images of a few pixels; no torch.compile, which takes a minute here."""
    monkeypatch.setattr(gpu, "PEERS_AT", {("bfloat16", 1000)})
    monkeypatch.setattr(gpu, "COMPILED_AT", set())
    monkeypatch.setattr(gpu, "SEGMENTATION", (2, 5, 4, 6))


def test_measures(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "liger", lambda: torch.nn.functional.cross_entropy)
    report = gpu.Report(HEADER)
    saved = []
    gpu.measure(
        report,
        gpu.problems(["1000", "seg"], 2**14),
        [gpu.Problem((16, 10), "float32")],
        [gpu.Problem((256, 20), "float16")],
        gpu.LOSSES,
        CPU,
        2**14,
        0.0,
        time.perf_counter() + 600,
        lambda: saved.append(len(report.rows)),
        lambda what: None,
    )
    assert report.failures == [] and report.skipped == []
    assert saved == sorted(saved) and saved[-1] == len(report.rows)
    assert len(report.copies) == 4
    assert sum(row.peer == "ours" for row in report.rows) == 4 * 5 * 3
    assert {row.peer for row in report.rows} == {"ours", "eager", "liger", "poly1"}
    assert all(row.timing.median > 0 and row.fraction > 0 for row in report.rows)
    assert [one.loss for one in report.small] == [*gpu.LOSSES, "cross_entropy"]
    errors = {(one.loss, one.way): one.error for one in report.half}
    assert len(errors) == 10 and all(error < 1e-3 for error in errors.values())
    assert "float16, arcface" in "\n".join(one.what for one in gpu.check(report))
    written(report, tmp_path)


def test_what_fails_is_said_and_the_rest_measured(tiny, monkeypatch):
    def broken(input, target, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore than there is")

    functions = {**gpu.ours(CPU), "modulated": broken}
    monkeypatch.setattr(gpu, "ours", lambda device: functions)
    report = gpu.Report(HEADER)
    jobs = gpu.problems(["10"], 640), [gpu.Problem((16, 10), "float32")], [gpu.Problem((16, 10), "float16")]
    arguments = gpu.LOSSES[:2], CPU, 64, 0.0
    gpu.measure(report, *jobs, *arguments, math.inf, lambda: None, lambda what: None)
    assert len(report.failures) == 2 * 3 + 1 + 1
    assert all("Tried to allocate" in what and "\n" not in what for what in report.failures)
    assert {row.loss for row in report.rows} == {"cross_entropy"}
    assert "FAILED: " in gpu.text(report)
    late = gpu.Report(HEADER)
    gpu.measure(late, *jobs, *arguments, -math.inf, lambda: None, lambda what: None)
    assert len(late.skipped) == 4 and "skipped, no time" in gpu.text(late)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
def test_runs_on_triton(tiny, monkeypatch):
    chosen = []
    monkeypatch.setattr(softmax, "choose", lambda device, backend: chosen.append(backend) or backend or "triton")
    report = gpu.Report(HEADER)
    steps = gpu.problems(["20"], 320)[:1]
    gpu.measure(report, steps, [], [], ["piecewise"], CPU, 64, 0.0, math.inf, lambda: None, lambda what: None)
    assert report.failures == [] and len(report.rows) == 3
    monkeypatch.setattr(launch, "_sizes", launch._sizes)
    table = {"classes_side_by_side": [[2048, 2048, 4], [0, 256, 8]], "rows_side_by_side": [[0, 256, 4]]}
    copied = torch.zeros(64), torch.zeros(64)
    kernel = launch.kernels.on_chip
    try:
        row = tune.Candidate("classes_side_by_side", 2048, (1024, 4), (40,))
        tune.prepare(table, row, "cpu", 640)
        assert launch.tile("sm_90", 40, False, 2, True)[:3] == (16, 64, 4)
        images = tune.Candidate("rows_side_by_side", 0, (128, 4), (5,))
        assert tune.rate(table, images, copied, 80) > 0
        assert launch.kernels.on_chip is kernel
    finally:
        launch.tile.cache_clear()
    assert chosen


def test_smoke():
    assert gpu.smoke(CPU) == 45


def test_compiles_in_other_processes():
    said = []
    gpu.compile_ahead([functools.partial(math.sqrt, 4.0), functools.partial(math.sqrt, -1.0)], 60, said.append)
    assert len(said) == 1 and "failed 1 times: ValueError" in said[0]
    work = gpu.specialised(gpu.TINY, ["cross_entropy", "arcface"], "cpu")
    assert len(work) == 3
    work[0]()


def test_graph_replays_what_was_captured(monkeypatch):
    class Stream:
        def wait_stream(self, other):
            assert isinstance(other, Stream)

    class Graph:
        replays = 0

        def replay(self):
            Graph.replays += 1

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    one = gpu.make_inputs(gpu.Problem((16, 10), "float32"), False, CPU)
    replay = gpu.graphed(torch.nn.functional.cross_entropy, one.input, one.target)
    gradient, _ = replay()
    assert Graph.replays == 1 and one.input.grad is None
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(one.input, one.target), one.input)[0]
    torch.testing.assert_close(gradient, expected)


def test_liger_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert gpu.liger() is None


# ---- what comes out --------------------------------------------------------------------------------------------------


def written(report, folder):
    """Text, JSON and picture of a report."""
    found = json.loads(gpu.write_json(report, folder).read_text())
    assert found["device"] == report.header["device"] and len(found["rows"]) == len(report.rows)
    pytest.importorskip("matplotlib")
    gpu.picture(report, folder / "picture.png")
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".png"]
    return found


def made_up(fraction):
    """A run of everything, each at this fraction of its target's bound."""
    report = gpu.Report(HEADER, copies=[3e12, 3.1e12])
    for problem in gpu.problems(gpu.CASES, 2**30):
        for loss in gpu.LOSSES:
            for mode in gpu.MODES:
                of_copy = fraction * (gpu.wanted_fraction(problem, mode) or 0.5)
                seconds = gpu.floor_bytes(problem, mode) / (of_copy * 3e12)
                report.rows.append(gpu.Row(problem, loss, mode, "ours", Timing(seconds, seconds, 3, 1), of_copy))
    own = report.rows[1]
    for peer, bound in (("eager", 3), ("compile", 1.2), ("liger", 1.4), ("poly1", 2)):
        seconds = own.timing.median * bound * fraction
        report.rows.append(own._replace(peer=peer, timing=Timing(seconds, seconds, 3, 1)))
    for shape in gpu.SMALL:
        report.small.append(gpu.Small(gpu.Problem(shape, "float32"), "arcface", "ours", 15e-6 / fraction, 60e-6))
    report.half += [gpu.Half("arcface", "scaled mean", 1e-4 / fraction, 0.0), gpu.Half("arcface", "split", 1e-4, 0.0)]
    return report


def test_targets_are_judged_the_right_way_round():
    good, bad = gpu.check(made_up(1.01)), gpu.check(made_up(0.5))
    # 26 problems but the two of C = 50257, without target, of 15 steps; of the two longest rows only the split ones.
    assert len(good) == 20 * 15 + 4 * 5 + 3 + 3 + 1 == len(bad)
    assert all(one.reached and "reached" in str(one) for one in good)
    assert not any(one.reached for one in bad)
    assert all("missed by 2.00x" in str(one) for one in bad if "float16" not in one.what)
    assert not gpu.Outcome("", math.nan, 1.0, False).reached


def test_table_and_files(tmp_path):
    report = made_up(0.5)
    report.failures.append("16x10 float32, arcface ours: RuntimeError: broken")
    table = gpu.text(report)
    assert "4194304x256 bfloat16" in table and "45*/45*/45*" in table and "8x19x1024x2048 float32" in table
    assert "copy 3000 to 3100 GB/s" in table and "cross_entropy poly1 1.00x" in table
    assert "Targets, bandwidth: 0 of 320 reached" in table and "FAILED: 16x10" in table
    assert len(table.splitlines()) < 70 and max(map(len, table.splitlines())) < 160
    found = written(report, tmp_path)
    assert not any(one["reached"] for one in found["targets"])
    assert [path.name for path in tmp_path.glob("*.json")] == ["nvidia-nothing-1-2026-11-22T170000.json"]


def test_an_empty_run_can_be_written(tmp_path):
    assert "not measured" in gpu.text(gpu.Report(HEADER))
    written(gpu.Report(HEADER), tmp_path)


# ---- the commands ----------------------------------------------------------------------------------------------------


def test_command(tiny, tmp_path, monkeypatch, capsys):
    def serially(work, seconds, say):
        for job in work:
            job()

    monkeypatch.setattr(gpu, "gpu", lambda: CPU)
    monkeypatch.setattr(gpu, "compile_ahead", serially)
    monkeypatch.setattr(gpu, "SECONDS", 0.0)
    monkeypatch.setattr(gpu, "ELEMENTS", 2**10)
    monkeypatch.setattr(gpu, "COPIED", 2**10)
    monkeypatch.setattr(gpu, "SMALL", [(8, 10)])
    few = ["--cases", "10,seg,small", "--losses", "cross_entropy,arcface", "--out", str(tmp_path)]
    assert gpu.main(few) == 0
    printed = capsys.readouterr()
    assert "Targets, other" in printed.out and "8x10 float32, small" in printed.err
    assert sorted(path.suffix for path in tmp_path.iterdir()) in ([".json"], [".json", ".png"])
    assert gpu.main(["--smoke"]) == 0
    assert "45 steps" in capsys.readouterr().out


@without_gpu
@pytest.mark.parametrize("module", [gpu, tune])
def test_without_a_gpu_it_says_so(module, capsys):
    assert module.main([]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "no GPU here" in printed.err


def test_dry_run_of_the_script(tmp_path):
    command = [str(ROOT / "bench/gpu.sh"), "--dry-run", "--tune"]
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": "a-python"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    for what in (
        "a-python csrc/build.py && a-python -m mlkernels",
        "a-python -m pytest -q tests/test_gpu.py",
        "compute-sanitizer --tool memcheck",
        "a-python -m bench.gpu --smoke",
        "a-python -m bench.tune",
        f"a-python -m bench.gpu --out {tmp_path / 'out'}",
    ):
        assert what in done.stdout
    assert not (tmp_path / "out").exists()
    assert subprocess.run([command[0], "--nothing"], capture_output=True).returncode == 2


def test_a_failing_step_does_not_stop_the_script(tmp_path):
    # A "python" that only says what it was asked for, and fails the tests.
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "asked: $*"\ncase "$*" in *pytest*) exit 3 ;; esac\n')
    fake.chmod(0o755)
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": str(fake)}
    done = subprocess.run([str(ROOT / "bench/gpu.sh")], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1 and "FAILED: tests" in done.stdout.splitlines()[-1]
    logs = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert "pytest -q" in logs["tests.log"] and "bench.gpu --out" in logs["measure.log"]
    assert len(logs) <= 6  # with JSON and picture eight


# ---- launch sizes ----------------------------------------------------------------------------------------------------

TABLE = {
    "classes_side_by_side": [[2048, 2048, 4], [8192, 8192, 8], [0, 8192, 8]],
    "rows_side_by_side": [[64, 4096, 4], [0, 4096, 4]],
}


def test_candidates(capsys):
    groups = tune.candidates(TABLE)
    assert [len(group) for group in groups] == [9, 3, 9, 3, 9, 9]
    assert groups[0][0][:3] == ("classes_side_by_side", 2048, (2048, 4))
    assert {candidate.row for candidate in groups[3]} == {None, (32768, 16), (32768, 32)}
    assert tune.with_row(TABLE, groups[3][1])["classes_side_by_side"] == [
        *TABLE["classes_side_by_side"][:2],
        [32768, 32768, 16],
        [0, 8192, 8],
    ]
    assert tune.with_row(TABLE, groups[3][0]) == TABLE
    assert tune.problem_of(groups[4][0], 19, 2**28).shape == (53, 19, 512, 512)
    assert tune.main(["--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert "classes_side_by_side  C <= 2048" in listed and "any C" in listed and "rows_side_by_side" in listed


def test_spilling_failing_and_barely_better_sizes_are_not_taken():
    def rate(table, candidate):
        if candidate.limit == 2048:
            return {(4096, 8): 0.0, (1024, 4): 0.93}.get(candidate.row, 0.9)  # the fastest one spills
        if candidate.limit == 8192:
            return 0.91 if candidate.row == (8192, 16) else 0.90
        if candidate.row == (32768, 32):
            raise RuntimeError("out of resources")
        return 0.5

    said = []
    best, notes = tune.tune(TABLE, rate, math.inf, said.append)
    assert best["classes_side_by_side"] == [[2048, 1024, 4], [8192, 8192, 8], [0, 8192, 8]]
    assert best["rows_side_by_side"] == TABLE["rows_side_by_side"]
    assert len(notes) == 6 and "93.0% of a copy, 9 of 9" in notes[0]
    assert any("spills" in what for what in said) and any("out of resources" in what for what in said)
    kept, notes = tune.tune(TABLE, rate, -math.inf, said.append)
    assert kept == TABLE and all("not measured: kept" in note for note in notes)


def test_recorder_keeps_the_most_spills():
    class Kernel:
        def __getitem__(self, grid):
            return lambda spills: None if spills is None else type("Compiled", (), {"n_spills": spills})

    recorder = tune.Recorder(Kernel())
    for spills in (0, 3, 1, None):
        recorder[(1,)](spills)
    assert recorder.spills == 3


def test_tune_writes_what_launch_reads(tmp_path, monkeypatch, capsys):
    path = tmp_path / "sizes.json"
    path.write_text(tune.PATH.read_text())
    default = json.loads(path.read_text())["default"]
    monkeypatch.setattr(tune, "PATH", path)
    monkeypatch.setattr(tune, "gpu", lambda: CPU)
    monkeypatch.setattr(tune, "COPIED", 64)
    monkeypatch.setattr(tune, "compile_ahead", lambda work, seconds, say: None)
    monkeypatch.setattr(tune, "rate", lambda table, one, copied, elements: 0.9 if one.row == (4096, 8) else 0.5)
    monkeypatch.setattr(launch, "_architecture", lambda device: "sm_90")
    assert tune.main([]) == 0
    sizes = json.loads(path.read_text())
    assert sizes["default"] == default
    assert [4096, 8] in [row[1:] for row in sizes["sm_90"]["rows_side_by_side"]]
    assert sizes["sm_90"]["measured"]["device"] and len(sizes["sm_90"]["measured"]["rows"]) > 4
    assert max(map(len, path.read_text().splitlines())) < 200
    # As launch.py merges them.
    merged = {**sizes["default"], **sizes["sm_90"]}
    monkeypatch.setattr(launch, "_sizes", lambda architecture: merged)
    launch.tile.cache_clear()
    try:
        assert launch.tile("sm_90", 1000, False, 2, True).on_chip
        assert not launch.tile("sm_90", 10**6, False, 2, True).on_chip
    finally:
        launch.tile.cache_clear()
    assert "wrote sm_90" in capsys.readouterr().out
    before = path.read_text()
    monkeypatch.setattr(tune, "rate", lambda table, one, copied, elements: 0.0)  # every one spills
    assert tune.main([]) == 1
    assert path.read_text() == before
