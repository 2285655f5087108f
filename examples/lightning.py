"""Handwritten digits in Lightning: a schedule-free optimizer, and the callback that switches its modes.

    python examples/lightning.py
    python examples/lightning.py --epochs 20 --resume lightning_run/last.ckpt

Validation and all checkpoints are at the average ``x``; training goes on at ``y``.
"""

import argparse
import sys
from pathlib import Path

# This file has the name of the framework, and Python looks beside a script first.
sys.path = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from schedulefree_cpp import AdamWScheduleFree
from schedulefree_cpp.integrations.lightning import ScheduleFreeCallback
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

Batch = tuple[Tensor, Tensor]


class Classifier(lightning.LightningModule):
    """A perceptron for images of 64 pixels."""

    def __init__(self, lr: float) -> None:
        """Takes the learning rate."""
        super().__init__()
        self.lr = lr
        self.layers = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """Return the loss at y."""
        return functional.cross_entropy(self.layers(batch[0]), batch[1])

    def validation_step(self, batch: Batch, index: int) -> None:
        """Log loss and accuracy at x."""
        outputs = self.layers(batch[0])
        self.log("loss", functional.cross_entropy(outputs, batch[1]))
        self.log("accuracy", (outputs.argmax(dim=1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> AdamWScheduleFree:
        """No schedule beside it."""
        return AdamWScheduleFree(self.parameters(), lr=self.lr, warmup_steps=20)


def load_data() -> tuple[DataLoader[Batch], DataLoader[Batch]]:
    """Return training and validation images, 60:40."""
    digits = load_digits()
    split = train_test_split(
        digits.data, digits.target, test_size=0.4, stratify=digits.target, random_state=0
    )
    train_x, test_x = (torch.tensor(images, dtype=torch.float32) / 16 for images in split[:2])
    train_y, test_y = map(torch.tensor, split[2:])
    train: TensorDataset = TensorDataset(train_x, train_y)
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(TensorDataset(test_x, test_y), 1024)


def main() -> None:
    """Train, validate, save, and load what was saved."""
    parser = argparse.ArgumentParser(
        description="Train a perceptron on handwritten digits in Lightning.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=10, help="epochs in all, resumed ones included")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate")
    parser.add_argument("--resume", type=Path, help="a checkpoint of an earlier run")
    parser.add_argument("--out", type=Path, default=Path("lightning_run"), help="folder for checkpoints")
    arguments = parser.parse_args()

    lightning.seed_everything(0, verbose=False)
    train_loader, validation_loader = load_data()
    model = Classifier(arguments.lr)
    trainer = lightning.Trainer(
        max_epochs=arguments.epochs,
        callbacks=[ScheduleFreeCallback(), ModelCheckpoint(arguments.out, save_last=True)],
        logger=False,
        enable_model_summary=False,
    )
    trainer.fit(model, train_loader, validation_loader, ckpt_path=arguments.resume, weights_only=True)
    accuracy = trainer.callback_metrics["accuracy"].item()
    print(f"Accuracy after {trainer.current_epoch} epochs: {100 * accuracy:.2f} %")

    path = arguments.out / "last.ckpt"
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    (metrics,) = trainer.validate(model, validation_loader, verbose=False)
    print(f"Accuracy of {path}: {100 * metrics['accuracy']:.2f} %")


if __name__ == "__main__":
    main()
