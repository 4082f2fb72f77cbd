"""Triton beyond 2^30 rows, where twice a row's number is no 32-bit integer: the last rows are what they are alone.

Tensors of so many rows are reserved, not filled: what is touched of them are their last rows. Under the interpreter
integers have the widths that the compiler gives them.
"""

import mmap
import os

import pytest
import torch
from table import BY_NAME, draw, run

import mlkernels

if mlkernels.available_backends()["triton"] is not None:
    pytest.skip(f"no Triton: {mlkernels.available_backends()['triton']}", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on a GPU that takes tens of gigabytes", allow_module_level=True)

from triton.runtime.interpreter import interpreter_builder

from mlkernels.backends.triton import arguments, launch, tiles

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter: log(0) and the like

LAST, CLASSES = 8, 5
NORESERVE = 0x4000  # Linux's; mmap has no name for it before Python 3.12
BELOW = 2**35  # bytes: where an offset that has become negative leads is memory, too
PROGRAM, PROGRAMS = interpreter_builder.set_grid_idx, interpreter_builder.set_grid_dim


def reserved(shape, dtype, device=None):
    """Memory that nobody has until it is touched, and more below it."""
    count = max(1, torch.Size(shape).numel())
    memory = mmap.mmap(-1, BELOW + count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=BELOW)[: torch.Size(shape).numel()].view(shape)


def last_of(tensor, rows):
    return tensor.narrow(tensor.shape.index(rows), rows - LAST, LAST) if rows in tensor.shape else tensor


def grown(tensor, rows):
    """A tensor whose last rows are these."""
    if LAST not in tensor.shape:
        return tensor
    large = reserved([rows if size == LAST else size for size in tensor.shape], tensor.dtype)
    last_of(large, rows).copy_(tensor)
    return large


def visited(input, target, numbers, params, needs, gradient, upstream, monkeypatch):
    """All that visits leave in the last rows, and whether their integers were wide."""
    rows, left, wide = len(target), [], set()

    def run_last(kernel, grid, *arguments, **options):
        wide.add(options["WIDE"])
        programs = LAST // options["ROWS"]
        patch.setattr(interpreter_builder, "set_grid_dim", lambda x, y, z: PROGRAMS(grid[0], y, z))
        patch.setattr(interpreter_builder, "set_grid_idx", lambda x, y, z: PROGRAM(grid[0] - programs + x, y, z))
        kernel[(programs,)](*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(launch.replay, "launch", run_last)
        patch.setattr(launch.replay, "empty", reserved)
        patch.setattr(arguments.Arguments, "parameter", lambda self, slot, values, bins: left.extend([values, bins]))
        call = arguments.Arguments(input, target, numbers, params)
        loss, saved, *stats = launch.softmax_stats(input, target, numbers, params)
        left += [loss, saved, *stats]
        for kept in (None, saved):
            call.run(saved=kept, gradient=gradient, needs=needs, upstream=upstream)
            left += [] if gradient is None else [gradient[-LAST:].clone()]
    return [last_of(tensor, rows) for tensor in left if tensor is not None], wide


@pytest.mark.parametrize(
    ("name", "form", "layout", "rows", "on_chip"),
    [
        ("two_scale_margin_modulated", "row", "rows", 2**30 + LAST, True),
        ("two_scale_margin_modulated", "row", "across", 2**30 + LAST, True),
        ("two_scale_margin_modulated", "row", "across", 2**30 + LAST, False),
        ("two_scale_margin_modulated", "row", "one", 2**30 + LAST, False),
        ("two_scale_margin_modulated", "row", "one", 2**29 + LAST, True),
        ("piecewise_groups", "number", "rows", 2**30 + LAST, False),
        ("piecewise_groups", "number", "one", 2**30 + LAST, True),
    ],
)
def test_the_last_of_many_rows(name, form, layout, rows, on_chip, monkeypatch):
    """Where they lie side by side or apart, or are all one row, of which the upstream gradients then lie apart."""
    monkeypatch.setattr(tiles, "tile", lambda *arguments: tiles.Tile(1 + on_chip, 4, 2, 2, 1, on_chip))
    loss = BY_NAME[name]
    input, target, params = draw(loss, rows=LAST, classes=CLASSES, form=form)
    group = {"group": loss.group(target)} if loss.groups else {}
    given = []
    execute = arguments.Arguments.__init__, arguments.Arguments.run
    with monkeypatch.context() as patch:
        patch.setattr(arguments.Arguments, "__init__", lambda self, *a: given.append(a) or execute[0](self, *a))
        patch.setattr(
            arguments.Arguments, "run", lambda self, **o: given.append(o.get("needs", 0)) or execute[1](self, **o)
        )
        run(loss, input.float(), target, params, 1.5, backend="triton", reduction="sum", **group)
    numbers, few = next(a[2:] for a in given if isinstance(a, tuple))
    needs = max(a for a in given if isinstance(a, int))
    numbers = [*numbers]
    numbers[arguments.REDUCTION] = arguments.Reduction.NONE

    input = input.float()
    upstream = torch.linspace(-1, 2, 12 * LAST).view(4, LAST, 3)
    if layout == "one":
        input, large = input[:1].expand(LAST, -1), input[:1].expand(rows, -1)
        gradient = gradient_large = None
        needs &= ~(1 << arguments.INPUT)
    elif layout == "rows":
        large = grown(input, rows)
        gradient, gradient_large = torch.empty_like(input), reserved(large.shape, input.dtype)
    else:
        input = input.t().contiguous().t()
        large = grown(input.t(), rows).t()
        gradient, gradient_large = torch.empty_like(input), reserved((CLASSES, rows), input.dtype).t()
    ups, ups_large = (u[..., 1].unbind() for u in (upstream, grown(upstream, rows)))
    many = [grown(param, rows) for param in few]
    wanted, _ = visited(input, target, numbers, few, needs, gradient, ups, monkeypatch)
    found, wide = visited(large, grown(target, rows), numbers, many, needs, gradient_large, ups_large, monkeypatch)
    assert wide == {rows > 2**30}
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
