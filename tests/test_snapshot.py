"""A restored run is the run that was saved: every bit, every tensor in its place, and nothing that came since."""

from __future__ import annotations

import copy
import datetime
import functools
import inspect
import itertools
import logging
import math
import random
import re
import threading
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mlkernels
from mlkernels.schedule import Snapshot

FUSED = ("Adam", "AdamW", "SGD", "Adagrad")  # what torch's CPU build has
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3, "nesterov": True},
    "RMSprop": {"lr": 0.01, "momentum": 0.9, "centered": True},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.01},
    "LBFGS": {"lr": 0.1, "max_iter": 3, "history_size": 2},
}


def kinds() -> Iterator[tuple[str, dict[str, Any], Mapping[str, Any]]]:
    """Torch's optimizers: name, options, and the parameters that each has."""
    for name in sorted(set(dir(torch.optim)) - {"Optimizer"}):
        kind = getattr(torch.optim, name)
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
            yield name, OPTIONS.get(name, {"lr": 0.01}), inspect.signature(kind).parameters


def optimizers() -> list[tuple[str, dict[str, Any]]]:
    cases: list[tuple[str, dict[str, Any]]] = []
    for name, options, offered in kinds():
        if "foreach" in offered:
            cases += [(name, {**options, "foreach": foreach}) for foreach in (False, True)]
        else:
            cases.append((name, options))
        if name in FUSED:
            cases.append((name, {**options, "fused": True}))
    return cases


def name_of(value: Any) -> str | None:
    if isinstance(value, dict):
        forms = [form for form in ("foreach", "fused") if value.get(form)]
        return forms[0] if forms else "plain"
    return None


class Network(nn.Module):
    """Batch norm, dropout, a tied weight, a buffer that no state_dict holds and one that is expanded."""

    def __init__(self, sparse: bool = False, biases: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 6, sparse=sparse)
        self.inner = nn.Linear(6, 6, bias=biases)
        self.norm = nn.BatchNorm1d(6, affine=biases)
        self.classifier = nn.Linear(6, 12, bias=biases)
        if not sparse:
            self.classifier.weight = self.embedding.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("ones", torch.ones(1).expand(6))
        self.register_buffer("seen", None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen = input.float().mean()  # rebound each time, and None before the first
        hidden = self.norm(self.inner(self.embedding(input))) * self.ones
        return self.classifier(nn.functional.dropout(hidden.relu(), 0.5, self.training))


class Training:
    """A run of small steps, of which a part may be undone."""

    def __init__(self, name: str, options: dict[str, Any], scaled: bool = False) -> None:
        torch.manual_seed(1)
        sparse, muon = name == "SparseAdam", name == "Muon"
        self.model = Network(sparse, biases=not muon)
        parameters = self.model.embedding.parameters() if sparse else self.model.parameters()
        self.optimizer = getattr(torch.optim, name)(parameters, **options)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, 0.1, 50, cycle_momentum="betas" in options or "momentum" in options
        )
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, patience=0)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2, enabled=scaled)
        self.batches = torch.Generator().manual_seed(2)

    def parts(self) -> tuple[Any, ...]:
        return self.model, self.optimizer, self.scheduler, self.plateau, self.scaler

    def step(self, generator: torch.Generator) -> None:
        input = torch.randint(12, (8,), generator=generator)

        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(input), input)
            self.scaler.scale(loss).backward()
            return loss

        if isinstance(self.optimizer, torch.optim.LBFGS):
            loss = self.optimizer.step(closure)
        else:
            loss = closure()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.scheduler.step()
        self.plateau.step(loss.detach())

    def state(self) -> Any:
        buffers = dict(self.model.named_buffers())
        dicts = [part.state_dict() for part in self.parts()]
        return copy.deepcopy((buffers, self.model.seen is None, dicts, torch.get_rng_state()))

    def tensors(self) -> list[torch.Tensor]:
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        return [*self.model.parameters(), *self.model.buffers(), *state]


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, in structure too."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        return alike and torch.equal(
            a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


