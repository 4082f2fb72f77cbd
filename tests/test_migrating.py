"""The page on migrating, run with the libraries that it speaks of; mlkernels.patch."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mlkernels

PAGE = (Path(__file__).parent.parent / "docs" / "migrating.md").read_text()
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
HEAD, *SECTIONS = re.split(r"^## (?=.*$)", PAGE, flags=re.MULTILINE)
pytestmark = pytest.mark.filterwarnings("ignore")  # what other libraries warn of is theirs
THEIRS = {"transformers", "timm", "torchvision", "monai", "kornia", "cut_cross_entropy", "pytorch_metric_learning"}


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.split("\n")[0])
def test_section(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scope: dict[str, object] = {}
    try:
        for block in [*BLOCK.findall(HEAD), *BLOCK.findall(section)]:
            exec(compile(block, "docs/migrating.md", "exec"), scope)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in THEIRS:
            raise
        pytest.skip(f"{error.name} is not installed")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        pytest.skip("this torchvision is for another build of torch")


def test_sections_are_there() -> None:
    assert len(SECTIONS) >= 11
    assert all(BLOCK.findall(section) for section in SECTIONS)
    for name in THEIRS - {"transformers"}:
        assert sum(f"from {name}" in section for section in SECTIONS) >= 1, name


# ---- Liger-Kernel, through Triton's interpreter ----------------------------------------------------------------------


def test_liger() -> None:
    """Its loss and gradient, row by row of what the page says of it. Softcap and class weights do not run there."""
    pytest.importorskip("triton")
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger_kernel is not installed")
    code = """
        import logging
        logging.disable(logging.CRITICAL)  # of backends for other devices
        import torch, triton

        class NoDevice:
            def get_current_target(self):
                return triton.backends.compiler.GPUTarget("cuda", 90, 32)
            def get_current_device(self):
                return 0

        triton.runtime.driver.set_active(NoDevice())
        import mlkernels
        from liger_kernel.transformers import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss

        torch.manual_seed(0)
        logits, target = torch.randn(6, 7), torch.randint(7, (6,))
        target[2] = -100
        for theirs, ours in (
            ({}, {}),
            ({"lse_square_scale": 0.1}, {"z_loss": 0.1}),
            ({"lse_square_scale": 0.1, "label_smoothing": 0.2, "reduction": "sum"},
             {"z_loss": 0.1, "label_smoothing": 0.2, "reduction": "sum"}),
        ):
            a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
            wanted, found = LigerCrossEntropyLoss(**theirs)(a, target), mlkernels.cross_entropy(b, target, **ours)
            (1.5 * wanted).backward()
            (1.5 * found).backward()
            torch.testing.assert_close(found, wanted)
            torch.testing.assert_close(b.grad, a.grad, atol=1e-6, rtol=1e-5)
        features, weight = torch.randn(6, 16), torch.randn(7, 16)
        wanted = LigerFusedLinearCrossEntropyLoss()(weight, features, target)
        torch.testing.assert_close(mlkernels.linear_cross_entropy(features, weight, target), wanted)
        print("same")
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "same", done.stderr[-2000:]


# ---- mlkernels.patch -------------------------------------------------------------------------------------------------


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 5, generator=generator).requires_grad_(), torch.randint(5, (6,), generator=generator)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"weight": torch.tensor([1.0, 2, 3, 0.5, 0.1])}, {"ignore_index": 2}, {"label_smoothing": 0.1},
        {"reduction": "none"}, {"size_average": False}, {"reduce": False},
    ],
    ids=str,
)  # fmt: skip
def test_patch_is_torchs_own(options: dict[str, object]) -> None:
    input, target = rows()
    (wanted_gradient,) = torch.autograd.grad(1.5 * F.cross_entropy(input, target, **options).sum(), input)
    wanted = F.cross_entropy(input, target, **options)
    with mlkernels.patch():
        found = F.cross_entropy(input, target, **options)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(1.5 * found.sum(), input)[0], wanted_gradient)


def test_patch_reaches_the_kernels() -> None:
    input, target = rows()
    with mlkernels.patch(), pytest.raises(ValueError, match="weight must"):  # torch's own raises a RuntimeError
        torch.nn.CrossEntropyLoss(torch.ones(3))(input, target)


def test_patch_leaves_what_no_kernel_serves_to_torch() -> None:
    input, target = rows()
    gradient = torch.func.grad(F.cross_entropy)(input.detach(), target)
    other = torch.rand(6, 5)
    wanted = F.cross_entropy(input, other)
    with mlkernels.patch():
        torch.testing.assert_close(torch.func.grad(lambda x: F.cross_entropy(x, target))(input.detach()), gradient)
        _, tangent = torch.func.jvp(lambda x: F.cross_entropy(x, target), (input.detach(),), (other,))
        assert F.cross_entropy(input.to("meta"), target.to("meta")).is_meta
        torch.testing.assert_close(F.cross_entropy(input, other), wanted)
        with pytest.raises((TypeError, AttributeError)):
            F.cross_entropy(3, target)
    torch.testing.assert_close(tangent, (gradient * other).sum())


def test_patch_with_another_loss() -> None:
    input, target = rows()
    with mlkernels.patch(functools.partial(mlkernels.focal_loss, gamma=1.0)):
        found = torch.nn.CrossEntropyLoss(ignore_index=2, reduction="sum")(input, target)
    wanted = mlkernels.focal_loss(input, target, gamma=1.0, ignore_index=2, reduction="sum")
    torch.testing.assert_close(found, wanted)


def test_patch_is_put_back() -> None:
    before = F.cross_entropy
    with mlkernels.patch():
        once = F.cross_entropy
        with pytest.raises(ZeroDivisionError), mlkernels.patch(mlkernels.focal_loss):
            raise ZeroDivisionError
        assert F.cross_entropy is once
    assert F.cross_entropy is before
    with pytest.warns(UserWarning, match="somebody else replaced"), mlkernels.patch():
        F.cross_entropy = lambda *_: None
    assert F.cross_entropy is before


def test_patch_is_the_processs() -> None:
    found = []
    with mlkernels.patch(lambda *_, **__: "patched"):
        thread = threading.Thread(target=lambda: found.append(F.cross_entropy(*rows())))
        thread.start()
        thread.join()
    assert found == ["patched"]


def test_patch_under_compile() -> None:
    input, target = rows()

    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.CrossEntropyLoss()(2 * x, target)

    with mlkernels.patch():
        found = torch.compile(step, backend="aot_eager", fullgraph=True)(input)
    torch.testing.assert_close(found, step(input))


@pytest.mark.parametrize(
    "loss", [mlkernels.CrossEntropyLoss(), mlkernels.FocalLoss, "focal"], ids=["module", "class", "word"]
)
def test_patch_takes_functions(loss: object) -> None:
    with pytest.raises(TypeError, match="loss must be a function"), mlkernels.patch(loss):  # type: ignore[arg-type]
        pass
