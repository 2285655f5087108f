"""The facade: what a user of ``torch.optim`` expects of an optimizer."""

from __future__ import annotations

import copy
import io
import math
import pickle

import cases
import pytest
import reference
import torch
from schedulefree_cpp import AdamWScheduleFree, AdamWScheduleFreePaper, RAdamScheduleFree, SGDScheduleFree

# RAdam takes its first steps in silence, so tests that look for a change take more than five.
CLASSES = [AdamWScheduleFree, AdamWScheduleFreePaper, RAdamScheduleFree, SGDScheduleFree]
SHAPES = [(3, 5), (), (1030,), (2, 3, 4, 4)]


def clone_params(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def run(optimizer, params, steps, start=0):
    for i in range(start, start + steps):
        cases.set_gradients(params, i)
        optimizer.step()


def assert_same(params, others):
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)


def snapshot(optimizer):
    state = [{k: t.clone() for k, t in s.items()} for s in optimizer.state.values()]
    params = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in copy.deepcopy(optimizer.param_groups)]
    return params, state, groups


def assert_unchanged(optimizer, before):
    params, state, groups = snapshot(optimizer)
    assert_same(params, before[0])
    assert groups == before[2]
    for now, then in zip(state, before[1], strict=True):
        assert now.keys() == then.keys()
        for key in now:
            assert torch.equal(now[key], then[key])


# ---- trajectories ------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", cases.ADAMW + cases.SGD, ids=cases.name_of)
def test_float64_follows_the_oracle(h):
    params = cases.parameters(SHAPES, torch.float64)
    optimizer, oracle = cases.build(params, h), reference.Reference.of(params, h)
    for i in range(60):
        cases.set_gradients(params, i)
        optimizer.step()
        oracle.step([p.grad for p in params])
        for p, it in zip(params, oracle.iterates, strict=True):
            torch.testing.assert_close(p.detach(), it.y, rtol=1e-11, atol=1e-11)
        if i % 20 == 7:
            optimizer.eval()
            for p, it in zip(params, oracle.iterates, strict=True):
                torch.testing.assert_close(p.detach(), it.x, rtol=1e-11, atol=1e-11)
            optimizer.train()
    group = optimizer.param_groups[0]
    assert group["k"] == 60
    assert group["lr_max"] == oracle.lr_max
    assert group["weight_sum"] == pytest.approx(oracle.weight_sum, rel=1e-14)
    assert group["scheduled_lr"] == oracle.scheduled_lr


@pytest.mark.parametrize("decoupling_c", [0.0, 20.0])
@pytest.mark.parametrize("adam", [True, False])
def test_a_beta_that_moves_stays_exact(adam, decoupling_c):
    # OneCycleLR moves beta after each step; y was built with the one before, also after eval() and train().
    params = cases.parameters(SHAPES, torch.float64)
    h = reference.Hyperparameters(adam=adam, lr=0.01, decoupling_c=decoupling_c)
    optimizer, oracle = cases.build(params, h), reference.Reference.of(params, h)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.05, total_steps=50, cycle_momentum=True
    )
    betas = set()
    for i in range(49):
        group = optimizer.param_groups[0]
        h.lr, h.beta = group["lr"], group["betas"][0] if h.adam else group["momentum"]
        betas.add(h.beta)
        cases.set_gradients(params, i)
        optimizer.step()
        oracle.step([p.grad for p in params])
        scheduler.step()
        if i % 7 == 3:
            optimizer.eval()
            for p, it in zip(params, oracle.iterates, strict=True):
                torch.testing.assert_close(p.detach(), it.x, rtol=1e-10, atol=1e-10)
            optimizer.train()
        for p, it in zip(params, oracle.iterates, strict=True):
            torch.testing.assert_close(p.detach(), it.y, rtol=1e-10, atol=1e-10)
    assert len(betas) > 40


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("adam", [True, False])
def test_a_beta_that_grows_follows_the_oracle_through_a_checkpoint(adam, capturable):
    # The recipe for AMUSE of docs/variants.md, arXiv 2605.22432.
    params = cases.parameters(SHAPES, torch.float64)
    h = reference.Hyperparameters(adam=adam, lr=0.01)
    cls, oracle = AdamWScheduleFree if adam else SGDScheduleFree, reference.Reference.of(params, h)
    optimizer = cls(params, **cases.arguments(h), capturable=capturable)
    optimizer.train()
    t0, rho, beta = 5, 0.5, h.beta
    for t in range(2, 42):
        if t > t0:
            h.beta = 1 - ((t0 - 1) / (t - 1)) ** rho * (1 - beta)
            cases.set_beta(optimizer, h.beta)
        cases.set_gradients(params, t)
        optimizer.step()
        oracle.step([p.grad for p in params])
        if t == 20:
            state_dict = optimizer.state_dict()
            optimizer = cls(params, capturable=capturable)
            optimizer.load_state_dict(state_dict)
            with optimizer.averaged():
                for p, it in zip(params, oracle.iterates, strict=True):
                    torch.testing.assert_close(p.detach(), it.x, rtol=1e-10, atol=1e-10)
        for p, it in zip(params, oracle.iterates, strict=True):
            torch.testing.assert_close(p.detach(), it.y, rtol=1e-10, atol=1e-10)
    assert h.beta > 0.96


