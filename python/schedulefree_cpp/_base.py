"""What every schedule-free optimizer shares: groups, state, the swaps, the step, checkpoints."""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT
from torch.utils.hooks import RemovableHandle

from schedulefree_cpp import _capturable, _checkpoint, _compiled, _sharded, ops
from schedulefree_cpp._library import _C
from schedulefree_cpp._modes import OURS, Group, State, TwoModeOptimizer
from schedulefree_cpp._swap import KEPT, KEPT_AT, Kept, to_x, to_y

PARAMETER_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# The beta that built y, in a group's checkpoint only where it is not the one the group tells, and in the
# state of a parameter only where it is not the group's.
Y_BETA = "y_beta"

# What a parameter with its own step count has in its state.
_COUNTERS = ("k", "weight_sum", "lr_max")

# Hyperparameters without a domain that are checked nonetheless.
_WATCHED = ("betas", "decay_at", "max_grad_norm", "capturable", "per_parameter_steps")

# State whose dtype is not the parameter's.
_FIXED_DTYPES = {"y_lo": torch.int16, KEPT_AT: torch.int64, KEPT: torch.float64}


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
POSITIVE = Domain(lambda v: v > 0, "a value > 0, or None")
FINITE = Domain(math.isfinite, "a finite value")
COUNT = Domain(lambda v: v >= 0 and v.is_integer(), "an integer >= 0")
INTERPOLATION = Domain(
    lambda v: 0 < v <= 1, "a value in (0, 1]: at 0 the parameters would carry nothing of the average"
)
DECAY_RATE = Domain(lambda v: 0 <= v < 1, "a value in [0, 1)")


def check_dtypes(group: Group, where: str) -> None:
    """Raises ValueError for a parameter of a dtype that the operators do not take."""
    for i, p in enumerate(group["params"]):
        if p.dtype not in PARAMETER_DTYPES:
            raise ValueError(
                f"Invalid params[{i}]{where}: dtype {p.dtype}, expected one of "
                f"{', '.join(map(str, PARAMETER_DTYPES))}"
            )


class Batch(NamedTuple):
    """Parameters that one operator call updates, with what belongs to them, position by position.

    Operators get what this process holds of them: :attr:`y`, :attr:`grad` and :meth:`stream`.
    """

    params: list[Tensor]
    grad: list[Tensor]
    state: list[State]
    has_low: bool
    plain: bool  # whether no parameter can be in pieces

    @classmethod
    def of(cls, *fields: Any) -> Batch:
        """What was gathered. A collective call if gradients are in other pieces than their parameters."""
        batch = cls(*fields)
        if batch.plain:
            return batch
        return batch._replace(grad=list(map(_sharded.local_gradient, batch.grad, batch.params)))

    @property
    def y(self) -> list[Tensor]:
        """The parameters, or what this process holds of them."""
        return self.params if self.plain else [_sharded.local(p) for p in self.params]

    def stream(self, name: str) -> list[Tensor]:
        """One state tensor of every parameter."""
        try:
            tensors = [state[name] for state in self.state]
            return tensors if self.plain else [_sharded.local(t) for t in tensors]
        except KeyError:
            raise RuntimeError(
                f"the state of a parameter lacks {name!r}, which this group's hyperparameters need: set them "
                "before the first step, or load a checkpoint that was made with them"
            ) from None

    def written(self) -> None:
        """Tells autograd that parameters in pieces have changed; operators tell it of the pieces only."""
        if not self.plain:
            torch.autograd.graph.increment_version(self.params)

    @property
    def y_lo(self) -> list[Tensor]:
        """The low halves of y; empty where there are none."""
        return self.stream("y_lo") if self.has_low else []


# Scalars of a step: on the host, or the `coefs` of a capturable group.
Schedule: TypeAlias = _C.ScheduleStep | Tensor


class Update(NamedTuple):
    """What a step does to a batch."""

    batch: Batch
    group: Group
    group_index: int
    k: int
    schedule: Any  # a Schedule; of the kind that the group takes
    y_beta: Tensor | None = None  # after the step, where it is in a tensor and not the group's


