"""Every loss, backend, form of parameters and reduction against the closed formulas: values and gradients."""

import pytest
import torch
from table import BY_NAME, F64, FEW, INF, LOSSES, NAN, ROW_KINDS, check, draw, expected, extras, preparation

import mlkernels
from mlkernels.call import Options
from mlkernels.numbering import HeadKind, ScaleKind, TransformKind

CAPPED = preparation(6)
EVERYTHING = {name: value for name, value in extras(6).items() if name not in CAPPED}
#: Smoothing a masked class costs infinitely much; test_conventions.py is about that.
UNMASKED = tuple(k for k in ROW_KINDS if k != "masked")


def upstream_for(reduction, rows, seed=3):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows,) if reduction == "none" else ()
    return (torch.randn(shape, generator=generator, dtype=F64) * 3).float().double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("loss, form", [(loss, form) for loss in LOSSES for form in loss.forms], ids=str)
def test_forms(loss, form, backend, dtype):
    input, target, params = draw(loss, form=form)
    reduction = {"number": "mean", "shared": "sum"}.get(form, "none")
    check(loss, backend, input, target, params, dtype, upstream_for(reduction, len(target)), reduction=reduction)


@pytest.mark.parametrize("name", extras(6))
def test_alone(name, backend):
    """Each option in a call that has nothing else."""
    option = {name: extras(6)[name]}
    input, target, _ = draw(BY_NAME["cross_entropy"], kinds=UNMASKED, seed=6)
    check(BY_NAME["cross_entropy"], backend, input, target, {}, F64, upstream_for("mean", len(target)), **option)


def check_everything(loss, backend, reduction, weighted=False, check=check):
    """All options at once, an ignored row of NaN among the others."""
    input, target, params = draw(loss, form=loss.forms[-1], kinds=UNMASKED, seed=1)
    target[3] = -7
    input[3] = float("nan")
    more = {"row_weight": row_weight_for(target, -7)} if weighted else {}
    check(
        loss, backend, input, target, params, torch.float32, upstream_for(reduction, len(target)),
        reduction=reduction, ignore_index=-7, **EVERYTHING, **more,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_everything(loss, backend, reduction):
    # "mean" with weights of rows, and with a divisor of its own, has a test below.
    check_everything(loss, backend, reduction, weighted=reduction != "mean")


def row_weight_for(target, ignore_index=-100, dtype=F64):
    """Weights of either sign, a 0 among them; that of an ignored row is not read."""
    weight = torch.linspace(-0.5, 2.0, target.numel(), dtype=dtype).reshape(target.shape)
    weight.view(-1)[1] = 0
    return torch.where(target == ignore_index, NAN, weight)


FACTORS = {
    "row_weight": lambda target: {"row_weight": row_weight_for(target)},
    "normalizer": lambda target: {"normalizer": 12.5},
    "both": lambda target: {"row_weight": row_weight_for(target), "normalizer": torch.tensor(12.5)},
}


@pytest.mark.parametrize("trained", [False, True], ids=["numbers", "trained"])
@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("loss", FEW, ids=str)
def test_what_mean_divides_by(loss, factors, trained, backend):
    """A row's weight multiplies all of its loss and leaves the divisors alone; a normalizer replaces both of them."""
    input, target, params = draw(loss, form="shared" if trained else "number", kinds=UNMASKED, seed=5)
    target[2], input[2] = -100, NAN
    upstream = torch.tensor(-1.5, dtype=F64)
    check(loss, backend, input, target, params, torch.float32, upstream, **EVERYTHING, **factors(target))


def test_capped_and_adjusted(loss, backend):
    input, target, params = draw(loss, form=loss.forms[1], seed=2, **CAPPED)
    check(loss, backend, input, target, params, F64, upstream_for("none", len(target)), reduction="none", **CAPPED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_half(loss, backend, dtype):
    # Gradients at the floor of SphereFace's derivative overflow fp16: no cosine of exactly 1 there.
    kinds = tuple(k for k in ROW_KINDS if k != "confident40") if loss.draws == "cosines" else ROW_KINDS
    input, target, params = draw(loss, form="shared", exact=dtype, kinds=kinds)
    check(loss, backend, input, target, params, dtype, upstream_for("none", len(target)), reduction="none")


@pytest.mark.parametrize("classes", [1, 2, 19])
def test_class_counts(loss, backend, classes):
    kinds = ("random", "ties") if classes == 1 else ("random", "confident20", "wrong40", "ties")
    input, target, params = draw(loss, rows=4, form=loss.forms[-1], classes=classes, kinds=kinds)
    check(loss, backend, input, target, params, F64, upstream_for("none", 4), reduction="none")


def has_a_limit(loss):
    """Whether loss and gradient make sense where the target's logit is -inf."""
    return loss.masked_target and not (loss.structure.head == "modulated" and loss.params.get("kappa", 1) > 1)


@pytest.mark.parametrize("loss", [loss for loss in LOSSES if has_a_limit(loss)], ids=str)
def test_masked_target(loss, backend):
    """A target of probability 0 costs infinitely much (a bounded head: its bound), and its gradient is w (p - 1)."""
    input, target, params = draw(loss, rows=4, form="number", kinds=("random",))
    if "target_logit" in params:
        params["target_logit"][1] = -INF
    else:
        input[1, target[1]] = -INF
    # Parameters as numbers: what the loss is infinite in has no finite derivative.
    params = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in params.items()}
    x = input.float().requires_grad_()
    options = {} if loss.group(target) is None else {"group": loss.group(target)}
    value = loss(x, target, params, reduction="none", backend=backend, **options)
    upstream = upstream_for("none", 4)
    value.backward(upstream.float())
    wanted = expected(loss, input, target, params, reduction="none", upstream=upstream, **options)
    torch.testing.assert_close(value.detach().double(), torch.as_tensor(wanted.loss), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), torch.as_tensor(wanted.grad), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["beta", "gamma"])
