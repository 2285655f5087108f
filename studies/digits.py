"""Digits: schedule-free optimizers against tuned cosine and linear schedules, cross-validated.

The network and the random shifts of ``examples/digits.py``. The images are in six folds. For each fold, every
optimizer chooses its learning rate from six and then its decay from three by what it does on the other five;
then it trains on these five, and is tested on the fold. So a seed is tested on all images, and no choice has
seen those that it's tested on. The same again at half and at twice the learning rate.

    python studies/digits.py
"""

from __future__ import annotations

import statistics

import torch
from common import BLUE, ORANGE, Digits, Method, Study, panels, powers, span
from schedulefree_cpp import AdamCScheduleFreePlus, AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree

ADAM = {"betas": (0.9, 0.99)}
SGD = {"momentum": 0.9}
L2 = (0.0, 1e-4, 1e-3)
DECAYS = (0.0, 0.1, 0.5)
ADAMW = torch.optim.AdamW
METHODS = (
    Method("SGDScheduleFree", SGDScheduleFree, powers(-3, 2), options=SGD, decays=L2),
    Method("SGD, cosine", torch.optim.SGD, powers(-7, -2), "cosine", SGD, decays=L2),
    Method("SGD, linear", torch.optim.SGD, powers(-7, -2), "linear", SGD, decays=L2),
    Method("AdamWScheduleFree", AdamWScheduleFree, powers(-9, -4), options=ADAM, decays=DECAYS),
    Method("AdamW, cosine", ADAMW, powers(-9, -4), "cosine", ADAM, decays=DECAYS),
    Method("AdamW, linear", ADAMW, powers(-9, -4), "linear", ADAM, decays=DECAYS),
    Method("RAdamScheduleFree", RAdamScheduleFree, powers(-9, -4), options=ADAM, warmup=0, decays=DECAYS),
    Method(  # as its authors advise: later steps weigh more, and those of a warmup less
        "AdamCScheduleFreePlus",
        AdamCScheduleFreePlus,
        powers(-3, 2),
        options={**ADAM, "r": 2},
        warmup_option="c_warmup",
        decays=(0.0, 2.0, 20.0),
    ),
)
METHOD_OF = {method.name: method for method in METHODS}
FACTORS = (0.5, 1.0, 2.0)


def main() -> None:
    """Chooses, trains and tests for each fold."""
    study = Study(__file__, __doc__ or "", {"epochs": 1, "folds": 3, "seeds": 1}, epochs=12, folds=6)
    digits = Digits(study.folds)
    folds = digits.folds

    def fit(
        method: str, lr: float, decay: float, epochs: int, held_out: list[int], seed: int
    ) -> list[tuple[float, float]]:
        """Loss and accuracy on each fold that was held out."""
        return digits.run(METHOD_OF[method], lr, decay, epochs, held_out, seed)

    pairs = len(folds) * (len(folds) - 1) // 2
    tries = sum(pairs * (len(study.grid(method.lrs)) + len(method.decays) - 1) for method in METHODS)
    study.expect(tries + len(METHODS) * len(FACTORS) * len(study.seeds) * len(folds))
    for method in METHODS:
        settings = {"method": method.name, "epochs": study.epochs}

        def on_pair(
            candidate: tuple[float, float], held_out: list[int], settings: dict[str, object] = settings
        ) -> list[float]:
            lr, decay = candidate
            seed = 100 + study.folds * held_out[0] + held_out[1]
            return [
                loss
                for loss, _ in study.run(fit, lr=lr, decay=decay, held_out=held_out, seed=seed, **settings)
            ]

        chosen = []
        for fold in folds:
            lr, _ = study.choose_for_fold(
                fold, folds, [(lr, 0.0) for lr in study.grid(method.lrs)], on_pair, **settings
            )
            chosen.append(
                study.choose_for_fold(
                    fold, folds, [(lr, decay) for decay in method.decays], on_pair, **settings
                )
            )
        found = {}
        for factor in FACTORS:
            found[factor] = [
                [
                    study.run(fit, lr=factor * lr, decay=decay, held_out=[fold], seed=seed, **settings)[0]
                    for fold, (lr, decay) in zip(folds, chosen, strict=True)
                ]
                for seed in study.seeds
            ]
        losses = {
            factor: [statistics.fmean(loss for loss, _ in by_fold) for by_fold in by_seed]
            for factor, by_seed in found.items()
        }
        study.add(
            {
                "optimizer": method.name,
                "lr": span([lr for lr, _ in chosen]),
                "decay": span([decay for _, decay in chosen]),
                "test loss": losses[1.0],
                "test accuracy (%)": [
                    statistics.fmean(accuracy for _, accuracy in by_fold) for by_fold in found[1.0]
                ],
                "loss at half the lr": losses[0.5],
                "loss at twice the lr": losses[2.0],
            }
        )

    figure, axes = panels(1, 2, 10, 4.5)
    for panel, key in zip(axes[0], ("test loss", "test accuracy (%)"), strict=True):
        for place, (method, row) in enumerate(zip(METHODS, study.rows, strict=True)):
            colour = ORANGE if method.schedule else BLUE
            panel.plot(row[key], [place] * len(row[key]), "o", color=colour, alpha=0.4)
            panel.plot(
                [statistics.fmean(row[key])], [place], "|", color=colour, markersize=18, markeredgewidth=2
            )
        panel.set(xlabel=key, yticks=range(len(METHODS)), yticklabels=[method.name for method in METHODS])
        panel.invert_yaxis()
    axes[0, 1].set_yticklabels([])
    figure.suptitle(f"Digits, {study.epochs} epochs, cross-validated: dots are seeds, bars their means")
    study.show(figure)


if __name__ == "__main__":
    main()
