"""Schedule-Free Muon: orthogonalized steps for matrices, AdamW for all other parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp import ops
from schedulefree_cpp._core import sharded
from schedulefree_cpp._core.compiled import eager
from schedulefree_cpp._core.group import Gathered, Group
from schedulefree_cpp._core.hyperparameters import arguments, check_choice, select
from schedulefree_cpp._core.library import _C
from schedulefree_cpp._core.state import matrix_shape
from schedulefree_cpp._core.types import (
    AdjustLrFn,
    DecayAt,
    ExpAvgSqBits,
    Nonfinite,
    ParamGroup,
    Rounding,
    StateBits,
    quoted_name,
    read_values,
)
from schedulefree_cpp.adamw import AdamGroup, AdamOptimizer

_TAKE, _GRAD_MUL = map(ops.COEFFICIENTS.index, ("take", "grad_mul"))

# Of rows and columns: the factor on the learning rate of a matrix.
_LR_FACTORS: dict[AdjustLrFn, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / max(columns, 1))),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


def _orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Brings the singular values of a matrix, or of each in a batch, near 1: Muon's Newton-Schulz iteration.

    Formula and constants are those of Jordan et al., "Muon: An optimizer for hidden layers in neural
    networks" (https://kellerjordan.github.io/posts/muon), which ``torch.optim.Muon`` has, too: from a matrix
    of norm 1, each step takes every singular value ``s`` to ``a*s + b*s**3 + c*s**5``. Computed in bfloat16,
    but for a float64 matrix.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[-2] > matrix.shape[-1]
    addmm: Callable[..., Tensor] = torch.addmm if matrix.ndim == 2 else torch.baddbmm
    s = matrix if matrix.dtype == torch.float64 else matrix.bfloat16()
    s = s.mT if tall else s
    s = s / torch.linalg.vector_norm(s, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = s @ s.mT
        s = addmm(s, addmm(gram, gram, gram, beta=b, alpha=c), s, beta=a)
    return s.mT if tall else s


def _normalize_rows(matrix: Tensor, mean_square: Tensor, beta2: float, eps: float) -> Tensor:
    """Divides rows by the root of their running mean square, and gives a matrix the norm it has orthogonal.

    Li et al., "NorMuon: Making Muon more efficient and scalable", arXiv 2510.05491. ``mean_square`` is
    updated.
    """
    if not matrix.numel():
        return matrix
    mean_square.lerp_(matrix.square().mean(-1), 1 - beta2)
    matrix = matrix / (mean_square.sqrt() + eps).unsqueeze(-1)
    norm: Tensor = torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    return matrix * (math.sqrt(min(matrix.shape[-2:])) / norm)


class MuonGroup(AdamGroup):
    """A group of matrices, or one that takes AdamW's step."""

    required: ClassVar[tuple[str, ...]] = (*AdamGroup.required, "use_muon", "momentum")
    domains: ClassVar[Mapping[str, str]] = {"momentum": "inner_momentum", "ns_steps": "c_warmup"}
    layout_keys: ClassVar[tuple[str, ...]] = (*AdamGroup.layout_keys, "use_muon", "normalize_rows")

    @property
    def kind(self) -> int:  # type: ignore[override]
        """Whose step the schedule takes: the step of a matrix is SGD's, along what is orthogonalized."""
        return ops.STEP_KINDS["sgd" if self.group["use_muon"] else "adamw"]

    @staticmethod
    def state_names(group: ParamGroup) -> tuple[str, ...]:
        """The tensors of a state in the order of the operator, from z on; "" for an absent list."""
        if not group["use_muon"]:
            return AdamGroup.state_names(group)
        return ("z", "momentum_buffer", *(("row_exp_avg_sq",) if group["normalize_rows"] in (True,) else ()))

    def schedule(self, norm: float) -> _C.ScheduleStep:
        """The next step, of which nothing is stored."""
        return _C.schedule_step(
            self.group, kind=self.kind, beta=self.y_beta, beta_next=self.beta(), grad_norm=norm
        )

    @property
    def traceable(self) -> bool:
        """True where compiled code can hand the parameters to an operator."""
        return not self.group["use_muon"] and super().traceable

    def call_operator(self, gathered: Gathered) -> None:
        """Updates parameters; none of them where the operator refuses."""
        if "momentum_buffer" in self.names:
            self._step_matrices(gathered)
        else:
            super().call_operator(gathered)

    @torch.no_grad()
    def _step_matrices(self, gathered: Gathered) -> None:
        group, coefs = self.group, self.coefs.clone()
        momentum, grad_mul = float(group["momentum"]), read_values(coefs[_GRAD_MUL])[0]
        factor = _LR_FACTORS[group["adjust_lr_fn"]]
        y, y_lo, grad, z, means, *mean_squares = gathered.lists
        z_lo = gathered.parts.get("z_lo", [])
        coefs[_GRAD_MUL] = 1.0
        # A step that is not taken refuses what a step would refuse, before any mean changes.
        coefs[_TAKE] = 0.0
        ops.sgd_step_(y, y_lo, grad, z, coefs, z_lo=z_lo, decay_at=self.decay_at)
        coefs[_TAKE] = 1.0
        for i, (p, g, mean) in enumerate(zip(gathered.params, grad, means, strict=True)):
            weight = (1 - momentum) * grad_mul
            mean.mul_(momentum).add_(g, alpha=weight)
            n = mean.mul(momentum).add_(g, alpha=weight) if group["nesterov"] else mean
            shape = matrix_shape(p)
            u = _orthogonalize(sharded.all_gathered(n, p).reshape(shape), int(group["ns_steps"]))
            u = u.to(mean.dtype, memory_format=torch.contiguous_format)
            for mean_square in mean_squares:
                u = _normalize_rows(u, mean_square[i], float(group["betas"][1]), float(group["eps"]))
            u = (u * factor(*shape[-2:])).reshape(p.shape)
            u = sharded.local(sharded.placed_like(p, u))
            lows = y_lo[i : i + 1], z_lo[i : i + 1]
            ops.sgd_step_([y[i]], lows[0], [u], [z[i]], coefs, z_lo=lows[1], decay_at=self.decay_at)


