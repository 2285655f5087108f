"""``python -m schedulefree_cpp``, and what a user sees where the package cannot be imported."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nvrtc
import pytest
import schedulefree_cpp
import torch
from schedulefree_cpp._core.library import _C

PACKAGE = Path(schedulefree_cpp.__file__).resolve().parent
LIBRARY = "libschedulefree_cpp.so"
CONFIG = Path("share/cmake/schedulefree_cpp/schedulefree_cppConfig.cmake")

# What _C asks of the operator library, without any operator.
WITHOUT_OPERATORS = """
const char* schedulefree_cpp_version(void) { return "0"; }
const char* schedulefree_cpp_compiler(void) { return "0"; }
const char* schedulefree_cpp_min_torch(void) { return "0"; }
const char* schedulefree_cpp_cpu_isa(void) { return "baseline"; }
const char* schedulefree_cpp_load_cuda(void) { return "no operators"; }
const char* schedulefree_cpp_cuda_report(void) { return ""; }
const char* schedulefree_cpp_compile_kernels(const char* architecture, void (*progress)(const char*)) { return 0; }
void schedulefree_cpp_set_log(void (*log)(const char*)) {}
"""


def python(*arguments, path=None, **variables):
    """Runs Python, without the environment's settings of this package, and with `path` before others."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SCHEDULEFREE_")}
    environment.update(variables)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    # -m and -c look into the working directory first.
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True)


def facts(done, status):
    """The report as a dictionary, after a look at its form."""
    assert done.returncode == status, done.stderr
    lines = done.stdout.splitlines()
    pairs = [re.split(r"\s{2,}", line, maxsplit=1) for line in lines]
    assert len({line.index(value, len(name)) for line, (name, value) in zip(lines, pairs, strict=True)}) == 1
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


@pytest.fixture
def copy(tmp_path):
    """The package's files without its libraries, in a directory for PYTHONPATH."""
    package = tmp_path / "schedulefree_cpp"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__", "share"))
    return package


def copy_libraries(copy, *patterns):
    for pattern in patterns:
        (library,) = PACKAGE.glob(pattern)
        shutil.copy(library, copy)


@pytest.fixture(scope="module")
def report():
    return facts(python("-m", "schedulefree_cpp"), 0)


# ---- the report ----------------------------------------------------------------------------------------


def test_the_report_names_what_is_here(report):
    assert report["schedulefree_cpp"] == schedulefree_cpp.__version__
    assert report["directory"] == str(PACKAGE)
    assert report["library"] == str(PACKAGE / LIBRARY)
    assert report["library version"] == _C.version()
    assert report["library compiler"] == _C.compiler()
    assert report["library needs torch"] == f">={_C.min_torch()}"
    assert report["_C"] == _C.__file__
    assert report["CMake configuration"].endswith(str(PACKAGE / CONFIG))
    assert report["torch"] == torch.__file__
    assert report["torch version"] == torch.__version__
    assert report["torch built for"].startswith(("CPU only", "CUDA ", "ROCm "))
    assert (report["torch devices visible"] == "none") == (not torch.cuda.is_available())
    assert report["Python"].split()[0] == platform.python_version()
    assert report["Python executable"] == sys.executable
    assert report["platform"] == platform.platform()
    assert report["processor"]
    assert report["SCHEDULEFREE_CPU_ISA"] == "not set"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86-64")
