"""The sdist and the wheel: what is in them, and that they work elsewhere."""

from __future__ import annotations

import os
import platform
import re
import shutil
import site
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.build

# One step by the installed package, in a process that knows nothing of the source tree.
STEP = """
import torch, schedulefree_cpp
p = torch.nn.Parameter(torch.ones(3))
optimizer = schedulefree_cpp.AdamWScheduleFree([p], lr=0.1)
optimizer.train()
p.grad = torch.ones(3)
optimizer.step()
optimizer.eval()
assert (p < 1).all()
print(schedulefree_cpp.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-q",
        "-w",
        out,
        ROOT,
    ]
    subprocess.run(command, check=True)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Made of the tracked files alone: whatever else lies in a working tree is not packed."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    out = tmp_path_factory.mktemp("sdist")
    for name in tracked():
        (out / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, out / "tree" / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "-o", out, out / "tree"]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = out.glob("*.tar.gz")
    return path


def tracked():
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listing.stdout.splitlines() if (ROOT / name).exists()]


def test_the_sdist_holds_what_builds_and_tests_the_package(sdist):
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    made = {name for name in names if re.fullmatch(r"PKG-INFO|setup\.cfg|.*\.egg-info/.*", name)}
    # Hidden files serve the repository: continuous integration, editors, templates.
    assert names - made == {name for name in tracked() if not name.startswith(".")}


def test_a_cmake_project_builds_the_sdist_as_a_part_of_itself(sdist, tmp_path):
    shutil.copytree(ROOT / "examples" / "cpp", tmp_path / "program")
    lists = tmp_path / "program" / "CMakeLists.txt"
    recipe = f"""
