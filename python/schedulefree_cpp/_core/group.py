"""The record of one parameter group: its lists, its schedule and its beta."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from schedulefree_cpp import ops
from schedulefree_cpp._core import sharded
from schedulefree_cpp._core.library import _C
from schedulefree_cpp._core.state import Bits, bits_of, convert, fits, new_state, optional_list
from schedulefree_cpp._core.types import PLAIN_TYPES, ParamGroup, State


class Gathered(NamedTuple):
    """What one operator call updates."""

    params: list[Tensor]
    lists: list[list[Tensor]]  # the operator's: y, y_lo, grad, z, moments
    parts: dict[str, list[Tensor]]  # and those that it takes by name
    created: list[tuple[int, Tensor, State]]  # what parameters get with this step, by position in the group
    resting: list[int]  # positions in the group of the parameters that take no step


class Group:
    """What belongs to one parameter group beside its dict. Subclasses say whose step it takes.

    Compiled code reads the attributes from ``params`` on, never ``optimizer.state``, in which Dynamo finds an
    entry by walking its keys, nor the dict, whose numbers it would make constants.
    """

    kind: int
    # By the tensor: the field of Bits, and its value, with which the operator takes a list by name.
    optional_lists: ClassVar[dict[str, tuple[str, int]]] = {"z_lo": ("state", 24)}

    def __init__(self, group: ParamGroup) -> None:
        """Makes the record of a group; whoever makes it sets ``y_beta``."""
        self.group = group
        self.y_beta = 1.0  # the beta that built y
        self._trains = False  # where the dict does not tell
        self.coefs = torch.zeros(len(ops.COEFFICIENTS), dtype=torch.float64, device="cpu")
        # The memory of coefs, which Python then writes without an operator. A fake tensor has none.
        size = ctypes.c_char * self.coefs.nbytes
        real = type(self.coefs) is Tensor
        self._buffer = size.from_address(self.coefs.data_ptr()) if real else size()
        self.params: list[Tensor] = []
        self.states: list[State | None] = []
        self.plain = True
        self.names: tuple[str | None, ...] = ("z",)
        self.parts: tuple[str, ...] = ()
        self.bits = Bits()
        self.decay_at = 0

    # ---- what a subclass says -------------------------------------------------------------------------

    def beta(self) -> float:
        """The interpolation weight of the next y."""
        raise NotImplementedError

    @staticmethod
    def state_names(group: ParamGroup) -> tuple[str | None, ...]:
        """The tensors of a state in the order of the operator, from z on; None for an absent list."""
        return ("z",)

    def call_operator(self, gathered: Gathered) -> None:
        """Updates parameters; none of them where the operator refuses."""
        raise NotImplementedError

    # ---- modes ----------------------------------------------------------------------------------------

    @property
    def trains(self) -> bool:
        """True in train mode."""
        return bool(self.group.get("train_mode", self._trains))

    @trains.setter
    def trains(self, mode: bool) -> None:
        if "train_mode" in self.group:
            self.group["train_mode"] = mode
        else:
            self._trains = mode

    @property
    def measures(self) -> bool:
        """True where a step needs the norm of all gradients."""
        group = self.group
        return group.get("max_grad_norm") is not None or group.get("nonfinite", "propagate") != "propagate"

    def swap(self, all_state: Any, to_train: bool) -> None:
        """Changes the parameters from ``x`` to ``y``, or from ``y`` to ``x``."""
        swap = ops.x_to_y_ if to_train else ops.y_to_x_
        self._swap(swap, all_state, self.group["params"], self.y_beta)

    def _swap(self, swap: Callable[..., None], all_state: Any, params: Sequence[Tensor], beta: float) -> None:
        states: list[Any] = [*map(all_state.get, params)]
        active = [state is not None and "z" in state for state in states]
        if not all(active):
            params = [p for p, a in zip(params, active, strict=True) if a]
            states = [state for state, a in zip(states, active, strict=True) if a]
        if not params:
            return
        plain = {*map(type, params)} <= PLAIN_TYPES
        # An operator swaps 16 bits alone, too, such as those of a parameter that has been cast since.
        if any([p.element_size() == 2 and "y_lo" not in s for p, s in zip(params, states, strict=True)]):
            self.follow(params, states)
        try:
            self._call_swap(swap, params, states, plain, beta)
        except RuntimeError:
            # A refused call has changed nothing. Parameters may have moved since their state was made.
            if not self.follow(params, states):
                raise
            self._call_swap(swap, params, states, plain, beta)
        if not plain:
            torch.autograd.graph.increment_version(params)

    def _call_swap(
        self,
        swap: Callable[..., None],
        params: Sequence[Tensor],
        states: Sequence[State],
        plain: bool,
        beta: float,
    ) -> None:
        y_lo, z = optional_list(states, "y_lo"), [state["z"] for state in states]
        z_lo = optional_list(states, "z_lo") if bits_of(self.group).state == 24 else []
        if not plain:
            params, y_lo, z, z_lo = map(sharded.local_list, (params, y_lo, z, z_lo))
        swap(params, y_lo, z, z_lo=z_lo, beta=beta)

    def change_beta(self, beta: float, all_state: Any, positions: Sequence[int]) -> None:
        """Moves parameters from the beta that built their ``y`` to another, through ``x``.

        Args:
            beta: the other one, which from here on counts as that of the whole group.
            all_state: the optimizer's state.
            positions: of the parameters to move; the step operator has moved the rest.
        """
        if beta == self.y_beta:
            return
        params = [self.group["params"][i] for i in positions]
        self._swap(ops.y_to_x_, all_state, params, self.y_beta)
        self._swap(ops.x_to_y_, all_state, params, beta)
        for _ in range(2):  # as often as a 16-bit parameter needs to settle (csrc/update_math.h)
            self._swap(ops.y_to_x_, all_state, params, beta)
            self._swap(ops.x_to_y_, all_state, params, beta)
        self.y_beta = beta

    # ---- state that follows its parameters --------------------------------------------------------------

    def follow_parameters(self, all_state: Any, every: bool) -> None:
        """Has the states follow parameters that have moved to another device, dtype or memory format.

        Args:
            all_state: the optimizer's state.
            every: look at every parameter; otherwise at the first with a state, since they move together.
        """
        params = self.group["params"]
        if not every:
            first = next((p for p in params if "z" in all_state.get(p, ())), None)
            every = first is not None and self.has_moved([first], [all_state[first]])
        if every:
            self.follow(params, [*map(all_state.get, params)])

    def follow(self, params: Sequence[Tensor], states: Sequence[State | None]) -> bool:
        """Converts states to where their parameters are. Returns True where that changed any."""
        bits = bits_of(self.group)
        moved = [convert(p, s, bits) for p, s in zip(params, states, strict=True) if s and "z" in s]
        return any(moved)

    def has_moved(self, params: Sequence[Tensor], states: Sequence[State | None]) -> bool:
        """True where a state does not fit its parameter."""
        bits = bits_of(self.group)
        return not all(fits(p, s, bits) for p, s in zip(params, states, strict=True) if s and "z" in s)

    # ---- a step ---------------------------------------------------------------------------------------

    def read(self) -> None:
        """Takes from the dict what the operator's lists depend on."""
        self.names = self.state_names(self.group)
        self.bits = bits_of(self.group)
        self.parts = () if self.bits == Bits() else self._parts()
        self.plain = {*map(type, self.group["params"])} <= PLAIN_TYPES

    def _parts(self) -> tuple[str, ...]:
        """The lists that the operator takes by name, since only some formats have them."""
        wanted = self.optional_lists.items()
        return tuple(name for name, (field, bits) in wanted if getattr(self.bits, field) == bits)

    def gather(self, all_state: Any, stepped: Collection[Tensor] = ()) -> Gathered:
        """The operator's lists, for those parameters that have a gradient and are not in ``stepped``."""
        self.read()
        params = self.group["params"]
        return self.lists_of(params, [*map(all_state.get, params)], stepped)

    def lists_of(self, params: list[Tensor], states: list[Any], stepped: Collection[Tensor] = ()) -> Gathered:
        """The operator's lists of some parameters, whose states are given. ``states`` is changed."""
        grads: list[Any] = [p.grad for p in params]
        at: Sequence[int] = range(len(params))
        resting: list[int] = []
        if stepped or not all([g is not None for g in grads]):
            resting = [i for i, g in enumerate(grads) if g is None and params[i] not in stepped]
            active = [g is not None and p not in stepped for p, g in zip(params, grads, strict=True)]
            at, params, grads, states = (_chosen(items, active) for items in (at, params, grads, states))
        created: list[tuple[int, Tensor, State]] = []
        named = _lists_without_others(states, self.names)
        optional: dict[str, list[Tensor]] = {}
        if named is None:
            created = self.add_states(at, params, states)
            named = _lists(states, self.names)
            optional = {name: optional_list(states, name) for name in ("y_lo", *self.parts)}
        y, y_lo = params, optional.pop("y_lo", [])
        if not self.plain:
            y, y_lo = sharded.local_list(params), sharded.local_list(y_lo)
            grads = sharded.local_gradients(grads, params)
            named = [sharded.local_list(tensors) for tensors in named]
            optional = {name: sharded.local_list(tensors) for name, tensors in optional.items()}
        return Gathered(params, [y, y_lo, grads, *named], optional, created, resting)

    def add_states(
        self, at: Sequence[int], params: Sequence[Tensor], states: list[Any]
    ) -> list[tuple[int, Tensor, State]]:
        """Makes the states that are missing in a list, and returns them."""
        created = []
        for i, p, state in zip(at, params, states, strict=True):
            if not state or "z" not in state:
                names = [name for name in self.names if name]
                created.append((i, p, {**(state or {}), **new_state(p, names, self.bits)}))
        if created:
            new = iter(created)
            states[:] = [state if state and "z" in state else next(new)[2] for state in states]
        return created

    def schedule(self, norm: float) -> _C.ScheduleStep:
        """The next step, of which nothing is stored.

        Raises:
            KeyError, TypeError, ValueError: for an entry of the group that is not what it should be.
        """
        self.read_decay_at()
        return _C.schedule_step(
            self.group, kind=self.kind, beta=self.y_beta, beta_next=self.beta(), grad_norm=norm
        )

    def read_decay_at(self) -> None:
        """Takes from the dict where decay is evaluated."""
        self.decay_at = ops.DECAY_AT[self.group.get("decay_at", "y")]

    def store_coefs(self, step: _C.ScheduleStep) -> None:
        """Writes the scalars of a step where the operator reads them."""
        step.store_coefs(self._buffer)

    def update(self, gathered: Gathered, all_state: Any) -> None:
        """Calls the operator and stores the state that it has made."""
        if not gathered.params:
            return
        self.call_operator(gathered)
        if not self.plain:
            torch.autograd.graph.increment_version(gathered.params)
        for _, p, state in gathered.created:
            all_state[p] = state

    def store(self, step: _C.ScheduleStep, all_state: Any, resting: Sequence[int]) -> None:
        """Writes the schedule after a step into the group; parameters that took none get the new beta."""
        if step.beta != self.y_beta:
            self.change_beta(step.beta, all_state, resting)
        group = self.group
        group["k"] = step.k
        group["weight_sum"] = step.weight_sum
        group["lr_max"] = step.lr_max
        group["scheduled_lr"] = step.scheduled_lr

    # ---- compiled code --------------------------------------------------------------------------------

    @property
    def traceable(self) -> bool:
        """True where compiled code can hand the parameters to an operator."""
        return self.plain or all(type(p) in PLAIN_TYPES or sharded.is_dtensor(p) for p in self.params)

    def prepare_tracing(self, all_state: Any) -> bool:
        """Brings up to date what compiled code reads. Returns True where none of it has changed."""
        before = self.plain, self.names, self.bits, self.decay_at
        self.read()
        self.read_decay_at()
        params, states = self.group["params"], [*map(all_state.get, self.group["params"])]
        same = _same(params, self.params) and _same(states, self.states)
        self.params = params
        if not same:
            self.states = states
        return same and before == (self.plain, self.names, self.bits, self.decay_at)

    def look_up_states(self, all_state: Any) -> None:
        """Takes note of states that have been made or replaced, where compiled code reads them."""
        if self.states:
            self.states = [*map(all_state.get, self.params)]


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _chosen(items: Sequence[Any], active: Sequence[bool]) -> list[Any]:
    return [item for item, a in zip(items, active, strict=True) if a]


def _lists(states: Sequence[State], names: Sequence[str | None]) -> list[list[Tensor]]:
    """An operator's lists of state tensors. Raises RuntimeError for a state that lacks one."""
    try:
        return [[] if name is None else [state[name] for state in states] for name in names]
    except KeyError as error:
        raise RuntimeError(
            f"the state of a parameter lacks {error}, which this group's hyperparameters need: set them "
            "before the first step, or load a checkpoint that was made with them"
        ) from None


def _lists_without_others(states: Sequence[Any], names: Sequence[str | None]) -> list[list[Tensor]] | None:
    """Those lists, or None unless every state has just these tensors."""
    if not all(states) or sum(map(len, states)) != len(states) * (len(names) - names.count(None)):
        return None
    try:
        return [[] if name is None else [state[name] for state in states] for name in names]
    except KeyError:
        return None
