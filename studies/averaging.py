"""SWA and LAWA on top of runs without a schedule: does an average of ``x`` do better than ``x``?

Averages of the weights at the ends of epochs: SWA of all in the second half of the run, LAWA of the latest
five, both by ``torch.optim.swa_utils.AveragedModel``. Every line has the learning rate of six that is best
for its own average, by the validation loss of two seeds that are not reported.

    python studies/averaging.py
"""

from __future__ import annotations

import copy
from collections import deque
from functools import cache, partial

import torch
from common import (
    BATCH_SIZE,
    BLUE,
    GREY,
    ORANGE,
    Method,
    Study,
    averaged,
    digits,
    panels,
    powers,
    score,
    train,
)
from schedulefree_cpp import AdamWScheduleFree, SGDScheduleFree
from torch import nn
from torch.optim.swa_utils import AveragedModel

ADAM = {"betas": (0.9, 0.99), "weight_decay": 0.0}
SGD = {"momentum": 0.9}
METHODS = (
    Method("AdamWScheduleFree", AdamWScheduleFree, powers(-9, -4), options=ADAM),
    Method("AdamW, constant", torch.optim.AdamW, powers(-9, -4), "constant", ADAM),
    Method("SGDScheduleFree", SGDScheduleFree, powers(-3, 2), options=SGD),
    Method("SGD, constant", torch.optim.SGD, powers(-7, -2), "constant", SGD),
)
AVERAGES = {"none": GREY, "SWA": ORANGE, "LAWA": BLUE}
LATEST = 5


def mean_of(models: deque[nn.Module]) -> AveragedModel:
    """The average of models that are kept."""
    average = AveragedModel(models[0])
    for model in models:
        average.update_parameters(model)  # type: ignore[no-untyped-call]
    return average


def main() -> None:
    """Tunes for each average, then trains and tests."""
    study = Study(__file__, __doc__ or "", {"epochs": 2}, epochs=16)
    problem, data = digits()
    epoch = len(data.train.labels) // BATCH_SIZE
    steps = study.epochs * epoch
    bar = study.bar(sum(study.tries(method) + len(AVERAGES) * len(study.seeds) for method in METHODS))

    @cache
    def curves(method: Method, lr: float, seed: int, at: str) -> dict[str, list[tuple[float, float]]]:
        """Loss and accuracy by the epoch, for each average."""
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in AVERAGES}
        latest: deque[nn.Module] = deque(maxlen=LATEST)
        swa: AveragedModel | None = None
        for step, (model, optimizer) in enumerate(train(problem, method, lr, steps, seed), 1):
            if step % epoch:
                continue
            with averaged(optimizer):  # the parameters are x in here
                latest.append(copy.deepcopy(model))
                if step >= steps // 2:
                    swa = swa or AveragedModel(model)
                    swa.update_parameters(model)  # type: ignore[no-untyped-call]
                models = {"none": model, "SWA": swa or model, "LAWA": mean_of(latest)}
                for name, each in models.items():
                    found[name].append(score(each, getattr(data, at), data.train))
        bar.update()
        return found

    def at_end(average: str, method: Method, lr: float, seed: int) -> float:
        return curves(method, lr, seed, "validation")[average][-1][0]

    figure, axes = panels(1, len(METHODS), 14, 4)
    for panel, method in zip(axes[0], METHODS, strict=True):
        plain = torch.zeros(0)
        for average, colour in AVERAGES.items():
            lr = study.tune(method, partial(at_end, average), average=average)
            found = [curves(method, lr, seed, "test")[average] for seed in study.seeds]
            losses = torch.tensor(found, dtype=torch.float64)[..., 0]
            plain = losses[:, -1] if average == "none" else plain
            study.add(
                {
                    "optimizer": method.name,
                    "average on top": average,
                    "lr": lr,
                    "test loss": losses[:, -1].tolist(),
                    "minus that without": "" if average == "none" else (losses[:, -1] - plain).tolist(),
                    "test accuracy (%)": [curve[-1][1] for curve in found],
                }
            )
            panel.plot(
                range(1, study.epochs + 1), losses.mean(0), color=colour, label=f"{average}, lr {lr:.2g}"
            )
        panel.set(yscale="log", title=method.name, xlabel="epochs")
        panel.legend(fontsize=8)
    axes[0, 0].set_ylabel("test loss")
    bar.close()
    study.show(figure)


if __name__ == "__main__":
    main()
