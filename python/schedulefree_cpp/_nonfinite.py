"""What a step does where a gradient is not finite: ``nonfinite``, one choice for a whole optimizer.

The norm of all gradients is finite exactly where every gradient is, as long as their squares do not overflow
float64, which takes float64 gradients beyond 1e150. So one number tells, and every process of a distributed
run sees the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from schedulefree_cpp._sharded import local

POLICIES = ("propagate", "skip", "raise")
DEFAULT = POLICIES[0]


def check(policy: object, where: str = "") -> None:
    """Raises ValueError for anything but a policy. ``where`` is such as ``" in parameter group 1"``."""
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ValueError(f"Invalid nonfinite{where}: {policy!r}, expected one of {list(POLICIES)}")


def policy_of(groups: Sequence[dict[str, Any]], where: str = "") -> str:
    """The policy of an optimizer. Raises ValueError for groups that differ."""
    for index, group in enumerate(groups):
        check(group.get("nonfinite", DEFAULT), f" in parameter group {index}{where}")
        require_same(groups[0], group, f" in parameter group {index}{where}")
    policy: str = groups[0].get("nonfinite", DEFAULT) if groups else DEFAULT
    return policy


def require_same(first: dict[str, Any], group: dict[str, Any], where: str) -> None:
    """Raises ValueError for a group with another policy than the first."""
    expected, own = (g.get("nonfinite", DEFAULT) for g in (first, group))
    if own != expected:
        raise ValueError(
            f"Invalid nonfinite{where}: {own!r}, expected {expected!r} as for the whole optimizer, since the "
            "gradients of all groups decide together"
        )


def refuse(groups: Sequence[dict[str, Any]], norm: float) -> None:
    """Raises RuntimeError naming the first parameter whose gradient is not finite."""
    for index, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            if p.grad is not None and not local(p.grad).isfinite().all():
                names = group.get("param_names", [])
                name = f" ({names[i]!r})" if i < len(names) else ""
                raise RuntimeError(_message(f"the gradient of params[{i}]{name} in parameter group {index}"))
    raise RuntimeError(_message(f"a gradient (the norm of all gradients is {norm})"))


def _message(which: str) -> str:
    return (
        f"{which} is not finite; nothing was changed. nonfinite='skip' leaves out such steps, and "
        "'propagate' takes them"
    )


def found(norm: Tensor, found_inf: Tensor | None) -> Tensor:
    """1 where a norm is not finite or a gradient scaler has found as much, else 0; read by no host."""
    own = norm.isfinite().logical_not().double()
    return own if found_inf is None else torch.maximum(own, found_inf.to(own))
