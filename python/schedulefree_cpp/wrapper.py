"""Schedule-Free around any other optimizer, which then steps ``z``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from schedulefree_cpp import ops
from schedulefree_cpp._core import nonfinite as nonfinite_
from schedulefree_cpp._core import sharded
from schedulefree_cpp._core.compiled import eager
from schedulefree_cpp._core.group import has_no_elements, require_shapes
from schedulefree_cpp._core.hyperparameters import (
    CHOICES,
    check_choice,
    check_number,
    check_parameters,
    drop_duplicates,
    refuse_known_parameters,
    store_plain_numbers,
)
from schedulefree_cpp._core.interrupts import Uninterrupted
from schedulefree_cpp._core.library import _C
from schedulefree_cpp._core.modes import Memory, TwoModeOptimizer, holds_parameters
from schedulefree_cpp._core.samples import Samples, take_samples
from schedulefree_cpp._core.sharded import local_list
from schedulefree_cpp._core.state_dict import OURS, check_wrapped, own_entry
from schedulefree_cpp._core.types import MOVED, PLAIN_TYPES, Loss, ParamGroup, State, read_values
from schedulefree_cpp.closure import ClosureForm

# What the wrapper adds to groups and states. An entry of the base optimizer that has such a name stands under
# _BASES and the name, but while the base optimizer steps.
_SETTINGS = ("sf_momentum", "sf_momentum_of_y", "weight_decay_at_y")
_SCHEDULE = ("train_mode", "k", "weight_sum", "lr_max")
_ITERATES = ("x", "y", "z")
_BASES = "base:"


def _set_apart(entries: Any, names: Iterable[str]) -> None:
    """Renames the entries of a base optimizer's group or state that have names of the wrapper's."""
    for name in names if isinstance(entries, dict) else ():
        if name in entries:
            entries[_BASES + name] = entries.pop(name)


class Lent:
    """A context in which groups and states have the entries of the base optimizer alone, under its names."""

    def __init__(self, base: Optimizer) -> None:
        """Changes nothing yet."""
        self.base = base
        self.of_groups: list[dict[str, Any]] = []
        self.of_states: dict[Any, dict[str, Any]] = {}

    def __enter__(self) -> Lent:
        """Takes the wrapper's entries out."""
        with Uninterrupted():
            self.of_groups = [self._take(group, _SETTINGS + _SCHEDULE) for group in self.base.param_groups]
            self.of_states = {key: self._take(state, _ITERATES) for key, state in self._states()}
        return self

    def __exit__(self, *_: object) -> None:
        """Puts them back."""
        with Uninterrupted():
            for group, own in zip(self.base.param_groups, self.of_groups, strict=True):
                _set_apart(group, _SETTINGS + _SCHEDULE)
                group.update(own)
            for key, state in self._states():
                _set_apart(state, _ITERATES)
                state.update(self.of_states.get(key, {}))

    @contextmanager
    def returned(self) -> Iterator[None]:
        """A context within, in which the wrapper's entries are where they were."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def _states(self) -> list[tuple[Any, State]]:
        return [(key, state) for key, state in self.base.state.items() if isinstance(state, dict)]

    def _take(self, entries: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        own = {name: entries.pop(name) for name in names if name in entries}
        for name in names:
            if _BASES + name in entries:
                entries[name] = entries.pop(_BASES + name)
        return own


class WrappedGroup:
    """A parameter group of a wrapper's base optimizer, as modes see it."""

    at_y = False  # no matter: the dict tells the mode

    def __init__(self, group: ParamGroup) -> None:
        """Has no data but the group's."""
        self.group = group

    @property
    def y_beta(self) -> float:
        """The interpolation weight that built the current y."""
        return _y_beta(self.group)

    def swap(self, all_state: Any, to_train: bool) -> None:
        """Changes the parameters from ``x`` to ``y``, or from ``y`` to ``x``."""
        self.follow_parameters(all_state, True)
        params = [p for p in self.group["params"] if "z" in all_state.get(p, ())]
        _interpolate(to_train, params, [all_state[p]["z"] for p in params], self.y_beta)

    def follow_parameters(self, all_state: Any, every: bool) -> None:
        """Has the states follow parameters that have moved to another device or dtype."""
        for p in () if every else self.group["params"]:
            state = all_state.get(p)
            if state and "z" in state:  # the first one tells: they move together
                every = _has_moved(p, state)
                break
        for p in self.group["params"] if every else ():
            state = all_state.get(p, {})
            for name in state.keys() & {*_ITERATES}:
                state[name] = state[name].to(device=p.device, dtype=p.dtype)


