"""``python -m schedulefree_cpp``: facts for a bug report, CUDA kernels ahead of their use, CMake's path."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import time
from pathlib import Path

import torch

import schedulefree_cpp
from schedulefree_cpp._core.library import _C, CUDA_MISSING, LIBRARY

_PACKAGE = Path(schedulefree_cpp.cmake_prefix_path)
_CMAKE_CONFIG = _PACKAGE / "share" / "cmake" / "schedulefree_cpp" / "schedulefree_cppConfig.cmake"
_PROCESSOR_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")
_VARIABLES = ("OMP_NUM_THREADS", "LD_LIBRARY_PATH", "LD_PRELOAD", "XDG_CACHE_HOME")


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


def _cuda() -> dict[str, str]:
    """What the library says of CUDA; a name that it repeats has all its values."""
    facts = {"kernels compiled": "", "kernels proved": ""}
    for line in _C.cuda_report().splitlines():
        name, _, value = line.partition("\t")
        # The reason for which something is missing may have several lines, of which the first has the name.
        if value:
            facts[name] = f"{facts[name]}; {value}" if facts.get(name) else value
    order = ["CUDA driver", "CUDA GPUs", "NVRTC", "kernel cache", *facts]
    return {name: facts[name] or "none" for name in order if name in facts}


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
        "CUDA operators": "registered" if CUDA_MISSING is None else f"not registered: {CUDA_MISSING}",
        **_cuda(),
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


def _architecture(text: str) -> str:
    """An architecture as NVRTC takes it, checked."""
    if not re.fullmatch(r"sm_\d+[af]?", text):
        raise argparse.ArgumentTypeError(f"expected an architecture such as sm_90, got {text!r}")
    return text


def _kept() -> dict[str, int]:
    """How many compiled kernels are on disk, by architecture."""
    kept: dict[str, int] = {}
    for count, architecture in re.findall(r"(\d+) for (sm_\w+)", _cuda()["kernels compiled"]):
        kept[architecture] = kept.get(architecture, 0) + int(count)
    return kept


def _compile(architectures: list[str]) -> int:
    """Compiles the common kernels into the cache, for the GPUs that are here or for what is named."""
    done: dict[str, list[bool]] = {}  # by architecture: whether each kernel was compiled now
    begin, before = time.monotonic(), _kept()

    def progress(line: str) -> None:
        architecture, rest = line.split(" ", 1)
        done.setdefault(architecture, []).append(rest.startswith("compiled"))
        print(f"{time.monotonic() - begin:6.1f} s {len(done[architecture]):4}  {line}", flush=True)

    for architecture in architectures or [""]:
        try:
            _C.compile_kernels(architecture, progress)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    after, folder = _kept(), _cuda()["kernel cache"]
    for architecture, compiled in done.items():
        if after.get(architecture, 0) < before.get(architecture, 0) + sum(compiled):
            problem = "can files be written there, and is there space?"
            print(f"error: kernels could not be kept in {folder}: {problem}", file=sys.stderr)
            return 1
        print(f"{architecture}: {len(compiled)} kernels in {folder}, {sum(compiled)} of them new")
    return 0


def main() -> int:
    """The command. Returns 1 where the CPU kernels cannot run, or kernels were not compiled and kept."""
    parser = argparse.ArgumentParser(
        prog="python -m schedulefree_cpp",
        description="Print what a bug report needs: versions, paths, and what has loaded.",
        allow_abbrev=False,
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--cmake-prefix-path",
        action="store_true",
        help="print only the directory that find_package(schedulefree_cpp) needs in CMAKE_PREFIX_PATH",
    )
    choice.add_argument(
        "--compile",
        nargs="*",
        type=_architecture,
        metavar="sm_NN",
        help="compile the CUDA kernels that training commonly needs into the kernel cache: for the GPUs of "
        "this machine or, without a GPU, for architectures such as sm_80 and sm_90",
    )
    arguments = parser.parse_args()
    if arguments.compile is not None:
        return _compile(arguments.compile)
    if arguments.cmake_prefix_path:
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
