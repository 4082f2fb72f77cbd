"""Weights of rows, and a divisor of one's own: where test_values.py does not look."""

import pytest
import torch
from table import BY_NAME, F64, FEW, INF, NAN, check, draw, run

import mlkernels

LOSS = BY_NAME["focal_2"]


def row_weight(target, dtype=F64):
    return torch.linspace(-0.5, 2.0, target.numel()).reshape(target.shape).to(dtype)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "as it comes"])
def test_rows_and_weights_of_any_layout(backend, layout):
    """(N, C, d1, d2) with weights that lie otherwise than the rows, or are one number for many: as (N, C) by hand."""
    input, target, _ = draw(LOSS, rows=12, classes=5, kinds=("random",))
    images, labels = input.reshape(2, 2, 3, 5).movedim(-1, 1), target.reshape(2, 2, 3)
    if layout != "as it comes":
        format = torch.contiguous_format if layout == "contiguous" else torch.channels_last
        images = images.contiguous(memory_format=format)
    for weight in (
        row_weight(labels.movedim(0, -1)).movedim(-1, 0),
        torch.tensor([0.5, -2.0]).view(2, 1, 1).expand(2, 2, 3),
    ):
        options = {"z_loss": 0.1, "normalizer": 3, "backend": backend}
        found = run(LOSS, images, labels, {}, -1.5, row_weight=weight, **options)
        wanted = run(LOSS, input, target, {}, -1.5, row_weight=weight.reshape(-1), **options)
        torch.testing.assert_close(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1].reshape(2, 2, 3, 5).movedim(-1, 1))


def test_a_single_row(backend):
    input, target, _ = draw(LOSS, rows=1)
    weight, up = torch.tensor(0.75, dtype=F64), torch.tensor(2.0, dtype=F64)
    options = {"normalizer": torch.tensor([4]), "backend": backend}
    found = run(LOSS, input[0], target[0], {}, up, row_weight=weight, **options)
    wanted = run(LOSS, input, target, {}, 2 * 0.75 / 4, reduction="sum", backend=backend)
    torch.testing.assert_close(found[0], wanted[0] * 0.75 / 4)
    torch.testing.assert_close(found[1], wanted[1][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
def test_half_precision(backend, dtype):
    """Half rows with half weights, and a count of tokens."""
    loss = BY_NAME["modulated"]
    input, target, params = draw(loss, form="shared", exact=dtype, seed=6)
    options = {"row_weight": row_weight(target, dtype), "normalizer": torch.tensor(20), "z_loss": 0.01}
    check(loss, backend, input, target, params, dtype, torch.tensor(8.0, dtype=F64), **options)


@pytest.mark.parametrize("upstream", [1.5, NAN, INF])
@pytest.mark.parametrize(
    "options", [{"row_weight": True}, {"row_weight": True, "normalizer": 4.0}], ids=["mean", "normalizer"]
)
def test_nothing_kept(backend, options, upstream):
    """A mean over nothing is NaN, nothing over a normalizer is 0; no row gets a gradient, nor has its weight read."""
    input, target, params = draw(BY_NAME["modulated"], rows=4, form="shared")
    target[:] = -100
    options = {**options, "row_weight": torch.full((4,), NAN), "z_loss": 0.1, "backend": backend}
    value, grad, by_param = run(BY_NAME["modulated"], input, target, params, upstream, **options)
    assert value.isnan() if "normalizer" not in options else value == 0
    assert not grad.any() and not any(g.any() for g in by_param.values())


@pytest.mark.parametrize("normalizer", [0.0, -2.0, NAN, INF])
def test_a_bad_normalizer_on_a_device_is_nan(backend, normalizer, monkeypatch):
    """Where nobody looks at it: never a loss of the other sign."""
    monkeypatch.setattr(mlkernels.checks, "check_range", lambda *arguments: None)
    input, target, params = draw(LOSS, rows=4)
    value = LOSS(input, target, params, normalizer=torch.tensor(normalizer), backend=backend)
    assert value.isnan()


@pytest.mark.parametrize("loss", FEW, ids=str)
def test_micro_batches_add_up(loss, backend):
    """What a normalizer is for: the gradients of parts, each divided by the whole, are those of the whole mean."""
    input, target, params = draw(loss, rows=8, form="shared", kinds=("random",))
    target[[0, 1, 2, 6]] = -100
    if loss.name == "target_logit":
        params = {k: v[:4] if v.dim() else v for k, v in params.items()}
        input[4:], target[4:] = input[:4], target[:4].roll(1)
    count = (target != -100).sum()
    halves = [slice(0, 4), slice(4, 8)]
    whole = {k: torch.cat([v, v]) if k == "target_logit" else v for k, v in params.items()}
    group = loss.group(target)
    groups = [{} if group is None else {"group": group[part]} for part in halves]
    parts = [
        run(loss, input[part], target[part], params, normalizer=count, backend=backend, **more)
        for part, more in zip(halves, groups, strict=True)
    ]
    value, grad, by_param = run(
        loss, input, target, whole, backend=backend, **({} if group is None else {"group": group})
    )
    torch.testing.assert_close(parts[0][0] + parts[1][0], value)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), grad)
    for name, found in by_param.items():
        if name != "target_logit":
            torch.testing.assert_close(parts[0][2][name] + parts[1][2][name], found)
