"""Steps whose scalars are in tensors: the operators, and ``capturable=True``."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import cases
import pytest
import schedulefree
import schedulefree_cpp
import torch
from schedulefree_cpp import _C, _fallback, ops
from torch._dynamo.testing import CompileCounterWithBackend

F64 = torch.float64
SHAPES = [(5, 3), (7,), (), (40, 130)]
RULE: dict[str, Any] = {
    "kind": ops.STEP_KINDS["adamw"],
    "beta": 0.8,
    "warmup_steps": 3,
    "r": 0.5,
    "weight_lr_power": 2.0,
    "beta2": 0.99,
    "eps": 1e-8,
}


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    monkeypatch.setattr(_fallback, "_warned", {"cpu"})


def new_schedule(k: int = 0, weight_sum: float = 0.0, lr_max: float = -1.0) -> list[torch.Tensor]:
    """coefs, k, weight_sum, lr_max, scheduled_lr."""
    numbers = [torch.tensor(value, dtype=F64) for value in (weight_sum, lr_max, 0.0)]
    return [torch.full((len(ops.COEFFICIENTS),), torch.nan, dtype=F64), torch.tensor(k), *numbers]


def number(value: float, dtype: torch.dtype = F64) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


def named(coefs: torch.Tensor) -> dict[str, float]:
    return dict(zip(ops.COEFFICIENTS, coefs.tolist(), strict=True))


def streams(dtype: torch.dtype, seed: int) -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]

    state = F64 if dtype == F64 else torch.float32
    low = [torch.randint(-99, 99, shape, generator=generator).short() for shape in SHAPES]
    return {
        "y": draw(dtype),
        "y_lo": low if dtype in (torch.bfloat16, torch.float16) else [],
        "grad": draw(dtype),
        "z": draw(state),
        "exp_avg_sq": [t.abs() for t in draw(state)],
        "exp_avg": draw(state),
    }


def copied(lists: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    return {name: [t.clone() for t in tensors] for name, tensors in lists.items()}


def assert_equal(one: dict[str, list[torch.Tensor]], other: dict[str, list[torch.Tensor]]) -> None:
    for name, tensors in one.items():
        cases.assert_same(tensors, other[name])


# ---- operators -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("average", [{"decoupling_c": 7.0}, {"averaging_weight": 0.3}])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "adamw_paper", "radam"])
def test_a_schedule_in_tensors_is_that_of_the_host(kind, average):
    adam = {"beta2": 0.95, "eps": 1e-6, "inner_momentum": 0.5, "silent_sgd_phase": False}
    rule = {**RULE, "kind": ops.STEP_KINDS[kind], **adam, **average}
    coefs, *state = new_schedule()
    k, weight_sum, lr_max, scheduled_lr = 0, 0.0, -1.0, 0.0
    for seed in range(12):
        lr = 0.1 + 0.01 * seed
        before = {"k": k, "weight_sum": weight_sum, "lr_max": lr_max, "scheduled_lr": scheduled_lr}
        host = _C.schedule_step(**rule, **before, lr=lr, weight_decay=0.1, beta_next=0.8)
        ops.schedule_step_(coefs, *state, number(lr), number(0.1), **rule)
        assert tuple(coefs.tolist()) == host.coefs
        assert {name: named(coefs)[name] for name in before} == before
        k, weight_sum, lr_max, scheduled_lr = host.k, host.weight_sum, host.lr_max, host.scheduled_lr
        assert [t.item() for t in state] == [k, weight_sum, lr_max, scheduled_lr]


def test_no_decay_at_run_time_is_no_decay():
    # 0 * inf would be NaN.
    y, z = [torch.tensor([torch.inf])], [torch.ones(1)]
    coefs, *state = new_schedule(k=2, weight_sum=0.01, lr_max=0.1)
    ops.schedule_step_(coefs, *state, number(0.1), number(0.0), **RULE)
    ops.sgd_step_(y, [], [torch.ones(1)], z, coefs)
    assert z[0].isfinite()


def test_a_skipped_step_changes_nothing():
    schedule = new_schedule(k=2, weight_sum=0.01, lr_max=0.1)
    before = [t.clone() for t in schedule[1:]]
    for found in (number(1.0, torch.float32), torch.tensor([torch.nan])):
        ops.schedule_step_(*schedule, number(0.1), number(0.1), **RULE, found_inf=found)
        assert schedule[0][0] == 0
        cases.assert_same(schedule[1:], before)
        cases.assert_same(schedule[0][-4:], before)
    lists = streams(torch.bfloat16, seed=1)
    kept = copied(lists)
    ops.adamw_step_(*lists.values(), schedule[0])
    assert_equal(lists, kept)
    lists["exp_avg_sq"] = lists["exp_avg"] = []
    ops.sgd_step_(lists["y"], lists["y_lo"], lists["grad"], lists["z"], schedule[0])
    cases.assert_same(lists["y"], kept["y"])


def test_gradients_are_unscaled_and_clipped_by_their_unscaled_norm():
    coefs, *state = new_schedule()
    amp = {"grad_scale": number(4.0, torch.float32), "grad_norm": number(40.0), "max_grad_norm": 2.0}
    ops.schedule_step_(coefs, *state, number(0.1), number(0.0), **RULE, **amp, maximize=True)
    assert named(coefs)["grad_mul"] == -(2.0 / (10.0 + 1e-6)) / 4.0
    amp["max_grad_norm"] = math.inf
    ops.schedule_step_(coefs, *state, number(0.1), number(0.0), **RULE, **amp)
    assert named(coefs)["grad_mul"] == 0.25


N = len(ops.COEFFICIENTS)


@pytest.mark.parametrize(
    ("coefs", "message"),
    [
        (torch.ones(N), r"coefs: expected dtype float64, got float32"),
        (
            torch.ones(N - 1, dtype=F64),
            rf"coefs: expected {N} contiguous elements in one dimension, got shape \[{N - 1}\]",
        ),
        (
            torch.ones(N, 1, dtype=F64),
            rf"coefs: expected {N} contiguous elements in one dimension, got shape \[{N}, 1\]",
        ),
        (torch.ones(2 * N, dtype=F64)[::2], f"coefs: expected {N} contiguous elements in one dimension"),
    ],
)
def test_coefficients_of_another_form_are_refused(coefs, message):
    lists = streams(torch.float32, seed=1)
    before = copied(lists)
    with pytest.raises(RuntimeError, match=r"adamw_step_: " + message):
        ops.adamw_step_(*lists.values(), coefs)
    with pytest.raises(RuntimeError, match="decay_at: expected 0"):
        ops.adamw_step_(*lists.values(), ops.coefs(beta=0.9), decay_at=2)
    with pytest.raises(RuntimeError, match=r"schedule_step_: " + message):
        ops.schedule_step_(coefs, *new_schedule()[1:], number(0.1), number(0.0), **RULE)
    assert_equal(lists, before)


SCHEDULE = ["coefs", "k", "weight_sum", "lr_max", "scheduled_lr", "lr", "weight_decay"]
REFUSED = {
    "k": ({"k": torch.tensor(1.0)}, "k: expected dtype int64, got float32"),
    "lr_max": ({"lr_max": torch.tensor(1.0)}, "lr_max: expected dtype float64, got float32"),
    "lr_max of two": ({"lr_max": torch.ones(2).double()}, r"lr_max: expected one element, got shape \[2\]"),
    "lr": ({"lr": torch.tensor(1)}, "lr: expected dtype float32 or float64, got int64"),
    "negative lr": ({"lr": number(-1.0)}, r"Invalid lr: -1, expected a finite value >= 0"),
    "lr that is not finite": ({"lr": number(math.nan)}, "Invalid lr: nan"),
    "sum that overflows": ({"lr": number(1e200)}, "Invalid weight_sum: inf, expected a finite sum"),
    "beta outside its domain": ({"beta": 1.5}, r"Invalid beta: 1.5, expected a value in \(0, 1\]"),
    "kind": ({"kind": 99}, r"kind: expected .*got 99"),
    "norm": ({"max_grad_norm": 1.0}, "grad_norm: expected a tensor, since max_grad_norm is given"),
    "found_inf": ({"found_inf": torch.zeros(2)}, r"found_inf: expected one element, got shape \[2\]"),
    "grad_scale": ({"grad_scale": torch.tensor(1)}, "grad_scale: expected dtype float32 or float64"),
    "device": ({"k": torch.tensor(1, device="meta")}, "got one on cpu"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_schedule_has_changed_nothing(case):
    changes, message = REFUSED[case]
    tensors = dict(zip(SCHEDULE, [*new_schedule(), number(0.1), number(0.0)], strict=True))
    tensors |= {name: value for name, value in changes.items() if name in tensors}
    before = {name: t.clone() for name, t in tensors.items()}
    rule = {**RULE, **{name: value for name, value in changes.items() if name not in tensors}}
    with pytest.raises(RuntimeError, match=r"schedulefree_cpp::schedule_step_: .*" + message):
        ops.schedule_step_(*tensors.values(), **rule)
    for name, t in tensors.items():
        if t.device.type == "cpu":
            torch.testing.assert_close(t, before[name], rtol=0, atol=0, equal_nan=True)


def test_a_schedule_has_memory_of_its_own():
    coefs, k, weight_sum, lr_max, scheduled_lr = new_schedule()
    with pytest.raises(
        RuntimeError, match="lr_max: expected memory of its own, got memory shared with weight_sum"
    ):
        ops.schedule_step_(coefs, k, weight_sum, weight_sum, scheduled_lr, number(0.1), number(0.0), **RULE)
    with pytest.raises(RuntimeError, match="shared with scheduled_lr"):
        ops.schedule_step_(coefs, k, weight_sum, lr_max, scheduled_lr, scheduled_lr, number(0.0), **RULE)
    ops.schedule_step_(coefs, k, weight_sum, lr_max, scheduled_lr, *[number(0.1)] * 2, **RULE)


def test_versions_rise_where_a_capturable_step_writes():
    lists = streams(torch.float32, seed=1)
    schedule = new_schedule()
    versions = {name: [t._version for t in tensors] for name, tensors in lists.items()}
    ops.schedule_step_(*schedule, number(0.1), number(0.0), **RULE, inner_momentum=0.9)
    ops.adamw_step_(*lists.values(), schedule[0])
    for name, tensors in lists.items():
        for t, version in zip(tensors, versions[name], strict=True):
            assert (t._version > version) == (name == "y")


def test_operators_without_parameters_take_no_step():
    coefs = ops.coefs(beta=0.9)
    ops.sgd_step_([], [], [], [], coefs)
    ops.adamw_step_([], [], [], [], [], [], coefs)


@pytest.mark.parametrize("take", [1.0, 0.0])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_plain_torch_takes_the_same_steps(dtype, take):
    found = {"found_inf": number(1.0 - take)}
    one, other = new_schedule(), new_schedule()
    ops.schedule_step_(*one, number(0.1), number(0.1), **RULE, inner_momentum=0.9, **found)
    _fallback.schedule_step_(*other, number(0.1), number(0.1), **RULE, inner_momentum=0.9, **found)
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    lists = streams(dtype, seed=3)
    for names in (["y", "y_lo", "grad", "z"], list(lists)):
        kernels, plain = copied(lists), copied(lists)
        name = "sgd_step_" if len(names) == 4 else "adamw_step_"
        operator = ops.sgd_step_ if len(names) == 4 else ops.adamw_step_
        operator(*(kernels[n] for n in names), one[0], decay_at=1)
        _fallback.OPERATORS[name](*(plain[n] for n in names), one[0], decay_at=1)
        tolerance = 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5
        for n in names:
            for a, b in zip(kernels[n], plain[n], strict=True):
                if n != "y_lo":
                    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert torch.equal(plain["z"][0], lists["z"][0]) == (not take)


@pytest.mark.compile
def test_a_compiled_step_is_one_graph_whatever_the_scalars():
    counter = CompileCounterWithBackend("aot_eager")

    def step(lists, schedule, lr):
        torch.ops.schedulefree_cpp.schedule_step_(*schedule, lr, lr, **RULE)
        torch.ops.schedulefree_cpp.sgd_step_(*lists, schedule[0], z_lo=[])

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    lists = list(streams(torch.float32, seed=1).values())[:4]
    others, schedule = copy.deepcopy(lists), new_schedule()
    other = copy.deepcopy(schedule)
    frames = []
    for i in range(4):
        lr = number(0.1 + 0.1 * i)
        compiled(lists, schedule, lr)
        step(others, other, lr)
        frames.append(counter.frame_count)
    assert frames[-1] == frames[0]  # nothing is compiled again
    cases.assert_same([*lists[0], *lists[3], *schedule], [*others[0], *others[3], *other])


# ---- optimizers ----------------------------------------------------------------------------------------

NUMBERS = ("k", "weight_sum", "lr_max", "scheduled_lr")


def pair(name: str, shapes=SHAPES, dtype=torch.float32, **kwargs: Any) -> tuple[Any, Any]:
    """The same optimizer without and with ``capturable``."""
    plain = cases.make(name, cases.parameters(shapes, dtype), **kwargs)
    return plain, cases.make(name, cases.parameters(shapes, dtype), **kwargs, capturable=True)


def assert_agree(plain: Any, other: Any) -> None:
    """Equal bits in parameters and states, equal numbers in groups."""
    cases.assert_same(cases.params_of(plain), cases.params_of(other))
    for p, q in zip(cases.params_of(plain), cases.params_of(other), strict=True):
        assert plain.state[p].keys() == other.state[q].keys()
        for key, value in plain.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[q][key])), key
    for a, b in zip(plain.param_groups, other.param_groups, strict=True):
        assert {name: float(a[name]) for name in NUMBERS} == {name: float(b[name]) for name in NUMBERS}


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.1, "r": 0.5, "decay_at": "z", "maximize": True},
    "clipped": {"max_grad_norm": 0.5, "weight_decay": 0.1},
    "measured": {"max_grad_norm": math.inf},
    "decoupled": {"decoupling_c": 30.0},
    "constant": {"averaging_weight": 0.1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", cases.NATIVE)
def test_trajectories_are_those_without(name, variant, dtype):
    kwargs = dict(VARIANTS[variant])
    if name != "RAdamScheduleFree":
        kwargs["warmup_steps"] = 4
    if name == "AdamWScheduleFree" and variant == "decay":
        kwargs["inner_momentum"] = 0.5
    plain, other = pair(name, dtype=dtype, **kwargs)
    for start in range(0, 30, 6):
        for optimizer in (plain, other):
            cases.run(optimizer, 6, start)
        assert_agree(plain, other)
        for optimizer in (plain, other):
            optimizer.eval()
        cases.assert_same(cases.params_of(plain), cases.params_of(other))
        for optimizer in (plain, other):
            optimizer.train()
    if "max_grad_norm" in kwargs:
        assert torch.equal(plain.grad_norm, other.grad_norm)
    group = other.param_groups[0]
    assert [group[name].dtype for name in NUMBERS] == [torch.int64, F64, F64, F64]
    assert all(group[name].ndim == 0 for name in NUMBERS)


class NoRead(torch.utils._python_dispatch.TorchDispatchMode):
    """Forbids that the host reads a tensor."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Raises AssertionError where it happens."""
        assert function is not torch.ops.aten._local_scalar_dense.default, "the host reads a tensor"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", cases.NATIVE)
