"""This package under the name ``schedulefree``, for programs and frameworks that look for that one."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import schedulefree_cpp

VERSION = "1.4.1+cpp"
"""The release of ``schedulefree`` whose names these are; frameworks compare it."""

_CLASSES = {
    "adamw_schedulefree": "AdamWScheduleFree",
    "adamw_schedulefree_closure": "AdamWScheduleFreeClosure",
    "adamw_schedulefree_paper": "AdamWScheduleFreePaper",
    "adamw_schedulefree_reference": "AdamWScheduleFreeReference",
    "radam_schedulefree": "RAdamScheduleFree",
    "radam_schedulefree_closure": "RAdamScheduleFreeClosure",
    "sgd_schedulefree": "SGDScheduleFree",
    "sgd_schedulefree_closure": "SGDScheduleFreeClosure",
    "sgd_schedulefree_reference": "SGDScheduleFreeReference",
    "wrap_schedulefree": "ScheduleFreeWrapper",
    "wrap_schedulefree_reference": "ScheduleFreeWrapperReference",
}


def _add_module(name: str, contents: dict[str, object]) -> ModuleType:
    module = ModuleType(name, schedulefree_cpp.__doc__)
    module.__spec__ = ModuleSpec(name, None, origin=schedulefree_cpp.__file__)
    module.__file__ = schedulefree_cpp.__file__
    vars(module).update(contents)
    sys.modules[name] = module
    return module


def add_submodules(package: str) -> None:
    """Adds ``schedulefree``'s submodules to an imported package, each with its class."""
    for name, cls in _CLASSES.items():
        module = _add_module(f"{package}.{name}", {cls: getattr(schedulefree_cpp, cls)})
        setattr(sys.modules[package], name, module)


def install_as_schedulefree() -> None:
    """Has ``import schedulefree`` give this package, in this process.

    Frameworks that look for ``schedulefree``, such as Transformers with ``optim="schedule_free_adamw"``, then
    find it. Call it before they are imported. To have that in every process of an environment, install the
    distribution in ``packaging/schedulefree-shim``.

    Raises:
        RuntimeError: if another ``schedulefree`` has been imported, or Transformers has looked for one in
            vain; nothing has been changed.
    """
    present = sys.modules.get("schedulefree")
    if present is not None:
        if getattr(present, "__version__", None) == VERSION:
            return
        raise RuntimeError(
            f"install_as_schedulefree() was called after schedulefree had been imported from "
            f"{getattr(present, '__file__', None)}: call it first"
        )
    classes = {cls: getattr(schedulefree_cpp, cls) for cls in _CLASSES.values()}
    package = _add_module("schedulefree", {**classes, "__version__": VERSION, "__path__": []})
    add_submodules(package.__name__)
    if "transformers" in sys.modules:
        from transformers.utils.import_utils import is_schedulefree_available

        if not is_schedulefree_available():
            for name in ("schedulefree", *(f"schedulefree.{name}" for name in _CLASSES)):
                del sys.modules[name]
            raise RuntimeError(
                "install_as_schedulefree() was called after Transformers had looked for schedulefree, which "
                "it does once: call it before transformers is imported"
            )
