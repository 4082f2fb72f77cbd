"""The GPU benchmark without a GPU: what it counts, what it writes, and that its code runs, on the CPU and on fakes."""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import mlkernels
from bench import gpu, gpu_report, shards, smoke, tune
from bench.gpu_report import OF_COPY, Half, Outcome, Problem, Report, Row, Small, check, floor_bytes, text
from bench.measure import Timing
from bench.peers import disagreement, losses
from mlkernels import backends, softmax
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
    small = Problem((1024, 1000), "bfloat16")  # u = 2 048 000
    assert floor_bytes(small, "forward") == 2_048_000 + 8_192
    assert floor_bytes(small, "single") == 4_096_000 + 8_192
    # Twice the labels, the losses, (m, log S) written and read, the upstream gradient: 40 bytes a row.
    assert floor_bytes(small, "split") == 6_144_000 + 40_960
    # C = 2 in bfloat16: the label is half of what a single visit moves.
    assert floor_bytes(Problem((10, 2), "bfloat16"), "single") == 160
    images = Problem((8, 19, 1024, 2048), "float32")
    assert (images.rows, images.classes) == (16_777_216, 19)
    assert floor_bytes(images, "forward") == 4 * 318_767_104 + 8 * 16_777_216


def test_problems():
    found = gpu.problems(gpu.CASES, 2**30)
    assert len(found) == 2 * (len(gpu.CLASSES) + 1)
    assert [problem.dtype for problem in found[:14]] == ["bfloat16"] * 14
    assert [gpu.problem_name(problem) for problem in found[:7]] == gpu.FIRST
    assert {50257, 128255, 128256, 262144} <= {problem.classes for problem in found}
    assert Problem((2**22, 256), "bfloat16") in found
    assert all(problem.rows % 16 == 0 for problem in found)
    # Logits, gradient and the copies of an eager chain fit 78 GiB.
    assert max(problem.nbytes for problem in found) == 4 * 2**30


def test_input_sets():
    assert gpu.input_sets(Problem((2**20, 1024), "bfloat16"), 50 * 2**20) == 1
    assert gpu.input_sets(Problem((2**14, 1024), "bfloat16"), 50 * 2**20) == 7  # 32 MiB each, 200 MiB wanted
    assert gpu.input_sets(Problem((8, 8), "bfloat16"), 50 * 2**20) == 64


@pytest.mark.parametrize("classes", [*gpu.CLASSES, 3000])
def test_few_rows_are_specialised_like_many(classes):
    (many,) = [one for one in gpu.problems([str(classes)], 2**30) if one.dtype == "bfloat16"]
    few = gpu.few_rows(many)
    assert few.rows <= many.rows and few.rows <= 2**14
    assert (few.rows > launch._FEW) == (many.rows > launch._FEW)
    assert few.rows % 16 == many.rows % 16 == 0


def test_inputs_are_confident_on_every_other_row():
    one = gpu.make_inputs(Problem((64, 50), "float32"), False, CPU)
    assert one.input.is_leaf and one.input.requires_grad
    right = one.input.argmax(1) == one.target
    assert right[::2].all() and right[1::2].float().mean() < 0.3
    images = gpu.make_inputs(Problem((2, 5, 4, 6), "bfloat16"), True, CPU)
    assert images.target.shape == images.upstream.shape == (2, 4, 6)
    assert images.input.abs().max() <= 1


# ---- that it runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """Peers everywhere, images of a few pixels; no torch.compile, which takes a minute here."""
    monkeypatch.setattr(gpu, "PEERS_AT", {("bfloat16", 1000)})
    monkeypatch.setattr(gpu, "COMPILED_AT", set())
    monkeypatch.setattr(gpu, "SEGMENTATION", (2, 5, 4, 6))


@pytest.fixture
def stand_in(monkeypatch):
    """The CPU's kernels under the names of the GPU's backends, as fast as the tests want it."""
    original, asked = gpu.ours, set()

    def ours(device, by):
        asked.add(by)
        return original(device, "cpu" if by in gpu_report.OURS else by)

    for module in (gpu, smoke, tune):
        monkeypatch.setattr(module, "ours", ours)
    return asked


def plan(**changes):
    """What is measured, on a CPU and in no time."""
    return gpu.Plan(CPU, ["triton", "cuda"], gpu_report.LOSSES, 0.0, copy_bytes=2**14)._replace(**changes)


def measured(found, deadline=math.inf):
    """A report of it, and how many rows there were at each save."""
    report, saved = Report(HEADER), []
    gpu.measure(found, report, deadline, lambda: saved.append(len(report.rows)), lambda what: None)
    return report, saved


