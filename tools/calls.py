"""Counts the Python calls of this package in common operations: ``python tools/calls.py``.

A call is a frame of the package that starts, a change of module one that starts in another module than the
frame before. Exits 1 where a limit is passed.
"""

from __future__ import annotations

import copy
import gc
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import schedulefree_cpp
import torch

PACKAGE = str(Path(schedulefree_cpp.__file__).parent)

# The most calls, and changes of module.
LIMITS = {
    "step": (26, 12),
    "eval": (15, 6),
    "load_state_dict": (70, 18),
    "capturable step": (35, 15),
    "step in few bits": (28, 13),
    "train in train mode": (11, 7),
}


def frames(function: Callable[[], Any]) -> list[tuple[str, str]]:
    """File and function of every frame of the package that a call starts, in order."""
    result: list[tuple[str, str]] = []

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            result.append((frame.f_code.co_filename[len(PACKAGE) + 1 :], frame.f_code.co_qualname))

    gc.disable()  # which may end optimizers of earlier calls
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return result


def count(function: Callable[[], Any]) -> tuple[int, int]:
    """The calls of a second run, and how often they change module."""
    function()
    files = [file for file, _ in frames(function)]
    return len(files), sum(a != b for a, b in itertools.pairwise(files))


def trained(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """An optimizer of one parameter, in train mode, after a step."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(8).to(dtype))
    p.grad = torch.ones_like(p)
    optimizer = schedulefree_cpp.AdamWScheduleFree([p], lr=0.01, **options)
    optimizer.train()
    optimizer.step()
    return optimizer


def operations() -> dict[str, Callable[[], Any]]:
    """The operations by name."""
    optimizer, other = trained(), trained()
    state = copy.deepcopy(optimizer.state_dict())

    def evaluate() -> None:
        other.param_groups[0]["train_mode"] = True
        other.eval()

    return {
        "step": optimizer.step,
        "eval": evaluate,
        "load_state_dict": lambda: optimizer.load_state_dict(state),
        "capturable step": trained(capturable=True).step,
        "step in few bits": trained(torch.bfloat16, state_bits=24, exp_avg_sq_bits=8).step,
        "train in train mode": trained().train,
    }


def main() -> int:
    """Prints the counts. Returns 1 where a limit is passed."""
    passed = False
    for name, function in operations().items():
        counts = count(function)
        passed |= any(a > b for a, b in zip(counts, LIMITS[name], strict=True))
        calls, changes = LIMITS[name]
        print(f"{name:<20} {counts[0]:>3} calls (of {calls}), {counts[1]:>3} changes (of {changes})")
        if "--frames" in sys.argv:
            for file, function_name in frames(function):
                print(f"    {file:<24} {function_name}")
    return int(passed)


if __name__ == "__main__":
    sys.exit(main())
