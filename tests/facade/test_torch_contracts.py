"""What ``torch.optim`` promises of every optimizer, for every class of the family."""

from __future__ import annotations

import contextlib
import copy
import inspect
import pickle
import threading

import cases
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook

SHAPES = [(3, 5), (), (1030,), (2, 3, 4, 4)]
LR = torch.optim.lr_scheduler

SCHEDULERS = {
    "LambdaLR": lambda o: LR.LambdaLR(o, lambda i: 1 / (1 + i)),
    "MultiplicativeLR": lambda o: LR.MultiplicativeLR(o, lambda i: 0.9),
    "StepLR": lambda o: LR.StepLR(o, 2),
    "MultiStepLR": lambda o: LR.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: LR.ConstantLR(o),
    "LinearLR": lambda o: LR.LinearLR(o),
    "ExponentialLR": lambda o: LR.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: LR.SequentialLR(o, [LR.ConstantLR(o), LR.ExponentialLR(o, 0.9)], [3]),
    "CosineAnnealingLR": lambda o: LR.CosineAnnealingLR(o, 10),
    "ChainedScheduler": lambda o: LR.ChainedScheduler([LR.ConstantLR(o), LR.ExponentialLR(o, 0.9)]),
    "ReduceLROnPlateau": lambda o: LR.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: LR.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3, cycle_momentum=cycles(o)),
    "CosineAnnealingWarmRestarts": lambda o: LR.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: LR.OneCycleLR(o, max_lr=0.1, total_steps=20, cycle_momentum=cycles(o)),
    "PolynomialLR": lambda o: LR.PolynomialLR(o, 10),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01),
}


def cycles(optimizer):
    """Whether the optimizer has a momentum that a scheduler can cycle."""
    return bool({"momentum", "betas"} & optimizer.defaults.keys())


def test_no_scheduler_of_torch_is_left_out():
    classes = {
        name for name in LR.__all__ if inspect.isclass(getattr(LR, name)) and name not in ("LRScheduler",)
    }
    assert classes <= SCHEDULERS.keys()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", cases.FAMILY)
def test_schedulers(name, scheduler):
    params = cases.parameters(SHAPES)
    optimizer = cases.make(name, params, lr=0.05)
    start = cases.copies(params)
    schedule = SCHEDULERS[scheduler](optimizer)
    rates = []
    for seed in range(8):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        cases.drive(optimizer, seed)
        if name in ("AdamWScheduleFree", "SGDScheduleFree", *cases.REFERENCE):
            assert optimizer.param_groups[0]["scheduled_lr"] == rates[-1]
        if name not in cases.CLOSURE and seed == 4:
            optimizer.eval(), optimizer.train()
        schedule.step(*[1.0] if scheduler == "ReduceLROnPlateau" else [])
    assert all(p.isfinite().all() for p in params)
    assert not torch.equal(params[0], start[0])
    assert scheduler == "ConstantLR" or len(set(rates)) > 1
    resumed = cases.make(name, cases.copies(params), lr=0.05)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    cases.run(optimizer, 2, start=8), cases.run(resumed, 2, start=8)
    cases.assert_same(params, cases.params_of(resumed))


@pytest.mark.parametrize("name", cases.FAMILY)
def test_it_is_an_optimizer(name):
    optimizer = cases.make(name, cases.parameters(SHAPES))
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert type(optimizer).__name__ in repr(optimizer)
    for p in cases.params_of(optimizer):
        p.grad = torch.ones_like(p)
    optimizer.zero_grad()
    assert all(p.grad is None for p in cases.params_of(optimizer))


@pytest.mark.parametrize("name", cases.FAMILY)
def test_hooks_run_once_a_step_and_see_it(name):
    optimizer = cases.make(name, cases.parameters(SHAPES))
    seen = []
    handles = [
        optimizer.register_step_pre_hook(
            lambda o, args, kwargs: seen.append(("pre", cases.entry(o.param_groups[0], "k")))
        ),
        optimizer.register_step_post_hook(
            lambda o, args, kwargs: seen.append(("post", cases.entry(o.param_groups[0], "k")))
        ),
        register_optimizer_step_pre_hook(
            lambda o, args, kwargs: seen.append("global") if o is optimizer else None
        ),
    ]
    cases.run(optimizer, 2)
    assert seen == ["global", ("pre", 0), ("post", 1), "global", ("pre", 1), ("post", 2)]
    for handle in handles:
        handle.remove()
    cases.run(optimizer, 1, start=2)
    assert len(seen) == 6


