"""What only the wrappers do: a momentum in the groups, closures for the base optimizer, the closure form."""

from __future__ import annotations

import copy

import pytest
import torch
from schedulefree_cpp import ScheduleFreeWrapper, ScheduleFreeWrapperClosure, ScheduleFreeWrapperReference

MODES = [ScheduleFreeWrapper, ScheduleFreeWrapperReference]


def parameters(count=2, dtype=torch.float64):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(5, dtype=dtype)) for _ in range(count)]


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def averages(optimizer, params):
    with optimizer.averaged():
        return [p.detach().clone() for p in params]


@pytest.mark.parametrize("cls", MODES)
def test_a_moved_momentum_follows_the_formula(cls):
    params = parameters()
    optimizer = cls(torch.optim.SGD([{"params": [p]} for p in params], lr=0.1, momentum=0.0), momentum=0.9)
    optimizer.train()
    x = [p.detach().clone() for p in params]
    z = [p.detach().clone() for p in params]
    for step in range(8):
        if step == 3:
            optimizer.momentum = 0.5
        if step == 5:
            optimizer.param_groups[1]["sf_momentum"] = 0.8
        set_gradients(params, step)
        optimizer.step()
        betas = [0.9 if step < 3 else 0.5] * 2
        if step >= 5:
            betas[1] = 0.8
        for i, p in enumerate(params):
            z[i] -= 0.1 * p.grad
            x[i] += (z[i] - x[i]) / (step + 1)
            torch.testing.assert_close(p.detach(), betas[i] * x[i] + (1 - betas[i]) * z[i])
    for own, expected in zip(averages(optimizer, params), x, strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("cls", MODES)
def test_a_moved_momentum_keeps_x_and_is_saved_with_the_one_that_built_y(cls):
    params = parameters()
    optimizer = cls(torch.optim.SGD(params, lr=0.1, momentum=0.5))
    optimizer.train()
    for step in range(5):
        set_gradients(params, step)
        optimizer.step()
    x = averages(optimizer, params)
    optimizer.momentum = 0.5
    assert optimizer.param_groups[0]["momentum"] == 0.5  # the base optimizer's own
    copies = copy.deepcopy(params)
    loaded = cls(torch.optim.SGD(copies, lr=0.1, momentum=0.5))
    loaded.load_state_dict(optimizer.state_dict())
    pickled, pickled_params = copy.deepcopy((optimizer, params))
    for other, own in ((optimizer, params), (loaded, copies), (pickled, pickled_params)):
        assert other.momentum == 0.5
        assert all(map(torch.equal, averages(other, own), x))
    # One that rests changes over, too.
    params[1].grad = None
    optimizer.step()
    torch.testing.assert_close(averages(optimizer, params)[1], x[1])
    z = optimizer.state[params[1]]["z"]
    torch.testing.assert_close(params[1].detach(), 0.5 * x[1] + 0.5 * z)


def test_a_dict_of_schedulefree_leaves_the_momentum_of_each_group():
    params = parameters()
    optimizer = ScheduleFreeWrapper(torch.optim.SGD([{"params": [p]} for p in params], lr=0.1))
    optimizer.param_groups[1]["sf_momentum"] = 0.5
    state_dict = optimizer.state_dict()
    for group in state_dict["param_groups"]:
        del group["sf_momentum"], group["sf_momentum_of_y"]
    optimizer.load_state_dict(state_dict)
    assert [group["sf_momentum"] for group in optimizer.param_groups] == [0.9, 0.5]


@pytest.mark.parametrize(
    ("key", "value"), [("sf_momentum", 1.5), ("sf_momentum", "0.9"), ("weight_decay_at_y", -1)]
)
def test_what_was_moved_outside_its_domain_is_refused_before_anything_changes(key, value):
    params = parameters()
    optimizer = ScheduleFreeWrapper(torch.optim.SGD(params, lr=0.1))
    optimizer.train()
    set_gradients(params, 0)
    optimizer.step()
    optimizer.param_groups[0][key] = value
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    with pytest.raises(ValueError, match=rf"Invalid {key} in parameter group 0: "):
        optimizer.step()
    assert all(map(torch.equal, params, before[0]))
    for key, state in optimizer.state_dict()["state"].items():
        assert torch.equal(state["z"], before[1][key]["z"])
    with pytest.raises(ValueError, match="Invalid momentum: 0"):
        optimizer.momentum = 0


class Twice(torch.optim.Optimizer):
    """Tries a step of gradient descent, looks again, and takes half of it back."""

    @torch.no_grad()
    def step(self, closure):  # noqa: D102
        with torch.enable_grad():
            first = closure()
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=0.1)
        with torch.enable_grad():
            closure()
        for p in self.param_groups[0]["params"]:
            p.add_(p.grad, alpha=0.05)
        return first


