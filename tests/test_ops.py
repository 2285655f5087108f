"""The operators, against the float64 oracle and torch's own contracts for custom operators."""

from __future__ import annotations

import math
from itertools import chain

import cases
import pytest
import reference
import torch
from schedulefree_cpp import _C, ops
from torch.library import opcheck

STEP = {"lr": 0.1, "w": 0.3, "a": -0.05}
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
    k, weight_sum, lr_max = 11, 0.004, h.lr
    s = _C.advance(
        k=k, weight_sum=weight_sum, lr_max=lr_max, lr=h.lr, lr_factor=1.0, warmup_steps=h.warmup_steps, r=h.r,
        weight_lr_power=h.weight_lr_power, beta=h.beta, beta_next=h.beta,
    )  # fmt: skip

    it = reference.Iterate.start(y)
    it.z, it.v, it.m = z.double(), v.double(), m.double()
    it.x = it.z + (it.y - it.z) / h.beta
    before = reference.Iterate(it.x, it.y, it.z, it.v, it.m)
    u_unit = reference.update(it, grad, h, k=k, lr=s.lr, c=s.c, beta=h.beta)

    y, z, v, m = [y], [z], [v], [m]
    scalars = {
        "lr": s.lr, "w": s.w, "a": s.a, "weight_decay": h.weight_decay,
        "decay_at": ops.DECAY_AT[h.decay_at], "grad_mul": -1.0 if h.maximize else 1.0,
    }  # fmt: skip
    if h.adam:
        _, scale_, eps = _C.step_factors(
            kind=ops.STEP_KINDS["adamw"], k=k, beta2=h.beta2, inner_momentum=h.inner_momentum, eps=h.eps
        )
        ops.adamw_step_(
            y, [], [grad], z, v, m if h.inner_momentum else [],
            beta2=h.beta2, denom_scale=scale_, denom_eps=eps, inner_momentum=h.inner_momentum, **scalars,
        )  # fmt: skip
    else:
        ops.sgd_step_(y, [], [grad], z, **scalars)

    decay = h.weight_decay * (before.y if h.decay_at == "y" else before.z)
    near = before.y if s.w < 0.5 else before.z
    terms = {
        "y": [near, s.w * (before.z - before.y), s.a * decay, it.y],
        "z": [before.z, s.lr * decay, it.z],
        "v": [it.v],
        "m": [h.inner_momentum * before.m, (1 - h.inner_momentum) * grad.double()],
    }
    units = {name: torch.stack([reference.ulp(t) for t in values]).amax(0) for name, values in terms.items()}
    units["y"] = torch.maximum(units["y"], abs(s.a) * u_unit)
    units["z"] = torch.maximum(units["z"], s.lr * u_unit)
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
    ops.sgd_step_(y, [], grad, z, lr=0.0, w=1.0, a=0.0)
    assert_equal(y, expected)


