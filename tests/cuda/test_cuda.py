"""The CUDA kernels: every bit as on the CPU, through operators and optimizers, in graphs and under AMP.

Skipped without a GPU, or where the CUDA operators are not registered. With SCHEDULEFREE_REQUIRE_CUDA=1 that is a
failure.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import subprocess
import sys
import warnings

import cases
import pytest
import torch
from schedulefree_cpp import ops
from schedulefree_cpp._core import library
from torch._C._autograd import DeviceType
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR


def missing() -> str:
    """Why these tests cannot run; empty where they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return library.CUDA_MISSING or ""


MISSING = missing()
REQUIRED = os.environ.get("SCHEDULEFREE_REQUIRE_CUDA") == "1"

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(bool(MISSING) and not REQUIRED, reason=MISSING)]


@pytest.fixture(autouse=True, scope="module")
def required():
    if MISSING:
        pytest.fail(f"SCHEDULEFREE_REQUIRE_CUDA=1, but {MISSING}")


DEVICE = torch.device("cuda")
OPS = torch.ops.schedulefree_cpp

# Around the widths of vectors, blocks and chunks, and many chunks with a tail.
SIZES = [0, 1, 3, 4, 5, 2047, 2048, 2049, 16383, 16384, 16385, 1_000_003]
SHAPES = [*cases.SHAPES, *((n,) for n in SIZES)]

COMBINATIONS = [
    (format, grad)
    for format in cases.FORMATS
    for grad in ([torch.float64] if format == "float64" else [torch.float32, torch.bfloat16, torch.float16])
]

ALGORITHMS = ["sgd", "adamw", "adamw with inner momentum"]
SCALARS = {"lr": 0.1, "w": 0.3, "a": -0.05, "beta": 0.9}
ADAM = {"beta2": 0.99, "denom_scale": 1.5, "denom_eps": 1e-8}
OPTIONS = {
    "plain": {},
    "decay at y, nearer to z": {"weight_decay": 0.1, "w": 0.7},
    "decay at z": {"weight_decay": 0.1, "decay_at": 1},
    "maximize and scale": {"grad_mul": -0.37},
    "rounded at random": {"stochastic": 1.0, "k": 9.0},
}

SPECIAL = torch.tensor(
    [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 1.1754944e-38, 3.4028235e38,
     -3.4028235e38, 1e-20, 1e19, 6e-8, 65504.0, 1.0, -1.0]
)  # fmt: skip

Lists = cases.Lists
SGD = ("y", "y_lo", "grad", "z")


# ---- helpers -----------------------------------------------------------------------------------------


def ordinary(shape, generator):
    """Values of many magnitudes, so that x often is in another binade than y."""
    exponent = torch.empty(shape).uniform_(-6, 2, generator=generator)
    return torch.randn(shape, generator=generator) * 10**exponent


def special(shape, generator):
    return SPECIAL[torch.randint(len(SPECIAL), shape, generator=generator)]


def draw(shapes, format="float32", *, grad_dtype=None, values=ordinary) -> Lists:
    """The lists of ``adamw_step_`` on the CPU, by name, for a format of ``cases.FORMATS``."""
    generator = torch.Generator().manual_seed(0)
    lists = cases.lists_of(cases.FORMATS[format], shapes, grad_dtype=grad_dtype)
    for name in ("y", "grad", "z", "exp_avg_sq", "exp_avg", "exp_avg_sq_scale"):
        for t in lists[name]:
            if t.is_floating_point():
                drawn = values(t.shape, generator).to(t.dtype)
                t.copy_(drawn.abs() if name.startswith("exp_avg_sq") else drawn)
    return lists


def moved(lists: Lists) -> Lists:
    """The same on the GPU."""
    return {name: [t.to(DEVICE, copy=True) for t in tensors] for name, tensors in lists.items()}


def step(lists: Lists, algorithm: str, *, coefs=None, coefs_on="cpu", decay_at: int = 0, **scalars) -> None:
    inner = 0.9 if "momentum" in algorithm else 0.0
    if coefs is None:
        given = SCALARS if algorithm == "sgd" else SCALARS | ADAM | {"inner_momentum": inner}
        coefs = ops.coefs(**(given | scalars)).to(coefs_on)
    if algorithm == "sgd":
        ops.sgd_step_(*(lists[n] for n in SGD), coefs, z_lo=lists["z_lo"], decay_at=decay_at)
        return
    parts = {name: lists[name] for name in ("z_lo", "exp_avg_sq_scale")}
    mean = lists["exp_avg"] if inner else []
    ops.adamw_step_(*(lists[n] for n in SGD), lists["exp_avg_sq"], mean, coefs, decay_at=decay_at, **parts)


def swap(operator, lists: Lists, beta: float = 0.9) -> None:
    operator(lists["y"], lists["y_lo"], lists["z"], z_lo=lists["z_lo"], beta=beta)


def sums_of(lists: Lists) -> torch.Tensor:
    return ops.polyak_sums(*(lists[n] for n in SGD), z_lo=lists["z_lo"])


def assert_equal(here, there) -> None:
    """Equal bits in two sequences of tensors, the second on the GPU; NaNs are all one."""
    for i, (a, b) in enumerate(zip(here, there, strict=True)):
        b = b.cpu()
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        same = a == b
        if a.is_floating_point():
            same = (same & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())
        if not same.all():
            at = (~same).flatten().nonzero().flatten()
            first = int(at[0])
            pytest.fail(
                f"tensor {i} {tuple(a.shape)}: {len(at)} of {a.numel()} elements differ, the first at "
                f"{first}: {a.flatten()[first]!r} on the CPU, {b.flatten()[first]!r} on the GPU"
            )


