"""The boundary to Dynamo: what it must not trace, and the schedule of a step that it does.

While Dynamo traces a step, the step operators are traced as they are. The schedule is not: every number that
traced code reads from ``param_groups`` becomes a constant of the compiled code. So one opaque operator,
``advance_``, is given the key of the optimizer, and reads and writes its groups when the compiled code runs.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import set_eval_frame

from schedulefree_cpp._core.library import FRAGMENT

F = TypeVar("F", bound=Callable[..., Any])


def eager(function: F) -> F:
    """Decorates a function that Dynamo does not trace: compiled code breaks its graph and calls it.

    As ``torch.compiler.disable``, which imports Dynamo, and takes longer for each call.
    """

    @functools.wraps(function)
    def undisturbed(*args: Any, **kwargs: Any) -> Any:
        before = set_eval_frame(None)
        try:
            return function(*args, **kwargs)
        finally:
            set_eval_frame(before)

    undisturbed._torchdynamo_disable = True  # type: ignore[attr-defined]
    undisturbed._torchdynamo_disable_msg = None  # type: ignore[attr-defined]
    return undisturbed  # type: ignore[return-value]


@eager
def _nothing() -> None:
    pass


@functools.cache
def _skip_the_frames_of_eager() -> None:
    # Compiled code calls them with Dynamo's hook in place. They share one code object.
    from torch._dynamo.eval_frame import skip_code

    skip_code(_nothing.__code__)


class Compiled(Protocol):
    """An optimizer whose step may be compiled."""

    def _prepare_tracing(self) -> bool: ...

    def _advance_compiled(
        self,
        coefs: Sequence[Tensor],
        observed: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
        resting: Sequence[Sequence[int]],
    ) -> None: ...


_numbers = itertools.count()
_optimizers: weakref.WeakValueDictionary[str, Compiled] = weakref.WeakValueDictionary()


def register(optimizer: Compiled) -> str:
    """Returns the key by which compiled code finds an optimizer: text, as Dynamo makes symbols of numbers."""
    _skip_the_frames_of_eager()
    key = str(next(_numbers))
    _optimizers[key] = optimizer
    return key


def prepare_tracing(key: str) -> bool:
    """Brings up to date what traced code reads of an optimizer. True where it can be traced.

    Dynamo calls this while it traces; the compiled code has the result as a constant.
    """
    return _optimizers[key]._prepare_tracing()


# As torch.compiler.assume_constant_result, which imports Dynamo.
prepare_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def call_advance(
    key: str,
    coefs: Sequence[Tensor],
    observed: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    resting: Sequence[Sequence[int]],
) -> None:
    """Has the schedules of an optimizer's groups advance when the compiled code runs.

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


# Not for a CUDA graph that Inductor records: the schedule of one step would be replayed.
FRAGMENT.define(  # type: ignore[no-untyped-call]
    "advance_(str key, Tensor(a!)[] coefs, Tensor?[] observed, Tensor[] tensors, int[] resting) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),
)
FRAGMENT.impl("advance_", _advance, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
FRAGMENT.impl("advance_", torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("schedulefree_cpp::advance_", lambda *_: None)
