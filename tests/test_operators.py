"""The compiled operators by themselves: what holds whatever Python would have let through."""

import math

import pytest
import simt
import torch
from table import plain_numbers

import mlkernels
from mlkernels import ops
from mlkernels.numbering import KINDS, MASK, Slot

NAN, INF = math.nan, math.inf
KERNELS = [
    pytest.param(
        "NATIVE",
        id="cpu",
        marks=pytest.mark.skipif(mlkernels.available_backends()["cpu"] is not None, reason="needs the CPU kernels"),
    ),
    pytest.param(
        "CUDA",
        id="cuda",
        marks=pytest.mark.skipif(simt.library()[0] is None, reason="needs the CUDA kernels for the host"),
    ),
]


@pytest.fixture(params=KERNELS)
def kernels(request):
    return getattr(ops, request.param)


@pytest.mark.parametrize(
    "dtype",
    ["int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"],
)
def test_labels_are_compared_as_64_bits(kernels, dtype):
    """A label with ignore_index's low bits is a class; where a dtype holds ignore_index, it is ignored."""
    dtype = getattr(torch, dtype)
    x = torch.randn(5, 300)
    bits = torch.iinfo(dtype).bits
    twin = -100 % 2**bits  # the label that has the bits of -100
    target = torch.tensor([3, 0, 100, 7, 2]).to(dtype)
    if dtype.is_signed:
        target[1] = -100
        ignored = [1]
    else:
        ignored = []
        if twin < 300:
            target[1] = twin
    loss, gradient = kernels.softmax_loss_with_gradient(x, target, plain_numbers(), [])[:2]
    labels = target.to(torch.int64)
    wanted = torch.nn.functional.cross_entropy(x, labels, reduction="none")
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    assert [row for row in range(5) if not gradient[row].any()] == ignored
    # An ignore_index that only wider integers hold is nobody's label.
    loss, *_ = kernels.softmax_loss_with_gradient(
        x[:1], labels[:1].to(dtype), plain_numbers(ignore_index=3 + 2**40), []
    )
    torch.testing.assert_close(loss, wanted[:1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("label", [2**64 - 100, 2**63, 2**64 - 1])
@pytest.mark.parametrize("ignore_index", [-100, -(2**63), -1])
def test_large_labels_are_no_classes(kernels, label, ignore_index):
    """uint64 labels that int64 does not hold: bad, whatever their bits are."""
    target = torch.tensor([1, label, 2], dtype=torch.uint64)
    call = lambda: kernels.softmax_loss_with_gradient(
        torch.randn(3, 4), target, plain_numbers(ignore_index=ignore_index), []
    )
    if kernels is ops.NATIVE:
        with pytest.raises(IndexError, match=f"target {label} at row 1 is out of range"):
            call()
        return
    loss, gradient, *_ = call()
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("field", KINDS, ids=lambda field: field.name)
def test_unknown_numbers_are_errors(kernels, field):
    kind, word = KINDS[field]
    for unknown in (len(kind), -1, 0.5, NAN):
        numbers = plain_numbers()
        numbers[field] = unknown
        with pytest.raises(RuntimeError, match=f"there is no {word} with the number"):
            kernels.softmax_loss(torch.randn(2, 3), torch.tensor([0, 1]), numbers, [], False)


@pytest.mark.parametrize("upstream", [NAN, INF, -INF])
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("classes", [5, 2000])
def test_ignored_rows_stay_zero(kernels, upstream, reduction, classes):
    """Whatever the upstream gradient is: no 0 * NaN, neither in logits nor in what a row gives to the parameters."""
    x, target = torch.randn(4, classes), torch.tensor([-100, 2, -100, 1])
    x[0] = NAN
    for kept in ([1, 3], []):
        if not kept:
            target[:] = -100
        numbers = plain_numbers(reduction=reduction)
        numbers[MASK] = float(1 << Slot.SCALE)
        for shape in ((4, 1), (classes,)):
            scale = torch.ones(shape)
            gradient_of = (1 << Slot.SCALE) | (1 << ops.INPUT)
            up = torch.full((4,) if reduction == 0 else (), upstream)
            by_scale, by_input = kernels.softmax_loss_backward(
                up, None, None, None, x, target, numbers, [scale], x.new_empty(0, 2), gradient_of
            )
            ignored = [row for row in range(4) if row not in kept]
            assert not by_input[ignored].any()
            if shape == (4, 1):
                assert not by_scale[ignored].any()
            else:
                assert not by_scale[[label for label in range(classes) if label not in target[kept].tolist()]].any()
    if reduction != 1:
        return
    # A mean over nothing: 0 / 0, and still no gradient.
    loss, gradient = kernels.softmax_loss_with_gradient(x, target, plain_numbers(reduction=1), [])[:2]
    assert bool(loss.isnan()) and not gradient.any()
