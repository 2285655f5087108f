"""Every class against its namesake in ``schedulefree``, and what only the relatives have."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import io
import math
import re
import sys
import warnings
from pathlib import Path

import cases
import pytest
import reference
import schedulefree
import schedulefree_cpp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

SHAPES = [(), (0,), (7, 5), (2, 3, 4, 4), (1025,)]


def assert_parity(a, b, tolerance=cases.PARITY):
    for p, q in zip(cases.params_of(a), cases.params_of(b), strict=True):
        torch.testing.assert_close(p, q, **tolerance, check_dtype=False)
        mine, theirs = cases.state(a, p), cases.state(b, q)
        for name in mine.keys() | theirs.keys():
            torch.testing.assert_close(mine[name], theirs[name], **tolerance, check_dtype=False)


# ---- upstream's own tests ------------------------------------------------------------------------------


def upstream_tests():
    path = Path(schedulefree.__file__).parent / "test_schedulefree.py"
    return [line.split("(")[0][4:] for line in path.read_text().splitlines() if line.startswith("def test_")]


@pytest.mark.parametrize("name", upstream_tests())
def test_upstreams_own_tests_pass(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "schedulefree", schedulefree_cpp)
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    path = Path(schedulefree.__file__).parent / "test_schedulefree.py"
    spec = importlib.util.spec_from_file_location("upstream_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.SGDScheduleFree is schedulefree_cpp.SGDScheduleFree
    # As upstream seeds them. With others, its SGD test fails one time in twelve, with either package.
    torch.manual_seed(1)
    getattr(module, name)()


def test_every_public_class_is_there_with_its_arguments():
    names = [name for name in vars(schedulefree) if inspect.isclass(getattr(schedulefree, name))]
    assert len(names) == 11
    for name in names:
        ours = inspect.signature(getattr(schedulefree_cpp, name)).parameters
        upstreams = inspect.signature(getattr(schedulefree, name)).parameters
        assert list(ours)[: len(upstreams)] == list(upstreams), name
        for key, parameter in upstreams.items():
            assert ours[key].default == parameter.default, (name, key)
    assert set(names) < set(schedulefree_cpp.__all__)


# ---- three hundred steps -------------------------------------------------------------------------------

SGD = {
    "lr": st.floats(1e-3, 0.05),  # three hundred steps then sum up to about 1
    "momentum": st.floats(0.8, 0.99),
    "weight_decay": st.sampled_from([0.0, 0.01, 0.3]),
    "warmup_steps": st.integers(0, 50),
    "r": st.floats(0, 2),
    "weight_lr_power": st.floats(0, 3),
}
ADAM = {
    "lr": st.floats(1e-4, 0.05),
    "betas": st.tuples(st.floats(0.8, 0.99), st.floats(0.8, 0.9999)),
    "eps": st.sampled_from([1e-8, 1e-6]),
    "weight_decay": st.sampled_from([0.0, 0.01, 0.3]),
    "warmup_steps": st.integers(0, 50),
    "r": st.floats(0, 2),
    "weight_lr_power": st.floats(0, 3),
}
RADAM = {**{k: v for k, v in ADAM.items() if k != "warmup_steps"}, "silent_sgd_phase": st.booleans()}
WRAPPER = {
    "lr": st.floats(1e-4, 0.02),
    "momentum": st.floats(0.8, 0.99),
    "weight_decay_at_y": st.sampled_from([0.0, 0.01, 0.3]),
    "r": st.floats(0, 2),
    "weight_lr_power": st.floats(0, 3),
}
STRATEGIES = {
    "SGDScheduleFree": SGD,
    "SGDScheduleFreeClosure": SGD,
    "SGDScheduleFreeReference": SGD,
    "AdamWScheduleFree": ADAM,
    "AdamWScheduleFreeClosure": ADAM,
    "AdamWScheduleFreePaper": ADAM,
    "AdamWScheduleFreeReference": {**ADAM, "decay_at_z": st.booleans()},
    "RAdamScheduleFree": RADAM,
    "RAdamScheduleFreeClosure": RADAM,
    "ScheduleFreeWrapper": WRAPPER,
    "ScheduleFreeWrapperReference": WRAPPER,
}


class ReadyRMSprop(torch.optim.RMSprop):
    """Upstream's wrappers put their state before the base optimizer's, whose first step it then hides."""

    def step(self, closure=None):  # noqa: D102
        for p in cases.params_of(self):
            self.state[p].setdefault("step", torch.zeros(()))
            self.state[p].setdefault("square_avg", torch.zeros_like(p))
        return super().step(closure)


def of_package(package, name, params, lr, kwargs):
    if name not in cases.WRAPPER:
        return cases.make(name, params, package=package, lr=lr, **kwargs)
    base = (ReadyRMSprop if package is schedulefree else torch.optim.RMSprop)(params, lr=lr)
    optimizer = getattr(package, name)(base, **kwargs)
    optimizer.train()
    return optimizer


# Upstream runs in float64: in float32 the rounding of its wrappers and closure forms alone can reach 1e-6.
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, {"rtol": 1e-9, "atol": 1e-9}), (torch.float32, cases.PARITY)],
)
@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(data=st.data())
def test_three_hundred_steps_are_upstreams(name, dtype, tolerance, data):
    if dtype == torch.float32 and name in cases.WRAPPER:
        # Each step rounds the decay of z by itself, by up to half a unit in the last place and always the same
        # way, and then what the base optimizer takes.
        tolerance = {"rtol": 5e-5, "atol": 5e-6}
    kwargs = data.draw(st.fixed_dictionaries(STRATEGIES[name]))
    lr = kwargs.pop("lr")
    shapes = [(3, 5), (40,)]
    ours = of_package(schedulefree_cpp, name, cases.parameters(shapes, dtype), lr, kwargs)
    upstreams = of_package(schedulefree, name, cases.parameters(shapes, torch.float64), lr, kwargs)
    for seed in range(300):
        for optimizer in (ours, upstreams):
            optimizer.param_groups[0]["lr"] = lr * (1 + 0.5 * (seed % 3))
            cases.drive(optimizer, seed)
        if seed % 50 == 7 and name not in cases.CLOSURE:
            ours.eval(), upstreams.eval()
            assert_parity(ours, upstreams, tolerance)
            ours.train(), upstreams.train()
    assert_parity(ours, upstreams, tolerance)
    for key in ("k", "weight_sum", "lr_max", "scheduled_lr"):
        if key in upstreams.param_groups[0]:
            assert cases.entry(ours.param_groups[0], key) == pytest.approx(
                upstreams.param_groups[0][key], rel=1e-12
            )


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    lr=st.floats(0.05, 1.5),
    betas=st.tuples(st.floats(0.0, 0.95), st.floats(0.5, 0.999)),
    sf_beta1=st.floats(0.5, 0.95),
    sf_beta1_max=st.floats(0.9, 0.99),
    sf_beta1_anneal_steps=st.sampled_from([0, 5, 200]),
    weight_decay=st.sampled_from([0.0, 5.0]),
    r=st.floats(0, 2),
    weight_lr_power=st.floats(0, 3),
    c_warmup=st.integers(0, 30),
    polyak_beta=st.sampled_from([0.0, 0.5, 0.9]),
    paper=st.booleans(),
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_three_hundred_steps_of_schedulefree_plus_follow_the_oracle(dtype, paper, **kwargs):
    cls = "AdamCScheduleFreePlusPaper" if paper else "AdamCScheduleFreePlus"
    params = cases.parameters([(3, 5), (40,)], dtype)
    ours = cases.make(cls, params, **kwargs)
    oracle = reference.PlusReference.of(params, paper=paper, **kwargs)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else cases.PARITY

    def compare(name):
        for p, it in zip(params, oracle.iterates, strict=True):
            torch.testing.assert_close(p.detach(), getattr(it, name).to(dtype), **tolerance)

    for seed in range(300):
        cases.set_gradients(params, seed)
        loss = 0.3 + 0.2 * math.sin(seed)
        ours.step_func(loss)
        oracle.step([p.grad for p in params], loss)
        if seed % 50 == 7:
            ours.eval()
            compare("x")
            ours.train()
    compare("y")
    group = ours.param_groups[0]
    # Where the loss and the inner product nearly cancel, what y may differ by in every element is left over.
    left_over = sum(p.numel() for p in params) * tolerance["atol"] / oracle.ema
    assert group["scheduled_lr"] == pytest.approx(oracle.lr, rel=1e-5, abs=kwargs["lr"] * left_over)
    assert group["grad_l1_ema"] == pytest.approx(oracle.ema, rel=1e-6)


# ---- checkpoints, both ways ----------------------------------------------------------------------------


def saved(optimizer):
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("direction", ["ours to upstream", "upstream to ours"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_state_dicts_load_both_ways(name, direction, mode):
    packages = [schedulefree_cpp, schedulefree]
    source, target = packages if direction == "ours to upstream" else reversed(packages)
    shapes = [(7, 5), (1025,)] if name in cases.WRAPPER else SHAPES  # upstream's fail without dimensions
    a, b = (of_package(package, name, cases.parameters(shapes), 0.02, {}) for package in (source, target))
    cases.run(a, 20)
    cases.run(b, 20)
    if name not in cases.CLOSURE:
        getattr(a, mode)(), getattr(b, mode)()
    c = of_package(target, name, cases.copies(cases.params_of(a)), 0.02, {})
    if name in cases.WRAPPER and mode == "eval":
        c.eval()  # upstream's wrappers do not save their mode
    state = saved(a)
    if name in cases.WRAPPER and direction == "ours to upstream":  # docs/from-schedulefree.md
        for entries in [*state["state"].values(), *state["param_groups"]]:
            for key in ("x", "y", "z", "k", "weight_sum", "lr_max", "weight_decay_at_y"):
                if f"sf_{key}" in entries:
                    entries[key] = entries.pop(f"sf_{key}")
    c.load_state_dict(state)
    if name not in cases.CLOSURE:
        b.train(), c.train()
    cases.run(b, 20, start=20)
    cases.run(c, 20, start=20)
    assert_parity(c, b)


@pytest.mark.parametrize("direction", ["ours to upstream", "upstream to ours"])
@pytest.mark.parametrize("name", cases.NATIVE + cases.CLOSURE + cases.REFERENCE)
def test_flattened_state_dicts_load_both_ways(name, direction):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    packages = [schedulefree_cpp, schedulefree]
    source, target = packages if direction == "ours to upstream" else reversed(packages)
    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def build(package):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        return model, of_package(package, name, model.parameters(), 0.02, {})

    (model, a), (_, b) = build(source), build(target)
    cases.run(a, 10)
    cases.run(b, 10)
    flat = get_optimizer_state_dict(model, a, options=options)
    other, c = build(target)
    cases.run(c, 1)
    other.load_state_dict(model.state_dict())
    c.zero_grad()
    set_optimizer_state_dict(other, c, copy.deepcopy(flat), options=options)
    assert c.param_groups[0]["k"] == 10
    cases.run(b, 10, start=10)
    cases.run(c, 10, start=10)
    assert_parity(c, b)


@pytest.mark.parametrize("name", cases.FAMILY)
def test_keys_that_came_later_are_filled_in(name):
    optimizer = cases.make(name, cases.parameters(SHAPES))
    cases.run(optimizer, 8)
    old = saved(optimizer)
    old.pop("schedulefree_cpp", None)
    for group in old["param_groups"]:
        for key in (
            "foreach",
            "sf_weight_decay_at_y",
            "sf_r",
            "sf_max_grad_norm",
            "sf_nonfinite",
            "c_warmup",
            "sf_beta1_max",
            "grad_l1_ema_corr",
            "silent_sgd_phase",
        ):
            group.pop(key, None)
    other = cases.make(name, cases.copies(cases.params_of(optimizer)))
    other.load_state_dict(old)
    cases.run(optimizer, 3, start=8)
    cases.run(other, 3, start=8)
    cases.assert_same(cases.params_of(optimizer), cases.params_of(other))


# ---- relatives -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_inner_momentum_is_that_of_the_reference_class(decay):
    kwargs = {"lr": 0.01, "inner_momentum": 0.9, "weight_decay": decay, "warmup_steps": 5}
    a, b = (
        cases.make(name, cases.parameters(SHAPES), **kwargs)
        for name in ("AdamWScheduleFree", "AdamWScheduleFreeReference")
    )
    for seed in range(100):
        cases.drive(a, seed), cases.drive(b, seed)
        if seed % 30 == 9:
            a.eval(), b.eval()
            for p, q in zip(cases.params_of(a), cases.params_of(b), strict=True):
                torch.testing.assert_close(p, q, **cases.PARITY)
            a.train(), b.train()
    for p, q in zip(cases.params_of(a), cases.params_of(b), strict=True):
        torch.testing.assert_close(p, q, **cases.PARITY)
        for key in ("z", "exp_avg_sq", "exp_avg"):
            torch.testing.assert_close(a.state[p][key], b.state[q][key], **cases.PARITY)


@pytest.mark.parametrize("name", cases.CLOSURE)
def test_closure_forms_are_at_x_between_steps(name):
    closure = cases.make(name, cases.parameters(SHAPES), weight_decay=0.1)
    plain = cases.make(name.removesuffix("Closure"), cases.parameters(SHAPES), weight_decay=0.1)
    for seed in range(20):
        cases.drive(closure, seed), cases.drive(plain, seed)
        closure.train()
        with plain.averaged():
            cases.assert_same(cases.params_of(closure), cases.params_of(plain))
        closure.eval()
    assert "train_mode" not in closure.param_groups[0]


@pytest.mark.parametrize("name", cases.CLOSURE)
def test_a_closure_that_raises_leaves_the_parameters_at_x(name):
    optimizer = cases.make(name, cases.parameters(SHAPES))
    cases.run(optimizer, 8)
    before = cases.copies(cases.params_of(optimizer))

    def closure():
        raise ValueError("no batch")

    with pytest.raises(ValueError, match="no batch"):
        optimizer.step(closure)
    cases.assert_same(cases.params_of(optimizer), before)
    assert optimizer.param_groups[0]["k"] == 8
    cases.run(optimizer, 1, start=8)
    with pytest.raises(RuntimeError, match=f"without a closure.*use {name.removesuffix('Closure')}"):
        optimizer.step()


@pytest.mark.parametrize("name", cases.CLOSURE)
def test_a_closure_interrupted_within_a_step_in_backward_says_so_and_goes_on(name):
    params = cases.parameters([(3,), (4,)])
    optimizer = cases.make(name, params)
    optimizer.step_in_backward()

    def closure(fail):
        sum(p.square().sum() for p in params).backward()
        if fail:
            raise KeyError("no loss")
        return 1.0

    with pytest.raises(KeyError, match="no loss"):
        optimizer.step(lambda: closure(True))
    assert optimizer.step(lambda: closure(False)) == 1.0
    assert optimizer.param_groups[0]["k"] == 2
    optimizer.state_dict()


@pytest.mark.parametrize("name", cases.CLOSURE)
def test_a_refused_step_of_a_closure_form_leaves_the_parameters_at_x(name):
    params = cases.parameters([(3,), (4,)])
    optimizer = cases.make(name, [{"params": params[:1]}, {"params": params[1:]}])
    cases.run(optimizer, 8)
    before = cases.copies(params)
    optimizer.param_groups[1].update({"momentum": 0.0, "betas": (0.0, 0.9)})
    for _ in range(3):
        with pytest.raises(
            ValueError, match=r"Invalid (momentum|betas\[0\]) in parameter group 1: 0, expected a value in"
        ):
            cases.drive(optimizer, 8)
        cases.assert_same(params, before)
        assert [group["k"] for group in optimizer.param_groups] == [8, 8]


# ---- ScheduleFree+ -------------------------------------------------------------------------------------


def plus_warnings(lr, max_norm=None, steps=60, **kwargs):
    """The warnings of a run on a small regression, with gradients that may be clipped outside."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = schedulefree_cpp.AdamCScheduleFreePlus(model.parameters(), lr=lr, **kwargs)
    optimizer.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for inputs in torch.randn(steps, 16, 8):
            optimizer.zero_grad()
            loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            loss.backward()
            if max_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step_func(loss)
    return [str(warning.message) for warning in caught]