@pytest.mark.parametrize("average", [{"decoupling_c": 3.0}, {"averaging_weight": 0.1}])
@pytest.mark.parametrize("cls", CLASSES)
def test_how_the_average_is_weighed_is_in_a_checkpoint(cls, average):
    params = cases.parameters(SHAPES)
    optimizer = cls(params, lr=0.1, **average)
    optimizer.train()
    run(optimizer, params, 9)
    others = clone_params(params)
    other = cls(others)
    other.load_state_dict(optimizer.state_dict())
    run(optimizer, params, 3, start=9)
    run(other, others, 3, start=9)
    assert_same(params, others)
    assert not average.keys() & cls(others).state_dict()["param_groups"][0].keys()


def test_a_decoupled_average_may_be_that_without():
    # decoupling_c = 1 / (1 - beta), exactly for this beta.
    params = cases.parameters(SHAPES)
    others = clone_params(params)
    optimizer = AdamWScheduleFree(params, lr=0.1, betas=(0.75, 0.99))
    other = AdamWScheduleFree(others, lr=0.1, betas=(0.75, 0.99), decoupling_c=4.0)
    for o, ps in ((optimizer, params), (other, others)):
        o.train()
        run(o, ps, 10)
    assert_same(params, others)


def test_a_moved_beta_survives_checkpoints_and_copies():
    params = cases.parameters(SHAPES)
    optimizer = cases.build(params, cases.ADAMW[0])
    run(optimizer, params, 3)
    optimizer.param_groups[0]["betas"] = (0.8, 0.999)
    others = clone_params(params)
    other = cases.build(others, cases.ADAMW[0])
    other.load_state_dict(optimizer.state_dict())
    twin = copy.deepcopy(optimizer)
    run(optimizer, params, 2, start=3)
    run(other, others, 2, start=3)
    run(twin, twin.param_groups[0]["params"], 2, start=3)
    assert_same(params, others)
    assert_same(params, twin.param_groups[0]["params"])
    assert "y_beta" not in other.param_groups[0]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_stay_finite(cls, dtype):
    params = cases.parameters(SHAPES, dtype)
    optimizer = cls(params, lr=0.01)
    optimizer.train()
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(3):
        optimizer.step()
    run(optimizer, params, 10)
    optimizer.eval()
    for p in params:
        assert p.isfinite().all()
        assert optimizer.state[p]["z"].dtype == torch.float32
        assert optimizer.state[p]["y_lo"].dtype == torch.int16


