"""Logistic regression on the data sets of scikit-learn: how far above its minimum each optimizer ends.

The convex problems of the Schedule-Free paper (arXiv 2405.15682), on data that needs no download, with
standardized features. The objective has an L2 term: without it, separable data have no minimum. L-BFGS in
float64 finds the minimum. Each optimizer has eleven learning rates to choose from, by the objective of two seeds
that are not reported.

    python studies/convex.py
"""

from __future__ import annotations

import math
from functools import partial

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
from matplotlib.axes import Axes
from schedulefree_cpp import AdamWScheduleFree, SGDScheduleFree
from sklearn import datasets
from torch import Tensor, nn
from tqdm import tqdm

SETS = ("iris", "wine", "breast_cancer", "digits", "diabetes")
L2 = 1e-3
BATCH = 16  # that of the paper

ADAM = {"betas": (0.9, 0.99), "weight_decay": 0.0}
SGD = {"momentum": 0.9}
SCHEDULES = ("linear", "cosine", "constant")
METHODS = (
    Method("AdamWScheduleFree", AdamWScheduleFree, powers(-8, 2), options=ADAM),
    *(Method(f"AdamW, {s}", torch.optim.AdamW, powers(-8, 2), s, ADAM) for s in SCHEDULES),
    Method("SGDScheduleFree", SGDScheduleFree, powers(-4, 6), options=SGD),
    *(Method(f"SGD, {s}", torch.optim.SGD, powers(-8, 2), s, SGD) for s in SCHEDULES),
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


def solve(study: Study, name: str, panel_of: dict[str, Axes], bar: tqdm) -> None:  # type: ignore[type-arg]
    """Runs all optimizers on a data set."""
    data = load(name)
    make_model = partial(nn.Linear, data.train.inputs.shape[1], int(data.train.labels.max()) + 1)
    problem = Problem(make_model, partial(shuffled, data.train, BATCH), penalized)
    least = minimum(data.train, make_model())
    parts = (data.validation, data.test)
    held_out = Part(*(torch.cat([getattr(part, key) for part in parts]) for key in ("inputs", "labels")))
    steps = study.epochs * (len(data.train.labels) // BATCH)
    marks = sorted({max(1, round(steps * i / 25)) for i in range(1, 26)})

    def gaps(method: Method, lr: float, seed: int) -> tuple[list[float], float]:
        """The objective above its minimum on the way, and the accuracy at the end."""
        found, accuracy = [], 0.0
        for step, (model, optimizer) in enumerate(train(problem, method, lr, steps, seed), 1):
            if step in marks:
                with averaged(optimizer), torch.no_grad():
                    gap = penalized(model, data.train.inputs, data.train.labels).item() - least
                    found.append(gap if math.isfinite(gap) else math.inf)
                    if step == steps:
                        accuracy = score(model, held_out, data.train)[1]
        bar.update()
        return found, accuracy

    for method in METHODS:
        lr = study.tune(method, lambda *tried: gaps(*tried)[0][-1], data=name)
        found = [gaps(method, lr, seed) for seed in study.seeds]
        study.add(
            {
                "data": name,
                "optimizer": method.name,
                "lr": lr,
                "objective above its minimum": [gap[-1] for gap, _ in found],
                "held-out accuracy (%)": [accuracy for _, accuracy in found],
            }
        )
        mean = torch.tensor([gap for gap, _ in found]).mean(0)
        colour = COLOURS.get(method.schedule or "", BLUE)
        panel_of[method.name[:3]].plot(marks, mean, color=colour, label=method.name)


def main() -> None:
    """Runs all optimizers on all data sets."""
    study = Study(__file__, __doc__ or "", {"epochs": 2}, epochs=50)
    names = study.grid(SETS)
    figure, axes = panels(2, len(names), 3 * len(names), 6.5)
    with study.bar(len(names) * sum(study.tries(method) + len(study.seeds) for method in METHODS)) as bar:
        for name, (adam, sgd) in zip(names, axes.T, strict=True):
            solve(study, name, {"Ada": adam, "SGD": sgd}, bar)
            adam.set(yscale="log", title=name)
            sgd.set(yscale="log", xlabel="steps")
    for panel in axes[:, 0]:
        panel.legend(fontsize=8)
        panel.set_ylabel("objective above its minimum")
    study.show(figure)


if __name__ == "__main__":
    main()
