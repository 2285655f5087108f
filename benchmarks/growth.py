"""How the time of every public method grows with the number of tensors and of groups.

``python benchmarks/growth.py [--quick] [--compiled] [--out FILE]`` prints, for each method, the host's time
for each count and the exponent of the growth between the two largest, beside torch's AdamW where it has the
method. Tensors have 8 elements, so that the time is the host's: that of the calling thread's CPU, the least
of some runs in each of some passes over all rows, since a processor that others share has slow minutes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import schedulefree_cpp
import torch

COUNTS = (250, 1000, 4000)
COMPILED_COUNTS = (50, 100, 200, 400)
Work = Callable[[], Any]


def parameters(n: int) -> list[torch.nn.Parameter]:
    """Small parameters with gradients."""
    params = [torch.nn.Parameter(torch.randn(8)) for _ in range(n)]
    for p in params:
        p.grad = torch.randn(8)
    return params


def made(n: int, of_groups: bool, cls: Any = schedulefree_cpp.AdamWScheduleFree, **options: Any) -> Any:
    """An optimizer after its first step, of ``n`` tensors in one group or in groups of their own."""
    params = parameters(n)
    optimizer = cls([{"params": [p]} for p in params] if of_groups else params, lr=1e-3, **options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    optimizer.step()
    return optimizer


def params_of(optimizer: Any) -> list[torch.nn.Parameter]:
    """All parameters."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def alternately(*functions: Work) -> Work:
    """Calls one function after the other, one for each call."""
    following = itertools.cycle(functions)
    return lambda: next(following)()


def half_at_rest(optimizer: Any) -> Work:
    """A step in which every second parameter has no gradient."""
    for p in params_of(optimizer)[::2]:
        p.grad = None
    return optimizer.step


def beta_moved(optimizer: Any) -> Work:
    """A step for which a scheduler has moved beta."""
    betas = itertools.cycle((0.9, 0.95))

    def step() -> None:
        for group in optimizer.param_groups:
            group["betas"] = (next(betas), 0.999)
        optimizer.step()

    return step


def within_backward(optimizer: Any) -> Work:
    """An iteration whose parameters step one by one."""
    params = params_of(optimizer)

    def iteration() -> None:
        for p in params:
            optimizer.step_parameter(p)
        optimizer.step()

    return iteration


def loading(optimizer: Any) -> Work:
    """Loads a state dict."""
    state = copy.deepcopy(optimizer.state_dict())
    return lambda: optimizer.load_state_dict(state)


def construction(n: int, of_groups: bool, cls: Any) -> Work:
    """Constructs an optimizer."""
    groups = [{"params": [p]} for p in parameters(n)]
    return lambda: cls([dict(g) for g in groups] if of_groups else [p for g in groups for p in g["params"]])


def muon(n: int, of_groups: bool) -> Work:
    """A step of Muon's, for vectors and as many matrices as a sixteenth of them."""
    params = parameters(n)
    for p in params[::16]:
        p.data, p.grad = torch.randn(2, 4), torch.randn(2, 4)
    groups = [{"params": [p]} for p in params] if of_groups else params
    optimizer = schedulefree_cpp.MuonScheduleFree(groups, lr=1e-3)
    optimizer.train()
    return optimizer.step


def wrapped(n: int, of_groups: bool) -> Work:
    """A step of a wrapper around SGD."""

    def wrapper(params: Any, lr: float) -> Any:
        return schedulefree_cpp.ScheduleFreeWrapper(torch.optim.SGD(params, lr=lr))

    return made(n, of_groups, wrapper).step


def methods(n: int, of_groups: bool) -> Iterator[tuple[str, Work]]:
    """Every public method by name; those of torch's AdamW begin with its name."""
    ours = schedulefree_cpp.AdamWScheduleFree
    yield "construction", construction(n, of_groups, ours)
    yield "torch: construction", construction(n, of_groups, torch.optim.AdamW)
    optimizer = made(n, of_groups)
    yield "step()", optimizer.step
    yield "train() in train mode", optimizer.train
    yield "eval(), train()", alternately(optimizer.eval, optimizer.train)
    optimizer.train()
    yield "state_dict()", optimizer.state_dict
    yield "load_state_dict()", loading(optimizer)
    yield "zero_grad(set_to_none=False)", lambda: optimizer.zero_grad(False)
    yield "deepcopy", lambda: copy.deepcopy(optimizer)
    yield "step(), clipped", made(n, of_groups, max_grad_norm=1.0).step
    yield "step(), capturable", made(n, of_groups, capturable=True).step
    yield "step(), half at rest", half_at_rest(made(n, of_groups))
    yield "step(), beta moved", beta_moved(made(n, of_groups))
    yield "step_parameter(), step()", within_backward(made(n, of_groups))
    yield "SGDScheduleFree.step()", made(n, of_groups, schedulefree_cpp.SGDScheduleFree).step
    yield "MuonScheduleFree.step()", muon(n, of_groups)
    yield "ScheduleFreeWrapper.step()", wrapped(n, of_groups)
    other = made(n, of_groups, torch.optim.AdamW, fused=True)
    yield "torch: step(), fused", other.step
    yield "torch: state_dict()", other.state_dict
    yield "torch: load_state_dict()", loading(other)
    yield "torch: deepcopy", lambda: copy.deepcopy(other)


