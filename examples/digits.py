"""Schedule-Free learning on handwritten digits, next to AdamW with a cosine schedule.

A cosine schedule has to know when training will stop: a run planned for 8 epochs is good at
epoch 8, and a run planned for 32 epochs is good at epoch 32 but poor at epoch 8. A schedule-free
optimizer needs no such plan: one run is about as good at every epoch as the cosine run that was
planned to stop there.

This script trains a small convolutional network on the 1,797 images of
``sklearn.datasets.load_digits`` (nothing is downloaded) with ``SGDScheduleFree`` and
``AdamWScheduleFree``, and with ``torch.optim.AdamW`` and cosine schedules of three lengths. It
prints a table and draws test accuracy against epochs:

    python examples/digits.py
    python examples/digits.py --optimizer adamw --epochs 16 --out adamw.png

The same in C++ is ``examples/cpp/digits.cpp``; ``--export-csv`` writes the images that it reads.

Learning rates and weight decays were chosen, for every optimizer, by accuracy on these test images: this
demonstrates, it does not benchmark.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from schedulefree_cpp import AdamWScheduleFree, SGDScheduleFree
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

BATCH_SIZE = 64
WARMUP_STEPS = 16  # one epoch, for every optimizer
# Each optimizer has the best of a small grid of both. The decay is strong because runs are short.
LEARNING_RATES = {"sgd": 0.5, "adamw": 0.01, "cosine": 0.02}
WEIGHT_DECAYS = {"sgd": 0.01, "adamw": 0.5, "cosine": 0.5}
FORMAT_OPTIONS = {
    "sgd": ("state_bits", "rounding"),
    "adamw": ("state_bits", "rounding", "exp_avg_sq_bits"),
    "cosine": (),
}
NAMES = {"sgd": "SGDScheduleFree", "adamw": "AdamWScheduleFree", "cosine": "AdamW + cosine"}


@dataclass
class Digits:
    """Images of shape (n, 1, 8, 8) with values in [0, 1], and their labels."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass
class Curve:
    """The runs of one optimizer, one for each seed, all planned for the same length."""

    optimizer: str
    epochs: int
    accuracy: NDArray[np.float64]  # percent, of shape (seeds, epochs)
    seconds: float  # of one run, on average


def load_data() -> Digits:
    """Split the digits 60:40 into training and test images, the same way every time."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.4, stratify=digits.target, random_state=0
    )
    return Digits(images[train], labels[train], images[test], labels[test])


def export_csv(data: Digits, path: Path) -> None:
    """Write a header and then, for each image, ``train`` or ``test``, its label and 64 pixels, 0 to 16."""
    lines = ["split,label," + ",".join(f"p{pixel}" for pixel in range(64))]
    for split, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        pixels = (images.flatten(1) * 16).int()
        for label, row in zip(labels.tolist(), pixels.tolist(), strict=True):
            lines.append(",".join(map(str, [split, label, *row])))
    path.write_text("\n".join(lines) + "\n")


def make_model() -> nn.Module:
    """Build a network of three convolutions, each with batch normalization."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 2 * 2, 10),
    )


