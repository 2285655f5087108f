"""State dicts: wherever they were loaded to, and those that belong to something else."""

from __future__ import annotations

import copy
import pickle
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
@pytest.mark.parametrize("name", cases.FAMILY)
def test_everything_works_whatever_the_default_device(name, mode, meta_by_default):
    # Only parameters and gradients say that they are on the CPU.
    model = torch.nn.Linear(8, 3, device="cpu")
    params = list(model.parameters())
    seeds = iter(range(100))

    def gradients(optimizer):
        with torch.device("cpu"):
            cases.set_gradients(cases.params_of(optimizer), next(seeds))

    def run(optimizer, steps):
        for _ in range(steps):
            if name in cases.CLOSURE:
                optimizer.step(lambda: gradients(optimizer))
                continue
            gradients(optimizer)
            if name in cases.PLUS:
                optimizer.step_func(1.0), optimizer.step(lambda: 1.0)
            else:
                optimizer.step(), optimizer.step(lambda: 1.0)

    optimizer = cases.make(name, params)
    run(optimizer, 8)
    getattr(optimizer, mode)()
    state = copy.deepcopy(optimizer.state_dict())
    other = cases.make(name, cases.copies(params))
    other.load_state_dict(state)
    twin = copy.deepcopy(optimizer)
    averages = []
    for o in (optimizer, other, twin):
        seeds = iter(range(100))
        o.train()
        run(o, 3)
        if name in cases.COMPLETE:
            model.weight, model.bias = cases.params_of(o)
            averages.append(list(o.averaged_state_dict(model).values()))
            with o.averaged():
                cases.assert_same(cases.params_of(o), averages[-1])
            o.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, device="cpu"))]})
            run(o, 2)
        o.eval()
    for o, average in zip((other, twin), averages[1:] or [[], []], strict=True):
        cases.assert_same(cases.params_of(optimizer), cases.params_of(o))
        cases.assert_same(averages[0] if averages else [], average)


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
        assert cases.entry(optimizer.param_groups[0], "k") == 9
        assert (optimizer.grad_norm is None) == (max_grad_norm is None)


def spread(t: torch.Tensor) -> torch.Tensor:
    return t.new_empty([*t.shape, 2])[..., 0].copy_(t)


# No other device here holds values. What a dtype or strides cannot change about a tensor, a device cannot.
ELSEWHERE = {
    "as it is": lambda t: t,
    "float64": lambda t: t.double() if t.is_floating_point() else t,
    "with gaps": spread,
    "a parameter": lambda t: torch.nn.Parameter(t, t.is_floating_point()),
}


@pytest.mark.parametrize("elsewhere", ELSEWHERE)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", cases.COMPLETE)
def test_a_state_dict_resumes_wherever_it_was_loaded_to(name, mode, elsewhere):
    optimizer = trained(name)
    getattr(optimizer, mode)()
    state = mapped(copy.deepcopy(optimizer.state_dict()), ELSEWHERE[elsewhere])
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


# ---- what state_dict() returned ------------------------------------------------------------------------


def numbers_of(state: Any) -> Any:
    """A state dict without its tensors, which torch's state dicts share with the optimizer."""
    if isinstance(state, dict):
        return {key: numbers_of(v) for key, v in state.items() if not isinstance(v, torch.Tensor)}
    return [numbers_of(v) for v in state] if isinstance(state, list) else copy.deepcopy(state)


def entries_of(optimizer: Any) -> Any:
    groups = [sorted(group) for group in optimizer.param_groups]
    state = [sorted(optimizer.state.get(p, {})) for p in cases.params_of(optimizer)]
    hooks = (optimizer._optimizer_state_dict_post_hooks, optimizer._optimizer_load_state_dict_pre_hooks)
    return groups, state, [id(t) for t in cases.states_of(optimizer)], [len(of_kind) for of_kind in hooks]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", cases.COMPLETE)
