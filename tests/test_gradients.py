"""Gradients beyond what test_values.py compares anyway: the oracle's own, edges, statistics, subsets of the leaves."""

import math

import oracle
import pytest
import torch
from oracle import TABLES, mp
from table import BY_NAME, F64, FEW, LOSSES, check, close, draw, expected, for_oracle, leaves, run

import mlkernels

# ---- the oracle against itself: derivatives written by hand against differences of values ----------------------------


OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 7.0, "weight": [0.5, 2.0, 1.5, 1.0]}
UP_ENTROPY = 0.75


def difference(function):
    """A central difference in 50 digits, good to 20."""
    h = mp.mpf(10) ** -15
    return (function(h) - function(-h)) / (2 * h)


def moved(values, k, h):
    """The list with its k-th number changed."""
    return [mp.mpf(v) + h if i == k else mp.mpf(v) for i, v in enumerate(values)]


def check_row(structure, f, y, params):
    def total(f, **changed):
        found = oracle.row(structure, f, y, params | changed, **OPTIONS)
        return found.loss + found.penalty + UP_ENTROPY * found.entropy

    def agree(slope, wanted, what):
        assert abs(slope - wanted) < 1e-18 * (1 + abs(wanted)), what

    row = oracle.row(structure, f, y, params, up_entropy=UP_ENTROPY, **OPTIONS)
    for j in range(len(f)):
        agree(difference(lambda h, j=j: total(moved(f, j, h))), row.grad[j], f"logit {j}")
    for name, value in params.items():
        # Not differentiable: m1 = 1 (another formula), gamma = 0 (the end of its range), a bias of 0 (another formula).
        if (name, value if name not in TABLES else None) in (("m1", 1.0), ("gamma", 0.0)):
            continue
        if name in TABLES:
            k, wanted = row.params[name]
            if name == "tau_bias" and value[k] == 0:
                continue
            slope = difference(lambda h, name=name, k=k: total(f, **{name: moved(params[name], k, h)}))
        else:
            wanted = row.params[name]
            slope = difference(lambda h, name=name: total(f, **{name: mp.mpf(float(params[name])) + h}))
        agree(slope, wanted, name)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss.structure.gradient == "exact"], ids=str)
def test_the_closed_derivatives(loss):
    input, target, params = draw(loss, rows=2, classes=4, kinds=("random", "confident5"), softcap=7.0)
    params = for_oracle(loss, params)
    for i, y in enumerate(target.tolist()):
        check_row(loss.structure, input[i].tolist(), y, oracle.of_row(params, i, y, loss.group(target)))


# ---- edges -----------------------------------------------------------------------------------------------------------

EDGES = [1.0, -1.0, 1.0000005, -1.0000005, 1.0001, 0.99999, -0.99999]
MARGINS = [loss.name for loss in LOSSES if loss.structure.transform == "margin" and "norm" not in loss.params]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("name", MARGINS)
def test_cosines_at_the_ends(name, backend, dtype):
    """acos and sqrt at cos = 1 and just beyond: finite, and the floored derivative."""
    loss = BY_NAME[name]
    generator = torch.Generator().manual_seed(5)
    input = (1.6 * torch.rand(len(EDGES), 5, generator=generator) - 0.8).double()
    target = torch.randint(0, 5, (len(EDGES),), generator=generator)
    for i, x in enumerate(EDGES):
        input[i, target[i]] = torch.tensor(x).double()
    params = loss.values("shared", target, 5)
    upstream = torch.linspace(-2, 3, len(EDGES), dtype=torch.float32).double()
    check(loss, backend, input, target, params, dtype, upstream, reduction="none")


