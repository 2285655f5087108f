"""Times optimizer steps beside their rivals.

Every round runs all contenders of a row once, in shuffled order. Ratios are taken within a round, and their
median over the rounds is reported. The ceiling of a CPU is a loop that moves the same memory without
arithmetic (``no_arithmetic.cpp``, built here), that of a GPU a copy of as many bytes.

On a GPU a row says which time it is: *device*, between two events, with the host far ahead; *graph*, the
same of a replayed CUDA graph; *wall*, of calls one after the other until the GPU is done; *host*, until the
calls return. ``--brief`` measures every kind of kernel once, in two minutes, and writes its file row by row.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

# torch then asks for large pages, where the system has them. With small ones ratios varied more between runs.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import schedulefree  # type: ignore[import-untyped]
import schedulefree_cpp
import torch
from schedulefree_cpp import ops
from schedulefree_cpp._core.library import _C
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent

OURS = "schedulefree_cpp"
TORCH = "torch fused"
TORCH_BF16 = "torch fused bf16"
UPSTREAM = "schedulefree foreach"
UPSTREAM_COMPILED = "schedulefree compiled"
UPSTREAM_BF16 = "schedulefree foreach bf16"
TORCHAO = "torchao 8-bit"
BITSANDBYTES = "bitsandbytes 8-bit"
FLASHOPTIM = "flashoptim 8-bit, 24-bit bf16"
CEILING = "no arithmetic"
COPY = "device-to-device copy"
UPSTREAM_WRAPPER = "schedulefree's wrapper"
ALONE = "the base alone"
CLIPPED_BEFORE = "clip_grad_norm_, then ours"
CLIPPED_TORCH = "clip_grad_norm_, fused"

Work = Callable[[], object]
Family = dict[str, Callable[..., Any]]  # makes the optimizer of each contender
Clock = Callable[[Work, int], float]  # seconds of one call, of so many

# Contenders that only move memory: what counts is the part of their speed that is reached.
CEILINGS = (CEILING, COPY)

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
CAPTURABLE: Family = {
    OURS: partial(schedulefree_cpp.AdamWScheduleFree, capturable=True, **SETTINGS),
    TORCH: partial(torch.optim.AdamW, fused=True, capturable=True, **SETTINGS),
}
CLIPPING: Family = {
    OURS: partial(schedulefree_cpp.AdamWScheduleFree, max_grad_norm=1.0, **SETTINGS),
    CLIPPED_BEFORE: ADAMW[OURS],
    CLIPPED_TORCH: ADAMW[TORCH],
}


def wrapped(package: Any, base: Callable[..., Any], parameters: list[Parameter]) -> Any:
    """A wrapper around an optimizer past its first step, which schedulefree's would hide from it."""
    optimizer = base(parameters)
    optimizer.step()
    return package.ScheduleFreeWrapper(optimizer)


WRAPPED: dict[str, Family] = {
    name: {
        OURS: partial(wrapped, schedulefree_cpp, base),
        UPSTREAM_WRAPPER: partial(wrapped, schedulefree, base),
        ALONE: base,
    }
    for name, base in {
        "SGD": partial(torch.optim.SGD, **SETTINGS),
        "AdamW": partial(torch.optim.AdamW, fused=True, **SETTINGS),
    }.items()
}

WARMUP_ROUNDS = 2
BYTES_TO_EVICT = 256 * 2**20  # larger than the caches
BYTES_TO_COPY = 2**30  # of a buffer, much larger than the caches
CALLS_IN_A_ROW = 5  # for the times of the host and of the wall beside a GPU


@dataclass(frozen=True)
class Target:
    """A bound on ours/contender; for ceilings on ceiling/ours, the part of it that is reached."""

    at_most: float | None = None
    at_least: float | None = None

    def __str__(self) -> str:
        """The bound as the table shows it."""
        if self.at_most is not None:
            return f"<= {self.at_most:g}"
        return f">= {self.at_least:g}" if self.at_least is not None else "-"

    def met(self, value: float) -> bool | None:
        """Whether a value keeps the bound; None where there is none."""
        if self.at_most is not None:
            return value <= self.at_most
        return value >= self.at_least if self.at_least is not None else None


@dataclass(frozen=True)
class Workload:
    """The parameters to optimize, and how to time one sample."""

    label: str
    sizes: list[int]  # elements of each tensor
    calls: int = 1  # in one sample, of which the time per call is taken
    cold: bool = True  # whether a sample begins with nothing of its own in the caches
    dtype: torch.dtype = torch.float32
    grad_offset: int = 0  # elements between gradients and the alignment of an allocation
    transposed_gradients: bool = False  # of square matrices
    zero_gradients: bool = False
    options: dict[str, Any] = field(default_factory=dict)  # of ours, in a brief row
    rivals: tuple[str, ...] = (TORCH, UPSTREAM)
    targets: dict[str, dict[str, Target]] = field(default_factory=dict)  # by row and contender

    @property
    def elements(self) -> int:
        """Of all tensors."""
        return sum(self.sizes)


def resnet50() -> list[int]:
    """Elements of the 161 parameters of ResNet-50."""
    sizes = [64 * 3 * 7 * 7, 64, 64]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            sizes += [inputs * width, width, width, width * width * 9, width, width]
            sizes += [width * 4 * width, 4 * width, 4 * width]
            if block == 0:
                sizes += [inputs * 4 * width, 4 * width, 4 * width]
            inputs = 4 * width
    return [*sizes, 2048 * 1000, 1000]


def gpt2() -> list[int]:
    """Elements of the 148 parameters of GPT-2 with 124M."""
    d = 768
    block = [d, d, d * 3 * d, 3 * d, d * d, d, d, d, d * 4 * d, 4 * d, 4 * d * d, d]
    return [50257 * d, 1024 * d, *(block * 12), d, d]


