"""Steps whose scalars are in tensors: the operators, and ``capturable=True``."""

from __future__ import annotations

import math
from typing import Any

import cases
import pytest
import torch
from schedulefree_cpp import _C, _fallback, ops

F64 = torch.float64
SHAPES = [(5, 3), (7,), (), (40, 130)]
RULE: dict[str, Any] = {
    "kind": ops.STEP_KINDS["adamw"],
    "beta_next": 0.8,
    "warmup_steps": 3,
    "r": 0.5,
    "weight_lr_power": 2.0,
    "beta2": 0.99,
    "eps": 1e-8,
}


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    monkeypatch.setattr(_fallback, "_warned", {"cpu"})


def new_schedule(
    k: int = 0, weight_sum: float = 0.0, lr_max: float = -1.0, beta: float = 0.9
) -> list[torch.Tensor]:
    """coefs, k, weight_sum, lr_max, scheduled_lr, beta."""
    numbers = [torch.tensor(value, dtype=F64) for value in (weight_sum, lr_max, 0.0, beta)]
    return [torch.full((len(ops.COEFFICIENTS),), torch.nan, dtype=F64), torch.tensor(k), *numbers]


def number(value: float, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


def named(coefs: torch.Tensor) -> dict[str, float]:
    return dict(zip(ops.COEFFICIENTS, coefs.tolist(), strict=True))


def streams(dtype: torch.dtype, seed: int) -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]

    state = F64 if dtype == F64 else torch.float32
    low = [torch.randint(-99, 99, shape, generator=generator).short() for shape in SHAPES]
    return {
        "y": draw(dtype),
        "y_lo": low if dtype == torch.bfloat16 else [],
        "grad": draw(dtype),
        "z": draw(state),
        "exp_avg_sq": [t.abs() for t in draw(state)],
        "exp_avg": draw(state),
    }


