"""Schedule-Free RAdam."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp import ops
from schedulefree_cpp._core.group import Group
from schedulefree_cpp._core.hyperparameters import arguments
from schedulefree_cpp.adamw import AdamGroup, AdamOptimizer


class RAdamGroup(AdamGroup):
    """A group that takes RAdam's step."""

    kind: int = ops.STEP_KINDS["radam"]


class RAdamScheduleFree(AdamOptimizer):
    r"""Schedule-Free RAdam (arXiv 2405.15682, with the warmup of Liu et al., arXiv 1908.03265, algorithm 2).

    Needs neither a schedule nor a warmup. Call :meth:`train` before training and :meth:`eval` before
    evaluating or saving.

    Args:
        params: parameters, or dicts that define parameter groups, as for :class:`AdamWScheduleFree`.
        lr, betas, eps, weight_decay, r, weight_lr_power, foreach: see :class:`AdamWScheduleFree`.
        silent_sgd_phase: take no step while the variance of the gradient cannot be estimated; otherwise take
            SGD steps then.
        decoupling_c, averaging_weight, maximize, decay_at, max_grad_norm, capturable: see
            :class:`AdamWScheduleFree`.
        state_bits, exp_avg_sq_bits, rounding, nonfinite: see :class:`AdamWScheduleFree`.

    Raises:
        ValueError: naming the hyperparameter, its value and its domain.
    """

    _group_type: ClassVar[type[Group]] = RAdamGroup

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = True,
        silent_sgd_phase: bool = True,
        *,
        decoupling_c: float = 0.0,
        averaging_weight: float = 0.0,
        maximize: bool = False,
        decay_at: str = "y",
        max_grad_norm: float | None = None,
        capturable: bool = False,
        state_bits: int = 32,
        exp_avg_sq_bits: int = 32,
        rounding: str = "nearest",
        nonfinite: str = "propagate",
    ) -> None:
        """Checks the hyperparameters and builds the groups."""
        super().__init__(params, arguments(locals()))