@pytest.mark.parametrize("name", cases.FAMILY)
def test_state_dict_hooks_run(name):
    optimizer = cases.make(name, cases.parameters(SHAPES))
    cases.run(optimizer, 2)
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, s: seen.append("post") or {**s, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, s: seen.append("load pre") or {**s, "note": 2})
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("load post"))
    state_dict = optimizer.state_dict()
    assert state_dict["note"] == 1
    optimizer.load_state_dict(state_dict)
    assert seen == ["pre", "post", "load pre", "load post"]


@pytest.mark.parametrize("name", cases.FAMILY)
def test_the_profiler_names_the_step(name):
    optimizer = cases.make(name, cases.parameters(SHAPES))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        cases.run(optimizer, 1)
    assert f"Optimizer.step#{name}.step" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("name", cases.FAMILY)
def test_named_parameters(name):
    params = cases.parameters(SHAPES)
    named = [(f"layer{i}", p) for i, p in enumerate(params)]
    optimizer = cases.make(name, named)
    cases.run(optimizer, 2)
    state_dict = optimizer.state_dict()
    names = [n for group in state_dict["param_groups"] for n in group["param_names"]]
    assert sorted(names) == [n for n, _ in named]
    other = cases.make(name, [(n, q) for (n, _), q in zip(named, cases.copies(params), strict=True)])
    other.load_state_dict(copy.deepcopy(state_dict))
    cases.run(optimizer, 1, start=2), cases.run(other, 1, start=2)
    cases.assert_same(cases.params_of(optimizer), cases.params_of(other))


@pytest.mark.parametrize("name", [n for n in cases.FAMILY if n not in cases.PLUS])
def test_groups_have_hyperparameters_of_their_own(name):
    params = cases.parameters(SHAPES)
    own = {"weight_decay_at_y": 0.1} if name in cases.WRAPPER else {"weight_decay": 0.1}
    of_group = {f"sf_{key}": value for key, value in own.items()} if name in cases.WRAPPER else own
    optimizer = cases.make(name, [{"params": params[:1]}, {"params": params[1:], "lr": 0.01, **of_group}])
    copies = cases.copies(params)
    singles = [
        cases.make(name, copies[:1]),
        cases.make(name, copies[1:], lr=0.01, **own),
    ]
    for seed in range(9):
        grads = [torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) for p in params]

        def fill(ps, gs):
            for p, g in zip(ps, gs, strict=True):
                p.grad = g.clone()

        for o, ps, gs in (
            (optimizer, params, grads),
            (singles[0], copies[:1], grads[:1]),
            (singles[1], copies[1:], grads[1:]),
        ):
            if name in cases.CLOSURE:
                o.step(lambda ps=ps, gs=gs: fill(ps, gs))
            else:
                fill(ps, gs)
                o.step()
    cases.assert_same(params, copies)


@pytest.mark.parametrize("name", [n for n in cases.FAMILY if n not in cases.PLUS + cases.WRAPPER])
def test_maximize_is_minimizing_the_negative(name):
    up, down = (cases.make(name, cases.parameters(SHAPES), maximize=flag) for flag in (True, False))
    for seed in range(8):

        def gradients(o, sign, seed=seed):
            cases.set_gradients(cases.params_of(o), seed)
            for p in cases.params_of(o):
                p.grad.mul_(sign)

        for o, sign in ((up, -1), (down, 1)):
            if name in cases.CLOSURE:
                o.step(lambda o=o, sign=sign: gradients(o, sign))
            else:
                gradients(o, sign)
                o.step()
    cases.assert_same(cases.params_of(up), cases.params_of(down))


@pytest.mark.parametrize("name", cases.FAMILY)
def test_lr_may_be_a_tensor(name):
    number, tensor = (cases.make(name, cases.parameters(SHAPES), lr=lr) for lr in (0.25, torch.tensor(0.25)))
    cases.run(number, 8), cases.run(tensor, 8)
    for p, q in zip(cases.params_of(number), cases.params_of(tensor), strict=True):
        torch.testing.assert_close(p, q)
    assert type(cases.entry(tensor.param_groups[0], "weight_sum")) is float
    assert type(cases.entry(tensor.param_groups[0], "lr_max")) is float


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", cases.FAMILY)
def test_copies_step_on_identically(name, mode, duplicate):
    optimizer = cases.make(name, cases.parameters(SHAPES))
    cases.run(optimizer, 8)
    getattr(optimizer, mode)()
    twin = duplicate(optimizer)
    for o in (optimizer, twin):
        o.train()
        cases.run(o, 3, start=8)
    cases.assert_same(cases.params_of(optimizer), cases.params_of(twin))
    assert cases.params_of(optimizer)[0] is not cases.params_of(twin)[0]
    if name in cases.WRAPPER:
        assert twin.param_groups is twin.base.param_groups
        assert twin.momentum == optimizer.momentum


