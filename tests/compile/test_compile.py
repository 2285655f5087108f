"""Steps inside functions that torch.compile compiles."""

import copy
import re

import cases
import pytest
import schedulefree_cpp as sf
import torch
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._inductor.utils import run_and_get_code

pytestmark = [
    pytest.mark.compile,
    # The compiler imports parts of torch that are deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning"),
]

CLASSES = [sf.SGDScheduleFree, sf.AdamWScheduleFree, sf.AdamWScheduleFreePaper, sf.RAdamScheduleFree]
SHAPES = [(6, 3), (5,), ()]
FLOAT = (torch.float32,) * len(SHAPES)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield
    torch._dynamo.reset()


def parameters(dtypes=FLOAT):
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
    # Of few bits: the compiler leaves out conversions to bfloat16.
    return [torch.tensor(v) for v in torch.linspace(-1, 1, n).bfloat16().tolist()]


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


def twins(cls, options, dtypes=FLOAT):
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
    assert graphs(step) <= 2  # the first makes the state


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_the_generated_code_calls_the_operator_with_the_state_itself(cls, capturable):
    dtypes = (torch.float32, torch.bfloat16, torch.float32)
    params, optimizer, copies, other = twins(cls, {"capturable": capturable}, dtypes)
    step = torch.compile(training_step(params, optimizer), fullgraph=True)
    eager = training_step(copies, other)
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
    code = generated[-1]
    operator = "sgd_step_" if cls is sf.SGDScheduleFree else "adamw_step_"
    assert code.count(f"schedulefree_cpp.{operator}.default(") == 1
    call = re.search(rf"schedulefree_cpp\.{operator}\.default\((.*)\)", code).group(1)
    y, y_lo, grad, *state = (names.split(", ") for names in re.findall(r"\[(.*?)\]", call))
    assert len(y) == len(grad) == len(params)
    lists = [y, y_lo, *(names for names in state if names != [""])]
    assert len(lists) == (3 if operator == "sgd_step_" else 4)
    # What the function was given, not buffers of its own.
    assert all(name.startswith("arg") for names in lists for name in names)
    assert not re.search(r"copy_\(|\.clone\(|cpp_fused_\w*(clone|copy__)", code)


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


@pytest.mark.parametrize("kind", [float, torch.Tensor.detach])
def test_schedule_free_plus_takes_the_loss_of_a_closure(kind):
    params, optimizer, copies, other = twins(sf.AdamCScheduleFreePlus, {})

    def training(params, optimizer):
        def step(x):
            def closure():
                optimizer.zero_grad()
                loss = loss_of(params, x)
                loss.backward()
                return kind(loss.detach())

            return torch.as_tensor(optimizer.step(closure))

        return step

    compiled = torch.compile(training(params, optimizer), backend="aot_eager")
    compare(compiled, optimizer, training(copies, other), other, 20)


def test_groups_of_schedule_free_plus_count_the_steps_of_all_when_they_rest():
    counts = []
    for compiler in (lambda f: f, torch.compile(backend="aot_eager")):
        params = parameters()
        optimizer = optimize(sf.AdamCScheduleFreePlus, [{"params": [p]} for p in params])

        def step(x, params=params, optimizer=optimizer):
            loss = loss_of(params[1:], x)
            loss.backward()
            optimizer.step(function_value=loss)
            optimizer.zero_grad()

        compiled = compiler(step)
        for x in inputs(3):
            compiled(x)
        counts.append([group["k"] for group in optimizer.param_groups])
    assert counts == [[3, 3, 3]] * 2


# ---- what a step may meet ----------------------------------------------------------------------------