@pytest.mark.parametrize("before", [0, 3], ids=["unborn", "born"])
@pytest.mark.parametrize("name, options", optimizers(), ids=name_of)
def test_an_undone_attempt_leaves_no_trace(name: str, options: dict[str, Any], before: int) -> None:
    """With a learning rate schedule, batch norm, dropout and a scaler; at the first step, when there is no state."""
    scaled = name not in ("LBFGS", "SparseAdam")
    tried, plain = Training(name, options, scaled), Training(name, options, scaled)
    for run in (tried, plain):
        torch.manual_seed(5)
        for _ in range(before):
            run.step(run.batches)
    if before:
        assert same(tried.state(), plain.state())

    snapshot = Snapshot(*tried.parts())
    for attempt in range(2):  # the second uses the same twins
        torch.manual_seed(6)
        saved = tried.state()
        pointers = [t.data_ptr() for t in tried.tensors()]
        snapshot.save()
        bytes_held = snapshot.nbytes
        other = torch.Generator().manual_seed(7 + attempt)
        for _ in range(2):
            tried.step(other)
        assert not same(tried.state(), saved)
        snapshot.restore()
        torch.manual_seed(6)
        assert same(tried.state(), saved)
        assert [t.data_ptr() for t in tried.tensors()] == pointers
        assert snapshot.nbytes == bytes_held

    torch.manual_seed(6)
    for run in (tried, plain):
        torch.manual_seed(6)
        for _ in range(3):
            run.step(run.batches)
    assert same(tried.state(), plain.state())


@pytest.mark.parametrize("reject", [True, False])
@pytest.mark.parametrize(
    "name, options", [case for case in optimizers() if case[0] not in ("LBFGS", "SparseAdam")], ids=name_of
)
def test_a_flag_decides(name: str, options: dict[str, Any], reject: bool) -> None:
    run = Training(name, options)
    run.step(run.batches)
    layers = nn.ModuleList([run.model.embedding, run.model.inner, run.model.norm, run.model.classifier])
    snapshot = snapshot_of(layers, run.optimizer)  # not the buffer that is rebound: about that a flag cannot decide
    saved = copy.deepcopy((layers.state_dict(), run.optimizer.state_dict()))
    run.optimizer.zero_grad()
    run.model(torch.arange(12)).square().sum().backward()
    run.optimizer.step()
    stepped = copy.deepcopy((layers.state_dict(), run.optimizer.state_dict()))
    assert not same(stepped, saved)
    pointers = [t.data_ptr() for t in run.tensors()]
    snapshot.restore_if(torch.tensor(reject))
    now = layers.state_dict(), run.optimizer.state_dict()
    assert same(now, saved if reject else stepped)
    assert [t.data_ptr() for t in run.tensors()] == pointers


def snapshot_of(*parts: Any) -> Snapshot:
    snapshot = Snapshot(*parts)
    snapshot.save()
    return snapshot


