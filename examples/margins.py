"""Learn two-dimensional embeddings with six losses, and plot them: what a margin does, to be seen.

    python examples/margins.py                                            # digits
    python examples/margins.py --data fashion-mnist --steps 1500
    python examples/margins.py --loss softmax,arcface --seeds 3

The network ends in two numbers per image; what separates them into classes is the loss's: a linear classifier (softmax,
and center beside it), one on the angle alone (SphereFace, CosFace, ArcFace), a Gaussian per class (L-GM). Prints a
table, mean ± deviation over the seeds, and writes margins.png (of seed 0, test images) and margins.json to --out.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import _common as common
import torch
import torch.nn.functional as F
from _common import plt
from torch import Tensor, nn

import mlkernels
from mlkernels import data, metrics

# In two dimensions ten classes are 36 degrees apart, so margins are small beside the published ones, and the scale is
# what makes p near 1 possible at all: the nearest other class has a cosine of .81.
SCALE = 24.0


# ---- the losses, each with its classifier ----------------------------------------------------------------------------


def circle(classes: int) -> nn.Parameter:
    """(C, 2) directions evenly around: two classes that start in the wrong order can hardly pass each other."""
    angle = torch.arange(classes) * (2 * math.pi / classes)
    return nn.Parameter(torch.stack([angle.cos(), angle.sin()], 1))


class Linear(nn.Module):
    """Cross entropy of a linear classifier; with a rate for center loss, features are drawn to their class's mean."""

    def __init__(self, classes: int, center: float = 0.0) -> None:
        super().__init__()
        self.weight = circle(classes)
        losses: list[nn.Module] = [mlkernels.CrossEntropyLoss()]
        if center:
            losses.append(mlkernels.CenterLoss(num_features=2, num_classes=classes, rate=0.5))
        self.loss = mlkernels.JointLoss(losses, weights=[1.0, center][: len(losses)], inputs=[0, 1][: len(losses)])

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        return self.loss((self.logits(features), features), target)

    def logits(self, features: Tensor) -> Tensor:
        """By which an image is classified."""
        return features @ self.weight.T

    def anchors(self) -> Tensor:
        """(C, 2): what stands for a class; here a direction."""
        return self.weight


class Angular(nn.Module):
    """A margin on the angle to a class's direction, which grows to its size while the classes are sorted out."""

    def __init__(self, classes: int, loss: nn.Module, neutral: float) -> None:
        super().__init__()
        self.weight = circle(classes)
        self.loss = loss
        self.neutral, self.full = neutral, loss.margin.item()

    def schedule(self, done: float) -> None:
        """The margin after a share of the training: in full from the middle on."""
        # A buffer that is filled: a number that changes would compile anew, where there is a compiler.
        self.loss.margin.fill_(self.neutral + min(1.0, 2 * done) * (self.full - self.neutral))

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.logits(features) / SCALE, target)

    def logits(self, features: Tensor) -> Tensor:
        return SCALE * F.normalize(features) @ F.normalize(self.weight).T

    def anchors(self) -> Tensor:
        return self.weight


