"""torch.compile: one graph, the same numbers, no recompilation when a number that trains or is scheduled changes.

Most tests use the aot_eager backend, which traces and partitions as inductor does but compiles nothing; one uses
inductor.
"""

import numpy as np
import pytest
import torch
from table import BY_NAME, FEW, draw, leaves, run, usable_backends
from torch._dynamo.testing import CompileCounterWithBackend

import mlkernels

pytestmark = pytest.mark.filterwarnings("ignore")
#: Each with one of the reductions. The reference is traced through all of its operations, which takes seconds: once.
COMPILED = [*FEW, BY_NAME["truncated"], BY_NAME["margin_norm"], BY_NAME["piecewise_tau_cross_entropy"]]
ONE_GRAPH = [
    pytest.param(name, loss, ("mean", "none")[i % 2], id=f"{name}-{loss}")
    for name in usable_backends()
    for i, loss in enumerate(COMPILED)
    if name != "reference" or loss.name == "piecewise_groups"
]
CHANGING = [
    pytest.param(name, loss, id=f"{name}-{loss}")
    for name in usable_backends()
    for loss in FEW
    if name != "reference" or loss.name == "two_scale_norm"
]


@pytest.fixture
def best():
    """A native backend where there is one: through the reference each of these would take seconds more."""
    return usable_backends()[-1]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def options_of(loss, target):
    return {"group": loss.group(target)} if loss.groups else {}


def programs(counter):
    """How many graphs were compiled; dynamo may look at a frame without operations, too."""
    return sum(any(node.op != "output" for node in graph.graph.nodes) for graph in counter.graphs)


def same(found, wanted, rtol=1e-5):
    torch.testing.assert_close(found[0], wanted[0], rtol=rtol, atol=1e-6)
    torch.testing.assert_close(found[1], wanted[1], rtol=rtol, atol=1e-6)
    for name, g in found[2].items():
        torch.testing.assert_close(g, wanted[2][name], rtol=rtol, atol=1e-5)


@pytest.mark.parametrize(("backend", "loss", "reduction"), ONE_GRAPH)
def test_one_graph_with_trained_parameters(backend, loss, reduction):
    input, target, params = draw(loss, rows=6, form="shared", kinds=("random", "confident5"))
    options = options_of(loss, target) | {"reduction": reduction, "backend": backend}
    up = torch.linspace(-1, 2, 6) if reduction == "none" else torch.tensor(1.5)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(x, y, own):
        return loss(2 * x, y, own, **options)

    x, own = input.float().requires_grad_(), leaves(params)
    value = compiled(x, target, own)
    value.backward(up)
    found = value.detach(), x.grad, {k: v.grad for k, v in own.items() if isinstance(v, torch.Tensor)}
    assert programs(counter) == 1
    z, own = input.float().requires_grad_(), leaves(params)
    eager = loss(2 * z, target, own, **options)
    eager.backward(up)
    same(found, (eager.detach(), z.grad, {k: v.grad for k, v in own.items() if isinstance(v, torch.Tensor)}))


@pytest.mark.parametrize(("backend", "loss"), CHANGING)
def test_changing_tensors_do_not_recompile(backend, loss):
    """A trained parameter changes every step, a scheduled one every epoch: as tensors they are data."""
    input, target, params = draw(loss, rows=6, form="shared", kinds=("random",))
    options = options_of(loss, target) | {"backend": backend}
    counter = CompileCounterWithBackend("aot_eager")
    call = lambda x, y, own, normalizer: loss(x, y, own, normalizer=normalizer, **options)
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for step in range(12):  # more than the limit at which recompiling fails
        own = leaves({k: v * (1 + 0.01 * step) if isinstance(v, torch.Tensor) else v for k, v in params.items()})
        x = input.float().requires_grad_()
        normalizer = torch.tensor(5 + step)  # of the tokens of a step
        value = compiled(x, target, own, normalizer)
        value.backward()
        wanted = run(loss, input.float(), target, own, normalizer=normalizer, **options)
        same((value.detach(), x.grad, {k: v.grad for k, v in own.items() if isinstance(v, torch.Tensor)}), wanted)
    assert programs(counter) == 1


