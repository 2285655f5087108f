"""The closure forms: parameters are the average ``x`` between steps, and no mode has to be switched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, overload

from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp._base import ScheduleFreeOptimizer
from schedulefree_cpp._groups import ScheduleMemory
from schedulefree_cpp._modes import Group, Loss
from schedulefree_cpp._traced import eager
from schedulefree_cpp.adamw import AdamWScheduleFree
from schedulefree_cpp.radam import RAdamScheduleFree
from schedulefree_cpp.sgd import SGDScheduleFree


@dataclass
class ClosureMemory(ScheduleMemory):
    """See :class:`schedulefree_cpp._modes.Memory`."""

    at_y: set[int] = field(default_factory=set)  # the groups, by their id, that are at y within step()


class ClosureOptimizer(ScheduleFreeOptimizer):
    """Base of the closure forms; not used directly.

    ``step(closure)`` takes the parameters to ``y``, calls the closure, steps, and brings them to ``x``, also
    if the closure raises. ``train()`` and ``eval()`` have nothing to do.
    """

    _memory: ClosureMemory
    _memory_type = ClosureMemory
    # Without train_mode, as upstream: outside of step() the parameters are always x.
    _schedule_start: ClassVar[dict[str, Any]] = {
        "k": 0,
        "weight_sum": 0.0,
        "lr_max": 0.0,
        "scheduled_lr": 0.0,
    }
    _supports_capturable: ClassVar[bool] = False

    def _trains(self, group: Group) -> bool:
        return id(group) in self._memory.at_y

    def _set_mode(self, group: Group, train: bool) -> None:
        at_y = self._memory.at_y
        at_y.add(id(group)) if train else at_y.discard(id(group))

    def train(self, mode: bool = True) -> None:
        """Does nothing: parameters are ``x`` between steps, in training too."""

    def eval(self) -> None:
        """Does nothing: parameters are ``x`` between steps."""

    def _switch_all(self, to_train: bool) -> None:
        for index, group in enumerate(self.param_groups):
            if self._trains(group) != to_train:
                self._switch(index, group, to_train)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @eager
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Takes one optimization step.

        Args:
            closure: reevaluates the model and returns the loss; called with the parameters at ``y``.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: without a closure, or for what the operators do not take.
            ValueError: for a hyperparameter that has been moved outside its domain.
        """
        if closure is None:
            if self._is_probe():
                self._make_state()
                return None
            name = type(self).__name__
            raise RuntimeError(
                f"{name}.step() was called without a closure: gradients must be taken at y, and parameters "
                f"are y only while step() calls it. Pass one, or use {name.removesuffix('Closure')}."
            )
        self._follow_groups()
        self._check_samples()
        try:
            self._switch_all(True)
            loss: Loss | None = self._evaluate(closure)
            self._step(loss)
        except BaseException:
            self._end_iteration()
            raise
        finally:
            self._switch_all(False)
        return loss

    def _end_iteration(self) -> None:
        """Counts an iteration in which backward() was interrupted after some parameters had stepped in it."""
        memory = self._memory
        for index, step in enumerate(memory.open or ()):
            params = memory.plans[index].params
            self._store_schedule(index, step, [i for i, p in enumerate(params) if p not in memory.stepped])
        memory.open = None
        memory.stepped.clear()


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