@pytest.mark.parametrize("m1", [1.0, 1.0 + 2**-20])
@pytest.mark.parametrize("beyond_pi", ["monotone", "none", "easy"])
def test_m1_can_be_trained_away_from_1(backend, beyond_pi, m1):
    """m1 = 1 is computed in closed form; its derivative, -theta sin(theta + m2), is not 0 for that."""
    input, target, _ = draw(BY_NAME["margin_easy"], rows=8)
    fixed = {"m2": 0.3, "m3": 0.1, "scale": 8.0, "beyond_pi": beyond_pi}
    own = torch.tensor(m1, dtype=F64, requires_grad=True)
    upstream = torch.linspace(-1, 2, 8, dtype=F64)
    mlkernels.margin_cross_entropy(input, target, m1=own, **fixed, reduction="none", backend=backend).backward(upstream)
    structure = oracle.Structure(transform="margin", beyond_pi=beyond_pi)
    params = {"m1": m1, "m2": 0.3, "m3": 0.1, "scale": 8.0}
    wanted = oracle.batch(structure, input.numpy(), target.numpy(), params, reduction="none", upstream=upstream.numpy())
    assert abs(wanted.params["m1"]) > 0.1
    assert float(own.grad) == pytest.approx(float(wanted.params["m1"]), rel=1e-9)


@pytest.mark.parametrize("m2", [-0.2, -1.0, -2.5])
@pytest.mark.parametrize("beyond_pi", ["linear", "easy", "monotone", "none"])
def test_negative_margins(backend, beyond_pi, m2):
    """Beyond the cosine's maximum, where theta + m2 < 0: never a push away from the class, but for "none"."""
    x = torch.tensor([-1.0, -0.9, -0.5, 0.3, 0.6, 0.9, 0.985, 0.9999, 1.0, 1.2], dtype=F64)
    input = torch.stack([x, torch.full_like(x, 0.1), torch.full_like(x, -0.4)], 1)
    target = torch.zeros(len(x), dtype=torch.long)
    logits = input.clone().requires_grad_()
    own = {name: torch.tensor(v, dtype=F64, requires_grad=True) for name, v in {"m2": m2, "m3": 0.1}.items()}
    upstream = torch.linspace(1, 2, len(x), dtype=F64)
    rows = mlkernels.margin_cross_entropy(
        logits, target, **own, scale=2.0, beyond_pi=beyond_pi, reduction="none", backend=backend
    )
    rows.backward(upstream)
    structure = oracle.Structure(transform="margin", beyond_pi=beyond_pi)
    params = {"m1": 1.0, "m2": m2, "m3": 0.1, "scale": 2.0}
    wanted = oracle.batch(structure, input.numpy(), target.numpy(), params, reduction="none", upstream=upstream.numpy())
    eps = torch.finfo(F64).eps
    close(rows.detach(), wanted.loss, wanted.loss_unit, eps, "loss")
    close(logits.grad, wanted.grad, wanted.grad_unit, eps, "gradient")
    for name, leaf in own.items():
        close(leaf.grad, wanted.params[name], wanted.param_units[name], eps, name)
    pushed_away = bool((logits.grad[:, 0] > 0).any())
    assert pushed_away == (beyond_pi == "none")
    if beyond_pi in ("linear", "easy"):  # t at 1 is 2 - cos m2 - m3, unless "easy" leaves the row alone
        lead = rows.detach()[8]
        t = torch.tensor(2 - math.cos(m2) - 0.1, dtype=F64)
        row = torch.stack([2 * t, torch.tensor(0.2, dtype=F64), torch.tensor(-0.8, dtype=F64)])
        torch.testing.assert_close(lead, torch.nn.functional.cross_entropy(row, torch.tensor(0)))


