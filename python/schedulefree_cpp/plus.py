"""ScheduleFree+: AdamC with a Polyak step size and an interpolation weight that may be annealed."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp import ops
from schedulefree_cpp._core import sharded
from schedulefree_cpp._core.compiled import eager
from schedulefree_cpp._core.group import Gathered, Group, norm_of
from schedulefree_cpp._core.hyperparameters import arguments
from schedulefree_cpp._core.library import _C
from schedulefree_cpp._core.types import Loss, Nonfinite, ParamGroup, has_values, read_values
from schedulefree_cpp.adamw import AdamGroup, AdamOptimizer

_NORMS_TAKEN = 10  # in so many first steps the norm of gradients is taken, which costs one pass over them
_STEPS_WATCHED = 100


class Beginning:
    """Watches the first steps for what makes a Polyak step size too large, and warns of each once."""

    def __init__(self, loss: float, grad_l1: float) -> None:
        """Keeps the first loss and the first sum of absolute gradients."""
        self.loss: float = loss
        self.grad_l1: float = grad_l1
        self.sizes: deque[tuple[float, float]] = deque(maxlen=3)  # of gradients: their norm, and their sum
        self.said: set[str] = set()

    def look(self, loss: float, grad_l1: float, norm: float | None, lr: float) -> None:
        """Looks at one step.

        Gradients that are scaled to a norm have the same norm step after step, while their sum of absolute
        values moves. A first step size that is too large has the loss and the gradients grow.
        """
        if norm is not None:
            self.sizes.append((norm, grad_l1))
            pairs = [*zip(self.sizes, [*self.sizes][1:], strict=False)]
            if len(pairs) == 2 and all(
                abs(a - b) < 1e-4 * b and abs(l1_a - l1_b) > 1e-3 * l1_b for (a, l1_a), (b, l1_b) in pairs
            ):
                self._warn(
                    "clipped",
                    f"the gradients had the norm {norm:.4g} in three steps in a row, as clip_grad_norm_() "
                    "leaves it. The step size is divided by the size of gradients, so clipping makes steps "
                    "larger: do not clip",
                )
        if loss > 1.1 * self.loss > 0 and grad_l1 > 4 * self.grad_l1 > 0:
            self._warn(
                "grown",
                f"the loss has grown from {self.loss:.4g} in the first step to {loss:.4g}, and the gradients "
                f"by {grad_l1 / self.grad_l1:.2g}. Try a smaller lr than {lr:.4g}, or c_warmup",
            )

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self.said:
            self.said.add(kind)
            warnings.warn(f"ScheduleFree+: {text}.", RuntimeWarning, stacklevel=2)


class PlusGroup(AdamGroup):
    """A group that takes ScheduleFree+'s step; ``next_beta`` and ``polyak`` are of all groups."""

    kind: int = ops.STEP_KINDS["plus"]
    required: ClassVar[tuple[str, ...]] = (*AdamGroup.required, "sf_beta1")
    beta_domains: ClassVar[tuple[str, str]] = ("betas[1]", "betas[1]")
    layout_keys: ClassVar[tuple[str, ...]] = (*AdamGroup.layout_keys, "betas")
    next_beta: float = 0.9
    polyak: _C.PolyakStep
    beginning: Beginning | None = None  # of the first group, for all
    told: dict[str, float]  # what the group then holds of the step

    def beta(self) -> float:
        """The interpolation weight of the next y."""
        return self.next_beta

    @staticmethod
    def state_names(group: ParamGroup) -> tuple[str, ...]:
        """The tensors of a state in the order of the operator, from z on; "" for an absent list."""
        return ("z", "exp_avg_sq", "exp_avg" if group["betas"][0] else "")

    def schedule(self, norm: float) -> _C.ScheduleStep:
        """The next step, of which nothing is stored."""
        group, lr = self.group, float(self.group["lr"])
        return _C.schedule_step(
            group,
            kind=self.kind,
            beta=self.y_beta,
            beta_next=self.next_beta,
            lr=max(lr, float(group["eps"])) if lr >= 0 else lr,  # a negative one is then refused
            inner_momentum=float(group["betas"][0]),
            c_warmup=int(group["c_warmup"]),
            lr_factor=self.polyak.lr_factor,
            grad_norm=norm,
        )

    def counts_at_rest(self, stepped: Collection[Tensor]) -> bool:
        """True: the steps of the first group are those of all."""
        return True

    def store(
        self, step: _C.ScheduleStep, all_state: Any, resting: Sequence[int], counts: bool = True
    ) -> None:
        """Writes the schedule after a step into the group; parameters that took none get the new beta."""
        super().store(step, all_state, resting, counts)
        self.group.update(self.told)


