"""Groups that rest do not count steps: none of their parameters has a gradient."""

from __future__ import annotations

import copy
from typing import Any

import cases
import pytest
import schedulefree_cpp
import torch

SHAPES = [(4, 3), (5,)]
NAMES = [*cases.NATIVE, *cases.MUON, "ScheduleFreeWrapper", *cases.CLOSURE]


def two_groups(name: str, **options: Any) -> Any:
    params = cases.parameters(SHAPES)
    if name in cases.WRAPPER:
        # An optimizer without state, for which a late start is none.
        base = torch.optim.SGD([{"params": [p]} for p in params], lr=0.05)
        optimizer = getattr(schedulefree_cpp, name)(base)
        optimizer.train()
        return optimizer
    return cases.make(name, [{"params": [p]} for p in params], **options)


def step(optimizer: Any, seed: int, groups: list[int]) -> None:
    """A step for which only some groups have gradients."""

    def gradients() -> None:
        for index, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                p.grad = None
            if index in groups:
                cases.set_gradients(group["params"], seed + index)

    if "Closure" in type(optimizer).__name__:
        optimizer.step(gradients)
    else:
        gradients()
        optimizer.step()


def schedule(group: dict[str, Any]) -> list[float]:
    return [float(cases.entry(group, name)) for name in ("k", "weight_sum", "lr_max")]


@pytest.mark.parametrize("name", NAMES)
def test_a_group_that_waits_takes_its_first_step_as_if_it_were_new(name):
    late, new = two_groups(name), two_groups(name)
    before = schedule(late.param_groups[1])
    for seed in range(20):
        step(late, seed, [0])
    assert schedule(late.param_groups[1]) == before
    for seed in range(5):
        step(late, seed, [0, 1]), step(new, seed, [0, 1])
    cases.assert_same(late.param_groups[1]["params"], new.param_groups[1]["params"])
    assert schedule(late.param_groups[1]) == schedule(new.param_groups[1])
    assert [int(cases.entry(group, "k")) for group in late.param_groups] == [25, 5]


@pytest.mark.parametrize("name", NAMES)
def test_a_group_that_rests_goes_on_where_it_was(name):
    rested, twin = two_groups(name), two_groups(name)
    for seed in range(4):
        step(rested, seed, [0, 1]), step(twin, seed, [0, 1])
    for seed in range(4, 9):
        step(rested, seed, [0])
    for seed in range(9, 12):
        step(rested, seed, [0, 1]), step(twin, seed, [0, 1])
    cases.assert_same(rested.param_groups[1]["params"], twin.param_groups[1]["params"])
    assert schedule(rested.param_groups[1]) == schedule(twin.param_groups[1])


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", cases.NATIVE)
def test_it_does_not_matter_where_the_schedule_is_and_whether_the_step_is_compiled(name, capturable):
    eager, other = two_groups(name), two_groups(name, capturable=capturable)
    for seed, groups in enumerate([[0], [0], [0, 1], [1], [0, 1], [], [0, 1]]):
        step(eager, seed, groups), step(other, seed, groups)
    cases.assert_same(cases.params_of(eager), cases.params_of(other))
    assert [*map(schedule, eager.param_groups)] == [*map(schedule, other.param_groups)]


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("capturable", [False, True])
def test_compiled_steps_count_alike(capturable):
    torch._dynamo.reset()
    eager, other = (two_groups("AdamWScheduleFree", capturable=capturable) for _ in range(2))
    compiled = torch.compile(other.step, backend="eager")
    for seed, groups in enumerate([[0], [0], [0, 1], [0, 1], [1], [0]]):
        step(eager, seed, groups)
        for index, group in enumerate(other.param_groups):
            group["params"][0].grad = None
            if index in groups:
                cases.set_gradients(group["params"], seed + index)
        compiled()
    cases.assert_same(cases.params_of(eager), cases.params_of(other))
    assert [*map(schedule, eager.param_groups)] == [*map(schedule, other.param_groups)]
    torch._dynamo.reset()


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", cases.NATIVE)
def test_a_step_within_backward_counts_the_groups_that_stepped(name, capturable):
    plain, optimizer = two_groups(name), two_groups(name, capturable=capturable)
    for seed, groups in enumerate([[0], [0, 1], [1], [0, 1]]):
        step(plain, seed, groups)
        for index, group in enumerate(optimizer.param_groups):
            group["params"][0].grad = None
            if index in groups:
                cases.set_gradients(group["params"], seed + index)
        for index in groups[:1]:
            optimizer.step_parameter(optimizer.param_groups[index]["params"][0])
            optimizer.param_groups[index]["params"][0].grad = None
        optimizer.step()
    cases.assert_same(cases.params_of(plain), cases.params_of(optimizer))
    assert [*map(schedule, plain.param_groups)] == [*map(schedule, optimizer.param_groups)]


@pytest.mark.parametrize("name", [*cases.NATIVE, "ScheduleFreeWrapper"])
def test_a_parameter_without_elements_counts_as_having_a_gradient(name):
    """As the empty shard that another process has a piece of."""
    optimizer = two_groups(name)
    optimizer.param_groups[1]["params"] = [torch.nn.Parameter(torch.empty(0, 5))]
    step(optimizer, 0, [0])
    assert [int(cases.entry(group, "k")) for group in optimizer.param_groups] == [1, 1]
    optimizer.param_groups[1]["params"][0].requires_grad_(False)
    step(optimizer, 0, [0])
    assert [int(cases.entry(group, "k")) for group in optimizer.param_groups] == [2, 1]


@pytest.mark.parametrize("name", cases.NATIVE)
def test_a_group_that_is_added_by_hand_within_an_iteration_steps_too(name):
    optimizer = two_groups(name)
    step(optimizer, 0, [0, 1])
    cases.set_gradients(cases.params_of(optimizer), 1)
    optimizer.step_parameter(cases.params_of(optimizer)[0])
    with pytest.raises(RuntimeError, match=r"add_param_group\(\) was called between step_parameter"):
        optimizer.add_param_group({"params": cases.parameters([(2,)])})
    late = cases.parameters([(2,)])
    cases.set_gradients(late, 1)
    fresh = {**optimizer.param_groups[0], "k": 0, "weight_sum": 0.0, "lr_max": -1.0, "params": late}
    optimizer.param_groups.append(fresh)
    before = copy.deepcopy(late)
    optimizer.step()
    optimizer.eval()
    assert [cases.entry(group, "k") for group in optimizer.param_groups] == [2, 2, 1]
    assert not torch.equal(late[0], before[0]) or name == "RAdamScheduleFree"


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_without_any_gradient_counts_nowhere(capturable):
    optimizer = two_groups("AdamWScheduleFree", capturable=capturable, max_grad_norm=1.0)
    step(optimizer, 0, [0, 1])
    step(optimizer, 1, [])
    assert [int(cases.entry(group, "k")) for group in optimizer.param_groups] == [1, 1]
