"""What a wrapper has beside its base optimizer: entries of its own, and what parameters hold for a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils._pytree import tree_map_only

from schedulefree_cpp import ops
from schedulefree_cpp._core import capturable, nonfinite, sharded
from schedulefree_cpp._core.group import Group
from schedulefree_cpp._core.hyperparameters import PARAMETER_DTYPES
from schedulefree_cpp._core.library import _C
from schedulefree_cpp._core.samples import Samples
from schedulefree_cpp._core.state import Bits, convert, new_state
from schedulefree_cpp._core.state_dict import (
    OURS,
    check_counts,
    check_form,
    copy_state,
    require_entries,
    sorted_by_name,
)
from schedulefree_cpp._core.types import MOVED, ParamGroup, State, has_values, read_values

PREFIX = "sf_"
"""With which the names of all entries begin that a wrapper adds to groups and states, and no other name."""

_BOTHS = {"params", "param_names", "lr"}  # entries of a group by which wrapper and base go
_KEYS = tuple(PREFIX + name for name in ("z", "y_lo", "x", "y"))  # of a state
_Z, _LOW = PREFIX + "z", PREFIX + "y_lo"
_HALF = {torch.bfloat16, torch.float16}
_WIDE = {dtype: torch.float64 if dtype == torch.float64 else torch.float32 for dtype in PARAMETER_DTYPES}


class Own(MutableMapping[str, Any]):
    """The wrapper's entries of a group or state, by the names that the fused classes have for them."""

    __slots__ = ("entries",)

    def __init__(self, entries: dict[str, Any]) -> None:
        """Looks into a dict, which stays the only place of the entries."""
        self.entries = entries

    def __getitem__(self, name: str) -> Any:
        """An entry."""
        return self.entries[name if name in _BOTHS else PREFIX + name]

    def __setitem__(self, name: str, value: Any) -> None:
        """Writes an entry."""
        self.entries[name if name in _BOTHS else PREFIX + name] = value

    def __delitem__(self, name: str) -> None:
        """Takes an entry out."""
        del self.entries[PREFIX + name]

    def __iter__(self) -> Iterator[str]:
        """The names of the wrapper's own entries."""
        return iter([key[len(PREFIX) :] for key in self.entries if key.startswith(PREFIX)])

    def __len__(self) -> int:
        """How many there are."""
        return len([*iter(self)])


class OwnStates:
    """The wrapper's entries of all states."""

    def __init__(self, all_state: Any) -> None:
        """Looks into the states of a base optimizer."""
        self.all_state = all_state

    def __getitem__(self, p: Tensor) -> Own:
        """Those of a parameter that has a state."""
        return Own(self.all_state[p])

    def get(self, p: Tensor, default: Any = None) -> Any:
        """Those of a parameter, or ``default`` before its first step."""
        state = self.all_state.get(p)
        return Own(state) if state and PREFIX + "z" in state else default


def renamed(state: State) -> State:
    """A state of a fused class by the names that a wrapper has for its entries."""
    return {PREFIX + name: value for name, value in state.items()}


@dataclass
class Part:
    """The parameters that one call of an operator takes from y to z, and back."""

    record: WrappedGroup
    params: list[Tensor]
    lists: dict[str, list[Tensor]]  # of state tensors
    exchange: bool  # parameters and their z exchange what their memories hold; else the base steps stand-ins
    created: list[tuple[Tensor, State]] = field(default_factory=list)  # what no state holds yet
    kept: list[Tensor] = field(default_factory=list)  # copies of z, where decay changes it
    at_z: bool = False


