"""What only the wrappers do: a momentum in the groups, closures for the base optimizer, the closure form."""

from __future__ import annotations

import copy

import pytest
import torch
from schedulefree_cpp import ScheduleFreeWrapper, ScheduleFreeWrapperClosure, ScheduleFreeWrapperReference
from torch.optim.optimizer import register_optimizer_step_post_hook

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
    z = optimizer.state[params[1]]["sf_z"]
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
    ("key", "value"),
    [
        ("sf_momentum", 1.5),
        ("sf_momentum", "0.9"),
        ("sf_weight_decay_at_y", -1),
        ("sf_r", None),
        ("sf_weight_lr_power", float("inf")),
        ("sf_max_grad_norm", 0),
        ("sf_nonfinite", "ignore"),
        ("lr", -0.1),
    ],
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
        assert torch.equal(state["sf_z"], before[1][key]["sf_z"])
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


# ---- base optimizers that have entries of the wrapper's names -------------------------------------------


class DualAveraging(torch.optim.Optimizer):
    """Follow-the-regularized-leader: the sum of gradients, in state["z"], makes the parameter."""

    def __init__(self, params, lr=0.1):  # noqa: D107
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):  # noqa: D102
        loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["z"] = p / -group["lr"]
                state["z"] += p.grad
                p.copy_(-group["lr"] * state["z"])
        return loss


class EveryName(DualAveraging):
    """Has the names that schedule-free optimizers have, some from the start and some from its third step on."""

    def __init__(self, params, lr=0.1):  # noqa: D107
        super().__init__(params, lr)
        for group in self.param_groups:
            group |= {"k": 0, "train_mode": 3, "lr_max": 0.5}
        self.state["steps"] = 0  # not of a parameter

    @torch.no_grad()
    def step(self, closure=None):  # noqa: D102
        self.state["steps"] += 1
        for group in self.param_groups:
            group["k"] += 2
            if group["k"] > 4:
                group["weight_sum"] = group.get("weight_sum", 0.0) + group["lr_max"]
                group["lr_max"] *= 0.9
            assert group["train_mode"] == 3
            assert not any(key.startswith("sf_") for p in group["params"] for key in self.state[p])
            for p in group["params"]:
                if group["k"] > 4:
                    state = self.state[p]
                    state["x"] = state.get("x", 0.0) + p
                    state["y"] = state.get("y", 0.0) + group.get("weight_sum", 0.0)
                    p.grad += 0.01 * state["x"] + 0.1 * state["y"]
        return super().step(closure)


BASES = {"z": DualAveraging, "every name": EveryName}


def stepped(optimizer, params, start, stop, read):
    seen = []
    for step in range(start, stop):
        set_gradients(params, step)
        optimizer.step()
        seen += [t.detach().clone() for t in read()]
    return seen


def zs(optimizer, params):
    return lambda: [optimizer.state[p]["sf_z"] for p in params]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("cls", MODES)
def test_z_is_what_the_base_alone_makes(cls, base):
    params, alone, copies = parameters(), parameters(), parameters()
    expected = stepped(BASES[base](alone), alone, 0, 12, lambda: alone)
    optimizer = cls(BASES[base](params))
    optimizer.train()
    assert all(map(torch.equal, stepped(optimizer, params, 0, 6, zs(optimizer, params)), expected))
    # Through a checkpoint, copies, and both modes.
    resumed = cls(BASES[base](copies))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for p, q in zip(copies, params, strict=True):
            p.copy_(q)
    twin, twins = copy.deepcopy((optimizer, params))
    for each, own in ((optimizer, params), (resumed, copies), (twin, twins)):
        each.eval()
        each.train()
        assert all(map(torch.equal, stepped(each, own, 6, 12, zs(each, own)), expected[12:]))
        assert each.param_groups[0]["sf_k"] == 12
        assert each.train_mode is True
        if base == "every name":
            assert each.param_groups[0]["k"] == 24
            assert each.base.param_groups[0]["train_mode"] == 3
    assert torch.allclose(averages(optimizer, params)[0], sum(expected[::2]) / 12)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("way", ["wrapped", "loaded"])
