"""Times optimizer steps on the CPU beside their rivals.

Every round runs all contenders of a row once, in shuffled order. Ratios are taken within a round, and their
median over the rounds is reported. The ceiling is a loop that moves the same memory without arithmetic
(``no_arithmetic.cpp``, built here).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import schedulefree  # type: ignore[import-untyped]
import schedulefree_cpp
import torch
from schedulefree_cpp._library import _C
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent

OURS = "schedulefree_cpp"
TORCH = "torch fused"
UPSTREAM = "schedulefree foreach"
CEILING = "no arithmetic"
CLIPPED_BEFORE = "clip_grad_norm_, then ours"
CLIPPED_TORCH = "clip_grad_norm_, fused"

Work = Callable[[], object]
Family = dict[str, Callable[..., Any]]  # makes the optimizer of each contender

SETTINGS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
ADAMW: Family = {
    OURS: partial(schedulefree_cpp.AdamWScheduleFree, **SETTINGS),
    TORCH: partial(torch.optim.AdamW, fused=True, **SETTINGS),
    UPSTREAM: partial(schedulefree.AdamWScheduleFree, foreach=True, **SETTINGS),
}
SGD: Family = {
    OURS: partial(schedulefree_cpp.SGDScheduleFree, **SETTINGS),
    TORCH: partial(torch.optim.SGD, fused=True, momentum=0.9, **SETTINGS),
    UPSTREAM: partial(schedulefree.SGDScheduleFree, foreach=True, **SETTINGS),
}

CLIPPING: Family = {
    OURS: partial(schedulefree_cpp.AdamWScheduleFree, max_grad_norm=1.0, **SETTINGS),
    CLIPPED_BEFORE: ADAMW[OURS],
    CLIPPED_TORCH: ADAMW[TORCH],
}

WARMUP_ROUNDS = 2
BYTES_TO_EVICT = 256 * 2**20  # larger than the caches


@dataclass(frozen=True)
class Workload:
    """The parameters to optimize, and how to time one sample."""

    label: str
    tensors: int
    numel: int  # of each tensor
    calls: int  # in one sample, of which the time per call is taken
    cold: bool  # whether a sample begins with nothing of its own in the caches


LARGE = Workload("8 x 4M fp32", 8, 4 * 2**20, calls=1, cold=True)
LARGE_QUICK = Workload("8 x 1M fp32", 8, 2**20, calls=1, cold=True)
TINY = Workload("300 x 8 fp32", 300, 8, calls=20, cold=False)


@dataclass(frozen=True)
class Target:
    """A bound on ours/contender; for the ceiling on ceiling/ours, the part of it that is reached."""

    at_most: float | None = None
    at_least: float | None = None

    def __str__(self) -> str:
        """The bound as the table shows it."""
        if self.at_most is not None:
            return f"<= {self.at_most:.2f}"
        return f">= {self.at_least:.2f}" if self.at_least is not None else "-"

    def met(self, value: float) -> bool | None:
        """Whether a value keeps the bound; None where there is none."""
        if self.at_most is not None:
            return value <= self.at_most
        return value >= self.at_least if self.at_least is not None else None


@dataclass(frozen=True)
class Timing:
    """One contender in one row. Times are of one call; quartiles are the first and the third."""

    row: str
    contender: str
    tensors: int
    numel: int
    median_s: float
    samples_s: list[float]
    ratio: float | None  # None for ours
    ratio_quartiles: tuple[float, float] | None
    target: str
    met: bool | None


@dataclass(frozen=True)
class Memory:
    """The most bytes of tensor storage that one step held beyond what was there before."""

    row: str
    contender: str
    peak_extra_bytes: int
    target: str
    met: bool | None


# ---- the no-arithmetic loops ---------------------------------------------------------------------------


def load_ceiling() -> ctypes.CDLL:
    """Builds the no-arithmetic loops where they are out of date, and loads them.

    Raises:
        SystemExit: with the messages of a build that failed.
    """
    build = ROOT / "build" / "benchmarks"
    # --fresh: a cached configuration could be for another environment's torch.
    configure = [
        "cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
        "-DSCHEDULEFREE_PYTHON=OFF",
        "-DSCHEDULEFREE_BENCHMARKS=ON",
        f"-DSCHEDULEFREE_TORCH_ROOT={Path(torch.__file__).parent}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    compilation = ["cmake", "--build", str(build), "--target", "schedulefree_no_arithmetic"]
    for command in (configure, compilation):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(f"{done.stdout}\n`{' '.join(command)}` failed; its messages are above.")
    return ctypes.CDLL(str(next(build.glob("libschedulefree_no_arithmetic.*"))))


def loop_over(function: Any, *streams: Sequence[Tensor]) -> Work:
    """A call of a no-arithmetic loop on the memory of tensors, which the caller keeps alive."""
    count = len(streams[0])
    numel = (ctypes.c_int64 * count)(*(t.numel() for t in streams[0]))
    pointers = [(ctypes.c_void_p * count)(*(t.data_ptr() for t in stream)) for stream in streams]
    function.restype = None
    return partial(function, ctypes.c_int64(count), numel, *pointers)


# ---- contenders ----------------------------------------------------------------------------------------


def new_optimizer(make: Callable[..., Any], start: Sequence[Tensor], grads: Sequence[Tensor]) -> Any:
    """An optimizer with tensors of its own, in train mode, past its first step, which creates the state."""
    parameters = [Parameter(t.clone()) for t in start]
    for p, g in zip(parameters, grads, strict=True):
        p.grad = g.clone()
    optimizer = make(parameters)
    if hasattr(optimizer, "train"):
        optimizer.train()
    optimizer.step()
    return optimizer


def parameters_of(optimizer: Any) -> list[Parameter]:
    """The parameters of an optimizer with one group."""
    return list(optimizer.param_groups[0]["params"])


def gradients_of(optimizer: Any) -> list[Tensor]:
    """The gradient of every parameter."""
    return [p.grad for p in parameters_of(optimizer) if p.grad is not None]


def state_of(optimizer: Any, name: str) -> list[Tensor]:
    """One state tensor of every parameter."""
    return [optimizer.state[p][name] for p in parameters_of(optimizer)]


def restore_gradients(optimizer: Any, grads: Sequence[Tensor]) -> None:
    """Undoes what schedulefree does to gradients: it steps by overwriting them."""
    for mine, g in zip(gradients_of(optimizer), grads, strict=True):
        mine.copy_(g)


def bytes_kept_by_eval(optimizer: Any) -> int:
    """Memory that evaluation takes until train(), so that it changes nothing."""
    optimizer.eval()
    states = optimizer.state_dict()["state"].values()
    kept = [tensor for state in states for name, tensor in state.items() if name.startswith("y_kept")]
    optimizer.train()
    return sum(tensor.nbytes for tensor in kept)


def eval_and_train(optimizer: Any) -> None:
    """The two swaps of an evaluation."""
    optimizer.eval()
    optimizer.train()


def check_values(name: str, optimizer: Any) -> None:
    """Raises RuntimeError for values that make arithmetic slow and a comparison void."""
    tensors = [*parameters_of(optimizer), *gradients_of(optimizer)]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    smallest = torch.finfo(torch.float32).smallest_normal
    for t in tensors:
        if not t.isfinite().all() or ((t != 0) & (t.abs() < smallest)).any():
            raise RuntimeError(f"{name} was timed on NaNs, infinities or subnormal numbers")


# ---- measurements --------------------------------------------------------------------------------------


def seconds_per_call(work: Work, calls: int) -> float:
    """Wall time."""
    start = time.perf_counter_ns()
    for _ in range(calls):
        work()
    return (time.perf_counter_ns() - start) * 1e-9 / calls


def measure(
    row: str,
    workload: Workload,
    works: dict[str, Work],
    targets: dict[str, Target],
    prepare: Callable[[str], None],
    rounds: int,
) -> list[Timing]:
    """Times contenders against each other.

    Args:
        row: title.
        workload: what the contenders work on.
        works: what is timed, by contender; OURS among them.
        targets: bounds, by contender; may lack some.
        prepare: called with the contender's name before each of its samples, not timed.
        rounds: samples of each contender.

    Returns:
        A timing of each contender, in the order of ``works``.
    """
    order = list(works)
    shuffle = random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(WARMUP_ROUNDS + rounds):
        shuffle(order)
        for name in order:
            prepare(name)
            samples[name].append(seconds_per_call(works[name], workload.calls))

    timings = []
    ours = samples[OURS][WARMUP_ROUNDS:]
    for name in works:
        theirs = samples[name][WARMUP_ROUNDS:]
        ratio, quartiles = None, None
        if name != OURS:
            over, under = (theirs, ours) if name == CEILING else (ours, theirs)
            ratios = [a / b for a, b in zip(over, under, strict=True)]
            first, ratio, third = statistics.quantiles(ratios, n=4, method="inclusive")
            quartiles = (first, third)
        target = targets.get(name, Target())
        timings.append(
            Timing(
                row=row,
                contender=name,
                tensors=workload.tensors,
                numel=workload.numel,
                median_s=statistics.median(theirs),
                samples_s=theirs,
                ratio=ratio,
                ratio_quartiles=quartiles,
                target=str(target),
                met=None if ratio is None else target.met(ratio),
            )
        )
    return timings


def peak_extra_bytes(work: Work) -> int:
    """The most bytes of tensor storage that a call holds at one time beyond what was there before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's notices would fall into the table
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: float(e["ts"])):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


