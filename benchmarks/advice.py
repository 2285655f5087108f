"""Tries the advice of docs/tuning.md on handwritten digits, in two or three minutes.

A perceptron of one hidden layer, 1,200 of the 1,797 images of scikit-learn to train on, and the loss at x on
the others. The split, the initial weights and the batches differ from seed to seed and are the same for all
rows. Nothing is tuned: a row tells whether advice does harm on a small problem, and little more.

    python benchmarks/advice.py
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from schedulefree_cpp import AdamCScheduleFreePlus, AdamWScheduleFree, ScheduleFreeWrapper
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

RESULTS = Path(__file__).parent / "results" / "advice.json"
STEPS, BATCH, LR = 600, 32, 0.01

Make = Callable[[Iterator[nn.Parameter], int], Any]


def adamw(**kwargs: Any) -> Make:
    """AdamW with 5% of the steps as warmup, unless the row says otherwise."""

    def make(params: Iterator[nn.Parameter], steps: int) -> Any:
        warmup = kwargs.get("warmup", 0.05) * steps
        rest = {key: value for key, value in kwargs.items() if key != "warmup"}
        return AdamWScheduleFree(params, **{"lr": LR, "warmup_steps": warmup, **rest})

    return make


def plus(c_warmup: float = 0.0, anneal: bool = False, **kwargs: Any) -> Make:
    """ScheduleFree+; ``c_warmup`` is a part of the steps, ``anneal`` takes beta to 0.965 in them."""

    def make(params: Iterator[nn.Parameter], steps: int) -> Any:
        rest = {"sf_beta1": 0.925, "sf_beta1_anneal_steps": steps} if anneal else {}
        return AdamCScheduleFreePlus(params, c_warmup=int(c_warmup * steps), **rest, **kwargs)

    return make


def wrapped(at_y: float, at_z: float) -> Make:
    """The wrapper around AdamW without momentum, with decay at y or at z."""

    def make(params: Iterator[nn.Parameter], steps: int) -> Any:
        base = torch.optim.AdamW(params, lr=LR, betas=(0.0, 0.999), weight_decay=at_z)
        return ScheduleFreeWrapper(base, weight_decay_at_y=at_y)

    return make


def rows() -> Iterator[tuple[str, str, Make, dict[str, Any]]]:
    """What is tried: under which heading, as what, how, and what else differs."""
    yield "AlgoPerf", "defaults", adamw(), {}
    yield "AlgoPerf", "r=0.75", adamw(r=0.75), {}
    algoperf = {"lr": 0.0025, "r": 0.75, "betas": (0.9, 0.9955), "weight_decay": 0.081, "warmup": 0.015}
    yield "AlgoPerf", "all of it", adamw(**algoperf), {}
    for beta2 in (0.9, 0.95, 0.99, 0.999):
        yield "beta2", f"{beta2}", adamw(betas=(0.9, beta2)), {}
    for steps in (150, 600, 2400):
        for beta in (0.9, 0.95, 0.98, 0.99):
            yield f"beta, {steps} steps", f"{beta}", adamw(betas=(beta, 0.999)), {"steps": steps}
    for batch in (8, 256):
        for c in (0, 6, 12, 50, 200):
            make = adamw(betas=(0.95, 0.999), decoupling_c=c)
            yield f"decoupling_c, batch {batch}", f"{c}", make, {"batch": batch}
    for lr in (1.0, 0.25, 0.0625):
        for name, kwargs in (
            ("as published", {}),
            ("r=2", {"r": 2}),
            ("c_warmup 5%", {"c_warmup": 0.05}),
            ("both", {"r": 2, "c_warmup": 0.05}),
            ("both, polyak_beta=0.9", {"r": 2, "c_warmup": 0.05, "polyak_beta": 0.9}),
            ("both, sf_beta1 to 0.965", {"r": 2, "c_warmup": 0.05, "anneal": True}),
        ):
            yield f"ScheduleFree+, lr {lr:g}", name, plus(lr=lr, **kwargs), {}
    for h in (1, 4, 16, 32, 64):
        make = adamw(betas=(0.7, 0.999), averaging_weight=1 - 0.9 ** (1 / h), inner_momentum=0.9, lr=0.003)
        yield "GPA", f"{h} inner steps", make, {}
    for at_y, at_z in ((0.0, 0.0), (0.1, 0.0), (0.0, 0.1)):
        yield "wrapper", f"decay {at_y} at y, {at_z} at z", wrapped(at_y, at_z), {}
    for part in (0.0, 0.05, 0.1, 0.2):
        yield "cool-down", f"{part:.0%} of the steps", adamw(), {"cool": part}


@functools.cache
def images_and_labels() -> Any:
    """The data."""
    return load_digits()


def run(make: Make, seed: int, steps: int = STEPS, batch: int = BATCH, cool: float = 0.0) -> float:
    """Trains and returns the held-out loss at x.

    The last part ``cool`` of the steps is torch's AdamW from x, whose learning rate falls from a fifth to 0.
    """
    torch.manual_seed(seed)
    digits = images_and_labels()
    order = torch.randperm(len(digits.target))
    images = (torch.tensor(digits.data, dtype=torch.float32) / 16)[order]
    labels = torch.tensor(digits.target)[order]
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    generator = torch.Generator().manual_seed(seed)

    def backward() -> Tensor:
        at = torch.randint(1200, (batch,), generator=generator)
        loss = functional.cross_entropy(model(images[at]), labels[at])
        model.zero_grad()
        loss.backward()
        return loss.detach()

    end = round(steps * (1 - cool))
    optimizer = make(model.parameters(), steps)
    optimizer.train()
    for _ in range(end):
        loss = backward()
        if isinstance(optimizer, AdamCScheduleFreePlus):
            optimizer.step_func(loss)
        else:
            optimizer.step()
    optimizer.eval()
    if cool:
        last = torch.optim.AdamW(model.parameters(), lr=LR / 5)
        schedule = torch.optim.lr_scheduler.LinearLR(last, 1.0, 0.0, steps - end)
        for _ in range(end, steps):
            backward()
            last.step()
            schedule.step()
    with torch.no_grad():
        return functional.cross_entropy(model(images[1200:]), labels[1200:]).item()


def cell(losses: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = statistics.mean(losses)
    return f"{mean:.3f} ± {statistics.stdev(losses):.3f}" if mean < 10 else "diverged"


def tables(found: list[dict[str, Any]]) -> list[str]:
    """The tables of the page, of which each has the rows of some headings."""
    result = []
    for start, corner, across in (
        ("AlgoPerf", "values", False),
        ("beta,", "beta", False),
        ("beta2", "beta2", True),
        ("decoupling_c", "C", True),
        ("GPA", "values", True),
        ("wrapper", "decay", False),
        ("ScheduleFree+", "options", False),
        ("cool-down", "of the steps", True),
    ):
        chosen = [row for row in found if row["heading"].startswith(start)]
        headings = [*dict.fromkeys(row["heading"] for row in chosen)]
        names = [*dict.fromkeys(row["row"] for row in chosen)]
        cells = {(row["heading"], row["row"]): cell(row["losses"]) for row in chosen}
        titles = {h: h.removeprefix(start).strip(", ") or "loss" for h in headings}
        if across:
            lines = [[corner, *names], *([titles[h], *(cells[h, name] for name in names)] for h in headings)]
        else:
            lines = [
                [corner, *titles.values()],
                *([name, *(cells[h, name] for h in headings)] for name in names),
            ]
        lines.insert(1, ["---"] * len(lines[0]))
        result.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return result


def main() -> None:
    """Prints the losses of all rows, and writes them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds, from 0")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "ScheduleFree", RuntimeWarning)  # of learning rates that are too large
    begin, found = time.process_time(), []
    for heading, name, make, others in rows():
        losses = [run(make, seed, **others) for seed in range(arguments.seeds)]
        mean = statistics.mean(losses)
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        found.append({"heading": heading, "row": name, "losses": losses})
        print(f"{heading:28} {name:28} {mean:.3f} ± {spread:.3f}", flush=True)
    if arguments.seeds > 1:
        print(*tables(found), sep="\n\n")
    facts = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu_seconds": time.process_time() - begin,
        "seeds": list(range(arguments.seeds)),
        "rows": found,
    }
    arguments.output.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