OPTIONS = {
    "maximize": {"maximize": True},
    "decay at z": {"weight_decay": 0.1, "decay_at": "z"},
    "warmup": {"warmup_steps": 10},
    "inner momentum": {"inner_momentum": 0.9},
    "decoupled average": {"decoupling_c": 30.0},
    "constant averaging weight": {"averaging_weight": 0.1},
    "clipping": {"max_grad_norm": 0.5},
    "capturable clipping": {"max_grad_norm": 0.5, "capturable": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_hyperparameter_works_in_compiled_code(options):
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    params, copies = parameters(dtypes), parameters(dtypes)
    if "max_grad_norm" in options:  # one dtype for the norm's sake: its sum is otherwise the same
        params, copies = parameters(), parameters()
    optimizer, other = (
        optimize(sf.AdamWScheduleFree, [{"params": ps[:1]}, {"params": ps[1:], "lr": 0.3}], **options)
        for ps in (params, copies)
    )
    params[1].requires_grad_(False)
    copies[1].requires_grad_(False)
    step, eager = training_step(params, optimizer), training_step(copies, other)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for i, x in enumerate(inputs(20)):
        for o in (optimizer, other):
            move_lr(o, i)
            o.param_groups[0]["betas"] = (0.9 - 0.01 * (i % 3), 0.99)
        if i == 10:  # unfrozen
            params[1].requires_grad_(True)
            copies[1].requires_grad_(True)
        compiled(x)
        eager(x)
    assert_same(optimizer, other)
    if "max_grad_norm" in options:
        assert torch.equal(optimizer.grad_norm, other.grad_norm)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_learning_rate_in_a_tensor_may_be_written_by_compiled_code(capturable):
    results = []
    for compiled in (False, True):
        params = parameters()
        lr = torch.full((1,), 0.1)
        optimizer = optimize(sf.SGDScheduleFree, params, capturable=capturable)
        optimizer.param_groups[0]["lr"] = lr

        def step(x, params=params, optimizer=optimizer, lr=lr):
            lr.copy_(x.abs().reshape(1) + 0.01)
            loss_of(params, x).backward()
            optimizer.step()
            optimizer.zero_grad()

        function = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
        for x in inputs(12):
            function(x)
        results.append(optimizer)
    assert_same(*results)


def test_what_compiled_code_reads_after_a_step_is_of_after_the_step():
    results = []
    for compiled in (False, True):
        params = parameters()
        optimizer = optimize(sf.AdamWScheduleFree, params)
        training_step(params, optimizer)(torch.tensor(2.0))
        state = optimizer.state[params[0]]

        def step(x, params=params, optimizer=optimizer, state=state):
            before = params[0] * 2
            with torch.no_grad():
                params[1].clamp_(-1, 1)
            loss_of(params, x).backward()
            for _ in range(2):
                optimizer.step()
            optimizer.zero_grad()
            return before.detach(), params[0].detach() * 3, state["z"] * 2, state["exp_avg_sq"] * 2

        function = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
        results.append((optimizer, [function(x) for x in inputs(8)]))
    assert_same(results[0][0], results[1][0])
    for expected, came in zip(results[0][1], results[1][1], strict=True):
        assert all(map(torch.equal, expected, came))


def test_steps_of_compiled_code_are_seen_by_autograd():
    params = parameters()
    optimizer = optimize(sf.AdamWScheduleFree, params)
    step = torch.compile(training_step(params, optimizer), backend="aot_eager", fullgraph=True)
    step(torch.tensor(1.0))
    tensors = [*params, *(t for state in optimizer.state.values() for t in state.values())]
    before = [t._version for t in tensors]
    step(torch.tensor(2.0))
    assert all(t._version > version for t, version in zip(params, before, strict=False))


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("cls", CLASSES)
def test_parameters_may_rest_while_a_scheduler_moves_beta(cls, capturable, attached):
    params, optimizer, copies, other = twins(cls, {"capturable": capturable, "weight_decay": 0.25})

    def training(params, optimizer):
        def step(x, rests):
            loss = loss_of(params[1:] if rests else params, x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step

    step, eager = training(params, optimizer), training(copies, other)
    # A scheduler replaces step() by a function that Dynamo leaves alone, of torch's optimizers too.
    compiled = torch.compile(step, backend="aot_eager", fullgraph=not attached)
    if attached:
        lrs = torch.optim.lr_scheduler
        schedulers = [lrs.OneCycleLR(o, max_lr=0.5, total_steps=100) for o in (optimizer, other)]
    betas = set()
    for i, x in enumerate(inputs(60)):
        compiled(x, i % 3 == 1)
        eager(x, i % 3 == 1)
        for o in (optimizer, other):
            if not attached:
                cases.set_beta(o, 0.95 - 0.01 * (i % 7))
        if attached:
            for scheduler in schedulers:
                scheduler.step()
        group = optimizer.param_groups[0]
        betas.add(group["momentum"] if "momentum" in group else group["betas"][0])
    assert len(betas) > 6
    assert_same(optimizer, other)
    if not attached:
        assert graphs(step) <= 4  # with and without the resting parameter, before and after its state is made
    optimizer.eval(), other.eval()
    assert_same(optimizer, other)


# ---- between calls -----------------------------------------------------------------------------------


def test_groups_and_state_may_change_between_calls():
    params, optimizer, copies, other = twins(sf.AdamWScheduleFree, {})
    later = [torch.nn.Parameter(torch.full((4,), 2.0)) for _ in range(2)]
    step = torch.compile(training_step(params, optimizer), backend="aot_eager", fullgraph=True)
    eager = training_step(copies, other)
    saved = None
    for i, x in enumerate(inputs(24)):
        if i == 6:
            saved = copy.deepcopy((optimizer.state_dict(), [p.detach().clone() for p in params]))
        if i == 10:
            for o, ps in ((optimizer, params), (other, copies)):
                o.load_state_dict(saved[0])
                with torch.no_grad():
                    for p, value in zip(ps, saved[1], strict=True):
                        p.copy_(value)
        if i == 14:
            for o, ps, p in ((optimizer, params, later[0]), (other, copies, later[1])):
                ps.append(p)
                o.add_param_group({"params": [p]})
        if i == 18:
            optimizer.eval()
            optimizer.train()
            other.eval()
            other.train()
        if i == 20:
            optimizer.param_groups[0]["params"] = list(optimizer.param_groups[0]["params"])
        step(x)
        eager(x)
    assert_same(optimizer, other)


def test_replaced_parameters_are_refused_once():
    params = parameters()
    optimizer = optimize(sf.AdamWScheduleFree, params)
    step = torch.compile(training_step(params, optimizer), backend="aot_eager", fullgraph=True)
    step(torch.tensor(1.0))
    step(torch.tensor(1.0))
    optimizer.param_groups[0]["params"] = params[:2]
    before = [p.detach().clone() for p in params]
    with pytest.raises(
        RuntimeError, match=r"parameters, .* of a group were replaced after a function that calls"
    ):
        step(torch.tensor(1.0))
    assert all(map(torch.equal, before, params))
    assert optimizer.param_groups[0]["k"] == 2
    step(torch.tensor(1.0))
    assert optimizer.param_groups[0]["k"] == 3
    assert [torch.equal(*pair) for pair in zip(before, params, strict=True)] == [False, False, True]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_refused_step_leaves_gradients_enabled(backend):
    params = parameters()
    optimizer = optimize(sf.AdamWScheduleFree, params)
    step = torch.compile(training_step(params, optimizer), backend=backend)
    step(torch.tensor(1.0))
    optimizer.param_groups[0]["lr"] = -1.0
    try:
        with pytest.raises(ValueError, match="Invalid lr in parameter group 0"):
            step(torch.tensor(1.0))
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


def test_copies_of_an_optimizer_are_told_apart():
    params, optimizer, copies, other = twins(sf.AdamWScheduleFree, {})

    def step(x, params, optimizer):
        return training_step(params, optimizer)(x)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for x in inputs(6):
        compiled(x, params, optimizer)
    twin_params, twin = copy.deepcopy((params, optimizer))
    for x in inputs(5):
        compiled(x, twin_params, twin)
    for x in inputs(6):
        training_step(copies, other)(x)
    assert_same(optimizer, other)
    assert twin.param_groups[0]["k"] == 11


# ---- graphs that break -------------------------------------------------------------------------------


def test_the_step_alone_is_compiled_with_a_scheduler_attached():
    params, optimizer, copies, other = twins(sf.AdamWScheduleFree, {})
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + i)) for o in (optimizer, other)]
    step = torch.compile(optimizer.step, backend="aot_eager")
    for i, x in enumerate(inputs(40)):
        with torch._dynamo.config.patch(error_on_recompile=i > 2):
            for ps, take, scheduler in ((params, step, schedulers[0]), (copies, other.step, schedulers[1])):
                loss_of(ps, x).backward()
                take()
                scheduler.step()
                for p in ps:
                    p.grad = None
    assert_same(optimizer, other)


