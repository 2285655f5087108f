"""The plain torch operators of devices without kernels, run on the CPU beside its kernels."""

from __future__ import annotations

import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import cases
import pytest
import torch
from schedulefree_cpp import _fallback, ops
from schedulefree_cpp._core import formats, library

STEP = {"lr": 0.1, "w": 0.3, "a": -0.05, "beta": 0.9}
ADAM = {**STEP, "beta2": 0.99, "denom_scale": 1.5, "denom_eps": 1e-8}
# Contractions are rounded once in kernels and twice in torch.
CLOSE = {
    torch.float32: {"rtol": 2e-6, "atol": 1e-6},
    torch.float64: {"rtol": 1e-14, "atol": 1e-14},
    torch.bfloat16: {"rtol": 2e-6, "atol": 1e-6},  # with the low half
    torch.float16: {"rtol": 2e-6, "atol": 1e-6},
    "24 bits": {"rtol": 5e-5, "atol": 5e-6},
}


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    monkeypatch.setattr(_fallback, "_warned", {"cpu"})


def lists_of(name: str, *, strided: bool = False) -> cases.Lists:
    lists = cases.lists_of(cases.FORMATS[name], cases.SHAPES)
    if strided:
        for key in lists.keys() - {"exp_avg_sq_scale"}:
            lists[key] = [t.mT.contiguous().mT if t.ndim > 1 else t for t in lists[key]]
    return lists


def wide(lists: cases.Lists, key: str) -> list[torch.Tensor]:
    """The values of y or z."""
    lows = lists[f"{key}_lo"] or [None] * len(lists[key])
    return [formats.load(t, low) for t, low in zip(lists[key], lows, strict=True)]


def moments(lists: cases.Lists) -> list[torch.Tensor]:
    if not lists["exp_avg_sq_scale"]:
        return lists["exp_avg_sq"]
    pairs = zip(lists["exp_avg_sq"], lists["exp_avg_sq_scale"], strict=True)
    return [formats.decode(codes, scale) for codes, scale in pairs]