def test_measures(tiny, stand_in, tmp_path, monkeypatch):
    for peer in ("liger", "quack"):
        monkeypatch.setattr(gpu, peer, lambda: torch.nn.functional.cross_entropy)
    report, saved = measured(
        plan(
            wanted=gpu.problems(["1000", "seg"], 2**14),
            small=[Problem((16, 10), "float32")],
            half=[Problem((256, 20), "float16")],
            widths=[8, 3],
        )
    )
    assert report.failures == [] and report.skipped == []
    assert saved == sorted(saved) and saved[-1] == len(report.rows)
    assert len(report.copies) == 4
    for by in ("triton", "cuda"):
        assert sum(row.by == by for row in report.rows) == 4 * 5 * 3
    assert {row.by for row in report.rows} == {"triton", "cuda", "eager", "liger", "quack", "poly1"}
    assert {"triton", "cuda"} <= stand_in
    assert report.backends() == ["triton", "cuda"]
    assert all(row.timing.median > 0 and row.fraction > 0 for row in report.rows)
    assert [one.loss for one in report.small] == [*gpu_report.LOSSES, *gpu_report.LOSSES, "cross_entropy"]
    errors = {(one.loss, one.by, one.way): one.error for one in report.half}
    assert len(errors) == 20 and all(error < 1e-3 for error in errors.values())
    assert "float16, arcface, cuda" in "\n".join(one.what for one in check(report))
    # Two layers: weight and bias, each with two averages and a step.
    assert {(one.what, one.by) for one in report.states} == {
        ("save", "multi_copy_"), ("restore", "multi_copy_"), ("refused", "multi_copy_"), ("save", "_foreach_copy_")
    }  # fmt: skip
    assert {(one.tensors, one.nbytes) for one in report.states} == {(16, 4 * (3 * (64 + 8 + 9 + 3) + 4))}
    assert all(one.plain > 0 and one.fraction > 0 for one in report.states)
    written(report, tmp_path)


@pytest.mark.parametrize("name", gpu_report.LOSSES)
def test_ours_and_the_peer_are_one_loss(name):
    one = gpu.make_inputs(Problem((64, 50), "float32"), name in gpu.COSINES, CPU)
    own, eager = gpu.ours(CPU, None)[name], losses(CPU)[name].eager
    assert disagreement(own, eager, one.input, one.target) < 1e-4


def test_the_state_is_of_the_size_asked_for():
    widths = gpu.STATE_WIDTHS
    assert len(gpu.training_state(widths, torch.device("meta"))) == 1000
    assert abs(sum(width * width + width for width in widths) / 100e6 - 1) < 0.02


