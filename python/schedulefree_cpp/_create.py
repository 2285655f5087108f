"""Optimizers by name, as configurations name them."""

from __future__ import annotations

import re
from typing import Any, Literal, overload

from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp._core.optimizer import ScheduleFreeOptimizer
from schedulefree_cpp.adamw import AdamWScheduleFree, AdamWScheduleFreePaper
from schedulefree_cpp.closure import (
    AdamWScheduleFreeClosure,
    RAdamScheduleFreeClosure,
    SGDScheduleFreeClosure,
)
from schedulefree_cpp.muon import MuonScheduleFree
from schedulefree_cpp.plus import AdamCScheduleFreePlus, AdamCScheduleFreePlusPaper
from schedulefree_cpp.radam import RAdamScheduleFree
from schedulefree_cpp.sgd import SGDScheduleFree

CLASSES: tuple[type[ScheduleFreeOptimizer], ...] = (
    SGDScheduleFree,
    AdamWScheduleFree,
    AdamWScheduleFreePaper,
    RAdamScheduleFree,
    SGDScheduleFreeClosure,
    AdamWScheduleFreeClosure,
    RAdamScheduleFreeClosure,
    AdamCScheduleFreePlus,
    AdamCScheduleFreePlusPaper,
    MuonScheduleFree,
)
"""The classes that are constructed from parameters, without the references."""


def _short(name: str) -> str:
    """``"adamw"`` of ``"AdamWScheduleFree"``, ``"schedule_free_adamw"`` and ``"adamw_schedulefree"``."""
    return re.sub(r"[^a-z0-9]", "", name.lower()).replace("schedulefree", "")


_BY_NAME = {_short(cls.__name__): cls for cls in CLASSES}


@overload
def create(name: Literal["SGDScheduleFree", "sgd"], params: ParamsT, **kwargs: Any) -> SGDScheduleFree: ...
@overload
def create(
    name: Literal["AdamWScheduleFree", "adamw"], params: ParamsT, **kwargs: Any
) -> AdamWScheduleFree: ...
@overload
def create(
    name: Literal["AdamWScheduleFreePaper", "adamwpaper"], params: ParamsT, **kwargs: Any
) -> AdamWScheduleFreePaper: ...
@overload
def create(
    name: Literal["RAdamScheduleFree", "radam"], params: ParamsT, **kwargs: Any
) -> RAdamScheduleFree: ...
@overload
def create(
    name: Literal["SGDScheduleFreeClosure", "sgdclosure"], params: ParamsT, **kwargs: Any
) -> SGDScheduleFreeClosure: ...
@overload
def create(
    name: Literal["AdamWScheduleFreeClosure", "adamwclosure"], params: ParamsT, **kwargs: Any
) -> AdamWScheduleFreeClosure: ...
@overload
def create(
    name: Literal["RAdamScheduleFreeClosure", "radamclosure"], params: ParamsT, **kwargs: Any
) -> RAdamScheduleFreeClosure: ...
@overload
def create(
    name: Literal["AdamCScheduleFreePlus", "adamcplus"], params: ParamsT, **kwargs: Any
) -> AdamCScheduleFreePlus: ...
@overload
def create(
    name: Literal["AdamCScheduleFreePlusPaper", "adamcpluspaper"], params: ParamsT, **kwargs: Any
) -> AdamCScheduleFreePlusPaper: ...
@overload
def create(name: Literal["MuonScheduleFree", "muon"], params: ParamsT, **kwargs: Any) -> MuonScheduleFree: ...
@overload
def create(name: str, params: ParamsT, **kwargs: Any) -> ScheduleFreeOptimizer: ...


def create(name: str, params: ParamsT, **kwargs: Any) -> ScheduleFreeOptimizer:
    """Constructs an optimizer by its name, such as one that a configuration file gives.

    Example::

        optimizer = create("adamw", model.parameters(), lr="1e-3", betas=["0.9", "0.95"])

    Args:
        name: a class of this package that is constructed from parameters, with or without ``ScheduleFree``,
            in any case: ``"AdamWScheduleFree"``, ``"adamw"``, ``"schedule_free_adamw"``.
        params: parameters, or dicts that define parameter groups.
        kwargs: arguments of the class. A text that is a number, such as YAML's ``1e-3``, is read as one.

    Returns:
        The optimizer, in eval mode as any new one. Type checkers know its class where ``name`` is written as
        ``"AdamWScheduleFree"`` or ``"adamw"``.

    Raises:
        ValueError: for another name, or a hyperparameter outside its domain.
        TypeError: for an argument that the class does not have.
    """
    cls = _BY_NAME.get(_short(name))
    if cls is None:
        names = ", ".join(repr(known.__name__) for known in CLASSES)
        raise ValueError(f"Invalid name: {name!r}, expected one of {names}")
    groups: Any = (
        params
        if isinstance(params, Tensor)
        else [
            {key: value if key == "params" else _read(value) for key, value in entry.items()}
            if isinstance(entry, dict)
            else entry
            for entry in params
        ]
    )
    create_class: Any = cls
    optimizer: ScheduleFreeOptimizer = create_class(
        groups, **{key: _read(value) for key, value in kwargs.items()}
    )
    return optimizer


def _read(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return [_read(item) for item in value] if isinstance(value, (list, tuple)) else value
