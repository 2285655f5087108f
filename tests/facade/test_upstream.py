"""Against ``schedulefree`` 1.4.1 from PyPI, step by step and through checkpoints in both directions."""

from __future__ import annotations

import copy
import inspect
import io
from pathlib import Path

import cases
import pytest
import reference
import schedulefree
import schedulefree_cpp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

SHAPES = [(), (0,), (1,), (7, 5), (4, 3, 3, 3), (1025,)]
GOLDEN = Path(__file__).parents[1] / "golden" / "trajectories.pt"
SHARED = [
    h
    for h in cases.ADAMW + cases.SGD
    if h.decay_at == "y" and not h.maximize and not h.inner_momentum and h.beta < 1
    if not h.decoupling_c and not h.averaging_weight
]


def theirs(params, h, foreach):
    cls = schedulefree.AdamWScheduleFree if h.adam else schedulefree.SGDScheduleFree
    optimizer = cls(params, **cases.arguments(h, upstream=True), foreach=foreach)
    optimizer.train()
    return optimizer


def pair(h, foreach, shapes=SHAPES):
    ours, upstreams = cases.parameters(shapes), cases.parameters(shapes)
    return cases.build(ours, h), theirs(upstreams, h, foreach)


def params_of(optimizer):
    return optimizer.param_groups[0]["params"]


def step_both(a, b, seed, lr=None):
    for optimizer in (a, b):
        cases.set_gradients(params_of(optimizer), seed)
        if lr is not None:
            optimizer.param_groups[0]["lr"] = lr
        optimizer.step()


def assert_parity(a, b):
    for p, q in zip(params_of(a), params_of(b), strict=True):
        torch.testing.assert_close(p, q, **cases.PARITY)
        assert a.state[p].keys() == b.state[q].keys()
        for name, value in b.state[q].items():
            torch.testing.assert_close(a.state[p][name], value, **cases.PARITY)
    ours, upstreams = a.param_groups[0], b.param_groups[0]
    for key in ("k", "train_mode"):
        assert ours[key] == upstreams[key]
    for key in ("weight_sum", "lr_max", "scheduled_lr"):
        assert ours[key] == pytest.approx(upstreams[key], rel=1e-12)


def trajectory(a, b, h, steps):
    for i in range(steps):
        step_both(a, b, seed=i, lr=h.lr * (1 + 0.5 * (i % 3)))
        if i % 37 == 5:
            a.eval(), b.eval()
            assert_parity(a, b)
            a.train(), b.train()
    assert_parity(a, b)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("h", SHARED, ids=cases.name_of)
def test_two_hundred_steps(h, foreach):
    a, b = pair(h, foreach)
    trajectory(a, b, h, 200)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("AdamWScheduleFreePaper", {"lr": 0.01, "weight_decay": 0.1, "warmup_steps": 10}),
        ("RAdamScheduleFree", {"lr": 0.01, "weight_decay": 0.1, "r": 1.0}),
        ("RAdamScheduleFree", {"lr": 0.01, "silent_sgd_phase": False}),
        ("RAdamScheduleFree", {"lr": 0.01, "betas": (0.9, 0.5), "silent_sgd_phase": False}),
    ],
)
def test_two_hundred_steps_of_the_relatives(name, kwargs, foreach):
    a = getattr(schedulefree_cpp, name)(cases.parameters(SHAPES), **kwargs)
    b = getattr(schedulefree, name)(cases.parameters(SHAPES), **kwargs, foreach=foreach)
    a.train(), b.train()
    for p, q in zip(params_of(a), params_of(b), strict=True):
        assert torch.equal(p, q)
    trajectory(a, b, reference.Hyperparameters(adam=True, lr=kwargs["lr"]), 200)
    assert a.state_dict()["param_groups"][0].keys() == b.state_dict()["param_groups"][0].keys()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    adam=st.booleans(),
    lr=st.floats(1e-4, 0.05),
    beta=st.floats(0.5, 0.99),
    beta2=st.floats(0.5, 0.9999),
    weight_decay=st.sampled_from([0.0, 0.01, 0.3]),
    warmup_steps=st.integers(0, 50),
    r=st.floats(0, 2),
    weight_lr_power=st.floats(0, 3),
)
def test_random_hyperparameters(**hyperparameters):
    h = reference.Hyperparameters(**hyperparameters)
    a, b = pair(h, foreach=True, shapes=[(3, 5), (40,)])
    trajectory(a, b, h, 60)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("direction", ["ours to theirs", "theirs to ours"])
