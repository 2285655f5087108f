"""Every refused call says what is wrong, and has changed nothing."""

from __future__ import annotations

import collections
import random

import cases
import pytest
import torch
from schedulefree_cpp import ops

ADAM = {
    "lr": 0.1,
    "w": 0.3,
    "a": -0.05,
    "beta": 0.9,
    "beta2": 0.99,
    "denom_scale": 1.5,
    "denom_eps": 1e-8,
}
NAMES = ["y", "y_lo", "grad", "z", "exp_avg_sq", "exp_avg"]


def arguments(dtype=torch.float32):
    """Valid lists for ``adamw_step_``, three parameters each."""
    shapes = [(4, 3), (5,), (2, 2)]
    state = torch.float64 if dtype == torch.float64 else torch.float32
    lists = {name: [torch.rand(s, dtype=state) for s in shapes] for name in NAMES}
    lists["y"] = [torch.rand(s).to(dtype) for s in shapes]
    lists["grad"] = [torch.rand(s).to(dtype) for s in shapes]
    lists["y_lo"] = [torch.zeros(s, dtype=torch.int16) for s in shapes] if dtype == torch.bfloat16 else []
    return lists


def replace(name, index, make):
    def change(lists):
        lists[name][index] = make(lists[name][index])

    return change


def shorten(name):
    def change(lists):
        lists[name].pop()

    return change


def alias(target, index, source, source_index):
    def change(lists):
        lists[target][index] = lists[source][source_index]

    return change


def add_low_halves(lists):
    lists["y_lo"] = [torch.zeros(t.shape, dtype=torch.int16) for t in lists["y"]]


def overlap(lists):
    storage = torch.rand(30)
    lists["y"][0] = storage[:12].view(4, 3)
    lists["z"][1] = storage[11:16]


def overlap_hidden_behind_a_gradient(lists):
    storage = torch.rand(100)
    lists["grad"][0] = storage[:96].view(4, 24)[:, :3]
    lists["grad"][1] = storage[1:6]
    lists["z"][1] = storage[24:29]


def interleaved(lists):
    storage = torch.rand(4, 6)
    lists["y"][0] = storage[:, :3]
    lists["z"][0] = storage[:, 2:5]