class AdamCScheduleFreePlus(AdamOptimizer):
    r"""ScheduleFree+ (arXiv 2605.19095): no schedule, no warmup, and a step size from the loss.

    The step size comes from the loss (Polyak), so each step needs it: `step` with a closure, or `step_func`
    with its value. Weight decay is that of AdamC (arXiv 2506.02285), scaled by the square of the step size:
    values are more like 20 or 50 than 0.1.

    Example::

        import torch
        from schedulefree_cpp import AdamCScheduleFreePlus

        model = torch.nn.Linear(8, 1)
        optimizer = AdamCScheduleFreePlus(model.parameters())
        optimizer.train()
        for inputs in torch.randn(100, 16, 8):
            optimizer.zero_grad()
            loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            loss.backward()
            optimizer.step_func(loss)
        optimizer.eval()

    Algorithm::

        beta1, beta2 = betas
        x = z = y  # all parameters
        m = v = l1 = lr_max = weight_sum = 0
        for k in range(steps):
            done = min(1, k / sf_beta1_anneal_steps)  # 0 where sf_beta1_anneal_steps is 0
            beta = 1 - (1 - sf_beta1) ** (1 - done) * (1 - sf_beta1_max) ** done
            g = gradient(y)
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            u = m / (1 - beta1 ** (k + 1)) / (sqrt(v / (1 - beta2 ** (k + 1))) + eps)
            l1 = polyak_beta * l1 + (1 - polyak_beta) * sqrt(pi / 2) * sum(abs(g))
            gap = max(0, loss(y) + beta * sum(g * (z - x)))
            lr_k = lr * gap / (l1 / (1 - polyak_beta ** (k + 1)))
            z = z - lr_k * (u + lr_k * weight_decay * y)
            lr_max = max(lr_max, lr_k)
            c = 1
            if k >= c_warmup:
                weight = (k + 1) ** r * lr_max**weight_lr_power
                weight_sum = weight_sum + weight
                c = weight / weight_sum
            x = (1 - c) * x + c * z  # what is evaluated and saved
            y = beta * x + (1 - beta) * z

    Neither ``x`` nor ``y`` is stored: what the sum needs follows from ``z - x = (z - y)/beta``.

    Args:
        params: parameters, or dicts that define parameter groups. Their dtype may be float32, float64,
            bfloat16 or float16; those of 16 bits train as float32 does.
        lr: factor on the Polyak step size, a float or a one-element tensor, >= 0, and at least ``eps``.
        betas: decay rates of the mean gradient and of the mean squared gradient, in [0, 1).
        sf_beta1: interpolation weight of ``y = beta*x + (1-beta)*z``, in (0, 1).
        eps: added to the root of the mean squared gradient, >= 0.
        weight_decay: decay coefficient, >= 0, times the square of the step size.
        r: averaging weights grow as ``step**r``.
        polyak_beta: decay rate of the running mean of ``sum |g|``, in [0, 1); 0 takes the step's sum alone.
        c_warmup: steps during which ``x`` follows ``z``, >= 0.
        sf_beta1_anneal_steps: steps in which the interpolation weight goes from ``sf_beta1`` to
            ``sf_beta1_max``, >= 0; 0 leaves it where it is.
        sf_beta1_max: the interpolation weight at the end of that, in (0, 1).
        weight_lr_power: averaging weights grow as ``lr_max**weight_lr_power``.
        nonfinite: what a step does where a gradient is not finite. ``"propagate"`` raises ValueError, since
            there is no step size then; ``"raise"`` also names the parameter; ``"skip"`` leaves everything as
            it was. The last two need one more pass over the gradients. One choice for all groups.

    Raises:
        ValueError: naming the hyperparameter, its value and its domain.

    The step count, ``polyak_beta`` and the three ``sf_beta1`` of the first group hold for all groups. After a
    step the groups hold ``scheduled_lr``, ``grad_l1_ema``, ``grad_l1_ema_corr``, ``function_value_ema`` and
    ``ip_term``.
    """

    _group_type: ClassVar[type[AdamGroup]] = PlusGroup
    _supports_capturable: ClassVar[bool] = False

    # True where the running mean goes on from its corrected value.
    _keeps_corrected_ema: ClassVar[bool] = False

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
        *,
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        """Checks the hyperparameters and builds the groups."""
        super().__init__(
            params, arguments(locals()) | {"grad_l1_ema": 0.0, "polyak_denom_ema": 0.0, "lr_max": eps}
        )

    def _check_hyperparameters(self, group: Mapping[str, Any], where: str) -> None:
        super()._check_hyperparameters(group, where)
        if group.get("max_grad_norm") is not None:
            raise ValueError(
                f"Invalid max_grad_norm{where}: {group['max_grad_norm']!r}, expected None: the step size "
                "comes from the gradients as they are"
            )

    # ---- the schedule ---------------------------------------------------------------------------------

    def _beta_at(self, k: int) -> float:
        first = self.param_groups[0]
        return _C.annealed_beta(
            k=k,
            beta=float(first["sf_beta1"]),
            beta_max=float(first["sf_beta1_max"]),
            anneal_steps=int(first["sf_beta1_anneal_steps"]),
        )

    def _initial_y_beta(self, record: Group) -> float:
        return self._beta_at(max(self.param_groups[0]["k"] - 1, 0))

    def _observe(self, groups: list[Group], gathered: list[Gathered], loss: Any, measures: bool) -> list[Any]:
        """The loss, in the first steps the norm of gradients, and the ``polyak_sums`` of each group."""
        if loss is None:
            raise RuntimeError(
                f"{type(self).__name__} takes its step size from the loss: call step(closure), or "
                "step_func(loss) after backward()"
            )
        norm = None
        if not torch.compiler.is_compiling() and self.param_groups[0]["k"] < _NORMS_TAKEN:
            norm = norm_of(gathered, all(group.plain for group in groups))
        return [*super()._observe(groups, gathered, loss, measures), loss, norm, *map(_sums, gathered)]

    def _next_steps(self, groups: list[Group], observed: Sequence[Any], counted: Sequence[bool]) -> list[Any]:
        first = self.param_groups[0]
        _, _, _, loss, norm, *sums = observed
        grad_l1, inner_product = 0.0, 0.0
        for of_group, group in zip(sums, groups, strict=True):
            absolute, inner = read_values(of_group)
            grad_l1 += absolute
            inner_product += inner / group.y_beta
        next_beta, function_value = self._beta_at(first["k"]), _number(loss)
        ip_term = next_beta * inner_product
        polyak = _C.polyak_step(
            k=first["k"],
            function_value=function_value,
            grad_l1=grad_l1,
            ip_term=ip_term,
            polyak_beta=float(first["polyak_beta"]),
            grad_l1_ema=first["grad_l1_ema"],
        )
        self._watch(groups[0], function_value, grad_l1, norm)
        corrected, ema = polyak.grad_l1_ema_corr, polyak.grad_l1_ema
        told = {
            "grad_l1_ema_corr": corrected,
            "grad_l1_ema": corrected if self._keeps_corrected_ema else ema,
            "function_value_ema": function_value + ip_term,
            "ip_term": ip_term,
        }
        for group in groups:
            assert isinstance(group, PlusGroup)
            group.next_beta, group.polyak, group.told = next_beta, polyak, told
        return super()._next_steps(groups, observed, counted)

    def _watch(self, record: Group, loss: float, grad_l1: float, norm: Tensor | None) -> None:
        assert isinstance(record, PlusGroup)
        k = self.param_groups[0]["k"]
        if k == 0:
            record.beginning = Beginning(loss, grad_l1)
        if record.beginning is not None:
            value = None if norm is None else read_values(norm)[0]
            record.beginning.look(loss, grad_l1, value, float(self.param_groups[0]["lr"]))
            if k >= _STEPS_WATCHED:
                record.beginning = None

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

    @overload
    def step(self, closure: None = None, *, function_value: float | Tensor | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss], *, function_value: float | Tensor | None = None) -> Loss: ...

    def step(
        self, closure: Callable[[], Loss] | None = None, *, function_value: float | Tensor | None = None
    ) -> Loss | None:
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
        loss: Loss | None = None if closure is None else self._call(closure)
        value: Any = function_value if closure is None else _number(None) if loss is None else loss
        if isinstance(value, Tensor):
            self._step(value.detach())
        else:
            _step_with_number(self, value)
        return loss

    def step_parameter(self, p: Tensor) -> None:
        """Not possible: the step size comes from a sum over all gradients."""
        raise RuntimeError(
            f"{type(self).__name__} cannot step within backward: its step size comes from a sum over all "
            "gradients"
        )

    def step_in_backward(self) -> Any:
        """Not possible: the step size comes from a sum over all gradients."""
        self.step_parameter(self.param_groups[0]["params"][0])