def assert_close(one: cases.Lists, other: cases.Lists, tolerance) -> None:
    for key in ("y", "z"):
        for a, b in zip(wide(one, key), wide(other, key), strict=True):
            torch.testing.assert_close(a, b, **tolerance)
    for a, b in zip(moments(one), moments(other), strict=True):
        if one["exp_avg_sq_scale"]:  # a code may be the next where values are a rounding apart
            torch.testing.assert_close(a, b, rtol=1 / 8, atol=0)
            assert (a != b).sum() <= 0.01 * a.numel() + 1
        else:
            torch.testing.assert_close(a, b, **tolerance)
    for a, b in zip(one["exp_avg"], other["exp_avg"], strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def tolerance_of(name: str):
    format = cases.FORMATS[name]
    return CLOSE["24 bits" if format.z_lo else format.dtype]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("decay_at", [0, 1])
@pytest.mark.parametrize("name", cases.FORMATS)
def test_steps_are_those_of_the_kernels(name, decay_at, strided):
    lists = lists_of(name, strided=strided)
    for operator, scalars in (
        ("sgd_step_", STEP),
        ("adamw_step_", ADAM),
        ("adamw_step_", {**ADAM, "inner_momentum": 0.9}),
        ("adamw_step_", {**ADAM, "stochastic": 1.0}),
    ):
        coefs = ops.coefs(**scalars, weight_decay=0.1, grad_mul=-0.5, k=7)
        one, other = cases.copied(lists), cases.copied(lists)
        cases.call(ops, operator, one, coefs, decay_at=decay_at)
        cases.call(_fallback, operator, other, coefs, decay_at=decay_at)
        assert_close(one, other, tolerance_of(name))
        assert all(map(torch.equal, other["grad"], lists["grad"]))
        assert not torch.equal(other["z"][-1], lists["z"][-1])


def test_codes_count_as_the_memory_of_the_parameter_whatever_their_strides():
    lists = lists_of("float32, 8-bit moment")
    lists["y"][-1] = lists["y"][-1].t().contiguous().t()
    assert lists["y"][-1].stride() != lists["exp_avg_sq"][-1].stride()
    one, other = cases.copied(lists), cases.copied(lists)
    for operators, its in ((ops, one), (_fallback, other)):
        cases.call(operators, "adamw_step_", its, ops.coefs(**ADAM, k=7))
    same = one["exp_avg_sq"][-1] == other["exp_avg_sq"][-1]
    assert same.float().mean() > 0.99
    torch.testing.assert_close(one["z"][-1], other["z"][-1], **CLOSE[torch.float32])


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("name", cases.FORMATS)
def test_swaps_are_those_of_the_kernels(name, strided):
    """Bit for bit, but for the last bit of float64, which kernels compute with more than float64."""
    close = partial(torch.allclose, rtol=1e-15, atol=1e-15) if name == "float64" else torch.equal
    one = lists_of(name, strided=strided)
    other = cases.copied(one)
    for operator in ("y_to_x_", "x_to_y_"):
        cases.call(ops, operator, one, beta=0.9)
        cases.call(_fallback, operator, other, beta=0.9)
        assert all(map(close, one["y"] + one["y_lo"], other["y"] + other["y_lo"]))


@pytest.mark.parametrize("name", [name for name in cases.FORMATS if name != "float64"])
def test_evaluation_after_a_step_is_undone_exactly(name):
    lists = lists_of(name)
    cases.call(_fallback, "sgd_step_", lists, ops.coefs(**STEP))
    stepped = cases.copied(lists)
    cases.call(_fallback, "y_to_x_", lists, beta=0.9)
    assert not torch.equal(lists["y"][-1], stepped["y"][-1])
    cases.call(_fallback, "x_to_y_", lists, beta=0.9)
    assert all(map(torch.equal, lists["y"] + lists["y_lo"], stepped["y"] + stepped["y_lo"]))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", cases.LENT)
def test_what_surrounds_a_base_step_is_that_of_the_kernels(name, w, strided):
    for exchange in {False, name in cases.EXCHANGED}:
        one = lists_of(name, strided=strided)
        other = cases.copied(one)
        for operators, lists in ((ops, one), (_fallback, other)):
            coefs = ops.coefs(lr=0.1, w=w, beta=0.8, weight_decay=0.3)
            cases.call(operators, "before_base_step_", lists, coefs, beta=0.9, exchange=exchange)
            for t in lists["y" if exchange else "z"]:
                t.mul_(0.7)
            cases.call(operators, "after_base_step_", lists, coefs, exchange=exchange)
        assert_close(one, other, CLOSE[cases.FORMATS[name].dtype])


@pytest.mark.parametrize("name", [name for name in cases.LENT if name != "float64"])
def test_a_base_step_that_does_not_come_is_undone_exactly(name):
    for exchange in {False, name in cases.EXCHANGED}:
        lists = lists_of(name)
        cases.call(_fallback, "sgd_step_", lists, ops.coefs(**STEP))
        before, coefs = cases.copied(lists), ops.coefs(beta=0.9)
        cases.call(_fallback, "before_base_step_", lists, coefs, beta=0.9, exchange=exchange)
        assert not torch.equal(lists["y"][-1], before["y"][-1])
        cases.call(_fallback, "after_base_step_", lists, coefs, exchange=exchange)
        for key in ("y", "y_lo", "z"):
            assert all(map(torch.equal, lists[key], before[key]))


def test_a_skipped_step_changes_nothing():
    lists = lists_of("float32")
    before = cases.copied(lists)
    coefs = ops.coefs(**STEP, take=0.0)
    _fallback.sgd_step_(lists["y"], [], lists["grad"], lists["z"], coefs)
    _fallback.before_base_step_(lists["y"], [], lists["z"], coefs, beta=0.9)
    _fallback.after_base_step_(lists["y"], [], lists["z"], coefs)
    assert all(map(torch.equal, lists["y"] + lists["z"], before["y"] + before["z"]))


@pytest.mark.parametrize("name", cases.FORMATS)
def test_sums_are_those_of_the_kernels(name):
    lists = lists_of(name)
    got, expected = (cases.call(operators, "polyak_sums", lists) for operators in (_fallback, ops))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    grad = lists["grad"]
    torch.testing.assert_close(_fallback.grad_norm(grad), ops.grad_norm(grad), rtol=1e-12, atol=0)


def test_a_refused_call_has_changed_nothing():
    lists = lists_of("float32")
    before = cases.copied(lists)
    lists["z"][-1] = lists["z"][-1][:3]
    with pytest.raises(RuntimeError, match=r"sgd_step_.*z\[11\].*shape"):
        _fallback.sgd_step_(lists["y"], [], lists["grad"], lists["z"], ops.coefs(**STEP))
    with pytest.raises(RuntimeError, match=r"sgd_step_.*layout torch.sparse_coo"):
        _fallback.sgd_step_(
            [torch.ones(3)], [], [torch.ones(3).to_sparse()], [torch.ones(3)], ops.coefs(**STEP)
        )
    assert all(map(torch.equal, lists["y"], before["y"]))


def test_a_storage_smaller_than_its_tensor_is_refused():
    for key in ("y", "grad", "z"):
        lists = {name: [torch.ones(3), torch.ones(5)] for name in ("y", "grad", "z")}
        lists[key][1].untyped_storage().resize_(19)
        with pytest.raises(RuntimeError, match="expected a storage of 20 bytes or more, got one of 19"):
            _fallback.sgd_step_(lists["y"], [], lists["grad"], lists["z"], ops.coefs(beta=0.9))


def test_tensors_of_one_parameter_must_be_on_one_device():
    v = [torch.ones(3)]
    with pytest.raises(
        RuntimeError, match=r"adamw_step_: tensor 0 of a list: expected device cpu .*got meta"
    ):
        _fallback.adamw_step_(
            [torch.ones(3)], [], [torch.ones(3, device="meta")], [torch.ones(3)], v, [], ops.coefs(**ADAM)
        )
    assert torch.equal(v[0], torch.ones(3))


def test_it_warns_once_for_a_device(monkeypatch):
    monkeypatch.setattr(_fallback, "_warned", set())
    arguments = ([torch.ones(3)], [], [torch.ones(3)], [torch.ones(3)])
    with pytest.warns(RuntimeWarning, match="has no kernels for cpu here"):
        _fallback.sgd_step_(*arguments, ops.coefs(**STEP))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _fallback.sgd_step_(*arguments, ops.coefs(**STEP))


def test_it_has_every_operator_and_is_registered_where_there_is_no_kernel():
    assert set(_fallback.OPERATORS) == set(library.OPERATORS)
    for name in library.OPERATORS:
        for key in _fallback.KEYS:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"schedulefree_cpp::{name}", key)