class Report:
    """Prints results as they come and keeps them for the JSON file."""

    def __init__(self, about: dict[str, Any]) -> None:
        """Prints what the results were measured on and the head of the table."""
        self.about = about
        self.timings: list[Timing] = []
        self.memory: list[Memory] = []
        for key, value in about.items():
            print(f"{key:18}{value}")
        print(
            "\nmedians over the rounds; ratio (quartiles): schedulefree_cpp / contender,\n"
            "or no arithmetic / schedulefree_cpp, the part of the ceiling that is reached\n"
        )
        self._print("row", "contender", "median", "ratio", "target", "met")

    @staticmethod
    def _print(row: str, contender: str, figure: str, ratio: str, target: str, met: str) -> None:
        print(f"{row:34}{contender:28}{figure:>18}  {ratio:22}{target:9}{met}".rstrip(), flush=True)

    @staticmethod
    def _yes_no(met: bool | None) -> str:
        return "-" if met is None else "yes" if met else "no"

    def add_timings(self, timings: Sequence[Timing]) -> None:
        """Takes the contenders of a row."""
        self.timings += timings
        for t in timings:
            if t.numel < 1024:  # the cost is the host's, which grows with the number of tensors
                median = f"{t.median_s / t.tensors * 1e6:.3f} us/tensor"
            else:
                median = f"{t.median_s * 1e3:.2f} ms"
            ratio = "-"
            if t.ratio is not None and t.ratio_quartiles is not None:
                ratio = f"{t.ratio:.3f} ({t.ratio_quartiles[0]:.3f}-{t.ratio_quartiles[1]:.3f})"
            self._print(t.row, t.contender, median, ratio, t.target, self._yes_no(t.met))

    def add_memory(self, row: str, contender: str, extra: int, *, bounded: bool) -> None:
        """Takes extra memory in bytes; if it is bounded, nothing is allowed."""
        memory = Memory(row, contender, extra, "0 bytes" if bounded else "-", extra == 0 if bounded else None)
        self.memory.append(memory)
        self._print(row, contender, f"{extra} bytes", "-", memory.target, self._yes_no(memory.met))

    def write(self, path: Path) -> None:
        """Writes everything as JSON."""
        content = {
            **self.about,
            "timings": [asdict(t) for t in self.timings],
            "memory": [asdict(m) for m in self.memory],
        }
        path.write_text(json.dumps(content, indent=1) + "\n")


