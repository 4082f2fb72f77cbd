"""The benchmark: what it counts and writes, that everybody computes the same loss, and that its code for GPUs runs."""

import contextlib
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mlkernels
from bench import (
    ahead,
    cases,
    charts,
    limits,
    linear,
    measure,
    options,
    peers,
    report,
    schedule,
    small_linear,
    smoke,
    smoke_linear,
    tune,
)
from bench.__main__ import BUDGET, main, plan_of
from bench.__main__ import _options as parse
from bench.cases import LOSSES, MODES, Problem, floor_bytes, make_inputs
from bench.measure import Key, Plan, Run, Timing
from bench.report import Outcome, Report, check, text
from mlkernels import backends, buffers, call, fast_path
from mlkernels.backends.triton import arguments, rows, tiles

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


# ---- what is counted -------------------------------------------------------------------------------------------------


def test_floor_bytes():
    small = Problem((1024, 1000), "bfloat16")  # u = 2 048 000
    assert floor_bytes(small, "forward") == 2_048_000 + 8_192
    assert floor_bytes(small, "step") == floor_bytes(small, "graph") == 4_096_000 + 8_192
    # Twice the labels, the losses, (m, log S) written and read, the upstream gradient: 40 bytes a row.
    assert floor_bytes(small, "split") == 6_144_000 + 40_960
    # C = 2 in bfloat16: the label is half of what a step moves.
    assert floor_bytes(Problem((10, 2), "bfloat16"), "step") == 160
    images = Problem((8, 19, 1024, 2048), "float32")
    assert (images.rows, images.classes) == (16_777_216, 19)
    assert floor_bytes(images, "forward") == 4 * 318_767_104 + 8 * 16_777_216
    assert str(Problem((8, 50), "float32", 4)) == "8x4x50 float32"


def test_problems_of_a_gpu():
    found = cases.problems(True)
    assert len(found) == len(set(found)) == 2 * (len(cases.CLASSES) + 1) + 3
    first = found[: len(cases.FIRST)]
    assert [one.classes for one in first] == cases.FIRST and {one.dtype for one in first} == {"bfloat16"}
    assert {50257, 128255, 128256, 262144} <= {problem.classes for problem in found}
    assert all(problem.rows % 16 == 0 for problem in found)
    assert [one.shape for one in found if one.small] == cases.CPU_SHAPES[:3]
    # Logits, gradient and the copies of an eager chain fit 78 GiB.
    assert max(problem.nbytes for problem in found) == 4 * 2**30
    quick = cases.problems(True, quick=True)
    assert quick[0].elements * 8 == pytest.approx(found[0].elements, rel=0.01) and len(quick) < len(found)


def test_input_sets():
    assert cases.input_sets(Problem((2**20, 1024), "bfloat16"), 50 * 2**20) == 1
    assert cases.input_sets(Problem((2**14, 1024), "bfloat16"), 50 * 2**20) == 7  # 32 MiB each, 200 MiB wanted
    assert cases.input_sets(Problem((8, 8), "bfloat16"), 50 * 2**20) == 64


@pytest.mark.parametrize("classes", [*cases.CLASSES, 3000])
def test_few_rows_are_specialised_like_many(classes):
    many = cases.with_classes(classes, "bfloat16", 2**30)
    few = ahead.few_rows(many)
    assert few.rows <= many.rows and few.rows <= 2**14
    assert (few.rows > arguments._FEW) == (many.rows > arguments._FEW)
    assert few.rows % 16 == many.rows % 16 == 0


def test_inputs_are_confident_on_every_other_row():
    one = make_inputs(Problem((64, 50), "float32"), False, CPU)
    (input,) = one.leaves
    assert input.is_leaf and input.requires_grad
    right = input.argmax(1) == one.target
    assert right[::2].all() and right[1::2].float().mean() < 0.3
    images = make_inputs(Problem((2, 5, 4, 6), "bfloat16"), True, CPU)
    assert images.target.shape == images.upstream.shape == (2, 4, 6)
    assert images.leaves[0].abs().max() <= 1


def test_take_turns_counts_only_what_it_times():
    calls = []
    timings = measure.take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.0, CPU)
    assert set(timings) == {"a", "b"}
    turns, steps = timings["a"].turns, timings["a"].steps_per_turn
    assert turns == 3
    assert calls.count("a") == 2 + turns * (steps + 1)  # two to calibrate, one to warm up each turn


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux keeps the peak")
def test_peak_memory_is_of_the_step():
    def step():
        torch.ones(2**24).sum()  # 64 MiB, freed when it ends

    assert 60e6 < measure.peak_memory(step, CPU) < 80e6
    assert measure.peak_memory(lambda: None, CPU) < 4e6


