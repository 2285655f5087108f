"""Runs one training in every way that must not change a bit of it, and prints what agreed.

    python tools/determinism.py [--only ROW ...] [--write FILE | --beside FILE]

Every row is a way to run: the parameters and the whole state after the last step are compared with those of
the plain run by torch.equal. A row that this machine cannot run says why. Exits with 1 if a row differs.
``--write`` keeps the results of the plain run, and ``--beside`` has a row of what another machine has kept.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import schedulefree_cpp
import torch

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(3, 20_021), (7,), (), (40, 130), (0,)]
STEPS = 12
# Every optimizer that steps by step() alone, with what moves the most.
RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("SGDScheduleFree", {"warmup_steps": 4, "weight_decay": 0.1, "max_grad_norm": 100.0}),
    ("AdamWScheduleFree", {"inner_momentum": 0.9, "weight_decay": 0.1, "decay_at": "z"}),
    ("AdamWScheduleFree", {"warmup_steps": 4, "max_grad_norm": 100.0, "decoupling_c": 20.0}),
    ("AdamWScheduleFreePaper", {"weight_decay": 0.1}),
    ("RAdamScheduleFree", {"r": 0.5}),
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FEW_BYTES: dict[str, Any] = {"state_bits": 24, "exp_avg_sq_bits": 8}
CASES: list[tuple[str, dict[str, Any], torch.dtype]] = [
    *((name, kwargs, dtype) for name, kwargs in RUNS for dtype in DTYPES),
    ("AdamWScheduleFree", {"exp_avg_sq_bits": 8}, torch.float32),
    ("AdamWScheduleFree", {"exp_avg_sq_bits": 8, "inner_momentum": 0.9}, torch.float16),
    ("AdamWScheduleFree", FEW_BYTES, torch.bfloat16),
    ("AdamWScheduleFree", FEW_BYTES | {"rounding": "stochastic"}, torch.bfloat16),
    ("SGDScheduleFree", {"state_bits": 24, "rounding": "stochastic"}, torch.bfloat16),
]

Result = list[torch.Tensor]


class Skipped(Exception):  # noqa: N818
    """Says why a row cannot be run here."""


def numbers(shape: Any, generator: torch.Generator | None = None) -> torch.Tensor:
    """Of a spread near 1, and unlike those of torch.randn the same on every machine."""
    return 4 * torch.rand(shape, generator=generator) - 2


def run(
    name: str,
    kwargs: dict[str, Any],
    dtype: torch.dtype,
    *,
    order: Callable[[list[Any]], list[Any]] = list,
    between: Callable[[Any, int], Any] = lambda optimizer, step: optimizer,
    stepping: Callable[[Any], Callable[[], None]] = lambda optimizer: optimizer.step,
    device: str = "cpu",
) -> Result:
    """A training. Returns parameters and state, parameter after parameter."""
    torch.manual_seed(0)
    values = [numbers(shape).to(dtype) for shape in SHAPES]
    params = [torch.nn.Parameter(value.to(device)) for value in values]
    optimizer = getattr(schedulefree_cpp, name)(order(params), lr=0.05, **kwargs)
    optimizer.train()
    step = stepping(optimizer)
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(number)
        for p in params:
            p.grad = numbers(p.shape, generator).to(p)
        step()
        other = between(optimizer, number)
        if other is not optimizer:
            optimizer, step = other, stepping(other)
            params = list(optimizer.param_groups[0]["params"])
    states = [sorted(optimizer.state[p].items()) for p in params]
    return [
        t.detach().cpu().clone() for p, s in zip(params, states, strict=True) for t in (p, *(v for _, v in s))
    ]


def all_cases(**how: Any) -> Iterator[Result]:
    """Every case, run in one way."""
    for name, kwargs, dtype in CASES:
        yield run(name, kwargs, dtype, **how)


# ---- the rows ------------------------------------------------------------------------------------------


def with_threads(count: int) -> Iterator[Result]:
    """Another number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield from all_cases()
    finally:
        torch.set_num_threads(before)


