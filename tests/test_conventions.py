"""PyTorch's conventions, and the documented exceptions to them."""

import math
from enum import IntEnum
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from table import BY_NAME, F64, FEW, INF, LOSSES, NAN, TABLES, draw, extras, numbers_of, run

import mlkernels

NEUTRAL = [loss for loss in LOSSES if loss.neutral is not None]
CLASSES = 6
WEIGHT = torch.tensor([0.5, 1.5, 0.0, 2.0, 0.75, 1.25], dtype=F64)
OPTIONS = {
    "plain": {},
    "weight": {"weight": WEIGHT},
    "smoothing": {"label_smoothing": 0.2},
    "weighted smoothing": {"weight": WEIGHT, "label_smoothing": 0.2},
    "ignore": {"ignore_index": 4},
    "all": {"weight": WEIGHT, "label_smoothing": 0.2, "ignore_index": 4},
}


class Ignored(IntEnum):
    """An enumeration of integers, as data sets have them."""

    ONE = 1
    FOUR = 4


def neutral_arguments(loss, form):
    if form == "number":
        return dict(loss.neutral)
    return {k: torch.tensor(v, dtype=F64, requires_grad=True) for k, v in loss.neutral.items()}


def logits(rows=18, classes=CLASSES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    input = 3 * torch.randn(rows, classes, generator=generator, dtype=F64)
    target = torch.randint(0, classes, (rows,), generator=generator)
    for i, lead in enumerate((5.0, 20.0, 40.0, -40.0)[:rows]):
        input[i, target[i]] = input[i].max() + lead
    return input, target


def both(loss, input, target, params, reduction, backend, **options):
    """Ours and torch's (value, gradient), for an upstream gradient that is not 1."""
    found = []
    fixed = {k: v for k, v in loss.fixed.items() if k in ("eta", "gradient", "clamp", "beyond_pi")}
    for function in (
        lambda x: loss.call(x, target, **params, **fixed, reduction=reduction, backend=backend, **options),
        lambda x: F.cross_entropy(x, target, reduction=reduction, **options),
    ):
        x = input.clone().requires_grad_()
        value = function(x)
        upstream = torch.linspace(-1.5, 2, max(value.numel(), 2), dtype=F64)[: value.numel()].reshape(value.shape)
        value.backward(upstream)
        found.append((value.detach(), x.grad))
    return found


#: The options are not the loss's own: a few losses try them all.
COMBINATIONS = [
    (loss, form, options)
    for loss in NEUTRAL
    for form in ("number", "shared")
    for options in OPTIONS
    if loss in FEW or (form, options) in (("number", "plain"), ("shared", "all"))
]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("loss, form, options", COMBINATIONS, ids=str)
def test_neutral_parameters_are_cross_entropy(loss, backend, form, options, reduction):
    input, target = logits()
    arguments = neutral_arguments(loss, form)
    ours, theirs = both(loss, input, target, arguments, reduction, backend, **OPTIONS[options])
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("loss", NEUTRAL, ids=str)
def test_no_rows(loss, backend, reduction):
    ours, theirs = both(
        loss, torch.empty(0, CLASSES, dtype=F64), torch.empty(0, dtype=torch.long), loss.neutral, reduction, backend
    )
    torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)
    assert ours[1].shape == (0, CLASSES)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("options", ["plain", "weight", "smoothing"])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_all_rows_ignored(loss, backend, options, reduction):
    """Mean: NaN as in torch, but the gradient is exactly 0 (0/0 of nothing), also that of the parameters."""
    input, target, params = draw(loss, rows=4, form="shared")
    target[:] = -100
    input[1] = NAN
    group = {"group": loss.group(target)} if loss.groups else {}
    value, grad, by_param = run(
        loss, input, target, params, None if reduction != "none" else torch.ones(4), reduction=reduction,
        backend=backend, **OPTIONS[options], **group,
    )  # fmt: skip
    if reduction == "mean":
        assert math.isnan(float(value))
    else:
        assert torch.equal(value, torch.zeros_like(value))
    assert torch.equal(grad, torch.zeros_like(grad))
    for name, found in by_param.items():
        assert torch.equal(found, torch.zeros_like(found)), name