def test_plus_warns_once_of_gradients_that_were_clipped_outside():
    (text,) = plus_warnings(0.01, max_norm=0.1)
    assert re.match(r"ScheduleFree\+: the gradients had the norm 0\.1 in three steps in a row", text)


def test_plus_warns_once_of_a_learning_rate_with_which_the_first_steps_grow():
    (text,) = plus_warnings(10.0)
    assert re.match(r"ScheduleFree\+: the loss has grown from .* Try a smaller lr than 10, or c_warmup", text)


@pytest.mark.parametrize("lr", [1e-3, 0.1, 1.0])
@pytest.mark.parametrize("max_norm", [None, 1e3])
def test_plus_says_nothing_of_a_run_that_goes_well(lr, max_norm):
    """A bound that no gradient reaches changes none."""
    assert plus_warnings(lr, max_norm) == []


def test_plus_takes_no_linear_loss_for_clipped():
    p = torch.nn.Parameter(torch.ones(4))
    optimizer = schedulefree_cpp.AdamCScheduleFreePlus([p], lr=0.1)
    optimizer.train()
    for _ in range(12):
        p.grad = torch.ones(4)
        optimizer.step_func(p.detach().sum())


@pytest.mark.parametrize("name", cases.PLUS)
def test_plus_wants_the_loss_and_train_mode(name):
    optimizer = cases.make(name, cases.parameters(SHAPES))
    cases.set_gradients(cases.params_of(optimizer), 0)
    with pytest.raises(
        RuntimeError, match=r"step size from the loss: call step\(closure\), or step_func\(loss\)"
    ):
        optimizer.step()
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="Invalid function_value"):
            optimizer.step_func(bad)
    for bad in (torch.ones(2), "low"):
        with pytest.raises(ValueError, match=r"Invalid function_value: .*expected a finite loss"):
            optimizer.step_func(bad)
    with pytest.raises(ValueError, match="Invalid function_value: None, expected a finite loss"):
        optimizer.step(lambda: None)
    cases.params_of(optimizer)[0].grad.fill_(math.nan)
    before = cases.copies(cases.params_of(optimizer))
    with pytest.raises(ValueError, match="Invalid gradients: nan, expected a finite sum"):
        optimizer.step_func(1.0)
    cases.assert_same(cases.params_of(optimizer), before)
    assert optimizer.param_groups[0]["k"] == 0
    optimizer.eval()
    with pytest.raises(RuntimeError, match="parameter group 0 is in eval mode"):
        optimizer.step_func(1.0)
    with pytest.raises(RuntimeError, match="cannot step within backward"):
        optimizer.step_in_backward()