def copied(lists: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    return {name: [t.clone() for t in tensors] for name, tensors in lists.items()}


def assert_equal(one: dict[str, list[torch.Tensor]], other: dict[str, list[torch.Tensor]]) -> None:
    for name, tensors in one.items():
        cases.assert_same(tensors, other[name])


# ---- operators -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ops.STEP_KINDS)
def test_a_schedule_in_tensors_is_that_of_the_host(kind):
    adam = {"beta2": 0.95, "eps": 1e-6, "inner_momentum": 0.5, "silent_sgd_phase": False}
    rule = {**RULE, "kind": ops.STEP_KINDS[kind], **adam}
    coefs, *state = new_schedule()
    k, weight_sum, lr_max, beta = 0, 0.0, -1.0, 0.9
    for seed in range(12):
        lr = 0.1 + 0.01 * seed
        lr_factor, denom_scale, denom_eps = _C.step_factors(kind=rule["kind"], k=k, **adam)
        s = _C.advance(
            k=k, weight_sum=weight_sum, lr_max=lr_max, lr=lr, lr_factor=lr_factor, warmup_steps=3, r=0.5,
            weight_lr_power=2.0, beta=beta, beta_next=0.8,
        )  # fmt: skip
        before = [t.item() for t in state]
        ops.schedule_step_(coefs, *state, number(lr), number(0.1), **rule)
        assert named(coefs) == {
            "take": 1.0, "lr": s.lr, "w": s.w, "a": s.a, "weight_decay": 0.1, "grad_mul": 1.0, "beta2": 0.95,
            "denom_scale": denom_scale, "denom_eps": denom_eps, "inner_momentum": 0.5,
            **dict(zip(("k", "weight_sum", "lr_max", "scheduled_lr", "beta"), before, strict=True)),
        }  # fmt: skip
        assert [t.item() for t in state] == [s.k, s.weight_sum, s.lr_max, s.lr, 0.8]
        k, weight_sum, lr_max, beta = s.k, s.weight_sum, s.lr_max, 0.8


@pytest.mark.parametrize("decay_at", [0, 1])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_a_step_from_a_tensor_is_that_from_scalars(dtype, weight_decay, decay_at):
    for inner in (0.0, 0.9):
        one = streams(dtype, seed=1)
        if not inner:
            one["exp_avg"] = []
        other, plain = copied(one), copied(one)
        coefs, *state = new_schedule(k=2, weight_sum=0.01, lr_max=0.1)
        ops.schedule_step_(
            coefs, *state, number(0.1), number(weight_decay), **RULE, inner_momentum=inner, maximize=True
        )
        c = named(coefs)
        scalars = {name: c[name] for name in ("lr", "w", "a", "weight_decay", "grad_mul")}
        adam = {name: c[name] for name in ("beta2", "denom_scale", "denom_eps", "inner_momentum")}
        ops.adamw_step_(*one.values(), **scalars, **adam, decay_at=decay_at)
        ops.adamw_step_capturable_(*other.values(), coefs, decay_at=decay_at)
        assert_equal(one, other)
        assert not torch.equal(one["z"][0], plain["z"][0])
        one, other = ({name: lists[name] for name in ("y", "y_lo", "grad", "z")} for lists in (plain, other))
        other = copied(one)
        ops.sgd_step_(*one.values(), **scalars, decay_at=decay_at)
        ops.sgd_step_capturable_(*other.values(), coefs, decay_at=decay_at)
        assert_equal(one, other)


def test_a_skipped_step_changes_nothing():
    schedule = new_schedule(k=2, weight_sum=0.01, lr_max=0.1)
    before = [t.clone() for t in schedule[1:]]
    for found in (number(1.0, torch.float32), torch.tensor([torch.nan])):
        ops.schedule_step_(*schedule, number(0.1), number(0.1), **RULE, found_inf=found)
        assert schedule[0][0] == 0
        cases.assert_same(schedule[1:], before)
        cases.assert_same(schedule[0][-5:], before)
    lists = streams(torch.bfloat16, seed=1)
    kept = copied(lists)
    ops.adamw_step_capturable_(*lists.values(), schedule[0])
    assert_equal(lists, kept)
    lists["exp_avg_sq"] = lists["exp_avg"] = []
    ops.sgd_step_capturable_(lists["y"], lists["y_lo"], lists["grad"], lists["z"], schedule[0])
    cases.assert_same(lists["y"], kept["y"])
    # A learning rate that would be refused is not looked at.
    ops.schedule_step_(*schedule, number(-1.0), number(0.1), **RULE, found_inf=torch.ones(1))


def test_gradients_are_unscaled_and_clipped_by_their_unscaled_norm():
    coefs, *state = new_schedule()
    amp = {"grad_scale": number(4.0, torch.float32), "grad_norm": number(40.0), "max_grad_norm": 2.0}
    ops.schedule_step_(coefs, *state, number(0.1), number(0.0), **RULE, **amp, maximize=True)
    assert named(coefs)["grad_mul"] == -(2.0 / (10.0 + 1e-6)) / 4.0
    amp["max_grad_norm"] = math.inf
    ops.schedule_step_(coefs, *state, number(0.1), number(0.0), **RULE, **amp)
    assert named(coefs)["grad_mul"] == 0.25


@pytest.mark.parametrize("limit", [1.0, 1e9, math.inf])
@pytest.mark.parametrize("norm", [0.0, 3.0, math.inf, math.nan])
def test_step_operators_clip_by_a_norm_in_a_tensor(norm, limit):
    factor = _C.clip_factor(norm, limit)
    clipped = torch.tensor([norm]).clamp(max=torch.inf)
    clipped = (limit / (clipped + 1e-6)).clamp(max=1.0) if limit < math.inf else torch.ones(1)
    torch.testing.assert_close(torch.tensor([factor]), clipped, equal_nan=True)
    scalars = {"lr": 0.1, "w": 0.3, "a": -0.05}
    adam = {**scalars, "beta2": 0.99, "denom_scale": 1.5, "denom_eps": 1e-8, "inner_momentum": 0.9}
    clip = {"grad_norm": number(norm), "max_grad_norm": limit}
    one = streams(torch.float32, seed=2)
    other, plus = copied(one), copied(one)
    ops.adamw_step_(*one.values(), **adam, grad_mul=-1.0, **clip)
    ops.adamw_step_(*other.values(), **adam, grad_mul=-factor)
    _fallback.adamw_step_(*plus.values(), **adam, grad_mul=-1.0, **clip)
    for name in one:
        for a, b, c in zip(one[name], other[name], plus[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ({"grad_norm": number(1.0)}, "max_grad_norm: expected a value, since grad_norm has one, got none"),
        ({"max_grad_norm": 1.0}, "grad_norm: expected a value, since max_grad_norm has one, got none"),
        ({"grad_norm": torch.ones(2).double(), "max_grad_norm": 1.0}, r"one element, got shape \[2\]"),
        (
            {"grad_norm": torch.ones(1), "max_grad_norm": 1.0},
            "grad_norm: expected dtype float64, got float32",
        ),
        ({"grad_norm": torch.ones(1).int(), "max_grad_norm": 1.0}, "float64, got int32"),
    ],
)
def test_a_norm_and_a_limit_come_together(clip, message):
    lists = streams(torch.float32, seed=1)
    before = copied(lists)
    with pytest.raises(RuntimeError, match=r"sgd_step_: .*" + message):
        ops.sgd_step_(lists["y"], [], lists["grad"], lists["z"], lr=0.1, w=0.3, a=-0.05, **clip)
    assert_equal(lists, before)


@pytest.mark.parametrize(
    ("coefs", "message"),
    [
        (torch.ones(15), r"coefs: expected dtype float64, got float32"),
        (torch.ones(14, dtype=F64), r"coefs: expected 15 elements, got 14"),
        (torch.ones(15, 1, dtype=F64), r"coefs: expected one contiguous dimension, got shape \[15, 1\]"),
        (torch.ones(30, dtype=F64)[::2], "coefs: expected one contiguous dimension"),
    ],
)
def test_coefficients_of_another_form_are_refused(coefs, message):
    assert len(ops.COEFFICIENTS) == 15
    lists = streams(torch.float32, seed=1)
    before = copied(lists)
    with pytest.raises(RuntimeError, match=r"adamw_step_.capturable: " + message):
        ops.adamw_step_capturable_(*lists.values(), coefs)
    with pytest.raises(RuntimeError, match="decay_at: expected 0"):
        ops.adamw_step_capturable_(*lists.values(), torch.ones(15, dtype=F64), decay_at=2)
    with pytest.raises(RuntimeError, match=r"schedule_step_: " + message):
        ops.schedule_step_(coefs, *new_schedule()[1:], number(0.1), number(0.0), **RULE)
    assert_equal(lists, before)


SCHEDULE = ["coefs", "k", "weight_sum", "lr_max", "scheduled_lr", "beta", "lr", "weight_decay"]
REFUSED = {
    "k": ({"k": torch.tensor(1.0)}, "k: expected dtype int64, got float32"),
    "lr_max": ({"lr_max": torch.tensor(1.0)}, "lr_max: expected dtype float64, got float32"),
    "beta": ({"beta": torch.ones(2).double()}, r"beta: expected one element, got shape \[2\]"),
    "lr": ({"lr": torch.tensor(1)}, "lr: expected dtype float32 or float64, got int64"),
    "negative lr": ({"lr": number(-1.0)}, r"Invalid lr: -1, expected a finite value >= 0"),
    "lr that is not finite": ({"lr": number(math.nan)}, "Invalid lr: nan"),
    "sum that overflows": ({"lr": number(1e200)}, "Invalid weight_sum: inf, expected a finite sum"),
    "beta outside its domain": ({"beta": number(0.0)}, r"Invalid beta: 0, expected a value in \(0, 1\]"),
    "beta_next": ({"beta_next": 1.5}, r"beta_next: expected a value in \(0, 1\], got 1.5"),
    "kind": ({"kind": 4}, r"kind: expected 0 \(SGD\), .*got 4"),
    "norm": ({"max_grad_norm": 1.0}, "grad_norm: expected a tensor, since max_grad_norm is given"),
    "found_inf": ({"found_inf": torch.zeros(2)}, r"found_inf: expected one element, got shape \[2\]"),
    "grad_scale": ({"grad_scale": torch.tensor(1)}, "grad_scale: expected dtype float32 or float64"),
    "device": ({"k": torch.tensor(1, device="meta")}, "got one on cpu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_schedule_has_changed_nothing(case):
    changes, message = REFUSED[case]
    tensors = dict(zip(SCHEDULE, [*new_schedule(), number(0.1), number(0.0)], strict=True))
    tensors |= {name: value for name, value in changes.items() if name in tensors}
    before = {name: t.clone() for name, t in tensors.items()}
    rule = {**RULE, **{name: value for name, value in changes.items() if name not in tensors}}
    with pytest.raises(RuntimeError, match=r"schedulefree_cpp::schedule_step_: .*" + message):
        ops.schedule_step_(*tensors.values(), **rule)
    for name, t in tensors.items():
        if t.device.type == "cpu":
            torch.testing.assert_close(t, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_schedule_has_memory_of_its_own():
    coefs, k, weight_sum, lr_max, scheduled_lr, beta = new_schedule()
    with pytest.raises(
        RuntimeError, match="lr_max: expected memory of its own, got memory shared with weight_sum"
    ):
        ops.schedule_step_(
            coefs, k, weight_sum, weight_sum, scheduled_lr, beta, number(0.1), number(0.0), **RULE
        )
    with pytest.raises(RuntimeError, match="shared with scheduled_lr"):
        ops.schedule_step_(
            coefs, k, weight_sum, lr_max, scheduled_lr, beta, scheduled_lr, number(0.0), **RULE
        )
    ops.schedule_step_(coefs, k, weight_sum, lr_max, scheduled_lr, beta, *[number(0.1)] * 2, **RULE)


def test_versions_rise_where_a_capturable_step_writes():
    lists = streams(torch.float32, seed=1)
    schedule = new_schedule()
    versions = {name: [t._version for t in tensors] for name, tensors in lists.items()}
    ops.schedule_step_(*schedule, number(0.1), number(0.0), **RULE)
    assert all(t._version > 0 for t in schedule)
    ops.adamw_step_capturable_(*lists.values(), schedule[0])
    for name, tensors in lists.items():
        for t, version in zip(tensors, versions[name], strict=True):
            assert (t._version > version) == (name != "grad")


def test_operators_without_parameters_take_no_step():
    coefs = new_schedule()[0]
    ops.sgd_step_capturable_([], [], [], [], coefs)
    ops.adamw_step_capturable_([], [], [], [], [], [], coefs)


@pytest.mark.parametrize("take", [1.0, 0.0])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_plain_torch_takes_the_same_steps(dtype, take):
    found = {"found_inf": number(1.0 - take)}
    one, other = new_schedule(), new_schedule()
    ops.schedule_step_(*one, number(0.1), number(0.1), **RULE, inner_momentum=0.9, **found)
    _fallback.schedule_step_(*other, number(0.1), number(0.1), **RULE, inner_momentum=0.9, **found)
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    lists = streams(dtype, seed=3)
    for names in (["y", "y_lo", "grad", "z"], list(lists)):
        kernels, plain = copied(lists), copied(lists)
        name = "sgd_step_.capturable" if len(names) == 4 else "adamw_step_.capturable"
        operator = ops.sgd_step_capturable_ if len(names) == 4 else ops.adamw_step_capturable_
        operator(*(kernels[n] for n in names), one[0], decay_at=1)
        _fallback.OPERATORS[name](*(plain[n] for n in names), one[0], decay_at=1)
        tolerance = 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5
        for n in names:
            for a, b in zip(kernels[n], plain[n], strict=True):
                if n != "y_lo":
                    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert torch.equal(plain["z"][0], lists["z"][0]) == (not take)
