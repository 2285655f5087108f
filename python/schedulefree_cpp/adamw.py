"""Schedule-Free AdamW, and what all relatives of Adam share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp import ops
from schedulefree_cpp._core.group import Group
from schedulefree_cpp._core.hyperparameters import arguments, check_number
from schedulefree_cpp._core.optimizer import ScheduleFreeOptimizer
from schedulefree_cpp._core.types import DecayAt, ExpAvgSqBits, Nonfinite, ParamGroup, Rounding, StateBits


class AdamGroup(Group):
    """A group that takes AdamW's step."""

    kind: int = ops.STEP_KINDS["adamw"]
    operator: ClassVar[str] = "adamw_step_"
    optional_lists: ClassVar[tuple[str, ...]] = ("z_lo", "exp_avg_sq_scale")
    required: ClassVar[tuple[str, ...]] = (*Group.required, "betas")
    beta_domains: ClassVar[tuple[str, str]] = ("betas[0]", "betas[1]")
    layout_keys: ClassVar[tuple[str, ...]] = (*Group.layout_keys, "inner_momentum")

    @staticmethod
    def state_names(group: ParamGroup) -> tuple[str, ...]:
        """The tensors of a state in the order of the operator, from z on; "" for an absent list."""
        return ("z", "exp_avg_sq", "exp_avg" if group.get("inner_momentum") else "")


class AdamOptimizer(ScheduleFreeOptimizer):
    """Base of the relatives of Adam, which differ in scalars; not used directly."""

    _group_type: ClassVar[type[AdamGroup]] = AdamGroup

    def _check_hyperparameters(self, group: Mapping[str, Any], where: str) -> None:
        super()._check_hyperparameters(group, where)
        try:
            betas = tuple(group["betas"])
        except TypeError:
            betas = ()
        if len(betas) != 2:
            raise ValueError(f"Invalid betas{where}: {group['betas']!r}, expected two values")
        for i, (domain, beta) in enumerate(zip(self._group_type.beta_domains, betas, strict=True)):
            check_number(f"betas[{i}]", beta, where, domain)


class AdamWScheduleFree(AdamOptimizer):
    r"""Schedule-Free AdamW (Defazio et al., arXiv 2405.15682, section 4).

    Call `train` before training and `eval` before evaluating or saving.

    Example::

        import torch
        from schedulefree_cpp import AdamWScheduleFree

        model = torch.nn.Linear(8, 1)
        optimizer = AdamWScheduleFree(model.parameters(), lr=0.1, warmup_steps=10)
        optimizer.train()
        for inputs in torch.randn(100, 16, 8):
            optimizer.zero_grad()
            (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
        optimizer.eval()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "checkpoint.pt")

    Algorithm::

        beta, beta2 = betas
        x = z = y  # the parameters
        v = lr_max = weight_sum = 0
        for k in range(steps):
            g = gradient(y)
            v = beta2 * v + (1 - beta2) * g**2
            u = g / (sqrt(v / (1 - beta2 ** (k + 1))) + eps)
            lr_k = lr * min(1, (k + 1) / warmup_steps)  # lr where warmup_steps is 0
            z = z - lr_k * (u + weight_decay * y)
            lr_max = max(lr_max, lr_k)
            weight = (k + 1) ** r * lr_max**weight_lr_power
            weight_sum = weight_sum + weight
            c = weight / weight_sum
            x = (1 - c) * x + c * z  # what is evaluated and saved
            y = beta * x + (1 - beta) * z

    Args:
        params: parameters, or dicts that define parameter groups. Their dtype may be float32, float64,
            bfloat16 or float16; those of 16 bits train as float32 does.
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
        decoupling_c: above 0, the weight ``c`` of the new ``z`` in the average becomes
            ``min(1, c*(1-beta)*decoupling_c)``, so that beta does not set how far ``x``, as an average of
            ``y``, reaches back (Song et al., "Through the River", arXiv 2507.09846). 0 leaves ``c`` as it is.
        averaging_weight: above 0, ``c`` is this constant, at most 1, in place of what the arguments above
            make of it: Generalized Primal Averaging (Defazio et al., arXiv 2512.17131), whose ``mu_x`` is
            ``1 - averaging_weight`` and whose ``mu_y`` is beta.
        maximize: maximize the objective.
        decay_at: where decay is evaluated, ``"y"`` or ``"z"``.
        max_grad_norm: clip gradients to this norm within the step, as ``torch.nn.utils.clip_grad_norm_`` over
            all parameters of the optimizer would before it, but without writing them. ``inf`` only measures.
            `grad_norm` then holds the norm, which the host reads unless ``capturable`` is set.
        capturable: keep the schedule in tensors on the parameters' device, which no step reads on the host:
            for CUDA graphs, and for ``torch.amp.GradScaler``, which then need not wait to know whether a step
            is to be skipped. A captured graph reads ``lr`` and ``weight_decay`` again where they are tensors,
            and keeps numbers.
        state_bits: 24 keeps a bfloat16 parameter and its ``z`` in 24 bits each, of which 16 are significant;
            32 keeps all that float32 has. Other parameters are kept whole.
        exp_avg_sq_bits: 8 keeps the mean squared gradient in 8 bits and a scale for 128 elements; 32 keeps it
            whole.
        rounding: how 24 bits are rounded: ``"nearest"``, or ``"stochastic"``, by numbers that depend on the
            step and the element alone.
        nonfinite: what a step does where a gradient is not finite. ``"propagate"`` takes it, as torch does;
            ``"skip"`` leaves everything as it was, the schedule too; ``"raise"`` does so and names the
            parameter. The last two need one pass over the gradients, whose result the host reads unless
            ``capturable`` is set, which ``"raise"`` cannot be used with. One choice for all groups.

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
        warmup_steps: float = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = True,
        *,
        inner_momentum: float = 0.0,
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


class PaperGroup(AdamGroup):
    """A group that takes the paper's step."""

    kind: int = ops.STEP_KINDS["adamw_paper"]