class WrappedGroup(Group):
    """The record of a parameter group whose z another optimizer steps."""

    kind: int = ops.STEP_KINDS["sgd"]
    iterates: ClassVar[tuple[str, ...]] = ("z",)  # that a state holds
    exchanges: ClassVar[bool] = True

    def __init__(self, group: ParamGroup) -> None:
        """Makes the record of a group that has the wrapper's entries."""
        super().__init__(Own(group))  # type: ignore[arg-type]
        self.entries = group

    @property
    def y_beta(self) -> float:
        """The interpolation weight that built the current y."""
        return float(self.group["momentum_of_y"])

    @y_beta.setter
    def y_beta(self, beta: float) -> None:
        self.group["momentum_of_y"] = beta

    def beta(self) -> float:
        """The interpolation weight of the next y."""
        return float(self.group["momentum"])

    @property
    def capturable(self) -> bool:
        """True where the base optimizer steps this group without the host."""
        return bool(self.entries.get("capturable", False))

    @property
    def way_back(self) -> Tensor:
        """The ``coefs`` of a step that averages nothing: from y to z without decay, and back."""
        return ops.coefs(beta=self.y_beta)

    # ---- around a step of the base optimizer ----------------------------------------------------------

    def new_state(self, p: Tensor) -> State:
        """The wrapper's state of a parameter before its first step."""
        return new_state(p, self.iterates, Bits())

    def gather_parts(self, all_state: Any) -> list[Part]:
        """The parameters with a gradient, in as few parts as possible. New states are not stored yet.

        Many optimizers see a parameter's first step by its empty state.

        Raises:
            RuntimeError: for a state that is of another kind than its parameter.
        """
        self.read_layout()
        parts: dict[bool, Part] = {}
        for p in self.group["params"]:
            if p.grad is None:
                continue
            state = all_state.get(p)
            known = bool(state) and _Z in state
            if not known:
                state = renamed(self.new_state(p))
            half, z = p.dtype in _HALF, state[_Z]
            fits = z.dtype == _WIDE.get(p.dtype) and z.device == p.device
            if not fits or (_LOW in state) != (half and self.exchanges):
                raise RuntimeError(MOVED)
            if half not in parts:
                names = (*self.iterates, "y_lo") if _LOW in state else self.iterates
                parts[half] = Part(self, [], {name: [] for name in names}, self.exchanges and not half)
            parts[half].params.append(p)
            if not known:
                parts[half].created.append((p, state))
            for name, tensors in parts[half].lists.items():
                tensors.append(state[PREFIX + name])
        return [*parts.values()]

    def before_base_step(self, part: Part, coefs: Tensor) -> None:
        """Takes parameters from y to z, and z to x; see `ops.before_base_step_`."""
        self._call(ops.before_base_step_, part, coefs, beta=self.y_beta)

    def after_base_step(self, part: Part, coefs: Tensor) -> None:
        """Takes parameters from the next z to the next y; see `ops.after_base_step_`."""
        self._call(ops.after_base_step_, part, coefs)

    def _call(self, operator: Callable[..., None], part: Part, coefs: Tensor, **options: float) -> None:
        y, y_lo, z = part.params, part.lists.get("y_lo", []), part.lists["z"]
        if not self.plain:
            y, y_lo, z = map(sharded.local_list, (y, y_lo, z))
        operator(y, y_lo, z, coefs, exchange=part.exchange, **options)
        if not self.plain:
            torch.autograd.graph.increment_version(part.params)

    # ---- the schedule ---------------------------------------------------------------------------------

    def next_step(self) -> _C.ScheduleStep | None:
        """The next step, of which nothing is stored but ``coefs``; None where the device knows it.

        Raises:
            TypeError, ValueError: for an entry of the group that is not what it should be.
        """
        if self.capturable:
            capturable.to_device(self)
            return None
        group, beta = self.group, self.beta()
        if isinstance(group["k"], Tensor):  # capturable until now
            capturable.to_numbers(group)
            self.make_coefs()
        step = _C.schedule_step(
            kind=self.kind,
            k=group["k"],
            weight_sum=group["weight_sum"],
            lr_max=group["lr_max"],
            lr=float(group["lr"]),
            lr_factor=float(self.estimate),
            r=float(group["r"]),
            weight_lr_power=float(group["weight_lr_power"]),
            weight_decay=self.decay / float(self.estimate),
            beta=beta,
            beta_next=beta,
        )
        step.store_coefs(self.buffer)
        return step

    @property
    def decay(self) -> float:
        """The coefficient of the decay at y."""
        return float(self.group["weight_decay_at_y"])

    @property
    def estimate(self) -> Any:
        """The step-size estimate of optimizers such as Prodigy: it multiplies lr, but not the decay at y."""
        return self.entries.get("d", 1.0)

    def advance(self) -> None:
        """Advances the schedule on the group's device, and fills ``coefs``."""
        group = self.group
        ops.schedule_step_(
            self.coefs,
            group["k"],
            group["weight_sum"],
            group["lr_max"],
            group["scheduled_lr"],
            capturable.as_input(group["lr"] * self.estimate),
            capturable.as_input(self.decay / self.estimate),
            kind=self.kind,
            beta=self.beta(),
            warmup_steps=0,
            r=float(group["r"]),
            weight_lr_power=float(group["weight_lr_power"]),
        )

    def finish(self, step: _C.ScheduleStep | None, parts: list[Part], counts: bool, states: Any) -> None:
        """Writes the schedule after a step; parameters that took none get the new beta."""
        if self.beta() != self.y_beta:
            moved = {p for part in parts for p in part.params}
            resting = [i for i, p in enumerate(self.group["params"]) if p not in moved]
            self.change_beta(self.beta(), states, resting)
        if step is not None:
            self.store(step, states, (), counts)


