"""Many parameters, huge ones, and long runs."""

from __future__ import annotations

import gc
import math
import os
from fractions import Fraction
from pathlib import Path

import cases
import pytest
import schedulefree_cpp
import torch
from schedulefree_cpp import _C, ops

LONG = pytest.mark.long


# ---- many, and huge ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_thousand_parameters_are_as_one(name, dtype):
    whole = [torch.nn.Parameter(torch.randn(30_000, generator=torch.Generator().manual_seed(0)).to(dtype))]
    pieces = [torch.nn.Parameter(piece.clone()) for piece in whole[0].detach().split(3)]
    assert len(pieces) == 10_000
    one, many = cases.make(name, whole), cases.make(name, pieces)
    for seed in range(5):
        cases.set_gradients(whole, seed)
        for p, grad in zip(pieces, whole[0].grad.split(3), strict=True):
            p.grad = grad
        one.step(), many.step()
        if seed == 2:
            many.eval(), many.train()
            many.load_state_dict(many.state_dict())
    assert torch.equal(whole[0], torch.cat(pieces))
    many.eval(), one.eval()
    assert torch.equal(whole[0], torch.cat(pieces))


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 0


@pytest.mark.long
def test_a_parameter_above_two_to_the_31_elements():
    count, slice_ = 2**31 + 100_003, 65_536
    needed = count * (2 + 2 + 4) + 2**30  # y, its low half, z; the gradient is one number
    if available_bytes() < 1.15 * needed:
        pytest.skip(
            f"needs {1.15 * needed / 1e9:.0f} GB of memory, {available_bytes() / 1e9:.0f} GB are free"
        )
    small = torch.randn(slice_, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.zeros(count, dtype=torch.bfloat16)
    y[:slice_], y[-slice_:] = small, small
    z, lo = torch.zeros(count), torch.zeros(count, dtype=torch.int16)
    z[:slice_], z[-slice_:] = small.float(), small.float()
    grad = torch.full((1,), 0.25, dtype=torch.bfloat16)
    own = [small.clone(), torch.zeros(slice_, dtype=torch.int16), small.float()]
    scalars = ops.coefs(lr=0.1, w=0.3, a=-0.05, beta=0.9, weight_decay=0.1)
    ops.sgd_step_([y], [lo], [grad.expand(count)], [z], scalars)
    ops.sgd_step_([own[0]], [own[1]], [grad.expand(slice_)], [own[2]], scalars)
    for swap in (ops.y_to_x_, ops.x_to_y_):
        swap([y], [lo], [z], beta=0.9)
        swap([own[0]], [own[1]], [own[2]], beta=0.9)
    for big, expected in zip((y, lo, z), own, strict=True):
        assert torch.equal(big[:slice_], expected)
        assert torch.equal(big[-slice_:], expected)
        middle = big[2**31 - 5 : 2**31 + 5]
        assert torch.equal(middle, middle[:1].expand(10))
    assert y[2**31].item() != 0


# ---- the schedule over a million steps -----------------------------------------------------------------


@pytest.mark.parametrize("steps", [20_000, pytest.param(1_000_000, marks=LONG)])
@pytest.mark.parametrize("r", [0, 1, 3])
def test_the_schedule_is_that_of_exact_arithmetic(r, steps):
    """Weights (k+1)^r * lr_max^2 with a learning rate that goes up and down, summed as fractions."""
    k, weight_sum, lr_max = 0, 0.0, -1.0
    exact_sum, exact_max = Fraction(0), Fraction(-1)
    worst = 0.0
    for number in range(steps):
        lr = 0.001 * (1 + (number % 1000) / 64) + number * 2.0**-40
        step = _C.schedule_step(
            kind=ops.STEP_KINDS["sgd"],
            k=k,
            weight_sum=weight_sum,
            lr_max=lr_max,
            lr=lr,
            beta=0.9,
            beta_next=0.9,
            r=float(r),
        )
        k, weight_sum, lr_max = step.k, step.weight_sum, step.lr_max
        exact_max = max(exact_max, Fraction(lr))
        weight = (number + 1) ** r * exact_max**2
        exact_sum += weight
        if number % 997 == 0 or number == steps - 1:
            worst = max(worst, abs(step.c / float(weight / exact_sum) - 1))
            worst = max(worst, abs(weight_sum / float(exact_sum) - 1))
    assert k == steps
    assert Fraction(lr_max) == exact_max
    # Each addition rounds by half a unit of the sum, 2^-53, and so does each weight, a few times.
    assert worst < (steps + 8) * 2.0**-53


@pytest.mark.parametrize("r", [50.0, 100.0, 300.0])
def test_a_sum_of_weights_that_overflows_is_refused_before_anything_changes(r):
    params = cases.parameters([(5,)])
    optimizer = schedulefree_cpp.SGDScheduleFree(params, lr=1.0, r=r)
    optimizer.train()
    last = math.floor(10 ** (308.25 / r))  # (k+1)^r is finite up to here, nearly
    optimizer.param_groups[0]["k"] = max(0, last - 3)
    cases.set_gradients(params, 0)
    for _ in range(last):
        before, group = cases.copies(params), dict(optimizer.param_groups[0])
        try:
            optimizer.step()
        except ValueError as error:
            assert "Invalid weight_sum: inf, expected a finite sum" in str(error)  # noqa: PT017
            break
        assert all(p.isfinite().all() for p in params)
        assert 0 < optimizer.param_groups[0]["weight_sum"] < math.inf
    else:
        pytest.fail("the sum never overflowed")
    cases.assert_same(params, before)
    assert dict(optimizer.param_groups[0]) == group


# ---- long runs -----------------------------------------------------------------------------------------


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("steps", [1000, pytest.param(10_000, marks=LONG)])
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFreeClosure", "ScheduleFreeWrapper"])
def test_memory_stays_flat(name, steps):
    params = cases.parameters([(64, 64), (64,)])
    optimizer = cases.make(name, params)
    cases.set_gradients(params, 0)

    def once(number: int) -> None:
        if "Closure" in name:
            optimizer.step(lambda: 1.0)
        else:
            optimizer.step()
        if number % 10 == 0:
            optimizer.eval(), optimizer.train()
            optimizer.state_dict()

    for number in range(200):
        once(number)
    gc.collect()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    before = resident_bytes()
    for number in range(steps):
        once(number)
    gc.collect()
    assert sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()) <= tensors
    assert resident_bytes() - before < 4e6
