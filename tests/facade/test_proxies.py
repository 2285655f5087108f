"""Every public method through proxies in the manner of Lightning's, Fabric's and Accelerate's.

A proxy becomes a subclass of the optimizer's class when it is made. What it does not define it inherits, and runs
on its own ``__dict__``: a copy of the optimizer's, or empty with ``__getattr__`` to the optimizer.
"""

from __future__ import annotations

import copy
from typing import Any

import cases
import pytest
import torch

SHAPES = [(50, 50), (7,)]


class Sharing:
    """Shares the values of the optimizer's attributes, but not assignments to them; steps the optimizer."""

    def __init__(self, inner: Any) -> None:
        """Becomes a subclass of the optimizer's class."""
        self.__dict__.update(inner.__dict__)
        self.__dict__["inner"] = inner
        self.__class__ = type("Sharing" + type(inner).__name__, (Sharing, type(inner)), {})

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Of the optimizer."""
        return self.inner.step(*args, **kwargs)


class Delegating:
    """Has nothing but the optimizer, where it looks for every attribute that its class lacks."""

    def __init__(self, inner: Any) -> None:
        """Becomes a subclass of the optimizer's class."""
        self.inner = inner
        self.__class__ = type("Delegating" + type(inner).__name__, (Delegating, type(inner)), {})

    def __getattr__(self, name: str) -> Any:
        """Of the optimizer."""
        return getattr(self.__dict__["inner"], name)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Of the optimizer."""
        return self.inner.step(*args, **kwargs)

    def state_dict(self) -> Any:
        """Of the optimizer."""
        return self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Of the optimizer."""
        self.inner.load_state_dict(state)


PROXIES = [Sharing, Delegating]
NAMES = cases.COMPLETE


def build(proxy: Any, name: str, params: Any, **kwargs: Any) -> Any:
    return proxy(cases.make(name, params, **kwargs))


def drive(optimizer: Any, seed: int) -> None:
    """A step through the proxy, and through its step_func() where that is how the class is stepped."""
    params = cases.params_of(optimizer)
    name = type(optimizer).__name__
    if "Closure" in name:
        optimizer.step(lambda: cases.set_gradients(params, seed))
        return
    cases.set_gradients(params, seed)
    if "Plus" in name:
        optimizer.step_func(1.0 + seed % 3)
    else:
        optimizer.step()


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_a_proxy_resumes_exactly(name, mode, proxy):
    params, others = cases.parameters(SHAPES), cases.parameters(SHAPES)
    plain, optimizer = cases.make(name, params), build(proxy, name, others)
    for seed in range(10):
        cases.drive(plain, seed), drive(optimizer, seed)
        if seed % 3 == 1:
            optimizer.eval(), optimizer.train()
            with optimizer.averaged():
                pass
        cases.assert_same(params, others)
    getattr(optimizer, mode)()
    state = copy.deepcopy(optimizer.state_dict())
    resumed = build(proxy, name, cases.copies(others))
    drive(resumed, 0)
    with torch.no_grad():
        for p, q in zip(cases.params_of(resumed), others, strict=True):
            p.copy_(q)
    resumed.load_state_dict(state)
    resumed.train()
    for seed in range(10, 14):
        cases.drive(plain, seed), drive(resumed, seed)
    cases.assert_same(params, cases.params_of(resumed))
    assert cases.entry(resumed.inner.param_groups[0], "k") == 14
    assert cases.entry(resumed.param_groups[0], "k") == 14


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("modes", [("eval", "train"), ("train", "eval")])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in cases.CLOSURE])
def test_a_proxy_refuses_a_model_and_an_optimizer_of_different_modes(name, modes, proxy):
    optimizer = build(proxy, name, cases.parameters(SHAPES))
    for seed in range(10):
        drive(optimizer, seed)
    getattr(optimizer, modes[0])()
    model = cases.copies(cases.params_of(optimizer))
    getattr(optimizer, modes[1])()
    state = copy.deepcopy(optimizer.state_dict())
    for use in ("train", "eval"):
        mixed = build(proxy, name, cases.copies(model))
        mixed.load_state_dict(state)
        with pytest.raises(RuntimeError, match="saved in one mode and the optimizer in the other"):
            getattr(mixed, use)()


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("name", cases.NATIVE + cases.CLOSURE)
def test_a_proxy_tells_the_norm_and_adds_groups(name, proxy):
    params, late = cases.parameters(SHAPES), cases.parameters([(9,)], seed=4)
    optimizer = build(proxy, name, params, max_grad_norm=1.0)
    assert optimizer.grad_norm is None
    drive(optimizer, 0)
    norm = torch.cat([p.grad.flatten() for p in params]).double().norm()
    torch.testing.assert_close(optimizer.grad_norm, norm)
    assert torch.equal(optimizer.grad_norm, optimizer.inner.grad_norm)
    optimizer.add_param_group({"params": late})
    before = late[0].detach().clone()
    for seed in range(1, 9):
        drive(optimizer, seed)
    assert not torch.equal(late[0], before)
    assert [cases.entry(group, "k") for group in optimizer.inner.param_groups] == [9, 8]
    optimizer.zero_grad()
    assert all(p.grad is None for p in params + late)
    assert not optimizer.capturable


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_proxy_has_the_averaged_state_dict(name, proxy):
    model = torch.nn.Linear(6, 5)
    optimizer = build(proxy, name, model.parameters())
    for seed in range(8):
        drive(optimizer, seed)
    averaged = optimizer.averaged_state_dict(model)
    with optimizer.averaged():
        cases.assert_same(averaged.values(), model.state_dict().values())


@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("name", cases.NATIVE)
def test_a_proxy_steps_within_backward(name, proxy):
    params, others = cases.parameters(SHAPES), cases.parameters(SHAPES)
    plain, optimizer = cases.make(name, params), build(proxy, name, others)
    with optimizer.step_in_backward():
        for _ in range(8):
            sum(p.square().sum() for p in params).backward()
            plain.step()
            plain.zero_grad()
            sum(p.square().sum() for p in others).backward()
            assert all(p.grad is None for p in others)
            optimizer.step()
    cases.assert_same(params, others)
    cases.set_gradients(params, 0), cases.set_gradients(others, 0)
    plain.step()
    optimizer.step_parameter(others[1])
    with pytest.raises(RuntimeError, match="between step_parameter"):
        optimizer.eval()
    optimizer.step()
    cases.assert_same(params, others)


@pytest.mark.parametrize("name", NAMES)
def test_lightnings_own_proxy(name):
    optimizers = pytest.importorskip("lightning.pytorch.core.optimizer")
    inner = cases.make(name, cases.parameters(SHAPES))
    optimizer = optimizers.LightningOptimizer(inner)
    cases.run(inner, 8)
    y = cases.copies(cases.params_of(inner))
    optimizer.eval()
    state = copy.deepcopy(optimizer.state_dict())
    other = optimizers.LightningOptimizer(cases.make(name, cases.copies(cases.params_of(inner))))
    other.load_state_dict(state)
    other.train()
    if name not in cases.CLOSURE:
        cases.assert_same(cases.params_of(other), y)
        assert cases.entry(other.optimizer.param_groups[0], "train_mode")