# ---- everybody computes the same loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4), ("bfloat16", 0.1)])
def test_peers_compute_the_same_loss(name, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(peers, "CHUNK", 500)  # several chunks
    catalogue = peers.losses(CPU)
    inputs = make_inputs(Problem((32, 50), dtype), catalogue[name].cosines, CPU)
    wanted = peers.expected(peers.ours(CPU, "reference")[name], inputs, 50)
    assert len(wanted.gradients[0]) == 10
    for function in (catalogue[name].eager, peers.ours(CPU, "cpu")[name]):
        assert peers.disagreement(function, inputs, wanted) < tolerance
    assert inputs.leaves[0].grad is None


@pytest.mark.parametrize("extra", [torch.sum, lambda zeros: zeros.square().sum().sqrt()], ids=["one", "nan"])
def test_disagreement_sees_a_gradient(extra):
    """Where the loss is right: the gradient of nothing is 1, or NaN."""
    inputs = make_inputs(Problem((8, 5), "float64"), False, CPU)
    wanted = peers.expected(peers.ours(CPU, "reference")["cross_entropy"], inputs, 5)

    def shifted(input, target):
        return F.cross_entropy(input, target) + extra(input - input.detach())

    assert not peers.disagreement(shifted, inputs, wanted) < 0.1


@pytest.mark.parametrize("by", ["reference", None])
def test_a_backend_is_measured_by_its_name(by, monkeypatch):
    asked = []

    def choose(device, backend, *others):
        asked.append(backend)
        return "reference"

    monkeypatch.setattr(call, "choose", choose)
    monkeypatch.setattr(fast_path, "loss", None)  # which asks for what it has not served yet
    for name, function in peers.ours(CPU, by).items():
        one = make_inputs(Problem((4, 5), "float32"), peers.losses(CPU)[name].cosines, CPU)
        function(*one.leaves, one.target)
    assert set(asked) == {by} and len(asked) >= len(LOSSES)


def test_the_lists_of_others_are_measured_as_they_stand():
    def problems(name):
        return plan_of(parse(["--set", name]), CPU, ["cpu"]).problems

    assert [str(one) for one in problems("tritonbench")][::5] == ["16384x4096 float32", "16384x131072 float32"]
    assert len(problems("helion")) == len(set(problems("helion"))) == 21
    assert len(problems("genai_layers")) == 11 and str(problems("genai_layers")[-1]) == "8192x262144 bfloat16"
    assert [one.sizes for one in problems("trl")] == [(16384, 2048, 248320), (4096, 2048, 248320)]


def test_edges_are_where_the_kernels_have_them():
    """Pairs of sizes, one on either side of each number in the sources."""

    def number(file, name):
        said = re.search(rf"\b{name} = ([^;,]+)", (ROOT / "csrc" / file).read_text())[1]
        return eval(said.replace("int64_t", "").replace("size_t", ""))

    grain, per_row = (number("library_cpu.cpp", name) for name in ("GRAIN", "PER_ROW"))
    kept, streamed = number("cpu/buffers.h", "BUFFER_FROM"), number("library_cpu.cpp", "STREAM_FROM")
    assert kept == buffers.BUFFER_FROM
    vectors, in_place = number("cpu/kernels.cpp", "LONG_ROW"), number("cpu/kernels.cpp", "SHORT_ROW")
    fetched = number("cpu/kernels.cpp", "ROW_IN_CACHE")
    crossed = 0
    for (few, below), (more, above) in zip(cases.CPU_EDGES[::2], cases.CPU_EDGES[1::2], strict=True):
        if few != more:
            assert few <= grain // (below + per_row) + 1 < more
        else:
            crossed += (below < vectors <= above) + (below < in_place <= above) + (4 * below <= fetched < 4 * above)
            crossed += sum(4 * few * below < edge <= 4 * few * above for edge in (kept, streamed))
    assert crossed == 5


@pytest.mark.parametrize(("peer", "module"), [("liger", "liger_kernel"), ("quack", "quack")])
def test_a_peer_is_optional(peer, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert peers.INSTALLED[peer]() is None


def test_quack_where_it_is_installed(monkeypatch):
    package, module = types.ModuleType("quack"), types.ModuleType("quack.cross_entropy")
    module.cross_entropy = lambda x, target, reduction="none": reduction
    monkeypatch.setitem(sys.modules, "quack", package)
    monkeypatch.setitem(sys.modules, "quack.cross_entropy", module)
    assert peers.INSTALLED["quack"]()(None, None) == "mean"


def test_who_takes_part_where():
    gpu = functools.partial(peers.peers_at, kind="cuda")
    assert gpu(Problem((8368, 128256), "bfloat16"), "cross_entropy") == ["eager", "liger", "quack", "compile"]
    assert gpu(Problem((8368, 50257), "bfloat16"), "cross_entropy") == ["eager", "liger"]
    assert gpu(Problem((8368, 50257), "bfloat16"), "arcface") == ["eager"]
    assert gpu(Problem((2**20, 10), "bfloat16"), "cross_entropy") == []
    assert gpu(Problem((128, 10), "float32"), "cross_entropy") == ["eager"]
    assert peers.peers_at(Problem((128, 10), "float32"), "arcface", "cpu") == ["eager", "compile"]
    assert peers.peers_at(Problem((128, 10), "float32"), "focal", "cpu") == ["eager"]


# ---- that it runs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch):
    """The CPU's kernels under the names of a GPU's backends, its problems small."""
    original, asked = peers.ours, set()

    def ours(device, by):
        asked.add(by)
        return original(device, "cpu" if by in options.ON_GPU else by)

    for module in (peers, ahead, smoke, tune):
        monkeypatch.setattr(module, "ours", ours)
    monkeypatch.setattr(cases, "SMALL", 200)
    monkeypatch.setattr(Plan, "seconds", lambda plan, problem: 0.0)
    return asked


def plan(**changes):
    """What is measured, on a CPU and in no time."""
    problems = [Problem((16, 1000), "bfloat16"), Problem((2, 5, 4, 6), "float32"), Problem((16, 10), "float32")]
    return Plan(CPU, ["triton", "cuda"], LOSSES[:6], ["eager"], MODES, problems)._replace(**changes)


def measured(plan):
    """A run of it, and how many timings there were at each save."""
    saved = []
    run = measure.measure(plan, Run(), lambda run: saved.append(len(run.timings)), lambda what: None)
    return run, saved


def test_measures(stand_in, tmp_path, monkeypatch):
    monkeypatch.setitem(peers.INSTALLED, "liger", lambda: F.cross_entropy)
    monkeypatch.setattr(peers, "peers_at", lambda problem, loss, kind: ["eager"] + ["liger"] * (loss == LOSSES[0]))
    run, saved = measured(plan(peers=["eager", "liger"], widths=[8, 3]))
    assert run.failures == run.skipped == []
    assert saved == sorted(saved) and saved[-1] == len(run.timings)
    counts = {by: sum(key.by == by for key in run.timings) for by in ("triton", "cuda", "eager", "liger", "clone")}
    ours = 2 * 6 * 3 + 6  # steps alone of the small problem
    assert counts == {"triton": ours, "cuda": ours, "eager": 18, "liger": 3, "clone": 3}
    assert {"triton", "cuda", "reference"} <= stand_in
    assert all(0 <= apart < 0.1 for apart in run.apart.values()) and len(run.apart) == 3 * (6 * 3 + 1)
    # Two layers: weight and bias, each with two averages and a step; so many tensors of their mean size.
    state = Problem((16, (3 * (64 + 8 + 9 + 3) + 4) // 16), "float32")
    assert {(key.loss, key.by) for key in run.timings if key.problem == state} == {
        ("save", "multi_copy_"), ("restore", "multi_copy_"), ("refused", "multi_copy_"), ("save", "_foreach_copy_")
    }  # fmt: skip
    found = Report({**report.describe(CPU, ["triton", "cuda"]), "device_type": "cuda"}, [run])
    assert all(found.fraction(key) > 0 for key in run.timings)
    for what in ("forward %", "step %", "split %", "eager/ours", "liger/ours", "Targets: "):
        assert what in text(found)
    written(found, tmp_path)


def test_the_state_is_of_the_size_asked_for():
    widths = measure.STATE_WIDTHS
    assert len(measure.training_state(widths, torch.device("meta"))) == 1000
    assert abs(sum(width * width + width for width in widths) / 100e6 - 1) < 0.02


def test_what_fails_or_is_another_loss_is_said_and_the_rest_measured(stand_in, monkeypatch):
    def broken(input, target, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore than there is")

    whole = peers.ours
    other = {"modulated": broken, "arcface": lambda *inputs, **options: 1.01 * whole(CPU, "cuda")["arcface"](*inputs)}
    monkeypatch.setattr(peers, "ours", lambda device, by: whole(device, by) | (other if by == "cuda" else {}))
    everything = plan(names=LOSSES[:3], problems=[Problem((16, 20), "float32")], peers=[])
    run, _ = measured(everything)
    oom, wrong = run.failures
    assert "modulated of cuda: OutOfMemoryError: CUDA out of memory. Tried to allocate" in oom and "\n" not in oom
    assert "arcface of cuda: ValueError: another loss than the reference's, 1.0e-02 apart: not timed" in wrong
    assert {key.loss for key in run.timings if key.by == "cuda"} == {"cross_entropy"}
    assert "FAILED: 16x20" in text(Report(report.describe(CPU, ["cuda"]), [run]))
    late, _ = measured(everything._replace(until=-math.inf, widths=[4]))
    assert late.skipped == ["training state", "16x20 float32"] and not late.timings


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear(dtype, monkeypatch):
    """Everybody's linear head is held against the whole chain; time, memory and the products stand together."""
    monkeypatch.setattr(Plan, "seconds", lambda plan, problem: 0.0)
    monkeypatch.setattr(peers, "CHUNK", 1000)
    problem = Problem((64, 300), dtype, 16)
    run, _ = measured(plan(backends=["cpu"], names=LOSSES, problems=[problem], peers=["eager", "chunked64"]))
    assert run.failures == [] and all(apart < peers.TOLERANCE[dtype] for apart in run.apart.values())
    asked = {(key.loss, key.by) for key in run.timings}
    ours = {(loss, by) for loss in linear.LOSSES for by in linear.STRATEGIES}
    others = {("cross_entropy", "eager"), ("arcface", "eager")}
    if linear.chunked(64) is not None:  # torch 2.11 has no such function
        others.add(("cross_entropy", "chunked64"))
    assert asked == ours | others | {("-", "products")}
    assert (
        set(run.memory) == {key for key in run.timings if key.loss != "-"} or not Path("/proc/self/clear_refs").exists()
    )
    found = Report(report.describe(CPU, ["cpu"]), [run])
    key = Key(problem, "cross_entropy", "step", "linear")
    products = run.timings[Key(problem, "-", "step", "products")].median
    assert found.fraction(key) == pytest.approx(products / run.timings[key].median)
    assert re.search(r"arcface +tiles ", text(found)) and "products" in text(found)


def test_targets_of_a_linear_head():
    problem = Problem((1024, 200000), "float32", 64)
    ours, tiles, eager = (Key(problem, "cross_entropy", "step", by) for by in ("linear", "tiles", "eager"))
    products = Key(problem, "-", "step", "products")
    run = Run({ours: timing(1.0), tiles: timing(4.0), eager: timing(5.0), products: timing(0.9)}, {problem: 1e9})
    run.memory = {ours: 200_000_000, tiles: 10_000_000}
    wanted = {one.what.split(": ")[1]: (one.value, one.reached) for one in check(Report(ON_CPU, [run]))}
    assert wanted == {
        "linear / eager": (0.2, True),
        "linear in MB": (200.0, False),
        "tiles / eager": (0.8, False),
        "tiles in MB": (10.0, True),
    }


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
def test_runs_on_the_kernels_themselves(monkeypatch):
    """Triton's interpreted, CUDA's over fibers."""
    there = [name for name in options.ON_GPU if mlkernels.available_backends()[name] is None]
    assert "triton" in there
    monkeypatch.setattr(Plan, "seconds", lambda plan, problem: 0.0)
    monkeypatch.setattr(cases, "SMALL", 0)
    run, _ = measured(plan(backends=there, names=["piecewise"], problems=[Problem((16, 20), "bfloat16")], peers=[]))
    assert run.failures == [] and sum(key.by in there for key in run.timings) == 3 * len(there)
    monkeypatch.setattr(tiles, "_sizes", tiles._sizes)
    table = {"classes_side_by_side": [[2048, 2048, 4], [0, 256, 8]], "rows_side_by_side": [[0, 256, 4]]}
    copied = torch.zeros(64), torch.zeros(64)
    kernel = rows.visit
    try:
        row = tune.Candidate("classes_side_by_side", 2048, (1024, 4), (40,))
        tune.prepare(table, row, "cpu", 640)
        assert tiles.tile("sm_90", 40, False, 2, 8, True)[:5] == (1, 16, 8, 8, 4)
        images = tune.Candidate("rows_side_by_side", 0, (128, 4), (5,))
        assert tune.rate(table, images, copied, 80) > 0
        assert rows.visit is kernel
    finally:
        tiles.tile.cache_clear()


def test_fresh_processes(tmp_path, capsys):
    """Each a process of its own, which imports anew: the best and the worst of them are said."""
    few = ["--shapes", "8x5,6x40", "--dtype", "float32,bfloat16", "--losses", "cross_entropy,poly1", "--peers", "eager"]
    assert main([*few, "--quick", "--device", "cpu", "--processes", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "8x5 float32" in printed and "poly1" in printed and "of 2 processes" in printed
    assert all(title in printed for title in ("best", "worst", "eager/ours", "eager least"))
    (data,) = tmp_path.glob("*.json")
    found = json.loads(data.read_text())
    assert found["threads"] == torch.get_num_threads() and found["versions"]["torch"] == torch.__version__
    assert len(found["apart"]) == 2 * 2 * 4  # the first process checks for all
    rows = {(tuple(one["shape"]), one["dtype"], one["loss"], one["by"]): one["processes"] for one in found["timings"]}
    for shape, dtype in itertools.product([(8, 5), (6, 40)], ["float32", "bfloat16"]):
        for loss, by in (("cross_entropy", "cpu"), ("poly1", "cpu"), ("poly1", "eager"), ("-", "clone")):
            both = rows[shape, dtype, loss, by]
            assert len(both) == 2 and both[0] != both[1] and all(0 < one["best"] <= one["median"] for one in both)


def test_what_the_options_ask_for():
    few = plan_of(parse(["--quick"]), CPU, ["cpu"])
    assert few.modes == ["step"] and few.names == peers.HEADLINE and "compile" not in few.peers
    assert few.patience == 1 / 3 and few.widths == () and few.until == math.inf
    whole = plan_of(parse([]), torch.device("cuda"), ["triton"])
    assert whole.modes == MODES and whole.names == LOSSES[:6] and whole.peers == report.PEERS
    assert whole.problems == cases.problems(True) and len(whole.widths) == 125 and whole.until < math.inf
    own = plan_of(parse(["--shapes", "4x5x6,7x8", "--dtype", "float16", "--modes", "split"]), CPU, ["cpu"])
    assert own.problems == [Problem((4, 5, 6), "float16"), Problem((7, 8), "float16")] and own.modes == ["split"]
    for wrong in (["--shapes", "4"], ["--losses", "nothing"], ["--dtype", "int8"]):
        with pytest.raises(SystemExit):
            parse(wrong)


def test_schedule_prints_its_parts(capsys, monkeypatch):
    monkeypatch.setattr(schedule, "NETWORKS", dict([next(iter(schedule.NETWORKS.items()))]))
    schedule.main(["--seconds", "0", "--device", "cpu"])
    printed = capsys.readouterr().out
    for part in ("with MILS, no attempt", "an attempt, rejected", "restore", "accepted / ", "rejected / "):
        assert part in printed
    assert "others kept" in printed


def test_compiles_in_other_processes():
    said = []
    ahead.compile_ahead([functools.partial(math.sqrt, 4.0), functools.partial(math.sqrt, -1.0)], 60, said.append)
    assert len(said) == 1 and "failed 1 times: ValueError" in said[0]
    work = ahead.specialised(list(smoke.TINY.values())[:2], ["cross_entropy", "arcface"], "cpu", MODES)
    assert [job.args[-2:] for job in work] == 2 * [("triton", [mode]) for mode in MODES[:3]]


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
    jobs = []
    replay = measure.captured(lambda: jobs.append("ran"))
    replay()
    assert Graph.replays == 1 and len(jobs) == 4  # three to warm up, one to capture


# ---- what comes out --------------------------------------------------------------------------------------------------

HEADER = {
    "device": "NVIDIA Nothing 1",
    "device_type": "cuda",
    "backends": ["triton", "cuda"],
    "cpus": 16,
    "threads": 16,
    "isa": None,
    "versions": {"torch": "2.11.0", "triton": None},
    "commit": None,
    "uncommitted_changes": False,
    "date": "2026-11-22T17:00:00+00:00",
}
ON_CPU = {
    **HEADER,
    "device": "a CPU",
    "device_type": "cpu",
    "backends": ["cpu"],
    "cpus": 2,
    "threads": 2,
    "isa": "avx2",
}


def timing(seconds):
    return Timing(seconds, seconds, 3, 1)


def test_two_results_side_by_side(tmp_path, capsys):
    def stored(name, times):
        key = Key(Problem((4, 5), "float32"), "cross_entropy", "step", "cpu")
        runs = [Run(timings={key: timing(time)}, bandwidth={key.problem: 1e9}) for time in times]
        return str(report.write_json(report.as_json(Report(HEADER | {"date": name}, runs)), tmp_path))

    a, b = stored("2026-01-01T00:00:00", [1.0, 1.1]), stored("2026-01-02T00:00:00", [2.0, 2.2])
    assert main(["compare", a, b]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "cross_entropy" in line]
    assert re.search(r"1\.05 s +2\.1 s +2\.000  slower$", line), line
    assert main(["compare", a, a]) == 0
    assert "slower" not in capsys.readouterr().out


def written(found, folder):
    """JSON and picture of a report."""
    path = report.write_json(report.as_json(found), folder)
    data = json.loads(path.read_text())
    assert data["device"] == found.header["device"] and len(data["timings"]) == len(found.measured())
    pytest.importorskip("matplotlib")
    charts.figure(report.load(path)).savefig(folder / "picture.png")
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".png"]
    return data


def made_up(fraction):
    """A GPU's run of everything, each at this fraction of its target's bound."""
    run = Run()
    state = Problem((1000, 250000), "float32")
    for problem in [*cases.problems(True), state]:
        run.bandwidth[problem] = 3e12
    for problem in cases.problems(True):
        for loss, by in itertools.product(LOSSES[:5], options.ON_GPU):
            for mode in ("step", "graph") if problem.small else MODES[:3]:
                of_copy = fraction * (report.wanted_fraction(problem, mode, by) or 0.5)
                seconds = floor_bytes(problem, mode) / (of_copy * 3e12)
                if problem.small:
                    seconds = {"triton": 15e-6, "cuda": 10e-6}[by] / fraction if mode == "graph" else 50e-6
                run.timings[Key(problem, loss, mode, by)] = timing(seconds)
        if problem.small:
            run.timings[Key(problem, "cross_entropy", "step", "eager")] = timing(50e-6 * fraction)
    own = Key(Problem((8368, 128256), "bfloat16"), "cross_entropy", "step", "cuda")  # faster: 0.92 against 0.5
    for peer, bound in (("eager", 3), ("compile", 1.2), ("liger", 1.6), ("quack", 1.0)):
        run.timings[own._replace(by=peer)] = timing(run.timings[own].median * bound * fraction)
    for what in ("save", "restore"):
        key = Key(state, what, "step", "multi_copy_")
        run.timings[key] = timing(floor_bytes(state, "step") / (0.85 * fraction * 3e12))
    run.timings[Key(state, "refused", "graph", "multi_copy_")] = timing(5e-6 / fraction)
    return Report(HEADER, [run])


def test_targets_of_a_gpu_are_judged_the_right_way_round():
    good, bad = check(made_up(1.01)), check(made_up(0.5))
    # Of 28 problems, 20 have a target in each of 15 steps. Of the eight longer ones, C = 50257 and 128255 in two types
    # have none but CUDA's step in bfloat16, and the other two the split one as well.
    triton = 20 * 15 + 2 * 2 * 5
    cuda = 20 * 15 + 2 * 2 * 5 + 4 * 5
    assert sum(report.OF_COPY in one.what and "state" not in one.what for one in good) == triton + cuda
    # Peers; graphs of small problems, two backends, and eager beside CUDA; three copies.
    assert len(good) == triton + cuda + 4 + 3 * 2 * 5 + 3 + 3 == len(bad)
    assert all(one.reached and "reached" in str(one) for one in good)
    assert not any(one.reached for one in bad)
    assert all("missed by 2.00x" in str(one) for one in bad)
    assert not Outcome("", math.nan, 1.0, False).reached


def test_targets_of_a_cpu_are_judged_the_right_way_round():
    def made_up(ours, other):
        run = Run()
        for problem in cases.problems(False):
            run.bandwidth[problem] = 2 * problem.nbytes
            run.timings[Key(problem, "-", "step", "clone")] = timing(1.0)
            for loss, by in itertools.product(LOSSES, ("eager", "compile", "cpu")):
                run.timings[Key(problem, loss, "step", by)] = timing(ours if by == "cpu" else other)
        return Report(ON_CPU, [run])

    fast, slow = check(made_up(1.0, 20.0)), check(made_up(10.0, 1.0))
    assert len(fast) == len(slow) == 30
    assert all(one.reached and one.missed_by <= 1 for one in fast)
    missed = {one.what: one for one in slow if not one.what.endswith("float32")}
    assert not any(one.reached for one in missed.values())
    of_copy, compiled = (missed[f"1024x8000 float32, modulated: {what}"] for what in ("cpu / copy", "compile / cpu"))
    assert of_copy.value == pytest.approx(10.0) and of_copy.missed_by == pytest.approx(10 / 1.9)
    assert compiled.value == pytest.approx(0.1) and compiled.missed_by == pytest.approx(27.0)
    bad = made_up(10.0, 1.0)
    assert "missed by 27.00x" in text(bad) and "WARNING" not in text(bad)
    bad.runs[0].load = measure.Load(others_busy=0.5)
    assert "not valid" in text(bad)
    assert "not valid" in text(Report({**ON_CPU, "backends": ["reference"]}, bad.runs[:1]))


@pytest.mark.parametrize(
    ("classes", "dtype", "mode", "by", "bound"),
    [
        (1000, "bfloat16", "step", "cuda", 0.92),
        (262144, "bfloat16", "step", "cuda", 0.92),
        (262144, "float32", "step", "cuda", None),
        (1000, "bfloat16", "step", "triton", 0.90),
        (50257, "bfloat16", "step", "triton", None),
        (128256, "bfloat16", "split", "triton", 0.85),
        (100, "bfloat16", "step", "cuda", 0.80),
        (1000, "bfloat16", "step", "liger", None),
    ],
)
def test_what_is_asked_of_the_bandwidth(classes, dtype, mode, by, bound):
    assert report.wanted_fraction(Problem((2**20, classes), dtype), mode, by) == bound


def test_images_are_asked_what_short_rows_are():
    assert report.wanted_fraction(Problem((2, 1000, 512, 8), "bfloat16"), "step", "cuda") == 0.90


def test_times_are_medians_and_ratios_those_within_a_process():
    key = Key(Problem((2048, 1000), "bfloat16"), "cross_entropy", "step", "triton")
    runs = []
    for triton, cuda, quack in ((2.0, 4.0, 3.0), (20.0, 40.0, 60.0), (4.0, 8.0, 8.0)):
        timings = {key: timing(triton), key._replace(by="cuda"): timing(cuda), key._replace(by="quack"): timing(quack)}
        runs.append(Run(timings, {key.problem: 1e6}))
    found = Report(HEADER, runs)
    assert found.median(key) == 4.0 and found.ratio(key, key._replace(by="quack")) == 2.0
    assert found.fastest(key._replace(by="quack")) == key
    (ratio,) = [one for one in check(found) if "quack" in one.what]
    assert ratio.what.endswith("quack / triton") and ratio.value == 2.0
    # Step, best and worst, of copy; F.cross_entropy was not measured; quack in the middle and at its fastest.
    line = r"cross_entropy +triton +4000.00 ms +2000.00 ms +20000.00 ms +205% +- +2.00 +1.50\n"
    assert re.search(line, text(found))


def test_table_and_files(tmp_path):
    found = made_up(0.5)
    found.runs[0].failures.append("16x10 float32, arcface cuda: RuntimeError: broken")
    table = text(found)
    assert "1073741x1000 bfloat16" not in table and "1073728x1000 bfloat16" in table
    assert "8x19x1024x2048 float32" in table and "copy 3000.0 GB/s" in table
    assert "triton and cuda" in table and "FAILED: 16x10" in table and "Targets: 0 of 700 reached" in table
    assert max(map(len, table.splitlines())) < 170
    data = written(found, tmp_path)
    assert not any(one["reached"] for one in data["targets"]) and data["schema"] == 3
    assert [path.name for path in tmp_path.glob("*.json")] == ["nvidia-nothing-1-2026-11-22T170000.json"]


def test_an_empty_run_can_be_written(tmp_path):
    assert "NVIDIA Nothing" in text(Report(HEADER, []))
    written(Report(HEADER, [Run()]), tmp_path)


# ---- the first thing on an unknown GPU -------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["cpu", "cuda"])
def test_smoke(by):
    """Against float64, on the CPU's kernels and on CUDA's over fibers; the longest rows would take a while."""
    if mlkernels.available_backends()[by] is not None:
        pytest.skip(f"no {by}")
    names = ["short", "odd", "apart", "apart16"]
    said = []
    assert smoke.smoke(CPU, [by], names, smoke.LOSSES, smoke.MODES, said.append) == (18 * len(names) + 1, 0)
    assert said == []


def test_smoke_of_linear(monkeypatch, capsys):
    """Each as in float64, in several chunks and tiles; what is wrong is named, with what repeats it."""
    if mlkernels.available_backends()["cpu"] is not None:
        pytest.skip("no cpu")
    said = []
    assert smoke.smoke(CPU, ["cpu", "cuda"], [], [], [], said.append, list(smoke_linear.STEPS)) == (27, 0)
    assert said == []
    right = mlkernels.linear_softmax_loss
    monkeypatch.setattr(mlkernels, "linear_softmax_loss", lambda x, *rest, **options: right(x * 1.01, *rest, **options))
    assert (
        smoke.main(["--device", "cpu", "--backends", "cpu", "--linear", "arcface-tiles-float16"]) == 0
    )  # of directions
    assert smoke.main(["--device", "cpu", "--backends", "cpu", "--linear", "two_scale-rows-bfloat16"]) == 1
    text = capsys.readouterr().out
    assert "1 steps are right" in text and "1 of 1 steps failed" in text
    assert "FAILED cpu linear head two_scale-rows-bfloat16 (150x16x3001): wrong loss: off by" in text
    assert "python -m bench.smoke --backends cpu --linear two_scale-rows-bfloat16" in text


def test_smoke_of_linear_on_triton(monkeypatch):
    """The kernels, interpreted, of little."""
    if mlkernels.available_backends()["triton"] is not None:
        pytest.skip("no Triton")
    for name, value in (("ROWS", 16), ("WIDTH", 8), ("CLASSES", 61), ("MEMORY", 3000)):
        monkeypatch.setattr(smoke_linear, name, value)
    for name in ("two_scale-tiles-float16", "arcface-stored-bfloat16"):
        assert smoke_linear.check("triton", name, CPU) is None


def test_smoke_says_what_is_wrong_and_how_to_go_on(monkeypatch):
    whole = peers.ours

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
    assert smoke.smoke(CPU, ["triton", "cuda"], ["short"], losses, ["step"], said.append) == (5, 2)
    text = "\n".join(said)
    assert "FAILED cuda short (33x100 bfloat16) modulated step: RuntimeError: CUDA error: misaligned address" in text
    assert "compute-sanitizer --tool memcheck" in text and "at length" not in text
    assert "FAILED triton short (33x100 bfloat16) arcface step: wrong loss: off by 0.001" in text
    assert "python -m bench.smoke --backends triton --problems short --losses arcface --modes step" in text


def test_smoke_ends_where_the_device_is_broken(monkeypatch):
    class Broken:
        type = "cuda"

    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(smoke, "make_inputs", lambda problem, cosines, device: make_inputs(problem, cosines, CPU))
    monkeypatch.setattr(smoke, "ours", lambda device, by: peers.ours(CPU, "reference"))
    said = []
    assert smoke.smoke(Broken(), ["cuda"], ["short"], ["modulated"], smoke.MODES, said.append) == (1, 1)
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


# ---- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def a_gpu(monkeypatch):
    """The CPU taken for one, nothing compiled ahead."""
    from bench import __main__ as command

    for module in (command, smoke):
        monkeypatch.setattr(module, "device_of", lambda asked, module: CPU)
        monkeypatch.setattr(module, "is_gpu", lambda device: True)
    monkeypatch.setattr(options, "is_gpu", lambda device: True)
    monkeypatch.setattr(options, "usable", lambda device: ["triton", "cuda"])
    for module in (ahead, smoke):
        monkeypatch.setattr(module, "compile_ahead", lambda work, seconds, say: None)
    for name, value in (("FIRST", [10]), ("CLASSES", [10]), ("ELEMENTS", 2**12), ("SEGMENTATION", (2, 5, 8, 8))):
        monkeypatch.setattr(cases, name, value)
    monkeypatch.setattr(command, "STATE_WIDTHS", [4])


def test_command(stand_in, a_gpu, tmp_path, capsys):
    few = ["--quick", "--losses", "cross_entropy,arcface", "--peers", "eager", "--out", str(tmp_path)]
    assert main(few) == 0
    printed = capsys.readouterr()
    assert "training state" in printed.err and "48x10 bfloat16" in printed.out and "multi_copy_" in printed.out
    assert sorted(path.suffix for path in tmp_path.iterdir()) in ([".json"], [".json", ".png"])
    assert main(["--compile", *few]) == 0
    assert capsys.readouterr().out == ""
    one = ["--problems", "short", "--losses", "arcface"]
    assert smoke.main(one) == 0
    assert "smoke: 7 steps are right" in capsys.readouterr().out
    assert smoke.main(["--backends", "cuda", *one]) == 0
    assert "4 steps are right" in capsys.readouterr().out


def test_a_backend_that_is_asked_for_and_not_there(stand_in, a_gpu, monkeypatch, capsys):
    monkeypatch.setattr(options, "usable", lambda device: ["triton"])
    one = ["--problems", "short", "--losses", "arcface", "--modes", "forward"]
    assert smoke.main(["--backends", "triton,cuda", *one]) == 1  # the rest runs
    printed = capsys.readouterr()
    assert "no backend 'cuda'" in printed.err and "2 steps are right" in printed.out and "(triton)" in printed.out
    assert smoke.main(one) == 0


@without_gpu
@pytest.mark.parametrize("module", ["bench", "bench.smoke", "bench.tune"])
def test_without_a_gpu_it_says_so(module, capsys):
    asked = [] if module == "bench.tune" else ["--device", "cuda"]
    assert {"bench": main, "bench.smoke": smoke.main, "bench.tune": tune.main}[module](asked) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err == f"{module}: no GPU here (torch.cuda.is_available() is False)\n"


SCRIPT = str(ROOT / "bench/gpu.sh")
LIMITS = {"first": 210, "second": 420, "linear": 300, "racecheck": 200, "tune": 300}


def dry_run(call, **more):
    environment = {**os.environ, "OUT": "nowhere", "PYTHON": "a-python", **more}
    return subprocess.run([SCRIPT, call, "--dry-run"], capture_output=True, text=True, env=environment, timeout=20)


def test_dry_run_of_the_script(tmp_path):
    said = "".join(dry_run(call, OUT=str(tmp_path / "out")).stdout for call in LIMITS)
    for what in (
        "exec a-python csrc/build.py",
        "a-python -m mlkernels",
        "a-python -m bench.smoke --device cuda --backends cuda\n",
        "a-python -m bench.smoke --device cuda --backends triton\n",
        "a-python -m bench --device cuda --quick",
        "tests/test_gpu.py --seconds 52 -k not triton",
        "tests/test_gpu.py --seconds 72 -k triton",
        "a-python -m bench --device cuda --compile",
        "compute-sanitizer --tool memcheck",
        "compute-sanitizer --tool racecheck",
        "a-python -m bench.schedule",
        "a-python -m bench.tune",
        "a-python -m bench --device cuda --suites linear",
        f"a-python -m bench --device cuda --seconds 172 --out {tmp_path / 'out'}",
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
        assert {name: int(seconds) for name, seconds, _ in steps}["measure"] > BUDGET


def fake_machine(tmp_path, call, fails, library=True, hangs="nothing", changed=lambda script: script):
    """The script, changed, in a folder of its own; a "python" says what it was asked for, and fails or hangs at it."""
    tools, place = tmp_path / "tools", tmp_path / "project"
    tools.mkdir()
    (place / "bench").mkdir(parents=True)
    (place / "mlkernels/backends/triton").mkdir(parents=True)
    for table in ("triton/sizes.json", "choice.json"):
        (place / "mlkernels/backends" / table).write_text("{}")
    (place / "bench/gpu.sh").write_text(changed(Path(SCRIPT).read_text()))
    (place / "bench/gpu.sh").chmod(0o755)
    built = "touch mlkernels/_cuda.abi3.so" if library else "echo 'nvcc failed: no space' > mlkernels/_cuda.error.txt"
    (tools / "python").write_text(
        f"""#!/bin/sh
echo "asked: $* for $MLKERNELS_CUDA_ARCHS, $MLKERNELS_CUDA"
case "$*" in {hangs}) exec sleep 30 ;; {fails}) exit 3 ;; esac
case "$*" in csrc/build.py) {built} ;; *--out*) touch "$OUT/a.json" "$OUT/a.png" ;; esac
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
        ("first", "*smoke*backends?cuda*", "smoke-cuda"),
        ("first", "nothing", None),
        ("second", "*--compile*", "compile"),  # beside the build, and waited for
        ("second", "nothing", None),
        ("linear", "nothing", None),
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
        "linear": ["build", "measure-linear"],
        "racecheck": ["build", "racecheck"],
        "tune": ["build", "tune"],
    }[call]
    places = [max(done.stdout.find(f"== {what}, up"), done.stdout.find(f"== {what} ended")) for what in order]
    assert places == sorted(places) and places[0] > 0
    # At most eight come back from a machine.
    assert len(files) <= 4 and f"{call}.log" in files
    assert ("a.json" in files) == (call in ("first", "second", "linear"))
    assert ("sizes.json" in files) == (call == "tune")
    assert ("sanitizer: --tool" in done.stdout) == (call in ("second", "racecheck"))


def test_without_a_library_nothing_more_is_run(tmp_path):
    done, files = fake_machine(tmp_path, "first", "nothing", library=False)
    assert done.returncode == 1 and files == ["first.log"]
    assert "nvcc failed: no space" in done.stdout and "mend the build" in done.stdout.splitlines()[-1]
    assert "bench.smoke --device cuda --backends cuda" not in done.stdout


def test_a_step_that_hangs_is_stopped(tmp_path):
    """And what comes after the call's limit is not begun."""

    def late(script):
        script = script.replace("step machine 10", "step machine 1")
        return script.replace("step smoke-cuda", "SECONDS=206\n        step smoke-cuda")  # as late as that

    done, files = fake_machine(tmp_path, "first", "nothing", hangs="'-m mlkernels'", changed=late)
    assert "machine: stopped after 1 s" in done.stdout
    assert "smoke-cuda: no time left" in done.stdout and "tests: no time left" in done.stdout
    assert done.returncode == 1 and "FAILED: machine smoke-cuda smoke-triton" in done.stdout.splitlines()[-1]
    # A step that is cut off has kept what it had.
    assert files == ["first.log"] and "asked: -m mlkernels" in (tmp_path / "out/first.log").read_text()


REHEARSED = """#!/bin/sh
case "$*" in
    csrc/build.py) exit 0 ;;
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
    environment |= {"PYTHONPATH": str(ROOT / "tests/rehearsal"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([SCRIPT, call], capture_output=True, text=True, env=environment, timeout=LIMITS[call] + 60)
    files = [path.suffix for path in (tmp_path / "out").iterdir()]
    assert len(files) <= 8 and ".json" in files and ".log" in files
    # Without a GPU test_gpu.py has no tests, which is a failure; and a busy machine has no time for all.
    assert "are right on" in done.stdout if call == "first" else "MILS adds" in done.stdout
    assert "Error" not in done.stdout


# ---- tests for so many seconds ---------------------------------------------------------------------------------------


def test_in_so_many_seconds_each_function_has_its_turn(tmp_path):
    """Two processes; what failed, died and came in time is said, though others hang."""
    pytest.importorskip("xdist")
    (tmp_path / "test_these.py").write_text(
        """import os, time, pytest

@pytest.mark.parametrize("k", range(150))
def test_many(k):
    with open(f"{os.path.dirname(__file__)}/ran", "a") as file:
        file.write(f"{k}\\n")
    time.sleep(0.1)

def test_fails():
    assert 1 + 1 == 3, "no"

def test_dies():
    os._exit(7)

@pytest.mark.parametrize("k", range(3))
def test_hangs(k):
    time.sleep(k and 60)
"""
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        "-p",
        "bench.spread",
    ]
    command += ["-n", "2", "--maxschedchunk", "1", "--seconds", "10", "--max-worker-restart", "9"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode != 0
    assert "crashed while running 'test_these.py::test_dies'" in done.stdout
    assert "FAILED test_these.py::test_fails" in done.stdout and "KeyboardInterrupt" in done.stdout
    assert "2 failed" in done.stdout.splitlines()[-1] and "passed" in done.stdout.splitlines()[-1]
    ran = [int(line) for line in (tmp_path / "ran").read_text().split()]
    assert 0 in ran and 149 not in ran


def test_a_broken_device_ends_its_process(monkeypatch):
    from bench import spread

    ended = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(os, "_exit", ended.append)
    spread.pytest_runtest_teardown()
    assert ended == []

    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    spread.pytest_runtest_teardown()
    assert ended == [1]


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
    assert tune.problem_of(groups[4][0].table, 19, 2**28).shape == (53, 19, 512, 512)
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
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tiles, "_sizes", tiles._sizes)
    monkeypatch.setattr(tune, "usable", lambda device: ["triton"])  # and so no choice to measure
    assert tune.main([]) == 0
    sizes = json.loads(path.read_text())
    assert sizes["default"] == default
    assert [4096, 8] in [row[1:] for row in sizes["sm_90"]["rows_side_by_side"]]
    assert sizes["sm_90"]["measured"]["device"] and len(sizes["sm_90"]["measured"]["rows"]) > 4
    assert max(map(len, path.read_text().splitlines())) < 200
    # As tiles.py merges them.
    merged = {**sizes["default"], **sizes["sm_90"]}
    monkeypatch.setattr(tiles, "_sizes", lambda architecture: merged)
    tiles.tile.cache_clear()
    try:
        assert tiles.tile("sm_90", 1000, False, 2, 8, True).on_chip
        assert not tiles.tile("sm_90", 10**6, False, 2, 8, True).on_chip
    finally:
        tiles.tile.cache_clear()
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
    monkeypatch.setattr(tune, "usable", lambda device: ["triton", "cuda"])
    monkeypatch.setattr(tune, "compile_ahead", lambda work, seconds, say: None)
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
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
    monkeypatch.setattr(backends, "_why_not_on", lambda device, name: None)
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
    monkeypatch.setattr(tune, "usable", lambda device: ["triton"])
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    before = backends.CHOICE.read_text()
    assert tune.main(["--only", "choice"]) == 0
    assert "only ['triton'] can be used" in capsys.readouterr().out and backends.CHOICE.read_text() == before


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_limits_take_every_loss_in_every_form(monkeypatch):
    monkeypatch.setattr(limits, "SMALL", ((4, 3),))
    monkeypatch.setattr(limits, "LARGE", [Problem((4, 5), "bfloat16")])
    found = limits.small(0.02)["4x3 float32"]
    assert len(found) == 1 + 3 * len(limits.family()) and all(0 < one < math.inf for one in found.values())
    assert set(limits.large(0.0)["4x5 bfloat16"]) == {"copy", *limits.family()}


def test_limits_name_a_part_that_there_is_not(capsys):
    with pytest.raises(SystemExit):
        limits.main(["--parts", "small,heads"])
    assert "argument --parts: 'heads' is not one of small, large, linear" in capsys.readouterr().err


def test_small_linear_heads_agree_with_what_is_written_out(monkeypatch):
    monkeypatch.setattr(small_linear, "SHAPES", ((8, 4, 5),))
    found = limits.linear(0.0)["8×4×5"]
    ours = [name for name in found if not name.endswith(": eager")]
    assert set(found) == {name + by for name in ours for by in ("", ": eager")}
    assert len(ours) == 17 and {'focal, "none", bias', "log-probability and entropy"} < set(ours)
    monkeypatch.setitem(small_linear.KINDS, "focal", small_linear.KINDS["focal"]._replace(eager=F.cross_entropy))
    with pytest.raises(AssertionError, match="focal"):
        small_linear.steps((8, 4, 5))
    part = {"part": "linear", "others_busy": 0.0, "found": {"8×4×5": {"a": 3.0, "a: eager": 2.0}}}
    (verdict,) = limits.verdicts([part])
    assert verdict.missed == 1 and verdict.outcome.value == 1.5 and "| a | 1.50 |" in limits.text([part])


def test_limits_judge_the_worst_process(monkeypatch):
    monkeypatch.setattr(limits, "SMALL", ((4, 3),))
    monkeypatch.setattr(limits, "WANTED", {(4, 3): (1.0, 0.8)})
    monkeypatch.setattr(limits, "LARGE", [Problem((64, 1 << 20), "float32")])

    def small(numbers, trained):
        times = {"F.cross_entropy": 10.0, "a: numbers": numbers, "a: tensors": 10.0, "a: trained": trained}
        return {"part": "small", "found": {"4x3 float32": times}, "others_busy": 0.0}

    def large(part, step):
        return {
            "part": part,
            "found": {"64x1048576 float32": {"copy": 1.0, "a": step}},
            "others_busy": 0.5,
            "stolen": 0,
        }

    processes = [small(8.0, 10.0), small(12.5, 16.0), large("large", 1.2), large("large", 1.3), large("kept", 1.2)]
    judged = {
        f"{one.outcome.what} {one.outcome.wanted.rstrip()}": (not one.missed, round(one.outcome.value, 4))
        for one in limits.verdicts(processes)
    }
    assert judged == {
        "4x3 float32, numbers: times as fast as F.cross_entropy >= 1": (False, 0.8),
        "4x3 float32, tensors: times as fast as F.cross_entropy >= 0.8": (True, 1.0),
        "4x3 float32, trained: times as fast as F.cross_entropy >= 0.8": (False, 0.625),
        "4x3 float32, tensors and trained: of numbers <= 1.3": (True, 1.28),
        "64x1048576 float32: of a step whose memory is kept <= 1.1": (True, 1.0833),
        "64x1048576 float32: of a warm copy <= 1.25": (False, 1.3),
    }
    assert "NOT QUIET" in limits.text(processes) and "MISSED by 1 of 1; worst 0.80 (a)" in limits.text(processes)