def test_what_fails_is_said_and_the_rest_measured(tiny, stand_in, monkeypatch):
    def broken(input, target, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore than there is")

    whole = gpu.ours
    monkeypatch.setattr(
        gpu, "ours", lambda device, by: {**whole(device, by), **({"modulated": broken} if by == "cuda" else {})}
    )
    everything = plan(
        names=gpu_report.LOSSES[:2],
        wanted=gpu.problems(["10"], 640),
        small=[Problem((16, 10), "float32")],
        half=[Problem((16, 10), "float16")],
        widths=[4],
        copy_bytes=64,
    )
    report, _ = measured(everything)
    assert len(report.failures) == 2 * 3 + 1 + 1
    assert all("Tried to allocate" in what and "\n" not in what for what in report.failures)
    assert {(row.loss, row.by) for row in report.rows} == {
        ("cross_entropy", "triton"), ("modulated", "triton"), ("cross_entropy", "cuda")
    }  # fmt: skip
    assert "FAILED: " in text(report)
    late, _ = measured(everything, -math.inf)
    assert len(late.skipped) == 5 and "skipped, no time" in text(late)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
def test_runs_on_the_kernels_themselves(tiny, monkeypatch):
    """Triton's interpreted, CUDA's over fibers."""
    there = [name for name in gpu_report.OURS if mlkernels.available_backends()[name] is None]
    assert "triton" in there
    steps = gpu.problems(["20"], 320)[:1]
    report, _ = measured(plan(backends=there, names=["piecewise"], wanted=steps, copy_bytes=64))
    assert report.failures == [] and len(report.rows) == 3 * len(there)
    monkeypatch.setattr(launch, "_sizes", launch._sizes)
    table = {"classes_side_by_side": [[2048, 2048, 4], [0, 256, 8]], "rows_side_by_side": [[0, 256, 4]]}
    copied = torch.zeros(64), torch.zeros(64)
    kernel = launch.kernels.visit
    try:
        row = tune.Candidate("classes_side_by_side", 2048, (1024, 4), (40,))
        tune.prepare(table, row, "cpu", 640)
        assert launch.tile("sm_90", 40, False, 2, 8, True)[:5] == (1, 16, 8, 8, 4)
        images = tune.Candidate("rows_side_by_side", 0, (128, 4), (5,))
        assert tune.rate(table, images, copied, 80) > 0
        assert launch.kernels.visit is kernel
    finally:
        launch.tile.cache_clear()


@pytest.mark.parametrize("by", ["reference", None])
def test_a_backend_is_measured_by_its_name(by, monkeypatch):
    asked = []

    def choose(device, backend, *others):
        asked.append(backend)
        return "reference"

    monkeypatch.setattr(softmax, "choose", choose)
    for name, function in gpu.ours(CPU, by).items():
        one = gpu.make_inputs(Problem((4, 5), "float32"), name in gpu.COSINES, CPU)
        function(one.input, one.target)
    assert asked == [by] * len(gpu_report.LOSSES)


@pytest.mark.parametrize("by", ["cpu", "cuda"])
def test_smoke(by):
    """Against float64, on the CPU's kernels and on CUDA's over fibers; the longest rows would take a while."""
    if mlkernels.available_backends()[by] is not None:
        pytest.skip(f"no {by}")
    names = ["short", "odd", "apart", "apart16"]
    said = []
    assert smoke.smoke(CPU, [by], names, gpu_report.LOSSES, gpu_report.MODES, said.append) == (15 * len(names) + 1, 0)
    assert said == []


def test_smoke_says_what_is_wrong_and_how_to_go_on(monkeypatch):
    whole = gpu.ours

    def ours(device, by):
        found = whole(device, "reference")
        if by == "triton":
            right = found["arcface"]
            found["arcface"] = lambda *arguments, **options: 1.001 * right(*arguments, **options)
        elif by == "cuda":

            def broken(input, target, **options):
                raise RuntimeError("CUDA error: misaligned address\nat length")

            found["modulated"] = broken
        return found

    monkeypatch.setattr(smoke, "ours", ours)
    said = []
    losses = ["modulated", "arcface"]
    assert smoke.smoke(CPU, ["triton", "cuda"], ["short"], losses, ["single"], said.append) == (5, 2)
    text = "\n".join(said)
    assert "FAILED cuda short (33x100 bfloat16) modulated single: RuntimeError: CUDA error: misaligned address" in text
    assert "compute-sanitizer --tool memcheck" in text and "at length" not in text
    assert "FAILED triton short (33x100 bfloat16) arcface single: wrong loss: off by 0.001" in text
    assert "python -m bench.smoke --backends triton --problems short --losses arcface --modes single" in text


def test_smoke_ends_where_the_device_is_broken(monkeypatch):
    class Broken:
        type = "cuda"

    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(smoke, "make_inputs", lambda problem, cosines, device: gpu.make_inputs(problem, cosines, CPU))
    monkeypatch.setattr(smoke, "ours", lambda device, by: gpu.ours(CPU, "reference"))
    said = []
    assert smoke.smoke(Broken(), ["cuda"], ["short"], ["modulated"], gpu_report.MODES, said.append) == (1, 1)
    assert "the device is broken" in said[0]


@pytest.mark.parametrize(
    ("error", "word"),
    [
        ("CUDA error: no kernel image is available for execution on the device", "MLKERNELS_CUDA_ARCHS"),
        ("_cuda.abi3.so does not load: undefined symbol: aoti_torch_x", "python -m mlkernels"),
        ("OutOfResources: out of resource: shared memory, Required: 262144", "sizes.json"),
        ("wrong gradient: off by 0.2 of its norm", "racecheck"),
        ("CUDA out of memory. Tried to allocate", "nvidia-smi"),
    ],
)
def test_what_an_error_means(error, word):
    assert word in smoke.advice(error)
    assert smoke.advice("nobody has seen this") is None


def test_smoke_has_every_way_of_the_cuda_kernels():
    """By the bytes of shared memory of an H100's block, and of sixteen of them."""
    block, cluster = 227 * 2**10, 16 * 227 * 2**10
    tiny = smoke.TINY.values()
    rows = [one.classes * one.torch_dtype.itemsize for one in tiny if len(one.shape) == 2]
    assert any(row < 1024 for row in rows) and any(1024 < row < block / 4 for row in rows)
    assert any(block < row < cluster for row in rows) and any(row > cluster for row in rows)
    assert any(row % 4 for row in rows) and any(len(one.shape) > 2 for one in tiny)


def test_compiles_in_other_processes():
    said = []
    gpu.compile_ahead([functools.partial(math.sqrt, 4.0), functools.partial(math.sqrt, -1.0)], 60, said.append)
    assert len(said) == 1 and "failed 1 times: ValueError" in said[0]
    work = gpu.specialised(list(smoke.TINY.values())[:2], ["cross_entropy", "arcface"], "cpu")
    assert [job.args[-2:] for job in work] == 2 * [("triton", [mode]) for mode in gpu_report.MODES]


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
    one = gpu.make_inputs(Problem((16, 10), "float32"), False, CPU)
    replay = gpu.graphed(torch.nn.functional.cross_entropy, one.input, one.target)
    gradient, _ = replay()
    assert Graph.replays == 1 and one.input.grad is None
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(one.input, one.target), one.input)[0]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("peer", "module"), [("liger", "liger_kernel"), ("quack", "quack")])
def test_a_peer_is_optional(peer, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert getattr(gpu, peer)() is None


def test_quack_where_it_is_installed(monkeypatch):
    package, module = types.ModuleType("quack"), types.ModuleType("quack.cross_entropy")
    module.cross_entropy = lambda x, target, reduction="none": reduction
    monkeypatch.setitem(sys.modules, "quack", package)
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", module)
    assert gpu.quack()(None, None) == "mean"


# ---- what comes out --------------------------------------------------------------------------------------------------


def written(report, folder):
    """Text, JSON and picture of a report."""
    found = json.loads(gpu_report.write_json(report, folder).read_text())
    assert found["device"] == report.header["device"] and len(found["rows"]) == len(report.rows)
    pytest.importorskip("matplotlib")
    gpu_report.picture(report, folder / "picture.png")
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".png"]
    return found