class AdamWScheduleFreePaper(AdamWScheduleFree):
    r"""Schedule-Free AdamW as the paper writes it (Defazio et al., arXiv 2405.15682, algorithm 1).

    The learning rate is corrected for the bias of the mean squared gradient, not the latter itself, so that
    the first iterates weigh less in the average.

    Example::

        import torch
        from schedulefree_cpp import AdamWScheduleFreePaper

        weights = torch.nn.Parameter(torch.zeros(8))
        optimizer = AdamWScheduleFreePaper([weights], lr=0.1)
        optimizer.train()
        for _ in range(100):
            optimizer.zero_grad()
            (weights - 1).square().sum().backward()
            optimizer.step()
        optimizer.eval()

    Algorithm::

        beta, beta2 = betas
        x = z = y  # the parameters
        v = lr_max = weight_sum = 0
        for k in range(steps):
            g = gradient(y)
            v = beta2 * v + (1 - beta2) * g**2
            u = g / (sqrt(v) + eps)
            lr_k = lr * sqrt(1 - beta2 ** (k + 1)) * min(1, (k + 1) / warmup_steps)
            z = z - lr_k * (u + weight_decay * y)
            lr_max = max(lr_max, lr_k)
            weight = (k + 1) ** r * lr_max**weight_lr_power
            weight_sum = weight_sum + weight
            c = weight / weight_sum
            x = (1 - c) * x + c * z  # what is evaluated and saved
            y = beta * x + (1 - beta) * z

    Args:
        params: parameters, or dicts that define parameter groups, as for `AdamWScheduleFree`.
        lr, betas, eps, weight_decay, warmup_steps, r, weight_lr_power, foreach: see `AdamWScheduleFree`.
        inner_momentum: 0, since the paper has none.
        decoupling_c, averaging_weight, maximize, decay_at, max_grad_norm, capturable: see
            `AdamWScheduleFree`.
        state_bits, exp_avg_sq_bits, rounding, nonfinite: see `AdamWScheduleFree`.

    Raises:
        ValueError: naming the hyperparameter, its value and its domain.
    """

    _group_type: ClassVar[type[AdamGroup]] = PaperGroup

    def _check_hyperparameters(self, group: Mapping[str, Any], where: str) -> None:
        super()._check_hyperparameters(group, where)
        if group.get("inner_momentum"):
            raise ValueError(f"Invalid inner_momentum{where}: {group['inner_momentum']!r}, expected 0")
