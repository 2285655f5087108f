"""The schedule of a capturable optimizer: tensors beside the parameters, which the host does not read."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from schedulefree_cpp import ops
from schedulefree_cpp._core import nonfinite
from schedulefree_cpp._core.group import Group
from schedulefree_cpp._core.hyperparameters import SCHEDULE, check_number
from schedulefree_cpp._core.types import MOVED, read_values

# What `schedule_step_` takes of a group as it is there.
_COMMON = (
    "warmup_steps", "r", "weight_lr_power", "decoupling_c", "averaging_weight", "maximize", "max_grad_norm",
)  # fmt: skip
_ADAM = ("eps", "inner_momentum")


def to_device(record: Group) -> None:
    """Makes the schedule tensors on the group's device; those that are stay the same, for captured graphs.

    Beside parameters on mps, which has no float64, or meta, which has no values, they are on the CPU.
    """
    group = record.group
    home = group["params"][0].device if group["params"] else torch.device("cpu")
    home = torch.device("cpu") if home.type in ("mps", "meta") else home
    record.coefs = record.coefs.to(home)
    for name, kind in SCHEDULE.items():
        dtype = torch.int64 if kind is int else torch.float64
        value = group[name]
        if not (isinstance(value, Tensor) and value.device == home and value.dtype == dtype):
            group[name] = torch.as_tensor(value, dtype=dtype, device=home).detach().reshape(()).clone()


def to_numbers(group: MutableMapping[str, Any]) -> None:
    """Makes the schedule Python numbers: zeros where fake tensors stand for them."""
    for name, kind in SCHEDULE.items():
        value = group.get(name)
        if isinstance(value, Tensor):
            group[name] = kind(read_values(value)[0])


def advance(
    records: Sequence[Group], counted: Sequence[bool], all_state: Any, observed: Sequence[Any]
) -> list[float]:
    """Advances the schedules of groups on their devices and fills their ``coefs``.

    The step is one of the beta that built y, where its gradients were taken. Whoever calls the operators then
    moves each group to its new beta, since the device may skip the step.

    Args:
        records: the groups.
        counted: which of them take the step.
        all_state: the optimizer's state.
        observed: ``grad_scale`` and ``found_inf`` of a gradient scaler, and the norm of all gradients, each
            a tensor or None.

    Returns:
        The new beta of each group.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: for a schedule that is refused; nothing has changed.
    """
    grad_scale, found_inf, norm, *_ = observed
    betas = [record.beta() for record in records]
    for record, beta in zip(records, betas, strict=True):
        if beta != record.y_beta:
            check_number("beta", beta)
            params = record.group["params"]
            if record.has_moved(params, [*map(all_state.get, params)]):
                raise RuntimeError(MOVED)
    if norm is not None and norm.is_meta:  # the schedule of meta parameters is on the CPU
        norm = torch.zeros_like(norm, device="cpu")
    if norm is not None and records[0].group.get("nonfinite") == "skip":
        found_inf = nonfinite.found(norm, found_inf)
    done = 0
    try:
        for record, beta in compress(zip(records, betas, strict=True), counted):
            _advance(record, beta, grad_norm=norm, grad_scale=grad_scale, found_inf=found_inf)
            done += 1
    except BaseException:
        restore([*compress(records, counted)][:done])
        raise
    return betas


def _advance(record: Group, beta: float, **amp: Tensor | None) -> None:
    group = record.group
    rule: dict[str, Any] = {**amp, "warmup_steps": 0, "stochastic": group.get("rounding") == "stochastic"}
    for name in _COMMON if record.kind == ops.STEP_KINDS["sgd"] else (*_COMMON, *_ADAM):
        if name in group:
            rule[name] = group[name]
    if record.kind != ops.STEP_KINDS["sgd"]:
        rule["beta2"] = group["betas"][1]
        rule["silent_sgd_phase"] = bool(group.get("silent_sgd_phase", True))
    now = record.y_beta
    if beta != now and rule.get("decoupling_c"):  # the one number that follows from the next beta
        now = min(now, 1 - 2**-53)
        rule["decoupling_c"] *= max(1 - beta, 1e-300) / (1 - now)  # at 0 it would be off
    ops.schedule_step_(
        record.coefs,
        group["k"],
        group["weight_sum"],
        group["lr_max"],
        group["scheduled_lr"],
        as_input(group["lr"]),
        as_input(group["weight_decay"]),
        kind=record.kind,
        beta=now,
        **rule,
    )


def restore(records: Sequence[Group]) -> None:
    """Undoes `advance` for groups that take no step."""
    for record in records:
        for name in SCHEDULE:
            record.group[name].copy_(record.coefs[ops.COEFFICIENTS.index(name)])


def as_input(value: Any) -> Tensor:
    """An input of `schedule_step_`: a replayed graph reads a tensor again, and keeps a number."""
    if isinstance(value, Tensor):
        return value if value.dtype in (torch.float32, torch.float64) else value.double()
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")


def require_no_capture() -> None:
    """Raises RuntimeError where a CUDA graph is capturing a step whose schedule is the host's."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "step() is being captured in a CUDA graph, which would repeat the learning rate and the "
            "averaging weight of this one step: construct the optimizer with capturable=True"
        )