def test_weights_that_sum_to_nothing_are_nan_as_in_torch(backend):
    input, _ = logits(3)
    target = torch.full((3,), 2)
    for smoothing in (0.0, 0.2, 1.0):
        ours, theirs = both(
            BY_NAME["cross_entropy"], input, target, {"scale": 1.0}, "mean", backend,
            weight=WEIGHT, label_smoothing=smoothing,
        )  # fmt: skip
        assert math.isnan(float(ours[0])) and math.isnan(float(theirs[0])), smoothing
        assert bool(ours[1].isnan().all()) and bool(theirs[1].isnan().all()), smoothing


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weight"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("name", ["cross_entropy", "modulated", "two_scale", "affine"])
def test_masked_classes_as_in_torch(name, backend, smoothing, weight):
    """-inf logits are classes of probability 0; smoothing one costs infinitely much, or NaN where its weight is 0; its
    gradient does not. The last rows hold no other class."""
    loss = BY_NAME[name]
    input, target = logits(10)
    input[torch.arange(8), (target[:8] + 1) % CLASSES] = -INF
    input[:4, 5] = torch.where(target[:4] == 5, input[:4, 5], -INF)
    input[8:] = torch.full_like(input[8:], -INF).scatter(1, target[8:, None], 1.5)
    options = {"label_smoothing": smoothing, "weight": weight}
    ours, theirs = both(loss, input, target, loss.neutral, "none", backend, **options)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-13, equal_nan=True)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("weight", [None, torch.tensor([0.7])], ids=["plain", "weight"])
def test_a_single_class_has_no_gradient(backend, weight):
    """What smoothing takes from the label it gives to it, to the bit: only z-loss is left."""
    input, target = torch.tensor([[3.3], [-0.7], [1.0]]), torch.zeros(3, dtype=torch.long)
    for z_loss, smoothing in ((0.0, 0.1), (0.0, 1.0), (0.01, 0.3)):
        found = []
        for epsilon in (smoothing, 0.0):
            x, scale = input.clone().requires_grad_(), torch.tensor(7.3, requires_grad=True)
            options = {"label_smoothing": epsilon, "z_loss": z_loss, "weight": weight, "reduction": "sum"}
            mlkernels.cross_entropy(x, target, scale=scale, backend=backend, **options).backward(torch.tensor(0.9))
            found.append((x.grad, scale.grad))
        assert all(map(torch.equal, *found)), (z_loss, smoothing, found)
        assert bool(found[0][0].any()) == bool(z_loss)


SCALES = {"scale", "scale_low", "scale_high", "logit_norm"}


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if SCALES & loss.params.keys()], ids=str)
def test_a_masked_class_under_smoothing_makes_scales_infinite(loss, backend):
    """Smoothing counts a class of probability 0: the loss is infinite, and grows with the scale, also where no other
    class has a chance."""
    target = torch.tensor([0])
    params = loss.values("shared", target, 4)
    options = {"label_smoothing": 0.1} | ({"group": loss.group(target)} if loss.groups else {})
    for row in ([0.4, -INF, 0.9, -0.3], [0.4, -INF, -INF, -INF]):
        value, _, found = run(loss, torch.tensor([row]), target, params, backend=backend, **options)
        _, _, wanted = run(loss, torch.tensor([row]), target, params, backend="reference", **options)
        assert value == INF
        for name in SCALES & found.keys():
            assert torch.equal(found[name], wanted[name]), name
            assert found[name] in (0, -INF if name == "logit_norm" else INF), name
        assert any(found[name] for name in SCALES & found.keys())


@pytest.mark.parametrize("loss", NEUTRAL, ids=str)
def test_a_masked_target_as_in_torch(loss, backend):
    input, target = logits(4)
    input[1, target[1]] = -INF
    ours, theirs = both(loss, input, target, loss.neutral, "none", backend)
    assert ours[0][1] == INF
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-11, atol=1e-13)


