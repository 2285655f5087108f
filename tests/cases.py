"""Test cases, declared once: shapes, dtypes, hyperparameters, and tolerances with their reasons."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import schedulefree_cpp
import torch
from reference import Hyperparameters

# 0-dim, empty, one element, below / at / above the vector and block sizes of the kernels.
SHAPES = [
    (),
    (0,),
    (3, 0, 2),
    (1,),
    (7,),
    (16, 1),
    (3, 5),
    (4, 3, 3, 3),
    (1023,),
    (1024,),
    (1025,),
    (40, 130),
]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Enough elements for several threads.
LARGE = (3, 50_021)

# The formulas are algebraically equal; a few hundred float32 roundings apart.
PARITY = {"rtol": 1e-5, "atol": 1e-6}

# One step: about eight roundings on the longest path, which seldom agree. Not a proven bound, see
# csrc/README.md.
MAX_ULPS = 4.0

# One step from float32 data of these magnitudes. Beyond 1e19 squares overflow float32, here as anywhere.
MAGNITUDES = {"unit": 1.0, "small": 1e-4, "tiny": 1e-20, "huge": 1e15, "denormal": 1e-39}

ADAMW = [
    Hyperparameters(adam=True, lr=0.0025),
    Hyperparameters(adam=True, lr=0.02, beta=0.95, beta2=0.99, weight_decay=0.1, warmup_steps=20, r=0.5),
    Hyperparameters(adam=True, lr=0.01, beta2=0.9, weight_decay=0.05, weight_lr_power=0.0, eps=1e-6),
    Hyperparameters(adam=True, lr=0.01, weight_decay=0.1, inner_momentum=0.9, warmup_steps=5),
    Hyperparameters(adam=True, lr=0.01, weight_decay=0.1, decay_at="z", maximize=True),
    Hyperparameters(adam=True, lr=0.01, beta=1.0, r=2.0),
    Hyperparameters(adam=True, lr=0.01, beta=0.95, r=0.5, decoupling_c=60.0),
    Hyperparameters(adam=True, lr=0.01, inner_momentum=0.9, decay_at="z", averaging_weight=0.05),
]
SGD = [
    Hyperparameters(adam=False, lr=0.5),
    Hyperparameters(adam=False, lr=0.1, beta=0.95, weight_decay=0.1, warmup_steps=20, r=1.0),
    Hyperparameters(adam=False, lr=0.1, weight_decay=0.1, weight_lr_power=0.0, decay_at="z"),
    Hyperparameters(adam=False, lr=0.1, maximize=True),
    Hyperparameters(adam=False, lr=0.1, weight_decay=0.1, decoupling_c=5.0),
    Hyperparameters(adam=False, lr=0.1, beta=0.8, warmup_steps=5, averaging_weight=0.2),
]


def name_of(h: Hyperparameters) -> str:
    """A test id: what differs from the defaults."""
    base = vars(Hyperparameters(adam=h.adam))
    changed = [f"{key}={value}" for key, value in vars(h).items() if value != base[key]]
    return "-".join(["adamw" if h.adam else "sgd", *changed])


def arguments(h: Hyperparameters, *, upstream: bool = False) -> dict[str, Any]:
    """Constructor arguments; ``upstream`` leaves out what ``schedulefree`` lacks."""
    kwargs: dict[str, Any] = {
        "lr": h.lr,
        "weight_decay": h.weight_decay,
        "warmup_steps": h.warmup_steps,
        "r": h.r,
        "weight_lr_power": h.weight_lr_power,
    }
    if h.adam:
        kwargs |= {"betas": (h.beta, h.beta2), "eps": h.eps}
    else:
        kwargs |= {"momentum": h.beta}
    if not upstream:
        kwargs |= {"maximize": h.maximize, "decay_at": h.decay_at, "decoupling_c": h.decoupling_c}
        kwargs |= {"averaging_weight": h.averaging_weight}
        if h.adam:
            kwargs |= {"inner_momentum": h.inner_momentum}
    return kwargs


def build(
    params: list[torch.Tensor], h: Hyperparameters
) -> schedulefree_cpp.SGDScheduleFree | schedulefree_cpp.AdamWScheduleFree:
    """Our optimizer, in train mode."""
    cls = schedulefree_cpp.AdamWScheduleFree if h.adam else schedulefree_cpp.SGDScheduleFree
    optimizer = cls(params, **arguments(h))
    optimizer.train()
    return optimizer


def parameters(
    shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.nn.Parameter]:
    """Random parameters, equal for equal arguments."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    """Random gradients, equal for equal shapes and seed."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def matrix(*axes: list[Any]) -> list[Any]:
    """Parameter sets of all combinations, most of them ``long``.

    The others are those whose positions add up to a multiple of the shortest axis: every combination of values of
    all axes but one is among them.
    """
    shortest = min(map(len, axes))
    sets = []
    for positions in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[i] for axis, i in zip(axes, positions, strict=True)]
        sets.append(pytest.param(*values, marks=[pytest.mark.long] if sum(positions) % shortest else []))
    return sets


