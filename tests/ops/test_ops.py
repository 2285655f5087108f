"""The operators, against the float64 oracle and torch's own contracts for custom operators."""

from __future__ import annotations

import math
from itertools import chain

import cases
import pytest
import reference
import torch
from schedulefree_cpp import _C, AdamWScheduleFree, ops
from schedulefree_cpp._core import formats, library
from torch.library import opcheck

STEP = {"lr": 0.1, "w": 0.3, "a": -0.05, "beta": 0.9}
ADAM = {**STEP, "beta2": 0.99, "denom_scale": 1.5, "denom_eps": 1e-8}
OPS = torch.ops.schedulefree_cpp


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensors(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def clones(values):
    return [t.clone() for t in values]


def streams(shapes, dtype=torch.float32):
    """(y, grad, z, exp_avg_sq, exp_avg) for one call."""
    y, grad = tensors(shapes, dtype, 1), tensors(shapes, dtype, 2)
    z, v, m = (tensors(shapes, state_dtype(dtype), seed) for seed in (3, 4, 5))
    return y, grad, z, [t.abs() for t in v], m


def lows(y):
    """Low halves of 16-bit parameters that are what their high halves say; none for others."""
    dtypes = {t.dtype for t in y}
    if not dtypes & {torch.bfloat16, torch.float16}:
        return []
    return [torch.zeros_like(t if t.element_size() == 2 else t.flatten()[:0], dtype=torch.int16) for t in y]


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


# ---- arithmetic --------------------------------------------------------------------------------------


def one_step(h: reference.Hyperparameters, scale: float, seed: int):
    """One step by the operator and by the oracle, from the same random state. Returns errors in ulps."""
    n = 100_000
    generator = torch.Generator().manual_seed(seed)

    def draw():
        spread = 10 ** torch.empty(n).uniform_(-2, 2, generator=generator)
        return torch.randn(n, generator=generator) * spread * scale

    y, z, grad = draw(), draw(), draw()
    v = (grad * torch.randn(n, generator=generator)).square()
    m = draw() if h.inner_momentum else torch.zeros(n)
    k = 11
    s = _C.schedule_step(
        kind=ops.STEP_KINDS["adamw" if h.adam else "sgd"], k=k, weight_sum=0.004, lr_max=h.lr, lr=h.lr,
        weight_decay=h.weight_decay, beta=h.beta, beta_next=h.beta, warmup_steps=h.warmup_steps, r=h.r,
        weight_lr_power=h.weight_lr_power, beta2=h.beta2, inner_momentum=h.inner_momentum, eps=h.eps,
        maximize=h.maximize, decoupling_c=h.decoupling_c, averaging_weight=h.averaging_weight,
    )  # fmt: skip
    scalars = dict(zip(ops.COEFFICIENTS, s.coefs, strict=True))

    it = reference.Iterate.start(y)
    it.z, it.v, it.m = z.double(), v.double(), m.double()
    it.x = it.z + (it.y - it.z) / h.beta
    before = reference.Iterate(it.x, it.y, it.z, it.v, it.m)
    u_unit = reference.update(it, grad, h, k=k, lr=s.scheduled_lr, c=s.c, beta=h.beta)

    y, z, v, m = [y], [z], [v], [m]
    coefs, decay_at = ops.coefs(**scalars), ops.DECAY_AT[h.decay_at]
    if h.adam:
        ops.adamw_step_(y, [], [grad], z, v, m if h.inner_momentum else [], coefs, decay_at=decay_at)
    else:
        ops.sgd_step_(y, [], [grad], z, coefs, decay_at=decay_at)

    decay = h.weight_decay * (before.y if h.decay_at == "y" else before.z)
    w, a, lr = scalars["w"], scalars["a"], scalars["lr"]
    near = before.y if w < 0.5 else before.z
    terms = {
        "y": [near, w * (before.z - before.y), a * decay, it.y, it.x],  # of x, since y is settled
        "z": [before.z, lr * decay, it.z],
        "v": [it.v],
        "m": [h.inner_momentum * before.m, (1 - h.inner_momentum) * grad.double()],
    }
    units = {name: torch.stack([reference.ulp(t) for t in values]).amax(0) for name, values in terms.items()}
    units["y"] = torch.maximum(units["y"], abs(a) * u_unit)
    units["z"] = torch.maximum(units["z"], lr * u_unit)
    got = {"y": y[0], "z": z[0], "v": v[0], "m": m[0]}
    checked = {"y", "z"} | ({"v"} if h.adam else set()) | ({"m"} if h.inner_momentum else set())
    errors = {}
    for name in checked:
        error = (got[name].double() - getattr(it, name)).abs() / units[name]
        assert error.isfinite().all()
        errors[name] = error.max().item()
    return errors


@pytest.mark.parametrize("magnitude", cases.MAGNITUDES)
@pytest.mark.parametrize("h", cases.ADAMW + cases.SGD, ids=cases.name_of)
def test_one_step_is_within_four_ulps_of_the_oracle(h, magnitude):
    errors = one_step(h, cases.MAGNITUDES[magnitude], seed=len(magnitude))
    assert max(errors.values()) <= cases.MAX_ULPS, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [1.0, 0.95, 0.9, 0.3])
