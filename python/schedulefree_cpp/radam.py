"""Schedule-Free RAdam."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp import ops
from schedulefree_cpp._modes import Group
from schedulefree_cpp.adamw import AdamOptimizer


class RAdamScheduleFree(AdamOptimizer):
    r"""Schedule-Free RAdam (arXiv 2405.15682, with the warmup of Liu et al., arXiv 1908.03265, algorithm 2).

    Needs neither a schedule nor a warmup. Call :meth:`train` before training and :meth:`eval` before
    evaluating or saving.

    Args:
        params: parameters, or dicts that define parameter groups. Their dtype may be float32, float64,
            bfloat16 or float16; those of 16 bits train as float32 does.
        lr: learning rate, a float or a one-element tensor, >= 0.
        betas: interpolation weight of ``y = beta*x + (1-beta)*z``, in (0, 1], and decay rate of the mean
            squared gradient, in [0, 1).
        eps: added to the root of the mean squared gradient, >= 0.
        weight_decay: decay coefficient, >= 0.
        r: averaging weights grow as ``step**r``.
        weight_lr_power: averaging weights grow as ``lr_max**weight_lr_power``.
        foreach: accepted for compatibility; all parameters are always updated in one call.
        silent_sgd_phase: take no step while the variance of the gradient cannot be estimated; otherwise take
            SGD steps then.
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
            :attr:`grad_norm` then holds the norm, which the host reads unless ``capturable`` is set.
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

    _kind = ops.STEP_KINDS["radam"]

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
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "decoupling_c": decoupling_c,
            "averaging_weight": averaging_weight,
            "maximize": maximize,
            "decay_at": decay_at,
            "max_grad_norm": max_grad_norm,
            "capturable": capturable,
            "state_bits": state_bits,
            "exp_avg_sq_bits": exp_avg_sq_bits,
            "rounding": rounding,
            "nonfinite": nonfinite,
            "silent_sgd_phase": silent_sgd_phase,
        }
        super().__init__(params, defaults)

    def _rule(self, group: Group) -> dict[str, Any]:
        return {**super()._rule(group), "silent_sgd_phase": bool(group["silent_sgd_phase"])}
