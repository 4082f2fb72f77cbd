"""Let an auxiliary loss take some of the steps, on trial (MILS), and compare with training without it.

    python examples/mils.py                                              # digits, three seeds
    python examples/mils.py --auxiliary focal --participation 0.05
    python examples/mils.py --data fashion-mnist --seeds 5               # a few minutes on one core
    python examples/mils.py --data DIR                                   # the four idx files of MNIST or of a like set

Per seed, four runs from the same weights over the same batches: the primary loss alone (cross entropy), the auxiliary
loss alone, both scheduled by MILS, and both without the decision, every auxiliary step kept. Prints the acceptance
ratio per epoch and the test errors, and writes mils.png and mils.json to --out. A run repeats exactly with the same
--seed and --threads.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from _common import finite, images_of, plt, positive
from matplotlib.ticker import LogFormatter
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from tqdm import tqdm

import mlkernels
from mlkernels import data, metrics
from mlkernels.schedule import MILS

Loss = Callable[[Tensor, Tensor], Tensor]
AUXILIARY: dict[str, Callable[[], Loss]] = {
    "multi_margin": mlkernels.MultiMarginLoss,
    "focal": mlkernels.FocalLoss,
    "modulated": mlkernels.ModulatedCrossEntropyLoss,
}
#: Which losses take part, and who decides.
METHODS = ("primary", "auxiliary", "scheduled", "undecided")


@dataclass
class Run:
    """One method with one seed, epoch by epoch."""

    method: str
    seed: int
    test_error: list[float] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)
    acceptances: list[int] = field(default_factory=list)
    seconds: float = 0.0


def network(images: Tensor, classes: int) -> nn.Sequential:
    """One hidden layer, with batch norm."""
    hidden = nn.Linear(images[0].numel(), 128, bias=False)
    return nn.Sequential(nn.Flatten(), hidden, nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, classes))


def train(method: str, seed: int, images: data.Images, options: argparse.Namespace) -> Run:
    """Train with one method."""
    torch.manual_seed(seed)
    model = network(images.train_images, images.classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, weight_decay=5e-4)
    size = min(options.batch, len(images.train_labels))
    total = options.epochs * (len(images.train_labels) // size)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [total // 2, 3 * total // 4])

    losses: dict[str, Loss] = {"primary": mlkernels.CrossEntropyLoss(), "auxiliary": AUXILIARY[options.auxiliary]()}
    mils = MILS(
        model,
        optimizer,
        primary=losses[method] if method in losses else losses["primary"],
        auxiliary=losses["auxiliary"],
        observation=(TensorDataset(images.train_images, images.train_labels), size),
        participation=options.participation if method == "scheduled" else 0.0,
        accept=options.accept,
    )
    # Without the decision there is nothing to schedule: a step with the other loss, by a coin of its own.
    unconditional = MILS(
        model, optimizer, primary=losses["auxiliary"], auxiliary=losses["auxiliary"],
        observation=(images.train_images[:1], images.train_labels[:1]), participation=0.0,
    )  # fmt: skip
    coin, order = torch.Generator().manual_seed(seed + 1000), torch.Generator().manual_seed(seed)
    run = Run(method, seed)
    with tqdm(total=total, desc=f"{method:9} {seed}", unit="batch", disable=None, leave=False) as bar:
        for _ in range(options.epochs):
            began, kept = time.perf_counter(), 0
            for batch, target in data.batches(
                images.train_images, images.train_labels, size=size, generator=order, drop_last=True
            ):
                flip = torch.rand((), generator=coin)
                if method == "undecided" and flip < options.participation:
                    unconditional.step(batch, target)
                    kept += 1
                else:
                    mils.step(batch, target)
                schedule.step()
                bar.update()
            run.seconds += time.perf_counter() - began
            epoch = mils.statistics(reset=True)
            run.attempts.append(epoch.attempts + kept)
            run.acceptances.append(epoch.acceptances + kept)
            model.eval()
            with torch.no_grad():
                logits = torch.cat([model(part) for (part,) in data.batches(images.test_images, size=1000)])
            model.train()
            run.test_error.append(1 - float(metrics.accuracy(logits, images.test_labels)))
            if not bool(logits.isfinite().all()):
                sys.exit(f"{method}: the logits are not finite after epoch {len(run.test_error)}: try a lower --lr")
    return run


# ---- what comes out --------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean and, of several, standard deviation (of the sample)."""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"


