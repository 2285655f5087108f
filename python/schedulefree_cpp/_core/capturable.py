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
from schedulefree_cpp._core.types import MOVED, read_values

# What a group holds of its schedule, in the order of `schedule_step_`.
SCHEDULE = {
    "k": torch.int64,
    "weight_sum": torch.float64,
    "lr_max": torch.float64,
    "scheduled_lr": torch.float64,
}

# What `schedule_step_` takes of a group as it is there.
_COMMON = (
    "warmup_steps", "r", "weight_lr_power", "decoupling_c", "averaging_weight", "maximize", "max_grad_norm",
)  # fmt: skip
_ADAM = ("eps", "inner_momentum")


def to_device(record: Group) -> None:
    """Makes the schedule tensors on the group's device; those that are stay the same, for captured graphs.

    The CPU is that of parameters on a device without float64, or without values.
    """
    group = record.group
    home = group["params"][0].device if group["params"] else torch.device("cpu")
    home = torch.device("cpu") if home.type in ("mps", "meta") else home
    record.coefs = record.coefs.to(home)
    for name, dtype in SCHEDULE.items():
        value = group[name]
        if not (isinstance(value, Tensor) and value.device == home and value.dtype == dtype):
            group[name] = torch.as_tensor(value, dtype=dtype, device=home).detach().reshape(()).clone()


def to_numbers(group: MutableMapping[str, Any]) -> None:
    """Makes the schedule Python numbers: zeros where fake tensors stand for them."""
    for name in SCHEDULE:
        value = group.get(name)
        if isinstance(value, Tensor):
            number = read_values(value)[0]
            group[name] = int(number) if name == "k" else number


def advance(
    records: Sequence[Group], counted: Sequence[bool], all_state: Any, observed: Sequence[Any]
) -> None:
    """Advances the schedules of groups on their devices, fills their ``coefs``, and moves betas.

    Args:
        records: the groups.
        counted: which of them take the step.
        all_state: the optimizer's state.
        observed: ``grad_scale`` and ``found_inf`` of a gradient scaler, and the norm of all gradients, each
            a tensor or None.

    Raises:
        KeyError, TypeError, ValueError, RuntimeError: for a schedule that is refused; nothing has changed.
    """
    grad_scale, found_inf, norm, *_ = observed
    betas = [record.beta() for record in records]
    for record, beta in zip(records, betas, strict=True):
        if beta != record.y_beta:
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
        for record, beta in zip(records, betas, strict=True):
            if beta != record.y_beta:
                record.change_beta(beta, all_state, range(len(record.group["params"])))
    except BaseException:
        restore([*compress(records, counted)][:done])
        raise


def _advance(record: Group, beta: float, **amp: Tensor | None) -> None:
    group = record.group
    rule: dict[str, Any] = {**amp, "warmup_steps": 0, "stochastic": group.get("rounding") == "stochastic"}
    for name in _COMMON if record.kind == ops.STEP_KINDS["sgd"] else (*_COMMON, *_ADAM):
        if name in group:
            rule[name] = group[name]
    if record.kind != ops.STEP_KINDS["sgd"]:
        rule["beta2"] = group["betas"][1]
        rule["silent_sgd_phase"] = bool(group.get("silent_sgd_phase", True))
    ops.schedule_step_(
        record.coefs,
        group["k"],
        group["weight_sum"],
        group["lr_max"],
        group["scheduled_lr"],
        as_input(group["lr"]),
        as_input(group["weight_decay"]),
        kind=record.kind,
        beta=beta,
        **rule,
    )


def restore(records: Sequence[Group]) -> None:
    """Undoes :func:`advance` for groups that take no step."""
    for record in records:
        for name in SCHEDULE:
            record.group[name].copy_(record.coefs[ops.COEFFICIENTS.index(name)])


def as_input(value: Any) -> Tensor:
    """A number is read now; a tensor when the operator runs, or a captured graph is replayed."""
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