@pytest.mark.parametrize("name", cases.PLUS)
def test_plus_takes_the_loss_from_a_closure_too(name):
    a, b = (cases.make(name, cases.parameters(SHAPES)) for _ in range(2))
    for seed in range(5):
        cases.set_gradients(cases.params_of(a), seed)
        cases.set_gradients(cases.params_of(b), seed)
        assert a.step_func(torch.tensor(0.5)) == 0.5
        assert b.step(lambda: 0.5) == 0.5
    cases.assert_same(cases.params_of(a), cases.params_of(b))


@pytest.mark.parametrize("name", cases.PLUS)
def test_plus_switches_modes_exactly_while_beta_is_annealed(name):
    kwargs = {"sf_beta1_anneal_steps": 20, "c_warmup": 2}
    a, b = (cases.make(name, cases.parameters(SHAPES), **kwargs) for _ in range(2))
    for seed in range(12):
        cases.drive(a, seed), cases.drive(b, seed)
        b.eval()
        b.train()
    cases.assert_same(cases.params_of(a), cases.params_of(b))
    assert "y_beta" not in a.state_dict()["param_groups"][0]
    c = cases.make(name, cases.copies(cases.params_of(a)), **kwargs)
    c.load_state_dict(saved(a))
    cases.run(a, 5, start=12), cases.run(c, 5, start=12)
    cases.assert_same(cases.params_of(a), cases.params_of(c))


