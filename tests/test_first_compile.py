"""A process's first ``torch.compile(fullgraph=True)`` of every loss, module and option.

What an eager call or another test has cached before (structures, backends, Dynamo's own) hides what a graph cannot do.
So this file is also a program, which imports torch and the package, calls nothing, and forks a process for each case.
"""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from table import LOSSES, draw
from torch import nn

import mlkernels

C = 6
OPTIONS = [
    {},
    {"reduction": "sum", "weight": torch.linspace(0.5, 2, C)},
    {"reduction": "none", "label_smoothing": 0.1},
    {"z_loss": 0.01, "ignore_index": 3},
    {"softcap": 5.0, "logit_adjustment": torch.linspace(-0.1, 0.1, C)},
    {"row_weight": torch.linspace(-0.5, 2, 5), "normalizer": torch.tensor(7)},
]
SLOPE, BIAS = torch.tensor([0.9, 1.1]), torch.tensor([0.1, -0.05])


def trained(value):
    return nn.Parameter(torch.tensor(value))


def logits():
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(5, C, generator=generator) - 1, torch.tensor([0, 3, 5, 1, 2])


def of_table(loss, index, backend):
    def make():
        form = loss.forms[index % len(loss.forms)]
        input, target, params = draw(loss, rows=5, form=form, kinds=("random",))
        options = OPTIONS[index % len(OPTIONS)] | {"backend": backend}
        if loss.groups:
            options["group"] = loss.group(target)
        return lambda x, y: loss(x, y, params, **options), input.float(), target

    return make


def of_module(make_module):
    def make():
        module = make_module()
        input, target = logits()
        return module, input, target

    return make


class WithSecond(nn.Module):
    """A loss of the input and of something made of it."""

    def __init__(self, loss, second):
        super().__init__()
        self.loss, self.second = loss, second

    def forward(self, x, y):
        return self.loss(x, y, self.second(x))


