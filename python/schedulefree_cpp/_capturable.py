"""The schedule of a capturable optimizer: tensors beside the parameters, which the host does not read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from schedulefree_cpp import ops
from schedulefree_cpp._modes import values

# What a group holds of its schedule, in the order of `schedule_step_`.
SCHEDULE = {
    "k": torch.int64,
    "weight_sum": torch.float64,
    "lr_max": torch.float64,
    "scheduled_lr": torch.float64,
}


def home_of(group: dict[str, Any]) -> torch.device:
    """The device of the first parameter, or the CPU for one without float64 or without values."""
    device = group["params"][0].device if group["params"] else torch.device("cpu")
    return torch.device("cpu") if device.type in ("mps", "meta") else device


def to_tensors(group: dict[str, Any]) -> None:
    """Makes the schedule tensors on the group's device; those that are stay the same, for captured graphs."""
    home = home_of(group)
    for name, dtype in SCHEDULE.items():
        value = group[name]
        if not (isinstance(value, Tensor) and value.device == home and value.dtype == dtype):
            group[name] = torch.as_tensor(value, dtype=dtype, device=home).detach().reshape(()).clone()


def to_numbers(group: dict[str, Any]) -> None:
    """Makes the schedule Python numbers: zeros where fake tensors stand for them."""
    for name in SCHEDULE:
        value = group.get(name)
        if isinstance(value, Tensor):
            group[name] = values(value)[0]


def advance(coefs: Tensor, group: dict[str, Any], rule: dict[str, Any], amp: dict[str, Any]) -> None:
    """Advances a group's schedule on its device, and fills ``coefs``.

    Args:
        coefs: scalars of the step, on the group's device; written.
        group: its schedule is written.
        rule: keyword arguments of :func:`schedulefree_cpp.ops.schedule_step_`.
        amp: ``grad_norm``, ``grad_scale`` and ``found_inf``, each a tensor or None.
    """
    k, weight_sum, lr_max, scheduled_lr = (group[name] for name in SCHEDULE)
    lr, weight_decay = _as_input(group["lr"]), _as_input(group["weight_decay"])
    ops.schedule_step_(coefs, k, weight_sum, lr_max, scheduled_lr, lr, weight_decay, **rule, **amp)


def restore(coefs: Tensor, group: dict[str, Any]) -> None:
    """Undoes :func:`advance`."""
    for name in SCHEDULE:
        group[name].copy_(coefs[ops.COEFFICIENTS.index(name)])


def _as_input(value: Any) -> Tensor:
    """A number is read now; a tensor when the operator runs, or a captured graph is replayed."""
    if isinstance(value, Tensor):
        return value if value.dtype in (torch.float32, torch.float64) else value.double()
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")