BAD_ROWS = {
    "NaN elsewhere": lambda row, y: row.index_fill_(0, torch.tensor([(y + 1) % CLASSES]), NAN),
    "NaN at the target": lambda row, y: row.index_fill_(0, torch.tensor([y]), NAN),
    "NaN everywhere": lambda row, y: row.fill_(NAN),
    "+inf elsewhere": lambda row, y: row.index_fill_(0, torch.tensor([(y + 1) % CLASSES]), INF),
    "+inf at the target": lambda row, y: row.index_fill_(0, torch.tensor([y]), INF),
    "+inf twice": lambda row, y: row.index_fill_(0, torch.tensor([y, (y + 1) % CLASSES]), INF),
    "all -inf": lambda row, y: row.fill_(-INF),
    "NaN and +inf": lambda row, y: row.index_fill_(0, torch.tensor([(y + 2) % CLASSES]), NAN).index_fill_(
        0, torch.tensor([(y + 1) % CLASSES]), INF
    ),
}


def can_be_bad(loss, bad):
    if "target_logit" in loss.params:  # replaces the target's own
        return "target" not in bad and bad != "all -inf"
    return bad != "all -inf" or loss.masked_target


@pytest.mark.parametrize("loss, bad", [(a, b) for a in LOSSES for b in BAD_ROWS if can_be_bad(a, b)], ids=str)
def test_a_bad_row_is_nan_alone(loss, bad, backend):
    """NaN or +inf makes its own row NaN (loss and gradient), and leaves the others what they were, to the bit."""
    input, target, params = draw(loss, rows=8, form="shared", kinds=("random",))
    params = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in params.items()}
    input = input.float()
    options = {"reduction": "none", "backend": backend} | ({"group": loss.group(target)} if loss.groups else {})
    upstream = torch.linspace(-1, 2, 8)
    good = run(loss, input, target, params, upstream, **options)
    BAD_ROWS[bad](input[3], int(target[3]))
    value, grad, _ = run(loss, input, target, params, upstream, **options)
    rest = torch.arange(8) != 3
    assert torch.equal(value[rest], good[0][rest]) and torch.equal(grad[rest], good[1][rest])
    assert bool(value[3].isnan()), value
    read = torch.arange(6) != (target[3] if "target_logit" in loss.params else -1)
    assert bool(grad[3][read].isnan().all()), grad[3]


@pytest.mark.parametrize("at", [0, 1])
def test_softcap_does_not_hide_an_overflow(backend, at):
    """c tanh(inf / c) = c would make a number of it; -inf becomes -c, as the formula says."""
    input, target = torch.tensor([[0.5, 1.0, -0.5], [0.5, 1.0, -0.5]]), torch.tensor([0, 1])
    input[0, at] = INF
    input[1, 2] = -INF
    x = input.requires_grad_()
    loss = mlkernels.cross_entropy(x, target, softcap=5.0, reduction="none", backend=backend)
    loss.backward(torch.tensor([1.0, 2.0]))
    assert bool(loss[0].isnan())
    assert bool(x.grad[0].isnan().all())
    capped = 5 * torch.tanh(torch.tensor([0.1, 0.2, -INF]))
    torch.testing.assert_close(loss[1].detach(), F.cross_entropy(capped, torch.tensor(1)))
    assert bool(x.grad[1].isfinite().all())


def test_a_bad_row_in_the_statistics(backend):
    input, target = logits(4)
    input[1, 0] = NAN
    input[2, :] = INF
    _, rows = mlkernels.softmax_loss(input, target, reduction="none", return_stats=True, backend=backend)
    assert bool(rows.log_prob[1].isnan()) and int(rows.prediction[1]) == -1
    assert bool(rows.log_prob[2].isnan())
    assert bool(rows.log_prob[[0, 3]].isfinite().all())