def small() -> tuple[nn.Module, torch.optim.SGD]:
    model = nn.Linear(3, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("reject", [True, False])
def test_a_flag_cannot_decide_about_what_is_new(reject: bool) -> None:
    """Whatever the flag holds: an error that came only on a rejection would come rarely."""
    model, optimizer = small()
    snapshot = snapshot_of(model, optimizer)
    step(model, optimizer)
    weight = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"parts\[1\] \(SGD\) state\[0\]\.momentum_buffer is new since; use restore"):
        snapshot.restore_if(torch.tensor(reject))
    assert torch.equal(model.weight, weight)
    snapshot.restore()
    assert len(optimizer.state) == 0


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
def test_a_flag_cannot_decide_about_the_host() -> None:
    model, optimizer = small()
    step(model, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    snapshot = Snapshot(model, optimizer, scheduler)
    flag = torch.tensor(True)

    snapshot.save()
    optimizer.param_groups[0]["lr"] = 0.5
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\.lr changed on the host since, from 0.1 to 0.5"):
        snapshot.restore_if(flag)
    snapshot.restore()
    assert optimizer.param_groups[0]["lr"] == 0.1

    optimizer.param_groups[0]["own"] = 1
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\.own is new since"):
        snapshot.restore_if(flag)
    del optimizer.param_groups[0]["own"], optimizer.param_groups[0]["nesterov"]
    with pytest.raises(RuntimeError, match=r"param_groups\[0\]\.nesterov is gone since"):
        snapshot.restore_if(flag)
    snapshot.restore()

    scheduler.step()
    with pytest.raises(RuntimeError, match=r"param_groups|StepLR"):
        snapshot.restore_if(flag)
    snapshot.restore()
    assert scheduler.last_epoch == 0

    optimizer.state.clear()
    with pytest.raises(RuntimeError, match="momentum_buffer is gone since"):
        snapshot.restore_if(flag)
    snapshot.restore()
    state = optimizer.state[model.weight]
    state["momentum_buffer"] = state["momentum_buffer"].clone()
    with pytest.raises(RuntimeError, match="momentum_buffer was replaced since"):
        snapshot.restore_if(flag)
    snapshot.restore()
    snapshot.restore_if(flag)


def test_the_flag_is_never_looked_at_on_a_device() -> None:
    """The meta device has no numbers to look at: reading one raises."""
    model = nn.Linear(3, 2, device="meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    snapshot = snapshot_of(model, optimizer)
    assert snapshot.nbytes == 2 * 4 * (6 + 2)
    optimizer.step()
    snapshot.restore_if(torch.zeros((), dtype=torch.bool, device="meta"))
    snapshot.restore()


class Count(TorchDispatchMode):
    """Which operators ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_one_copy_per_device_and_no_look() -> None:
    model, optimizer = small()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    step(model, optimizer)
    snapshot = Snapshot(model, optimizer, scaler)
    with Count() as count:
        snapshot.save()
        snapshot.restore()
    assert count.seen.count("mlkernels.multi_copy_.default") == 2
    assert not [name for name in count.seen if "scalar_dense" in name or "nonzero" in name or ".equal" in name]


def test_memory_is_kept_once() -> None:
    """Tied, viewed, transposed, overlapping and expanded tensors; a model and its optimizer."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.randn(6, 4))  # 96 bytes
    model.tied = model.weight
    model.row = nn.Parameter(model.weight.data[2])
    model.turned = nn.Parameter(model.weight.data.t())
    model.register_buffer("bits", model.weight.data.view(torch.int32))
    whole = torch.randn(10)
    model.register_buffer("left", whole[:6])  # 24
    model.register_buffer("right", whole[4:])  # 24: neither holds the other
    grid = torch.randn(4, 6)
    model.register_buffer("even", grid[:, ::2])  # 48
    model.register_buffer("repeated", torch.randn(5, 1).expand(5, 100))  # 20
    model.register_buffer("empty", torch.empty(0, 3))
    before = {name: tensor.clone() for name, tensor in model.named_buffers()} | {
        "weight": model.weight.detach().clone()
    }
    snapshot = Snapshot(model, torch.optim.SGD([model.weight, model.row], lr=1.0), model)
    assert snapshot.nbytes == 0
    snapshot.save()
    assert snapshot.nbytes == 96 + 24 + 24 + 48 + 20
    with torch.no_grad():
        model.weight.zero_()
        whole.zero_()
        grid.zero_()
        model.repeated[:, :1] = 0
    snapshot.restore()
    for name, tensor in before.items():
        assert torch.equal(getattr(model, name), tensor), name
    assert torch.equal(grid[:, 1::2], torch.zeros(4, 3))  # nobody's
    assert torch.equal(model.row, before["weight"][2])


def test_twins_are_made_once() -> None:
    model, optimizer = small()
    step(model, optimizer)
    snapshot = snapshot_of(model, optimizer)
    twins = {name: twin.data_ptr() for name, twin in snapshot._twins.items()}
    step(model, optimizer)
    snapshot.save()
    assert {name: twin.data_ptr() for name, twin in snapshot._twins.items()} == twins


def test_layouts_and_dtypes() -> None:
    model = nn.Module()
    tensors = {
        "conv": torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last),
        "fp16": torch.randn(7).half(),
        "brain": torch.randn(7).bfloat16(),
        "flags": torch.tensor([True, False]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "nan": torch.tensor([float("nan"), -0.0]),
    }
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor.clone(memory_format=torch.preserve_format))
    snapshot = snapshot_of(model)
    strides = {name: buffer.stride() for name, buffer in model.named_buffers()}
    for buffer in model.buffers():
        buffer.zero_()
    snapshot.restore()
    assert all(same(getattr(model, name), tensor) for name, tensor in tensors.items())
    assert {name: buffer.stride() for name, buffer in model.named_buffers()} == strides


def test_parameter_groups_and_states_that_came_later_go() -> None:
    model, optimizer = small()
    step(model, optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    snapshot = snapshot_of(model, optimizer)
    late = nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [late], "lr": 3.0})
    optimizer.state[late]["momentum_buffer"] = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"param_groups\[1\]"):
        snapshot.restore_if(torch.tensor(True))
    snapshot.restore()
    assert same(optimizer.state_dict(), state)


