"""Anytime: the test loss of ``x`` at every step of one run, against cosine runs of six lengths.

Every cosine run chooses its learning rate for its own length. The schedule-free run and the run of a constant
learning rate choose theirs once, at the end of the longest: what they have before that is not tuned for. All
choose among eight, by the validation loss of two seeds that are not reported.

    python studies/anytime.py
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from common import (
    BATCH_SIZE,
    BLUE,
    GREEN,
    GREY,
    Method,
    Study,
    averaged,
    digits,
    panels,
    powers,
    run,
    score,
    train,
)
from schedulefree_cpp import AdamWScheduleFree

ADAM = {"betas": (0.9, 0.99), "weight_decay": 0.0}
COSINE = Method("AdamW, cosine", torch.optim.AdamW, powers(-10, -3), "cosine", ADAM)
ANYTIME = (
    Method("AdamWScheduleFree", AdamWScheduleFree, powers(-10, -3), options=ADAM),
    Method("AdamW, constant", torch.optim.AdamW, powers(-10, -3), "constant", ADAM),
)
EVERY = 4  # steps between tests of the runs that are not schedule-free; divides the steps of an epoch


def main() -> None:
    """Tunes, then trains and tests at every step."""
    study = Study(__file__, __doc__ or "", {"epochs": 2}, epochs=32)
    problem, data = digits()
    epoch = len(data.train.labels) // BATCH_SIZE
    lengths = sorted({study.epochs // 2**i for i in range(6)} - {0})
    jobs = [*((method, study.epochs) for method in ANYTIME), *((COSINE, length) for length in lengths)]
    bar = study.bar(sum(study.tries(method) + len(study.seeds) for method, _ in jobs))
    curves = []

    def at_end(steps: int, method: Method, lr: float, seed: int) -> float:
        bar.update()
        return run(problem, data, method, lr, steps, seed, "validation")[0]

    for method, epochs in jobs:
        if method.schedule != "cosine":  # one epoch, whatever the length
            method = replace(method, warmup=1 / epochs)
        steps = epochs * epoch
        lr = study.tune(method, partial(at_end, steps), epochs=epochs)
        every = EVERY if method.schedule else 1
        losses = torch.zeros(len(study.seeds), steps // every, dtype=torch.float64)
        for seed in study.seeds:
            for step, (model, optimizer) in enumerate(train(problem, method, lr, steps, seed), 1):
                if step % every == 0:
                    with averaged(optimizer):
                        losses[seed, step // every - 1] = score(model, data.test, data.train)[0]
            bar.update()
        curves.append((lr, losses))
    bar.close()

    (free_lr, free), (constant_lr, constant), *cosines = curves
    figure, axes = panels(1, 1, 9, 5.5)
    panel = axes[0, 0]
    for length, (lr, losses) in zip(lengths, cosines, strict=True):
        end = length * epoch
        at_x, at_end_of_cosine = free[:, end - 1], losses[:, -1]
        study.add(
            {
                "epochs": length,
                "AdamW, cosine of this length": at_end_of_cosine.tolist(),
                "its lr": lr,
                f"AdamWScheduleFree, lr {free_lr:.3g}": at_x.tolist(),
                f"AdamW, constant lr {constant_lr:.3g}": constant[:, end // EVERY - 1].tolist(),
                "schedule-free minus cosine": (at_x - at_end_of_cosine).tolist(),
            }
        )
        panel.plot(range(EVERY, end + 1, EVERY), losses.mean(0), "--", color=GREY, linewidth=1)
        panel.errorbar(end, at_end_of_cosine.mean(), at_end_of_cosine.std(), fmt="D", color=GREY, capsize=4)
    lines = (("AdamW, constant", constant, GREEN, EVERY), ("AdamWScheduleFree", free, BLUE, 1))
    for name, losses, colour, every in lines:
        mean, spread = losses.mean(0), losses.std(0)
        at = range(every, every * len(mean) + 1, every)
        panel.plot(at, mean, color=colour, linewidth=2, label=f"{name}, one run")
        panel.fill_between(at, mean - spread, mean + spread, color=colour, alpha=0.15)
    panel.plot([], [], "D--", color=GREY, label="AdamW, cosine of six lengths")
    panel.set(xscale="log", yscale="log", xlabel="steps", ylabel="test loss")
    panel.legend()
    study.show(figure)


if __name__ == "__main__":
    main()