include(FetchContent)
FetchContent_Declare(schedulefree_cpp URL {sdist})
FetchContent_MakeAvailable(schedulefree_cpp)
"""
    text, replaced = re.subn(r"\nfind_package\(schedulefree_cpp.*\n", recipe, lists.read_text())
    assert replaced == 1
    lists.write_text(text)
    options = [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    data = tmp_path / "digits.csv"
    for command in (
        ["cmake", "-S", tmp_path / "program", "-B", tmp_path / "build", "-G", "Ninja", *options],
        ["cmake", "--build", tmp_path / "build"],
        [sys.executable, ROOT / "examples" / "digits.py", "--export-csv", data],
        [tmp_path / "build" / "digits", data, "--epochs", "2"],
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d\d\.\d+ %", done.stdout)


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert all(name.startswith("schedulefree_cpp/") for name in names)
    python = ROOT / "python"
    modules = {str(path.relative_to(python)) for path in python.glob("schedulefree_cpp/**/*.py*")}
    modules = {name for name in modules if "__pycache__" not in name}
    libraries = {name for name in names if name.endswith(".so")}
    # The headers for programs, and those of csrc that they include, directly or not.
    public = ROOT / "csrc" / "include" / "schedulefree_cpp"
    headers = {path.name for path in public.glob("*.h")} | {"version.h"}
    unread = list(public.glob("*.h"))
    while unread:
        included = set(re.findall(r'#include "(?:.*/)?(.+)"', unread.pop().read_text())) - headers
        unread += [ROOT / "csrc" / name for name in included]
        headers |= included
    headers = {f"schedulefree_cpp/include/schedulefree_cpp/{name}" for name in headers}
    cmake = {
        f"schedulefree_cpp/share/cmake/schedulefree_cpp/schedulefree_cpp{part}.cmake"
        for part in ("Config", "ConfigVersion", "Targets", "Targets-release", "Torch")
    }
    assert names == modules | {"schedulefree_cpp/py.typed"} | libraries | headers | cmake
    assert "schedulefree_cpp/libschedulefree_cpp.so" in libraries
    assert len(libraries) == 2


def test_what_the_extra_names_is_pinned_in_the_one_list(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    requirement = r'^Requires-Dist: ([\w-]+).*; extra == "test"$'
    names = set(re.findall(requirement, archive.read(metadata).decode(), re.MULTILINE))
    assert {"lightning", "transformers", "accelerate", "timm", "pytest"} <= names
    lists = "".join((ROOT / f"requirements-{what}.txt").read_text() for what in ("train", "dev"))
    pins = dict(re.findall(r"([\w-]+)==(\S+)$", lists, re.MULTILINE))
    assert names <= set(pins)
    assert torch.__version__.split("+")[0] == pins["torch"]


def test_the_wheel_works_in_another_environment(wheel, tmp_path):
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    query = [python, "-c", "import site; print(site.getsitepackages()[0])"]
    target = Path(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
    # torch and what it needs come from here, the package from the wheel.
    (target / "torch_of_the_tests.pth").write_text("\n".join(site.getsitepackages()))
    zipfile.ZipFile(wheel).extractall(target)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([python, "-c", STEP], cwd=elsewhere, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(target))


def cmake_configure(build, torch_root):
    return configure_with(build, torch_root, "-DSCHEDULEFREE_PYTHON=OFF")


def configure_with(build, torch_root, *options, **variables):
    command = ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", f"-DSCHEDULEFREE_TORCH_ROOT={torch_root}"]
    environment = {**os.environ, **variables}
    return subprocess.run([*command, *options], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    path = tmp_path_factory.mktemp("build")
    assert cmake_configure(path, Path(torch.__file__).parent).returncode == 0
    subprocess.run(["cmake", "--build", path], check=True, capture_output=True)
    return path


def test_a_second_build_rebuilds_only_what_changed(build):
    again = subprocess.run(["cmake", "--build", build], check=True, capture_output=True, text=True)
    assert "no work to do" in again.stdout


def test_instruction_sets_share_no_code(build):
    # A weak symbol of one unit may be the one that the linker keeps for all.
    objects = list(build.rglob("step_*.o"))
    assert objects
    for path in objects:
        listing = subprocess.run(["nm", "-C", path], check=True, capture_output=True, text=True).stdout
        assert "kernel_table()" in listing
        assert [line for line in listing.splitlines() if line.split()[-2:-1] in (["W"], ["V"], ["u"])] == []


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86-64")
@pytest.mark.parametrize(
    ("isa", "instruction"),
    [("baseline", r"\bsqrtps\b"), ("avx2", r"vsqrtps.*ymm"), ("avx512", r"vsqrtps.*zmm")],
)
def test_every_adamw_loop_is_vectorised(build, isa, instruction):
    # One square root for each loop: three points of decay, with and without inner momentum.
    (path,) = build.rglob(f"step_{isa}.cpp.o")
    code = subprocess.run(["objdump", "-d", path], check=True, capture_output=True, text=True).stdout
    assert len(re.findall(instruction, code)) >= 6


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no cross compiler for arm64")
def test_the_baseline_vectorises_for_arm64(tmp_path):
    source = ROOT / "csrc" / "cpu" / "step_baseline.cpp"
    flags = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    assembly = tmp_path / "step.s"
    command = ["aarch64-linux-gnu-g++", *flags, "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, "-S", source, "-o", assembly], check=True)
    text = assembly.read_text()
    assert re.search(r"fmla\s+v\d+\.4s", text)
    assert re.search(r"fsqrt\s+v\d+\.4s", text)


def test_an_old_torch_stops_the_build_with_the_reason(tmp_path):
    header = tmp_path / "torch" / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 9\n")
    library = tmp_path / "torch" / "lib" / "libtorch_cpu.so"
    library.parent.mkdir()
    library.touch()
    done = cmake_configure(tmp_path / "build", tmp_path / "torch")
    assert done.returncode != 0
    assert "is too old" in " ".join(done.stderr.split())


# ---- a CMake project finds torch ------------------------------------------------------------------------


def test_the_installed_cmake_package_names_no_path_of_the_build(wheel):
    archive = zipfile.ZipFile(wheel)
    (config,) = (name for name in archive.namelist() if name.endswith("cppConfig.cmake"))
    text = archive.read(config).decode()
    assert str(Path(torch.__file__).parent) not in text
    assert "/../torch" in text


@pytest.mark.parametrize("how", ["-DCMAKE_PREFIX_PATH={}", "-DTorch_DIR={}/Torch", "environment"])
def test_torch_is_found_as_its_own_pages_say(tmp_path, how):
    path = torch.utils.cmake_prefix_path
    command = ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", "-DCMAKE_DISABLE_FIND_PACKAGE_Python=ON"]
    environment = os.environ | ({"CMAKE_PREFIX_PATH": path} if how == "environment" else {})
    options = [] if how == "environment" else [how.format(path)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"headers in {Path(torch.__file__).parent}/include" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("compiler", ["clang++", "clang++-14", "clang++-19"])
def test_clang_builds_library_and_tests_without_warnings(tmp_path, compiler):
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    options = [
        f"-DCMAKE_CXX_COMPILER={compiler}",
        "-DCMAKE_CXX_FLAGS_RELEASE=-O0",
        "-DSCHEDULEFREE_TESTS=ON",
        "-DSCHEDULEFREE_WERROR=ON",
    ]
    done = configure_with(tmp_path, Path(torch.__file__).parent, *options)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(["cmake", "--build", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---- wrong environments -----------------------------------------------------------------------------------

STAND_IN_SETUPTOOLS = """
__version__ = "{version}"
class Extension:
    def __init__(self, *arguments): pass
