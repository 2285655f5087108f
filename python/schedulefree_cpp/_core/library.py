"""Loads the compiled parts, or says why they cannot be loaded."""

from __future__ import annotations

import logging
import platform
from pathlib import Path

import torch

MIN_TORCH = (2, 10)
OPERATORS = (
    "sgd_step_",
    "adamw_step_",
    "schedule_step_",
    "y_to_x_",
    "x_to_y_",
    "before_base_step_",
    "after_base_step_",
    "polyak_sums",
    "grad_norm",
)

_PACKAGE = Path(__file__).resolve().parent.parent
LIBRARY = _PACKAGE / "libschedulefree_cpp.so"
_CHECKOUT = _PACKAGE.parent.parent
# Python was started in python/, or the package is an editable install.
_FROM_SOURCES = (_CHECKOUT / "CMakeLists.txt").exists()
_REBUILD = "Build it for this environment: pip install --no-build-isolation " + (
    str(_CHECKOUT) if _FROM_SOURCES else ". in a checkout of its sources"
)


def explain(path: Path, error: BaseException | None, torch_version: str) -> str:
    """Names the likely cause of a library that does not load, and what to do about it.

    Args:
        path: the library.
        error: what loading it raised; None when it was not tried.
        torch_version: version of the running torch, such as ``"2.13.0+cpu"``.

    Returns:
        A message of two or three sentences, with the versions of torch and Python.
    """
    major, minor = (int(part) for part in torch_version.split(".")[:2])
    oldest = ".".join(map(str, MIN_TORCH))
    if (major, minor) < MIN_TORCH:
        cause = f"torch {torch_version} is too old: torch>={oldest} is needed. pip install --upgrade torch"
    elif not path.exists():
        cause = "the file is missing: the package was not built, or was built for another Python. " + _REBUILD
    elif any(
        text in str(error)
        for text in ("wrong ELF class", "invalid ELF", "file too short", "mach-o", "Exec format")
    ):
        cause = f"it was built for another architecture than {platform.machine()}. {_REBUILD}"
    elif "undefined symbol" in str(error) or "symbol not found" in str(error):
        cause = f"torch or libschedulefree_cpp.so lacks a symbol that it was built against. {_REBUILD}"
    elif "GLIBC" in str(error):
        cause = f"this system's C or C++ runtime is older than the one it was built with. {_REBUILD}"
    else:
        cause = f"the loader refused it. {_REBUILD}"
    here = f"torch {torch_version}, Python {platform.python_version()}"
    detail = f"{error}; {here}" if error is not None else here
    return f"schedulefree_cpp cannot load {path}: {cause} ({detail})"


def load_operators(path: Path) -> None:
    """Registers the operators of a library with torch.

    Args:
        path: the shared library.

    Raises:
        ImportError: if it cannot be loaded; the message names the likely cause.
    """
    version = torch.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH or not path.exists():
        raise ImportError(explain(path, None, version))
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        # torch says only that it could not; the loader's own words are in the cause.
        raise ImportError(explain(path, error.__cause__ or error, version)) from error
    missing = [name for name in OPERATORS if not hasattr(torch.ops.schedulefree_cpp, name)]
    if missing:
        raise ImportError(
            f"schedulefree_cpp: {path} lacks the operators {', '.join(missing)}: it was built from other "
            f"sources. {_REBUILD}"
        )


load_operators(LIBRARY)

try:
    from schedulefree_cpp import _C
except ImportError as error:
    raise ImportError(
        explain(next(_PACKAGE.glob("_C.*.so"), _PACKAGE / "_C.so"), error, torch.__version__)
    ) from error

# At INFO, so that nobody sees the line who has not asked for it.
_C.set_log(logging.getLogger("schedulefree_cpp").info)

CUDA_MISSING: str | None = (
    "this torch was built without CUDA" if torch.version.cuda is None else _C.load_cuda()
)
"""Why there are no CUDA operators; None where they are. Their kernels are compiled at first use."""

# The operators return nothing, so there is nothing to differentiate: skipping the autograd keys halves
# the host cost of a call.
FRAGMENT = torch.library.Library("schedulefree_cpp", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name in OPERATORS:
    FRAGMENT.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]

__all__ = ["CUDA_MISSING", "FRAGMENT", "_C"]