def made_up(fraction):
    """A run of everything, each at this fraction of its target's bound."""
    report = Report(HEADER, copies=[3e12, 3.1e12])
    for problem in gpu.problems(gpu.CASES, 2**30):
        for loss, mode, by in itertools.product(gpu_report.LOSSES, gpu_report.MODES, gpu_report.OURS):
            of_copy = fraction * (gpu_report.wanted_fraction(problem, mode, by) or 0.5)
            seconds = floor_bytes(problem, mode) / (of_copy * 3e12)
            report.rows.append(Row(problem, loss, mode, by, Timing(seconds, seconds, 3, 1), of_copy))
    at = Problem((8368, 128256), "bfloat16")
    own = report.fastest(at, "cross_entropy", "single")
    assert own.by == "cuda"  # 0.92 against 0.5
    for peer, bound in (("eager", 3), ("compile", 1.2), ("liger", 1.6), ("quack", 1.0), ("poly1", 2)):
        seconds = own.timing.median * bound * fraction
        report.rows.append(own._replace(by=peer, timing=Timing(seconds, seconds, 3, 1)))
    for shape in gpu.SMALL:
        problem = Problem(shape, "float32")
        report.small += [
            Small(problem, "cross_entropy", "triton", 15e-6 / fraction, 90e-6),
            Small(problem, "cross_entropy", "cuda", 10e-6 / fraction, 50e-6),
            Small(problem, "cross_entropy", "eager", 20e-6, 50e-6 * fraction),
        ]
    for by in gpu_report.OURS:
        report.half += [
            Half("arcface", by, "scaled mean", 1e-4 / fraction, 0.0), Half("arcface", by, "split", 1e-4, 0.0)
        ]  # fmt: skip
    nbytes = 10**9
    for what in ("save", "restore"):
        seconds = 2 * nbytes / (0.85 * fraction * 3e12)
        report.states.append(gpu_report.Copies(what, "multi_copy_", nbytes, 1000, seconds, 2 * seconds, 3e12))
    report.states += [
        gpu_report.Copies("refused", "multi_copy_", nbytes, 1000, 5e-6 / fraction, 2e-4, 3e12),
        gpu_report.Copies("save", "_foreach_copy_", nbytes, 1000, 1e-3, 1e-3, 3e12),
    ]
    return report


def test_targets_are_judged_the_right_way_round():
    good, bad = check(made_up(1.01)), check(made_up(0.5))
    # Of 28 problems, 20 have a target in each of 15 steps. Of the eight longer ones, C = 50257 and 128255 in two types
    # have none but CUDA's single visit in bfloat16, and the other two the split one as well.
    triton = 20 * 15 + 2 * 2 * 5
    cuda = 20 * 15 + 2 * 2 * 5 + 4 * 5
    assert sum(OF_COPY in one.what and "tensors" not in one.what for one in good) == triton + cuda
    # Peers but poly1; small problems: two backends, and eager; two errors; three copies.
    assert len(good) == triton + cuda + 4 + 3 * 3 + 2 + 3 == len(bad)
    assert all(one.reached and "reached" in str(one) for one in good)
    assert not any(one.reached for one in bad)
    assert all("missed by 2.00x" in str(one) for one in bad if "float16, arc" not in one.what)
    assert not Outcome("", math.nan, 1.0, False).reached


@pytest.mark.parametrize(
    ("classes", "dtype", "mode", "by", "bound"),
    [
        (1000, "bfloat16", "single", "cuda", 0.92),
        (50257, "bfloat16", "single", "cuda", 0.92),
        (128255, "bfloat16", "single", "cuda", 0.92),
        (262144, "bfloat16", "single", "cuda", 0.92),
        (262144, "float32", "single", "cuda", None),
        (1000, "bfloat16", "single", "triton", 0.90),
        (50257, "bfloat16", "single", "triton", None),
        (128256, "bfloat16", "split", "triton", 0.85),
        (100, "bfloat16", "single", "cuda", 0.80),
    ],
)
def test_what_is_asked_of_the_bandwidth(classes, dtype, mode, by, bound):
    assert gpu_report.wanted_fraction(Problem((16, classes), dtype), mode, by) == bound


def test_images_are_asked_what_short_rows_are():
    assert gpu_report.wanted_fraction(Problem((2, 1000, 8, 8), "bfloat16"), "single", "cuda") == 0.90


def test_the_faster_of_ours_stands_for_ours():
    report = Report(HEADER)
    problem = Problem((16, 1000), "bfloat16")
    for by, seconds in (("triton", 2.0), ("cuda", 4.0), ("quack", 3.0)):
        report.rows.append(Row(problem, "cross_entropy", "single", by, Timing(seconds, seconds, 3, 1), 0.5))
    (ratio,) = [one for one in check(report) if "quack" in one.what]
    assert ratio.what.endswith("quack / triton") and ratio.value == 1.5
    assert re.search(r"16x1000 bfloat16 +quack +1.50/0.75\n", text(report))