def test_a_state_dict_stays_as_it_was_and_leaves_the_optimizer_so(name, mode, capturable):
    if capturable and name not in cases.NATIVE:
        return
    optimizer = trained(name, **({"capturable": True} if capturable else {}))
    getattr(optimizer, mode)()
    before = entries_of(optimizer)
    state = optimizer.state_dict()
    assert entries_of(optimizer) == before
    sampled = copy.deepcopy(state["schedulefree_cpp"])
    numbers, keys = numbers_of(state), [sorted(s) for s in state["state"].values()]
    optimizer.train()
    cases.run(optimizer, 2, start=8)
    optimizer.eval()
    cases.set_beta(optimizer, 0.7) if name in cases.NATIVE else None
    optimizer.add_param_group({"params": cases.parameters([(2,)])})
    optimizer.train()
    cases.run(optimizer, 2, start=10)
    assert numbers_of(state) == numbers
    assert [sorted(s) for s in state["state"].values()] == keys
    for key in ("y", "x"):
        assert torch.equal(state["schedulefree_cpp"]["fingerprint"][key], sampled["fingerprint"][key])
    # Nor does who changes the dict change the optimizer.
    before = entries_of(optimizer)
    state = optimizer.state_dict()
    for entries in [*state["state"].values(), *state["param_groups"]]:
        entries.clear()
    assert entries_of(optimizer) == before
    cases.run(optimizer, 1, start=12)


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
@pytest.mark.parametrize("name", cases.NATIVE + cases.CLOSURE + cases.PLUS + cases.MUON)
def test_a_state_dict_of_another_optimizer_is_refused(name, other):
    theirs = OTHERS[other](cases.parameters(SHAPES))
    if "without" not in other:
        cases.run(theirs, 3)
    optimizer = trained(name)
    check = unchanged(optimizer)
    with pytest.raises(
        ValueError,
        match=r"Invalid state dict: parameter group 0 lacks k, weight_sum, lr_max.*no state has z, so .*schedule-free",
    ):
        optimizer.load_state_dict(theirs.state_dict())
    check()


# Classes that keep one schedule and one state: whoever goes from one to another means it.
KINDS = {
    **dict.fromkeys([name for name in cases.NATIVE + cases.CLOSURE if "SGD" not in name], "Adam"),
    **dict.fromkeys([name for name in cases.NATIVE + cases.CLOSURE if "SGD" in name], "SGD"),
    **dict.fromkeys(cases.PLUS, "Plus"),
    **dict.fromkeys(cases.MUON, "Muon"),
    **dict.fromkeys(cases.WRAPPER, "wrapper"),
}


@pytest.mark.parametrize("other", ["AdamWScheduleFree", "SGDScheduleFree", *cases.PLUS, *cases.WRAPPER])
@pytest.mark.parametrize("name", cases.COMPLETE)
def test_a_state_dict_of_another_kind_of_schedule_free_optimizer_is_refused(name, other):
    if KINDS[name] == KINDS[other]:
        return
    state = trained(other).state_dict()
    optimizer = trained(name)
    check = unchanged(optimizer)
    with pytest.raises(
        ValueError,
        match=r"Invalid state dict: parameter group 0 (lacks|has) .*(schedule-free|ScheduleFree\+)",
    ):
        optimizer.load_state_dict(state)
    check()


def without(entry: str) -> Any:
    def change(state: Any) -> None:
        del state["state"][1][entry]

    return change


def with_z(z: torch.Tensor) -> Any:
    def change(state: Any) -> None:
        entries = state["state"][1]
        entries["sf_z" if "sf_z" in entries else "z"] = z

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
@pytest.mark.parametrize("name", cases.NATIVE + cases.CLOSURE + cases.PLUS + cases.MUON)
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


