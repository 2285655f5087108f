"""The closure forms: parameters are the average ``x`` between steps, and no mode has to be switched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, overload

from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp._core.backward import end_iteration
from schedulefree_cpp._core.compiled import eager
from schedulefree_cpp._core.hyperparameters import arguments
from schedulefree_cpp._core.modes import TwoModeOptimizer
from schedulefree_cpp._core.optimizer import ScheduleFreeOptimizer
from schedulefree_cpp._core.types import DecayAt, Loss, Nonfinite, Rounding, StateBits
from schedulefree_cpp.adamw import AdamWScheduleFree
from schedulefree_cpp.radam import RAdamScheduleFree
from schedulefree_cpp.sgd import SGDScheduleFree


class ClosureForm(TwoModeOptimizer):
    """What the closure forms share; not used directly.

    ``step(closure)`` takes the parameters to ``y``, calls the closure, steps, and brings them to ``x``, also
    if the closure raises. ``train()`` and ``eval()`` have nothing to do.
    """

    _take_step: Callable[..., Any]  # step() without torch's hooks around it

    def train(self, mode: bool = True) -> None:
        """Does nothing: parameters are ``x`` between steps, in training too."""

    def eval(self) -> None:
        """Does nothing: parameters are ``x`` between steps."""

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
                return self._take_step(None)  # type: ignore[no-any-return]
            name = type(self).__name__
            raise RuntimeError(
                f"{name}.step() was called without a closure: gradients must be taken at y, and parameters "
                f"are y only while step() calls it. Pass one, or use {name.removesuffix('Closure')}."
            )
        self._set_mode(True)
        try:
            return self._take_step(closure)  # type: ignore[no-any-return]
        finally:
            if self._memory.iteration is not None:
                end_iteration(self)
            self._set_mode(False)


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
    """`SGDScheduleFree` with ``step(closure)`` and no need of ``train()`` and ``eval()``.

    ``step(closure)`` takes the gradient at ``y`` and leaves the parameters at the average ``x``, where they
    are evaluated and saved.

    Example::

        import torch
        from schedulefree_cpp import SGDScheduleFreeClosure

        weights = torch.nn.Parameter(torch.zeros(8))
        optimizer = SGDScheduleFreeClosure([weights], lr=0.1)

        def closure():
            optimizer.zero_grad()
            loss = (weights - 1).square().sum()
            loss.backward()
            return loss

        for _ in range(100):
            optimizer.step(closure)
        print(weights.mean().item())  # nearly 1

    Args:
        params: parameters, or dicts that define parameter groups, as for `AdamWScheduleFree`.
        lr: learning rate, a float or a one-element tensor, >= 0.
        weight_decay: decay coefficient, >= 0. It stands before ``momentum``, as upstream has it.
        momentum: interpolation weight beta of ``y = beta*x + (1-beta)*z``, in (0, 1].
        warmup_steps, r, weight_lr_power, foreach, decoupling_c, averaging_weight: see `AdamWScheduleFree`.
        maximize, decay_at, max_grad_norm, state_bits, rounding, nonfinite: see `AdamWScheduleFree`.
        capturable: False, since a step needs the host.

    Raises:
        ValueError: naming the hyperparameter, its value and its domain.
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
        *,
        decoupling_c: float = 0.0,
        averaging_weight: float = 0.0,
        maximize: bool = False,
        decay_at: DecayAt = "y",
        max_grad_norm: float | None = None,
        capturable: bool = False,
        state_bits: StateBits = 32,
        rounding: Rounding = "nearest",
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        """Checks the hyperparameters and builds the groups."""
        super().__init__(params, **arguments(locals()))


class AdamWScheduleFreeClosure(ClosureOptimizer, AdamWScheduleFree):
    """`AdamWScheduleFree` with ``step(closure)`` and no need of ``train()`` and ``eval()``.

    ``step(closure)`` takes the gradient at ``y`` and leaves the parameters at the average ``x``, where they
    are evaluated and saved.

    Example::

        import torch
        from schedulefree_cpp import AdamWScheduleFreeClosure

        weights = torch.nn.Parameter(torch.zeros(8))
        optimizer = AdamWScheduleFreeClosure([weights], lr=0.1)

        def closure():
            optimizer.zero_grad()
            loss = (weights - 1).square().sum()
            loss.backward()
            return loss

        for _ in range(100):
            optimizer.step(closure)
        print(weights.mean().item())  # nearly 1

    Args:
        params: parameters, or dicts that define parameter groups, as for `AdamWScheduleFree`.
        lr, betas, eps, weight_decay, warmup_steps, r, weight_lr_power, foreach: see `AdamWScheduleFree`.
        inner_momentum, decoupling_c, averaging_weight, maximize, decay_at, max_grad_norm: see
            `AdamWScheduleFree`.
        state_bits, exp_avg_sq_bits, rounding, nonfinite: see `AdamWScheduleFree`.
        capturable: False, since a step needs the host.

    Raises:
        ValueError: naming the hyperparameter, its value and its domain.
    """


class RAdamScheduleFreeClosure(ClosureOptimizer, RAdamScheduleFree):
    """`RAdamScheduleFree` with ``step(closure)`` and no need of ``train()`` and ``eval()``.

    ``step(closure)`` takes the gradient at ``y`` and leaves the parameters at the average ``x``, where they
    are evaluated and saved.

    Example::

        import torch
        from schedulefree_cpp import RAdamScheduleFreeClosure

        weights = torch.nn.Parameter(torch.zeros(8))
        optimizer = RAdamScheduleFreeClosure([weights], lr=0.3)

        def closure():
            optimizer.zero_grad()
            loss = (weights - 1).square().sum()
            loss.backward()
            return loss

        for _ in range(100):
            optimizer.step(closure)
        print(weights.mean().item())  # nearly 1

    Args:
        params: parameters, or dicts that define parameter groups, as for `AdamWScheduleFree`.
        lr, betas, eps, weight_decay, r, weight_lr_power, foreach: see `AdamWScheduleFree`.
        silent_sgd_phase: take no step while the variance of the gradient cannot be estimated; otherwise take
            SGD steps then.
        decoupling_c, averaging_weight, maximize, decay_at, max_grad_norm: see `AdamWScheduleFree`.
        state_bits, exp_avg_sq_bits, rounding, nonfinite: see `AdamWScheduleFree`.
        capturable: False, since a step needs the host.

    Raises:
        ValueError: naming the hyperparameter, its value and its domain.
    """
