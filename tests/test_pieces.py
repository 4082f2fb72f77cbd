"""Rows in pieces: what pieces of the classes know, combined and finished, is what the whole row knows."""

import itertools
import random

import pytest
import torch
from table import F64, INF, LOSSES, NAN, draw, preparation, usable_backends

from mlkernels import softmax
from mlkernels.backends import reference
from mlkernels.backends.reference import Finished, Values
from mlkernels.linear.pieces import CPU, Tile, Want
from mlkernels.numbering import REDUCTION, TRAINABLE, Reduction, Slot, slots_of

CLASSES, ROWS = 7, 12
VECTOR = torch.tensor([0.5, 1.5, 0.0, 2.0, 0.75, 1.25, 1.0], dtype=F64)
OPTIONS = {
    "plain": {"reduction": "none"},
    "smoothed": {"weight": VECTOR, "label_smoothing": 0.1, "z_loss": 0.01, "reduction": "mean"},
    "capped": {**preparation(CLASSES), "label_smoothing": 0.2, "reduction": "sum"},
    "weighted": {
        "row_weight": torch.linspace(-1, 2, ROWS, dtype=F64), "normalizer": 3.5, "z_loss": 0.1, "reduction": "mean",
    },
}  # fmt: skip
#: A whole row, a class a piece (one holds y alone, one a -inf alone), empty pieces at both ends and between.
CUTS = {"whole": (0, 7), "single": range(8), "ragged": (0, 0, 1, 1, 5, 5, 7, 7)}


def drawn(loss, options):
    """Rows of every kind, then: no other class has a chance, an ignored row of NaN; where rows stay apart, bad ones."""
    form = "number" if loss.structure.scale == "two_scale" else loss.forms[-1]
    kinds = ("random", "confident5", "confident40", "wrong40", "ties", "tied_top", "masked")
    if options.get("label_smoothing"):
        kinds = kinds[:-1]
    extras = {k: options[k] for k in preparation(CLASSES) if k in options}
    input, target, params = draw(loss, rows=ROWS, classes=CLASSES, form=form, kinds=kinds, **extras)
    if not options.get("label_smoothing"):
        input[7] = torch.where(torch.arange(CLASSES) == target[7], input[7], -INF)
    target[8], input[8] = -100, NAN
    if options["reduction"] == "none":
        input[10, 2] = INF
        input[11, 3] = NAN
    params = {k: v if isinstance(v, torch.Tensor) else torch.tensor(v, dtype=F64) for k, v in params.items()}
    return input, target, params


def as_called(loss, input, target, params, options, monkeypatch):
    """What the reference is called with: numbers and tensors."""
    seen = []
    whole = reference.softmax_loss

    def watched(*arguments):
        seen.append(arguments)
        return whole(*arguments)

    monkeypatch.setattr(softmax.reference, "softmax_loss", watched)
    group = {"group": loss.group(target)} if loss.groups else {}
    loss(input, target, params, backend="reference", **options, **group)
    monkeypatch.undo()
    _, _, numbers, tensors = seen[0]
    return numbers, tensors


def folded(pieces, scales):
    for piece in pieces[1:]:
        pieces[0] = reference.combine(pieces[0], piece, scales)
    return pieces[0]


def in_any_order(pieces, scales, seed=0):
    """Neighbours first, wherever they are."""
    pick = random.Random(seed)
    while len(pieces) > 1:
        i = pick.randrange(len(pieces) - 1)
        pieces[i : i + 2] = [reference.combine(*pieces[i : i + 2], scales)]
    return pieces[0]


def by_pieces(input, target, numbers, tensors, needs, cuts, together, upstream):
    """Loss, statistics, the gradient of the logits and those of the parameters by slot, from pieces of the classes."""
    values = Values(numbers, tensors, target, CLASSES, F64)
    f = torch.where(values.kept[:, None], input, 0)
    u = reference.final_logits(f, values)
    u_y = u.gather(1, values.label[:, None])[:, 0]
    # The target stands apart: what its place holds does not matter.
    u = torch.where(torch.arange(CLASSES) == values.label[:, None], NAN, u)
    scales = reference.scales(values)
    spans = list(itertools.pairwise(cuts))
    rows = together(
        [reference.statistics(u[:, a:b], u_y, scales, values, start=a, second=True) for a, b in spans], scales
    )
    high = reference.well_classified(u_y - rows.top, values)
    finished = reference.finish(reference.chosen(rows, high), u_y, reference.row_scale(values, high), values)
    by_class, by_row = reference.factors(values)
    up_loss, *ups = upstream
    ups = Finished(up_loss * by_class, up_loss * by_row, *ups)
    ups = ups._replace(by_row=None) if values.z_loss == 0 else ups
    coefficients, by_slot = reference.coefficients(rows, u_y, values, ups, needs)
    grad = [reference.gradient(u[:, a:b], coefficients, values, start=a) for a, b in spans]
    cap = values.consts[Slot.SOFTCAP]
    grad = torch.cat(grad, 1) * (1 - torch.tanh(f / cap).square() if cap else 1)
    return reference.reduced(finished, values), reference.row_stats(rows, u_y, finished, values), grad, by_slot


