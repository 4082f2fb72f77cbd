"""SGD within the backward of a linear head: the steps of torch.optim.SGD without its gradient, or a refusal by name."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from table import F64
from test_linear import CLASSES, PIECES, ROWS, WIDTH, Watched
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR

import mlkernels
from mlkernels import LinearLoss, TileSGD
from mlkernels.linear import update as module
from mlkernels.schedule import MILS, Snapshot

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.3},
    "heavy": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    "nesterov": {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1, "maximize": True},
}


def batch(seed: int = 0, dtype: torch.dtype = F64, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Features and labels, of which one is ignored and holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    x, target = torch.randn(rows, WIDTH, generator=generator), torch.randint(CLASSES, (rows,), generator=generator)
    target[2], x[2] = -100, float("nan")
    return x.to(dtype).requires_grad_(), target


def pair(options: dict[str, Any], dtype: torch.dtype = F64, loss: Any = None, **more: Any) -> tuple[LinearLoss, ...]:
    """A linear head that steps by itself, and the same with a gradient."""
    torch.manual_seed(0)
    loss = loss or mlkernels.CrossEntropyLoss()
    ours = LinearLoss(loss, WIDTH, CLASSES, dtype=dtype, tile_update=TileSGD(**options), **more)
    theirs = LinearLoss(copy.deepcopy(loss), WIDTH, CLASSES, dtype=dtype, **{**more, "memory": None})
    theirs.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("update.")})
    return ours, theirs


def stepped(linear: LinearLoss, seed: int = 0) -> LinearLoss:
    x, target = batch(seed, linear.weight.dtype)
    linear(x, target).backward()
    return linear


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", PIECES)
@pytest.mark.parametrize("options", OPTIONS)
def test_steps_are_those_of_torch(options, backend, monkeypatch):
    """Weight and momentum after each of four steps, and every other gradient at the old weight, whatever the tiles, the
    loss, the reduction and the upstream gradient; a scheduler in both."""
    monkeypatch.setattr("mlkernels.linear.plan.FEW_CLASSES", 4)
    given = OPTIONS[options]
    arcface = mlkernels.ArcFaceLoss(scale=nn.Parameter(torch.tensor(4.0, dtype=F64)), backend=backend)
    smooth = mlkernels.FocalLoss(label_smoothing=0.1, z_loss=0.1, reduction="none", backend=backend)
    for loss, more in ((arcface, {"normalize": True}), (smooth, {"bias": True})):
        for memory in (None, 5000):
            ours, theirs = pair(given, loss=loss, memory=memory, **more)
            sgd = torch.optim.SGD([theirs.weight], **given)
            schedulers = [StepLR(optimizer, 1, 0.5) for optimizer in (ours.tile_update, sgd)]
            for step in range(4):
                x, target = batch(step)
                if step == 2:
                    target.fill_(-100)  # nothing but momentum and decay
                results = []
                for linear in (ours, theirs):
                    linear.zero_grad()
                    value, rows = linear(x, target, return_stats=True)
                    upstream = torch.linspace(-1, 2, value.numel(), dtype=F64).reshape(value.shape)
                    leaves = [x, *(p for p in linear.parameters() if p is not linear.weight)]
                    total = (value * upstream).nansum() + 0.1 * rows.entropy.sum()
                    total.backward()
                    results.append([leaf.grad.clone() for leaf in leaves])
                    x.grad = None
                assert ours.weight.grad is None
                sgd.step()
                for scheduler in schedulers:
                    scheduler.step()
                for mine, other in zip(*results, strict=True):
                    torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)
                torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-10, atol=1e-12)
                if "momentum" in given:
                    torch.testing.assert_close(
                        ours.update.momentum_buffer, sgd.state[theirs.weight]["momentum_buffer"], rtol=1e-9, atol=1e-12
                    )


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_to_the_bit_given_the_gradient(options, dtype, monkeypatch):
    """What torch.optim.SGD makes of the gradients of all tiles together; a half one is rounded once, as everywhere."""
    linear, _ = pair(OPTIONS[options], dtype, memory=3000)
    weight = nn.Parameter(linear.weight.detach().clone())
    sgd, whole = torch.optim.SGD([weight], **OPTIONS[options]), torch.empty(CLASSES, WIDTH)
    step_of = module.TileUpdate.step

    def recorded(self, rows, classes, gradient, generator):
        whole[classes] = gradient
        step_of(self, rows, classes, gradient, generator)

    monkeypatch.setattr(module.TileUpdate, "step", recorded)
    for step in range(3):
        whole = whole.double() if dtype == F64 else whole
        stepped(linear, step)
        weight.grad = whole.to(dtype)
        sgd.step()
        assert torch.equal(linear.weight, weight)


def test_no_buffer_of_the_weights_size():
    """Neither whole nor as many tiles: beside inputs there are a few tiles' worth of numbers."""
    for dtype, options in ((torch.float32, {"momentum": 0.9}), (torch.bfloat16, {"stochastic_rounding": True})):
        linear = LinearLoss(
            mlkernels.CosFaceLoss(scale=4.0), 64, 4000, normalize=True, dtype=dtype, memory=200_000,
            tile_update=TileSGD(0.1, **options),
        )  # fmt: skip
        x, target = torch.randn(16, 64, dtype=dtype, requires_grad=True), torch.arange(16)
        with Watched() as watched:
            linear(x, target).backward()
        assert 50_000 < watched.peak < 300_000  # beside 200,000 a few numbers per class; the gradient: 1,024,000