def shift(images: Tensor) -> Tensor:
    """Move each image by -1, 0 or 1 pixels down and across, at random."""
    top, left = torch.randint(0, 3, (2, len(images), 1))
    rows = (top + torch.arange(8)).unsqueeze(2)
    columns = (left + torch.arange(8)).unsqueeze(1)
    image = torch.arange(len(images)).view(-1, 1, 1)
    return functional.pad(images, (1, 1, 1, 1))[image, 0, rows, columns].unsqueeze(1)


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: LambdaLR | None, data: Digits
) -> None:
    """Train for one pass over the training images."""
    model.train()
    if isinstance(optimizer, SGDScheduleFree | AdamWScheduleFree):
        optimizer.train()  # the parameters become y, where gradients are taken
    steps = len(data.train_images) // BATCH_SIZE
    order = torch.randperm(len(data.train_images))[: steps * BATCH_SIZE]
    for batch in order.view(steps, BATCH_SIZE):
        outputs = model(shift(data.train_images[batch]))
        loss = functional.cross_entropy(outputs.float(), data.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if schedule is not None:
            schedule.step()


@torch.no_grad()
def evaluate(model: nn.Module, optimizer: torch.optim.Optimizer, data: Digits) -> tuple[float, float]:
    """Return the accuracy on the test images, in percent, and the loss."""
    if isinstance(optimizer, SGDScheduleFree | AdamWScheduleFree):
        optimizer.eval()  # the parameters become x, the average that is to be used
    # Batch normalization gathered its statistics at y; they have to be those of x. The batches of
    # training don't use them, so nothing has to be put back. The cosine runs are treated alike.
    model.train()
    update_bn([data.train_images], model)
    model.eval()
    outputs = model(data.test_images).float()
    correct = outputs.argmax(dim=1) == data.test_labels
    loss = functional.cross_entropy(outputs, data.test_labels)
    return 100 * float(correct.double().mean()), float(loss)


def train(
    name: str, epochs: int, seed: int, lr: float, data: Digits, formats: dict[str, Any] | None = None
) -> Iterator[tuple[float, float]]:
    """Train one network and yield its test accuracy and loss after each epoch.

    Args:
        name: of the optimizer: ``sgd``, ``adamw`` or ``cosine``.
        epochs: length of the run.
        seed: of everything random.
        lr: learning rate.
        data: the images; the network has their dtype.
        formats: options of a schedule-free optimizer that say how it stores its state.
    """
    torch.manual_seed(seed)
    model = make_model().to(data.train_images.dtype)
    total_steps = epochs * (len(data.train_images) // BATCH_SIZE)

    def cosine(step: int) -> float:
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        return warmup * 0.5 * (1 + math.cos(math.pi * step / total_steps))

    weight_decay = WEIGHT_DECAYS[name]
    options = formats or {}
    optimizer: torch.optim.Optimizer
    schedule = None
    if name == "sgd":
        optimizer = SGDScheduleFree(
            model.parameters(), lr=lr, weight_decay=weight_decay, warmup_steps=WARMUP_STEPS, **options
        )
    elif name == "adamw":
        optimizer = AdamWScheduleFree(
            model.parameters(), lr=lr, weight_decay=weight_decay, warmup_steps=WARMUP_STEPS, **options
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
        schedule = LambdaLR(optimizer, cosine)

    for _ in range(epochs):
        train_epoch(model, optimizer, schedule, data)
        yield evaluate(model, optimizer, data)


def train_seeds(
    name: str, epochs: int, seeds: range, lr: float, data: Digits, formats: dict[str, Any]
) -> Curve:
    """Train one network for each seed."""
    accuracy = np.zeros((len(seeds), epochs))
    label = f"{NAMES[name]}, {epochs} epochs"
    start = time.perf_counter()
    with tqdm(total=accuracy.size, desc=f"{label:<29}", unit="epoch", disable=None) as bar:
        for run, seed in enumerate(seeds):
            for epoch, (percent, _) in enumerate(train(name, epochs, seed, lr, data, formats)):
                accuracy[run, epoch] = percent
                bar.set_postfix_str(f"test accuracy {percent:.1f} %", refresh=False)
                bar.update()
    return Curve(name, epochs, accuracy, (time.perf_counter() - start) / len(seeds))


def print_table(curves: list[Curve]) -> None:
    """Print one line for each curve; accuracy and seconds are means over the seeds."""
    print(f"{'optimizer':<18}{'epochs':>8}{'test accuracy':>16}{'seconds':>10}")
    for curve in curves:
        accuracy = f"{curve.accuracy[:, -1].mean():.2f} %"
        print(f"{NAMES[curve.optimizer]:<18}{curve.epochs:>8}{accuracy:>16}{curve.seconds:>10.1f}")


def draw(curves: list[Curve], path: Path) -> None:
    """Draw test accuracy against epochs, one line for each curve; the PNG's description has the numbers."""
    colours = {"sgd": "#D55E00", "adamw": "#0072B2", "cosine": "#444444"}
    figure = Figure(figsize=(9, 7), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        colour = colours[curve.optimizer]
        epochs = np.arange(1, curve.epochs + 1)
        error = np.maximum(100 - curve.accuracy.mean(axis=0), 0.1)  # a logarithm can't show 0
        spread = curve.accuracy.std(axis=0) / math.sqrt(len(curve.accuracy))
        if curve.optimizer == "cosine":
            end = epochs[-1], error[-1]
            axes.plot(epochs, error, "--", color=colour, linewidth=1.2)
            axes.errorbar(*end, spread[-1], fmt="D", color=colour, markersize=9, capsize=4)
            axes.annotate(
                f"cosine for\n{curve.epochs} epochs",
                end,
                xytext=(30, -105),
                textcoords="offset points",
                ha="center",
                fontsize=11,
                color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                arrowprops={"arrowstyle": "-", "color": colour, "shrinkB": 7},
            )
        else:
            axes.plot(epochs, error, color=colour, linewidth=3, label=NAMES[curve.optimizer])
            axes.fill_between(epochs, error - spread, error + spread, color=colour, alpha=0.12)
    # The axis is the logarithm of the test error, upside down, and bears the accuracy.
    ticks = [80, 50, 30, 20, 10, 5, 4, 3, 2, 1.5, 1, 0.75, 0.5, 0.3, 0.2, 0.1]
    axes.set_yscale("log")
    axes.set_yticks(ticks, [f"{100 - tick:g} %" for tick in ticks])
    axes.minorticks_off()
    errors = [100 - curve.accuracy.mean(axis=0) for curve in curves]
    bottom = max(10.0, *(1.2 * error[-1] for error in errors))  # 90 %, lower if a run ends there
    top = max(0.1, min(0.3, *(0.8 * error.min() for error in errors)))
    axes.set_ylim(bottom, top)
    axes.set_xlim(0, 1.13 * max(curve.epochs for curve in curves))  # room for the last label
    axes.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 4, 5, 10], integer=True))
    axes.grid(alpha=0.3)
    axes.set_xlabel("epochs", fontsize=12)
    axes.set_ylabel("test accuracy", fontsize=12)
    axes.set_title("Handwritten digits: schedule-free beside a cosine schedule", fontsize=14)
    axes.legend(loc="lower right", fontsize=12)
    figure.supxlabel(
        "A schedule-free line is one run, planned for no length: it can be stopped anywhere.\n"
        "Each dashed line is a run planned to end at its diamond; well before that, it is worse.\n"
        f"Means of {len(curves[0].accuracy)} seeds; bands and bars: one standard error either way.",
        fontsize=10,
    )
    numbers = [{"optimizer": NAMES[c.optimizer], "accuracy": c.accuracy.round(2).tolist()} for c in curves]
    figure.savefig(path, dpi=150, metadata={"Description": json.dumps(numbers)})


def positive_int(text: str) -> int:
    """Parse a command-line integer that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def positive_float(text: str) -> float:
    """Parse a command-line number that is finite and more than 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be finite and more than 0, not {text}")
    return value


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train on handwritten digits with schedule-free optimizers and, beside them, "
        "AdamW with cosine schedules; print a table and draw test accuracy against epochs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--optimizer",
        choices=["all", "sgd", "adamw", "cosine"],
        default="all",
        help="what to train with: sgd is SGDScheduleFree, adamw is AdamWScheduleFree, cosine is "
        "torch.optim.AdamW with cosine schedules of a quarter, a half and all of the epochs",
    )
    parser.add_argument("--epochs", type=positive_int, default=32, help="length of the longest run")
    defaults = ", ".join(f"{name} {lr:g}" for name, lr in LEARNING_RATES.items())
    parser.add_argument(
        "--lr",
        type=positive_float,
        default=argparse.SUPPRESS,
        help=f"learning rate of every optimizer trained, in place of its own (default: {defaults})",
    )
    parser.add_argument(
        "--seeds", type=positive_int, default=5, help="runs to average, each with its own seed"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the first run; the others count up from it",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of the network's parameters and arithmetic",
    )
    for option, bits in (("state_bits", 24), ("exp_avg_sq_bits", 8)):
        parser.add_argument(
            f"--{option.replace('_', '-')}",
            type=int,
            choices=[32, bits],
            default=argparse.SUPPRESS,
            help=f"{option} of the schedule-free optimizers (docs/precision.md)",
        )
    parser.add_argument(
        "--rounding",
        choices=["nearest", "stochastic"],
        default=argparse.SUPPRESS,
        help="rounding of the schedule-free optimizers",
    )
    parser.add_argument("--out", type=Path, default=Path("digits.png"), help="picture to write")
    parser.add_argument(
        "--export-csv",
        type=Path,
        metavar="PATH",
        default=argparse.SUPPRESS,
        help="write the training and test images to this file, for examples/cpp, and train nothing",
    )
    arguments = parser.parse_args()
    for option in ("out", "export_csv"):
        path = getattr(arguments, option, None)
        if path is not None and not path.parent.is_dir():
            parser.error(f"argument --{option.replace('_', '-')}: no such directory: {path.parent}")
    return arguments