class MuonScheduleFree(AdamOptimizer):
    r"""Schedule-Free Muon for matrices, Schedule-Free AdamW for all other parameters.

    A matrix takes the step of ``torch.optim.Muon`` (Jordan et al., "Muon: An optimizer for hidden layers in
    neural networks") at ``z``, and is averaged as Defazio et al. do, arXiv 2405.15682. The running mean ``m``
    of the gradient is in the state as ``momentum_buffer``.

    Decay is evaluated at ``z`` by default, which Apte et al., "Anytime Training with Schedule-Free Spectral
    Optimization", arXiv 2605.23061, find essential for long training.

    Parameters of two dimensions are matrices. The key ``use_muon`` of a parameter group decides otherwise:
    embeddings and output layers are better given to AdamW, in a group with ``use_muon`` False, and a group
    with ``use_muon`` True may hold parameters of more dimensions. Three are a batch of matrices, ``(batch,
    rows, columns)``; four or more, such as the weight of a convolution, are one matrix with a row for each
    output channel. A group without the key that holds both kinds becomes two, its matrices first. Call
    `train` before training and `eval` before evaluating or saving.

    A step within a function that ``torch.compile`` compiles breaks its graph.

    Example::

        import torch
        from schedulefree_cpp import MuonScheduleFree

        model = torch.nn.Sequential(
            torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 32), torch.nn.Linear(32, 1)
        )
        first, last = model[0], model[3]
        groups = [
            {"params": [*model[2].parameters()]},
            {"params": [*first.parameters(), *last.parameters()], "use_muon": False},
        ]
        optimizer = MuonScheduleFree(groups, lr=0.01, weight_decay=0.1)
        optimizer.train()
        for inputs in torch.randn(100, 16, 8):
            optimizer.zero_grad()
            (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
        optimizer.eval()

    Algorithm::

        beta, _ = betas
        x = z = y  # a matrix
        m = lr_max = weight_sum = 0
        for k in range(steps):
            g = gradient(y)
            m = momentum * m + (1 - momentum) * g
            n = momentum * m + (1 - momentum) * g if nesterov else m
            u = lr_factor(n.shape) * orthogonalize(n, ns_steps)
            lr_k = lr * min(1, (k + 1) / warmup_steps)  # lr where warmup_steps is 0
            z = z - lr_k * (u + weight_decay * z)
            lr_max = max(lr_max, lr_k)
            weight = (k + 1) ** r * lr_max**weight_lr_power
            weight_sum = weight_sum + weight
            c = weight / weight_sum
            x = (1 - c) * x + c * z  # what is evaluated and saved
            y = beta * x + (1 - beta) * z

    Args:
        params: parameters, or dicts that define parameter groups, as for `AdamWScheduleFree`.
        lr, betas, eps, weight_decay, warmup_steps, r, weight_lr_power, foreach: see
            `AdamWScheduleFree`; ``eps`` and the second beta are of parameters that take AdamW's step,
            and of ``normalize_rows``.
        momentum: decay rate of the mean gradient of a matrix, in [0, 1).
        nesterov: orthogonalize the mean gradient of the next step, were its gradient the same.
        ns_steps: steps of the Newton-Schulz iteration, >= 0.
        adjust_lr_fn: the factor on the learning rate of a matrix. ``"match_rms_adamw"``:
            ``0.2*sqrt(max(rows, columns))``, with which matrices move as far as AdamW has them, so that one
            ``lr`` serves both (Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982).
            ``"original"``: ``sqrt(max(1, rows/columns))``, with learning rates such as 0.02.
        normalize_rows: divide each row of ``orthogonalize(n)`` by the root of its running mean square, whose
            decay rate is the second beta, and give the matrix the norm it would have if it were orthogonal:
            NorMuon (Li et al., arXiv 2510.05491). With ``nesterov`` False and ``"match_rms_adamw"`` this is
            SF-NorMuon (arXiv 2605.23061, algorithm 1). Set it before the first step.
        decoupling_c, averaging_weight, maximize, decay_at, max_grad_norm: see `AdamWScheduleFree`.
        state_bits, exp_avg_sq_bits, rounding, nonfinite: see `AdamWScheduleFree`;
            ``momentum_buffer`` is kept whole.

    Raises:
        ValueError: naming the hyperparameter, its value and its domain, or the parameter of a group with
            ``use_muon`` that has fewer than two dimensions.
    """

    _group_type: ClassVar[type[AdamGroup]] = MuonGroup
    _supports_capturable: ClassVar[bool] = False

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
        adjust_lr_fn: AdjustLrFn = "match_rms_adamw",
        normalize_rows: bool = False,
        decoupling_c: float = 0.0,
        averaging_weight: float = 0.0,
        maximize: bool = False,
        decay_at: DecayAt = "z",
        max_grad_norm: float | None = None,
        state_bits: StateBits = 32,
        exp_avg_sq_bits: ExpAvgSqBits = 32,
        rounding: Rounding = "nearest",
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        """Checks the hyperparameters and builds the groups."""
        super().__init__(params, arguments(locals()) | {"use_muon": None})

    # ---- groups ---------------------------------------------------------------------------------------

    def _check_hyperparameters(self, group: Mapping[str, Any], where: str) -> None:
        super()._check_hyperparameters(group, where)
        for name, expected in (
            ("adjust_lr_fn", get_args(AdjustLrFn)),
            ("normalize_rows", (False, True)),
            ("use_muon", (None, False, True)),
        ):
            if name in group:
                check_choice(name, group[name], expected, where)

    def _check_parameters(self, group: ParamGroup, where: str) -> None:
        super()._check_parameters(group, where)
        for i, p in enumerate(group["params"] if group["use_muon"] else ()):
            if p.ndim < 2:
                raise ValueError(
                    f"Invalid params[{i}]{quoted_name(group, i)}{where}: shape {tuple(p.shape)}, expected "
                    "two dimensions or more, since use_muon is set"
                )

    @eager
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, or two of one that holds matrices and others, in the mode the optimizer is in.

        Args:
            param_group: ``params``, ``use_muon`` and any hyperparameters that differ from the defaults.

        Raises:
            ValueError: for a hyperparameter outside its domain, parameters of an unsupported dtype, or
                parameters of a group with ``use_muon`` that have fewer than two dimensions; nothing has been
                added.
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

    # ---- step -----------------------------------------------------------------------------------------

    def _next_steps(self, groups: list[Group], observed: Sequence[Any], counted: Sequence[bool]) -> list[Any]:
        for index, group in enumerate(self.param_groups):
            if group["use_muon"]:
                where = f" in parameter group {index}"
                self._check_hyperparameters(group, where)
                self._check_parameters(group, where)
        return super()._next_steps(groups, observed, counted)