@pytest.mark.parametrize(
    "loss, form", [(loss, form) for loss in LOSSES for form in (loss.forms[0], loss.forms[-1])], ids=str
)
@pytest.mark.parametrize("held", [NAN, -INF])
def test_ignored_rows_are_not_read(loss, form, backend, held):
    """Whatever an ignored row holds, and whatever its own parameters hold."""
    input, target, params = draw(loss, rows=6, form=form, kinds=("random", "ties"))
    target[2] = -100
    for name, value in params.items():
        if isinstance(value, torch.Tensor) and value.dim() == 2 and name not in TABLES:
            value[2] = NAN
    group = loss.group(target)
    options = {} if group is None else {"group": group}
    keep = torch.arange(6) != 2
    upstream = torch.linspace(-1, 2, 6, dtype=F64)
    input[2] = held
    value, grad, by_param = run(loss, input, target, params, upstream, reduction="none", backend=backend, **options)
    assert float(value[2]) == 0.0 and torch.equal(grad[2], torch.zeros(6, dtype=F64))
    without = {k: v[keep] if isinstance(v, torch.Tensor) and v.shape == (6, 1) else v for k, v in params.items()}
    options = {} if group is None else {"group": group[keep]}
    wanted = run(loss, input[keep], target[keep], without, upstream[keep], reduction="none", backend=backend, **options)
    assert torch.equal(value[keep], wanted[0]) and torch.equal(grad[keep], wanted[1])
    for name, found in by_param.items():
        if found.shape == (6, 1):
            assert float(found[2]) == 0.0, name
            found = found[keep]
        torch.testing.assert_close(found, wanted[2][name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("loss", FEW, ids=str)
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 5, 300])
def test_ignore_index_in_and_out_of_range(loss, backend, ignore_index):
    input, target, params = draw(loss, rows=8)
    options = {} if loss.group(target) is None else {"group": loss.group(target)}
    keep = target != ignore_index
    if ignore_index in (-100, -1, 300):
        keep = torch.arange(8) % 3 != 1
        target = torch.where(keep, target, ignore_index)
    value, _, _ = run(loss, input, target, params, 1.5, ignore_index=ignore_index, backend=backend, **options)
    params = {k: v[keep] if isinstance(v, torch.Tensor) and v.shape == (8, 1) else v for k, v in params.items()}
    options = {k: v[keep] for k, v in options.items()}
    wanted = loss(input[keep], target[keep], params, reduction="sum", backend="reference", **options) / keep.sum()
    torch.testing.assert_close(value, wanted.detach(), rtol=1e-12, atol=1e-13)


def test_z_loss_is_never_class_weighted(backend):
    input, target = logits(6)
    target[1] = -100
    lse = input.logsumexp(1)
    kept = target != -100
    for reduction in ("none", "sum", "mean"):
        plain = mlkernels.cross_entropy(input, target, weight=WEIGHT, reduction=reduction, backend=backend)
        with_z = mlkernels.cross_entropy(input, target, weight=WEIGHT, reduction=reduction, z_loss=0.5, backend=backend)
        penalty = torch.where(kept, 0.5 * lse.square(), 0)
        wanted = {"none": penalty, "sum": penalty.sum(), "mean": penalty.sum() / 5}[reduction]
        torch.testing.assert_close(with_z - plain, wanted, rtol=1e-11, atol=1e-12)


