"""``nonfinite``: what a step does where a gradient is NaN or infinite."""

from __future__ import annotations

import copy
import io
from typing import Any

import cases
import pytest
import schedulefree_cpp
import torch

SHAPES = [(3, 4), (5,), (1030,)]
BAD = [torch.nan, torch.inf, -torch.inf]
NAMES = [*cases.COMPLETE, "ScheduleFreeWrapperClosure"]


def make(name: str, params: Any, **kwargs: Any) -> Any:
    if name == "ScheduleFreeWrapperClosure":
        base = torch.optim.RMSprop(params, lr=0.05, eps=1e-4)
        return schedulefree_cpp.ScheduleFreeWrapperClosure(base, **kwargs)
    return cases.make(name, params, **kwargs)


def step(optimizer: Any, bad: float | None = None, seed: int = 0) -> None:
    """A step in which one gradient holds a value."""
    params = cases.params_of(optimizer)

    def backward() -> float:
        cases.set_gradients(params, seed)
        if bad is not None:
            params[1].grad[2] = bad
        return 1.0

    if "Closure" in type(optimizer).__name__:
        optimizer.step(backward)
        return
    backward()
    if "Plus" in type(optimizer).__name__:
        optimizer.step_func(1.0)
    else:
        optimizer.step()


def trained(name: str, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    params = cases.parameters(SHAPES, dtype)
    optimizer = make(name, [{"params": params[:1]}, {"params": params[1:]}], **kwargs)
    for seed in range(3):
        step(optimizer, seed=seed)
    return optimizer


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_leaves_everything_as_it_was(name, dtype, bad):
    optimizer, twin = (trained(name, dtype, nonfinite=policy) for policy in ("skip", "propagate"))
    before = cases.snapshot(optimizer)
    step(optimizer, bad)
    cases.assert_unchanged(optimizer, before)
    step(optimizer, seed=7), step(twin, seed=7)
    cases.assert_same(cases.params_of(optimizer), cases.params_of(twin))
    cases.assert_same(cases.states_of(optimizer), cases.states_of(twin))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", NAMES)
def test_raising_names_the_parameter(name, bad):
    optimizer = trained(name, nonfinite="raise")
    before = cases.snapshot(optimizer)
    with pytest.raises(
        RuntimeError,
        match=r"the gradient of params\[0\] in parameter group 1 is not finite; nothing was changed",
    ):
        step(optimizer, bad)
    cases.assert_unchanged(optimizer, before)
    step(optimizer, seed=7)


def test_the_name_is_told_where_there_is_one():
    model = torch.nn.Linear(2, 3)
    optimizer = cases.make("SGDScheduleFree", model.named_parameters(), nonfinite="raise")
    model.weight.grad, model.bias.grad = torch.ones(3, 2), torch.full((3,), torch.nan)
    with pytest.raises(RuntimeError, match=r"params\[1\] \('bias'\) in parameter group 0"):
        optimizer.step()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in cases.PLUS])
def test_a_step_propagates_unless_told_otherwise(name):
    optimizer = trained(name)
    step(optimizer, torch.nan)
    assert not cases.params_of(optimizer)[1].isfinite().all()
    assert cases.params_of(optimizer)[0].isfinite().all()
    assert optimizer.grad_norm is None
    if "Wrapper" not in name:
        assert all("nonfinite" not in group for group in optimizer.param_groups)


@pytest.mark.parametrize("policy", ["skip", "raise"])
@pytest.mark.parametrize("name", NAMES)
def test_a_policy_changes_no_bit_of_a_step(name, policy):
    optimizer, twin = trained(name, nonfinite=policy), trained(name)
    cases.assert_same(cases.params_of(optimizer), cases.params_of(twin))
    cases.assert_same(cases.states_of(optimizer), cases.states_of(twin))


@pytest.mark.parametrize("name", cases.NATIVE)
def test_a_first_step_and_a_moved_beta_are_skipped_too(name):
    optimizer = cases.make(name, cases.parameters(SHAPES), nonfinite="skip")
    before = cases.snapshot(optimizer)
    step(optimizer, torch.nan)
    cases.assert_unchanged(optimizer, before)
    cases.run(optimizer, 3)
    cases.set_beta(optimizer, 0.5)
    before = cases.snapshot(optimizer)
    step(optimizer, torch.inf)
    cases.assert_unchanged(optimizer, before)
    twin = cases.make(name, cases.parameters(SHAPES))
    cases.run(twin, 3)
    cases.set_beta(twin, 0.5)
    step(optimizer), step(twin)
    cases.assert_same(cases.params_of(optimizer), cases.params_of(twin))


