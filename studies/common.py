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
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.model_selection import StratifiedKFold
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
WORST = 1e9  # the loss of a run that has diverged
GREY, BLUE, ORANGE, GREEN = "#444444", "#0072B2", "#D55E00", "#009E73"

T = TypeVar("T")
Batches = Iterator[tuple[Tensor, Tensor]]


# ---- data ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Inputs and their labels."""

    inputs: Tensor
    labels: Tensor


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


SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
}


@dataclass(frozen=True, eq=False)
class Method:
    """An optimizer, its schedule (one of ``SHAPES``; none if schedule-free), and values to try."""

    name: str
    optimizer: Callable[..., Optimizer]
    lrs: Sequence[float]
    schedule: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    warmup: float = WARMUP
    warmup_option: str = "warmup_steps"
    decays: Sequence[float] = (0.0,)

    def start(
        self, model: nn.Module, lr: float, steps: int, decay: float = 0.0
    ) -> tuple[Optimizer, LambdaLR | None]:
        """Makes the optimizer, and the scheduler of a run of so many steps."""
        warmup = round(self.warmup * steps)
        options = self.options | {"weight_decay": decay}
        if self.schedule is None and warmup:
            options[self.warmup_option] = warmup
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
    problem: Problem, method: Method, lr: float, steps: int, seed: int, decay: float = 0.0
) -> Iterator[tuple[nn.Module, Optimizer]]:
    """Trains and yields model and optimizer, in train mode, after each step."""
    torch.manual_seed(seed)
    model = problem.make_model()
    optimizer, schedule = method.start(model, lr, steps, decay)
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


def bounded(loss: float) -> float:
    """The loss, or ``WORST`` where a run has diverged: files hold finite numbers alone."""
    return min(loss, WORST) if math.isfinite(loss) else WORST


@torch.no_grad()
def score(model: nn.Module, part: Part, train_part: Part) -> tuple[float, float]:
    """The loss, at most ``WORST``, and the accuracy in percent, at the parameters."""
    update_bn([train_part.inputs], model)  # for all methods alike; training does not use what this writes
    model.eval()
    outputs = model(part.inputs)
    loss = functional.cross_entropy(outputs, part.labels).item()
    correct = outputs.argmax(1) == part.labels
    return bounded(loss), 100 * correct.double().mean().item()


def averaged(optimizer: Optimizer) -> Any:
    """A context in which the parameters are ``x``; of no effect on optimizers that have none."""
    return getattr(optimizer, "averaged", nullcontext)()


# ---- digits --------------------------------------------------------------------------------------------


class Digits:
    """The network, the images and the random shifts of ``examples/digits.py``, the images in folds."""

    def __init__(self, folds: int) -> None:
        """Divides the images, each class alike, the same way every time."""
        self.example = load_example("digits")
        given = self.example.load_data()
        self._images = torch.cat([given.train_images, given.test_images])
        self._labels = torch.cat([given.train_labels, given.test_labels])
        divided = StratifiedKFold(folds, shuffle=True, random_state=0).split(self._images, self._labels)
        self._held_out = [held_out for _, held_out in divided]
        self.folds = range(folds)

    def part(self, folds: Collection[int]) -> Part:
        """The images of these folds."""
        chosen = np.concatenate([self._held_out[fold] for fold in folds])
        return Part(self._images[chosen], self._labels[chosen])

    def without(self, held_out: Collection[int]) -> tuple[Problem, Part]:
        """What is trained without these folds, and its images."""
        part = self.part([fold for fold in self.folds if fold not in held_out])
        batches = partial(shuffled, part, BATCH_SIZE, self.example.shift)
        return Problem(self.example.make_model, batches, cross_entropy), part

    def epoch(self, held_out: Collection[int]) -> int:
        """Steps of an epoch without these folds."""
        return len(self.without(held_out)[1].labels) // BATCH_SIZE

    def run(
        self, method: Method, lr: float, decay: float, epochs: int, held_out: Collection[int], seed: int
    ) -> list[tuple[float, float]]:
        """Trains without some folds; returns loss and accuracy on each of them, at ``x`` if there is one."""
        problem, part = self.without(held_out)
        steps = epochs * (len(part.labels) // BATCH_SIZE)
        try:
            *_, (model, optimizer) = train(problem, method, lr, steps, seed, decay)
        except ValueError:  # ScheduleFree+ refuses a loss that is not finite
            return [(WORST, 0.0)] * len(held_out)
        with averaged(optimizer):
            return [score(model, self.part([fold]), part) for fold in held_out]


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


def span(values: Sequence[float]) -> str:
    """The values that folds chose, in short."""
    least, most = min(values), max(values)
    return f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown, a table for each series of rows with the same keys."""
    tables = []
    for keys, group in groupby(rows, key=list):
        lines = [keys, ["---"] * len(keys), *([cell(value) for value in row.values()] for row in group)]
        tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(tables)


class Runs:
    """The runs of a study in a file, a line for each, below a line for the process that made them.

    Attributes:
        process: the latest that has made runs: date, machine and versions.
    """

    def __init__(self, path: Path) -> None:
        """Reads the file, if there is one; what a killed process left of a last line is cut off."""
        self._path = path
        self._runs: dict[str, dict[str, Any]] = {}
        self.process: dict[str, Any] = {}
        self._is_ours = False
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole)
        for line in whole.splitlines():
            found = json.loads(line)
            if "process" in found:
                self.process = found["process"]
            else:
                self._runs[json.dumps(found["settings"], sort_keys=True)] = found

    def find(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The run with these settings."""
        return self._runs.get(json.dumps(settings, sort_keys=True))

    def add(self, settings: dict[str, Any], result: Any, seconds: float) -> dict[str, Any]:
        """Writes a run at the end of the file; returns it as a reader will see it."""
        if not self._is_ours:
            self._is_ours = True
            self.process = {
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "cpu": cpu_model(),
                "threads": torch.get_num_threads(),
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "numpy", "scikit-learn")},
                "schedulefree_cpp": version("schedulefree-cpp"),
            }
            self._write({"process": self.process})
        line = self._write({"settings": settings, "result": result, "cpu seconds": round(seconds, 3)})
        run: dict[str, Any] = json.loads(line)
        self._runs[json.dumps(settings, sort_keys=True)] = run
        return run

    def _write(self, content: dict[str, Any]) -> str:
        line = json.dumps(content, allow_nan=False)
        with self._path.open("a") as file:
            file.write(line + "\n")
        return line