def test_linear_at_its_corner(backend):
    """The linear continuation jumps at x = -cos m2; on both sides it is what it says."""
    input = torch.tensor([[-0.88, 0.1], [-0.87, 0.1]], dtype=F64)  # -cos .5 = -.87758
    x = input.clone().requires_grad_()
    mlkernels.arcface_loss(
        x, torch.tensor([0, 0]), margin=0.5, scale=8.0, reduction="none", backend=backend
    ).sum().backward()
    wanted = oracle.batch(
        oracle.Structure(transform="margin"), input.numpy(), [0, 0], {"m1": 1.0, "m2": 0.5, "m3": 0.0, "scale": 8.0},
        reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(x.grad, torch.as_tensor(wanted.grad), rtol=1e-12, atol=0)


def test_two_scale_threshold_is_closed_above(backend):
    """Equality takes the high scale; the threshold is drawn on the raw logits, not on those divided by the norm."""
    input = torch.tensor([[0.75, 0.25], [0.75, 0.375]], dtype=F64)
    low, high = torch.tensor(1.5, dtype=F64, requires_grad=True), torch.tensor(6.0, dtype=F64, requires_grad=True)
    loss = mlkernels.two_scale_cross_entropy(
        input, torch.tensor([0, 0]), low, high, eta=0.5, logit_norm=torch.tensor(3.0, dtype=F64), reduction="none",
        backend=backend,
    )  # fmt: skip
    wanted = torch.stack([torch.tensor(-0.5 * 2.0).exp().log1p(), torch.tensor(-0.375 * 0.5).exp().log1p()]).double()
    torch.testing.assert_close(loss.detach(), wanted, rtol=1e-6, atol=0)
    loss[0].backward()
    assert float(low.grad) == 0.0 and float(high.grad) != 0.0  # an empty group's gradient is exactly 0


SHARED = [loss for loss in LOSSES if not loss.groups and not {"target_logit", "norm"} & loss.params.keys()]


@pytest.mark.parametrize("clamp", ["min", "cross_entropy"])
def test_tau_is_clamped_at_its_minimum(backend, clamp):
    """Where tau <= minimum, equality included: no gradient, or that of cross entropy."""
    # p = 1/2 in both rows; tau = slope / 2 + bias is a quarter (the minimum) and a little more.
    slope = torch.tensor([[1.0], [1.0]], dtype=F64)
    bias = torch.tensor([[-0.25], [-0.25 + 2.0**-20]], dtype=F64, requires_grad=True)
    x = torch.zeros(2, 2, dtype=F64, requires_grad=True)
    loss = mlkernels.piecewise_cross_entropy(
        x, torch.tensor([0, 1]), tau_slope=slope, tau_bias=bias, group=torch.tensor([0, 1]), tau_min=0.25, clamp=clamp,
        reduction="none", backend=backend,
    )  # fmt: skip
    loss.backward(torch.tensor([1.0, 2.0], dtype=F64))
    level = torch.tensor([0.25, 0.25 + 2.0**-20], dtype=F64)
    n = torch.tensor([0.5], dtype=F64).log().neg()
    extra = torch.cat([n, n * 0]) if clamp == "cross_entropy" else 0
    torch.testing.assert_close(loss.detach(), -level.log() + extra, rtol=1e-14, atol=0)
    w = torch.tensor([1.0 if clamp == "cross_entropy" else 0.0, 2 * 0.5 / float(level[1])], dtype=F64)
    torch.testing.assert_close(x.grad, torch.stack([-w, w], 1) * torch.tensor([[0.5], [-0.5]]), rtol=1e-13, atol=0)
    torch.testing.assert_close(
        bias.grad[:, 0], torch.tensor([0.0, -2 / float(level[1])], dtype=F64), rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("loss", SHARED, ids=str)
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_identical_rows_have_identical_gradients(loss, backend, classes):
    """Batch invariance: a row's result does not depend on where it lies or on its neighbours."""
    input, target, params = draw(loss, rows=2, classes=classes, kinds=("random", "ties"))
    many = torch.cat([input.repeat(9, 1), input[:1]]).float()
    labels = torch.cat([target.repeat(9), target[:1]])
    value, grad, _ = run(loss, many, labels, params, torch.full((19,), 1.25), reduction="none", backend=backend)
    assert torch.equal(value[::2], value[:1].expand(10)) and torch.equal(value[1::2], value[1:2].expand(9))
    assert torch.equal(grad[::2], grad[:1].expand(10, -1)) and torch.equal(grad[1::2], grad[1:2].expand(9, -1))


# ---- subsets of the leaves, and the parameters' dtypes ---------------------------------------------------------------


@pytest.mark.parametrize("loss", FEW, ids=str)
def test_each_gradient_alone(loss, backend):
    """Asking for one gradient gives what asking for all gives."""
    input, target, params = draw(loss, rows=8, form="shared")
    options = {"backend": backend, "reduction": "sum"} | ({"group": loss.group(target)} if loss.groups else {})
    _, grad, by_param = run(loss, input, target, params, 0.75, **options)
    tensors = [k for k, v in params.items() if isinstance(v, torch.Tensor)]
    for name in tensors:
        own = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in params.items()}
        own[name] = own[name].clone().requires_grad_()
        (0.75 * loss(input, target, own, **options)).backward()
        torch.testing.assert_close(own[name].grad, by_param[name], rtol=1e-12, atol=1e-14)
    x = input.clone().requires_grad_()
    (0.75 * loss(x, target, params, **options)).backward()
    torch.testing.assert_close(x.grad, grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", FEW, ids=str)
def test_parameters_of_any_dtype(loss, backend, dtype):
    """A parameter is read in its own dtype (not cast in place), and its gradient has that dtype."""
    input, target, params = draw(loss, rows=8, form="shared")
    params = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in params.items()}
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in params.items()}
    options = {"reduction": "none"} | ({"group": loss.group(target)} if loss.groups else {})
    upstream = torch.linspace(-1, 2, 8).double()
    own = leaves(params)
    before = {k: v.detach().clone() for k, v in own.items() if isinstance(v, torch.Tensor)}
    loss(input.float(), target, own, backend=backend, **options).backward(upstream.float())
    wanted = expected(loss, input, target, exact, upstream=upstream, **options)
    for name, old in before.items():
        assert own[name].dtype == own[name].grad.dtype == dtype
        assert torch.equal(own[name].detach(), old)
        eps = torch.finfo(torch.float32).eps
        close(
            own[name].grad, wanted.params[name], wanted.param_units[name], eps, name,
            extra=torch.finfo(dtype).eps, tiny=1e-7 if dtype == torch.float16 else 1e-36,
        )  # fmt: skip


