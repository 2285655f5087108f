"""The base of the schedule-free optimizers: groups, the step, and their checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import compress
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp._core import backward, capturable, compiled, hyperparameters, nonfinite
from schedulefree_cpp._core.backward import BackwardHandle
from schedulefree_cpp._core.compiled import eager
from schedulefree_cpp._core.group import Gathered, Group, explain, norm_of, require_dense, require_shapes
from schedulefree_cpp._core.hyperparameters import EXTRAS, store_plain_numbers
from schedulefree_cpp._core.interrupts import Uninterrupted
from schedulefree_cpp._core.modes import Memory, TwoModeOptimizer, holds_parameters
from schedulefree_cpp._core.state_dict import load, restore, save
from schedulefree_cpp._core.types import Loss, ParamGroup, read_values


class ScheduleFreeOptimizer(TwoModeOptimizer):
    """Base of the schedule-free optimizers; not used directly.

    A parameter holds ``y`` in train mode, where gradients are taken, and the average ``x`` in eval mode.
    The base iterate ``z`` is the state. Notation and formulas: Defazio et al., "The Road Less Scheduled",
    arXiv 2405.15682; the arithmetic is in ``csrc/update_math.h``, the schedule in ``csrc/schedule.h``.
    """

    # ---- what a subclass says -------------------------------------------------------------------------

    _group_type: ClassVar[type[Group]]
    _supports_capturable: ClassVar[bool] = True
    # What a group holds of the schedule before its first step.
    _schedule_start: ClassVar[dict[str, Any]] = {
        "k": 0, "train_mode": False, "weight_sum": 0.0, "lr_max": -1.0, "scheduled_lr": 0.0,
    }  # fmt: skip

    def _initial_y_beta(self, record: Group) -> float:
        """The interpolation weight of the current y, where only the group's hyperparameters are known."""
        return record.beta()

    def _new_record(self, group: ParamGroup) -> Group:
        record = self._group_type(group)
        record.y_beta = self._initial_y_beta(record)
        return record

    # ---- groups ---------------------------------------------------------------------------------------

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        """Checks the hyperparameters and builds the groups."""
        self._memory = Memory(key=compiled.register(self), capturable=bool(defaults.get("capturable", False)))
        self.defaults = defaults
        self._check_hyperparameters(defaults, "")
        changed = {k: v for k, v in defaults.items() if k not in EXTRAS or v != EXTRAS[k]}
        store_plain_numbers(changed)
        super().__init__(params, self._schedule_start | changed)

    @property
    def capturable(self) -> bool:
        """True where the schedule lives in tensors on the parameters' device."""
        return self._memory.capturable

    def _check_hyperparameters(self, group: Mapping[str, Any], where: str) -> None:
        hyperparameters.check_group(group, self.defaults, where, self._group_type.domains)
        if group.get("capturable", False) and not self._supports_capturable:
            raise ValueError(
                f"Invalid capturable{where}: {group['capturable']!r}, expected False: a step of "
                f"{type(self).__name__} needs the host"
            )

    def _check_parameters(self, group: ParamGroup, where: str) -> None:
        hyperparameters.check_parameters(group, where)

    @eager
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, in the mode the optimizer is in. Its steps are counted from 0.

        A parameter that starts late belongs in a group of its own.

        Args:
            param_group: ``params`` and any hyperparameters that differ from the defaults.

        Raises:
            ValueError: for a hyperparameter outside its domain or parameters of an unsupported dtype;
                nothing has been added.
        """
        self._require_whole_iteration("add_param_group()")
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        index, groups = len(self.param_groups), self.param_groups
        where = f" in parameter group {index}"
        wanted = self.defaults | param_group
        self._check_hyperparameters(wanted, where)
        if bool(param_group.get("capturable", self.capturable)) != self.capturable:
            raise ValueError(
                f"Invalid capturable{where}: {param_group['capturable']!r}, expected {self.capturable} as "
                "for the whole optimizer"
            )
        nonfinite.require_same(groups[0] if index else self.defaults, wanted, where)
        hyperparameters.store_plain_schedule(wanted, where)
        try:
            super().add_param_group(param_group)
        except ValueError as error:
            hyperparameters.refuse_known_parameters(groups, param_group, where, error)
            raise
        group = groups[index]
        try:
            self._check_parameters(group, where)
        except ValueError:
            del groups[index]
            raise
        hyperparameters.drop_duplicates(group)
        store_plain_numbers(group)
        group.update((name, wanted[name]) for name in hyperparameters.SCHEDULE if name in wanted)
        self._memory.had_parameters |= holds_parameters(group)
        if index and "train_mode" in self._schedule_start:
            group["train_mode"] = groups[0]["train_mode"]
        if self.capturable:
            capturable.to_device(self._records()[index])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``; compiled code may call it."""
        if set_to_none and torch.compiler.is_compiling():
            compiled.prepare_tracing(self._memory.key)
            for group in self._memory.groups:
                for p in group.params:
                    p.grad = None
        else:
            super().zero_grad(set_to_none)

    # ---- a step ---------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Takes one optimization step. Gradients are only read.

        Should an operator refuse a group for what Python does not see, such as parameters that share memory,
        the groups before it have taken the step, as in ``torch.optim``.

        Args:
            closure: reevaluates the model and returns the loss, a number or a tensor.

        Returns:
            What the closure returned, or ``None`` without one.

        Raises:
            RuntimeError: in eval mode, or for what the operators do not take: a sparse gradient, a state on
                another device than its parameter (`train` moves it). With ``nonfinite="raise"`` also
                for a gradient that is not finite, naming the parameter.
            ValueError: for a hyperparameter that has been moved outside its domain.
        """
        loss: Loss | None = None if closure is None else self._call(closure)
        self._step(loss, probe=closure is None)
        return loss

    _take_step = step  # torch puts its hooks around `step`

    @eager
    def _call(self, closure: Callable[[], Any]) -> Any:
        # Compiled code would not see the gradients that a closure makes.
        self._require_train_mode()
        with torch.enable_grad():
            return closure()

    def _step(self, loss: Any, probe: bool = False) -> None:
        memory = self._memory
        if (
            torch.compiler.is_compiling()
            and not memory.probed
            and memory.iteration is None
            and compiled.prepare_tracing(memory.key)
        ):
            compiled.step_traced(self, loss)
        else:
            self._step_now(loss, probe)

    @eager
    def _step_now(self, loss: Any, probe: bool) -> None:
        memory = self._memory
        if memory.probed:
            self._forget_probe()
        if probe and not self.state and self._is_probe():
            for group in self._records():
                group.make_state(self.state)
            memory.probed = True
            return
        groups = self._ready_groups()
        stepped = () if memory.iteration is None else memory.iteration.stepped
        gathered, counted, measures = [], [], False
        for group in groups:
            lists = group.gather(self.state, stepped)
            gathered.append(lists)
            counted.append(bool(lists.params) or group.counts_at_rest(stepped))
            measures |= group.measures
        if len(groups) > 1:
            require_dense(gathered)
        try:
            observed = self._observe(groups, gathered, loss, measures)
            if observed[2] is None or not self._is_skipped(observed):
                with Uninterrupted():
                    self._update(groups, gathered, counted, observed)
        except RuntimeError as error:
            memory.moved = True
            explain(groups, gathered, self.state, error)
            raise

    def _ready_groups(self) -> list[Group]:
        """The records of all groups.

        Raises:
            RuntimeError: in eval mode, for a model of the other mode than the loaded state, or in a capture
                without ``capturable``.
        """
        groups = self._records()
        if self._memory.expected is not None:
            self._require_train_mode()
        for group in groups:
            if not group.group.get("train_mode", group.at_y):
                self._require_train_mode()
            if self._memory.capturable:
                capturable.to_device(group)
        if torch.version.cuda is not None and not self._memory.capturable:
            capturable.require_no_capture()
        return groups

    def _observe(self, groups: list[Group], gathered: list[Gathered], loss: Any, measures: bool) -> list[Any]:
        """``grad_scale`` and ``found_inf`` of a gradient scaler, and the norm of all gradients, or None."""
        norm = None
        if measures:
            if self._memory.iteration is not None:
                raise RuntimeError(
                    "max_grad_norm or nonfinite was set after step_parameter(): call optimizer.step() "
                    "without it first"
                )
            norm = norm_of(gathered, all(group.plain for group in groups))
        if not self._memory.capturable:  # the scaler then does without us
            return [None, None, norm]
        return [getattr(self, "grad_scale", None), getattr(self, "found_inf", None), norm]

    def _is_skipped(self, observed: Sequence[Any]) -> bool:
        """True for a step that ``nonfinite`` skips; raises where it says so. Waits for the norm."""
        # With capturable the device finds out.
        skipped = not self._memory.capturable and nonfinite.is_skipped(self.param_groups, observed[2])
        if skipped:
            self._keep_norm(observed)
        return skipped

    def _update(
        self,
        groups: list[Group],
        gathered: list[Gathered],
        counted: Sequence[bool],
        observed: Sequence[Any],
    ) -> None:
        """Steps the groups in order; where an operator refuses one, it and those after it are unchanged.

        A group that is not ``counted`` keeps its schedule.
        """
        memory, iteration = self._memory, self._memory.iteration
        if iteration is None:
            steps = self._next_steps(groups, observed, counted)
        else:
            steps = backward.steps_of(self, groups, counted)
        for group, lists, step in zip(groups, gathered, steps, strict=True):
            if not memory.capturable and step.beta != group.y_beta:
                require_shapes(group.group, self.state, lists.resting)
        finished = 0
        try:
            for group, lists, step, takes in zip(groups, gathered, steps, counted, strict=True):
                group.update(lists, self.state)
                if not memory.capturable:
                    group.store(step, self.state, lists.resting, takes)
                elif step != group.y_beta:
                    group.change_beta(step, self.state, range(len(group.group["params"])))
                finished += 1
        except BaseException:
            if memory.capturable and iteration is None:
                capturable.restore([*compress(groups, counted)][sum(counted[:finished]) :])
            raise
        memory.iteration = None
        if observed[2] is not None:
            self._keep_norm(observed)

    def _next_steps(self, groups: list[Group], observed: Sequence[Any], counted: Sequence[bool]) -> list[Any]:
        """The next step of every group, all of them checked before any ``coefs`` is written.

        With ``capturable`` the new beta of each: the schedules have advanced already, on their devices, of
        those groups that are ``counted``.
        """
        on_device, index = self._memory.capturable, 0
        try:
            for index, group in enumerate(groups):  # noqa: B007
                if group.decay_at < 0:
                    raise ValueError("Invalid decay_at")
            if on_device:
                return capturable.advance(groups, counted, self.state, observed)
            norm = 0.0 if observed[2] is None else read_values(observed[2])[0]
            steps = []
            for index, group in enumerate(groups):  # noqa: B007
                steps.append(group.schedule(norm))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            for i in range(len(groups)) if on_device else (index,):
                self._check_hyperparameters(groups[i].group, f" in parameter group {i}")
            if on_device or isinstance(error, RuntimeError):
                raise
            raise type(error)(f"{error} in parameter group {index}") from error
        for group, step in zip(groups, steps, strict=True):
            step.store_coefs(group.buffer)
        return steps

    # ---- the norm of gradients --------------------------------------------------------------------------

    def _keep_norm(self, observed: Sequence[Any]) -> None:
        grad_scale, _, norm, *_ = observed
        if norm is not None:
            self._memory.grad_norm = norm if grad_scale is None else norm / grad_scale.to(norm.device)

    @property
    @eager  # compiled code would read the attribute before its step has set it
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients in the last step that needed it, unscaled and before clipping.

        A step needs it with ``max_grad_norm``, and with a ``nonfinite`` that skips or raises; after a step
        that was skipped it is not finite. A float64 scalar, or None before the first such step.
        """
        return self._memory.grad_norm

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Has ``torch.amp.GradScaler`` set ``grad_scale`` and ``found_inf`` for a step that reads them."""
        return self.capturable

    # ---- steps within backward --------------------------------------------------------------------------

    @eager
    def step_parameter(self, p: Tensor) -> None:
        """Takes the step of one parameter now; `step` then takes that of all others.

        Call it once per parameter and iteration, such as from a hook that runs as soon as the gradient is
        complete (`step_in_backward`); the gradient may then be freed. The trajectory is that of
        `step` alone, bit for bit. Every iteration ends with `step`, which also counts it.

        Args:
            p: a parameter of this optimizer; nothing happens if it has no gradient.

        Raises:
            RuntimeError: in eval mode, if the parameter has taken this iteration's step already, or with
                ``max_grad_norm`` or a ``nonfinite`` that skips or raises.
            ValueError: if it is not a parameter of this optimizer.
        """
        if self._memory.probed:
            self._forget_probe()
        backward.step_parameter(self, p)

    def step_in_backward(self) -> BackwardHandle:
        """Has every parameter take its step inside ``backward()``, and frees its gradient there.

        No two gradients need to exist at once. Gradients cannot be accumulated, clipped or scaled between
        ``backward()`` and ``step()``. Each iteration still ends with ``optimizer.step()``.

        Example::

            handle = optimizer.step_in_backward()
            for batch in batches:
                loss(model, batch).backward()  # parameters step, gradients are freed
                optimizer.step()
            handle.remove()

        Returns:
            A handle whose ``remove()`` ends the steps within backward.
        """
        return backward.step_in_backward(self)

    # ---- checkpoints ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep."""
        self._require_whole_iteration("copying the optimizer")
        memory = self._memory
        kept = {"expected": memory.expected, "probed": memory.probed}
        return {**super().__getstate__(), "_kept": {"y_beta": [r.y_beta for r in self._records()], **kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what `__getstate__` kept, older versions included."""
        state = dict(state)
        kept = state.pop("_kept", {})
        self._memory = Memory(key=compiled.register(self))
        super().__setstate__(state)
        restore(self, kept)

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``, with the keys of ``schedulefree``.

        One entry beside ``"state"`` and ``"param_groups"`` holds the betas that built ``y``, and samples of
        the parameters, so that a model saved in the other mode is recognised.
        """
        self._require_whole_iteration("state_dict()")
        return save(self)

    @eager
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of its namesake in ``schedulefree``.

        The state is copied, and kept in float32 where the parameters are of 16 bits. Parameters may be
        loaded before or after; whether they belong to the state is seen at their first use.

        Args:
            state_dict: what `state_dict` returned.

        Raises:
            ValueError: for a state dict of another optimizer or other parameters, naming group and
                parameter; nothing has been loaded.
        """
        load(self, state_dict)
