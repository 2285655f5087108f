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
from schedulefree_cpp import _fallback, _library, ops

STEP = {"lr": 0.1, "w": 0.3, "a": -0.05, "beta": 0.9}
ADAM = {**STEP, "beta2": 0.99, "denom_scale": 1.5, "denom_eps": 1e-8}
# Contractions are rounded once in kernels and twice in torch.
CLOSE = {
    torch.float32: {"rtol": 2e-6, "atol": 1e-6},
    torch.float64: {"rtol": 1e-14, "atol": 1e-14},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2},
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
}


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    monkeypatch.setattr(_fallback, "_warned", {"cpu"})


def streams(dtype: torch.dtype, *, low: bool, strided: bool = False) -> dict[str, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(dtype):
        drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in cases.SHAPES]
        return [t.mT.contiguous().mT if strided and t.ndim > 1 else t for t in drawn]

    state = torch.float64 if dtype == torch.float64 else torch.float32
    lists = {
        "y": draw(dtype),
        "y_lo": [],
        "grad": draw(dtype),
        "z": draw(state),
        "exp_avg_sq": [t.abs() for t in draw(state)],
        "exp_avg": draw(state),
    }
    if low:
        lists["y_lo"] = [
            torch.randint(-32768, 32768, t.shape, generator=generator).short() for t in lists["y"]
        ]
    return lists


def copied(lists: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    return {name: [t.clone() for t in tensors] for name, tensors in lists.items()}


def assert_close(one, other, dtype, names) -> None:
    for name in names:
        for i, (a, b) in enumerate(zip(one[name], other[name], strict=True)):
            tolerance = CLOSE[dtype] if name == "y" else CLOSE[a.dtype]
            torch.testing.assert_close(a, b, **tolerance, msg=lambda m, at=(name, i): f"{at}: {m}")
    if one["y_lo"]:
        for y, lo, y2, lo2 in zip(one["y"], one["y_lo"], other["y"], other["y_lo"], strict=True):
            torch.testing.assert_close(
                _fallback._load(y, lo), _fallback._load(y2, lo2), **CLOSE[torch.float32]
            )


DTYPES = [(dtype, False) for dtype in cases.DTYPES] + [(torch.bfloat16, True)]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("decay_at", [0, 1])
@pytest.mark.parametrize(("dtype", "low"), DTYPES)
def test_steps_are_those_of_the_kernels(dtype, low, decay_at, strided):
    lists = streams(dtype, low=low, strided=strided)
    for name, scalars, names in (
        ("sgd_step_", STEP, ("y", "y_lo", "grad", "z")),
        ("adamw_step_", ADAM, ("y", "y_lo", "grad", "z", "exp_avg_sq")),
        ("adamw_step_", {**ADAM, "inner_momentum": 0.9}, tuple(lists)),
    ):
        coefs = ops.coefs(**scalars, weight_decay=0.1, grad_mul=-0.5)
        one, other = copied(lists), copied(lists)
        extra = [[]] if name == "adamw_step_" and "exp_avg" not in names else []
        getattr(ops, name)(*(one[key] for key in names), *extra, coefs, decay_at=decay_at)
        _fallback.OPERATORS[name](*(other[key] for key in names), *extra, coefs, decay_at=decay_at)
        assert_close(one, other, dtype, [key for key in names if key not in ("y_lo", "grad")])
        assert all(map(torch.equal, other["grad"], lists["grad"]))
        assert not torch.equal(other["y"][-1], lists["y"][-1])


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("dtype", "low"), DTYPES)
def test_swaps_are_those_of_the_kernels(dtype, low, strided):
    """Bit for bit, but for the last bit of float64, which kernels compute with more than float64."""
    close = partial(torch.allclose, rtol=1e-15, atol=1e-15) if dtype == torch.float64 else torch.equal
    one = streams(dtype, low=low, strided=strided)
    other = copied(one)
    for name in ("y_to_x_", "x_to_y_"):
        getattr(ops, name)(one["y"], one["y_lo"], one["z"], beta=0.9)
        _fallback.OPERATORS[name](other["y"], other["y_lo"], other["z"], beta=0.9)
        assert all(map(close, one["y"] + one["y_lo"], other["y"] + other["y_lo"]))


@pytest.mark.parametrize(("dtype", "low"), [pair for pair in DTYPES if pair[0] != torch.float64])
def test_evaluation_after_a_step_is_undone_exactly(dtype, low):
    lists = streams(dtype, low=low)
    arguments = [lists[key] for key in ("y", "y_lo", "grad", "z")]
    _fallback.sgd_step_(*arguments, ops.coefs(**STEP))
    stepped = copied(lists)
    _fallback.y_to_x_(lists["y"], lists["y_lo"], lists["z"], beta=0.9)
    assert not torch.equal(lists["y"][-1], stepped["y"][-1])
    _fallback.x_to_y_(lists["y"], lists["y_lo"], lists["z"], beta=0.9)
    assert all(map(torch.equal, lists["y"] + lists["y_lo"], stepped["y"] + stepped["y_lo"]))


def test_a_skipped_step_changes_nothing():
    lists = streams(torch.float32, low=False)
    before = copied(lists)
    coefs = ops.coefs(**STEP, take=0.0)
    _fallback.sgd_step_(lists["y"], [], lists["grad"], lists["z"], coefs)
    assert all(map(torch.equal, lists["y"] + lists["z"], before["y"] + before["z"]))


@pytest.mark.parametrize(("dtype", "low"), DTYPES)
def test_sums_are_those_of_the_kernels(dtype, low):
    lists = streams(dtype, low=low)
    arguments = [lists[key] for key in ("y", "y_lo", "grad", "z")]
    torch.testing.assert_close(
        _fallback.polyak_sums(*arguments), ops.polyak_sums(*arguments), rtol=1e-12, atol=1e-12
    )
    grad = lists["grad"]
    torch.testing.assert_close(_fallback.grad_norm(grad), ops.grad_norm(grad), rtol=1e-12, atol=0)


def test_splitting_keeps_every_bit():
    bits = torch.randint(-(2**31), 2**31, (100_000,)).int()
    wide = bits.view(torch.float32)
    y, lo = torch.empty(len(bits), dtype=torch.bfloat16), torch.empty(len(bits), dtype=torch.int16)
    _fallback._store(y, lo, wide)
    back = _fallback._load(y, lo)
    finite = ~wide.isnan()
    assert torch.equal(back[finite].view(torch.int32), bits[finite])
    assert back[~finite].isnan().all()


def test_a_refused_call_has_changed_nothing():
    lists = streams(torch.float32, low=False)
    before = copied(lists)
    lists["z"][-1] = lists["z"][-1][:3]
    with pytest.raises(RuntimeError, match=r"sgd_step_.*z\[11\].*shape"):
        _fallback.sgd_step_(lists["y"], [], lists["grad"], lists["z"], ops.coefs(**STEP))
    with pytest.raises(RuntimeError, match=r"sgd_step_.*layout torch.sparse_coo"):
        _fallback.sgd_step_(
            [torch.ones(3)], [], [torch.ones(3).to_sparse()], [torch.ones(3)], ops.coefs(**STEP)
        )
    assert all(map(torch.equal, lists["y"], before["y"]))


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
    assert set(_fallback.OPERATORS) == set(_library.OPERATORS)
    for name in _library.OPERATORS:
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
    code = TRAIN.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "trained", done.stderr
