"""State dicts: wherever they were loaded to, and those that belong to something else."""

from __future__ import annotations

import copy
from typing import Any

import cases
import pytest
import torch

SHAPES = [(3, 8), (8, 6)]


def trained(name: str, shapes: list[tuple[int, ...]] = SHAPES, **kwargs: Any) -> Any:
    optimizer = cases.make(name, cases.parameters(shapes), **kwargs)
    cases.run(optimizer, 8)
    return optimizer


def mapped(value: Any, move: Any) -> Any:
    """A state dict with all tensors changed, as by ``torch.load(map_location=...)``."""
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, dict):
        return {key: mapped(v, move) for key, v in value.items()}
    return [mapped(v, move) for v in value] if isinstance(value, list) else value


@pytest.fixture
def meta_by_default():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", cases.COMPLETE)
def test_everything_works_whatever_the_default_device(name, mode, meta_by_default):
    def on_cpu(shapes):
        with torch.device("cpu"):
            return cases.parameters(shapes)

    def run(optimizer, steps, start=0):
        for seed in range(start, start + steps):
            with torch.device("cpu"):
                cases.drive(optimizer, seed)

    params = on_cpu(SHAPES)
    optimizer = cases.make(name, params)
    for seed in range(8):
        # The step itself has no device of its own to stand on.
        with torch.device("cpu"):
            gradients = [torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) for p in params]

        def closure(gradients=gradients):
            for p, g in zip(params, gradients, strict=True):
                p.grad = g

        if name in cases.CLOSURE:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step_func(1.0) if name in cases.PLUS else optimizer.step()
    getattr(optimizer, mode)()
    state = copy.deepcopy(optimizer.state_dict())
    other = cases.make(name, cases.copies(params))
    other.load_state_dict(state)
    for o in (optimizer, other):
        o.train()
        with o.averaged():
            pass
        run(o, 3, start=8)
        o.eval()
    cases.assert_same(params, cases.params_of(other))
    copy.deepcopy(optimizer).train()


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("name", cases.NATIVE)
def test_capturable_and_clipped_steps_work_whatever_the_default_device(name, max_grad_norm, meta_by_default):
    for capturable in (False, True):
        with torch.device("cpu"):
            params = cases.parameters(SHAPES)
            cases.set_gradients(params, 0)
        optimizer = cases.make(name, params, capturable=capturable, max_grad_norm=max_grad_norm)
        for _ in range(8):
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        assert optimizer.param_groups[0]["k"] == 9
        assert (optimizer.grad_norm is None) == (max_grad_norm is None)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", cases.COMPLETE)
def test_a_state_dict_resumes_wherever_it_was_loaded_to(name, mode):
    # No other device here that holds values: only what is compared, not what is copied, can be elsewhere.
    optimizer = trained(name)
    getattr(optimizer, mode)()
    state = copy.deepcopy(optimizer.state_dict())
    fingerprint = state["schedulefree_cpp"]["fingerprint"]
    state["schedulefree_cpp"]["fingerprint"] = mapped(fingerprint, lambda t: t.to(torch.float32))
    other = cases.make(name, cases.copies(cases.params_of(optimizer)))
    with torch.device("meta"):  # as in the middle of building another model
        other.load_state_dict(state)
        other.train()
    optimizer.train()
    cases.run(optimizer, 3, start=8), cases.run(other, 3, start=8)
    cases.assert_same(cases.params_of(optimizer), cases.params_of(other))


@pytest.mark.parametrize("name", cases.COMPLETE)
def test_samples_that_were_loaded_without_values_are_not_compared(name):
    optimizer = trained(name)
    state = copy.deepcopy(optimizer.state_dict())
    fingerprint = state["schedulefree_cpp"]["fingerprint"]
    state["schedulefree_cpp"]["fingerprint"] = mapped(fingerprint, lambda t: t.to("meta"))
    other = cases.make(name, cases.copies(cases.params_of(optimizer)))
    other.load_state_dict(state)
    other.train()
    cases.run(optimizer, 3, start=8), cases.run(other, 3, start=8)
    cases.assert_same(cases.params_of(optimizer), cases.params_of(other))


