"""Parameter groups and their state: hyperparameters, the swaps between ``y`` and ``x``, checkpoints."""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from schedulefree_cpp import _capturable, _formats, _nonfinite, _sharded, _state_dict, _traced, ops
from schedulefree_cpp._library import _C
from schedulefree_cpp._modes import Group, Memory, State, TwoModeOptimizer, holds_parameters
from schedulefree_cpp._traced import eager

PARAMETER_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Hyperparameters that may be tensors, which a captured or compiled step reads when it runs.
TENSORS = ("lr", "weight_decay")

_PLAIN = {Tensor, torch.nn.Parameter}
_PLAIN_NUMBERS: tuple[type, ...] = (bool, int, float)

# Stands in a list of what the formats of some parameters have for one that lacks it.
_NO_PART = torch.empty(0, device="cpu")

# How an optimizer keeps what it has, which loading a checkpoint leaves as it is.
_LAYOUT = ("capturable", "state_bits", "exp_avg_sq_bits")

# The values of hyperparameters that are neither numbers nor flags.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "decay_at": tuple(ops.DECAY_AT),
    "state_bits": (32, 24),
    "exp_avg_sq_bits": (32, 8),
    "rounding": ("nearest", "stochastic"),
}


def check_number(name: str, value: object, where: str = "", domain: str | None = None) -> None:
    """Raises ValueError naming a hyperparameter, its value and its domain (``csrc/hyperparameters.h``)."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    number = number or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())
    try:
        real = float(value) if number else None  # type: ignore[arg-type]
    except OverflowError:
        real = None
    if real is None:
        raise ValueError(
            f"Invalid {name}{where}: {value!r} of type {type(value).__name__}, expected a number"
        )
    try:
        _C.check_hyperparameter(domain or name, real, where)
    except ValueError as error:
        raise ValueError(str(error).replace(f"Invalid {domain}", f"Invalid {name}", 1)) from None


def store_plain_numbers(group: Group) -> None:
    """Makes Python numbers of other ones, such as NumPy's, and a tuple of ``betas``.

    A checkpoint of a group is then read with ``weights_only=True``, and ``betas`` may be any sequence.
    """
    for name, value in group.items():
        if isinstance(value, Real) and type(value) not in _PLAIN_NUMBERS:
            group[name] = int(value) if isinstance(value, Integral) else float(value)
    if "betas" in group:
        group["betas"] = tuple(map(float, group["betas"]))


def check_parameters(group: Group, where: str) -> None:
    """Raises ValueError for a parameter that wants gradients and is of a dtype that no operator takes."""
    for i, p in enumerate(group["params"]):
        if p.requires_grad and p.dtype not in PARAMETER_DTYPES:
            raise ValueError(
                f"Invalid params[{i}]{where}: dtype {p.dtype}, expected one of "
                f"{', '.join(map(str, PARAMETER_DTYPES))}"
            )


def drop_duplicates(group: Group) -> None:
    """Has a group hold every parameter once. torch has warned of those that stand there twice."""
    first = {p: i for i, p in reversed(list(enumerate(group["params"])))}
    group.update(select(group, sorted(first.values())))


def select(group: Group, positions: Sequence[int]) -> Group:
    """The parameters of a group at some positions, and their names if they have any."""
    lists = {key: group[key] for key in ("params", "param_names") if key in group}
    return {key: [values[i] for i in positions] for key, values in lists.items()}


def refuse_known_parameters(groups: list[Group], group: Group, where: str, error: ValueError) -> None:
    """Raises ValueError naming the parameter for which torch has refused a group: it is in another one."""
    homes = {p: index for index, other in enumerate(groups) for p in other["params"]}
    names = group.get("param_names", [])
    for i, p in enumerate(group["params"]):
        if isinstance(p, Tensor) and p in homes:
            name = f" ({names[i]!r})" if i < len(names) else ""
            raise ValueError(
                f"Invalid params[{i}]{name}{where}: it is in parameter group {homes[p]}, too; {error}"
            ) from None


def _measures(group: Group) -> bool:
    return group.get("max_grad_norm") is not None or group.get("nonfinite", "propagate") != "propagate"


class GroupPlan(NamedTuple):
    """The part of a parameter group that compiled code reads, since it makes constants of all numbers."""

    params: list[Tensor]
    plain: bool  # no parameter is a DTensor or of another subclass
    traceable: bool  # nor of one that compiled code cannot hand to an operator
    state_names: tuple[str | None, ...]  # the operator's lists from z on; None for an absent one
    decay_at: int
    bits: _formats.Bits
    parts: tuple[str, ...]  # the operator's lists beside these, of what some formats have

    def matches(self, other: GroupPlan) -> bool:
        """True where code that was compiled for one plan serves the other."""
        same = len(self.params) == len(other.params) and self[1:] == other[1:]
        return same and all(map(operator.is_, self.params, other.params))


@dataclass
class ScheduleMemory(Memory):
    """See :class:`Memory`."""

    key: str = ""
    plans: list[GroupPlan] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)  # hyperparameters that are tensors
    measures: bool = False  # a step needs the norm of all gradients
    coefs: list[Tensor] = field(default_factory=list)  # of each group: the scalars of its step
    buffers: list[ctypes.Array[ctypes.c_char]] = field(
        default_factory=list
    )  # the memory of coefs, unless capturable
    y_beta: list[float] = field(default_factory=list)  # of each group: the beta that built y
    groups: list[Group] = field(default_factory=list)  # those that y_beta, coefs and buffers are of
    grad_norm: Tensor | None = None
    # Of an iteration in which step_parameter() was called: its schedules, the group of each parameter, and
    # the parameters that have stepped.
    open: list[Any] | None = None
    homes: dict[Tensor, int] = field(default_factory=dict)
    stepped: set[Tensor] = field(default_factory=set)
    # What load_state_dict() is about to take over: state, and our entry of the state dict.
    loading: tuple[dict[Tensor, State], dict[str, Any]] | None = None

    def add_coefs(self) -> None:
        """Makes the ``coefs`` of another group, whose memory Python can write without an operator."""
        coefs = torch.zeros(len(ops.COEFFICIENTS), dtype=torch.float64, device="cpu")
        size = ctypes.c_char * coefs.nbytes
        # A fake tensor has no memory.
        self.buffers.append(size.from_address(coefs.data_ptr()) if type(coefs) is Tensor else size())
        self.coefs.append(coefs)


def state_lists(
    states: Sequence[State], names: Sequence[str | None], plain: bool = True
) -> list[list[Tensor]]:
    """An operator's lists of low halves and of the state tensors with these names.

    Raises:
        RuntimeError: for a state that lacks one.
    """
    try:
        lists = [[] if name is None else [state[name] for state in states] for name in names]
    except KeyError as error:
        raise RuntimeError(
            f"the state of a parameter lacks {error}, which this group's hyperparameters need: set them "
            "before the first step, or load a checkpoint that was made with them"
        ) from None
    lists = [part_list(states, "y_lo"), *lists]
    return lists if plain else [[_sharded.local(t) for t in tensors] for tensors in lists]


def part_list(states: Sequence[State], name: str) -> list[Tensor]:
    """An operator's list of what some parameters have and others lack, empty where all do."""
    if any([name in state for state in states]):
        return [_sharded.local(state.get(name, _NO_PART)) for state in states]
    return []


