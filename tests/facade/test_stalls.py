"""The check that tells where parameters no longer move."""

from __future__ import annotations

import cases
import pytest
import torch
from schedulefree_cpp import AdamWScheduleFree, ScheduleFreeWrapper, SGDScheduleFree
from schedulefree_cpp.diagnostics import Stalled, stalled_updates


def stepped(optimizer, seed=1):
    """What the check says of one step."""
    cases.set_gradients(cases.params_of(optimizer), seed)
    with stalled_updates(optimizer) as stalled:
        optimizer.step()
    return stalled


def adamw(lr, dtype=torch.bfloat16, **kwargs):
    """An optimizer in train mode, of weights near 1, that has taken a step."""
    p = torch.nn.Parameter((1 + torch.rand(100, 100, generator=torch.Generator().manual_seed(0))).to(dtype))
    optimizer = AdamWScheduleFree([("weight", p)], lr=lr, **kwargs)
    optimizer.train()
    cases.run(optimizer, 1)
    return optimizer


@pytest.mark.parametrize(
    ("lr", "bits", "expected"),
    [
        (1e-2, 24, (0.0, 0.0)),
        (1e-4, 24, (None, 0.0)),  # of the move of z, y takes a part
        (1e-7, 24, (1.0, 1.0)),
        (1e-4, 32, (0.0, 0.0)),
        (1e-9, 32, (1.0, 1.0)),
    ],
)
def test_an_update_below_half_a_unit_stalls(lr, bits, expected):
    (stalled,) = stepped(adamw(lr, state_bits=bits)).values()
    for share, wanted in zip(stalled, expected, strict=True):
        assert 0 <= share <= 1 if wanted is None else share == pytest.approx(wanted, abs=0.15)


@pytest.mark.parametrize(("lr", "share"), [(1e-4, 0.0), (1e-12, 1.0)])
def test_the_iterates_of_a_wrapper_are_looked_at_with_all_their_bits(lr, share):
    p = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = ScheduleFreeWrapper(torch.optim.SGD([p], lr=lr), nonfinite="skip")
    optimizer.train()
    assert stepped(optimizer) == {"params[0] in parameter group 0": Stalled(share, share)}
    with stalled_updates(optimizer) as stalled:
        p.grad[0] = torch.inf
        optimizer.step()
    assert stalled == {}  # a step that was skipped


def test_the_first_step_starts_from_the_parameter():
    p = torch.nn.Parameter(torch.ones(8))
    optimizer = SGDScheduleFree([p], lr=1e-9)
    optimizer.train()
    assert [*stepped(optimizer).values()] == [Stalled(1.0, 1.0)]


def test_what_takes_no_step_is_left_out():
    p, q, r = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = SGDScheduleFree([{"params": [p, q]}, {"params": [r]}], nonfinite="skip")
    optimizer.train()
    p.grad, q.grad = torch.ones(3), torch.zeros(3)
    with stalled_updates(optimizer) as stalled:
        optimizer.step()
    assert [*stalled] == ["params[0] in parameter group 0"]
    p.grad[0] = torch.inf
    with stalled_updates(optimizer) as stalled:
        optimizer.step()
    assert stalled == {}
    assert stepped(adamw(1e-7, state_bits=24, rounding="stochastic")) == {}


def test_the_check_changes_nothing():
    one, other = adamw(1e-3, state_bits=24), adamw(1e-3, state_bits=24)
    stepped(one)
    cases.run(other, 1, start=1)
    cases.assert_same(cases.params_of(one), cases.params_of(other))
    cases.assert_same(cases.states_of(one), cases.states_of(other))
