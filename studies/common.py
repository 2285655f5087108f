"""What the studies share: data, optimizers, the training loop, and how results are written and drawn."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from precision import cpu_model, load_example, positive_int  # noqa: E402

WARMUP = 0.05  # of the steps, where an optimizer takes a warmup
BATCH_SIZE = 64
GREY, BLUE, ORANGE, GREEN = "#444444", "#0072B2", "#D55E00", "#009E73"

Batches = Iterator[tuple[Tensor, Tensor]]


# ---- data ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Inputs and their labels."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Data:
    """Parts to train on, to choose by, and to report."""

    train: Part
    validation: Part
    test: Part


def split(inputs: Tensor, labels: Tensor) -> Data:
    """Splits 60:20:20, each class alike, the same way every time."""
    train, rest = train_test_split(np.arange(len(labels)), test_size=0.4, stratify=labels, random_state=0)
    validation, test = train_test_split(rest, test_size=0.5, stratify=labels[rest], random_state=0)
    return Data(*(Part(inputs[part], labels[part]) for part in (train, validation, test)))


def shuffled(part: Part, size: int, augment: Callable[[Tensor], Tensor] | None = None) -> Batches:
    """Draws batches without end, each pass over the part in a new order and without the last few."""
    while True:
        for batch in torch.randperm(len(part.labels)).split(size):
            if len(batch) == size:
                inputs = part.inputs[batch]
                yield augment(inputs) if augment else inputs, part.labels[batch]


# ---- training ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What is trained: a model from a seed, batches from a seed, and a loss of outputs and labels."""

    make_model: Callable[[], nn.Module]
    batches: Callable[[], Batches]
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]
    max_grad_norm: float = math.inf