def test_mean_is_torchs_mean(loss, backend):
    """The sum of weighted losses over the sum of the weights of the kept rows: not over N, nor over the rows kept."""
    input, target, params = draw(loss, rows=9)
    target[4] = -100
    options = {"weight": WEIGHT, "backend": backend} | ({"group": loss.group(target)} if loss.groups else {})
    total = float(loss(input, target, params, reduction="sum", **options))
    mean = float(loss(input, target, params, reduction="mean", **options))
    assert mean == pytest.approx(total / float(WEIGHT[target[target >= 0]].sum()), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_dtypes_of_results(backend, dtype, reduction):
    input, target = logits(4)
    x = input.to(dtype).requires_grad_()
    weight = WEIGHT.to(torch.bfloat16 if dtype == torch.float64 else F64)  # any floating dtype will do
    loss, rows = mlkernels.softmax_loss(
        x, target, weight=weight, reduction=reduction, return_stats=True, backend=backend
    )
    wide = F64 if dtype == F64 else torch.float32
    assert loss.dtype == rows.logsumexp.dtype == rows.log_prob.dtype == rows.confidence.dtype == wide
    assert rows.prediction.dtype == rows.rank.dtype == torch.int64
    loss.sum().backward()
    assert x.grad.dtype == dtype


INTEGERS = [torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]


@pytest.mark.parametrize("loss", [BY_NAME["cross_entropy"], BY_NAME["piecewise_groups"]], ids=str)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_of_any_integer_dtype(loss, backend, dtype):
    input, target, params = draw(loss, rows=8)
    ignore = -3 if dtype.is_signed else min(torch.iinfo(dtype).max, 2**53)
    target[2] = ignore
    options = {"ignore_index": ignore, "backend": backend} | ({"group": loss.group(target)} if loss.groups else {})
    wanted = run(loss, input, target, params, 0.5, **options)
    if loss.groups:
        options["group"] = options["group"].to(dtype)
    found = run(loss, input, target.to(dtype), params, 0.5, **options)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_are_compared_as_64_bit_integers(backend, dtype):
    """A label that the default -100, or another ignore_index, equals in the label's own bits alone is a label."""
    bits = torch.iinfo(dtype).bits
    label, ignore_index = (3, 3 + 2**bits) if dtype.is_signed else (2**bits - 100, -100)
    target = torch.tensor([1, -100]).view(dtype) if bits == 64 else torch.tensor([1, label]).to(dtype)
    classes = 200 if label < 200 else 5
    x = torch.randn(2, classes, dtype=F64, requires_grad=True)
    call = lambda x, y: mlkernels.cross_entropy(x, y, ignore_index=ignore_index, backend=backend)
    measure = lambda x, y: mlkernels.metrics.accuracy(x, y, ignore_index=ignore_index)
    if label < classes:
        loss = call(x, target)
        torch.testing.assert_close(loss, F.cross_entropy(x, target.long()))
        right = x.argmax(1) == target.long()
        assert measure(x, target) == right.double().mean()
    else:
        for function in (call, measure):
            with pytest.raises(IndexError, match=rf"target {label} at row 1 is out of range \[0, 5\)"):
                function(x, target)


@pytest.mark.parametrize("other", [mlkernels.multi_margin_loss, mlkernels.center_loss, mlkernels.lgm_loss])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_labels_beside_the_family(other, dtype):
    x, y = torch.randn(3, 4), torch.tensor([0, 3, 1])
    more = () if other is mlkernels.multi_margin_loss else (torch.randn(4, 4),)
    assert torch.equal(other(x, y.to(dtype), *more), other(x, y, *more))
    if not dtype.is_signed:
        with pytest.raises(IndexError, match="target 156 at row 1"):  # -100 in eight bits
            other(x, torch.tensor([0, 156, 1]).to(dtype), *more)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_labels_that_only_a_device_sees(dtype):
    """Where nobody looks, a label from 2^63 on is a bad one and not what is ignored, whatever its bits say."""
    from mlkernels.checks import widened

    highest = torch.tensor([-1]).view(torch.uint64) if dtype == torch.uint64 else torch.tensor([2**15]).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlkernels.tracing, "traced", lambda *tensors: True)
        for ignore_index in (-1, -2, -100, None):
            found = int(widened("target", highest, 5, ignore_index))
            assert found != ignore_index
            assert found < 0 if dtype == torch.uint64 else found == 2**15


@pytest.mark.parametrize("ignore_index", [np.int64(1), np.uint8(1), Ignored.ONE], ids=repr)
def test_numbers_of_other_libraries(backend, ignore_index):
    """NumPy's numbers, fractions and enumerations are numbers, and integers of any kind an ignore_index."""
    x, y = torch.randn(3, 4), torch.tensor([0, 1, 2])
    wanted = mlkernels.focal_loss(x, y, gamma=2.0, z_loss=0.5, softcap=3.0, ignore_index=1, backend=backend)
    for one in (np.float32, np.float64, np.int64, Fraction):
        found = mlkernels.focal_loss(
            x, y, gamma=one(2), z_loss=np.float16(0.5), softcap=Fraction(6, 2), ignore_index=ignore_index,
            backend=backend,
        )  # fmt: skip
        assert torch.equal(found, wanted)
    assert torch.equal(
        mlkernels.sphereface_loss(x.tanh(), y, margin=Ignored.FOUR, backend=backend),
        mlkernels.sphereface_loss(x.tanh(), y, margin=4, backend=backend),
    )


