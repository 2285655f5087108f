"""A small GPT: one schedule-free run beside cosine runs of five lengths, WSD, and an EMA.

Model and text are those of ``examples/charlm.py``; a run of all steps sees about as many bytes as the text
has. For every contender learning rate, then decay, are chosen at one budget, a quarter of the steps, by the
mean of three seeds on half of the held-out text. Beta is chosen so, too; each beta and each batch size
chooses a learning rate of its own. Reported are the other half of the text and other seeds, which are
paired: all contenders have the same initial weights and, at the same batch size, the same batches.

    python studies/gpt.py
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from common import BLUE, GREEN, GREY, ORANGE, Study, averaged, bounded, load_example, panels
from schedulefree_cpp import AdamWScheduleFree
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

TUNING_SEEDS = (100, 101, 102)
LRS = (0.00125, 0.0025, 0.005, 0.01, 0.02)
DECAYS = (0.0, 0.1, 0.3)
FIRST_DECAY = 0.1  # with which learning rates are chosen
BETAS = (0.9, 0.95, 0.98)
EXTREME_BETAS = (0.1, 1.0)
DECOUPLED = ((0.9, 50.0), (0.95, 10.0), (0.95, 50.0), (0.98, 10.0))  # C = 1/(1-beta) would change nothing
EMAS = (0.95, 0.98, 0.99, 0.995)
BETA2, CLIP = 0.99, 1.0
WARMUP = 0.05  # of the tuning budget; of a cosine run, of its own length
COOL_DOWN = 0.2  # of a horizon, with WSD
HEADS = 4
RESAMPLES = 2000
PURPLE = "#CC79A7"

EXAMPLE = load_example("charlm")
Curve = list[list[float]]  # pairs of a step and bits per byte


# ---- runs ----------------------------------------------------------------------------------------------


@cache
def text() -> dict[str, Tensor]:
    """Bytes to train on, to choose by, and to report."""
    train, held_out = EXAMPLE.load_text(5_000_000)
    middle = len(held_out) // 2
    return {"train": train, "validation": held_out[:middle], "test": held_out[middle:]}


def windows(part: str, batch: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same windows of a part of the text for the same seed."""
    drawn = EXAMPLE.draw_batch(text()[part], batch, context, torch.Generator().manual_seed(seed))
    return drawn[0], drawn[1]


def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """The mean loss of a byte."""
    return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


@torch.no_grad()
def bits(model: nn.Module, part: str) -> float:
    """Bits per byte of 128 windows, always the same."""
    context = next(module.context for module in model.modules() if isinstance(module, EXAMPLE.GPT))
    inputs, targets = windows(part, 128, context, seed=1)
    pieces = zip(inputs.split(32), targets.split(32), strict=True)
    return bounded(statistics.fmean(loss_of(model, *piece).item() for piece in pieces) / math.log(2))


class Run:
    """A model in training, with batches that depend on seed and step alone, so that a copy sees the same."""

    def __init__(self, size: Sequence[int], batch: int, seed: int, make: Callable[..., Optimizer]) -> None:
        """Makes the model from its width, layers and context."""
        width, layers, self.context = size
        torch.manual_seed(seed)
        self.model: nn.Module = EXAMPLE.GPT(self.context, width, HEADS, layers)
        self.optimizer = make(self.model.parameters())
        self.batch, self.seed, self.done = batch, seed, 0

    def steps(self, last: int, lr_at: Callable[[int], float] | None = None) -> Iterator[int]:
        """Trains up to a step, at ``lr_at(step)`` if there is a schedule; yields after each step."""
        while self.done < last:
            if lr_at is not None:
                for group in self.optimizer.param_groups:
                    group["lr"] = lr_at(self.done)
            batch = windows("train", self.batch, self.context, seed=1_000_000 * self.seed + self.done)
            self.optimizer.zero_grad()
            loss_of(self.model, *batch).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimizer.step()
            self.done += 1
            yield self.done

    def measured(self, marks: Sequence[int], part: str, lr_at: Callable[[int], float] | None = None) -> Curve:
        """Trains up to the last mark; returns the bits at all of them, at ``x`` if there is one."""
        curve = []
        for step in self.steps(marks[-1], lr_at):
            if step in marks:
                with averaged(self.optimizer):
                    curve.append([step, bits(self.model, part)])
        return curve