def test_no_step_reads_on_the_host(name):
    params = cases.parameters([(3,), (4, 2), (5,)], torch.bfloat16)
    groups = [{"params": params[:2]}, {"params": params[2:], "max_grad_norm": 0.5}]
    optimizer = cases.make(
        name, groups, capturable=True, lr=torch.tensor(0.1), weight_decay=torch.tensor(0.1)
    )
    cases.run(optimizer, 2)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    with NoRead():
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
        cases.set_beta(optimizer, 0.8)
        optimizer.param_groups[0]["lr"].fill_(0.2)
        optimizer.step()
    assert optimizer.param_groups[0]["k"] == 4


def test_learning_rate_and_decay_in_tensors_are_read_at_each_step():
    lr, decay = torch.tensor(0.1), torch.tensor(0.2, dtype=F64)
    params, others = (cases.parameters(SHAPES) for _ in range(2))
    other = cases.make("AdamWScheduleFree", others, lr=lr, weight_decay=decay, capturable=True)
    plain = cases.make("AdamWScheduleFree", params, lr=lr.item(), weight_decay=0.2)
    for seed in range(6):
        lr.fill_(0.1 / (seed + 1))
        decay.fill_(0.0 if seed == 2 else 0.3)
        plain.param_groups[0] |= {"lr": lr.item(), "weight_decay": decay.item()}
        cases.drive(plain, seed)
        cases.drive(other, seed)
        assert_agree(plain, other)
    lr.fill_(-1.0)
    before = other.state_dict()["param_groups"]
    with pytest.raises(ValueError, match="Invalid lr in parameter group 0: -1"):
        cases.drive(other, 9)
    assert other.state_dict()["param_groups"] == before
    assert_agree(plain, other)


