"""Schedule-Free learning as native torch operators: a drop-in for ``schedulefree``."""

import sys as _sys
from importlib.metadata import version as _version
from pathlib import Path as _Path

try:
    from schedulefree_cpp import _library as _library  # loads the operators, or says why not
    from schedulefree_cpp import ops
except Exception as _error:
    # `python -m schedulefree_cpp` imports this first, and is there to report the error. The module's name
    # stands before the arguments that argv[1:] holds; argv[0] is "-m" only while packages are imported.
    if _sys.argv[:1] != ["-m"] or _sys.orig_argv[-len(_sys.argv)].removeprefix("-m") != __name__:
        raise
    from schedulefree_cpp.__main__ import main as _main

    _sys.exit(_main(_error))

from schedulefree_cpp.adamw import AdamWScheduleFree, AdamWScheduleFreePaper
from schedulefree_cpp.closure import (
    AdamWScheduleFreeClosure,
    RAdamScheduleFreeClosure,
    SGDScheduleFreeClosure,
)
from schedulefree_cpp.plus import AdamCScheduleFreePlus, AdamCScheduleFreePlusPaper
from schedulefree_cpp.radam import RAdamScheduleFree
from schedulefree_cpp.reference import AdamWScheduleFreeReference, SGDScheduleFreeReference
from schedulefree_cpp.sgd import SGDScheduleFree
from schedulefree_cpp.wrapper import ScheduleFreeWrapper, ScheduleFreeWrapperReference

__version__ = _version("schedulefree-cpp")

cmake_prefix_path = str(_Path(__file__).resolve().parent)
"""Where CMake's ``find_package(schedulefree_cpp CONFIG)`` looks, if it is in ``CMAKE_PREFIX_PATH``."""

__all__ = [
    "AdamCScheduleFreePlus",
    "AdamCScheduleFreePlusPaper",
    "AdamWScheduleFree",
    "AdamWScheduleFreeClosure",
    "AdamWScheduleFreePaper",
    "AdamWScheduleFreeReference",
    "RAdamScheduleFree",
    "RAdamScheduleFreeClosure",
    "SGDScheduleFree",
    "SGDScheduleFreeClosure",
    "SGDScheduleFreeReference",
    "ScheduleFreeWrapper",
    "ScheduleFreeWrapperReference",
    "__version__",
    "cmake_prefix_path",
    "ops",
]
