"""Measures what a storage format of AdamW costs in accuracy, and draws it against bytes.

- *Quadratic*: 2000 parameters, gradients with noise 1, one optimum for each seed; the mean squared error of
  the average ``x`` against the optimum, divided by that of float32 with the same noise; and the distance of
  ``x`` from that of float32, divided by the latter's from the optimum (root mean squares). *Spread* has
  gradients whose scales lie between 2^-10 and 1 within every 128 elements. *Whole* takes gradients at the
  whole ``y``, so that what differs is storage alone; *word* takes them at the 16-bit parameter, as a model
  does. Noise and gradients are float32, and are cast to the parameter's dtype, which torch demands of
  ``p.grad``.
- *Digits* and *charlm* train the examples of these names, the latter with a smaller model, in the parameter's
  dtype, arithmetic included.

All formats take their steps side by side, with the same noise. Run it with

    python benchmarks/precision.py

Results go to ``benchmarks/results/precision.json``; the picture, which shows the distance, to
``docs/precision.png``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import schedulefree  # type: ignore[import-untyped]
import schedulefree_cpp
import torch
from matplotlib.figure import Figure
from schedulefree_cpp._core import formats
from torch import Tensor
from torch.nn import Parameter

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "precision.json"
PICTURE = ROOT / "docs" / "precision.png"
PARTS = ("quadratic", "digits", "charlm")

ELEMENTS = 2000
REFERENCE = "fp32"


@dataclass(frozen=True)
class Mode:
    """How AdamW stores its parameters and state, and how much worse than float32 it may be."""

    name: str
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    limit: float | None = None  # of the ratio of errors
    grad_dtype: torch.dtype | None = None  # that gradients are rounded to; None for the parameter's
    upstream: bool = False  # the package schedulefree

    def make(self, params: Sequence[Tensor], **settings: Any) -> Any:
        """The optimizer."""
        if self.upstream:
            return schedulefree.AdamWScheduleFree(params, foreach=True, **settings)
        return schedulefree_cpp.AdamWScheduleFree(params, **settings, **self.options)


BF16, FP16 = torch.bfloat16, torch.float16
MODES = (
    Mode(REFERENCE, torch.float32),
    Mode("fp32, 8-bit moment", torch.float32, {"exp_avg_sq_bits": 8}, 1.05),
    Mode("bf16", BF16),
    Mode("bf16, 8-bit moment", BF16, {"exp_avg_sq_bits": 8}, 1.05),
    Mode("fp16", FP16, {}, 1.01),
    Mode("fp16, 8-bit moment", FP16, {"exp_avg_sq_bits": 8}, 1.05),
    Mode("bf16, 24 bits", BF16, {"state_bits": 24}, 1.05),
    Mode("bf16, 24 bits at random", BF16, {"state_bits": 24, "rounding": "stochastic"}, 1.05),
    Mode("bf16, 24 bits, 8-bit moment", BF16, {"state_bits": 24, "exp_avg_sq_bits": 8}, 1.1),
    Mode(
        "bf16, 24 bits at random, 8-bit moment",
        BF16,
        {"state_bits": 24, "exp_avg_sq_bits": 8, "rounding": "stochastic"},
        1.1,
    ),
)
# Beside them on the quadratic. The first has the gradients of bf16, for a comparison bit by bit.
EXTRA = (
    Mode("fp32, bf16 gradients", torch.float32, grad_dtype=BF16),
    Mode("schedulefree bf16", BF16, upstream=True),
    Mode("schedulefree fp16", FP16, upstream=True),
)
SAME_BITS = {"bf16": "fp32, bf16 gradients"}


@dataclass(frozen=True)
class Problem:
    """A noisy quadratic."""

    name: str
    lr: float
    steps: int
    spread: bool = False
    at_word: bool = False  # gradients at the parameter instead of the whole y


PROBLEMS = (
    Problem("lr 1e-2", 1e-2, 5_000),
    Problem("lr 1e-4", 1e-4, 50_000),
    Problem("spread, lr 1e-2", 1e-2, 5_000, spread=True),
    Problem("word, lr 1e-2", 1e-2, 5_000, at_word=True),
)


# ---- the quadratic -------------------------------------------------------------------------------------


class Contender:
    """An optimizer with one parameter for each seed, all of them in one piece of memory."""

    def __init__(self, mode: Mode, seeds: int, lr: float) -> None:
        """Starts at 0."""
        self.mode = mode
        self.words = torch.zeros(seeds, ELEMENTS, dtype=mode.dtype)
        self.grads = torch.zeros_like(self.words)
        self.params = [Parameter(row) for row in self.words]
        for p, grad in zip(self.params, self.grads, strict=True):
            p.grad = grad
        self.optimizer = mode.make(self.params, lr=lr)
        self.optimizer.train()

    def whole(self) -> Tensor:
        """What the parameters and their low halves stand for, in float32."""
        state = self.optimizer.state[self.params[0]]
        low = None
        if "y_lo" in state:
            low = torch.stack([self.optimizer.state[p]["y_lo"] for p in self.params])
        return formats.load(self.words, low)

    @torch.no_grad()
    def step(self, target: Tensor, noise: Tensor, scales: Tensor, at_word: bool) -> None:
        """Takes a step by the gradient of half the squared distance to the target, plus noise, scaled."""
        at = self.words.float() if at_word else self.whole()
        grad = (at - target + noise) * scales
        if self.mode.grad_dtype is not None:
            grad = grad.to(self.mode.grad_dtype)
        self.grads.copy_(grad)
        self.optimizer.step()

    def bytes_for_a_parameter(self) -> float:
        """Bytes of parameters and state, counted from the tensors."""
        tensors = [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        total = sum(t.nbytes for t in [*self.params, *tensors])
        return total / (len(self.params) * ELEMENTS)


def solve(problem: Problem, seeds: int, steps: int) -> list[dict[str, Any]]:
    """Runs all modes on a problem.

    Args:
        problem: which.
        seeds: how many, counted from 0.
        steps: how many.

    Returns:
        For each mode the mean squared errors by seed, their ratio to those of float32, and more.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]

    def draw() -> Tensor:
        return torch.stack([torch.randn(ELEMENTS, generator=generator) for generator in generators])

    target = draw()
    scales = torch.ones(ELEMENTS)
    if problem.spread:
        scales = torch.exp2(-10 * (torch.arange(ELEMENTS) % 128) / 127)
    contenders = {mode.name: Contender(mode, seeds, problem.lr) for mode in (*MODES, *EXTRA)}
    for _ in range(steps):
        noise = draw()
        for contender in contenders.values():
            contender.step(target, noise, scales, problem.at_word)

    y = {name: contender.whole().clone() for name, contender in contenders.items()}
    rows = []
    x = {}
    for name, contender in contenders.items():
        contender.optimizer.eval()
        x[name] = contender.whole().double()
    errors = {name: (each - target).square().mean(1) for name, each in x.items()}
    for name, contender in contenders.items():
        mode, error = contender.mode, errors[name]
        ratio = (error.mean() / errors[REFERENCE].mean()).item()
        each = (error / errors[REFERENCE]).tolist()
        distance = ((x[name] - x[REFERENCE]).square().mean() / errors[REFERENCE].mean()).sqrt().item()
        same = None
        if name in SAME_BITS and not problem.at_word:
            same = torch.equal(y[name], y[SAME_BITS[name]])
        rows.append(
            {
                "problem": problem.name,
                "mode": name,
                "bytes": contender.bytes_for_a_parameter(),
                "mean squared errors": error.tolist(),
                "ratio": ratio if math.isfinite(ratio) else None,
                "ratios": each if all(map(math.isfinite, each)) else None,
                "distance": distance if math.isfinite(distance) else None,
                "limit": mode.limit,
                "met": None if mode.limit is None else ratio <= mode.limit,
                "same bits as float32": same,
            }
        )
    return rows