def test_a_float_that_changes_is_guarded(best):
    """The other side of it: a Python number is part of the program, so another number gives another loss."""
    input, target, _ = draw(BY_NAME["focal_2"], rows=4)
    x = input.float()
    compiled = torch.compile(
        lambda g: mlkernels.focal_loss(x, target, gamma=g, backend=best), fullgraph=True, backend="aot_eager"
    )
    for gamma in (2.0, 0.5):
        torch.testing.assert_close(compiled(gamma), mlkernels.focal_loss(x, target, gamma=gamma, backend=best))


def test_dynamic_shapes(best):
    """Batches of any size and classifiers of any width through one graph."""
    counter = CompileCounterWithBackend("aot_eager")
    function = lambda x, y: mlkernels.cross_entropy(x, y, label_smoothing=0.1, backend=best)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for rows, classes in ((5, 7), (9, 11), (33, 64), (8, 5)):
        generator = torch.Generator().manual_seed(rows)
        input = torch.randn(rows, classes, generator=generator)
        target = torch.randint(0, classes, (rows,), generator=generator)
        x, z = input.clone().requires_grad_(), input.clone().requires_grad_()
        (1.5 * compiled(x, target)).backward()
        (1.5 * function(z, target)).backward()
        torch.testing.assert_close(x.grad, z.grad)
    assert programs(counter) == 1


