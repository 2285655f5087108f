"""Steps inside functions that torch.compile compiles."""

import copy
import re

import pytest
import torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._inductor.utils import run_and_get_code

import schedulefree_cpp as sf
from schedulefree_cpp import _compiled

CLASSES = [sf.SGDScheduleFree, sf.AdamWScheduleFree, sf.AdamWScheduleFreePaper, sf.RAdamScheduleFree]
SHAPES = [(6, 3), (5,), ()]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield
    torch._dynamo.reset()


def parameters(dtypes=(torch.float32,) * len(SHAPES)):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape, dtype in zip(SHAPES, dtypes, strict=True)
    ]


def loss_of(params, x):
    """Its gradients are p - x, rounded once, by every compiler."""
    return 0.5 * sum((p - x.to(p.dtype)).square().sum().float() for p in params)


def optimize(cls, params, **options):
    optimizer = cls(params, lr=0.1, **options)
    optimizer.train()
    return optimizer


def training_step(params, optimizer):
    def step(x):
        loss = loss_of([p for p in params if p.requires_grad], x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def inputs(n):
    return [torch.tensor(v) for v in torch.linspace(-1, 1, n).tolist()]


def move_lr(optimizer, i):
    for n, group in enumerate(optimizer.param_groups):
        group["lr"] = 0.1 * (1 + (i + n) % 7)


def plain(group):
    return {k: v for k, v in group.items() if k != "params"}


def assert_same(optimizer, other):
    for group, expected in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert plain(group) == plain(expected)
        assert {k: type(v) for k, v in group.items()} == {k: type(v) for k, v in expected.items()}
        for p, q in zip(group["params"], expected["params"], strict=True):
            assert torch.equal(p, q)
            state, wanted = optimizer.state.get(p, {}), other.state.get(q, {})
            assert list(state) == list(wanted)
            for name, value in wanted.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(state[name], value), name
                else:
                    assert state[name] == value, name


def twins(cls, options, dtypes=(torch.float32,) * len(SHAPES)):
    params, copies = parameters(dtypes), parameters(dtypes)
    return params, optimize(cls, params, **options), copies, optimize(cls, copies, **options)


def graphs(function):
    """How many graphs there are of a function that is one each time."""
    return len(_debug_get_cache_entry_list(function.__code__))


def compare(function, optimizer, eager, other, steps, *, args=()):
    """Takes the same steps with both, with a learning rate that moves, and expects the same of both."""
    for i, x in enumerate(inputs(steps)):
        move_lr(optimizer, i)
        move_lr(other, i)
        function(x, *args)
        eager(x)
    assert_same(optimizer, other)
    assert int(optimizer.param_groups[0]["k"]) == steps


# ---- a whole training step ---------------------------------------------------------------------------

_global_params = _global_optimizer = None


def _step_of_globals(x):
    loss = loss_of(_global_params, x)
    loss.backward()
    _global_optimizer.step()
    _global_optimizer.zero_grad()
    return loss.detach()


def _step_of_arguments(x, params, optimizer):
    return training_step(params, optimizer)(x)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("held", ["global", "closure", "argument"])
def test_a_compiled_training_step_is_two_graphs_and_equals_eager(held, cls, capturable, monkeypatch):
    params, optimizer, copies, other = twins(cls, {"capturable": capturable, "weight_decay": 0.01})
    args = ()
    if held == "global":
        monkeypatch.setitem(globals(), "_global_params", params)
        monkeypatch.setitem(globals(), "_global_optimizer", optimizer)
        step = _step_of_globals
    elif held == "closure":
        step = training_step(params, optimizer)
    else:
        step, args = _step_of_arguments, (params, optimizer)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    compare(compiled, optimizer, training_step(copies, other), other, 200, args=args)
    assert graphs(step) <= 2


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_the_generated_code_calls_one_operator_and_copies_no_state(cls, capturable, monkeypatch):
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    params, optimizer, copies, other = twins(cls, {"capturable": capturable}, dtypes)
    step = torch.compile(training_step(params, optimizer), fullgraph=True)
    eager = training_step(copies, other)
    stand_ins = []
    put = _compiled._stand_in
    monkeypatch.setattr(
        _compiled,
        "_stand_in",
        lambda stack, homes, known, given: stand_ins.extend(
            a for a, b in zip(known, given, strict=True) if a is not b
        )
        or put(stack, homes, known, given),
    )
    generated = []
    for i, x in enumerate(inputs(200)):
        move_lr(optimizer, i)
        move_lr(other, i)
        eager(x)
        if i < 3:
            _, code = run_and_get_code(step, x)
            generated.extend(code)
        else:
            step(x)
    assert_same(optimizer, other)
    assert len(generated) <= 3
    call = re.search(
        r"schedulefree_cpp\.compiled_step_\.default\(\d+, \[(.*?)\], \[(.*?)\], \[(.*?)\], ", generated[-1]
    )
    y, _, written = (group.split(", ") for group in call.groups())
    assert len(y) == len(params)
    assert len(written) >= sum(len(state) for state in optimizer.state.values())
    # What the function was given, not buffers of its own.
    assert all(name.startswith("arg") for name in y + written)
    assert generated[-1].count("schedulefree_cpp.") == generated[-1].count("schedulefree_cpp.compiled_step_")
    assert not re.search(r"copy_\(|\.clone\(|cpp_fused_\w*(clone|copy__)", generated[-1])
    assert stand_ins == []


@pytest.mark.parametrize("function_value", ["tensor", "step_func"])
def test_schedule_free_plus_takes_its_loss_from_the_compiled_function(function_value):
    params, optimizer, copies, other = twins(sf.AdamCScheduleFreePlus, {})

    def training(params, optimizer):
        def step(x):
            loss = loss_of(params, x)
            loss.backward()
            if function_value == "tensor":
                optimizer.step(function_value=loss)
            else:
                optimizer.step_func(loss)
            optimizer.zero_grad()
            return loss.detach()

        return step

    step = training(params, optimizer)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    compare(compiled, optimizer, training(copies, other), other, 40)
    assert graphs(step) <= 2
