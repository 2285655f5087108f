"""Type aliases and small helpers that every module uses."""

from __future__ import annotations

import sys
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

ParamGroup: TypeAlias = dict[str, Any]
State: TypeAlias = dict[str, Any]
Loss = TypeVar("Loss")

# The values of hyperparameters that are neither numbers nor flags: type checkers and the check of a group
# (hyperparameters.CHOICES) read them here. The first is what a group without the entry has.
DecayAt: TypeAlias = Literal["y", "z"]
StateBits: TypeAlias = Literal[32, 24]
ExpAvgSqBits: TypeAlias = Literal[32, 8]
Rounding: TypeAlias = Literal["nearest", "stochastic"]
Nonfinite: TypeAlias = Literal["propagate", "skip", "raise"]
AdjustLrFn: TypeAlias = Literal["original", "match_rms_adamw"]  # every group of Muon has it

PLAIN_TYPES = {Tensor, torch.nn.Parameter}
"""The types of tensors whose memory operators take as it is; others are localised first."""

MOVED = "A parameter has moved since its state was made: optimizer.train() moves the state along"


def has_values(t: Tensor) -> bool:
    """False for a meta or fake tensor, which has a shape and a dtype only."""
    if type(t) in PLAIN_TYPES:
        return not t.is_meta
    fake = sys.modules.get("torch._subclasses.fake_tensor")  # imported where there is a fake tensor
    return not (t.is_meta or (fake is not None and isinstance(t, fake.FakeTensor)))


def read_values(t: Tensor) -> list[float]:
    """The elements of a tensor, for which the host waits; zeros where it has no values."""
    result: list[float] = t.reshape(-1).tolist() if has_values(t) else [0.0] * t.numel()
    return result


def quoted_name(group: ParamGroup, i: int) -> str:
    """The name of a parameter in brackets and quotes, with a space before, or nothing where it has none."""
    names = group.get("param_names", [])
    return f" ({names[i]!r})" if i < len(names) else ""