# ---- the rows ------------------------------------------------------------------------------------------


class Stage:
    """Optimizers of all contenders on one workload, with equal parameters and gradients."""

    def __init__(self, workload: Workload, family: Family) -> None:
        """Creates the optimizers."""
        generator = torch.Generator().manual_seed(0)
        shape = (workload.tensors, workload.numel)
        start = list(torch.randn(shape, generator=generator))
        self.workload = workload
        self.grads = list(torch.randn(shape, generator=generator))
        self.optimizers = {name: new_optimizer(make, start, self.grads) for name, make in family.items()}
        self.other_memory = torch.ones(BYTES_TO_EVICT // 4) if workload.cold else None

    def steps(self) -> dict[str, Work]:
        """A step of every optimizer."""
        return {name: optimizer.step for name, optimizer in self.optimizers.items()}

    def swaps(self) -> dict[str, Work]:
        """eval() and train() of the optimizers that have them."""
        return {
            name: partial(eval_and_train, optimizer)
            for name, optimizer in self.optimizers.items()
            if name != TORCH
        }

    def measure(
        self, row: str, works: dict[str, Work], targets: dict[str, Target], rounds: int
    ) -> list[Timing]:
        """Times contenders from equal conditions and makes sure that they worked on ordinary numbers."""

        def prepare(name: str) -> None:
            if name == CEILING:
                # The loops move the memory of ours, so that nothing but the arithmetic differs. This call
                # scrambles it and the timed one, being its own inverse, puts it right.
                works[CEILING]()
            else:
                restore_gradients(self.optimizers[name], self.grads)
            if self.other_memory is not None:
                self.other_memory.sum()

        timings = measure(f"{self.workload.label}, {row}", self.workload, works, targets, prepare, rounds)
        for name, optimizer in self.optimizers.items():
            check_values(name, optimizer)
        return timings


def run_large_adamw(report: Report, workload: Workload, library: ctypes.CDLL, rounds: int) -> None:
    """Memory-bound AdamW steps and swaps."""
    stage = Stage(workload, ADAMW)
    ours = stage.optimizers[OURS]
    y, grad, z, v = parameters_of(ours), gradients_of(ours), state_of(ours, "z"), state_of(ours, "exp_avg_sq")

    loop = loop_over(library.schedulefree_ceiling_adamw, y, grad, z, v)
    targets = {
        TORCH: Target(at_most=0.85),
        UPSTREAM: Target(at_most=0.15),
        CEILING: Target(at_least=0.90),
    }
    report.add_timings(stage.measure("AdamW step", stage.steps() | {CEILING: loop}, targets, rounds))

    swap = loop_over(library.schedulefree_ceiling_swap, y, z)

    def swap_twice() -> None:
        swap()
        swap()

    report.add_timings(stage.measure("eval+train", stage.swaps() | {CEILING: swap_twice}, {}, rounds))
    for name, step in stage.steps().items():
        report.add_memory("extra memory, AdamW step", name, peak_extra_bytes(step), bounded=name == OURS)
    row = f"{workload.label}, kept by eval()"
    report.add_memory(row, OURS, bytes_kept_by_eval(ours), bounded=False)


def run_large_sgd(report: Report, workload: Workload, library: ctypes.CDLL, rounds: int) -> None:
    """Memory-bound SGD steps."""
    stage = Stage(workload, SGD)
    ours = stage.optimizers[OURS]
    y, grad, z = parameters_of(ours), gradients_of(ours), state_of(ours, "z")
    loop = loop_over(library.schedulefree_ceiling_sgd, y, grad, z)
    targets = {TORCH: Target(at_most=0.90), UPSTREAM: Target(at_most=0.55)}
    report.add_timings(stage.measure("SGD step", stage.steps() | {CEILING: loop}, targets, rounds))
    for name, step in stage.steps().items():
        report.add_memory("extra memory, SGD step", name, peak_extra_bytes(step), bounded=name == OURS)


def run_clipping(report: Report, workload: Workload, rounds: int) -> None:
    """AdamW steps that clip gradients, within the step or by torch before it."""
    stage = Stage(workload, CLIPPING)

    def clip_and_step(optimizer: Any) -> None:
        clip_grad_norm_(parameters_of(optimizer), 1.0)
        optimizer.step()

    works: dict[str, Work] = {
        name: partial(clip_and_step, optimizer) for name, optimizer in stage.optimizers.items()
    }
    works[OURS] = stage.optimizers[OURS].step
    report.add_timings(stage.measure("clipped AdamW step", works, {}, rounds))
    for name, work in works.items():
        report.add_memory("extra memory, clipped AdamW step", name, peak_extra_bytes(work), bounded=False)


def run_tiny_adamw(report: Report, rounds: int) -> None:
    """Steps and swaps whose cost is the host's."""
    stage = Stage(TINY, ADAMW)
    report.add_timings(stage.measure("AdamW step", stage.steps(), {TORCH: Target(at_most=0.25)}, rounds))
    report.add_timings(stage.measure("eval+train", stage.swaps(), {UPSTREAM: Target(at_most=0.25)}, rounds))


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=41, help="samples of each contender, at least 2")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of torch's pool"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument(
        "--quick", action="store_true", help="5 rounds at most and smaller tensors: tries the script"
    )
    arguments = parser.parse_args()
    if arguments.rounds < 2 or arguments.threads < 1:
        parser.error("--rounds must be at least 2 and --threads at least 1")
    if arguments.quick:
        arguments.rounds = min(arguments.rounds, 5)
    return arguments


def main() -> None:
    """Measures all rows."""
    arguments = parse_arguments()
    library = load_ceiling()
    torch.set_num_threads(arguments.threads)
    report = Report(
        {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            # Other work on the cores slows down most the rivals that start the pool most often.
            "load average": round(os.getloadavg()[0], 2),
            "isa": _C.cpu_isa(),
            "torch": torch.__version__,
            "schedulefree_cpp": schedulefree_cpp.__version__,
            "rounds": arguments.rounds,
        }
    )
    large = LARGE_QUICK if arguments.quick else LARGE
    run_large_adamw(report, large, library, arguments.rounds)
    run_large_sgd(report, large, library, arguments.rounds)
    run_clipping(report, large, arguments.rounds)
    run_tiny_adamw(report, arguments.rounds)
    run_clipping(report, TINY, arguments.rounds)
    if arguments.json:
        report.write(arguments.json)


if __name__ == "__main__":
    main()
