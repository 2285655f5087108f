"""SWA and LAWA on top of runs without a schedule: does an average of ``x`` do better than ``x``?

Averages of the weights at the ends of epochs: SWA of all in the second half of the run, LAWA of the latest
five, both by ``torch.optim.swa_utils.AveragedModel``. Every line has the learning rate of six that is best
for its own average, chosen for each of six folds of the images by what it does on the other five.

    python studies/averaging.py
"""

from __future__ import annotations

import copy
from collections import deque
from functools import partial
from typing import Any

import torch
from common import (
    BATCH_SIZE,
    BLUE,
    GREY,
    ORANGE,
    Digits,
    Method,
    Study,
    averaged,
    panels,
    powers,
    score,
    span,
    train,
)
from schedulefree_cpp import AdamWScheduleFree, SGDScheduleFree
from torch import nn
from torch.optim.swa_utils import AveragedModel

ADAM = {"betas": (0.9, 0.99)}
SGD = {"momentum": 0.9}
METHODS = (
    Method("AdamWScheduleFree", AdamWScheduleFree, powers(-9, -4), options=ADAM),
    Method("AdamW, constant", torch.optim.AdamW, powers(-9, -4), "constant", ADAM),
    Method("SGDScheduleFree", SGDScheduleFree, powers(-3, 2), options=SGD),
    Method("SGD, constant", torch.optim.SGD, powers(-7, -2), "constant", SGD),
)
METHOD_OF = {method.name: method for method in METHODS}
AVERAGES = {"none": GREY, "SWA": ORANGE, "LAWA": BLUE}
LATEST = 5


def mean_of(models: deque[nn.Module]) -> AveragedModel:
    """The average of models that are kept."""
    average = AveragedModel(models[0])
    for model in models:
        average.update_parameters(model)  # type: ignore[no-untyped-call]
    return average


def main() -> None:
    """Chooses for each average and fold, then trains and tests."""
    study = Study(__file__, __doc__ or "", {"epochs": 2, "folds": 3, "seeds": 1}, epochs=16, folds=6)
    digits = Digits(study.folds)
    folds = digits.folds

    def curves(
        method: str, lr: float, epochs: int, held_out: list[int], seed: int, every: bool
    ) -> dict[str, list[list[tuple[float, float]]]]:
        """Loss and accuracy on each fold that was held out, by average, after each epoch or the last."""
        problem, part = digits.without(held_out)
        epoch = len(part.labels) // BATCH_SIZE
        steps = epochs * epoch
        found: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in AVERAGES}
        latest: deque[nn.Module] = deque(maxlen=LATEST)
        swa: AveragedModel | None = None
        for step, (model, optimizer) in enumerate(train(problem, METHOD_OF[method], lr, steps, seed), 1):
            if step % epoch:
                continue
            with averaged(optimizer):  # the parameters are x in here
                latest.append(copy.deepcopy(model))
                if step >= steps // 2:
                    swa = swa or AveragedModel(model)
                    swa.update_parameters(model)  # type: ignore[no-untyped-call]
                if every or step == steps:
                    models = {"none": model, "SWA": swa or model, "LAWA": mean_of(latest)}
                    for name, each in models.items():
                        found[name].append([score(each, digits.part([fold]), part) for fold in held_out])
        return found

    pairs = len(folds) * (len(folds) - 1) // 2
    tries = pairs * len(study.grid(METHODS[0].lrs))
    # The averages of a method often choose the same learning rate, and then need no run of their own.
    study.expect(len(METHODS) * (tries + 2 * len(folds) * len(study.seeds)))
    figure, axes = panels(1, len(METHODS), 14, 4)
    for panel, method in zip(axes[0], METHODS, strict=True):
        run = partial(study.run, curves, method=method.name, epochs=study.epochs)
        plain = torch.zeros(0)
        for average, colour in AVERAGES.items():

            def on_pair(
                lr: float, held_out: list[int], run: Any = run, average: str = average
            ) -> list[float]:
                seed = 100 + study.folds * held_out[0] + held_out[1]
                found = run(lr=lr, held_out=held_out, seed=seed, every=False)
                return [loss for loss, _ in found[average][-1]]

            lrs = [
                study.choose_for_fold(
                    fold, folds, study.grid(method.lrs), on_pair, method=method.name, average=average
                )
                for fold in folds
            ]
            found = [
                [
                    [at_epoch[0] for at_epoch in run(lr=lr, held_out=[fold], seed=seed, every=True)[average]]
                    for fold, lr in zip(folds, lrs, strict=True)
                ]
                for seed in study.seeds
            ]
            curve = torch.tensor(found, dtype=torch.float64).mean(1)  # by seed, epoch, and loss or accuracy
            losses = curve[..., 0]
            plain = losses[:, -1] if average == "none" else plain
            study.add(
                {
                    "optimizer": method.name,
                    "average on top": average,
                    "lr": span(lrs),
                    "test loss": losses[:, -1].tolist(),
                    "minus that without": "" if average == "none" else (losses[:, -1] - plain).tolist(),
                    "test accuracy (%)": curve[:, -1, 1].tolist(),
                }
            )
            panel.plot(range(1, study.epochs + 1), losses.mean(0), color=colour, label=average)
        panel.set(yscale="log", title=method.name, xlabel="epochs")
        panel.legend(fontsize=8)
    axes[0, 0].set_ylabel("test loss")
    study.show(figure)


if __name__ == "__main__":
    main()
