"""What the examples share: options, data, tables, records."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlkernels import data

try:
    import matplotlib
    import sklearn  # noqa: F401  # the digits, F1 and NMI
    from tqdm import tqdm
except ImportError as error:
    sys.exit(f"{error}; the examples need: pip install -e '.[demo]'")

matplotlib.use("Agg")  # there may be no display
import matplotlib.pyplot as plt

__all__ = [
    "bar_over", "commas", "endless", "finite", "images_of", "mean_std", "parser", "plt", "positive", "ready", "write",
]  # fmt: skip


def finite(text: str) -> float:
    """A number > 0 and < infinity."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be > 0, got {value}")
    return value


def positive(text: str) -> int:
    """An integer >= 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {value}")
    return value


def images_of(made: argparse.ArgumentParser, options: argparse.Namespace, *, normalize: bool = True) -> data.Images:
    """The images of --data, those to train on cut to --limit; and --out made. Errors leave through argparse.

    Images have mean 0 and deviation 1; or, not normalised, values in [0, 1].
    """
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        made.error(f"argument --out: {error}")
    name = options.data
    try:
        images = (data.load if name in ("digits", "fashion-mnist") else data.mnist)(name, normalize=normalize)
    except (OSError, ImportError, ValueError) as error:
        made.error(f"argument --data: {error}")
    if not normalize:
        largest = images.train_images.max()
        images = replace(images, train_images=images.train_images / largest, test_images=images.test_images / largest)
    if options.limit is not None and options.limit < len(images.train_labels):
        rows = torch.randperm(len(images.train_labels), generator=torch.Generator().manual_seed(0))[: options.limit]
        images = replace(images, train_images=images.train_images[rows], train_labels=images.train_labels[rows])
    return images


def commas(of: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Several of them, A,B,...; argparse names the option where one is wrong."""

    def several(text: str) -> list[Any]:
        return [of(part) for part in text.split(",")]

    several.__name__ = of.__name__
    return several


def parser(doc: str | None, *, seeds: int, steps: int, batch: int, lr: float) -> argparse.ArgumentParser:
    """A parser with the options that all of these examples have."""
    made = argparse.ArgumentParser(
        description=(doc or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument(
        "--data", default="digits", help="digits, fashion-mnist, or a directory with MNIST's four idx files"
    )
    made.add_argument("--seeds", type=positive, default=seeds, help="runs per method, with seeds 0, 1, ...")
    made.add_argument("--steps", type=positive, default=steps, help="of the optimizer, per run")
    made.add_argument("--batch", type=positive, default=batch, help="images per step")
    made.add_argument("--lr", type=finite, default=lr, help="learning rate")
    made.add_argument("--limit", type=positive, help="use so many training images only")
    made.add_argument("--threads", type=positive, default=1, help="of torch; networks this small gain nothing by more")
    made.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="directory for what is written")
    return made


def ready(
    made: argparse.ArgumentParser, arguments: Sequence[str] | None, *, normalize: bool = True
) -> tuple[argparse.Namespace, data.Images]:
    """The checked options and the images, as ``images_of`` has them."""
    options = made.parse_args(arguments)
    images = images_of(made, options, normalize=normalize)
    options.batch = min(options.batch, len(images.train_labels))
    torch.set_num_threads(options.threads)
    return options, images


def endless(images: Tensor, labels: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Full batches in one shuffled pass after another."""
    order = torch.Generator().manual_seed(seed)
    while True:
        yield from data.batches(images, labels, size=size, generator=order, drop_last=True)


def bar_over(total: int) -> Any:
    """A progress bar, where somebody watches."""
    return tqdm(total=total, unit="step", disable=None, leave=False)


def mean_std(values: Sequence[float], digits: int = 4) -> str:
    """Mean ± sample standard deviation; of one value that value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def write(path: Path, options: argparse.Namespace, images: data.Images, found: Mapping[str, Any]) -> None:
    """A record of options and results."""
    record = {
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "torch": torch.__version__,
        "images": repr(images),
        **found,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
