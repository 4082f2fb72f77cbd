"""The operators as torch.library sees them: schemas, fakes, no mutation, no aliasing."""

import functools

import pytest
import torch
from table import FEW, draw, numbers_of, plain_numbers, usable_backends

from mlkernels import ops
from mlkernels.call import DEFAULTS
from mlkernels.numbering import PER_CLASS, TRAINABLE, Reduction, Slot
from mlkernels.spec import compose

#: Autograd lives in autograd.py's Functions: the operators themselves have none to test.
CHECKS = ("test_schema", "test_faketensor")
KERNELS = {"cpu": ops.NATIVE, "triton": ops.TRITON, "cuda": ops.CUDA}


@pytest.fixture(params=[name for name in usable_backends() if name in KERNELS])
def kernels(request):
    """The operators of a backend."""
    return KERNELS[request.param]


def flattened(loss, form="shared", reduction=1, dtype=torch.float32, shape=None):
    """A loss as it crosses the op boundary: (input, target, numbers, params), needs."""
    input, target, params = draw(loss, rows=6, form=form, exact=dtype, kinds=("random",))
    group = loss.group(target)
    input = input.to(dtype)
    if shape == "dense":
        input, target = input.reshape(2, 3, 6).movedim(-1, 1).contiguous(), target.reshape(2, 3)
        group = None if group is None else group.reshape(2, 3)
        params = {
            k: v.reshape(2, 3, 1) if isinstance(v, torch.Tensor) and v.shape == (6, 1) else v for k, v in params.items()
        }
    parts = {"transform": None, "scale": 1.0, "head": None, "target_logit": None} | loss.compose(params)
    structure, values = compose(parts["transform"], parts["scale"], parts["head"], parts["target_logit"])
    consts, tensors = DEFAULTS.copy(), {}
    for (slot, _, _), value in zip(structure.values, values, strict=True):
        if isinstance(value, torch.Tensor):
            tensors[slot] = value
        elif value is not None:
            consts[slot] = float(value)
    if group is not None:
        tensors[int(Slot.GROUP)] = group
    tensors[int(Slot.WEIGHT)] = torch.linspace(0.5, 1.5, 6)
    if form == "shared":
        tensors[int(Slot.ROW_WEIGHT)] = torch.linspace(0.5, 1.5, 6).reshape(target.shape)
        tensors[int(Slot.NORMALIZER)] = torch.tensor(4.0)
    mask = sum(1 << slot for slot in tensors)
    trained = sum(1 << slot for slot in tensors if slot in TRAINABLE)
    numbers = numbers_of(structure, consts, mask, reduction)
    return (input, target, numbers, [tensors[s] for s in sorted(tensors)]), trained | 1 << ops.INPUT


OPERATORS = [
    "softmax_loss", "softmax_loss_with_gradient", "softmax_loss_with_gradients", "softmax_stats",
    "softmax_loss_backward",
]  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_exist_without_a_compiler(name):
    for library in (torch.ops.mlkernels, torch.ops.mlkernels_cuda, torch.ops.mlkernels_triton):
        op = getattr(library, name).default
        assert torch.Tag.pt2_compliant_tag in op.tags
        assert not op._schema.is_mutable


def test_every_operator_is_checked_here():
    """A new operator comes with its check."""
    for library, others in (
        ("mlkernels", {"linear_loss", "linear_loss_backward", *ops._OTHERS}),
        ("mlkernels_cuda", {"softmax_loss_refresh"}),
        ("mlkernels_triton", {"softmax_loss_refresh"}),
    ):
        defined = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith(f"{library}::")}
        assert {n.split("::")[1] for n in defined} == set(OPERATORS) | others


CALLS = [
    pytest.param(loss, form, reduction, dtype, shape, id=f"{loss}-{form}-{reduction}-{str(dtype)[6:]}-{shape}")
    for loss in FEW
    for form, reduction, dtype, shape in (
        ("shared", 1, torch.float32, "rows"),
        (loss.forms[-1], 0, torch.float64, "dense"),
    )
] + [pytest.param(FEW[0], "class", 2, torch.bfloat16, "rows", id="cross_entropy-class-2-bfloat16-rows")]


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize(("loss", "form", "reduction", "dtype", "shape"), CALLS)
def test_softmax_loss(loss, form, reduction, dtype, shape, save, kernels):
    arguments, _ = flattened(loss, form, reduction, dtype, shape)
    torch.library.opcheck(kernels.softmax_loss, (*arguments, save), test_utils=CHECKS)