def test_tensors_stay_the_same_through_modes_and_steps():
    optimizer = cases.make("SGDScheduleFree", cases.parameters(SHAPES), capturable=True)
    cases.run(optimizer, 1)
    tensors = [optimizer.param_groups[0][name] for name in NUMBERS]
    for beta in (0.9, 0.8):
        cases.set_beta(optimizer, beta)
        optimizer.eval()
        optimizer.train()
        cases.run(optimizer, 2)
    now = [optimizer.param_groups[0][name] for name in NUMBERS]
    assert all(a is b for a, b in zip(tensors, now, strict=True))


def assert_close(plain: Any, other: Any) -> None:
    """As near as a y that is interpolated anew after the step is to one that the step interpolates."""
    for p, q in zip(cases.params_of(plain), cases.params_of(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("average", [{}, {"decoupling_c": 5.0}])
@pytest.mark.parametrize("name", cases.NATIVE)
def test_a_moved_beta_leaves_decay_where_the_gradient_was_taken(name, average):
    plain, other = pair(name, dtype=F64, weight_decay=0.5, decay_at="y", **average)
    for seed, beta in enumerate([0.9, 0.9, 0.8, 1.0, 0.7, 0.7]):
        for optimizer in (plain, other):
            cases.set_beta(optimizer, beta)
            cases.drive(optimizer, seed)
        assert_close(plain, other)


@pytest.mark.parametrize("name", cases.NATIVE)
def test_parameters_may_rest_while_beta_moves(name):
    plain, other = pair(name, dtype=F64)
    for seed in range(14):
        for optimizer in (plain, other):
            cases.set_beta(optimizer, 0.9 - 0.05 * (seed // 2))
            params = cases.params_of(optimizer)
            cases.set_gradients(params, seed)
            if seed in (3, 4, 5, 8):
                params[0].grad = None
            if seed in (4, 5, 9):
                params[1].grad = None
            optimizer.step()
        assert_close(plain, other)
        for optimizer in (plain, other):
            optimizer.eval()
        assert_close(plain, other)
        for optimizer in (plain, other):
            optimizer.train()
    saved = other.state_dict()
    for capturable in (False, True):
        restored = cases.make(name, cases.copies(cases.params_of(other)), capturable=capturable)
        restored.load_state_dict(copy.deepcopy(saved))
        reference = copy.deepcopy(plain)
        cases.run(reference, 3)
        cases.run(restored, 3)
        assert_close(reference, restored)


def snapshot(optimizer: Any) -> tuple[Any, ...]:
    state = optimizer.state_dict()
    return (
        [p.detach().clone() for p in cases.params_of(optimizer)],
        copy.deepcopy(state["param_groups"]),
        {k: {n: torch.as_tensor(v).clone() for n, v in s.items()} for k, s in state["state"].items()},
    )


def assert_unchanged(optimizer: Any, before: tuple[Any, ...]) -> None:
    params, groups, states = snapshot(optimizer)
    cases.assert_same(params, before[0])
    assert groups == before[1]
    assert states.keys() == before[2].keys()
    for key, state in states.items():
        assert state.keys() == before[2][key].keys()
        cases.assert_same(state.values(), before[2][key].values())


@pytest.mark.parametrize("steps", [0, 3])
def test_a_refused_step_has_changed_nothing(steps):
    params = cases.parameters([(4,), (4,)])
    optimizer = cases.make("AdamWScheduleFree", params, capturable=True)
    reference = cases.make("AdamWScheduleFree", cases.copies(params))
    cases.run(optimizer, steps)
    cases.run(reference, steps)
    before = snapshot(optimizer)
    own, params[1].data = params[1].data, params[0].data  # which only the operator sees
    cases.set_gradients(params, 7)
    with pytest.raises(RuntimeError, match="memory shared"):
        optimizer.step()
    params[1].data = own
    assert_unchanged(optimizer, before)
    cases.run(optimizer, 3, start=steps)
    cases.run(reference, 3, start=steps)
    cases.assert_same(params, cases.params_of(reference))


def test_a_refused_parameter_step_has_changed_nothing():
    params = cases.parameters([(4,), (4,)])
    optimizer = cases.make("SGDScheduleFree", params, capturable=True)
    cases.run(optimizer, 2)
    before = snapshot(optimizer)
    cases.set_gradients(params, 7)
    z = optimizer.state[params[0]]["z"]
    optimizer.state[params[0]]["z"] = params[0].data
    with pytest.raises(RuntimeError, match="memory shared"):
        optimizer.step_parameter(params[0])
    optimizer.state[params[0]]["z"] = z
    assert_unchanged(optimizer, before)


def test_groups_after_a_refused_one_have_not_stepped():
    params = cases.parameters([(4,), (5,), (5,), (6,)])
    groups = [{"params": params[:1]}, {"params": params[1:3]}, {"params": params[3:]}]
    optimizer = cases.make("AdamWScheduleFree", groups, capturable=True)
    cases.run(optimizer, 2)
    before = snapshot(optimizer)[1]
    own, params[2].data = params[2].data, params[1].data
    cases.set_gradients(params, 2)
    last = params[3].detach().clone()
    with pytest.raises(RuntimeError, match="memory shared"):
        optimizer.step()
    params[2].data = own
    now = snapshot(optimizer)[1]
    assert [group["k"] for group in now] == [3, 2, 2]
    assert now[1:] == before[1:]
    assert torch.equal(params[3], last)
    cases.run(optimizer, 1, start=3)


def test_stepping_within_backward_takes_the_same_steps():
    plain, other = pair("AdamWScheduleFree")
    for seed in range(4):
        cases.drive(plain, seed)
        params = cases.params_of(other)
        cases.set_gradients(params, seed)
        other.step_parameter(params[2])
        params[2].grad = None
        other.step_parameter(params[0])
        other.step()
        assert_agree(plain, other)


# ---- checkpoints and copies ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases.NATIVE)
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(("source", "target"), [(True, False), (False, True), (True, True)])
def test_checkpoints_do_not_depend_on_it(name, source, target, moved):
    params = cases.parameters(SHAPES, F64 if moved else torch.float32)
    optimizer = cases.make(name, params, capturable=source)
    cases.run(optimizer, 5)
    if moved:
        cases.set_beta(optimizer, 0.8)  # not the one that built y
    saved = optimizer.state_dict()
    assert "capturable" not in saved["param_groups"][0]
    assert [type(saved["param_groups"][0][n]) for n in NUMBERS] == [int, float, float, float]
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    other = cases.make(name, cases.copies(params), capturable=target)
    cases.run(other, 1)
    with torch.no_grad():
        for p, q in zip(params, cases.params_of(other), strict=True):
            q.copy_(p)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0].get("capturable", False) == target
    cases.run(optimizer, 5, start=5)
    cases.run(other, 5, start=5)
    (assert_close if moved else assert_agree)(optimizer, other)
    assert isinstance(other.param_groups[0]["k"], torch.Tensor) == target
    assert saved["param_groups"][0]["k"] == 5


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree"])
def test_checkpoints_go_to_upstream_and_back(name):
    params = cases.parameters(SHAPES)
    optimizer = cases.make(name, params, capturable=True)
    cases.run(optimizer, 5)
    others = cases.copies(params)
    upstream = cases.make(name, others, package=schedulefree)
    upstream.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    cases.run(optimizer, 5, start=5)
    cases.run(upstream, 5, start=5)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, **cases.PARITY)
    back = cases.make(name, cases.copies(others), capturable=True)
    back.load_state_dict(upstream.state_dict())
    cases.run(back, 5, start=10)
    cases.run(upstream, 5, start=10)
    for p, q in zip(cases.params_of(back), others, strict=True):
        torch.testing.assert_close(p, q, **cases.PARITY)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("mode", [True, False])
def test_copies_go_on_alike(duplicate, mode):
    optimizer = cases.make("AdamWScheduleFree", cases.parameters(SHAPES), capturable=True, warmup_steps=9)
    cases.run(optimizer, 4)
    optimizer.train(mode)
    other = duplicate(optimizer)
    assert other.param_groups[0]["k"] is not optimizer.param_groups[0]["k"]
    for each in (optimizer, other):
        each.train()
        cases.run(each, 4, start=4)
    assert_agree(optimizer, other)
    assert other.capturable


def test_it_is_a_flag_of_the_optimizer():
    params = cases.parameters([(3,), (4,), (5,)])
    with pytest.raises(
        ValueError, match="Invalid capturable in parameter group 0: True, expected False as for"
    ):
        cases.make("AdamWScheduleFree", [{"params": params[:1], "capturable": True}, {"params": params[1:]}])
    plain, other = (
        cases.make("AdamWScheduleFree", cases.copies(params)[:1], capturable=flag) for flag in (False, True)
    )
    assert [plain.capturable, other.capturable] == [False, True]
    for optimizer in (plain, other):
        cases.run(optimizer, 3)
        optimizer.add_param_group({"params": cases.parameters([(7,)], seed=2)})
        cases.run(optimizer, 3, start=3)
    assert_agree(plain, other)
    assert isinstance(other.param_groups[1]["k"], torch.Tensor)
    with pytest.raises(
        ValueError, match="Invalid capturable in parameter group 2: False, expected True as for"
    ):
        other.add_param_group({"params": cases.parameters([(2,)]), "capturable": False})


def test_the_schedule_follows_its_parameters():
    model = torch.nn.Linear(3, 2)
    optimizer = schedulefree_cpp.SGDScheduleFree(model.parameters(), capturable=True, lr=0.1)
    optimizer.train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    model.double()
    optimizer.train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.param_groups[0]["k"].item() == 2


@pytest.mark.parametrize("name", cases.CLOSURE + cases.PLUS)
def test_classes_whose_steps_need_the_host_refuse_it(name):
    params = cases.parameters(SHAPES)
    message = r"Invalid capturable.*: True, expected False: a step of \w+ needs the host"
    with pytest.raises(ValueError, match=message):
        cases.make(name, [{"params": params, "capturable": True}])


def test_without_it_groups_are_upstreams():
    optimizer = cases.make("SGDScheduleFree", cases.parameters(SHAPES))
    cases.run(optimizer, 1)
    assert "capturable" not in optimizer.param_groups[0]
    assert [type(optimizer.param_groups[0][n]) for n in NUMBERS] == [int, float, float, float]


@pytest.mark.parametrize("capturable", [False, True])
def test_a_graph_captures_no_step_whose_scalars_are_the_hosts(monkeypatch, capturable):
    optimizer = cases.make("AdamWScheduleFree", cases.parameters([(3,), (4, 2)]), capturable=capturable)
    optimizer.train()
    cases.set_gradients(cases.params_of(optimizer), 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if capturable:
        optimizer.step()
        return
    before = [p.detach().clone() for p in cases.params_of(optimizer)]
    with pytest.raises(RuntimeError, match="capturable=True"):
        optimizer.step()
    assert len(optimizer.state) == 0
    assert optimizer.param_groups[0]["k"] == 0
    cases.assert_same(before, cases.params_of(optimizer))
