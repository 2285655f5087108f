"""``python -m schedulefree_cpp``: what a bug report needs, and where CMake finds the package."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path

import torch

import schedulefree_cpp
from schedulefree_cpp._core.library import _C, CUDA_MISSING, LIBRARY

_PACKAGE = Path(schedulefree_cpp.cmake_prefix_path)
_CMAKE_CONFIG = _PACKAGE / "share" / "cmake" / "schedulefree_cpp" / "schedulefree_cppConfig.cmake"
_PROCESSOR_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")
_VARIABLES = ("OMP_NUM_THREADS", "LD_LIBRARY_PATH", "LD_PRELOAD")


def _processor() -> tuple[str, str]:
    """Name of the first processor, and those of its flags that kernels use."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        first = ""
    pairs = (line.partition(":") for line in first.splitlines())
    fields = {name.strip(): value.strip() for name, _, value in pairs}
    flags = [flag for flag in _PROCESSOR_FLAGS if flag in fields.get("flags", "").split()]
    name = fields.get("model name") or platform.processor() or "unknown"
    return name, " ".join(flags) or "none that kernels use"


def _instruction_set() -> str:
    try:
        return _C.cpu_isa()
    except RuntimeError as error:  # for SCHEDULEFREE_CPU_ISA
        return f"refused: {error}"


def _torch_built_for() -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU only"


def report() -> dict[str, str]:
    """The facts by name, in the order in which they are printed."""
    name, flags = _processor()
    chosen = [key for key in sorted(os.environ) if key.startswith("SCHEDULEFREE_") or key in _VARIABLES]
    facts = {
        "schedulefree_cpp": schedulefree_cpp.__version__,
        "directory": _PACKAGE,
        "library": LIBRARY,
        "library version": _C.version(),
        "library compiler": _C.compiler(),
        "library needs torch": f">={_C.min_torch()}",
        "_C": _C.__file__,
        "instruction set": _instruction_set(),
        "CUDA kernels": _C.cuda_build(),
        "CUDA library": "loaded" if CUDA_MISSING is None else f"not loaded: {CUDA_MISSING}",
        "CMake configuration": _CMAKE_CONFIG if _CMAKE_CONFIG.exists() else f"missing: {_CMAKE_CONFIG}",
        "torch": torch.__file__,
        "torch version": torch.__version__,
        "torch built for": _torch_built_for(),
        "torch devices visible": torch.cuda.device_count() if torch.cuda.is_available() else "none",
        "torch threads": torch.get_num_threads(),
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "Python executable": sys.executable,
        "platform": platform.platform(),
        "processor": name,
        "processor flags": flags,
        # Named also where it is not set: it decides the instruction set.
        "SCHEDULEFREE_CPU_ISA": "not set",
        **{key: os.environ[key] for key in chosen},
    }
    return {key: " ".join(str(value).split()) for key, value in facts.items()}


def main() -> int:
    """The command. Returns the exit status: 1 where the CPU kernels cannot run."""
    parser = argparse.ArgumentParser(
        prog="python -m schedulefree_cpp",
        description="Print what a bug report needs: versions, paths, and what has loaded.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--cmake-prefix-path",
        action="store_true",
        help="print only the directory that find_package(schedulefree_cpp) needs in CMAKE_PREFIX_PATH",
    )
    if parser.parse_args().cmake_prefix_path:
        print(_PACKAGE)
        if not _CMAKE_CONFIG.exists():
            print(f"warning: find_package will fail, {_CMAKE_CONFIG} is missing", file=sys.stderr)
        return 0
    facts = report()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return int(facts["instruction set"].startswith("refused"))


if __name__ == "__main__":
    sys.exit(main())
