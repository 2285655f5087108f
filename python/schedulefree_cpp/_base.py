"""What every schedule-free optimizer shares: groups, state, train/eval, the step, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from schedulefree_cpp import ops
from schedulefree_cpp._library import _C

Group: TypeAlias = dict[str, Any]
State: TypeAlias = dict[str, Tensor]

PARAMETER_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# The beta that built y, written to a checkpoint only where a scheduler has moved the group's beta since.
_Y_BETA = "y_beta"


@dataclass(frozen=True)
class Domain:
    """Values that a hyperparameter may take."""

    holds: Callable[[float], bool]
    text: str

    def check(self, name: str, value: object, where: str = "") -> None:
        """Raises ValueError naming the hyperparameter, its value and its domain."""
        try:
            ok = self.holds(float(value))  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError, RuntimeError):
            ok = False
        if not ok:
            raise ValueError(f"Invalid {name}{where}: {value!r}, expected {self.text}")


NON_NEGATIVE = Domain(lambda v: 0 <= v < math.inf, "a finite value >= 0")
FINITE = Domain(math.isfinite, "a finite value")
COUNT = Domain(lambda v: v >= 0 and v.is_integer(), "an integer >= 0")
INTERPOLATION = Domain(
    lambda v: 0 < v <= 1, "a value in (0, 1]: at 0 the parameters would carry nothing of the average"
)
DECAY_RATE = Domain(lambda v: 0 <= v < 1, "a value in [0, 1)")


class Batch(NamedTuple):
    """Parameters that one operator call updates, with what belongs to them, position by position."""

    y: list[Tensor]
    grad: list[Tensor]
    state: list[State]

    def stream(self, name: str) -> list[Tensor]:
        """One state tensor of every parameter."""
        try:
            return [state[name] for state in self.state]
        except KeyError:
            raise RuntimeError(
                f"the state of a parameter lacks {name!r}, which this group's hyperparameters need: set them "
                "before the first step, or load a checkpoint that was made with them"
            ) from None


class ScheduleFreeOptimizer(Optimizer):
    """Base of the schedule-free optimizers; not used directly.

    A parameter holds ``y`` in train mode, where gradients are taken, and the average ``x`` in eval mode.
    The base iterate ``z`` is the state. Notation and formulas: Defazio et al., "The Road Less Scheduled",
    arXiv 2405.15682; the arithmetic is in ``csrc/update_math.h``, the schedule in ``csrc/schedule.h``.
    """

    # Hyperparameters that upstream's groups lack. A group holds them only where they differ from these
    # defaults, so that flattened checkpoints, which need equal keys, go both ways.
    extras: ClassVar[dict[str, Any]] = {"maximize": False, "decay_at": "y"}
    domains: ClassVar[dict[str, Domain]] = {
        "lr": NON_NEGATIVE,
        "weight_decay": NON_NEGATIVE,
        "warmup_steps": COUNT,
        "r": FINITE,
        "weight_lr_power": FINITE,
    }

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        """Checks the hyperparameters and builds the groups."""
        self._y_beta: list[float] = []
        schedule = {
            "k": 0,
            "train_mode": False,
            "weight_sum": 0.0,
            "lr_max": -1.0,
            "scheduled_lr": 0.0,
        }
        changed = {
            key: value
            for key, value in defaults.items()
            if key not in self.extras or value != self.extras[key]
        }
        self._check_hyperparameters(changed, "")
        super().__init__(params, changed | schedule)

    # ---- what a subclass says -------------------------------------------------------------------------

    # The step operator. Takes y, y_lo, grad, z, the lists of _moments() and the scalars of _scalars().
    operator: ClassVar[Callable[..., None]]

    def _beta(self, group: Group) -> float:
        """The interpolation weight of the next y."""
        raise NotImplementedError

    def _lr_factor(self, group: Group) -> float:
        """Factor on the learning rate of the next step, beside warmup."""
        return 1.0

    def _new_moments(self, group: Group, z: Tensor) -> State:
        """Initial state of a parameter beside z."""
        return {}

    def _moments(self, group: Group, batch: Batch) -> list[list[Tensor]]:
        """The operator's lists after z."""
        return []

    def _scalars(self, group: Group, schedule: _C.ScheduleStep) -> dict[str, Any]:
        """The operator's scalars."""
        return {
            "lr": schedule.lr,
            "w": schedule.w,
            "a": schedule.a,
            "weight_decay": float(group["weight_decay"]),
            "decay_at": ops.DECAY_AT[group.get("decay_at", "y")],
            "grad_mul": -1.0 if group.get("maximize", False) else 1.0,
        }

    # ---- groups ---------------------------------------------------------------------------------------

    def _check_hyperparameters(self, group: Group, where: str) -> None:
        for name, domain in self.domains.items():
            if name in group:
                domain.check(name, group[name], where)
        if group.get("decay_at", "y") not in ops.DECAY_AT:
            raise ValueError(
                f"Invalid decay_at{where}: {group['decay_at']!r}, expected one of {list(ops.DECAY_AT)}"
            )

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, in the mode the optimizer is in.

        Args:
            param_group: ``params`` and any hyperparameters that differ from the defaults.

        Raises:
            ValueError: for a hyperparameter outside its domain or parameters of an unsupported dtype;
                nothing has been added.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        index = len(self.param_groups)
        where = f" in parameter group {index}"
        self._check_hyperparameters(self.defaults | param_group, where)
        super().add_param_group(param_group)
        group = self.param_groups[index]
        for i, p in enumerate(group["params"]):
            if p.dtype not in PARAMETER_DTYPES:
                del self.param_groups[index]
                raise ValueError(
                    f"Invalid params[{i}]{where}: dtype {p.dtype}, expected one of "
                    f"{', '.join(map(str, PARAMETER_DTYPES))}"
                )
        group["train_mode"] = bool(index) and self.param_groups[0]["train_mode"]
        self._y_beta.append(self._beta(group))

    # ---- train and eval -------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> None:
        """Puts the parameters at ``y``, where gradients are taken. Idempotent.

        Args:
            mode: ``False`` means :meth:`eval`, as in ``torch.nn.Module.train``.
        """
        for index, group in enumerate(self.param_groups):
            if group["train_mode"] != mode:
                self._swap(group, index, mode)

    def eval(self) -> None:
        """Puts the parameters at the average ``x``, which is to be evaluated and saved. Idempotent."""
        self.train(False)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _swap(self, group: Group, index: int, to_train: bool) -> None:
        beta = self._beta(group) if to_train else self._y_beta[index]
        swap = ops.x_to_y_ if to_train else ops.y_to_x_
        plain, split = (Batch(*lists) for lists in _C.gather(group["params"], self.state, False, None)[:2])
        if plain.y:
            swap(plain.y, [], plain.stream("z"), beta=beta)
        if split.y:
            swap(split.y, split.stream("y_lo"), split.stream("z"), beta=beta)
        self._y_beta[index] = beta
        group["train_mode"] = to_train

    # ---- step -----------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one optimization step. Gradients are only read.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or ``None`` without one.

        Raises:
            RuntimeError: in eval mode, or for a gradient that the operators do not take (a sparse one).
            ValueError: for a hyperparameter that has been moved outside its domain.
        """
        for index, group in enumerate(self.param_groups):
            if not group["train_mode"]:
                raise RuntimeError(
                    f"step() was called while parameter group {index} is in eval mode, where the "
                    "parameters are the average x. Call optimizer.train() before training and "
                    "optimizer.eval() before evaluating or saving."
                )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        # First everything that can be refused, for all groups; then everything that changes.
        created: dict[Tensor, State] = {}
        schedules = []
        calls = []
        for index, group in enumerate(self.param_groups):
            schedule = _C.advance(
                k=group["k"],
                weight_sum=group["weight_sum"],
                lr_max=group["lr_max"],
                lr=float(group["lr"]),
                lr_factor=self._lr_factor(group),
                warmup_steps=int(group.get("warmup_steps", 0)),
                r=group["r"],
                weight_lr_power=group["weight_lr_power"],
                beta=self._y_beta[index],
                beta_next=self._beta(group),
            )
            schedules.append(schedule)
            scalars = self._scalars(group, schedule)
            plain, split = self._active(group, index, created)
            if plain.y:
                lists = (plain.y, [], plain.grad, plain.stream("z"), *self._moments(group, plain))
                calls.append((lists, scalars))
            if split.y:
                y_lo = split.stream("y_lo")
                lists = (split.y, y_lo, split.grad, split.stream("z"), *self._moments(group, split))
                calls.append((lists, scalars))

        operator = type(self).operator
        self.state.update(created)
        for lists, scalars in calls:
            operator(*lists, **scalars)
        for index, (group, schedule) in enumerate(zip(self.param_groups, schedules, strict=True)):
            self._y_beta[index] = self._beta(group)
            group["scheduled_lr"] = schedule.lr
            group["lr_max"] = schedule.lr_max
            group["weight_sum"] = schedule.weight_sum
            group["k"] = schedule.k
        return loss

    def _active(self, group: Group, index: int, created: dict[Tensor, State]) -> tuple[Batch, Batch]:
        """The parameters that have a gradient, without and with a low half of y.

        State that some still lack goes to ``created``.
        """
        # Among several groups, no operator may refuse what another has already been allowed to change.
        layout = torch.strided if len(self.param_groups) > 1 else None
        params, states = group["params"], self.state
        plain, split, attention = _C.gather(params, states, True, layout)
        if attention:
            for i in attention:
                p = params[i]
                if p.grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"params[{i}] in parameter group {index} has a gradient of layout {p.grad.layout}: "
                        "schedule-free optimizers take dense gradients only"
                    )
                created[p] = self._complete_state(group, p, dict(states.get(p, ())))
            plain, split, _ = _C.gather(params, states | created, True, layout)
        return Batch(*plain), Batch(*split)

    def _complete_state(self, group: Group, p: Tensor, state: State) -> State:
        """Adds what a parameter's state lacks; all of it before the first step."""
        if "z" not in state:
            state["z"] = torch.empty_like(p, dtype=_state_dtype(p), requires_grad=False).copy_(p)
        for name, moment in self._new_moments(group, state["z"]).items():
            state.setdefault(name, moment)
        if p.dtype == torch.bfloat16 and "y_lo" not in state:
            # With these 16 bits more, y keeps the precision of float32.
            state["y_lo"] = torch.zeros_like(p, dtype=torch.int16, requires_grad=False)
        return state

    # ---- checkpoints ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep."""
        return {**super().__getstate__(), "_y_beta": self._y_beta}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores from pickle, deepcopy or a state dict, older ones included."""
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":
                    group.setdefault(key, value)
            for p in group["params"]:
                tensors = self.state.get(p)
                if not tensors:
                    continue
                for name, value in tensors.items():
                    if isinstance(value, _Protected):
                        tensors[name] = value.restore(p, name)
                if "z" in tensors:
                    self._complete_state(group, p, tensors)

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``, with the keys of ``schedulefree``."""
        state_dict = super().state_dict()
        for group, saved, beta in zip(
            self.param_groups, state_dict["param_groups"], self._y_beta, strict=True
        ):
            if group["train_mode"] and beta != self._beta(group):
                saved[_Y_BETA] = beta
        return state_dict

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of its namesake in ``schedulefree``.

        The state is copied, and kept in float32 where the parameters are of 16 bits.

        Args:
            state_dict: what :meth:`state_dict` returned.
        """
        # The base class would cast every state tensor to its parameter's dtype.
        handle = self.register_load_state_dict_pre_hook(_protect)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._y_beta = [group.pop(_Y_BETA, self._beta(group)) for group in self.param_groups]


def _state_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


class _Protected:
    """A state tensor on its way through ``Optimizer.load_state_dict``, which must not cast it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def restore(self, p: Tensor, name: str) -> Tensor:
        """A copy on the parameter's device, in the state's own dtype and the parameter's strides."""
        dtype = torch.int16 if name == "y_lo" else _state_dtype(p)
        if self.value.shape != p.shape:
            return self.value.to(device=p.device, copy=True)
        return torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(self.value)


def _protect(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    state = {
        key: {name: _Protected(v) if isinstance(v, Tensor) else v for name, v in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def check_betas(betas: Sequence[float], where: str) -> None:
    """Raises ValueError unless there are two coefficients inside their domains."""
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"Invalid betas{where}: {betas!r}, expected two values")
    INTERPOLATION.check("betas[0]", betas[0], where)
    DECAY_RATE.check("betas[1]", betas[1], where)
