"""Which backend serves a call: by device, by number of classes, by what is there."""

import copy
import json
import warnings

import pytest
import torch

import mlkernels
from mlkernels import backends, call, fast_path
from mlkernels.backends import native

GPU = torch.device("cuda", 0)
TABLE = {
    "default": {
        "classes_side_by_side": [[100, "cuda"], [1000, "triton"], [0, "cuda"]],
        "rows_side_by_side": [[0, "triton"]],
    },
    "sm_90": {"classes_side_by_side": [[0, "cuda"]], "measured": {"device": "a GPU"}},
}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with a GPU, as it would be with these backends and this table."""

    def make(usable=("triton", "cuda"), table=TABLE, architecture="sm_80"):
        path = tmp_path / "choice.json"
        path.write_text(json.dumps(table))
        monkeypatch.setattr(backends, "CHOICE", path)
        monkeypatch.setattr(backends, "architecture", lambda device: architecture)
        monkeypatch.setattr(native, "_cuda", None)  # it would ask a driver for the device
        monkeypatch.setattr(backends, "_why_not", lambda name: None if name in usable else "it is not there")
        backends._preferred.cache_clear()

    yield make
    monkeypatch.undo()
    backends._preferred.cache_clear()


def test_by_classes(machine):
    machine()
    found = [backends.choose(GPU, None, classes) for classes in (1, 100, 101, 1000, 1001, 10**6)]
    assert found == ["cuda", "cuda", "triton", "triton", "cuda", "cuda"]
    assert {backends.choose(GPU, None, classes, rows_side_by_side=True) for classes in (1, 100, 10**6)} == {"triton"}


def test_an_architecture_has_its_own_and_the_default_for_the_rest(machine):
    machine(architecture="sm_90")
    assert [backends.choose(GPU, None, classes) for classes in (50, 500)] == ["cuda", "cuda"]
    assert backends.choose(GPU, None, 50, rows_side_by_side=True) == "triton"


@pytest.mark.parametrize("usable", ["triton", "cuda"])
def test_the_other_one_where_the_preferred_is_not_there(machine, usable):
    machine(usable=(usable,))
    assert {backends.choose(GPU, None, classes) for classes in (50, 500, 5000)} == {usable}
    assert backends.preferred(GPU) == usable  # nothing is compared in a call


def test_the_reference_where_none_is_there(machine):
    machine(usable=())
    assert backends.choose(GPU, None, 50) == "reference"
    assert backends.choose(torch.device("meta"), None, 50) == "reference"


def test_a_named_backend_is_not_overruled(machine):
    machine()
    assert backends.choose(GPU, "triton", 50) == "triton"
    assert backends.choose(GPU, "cuda", 500) == "cuda"
    machine(usable=("triton",))
    with pytest.raises(ValueError, match="backend 'cuda' is not available: it is not there"):
        backends.choose(GPU, "cuda", 50)
    with pytest.raises(ValueError, match="backend 'cpu' is not available"):
        backends.choose(GPU, "cpu", 50)


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ((), [1], "must be an object with an entry 'default'"),
        (("default",), None, "'default' must be an object, got None"),
        (("sm_90",), "cuda", "'sm_90' must be an object"),
        (("default", "rows_side_by_side"), [], "'rows_side_by_side' of 'default' must be a list"),
        (("sm_90", "classes_side_by_side"), "cuda", "'classes_side_by_side' of 'sm_90' must be a list"),
        (("default", "classes_side_by_side"), [[0, "tritonn"]], r"must hold \[classes, 'triton' or 'cuda'\], got \[0,"),
        (("default", "classes_side_by_side"), [["0", "triton"]], "must hold"),
        (("default", "classes_side_by_side"), [[0, "triton", 4]], "must hold"),
        (("default", "classes_side_by_side"), [[100, "triton"]], r"end with 0, any number; got \[100\]"),
        (("default", "classes_side_by_side"), [[9, "cuda"], [8, "triton"], [0, "cuda"]], "must ascend"),
        (("default", "classes_side_by_side"), [[0, "cuda"], [0, "triton"]], "must ascend"),
        (("default", "classes_side_by_side"), [[-5, "cuda"], [0, "triton"]], "must ascend"),
    ],
    ids=str,
)
def test_a_malformed_table_is_refused(machine, path, value, what):
    table = copy.deepcopy(TABLE)
    if path:
        *outer, last = path
        entry = table
        for key in outer:
            entry = entry[key]
        entry[last] = value
    else:
        table = value
    machine(table=table)
    with pytest.raises(ValueError, match=f"choice.json: .*{what}"):
        backends.choose(GPU, None, 50)
    with pytest.raises(ValueError, match=what):
        backends.choose(GPU, None, 50)  # again: nothing was kept


def test_a_table_without_default_is_refused(machine):
    machine(table={"sm_90": TABLE["sm_90"]})
    with pytest.raises(ValueError, match="an entry 'default'"):
        backends.choose(GPU, None, 50)


def test_what_is_shipped():
    table = json.loads(backends.CHOICE.read_text())
    backends.check_choice(table, "choice.json")
    if "measured" not in table["default"]:
        assert "Not measured" in table["default"]["comment"]
        assert [rows[-1] for rows in map(table["default"].get, backends.LAYOUTS)] == [[0, "triton"]] * 2


def test_small_problems_are_the_cuda_kernels(machine):
    """Where those load. Small is few classes: how many rows there are must not choose, or a row's bits would differ."""
    machine(table=json.loads(backends.CHOICE.read_text()))
    assert [backends.choose(GPU, None, classes) for classes in (10, 100, 1000)] == ["cuda", "cuda", "triton"]
    machine(usable=("triton",), table=json.loads(backends.CHOICE.read_text()))
    assert backends.choose(GPU, None, 10) == "triton"


def test_a_call_asks_by_its_classes_and_layout(monkeypatch):
    asked = []

    def choose(device, backend, classes, rows_side_by_side):
        asked.append((backend, classes, rows_side_by_side))
        return "reference"

    monkeypatch.setattr(call, "choose", choose)
    monkeypatch.setattr(fast_path, "loss", None)  # it asks once for a call of a kind, whichever test that was in
    images = torch.randn(2, 5, 3, 4)
    labels = torch.zeros(2, 3, 4, dtype=torch.long)
    mlkernels.cross_entropy(torch.randn(3, 7), torch.arange(3))
    mlkernels.cross_entropy(torch.randn(7), torch.tensor(1), backend="reference")
    mlkernels.cross_entropy(images, labels)
    mlkernels.cross_entropy(images.to(memory_format=torch.channels_last), labels)
    assert asked == [(None, 7, False), ("reference", 7, False), (None, 5, True), (None, 5, False)]


def test_compiled_it_is_a_constant(machine):
    """Read once, not traced: no warning about a cache, no file in the graph; ranges are guards."""
    machine()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch._dynamo.reset()
        number = {"cuda": 1.0, "triton": 2.0}
        compiled = torch.compile(
            lambda x: x + number[backends.choose(GPU, None, x.shape[1])], fullgraph=True, dynamic=True, backend="eager"
        )
        found = [compiled(torch.zeros(2, classes))[0, 0].item() for classes in (50, 60, 500, 5000)]
    assert found == [1.0, 1.0, 2.0, 1.0]


def test_compiled_a_layout_may_be_a_symbol(machine):
    machine()
    torch._dynamo.reset()
    number = {"cuda": 1.0, "triton": 2.0}
    compiled = torch.compile(
        lambda x: x + number[backends.choose(GPU, None, x.shape[1], x.stride(1) != 1)],
        fullgraph=True, dynamic=True, backend="eager",
    )  # fmt: skip
    images = torch.zeros(2, 5, 3, 4)
    found = [compiled(x)[0, 0, 0, 0].item() for x in (images, images.to(memory_format=torch.channels_last))]
    assert found == [2.0, 1.0]


def test_each_gpu_by_itself(monkeypatch):
    """In a machine of unlike GPUs the CUDA kernels serve those that there is code for, and every word says which."""

    class Library:
        """Code for the second GPU alone."""

        class mlkernels_cuda_unusable:
            restype = None

            def __new__(cls, index):
                return None if index == 1 else b"built for 90; CUDA says: no kernel image"

    monkeypatch.setattr(native, "_cuda", Library)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backends, "_why_not", lambda name: None if name == "cuda" else "it is not there")
    backends._preferred.cache_clear()
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert [backends.choose(device, None, 100) for device in (first, second, torch.device("cuda"))] == [
        "reference",
        "cuda",
        "reference",
    ]
    assert backends.choose(second, "cuda", 100) == "cuda"
    with pytest.raises(ValueError, match="not available: built for 90; CUDA says: no kernel image"):
        backends.choose(first, "cuda", 100)
    assert backends.available_backends()["cuda"] is None
    assert backends.available_backends(second)["cuda"] is None
    assert "no kernel image" in backends.available_backends("cuda:0")["cuda"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "no kernel image" in backends.available_backends()["cuda"]
    backends._preferred.cache_clear()


@pytest.mark.parametrize(
    ("triton", "numpy", "runs"),
    [("3.6.0", "2.3.5", True), ("3.6.0", "2.4.6", False), ("3.6.0+git1", "3.0.0rc1", False), ("3.10.0", "2.4.6", True)],
)
def test_an_interpreter_that_numpy_has_left_behind(triton, numpy, runs):
    """The oldest torch brings Triton 3.6, and pip beside it the newest numpy."""
    why = backends._why_not_interpreted(triton, numpy)
    assert (why is None) == runs
    assert runs or (triton in why and numpy in why and "numpy<2.4" in why)


def test_a_driver_that_is_too_old_is_no_missing_gpu(monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update it.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(native, "_cuda", object())
    said = "torch can use no GPU: The NVIDIA driver on your system is too old (found version 12020)"
    assert native.cuda_missing() == said