def test_the_average_starts_where_the_base_alone_has_come_to(way, base):
    params, alone = parameters(), parameters()
    optimizer = BASES[base](alone)
    stepped(optimizer, alone, 0, 2, list)
    if way == "wrapped":
        params, wrapped = copy.deepcopy((alone, optimizer))
        wrapped = ScheduleFreeWrapper(wrapped)
    else:
        wrapped = ScheduleFreeWrapper(BASES[base](params))
        wrapped.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        with torch.no_grad():
            for p, q in zip(params, alone, strict=True):
                p.copy_(q)
    wrapped.train()
    expected = stepped(optimizer, alone, 2, 7, lambda: alone)
    assert all(map(torch.equal, stepped(wrapped, params, 2, 7, zs(wrapped, params)), expected))
    assert wrapped.param_groups[0]["sf_k"] == 5


def former(saved, names=("k", "train_mode", "weight_sum", "lr_max", "weight_decay_at_y", "x", "y", "z")):
    """A state dict as earlier builds wrote it: the entries of a base that have these names were set apart."""
    saved = copy.deepcopy(saved)
    for entries in [*saved["param_groups"], *saved["state"].values()]:
        if isinstance(entries, dict):
            for name in [name for name in names if name in entries]:
                entries["base:" + name] = entries.pop(name)
            for name in [name for name in names if "sf_" + name in entries]:
                entries[name] = entries.pop("sf_" + name)
            for name in ("r", "weight_lr_power", "max_grad_norm", "nonfinite", "scheduled_lr"):
                entries.pop("sf_" + name, None)
    return saved


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("cls", MODES)
def test_a_dict_of_an_earlier_build_loads(cls, base):
    params, others = parameters(), parameters()
    optimizer = cls(BASES[base](params), weight_decay_at_y=0.1)
    optimizer.train()
    stepped(optimizer, params, 0, 4, list)
    saved = former(optimizer.state_dict())
    assert saved["param_groups"][0]["k"] == 4
    other = cls(BASES[base](others))
    other.load_state_dict(saved)
    with torch.no_grad():
        for p, q in zip(others, params, strict=True):
            p.copy_(q)
    assert all(
        map(
            torch.equal,
            stepped(optimizer, params, 4, 8, lambda: params),
            stepped(other, others, 4, 8, lambda: others),
        )
    )
    strings = [
        sorted((k, str(v)) for k, v in o.param_groups[0].items() if k != "params") for o in (optimizer, other)
    ]
    assert strings[0] == strings[1]


def test_a_dict_in_which_one_entry_was_both_loads():
    params, others = parameters(), parameters()
    optimizer = ScheduleFreeWrapper(EveryName(params))
    optimizer.train()
    stepped(optimizer, params, 0, 2, list)
    saved = former(optimizer.state_dict())
    for group in saved["param_groups"]:
        for name in [name for name in group if name.startswith("base:")]:
            del group[name]
    saved["param_groups"][0]["train_mode"] = 3
    other = ScheduleFreeWrapper(EveryName(others))
    other.load_state_dict(saved)
    assert other.train_mode
    stepped(other, others, 2, 3, list)
    assert (other.param_groups[0]["sf_k"], other.param_groups[0]["k"]) == (3, 4)


def test_groups_that_are_added_keep_the_names_of_the_base_apart():
    params = parameters(3)
    optimizer = ScheduleFreeWrapper(EveryName(params[:1]))
    optimizer.train()
    entries = {"k": 1, "train_mode": 3, "lr_max": 0.1}
    optimizer.add_param_group({"params": params[1:2], **entries})
    optimizer.add_param_group({**optimizer.param_groups[1], "params": params[2:]})
    stepped(optimizer, params, 0, 1, list)
    assert [group["sf_k"] for group in optimizer.param_groups] == [1, 1, 1]
    assert [group["k"] for group in optimizer.param_groups] == [2, 3, 3]
    assert [group["sf_train_mode"] for group in optimizer.param_groups] == [True] * 3