@pytest.mark.parametrize("limit", [None, 1.0])
@pytest.mark.parametrize("body", ["modes", "averaged", "grad_norm", "closure"])
def test_what_cannot_be_compiled_breaks_the_graph_and_is_right(body, limit):
    results = []
    for compiled in (False, True):
        params = parameters()
        optimizer = optimize(sf.AdamWScheduleFree, params, max_grad_norm=limit)

        def step(x, params=params, optimizer=optimizer):
            if body == "closure":

                def closure():
                    optimizer.zero_grad()
                    loss = loss_of(params, x)
                    loss.backward()
                    return loss

                return optimizer.step(closure).detach()
            loss_of(params, x).backward()
            optimizer.step()
            optimizer.zero_grad()
            if body == "grad_norm":
                norm = optimizer.grad_norm
                return params[0].detach().clone() if norm is None else norm
            if body == "averaged":
                with optimizer.averaged():
                    return params[0].detach().clone()
            if body == "modes":
                optimizer.eval()
                average = params[0].detach().clone()
                optimizer.train()
                return average
            return params[0].detach().clone()

        function = torch.compile(step, backend="aot_eager") if compiled else step
        values = []
        for i, x in enumerate(inputs(8)):
            with torch._dynamo.config.patch(error_on_recompile=i > 2):
                values.append(function(x))
        results.append((optimizer, values))
    assert_same(results[0][0], results[1][0])
    assert all(map(torch.equal, results[0][1], results[1][1]))


def test_switching_modes_breaks_a_graph_once():
    params = parameters()
    optimizer = optimize(sf.AdamWScheduleFree, params)
    training_step(params, optimizer)(torch.tensor(1.0))

    def evaluate(x):
        before = loss_of(params, x)
        optimizer.eval()
        return before + loss_of(params, x)

    explained = torch._dynamo.explain(evaluate)(torch.tensor(2.0))
    assert explained.graph_break_count == 1
    assert explained.graph_count == 2
