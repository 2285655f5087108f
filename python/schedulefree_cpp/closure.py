"""The closure forms: parameters are the average ``x`` between steps, and no mode has to be switched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp._base import ScheduleFreeOptimizer
from schedulefree_cpp._modes import Group
from schedulefree_cpp.adamw import AdamWScheduleFree
from schedulefree_cpp.radam import RAdamScheduleFree
from schedulefree_cpp.sgd import SGDScheduleFree


class ClosureOptimizer(ScheduleFreeOptimizer):
    """Base of the closure forms; not used directly.

    ``step(closure)`` takes the parameters to ``y``, calls the closure, steps, and brings them to ``x``, also
    if the closure raises. ``train()`` and ``eval()`` have nothing to do.
    """

    schedule_start: ClassVar[dict[str, Any]] = {
        "k": 0,
        "weight_sum": 0.0,
        "lr_max": 0.0,
        "scheduled_lr": 0.0,
    }

    supports_capturable: ClassVar[bool] = False

    # Groups hold no mode, as in upstream: outside of step() it is always the same. These are the groups, by
    # their id, that are at y within it.
    _at_y: frozenset[int] = frozenset()

    def _mode(self, group: Group) -> bool:
        return id(group) in self._at_y

    def _set_mode(self, group: Group, train: bool) -> None:
        self._at_y = self._at_y | {id(group)} if train else self._at_y - {id(group)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores from pickle, deepcopy or a state dict, those of classes with modes included."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.pop("train_mode", None)

    def train(self, mode: bool = True) -> None:
        """Does nothing: parameters are ``x`` between steps, in training too."""

    def eval(self) -> None:
        """Does nothing: parameters are ``x`` between steps."""

    def _go(self, to_y: bool) -> None:
        for index, group in enumerate(self.param_groups):
            if self._mode(group) != to_y:
                self._switch(group, index, to_y)

    def _step(self, closure: Callable[[], float] | None) -> Any:
        if closure is None and self._creates_state_only():
            return None
        if closure is None:
            name = type(self).__name__
            raise RuntimeError(
                f"{name}.step() was called without a closure: gradients must be taken at y, and parameters "
                f"are y only while step() calls it. Pass one, or use {name.removesuffix('Closure')}."
            )
        self._check_expected()
        try:
            self._go(True)
            loss = self._loss_of(closure)
            self._update(loss)
        finally:
            if self._stepped:
                # Interrupted after some parameters had taken their step: the others go without.
                schedules = [self._schedule_of(index) for index in range(len(self.param_groups))]
                self._close(schedules, interrupted=True)
            self._go(False)
        return loss


class SGDScheduleFreeClosure(ClosureOptimizer, SGDScheduleFree):
    """:class:`SGDScheduleFree` with ``step(closure)`` and no need of ``train()`` and ``eval()``.

    Its arguments too, but for the order of ``weight_decay`` and ``momentum``, which is upstream's.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0,
        momentum: float = 0.9,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = True,
        **extras: Any,
    ) -> None:
        """Checks the hyperparameters and builds the groups."""
        super().__init__(
            params, lr, momentum, weight_decay, warmup_steps, r, weight_lr_power, foreach, **extras
        )


class AdamWScheduleFreeClosure(ClosureOptimizer, AdamWScheduleFree):
    """:class:`AdamWScheduleFree` with ``step(closure)`` and no need of ``train()`` and ``eval()``."""


class RAdamScheduleFreeClosure(ClosureOptimizer, RAdamScheduleFree):
    """:class:`RAdamScheduleFree` with ``step(closure)`` and no need of ``train()`` and ``eval()``."""