def test_squares_overflow_only_where_the_mean_does():
    g = torch.tensor([3e19])
    v = [torch.zeros(1)]
    ops.adamw_step_([torch.zeros(1)], [], [g], [torch.zeros(1)], v, [], **{**ADAM, "beta2": 0.999})
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
        ops.adamw_step_(y, [], [g.float() for g in grad], z, v, m, **adam)
        ops.adamw_step_(hi, lo, grad, z2, v2, m2, **adam)
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
    ops.sgd_step_(hi, lo, [values], [torch.zeros(n)], lr=0.0, w=0.0, a=1.0)
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
    y = [torch.zeros(values.shape, dtype=dtype)]
    ops.sgd_step_(y, [], [values], [torch.zeros_like(values)], lr=0.0, w=0.0, a=1.0)
    torch.testing.assert_close(y[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)
    y = [torch.zeros_like(wide)]
    ops.sgd_step_(y, [], [every], [torch.zeros_like(wide)], lr=0.0, w=0.0, a=1.0)
    torch.testing.assert_close(y[0], wide, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_may_have_another_dtype(dtype, grad_dtype):
    y, _, z, v, _ = streams(cases.SHAPES, dtype)
    grad = tensors(cases.SHAPES, grad_dtype, 2)
    y2, z2, v2 = clones(y), clones(z), clones(v)
    ops.adamw_step_(y, [], grad, z, v, [], **ADAM)
    ops.adamw_step_(y2, [], [g.float() for g in grad], z2, v2, [], **ADAM)
    assert_equal(y + z + v, y2 + z2 + v2)


# ---- the exact way back ------------------------------------------------------------------------------


def spread(shapes, dtype, seed):
    """Values of many magnitudes, so that x often is in another binade than y."""
    generator = torch.Generator().manual_seed(seed)
    values = [
        torch.randn(s, generator=generator) * 10 ** torch.empty(s).uniform_(-6, 2, generator=generator)
        for s in shapes
    ]
    return [t.to(dtype) for t in values]


@pytest.mark.parametrize("beta", [1.0, 0.9, 0.5, 0.03])
@pytest.mark.parametrize(
    ("dtype", "low"), [*((dtype, False) for dtype in cases.DTYPES), (torch.bfloat16, True)]
)
def test_what_is_kept_makes_the_way_back_exact(dtype, beta, low):
    shapes = [*cases.SHAPES, cases.LARGE, *[(5,)] * 50]
    z = spread(shapes, state_dtype(dtype), 2)
    y, lo = split(spread(shapes, torch.float32, 1)) if low else (spread(shapes, dtype, 1), [])
    start, start_lo = clones(y), clones(lo)
    x, back = (clones(y), clones(lo)), (clones(y), clones(lo))
    ops.y_to_x_(*x, z, beta=beta)
    ops.y_to_x_(*back, z, beta=beta)
    ops.x_to_y_(*back, z, beta=beta)

    kept = ops.y_to_x_keep_(y, lo, z, beta=beta)
    assert_equal(y + lo, x[0] + x[1])
    at, value, count = kept
    assert count.sum() == len(at) == len(value)
    assert beta == 1 or len(at)
    full, full_start = (join(*back), join(start, start_lo)) if low else (back[0], start)
    parts = zip(at.split(count.tolist()), value.split(count.tolist()), strict=True)
    for a, b, (at_, value_) in zip(full, full_start, parts, strict=True):
        differ = (a != b) | (a.signbit() != b.signbit())
        assert torch.equal(differ.flatten().nonzero().flatten(), at_)
        assert torch.equal(b.flatten()[at_].double(), value_)

    ops.x_to_y_restore_(y, lo, z, *kept, beta=beta)
    assert_equal(y + lo, start + start_lo)


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "gaps"])
def test_kept_positions_are_those_of_the_dimensions(layout):
    shape = (2, 5, 33, 7)
    y, z = spread([shape], torch.float32, 1), spread([shape], torch.float32, 2)
    strided = [with_strides(y[0], layout)]
    start = y[0].clone()
    expected = ops.y_to_x_keep_(y, [], z, beta=0.9)
    got = ops.y_to_x_keep_(strided, [], [with_strides(z[0], "transposed")], beta=0.9)
    assert_equal(got, expected)
    ops.x_to_y_restore_(strided, [], z, *got, beta=0.9)
    assert_equal(strided, [start])


def test_nothing_is_kept_of_nans_and_infinities():
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])
    y, z = [special.repeat(5)], [special.repeat_interleave(5)]
    at, _, count = ops.y_to_x_keep_(y, [], z, beta=0.9)
    # An infinite y is lost in x - x, and kept; a NaN is a NaN again.
    assert not special.repeat(5)[at].isnan().any()
    assert count.tolist() == [len(at)]


def test_an_element_changed_in_between_is_not_restored():
    y, z = spread([(2000,)], torch.float32, 1), spread([(2000,)], torch.float32, 2)
    start = y[0].clone()
    kept = ops.y_to_x_keep_(y, [], z, beta=0.9)
    changed = kept[0][0]
    y[0][changed] = 5.0
    plain = clones(y)
    ops.x_to_y_(plain, [], z, beta=0.9)
    ops.x_to_y_restore_(y, [], z, *kept, beta=0.9)
    start[changed] = plain[0][changed]
    assert_equal(y, [start])


# ---- sums --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_polyak_sums(dtype):
    shapes = [*cases.SHAPES, cases.LARGE, *[(5,)] * 700]
    y, grad, z, _, _ = streams(shapes, dtype)
    everything = [t.clone() for t in y + grad + z]
    sums = ops.polyak_sums(y, [], grad, z)
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
    strided = [with_strides(t, "transposed") if t.ndim > 1 else t for t in y]
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
    strided = [with_strides(g, "transposed") if g.ndim > 1 else g for g in grad]
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


def with_strides(t, layout):
    """A copy of ``t`` with the same values and other strides."""
    if layout == "contiguous":
        return t.clone(memory_format=torch.contiguous_format)
    if layout == "channels_last":
        return t.clone().contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gaps":
        wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1] + 1)
        view = wide[..., 1::2]
        return view.copy_(t)
    raise AssertionError(layout)


