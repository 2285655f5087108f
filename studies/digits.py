"""Digits: schedule-free optimizers against tuned cosine and linear schedules.

The network and the random shifts of ``examples/digits.py``. Every optimizer chooses its learning rate from
eight, by the validation loss of two seeds that are not reported; nothing else is tuned, and no optimizer
decays weights. The test part is for the report alone.

    python studies/digits.py
"""

from __future__ import annotations

import torch
from common import BATCH_SIZE, BLUE, ORANGE, Method, Study, digits, panels, powers, run
from schedulefree_cpp import AdamCScheduleFreePlus, AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree

ADAM = {"betas": (0.9, 0.99), "weight_decay": 0.0}
RADAM = {"betas": (0.9, 0.99)}
SGD = {"momentum": 0.9}
METHODS = (
    Method("SGDScheduleFree", SGDScheduleFree, powers(-4, 3), options=SGD),
    Method("SGD, cosine", torch.optim.SGD, powers(-7, 0), "cosine", SGD),
    Method("SGD, linear", torch.optim.SGD, powers(-7, 0), "linear", SGD),
    Method("AdamWScheduleFree", AdamWScheduleFree, powers(-10, -3), options=ADAM),
    Method("AdamW, cosine", torch.optim.AdamW, powers(-10, -3), "cosine", ADAM),
    Method("AdamW, linear", torch.optim.AdamW, powers(-10, -3), "linear", ADAM),
    Method("RAdamScheduleFree", RAdamScheduleFree, powers(-10, -3), options=RADAM, warmup=0),
    Method("RAdam, cosine", torch.optim.RAdam, powers(-10, -3), "cosine", RADAM, warmup=0),
    Method("RAdam, linear", torch.optim.RAdam, powers(-10, -3), "linear", RADAM, warmup=0),
    Method("AdamCScheduleFreePlus", AdamCScheduleFreePlus, powers(-3, 4), options=ADAM, warmup=0),
)


def main() -> None:
    """Tunes, then trains and tests."""
    study = Study(__file__, __doc__ or "", {"epochs": 1}, epochs=24)
    problem, data = digits()
    steps = study.epochs * (len(data.train.labels) // BATCH_SIZE)
    bar = study.bar(sum(study.tries(method) + len(study.seeds) for method in METHODS))

    def ends(method: Method, lr: float, seed: int, at: str) -> tuple[float, float]:
        bar.update()
        return run(problem, data, method, lr, steps, seed, at)

    for method in METHODS:
        lr = study.tune(method, lambda *tried: ends(*tried, "validation")[0])
        found = [ends(method, lr, seed, "test") for seed in study.seeds]
        study.add(
            {
                "optimizer": method.name,
                "lr": lr,
                "test loss": [loss for loss, _ in found],
                "test accuracy (%)": [accuracy for _, accuracy in found],
            }
        )
    bar.close()

    figure, axes = panels(1, 2, 10, 4.5)
    for panel, key in zip(axes[0], ("test loss", "test accuracy (%)"), strict=True):
        for place, (method, row) in enumerate(zip(METHODS, study.rows, strict=True)):
            colour = ORANGE if method.schedule else BLUE
            panel.plot(row[key], [place] * len(row[key]), "o", color=colour, alpha=0.4)
            panel.plot(
                [sum(row[key]) / len(row[key])], [place], "|", color=colour, markersize=18, markeredgewidth=2
            )
        panel.set(xlabel=key, yticks=range(len(METHODS)), yticklabels=[method.name for method in METHODS])
        panel.invert_yaxis()
    axes[0, 1].set_yticklabels([])
    figure.suptitle(f"Digits, {study.epochs} epochs: dots are seeds, bars their means")
    study.show(figure)


if __name__ == "__main__":
    main()
