"""The operators around the step of another optimizer: the formula, and the way back where no step comes."""

from __future__ import annotations

import cases
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from schedulefree_cpp import ops
from schedulefree_cpp._core import formats

BETAS = [1.0, 1 - 2.0**-30, 0.999, 0.9, 0.5, 0.3, 0.04, 1e-5]
SPECIAL = [0.0, -0.0, 1.0, -2.0, 0.99999994, 1e-45, -1e-39, 3e38, -3e38, torch.inf, -torch.inf, torch.nan]
# (format, exchange)
FORMS = [(name, False) for name in cases.LENT] + [(name, True) for name in cases.EXCHANGED]


def any_bits(dtype, count, seed):
    """Numbers of every magnitude, infinities and NaNs among them."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.int64 if dtype == torch.float64 else torch.int32
    info = torch.iinfo(bits)
    return torch.randint(info.min, info.max, (count,), dtype=bits, generator=generator).view(dtype)


def pairs(name, seed=0):
    """(y, y_lo, z) of many values: any with any, special ones with each other, and neighbours."""
    format = cases.FORMATS[name]
    wide = torch.float64 if format.dtype == torch.float64 else torch.float32
    special = torch.tensor(SPECIAL, dtype=wide)
    generator = torch.Generator().manual_seed(seed)
    narrow = torch.randn(20_000, dtype=wide, generator=generator)
    near = narrow * (1 + torch.randn(20_000, dtype=wide, generator=generator) * 1e-3)
    apart = torch.randn(20_000, dtype=wide, generator=generator) * 2.0 ** torch.randint(-9, 9, (20_000,))
    y = torch.cat([any_bits(wide, 20_000, 1), narrow, narrow, special.repeat(len(special))])
    z = torch.cat([any_bits(wide, 20_000, 2), near, apart, special.repeat_interleave(len(special))])
    if format.y_lo is None:
        return [y], [], [z]
    hi, lo = [torch.empty_like(y, dtype=format.dtype)], [torch.empty_like(y, dtype=format.y_lo)]
    formats.store(hi[0], lo[0], y)
    return hi, lo, [z]


def settled(y, y_lo, z, beta):
    """Stores y as a step with this beta does."""
    ops.sgd_step_(y, y_lo, [torch.zeros_like(y[0])], z, ops.coefs(beta=beta))


def bits_of(t):
    """The bits of numbers, those of any NaN made one."""
    if not t.is_floating_point():
        return t
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return torch.where(t.isnan(), torch.full_like(t, torch.nan), t).view(integers)


def assert_same_bits(got, expected, where=...):
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(bits_of(a)[where], bits_of(b)[where])


def copies(*lists):
    return [[t.clone() for t in tensors] for tensors in lists]


def value(y, y_lo):
    return formats.load(y[0], y_lo[0] if y_lo else None)


# ---- the formula ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [0.0, 0.02, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("magnitude", cases.MAGNITUDES)
def test_a_step_of_another_optimizer_is_within_four_ulps_of_the_oracle(magnitude, w):
    n, beta, next_beta, lr, decay = 100_000, 0.9, 0.8, 0.3, 0.1
    generator = torch.Generator().manual_seed(0)

    def draw():
        spread = 10 ** torch.empty(n).uniform_(-2, 2, generator=generator)
        return torch.randn(n, generator=generator) * spread * cases.MAGNITUDES[magnitude]

    y, z, u = draw(), draw(), draw()
    x = y.double() + (1 - 1 / beta) * (z.double() - y.double())
    decayed = z.double() - lr * decay * y.double()
    stepped = decayed.float() - u
    mean = x + w * (stepped.double() - x)
    expected = next_beta * mean + (1 - next_beta) * stepped.double()

    coefs = ops.coefs(lr=lr, weight_decay=decay, w=w, beta=next_beta)
    got_y, got_z = [y.clone()], [z.clone()]
    ops.before_base_step_(got_y, [], got_z, coefs, beta=beta)
    x_unit = reference.ulp(torch.maximum(x.abs(), y.abs()))
    unit = 1.6 * reference.ulp(lr * decay * y) + 0.51 * reference.ulp(
        decayed
    )  # lr and decay are rounded, too
    assert ((got_y[0].double() - decayed).abs() <= unit).all()
    assert ((got_z[0].double() - x).abs() <= x_unit).all()
    got_y[0].copy_(stepped)
    ops.after_base_step_(got_y, [], got_z, coefs)
    assert_same_bits(got_z, [stepped])
    terms = [x, w * (stepped.double() - x), mean, stepped.double(), expected]
    unit = torch.stack([reference.ulp(t) for t in terms]).amax(0)
    assert ((got_y[0].double() - expected).abs() / unit).max() <= cases.MAX_ULPS


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", cases.LENT)
def test_x_is_that_of_the_swap_and_z_keeps_its_bits_without_decay(name, beta):
    y, y_lo, z = pairs(name)
    swapped, swapped_lo, z_before = copies(y, y_lo, z)
    ops.y_to_x_(swapped, swapped_lo, z, beta=beta)
    for lr, decay in ((0.0, 0.1), (0.1, 0.0), (1e-200, 1e-200)):
        a, a_lo, b = copies(y, y_lo, z)
        ops.before_base_step_(
            a, a_lo, b, ops.coefs(lr=lr, weight_decay=decay, beta=0.5), beta=beta, exchange=False
        )
        assert_same_bits(a + a_lo, swapped + swapped_lo)
        integers = torch.int64 if z[0].dtype == torch.float64 else torch.int32
        assert torch.equal(b[0].view(integers), z_before[0].view(integers))  # of NaNs, too


@pytest.mark.parametrize("name", cases.EXCHANGED)
def test_exchange_changes_the_place_and_no_bit(name):
    y, _, z = pairs(name)
    coefs = ops.coefs(lr=0.3, weight_decay=0.1, w=0.3, beta=0.7)
    (a, b), (c, d) = copies(y, z), copies(y, z)
    ops.before_base_step_(a, [], b, coefs, beta=0.9)
    ops.before_base_step_(c, [], d, coefs, beta=0.9, exchange=False)
    assert_same_bits(a + b, d + c)
    assert not torch.equal(bits_of(d[0]), bits_of(z[0]))
    ops.after_base_step_(a, [], b, coefs)
    ops.after_base_step_(c, [], d, coefs, exchange=False)
    assert_same_bits(a + b, c + d)


def test_a_split_bfloat16_takes_the_steps_of_a_float32():
    hi, lo, z = pairs("bfloat16")
    y, z2 = [value(hi, lo)], [z[0].clone()]
    for w in (0.0, 0.3, 1.0):
        coefs = ops.coefs(lr=0.3, weight_decay=0.1, w=w, beta=0.7)
        ops.before_base_step_(hi, lo, z, coefs, beta=0.7, exchange=False)
        ops.before_base_step_(y, [], z2, coefs, beta=0.7)
        z[0].mul_(0.9), y[0].mul_(0.9)
        ops.after_base_step_(hi, lo, z, coefs, exchange=False)
        ops.after_base_step_(y, [], z2, coefs)
        assert_same_bits([value(hi, lo), *z], y + z2)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("name", "exchange"), FORMS)
def test_with_weight_one_y_is_made_of_z_whatever_x_is(name, exchange, beta):
    y, y_lo, z = pairs(name)
    z[0] = z[0].nan_to_num(1.0, 1.0, 1.0)
    if exchange:
        y, z = z, y
    coefs = ops.coefs(w=1.0, beta=beta)
    ops.after_base_step_(y, y_lo, z, coefs, exchange=exchange)
    at_z, at_z_lo, _ = copies(y, y_lo, z)
    formats.store(at_z[0], at_z_lo[0] if at_z_lo else None, z[0])
    finite = at_z[0].isfinite()  # in the parameter's format
    settled(at_z, at_z_lo, z, beta)
    assert_same_bits(y + y_lo, at_z + at_z_lo, finite)
    assert finite.float().mean() > 0.6


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("name", "exchange"), FORMS)
def test_the_swaps_return_the_new_y_bit_for_bit(name, exchange, beta, w):
    y, y_lo, z = pairs(name)
    ops.after_base_step_(y, y_lo, z, ops.coefs(w=w, beta=beta), exchange=exchange)
    before, before_lo = copies(y, y_lo)
    ops.y_to_x_(y, y_lo, z, beta=beta)
    finite = y[0].isfinite() & before[0].isfinite() & z[0].isfinite()
    ops.x_to_y_(y, y_lo, z, beta=beta)
    finite &= y[0].isfinite()  # a sum that overflows on the way comes from no y
    assert finite.float().mean() > 0.6
    assert_same_bits(y + y_lo, before + before_lo, finite)


def test_steps_of_sgd_between_the_operators_are_those_of_schedule_free_sgd():
    params = cases.parameters([(5, 3), (7,)])
    h = reference.Hyperparameters(adam=False, lr=0.1, weight_decay=0.1)
    oracle = reference.Reference.of(params, h)
    y = [p.detach().double() for p in params]
    z = [p.clone() for p in y]
    base = torch.optim.SGD(y, lr=h.lr)
    for k in range(20):
        cases.set_gradients(params, k)
        oracle.step([p.grad for p in params])
        coefs = ops.coefs(lr=h.lr, weight_decay=h.weight_decay, w=1 / (k + 1), beta=h.beta)
        ops.before_base_step_(y, [], z, coefs, beta=h.beta)
        for t, p in zip(y, params, strict=True):
            t.grad = p.grad.double()
        base.step()
        ops.after_base_step_(y, [], z, coefs)
    for t, base_iterate, it in zip(y, z, oracle.iterates, strict=True):
        torch.testing.assert_close(t, it.y, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(base_iterate, it.z, rtol=1e-13, atol=1e-13)


# ---- the way back --------------------------------------------------------------------------------------


def assert_undone(y, y_lo, z, beta, exchange):
    """Where x is finite: elsewhere it has no way back."""
    settled(y, y_lo, z, beta)
    x, x_lo, before, before_lo, z_before = copies(y, y_lo, y, y_lo, z)
    ops.y_to_x_(x, x_lo, z, beta=beta)
    finite = x[0].isfinite() & y[0].isfinite() & z[0].isfinite()
    ops.x_to_y_(x, x_lo, z, beta=beta)
    finite &= x[0].isfinite()
    coefs = ops.coefs(lr=0.1, w=0.0, beta=beta)
    ops.before_base_step_(y, y_lo, z, coefs, beta=beta, exchange=exchange)
    ops.after_base_step_(y, y_lo, z, coefs, exchange=exchange)
    assert_same_bits(z, z_before)
    assert_same_bits(y + y_lo, before + before_lo, finite)
    return finite


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("name", "exchange"), FORMS)
def test_without_a_step_between_them_the_operators_change_nothing(name, exchange, beta):
    finite = assert_undone(*pairs(name), beta, exchange)
    assert finite.float().mean() > 0.5


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=1, max_size=40),
    st.sampled_from(BETAS) | st.floats(1e-6, 1.0),
    st.sampled_from(FORMS),
)
def test_no_step_is_undone_for_any_numbers(numbers, beta, form):
    name, exchange = form
    format = cases.FORMATS[name]
    wide = torch.float64 if format.dtype == torch.float64 else torch.float32
    y, z = torch.tensor(numbers, dtype=wide).unbind(1)
    hi, lo = [torch.empty_like(y, dtype=format.dtype)], []
    if format.y_lo is not None:
        lo = [torch.empty_like(y, dtype=format.y_lo)]
    formats.store(hi[0], lo[0] if lo else None, y)
    assert_undone(hi, lo, [z.clone()], beta, exchange)


# ---- lists ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "exchange"), FORMS)
def test_many_tensors_of_any_strides_are_as_each_alone(name, exchange):
    shapes = [*cases.SHAPES, cases.LARGE, *[(5,)] * 100]
    lists = cases.lists_of(cases.FORMATS[name], shapes)
    alone = cases.copied(lists)
    for key in ("y", "z"):
        lists[key] = [
            (t.mT.contiguous().mT if i % 2 else torch.stack([t, t], -1)[..., 1]) if t.ndim > 1 else t
            for i, t in enumerate(lists[key])
        ]
    coefs = ops.coefs(lr=0.3, weight_decay=0.1, w=0.3, beta=0.7)
    cases.call(ops, "before_base_step_", lists, coefs, beta=0.9, exchange=exchange)
    cases.call(ops, "after_base_step_", lists, coefs, exchange=exchange)
    for i in range(len(shapes)):
        one = {key: tensors[i : i + 1] for key, tensors in alone.items()}
        cases.call(ops, "before_base_step_", one, coefs, beta=0.9, exchange=exchange)
        cases.call(ops, "after_base_step_", one, coefs, exchange=exchange)
    for key in ("y", "y_lo", "z"):
        assert_same_bits(lists[key], alone[key])


def test_formats_may_be_mixed_in_one_call():
    each = [cases.lists_of(f, cases.SHAPES) for f in cases.LENT.values()]
    mixed = {key: [t.clone() for lists in each for t in lists[key]] for key in ("y", "z")}
    mixed["y_lo"] = [
        low.clone()
        for lists in each
        for low in lists["y_lo"] or [torch.empty(0, dtype=torch.int16)] * len(lists["y"])
    ]
    coefs = ops.coefs(lr=0.3, weight_decay=0.1, w=0.3, beta=0.7)
    for lists in (*each, mixed):
        cases.call(ops, "before_base_step_", lists, coefs, beta=0.9, exchange=False)
        cases.call(ops, "after_base_step_", lists, coefs, exchange=False)
    for key in ("y", "z"):
        assert_same_bits(mixed[key], [t for lists in each for t in lists[key]])


REFUSED = {
    "16 bits exchanged": ("bfloat16", True, {}, r"y\[0\]: expected dtype float32 or float64 to hold z with exchange, got bfloat16"),
    "16 bits alone exchanged": ("float16", True, {"y_lo": []}, r"y\[0\]: expected dtype float32 or float64 to hold z with exchange, got float16"),
    "16 bits alone": ("bfloat16", False, {"y_lo": []}, r"y_lo\[0\]: expected a tensor of dtype int16, since y has 16 bits, got none"),
    "24 bits": ("24 bits", False, {}, r"y_lo\[0\]: expected dtype int16, got int8"),
    "z of another dtype": ("float32", True, {"z": [torch.zeros(3).double()] * 2}, r"z\[0\]: expected dtype float32 for the float32 y\[0\], got float64"),
    "fewer z": ("float32", True, {"z": [torch.zeros(3)]}, r"z: expected 2 tensors, one for each of y, got 1"),
    "shape": ("float64", True, {"z": [torch.zeros(3).double(), torch.zeros(5).double()]}, r"z\[1\]: expected shape \[4\] like y\[1\], got \[5\]"),
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("operator", cases.AROUND_A_BASE)
@pytest.mark.parametrize("case", REFUSED)
def test_bad_lists_are_refused_before_anything_is_written(case, operator, device):
    name, exchange, changes, message = REFUSED[case]
    lists = {**cases.lists_of(cases.FORMATS[name], [(3,), (4,)]), **changes}
    lists = {key: [t.to(device) for t in tensors] for key, tensors in lists.items()}
    before = cases.copied(lists)
    scalars = {"exchange": exchange} | ({"beta": 0.9} if operator == "before_base_step_" else {})
    if case == "16 bits alone" and device == "meta":
        return  # seen where there is memory
    with pytest.raises(RuntimeError, match=f"schedulefree_cpp::{operator}: {message}"):
        cases.call(ops, operator, lists, ops.coefs(lr=0.1, beta=0.9), **scalars)
    for key, tensors in lists.items():
        assert device == "meta" or all(map(torch.equal, tensors, before[key]))


@pytest.mark.parametrize("operator", cases.AROUND_A_BASE)
def test_shared_memory_and_bad_scalars_are_refused(operator):
    y, z = torch.rand(6), torch.rand(6)
    before = y.clone(), z.clone()
    scalars = {"beta": 0.9} if operator == "before_base_step_" else {}
    call = getattr(ops, operator)
    coefs = ops.coefs(lr=0.1, beta=0.9)
    for lists, message in (
        (([y], [], [y]), r"z\[0\]: expected memory of its own, got memory shared with y\[0\]"),
        (([y[:3], y[3:]], [], [z[:3], z[2:5]]), r"z\[1\]: expected memory of its own"),
        (([y, z], [], [z.clone(), z]), r"expected memory of its own"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*lists, coefs, **scalars)
    for bad, message in (
        (ops.coefs(beta=0.9, lr=torch.nan), "expected a finite lr, got nan"),
        (ops.coefs(beta=0.0), r"Invalid beta: 0, expected a value in \(0, 1\]"),
        (ops.coefs(beta=0.9, take=2.0), "expected take to be 0 or 1, got 2"),
        (torch.zeros(3).double(), "coefs: expected 16 contiguous elements"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call([y], [], [z], bad, **scalars)
    if operator == "before_base_step_":
        with pytest.raises(RuntimeError, match=r"Invalid beta: 1.5, expected a value in \(0, 1\]"):
            call([y], [], [z], coefs, beta=1.5)
    assert torch.equal(y, before[0])
    assert torch.equal(z, before[1])
