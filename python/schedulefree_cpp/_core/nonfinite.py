"""What a step does where a gradient is not finite: ``nonfinite``, one choice for a whole optimizer.

The norm of all gradients is finite exactly where every gradient is, as long as their squares do not overflow
float64, which takes float64 gradients beyond 1e150. So one number tells, and every process of a distributed
run sees the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from schedulefree_cpp._core.hyperparameters import CHOICES, check_choice
from schedulefree_cpp._core.sharded import local
from schedulefree_cpp._core.types import ParamGroup, quoted_name, read_values

DEFAULT = CHOICES["nonfinite"][0]


def policy_of(groups: Sequence[Mapping[str, Any]], where: str = "") -> str:
    """The policy of an optimizer. Raises ValueError for groups that differ."""
    policy: str = groups[0].get("nonfinite", DEFAULT) if groups else DEFAULT
    for index, group in enumerate(groups):
        own = group.get("nonfinite", DEFAULT)
        if own != policy or own not in CHOICES["nonfinite"]:
            where = f" in parameter group {index}{where}"
            check_choice("nonfinite", own, CHOICES["nonfinite"], where)
            require_same(groups[0], group, where)
    return policy


def require_same(first: Mapping[str, Any], group: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a group with another policy than the first."""
    expected, own = (g.get("nonfinite", DEFAULT) for g in (first, group))
    if own != expected:
        raise ValueError(
            f"Invalid nonfinite{where}: {own!r}, expected {expected!r} as for the whole optimizer, since the "
            "gradients of all groups decide together"
        )


def refuse(groups: Sequence[ParamGroup], norm: float) -> None:
    """Raises RuntimeError naming the first parameter whose gradient is not finite."""
    which = next(
        (
            f"the gradient of params[{i}]{quoted_name(group, i)} in parameter group {index}"
            for index, group in enumerate(groups)
            for i, p in enumerate(group["params"])
            if p.grad is not None and not local(p.grad).isfinite().all()
        ),
        f"a gradient (the norm of all gradients is {norm})",
    )
    raise RuntimeError(
        f"{which} is not finite; nothing was changed. nonfinite='skip' leaves out such steps, and "
        "'propagate' takes them"
    )


def is_skipped(groups: Sequence[ParamGroup], norm: Tensor) -> bool:
    """True for a step that the policy skips; raises where it says so. Waits for the norm."""
    policy = policy_of(groups)
    value = read_values(norm)[0] if policy != DEFAULT else 0.0
    if policy == "raise" and not math.isfinite(value):
        refuse(groups, value)
    return not math.isfinite(value)


def found(norm: Tensor, found_inf: Tensor | None) -> Tensor:
    """1 where a norm is not finite or a gradient scaler has found as much, else 0; read by no host."""
    own = norm.isfinite().logical_not().double()
    return own if found_inf is None else torch.maximum(own, found_inf.to(own))
