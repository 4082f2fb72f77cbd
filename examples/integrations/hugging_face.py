"""Losses of the package in Hugging Face's Trainer, by ``compute_loss_func``: for classifiers and for language models.

    pip install -e '.[integrations,metrics]'
    python examples/integrations/hugging_face.py [EPOCHS]

Trainer counts the labels that are not -100 over all the batches that it accumulates gradients of, and leaves the
division to the function: so the loss is a sum, divided by ``num_items_in_batch``. With ``reduction="mean"`` gradients
would grow with ``gradient_accumulation_steps``.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import mlkernels
from mlkernels import data, metrics

ComputeLoss = Callable[..., Tensor]


def classification(loss: Callable[[Tensor, Tensor], Tensor]) -> ComputeLoss:
    """``compute_loss_func`` for (N, C) logits, from a loss with ``reduction="sum"``."""

    def compute(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        total = loss(outputs["logits"], labels)
        return total / ((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    return compute


def causal_language_model(loss: Callable[[Tensor, Tensor], Tensor]) -> ComputeLoss:
    """The same for (N, T, V) logits and (N, T) labels: those at t predict the label at t + 1."""

    def compute(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        # The labels move, not the logits, which are large: a slice of them would be copied.
        next_labels = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        total = loss(outputs["logits"].flatten(0, 1), next_labels.flatten())
        return total / ((next_labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    return compute


class Classifier(nn.Module):
    """Any module will do, if it takes the data set's columns by name and returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        # Here, so that Trainer moves, optimizes and saves what the loss trains: Trainer knows only the model.
        self.loss = mlkernels.TwoScaleLoss(self.network, parametrization="relative", reduction="sum")

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"logits": self.network(pixel_values)}


class Rows(Dataset[dict[str, Tensor]]):
    """Images and labels as Trainer wants them."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def main(epochs: int = 10, **arguments: Any) -> tuple[Classifier, float]:
    """Trains on digits; returns the model and the test accuracy."""
    torch.manual_seed(0)
    images = data.digits()
    model = Classifier()
    # Two scales. They are trained, and R is the network's own, which only this function knows.
    compute = classification(lambda logits, labels: model.loss(logits, labels, model.network))
    with tempfile.TemporaryDirectory() as directory:
        options = {
            "output_dir": directory,
            "num_train_epochs": epochs,
            "label_names": ["labels"],  # the model does not take them, so that Trainer would leave them out
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 4,
            "learning_rate": 3e-3,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "seed": 0,
        }
        trainer = Trainer(
            model,
            TrainingArguments(**(options | arguments)),
            train_dataset=Rows(images.train_images, images.train_labels),
            eval_dataset=Rows(images.test_images, images.test_labels),
            compute_loss_func=compute,
            compute_metrics=lambda found: {
                "accuracy": metrics.accuracy(torch.tensor(found.predictions), torch.tensor(found.label_ids)).item()
            },
        )
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"]
    print(f"accuracy {accuracy:.2%}, R1 {model.loss.scale_low.item():.3f}, R2 {model.loss.scale_high.item():.3f}")
    return model, accuracy


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