def test_what_an_impossible_target_gives_its_damping(name, backend):
    """Where p = 0 the damping is 1 whatever beta and gamma are: their gradients are 0, in a loss that is infinite."""
    x = torch.tensor([[-INF, 1.0, 2.0], [0.3, 1.0, 2.0]], requires_grad=True)
    own = {"beta": torch.full((3,), 2.0), "gamma": torch.full((3,), 1.5)}
    own[name].requires_grad_()
    value = mlkernels.modulated_cross_entropy(x, torch.tensor([0, 1]), **own, reduction="none", backend=backend)
    value.backward(torch.tensor([2.5, -0.5]))
    assert value[0].item() == INF
    assert own[name].grad[0].item() == own[name].grad[2].item() == 0
    assert own[name].grad[1].item() != 0


# ---- the accuracy of tiny and of large numbers -----------------------------------------------------------------------


@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0, 80.0])
@pytest.mark.parametrize("name", ["cross_entropy", "focal_2", "focal_half", "focal_0", "modulated_half", "margin"])
def test_confident_rows_are_relatively_accurate(name, backend, gap):
    """log1p and expm1, not 1 - p: at 40 ahead the loss is 4e-18 times something, in float32 too."""
    loss = BY_NAME[name]
    if loss.draws == "cosines":
        loss = BY_NAME["cross_entropy"]
        params = {"scale": 16.0}
        input = torch.tensor([[gap / 16 + 0.25, 0.25, -0.5, 0.125]], dtype=F64)
    else:
        params = dict(loss.params) | ({"scale": 1.0} if "scale" in loss.params else {})
        input = torch.tensor([[gap + 0.25, 0.25, -0.5, 0.125]], dtype=F64)
    target = torch.tensor([0])
    wanted = expected(loss, input, target, params, reduction="sum")
    x = input.float().requires_grad_()
    value = loss(x, target, params, reduction="sum", backend=backend)
    value.backward()
    if wanted.loss < 1e-36:
        assert float(value.detach()) <= 1e-36
        return
    assert float(value.detach()) == pytest.approx(float(wanted.loss), rel=1e-4)
    keep = abs(torch.as_tensor(wanted.grad)) > 1e-36
    torch.testing.assert_close(x.grad.double()[keep], torch.as_tensor(wanted.grad)[keep], rtol=1e-4, atol=0)


@pytest.mark.parametrize("offset", [300.0, -300.0, 30000.0])
def test_a_shift_changes_nothing(backend, offset):
    """At |z| = 300 a saved float32 logsumexp alone costs 1e-5 in p."""
    input = torch.tensor([[0.5, -1.25, 2.0, 0.0], [3.0, -2.0, 1.0, 3.0]])
    target = torch.tensor([0, 2])
    upstream = torch.tensor([1.5, -0.5])
    found = []
    for shift in (0.0, offset):
        x = (input + shift).requires_grad_()
        rows = BY_NAME["modulated"](x, target, {}, reduction="none", backend=backend)
        rows.backward(upstream)
        found.append((rows.detach(), x.grad))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=2e-6, atol=1e-8)


def test_named_functions_are_compositions(loss):
    """Each function by its name is softmax_loss of its parts, to the bit."""
    input, target, params = draw(loss, form="shared", seed=4)
    group = {} if loss.group(target) is None else {"group": loss.group(target)}
    named = loss(input, target, params, reduction="none", **group)
    composed = mlkernels.softmax_loss(input, target, **loss.compose(params), reduction="none", **group)
    assert torch.equal(named, composed)


def test_the_table_is_complete():
    """Every function of the family is in the table, every kind of transform, scale and head, and every option."""
    called = {loss.call.__name__ for loss in LOSSES}
    family = {n for n in mlkernels.functional.__all__ if n not in ("center_loss", "lgm_loss", "multi_margin_loss")}
    assert family - {"softmax_loss"} <= called
    assert extras(6).keys() == Options.__annotations__.keys() - {"ignore_index", "reduction", "backend"}
    kinds = {(s.transform, s.scale, s.head) for s in (loss.structure for loss in LOSSES)}
    assert {t for t, _, _ in kinds} == {k.name.lower() for k in TransformKind}
    assert {s for _, s, _ in kinds} == {k.name.lower() for k in ScaleKind}
    assert {h for _, _, h in kinds} == {k.name.lower() for k in HeadKind}


@pytest.mark.parametrize("shared", ["t", "tau"])
def test_one_table_for_all_groups(shared, backend):
    """A pair of tables (M,) beside one of (G, M): every group has it, and it gets the gradients of all."""
    x, y, group = torch.rand(6, 4) * 2 - 1, torch.randint(4, (6,)), torch.tensor([0, 1, 2, 0, 1, 2])
    found = []
    for expanded in (True, False):
        leaves = {n: torch.full((5,) if n == shared else (3, 5), 1.1, requires_grad=True) for n in ("t", "tau")}
        tables = {name: leaf.expand(3, 5) if expanded and leaf.dim() == 1 else leaf for name, leaf in leaves.items()}
        loss = mlkernels.softmax_loss(
            x,
            y,
            transform=mlkernels.PiecewiseLinear(tables["t"], 0.1 * tables["t"]),
            head=mlkernels.Tau(tables["tau"], 0.1 * tables["tau"]),
            group=group,
            backend=backend,
        )
        loss.backward()
        found.append((loss.detach(), *(leaf.grad for leaf in leaves.values())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