@pytest.mark.parametrize("name", cases.PLUS)
def test_plus_sums_over_all_groups(name):
    params = cases.parameters(SHAPES)
    one = cases.make(name, cases.copies(params))
    two = cases.make(name, [{"params": cases.copies(params[:2])}, {"params": cases.copies(params[2:])}])
    cases.run(one, 8), cases.run(two, 8)
    for p, q in zip(cases.params_of(one), cases.params_of(two), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    late = cases.make(name, cases.copies(params))
    late.add_param_group({"params": cases.parameters([(3,)], seed=9), "lr": 0.5, "weight_decay": 1.0})
    cases.run(late, 3)
    assert late.param_groups[1]["scheduled_lr"] == pytest.approx(10 * late.param_groups[0]["scheduled_lr"])


@pytest.mark.parametrize("name", cases.PLUS)
def test_plus_makes_no_collective_call_without_dtensors(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a collective call")

    for call in ("all_reduce", "all_gather", "broadcast", "reduce", "barrier"):
        monkeypatch.setattr(torch.distributed, call, refuse)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    cases.run(cases.make(name, cases.parameters(SHAPES)), 3)


@pytest.mark.parametrize("name", cases.PLUS)
def test_plus_with_no_gradients_at_all_stands_still(name):
    optimizer = cases.make(name, cases.parameters(SHAPES))
    before = cases.copies(cases.params_of(optimizer))
    optimizer.step_func(1.0)
    for p in cases.params_of(optimizer):
        p.grad = torch.zeros_like(p)
    optimizer.step_func(1.0)
    cases.assert_same(cases.params_of(optimizer), before)


def test_the_corrected_mean_is_only_kept_by_the_paper_class():
    a, b = (cases.make(name, cases.parameters(SHAPES), polyak_beta=0.9) for name in cases.PLUS)
    cases.run(a, 3), cases.run(b, 3)
    (mine,), (papers,) = a.param_groups, b.param_groups
    assert papers["grad_l1_ema"] == papers["grad_l1_ema_corr"]
    assert mine["grad_l1_ema"] == pytest.approx(mine["grad_l1_ema_corr"] * (1 - 0.9**3))
    l1 = sum(p.grad.double().abs().sum().item() for p in cases.params_of(a))
    assert mine["grad_l1_ema_corr"] == pytest.approx(l1 * math.sqrt(math.pi / 2), rel=0.2)


# ---- wrappers ------------------------------------------------------------------------------------------

BASES = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "Adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
    "Adam fused": lambda ps: torch.optim.Adam(ps, lr=0.01, fused=True),
    "AdamW capturable": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(0.01)),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05),
    "Adadelta": lambda ps: torch.optim.Adadelta(ps),
    "Adamax": lambda ps: torch.optim.Adamax(ps),
    "ASGD": lambda ps: torch.optim.ASGD(ps),
    "NAdam": lambda ps: torch.optim.NAdam(ps),
    "RAdam": lambda ps: torch.optim.RAdam(ps),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps),
    "Rprop": lambda ps: torch.optim.Rprop(ps),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps),
}


