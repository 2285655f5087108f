"""What the host can know is refused before any parameter of any group has moved."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import schedulefree_cpp
import torch


def two_groups(name: str, **options: Any) -> Any:
    optimizer = cases.make(name, [{"params": [p]} for p in cases.parameters([(2,), (3,)])], **options)
    cases.run(optimizer, 1)
    cases.set_gradients(cases.params_of(optimizer), 1)
    return optimizer


def assert_refused(optimizer: Any, error: type[Exception], message: str) -> None:
    before = [t.clone() for t in (*cases.params_of(optimizer), *cases.states_of(optimizer))]
    counts = [cases.entry(group, "k") for group in optimizer.param_groups]
    with pytest.raises(error, match=message):
        optimizer.step()
    cases.assert_same(before, [*cases.params_of(optimizer), *cases.states_of(optimizer)])
    assert [cases.entry(group, "k") for group in optimizer.param_groups] == counts


@pytest.mark.parametrize("key", ["lr_max", "scheduled_lr", "weight_sum"])
@pytest.mark.parametrize("name", cases.NATIVE + cases.MUON)
def test_a_schedule_of_the_second_group_that_is_not_finite(name, key):
    optimizer = two_groups(name)
    optimizer.param_groups[1][key] = float("nan")
    assert_refused(optimizer, ValueError, f"Invalid {key}: nan, expected a finite .* in parameter group 1")


@pytest.mark.parametrize("name", cases.NATIVE)
def test_a_beta_that_moves_too_far(name):
    optimizer = two_groups(name)
    cases.set_beta(optimizer, 1e-310)
    optimizer.step()
    optimizer.param_groups[0].update(betas=(0.9, 0.99), momentum=0.9)
    assert_refused(optimizer, ValueError, "Invalid beta: 0.9, expected one that is not so far .* group 0")


@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree", "ScheduleFreeWrapper"])
def test_a_parameter_at_rest_that_cannot_follow_beta(name):
    params = cases.parameters([(4,), (6,)])
    base = torch.optim.SGD(params, lr=0.1)
    wrapped = name in cases.WRAPPER
    optimizer = getattr(schedulefree_cpp, name)(base) if wrapped else cases.make(name, params)
    optimizer.train()
    cases.run(optimizer, 2)
    if wrapped:
        optimizer.param_groups[0]["sf_momentum"] = 0.5
    else:
        cases.set_beta(optimizer, 0.5)
    params[1].grad, params[1].data = None, params[1].data[:5].clone()
    assert_refused(optimizer, RuntimeError, r"params\[1\]: shape \(5,\), expected that of its z, \(6,\)")
