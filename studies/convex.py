"""Logistic regression on the data sets of scikit-learn: how far above its minimum each optimizer ends.

The convex problems of the Schedule-Free paper (arXiv 2405.15682), on data that needs no download, with
standardized features. The objective has an L2 term: without it, separable data have no minimum. L-BFGS in
float64 finds the minimum. Each optimizer has twelve learning rates to choose from on each data set, by the
mean objective of five seeds that are not reported.

    python studies/convex.py
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from common import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Method,
    Part,
    Problem,
    Study,
    averaged,
    bounded,
    cross_entropy,
    panels,
    powers,
    score,
    shuffled,
    train,
)
from schedulefree_cpp import AdamWScheduleFree, SGDScheduleFree
from sklearn import datasets
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

SETS = ("iris", "wine", "breast_cancer", "digits", "diabetes")
L2 = 1e-3
BATCH = 16  # that of the paper

TUNING_SEEDS = range(100, 105)

ADAM = {"betas": (0.9, 0.99)}
SGD = {"momentum": 0.9}
SCHEDULES = ("linear", "cosine", "constant")
METHODS = (
    Method("AdamWScheduleFree", AdamWScheduleFree, powers(-9, 2), options=ADAM),
    *(Method(f"AdamW, {s}", torch.optim.AdamW, powers(-9, 2), s, ADAM) for s in SCHEDULES),
    Method("SGDScheduleFree", SGDScheduleFree, powers(-5, 6), options=SGD),
    *(Method(f"SGD, {s}", torch.optim.SGD, powers(-8, 3), s, SGD) for s in SCHEDULES),
)
COLOURS = {"linear": ORANGE, "cosine": GREEN, "constant": GREY}


def load(name: str) -> tuple[Part, Part]:
    """A data set, standardized by its training part, 60%, and the rest; always divided the same way."""
    bunch = getattr(datasets, f"load_{name}")()
    labels = torch.tensor(bunch.target)
    if name == "diabetes":  # a regression made a classification: progression above its median or not
        labels = (labels > labels.median()).long()
    inputs = torch.tensor(bunch.data, dtype=torch.float32)
    parts = train_test_split(torch.arange(len(labels)), test_size=0.4, stratify=labels, random_state=0)
    fitted = inputs[parts[0]]
    inputs = (inputs - fitted.mean(0)) / fitted.std(0).clamp_min(1e-6)
    train_part, held_out = (Part(inputs[part], labels[part]) for part in parts)
    return train_part, held_out


def penalized(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The objective: mean cross-entropy, and half the squared weights times ``L2``."""
    weights = sum(p.square().sum() for p in model.parameters())
    return cross_entropy(model, inputs, labels) + 0.5 * L2 * weights


def minimum(part: Part, model: nn.Module) -> float:
    """The least value of the objective, found from zero: the same in every process."""
    model, inputs = model.double(), part.inputs.double()
    for p in model.parameters():
        nn.init.zeros_(p)
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

    def __init__(self, name: str) -> None:
        """Loads the data and finds the minimum."""
        self.train_part, self.held_out = load(name)
        part = self.train_part
        make_model = partial(nn.Linear, part.inputs.shape[1], int(part.labels.max()) + 1)
        self.problem = Problem(make_model, partial(shuffled, part, BATCH), penalized)
        self.least = minimum(part, make_model())

    def marks(self, epochs: int) -> list[int]:
        """The steps at which a run is measured."""
        steps = epochs * (len(self.train_part.labels) // BATCH)
        return sorted({max(1, round(steps * i / 25)) for i in range(1, 26)})

    @torch.no_grad()
    def gap(self, model: nn.Module) -> float:
        """The objective above its minimum."""
        part = self.train_part
        return bounded(penalized(model, part.inputs, part.labels).item() - self.least)

    def run(
        self, method: Method, lr: float, seed: int, marks: list[int]
    ) -> tuple[list[float], tuple[float, float]]:
        """Gaps at the marks, the last of which is the end, and loss and accuracy on held-out data there."""
        gaps = []
        for step, (model, optimizer) in enumerate(train(self.problem, method, lr, marks[-1], seed), 1):
            if step in marks:
                with averaged(optimizer):
                    gaps.append(self.gap(model))
        with averaged(optimizer):
            return gaps, score(model, self.held_out, self.train_part)


task_of = cache(Task)
METHOD_OF = {method.name: method for method in METHODS}


def tried(data: str, method: str, lr: float, seed: int, epochs: int) -> float:
    """The gap at the end."""
    task = task_of(data)
    return task.run(METHOD_OF[method], lr, seed, task.marks(epochs)[-1:])[0][-1]


def reported(data: str, method: str, lr: float, seed: int, epochs: int) -> dict[str, Any]:
    """The gaps on the way to the end, and the accuracy there."""
    task = task_of(data)
    gaps, (_, accuracy) = task.run(METHOD_OF[method], lr, seed, task.marks(epochs))
    return {"gaps": gaps, "accuracy": accuracy}


def main() -> None:
    """Runs all optimizers on all data sets."""
    study = Study(__file__, __doc__ or "", {"epochs": 2}, epochs=30)
    sets = SETS[:2] if study.quick else SETS
    tuning_seeds = TUNING_SEEDS[:1] if study.quick else TUNING_SEEDS
    tries = len(study.grid(METHODS[0].lrs)) * len(tuning_seeds)
    study.expect(len(sets) * len(METHODS) * (tries + len(study.seeds)))
    figure, axes = panels(2, len(sets), 3 * len(sets), 6.5)
    accuracies: list[dict[str, Any]] = []
    for number, method in enumerate(METHODS):
        gap_row: dict[str, Any] = {"optimizer": method.name, "at the end": "above the minimum"}
        accuracy_row = {"optimizer": method.name, "at the end": "accuracy (%)"}
        for name, panel in zip(sets, axes[number // 4], strict=True):
            settings = {"data": name, "method": method.name, "epochs": study.epochs}

            def gaps_at(lr: float, settings: dict[str, Any] = settings) -> list[float]:
                return [study.run(tried, lr=lr, seed=seed, **settings) for seed in tuning_seeds]

            lr = study.choose(study.grid(method.lrs), gaps_at, **settings)
            found = [study.run(reported, lr=lr, seed=seed, **settings) for seed in study.seeds]
            gap_row[name] = [run["gaps"][-1] for run in found]
            accuracy_row[name] = [run["accuracy"] for run in found]
            colour = COLOURS.get(method.schedule or "", BLUE)
            mean = torch.tensor([run["gaps"] for run in found]).mean(0)
            panel.plot(task_of(name).marks(study.epochs), mean, color=colour, label=method.name)
            panel.set(yscale="log", title=name if number < 4 else "")
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
