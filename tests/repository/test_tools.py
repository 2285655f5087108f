"""What measures and tests on a GPU, as far as it goes without one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import schedulefree_cpp
import torch

ROOT = Path(__file__).resolve().parents[2]
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
    """A command in a process that sees no GPU, nor a make that runs the tests."""
    ours = ("SCHEDULEFREE_", "MAKE", "MFLAGS")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    return subprocess.run(command, cwd=ROOT, env=clean | NO_GPU | environment, capture_output=True, text=True)


# ---- tests/cuda/test_cuda.py ------------------------------------------------------------------------------

CUDA_TESTS = (
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-p",
    "no:cacheprovider",
    "tests/cuda/test_cuda.py",
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


# ---- make --------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_names_the_python_that_it_needs(tmp_path):
    (tmp_path / "python3.10").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python3.10").chmod(0o755)
    venv = tmp_path / "venv"
    done = run("make", "train", f"PYTHON={tmp_path / 'python3.10'}", f"VENV={venv}")
    assert done.returncode != 0
    assert done.stdout == ""
    assert done.stderr.startswith("make needs Python 3.11 or newer")
    assert "PYTHON=" in done.stderr
    assert not venv.exists()


def test_training_installs_less_than_testing():
    train, dev = ((ROOT / f"requirements-{what}.txt").read_text() for what in ("train", "dev"))
    assert "-r requirements-train.txt" in dev
    names = set(re.findall(r"^([\w-]+)==", train, re.MULTILINE))
    assert names.isdisjoint(re.findall(r"^([\w-]+)(?:\[\w+\])?==", dev, re.MULTILINE))
    assert len(names) <= 10
    imported = re.findall(
        r"^(?:from|import) (\w+)", (ROOT / "examples" / "digits.py").read_text(), re.MULTILINE
    )
    distributions = {"sklearn": "scikit-learn"}
    assert {distributions.get(name, name) for name in imported} - set(sys.stdlib_module_names) - {
        "schedulefree_cpp"
    } <= names


def test_a_stage_says_what_it_is_and_ends_as_its_command():
    done = run(ROOT / "tools" / "stage.sh", "Counting to one", "sh", "-c", "echo one; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "one\n", "==> Counting to one\n")


# ---- tools/newcomer.py -------------------------------------------------------------------------------

INDEX = """```{toctree}
:hidden:

first
second
```
"""
PAGE = """# Page

```sh
touch made  # a comment
```

<!-- newcomer: needs a GPU -->
```sh
exit 1
```
"""
OTHER_PAGE = """```sh
touch made
```

```sh
ls made
false
touch never
```
"""


def test_the_newcomer_types_what_the_pages_say(tmp_path):
    repository, out = tmp_path / "repository", tmp_path / "table.md"
    for name, text in {
        "README.md": "# Nothing to type",
        "docs/index.md": INDEX,
        "docs/first.md": PAGE,
        "docs/second.md": OTHER_PAGE,
        "tools/newcomer.py": (ROOT / "tools" / "newcomer.py").read_text(),
    }.items():
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text(text)
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        as_somebody = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *as_somebody, *command], cwd=repository, check=True)
    folder = tmp_path / "folder"
    done = run(sys.executable, repository / "tools" / "newcomer.py", "--folder", folder, "--out", out)
    assert done.returncode == 1, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[4:]]
    assert [(page, result) for page, _, _, _, result in rows] == [
        ("docs/first.md", "passed"),
        ("docs/first.md", "skipped: needs a GPU"),
        ("docs/second.md", "as above"),
        ("docs/second.md", "FAILED (1)"),
    ]
    assert out.read_text() == done.stdout
    assert (folder / "schedulefree_cpp" / "made").exists()
    assert not (folder / "schedulefree_cpp" / "never").exists()


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
    for tool in ("bash", "dirname", "env", "mktemp", "rm"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    done = run(GPU_CHECK, PATH=str(tmp_path), PYTHON=str(tmp_path / "python"))
    assert done.returncode == 2
    for missing in ("python >= 3.10", "cmake on PATH", "ninja on PATH"):
        assert f"missing: {missing}" in done.stderr


# Takes the place of Python and of NVIDIA's tools: says what it was asked for, and fails or sleeps as told.
STAND_IN = """#!/bin/bash
case "$*" in
  *find_spec*|*"import xdist"*) exit 0;;