def test_soft_targets(backend):
    """Class probabilities are cross_entropy's, on the reference backend; elsewhere an error that says so."""
    input, _ = logits(5)
    soft = torch.softmax(torch.randn(5, CLASSES, dtype=F64), 1)
    if backend != "reference":
        with pytest.raises(TypeError, match="reference"):
            mlkernels.cross_entropy(input, soft, backend=backend)
        return
    with pytest.raises(ValueError, match=r"ignore_index has no meaning .* probabilities.* got 0"):
        mlkernels.cross_entropy(input, soft, ignore_index=0)  # as torch refuses it
    assert mlkernels.cross_entropy(input, soft, ignore_index=-1) == mlkernels.cross_entropy(input, soft)
    with pytest.raises(ValueError, match=r"\(5, 6\), got \(5,\); .*target\.long\(\)"):
        mlkernels.cross_entropy(input, soft[:, 0])
    for chosen in (None, "reference"):
        x, y = input.clone().requires_grad_(), input.clone().requires_grad_()
        ours = mlkernels.cross_entropy(x, soft, scale=1.5, weight=WEIGHT, label_smoothing=0.1, backend=chosen)
        theirs = F.cross_entropy(1.5 * y, soft, WEIGHT, label_smoothing=0.1)
        (3 * ours).backward()
        (3 * theirs).backward()
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(x.grad, y.grad)
    with pytest.raises(TypeError, match="target"):
        mlkernels.focal_loss(input, soft, backend=backend)


def test_nothing_is_mutated(loss, backend):
    input, target, params = draw(loss, form="shared")
    target[1] = -100
    options = extras(CLASSES)
    if loss.groups:
        options["group"] = loss.group(target)
    held = [input, target, *(v for v in (*params.values(), *options.values()) if isinstance(v, torch.Tensor))]
    before = [(v.clone(), v._version) for v in held]
    value = loss(input.requires_grad_(), target, params, backend=backend, **options)
    value.backward(torch.tensor(2.0, dtype=F64))
    for tensor, (old, version) in zip(held, before, strict=True):
        assert torch.equal(tensor.detach(), old) and tensor._version == version


def test_predictions_on_ties(backend):
    input = torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0], [-INF, -INF, 1.0], [3.0, 3.0, 3.0]])
    target = torch.tensor([2, 2, 0, -100])
    _, rows = mlkernels.softmax_loss(input, target, return_stats=True, backend=backend)
    assert rows.prediction.tolist() == [1, 0, 2, -1]
    assert rows.rank.tolist() == [0, 0, 1, 0]
    assert rows.confidence.tolist() == [0.0, 0.0, -INF, 0.0]


def test_statistics_are_of_the_untransformed_logits(backend):
    """softcap and adjustment come before, transform and scale after them."""
    input = torch.tensor([[0.8, 0.7, -0.2], [0.1, 0.9, 0.3]], dtype=F64)
    target = torch.tensor([0, 0])
    loss, rows = mlkernels.softmax_loss(
        input, target, transform=mlkernels.Margin(m3=0.5), scale=10.0, logit_adjustment=torch.tensor([0.0, 0.0, 1.0]),
        reduction="none", return_stats=True, backend=backend,
    )  # fmt: skip
    assert rows.prediction.tolist() == [0, 2] and rows.rank.tolist() == [0, 2]
    torch.testing.assert_close(rows.confidence, torch.tensor([0.0, -1.2], dtype=F64), atol=1e-15, rtol=0)
    torch.testing.assert_close(rows.log_prob, -loss)