# ---- of something else ---------------------------------------------------------------------------------

OTHERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "Adam without a step": lambda params: torch.optim.Adam(params, lr=0.1),
}


def unchanged(optimizer: Any) -> Any:
    params = cases.copies(cases.params_of(optimizer))
    states = [t.clone() for t in cases.states_of(optimizer)]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in copy.deepcopy(optimizer.param_groups)]

    def check() -> None:
        cases.assert_same(cases.params_of(optimizer), params)
        cases.assert_same(cases.states_of(optimizer), states)
        assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups
        cases.run(optimizer, 1)

    return check


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", cases.NATIVE + cases.CLOSURE + cases.PLUS)
def test_a_state_dict_of_another_optimizer_is_refused(name, other):
    theirs = OTHERS[other](cases.parameters(SHAPES))
    if "without" not in other:
        cases.run(theirs, 3)
    optimizer = trained(name)
    check = unchanged(optimizer)
    with pytest.raises(
        ValueError, match=r"Invalid state dict: parameter group 0 lacks k, weight_sum, lr_max.*schedule-free"
    ):
        optimizer.load_state_dict(theirs.state_dict())
    check()


def without(entry: str) -> Any:
    def change(state: Any) -> None:
        del state["state"][1][entry]

    return change


def with_z(z: torch.Tensor) -> Any:
    def change(state: Any) -> None:
        state["state"][1]["z"] = z

    return change


REFUSED = {
    "without z": (without("z"), r"the state of parameter 1 of parameter group 0 lacks z, has \["),
    "another shape": (
        with_z(torch.ones(3, 8)),
        r"z of parameter 1 of parameter group 0 has shape \(3, 8\), expected \(8, 6\)",
    ),
    "integers": (
        with_z(torch.ones(8, 6, dtype=torch.int64)),
        r"z of parameter 1 of parameter group 0 has dtype torch.int64, expected a floating-point dtype",
    ),
    "complex": (
        with_z(torch.ones(8, 6, dtype=torch.complex64)),
        "has dtype torch.complex64, expected a floa",
    ),
    "one group more": (
        lambda state: state["param_groups"].append(state["param_groups"][0]),
        "2 parameter groups, expected 1",
    ),
    "one parameter less": (
        lambda state: state["param_groups"][0]["params"].pop(),
        "1 parameters in parameter group 0, expected 2",
    ),
    "without k": (lambda state: state["param_groups"][0].pop("k"), "parameter group 0 lacks k"),
    "lr as text": (
        lambda state: state["param_groups"][0].update(lr="1e-3"),
        "Invalid lr in parameter group 0 of the state dict: '1e-3' of type str, expected a number",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", cases.NATIVE + cases.CLOSURE + cases.PLUS)
def test_a_state_dict_of_other_parameters_is_refused_and_nothing_loaded(name, case):
    change, message = REFUSED[case]
    if case == "without z" and "SGD" in name:
        return  # it then has no state at all, and starts afresh
    state = copy.deepcopy(trained(name).state_dict())
    change(state)
    optimizer = trained(name)
    check = unchanged(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    check()


@pytest.mark.parametrize("name", cases.NATIVE + cases.CLOSURE + cases.PLUS)
def test_parameters_are_refused_by_name_where_it_is_known(name):
    def named(shapes):
        return [(f"layer{i}.weight", p) for i, p in enumerate(cases.parameters(shapes))]

    optimizer = cases.make(name, named(SHAPES))
    cases.run(optimizer, 2)
    other = cases.make(name, named(SHAPES[::-1]))
    with pytest.raises(ValueError, match=r"z of parameter 'layer0.weight' of parameter group 0 has shape"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


@pytest.mark.parametrize("name", cases.WRAPPER)
def test_a_wrapper_refuses_a_state_dict_of_other_parameters(name):
    optimizer = trained(name)
    for shapes in (SHAPES[::-1], SHAPES[:1]):
        other = cases.make(name, cases.parameters(shapes))
        with pytest.raises(ValueError, match=r"[xyz] of parameter 0 of parameter group 0 has shape|size"):
            other.load_state_dict(optimizer.state_dict())
        assert not other.state
