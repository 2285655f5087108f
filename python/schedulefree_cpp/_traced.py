"""The part of a step that Dynamo must not trace.

While Dynamo traces a step, the step operators are traced as they are. The schedule is not: every number
that traced code reads from ``param_groups`` becomes a constant of the compiled code. So the schedule is
computed by one opaque operator, ``advance_``, which is given the key of the optimizer and reads and writes
its groups when the compiled code runs.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from schedulefree_cpp._library import FRAGMENT

F = TypeVar("F", bound=Callable[..., Any])


def eager(function: F) -> F:
    """Decorates a function that Dynamo does not trace: compiled code breaks its graph and calls it."""
    decorated: F = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return decorated


class Advancing(Protocol):
    """An optimizer with a schedule."""

    def _advance_compiled(
        self,
        coefs: Sequence[Tensor],
        observed: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
        resting: Sequence[Sequence[int]],
    ) -> None: ...

    def _refresh_plans(self) -> None: ...


_numbers = itertools.count()
_optimizers: weakref.WeakValueDictionary[str, Advancing] = weakref.WeakValueDictionary()


def register(optimizer: Advancing) -> str:
    """Returns the key by which compiled code finds an optimizer: text, as Dynamo makes symbols of numbers."""
    key = str(next(_numbers))
    _optimizers[key] = optimizer
    return key


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def refresh_plans(key: str) -> None:
    """Rebuilds what traced code reads of the groups. Called while a step is traced, not when it runs."""
    _optimizers[key]._refresh_plans()


def advance(
    key: str,
    coefs: Sequence[Tensor],
    observed: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    resting: Sequence[Sequence[int]],
) -> None:
    """Advances the schedules of an optimizer's groups when the compiled code runs.

    Args:
        key: what :func:`register` returned.
        coefs: for each group the scalars of its step; written.
        observed: what the schedule depends on beside the groups.
        tensors: hyperparameters of the groups that are tensors.
        resting: for each group the positions of the parameters that take no step.
    """
    flat = [value for index, positions in enumerate(resting) for i in positions for value in (index, i)]
    torch.ops.schedulefree_cpp.advance_.default(key, coefs, observed, tensors, flat)


@eager
def _advance(
    key: str,
    coefs: Sequence[Tensor],
    observed: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    resting: Sequence[int],
) -> None:
    of_groups: list[list[int]] = [[] for _ in coefs]
    for index, i in zip(resting[::2], resting[1::2], strict=True):
        of_groups[index].append(i)
    _optimizers[key]._advance_compiled(coefs, observed, tensors, of_groups)


# Not for a CUDA graph that inductor records: the schedule of one step would be replayed.
FRAGMENT.define(  # type: ignore[no-untyped-call]
    "advance_(str key, Tensor(a!)[] coefs, Tensor?[] observed, Tensor[] tensors, int[] resting) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),
)
FRAGMENT.impl("advance_", _advance, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
FRAGMENT.impl("advance_", torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("schedulefree_cpp::advance_", lambda *_: None)