def test_bfloat16_parameters_do_not_lose_small_updates():
    wide, narrow = cases.parameters([(1000,)]), cases.parameters([(1000,)], torch.bfloat16)
    wide = [torch.nn.Parameter(narrow[0].detach().float())]
    optimizers = [AdamWScheduleFree(p, lr=1e-4) for p in (wide, narrow)]
    for optimizer in optimizers:
        optimizer.train()
    start = narrow[0].detach().clone()
    for i in range(100):
        cases.set_gradients(narrow, i)
        wide[0].grad = narrow[0].grad.float()
        for optimizer in optimizers:
            optimizer.step()
    assert not torch.equal(start, narrow[0])
    ulps = (wide[0].bfloat16().view(torch.int16).int() - narrow[0].detach().view(torch.int16).int()).abs()
    assert ulps.max() <= 1  # ties: torch rounds them to even, the split away from zero
    assert torch.equal(optimizers[0].state[wide[0]]["z"], optimizers[1].state[narrow[0]]["z"])


# ---- modes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_train_and_eval_are_idempotent_and_touch_no_state(cls):
    params = cases.parameters(SHAPES)
    optimizer = cls(params, lr=0.1)
    for switch in (optimizer.eval, optimizer.train, optimizer.train, optimizer.eval):
        switch()
        assert len(optimizer.state) == 0
    optimizer.train()
    run(optimizer, params, 8)
    y = clone_params(params)
    optimizer.train()
    assert_same(params, y)
    optimizer.eval()
    x = clone_params(params)
    optimizer.eval()
    assert_same(params, x)
    optimizer.train(False)
    assert_same(params, x)
    assert not torch.equal(x[0], y[0])
    optimizer.train()
    for p, q in zip(params, y, strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("cls", CLASSES)
def test_step_in_eval_mode_names_the_group_and_the_call(cls):
    params = cases.parameters(SHAPES)
    optimizer = cls([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    optimizer.train()
    run(optimizer, params, 1)
    optimizer.param_groups[1]["train_mode"] = False
    cases.set_gradients(params, 1)
    before = snapshot(optimizer)
    with pytest.raises(
        RuntimeError, match=r"group 1 is in eval mode.*not in train mode.*optimizer\.train\(\)"
    ):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_group_added_later_has_the_optimizers_mode(cls, train):
    params, late = cases.parameters(SHAPES), cases.parameters(SHAPES, seed=5)
    optimizer = cls(params, lr=0.1)
    optimizer.train()
    run(optimizer, params, 3)
    if not train:
        optimizer.eval()
    optimizer.add_param_group({"params": late, "lr": 0.05, "train_mode": not train})
    assert [g["train_mode"] for g in optimizer.param_groups] == [train, train]
    optimizer.train()
    run(optimizer, params + late, 3)
    y = clone_params(params + late)
    optimizer.eval()
    optimizer.train()
    for p, q in zip(params + late, y, strict=True):
        torch.testing.assert_close(p, q)
    assert [g["k"] for g in optimizer.param_groups] == [6, 3]


# ---- groups, closures, gradients ---------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_frozen_late_and_empty(cls):
    params = cases.parameters([(3,), (4,), (5,)])
    params[1].requires_grad_(False)
    optimizer = cls([{"params": params}, {"params": []}], lr=0.1)
    optimizer.train()
    optimizer.step()
    assert [g["k"] for g in optimizer.param_groups] == [0, 0]  # without a gradient there is no step
    frozen = params[1].detach().clone()
    params[0].grad, params[2].grad = torch.ones(3), torch.ones(5)
    optimizer.step()
    assert torch.equal(params[1], frozen)
    assert params[1] not in optimizer.state
    params[1].requires_grad_(True)
    run(optimizer, params, 8)
    assert not torch.equal(params[1], frozen)
    optimizer.eval()
    optimizer.train()


@pytest.mark.parametrize("cls", CLASSES)
def test_entries_of_others_in_the_state_are_kept(cls):
    params = cases.parameters(SHAPES)
    optimizer = cls(params, lr=0.1)
    optimizer.state[params[0]]["note"] = "mine"
    optimizer.eval()
    optimizer.train()
    run(optimizer, params, 2)
    assert optimizer.state[params[0]]["note"] == "mine"
    assert "z" in optimizer.state[params[0]]


@pytest.mark.parametrize("cls", CLASSES)
def test_closures_run_with_gradients_enabled(cls):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([p], lr=0.1)
    optimizer.train()

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 3.0
    for _ in range(8):
        loss = optimizer.step(closure=closure)
    assert loss < 3.0
    assert optimizer.step() is None


@pytest.mark.parametrize("cls", CLASSES)
def test_gradients_are_never_written(cls):
    params = cases.parameters(SHAPES)
    optimizer = cls(params, lr=0.1, weight_decay=0.1, maximize=True)
    optimizer.train()
    cases.set_gradients(params, 0)
    before = [p.grad.clone() for p in params]
    optimizer.step()
    assert_same([p.grad for p in params], before)


@pytest.mark.parametrize("cls", CLASSES)
def test_several_groups_equal_several_optimizers(cls):
    params = cases.parameters(SHAPES)
    copies = clone_params(params)
    optimizer = cls(
        [{"params": params[:1]}, {"params": params[1:], "lr": 0.03, "maximize": True, "decay_at": "z"}],
        lr=0.1,
        weight_decay=0.1,
    )
    parts = [
        cls(copies[:1], lr=0.1, weight_decay=0.1),
        cls(copies[1:], lr=0.03, weight_decay=0.1, maximize=True, decay_at="z"),
    ]
    for o in (optimizer, *parts):
        o.train()
    for i in range(5):
        for group in (params, copies):
            cases.set_gradients(group, i)
        for o in (optimizer, *parts):
            o.step()
    assert_same(params, copies)


@pytest.mark.parametrize("cls", CLASSES)
def test_mixed_dtypes_in_one_group(cls):
    params = [p for dtype in cases.DTYPES for p in cases.parameters([(5,), (3, 3)], dtype)]
    copies = clone_params(params)
    optimizer, singles = cls(params, lr=0.1), [cls([p], lr=0.1) for p in copies]
    for o in (optimizer, *singles):
        o.train()
    for i in range(3):
        cases.set_gradients(params, i)
        for p, q in zip(params, copies, strict=True):
            q.grad = p.grad.clone()
        for o in (optimizer, *singles):
            o.step()
    for o in (optimizer, *singles):
        o.eval()
    assert_same(params, copies)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("cls", CLASSES)
def test_parameters_whose_strides_change(cls, memory_format):
    params = cases.parameters([(4, 3, 5, 5)])
    copies = clone_params(params)
    optimizer, other = cls(params, lr=0.1), cls(copies, lr=0.1)
    for o in (optimizer, other):
        o.train()
    run(other, copies, 4)
    run(optimizer, params, 2)
    params[0].data = params[0].data.contiguous(memory_format=memory_format)
    run(optimizer, params, 2, start=2)
    assert_same(params, copies)


@pytest.mark.compile
@pytest.mark.parametrize("cls", CLASSES)
def test_compiled_functions_may_hold_the_step(cls):
    params = cases.parameters([(3, 5), (7,)])
    copies = clone_params(params)
    results = []
    for ps, wrap in ((params, lambda f: f), (copies, lambda f: torch.compile(f, backend="eager"))):
        optimizer = cls(ps, lr=0.1)
        optimizer.train()

        def step(ps=ps, optimizer=optimizer):
            sum(p.square().sum() for p in ps).backward()
            optimizer.step()
            optimizer.zero_grad()

        function = wrap(step)
        for i in range(12):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 + i % 5)
            function()
        results.append({k: v for k, v in optimizer.param_groups[0].items() if k != "params"})
    assert results[0] == results[1]
    assert_same(params, copies)


# ---- learning rates and schedulers -------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_lr_may_be_a_tensor(cls):
    params = cases.parameters(SHAPES)
    copies = clone_params(params)
    optimizer, other = cls(params, lr=torch.tensor(0.25, dtype=torch.float64)), cls(copies, lr=0.25)
    for o, ps in ((optimizer, params), (other, copies)):
        o.train()
        run(o, ps, 3)
    assert_same(params, copies)
    for key in ("weight_sum", "lr_max", "scheduled_lr"):
        assert type(optimizer.param_groups[0][key]) is float


@pytest.mark.parametrize("cls", [AdamWScheduleFree, AdamWScheduleFreePaper, SGDScheduleFree])
def test_warmup_steps_may_be_a_float(cls):
    params = cases.parameters(SHAPES)
    copies = clone_params(params)
    optimizer, other = cls(params, warmup_steps=4.0), cls(copies, warmup_steps=4)
    for o, ps in ((optimizer, params), (other, copies)):
        o.train()
        run(o, ps, 5)
    assert_same(params, copies)
    optimizer = cls(params, lr=1.0, warmup_steps=2.5)
    optimizer.train()
    rates = []
    for i in range(4):
        run(optimizer, params, 1, start=i)
        rates.append(optimizer.param_groups[0]["scheduled_lr"])
    if cls is AdamWScheduleFreePaper:  # which corrects the rate for the bias of the mean squared gradient
        rates = [rate / math.sqrt(1 - 0.999 ** (i + 1)) for i, rate in enumerate(rates)]
    assert rates == pytest.approx([1 / 2.5, 2 / 2.5, 3 / 2.5, 1.0], rel=1e-12)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
@pytest.mark.parametrize("cls", CLASSES)
def test_lr_zero_changes_nothing_and_breaks_nothing(cls, lr):
    params = cases.parameters(SHAPES)
    before = clone_params(params)
    optimizer = cls(params, lr=lr)
    optimizer.train()
    run(optimizer, params, 3)
    assert_same(params, before)
    assert optimizer.param_groups[0]["weight_sum"] == 0
    optimizer.param_groups[0]["lr"] = 0.1
    run(optimizer, params, 8)
    assert all(p.isfinite().all() for p in params)
    assert not torch.equal(params[0], before[0])


def lr_schedulers():
    lrs = torch.optim.lr_scheduler
    return {
        "LambdaLR": lambda o: lrs.LambdaLR(o, lambda i: 1 / (1 + i)),
        "StepLR": lambda o: lrs.StepLR(o, 2),
        "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 10),
        "LinearLR": lambda o: lrs.LinearLR(o),
        "OneCycleLR": lambda o: lrs.OneCycleLR(o, max_lr=0.1, total_steps=20),
        "CyclicLR": lambda o: lrs.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    }


@pytest.mark.parametrize("scheduler", list(lr_schedulers()))
@pytest.mark.parametrize("cls", CLASSES)
def test_schedulers(cls, scheduler):
    params = cases.parameters(SHAPES)
    optimizer = cls(params, lr=0.05)
    optimizer.train()
    schedule = lr_schedulers()[scheduler](optimizer)
    for i in range(8):
        run(optimizer, params, 1, start=i)
        if cls in (AdamWScheduleFree, SGDScheduleFree):
            assert optimizer.param_groups[0]["scheduled_lr"] == schedule.get_last_lr()[0]
        schedule.step()
    assert all(p.isfinite().all() for p in params)


# ---- checkpoints and copies --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_resumed_run_is_the_run(cls, dtype, mode):
    params = cases.parameters(SHAPES, dtype)
    optimizer = cls(params, lr=0.1)
    optimizer.train()
    run(optimizer, params, 3)
    getattr(optimizer, mode)()
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    others = clone_params(saved["params"])
    other = cls(others, lr=0.1)
    other.load_state_dict(saved["optimizer"])
    for p, q in zip(params, others, strict=True):
        for key, value in optimizer.state[p].items():
            loaded = other.state[q][key]
            assert loaded.dtype == value.dtype
            assert torch.equal(loaded, value)
            assert loaded.data_ptr() != value.data_ptr() or value.numel() == 0
    for o, ps in ((optimizer, params), (other, others)):
        o.train()
        run(o, ps, 3, start=3)
        o.eval()
    assert_same(params, others)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("cls", CLASSES)
def test_copies_step_on_identically(cls, duplicate):
    params = cases.parameters(SHAPES)
    optimizer = cls(params, lr=0.1)
    optimizer.train()
    run(optimizer, params, 3)
    twin = duplicate(optimizer)
    others = twin.param_groups[0]["params"]
    run(optimizer, params, 3, start=3)
    run(twin, others, 3, start=3)
    assert_same(params, others)


def test_loading_does_not_alias_and_keeps_new_hyperparameters():
    params = cases.parameters(SHAPES)
    optimizer = AdamWScheduleFree(params, lr=0.1)
    optimizer.train()
    run(optimizer, params, 1)
    state_dict = optimizer.state_dict()
    others = clone_params(params)
    other = AdamWScheduleFree(others, lr=0.1, inner_momentum=0.9)
    hooked = []
    other.register_load_state_dict_pre_hook(lambda o, s: hooked.append(s["state"][0]["z"]))
    other.load_state_dict(state_dict)
    assert torch.is_tensor(hooked[0])
    assert other.param_groups[0]["inner_momentum"] == 0.9
    kept = state_dict["state"][0]["z"].clone()
    run(other, others, 2)
    assert torch.equal(state_dict["state"][0]["z"], kept)


# ---- refusals ----------------------------------------------------------------------------------------

BAD = [
    ({"lr": -0.1}, r"Invalid lr: -0.1, expected a finite value >= 0"),
    ({"lr": math.nan}, r"Invalid lr: nan"),
    ({"lr": math.inf}, r"Invalid lr: inf"),
    ({"lr": "fast"}, r"Invalid lr: 'fast' of type str, expected a number"),
    ({"lr": torch.ones(2)}, r"Invalid lr: tensor\(.*of type Tensor, expected a number"),
    ({"weight_decay": -1}, r"Invalid weight_decay: -1, expected a finite value >= 0"),
    ({"warmup_steps": -1}, r"Invalid warmup_steps: -1, expected a finite value >= 0"),
    ({"warmup_steps": math.inf}, r"Invalid warmup_steps: inf, expected a finite value >= 0"),
    ({"lr": 10**400}, r"Invalid lr: 1000"),
    ({"r": math.inf}, r"Invalid r: inf, expected a finite value"),
    ({"weight_lr_power": math.nan}, r"Invalid weight_lr_power"),
    ({"decoupling_c": -1}, r"Invalid decoupling_c: -1, expected a finite value >= 0"),
    ({"averaging_weight": 1.5}, r"Invalid averaging_weight: 1.5, expected a value in \[0, 1\]"),
    ({"decay_at": "x"}, r"Invalid decay_at: 'x', expected one of \['y', 'z'\]"),
]
BAD_ADAMW = [
    ({"betas": (0.0, 0.9)}, r"Invalid betas\[0\]: 0, expected a value in \(0, 1\]: at 0"),
    ({"betas": (1.1, 0.9)}, r"Invalid betas\[0\]: 1.1"),
    ({"betas": (0.9, 1.0)}, r"Invalid betas\[1\]: 1, expected a value in \[0, 1\)"),
    ({"betas": (0.9,)}, r"Invalid betas: \(0.9,\), expected two values"),
    ({"betas": 0.9}, r"Invalid betas: 0.9, expected two values"),
    ({"eps": -1e-8}, r"Invalid eps: -1e-08"),
    ({"inner_momentum": 1.0}, r"Invalid inner_momentum: 1, expected a value in \[0, 1\)"),
]
BAD_SGD = [({"momentum": 0.0}, r"Invalid momentum: 0, expected a value in \(0, 1\]")]


@pytest.mark.parametrize(
    ("cls", "kwargs", "message"),
    [
        (cls, *case)
        for cls in CLASSES
        for case in BAD
        if not (cls is RAdamScheduleFree and "warmup_steps" in case[0])
    ]
    + [(AdamWScheduleFree, *case) for case in BAD_ADAMW]
    + [(SGDScheduleFree, *case) for case in BAD_SGD],
)
def test_hyperparameters_outside_their_domain(cls, kwargs, message):
    params = cases.parameters(SHAPES)
    with pytest.raises(ValueError, match=message):
        cls(params, **kwargs)
    optimizer = cls(params, lr=0.1)
    with pytest.raises(ValueError, match=message.split(":")[0] + " in parameter group 1"):
        optimizer.add_param_group({"params": cases.parameters([(2,)]), **kwargs})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("cls", CLASSES)
def test_parameters_that_no_operator_takes_are_refused_where_they_want_gradients(cls, dtype):
    bad = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    with pytest.raises(ValueError, match=r"Invalid params\[0\] in parameter group 0: dtype"):
        cls([bad])
    optimizer = cls(cases.parameters([(3,)]))
    with pytest.raises(ValueError, match=r"Invalid params\[1\] in parameter group 1: dtype"):
        optimizer.add_param_group({"params": [*cases.parameters([(2,)]), bad]})
    assert len(optimizer.param_groups) == 1
    optimizer.train()
    run(optimizer, optimizer.param_groups[0]["params"], 1)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("cls", CLASSES)
def test_a_sparse_gradient_is_refused_before_any_group_changes(cls, steps):
    params = cases.parameters([(3, 3), (4, 2)])
    optimizer = cls([{"params": params[:1]}, {"params": params[1:]}], lr=0.1)
    optimizer.train()
    run(optimizer, params, steps)
    cases.set_gradients(params, 9)
    params[1].grad = params[1].grad.to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="dense"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_beta_moved_to_zero_is_refused_before_anything_changes(cls):
    params = cases.parameters(SHAPES)
    optimizer = cls(params, lr=0.1)
    optimizer.train()
    run(optimizer, params, 1)
    optimizer.param_groups[0].update({"momentum": 0.0} if cls is SGDScheduleFree else {"betas": (0.0, 0.9)})
    before = snapshot(optimizer)
    with pytest.raises(
        ValueError, match=r"Invalid (momentum|betas\[0\]) in parameter group 0: 0, expected a value in"
    ):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_decay": math.nan}, "Invalid weight_decay in parameter group 1: nan"),
        ({"betas": (0.9, 1.5)}, r"Invalid betas\[1\] in parameter group 1: 1.5"),
        ({"eps": -1.0}, "Invalid eps in parameter group 1"),
        ({"warmup_steps": -3}, "Invalid warmup_steps in parameter group 1"),
        ({"inner_momentum": 1.5}, "Invalid inner_momentum in parameter group 1"),
        ({"decay_at": "q"}, "Invalid decay_at in parameter group 1: 'q'"),
        ({"lr": -1.0}, "Invalid lr in parameter group 1"),
    ],
)
def test_hyperparameters_moved_outside_their_domain(change, message):
    params = cases.parameters(SHAPES)
    groups = [{"params": params[:1]}, {"params": params[1:]}]
    optimizer = AdamWScheduleFree(groups, lr=0.1, inner_momentum=0.5)
    optimizer.train()
    run(optimizer, params, 2)
    cases.set_gradients(params, 2)
    good = {key: optimizer.param_groups[1].get(key, 0.0) for key in change}
    optimizer.param_groups[1].update(change)
    before = snapshot(optimizer)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        assert_unchanged(optimizer, before)
    optimizer.param_groups[1].update(good if "decay_at" not in change else {"decay_at": "y"})
    optimizer.step()


def test_changing_to_inner_momentum_after_the_first_step_is_explained():
    params = cases.parameters(SHAPES)
    optimizer = AdamWScheduleFree(params, lr=0.1)
    optimizer.train()
    run(optimizer, params, 1)
    optimizer.param_groups[0]["inner_momentum"] = 0.9
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="lacks 'exp_avg'"):
        optimizer.step()
    assert_unchanged(optimizer, before)
