"""torch's own samples of what we stand in for: OpInfo, ModuleInfo and OptimizerInfo, which grow with torch.

Where torch is right by definition every usable backend is compared with it: values and gradients. What differs on
purpose is named here: losses of half inputs are float32, and class probabilities are the reference's alone.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from table import usable_backends

import mlkernels
from mlkernels.schedule import Snapshot

pytest.importorskip("expecttest", reason="torch's samples import it")

from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_optimizers import optim_db

pytestmark = pytest.mark.filterwarnings("ignore")
OPS = {op.name: op for op in op_db if not op.variant_test_name}
MODULES = {module.module_cls.__name__: module for module in module_db}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Triton's interpreter takes a while: the smaller set of samples, in one dtype.
CROSS_ENTROPIES = [
    pytest.param(name, dtype, backend, id=f"{name}-{dtype}-{backend}")
    for backend in usable_backends()
    for name in ("cross_entropy", "nll_loss")
    for dtype in DTYPES
    if backend != "triton" or (name, dtype) == ("cross_entropy", torch.float32)
]


def samples(name, dtype):
    """(input, target, options) of an operator's samples."""
    for sample in OPS[f"nn.functional.{name}"].sample_inputs("cpu", dtype, requires_grad=True):
        (target,) = sample.args
        yield sample.input, target, sample.kwargs


def compare(ours, torchs, input, target, **options):
    """Value and gradient, for upstream gradients that differ by row."""
    found = []
    for function in (ours, torchs):
        x = input.detach().clone().requires_grad_()
        value = function(x, target, **options)
        up = torch.linspace(0.5, 2, max(1, value.numel()), dtype=value.dtype)[: value.numel()].reshape(value.shape)
        value.backward(up)
        found.append((value.detach(), x.grad))
    (value, grad), (wanted, slope) = found
    half = input.dtype in (torch.bfloat16, torch.float16)
    assert value.dtype == (torch.float32 if half else input.dtype) and grad.dtype == input.dtype
    near = {"rtol": 4 * torch.finfo(input.dtype).eps, "atol": 4 * torch.finfo(input.dtype).eps} if half else {}
    torch.testing.assert_close(value, wanted.to(value.dtype), equal_nan=True, **near)
    torch.testing.assert_close(grad, slope, equal_nan=True, **near)


@pytest.mark.parametrize(("name", "dtype", "backend"), CROSS_ENTROPIES)
def test_cross_entropy(name, dtype, backend):
    """Also with the samples of nll_loss, which has more of weights and ignored rows; log_softmax is part of ours."""
    count = 0
    for input, target, options in samples(name, dtype):
        if target.is_floating_point() and backend != "reference":
            with pytest.raises(TypeError, match="class probabilities"):
                mlkernels.cross_entropy(input, target, **options, backend=backend)
            continue
        compare(partial(mlkernels.cross_entropy, backend=backend), F.cross_entropy, input, target, **options)
        count += 1
    assert count >= 10


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_multi_margin_loss(dtype):
    found = list(samples("multi_margin_loss", dtype))
    assert len(found) >= 9
    for input, target, options in found:
        compare(mlkernels.multi_margin_loss, F.multi_margin_loss, input, target, **options)


def test_multi_margin_loss_refuses_what_torch_refuses():
    errors = list(OPS["nn.functional.multi_margin_loss"].error_inputs("cpu"))
    assert len(errors) >= 9
    for error in errors:
        sample = error.sample_input
        with pytest.raises((TypeError, ValueError)):
            mlkernels.multi_margin_loss(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize(
    ("name", "options"),
    [("MultiMarginLoss", {}), *(("CrossEntropyLoss", {"backend": b}) for b in usable_backends() if b != "triton")],
    ids=str,
)
def test_modules(name, options):
    info = MODULES[name]
    for dtype in DTYPES[:2]:
        for case in info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=True):
            made, called = case.constructor_input, case.forward_input
            input, target = (tensor.detach() for tensor in called.args)
            if target.is_floating_point() and options != {"backend": "reference"}:
                continue
            loss = getattr(mlkernels, name)(*made.args, **made.kwargs, **options)
            wanted = getattr(torch.nn, name)(*made.args, **made.kwargs)
            compare(loss, wanted, input, target)


def gradients(model, x, sparse):
    def closure():
        model.zero_grad()
        value = model(x).square().mean()
        value.backward()
        if sparse:
            for parameter in model.parameters():
                parameter.grad = parameter.grad.to_sparse()
        return value

    return closure


@pytest.mark.parametrize("info", optim_db, ids=lambda info: info.optim_cls.__name__)
def test_snapshots_cover_optimizers(info):
    """With all of torch's options: restored to the bit, state born later gone, and the same way onwards."""
    name = info.optim_cls.__name__
    for case in info.optim_inputs_func(device="cpu"):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3, bias=name != "Muon")
        kwargs = copy.deepcopy(case.kwargs)
        optimizer = info.optim_cls(model.parameters(), **kwargs)
        closure = gradients(model, torch.randn(5, 4), name == "SparseAdam")

        def steps(count):
            for _ in range(count):
                if name == "LBFGS":
                    optimizer.step(closure)
                else:
                    closure()
                    optimizer.step()
            return copy.deepcopy((model.state_dict(), optimizer.state_dict()))

        for before in (0, 2):
            steps(before)
            snapshot = Snapshot(model, optimizer)
            snapshot.save()
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            onwards = steps(2)
            snapshot.restore()
            same((model.state_dict(), optimizer.state_dict()), saved, case.desc)
            same(steps(2), onwards, case.desc)


def same(found, wanted, where):
    """Bit for bit."""
    if isinstance(wanted, torch.Tensor):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True, msg=where)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            same(found[key], wanted[key], f"{where}: {key}")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), where
        for a, b in zip(found, wanted, strict=True):
            same(a, b, where)
    else:
        assert found == wanted or (found != found and wanted != wanted), where
