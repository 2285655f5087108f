"""``python -m schedulefree_cpp``, above all where the package cannot be imported."""

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
from schedulefree_cpp._library import _C

PACKAGE = Path(schedulefree_cpp.__file__).resolve().parent
LIBRARY = "libschedulefree_cpp.so"
CUDA_LIBRARY = "libschedulefree_cpp_cuda.so"
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
    assert "Traceback" not in done.stderr
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


@pytest.fixture(scope="module")
def report():
    return facts(python("-m", "schedulefree_cpp"), 0)


def copy_module(copy):
    (module,) = PACKAGE.glob("_C.*.so")
    shutil.copy(module, copy)


def test_the_report_names_what_is_here(report):
    assert report["schedulefree_cpp"] == schedulefree_cpp.__version__
    assert report["directory"] == str(PACKAGE)
    assert report["CMake prefix path"].split(" (")[0] == str(PACKAGE)
    assert report["Python"].split()[0] == platform.python_version()
    assert report["Python executable"] == sys.executable
    assert report["platform"] == platform.platform()
    assert report["processor"]
    assert report["torch"] == f"loaded: {torch.__file__}"
    assert report[LIBRARY] == f"loaded: {PACKAGE / LIBRARY}"
    assert report["_C"] == f"loaded: {_C.__file__}"
    assert report["operators"] == "registered"
    assert report["library version"] == _C.version()
    assert report["library compiler"] == _C.compiler()
    assert report["library needs torch"] == f">={_C.min_torch()}"
    assert report["torch version"] == torch.__version__
    assert report["torch built for"].startswith(("CPU only", "CUDA ", "ROCm "))
    assert (report["torch devices visible"] == "none") == (not torch.cuda.is_available())
    assert report["SCHEDULEFREE_CPU_ISA"] == "not set"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86-64")
def test_the_instruction_set_fits_the_processor(report):
    needs = {"baseline": set(), "avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw"}}
    assert needs[report["instruction set"]] <= set(report["processor flags"].split())


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
    assert found[LIBRARY].startswith("loaded")


def test_the_cuda_kernels_are_reported(report):
    assert report["CUDA kernels"] == _C.cuda_build()
    assert re.match(r"nvcc [\d.]+ for \d\d|not built: .", report["CUDA kernels"])
    if torch.version.cuda is None:
        assert report[CUDA_LIBRARY] == "not loaded: this torch was built without CUDA"


def test_a_cuda_library_is_found(copy):
    (copy / CUDA_LIBRARY).touch()
    found = facts(python("-m", "schedulefree_cpp", path=copy.parent), 1)
    assert found[CUDA_LIBRARY] == f"not tried: {copy / CUDA_LIBRARY}"


def test_a_missing_library_is_reported(copy):
    found = facts(python("-mschedulefree_cpp", path=copy.parent), 1)
    assert found["schedulefree_cpp"] == schedulefree_cpp.__version__
    assert found["directory"] == str(copy)
    assert found["torch version"] == torch.__version__
    assert found[LIBRARY].startswith(
        f"not loaded: schedulefree_cpp cannot load {copy / LIBRARY}: the file is missing"
    )
    assert found["_C"] == found["operators"] == f"not tried, since {LIBRARY} comes first"
    assert "library version" not in found
    assert found[CUDA_LIBRARY] == f"missing: {copy / CUDA_LIBRARY}"
    assert found["CMake prefix path"] == f"{copy} (without {CONFIG})"


def test_a_library_that_is_none_is_reported(copy):
    (copy / LIBRARY).write_text("not a library at all")
    copy_module(copy)
    found = facts(python("-m", "schedulefree_cpp", path=copy.parent), 1)
    assert re.match(r"not loaded: .*built for another architecture", found[LIBRARY])


def test_a_missing_module_is_reported(copy):
    shutil.copy(PACKAGE / LIBRARY, copy)
    found = facts(python("-m", "schedulefree_cpp", path=copy.parent), 1)
    assert found[LIBRARY] == f"loaded: {copy / LIBRARY}"
    assert found["_C"].startswith("not loaded: schedulefree_cpp cannot load")
    assert found["operators"] == "not tried, since _C comes first"


def test_a_library_without_the_operators_is_reported(copy):
    source = copy / "stale.c"
    source.write_text(WITHOUT_OPERATORS)
    subprocess.run(
        ["cc", "-shared", "-fPIC", f"-Wl,-soname,{LIBRARY}", source, "-o", copy / LIBRARY], check=True
    )
    copy_module(copy)
    found = facts(python("-m", "schedulefree_cpp", path=copy.parent), 1)
    assert found["library version"] == "0"
    assert re.match(r"not loaded: .*sgd_step_", found["operators"])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("raise ImportError('No module named torch')", "No module named torch"),
        ("raise OSError('libtorch_cpu.so: cannot open shared object file')", "libtorch_cpu.so: cannot open"),
        ("", "has no attribute '__version__'"),
    ],
)
def test_a_torch_that_cannot_be_imported_is_reported(tmp_path, content, reason):
    (tmp_path / "torch.py").write_text(content)
    found = facts(python("-m", "schedulefree_cpp", path=tmp_path), 1)
    assert found["torch"].startswith("not loaded: ")
    assert reason in found["torch"]
    assert found[LIBRARY] == "not tried, since torch comes first"
    assert "torch version" not in found


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import schedulefree_cpp"],
        ["-c", "import sys; del sys.argv[1:]; import schedulefree_cpp", "schedulefree_cpp"],
        ["-m", "schedulefree_cpp.ops"],
        ["-m", "trainer", "schedulefree_cpp"],
    ],
)
def test_any_other_import_of_a_broken_package_fails(copy, arguments):
    trainer = copy.parent / "trainer"
    trainer.mkdir()
    (trainer / "__init__.py").write_text("import schedulefree_cpp")
    (trainer / "__main__.py").touch()
    done = python(*arguments, path=copy.parent)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.search(r"schedulefree_cpp cannot load .*the file is missing", done.stderr)
    assert "ImportError" in done.stderr


def test_the_cmake_prefix_path_is_one_line():
    done = python("-m", "schedulefree_cpp", "--cmake-prefix-path")
    assert (done.returncode, done.stdout) == (0, f"{PACKAGE}\n")
    assert schedulefree_cpp.cmake_prefix_path == str(PACKAGE)
    assert "cmake_prefix_path" in schedulefree_cpp.__all__


def test_the_cmake_prefix_path_warns_where_the_config_is_missing(copy):
    command = ["-m", "schedulefree_cpp", "--cmake-prefix-path"]
    done = python(*command, path=copy.parent)
    assert (done.returncode, done.stdout) == (0, f"{copy}\n")
    assert re.search(rf"^warning: .*{re.escape(str(copy / CONFIG))} is missing$", done.stderr, re.MULTILINE)

    (copy / CONFIG).parent.mkdir(parents=True)
    (copy / CONFIG).touch()
    done = python(*command, path=copy.parent)
    assert (done.returncode, done.stdout) == (0, f"{copy}\n")
    assert "warning: find_package" not in done.stderr
    assert facts(python("-m", "schedulefree_cpp", path=copy.parent), 1)["CMake prefix path"] == str(copy)


def test_an_unknown_argument_is_refused(copy):
    done = python("-m", "schedulefree_cpp", "--cmake", path=copy.parent)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: python -m schedulefree_cpp" in done.stderr
