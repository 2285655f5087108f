"""Hands the build of the native parts to CMake; everything else is in pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MIN_SETUPTOOLS = 77
MIN_TORCH = (2, 10)
BUILDS = ("dist_info", "bdist_wheel", "editable_wheel", "build", "build_ext", "develop", "install")


def fail(problem: str, remedy: str) -> None:
    sys.exit(f"\nschedulefree_cpp cannot be built: {problem}\n  {remedy}\n")


def torch_root() -> Path:
    """Where torch is, which is not imported: that takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        fail(
            f"{sys.executable} has no torch.",
            "Install torch>=2.10 first (pip install torch), then: pip install --no-build-isolation .",
        )
    return Path(spec.origin).parent


def lasts(path: Path) -> bool:
    """False for a folder of a build that pip isolates."""
    return not path.is_relative_to(tempfile.gettempdir())


def check_versions() -> None:
    """Refuses what would fail later, after downloads of gigabytes or behind pages of other messages."""
    if int(setuptools.__version__.partition(".")[0]) < MIN_SETUPTOOLS:
        fail(
            f"setuptools {setuptools.__version__} is too old.",
            f'pip install "setuptools>={MIN_SETUPTOOLS}"',
        )
    if not any(command in BUILDS for command in sys.argv[1:]):
        return
    version = re.search(r"__version__ = '((\d+)\.(\d+).*)'", (torch_root() / "version.py").read_text())
    if version is not None and (int(version[2]), int(version[3])) < MIN_TORCH:
        fail(f"torch {version[1]} is too old.", 'pip install --upgrade "torch>=2.10"')
    if not re.fullmatch(r"([1-9]\d*)?", os.environ.get("MAX_JOBS", "")):
        fail(f"MAX_JOBS={os.environ['MAX_JOBS']!r} is not a number of compilations.", "MAX_JOBS=4, say.")


def pybind11_dir() -> str:
    try:
        import pybind11
    except ImportError:
        fail("pybind11 is missing.", "pip install pybind11, or build without --no-build-isolation.")
    return str(pybind11.get_cmake_dir())


class CMakeBuild(build_ext):
    """Configures once, then lets ninja rebuild what changed, and installs into the package."""

    def run(self) -> None:
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                fail(f"{tool} is not on PATH.", f"pip install {tool}")
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        package = Path(self.get_ext_fullpath("schedulefree_cpp._C")).resolve().parent
        configure = [
            "cmake",
            "-S", str(ROOT),
            "-B", str(build),
            "-G", "Ninja",
            # The cache of an earlier build may name the tools and the torch of another environment.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            "-USCHEDULEFREE_TORCH_*",
            "-DSCHEDULEFREE_PYTHON=ON",
            f"-DSCHEDULEFREE_EDITABLE={'ON' if self.inplace and lasts(torch_root()) else 'OFF'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DSCHEDULEFREE_TORCH_ROOT={torch_root()}",
            f"-Dpybind11_DIR={pybind11_dir()}",
            # A compiler that is newer than ours may warn of more.
            "-DSCHEDULEFREE_WERROR=OFF",
            *os.environ.get("SCHEDULEFREE_CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        jobs = os.environ.get("MAX_JOBS", "")
        commands = [
            configure,
            ["cmake", "--build", str(build), *(["--parallel", jobs] if jobs else [])],
            ["cmake", "--install", str(build), "--prefix", str(package), "--strip"],
        ]
        for command in commands:
            print("+", *command, flush=True)
            if subprocess.run(command).returncode:
                fail(
                    f"`{' '.join(command[:2])}` failed; its messages are above.",
                    "Likely causes: no C++17 compiler (apt-get install g++), too little memory for so many "
                    "compilations at once (MAX_JOBS=1), or a torch that was built for another architecture.",
                )

    def get_outputs(self) -> list[str]:
        package = Path(self.get_ext_fullpath("schedulefree_cpp._C")).parent
        return [str(path) for path in package.glob("*.so")]


check_versions()
setup(ext_modules=[Extension("schedulefree_cpp._C", [])], cmdclass={"build_ext": CMakeBuild})
