"""The closure forms: parameters are the average ``x`` between steps, and no mode has to be switched."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp._core.modes import ClosureForm
from schedulefree_cpp._core.optimizer import ScheduleFreeOptimizer
from schedulefree_cpp.adamw import AdamWScheduleFree
from schedulefree_cpp.radam import RAdamScheduleFree
from schedulefree_cpp.sgd import SGDScheduleFree


class ClosureOptimizer(ClosureForm, ScheduleFreeOptimizer):
    """Base of the fused closure forms; not used directly."""

    # Without train_mode, as upstream: outside of step() the parameters are always x.
    _schedule_start: ClassVar[dict[str, Any]] = {
        "k": 0,
        "weight_sum": 0.0,
        "lr_max": 0.0,
        "scheduled_lr": 0.0,
    }
    _supports_capturable: ClassVar[bool] = False


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
        warmup_steps: float = 0,
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
