"""``torch.amp.GradScaler`` with and without ``capturable``, on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import cases
import pytest
import torch

SHAPES = [(5, 3), (7,), (), (40, 130)]
GROUP = ("k", "weight_sum", "lr_max", "scheduled_lr")


def scaler_of(**kwargs: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", **{"init_scale": 1024.0, "growth_interval": 3, **kwargs})


def backward(scaler: torch.amp.GradScaler, params: list[torch.nn.Parameter], seed: int, value: float = 0.0):
    """Scaled random gradients, equal for equal seeds; one element is ``value`` if that is not 0."""
    cases.set_gradients(params, seed)
    scaler.scale(torch.ones(()))  # has the scaler make its tensors
    for p in params:
        assert p.grad is not None
        p.grad.mul_(scaler.get_scale())
    if value:
        params[0].grad[0, 0] = value


def train(name: str, *, capturable: bool, unscale: bool = False, dtype=torch.float32, **kwargs: Any) -> Any:
    """Ten steps, of which two overflow."""
    params = cases.parameters(SHAPES, dtype)
    optimizer = cases.make(name, params, capturable=capturable, **kwargs)
    scaler = scaler_of()
    for seed in range(10):
        backward(scaler, params, seed, value={4: torch.inf, 7: torch.nan}.get(seed, 0.0))
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 512.0  # once up, twice down
    return optimizer


def numbers(optimizer: Any) -> list[list[float]]:
    return [[float(group[name]) for name in GROUP] for group in optimizer.param_groups]


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", cases.NATIVE)
def test_the_scalers_own_way_and_ours_are_equal(name, unscale, limit):
    plain = train(name, capturable=False, max_grad_norm=limit)  # unscaled and skipped by the scaler
    other = train(name, capturable=True, unscale=unscale, max_grad_norm=limit)
    cases.assert_same(cases.params_of(plain), cases.params_of(other))
    assert numbers(plain) == numbers(other)
    assert plain.param_groups[0]["k"] == 8
    if limit is not None:
        assert torch.equal(plain.grad_norm, other.grad_norm)
    for optimizer in (plain, other):
        optimizer.eval()
    cases.assert_same(cases.params_of(plain), cases.params_of(other))


def test_in_bfloat16_too():
    plain, other = (
        train("AdamWScheduleFree", capturable=capturable, dtype=torch.bfloat16)
        for capturable in (False, True)
    )
    cases.assert_same(cases.params_of(plain), cases.params_of(other))


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", cases.NATIVE)
def test_an_overflow_changes_nothing(name, unscale, steps):
    params = cases.parameters(SHAPES)
    optimizer = cases.make(name, params, capturable=True, max_grad_norm=1.0, weight_decay=0.1)
    cases.run(optimizer, steps)
    before = copy.deepcopy(optimizer)
    scaler = scaler_of()
    backward(scaler, params, 5, value=torch.inf)
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    cases.assert_same(params, cases.params_of(before))
    assert numbers(optimizer) == numbers(before)
    for p, q in zip(params, cases.params_of(before), strict=True):
        if steps:
            assert optimizer.state[p].keys() == before.state[q].keys()
            cases.assert_same(optimizer.state[p].values(), before.state[q].values())
        else:
            assert torch.equal(optimizer.state[p]["z"], p)
    # And the next step is what it would have been.
    cases.run(optimizer, 3, start=9)
    cases.run(before, 3, start=9)
    cases.assert_same(params, cases.params_of(before))


@pytest.mark.parametrize("name", cases.NATIVE)
def test_an_overflow_after_beta_was_moved_keeps_the_average_and_the_schedule(name):
    params = cases.parameters(SHAPES, torch.float64)
    optimizer = cases.make(name, params, capturable=True)
    cases.run(optimizer, 8)
    plain = cases.make(name, cases.copies(params))
    plain.load_state_dict(optimizer.state_dict())
    before = numbers(optimizer)
    for each in (optimizer, plain):
        cases.set_beta(each, 0.7)
    scaler = scaler_of()
    backward(scaler, params, 5, value=torch.inf)
    scaler.step(optimizer)
    assert numbers(optimizer) == before

    def assert_close():
        for p, q in zip(params, cases.params_of(plain), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)

    with optimizer.averaged(), plain.averaged():
        assert_close()
    for each in (optimizer, plain):
        cases.run(each, 3, start=9)
    assert_close()


@pytest.mark.parametrize("unscale", [False, True])
def test_the_norm_is_that_of_unscaled_gradients(unscale):
    params = cases.parameters(SHAPES)
    optimizer = cases.make("AdamWScheduleFree", params, capturable=True, max_grad_norm=0.5)
    scaler = scaler_of()
    cases.set_gradients(params, 3)
    norm = torch.cat([p.grad.flatten() for p in params]).double().norm()
    backward(scaler, params, 3)
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-12, atol=0)


def test_gradients_are_not_written():
    params = cases.parameters(SHAPES)
    optimizer = cases.make("SGDScheduleFree", params, capturable=True)
    scaler = scaler_of()
    backward(scaler, params, 0)
    grads = [p.grad.clone() for p in params]
    scaler.step(optimizer)
    cases.assert_same(grads, [p.grad for p in params])


def test_only_a_capturable_optimizer_takes_the_scale():
    for capturable in (False, True):
        params = cases.parameters([(3,), (4,)])
        groups = [{"params": params[:1]}, {"params": params[1:]}]
        optimizer = cases.make("SGDScheduleFree", groups, capturable=capturable)
        seen = []
        optimizer.register_step_pre_hook(lambda o, *_, seen=seen: seen.append(hasattr(o, "found_inf")))
        scaler = scaler_of()
        backward(scaler, params, 0)
        scaler.step(optimizer)
        assert seen == [capturable]
        assert not hasattr(optimizer, "grad_scale")
        assert not hasattr(optimizer, "found_inf")


def test_an_autocast_model_trains():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = cases.make("AdamWScheduleFree", model.parameters(), capturable=True, lr=0.02)
    scaler = torch.amp.GradScaler("cpu")
    inputs = torch.randn(64, 8)
    losses = []
    for _ in range(80):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model(inputs).float() - inputs.sum(1, keepdim=True)).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