def test_swaps_follow_the_definition_and_undo_each_other(beta, dtype):
    y, _, z, _, _ = streams(cases.SHAPES, dtype)
    start = clones(y)
    ops.y_to_x_(y, [], z, beta=beta)
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-14, "atol": 1e-14}
    for x, y0, z0 in zip(y, start, z, strict=True):
        torch.testing.assert_close(beta * x + (1 - beta) * z0, y0, **tolerance)
    ops.x_to_y_(y, [], z, beta=beta)
    for a, b in zip(y, start, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_interpolation_reaches_z_exactly():
    y, grad, z, _, _ = streams(cases.SHAPES)
    expected = clones(z)
    ops.sgd_step_(y, [], grad, z, ops.coefs(w=1.0, beta=0.9))
    assert_equal(y, expected)


def test_squares_overflow_only_where_the_mean_does():
    g = torch.tensor([3e19])
    v = [torch.zeros(1)]
    ops.adamw_step_([torch.zeros(1)], [], [g], [torch.zeros(1)], v, [], ops.coefs(**{**ADAM, "beta2": 0.999}))
    torch.testing.assert_close(v[0].double(), 0.001 * g.double().square(), rtol=1e-6, atol=0)


# ---- 16-bit parameters -------------------------------------------------------------------------------


def split(values):
    """(high halves, low halves) of float32 tensors, by the definition."""
    bits = [t.view(torch.int32) for t in values]
    hi = [((b.long() + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16) for b in bits]
    lo = [(b & 0xFFFF).to(torch.int16) for b in bits]
    return hi, lo


def join(hi, lo):
    return [
        ((h.view(torch.int16).int() << 16) + low.int()).view(torch.float32)
        for h, low in zip(hi, lo, strict=True)
    ]


def test_bfloat16_with_low_half_is_the_float32_trajectory():
    y, _, z, v, m = streams([*cases.SHAPES, cases.LARGE])
    grad = tensors([t.shape for t in y], torch.bfloat16, 9)
    hi, lo = split(y)
    assert_equal(join(hi, lo), y)
    z2, v2, m2 = clones(z), clones(v), clones(m)
    adam = {**ADAM, "inner_momentum": 0.9, "weight_decay": 0.1}
    for _ in range(5):
        ops.adamw_step_(y, [], [g.float() for g in grad], z, v, m, ops.coefs(**adam))
        ops.adamw_step_(hi, lo, grad, z2, v2, m2, ops.coefs(**adam))
        ops.y_to_x_(y, [], z, beta=0.9)
        ops.y_to_x_(hi, lo, z2, beta=0.9)
        assert_equal(join(hi, lo), y)
        ops.x_to_y_(y, [], z, beta=0.9)
        ops.x_to_y_(hi, lo, z2, beta=0.9)
    assert_equal(join(hi, lo), y)
    assert_equal(z2, z)
    assert_equal(v2, v)


def test_low_half_handles_infinities_and_nans():
    values = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4028235e38, -3.4028235e38, 0.0, -0.0, 1e-45])
    low_payload_nan = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    values = torch.cat([values, low_payload_nan])
    n = values.numel()
    hi, lo = [torch.zeros(n, dtype=torch.bfloat16)], [torch.zeros(n, dtype=torch.int16)]
    ops.sgd_step_(hi, lo, [values], [torch.zeros(n)], ops.coefs(a=1.0, beta=0.9))
    torch.testing.assert_close(join(hi, lo)[0], values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(hi[0].isnan(), values.isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_round_as_torch_does(dtype):
    # Every 16-bit value, and float32 values around and between them.
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = every.float()
    values = torch.cat(
        [wide, wide * 1.0009765625, wide * 1.001953125, wide * 0.99951171875, torch.randn(5000) * 1e-5]
    )
    values = values[~(values.abs() > 1e38)]
    y = [torch.zeros(values.shape, dtype=dtype)]
    ops.x_to_y_(y, [], [2 * values], beta=0.5)
    torch.testing.assert_close(y[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)
    y = [torch.zeros_like(wide)]
    ops.sgd_step_(y, [], [every], [torch.zeros_like(wide)], ops.coefs(a=1.0, beta=1.0))
    torch.testing.assert_close(y[0], wide, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_may_have_another_dtype(dtype, grad_dtype):
    y, _, z, v, _ = streams(cases.SHAPES, dtype)
    grad = tensors(cases.SHAPES, grad_dtype, 2)
    y2, z2, v2 = clones(y), clones(z), clones(v)
    lo, lo2 = lows(y), lows(y)
    ops.adamw_step_(y, lo, grad, z, v, [], ops.coefs(**ADAM))
    ops.adamw_step_(y2, lo2, [g.float() for g in grad], z2, v2, [], ops.coefs(**ADAM))
    assert_equal(y + lo + z + v, y2 + lo2 + z2 + v2)


# ---- y is stored settled ------------------------------------------------------------------------------


def spread(shape, seed):
    """Values of many magnitudes, special ones among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-9, 9, shape, generator=generator)
    special = [0.0, -0.0, 1.0, -2.0, 0.99999994, 1e-45, -1e-39, 3e38, torch.inf, -torch.inf, torch.nan]
    values.view(-1)[: len(special) * 7] = torch.tensor(special).repeat(7)
    return values


def step_without_gradient(dtype, near, beta):
    """(y, low half, z) of ``y + (z - y) / 3``, stored by a step for this beta."""
    y, z = spread((50_021,), 1), spread((50_021,), 2).roll(1)
    if near:  # few elements can move
        z = y * (1 + 0.01 * torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
    hi, lo = [torch.empty_like(y, dtype=dtype)], lows([y.to(dtype)])
    formats.store(hi[0], lo[0] if lo else None, y)
    zeros = torch.zeros_like(hi[0])
    ops.sgd_step_(hi, lo, [zeros], [z], ops.coefs(w=1 / 3, beta=beta))
    return hi, lo, [z]


STORED = [torch.float32, torch.bfloat16, torch.float16]
BETAS = [0.999, 0.9, 0.5, 0.3]


def wide(hi, lo):
    return formats.load(hi[0], lo[0] if lo else None)


@pytest.mark.parametrize("near", [True, False])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", STORED)
def test_a_step_settles_y_as_two_round_trips_of_every_element_do(dtype, beta, near):
    def swapped(p, z, weight):
        return storage.rounded(p.double() + weight * (z.double() - p.double()))

    # With beta 1 both swaps leave y as it is.
    hi, lo, (z,) = step_without_gradient(dtype, near, beta=1.0)
    storage = formats.storage_of(hi[0], lo[0] if lo else None)
    expected = wide(hi, lo)
    for _ in range(2):
        x = swapped(expected, z, (beta - 1) / beta)
        back = swapped(x, z, 1 - beta)
        expected = torch.where(back.isfinite(), back, expected)
    hi, lo, _ = step_without_gradient(dtype, near, beta)
    got = wide(hi, lo)
    assert_equal([got.isnan(), got.signbit()], [expected.isnan(), expected.signbit()])
    assert_equal([got.nan_to_num(123.0)], [expected.nan_to_num(123.0)])


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", STORED)
def test_after_a_step_the_swaps_undo_each_other_exactly(dtype, beta):
    hi, lo, z = step_without_gradient(dtype, near=False, beta=beta)
    before, before_lo = clones(hi), clones(lo)
    ops.y_to_x_(hi, lo, z, beta=beta)
    finite = hi[0].isfinite() & before[0].isfinite()
    assert not torch.equal(hi[0][finite], before[0][finite])
    ops.x_to_y_(hi, lo, z, beta=beta)
    assert_equal([t[finite] for t in hi + lo], [t[finite] for t in before + before_lo])


# ---- sums --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_polyak_sums(dtype):
    shapes = [*cases.SHAPES, cases.LARGE, *[(5,)] * 700]
    y, grad, z, _, _ = streams(shapes, dtype)
    everything = [t.clone() for t in y + grad + z]
    sums = ops.polyak_sums(y, lows(y), grad, z)
    assert sums.dtype == torch.float64
    wide = [[t.double() for t in ts] for ts in (y, grad, z)]
    l1 = sum(g.abs().sum() for g in wide[1])
    inner = sum((g * (c - a)).sum() for a, g, c in zip(*wide, strict=True))
    terms = sum((g * (c - a)).abs().sum() for a, g, c in zip(*wide, strict=True))
    torch.testing.assert_close(sums[0], l1, rtol=1e-14, atol=0)
    torch.testing.assert_close(sums[1], inner, rtol=0, atol=1e-15 * terms.item())
    assert_equal(y + grad + z, everything)


def test_polyak_sums_see_the_low_half():
    y, grad, z, _, _ = streams(cases.SHAPES)
    hi, lo = split(y)
    assert_equal([ops.polyak_sums(hi, lo, grad, z)], [ops.polyak_sums(y, [], grad, z)])
    strided = [cases.with_strides(t, "transposed") if t.ndim > 1 else t for t in y]
    torch.testing.assert_close(ops.polyak_sums(strided, [], grad, z), ops.polyak_sums(y, [], grad, z))


def test_polyak_sums_of_what_is_not_finite():
    y, z = [torch.zeros(40)], [torch.ones(40)]
    for value in (torch.inf, torch.nan):
        grad = [torch.ones(40)]
        grad[0][33] = value
        sums = ops.polyak_sums(y, [], grad, z)
        assert not sums.isfinite().any()


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_grad_norm(dtype):
    grad = tensors([*cases.SHAPES, cases.LARGE, *[(5,)] * 700], dtype)
    before = clones(grad)
    norm = ops.grad_norm(grad)
    assert (norm.dtype, norm.shape) == (torch.float64, ())
    squares = torch.cat([g.double().flatten() for g in grad]).square()
    expected = torch.tensor(math.sqrt(math.fsum(squares.tolist())), dtype=torch.float64)
    torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)
    assert_equal(grad, before)
    strided = [cases.with_strides(g, "transposed") if g.ndim > 1 else g for g in grad]
    torch.testing.assert_close(ops.grad_norm(strided), expected, rtol=1e-14, atol=0)


def test_grad_norm_takes_any_mixture_and_any_value():
    mixed = [torch.full((2,), 3.0, dtype=dtype) for dtype in cases.DTYPES]
    assert ops.grad_norm(mixed).item() == 72**0.5
    assert ops.grad_norm([torch.ones(1).expand(4)]).item() == 2.0
    assert ops.grad_norm([torch.full((4,), 1e30)]).item() == pytest.approx(
        2e30
    )  # beyond float32 when squared
    assert ops.grad_norm([torch.tensor([1.0, torch.inf])]).item() == torch.inf
    assert ops.grad_norm([torch.tensor([1.0, torch.nan])]).isnan()


# ---- memory layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "state_layout", "grad_layout", "dtype"),
    cases.matrix(cases.LAYOUTS, cases.LAYOUTS, [*cases.LAYOUTS, "expanded"], cases.DTYPES),
)
def test_strides_do_not_change_results(layout, state_layout, grad_layout, dtype):
    # 2 * 5 * 33 * 7 elements: more than one block, and rows that end inside one.
    shape = (2, 5, 33, 7)
    y, grad, z, v, m = streams([shape], dtype)
    if grad_layout == "expanded":
        grad = [grad[0][:, :1].expand(shape)]
    expected = clones(y), clones(z), clones(v), clones(m)
    adam = {**ADAM, "inner_momentum": 0.9, "weight_decay": 0.1}
    lo, lo2 = lows(y), lows(y)
    ops.adamw_step_(expected[0], lo, [grad[0].contiguous()], *expected[1:], ops.coefs(**adam))
    got = [[cases.with_strides(y[0], layout)]] + [[cases.with_strides(t[0], state_layout)] for t in (z, v, m)]
    strided_grad = grad[0] if grad_layout == "expanded" else cases.with_strides(grad[0], grad_layout)
    ops.adamw_step_(got[0], lo2, [strided_grad], *got[1:], ops.coefs(**adam))
    for a, b in zip(got, expected, strict=True):
        assert_equal(a, b)
    ops.y_to_x_(expected[0], lo, expected[1], beta=0.9)
    ops.y_to_x_(got[0], lo2, got[1], beta=0.9)
    assert_equal(got[0] + lo2, expected[0] + lo)


def test_low_half_may_have_strides_of_its_own():
    y, _, z, _, _ = streams([(4, 3, 6, 5)])
    hi, lo = split(y)
    hi = [cases.with_strides(hi[0], "channels_last")]
    lo = [cases.with_strides(lo[0], "gaps")]
    ops.x_to_y_(y, [], z, beta=0.9)
    ops.x_to_y_(hi, lo, z, beta=0.9)
    assert_equal(join([hi[0].contiguous()], [lo[0].contiguous()]), y)


def test_columns_of_one_buffer_are_separate_parameters():
    buffer = torch.randn(9, 8)
    left, right = buffer[:, :3], buffer[:, 3:]
    grad = [torch.randn(9, 3), torch.randn(9, 5)]
    z = [left.clone(), right.clone()]
    expected = [t - 0.1 * g for t, g in zip(z, grad, strict=True)]
    ops.sgd_step_([left, right], [], grad, z, ops.coefs(lr=0.1, a=-0.1, beta=1.0))
    for a, b in zip([left, right], expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_a_call_over_many_tensors_equals_calls_over_each(dtype):
    shapes = [*cases.SHAPES, cases.LARGE, *[(5,)] * 700]
    y, grad, z, v, _ = streams(shapes, dtype)
    y2, z2, v2 = clones(y), clones(z), clones(v)
    lo, lo2 = lows(y), lows(y)
    ops.adamw_step_(y, lo, grad, z, v, [], ops.coefs(**ADAM))
    for i in range(len(shapes)):
        ops.adamw_step_([y2[i]], lo2[i : i + 1], [grad[i]], [z2[i]], [v2[i]], [], ops.coefs(**ADAM))
    assert_equal(y + lo + z + v, y2 + lo2 + z2 + v2)


def test_dtypes_may_be_mixed_in_one_call():
    parts = [streams(cases.SHAPES, dtype) for dtype in cases.DTYPES]
    joined = [clones(list(chain(*lists))) for lists in zip(*parts, strict=True)]
    ops.sgd_step_(joined[0], lows(joined[0]), joined[1], joined[2], ops.coefs(**STEP))
    for y, grad, z, _, _ in parts:
        ops.sgd_step_(y, lows(y), grad, z, ops.coefs(**STEP))
    assert_equal(joined[0], list(chain(*(p[0] for p in parts))))


# ---- torch's contracts -------------------------------------------------------------------------------


def test_empty_lists_are_accepted():
    ops.sgd_step_([], [], [], [], ops.coefs(**STEP))
    ops.adamw_step_([], [], [], [], [], [], ops.coefs(**ADAM))
    ops.y_to_x_([], [], [], beta=0.9)
    ops.x_to_y_([], [], [], beta=0.9)
    ops.before_base_step_([], [], [], ops.coefs(**STEP), beta=0.9)
    ops.after_base_step_([], [], [], ops.coefs(**STEP))
    assert ops.polyak_sums([], [], [], []).tolist() == [0.0, 0.0]
    assert ops.grad_norm([]).item() == 0.0


def test_gradients_are_not_written_and_versions_rise():
    y, grad, z, v, m = streams(cases.SHAPES)
    before = clones(grad)
    versions = [p._version for p in y]
    coefs = ops.coefs(**ADAM, inner_momentum=0.5)
    for write in (
        lambda: ops.adamw_step_(y, [], grad, z, v, m, coefs),
        lambda: ops.sgd_step_(y, [], grad, z, coefs),
        lambda: ops.y_to_x_(y, [], z, beta=0.9),
        lambda: ops.x_to_y_(y, [], z, beta=0.9),
    ):
        write()
        assert all(p._version > version for p, version in zip(y, versions, strict=True))
        versions = [p._version for p in y]
    versions = [t._version for t in y + z]
    for write in (
        lambda: ops.before_base_step_(y, [], z, coefs, beta=0.9),
        lambda: ops.after_base_step_(y, [], z, coefs),
    ):
        write()
        assert all(t._version > version for t, version in zip(y + z, versions, strict=True))
        versions = [t._version for t in y + z]
    assert_equal(grad, before)
    assert all(g._version == 0 for g in grad)


def test_a_step_between_forward_and_backward_is_noticed():
    p = torch.nn.Parameter(torch.randn(4))
    loss = (p * p).sum()
    with torch.no_grad():
        ops.sgd_step_([p], [], [torch.ones(4)], [torch.zeros(4)], ops.coefs(**STEP))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


RULE = {"kind": 1, "beta": 0.9, "warmup_steps": 4.0, "r": 0.5, "weight_lr_power": 2.0, "beta2": 0.99}


def schedule():
    numbers = [torch.tensor(value, dtype=torch.float64) for value in (0.5, 0.1, 0.05)]
    return ops.coefs(**ADAM), torch.tensor(3), *numbers, torch.tensor(0.1), torch.tensor([0.01]).double()


def calls():
    shapes = [(3, 4), (5,), ()]
    y, grad, z, v, m = streams(shapes)
    y = [t.requires_grad_() for t in y]
    hi, lo = split(tensors(shapes))
    sgd, adamw = ops.coefs(**STEP), ops.coefs(**ADAM)
    none = {"z_lo": [], "exp_avg_sq_scale": []}

    def bytes_of(tensors):
        return [torch.zeros_like(t, dtype=torch.int8) for t in tensors]

    def codes_of(tensors):
        return [torch.full_like(t, 9, dtype=torch.uint8) for t in tensors]

    return {
        "sgd_step_": ((y, [], grad, z, sgd), {"z_lo": []}),
        "sgd_step_-bf16": ((hi, lo, grad, z, sgd), {"z_lo": []}),
        "adamw_step_": ((y, [], grad, z, v, [], adamw), none),
        "adamw_step_-inner": (
            (y, [], grad, z, v, m, ops.coefs(**ADAM, inner_momentum=0.9)),
            {**none, "decay_at": 1},
        ),
        "adamw_step_-bf16": ((hi, lo, grad, z, v, [], adamw), none),
        "adamw_step_-24 and 8 bits": (
            (hi, bytes_of(hi), grad, clones(hi), codes_of(hi), [], adamw),
            {"z_lo": bytes_of(hi), "exp_avg_sq_scale": [torch.ones(formats.scales_for(t)) for t in hi]},
        ),
        "schedule_step_": (schedule(), RULE),
        "schedule_step_-amp": (
            schedule(),
            {
                **RULE,
                "grad_norm": torch.tensor(3.0, dtype=torch.float64),
                "max_grad_norm": 1.5,
                "grad_scale": torch.tensor(4.0),
                "found_inf": torch.tensor([0.0]),
            },
        ),
        "y_to_x_": ((y, [], z), {"z_lo": [], "beta": 0.9}),
        "x_to_y_": ((y, [], z), {"z_lo": [], "beta": 0.9}),
        "x_to_y_-bf16": ((hi, lo, z), {"z_lo": [], "beta": 0.9}),
        "before_base_step_": ((y, [], z, sgd), {"beta": 0.9}),
        "before_base_step_-bf16": ((hi, lo, z, sgd), {"beta": 0.9, "exchange": False}),
        "after_base_step_": ((y, [], z, sgd), {}),
        "after_base_step_-bf16": ((hi, lo, z, sgd), {"exchange": False}),
        "polyak_sums": ((y, [], grad, z), {"z_lo": []}),
        "polyak_sums-bf16": ((hi, lo, grad, z), {"z_lo": []}),
        "grad_norm": (([*grad, *hi],), {}),
    }


@pytest.mark.parametrize("call", list(calls()))
@pytest.mark.filterwarnings("default")
def test_opcheck(call):
    arguments, scalars = calls()[call]
    with torch.no_grad():
        results = opcheck(getattr(OPS, call.split("-")[0]).default, arguments, scalars)
    assert set(results.values()) == {"SUCCESS"}


def test_meta_tensors_are_checked_and_nothing_else():
    meta = [torch.empty(3, 4, device="meta") for _ in range(4)]
    y, grad, z, v = ([t] for t in meta)
    ops.adamw_step_(y, [], grad, z, v, [], ops.coefs(**ADAM))
    with pytest.raises(RuntimeError, match=r"z\[0\]: expected shape \[3, 4\] like y\[0\], got \[2\]"):
        ops.sgd_step_(y, [], grad, [torch.empty(2, device="meta")], ops.coefs(**STEP))


# ---- scalars -----------------------------------------------------------------------------------------


def test_coefs_are_in_the_order_of_their_names():
    values = {name: float(i) for i, name in enumerate(ops.COEFFICIENTS)}
    assert ops.coefs(**values).tolist() == list(values.values())
    given = dict(zip(ops.COEFFICIENTS, ops.coefs(beta=0.5).tolist(), strict=True))
    ones = {"take": 1.0, "grad_mul": 1.0, "denom_scale": 1.0, "beta": 0.5}
    assert given == {name: ones.get(name, 0.0) for name in ops.COEFFICIENTS}


def test_coefs_refuses_other_names_and_no_beta():
    with pytest.raises(TypeError, match="unknown learning_rate"):
        ops.coefs(beta=0.9, learning_rate=0.1)
    with pytest.raises(TypeError, match=r"expected beta and any others of take, lr.*got no beta"):
        ops.coefs(lr=0.1)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_step_that_is_not_taken_changes_nothing(device):
    y, grad, z, v, _ = ([t.to(device) for t in ts] for ts in streams(cases.SHAPES))
    before = clones(y + z + v)
    coefs = ops.coefs(**ADAM, take=0.0)
    ops.sgd_step_(y, [], grad, z, coefs)
    ops.adamw_step_(y, [], grad, z, v, [], coefs)
    ops.before_base_step_(y, [], z, coefs, beta=0.9)
    ops.after_base_step_(y, [], z, coefs)
    if device == "cpu":
        assert_equal(y + z + v, before)


def test_schedule_step_fills_coefs_as_the_host_does():
    coefs, k, weight_sum, lr_max, scheduled_lr, lr, weight_decay = schedule()
    rule = {name: value for name, value in RULE.items() if name != "beta"}
    for _ in range(5):
        host = _C.schedule_step(
            k=k.item(), weight_sum=weight_sum.item(), lr_max=lr_max.item(), scheduled_lr=scheduled_lr.item(),
            lr=lr.item(), weight_decay=weight_decay.item(), beta=0.9, beta_next=0.9, **rule,
        )  # fmt: skip
        ops.schedule_step_(coefs, k, weight_sum, lr_max, scheduled_lr, lr, weight_decay, **RULE)
        assert tuple(coefs.tolist()) == host.coefs
        assert (k.item(), weight_sum.item(), lr_max.item()) == (host.k, host.weight_sum, host.lr_max)
        assert scheduled_lr.item() == host.scheduled_lr


@pytest.mark.compile
def test_compiled_steps_are_one_graph_and_raise_versions():
    y, grad, z, v, _ = streams([(3, 4), (5,)])
    y2, z2, v2 = clones(y), clones(z), clones(v)
    params = [torch.nn.Parameter(t) for t in y]
    coefs = ops.coefs(**ADAM)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    @torch.compile(fullgraph=True, backend="aot_eager")
    @torch.no_grad()
    def step():
        ops.adamw_step_(params, [], grad, z, v, [], coefs)

    for i in range(3):
        coefs[ops.COEFFICIENTS.index("lr")] = 0.1 * i
        versions = [p._version for p in params]
        step()
        assert all(p._version > version for p, version in zip(params, versions, strict=True))
        ops.adamw_step_(y2, [], grad, z2, v2, [], coefs)
        assert_equal([*params, *z, *v], y2 + z2 + v2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", library.OPERATORS)
def test_what_is_written_is_no_keyword_only_argument(name):
    # Autograd's and functionalization's readers of schemas take such arguments for `out=`.
    schema = getattr(torch.ops.schedulefree_cpp, name).default._schema
    written = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert [a.name for a in written if a.kwarg_only] == []


def test_a_step_is_taken_where_saved_tensors_may_be_mutated():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamWScheduleFree([p])
    optimizer.train()
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        loss = (p * p).sum()
        p.grad = torch.ones(3)
        optimizer.step()
        loss.backward()
    torch.testing.assert_close(
        p.grad, torch.full((3,), 3.0)
    )  # 1, and twice the parameter of the forward pass