esac
if [ "$(basename "$0")" = compute-sanitizer ] || [ "$(basename "$0")" = ncu ]; then echo "$(basename "$0") watched"; fi
echo "REQUIRE=$SCHEDULEFREE_REQUIRE_CUDA CACHE=$SCHEDULEFREE_CPP_CACHE $*"
for ((i = 1; i < $#; ++i)); do
  if [ "${!i}" = --json ]; then j=$((i + 1)); echo {} >"${!j}"; fi
done
case "$*" in
  *$SLEEPS*) sleep 60;;
  *$FAILS*) exit 3;;
esac
"""


@pytest.fixture
def stand_ins(tmp_path):
    """Programs in the place of Python and the build tools."""
    for tool in ("cmake", "ninja"):
        (tmp_path / tool).write_text("#!/bin/sh\n")
    (tmp_path / "python").write_text(STAND_IN)
    for tool in tmp_path.iterdir():
        tool.chmod(0o755)
    return tmp_path


def gpu_check(stand_ins, *, fails="nothing", sleeps="nothing", **environment):
    """The script's exit status, how every stage ended, its folder, and the logs by stage."""
    out = stand_ins / "out"
    told = {"FAILS": fails, "SLEEPS": sleeps, "OUT": str(out), "PYTHON": str(stand_ins / "python")}
    done = run(GPU_CHECK, PATH=f"{stand_ins}:/usr/bin:/bin", **(told | environment))
    lines = re.findall(r"^ *\d+ s  (.*)$", (out / "summary.txt").read_text(), re.MULTILINE)
    assert all(line in done.stdout for line in lines)
    stages = {name: how for name, _, how in (line.partition(": ") for line in lines) if how}
    with tarfile.open(out / "logs.tgz") as archive:
        logs = {
            Path(member.name).stem: archive.extractfile(member).read().decode()
            for member in archive.getmembers()
            if member.name.endswith(".log")
        }
    return done.returncode, stages, out, logs


SANITIZERS = ["memcheck", "racecheck", "synccheck"]
STAGES = ["build", "first-use", "smoke", "compile", "tests", "serial", "benchmark"]


def test_gpu_check_tells_how_every_stage_ended(stand_ins):
    status, stages, out, logs = gpu_check(stand_ins)
    assert status == 0
    # Most telling first.
    assert [name for name, how in stages.items() if how.startswith("PASS")] == STAGES
    # What could not be run has not passed.
    assert [stages[name] for name in SANITIZERS] == ["not run: no compute-sanitizer on PATH"] * 3
    assert stages["ncu"] == "not run: no ncu on PATH"
    assert "-m pip install" in logs["build"]
    assert "REQUIRE=1" in logs["tests"]
    assert "-m pytest -v -p no:cacheprovider --tb=short tests/cuda/test_cuda.py -n 8" in logs["tests"]
    assert logs["compile"].splitlines()[-1].endswith("-m schedulefree_cpp --compile")
    caches = {name: re.search(r"CACHE=(\S+)", logs[name])[1] for name in STAGES}
    assert caches["first-use"] != caches["smoke"]
    assert len(set(caches.values())) == 2
    assert "--device cuda --brief" in logs["benchmark"]
    names = {path.name for path in out.iterdir()}
    assert names == {"summary.txt", "report.txt", "benchmark.txt", "benchmark.json", "logs.tgz"}


def test_gpu_check_goes_on_after_a_failure_and_reports_it(stand_ins):
    status, stages, _, _ = gpu_check(stand_ins, fails="test_cuda")
    assert status == 1
    assert stages["smoke"].startswith("FAIL (3)")
    assert stages["benchmark"].startswith("PASS")


def test_gpu_check_tests_nothing_that_was_not_built(stand_ins):
    status, stages, out, _ = gpu_check(stand_ins, fails="pip install")
    assert status == 1
    assert list(stages) == ["build", "nothing else was run"]
    assert not (out / "report.txt").exists()


def test_gpu_check_has_two_sanitizers_run_beside_the_tests(stand_ins):
    for tool in ("compute-sanitizer", "ncu"):
        (stand_ins / tool).symlink_to(stand_ins / "python")
    status, stages, _, logs = gpu_check(stand_ins, fails="racecheck")
    assert status == 1
    assert stages["racecheck"].startswith("FAIL (3)")
    assert [stages[name][:4] for name in ("memcheck", "synccheck", "ncu-fp32", "ncu-fp32capturable")] == [
        "PASS"
    ] * 4
    assert "--kernel-regex kns=schedulefree" in logs["memcheck"]
    assert "--steps-of bf16, 24 bits, 8-bit moment" in logs["ncu-bf1624bits8-bitmoment"]