LARGE = Workload(
    "8 x 4M fp32",
    [4 * 2**20] * 8,
    targets={
        "AdamW step": {TORCH: Target(at_most=1.0), CEILING: Target(at_least=0.95)},
        "SGD step": {TORCH: Target(at_most=0.95)},
        "around a base step": {CEILING: Target(at_least=0.85)},
        "eval+train": {UPSTREAM: Target(at_most=0.75), CEILING: Target(at_least=0.90)},
    },
)
OVERHEAD = {f"{name} in a wrapper, overhead" for name in WRAPPED}
LARGE_WRAPPED = replace(LARGE, targets={row: {UPSTREAM_WRAPPER: Target(at_most=0.35)} for row in OVERHEAD})
THOUSAND_WRAPPED = Workload(
    "1000 x 8 fp32",
    [8] * 1000,
    calls=5,
    cold=False,
    targets={row: {UPSTREAM_WRAPPER: Target(at_most=0.25)} for row in OVERHEAD},
)
LARGE_QUICK = replace(LARGE, label="8 x 1M fp32", sizes=[2**20] * 8)
TINY = Workload(
    "300 x 8 fp32",
    [8] * 300,
    calls=20,
    cold=False,
    targets={
        "AdamW step": {TORCH: Target(at_most=0.27)},
        "eval+train": {UPSTREAM: Target(at_most=0.15)},
    },
)
SINGLE = Workload(
    "1 x 8 fp32",
    [8],
    calls=1000,
    cold=False,
    targets={
        "AdamW step": {TORCH: Target(at_most=0.7)},
        "eval+train": {UPSTREAM: Target(at_most=1.0)},
    },
)

# Of a GPU with at least 100M parameters, and of models.
MANY_PARAMETERS = {"AdamW step, device": {COPY: Target(at_least=0.92), TORCH: Target(at_most=1.0)}}
MODEL = {
    "AdamW step, wall": {TORCH: Target(at_most=0.8)},
    "AdamW step, launches": {OURS: Target(at_most=1)},
    "SGD step, launches": {OURS: Target(at_most=1)},
}

GIANT = Workload("1 x 1B fp32", [10**9], rivals=(TORCH,), targets=MANY_PARAMETERS)
GIANT_BYTES = 60  # for each element: two contenders, initial values, gradients, and what checks take
WITH_COMPILED = (TORCH, UPSTREAM, UPSTREAM_COMPILED)
CUDA_LARGE = Workload("8 x 4M fp32", [4 * 2**20] * 8, rivals=WITH_COMPILED)
RESNET50 = Workload("ResNet-50 fp32", resnet50(), rivals=WITH_COMPILED, targets=MODEL)
GPT2 = Workload("GPT-2 124M fp32", gpt2(), rivals=WITH_COMPILED, targets=MODEL | MANY_PARAMETERS)
CUDA_OTHERS = [
    Workload("10000 x 64 fp32", [64] * 10_000),
    Workload("64 odd sizes fp32", [2**19 + 2 * i + 1 for i in range(64)]),
    Workload("8 x 4M fp32, grad 4 bytes off", [4 * 2**20] * 8, grad_offset=1),
    Workload("8 x 4M fp32, grad 0", [4 * 2**20] * 8, zero_gradients=True),
    # torch and schedulefree keep all of their state in bfloat16 and move 14 bytes a parameter, ours are 26.
    Workload("8 x 4M bf16 with y_lo", [4 * 2**20] * 8, dtype=torch.bfloat16),
]


@dataclass(frozen=True)
class Format:
    """How AdamW's parameters and state are stored."""

    name: str
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)
    at_most: float | None = None  # of the time of torch's fused AdamW on float32


MOMENT8: dict[str, Any] = {"exp_avg_sq_bits": 8}
BITS24: dict[str, Any] = {"state_bits": 24}
RANDOM: dict[str, Any] = {"rounding": "stochastic"}
FORMATS = (
    Format("fp32", torch.float32),
    Format("fp32, 8-bit moment", torch.float32, MOMENT8),
    Format("bf16", torch.bfloat16, at_most=0.95),
    Format("bf16, 8-bit moment", torch.bfloat16, MOMENT8),
    Format("fp16", torch.float16),
    Format("fp16, 8-bit moment", torch.float16, MOMENT8),
    Format("bf16, 24 bits", torch.bfloat16, BITS24),
    Format("bf16, 24 bits at random", torch.bfloat16, BITS24 | RANDOM),
    Format("bf16, 24 bits, 8-bit moment", torch.bfloat16, BITS24 | MOMENT8, at_most=0.70),
    Format("bf16, 24 bits at random, 8-bit moment", torch.bfloat16, BITS24 | MOMENT8 | RANDOM),
)
# Beside y and the gradient.
FORMAT_STREAMS = ("y_lo", "z", "z_lo", "exp_avg_sq", "exp_avg_sq_scale", "exp_avg")
OF_ITS_CEILING = 0.85
SLOW_RIVAL_ROUNDS = 5


HALF, BF16 = torch.float16, torch.bfloat16
OF_COPY = "AdamW step, device"


def brief(
    label: str,
    sizes: list[int],
    dtype: torch.dtype = torch.float32,
    *,
    part: float | None = None,
    **others: Any,
) -> Workload:
    """A row of the brief table.

    Args:
        label: how the row is called.
        sizes: elements of each tensor.
        dtype: of the parameters.
        part: of a copy's speed that a step should reach.
        **others: fields of the workload; what is none of them is an option of our optimizer.
    """
    known = {name: others.pop(name) for name in list(others) if name in Workload.__dataclass_fields__}
    few = sum(sizes) < 2e6
    targets = {OF_COPY: {COPY: Target(at_least=part)}} if part is not None else {}
    known = {"calls": 20 if few else 1, "cold": not few, "targets": targets, "rivals": (TORCH,)} | known
    return Workload(label, sizes, dtype=dtype, options=others, **known)


