"""Runs the cases and keeps what came out."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mlkernels
from mlkernels.backends import choose, native

from .measure import Step, Timing, cpu_clock, others_busy, stolen, take_turns
from .peers import Inputs, LossFunction, disagreement, losses, make_inputs
from .shapes import Case, is_compiled

PEERS = ["ours", "eager", "compile"]
FLOORS = ["copy", "clone", "F.cross_entropy"]  # of a case, not of a loss
# Peers must compute the same loss. In bfloat16 they round every intermediate, which ours does not.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02, "float64": 1e-6}


class Key(NamedTuple):
    """One measured thing; ``loss`` is "-" for what belongs to the case."""

    case: Case
    loss: str
    peer: str


class Run(NamedTuple):
    """Everything of one run."""

    header: dict[str, Any]
    timings: dict[Key, Timing]
    disagreements: dict[Key, float]
    others: list[float]  # CPUs that other programs kept busy, by case
    stolen: list[float]  # CPUs that the hypervisor took, by case

    @property
    def others_busy(self) -> float:
        return max(self.others, default=0.0)

    def caveats(self) -> list[str]:
        """Why these numbers must not be published, if so."""
        found = []
        if self.header["backend"] == "reference":
            found.append("This is the reference backend, not a kernel: `python -m mlkernels` says why.")
        spare = max(0, (self.header["cpus"] or 1) - self.header["threads"])
        if self.others_busy > spare + 0.1:
            found.append(
                f"Other programs kept {self.others_busy:.1f} CPUs busy meanwhile: do not publish these numbers."
            )
        return found

    def cases(self) -> list[Case]:
        return list(dict.fromkeys(key.case for key in self.timings))

    def losses(self, case: Case) -> list[str]:
        return list(dict.fromkeys(key.loss for key in self.timings if key.case == case and key.loss != "-"))

    def median(self, case: Case, loss: str, peer: str) -> float | None:
        """Seconds, or None where this was not measured."""
        timing = self.timings.get(Key(case, "-" if peer in FLOORS else loss, peer))
        if timing is None and (loss, peer) == ("cross_entropy", "eager"):
            return self.median(case, loss, "F.cross_entropy")
        return None if timing is None else timing.median

    def ratio(self, case: Case, loss: str, peer: str) -> float | None:
        """How many times as long as ours the peer takes."""
        ours, other = self.median(case, loss, "ours"), self.median(case, loss, peer)
        return other / ours if ours and other else None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def device_name(device: torch.device) -> str:
    """What the machine calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe(device: torch.device) -> dict[str, Any]:
    """Where and with what a run was made."""
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "backend": choose(device, None),
        "isa": native.cpu_isa(),
        "backends": mlkernels.available_backends(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain")),
        "versions": {
            "mlkernels": mlkernels.__version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "python": platform.python_version(),
        },
        "system": platform.platform(terse=True),
    }


def _step(function: LossFunction, input: Tensor, target: Tensor) -> Step:
    def step() -> None:
        input.grad = None  # before, not after: the memory of the last gradient is part of a training step
        function(input, target).backward()

    return step


def _candidates(case: Case, inputs: Inputs, names: Sequence[str], peers: Sequence[str]) -> dict[Key, LossFunction]:
    found: dict[Key, LossFunction] = {}
    for name, loss in losses(inputs.logits.device).items():
        if name not in names:
            continue
        if "ours" in peers:
            found[Key(case, name, "ours")] = loss.ours
        if "eager" in peers and loss.eager is not F.cross_entropy:  # that one is measured for every case
            found[Key(case, name, "eager")] = loss.eager
        if "compile" in peers and is_compiled(case, name):
            found[Key(case, name, "compile")] = torch.compile(loss.eager, fullgraph=True, dynamic=False)
    return found


def measure(
    cases: Sequence[Case],
    names: Sequence[str],
    peers: Sequence[str],
    device: torch.device,
    patience: float,
    say: Callable[[str], None],
) -> Run:
    """Measures every case; ``patience`` scales the time that each may take."""
    run = Run(describe(device), {}, {}, [], [])
    for case in cases:
        say(f"{case}: compiling and checking")
        torch._dynamo.reset()
        inputs = make_inputs(case, device)
        catalogue = losses(device)
        steps: dict[Key, Step] = {}
        for key, function in _candidates(case, inputs, names, peers).items():
            input = inputs.cosines if catalogue[key.loss].cosines else inputs.logits
            if key.peer != "ours":
                try:
                    apart = disagreement(catalogue[key.loss].ours, function, input, inputs.target)
                except Exception as error:
                    if key.peer != "compile":
                        raise
                    # No compiler, or one that does not know this torch: the other peers are still worth their time.
                    say(f"  {key.loss}: torch.compile failed: {str(error).splitlines()[0]}")
                    continue
                run.disagreements[key] = apart
                if not apart <= TOLERANCE[case.dtype]:
                    say(f"  WARNING: {key.loss} of {key.peer} is not ours: {apart:.1e} apart")
            steps[key] = _step(function, input, inputs.target)
        logits = inputs.logits.detach()
        steps[Key(case, "-", "copy")] = functools.partial(inputs.buffer.copy_, logits)
        steps[Key(case, "-", "clone")] = logits.clone
        steps[Key(case, "-", "F.cross_entropy")] = _step(F.cross_entropy, inputs.logits, inputs.target)
        seconds = case.seconds * patience
        say(f"{case}: {len(steps)} candidates take turns for {seconds:.0f} s")
        named = {"\t".join(map(str, key)): step for key, step in steps.items()}
        begin = cpu_clock()
        timings = take_turns(named, seconds, device)
        end = cpu_clock()
        run.others.append(others_busy(begin, end))
        run.stolen.append(stolen(begin, end))
        run.timings.update(zip(steps, timings.values(), strict=True))
    return run
