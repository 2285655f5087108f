"""Steps within ``backward()``: some parameters take their step before the others."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from schedulefree_cpp._core import capturable
from schedulefree_cpp._core.group import Group
from schedulefree_cpp._core.interrupts import Uninterrupted
from schedulefree_cpp._core.samples import trains


@dataclass
class Iteration:
    """An iteration in which ``step_parameter()`` was called, until ``step()`` ends it."""

    homes: dict[Tensor, Group]  # the group of each parameter
    steps: dict[Group, Any] | None = None  # of each group, from the first parameter's step on
    stepped: set[Tensor] = field(default_factory=set)


def step_parameter(optimizer: Any, p: Tensor) -> None:
    """Takes the step of one parameter; the first in an iteration also schedules that of all groups."""
    memory = optimizer._memory
    iteration = memory.iteration
    if iteration is None:
        groups = optimizer._records()
        iteration = Iteration({q: record for record in groups for q in record.group["params"]})
        _require_no_norm(groups)
    if p not in iteration.homes:
        raise ValueError("Invalid p: expected a parameter of this optimizer")
    group = iteration.homes[p]
    _require_no_norm([group])
    if p in iteration.stepped:
        raise RuntimeError(
            "a parameter has taken this iteration's step already: call optimizer.step() after each "
            "backward pass, and do not accumulate gradients over several"
        )
    if iteration.steps is None:
        for record in optimizer._ready_groups():
            record.read_layout()
    elif not trains(group):
        optimizer._require_train_mode()
    if p.grad is None:
        return
    gathered = group.lists_of([p], [optimizer.state.get(p)])
    with Uninterrupted():
        steps = iteration.steps or _schedule_all(optimizer, memory.groups)
        try:
            group.update(gathered, optimizer.state)
        except BaseException:
            if optimizer.capturable and not iteration.stepped:
                capturable.restore(memory.groups)
            raise
        iteration.steps = steps
        iteration.stepped.add(p)
        memory.iteration = iteration


def _schedule_all(optimizer: Any, groups: Sequence[Group]) -> dict[Group, Any]:
    steps = optimizer._next_steps(groups, [None, None, None], [True] * len(groups))
    return dict(zip(groups, steps, strict=True))


def steps_of(optimizer: Any, groups: Sequence[Group], counted: Sequence[bool]) -> list[Any]:
    """The steps that end an iteration. A group that was added by hand meanwhile is scheduled now."""
    known = optimizer._memory.iteration.steps
    late = [group for group in groups if group not in known]
    known |= _schedule_all(optimizer, late) if late else {}
    if optimizer.capturable:
        capturable.restore([group for group, c in zip(groups, counted, strict=True) if not c])
    return [known[group] for group in groups]


def end_iteration(optimizer: Any) -> None:
    """Counts an iteration in which some parameters have stepped, and others will not."""
    memory = optimizer._memory
    iteration, memory.iteration = memory.iteration, None
    for record, step in (iteration.steps or {}).items():
        rest = [i for i, p in enumerate(record.group["params"]) if p not in iteration.stepped]
        record.store(step, optimizer.state, rest, len(rest) < len(record.group["params"]))


def _require_no_norm(groups: Sequence[Group]) -> None:
    """Raises RuntimeError where a step needs every gradient before the first parameter moves."""
    if any(record.group.get("max_grad_norm") is not None for record in groups):
        raise RuntimeError(
            "step_parameter() cannot be used with max_grad_norm: clipping needs every gradient first"
        )
    if any(record.group.get("nonfinite", "propagate") != "propagate" for record in groups):
        raise RuntimeError(
            "step_parameter() cannot be used with nonfinite='skip' or 'raise', which need every gradient "
            "first"
        )


class BackwardHandle:
    """What `schedulefree_cpp.AdamWScheduleFree.step_in_backward` returns; also a context manager."""

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
        """Calls `remove`."""
        self.remove()


def step_in_backward(optimizer: Any) -> BackwardHandle:
    """Has every parameter take its step, and lose its gradient, as soon as the gradient is complete."""
    reference = weakref.ref(optimizer)  # or parameters and optimizer would keep each other alive

    def take(p: Tensor) -> None:
        optimizer = reference()
        if optimizer is not None:
            optimizer.step_parameter(p)
            p.grad = None

    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return BackwardHandle([p.register_post_accumulate_grad_hook(take) for p in params])
