"""Train with the two-scale loss in all its variants, and compare it with one scale and with cross entropy.

    python examples/two_scale.py                                          # digits
    python examples/two_scale.py --data fashion-mnist --seeds 10          # the figures of docs/reproduction.md
    python examples/two_scale.py --eta 0.01,10,100 --steps 2000

The network has two fully connected layers without biases, so that its logits are the size R = |W1||W2| times a function
of directions, which is what the loss is made for. R1 and R2 start from R and 10 R and are trained by the same SGD;
"relative" trains them in units of R at the start, "fixed" not at all, "separation" has 1 and R_s instead.
Prints a table, mean ± deviation over the seeds, and writes two_scale.png and two_scale.json to --out.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import _common as common
import torch
from _common import plt
from torch import Tensor, nn

import mlkernels
from mlkernels import data, metrics

HIDDEN = 100
#: How far below the largest probability that of the true class may be.
CLOSE = [k / 20 for k in range(21)]


# ---- losses ----------------------------------------------------------------------------------------------------------


class OneScale(nn.Module):
    """Cross entropy of the logits as they come, with the two-scale loss's interface."""

    def forward(self, logits: Tensor, target: Tensor, network: nn.Module) -> Tensor:
        return mlkernels.cross_entropy(logits, target)

    def probabilities(self, logits: Tensor, network: nn.Module) -> Tensor:
        return logits.softmax(1)


Objective = OneScale | mlkernels.TwoScaleLoss