def adamw(lr: float, decay: float) -> Callable[..., Optimizer]:
    """AdamW as all schedules have it."""
    return lambda params: torch.optim.AdamW(params, lr=lr, betas=(0.9, BETA2), weight_decay=decay)


def warmed(lr: float, warmup: int, step: int) -> float:
    """A learning rate that rises over the warmup and stays."""
    return lr * min(1.0, (step + 1) / max(1, warmup))


def schedule_free(
    lr: float,
    decay: float,
    beta: float,
    c: float,
    warmup: int,
    size: list[int],
    batch: int,
    seed: int,
    marks: list[int],
    part: str,
) -> Curve:
    """Bits at ``x`` of one run at all marks."""

    def make(params: Any) -> Optimizer:
        return AdamWScheduleFree(
            params,
            lr=lr,
            betas=(beta, BETA2),
            weight_decay=decay,
            warmup_steps=warmup,
            decoupling_c=c,
        )

    run = Run(size, batch, seed, make)
    run.optimizer.train()  # type: ignore[attr-defined]
    return run.measured(marks, part)


def cosine(
    lr: float, decay: float, size: list[int], batch: int, seed: int, marks: list[int], part: str
) -> Curve:
    """Bits at the marks of a run that is planned to end at the last."""
    last = marks[-1]
    warmup = round(WARMUP * last)

    def lr_at(step: int) -> float:
        return warmed(lr, warmup, step) * 0.5 * (1 + math.cos(math.pi * step / last))

    return Run(size, batch, seed, adamw(lr, decay)).measured(marks, part, lr_at)


def constant(
    lr: float,
    decay: float,
    warmup: int,
    size: list[int],
    batch: int,
    seed: int,
    horizons: list[int],
    marks: list[int],
    part: str,
) -> dict[str, Curve]:
    """Bits of a constant rate at the marks, of its EMAs there, and after a cool-down to each horizon."""
    run = Run(size, batch, seed, adamw(lr, decay))
    emas = {f"EMA {d:g}": AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(d)) for d in EMAS}
    found: dict[str, Curve] = {name: [] for name in ("constant", "WSD", *emas)}
    leaves = {min(horizon - 1, round((1 - COOL_DOWN) * horizon)): horizon for horizon in horizons}

    def cool_down(horizon: int) -> None:
        branch = copy.copy(run)
        branch.model, branch.optimizer = copy.deepcopy((run.model, run.optimizer))
        begin = run.done

        def lr_at(step: int) -> float:
            return warmed(lr, warmup, step) * (horizon - step) / (horizon - begin)

        found["WSD"] += branch.measured([horizon], part, lr_at)

    for step in run.steps(marks[-1], lambda step: warmed(lr, warmup, step)):
        for average in emas.values():
            average.update_parameters(run.model)  # type: ignore[no-untyped-call]
        if step in leaves:
            cool_down(leaves[step])
        if step in marks:
            for name, model in {"constant": run.model, **emas}.items():
                found[name].append([step, bits(model, part)])
    return found


def end_of(curve: Curve) -> float:
    """The bits at the last mark."""
    return curve[-1][1]


# ---- steps to a loss -----------------------------------------------------------------------------------


def steps_to(target: float, steps: Sequence[float], losses: Sequence[float]) -> float:
    """Where a curve first comes down to the target, between two points by the logarithm of the steps."""
    for i, loss in enumerate(losses):
        if loss <= target:
            if i == 0:
                return steps[0]
            part = (losses[i - 1] - target) / (losses[i - 1] - loss)
            return math.exp(math.log(steps[i - 1]) * (1 - part) + math.log(steps[i]) * part)
    return math.inf


