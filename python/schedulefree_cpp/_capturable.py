"""The schedule of a group with ``capturable=True``: tensors on its device, which the host does not read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from schedulefree_cpp import ops
from schedulefree_cpp._modes import Group

# What a group holds of its schedule, in the order of `schedule_step_`. The beta that built y comes behind.
SCHEDULE = {
    "k": torch.int64,
    "weight_sum": torch.float64,
    "lr_max": torch.float64,
    "scheduled_lr": torch.float64,
}

# What `coefs` tells of the schedule before its last step, in the same order.
BEFORE = slice(ops.COEFFICIENTS.index("k"), ops.COEFFICIENTS.index("beta") + 1)


def home_of(group: Group) -> torch.device:
    """Where the schedule is: the device of the first parameter, or the CPU for one without float64."""
    device = group["params"][0].device if group["params"] else torch.device("cpu")
    return torch.device("cpu") if device.type == "mps" else device


def placed(value: Any, dtype: torch.dtype, home: torch.device) -> Tensor:
    """A number as a tensor without dimensions: the same one if it is there."""
    if isinstance(value, Tensor):
        if value.dtype == dtype and value.device == home and value.ndim == 0:
            return value
        return value.detach().to(device=home, dtype=dtype).reshape(()).clone()
    return torch.tensor(value, dtype=dtype, device=home)


def to_device(group: Group) -> None:
    """Has the group's schedule as tensors at its home."""
    home = home_of(group)
    for name, dtype in SCHEDULE.items():
        group[name] = placed(group[name], dtype, home)


def to_host(group: Group) -> None:
    """Has the group's schedule as numbers."""
    for name in SCHEDULE:
        if isinstance(group[name], Tensor):
            group[name] = group[name].item()


def readable(value: Any) -> Tensor:
    """A hyperparameter as `schedule_step_` reads it: a number is read now, a tensor on its device."""
    if isinstance(value, Tensor):
        return value if value.dtype in (torch.float32, torch.float64) else value.double()
    return torch.tensor(float(value), dtype=torch.float64)