class ScheduleFreeOptimizer(TwoModeOptimizer):
    """Base of the schedule-free optimizers; not used directly.

    A parameter holds ``y`` in train mode, where gradients are taken, and the average ``x`` in eval mode.
    The base iterate ``z`` is the state. Notation and formulas: Defazio et al., "The Road Less Scheduled",
    arXiv 2405.15682; the arithmetic is in ``csrc/update_math.h``, the schedule in ``csrc/schedule.h``.
    """

    # Hyperparameters that upstream's groups lack. A group holds them only where they differ from these
    # defaults, so that flattened checkpoints, which need equal keys, go both ways.
    extras: ClassVar[dict[str, Any]] = {
        "maximize": False,
        "decay_at": "y",
        "per_parameter_steps": False,
        "max_grad_norm": None,
        "capturable": False,
    }
    # What a group holds of the schedule before its first step.
    schedule_start: ClassVar[dict[str, Any]] = {
        "k": 0,
        "train_mode": False,
        "weight_sum": 0.0,
        "lr_max": -1.0,
        "scheduled_lr": 0.0,
    }
    domains: ClassVar[dict[str, Domain]] = {
        "lr": NON_NEGATIVE,
        "weight_decay": NON_NEGATIVE,
        "warmup_steps": COUNT,
        "r": FINITE,
        "weight_lr_power": FINITE,
    }

    # Of the gradients of the step that is being taken.
    _norm: Tensor | None = None

    _grad_norm: Tensor | None = None

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        """Checks the hyperparameters and builds the groups."""
        self._reset_step()
        self._reset_devices()
        self._y_beta: list[float | Tensor] = []
        self._kept: list[Kept] = []
        self._misses: dict[Tensor, tuple[int, Tensor, Tensor]] = {}
        self._checked: dict[int, list[Any]] = {}
        changed = {
            key: value
            for key, value in defaults.items()
            if key not in self.extras or value != self.extras[key]
        }
        self._check_hyperparameters(changed, "")
        super().__init__(params, self.schedule_start | changed)
        self._inputs = _compiled.Inputs(self)

    # ---- what a subclass says -------------------------------------------------------------------------

    # The step operator. Takes y, y_lo, grad, z, the lists of _moments() and the scalars of _scalars().
    operator: ClassVar[Callable[..., None]]

    # The same with `coefs` in place of the scalars.
    capturable_operator: ClassVar[Callable[..., None]]

    # Whether a step can do without the host.
    supports_capturable: ClassVar[bool] = True

    def _beta(self, group: Group) -> float:
        """The interpolation weight of the next y."""
        raise NotImplementedError

    def _last_beta(self, group: Group) -> float:
        """The interpolation weight of the current y, unless a scheduler has moved it since."""
        return self._beta(group)

    def _lr(self, group: Group) -> float:
        """The group's learning rate, before warmup and factor."""
        return float(group["lr"])

    # How the class scales its steps.
    kind: ClassVar[int] = ops.STEP_KINDS["sgd"]

    def _kind_options(self, group: Group) -> dict[str, Any]:
        """What the scaling depends on, beside the step count."""
        return {}

    def _factors(self, group: Group, k: int) -> tuple[float, float, float]:
        """Of step k: factor on the learning rate, scale and eps of the denominator."""
        return _C.step_factors(kind=self.kind, k=k, **self._kind_options(group))

    def _lr_factor(self, group: Group, k: int) -> float:
        """Factor on the learning rate of step k, beside warmup."""
        return self._factors(group, k)[0]

    def _new_moments(self, group: Group, z: Tensor) -> State:
        """Initial state of a parameter beside z."""
        return {}

    def _moments(self, group: Group, batch: Batch) -> list[list[Tensor]]:
        """The operator's lists after z."""
        return []

    def _scalars(self, update: Update) -> dict[str, Any]:
        """The operator's scalars."""
        group, schedule = update.group, update.schedule
        limit = group.get("max_grad_norm")
        return {
            "lr": schedule.lr,
            "w": schedule.w,
            "a": schedule.a,
            "weight_decay": float(group["weight_decay"]),
            "decay_at": ops.DECAY_AT[group.get("decay_at", "y")],
            "grad_mul": -1.0 if group.get("maximize", False) else 1.0,
            "grad_norm": None if limit is None else self._norm,
            "max_grad_norm": None if limit is None else float(limit),
        }

    def _survey(self, batches: list[tuple[int, Batch]], loss: Any) -> None:
        """Looks at all gradients of a step before anything is computed from them."""
        if not self._clips:
            return
        if self._stepped and self._norm is None:
            raise RuntimeError(
                "max_grad_norm was set after some parameters had taken this iteration's step: call "
                "optimizer.step() without it first"
            )
        if not self._stepped:
            grads = [grad for _, batch in batches for grad in batch.grad]
            if all(batch.plain for _, batch in batches):
                self._norm = ops.grad_norm(grads)
            else:
                params = [p for _, batch in batches for p in batch.params]
                squares = _sharded.total(params, lambda at: ops.grad_norm([grads[i] for i in at]).square())
                self._norm = squares.sqrt()

    @property
    def _clips(self) -> bool:
        return any(group.get("max_grad_norm") is not None for group in self.param_groups)

    def _finish(self, group: Group, schedule: _C.ScheduleStep) -> None:
        """Writes what a step did into its group."""
        group["scheduled_lr"] = schedule.lr
        group["lr_max"] = schedule.lr_max
        group["weight_sum"] = schedule.weight_sum
        group["k"] = schedule.k

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients in the last step with ``max_grad_norm``, unscaled and before clipping.

        A float64 scalar, or None before the first such step.
        """
        norm: Tensor | None = self._last_grad_norm()
        return norm

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _last_grad_norm(self) -> Tensor | None:
        # Compiled code would read it before its step.
        return self._grad_norm

    # ---- groups ---------------------------------------------------------------------------------------

    def _check_hyperparameters(self, group: Group, where: str) -> None:
        for name, domain in self.domains.items():
            if name in group:
                domain.check(name, group[name], where)
        if group.get("decay_at", "y") not in ops.DECAY_AT:
            raise ValueError(
                f"Invalid decay_at{where}: {group['decay_at']!r}, expected one of {list(ops.DECAY_AT)}"
            )
        if group.get("max_grad_norm") is not None:
            POSITIVE.check("max_grad_norm", group["max_grad_norm"], where)
        if group.get("capturable", False):
            if not self.supports_capturable:
                raise ValueError(
                    f"Invalid capturable{where}: {group['capturable']!r}, expected False: a step of "
                    f"{type(self).__name__} needs the host"
                )
            if group.get("per_parameter_steps", False):
                raise ValueError(
                    f"Invalid capturable{where}: {group['capturable']!r}, expected False with "
                    "per_parameter_steps, whose counts the host keeps"
                )

    def _check_moved(self, group: Group, index: int) -> None:
        """Checks hyperparameters that have been replaced since they were last checked.

        A tensor is read once: what is written into it later is for the device.
        """
        names = (*self.domains, *_WATCHED)
        now = [group.get(name) for name in names]
        known = self._checked.get(index, [None] * len(now))
        if all(map(operator.is_, known, now)):
            return
        read = [n for n, a, b in zip(names, known, now, strict=True) if a is b and isinstance(b, Tensor)]
        changed = {name: value for name, value in group.items() if name not in read}
        self._check_hyperparameters(changed, f" in parameter group {index}")
        self._checked[index] = now

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
        try:
            check_dtypes(group, where)
        except ValueError:
            del self.param_groups[index]
            raise
        if "train_mode" in self.schedule_start:
            first = self.param_groups[0] if index else self.schedule_start
            group["train_mode"] = first["train_mode"]
        self._y_beta.append(self._last_beta(group))
        if "_inputs" in self.__dict__:
            self._inputs.update(self)

    # ---- train and eval -------------------------------------------------------------------------------

    def _switch(self, group: Group, index: int, to_train: bool) -> None:
        self._require_no_open_step("train() or eval()")
        super()._switch(group, index, to_train)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _swap(self, group: Group, index: int, to_train: bool) -> None:
        built = float(self._y_beta[index])
        beta = self._last_beta(group) if to_train else built
        done: list[tuple[Batch, float, float]] = []
        try:
            for batch in self._with_state(group["params"]):
                own = batch.state[0].get(Y_BETA)
                before = built if own is None else float(own)
                after = beta if own is None else float(own)
                try:
                    self._swap_batch(batch, before, after, to_train)
                    done.append((batch, before, after))
                except RuntimeError:
                    # It has changed nothing. Parameters may have moved since their state was made.
                    if not self._follow(batch):
                        raise
                    for again in self._with_state(batch.params):
                        self._swap_batch(again, before, after, to_train)
                        done.append((again, before, after))
        except RuntimeError:
            for batch, before, after in reversed(done):
                self._swap_batch(batch, after, before, not to_train)
            raise
        y_beta = self._y_beta[index]
        if isinstance(y_beta, Tensor):
            y_beta.fill_(beta)  # a captured graph reads this one
            self._known_beta[index] = beta
        else:
            self._y_beta[index] = beta
        self._check_low = True

    def _swap_batch(self, batch: Batch, before: float, after: float, to_train: bool) -> None:
        lists = (batch.y, batch.y_lo, batch.stream("z"))
        if not to_train:
            kept = to_x(batch.params, *lists, beta=before)
            self._kept = [old for old in self._kept if old.params[0] is not batch.params[0]]
            if kept is not None:
                self._kept.append(kept)
            batch.written()
            return
        kept = self._take_kept(batch)
        try:
            to_y(*lists, kept if before == after else None, beta=after)
        except RuntimeError:
            if kept is not None:
                kept.to_states(batch.state)
            raise
        batch.written()

    def _take_kept(self, batch: Batch) -> Kept | None:
        """What the swap to x has kept for these parameters; it is then kept no more."""
        for i, kept in enumerate(self._kept):
            if len(kept.params) == len(batch.params) and all(map(operator.is_, kept.params, batch.params)):
                return self._kept.pop(i)
        self._kept_to_states()
        return Kept.from_states(batch.params, batch.state)

    def _kept_to_states(self) -> None:
        for p, (index, at, miss) in self._misses.items():
            state = self.state[p]
            state[KEPT_AT] = at
            state[KEPT] = _checkpoint.to_kept(p, state, at, miss, self._beta_of(index, state))
        self._misses = {}
        for kept in self._kept:
            kept.to_states([self.state.get(p, {}) for p in kept.params])
        self._kept = []

    def _beta_of(self, index: int, state: State) -> float:
        """The beta that built a parameter's y."""
        return float(state.get(Y_BETA, self._y_beta[index]))

    def _counterpart(
        self, group: Group, index: int, p: Tensor, part: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        state = self.state.get(p, {})
        if "z" not in state:
            return None
        y = part(p.detach()).clone()
        # The parameter may have moved since its state was made.
        z = part(state["z"]).to(device=y.device, dtype=_state_dtype(y))
        split = y.dtype == torch.bfloat16 and "y_lo" in state
        y_lo = [part(state["y_lo"]).to(device=y.device, copy=True)] if split else []
        swap = ops.y_to_x_ if self._mode(group) else ops.x_to_y_
        lists = [[_sharded.local(t) for t in tensors] for tensors in ([y], y_lo, [z])]
        swap(*lists, beta=self._beta_of(index, state))
        return y

    # ---- step -----------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one optimization step. Gradients are only read.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or ``None`` without one.

        Raises:
            RuntimeError: in eval mode, or for what the operators do not take: a sparse gradient, parameters
                that share memory. Should only a later group show that, earlier ones have taken the step, and
                the next call takes what remains of it.
            ValueError: for a hyperparameter that has been moved outside its domain.
        """
        if closure is None and _compiled.takes(self):
            _compiled.step(self)
            return None
        loss: float | None = self._step_now(closure)
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _step_now(self, closure: Callable[[], float] | None) -> float | None:
        loss: float | None = self._step(closure)
        return loss

    def _step_compiled(self, loss: Any) -> None:
        """A step without closure that compiled code takes, with the loss if it is given one."""
        self._step_now(None)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``, but compiled code may hold it."""
        if set_to_none and _compiled.takes(self):
            _compiled.drop_gradients(self)
        else:
            super().zero_grad(set_to_none)

    def _step(self, closure: Callable[[], float] | None) -> Any:
        if closure is None and self._creates_state_only():
            return None
        loss = self._loss_of(closure)
        self._update(loss)
        return loss

    def _update(self, loss: Any) -> None:
        # First everything that can be refused here, for all groups; then everything that changes. Should an
        # operator still refuse after another has run, the step stays open, as after step_parameter().
        if not self._stepped:
            self._reset_step()
        self._require_replayable()
        for index, group in enumerate(self.param_groups):
            self._check_moved(group, index)
        self._settle()
        created: dict[Tensor, State] = {}
        # Among several calls, none may refuse a layout after another has run.
        layout = torch.strided if len(self.param_groups) > 1 else None

        def gather() -> list[tuple[int, Batch]]:
            return [
                (index, batch)
                for index, group in enumerate(self.param_groups)
                for batch in self._active(group, index, self._remaining(group), created, layout)
            ]

        batches = gather()
        if layout is None and len(batches) > 1:
            for _, batch in batches:
                self._check_layouts(batch)
        try:
            self._survey(batches, loss)
        except RuntimeError:
            # Parameters may have moved since their state was made.
            if not any([self._follow(batch) for _, batch in batches]):
                raise
            batches = gather()
            self._survey(batches, loss)
        incomplete = {p: self.state[p] for p in created if p in self.state}
        try:
            schedules = [self._schedule_of(index) for index in range(len(self.param_groups))]
            updates = [self._plan(index, batch) for index, batch in batches]
            calls = [self._call(update) for update in updates]
            self.state.update(created)
            for update, call in zip(updates, calls, strict=True):
                self._run(update, call)
                if len(updates) > 1:
                    self._stepped.update(update.batch.params)
        except BaseException:
            for p in created.keys() - self._stepped:
                self.state.pop(p, None)
                if p in incomplete:
                    self.state[p] = incomplete[p]
            self._put_back()
            raise
        self._close(schedules)

    def _close(self, schedules: list[Schedule], *, interrupted: bool = False) -> None:
        """Counts a step that all parameters with a gradient have taken, or some if it was interrupted."""
        for index, group in enumerate(self.param_groups):
            self._leave_behind(group, index, interrupted)
        for group, schedule in zip(self.param_groups, schedules, strict=True):
            if not isinstance(schedule, Tensor):  # or it is in the group already
                self._finish(group, schedule)
        self._allocated = False
        self._check_low = False
        if self._norm is not None:
            scale = self._amp("grad_scale")
            self._grad_norm = self._norm if scale is None else self._norm / scale.to(self._norm.device)
        self._reset_step()

    def _plan(self, index: int, batch: Batch) -> Update:
        group, own = self.param_groups[index], batch.state[0]
        if not group.get("per_parameter_steps", False) and Y_BETA not in own:
            return Update(batch, group, index, group["k"], self._schedule_of(index))
        group_beta = self._y_beta[index]
        if isinstance(group_beta, Tensor):
            return Update(batch, group, index, group["k"], *self._own_coefs(group, index, own[Y_BETA]))
        counters = own if group.get("per_parameter_steps", False) and "k" in own else group
        schedule = self._advance(group, counters, float(own.get(Y_BETA, group_beta)))
        return Update(batch, group, index, counters["k"], schedule)

    def _schedule_of(self, index: int) -> Schedule:
        """The group's next step; computed once, so that all of its parameters take the same."""
        if index not in self._schedules:
            group, beta = self.param_groups[index], self._y_beta[index]
            if isinstance(beta, Tensor):
                coefs = self._coefs_of(index, beta)
                self._schedules[index] = self._advance_tensors(group, coefs, self._tensors_of(index))
            else:
                self._schedules[index] = self._advance(group, group, beta)
        return self._schedules[index]

    def _advance(self, group: Group, counters: Group | State, beta: float) -> _C.ScheduleStep:
        return _C.advance(
            k=counters["k"],
            weight_sum=counters["weight_sum"],
            lr_max=counters["lr_max"],
            lr=self._lr(group),
            lr_factor=self._lr_factor(group, counters["k"]),
            warmup_steps=int(group.get("warmup_steps", 0)),
            c_warmup=int(group.get("c_warmup", 0)),
            r=group["r"],
            weight_lr_power=group["weight_lr_power"],
            beta=beta,
            beta_next=self._beta(group),
        )

    def _call(self, update: Update) -> Callable[[], None]:
        """The operator call of an update, all of it but the call itself."""
        batch, group = update.batch, update.group
        lists = (batch.y, batch.y_lo, batch.grad, batch.stream("z"), *self._moments(group, batch))
        if isinstance(update.schedule, Tensor):
            coefs, capturable = update.schedule, type(self).capturable_operator
            decay_at = ops.DECAY_AT[group.get("decay_at", "y")]
            return lambda: capturable(*lists, coefs, decay_at=decay_at)
        scalars, operator = self._scalars(update), type(self).operator
        return lambda: operator(*lists, **scalars)

    def _run(self, update: Update, call: Callable[[], None]) -> None:
        try:
            call()
            update.batch.written()
        except RuntimeError:
            # A refused call has changed nothing. Parameters may have moved since their state was made.
            if not self._follow(update.batch):
                raise
            for again in self._active(update.group, update.group_index, update.batch.params, {}):
                self._call(update._replace(batch=again))()
        counted = update.group.get("per_parameter_steps", False)
        if counted or Y_BETA in update.batch.state[0]:
            for state in update.batch.state:
                state.pop(Y_BETA, None)
                if update.y_beta is not None and self._amp("found_inf") is not None:
                    state[Y_BETA] = update.y_beta  # only the device knows whether the step was taken
                if counted:
                    state.update({name: getattr(update.schedule, name) for name in _COUNTERS})

    def _leave_behind(self, group: Group, index: int, interrupted: bool) -> None:
        """Has parameters that took no step remember the beta of their y, where the group's has moved."""
        before, beta = self._y_beta[index], self._beta(group)
        if isinstance(before, Tensor):
            known = self._known_beta.pop(index, None)
            if known == beta or self._amp("found_inf") is None:
                self._known_beta[index] = beta
            if known == beta:
                return
            before = self._coefs[index][_capturable.BEFORE][-1].clone()
        else:
            self._y_beta[index] = beta
            if before == beta:
                return
        for p in group["params"]:
            rested = (interrupted or p.grad is None) and p not in self._stepped
            if rested and "z" in self.state.get(p, ()):
                self.state[p].setdefault(Y_BETA, before)

    # ---- schedules on devices -------------------------------------------------------------------------

    def _reset_devices(self) -> None:
        # Of capturable groups by their index: the scalars of the last step, and the beta that built y where
        # the host knows it. After a step that may have been skipped it does not.
        self._coefs: dict[int, Tensor] = {}
        self._known_beta: dict[int, float] = {}

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells ``torch.amp.GradScaler`` that a step unscales gradients and skips an overflow by itself.

        The scaler then sets ``grad_scale`` and ``found_inf`` for the time of a step.
        """
        return all(group.get("capturable", False) for group in self.param_groups)

    def _require_replayable(self) -> None:
        """Refuses to be captured in a CUDA graph that would repeat the scalars of one step."""
        if torch.version.cuda is None or self._step_supports_amp_scaling:
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "step() is being captured in a CUDA graph, which would repeat the learning rate and the "
                "averaging weight of this one step: construct the optimizer with capturable=True"
            )

    def _amp(self, name: str) -> Tensor | None:
        """What a gradient scaler says of the step that is being taken."""
        value: Tensor | None = getattr(self, name, None)
        return value

    def _settle(self) -> None:
        """Has schedules where their groups want them, in tensors or in numbers, between two steps."""
        if self._stepped:
            return
        for index, group in enumerate(self.param_groups):
            beta = self._y_beta[index]
            if group.get("capturable", False):
                _capturable.to_device(group)
                self._y_beta[index] = _capturable.placed(beta, torch.float64, group["k"].device)
                if not isinstance(beta, Tensor):
                    self._known_beta[index] = beta
            elif isinstance(beta, Tensor) or isinstance(group["k"], Tensor):
                _capturable.to_host(group)
                self._y_beta[index] = float(beta)

    def _coefs_of(self, index: int, beta: Tensor) -> Tensor:
        coefs = self._coefs.get(index)
        if coefs is None or coefs.device != beta.device:
            coefs = self._coefs[index] = beta.new_zeros(len(ops.COEFFICIENTS))
        return coefs

    def _advance_tensors(self, group: Group, coefs: Tensor, schedule: Sequence[Tensor]) -> Tensor:
        """Advances a schedule that is in tensors, unless the step is to be skipped, and fills ``coefs``."""
        k, weight_sum, lr_max, scheduled_lr, beta = schedule
        limit = group.get("max_grad_norm")
        ops.schedule_step_(
            coefs,
            k,
            weight_sum,
            lr_max,
            scheduled_lr,
            beta,
            _capturable.readable(group["lr"]),
            _capturable.readable(group["weight_decay"]),
            kind=self.kind,
            beta_next=self._beta(group),
            warmup_steps=int(group.get("warmup_steps", 0)),
            r=float(group["r"]),
            weight_lr_power=float(group["weight_lr_power"]),
            maximize=bool(group.get("maximize", False)),
            max_grad_norm=None if limit is None else float(limit),
            grad_norm=None if limit is None else self._norm,
            grad_scale=self._amp("grad_scale"),
            found_inf=self._amp("found_inf"),
            **self._kind_options(group),
        )
        return coefs

    def _tensors_of(self, index: int) -> list[Tensor]:
        """A capturable group's schedule."""
        group, beta = self.param_groups[index], self._y_beta[index]
        assert isinstance(beta, Tensor)
        return [*(group[name] for name in _capturable.SCHEDULE), beta]

    def _own_coefs(self, group: Group, index: int, own: float | Tensor) -> tuple[Tensor, Tensor]:
        """As the group's, for parameters whose y another beta has built; and the beta after the step."""
        of_group = self._schedule_of(index)
        assert isinstance(of_group, Tensor)
        k, *others = of_group[_capturable.BEFORE].clone().unbind()
        beta = others[-1].clone().copy_(torch.as_tensor(own, dtype=torch.float64))
        coefs = torch.zeros_like(of_group)
        self._advance_tensors(group, coefs, [k.long(), *others[:-1], beta])
        return coefs, beta

    def _put_back(self) -> None:
        """After a refusal, has schedules in tensors be what they were, unless a parameter has stepped."""
        if self._stepped:
            return
        for index, coefs in self._schedules.items():
            if isinstance(coefs, Tensor):
                for t, before in zip(self._tensors_of(index), coefs[_capturable.BEFORE], strict=True):
                    t.copy_(before)
        self._schedules.clear()

    def _check_layouts(self, batch: Batch) -> None:
        for grad in batch.grad:
            if grad.layout is not torch.strided:
                raise _sparse_gradient(grad, "a parameter")

    # ---- which parameters, with which state -----------------------------------------------------------

    # Whether bfloat16 parameters have a low half in their state.
    splits_bfloat16: ClassVar[bool] = True

    # Whether the next step looks at the dtype of every parameter, which a step over small ones would feel. It
    # does after a switch of modes; otherwise it looks at the first of each batch.
    _check_low = True

    def _active(
        self,
        group: Group,
        index: int,
        params: list[Tensor],
        created: dict[Tensor, State],
        layout: torch.layout | None = None,
    ) -> list[Batch]:
        """Those of the parameters that have a gradient. State that some still lack goes to ``created``."""
        keys = (Y_BETA, *_COUNTERS) if group.get("per_parameter_steps", False) else (Y_BETA,)
        if self._allocated:
            self._restart(params)
        check = self._check_low and self.splits_bfloat16
        batches, attention = _C.gather(params, self.state, True, check, layout, keys)
        if self.splits_bfloat16 and any(not b[3] and b[0][0].dtype == torch.bfloat16 for b in batches):
            batches, attention = _C.gather(params, self.state, True, True, layout, keys)
        if attention:
            for i in attention:
                p = params[i]
                if p.grad is not None and p.grad.layout is not torch.strided:
                    raise _sparse_gradient(p.grad, f"params[{i}] in parameter group {index}")
                created[p] = self._complete_state(group, p, dict(self.state.get(p, ())))
            batches, _ = _C.gather(params, self.state | created, True, check, layout, keys)
        return [Batch.of(*batch) for batch in batches]

    def _with_state(self, params: list[Tensor]) -> list[Batch]:
        """Those of the parameters that have taken a step."""
        batches, _ = _C.gather(params, self.state, False, False, None, (Y_BETA,))
        return [Batch.of(*batch) for batch in batches]

    def _remaining(self, group: Group) -> list[Tensor]:
        params: list[Tensor] = group["params"]
        return [p for p in params if p not in self._stepped] if self._stepped else params

    def _complete_state(self, group: Group, p: Tensor, state: State) -> State:
        """Adds what a parameter's state lacks; all of it before the first step."""
        begins = "z" not in state
        if begins:
            state["z"] = torch.empty_like(p, dtype=_state_dtype(p), requires_grad=False).copy_(p)
        else:
            _follow(p, state)
        for name, moment in self._new_moments(group, state["z"]).items():
            state.setdefault(name, moment)
        if self.splits_bfloat16 and p.dtype == torch.bfloat16 and "y_lo" not in state:
            # With these 16 bits more, y keeps the precision of float32.
            state["y_lo"] = torch.zeros_like(p, dtype=torch.int16, requires_grad=False)
        if group.get("per_parameter_steps", False):
            for name in _COUNTERS:
                state.setdefault(name, self.schedule_start[name] if begins else group[name])
        return state

    def _follow(self, batch: Batch) -> bool:
        """Takes the state to the devices and dtypes of its parameters. Returns whether any has moved."""
        return any([_follow(p, state) for p, state in zip(batch.params, batch.state, strict=True)])

    def _creates_state_only(self) -> bool:
        """Makes the state, in a step that is only taken to see it. Returns whether it was one."""
        if not self._probed():
            return False
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p] = self._complete_state(group, p, {})
        self._allocated = True
        return True

    def _restart(self, params: list[Tensor]) -> None:
        """State that was made before the first step begins where the parameters now are."""
        for p in params:
            self.state.pop(p, None)

    # ---- a step within backward -----------------------------------------------------------------------

    def _reset_step(self) -> None:
        self._schedules: dict[int, Schedule] = {}
        self._stepped: set[Tensor] = set()
        self._homes: dict[Tensor, int] = {}
        self._norm = None

    def _require_no_open_step(self, what: str) -> None:
        if self._stepped:
            raise RuntimeError(
                f"{what} was called after step_parameter(), or a step() that was refused halfway, and before "
                "the step() that ends the iteration: some parameters have taken the step and others have "
                "not. Call optimizer.step() first."
            )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step_parameter(self, p: Tensor) -> None:
        """Takes the step of one parameter now; :meth:`step` then takes that of all others.

        Once per parameter and iteration, such as from a hook that runs as soon as its gradient is complete
        (:meth:`step_in_backward`): the gradient may be freed at once. The trajectory is that of :meth:`step`
        alone, bit for bit. Every iteration ends with :meth:`step`, which also counts it.

        Args:
            p: a parameter of this optimizer; nothing happens if it has no gradient.

        Raises:
            RuntimeError: in eval mode, if the parameter has taken this iteration's step already, or with
                ``max_grad_norm``, which needs all gradients.
            ValueError: if it is not a parameter of this optimizer.
        """
        if self._clips:
            raise RuntimeError(
                "no parameter can step before all gradients are there, whose norm max_grad_norm asks for"
            )
        if not self._stepped:
            self._reset_step()
            self._homes = {q: i for i, group in enumerate(self.param_groups) for q in group["params"]}
        if p not in self._homes:
            raise ValueError("Invalid p: expected a parameter of this optimizer")
        if p in self._stepped:
            raise RuntimeError(
                "a parameter has taken this iteration's step already: call optimizer.step() after each "
                "backward pass, and do not accumulate gradients over several"
            )
        self._require_train_mode()
        index = self._homes[p]
        self._check_moved(self.param_groups[index], index)
        self._settle()
        created: dict[Tensor, State] = {}
        try:
            for batch in self._active(self.param_groups[index], index, [p], created):
                update = self._plan(index, batch)
                call = self._call(update)
                self.state.update(created)
                self._run(update, call)
                self._stepped.add(p)
        except BaseException:
            self._put_back()
            raise

    def step_in_backward(self) -> BackwardHandle:
        """Has every parameter take its step inside ``backward()``, and frees its gradient there.

        So no two gradients need to exist at once. Not for gradients that are accumulated, clipped or scaled
        between ``backward()`` and ``step()``. Each iteration still ends with ``optimizer.step()``.

        Example::

            handle = optimizer.step_in_backward()
            for batch in batches:
                loss(model, batch).backward()  # parameters step, gradients are freed
                optimizer.step()
            handle.remove()

        Returns:
            A handle whose ``remove()`` ends it.
        """
        reference = weakref.ref(self)  # or parameters and optimizer would keep each other alive

        def take(p: Tensor) -> None:
            optimizer = reference()
            if optimizer is not None:
                optimizer.step_parameter(p)
                p.grad = None

        handles = [
            p.register_post_accumulate_grad_hook(take)
            for group in self.param_groups
            for p in group["params"]
            if p.requires_grad
        ]
        return BackwardHandle(handles)

    # ---- checkpoints ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep."""
        self._require_no_open_step("copying the optimizer")
        self._kept_to_states()
        own = {name: getattr(self, name) for name in ("_y_beta", "_expected", "_allocated")}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores from pickle, deepcopy or a state dict, older ones included."""
        super().__setstate__(state)
        self._reset_step()
        self._reset_devices()
        self._kept = []
        self._misses = {}
        self._checked = {}
        if "_inputs" in self.__dict__:
            self._inputs.update(self)
        else:
            self._inputs = _compiled.Inputs(self)
        for index, group in enumerate(self.param_groups):
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
                        if name == "z" and (missed := value.misses(p, tensors["z"])) is not None:
                            self._misses[p] = (index, *missed)
                if "z" in tensors:
                    self._complete_state(group, p, tensors)

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``, with the keys of ``schedulefree``.

        One entry beside ``"state"`` and ``"param_groups"`` samples the parameters, so that a model saved in
        the other mode is recognised.
        """
        self._require_no_open_step("state_dict()")
        self._kept_to_states()
        # Before the hooks of users, who may return something else altogether.
        handle = self.register_state_dict_post_hook(_complete_state_dict, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of its namesake in ``schedulefree``.

        The state is copied, and kept in float32 where the parameters are of 16 bits. Parameters may be
        loaded before or after; whether they belong to the state is seen at their first use.

        Args:
            state_dict: what :meth:`state_dict` returned.
        """
        # The base class would cast every state tensor to its parameter's dtype.
        handle = self.register_load_state_dict_pre_hook(_protect)
        expected = self._expected
        capturable = [group.get("capturable", False) for group in self.param_groups]
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self._expected = expected
            raise
        finally:
            handle.remove()
        self._y_beta = [group.pop(Y_BETA, self._last_beta(group)) for group in self.param_groups]
        for group, own in zip(self.param_groups, capturable, strict=True):
            group.pop("capturable", None)
            if own or "capturable" in self.defaults:
                group["capturable"] = own
        self._allocated = False


class BackwardHandle:
    """What :meth:`ScheduleFreeOptimizer.step_in_backward` returns; also a context manager."""

    def __init__(self, handles: Sequence[RemovableHandle]) -> None:
        """Takes the handles of the parameters' hooks."""
        self._handles = handles

    def remove(self) -> None:
        """Ends stepping within backward."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> BackwardHandle:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Calls :meth:`remove`."""
        self.remove()


def _sparse_gradient(grad: Tensor, owner: str) -> RuntimeError:
    return RuntimeError(
        f"{owner} has a gradient of layout {grad.layout}: schedule-free optimizers take dense gradients only"
    )


def _state_dtype(p: Tensor) -> torch.dtype:
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _follow(p: Tensor, state: State) -> bool:
    """Takes the state to the parameter's device and to the dtypes that belong to the parameter's.

    The low half of a parameter that is bfloat16 no more is dropped: the parameter is what its user sees.
    """
    moved = False
    if p.dtype != torch.bfloat16 and state.pop("y_lo", None) is not None:
        moved = True
    for name, value in state.items():
        if isinstance(value, Tensor):
            dtype = _FIXED_DTYPES.get(name, _state_dtype(p) if value.is_floating_point() else value.dtype)
            if value.device != p.device or value.dtype != dtype:
                state[name] = value.to(device=p.device, dtype=dtype)
                moved = True
    return moved


class _Protected:
    """A state tensor on its way through ``Optimizer.load_state_dict``, which must not cast it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def restore(self, p: Tensor, name: str) -> Tensor:
        """A copy on the parameter's device, in the state's own dtype and the parameter's strides."""
        if name in (KEPT_AT, KEPT) or self.value.shape != p.shape:
            return self.value.to(device=p.device, copy=True)
        dtype = _FIXED_DTYPES.get(name, _state_dtype(p))
        value = _sharded.like(p, self.value)
        return torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(value)

    def misses(self, p: Tensor, z: Tensor) -> tuple[Tensor, Tensor] | None:
        """What this ``z`` says of ``y`` beside the one that has been restored."""
        if self.value.dtype != torch.float64 or z.dtype == torch.float64 or self.value.shape != p.shape:
            return None
        return _checkpoint.misses(_sharded.like(p, self.value).to(p.device), z)


def _complete_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    assert isinstance(optimizer, ScheduleFreeOptimizer)
    for group, saved, y_beta in zip(
        optimizer.param_groups, state_dict["param_groups"], optimizer._y_beta, strict=True
    ):
        beta = float(y_beta)
        if beta != optimizer._last_beta(group):
            saved[Y_BETA] = beta
        # Whether a schedule is in tensors is no matter of checkpoints.
        _capturable.to_host(saved)
        saved.pop("capturable", None)
    for name, state in state_dict["state"].items():
        if isinstance(state, dict) and isinstance(state.get(Y_BETA), Tensor):
            state_dict["state"][name] = {**state, Y_BETA: float(state[Y_BETA])}
    optimizer._add_fingerprint(state_dict)
    if _checkpoint.is_distributed():
        _into_upstreams_keys(optimizer, state_dict)


def _into_upstreams_keys(optimizer: ScheduleFreeOptimizer, state_dict: dict[str, Any]) -> None:
    """Has a state dict tell all that it does in the keys and shapes that upstream's has."""
    for index, (group, saved) in enumerate(
        zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    ):
        own: list[tuple[int, float]] = []
        for position, (p, number) in enumerate(zip(group["params"], saved["params"], strict=True)):
            if "z" not in state_dict["state"].get(number, ()):
                continue
            state = state_dict["state"][number] = dict(state_dict["state"][number])
            kept_at, kept = state.pop(KEPT_AT, None), state.pop(KEPT, None)
            if p.dtype != torch.float64 and (optimizer._allocated or not optimizer._mode(group)):
                pair = None if kept_at is None or kept is None else (kept_at, kept)
                wide = _checkpoint.widened(p, state, pair, optimizer._beta_of(index, state))
                if not _sharded.is_dtensor(p):
                    # FullyShardedDataParallel wants one dtype for all state of a parameter.
                    state.update({k: v.double() for k, v in state.items() if k in _checkpoint.MOMENTS})
                state["z"] = wide
            if Y_BETA in state:
                own.append((position, state.pop(Y_BETA)))
        saved["scheduled_lr"] = _checkpoint.with_betas(saved["scheduled_lr"], saved.pop(Y_BETA, None), own)


def _out_of_upstreams_keys(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The reverse, as far as it needs no parameters: betas go back to where they were."""
    groups, state = [], dict(state_dict["state"])
    for saved in state_dict["param_groups"]:
        group = dict(saved)
        if "scheduled_lr" in group:
            group["scheduled_lr"], beta, own = _checkpoint.betas_of(group["scheduled_lr"])
            if beta is not None:
                group[Y_BETA] = beta
            for position, own_beta in own:
                number = group["params"][position]
                state[number] = {**state.get(number, {}), Y_BETA: own_beta}
        groups.append(group)
    return {**state_dict, "param_groups": groups, "state": state}


def _by_name(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Takes the parameters of a state dict into the optimizer's order, where both tell the same names.

    The dict has them as ``param_names``, or its ``params`` are names, as C++ writes them; torch goes by
    position. A dict that has nothing but names is refused if they are others.
    """
    own_groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if len(own_groups) != len(saved_groups) or not all("param_names" in group for group in own_groups):
        return state_dict
    groups: list[Group] = []
    ours: dict[int, int] = {}  # our numbers of the dict's parameters
    for index, (own, saved) in enumerate(zip(own_groups, saved_groups, strict=True)):
        keys, names = saved["params"], own["param_names"]
        saved_names = saved.get("param_names", keys)
        if not all(isinstance(name, str) for name in saved_names):
            return state_dict
        if sorted(saved_names) != sorted(names) or len(set(names)) != len(keys):
            if saved_names is keys:
                raise ValueError(
                    f"Invalid state dict: parameter group {index} has parameters {sorted(saved_names)}, "
                    f"expected {sorted(names)}"
                )
            return state_dict
        first = len(ours)
        positions = {name: position for position, name in enumerate(saved_names)}
        ours |= {first + positions[name]: first + position for position, name in enumerate(names)}
        groups.append(
            {**saved, "params": [keys[positions[name]] for name in names], "param_names": list(names)}
        )
    result = {**state_dict, "param_groups": groups}
    fingerprint = state_dict.get(OURS, {}).get("fingerprint")
    if fingerprint is not None:
        numbers = [ours.get(number, number) for number in fingerprint["params"]]
        result[OURS] = {"fingerprint": {**fingerprint, "params": numbers}}
    return result


def _protect(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    # The last of the hooks: it sees what is going to be loaded.
    assert isinstance(optimizer, ScheduleFreeOptimizer)
    state_dict = _out_of_upstreams_keys(_by_name(optimizer, state_dict))
    optimizer._expected = state_dict.get(OURS, {}).get("fingerprint")
    state = {
        key: {name: _Protected(v) if isinstance(v, Tensor) else v for name, v in value.items()}
        if isinstance(value, dict)
        else value
        for key, value in state_dict["state"].items()
    }
    return {**state_dict, "state": state}
