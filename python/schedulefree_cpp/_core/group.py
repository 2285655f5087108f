"""The record of one parameter group: its lists, its schedule and its beta."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from schedulefree_cpp import ops
from schedulefree_cpp._core import sharded
from schedulefree_cpp._core.library import _C
from schedulefree_cpp._core.state import Bits, bits_of, convert, fits, new_state, note_format, optional_list
from schedulefree_cpp._core.types import MOVED, PLAIN_TYPES, ParamGroup, State, quoted_name

_HALF_DTYPES = {torch.bfloat16, torch.float16}
_dtype_of, _z_of = attrgetter("dtype"), itemgetter("z")


class Gathered(NamedTuple):
    """What one operator call updates."""

    params: list[Tensor]
    lists: list[list[Tensor]]  # the operator's: y, y_lo, grad, z, moments
    parts: dict[str, list[Tensor]]  # and those that it takes by name
    created: list[tuple[int, Tensor, State]]  # what parameters get with this step, by position in the group
    resting: list[int]  # positions in the group of the parameters that take no step


class Group:
    """What belongs to one parameter group beside its dict. Subclasses say whose step it takes.

    Compiled code reads the attributes from ``params`` on: never ``optimizer.state``, in which Dynamo finds an
    entry by walking its keys, nor the dict, whose numbers it would make constants.
    """

    kind: int  # of ops.STEP_KINDS
    y_beta: float  # the beta that built y
    operator: ClassVar[str]  # of ops
    optional_lists: ClassVar[tuple[str, ...]] = ("z_lo",)  # that the operator takes by name
    # Entries that a group of a state dict may not lack, beside the schedule.
    required: ClassVar[tuple[str, ...]] = ("lr", "weight_lr_power")
    # Whose domain a number has, where that is not its own.
    domains: ClassVar[Mapping[str, str]] = {}
    # Entries of the dict by which the lists, and whether a step needs the norm of gradients, may change.
    layout_keys: ClassVar[tuple[str, ...]] = (
        "decay_at", "state_bits", "exp_avg_sq_bits", "max_grad_norm", "nonfinite",
    )  # fmt: skip

    def __init__(self, group: ParamGroup) -> None:
        """Makes the record of a group; whoever makes it sets ``y_beta``."""
        self.group = group
        self.entries: ParamGroup = group  # the dict in param_groups, also where `group` is a view of it
        self.at_y = False  # train mode, of a group whose dict does not tell
        self.coefs: Tensor
        self.buffer: Any
        self.make_coefs()
        self.params: list[Tensor] = []
        self.states: list[State | None] = []
        self.plain: bool = True  # no parameter is a DTensor or of another subclass
        self.layout: tuple[Any, ...] = ()  # what the following attributes were read from
        self.names: tuple[str, ...] = ("z",)  # the operator's lists from z on; "" for an absent one
        self.parts: tuple[str, ...] = ()
        self.bits: Bits = Bits()
        self.measures: bool = False  # a step needs the norm of all gradients
        self.decay_at: int = 0  # of ops.DECAY_AT; -1 where the dict names no place

    def make_coefs(self) -> None:
        """Makes ``coefs`` of zeros on the CPU, and what the host writes it by."""
        self.coefs = torch.zeros(len(ops.COEFFICIENTS), dtype=torch.float64, device="cpu")
        # The memory of coefs, which Python then writes without an operator. A fake tensor has none.
        size = ctypes.c_char * self.coefs.nbytes
        self.buffer = size.from_address(self.coefs.data_ptr()) if type(self.coefs) is Tensor else size()

    # ---- what a subclass says -------------------------------------------------------------------------

    def beta(self) -> float:
        """The interpolation weight of the next y."""
        return float(self.group["betas"][0])

    @staticmethod
    def state_names(group: ParamGroup) -> tuple[str, ...]:
        """The tensors of a state in the order of the operator, from z on; "" for an absent list."""
        return ("z",)

    def call_operator(self, gathered: Gathered) -> None:
        """Updates parameters; none of them where the operator refuses."""
        step = getattr(ops, self.operator)
        step(*gathered.lists, self.coefs, decay_at=self.decay_at, **gathered.parts)

    # ---- modes ----------------------------------------------------------------------------------------

    def swap(self, all_state: Any, to_train: bool) -> None:
        """Changes the parameters from ``x`` to ``y``, or from ``y`` to ``x``."""
        swap = ops.x_to_y_ if to_train else ops.y_to_x_
        self._swap(swap, all_state, self.group["params"], self.y_beta)

    def _swap(self, swap: Callable[..., None], all_state: Any, params: Sequence[Tensor], beta: float) -> None:
        states: list[Any] = [*map(all_state.get, params)]
        active = ["z" in state if state else False for state in states]
        if not all(active):
            params, states = _chosen(params, active), _chosen(states, active)
        if not params:
            return
        half = "y_lo" in states[0] or not _HALF_DTYPES.isdisjoint(map(_dtype_of, params))
        # An operator swaps 16 bits alone, too, or with the low half of another dtype.
        fit = not half or fits(params[0], states[0], bits_of(self.group))
        if not fit or (half and not all(["y_lo" in state for state in states])):
            self.follow(params, states)
        try:
            self._call_swap(swap, params, states, beta, half)
        except RuntimeError:
            # A refused call has changed nothing. Parameters may have moved since their state was made.
            if not self.follow(params, states):
                raise
            self._call_swap(swap, params, states, beta, True)

    def _call_swap(
        self,
        swap: Callable[..., None],
        params: Sequence[Tensor],
        states: Sequence[State],
        beta: float,
        half: bool,
    ) -> None:
        y, z = params, [*map(_z_of, states)]
        y_lo = optional_list(states, "y_lo") if half else []
        z_lo = optional_list(states, "z_lo") if half and self.group.get("state_bits") == 24 else []
        plain = {*map(type, params)} <= PLAIN_TYPES
        if not plain:
            y, z, y_lo, z_lo = map(sharded.local_list, (y, z, y_lo, z_lo))
        swap(y, y_lo, z, z_lo=z_lo, beta=beta)
        if not plain:
            torch.autograd.graph.increment_version(params)

    def change_beta(self, beta: float, all_state: Any, positions: Sequence[int]) -> None:
        """Moves parameters from the beta that built their ``y`` to another, through ``x``.

        Args:
            beta: the other one, which from here on counts as that of the whole group.
            all_state: the optimizer's state.
            positions: of the parameters to move; the step operator has moved the rest.
        """
        params = [self.group["params"][i] for i in positions]
        for swap, at in self.swaps_to(beta):
            self._swap(swap, all_state, params, at)
        self.y_beta = beta

    def swaps_to(self, beta: float) -> list[tuple[Callable[..., None], float]]:
        """The swaps, each with its beta, that take ``y`` to another beta and settle it."""
        there_and_back = [(ops.y_to_x_, beta), (ops.x_to_y_, beta)]
        # Twice, as often as a 16-bit parameter needs (csrc/update_math.h).
        return [(ops.y_to_x_, self.y_beta), (ops.x_to_y_, beta), *there_and_back, *there_and_back]

    # ---- state that follows its parameters --------------------------------------------------------------

    def follow_parameters(self, all_state: Any, every: bool) -> None:
        """Has the states follow parameters that have moved to another device, dtype or memory format.

        Args:
            all_state: the optimizer's state.
            every: look at every parameter; otherwise at the first with a state, since they move together.
        """
        params = self.group["params"]
        for p in () if every else params:
            state = all_state.get(p)
            if state and "z" in state:
                every = not fits(p, state, bits_of(self.group))
                break
        if every:
            self.follow(params, [*map(all_state.get, params)])

    def follow(self, params: Sequence[Tensor], states: Sequence[State | None]) -> bool:
        """Converts states to where their parameters are. Returns True where that changed any."""
        bits = bits_of(self.group)
        moved = [convert(p, s, bits) for p, s in zip(params, states, strict=True) if s and "z" in s]
        return any(moved)

    def note_formats(self, all_state: Any) -> None:
        """Notes the dtype in which states that have been copied or unpickled continue their parameters."""
        for p in self.group["params"]:
            state = all_state.get(p)
            if state and "y_lo" in state:
                note_format(p, state["y_lo"])

    def has_moved(self, params: Sequence[Tensor], states: Sequence[State | None]) -> bool:
        """True where a state does not fit its parameter."""
        bits = bits_of(self.group)
        return not all(fits(p, s, bits) for p, s in zip(params, states, strict=True) if s and "z" in s)

    # ---- a step ---------------------------------------------------------------------------------------

    def gather(self, all_state: Any, stepped: Collection[Tensor] = ()) -> Gathered:
        """The operator's lists, for those parameters that have a gradient and are not in ``stepped``."""
        self.read_layout()
        params = self.group["params"]
        states = [*map(all_state.get, params)]
        if self.bits.moment == 8:  # scales count the elements as the memory of the parameter does
            for p, state in zip(params, states, strict=True):
                if state and "exp_avg_sq" in state and state["exp_avg_sq"].stride() != p.stride():
                    self.follow([p], [state])
        return self.lists_of(params, states, stepped)

    def read_layout(self) -> None:
        """Takes from the dict what the operator's lists depend on."""
        group = self.group
        self.plain = {*map(type, group["params"])} <= PLAIN_TYPES
        layout = (*map(group.get, self.layout_keys),)
        if layout == self.layout:
            return
        self.bits, self.names, self.layout = bits_of(group), self.state_names(group), layout
        wanted = {"z_lo": self.bits.state == 24, "exp_avg_sq_scale": self.bits.moment == 8}
        self.parts = tuple(name for name in self.optional_lists if wanted[name])
        clips, policy = group.get("max_grad_norm") is not None, group.get("nonfinite", "propagate")
        self.measures = clips or policy != "propagate"
        place = group.get("decay_at", "y")
        self.decay_at = ops.DECAY_AT.get(place, -1) if isinstance(place, str) else -1

    def lists_of(self, params: list[Tensor], states: list[Any], stepped: Collection[Tensor] = ()) -> Gathered:
        """The operator's lists of some parameters, whose states are given. ``states`` is changed."""
        grads: list[Any] = [p.grad for p in params]
        at: Sequence[int] = range(len(params))
        resting: list[int] = []
        if stepped or type(None) in map(type, grads):
            resting = [i for i, g in enumerate(grads) if g is None and params[i] not in stepped]
            active = [g is not None and p not in stepped for p, g in zip(params, grads, strict=True)]
            at, params, grads, states = (_chosen(items, active) for items in (at, params, grads, states))
        created: list[tuple[int, Tensor, State]] = []
        y, y_lo = params, params[:0]
        parts: dict[str, list[Tensor]] = {name: [] for name in self.parts} if self.parts else {}
        named = self._lists_without_others(states)
        if named is None:
            created = self.add_states(at, params, states)
            named = self._lists(states)
            y_lo = optional_list(states, "y_lo")
            for name in self.parts:
                parts[name] = optional_list(states, name)
        if not self.plain:
            y, y_lo, *named = map(sharded.local_list, (params, y_lo, *named))
            grads = sharded.local_gradients(grads, params)
            parts = {name: sharded.local_list(tensors) for name, tensors in parts.items()}
        return Gathered(params, [y, y_lo, grads, *named], parts, created, resting)

    def _lists_without_others(self, states: Sequence[Any]) -> list[list[Tensor]] | None:
        """The lists of state tensors, or None unless every state has just these."""
        names = self.names
        if not all(states) or sum(map(len, states)) != len(states) * (len(names) - names.count("")):
            return None
        try:
            return self._lists(states)
        except RuntimeError:
            return None

    def _lists(self, states: Sequence[State]) -> list[list[Tensor]]:
        """The lists of state tensors. Raises RuntimeError for a state that lacks one."""
        lists: list[list[Tensor]] = []
        try:
            for name in self.names:
                lists.append([*map(itemgetter(name), states)] if name else [])
        except KeyError as error:
            raise RuntimeError(
                f"the state of a parameter lacks {error}, which this group's hyperparameters need: set them "
                "before the first step, or load a checkpoint that was made with them"
            ) from None
        return lists

    def add_states(
        self, at: Sequence[int], params: Sequence[Tensor], states: list[Any]
    ) -> list[tuple[int, Tensor, State]]:
        """Makes the states that are missing in a list, and returns them."""
        created = []
        for n, (i, p) in enumerate(zip(at, params, strict=True)):
            if not states[n] or "z" not in states[n]:
                states[n] = {**(states[n] or {}), **new_state(p, self.names, self.bits)}
                created.append((i, p, states[n]))
        return created

    def counts_at_rest(self, stepped: Collection[Tensor]) -> bool:
        """True if the group's step counts although none of its parameters steps now.

        A parameter may have taken it already. One without elements, such as an empty shard, counts as having
        a gradient, so that the processes of a sharded run agree.
        """
        params = self.group["params"]
        return any(p in stepped for p in params) or any(has_no_elements(p) for p in params)

    def make_state(self, all_state: Any) -> None:
        """Makes the state of every parameter with a gradient."""
        self.read_layout()
        params = [p for p in self.group["params"] if p.grad is not None]
        for _, p, state in self.add_states(range(len(params)), params, [None] * len(params)):
            all_state[p] = state

    def schedule(self, norm: float) -> _C.ScheduleStep:
        """The next step, of which nothing is stored.

        Raises:
            KeyError, TypeError, ValueError: for an entry of the group that is not what it should be.
        """
        return _C.schedule_step(self.group, kind=self.kind, beta=self.y_beta, grad_norm=norm)

    def update(self, gathered: Gathered, all_state: Any) -> None:
        """Calls the operator and stores the state that it has made."""
        if not gathered.params:
            return
        self.call_operator(gathered)
        if not self.plain:
            torch.autograd.graph.increment_version(gathered.params)
        for _, p, state in gathered.created:
            all_state[p] = state

    def store(
        self, step: _C.ScheduleStep, all_state: Any, resting: Sequence[int], counts: bool = True
    ) -> None:
        """Writes the schedule after a step into the group; parameters that took none get the new beta.

        Where the group as a whole rests, and the step does not count, they only get the beta.
        """
        if step.beta != self.y_beta:
            self.change_beta(step.beta, all_state, resting)
        if not counts:
            return
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
        before = self.plain, self.names, self.parts, self.bits, self.decay_at
        self.read_layout()
        params = self.group["params"]
        states = [*map(all_state.get, params)]
        same = same_items(params, self.params) and same_items(states, self.states)
        self.params = params
        if not same:
            self.states = states
        return same and before == (self.plain, self.names, self.parts, self.bits, self.decay_at)


