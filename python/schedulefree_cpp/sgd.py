"""Schedule-Free SGD."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp import ops
from schedulefree_cpp._core.group import Group
from schedulefree_cpp._core.hyperparameters import arguments
from schedulefree_cpp._core.optimizer import ScheduleFreeOptimizer


class SgdGroup(Group):
    """A group that takes SGD's step."""

    kind: int = ops.STEP_KINDS["sgd"]
    operator: ClassVar[str] = "sgd_step_"

    def beta(self) -> float:
        """The interpolation weight of the next y."""
        return float(self.group["momentum"])


class SGDScheduleFree(ScheduleFreeOptimizer):
    r"""Schedule-Free SGD (Defazio et al., arXiv 2405.15682, algorithm in section 2).

    Call :meth:`train` before training and :meth:`eval` before evaluating or saving.

    Args:
        params: parameters, or dicts that define parameter groups, as for :class:`AdamWScheduleFree`.
        lr: learning rate, a float or a one-element tensor, >= 0.
        momentum: interpolation weight beta of ``y = beta*x + (1-beta)*z``, in (0, 1].
        weight_decay, warmup_steps, r, weight_lr_power, foreach, decoupling_c, averaging_weight: see
            :class:`AdamWScheduleFree`.
        maximize, decay_at, max_grad_norm, capturable, state_bits, rounding, nonfinite: see
            :class:`AdamWScheduleFree`.

    Raises:
        ValueError: naming the hyperparameter, its value and its domain.
    """

    _group_type = SgdGroup
    _required: ClassVar[tuple[str, ...]] = (*ScheduleFreeOptimizer._required, "momentum")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        warmup_steps: float = 0,
        r: float = 0.0,
        weight_lr_power: float = 2,
        foreach: bool | None = True,
        *,
        decoupling_c: float = 0.0,
        averaging_weight: float = 0.0,
        maximize: bool = False,
        decay_at: str = "y",
        max_grad_norm: float | None = None,
        capturable: bool = False,
        state_bits: int = 32,
        rounding: str = "nearest",
        nonfinite: str = "propagate",
    ) -> None:
        """Checks the hyperparameters and builds the groups."""
        super().__init__(params, arguments(locals()))