def report(runs: Sequence[Run], options: argparse.Namespace) -> str:
    """The two tables: acceptance by epochs, errors by methods."""
    scheduled = [run for run in runs if run.method == "scheduled"]
    lines = [f"{'epoch':>5} {'attempts':>10} {'accepted':>10} {'ratio':>7}   (sums over {len(scheduled)} seeds)"]
    for epoch in range(options.epochs):
        attempts = sum(run.attempts[epoch] for run in scheduled)
        kept = sum(run.acceptances[epoch] for run in scheduled)
        lines.append(f"{epoch + 1:5d} {attempts:10d} {kept:10d} {kept / attempts if attempts else math.nan:7.2f}")
    lines.append(f"\n{'method':10} {'test error, %':>16} {'less primary, points':>22} {'seconds':>9}")
    primary = {run.seed: run.test_error[-1] for run in runs if run.method == "primary"}
    for method in METHODS:
        mine = [run for run in runs if run.method == method]
        errors = [100 * run.test_error[-1] for run in mine]
        # By pairs: a seed's weights and batches make more of a difference than the method.
        differences = spread([100 * (run.test_error[-1] - primary[run.seed]) for run in mine], "+.2f")
        difference = "" if method == "primary" else differences.replace("± +", "± ")
        lines.append(
            f"{method:10} {spread(errors):>16} {difference:>22} {statistics.fmean(run.seconds for run in mine):9.1f}"
        )
    return "\n".join(lines)


def plot(path: Path, title: str, runs: Sequence[Run]) -> None:
    """Attempts and acceptances by epochs; the test errors' curves; where they end, seed by seed."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    figure.suptitle(title)
    scheduled = [run for run in runs if run.method == "scheduled"]
    epochs = range(1, len(scheduled[0].test_error) + 1)
    for name, color in (("attempts", "#f2b8a0"), ("acceptances", "C3")):
        means = [statistics.fmean(values) for values in zip(*(getattr(run, name) for run in scheduled), strict=True)]
        left.bar(epochs, means, color=color, label=name)
    left.set(title="auxiliary steps per epoch, scheduled", xlabel="epoch")
    left.margins(y=0.25)  # room for the legend above the bars
    left.legend(frameon=False, loc="upper left")
    for index, method in enumerate(METHODS):
        mine = [run for run in runs if run.method == method]
        means = [100 * statistics.fmean(values) for values in zip(*(run.test_error for run in mine), strict=True)]
        middle.plot(epochs, means, color=f"C{index}", label=method)
        last = [100 * run.test_error[-1] for run in mine]
        right.plot([index] * len(last), last, "o", color=f"C{index}", alpha=0.6)
        right.plot([index - 0.25, index + 0.25], [statistics.fmean(last)] * 2, color=f"C{index}")
    middle.set(title="test error, %, mean over seeds", xlabel="epoch", yscale="log")
    middle.legend(frameon=False)
    for setter in (middle.yaxis.set_major_formatter, middle.yaxis.set_minor_formatter):
        setter(LogFormatter())  # 12 rather than 1.2 x 10^1; labels between the decades only where there are few
    right.set(title="test error at the end, %: seeds and mean", xticks=range(len(METHODS)), xticklabels=METHODS)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3, which="both")
    for axes in (left, middle):
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, data.Images]:
    """The checked options and the images, the output directory made; errors leave through argparse."""

    def probability(text: str) -> float:
        value = float(text)
        if not 0 <= value <= 1:
            raise argparse.ArgumentTypeError(f"must be in [0, 1], got {value}")
        return value

    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--data", default="digits", help="digits, fashion-mnist, or a directory with MNIST's four idx files"
    )
    parser.add_argument("--auxiliary", choices=list(AUXILIARY), default="multi_margin")
    parser.add_argument("--participation", type=probability, default=0.2, help="probability of an attempt")
    parser.add_argument("--accept", choices=("improves", "not_worse"), default="improves")
    parser.add_argument("--seeds", type=positive, default=3, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--epochs", type=positive, default=8)
    parser.add_argument("--batch", type=positive, default=128, help="images per step, and in the observation set")
    parser.add_argument("--limit", type=positive, help="use so many training images only")
    parser.add_argument("--lr", type=finite, default=0.1, help="of SGD; divided by 10 at a half and at three quarters")
    parser.add_argument("--threads", type=positive, default=1, help="such small networks do not fill a second core")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "out", help="directory for plot and figures"
    )
    options = parser.parse_args(arguments)
    return options, images_of(parser, options)


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    """Run the script; returns the runs."""
    options, images = parse(arguments)
    torch.set_num_threads(options.threads)
    print(f"{options.data}: {images}")
    print(f"cross entropy, and {options.auxiliary} with probability {options.participation} ({options.accept})\n")
    runs = []
    for seed in range(options.seed, options.seed + options.seeds):
        for method in METHODS:
            runs.append(train(method, seed, images, options))
            run = runs[-1]
            tqdm.write(
                f"seed {seed} {method:10} test error {run.test_error[-1]:7.2%} {run.seconds:7.1f} s", file=sys.stdout
            )
    print(f"\n{report(runs, options)}")
    title = f"{options.data}: cross entropy, {options.auxiliary} on {options.participation:.0%} of the steps"
    plot(options.out / "mils.png", title, runs)
    record = {
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "torch": torch.__version__,
        "images": repr(images),
        "runs": [asdict(run) for run in runs],
    }
    (options.out / "mils.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwrote {options.out / 'mils.png'} and {options.out / 'mils.json'}")
    return runs


if __name__ == "__main__":
    main()