def has_no_elements(p: Tensor) -> bool:
    """True for a parameter that wants gradients, of which this process holds no element."""
    return p.requires_grad and sharded.local(p).numel() == 0


def require_shapes(group: ParamGroup, all_state: Any, positions: Iterable[int]) -> None:
    """Raises RuntimeError for a parameter that has not the shape of its z."""
    for i in positions:
        p = group["params"][i]
        z = all_state.get(p, {}).get("z", p)
        if z.shape != p.shape:
            name = quoted_name(group, i)
            raise RuntimeError(
                f"params[{i}]{name}: shape {tuple(p.shape)}, expected that of its z, {tuple(z.shape)}"
            )


def same_items(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """True where two sequences hold the same objects."""
    return len(some) == len(others) and all(map(is_, some, others))


def _chosen(items: Sequence[Any], active: Sequence[bool]) -> list[Any]:
    return [item for item, a in zip(items, active, strict=True) if a]


def norm_of(gathered: list[Gathered], plain: bool) -> Tensor:
    """The norm of all gradients. A collective call where there are DTensors."""
    grads = [grad for lists in gathered for grad in lists.lists[2]]
    if plain:
        return ops.grad_norm(grads)
    params = [p for lists in gathered for p in lists.params]
    return sharded.all_reduced(params, lambda at: ops.grad_norm([grads[i] for i in at]).square()).sqrt()


def explain(
    groups: Sequence[Group], gathered: Sequence[Gathered], all_state: Any, error: RuntimeError
) -> None:
    """Raises what an operator has refused with the remedy, where a parameter has moved from its state."""
    for group, lists in zip(groups, gathered, strict=True):
        if group.has_moved(lists.params, [*map(all_state.get, lists.params)]):
            raise RuntimeError(MOVED if str(error) == MOVED else f"{error}. {MOVED}") from error


def require_dense(gathered: list[Gathered]) -> None:
    """Raises RuntimeError for a sparse gradient, which an operator would refuse after others have run."""
    for index, lists in enumerate(gathered):
        for i, grad in enumerate(lists.lists[2]):
            if grad.layout is not torch.strided:
                raise RuntimeError(
                    f"grad[{i}] in parameter group {index}: expected a dense gradient, got one of layout "
                    f"{grad.layout}"
                )