def test_gpu_check_runs_the_stages_that_are_asked_for(stand_ins):
    (stand_ins / "compute-sanitizer").symlink_to(stand_ins / "python")
    status, stages, _, logs = gpu_check(stand_ins, STAGES="smoke synccheck")
    assert status == 0
    assert list(stages) == ["smoke", "synccheck"]
    assert "build" not in logs


def test_gpu_check_ends_in_time_whatever_hangs(stand_ins):
    stages = "smoke compile benchmark"
    status, stages, _, logs = gpu_check(stand_ins, sleeps="test_cuda", LIMIT="22", STAGES=stages)
    assert status == 1
    assert stages["smoke"].startswith("FAIL (stopped at its limit)")
    assert stages["compile"] == stages["benchmark"] == "not run: no time was left"
    assert "REQUIRE=1" in logs["smoke"]


def test_gpu_check_profiles_rows_that_exist(bench):
    rows = re.search(r'for row in (".*"); do', GPU_CHECK.read_text())[1]
    assert set(re.findall(r'"([^"]+)"', rows)) <= {row.label for row in bench.BRIEF}


def test_gpu_check_picks_tests_that_exist():
    text = GPU_CHECK.read_text()
    collected = run(
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/cuda/test_cuda.py",
    )
    names = collected.stdout
    for word in (
        "mixed_dtypes",
        "any_size",
        "skipped_step",
        "scheduled_coefs",
        "what_is_not_finite",
        "misaligned",
        "strides",
        "launch",
        "no_memory",
        "wait",
        "billion",
        "two_streams",
        "current_stream",
    ):
        assert word in text
        assert word in names, word


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

    for name, lists, per_element in (("adamw", 4, 28), ("sgd", 3, 20), ("swap", 2, 12), ("exchange", 2, 16)):
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


def test_the_brief_table_goes_on_after_a_row_that_fails(bench, tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    here = bench.Bench(cpu, None, 2, {"": bench.seconds_per_call})
    monkeypatch.setattr(bench, "BYTES_TO_EVICT", 2**10)
    rows = [replace(bench.small(row), sizes=[4096]) for row in bench.BRIEF if "x" not in row.label]
    broken = replace(rows[0], label="broken", options={"no_such_option": 1})
    report = bench.Report({})
    bench.run_brief(here, report, [broken, *rows], 600, tmp_path / "brief.json")
    assert [(failure.row, failure.contender) for failure in report.failures] == [
        ("broken, AdamW step", bench.OURS)
    ]
    timed = {(timing.row, timing.contender) for timing in report.timings}
    for row in rows:
        assert (f"{row.label}, AdamW step", bench.OURS) in timed
        assert ((f"{row.label}, AdamW step", bench.TORCH) in timed) == (row.dtype != torch.float64)
        assert (f"{row.label}, AdamW step", bench.COPY) in timed
    assert {f"{label}, eval+train" for label in bench.BRIEF_SWAPS} <= {row for row, _ in timed}
    written = json.loads((tmp_path / "brief.json").read_text())
    assert len(written["timings"]) == len(report.timings)

    late = bench.Report({})
    bench.run_brief(here, late, rows[:1], -1, None)
    assert [failure.reason for failure in late.failures] == ["TimeoutError: not begun: -1 s are over"]


def test_a_copy_moves_the_bytes_of_a_step(bench, monkeypatch):
    for row, per_element in (("fp32", 28), ("bf16", 26), ("bf16, 24 bits, 8-bit moment", 2 + 2 * 7.03125)):
        workload = replace(next(each for each in bench.BRIEF if each.label == row), sizes=[4096])
        here = bench.Bench(torch.device("cpu"), None, 2, {})
        stage = bench.Stage(here, bench.Report({}), workload, {bench.OURS: bench.our_optimizer(workload)})
        moved = []
        monkeypatch.setattr(bench, "copy_of", lambda total, device, moved=moved: moved.append(total))
        bench.copy_of_step(stage.optimizers[bench.OURS], here.device)
        assert moved == [4096 * per_element]


def test_gradients_that_are_transposed_reach_the_optimizers(bench):
    workload = replace(bench.TINY, sizes=[16, 9], transposed_gradients=True)
    here = bench.Bench(torch.device("cpu"), None, 2, {})
    stage = bench.Stage(here, bench.Report({}), workload, {bench.OURS: bench.our_optimizer(workload)})
    assert [g.stride() for g in bench.gradients_of(stage.optimizers[bench.OURS])] == [(1, 4), (1, 3)]


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
