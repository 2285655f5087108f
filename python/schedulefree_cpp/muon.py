"""Schedule-Free Muon: orthogonalized steps for matrices, AdamW for all other parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp import _sharded, ops
from schedulefree_cpp._base import Batch, ScheduleFreeOptimizer
from schedulefree_cpp._groups import GroupPlan, check_number, select
from schedulefree_cpp._modes import Group, values
from schedulefree_cpp._traced import eager
from schedulefree_cpp.adamw import AdamOptimizer

_TAKE, _GRAD_MUL = map(ops.COEFFICIENTS.index, ("take", "grad_mul"))

# Of rows and columns: the factor on the learning rate of a matrix.
_LR_FACTORS: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / max(columns, 1))),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


def _orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Brings the singular values of a matrix near 1, by the quintic Newton-Schulz iteration of Muon.

    Formula and constants are those of Jordan et al., "Muon: An optimizer for hidden layers in neural
    networks" (https://kellerjordan.github.io/posts/muon), which ``torch.optim.Muon`` has, too: from a matrix
    of norm 1, each step takes every singular value ``s`` to ``a*s + b*s**3 + c*s**5``. Computed in bfloat16,
    but for a float64 matrix.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    s = matrix if matrix.dtype == torch.float64 else matrix.bfloat16()
    s = s.T if tall else s
    s = s / s.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = s @ s.T
        s = torch.addmm(s, torch.addmm(gram, gram, gram, beta=b, alpha=c), s, beta=a)
    return s.T if tall else s


class MuonScheduleFree(AdamOptimizer):
    r"""Schedule-Free Muon for matrices, Schedule-Free AdamW for all other parameters.

    A matrix takes the step of ``torch.optim.Muon`` (Jordan et al., "Muon: An optimizer for hidden layers in
    neural networks") at ``z``, and is averaged as Defazio et al. do, arXiv 2405.15682; with ``m`` the running
    mean of the gradient, in the state as ``momentum_buffer``::

        m  = momentum*m + (1-momentum)*g
        n  = momentum*m + (1-momentum)*g with nesterov, else m
        u  = factor(shape) * orthogonalize(n)
        z' = z - lr*(u + weight_decay*z)

    Decay is evaluated at ``z`` by default, which Apte et al., "Anytime Training with Schedule-Free Spectral
    Optimization", arXiv 2605.23061, find essential for long training.

    Parameters of two dimensions are matrices. The key ``use_muon`` of a parameter group decides otherwise:
    embeddings and output layers are better given to AdamW, in a group with ``use_muon`` False. A group
    without the key that holds both kinds becomes two, its matrices first. Call :meth:`train` before training
    and :meth:`eval` before evaluating or saving.

    A step within a function that ``torch.compile`` compiles breaks its graph.

    Args:
        params: parameters, or dicts that define parameter groups. Their dtype may be float32, float64,
            bfloat16 or float16; the state of 16-bit parameters is float32.
        lr: learning rate, a float or a one-element tensor, >= 0.
        betas: interpolation weight of ``y = beta*x + (1-beta)*z``, in (0, 1], and decay rate of AdamW's mean
            squared gradient, in [0, 1).
        eps: added to the root of AdamW's mean squared gradient, >= 0.
        weight_decay: decay coefficient, >= 0.
        warmup_steps: steps of linear learning-rate warmup, >= 0.
        r: averaging weights grow as ``step**r``.
        weight_lr_power: averaging weights grow as ``lr_max**weight_lr_power``.
        foreach: accepted for compatibility; AdamW's parameters are always updated in one call.
        momentum: decay rate of the mean gradient of a matrix, in [0, 1).
        nesterov: orthogonalize the mean gradient of the next step, were its gradient the same.
        ns_steps: steps of the Newton-Schulz iteration, >= 0.
        adjust_lr_fn: the factor on the learning rate of a matrix. ``"match_rms_adamw"``:
            ``0.2*sqrt(max(rows, columns))``, with which matrices move as far as AdamW has them, so that one
            ``lr`` serves both (Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982).
            ``"original"``: ``sqrt(max(1, rows/columns))``, with learning rates such as 0.02.
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
            :attr:`grad_norm` then holds the norm, which the host reads.
        state_bits: 24 keeps a bfloat16 parameter and its ``z`` in 24 bits each, of which 16 are significant;
            32 keeps all that float32 has. Other parameters are kept whole, and so is ``momentum_buffer``.
        exp_avg_sq_bits: 8 keeps AdamW's mean squared gradient in 8 bits and a scale for 128 elements; 32
            keeps it whole.
        rounding: how 24 bits are rounded: ``"nearest"``, or ``"stochastic"``, by numbers that depend on the
            step and the element alone.
        nonfinite: what a step does where a gradient is not finite: ``"propagate"`` takes it, ``"skip"``
            leaves everything as it was, ``"raise"`` does so and names the parameter.

    Raises:
        ValueError: naming the hyperparameter, its value and its domain, or the parameter of a group with
            ``use_muon`` that is no matrix.
    """

    _kind = ops.STEP_KINDS["adamw"]
    _supports_capturable: ClassVar[bool] = False
    _required: ClassVar[tuple[str, ...]] = (*AdamOptimizer._required, "use_muon", "momentum")

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
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        decoupling_c: float = 0.0,
        averaging_weight: float = 0.0,
        maximize: bool = False,
        decay_at: str = "z",
        max_grad_norm: float | None = None,
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
            "warmup_steps": warmup_steps,
            "weight_lr_power": weight_lr_power,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "use_muon": None,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "decoupling_c": decoupling_c,
            "averaging_weight": averaging_weight,
            "maximize": maximize,
            "decay_at": decay_at,
            "max_grad_norm": max_grad_norm,
            "state_bits": state_bits,
            "exp_avg_sq_bits": exp_avg_sq_bits,
            "rounding": rounding,
            "nonfinite": nonfinite,
        }
        super().__init__(params, defaults)

    # ---- groups ---------------------------------------------------------------------------------------

    def _check_hyperparameters(self, group: Group, where: str) -> None:
        super()._check_hyperparameters(group, where)
        for name, domain in (("momentum", "inner_momentum"), ("ns_steps", "c_warmup")):
            if name in group:
                check_number(name, group[name], where, domain)
        for name, expected in (("adjust_lr_fn", [*_LR_FACTORS]), ("use_muon", [None, False, True])):
            if name in group and group[name] not in expected:
                raise ValueError(f"Invalid {name}{where}: {group[name]!r}, expected one of {expected}")

    def _check_parameters(self, group: Group, where: str) -> None:
        super()._check_parameters(group, where)
        names = group.get("param_names", [])
        for i, p in enumerate(group["params"] if group["use_muon"] else ()):
            if p.ndim != 2:
                name = f" ({names[i]!r})" if i < len(names) else ""
                raise ValueError(
                    f"Invalid params[{i}]{name}{where}: shape {tuple(p.shape)}, expected two dimensions, "
                    "since use_muon is set"
                )

    @eager
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, or two of one that holds matrices and others, in the mode the optimizer is in.

        Args:
            param_group: ``params``, ``use_muon`` and any hyperparameters that differ from the defaults.

        Raises:
            ValueError: for a hyperparameter outside its domain, parameters of an unsupported dtype, or
                parameters of a group with ``use_muon`` that are no matrices; nothing has been added.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["use_muon"] is None:
            matrices = [p.ndim == 2 for p in group["params"]]
            self.param_groups[-1:] = [
                {**group, **select(group, [i for i, m in enumerate(matrices) if m == kind]), "use_muon": kind}
                for kind in (True, False)
                if kind in matrices or not (kind or matrices)
            ]
            self._refresh_plans()

    def _plan(self, index: int, group: Group) -> GroupPlan:
        plan = super()._plan(index, group)
        if not group["use_muon"]:
            return plan
        where = f" in parameter group {index}"
        self._check_hyperparameters(group, where)
        self._check_parameters(group, where)
        return plan._replace(traceable=False)

    def _state_names(self, group: Group) -> tuple[str | None, ...]:
        return ("z", "momentum_buffer") if group["use_muon"] else super()._state_names(group)

    def _rule(self, group: Group) -> dict[str, Any]:
        if not group["use_muon"]:
            return super()._rule(group)
        return {**ScheduleFreeOptimizer._rule(self, group), "kind": ops.STEP_KINDS["sgd"]}

    # ---- step -----------------------------------------------------------------------------------------

    def _call_operator(self, index: int, batch: Batch) -> None:
        if "momentum_buffer" in self._memory.plans[index].state_names:
            self._step_matrices(index, batch)
        else:
            super()._call_operator(index, batch)

    @torch.no_grad()
    def _step_matrices(self, index: int, batch: Batch) -> None:
        group = self.param_groups[index]
        decay_at = self._memory.plans[index].decay_at
        coefs = self._memory.coefs[index].clone()
        momentum, grad_mul = float(group["momentum"]), values(coefs[_GRAD_MUL])[0]
        factor = _LR_FACTORS[group["adjust_lr_fn"]]
        y, y_lo, grad, z, means = batch.lists
        coefs[_GRAD_MUL] = 1.0
        # A step that is not taken refuses what a step would refuse, before any mean changes.
        coefs[_TAKE] = 0.0
        z_lo = batch.parts.get("z_lo", [])
        ops.sgd_step_(y, y_lo, grad, z, coefs, z_lo=z_lo, decay_at=decay_at)
        coefs[_TAKE] = 1.0
        for i, (p, g, mean) in enumerate(zip(batch.params, grad, means, strict=True)):
            weight = (1 - momentum) * grad_mul
            mean.mul_(momentum).add_(g, alpha=weight)
            n = mean.mul(momentum).add_(g, alpha=weight) if group["nesterov"] else mean
            u = _orthogonalize(_sharded.whole(n, p), int(group["ns_steps"]))
            u = u.to(mean.dtype, memory_format=torch.contiguous_format) * factor(*p.shape)
            u = _sharded.local(_sharded.like(p, u))
            lows = y_lo[i : i + 1], z_lo[i : i + 1]
            ops.sgd_step_([y[i]], lows[0], [u], [z[i]], coefs, z_lo=lows[1], decay_at=decay_at)