class WithLinear(nn.Module):
    """A linear head whose loss takes the weight's norm."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x, y):
        return self.linear(x, y, logit_norm=self.linear.weight.norm())


M = mlkernels
MODULES = {
    "CrossEntropyLoss": lambda: M.CrossEntropyLoss(scale=trained(2.0)),
    "FocalLoss": lambda: M.FocalLoss(gamma=trained(2.0), weight=torch.ones(C)),
    "ModulatedCrossEntropyLoss": lambda: M.ModulatedCrossEntropyLoss(beta=trained(2.0), label_smoothing=0.1),
    "MarginLoss": lambda: M.MarginLoss(m1=1.2, m2=trained(0.2), scale=8.0, beyond_pi="none"),
    "MarginLoss with norm": lambda: WithSecond(M.MarginLoss(m1=2.0, scale=1.0), lambda x: x.norm(dim=1, keepdim=True)),
    "ArcFaceLoss": lambda: M.ArcFaceLoss(beyond_pi="easy", gradient="straight_through"),
    "CosFaceLoss": lambda: M.CosFaceLoss(margin=nn.Parameter(torch.full((C,), 0.3)), reduction="none"),
    "SphereFaceLoss": lambda: M.SphereFaceLoss(margin=2),
    "PiecewiseLoss": lambda: M.PiecewiseLoss(
        t_slope=SLOPE, t_bias=BIAS, tau_slope=SLOPE, tau_bias=BIAS, clamp="cross_entropy"
    ),
    "TwoScaleLoss": lambda: WithSecond(M.TwoScaleLoss(3.0), lambda x: torch.tensor(2.0)),
    "TwoScaleLoss fixed": lambda: WithSecond(M.TwoScaleLoss(3.0, variant="fixed"), lambda x: torch.tensor(2.0)),
    "TwoScaleLoss separation": lambda: M.TwoScaleLoss(variant="separation"),
    "TwoScaleLoss relative": lambda: WithSecond(
        M.TwoScaleLoss(3.0, parametrization="relative"), lambda x: torch.tensor(2.0)
    ),
    "MultiMarginLoss": lambda: M.MultiMarginLoss(p=2, margin=0.5, weight=torch.ones(C)),
    "CenterLoss": lambda: M.CenterLoss(num_features=C, num_classes=C),
    "CenterLoss by rate": lambda: M.CenterLoss(num_features=C, num_classes=C, rate=0.5),
    "LGMLoss": lambda: M.LGMLoss(num_features=C, num_classes=C),
    "LGMLoss diagonal": lambda: M.LGMLoss(num_features=C, num_classes=C, diagonal=True),
    "LinearLoss": lambda: M.LinearLoss(M.CrossEntropyLoss(reduction="none"), C, 9, bias=True),
    "LinearLoss normalized": lambda: M.LinearLoss(M.ArcFaceLoss(margin=trained(0.3)), C, 9, normalize=True),
    "LinearLoss TwoScaleLoss": lambda: WithLinear(M.LinearLoss(M.TwoScaleLoss(3.0), C, 9)),
    "LinearLoss PiecewiseLoss": lambda: M.LinearLoss(
        M.PiecewiseLoss(t_slope=trained([0.9, 1.1]), t_bias=BIAS, tau_slope=SLOPE, tau_bias=BIAS), C, 9, normalize=True
    ),
    "JointLoss": lambda: M.JointLoss([M.CrossEntropyLoss(), M.ArcFaceLoss()], weights=[1.0, 0.5]),
    "JointLoss trainable": lambda: M.JointLoss([M.CrossEntropyLoss(), M.ArcFaceLoss()], mode="trainable"),
    "JointLoss uncertainty": lambda: M.JointLoss([M.FocalLoss(), M.CosFaceLoss()], mode="uncertainty"),
}


def statistics():
    def function(x, y):
        loss, rows = M.softmax_loss(x, y, transform=M.Margin(m2=0.3), head=M.Truncated(0.1), return_stats=True)
        return loss + rows.logsumexp.sum() + rows.entropy.sum() + rows.confidence.mean()

    return function, *logits()


def linear_statistics():
    weight = nn.Parameter(torch.linspace(-1, 1, 9 * C).reshape(9, C).sin())

    def function(x, y):
        loss, rows = M.linear_softmax_loss(x, weight, y, scale=1 / 0.7, reduction="none", return_stats=True)
        return loss.sum() + (rows.log_prob * rows.entropy).sum() + rows.logsumexp.mean()

    return function, *logits()


def soft_targets():
    return M.cross_entropy, logits()[0], torch.full((5, C), 1 / C)


def cases(backend):
    """Every case by its name."""
    found = {str(loss): of_table(loss, index, backend) for index, loss in enumerate(LOSSES)}
    if backend is None:
        found |= {name: of_module(make) for name, make in MODULES.items()}
        transforms = {loss.structure.transform: (loss, index) for index, loss in enumerate(LOSSES)}
        found |= {f"{name} (reference)": of_table(*one, "reference") for name, one in transforms.items()}
        found |= {"statistics": statistics, "soft targets": soft_targets, "linear statistics": linear_statistics}
    return found


def first(make):
    """Compiled before anything is called; then what an eager call says."""
    function, input, target = make()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, z = input.clone().requires_grad_(), input.clone().requires_grad_()
    state = {k: v.clone() for k, v in function.state_dict().items()} if isinstance(function, nn.Module) else {}
    value = compiled(x, target)
    value.sum().backward()
    if state:
        function.load_state_dict(state)
    wanted = function(z, target)
    wanted.sum().backward()
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(x.grad, z.grad, rtol=1e-4, atol=1e-5)


def main(backend, part, parts):
    torch.set_num_threads(1)
    # Dynamo itself is warm, and imported what graphs with gradients need, so that a case takes a third of a second. Not
    # autograd: its threads, which a torch that has CUDA starts for real and for fake devices, do not survive a fork.
    importlib.import_module("torch._inductor.lowering")
    torch.compile(lambda x: x.sin().sum(), fullgraph=True, backend="aot_eager")(torch.zeros(2))
    for name, make in list(cases(backend).items())[part::parts]:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            try:
                # A fork's first to set it makes a new pool of threads. Were that autograd's own, several at once where
                # torch has CUDA, one might find none: "Invalid thread pool!", pytorch#178535.
                torch.set_num_threads(1)
                first(make)
                os._exit(0)
            except BaseException:
                print(f"== {name}:\n{traceback.format_exc()[-1500:]}", flush=True)
                os._exit(1)
        if os.waitpid(child, 0)[1]:
            print(f"FAILED {name}", flush=True)
        else:
            print(f"passed {name}", flush=True)


def test_every_module_is_there():
    classes = {n for n in M.__all__ if inspect.isclass(getattr(M, n)) and issubclass(getattr(M, n), nn.Module)}
    assert {name.split()[0] for name in MODULES} == classes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("part", range(2))
def test_first_compile(part):
    run_part(None, part, 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(M.available_backends()["triton"] is not None, reason="needs Triton")
def test_first_compile_with_triton():
    run_part("triton", 0, 1 if os.environ.get("MLKERNELS_FULL") else 8)


def run_part(backend, part, parts):
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, __file__, backend or "", str(part), str(parts)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    passed = [line for line in done.stdout.splitlines() if line.startswith("passed ")]
    assert done.returncode == 0 and "FAILED" not in done.stdout, done.stdout[-6000:] + done.stderr[-3000:]
    assert len(passed) == len(list(cases(backend))[part::parts])


if __name__ == "__main__":
    main(sys.argv[1] or None, int(sys.argv[2]), int(sys.argv[3]))