def _sums(gathered: Gathered) -> Tensor:
    """The sums of ``polyak_sums``, of tensors of which this process may hold pieces."""
    if not gathered.params:
        return torch.zeros(2, dtype=torch.float64, device="cpu")
    y, y_lo, grad, z, *_ = gathered.lists
    if y is gathered.params:
        return ops.polyak_sums(y, y_lo, grad, z)

    def of(positions: list[int]) -> Tensor:
        few = [[tensors[i] for i in positions if tensors] for tensors in (y, y_lo, grad, z)]
        return ops.polyak_sums(*few)

    return sharded.all_reduced(gathered.params, of)


@eager
def _step_with_number(optimizer: AdamCScheduleFreePlus, function_value: float | None) -> None:
    # Compiled code would hold it as a constant.
    optimizer._step(function_value, probe=function_value is None)


def _number(loss: Any) -> float:
    if isinstance(loss, Tensor) and not has_values(loss):
        return 0.0
    try:
        return float(loss.detach() if isinstance(loss, Tensor) else loss)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"Invalid function_value: {loss!r}, expected a finite loss") from error


class AdamCScheduleFreePlusPaper(AdamCScheduleFreePlus):
    """ScheduleFree+ as its authors' code computes it (facebookresearch/schedule_free, commit 70785b5).

    The running mean of ``sum |g|`` goes on from its bias-corrected value, so that with ``polyak_beta > 0`` it
    is corrected again in each step.

    Example::

        import torch
        from schedulefree_cpp import AdamCScheduleFreePlusPaper

        weights = torch.nn.Parameter(torch.zeros(8))
        optimizer = AdamCScheduleFreePlusPaper([weights], polyak_beta=0.5)
        optimizer.train()

        def closure():
            optimizer.zero_grad()
            loss = (weights - 1).square().sum()
            loss.backward()
            return loss

        for _ in range(100):
            optimizer.step(closure)
        optimizer.eval()

    Args:
        params: parameters, or dicts that define parameter groups.
        lr, betas, sf_beta1, eps, weight_decay, r, polyak_beta, c_warmup: see `AdamCScheduleFreePlus`.
        sf_beta1_anneal_steps, sf_beta1_max, weight_lr_power, nonfinite: see `AdamCScheduleFreePlus`.

    Raises:
        ValueError: naming the hyperparameter, its value and its domain.
    """

    _keeps_corrected_ema: ClassVar[bool] = True