class Exchange:
    """Swaps parameters and states for one step of the base optimizer, and back.

    Parameters are z, and states are without the wrapper's entries. In place of parameters of 16 bits stand
    others of the arithmetic's dtype, in the memory of their z: a parameter of 16 bits that was made one of 32
    itself would lose the hooks that wait for its gradient, DistributedDataParallel's among them.
    """

    def __init__(self, base: Optimizer, parts: Iterable[Part]) -> None:
        """Makes the stand-ins, and changes nothing yet."""
        self.base = base
        self.parts = [*parts]
        halves = [part for part in self.parts if not part.exchange]
        self.z = {p: z for part in halves for p, z in zip(part.params, part.lists["z"], strict=True)}
        self.stand_ins: dict[Tensor, Tensor] = {
            p: torch.nn.Parameter(z.detach(), p.requires_grad) for p, z in self.z.items()
        }
        self.own: list[tuple[Any, State]] = []  # the wrapper's entries that were taken out, by key

    def to_z(self, norm: Tensor | None, back: bool = False) -> None:
        """Has the base optimizer find z, and gradients that are scaled by their norm.

        Args:
            norm: that of all gradients, where a step needs it.
            back: after `to_y` within a step; otherwise z decays at y.
        """
        for part in self.parts:
            record = part.record
            if record.decay != 0 and not back:
                part.kept = [z.clone() for z in part.lists["z"]]
            record.before_base_step(part, record.way_back if back else record.coefs)
            part.at_z = True
        if norm is not None:
            clip(self.parts, norm)
        self.lend()

    def to_y(self, back: bool = False) -> None:
        """Has parameters hold the y of the z that the base optimizer has left; ``back``: of the same x."""
        self.take_back()
        for part in self.parts:
            if part.at_z:
                part.record.after_base_step(part, part.record.way_back if back else part.record.coefs)
                part.at_z = False

    def undo(self) -> None:
        """Has parameters and z be what they were; without decay, as far as the base has not moved z."""
        for part in self.parts:
            for p, kept in zip(part.params if part.at_z else (), part.kept, strict=False):
                self.stand_ins.get(p, p).copy_(kept)
        self.to_y(back=True)

    def store(self) -> None:
        """Puts new states where the others are."""
        for part in self.parts:
            for p, state in part.created:
                self.base.state[p].update(state)

    def lend(self) -> None:
        """Takes the wrapper's entries out, and puts the stand-ins in, with the gradients that are there."""
        for key, state in self.base.state.items():
            if isinstance(state, dict) and _Z in state:
                self.own.append((key, {name: state.pop(name) for name in _KEYS if name in state}))
        for p, q in self.stand_ins.items():
            q.grad = None if p.grad is None else p.grad.to(q.dtype)
        replace(self.base, self.stand_ins)

    def take_back(self) -> None:
        """Undoes `lend`, whatever the base optimizer has done, and where nothing is lent."""
        replace(self.base, {q: p for p, q in self.stand_ins.items()})
        for p, z in self.z.items():
            q = self.stand_ins[p]
            if has_values(z) and sharded.local(q).data_ptr() != sharded.local(z).data_ptr():
                z.copy_(q)  # the base optimizer has given it another memory
        for key, own in self.own:
            self.base.state[key].update(own)
        self.own.clear()

    def versions(self) -> list[tuple[int, int, int]]:
        """Counters that change where the base optimizer writes to a parameter or gradient, or replaces it."""
        lent = [self.stand_ins.get(p, p) for part in self.parts for p in part.params]
        return [(p._version, id(p.grad), -1 if p.grad is None else p.grad._version) for p in lent]


def clip(parts: Iterable[Part], norm: Tensor) -> None:
    """Scales gradients in place where their group has a norm that all together must not exceed."""
    for part in parts:
        limit = part.record.group["max_grad_norm"]
        grads = [p.grad for p in part.params if p.grad is not None]
        if limit is None or not grads:
            continue
        factor = float(limit) / (norm + 1e-6)
        if part.record.capturable:
            torch._foreach_mul_(grads, factor.clamp(max=1.0).to(grads[0].device))
        elif not (value := read_values(factor)[0]) >= 1:  # also NaN
            torch._foreach_mul_(grads, value)


def of_16_bits(groups: Iterable[ParamGroup]) -> list[Tensor]:
    """The parameters of 16 bits, which the base optimizer steps as stand-ins of 32."""
    return [p for group in groups for p in group["params"] if p.dtype in _HALF]


def replace(base: Optimizer, others: Mapping[Tensor, Tensor]) -> None:
    """Puts others in the place of parameters, in the groups and states of an optimizer."""
    for group in base.param_groups if others else ():
        group["params"][:] = [others.get(p, p) for p in group["params"]]
    for p, q in others.items():
        if p in base.state:
            base.state[q] = base.state.pop(p)


# ---- state dicts -----------------------------------------------------------------------------------------

