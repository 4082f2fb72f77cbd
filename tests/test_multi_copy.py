"""``multi_copy_``: many tensors, one condition."""

import pytest
import torch

from mlkernels.ops import multi_copy_

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool, torch.half)


def mixed(seed):
    """Tensors of many dtypes, sizes and layouts, odd offsets and empty ones among them."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(0, 100, shape, generator=generator)
    tensors = [draw(size).to(dtype) for dtype in DTYPES for size in (0, 1, 7, 64, 1025)]
    tensors += [draw(21)[1:].to(dtype)[3:] for dtype in DTYPES]
    tensors += [draw(2, 3, 4, 5).float().contiguous(memory_format=torch.channels_last), draw(6, 7).float().t()]
    tensors += [draw(8, 10).float()[:, ::2], torch.tensor(float("nan")), draw(4).float() * -0.0]
    return tensors


def bits(tensor):
    return tensor.detach().contiguous().view(-1).view(torch.uint8).clone()


@pytest.mark.parametrize("flag", [None, True, False])
def test_copies_all_or_none(flag):
    dst, src = mixed(0), mixed(1)
    before, wanted = [bits(t) for t in dst], [bits(t) for t in src]
    pointers = [t.data_ptr() for t in dst]
    multi_copy_(dst, src, None if flag is None else torch.tensor(flag))
    for old, new, t in zip(before, wanted, dst, strict=True):
        assert torch.equal(bits(t), old if flag is False else new)
    assert [t.data_ptr() for t in dst] == pointers
    assert all(torch.equal(bits(t), w) for t, w in zip(src, wanted, strict=True))


def test_nothing_to_copy():
    multi_copy_([], [])
    multi_copy_([], [], torch.tensor(True))


@pytest.mark.parametrize(
    "src, flag, message",
    [
        ([], None, "src must hold one tensor per tensor of dst, 1, got 0"),
        ([torch.zeros(2)], None, r"src\[0\] must have the shape of dst\[0\]"),
        (
            [torch.zeros(3).double()],
            None,
            r"src\[0\] must have the dtype of dst\[0\], torch.float32, got torch.float64",
        ),
        ([torch.zeros(3, device="meta")], None, r"src\[0\] must have the device"),
        ([torch.zeros(3)], torch.tensor(1.0), "flag takes one boolean, got torch.float32"),
        ([torch.zeros(3)], torch.tensor([True, False]), "flag takes one boolean"),
    ],
)
def test_bad_input(src, flag, message):
    dst = torch.ones(3)
    with pytest.raises(ValueError, match=message):
        multi_copy_([dst], src, flag)
    assert bool((dst == 1).all())


def test_parameters_and_versions():
    """A parameter is written under no_grad, and autograd notices that a saved tensor was overwritten."""
    a = torch.nn.Parameter(torch.ones(3))
    loss = (a * a).sum()
    with torch.no_grad():
        multi_copy_([a], [torch.full((3,), 2.0)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_operator():
    torch.library.opcheck(
        torch.ops.mlkernels.multi_copy_.default,
        ([torch.zeros(3), torch.zeros(2).long()], [torch.ones(3), torch.ones(2).long()], torch.tensor(True)),
        test_utils=("test_schema", "test_faketensor"),
    )
