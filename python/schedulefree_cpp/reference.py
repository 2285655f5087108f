"""SGD and AdamW that store ``x``, ``y`` and ``z`` and read like the paper: where a variant begins.

The native classes compute the same with one fused kernel and without storing ``x``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp._base import ScheduleFreeOptimizer, Update
from schedulefree_cpp._library import _C
from schedulefree_cpp._modes import Group, State, StoredIterates
from schedulefree_cpp._sharded import local
from schedulefree_cpp.adamw import AdamWScheduleFree
from schedulefree_cpp.sgd import SGDScheduleFree


class ReferenceOptimizer(StoredIterates, ScheduleFreeOptimizer):
    """Base of the reference implementations (Defazio et al., arXiv 2405.15682, algorithm 1)."""

    splits_bfloat16: ClassVar[bool] = False
    supports_capturable: ClassVar[bool] = False

    def _direction(self, grad: Tensor, state: State, update: Update) -> Tensor:
        """What is taken from z, before the learning rate and weight decay: the gradient, for SGD."""
        return grad

    def _step_one(self, p: Tensor, grad: Tensor, state: State, update: Update) -> None:
        group, schedule = update.group, update.schedule
        y, z = state["y"], state["z"]
        factor = -1.0 if group.get("maximize", False) else 1.0
        limit = group.get("max_grad_norm")
        if limit is not None and self._norm is not None:
            factor *= _C.clip_factor(float(self._norm), float(limit))
        direction = self._direction(grad.to(z.dtype) * factor, state, update)
        at_z = group.get("decay_at_z", group.get("decay_at") == "z")
        decay_point = z if at_z else y

        z.sub_(direction + group["weight_decay"] * decay_point, alpha=schedule.lr)
        self._average(p, state, schedule.c, self._beta(group))

    def _call(self, update: Update) -> Callable[[], None]:
        batch = update.batch
        for state in batch.state:
            self._require_iterates(state)
        self._follow(batch)
        states = batch.state if batch.plain else [_local(state) for state in batch.state]

        def call() -> None:
            for p, grad, state in zip(batch.y, batch.grad, states, strict=True):
                self._step_one(p, grad, state, update)

        return call

    def _complete_state(self, group: Group, p: Tensor, state: State) -> State:
        begins = "z" not in state
        state = super()._complete_state(group, p, state)
        if begins:
            state |= {"x": state["z"].clone(), "y": state["z"].clone()}
        return state


class SGDScheduleFreeReference(ReferenceOptimizer, SGDScheduleFree):
    """:class:`SGDScheduleFree` in a form that is simple to modify, at three times the state."""

    # As upstream's, it begins in train mode.
    schedule_start: ClassVar[dict[str, Any]] = {**ScheduleFreeOptimizer.schedule_start, "train_mode": True}


class AdamWScheduleFreeReference(ReferenceOptimizer, AdamWScheduleFree):
    r""":class:`AdamWScheduleFree` in a form that is simple to modify, at twice the state.

    Args:
        params: parameters, or dicts that define parameter groups.
        lr: learning rate, a float or a one-element tensor, >= 0.
        betas: interpolation weight of ``y = beta*x + (1-beta)*z``, in (0, 1], and decay rate of the mean
            squared gradient, in [0, 1).
        eps: added to the root of the mean squared gradient, >= 0.
        weight_decay: decay coefficient, >= 0.
        warmup_steps: steps of linear learning-rate warmup, >= 0.
        r: averaging weights grow as ``step**r``.
        weight_lr_power: averaging weights grow as ``lr_max**weight_lr_power``.
        decay_at_z: evaluate decay at ``z`` and not at ``y``.
        foreach: accepted for compatibility.
        inner_momentum: decay rate of a running mean that replaces the gradient in the update, in [0, 1).
        maximize: maximize the objective.
        per_parameter_steps: count steps for every parameter on its own.
        max_grad_norm: clip gradients to this norm within the step.

    Raises:
        ValueError: naming the hyperparameter, its value and its domain.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0,
        weight_lr_power: float = 2,
        decay_at_z: bool = False,
        foreach: bool | None = False,
        *,
        inner_momentum: float = 0.0,
        maximize: bool = False,
        per_parameter_steps: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        """Checks the hyperparameters and builds the groups."""
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "r": r,
            "warmup_steps": warmup_steps,
            "weight_lr_power": weight_lr_power,
            "decay_at_z": decay_at_z,
            "weight_decay": weight_decay,
            "inner_momentum": inner_momentum,
            "maximize": maximize,
            "per_parameter_steps": per_parameter_steps,
            "max_grad_norm": max_grad_norm,
        }
        super(AdamWScheduleFree, self).__init__(params, defaults)

    def _direction(self, grad: Tensor, state: State, update: Update) -> Tensor:
        group, t = update.group, update.k + 1
        beta2, inner = group["betas"][1], self._inner_momentum(group)
        v = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator: Tensor = (v / (1 - beta2**t)).sqrt_().add_(group["eps"])
        if inner:
            grad = state["exp_avg"].mul_(inner).add_(grad, alpha=1 - inner) / (1 - inner**t)
        return grad / denominator


def _local(state: State) -> State:
    return {name: local(value) if isinstance(value, Tensor) else value for name, value in state.items()}
