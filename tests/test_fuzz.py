"""The fuzzer agrees with the kernels, finds what is wrong with wrong ones, and repeats itself."""

from __future__ import annotations

import dataclasses

import pytest
import table
import torch

from tools import fuzz, fuzz_linear

FEW = {"cpu": (40, 1200), "triton": (6, 24)}


@pytest.mark.parametrize("backend", [b for b in table.usable_backends() if b in FEW])
def test_no_call_fails(backend: str) -> None:
    calls, rows = FEW[backend]
    for seed in range(calls):
        case = fuzz.drawn(seed, rows, 300)
        assert fuzz.wrong(case, backend) is None, case


@pytest.mark.parametrize("backend", [b for b in table.usable_backends() if b in FEW])
def test_gradients_at_the_cap(backend: str) -> None:
    """1 - tanh(x/c)^2 is 0 to the reference from x = 19 c on, and 4e-17 there to kernels that form no difference."""
    case = fuzz.drawn(6000446, 60, 300)
    assert case.dtype == torch.float64 and case.options["softcap"] == 2.0 and case.spread == 20.0
    assert fuzz.wrong(case, backend) is None


def test_calls_repeat() -> None:
    case = fuzz.drawn(7, 100, 50)
    assert case == fuzz.drawn(7, 100, 50) != fuzz.drawn(8, 100, 50)
    assert torch.equal(fuzz.rows_of(case)[0].nan_to_num(), fuzz.rows_of(case)[0].nan_to_num())


def test_a_fault_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """One class of one row is wrong by 1e-5 of it, wherever z-loss is on."""
    called = fuzz.called

    def faulty(case: fuzz.Case, x: torch.Tensor, target: torch.Tensor, backend: str, dtype: torch.dtype) -> fuzz.Found:
        found = called(case, x, target, backend, dtype)
        if backend == "cpu" and "z_loss" in case.options:
            row = (found.grad.abs().amax(1) > 1e-3).nonzero()[:1, 0]
            found.grad[row] *= 1 + 1e-4
        return found

    monkeypatch.setattr(fuzz, "called", faulty)
    seeds = (s for s in range(100) if "z_loss" in fuzz.drawn(s, 60, 20).options)
    case = next(
        c for c in (dataclasses.replace(fuzz.drawn(s, 60, 20), dtype=torch.float32) for s in seeds) if not c.strange
    )
    word = fuzz.wrong(case, "cpu")
    assert word is not None and word.startswith("gradient")
    smaller = fuzz.shrunk(case, "cpu")
    assert smaller.only is not None
    assert set(smaller.options) == {"z_loss", "ignore_index"}


@pytest.mark.skipif("cpu" not in table.usable_backends(), reason="no CPU kernels")
def test_linear_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No call fails, and one does whose features' gradient is wrong by a thousandth in one place."""
    threads = torch.get_num_threads()
    try:
        cases = [fuzz_linear.drawn(seed) for seed in range(25)]
        for case in cases:
            assert fuzz_linear.wrong(case) is None, case
        called = fuzz_linear.called

        def faulty(case: fuzz_linear.Case) -> tuple[list[fuzz_linear.Check], int]:
            checks, rows = called(case)
            at = next(check for check in checks if check.name == "x")
            at.got.flatten()[at.right.abs().argmax()] *= 1.001
            return checks, rows

        monkeypatch.setattr(fuzz_linear, "called", faulty)
        seen = [case for case in cases if case.frozen != "x" and case.dtype == torch.float64]
        found = [fuzz_linear.wrong(case) for case in seen]
        assert sum(word is not None and word.startswith("x: 1 of") for word in found) > 0.8 * len(seen) > 2, found
    finally:
        torch.set_num_threads(threads)
