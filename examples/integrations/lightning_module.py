"""Losses of the package in Lightning: a margin on cosines with a trained scale, and center loss beside it.

    pip install -e '.[integrations,metrics]'
    python examples/integrations/lightning_module.py [EPOCHS]

Losses are modules. As attributes of the LightningModule their parameters and buffers move to its device, are in
``self.parameters()`` and so in the optimizer, and are in its checkpoints.
"""

from __future__ import annotations

import sys

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset

import mlkernels
from mlkernels import data, metrics


class Classifier(lightning.LightningModule):
    """Features, cosines to the classes' directions, and a joint loss of both."""

    def __init__(self, features: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, features))
        self.directions = nn.Parameter(torch.randn(classes, features))
        margin = mlkernels.CosFaceLoss(margin=0.2, scale=nn.Parameter(torch.tensor(16.0)))
        center = mlkernels.CenterLoss(num_features=features, num_classes=classes, rate=0.5)
        self.loss = mlkernels.JointLoss([margin, center], weights=[1.0, 0.01], inputs=[0, 1])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(images)
        return normalize(features) @ normalize(self.directions).T, features

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, target = batch
        loss = self.loss(self(images), target)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, target = batch
        cosines, _ = self(images)
        self.log("accuracy", metrics.accuracy(cosines, target), batch_size=len(target))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(epochs: int = 10, **trainer: object) -> tuple[Classifier, float]:
    """Trains on digits; returns the module and the test accuracy."""
    lightning.seed_everything(0, verbose=False)
    images = data.digits()
    train = DataLoader(TensorDataset(images.train_images, images.train_labels), batch_size=64, shuffle=True)
    test = DataLoader(TensorDataset(images.test_images, images.test_labels), batch_size=450)
    module = Classifier()
    options: dict[str, object] = {"accelerator": "auto", "devices": 1, "logger": False, "enable_checkpointing": False}
    run = lightning.Trainer(max_epochs=epochs, **(options | trainer))
    run.fit(module, train, test)
    (found,) = run.validate(module, test, verbose=False)
    print(f"accuracy {found['accuracy']:.2%}, scale {module.loss.losses[0].scale.item():.2f}")
    return module, found["accuracy"]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