@pytest.mark.parametrize("h", [SHARED[1], SHARED[-1]], ids=cases.name_of)
def test_state_dicts_continue_in_the_other(h, direction, mode):
    a, b = pair(h, foreach=True)
    for i in range(30):
        step_both(a, b, seed=i)
    if mode == "eval":
        a.eval(), b.eval()
    source, make = (
        (a, lambda ps: theirs(ps, h, True))
        if direction == "ours to theirs"
        else (b, lambda ps: cases.build(ps, h))
    )
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    continued = make([torch.nn.Parameter(p.detach().clone()) for p in params_of(source)])
    continued.load_state_dict(loaded)
    rival = b if direction == "ours to theirs" else a
    if mode == "eval":
        continued.train(), rival.train()
    for i in range(30, 60):
        step_both(continued, rival, seed=i)
    continued.eval(), rival.eval()
    for p, q in zip(params_of(continued), params_of(rival), strict=True):
        torch.testing.assert_close(p, q, **cases.PARITY)


@pytest.mark.parametrize("h", [cases.ADAMW[0], cases.SGD[0]], ids=cases.name_of)
def test_group_and_state_keys_are_upstreams(h):
    a, b = pair(h, foreach=True)
    step_both(a, b, seed=0)
    ours, upstreams = a.state_dict(), b.state_dict()
    assert ours["param_groups"][0].keys() == upstreams["param_groups"][0].keys()
    for key, value in upstreams["param_groups"][0].items():
        assert type(ours["param_groups"][0][key]) is type(value), key
    for key, value in upstreams["state"].items():
        assert ours["state"][key].keys() == value.keys()


def test_a_16_bit_checkpoint_of_upstream_continues_in_float32():
    params = cases.parameters(SHAPES, torch.bfloat16)
    upstream = theirs(params, SHARED[0], True)
    cases.set_gradients(params, 0)
    upstream.step()
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    ours = cases.build(copies, SHARED[0])
    ours.load_state_dict(copy.deepcopy(upstream.state_dict()))
    for p in copies:
        assert {t.dtype for t in ours.state[p].values()} == {torch.float32, torch.int16}
    cases.set_gradients(copies, 1)
    ours.step()
    assert all(p.isfinite().all() for p in copies)


def test_a_bfloat16_checkpoint_of_ours_continues_in_upstream():
    params = cases.parameters(SHAPES, torch.bfloat16)
    ours = cases.build(params, SHARED[0])
    cases.set_gradients(params, 0)
    ours.step()
    upstream = theirs(params, SHARED[0], True)
    upstream.load_state_dict(copy.deepcopy(ours.state_dict()))
    cases.set_gradients(params, 1)
    upstream.step()
    assert all(p.isfinite().all() for p in params)


def test_constructor_arguments_and_defaults_are_upstreams():
    for name in ("AdamWScheduleFree", "AdamWScheduleFreePaper", "RAdamScheduleFree", "SGDScheduleFree"):
        ours = inspect.signature(getattr(schedulefree_cpp, name)).parameters
        for key, parameter in inspect.signature(getattr(schedulefree, name)).parameters.items():
            assert ours[key].default == parameter.default, key
            assert list(ours).index(key) == list(
                inspect.signature(getattr(schedulefree, name)).parameters
            ).index(key)


# ---- upstream's unreleased version ---------------------------------------------------------------------
#
# tests/golden/trajectories.pt is of its commit 70785b5, and so are the checkpoints made from it here.

UNRELEASED = {
    "adamw": "AdamWScheduleFree",
    "adamw_inner_momentum": "AdamWScheduleFree",
    "adamw_paper": "AdamWScheduleFreePaper",
    "radam": "RAdamScheduleFree",
    "sgd": "SGDScheduleFree",
    "plus": "AdamCScheduleFreePlusPaper",
}
unreleased_only = pytest.mark.skipif(
    "inner_momentum" not in inspect.signature(schedulefree.AdamWScheduleFree).parameters,
    reason="the installed schedulefree is a release, without inner_momentum",
)


