"""State dicts: their checks, copies of state, and whether state and parameters were saved in one mode.

A state dict has upstream's keys in ``"state"`` and ``"param_groups"``. What upstream has no key for stands in
one entry more, ``"schedulefree_cpp"``, which distributed checkpoints drop:

- ``"y_beta"``: for each group the beta that built ``y``, which a scheduler may have moved since;
- ``"fingerprint"``: a few elements of the parameters in both modes (:class:`Samples`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from schedulefree_cpp import _formats, ops
from schedulefree_cpp._sharded import like, local

OURS = "schedulefree_cpp"

# Tensors of a state that have the shape of their parameter.
_SHAPED = {"z", "z_lo", "y_lo", "exp_avg_sq", "exp_avg", "momentum_buffer"}

# The dtypes of those that need not be of a floating-point dtype.
_INTEGERS = {
    "y_lo": (torch.int16, torch.int8),
    "z_lo": (torch.int8,),
    "exp_avg_sq": (torch.uint8,),
}

# Stored beside the parameter by implementations that read like the paper. A step here would not update them.
_NOT_LOADED = {"x", "y"}

# Entries of a group that only a schedule-free optimizer has.
_SCHEDULE = ("k", "weight_sum", "lr_max")

# One that only ScheduleFree+ has, where betas[0] is another thing.
_PLUS = "sf_beta1"

_SAMPLED_PARAMETERS = 64
_SAMPLED_ELEMENTS = 8


class TwoModes(Protocol):
    """What samples need of an optimizer."""

    param_groups: list[dict[str, Any]]

    @property
    def state(self) -> Any:
        """State by parameter."""

    def _trains(self, group: dict[str, Any]) -> bool: ...

    def _y_beta(self, index: int) -> float: ...


def _params(groups: Iterable[Mapping[str, Any]]) -> list[tuple[int, Any, Tensor]]:
    return [(index, group, p) for index, group in enumerate(groups) for p in group["params"]]


# ---- do parameters and state belong to one mode? ---------------------------------------------------------


class Samples(NamedTuple):
    """A few elements of some parameters, in both modes."""

    params: list[int]  # numbers, counted through all groups
    y: Tensor  # float64, on the CPU
    x: Tensor

    @classmethod
    def of(cls, entry: dict[str, Any] | None) -> Samples | None:
        """Reads an entry of a state dict, wherever ``torch.load`` has put its tensors."""
        if entry is None:
            return None
        params, y, x = map(entry.get, cls._fields) if isinstance(entry, dict) else [None] * 3
        if not (
            isinstance(params, list)
            and all(type(number) is int and number >= 0 for number in params)
            and isinstance(y, Tensor)
            and isinstance(x, Tensor)
            and len(y.shape) == 1
            and y.shape == x.shape
            and y.numel() <= _SAMPLED_PARAMETERS * _SAMPLED_ELEMENTS
        ):
            raise ValueError(
                "Invalid fingerprint in the state dict: expected parameter numbers and two vectors y and x "
                "of one length"
            )
        if y.is_meta:
            return None
        return cls(params, *(t.to(device="cpu", dtype=torch.float64) for t in (y, x)))


def _can_be_sampled(p: Tensor) -> bool:
    p = local(p)
    return type(p.data) is Tensor and p.device.type != "meta" and p.is_contiguous()


def _sample(t: Tensor) -> Tensor:
    """A few elements of what this process holds, evenly spread, on the CPU."""
    flat = local(t).detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // _SAMPLED_ELEMENTS))].to(device="cpu", copy=True)


def _sample_in_other_mode(p: Tensor, state: dict[str, Any], beta: float, trains: bool) -> Tensor:
    y = _sample(p)
    few: dict[str, Any] = {n: _sample(state[n]) for n in ("y_lo", "z", "z_lo") if n in state}
    _formats.match(y, few, _formats.Bits(24 if "z_lo" in few else 32))
    y_lo, z_lo = ([few[name]] if name in few else [] for name in ("y_lo", "z_lo"))
    (ops.y_to_x_ if trains else ops.x_to_y_)([y], y_lo, [few["z"]], z_lo=z_lo, beta=beta)
    return y


def sample(optimizer: TwoModes) -> Samples | None:
    """Samples an optimizer's parameters; None where none has a state."""
    homes = [
        (number, *home)
        for number, home in enumerate(_params(optimizer.param_groups))
        if "z" in optimizer.state.get(home[2], ()) and _can_be_sampled(home[2])
    ]
    numbers: list[int] = []
    modes: dict[bool, list[Tensor]] = {True: [], False: []}
    for number, index, group, p in homes[:: max(1, -(-len(homes) // _SAMPLED_PARAMETERS))]:
        trains, beta = optimizer._trains(group), optimizer._y_beta(index)
        numbers.append(number)
        modes[trains].append(_sample(p).double())
        modes[not trains].append(_sample_in_other_mode(p, optimizer.state[p], beta, trains).double())
    return Samples(numbers, torch.cat(modes[True]), torch.cat(modes[False])) if numbers else None


def check_samples(optimizer: TwoModes, expected: Samples) -> None:
    """Raises RuntimeError for parameters that are at ``x`` where the state says ``y``, or the reverse.

    Parameters that are neither are accepted: who replaced them knows why.
    """
    params = _params(optimizer.param_groups)
    chosen = [params[number] for number in expected.params if number < len(params)]
    samples = [_sample(p).double() for _, _, p in chosen if _can_be_sampled(p)]
    if len(samples) != len(expected.params) or sum(map(len, samples)) != len(expected.y):
        return
    trains = torch.cat(
        [torch.full_like(s, optimizer._trains(g)) for (_, g, _), s in zip(chosen, samples, strict=True)]
    )
    now, in_train = torch.cat(samples), trains.bool()
    own = (now - torch.where(in_train, expected.y, expected.x)).abs().sum()
    other = (now - torch.where(in_train, expected.x, expected.y)).abs().sum()
    if not 10 * other < own:
        return
    group = chosen[0][1]
    has, says = ("x", "y") if optimizer._trains(group) else ("y", "x")
    names = {"x": "eval mode (x, the average)", "y": "train mode (y)"}
    remedy = (
        f"set group['train_mode'] = {has == 'y'} in every group of optimizer.param_groups first"
        if "train_mode" in group
        else "load it into the class that has modes, call eval() and save it again"
    )
    raise RuntimeError(
        f"the parameters are those of {names[has]}, but the loaded optimizer state says {names[says]}: the "
        "model was saved in one mode and the optimizer in the other. Save both in the same mode. To use this "
        f"checkpoint as it is, {remedy}."
    )


# ---- saving ----------------------------------------------------------------------------------------------


def complete(state_dict: dict[str, Any], samples: Samples | None, y_beta: list[float] | None) -> None:
    """Detaches a state dict from the optimizer's own dicts, and adds our entry."""
    state_dict["state"] = {
        key: dict(state) if isinstance(state, dict) else state for key, state in state_dict["state"].items()
    }
    entry: dict[str, Any] = {} if y_beta is None else {"y_beta": list(y_beta)}
    if samples is not None:
        entry["fingerprint"] = samples._asdict()
    if entry:
        state_dict[OURS] = entry


# ---- loading ---------------------------------------------------------------------------------------------


def in_order_of(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> dict[str, Any]:
    """Sorts the parameters of a state dict like the optimizer's, where both have the same names.

    The dict's names are its ``param_names``, or its ``params``, where C++ writes names. Without names the
    order stays as it is, as in torch.

    Raises:
        ValueError: for a dict whose ``params`` are names that the optimizer does not have.
    """
    saved_groups = state_dict["param_groups"]
    if len(groups) != len(saved_groups) or not all("param_names" in group for group in groups):
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


def check(
    groups: list[dict[str, Any]], state_dict: dict[str, Any], owner: str, required: Sequence[str]
) -> None:
    """Raises ValueError for a state dict of other groups, or of an optimizer whose groups lack an entry."""
    saved_groups = state_dict["param_groups"]
    if len(groups) != len(saved_groups):
        raise ValueError(f"Invalid state dict: {len(saved_groups)} parameter groups, expected {len(groups)}")
    for index, (own, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        if len(own["params"]) != len(saved["params"]):
            raise ValueError(
                f"Invalid state dict: {len(saved['params'])} parameters in parameter group {index}, "
                f"expected {len(own['params'])}"
            )
        lacking = [key for key in (*_SCHEDULE, *required) if key not in saved]
        if lacking:
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


def copy_state(
    groups: list[dict[str, Any]],
    state_dict: dict[str, Any],
    required: Sequence[Sequence[str | None]],
) -> dict[Tensor, dict[str, Any]]:
    """Copies the state of a dict to where the parameters are.

    Args:
        groups: the optimizer's groups.
        state_dict: checked, with parameters in their order.
        required: for each group, the tensors that every state must have.

    Returns:
        The state by parameter, without ``x`` and ``y``: on its device, with its strides, in the dtypes that
        it was saved in.

    Raises:
        ValueError: naming group, parameter, entry, what was expected and what came.
    """
    result: dict[Tensor, dict[str, Any]] = {}
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    named = [name for group in groups for name in group.get("param_names", [None] * len(group["params"]))]
    for key, name, (index, _, p) in zip(keys, named, _params(groups), strict=True):
        saved = state_dict["state"].get(key)
        if not saved:
            continue
        where = f"parameter {key if name is None else name!r} of parameter group {index}"
        _require(required[index], saved, where)
        saved = _in_order_of(p, saved, where)
        result[p] = {
            entry: _copy_tensor(value, p, entry, where) if isinstance(value, Tensor) else value
            for entry, value in saved.items()
            if entry not in _NOT_LOADED
        }
    return result


def check_wrapped(
    groups: list[dict[str, Any]], state_dict: dict[str, Any], owner: str, iterates: Sequence[str]
) -> None:
    """Raises ValueError for a state dict that a wrapper with these iterates cannot take over whole."""
    for index, saved in enumerate(state_dict["param_groups"]):
        if "k" in saved and "weight_lr_power" in saved:
            raise ValueError(
                f"Invalid state dict: parameter group {index} has weight_lr_power, so it is of a "
                f"schedule-free optimizer that is no {owner}"
            )
    counted = any(saved.get("k", 0) for saved in state_dict["param_groups"])
    states = [state for state in state_dict["state"].values() if state]
    if counted and states and not any("z" in state for state in states):
        raise ValueError(f"Invalid state dict: no state has z, has {sorted(states[0])}")
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    for key, (index, _, p) in zip(keys, _params(groups), strict=False):  # torch compares the numbers
        saved = state_dict["state"].get(key, {})
        where = f"parameter {key!r} of parameter group {index}"
        if "z" in saved:
            _require(iterates, saved, where)
        for entry in sorted({"x", "y", "z"} & saved.keys()):
            _check_shape(saved[entry], p, entry, where)
            _check_dtype(saved[entry], entry, where)


def _require(entries: Sequence[str | None], saved: Mapping[str, Any], where: str) -> None:
    lacking = [entry for entry in entries if entry not in saved]
    if lacking:
        raise ValueError(f"Invalid state dict: the state of {where} lacks {lacking[0]}, has {sorted(saved)}")


def _check_shape(value: Tensor, p: Tensor, entry: str, where: str) -> None:
    if value.shape != p.shape:
        raise ValueError(
            f"Invalid state dict: {entry} of {where} has shape {tuple(value.shape)}, "
            f"expected {tuple(p.shape)}"
        )


def _check_dtype(value: Tensor, entry: str, where: str) -> None:
    integers = _INTEGERS.get(entry, ())
    if value.dtype in integers or (value.is_floating_point() and not entry.endswith("_lo")):
        return
    expected = [*map(str, integers)] + ([] if entry.endswith("_lo") else ["a floating-point dtype"])
    raise ValueError(
        f"Invalid state dict: {entry} of {where} has dtype {value.dtype}, expected {' or '.join(expected)}"
    )


def _copy_tensor(value: Tensor, p: Tensor, entry: str, where: str) -> Tensor:
    if entry not in _SHAPED:
        return value.detach().to(device=p.device, copy=True)
    _check_shape(value, p, entry, where)
    _check_dtype(value, entry, where)
    with torch.no_grad():
        return torch.empty_like(p, dtype=value.dtype, requires_grad=False).copy_(like(p, value))


def _in_order_of(p: Tensor, saved: dict[str, Any], where: str) -> dict[str, Any]:
    """A state whose second moment has 8 bits, with scales that count as the parameter's memory does."""
    codes, scale = saved.get("exp_avg_sq"), saved.get("exp_avg_sq_scale")
    if codes is None or scale is None:
        return saved
    _check_shape(codes, p, "exp_avg_sq", where)
    if scale.dtype != torch.float32 or scale.shape != (_formats.scales_for(p),):
        raise ValueError(
            f"Invalid state dict: exp_avg_sq_scale of {where} has dtype {scale.dtype} and shape "
            f"{tuple(scale.shape)}, expected torch.float32 and {(_formats.scales_for(p),)}"
        )
    if codes.stride() == p.stride():
        return saved
    others = {name: value for name, value in saved.items() if name != "exp_avg_sq_scale"}
    return {**others, "exp_avg_sq": _formats.decode(codes, scale)}
