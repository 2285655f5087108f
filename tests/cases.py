"""Test cases, declared once: shapes, dtypes, hyperparameters, and tolerances with their reasons."""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

import pytest
import schedulefree_cpp
import torch
from reference import Hyperparameters
from schedulefree_cpp import ops

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
    (511,),
    (1024,),
    (1025,),
    (40, 130),
]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Format(NamedTuple):
    """How a parameter and its state are kept (``csrc/storage.h``)."""

    dtype: torch.dtype
    y_lo: torch.dtype | None = None
    z_lo: torch.dtype | None = None
    moment8: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Constructor arguments of an optimizer that keeps its parameters so."""
        bits = {"state_bits": 24} if self.z_lo else {}
        return bits | ({"exp_avg_sq_bits": 8} if self.moment8 else {})


FORMATS = {
    "float32": Format(torch.float32),
    "float64": Format(torch.float64),
    "bfloat16": Format(torch.bfloat16, torch.int16),
    "float16": Format(torch.float16, torch.int16),
    "24 bits": Format(torch.bfloat16, torch.int8, torch.int8),
    "float32, 8-bit moment": Format(torch.float32, moment8=True),
    "bfloat16, 8-bit moment": Format(torch.bfloat16, torch.int16, moment8=True),
    "float16, 8-bit moment": Format(torch.float16, torch.int16, moment8=True),
    "24 bits, 8-bit moment": Format(torch.bfloat16, torch.int8, torch.int8, moment8=True),
}

Lists = dict[str, list[torch.Tensor]]


def lists_of(
    format: Format, shapes: list[tuple[int, ...]], seed: int = 0, grad_dtype: torch.dtype | None = None
) -> Lists:
    """What operators take, by name, with random values; empty lists for what the format does not have."""
    generator = torch.Generator().manual_seed(seed)

    def draw(dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]

    def integers(dtype: torch.dtype | None) -> list[torch.Tensor]:
        if dtype is None:
            return []
        info = torch.iinfo(dtype)
        return [torch.randint(info.min, info.max + 1, s, generator=generator).to(dtype) for s in shapes]

    wide = torch.float64 if format.dtype == torch.float64 else torch.float32
    lists = {
        "y": draw(format.dtype),
        "y_lo": integers(format.y_lo),
        "grad": draw(grad_dtype or format.dtype),
        "z": draw(torch.bfloat16 if format.z_lo else wide),
        "exp_avg_sq": integers(torch.uint8) if format.moment8 else [t.abs() for t in draw(wide)],
        "exp_avg": draw(wide),
        "z_lo": integers(format.z_lo),
        "exp_avg_sq_scale": [],
    }
    if format.moment8:
        counts = [-(-t.numel() // 128) for t in lists["y"]]
        lists["exp_avg_sq_scale"] = [torch.rand(n, generator=generator) for n in counts]
    return lists


def copied(lists: Lists) -> Lists:
    """Copies of all tensors."""
    return {name: [t.clone() for t in tensors] for name, tensors in lists.items()}


# What the operators take, in their order, and by name.
OPERANDS = {
    "sgd_step_": (("y", "y_lo", "grad", "z"), ("z_lo",)),
    "adamw_step_": (
        ("y", "y_lo", "grad", "z", "exp_avg_sq", "exp_avg"),
        ("z_lo", "exp_avg_sq_scale"),
    ),
    "y_to_x_": (("y", "y_lo", "z"), ("z_lo",)),
    "x_to_y_": (("y", "y_lo", "z"), ("z_lo",)),
    "before_base_step_": (("y", "y_lo", "z"), ()),
    "after_base_step_": (("y", "y_lo", "z"), ()),
    "polyak_sums": (("y", "y_lo", "grad", "z"), ("z_lo",)),
}
AROUND_A_BASE = ["before_base_step_", "after_base_step_"]
# Whose z is whole, and whose y can hold it.
LENT = {name: f for name, f in FORMATS.items() if not f.z_lo and not f.moment8}
EXCHANGED = {name: f for name, f in LENT.items() if not f.y_lo}


def call(operators: Any, name: str, lists: Lists, *others: Any, **scalars: Any) -> Any:
    """Calls an operator with its lists. ``exp_avg`` is left out where ``coefs`` has no inner momentum."""
    positional, named = OPERANDS[name]
    momentum = others and others[0][ops.COEFFICIENTS.index("inner_momentum")] != 0
    given = [lists[key] if key != "exp_avg" or momentum else [] for key in positional]
    by_name = {key: lists[key] for key in named}
    return getattr(operators, name)(*given, *others, **by_name, **scalars)


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
# Two kinds of groups, the first of which steps by matrix products and sgd_step_.
MUON = ["MuonScheduleFree"]
WRAPPER = ["ScheduleFreeWrapper", "ScheduleFreeWrapperReference"]
# Plain torch: train(), eval() and step(), and nothing else.
REFERENCE = ["AdamWScheduleFreeReference", "SGDScheduleFreeReference"]
# Those whose parameters change places between y and x when their user says so.
SWITCHED = NATIVE + PLUS + MUON + WRAPPER
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
        if "betas" in group:
            group["betas"] = (beta, group["betas"][1])
        else:
            group["momentum"] = beta


def entry(entries: Any, name: str) -> Any:
    """An entry of a group or state; those of wrappers have a prefix, beside a base optimizer's."""
    return entries["sf_" + name] if "sf_" + name in entries else entries[name]


def state(optimizer: Any, p: Any) -> dict[str, Any]:
    """The entries of a parameter's state by their names in the fused classes."""
    return {name.removeprefix("sf_"): value for name, value in optimizer.state.get(p, {}).items()}


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


def with_strides(t, layout):
    """A copy of ``t`` with the same values and other strides."""
    if layout == "contiguous":
        return t.clone(memory_format=torch.contiguous_format)
    if layout == "channels_last":
        return t.clone().contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gaps":
        wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1] + 1)
        view = wide[..., 1::2]
        return view.copy_(t)
    raise AssertionError(layout)


LAYOUTS = ["contiguous", "channels_last", "transposed", "gaps"]


def snapshot(optimizer):
    """What a refused call must leave as it is, copied."""
    params = params_of(optimizer)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in copy.deepcopy(optimizer.param_groups)]
    numbers = str([sorted(group.items()) for group in groups])  # nan is not equal to itself
    state = [sorted(optimizer.state.get(p, {})) for p in params]
    return copy.deepcopy([p.data for p in params]), copies(states_of(optimizer)), numbers, state


def assert_unchanged(optimizer, before):
    """Compares an optimizer with its `snapshot`."""
    after = snapshot(optimizer)
    assert after[2:] == before[2:]
    for old, new in zip(before[:2], after[:2], strict=True):
        assert [t.dtype for t in old] == [t.dtype for t in new]
        assert_same(old, new)