@pytest.mark.parametrize(
    ("loss", "form", "reduction", "dtype", "shape"), [call for call in CALLS if call.values[2] != Reduction.NONE]
)
def test_softmax_loss_with_gradients(loss, form, reduction, dtype, shape, kernels):
    arguments, needs = flattened(loss, form, reduction, dtype, shape)
    torch.library.opcheck(kernels.softmax_loss_with_gradient, arguments, test_utils=CHECKS)
    for asked in (needs, needs & ~(1 << ops.INPUT), 1 << ops.INPUT):
        torch.library.opcheck(kernels.softmax_loss_with_gradients, (*arguments, asked), test_utils=CHECKS)
    loss, gradient, *kept = kernels.softmax_loss_with_gradient(*arguments)
    again, gradients, *same = kernels.softmax_loss_with_gradients(*arguments, needs)
    assert torch.equal(loss, again)
    assert torch.equal(gradient, gradients[-1])
    assert len(kept) == len(same) == (kernels is not ops.NATIVE)
    for a, b in zip(kept, same, strict=True):  # what "mean" divided by
        assert torch.equal(a, b)


@pytest.mark.parametrize(("loss", "form", "reduction", "dtype", "shape"), CALLS)
def test_softmax_stats(loss, form, reduction, dtype, shape, kernels):
    arguments, _ = flattened(loss, form, reduction, dtype, shape)
    torch.library.opcheck(kernels.softmax_stats, arguments, test_utils=CHECKS)


@pytest.mark.parametrize("upstreams", ["loss", "all", "rows"])
@pytest.mark.parametrize(("loss", "form", "reduction", "dtype", "shape"), CALLS)
def test_softmax_loss_backward(loss, form, reduction, dtype, shape, upstreams, kernels):
    arguments, needs = flattened(loss, form, reduction, dtype, shape)
    value, saved, *rows = kernels.softmax_stats(*arguments)
    grads = [torch.full_like(value, 1.5), *(torch.full_like(rows[i], up) for i, up in enumerate((-0.5, 0.25, -0.75)))]
    if upstreams == "loss":
        grads[1:] = [None, None, None]
    elif upstreams == "rows":
        grads[0] = None
    for kept in (saved, saved[:0]):
        torch.library.opcheck(kernels.softmax_loss_backward, (*grads, *arguments, kept, needs), test_utils=CHECKS)


@pytest.mark.parametrize("loss", FEW, ids=str)
def test_without_saved_statistics_the_backward_is_the_same(loss, kernels):
    """Empty statistics are computed again, to the same gradients."""
    arguments, needs = flattened(loss, reduction=0, dtype=torch.float64)
    value, saved = kernels.softmax_loss(*arguments, True)
    up = torch.linspace(-1, 2, 6, dtype=torch.float64)
    kept = kernels.softmax_loss_backward(up, None, None, None, *arguments, saved, needs)
    again = kernels.softmax_loss_backward(up, None, None, None, *arguments, saved[:0], needs)
    assert value.shape == (6,)
    for a, b in zip(kept, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_operators_do_not_alias_their_inputs(kernels):
    arguments, needs = flattened(FEW[0])
    found = [*kernels.softmax_loss(*arguments, True), *kernels.softmax_loss_with_gradient(*arguments)]
    found += kernels.softmax_loss_with_gradients(*arguments, needs)[1]
    storages = {t.untyped_storage().data_ptr() for t in (*arguments[:2], *arguments[3])}
    assert not {t.untyped_storage().data_ptr() for t in found} & storages


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows, kernels):
    (input, target, numbers, params), _ = flattened(FEW[0], form="number")
    arguments = (input[:rows], target[:rows], numbers, params)
    torch.library.opcheck(kernels.softmax_loss, (*arguments, True), test_utils=CHECKS)
    torch.library.opcheck(kernels.softmax_loss_with_gradient, arguments, test_utils=CHECKS)
    torch.library.opcheck(kernels.softmax_stats, arguments, test_utils=CHECKS)