class Gaussian(nn.Module):
    """A Gaussian per class, and no classifier."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.loss = mlkernels.LGMLoss(num_features=2, num_classes=classes, alpha=0.3, lambda_=1.0)

    def forward(self, features: Tensor, target: Tensor) -> Tensor:
        return self.loss(features, target)

    def logits(self, features: Tensor) -> Tensor:
        return self.loss.logits(features)

    def anchors(self) -> Tensor:
        return self.loss.means


LOSSES: dict[str, Callable[[int], Linear | Angular | Gaussian]] = {
    "softmax": Linear,
    "sphereface": lambda classes: Angular(
        classes, mlkernels.SphereFaceLoss(margin=torch.tensor(1.5), scale=SCALE), 1.0
    ),
    "cosface": lambda classes: Angular(classes, mlkernels.CosFaceLoss(margin=torch.tensor(0.1), scale=SCALE), 0.0),
    "arcface": lambda classes: Angular(classes, mlkernels.ArcFaceLoss(margin=torch.tensor(0.15), scale=SCALE), 0.0),
    "center": lambda classes: Linear(classes, center=0.1),
    "lgm": Gaussian,
}
TITLES = {
    "softmax": "softmax",
    "sphereface": "SphereFace, m = 1.5",
    "cosface": "CosFace, m = 0.1",
    "arcface": "ArcFace, m = 0.15",
    "center": "softmax + 0.1 center",
    "lgm": "L-GM, α = 0.3, λ = 1",
}


# ---- training --------------------------------------------------------------------------------------------------------


def network_for(images: Tensor) -> nn.Module:
    """Two convolutions, which shrink large images, two fully connected layers, two numbers."""
    stride = 2 if max(images.shape[2:]) > 16 else 1
    body = nn.Sequential(
        nn.Conv2d(images.shape[1], 16, 5, stride, padding=2),
        nn.PReLU(),
        nn.Conv2d(16, 32, 3, 2, padding=1),
        nn.PReLU(),
        nn.Flatten(),
    )
    width = body(images[:1]).shape[1]
    return body.extend([nn.Linear(width, 64), nn.PReLU(), nn.Linear(64, 2)])


@dataclass
class Run:
    """What one loss did with one seed."""

    loss: str
    seed: int
    accuracy: float
    #: degrees: of an image to its class's mean direction, on average; between the two nearest such directions
    within: float
    between: float
    #: the mean distance to the own class's mean over that of the classes' means to each other
    compactness: float


def spread(features: Tensor, target: Tensor, classes: int) -> tuple[float, float, float]:
    """within, between and compactness of Run."""
    member = F.one_hot(target, classes).to(features.dtype)
    count = member.sum(0).unsqueeze(1)
    directions = F.normalize(member.T @ F.normalize(features))
    own = (F.normalize(features) * directions[target]).sum(1).clamp(-1, 1).arccos()
    means = member.T @ features / count
    distance = torch.pdist(means).mean()
    return (
        math.degrees(own.mean()),
        math.degrees((directions @ directions.T).fill_diagonal_(-1).max().clamp(-1, 1).arccos()),
        float((features - means[target]).norm(dim=1).mean() / distance),
    )


def train(
    name: str, seed: int, images: data.Images, options: argparse.Namespace
) -> tuple[Run, Tensor, Linear | Angular | Gaussian]:
    """One run, the embeddings of the test images, and the loss."""
    torch.manual_seed(seed)
    network = network_for(images.train_images)
    loss = LOSSES[name](images.classes)
    # The classifier is the loss's, so it is trained with the loss's own parameters.
    optimizer = torch.optim.AdamW([*network.parameters(), *loss.parameters()], lr=options.lr, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps + 1)
    batches = common.endless(images.train_images, images.train_labels, options.batch, seed)
    for step in range(options.steps):
        batch, target = next(batches)
        if isinstance(loss, Angular):
            loss.schedule(step / options.steps)
        optimizer.zero_grad()
        value = loss(network(batch), target)
        value.backward()
        optimizer.step()
        schedule.step()
    if not math.isfinite(float(value.detach())):
        sys.exit(f"{name}: the training loss is {float(value.detach())} at the end: try a lower --lr")
    with torch.no_grad():
        features = torch.cat([network(part) for (part,) in data.batches(images.test_images, size=1000)])
        accuracy = float(metrics.accuracy(loss.logits(features), images.test_labels))
        run = Run(name, seed, accuracy, *spread(features, images.test_labels, images.classes))
    return run, features, loss


# ---- what comes out --------------------------------------------------------------------------------------------------


def plot(
    title: str, images: data.Images, found: Sequence[tuple[Run, Tensor, Linear | Angular | Gaussian]]
) -> plt.Figure:
    """A panel per loss: the test images, and what stands for their classes."""
    columns = min(3, len(found))
    rows = math.ceil(len(found) / columns)
    figure, panels = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 4.9 * rows + 0.6), layout="constrained", squeeze=False
    )
    figure.suptitle(title)
    colors = [plt.get_cmap("tab10" if images.classes <= 10 else "tab20")(k) for k in range(images.classes)]
    for axes in list(panels.flat)[len(found) :]:
        axes.remove()
    for axes, (run, features, loss) in zip(panels.flat, found, strict=False):
        anchors = loss.anchors().detach()
        # Some features lie far out; the picture is of the others.
        reach = 1.15 * float(features.abs().flatten().quantile(0.995))
        for label in range(images.classes):
            own = features[images.test_labels == label][:400]
            axes.scatter(own[:, 0], own[:, 1], s=7, color=colors[label], alpha=0.6, linewidths=0,
                         label=images.names[label])  # fmt: skip
            if isinstance(loss, Gaussian):
                axes.plot(*anchors[label], "X", color=colors[label], markeredgecolor="black", markersize=9)
            else:
                x, y = (reach * F.normalize(anchors[label], dim=0)).tolist()
                axes.plot([0, x], [0, y], color=colors[label], linewidth=1, zorder=0)
        measure = f"{run.within:.1f}° within a class, {run.between:.1f}° to the next"
        if isinstance(loss, Gaussian):
            measure = f"distances within / between classes: {run.compactness:.2f}"
        axes.set(
            title=f"{TITLES[run.loss]}: {run.accuracy:.1%}\n{measure}",
            xlim=(-reach, reach),
            ylim=(-reach, reach),
            aspect="equal",
        )
        axes.tick_params(labelsize="small")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=10, frameon=False, markerscale=3)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    return figure


def main(arguments: Sequence[str] | None = None) -> list[Run]:
    """Run the script; returns the runs."""

    def known(text: str) -> str:
        if text not in LOSSES:
            raise argparse.ArgumentTypeError(f"no loss {text!r}; there are {', '.join(LOSSES)}")
        return text

    parser = common.parser(__doc__, seeds=1, steps=600, batch=64, lr=5e-3)
    parser.add_argument("--loss", type=common.commas(known), default=",".join(LOSSES))
    options, images = common.ready(parser, arguments)
    print(f"{options.data}: {images}\n")
    columns = ("accuracy", "within", "between", "compactness")
    print(f"{'':12}" + "".join(f"{column:>18}" for column in columns))
    found = []
    for name in options.loss:
        own = [train(name, seed, images, options) for seed in range(options.seeds)]
        cells = (
            common.mean_std([getattr(run, column) for run, *_ in own], 4 if column == "accuracy" else 2)
            for column in columns
        )
        print(f"{name:12}" + "".join(f"{cell:>18}" for cell in cells), flush=True)
        found.append(own)
    title = f"{options.data}: two-dimensional embeddings of test images"
    figure = plot(title, images, [own[0] for own in found])
    figure.savefig(options.out / "margins.png", dpi=110)
    plt.close(figure)
    runs = [run for own in found for run, *_ in own]
    common.write(options.out / "margins.json", options, images, {"runs": [asdict(run) for run in runs]})
    print(f"\nwrote {options.out / 'margins.png'} and {options.out / 'margins.json'}")
    return runs


if __name__ == "__main__":
    main()
