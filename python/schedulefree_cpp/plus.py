"""ScheduleFree+: AdamC with a Polyak step size and an interpolation weight that may be annealed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp import _compiled, _sharded, ops
from schedulefree_cpp._base import COUNT, DECAY_RATE, Y_BETA, Batch, Domain, Update
from schedulefree_cpp._library import _C
from schedulefree_cpp._modes import Group
from schedulefree_cpp.adamw import AdamOptimizer

OPEN_INTERVAL = Domain(lambda v: 0 < v < 1, "a value in (0, 1)")


class AdamCScheduleFreePlus(AdamOptimizer):
    r"""ScheduleFree+ (arXiv 2605.19095): no schedule, no warmup, and a step size from the loss.

    The step size of ``z`` is ``lr * max(0, f + ip) / l1`` with ``f`` the loss, ``ip = beta * <g, z - x>`` and
    ``l1`` the running mean of ``sum |g| * sqrt(pi/2)``. So each step needs the loss: :meth:`step` with a
    closure, or :meth:`step_func` with its value. Weight decay is that of AdamC (arXiv 2506.02285), scaled by
    the square of the step size: values are more like 20 or 50 than 0.1.

    What the sums need of ``x`` follows from ``z - x = (z - y)/beta``; neither ``x`` nor ``y`` is stored.

    Args:
        params: parameters, or dicts that define parameter groups. Their dtype may be float32, float64,
            bfloat16 or float16; the state of 16-bit parameters is float32.
        lr: factor on the Polyak step size, a float or a one-element tensor, >= 0, and at least ``eps``.
        betas: decay rates of the mean gradient and of the mean squared gradient, in [0, 1).
        sf_beta1: interpolation weight of ``y = beta*x + (1-beta)*z``, in (0, 1).
        eps: added to the root of the mean squared gradient, >= 0.
        weight_decay: decay coefficient, >= 0, times the square of the step size.
        r: averaging weights grow as ``step**r``.
        polyak_beta: decay rate of the running mean of ``sum |g|``, in [0, 1). At 0 it is that of the step.
        c_warmup: steps during which ``x`` follows ``z``, >= 0.
        sf_beta1_anneal_steps: steps in which the interpolation weight goes from ``sf_beta1`` to
            ``sf_beta1_max``, >= 0; 0 leaves it where it is.
        sf_beta1_max: the interpolation weight at the end of that, in (0, 1).
        weight_lr_power: averaging weights grow as ``lr_max**weight_lr_power``.

    Raises:
        ValueError: naming the hyperparameter, its value and its domain.

    What concerns all groups together (the step count, ``polyak_beta``, the three ``sf_beta1``) is that of the
    first group. After a step the groups hold ``scheduled_lr``, ``grad_l1_ema``, ``grad_l1_ema_corr``,
    ``function_value_ema`` and ``ip_term``.
    """

    supports_capturable: ClassVar[bool] = False

    # Of the step that is being taken.
    _polyak: _C.PolyakStep
    _function_value = 0.0
    _ip_term = 0.0

    # Whether the running mean goes on from its corrected value.
    keeps_corrected_ema: ClassVar[bool] = False

    extras: ClassVar[dict[str, Any]] = {}
    betas_domains: ClassVar[tuple[Domain, Domain]] = (DECAY_RATE, DECAY_RATE)
    domains: ClassVar[dict[str, Domain]] = {
        **AdamOptimizer.domains,
        "sf_beta1": OPEN_INTERVAL,
        "sf_beta1_max": OPEN_INTERVAL,
        "polyak_beta": DECAY_RATE,
        "c_warmup": COUNT,
        "sf_beta1_anneal_steps": COUNT,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
        sf_beta1: float = 0.9,
        eps: float = 1e-8,
        weight_decay: float = 0,
        r: float = 0,
        polyak_beta: float = 0,
        c_warmup: int = 0,
        sf_beta1_anneal_steps: int = 0,
        sf_beta1_max: float = 0.965,
        weight_lr_power: float = 2,
    ) -> None:
        """Checks the hyperparameters and builds the groups."""
        defaults = {
            "lr": lr,
            "betas": betas,
            "sf_beta1": sf_beta1,
            "eps": eps,
            "r": r,
            "polyak_beta": polyak_beta,
            "sf_beta1_anneal_steps": sf_beta1_anneal_steps,
            "sf_beta1_max": sf_beta1_max,
            "grad_l1_ema": 0.0,
            "polyak_denom_ema": 0.0,
            "c_warmup": c_warmup,
            "weight_lr_power": weight_lr_power,
            "weight_decay": weight_decay,
            "lr_max": eps,
        }
        super().__init__(params, defaults)

    # ---- scalars --------------------------------------------------------------------------------------

    def _beta_at(self, k: int) -> float:
        first = self.param_groups[0]
        return _C.annealed_beta(
            k=k,
            beta=float(first["sf_beta1"]),
            beta_max=float(first["sf_beta1_max"]),
            anneal_steps=int(first["sf_beta1_anneal_steps"]),
        )

    def _beta(self, group: Group) -> float:
        return self._beta_at(self.param_groups[0]["k"])

    def _last_beta(self, group: Group) -> float:
        return self._beta_at(max(self.param_groups[0]["k"] - 1, 0))

    def _inner_momentum(self, group: Group) -> float:
        return float(group["betas"][0])

    def _lr(self, group: Group) -> float:
        return max(float(group["lr"]), float(group["eps"]))

    def _lr_factor(self, group: Group, k: int) -> float:
        return self._polyak.lr_factor

    def _scalars(self, update: Update) -> dict[str, Any]:
        scalars = super()._scalars(update)
        scalars["weight_decay"] *= update.schedule.lr
        return scalars

    # ---- step -----------------------------------------------------------------------------------------

    def step_func(self, function_value: float | Tensor) -> float | Tensor:
        """Takes one step with the loss at the current parameters.

        Args:
            function_value: the loss that the gradients are of; finite.

        Returns:
            The same loss.

        Raises:
            RuntimeError: in eval mode.
            ValueError: for a loss or gradients that are not finite.
        """
        self.step(function_value=function_value)
        return function_value

    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, function_value: float | Tensor | None = None
    ) -> float | None:
        """Takes one step with the loss that a closure returns.

        Args:
            closure: reevaluates the model and returns the loss.
            function_value: the loss, where there is no closure.

        Returns:
            What the closure returned, or ``None`` without one.

        Raises:
            RuntimeError: in eval mode, or without a loss.
            ValueError: for a loss or gradients that are not finite.
        """
        if closure is None and isinstance(function_value, Tensor) and _compiled.takes(self):
            _compiled.step(self, function_value.detach())
            return None
        loss: float | None = self._step_plus(closure, function_value)
        return loss

    def _step_compiled(self, loss: Any) -> None:
        self._step_plus(None, loss)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _step_plus(
        self, closure: Callable[[], float] | None, function_value: float | Tensor | None
    ) -> float | None:
        if closure is not None:
            loss: float | None = self._step(closure)
            return loss
        if function_value is None and self._creates_state_only():
            return None
        self._require_train_mode()
        if function_value is None:
            raise RuntimeError(
                f"{type(self).__name__} takes its step size from the loss: call step(closure), or "
                "step_func(loss) after backward()"
            )
        self._update(function_value)
        return None

    def step_parameter(self, p: Tensor) -> None:
        """Not possible: the step size comes from a sum over all gradients."""
        raise RuntimeError(
            f"{type(self).__name__} cannot step within backward: its step size comes from a sum over all "
            "gradients"
        )

    def step_in_backward(self) -> Any:
        """Not possible: the step size comes from a sum over all gradients."""
        self.step_parameter(self.param_groups[0]["params"][0])

    def _check_hyperparameters(self, group: Group, where: str) -> None:
        super()._check_hyperparameters(group, where)
        if group.get("max_grad_norm") is not None:
            raise ValueError(
                f"Invalid max_grad_norm{where}: {group['max_grad_norm']!r}, expected None: the step size "
                "comes from the gradients as they are"
            )

    def _survey(self, batches: list[tuple[int, Batch]], loss: Any) -> None:
        first = self.param_groups[0]
        beta_next = self._beta(first)
        grad_l1, inner_product = 0.0, 0.0
        for index, batch in batches:
            absolute, inner = _sums(batch).tolist()
            grad_l1 += absolute
            inner_product += inner / float(batch.state[0].get(Y_BETA, self._y_beta[index]))
        self._function_value, self._ip_term = _number(loss), beta_next * inner_product
        self._polyak = _C.polyak_step(
            k=first["k"],
            function_value=self._function_value,
            grad_l1=grad_l1,
            ip_term=self._ip_term,
            polyak_beta=float(first["polyak_beta"]),
            grad_l1_ema=first["grad_l1_ema"],
        )

    def _finish(self, group: Group, schedule: _C.ScheduleStep) -> None:
        super()._finish(group, schedule)
        polyak = self._polyak
        group["grad_l1_ema_corr"] = polyak.grad_l1_ema_corr
        group["grad_l1_ema"] = polyak.grad_l1_ema_corr if self.keeps_corrected_ema else polyak.grad_l1_ema
        group["function_value_ema"] = self._function_value + self._ip_term
        group["ip_term"] = self._ip_term


def _sums(batch: Batch) -> Tensor:
    """The sums of ``polyak_sums`` over a batch, of which this process may hold pieces."""
    lists = (batch.y, batch.y_lo, batch.grad, batch.stream("z"))
    if batch.plain:
        return ops.polyak_sums(*lists)
    return _sharded.total(
        batch.params, lambda at: ops.polyak_sums(*([tensors[i] for i in at if tensors] for tensors in lists))
    )


def _number(loss: Any) -> float:
    try:
        return float(loss)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Invalid function_value: {loss!r}, expected a finite loss") from error


class AdamCScheduleFreePlusPaper(AdamCScheduleFreePlus):
    """ScheduleFree+ as its authors' code computes it (facebookresearch/schedule_free, commit 70785b5).

    The running mean of ``sum |g|`` goes on from its bias-corrected value, so that with ``polyak_beta > 0`` it
    is corrected again in each step. Otherwise :class:`AdamCScheduleFreePlus`.
    """

    keeps_corrected_ema: ClassVar[bool] = True