INPUT, TARGET, NUMBERS, PARAMS = range(4)
#: Of (input, target, numbers, params): what is another, and its replacement. params is tables, weight, group, ...
MALFORMED = {
    "no classes": (INPUT, lambda x: x[:, 0]),
    "dtype": (INPUT, lambda x: x.long()),
    "rows": (INPUT, lambda x: x[:3]),
    "labels": (TARGET, lambda y: y[:3]),
    "more labels": (TARGET, lambda y: y.repeat(2)),
    "labels' dtype": (TARGET, lambda y: y.float()),
    "no numbers": (NUMBERS, lambda n: n[:3]),
    "many numbers": (NUMBERS, lambda n: n + [0.0] * 30),
    "no such kind": (NUMBERS, lambda n: [99.0, *n[1:]]),
    "no such mask": (NUMBERS, lambda n: [*n[:8], 2.0**40, *n[9:]]),
    "negative mask": (NUMBERS, lambda n: [*n[:8], -1.0, *n[9:]]),
    "mask of NaN": (NUMBERS, lambda n: [*n[:8], float("nan"), *n[9:]]),
    "ignore_index": (NUMBERS, lambda n: [*n[:7], 2.0**63, *n[8:]]),
    "fewer tensors": (PARAMS, lambda p: p[:-1]),
    "more tensors": (PARAMS, lambda p: [*p, p[0]]),
    **{f"size of {i}": (PARAMS, lambda p, i=i: [*p[:i], torch.ones(4).to(p[i].dtype), *p[i + 1 :]]) for i in range(6)},
    **{f"none of {i}": (PARAMS, lambda p, i=i: [*p[:i], torch.ones(0).to(p[i].dtype), *p[i + 1 :]]) for i in range(6)},
    "tables' dtype": (PARAMS, lambda p: [p[0].char(), *p[1:]]),
    "groups' dtype": (PARAMS, lambda p: [*p[:-2], p[-2].float(), p[-1]]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_calls_are_refused(name, kernels):
    """By the operators themselves, which would read what is not theirs: Python's checks come before them."""
    if kernels is ops.TRITON:
        pytest.skip("nothing but Python calls them, behind its checks")
    loss = next(loss for loss in FEW if loss.name == "piecewise_groups")
    arguments, needs = flattened(loss)
    kernels.softmax_loss_with_gradients(*arguments, needs)
    at, change = MALFORMED[name]
    given = [*arguments]
    given[at] = change(given[at])
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        kernels.softmax_loss_with_gradients(*given, needs)


def test_malformed_backwards_are_refused(kernels):
    if kernels is ops.TRITON:
        pytest.skip("nothing but Python calls them, behind its checks")
    arguments, needs = flattened(FEW[0], reduction=0)
    _, saved = kernels.softmax_loss(*arguments, True)
    up = torch.ones(6)
    kernels.softmax_loss_backward(up, up, up, up, *arguments, saved, needs)
    for grads, kept, asked in [
        *(([up[:2] if i == j else up for j in range(4)], saved, needs) for i in range(4)),
        ([up] * 4, saved[:2], needs),
        ([up] * 4, saved.double(), needs),
        ([up] * 4, saved.t().contiguous().t(), needs),
        ([up] * 4, saved, needs | 1 << Slot.HEAD_A),
        ([up] * 4, saved, -1),
    ]:
        with pytest.raises(RuntimeError):
            kernels.softmax_loss_backward(*grads, *arguments, kept, asked)
    if kernels is ops.NATIVE:
        return
    arguments, needs = flattened(FEW[0], reduction=1)
    _, saved = kernels.softmax_loss(*arguments, True)
    _, gradient, factors = kernels.softmax_loss_with_gradient(*arguments)
    with pytest.raises(RuntimeError, match="saved must be"):
        kernels.softmax_loss_backward(up[0], None, None, None, *arguments, saved[:-1], needs)
    for other in (factors[0, :1], factors[:0], factors.double()):
        with pytest.raises(RuntimeError, match="factors must be"):
            kernels.refresh(up[0], other, *arguments, gradient)


@pytest.mark.skipif("cpu" not in usable_backends(), reason="no library")
def test_malformed_linear_heads_are_refused():
    x, weight, label, rows = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 2, 4]), torch.rand(3)
    workspace, huge = torch.zeros(400), 2**62
    linear = [x, weight, None, None, label, 0, plain_numbers(), [], workspace, False, [2, 2, 2]]
    statistics = torch.ops.mlkernels.linear_statistics.default
    wanted = statistics(*linear, rows, torch.ones(1, 3), 5, 15)
    for plan in ([huge, 2, 2], [1, huge, 2], [2, 2, huge]):  # no more than there is
        for one, other in zip(statistics(*linear[:-1], plan, rows, torch.ones(1, 3), 5, 15), wanted, strict=True):
            torch.testing.assert_close(one, other)
    every_second = torch.randn(1, 8)[:, ::2]
    for at, value in ((1, every_second), (5, 2**63 - 1), (7, [rows]), (8, workspace[:2])):
        with pytest.raises(RuntimeError):
            statistics(*linear[:at], value, *linear[at + 1 :], rows, torch.ones(1, 3), 5, 15)
    for slot in PER_CLASS:  # of fewer classes than there are
        with pytest.raises(RuntimeError, match="a number for each class"):
            statistics(*linear[:6], plain_numbers(slot), [rows], *linear[8:], rows, torch.ones(1, 3), 5, 15)
    for scales in (torch.ones(0, 3), torch.ones(1, 2), torch.ones(3)):
        with pytest.raises(RuntimeError):
            statistics(*linear, rows, scales, 5, 15)
    for sizes in ([-1], [huge, 8]):
        with pytest.raises(RuntimeError):
            torch.ops.mlkernels.buffer_like.default(x, sizes)


