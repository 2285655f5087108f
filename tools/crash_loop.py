"""Kills a training process at random moments, and looks at what is left and at how it goes on.

    python tools/crash_loop.py [--kills 200] [--seed 0]

A process trains and saves a checkpoint every few steps, until SIGKILL ends it; the next one goes on from
the file. After every kill the file must be a whole checkpoint, and hold, bit for bit, what a run that nobody
killed had at that step. Exits with 1 and says what was found otherwise. Linux only.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import schedulefree_cpp
import torch

STEPS = 60
EVERY = 3  # steps between checkpoints
RUNS = (
    (
        "AdamWScheduleFree",
        torch.bfloat16,
        {"inner_momentum": 0.9, "weight_decay": 0.1, "max_grad_norm": 50.0},
    ),
    ("SGDScheduleFree", torch.float32, {"warmup_steps": 9, "weight_decay": 0.01}),
    ("RAdamScheduleFree", torch.float16, {}),
    ("AdamWScheduleFreePaper", torch.float64, {"decoupling_c": 20.0}),
    ("SGDScheduleFreeClosure", torch.bfloat16, {}),
    ("AdamCScheduleFreePlus", torch.float32, {"sf_beta1_anneal_steps": 40}),
)


def make(run: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model of a megabyte or two, and its optimizer."""
    name, dtype, kwargs = RUNS[run % len(RUNS)]
    torch.manual_seed(run)
    model = torch.nn.Sequential(*(torch.nn.Linear(180, 180) for _ in range(4))).to(dtype)
    cls = getattr(schedulefree_cpp, name)
    return model, cls(model.parameters(), lr=0.01, **kwargs)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """One step whose gradients depend on its number and on the parameters."""
    generator = torch.Generator().manual_seed(seed)

    def backward() -> float:
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p) + p.detach()
        return 1.0 + seed % 3

    if type(optimizer).__name__.endswith("Closure"):
        optimizer.step(backward)
    elif hasattr(optimizer, "step_func"):
        optimizer.step_func(backward())
    else:
        backward()
        optimizer.step()


def bits(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Parameters and state, in the mode that they are in."""
    state = optimizer.state_dict()["state"]
    tensors = [t for entry in state.values() for _, t in sorted(entry.items())]
    return [t.detach().clone() for t in (*model.parameters(), *tensors)]


def undisturbed(run: int) -> dict[int, list[torch.Tensor]]:
    """What a run that nobody kills has at every checkpoint."""
    model, optimizer = make(run)
    optimizer.train()
    known = {}
    for number in range(1, STEPS + 1):
        step(model, optimizer, number)
        if number % EVERY == 0:
            with optimizer.averaged():
                known[number] = bits(model, optimizer)
    return known


def train(run: int, path: Path) -> None:
    """The process that is killed: goes on where the file says, to the last step."""
    model, optimizer = make(run)
    done = schedulefree_cpp.load_checkpoint(path, model, optimizer)["step"] if path.exists() else 0
    optimizer.train()
    for number in range(done + 1, STEPS + 1):
        step(model, optimizer, number)
        if number % EVERY == 0:
            schedulefree_cpp.save_checkpoint(path, model, optimizer, step=number)


def check(run: int, path: Path, known: dict[int, list[torch.Tensor]], at_least: int) -> int:
    """The step of the checkpoint. Raises AssertionError unless it is whole, exact and none older."""
    if not path.exists():
        assert at_least == 0, f"run {run}: the checkpoint of step {at_least} is gone"
        return 0
    model, optimizer = make(run)
    number: int = schedulefree_cpp.load_checkpoint(path, model, optimizer)["step"]
    assert number >= at_least, f"run {run}: step {number} after step {at_least}"
    for own, expected in zip(bits(model, optimizer), known[number], strict=True):
        assert torch.equal(own, expected), f"run {run}: other bits at step {number}"
    return number


def _exit_after(function: Callable[..., None], *args: Any) -> NoReturn:
    """Ends a forked process without what the parent would do at its end."""
    status = 1
    try:
        function(*args)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    """Kills until there were enough."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # so that this process may fork
    moments = random.Random(options.seed)
    kills = runs = within_a_save = 0
    while kills < options.kills:
        known = undisturbed(runs)
        with tempfile.TemporaryDirectory() as folder:
            path, done, patience = Path(folder) / "checkpoint.pt", 0, 0.1
            while done < STEPS:
                partials = len(list(Path(folder).glob("*.partial")))
                child = os.fork()
                if child == 0:
                    _exit_after(train, runs, path)
                if kills < options.kills:  # the last run may finish
                    time.sleep(moments.uniform(0, patience))
                    os.kill(child, signal.SIGKILL)
                _, status = os.waitpid(child, 0)
                killed = os.WIFSIGNALED(status)
                assert killed or status == 0, f"run {runs}: the process failed, status {status}"
                kills += killed
                before, done = done, check(runs, path, known, done)
                patience = 0.1 if done > before else 2 * patience  # a slow machine needs more
                within_a_save += len(list(Path(folder).glob("*.partial"))) - partials
        runs += 1
    print(
        f"{kills} kills in {runs} runs of {STEPS} steps, {within_a_save} of them within a save: every file "
        "was whole and every run exact"
    )


if __name__ == "__main__":
    main()
