"""A linear head on the emulator, against the reference in float64: Triton's kernels of pieces."""

from __future__ import annotations

import torch

from .cases import DTYPES
from .worker import prepare


def check(target: str, dtype: str, everything: bool) -> None:
    """Loss, statistics and gradients of a linear head of two tiles, one row of it ignored.

    Raises:
        AssertionError: a value or a gradient is wrong.
        Fault: the emulator found one.
    """
    prepare("triton", target)
    import mlkernels

    generator = torch.Generator().manual_seed(0)
    rows, classes, width = 9, 256, 16  # tiles of one width: a form takes a second to compile
    leaves = [torch.randn(n, width, generator=generator).to(DTYPES[dtype]) for n in (rows, classes)]
    if dtype == "bfloat16":  # dX is a rest of what the rounding of a tile would not leave
        leaves[1] = leaves[1][:1] + 0.01 * leaves[1]
    label = torch.randint(classes, (rows,), generator=generator)
    label[2] = -100
    options = {}
    if everything:
        vector = torch.rand(classes, generator=generator)
        options = {"normalize": True, "scale": 4.0, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 3.0}
        options |= {"weight": vector, "logit_adjustment": vector - 0.5, "return_stats": True}
    results = []
    for backend, tensors in (("triton", leaves), ("reference", [leaf.double() for leaf in leaves])):
        x, weight = (tensor.detach().requires_grad_() for tensor in tensors)
        cut = {"strategy": "tiles", "memory": rows * 6 * 128} if backend == "triton" else {}
        value = mlkernels.linear_softmax_loss(x, weight, label, backend=backend, **cut, **options)
        outputs = [value[0], *value[1][:3]] if everything else [value]
        gradients = torch.autograd.grad(outputs, [x, weight], [torch.full_like(one, 2.5) for one in outputs])
        results.append([one.detach().double() for one in (*(value[1] if everything else ()), *outputs, *gradients)])
    assert not results[0][-2][2].any()
    limits = [1e-6] * (len(results[0]) - 2) + [2.0**-8 if dtype == "bfloat16" else 1e-5] * 2
    for found, wanted, limit in zip(*results, limits, strict=True):
        error = (found - wanted).norm() / wanted.norm()
        assert error <= limit, f"off by {error:.3g}, {limit:.3g} is allowed"