def ratio(curves: Sequence[Curve], ends: Sequence[Curve], horizon: int) -> str:
    """Steps to the loss of the cosine run of this horizon, as a part of the horizon, with its interval.

    The interval holds 95% of what resampled seeds give (bootstrap), both sides with the same seeds.

    Args:
        curves: of the contender, by seed.
        ends: pairs of a horizon and the loss of the cosine run that ends there, by seed.
        horizon: in steps.
    """
    curve, end = np.array(curves), np.array(ends)
    place = end[0, :, 0].tolist().index(horizon)
    seeds = np.arange(len(curve))

    def of(sample: Any) -> float:
        target = end[sample, place, 1].mean()
        return steps_to(target, curve[0, :, 0].tolist(), curve[sample, :, 1].mean(0).tolist()) / horizon

    generator = np.random.default_rng(0)
    resampled = sorted(of(generator.choice(seeds, len(seeds))) for _ in range(RESAMPLES))
    tail = round(0.025 * RESAMPLES)
    least, most = resampled[tail], resampled[-1 - tail]

    def shown(value: float) -> str:
        return f"{value:.2f}" if math.isfinite(value) else "not reached"

    return f"{shown(of(seeds))} ({shown(least)} to {shown(most)})"


# ---- the study -----------------------------------------------------------------------------------------


