"""The step of every schedule-free optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from schedulefree_cpp import _capturable, _formats, _nonfinite, _sharded, _traced, ops
from schedulefree_cpp._backward import BackwardHandle, step_in_backward
from schedulefree_cpp._groups import TENSORS, GroupedOptimizer, GroupPlan, part_lists, state_lists
from schedulefree_cpp._interrupts import Uninterrupted
from schedulefree_cpp._library import _C
from schedulefree_cpp._modes import MOVED, Group, Loss, State, values
from schedulefree_cpp._traced import eager


class Batch(NamedTuple):
    """Parameters that one operator call updates."""

    params: list[Tensor]
    lists: list[list[Tensor]]  # the operator's: y, y_lo, grad, z, moments
    parts: dict[str, list[Tensor]]  # and those that it takes by name
    created: dict[Tensor, State]  # state that parameters get with this step
    resting: list[int]  # positions in the group of the parameters that take no step


class ScheduleFreeOptimizer(GroupedOptimizer):
    """Base of the schedule-free optimizers; not used directly.

    A parameter holds ``y`` in train mode, where gradients are taken, and the average ``x`` in eval mode.
    The base iterate ``z`` is the state. Notation and formulas: Defazio et al., "The Road Less Scheduled",
    arXiv 2405.15682; the arithmetic is in ``csrc/update_math.h``, the schedule in ``csrc/schedule.h``.
    """

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
        loss: Loss | None = self._evaluate(closure)
        self._step(loss, probe=closure is None)
        return loss

    def _evaluate(self, closure: Callable[[], Any] | None) -> Any:
        return None if closure is None else self._call(closure)

    @eager
    def _call(self, closure: Callable[[], Any]) -> Any:
        # Compiled code would not see the gradients that a closure makes.
        self._require_train_mode()
        with torch.enable_grad():
            return closure()

    def _step(self, loss: Any, probe: bool = False) -> None:
        memory = self._memory
        if memory.probed:
            self._forget_probe()
        if torch.compiler.is_compiling() and all(plan.traceable for plan in memory.plans):
            self._step_traced(loss)
        else:
            self._step_now(loss, probe)

    def _step_traced(self, loss: Any) -> None:
        memory = self._memory
        _traced.refresh_plans(memory.key)
        with torch.no_grad():
            batches = [self._gather(plan) for plan in memory.plans]
            if not any([batch.params for batch in batches]):
                # Where a function reads param_groups, Dynamo marks the parameters and may lose gradients that
                # backward() leaves in the same function.
                raise RuntimeError(
                    "step() is being compiled where no parameter has a gradient: read and set param_groups "
                    "outside of compiled functions"
                )
            resting = [batch.resting for batch in batches]
            observed = self._observe(batches, loss)
            _traced.advance(memory.key, memory.coefs, observed, memory.tensors, resting)
            for index, batch in enumerate(batches):
                self._update(index, batch)

    @eager
    def _step_now(self, loss: Any, probe: bool) -> None:
        memory = self._memory
        if probe and self._is_probe():
            return self._make_state()
        self._require_train_mode()
        self._require_replayable()
        self._refresh_plans()
        batches = [self._gather(plan) for plan in memory.plans]
        if len(batches) > 1:
            _require_dense(batches)
        try:
            observed = self._observe(batches, loss)
        except RuntimeError as error:
            self._require_followed(batches, error)
            raise
        if self._skips(observed):
            return None
        with Uninterrupted():
            schedules = memory.open or self._schedules(observed)
            finished = 0
            try:
                for index, batch in enumerate(batches):
                    self._update(index, batch)
                    self._store_schedule(index, schedules[index], batch.resting)
                    finished = index + 1
            except BaseException as error:
                self._restore_schedules(range(finished, len(batches)))
                if isinstance(error, RuntimeError):
                    self._require_followed(batches, error)
                raise
            memory.open = None
            memory.stepped.clear()
            memory.homes.clear()  # would keep parameters alive that are replaced
            self._keep_norm(observed)

    def _require_followed(self, batches: list[Batch], error: RuntimeError) -> None:
        """Raises what an operator has refused with the remedy, where a parameter has moved from its state."""
        for batch, group in zip(batches, self.param_groups, strict=True):
            for p in batch.params:
                if _formats.match(p, {**self.state.get(p, {})}, _formats.bits_of(group)):
                    raise RuntimeError(f"{error}. {MOVED}") from error

    def _require_state_in_place(self, group: Group) -> None:
        """Raises where a parameter has moved from its state, which a swap within a step would take along."""
        for p in group["params"]:
            state = self.state.get(p, {})
            if "z" in state and _formats.match(p, {**state}, _formats.bits_of(group)):
                raise RuntimeError(MOVED)

    def _gather(self, plan: GroupPlan, params: list[Tensor] | None = None) -> Batch:
        """The lists of one operator call, for those of a group's parameters that have a gradient.

        Args:
            plan: the group's.
            params: some of the parameters; None for all that have not stepped in this iteration yet.
        """
        stepped = self._memory.stepped
        params = plan.params if params is None else params
        grads: list[Any] = [p.grad for p in params]
        active = [g is not None for g in grads]
        resting: list[int] = []
        if stepped:
            active = [a and p not in stepped for a, p in zip(active, params, strict=True)]
        if not all(active):
            resting = [i for i, g in enumerate(grads) if g is None and params[i] not in stepped]
            grads = [g for g, a in zip(grads, active, strict=True) if a]
            params = [p for p, a in zip(params, active, strict=True) if a]
        states: list[Any] = [self.state.get(p) for p in params]
        created: dict[Tensor, State] = {}
        for i, state in enumerate(states):
            if not state or "z" not in state:
                p = params[i]
                states[i] = created[p] = {**(state or {}), **self._new_state(p, plan)}
        y = params
        if not plan.plain:
            y = [_sharded.local(p) for p in params]
            grads = [_sharded.local_gradient(g, p) for g, p in zip(grads, params, strict=True)]
        lists = state_lists(states, plan.state_names, plan.plain)
        parts = part_lists(states, plan.parts) if plan.parts else {}
        return Batch(params, [y, lists[0], grads, *lists[1:]], parts, created, resting)

    def _observe(self, batches: list[Batch], loss: Any) -> list[Any]:
        """``grad_scale`` and ``found_inf`` of a gradient scaler, and the norm of all gradients, or None."""
        if not self._memory.measures:
            norm = None
        elif self._memory.stepped:
            raise RuntimeError(
                "max_grad_norm or nonfinite was set after step_parameter(): call optimizer.step() without it "
                "first"
            )
        elif all(plan.plain for plan in self._memory.plans):
            norm = ops.grad_norm([grad for batch in batches for grad in batch.lists[2]])
        else:
            grads = [grad for batch in batches for grad in batch.lists[2]]
            params = [p for batch in batches for p in batch.params]
            norm = _sharded.total(params, lambda at: ops.grad_norm([grads[i] for i in at]).square()).sqrt()
        if not self.capturable:  # the scaler then does without us
            return [None, None, norm]
        return [getattr(self, "grad_scale", None), getattr(self, "found_inf", None), norm]

    def _skips(self, observed: Sequence[Any]) -> bool:
        """True for a step that ``nonfinite`` leaves out; with ``capturable`` the device finds out."""
        policy = _nonfinite.policy_of(self.param_groups)
        if policy == _nonfinite.DEFAULT or self.capturable:
            return False
        norm = values(observed[2])[0]
        if math.isfinite(norm):
            return False
        if policy == "raise":
            _nonfinite.refuse(self.param_groups, norm)
        self._keep_norm(observed)
        return True

    def _schedules(self, observed: Sequence[Any]) -> list[Any]:
        """The next step of every group, all of them checked before any ``coefs`` is filled."""
        grad_scale, found_inf, norm, *_ = observed
        memory, groups = self._memory, self.param_groups
        if self.capturable:
            moved = [i for i, group in enumerate(groups) if self._beta(group) != memory.y_beta[i]]
            for i in moved:
                self._require_state_in_place(groups[i])
            if norm is not None and norm.is_meta:  # the schedule of meta parameters is on the CPU
                norm = torch.zeros_like(norm, device="cpu")
            if norm is not None and groups[0].get("nonfinite") == "skip":
                found_inf = _nonfinite.found(norm, found_inf)
            amp = {"grad_norm": norm, "grad_scale": grad_scale, "found_inf": found_inf}
            for index, group in enumerate(groups):
                try:
                    rule = {**self._rule(group), "beta": self._beta(group)}
                    _capturable.advance(memory.coefs[index], group, rule, amp)
                except BaseException:
                    self._restore_schedules(range(index))
                    self._check_hyperparameters(group, f" in parameter group {index}")
                    raise
            try:
                for i in moved:
                    self._change_beta(self._beta(groups[i]), i, range(len(groups[i]["params"])))
            except BaseException:
                self._restore_schedules(range(len(groups)))
                raise
            return list(memory.coefs)
        value = 0.0 if norm is None else values(norm)[0]
        steps = []
        for index, group in enumerate(groups):
            try:
                steps.append(self._schedule(index, group, value))
            except (TypeError, ValueError) as error:
                where = f" in parameter group {index}"
                self._check_hyperparameters(group, where)
                raise type(error)(f"{error}{where}") from error
        for buffer, step in zip(memory.buffers, steps, strict=True):
            step.store_coefs(buffer)
        return steps

    def _schedule(self, index: int, group: Group, norm: float) -> _C.ScheduleStep:
        return _C.schedule_step(
            **self._rule(group),
            k=group["k"],
            weight_sum=group["weight_sum"],
            lr_max=group["lr_max"],
            scheduled_lr=group["scheduled_lr"],
            lr=self._lr(group),
            weight_decay=group["weight_decay"],
            beta=self._memory.y_beta[index],
            beta_next=self._beta(group),
            grad_norm=norm,
        )

    def _update(self, index: int, batch: Batch) -> None:
        memory = self._memory
        if batch.params:
            self._call_operator(index, batch)
            if not memory.plans[index].plain:
                torch.autograd.graph.increment_version(batch.params)
            self.state.update(batch.created)

    def _call_operator(self, index: int, batch: Batch) -> None:
        """Updates the parameters of a batch; none of them where an operator refuses."""
        memory = self._memory
        at = memory.plans[index].decay_at
        type(self)._operator(*batch.lists, memory.coefs[index], decay_at=at, **batch.parts)

    def _store_schedule(self, index: int, step: Any, resting: Sequence[int]) -> None:
        """Writes the schedule of a step into its group.

        Args:
            index: number of the group.
            step: what :meth:`_schedules` returned for it.
            resting: positions of the parameters that took no step in this iteration.
        """
        if self.capturable:
            return
        group = self.param_groups[index]
        self._change_beta(step.beta, index, resting)
        group["k"] = step.k
        group["weight_sum"] = step.weight_sum
        group["lr_max"] = step.lr_max
        group["scheduled_lr"] = step.scheduled_lr

    def _change_beta(self, beta: float, index: int, positions: Sequence[int]) -> None:
        """Moves parameters of a group from the beta that built their ``y`` to another, through ``x``.

        Args:
            beta: the other one, which from here on counts as that of the whole group.
            index: number of the group.
            positions: of the parameters to move; the step operator has moved the rest.
        """
        before = self._memory.y_beta[index]
        if beta == before:
            return
        group = self.param_groups[index]
        params = [group["params"][i] for i in positions]
        self._swap_parameters(ops.y_to_x_, group, params, before)
        self._swap_parameters(ops.x_to_y_, group, params, beta)
        for _ in range(2):  # as often as a 16-bit parameter needs to settle (csrc/update_math.h)
            self._swap_parameters(ops.y_to_x_, group, params, beta)
            self._swap_parameters(ops.x_to_y_, group, params, beta)
        self._memory.y_beta[index] = beta

    def _restore_schedules(self, indices: Iterable[int]) -> None:
        """Undoes :meth:`_schedules` for groups that take no step."""
        if self.capturable and not self._memory.stepped:
            for index in indices:
                _capturable.restore(self._memory.coefs[index], self.param_groups[index])

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

    # ---- compiled and captured steps ------------------------------------------------------------------

    def _advance_compiled(
        self,
        coefs: Sequence[Tensor],
        observed: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
        resting: Sequence[Sequence[int]],
    ) -> None:
        self._require_train_mode()
        memory = self._memory
        known = memory.tensors
        if self._rebuild_changed_plans():
            raise RuntimeError(
                "parameters, tensors, max_grad_norm, decay_at or inner_momentum of a group were replaced "
                "after a function that calls step() had been compiled; nothing was changed, and the next "
                "call goes by the new ones"
            )
        # What the compiled code has written into a hyperparameter reaches the group when the code ends.
        written = {id(own): given for own, given in zip(known, tensors, strict=True) if own is not given}
        for group in self.param_groups if written else ():
            for name in TENSORS:
                if id(group[name]) in written:
                    group[name].copy_(written[id(group[name])])
        if self._skips(observed):
            for tensor in (*coefs, *memory.coefs):
                tensor.zero_()  # an operator takes no step where `take` is 0
            return
        schedules = self._schedules(observed)
        for index, (given, own) in enumerate(zip(coefs, memory.coefs, strict=True)):
            self._store_schedule(index, schedules[index], resting[index])
            if given is not own:
                given.copy_(own)
        self._keep_norm(observed)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells ``torch.amp.GradScaler`` that a step unscales gradients and skips an overflow by itself.

        The scaler then sets ``grad_scale`` and ``found_inf`` for the time of a step.
        """
        return self.capturable

    def _require_replayable(self) -> None:
        if torch.version.cuda is None or self.capturable:
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "step() is being captured in a CUDA graph, which would repeat the learning rate and the "
                "averaging weight of this one step: construct the optimizer with capturable=True"
            )

    # ---- a step within backward -----------------------------------------------------------------------

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
        if not memory.stepped:
            if memory.probed:
                self._forget_probe()
            self._refresh_plans()
            memory.homes = {q: i for i, plan in enumerate(memory.plans) for q in plan.params}
        if any(group.get("max_grad_norm") is not None for group in self.param_groups):
            raise RuntimeError(
                "step_parameter() cannot be used with max_grad_norm: clipping needs every gradient first"
            )
        if memory.measures:
            raise RuntimeError(
                "step_parameter() cannot be used with nonfinite='skip' or 'raise', which need every gradient "
                "first"
            )
        if p not in memory.homes:
            raise ValueError("Invalid p: expected a parameter of this optimizer")
        if p in memory.stepped:
            raise RuntimeError(
                "a parameter has taken this iteration's step already: call optimizer.step() after each "
                "backward pass, and do not accumulate gradients over several"
            )
        self._require_train_mode()
        if p.grad is None:
            return
        index = memory.homes[p]
        batch = self._gather(memory.plans[index], [p])
        with Uninterrupted():
            memory.open = memory.open or self._schedules([None, None, None])
            try:
                self._update(index, batch)
            except BaseException:
                if not memory.stepped:
                    self._restore_schedules(range(len(self.param_groups)))
                    memory.open = None
                raise
            memory.stepped.add(p)

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


def _require_dense(batches: list[Batch]) -> None:
    """Raises RuntimeError for a sparse gradient, which an operator would refuse after others have run."""
    for index, batch in enumerate(batches):
        for i, grad in enumerate(batch.lists[2]):
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    f"grad[{i}] in parameter group {index}: expected a dense gradient, got one of layout "
                    f"{grad.layout}"
                )