def with_isa(isa: str) -> Iterator[Result]:
    """The kernels of another instruction set, in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.pt"
        done = subprocess.run(
            [sys.executable, __file__, "--write", path],
            env={**os.environ, "SCHEDULEFREE_CPU_ISA": isa},
            capture_output=True,
            text=True,
        )
        if "expected one of" in done.stderr:
            raise Skipped("not of this processor")
        if done.returncode:
            raise RuntimeError(done.stderr)
        yield from torch.load(path)


def reversed_order() -> Iterator[Result]:
    """The parameters of the group in another order; without clipping, whose norm is a sum over them."""
    for name, kwargs, dtype in CASES:
        yield [] if "max_grad_norm" in kwargs else run(name, kwargs, dtype, order=lambda ps: ps[::-1])


def compiled() -> Iterator[Result]:
    """``torch.compile(optimizer.step)``."""
    for name, kwargs, dtype in CASES:
        torch._dynamo.reset()
        yield run(name, kwargs, dtype, stepping=lambda o: torch.compile(o.step))


def evaluate(optimizer: Any, step: int) -> Any:
    """Looks at the average after every step."""
    optimizer.eval()
    if step % 2:
        optimizer.eval(), optimizer.train(), optimizer.eval()
    optimizer.train()
    with optimizer.averaged():
        pass
    return optimizer


def resume(optimizer: Any, step: int) -> Any:
    """Goes on from a checkpoint, in either mode, in a new optimizer."""
    if step % 3:
        return optimizer
    optimizer.train(step % 2 == 0)
    model = torch.nn.ParameterList(optimizer.param_groups[0]["params"])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    other_model = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros_like(p)) for p in model])
    bits = {key: value for key, value in optimizer.defaults.items() if key.endswith("_bits")}  # not loaded
    other = type(optimizer)(other_model.parameters(), **bits)
    other_model.load_state_dict(checkpoint["model"])
    other.load_state_dict(checkpoint["optimizer"])
    other.train()
    return other


def on_cuda() -> Iterator[Result]:
    """The CUDA kernels; without clipping, whose norm is summed in another order there."""
    if not torch.cuda.is_available():
        raise Skipped("torch sees no CUDA device")
    for name, kwargs, dtype in CASES:
        yield [] if "max_grad_norm" in kwargs else run(name, kwargs, dtype, device="cuda")


def in_cpp() -> tuple[Iterator[Result], Iterator[Result]]:
    """The trajectory of tests/cpp/test_cpp.py, by the C++ optimizers and by Python's."""
    program = ROOT / "build" / "tests" / "tests" / "cpp" / "trajectory"
    if not program.exists():
        raise Skipped("build/tests/tests/cpp/trajectory was not built (make test does)")
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "cpp")]
    import test_cpp

    def pairs() -> Iterator[tuple[Result, Result]]:
        with tempfile.TemporaryDirectory() as folder:
            for name in test_cpp.CLASSES:
                case, (given, out) = test_cpp.make_case(name), (Path(folder) / n for n in ("in", "out"))
                torch.save(case, given)
                subprocess.run([program, given, out], check=True)
                one, other = torch.load(out, weights_only=True), test_cpp.in_python(case, named=True)
                yield flat(one), flat(other)

    both = list(pairs())
    return iter([one for one, _ in both]), iter([other for _, other in both])


def flat(value: Any) -> Result:
    """All tensors of a checkpoint, model first, by sorted names."""
    model = [t for _, t in sorted(value["model"].items())]
    names = [n for g in value["optimizer"]["param_groups"] for n in g.get("param_names", g["params"])]
    keys = [k for g in value["optimizer"]["param_groups"] for k in g["params"]]
    states = sorted(
        (name, value["optimizer"]["state"].get(key, {})) for name, key in zip(names, keys, strict=True)
    )
    return [*model, *(t for _, state in states for _, t in sorted(state.items()))]


ROWS: dict[str, Callable[[], Any]] = {
    "1 thread": lambda: with_threads(1),
    "2 threads": lambda: with_threads(2),
    "7 threads": lambda: with_threads(7),
    "baseline kernels": lambda: with_isa("baseline"),
    "AVX2 kernels": lambda: with_isa("avx2"),
    "AVX-512 kernels": lambda: with_isa("avx512"),
    "parameters in another order": reversed_order,
    "evaluated after every step": lambda: all_cases(between=evaluate),
    "resumed from checkpoints": lambda: all_cases(between=resume),
    "compiled": compiled,
    "C++": in_cpp,
    "CUDA": on_cuda,
}


def compare(results: Iterator[Result], plain: Iterator[Result]) -> tuple[int, int]:
    """How many tensors agree in all bits, and of how many."""
    equal = count = 0
    for own, expected in zip(results, plain, strict=True):
        for a, b in zip(own, expected if own else [], strict=True):
            count += 1
            equal += a.dtype == b.dtype and torch.equal(a, b)
    return equal, count


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--write", metavar="FILE")
    parser.add_argument("--beside", metavar="FILE")
    options = parser.parse_args()
    if options.write:
        return torch.save(list(all_cases()), options.write)
    plain, differ = list(all_cases()), False
    rows = {name: ROWS[name] for name in options.only}
    if options.beside:
        rows["another machine"] = lambda: iter(torch.load(options.beside))
    for name, row in rows.items():
        try:
            results = row()
            equal, count = compare(*results) if isinstance(results, tuple) else compare(results, iter(plain))
        except Skipped as reason:
            print(f"{name:30} skipped: {reason}")
            continue
        differ |= equal != count or count == 0
        print(f"{name:30} {equal} of {count} tensors equal", flush=True)
    sys.exit(differ)


if __name__ == "__main__":
    main()