def print_problem(rows: Sequence[dict[str, Any]]) -> None:
    """Prints a problem's table."""
    print(
        f"\n{rows[0]['problem']:38}{'bytes':>7}{'error':>11}  {'ratio (by seed)':26}{'distance':>9}"
        f"{'limit':>7}  met"
    )
    for row in rows:
        error = statistics.fmean(row["mean squared errors"])
        ratio = "NaN"
        if row["ratio"] is not None:
            ratio = f"{row['ratio']:.4f} ({min(row['ratios']):.4f}-{max(row['ratios']):.4f})"
        distance = "NaN" if row["distance"] is None else f"{row['distance']:.4f}"
        limit = "" if row["limit"] is None else f"{row['limit']:g}"
        met = "" if row["met"] is None else "yes" if row["met"] else "no"
        if row["same bits as float32"] is not None:
            met += " all bits of float32" if row["same bits as float32"] else " other bits than float32"
        text = f"{row['mode']:38}{row['bytes']:7.3f}{error:11.4g}  {ratio:26}{distance:>9}{limit:>7}  {met}"
        print(text, flush=True)


# ---- the examples --------------------------------------------------------------------------------------


def load_example(name: str) -> ModuleType:
    """A script of ``examples`` as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def train_digits(mode: Mode, seed: int, epochs: int) -> dict[str, float]:
    """Test accuracy, in percent, and loss of the digits network."""
    digits = load_example("digits")
    data = digits.load_data()
    data.train_images = data.train_images.to(mode.dtype)
    data.test_images = data.test_images.to(mode.dtype)
    lr = digits.LEARNING_RATES["adamw"]
    *_, (accuracy, loss) = digits.train("adamw", epochs, seed, lr, data, mode.options)
    return {"accuracy": accuracy, "loss": loss}


def train_charlm(mode: Mode, seed: int, steps: int) -> dict[str, float]:
    """Bits per byte of validation text, at x."""
    charlm = load_example("charlm")
    given = ["--steps", steps, "--eval-every", steps, "--seed", seed, "--sample", 0, "--out", os.devnull]
    given += ["--width", 64, "--layers", 2, "--context", 64, "--batch", 8]
    given += ["--dtype", str(mode.dtype).removeprefix("torch.")]
    for option, value in mode.options.items():
        given += [f"--{option.replace('_', '-')}", value]
    charlm.__dict__["draw"] = lambda *_: None
    with contextlib.redirect_stdout(io.StringIO()):
        return {"bits per byte": charlm.train(charlm.parse_arguments(list(map(str, given))))}


def run_example(name: str, seeds: int, length: int) -> list[dict[str, Any]]:
    """Trains an example in every mode and prints means beside the range of float32.

    Args:
        name: ``digits`` or ``charlm``.
        seeds: how many, counted from 0.
        length: epochs or steps.
    """
    train = {"digits": train_digits, "charlm": train_charlm}[name]
    unit = {"digits": "epochs", "charlm": "steps"}[name]
    rows: list[dict[str, Any]] = []
    print(f"\n{name}, {length} {unit}, {seeds} seeds: mean (smallest-largest); seconds of a run")
    for mode in MODES:
        begin = time.perf_counter()
        runs = [train(mode, seed, length) for seed in range(seeds)]
        seconds = (time.perf_counter() - begin) / seeds
        row: dict[str, Any] = {"example": name, unit: length, "mode": mode.name, "seconds": seconds}
        text = f"{mode.name:38}"
        for key in runs[0]:
            values = [run[key] for run in runs]
            row[key] = values
            text += f"{key} {statistics.fmean(values):.4f} ({min(values):.4f}-{max(values):.4f})   "
            reference = rows[0][key] if rows else values
            row[f"{key} within float32's range"] = (
                min(reference) <= statistics.fmean(values) <= max(reference)
            )
        print(f"{text}{seconds:.1f}", flush=True)
        rows.append(row)
    return rows


# ---- the picture ---------------------------------------------------------------------------------------


def draw(content: dict[str, Any], path: Path) -> None:
    """Draws what storage adds to the error against bytes, one panel for each learning rate."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, ("lr 1e-2", "lr 1e-4"), strict=True):
        rows = {row["mode"]: row for row in content["quadratic"] if row["problem"] == name}
        shown = [mode for mode in MODES if mode.name != REFERENCE]  # whose distance is 0
        for mode in (*shown, Mode("schedulefree bf16", BF16, upstream=True)):
            row = rows[mode.name]
            colour = "#0072B2" if "exp_avg_sq_bits" in mode.options else "#009E73"
            marker = {BF16: "o", FP16: "s"}.get(mode.dtype, "D")
            if "state_bits" in mode.options:
                marker = "^" if "rounding" in mode.options else "v"
            if mode.upstream:
                colour, marker = "#D55E00", "X"
            axes.plot(
                row["bytes"], row["distance"], marker, color=colour, markersize=9, label=mode.name, alpha=0.7
            )
        axes.axhline(1, color="#444444", linewidth=0.8, linestyle="--")
        axes.text(14.4, 1.1, "error of float32", ha="right", color="#444444")
        axes.set_yscale("log")
        axes.set_xlim(5.5, 14.5)
        axes.set_xlabel("bytes per parameter, gradients apart")
        axes.set_title(f"noisy quadratic, {name}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("distance of x from that of float32 / error of float32")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def positive_int(text: str) -> int:
    """An integer of the command line that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(given: Sequence[str] | None = None) -> None:
    """Measures, prints, writes and draws."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seeds", type=positive_int, default=5, help="runs of each mode")
    parser.add_argument("--epochs", type=positive_int, default=16, help="of digits")
    parser.add_argument("--steps", type=positive_int, default=300, help="of charlm")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--json", type=Path, default=RESULTS, help="keeps the other parts that it has")
    parser.add_argument("--picture", type=Path, default=PICTURE, help="drawn with the quadratic")
    parser.add_argument("--draw", action="store_true", help="only draw what --json holds")
    parser.add_argument("--quick", action="store_true", help="1 seed, few steps: tries the script")
    arguments = parser.parse_args(given)
    if arguments.quick:
        arguments.seeds, arguments.epochs, arguments.steps = 1, 1, 2

    about = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "schedulefree": importlib.metadata.version("schedulefree"),
        "schedulefree_cpp": schedulefree_cpp.__version__,
        "seeds": list(range(arguments.seeds)),
    }
    content = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    if arguments.draw:
        draw(content, arguments.picture)
        return
    torch.set_num_threads(1)  # such small tensors gain little from more
    for part in arguments.only:
        rows: list[dict[str, Any]] = []
        if part == "quadratic":
            for problem in PROBLEMS:
                solved = solve(problem, arguments.seeds, 20 if arguments.quick else problem.steps)
                print_problem(solved)
                rows += solved
        else:
            rows = run_example(
                part, arguments.seeds, arguments.epochs if part == "digits" else arguments.steps
            )
        content[part] = rows
        content[f"about {part}"] = about
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    if "quadratic" in arguments.only:
        draw(content, arguments.picture)


if __name__ == "__main__":
    main()
