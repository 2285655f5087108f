"""Schedule-Free RAdam."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp import ops
from schedulefree_cpp._core.hyperparameters import arguments
from schedulefree_cpp._core.types import DecayAt, ExpAvgSqBits, Nonfinite, Rounding, StateBits
from schedulefree_cpp.adamw import AdamGroup, AdamOptimizer


class RAdamGroup(AdamGroup):
    """A group that takes RAdam's step."""

    kind: int = ops.STEP_KINDS["radam"]


class RAdamScheduleFree(AdamOptimizer):
    r"""Schedule-Free RAdam (arXiv 2405.15682, with the warmup of Liu et al., arXiv 1908.03265, algorithm 2).

    Needs neither a schedule nor a warmup. Call `train` before training and `eval` before
    evaluating or saving.

    Example::

        import torch
        from schedulefree_cpp import RAdamScheduleFree

        weights = torch.nn.Parameter(torch.zeros(8))
        optimizer = RAdamScheduleFree([weights], lr=0.3)
        optimizer.train()
        for _ in range(100):
            optimizer.zero_grad()
            (weights - 1).square().sum().backward()
            optimizer.step()
        with optimizer.averaged():
            print(weights.mean().item())  # nearly 1

    Algorithm::

        beta, beta2 = betas
        rho_inf = 2 / (1 - beta2) - 1
        x = z = y  # the parameters
        v = lr_max = weight_sum = 0
        for k in range(steps):
            g = gradient(y)
            v = beta2 * v + (1 - beta2) * g**2
            rho = rho_inf - 2 * (k + 1) * beta2 ** (k + 1) / (1 - beta2 ** (k + 1))
            if rho > 4:
                u = g / (sqrt(v / (1 - beta2 ** (k + 1))) + eps)
                rectification = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
                lr_k = lr * sqrt(rectification)
            else:
                u = g
                lr_k = 0 if silent_sgd_phase else lr
            z = z - lr_k * (u + weight_decay * y)
            lr_max = max(lr_max, lr_k)
            weight = (k + 1) ** r * lr_max**weight_lr_power
            weight_sum = weight_sum + weight
            c = weight / weight_sum if weight_sum else 0
            x = (1 - c) * x + c * z  # what is evaluated and saved
            y = beta * x + (1 - beta) * z

    Args:
        params: parameters, or dicts that define parameter groups, as for `AdamWScheduleFree`.
        lr, betas, eps, weight_decay, r, weight_lr_power, foreach: see `AdamWScheduleFree`.
        silent_sgd_phase: take no step while the variance of the gradient cannot be estimated; otherwise take
            SGD steps then.
        decoupling_c, averaging_weight, maximize, decay_at, max_grad_norm, capturable: see
            `AdamWScheduleFree`.
        state_bits, exp_avg_sq_bits, rounding, nonfinite: see `AdamWScheduleFree`.

    Raises:
        ValueError: naming the hyperparameter, its value and its domain.
    """

    _group_type: ClassVar[type[AdamGroup]] = RAdamGroup

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
        decay_at: DecayAt = "y",
        max_grad_norm: float | None = None,
        capturable: bool = False,
        state_bits: StateBits = 32,
        exp_avg_sq_bits: ExpAvgSqBits = 32,
        rounding: Rounding = "nearest",
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        """Checks the hyperparameters and builds the groups."""
        super().__init__(params, arguments(locals()))