def test_the_instruction_set_fits_the_processor(report):
    needs = {"baseline": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw"}}
    assert needs[report["instruction set"]] <= set(report["processor flags"].split())


def test_what_is_known_of_cuda_is_reported(report):
    names = ["CUDA driver", "CUDA GPUs", "NVRTC", "kernel cache", "kernels compiled", "kernels proved"]
    assert [name for name in report if name in names] == names
    assert all(report[name] for name in names)
    if torch.version.cuda is None:
        assert report["CUDA operators"] == "not registered: this torch was built without CUDA"
    if not Path("/dev/nvidiactl").exists():
        assert report["CUDA driver"].startswith("none: ")
        assert report["CUDA GPUs"].startswith("none")


def test_the_report_names_what_the_environment_sets():
    variables = {"OMP_NUM_THREADS": "1", "LD_LIBRARY_PATH": "/nowhere", "SCHEDULEFREE_CPU_ISA": "baseline"}
    found = facts(python("-m", "schedulefree_cpp", **variables, SCHEDULEFREE_OTHER="one\ntwo"), 0)
    assert variables.items() <= found.items()
    assert found["SCHEDULEFREE_OTHER"] == "one two"
    assert found["instruction set"] == "baseline"
    assert found["torch threads"] == "1"


def test_an_instruction_set_that_is_refused_is_reported():
    found = facts(python("-m", "schedulefree_cpp", SCHEDULEFREE_CPU_ISA="avx1024"), 1)
    assert re.match(r"refused: SCHEDULEFREE_CPU_ISA: expected one of .*'avx1024'", found["instruction set"])
    assert found["SCHEDULEFREE_CPU_ISA"] == "avx1024"


def test_the_cmake_prefix_path_is_one_line():
    done = python("-m", "schedulefree_cpp", "--cmake-prefix-path")
    assert (done.returncode, done.stdout) == (0, f"{PACKAGE}\n")
    assert schedulefree_cpp.cmake_prefix_path == str(PACKAGE)


def test_the_cmake_prefix_path_warns_where_the_config_is_missing(copy):
    copy_libraries(copy, LIBRARY, "_C.*.so")
    command = ["-m", "schedulefree_cpp", "--cmake-prefix-path"]
    done = python(*command, path=copy.parent)
    assert (done.returncode, done.stdout) == (0, f"{copy}\n")
    assert re.search(rf"^warning: .*{re.escape(str(copy / CONFIG))} is missing$", done.stderr, re.MULTILINE)


def test_an_unknown_argument_is_refused():
    done = python("-m", "schedulefree_cpp", "--cmake")
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: python -m schedulefree_cpp" in done.stderr


# ---- kernels ahead of their use ------------------------------------------------------------------------


@pytest.fixture
def ahead(tmp_path):
    """Runs `--compile` with a compiler that compiles nothing, and a cache of its own."""
    library = nvrtc.stand_in(tmp_path)

    def run(*arguments, **variables):
        cache = {"SCHEDULEFREE_CPP_CACHE": str(tmp_path / "cache"), "SCHEDULEFREE_CPP_NVRTC": str(library)}
        return python("-m", "schedulefree_cpp", *arguments, **(cache | variables))

    return run


def test_kernels_are_compiled_for_architectures_that_are_named(ahead, tmp_path):
    done = ahead("--compile", "sm_80", "sm_90")
    assert done.returncode == 0, done.stderr
    *lines, first, second = done.stdout.splitlines()
    count = len(lines) // 2
    assert count > 100
    assert all(re.fullmatch(r" *\d+\.\d s +\d+  sm_[89]0 compiled \w+<.*>", line) for line in lines)
    assert first == f"sm_80: {count} kernels in {tmp_path / 'cache'}, {count} of them new"
    assert second == f"sm_90: {count} kernels in {tmp_path / 'cache'}, {count} of them new"
    again = ahead("--compile", "sm_90").stdout.splitlines()
    assert " sm_90 was there: " in again[0]
    assert again[-1] == f"sm_90: {count} kernels in {tmp_path / 'cache'}, 0 of them new"

    found = facts(ahead(), 0)
    assert found["NVRTC"] == f"99.1, {tmp_path / 'stand_in_nvrtc.so'}"
    assert found["kernel cache"] == str(tmp_path / "cache")
    both = re.findall(r"(\d+) for (sm_\d+), NVRTC 99\.1, sources \w{16}", found["kernels compiled"])
    assert both == [(str(count), "sm_80"), (str(count), "sm_90")]
    assert found["kernels proved"] == "none"


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine has a GPU")
def test_compiling_for_the_gpus_of_a_machine_without_one_says_so(ahead):
    done = ahead("--compile")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .*no CUDA driver here.*\n", done.stderr)


def test_an_architecture_that_nvrtc_does_not_know_is_refused_in_its_words(ahead):
    done = ahead("--compile", "sm_999")
    assert done.returncode == 1
    assert "error: schedulefree_cpp: NVRTC 99.1" in done.stderr
    assert "for sm_999" in done.stderr
    assert "no such architecture" in done.stderr


def test_compiling_without_a_compiler_says_where_to_get_one(ahead):
    done = ahead("--compile", "sm_90", SCHEDULEFREE_CPP_NVRTC="/nowhere.so")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: NVRTC was not found. Install it (pip install nvidia-cuda-nvrtc)" in done.stderr


@pytest.mark.parametrize("argument", ["90", "sm_90 "])
def test_what_is_no_architecture_is_refused(ahead, argument):
    done = ahead("--compile", argument)
    assert done.returncode == 2
    assert "expected an architecture such as sm_90" in done.stderr


def test_kernels_that_cannot_be_kept_are_an_error(ahead, tmp_path):
    (tmp_path / "file").touch()
    done = ahead("--compile", "sm_90", SCHEDULEFREE_CPP_CACHE=str(tmp_path / "file" / "cache"))
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert str(tmp_path / "file") in done.stderr
    # Others may write here, and so change what runs.
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    done = ahead("--compile", "sm_90", SCHEDULEFREE_CPP_CACHE=str(open_to_all))
    assert done.returncode == 1
    assert f"{open_to_all} cannot be used: others may write it" in done.stderr
    assert list(open_to_all.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists() or os.geteuid() != 0, reason="mounts need root")
def test_a_full_disk_is_an_error(ahead, tmp_path):
    full = tmp_path / "full"
    full.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", full]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mount is not allowed")
    try:
        done = ahead("--compile", "sm_90", SCHEDULEFREE_CPP_CACHE=str(full))
    finally:
        subprocess.run(["umount", full], check=True)
    assert done.returncode == 1
    assert f"error: kernels could not be kept in {full}: can files be written there" in done.stderr


