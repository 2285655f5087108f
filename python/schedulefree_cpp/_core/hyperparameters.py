"""Hyperparameters: which there are, what may stand in a parameter group, and refusals by name.

Numbers, with their domains and defaults, are declared in ``csrc/hyperparameters.h``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Number, Real
from typing import Any, get_args

import torch
from torch import Tensor

from schedulefree_cpp._core.library import _C
from schedulefree_cpp._core.types import (
    DecayAt,
    ExpAvgSqBits,
    Nonfinite,
    ParamGroup,
    Rounding,
    StateBits,
    quoted_name,
)

PARAMETER_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

TENSORS = ("lr", "weight_decay")
"""Hyperparameters that may be tensors, which a captured or compiled step reads when it runs."""

SCHEDULE: dict[str, type] = {"k": int, "weight_sum": float, "lr_max": float, "scheduled_lr": float}
"""What a group holds of its schedule, in the order of ``schedule_step_``."""

LAYOUT = ("capturable", "state_bits", "exp_avg_sq_bits")
"""How an optimizer keeps its state and schedule: no checkpoint holds these, and loading leaves them."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "decay_at": get_args(DecayAt),
    "state_bits": get_args(StateBits),
    "exp_avg_sq_bits": get_args(ExpAvgSqBits),
    "rounding": get_args(Rounding),
    "nonfinite": get_args(Nonfinite),
}
"""The values of hyperparameters that are neither numbers nor flags, the default first."""

_UPSTREAM = {
    "sgd_lr",
    "adam_lr",
    "beta",
    "beta2",
    "eps",
    "weight_decay",
    "warmup_steps",
    "r",
    "weight_lr_power",
}

EXTRAS: dict[str, Any] = {
    **{name: value for name, value in _C.DEFAULTS.items() if name not in _UPSTREAM},
    **{name: values[0] for name, values in CHOICES.items()},
    "maximize": False,
    "max_grad_norm": None,
    "capturable": False,
}
"""Defaults of the hyperparameters that groups of ``schedulefree`` lack.

A group holds one of these only where it differs: flattened checkpoints, which need equal keys, then load in
both packages.
"""

_PLAIN_TYPES: set[type] = {bool, int, float, complex, str, list, tuple, type(None)}


def arguments(of_constructor: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters in the ``locals()`` of a constructor, at its first line."""
    return {k: v for k, v in of_constructor.items() if k not in ("self", "params", "__class__")}


# ---- checks --------------------------------------------------------------------------------------------


def check_number(name: str, value: object, where: str = "", domain: str | None = None) -> None:
    """Raises ValueError for a value outside a domain.

    Args:
        name: the hyperparameter, for the message.
        value: a number, or a tensor of one element.
        where: such as ``" in parameter group 1"``.
        domain: whose domain in ``csrc/hyperparameters.h``; None for ``name``.
    """
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


def check_choice(name: str, value: object, choices: Sequence[Any], where: str = "") -> None:
    """Raises ValueError for anything but one of some values."""
    if isinstance(value, Tensor) or value not in choices:
        raise ValueError(f"Invalid {name}{where}: {value!r}, expected one of {list(choices)}")


def check_group(
    group: Mapping[str, Any], known: Iterable[str], where: str, domains: Mapping[str, str], prefix: str = ""
) -> None:
    """Raises ValueError for a hyperparameter of a group that is outside its domain.

    Args:
        group: the group; other entries than hyperparameters are not looked at.
        known: the optimizer's hyperparameters, beside `EXTRAS`.
        where: such as ``" in parameter group 1"``.
        domains: whose domain a number has, where that is not its own.
        prefix: what messages have before a name.
    """
    for name in (*known, *EXTRAS):
        domain = domains.get(name, name)
        value: Any = group.get(name)
        if name not in group or name in SCHEDULE or domain not in _C.DOMAINS:
            continue
        if value is None and name == "max_grad_norm":
            continue
        if not (type(value) is float and _C.in_domain(domain, value)):
            check_number(prefix + name, value, where, domain)
    for name, choices in CHOICES.items():
        if name in group:
            check_choice(prefix + name, group[name], choices, where)
    if group.get("nonfinite") == "raise" and group.get("capturable", False):
        raise ValueError(
            f"Invalid nonfinite{where}: 'raise', expected 'skip' or 'propagate' with capturable, whose "
            "steps no host looks at"
        )


def store_plain_numbers(group: ParamGroup) -> None:
    """Makes Python numbers of other ones, such as NumPy's, and a tuple of ``betas``.

    A checkpoint of a group is then read with ``weights_only=True``, and ``betas`` may be any sequence.
    """
    for name, value in group.items():
        if type(value) in _PLAIN_TYPES:
            continue
        if isinstance(value, Real):
            group[name] = int(value) if isinstance(value, Integral) else float(value)
        elif isinstance(value, Number):  # such as a Decimal
            group[name] = float(value)  # type: ignore[arg-type]
        elif getattr(value, "shape", None) == () and not isinstance(value, Tensor):
            group[name] = value.item()
    if "betas" in group:
        group["betas"] = tuple(map(float, group["betas"]))


def store_plain_schedule(group: ParamGroup, where: str) -> None:
    """Makes plain numbers of a group's schedule. Raises ValueError for one that no steps can have led to."""
    for name, kind in SCHEDULE.items():
        if name in group:
            check_number(name, group[name], where)
            group[name] = kind(group[name])
    if type(group.get("train_mode", True)) is not bool:
        raise ValueError(f"Invalid train_mode{where}: {group['train_mode']!r}, expected a bool")


# ---- parameters ------------------------------------------------------------------------------------------


def check_parameters(group: ParamGroup, where: str) -> None:
    """Raises ValueError for a parameter that wants gradients and is of a dtype that no operator takes."""
    for i, p in enumerate(group["params"]):
        if p.requires_grad and p.dtype not in PARAMETER_DTYPES:
            raise ValueError(
                f"Invalid params[{i}]{where}: dtype {p.dtype}, expected one of "
                f"{', '.join(map(str, PARAMETER_DTYPES))}"
            )


def drop_duplicates(group: ParamGroup) -> None:
    """Removes repeated parameters from a group; torch has warned of them."""
    if len({*map(id, group["params"])}) < len(group["params"]):
        first = {p: i for i, p in reversed(list(enumerate(group["params"])))}
        group.update(select(group, sorted(first.values())))


def select(group: ParamGroup, positions: Sequence[int]) -> ParamGroup:
    """The parameters of a group at some positions, and their names if they have any."""
    lists = {key: group[key] for key in ("params", "param_names") if key in group}
    return {key: [values[i] for i in positions] for key, values in lists.items()}


def refuse_known_parameters(
    groups: list[ParamGroup], group: ParamGroup, where: str, error: ValueError
) -> None:
    """Raises ValueError naming the parameter for which torch has refused a group: it is in another one."""
    homes = {p: index for index, other in enumerate(groups) for p in other["params"]}
    for i, p in enumerate(group["params"]):
        if isinstance(p, Tensor) and p in homes:
            raise ValueError(
                f"Invalid params[{i}]{quoted_name(group, i)}{where}: it is in parameter group {homes[p]}, "
                f"too; {error}"
            ) from None