@pytest.mark.parametrize("cls", MODES)
def test_a_base_that_raises_or_calls_a_closure_leaves_every_entry_where_it_was(cls):
    params = parameters()

    class Raises(EveryName):
        def step(self, closure=None):
            closure()
            closure()
            raise KeyError("stop")

    optimizer = cls(EveryName(params))
    optimizer.train()
    stepped(optimizer, params, 0, 4, list)
    before, values = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(params)
    seen = []

    def closure():
        seen.append([sorted(group) for group in optimizer.param_groups])
        return 1.0

    optimizer.base.__class__ = Raises
    with pytest.raises(KeyError, match="stop"):
        optimizer.step(closure)
    assert seen == [[sorted(group) for group in optimizer.param_groups]] * 2
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        if isinstance(state, dict):
            assert state.keys() == after["state"][key].keys()
            same = (
                torch.as_tensor(v).equal(torch.as_tensor(after["state"][key][n])) for n, v in state.items()
            )
            assert all(same)
    torch.testing.assert_close(params, values)


class Sharpness(torch.optim.Optimizer):
    """Climbs along the gradients that are there, looks again, and steps from where it was (SAM)."""

    @torch.no_grad()
    def step(self, closure):  # noqa: D102
        (p,) = self.param_groups[0]["params"]
        climbed = 0.1 * p.grad
        p.add_(climbed)
        with torch.enable_grad():
            loss = closure()
        p.sub_(climbed).sub_(p.grad, alpha=0.1)
        return loss


@pytest.mark.parametrize("cls", MODES)
def test_a_base_that_moves_before_it_looks_gets_gradients_of_where_it_is(cls):
    (p,), (q,) = parameters(1), parameters(1)
    optimizer = cls(Sharpness([p], {"lr": 0.1}), momentum=1e-9)
    alone = Sharpness([q], {"lr": 0.1})
    optimizer.train()
    for _ in range(4):
        calls = []

        def look(p, calls=calls):
            calls.append(p)
            p.grad = p.detach() ** 3
            return 1.0

        optimizer.step(lambda look=look: look(p))
        look(q)
        alone.step(lambda look=look: look(q))
        assert len(calls) == 4
        torch.testing.assert_close(optimizer.state[p]["sf_z"], q.detach())


TORCH = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}
FORMS = [
    *((name, {}) for name in TORCH),
    *((name, {"foreach": True}) for name in TORCH if name not in ("LBFGS", "Muon", "SparseAdam")),
    *((name, {"fused": True}) for name in ("SGD", "Adam", "AdamW", "Adagrad")),
    ("LBFGS", {"max_iter": 2}),
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True}),
]


