"""``python -m schedulefree_cpp``: what a bug report needs, and where CMake finds the package.

Nothing is imported here that may fail to load: this is what reports it.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

_Fact = tuple[str, str]

_PACKAGE = Path(__file__).resolve().parent
_CMAKE_CONFIG = _PACKAGE / "share" / "cmake" / "schedulefree_cpp" / "schedulefree_cppConfig.cmake"
_LIBRARY = _PACKAGE / "libschedulefree_cpp.so"
_CUDA_LIBRARY = _PACKAGE / "libschedulefree_cpp_cuda.so"
_PROCESSOR_FLAGS = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")
_VARIABLES = ("OMP_NUM_THREADS", "LD_LIBRARY_PATH", "LD_PRELOAD")


def _one_line(text: object) -> str:
    return " ".join(str(text).split())


def _cpuinfo() -> dict[str, str]:
    """The first processor's fields in /proc/cpuinfo; none where there is no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    fields = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in fields}


def _package_facts() -> list[_Fact]:
    try:
        installed = version("schedulefree-cpp")
    except PackageNotFoundError:
        installed = "not installed"
    config = "" if _CMAKE_CONFIG.exists() else f" (without {_CMAKE_CONFIG.relative_to(_PACKAGE)})"
    return [
        ("schedulefree_cpp", installed),
        ("directory", str(_PACKAGE)),
        ("CMake prefix path", f"{_PACKAGE}{config}"),
    ]


def _system_facts() -> list[_Fact]:
    processor = _cpuinfo()
    offered = processor.get("flags", "").split()
    flags = [flag for flag in _PROCESSOR_FLAGS if flag in offered]
    return [
        ("Python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("Python executable", sys.executable),
        ("platform", platform.platform()),
        ("processor", processor.get("model name") or platform.processor() or "unknown"),
        ("processor flags", " ".join(flags) or "none that kernels use"),
    ]


def _torch_facts(torch: ModuleType) -> list[_Fact]:
    built_for = "CPU only"
    if torch.version.cuda:
        built_for = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        built_for = f"ROCm {torch.version.hip}"
    devices = torch.cuda.device_count() if torch.cuda.is_available() else "none"
    return [
        ("torch version", torch.__version__),
        ("torch built for", built_for),
        ("torch devices visible", str(devices)),
        ("torch threads", str(torch.get_num_threads())),
    ]


def _loading_facts(
    torch: ModuleType | None, module: ModuleType | None, error: Exception | None
) -> list[_Fact]:
    """How far loading came. It stops at the first failure, so what comes after was not tried."""
    library_loaded = torch is not None and os.path.realpath(_LIBRARY) in torch.ops.loaded_libraries
    stages = [
        ("torch", torch is not None, f"loaded: {getattr(torch, '__file__', None)}"),
        (_LIBRARY.name, library_loaded, f"loaded: {_LIBRARY}"),
        ("_C", module is not None, f"loaded: {getattr(module, '__file__', None)}"),
        ("operators", error is None, "registered"),
    ]
    facts = []
    failed = ""
    for name, done, success in stages:
        if done:
            facts.append((name, success))
        elif not failed:
            failed = name
            facts.append((name, f"not loaded: {_one_line(error)}"))
        else:
            facts.append((name, f"not tried, since {failed} comes first"))
    return facts


def _cuda_facts(module: ModuleType | None) -> list[_Fact]:
    if module is None:
        found = "not tried" if _CUDA_LIBRARY.exists() else "missing"
        return [(_CUDA_LIBRARY.name, f"{found}: {_CUDA_LIBRARY}")]
    library = sys.modules.get("schedulefree_cpp._library")
    missing = getattr(library, "CUDA_MISSING", "the operators come first")
    return [
        (
            _CUDA_LIBRARY.name,
            f"loaded: {_CUDA_LIBRARY}" if missing is None else f"not loaded: {_one_line(missing)}",
        ),
        ("CUDA kernels", module.cuda_build()),
    ]


def _build_facts(module: ModuleType) -> list[_Fact]:
    return [
        ("library version", module.version()),
        ("library compiler", module.compiler()),
        ("library needs torch", f">={module.min_torch()}"),
    ]


def _environment_facts() -> list[_Fact]:
    names = [name for name in sorted(os.environ) if name.startswith("SCHEDULEFREE_") or name in _VARIABLES]
    # Named also where it is not set: it decides the instruction set.
    facts = {"SCHEDULEFREE_CPU_ISA": "not set", **{name: os.environ[name] for name in names}}
    return [(name, _one_line(value)) for name, value in facts.items()]


def _report(error: Exception | None) -> int:
    """Prints the facts, one a line.

    Args:
        error: what importing the package raised; None when it succeeded.

    Returns:
        0 if all has loaded and the CPU kernels can run, else 1.
    """
    # Importing again what has failed could fail in another way: look at what is there.
    torch = sys.modules.get("torch")
    if not hasattr(torch, "__version__"):
        torch = None  # an empty folder of that name, such as a removed torch leaves behind, imports too
    module = sys.modules.get("schedulefree_cpp._C")
    status = 0 if error is None else 1

    facts = _package_facts() + _system_facts() + _loading_facts(torch, module, error) + _cuda_facts(module)
    if module is not None:
        facts += _build_facts(module)
        try:
            facts.append(("instruction set", module.cpu_isa()))
        except RuntimeError as refusal:
            facts.append(("instruction set", f"refused: {_one_line(refusal)}"))
            status = 1
    if torch is not None:
        facts += _torch_facts(torch)
    facts += _environment_facts()

    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:<{width}}  {value}")
    return status


def main(error: Exception | None = None) -> int:
    """The command.

    Args:
        error: what importing the package raised; None when it succeeded.

    Returns:
        The exit status.
    """
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
    if not parser.parse_args().cmake_prefix_path:
        return _report(error)
    print(_PACKAGE)
    if not _CMAKE_CONFIG.exists():
        print(f"warning: find_package will fail, {_CMAKE_CONFIG} is missing", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
