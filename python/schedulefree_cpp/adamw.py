"""Schedule-Free AdamW."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp import ops
from schedulefree_cpp._base import (
    DECAY_RATE,
    NON_NEGATIVE,
    Batch,
    Domain,
    Group,
    ScheduleFreeOptimizer,
    State,
    check_betas,
)
from schedulefree_cpp._library import _C


class AdamWScheduleFree(ScheduleFreeOptimizer):
    r"""Schedule-Free AdamW (Defazio et al., arXiv 2405.15682, algorithm 1).

    Call :meth:`train` before training and :meth:`eval` before evaluating or saving.

    Args:
        params: parameters, or dicts that define parameter groups. Their dtype may be float32, float64,
            bfloat16 or float16; the state of 16-bit parameters is float32.
        lr: learning rate, a float or a one-element tensor, >= 0.
        betas: interpolation weight of ``y = beta*x + (1-beta)*z``, in (0, 1], and decay rate of the mean
            squared gradient, in [0, 1).
        eps: added to the root of the mean squared gradient, >= 0.
        weight_decay: decay coefficient, >= 0.
        warmup_steps: steps of linear learning-rate warmup, >= 0.
        r: averaging weights grow as ``step**r``.
        weight_lr_power: averaging weights grow as ``lr_max**weight_lr_power``.
        foreach: accepted for compatibility; all parameters are always updated in one call.
        inner_momentum: decay rate of a running mean that replaces the gradient in the update, in [0, 1).
            At 0 no such mean is kept.
        maximize: maximize the objective.
        decay_at: where decay is evaluated, ``"y"`` or ``"z"``.

    Raises:
        ValueError: naming the hyperparameter, its value and its domain.
    """

    operator = staticmethod(ops.adamw_step_)
    extras: ClassVar[dict[str, Any]] = {**ScheduleFreeOptimizer.extras, "inner_momentum": 0.0}
    domains: ClassVar[dict[str, Domain]] = {**ScheduleFreeOptimizer.domains, "eps": NON_NEGATIVE}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = True,
        *,
        inner_momentum: float = 0.0,
        maximize: bool = False,
        decay_at: str = "y",
    ) -> None:
        """Checks the hyperparameters and builds the groups."""
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "r": r,
                "warmup_steps": warmup_steps,
                "weight_lr_power": weight_lr_power,
                "weight_decay": weight_decay,
                "foreach": foreach,
                "inner_momentum": inner_momentum,
                "maximize": maximize,
                "decay_at": decay_at,
            },
        )

    def _check_hyperparameters(self, group: Group, where: str) -> None:
        super()._check_hyperparameters(group, where)
        check_betas(group["betas"], where)
        DECAY_RATE.check("inner_momentum", group.get("inner_momentum", 0.0), where)

    def _beta(self, group: Group) -> float:
        return float(group["betas"][0])

    def _new_moments(self, group: Group, z: Tensor) -> State:
        moments = {"exp_avg_sq": torch.zeros_like(z)}
        if group.get("inner_momentum", 0.0):
            moments["exp_avg"] = torch.zeros_like(z)
        return moments

    def _moments(self, group: Group, batch: Batch) -> list[list[Tensor]]:
        exp_avg = batch.stream("exp_avg") if group.get("inner_momentum", 0.0) else []
        return [batch.stream("exp_avg_sq"), exp_avg]

    def _scalars(self, group: Group, schedule: _C.ScheduleStep) -> dict[str, Any]:
        beta2 = float(group["betas"][1])
        inner_momentum = group.get("inner_momentum", 0.0)
        denom_scale, denom_eps = _C.adam_denominator(
            k=group["k"], beta2=beta2, inner_momentum=inner_momentum, eps=group["eps"]
        )
        return {
            **super()._scalars(group, schedule),
            "beta2": beta2,
            "denom_scale": denom_scale,
            "denom_eps": denom_eps,
            "inner_momentum": inner_momentum,
        }