def least(work: Work, budget: float) -> float:
    """The least CPU time of a call, in milliseconds, of two calls or as many as some seconds allow."""
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 2 or (time.perf_counter() < end and len(times) < 200):
        start = time.thread_time_ns()
        work()
        times.append((time.thread_time_ns() - start) / 1e6)
    return min(times)


def exponent(counts: tuple[int, ...], times: list[float]) -> float:
    """The exponent of the growth between the two largest counts."""
    return math.log(times[-1] / times[-2]) / math.log(counts[-1] / counts[-2])


def growth(of_groups: bool, counts: tuple[int, ...], budget: float, passes: int = 1) -> dict[str, Any]:
    """Times and exponents of all methods."""
    times: dict[str, list[float]] = {}
    for _ in range(passes):
        for i, n in enumerate(counts):
            for name, work in methods(n, of_groups):
                row = times.setdefault(name, [math.inf] * len(counts))
                row[i] = min(row[i], least(work, budget))
    return {name: {"ms": ms, "exponent": exponent(counts, ms)} for name, ms in times.items()}


def compiled(counts: tuple[int, ...], budget: float) -> dict[str, Any]:
    """Compiled steps of ours and of torch's AdamW, with the seconds that compiling takes."""
    result: dict[str, Any] = {}
    for name, cls, options in (
        ("step(), compiled", schedulefree_cpp.AdamWScheduleFree, {}),
        ("torch: step(), compiled", torch.optim.AdamW, {}),
    ):
        times, seconds = [], []
        for n in counts:
            torch._dynamo.reset()
            step = torch.compile(made(n, False, cls, **options).step)
            start = time.perf_counter()
            step(), step()
            seconds.append(time.perf_counter() - start)
            times.append(least(step, budget))
        result[name] = {"ms": times, "compile_s": seconds, "exponent": exponent(counts, times)}
    return result


def show(title: str, counts: tuple[int, ...], rows: dict[str, Any]) -> None:
    """Prints a table."""
    print(f"\n{title:<32}" + "".join(f"{n:>10}" for n in counts) + f"{'exponent':>10}   (ms)")
    for name, row in rows.items():
        print(
            f"{name:<32}" + "".join(f"{ms:>10.3f}" for ms in row["ms"]) + f"{row['exponent']:>10.2f}",
            flush=True,
        )


def page_table(title: str, counts: list[int], rows: dict[str, Any]) -> str:
    """The Markdown table of the performance page: ours and, where torch has the method, torch's."""
    lines = [f"| {title}, ms | {counts[-2]} | {counts[-1]} | exponent | torch, {counts[-2]} | exponent |"]
    lines.append("|---|---|---|---|---|---|")
    for name, row in rows.items():
        if name.startswith("torch: "):
            continue
        of_torch = rows.get(f"torch: {name}") or rows.get(f"torch: {name}, fused")
        cells = [*(f"{ms:.2f}" for ms in row["ms"][-2:]), f"{row['exponent']:.2f}"]
        cells += [f"{of_torch['ms'][-2]:.2f}", f"{of_torch['exponent']:.2f}"] if of_torch else ["", ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, and writes the results where they are wanted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few counts, for a test")
    parser.add_argument("--compiled", action="store_true", help="also compiled steps: takes minutes")
    parser.add_argument("--out", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    from step import cpu_model  # found where this file runs as a script

    torch.set_num_threads(1)
    counts, budget, passes = ((20, 40), 0.0, 1) if arguments.quick else (COUNTS, 0.1, 4)
    results: dict[str, Any] = {
        "torch": torch.__version__,
        "cpu": cpu_model(),
        "counts": counts,
    }
    for title, of_groups in (("tensors", False), ("groups", True)):
        results[title] = growth(of_groups, counts, budget, passes)
        show(title, counts, results[title])
    if arguments.compiled:
        counts = counts if arguments.quick else COMPILED_COUNTS
        results["compiled"] = {"counts": counts, **compiled(counts, budget)}
        show("compiled", counts, {k: v for k, v in results["compiled"].items() if k != "counts"})
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