@pytest.mark.parametrize("base", BASES)
def test_both_wrappers_wrap_any_optimizer_alike(base):
    a, b = (
        getattr(schedulefree_cpp, name)(BASES[base](cases.parameters(SHAPES[2:])), weight_decay_at_y=0.1)
        for name in cases.WRAPPER
    )
    a.train(), b.train()
    for seed in range(30):
        cases.drive(a, seed), cases.drive(b, seed)
    for p, q in zip(cases.params_of(a), cases.params_of(b), strict=True):
        torch.testing.assert_close(p, q, **cases.PARITY)
        torch.testing.assert_close(a.state[p]["sf_z"], b.state[q]["sf_z"], **cases.PARITY)
    a.eval(), b.eval()
    for p, q in zip(cases.params_of(a), cases.params_of(b), strict=True):
        torch.testing.assert_close(p, q, **cases.PARITY)


def test_a_parameter_holds_z_while_the_base_steps_and_no_memory_changes_hands():
    params = cases.parameters([(1000,), (30, 30)])
    optimizer = schedulefree_cpp.ScheduleFreeWrapper(torch.optim.SGD(params, lr=0.1))
    optimizer.train()
    cases.run(optimizer, 1)
    places = [(p.data_ptr(), optimizer.state[p]["sf_z"].data_ptr()) for p in params]
    z = [optimizer.state[p]["sf_z"].clone() for p in params]
    seen = []
    handle = optimizer.base.register_step_pre_hook(lambda *_: seen.extend(p.detach().clone() for p in params))
    cases.run(optimizer, 1, start=1)
    handle.remove()
    cases.assert_same(seen, z)
    assert places == [(p.data_ptr(), optimizer.state[p]["sf_z"].data_ptr()) for p in params]


