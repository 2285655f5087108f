"""Logistic regression on the data sets of scikit-learn: how far above its minimum each optimizer ends.

The convex problems of the Schedule-Free paper (arXiv 2405.15682), on data that needs no download, with
standardized features. The objective has an L2 term: without it, separable data have no minimum. L-BFGS in
float64 finds the minimum. Each optimizer has twelve learning rates to choose from on each data set, by the
objective of two seeds that are not reported.

    python studies/convex.py
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from common import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Data,
    Method,
    Part,
    Problem,
    Study,
    averaged,
    cross_entropy,
    panels,
    powers,
    score,
    shuffled,
    split,
    train,
)
from schedulefree_cpp import AdamWScheduleFree, SGDScheduleFree
from sklearn import datasets
from torch import Tensor, nn

SETS = ("iris", "wine", "breast_cancer", "digits", "diabetes")
L2 = 1e-3
BATCH = 16  # that of the paper

ADAM = {"betas": (0.9, 0.99), "weight_decay": 0.0}
SGD = {"momentum": 0.9}
SCHEDULES = ("linear", "cosine", "constant")
METHODS = (
    Method("AdamWScheduleFree", AdamWScheduleFree, powers(-9, 2), options=ADAM),
    *(Method(f"AdamW, {s}", torch.optim.AdamW, powers(-9, 2), s, ADAM) for s in SCHEDULES),
    Method("SGDScheduleFree", SGDScheduleFree, powers(-5, 6), options=SGD),
    *(Method(f"SGD, {s}", torch.optim.SGD, powers(-8, 3), s, SGD) for s in SCHEDULES),
)
COLOURS = {"linear": ORANGE, "cosine": GREEN, "constant": GREY}


def load(name: str) -> Data:
    """A data set, standardized by its training part."""
    bunch = getattr(datasets, f"load_{name}")()
    labels = torch.tensor(bunch.target)
    if name == "diabetes":  # a regression made a classification: progression above its median or not
        labels = (labels > labels.median()).long()
    inputs = torch.tensor(bunch.data, dtype=torch.float32)
    fitted = split(inputs, labels).train.inputs
    return split((inputs - fitted.mean(0)) / fitted.std(0).clamp_min(1e-6), labels)


def penalized(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The objective: mean cross-entropy, and half the squared weights times ``L2``."""
    weights = sum(p.square().sum() for p in model.parameters())
    return cross_entropy(model, inputs, labels) + 0.5 * L2 * weights


def minimum(part: Part, model: nn.Module) -> float:
    """The least value of the objective."""
    model, inputs = model.double(), part.inputs.double()
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=5000,
        tolerance_grad=1e-9,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = penalized(model, inputs, part.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    least = closure().item()
    steepest = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
    # The objective is L2-strongly convex: it is at most |gradient|^2 / (2 * L2) above its minimum.
    if not steepest < 1e-6:
        raise RuntimeError(f"L-BFGS stopped at a gradient of {steepest}")
    return least


class Task:
    """A data set and what optimizers do on it."""

    def __init__(self, name: str, epochs: int) -> None:
        """Loads the data and finds the minimum."""
        self.name, self.data = name, load(name)
        train_part, parts = self.data.train, (self.data.validation, self.data.test)
        make_model = partial(nn.Linear, train_part.inputs.shape[1], int(train_part.labels.max()) + 1)
        self.problem = Problem(make_model, partial(shuffled, train_part, BATCH), penalized)
        self.least = minimum(train_part, make_model())
        self.held_out = Part(*(torch.cat([vars(p)[key] for p in parts]) for key in ("inputs", "labels")))
        self.steps = epochs * (len(train_part.labels) // BATCH)
        self.marks = sorted({max(1, round(self.steps * i / 25)) for i in range(1, 26)})

    @torch.no_grad()
    def gap(self, model: nn.Module) -> float:
        """The objective above its minimum."""
        part = self.data.train
        gap = penalized(model, part.inputs, part.labels).item() - self.least
        return gap if math.isfinite(gap) else math.inf

    def run(self, method: Method, lr: float, seed: int) -> tuple[list[float], float]:
        """Gaps on the way to the end, and the accuracy there."""
        gaps = []
        for step, (model, optimizer) in enumerate(train(self.problem, method, lr, self.steps, seed), 1):
            if step in self.marks:
                with averaged(optimizer):
                    gaps.append(self.gap(model))
        with averaged(optimizer):
            return gaps, score(model, self.held_out, self.data.train)[1]


def main() -> None:
    """Runs all optimizers on all data sets."""
    study = Study(__file__, __doc__ or "", {"epochs": 2}, epochs=30)
    tasks = [Task(name, study.epochs) for name in study.grid(SETS)]
    figure, axes = panels(2, len(tasks), 3 * len(tasks), 6.5)
    accuracies: list[dict[str, Any]] = []
    with study.bar(len(tasks) * sum(study.tries(method) + len(study.seeds) for method in METHODS)) as bar:

        def run(task: Task, method: Method, lr: float, seed: int) -> tuple[list[float], float]:
            bar.update()
            return task.run(method, lr, seed)

        def at_end(*tried: Any) -> float:
            return run(*tried)[0][-1]

        for number, method in enumerate(METHODS):
            gap_row: dict[str, Any] = {"optimizer": method.name, "at the end": "above the minimum"}
            accuracy_row = {"optimizer": method.name, "at the end": "accuracy (%)"}
            for task, panel in zip(tasks, axes[number // 4], strict=True):
                lr = study.tune(method, partial(at_end, task), data=task.name)
                found = [run(task, method, lr, seed) for seed in study.seeds]
                gap_row[task.name] = [gaps[-1] for gaps, _ in found]
                accuracy_row[task.name] = [accuracy for _, accuracy in found]
                colour = COLOURS.get(method.schedule or "", BLUE)
                mean = torch.tensor([gaps for gaps, _ in found]).mean(0)
                panel.plot(task.marks, mean, color=colour, label=method.name)
                panel.set(yscale="log", title=task.name if number < 4 else "")
            study.add(gap_row)
            accuracies.append(accuracy_row)
    for row in accuracies:
        study.add(row)
    for panel in axes[:, 0]:
        panel.legend(fontsize=8)
        panel.set_ylabel("objective above its minimum")
    for panel in axes[1]:
        panel.set_xlabel("steps")
    study.show(figure)


if __name__ == "__main__":
    main()
