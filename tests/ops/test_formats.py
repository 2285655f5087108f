"""How parameters, ``z`` and the second moment are kept: by the optimizers, in every format."""

from __future__ import annotations

import copy
import io

import cases
import pytest
import schedulefree_cpp
import torch
from schedulefree_cpp import AdamWScheduleFree, SGDScheduleFree, ops
from schedulefree_cpp._core import formats

SHAPES = [(5, 33), (260,), (), (4, 3, 3, 3), (0,)]
SMALL = [name for name, format in cases.FORMATS.items() if format.dtype != torch.float64]
NARROW = [name for name in SMALL if cases.FORMATS[name].dtype != torch.float32]


def made(name: str, seed: int = 0, cls=AdamWScheduleFree, **kwargs):
    format = cases.FORMATS[name]
    options = dict(format.options)
    if cls is SGDScheduleFree:
        options.pop("exp_avg_sq_bits", None)
    optimizer = cls(cases.parameters(SHAPES, format.dtype, seed), lr=0.01, **(options | kwargs))
    optimizer.train()
    return optimizer


def everything(optimizer) -> list[torch.Tensor]:
    return [*cases.params_of(optimizer), *cases.states_of(optimizer)]


def wide(optimizer, key: str = "y") -> list[torch.Tensor]:
    """The values of y or z."""
    values = []
    for p in cases.params_of(optimizer):
        state = optimizer.state[p]
        t = p.detach() if key == "y" else state["z"]
        values.append(formats.load(t, state.get(f"{key}_lo")))
    return values