def assert_same(here: Lists, there: Lists) -> None:
    for name in here:
        assert_equal(here[name], there[name])


@contextlib.contextmanager
def without_sync():
    """Fails for what waits for the GPU: torch by its own account, our kernels' launches by the clock."""
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # about half a second
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        waited = torch.cuda.current_stream().query()
        torch.cuda.synchronize()
    assert not waited, "the call returned only when the GPU had done everything before it"


# ---- operators ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("format", "grad"), COMBINATIONS)
def test_operators_step_as_on_the_cpu(format, grad, algorithm, options):
    here = draw(SHAPES, format, grad_dtype=grad)
    there, before = moved(here), moved(here)
    for coefs_on in ("cpu", DEVICE):
        step(here, algorithm, **OPTIONS[options])
        step(there, algorithm, coefs_on=coefs_on, **OPTIONS[options])
        assert_same(here, there)
    assert_equal([t.cpu() for t in before["grad"]], there["grad"])


@pytest.mark.parametrize("beta", [0.9, 0.5, 0.3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("format", [name for name in cases.FORMATS if name != "float64"])
def test_operators_leave_a_y_that_swaps_give_back(format, algorithm, beta):
    there = moved(draw(SHAPES, format))
    step(there, algorithm, beta=beta)
    before = {name: [t.cpu() for t in tensors] for name, tensors in there.items()}
    swap(ops.y_to_x_, there, beta)
    x = [t.cpu() for t in there["y"]]
    swap(ops.x_to_y_, there, beta)
    # A step can be too large for float16.
    lost = [~(a.isfinite() & b.isfinite()) for a, b in zip(before["y"], x, strict=True)]
    for name in ("y", "y_lo"):
        for i, one in enumerate(before[name]):
            one[lost[i]] = there[name][i].cpu()[lost[i]]
    assert_same(before, there)


@pytest.mark.parametrize("size", SIZES)
def test_operators_take_one_tensor_of_any_size(size):
    for algorithm in ALGORITHMS:
        here = draw([(size,)])
        there = moved(here)
        step(here, algorithm, weight_decay=0.1)
        step(there, algorithm, weight_decay=0.1)
        assert_same(here, there)


@pytest.mark.parametrize("format", cases.FORMATS)
def test_operators_take_thousands_of_tensors(format):
    # More than one launch can describe, with empty ones between and at the end.
    here = draw([(i * 37 % 71,) for i in range(3000)] + [(20_011,), (0,)], format)
    there = moved(here)
    for algorithm in ALGORITHMS:
        step(here, algorithm)
        step(there, algorithm)
        assert_same(here, there)
    for lists in (here, there):
        swap(ops.y_to_x_, lists)
    assert_same(here, there)


def test_operators_take_mixed_dtypes():
    mixed = [draw([(n,) for n in (5, 2049, 40_001)], format) for format in [*cases.FORMATS] * 2]
    absent = torch.empty(0)
    here = {
        name: [t for lists in mixed for t in lists[name] or [absent] * len(lists["y"])] for name in mixed[0]
    }
    there = moved(here)
    for lists in (here, there):
        step(lists, "adamw")
        swap(ops.y_to_x_, lists)
    assert_same(here, there)


OFFSETS = [
    (1, 1, 1, 1),
    (2, 2, 2, 2),
    (3, 3, 3, 3),
    (1, 0, 0, 0),
    (0, 1, 0, 0),
    (0, 0, 1, 0),
    (0, 0, 0, 1),
    (3, 1, 2, 0),
]


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("format", cases.FORMATS)
def test_operators_take_misaligned_views(format, offsets):
    """Offsets in elements, of y and y_lo, grad, z, and the moments."""
    here = draw([(n,) for n in SIZES[1:]], format)
    by_name = dict(zip(["y", "grad", "z", "exp_avg_sq"], offsets, strict=True))
    by_name |= {"y_lo": by_name["y"], "z_lo": by_name["z"], "exp_avg": by_name["exp_avg_sq"]}
    by_name["exp_avg_sq_scale"] = 0
    margin, mark = 8, 77
    whole, there = {}, {}
    for name, tensors in here.items():
        whole[name] = [
            torch.full((t.numel() + 2 * margin,), mark, dtype=t.dtype, device=DEVICE) for t in tensors
        ]
        first = margin + by_name[name]
        there[name] = [
            w[first : first + t.numel()].copy_(t) for w, t in zip(whole[name], tensors, strict=True)
        ]
    for algorithm in ALGORITHMS:
        step(here, algorithm)
        step(there, algorithm)
    for lists in (here, there):
        swap(ops.y_to_x_, lists)
    assert_same(here, there)
    for name, tensors in whole.items():
        for w in tensors:  # nothing beside the views was written
            w[margin + by_name[name] : len(w) - margin + by_name[name]] = mark
            assert (w == mark).all()


@pytest.mark.parametrize("grad_layout", [*cases.LAYOUTS, "expanded"])
@pytest.mark.parametrize("state_layout", cases.LAYOUTS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("format", cases.FORMATS)
def test_operators_take_strides(format, layout, state_layout, grad_layout):
    shape = (2, 5, 33, 7)
    here = draw([shape], format)
    if grad_layout == "expanded":
        here["grad"] = [here["grad"][0][:, :1].expand(shape)]
    there = {
        name: [
            cases.with_strides(t.to(DEVICE), layout if name == "y" else state_layout)
            if t.ndim > 1
            else t.to(DEVICE, copy=True)
            for t in tensors
        ]
        for name, tensors in here.items()
        if name != "grad"
    }
    if here["exp_avg_sq_scale"] and layout in ("channels_last", "transposed"):
        # Scales count as the memory of y does.
        here |= {n: [cases.with_strides(t, layout) for t in here[n]] for n in ("y", "exp_avg_sq")}
    grad = here["grad"][0].to(DEVICE, copy=True)
    there["grad"] = [
        grad[:, :1].expand(shape) if grad_layout == "expanded" else cases.with_strides(grad, grad_layout)
    ]
    for lists in (here, there):
        step(lists, "adamw with inner momentum", weight_decay=0.1)
    assert_same(here, there)
    for operator in (ops.y_to_x_, ops.x_to_y_):
        for lists in (here, there):
            swap(operator, lists)
        assert_same(here, there)
    sums = [sums_of(lists) for lists in (here, there)]
    torch.testing.assert_close(sums[1].cpu(), sums[0], rtol=1e-9, atol=0, equal_nan=True)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("format", "grad"), COMBINATIONS)
def test_operators_on_special_values(format, grad, algorithm):
    here = draw([(20_011,)], format, grad_dtype=grad, values=special)
    there = moved(here)
    for lists in (here, there):
        step(lists, algorithm, weight_decay=0.1)
    assert_same(here, there)
    for lists in (here, there):
        swap(ops.y_to_x_, lists)
    assert_same(here, there)


@pytest.mark.parametrize("beta", [1.0, 0.9, 0.5, 0.03])
@pytest.mark.parametrize("format", cases.FORMATS)
def test_operators_swap_as_on_the_cpu(format, beta):
    here = draw(SHAPES, format)
    there = moved(here)
    for operator in (ops.y_to_x_, ops.x_to_y_):
        for lists in (here, there):
            swap(operator, lists, beta)
        assert_same(here, there)


@pytest.mark.parametrize("values", [ordinary, special])
@pytest.mark.parametrize("coefs_on", ["cpu", DEVICE])
@pytest.mark.parametrize(
    ("format", "exchange"),
    [(name, False) for name in cases.LENT] + [(name, True) for name in cases.EXCHANGED],
)
def test_operators_surround_a_base_step_as_on_the_cpu(format, exchange, coefs_on, values):
    here = draw([*SHAPES, (20_011,)], format, values=values)
    there = moved(here)
    for options in ({"w": 0.3, "weight_decay": 0.1}, {"w": 1.0}, {"w": 0.0}, {"w": 0.3, "take": 0.0}):
        coefs = ops.coefs(**{**SCALARS, **options})
        for lists, place in ((here, "cpu"), (there, coefs_on)):
            cases.call(ops, "before_base_step_", lists, coefs.to(place), beta=0.8, exchange=exchange)
        assert_same(here, there)
        for lists, place in ((here, "cpu"), (there, coefs_on)):
            cases.call(ops, "after_base_step_", lists, coefs.to(place), exchange=exchange)
        assert_same(here, there)


@pytest.mark.parametrize(("format", "grad"), COMBINATIONS)
def test_operators_sum_as_on_the_cpu(format, grad):
    here = draw([*SHAPES, *[(5,)] * 2000], format, grad_dtype=grad)
    here["z"] = [(t.abs() * g.sign() + t).to(t.dtype) for t, g in zip(here["z"], here["grad"], strict=True)]
    there = moved(here)
    sums = sums_of(there)
    norm = ops.grad_norm(there["grad"])
    assert (sums.device.type, norm.device.type) == (DEVICE.type, DEVICE.type)
    assert (norm.dtype, norm.shape) == (torch.float64, ())
    torch.testing.assert_close(norm.cpu(), ops.grad_norm(here["grad"]), rtol=1e-12, atol=0)
    torch.testing.assert_close(sums.cpu(), sums_of(here), rtol=1e-12, atol=0)
    for _ in range(10):
        assert torch.equal(sums_of(there), sums)
        assert torch.equal(ops.grad_norm(there["grad"]), norm)


def test_operators_sum_what_is_not_finite():
    for value in (torch.inf, torch.nan):
        grad = torch.ones(5000, device=DEVICE)
        grad[4321] = value
        norm = ops.grad_norm([grad])
        assert norm.isnan() if value != value else norm == torch.inf
        lists = [torch.zeros(5000, device=DEVICE)], [], [grad], [torch.ones(5000, device=DEVICE)]
        assert not ops.polyak_sums(*lists).isfinite().any()


def test_operators_honour_opcheck():
    there = moved(draw([(3, 5), (7,)]))
    for device in ("cpu", DEVICE):
        coefs = ops.coefs(**SCALARS, **ADAM).to(device)
        lists = [there[n] for n in SGD]
        torch.library.opcheck(OPS.sgd_step_.default, (*lists, coefs), {"z_lo": []})
        parts = {"z_lo": [], "exp_avg_sq_scale": []}
        torch.library.opcheck(OPS.adamw_step_.default, (*lists, there["exp_avg_sq"], [], coefs), parts)
        torch.library.opcheck(
            OPS.before_base_step_.default, (there["y"], [], there["z"], coefs), {"beta": 0.9}
        )
        torch.library.opcheck(OPS.after_base_step_.default, (there["y"], [], there["z"], coefs), {})
    scalars = {"z_lo": [], "beta": 0.9}
    torch.library.opcheck(OPS.y_to_x_.default, (there["y"], [], there["z"]), scalars)
    torch.library.opcheck(OPS.grad_norm.default, (there["grad"],))


# ---- the first use of a kernel -------------------------------------------------------------------------

# A kernel that is captured first is refused; the capture goes on. Its first use outside changes nothing of torch's.
FIRST_USE = """
import logging, torch
from schedulefree_cpp import ops
logging.basicConfig(level=logging.INFO)

def lists():
    return [torch.arange(1.0, 2051.0, device="cuda")], [torch.linspace(-1, 1, 2050, device="cuda")]

def swap(y, z):
    ops.y_to_x_(y, [], z, beta=0.9)

def torch_has():
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    counts = [stats[f"{what}.all.{when}"] for what in ("allocation", "allocated_bytes") for when in ("allocated", "peak")]
    return counts, torch.cuda.get_rng_state().tolist(), torch.cuda.current_stream().cuda_stream

captured, eager = lists(), lists()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured[0][0].add_(0)
    try:
        swap(*captured)
    except RuntimeError as error:
        print("refused:", error)
before = torch_has()
swap(*eager)
assert torch_has() == before
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    swap(*captured)
graph.replay()
torch.cuda.synchronize()
here = [t.cpu() for t in lists()[0]], [t.cpu() for t in lists()[1]]
swap(*here)
assert torch.equal(captured[0][0].cpu(), here[0][0])
assert torch.equal(eager[0][0].cpu(), here[0][0])
"""


def test_a_kernel_is_compiled_proved_and_kept_at_its_first_use(tmp_path):
    environment = os.environ | {"SCHEDULEFREE_CPP_CACHE": str(tmp_path / "kernels")}
    runs = [
        subprocess.run([sys.executable, "-c", FIRST_USE], env=environment, capture_output=True, text=True)
        for _ in range(2)
    ]
    for done in runs:
        assert done.returncode == 0, done.stderr
        assert re.match(
            r"refused: schedulefree_cpp: the CUDA kernel update_kernel<Swap<Float32>, \w+Table<2>> is not loaded "
            r"yet.*Take one step",
            done.stdout,
        )
    logged = [re.findall("INFO:schedulefree_cpp:(.*)", done.stderr) for done in runs]
    assert len(logged[0]) == 1
    assert re.match(r"compiled the CUDA kernel update_kernel<Swap<Float32>, .* in \d+\.\d\d s", logged[0][0])
    assert logged[1] == []  # from disk
    assert sorted(path.suffix for path in (tmp_path / "kernels").iterdir()) == [".kernel", ".proof"]


# ---- where and when they run -------------------------------------------------------------------------


def test_operators_run_on_the_current_stream():
    here = draw([(n,) for n in SIZES])
    there = moved(here)
    grad = [torch.zeros_like(g) for g in there["grad"]]
    step(here, "adamw")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for g, value in zip(grad, there["grad"], strict=True):
            g.copy_(value)  # long after the host has gone on
        step(there | {"grad": grad}, "adamw")
        norm = ops.grad_norm(grad)
    stream.synchronize()
    assert_same(here, there)
    torch.testing.assert_close(norm.cpu(), ops.grad_norm(here["grad"]), rtol=1e-12, atol=0)


def test_operators_on_two_streams_do_not_meet():
    shapes = [(n,) for n in SIZES] * 20
    here = draw(shapes)
    both = [moved(here), moved(here)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    norms = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for _ in range(5):
        step(here, "adamw")
        for stream, lists in zip(streams, both, strict=True):
            with torch.cuda.stream(stream):
                norms.append(ops.grad_norm(lists["grad"]))
                step(lists, "adamw")
    torch.cuda.synchronize()
    for lists in both:
        assert_same(here, lists)
    assert all(torch.equal(norm, norms[0]) for norm in norms)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_operators_run_where_the_tensors_are():
    here = draw(SHAPES)
    there = {name: [t.to("cuda:1") for t in tensors] for name, tensors in here.items()}
    assert torch.cuda.current_device() == 0
    step(here, "adamw")
    step(there, "adamw", coefs_on="cuda:0")  # copied
    for lists in (here, there):
        swap(ops.y_to_x_, lists)
    assert torch.cuda.current_device() == 0
    assert_same(here, there)
    norm = ops.grad_norm(there["grad"])
    assert norm.device == torch.device("cuda:1")
    torch.testing.assert_close(norm.cpu(), ops.grad_norm(here["grad"]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["y", "grad", "z", "exp_avg_sq", "exp_avg"])
@pytest.mark.parametrize("index", [0, 2])
def test_operators_refuse_tensors_of_two_devices(name, index):
    there = moved(draw([(4, 3), (5,), (2, 2)]))
    there[name][index] = there[name][index].cpu()
    before = copy.deepcopy(there)
    message = rf"adamw_step_: {name}\[{index}\]: expected a tensor on cuda.*got one on cpu"
    with pytest.raises(RuntimeError, match=message):
        step(there, "adamw with inner momentum")
    for key, tensors in there.items():
        assert_equal([t.cpu() for t in before[key]], tensors)


def test_operators_refuse_shared_memory():
    there = moved(draw([(4,), (5,)]))
    there["z"][1] = there["y"][1]
    before = copy.deepcopy(there)
    with pytest.raises(RuntimeError, match=r"sgd_step_: z\[1\]: expected memory of its own.*y\[1\]"):
        step(there, "sgd")
    assert_same({name: [t.cpu() for t in ts] for name, ts in before.items()}, there)


def test_a_tensor_of_more_than_two_billion_elements():
    n = 2**31 + 4099
    needed = n * (2 + 1 + 2 + 2 + 1) + 2**30
    free = torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"{needed / 2**30:.0f} GiB are needed, {free / 2**30:.0f} are free")
    few = draw([(1000,)], "24 bits")
    many = {
        name: [torch.zeros(n, dtype=few[name][0].dtype, device=DEVICE)] for name in ("y", "y_lo", "z", "z_lo")
    }
    for name, (t,) in many.items():
        t[-1000:] = few[name][0].to(DEVICE)
    for lists in (few, many):
        swap(ops.y_to_x_, lists)
    for name in ("y", "y_lo"):
        assert torch.equal(many[name][0][-1000:].cpu(), few[name][0])
        assert not many[name][0][:-1000].any()

    for (t,) in many.values():
        t[-1000:] = 0
    many["grad"] = [torch.ones_like(many["y"][0])]
    step(many, "sgd", coefs=ops.coefs(lr=1.0, w=0.5, a=-0.5, beta=0.5))
    assert all((part == -0.5).all() for part in many["y"][0].split(2**26))
    assert all((part == -1).all() for part in many["z"][0].split(2**26))
    torch.testing.assert_close(ops.grad_norm(many["grad"]).item(), float(n) ** 0.5, rtol=1e-12, atol=0)


# ---- operators that schedule, or read their scalars, on the device ----------------------------------------------------


# pow(), log() and expm1() round otherwise on the device. RAdam subtracts two numbers of the size of 1/(1 - beta2),
# which magnifies that where the difference is small.
KINDS = {"sgd": 1e-14, "adamw": 1e-14, "adamw_paper": 1e-14, "radam": 1e-11}
SCHEDULES = [
    {"warmup_steps": 0, "r": 0.0, "weight_lr_power": 2.0},
    {"warmup_steps": 7, "r": 0.5, "weight_lr_power": 1.5, "decoupling_c": 50.0},
    {
        "warmup_steps": 3,
        "r": 2.0,
        "weight_lr_power": 0.0,
        "averaging_weight": 0.2,
        "maximize": True,
        "inner_momentum": 0.9,
    },
]


def schedule_state() -> dict[str, torch.Tensor]:
    """The first arguments of ``schedule_step_``, before the first step."""
    return {
        "coefs": torch.zeros(len(ops.COEFFICIENTS), dtype=torch.float64),
        "k": torch.tensor(0),
        "weight_sum": torch.tensor(0.0, dtype=torch.float64),
        "lr_max": torch.tensor(-1.0, dtype=torch.float64),
        "scheduled_lr": torch.tensor(0.0, dtype=torch.float64),
    }


def schedule_step(state, lr, decay, **options) -> None:
    scalars = {"kind": 0, "beta": 0.95, "beta2": 0.99, "eps": 1e-8} | options
    ops.schedule_step_(*state.values(), lr, decay, **scalars)


@pytest.mark.parametrize("inputs", ["on the device", "on the CPU"])
@pytest.mark.parametrize("options", SCHEDULES)
@pytest.mark.parametrize("kind", KINDS)
def test_operators_schedule_as_on_the_cpu(kind, options, inputs):
    here = schedule_state()
    for k in range(30):
        lr = torch.tensor(0.01 * (1 + k % 5), dtype=torch.float32 if k % 2 else torch.float64)
        decay = torch.tensor(0.1)
        extra = {}
        if k % 3 == 1:
            extra = {"grad_norm": torch.tensor(3.0 + k, dtype=torch.float64), "max_grad_norm": 1.0}
        if k % 4 >= 2:
            extra |= {"grad_scale": torch.tensor(1024.0), "found_inf": torch.tensor(float(k % 4 == 3))}
        there = {name: t.to(DEVICE, copy=True) for name, t in here.items()}
        target = DEVICE if inputs == "on the device" else "cpu"
        extra_there = {n: v.to(target) if isinstance(v, torch.Tensor) else v for n, v in extra.items()}
        schedule_step(here, lr, decay, kind=ops.STEP_KINDS[kind], **options, **extra)
        schedule_step(
            there, lr.to(target), decay.to(target), kind=ops.STEP_KINDS[kind], **options, **extra_there
        )
        for name, expected in here.items():
            message = f"{name} at step {k}"
            torch.testing.assert_close(there[name].cpu(), expected, rtol=KINDS[kind], atol=0, msg=message)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("format", cases.FORMATS)
def test_operators_take_scheduled_coefs(format, algorithm, decay):
    here = draw(SHAPES, format)
    there = moved(here)
    state = schedule_state()
    inner = 0.9 if "momentum" in algorithm else 0.0
    for decay_at in (0, 1):
        schedule_step(
            state, torch.tensor(0.1), torch.tensor(decay), warmup_steps=0, r=0.0, weight_lr_power=2.0,
            inner_momentum=inner,
        )  # fmt: skip
        step(here, algorithm, coefs=state["coefs"], decay_at=decay_at)
        step(there, algorithm, coefs=state["coefs"].to(DEVICE), decay_at=decay_at)
        assert_same(here, there)


def test_a_skipped_step_writes_nothing():
    there = moved(draw(SHAPES))
    before = copy.deepcopy(there)
    state = {name: t.to(DEVICE) for name, t in schedule_state().items()}
    start = copy.deepcopy(state)
    schedule_step(
        state, torch.tensor(0.1, device=DEVICE), torch.tensor(0.1, device=DEVICE), warmup_steps=0, r=0.0,
        weight_lr_power=2.0, found_inf=torch.tensor(1.0, device=DEVICE),
    )  # fmt: skip
    for coefs in (state["coefs"], state["coefs"].cpu()):
        step(there, "adamw", coefs=coefs)
    assert_same({name: [t.cpu() for t in ts] for name, ts in before.items()}, there)
    for name in start.keys() - {"coefs"}:
        assert torch.equal(state[name], start[name])


# ---- optimizers --------------------------------------------------------------------------------------

# The last has more elements than one block works on.
MODEL = [(7, 3), (), (5,), (2, 3, 4, 4), (0,), (300, 130)]


def optimizer_on(device, name: str, dtype=torch.float32, **kwargs):
    """An optimizer over parameters that are equal for equal arguments."""
    params = [Parameter(p.detach().to(device)) for p in cases.parameters(MODEL, dtype)]
    return cases.make(name, params, **kwargs)


def warmup(name: str, steps: int) -> dict[str, int]:
    """Warmup for those that know it."""
    return {} if "RAdam" in name else {"warmup_steps": steps}


def numbers(optimizer) -> list[dict[str, object]]:
    """What each group tells of its schedule, as plain numbers."""
    names = ("k", "weight_sum", "lr_max", "scheduled_lr", "train_mode")
    return [{name: float(group[name]) for name in names if name in group} for group in optimizer.param_groups]


def state_tensors(optimizer) -> list[torch.Tensor]:
    states = [optimizer.state[p] for p in cases.params_of(optimizer)]
    return [s[name] for s in states for name in sorted(s) if isinstance(s[name], torch.Tensor)]


def assert_same_optimizers(here, there) -> None:
    """Equal parameters, states and counters, the second optimizer's on the GPU."""
    assert all(p.device.type == DEVICE.type for p in cases.params_of(there))
    assert all(t.device.type == DEVICE.type for t in state_tensors(there))
    assert_equal([t.detach().cpu() for t in cases.params_of(here)], cases.params_of(there))
    assert_equal([t.cpu() for t in state_tensors(here)], state_tensors(there))
    assert numbers(here) == numbers(there)


def through_both_modes(here, there, compare) -> None:
    """Steps, an evaluation and further steps of two optimizers."""
    for part in range(2):
        for optimizer in (here, there):
            cases.run(optimizer, 4, start=4 * part)
        compare()
        for switch in ("eval", "train"):
            if hasattr(here, switch):
                getattr(here, switch)()
                getattr(there, switch)()
                compare()


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", cases.NATIVE + cases.CLOSURE)
def test_trajectories_are_those_of_the_cpu(name, dtype):
    here, there = (optimizer_on(device, name, dtype, **warmup(name, 3)) for device in ("cpu", DEVICE))
    through_both_modes(here, there, lambda: assert_same_optimizers(here, there))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("h", cases.ADAMW + cases.SGD, ids=cases.name_of)
def test_trajectories_with_all_hyperparameters(h, dtype):
    here, there = (
        cases.build([p.detach().to(device) for p in cases.parameters(MODEL, dtype)], h)
        for device in ("cpu", DEVICE)
    )
    through_both_modes(here, there, lambda: assert_same_optimizers(here, there))


@pytest.mark.parametrize("name", cases.REFERENCE + cases.PLUS + cases.WRAPPER)
def test_trajectories_of_what_torch_computes_are_close(name):
    here, there = (optimizer_on(device, name) for device in ("cpu", DEVICE))

    def compare():
        for p, q in zip(cases.params_of(here), cases.params_of(there), strict=True):
            torch.testing.assert_close(q.cpu(), p, **cases.PARITY)

    through_both_modes(here, there, compare)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", cases.NATIVE)
def test_state_follows_the_parameters(name, dtype, mode):
    stays, moves = (optimizer_on("cpu", name, dtype) for _ in range(2))
    model = torch.nn.ParameterList(cases.params_of(moves))
    for optimizer in (stays, moves):
        cases.run(optimizer, 3)
        getattr(optimizer, mode)()
    model.to(DEVICE)
    for optimizer in (stays, moves):
        optimizer.train()
        cases.run(optimizer, 3, start=3)
    assert_same_optimizers(stays, moves)
    model.to("cpu")
    for optimizer in (stays, moves):
        optimizer.train()
        cases.run(optimizer, 3, start=6)
    cases.assert_same(cases.params_of(stays), cases.params_of(moves))


def reloaded(optimizer, device, name: str, dtype, **kwargs):
    """Its like on a device, by way of a file."""
    file = io.BytesIO()
    model = [p.detach() for p in cases.params_of(optimizer)]
    torch.save({"model": model, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    checkpoint = torch.load(file, map_location=device, weights_only=True)
    other = cases.make(name, [Parameter(p) for p in checkpoint["model"]], **kwargs)
    other.load_state_dict(checkpoint["optimizer"])
    return other


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", cases.NATIVE)
def test_checkpoints_go_from_device_to_device(name, dtype, mode):
    here = optimizer_on("cpu", name, dtype)
    cases.run(here, 3)
    getattr(here, mode)()
    there = reloaded(here, DEVICE, name, dtype)
    for optimizer in (here, there):
        optimizer.train()
        cases.run(optimizer, 3, start=3)
        getattr(optimizer, mode)()
    assert_same_optimizers(here, there)
    back = reloaded(there, "cpu", name, dtype)
    for optimizer in (here, back):
        optimizer.train()
        cases.run(optimizer, 3, start=6)
    cases.assert_same(cases.params_of(here), cases.params_of(back))
    assert numbers(here) == numbers(back)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", cases.NATIVE)
def test_clipping_is_that_of_torch(name, capturable):
    kwargs = {"capturable": True} if capturable else {}
    ours = optimizer_on(DEVICE, name, max_grad_norm=0.5, **kwargs)
    theirs = optimizer_on(DEVICE, name)
    for seed in range(8):
        for optimizer in (ours, theirs):
            cases.set_gradients(cases.params_of(optimizer), seed)
        norm = clip_grad_norm_(cases.params_of(theirs), 0.5)
        ours.step()
        theirs.step()
        torch.testing.assert_close(ours.grad_norm.float(), norm)
    for p, q in zip(cases.params_of(ours), cases.params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, **cases.PARITY)


# ---- memory, launches, synchronization -------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"capturable": True}, {"max_grad_norm": 1.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_a_step_takes_no_memory(name, dtype, options):
    params = [Parameter(torch.randn(n, device=DEVICE).to(dtype)) for n in (4_000_001, 4_000_000, 17)]
    optimizer = cases.make(name, params, **options)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    extra = torch.cuda.max_memory_allocated() - before
    # Scalars, and the partial sums of a norm: a few bytes for thousands of elements.
    assert extra <= (64 * 1024 if "max_grad_norm" in options else 8 * 1024)


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_a_step_is_one_launch_for_each_dtype(name):
    shapes = [(64, 64)] * 200
    for dtypes in ([torch.float32], [torch.float32, torch.bfloat16]):
        params = [Parameter(p.detach().to(DEVICE)) for d in dtypes for p in cases.parameters(shapes, d)]
        optimizer = cases.make(name, params)
        cases.set_gradients(params, 0)
        optimizer.step()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            optimizer.step()
            torch.cuda.synchronize()
        on_device = [
            event
            for event in profiler.events()
            if event.device_type == DeviceType.CUDA and not event.name.startswith("Optimizer.")
        ]
        if not on_device:
            pytest.skip("the profiler sees no device activity here")
        assert len(on_device) == len(dtypes), [e.name for e in on_device]


# Without capturable, the host reads the norm.
@pytest.mark.parametrize(("capturable", "options"), [(False, {}), (True, {}), (True, {"max_grad_norm": 0.5})])
@pytest.mark.parametrize("name", cases.NATIVE)
def test_a_step_does_not_wait_for_the_gpu(name, capturable, options):
    lr = torch.tensor(0.05, device=DEVICE) if capturable else 0.05
    kwargs = options | ({"capturable": True} if capturable else {})
    optimizer = optimizer_on(DEVICE, name, lr=lr, **kwargs)
    for seed in range(3):  # loads kernels, makes the state, fills the allocator
        cases.drive(optimizer, seed)
    with without_sync():
        for _ in range(3):
            optimizer.step()
    assert all(p.isfinite().all() for p in cases.params_of(optimizer))


def test_a_step_that_waits_would_be_seen():
    def wait():
        while not torch.cuda.current_stream().query():
            pass

    with pytest.raises(AssertionError, match="returned only when"), without_sync():
        wait()
    with pytest.raises(RuntimeError, match="synchroniz"), without_sync():
        torch.zeros(1, device=DEVICE).item()


# ---- capturable, graphs, AMP -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, {"rtol": 1e-11, "atol": 1e-12}),
        (torch.float32, cases.PARITY),
        (torch.bfloat16, {"rtol": 1e-2, "atol": 1e-5}),
    ],
)
@pytest.mark.parametrize("name", cases.NATIVE)
def test_capturable_is_the_same_optimizer(name, dtype, tolerance):
    here = optimizer_on("cpu", name, dtype, **warmup(name, 3), weight_decay=0.1)
    there = optimizer_on(DEVICE, name, dtype, **warmup(name, 3), weight_decay=0.1, capturable=True)

    def compare():
        for p, q in zip(cases.params_of(here), cases.params_of(there), strict=True):
            torch.testing.assert_close(q.cpu(), p, **tolerance)
        for one, other in zip(numbers(here), numbers(there), strict=True):
            assert one == pytest.approx(other, rel=1e-12)

    through_both_modes(here, there, compare)
    for key in ("k", "weight_sum", "lr_max", "scheduled_lr"):
        assert there.param_groups[0][key].device.type == DEVICE.type
    assert isinstance(there.state_dict()["param_groups"][0]["k"], int)


@pytest.mark.parametrize("name", cases.NATIVE)
def test_checkpoints_go_between_capturable_and_plain(name):
    plain = optimizer_on("cpu", name)
    cases.run(plain, 3)
    capturable = reloaded(plain, DEVICE, name, torch.float32, capturable=True)
    for optimizer in (plain, capturable):
        cases.run(optimizer, 3, start=3)
    back = reloaded(capturable, "cpu", name, torch.float32)
    for optimizer in (plain, back):
        cases.run(optimizer, 3, start=6)
    for p, q in zip(cases.params_of(plain), cases.params_of(back), strict=True):
        torch.testing.assert_close(p, q, **cases.PARITY)


class Training:
    """Parameters that follow targets. Gradients are elementwise: the same bits in a graph and outside."""

    def __init__(self, name: str, dtype: torch.dtype, **kwargs) -> None:
        """An optimizer whose learning rate is on the device, under a scheduler."""
        self.lr = torch.tensor(0.05, device=DEVICE)
        self.optimizer = optimizer_on(
            DEVICE, name, dtype, lr=self.lr, capturable=True, **warmup(name, 20), **kwargs
        )
        self.scheduler = LambdaLR(self.optimizer, lambda k: 1 / (1 + k / 20))
        self.params = cases.params_of(self.optimizer)
        self.targets = [torch.zeros_like(p) for p in self.params]
        for p in self.params:
            p.grad = torch.zeros_like(p)

    def new_targets(self, seed: int) -> None:
        """Other targets, in the memory of the last."""
        generator = torch.Generator().manual_seed(seed)
        for t in self.targets:
            t.copy_(torch.randn(t.shape, generator=generator))

    def step(self) -> None:
        """What a graph captures."""
        self.optimizer.zero_grad(set_to_none=False)
        losses = [(p - t).square().sum() for p, t in zip(self.params, self.targets, strict=True)]
        torch.autograd.backward(losses)
        self.optimizer.step()

    def warm_up(self) -> None:
        """Three steps beside the default stream, as capturing asks for."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "weight_decay": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", cases.NATIVE)
def test_a_captured_step_is_the_eager_one(name, dtype, options):
    eager, graphed = (Training(name, dtype, **options) for _ in range(2))
    for training in (eager, graphed):
        training.warm_up()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.step()

    def run(seeds):
        for seed in seeds:
            for training, take in ((eager, eager.step), (graphed, graph.replay)):
                training.new_targets(seed)
                take()
                training.scheduler.step()

    def assert_same_trainings():
        assert_same_optimizers(eager.optimizer, graphed.optimizer)
        assert torch.equal(eager.lr, graphed.lr)

    run(range(100))
    assert numbers(eager.optimizer)[0]["k"] == 103
    assert_same_trainings()
    for switch in ("eval", "train"):
        for training in (eager, graphed):
            getattr(training.optimizer, switch)()
        assert_same_trainings()
    run(range(100, 110))
    assert_same_trainings()


def scaled_backward(scaler, optimizer, seed: int, *, overflow: bool = False) -> None:
    """Gradients as a scaled loss leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for p in cases.params_of(optimizer):
        p.grad = None
        loss = (p * torch.randn(p.shape, generator=generator).to(p)).sum()
        scaler.scale(loss).backward()
    if overflow:
        cases.params_of(optimizer)[0].grad.view(-1)[0] = torch.inf


def new_scaler(scale: float = 1024.0) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cuda", init_scale=scale, growth_interval=3)


@pytest.mark.parametrize("name", cases.NATIVE)
def test_an_overflow_changes_nothing(name):
    optimizer, scaler = optimizer_on(DEVICE, name, capturable=True, weight_decay=0.1), new_scaler()
    for seed in range(4):
        scaled_backward(scaler, optimizer, seed)
        scaler.step(optimizer)
        scaler.update()
    scale = scaler.get_scale()
    params = [p.detach().clone() for p in cases.params_of(optimizer)]
    state, counted = [t.clone() for t in state_tensors(optimizer)], numbers(optimizer)
    scaled_backward(scaler, optimizer, 5, overflow=True)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == scale / 2
    cases.assert_same(params, cases.params_of(optimizer))
    cases.assert_same(state, state_tensors(optimizer))
    assert numbers(optimizer) == counted
    twin = reloaded(optimizer, DEVICE, name, torch.float32, capturable=True, weight_decay=0.1)
    for each in (optimizer, twin):
        cases.drive(each, 6)
        each.eval()
    cases.assert_same(cases.params_of(optimizer), cases.params_of(twin))


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5}])
@pytest.mark.parametrize("name", cases.NATIVE)
def test_unscaling_in_the_kernel_is_that_of_the_scaler(name, options):
    # Scales are powers of two, so unscaling is exact.
    within, before = (optimizer_on(DEVICE, name, capturable=True, **options) for _ in range(2))
    scalers = [new_scaler(), new_scaler()]
    for seed in range(8):
        for optimizer, scaler in zip((within, before), scalers, strict=True):
            scaled_backward(scaler, optimizer, seed, overflow=seed == 4)
            if optimizer is before:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    cases.assert_same(cases.params_of(within), cases.params_of(before))
    cases.assert_same(state_tensors(within), state_tensors(before))
    assert numbers(within) == numbers(before)
    assert numbers(within)[0]["k"] == 7
    if options:
        torch.testing.assert_close(within.grad_norm, before.grad_norm, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", cases.NATIVE)
def test_a_scaled_step_does_not_wait_for_the_gpu(name):
    optimizer, scaler = optimizer_on(DEVICE, name, capturable=True), new_scaler()
    for seed in range(2):
        scaled_backward(scaler, optimizer, seed)
        scaler.step(optimizer)
        scaler.update()
    scaled_backward(scaler, optimizer, 2)
    with without_sync():
        scaler.step(optimizer)
        scaler.update()


# ---- Muon ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_muon_ends_where_the_cpu_does(dtype):
    """Matrix products are torch's, so not bit for bit."""
    params = cases.parameters([(48, 32), (32, 48), (7,), (3, 16, 24), (16, 4, 3, 3)], dtype)
    others = [Parameter(p.detach().to(DEVICE, copy=True)) for p in params]
    optimizer, other = (
        cases.make(
            "MuonScheduleFree",
            [{"params": ps[:3]}, {"params": ps[3:], "use_muon": True}],
            lr=0.5,
            weight_decay=0.1,
            max_grad_norm=1.0,
        )
        for ps in (params, others)
    )
    for seed in range(5):
        cases.set_gradients(params, seed)
        for p, q in zip(params, others, strict=True):
            q.grad = p.grad.to(DEVICE)
        optimizer.step(), other.step()
    tolerance = 1e-9 if dtype == torch.float64 else 0.02  # a step moves elements by 0.1
    for p, q in zip(params, others, strict=True):
        z, on_gpu = optimizer.state[p]["z"], other.state[q]["z"].cpu()
        torch.testing.assert_close(on_gpu, z, rtol=0, atol=tolerance)
    before = cases.copies(others)
    other.eval(), other.train()
    cases.assert_same(others, before)