@pytest.mark.parametrize("name", cases.COMPLETE)
def test_loading_copies(name):
    optimizer = cases.make(name, cases.parameters(SHAPES))
    cases.run(optimizer, 3)
    state_dict = optimizer.state_dict()
    kept = copy.deepcopy(state_dict["state"])
    other = cases.make(name, cases.copies(cases.params_of(optimizer)))
    other.load_state_dict(state_dict)
    cases.run(other, 2, start=3)
    for number, state in kept.items():
        for key, value in state.items():
            assert torch.equal(state_dict["state"][number][key], value), key


# ---- parameters without values -------------------------------------------------------------------------


VARIANTS = [
    *[(name, {}) for name in cases.FAMILY],
    *[(name, {"capturable": True, "max_grad_norm": 1.0}) for name in cases.NATIVE],
    *[(name, {"max_grad_norm": 1.0}) for name in cases.NATIVE + cases.CLOSURE + cases.MUON],
]


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_parameters_may_be_without_values(name, options, fake):
    device = "cpu" if fake else "meta"
    with FakeTensorMode() if fake else contextlib.nullcontext():
        model = torch.nn.Linear(4, 3, device=device)
        optimizer = cases.make(name, model.parameters(), **options)

        def backward():
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4, device=device)).square().sum()
            loss.backward()
            return loss.detach()

        for _ in range(2):
            if name in cases.CLOSURE + cases.PLUS:
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
            optimizer.eval(), optimizer.train()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, device=device))]})
        if name in cases.COMPLETE:
            with optimizer.averaged():
                pass
        if not fake:  # torch's deepcopy writes through pointers that fake tensors do not have
            copy.deepcopy(optimizer).train()
            assert (
                cases.entry(optimizer.param_groups[0], "k")
                == cases.entry(optimizer.state_dict()["param_groups"][0], "k")
                == 2
            )
    if not fake and name in cases.NATIVE:
        model.to_empty(device="cpu")
        optimizer.train()
        cases.run(optimizer, 1)
        assert int(cases.entry(optimizer.param_groups[0], "k")) == 3


@pytest.mark.parametrize("name", cases.COMPLETE)
def test_a_checkpointer_sees_the_state_of_parameters_without_values(name):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = torch.nn.Linear(4, 3, device="meta")
    optimizer = cases.make(name, model.parameters())
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert {key: cases.entry(value, "z").shape for key, value in state.items()} == {
        "weight": (3, 4),
        "bias": (3,),
    }


# ---- what users of torch.optim do ----------------------------------------------------------------------


def in_another_thread(optimizer, seed):
    thread = threading.Thread(target=cases.drive, args=(optimizer, seed))
    thread.start(), thread.join()


def with_replaced_data(optimizer, seed):
    for p in cases.params_of(optimizer):
        p.data = p.data.clone()
    cases.drive(optimizer, seed)


def with_an_evaluation_in_inference_mode(optimizer, seed):
    cases.drive(optimizer, seed)
    with torch.inference_mode():
        optimizer.eval()
    with torch.no_grad():
        optimizer.train()
    with torch.inference_mode(), optimizer.averaged():
        pass


def with_gradients_in_one_buffer(optimizer, seed):
    params = cases.params_of(optimizer)
    buffer = torch.zeros(1 + sum(p.numel() for p in params))  # as gradient_as_bucket_view of DDP

    def to_buffer(*_):
        first = 1  # not aligned
        for p in params:
            view = buffer[first : first + p.numel()].view_as(p)
            p.grad = view.copy_(p.grad)
            first += p.numel()

    if type(optimizer).__name__ in cases.CLOSURE:
        optimizer.step(lambda: (cases.set_gradients(params, seed), to_buffer()))
        return
    handle = optimizer.register_step_pre_hook(to_buffer)
    cases.drive(optimizer, seed)
    handle.remove()


