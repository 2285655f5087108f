"""The base of the schedule-free optimizers: groups, the step, and their checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, is_
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from schedulefree_cpp import ops
from schedulefree_cpp._core import capturable, compiled, hyperparameters, nonfinite, sharded, state_dict
from schedulefree_cpp._core.backward import (
    BackwardHandle,
    Iteration,
    require_all_gradients_unneeded,
    require_next,
    step_in_backward,
)
from schedulefree_cpp._core.compiled import eager
from schedulefree_cpp._core.group import Gathered, Group
from schedulefree_cpp._core.hyperparameters import EXTRAS, LAYOUT, TENSORS, store_plain_numbers
from schedulefree_cpp._core.interrupts import Uninterrupted
from schedulefree_cpp._core.modes import Memory, TwoModeOptimizer
from schedulefree_cpp._core.samples import Samples, take_samples
from schedulefree_cpp._core.types import MOVED, Loss, ParamGroup, State, holds_parameters, read_values

_record_group = attrgetter("group")


@dataclass
class ScheduleMemory(Memory):
    """See :class:`Memory`."""

    key: str = ""  # by which compiled code finds the optimizer
    groups: list[Group] = field(default_factory=list)  # of _records() alone: `param_groups` may have changed
    iteration: Iteration | None = None  # of step_parameter()
    grad_norm: Tensor | None = None
    # Read by compiled code: hyperparameters that are tensors, and whether a step needs the norm of gradients.
    tensors: list[Tensor] = field(default_factory=list)
    measures: bool = False


class ScheduleFreeOptimizer(TwoModeOptimizer):
    """Base of the schedule-free optimizers; not used directly.

    A parameter holds ``y`` in train mode, where gradients are taken, and the average ``x`` in eval mode.
    The base iterate ``z`` is the state. Notation and formulas: Defazio et al., "The Road Less Scheduled",
    arXiv 2405.15682; the arithmetic is in ``csrc/update_math.h``, the schedule in ``csrc/schedule.h``.
    """

    _memory: ScheduleMemory

    # ---- what a subclass says -------------------------------------------------------------------------

    _group_type: ClassVar[type[Group]]
    _supports_capturable: ClassVar[bool] = True
    # Whose domain a number has, where that is not its own.
    _domains: ClassVar[Mapping[str, str]] = {}
    # What a group holds of the schedule before its first step.
    _schedule_start: ClassVar[dict[str, Any]] = {
        "k": 0,
        "train_mode": False,
        "weight_sum": 0.0,
        "lr_max": -1.0,
        "scheduled_lr": 0.0,
    }
    # What no group of a state dict may lack, beside the schedule.
    _required: ClassVar[tuple[str, ...]] = ("lr", "weight_lr_power")

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
        self._memory = ScheduleMemory(key=compiled.register(self))
        self.defaults = defaults
        self._check_hyperparameters(defaults, "")
        changed = {k: v for k, v in defaults.items() if k not in EXTRAS or v != EXTRAS[k]}
        store_plain_numbers(changed)
        super().__init__(params, self._schedule_start | changed)

    @property
    def capturable(self) -> bool:
        """True where the schedule lives in tensors on the parameters' device."""
        return bool(self.defaults.get("capturable", False))

    def _records(self) -> list[Group]:
        groups, records = self.param_groups, self._memory.groups
        if len(groups) != len(records) or not all(map(is_, map(_record_group, records), groups)):
            known = {id(record.group): record for record in records}
            records[:] = [known.get(id(group)) or self._new_record(group) for group in groups]
        return records

    def _check_hyperparameters(self, group: Mapping[str, Any], where: str) -> None:
        hyperparameters.check_group(group, self.defaults, where, self._domains)
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
                another device than its parameter (:meth:`train` moves it). With ``nonfinite="raise"`` also
                for a gradient that is not finite, naming the parameter.
            ValueError: for a hyperparameter that has been moved outside its domain.
        """
        return self._take_step(closure)  # type: ignore[no-any-return]

    def _take_step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None if closure is None else self._call(closure)
        self._step(loss, probe=closure is None)
        return loss

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
            self._step_traced(loss)
        else:
            self._step_now(loss, probe)

    @eager
    def _step_now(self, loss: Any, probe: bool) -> None:
        memory = self._memory
        if memory.probed:
            self._forget_probe()
        if probe and not self.state and self._is_probe():
            return self._make_state()
        groups = self._ready_groups()
        stepped = memory.iteration.stepped if memory.iteration else ()
        gathered = [group.gather(self.state, stepped) for group in groups]
        if len(groups) > 1:
            _require_dense(gathered)
        try:
            observed = self._observe(groups, gathered, loss)
            if observed[2] is None or not self._is_skipped(observed):
                with Uninterrupted():
                    self._update(groups, gathered, observed)
        except RuntimeError as error:
            self._explain(groups, gathered, error)
            raise

    def _ready_groups(self) -> list[Group]:
        """The groups, in train mode, with parameters of the loaded state's mode, not captured unprepared."""
        groups = self._records()
        if self._memory.expected is not None or not all(map(_trains, groups)):
            self._require_train_mode()
        if self.capturable:
            for group in groups:
                capturable.to_device(group)
        elif torch.version.cuda is not None and torch.cuda.is_available():
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "step() is being captured in a CUDA graph, which would repeat the learning rate and the "
                    "averaging weight of this one step: construct the optimizer with capturable=True"
                )
        return groups

    def _observe(self, groups: list[Group], gathered: list[Gathered], loss: Any) -> list[Any]:
        """``grad_scale`` and ``found_inf`` of a gradient scaler, and the norm of all gradients, or None."""
        memory = self._memory
        measures = memory.measures if torch.compiler.is_compiling() else any(map(_measures, groups))
        norm = None
        if measures and memory.iteration:
            raise RuntimeError(
                "max_grad_norm or nonfinite was set after step_parameter(): call optimizer.step() without it "
                "first"
            )
        if measures:
            grads = [grad for lists in gathered for grad in lists.lists[2]]
            params = [p for lists in gathered for p in lists.params]
            norm = _norm(grads, params, all(group.plain for group in groups))
        if not self.capturable:  # the scaler then does without us
            return [None, None, norm]
        return [getattr(self, "grad_scale", None), getattr(self, "found_inf", None), norm]

    def _is_skipped(self, observed: Sequence[Any]) -> bool:
        """True for a step that ``nonfinite`` skips; raises where it says so. Waits for the norm."""
        policy = nonfinite.policy_of(self.param_groups)
        if policy == nonfinite.DEFAULT or self.capturable:  # with capturable the device finds out
            return False
        norm = read_values(observed[2])[0]
        if math.isfinite(norm):
            return False
        if policy == "raise":
            nonfinite.refuse(self.param_groups, norm)
        self._keep_norm(observed)
        return True

    def _update(self, groups: list[Group], gathered: list[Gathered], observed: Sequence[Any]) -> None:
        """Calls the operator for every group and stores its schedule, as far as no operator refuses."""
        memory = self._memory
        steps = memory.iteration.steps if memory.iteration else None
        steps = steps or self._next_steps(groups, observed)
        finished = 0
        try:
            for group, lists, step in zip(groups, gathered, steps, strict=True):
                group.update(lists, self.state)
                if step is not None:
                    self._store_step(group, step, lists.resting)
                finished += 1
        except BaseException:
            if self.capturable and not memory.iteration:
                capturable.restore(groups[finished:])
            raise
        memory.iteration = None
        self._keep_norm(observed)

    def _next_steps(self, groups: list[Group], observed: Sequence[Any]) -> list[Any]:
        """The next step of every group, all of them checked before any ``coefs`` is written.

        With ``capturable`` None for each: the schedule has advanced already, on its device.
        """
        index = 0
        try:
            if self.capturable:
                capturable.advance(groups, self.state, observed)
                return [None] * len(groups)
            norm = 0.0 if observed[2] is None else read_values(observed[2])[0]
            steps = []
            for index, group in enumerate(groups):  # noqa: B007
                steps.append(group.schedule(norm))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            for i in range(len(groups)) if self.capturable else (index,):
                self._check_hyperparameters(groups[i].group, f" in parameter group {i}")
            if self.capturable or isinstance(error, RuntimeError):
                raise
            raise type(error)(f"{error} in parameter group {index}") from error
        for group, step in zip(groups, steps, strict=True):
            group.store_coefs(step)
        return steps

    def _store_step(self, group: Group, step: Any, resting: Sequence[int]) -> None:
        group.store(step, self.state, resting)

    def _explain(self, groups: list[Group], gathered: list[Gathered], error: RuntimeError) -> None:
        """Raises what an operator has refused with the remedy, where a parameter has moved from its state."""
        self._memory.moved = True
        for group, lists in zip(groups, gathered, strict=True):
            if group.has_moved(lists.params, [*map(self.state.get, lists.params)]):
                raise RuntimeError(MOVED if str(error) == MOVED else f"{error}. {MOVED}") from error

    # ---- the norm of gradients --------------------------------------------------------------------------

    def _keep_norm(self, observed: Sequence[Any]) -> None:
        grad_scale, _, norm, *_ = observed
        if norm is not None:
            self._memory.grad_norm = norm if grad_scale is None else norm / grad_scale.to(norm.device)

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients in the last step that needed it, unscaled and before clipping.

        A step needs it with ``max_grad_norm``, and with a ``nonfinite`` that skips or raises; after a step
        that was skipped it is not finite. A float64 scalar, or None before the first such step.
        """
        return self._last_grad_norm()

    @eager
    def _last_grad_norm(self) -> Tensor | None:
        # Compiled code would read the attribute before its step has set it.
        return self._memory.grad_norm

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells ``torch.amp.GradScaler`` that a step unscales gradients and skips an overflow by itself.

        The scaler then sets ``grad_scale`` and ``found_inf`` for the time of a step.
        """
        return self.capturable

    # ---- a step within compiled code --------------------------------------------------------------------

    def _step_traced(self, loss: Any) -> None:
        memory = self._memory
        groups = memory.groups
        with torch.no_grad():
            gathered = [group.lists_of(group.params, [*group.states]) for group in groups]
            if not any([lists.params for lists in gathered]):
                # Where a function reads param_groups, Dynamo marks the parameters and may lose gradients that
                # backward() leaves in the same function.
                raise RuntimeError(
                    "step() is being compiled where no parameter has a gradient: read and set param_groups "
                    "outside of compiled functions"
                )
            observed = self._observe(groups, gathered, loss)
            coefs, resting = [group.coefs for group in groups], [lists.resting for lists in gathered]
            compiled.call_advance(memory.key, coefs, observed, memory.tensors, resting)
            for group, lists in zip(groups, gathered, strict=True):
                group.update(lists, self.state)
                for i, _, state in lists.created:
                    group.states[i] = state

    @eager
    def _prepare_tracing(self) -> bool:
        """Brings up to date what traced code reads. True where it can be traced."""
        self._read_for_tracing()
        return all(group.traceable for group in self._memory.groups)

    def _read_for_tracing(self) -> bool:
        """Returns True where nothing has changed that compiled code has as a constant."""
        memory, groups = self._memory, self._records()
        tensors, measures = memory.tensors, memory.measures
        found = [g[name] for g in self.param_groups for name in TENSORS if isinstance(g[name], Tensor)]
        memory.measures = any(map(_measures, groups))
        same = measures == memory.measures and len(found) == len(tensors) and all(map(is_, found, tensors))
        if not same:
            memory.tensors = found
        if self.capturable:
            for group in groups:
                capturable.to_device(group)
        return all([group.prepare_tracing(self.state) for group in groups]) and same

    def _advance_compiled(
        self,
        coefs: Sequence[Tensor],
        observed: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
        resting: Sequence[Sequence[int]],
    ) -> None:
        """Advances the schedule of every group and fills its ``coefs``, when compiled code runs."""
        self._require_train_mode()
        memory, known = self._memory, self._memory.tensors
        before = [*memory.groups]
        if not self._read_for_tracing() or not _same(before, memory.groups):
            raise RuntimeError(
                "parameters, tensors, max_grad_norm, decay_at or inner_momentum of a group were replaced "
                "after a function that calls step() had been compiled; nothing was changed, and the next "
                "call goes by the new ones"
            )
        # What the compiled code has written into a hyperparameter reaches the group when the code ends.
        written = {id(own): given for own, given in zip(known, tensors, strict=True) if own is not given}
        for param_group in self.param_groups if written else ():
            for name in TENSORS:
                if id(param_group[name]) in written:
                    param_group[name].copy_(written[id(param_group[name])])
        groups = memory.groups
        if observed[2] is not None and self._is_skipped(observed):
            for tensor in (*coefs, *(group.coefs for group in groups)):
                tensor.zero_()  # an operator takes no step where `take` is 0
            return
        steps = self._next_steps(groups, observed)
        for group, given, step, positions in zip(groups, coefs, steps, resting, strict=True):
            if step is not None:
                self._store_step(group, step, positions)
            if given is not group.coefs:
                given.copy_(group.coefs)
        self._keep_norm(observed)

    # ---- steps within backward --------------------------------------------------------------------------

    @eager
    def step_parameter(self, p: Tensor) -> None:
        """Takes the step of one parameter now; :meth:`step` then takes that of all others.

        Call it once per parameter and iteration, such as from a hook that runs as soon as the gradient is
        complete (:meth:`step_in_backward`); the gradient may then be freed. The trajectory is that of
        :meth:`step` alone, bit for bit. Every iteration ends with :meth:`step`, which also counts it.

        Args:
            p: a parameter of this optimizer; nothing happens if it has no gradient.

        Raises:
            RuntimeError: in eval mode, if the parameter has taken this iteration's step already, or with
                ``max_grad_norm`` or a ``nonfinite`` that skips or raises.
            ValueError: if it is not a parameter of this optimizer.
        """
        memory = self._memory
        if memory.probed:
            self._forget_probe()
        groups = self._records()
        require_all_gradients_unneeded(groups)
        iteration = memory.iteration or Iteration.of(groups)
        require_next(iteration, p)
        self._ready_groups()
        if p.grad is None:
            return
        group = groups[iteration.homes[p]]
        group.read()
        gathered = group.lists_of([p], [self.state.get(p)])
        with Uninterrupted():
            steps = iteration.steps or self._next_steps(groups, [None, None, None])
            try:
                group.update(gathered, self.state)
            except BaseException:
                if self.capturable and not iteration.stepped:
                    capturable.restore(groups)
                raise
            iteration.steps = steps
            iteration.stepped.add(p)
            memory.iteration = iteration

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
        return step_in_backward(self)

    def _require_whole_iteration(self, what: str) -> None:
        if self._memory.iteration:
            raise RuntimeError(
                f"{what} was called between step_parameter() and the step() that ends the iteration: some "
                "parameters have taken the step and others have not. Call optimizer.step() first."
            )

    def _end_iteration(self) -> None:
        memory = self._memory
        if memory.iteration:
            steps, stepped = memory.iteration.steps, memory.iteration.stepped
            for group, step in zip(self._records(), steps or (), strict=True):
                rest = [i for i, p in enumerate(group.group["params"]) if p not in stepped]
                if step is not None:
                    self._store_step(group, step, rest)
            memory.iteration = None

    # ---- a first step that only makes the state -------------------------------------------------------

    def _make_state(self) -> None:
        for group in self._records():
            group.read()
            params = [p for p in group.group["params"] if p.grad is not None]
            for _, p, state in group.add_states(range(len(params)), params, [None] * len(params)):
                self.state[p] = state
        self._memory.probed = True

    @eager
    def _forget_probe(self) -> None:
        self.state.clear()  # the parameters may have been loaded since
        self._memory.probed = False

    # ---- checkpoints ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep."""
        self._require_whole_iteration("copying the optimizer")
        memory = self._memory
        kept = {"expected": memory.expected, "probed": memory.probed}
        return {**super().__getstate__(), "_kept": {"y_beta": [r.y_beta for r in self._records()], **kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`__getstate__` kept, older versions included."""
        state = dict(state)
        kept = state.pop("_kept", {})
        self._memory = ScheduleMemory(key=compiled.register(self))
        super().__setstate__(state)
        self._complete_groups(self.param_groups)
        for record, y_beta in zip(self._records(), kept.pop("y_beta", ()), strict=False):
            record.y_beta = y_beta
        for name, value in kept.items():
            setattr(self._memory, name, value)
        if self.capturable:
            for record in self._records():
                capturable.to_device(record)

    def _complete_groups(self, groups: Sequence[ParamGroup]) -> None:
        """Adds what groups of older versions lack."""
        for group in groups:
            for key, value in self.defaults.items():
                if key != "differentiable":
                    group.setdefault(key, value)
            if "train_mode" not in self._schedule_start:
                group.pop("train_mode", None)

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``, with the keys of ``schedulefree``.

        One entry beside ``"state"`` and ``"param_groups"`` holds the betas that built ``y``, and samples of
        the parameters, so that a model saved in the other mode is recognised.
        """
        self._require_whole_iteration("state_dict()")
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        memory, records = self._memory, self._records()
        packed = state_dict.pack(self.param_groups, self.state)
        for group in packed["param_groups"]:
            # Checkpoints do not depend on where and how the optimizer keeps its state.
            capturable.to_numbers(group)
            for name in LAYOUT:
                group.pop(name, None)
        samples = None if memory.probed else memory.expected or take_samples(records, self.state)
        packed |= state_dict.own_entry(samples, [record.y_beta for record in records])
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            packed = post_hook(self, packed) or packed
        return packed

    @eager
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of its namesake in ``schedulefree``.

        The state is copied, and kept in float32 where the parameters are of 16 bits. Parameters may be
        loaded before or after; whether they belong to the state is seen at their first use.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            ValueError: for a state dict of another optimizer or other parameters, naming group and
                parameter; nothing has been loaded.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        groups, state, entry = self._loaded(state_dict)
        # In place: a proxy shares these objects, but not assignments to them.
        records, memory = self._records(), self._memory
        self.param_groups[:] = groups
        self.state.clear()
        self.state.update(state)
        memory.iteration = None
        memory.expected = Samples.of(entry.get("fingerprint"))
        memory.probed = False
        betas = entry.get("y_beta", [None] * len(groups))
        for record, group, y_beta in zip(records, groups, betas, strict=True):
            record.group = group
            record.y_beta = self._initial_y_beta(record) if y_beta is None else y_beta
            if self.capturable:
                capturable.to_device(record)
            record.look_up_states(self.state)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _loaded(self, saved: dict[str, Any]) -> tuple[list[ParamGroup], dict[Tensor, State], dict[str, Any]]:
        """Checks a state dict, and returns groups, copies of state, and our entry of it."""
        own_groups = self.param_groups
        saved = state_dict.in_order_of(own_groups, saved)
        state_dict.check(own_groups, saved, type(self).__name__, self._required)
        records = self._records()
        groups: list[ParamGroup] = []
        names = []
        for index, (own, entries) in enumerate(zip(own_groups, saved["param_groups"], strict=True)):
            group = state_dict.copy_group(own, entries)
            capturable.to_numbers(group)
            where = f" in parameter group {index} of the state dict"
            self._check_hyperparameters(group, where)
            store_plain_numbers(group)
            self._check_parameters({**own, **group}, where)
            names.append(records[index].state_names({**own, **group}))
            groups.append(group)
        nonfinite.policy_of([self.defaults | group for group in groups], " of the state dict")
        entry = saved.get(state_dict.OURS, {})
        Samples.of(entry.get("fingerprint"))  # refuses what is none
        state = state_dict.copy_state(own_groups, saved, required=[of_group[:2] for of_group in names])
        self._complete_groups(groups)
        for group, of_group in zip(groups, names, strict=True):
            state_dict.complete_state(group, state, of_group)
        return groups, state, entry


_trains, _measures = attrgetter("trains"), attrgetter("measures")


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _norm(grads: list[Tensor], params: list[Tensor], plain: bool) -> Tensor:
    """The norm of all gradients. A collective call where there are DTensors."""
    if plain:
        return ops.grad_norm(grads)
    return sharded.all_reduced(params, lambda at: ops.grad_norm([grads[i] for i in at]).square()).sqrt()


def _require_dense(gathered: list[Gathered]) -> None:
    """Raises RuntimeError for a sparse gradient, which an operator would refuse after others have run."""
    for index, lists in enumerate(gathered):
        for i, grad in enumerate(lists.lists[2]):
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    f"grad[{i}] in parameter group {index}: expected a dense gradient, got one of layout "
                    f"{grad.layout}"
                )