LAYOUTS = ["contiguous", "channels_last", "transposed", "gaps"]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("grad_layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("state_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_change_results(layout, state_layout, grad_layout, dtype):
    # 2 * 5 * 33 * 7 elements: more than one block, and rows that end inside one.
    shape = (2, 5, 33, 7)
    y, grad, z, v, m = streams([shape], dtype)
    if grad_layout == "expanded":
        grad = [grad[0][:, :1].expand(shape)]
    expected = clones(y), clones(z), clones(v), clones(m)
    adam = {**ADAM, "inner_momentum": 0.9, "weight_decay": 0.1}
    ops.adamw_step_(expected[0], [], [grad[0].contiguous()], *expected[1:], **adam)
    got = [[with_strides(y[0], layout)]] + [[with_strides(t[0], state_layout)] for t in (z, v, m)]
    strided_grad = grad[0] if grad_layout == "expanded" else with_strides(grad[0], grad_layout)
    ops.adamw_step_(got[0], [], [strided_grad], *got[1:], **adam)
    for a, b in zip(got, expected, strict=True):
        assert_equal(a, b)
    ops.y_to_x_(expected[0], [], expected[1], beta=0.9)
    ops.y_to_x_(got[0], [], got[1], beta=0.9)
    assert_equal(got[0], expected[0])


def test_low_half_may_have_strides_of_its_own():
    y, _, z, _, _ = streams([(4, 3, 6, 5)])
    hi, lo = split(y)
    hi = [with_strides(hi[0], "channels_last")]
    lo = [with_strides(lo[0], "gaps")]
    ops.x_to_y_(y, [], z, beta=0.9)
    ops.x_to_y_(hi, lo, z, beta=0.9)
    assert_equal(join([hi[0].contiguous()], [lo[0].contiguous()]), y)


def test_columns_of_one_buffer_are_separate_parameters():
    buffer = torch.randn(9, 8)
    left, right = buffer[:, :3], buffer[:, 3:]
    grad = [torch.randn(9, 3), torch.randn(9, 5)]
    z = [left.clone(), right.clone()]
    expected = [t - 0.1 * g for t, g in zip(z, grad, strict=True)]
    ops.sgd_step_([left, right], [], grad, z, lr=0.1, w=0.0, a=-0.1)
    for a, b in zip([left, right], expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_a_call_over_many_tensors_equals_calls_over_each(dtype):
    shapes = [*cases.SHAPES, cases.LARGE, *[(5,)] * 700]
    y, grad, z, v, _ = streams(shapes, dtype)
    y2, z2, v2 = clones(y), clones(z), clones(v)
    ops.adamw_step_(y, [], grad, z, v, [], **ADAM)
    for i in range(len(shapes)):
        ops.adamw_step_([y2[i]], [], [grad[i]], [z2[i]], [v2[i]], [], **ADAM)
    assert_equal(y + z + v, y2 + z2 + v2)


def test_dtypes_may_be_mixed_in_one_call():
    parts = [streams(cases.SHAPES, dtype) for dtype in cases.DTYPES]
    joined = [clones(list(chain(*lists))) for lists in zip(*parts, strict=True)]
    ops.sgd_step_(joined[0], [], joined[1], joined[2], **STEP)
    for y, grad, z, _, _ in parts:
        ops.sgd_step_(y, [], grad, z, **STEP)
    assert_equal(joined[0], list(chain(*(p[0] for p in parts))))


# ---- torch's contracts -------------------------------------------------------------------------------


def test_empty_lists_are_accepted():
    ops.sgd_step_([], [], [], [], **STEP)
    ops.adamw_step_([], [], [], [], [], [], **ADAM)
    ops.y_to_x_([], [], [], beta=0.9)
    ops.x_to_y_([], [], [], beta=0.9)
    assert [len(t) for t in ops.y_to_x_keep_([], [], [], beta=0.9)] == [0, 0, 0]
    ops.x_to_y_restore_([], [], [], *ops.y_to_x_keep_([], [], [], beta=0.9), beta=0.9)
    assert ops.polyak_sums([], [], [], []).tolist() == [0.0, 0.0]
    assert ops.grad_norm([]).item() == 0.0


def test_gradients_are_not_written_and_versions_rise():
    y, grad, z, v, m = streams(cases.SHAPES)
    before = clones(grad)
    written = y + z + v + m
    versions = [t._version for t in written]
    ops.adamw_step_(y, [], grad, z, v, m, **ADAM, inner_momentum=0.5)
    assert_equal(grad, before)
    assert all(t._version > version for t, version in zip(written, versions, strict=True))
    assert all(g._version == 0 for g in grad)
    version = y[0]._version
    ops.y_to_x_(y, [], z, beta=0.9)
    assert y[0]._version > version
    for write in (
        lambda: ops.y_to_x_keep_(y, [], z, beta=0.9),
        lambda: ops.x_to_y_restore_(y, [], z, *ops.y_to_x_keep_(y, [], z, beta=0.9), beta=0.9),
    ):
        version = y[0]._version
        write()
        assert y[0]._version > version


def test_a_step_between_forward_and_backward_is_noticed():
    p = torch.nn.Parameter(torch.randn(4))
    loss = (p * p).sum()
    with torch.no_grad():
        ops.sgd_step_([p], [], [torch.ones(4)], [torch.zeros(4)], **STEP)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


CLIP = {"grad_norm": torch.tensor(3.0, dtype=torch.float64), "max_grad_norm": 1.5}
RULE = {"kind": 1, "beta_next": 0.9, "warmup_steps": 4, "r": 0.5, "weight_lr_power": 2.0, "beta2": 0.99}


def coefs():
    values = {**dict.fromkeys(ops.COEFFICIENTS, 0.0), "take": 1.0, "grad_mul": 1.0, **ADAM}
    return torch.tensor([values[name] for name in ops.COEFFICIENTS], dtype=torch.float64)


def schedule():
    numbers = [torch.tensor(value, dtype=torch.float64) for value in (0.5, 0.1, 0.05, 0.9)]
    return coefs(), torch.tensor(3), *numbers, torch.tensor(0.1), torch.tensor([0.01]).double()


def calls():
    shapes = [(3, 4), (5,), ()]
    y, grad, z, v, m = streams(shapes)
    y = [t.requires_grad_() for t in y]
    hi, lo = split(tensors(shapes))
    at, value = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
    return {
        "sgd_step_": ((y, [], grad, z), STEP),
        "sgd_step_-bf16": ((hi, lo, grad, z), STEP),
        "adamw_step_": ((y, [], grad, z, v, []), ADAM),
        "adamw_step_-inner": ((y, [], grad, z, v, m), {**ADAM, "inner_momentum": 0.9, "decay_at": 1}),
        "sgd_step_-clip": ((y, [], grad, z), {**STEP, **CLIP}),
        "adamw_step_-clip": ((y, [], grad, z, v, []), {**ADAM, **CLIP}),
        "sgd_step_.capturable": ((y, [], grad, z, coefs()), {}),
        "adamw_step_.capturable": ((y, [], grad, z, v, m, coefs()), {"decay_at": 1}),
        "adamw_step_.capturable-bf16": ((hi, lo, grad, z, v, [], coefs()), {}),
        "schedule_step_": (schedule(), RULE),
        "schedule_step_-amp": (
            schedule(),
            {**RULE, **CLIP, "grad_scale": torch.tensor(4.0), "found_inf": torch.tensor([0.0])},
        ),
        "y_to_x_": ((y, [], z), {"beta": 0.9}),
        "x_to_y_": ((y, [], z), {"beta": 0.9}),
        "x_to_y_-bf16": ((hi, lo, z), {"beta": 0.9}),
        "y_to_x_keep_": ((y, [], z), {"beta": 0.9}),
        "y_to_x_keep_-bf16": ((hi, lo, z), {"beta": 0.9}),
        "x_to_y_restore_": ((y, [], z, at, value, torch.tensor([0, 1, 0])), {"beta": 0.9}),
        "polyak_sums": ((y, [], grad, z), {}),
        "polyak_sums-bf16": ((hi, lo, grad, z), {}),
        "grad_norm": (([*grad, *hi],), {}),
    }


@pytest.mark.parametrize("call", list(calls()))
@pytest.mark.filterwarnings("default")
def test_opcheck(call):
    arguments, scalars = calls()[call]
    with torch.no_grad():
        packet, _, overload = call.split("-")[0].partition(".")
        results = opcheck(getattr(getattr(OPS, packet), overload or "default"), arguments, scalars)
    assert set(results.values()) == {"SUCCESS"}


def test_meta_tensors_are_checked_and_nothing_else():
    meta = [torch.empty(3, 4, device="meta") for _ in range(4)]
    y, grad, z, v = ([t] for t in meta)
    ops.adamw_step_(y, [], grad, z, v, [], **ADAM)
    with pytest.raises(RuntimeError, match=r"z\[0\]: expected shape \[3, 4\] like y\[0\], got \[2\]"):
        ops.sgd_step_(y, [], grad, [torch.empty(2, device="meta")], **STEP)
