"""Random sequences of everything a user may do, for every class and dtype.

Three optimizers do the same: one that is also evaluated, saved, copied and badly used, a twin that only steps,
and the float64 oracle. The first must have the twin's bits, and be as close to the oracle as rounding allows.
"""

# ruff: noqa: D102
from __future__ import annotations

import copy
import io
import math
import os
import pickle
import warnings
from typing import Any, ClassVar

import cases
import pytest
import schedulefree_cpp
import torch
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from reference import FamilyReference, GroupReference, Iterate
from schedulefree_cpp._core import formats

# Random gradients and losses grow as they please.
pytestmark = pytest.mark.filterwarnings("ignore:ScheduleFree:RuntimeWarning")

LONG = os.environ.get("SCHEDULEFREE_LONG_TESTS") == "1"
SHORT_SEQUENCES, LONG_SEQUENCES = 240, 100_000  # of all classes together
SHAPES = [(3, 5), (), (33,)]
SEEDS = st.integers(0, 2**31)
# The oracle knows no orthogonalized steps; test_muon.py has one that does.
NAMES = [name for name in cases.COMPLETE if name != "MuonScheduleFree"]
KINDS = {"SGD": "sgd", "RAdam": "radam", "AdamWScheduleFreePaper": "adamw_paper", "AdamC": "plus"}

# What rounding leaves of one step in the format of y, and of forty in that of the arithmetic.

UNITS = {
    torch.float32: 2.0**-17,
    torch.float64: 2.0**-30,  # the oracle's 1 - beta**t and RAdam's rho - 4 lose digits
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-9,
}


class ClosureError(Exception):
    """Raised by closures."""


def kind_of(name: str) -> str:
    if name in cases.WRAPPER:
        return "sgd"
    return next((kind for start, kind in KINDS.items() if name.startswith(start)), "adamw")


def wide(t: torch.Tensor) -> torch.Tensor:
    """A copy in float64."""
    return t.detach().double().clone()