def test_load_state_dict_in_between() -> None:
    """It replaces every tensor of an optimizer; the first ones come back."""
    model, optimizer = small()
    step(model, optimizer)
    snapshot = snapshot_of(model, optimizer)
    state, buffer = copy.deepcopy(optimizer.state_dict()), optimizer.state[model.weight]["momentum_buffer"]
    other = copy.deepcopy(state)
    other["param_groups"][0]["lr"] = 7.0
    other["state"][0]["momentum_buffer"].zero_()
    optimizer.load_state_dict(other)
    snapshot.restore()
    assert same(optimizer.state_dict(), state)
    assert optimizer.state[model.weight]["momentum_buffer"] is buffer


def test_a_scaler_before_its_first_scale() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    snapshot = snapshot_of(scaler)
    scaler.scale(torch.ones(1))
    with pytest.raises(RuntimeError, match=r"parts\[0\] \(GradScaler\)\._scale is new since"):
        snapshot.restore_if(torch.tensor(False))
    snapshot.restore()
    assert scaler._scale is None and scaler.get_scale() == 8.0


class Rule:
    """A learning rate rule with a memory."""

    def __init__(self) -> None:
        self.worst = 0.0
        self.history: list[int] = []

    def __call__(self, epoch: int) -> float:
        self.worst = max(self.worst, float(epoch))
        self.history.append(epoch)
        return 0.5**epoch


def test_schedulers_within_schedulers() -> None:
    _, optimizer = small()
    rule = Rule()
    first = torch.optim.lr_scheduler.LambdaLR(optimizer, rule)
    second = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[2])
    snapshot = snapshot_of(scheduler, optimizer)
    saved = copy.deepcopy((scheduler.state_dict(), optimizer.state_dict(), rule.worst, rule.history))
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    assert rule.worst == 1.0
    snapshot.restore()
    assert same((scheduler.state_dict(), optimizer.state_dict(), rule.worst, rule.history), saved)


class Average:
    """Keeps its tensors, and hands them out."""

    def __init__(self) -> None:
        self.shadow, self.updates, self.loads = [torch.zeros(3)], 0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loads += 1
        self.updates = state["updates"]
        for own, other in zip(self.shadow, state["shadow"], strict=True):
            own.copy_(other)


class Meter(Average):
    """Hands out copies."""

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": [tensor.clone() for tensor in self.shadow], "updates": self.updates}


def test_anything_with_a_state_dict() -> None:
    live, copies = Average(), Meter()
    snapshot = snapshot_of(live, copies)
    assert snapshot.nbytes == 24
    for part in (live, copies):
        part.shadow[0] += 1
    snapshot.restore()
    assert live.loads == 0 and copies.loads == 1  # in place where that is enough
    live.updates = copies.updates = 4
    for part in (live, copies):
        part.shadow[0] += 1
    for _ in range(2):
        snapshot.restore()
        assert live.updates == copies.updates == 0
        assert not live.shadow[0].any() and not copies.shadow[0].any()
    assert live.loads == 1

    alone = Snapshot(live)
    alone.save()
    live.shadow[0] += 1
    alone.restore_if(torch.tensor(True))
    assert not live.shadow[0].any()
    live.updates = 1
    with pytest.raises(RuntimeError, match=r"Average.* changed since"):
        alone.restore_if(torch.tensor(True))
    with pytest.raises(RuntimeError, match="holds copies"):
        snapshot.restore_if(torch.tensor(True))