# ---- a package that cannot be imported -----------------------------------------------------------------


def last_words(copy, *arguments):
    """The last line that a user of a broken copy sees."""
    done = python(*(arguments or ("-m", "schedulefree_cpp")), path=copy.parent)
    assert done.returncode == 1
    assert done.stdout == ""
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["-c", "import schedulefree_cpp"], ["-m", "schedulefree_cpp"]])
def test_a_missing_library_is_named_with_versions(copy, arguments):
    words = last_words(copy, *arguments)
    assert words.startswith(
        f"ImportError: schedulefree_cpp cannot load {copy / LIBRARY}: the file is missing"
    )
    assert f"torch {torch.__version__}, Python {platform.python_version()}" in words


def test_a_library_that_is_none_is_named(copy):
    copy_libraries(copy, "_C.*.so")
    (copy / LIBRARY).write_text("not a library at all")
    assert "built for another architecture" in last_words(copy)


def test_a_missing_module_is_named(copy):
    copy_libraries(copy, LIBRARY)
    assert re.search(r"schedulefree_cpp cannot load .*_C\.so: .*built for another Python", last_words(copy))


def test_a_library_without_the_operators_is_named(copy):
    copy_libraries(copy, "_C.*.so")
    source = copy / "stale.c"
    source.write_text(WITHOUT_OPERATORS)
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", source, "-o", copy / LIBRARY]
    subprocess.run(command, check=True)
    words = last_words(copy)
    assert f"{copy / LIBRARY} lacks the operators sgd_step_, adamw_step_" in words
    assert "built from other sources" in words


@pytest.mark.parametrize(
    "content",
    [
        "raise ImportError('No module named torch')",
        "raise OSError('libtorch_cpu.so: cannot open shared object file')",
    ],
)
def test_a_torch_that_cannot_be_imported_is_named(tmp_path, content):
    (tmp_path / "torch.py").write_text(content)
    done = python("-m", "schedulefree_cpp", path=tmp_path)
    assert done.returncode == 1
    assert re.search(r"'(.*)'", content)[1] in done.stderr.splitlines()[-1]
