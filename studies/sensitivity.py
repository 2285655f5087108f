"""How much AdamWScheduleFree and SGDScheduleFree depend on learning rate, beta and warmup, on digits.

Each field of the heat maps is the mean loss at ``x`` of six runs. Each is tested on a sixth of the images,
which it was not trained on, so a field is tested on all of them. Nothing is tuned.

    python studies/sensitivity.py
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from common import WARMUP, Digits, Method, Study, panels, powers
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
    study = Study(__file__, __doc__ or "", {"epochs": 1}, epochs=8, seeds=6)
    digits = Digits(max(2, len(study.seeds)))
    betas, warmups = study.grid(BETAS), study.grid(WARMUPS)
    lrs_of = {name: study.grid(lrs) for name, (_, lrs, _) in OPTIMIZERS.items()}

    def field(optimizer: str, lr: float, beta: float, warmup: float, epochs: int, fold: int) -> float:
        kind, _, options = OPTIMIZERS[optimizer]
        method = Method(optimizer, kind, [lr], options=options(beta), warmup=warmup)
        return digits.run(method, lr, 0.0, epochs, [fold], seed=fold)[0][0]

    grids = {"beta": [(beta, WARMUP) for beta in betas], "warmup": [(0.9, warmup) for warmup in warmups]}
    fields = sum(len(lrs) for lrs in lrs_of.values()) * len({*grids["beta"], *grids["warmup"]})
    study.expect(fields * len(study.seeds))
    figure, axes = panels(2, 2, 11, 8)
    for i, (name, lrs) in enumerate(lrs_of.items()):
        for j, (what, grid) in enumerate(grids.items()):
            losses = []
            for beta, warmup in grid:
                settings = {"optimizer": name, "beta": beta, "warmup": warmup, "epochs": study.epochs}
                by_lr = [[study.run(field, lr=lr, fold=s, **settings) for s in study.seeds] for lr in lrs]
                means = [statistics.fmean(each) for each in by_lr]
                best = means.index(min(means))
                study.add(
                    {
                        "optimizer": name,
                        "beta": beta,
                        "warmup (of the steps)": warmup,
                        "best lr": lrs[best],
                        "test loss": by_lr[best],
                        "at half that lr": by_lr[best - 1] if best >= 1 else "",
                        "at twice that lr": by_lr[best + 1] if best + 1 < len(lrs) else "",
                        "at a quarter of that lr": by_lr[best - 2] if best >= 2 else "",
                        "at four times that lr": by_lr[best + 2] if best + 2 < len(lrs) else "",
                    }
                )
                losses.append(means)
            draw(axes[i, j], losses, lrs, [pair[j] for pair in grid])
            axes[i, j].set(title=f"{name}, " + ("warmup 0.05" if what == "beta" else "beta 0.9"), ylabel=what)
    figure.suptitle(f"Digits, {study.epochs} epochs: test loss at x, mean of {len(study.seeds)} folds")
    study.show(figure)


if __name__ == "__main__":
    main()
