"""How much AdamWScheduleFree and SGDScheduleFree depend on learning rate, beta and warmup, on digits.

Each field of the heat maps is the mean validation loss at ``x`` over the seeds. Nothing is tuned, and the
test part is not used.

    python studies/sensitivity.py
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from common import BATCH_SIZE, WARMUP, Method, Study, digits, panels, powers, run
from schedulefree_cpp import AdamWScheduleFree, SGDScheduleFree

BETAS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
WARMUPS = (0.0, 0.05, 0.1, 0.2, 0.5)  # of the steps
OPTIMIZERS = {
    "AdamWScheduleFree": (AdamWScheduleFree, powers(-10, -3), lambda beta: {"betas": (beta, 0.99)}),
    "SGDScheduleFree": (SGDScheduleFree, powers(-4, 3), lambda beta: {"momentum": beta}),
}


def draw(panel: Any, losses: Sequence[Sequence[float]], lrs: Sequence[float], others: Sequence[float]) -> Any:
    """Draws a heat map of the logarithm of the losses, with the losses in its fields."""
    image = panel.imshow(
        [[math.log10(min(loss, 2.0)) for loss in row] for row in losses],
        cmap="viridis_r",
        vmin=-1.5,
        vmax=0.3,
    )
    for i, row in enumerate(losses):
        for j, loss in enumerate(row):
            panel.text(
                j,
                i,
                f"{loss:.2g}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if loss > 0.1 else "black",
            )
    panel.set(
        xticks=range(len(lrs)), yticks=range(len(others)), yticklabels=[f"{other:g}" for other in others]
    )
    panel.set_xticklabels([f"{lr:.2g}" for lr in lrs], rotation=45, fontsize=8)
    panel.set_xlabel("learning rate")
    return image


def main() -> None:
    """Trains over two grids for each optimizer."""
    study = Study(__file__, __doc__ or "", {"epochs": 1}, (), epochs=8, seeds=3)
    problem, data = digits()
    steps = study.epochs * (len(data.train.labels) // BATCH_SIZE)
    betas, warmups = study.grid(BETAS), study.grid(WARMUPS)
    lrs_of = {name: study.grid(lrs) for name, (_, lrs, _) in OPTIMIZERS.items()}
    fields = sum(len(lrs) for lrs in lrs_of.values()) * (len(betas) + len(warmups))
    bar = study.bar(fields * len(study.seeds))
    figure, axes = panels(2, 2, 11, 8)
    for i, (name, (optimizer, _, options)) in enumerate(OPTIMIZERS.items()):
        lrs = lrs_of[name]
        for j, (what, values) in enumerate({"beta": betas, "warmup": warmups}.items()):
            losses = []
            for value in values:
                beta, warmup = (value, WARMUP) if what == "beta" else (0.9, value)
                method = Method(name, optimizer, lrs, options=options(beta), warmup=warmup)
                by_lr = []
                for lr in lrs:
                    by_lr.append(
                        [run(problem, data, method, lr, steps, s, "validation")[0] for s in study.seeds]
                    )
                    bar.update(len(study.seeds))
                means = [statistics.fmean(each) for each in by_lr]
                best = means.index(min(means))
                study.add(
                    {
                        "optimizer": name,
                        "beta": beta,
                        "warmup (of the steps)": warmup,
                        "best lr": lrs[best],
                        "validation loss": by_lr[best],
                        "at a quarter of that lr": by_lr[best - 2] if best >= 2 else "",
                        "at four times that lr": by_lr[best + 2] if best + 2 < len(lrs) else "",
                    }
                )
                losses.append(means)
            draw(axes[i, j], losses, lrs, values)
            axes[i, j].set(title=f"{name}, " + ("warmup 0.05" if what == "beta" else "beta 0.9"), ylabel=what)
    bar.close()
    figure.suptitle(f"Digits, {study.epochs} epochs: validation loss at x, mean of {len(study.seeds)} seeds")
    study.show(figure)


if __name__ == "__main__":
    main()
