"""Hands the build of the native parts to CMake; everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def fail(problem: str, remedy: str) -> None:
    sys.exit(f"\nschedulefree_cpp cannot be built: {problem}\n  {remedy}\n")


def torch_root() -> Path:
    try:
        import torch
    except ImportError as error:
        fail(
            f"torch cannot be imported by {sys.executable} ({error}).",
            "Install torch>=2.10 first, then: pip install --no-build-isolation .",
        )
    return Path(torch.__file__).parent


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
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DSCHEDULEFREE_TORCH_ROOT={torch_root()}",
            f"-Dpybind11_DIR={pybind11_dir()}",
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
                    "Likely causes: no C++17 compiler (apt-get install g++), a torch older than 2.10 or "
                    "built for another architecture, or a warning of a newer compiler "
                    "(SCHEDULEFREE_CMAKE_ARGS=-DSCHEDULEFREE_WERROR=OFF).",
                )

    def get_outputs(self) -> list[str]:
        package = Path(self.get_ext_fullpath("schedulefree_cpp._C")).parent
        return [str(path) for path in package.glob("*.so")]


setup(ext_modules=[Extension("schedulefree_cpp._C", [])], cmdclass={"build_ext": CMakeBuild})
