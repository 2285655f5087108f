"""Anytime: the test loss of ``x`` during one run, against cosine runs of six lengths, cross-validated.

Every cosine run has a learning rate for its own length. The schedule-free run and the run of a constant
learning rate have one each, the best at the end of the longest: what they have before that is not tuned for.
All choose among six for each of six folds of the images, by what they do on the other five folds.

    python studies/anytime.py
"""

from __future__ import annotations

from dataclasses import replace

import torch
from common import (
    BATCH_SIZE,
    BLUE,
    GREEN,
    GREY,
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
from schedulefree_cpp import AdamWScheduleFree

ADAM = {"betas": (0.9, 0.99)}
LRS = powers(-9, -4)
COSINE = Method("AdamW, cosine", torch.optim.AdamW, LRS, "cosine", ADAM)
FREE = Method("AdamWScheduleFree", AdamWScheduleFree, LRS, options=ADAM)
CONSTANT = Method("AdamW, constant", torch.optim.AdamW, LRS, "constant", ADAM)
METHOD_OF = {method.name: method for method in (COSINE, FREE, CONSTANT)}


def marks(steps: int) -> list[int]:
    """Steps at which a run is tested: four in each doubling."""
    return sorted({round(steps / 2 ** (i / 4)) for i in range(33)} - {0})


def main() -> None:
    """Chooses for each fold, then trains and tests on the way."""
    study = Study(__file__, __doc__ or "", {"epochs": 2, "folds": 3, "seeds": 1}, epochs=32, folds=6)
    digits = Digits(study.folds)
    folds = digits.folds
    lengths = sorted({study.epochs // 2**i for i in range(6)} - {0})
    jobs = [(FREE, study.epochs), (CONSTANT, study.epochs), *((COSINE, length) for length in lengths)]
    pairs = len(folds) * (len(folds) - 1) // 2
    study.expect(len(jobs) * (pairs * len(study.grid(LRS)) + len(folds) * len(study.seeds)))

    def method_of(name: str, epochs: int) -> Method:
        method = METHOD_OF[name]
        return method if method is COSINE else replace(method, warmup=1 / epochs)  # one epoch

    def at_end(method: str, lr: float, epochs: int, held_out: list[int], seed: int) -> list[float]:
        """The loss on each fold that was held out."""
        found = digits.run(method_of(method, epochs), lr, 0.0, epochs, held_out, seed)
        return [loss for loss, _ in found]

    def curve(method: str, lr: float, epochs: int, fold: int, seed: int) -> list[float]:
        """The loss on a fold at all marks."""
        problem, part = digits.without([fold])
        steps = epochs * (len(part.labels) // BATCH_SIZE)
        found = []
        for step, (model, optimizer) in enumerate(
            train(problem, method_of(method, epochs), lr, steps, seed), 1
        ):
            if step in marks(steps):
                with averaged(optimizer):
                    found.append(score(model, digits.part([fold]), part)[0])
        return found

    curves = []
    for method, epochs in jobs:
        settings = {"method": method.name, "epochs": epochs}

        def on_pair(lr: float, held_out: list[int], settings: dict[str, object] = settings) -> list[float]:
            seed = 100 + study.folds * held_out[0] + held_out[1]
            return study.run(at_end, lr=lr, held_out=held_out, seed=seed, **settings)  # type: ignore[no-any-return]

        lrs = [study.choose_for_fold(fold, folds, study.grid(LRS), on_pair, **settings) for fold in folds]
        found = [
            [
                study.run(curve, lr=lr, fold=fold, seed=seed, **settings)
                for fold, lr in zip(folds, lrs, strict=True)
            ]
            for seed in study.seeds
        ]
        curves.append((lrs, torch.tensor(found, dtype=torch.float64).mean(1)))  # by seed and mark

    (free_lrs, free), (constant_lrs, constant), *cosines = curves
    epoch = digits.epoch([0])
    longest = marks(study.epochs * epoch)
    figure, axes = panels(1, 1, 9, 5.5)
    panel = axes[0, 0]
    for length, (lrs, losses) in zip(lengths, cosines, strict=True):
        end = longest.index(length * epoch)
        at_x, at_end_of_cosine = free[:, end], losses[:, -1]
        study.add(
            {
                "epochs": length,
                "AdamW, cosine of this length": at_end_of_cosine.tolist(),
                "its lr": span(lrs),
                f"AdamWScheduleFree, lr {span(free_lrs)}": at_x.tolist(),
                f"AdamW, constant lr {span(constant_lrs)}": constant[:, end].tolist(),
                "schedule-free minus cosine": (at_x - at_end_of_cosine).tolist(),
            }
        )
        panel.plot(marks(length * epoch), losses.mean(0), "--", color=GREY, linewidth=1)
        panel.errorbar(
            length * epoch, at_end_of_cosine.mean(), at_end_of_cosine.std(), fmt="D", color=GREY, capsize=4
        )
    for name, losses, colour in (("AdamW, constant", constant, GREEN), ("AdamWScheduleFree", free, BLUE)):
        mean, spread = losses.mean(0), losses.std(0)
        panel.plot(longest, mean, color=colour, linewidth=2, label=f"{name}, one run")
        panel.fill_between(longest, mean - spread, mean + spread, color=colour, alpha=0.15)
    panel.plot([], [], "D--", color=GREY, label="AdamW, cosine of six lengths")
    panel.set(xscale="log", yscale="log", xlabel="steps", ylabel="test loss")
    panel.legend()
    study.show(figure)


if __name__ == "__main__":
    main()