# ---- row statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_statistics_and_their_gradients(loss, backend):
    input, target, params = draw(loss, rows=16, form="shared")
    target[5], input[5] = -100, float("nan")
    options = {"group": loss.group(target)} if loss.groups else {}
    x, own = input.clone().requires_grad_(), leaves(params)
    value, rows = mlkernels.softmax_loss(
        x, target, **loss.compose(own), **options, reduction="none", return_stats=True, backend=backend
    )
    ups = [torch.linspace(a, b, 16, dtype=F64) for a, b in ((-1, 2), (0.5, -2), (1.5, -0.5), (-2, 1))]
    torch.autograd.backward([value, rows.logsumexp, rows.log_prob, rows.entropy], ups)
    wanted = expected(
        loss,
        input,
        target,
        params,
        reduction="none",
        upstream=ups[0],
        up_logsumexp=ups[1],
        up_log_prob=ups[2],
        up_entropy=ups[3],
        **options,
    )
    eps = torch.finfo(F64).eps
    spread = torch.as_tensor(wanted.loss_unit).abs().max() + 300
    close(value.detach(), wanted.loss, wanted.loss_unit, eps, "loss")
    close(x.grad, wanted.grad, wanted.grad_unit, eps, "gradient", factor=40, tiny=1e-300)
    for name, v in own.items():
        if isinstance(v, torch.Tensor):
            key = {"arcface": "m2", "cosface": "m3", "sphereface": "m1"}[loss.name] if name == "margin" else name
            unit = torch.as_tensor(wanted.param_units[key]) + spread
            close(v.grad, wanted.params[key], unit, eps, name, tiny=1e-300)
    for i, row in enumerate(wanted.rows):
        if row is None:
            assert [float(s[i].detach()) for s in rows] == [0, 0, 0, -1, 0, 0]
            continue
        assert float(rows.logsumexp[i].detach()) == pytest.approx(float(row.logsumexp), rel=1e-12, abs=1e-12)
        assert float(rows.log_prob[i].detach()) == pytest.approx(float(row.log_prob), rel=1e-10, abs=1e-300)
        wanted_h = torch.tensor([float(row.entropy), float(row.entropy_unit)], dtype=F64)
        close(rows.entropy[i].detach(), wanted_h[0], wanted_h[1], eps, "entropy", tiny=1e-300)
        assert int(rows.prediction[i]) == row.prediction
        assert int(rows.rank[i]) == row.rank
        assert float(rows.confidence[i]) == pytest.approx(float(row.confidence), rel=1e-14, abs=1e-14)
    assert not rows.prediction.requires_grad and not rows.confidence.requires_grad and not rows.rank.requires_grad