def part_lists(states: Sequence[State], names: Sequence[str]) -> dict[str, list[Tensor]]:
    """Those lists by name."""
    return {name: part_list(states, name) for name in names}


class GroupedOptimizer(TwoModeOptimizer):
    """Groups and state of the schedule-free optimizers; not used directly."""

    _memory: ScheduleMemory
    _memory_type: ClassVar[type[ScheduleMemory]] = ScheduleMemory

    # Hyperparameters that upstream's groups lack. A group holds them only where they differ from these
    # defaults, so that flattened checkpoints, which need equal keys, go both ways.
    _extras: ClassVar[dict[str, Any]] = {
        "decoupling_c": 0.0,
        "averaging_weight": 0.0,
        "maximize": False,
        "decay_at": "y",
        "max_grad_norm": None,
        "capturable": False,
        "state_bits": 32,
        "exp_avg_sq_bits": 32,
        "rounding": "nearest",
        "nonfinite": _nonfinite.DEFAULT,
    }
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
    _numbers: ClassVar[tuple[str, ...]] = (
        "lr",
        "weight_decay",
        "warmup_steps",
        "r",
        "weight_lr_power",
        "decoupling_c",
        "averaging_weight",
    )

    # ---- what a subclass says -------------------------------------------------------------------------

    _kind: ClassVar[int]
    _operator: ClassVar[Callable[..., None]]
    _supports_capturable: ClassVar[bool] = True

    def _beta(self, group: Group) -> float:
        """The interpolation weight of the next y."""
        raise NotImplementedError

    def _initial_y_beta(self, group: Group) -> float:
        """The interpolation weight of the current y, where only the group's hyperparameters are known."""
        return self._beta(group)

    def _lr(self, group: Group) -> Any:
        """The group's learning rate, before warmup and factors."""
        return group["lr"]

    def _state_names(self, group: Group) -> tuple[str | None, ...]:
        """The tensors of a state in the order of the operator; None for an absent list."""
        return ("z",)

    def _parts(self, bits: _formats.Bits) -> tuple[str, ...]:
        """The tensors of a state that an operator takes by name, since some parameters have them alone."""
        return ("z_lo",) if bits.state == 24 else ()

    def _rule(self, group: Group) -> dict[str, Any]:
        """The hyperparameters that the schedule needs beside lr, weight decay and beta."""
        return {
            "kind": self._kind,
            "warmup_steps": group.get("warmup_steps", 0),
            "r": group["r"],
            "weight_lr_power": group["weight_lr_power"],
            "decoupling_c": group.get("decoupling_c", 0.0),
            "averaging_weight": group.get("averaging_weight", 0.0),
            "maximize": group.get("maximize", False),
            "max_grad_norm": group.get("max_grad_norm"),
            "stochastic": group.get("rounding", "nearest") == "stochastic",
        }

    def _advance_compiled(
        self,
        coefs: Sequence[Tensor],
        observed: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
        resting: Sequence[Sequence[int]],
    ) -> None:
        """Advances the schedule of every group and fills its ``coefs``, when compiled code runs."""
        raise NotImplementedError

    # ---- groups ---------------------------------------------------------------------------------------

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        """Checks the hyperparameters and builds the groups."""
        self._memory = self._memory_type(key=_traced.register(self))
        self._check_hyperparameters(defaults, "")
        changed = {k: v for k, v in defaults.items() if k not in self._extras or v != self._extras[k]}
        store_plain_numbers(changed)
        super().__init__(params, self._schedule_start | changed)

    @property
    def capturable(self) -> bool:
        """True where the schedule lives in tensors on the parameters' device."""
        return bool(self.defaults.get("capturable", False))

    def _check_hyperparameters(self, group: Group, where: str) -> None:
        for name in self._numbers:
            if name in group:
                check_number(name, group[name], where)
        for name, choices in _CHOICES.items():
            if name in group and group[name] not in choices:
                raise ValueError(f"Invalid {name}{where}: {group[name]!r}, expected one of {list(choices)}")
        if group.get("max_grad_norm") is not None:
            check_number("max_grad_norm", group["max_grad_norm"], where)
        if group.get("capturable", False) and not self._supports_capturable:
            raise ValueError(
                f"Invalid capturable{where}: {group['capturable']!r}, expected False: a step of "
                f"{type(self).__name__} needs the host"
            )
        _nonfinite.check(group.get("nonfinite", _nonfinite.DEFAULT), where)
        if group.get("nonfinite") == "raise" and group.get("capturable", False):
            raise ValueError(
                f"Invalid nonfinite{where}: 'raise', expected 'skip' or 'propagate' with capturable, whose "
                "steps no host looks at"
            )

    def _check_parameters(self, group: Group, where: str) -> None:
        check_parameters(group, where)

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
        index = len(self.param_groups)
        where = f" in parameter group {index}"
        self._check_hyperparameters(self.defaults | param_group, where)
        if bool(param_group.get("capturable", self.capturable)) != self.capturable:
            raise ValueError(
                f"Invalid capturable{where}: {param_group['capturable']!r}, expected {self.capturable} as "
                "for the whole optimizer"
            )
        first = self.param_groups[0] if index else self.defaults
        _nonfinite.require_same(first, self.defaults | param_group, where)
        try:
            super().add_param_group(param_group)
        except ValueError as error:
            refuse_known_parameters(self.param_groups, param_group, where, error)
            raise
        group = self.param_groups[index]
        try:
            self._check_parameters(group, where)
        except ValueError:
            del self.param_groups[index]
            raise
        drop_duplicates(group)
        store_plain_numbers(group)
        self._memory.had_parameters |= holds_parameters(group)
        if index and "train_mode" in self._schedule_start:
            group["train_mode"] = self.param_groups[0]["train_mode"]
        self._refresh_plans()

    def _plan(self, index: int, group: Group) -> GroupPlan:
        params, decay_at = group["params"], group.get("decay_at", "y")
        if decay_at not in ops.DECAY_AT:
            self._check_hyperparameters(group, f" in parameter group {index}")
        plain = {*map(type, params)} <= _PLAIN
        traceable = plain or all(type(p) in _PLAIN or _sharded.is_dtensor(p) for p in params)
        names, bits = self._state_names(group), _formats.bits_of(group)
        at, parts = ops.DECAY_AT[decay_at], self._parts(bits)
        return GroupPlan(params, plain, traceable, names, at, bits, parts)

    def _refresh_plans(self) -> None:
        """Rebuilds the plans from the groups, which the user may have changed."""
        memory, groups = self._memory, self.param_groups
        self._follow_groups()
        memory.plans = [self._plan(index, group) for index, group in enumerate(groups)]
        memory.tensors = [g[name] for g in groups for name in TENSORS if isinstance(g[name], Tensor)]
        memory.measures = any(map(_measures, groups))
        if self.capturable:
            for index, group in enumerate(groups):
                _capturable.to_tensors(group)
                memory.coefs[index] = memory.coefs[index].to(_capturable.home_of(group))

    def _rebuild_changed_plans(self) -> bool:
        """Rebuilds the plans. Returns True where code that was compiled for them must not run any more."""
        memory = self._memory
        plans, measures, tensors = memory.plans, memory.measures, memory.tensors
        self._refresh_plans()
        same = measures == memory.measures and len(plans) == len(memory.plans)
        same = same and len(tensors) == len(memory.tensors)
        same = same and all(map(operator.is_, tensors, memory.tensors))
        return not (same and all(map(GroupPlan.matches, plans, memory.plans)))

    # ---- train and eval -------------------------------------------------------------------------------

    def _swap(self, index: int, group: Group, to_train: bool) -> None:
        swap = ops.x_to_y_ if to_train else ops.y_to_x_
        self._swap_parameters(swap, group, group["params"], self._memory.y_beta[index])

    def _swap_parameters(
        self, swap: Callable[..., None], group: Group, params: Sequence[Tensor], beta: float
    ) -> None:
        states: list[Any] = [self.state.get(p) for p in params]
        active = [state is not None and "z" in state for state in states]
        if not all(active):
            params = [p for p, a in zip(params, active, strict=True) if a]
            states = [state for state, a in zip(states, active, strict=True) if a]
        if not params:
            return
        bits = _formats.bits_of(group)
        for p, state in zip(params, states, strict=True):
            if p.element_size() == 2 and "y_lo" not in state:  # cast since; a swap would take 16 bits alone
                _formats.match(p, state, bits)
        plain = {*map(type, params)} <= _PLAIN
        y = params if plain else [_sharded.local(p) for p in params]
        parts = GroupedOptimizer._parts(self, bits)
        try:
            swap(y, *state_lists(states, ("z",), plain), **part_lists(states, parts), beta=beta)
        except RuntimeError:
            # A refused call has changed nothing. Parameters may have moved since their state was made.
            pairs = zip(params, states, strict=True)
            if not any([_formats.match(p, state, bits) for p, state in pairs]):
                raise
            swap(y, *state_lists(states, ("z",), plain), **part_lists(states, parts), beta=beta)
        if not plain:
            torch.autograd.graph.increment_version(params)

    def _y_beta(self, index: int) -> float:
        return self._memory.y_beta[index]

    def _follow_groups(self) -> None:
        memory, groups = self._memory, self.param_groups
        if len(memory.groups) != len(groups) or not all(map(operator.is_, memory.groups, groups)):
            known = {id(group): beta for group, beta in zip(memory.groups, memory.y_beta, strict=True)}
            memory.y_beta[:] = [
                known[id(group)] if id(group) in known else self._initial_y_beta(group) for group in groups
            ]
            memory.groups[:] = groups
            memory.coefs.clear()
            memory.buffers.clear()
            for _ in groups:
                memory.add_coefs()

    def _require_closed_step(self, what: str) -> None:
        if self._memory.stepped:
            raise RuntimeError(
                f"{what} was called between step_parameter() and the step() that ends the iteration: some "
                "parameters have taken the step and others have not. Call optimizer.step() first."
            )

    # ---- state ----------------------------------------------------------------------------------------

    def _new_state(self, p: Tensor, plan: GroupPlan) -> State:
        """The state before the first step: z is the parameter, moments are 0."""
        if p.dtype not in PARAMETER_DTYPES:
            raise RuntimeError(
                f"a parameter of dtype {p.dtype} has a gradient: expected None, or a dtype of "
                f"{', '.join(map(str, PARAMETER_DTYPES))}"
            )
        return _formats.new_state(p, [name for name in plan.state_names if name], plan.bits)

    def _move_state(self, group: Group) -> None:
        for p in group["params"]:
            if "z" in self.state.get(p, ()):
                _formats.match(p, self.state[p], _formats.bits_of(group))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer.zero_grad``; compiled code may call it."""
        if set_to_none and torch.compiler.is_compiling():
            for plan in self._memory.plans:
                for p in plan.params:
                    p.grad = None
        else:
            super().zero_grad(set_to_none)

    # ---- a first step that only makes the state -------------------------------------------------------

    def _make_state(self) -> None:
        for plan in self._memory.plans:
            for p in plan.params:
                if p.grad is not None:
                    self.state[p] = self._new_state(p, plan)
        self._memory.probed = True

    @eager
    def _forget_probe(self) -> None:
        self.state.clear()  # the parameters may have been loaded since
        self._memory.probed = False

    # ---- checkpoints ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep."""
        self._require_closed_step("copying the optimizer")
        names = ("y_beta", "expected", "probed")
        return {**super().__getstate__(), "_kept": {name: getattr(self._memory, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores from pickle, deepcopy or a state dict, older ones included."""
        state = dict(state)
        try:
            memory: ScheduleMemory | None = self._memory
        except (AttributeError, RecursionError):  # of a proxy that is being copied, too
            memory = None
        if memory is None:
            memory = self._memory = self._memory_type(key=_traced.register(self))
        else:
            # In place: a proxy that loads a state dict shares these objects, but not assignments to them.
            self.param_groups[:] = state.pop("param_groups")
            self.state.clear()
            self.state.update(state.pop("state"))
        kept = state.pop("_kept", {})
        super().__setstate__(state)
        memory.open = None
        memory.stepped.clear()
        for group in self.param_groups:
            for key, value in self.defaults.items():
                if key != "differentiable":
                    group.setdefault(key, value)
            if "train_mode" not in self._schedule_start:
                group.pop("train_mode", None)
        memory.y_beta.clear()
        memory.groups.clear()
        self._follow_groups()
        for name, value in kept.items():
            setattr(memory, name, value)
        if memory.loading is not None:
            loaded, entry = memory.loading
            self.state.update(loaded)
            memory.y_beta[:] = entry.get("y_beta", memory.y_beta)
            memory.expected = _state_dict.Samples.of(entry.get("fingerprint"))
            memory.probed = False
        self._refresh_plans()

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer.state_dict``, with the keys of ``schedulefree``.

        One entry beside ``"state"`` and ``"param_groups"`` holds the betas that built ``y``, and samples of
        the parameters, so that a model saved in the other mode is recognised.
        """
        self._require_closed_step("state_dict()")
        # Runs before the hooks of users, which may return another dict.
        handle = self.register_state_dict_post_hook(_complete_state_dict, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

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
        # The base class would cast every tensor of the state to its parameter's dtype.
        handle = self.register_load_state_dict_pre_hook(_copy_loaded_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
            self._memory.loading = None


def _complete_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    assert isinstance(optimizer, GroupedOptimizer)
    memory = optimizer._memory
    for group in state_dict["param_groups"]:
        # Checkpoints do not depend on where and how the optimizer keeps what it has.
        _capturable.to_numbers(group)
        for name in _LAYOUT:
            group.pop(name, None)
    optimizer._follow_groups()
    samples = None if memory.probed else memory.expected or _state_dict.sample(optimizer)
    _state_dict.complete(state_dict, samples, memory.y_beta)


def _copy_loaded_state(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Copies the state of a state dict, and hides it from the base class. The last hook to run."""
    assert isinstance(optimizer, GroupedOptimizer)
    groups, owner = optimizer.param_groups, type(optimizer).__name__
    state_dict = _state_dict.in_order_of(groups, state_dict)
    _state_dict.check(groups, state_dict, owner, optimizer._required)
    loaded_groups, names = [], []
    for index, (own, saved) in enumerate(zip(groups, state_dict["param_groups"], strict=True)):
        group = {key: value for key, value in saved.items() if key not in _LAYOUT}
        group |= {key: own[key] for key in _LAYOUT if key in own}
        _capturable.to_numbers(group)
        where = f" in parameter group {index} of the state dict"
        optimizer._check_hyperparameters(group, where)
        store_plain_numbers(group)
        loaded_groups.append(group)
        merged = {**own, **group, "params": own["params"]}
        optimizer._check_parameters(merged, where)
        names.append(optimizer._state_names(merged))
    _nonfinite.policy_of([optimizer.defaults | group for group in loaded_groups], " of the state dict")
    entry = state_dict.get(_state_dict.OURS, {})
    _state_dict.Samples.of(entry.get("fingerprint"))  # refuses what is none
    state = _state_dict.copy_state(groups, state_dict, required=[of_group[:2] for of_group in names])
    for group, of_group in zip(groups, names, strict=True):
        for p in group["params"]:
            if p in state:
                for name in of_group:
                    if name is not None:
                        zeros = torch.zeros_like(p, dtype=_formats.dtype_of(p), requires_grad=False)
                        state[p].setdefault(name, zeros)
                _formats.match(p, state[p], _formats.bits_of(group))
    optimizer._memory.loading = (state, entry)
    return {**state_dict, "param_groups": loaded_groups, "state": {}}