@pytest.mark.parametrize("cls", MODES)
def test_every_call_of_a_closure_is_at_the_y_of_the_z_that_is_tried(cls):
    (p,) = parameters(1)
    optimizer = cls(Twice([p], {"lr": 0.1}), momentum=0.75)
    optimizer.train()
    x, z = p.detach().clone(), p.detach().clone()
    seen = []

    def closure():
        seen.append(p.detach().clone())
        p.grad = p.detach().clone()
        return float(len(seen))

    for step in range(4):
        y = 0.75 * x + 0.25 * z
        tried = z - 0.1 * y
        second = 0.75 * x + 0.25 * tried
        assert optimizer.step(closure) == 2 * step + 1
        torch.testing.assert_close(seen[-2], y)
        torch.testing.assert_close(seen[-1], second)
        z = tried + 0.05 * second
        x = x + (z - x) / (step + 1)
        torch.testing.assert_close(p.detach(), 0.75 * x + 0.25 * z)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("cls", [*MODES, ScheduleFreeWrapperClosure])
def test_lbfgs_reaches_the_minimum(cls, line_search):
    (p,) = parameters(1)
    inputs, outputs = torch.randn(20, 5, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    optimizer = cls(torch.optim.LBFGS([p], lr=0.5, max_iter=5, line_search_fn=line_search))
    optimizer.train()

    def closure():
        optimizer.zero_grad()
        loss = (inputs @ p[:, None] - outputs).square().mean()
        loss.backward()
        return loss

    for _ in range(60):
        optimizer.step(closure)
    optimizer.eval()
    least = (inputs @ torch.linalg.lstsq(inputs, outputs).solution - outputs).square().mean()
    assert least <= closure() < 1.0001 * least


def test_the_closure_form_has_the_bits_of_the_modes():
    runs = []
    for cls in (ScheduleFreeWrapper, ScheduleFreeWrapperClosure):
        params = parameters(dtype=torch.float32)
        optimizer = cls(torch.optim.RMSprop(params, lr=0.01), weight_decay_at_y=0.1)
        optimizer.train()
        seen = []

        def closure(params=params, seen=seen):
            set_gradients(params, len(seen))
            seen.append(params[0].detach().clone())
            return 3.0

        for _ in range(6):
            assert optimizer.step(closure) == 3.0
            optimizer.train()
        optimizer.eval()
        runs.append([*seen, *(p.detach() for p in params)])
    assert all(map(torch.equal, *runs))


def test_the_closure_form_leaves_x_when_a_closure_raises():
    params = parameters(dtype=torch.float32)
    optimizer = ScheduleFreeWrapperClosure(torch.optim.SGD(params, lr=0.1))
    optimizer.step(lambda: set_gradients(params, 0))
    before = copy.deepcopy(params)

    def closure():
        raise KeyError("stop")

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert all(map(torch.equal, params, before))
    with pytest.raises(
        RuntimeError, match=r"ScheduleFreeWrapperClosure\.step\(\) was called without a closure"
    ):
        optimizer.step()
