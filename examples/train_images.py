"""Train a small network on real images with any loss of the family, compare losses, and plot what they do.

    python examples/train_images.py                                       # digits: cross entropy, modulated, ArcFace
    python examples/train_images.py --loss focal,two_scale --epochs 30
    python examples/train_images.py --data fashion-mnist --loss all --epochs 3
    python examples/train_images.py --data DIR                            # the four idx files of MNIST or of a like set

Prints a table per epoch and a comparison, and writes train_images.png and train_images.json to --out. Every loss starts
from the same weights and sees the same batches in the same order; a run repeats exactly with the same --seed and
--threads.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _common import finite, images_of, plt, positive
from matplotlib.ticker import LogFormatter
from torch import Tensor, nn
from tqdm import tqdm

import mlkernels
from mlkernels import data, metrics

FEATURES = 64
# The usual 64 is for thousands of classes: with ten, s = 16 gives p = 0.999 from a difference of cosines of 0.6 on.
SCALE = 16.0


# ---- the network -----------------------------------------------------------------------------------------------------


class Cosine(nn.Linear):
    """A classifier that gives cosines, which is what margins are defined on."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(features, classes, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input), F.normalize(self.weight))


CLASSIFIERS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": nn.Linear,
    "cosine": Cosine,
    "none": lambda features, classes: nn.Identity(),  # the loss itself holds what the features are compared with
}