class Machine(RuleBasedStateMachine):
    """One sequence."""

    name: ClassVar[str]

    @initialize(
        dtype=st.sampled_from(cases.DTYPES),
        seed=SEEDS,
        policy=st.sampled_from(["propagate", "skip", "raise"]),
        capturable=st.booleans(),
        decay_at_z=st.booleans(),
        inner=st.sampled_from([0.0, 0.0, 0.6]),
        warmup=st.sampled_from([0, 3]),
        r=st.sampled_from([0.0, 0.5]),
        averaging=st.sampled_from([{}, {}, {"decoupling_c": 5.0}, {"averaging_weight": 0.2}]),
    )
    def start(self, dtype, seed, policy, capturable, decay_at_z, inner, warmup, r, averaging) -> None:
        torch.manual_seed(seed)
        name, self.dtype, self.policy = self.name, dtype, policy
        self.wrapper = name in cases.WRAPPER
        self.closure = name in cases.CLOSURE
        self.plus = name in cases.PLUS
        kwargs: dict[str, Any] = {"nonfinite": policy, "r": r}
        if self.wrapper:
            kwargs["weight_decay_at_y"] = 0.05
        else:
            kwargs["weight_decay"] = 0.05
            if not self.plus:
                kwargs |= {"decay_at": "z" if decay_at_z else "y", **averaging}
            if name in cases.NATIVE and policy != "raise":
                kwargs["capturable"] = capturable
            if name in ("AdamWScheduleFree", "AdamWScheduleFreeClosure"):
                kwargs["inner_momentum"] = inner
            if "RAdam" not in name and not self.plus:
                kwargs["warmup_steps"] = warmup
            if self.plus:
                kwargs |= {"sf_beta1_anneal_steps": 7, "polyak_beta": 0.5 * bool(inner), "c_warmup": warmup}
        self.kwargs = kwargs
        params = self.parameters(SHAPES)
        self.one = self.make([{"params": params[:2]}, {"params": params[2:]}])
        others = cases.copies(params)
        self.twin = self.make([{"params": others[:2]}, {"params": others[2:]}])
        groups = [self.group_reference(g) for g in self.one.param_groups]
        self.oracle = FamilyReference(kind_of(name), groups, corrected="PlusPaper" in name)
        self.moved = False  # parameters were cast since the state was last moved along

    # ---- helpers ----

    def parameters(self, shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.randn(shape).to(self.dtype)) for shape in shapes]

    def make(self, groups: list[dict[str, Any]]) -> Any:
        if self.wrapper:
            cls = getattr(schedulefree_cpp, self.name)
            optimizer = cls(torch.optim.SGD(groups, lr=0.05), **self.kwargs)
            optimizer.train()
            return optimizer
        return cases.make(self.name, groups, **self.kwargs)

    def group_reference(self, group: dict[str, Any]) -> GroupReference:
        options = {k: v for k, v in group.items() if k not in ("params", "k", "weight_sum", "lr_max")}
        if self.wrapper:
            own = {"momentum": "momentum", "weight_decay_at_y": "weight_decay", "r": "r"}
            options |= {name: group[f"sf_{key}"] for key, name in own.items()}
        start = group["eps"] if self.plus else -1.0
        return GroupReference(options, [Iterate.start(p) for p in group["params"]], lr_max=start)

    @property
    def both(self) -> tuple[Any, Any]:
        return self.one, self.twin

    def trains(self) -> bool:
        return self.closure or bool(cases.entry(self.one.param_groups[0], "train_mode"))

    def pairs(self) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
        return list(zip(cases.params_of(self.one), cases.params_of(self.twin), strict=True))

    def snapshot(self) -> Any:
        tensors = [*cases.params_of(self.one), *cases.states_of(self.one)]
        groups = [sorted((k, str(v)) for k, v in g.items() if k != "params") for g in self.one.param_groups]
        return [t.detach().clone() for t in tensors], groups

    def assert_unchanged(self, before: Any) -> None:
        tensors, groups = self.snapshot()
        assert groups == before[1]
        for t, u in zip(tensors, before[0], strict=True):
            assert torch.equal(t.nan_to_num(7.0), u.nan_to_num(7.0))
            assert torch.equal(t.isnan(), u.isnan())

    def step_of(self, optimizer: Any, loss: float, fail: bool = False) -> None:
        """A step with the gradients that are there."""

        def closure() -> float:
            if fail:
                raise ClosureError
            return loss

        if self.closure or fail:
            optimizer.step(closure)
        elif self.plus:
            optimizer.step_func(loss)
        else:
            optimizer.step()

    def draw_gradients(self, seed: int, scale: float, absent: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for i, (p, q) in enumerate(self.pairs()):
            grad = scale * torch.randn(p.shape, generator=generator)
            rests = absent >> (i % 8) & 1 or not p.requires_grad
            for each in (p, q):
                each.grad = None if rests else grad.to(each.dtype)

    def probes(self) -> bool:
        """Whether a step with these gradients is one that only makes the state, in either mode."""
        grads = [p.grad for p in cases.params_of(self.one) if p.grad is not None]
        rates = [float(group["lr"]) for group in self.one.param_groups]
        return not (self.closure or self.plus or self.one.state or any(rates) or any(g.any() for g in grads))

    def resync(self) -> None:
        """Has the oracle go on from what there is."""
        train = self.trains() and not self.closure
        if self.plus:  # whose rates are made of sums over the parameters, and round as they do
            self.oracle.ema = float(self.one.param_groups[0]["grad_l1_ema"])
        for index, (group, own) in enumerate(zip(self.one.param_groups, self.oracle.groups, strict=True)):
            own.lr_max, own.weight_sum = (float(cases.entry(group, key)) for key in ("lr_max", "weight_sum"))
            beta = self.beta_of_y[index]
            for p, it in zip(group["params"], own.iterates, strict=True):
                state = cases.state(self.one, p)
                if "z" not in state:
                    it.x = it.y = it.z = wide(p)
                    continue
                it.z, here = wide(state["z"]), self.value(p)
                if "x" in state:  # a class that stores all three
                    it.x, it.y = wide(state["x"]), wide(state["y"])
                elif train:
                    it.y, it.x = here, (here - (1 - beta) * it.z) / beta
                else:
                    it.x, it.y = here, beta * here + (1 - beta) * it.z
                for name, attribute in (("exp_avg_sq", "v"), ("exp_avg", "m")):
                    if name in state:
                        setattr(it, attribute, wide(state[name]))

    @property
    def beta_of_y(self) -> list[float]:
        if self.wrapper:
            return [float(g["sf_momentum_of_y"]) for g in self.one.param_groups]
        kept = self.one.state_dict()["schedulefree_cpp"]["y_beta"]
        return [float(beta) for beta in kept]

    def value(self, p: torch.nn.Parameter) -> torch.Tensor:
        """A parameter with its low half."""
        low = cases.state(self.one, p).get("y_lo")
        return wide(p) if low is None else formats.load(p.detach(), low).double()

    # ---- steps ----

    @rule(seed=SEEDS, count=st.integers(2, 4))
    def some_steps(self, seed, count) -> None:
        for number in range(count):
            self.step(seed + number, 1.0, seed >> number, seed)

    @rule(seed=SEEDS, count=st.integers(1, 2), key=st.sampled_from(["lr", "beta", "decay"]))
    def steps_and_a_change(self, seed, count, key) -> None:
        self.switch(True)
        for number in range(count):
            self.step(seed + number, 1.0, 0, seed)
        self.move(key, (0.5, 0.8, 0.95)[seed % 3], seed % 4)

    @rule(
        kind=st.sampled_from(["number", "closure", "operator", "scaler", "domain", "meta"]),
        seed=SEEDS,
        value=st.sampled_from([math.nan, math.inf, -math.inf]),
        bad=st.sampled_from([math.nan, -1.0, math.inf, "x", None]),
        key=st.sampled_from(["lr", "weight_decay"]),
    )
    def misuse(self, kind, seed, value, bad, key) -> None:
        {
            "number": lambda: self.step_with_a_gradient_that_is_not_finite(seed, value),
            "closure": lambda: self.step_with_a_closure_that_raises(seed),
            "operator": lambda: self.step_with_an_operator_that_refuses(seed),
            "scaler": lambda: self.step_with_a_scaler_that_overflows(seed),
            "domain": lambda: self.move_a_hyperparameter_outside_its_domain(bad, key),
            "meta": self.step_without_values,
        }[kind]()

    @rule(seed=SEEDS, scale=st.sampled_from([1.0, 1.0, 0.01, 0.0]), absent=st.integers(0, 255), loss=SEEDS)
    def step(self, seed, scale, absent, loss) -> None:
        self.draw_gradients(seed, scale, absent if seed % 3 == 0 else 0)
        loss = 1.0 + loss % 3
        probe = self.probes()
        if not self.trains() and not probe:
            before = self.snapshot()
            with pytest.raises(RuntimeError, match=r"Call optimizer.train\(\)"):
                self.step_of(self.one, loss)
            self.assert_unchanged(before)
            return
        if self.moved:
            if any(p.grad is not None and "z" in cases.state(self.one, p) for p in cases.params_of(self.one)):
                # An operator refuses: groups before the first such parameter may have taken the step.
                other = copy.deepcopy(self.one)
                for p, q in zip(cases.params_of(self.one), cases.params_of(other), strict=True):
                    q.grad = p.grad
                with pytest.raises(RuntimeError, match=r"optimizer.train\(\) moves the state along"):
                    self.step_of(other, loss)
            return
        grads = [[p.grad for p in g["params"]] for g in self.one.param_groups]
        before = [p.grad.clone() for g in self.one.param_groups for p in g["params"] if p.grad is not None]
        for optimizer in self.both:
            self.step_of(optimizer, loss)
        cases.assert_same([g for of_group in grads for g in of_group if g is not None], before)
        if probe:
            return
        # A parameter without elements that wants gradients counts as having one.
        for of_group, group in zip(grads, self.one.param_groups, strict=True):
            for i, p in enumerate(group["params"]):
                if of_group[i] is None and p.requires_grad and not p.numel():
                    of_group[i] = torch.zeros_like(p)
        self.oracle.step(grads, loss)
        self.check_oracle()
        if self.dtype == torch.float16:
            self.resync()

    def step_with_a_gradient_that_is_not_finite(self, seed, value) -> None:
        if not self.trains() or self.moved:
            return
        self.draw_gradients(seed, 1.0, 0)
        chosen = [(p, q) for p, q in self.pairs() if p.grad is not None]
        if not chosen:
            return
        for each in chosen[seed % len(chosen)]:
            each.grad.view(-1)[0] = value
        before = self.snapshot()
        if self.policy == "skip":
            self.skip()
            return
        elif self.policy == "raise":
            with pytest.raises(RuntimeError, match="is not finite; nothing was changed"):
                self.step_of(self.one, 1.0)
        elif self.plus:
            with pytest.raises(ValueError, match="Invalid gradients"):
                self.step_of(self.one, 1.0)
        else:
            other = copy.deepcopy(self.one)
            for p, q in zip(cases.params_of(self.one), cases.params_of(other), strict=True):
                q.grad = p.grad
            self.step_of(other, 1.0)
            assert not all(p.isfinite().all() for p in cases.params_of(other))
        self.assert_unchanged(before)

    def step_with_a_closure_that_raises(self, seed) -> None:
        if not self.trains() or self.moved:
            return
        self.draw_gradients(seed, 1.0, 0)
        before = self.snapshot()
        with pytest.raises(ClosureError):
            self.step_of(self.one, 1.0, fail=True)
        self.assert_unchanged(before)

    def step_with_an_operator_that_refuses(self, seed) -> None:
        p = cases.params_of(self.one)[0]
        if not self.trains() or self.moved or not p.requires_grad:
            return
        self.draw_gradients(seed, 1.0, 0)
        before = self.snapshot()
        if self.wrapper:
            p.grad, step = torch.ones_like(p), self.one.base.step
            self.one.base.step = lambda *_: (_ for _ in ()).throw(ClosureError())
            with pytest.raises(ClosureError):
                self.step_of(self.one, 1.0)
            self.one.base.step = step
        else:
            data = p.data
            p.data = data[:1].expand(3, 5)
            with pytest.raises(RuntimeError, match=r"memory of its own|overlap"):
                self.step_of(self.one, 1.0)
            p.data = data
        self.assert_unchanged(before)

    def step_with_a_scaler_that_overflows(self, seed) -> None:
        if not self.trains() or self.moved or self.plus or self.closure or self.dtype == torch.float16:
            return
        self.draw_gradients(seed, 1.0, 0)
        for pair in self.pairs():
            for p in pair:
                if p.grad is not None:
                    p.grad.view(-1)[0] = math.inf
        if any(p.grad is not None for p in cases.params_of(self.one)):
            self.skip(torch.amp.GradScaler("cpu", init_scale=2.0))

    def skip(self, scaler: Any = None) -> None:
        """A step that is skipped, with gradients that are not finite."""
        before = self.snapshot()
        capturable = self.one.param_groups[0].get("capturable", False)
        # The host, which does not know, makes states and has y follow a beta that has moved.
        betas = [self.oracle.beta(group) for group in self.oracle.groups]
        prepares = capturable and (
            self.beta_of_y != betas
            or any(p.grad is not None and p not in self.one.state for p in cases.params_of(self.one))
        )
        for group, beta in zip(self.oracle.groups, betas, strict=True):
            for it in group.iterates if capturable else ():
                it.y = beta * it.x + (1 - beta) * it.z
        for optimizer in self.both if capturable else (self.one,):
            if scaler is None:
                self.step_of(optimizer, 1.0)
            else:
                scaler.scale(torch.zeros(()))
                scaler.step(optimizer)
                scaler.update()
        if not prepares:
            self.assert_unchanged(before)
        elif self.dtype == torch.float16:
            self.resync()

    # ---- what must change nothing ----

    @rule(mode=st.booleans())
    def switch(self, mode) -> None:
        self.one.train(mode)
        if self.moved:
            self.follow()

    @rule()
    def look_at_the_average(self) -> None:
        if self.moved:
            return
        before = self.snapshot()
        model = torch.nn.ParameterList(cases.params_of(self.one))
        with self.one.averaged():
            inside = cases.copies(cases.params_of(self.one))
            self.check_oracle(average=True)
        cases.assert_same_or_nan(self.one.averaged_state_dict(model).values(), inside)
        self.assert_unchanged(before)

    @rule(
        how=st.sampled_from(["deepcopy", "pickle", "load", "load itself"]),
        mode=st.sampled_from([None, True, False]),
    )
    def copy_it(self, how, mode) -> None:
        if self.moved:
            return
        if mode is not None:
            self.one.train(mode)
        old, frozen = self.one, [p.requires_grad for p in cases.params_of(self.one)]
        if how == "deepcopy":
            self.one = copy.deepcopy(old)
        elif how == "pickle":
            self.one = pickle.loads(pickle.dumps(old))
        else:
            file = io.BytesIO()
            torch.save(old.state_dict(), file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
            if how == "load":
                params = iter(cases.copies(cases.params_of(old)))
                groups = [{"params": [next(params) for _ in g["params"]]} for g in old.param_groups]
                self.one = self.make(groups)
            self.one.load_state_dict(saved)
        for p, needed in zip(cases.params_of(self.one), frozen, strict=True):
            p.requires_grad_(needed)

    def move_a_hyperparameter_outside_its_domain(self, bad, key) -> None:
        if not self.trains() or self.moved:
            return
        key = "sf_weight_decay_at_y" if self.wrapper and key != "lr" else key
        group = self.one.param_groups[-1]
        old, group[key] = group[key], bad
        before = self.snapshot()
        self.draw_gradients(0, 1.0, 0)
        with pytest.raises((ValueError, TypeError), match=f"Invalid {key} in parameter group"):
            self.step_of(self.one, 1.0)
        self.assert_unchanged(before)
        group[key] = old

    def step_without_values(self) -> None:
        if not self.trains() or self.moved or self.wrapper or self.plus:
            return
        params = [torch.nn.Parameter(p.detach().to("meta")) for p in cases.params_of(self.one)]
        rest = iter(params)
        other = self.make([{"params": [next(rest) for _ in g["params"]]} for g in self.one.param_groups])
        other.load_state_dict(self.one.state_dict())
        for p in params:
            p.grad = torch.ones_like(p)
        self.step_of(other, 1.0)
        other.eval(), other.train()
        assert all(t.is_meta for p in params for t in other.state[p].values())

    # ---- what changes something ----

    @rule(
        key=st.sampled_from(["lr", "beta", "decay"]),
        value=st.sampled_from([0.0, 0.3, 0.7, 0.9, 1.0]),
        index=st.integers(0, 3),
    )
    def move(self, key, value, index) -> None:
        index %= len(self.one.param_groups)
        own = self.oracle.groups[index].options
        if key == "beta" and (self.plus or value < 0.3):
            return
        for group in (self.one.param_groups[index], self.twin.param_groups[index]):
            if key == "lr":
                group["lr"] = own["lr"] = 0.1 * value
            elif key == "decay":
                group["sf_weight_decay_at_y" if self.wrapper else "weight_decay"] = value
                own["weight_decay"] = value
            elif self.wrapper:
                group["sf_momentum"] = own["momentum"] = value
            elif "momentum" in group:
                group["momentum"] = own["momentum"] = value
            else:
                group["betas"] = own["betas"] = (value, group["betas"][1])

    @rule()
    def step_a_scheduler(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a scheduler that comes before the first step
            for optimizer in self.both:
                scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.8)
                scheduler.step()
        for group, own in zip(self.one.param_groups, self.oracle.groups, strict=True):
            own.options["lr"] = group["lr"]

    @rule(value=st.sampled_from([None, 0.5, 5.0, math.inf]), index=st.integers(0, 3))
    def set_max_grad_norm(self, value, index) -> None:
        if self.plus or self.wrapper:
            return
        index %= len(self.one.param_groups)
        for options in (
            self.one.param_groups[index],
            self.twin.param_groups[index],
            self.oracle.groups[index].options,
        ):
            options["max_grad_norm"] = value

    @precondition(lambda self: len(self.one.param_groups) < 4 and not self.moved)
    @rule(seed=SEEDS)
    def add_a_group(self, seed) -> None:
        torch.manual_seed(seed)
        params = self.parameters([(4,), (2, 3)])
        self.one.add_param_group({"params": params})
        self.twin.add_param_group({"params": cases.copies(params)})
        self.oracle.groups.append(self.group_reference(self.one.param_groups[-1]))

    @rule(i=st.integers(0, 9), grad=st.booleans())
    def freeze_or_unfreeze(self, i, grad) -> None:
        pairs = self.pairs()
        for p in pairs[i % len(pairs)]:
            p.requires_grad_(grad)
            p.grad = None

    @rule(i=st.integers(0, 9), seed=SEEDS, replace=st.booleans())
    def change_a_parameter(self, i, seed, replace) -> None:
        if self.moved or not self.trains() or self.closure:
            return
        self.beta_of_y  # noqa: B018 (the samples of a loaded state are those before)
        pairs = self.pairs()
        p, q = pairs[i % len(pairs)]
        new = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)
        for each in (p, q):
            if replace:
                each.data = new.clone()
            else:
                each.data.copy_(new)
        self.settle()

    @rule(dtype=st.sampled_from(cases.DTYPES))
    def cast_the_model(self, dtype) -> None:
        stores = self.name == "ScheduleFreeWrapperReference"  # a y that is not cast with its parameter
        if self.moved or not self.trains() or self.closure or stores or dtype == self.dtype:
            return
        for p, q in self.pairs():
            for each in (p, q):
                each.data, each.grad = each.data.to(dtype), None
        apart = dtype.itemsize != self.dtype.itemsize  # whose state is of another kind
        self.dtype = dtype
        self.moved = apart and any("z" in cases.state(self.one, p) for p in cases.params_of(self.one))
        if not self.moved:
            self.settle()

    def follow(self) -> None:
        """After train() or eval() of the first, which was in train mode when it was cast."""
        self.moved = False
        self.settle()

    def settle(self) -> None:
        """After a y that no step has made, which the way to x and back may move by an ulp, once."""
        for optimizer in self.both:
            optimizer.train()
            for _ in range(3):
                optimizer.eval(), optimizer.train()
        self.resync()

    # ---- what always holds ----

    @invariant()
    def has_the_bits_of_the_twin(self) -> None:
        if not hasattr(self, "one") or self.moved or not self.trains():
            return
        cases.assert_same_or_nan(cases.params_of(self.one), cases.params_of(self.twin))
        cases.assert_same_or_nan(cases.states_of(self.one), cases.states_of(self.twin))
        for group, other in zip(self.one.param_groups, self.twin.param_groups, strict=True):
            for key in ("k", "weight_sum", "lr_max"):
                assert cases.entry(group, key) == cases.entry(other, key)

    def check_oracle(self, average: bool = False) -> None:
        unit = UNITS[self.dtype]
        unit *= 1 / min(map(float, self.beta_of_y)) if average else 1  # by which x is further from z than y
        for group, own in zip(self.one.param_groups, self.oracle.groups, strict=True):
            assert int(cases.entry(group, "k")) == own.k
            torch.testing.assert_close(
                float(cases.entry(group, "weight_sum")), own.weight_sum, rtol=1e-5, atol=1e-12
            )
            for p, it in zip(group["params"], own.iterates, strict=True):
                here = it.x if self.closure or average else it.y
                size = max([1.0, *(float(t.abs().max()) for t in (it.x, it.z) if t.numel())])
                assume(self.dtype != torch.float16 or size < 65000)  # the sequence ends where float16 does
                torch.testing.assert_close(p.detach().double(), here, rtol=0, atol=unit * size)


def test_the_oracle_of_the_family_is_that_of_the_optimizers():
    """FamilyReference and Reference are written apart."""
    from reference import Reference

    for h in (*cases.ADAMW, *cases.SGD):
        params = cases.parameters(SHAPES, torch.float64)
        one, options = Reference.of(params, h), cases.arguments(h)
        group = GroupReference(options, [Iterate.start(p) for p in params])
        other = FamilyReference("adamw" if h.adam else "sgd", [group])
        for seed in range(30):
            cases.set_gradients(params, seed)
            grads = [p.grad for p in params]
            one.step(grads), other.step([grads])
        for a, b in zip(one.iterates, group.iterates, strict=True):
            for name in ("x", "y", "z", "v"):
                torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "sequences",
    [
        pytest.param(SHORT_SEQUENCES, id="short"),
        pytest.param(LONG_SEQUENCES, id="long", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_a_random_sequence_has_the_bits_of_a_plain_run(name, sequences):
    count = int(os.environ.get("SCHEDULEFREE_SEQUENCES", sequences))
    machine = type(name, (Machine,), {"name": name})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=-(-count // len(NAMES)),
            stateful_step_count=25,
            deadline=None,
            derandomize=count == SHORT_SEQUENCES,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )
