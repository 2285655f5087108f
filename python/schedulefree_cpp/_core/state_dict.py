"""State dicts: their form, their checks, and copies of state.

A state dict has upstream's keys in ``"state"`` and ``"param_groups"``. What upstream has no key for stands in
one entry more, ``"schedulefree_cpp"``, which distributed checkpoints drop:

- ``"y_beta"``: for each group the beta that built ``y``, which a scheduler may have moved since;
- ``"fingerprint"``: a few elements of the parameters in both modes (`Samples`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from schedulefree_cpp._core import capturable, formats, nonfinite
from schedulefree_cpp._core.hyperparameters import (
    LAYOUT,
    check_number,
    store_plain_numbers,
    store_plain_schedule,
)
from schedulefree_cpp._core.library import _C
from schedulefree_cpp._core.modes import holds_parameters
from schedulefree_cpp._core.samples import Samples, take_samples
from schedulefree_cpp._core.sharded import placed_like
from schedulefree_cpp._core.state import TENSORS, bits_of, convert, zeros_for
from schedulefree_cpp._core.types import PLAIN_TYPES, ParamGroup, State

OURS = "schedulefree_cpp"

# Stored beside the parameter by implementations that read like the paper. A step here would not update them.
_NOT_LOADED = {"x", "y"}

# Entries of a group that only a schedule-free optimizer has.
_SCHEDULE = ("k", "weight_sum", "lr_max")

# One that only ScheduleFree+ has, where betas[0] is another thing.
_PLUS = "sf_beta1"


# ---- saving ----------------------------------------------------------------------------------------------


def save(optimizer: Any) -> dict[str, Any]:
    """The state dict of a schedule-free optimizer."""
    for hook in optimizer._optimizer_state_dict_pre_hooks.values():
        hook(optimizer)
    numbers: dict[Tensor, int] = {}
    groups = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            numbers.setdefault(p, len(numbers))
        # Checkpoints do not depend on where and how the optimizer keeps its state.
        saved = {key: value for key, value in group.items() if key not in LAYOUT}
        capturable.to_numbers(saved)
        store_plain_numbers(saved)
        groups.append({**saved, "params": [numbers[p] for p in group["params"]]})
    state = {}
    for key, value in optimizer.state.items():
        number = numbers.get(key) if isinstance(key, Tensor) else key
        if number is not None:
            state[number] = dict(value) if isinstance(value, dict) else value
    memory, records = optimizer._memory, optimizer._records()
    samples = None if memory.probed else memory.expected or take_samples(records, optimizer.state)
    entry = own_entry(samples, [record.y_beta for record in records])
    result = {"state": state, "param_groups": groups, **entry}
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        result = post_hook(optimizer, result) or result
    return result


def own_entry(samples: Samples | None, y_beta: list[float] | None) -> dict[str, Any]:
    """Our entry of a state dict, under its key; nothing where it would be empty."""
    entry: dict[str, Any] = {} if y_beta is None else {"y_beta": y_beta}
    if samples is not None:
        entry["fingerprint"] = samples._asdict()
    return {OURS: entry} if entry else {}


# ---- loading ---------------------------------------------------------------------------------------------


def load(optimizer: Any, state_dict: dict[str, Any]) -> None:
    """Loads a state dict into a schedule-free optimizer. Raises ValueError before anything changes."""
    saved = state_dict.copy()
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        saved = hook(optimizer, saved) or saved
    check_form(saved)
    own_groups, records = optimizer.param_groups, optimizer._records()
    saved = sorted_by_name(own_groups, saved)
    _check(own_groups, saved, type(optimizer).__name__, optimizer._group_type.required)
    groups = []
    for index, (own, entries) in enumerate(zip(own_groups, saved["param_groups"], strict=True)):
        where = f" in parameter group {index} of the state dict"
        groups.append(_copy_group(own, entries))
        optimizer._check_hyperparameters(groups[index], where)
        store_plain_numbers(groups[index])
        optimizer._check_parameters({**own, **groups[index]}, where)
        store_plain_schedule(groups[index], where)
    _complete_groups(optimizer, groups)
    entry = saved.get(OURS, {})
    _check_betas(entry.get("y_beta"), len(groups))
    nonfinite.policy_of(groups, " of the state dict")
    samples = Samples.of(entry.get("fingerprint"))
    state = _copy_states(records, groups, saved)
    # In place: a proxy shares these objects, but not assignments to them.
    own_groups[:] = groups
    optimizer.state.clear()
    optimizer.state.update(state)
    memory = optimizer._memory
    memory.iteration, memory.expected, memory.probed = None, samples, False
    betas = entry.get("y_beta") or [None] * len(groups)
    for record, group, y_beta in zip(records, groups, betas, strict=True):
        record.group = record.entries = group
        record.y_beta = optimizer._initial_y_beta(record) if y_beta is None else y_beta
        if memory.capturable:
            capturable.to_device(record)
        if record.states:  # which compiled code reads
            record.states = [*map(optimizer.state.get, record.params)]
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def restore(optimizer: Any, kept: dict[str, Any]) -> None:
    """Completes an optimizer that was copied or unpickled by what it has kept beside groups and state."""
    memory = optimizer._memory
    memory.capturable = bool(optimizer.defaults.get("capturable", False))
    _complete_groups(optimizer, optimizer.param_groups)
    memory.expected, memory.probed = kept.get("expected"), kept.get("probed", False)
    memory.had_parameters = any(map(holds_parameters, optimizer.param_groups))
    records = optimizer._records()
    for record, y_beta in zip(records, kept.get("y_beta", ()), strict=False):
        record.y_beta = y_beta
    for record in records:
        record.note_formats(optimizer.state)
        if memory.capturable:
            capturable.to_device(record)


def _complete_groups(optimizer: Any, groups: Sequence[ParamGroup]) -> None:
    """Adds what groups of older versions lack, and drops a mode where groups have none."""
    for group in groups:
        for key, value in optimizer.defaults.items():
            if key != "differentiable":
                group.setdefault(key, value)
        if "train_mode" not in optimizer._schedule_start:
            group.pop("train_mode", None)


_has_names = methodcaller("__contains__", "param_names")


def sorted_by_name(groups: list[ParamGroup], state_dict: dict[str, Any]) -> dict[str, Any]:
    """Sorts the parameters of a state dict like the optimizer's, where both have the same names.

    The dict's names are its ``param_names``, or its ``params``, where C++ writes names. Without names the
    order stays as it is, as in torch.

    Raises:
        ValueError: for a dict whose ``params`` are names that the optimizer does not have.
    """
    saved_groups = state_dict["param_groups"]
    if len(groups) != len(saved_groups) or not all(map(_has_names, groups)):
        return state_dict
    result: list[dict[str, Any]] = []
    ours: dict[int, int] = {}  # our numbers of the dict's parameters
    for index, (own, saved) in enumerate(zip(groups, saved_groups, strict=True)):
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
        keys = [keys[positions[name]] for name in names]
        result.append({**saved, "params": keys, "param_names": list(names)})
    entry = dict(state_dict.get(OURS, {}))
    if "fingerprint" in entry:
        numbers = [ours.get(number, number) for number in entry["fingerprint"]["params"]]
        entry["fingerprint"] = {**entry["fingerprint"], "params": numbers}
    return {**state_dict, "param_groups": result, OURS: entry}


def check_form(state_dict: Any) -> None:
    """Raises ValueError unless a dict has groups with parameters, and states of these parameters."""
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise ValueError("Invalid state dict: expected param_groups, a list of dicts")
    for index, group in enumerate(groups):
        if not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(f"Invalid state dict: parameter group {index} has no list of params")
    states = state_dict.get("state")
    if not isinstance(states, Mapping) or not all(isinstance(state, Mapping) for state in states.values()):
        raise ValueError("Invalid state dict: expected state, a dict of dicts")
    if not isinstance(entry := state_dict.get(OURS, {}), Mapping):
        raise ValueError(f"Invalid state dict: schedulefree_cpp is {entry!r}, expected a dict")


def _check_betas(betas: Any, count: int) -> None:
    """Raises ValueError unless our entry has a beta in (0, 1] for each group, or None for none at all."""
    if betas is None:
        return
    if not isinstance(betas, (list, tuple)) or len(betas) != count:
        raise ValueError(f"Invalid y_beta in the state dict: {betas!r}, expected {count} numbers")
    for index, beta in enumerate(betas):
        if not (type(beta) is float and _C.in_domain("beta", beta)):
            check_number("y_beta", beta, f" in parameter group {index} of the state dict", "beta")


def check_counts(groups: list[ParamGroup], state_dict: dict[str, Any]) -> None:
    """Raises ValueError for a state dict of other groups, or with states of other parameters."""
    saved_groups = state_dict["param_groups"]
    if len(groups) != len(saved_groups):
        raise ValueError(f"Invalid state dict: {len(saved_groups)} parameter groups, expected {len(groups)}")
    for index, (own, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(own["params"]) != len(saved["params"]):
            raise ValueError(
                f"Invalid state dict: {len(saved['params'])} parameters in parameter group {index}, "
                f"expected {len(own['params'])}"
            )
    keys = {key for group in saved_groups for key in group["params"]}
    strangers = [key for key in state_dict["state"] if isinstance(key, int) and key not in keys]
    if strangers:
        raise ValueError(
            f"Invalid state dict: state has parameter {strangers[0]}, which is in no parameter group"
        )


def _check(groups: list[ParamGroup], state_dict: dict[str, Any], owner: str, required: Sequence[str]) -> None:
    """Raises ValueError for a state dict of other groups, or of an optimizer whose groups lack an entry."""
    check_counts(groups, state_dict)
    for index, saved in enumerate(state_dict["param_groups"]):
        if not saved.keys() >= {*_SCHEDULE, *required}:
            lacking = [key for key in (*_SCHEDULE, *required) if key not in saved]
            no_z = (
                "" if any("z" in state for state in state_dict["state"].values()) else ", and no state has z"
            )
            raise ValueError(
                f"Invalid state dict: parameter group {index} lacks {', '.join(lacking)}{no_z}, so it is not "
                f"of a schedule-free optimizer such as {owner}"
            )
        if _PLUS in saved and _PLUS not in required:
            raise ValueError(
                f"Invalid state dict: parameter group {index} has {_PLUS}, so it is of ScheduleFree+ and not "
                f"of {owner}"
            )


def _copy_states(
    records: Sequence[Any], groups: Sequence[ParamGroup], state_dict: dict[str, Any]
) -> dict[Tensor, State]:
    """Copies the state of a checked dict to where the parameters are, in the formats of the groups.

    Raises:
        ValueError: naming group, parameter, entry, what was expected and what came.
    """
    result: dict[Tensor, State] = {}
    for index, (record, group) in enumerate(zip(records, groups, strict=True)):
        keys, names = state_dict["param_groups"][index]["params"], group.get("param_names")
        needed = record.state_names(group)
        for i, p in enumerate(group["params"]):
            saved = state_dict["state"].get(keys[i])
            if saved:
                where = f"parameter {(names or keys)[i]!r} of parameter group {index}"
                state = result[p] = copy_state(p, saved, needed, where)
                convert(p, state, bits_of(group))
    return result


def copy_state(p: Tensor, saved: Mapping[str, Any], needed: Sequence[str], where: str) -> State:
    """A copy of a parameter's state, with the parameter's strides.

    Missing optional tensors become zeros. ``x`` and ``y`` are copied only if ``needed`` names them.
    """
    require_entries(needed[:2], saved, where)
    if is_lazy(p):
        raise ValueError(f"Invalid state dict: {where} has no shape yet: load or run the lazy module first")
    state: State = {}
    saved = _decoded_moment(p, saved, where)
    for entry, value in saved.items():
        if entry not in _NOT_LOADED or entry in needed:
            if entry in TENSORS and not isinstance(value, Tensor):
                kind = type(value).__name__
                raise ValueError(f"Invalid state dict: {entry} of {where} has type {kind}, expected a tensor")
            state[entry] = _copy_tensor(value, p, entry, where) if isinstance(value, Tensor) else value
    for entry in needed:
        if entry and entry not in state:
            state[entry] = zeros_for(p, entry, formats.dtype_of(p))
    return state


def _copy_group(own: ParamGroup, saved: Mapping[str, Any]) -> ParamGroup:
    """A group as it was saved, with the optimizer's parameters and its way to keep their state."""
    group: ParamGroup = copy.deepcopy({**saved, "params": None})
    for key in LAYOUT:
        group.pop(key, None)
        if key in own:
            group[key] = own[key]
    if "param_names" in own:
        group.setdefault("param_names", own["param_names"])
    if Tensor in map(type, group.values()):
        capturable.to_numbers(group)
    return {**group, "params": own["params"]}


def require_entries(entries: Sequence[str], saved: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a state that lacks one."""
    for entry in entries:
        if entry and entry not in saved:
            raise ValueError(f"Invalid state dict: the state of {where} lacks {entry}, has {sorted(saved)}")


def _check_tensor(value: Tensor, p: Tensor, entry: str, where: str) -> None:
    """Raises ValueError for a tensor of another shape, or of another dtype, than it may have."""
    known = TENSORS.get(entry, TENSORS["exp_avg"])
    shape = tuple(p.shape) if known.shape_for is None else known.shape_for(p)
    if value.layout is not torch.strided:
        raise ValueError(
            f"Invalid state dict: {entry} of {where} has layout {value.layout}, expected a dense one"
        )
    if value.shape != shape:
        raise ValueError(
            f"Invalid state dict: {entry} of {where} has shape {tuple(value.shape)}, expected {shape}"
        )
    if value.dtype in known.integers or (value.is_floating_point() and known.floating):
        return
    expected = [*map(str, known.integers)] + (["a floating-point dtype"] if known.floating else [])
    raise ValueError(
        f"Invalid state dict: {entry} of {where} has dtype {value.dtype}, expected {' or '.join(expected)}"
    )


def _copy_tensor(value: Tensor, p: Tensor, entry: str, where: str) -> Tensor:
    if entry in TENSORS:
        _check_tensor(value, p, entry, where)
    if entry not in TENSORS or TENSORS[entry].shape_for is not None:
        return value.detach().to(device=p.device, copy=True)
    value = value.detach() if type(p) in PLAIN_TYPES else placed_like(p, value.detach())
    return torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(value)


def _decoded_moment(p: Tensor, saved: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A state whose second moment of 8 bits, if it has one, is coded in the order of the parameter's memory.

    The scales of another order are of no use: such a moment is decoded.
    """
    codes, scale = saved.get("exp_avg_sq"), saved.get("exp_avg_sq_scale")
    coded = isinstance(codes, Tensor) and codes.dtype == torch.uint8
    if not coded and scale is None:
        return saved
    if not coded or not isinstance(scale, Tensor):
        raise ValueError(
            f"Invalid state dict: the state of {where} has exp_avg_sq of {_kind(codes)} and "
            f"exp_avg_sq_scale of {_kind(scale)}, expected torch.uint8 beside torch.float32, or no "
            "exp_avg_sq_scale"
        )
    assert isinstance(codes, Tensor)
    _check_tensor(codes, p, "exp_avg_sq", where)
    if scale.dtype != torch.float32 or scale.shape != (formats.scales_for(p),):
        raise ValueError(
            f"Invalid state dict: exp_avg_sq_scale of {where} has dtype {scale.dtype} and shape "
            f"{tuple(scale.shape)}, expected torch.float32 and {(formats.scales_for(p),)}"
        )
    most = formats.largest_scale()
    if not scale.is_meta and not bool(((scale >= 0) & (scale <= most)).all()):  # also NaN
        raise ValueError(
            f"Invalid state dict: exp_avg_sq_scale of {where}: expected values from 0 to {most:g}"
        )
    if codes.stride() == p.stride():
        return saved
    others = {name: value for name, value in saved.items() if name != "exp_avg_sq_scale"}
    return {**others, "exp_avg_sq": formats.decode(codes, scale)}


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
