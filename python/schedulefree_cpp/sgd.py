"""Schedule-Free SGD."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp import ops
from schedulefree_cpp._core.group import Group
from schedulefree_cpp._core.hyperparameters import arguments
from schedulefree_cpp._core.optimizer import ScheduleFreeOptimizer
from schedulefree_cpp._core.types import DecayAt, Nonfinite, Rounding, StateBits


class SgdGroup(Group):
    """A group that takes SGD's step."""

    kind: int = ops.STEP_KINDS["sgd"]
    operator: ClassVar[str] = "sgd_step_"
    required: ClassVar[tuple[str, ...]] = (*Group.required, "momentum")

    def beta(self) -> float:
        """The interpolation weight of the next y."""
        return float(self.group["momentum"])


class SGDScheduleFree(ScheduleFreeOptimizer):
    r"""Schedule-Free SGD (Defazio et al., arXiv 2405.15682, algorithm in section 2).

    Call `train` before training and `eval` before evaluating or saving.

    Example::

        import torch
        from schedulefree_cpp import SGDScheduleFree

        model = torch.nn.Linear(8, 1)
        optimizer = SGDScheduleFree(model.parameters(), lr=0.1)
        for epoch in range(3):
            optimizer.train()
            for inputs in torch.randn(100, 16, 8):
                optimizer.zero_grad()
                (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
                optimizer.step()
            optimizer.eval()
            print(model(torch.ones(1, 8)).item())  # nearly 8

    Algorithm::

        x = z = y  # the parameters
        lr_max = weight_sum = 0
        for k in range(steps):
            g = gradient(y)
            lr_k = lr * min(1, (k + 1) / warmup_steps)  # lr where warmup_steps is 0
            z = z - lr_k * (g + weight_decay * y)
            lr_max = max(lr_max, lr_k)
            weight = (k + 1) ** r * lr_max**weight_lr_power
            weight_sum = weight_sum + weight
            c = weight / weight_sum
            x = (1 - c) * x + c * z  # what is evaluated and saved
            y = momentum * x + (1 - momentum) * z

    Args:
        params: parameters, or dicts that define parameter groups, as for `AdamWScheduleFree`.
        lr: learning rate, a float or a one-element tensor, >= 0.
        momentum: interpolation weight beta of ``y = beta*x + (1-beta)*z``, in (0, 1].
        weight_decay, warmup_steps, r, weight_lr_power, foreach, decoupling_c, averaging_weight: see
            `AdamWScheduleFree`.
        maximize, decay_at, max_grad_norm, capturable, state_bits, rounding, nonfinite: see
            `AdamWScheduleFree`.

    Raises:
        ValueError: naming the hyperparameter, its value and its domain.
    """

    _group_type = SgdGroup

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
        decay_at: DecayAt = "y",
        max_grad_norm: float | None = None,
        capturable: bool = False,
        state_bits: StateBits = 32,
        rounding: Rounding = "nearest",
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        """Checks the hyperparameters and builds the groups."""
        super().__init__(params, arguments(locals()))