def start_golden(golden, name, initial):
    params = [torch.nn.Parameter(p.clone()) for p in initial]
    kwargs = golden["kwargs"]
    second = {"params": params[2:], "weight_decay": kwargs["weight_decay"] / 2}
    optimizer = getattr(schedulefree_cpp, name)([{"params": params[:2]}, second], **kwargs)
    optimizer.train()
    return params, optimizer


def step_golden(golden, params, optimizer, i):
    for p, grad in zip(params, golden["grads"][i], strict=True):
        p.grad = grad
    if "Plus" in type(optimizer).__name__:
        optimizer.step_func(golden["losses"][i])
    else:
        optimizer.step()


@pytest.mark.parametrize("entry", UNRELEASED)
def test_a_checkpoint_of_the_unreleased_version_continues_here(entry):
    golden = torch.load(GOLDEN, weights_only=True)[entry]
    whole, expected = start_golden(golden, UNRELEASED[entry], golden["initial"])
    for i in range(40):
        step_golden(golden, whole, expected, i)
    params, optimizer = start_golden(golden, UNRELEASED[entry], golden["y"][-1])
    saved = expected.state_dict()
    keys = saved["state"][0].keys()
    groups = [
        {"inner_momentum": 0.0, **own, **scalars, "k": 40}
        for own, scalars in zip(saved["param_groups"], golden["group_scalars"][-1], strict=True)
    ]
    optimizer.load_state_dict({"state": dict(enumerate(golden["final_state"])), "param_groups": groups})
    assert optimizer.state_dict()["state"][0].keys() == keys  # no x and y that steps would not update
    for i in range(5):
        step_golden(golden, whole, expected, i)
        step_golden(golden, params, optimizer, i)
    for mode in ("train", "eval"):
        getattr(expected, mode)(), getattr(optimizer, mode)()
        for p, q in zip(params, whole, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_group_keeps_inner_momentum_of_0_for_the_unreleased_version():
    params = cases.parameters([(3, 5)])
    optimizer = schedulefree_cpp.AdamWScheduleFree(params)
    assert "inner_momentum" not in optimizer.param_groups[0]  # as in 1.4.1
    for group in optimizer.param_groups:
        group["inner_momentum"] = 0.0
    optimizer.train()
    cases.run(optimizer, 3)
    plain = schedulefree_cpp.AdamWScheduleFree(cases.parameters([(3, 5)]))
    plain.train()
    cases.run(plain, 3)
    cases.assert_same(params, params_of(plain))
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0].keys() == {"z", "exp_avg_sq"}
    assert saved["param_groups"][0].pop("inner_momentum") == 0
    assert saved["param_groups"][0] == plain.state_dict()["param_groups"][0]
    plain.load_state_dict(optimizer.state_dict())
    assert plain.param_groups[0]["inner_momentum"] == 0


@unreleased_only
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("direction", ["ours to theirs", "theirs to ours"])
@pytest.mark.parametrize("inner_momentum", [0.0, 0.9])
def test_checkpoints_go_to_the_unreleased_version_and_back(inner_momentum, direction, mode):
    packages = [schedulefree_cpp, schedulefree]
    source, target = packages if direction == "ours to theirs" else reversed(packages)
    kwargs = {"lr": 0.01, "warmup_steps": 3, "inner_momentum": inner_momentum}
    params, rivals = cases.parameters(SHAPES), cases.parameters(SHAPES)
    a, b = source.AdamWScheduleFree(params, **kwargs), target.AdamWScheduleFree(rivals, **kwargs)
    for group in a.param_groups:
        group["inner_momentum"] = inner_momentum
    a.train(), b.train()
    cases.run(a, 20), cases.run(b, 20)
    getattr(a, mode)(), getattr(b, mode)()
    c = target.AdamWScheduleFree(cases.copies(params), **kwargs)
    c.load_state_dict(copy.deepcopy(a.state_dict()))
    b.train(), c.train()
    cases.run(b, 20, start=20), cases.run(c, 20, start=20)
    assert_parity(c, b)