BIG = [4 * 2**20] * 8
OF_TORCH = {OF_COPY: {TORCH: Target(at_most=0.8)}}
BRIEF = [
    brief("fp32", BIG, part=0.95),
    brief("fp32, 8-bit moment", BIG, **MOMENT8),
    brief("fp32, 8-bit moment, inner momentum", BIG, inner_momentum=0.9, **MOMENT8),
    brief("bf16", BIG, BF16, part=0.9),
    brief("fp16", BIG, HALF, part=0.9),
    brief("bf16, 24 bits", BIG, BF16, **BITS24),
    brief("bf16, 24 bits, 8-bit moment", BIG, BF16, part=0.65, **BITS24, **MOMENT8),
    brief("bf16, 24 bits at random, 8-bit moment", BIG, BF16, **BITS24, **MOMENT8, **RANDOM),
    brief("fp64", [2 * 2**20] * 8, torch.float64, rivals=()),
    brief("fp32, capturable", BIG, capturable=True, part=0.95),
    brief("bf16, 24 bits, 8-bit moment, capturable", BIG, BF16, capturable=True, **BITS24, **MOMENT8),
    brief("fp32, clipped", BIG, max_grad_norm=1.0),
    brief("fp32, grad 4 bytes off", BIG, grad_offset=1),
    brief("fp32, grad transposed", BIG, transposed_gradients=True),
    brief("1 x 8", [8]),
    brief("300 x 8", [8] * 300),
    brief("300 x 4k", [4096] * 300),
    brief("10000 x 64", [64] * 10_000),
    brief("64 odd sizes", [2**19 + 2 * i + 1 for i in range(64)]),
    brief("ResNet-50", resnet50(), targets=OF_TORCH),
    brief("GPT-2", gpt2(), targets=OF_TORCH),
    brief("GPT-2 bf16, 24 bits, 8-bit moment", gpt2(), BF16, **BITS24, **MOMENT8),
]
BRIEF_SWAPS = ("fp32", "bf16", "bf16, 24 bits", "fp64")  # whose swaps and norms are measured, too
BRIEF_ROUNDS = 15


@dataclass(frozen=True)
class Timing:
    """One contender in one row. Times are of one call; quartiles are the first and the third."""

    row: str
    contender: str
    tensors: int
    elements: int
    median_s: float
    samples_s: list[float]
    ratio: float | None  # None for ours
    ratio_quartiles: tuple[float, float] | None
    target: str
    met: bool | None


@dataclass(frozen=True)
class Count:
    """What a contender takes: bytes of tensor storage at a call's peak or for a parameter, launches."""

    row: str
    contender: str
    count: float
    unit: str
    target: str
    met: bool | None


@dataclass(frozen=True)
class Failure:
    """A contender that could not be measured."""

    row: str
    contender: str
    reason: str


@dataclass(frozen=True)
class Bench:
    """Where and how everything is measured."""

    device: torch.device
    library: ctypes.CDLL | None  # of a CPU
    rounds: int
    clocks: dict[str, Clock]  # by what is appended to a row's title


# ---- the no-arithmetic loops ---------------------------------------------------------------------------