@pytest.mark.skipif("cpu" not in usable_backends(), reason="no library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_pieces(dtype):
    """They write the tile and the numbers of the rows, and nothing else."""
    rows = lambda *shape: torch.zeros(*shape, 3, dtype=dtype)
    tile, label, weight = torch.randn(3, 4, dtype=dtype), torch.tensor([0, 2, 5]), torch.rand(6, dtype=dtype)
    of_classes = (plain_numbers(*PER_CLASS, SOFTCAP=5.0), [weight] * len(PER_CLASS))
    numbers = (rows() - torch.inf, rows(2), rows(2), rows(2), rows(), rows(), label * 0 + 6, label * 0)
    torch.library.opcheck(
        torch.ops.mlkernels.piece_statistics.default,
        (tile, rows(), label, 2, rows(2) + 1, *of_classes, *numbers),
        test_utils=CHECKS,
    )
    for slope in (None, rows() + 1):
        torch.library.opcheck(
            torch.ops.mlkernels.piece_gradient.default,
            (tile, label, 2, False, *of_classes, rows() + 1, slope, rows() + 1, rows() + 1, rows() + 3),
            test_utils=CHECKS,
        )


@pytest.mark.skipif("cpu" not in usable_backends(), reason="no library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_classes_of_a_linear_head(dtype):
    """They write the workspace and the gradients, and nothing else."""
    torch.manual_seed(0)
    x, weight, label = torch.randn(3, 2, dtype=dtype), torch.randn(5, 2, dtype=dtype), torch.tensor([0, 2, 5])
    rows, classes = torch.rand(3, dtype=dtype), torch.rand(6, dtype=dtype)
    workspace, scales = torch.zeros(40, dtype=dtype), torch.ones(2, 3, dtype=dtype)
    linear = (
        x,
        weight,
        classes[:5],
        None,
        label,
        1,
        plain_numbers(*PER_CLASS, SOFTCAP=5.0),
        [classes] * len(PER_CLASS),
        workspace,
        True,
        [2, 2, 2],
    )
    check = functools.partial(torch.library.opcheck, test_utils=CHECKS)
    check(torch.ops.mlkernels.linear_statistics.default, (*linear, rows, scales, 6, 15))
    grads = x.clone(), weight.clone(), classes[:5].clone()
    for wanted in (grads, (None, None, grads[2])):
        given = (*linear, rows, rows, None, rows, rows, rows, *wanted, True, True)
        check(torch.ops.mlkernels.linear_gradient.default, given)
    finish = torch.ops.mlkernels.row_finish.default
    sums, numbers = scales[:1] + 1, plain_numbers(Slot.SCALE, reduction=Reduction.MEAN)
    for derive, ups in ((False, [None] * 5), (True, [rows] * 5)):
        given = (label, rows, rows, sums, sums, sums, rows, numbers, [rows.sum()], 6)
        check(finish, (*given, *ups, derive, int(derive)))
    for bias, normalize in ((classes[:5], False), (None, True)):
        whole = (x, weight, bias, normalize, label - label, 40, [2, 2, 2, 2, True], numbers, [rows.sum()])
        for needs in (0, 1, 1 | (3 if normalize else 7) << ops.INPUT):
            check(torch.ops.mlkernels.linear_loss_with_gradients.default, (*whole, needs))
            saved, ups = torch.randn(8, 3, dtype=dtype).abs(), (rows.sum(), rows, rows, rows)
            check(torch.ops.mlkernels.linear_rows_backward.default, (*whole, saved, *ups, needs))
        for stats in (False, True):
            check(torch.ops.mlkernels.linear_rows.default, (*whole, stats))
    check(torch.ops.mlkernels.buffer_like.default, (x, [2, 3]))


@pytest.mark.parametrize("name, normalize", [("piecewise_groups", True), ("two_scale_norm", False)])
@pytest.mark.parametrize("reduction, stats", [(Reduction.MEAN, False), (Reduction.NONE, True)])
def test_a_linear_head_in_a_graph(name, normalize, reduction, stats):
    """Its autograd, too; what is known of rows has a place for those that are ignored."""
    loss = next(loss for loss in FEW if loss.name == name)
    (x, target, numbers, params), needs = flattened(loss, "shared", reduction, torch.float64)
    target[1] = -100
    x, weight = x.requires_grad_(), torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    slots = ops.slots_of(numbers)
    wanted = [True, True, False, *(bool(needs >> slot & 1) for slot in slots)]
    params = [p.requires_grad_() if need else p for p, need in zip(params, wanted[3:], strict=True)]
    params = [
        p.reshape(-1, 1) if slot in (Slot.GROUP, Slot.ROW_WEIGHT) else p for slot, p in zip(slots, params, strict=True)
    ]
    rows = 1 << Slot.GROUP | 1 << Slot.ROW_WEIGHT
    linear = (x, weight, None, target, params, numbers, rows, normalize, stats, None, None, False, None, wanted)
    checks = (*CHECKS, "test_autograd_registration", "test_aot_dispatch_static")
    torch.library.opcheck(torch.ops.mlkernels.linear_loss.default, linear, test_utils=checks)
    if stats:
        with torch.no_grad():
            *found, known = torch.ops.mlkernels.linear_loss(*linear)
        upstream = [torch.ones_like(found[0]), None, found[2], found[3]]
        operator = torch.ops.mlkernels.linear_loss_backward.default
        torch.library.opcheck(operator, (*linear, upstream, known), test_utils=CHECKS)


@pytest.mark.parametrize("name", ["cpu", "reference", "triton"])
def test_what_a_linear_head_in_a_graph_returns_lies_apart(name):
    """Nothing shares memory, which operators must not; Triton's kernels write statistics side by side."""
    if name not in usable_backends():
        pytest.skip(f"no {name}")
    loss = next(loss for loss in FEW if loss.name == "two_scale_norm")
    (x, target, numbers, params), _ = flattened(loss, "shared", Reduction.NONE)
    needs = [True, True, False, *(False for _ in params)]
    params = [
        p.reshape(-1, 1) if slot == Slot.ROW_WEIGHT else p
        for slot, p in zip(ops.slots_of(numbers), params, strict=True)
    ]
    found = torch.ops.mlkernels.linear_loss(
        x, torch.randn(6, 6), None, target, params, numbers, 1 << Slot.ROW_WEIGHT, False, True, None, None, False, name,
        needs,
    )  # fmt: skip
    assert len(found) == 8 and len({t.untyped_storage().data_ptr() for t in found}) == len(found)