def test_dynamic_spatial_sizes():
    """A sequence of another length: sizes and strides become symbols at the second one, under default settings."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mlkernels.cross_entropy, fullgraph=True, backend=counter)
    for length in (5, 7, 11):
        input, target = torch.randn(3, 4, length), torch.randint(0, 4, (3, length))
        x, z = input.clone().requires_grad_(), input.clone().requires_grad_()
        compiled(x, target).backward()
        mlkernels.cross_entropy(z, target).backward()
        torch.testing.assert_close(x.grad, z.grad)
    assert programs(counter) == 2


def test_exported_with_dynamic_spatial_sizes():
    class Loss(torch.nn.Module):
        def forward(self, input, target):
            return mlkernels.cross_entropy(input, target, label_smoothing=0.1)

    length = torch.export.Dim("length")
    one = torch.randn(3, 4, 5), torch.randint(0, 4, (3, 5))
    exported = torch.export.export(Loss(), one, dynamic_shapes=({2: length}, {1: length}))
    input, target = torch.randn(3, 4, 9), torch.randint(0, 4, (3, 9))
    torch.testing.assert_close(exported.module()(input, target), Loss()(input, target))


def test_dense_predictions(best):
    function = lambda x, y: mlkernels.cross_entropy(x, y, backend=best)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        input = torch.randn(2, 5, 3, 4).contiguous(memory_format=memory_format)
        target = torch.randint(0, 5, (2, 3, 4))
        x, z = input.clone().requires_grad_(), input.clone().requires_grad_()
        (compiled(x, target) * 2).backward()
        (function(z, target) * 2).backward()
        torch.testing.assert_close(x.grad, z.grad)
        assert x.grad.stride() == z.grad.stride()


def test_statistics_and_ignored_rows(best):
    """The case that another package gets wrong under torch.compile: rows to be ignored."""
    input, target, _ = draw(BY_NAME["cross_entropy"], rows=8)
    target[[1, 5]] = -100

    def function(x, y):
        loss, rows = mlkernels.softmax_loss(x, y, head=mlkernels.Modulated(), return_stats=True, backend=best)
        return loss + rows.logsumexp.sum() + rows.entropy.sum(), rows

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, z = input.float().requires_grad_(), input.float().requires_grad_()
    (value, rows), (wanted, wanted_rows) = compiled(x, target), function(z, target)
    value.backward()
    wanted.backward()
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(x.grad, z.grad)
    assert not x.grad[[1, 5]].any()
    for a, b in zip(rows, wanted_rows, strict=True):
        torch.testing.assert_close(a, b)


def test_bad_arguments_are_errors_under_compile_too(best):
    compiled = torch.compile(
        lambda x, y, w: mlkernels.cross_entropy(x, y, weight=w, backend=best), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(Exception, match="weight"):
        compiled(torch.zeros(2, 3), torch.tensor([0, 1]), torch.ones(4))


def test_numpy_numbers():
    """To torch.compile they are arrays: a function says what to write, a module has made plain ones of them."""
    x, y, two = torch.zeros(2, 3), torch.tensor([0, 1]), np.float64(2.0)
    for name, plain, call in [
        ("gamma", "float", lambda: mlkernels.focal_loss(x, y, gamma=two)),
        ("z_loss", "float", lambda: mlkernels.focal_loss(x, y, z_loss=two)),
        ("ignore_index", "int", lambda: mlkernels.focal_loss(x, y, ignore_index=np.int64(1))),
    ]:
        with pytest.raises(Exception, match=rf"{name} takes .* pass {plain}\({name}\)"):
            torch.compile(call, fullgraph=True, backend="eager")()
    loss = mlkernels.FocalLoss(gamma=two, z_loss=np.float32(0.5), ignore_index=np.int64(1))
    assert [type(value) for value in (loss.gamma, loss.z_loss, loss.ignore_index)] == [float, float, int]
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, y), loss(x, y))


def test_without_gradients(best):
    compiled = torch.compile(
        lambda x, y: mlkernels.arcface_loss(x, y, reduction="none", backend=best), fullgraph=True, backend="aot_eager"
    )
    input, target, _ = draw(BY_NAME["arcface"], rows=4)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(input.float(), target),
            mlkernels.arcface_loss(input.float(), target, reduction="none", backend=best),
        )


def test_half_inputs(best):
    input, target, _ = draw(BY_NAME["cross_entropy"], rows=4, exact=torch.bfloat16)
    function = lambda x, y: mlkernels.cross_entropy(x, y, backend=best)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, z = input.bfloat16().requires_grad_(), input.bfloat16().requires_grad_()
    value = compiled(x, target)
    assert value.dtype == torch.float32
    (3 * value).backward()
    (3 * function(z, target)).backward()
    assert x.grad.dtype == torch.bfloat16
    torch.testing.assert_close(x.grad, z.grad, rtol=2**-7, atol=1e-6)


def test_a_training_step_with_inductor(backend):
    """Linear layer, loss with trained scales, both compiled by inductor: three steps as in eager."""

    def train(step_of):
        torch.manual_seed(0)
        layer = torch.nn.Linear(8, 5)
        low, high = torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.tensor(3.0))
        optimizer = torch.optim.SGD([*layer.parameters(), low, high], lr=0.1)

        def loss_of(x, y):
            return mlkernels.two_scale_cross_entropy(layer(x), y, low, high, eta=0.1, backend=backend)

        forward = step_of(loss_of)
        x, y = torch.randn(16, 8), torch.arange(16) % 5
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            value = forward(x, y)
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
        return losses, float(low.detach()), float(high.detach())

    compiled = train(lambda f: torch.compile(f, fullgraph=True, backend="inductor"))
    eager = train(lambda f: f)
    assert compiled[0] == pytest.approx(eager[0], rel=1e-4)
    assert compiled[1:] == pytest.approx(eager[1:], rel=1e-4)


def test_two_scale_of_a_model_in_one_graph(best):
    """The model's norm is computed in the graph, anew in every call; inside of `cached_weight_norm` too."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    loss = mlkernels.TwoScaleLoss(model, parametrization="relative", backend=best)
    input, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 1, 0])

    def step(input):
        with mlkernels.cached_weight_norm():
            return loss(model(input), target, model)

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    found = []
    with mlkernels.cached_weight_norm():
        for _ in range(3):
            found.append(compiled(input).item())
            assert found[-1] == pytest.approx(step(input).item(), rel=1e-5)
            with torch.no_grad():
                model[0].weight.mul_(1.5)
    assert found[0] != found[1] != found[2]
    assert counter.frame_count == 1
