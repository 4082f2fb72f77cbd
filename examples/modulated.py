"""Choose beta and gamma of the modulated cross entropy as its paper did, and compare with focal loss and cross entropy.

    python examples/modulated.py                                          # digits
    python examples/modulated.py --data fashion-mnist --seeds 5 --limit 12000
    python examples/modulated.py --beta 1,4,8 --gamma 0.5,2

First beta is varied at the first gamma, then gamma at the best beta, by the mean of macro-F1 and NMI on a tenth of the
training images that is held out. The test images are looked at last, and choose nothing. Prints a table, mean ±
deviation over the seeds, and writes modulated.png and modulated.json to --out.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import _common as common
import torch
from _common import plt
from torch import Tensor, nn

import mlkernels
from mlkernels import data, metrics


def network_for(images: Tensor, classes: int) -> nn.Module:
    """Two convolutions, which shrink large images, and two fully connected layers."""
    stride = 2 if max(images.shape[2:]) > 16 else 1
    body = nn.Sequential(
        nn.Conv2d(images.shape[1], 16, 5, stride, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
    )
    width = body(images[:1]).shape[1]
    return body.extend([nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, classes)])


@dataclass
class Run:
    """What one loss did with one seed."""

    loss: str
    beta: float | None
    gamma: float | None
    seed: int
    validation_f1: float
    validation_nmi: float
    test_f1: float
    test_nmi: float
    test_accuracy: float
    #: of the training images at the end: the share with p > .9, and their share of the gradient
    easy: float
    easy_weight: float


def weight_of(loss: nn.Module, logits: Tensor, target: Tensor) -> Tensor:
    """By how much a row's gradient differs from that of cross entropy, w = -dL/d(log p): dL/df_y is w (p - 1)."""
    logits = logits.double().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, target), logits)
    return gradient.norm(dim=1)


