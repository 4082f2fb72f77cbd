"""Search a loss while the network is trained (AM-LFS), and compare with what the same work does without learning.

    python examples/am_lfs.py                                     # digits with 0, 10 and 20 % wrong labels
    python examples/am_lfs.py --noise 20 --seeds 5 --search tau
    python examples/am_lfs.py --data fashion-mnist --seeds 3
    python examples/am_lfs.py --data DIR                          # the four idx files of MNIST or of a like set

A share of the training labels is replaced by others, drawn at random; a fifth of the training images is held out, with
right labels, for the rewards. Compared on the test images, each but the first with the work of --candidates networks:

    cross entropy        one network; the mean over as many as there are candidates, from different first weights
    its best             of those networks, after any epoch, the one that is best on the held-out images
    random, fixed        random losses, one network each; the best on the held-out images
    random, by epochs    the search with its distribution left alone: every epoch the best network goes on
    AM-LFS               the search

Writes am_lfs.json, and what was found at each noise level as am_lfs_NOISE.png, to --out. A run repeats exactly with the
same --seed and --threads.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlkernels import data
from mlkernels.search import LossSearch, Population, Record, plot

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    sys.exit(f"{error}; the examples need: pip install -e '.[demo]'")

# With ten classes s = 16 gives p = 0.999 from a difference of cosines of 0.6 on.
SCALE = 16.0


@dataclass
class Split:
    """Images as rows of pixels: with some wrong labels to train, with right ones to reward and to test."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int


@dataclass
class Result:
    """What one method did."""

    method: str
    noise: int
    seed: int
    held_out: float
    test: float
    seconds: float


class Cosine(nn.Linear):
    """A classifier that gives cosines: t is defined on [-1, 1]."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input, dim=-1), F.normalize(self.weight, dim=-1))


def network(split: Split, options: argparse.Namespace, seed: int) -> nn.Sequential:
    """Two layers, from a seed."""
    torch.manual_seed(seed)
    pixels = split.train[0].shape[1]
    return nn.Sequential(nn.Linear(pixels, options.width), nn.ReLU(), Cosine(options.width, split.classes, bias=False))


def prepare(images: data.Images, options: argparse.Namespace, noise: int, seed: int) -> Split:
    """Hold a fifth out, and replace ``noise`` % of the other labels by other classes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(images.train_labels), generator=generator)[: options.limit]
    held_out, kept = rows[: len(rows) // 5], rows[len(rows) // 5 :]
    labels = images.train_labels[kept].clone()
    wrong = torch.randperm(len(kept), generator=generator)[: round(len(kept) * noise / 100)]
    labels[wrong] = (
        labels[wrong] + torch.randint(1, images.classes, wrong.shape, generator=generator)
    ) % images.classes
    pixels = images.train_images.flatten(1)
    return Split(
        (pixels[kept], labels),
        (pixels[held_out], images.train_labels[held_out]),
        (images.test_images.flatten(1), images.test_labels),
        images.classes,
    )


def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> Tensor:
    """Of one model, or of each of a population."""
    input, target = part
    return (model(input).argmax(-1) == target).float().mean(-1)


def optimizer_of(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.01)


Train = Callable[[nn.Module, torch.optim.Optimizer, nn.Module], None]


def trainer(split: Split, options: argparse.Namespace) -> Train:
    """One epoch, of one model or of a population."""

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, loss: nn.Module) -> None:
        model.train()
        # The global generator: the search seeds it alike for every candidate of an epoch.
        for batch in torch.randperm(len(split.train[1])).split(options.batch):
            optimizer.zero_grad()
            loss(model(split.train[0][batch]), split.train[1][batch]).backward()
            optimizer.step()

    return train


# ---- the methods -----------------------------------------------------------------------------------------------------