def test_out_of_range_numbers_in_tensors_are_nan_not_clamped():
    """What a GPU would meet unchecked: NaN rows. The reference is asked below the checks."""
    from mlkernels.backends import reference
    from mlkernels.call import DEFAULTS
    from mlkernels.numbering import HeadKind, Slot
    from mlkernels.spec import spec

    input, target = logits(3)
    for slot, structure, bad in (
        (Slot.SCALE, spec(), -1.0),
        (Slot.HEAD_B, spec(head=HeadKind.MODULATED), 0.0),
        (Slot.HEAD_C, spec(head=HeadKind.MODULATED), -0.5),
        (Slot.HEAD_A, spec(head=HeadKind.TRUNCATED), 1.5),
    ):
        consts = DEFAULTS.copy()
        consts[Slot.SCALE] = consts[Slot.HEAD_A] = consts[Slot.HEAD_B] = consts[Slot.HEAD_D] = 1.0
        value = torch.tensor(bad, dtype=F64)
        loss, _ = reference.softmax_loss(input, target, numbers_of(structure, consts, 1 << slot), [value])
        assert bool(loss.isnan().all()), slot


@pytest.mark.parametrize("classes, rows", [(6, None), (6, 1), (1, 3)])
def test_one_element_is_shared(backend, classes, rows):
    """Shape (1,), which is what fully_shard takes, is as 0-d, whatever C and N are; its gradient has that shape."""
    for loss in FEW if classes > 1 and rows is None else FEW[:3]:
        input, target, params = draw(loss, form="shared", classes=classes)
        input, target = input[:rows], target[:rows]
        params = {k: v[:rows] if v.dim() == 2 and k not in TABLES else v for k, v in params.items()}
        ones = {k: v.reshape(1) if v.dim() == 0 else v for k, v in params.items()}
        reductions = ("mean", "none") if rows is None else ("sum",)
        for reduction in reductions:
            upstream = torch.linspace(-1.0, 2.0, len(target), dtype=F64) if reduction == "none" else 1.5
            options = {"reduction": reduction, "backend": backend}
            if loss.groups:
                options["group"] = loss.group(target)
            wanted = run(loss, input, target, params, upstream, **options)
            found = run(loss, input, target, ones, upstream, **options)
            assert {k: v.shape for k, v in found[2].items()} == {k: v.shape for k, v in ones.items()}
            found = found[0], found[1], {k: v.reshape(wanted[2][k].shape) for k, v in found[2].items()}
            torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_one_element_is_shared_beside_the_family():
    """The L-GM margin, class probabilities, what the modules train: their parameters may be replaced by (1,) ones."""
    input, target = torch.randn(4, 3), torch.tensor([0, 2, 1, 2])
    loss = mlkernels.LGMLoss(num_features=3, num_classes=5, alpha=torch.nn.Parameter(torch.tensor(0.3)))
    joint = mlkernels.JointLoss([mlkernels.CrossEntropyLoss(), mlkernels.FocalLoss()], mode="trainable")
    scale = mlkernels.CrossEntropyLoss(scale=torch.nn.Parameter(torch.tensor(2.0)))
    two = mlkernels.TwoScaleLoss(2.0)
    norm, soft = torch.tensor(3.0), torch.full((4, 3), 1 / 3)
    for module, *arguments in (
        (loss, input, target),
        (joint, input, target),
        (scale, input, soft),
        (two, input, target),
    ):
        more = [norm] if module is two else []
        wanted = module(*arguments, *more)
        wanted.backward()
        gradients = [(name, parameter.grad) for name, parameter in module.named_parameters()]
        for name, gradient in gradients:
            if gradient.dim() == 0:
                setattr(module, name, torch.nn.Parameter(getattr(module, name).detach().reshape(1)))
        module.zero_grad()
        found = module(*arguments, *(value.reshape(1) for value in more))
        assert found.shape == () and torch.equal(found, wanted)
        found.backward()
        for name, gradient in gradients:
            assert torch.equal(getattr(module, name).grad, gradient.reshape(getattr(module, name).shape))
    assert torch.equal(two.probabilities(input, norm.reshape(1)), two.probabilities(input, norm))