def test_only_what_is_to_be_trained_steps():
    """Not under no_grad, not frozen, not without a backward; features need no gradient."""
    linear, _ = pair(OPTIONS["plain"])
    before = linear.weight.detach().clone()
    x, target = batch()
    with torch.no_grad():
        linear(x, target)
    linear(x, target)
    linear.weight.requires_grad_(False)
    linear(x, target).backward()
    assert torch.equal(linear.weight, before)
    linear.weight.requires_grad_(True)
    linear(x.detach(), target).backward()
    assert not torch.equal(linear.weight, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_and_compiled(reentrant):
    results = []
    for kind in ("plain", "checkpointed", "compiled"):
        linear, _ = pair(OPTIONS["heavy"])
        run = torch.compile(linear, backend="eager") if kind == "compiled" else linear
        for step in range(2):
            x, target = batch(step)
            if kind == "checkpointed":
                loss = torch.utils.checkpoint.checkpoint(linear, x, target, use_reentrant=reentrant)
            else:
                loss = run(x, target)
            loss.backward()
        results.append((linear.weight.detach(), x.grad))
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            assert torch.equal(ours, theirs)
    torch._dynamo.reset()  # or what was compiled with a break is used again
    with pytest.raises(Exception, match="a linear head with tile_update or sample is no graph"):
        torch.compile(linear, backend="eager", fullgraph=True)(*batch())


# ---- bfloat16 --------------------------------------------------------------------------------------------------------


def test_rounding_is_right_on_average():
    """To one of the two neighbours, up as often as far; numbers that are none stay."""
    exact = torch.tensor([1.001, -1.001, 3e-5, -2.7e8, 1e-39, 0.0, 1.0]).repeat(40_000, 1)
    found = module.rounded(exact, torch.Generator().manual_seed(0)).float()
    down, unit = exact[0].view(torch.int32) & -0x10000, 0x10000
    low, high = down.view(torch.float32), (down + unit).view(torch.float32)
    assert ((found == low) | (found == high)).all()
    assert torch.equal(found[:, 5:], exact[:, 5:])
    # Four standard deviations of a mean of 40,000 draws, each at most half a unit.
    assert ((found.double().mean(0) - exact[0].double()).abs() <= 4 * 0.5 * (high - low).abs().double() / 200).all()
    odd = torch.tensor([float("inf"), -float("inf"), float("nan")])
    assert torch.equal(module.rounded(odd, torch.Generator()).float().nan_to_num(7.0), odd.nan_to_num(7.0))


def test_small_steps_are_not_lost():
    """After 200 steps the error beside the movement: rounded to the nearest nearly all of it, at random half."""
    torch.manual_seed(0)
    centers = nn.functional.normalize(torch.randn(100, 32), dim=1)
    start = torch.randn(100, 32).bfloat16()
    weights = {}
    for kind in ("exact", "nearest", "stochastic"):
        dtype = torch.float32 if kind == "exact" else torch.bfloat16
        sgd = TileSGD(0.02, momentum=0.5, stochastic_rounding=kind == "stochastic")
        linear = LinearLoss(mlkernels.CosFaceLoss(scale=8.0), 32, 100, normalize=True, dtype=dtype, tile_update=sgd)
        linear.weight.data.copy_(start)
        generator = torch.Generator().manual_seed(1)
        for _ in range(200):
            target = torch.randint(100, (64,), generator=generator)
            x = centers[target] + 0.1 * torch.randn(64, 32, generator=generator)
            linear(x.to(dtype), target).backward()
        weights[kind] = linear.weight.detach().float()
    moved = (weights["exact"] - start.float()).norm()
    errors = {kind: float((weights[kind] - weights["exact"]).norm() / moved) for kind in ("nearest", "stochastic")}
    assert errors["nearest"] > 0.9
    assert errors["stochastic"] < 0.6


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_where_it_was(dtype):
    """Saved after a step and loaded, strictly, or copied: the next step is the same to the bit, draws of roundings and
    the first momentum included."""
    options = {**OPTIONS["heavy"], "stochastic_rounding": dtype == torch.bfloat16}
    linear, _ = pair(options, dtype)
    saved = io.BytesIO()
    torch.save([stepped(linear).state_dict(), linear.tile_update.state_dict()], saved)
    saved.seek(0)
    other = LinearLoss(linear.loss, WIDTH, CLASSES, dtype=dtype, tile_update=TileSGD(**{**options, "lr": 3.0}))
    for target, state in zip((other, other.tile_update), torch.load(saved, weights_only=True), strict=True):
        target.load_state_dict(state)
    assert other.tile_update.param_groups[0]["lr"] == options["lr"]
    copied = copy.deepcopy(linear)
    assert copied.tile_update.param_groups[0]["params"][0] is copied.weight
    weights = [stepped(each, 1).weight for each in (linear, other, copied)]
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    linear.reset_parameters()
    assert not linear.update.momentum_buffer.any() and not linear.update.stepped.any()
    plain = LinearLoss(linear.loss, WIDTH, CLASSES, dtype=dtype)
    with pytest.raises(RuntimeError, match=r"Missing key.*update\.momentum_buffer"):
        other.load_state_dict(plain.state_dict())


def test_a_snapshot_takes_the_step_back():
    options = {**OPTIONS["heavy"], "stochastic_rounding": True}
    linear, _ = pair(options, torch.bfloat16)
    scheduler = StepLR(linear.tile_update, 1, 0.5)
    snapshot = Snapshot(linear, scheduler)
    runs = []
    for _ in range(2):
        snapshot.save() if not runs else snapshot.restore()
        for step in range(3):
            stepped(linear, step)
            scheduler.step()
        runs.append([linear.weight.detach().clone(), linear.update.momentum_buffer.clone()])
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_attempts_are_taken_back():
    """MILS with linear heads for losses: a rejected attempt leaves weight and momentum as if it had not been."""
    runs = []
    for participation in (0.0, 1.0):
        torch.manual_seed(0)
        body = nn.Linear(WIDTH, WIDTH)
        linear = LinearLoss(mlkernels.CrossEntropyLoss(), WIDTH, CLASSES, tile_update=TileSGD(0.1, momentum=0.9))
        x, target = torch.randn(64, WIDTH), torch.randint(CLASSES, (64,))
        mils = MILS(
            body, torch.optim.SGD(body.parameters(), 0.1), primary=linear,
            auxiliary=lambda x, y, linear=linear: -linear(x, y), observation=(x, target), participation=participation,
            logits=linear.logits,
        )  # fmt: skip
        for at in range(0, 64, 16):
            accepted = mils.step(x[at : at + 16], target[at : at + 16]).accepted
            assert not accepted
        with pytest.raises(ValueError, match=r"primary steps in its backward \(tile_update\), so 2 batches"):
            mils.accumulate([(x[:8], target[:8])] * 2)
        runs.append(
            [linear.weight.detach().clone(), linear.update.momentum_buffer.clone(), body.weight.detach().clone()]
        )
    for plain, tried in zip(*runs, strict=True):
        assert torch.equal(plain, tried)


def test_an_interrupted_backward_is_not_forgotten(monkeypatch):
    """What stands before the break has stepped, the rest has not; no forward goes on from there, saved or not."""
    linear, _ = pair({**OPTIONS["heavy"], "stochastic_rounding": False}, memory=1000)
    snapshot = Snapshot(linear)
    snapshot.save()
    good, before = copy.deepcopy(linear.state_dict()), linear.weight.detach().clone()
    step_of = module.TileUpdate.step

    def breaks(self, rows, classes, gradient, generator):
        if classes.start > 0:
            raise KeyboardInterrupt
        step_of(self, rows, classes, gradient, generator)

    x, target = batch()
    for cure in (lambda: linear.load_state_dict(good), snapshot.restore):
        loss = linear(x, target)
        monkeypatch.setattr(module.TileUpdate, "step", breaks)
        with pytest.raises(KeyboardInterrupt):
            loss.backward()
        monkeypatch.setattr(module.TileUpdate, "step", step_of)
        at = linear.update.interrupted
        assert 0 < at < CLASSES
        assert not torch.equal(linear.weight[:at], before[:at]) and torch.equal(linear.weight[at:], before[at:])
        other, _ = pair(OPTIONS["heavy"])
        other.load_state_dict(linear.state_dict())
        for each in (linear, other):
            with pytest.raises(RuntimeError, match=rf"interrupted within tile_update: classes from {at} on have not"):
                each(x, target)
        cure()
        assert torch.equal(linear.weight, before)
        linear(x, target)
    linear(x, target).backward()


# ---- what cannot be --------------------------------------------------------------------------------------------------


def test_one_backward_per_step():
    """Each refused before anything has moved."""
    linear, _ = pair(OPTIONS["heavy"])
    x, target = batch()
    before = linear.weight.detach().clone()
    with pytest.raises(RuntimeError, match="two losses of a linear head with tile_update wait for a backward"):
        (linear(x, target) + linear(x, target)).backward()
    twice = LinearLoss(
        lambda f, y: mlkernels.cross_entropy(f, y) + mlkernels.focal_loss(f, y), WIDTH, CLASSES, dtype=F64,
        tile_update=TileSGD(0.1),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="two losses of a linear head"):
        twice(x, target).backward()
    with pytest.raises(RuntimeError, match="no second-order gradients"):
        torch.autograd.grad(linear(x, target), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"upstream gradient of 65536: a GradScaler's factor"):
        torch.amp.GradScaler("cpu").scale(linear(x, target)).backward()
    with pytest.raises(RuntimeError, match="upstream gradient of 1024: a GradScaler's"):
        linear(x, target).backward(torch.tensor(1024.0, dtype=F64))
    assert torch.equal(linear.weight, before)
    loss = linear(x, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has stepped in this loss's backward: a second one"):
        loss.backward()
    loss = linear(x, target)
    with torch.no_grad():
        linear.weight.mul_(0.5)
    with pytest.raises(RuntimeError, match="weight has changed since this loss was computed"):
        loss.backward()
    linear(x, target).backward()


def test_a_tied_weight_is_trained_by_its_linear_head_alone():
    embedding = nn.Embedding(CLASSES, WIDTH)
    linear = LinearLoss(mlkernels.CrossEntropyLoss(), WIDTH, CLASSES, weight=embedding.weight, tile_update=TileSGD(0.1))
    tokens, target = torch.arange(ROWS), torch.arange(ROWS) + 1
    before = embedding.weight.detach().clone()
    linear(embedding(tokens).detach(), target).backward()
    assert not torch.equal(embedding.weight, before)
    for each in (linear, copy.deepcopy(linear)):
        with pytest.raises(RuntimeError, match="has got a gradient from elsewhere: a weight that is tied"):
            each(each.weight[tokens], target).backward()


def test_wrappers_that_want_a_gradient(monkeypatch):
    from torch.nn.parallel import DistributedDataParallel

    linear, _ = pair(OPTIONS["plain"])
    x, target = batch()

    class Active:
        module, parameters_to_ignore = linear, set()

    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", Active)
    with pytest.raises(RuntimeError, match="tile_update refuses DistributedDataParallel around a linear head"):
        linear(x, target)
    Active.parameters_to_ignore = {"weight"}
    linear(x, target)
    linear.weight = nn.Parameter(linear.weight.detach())  # as fully_shard does
    with pytest.raises(RuntimeError, match=r"weight is another one now: FSDP and fully_shard"):
        linear(x, target)


def make(**options: Any) -> LinearLoss:
    return LinearLoss(mlkernels.CrossEntropyLoss(), WIDTH, CLASSES, **options)


SHARED = TileSGD(0.1)
KEPT = make(tile_update=SHARED)
BAD = [
    (TypeError, "TileSGD takes no 'foreach'", lambda: TileSGD(0.1, foreach=True)),
    (TypeError, "lr takes a number, got a tensor", lambda: TileSGD(torch.tensor(0.1))),
    (ValueError, "momentum must be >= 0, got -1", lambda: TileSGD(0.1, momentum=-1)),
    (ValueError, "nesterov takes momentum > 0 and dampening 0", lambda: TileSGD(0.1, nesterov=True)),
    (RuntimeError, "TileSGD steps in the loss's backward", lambda: TileSGD(0.1).step()),
    (RuntimeError, "TileSGD steps the weight of one linear head", lambda: SHARED.add_param_group({"params": []})),
    (ValueError, "tile_update takes a TileSGD of its own for every linear head", lambda: make(tile_update=SHARED)),
    (TypeError, "tile_update takes a TileSGD, got SGD",
     lambda: make(tile_update=torch.optim.SGD(KEPT.parameters(), 0.1))),
    (ValueError, "tile by tile: strategy takes", lambda: make(tile_update=TileSGD(0.1), strategy="stored")),
    (TypeError, r"float32, float64 or bfloat16, got torch\.float16", lambda: make(
        tile_update=TileSGD(0.1), dtype=torch.float16)),
    (TypeError, "stochastic_rounding takes a weight of bfloat16", lambda: make(
        tile_update=TileSGD(0.1, stochastic_rounding=True))),
]  # fmt: skip


@pytest.mark.parametrize("error, words, call", BAD, ids=[words for _, words, _ in BAD])
def test_bad_arguments(error, words, call):
    with pytest.raises(error, match=words):
        call()


def test_a_momentum_that_has_no_buffer():
    linear = make(tile_update=TileSGD(0.1))
    OneCycleLR(linear.tile_update, 0.1, total_steps=10)
    with pytest.raises(ValueError, match="momentum must be > 0 when TileSGD is made"):
        stepped(linear)


def test_half_precision_that_needs_a_scaler():
    linear = make(tile_update=TileSGD(0.1))
    x, target = batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(RuntimeError, match="refuses autocast to float16"):
        linear(x, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear(x.bfloat16(), target).backward()
