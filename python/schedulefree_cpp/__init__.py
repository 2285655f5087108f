"""Schedule-Free learning as native torch operators: a drop-in for ``schedulefree``."""

import sys as _sys
from importlib.metadata import version as _version
from pathlib import Path as _Path

from schedulefree_cpp import ops
from schedulefree_cpp._checkpoint import load_checkpoint, save_checkpoint
from schedulefree_cpp._core import modes as _modes
from schedulefree_cpp._core import samples as _samples
from schedulefree_cpp._create import create
from schedulefree_cpp._schedulefree import install_as_schedulefree
from schedulefree_cpp.adamw import AdamWScheduleFree, AdamWScheduleFreePaper
from schedulefree_cpp.closure import (
    AdamWScheduleFreeClosure,
    RAdamScheduleFreeClosure,
    SGDScheduleFreeClosure,
)
from schedulefree_cpp.muon import MuonScheduleFree
from schedulefree_cpp.plus import AdamCScheduleFreePlus, AdamCScheduleFreePlusPaper
from schedulefree_cpp.radam import RAdamScheduleFree
from schedulefree_cpp.reference import AdamWScheduleFreeReference, SGDScheduleFreeReference
from schedulefree_cpp.sgd import SGDScheduleFree
from schedulefree_cpp.wrapper import ScheduleFreeWrapper, ScheduleFreeWrapperClosure
from schedulefree_cpp.wrapper_reference import ScheduleFreeWrapperReference

# Pickles of earlier builds name these modules.
_sys.modules[f"{__name__}._modes"] = _modes
_sys.modules[f"{__name__}._state_dict"] = _samples

__version__: str = _version("schedulefree-cpp")
"""The version of this package."""

cmake_prefix_path: str = str(_Path(__file__).resolve().parent)
"""Where CMake's ``find_package(schedulefree_cpp CONFIG)`` looks, if it is in ``CMAKE_PREFIX_PATH``."""

__all__ = [
    "AdamCScheduleFreePlus",
    "AdamCScheduleFreePlusPaper",
    "AdamWScheduleFree",
    "AdamWScheduleFreeClosure",
    "AdamWScheduleFreePaper",
    "AdamWScheduleFreeReference",
    "MuonScheduleFree",
    "RAdamScheduleFree",
    "RAdamScheduleFreeClosure",
    "SGDScheduleFree",
    "SGDScheduleFreeClosure",
    "SGDScheduleFreeReference",
    "ScheduleFreeWrapper",
    "ScheduleFreeWrapperClosure",
    "ScheduleFreeWrapperReference",
    "__version__",
    "cmake_prefix_path",
    "create",
    "install_as_schedulefree",
    "load_checkpoint",
    "ops",
    "save_checkpoint",
]