class Network(nn.Module):
    """Convolutions that halve the image until it is at most 4 x 4, a feature vector, a classifier."""

    def __init__(self, images: Tensor, classes: int, classifier: str) -> None:
        super().__init__()
        channels, *size = images.shape[1:]
        width = 16 if max(size) > 16 else 32
        layers: list[nn.Module] = []
        while max(size) > 4 or not layers:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
            channels, width, size = width, min(2 * width, 64), [math.ceil(n / 2) for n in size]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * math.prod(size), FEATURES))
        self.classifier = CLASSIFIERS[classifier](FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, FEATURES) features, and what the classifier makes of them."""
        features = self.body(images)
        return features, self.classifier(features)


# ---- the losses ------------------------------------------------------------------------------------------------------


class Objective(nn.Module):
    """A loss of the classifier's output, and the probabilities by which the network is judged."""

    def __init__(self, loss: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.loss, self.scale = loss, scale

    def forward(self, network: Network, features: Tensor, output: Tensor, target: Tensor) -> Tensor:
        """The mean loss of a batch."""
        return self.loss(output, target)

    def log_probabilities(self, network: Network, output: Tensor) -> Tensor:
        """Without margin, transform or head of the loss: those shape the training only."""
        return torch.log_softmax(self.scale * output, 1)


class TwoScale(Objective):
    """R1 and R2 start from the network's own size, and are trained along with it."""

    loss: mlkernels.TwoScaleLoss

    def __init__(self, network: Network, backend: str | None) -> None:
        # Relative: a step of AdamW is as large as the learning rate, which R1 = R itself would not notice.
        super().__init__(mlkernels.TwoScaleLoss(network, parametrization="relative", backend=backend))

    def forward(self, network: Network, features: Tensor, output: Tensor, target: Tensor) -> Tensor:
        return self.loss(output, target, mlkernels.weight_norm_product(network))

    def log_probabilities(self, network: Network, output: Tensor) -> Tensor:
        return self.loss.probabilities(output, mlkernels.weight_norm_product(network)).log()


class WithCenters(Objective):
    """Cross entropy of the logits, and a little of the center loss of the features."""

    def __init__(self, classes: int, backend: str | None) -> None:
        losses = (
            mlkernels.CenterLoss(num_features=FEATURES, num_classes=classes),
            mlkernels.CrossEntropyLoss(backend=backend),
        )
        super().__init__(mlkernels.JointLoss(losses, weights=(0.01, 1.0), inputs=(0, 1)))

    def forward(self, network: Network, features: Tensor, output: Tensor, target: Tensor) -> Tensor:
        return self.loss((features, output), target)


class Gaussian(Objective):
    """A Gaussian per class among the features, and no classifier: the nearest mean wins."""

    loss: mlkernels.LGMLoss

    def log_probabilities(self, network: Network, output: Tensor) -> Tensor:
        return torch.log_softmax(self.loss.logits(output), 1)


class Truncated(nn.Module):
    """-log max(p, 0.01): an image that looks nothing like its label does not count. Any composition fits in so."""

    def __init__(self, backend: str | None) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        head = mlkernels.Truncated(0.01)
        return mlkernels.softmax_loss(output, target, head=head, backend=self.backend)


def piecewise(classes: int, network: Network, backend: str | None) -> Objective:
    """Tables like those that a search finds, written by hand."""
    # t: the chords of cos(theta + 0.3) over six bins: ArcFace as a table, which could be searched or trained.
    # tau: steeper below p = 0.5 and flatter above, so images that are learnt already weigh less. Its bias is 0 in the
    # lower bins: there the gradient is that of cross entropy however small p is, and training can start.
    edges = torch.linspace(-1, 1, 7)
    curve = torch.cos((torch.acos(edges) + 0.3).clamp(max=math.pi))
    slope = curve.diff() / edges.diff()
    loss = mlkernels.PiecewiseLoss(
        t_slope=slope,
        t_bias=curve[:-1] - slope * edges[:-1],
        tau_slope=torch.tensor([1.2, 1.2, 1.2, 0.8, 0.8, 0.8]),
        tau_bias=torch.tensor([0.0, 0.0, 0.0, 0.2, 0.2, 0.2]),
        scale=SCALE,
        backend=backend,
    )
    return Objective(loss, SCALE)


Build = Callable[[int, Network, "str | None"], Objective]
#: By name: the classifier that it needs; the loss, from the number of classes, the network at its start, the backend.
LOSSES: dict[str, tuple[str, Build]] = {
    "cross_entropy": ("linear", lambda c, n, b: Objective(mlkernels.CrossEntropyLoss(backend=b))),
    "focal": ("linear", lambda c, n, b: Objective(mlkernels.FocalLoss(gamma=2.0, backend=b))),
    "modulated": ("linear", lambda c, n, b: Objective(mlkernels.ModulatedCrossEntropyLoss(backend=b))),
    "arcface": ("cosine", lambda c, n, b: Objective(mlkernels.ArcFaceLoss(margin=0.5, scale=SCALE, backend=b), SCALE)),
    "cosface": ("cosine", lambda c, n, b: Objective(mlkernels.CosFaceLoss(margin=0.35, scale=SCALE, backend=b), SCALE)),
    # The published margin is 4, reached by annealing; 2 can be trained from the first step on.
    "sphereface": (
        "cosine",
        lambda c, n, b: Objective(mlkernels.SphereFaceLoss(margin=2.0, scale=SCALE, backend=b), SCALE),
    ),
    "two_scale": ("linear", lambda c, n, b: TwoScale(n, b)),
    "piecewise": ("cosine", piecewise),
    "truncated": ("linear", lambda c, n, b: Objective(Truncated(b))),
    "multi_margin": ("linear", lambda c, n, b: Objective(mlkernels.MultiMarginLoss())),
    "center": ("linear", lambda c, n, b: WithCenters(c, b)),
    "lgm": ("none", lambda c, n, b: Gaussian(mlkernels.LGMLoss(num_features=FEATURES, num_classes=c, backend=b))),
}


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What one loss did, epoch by epoch and in the end."""

    loss: str
    train_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss_share: list[float] = field(default_factory=list)
    final: dict[str, float] = field(default_factory=dict)


class Stopwatch:
    """Seconds spent in the loss: its forward, and of its backward the part before the network's."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.since = 0.0

    def start(self) -> None:
        """The loss begins, forward or backward."""
        self.since = time.perf_counter()

    def stop(self, gradient: Tensor | None = None) -> None:
        """The loss ends; as a hook it is called when the gradient of the classifier's output is there."""
        self.seconds += time.perf_counter() - self.since


def judge(network: Network, objective: Objective, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features, and log-probabilities of the classes."""
    network.eval()
    with torch.no_grad():
        parts = [network(batch) for (batch,) in data.batches(images, size=1000)]
        features, output = (torch.cat(part) for part in zip(*parts, strict=True))
        return features, objective.log_probabilities(network, output)


def train(name: str, images: data.Images, options: argparse.Namespace) -> tuple[Run, Tensor, Tensor]:
    """Train with one loss; returns also features and log-probabilities of the test images."""
    torch.manual_seed(options.seed)
    order = torch.Generator().manual_seed(options.seed)
    classifier, build = LOSSES[name]
    network = Network(images.train_images, images.classes, classifier)
    objective = build(images.classes, network, options.backend)
    # A loss with parameters of its own (R1 and R2, centers, means) is trained with the network. Decay is for weights.
    groups: list[dict[str, Any]] = [
        {"params": network.parameters()},
        {"params": objective.parameters(), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=0.01)
    # A last batch of three images would give batch norm three images' statistics: the rest waits for another epoch.
    size = min(options.batch, len(images.train_labels))
    steps = len(images.train_labels) // size
    total = options.epochs * steps
    # Linearly up over the first fifth, down by a cosine over all.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (0.2 * total)) * 0.5 * (1 + math.cos(math.pi * step / total))
    )
    run = Run(name)
    # disable=None: no bar where nobody watches.
    with tqdm(total=total, desc=f"{name:13}", unit="batch", disable=None, leave=False) as bar:
        for epoch in range(options.epochs):
            network.train()
            began, watch, sum_of_losses = time.perf_counter(), Stopwatch(), 0.0
            for batch, target in data.batches(
                images.train_images, images.train_labels, size=size, generator=order, drop_last=True
            ):
                features, output = network(batch)
                output.register_hook(watch.stop)
                watch.start()
                loss = objective(network, features, output, target)
                watch.stop()
                optimizer.zero_grad()
                watch.start()
                loss.backward()
                optimizer.step()
                schedule.step()
                sum_of_losses += loss.item()
                bar.update()
            seconds = time.perf_counter() - began
            features, log_p = judge(network, objective, images.test_images)
            run.train_loss.append(sum_of_losses / steps)
            run.test_accuracy.append(float(metrics.accuracy(log_p, images.test_labels)))
            run.seconds.append(seconds)
            run.loss_share.append(watch.seconds / seconds)
            tqdm.write(
                f"{name:13} {epoch + 1:5d} {run.train_loss[-1]:11.4f} {run.test_accuracy[-1]:9.2%} "
                f"{seconds:8.2f} {run.loss_share[-1]:8.1%}",
                file=sys.stdout,
            )
            if not math.isfinite(run.train_loss[-1]):
                sys.exit(f"{name}: the training loss is {run.train_loss[-1]} in epoch {epoch + 1}: try a lower --lr")
    labels = images.test_labels
    run.final = {
        "accuracy": float(metrics.accuracy(log_p, labels)),
        "top_3": float(metrics.top_n_accuracy(log_p, labels, n=3)),
        "close_enough_0.1": float(metrics.close_enough(log_p, labels, a=0.1)),
        "macro_f1": float(metrics.macro_f1(log_p, labels)),
        "nmi": float(metrics.nmi(log_p, labels)),
    }
    return run, features, log_p


# ---- what comes out --------------------------------------------------------------------------------------------------


def plot(path: Path, title: str, images: data.Images, results: Sequence[tuple[Run, Tensor, Tensor]]) -> None:
    """Above, the curves of all losses; below, per loss, how near features are to their own class and to others."""
    columns = min(4, max(3, len(results)))
    rows = math.ceil(len(results) / columns)
    figure = plt.figure(figsize=(4.2 * columns, 4.2 + 2.6 * rows), layout="constrained")
    figure.suptitle(title)
    above, below = figure.subfigures(2, 1, height_ratios=(4.2, 2.6 * rows))
    left, middle, right = above.subplots(1, 3)
    for index, (run, _, log_p) in enumerate(results):
        style = {"color": f"C{index % 10}", "linestyle": "-" if index < 10 else "--"}
        epochs = range(1, len(run.train_loss) + 1)
        left.plot(epochs, run.train_loss, label=run.loss, **style)
        middle.plot(epochs, [100 * (1 - accuracy) for accuracy in run.test_accuracy], **style)
        own = log_p.gather(1, images.test_labels.unsqueeze(1)).squeeze(1).exp().sort().values
        right.plot(torch.arange(1, len(own) + 1) * (100 / len(own)), own, **style)
    left.set(title="training loss (each in its own measure)", xlabel="epoch", yscale="log")
    middle.set(title="test error, %", xlabel="epoch", yscale="log")
    for setter in (middle.yaxis.set_major_formatter, middle.yaxis.set_minor_formatter):
        setter(LogFormatter())  # 2 rather than 2 x 10^0; labels between the decades only where there are few
    right.set(title="probability of the true class", xlabel="test images, %, the hardest first", xscale="log")
    right.xaxis.set_major_formatter("{x:g}")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3, which="both")
    for axes in (left, middle):
        axes.xaxis.get_major_locator().set_params(integer=True)
    above.legend(loc="outside lower center", ncols=min(len(results), 6), frameon=False)

    below.suptitle("cosine of a test image's features to the mean features of a class", fontsize="medium")
    panels = list(below.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(results) :]:
        axes.remove()
    for axes, (run, features, _) in zip(panels, results, strict=False):
        own, other = closeness(features, images.test_labels, images.classes)
        bins = torch.linspace(-1, 1, 61).tolist()
        axes.hist(own.tolist(), bins, histtype="stepfilled", color="C0", alpha=0.7, label="its own")
        axes.hist(other.tolist(), bins, histtype="stepfilled", color="C3", alpha=0.6, label="nearest other")
        axes.set(title=f"{run.loss}: {run.final['accuracy']:.2%}", xlim=(-0.25, 1), yticks=[])
    panels[0].legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def closeness(features: Tensor, target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Cosines to the mean of the own class and to the nearest other mean, seen from the mean of all."""
    features = features - features.mean(0)
    member = F.one_hot(target, classes).to(features.dtype)
    cosines = F.normalize(features) @ F.normalize(member.T @ features).T
    own = cosines.gather(1, target.unsqueeze(1)).squeeze(1)
    return own, cosines.scatter(1, target.unsqueeze(1), -1.0).max(1).values


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, data.Images]:
    """The checked options and the images, the output directory made; errors leave through argparse."""

    def losses(text: str) -> list[str]:
        names = list(LOSSES) if text == "all" else text.split(",")
        for name in names:
            if name not in LOSSES:
                raise argparse.ArgumentTypeError(f"no loss {name!r}; there are {', '.join(LOSSES)} and all")
        return list(dict.fromkeys(names))

    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--loss",
        type=losses,
        metavar="A,B,...",
        default="cross_entropy,modulated,arcface",
        help=f"{', '.join(LOSSES)}; all",
    )
    parser.add_argument(
        "--data", default="digits", help="digits, fashion-mnist, or a directory with MNIST's four idx files"
    )
    parser.add_argument("--epochs", type=positive, default=15)
    parser.add_argument("--batch", type=positive, default=64, help="images per step")
    parser.add_argument("--limit", type=positive, help="use so many training images only")
    parser.add_argument("--lr", type=finite, default=3e-3, help="highest learning rate of the schedule (AdamW)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=positive, help="by default 1 for images as small as the digits, else torch's")
    parser.add_argument(
        "--backend", choices=list(mlkernels.available_backends()), help="of the loss; by default the fastest"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "out", help="directory for plot and figures"
    )
    options = parser.parse_args(arguments)
    why = mlkernels.available_backends().get(options.backend)
    if why is not None:
        parser.error(f"argument --backend: {options.backend} cannot be used here: {why}")
    images = images_of(parser, options)
    if options.threads is None:
        # 8 x 8 pixels are too little work to share: waiting for a second core that is busy costs more than it gives.
        options.threads = 1 if images.train_images[0].numel() < 256 else torch.get_num_threads()
    return options, images


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    """Run the script; returns the runs."""
    options, images = parse(arguments)
    torch.set_num_threads(options.threads)
    print(f"{options.data}: {images}\n")
    print(f"{'loss':13} {'epoch':>5} {'train loss':>11} {'test acc.':>9} {'seconds':>8} {'in loss':>8}")
    results = [train(name, images, options) for name in options.loss]
    runs = [run for run, _, _ in results]

    print(f"\n{'loss':13} {'accuracy':>9} {'top 3':>9} {'close .1':>9} {'macro F1':>9} {'NMI':>7} {'seconds':>8}")
    for run in runs:
        accuracy, top, close, f1, nmi = run.final.values()
        print(f"{run.loss:13} {accuracy:9.2%} {top:9.2%} {close:9.2%} {f1:9.4f} {nmi:7.4f} {sum(run.seconds):8.1f}")
    title = f"{options.data}: {len(images.train_labels)} training, {len(images.test_labels)} test images"
    plot(options.out / "train_images.png", title, images, results)
    record = {
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "torch": torch.__version__,
        "images": repr(images),
        "runs": [asdict(run) for run in runs],
    }
    (options.out / "train_images.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwrote {options.out / 'train_images.png'} and {options.out / 'train_images.json'}")
    return runs


if __name__ == "__main__":
    main()