# ---- the whole family ----------------------------------------------------------------------------------

# Built on the native operators, stepped by step().
NATIVE = ["AdamWScheduleFree", "AdamWScheduleFreePaper", "RAdamScheduleFree", "SGDScheduleFree"]
CLOSURE = ["AdamWScheduleFreeClosure", "RAdamScheduleFreeClosure", "SGDScheduleFreeClosure"]
PLUS = ["AdamCScheduleFreePlus", "AdamCScheduleFreePlusPaper"]
WRAPPER = ["ScheduleFreeWrapper", "ScheduleFreeWrapperReference"]
# Plain torch: train(), eval() and step(), and nothing else.
REFERENCE = ["AdamWScheduleFreeReference", "SGDScheduleFreeReference"]
# Those whose parameters change places between y and x when their user says so.
SWITCHED = NATIVE + PLUS + WRAPPER
COMPLETE = SWITCHED + CLOSURE
FAMILY = COMPLETE + REFERENCE


def make(name: str, params: Any, *, package: Any = schedulefree_cpp, lr: Any = 0.05, **kwargs: Any) -> Any:
    """An optimizer of the family, in train mode. Wrappers wrap RMSprop; ``kwargs`` are the wrapper's."""
    cls = getattr(package, name)
    optimizer = (
        cls(torch.optim.RMSprop(params, lr=lr, eps=1e-4), **kwargs)
        if name in WRAPPER
        else cls(params, lr=lr, **kwargs)
    )
    if name in SWITCHED + REFERENCE:
        optimizer.train()
    return optimizer


def params_of(optimizer: Any) -> list[torch.nn.Parameter]:
    """All parameters, group after group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def drive(optimizer: Any, seed: int) -> None:
    """One step as the class wants it, with random gradients that are equal for equal seeds."""
    params = params_of(optimizer)
    if "Closure" in type(optimizer).__name__:
        optimizer.step(lambda: set_gradients(params, seed))
        return
    set_gradients(params, seed)
    if "Plus" in type(optimizer).__name__:
        optimizer.step_func(function_value=1.0 + seed % 3)
    else:
        optimizer.step()


def run(optimizer: Any, steps: int, start: int = 0) -> None:
    """Some steps of :func:`drive`."""
    for seed in range(start, start + steps):
        drive(optimizer, seed)


def set_beta(optimizer: Any, beta: float) -> None:
    """Moves the interpolation weight of all groups, as a scheduler with ``cycle_momentum`` does."""
    for group in optimizer.param_groups:
        if "momentum" in group:
            group["momentum"] = beta
        else:
            group["betas"] = (beta, group["betas"][1])


def states_of(optimizer: Any) -> list[torch.Tensor]:
    """All tensors of the state, parameter after parameter."""
    return [
        t
        for p in params_of(optimizer)
        for _, t in sorted(optimizer.state.get(p, {}).items())
        if torch.is_tensor(t)
    ]


def copies(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Equal parameters of their own, with equal strides."""
    return [torch.nn.Parameter(p.detach().clone(), p.requires_grad) for p in params]


def assert_same(params: Any, others: Any) -> None:
    """Equal bits (but for the payload of NaNs)."""
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def assert_same_or_nan(params: Any, others: Any) -> None:
    """Equal bits (but for the payload of NaNs), of tensors that may hold NaN."""
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p.isnan(), q.isnan())
        assert torch.equal(p.nan_to_num(7.0), q.nan_to_num(7.0))