def cross_entropy(split: Split, options: argparse.Namespace, seed: int) -> list[tuple[float, float]]:
    """Held-out and test accuracy of the mean of many networks in the end, and of the best of any epoch."""
    count = options.candidates
    models = [network(split, options, count * seed + index) for index in range(count)]
    population = Population(models[0], optimizer_of(models[0], options), count)
    with torch.no_grad():
        for stacked, *own in zip(population.parameters(), *(m.parameters() for m in models), strict=True):
            stacked.copy_(torch.stack(own))
    # Neutral tables: cross entropy of the scaled cosines.
    neutral = LossSearch(options.pieces, scale=SCALE, search="tau", lr=0.0)
    loss = neutral.loss(neutral.mu.expand(count, -1, -1))
    torch.manual_seed(seed)
    train = trainer(split, options)
    best = 0.0, 0.0
    for _ in range(options.epochs):
        train(population, population.optimizer, loss)
        population.eval()
        with torch.no_grad():
            held_out, test = accuracy(population, split.held_out), accuracy(population, split.test)
        place = int(held_out.argmax())
        best = max(best, (float(held_out[place]), float(test[place])), key=lambda found: found[0])
    return [(float(held_out.mean()), float(test.mean())), best]


def search(
    split: Split, options: argparse.Namespace, seed: int, *, lr: float, fixed: bool = False
) -> tuple[tuple[float, float], Record]:
    """Held-out and test accuracy of what the search leaves; ``fixed`` losses train throughout."""
    model = network(split, options, options.candidates * seed)
    train = trainer(split, options)

    def train_throughout(model: nn.Module, optimizer: torch.optim.Optimizer, loss: nn.Module) -> None:
        for _ in range(options.epochs):
            train(model, optimizer, loss)

    losses = LossSearch(
        options.pieces,
        options.candidates,
        lr=lr,
        generator=torch.Generator().manual_seed(seed),
        search=options.search,
        scale=SCALE,
        clamp=options.clamp,
    )
    record = losses.run(
        model,
        optimizer_of(model, options),
        train_throughout if fixed else train,
        lambda model: accuracy(model, split.held_out),
        epochs=1 if fixed else options.epochs,
        population=options.population,
    )
    model.eval()
    with torch.no_grad():
        return (float(accuracy(model, split.held_out)), float(accuracy(model, split.test))), record


METHODS = ("cross entropy", "its best", "random, fixed", "random, by epochs", "AM-LFS")


def compare(split: Split, options: argparse.Namespace, noise: int, seed: int) -> tuple[list[Result], Record]:
    """All methods on one split; the record is that of AM-LFS."""
    outcomes: list[tuple[float, float]] = []
    seconds: list[float] = []

    def timed(run: Callable[[], list[tuple[float, float]]]) -> None:
        began = time.perf_counter()
        found = run()
        outcomes.extend(found)
        seconds.extend([time.perf_counter() - began] * len(found))

    records: list[Record] = []

    def searched(lr: float, fixed: bool = False) -> list[tuple[float, float]]:
        outcome, record = search(split, options, seed, lr=lr, fixed=fixed)
        records.append(record)
        return [outcome]

    timed(lambda: cross_entropy(split, options, seed))
    timed(lambda: searched(0.0, fixed=True))
    timed(lambda: searched(0.0))
    timed(lambda: searched(options.search_lr))
    results = [
        Result(method, noise, seed, held_out, test, spent)
        for method, (held_out, test), spent in zip(METHODS, outcomes, seconds, strict=True)
    ]
    return results, records[-1]


def table(results: Sequence[Result], noises: Sequence[int]) -> str:
    """Test accuracy, mean and deviation over the seeds, a line per method."""
    lines = [f"{'test accuracy, %':20}" + "".join(f"{f'{noise} % noise':>16}" for noise in noises)]
    for method in METHODS:
        cells = []
        for noise in noises:
            found = [100 * r.test for r in results if (r.method, r.noise) == (method, noise)]
            deviation = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
            cells.append(f"{f'{statistics.mean(found):.2f}{deviation}':>16}")
        lines.append(f"{method:20}" + "".join(cells))
    return "\n".join(lines)