def test_a_failing_base_optimizer_leaves_y():
    params = cases.parameters([(4,)])
    optimizer = schedulefree_cpp.ScheduleFreeWrapper(torch.optim.SGD(params, lr=0.1))
    optimizer.train()
    cases.run(optimizer, 3)
    y, place = params[0].detach().clone(), params[0].data_ptr()

    def fail(*_):
        raise RuntimeError("no step today")

    handle = optimizer.base.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no step today"):
        cases.drive(optimizer, 3)
    handle.remove()
    torch.testing.assert_close(params[0].detach(), y)
    assert params[0].data_ptr() == place
    assert optimizer.param_groups[0]["sf_k"] == 3


@pytest.mark.parametrize("name", cases.WRAPPER)
def test_a_refused_step_of_a_wrapper_is_undone(name):
    params = cases.parameters([(3,), (4,)])
    base = torch.optim.SGD(params, lr=0.1)
    optimizer = getattr(schedulefree_cpp, name)(base, weight_decay_at_y=0.5)
    optimizer.train()
    cases.run(optimizer, 3)
    y, z = params[0].detach().clone(), optimizer.state[params[0]]["sf_z"].clone()

    def assert_undone():
        assert torch.equal(params[0].detach(), y)
        assert torch.equal(optimizer.state[params[0]]["sf_z"], z)

    def fail(*_):
        raise RuntimeError("no step today")

    handle = base.register_step_pre_hook(fail)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no step today"):
            cases.drive(optimizer, 3)
        assert_undone()
    handle.remove()
    good = params[1].data
    params[1].data, params[1].grad = torch.zeros(5), torch.ones(5)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shape"):
            optimizer.step()
        assert_undone()
    params[1].data, params[1].grad = good, None
    cases.run(optimizer, 1, start=3)
    assert optimizer.param_groups[0]["sf_k"] == 4


@pytest.mark.parametrize("name", cases.WRAPPER)
def test_wrappers_refuse_what_they_cannot_wrap(name):
    cls = getattr(schedulefree_cpp, name)
    with pytest.raises(
        TypeError, match=r"Invalid base: expected a torch\.optim\.Optimizer, got <class 'list'>"
    ):
        cls([torch.zeros(1)])
    base = torch.optim.SGD(cases.parameters([(3,)]), lr=0.1)
    with pytest.raises(ValueError, match=r"Invalid momentum: 0, expected a value in \(0, 1\]"):
        cls(base, momentum=0)
    with pytest.raises(ValueError, match="Invalid weight_decay_at_y: -1"):
        cls(base, weight_decay_at_y=-1)
    complex_ = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(
        ValueError, match=r"Invalid params\[0\] in parameter group 0: dtype torch.complex64, expected"
    ):
        cls(torch.optim.SGD([complex_], lr=0.1))
    wrapper = cls(base)
    with pytest.raises(ValueError, match=r"Invalid params\[0\] in parameter group 1"):
        wrapper.add_param_group({"params": [complex_]})
    assert len(wrapper.param_groups) == 1
