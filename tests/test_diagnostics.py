"""``python -m schedulefree_cpp``, and what a user sees where the package cannot be imported."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

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
const char* schedulefree_cpp_cuda_build(void) { return "not built"; }
const char* schedulefree_cpp_load_cuda(void) { return "not built"; }
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


def test_the_cuda_kernels_are_reported(report):
    assert report["CUDA kernels"] == _C.cuda_build()
    assert re.match(r"nvcc [\d.]+ for \d\d|not built: .", report["CUDA kernels"])
    if torch.version.cuda is None:
        assert report["CUDA library"] == "not loaded: this torch was built without CUDA"


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
