"""Names for what timm imports from torchvision, where there is none that fits torch."""

from __future__ import annotations

import sys
from importlib import abc, machinery
from types import ModuleType


class _Name(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


class _Module(ModuleType):
    __getattr__ = _Name.__getattr__


class _Finder(abc.MetaPathFinder, abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


def provide() -> None:
    """Has ``import torchvision`` succeed in this process, if only with names."""
    try:
        import torchvision  # noqa: F401
    except Exception:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.meta_path.insert(0, _Finder())
