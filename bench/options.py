"""What the commands of the benchmark share: options, and the backends that are there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

import mlkernels
from mlkernels.backends import choose

from .cases import LOSSES, MODES

ON_GPU = ("triton", "cuda")


def names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An option that is a list of some of these, by comma."""

    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return text.split(",")

    return parse


def parser_of(module: str, description: str, modes: Sequence[str] = MODES) -> argparse.ArgumentParser:
    """A parser with what all have."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--device", type=torch.device, help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--backends", type=names_of([*ON_GPU, "cpu", "reference"]), help="default: the kernels that are there"
    )
    parser.add_argument("--losses", type=names_of(LOSSES), help=",".join(LOSSES))
    parser.add_argument("--modes", type=names_of(modes), help=",".join(modes))
    parser.add_argument("--compile", action="store_true", help="on a GPU: fills Triton's cache for this, no more")
    return parser


def gpu() -> torch.device | None:
    """The current one, if there is one."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def is_gpu(device: torch.device) -> bool:
    """Whether the GPU's problems and backends are meant."""
    return device.type == "cuda"


def device_of(options: argparse.Namespace, module: str) -> torch.device | None:
    """What was asked for, or the best there is; None, with a word, where it is not there."""
    asked = options.device
    if asked is not None and asked.type != "cuda":
        return asked
    if (found := gpu()) is None and asked is not None:
        print(f"{module}: no GPU here (torch.cuda.is_available() is False)", file=sys.stderr)
        return None
    return (asked if asked is not None and asked.index is not None else found) or torch.device("cpu")


def usable(device: torch.device) -> list[str]:
    """Our kernels that run there; the reference where there are none."""
    if not is_gpu(device):
        return [choose(device, None)]
    available = mlkernels.available_backends()
    return [name for name in ON_GPU if available[name] is None]


def backends_of(options: argparse.Namespace, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Those to measure, and of those that were asked for and are not there, why not."""
    here = usable(device)
    if options.backends is None:
        return here, {}
    available = mlkernels.available_backends()
    missing = {}
    for name in options.backends:
        if name not in here and (name in ON_GPU or available[name] is not None):
            missing[name] = available[name] or f"not usable on {device}"
    return [name for name in options.backends if name not in missing], missing