class Contenders:
    """What the contenders choose, and their runs."""

    def __init__(self, study: Study) -> None:
        """Sizes of everything."""
        self.study, self.batch = study, study.batch
        self.size = [study.width, study.layers, study.context]
        self.horizons = [study.steps // 2**i for i in range(4, -1, -1)]
        self.budget = study.steps // 4
        self.tuning_seeds = TUNING_SEEDS[:1] if study.quick else TUNING_SEEDS

    def marks(self, last: int, octaves: int = 6) -> list[int]:
        """Steps at which a run is measured: four in each doubling, the horizons among them."""
        return sorted({max(1, round(last / 2 ** (i / 4))) for i in range(4 * octaves + 1)})

    def scaled(self, steps: int, batch: int) -> int:
        """Steps of another batch size that see as many bytes."""
        return max(1, steps * self.batch // batch)

    def common(self, steps: int, batch: int, seed: int, report: bool) -> dict[str, Any]:
        """Settings of every run: one that is reported is measured on its way, too."""
        last = self.scaled(steps, batch)
        marks, part = (self.marks(last), "test") if report else ([last], "validation")
        return {"size": self.size, "batch": batch, "seed": seed, "marks": marks, "part": part}

    def warmup(self, batch: int) -> int:
        """Steps of warmup of the runs that are planned for no length."""
        return round(WARMUP * self.scaled(self.budget, batch))

    def free(
        self,
        lr: float,
        decay: float,
        seed: int,
        beta: float,
        c: float = 0.0,
        batch: int = 0,
        report: bool = False,
    ) -> Curve:
        """A schedule-free run."""
        batch = batch or self.batch
        settings = self.common(self.study.steps if report else self.budget, batch, seed, report)
        return self.study.run(  # type: ignore[no-any-return]
            schedule_free, lr=lr, decay=decay, beta=beta, c=c, warmup=self.warmup(batch), **settings
        )

    def cosine(
        self, lr: float, decay: float, seed: int, steps: int = 0, batch: int = 0, report: bool = False
    ) -> Curve:
        """A cosine run, as long as the tuning budget if nothing else is said."""
        settings = self.common(steps or self.budget, batch or self.batch, seed, report)
        return self.study.run(cosine, lr=lr, decay=decay, **settings)  # type: ignore[no-any-return]

    def constant(self, lr: float, decay: float, seed: int, report: bool = False) -> dict[str, Curve]:
        """A run of a constant rate, with cool-downs and averages."""
        settings = self.common(self.study.steps if report else self.budget, self.batch, seed, report)
        horizons = [self.horizons[0] // 2, *self.horizons] if report else [self.budget]
        return self.study.run(  # type: ignore[no-any-return]
            constant, lr=lr, decay=decay, warmup=self.warmup(self.batch), horizons=horizons, **settings
        )

    def choose(
        self,
        name: str,
        end: Callable[[float, float, int], float],
        lrs: Sequence[float] = LRS,
        decays: Sequence[float] = DECAYS,
        first_decay: float = FIRST_DECAY,
    ) -> tuple[float, float]:
        """The learning rate, then the decay, with the least mean of ``end(lr, decay, seed)``."""

        def losses(candidate: tuple[float, float]) -> list[float]:
            return [end(*candidate, seed) for seed in self.tuning_seeds]

        tried = [(lr, first_decay) for lr in self.study.grid(lrs)]
        lr, _ = self.study.choose(tried, losses, contender=name, choice="lr")
        if not decays:
            return lr, first_decay
        return self.study.choose([(lr, d) for d in decays], losses, contender=name, choice="decay")


def around(lr: float) -> list[float]:
    """Learning rates to choose from near one that is known."""
    return [lr / 2, lr, 2 * lr]


def main() -> None:
    """Chooses, then trains and tests."""
    quick = {"steps": 32, "width": 16, "layers": 1, "context": 16, "batch": 4}
    sizes = {"width": 64, "layers": 4, "context": 64, "batch": 32}
    study = Study(__file__, __doc__ or "", quick, steps=2000, **({"seeds": 3} | sizes))
    study.expect(74 if study.quick else 150 + 24 * len(study.seeds))
    on = Contenders(study)
    horizons, seeds = on.horizons, study.seeds
    runs: dict[str, tuple[float, float, list[Curve]]] = {}  # by name: lr, decay, and curves by seed

    # Schedule-free: learning rate and decay at beta 0.9, then the learning rates of the other betas.
    chosen = {BETAS[0]: on.choose("schedule-free", lambda *s: end_of(on.free(*s, BETAS[0])))}
    lr, decay = chosen[BETAS[0]]
    for beta in (*BETAS[1:], *EXTREME_BETAS):
        chosen[beta] = on.choose(
            f"schedule-free, beta {beta:g}",
            lambda *s, beta=beta: end_of(on.free(*s, beta)),  # type: ignore[misc]
            around(lr),
            (),
            decay,
        )
    best = study.choose(
        BETAS,
        lambda beta: [end_of(on.free(*chosen[beta], seed, beta)) for seed in on.tuning_seeds],
        contender="schedule-free",
        choice="beta",
    )
    free = f"AdamWScheduleFree, beta {best:g}"
    for beta, c in (*((beta, 0.0) for beta in (*BETAS, *EXTREME_BETAS)), *DECOUPLED):
        name = f"AdamWScheduleFree, beta {beta:g}" + (f", C {c:g}" if c else "")
        runs[name] = (
            *chosen[beta],
            [on.free(*chosen[beta], seed, beta, c, report=True) for seed in seeds],
        )

    # Cosine, a run for each horizon; WSD, and the best EMA of a constant rate.
    lr, decay = on.choose("cosine", lambda *s: end_of(on.cosine(*s)))
    cosines = {h: [on.cosine(lr, decay, seed, h, report=True) for seed in seeds] for h in horizons}
    ends = [[cosines[h][seed][-1] for h in horizons] for seed in seeds]
    runs["AdamW, cosine"] = lr, decay, ends
    cosine_lr, cosine_decay = lr, decay
    lr, decay = on.choose("WSD", lambda *s: end_of(on.constant(*s)["WSD"]))
    runs["AdamW, WSD"] = lr, decay, [on.constant(lr, decay, seed, report=True)["WSD"] for seed in seeds]
    by_ema = {
        f"EMA {d:g}": on.choose(f"EMA {d:g}", lambda *s, d=d: end_of(on.constant(*s)[f"EMA {d:g}"]))  # type: ignore[misc]
        for d in EMAS
    }
    ema = study.choose(
        list(by_ema),
        lambda name: [end_of(on.constant(*by_ema[name], seed)[name]) for seed in on.tuning_seeds],
        contender="EMA",
        choice="its decay rate",
    )
    of_constant = [on.constant(*by_ema[ema], seed, report=True) for seed in seeds]
    runs[f"AdamW, constant, {ema}"] = *by_ema[ema], [each[ema] for each in of_constant]
    runs["the same without EMA"] = *by_ema[ema], [each["constant"] for each in of_constant]

    # Learning rates beside those that were chosen.
    for factor, what in ((0.5, "half"), (2.0, "twice")):
        lr, decay = chosen[best]
        curves = [on.free(factor * lr, decay, seed, best, report=True) for seed in seeds]
        runs[f"{free}, {what} the lr"] = factor * lr, decay, curves
        lr, decay = factor * cosine_lr, cosine_decay
        curves = [on.cosine(lr, decay, seed, study.steps, report=True)[-1:] for seed in seeds]
        runs[f"AdamW, cosine, {what} the lr"] = lr, decay, curves

    # Batch sizes at as many bytes.
    for batch in (on.batch // 4, 4 * on.batch):
        lr, decay = chosen[best]
        lr, _ = on.choose(
            f"{free}, batch {batch}",
            lambda *s, batch=batch: end_of(on.free(*s, best, batch=batch)),  # type: ignore[misc]
            around(lr),
            (),
            decay,
        )
        curves = [on.free(lr, decay, seed, best, batch=batch, report=True) for seed in seeds]
        in_our_steps = [[[step * batch / on.batch, loss] for step, loss in curve] for curve in curves]
        runs[f"{free}, batch {batch}"] = lr, decay, in_our_steps
        lr, decay = on.choose(
            f"cosine, batch {batch}",
            lambda *s, batch=batch: end_of(on.cosine(*s, batch=batch)),  # type: ignore[misc]
            around(cosine_lr),
            (),
            cosine_decay,
        )
        curves = [on.cosine(lr, decay, seed, study.steps, batch, report=True)[-1:] for seed in seeds]
        in_our_steps = [[[step * batch / on.batch, loss] for step, loss in curve] for curve in curves]
        runs[f"AdamW, cosine, batch {batch}"] = lr, decay, in_our_steps

    for name, (lr, decay, curves) in runs.items():
        by_step = [dict(map(tuple, curve)) for curve in curves]  # type: ignore[arg-type]
        row: dict[str, Any] = {"contender": name, "lr": lr, "decay": decay}
        for h in horizons:
            row[f"bits per byte at {h}"] = [each[h] for each in by_step] if h in by_step[0] else ""
        study.add(row)
    front = (free, "AdamW, WSD", f"AdamW, constant, {ema}")
    for name in front:
        row = {"contender": name}
        for h in horizons:
            row[f"steps to the loss of cosine at {h}, as a part of {h}"] = ratio(runs[name][2], ends, h)
        study.add(row)

    figure, axes = panels(1, 1, 9, 6)
    panel = axes[0, 0]
    for h in horizons:
        mean = np.array(cosines[h]).mean(0)
        panel.plot(mean[:, 0], mean[:, 1], color=ORANGE, linewidth=0.8, alpha=0.5)
    colours = {free: BLUE, front[2]: GREEN, "the same without EMA": GREY}
    for name, colour in colours.items():
        losses = np.array(runs[name][2])
        steps, mean, low, high = losses[0, :, 0], *(f(losses[:, :, 1], 0) for f in (np.mean, np.min, np.max))
        label = "AdamW, constant, alone" if name == "the same without EMA" else f"{name}: one run"
        panel.plot(steps, mean, color=colour, linewidth=2 if colour != GREY else 0.8, label=label)
        panel.fill_between(steps, low, high, color=colour, alpha=0.15)
    for name, colour, marker in (("AdamW, cosine", ORANGE, "D"), ("AdamW, WSD", PURPLE, "s")):
        mean = np.array(runs[name][2]).mean(0)
        panel.plot(
            mean[:, 0], mean[:, 1], marker, linestyle="--", color=colour, label=f"{name}: planned ends"
        )
    shown = [loss for curve in runs[free][2] for step, loss in curve if step >= horizons[0] / 2]
    low = min(loss for name in front for curve in runs[name][2] for _, loss in curve)
    panel.set(xscale="log", xlim=(horizons[0] / 2, 1.1 * study.steps), ylim=(0.98 * low, 1.02 * max(shown)))
    panel.set(xlabel=f"steps of {on.batch} windows", ylabel="bits per byte of held-out text")
    size = sum(p.numel() for p in EXAMPLE.GPT(study.context, study.width, HEADS, study.layers).parameters())
    panel.set_title(f"GPT of {size:,} parameters, {len(seeds)} seeds: means, and all between least and most")
    panel.legend()
    study.show(figure)


if __name__ == "__main__":
    main()