def load_ceiling() -> ctypes.CDLL:
    """Builds the no-arithmetic loops where they are out of date, and loads them.

    Raises:
        SystemExit: with the messages of a build that failed.
    """
    target = "schedulefree_no_arithmetic"
    build = ROOT / "build" / "benchmarks"
    # --fresh: a cached configuration could be for another environment's torch.
    configure = [
        "cmake", "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
        "-DSCHEDULEFREE_PYTHON=OFF",
        "-DSCHEDULEFREE_BENCHMARKS=ON",
        f"-DSCHEDULEFREE_TORCH_ROOT={Path(torch.__file__).parent}",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    compilation = ["cmake", "--build", str(build), "--target", target]
    for command in (configure, compilation):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.exit(f"{done.stdout}\n`{' '.join(command)}` failed; its messages are above.")
    return ctypes.CDLL(str(next(build.glob(f"lib{target}.*"))))


def ceiling(bench: Bench, name: str, *streams: Sequence[Tensor]) -> Work:
    """A call of a no-arithmetic loop on the memory of ours.

    Args:
        bench: the library.
        name: of the loop: ``adamw``, ``sgd``, ``swap`` or ``exchange``.
        streams: the lists that the optimizer's kernel moves, which the caller keeps alive.
    """
    function = getattr(bench.library, f"schedulefree_ceiling_{name}")
    function.restype = None
    count = len(streams[0])
    numel = (ctypes.c_int64 * count)(*(t.numel() for t in streams[0]))
    pointers = [(ctypes.c_void_p * count)(*(t.data_ptr() for t in stream)) for stream in streams]
    return partial(function, ctypes.c_int64(count), numel, *pointers)


def bytes_moved(name: str, streams: Sequence[Sequence[Tensor]]) -> int:
    """What a kernel reads and writes; the gradient, and z in a swap, are only read."""
    only_read = None if name == "exchange" else 1  # in each of the others, the second list
    return sum(
        t.nbytes * (1 if position == only_read else 2)
        for position, stream in enumerate(streams)
        for t in stream
    )


def streams_of_step(optimizer: Any) -> list[Sequence[Tensor]]:
    """What a step of ours moves in any format: gradients, which are only read, and what is written, too."""
    params = parameters_of(optimizer)
    states = [optimizer.state[p] for p in params]
    names = [name for name in FORMAT_STREAMS if name in states[0]]
    return [gradients_of(optimizer), params, *([state[name] for state in states] for name in names)]


def copy_of_step(optimizer: Any, device: torch.device) -> Work:
    """A copy of as many bytes as a step of ours moves."""
    grads, *others = streams_of_step(optimizer)
    return copy_of(sum(t.nbytes for t in grads) + sum(2 * t.nbytes for ts in others for t in ts), device)


def ceiling_of_streams(bench: Bench, optimizer: Any) -> tuple[str, Work]:
    """What moves the memory of a step of ours in any format, without arithmetic, and its name."""
    if bench.device.type != "cpu":
        return COPY, copy_of_step(optimizer, bench.device)
    assert bench.library is not None
    streams, params = streams_of_step(optimizer), parameters_of(optimizer)
    count = len(params)
    numel = (ctypes.c_int64 * count)(*(p.numel() for p in params))
    if any(n % 1024 for n in numel):
        raise ValueError("expected tensors of multiples of 1024 elements")
    size = (ctypes.c_int64 * len(streams))(*(s[0].nbytes * 1024 // params[0].numel() for s in streams))
    lists = [(ctypes.c_void_p * count)(*(t.data_ptr() for t in stream)) for stream in streams]
    data = (ctypes.c_void_p * len(lists))(*(ctypes.addressof(each) for each in lists))
    function = bench.library.schedulefree_ceiling_streams
    function.restype = None

    def move(_keep: object = lists) -> None:
        function(ctypes.c_int64(count), numel, ctypes.c_int64(len(lists)), size, data)

    return CEILING, move


def copy_of(total: int, device: torch.device) -> Work:
    """A copy from buffer to buffer that reads and writes so many bytes, in several parts if they are many."""
    size = max(1, min(total // 2, BYTES_TO_COPY))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    whole, rest = divmod(total // 2, size)

    def copy() -> None:
        for _ in range(whole):
            destination.copy_(source)
        if rest:
            destination[:rest].copy_(source[:rest])

    return copy


# ---- contenders ----------------------------------------------------------------------------------------


def compiled_upstream(parameters: list[Parameter]) -> Any:
    """The upstream optimizer with a compiled step."""
    optimizer = ADAMW[UPSTREAM](parameters)
    optimizer.step = torch.compile(optimizer.step)
    return optimizer


def new_optimizer(
    make: Callable[..., Any],
    start: Sequence[Tensor],
    grads: Sequence[Tensor],
    grad_offset: int = 0,
    *,
    transposed: bool = False,
) -> Any:
    """An optimizer with tensors of its own, in train mode, past its first step, which creates the state."""
    parameters = [Parameter(t.clone()) for t in start]
    for p, g in zip(parameters, grads, strict=True):
        grad = g.new_empty(g.numel() + grad_offset)[grad_offset:].view(g.shape).copy_(g)
        p.grad = grad.t() if transposed else grad
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


def low_halves_of(optimizer: Any) -> list[Tensor]:
    """The low half of every bfloat16 parameter."""
    states = [optimizer.state[p] for p in parameters_of(optimizer)]
    return [state["y_lo"] for state in states if "y_lo" in state]


def state_of(optimizer: Any, name: str) -> list[Tensor]:
    """One state tensor of every parameter."""
    return [optimizer.state[p][name] for p in parameters_of(optimizer)]


def bytes_for_a_parameter(optimizer: Any) -> float:
    """Bytes of parameters and state, gradients apart, for each element."""

    def size(t: Any) -> int:
        if not torch.is_tensor(t):
            return 0
        flatten = getattr(t, "__tensor_flatten__", None)
        if flatten is not None:  # a subclass that wraps others
            return sum(size(getattr(t, name)) for name in flatten()[0])
        return int(t.nbytes)

    params = parameters_of(optimizer)
    state = [value for p in params for value in optimizer.state[p].values()]
    return sum(map(size, [*params, *state])) / sum(p.numel() for p in params)


def slow_rivals() -> dict[str, Callable[[], Callable[..., Any]]]:
    """Rivals with few bytes, which may not be installed or not run here. Each imports when it is called."""

    def torchao() -> Callable[..., Any]:
        module = importlib.import_module("torchao.optim")
        return partial(module.AdamW8bit, bf16_stochastic_round=True, **SETTINGS)

    def bitsandbytes() -> Callable[..., Any]:
        return partial(importlib.import_module("bitsandbytes").optim.AdamW8bit, **SETTINGS)

    def flashoptim() -> Callable[..., Any]:
        return partial(importlib.import_module("flashoptim").FlashAdamW, **SETTINGS)

    return {TORCHAO: torchao, BITSANDBYTES: bitsandbytes, FLASHOPTIM: flashoptim}


def renew_gradients(optimizer: Any, *, zero: bool) -> None:
    """Draws every gradient anew, as in training: one that never changes would drive z away from y.

    schedulefree steps by overwriting gradients, so that zeros are written again, too.
    """
    for gradient in gradients_of(optimizer):
        gradient.zero_() if zero else gradient.normal_()


def eval_and_train(optimizer: Any) -> None:
    """The two swaps of an evaluation."""
    optimizer.eval()
    optimizer.train()


def around_a_base_step(optimizer: Any) -> Work:
    """The operators around the step of a base optimizer, on the memory of ours and without such a step."""
    y, z = [p.detach() for p in parameters_of(optimizer)], state_of(optimizer, "z")
    coefs = ops.coefs(beta=0.9)

    def both() -> None:
        ops.before_base_step_(y, [], z, coefs, beta=0.9)
        ops.after_base_step_(y, [], z, coefs)

    return both


def check_values(name: str, optimizer: Any) -> None:
    """Raises RuntimeError for values that make arithmetic slow and a comparison void."""
    tensors = [*parameters_of(optimizer), *gradients_of(optimizer)]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    smallest = torch.finfo(torch.float32).smallest_normal
    for t in tensors:
        if not t.is_floating_point() or hasattr(t, "__tensor_flatten__"):  # codes of others
            continue
        if not t.isfinite().all() or ((t != 0) & (t.abs() < smallest)).any():
            raise RuntimeError(f"{name} was timed on NaNs, infinities or subnormal numbers")


# ---- clocks --------------------------------------------------------------------------------------------


def seconds_per_call(work: Work, calls: int) -> float:
    """Wall time on a CPU."""
    start = time.perf_counter_ns()
    for _ in range(calls):
        work()
    return (time.perf_counter_ns() - start) * 1e-9 / calls


def host_seconds(work: Work, calls: int) -> float:
    """Time until calls return; the GPU has nothing to do when they begin."""
    torch.cuda.synchronize()
    return seconds_per_call(work, CALLS_IN_A_ROW * calls)


def wall_seconds(work: Work, calls: int) -> float:
    """Time until the GPU has done what calls in a row ask for."""
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    for _ in range(CALLS_IN_A_ROW * calls):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter_ns() - start) * 1e-9 / (CALLS_IN_A_ROW * calls)


class DeviceClock:
    """Time on the GPU, between two events.

    A kernel that only waits runs before the first, for longer than the host takes to launch all the rest:
    else the time would be the host's.
    """

    CYCLES_PER_SECOND = 3e9  # no GPU runs faster
    FIRST_LEAD_S = 1e-3
    LONGEST_LEAD_S = 0.1  # a queue that is full lets the host go no further ahead

    def __init__(self) -> None:
        """Knows of no work yet."""
        self._leads: dict[int, float] = {}

    def __call__(self, work: Work, calls: int) -> float:
        """Seconds of one call of several."""
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        lead = self._leads.get(id(work), self.FIRST_LEAD_S)
        torch.cuda._sleep(int(lead * self.CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]
        start.record()
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        end.record()
        # For the next sample; the first are warm-up.
        host = time.perf_counter() - begin
        self._leads[id(work)] = min(max(lead, 2 * host), self.LONGEST_LEAD_S)
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / calls


# ---- measurements --------------------------------------------------------------------------------------


def measure(
    row: str,
    workload: Workload,
    works: dict[str, Work],
    targets: dict[str, Target],
    prepare: Callable[[str], None],
    rounds: int,
    clock: Clock = seconds_per_call,
) -> list[Timing]:
    """Times contenders against each other.

    Args:
        row: title.
        workload: what the contenders work on.
        works: what is timed, by contender; OURS among them.
        targets: bounds, by contender; may lack some.
        prepare: called with the contender's name before each of its samples, not timed.
        rounds: samples of each contender.
        clock: takes a sample.

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
            samples[name].append(clock(works[name], workload.calls))
    samples = {name: taken[WARMUP_ROUNDS:] for name, taken in samples.items()}
    return [
        timing(row, workload, name, taken, samples[OURS], targets.get(name, Target()))
        for name, taken in samples.items()
    ]


def timing(
    row: str, workload: Workload, name: str, theirs: list[float], ours: list[float], target: Target
) -> Timing:
    """What the samples of a contender say, beside ours of the same rounds."""
    ratio, quartiles = None, None
    if name != OURS:
        over, under = (theirs, ours) if name in CEILINGS else (ours, theirs)
        ratios = [a / b for a, b in zip(over, under, strict=True)]
        first, ratio, third = statistics.quantiles(ratios, n=4, method="inclusive")
        quartiles = (first, third)
    return Timing(
        row=row,
        contender=name,
        tensors=len(workload.sizes),
        elements=workload.elements,
        median_s=statistics.median(theirs),
        samples_s=theirs,
        ratio=ratio,
        ratio_quartiles=quartiles,
        target=str(target),
        met=None if ratio is None else target.met(ratio),
    )


def peak_extra_bytes(work: Work, device: torch.device) -> int:
    """The most bytes of tensor storage that a call holds at one time beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
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


def kernel_launches(work: Work) -> int:
    """What a call puts on the GPU: kernels, copies and fills. 0 where the profiler sees nothing."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    # An optimizer's step also leaves a range of that name.
    return sum(
        event.device_type == DeviceType.CUDA and not event.name.startswith("Optimizer.")
        for event in profiler.events()
    )


def captured(work: Work) -> Work:
    """The replay of a CUDA graph of one call."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


class Report:
    """Prints results as they come and keeps them for the JSON file."""

    def __init__(self, about: dict[str, Any]) -> None:
        """Prints what the results were measured on and the head of the table."""
        self.about = about
        self.timings: list[Timing] = []
        self.counts: list[Count] = []
        self.failures: list[Failure] = []
        for key, value in about.items():
            print(f"{key:18}{value}")
        print(
            "\nmedians over the rounds; ratio (quartiles): schedulefree_cpp / contender,\n"
            "or ceiling / schedulefree_cpp, the part of its speed that is reached\n"
        )
        self._print("row", "contender", "median", "ratio", "target", "met")

    @staticmethod
    def _print(row: str, contender: str, figure: str, ratio: str, target: str, met: str) -> None:
        print(f"{row:58}{contender:28}{figure:>18}  {ratio:22}{target:9}{met}".rstrip(), flush=True)

    @staticmethod
    def _yes_no(met: bool | None) -> str:
        return "-" if met is None else "yes" if met else "no"

    def add_timings(self, timings: Sequence[Timing]) -> None:
        """Takes the contenders of a row."""
        self.timings += timings
        for t in timings:
            if (
                t.elements < 1024 * t.tensors
            ):  # the cost is the host's, which grows with the number of tensors
                median = f"{t.median_s / t.tensors * 1e6:.4g} us/tensor"
            else:
                median = f"{t.median_s * 1e3:.4g} ms"
            ratio = "-"
            if t.ratio is not None and t.ratio_quartiles is not None:
                ratio = f"{t.ratio:.3f} ({t.ratio_quartiles[0]:.3f}-{t.ratio_quartiles[1]:.3f})"
            self._print(t.row, t.contender, median, ratio, t.target, self._yes_no(t.met))

    def add_count(
        self, row: str, contender: str, count: float, unit: str, target: Target | None = None
    ) -> None:
        """Takes what a call takes, and how much of it is allowed."""
        target = target or Target()
        met = target.met(count)
        self.counts.append(Count(row, contender, count, unit, str(target), met))
        self._print(row, contender, f"{count:.10g} {unit}".rstrip(), "-", str(target), self._yes_no(met))

    def add_failure(self, row: str, contender: str, error: Exception) -> None:
        """Takes a contender that could not be measured."""
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
        self.failures.append(Failure(row, contender, reason))
        self._print(row, contender, "failed", reason, "", "")

    def write(self, path: Path) -> None:
        """Writes everything as JSON."""
        content = {
            **self.about,
            "timings": [asdict(t) for t in self.timings],
            "counts": [asdict(c) for c in self.counts],
            "failures": [asdict(f) for f in self.failures],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")


# ---- the rows ------------------------------------------------------------------------------------------


class Stage:
    """Optimizers of all contenders on one workload, with equal parameters and gradients."""

    def __init__(
        self,
        bench: Bench,
        report: Report,
        workload: Workload,
        family: Family,
        dtypes: dict[str, torch.dtype] | None = None,
    ) -> None:
        """Creates the optimizers; one that is compiled may fail to, and is reported.

        Args:
            bench: where and how to measure.
            report: takes the results.
            workload: the parameters.
            family: the contenders.
            dtypes: of the parameters of contenders that have others than the workload's.
        """
        generator = torch.Generator(bench.device).manual_seed(0)

        def draw(n: int) -> Tensor:
            drawn = torch.randn(n, generator=generator, device=bench.device).to(workload.dtype)
            return drawn.view(math.isqrt(n), -1) if workload.transposed_gradients else drawn

        self.bench, self.report, self.workload = bench, report, workload
        start = [draw(n) for n in workload.sizes]
        grads = [torch.zeros_like(t) if workload.zero_gradients else draw(t.numel()) for t in start]
        self.optimizers: dict[str, Any] = {}
        for name, make in family.items():
            try:
                dtype = (dtypes or {}).get(name, workload.dtype)
                own_start, own_grads = ([t.to(dtype) for t in each] for each in (start, grads))
                optimizer = new_optimizer(
                    make,
                    own_start,
                    own_grads,
                    workload.grad_offset,
                    transposed=workload.transposed_gradients,
                )
                if name == UPSTREAM_COMPILED:
                    for _ in range(4):  # compiles again as its schedule's numbers change
                        optimizer.step()
                self.optimizers[name] = optimizer
            except Exception as error:
                if name != UPSTREAM_COMPILED:
                    raise
                report.add_failure(f"{workload.label}, AdamW step", name, error)
        evicting = BYTES_TO_EVICT // 4 if workload.cold else 0
        self.other_memory = torch.ones(evicting, device=bench.device)

    def streams(self, *states: str) -> list[list[Tensor]]:
        """What our step moves: gradients second. Without states what a swap moves, z second."""
        ours = self.optimizers[OURS]
        y = parameters_of(ours) + low_halves_of(ours)
        if not states:
            return [y, state_of(ours, "z")]
        return [y, gradients_of(ours), *(state_of(ours, name) for name in states)]

    def steps(self) -> dict[str, Work]:
        """A step of every optimizer."""
        return {name: optimizer.step for name, optimizer in self.optimizers.items()}

    def swaps(self) -> dict[str, Work]:
        """eval() and train() of the optimizers that have them."""
        return {
            name: partial(eval_and_train, optimizer)
            for name, optimizer in self.optimizers.items()
            if name in (OURS, UPSTREAM)
        }

    def ceilings(self, name: str, *streams: Sequence[Tensor], times: int = 1) -> dict[str, Work]:
        """What moves as much memory as ours, without arithmetic."""
        if self.bench.device.type == "cuda":
            return {COPY: copy_of(times * bytes_moved(name, streams), self.bench.device)}
        loop = ceiling(self.bench, name, *streams)

        def repeated() -> None:
            for _ in range(times):
                loop()

        return {CEILING: loop if times == 1 else repeated}

    def measure(self, work: str, works: dict[str, Work], ceilings: dict[str, Work]) -> None:
        """Times contenders by every clock."""
        for what, clock in self.bench.clocks.items():
            on_device = what in ("", "device")  # launching a ceiling costs the host next to nothing
            row = f"{work}, {what}" if what else work
            self.measure_row(row, works | (ceilings if on_device else {}), clock)

    def measure_row(self, row: str, works: dict[str, Work], clock: Clock, rounds: int | None = None) -> None:
        """Times contenders from equal conditions and makes sure that they worked on ordinary numbers."""

        def prepare(name: str) -> None:
            if name == CEILING:
                # The loops move the memory of ours, so that nothing but the arithmetic differs. This call
                # scrambles it and the timed one, being its own inverse, puts it right.
                works[CEILING]()
            elif name in self.optimizers:
                renew_gradients(self.optimizers[name], zero=self.workload.zero_gradients)
            self.other_memory.sum()

        title = f"{self.workload.label}, {row}"
        targets = self.workload.targets.get(row, {})
        rounds = rounds or self.bench.rounds
        timings = measure(title, self.workload, works, targets, prepare, rounds, clock)
        self.report.add_timings(timings)
        for name, optimizer in self.optimizers.items():
            check_values(name, optimizer)

    def count(self, work: str, works: dict[str, Work], *, bounded: bool = True) -> None:
        """Peak memory of contenders, of which ours may be bounded, and their launches on a GPU."""
        title = f"{self.workload.label}, {work}"
        for name, step in works.items():
            target = Target(at_most=0) if bounded and name == OURS else None
            extra = peak_extra_bytes(step, self.bench.device)
            self.report.add_count(f"{title}, extra memory", name, extra, "bytes", target)
        if self.bench.device.type == "cuda":
            targets = self.workload.targets.get(f"{work}, launches", {})
            for name, step in works.items():
                launches = kernel_launches(step)
                if launches:
                    self.report.add_count(f"{title}, launches", name, launches, "", targets.get(name))


def family_of(family: Family, rivals: Sequence[str]) -> Family:
    """Ours and some rivals."""
    return {name: make for name, make in family.items() if name in (OURS, *rivals)}


def run_adamw(bench: Bench, report: Report, workload: Workload) -> None:
    """AdamW steps, eager and in a graph, and swaps."""
    contenders = family_of(ADAMW | {UPSTREAM_COMPILED: compiled_upstream}, workload.rivals)
    stage = Stage(bench, report, workload, contenders)
    streams = stage.streams("z", "exp_avg_sq")
    large = workload.cold
    stage.measure("AdamW step", stage.steps(), stage.ceilings("adamw", *streams) if large else {})
    swapped = stage.streams()
    stage.measure("eval+train", stage.swaps(), stage.ceilings("swap", *swapped, times=2) if large else {})
    if large:
        stage.count("AdamW step", stage.steps())
        stage.count("eval+train", stage.swaps())
    if bench.device.type == "cuda":
        del stage, streams, swapped
        stage = Stage(bench, report, workload, CAPTURABLE)
        ceilings = stage.ceilings("adamw", *stage.streams("z", "exp_avg_sq"))
        works = {name: captured(work) for name, work in (stage.steps() | ceilings).items()}
        stage.measure_row("AdamW step, graph", works, bench.clocks["device"])


def run_formats(bench: Bench, report: Report, workload: Workload) -> None:
    """AdamW steps in every storage format, beside torch's, and rivals that need few bytes."""
    first, *_ = workload.label.rpartition(" ")
    on_device = next(iter(bench.clocks))
    row = f"AdamW step, {on_device}" if on_device else "AdamW step"
    # One of each for all rows: its time depends on where its memory happens to lie.
    base = Stage(
        bench,
        report,
        workload,
        {TORCH: ADAMW[TORCH], TORCH_BF16: ADAMW[TORCH]},
        {TORCH: torch.float32, TORCH_BF16: torch.bfloat16},
    )
    for how in FORMATS:
        own = partial(schedulefree_cpp.AdamWScheduleFree, **SETTINGS, **how.options)
        bounds = {TORCH: Target(at_most=how.at_most), CEILING: Target(at_least=OF_ITS_CEILING)}
        case = replace(workload, label=f"{first} {how.name}", dtype=how.dtype, targets={row: bounds})
        stage = Stage(bench, report, case, {OURS: own})
        report.add_count(case.label, OURS, bytes_for_a_parameter(stage.optimizers[OURS]), "bytes/parameter")
        name, loop = ceiling_of_streams(bench, stage.optimizers[OURS])
        stage.measure_row(row, stage.steps() | base.steps() | {name: loop}, bench.clocks[on_device])
    for name, optimizer in base.optimizers.items():
        check_values(name, optimizer)

    rivals: Family = {UPSTREAM_BF16: ADAMW[UPSTREAM]}
    case = replace(workload, label=f"{first} bf16, 24 bits, 8-bit moment", dtype=torch.bfloat16)
    tiny = [torch.zeros(4096, dtype=torch.bfloat16, device=bench.device)]
    for name, load in slow_rivals().items():
        try:
            new_optimizer(load(), tiny, tiny).step()
            rivals[name] = load()
        except Exception as error:
            report.add_failure(case.label, name, error)
    own = partial(schedulefree_cpp.AdamWScheduleFree, **SETTINGS, **BITS24, **MOMENT8)
    stage = Stage(bench, report, case, {OURS: own, **rivals})
    for name in rivals:
        report.add_count(case.label, name, bytes_for_a_parameter(stage.optimizers[name]), "bytes/parameter")
    rounds = min(bench.rounds, SLOW_RIVAL_ROUNDS)
    stage.measure_row(f"{row}, {rounds} rounds", stage.steps(), bench.clocks[on_device], rounds)


def run_sgd(bench: Bench, report: Report, workload: Workload) -> None:
    """Memory-bound SGD steps."""
    stage = Stage(bench, report, workload, family_of(SGD, workload.rivals))
    stage.measure("SGD step", stage.steps(), stage.ceilings("sgd", *stage.streams("z")))
    stage.count("SGD step", stage.steps())
    around = {OURS: around_a_base_step(stage.optimizers[OURS])}
    stage.measure("around a base step", around, stage.ceilings("exchange", *stage.streams(), times=2))


def run_clipping(bench: Bench, report: Report, workload: Workload) -> None:
    """AdamW steps that clip gradients, within the step or by torch before it."""
    stage = Stage(bench, report, workload, CLIPPING)

    def clip_and_step(optimizer: Any) -> None:
        clip_grad_norm_(parameters_of(optimizer), 1.0)
        optimizer.step()

    works: dict[str, Work] = {
        name: partial(clip_and_step, optimizer) for name, optimizer in stage.optimizers.items()
    }
    works[OURS] = stage.optimizers[OURS].step
    stage.measure("clipped AdamW step", works, {})
    stage.count("clipped AdamW step", works, bounded=False)


def run_wrapper(bench: Bench, report: Report, workload: Workload) -> None:
    """Steps of wrapped optimizers, and what they take beyond those of the optimizers alone."""
    for name, family in WRAPPED.items():
        stage = Stage(bench, report, workload, family)
        stage.measure_row(f"{name} in a wrapper", stage.steps(), bench.clocks[""])
        taken = {t.contender: t.samples_s for t in report.timings[-len(family) :]}
        alone = taken.pop(ALONE)
        over = {who: [t - a for t, a in zip(times, alone, strict=True)] for who, times in taken.items()}
        row = f"{name} in a wrapper, overhead"
        targets = workload.targets.get(row, {})
        report.add_timings(
            [
                timing(
                    f"{workload.label}, {row}", workload, who, times, over[OURS], targets.get(who, Target())
                )
                for who, times in over.items()
            ]
        )
        extra = {who: peak_extra_bytes(step, bench.device) for who, step in stage.steps().items()}
        for who, count in extra.items():
            target = Target(at_most=extra[ALONE]) if who == OURS else None
            row = f"{workload.label}, {name} in a wrapper, extra memory"
            report.add_count(row, who, count, "bytes", target)


def our_optimizer(workload: Workload) -> Callable[..., Any]:
    """Makes AdamW with a workload's options."""
    return partial(schedulefree_cpp.AdamWScheduleFree, **SETTINGS, **workload.options)


def run_brief_row(bench: Bench, report: Report, workload: Workload) -> None:
    """A step of one kind beside torch's and a copy, its graph, its swaps and its norm."""
    rivals = {TORCH: ADAMW[TORCH]} if TORCH in workload.rivals else {}
    dtypes = {TORCH: BF16} if workload.dtype == HALF else None
    stage = Stage(bench, report, workload, {OURS: our_optimizer(workload), **rivals}, dtypes)
    ours = stage.optimizers[OURS]
    copy = {COPY: copy_of_step(ours, bench.device)} if workload.cold else {}
    stage.measure("AdamW step", stage.steps(), copy)
    device = next(iter(bench.clocks.values()))
    if bench.device.type == "cuda" and workload.options.get("capturable"):
        stage.measure_row("AdamW step, graph", {OURS: captured(ours.step), **copy}, device)
    if workload.label not in BRIEF_SWAPS:
        return
    swapped = stage.streams()
    moved = 2 * bytes_moved("swap", swapped)
    stage.measure_row(
        "eval+train", {OURS: partial(eval_and_train, ours), COPY: copy_of(moved, bench.device)}, device
    )
    grads = gradients_of(ours)
    norms: dict[str, Work] = {
        OURS: lambda: schedulefree_cpp.ops.grad_norm(grads),
        TORCH: lambda: torch.nn.utils.get_total_norm(grads),
    }
    stage.measure_row("norm of gradients", norms, device)


def run_brief(
    bench: Bench, report: Report, workloads: Sequence[Workload], seconds: float, path: Path | None
) -> None:
    """The brief rows, as many as there is time for; none costs the others more than its own time.

    Args:
        bench: where and how to measure.
        report: takes the results.
        workloads: the rows.
        seconds: no row begins later.
        path: file that is written after every row.
    """
    begin = time.monotonic()
    for workload in workloads:
        try:
            if time.monotonic() - begin > seconds:
                raise TimeoutError(f"not begun: {seconds:g} s are over")
            run_brief_row(bench, report, workload)
        except Exception as error:
            report.add_failure(f"{workload.label}, AdamW step", OURS, error)
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        if path:
            report.write(path)


def run_steps(bench: Bench, report: Report, workload: Workload) -> None:
    """Six steps of ours, for a profiler to look at."""
    stage = Stage(bench, report, workload, {OURS: our_optimizer(workload)})
    for _ in range(5):
        stage.optimizers[OURS].step()
    if bench.device.type == "cuda":
        torch.cuda.synchronize()


def small(workload: Workload) -> Workload:
    """The same with few elements: tries the script."""
    sizes = [min(n, 4096) for n in workload.sizes[:300]]
    return replace(workload, sizes=sizes, calls=1)


def cpu_model() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def driver_version() -> str:
    """The GPU driver's version, as far as the system tells."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def about(device: torch.device, rounds: int) -> dict[str, Any]:
    """What the results were measured on."""
    common = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "schedulefree_cpp": schedulefree_cpp.__version__,
        "rounds": rounds,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Other work on the cores slows down most the rivals that start the pool most often.
        "load average": round(os.getloadavg()[0], 2),
        "isa": _C.cpu_isa(),
    }
    if device.type == "cpu":
        return common
    properties = torch.cuda.get_device_properties(device)
    return common | {
        "gpu": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu memory": properties.total_memory,
        "driver": driver_version(),
        "cuda": torch.version.cuda,
    }


def slug(name: str) -> str:
    """A name as a file's: ``NVIDIA H100 80GB HBM3`` becomes ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def fitting(workload: Workload, bytes_per_element: int, free: int) -> Workload:
    """A workload of one tensor, reduced to what fits in memory; its label then says so."""
    (size,) = workload.sizes
    fits = int(0.9 * free) // bytes_per_element // 2**20 * 2**20
    if size <= fits:
        return workload
    return replace(workload, label=f"1 x {fits / 1e6:.0f}M fp32 ({size / 1e9:.0f}B do not fit)", sizes=[fits])


def run_cpu(bench: Bench, report: Report, *, quick: bool) -> None:
    """All rows of a CPU."""
    large = LARGE_QUICK if quick else LARGE
    run_adamw(bench, report, large)
    run_sgd(bench, report, large)
    run_clipping(bench, report, large)
    run_adamw(bench, report, TINY)
    run_clipping(bench, report, TINY)
    run_adamw(bench, report, SINGLE)
    run_wrappers(bench, report, quick=quick)


def run_wrappers(bench: Bench, report: Report, *, quick: bool) -> None:
    """The rows of the wrapper."""
    few = {"label": "8 x 1M fp32", "sizes": [2**20] * 8} if quick else {}
    for workload in (replace(LARGE_WRAPPED, **few), THOUSAND_WRAPPED):
        run_wrapper(bench, report, workload)


def run_cuda(bench: Bench, report: Report, *, quick: bool, only: str) -> None:
    """All rows of a GPU, or those of workloads whose label contains ``only``."""
    giant = fitting(GIANT, GIANT_BYTES, torch.cuda.mem_get_info()[0])
    plan: list[tuple[Workload, tuple[Callable[[Bench, Report, Workload], None], ...]]] = [
        (CUDA_LARGE, (run_adamw, run_sgd, run_clipping)),
        (RESNET50, (run_adamw, run_sgd, run_clipping)),
        (GPT2, (run_adamw, run_sgd, run_clipping)),
        (giant, (run_adamw, run_sgd)),
        *((workload, (run_adamw,)) for workload in CUDA_OTHERS),
    ]
    for workload, runs in plan:
        if only not in workload.label:
            continue
        if quick:
            small = [min(n, 2**16) for n in workload.sizes]
            workload = replace(workload, label=f"{workload.label} (quick)", sizes=small)
        for run in runs:
            run(bench, report, workload)
            torch.cuda.empty_cache()


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line.

    Raises:
        SystemExit: for arguments that make no sense, or a GPU that is not there.
    """
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    parser.add_argument("--rounds", type=int, default=41, help="samples of each contender, at least 2")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of torch's pool"
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="PATH",
        help="also write the results there; those of a GPU go to benchmarks/results unless told otherwise",
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="on a GPU, only workloads whose label contains this"
    )
    rows = parser.add_mutually_exclusive_group()
    rows.add_argument("--formats", action="store_true", help="only the storage formats of AdamW")
    rows.add_argument("--wrappers", action="store_true", help="only the wrapper, on a CPU")
    rows.add_argument(
        "--brief", action="store_true", help="every kind of AdamW step once, beside torch's and a copy"
    )
    rows.add_argument(
        "--steps-of", metavar="LABEL", help="take six steps of a row of --brief, for a profiler, and end"
    )
    parser.add_argument(
        "--seconds", type=float, default=130, help="no row of --brief begins after so many seconds"
    )
    parser.add_argument(
        "--quick", action="store_true", help="5 rounds at most and smaller tensors: tries the script"
    )
    parsed = parser.parse_args(arguments)
    if parsed.rounds < 2 or parsed.threads < 1:
        parser.error("--rounds must be at least 2 and --threads at least 1")
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    if parsed.device == "cuda" and parsed.json is None:
        name = slug(torch.cuda.get_device_name())
        partly = parsed.quick or parsed.only or parsed.formats or parsed.brief or parsed.steps_of
        parsed.json = None if partly else ROOT / "benchmarks" / "results" / f"{name}.json"
    if parsed.steps_of is not None and parsed.steps_of not in [row.label for row in BRIEF]:
        parser.error(f"--steps-of: expected one of {'; '.join(row.label for row in BRIEF)}")
    if parsed.brief:
        parsed.rounds = min(parsed.rounds, BRIEF_ROUNDS)
    if parsed.quick:
        parsed.rounds = min(parsed.rounds, 5)
    return parsed


def main() -> None:
    """Measures all rows."""
    arguments = parse_arguments()
    device = torch.device(arguments.device)
    brief_rows = [small(row) for row in BRIEF] if arguments.quick else BRIEF
    only_memory = device.type == "cuda" or arguments.brief or arguments.steps_of or arguments.wrappers
    library = None if only_memory else load_ceiling()
    torch.set_num_threads(arguments.threads)
    clocks: dict[str, Clock] = {"": seconds_per_call}
    if device.type == "cuda":
        clocks = {"device": DeviceClock(), "wall": wall_seconds, "host": host_seconds}
    bench = Bench(device, library, arguments.rounds, clocks)
    report = Report(about(device, arguments.rounds))
    if arguments.steps_of:
        run_steps(bench, report, next(row for row in brief_rows if row.label == arguments.steps_of))
    elif arguments.brief:
        clocks.pop("wall", None)
        run_brief(bench, report, brief_rows, arguments.seconds, arguments.json)
    elif arguments.formats:
        run_formats(bench, report, LARGE_QUICK if arguments.quick else LARGE)
    elif arguments.wrappers:
        run_wrappers(bench, report, quick=arguments.quick)
    elif device.type == "cuda":
        run_cuda(bench, report, quick=arguments.quick, only=arguments.only)
    else:
        run_cpu(bench, report, quick=arguments.quick)
    if arguments.json:
        report.write(arguments.json)


if __name__ == "__main__":
    main()
