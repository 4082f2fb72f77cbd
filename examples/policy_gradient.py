"""Learn from clicks which of thousands of items to show: policy gradients through a linear head, logits never stored.

    python examples/policy_gradient.py
    python examples/policy_gradient.py --gradient row_weight --items 20000

A contextual bandit. A visitor and an item have attributes; the visitor clicks with a probability that a hidden matrix
gives of the two. The policy embeds both and shows one item, drawn from softmax(x·w / temperature); all it learns from
is the click on that. It climbs advantage · log_prob + entropy; the advantage is the click less the recent rate of them.
The gradient comes in two ways, which agree: through the rows' ``log_prob``, of which it could be any function (say a
clipped ratio to an older policy), and as the linear head's own loss with the advantage as ``row_weight=``. Prints how
often visitors click on what is drawn and on what the policy thinks best, its entropy, and the best item's median rank.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import mlkernels

ATTRIBUTES, TILE = 16, 2048


class Visitors:
    """Items, visitors, and the matrix by which they click."""

    def __init__(self, items: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.items = torch.randn(items, ATTRIBUTES, generator=self.generator)
        self.hidden = torch.randn(ATTRIBUTES, ATTRIBUTES, generator=self.generator) / ATTRIBUTES**0.5

    def draw(self, count: int) -> Tensor:
        """New visitors."""
        return torch.randn(count, ATTRIBUTES, generator=self.generator)

    def click_rate(self, visitor: Tensor, item: Tensor) -> Tensor:
        """The probability that each visitor clicks on the item that it is shown."""
        return torch.sigmoid(((visitor @ self.hidden) * self.items[item]).sum(1) - 9)

    def best(self, visitor: Tensor) -> Tensor:
        """The item that each visitor most likely clicks on."""
        return torch.cat([(part @ self.hidden @ self.items.T).argmax(1) for part in visitor.split(64)])


@torch.no_grad()
def sample(x: Tensor, weight: Tensor, scale: float) -> Tensor:
    """An item per row from softmax(scale · x·w): the largest logit with Gumbel noise, tile by tile."""
    value, item = x.new_full((len(x),), -math.inf), torch.zeros(len(x), dtype=torch.long)
    for start in range(0, len(weight), TILE):
        logits = scale * (x @ weight[start : start + TILE].T)
        best, at = (logits - torch.empty_like(logits).exponential_().log_()).max(1)
        item = torch.where(best > value, at + start, item)
        value = torch.maximum(value, best)
    return item


def train(gradient: str, options: argparse.Namespace) -> tuple[float, float]:
    """Prints a line now and then; unseen visitors' rates of clicks, by chance and on what is drawn at the end."""
    torch.manual_seed(options.seed)
    visitors, scale = Visitors(options.items, options.seed), 1 / options.temperature
    embed_visitor = nn.Sequential(nn.Linear(ATTRIBUTES, 64), nn.Tanh(), nn.Linear(64, options.features))
    embed_item = nn.Linear(ATTRIBUTES, options.features)
    optimizer = torch.optim.Adam([*embed_visitor.parameters(), *embed_item.parameters()], lr=options.lr)
    unseen = visitors.draw(1024)
    favourite = visitors.best(unseen)
    chance = visitors.click_rate(unseen, torch.randint(options.items, (len(unseen),))).mean().item()
    most = visitors.click_rate(unseen, favourite).mean().item()
    print(f"\nby {gradient}: {options.items} items, clicks {chance:.3f} by chance, {most:.3f} of the best items")
    print("  step  clicks: drawn   greedy  entropy  rank of best  ms/step")
    baseline, took = 0.0, 0.0
    for step in range(options.steps + 1):
        if step % max(1, options.steps // 5) == 0 or step == options.steps:
            with torch.no_grad():
                x, weight = embed_visitor(unseen), embed_item(visitors.items)
                _, rows = mlkernels.linear_softmax_loss(x, weight, favourite, scale=scale, return_stats=True)
            drawn = visitors.click_rate(unseen, sample(x, weight, scale)).mean().item()
            greedy = visitors.click_rate(unseen, rows.prediction).mean().item()
            print(
                f"{step:6d} {drawn:14.3f} {greedy:8.3f} {rows.entropy.mean():8.2f} {rows.rank.median() + 1:13d} "
                f"{1e3 * took / max(1, step):8.1f}"
            )
        if step == options.steps:
            break
        start = time.perf_counter()
        visitor = visitors.draw(options.batch)
        x, weight = embed_visitor(visitor), embed_item(visitors.items)
        shown = sample(x, weight, scale)
        reward = torch.bernoulli(visitors.click_rate(visitor, shown), generator=visitors.generator)
        advantage = reward - baseline
        baseline += 0.1 * (reward.mean().item() - baseline)
        if gradient == "log_prob":
            _, rows = mlkernels.linear_softmax_loss(x, weight, shown, scale=scale, return_stats=True)
            loss = -(advantage * rows.log_prob).mean()
        else:
            loss, rows = mlkernels.linear_softmax_loss(
                x, weight, shown, scale=scale, row_weight=advantage, return_stats=True
            )
        optimizer.zero_grad()
        (loss - options.entropy * rows.entropy.mean()).backward()
        optimizer.step()
        took += time.perf_counter() - start
    return chance, drawn


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
    """The command line; the rates of clicks, by chance and at the end, by gradient."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = ["log_prob", "row_weight"]
    parser.add_argument("--gradient", choices=ways, nargs="+", default=ways, help="default: one after the other")
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--batch", type=int, default=256, help="visitors per step")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--entropy", type=float, default=0.003, help="its weight beside the clicks")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    return {way: train(way, options) for way in options.gradient}


if __name__ == "__main__":
    main(sys.argv[1:])