def test_extra_state_of_a_module() -> None:
    class Quantized(nn.Linear):
        amax = 1.0

        def get_extra_state(self) -> Any:
            return {"amax": self.amax}

        def set_extra_state(self, state: Any) -> None:
            self.amax = state["amax"]

    model = nn.Sequential(Quantized(2, 2))
    snapshot = snapshot_of(model)
    model[0].amax = 5.0
    snapshot.restore()
    assert model[0].amax == 1.0


def test_a_loss_with_parameters_and_an_averaged_model() -> None:
    model, _ = small()
    loss = mlkernels.CenterLoss(num_features=3, num_classes=2, rate=0.5)
    average = torch.optim.swa_utils.AveragedModel(model)
    saved = copy.deepcopy((loss.state_dict(), average.state_dict()))
    snapshot = snapshot_of(loss, average)
    loss(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    average.update_parameters(model)
    snapshot.restore()
    assert same((loss.state_dict(), average.state_dict()), saved)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")
def test_wrapped_modules() -> None:
    model, _ = small()
    for wrapped in (torch.compile(model, backend="eager"), torch.jit.script(model), nn.DataParallel(model)):
        weight = model.weight.detach().clone()
        snapshot = snapshot_of(wrapped)
        assert snapshot.nbytes == 32
        with torch.no_grad():
            model.weight.zero_()
        snapshot.restore()
        assert torch.equal(model.weight, weight)


def test_an_optimizer_alone_brings_its_parameters_back() -> None:
    model, optimizer = small()
    weight = model.weight.detach().clone()
    snapshot = snapshot_of(optimizer)
    step(model, optimizer)
    snapshot.restore()
    assert torch.equal(model.weight, weight)


@pytest.mark.parametrize("flag", [None, torch.tensor(True)], ids=["restore", "restore_if"])
def test_casts_of_an_enclosing_autocast(flag: torch.Tensor | None) -> None:
    """It keeps a low-precision copy of each weight until it is left."""
    model, _ = small()
    x = torch.ones(1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(x)
        snapshot = snapshot_of(model)
        with torch.no_grad():
            model.weight.add_(1)
        torch.clear_autocast_cache()
        assert not torch.equal(model(x), before)
        snapshot.restore() if flag is None else snapshot.restore_if(flag)
        assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    "parts, error, message",
    [
        ((), TypeError, "parts takes at least one"),
        ((nn.Linear(1, 1), 3), TypeError, r"parts\[1\] takes an object with state_dict and load_state_dict, got int"),
        ((nn.Linear,), TypeError, r"parts\[0\] takes an object .* got Linear"),
        ((OrderedDict(),), TypeError, "got OrderedDict"),
        ((types.SimpleNamespace(state_dict=dict),), TypeError, "got SimpleNamespace"),
        ((types.SimpleNamespace(load_state_dict=dict),), TypeError, "got SimpleNamespace"),
    ],
)
def test_bad_parts(parts: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Snapshot(*parts)


def test_bad_flags() -> None:
    snapshot = snapshot_of(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="reject takes a boolean tensor, got bool"):
        snapshot.restore_if(True)  # type: ignore[arg-type]
    for flag in (torch.tensor(1), torch.tensor([True, False])):
        with pytest.raises(ValueError, match="reject must be one boolean, got"):
            snapshot.restore_if(flag)


def test_nothing_saved() -> None:
    snapshot = Snapshot(nn.Linear(1, 1))
    for call in (snapshot.restore, lambda: snapshot.restore_if(torch.tensor(False))):
        with pytest.raises(RuntimeError, match="save\\(\\) has not been called"):
            call()


def test_what_cannot_be_saved() -> None:
    model = nn.Module()
    model.register_buffer("graph", torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match=r"parts\[0\] \(Module\)\.graph takes a dense tensor, got torch.sparse_coo"):
        Snapshot(model).save()
    with pytest.raises(TypeError, match="weight is not initialized: run the lazy module forward once"):
        Snapshot(nn.LazyLinear(2)).save()


def test_a_failed_save_keeps_the_one_before() -> None:
    model, _ = small()
    snapshot = snapshot_of(model)
    weight = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    model.register_buffer("graph", torch.eye(3).to_sparse())
    with pytest.raises(TypeError):
        snapshot.save()
    snapshot.restore()
    assert torch.equal(model.weight, weight)


def test_tensors_that_moved_or_changed_their_size_come_back() -> None:
    """To their old memory, so that what shared it shares it again; seen through one part or two, under any name."""
    model, optimizer = small()
    model.tail = nn.Parameter(model.weight.data[1])  # the row of another
    model.register_buffer("scale", torch.ones(1))  # as torch.ao's per-channel observers resize theirs
    model.register_buffer("wide", torch.arange(6.0))
    model.register_buffer("freed", torch.arange(4.0))
    parts = model, optimizer
    for snapshot in (Snapshot(*parts), Snapshot(model), Snapshot(optimizer, model)):
        snapshot.save()
        saved = copy.deepcopy(model.state_dict())
        pointers = [parameter.data_ptr() for parameter in model.parameters()]
        with torch.no_grad():
            model.bias.add_(1)
            model.weight.data = model.weight - 7  # as optimizers do that assign
            model.tail.data = torch.zeros(3, dtype=torch.float64)
            model.scale.resize_(1000).fill_(3)
            model.wide.resize_(2).fill_(3)
            model.freed.untyped_storage().resize_(0)
        snapshot.restore()
        assert same(model.state_dict(), saved)
        assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
        with torch.no_grad():
            model.weight[1] = 5
        assert (model.tail == 5).all()
        optimizer.zero_grad()
        model(torch.ones(1, 3)).sum().backward()
        assert model.weight.grad.shape == (2, 3)


@pytest.mark.parametrize("reject", [True, False])
def test_a_flag_and_a_tensor_that_moved(reject: bool) -> None:
    """Its numbers are put back where it is now, unless another one had shared its memory: both would need the host."""
    model, optimizer = small()
    step(model, optimizer)
    snapshot = snapshot_of(model, optimizer)
    weight = model.weight.detach().clone()
    model.weight.data = weight + 1
    snapshot.restore_if(torch.tensor(reject))
    assert torch.equal(model.weight, weight if reject else weight + 1)
    snapshot.restore()

    model.weight.data = torch.ones(2, 4)
    with pytest.raises(RuntimeError, match=r"parts\[0\] \(Linear\)\.weight has other memory since"):
        snapshot.restore_if(torch.tensor(reject))
    snapshot.restore()
    model.tail = nn.Parameter(model.weight.data[1])
    snapshot.save()
    model.weight.data = weight + 1
    with pytest.raises(RuntimeError, match="weight has other memory since"):
        snapshot.restore_if(torch.tensor(reject))


# ---- state beside tensors --------------------------------------------------------------------------------------------


HELD: dict[str, Any] = {}  # what no attribute leads to


class Lookahead(torch.optim.SGD):
    """State in all the places where optimizers have it, some of it told by its own state_dict alone."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1, momentum=0.9)
        self.steps, self.seen, self.array = 0, [], np.zeros((2, 3))[:, 1:]
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self.noise = np.random.default_rng(3)
        self.draws, self.shuffle = torch.Generator().manual_seed(1), random.Random(2)
        self.inner = Rule()
        HELD["losses"], HELD["loads"] = [], 0

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.steps += 1
        self.seen.append(self.steps)
        self.inner(self.steps)
        self.array += (
            self.noise.normal(size=(2, 2)) + self.shuffle.random() + torch.rand(1, generator=self.draws).item()
        )
        HELD["losses"].append(float(self.array.sum()))
        for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
            slow.lerp_(p.detach(), 0.5)
            state = self.state[p]
            state.setdefault("history", np.zeros(4, dtype=np.float32))[self.steps % 4] += 1
            state.setdefault("rule", Rule())(self.steps)
            self.born = True

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "losses": list(HELD["losses"])}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        HELD["losses"] = state_dict.pop("losses")
        HELD["loads"] += 1
        super().load_state_dict(state_dict)


@pytest.mark.parametrize("before", [0, 2])
def test_an_optimizer_s_own_state(before: int) -> None:
    """Attributes, arrays, objects, generators, and what its state_dict alone knows; the tensors stay in place."""
    ends = []
    for attempts in (0, 2):
        torch.manual_seed(0)
        model, _ = small()
        optimizer = Lookahead(model.parameters())
        for _ in range(before):
            step(model, optimizer)
        snapshot = Snapshot(model, optimizer)
        for _ in range(attempts):
            snapshot.save()
            tensors = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
            pointers, array = [t.data_ptr() for t in (*tensors, *optimizer.slow)], optimizer.array
            step(model, optimizer)
            snapshot.restore()
            assert HELD["losses"] == optimizer.state_dict()["losses"] and HELD["loads"] > 0
            again = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
            assert [t.data_ptr() for t in (*again, *optimizer.slow)] == pointers and optimizer.array is array
            assert hasattr(optimizer, "born") == bool(before) and len(optimizer.state) == (2 if before else 0)
        for _ in range(3):
            step(model, optimizer)
        state = [(s["momentum_buffer"], s["history"].tolist(), vars(s["rule"])) for s in optimizer.state.values()]
        ends.append((list(model.parameters()), state, HELD["losses"], optimizer.slow, optimizer.seen, optimizer.steps,
                     optimizer.array.tolist(), vars(optimizer.inner)))  # fmt: skip
    assert same(copy.deepcopy(ends[0]), copy.deepcopy(ends[1]))


def test_a_flag_and_an_optimizer_s_own_state() -> None:
    """An array is memory like a tensor's; a generator's state is known by copies alone."""
    model, optimizer = small()
    step(model, optimizer)
    optimizer.state[model.weight]["history"] = history = np.zeros(3, dtype=np.int32)
    snapshot = snapshot_of(optimizer)
    history += 1
    snapshot.restore_if(torch.tensor(True))
    assert history.tolist() == [0, 0, 0]
    optimizer.draws = torch.Generator()
    snapshot.save()
    with pytest.raises(RuntimeError, match=r"parts\[0\] \(SGD\)\.draws changed since, or its"):
        snapshot.restore_if(torch.tensor(True))


class Counting(nn.Module):
    """Plain attributes that a forward changes, and modules that only a list knows."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.mean, self.past = 0, torch.zeros(3), [np.zeros(2), {"last": None}]
        self.hidden = [nn.BatchNorm1d(3)]
        self.rule, self.loose = Rule(), None
        self.inner = nn.Sequential(nn.Linear(3, 3))
        self.inner[0].forward = self.inner[0].forward  # of torch's classes: no attributes

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.mean += input.mean()
        self.past[0] += 1
        self.past[1]["last"] = self.calls
        self.past.append(self.calls)
        self.rule(self.calls)
        self.loose = self.hidden[0](self.inner(input))
        self.late = 1
        return self.loose


def test_plain_attributes_of_a_module() -> None:
    model = Counting()
    model(torch.ones(4, 3))
    del model.late
    snapshot = Snapshot(nn.Sequential(model))

    def state() -> Any:
        past = [model.past[0].tolist(), dict(model.past[1]), *model.past[2:]]
        return copy.deepcopy(
            (model.calls, model.mean, past, vars(model.rule), model.hidden[0].state_dict(), model.loose.detach())
        )

    snapshot.save()
    saved, loose = state(), model.loose
    model.eval()
    for _ in range(2):
        model(torch.ones(2, 3))
        assert model.late and not same(state(), saved)
        snapshot.restore()
        assert same(state(), saved) and not hasattr(model, "late") and model.loose is loose
    assert not model.training  # is no state


@pytest.mark.parametrize(
    "value, words",
    [
        (iter([1, 2]), r"is a list_iterator, of which no copy can be kept: give what holds it state_dict\(\)"),
        ((n for n in range(3)), "is a generator"),
        (itertools.count(), "is a count"),
        (bytearray(b"abc"), "is a bytearray"),
        (np.array([object()]), "takes an array of numbers in ascending strides, got object"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_state_that_cannot_be_kept_is_refused(value: Any, words: str) -> None:
    """At save(), by the name of where it is; the state saved before is there still."""
    model, optimizer = small()
    step(model, optimizer)
    snapshot = snapshot_of(model, optimizer)
    weight = model.weight.detach().clone()
    step(model, optimizer)
    optimizer.state[model.bias]["own"] = value
    with pytest.raises(TypeError, match=rf"parts\[1\] \(SGD\) state\[1\]\.own {words}"):
        snapshot.save()
    snapshot.restore()
    assert torch.equal(model.weight, weight)
    counting = Counting()
    counting.rule.source = [value]
    with pytest.raises(TypeError, match=rf"parts\[0\] \(Sequential\) 0\.rule\.source\[0\] {words}"):
        Snapshot(nn.Sequential(counting)).save()


class Slots:
    __slots__ = ("born", "count", "past")

    def __init__(self) -> None:
        self.count, self.past = 0, [torch.zeros(2)]


class Both(Slots):
    """With attributes of both kinds, and a __setattr__ of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["free"] = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "free":
            raise AttributeError(name)
        super().__setattr__(name, value)


class Named(dict):  # type: ignore[type-arg]
    """A container with an attribute."""

    calls = 0


def test_containers_with_attributes() -> None:
    model, optimizer = small()
    optimizer.state[model.weight]["own"] = own = Named(a=1)
    snapshot = snapshot_of(optimizer)
    own.calls, own["a"] = 3, 2
    snapshot.restore()
    assert own.calls == 0 and own == {"a": 1}


@pytest.mark.parametrize("kind", [Slots, Both])
def test_attributes_in_slots(kind: Any) -> None:
    model, optimizer = small()
    optimizer.state[model.weight]["own"] = own = kind()
    snapshot = snapshot_of(optimizer)
    own.count, own.born = 3, 1
    own.past[0] += 1
    own.past.append(2)
    if kind is Both:
        own.__dict__["free"] = 5
    snapshot.restore()
    assert own.count == 0 and not hasattr(own, "born") and len(own.past) == 1 and not own.past[0].any()
    assert kind is Slots or own.free == 0


def test_what_cannot_change_is_no_state() -> None:
    """Nor are handles, locks and types: they stay as they are."""
    model = Counting()
    model.fixed = [
        datetime.date(2020, 1, 1), Path("here"), re.compile("x"), Fraction(1, 3), torch.float32, torch.device("cpu"),
        logging.getLogger("x"), threading.Lock(), functools.partial(print), print, len, Counting, math, slice(2), ...,
        frozenset({1}), range(3), np.float64(2), object(), torch.utils.data.TensorDataset(torch.ones(1)),
    ]  # fmt: skip
    snapshot = snapshot_of(model)
    fixed = list(model.fixed)
    model.fixed.pop()
    snapshot.restore()
    assert all(a is b for a, b in zip(model.fixed, fixed, strict=True))


def test_a_load_that_fails_stops_nothing_else() -> None:
    class Broken(Average):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise KeyError("shadow")

    model, optimizer = small()
    one, other = Broken(), Meter()
    snapshot = snapshot_of(one, model, optimizer, other)
    saved = copy.deepcopy(model.state_dict())
    step(model, optimizer)
    one.updates = other.updates = 3
    with pytest.raises(RuntimeError, match=r"parts\[0\] \(Broken\) could not be restored; everything else was"):
        snapshot.restore()
    assert same(model.state_dict(), saved) and not optimizer.state and other.updates == 0


def test_extra_state_that_cannot_be_set() -> None:
    class Versioned(nn.Linear):
        def get_extra_state(self) -> Any:
            return 3

    with pytest.raises(TypeError, match=r"parts\[0\] \(Sequential\) 0 has get_extra_state\(\) but no set_extra_state"):
        Snapshot(nn.Sequential(Versioned(1, 1))).save()