def _interpolate(to_y: bool, params: Sequence[Tensor], zs: Sequence[Tensor], beta: float) -> None:
    """Changes parameters from ``x`` to ``y``, or from ``y`` to ``x``: all, or none where one is refused."""
    whole = [z.element_size() > 2 for z in zs]
    pairs = [*zip(local_list(params), local_list(zs), strict=True)]
    # The operators want z of 16-bit parameters in float32: copies, one after the other.
    calls = [[pair for pair, w in zip(pairs, whole, strict=True) if w]]
    calls += [[pair] for pair, w in zip(pairs, whole, strict=True) if not w]
    done: list[list[tuple[Tensor, Tensor]]] = []
    try:
        for call in filter(None, calls):
            _swap(to_y, call, beta)
            done.append(call)
    except BaseException:
        for call in reversed(done):
            _swap(not to_y, call, beta)
        raise


def _swap(to_y: bool, pairs: list[tuple[Tensor, Tensor]], beta: float) -> None:
    zs = [z if z.element_size() > 2 else z.float() for _, z in pairs]
    (ops.x_to_y_ if to_y else ops.y_to_x_)([p for p, _ in pairs], [], zs, beta=beta)


def _has_moved(p: Tensor, state: State) -> bool:
    z = state["z"]
    return bool((z.dtype, z.device) != (p.dtype, p.device))