def cross_entropy(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of a classifier."""
    return functional.cross_entropy(model(inputs), labels)


def digits() -> tuple[Problem, Data]:
    """The network, the images and the random shifts of ``examples/digits.py``, with a validation part."""
    example = load_example("digits")
    given = example.load_data()
    data = split(
        torch.cat([given.train_images, given.test_images]), torch.cat([given.train_labels, given.test_labels])
    )
    problem = Problem(
        example.make_model, lambda: shuffled(data.train, BATCH_SIZE, example.shift), cross_entropy
    )
    return problem, data


SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
}


@dataclass(frozen=True, eq=False)
class Method:
    """An optimizer, its schedule (one of ``SHAPES``; none if schedule-free), and learning rates to try."""

    name: str
    optimizer: Callable[..., Optimizer]
    lrs: Sequence[float]
    schedule: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    warmup: float = WARMUP

    def start(self, model: nn.Module, lr: float, steps: int) -> tuple[Optimizer, LambdaLR | None]:
        """Makes the optimizer, and the scheduler of a run of so many steps."""
        warmup = round(self.warmup * steps)
        options = dict(self.options)
        if self.schedule is None and warmup:
            options["warmup_steps"] = warmup
        optimizer = self.optimizer(model.parameters(), lr=lr, **options)
        if self.schedule is None:
            return optimizer, None
        shape = SHAPES[self.schedule]
        return optimizer, LambdaLR(
            optimizer, lambda k: min(1.0, (k + 1) / max(1, warmup)) * shape(min(1.0, k / steps))
        )


def powers(first: int, last: int) -> list[float]:
    """The powers of two with these exponents, both included."""
    return [2.0**exponent for exponent in range(first, last + 1)]


def train(
    problem: Problem, method: Method, lr: float, steps: int, seed: int
) -> Iterator[tuple[nn.Module, Optimizer]]:
    """Trains and yields model and optimizer, in train mode, after each step."""
    torch.manual_seed(seed)
    model = problem.make_model()
    optimizer, schedule = method.start(model, lr, steps)
    batches = problem.batches()
    if schedule is None:
        optimizer.train()  # type: ignore[attr-defined]
    for _ in range(steps):
        model.train()
        loss = problem.loss(model, *next(batches))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if math.isfinite(problem.max_grad_norm):
            nn.utils.clip_grad_norm_(model.parameters(), problem.max_grad_norm)
        if hasattr(optimizer, "step_func"):  # ScheduleFree+ takes its step size from the loss
            optimizer.step_func(loss)
        else:
            optimizer.step()
        if schedule is not None:
            schedule.step()
        yield model, optimizer


@torch.no_grad()
def score(model: nn.Module, part: Part, train_part: Part) -> tuple[float, float]:
    """The loss, infinite where it is no number, and the accuracy in percent, at the parameters."""
    update_bn([train_part.inputs], model)  # for all methods alike; training does not use what this writes
    model.eval()
    outputs = model(part.inputs)
    loss = functional.cross_entropy(outputs, part.labels).item()
    correct = outputs.argmax(1) == part.labels
    return loss if math.isfinite(loss) else math.inf, 100 * correct.double().mean().item()


def averaged(optimizer: Optimizer) -> Any:
    """A context in which the parameters are ``x``; of no effect on optimizers that have none."""
    return getattr(optimizer, "averaged", nullcontext)()


def run(
    problem: Problem, data: Data, method: Method, lr: float, steps: int, seed: int, at: str = "test"
) -> tuple[float, float]:
    """Trains and returns loss and accuracy at the end on a part of the data, at ``x`` if there is one."""
    try:
        *_, (model, optimizer) = train(problem, method, lr, steps, seed)
    except ValueError:  # ScheduleFree+ refuses a loss that is not finite
        return math.inf, 0.0
    with averaged(optimizer):
        return score(model, getattr(data, at), data.train)


# ---- results -------------------------------------------------------------------------------------------


def cell(value: Any) -> str:
    """A value as text; a list, which is by seed, as mean ± standard deviation."""
    if isinstance(value, list):
        if len(value) == 1:
            return f"{value[0]:.3f}"
        mean, spread = statistics.fmean(value), statistics.stdev(value)
        if 0 < max(abs(mean), spread) < 0.001:
            return f"{mean:.1e} ± {spread:.0e}"
        places = 2 if not spread else min(6, max(0, 1 - math.floor(math.log10(spread))))
        return f"{mean:.{places}f} ± {spread:.{places}f}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    lines.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Study:
    """A study's command line, progress bar, results and picture.

    Attributes:
        quick: true if the study is only to be tried.
        seeds: those that are reported.
        rows: of the table.
    """

    def __init__(
        self,
        file: str,
        doc: str,
        quick: dict[str, int],
        tuning_seeds: Sequence[int] = (100, 101),
        **numbers: int,
    ) -> None:
        """Reads the command line.

        Args:
            file: the study's ``__file__``.
            doc: the study's docstring.
            quick: what ``--quick`` makes of some of the numbers.
            tuning_seeds: those that choose learning rates; the reported ones count from 0.
            numbers: integers that become options, and then attributes, with these defaults.
        """
        self.name = Path(file).stem
        parser = argparse.ArgumentParser(
            description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        numbers = {"seeds": 5, **numbers}
        for name, default in numbers.items():
            parser.add_argument(f"--{name}", type=positive_int, default=default, help=name)
        parser.add_argument(
            "--quick", action="store_true", help="try it in seconds; writes to build/studies, not the results"
        )
        parser.add_argument(
            "--out", type=Path, help="folder for results and picture, in place of the project's"
        )
        arguments = parser.parse_args()
        self.quick: bool = arguments.quick
        if arguments.quick:
            vars(arguments).update({"seeds": 2, **quick})
        self._numbers = {name: getattr(arguments, name) for name in numbers}
        self.seeds = range(arguments.seeds)
        out = arguments.out or (ROOT / "build" / "studies" if self.quick else None)
        self._json = (out or ROOT / "studies" / "results") / f"{self.name}.json"
        self._picture = (out or ROOT / "docs" / "studies") / f"{self.name}.png"
        for path in (self._json, self._picture):
            path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        self._tuning_seeds = tuning_seeds
        self._tuning: list[dict[str, Any]] = []
        self._begin, self._cpu_begin = time.perf_counter(), time.process_time()
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)

    def __getattr__(self, name: str) -> int:
        """A number of the command line."""
        numbers: dict[str, int] = self.__dict__.get("_numbers", {})
        if name not in numbers:
            raise AttributeError(name)
        return numbers[name]

    def grid(self, values: Sequence[float]) -> Sequence[float]:
        """The values, or the middle two if the study is only to be tried."""
        middle = len(values) // 2
        return values[middle - 1 : middle + 1] if self.quick else values

    def bar(self, total: int, unit: str = "run") -> tqdm:  # type: ignore[type-arg]
        """A progress bar over so many runs."""
        return tqdm(total=total, desc=self.name, unit=unit, disable=None)

    def tries(self, method: Method) -> int:
        """Runs that choose the learning rate of a method."""
        return len(self._tuning_seeds) * len(self.grid(method.lrs))

    def tune(self, method: Method, measure: Callable[[Method, float, int], float], **about: Any) -> float:
        """Returns the learning rate with the least mean over the tuning seeds; keeps all that was tried."""
        lrs = self.grid(method.lrs)
        losses = {
            lr: statistics.fmean(measure(method, lr, seed) for seed in self._tuning_seeds) for lr in lrs
        }
        best = min(losses, key=losses.__getitem__)
        tried = {f"{lr:g}": loss if math.isfinite(loss) else None for lr, loss in losses.items()}
        edge = best in (lrs[0], lrs[-1])
        self._tuning.append(
            {**about, "method": method.name, "lr": best, "at an end of the grid": edge, "losses": tried}
        )
        return best

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row and writes what there is so far; a reader sees the old file or the new one."""
        self.rows.append(row)
        about = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **self._numbers,
            "seeds": list(self.seeds),
            "tuning seeds": list(self._tuning_seeds),
            "seconds": round(time.perf_counter() - self._begin, 1),
            "cpu seconds": round(time.process_time() - self._cpu_begin, 1),
            "cpu": cpu_model(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "scikit-learn")},
            "schedulefree_cpp": version("schedulefree-cpp"),
        }
        content = {"about": about, "rows": self.rows, "tuning": self._tuning}
        partial = self._json.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.replace(partial, self._json)

    def show(self, figure: Figure) -> None:
        """Prints the table and saves the picture."""
        for axes in figure.axes:
            if not axes.images:
                axes.grid(alpha=0.3)
        figure.savefig(self._picture, dpi=100)
        print(f"{table(self.rows)}\n\nResults: {self._json}\nPicture: {self._picture}")


def panels(rows: int, columns: int, width: float = 9, height: float = 5) -> tuple[Figure, Any]:
    """A figure and its axes, an array of two dimensions."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
