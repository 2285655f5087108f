"""Train and eval mode: what evaluation must not change, and how to have ``x`` without switching."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import cases
import pytest
import schedulefree_cpp
import torch

SHAPES = [(3, 5), (), (0,), (1030,), (2, 3, 4, 4)]


def parameters(dtype=torch.float32):
    """Magnitudes from 1e-4 to 10, so that x often is in another binade than y; one channels-last."""
    params = cases.parameters(SHAPES, dtype)
    for p in params:
        spread = 10 ** torch.empty(p.shape).uniform_(-4, 1, generator=torch.Generator().manual_seed(1))
        p.data = (p.detach().float() * spread).to(dtype)
    params[-1].data = params[-1].data.contiguous(memory_format=torch.channels_last)
    return params


# ---- evaluation never changes training -----------------------------------------------------------------
#
# At random steps, through every kind of checkpoint: test_exact.py.


@pytest.mark.parametrize(
    "order", ["load, train", "train, load, train", "eval, load, train", "train, load, eval, train"]
)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", cases.SWITCHED)
def test_every_order_of_loading_and_switching_resumes_exactly(name, mode, order):
    optimizer = cases.make(name, parameters(), lr=0.1)
    cases.run(optimizer, 8)
    getattr(optimizer, mode)()
    other = cases.make(name, cases.parameters(SHAPES, seed=9), lr=0.1)
    for call in order.split(", "):
        if call == "load":
            for p, q in zip(cases.params_of(other), cases.params_of(optimizer), strict=True):
                p.data = q.detach().clone()
            other.load_state_dict(optimizer.state_dict())
        else:
            getattr(other, call)()
    optimizer.train()
    cases.run(optimizer, 3, start=8), cases.run(other, 3, start=8)
    cases.assert_same(cases.params_of(optimizer), cases.params_of(other))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_model_of_other_strides_resumes_exactly(memory_format):
    params = cases.parameters([(8, 6, 5, 5)])
    params[0].data = params[0].data.contiguous(memory_format=memory_format)
    optimizer = cases.make("AdamWScheduleFree", params, lr=0.1)
    cases.run(optimizer, 5)
    y = params[0].detach().clone()
    optimizer.eval()
    others = [torch.nn.Parameter(params[0].detach().contiguous())]
    other = cases.make("AdamWScheduleFree", others, lr=0.1)
    other.load_state_dict(optimizer.state_dict())
    other.train()
    cases.assert_same(others, [y])


def test_a_change_made_in_eval_mode_is_kept():
    params = parameters()
    optimizer = cases.make("AdamWScheduleFree", params, lr=0.1)
    cases.run(optimizer, 5)
    optimizer.eval()
    changed = [torch.full_like(p, 7.0) for p in params]
    for p, c in zip(params, changed, strict=True):
        p.data.copy_(c)
    optimizer.train()
    for p, c in zip(params, changed, strict=True):
        z = optimizer.state[p]["z"]
        torch.testing.assert_close(p.detach(), 0.9 * c + 0.1 * z)


@pytest.mark.parametrize("name", cases.NATIVE + cases.MUON)
def test_a_beta_moved_in_eval_mode_builds_the_y_of_the_next_step(name):
    params = parameters(torch.float64)
    optimizer, twin = cases.make(name, params), cases.make(name, cases.copies(params))
    for o in (optimizer, twin):
        cases.run(o, 8)
    y = cases.copies(params)
    optimizer.eval()
    for o in (optimizer, twin):
        cases.set_beta(o, 0.5)
    optimizer.train()
    for p, q in zip(params, y, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)
    for o in (optimizer, twin):
        cases.run(o, 1, start=8)
        o.eval()
    x = cases.copies(params)
    optimizer.train()
    for p, q, x_ in zip(params, cases.params_of(twin), x, strict=True):
        torch.testing.assert_close(x_, q, rtol=1e-12, atol=1e-12)
        z = optimizer.state[p]["z"]
        torch.testing.assert_close(p.detach(), 0.5 * x_.detach() + 0.5 * z, rtol=1e-12, atol=1e-12)


# Of a swap from x, only what becomes a power of two may move: three elements of these.
def test_a_parameter_that_rests_while_beta_moves_is_settled():
    resting, other = cases.parameters([(4_000_000,), (3,)], torch.bfloat16)
    optimizer = schedulefree_cpp.AdamWScheduleFree([resting, other], lr=0.1, state_bits=24)
    optimizer.train()
    cases.run(optimizer, 3)
    cases.set_beta(optimizer, 0.95)
    cases.set_gradients([other], 5)
    resting.grad = None
    optimizer.step()
    before = cases.copies([resting, *optimizer.state[resting].values()])
    optimizer.eval()
    optimizer.train()
    cases.assert_same([resting, *optimizer.state[resting].values()], before)


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "AdamCScheduleFreePlus"])
def test_a_parameter_that_rests_while_beta_moves_is_interpolated_anew_and_keeps_its_x(name):
    params = cases.parameters(SHAPES, torch.float64)
    kwargs = {"sf_beta1_anneal_steps": 10} if name in cases.PLUS else {}
    optimizer = cases.make(name, params, **kwargs)
    resting = params[0]

    def step(o, seed, rest):
        ps = cases.params_of(o)
        cases.set_gradients(ps, seed)
        if rest:
            ps[0].grad = None
        if name in cases.PLUS:
            o.step_func(1.0)
        else:
            cases.set_beta(o, 0.95 - 0.05 * seed)
            o.step()

    for seed in range(3):
        step(optimizer, seed, False)
    twin = copy.deepcopy(optimizer)
    twin.eval()
    x, z = cases.params_of(twin)[0].detach().clone(), optimizer.state[resting]["z"].clone()
    betas = []
    for seed in range(3, 6):
        step(optimizer, seed, True)
        # y of any element: y = beta*x + (1-beta)*z
        beta = float(((resting.detach() - z) / (x - z)).mean())
        betas.append(beta)
        torch.testing.assert_close(resting.detach(), beta * x + (1 - beta) * z, rtol=1e-12, atol=1e-12)
        assert torch.equal(optimizer.state[resting]["z"], z)
        for _ in range(2):
            optimizer.eval()
            torch.testing.assert_close(resting.detach(), x, rtol=1e-12, atol=1e-12)
            optimizer.train()
    if name in cases.PLUS:
        assert betas == sorted(betas)
        assert betas[0] < betas[-1]
    else:
        assert betas == pytest.approx([0.80, 0.75, 0.70], rel=1e-9)
    other = cases.make(name, cases.copies(params), **kwargs)
    other.load_state_dict(optimizer.state_dict())
    step(optimizer, 6, False), step(other, 6, False)
    cases.assert_same(params, cases.params_of(other))


# ---- x without switching -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", cases.SWITCHED)
def test_averaged_is_x_inside_and_exact_outside(name, dtype):
    optimizer = cases.make(name, parameters(dtype), lr=0.1)
    cases.run(optimizer, 8)
    params = cases.params_of(optimizer)
    y, twin = cases.copies(params), copy.deepcopy(optimizer)
    twin.eval()
    for _ in range(2):
        with optimizer.averaged():
            cases.assert_same(params, cases.params_of(twin))
            with optimizer.averaged():
                cases.assert_same(params, cases.params_of(twin))
            with pytest.raises(RuntimeError, match="eval mode"):
                cases.drive(optimizer, 0)
        cases.assert_same(params, y)
    with pytest.raises(ValueError, match="from inside"), optimizer.averaged():
        raise ValueError("from inside")
    cases.assert_same(params, y)
    optimizer.eval()
    with optimizer.averaged():
        pass
    cases.assert_same(params, cases.params_of(twin))
    assert not cases.entry(optimizer.param_groups[0], "train_mode")


class Model(torch.nn.Module):
    """Tied weights, a frozen parameter, buffers, a parameter that no optimizer has."""

    def __init__(self, dtype):  # noqa: D107
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(11, 6)
        self.head = torch.nn.Linear(6, 11)
        self.head.weight = self.embedding.weight
        self.norm = torch.nn.BatchNorm1d(6)
        self.other = torch.nn.Parameter(torch.ones(2))
        self.to(dtype)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", cases.COMPLETE)
def test_averaged_state_dict(name, dtype, mode):
    model = Model(dtype)
    trained = [p for n, p in model.named_parameters() if n != "other"]
    trained[1].requires_grad_(False)
    optimizer = cases.make(name, trained, lr=0.1)
    cases.run(optimizer, 8)
    if mode == "eval":
        optimizer.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    averaged = optimizer.averaged_state_dict(model)
    cases.assert_same(model.state_dict().values(), before.values())
    if name in cases.SWITCHED:
        optimizer.eval()
    expected = model.state_dict()
    assert list(averaged) == list(expected)
    assert averaged._metadata == expected._metadata
    for key, value in expected.items():
        cases.assert_same([averaged[key]], [value])
        assert averaged[key].dtype == value.dtype
        assert not averaged[key].requires_grad
        assert averaged[key].data_ptr() != value.data_ptr()
    assert averaged["head.weight"].data_ptr() == averaged["embedding.weight"].data_ptr()
    Model(dtype).load_state_dict(averaged)


def test_averaged_state_dict_of_a_module_that_copies():
    model = torch.nn.Linear(5, 4)
    optimizer = cases.make("SGDScheduleFree", model.parameters())
    cases.run(optimizer, 3)
    expected = optimizer.averaged_state_dict(model)
    model.register_state_dict_post_hook(lambda m, s, *_: s.update({k: v.clone() for k, v in s.items()}))
    cases.assert_same(optimizer.averaged_state_dict(model).values(), expected.values())


def test_averaged_state_dict_needs_no_more_memory_than_it_takes():
    model = torch.nn.Sequential(*(torch.nn.Linear(500, 500, bias=False) for _ in range(8)))
    optimizer = cases.make("AdamWScheduleFree", model.parameters())
    cases.run(optimizer, 1)
    with torch.profiler.profile(profile_memory=True) as profile:
        averaged = optimizer.averaged_state_dict(model)
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    result = sum(t.numel() * t.element_size() for t in averaged.values())
    assert result <= allocated <= 1.01 * result


# ---- a model and an optimizer that were saved in different modes ---------------------------------------


def checkpoint(name, dtype, model_mode, optimizer_mode):
    optimizer = cases.make(name, parameters(dtype), lr=0.1)
    cases.run(optimizer, 8)
    getattr(optimizer, model_mode)()
    model = cases.copies(cases.params_of(optimizer))
    getattr(optimizer, optimizer_mode)()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return optimizer, model, torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(("model_mode", "optimizer_mode"), [("eval", "train"), ("train", "eval")])
@pytest.mark.parametrize("name", cases.SWITCHED)
def test_a_model_and_an_optimizer_of_different_modes_are_refused(name, model_mode, optimizer_mode, dtype):
    optimizer, model, state = checkpoint(name, dtype, model_mode, optimizer_mode)
    other = cases.make(name, model, lr=0.1)
    other.load_state_dict(state)
    has = {"eval": r"eval mode \(x, the average\)", "train": r"train mode \(y\)"}
    message = f"the parameters are those of {has[model_mode]}, but the loaded optimizer state says {has[optimizer_mode]}"
    loaded = cases.copies(model)
    for use in (other.train, other.eval, lambda: cases.drive(other, 8), lambda: other.averaged().__enter__()):
        with pytest.raises(RuntimeError, match=message):
            use()
        cases.assert_same(model, loaded)
    # The way out that the message names.
    for group in other.param_groups:
        group["sf_train_mode" if name in cases.WRAPPER else "train_mode"] = model_mode == "train"
    for o in (optimizer, other):
        o.train()
        cases.run(o, 3, start=8)
    for p, q in zip(cases.params_of(optimizer), model, strict=True):
        torch.testing.assert_close(
            p, q, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-3 if dtype.itemsize == 2 else 1e-6
        )


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", cases.SWITCHED)
def test_what_belongs_together_is_accepted(name, mode):
    optimizer, model, state = checkpoint(name, torch.float32, mode, mode)
    for change in (
        lambda: state,
        lambda: {k: v for k, v in state.items() if k != "schedulefree_cpp"},
    ):
        other = cases.make(name, cases.copies(model), lr=0.1)
        other.load_state_dict(change())
        other.train()
        cases.run(other, 1, start=8)
    # Parameters of neither mode: their user knows.
    strangers = cases.make(name, cases.parameters(SHAPES, seed=9), lr=0.1)
    strangers.load_state_dict(state)
    strangers.train()
    # The model may be loaded after the optimizer.
    late = cases.make(name, cases.parameters(SHAPES, seed=9), lr=0.1)
    late.load_state_dict(state)
    for p, q in zip(cases.params_of(late), model, strict=True):
        p.data = q.detach().clone()
    late.train()
    optimizer.train()
    cases.assert_same(cases.params_of(late), cases.params_of(optimizer))


@pytest.mark.parametrize("name", cases.SWITCHED)
def test_the_sample_is_handed_on_until_it_has_been_used(name):
    # accelerate loads an optimizer's own state dict when it prepares it.
    _, model, state = checkpoint(name, torch.float32, "eval", "train")
    other = cases.make(name, model, lr=0.1)
    other.load_state_dict(state)
    other.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match="saved in one mode and the optimizer in the other"):
        other.train()


def test_a_closure_form_cannot_take_the_model_of_train_mode():
    _, model, state = checkpoint("SGDScheduleFree", torch.float32, "train", "train")
    other = cases.make("SGDScheduleFreeClosure", model, lr=0.1)
    other.load_state_dict(state)
    with pytest.raises(
        RuntimeError, match=r"load it into the class that has modes, call eval\(\) and save it again"
    ):
        cases.drive(other, 8)


@pytest.mark.parametrize("name", cases.NATIVE + cases.MUON)
def test_state_dict_hooks_may_return_and_take_anything(name):
    _, model, state = checkpoint(name, torch.float32, "eval", "train")
    other = cases.make(name, model, lr=0.1)
    other.register_load_state_dict_pre_hook(lambda o, s: s["wrapped"])
    other.load_state_dict({"wrapped": state})
    other.register_state_dict_post_hook(lambda o, s: {"wrapped": s})
    assert "schedulefree_cpp" in other.state_dict()["wrapped"]
    with pytest.raises(RuntimeError, match="saved in one mode"):
        other.train()


def test_the_fingerprint_is_small():
    params = cases.parameters([(300, 300)] * 200)
    optimizer = cases.make("SGDScheduleFree", params)
    assert "fingerprint" not in optimizer.state_dict().get("schedulefree_cpp", {})
    cases.run(optimizer, 2)
    fingerprint = optimizer.state_dict()["schedulefree_cpp"]["fingerprint"]
    assert len(fingerprint["params"]) <= 64
    assert len(fingerprint["y"]) == len(fingerprint["x"]) <= 512


# ---- parameters that move ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("name", "before", "after"), cases.matrix(cases.SWITCHED, cases.DTYPES, cases.DTYPES)
)
def test_state_follows_a_parameter_to_its_dtype(name, before, after, mode):
    model = torch.nn.Linear(5, 4).to(before)
    params = list(model.parameters())
    if name in cases.WRAPPER:  # around an optimizer without state, which could not follow
        optimizer = getattr(schedulefree_cpp, name)(torch.optim.SGD(params, lr=0.01))
        optimizer.train()
    else:
        optimizer = cases.make(name, params, lr=0.01)
    cases.run(optimizer, 8)
    getattr(optimizer, mode)()
    model.to(after)
    assert [id(p) for p in params] == [id(p) for p in model.parameters()]
    optimizer.train()
    cases.run(optimizer, 3, start=8)
    optimizer.eval(), optimizer.train()
    wide = torch.float64 if after == torch.float64 else torch.float32
    for p in params:
        assert p.isfinite().all()
        state, half = cases.state(optimizer, p), after in (torch.bfloat16, torch.float16)
        assert state["z"].dtype == wide
        assert ("y_lo" in state) == (half and name != "ScheduleFreeWrapperReference")


@pytest.mark.parametrize(
    ("name", "before", "after"),
    cases.matrix([*cases.NATIVE, "ScheduleFreeWrapper"], cases.DTYPES, cases.DTYPES),
)
def test_a_model_that_was_cast_can_be_saved(name, before, after):
    model = torch.nn.Linear(5, 4).to(before)
    optimizer = cases.make(name, model.parameters(), lr=0.01)
    cases.run(optimizer, 8)
    for switch in (optimizer.train, optimizer.eval):
        switch()
        model.to(after)
        optimizer.state_dict()
        averaged = optimizer.averaged_state_dict(model)
        assert {t.dtype for t in averaged.values()} == {after}
        model.to(before)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("name", [*cases.NATIVE, "ScheduleFreeWrapper"])
def test_a_copy_follows_a_cast_from_one_format_of_16_bits_to_the_other(name, how):
    params = cases.parameters([(300,), (40,)], torch.float16)
    optimizer = cases.make(name, params, lr=0.01)
    cases.run(optimizer, 3)
    both = optimizer, params
    other, others = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    for each, own in (both, (other, others)):
        for p in own:
            p.data = p.data.bfloat16()
        each.eval(), each.train()
    cases.assert_same(cases.states_of(optimizer), cases.states_of(other))


def test_a_refused_evaluation_is_undone():
    params = cases.parameters([(300,)]) + cases.parameters([(4,)], torch.bfloat16)
    optimizer = cases.make("AdamWScheduleFree", params)
    cases.run(optimizer, 3)
    y, good = params[0].detach().clone(), params[1].data
    params[1].data = torch.zeros(6, dtype=torch.bfloat16)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="expected shape"):
            optimizer.eval()
        cases.assert_same(params[:1], [y])
        assert optimizer.param_groups[0]["train_mode"]
    params[1].data = good
    optimizer.eval(), optimizer.train()
    cases.assert_same(params[:1], [y])


def test_a_step_that_an_operator_refuses_ends_with_the_groups_before():
    params = cases.parameters([(3,), (5,)])
    twins = cases.copies(params)
    optimizer, twin = (
        cases.make("SGDScheduleFree", [{"params": ps[:1]}, {"params": ps[1:]}]) for ps in (params, twins)
    )
    cases.run(twin, 1)
    cases.set_gradients(params, 0)
    good = params[1].data
    params[1].data = torch.zeros(1).expand(5)
    with pytest.raises(RuntimeError, match="overlaps itself"):
        optimizer.step()
    cases.assert_same(params[:1], twins[:1])
    assert [g["k"] for g in optimizer.param_groups] == [1, 0]
    params[1].data = good
    assert params[1] not in optimizer.state
    optimizer.eval(), optimizer.train()
    params[0].grad = None
    optimizer.step()
    cases.assert_same(params[1:], twins[1:])
    assert [g["k"] for g in optimizer.param_groups] == [1, 1]  # the first had no gradient


def test_a_sparse_gradient_beside_another_dtype_is_refused_before_anything_changes():
    params = cases.parameters([(3, 2)]) + cases.parameters([(4, 2)], torch.bfloat16)
    optimizer = cases.make("AdamWScheduleFree", params)
    cases.run(optimizer, 1)
    before = cases.copies(params)
    cases.set_gradients(params, 1)
    params[1].grad = params[1].grad.to_sparse()
    with pytest.raises(RuntimeError, match="dense"):
        optimizer.step()
    cases.assert_same(params, before)


def test_a_group_is_added_in_the_mode_of_the_others():
    optimizer = cases.make("SGDScheduleFree", cases.parameters([(3,)]))
    cases.run(optimizer, 3)
    optimizer.eval()
    optimizer.add_param_group({"params": cases.parameters([(4,)])})
    assert [g["train_mode"] for g in optimizer.param_groups] == [False, False]
    optimizer.train()
    assert [g["train_mode"] for g in optimizer.param_groups] == [True, True]


def test_averaged_may_meet_a_new_group_inside():
    params, late = cases.parameters([(3,)]), cases.parameters([(4,)], seed=1)
    optimizer = cases.make("SGDScheduleFree", params)
    cases.run(optimizer, 3)
    with optimizer.averaged():
        optimizer.add_param_group({"params": late})
    assert [g["train_mode"] for g in optimizer.param_groups] == [True, True]


def test_state_that_cannot_follow_is_refused_by_name():
    params = cases.parameters([(3, 4)])
    optimizer = cases.make("AdamWScheduleFree", params)
    cases.run(optimizer, 2)
    params[0].data = torch.zeros(5)
    params[0].grad = torch.zeros(5)
    with pytest.raises(RuntimeError, match=r"z\[0\]: expected shape \[5\] like y\[0\], got \[3, 4\]"):
        optimizer.step()
    with pytest.raises(RuntimeError, match=r"z\[0\]: expected shape \[5\] like y\[0\], got \[3, 4\]"):
        optimizer.eval()


# ---- a step within backward ----------------------------------------------------------------------------


def train(optimizer, model, steps, *, in_backward, closure=False):
    for i in range(steps):
        batch = torch.randn(6, 7, generator=torch.Generator().manual_seed(i))

        def forward_backward(batch=batch):
            loss = model(batch).square().mean()
            loss.backward()
            if in_backward:
                assert all(p.grad is None for p in model.parameters())
            return loss.item()

        if closure:
            optimizer.step(forward_backward)
        else:
            forward_backward()
            optimizer.step()
        if i % 4 == 2:
            with optimizer.averaged():
                pass
        optimizer.param_groups[0]["lr"] *= 0.9
        if not in_backward:
            optimizer.zero_grad()


def models():
    torch.manual_seed(0)
    first = torch.nn.Sequential(torch.nn.Linear(7, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))
    return first, copy.deepcopy(first)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("name", cases.NATIVE + cases.MUON)
def test_a_step_within_backward_is_the_step(name, closure):
    plain, hooked = models()
    optimizers = [
        cases.make(name, [{"params": m[0].parameters()}, {"params": m[2].parameters(), "lr": 0.02}])
        for m in (plain, hooked)
    ]
    train(optimizers[0], plain, 10, in_backward=False)
    handle = optimizers[1].step_in_backward()
    train(optimizers[1], hooked, 10, in_backward=True, closure=closure)
    cases.assert_same(plain.parameters(), hooked.parameters())
    groups = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in optimizers]
    assert groups[0] == groups[1]
    handle.remove()
    for optimizer, model in zip(optimizers, (plain, hooked), strict=True):
        train(optimizer, model, 2, in_backward=False)
    cases.assert_same(plain.parameters(), hooked.parameters())


def test_a_step_within_backward_keeps_nobody_alive():
    params = cases.parameters(SHAPES)
    optimizer = cases.make("SGDScheduleFree", params)
    optimizer.step_in_backward()
    reference = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert reference() is None
    sum(p.sum() for p in params).backward()
    assert params[0].grad is not None


def test_an_open_step_is_not_evaluated_saved_or_copied():
    params = cases.parameters(SHAPES)
    optimizer = cases.make("AdamWScheduleFree", params)
    cases.set_gradients(params, 0)
    optimizer.step_parameter(params[0])
    for use in (optimizer.eval, optimizer.state_dict, lambda: copy.deepcopy(optimizer)):
        with pytest.raises(
            RuntimeError,
            match=r"between step_parameter\(\) and the step\(\) that ends the iteration.*Call optimizer.step",
        ):
            use()
    with pytest.raises(RuntimeError, match="taken this iteration's step already"):
        optimizer.step_parameter(params[0])
    with pytest.raises(ValueError, match="Invalid p: expected a parameter of this optimizer"):
        optimizer.step_parameter(torch.zeros(3))
    params[1].grad = None
    optimizer.step_parameter(params[1])
    optimizer.step()
    assert optimizer.param_groups[0]["k"] == 1
    optimizer.eval()
    with pytest.raises(RuntimeError, match="eval mode"):
        optimizer.step_parameter(params[0])


# ---- the step by which a checkpointer sees the state ---------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", cases.COMPLETE)
def test_reading_a_fresh_optimizers_state_changes_nothing(name, train):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    def build():
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        return model, cases.make(name, model.parameters())

    (plain, a), (model, b) = build(), build()
    if not train and name in cases.SWITCHED:
        b.eval()
    state = get_optimizer_state_dict(model, b)
    assert set(state["state"]) == {"weight", "bias"}
    assert cases.entry(b.param_groups[0], "k") == 0
    b = copy.deepcopy(b)
    model.weight, model.bias = cases.params_of(b)
    for m in (plain, model):
        m.load_state_dict({"weight": torch.ones(3, 4), "bias": torch.zeros(3)})
    if name in cases.SWITCHED:
        b.eval(), b.train()
        cases.assert_same(b.averaged_state_dict(model).values(), plain.state_dict().values())
    cases.run(a, 8), cases.run(b, 8)
    cases.assert_same(plain.parameters(), model.parameters())
    assert cases.entry(a.param_groups[0], "k") == cases.entry(b.param_groups[0], "k") == 8


@pytest.mark.parametrize("name", cases.FAMILY)
def test_a_first_step_with_gradients_counts_also_at_learning_rate_zero(name):
    optimizer = cases.make(name, cases.parameters([(3,)]), lr=0.0)
    cases.run(optimizer, 1)
    assert cases.entry(optimizer.param_groups[0], "k") == 1


@pytest.mark.parametrize("steps_first", [False, True])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (a, b)
        for a in cases.DTYPES
        for b in cases.DTYPES
        if a != b and torch.finfo(a).bits != torch.finfo(b).bits
    ],
)
@pytest.mark.parametrize("name", cases.NATIVE + cases.MUON)
def test_a_step_refuses_state_that_has_not_followed(name, before, after, steps_first):
    model = torch.nn.Linear(5, 4).to(before)
    params = list(model.parameters())
    groups = [{"params": params[:1]}, {"params": params[1:]}] if steps_first else params
    optimizer = cases.make(name, groups, lr=0.01)
    cases.run(optimizer, 8)
    model.to(after)
    kept = cases.copies(params)
    cases.set_gradients(params, 8)
    with pytest.raises(
        RuntimeError, match=r"moved since its state was made: optimizer.train\(\) moves the state"
    ):
        optimizer.step()
    cases.assert_same(params, kept)
    optimizer.train()
    optimizer.step()
    assert optimizer.param_groups[0]["k"] == 9


# ---- a trainer that trains copies ----------------------------------------------------------------------


@pytest.mark.parametrize("replace", [lambda p: [p.detach().clone().requires_grad_()], lambda p: []])
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "ScheduleFreeWrapper"])
def test_eval_warns_where_a_trainer_has_replaced_the_parameters(name, replace):
    model = torch.nn.Linear(5, 4, bias=False)
    optimizer = cases.make(name, model.parameters(), lr=0.01)
    cases.run(optimizer, 3)
    optimizer.eval(), optimizer.train()
    optimizer.param_groups[0]["params"] = replace(model.weight)
    optimizer.train()
    with pytest.warns(RuntimeWarning, match="replaced them by copies"):
        optimizer.eval()
    optimizer.train()
    with pytest.warns(RuntimeWarning, match="replaced them by copies"), optimizer.averaged():
        pass


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "ScheduleFreeWrapper"])
def test_a_copy_of_an_optimizer_warns_too_where_a_trainer_replaces_its_parameters(name):
    optimizer = cases.make(name, cases.parameters([(3,)]), lr=0.01)
    copied = copy.deepcopy(optimizer)
    copied.param_groups[0]["params"] = [torch.ones(3, requires_grad=True)]
    with pytest.warns(RuntimeWarning, match="replaced them by copies"):
        copied.eval()


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "ScheduleFreeWrapper"])
def test_eval_is_silent_about_tensors_and_other_parameters(name):
    plain = cases.make(name, [torch.ones(3, requires_grad=True)], lr=0.01)
    replaced = cases.make(name, cases.parameters([(3,)]), lr=0.01)
    replaced.param_groups[0]["params"] = cases.parameters([(3,)])
    for optimizer in (plain, replaced):
        cases.run(optimizer, 3)
        optimizer.eval()


@pytest.mark.parametrize("name", cases.NATIVE)
def test_a_cast_parameter_is_refused_beside_one_that_starts_now(name):
    params = cases.parameters([(3,), (4,)])
    optimizer = cases.make(name, params)
    cases.set_gradients(params[:1], 0)
    optimizer.step()
    for p in params:
        p.data, p.grad = p.data.bfloat16(), torch.ones_like(p, dtype=torch.bfloat16)
    before = cases.copies(params)
    with pytest.raises(RuntimeError, match=r"optimizer.train\(\) moves the state along"):
        optimizer.step()
    cases.assert_same(params, before)
    optimizer.train()
    optimizer.step()
    assert all("y_lo" in optimizer.state[p] for p in params)