def train(name: str, loss: nn.Module, seed: int, images: data.Images, options: argparse.Namespace) -> Run:
    """One run: the weights, the images held out and the order of batches depend on the seed only."""
    torch.manual_seed(seed)
    rows = torch.randperm(len(images.train_labels))
    held_out, kept = rows.tensor_split([len(rows) // 10])
    x, y = images.train_images[kept], images.train_labels[kept]
    network = network_for(x, images.classes)
    optimizer = torch.optim.Adam(network.parameters(), lr=options.lr, betas=(0.9, 0.999), weight_decay=4e-4)
    batches = common.endless(x, y, min(options.batch, len(y)), seed)
    for _ in range(options.steps):
        batch, target = next(batches)
        optimizer.zero_grad()
        value = loss(network(batch), target)
        value.backward()
        optimizer.step()
    if not math.isfinite(float(value.detach())):
        sys.exit(f"{name}: the training loss is {float(value.detach())} at the end: try a lower --lr")
    with torch.no_grad():
        logits, test = network(images.train_images[held_out]), network(images.test_images)
        seen = network(x[:2000])
    weight, easy = weight_of(loss, seen, y[:2000]), seen.softmax(1).gather(1, y[:2000, None]).squeeze(1) > 0.9
    labels = images.train_labels[held_out]
    modulated = isinstance(loss, mlkernels.ModulatedCrossEntropyLoss)
    return Run(
        loss=name,
        beta=loss.beta if modulated else None,
        gamma=loss.gamma if modulated else None,
        seed=seed,
        validation_f1=metrics.macro_f1(logits, labels),
        validation_nmi=metrics.nmi(logits, labels),
        test_f1=metrics.macro_f1(test, images.test_labels),
        test_nmi=metrics.nmi(test, images.test_labels),
        test_accuracy=float(metrics.accuracy(test, images.test_labels)),
        easy=float(easy.double().mean()),
        easy_weight=float((weight * easy).sum() / weight.sum()),
    )


def best(runs: Sequence[Run], name: str) -> float:
    """The beta or gamma with the best F1 and NMI on the images held out, of equal ones the first."""

    def score(value: float) -> float:
        own = [run for run in runs if getattr(run, name) == value]
        return statistics.fmean(run.validation_f1 + run.validation_nmi for run in own)

    return max(dict.fromkeys(getattr(run, name) for run in runs), key=score)


def plot(title: str, runs: Sequence[Run], betas: Sequence[Run], gammas: Sequence[Run]) -> plt.Figure:
    """Scores by beta and by gamma, and the weights of a row by its probability."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    figure.suptitle(title)
    for axes, name, own in ((left, "beta", betas), (middle, "gamma", gammas)):
        values = sorted({getattr(run, name) for run in own})
        for color, part in (("C0", "f1"), ("C1", "nmi")):
            for split, style in (("validation", "--"), ("test", "-")):
                each = [[getattr(r, f"{split}_{part}") for r in own if getattr(r, name) == v] for v in values]
                axes.plot(values, [statistics.fmean(e) for e in each], style, color=color, marker="o", markersize=4,
                          label=f"{'macro-F1' if part == 'f1' else 'NMI'}, {split}")  # fmt: skip
            reference = [getattr(run, f"test_{part}") for run in runs if run.loss == "cross entropy"]
            axes.axhline(statistics.fmean(reference), color=color, alpha=0.4, linestyle=":")
        others = "gamma" if name == "beta" else "beta"
        axes.set(title=f"by {name}, {others} = {getattr(own[0], others):g} (dotted: cross entropy, test)", xlabel=name)
        axes.set_xscale("log")
        axes.set_xticks(values, [f"{value:g}" for value in values], minor=False)
        axes.minorticks_off()
    left.legend(fontsize="small", frameon=False)
    p = torch.linspace(0.001, 0.999, 400, dtype=torch.float64)
    # Two classes whose probabilities are p and 1 - p. Cross entropy's gradient has the norm sqrt(2) (1 - p).
    rows, target = torch.stack([p.log(), (-p).log1p()], 1), torch.zeros(len(p), dtype=torch.long)
    cross_entropy = weight_of(mlkernels.CrossEntropyLoss(reduction="sum"), rows, target)
    shown: dict[str, nn.Module] = {
        f"beta = {run.beta:g}, gamma = {run.gamma:g}": mlkernels.ModulatedCrossEntropyLoss(
            beta=run.beta, gamma=run.gamma, reduction="sum"
        )
        for run in (betas[0], betas[-1], next(r for r in gammas if r.gamma == best(gammas, "gamma")))
    }
    for label, loss in (shown | {"focal, gamma = 2": mlkernels.FocalLoss(gamma=2.0, reduction="sum")}).items():
        right.plot(p, weight_of(loss, rows, target) / cross_entropy, label=label)
    right.axhline(1, color="black", linestyle=":")
    right.set(title="weight of a row against cross entropy's", xlabel="p of its class")
    right.legend(fontsize="small", frameon=False)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    return figure


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    """Run the script; returns the runs."""
    parser = common.parser(__doc__, seeds=2, steps=300, batch=64, lr=1e-3)
    grid = common.commas(common.finite)
    parser.add_argument("--beta", type=grid, default="2,3,4,5,7,10", help="in the order in which the paper has them")
    parser.add_argument("--gamma", type=grid, default="3,5,10", help="beta is chosen at the first")
    options, images = common.ready(parser, arguments)
    if len(images.train_labels) < 20:
        parser.error(f"argument --limit: a tenth is held out, so at least 20 images, got {len(images.train_labels)}")
    print(f"{options.data}: {images}\n")
    runs: list[Run] = []
    columns = ("validation_f1", "validation_nmi", "test_f1", "test_nmi", "test_accuracy")
    width = max(17, *map(len, columns))
    print(f"{'':24}" + "".join(f"{column.replace('_', ' '):>{width + 1}}" for column in columns) + "  p > .9, gradient")
    with common.bar_over((2 + len(options.beta) + len(options.gamma) - 1) * options.seeds) as bar:

        def several(name: str, loss: nn.Module) -> list[Run]:
            own = []
            for seed in range(options.seeds):
                own.append(train(name, loss, seed, images, options))
                bar.update()
            cells = (common.mean_std([getattr(run, column) for run in own]) for column in columns)
            easy, weight = (statistics.fmean(getattr(run, of) for run in own) for of in ("easy", "easy_weight"))
            line = f"{name:24}" + "".join(f"{cell:>{width + 1}}" for cell in cells) + f"  {easy:6.1%}, {weight:8.1%}"
            bar.write(line, file=sys.stdout)
            runs.extend(own)
            return own

        def modulated(beta: float, gamma: float) -> list[Run]:
            loss = mlkernels.ModulatedCrossEntropyLoss(beta=beta, gamma=gamma)
            return several(f"beta = {beta:g}, gamma = {gamma:g}", loss)

        several("cross entropy", mlkernels.CrossEntropyLoss())
        several("focal, gamma = 2", mlkernels.FocalLoss(gamma=2.0))
        betas = [run for beta in options.beta for run in modulated(beta, options.gamma[0])]
        beta = best(betas, "beta")
        gammas = [run for run in betas if run.beta == beta]
        gammas += [run for gamma in options.gamma[1:] for run in modulated(beta, gamma)]
    gamma = best(gammas, "gamma")
    print(f"\nchosen on the images held out: beta = {beta:g}, gamma = {gamma:g}")
    figure = plot(f"{options.data}, {options.seeds} seeds", runs, betas, gammas)
    figure.savefig(options.out / "modulated.png", dpi=110)
    plt.close(figure)
    found = {"beta": beta, "gamma": gamma, "runs": [asdict(run) for run in runs]}
    common.write(options.out / "modulated.json", options, images, found)
    print(f"wrote {options.out / 'modulated.png'} and {options.out / 'modulated.json'}")
    return runs


if __name__ == "__main__":
    main()