CASES = {
    "fewer gradients": (torch.float32, shorten("grad"), r"grad: expected 3 tensors, one for each of y, got 2"),
    "fewer z": (torch.float32, shorten("z"), r"z: expected 3 tensors.*got 2"),
    "fewer exp_avg": (torch.float32, shorten("exp_avg"), r"exp_avg: expected 3 tensors.*or none, got 2"),
    "shape": (torch.float32, replace("grad", 1, lambda t: torch.rand(6)), r"grad\[1\]: expected shape \[5\] like y\[1\], got \[6\]"),
    "broadcastable shape": (torch.float32, replace("z", 1, lambda t: torch.rand(1, 5)), r"z\[1\]: expected shape \[5\].*got \[1, 5\]"),
    "state dtype": (torch.float32, replace("z", 2, lambda t: t.double()), r"z\[2\]: expected dtype float32 for the float32 y\[2\], got float64"),
    "16-bit state": (torch.bfloat16, replace("exp_avg_sq", 0, lambda t: t.bfloat16()), r"exp_avg_sq\[0\]: expected dtype float32 or uint8 for the bfloat16 y\[0\], got bfloat16"),
    "float32 state of float64": (torch.float64, replace("z", 0, lambda t: t.float()), r"z\[0\]: expected dtype float64"),
    "gradient dtype": (torch.float32, replace("grad", 0, lambda t: t.double()), r"grad\[0\]: expected dtype float32, bfloat16 or float16 for the float32 y\[0\], got float64"),
    "float64 gradient dtype": (torch.float64, replace("grad", 0, lambda t: t.float()), r"grad\[0\]: expected dtype float64 like y\[0\], got float32"),
    "complex": (torch.float32, replace("y", 1, lambda t: t.to(torch.complex64)), r"y\[1\]: expected dtype float32, float64, bfloat16 or float16, got complex64"),
    "integer": (torch.float32, replace("y", 1, lambda t: t.to(torch.int64)), r"y\[1\]: expected dtype.*got int64"),
    "integer gradient": (torch.float32, replace("grad", 1, lambda t: t.to(torch.int32)), r"grad\[1\]: expected dtype.*got int32"),
    "sparse gradient": (torch.float32, replace("grad", 0, lambda t: t.to_sparse()), r"grad\[0\]: expected a dense \(strided\) tensor, got a sparse"),
    "device": (torch.float32, replace("grad", 2, lambda t: t.to("meta")), r"expected a tensor on meta like the others of this call, got one on cpu"),
    "low half dtype": (torch.bfloat16, replace("y_lo", 1, lambda t: t.int()), r"y_lo\[1\]: expected dtype int16 or int8, got int32"),
    "low half of float32": (torch.float32, add_low_halves, r"y_lo\[0\]: expected no low half, since y\[0\] is float32"),
    "parameter as its own state": (torch.float32, alias("z", 1, "y", 1), r"z\[1\]: expected memory of its own, got memory shared with y\[1\]"),
    "gradient as state": (torch.float32, alias("grad", 1, "z", 1), r"shared with"),
    "partial overlap": (torch.float32, overlap, r"shared with"),
    "overlap behind a gradient": (torch.float32, overlap_hidden_behind_a_gradient, r"shared with"),
    "overlap of views with gaps": (torch.float32, interleaved, r"shared with"),
    "overlaps itself": (torch.float32, replace("z", 1, lambda t: torch.rand(1).expand(5)), r"z\[1\]: expected every element to have memory of its own"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_lists_are_refused_before_anything_is_written(case):
    dtype, change, message = CASES[case]
    lists = arguments(dtype)
    change(lists)
    dense = {
        n: [t for t in ts if t.layout == torch.strided and t.device.type == "cpu"] for n, ts in lists.items()
    }
    before = {name: [t.clone() for t in values] for name, values in dense.items()}
    with pytest.raises(RuntimeError, match=message) as error:
        ops.adamw_step_(*lists.values(), ops.coefs(**ADAM, inner_momentum=0.9))
    assert str(error.value).startswith("schedulefree_cpp::adamw_step_: ")
    for name, values in dense.items():
        for t, kept in zip(values, before[name], strict=True):
            assert torch.equal(t, kept), name


def test_a_tensor_listed_twice_is_refused():
    y, grad, z = torch.rand(4), torch.rand(4), torch.rand(4)
    message = r"sgd_step_: y\[1\]: expected memory of its own, got memory shared with y\[0\]"
    with pytest.raises(RuntimeError, match=message):
        ops.sgd_step_([y, y], [], [grad, grad], [z, z.clone()], ops.coefs(**ADAM))


def test_a_gradient_may_serve_two_parameters():
    y, z, grad = [torch.zeros(4), torch.zeros(4)], [torch.zeros(4), torch.zeros(4)], torch.rand(4)
    ops.sgd_step_(y, [], [grad, grad], z, ops.coefs(lr=0.1, a=-0.1, beta=0.9))
    assert torch.equal(y[0], y[1])


def with_element(name, value):
    coefs = ops.coefs(**ADAM, inner_momentum=0.9)
    coefs[ops.COEFFICIENTS.index(name)] = value
    return coefs


COEFS = {
    "dtype": (torch.zeros(16), r"coefs: expected dtype float64, got float32"),
    "length": (torch.zeros(15).double(), r"coefs: expected 16 contiguous elements in one dimension, got shape \[15\]"),
    "dimensions": (torch.zeros(4, 4).double(), r"coefs: expected 16 contiguous.*got shape \[4, 4\]"),
    "gaps": (torch.zeros(32).double()[::2], r"coefs: expected 16 contiguous"),
    "take": (with_element("take", 0.5), r"coefs: expected take to be 0 or 1, got 0.5"),
    "lr": (with_element("lr", torch.nan), r"coefs: expected a finite lr, got nan"),
    "w": (with_element("w", torch.inf), r"coefs: expected a finite w, got inf"),
    "weight_decay": (with_element("weight_decay", -torch.inf), r"coefs: expected a finite weight_decay, got -inf"),
    "beta": (with_element("beta", 0.0), r"Invalid beta: 0, expected a value in \(0, 1\]"),
    "no exp_avg": (ops.coefs(**ADAM), r"exp_avg: expected no tensors, since inner_momentum is 0, got 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", COEFS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_coefs_are_refused_before_anything_is_written(case, device):
    coefs, message = COEFS[case]
    lists = {name: [t.to(device) for t in ts] for name, ts in arguments().items()}
    before = [t.clone() for t in lists["y"]]
    with pytest.raises(RuntimeError, match="schedulefree_cpp::adamw_step_: " + message):
        ops.adamw_step_(*lists.values(), coefs)
    assert device == "meta" or all(map(torch.equal, lists["y"], before))


def test_inner_momentum_needs_exp_avg():
    lists = arguments() | {"exp_avg": []}
    with pytest.raises(
        RuntimeError, match=r"exp_avg: expected one tensor for each of y, since inner_momentum is 0.9"
    ):
        ops.adamw_step_(*lists.values(), ops.coefs(**ADAM, inner_momentum=0.9))


def test_a_factor_on_gradients_may_be_anything():
    # Of clipping by a norm that is not a number, as torch.nn.utils.clip_grad_norm_ has it.
    y = [torch.zeros(3)]
    ops.sgd_step_(y, [], [torch.ones(3)], [torch.zeros(3)], ops.coefs(grad_mul=torch.nan, a=-0.1, beta=0.9))
    assert y[0].isnan().all()


def test_decay_is_evaluated_at_y_or_z():
    coefs = ops.coefs(**ADAM, inner_momentum=0.9)
    with pytest.raises(RuntimeError, match=r"decay_at: expected 0 \(y\) or 1 \(z\), got 2"):
        ops.adamw_step_(*arguments().values(), coefs, decay_at=2)


RULE = {"kind": 1, "beta": 0.9, "warmup_steps": 0.0, "r": 0.0, "weight_lr_power": 2.0, "beta2": 0.99}
SCHEDULE = {
    "kind": ({"kind": 5}, {}, r"kind: expected one of 0 \(sgd\), 1 \(adamw\), .*4 \(plus\), got 5"),
    "beta": ({"beta": 0.0}, {}, r"Invalid beta: 0, expected a value in \(0, 1\]"),
    "beta2": ({"beta2": 1.0}, {}, r"Invalid betas\[1\]: 1, expected a value in \[0, 1\)"),
    "warmup": ({"warmup_steps": -1.0}, {}, r"Invalid warmup_steps: -1"),
    "decoupling": ({"decoupling_c": -1.0}, {}, r"Invalid decoupling_c: -1"),
    "constant": ({"averaging_weight": -0.1}, {}, r"Invalid averaging_weight: -0.1, expected .* \[0, 1\]"),
    "limit": ({"max_grad_norm": 0.0, "grad_norm": torch.tensor(1.0)}, {}, r"Invalid max_grad_norm: 0"),
    "norm": ({"max_grad_norm": 1.0}, {}, r"grad_norm: expected a tensor, since max_grad_norm is given"),
    "k": ({}, {"k": torch.tensor(3.0)}, r"k: expected dtype int64, got float32"),
    "lr_max": ({}, {"lr_max": torch.zeros(2).double()}, r"lr_max: expected one element, got shape \[2\]"),
    "lr dtype": ({}, {"lr": torch.tensor(3)}, r"lr: expected dtype float32 or float64, got int64"),
    "lr": ({}, {"lr": torch.tensor(-1.0)}, r"Invalid lr: -1, expected a finite value >= 0"),
    "found_inf": ({"found_inf": torch.zeros(2)}, {}, r"found_inf: expected one element"),
}  # fmt: skip


@pytest.mark.parametrize("case", SCHEDULE)
def test_bad_schedules_are_refused_before_anything_is_written(case):
    options, tensors, message = SCHEDULE[case]
    number = {name: torch.tensor(0.5).double() for name in ("weight_sum", "lr_max", "scheduled_lr")}
    state = {"coefs": ops.coefs(beta=0.9), "k": torch.tensor(3), **number} | tensors
    state = {"lr": torch.tensor(0.1), "weight_decay": torch.tensor(0.0)} | state
    order = ("coefs", "k", "weight_sum", "lr_max", "scheduled_lr", "lr", "weight_decay")
    before = {name: state[name].clone() for name in order}
    with pytest.raises(RuntimeError, match="schedulefree_cpp::schedule_step_: " + message):
        ops.schedule_step_(*(state[name] for name in order), **(RULE | options))
    assert all(torch.equal(state[name], before[name]) for name in order)


def test_a_schedule_may_not_share_memory():
    shared = torch.zeros(1).double()
    with pytest.raises(RuntimeError, match=r"lr_max: expected memory of its own, got memory shared with"):
        ops.schedule_step_(
            ops.coefs(beta=0.9),
            torch.tensor(0),
            shared,
            shared,
            shared.clone(),
            shared.clone(),
            shared,
            **RULE,
        )


def test_sums_refuse_what_steps_refuse():
    y, z = [torch.zeros(3)], [torch.zeros(3)]
    with pytest.raises(
        RuntimeError, match=r"polyak_sums: grad\[0\]: expected shape \[3\] like y\[0\], got \[4\]"
    ):
        ops.polyak_sums(y, [], [torch.zeros(4)], z)
    with pytest.raises(RuntimeError, match=r"polyak_sums: z\[0\]: expected dtype float32"):
        ops.polyak_sums(y, [], [torch.zeros(3)], [torch.zeros(3).double()])
    with pytest.raises(RuntimeError, match=r"grad_norm: grad\[1\]: expected dtype float32, .*, got int64"):
        ops.grad_norm([torch.zeros(3), torch.zeros(3).long()])
    with pytest.raises(RuntimeError, match=r"grad_norm: grad\[0\]: expected a dense"):
        ops.grad_norm([torch.zeros(3).to_sparse()])
    assert ops.polyak_sums(y, [], y, y).tolist() == [0.0, 0.0]  # nothing is written, so all may be one


SCHEDULE_TENSORS = ("coefs", "k", "weight_sum", "lr_max", "scheduled_lr", "lr", "weight_decay")
SCHEDULE_INPUTS = ("grad_norm", "grad_scale", "found_inf")
SCALARS = {
    "sgd_step_": ((ops.coefs(**ADAM),), {}),
    "adamw_step_": ((ops.coefs(**ADAM, inner_momentum=0.5),), {}),
    "y_to_x_": ((), {"beta": 0.9}),
    "x_to_y_": ((), {"beta": 0.9}),
    "before_base_step_": ((ops.coefs(**ADAM),), {"beta": 0.9, "exchange": False}),
    "after_base_step_": ((ops.coefs(**ADAM),), {"exchange": False}),
    "polyak_sums": ((), {}),
}


def made_smaller(t: torch.Tensor, left: int) -> None:
    """Leaves a tensor's storage this many bytes, or all but so many where that is negative."""
    storage = t.untyped_storage()
    storage.resize_(left if left >= 0 else storage.nbytes() + left)


@pytest.mark.parametrize("left", [0, 1, -1])
@pytest.mark.parametrize("operator", SCALARS)
@pytest.mark.parametrize("name", ["bfloat16", "24 bits, 8-bit moment", "float64"])
def test_a_storage_smaller_than_its_tensor_is_refused(name, operator, left):
    shapes = [(3,), (16, 16), (0,)]
    if operator in cases.AROUND_A_BASE and cases.FORMATS[name].z_lo:
        return  # refused for its format
    positional, named = cases.OPERANDS[operator]
    for key in (*positional, *named):
        lists = cases.lists_of(cases.FORMATS[name], shapes)
        if not lists[key]:
            continue
        before = cases.copied(lists)
        t = lists[key][1]
        if t.dim() == 2:  # a view with gaps, and with an offset
            t = lists[key][1] = torch.stack([t, t]).movedim(0, 1)[:, 1]
        made_smaller(t, left)
        (coefs, scalars) = SCALARS[operator]
        message = (
            rf"{operator}: {key}\[1\]: expected a storage of \d+ bytes or more, got one of \d+, which was"
        )
        with pytest.raises(RuntimeError, match=message):
            cases.call(ops, operator, lists, *coefs, **scalars)
        for other, tensors in lists.items():
            for i, u in enumerate(tensors):
                assert (other, i) == (key, 1) or torch.equal(u, before[other][i])


@pytest.mark.parametrize("left", [0, -1])
def test_scalars_in_smaller_storages_are_refused(left):
    message = "expected a storage of [0-9]+ bytes or more, got one of"
    lists = arguments()
    for operator in (ops.sgd_step_, ops.adamw_step_):
        coefs = ops.coefs(**ADAM)
        made_smaller(coefs, left)
        adam = ([*lists["exp_avg_sq"]], []) if operator is ops.adamw_step_ else ()
        with pytest.raises(RuntimeError, match="coefs: " + message):
            operator(lists["y"], [], lists["grad"], lists["z"], *adam, coefs)
    made_smaller(lists["grad"][1], left)
    with pytest.raises(RuntimeError, match=r"grad_norm: grad\[1\]: " + message):
        ops.grad_norm(lists["grad"])
    for name in SCHEDULE_TENSORS + SCHEDULE_INPUTS:
        tensors = {key: torch.tensor(0.5).double() for key in SCHEDULE_TENSORS + SCHEDULE_INPUTS}
        tensors |= {"coefs": ops.coefs(beta=0.9), "k": torch.tensor(3)}
        made_smaller(tensors[name], left)
        state = [tensors[key] for key in SCHEDULE_TENSORS]
        with pytest.raises(RuntimeError, match=f"schedule_step_: {name}: {message}"):
            ops.schedule_step_(*state, **{key: tensors[key] for key in SCHEDULE_INPUTS}, **RULE)


@pytest.mark.parametrize("swap", [ops.y_to_x_, ops.x_to_y_])
@pytest.mark.parametrize("beta", [0.0, -0.5, 1.5, float("nan")])
def test_swaps_refuse_a_beta_outside_its_domain(swap, beta):
    y, z = torch.rand(3), torch.rand(3)
    before = y.clone()
    with pytest.raises(RuntimeError, match=r"Invalid beta: .*expected a value in \(0, 1\]"):
        swap([y], [], [z], beta=beta)
    assert torch.equal(y, before)


def addresses(view):
    elements = torch.arange(view.untyped_storage().nbytes() // 4)
    return elements.as_strided(view.shape, view.stride(), view.storage_offset()).reshape(-1).tolist()


def random_views(rng):
    """Views of one storage, most of them with the same strides, none of which overlaps itself."""
    storage, common = torch.rand(rng.choice([12, 30, 60, 200])), None
    views = []
    for _ in range(rng.choice([2, 3, 4])):
        if common is None or rng.random() < 0.3:
            strides = [rng.choice([1, 2, 3, 4, 5, 6, 8, 12, 24]) for _ in range(rng.choice([1, 2, 2, 3]))]
            common = common or strides
        else:
            strides = common
        sizes = [rng.choice([1, 2, 3, 4]) for _ in strides]
        room = len(storage) - sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
        if room > 0:
            view = storage.as_strided(sizes, strides, rng.randrange(room))
            if len({*addresses(view)}) == view.numel():
                views.append(view)
    return views


def test_views_are_refused_exactly_where_they_share_an_element():
    rng, seen = random.Random(0), collections.Counter()
    for _ in range(3000):
        views = random_views(rng)
        elements = [at for view in views for at in addresses(view)]
        shared = len({*elements}) < len(elements)
        try:
            ops.y_to_x_(views, [], [torch.zeros(view.shape) for view in views], beta=0.9)
        except RuntimeError as error:
            if "overlaps itself" in str(error):  # interleaved within itself: see may_overlap_itself
                continue
            taken = "shared with" not in str(error)
        else:
            taken = True
        assert taken != shared, [(v.shape, v.stride(), v.storage_offset()) for v in views]
        seen[taken] += 1
    assert min(seen.values()) > 500
