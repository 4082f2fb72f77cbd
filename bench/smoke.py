"""``python -m bench.smoke``: the first thing to run on a GPU that nobody knows, step by step, each against float64.

Every loss and mode on problems so small that they take no time, one for each way that the kernels have to a row;
linear heads cut in every way. A step that fails or is wrong is named, with the command that repeats it alone and what
its error usually means; where it broke the device nothing can run after it, and the rest is left.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mlkernels.ops import multi_copy_

from . import smoke_linear
from .ahead import SECONDS, compile_ahead, specialised
from .cases import LOSSES, MODES, Problem, make_inputs
from .measure import first_line
from .options import backends_of, device_of, is_gpu, names_of, parser_of
from .peers import evaluated, losses, ours, wrong
from .report import device_name

LOSSES, MODES = LOSSES[:6], MODES[:3]  # each way through the kernels; graphs are for measuring

# Many rows at a time; one in a block, odd; one that fills a block; one across a cluster; streamed; classes apart; rows
# that are side by side and lie odd in half precision.
TINY = {
    "short": Problem((33, 100), "bfloat16"),
    "odd": Problem((7, 1025), "bfloat16"),
    "block": Problem((3, 40000), "bfloat16"),
    "cluster": Problem((2, 200000), "float32"),
    "streamed": Problem((1, 2**22 + 1), "bfloat16"),
    "apart": Problem((2, 19, 5, 7), "float32"),
    "apart16": Problem((4, 19, 5, 7), "bfloat16"),
}
#: Relative errors (of norms) of losses and gradients; gradients in bfloat16 are rounded to 8 bits.
LOSS_ERROR, GRADIENT_ERROR = 1e-4, {"float32": 1e-3, "bfloat16": 6e-3}

#: What an error usually means, by a pattern in its words.
ADVICE = {
    r"no kernel image|invalid device function|unsupported toolchain|provided PTX": "there is no code for this GPU, or "
    "its driver is older than nvcc: build with MLKERNELS_CUDA_ARCHS as `python -m mlkernels` says, or an older nvcc",
    r"misaligned|illegal memory access|unspecified launch failure": "an access that memory does not allow: repeat it "
    "under `PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck`, which names kernel and address",
    r"out of resource|too many resources|shared memory": "a launch wants more than a multiprocessor has: smaller tiles "
    "in mlkernels/backends/triton/sizes.json, or another choice in csrc/cuda/launch.h",
    r"undefined symbol|cannot open shared object|does not load": "the library was built against another torch or "
    "toolkit: `python -m mlkernels` says what is missing; build it anew",
    r"out of memory": "the GPU is not empty: nvidia-smi shows who else is there",
    r"CompilationError|PassManager|ptxas": "this Triton does not compile what others do: run "
    "tests/test_compile_targets.py under its version",
    r"^wrong": "a kernel that computes something else: `compute-sanitizer --tool racecheck` tells whether it races; "
    "if not, the emulator (tools/vgpu) and tests/test_cuda.py or test_triton.py are where to go on",
}


def advice(error: str) -> str | None:
    """What an error usually means."""
    return next((words for pattern, words in ADVICE.items() if re.search(pattern, error, re.IGNORECASE)), None)


def results(function: Callable[..., Tensor], mode: str, input: Tensor, target: Tensor, up: Tensor) -> list[Tensor]:
    """The loss, and its gradient where the mode makes one; the upstream gradient is never 1."""
    if mode == "forward":
        with torch.no_grad():
            return [function(input, target)]
    reduction, upstream = ("mean", 0.75) if mode == "step" else ("none", up)
    return [*evaluated(functools.partial(function, reduction=reduction), [input], target, upstream=upstream)]


def copies(device: torch.device) -> str | None:
    """More tensors than a launch takes, of odd sizes, the two ends aligned alike, to 4 bytes, and not at all."""
    for given, shift in ((None, 0), (True, 1), (False, 4)):
        sizes = [k * k % 4099 for k in range(1200)]
        total = sum(sizes)
        to = torch.zeros(total, dtype=torch.uint8, device=device)
        source = torch.arange(total + shift, device=device).remainder_(251).to(torch.uint8)[shift:]
        flag = None if given is None else torch.tensor(given, device=device)
        multi_copy_(to.split(sizes), source.split(sizes), flag)
        if not torch.equal(to, torch.zeros_like(to) if given is False else source):
            return f"wrong copies: flag {given}, shifted by {shift} bytes"
    return None


class Broken(Exception):
    """Nothing can run on the device any more."""


class Account:
    """How many steps ran, and how many of them failed; each of these is said."""

    def __init__(self, device: torch.device, say: Callable[[str], None]):
        self.device, self.say = device, say
        self.ran = self.failed = 0

    def attempt(self, what: str, options: str | None, step: Callable[[], str | None]) -> None:
        """One step, which says what is wrong; the options repeat it alone."""
        self.ran += 1
        try:
            error = step()
        except Exception as raised:
            error = first_line(raised)
        if error is not None:
            self.failed += 1
            self.say(f"FAILED {what}: {error}")
            if self.failed == 1 and (words := advice(error)) is not None:
                self.say(f"    usually {words}")
            if options is not None:
                self.say(f"    alone: CUDA_LAUNCH_BLOCKING=1 python -m bench.smoke {options}")
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except RuntimeError as raised:
            self.failed = max(1, self.failed)  # an error that comes late is one all the same
            late = first_line(raised)
            self.say(f"the device is broken ({late}), nothing can run after that step; the rest is left")
            raise Broken from raised

    def losses(self, problem: str, name: str, backends: Sequence[str], modes: Sequence[str]) -> None:
        """One loss on one problem."""
        host = torch.device("cpu")
        one = make_inputs(TINY[problem], losses(host)[name].cosines, self.device)
        (input,) = one.leaves
        exact = input.detach().cpu().double().requires_grad_()
        reference = ours(host, "reference")[name]
        for mode in modes:
            wanted = results(reference, mode, exact, one.target.cpu(), one.upstream.cpu())
            for by in backends:

                def run(by: str = by, mode: str = mode, wanted: Sequence[Tensor] = wanted) -> str | None:
                    found = results(ours(self.device, by)[name], mode, input, one.target, one.upstream)
                    bounds = (LOSS_ERROR, GRADIENT_ERROR[TINY[problem].dtype])[: len(found)]
                    return wrong(("loss", "gradient")[: len(found)], found, wanted, bounds)

                options = f"--backends {by} --problems {problem} --losses {name} --modes {mode}"
                self.attempt(f"{by} {problem} ({TINY[problem]}) {name} {mode}", options, run)


def smoke(
    device: torch.device,
    backends: Sequence[str],
    problems: Sequence[str],
    names: Sequence[str],
    modes: Sequence[str],
    say: Callable[[str], None],
    linear: Sequence[str] = (),
) -> tuple[int, int]:
    """How many steps ran, and how many of them failed; each is said."""
    account = Account(device, say)
    try:
        for problem, name in itertools.product(problems, names):
            account.losses(problem, name, backends, modes)
        for name, by in itertools.product(linear, backends):
            if by in smoke_linear.SERVED:
                what = f"{by} linear head {name} ({smoke_linear.ROWS}x{smoke_linear.WIDTH}x{smoke_linear.CLASSES})"
                check = functools.partial(smoke_linear.check, by, name, device)
                account.attempt(what, f"--backends {by} --linear {name}", check)
        if problems:
            account.attempt("multi_copy_", None, functools.partial(copies, device))
    except Broken:
        pass
    return account.ran, account.failed


def main(given: list[str] | None = None) -> int:
    """Runs and says; the exit status."""
    parser = parser_of("bench.smoke", "Every loss on tiny problems against float64.", MODES)
    parser.add_argument("--problems", type=names_of(list(TINY)), help=",".join(TINY))
    linear = list(smoke_linear.STEPS)
    parser.add_argument("--linear", type=names_of(linear), help=f"these alone, of loss-strategy-dtype: {linear[0]}...")
    options = parser.parse_args(given)
    # Whoever asks for some steps has no others.
    if options.linear is None:
        options.linear = linear if options.problems is options.losses is options.modes is None else []
        options.problems = options.problems or list(TINY)
    else:
        options.problems = options.problems or []
    device = device_of(options, "bench.smoke")
    if device is None:
        return 1
    backends, missing = backends_of(options, device)
    for name, why in missing.items():
        print(f"bench.smoke: no backend {name!r}: {why}", file=sys.stderr)
        if (words := advice(why)) is not None:
            print(f"    usually {words}", file=sys.stderr)
    names, modes = options.losses or LOSSES, options.modes or MODES
    if "triton" in backends and is_gpu(device):
        work = specialised([TINY[name] for name in options.problems], names, device.type, modes)
        work += [functools.partial(smoke_linear.check, "triton", name, device) for name in options.linear]
        compile_ahead(work, SECONDS, print)
    if options.compile:
        return 0
    ran, failed = smoke(device, backends, options.problems, names, modes, print, options.linear)
    said = f"{failed} of {ran} steps failed" if failed else f"{ran} steps are right"
    print(f"smoke: {said} on {device_name(device)} ({', '.join(backends) or 'no backend'})")
    return 1 if failed or missing or not backends else 0


if __name__ == "__main__":
    sys.exit(main())
