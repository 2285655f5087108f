"""Random arguments at the operators: a refusal that has written nothing, or the right result; never a crash."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import random
import resource
from collections.abc import Callable
from typing import Any

import pytest
import torch
from schedulefree_cpp import ops

SEED = int(os.environ.get("SCHEDULEFREE_FUZZ_SEED", "0"))
SHAPES = [(4, 6), (7,), (), (0,), (3, 1, 5), (1030,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ODD_DTYPES = [torch.complex64, torch.int64, torch.bool, torch.int16, torch.uint8, torch.float8_e4m3fn]
ODD_NUMBERS = [math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e308, 1e-320, 2.0, 0.5]
# For each operator the lists that it takes, those it writes first.
LISTS = {
    "sgd_step_": ["y", "y_lo", "z", "grad"],
    "adamw_step_": ["y", "y_lo", "z", "exp_avg_sq", "exp_avg", "grad"],
    "y_to_x_": ["y", "y_lo", "z"],
    "x_to_y_": ["y", "y_lo", "z"],
    "before_base_step_": ["y", "y_lo", "z"],
    "after_base_step_": ["y", "y_lo", "z"],
    "polyak_sums": ["y", "y_lo", "grad", "z"],
    "grad_norm": ["grad"],
}
ALLOWED = (RuntimeError, TypeError, ValueError, NotImplementedError)


def valid(name: str, draw: random.Random) -> dict[str, Any]:
    """Arguments that the operator takes."""
    dtype = draw.choice(DTYPES)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [draw.choice(SHAPES) for _ in range(draw.randint(0, 4))]
    lists: dict[str, Any] = {
        key: [torch.randn(shape).abs().to(state if key not in ("y", "grad") else dtype) for shape in shapes]
        for key in LISTS[name]
    }
    if "y_lo" in lists:
        low = dtype == torch.bfloat16 and draw.random() < 0.8
        lists["y_lo"] = [torch.randint(-99, 99, shape).short() for shape in shapes] if low else []
    arguments = lists
    if name in ("sgd_step_", "adamw_step_"):
        scalars = {"lr": 0.1, "w": 0.3, "a": -0.05, "beta": 0.9, "weight_decay": draw.choice([0.0, 0.1])}
        if name == "adamw_step_":
            inner = draw.choice([0.0, 0.9])
            scalars |= {"beta2": 0.99, "denom_scale": 1.5, "denom_eps": 1e-8, "inner_momentum": inner}
            arguments["exp_avg"] = lists["exp_avg"] if inner else []
        arguments |= {"coefs": ops.coefs(**scalars), "decay_at": draw.choice([0, 1])}
    elif name in ("y_to_x_", "x_to_y_"):
        arguments["beta"] = draw.choice([0.9, 0.5, 1.0])
    elif name in ("before_base_step_", "after_base_step_"):
        scalars = {
            "lr": 0.1,
            "w": draw.choice([0.0, 0.3, 1.0]),
            "beta": 0.9,
            "weight_decay": draw.choice([0.0, 0.1]),
        }
        arguments |= {"coefs": ops.coefs(**scalars), "exchange": draw.random() < 0.5}
        if name == "before_base_step_":
            arguments["beta"] = draw.choice([0.9, 0.5, 1.0])
    return arguments


# ---- what is changed -----------------------------------------------------------------------------------


def strided(t: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """The same values with other strides."""
    padded = torch.zeros((*t.shape, 3), dtype=t.dtype)
    padded[..., 1] = t
    choices = [
        padded[..., 1],
        t.clone(memory_format=torch.contiguous_format),
        t.mT.contiguous().mT if t.dim() == 2 else t.clone(),
        torch.cat([t.reshape(-1)[:0], t.reshape(-1), t.reshape(-1)[:0]]).view(t.shape),
    ]
    return draw.choice(choices)


def odd(t: torch.Tensor, draw: random.Random) -> Any:
    """Something else in the place of a tensor."""
    changes: list[Callable[[], Any]] = [
        lambda: t.to(draw.choice(ODD_DTYPES)) if t.dtype != torch.int16 else t.float(),
        lambda: t.to(draw.choice(DTYPES)),
        lambda: torch.zeros(draw.choice([*SHAPES, (2**40, 0), (1, 1, 1, 1)]), dtype=t.dtype),
        lambda: t.reshape(-1)[:1].expand(t.shape) if t.numel() else t,
        lambda: t.to("meta"),
        lambda: t.to_sparse() if t.is_floating_point() else t,
        lambda: t.as_strided(t.shape, [0] * t.dim()) if t.numel() else t,
        lambda: t.unsqueeze(0),
        lambda: t.flip(0) if t.dim() else t,
        lambda: t.detach().requires_grad_() if t.is_floating_point() else t,
        lambda: t.conj() if t.is_complex() else -t,
        lambda: torch.full_like(t, draw.choice(ODD_NUMBERS)) if t.is_floating_point() else t,
        lambda: None,
        lambda: 1.0,
        lambda: "text",
    ]
    try:
        return draw.choice(changes)()
    except ALLOWED:  # no such thing can be made of this tensor
        return t


def change(arguments: dict[str, Any], draw: random.Random) -> None:
    """Changes one thing."""
    key = draw.choice(list(arguments))
    value = arguments[key]
    if isinstance(value, list):
        others = [other for other in arguments.values() if isinstance(other, list) and other]
        kind = draw.randrange(7)
        if kind == 0 and value:
            value.pop(draw.randrange(len(value)))
        elif kind == 1 and others:
            value.insert(0, draw.choice(draw.choice(others)))
        elif kind == 2 and value and others:
            value[draw.randrange(len(value))] = draw.choice(draw.choice(others))  # shares memory
        elif kind == 3 and value and isinstance(value[0], torch.Tensor) and value[0].dim():
            value[0] = torch.cat([value[0], value[0]])[: len(value[0])]
        elif kind == 4 and value:
            i = draw.randrange(len(value))
            if (
                isinstance(value[i], torch.Tensor)
                and value[i].layout is torch.strided
                and not value[i].is_meta
            ):
                value[i] = strided(value[i], draw)
        elif kind == 5:
            arguments[key] = draw.choice([[], None, 3, [None], value * 2])
        elif value:
            i = draw.randrange(len(value))
            if isinstance(value[i], torch.Tensor) and value[i].layout is torch.strided:
                value[i] = odd(value[i], draw)
    elif isinstance(value, torch.Tensor):
        if draw.random() < 0.5 and value.dim() == 1 and value.layout is torch.strided:
            arguments[key] = value.clone()
            if value.dtype.is_floating_point and value.numel() and not value.is_meta:
                arguments[key][draw.randrange(value.numel())] = draw.choice(ODD_NUMBERS)
        else:
            arguments[key] = odd(value, draw)
    else:
        arguments[key] = draw.choice([*ODD_NUMBERS, 2, -1, 2**63 - 1, "x", None])


# ---- what must hold ------------------------------------------------------------------------------------


def tensors_of(arguments: dict[str, Any]) -> list[torch.Tensor]:
    lists = [value if isinstance(value, list) else [value] for value in arguments.values()]
    return [t for tensors in lists for t in tensors if isinstance(t, torch.Tensor)]


def memory_of(arguments: dict[str, Any]) -> list[bytes]:
    """The bytes of every storage, and the values of what has none."""
    found = []
    for t in tensors_of(arguments):
        if t.layout is torch.strided and not t.is_meta:
            storage = t.untyped_storage()
            found.append(ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b"")
    return found


def alone(arguments: dict[str, Any], i: int) -> dict[str, Any]:
    """The arguments of one parameter alone, with contiguous memory of its own."""
    one = {
        key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()
    }
    for key, value in one.items():
        if isinstance(value, list):
            one[key] = [value[i].detach().clone(memory_format=torch.contiguous_format)] if value else []
    return one


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.is_floating_point():
        return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(3.0), b.nan_to_num(3.0))
    return torch.equal(a, b)


def check(name: str, arguments: dict[str, Any]) -> bool:
    """Calls an operator. Returns whether it took the arguments."""
    operator = getattr(ops, name)
    lists = [key for key in LISTS[name]]
    count = len(arguments[lists[0]]) if isinstance(arguments[lists[0]], list) else 0
    before = memory_of(arguments)
    separate = None
    with torch.no_grad():
        try:
            separate = [alone(arguments, i) for i in range(count)]
        except Exception:
            separate = None
        try:
            result = operator(**arguments)
        except ALLOWED:
            assert memory_of(arguments) == before, "a refused call has written"
            return False
        if any(t.is_meta for t in tensors_of(arguments)):
            return True
        assert separate is not None, "arguments that do not go together were taken"
        results = [operator(**one) for one in separate]
    if result is not None:  # sums
        if name == "grad_norm":
            expected = torch.stack([r.square() for r in results]).sum().sqrt() if results else torch.zeros(())
        else:
            expected = torch.stack(results).sum(0) if results else torch.zeros(2)
        if bool(expected.isfinite().all()):
            torch.testing.assert_close(result, expected.double(), rtol=1e-9, atol=1e-9)
        else:
            assert not bool(result.isfinite().all())
        assert memory_of(arguments) == before
        return True
    for i, one in enumerate(separate):
        for key in lists:
            if arguments[key]:
                assert same(arguments[key][i].detach(), one[key][0]), f"{key}[{i}]"
    return True


@pytest.mark.parametrize("count", [400, pytest.param(50_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", LISTS)
def test_random_arguments_are_refused_or_right(name, count):
    count = int(os.environ.get("SCHEDULEFREE_FUZZ_CASES", count))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = 0
    for number in range(count):
        draw = random.Random(1_000_003 * SEED + number)
        torch.manual_seed(number)
        arguments = valid(name, draw)
        for _ in range(draw.randint(0, 3)):
            with contextlib.suppress(*ALLOWED):  # of a tensor that cannot be changed so
                change(arguments, draw)
        try:
            taken += check(name, arguments)
        except BaseException:
            print(f"SCHEDULEFREE_FUZZ_SEED={SEED}, case {number}: {name}({arguments})")
            raise
    print(f"{name}: {taken} of {count} taken")
    assert count / 10 < taken < count
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


def test_a_write_before_a_refusal_is_seen(monkeypatch):
    def writes_first(y: Any, **_: Any) -> None:
        y[0] += 1
        raise RuntimeError("too late")

    monkeypatch.setattr(ops, "y_to_x_", writes_first)
    arguments = {"y": [torch.ones(3)], "y_lo": [], "z": [torch.ones(3)], "beta": 0.9}
    with pytest.raises(AssertionError, match="has written"):
        check("y_to_x_", arguments)


@pytest.mark.parametrize("count", [600, pytest.param(50_000, marks=pytest.mark.long)])
def test_random_schedules_are_refused_or_finite(count):
    names = ["coefs", "k", "weight_sum", "lr_max", "scheduled_lr", "lr", "weight_decay"]
    taken = 0
    for number in range(count):
        draw = random.Random(1_000_003 * SEED + number)
        torch.manual_seed(number)
        tensors: dict[str, Any] = {name: torch.tensor(0.5, dtype=torch.float64) for name in names}
        tensors |= {"coefs": torch.zeros(len(ops.COEFFICIENTS), dtype=torch.float64), "k": torch.tensor(3)}
        numbers: dict[str, Any] = {
            "kind": draw.randrange(5),
            "beta": 0.9,
            "warmup_steps": 2.0,
            "r": 0.5,
            "weight_lr_power": 2.0,
            "beta2": 0.99,
            "eps": 1e-8,
        }
        for _ in range(draw.randint(0, 2)):
            if draw.random() < 0.5:
                name = draw.choice(names)
                if isinstance(tensors[name], torch.Tensor) and tensors[name].layout is torch.strided:
                    tensors[name] = odd(tensors[name], draw)
            else:
                numbers[draw.choice(list(numbers))] = draw.choice([*ODD_NUMBERS, 3, -1, 2**40])
        before = memory_of(tensors)
        try:
            ops.schedule_step_(**tensors, **numbers)
        except ALLOWED:
            assert memory_of(tensors) == before, (number, numbers)
            continue
        taken += 1
        if not any(t.is_meta for t in tensors_of(tensors)):
            of_the_step = tensors["coefs"][: ops.COEFFICIENTS.index("k")]
            assert of_the_step.isfinite().all() or not tensors["lr_max"].isfinite(), (number, numbers)
    assert count / 10 < taken < count