@pytest.mark.parametrize("name", cases.NATIVE + cases.CLOSURE + cases.PLUS + cases.MUON)
def test_parameters_are_refused_by_name_where_it_is_known(name):
    def named(shapes):
        return [(f"layer{i}.weight", p) for i, p in enumerate(cases.parameters(shapes))]

    optimizer = cases.make(name, named(SHAPES))
    cases.run(optimizer, 2)
    other = cases.make(name, named(SHAPES[::-1]))
    with pytest.raises(ValueError, match=r"z of parameter 'layer0.weight' of parameter group 0 has shape"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def change_all(change: Any) -> Any:
    return lambda state: [change(entries) for entries in state["state"].values()]


REFUSED_BY_WRAPPERS = {
    "another shape": REFUSED["another shape"],
    "integers": REFUSED["integers"],
    "complex": REFUSED["complex"],
    "one group more": REFUSED["one group more"],
    "one parameter less": REFUSED["one parameter less"],
    "lr as text": REFUSED["lr as text"],
    "without any z": (change_all(lambda entries: entries.pop("sf_z")), r"no state has sf_z, has \["),
    "a momentum above 1": (
        lambda state: state["param_groups"][0].update(sf_momentum=1.5),
        r"Invalid sf_momentum in parameter group 0 of the state dict: 1.5, expected a value in \(0, 1\]",
    ),
    "an r that is none": (
        lambda state: state["param_groups"][0].update(sf_r="2"),
        "Invalid sf_r in parameter group 0 of the state dict: '2' of type str, expected a number",
    ),
    "a negative k": (
        lambda state: state["param_groups"][0].update(sf_k=-1),
        "Invalid k in parameter group 0 of the state dict: -1, expected a number of steps",
    ),
}


@pytest.mark.parametrize("case", REFUSED_BY_WRAPPERS)
@pytest.mark.parametrize("name", cases.WRAPPER)
def test_a_wrapper_refuses_a_state_dict_of_other_parameters_and_loads_nothing(name, case):
    change, message = REFUSED_BY_WRAPPERS[case]
    state = copy.deepcopy(trained(name).state_dict())
    change(state)
    optimizer = trained(name)
    check = unchanged(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    check()


def test_a_wrapper_that_stores_x_and_y_refuses_a_state_without_them():
    optimizer = trained("ScheduleFreeWrapperReference")
    check = unchanged(optimizer)
    with pytest.raises(ValueError, match=r"the state of parameter 0 of parameter group 0 lacks x, has \["):
        optimizer.load_state_dict(trained("ScheduleFreeWrapper").state_dict())
    check()


@pytest.mark.parametrize("name", cases.WRAPPER)
def test_a_wrapper_starts_the_average_afresh_from_a_state_dict_of_its_base(name):
    base = torch.optim.RMSprop(cases.parameters(SHAPES), lr=0.05, eps=1e-4)
    cases.run(base, 5)
    optimizer, other = trained(name), cases.make(name, cases.copies(cases.params_of(base)))
    with torch.no_grad():
        for p, q in zip(cases.params_of(optimizer), cases.params_of(base), strict=True):
            p.copy_(q)
    for o in (optimizer, other):
        o.load_state_dict(copy.deepcopy(base.state_dict()))
        o.train()
        cases.run(o, 3)
        assert cases.entry(o.param_groups[0], "k") == 3
    cases.assert_same(cases.params_of(optimizer), cases.params_of(other))


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFreeClosure", "ScheduleFreeWrapper"])
def test_a_pickle_of_an_earlier_build_loads(name):
    """Which names modules that are gone, and whose memory lacks what came later."""
    params = cases.parameters([(3, 2), (4,)])
    optimizer = cases.make(name, params)
    cases.run(optimizer, 3)
    optimizer.load_state_dict(optimizer.state_dict())  # until the next step it holds samples
    earlier = pickle.dumps((params, optimizer), protocol=0)
    for now, then in (("modes", "_modes"), ("samples", "_state_dict")):
        earlier = earlier.replace(
            f"schedulefree_cpp._core.{now}".encode(), f"schedulefree_cpp.{then}".encode()
        )
    assert b"_core" not in earlier
    others, resumed = pickle.loads(earlier)
    cases.run(optimizer, 2, start=3), cases.run(resumed, 2, start=3)
    cases.assert_same(params, others)
