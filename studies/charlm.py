"""A small GPT on the standard library's sources: AdamWScheduleFree against AdamW with warmup and cosine.

Model, text and batches are those of ``examples/charlm.py``. Of both optimizers, learning rates are tried in
runs of a tenth of the steps, as many for each, on half of the held-out text; the loss on its other half is
reported. One seed, so there is no spread.

    python studies/charlm.py
    python studies/charlm.py --steps 500 --width 64 --layers 2
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from common import BLUE, ORANGE, Batches, Method, Problem, Study, averaged, load_example, panels, train
from schedulefree_cpp import AdamWScheduleFree
from torch import Tensor, nn
from torch.nn import functional

LRS = (0.000625, 0.00125, 0.0025, 0.005)
METHODS = (
    Method(
        "AdamWScheduleFree",
        AdamWScheduleFree,
        LRS,
        options={"betas": (0.95, 0.99)},
    ),
    Method(
        "AdamW, cosine",
        torch.optim.AdamW,
        LRS,
        "cosine",
        {"betas": (0.9, 0.99)},
    ),
)
HEADS = 4


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of a byte."""
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def main() -> None:
    """Tunes in short runs, then trains and tests."""
    quick = {"steps": 20, "width": 16, "layers": 1, "context": 32, "batch": 4, "seeds": 1}
    sizes = {"width": 160, "layers": 6, "context": 128, "batch": 16}
    study = Study(__file__, __doc__ or "", quick, steps=3000, seeds=1, **sizes)
    example = load_example("charlm")
    text, held_out = example.load_text(5_000_000)
    middle, context = len(held_out) // 2, study.context

    def make_model() -> nn.Module:
        model: nn.Module = example.GPT(context, study.width, HEADS, study.layers)
        return model

    def batches() -> Batches:
        generator = torch.Generator().manual_seed(torch.initial_seed())
        while True:
            yield example.draw_batch(text, study.batch, context, generator)

    problem = Problem(make_model, batches, loss_of, max_grad_norm=1.0)
    parts = {
        name: example.draw_batch(part, 128, context, torch.Generator().manual_seed(1))
        for name, part in (("validation", held_out[:middle]), ("test", held_out[middle:]))
    }

    @torch.no_grad()
    def bits(model: nn.Module, part: str) -> float:
        """Bits per byte of 128 windows, always the same."""
        model.eval()
        pieces = zip(*(each.split(32) for each in parts[part]), strict=True)
        loss = sum(loss_of(model, *piece).item() for piece in pieces) / 4 / math.log(2)
        return loss if math.isfinite(loss) else math.inf

    short = study.steps // 10
    marks = sorted({max(1, round(study.steps * i / 40)) for i in range(1, 41)})
    size = sum(p.numel() for p in make_model().parameters())
    study.expect(len(METHODS) * (len(study.grid(LRS)) + len(study.seeds)))

    def curve(
        method: int, lr: float, marks: list[int], seed: int, part: str, sizes: dict[str, int]
    ) -> list[float]:
        found = []
        for step, (model, optimizer) in enumerate(
            train(problem, METHODS[method], lr, marks[-1], seed, 0.1), 1
        ):
            if step in marks:
                with averaged(optimizer):
                    found.append(bits(model, part))
        return found

    given = {name: getattr(study, name) for name in sizes}
    figure, axes = panels(1, 1, 8, 5)
    for number, (method, colour) in enumerate(zip(METHODS, (BLUE, ORANGE), strict=True)):
        run = partial(study.run, curve, method=number, sizes=given)

        def short_run(lr: float, run: Any = run) -> list[float]:
            return [run(lr=lr, marks=[short], seed=100, part="validation")[-1]]

        lr = study.choose(study.grid(LRS), short_run, method=method.name)
        begin = study.cpu_seconds()
        found = [run(lr=lr, marks=marks, seed=seed, part="test") for seed in study.seeds]
        minutes = (study.cpu_seconds() - begin) / 60 / len(study.seeds)
        row: dict[str, Any] = {"optimizer": method.name, "lr": lr, "parameters": size}
        for part in (4, 2, 1):
            index = marks.index(max(1, round(study.steps / part)))
            row[f"bits per byte at step {marks[index]}"] = [each[index] for each in found]
        study.add({**row, "CPU minutes": round(minutes, 1)})
        axes[0, 0].plot(
            marks, torch.tensor(found).mean(0), ".-", color=colour, label=f"{method.name}, lr {lr:g}"
        )
    axes[0, 0].set(xlabel="steps", ylabel="bits per byte of held-out text")
    axes[0, 0].set_title(
        f"GPT of {size:,} parameters on the standard library's sources, {len(study.seeds)} seed"
    )
    axes[0, 0].legend()
    study.show(figure)


if __name__ == "__main__":
    main()