def trajectory(name, options, dtype, wrapped, **settings):
    """The z of a wrapper, or the parameters of the base alone, with gradients that any of the dtypes can hold."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(6, 8).bfloat16().to(dtype)) for _ in range(2)]
    optimizer = TORCH[name](params, **options)
    if wrapped:
        optimizer = ScheduleFreeWrapper(optimizer, **settings)
        optimizer.train()
    seen, generator = [], torch.Generator().manual_seed(1)

    def closure():
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(dtype)
            if name == "SparseAdam":
                p.grad = p.grad.to_sparse()
        return torch.tensor(1.0)

    for step in range(10):
        optimizer.step(closure)
        seen += [(optimizer.state[p]["sf_z"] if wrapped else p).detach().clone() for p in params]
        if step == 4 and wrapped:  # through a checkpoint, and both modes
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = ScheduleFreeWrapper(TORCH[name](params, **options), **settings)
            optimizer.load_state_dict(saved)
            optimizer.eval(), optimizer.train()
    return seen


@pytest.mark.parametrize(("name", "options"), FORMS)
def test_z_is_what_each_optimizer_of_torch_alone_makes(name, options):
    results = [trajectory(name, options, torch.float32, wrapped) for wrapped in (True, False)]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "options"), [form for form in FORMS if "LBFGS" not in form])
def test_z_of_a_parameter_of_16_bits_is_what_the_base_makes_of_one_of_float32(name, options, dtype):
    results = [trajectory(name, options, *how) for how in ((dtype, True), (torch.float32, False))]
    assert all(map(torch.equal, *results))


# ---- parameters of 16 bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", MODES)
def test_small_updates_are_not_lost_in_16_bits(cls, dtype):
    results = []
    for of in (torch.float32, dtype):
        p = torch.nn.Parameter(torch.full((4,), 1.0).to(of))
        optimizer = cls(torch.optim.SGD([p], lr=1e-5))
        optimizer.train()
        for _ in range(200):
            p.grad = torch.ones_like(p)
            optimizer.step()
        (average,) = optimizer.averaged_state_dict(torch.nn.ParameterList([p]), dtype=torch.float32).values()
        results.append((average, optimizer.state[p]["sf_z"]))
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=0)
    tolerance = 1e-7 if cls is ScheduleFreeWrapper else torch.finfo(dtype).eps
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", MODES)
def test_the_parameter_of_16_bits_stays_the_models_own(cls, dtype):
    """Its gradient, its hooks, and the node that waits for its gradient, on which DistributedDataParallel hooks."""
    (p,) = parameters(1, dtype)
    optimizer = cls(torch.optim.Adam([p], lr=0.1), weight_decay_at_y=0.1)
    optimizer.train()
    calls = []
    node = p.expand_as(p).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: calls.append("node"))
    p.register_post_accumulate_grad_hook(lambda _: calls.append("parameter"))
    for _ in range(3):
        p.float().square().sum().backward()
        grad = p.grad
        before = grad.clone()
        optimizer.step()
        assert p.grad is grad
        assert torch.equal(grad, before)
        assert (p.dtype, p.grad.dtype) == (dtype, dtype)
        assert optimizer.param_groups[0]["params"] == [p]
        assert list(optimizer.state) == [p]
        p.grad = None
    assert calls == ["parameter", "node"] * 3
    assert {t.dtype for t in optimizer.state[p].values()} <= {torch.float32, torch.int16}


def test_a_graph_that_was_built_before_a_step_in_16_bits_is_noticed():
    (p,) = parameters(1, torch.bfloat16)
    optimizer = ScheduleFreeWrapper(torch.optim.SGD([p], lr=0.1))
    optimizer.train()
    loss = (p * p).sum()
    set_gradients([p], 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_state_of_a_base_that_has_stepped_in_16_bits_becomes_float32():
    params = parameters(2, torch.bfloat16)
    base = torch.optim.Adam(params, lr=0.1)
    stepped(base, params, 0, 2, list)
    saved = copy.deepcopy(base.state_dict())
    loaded = ScheduleFreeWrapper(torch.optim.Adam(parameters(2, torch.bfloat16), lr=0.1))
    loaded.load_state_dict(saved)
    wrapped = ScheduleFreeWrapper(base)
    for optimizer in (loaded, wrapped):
        own = optimizer.param_groups[0]["params"]
        assert all(optimizer.state[p]["exp_avg"].dtype == torch.float32 for p in own)
        optimizer.train()
        stepped(optimizer, own, 2, 4, list)


@pytest.mark.parametrize("cls", MODES)
def test_formats_may_mix_within_a_group(cls):
    """Each parameter then goes as it goes alone."""

    def run(dtypes):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 5).to(dtype)) for dtype in dtypes]
        optimizer = cls(torch.optim.RMSprop(params, lr=0.1), weight_decay_at_y=0.1)
        optimizer.train()
        for seed in range(4):
            for p in params:
                set_gradients([p], seed)
            optimizer.step()
            optimizer.eval(), optimizer.train()
        return params

    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    alone = [p for dtype in dtypes for p in run([dtype])]
    assert all(map(torch.equal, run(dtypes), alone))


# ---- a base that raises ---------------------------------------------------------------------------------


class Half(torch.optim.SGD):
    """Moves z, and raises."""

    @torch.no_grad()
    def step(self, closure=None):  # noqa: D102
        super().step()
        if self.param_groups[0].pop("raises", False):
            raise KeyError("stop")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", MODES)
def test_with_decay_at_y_a_base_that_raises_leaves_every_bit(cls, dtype):
    params = parameters(2, dtype)
    optimizer = cls(Half([{"params": [p]} for p in params], lr=0.1), weight_decay_at_y=0.3)
    optimizer.train()
    stepped(optimizer, params, 0, 3, list)
    before, saved = copy.deepcopy(params), copy.deepcopy(optimizer.state_dict())
    optimizer.param_groups[0]["raises"] = True
    with pytest.raises(KeyError):
        stepped(optimizer, params, 3, 4, list)
    assert all(map(torch.equal, params, before))
    after = optimizer.state_dict()
    assert after["param_groups"] == saved["param_groups"]
    for key, state in saved["state"].items():
        assert state.keys() == after["state"][key].keys()
        assert all(torch.equal(t, after["state"][key][name]) for name, t in state.items())
    stepped(optimizer, params, 3, 4, list)
    assert [group["sf_k"] for group in optimizer.param_groups] == [4, 4]


class Replaces(torch.optim.SGD):
    """Gives every parameter another memory, and raises where its group says so."""

    @torch.no_grad()
    def step(self, closure=None):  # noqa: D102
        for p in self.param_groups[0]["params"]:
            p.data = p - 0.1 * p.grad
        if self.param_groups[0].pop("raises", False):
            raise KeyError("stop")


@pytest.mark.parametrize("decay", [0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", MODES)
def test_a_base_that_replaces_memory_and_raises_leaves_the_average(cls, dtype, decay):
    params = parameters(2, dtype)
    optimizer = cls(Replaces(params, lr=0.1), weight_decay_at_y=decay)
    optimizer.train()
    stepped(optimizer, params, 0, 3, list)
    x, y = averages(optimizer, params), copy.deepcopy(params)
    z = [optimizer.state[p]["sf_z"].clone() for p in params]
    optimizer.param_groups[0]["raises"] = True
    with pytest.raises(KeyError):
        stepped(optimizer, params, 3, 4, list)
    torch.testing.assert_close(averages(optimizer, params), x)
    after = [optimizer.state[p]["sf_z"] for p in params]
    assert all(map(torch.equal, after, z)) == (decay > 0)
    assert all(map(torch.equal, params, y)) == (decay > 0)


# ---- closures that do more than look ----------------------------------------------------------------------


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("cls", MODES)
def test_a_closure_that_leaves_eval_mode_is_refused(cls, call):
    (p,) = parameters(1)
    optimizer = cls(Twice([p], {"lr": 0.1}))
    optimizer.train()
    calls = []

    def closure():
        calls.append(None)
        p.grad = p.detach().clone()
        if len(calls) == 4 + call:
            optimizer.eval()

    optimizer.step(closure), optimizer.step(closure)
    x = averages(optimizer, [p])
    with pytest.raises(RuntimeError, match="parameter group 0 is in eval mode"):
        optimizer.step(closure)
    torch.testing.assert_close(averages(optimizer, [p]), x)
    assert optimizer.param_groups[0]["sf_k"] == 2


def test_a_group_that_a_later_call_of_a_closure_adds_takes_the_next_step():
    p, q = parameters(2)
    optimizer = ScheduleFreeWrapper(Twice([p], {"lr": 0.1}))
    optimizer.train()
    calls = []

    def closure():
        calls.append(None)
        if len(calls) == 2:
            optimizer.add_param_group({"params": [q]})
        set_gradients([p, q], len(calls))

    optimizer.step(closure)
    assert [group["sf_k"] for group in optimizer.param_groups] == [1, 0]
    optimizer.step(closure)
    assert [group["sf_k"] for group in optimizer.param_groups] == [2, 1]


@pytest.mark.parametrize("cls", MODES)
def test_a_group_that_was_added_to_the_base_itself_is_like_the_first(cls):
    p, q = parameters(2)
    optimizer = cls(torch.optim.SGD([p], lr=0.1), momentum=0.8)
    optimizer.train()
    optimizer.base.add_param_group({"params": [q]})
    stepped(optimizer, [p, q], 0, 3, list)
    optimizer.eval(), optimizer.train()
    assert [group["sf_k"] for group in optimizer.param_groups] == [3, 3]
    assert optimizer.param_groups[1]["sf_momentum"] == 0.8


# ---- what a state dict may hold ---------------------------------------------------------------------------


class History(torch.optim.Optimizer):
    """Has its state in a list."""

    @torch.no_grad()
    def step(self, closure=None):  # noqa: D102
        for p in self.param_groups[0]["params"]:
            (total,) = self.state[p].setdefault("history", [torch.zeros_like(p)])
            p.sub_(total.add_(p.grad), alpha=0.1)


def test_a_state_in_a_list_is_copied_when_it_is_loaded():
    params, others = parameters(), parameters()
    optimizer, other = (ScheduleFreeWrapper(History(each, {"lr": 0.1})) for each in (params, others))
    optimizer.train()
    stepped(optimizer, params, 0, 2, list)
    saved = optimizer.state_dict()
    before = saved["state"][0]["history"][0].clone()
    other.load_state_dict(saved)
    other.param_groups[0]["sf_train_mode"] = True
    stepped(other, others, 2, 3, list)
    assert torch.equal(saved["state"][0]["history"][0], before)


@pytest.mark.parametrize(("key", "value"), [("sf_k", "x"), ("sf_weight_sum", -1), ("sf_momentum_of_y", 0)])
def test_a_schedule_that_no_steps_lead_to_is_refused_in_a_group_that_is_added(key, value):
    p, q = parameters()
    optimizer = ScheduleFreeWrapper(torch.optim.SGD([p], lr=0.1))
    with pytest.raises(ValueError, match=f"Invalid (sf_)?{key[3:]} in parameter group 1: "):
        optimizer.add_param_group({"params": [q], key: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("betas", [None, (0.9, None), (torch.tensor(0.9), torch.tensor(0.99))])
def test_betas_of_a_base_are_saved_as_they_are(betas):
    optimizer = ScheduleFreeWrapper(DualAveraging(parameters()))
    optimizer.param_groups[0]["betas"] = betas
    assert optimizer.state_dict()["param_groups"][0]["betas"] is betas


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: d["param_groups"][0].update(sf_momentum_of_y=2),
            "Invalid sf_momentum_of_y in parameter gr",
        ),
        (
            lambda d: d["param_groups"][0].update(sf_momentum_of_y=None),
            "Invalid sf_momentum_of_y in paramete",
        ),
        (lambda d: d.update(schedulefree_cpp=None), "schedulefree_cpp is None, expected a dict"),
        (lambda d: d["state"].update({1: None}), "expected state, a dict of dicts"),
        (lambda d: d["state"][1].update(step="x"), "could not convert string to float"),  # of the base
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_that_is_refused_has_changed_nothing(dtype, damage, message):
    params = parameters(2, dtype)
    optimizer = ScheduleFreeWrapper(torch.optim.Adam(params, lr=0.1))
    optimizer.train()
    stepped(optimizer, params, 0, 2, list)
    damaged = copy.deepcopy(optimizer.state_dict())
    damage(damaged)
    stepped(optimizer, params, 2, 4, list)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(damaged)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(
        torch.equal(value, after["state"][key][name])
        for key, state in before["state"].items()
        for name, value in state.items()
    )
    assert optimizer.param_groups[0]["params"] == params
    stepped(optimizer, params, 4, 5, list)


# ---- clipping -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("cls", MODES)
def test_clipping_is_that_of_torch_over_all_groups(cls, closure):
    runs = []
    for own in (True, False):
        params = parameters(3, torch.float32)
        base = torch.optim.RMSprop([{"params": [p]} for p in params], lr=0.1)
        optimizer = cls(base, max_grad_norm=0.7 if own else None)
        optimizer.train()
        for seed in range(6):

            def backward(params=params, seed=seed, own=own):
                set_gradients(params, seed)
                if seed == 5:
                    for p in params:
                        p.grad *= 1e-3
                if not own:
                    torch.nn.utils.clip_grad_norm_(params, 0.7)
                return 1.0

            if closure:
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
            runs.append((own, [p.grad.clone() for p in params], [p.detach().clone() for p in params]))
            if own:
                norm = float(optimizer.grad_norm)
                assert (norm > 0.7) == (seed < 5)
    for (_, *mine), (_, *theirs) in zip(runs[:6], runs[6:], strict=True):
        for a, b in zip([*mine[0], *mine[1]], [*theirs[0], *theirs[1]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_after_every_call_of_a_closure():
    (p,) = parameters(1)
    seen = []

    class Looks(Twice):
        @torch.no_grad()
        def step(self, closure):
            def look():
                loss = closure()
                seen.append(float(p.grad.norm()))
                return loss

            return super().step(look)

    optimizer = ScheduleFreeWrapper(Looks([p], {"lr": 0.1}), max_grad_norm=0.5)
    optimizer.train()

    def closure():
        p.grad = 3.0 * p.detach()
        return 1.0

    optimizer.step(closure)
    assert seen == pytest.approx([0.5, 0.5], rel=1e-5)


def test_settings_of_all_groups_are_attributes_and_are_saved():
    settings = {
        "momentum": 0.8,
        "weight_decay_at_y": 0.1,
        "weight_lr_power": 1.0,
        "r": 0.5,
        "max_grad_norm": 2.0,
        "nonfinite": "skip",
    }
    params = parameters(2)
    optimizer = ScheduleFreeWrapper(torch.optim.SGD([{"params": [p]} for p in params], lr=0.1))
    for name, value in settings.items():
        setattr(optimizer, name, value)
    other = ScheduleFreeWrapper(torch.optim.SGD([{"params": [p]} for p in parameters(2)], lr=0.1))
    other.load_state_dict(optimizer.state_dict())
    other.add_param_group({"params": parameters(1)})
    for name, value in settings.items():
        assert getattr(other, name) == value
        assert [group["sf_" + name] for group in other.param_groups] == [value] * 3
    for name, value in {**dict.fromkeys(settings, "x"), "max_grad_norm": -1.0}.items():
        with pytest.raises(ValueError, match=f"Invalid {name}: "):
            setattr(other, name, value)


# ---- capturable -----------------------------------------------------------------------------------------


class Captured(torch.optim.SGD):
    """An optimizer whose groups say that a graph may capture its step, on any device."""

    def __init__(self, params, capturable=True, **options):  # noqa: D107
        super().__init__(params, **options)
        for group in self.param_groups:
            group["capturable"] = capturable


@pytest.mark.parametrize("cls", MODES)
def test_a_schedule_on_the_device_is_that_of_the_host(cls):
    runs = []
    for capturable in (False, True):
        params = parameters(3, torch.float32)
        groups = [{"params": params[:2]}, {"params": params[2:]}]
        optimizer = cls(Captured(groups, capturable, lr=0.1), weight_decay_at_y=0.1, r=0.5, max_grad_norm=0.9)
        optimizer.train()
        seen = []
        for seed in range(9):
            set_gradients(params, seed)
            if seed % 3 == 2:
                params[1].grad = params[2].grad = None
            optimizer.param_groups[0]["lr"] = 0.1 / (seed + 1)
            optimizer.momentum = 0.9 - 0.1 * (seed % 2)
            optimizer.step()
            seen += [p.detach().clone() for p in params]
            if seed == 4:
                optimizer.load_state_dict(optimizer.state_dict())
        group = optimizer.state_dict()["param_groups"][1]
        assert type(group["sf_k"]) is int
        assert isinstance(optimizer.param_groups[1]["sf_k"], torch.Tensor) == capturable
        optimizer.eval()
        runs.append((seen + params, {k: v for k, v in group.items() if k not in ("capturable", "params")}))
    assert all(map(torch.equal, runs[0][0], runs[1][0]))
    assert runs[0][1].keys() == runs[1][1].keys()
    for key, value in runs[0][1].items():
        if key != "sf_scheduled_lr" and isinstance(value, float):
            assert runs[1][1][key] == pytest.approx(value, rel=1e-12)


def test_a_capturable_step_reads_nothing_on_the_host_and_is_undone():
    params = parameters(2, torch.float32)
    optimizer = ScheduleFreeWrapper(Captured(params, lr=torch.tensor(0.1)), max_grad_norm=0.5)
    optimizer.train()
    set_gradients(params, 0)
    optimizer.step()
    reads = []
    names = ("item", "tolist", "__float__", "__int__", "__bool__")
    originals = {name: getattr(torch.Tensor, name) for name in names}
    try:
        for name in names:
            setattr(torch.Tensor, name, lambda t, name=name: reads.append(name) or originals[name](t))
        optimizer.step()
    finally:
        for name, original in originals.items():
            setattr(torch.Tensor, name, original)
    assert reads == []
    before, k = copy.deepcopy(params), optimizer.param_groups[0]["sf_k"].clone()
    optimizer.base.step = lambda: (_ for _ in ()).throw(KeyError("stop"))
    with pytest.raises(KeyError):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    assert torch.equal(optimizer.param_groups[0]["sf_k"], k)


def test_with_capturable_no_step_is_left_out():
    base = Captured(parameters(1), lr=0.1)
    with pytest.raises(
        ValueError,
        match=r"Invalid sf_nonfinite in parameter group 0: 'skip', expected 'propagate' with capturable",
    ):
        ScheduleFreeWrapper(base, nonfinite="skip")
    assert not any(key.startswith("sf_") for key in base.param_groups[0])


def test_a_base_without_a_learning_rate_or_with_another_state_dict_is_refused():
    class Other(torch.optim.SGD):
        def state_dict(self):
            return {"inner": super().state_dict()}

    with pytest.raises(
        ValueError, match="Invalid base: it has no lr in parameter group 0, by which the average"
    ):
        ScheduleFreeWrapper(Twice(parameters(), {}))
    with pytest.raises(
        TypeError, match=r"Invalid base: the state dict of .*Other.* has \['inner'\], expected"
    ):
        ScheduleFreeWrapper(Other(parameters(), lr=0.1))


@pytest.mark.parametrize("cls", MODES)
def test_hooks_of_all_optimizers_see_the_step_of_the_base_too(cls):
    params = parameters()
    optimizer = cls(torch.optim.SGD(params, lr=0.1))
    optimizer.train()
    set_gradients(params, 0)
    seen = []
    handle = register_optimizer_step_post_hook(lambda self, *_: seen.append(self))
    try:
        optimizer.step()
    finally:
        handle.remove()
    assert [id(each) for each in seen] == [id(optimizer.base), id(optimizer)]