def main() -> None:
    """Train with each optimizer, then show the results."""
    arguments = parse_arguments()
    torch.set_num_threads(1)  # such small tensors gain little from more
    data = load_data()
    if "export_csv" in arguments:
        export_csv(data, arguments.export_csv)
        print(
            f"Wrote {len(data.train_images)} training and {len(data.test_images)} test images "
            f"to {arguments.export_csv}"
        )
        return
    dtype = getattr(torch, arguments.dtype)
    data = replace(data, train_images=data.train_images.to(dtype), test_images=data.test_images.to(dtype))
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    print(
        f"Training on {len(data.train_images)} images, testing on {len(data.test_images)}; "
        f"seeds: {arguments.seeds}, threads: 1.",
        flush=True,
    )
    curves = []
    for name in LEARNING_RATES if arguments.optimizer == "all" else [arguments.optimizer]:
        lr = getattr(arguments, "lr", LEARNING_RATES[name])
        parts = (4, 2, 1) if name == "cosine" else (1,)
        for epochs in sorted({max(1, arguments.epochs // part) for part in parts}):
            given = vars(arguments)
            formats = {option: given[option] for option in FORMAT_OPTIONS[name] if option in given}
            curves.append(train_seeds(name, epochs, seeds, lr, data, formats))
    print_table(curves)
    draw(curves, arguments.out)
    print(f"Picture: {arguments.out}")


if __name__ == "__main__":
    main()
