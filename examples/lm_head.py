"""Train a small language model on Python's standard library, its softmax over thousands of words by a linear head.

    python examples/lm_head.py
    python examples/lm_head.py --words 32000 --width 128 --steps 1000 --threads 2

Text is cut into words, spaces and signs; the most frequent are tokens, all others are spelled in bytes, so that nothing
is lost. A GRU reads the tokens, and the embedding's weight is the classifier's. Each loss trains one model on the same
batches: cross entropy, focal, and cross entropy with a z-loss, which holds log Z = logsumexp near 0. All are scored on
every tenth file, held out: perplexity, bits per byte of text, mean |log Z|; beside them what the tokens' frequencies
alone score. At the end stand a step's time and, on Linux, its peak memory, with the linear head and with whole logits.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import re
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

import mlkernels

LOSSES = {
    "cross entropy": mlkernels.CrossEntropyLoss(),
    "focal": mlkernels.FocalLoss(gamma=1.0),
    "z-loss": mlkernels.CrossEntropyLoss(z_loss=1e-2),
}


def tokens_of(paths: Sequence[Path], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens to train on, held-out ones, and how many bytes each kind of token stands for."""
    texts = [re.findall(rb"[A-Za-z_]+|\n *| +|[^A-Za-z_]", path.read_bytes()) for path in paths]
    split = [[word for i, text in enumerate(texts) if (i % 10 == 0) == held for word in text] for held in (False, True)]
    frequent = Counter(word for word in split[0] if len(word) > 1).most_common(count - 256)
    number = {word: [256 + i] for i, (word, _) in enumerate(frequent)}
    train, held_out = (torch.tensor([token for word in words for token in number.get(word, word)]) for words in split)
    return train, held_out, torch.tensor([1.0] * 256 + [len(word) for word in number])


class LanguageModel(nn.Module):
    """A GRU over embedded tokens; the classifier's weight is the embedding's."""

    def __init__(self, words: int, width: int, loss: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.body = nn.GRU(width, width, batch_first=True)
        self.classifier = mlkernels.LinearLoss(loss, width, words, weight=self.embedding.weight)

    def forward(self, tokens: Tensor, **per_call: bool) -> Tensor | tuple[Tensor, mlkernels.RowStats]:
        """The loss of each of (B, T) tokens, but for the first, by those before it."""
        return self.classifier(self.body(self.embedding(tokens[:, :-1]))[0], tokens[:, 1:], **per_call)


def train(model: LanguageModel, tokens: Tensor, options: argparse.Namespace) -> None:
    """Pieces of the text at random, and a learning rate that falls to 0."""
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    for step in range(options.steps):
        at = torch.randint(len(tokens) - options.length, (options.batch, 1)) + torch.arange(options.length + 1)
        optimizer.param_groups[0]["lr"] = options.lr * (1 - step / options.steps)
        optimizer.zero_grad()
        model(tokens[at]).backward()
        optimizer.step()


def kilobytes(name: str) -> int:
    """What Linux says of this process's memory."""
    return int(re.findall(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[0])


def measured(step: Callable[[], object]) -> tuple[float, float]:
    """Milliseconds of a step, and the MB that it takes at most; NaN where the system does not say."""

    step()
    start = time.perf_counter()
    step()
    took = 1e3 * (time.perf_counter() - start)
    if not sys.platform.startswith("linux"):
        return took, math.nan
    mlkernels.empty_cache()
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or what earlier steps have left in the heap would count for nothing
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = kilobytes("VmRSS")
    step()
    return took, (kilobytes("VmHWM") - before) / 1024


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
    """The command line; perplexity and mean |log Z| by loss, milliseconds and MB of a step by kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"words": 8192, "width": 64, "steps": 150, "batch": 16, "length": 32, "lr": 3e-2, "threads": 1}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default: {value}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    tokens, held_out, sizes = tokens_of(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")), options.words)
    test, words = held_out[: 128 * 128].view(-1, 128), len(sizes)
    per_byte = 1 / (math.log(2) * sizes[test[:, 1:]].mean().item())
    frequency = torch.bincount(tokens, minlength=words).double().add(1).log()
    nats = (frequency.logsumexp(0) - frequency[test[:, 1:]]).mean().item()
    found = {"frequencies": (math.exp(nats), math.nan)}
    print(f"{len(tokens)} tokens of {words} kinds\n{'':14} perplexity  bits/byte  |log Z|")
    print(f"{'frequencies':14} {math.exp(nats):10.1f} {nats * per_byte:10.3f}")
    for name, loss in LOSSES.items():
        torch.manual_seed(0)
        model = LanguageModel(words, options.width, loss)
        train(model, tokens, options)
        with torch.no_grad():
            _, rows = model(test, return_stats=True)
        nats, log_z = -rows.log_prob.mean().item(), rows.logsumexp.abs().mean().item()
        print(f"{name:14} {math.exp(nats):10.1f} {nats * per_byte:10.3f} {log_z:8.2f}")
        found[name] = math.exp(nats), log_z
    x, y, weight = torch.randn(4096, options.width, requires_grad=True), tokens[:4096], model.classifier.weight
    print(f"\n4096 tokens, whose logits are {4096 * words * 4 / 2**20:.0f} MB\n{'':14}    ms  MB more")
    for name, step in {
        "linear head": lambda: mlkernels.linear_cross_entropy(x, weight, y).backward(),
        "whole logits": lambda: nn.functional.cross_entropy(x @ weight.T, y).backward(),
    }.items():
        found[name] = measured(step)
        print(f"{name:14} {found[name][0]:5.0f} {found[name][1]:8.1f}")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