class ScheduleFreeWrapper(TwoModeOptimizer):
    """Makes any optimizer schedule-free (Defazio et al., arXiv 2405.15682).

    Groups and state are the base optimizer's, to which the wrapper adds its own entries, ``z`` and
    ``sf_momentum`` among them: so schedulers and state dicts treat both as one optimizer. While the base
    optimizer steps, its own entries alone are there; of those that share a name with the wrapper's, such as a
    ``z``, the name begins with ``base:`` otherwise. For the base optimizer's step a parameter and its ``z``
    exchange their memory, so nothing is copied. Prefer the classes
    that are fused, where there is one.

    Example::

        base = torch.optim.RMSprop(model.parameters(), lr=0.0025)
        optimizer = ScheduleFreeWrapper(base, weight_decay_at_y=0.1)

    Args:
        base: the optimizer, best without momentum of its own. Its ``lr`` is the learning rate.
        weight_decay_at_y: decay coefficient, evaluated at ``y``, >= 0. The base optimizer's own weight decay
            is evaluated at ``z``.
        momentum: interpolation weight of ``y = momentum*x + (1-momentum)*z``, in (0, 1]. Groups hold it as
            ``sf_momentum``, since ``momentum`` may be the base optimizer's; a change keeps ``x``.
        weight_lr_power: averaging weights grow as ``lr_max**weight_lr_power``.
        r: averaging weights grow as ``step**r``.
        nonfinite: what a step does where a gradient is not finite. ``"propagate"`` takes it, ``"skip"``
            leaves everything as it was, the base optimizer too, ``"raise"`` does so and names the parameter.
            Of a closure that the base optimizer calls several times, the first call decides.

    Raises:
        TypeError: if ``base`` is no ``torch.optim.Optimizer``, a schedule-free one, or one whose state dict
            has another form than torch's.
        ValueError: naming the hyperparameter, its value and its domain, or a group without ``lr``.
    """

    base: Optimizer

    _group_type: ClassVar[type[WrappedGroup]] = WrappedGroup
    _iterates: ClassVar[tuple[str, ...]] = ("z",)  # what it adds to a state
    _numbers: ClassVar[tuple[str, ...]] = ("lr", "weight_decay_at_y", "sf_momentum")

    def __init__(
        self,
        base: Optimizer,
        weight_decay_at_y: float = 0.0,
        momentum: float = 0.9,
        weight_lr_power: float = 2,
        r: float = 0,
        *,
        nonfinite: str = "propagate",
    ) -> None:
        """Checks the hyperparameters and adopts the base optimizer's groups."""
        if not isinstance(base, Optimizer):
            raise TypeError(f"Invalid base: expected a torch.optim.Optimizer, got {type(base)}")
        if any("weight_sum" in group for group in base.param_groups):
            raise TypeError(
                f"Invalid base: expected an optimizer that is not schedule-free itself, got {type(base)}"
            )
        if not (saved := base.state_dict().keys()) >= {"state", "param_groups"}:
            raise TypeError(
                f"Invalid base: the state dict of {type(base)} has {sorted(saved)}, expected state and "
                "param_groups"
            )
        check_number("momentum", momentum)
        check_number("weight_decay_at_y", weight_decay_at_y)
        check_number("r", r)
        check_number("weight_lr_power", weight_lr_power)
        check_choice("nonfinite", nonfinite, CHOICES["nonfinite"])
        self.base = base
        self.weight_decay_at_y = weight_decay_at_y
        self.r = r
        self.weight_lr_power = weight_lr_power
        self.nonfinite = nonfinite
        self._memory = Memory()
        for index, group in enumerate(base.param_groups):
            self._check(group, f" in parameter group {index}")
        for group in base.param_groups:
            _set_apart(group, _SCHEDULE)
        for state in base.state.values():
            _set_apart(state, _ITERATES)
        # Optimizer.__init__ would make groups of its own; this is the rest of what it does.
        self.__setstate__({})
        self._warned_capturable_if_run_uncaptured = True
        self._adopt_groups(train_mode=False, momentum=float(momentum))

    def _check(self, group: ParamGroup, where: str) -> None:
        """Raises ValueError for a number outside its domain, or a parameter of an unsupported dtype."""
        if "lr" not in group:
            raise ValueError(f"Invalid base: it has no lr{where}, by which the average is weighted")
        for name in group.keys() & {*self._numbers}:
            check_number(name, group[name], where)
        check_parameters({"params": [], **group}, where)

    # ---- around a step of the base optimizer ----------------------------------------------------------

    def _new_state(self, p: Tensor) -> State:
        """The wrapper's state of a parameter before its first step."""
        return {"z": p.detach().clone()}

    def _set_to_z(
        self, params: list[Tensor], states: list[State], decay: float, beta: float
    ) -> Callable[[], None]:
        """Has parameters hold z, decayed at y by ``decay``, and states x. Returns what undoes it."""
        zs = [state["z"] for state in states]
        before = [z.clone() for z in zs] if decay else zs
        try:
            for z, p in zip(zs if decay else (), params, strict=False):
                z.sub_(p, alpha=decay)
            _interpolate(False, params, before, beta)
        except BaseException:
            for z, b in zip(zs if decay else (), before, strict=False):
                z.copy_(b)
            raise
        _exchange(params, states)

        def undo() -> None:
            _exchange(params, states)
            if decay:
                for state, z in zip(states, before, strict=True):
                    state["z"].copy_(z)
            _interpolate(True, params, [state["z"] for state in states], beta)

        return undo

    @contextmanager
    def _at_y(self, p: Tensor, state: State, beta: float) -> Iterator[None]:
        """A context in which a parameter that holds z holds the y between this z and x."""
        z = p.detach().clone()
        p.copy_(state["z"])
        _interpolate(True, [p], [z], beta)
        try:
            yield
        finally:
            p.copy_(z)

    def _set_to_next_y(self, params: list[Tensor], states: list[State], c: float, beta: float) -> None:
        """Has parameters that hold the next z hold the next y; ``c`` is the weight of z in x."""
        _exchange(params, states)
        for p, state in zip(params, states, strict=True):
            p.lerp_(state["z"], c)
        self._set_x_to_y(params, states, beta)

    def _change_beta(self, params: list[Tensor], states: list[State], before: float, beta: float) -> None:
        """Has parameters that hold the y of one momentum hold that of another; x stays."""
        _interpolate(False, params, [state["z"] for state in states], before)
        self._set_x_to_y(params, states, beta)

    def _set_x_to_y(self, params: list[Tensor], states: list[State], beta: float) -> None:
        zs = [state["z"] for state in states]
        for to_y in (True, False, True, False, True):  # until y is settled (csrc/update_math.h)
            _interpolate(to_y, params, zs, beta)

    # ---- one optimizer of two -------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[ParamGroup]:
        """The base optimizer's groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[ParamGroup]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's state, with the wrapper's entries."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's hyperparameters."""
        return self.base.defaults

    @property
    def train_mode(self) -> bool:
        """True in train mode, where the parameters are ``y``."""
        return bool(self.param_groups[0]["train_mode"])

    @property
    def momentum(self) -> float:
        """``sf_momentum`` of the first group; setting it sets that of all."""
        return float(self.param_groups[0]["sf_momentum"])

    @momentum.setter
    def momentum(self, value: float) -> None:
        check_number("momentum", value)
        for group in self.param_groups:
            group["sf_momentum"] = float(value)

    def _new_record(self, group: ParamGroup) -> WrappedGroup:
        return self._group_type(group)

    def _adopt_groups(self, train_mode: bool, momentum: float) -> None:
        for group in self.param_groups:
            drop_duplicates(group)
            self._memory.had_parameters |= holds_parameters(group)
            group.setdefault("sf_momentum", momentum)
            group.setdefault("sf_momentum_of_y", float(group["sf_momentum"]))
            group.setdefault("weight_decay_at_y", self.weight_decay_at_y)
            group.setdefault("train_mode", train_mode)
            group.setdefault("k", 0)
            group.setdefault("weight_sum", 0.0)
            group.setdefault("lr_max", 0.0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer, in the mode the wrapper is in."""
        train_mode, momentum = self.train_mode, self.momentum
        where = f" in parameter group {len(self.param_groups)}"
        try:
            self.base.add_param_group(param_group)
        except ValueError as error:
            refuse_known_parameters(self.param_groups, param_group, where, error)
            raise
        try:
            self._check(self.param_groups[-1], where)
        except ValueError:
            del self.param_groups[-1]
            raise
        group = self.param_groups[-1]
        if "weight_sum" in group:  # a copy of a group of ours
            group.pop("train_mode", None)
        else:
            _set_apart(group, _SCHEDULE)
        self._adopt_groups(train_mode, momentum)

    # ---- step -----------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @eager
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Takes one optimization step.

        Args:
            closure: reevaluates the model and returns the loss. It is called with the parameters at ``y``,
                as often as the base optimizer asks: once by most, several times by ``torch.optim.LBFGS``,
                each time at the ``y`` of the ``z`` that is tried.

        Returns:
            What the closure returned first, or ``None`` without one.

        Raises:
            RuntimeError: in eval mode, or for a state on another device or of another dtype than its
                parameter (:meth:`train` moves it).
            ValueError: for a hyperparameter that has been moved outside its domain.
        """
        return self._step(closure)  # type: ignore[no-any-return]

    _take_step = step  # torch puts its hooks around `step`

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        memory = self._memory
        if closure is None and self._is_probe():
            with Lent(self.base):
                self.base.step()
            for p in self._with_gradient():
                self.state[p].update(self._new_state(p))
            memory.probed = True
            return None
        self._require_train_mode()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if memory.probed:
            self.state.clear()  # the parameters may have been loaded since
            memory.probed = False
        own = self._states_of_step()
        for index, group in enumerate(self.param_groups):
            self._schedule(index, group)  # refuses what it would refuse after the base optimizer's step
        if self._is_skipped([*own]):
            return loss
        for group in self.param_groups:
            if _y_beta(group) != float(group["sf_momentum"]):
                require_shapes(group, self.state, range(len(group["params"])))
        kept = self._copies(own)
        undo: list[Callable[[], None]] = []
        # With a closure the base optimizer may run for long, and Ctrl-C ends it.
        with Uninterrupted() if closure is None else nullcontext():
            try:
                with Uninterrupted():
                    for group in self.param_groups:
                        decay = float(group["lr"]) * float(group["weight_decay_at_y"])
                        params = [p for p in group["params"] if p in own]
                        states = [own[p] for p in params]
                        undo.append(self._set_to_z(params, states, decay, _y_beta(group)))
                with Lent(self.base) as lent:
                    if closure is None:
                        self.base.step()
                    else:
                        self.base.step(self._closure_at_y(closure, loss, own, lent))  # type: ignore[arg-type]
            except BaseException:
                with Uninterrupted():
                    for action in reversed(undo):
                        action()
                    self._put_copies(kept)
                raise
            with Uninterrupted():
                self._finish_step(own)
        return loss

    def _states_of_step(self) -> dict[Tensor, State]:
        """The states of all parameters with a gradient; new ones are added after the base optimizer's step.

        Many optimizers see a parameter's first step by its empty state.
        """
        own: dict[Tensor, State] = {}
        for p in self._with_gradient():
            state: State = self.state.get(p, {})
            iterates = {name: state[name] for name in self._iterates if name in state}
            own[p] = iterates if "z" in iterates else self._new_state(p)
            if _has_moved(p, own[p]):
                self._memory.moved = True
                raise RuntimeError(MOVED)
        return own

    def _copies(self, own: dict[Tensor, State]) -> dict[Tensor, tuple[Tensor, State]]:
        """Copies of parameters and state where a gradient is sparse, which many optimizers refuse late."""
        if all(p.grad is None or p.grad.layout is torch.strided for p in own):
            return {}
        return {p: (p.detach().clone(), copy.deepcopy(dict(self.state.get(p, {})))) for p in own}

    def _put_copies(self, kept: dict[Tensor, tuple[Tensor, State]]) -> None:
        for p, (value, state) in kept.items():
            p.copy_(value)
            now = self.state[p]
            for name in [*now]:
                if name not in state:
                    del now[name]
                elif isinstance(now[name], Tensor):
                    now[name].copy_(state[name])
                else:
                    now[name] = state[name]

    def _finish_step(self, own: dict[Tensor, State]) -> None:
        """Has the parameters go from the next z to the next y, and counts the step."""
        for index, group in enumerate(self.param_groups):
            before, beta = _y_beta(group), float(group["sf_momentum"])
            step = self._schedule(index, group)
            params = [p for p in group["params"] if p in own]
            if not params and not any(map(has_no_elements, group["params"])):
                continue  # a group that rests takes no step
            self._set_to_next_y(params, [own[p] for p in params], step.c, beta)
            for p in params:
                self.state[p].update(own[p])
            if beta != before:
                rest = [p for p in group["params"] if p not in own and "z" in self.state.get(p, ())]
                self._change_beta(rest, [self.state[p] for p in rest], before, beta)
            group["sf_momentum_of_y"] = beta
            group["lr_max"] = step.lr_max
            group["weight_sum"] = step.weight_sum
            group["k"] = step.k

    def _is_skipped(self, params: list[Tensor]) -> bool:
        """True for a step that ``nonfinite`` skips; raises where it says so. Waits for the norm."""
        check_choice("nonfinite", self.nonfinite, CHOICES["nonfinite"])
        if self.nonfinite == nonfinite_.DEFAULT:
            return False
        grads = sharded.local_gradients([p.grad for p in params if p.grad is not None], params)
        square = sharded.all_reduced(params, lambda at: ops.grad_norm([grads[i] for i in at]).square())
        norm = read_values(square)[0]
        if math.isfinite(norm):
            return False
        if self.nonfinite == "raise":
            nonfinite_.refuse(self.param_groups, norm)
        return True

    def _schedule(self, index: int, group: ParamGroup) -> _C.ScheduleStep:
        where = f" in parameter group {index}"
        for name in self._numbers:
            check_number(name, group[name], where)
        try:
            return _C.schedule_step(
                kind=ops.STEP_KINDS["sgd"],
                k=group["k"],
                weight_sum=group["weight_sum"],
                lr_max=group["lr_max"],
                lr=float(group["lr"]),
                lr_factor=float(group.get("d", 1.0)),  # the estimate of optimizers such as Prodigy
                r=self.r,
                weight_lr_power=self.weight_lr_power,
                beta=_y_beta(group),
                beta_next=float(group["sf_momentum"]),
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}{where}") from error

    def _closure_at_y(
        self, closure: Callable[[], Loss], loss: Loss | None, own: dict[Tensor, State], lent: Lent
    ) -> Callable[[], Loss | None]:
        """The closure for the base optimizer; the loss and the gradients of its first call are there."""
        known, before = [loss], _seen(own)

        def call() -> Loss | None:
            # A base optimizer that has moved or cleared something before, as SAM does, needs another.
            if known and _seen(own) == before:
                return known.pop()
            known.clear()
            with torch.no_grad(), lent.returned(), ExitStack() as stack:
                for group in self.param_groups:
                    for p in group["params"]:
                        if p in own:
                            stack.enter_context(self._at_y(p, own[p], _y_beta(group)))
                with torch.enable_grad():
                    return closure()

        return call

    def _with_gradient(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    # ---- checkpoints ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep."""
        names = ("base", "weight_decay_at_y", "r", "weight_lr_power", "nonfinite")
        memory = replace(self._memory, groups=[])  # records are made anew
        return {**{name: getattr(self, name) for name in names}, "_memory": memory}

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict with the wrapper's entries, mode included."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        saved = self.base.state_dict()
        # The optimizer's own dicts stay its own.
        saved["state"] = {k: dict(v) if isinstance(v, dict) else v for k, v in saved["state"].items()}
        for group in saved["param_groups"]:
            store_plain_numbers(group)
        memory = self._memory
        samples = None if memory.probed else memory.expected or take_samples(self._records(), self.state)
        saved |= own_entry(samples, None)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            saved = post_hook(self, saved) or saved
        return saved

    @eager
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of its namesake in ``schedulefree``, which has no mode.

        Args:
            state_dict: what :meth:`state_dict` returned; it is copied.

        Raises:
            ValueError: for a state dict of other parameters or of another schedule-free optimizer; nothing
                has been loaded. That of a base optimizer alone starts the average afresh.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        train_mode, momenta = self.train_mode, [group["sf_momentum"] for group in self.param_groups]
        state_dict = _with_names_apart(state_dict)
        apart = [[name for name in _SCHEDULE if _BASES + name in group] for group in self.param_groups]
        samples = Samples.of(state_dict.get(OURS, {}).get("fingerprint"))
        states = {key: state for key, state in state_dict["state"].items() if isinstance(state, dict)}
        of_parameters = {**state_dict, "state": states}
        check_wrapped(self.param_groups, of_parameters, type(self).__name__, self._iterates)
        self.base.load_state_dict(state_dict)
        for group, momentum, names in zip(self.param_groups, momenta, apart, strict=True):
            group.setdefault("sf_momentum", momentum)
            for name in names:  # in a dict of an earlier build one entry was both
                group.setdefault(_BASES + name, group.get(name))
        self._adopt_groups(train_mode, self.momentum)
        saved = {id(t) for state in states.values() for t in state.values()}
        for state in self.state.values():
            for name, value in state.items() if isinstance(state, dict) else ():
                if isinstance(value, Tensor) and id(value) in saved:
                    state[name] = value.clone()
        self._memory.expected = samples
        self._memory.probed = False
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


class StoredGroup(WrappedGroup):
    """A group of parameters that have x and y in their state."""

    @torch.no_grad()
    def swap(self, all_state: Any, to_train: bool) -> None:
        """Changes the parameters from ``x`` to ``y``, or from ``y`` to ``x``."""
        self.follow_parameters(all_state, True)
        for p in self.group["params"]:
            state = all_state.get(p, {})
            if "z" in state:
                if not {"x", "y"} <= state.keys():
                    name = "ScheduleFreeWrapperReference"
                    raise RuntimeError(
                        f"{name} has been given a state without x and y: it comes from a class that does not "
                        "store them"
                    )
                p.copy_(state["y" if to_train else "x"])


class ScheduleFreeWrapperReference(ScheduleFreeWrapper):
    """:class:`ScheduleFreeWrapper` that stores ``x``, ``y`` and ``z``: simple to modify.

    Its arguments too, but for their order, which is upstream's.
    """

    _group_type: ClassVar[type[WrappedGroup]] = StoredGroup
    _iterates: ClassVar[tuple[str, ...]] = ("x", "y", "z")

    def __init__(
        self,
        base: Optimizer,
        momentum: float = 0.9,
        weight_decay_at_y: float = 0.0,
        r: float = 0,
        weight_lr_power: float = 2,
        *,
        nonfinite: str = "propagate",
    ) -> None:
        """Checks the hyperparameters and adopts the base optimizer's groups."""
        super().__init__(base, weight_decay_at_y, momentum, weight_lr_power, r, nonfinite=nonfinite)

    def _new_state(self, p: Tensor) -> State:
        return {name: p.detach().clone() for name in self._iterates}

    def _set_to_z(
        self, params: list[Tensor], states: list[State], decay: float, beta: float
    ) -> Callable[[], None]:
        before = [state["z"].clone() for state in states]

        def undo() -> None:
            for p, state, z in zip(params, states, before, strict=True):
                state["z"].copy_(z)
                p.copy_(state["y"])

        try:
            for p, state in zip(params, states, strict=True):
                p.copy_(state["z"].sub_(state["y"], alpha=decay))
        except BaseException:
            for state, z in zip(states, before, strict=True):
                state["z"].copy_(z)
            for p, state in zip(params, states, strict=True):
                if p.shape == state["y"].shape:
                    p.copy_(state["y"])
            raise
        return undo

    @contextmanager
    def _at_y(self, p: Tensor, state: State, beta: float) -> Iterator[None]:
        z = p.detach().clone()
        p.copy_(beta * state["x"] + (1 - beta) * z)
        try:
            yield
        finally:
            p.copy_(z)

    def _set_to_next_y(self, params: list[Tensor], states: list[State], c: float, beta: float) -> None:
        for p, state in zip(params, states, strict=True):
            state["z"].copy_(p)
            state["x"].copy_((1 - c) * state["x"] + c * state["z"])
        self._change_beta(params, states, beta, beta)

    def _change_beta(self, params: list[Tensor], states: list[State], before: float, beta: float) -> None:
        for p, state in zip(params, states, strict=True):
            state["y"].copy_(beta * state["x"] + (1 - beta) * state["z"])
            p.copy_(state["y"])


class ScheduleFreeWrapperClosure(ClosureForm, ScheduleFreeWrapper):
    """:class:`ScheduleFreeWrapper` with ``step(closure)`` and no need of ``train()`` and ``eval()``.

    Parameters are ``x`` but while :meth:`step` calls the closure, when they are ``y``.
    """


def _seen(params: Iterable[Tensor]) -> list[tuple[int, int, int]]:
    """By what a write to parameters or gradients is noticed."""
    return [(p._version, id(p.grad), -1 if p.grad is None else p.grad._version) for p in params]


def _with_names_apart(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict as a wrapper writes it: of a base optimizer alone, every entry is the base optimizer's."""
    if any("weight_sum" in group for group in state_dict["param_groups"]):
        return state_dict
    groups = [dict(group) for group in state_dict["param_groups"]]
    states = {k: dict(v) if isinstance(v, dict) else v for k, v in state_dict["state"].items()}
    for group in groups:
        _set_apart(group, _SCHEDULE)
    for state in states.values():
        _set_apart(state, _ITERATES)
    return {**state_dict, "param_groups": groups, "state": states}


def _y_beta(group: ParamGroup) -> float:
    """The interpolation weight that built the current y."""
    return float(group["sf_momentum_of_y"])


def _exchange(params: Sequence[Tensor], states: Sequence[State]) -> None:
    """Exchanges the contents of parameters and of their z."""
    for p, state in zip(params, states, strict=True):
        if type(p) in PLAIN_TYPES or type(p.data) is Tensor:
            p.data, state["z"] = state["z"], p.data
        else:
            # A tensor subclass may hold its memory elsewhere.
            z = state["z"].clone()
            state["z"].copy_(p)
            p.copy_(z)
