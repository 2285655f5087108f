"""What measures and tests on a GPU, as far as it goes without one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import schedulefree_cpp
import torch

ROOT = Path(__file__).resolve().parent.parent
GPU_CHECK = ROOT / "tools" / "gpu_check.sh"
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def bench():
    """The module ``benchmarks/step.py``."""
    spec = importlib.util.spec_from_file_location("step", ROOT / "benchmarks" / "step.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["step"] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["step"]


def run(*command, **environment):
    """A command in a process that sees no GPU."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SCHEDULEFREE_")}
    return subprocess.run(command, cwd=ROOT, env=clean | NO_GPU | environment, capture_output=True, text=True)


# ---- tests/test_cuda.py ------------------------------------------------------------------------------

CUDA_TESTS = (
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-p",
    "no:cacheprovider",
    "tests/test_cuda.py",
    "-k",
    "any_size",
)


def test_cuda_tests_skip_without_a_gpu():
    done = run(*CUDA_TESTS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " skipped" in done.stdout
    assert " passed" not in done.stdout
    assert "torch sees no CUDA device" in done.stdout


def test_cuda_tests_fail_without_a_gpu_where_one_is_required():
    done = run(*CUDA_TESTS, SCHEDULEFREE_REQUIRE_CUDA="1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "SCHEDULEFREE_REQUIRE_CUDA=1, but torch sees no CUDA device" in done.stdout
    assert " passed" not in done.stdout
    assert " skipped" not in done.stdout


# ---- tools/gpu_check.sh ------------------------------------------------------------------------------


def test_gpu_check_is_valid_bash():
    done = run("bash", "-n", GPU_CHECK)
    assert (done.returncode, done.stderr) == (0, "")


def test_gpu_check_says_what_is_missing_and_runs_nothing(tmp_path):
    done = run(GPU_CHECK, PYTHON=sys.executable, OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert "missing: a torch with CUDA" in done.stderr or "missing: a GPU" in done.stderr
    assert "nothing was run" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_gpu_check_says_which_tools_are_missing(tmp_path):
    for tool in ("bash", "dirname", "env"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    done = run(GPU_CHECK, PATH=str(tmp_path), PYTHON=str(tmp_path / "python"))
    assert done.returncode == 2
    for missing in ("python >= 3.10", "nvcc on PATH", "cmake on PATH", "ninja on PATH"):
        assert f"missing: {missing}" in done.stderr


@pytest.fixture
def stand_ins(tmp_path):
    """Programs that take the place of Python and the build tools; the first logs and fails as told."""
    for tool in ("nvcc", "cmake", "ninja"):
        (tmp_path / tool).write_text("#!/bin/sh\n")
    (tmp_path / "python").write_text(
        '#!/bin/sh\ncase "$*" in\n-c*) echo 90; exit 0;; esac\n'
        'echo "CUDAARCHS=$CUDAARCHS REQUIRE=$SCHEDULEFREE_REQUIRE_CUDA $*"\n'
        'case "$*" in *$FAILS*) exit 3;; esac\n'
    )
    for tool in tmp_path.iterdir():
        tool.chmod(0o755)
    return tmp_path


def gpu_check(stand_ins, fails, **environment):
    """The script's exit status and its summary, by stage."""
    out = stand_ins / "out"
    path = f"{stand_ins}:/usr/bin:/bin"
    done = run(
        GPU_CHECK, PATH=path, PYTHON=str(stand_ins / "python"), FAILS=fails, OUT=str(out), **environment
    )
    lines = (out / "summary.txt").read_text().splitlines()
    stages = {
        line.split()[0]: line.split(maxsplit=1)[1]
        for line in lines
        if "PASS" in line or "FAIL" in line or "not run" in line
    }
    assert done.stdout.endswith("\n".join(lines) + "\n")
    return done.returncode, stages, out


SANITIZERS = ["memcheck", "racecheck", "initcheck", "synccheck"]


def test_gpu_check_tells_how_every_stage_ended(stand_ins):
    status, stages, out = gpu_check(stand_ins, "nothing")
    assert status == 0
    assert {name for name, how in stages.items() if how == "PASS"} == {
        "build", "tests", "cpu-tests", "diagnostics", "benchmark"
    }  # fmt: skip
    # What could not be run has not passed.
    assert [stages[name] for name in SANITIZERS] == ["not run: no compute-sanitizer on PATH"] * 4
    assert "CUDAARCHS=90 REQUIRE=1 -m pip install" in (out / "build.log").read_text()
    assert "REQUIRE=1 -m pytest tests/test_cuda.py" in (out / "tests.log").read_text()
    assert f"--json {out / 'benchmark.json'}" in (out / "benchmark.log").read_text()


def test_gpu_check_goes_on_after_a_failure_and_reports_it(stand_ins):
    status, stages, _ = gpu_check(stand_ins, "test_cuda")
    assert status == 1
    assert stages["tests"].startswith("FAIL (exit status 3")
    assert stages["benchmark"] == "PASS"


def test_gpu_check_tests_nothing_that_was_not_built(stand_ins):
    status, stages, _ = gpu_check(stand_ins, "pip")
    assert status == 1
    assert stages["tests"] == stages["benchmark"] == "not run: the build failed"


def test_gpu_check_runs_the_stages_that_are_asked_for(stand_ins):
    (stand_ins / "compute-sanitizer").symlink_to(stand_ins / "python")
    status, stages, out = gpu_check(
        stand_ins, "racecheck", STAGES="build racecheck synccheck", CUDAARCHS="80"
    )
    assert status == 1
    assert stages["racecheck"].startswith("FAIL")
    assert (stages["synccheck"], stages["memcheck"]) == ("PASS", "not run: not in STAGES")
    assert "CUDAARCHS=80 " in (out / "build.log").read_text()


# ---- benchmarks/step.py ------------------------------------------------------------------------------


def test_the_benchmark_of_a_gpu_says_that_there_is_none(bench):
    done = run(sys.executable, "benchmarks/step.py", "--device", "cuda")
    assert done.returncode == 2
    assert "sees no CUDA device" in done.stderr
    assert done.stdout == ""


def test_models_have_the_published_numbers_of_parameters(bench):
    assert (len(bench.resnet50()), sum(bench.resnet50())) == (161, 25_557_032)
    assert (len(bench.gpt2()), sum(bench.gpt2())) == (148, 124_439_808)


def test_ratios_are_taken_within_rounds(bench):
    ours, theirs = [1.0, 2.0, 6.0], [2.0, 8.0, 6.0]
    row = ("row", bench.TINY)
    rival = bench.timing(*row, bench.TORCH, theirs, ours, bench.Target(at_most=0.5))
    assert (rival.ratio, rival.ratio_quartiles, rival.median_s, rival.met) == (0.5, (0.375, 0.75), 6.0, True)
    # Of a ceiling, the part that is reached.
    reached = bench.timing(*row, bench.COPY, ours, theirs, bench.Target(at_least=0.92))
    assert (reached.ratio, reached.met, reached.target) == (0.5, False, ">= 0.92")
    own = bench.timing(*row, bench.OURS, ours, ours, bench.Target())
    assert (own.ratio, own.met) == (None, None)


def test_bytes_are_those_of_the_design(bench):
    def some(dtype, lists):
        return [[torch.zeros(10, dtype=dtype)] for _ in range(lists)]

    for name, lists, per_element in (("adamw", 4, 28), ("sgd", 3, 20), ("swap", 2, 12)):
        assert bench.bytes_moved(name, some(torch.float32, lists)) == 10 * per_element
    y, grad = some(torch.bfloat16, 2)
    low = torch.zeros(10, dtype=torch.int16)
    assert bench.bytes_moved("adamw", [[*y, low], grad, *some(torch.float32, 2)]) == 10 * 26


@pytest.mark.parametrize("total", [2, 1000, 4096, 10_000])
def test_a_copy_moves_what_it_is_asked_to(bench, monkeypatch, total):
    moved = []
    copy_ = torch.Tensor.copy_
    monkeypatch.setattr(bench, "BYTES_TO_COPY", 1024)
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda to, source: moved.append(source.nbytes) or copy_(to, source)
    )
    bench.copy_of(total, torch.device("cpu"))()
    assert 2 * sum(moved) == total


def test_the_largest_tensor_is_reduced_to_what_fits(bench):
    assert bench.fitting(bench.GIANT, 60, 200 * 2**30) is bench.GIANT
    smaller = bench.fitting(bench.GIANT, 60, 40 * 2**30)
    (size,) = smaller.sizes
    assert 0.8 * 40 * 2**30 < 60 * size < 0.9 * 40 * 2**30
    assert smaller.label == f"1 x {size / 1e6:.0f}M fp32 (1B do not fit)"
    assert smaller.targets == bench.GIANT.targets


def test_names_of_result_files(bench):
    assert bench.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_the_gpu_is_kept_waiting_while_the_host_launches(bench, monkeypatch):
    happened = []

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("event")

        def synchronize(self):
            happened.append("wait")

        def elapsed_time(self, end):
            return 6.0

    now = iter([0.0, 0.004, 1.0, 1.001, 2.0, 7.0, 8.0, 8.001])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append(cycles / 3e9))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(now))
    clock = bench.DeviceClock()

    def work():
        happened.append("work")

    assert clock(work, 3) == pytest.approx(0.002)
    assert happened == [pytest.approx(0.001), "event", "work", "work", "work", "event", "wait"]
    # Twice what the host took, the longest it ever took, and never more than a queue holds.
    leads = []
    for _ in range(3):
        happened.clear()
        clock(work, 1)
        leads.append(happened[0])
    assert leads == pytest.approx([0.008, 0.008, 0.1])


def test_zero_gradients_and_offsets_reach_the_optimizers(bench):
    class Rows:
        def add_failure(self, row, contender, error):
            raise AssertionError(contender)

    tiny = replace(bench.TINY, sizes=[5, 3], grad_offset=1, zero_gradients=True)
    here = bench.Bench(torch.device("cpu"), None, 2, {})
    stage = bench.Stage(here, Rows(), tiny, bench.family_of(bench.ADAMW, (bench.TORCH,)))
    assert set(stage.optimizers) == {bench.OURS, bench.TORCH}
    for optimizer in stage.optimizers.values():
        for grad in bench.gradients_of(optimizer):
            assert grad.storage_offset() == 1
            assert not grad.any()


def test_a_contender_that_does_not_compile_is_reported(bench):
    failures = []

    class Rows:
        def add_failure(self, row, contender, error):
            failures.append((contender, str(error)))

    def fails(parameters):
        raise RuntimeError("no compiler")

    family = {bench.OURS: bench.ADAMW[bench.OURS], bench.UPSTREAM_COMPILED: fails}
    here = bench.Bench(torch.device("cpu"), None, 2, {})
    stage = bench.Stage(here, Rows(), bench.TINY, family)
    assert failures == [(bench.UPSTREAM_COMPILED, "no compiler")]
    assert set(stage.steps()) == {bench.OURS}


@pytest.mark.build
def test_formats_are_measured_beside_a_loop_that_moves_their_bytes(bench, tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    here = bench.Bench(cpu, bench.load_ceiling(), 2, {"": bench.seconds_per_call})
    report = bench.Report({})
    monkeypatch.setattr(bench, "BYTES_TO_EVICT", 2**20)
    bench.run_formats(here, report, replace(bench.LARGE, sizes=[2048, 1024]))
    counts = {count.row: count.count for count in report.counts if count.contender == bench.OURS}
    assert list(counts.values()) == [12, 9.03125, 12, 9.03125, 12, 9.03125, 10, 10, 7.03125, 7.03125]
    timed = {timing.contender for timing in report.timings}
    assert timed >= {bench.OURS, bench.TORCH, bench.TORCH_BF16, bench.UPSTREAM_BF16, bench.CEILING}

    # The loop is its own inverse and leaves out no memory that a step moves.
    options = {**bench.BITS24, **bench.MOMENT8}
    make = partial(schedulefree_cpp.AdamWScheduleFree, lr=1e-3, **options)
    start = [torch.randn(2048).bfloat16()]
    optimizer = bench.new_optimizer(make, start, [torch.randn(2048).bfloat16()])
    (p,) = bench.parameters_of(optimizer)
    state = [t for t in optimizer.state[p].values() if torch.is_tensor(t)]
    before = [t.detach().view(torch.uint8).clone() for t in (p, *state)]
    _, move = bench.ceiling_of_streams(here, optimizer)
    move()
    for t, old in zip((p, *state), before, strict=True):
        assert (t.detach().view(torch.uint8) != old).any()
    move()
    for t, old in zip((p, *state), before, strict=True):
        assert torch.equal(t.detach().view(torch.uint8), old)


# ---- benchmarks/precision.py -------------------------------------------------------------------------


@pytest.mark.frameworks
def test_precision_is_measured_written_and_drawn(tmp_path):
    results, picture = tmp_path / "precision.json", tmp_path / "precision.png"
    where = ("--json", str(results), "--picture", str(picture))
    done = run(sys.executable, "benchmarks/precision.py", "--quick", *where, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    content = json.loads(results.read_text())
    assert {row["mode"] for row in content["digits"]} == {row["mode"] for row in content["charlm"]}
    rows = {(row["problem"], row["mode"]): row for row in content["quadratic"]}
    assert rows["lr 1e-2", "bf16"]["same bits as float32"]
    assert rows["lr 1e-2", "bf16, 24 bits, 8-bit moment"]["bytes"] == 7.032
    assert picture.read_bytes().startswith(b"\x89PNG")
