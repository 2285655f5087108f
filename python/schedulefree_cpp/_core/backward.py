"""Steps within ``backward()``: some parameters take their step before the others."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from schedulefree_cpp._core.group import Group


@dataclass
class Iteration:
    """An iteration in which :meth:`step_parameter` was called, until :meth:`step` ends it."""

    homes: dict[Tensor, int]  # the group of each parameter
    steps: list[Any] | None = None  # of each group, from the first parameter's step on
    stepped: set[Tensor] = field(default_factory=set)

    @classmethod
    def of(cls, records: Sequence[Group]) -> Iteration:
        """An iteration in which no parameter has stepped yet."""
        return cls({p: i for i, record in enumerate(records) for p in record.group["params"]})


class Stepping(Protocol):
    """An optimizer that can step one parameter alone."""

    param_groups: list[dict[str, Any]]

    def step_parameter(self, p: Tensor) -> None:
        """Takes the step of one parameter."""


class BackwardHandle:
    """What :meth:`schedulefree_cpp.AdamWScheduleFree.step_in_backward` returns; also a context manager."""

    def __init__(self, handles: Sequence[RemovableHandle]) -> None:
        """Takes the handles of the parameters' hooks."""
        self._handles = handles

    def remove(self) -> None:
        """Ends stepping within backward."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> BackwardHandle:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Calls :meth:`remove`."""
        self.remove()


def step_in_backward(optimizer: Stepping) -> BackwardHandle:
    """Has every parameter take its step, and lose its gradient, as soon as the gradient is complete."""
    reference = weakref.ref(optimizer)  # or parameters and optimizer would keep each other alive

    def take(p: Tensor) -> None:
        optimizer = reference()
        if optimizer is not None:
            optimizer.step_parameter(p)
            p.grad = None

    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return BackwardHandle([p.register_post_accumulate_grad_hook(take) for p in params])


def require_all_gradients_unneeded(records: Sequence[Group]) -> None:
    """Raises RuntimeError where a step needs every gradient before the first parameter moves."""
    if any(record.group.get("max_grad_norm") is not None for record in records):
        raise RuntimeError(
            "step_parameter() cannot be used with max_grad_norm: clipping needs every gradient first"
        )
    if any(record.measures for record in records):
        raise RuntimeError(
            "step_parameter() cannot be used with nonfinite='skip' or 'raise', which need every gradient "
            "first"
        )


def require_next(iteration: Iteration, p: Tensor) -> None:
    """Raises ValueError for a foreign parameter, RuntimeError for one that has taken this iteration's step."""
    if p not in iteration.homes:
        raise ValueError("Invalid p: expected a parameter of this optimizer")
    if p in iteration.stepped:
        raise RuntimeError(
            "a parameter has taken this iteration's step already: call optimizer.step() after each "
            "backward pass, and do not accumulate gradients over several"
        )
