"""``max_grad_norm`` beside ``torch.nn.utils.clip_grad_norm_``."""

from __future__ import annotations

import copy
import math

import cases
import pytest
import schedulefree_cpp
import torch
from torch.nn.utils import clip_grad_norm_

SHAPES = [(5, 3), (7,), (), (40, 130)]
NAMES = cases.NATIVE + cases.CLOSURE + cases.MUON


def step(optimizer, params, grads, *, clip: float | None = None) -> None:
    """One step from given gradients, clipped by torch to ``clip``."""

    def closure() -> float:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        if clip is not None:
            clip_grad_norm_(params, clip)
        return 0.0

    if "Closure" in type(optimizer).__name__:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def gradients(params, seed: int) -> list[torch.Tensor]:
    cases.set_gradients(params, seed)
    return [p.grad.clone() for p in params]


@pytest.mark.parametrize("limit", [0.5, 50.0, 1e6])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_clips_as_torch_does_before_it(name, limit):
    params, others = (cases.parameters(SHAPES, torch.float64) for _ in range(2))
    optimizer = cases.make(name, params, max_grad_norm=limit)
    reference = cases.make(name, others)
    for seed in range(10):
        grads = gradients(params, seed)
        step(optimizer, params, grads)
        step(reference, others, grads, clip=limit)
        assert all(torch.equal(p.grad, grad) for p, grad in zip(params, grads, strict=True))
        norm = torch.cat([grad.flatten() for grad in grads]).norm()
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-13, atol=0)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_lower_precision_too(dtype):
    params, others = (cases.parameters(SHAPES, dtype) for _ in range(2))
    optimizer = cases.make("SGDScheduleFree", params, max_grad_norm=0.5)
    reference = cases.make("SGDScheduleFree", others)
    grads = gradients(params, 0)
    step(optimizer, params, grads)
    step(reference, others, grads, clip=0.5)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, **tolerance)


def test_infinity_measures_and_changes_no_bit():
    params, others = (cases.parameters(SHAPES) for _ in range(2))
    optimizer = cases.make("AdamWScheduleFree", params, max_grad_norm=math.inf)
    cases.run(optimizer, 5)
    cases.run(cases.make("AdamWScheduleFree", others), 5)
    cases.assert_same(params, others)
    assert optimizer.grad_norm.item() > 0
    params[0].grad[0, 0] = torch.inf  # does not touch the others
    optimizer.step()
    assert optimizer.grad_norm.item() == torch.inf
    assert params[1].isfinite().all()


def test_the_norm_is_that_of_all_groups_and_a_group_clips_to_its_own():
    params = cases.parameters([(3,)] * 3, torch.float64)
    before = [p.detach().clone() for p in params]
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "max_grad_norm": 1.0},
        {"params": params[2:], "max_grad_norm": 3.0},
    ]
    optimizer = schedulefree_cpp.SGDScheduleFree(groups, lr=1.0)
    optimizer.train()
    for p in params:
        p.grad = torch.full_like(p, 2.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == 6.0
    for p, old, factor in zip(params, before, (1, 1 / 6, 1 / 2), strict=True):
        torch.testing.assert_close(p, old - 2 * factor, rtol=1e-5, atol=0)


def test_a_norm_that_is_not_finite_does_what_torch_does():
    for value in (torch.nan, torch.inf):
        params, others = (cases.parameters([(3,), (2,)]) for _ in range(2))
        optimizer = cases.make("SGDScheduleFree", params, max_grad_norm=1.0)
        grads = [torch.tensor([1.0, value, 2.0]), torch.ones(2)]
        step(optimizer, params, grads)
        step(cases.make("SGDScheduleFree", others), others, grads, clip=1.0)
        for p, q in zip(params, others, strict=True):
            torch.testing.assert_close(p, q, equal_nan=True)


def test_without_it_nothing_is_measured_and_groups_are_upstreams():
    params = cases.parameters(SHAPES)
    optimizer = cases.make("AdamWScheduleFree", params)
    cases.run(optimizer, 1)
    assert optimizer.grad_norm is None
    assert "max_grad_norm" not in optimizer.param_groups[0]


def test_it_survives_copies_and_checkpoints():
    params = cases.parameters(SHAPES)
    optimizer = cases.make("RAdamScheduleFree", params, max_grad_norm=0.5)
    cases.run(optimizer, 3)
    other = cases.make("RAdamScheduleFree", cases.copies(params))
    other.load_state_dict(optimizer.state_dict())
    duplicate = copy.deepcopy(optimizer)
    for each in (optimizer, other, duplicate):
        cases.run(each, 3, start=3)
    cases.assert_same(params, cases.params_of(other))
    cases.assert_same(params, cases.params_of(duplicate))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, "a value > 0, or none"), (-1.0, "a value > 0"), (math.nan, "a value > 0"), ("x", "a number")],
)
def test_values_outside_its_domain_are_refused(value, expected):
    params = cases.parameters(SHAPES)
    with pytest.raises(ValueError, match=f"Invalid max_grad_norm: .* expected {expected}"):
        schedulefree_cpp.SGDScheduleFree(params, max_grad_norm=value)
    optimizer = cases.make("SGDScheduleFree", params, max_grad_norm=1.0)
    cases.run(optimizer, 1)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0]["max_grad_norm"] = value
    with pytest.raises(ValueError, match="Invalid max_grad_norm in parameter group 0"):
        cases.run(optimizer, 1)
    cases.assert_same(params, before)


def test_no_parameter_steps_before_all_gradients_are_there():
    params = cases.parameters(SHAPES)
    optimizer = cases.make("SGDScheduleFree", params, max_grad_norm=1.0)
    cases.set_gradients(params, 0)
    with pytest.raises(
        RuntimeError, match="cannot be used with max_grad_norm: clipping needs every gradient first"
    ):
        optimizer.step_parameter(params[0])


def test_it_cannot_be_set_within_an_iteration():
    params = cases.parameters(SHAPES)
    optimizer = cases.make("SGDScheduleFree", params)
    cases.set_gradients(params, 0)
    optimizer.step_parameter(params[0])
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    with pytest.raises(
        RuntimeError,
        match=r"max_grad_norm or nonfinite was set after step_parameter\(\): call optimizer.step\(\) without",
    ):
        optimizer.step()
    optimizer.param_groups[0]["max_grad_norm"] = None
    optimizer.step()


@pytest.mark.parametrize("name", cases.PLUS)
def test_schedule_free_plus_has_none(name):
    params = cases.parameters(SHAPES)
    with pytest.raises(ValueError, match=r"Invalid max_grad_norm.*: 1\.0, expected None"):
        cases.make(name, [{"params": params, "max_grad_norm": 1.0}])