def setup(**arguments): print("setup was reached")
"""


def setup_with(folder, command="dist_info", setuptools="80.9.0", torch=None, root=ROOT, **variables):
    """What setup.py prints where there is nothing but a setuptools and, if it has a version, a torch."""
    (folder / "setuptools" / "command").mkdir(parents=True)
    (folder / "setuptools" / "__init__.py").write_text(STAND_IN_SETUPTOOLS.format(version=setuptools))
    (folder / "setuptools" / "command" / "build_ext.py").write_text("class build_ext: pass")
    if torch is not None:
        (folder / "torch").mkdir()
        (folder / "torch" / "__init__.py").write_text("raise ImportError('nobody imports it')")
        (folder / "torch" / "version.py").write_text(f"__version__ = '{torch}'")
    environment = os.environ | {"PYTHONPATH": str(folder)} | variables
    command = [sys.executable, "-S", "setup.py", command]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"setuptools": "66.1.1"}, 'setuptools 66.1.1 is too old.\n  pip install "setuptools>=77"'),
        ({}, "has no torch.\n  Install torch>=2.10 first (pip install torch), then: pip install"),
        ({"torch": "2.9.1+cu128"}, 'torch 2.9.1+cu128 is too old.\n  pip install --upgrade "torch>=2.10"'),
        ({"torch": "2.10.0", "MAX_JOBS": "many"}, "MAX_JOBS='many' is not a number of compilations"),
        ({"torch": "2.10.0", "MAX_JOBS": "0"}, "MAX_JOBS='0' is not a number of compilations"),
    ],
)
def test_a_wrong_environment_is_named_before_anything_is_downloaded(tmp_path, environment, message):
    done = setup_with(tmp_path, **environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) < 8


def test_a_right_environment_is_not_refused(tmp_path):
    done = setup_with(tmp_path, torch="2.14.1", MAX_JOBS="4")
    assert (done.returncode, done.stdout) == (0, "setup was reached\n")


def test_an_sdist_needs_no_torch(tmp_path):
    done = setup_with(tmp_path, "sdist")
    assert (done.returncode, done.stdout) == (0, "setup was reached\n")


def test_the_shim_names_a_setuptools_that_is_too_old(tmp_path):
    done = setup_with(tmp_path, setuptools="66.1.1", root=ROOT / "packaging" / "schedulefree-shim")
    assert done.returncode == 1
    assert done.stderr == '\nsetuptools 66.1.1 is too old: pip install "setuptools>=77"\n\n'