def methods(etas: Sequence[float]) -> dict[str, Callable[[nn.Module], Objective]]:
    """By name: the loss, made for a network at its start."""
    found: dict[str, Callable[[nn.Module], Objective]] = {
        "cross entropy": lambda network: OneScale(),
        # No confidence reaches infinity, so that every row is scaled by R1: the paper's baseline.
        "R2 := R1": lambda network: mlkernels.TwoScaleLoss(network, eta=math.inf),
    }
    for eta in etas:
        found[f"eta = {eta:g}"] = lambda network, eta=eta: mlkernels.TwoScaleLoss(network, eta=eta)
    eta = etas[0]
    found["relative"] = lambda network: mlkernels.TwoScaleLoss(network, eta=eta, parametrization="relative")
    found["fixed"] = lambda network: mlkernels.TwoScaleLoss(network, eta=eta, variant="fixed")
    found["separation"] = lambda network: mlkernels.TwoScaleLoss(eta=eta, variant="separation")
    return found


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What one method did with one seed."""

    method: str
    seed: int
    step: list[int] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)  # R1/R
    high: list[float] = field(default_factory=list)  # R2/R
    final: dict[str, float] = field(default_factory=dict)
    close_enough: list[float] = field(default_factory=list)  # by CLOSE, on the test images


def scales(loss: Objective, network: nn.Module) -> tuple[float, float]:
    """R1/R and R2/R."""
    if isinstance(loss, OneScale):
        return 1.0, 1.0
    size = mlkernels.weight_norm_product(network, detach=True).item() if loss.normalized else 1.0
    low, high = (scale.item() / size for scale in (loss.scale_low.detach(), loss.scale_high.detach()))
    return low, low if loss.eta == math.inf else high


def train(
    method: str, build: Callable[[nn.Module], Objective], seed: int, images: data.Images, options: argparse.Namespace
) -> Run:
    """One run: the weights and the order of the batches depend on the seed only."""
    torch.manual_seed(seed)
    pixels = images.train_images[0].numel()
    network = nn.Sequential(
        nn.Flatten(),
        nn.Linear(pixels, HIDDEN, bias=False),
        nn.ReLU(),
        nn.Linear(HIDDEN, images.classes, bias=False),
    )
    loss = build(network)
    # R1 and R2 are parameters of the loss, and trained as the network's.
    optimizer = torch.optim.SGD([*network.parameters(), *loss.parameters()], lr=options.lr)
    batches = common.endless(images.train_images, images.train_labels, options.batch, seed)
    run = Run(method, seed)
    for step in range(1, options.steps + 1):
        batch, target = next(batches)
        value = loss(network(batch), target, network)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step % max(1, options.steps // 20) == 0 or step == options.steps:
            with torch.no_grad():
                logits = network(images.test_images)
            run.step.append(step)
            run.test_accuracy.append(float(metrics.accuracy(logits, images.test_labels)))
            for kept, scale in zip((run.low, run.high), scales(loss, network), strict=True):
                kept.append(scale)
            if not math.isfinite(float(logits.sum())):
                sys.exit(f"{method}: the logits are {float(logits.sum())} at step {step}: try a lower --lr")
    with torch.no_grad():
        # Of the plain logits at R1: what a row's scale would be depends on its label.
        log_p = loss.probabilities(network(images.test_images), network).log()
        seen = network(images.train_images)
    run.close_enough = [float(metrics.close_enough(log_p, images.test_labels, a=a)) for a in CLOSE]
    run.final = {
        "test accuracy": run.test_accuracy[-1],
        "training accuracy": float(metrics.accuracy(seen, images.train_labels)),
        "top 2": float(metrics.top_n_accuracy(log_p, images.test_labels, n=2)),
        "close .1": float(metrics.close_enough(log_p, images.test_labels, a=0.1)),
        "close .3": float(metrics.close_enough(log_p, images.test_labels, a=0.3)),
    }
    return run


# ---- what comes out --------------------------------------------------------------------------------------------------


def plot(title: str, runs: Sequence[Run]) -> plt.Figure:
    """Accuracy and scales during training, closeness at its end."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    figure.suptitle(title)
    for index, method in enumerate(dict.fromkeys(run.method for run in runs)):
        own = [run for run in runs if run.method == method]
        color = f"C{index}"
        accuracy = 100 * torch.tensor([run.test_accuracy for run in own])
        mean, deviation = accuracy.mean(0), accuracy.std(0, correction=min(1, len(own) - 1))
        # Dotted where it would hide another: R1 and R2 hardly move in absolute terms, so that fixed is much the same.
        left.plot(own[0].step, mean, ":" if method == "fixed" else "-", color=color, label=method)
        left.fill_between(own[0].step, mean - deviation, mean + deviation, color=color, alpha=0.12, linewidth=0)
        for scale, style in (("low", "-"), ("high", "--")):
            middle.plot(own[0].step, torch.tensor([getattr(run, scale) for run in own]).mean(0), style, color=color)
        right.plot(CLOSE, 100 * torch.tensor([run.close_enough for run in own]).mean(0), color=color)
    left.set(title="test accuracy, % (± one deviation over seeds)", xlabel="step")
    middle.set(title="the row's scale: R1/R (line), R2/R (dashes)", xlabel="step", yscale="log")
    right.set(title="close enough: test images with p_y ≥ max p − a, %", xlabel="a")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside lower center", ncols=8, frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    """Run the script; returns the runs."""
    parser = common.parser(__doc__, seeds=3, steps=1000, batch=128, lr=0.1)
    parser.add_argument(
        "--eta", type=common.commas(float), default="0.01,0.1,1", help="thresholds; the variants take the first"
    )
    options, images = common.ready(parser, arguments, normalize=False)
    if any(math.isnan(eta) for eta in options.eta):
        parser.error(f"argument --eta: must be numbers, got {options.eta}")
    print(f"{options.data}: {images}\n")
    runs = []
    built = methods(options.eta)
    with common.bar_over(len(built) * options.seeds) as bar:
        for method, build in built.items():
            for seed in range(options.seeds):
                runs.append(train(method, build, seed, images, options))
                bar.update()
    columns = list(runs[0].final)
    print(f"{'':14}" + "".join(f"{column:>20}" for column in columns) + f"{'R1/R':>9}{'R2/R':>9}")
    for method in built:
        own = [run for run in runs if run.method == method]
        cells = (common.mean_std([run.final[column] for run in own]) for column in columns)
        ends = (sum(getattr(run, name)[-1] for run in own) / len(own) for name in ("low", "high"))
        print(f"{method:14}" + "".join(f"{cell:>20}" for cell in cells) + "".join(f"{end:9.3f}" for end in ends))
    figure = plot(f"{options.data}, {options.seeds} seeds", runs)
    figure.savefig(options.out / "two_scale.png", dpi=110)
    plt.close(figure)
    common.write(options.out / "two_scale.json", options, images, {"runs": [asdict(run) for run in runs]})
    print(f"\nwrote {options.out / 'two_scale.png'} and {options.out / 'two_scale.json'}")
    return runs


if __name__ == "__main__":
    main()