def by_kernels(pieces, input, target, numbers, tensors, needs, cuts, upstream):
    """The same by those of a linear head (linear/pieces.py), of tiles that hold NaN at the target; cuts are spans."""
    values = Values(numbers, tensors, target, CLASSES, F64)
    # Who masks ignored rows lets the tiles hold what they like; else they are no rows of a linear head.
    held = input if pieces.masks else torch.where(values.kept[:, None], input, 0)
    f_y = torch.where(values.kept, input.gather(1, values.label[:, None])[:, 0], 0)
    want = Want(True, True, True)
    u_y, scales = reference.final_target(f_y, values), reference.scales(values)
    rows = pieces.begin(u_y, values, want)
    tiles = [(a, held[:, a:b].masked_fill(torch.arange(a, b) == values.label[:, None], NAN)) for a, b in cuts]
    for start, tile in tiles:
        rows = pieces.statistics(Tile(tile, start), u_y, values, rows, scales, want)
    by_class, by_row = reference.factors(values)
    up_loss, *ups = upstream
    ups = Finished(up_loss * by_class, up_loss * by_row, *ups)
    finished, coefficients, by_slot = pieces.finish(rows, u_y, values, ups, needs, want)
    of_target = reference.through_cap(coefficients.target, f_y, values)
    grad = []
    for start, tile in tiles:
        out = torch.full_like(tile, 7.0) if start % 2 else None  # in place, or apart
        grad.append(pieces.gradient(Tile(tile, start), coefficients, values, True, out))
        assert not grad[-1][torch.arange(start, start + tile.shape[1]) == values.label[:, None]].any()
    grad = torch.cat(grad, 1)
    assert not grad[~values.kept].any()
    grad = grad.scatter(1, values.label[:, None], of_target[:, None])
    return reference.reduced(finished, values), reference.row_stats(rows, u_y, finished, values), grad, by_slot


def whole_rows(loss, options, monkeypatch, illegal=True):
    """The arguments of by_pieces, its upstream gradients, and what it has to find: by the reference of whole rows."""
    input, target, params = drawn(loss, options)
    numbers, tensors = as_called(loss, input, target, params, options, monkeypatch)
    if illegal and options["reduction"] == "none":
        target[9] = CLASSES  # as a device would meet it
    x, own = input.clone().requires_grad_(), dict(zip(slots_of(numbers), tensors, strict=True))
    needs = [slot for slot in own if slot in TRAINABLE]
    own |= {slot: own[slot].clone().requires_grad_() for slot in needs}
    value, stats = reference.softmax_loss(x, target, numbers, list(own.values()))
    generator = torch.Generator().manual_seed(5)
    shape = (ROWS,) if numbers[REDUCTION] == Reduction.NONE else ()
    upstream = [torch.randn(s, dtype=F64, generator=generator) for s in (shape, *[(ROWS,)] * 3)]
    outputs = [value, stats.logsumexp, stats.log_prob, stats.entropy]
    grad, *by_slot = torch.autograd.grad(outputs, [x, *(own[s] for s in needs)], upstream, materialize_grads=True)
    wanted = value.detach(), stats, grad, dict(zip(needs, by_slot, strict=True))
    return (input, target, numbers, tensors, needs), upstream, wanted


def check_pieces(found, wanted, name, **tolerance):
    """Loss, statistics and gradients; those of parameters relative to the largest."""
    same = {**tolerance, "equal_nan": True}
    (value, rows, grad, by_slot), (its_value, its_rows, its_grad, its_slots) = found, wanted
    torch.testing.assert_close(value, its_value, **same)
    for ours, theirs, field in zip(rows, its_rows, its_rows._fields, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), **same, msg=lambda m, f=field: f"{name}, {f}: {m}")
    torch.testing.assert_close(grad, its_grad, **same)
    for slot, theirs in its_slots.items():
        size = 1 + theirs.nan_to_num().abs().max()
        torch.testing.assert_close(by_slot[slot] / size, theirs / size, **same)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_pieces_are_the_whole_row(loss, options, monkeypatch):
    arguments, upstream, wanted = whole_rows(loss, OPTIONS[options], monkeypatch)
    for (name, cuts), together in itertools.product(CUTS.items(), (folded, in_any_order)):
        check_pieces(by_pieces(*arguments, cuts, together, upstream), wanted, name, rtol=1e-11, atol=1e-12)


@pytest.mark.skipif("cpu" not in usable_backends(), reason="no library")
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_the_cpus_pieces_are_the_whole_row(loss, monkeypatch):
    """Whatever is asked of a row at once: upstream gradients of loss, logsumexp, log_prob and entropy."""
    for (name, options), cuts in zip(OPTIONS.items(), itertools.cycle(CUTS.values()), strict=False):
        arguments, upstream, wanted = whole_rows(loss, options, monkeypatch, illegal=False)
        found = by_kernels(CPU, *arguments, [*itertools.pairwise(cuts)], upstream)
        check_pieces(found, wanted, name, rtol=1e-9, atol=1e-10)