def with_a_parameter_of_another_layout(optimizer, seed):
    for p in cases.params_of(optimizer):
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=(torch.channels_last, torch.contiguous_format)[seed % 2])
    cases.drive(optimizer, seed)


DOINGS = [
    in_another_thread,
    with_replaced_data,
    with_an_evaluation_in_inference_mode,
    with_gradients_in_one_buffer,
    with_a_parameter_of_another_layout,
]


@pytest.mark.parametrize("doing", DOINGS)
@pytest.mark.parametrize("name", cases.COMPLETE)
def test_what_users_do_around_a_step_changes_no_bit(name, doing):
    params, others = (cases.parameters([*SHAPES, (0,)]) for _ in range(2))
    optimizer, other = cases.make(name, params), cases.make(name, others)
    for seed in range(6):
        cases.drive(optimizer, seed), doing(other, seed)
        for o in (optimizer, other):
            if seed % 3 == 1:
                o.eval(), o.train()
    cases.assert_same(params, others)


@pytest.mark.parametrize("name", cases.COMPLETE)
def test_a_model_and_its_optimizer_are_copied_together(name):
    model = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
    optimizer = cases.make(name, model.parameters())
    cases.run(optimizer, 4)
    twin, copied = copy.deepcopy((model, optimizer))
    assert {*twin.parameters()} == {*cases.params_of(copied)}
    cases.run(optimizer, 3, start=4), cases.run(copied, 3, start=4)
    cases.assert_same(model.parameters(), twin.parameters())
    cases.assert_same(
        optimizer.averaged_state_dict(model).values(), copied.averaged_state_dict(twin).values()
    )


@pytest.mark.parametrize("name", cases.COMPLETE)
def test_a_checkpoint_saved_within_averaged_resumes_exactly(name):
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    optimizer, resumed = cases.make(name, model.parameters()), cases.make(name, other.parameters())
    cases.run(optimizer, 6)
    with optimizer.averaged():
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other.load_state_dict(saved[0]), resumed.load_state_dict(saved[1])
    resumed.train()
    cases.run(optimizer, 3, start=6), cases.run(resumed, 3, start=6)
    cases.assert_same(model.parameters(), other.parameters())


@pytest.mark.parametrize("name", [n for n in cases.COMPLETE if n not in cases.PLUS + cases.MUON])
def test_groups_may_be_removed_and_added_by_hand(name):
    params, others, late = (cases.parameters(SHAPES[:3], seed=seed) for seed in (0, 0, 1))
    optimizer = cases.make(name, [{"params": [p]} for p in params])
    singles = [cases.make(name, [p]) for p in others]
    for o in (optimizer, *singles):  # a beta of its own for each group
        for group, beta in zip(o.param_groups, (0.6, 0.7, 0.8) if o is optimizer else [0.0], strict=True):
            if name in cases.NATIVE + cases.CLOSURE:
                move_beta(group, beta or (0.6, 0.7, 0.8)[singles.index(o)])

    def run(seeds):
        for seed in seeds:
            for own in ([optimizer], singles):

                def gradients(of=own, seed=seed):
                    for o in of:
                        for p in cases.params_of(o):
                            p.grad = torch.full_like(p, seed - 2.5)

                for o in own:
                    if name in cases.CLOSURE:
                        o.step(gradients)
                    else:
                        gradients()
                        o.step()

    run(range(4))
    removed = optimizer.param_groups.pop(0)
    singles.pop(0)
    optimizer.state.pop(removed["params"][0])
    for o in (optimizer, *singles):
        o.eval(), o.train()
    run(range(4, 8))
    optimizer.param_groups.reverse(), singles.reverse()
    run(range(8, 10))
    optimizer.load_state_dict(optimizer.state_dict())
    assert [cases.entry(group, "k") for group in optimizer.param_groups] == [10, 10]
    cases.assert_same(cases.params_of(optimizer), [p for o in singles for p in cases.params_of(o)])
    optimizer.param_groups.append({**removed, "params": late})
    run(range(10, 12))
    assert [cases.entry(group, "k") for group in optimizer.param_groups] == [12, 12, 6]


def move_beta(group, beta):
    """Moves the interpolation weight of a group."""
    group.update({"momentum": beta} if "momentum" in group else {"betas": (beta, group["betas"][1])})