# What groups of schedulefree's wrapper hold, and those of earlier builds held, without a prefix.
_FORMER = ("train_mode", "k", "weight_sum", "lr_max", "weight_decay_at_y")
_BASES = "base:"  # with which names of a base optimizer's entries began there that had one of these


def _with_own_names(groups: Sequence[ParamGroup], saved: dict[str, Any]) -> dict[str, Any]:
    """A state dict of an earlier build or of ``schedulefree`` in today's form; others as they are."""
    saved_groups = saved["param_groups"]
    if any(PREFIX + "k" in group for group in saved_groups):
        return saved
    if not any("weight_sum" in group for group in saved_groups):  # of a base optimizer alone
        return saved

    def with_prefix(entries: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
        ours = {PREFIX + name: entries[name] for name in names if name in entries}
        return {key.removeprefix(_BASES): value for key, value in entries.items() if key not in names} | ours

    states = {key: with_prefix(state, ("x", "y", "z")) for key, state in saved["state"].items()}
    renamed_groups = []
    for group, entries in zip(groups, saved_groups, strict=True):
        both = {name: entries[name] for name in _FORMER if name in group and name in entries}
        renamed_groups.append(both | with_prefix(entries, _FORMER))  # in schedulefree one entry was both's
        if "train_mode" in entries:
            renamed_groups[-1][PREFIX + "train_mode"] = bool(entries["train_mode"])
    return {**saved, "state": states, "param_groups": renamed_groups}


def load(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Loads a state dict into a wrapper. Whatever is raised, nothing has changed."""
    saved = state_dict.copy()
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        saved = hook(optimizer, saved) or saved
    rest = {}  # states of no parameter
    if isinstance(states := saved.get("state"), Mapping):
        rest = {k: s for k, s in states.items() if not isinstance(k, int) and not isinstance(s, Mapping)}
        saved = {**saved, "state": {key: state for key, state in states.items() if key not in rest}}
    check_form(saved)
    base, records = optimizer.base, optimizer._records()
    check_counts(base.param_groups, saved)
    for index, entries in enumerate(saved["param_groups"]):
        if "weight_sum" in entries and "weight_lr_power" in entries:
            raise ValueError(
                f"Invalid state dict: parameter group {index} has weight_lr_power, so it is of a "
                f"schedule-free optimizer that is no {type(optimizer).__name__}"
            )
    saved = sorted_by_name(base.param_groups, _with_own_names(base.param_groups, saved))
    groups = []
    for index, (record, entries) in enumerate(zip(records, saved["param_groups"], strict=True)):
        where = f" in parameter group {index} of the state dict"
        group = optimizer._completed(entries, record.group) | {"params": record.group["params"]}
        optimizer._check_group(group, where)
        groups.append({**group, "params": entries["params"]})
    nonfinite.policy_of([*map(Own, groups)], " of the state dict")
    own = _copied_states(records, saved)
    samples = Samples.of(saved.get(OURS, {}).get("fingerprint"))
    theirs = {
        key: {name: value for name, value in state.items() if name not in _KEYS}
        for key, state in saved["state"].items()
    }
    # torch loads a state in the dtype of its parameter, and shares its tensors with the dict.
    stand_ins = {
        p: torch.zeros((), dtype=torch.float32, device=p.device).expand(p.shape)
        for p in of_16_bits(base.param_groups)
    }
    theirs = tree_map_only(Tensor, torch.clone, theirs | rest)
    before = base.state, base.param_groups
    replace(base, stand_ins)
    try:
        base.load_state_dict({**saved, "state": theirs, "param_groups": groups})
    except BaseException:
        base.state, base.param_groups = before
        raise
    finally:
        replace(base, {q: p for p, q in stand_ins.items()})
    for p, state in own.items():
        base.state[p].update(renamed(state))
    optimizer._memory.expected, optimizer._memory.probed = samples, False
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _copied_states(records: Sequence[WrappedGroup], saved: dict[str, Any]) -> dict[Tensor, State]:
    """Copies of the wrapper's entries of all states in a checked dict, where the parameters are."""
    states = [state for state in saved["state"].values() if state]
    counted = any(group.get(PREFIX + "k", 0) for group in saved["param_groups"])
    if counted and states and not any(_Z in state for state in states):
        raise ValueError(f"Invalid state dict: no state has {_Z}, has {sorted(states[0])}")
    result = {}
    for index, (record, group) in enumerate(zip(records, saved["param_groups"], strict=True)):
        for key, p in zip(group["params"], record.group["params"], strict=True):
            entries = saved["state"].get(key, {})
            if _Z in entries:
                where = f"parameter {key!r} of parameter group {index}"
                state = dict(Own(entries))
                require_entries(record.iterates, state, where)
                result[p] = copy_state(p, state, record.iterates, where)
                convert(p, result[p], record.bits)
    return result