# ---- the command -----------------------------------------------------------------------------------------------------


def positive(kind: type) -> Callable[[str], float]:
    """A number > 0."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (math.isfinite(value) and value > 0):
            raise argparse.ArgumentTypeError(f"must be > 0, got {value}")
        return value

    parse.__name__ = kind.__name__
    return parse


def percentages(text: str) -> list[int]:
    """Whole numbers from 0 to 90, with commas."""
    values = [int(part) for part in text.split(",")]
    for value in values:
        if not 0 <= value <= 90:
            raise argparse.ArgumentTypeError(f"must be from 0 to 90, got {value}")
    return values


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, data.Images]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, fashion-mnist, or a directory of four idx files")
    parser.add_argument("--noise", type=percentages, default=[0, 10, 20], help="wrong labels, %%, with commas")
    parser.add_argument("--epochs", type=positive(int), default=20)
    parser.add_argument("--candidates", type=positive(int), default=32, help="B, at least 2")
    parser.add_argument("--population", type=positive(int), default=32, help="how many of them are trained at once")
    parser.add_argument("--pieces", type=positive(int), default=6, help="M")
    parser.add_argument("--search", choices=("both", "t", "tau"), default="both")
    parser.add_argument("--search-lr", type=positive(float), default=0.05)
    parser.add_argument(
        "--clamp", choices=("min", "cross_entropy"), default="cross_entropy", help="the loss where tau <= 0"
    )
    parser.add_argument("--limit", type=positive(int), help="training images, the held-out ones among them")
    parser.add_argument("--batch", type=positive(int), default=64)
    parser.add_argument("--lr", type=positive(float), default=0.005)
    parser.add_argument("--width", type=positive(int), default=64, help="hidden units")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--seeds", type=positive(int), default=1, help="how many")
    parser.add_argument("--threads", type=positive(int), default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", help="directory for what is written")
    options = parser.parse_args(arguments)
    if options.candidates < 2:
        parser.error(f"argument --candidates: must be >= 2, got {options.candidates}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")
    try:
        named = options.data in ("digits", "fashion-mnist")
        images = data.load(options.data) if named else data.load("mnist", options.data)
    except (OSError, ImportError, ValueError) as error:
        parser.error(f"argument --data: {error}")
    available = len(images.train_labels)
    if options.limit is None:
        # All of digits; of larger sets as much as keeps a comparison at about a minute.
        options.limit = min(available, 5000)
    if not 10 <= options.limit <= available:
        parser.error(f"argument --limit: must be from 10 to {available}, got {options.limit}")
    return options, images


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Run the script; returns the results."""
    options, images = parse(arguments)
    torch.set_num_threads(options.threads)
    print(f"{options.data}: {images}, of which {options.limit} to train and to hold out\n")
    print(f"{'noise':>5} {'seed':>4}  {'method':18} {'held out':>9} {'test':>8} {'seconds':>8}")
    results: list[Result] = []
    records: dict[str, dict[int, object]] = {}
    written = []
    for noise in options.noise:
        for seed in range(options.seed, options.seed + options.seeds):
            found, record = compare(prepare(images, options, noise, seed), options, noise, seed)
            for result in found:
                print(
                    f"{noise:4} % {seed:4}  {result.method:18} {result.held_out:9.2%} {result.test:8.2%} "
                    f"{result.seconds:8.1f}"
                )
            results += found
            records.setdefault(str(noise), {})[seed] = json.loads(record.to_json())
            if seed == options.seed:
                written.append(options.out / f"am_lfs_{noise}.png")
                plot(record, written[-1])
    print(f"\n{table(results, options.noise)}")
    content = {
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "torch": torch.__version__,
        "images": repr(images),
        "results": [asdict(result) for result in results],
        "records": records,
    }
    written.append(options.out / "am_lfs.json")
    written[-1].write_text(json.dumps(content) + "\n")
    print("\nwrote " + ", ".join(map(str, written)))
    return results


if __name__ == "__main__":
    main()