def test_table_and_files(tmp_path):
    report = made_up(0.5)
    report.failures.append("16x10 float32, arcface cuda: RuntimeError: broken")
    table = text(report)
    assert "4194304x256 bfloat16" in table and "45*/45*/45*" in table and "8x19x1024x2048 float32" in table
    assert "copy 3000 to 3100 GB/s" in table and re.search(r"8368x128256 bfloat16 +poly1 +0.54/1.00\n", table)
    assert "backends triton and cuda" in table and "\n                        cuda " in table
    assert "Targets, bandwidth: 0 of 662 reached" in table and "FAILED: 16x10" in table
    assert "1.00 GB in 1000 tensors" in table and "refused" in table
    assert len(table.splitlines()) < 130 and max(map(len, table.splitlines())) < 160
    found = written(report, tmp_path)
    assert not any(one["reached"] for one in found["targets"])
    assert found["schema"] == "gpu 2" and len(found["states"]) == 4
    assert [path.name for path in tmp_path.glob("*.json")] == ["nvidia-nothing-1-2026-11-22T170000.json"]


def test_an_empty_run_can_be_written(tmp_path):
    assert "not measured" in text(Report(HEADER))
    written(Report(HEADER), tmp_path)


# ---- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def a_gpu(monkeypatch):
    """The CPU taken for one, nothing compiled ahead."""
    monkeypatch.setattr(gpu, "gpu", lambda: CPU)
    monkeypatch.setattr(gpu, "usable", lambda: ["triton", "cuda"])
    monkeypatch.setattr(gpu, "compile_ahead", lambda work, seconds, say: None)
    for name in ("gpu", "usable", "compile_ahead"):
        monkeypatch.setattr(smoke, name, getattr(gpu, name))
    for name, value in (("SECONDS", 0.0), ("ELEMENTS", 2**10), ("COPIED", 2**10), ("SMALL", [(8, 10)])):
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "STATE_WIDTHS", [4])


def test_command(tiny, stand_in, a_gpu, tmp_path, monkeypatch, capsys):
    few = ["--cases", "10,seg,small,copies", "--losses", "cross_entropy,arcface", "--out", str(tmp_path)]
    assert gpu.main(few) == 0
    printed = capsys.readouterr()
    assert "Targets, other" in printed.out and "8x10 float32, small" in printed.err
    assert "in 8 tensors" in printed.out and "training state" in printed.err
    assert sorted(path.suffix for path in tmp_path.iterdir()) in ([".json"], [".json", ".png"])
    assert gpu.main(["--compile", *few]) == 0
    printed = capsys.readouterr()
    assert "compiled" in printed.err and printed.out == ""
    one = ["--problems", "short", "--losses", "arcface"]
    assert smoke.main(one) == 0
    assert "smoke: 7 steps are right" in capsys.readouterr().out
    assert smoke.main(["--backends", "cuda", *one]) == 0
    assert "4 steps are right" in capsys.readouterr().out


def test_a_backend_that_is_asked_for_and_not_there(stand_in, a_gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "usable", lambda: ["triton"])
    monkeypatch.setattr(smoke, "usable", lambda: ["triton"])
    one = ["--problems", "short", "--losses", "arcface", "--modes", "forward"]
    assert smoke.main(["--backends", "triton,cuda", *one]) == 1  # the rest runs
    printed = capsys.readouterr()
    assert "no backend 'cuda'" in printed.err and "2 steps are right" in printed.out and "(triton)" in printed.out
    assert smoke.main(one) == 0


