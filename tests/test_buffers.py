"""Large gradients on the CPU come from buffers that are kept from step to step."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

import mlkernels
from mlkernels.backends import native

if native.cpu_missing:
    pytest.skip(native.cpu_missing, allow_module_level=True)

MB = 2**20
ROWS = 512


def step(megabytes: int, seed: int = 0) -> torch.Tensor:
    """A loss's gradient of so many megabytes."""
    generator = torch.Generator().manual_seed(seed)
    classes = megabytes * MB // 4 // ROWS
    input = torch.randn(ROWS, classes, generator=generator).requires_grad_()
    target = torch.randint(classes, (ROWS,), generator=generator)
    mlkernels.cross_entropy(input, target, backend="cpu").backward()
    assert input.grad is not None
    return input.grad


@pytest.fixture(autouse=True)
def _nothing_kept():
    mlkernels.empty_cache()
    yield
    mlkernels.empty_cache()


def run(code: str, **environment: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_step_finds_the_pages_of_the_one_before():
    resource = pytest.importorskip("resource")
    place = step(16).data_ptr()
    input = torch.randn(ROWS, 16 * MB // 4 // ROWS).requires_grad_()
    target = torch.randint(100, (ROWS,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        input.grad = None
        mlkernels.cross_entropy(input, target, backend="cpu").backward()
        assert input.grad.data_ptr() == place
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 4 * 256  # a gradient has 4096 pages


def test_what_is_kept_is_not_written_again():
    first, second = step(8, 1), step(8, 2)
    assert first.data_ptr() != second.data_ptr()
    view = first[3:]
    del first
    expected = view.clone()
    for seed in range(3, 6):
        step(8, seed)
    assert torch.equal(view, expected)


def test_no_more_is_kept_than_was_in_use_at_once():
    larger = step(40)
    del larger
    mlkernels.empty_cache()  # forgets what was in use before
    for size in (8, 12, 10, 16):
        step(size)
    assert mlkernels.empty_cache() == 16 * MB
    assert mlkernels.empty_cache() == 0
    both = step(8), step(8)
    del both
    assert mlkernels.empty_cache() == 16 * MB


def test_a_live_gradient_stays_when_the_cache_is_emptied():
    gradient = step(8)
    expected = gradient.clone()
    assert mlkernels.empty_cache() == 0
    assert torch.equal(gradient, expected)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="the system does not say what it may take")
def test_what_stays_idle_is_lent_to_the_system():
    code = """
    import time
    def lent():
        lines = open("/proc/self/smaps_rollup").read().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("LazyFree:"))
    step(0)
    begin = time.monotonic()
    step(0)
    at_once = lent()
    if time.monotonic() - begin > 0.2:  # others kept the machine busy
        at_once = 0
    stop = begin + 60
    while lent() < 8192 and time.monotonic() < stop:
        time.sleep(0.05)
    later = lent()
    grad = step(0)
    print(at_once, later, lent(), torch.equal(grad, step(0)))
    """
    assert run(_STEP + code) == "0 8192 0 True"


def test_small_gradients_are_not_kept():
    step(2)
    assert mlkernels.empty_cache() == 0


def test_half_gradients_of_linear_heads_too():
    x, weight = torch.randn(2, 512).bfloat16(), torch.randn(4096, 512).bfloat16().requires_grad_()
    step = lambda: torch.autograd.grad(mlkernels.linear_cross_entropy(x, weight, torch.tensor([0, 1])), weight)[0]
    place = step().data_ptr()
    assert step().data_ptr() == place and place % (2 << 20) == 0  # aligned as buffers are


def test_losses_of_torchs_own_functions_too():
    target = torch.randint(4096, (ROWS,))
    rows, means = torch.randn(ROWS, 2).requires_grad_(), torch.randn(4096, 2).requires_grad_()
    mlkernels.lgm_loss(rows, target, means).backward()
    assert mlkernels.empty_cache() == 2 * 8 * MB  # logits and their gradient, then two gradients; the mask is 2 MB
    input = torch.randn(ROWS, 4096, dtype=torch.bfloat16).requires_grad_()
    mlkernels.multi_margin_loss(input, target).backward()
    input.grad = None
    assert mlkernels.empty_cache() == (8 + 8 + 4) * MB  # logits in float32 and two gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_layouts(dtype):
    input = torch.randn(2, 6, 512, 400).to(dtype)
    target = torch.randint(6, (2, 512, 400))
    for logits in (input, input.to(memory_format=torch.channels_last), input.transpose(2, 3)):
        labels = target if logits.shape[2] == 512 else target.transpose(1, 2)
        leaf = logits.detach().requires_grad_()
        mlkernels.cross_entropy(leaf, labels, backend="cpu").backward()
        other = logits.detach().requires_grad_()
        mlkernels.cross_entropy(other, labels, backend="reference").backward()
        assert leaf.grad.stride() == torch.empty_like(logits).stride()
        torch.testing.assert_close(leaf.grad, other.grad)
    if dtype == torch.float32:
        del leaf
        assert mlkernels.empty_cache() > 0


def test_a_gradient_is_a_tensor_like_any_other():
    gradient = step(8)
    expected = gradient.clone()
    assert torch.equal(copy.deepcopy(gradient), expected)
    assert torch.equal(pickle.loads(pickle.dumps(gradient)), expected)
    assert torch.equal(torch.from_numpy(gradient.numpy()), expected)
    gradient.mul_(2).add_(1)
    assert torch.equal(gradient, expected * 2 + 1)
    assert torch.equal(gradient.share_memory_(), expected * 2 + 1)
    gradient = step(8).mul_(2).add_(1)
    array = gradient.numpy()
    del gradient
    step(8, 7)
    assert array[0, 0] == (expected * 2 + 1)[0, 0].item()


def test_many_threads():
    expected = {seed: step(8, seed) for seed in range(4)}
    wrong: list[int] = []

    def work(seed: int) -> None:
        wrong.extend(seed for _ in range(3) if not torch.equal(step(8, seed), expected[seed]))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


_STEP = """
    import os, torch, mlkernels
    torch.set_num_threads(1)
    def step(seed):
        generator = torch.Generator().manual_seed(seed)
        input = torch.randn(512, 4096, generator=generator).requires_grad_()
        mlkernels.cross_entropy(input, torch.arange(512), backend="cpu").backward()
        return input.grad
"""


def test_switched_off():
    assert run(_STEP + "    step(0); print(mlkernels.empty_cache())", MLKERNELS_CPU_BUFFERS="0") == "0"
    assert run(_STEP + "    step(0); print(mlkernels.empty_cache())", MLKERNELS_CPU_BUFFERS="1") == str(8 * MB)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_after_a_fork_each_process_has_its_own():
    code = (
        _STEP
        + """
    kept, expected = step(1), step(1).clone()
    del expected
    child = os.fork()
    gradient = step(2)
    sums = (kept.double().sum().item(), gradient.double().abs().sum().item())
    if child == 0:
        kept.zero_()
        os._exit(0 if sums[1] > 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(kept, step(1)), "the child wrote into the parent's"
    print("alike" if torch.equal(gradient, step(2)) else "not")
    """
    )
    assert run(code) == "alike"


def test_a_gradient_outlives_the_interpreter():
    assert run(_STEP + "    import builtins; builtins.kept = step(0); print('ended')") == "ended"