class Study:
    """A study's command line, its runs, which are kept in a file, its table and its picture.

    Each run is written to ``NAME.jsonl`` when it ends, and is not repeated: a study that was stopped goes on
    where it was. ``NAME.json``, with the table, and the picture are written when all runs are there.

    Attributes:
        quick: true if the study is only to be tried.
        seeds: those that are reported.
        rows: of the table.
    """

    def __init__(self, file: str, doc: str, quick: dict[str, int], **numbers: int) -> None:
        """Reads the command line, and the runs that are there.

        Args:
            file: the study's ``__file__``.
            doc: the study's docstring.
            quick: what ``--quick`` makes of some of the numbers.
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
            "--fresh", action="store_true", help="forget the runs that are there, and repeat all of them"
        )
        parser.add_argument(
            "--out", type=Path, help="folder for runs, results and picture, in place of the project's"
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
        self._tuning: list[dict[str, Any]] = []
        path = self._json.with_suffix(".jsonl")
        if arguments.fresh or (self.quick and not arguments.out):
            path.unlink(missing_ok=True)
        self._runs = Runs(path)
        self._used: dict[str, dict[str, Any]] = {}
        self._bar = tqdm(desc=self.name, unit="run", mininterval=0.5 if sys.stderr.isatty() else 60)
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
        return values[middle - 1 : middle + 1] if self.quick and len(values) > 1 else values

    def expect(self, runs: int) -> None:
        """Has the progress bar count up to so many runs; about so many, where choices decide."""
        self._bar.total = runs
        self._bar.refresh()

    def run(self, measure: Callable[..., Any], **settings: Any) -> Any:
        """Returns ``measure(**settings)``, from the file if it is there.

        Settings and what is returned must be what JSON can hold; name of the function and settings have to
        tell all that the outcome depends on.
        """
        settings = {"run": measure.__name__, **settings}
        run = self._runs.find(settings)
        if run is None:
            begin = time.process_time()
            result = measure(**{name: value for name, value in settings.items() if name != "run"})
            run = self._runs.add(settings, result, time.process_time() - begin)
        key = json.dumps(settings, sort_keys=True)
        if key not in self._used:
            self._used[key] = run
            self._bar.update()
        return run["result"]

    def choose(self, candidates: Sequence[T], losses: Callable[[T], list[float]], **about: Any) -> T:
        """Returns the candidate with the least mean loss; keeps all that was tried."""
        means = [statistics.fmean(losses(candidate)) for candidate in candidates]
        best = means.index(min(means))
        self._tuning.append(
            {
                **about,
                "chosen": candidates[best],
                "at an end of the grid": len(means) > 1 and best in (0, len(means) - 1),
                "losses": {str(each): mean for each, mean in zip(candidates, means, strict=True)},
            }
        )
        return candidates[best]

    def choose_for_fold(
        self,
        fold: int,
        folds: Sequence[int],
        candidates: Sequence[T],
        losses: Callable[[T, list[int]], Sequence[float]],
        **about: Any,
    ) -> T:
        """Returns the candidate with the least mean loss on the other folds, of runs that never saw this one.

        ``losses(candidate, pair)`` trains without two folds and returns the loss on each. So a run serves
        twice: its loss on one fold chooses for the other.
        """

        def on_others(candidate: T) -> list[float]:
            pairs = [(other, sorted((fold, other))) for other in folds if other != fold]
            return [losses(candidate, pair)[pair.index(other)] for other, pair in pairs]

        return self.choose(candidates, on_others, fold=fold, **about)

    def cpu_seconds(self) -> float:
        """What the runs cost that were asked for so far."""
        return sum(run["cpu seconds"] for run in self._used.values())

    def add(self, row: dict[str, Any]) -> None:
        """Adds a row to the table."""
        self.rows.append(row)

    def show(self, figure: Figure) -> None:
        """Prints and writes the table, and saves the picture."""
        self._bar.close()
        for axes in figure.axes:
            if not axes.images:
                axes.grid(alpha=0.3)
        figure.savefig(self._picture, dpi=100)
        about = {
            **self._runs.process,
            **self._numbers,
            "seeds": list(self.seeds),
            "runs": len(self._used),
            "cpu seconds": round(self.cpu_seconds(), 1),
        }
        content = {"about": about, "rows": self.rows, "tuning": self._tuning}
        partial_json = self._json.with_suffix(".partial")  # a reader sees the old file or the new one
        partial_json.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.replace(partial_json, self._json)
        print(f"{table(self.rows)}\n\nResults: {self._json}\nPicture: {self._picture}")


def panels(rows: int, columns: int, width: float = 9, height: float = 5) -> tuple[Figure, Any]:
    """A figure and its axes, an array of two dimensions."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