# A process whose CPU has no kernels of ours, as far as torch can see.
TRAIN = """
import sys, warnings
sys.path.insert(0, {tests!r})
import cases, schedulefree, schedulefree_cpp, torch
from schedulefree_cpp import _fallback

warnings.filterwarnings("ignore", message="[\\\\s\\\\S]*Overriding a previously registered kernel")
library = torch.library.Library("schedulefree_cpp", "IMPL")
for name, function in _fallback.OPERATORS.items():
    if name != "schedule_step_":  # which runs on the CPU wherever it is called
        library.impl(name, function, "CPU")

def train(package, name, dtype, **kwargs):
    torch.manual_seed(0)
    params = cases.parameters([(5, 3), (7,), ()], dtype)
    optimizer = cases.make(name, params, package=package, lr=0.02, **kwargs)
    for start in range(0, 30, 10):
        cases.run(optimizer, 10, start)
        if name in cases.SWITCHED:
            before = [p.detach().clone() for p in params]
            optimizer.eval()
            optimizer.train()
            if package is schedulefree_cpp:
                cases.assert_same(params, before)
    return params

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for name in cases.NATIVE + cases.CLOSURE:
        for one, other in zip(train(schedulefree_cpp, name, torch.float64), train(schedulefree, name, torch.float64)):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        train(schedulefree_cpp, name, torch.bfloat16)
    train(schedulefree_cpp, "AdamWScheduleFree", torch.bfloat16, state_bits=24, exp_avg_sq_bits=8)
    train(schedulefree_cpp, "AdamCScheduleFreePlus", torch.float32)
    for name in cases.NATIVE:
        plain, capturable = (
            train(schedulefree_cpp, name, torch.float64, max_grad_norm=1.0, weight_decay=0.1, capturable=capturable)
            for capturable in (False, True)
        )
        cases.assert_same(plain, capturable)
ours = [w for w in caught if "has no kernels for cpu" in str(w.message)]
assert len(ours) == 1, [str(w.message) for w in caught]
print("trained")
"""


def test_every_optimizer_trains_on_a_device_without_kernels():
    code = TRAIN.format(tests=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "trained", done.stderr