@pytest.mark.parametrize("name", cases.FORMATS)
def test_a_state_has_the_dtypes_of_its_format(name):
    format, optimizer = cases.FORMATS[name], made(name)
    cases.run(optimizer, 2)
    for p in cases.params_of(optimizer):
        state = optimizer.state[p]
        assert p.dtype == format.dtype
        for key, dtype in (("y_lo", format.y_lo), ("z_lo", format.z_lo)):
            assert state[key].dtype == dtype if dtype else key not in state
        full = torch.float64 if format.dtype == torch.float64 else torch.float32
        assert state["z"].dtype == (torch.bfloat16 if format.z_lo else full)
        assert state["exp_avg_sq"].dtype == (torch.uint8 if format.moment8 else full)
        if format.moment8:
            assert state["exp_avg_sq_scale"].shape == (-(-p.numel() // 128),)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "24 bits"])
def test_every_word_is_near_its_own_value(name):
    """Words that a program has set, beside low halves of others: kernels and fallback read them alike."""
    format = cases.FORMATS[name]
    info = torch.iinfo(format.y_lo)
    lows = [
        info.min,
        info.min + 1,
        -1,
        0,
        1,
        info.max - 1,
        info.max,
        *range(info.min, info.max, 1 + info.max // 50),
    ]
    patterns = torch.arange(-0x8000, 0x8000).short().repeat_interleave(len(lows))
    low = torch.tensor(lows, dtype=format.y_lo).repeat(0x10000)
    word = patterns.view(format.dtype)
    value, own = formats.load(word, low).double(), word.double()
    assert torch.equal(value.isnan(), own.isnan())
    is_number = ~own.isnan()
    assert torch.equal(value.signbit()[is_number], own.signbit()[is_number])
    assert (value[(own == 0) & (low <= 0)] == 0).all()
    assert value[own.isinf() & (low >= 0)].isinf().all()
    finite = own.isfinite()
    magnitude = (patterns & 0x7FFF)[finite]
    beyond = 2.0**128 if format.dtype == torch.bfloat16 else 2.0**16
    above = (magnitude + 1).short().view(format.dtype).double().nan_to_num(posinf=beyond)
    below = (magnitude - 1).clamp(min=0).short().view(format.dtype).double()
    size = own[finite].abs()
    assert (value[finite].abs() <= (size + above) / 2).all()
    assert (value[finite].abs() >= (size + below) / 2).all()

    y, y_lo = word[finite].clone(), low[finite].clone()  # with beta 1, a swap stores what it has read
    z = torch.zeros(len(y), dtype=torch.bfloat16 if format.z_lo else torch.float32)
    z_lo = [torch.zeros(len(y), dtype=torch.int8)] if format.z_lo else []
    ops.y_to_x_([y], [y_lo], [z], z_lo=z_lo, beta=1.0)
    assert torch.equal(formats.load(y, y_lo).double(), value[finite])


def test_seven_bytes_for_each_element():
    p = torch.nn.Parameter(torch.randn(1 << 14).bfloat16())
    for cls, kwargs, expected in (
        (AdamWScheduleFree, {"exp_avg_sq_bits": 8}, 7 + 4 / 128),
        (AdamWScheduleFree, {}, 10),
        (SGDScheduleFree, {}, 6),
    ):
        optimizer = cls([p], state_bits=24, **kwargs)
        optimizer.train()
        cases.run(optimizer, 1)
        kept = p.nbytes + sum(t.nbytes for t in cases.states_of(optimizer))
        assert kept / p.numel() == expected


@pytest.mark.parametrize("cls", [AdamWScheduleFree, SGDScheduleFree])
def test_float16_with_its_low_half_is_the_float32_trajectory(cls):
    one, other = made("float16", cls=cls), made("float32", cls=cls)
    with torch.no_grad():
        for p, q in zip(cases.params_of(one), cases.params_of(other), strict=True):
            p.copy_(p.sign() * (p.abs() + 0.5))  # stays above the smallest normal number
            q.copy_(p)
    for seed in range(50):
        for optimizer in (one, other):
            cases.set_gradients(cases.params_of(optimizer), seed)
        for p, q in zip(cases.params_of(one), cases.params_of(other), strict=True):
            q.grad = p.grad.float() * 0.01
            p.grad = q.grad.half()
            q.grad = p.grad.float()
        for optimizer in (one, other):
            optimizer.step()
    assert all(map(torch.equal, wide(one, "z"), wide(other, "z")))
    for a, b in zip(wide(one), wide(other), strict=True):
        normal = b.abs() >= 2.0**-14
        assert torch.equal(a[normal], b[normal])


def test_a_float16_that_is_too_large_becomes_infinite():
    p = torch.nn.Parameter(torch.tensor([65000.0, 1.0]).half())
    optimizer = SGDScheduleFree([p], lr=1e4)
    optimizer.train()
    p.grad = torch.tensor([-1.0, 0.0]).half()
    optimizer.step()
    assert p.isinf().tolist() == [True, False]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", SMALL)
def test_evaluation_and_checkpoints_change_no_bit(name, rounding):
    plain, watched = (made(name, rounding=rounding) for _ in range(2))
    for seed in range(12):
        for optimizer in (plain, watched):
            cases.drive(optimizer, seed)
        watched.eval()
        watched.train()
        if seed % 4 == 3:
            saved = io.BytesIO()
            torch.save(watched.state_dict(), saved)
            saved.seek(0)
            values = [p.detach().clone() for p in cases.params_of(watched)]
            watched = made(name, seed=9, rounding=rounding)
            with torch.no_grad():
                for p, value in zip(cases.params_of(watched), values, strict=True):
                    p.copy_(value)
            watched.load_state_dict(torch.load(saved, weights_only=True))
    cases.assert_same(everything(plain), everything(watched))
    cases.assert_same(everything(plain), everything(copy.deepcopy(plain)))


@pytest.mark.parametrize("source", ["float32", "bfloat16", "24 bits, 8-bit moment"])
@pytest.mark.parametrize("target", SMALL)
def test_a_checkpoint_loads_into_every_format(source, target):
    one, other = made(source), made(target)
    cases.run(one, 8)
    with torch.no_grad():
        for p, q in zip(cases.params_of(one), cases.params_of(other), strict=True):
            q.copy_(p)
    other.load_state_dict(one.state_dict())
    for p, q in zip(cases.params_of(one), cases.params_of(other), strict=True):
        a, b = one.state[p], other.state[q]
        tolerance = 2.0**-16 if cases.FORMATS[target].z_lo else 0.0
        z = formats.load(a["z"], a.get("z_lo"))
        torch.testing.assert_close(formats.load(b["z"], b.get("z_lo")), z, rtol=tolerance, atol=0)
        v, loaded = (
            formats.decode(s["exp_avg_sq"], s["exp_avg_sq_scale"])
            if "exp_avg_sq_scale" in s
            else s["exp_avg_sq"]
            for s in (a, b)
        )
        if cases.FORMATS[target].moment8:  # a sixteenth is half of the way to the next code at most
            torch.testing.assert_close(loaded, v, rtol=1 / 16, atol=0)
        else:
            torch.testing.assert_close(loaded, v, rtol=0, atol=0)
    cases.run(other, 3, start=8)
    assert all(t.isfinite().all() for t in wide(other))


@pytest.mark.parametrize("name", SMALL)
def test_a_checkpoint_of_schedulefree_loads(name):
    import schedulefree

    format = cases.FORMATS[name]
    upstream = schedulefree.AdamWScheduleFree(cases.parameters(SHAPES, format.dtype), lr=0.01)
    upstream.train()
    cases.run(upstream, 3)
    optimizer = made(name)
    with torch.no_grad():
        for p, q in zip(cases.params_of(upstream), cases.params_of(optimizer), strict=True):
            q.copy_(p)
    optimizer.load_state_dict(upstream.state_dict())
    cases.run(optimizer, 2, start=3)
    assert optimizer.param_groups[0]["k"] == 5


def test_a_converted_base_is_rounded_to_even():
    z = torch.tensor([0x3F800080, 0x3F800180], dtype=torch.int32).view(torch.float32)
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    optimizer = SGDScheduleFree([p], state_bits=24)
    optimizer.train()
    p.grad = torch.zeros_like(p)
    optimizer.step()
    state = optimizer.state[p]
    state.pop("z_lo")
    state["z"] = z
    optimizer.train()
    expected = torch.tensor([0x3F800000, 0x3F800200], dtype=torch.int32).view(torch.float32)
    assert torch.equal(formats.load(state["z"], state["z_lo"]), expected)


@pytest.mark.parametrize("name", [name for name in cases.FORMATS if cases.FORMATS[name].moment8])
def test_scales_count_as_the_memory_does(name):
    format = cases.FORMATS[name]
    start = torch.randn(4, 6, 5, 7).to(format.dtype)
    layouts = [torch.contiguous_format, torch.channels_last]
    params = [torch.nn.Parameter(start.clone(memory_format=layout)) for layout in layouts]
    one, other = (AdamWScheduleFree([p], lr=0.01, **format.options) for p in params)
    one.train()
    cases.run(one, 4)
    other.load_state_dict(one.state_dict())
    a, b = (
        formats.decode(s["exp_avg_sq"], s["exp_avg_sq_scale"])
        for s in (one.state[params[0]], other.state[params[1]])
    )
    assert other.state[params[1]]["exp_avg_sq"].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(a.sqrt().sqrt(), b.sqrt().sqrt(), rtol=0.02, atol=0.02)


def test_a_small_second_moment_does_not_vanish():
    p = torch.nn.Parameter(torch.zeros(256))
    optimizer = AdamWScheduleFree([p], exp_avg_sq_bits=8)
    optimizer.train()
    for _ in range(5):
        p.grad = torch.full((256,), 1e-12)
        p.grad[0] = 1e6
        optimizer.step()
    state = optimizer.state[p]
    assert (formats.decode(state["exp_avg_sq"], state["exp_avg_sq_scale"]) > 0).all()
    assert p.isfinite().all()


def test_a_second_moment_of_8_bits_keeps_its_mean():
    params = [torch.nn.Parameter(torch.zeros(4096)) for _ in range(2)]
    whole = schedulefree_cpp.AdamWScheduleFree(params[:1], betas=(0.9, 0.999))
    coded = schedulefree_cpp.AdamWScheduleFree(params[1:], betas=(0.9, 0.999), exp_avg_sq_bits=8)
    torch.manual_seed(0)
    for optimizer in (whole, coded):
        optimizer.train()
    for _ in range(3000):
        params[0].grad = params[1].grad = torch.randn(4096)
        whole.step(), coded.step()
    state = coded.state[params[1]]
    ratio = formats.decode(state["exp_avg_sq"], state["exp_avg_sq_scale"])
    ratio /= whole.state[params[0]]["exp_avg_sq"]
    assert abs(ratio.mean() - 1) < 0.015  # four standard deviations
    assert 0.1 < ratio.std() < 0.25


def test_random_rounding_depends_on_the_step_and_the_element_alone():
    def trained(threads, pieces):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            generator = torch.Generator().manual_seed(1)
            whole = torch.randn(50_000, generator=generator).bfloat16()
            params = [torch.nn.Parameter(whole.clone()) for _ in range(pieces)]
            optimizer = AdamWScheduleFree(
                params, lr=1e-3, state_bits=24, exp_avg_sq_bits=8, rounding="stochastic"
            )
            optimizer.train()
            for seed in range(3):
                grad = torch.randn(50_000, generator=torch.Generator().manual_seed(seed)).bfloat16()
                for p in params:
                    p.grad = grad.clone()
                optimizer.step()
            return [[p.detach(), *optimizer.state[p].values()] for p in params]
        finally:
            torch.set_num_threads(before)

    expected = trained(1, 1)[0]
    for other in trained(2, 3):
        cases.assert_same(other, expected)


def test_small_updates_are_not_lost_at_random():
    """Nearest rounding loses an update below half a unit; random rounding keeps it on average."""
    p = torch.nn.Parameter(torch.ones(20_000).bfloat16())
    moved = {}
    for rounding in ("nearest", "stochastic"):
        q = torch.nn.Parameter(p.detach().clone())
        optimizer = SGDScheduleFree([q], lr=1.0, momentum=1.0, state_bits=24, rounding=rounding)
        optimizer.train()
        for _ in range(100):
            q.grad = torch.full_like(q, 2.0**-19)
            optimizer.step()
        moved[rounding] = 1 - wide(optimizer, "z")[0].double().mean().item()
    assert moved["nearest"] == 0
    assert moved["stochastic"] == pytest.approx(100 * 2.0**-19, rel=0.05)


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_averaged_state_dict_in_float32(name, mode):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5)).to(cases.FORMATS[name].dtype)
    optimizer = AdamWScheduleFree(model.parameters(), lr=0.1, **cases.FORMATS[name].options)
    optimizer.train()
    cases.run(optimizer, 5)
    getattr(optimizer, mode)()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    averaged = optimizer.averaged_state_dict(model, dtype=torch.float32)
    cases.assert_same(model.state_dict().values(), before.values())
    optimizer.eval()
    for key, p in model.named_parameters():
        assert averaged[key].dtype == torch.float32
        assert torch.equal(averaged[key], formats.load(p.detach(), optimizer.state[p]["y_lo"]))
    assert not torch.equal(averaged["0.weight"], model[0].weight.float())
    assert averaged["1.running_mean"].dtype == torch.float32
    assert averaged["1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [("state_bits", 16, r"\[32, 24\]"), ("exp_avg_sq_bits", 4, r"\[32, 8\]"), ("rounding", "up", "nearest")],
)
def test_other_values_are_refused(name, value, expected):
    with pytest.raises(ValueError, match=rf"Invalid {name}: .*{expected}"):
        AdamWScheduleFree(cases.parameters([(3,)]), **{name: value})


def test_an_operator_refuses_what_lacks_a_part_of_its_format():
    y, z, g = torch.zeros(5).bfloat16(), torch.zeros(5), torch.zeros(5)
    coefs, low = ops.coefs(beta=0.9), torch.zeros(5, dtype=torch.int8)
    cases_of = [
        (
            ([y], [], [g], [z]),
            {},
            r"y_lo\[0\]: expected a tensor of dtype int16 or int8, since y has 16 bits",
        ),
        (([y], [low], [g], [z]), {}, r"z\[0\]: expected dtype bfloat16 beside the low half of 8 bits"),
        (([y], [low], [g], [z.bfloat16()]), {}, r"z_lo\[0\]: expected a tensor of dtype int8"),
        (([y], [low.short()], [g], [z]), {"z_lo": [low.clone()]}, r"z_lo\[0\]: expected no low half"),
        (([y.half()], [low], [g], [z]), {}, r"y_lo\[0\]: expected dtype int16, got int8"),
    ]
    for lists, named, message in cases_of:
        with pytest.raises(RuntimeError, match=message):
            ops.sgd_step_(*lists, coefs, **named)
    codes = torch.zeros(5, dtype=torch.uint8)
    for scale, message in (
        ([], r"exp_avg_sq_scale\[0\]: expected a tensor of dtype float32, since exp_avg_sq has 8 bits"),
        ([torch.zeros(2)], r"exp_avg_sq_scale\[0\]: expected 1 contiguous elements in one dimension"),
        ([torch.zeros(1).double()], r"exp_avg_sq_scale\[0\]: expected dtype float32, got float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.adamw_step_([z.clone()], [], [g], [z], [codes], [], coefs, exp_avg_sq_scale=scale)


def test_a_sharded_second_moment_of_8_bits_is_refused():
    class Sharded(torch.Tensor):
        pass

    p = torch.nn.Parameter(torch.zeros(4).as_subclass(Sharded))
    with pytest.raises(RuntimeError, match="exp_avg_sq_bits=8: expected a plain parameter, got Sharded"):
        cases.run(cases.make("AdamWScheduleFree", [p], exp_avg_sq_bits=8), 1)


@pytest.mark.compile
@pytest.mark.parametrize("name", ["float16", "float32, 8-bit moment", "24 bits, 8-bit moment"])
def test_compiled_steps_are_the_eager_ones(name):
    torch._dynamo.reset()
    one, other = made(name), made(name)
    step = torch.compile(other.step, fullgraph=True)
    for seed in range(4):
        cases.drive(one, seed)
        cases.set_gradients(cases.params_of(other), seed)
        step()
    cases.assert_same(everything(one), everything(other))


@pytest.mark.parametrize("name", SMALL)
def test_capturable_takes_the_same_steps(name):
    one, other = made(name), made(name, capturable=True)
    for seed in range(6):
        for optimizer in (one, other):
            cases.drive(optimizer, seed)
    cases.assert_same(everything(one), everything(other))


def test_the_names_are_those_of_the_package():
    assert (
        schedulefree_cpp.create("adamw", cases.parameters([(3,)]), state_bits=24).defaults["state_bits"] == 24
    )


@pytest.mark.parametrize("switches", [False, True])
def test_codes_follow_the_memory_of_their_parameter(switches):
    def trained(moves):
        p = torch.nn.Parameter(torch.randn(16, 64, 3, 3, generator=torch.Generator().manual_seed(0)))
        optimizer = AdamWScheduleFree([p], lr=0.001, exp_avg_sq_bits=8)
        optimizer.train()
        scale = 10 ** torch.linspace(-4, 1, 64).view(1, 64, 1, 1)
        for i in range(4):
            if i == 3 and moves:
                p.data = p.data.to(memory_format=torch.channels_last)
                if switches:
                    optimizer.eval()
                    optimizer.train()
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * scale
            optimizer.step()
        state = optimizer.state[p]
        return formats.decode(state["exp_avg_sq"], state["exp_avg_sq_scale"]).contiguous()

    stays, moves = trained(False), trained(True)
    # A scale of other elements would be off by up to 10 ** 8; their codes reach over 32 powers of two.
    assert ((moves / stays).log10().abs() < 1).float().mean() > 0.9


@pytest.mark.parametrize("call", ["train", "eval"])
@pytest.mark.parametrize(
    ("first", "second"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)], ids=str
)
def test_a_low_half_does_not_outlive_its_dtype(first, second, call):
    optimizer = cases.make("AdamWScheduleFree", cases.parameters([(64,), (3, 5)], first))
    cases.run(optimizer, 3)
    optimizer.eval()
    optimizer.train()
    for p in cases.params_of(optimizer):
        assert optimizer.state[p]["y_lo"].any()
        p.data = p.data.to(second)
    expected = copy.deepcopy(optimizer)
    for p in cases.params_of(expected):
        expected.state[p]["y_lo"].zero_()
    for one in (optimizer, expected):
        getattr(one, call)()
    for p, q in zip(cases.params_of(optimizer), cases.params_of(expected), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(t, expected.state[q][name]) for name, t in optimizer.state[p].items())