@without_gpu
@pytest.mark.parametrize("module", [gpu, tune, smoke])
def test_without_a_gpu_it_says_so(module, capsys):
    assert module.main([]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "no GPU here" in printed.err


SCRIPT = str(ROOT / "bench/gpu.sh")
LIMITS = {"first": 210, "second": 420, "racecheck": 200, "tune": 300}


def dry_run(call, **more):
    environment = {**os.environ, "OUT": "nowhere", "PYTHON": "a-python", **more}
    return subprocess.run([SCRIPT, call, "--dry-run"], capture_output=True, text=True, env=environment, timeout=20)


def test_dry_run_of_the_script(tmp_path):
    said = "".join(dry_run(call, OUT=str(tmp_path / "out")).stdout for call in LIMITS)
    for what in (
        "exec a-python csrc/build.py",
        "a-python -m mlkernels",
        "a-python -m bench.smoke --backends cuda\n",
        "a-python -m bench.smoke --backends triton\n",
        "a-python -m bench.gpu --quick",
        "tests/test_gpu.py -k not triton",
        "tests/test_gpu.py -k triton",
        "a-python -m bench.gpu --compile",
        "compute-sanitizer --tool memcheck",
        "compute-sanitizer --tool racecheck",
        "a-python -m bench.schedule",
        "a-python -m bench.tune",
        f"a-python -m bench.gpu --seconds 172 --out {tmp_path / 'out'}",
    ):
        assert what in said, what
    assert not (tmp_path / "out").exists()
    for wrong in ([], ["third"], ["first", "--nothing"], ["first", "--dry-run", "more"]):
        assert subprocess.run([SCRIPT, *wrong], capture_output=True).returncode == 2


@pytest.mark.parametrize("call", LIMITS)
def test_the_limits_of_the_steps_add_up(call):
    """What comes last may have what the others leave: of it a part at least."""
    steps = re.findall(r"^== ([\w-]+), up to (\d+) s( beside the next)?:", dry_run(call).stdout, re.MULTILINE)
    total = together = 0
    ends = {}
    for name, seconds, beside in steps:
        together = max(together, int(seconds))
        if not beside:
            total, together = total + together, 0
        ends[name] = total
    assert together == 0
    last = steps[-1][0]
    before = ends[steps[-2][0]]
    assert before < LIMITS[call] - 10 and (call == "first" or ends[last] + 5 <= LIMITS[call])
    # The measurement ends by itself, a problem after its budget is spent.
    if call == "second":
        assert {name: int(seconds) for name, seconds, _ in steps}["measure"] > gpu.BUDGET


def fake_machine(tmp_path, call, fails, library=True):
    """The script in a folder of its own, with a "python" that says what it was asked for and fails at some of it."""
    tools, place = tmp_path / "tools", tmp_path / "project"
    tools.mkdir()
    (place / "bench").mkdir(parents=True)
    (place / "mlkernels/backends/triton").mkdir(parents=True)
    for table in ("triton/sizes.json", "choice.json"):
        (place / "mlkernels/backends" / table).write_text("{}")
    shutil.copy(SCRIPT, place / "bench/gpu.sh")
    built = "touch mlkernels/_cuda.abi3.so" if library else "echo 'nvcc failed: no space' > mlkernels/_cuda.error.txt"
    (tools / "python").write_text(
        f"""#!/bin/sh
echo "asked: $* for $MLKERNELS_CUDA_ARCHS, $MLKERNELS_CUDA"
case "$*" in {fails}) exit 3 ;; csrc/build.py) {built} ;; *--out*) touch "$OUT/a.json" "$OUT/a.png" ;; esac
"""
    )
    (tools / "compute-sanitizer").write_text('#!/bin/sh\necho "sanitizer: $*"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": str(tools / "python")}
    environment |= {"PATH": f"{tools}:/usr/bin:/bin", "MLKERNELS_CUDA_ARCHS": "77"}
    command = [str(place / "bench/gpu.sh"), call]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
    return done, sorted(path.name for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("call", "fails", "failed"),
    [
        ("first", "*test_gpu.py*", "tests"),
        ("first", "*smoke*cuda*", "smoke-cuda"),
        ("first", "nothing", None),
        ("second", "*--compile*", "compile"),  # beside the build, and waited for
        ("second", "nothing", None),
        ("tune", "*bench.tune*", "tune"),
        ("racecheck", "nothing", None),
    ],
)
def test_a_failing_step_does_not_stop_the_script(tmp_path, call, fails, failed):
    done, files = fake_machine(tmp_path, call, fails)
    last = done.stdout.splitlines()[-1]
    assert (done.returncode, last.startswith("all steps passed")) == ((1, False) if failed else (0, True))
    if failed:
        assert f"FAILED: {failed}; the log is {tmp_path / 'out'}/{call}.log" == last
    assert "asked: csrc/build.py for 77, 1" in done.stdout
    order = {
        "first": ["build", "compile", "machine", "smoke-cuda", "smoke-triton", "measure-quick", "tests"],
        "second": ["build", "compile", "measure", "schedule", "tests-triton", "memcheck"],
        "racecheck": ["build", "racecheck"],
        "tune": ["build", "tune"],
    }[call]
    places = [max(done.stdout.find(f"== {what}, up"), done.stdout.find(f"== {what} ended")) for what in order]
    assert places == sorted(places) and places[0] > 0
    # At most eight come back from a machine.
    assert len(files) <= 4 and f"{call}.log" in files
    assert ("a.json" in files) == (call in ("first", "second")) and ("sizes.json" in files) == (call == "tune")
    assert ("sanitizer: --tool" in done.stdout) == (call in ("second", "racecheck"))


def test_without_a_library_nothing_more_is_run(tmp_path):
    done, files = fake_machine(tmp_path, "first", "nothing", library=False)
    assert done.returncode == 1 and files == ["first.log"]
    assert "nvcc failed: no space" in done.stdout and "mend the build" in done.stdout.splitlines()[-1]
    assert "bench.smoke --backends cuda" not in done.stdout


def test_a_step_that_hangs_is_stopped(tmp_path):
    """And what comes after the call's limit is not begun."""
    script = Path(SCRIPT).read_text().replace("step machine 10", "step machine 1")
    script = script.replace("step smoke-cuda", "SECONDS=206\n        step smoke-cuda")  # as late as that
    (tmp_path / "bench").mkdir()
    (tmp_path / "mlkernels").mkdir()
    (tmp_path / "bench/gpu.sh").write_text(script)
    fake = tmp_path / "python"
    fake.write_text(
        """#!/bin/sh
case "$*" in
    csrc/build.py) touch mlkernels/_cuda.abi3.so ;;
    "-m mlkernels") echo begun; exec sleep 30 ;;
esac
"""
    )
    fake.chmod(0o755)
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": str(fake), "PATH": "/usr/bin:/bin"}
    environment["MLKERNELS_CUDA_ARCHS"] = "90"
    command = ["bash", str(tmp_path / "bench/gpu.sh"), "first"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert "machine: stopped after 1 s" in done.stdout
    assert "smoke-cuda: no time left" in done.stdout and "tests: no time left" in done.stdout
    assert done.returncode == 1 and "FAILED: machine smoke-cuda smoke-triton" in done.stdout.splitlines()[-1]
    assert "begun" in (tmp_path / "out/first.log").read_text()  # a step that is cut off has kept what it had


REHEARSED = """#!/bin/sh
case "$*" in
    csrc/build.py) exit 0 ;;
    -m\\ bench.*)
        module=$2
        shift 2
        exec {python} -c "import importlib as i, sys; sys.exit(i.import_module('$module').main(sys.argv[1:]))" "$@" ;;
    *) exec {python} "$@" ;;
esac
"""


@pytest.mark.skipif(not os.environ.get("MLKERNELS_FULL"), reason="takes minutes; MLKERNELS_FULL=1 runs it")
@pytest.mark.parametrize("call", ["first", "second"])
def test_rehearsal(tmp_path, call):
    """The whole call, its programs as they are, a CPU taken for the device (tests/rehearsal)."""
    if not (ROOT / "mlkernels/_cuda.abi3.so").exists():
        pytest.skip("no CUDA library was built")
    fake = tmp_path / "python"
    fake.write_text(REHEARSED.format(python=sys.executable))
    fake.chmod(0o755)
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": str(fake), "MLKERNELS_CUDA_ARCHS": "90"}
    environment["PYTHONPATH"] = str(ROOT / "tests/rehearsal")
    done = subprocess.run([SCRIPT, call], capture_output=True, text=True, env=environment, timeout=LIMITS[call] + 60)
    files = [path.suffix for path in (tmp_path / "out").iterdir()]
    assert len(files) <= 8 and ".json" in files and ".log" in files
    # Without a GPU test_gpu.py has no tests, which is a failure; and a busy machine has no time for all.
    assert "are right on" in done.stdout if call == "first" else "MILS adds" in done.stdout
    assert "Error" not in done.stdout


# ---- tests in many processes -----------------------------------------------------------------------------------------


def test_every_function_has_its_turn():
    names = ["a[0]", "a[1]", "a[2]", "b", "c[0]", "c[1]"]
    assert [names[index] for index in shards.in_turn(names)] == ["a[0]", "b", "c[0]", "a[1]", "c[1]", "a[2]"]


def in_shards(tmp_path, seconds, tests):
    """What comes of a file of tests in two processes, and its last line."""
    path = tmp_path / "test_these.py"
    path.write_text(f"import os, time\n\nimport pytest\n\n\n{tests}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "bench.shards", str(seconds), "--processes", "2", str(path), "-k", "not left_out"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    return done, done.stdout.splitlines()[-1]


def test_shards_run_each_test_once(tmp_path):
    tests = """
@pytest.mark.parametrize("k", range(12))
def test_many(k):
    with open(f"{os.path.dirname(__file__)}/ran", "a") as file:
        file.write(f"{k}\\n")
    time.sleep(0.05)


def test_left_out():
    raise AssertionError


@pytest.mark.skip("some reason")
def test_skipped():
    pass
"""
    done, last = in_shards(tmp_path, 60, tests)
    assert done.returncode == 0, done.stdout + done.stderr
    assert last.startswith("12 passed, 1 skipped in ") and "skipped 1: Skipped: some reason" in done.stdout
    assert sorted(map(int, (tmp_path / "ran").read_text().split())) == list(range(12))


def test_shards_say_what_failed_died_and_was_not_run(tmp_path):
    tests = """
def test_fails():
    assert 1 + 1 == 3, "no"


def test_dies():
    os._exit(7)


@pytest.mark.parametrize("k", range(4))
def test_hangs(k):
    time.sleep(k and 100)
"""
    done, last = in_shards(tmp_path, 25, tests)
    assert done.returncode == 1
    assert "::test_fails: AssertionError: no" in done.stdout and "assert (1 + 1) == 3" in done.stdout
    assert "::test_dies: its process ended with status 7" in done.stdout
    assert last.startswith("1 passed, 2 failed, 3 of 6 not run: no time left in ")


def test_shards_without_tests_have_failed(tmp_path):
    done, last = in_shards(tmp_path, 30, "import nothing_of_this_name\n")
    assert done.returncode == 1 and "nothing_of_this_name" in done.stdout and last.startswith("no tests")


def test_a_broken_device_ends_its_process(monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert shards.device_is_broken()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not shards.device_is_broken()


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
    monkeypatch.setattr(launch, "_sizes", launch._sizes)
    monkeypatch.setattr(tune, "usable", lambda: ["triton"])  # and so no choice to measure
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
        assert launch.tile("sm_90", 1000, False, 2, 8, True).on_chip
        assert not launch.tile("sm_90", 10**6, False, 2, 8, True).on_chip
    finally:
        launch.tile.cache_clear()
    said = capsys.readouterr().out
    assert "wrote sm_90" in said and "choice.json is left as it was: of triton and cuda only ['triton']" in said
    before = path.read_text()
    monkeypatch.setattr(tune, "rate", lambda table, one, copied, elements: 0.0)  # every one spills
    assert tune.main([]) == 1
    assert path.read_text() == before


# ---- the choice of the backend ---------------------------------------------------------------------------------------

CHOICE = {"classes_side_by_side": [[0, "triton"]], "rows_side_by_side": [[100, "cuda"], [0, "triton"]]}


def test_rows_of_winners_are_the_shortest_that_say_it():
    assert tune.rows_of({10: "cuda", 100: "cuda", 1000: "triton", 4096: "cuda"}) == [
        [100, "cuda"], [1000, "triton"], [0, "cuda"]
    ]  # fmt: skip
    assert tune.rows_of({10: "triton", 100: "triton"}) == [[0, "triton"]]
    winners = {10: "cuda", 100: "triton", 1000: "triton", 4096: "cuda"}
    assert all(tune.chosen_at(tune.rows_of(winners), classes) == name for classes, name in winners.items())


def test_the_faster_backend_is_chosen_where_it_is_faster():
    def ratio(layout, classes):
        if layout == "rows_side_by_side":
            return {19: 0.5, 150: 2.0}[classes]
        if classes == 4096:
            raise RuntimeError("broken\nat length")
        return {10: 3.0, 100: 1.5, 1000: 1.01, 50257: 1.2, 65536: 1 / 1.5, 128256: 1.7, 262144: 1.9}.get(classes, 0.9)

    said = []
    best, notes = tune.choose_backends(CHOICE, ratio, math.inf, said.append)
    # In a tie (C = 1000) and where one fails (4096) it stays as it was.
    assert best["classes_side_by_side"] == [
        [100, "cuda"], [32768, "triton"], [50257, "cuda"], [65536, "triton"], [0, "cuda"]
    ]  # fmt: skip
    assert best["rows_side_by_side"] == [[19, "triton"], [0, "cuda"]]
    assert len(notes) == 11 and any("RuntimeError: broken" in what for what in said)
    assert "classes_side_by_side, C = 10: triton's time / cuda's 3.00, cuda" in notes
    backends.check_choice({"default": best}, "here")
    kept, notes = tune.choose_backends(CHOICE, ratio, -math.inf, said.append)
    assert kept["classes_side_by_side"] == CHOICE["classes_side_by_side"] and notes == []
    assert tune.chosen_at(kept["rows_side_by_side"], 19) == "cuda"


def test_what_a_choice_is_measured_at():
    many, few = tune.problems_at("classes_side_by_side", 100, 2**28)
    assert many.rows * 100 > 2**27 and few.shape == (128, 100)
    assert len(tune.problems_at("classes_side_by_side", 128256, 2**28)) == 1
    (images,) = tune.problems_at("rows_side_by_side", 19, 2**28)
    assert len(images.shape) == 4


def test_the_ratio_is_of_the_two(stand_in, monkeypatch):
    asked = []

    def take_turns(steps, seconds, device):
        for step in steps.values():
            step()
        asked.append(sorted(steps))
        return {key: Timing(4.0 if key.startswith("triton") else 2.0, 1.0, 3, 1) for key in steps}

    monkeypatch.setattr(tune, "take_turns", take_turns)
    assert tune.ratio_at("classes_side_by_side", 10, CPU, 640) == pytest.approx(2.0)
    assert len(asked) == 4 and len(asked[0]) == 6 and {"triton", "cuda"} <= stand_in


def test_tune_writes_what_the_choice_reads(tmp_path, monkeypatch, capsys):
    path = tmp_path / "choice.json"
    path.write_text(backends.CHOICE.read_text())
    for module in (tune, backends):
        monkeypatch.setattr(module, "CHOICE", path)
    monkeypatch.setattr(tune, "gpu", lambda: CPU)
    monkeypatch.setattr(tune, "usable", lambda: ["triton", "cuda"])
    monkeypatch.setattr(tune, "compile_ahead", lambda work, seconds, say: None)
    monkeypatch.setattr(launch, "_architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune, "ratio_at", lambda layout, classes, device, elements: 2.0 if classes > 100 else 0.5)
    default = json.loads(path.read_text())["default"]
    assert tune.main(["--only", "choice"]) == 0
    table = json.loads(path.read_text())
    assert table["default"] == default
    assert table["sm_90"]["classes_side_by_side"] == [[100, "triton"], [0, "cuda"]]
    assert table["sm_90"]["measured"]["device"] and len(table["sm_90"]["measured"]["rows"]) == 12
    assert max(map(len, path.read_text().splitlines())) < 130
    # As the package reads it.
    monkeypatch.setattr(backends, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(backends, "_why_not", lambda name: None)
    device = torch.device("cuda", 0)
    backends._preferred.cache_clear()
    try:
        assert [backends.choose(device, None, classes) for classes in (10, 1000)] == ["triton", "cuda"]
    finally:
        backends._preferred.cache_clear()
    before = path.read_text()
    monkeypatch.setattr(tune, "ratio_at", lambda *arguments: 1 / 0)
    assert tune.main(["--only", "choice"]) == 1
    assert path.read_text() == before and "left as it was" in capsys.readouterr().err


def test_tune_without_the_cuda_kernels_leaves_the_choice(monkeypatch, capsys):
    monkeypatch.setattr(tune, "gpu", lambda: CPU)
    monkeypatch.setattr(tune, "usable", lambda: ["triton"])
    monkeypatch.setattr(launch, "_architecture", lambda device: "sm_90")
    before = backends.CHOICE.read_text()
    assert tune.main(["--only", "choice"]) == 0
    assert "only ['triton'] can be used" in capsys.readouterr().out and backends.CHOICE.read_text() == before