@pytest.mark.parametrize("name", cases.NATIVE)
def test_capturable_decides_on_the_device(name):
    optimizer = trained(name, nonfinite="skip", capturable=True)
    before = cases.snapshot(optimizer)
    step(optimizer, torch.nan)
    cases.assert_unchanged(optimizer, before)
    # No host reads the norm: a meta or fake tensor could not be read, and CUDA would wait.
    reads: list[Any] = []
    original = torch.Tensor.tolist
    torch.Tensor.tolist = lambda t: reads.append(t) or original(t)
    try:
        step(optimizer, torch.nan)
    finally:
        torch.Tensor.tolist = original
    assert reads == []
    twin = trained(name)
    step(optimizer, seed=7), step(twin, seed=7)
    for p, q in zip(cases.params_of(optimizer), cases.params_of(twin), strict=True):
        torch.testing.assert_close(p, q)
    # A scaler's found_inf still skips.
    optimizer.found_inf, before = torch.tensor(1.0), cases.snapshot(optimizer)
    step(optimizer)
    cases.assert_unchanged(optimizer, before)


@pytest.mark.parametrize("bad", [torch.nan, None])
def test_clipping_goes_with_it(bad):
    optimizer = trained("AdamWScheduleFree", nonfinite="skip", max_grad_norm=0.1)
    twin = trained("AdamWScheduleFree", max_grad_norm=0.1)
    step(optimizer, bad)
    assert bool(optimizer.grad_norm.isfinite()) == (bad is None)
    if bad is None:
        step(twin)
    cases.assert_same(cases.params_of(optimizer), cases.params_of(twin))


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_compiled_steps_do_the_same(policy, capturable):
    if capturable and policy == "raise":
        return
    torch._dynamo.reset()
    optimizer = trained("AdamWScheduleFree", nonfinite=policy, capturable=capturable)
    params = cases.params_of(optimizer)
    compiled = torch.compile(optimizer.step, backend="aot_eager")
    cases.set_gradients(params, 3)
    compiled()
    before = cases.snapshot(optimizer)
    params[2].grad[1000] = torch.inf
    if policy == "raise":
        with pytest.raises(RuntimeError, match=r"params\[1\] in parameter group 1 is not finite"):
            compiled()
    else:
        compiled()
    cases.assert_unchanged(optimizer, before)
    cases.set_gradients(params, 4)
    compiled()
    twin = trained("AdamWScheduleFree", capturable=capturable)
    for seed in (3, 4):
        step(twin, seed=seed)
    cases.assert_same(params, cases.params_of(twin))
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_the_policy_is_checked(name):
    params = cases.parameters(SHAPES)
    with pytest.raises(ValueError, match=r"Invalid nonfinite: 'ignore', expected one of \['propagate', 's"):
        make(name, params, nonfinite="ignore")


def test_groups_cannot_differ():
    params = cases.parameters(SHAPES)
    message = r"Invalid nonfinite in parameter group {}: 'skip', expected 'propagate' as for the whole"
    with pytest.raises(ValueError, match=message.format(0)):
        schedulefree_cpp.SGDScheduleFree([{"params": params, "nonfinite": "skip"}])
    optimizer = schedulefree_cpp.SGDScheduleFree([{"params": [p]} for p in params])
    with pytest.raises(ValueError, match=message.format(3)):
        optimizer.add_param_group({"params": cases.parameters([(2,)]), "nonfinite": "skip"})
    assert len(optimizer.param_groups) == 3
    optimizer.train()
    cases.set_gradients(params, 0)
    optimizer.param_groups[1]["nonfinite"] = "skip"
    before = cases.snapshot(optimizer)
    with pytest.raises(ValueError, match=message.format(1)):
        optimizer.step()
    saved = optimizer.state_dict()
    other = schedulefree_cpp.SGDScheduleFree([{"params": [p]} for p in cases.parameters(SHAPES)])
    with pytest.raises(ValueError, match=r"group 1 of the state dict: 'skip', expected 'propagate'"):
        other.load_state_dict(saved)
    cases.assert_unchanged(optimizer, before)


def test_what_cannot_go_with_it_says_so():
    params = cases.parameters(SHAPES)
    with pytest.raises(ValueError, match="Invalid nonfinite: 'raise', expected 'skip' or 'propagate' with"):
        cases.make("AdamWScheduleFree", params, nonfinite="raise", capturable=True)
    optimizer = cases.make("AdamWScheduleFree", params, nonfinite="skip")
    cases.set_gradients(params, 0)
    with pytest.raises(RuntimeError, match=r"step_parameter.* cannot be used with nonfinite"):
        optimizer.step_parameter(params[0])


@pytest.mark.parametrize("name", cases.COMPLETE)
def test_it_survives_copies_and_checkpoints(name):
    optimizer = trained(name, nonfinite="skip")
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    params = cases.copies(cases.params_of(optimizer))
    other = cases.make(name, [{"params": params[:1]}, {"params": params[1:]}])
    other.load_state_dict(torch.load(file, weights_only=True))
    for each in (copy.deepcopy(optimizer), other):
        before = cases.snapshot(each)
        step(each, torch.nan)
        cases.assert_unchanged(each, before)
