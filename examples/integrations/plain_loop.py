"""A loss of the package in a training loop of one's own: two scales, trained along with the network; resumable.

    python examples/integrations/plain_loop.py [EPOCHS [CHECKPOINT]]

Given a checkpoint, the run goes on from it where it exists, and saves to it after every epoch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import mlkernels
from mlkernels import data, metrics


def main(epochs: int = 10, checkpoint: Path | None = None) -> float:
    """Trains on digits; returns the test accuracy."""
    torch.manual_seed(0)
    images = data.digits()
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    loss = mlkernels.TwoScaleLoss(network, parametrization="relative")
    # R1 and R2 are the loss's parameters: hand them over with the network's. Decay is for weights only.
    optimizer = torch.optim.AdamW(
        [{"params": network.parameters()}, {"params": loss.parameters(), "weight_decay": 0.0}], lr=3e-3
    )
    order = torch.Generator().manual_seed(0)
    parts = {"network": network, "loss": loss, "optimizer": optimizer}
    first = 0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        order.set_state(state["order"])
        first = state["epoch"]

    for epoch in range(first, epochs):
        total = torch.zeros(())
        for input, target in data.batches(images.train_images, images.train_labels, size=64, generator=order):
            value = loss(network(input), target, network)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            total += len(target) * value.detach()  # on the device: .item() here would wait for it in every step
        with torch.no_grad():
            # Predictions are those of the plain logits; probabilities are at R1, whatever a row was trained at.
            p = loss.probabilities(network(images.test_images), network)
        accuracy = metrics.accuracy(p, images.test_labels).item()
        close = metrics.close_enough(p.log(), images.test_labels, a=0.1).item()
        print(f"epoch {epoch + 1}: loss {total.item() / len(images.train_labels):.4f}, accuracy {accuracy:.2%}, "
              f"close enough {close:.2%}, R1 {loss.scale_low.item():.3f}, R2 {loss.scale_high.item():.3f}")  # fmt: skip
        if checkpoint is not None:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**state, "order": order.get_state(), "epoch": epoch + 1}, checkpoint)
    with torch.no_grad():
        return metrics.accuracy(network(images.test_images), images.test_labels).item()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]), *map(Path, sys.argv[2:3]))
