"""Nothing on the way to a kernel looks at the numbers of a tensor: on a GPU each look would wait for the device.

There is no GPU here, so two stand-ins: the meta device, whose tensors have no numbers to look at, through the reference
(which serves every device without a kernel); and a dispatch mode that forbids the operators that synchronise, on CPU
tensors with the CPU's own label check taken out.
"""

import pytest
import torch
from table import BY_NAME, FEW, LOSSES, draw, extras, leaves
from torch.utils._python_dispatch import TorchDispatchMode

import mlkernels
from mlkernels import checks, tracing

META = torch.device("meta")


def to_meta(value):
    return value.detach().to(META).requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_a_device_without_numbers(loss):
    """Forward and backward with every parameter a tensor: .item(), nonzero and boolean indices raise on meta."""
    input, target, params = draw(loss, rows=4, form="shared")
    own = {k: to_meta(v) for k, v in leaves(params).items()}
    options = {"group": to_meta(loss.group(target))} if loss.groups else {}
    options |= {name: to_meta(value) for name, value in extras(6).items()}
    x = input.float().to(META).requires_grad_()
    options |= {"row_weight": torch.ones(4, device=META), "normalizer": torch.ones((), device=META)}
    value = loss(x, to_meta(target), own, **options)
    assert value.device == META
    value.backward(torch.ones_like(value))
    assert x.grad.shape == x.shape
    assert all(v.grad.shape == v.shape for v in own.values() if isinstance(v, torch.Tensor))


class Forbid(TorchDispatchMode):
    """Operators that make a host wait for its device, and tensors built from host numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_to_cpu"):
            raise AssertionError(f"{name} synchronises")
        if name == "index" and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
            raise AssertionError("a boolean index synchronises")
        if name == "lift_fresh":
            raise AssertionError("torch.tensor(...) copies from the host")
        return func(*args, **(kwargs or {}))


def test_the_mode_forbids():
    """It must be able to fail."""
    x = torch.randn(3)
    for call in (lambda: x.sum().item(), lambda: x[x > 0], lambda: x.nonzero(), lambda: bool(x.sum() > 0),
                 lambda: torch.tensor([1.0])):  # fmt: skip
        with pytest.raises(AssertionError), Forbid():
            call()
    with Forbid():
        x.exp().sum(0)
        x[torch.zeros(2).long()]


@pytest.mark.parametrize("return_stats", [False, True])
@pytest.mark.parametrize("loss", FEW, ids=str)
def test_the_reference_never_looks(loss, return_stats, monkeypatch):
    """As on a GPU with label checks off: ranges are left to the kernel, which answers NaN."""
    monkeypatch.setattr(tracing, "traced", lambda *tensors: True)  # "values cannot be looked at"
    input, target, params = draw(loss, rows=6, form="shared")
    own = leaves(params)
    options = {"group": loss.group(target)} if loss.groups else {}
    x, weight, up = input.float().requires_grad_(), torch.ones(6), torch.tensor(1.5)
    count = torch.tensor(5)
    with Forbid():
        value = mlkernels.softmax_loss(
            x, target, **loss.compose(own), **options, weight=weight, label_smoothing=0.1, backend="reference",
            return_stats=return_stats, row_weight=weight, normalizer=count,
        )  # fmt: skip
        (value[0] + value[1].entropy.sum() if return_stats else value).backward(up)
    assert bool(x.grad.isfinite().all())


def test_checks_of_the_device_are_off_by_default():
    """check_labels costs a synchronisation: on a device it is only done when asked for."""
    assert checks._check_labels is False
    x, y = torch.zeros(2, 3, device=META), torch.zeros(2, dtype=torch.long, device=META)
    BY_NAME["cross_entropy"](x, y, {})
