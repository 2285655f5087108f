"""The step inside a compiled function.

There a step is one call of ``schedulefree_cpp::compiled_step_``. It is given every tensor that a step may
touch, so that the compiler knows what changes, and the number of the optimizer, whose groups it reads and
writes only when it runs. So nothing that changes from step to step is part of the compiled code.
"""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._dynamo.comptime import ComptimeContext, comptime

from schedulefree_cpp import _capturable
from schedulefree_cpp._library import FRAGMENT

if TYPE_CHECKING:
    from schedulefree_cpp._base import ScheduleFreeOptimizer

# What a gradient scaler sets for the time of a step.
_AMP = ("grad_scale", "found_inf")

_NUMBERS = itertools.count()
_OPTIMIZERS: weakref.WeakValueDictionary[int, ScheduleFreeOptimizer] = weakref.WeakValueDictionary()


class Inputs:
    """The tensors of an optimizer as compiled code reads them.

    Reading ``param_groups`` there would make every number in it a constant of the code.
    """

    def __init__(self, optimizer: ScheduleFreeOptimizer) -> None:
        """Numbers the optimizer."""
        self.number = next(_NUMBERS)
        _OPTIMIZERS[self.number] = optimizer
        self.update(optimizer)

    def update(self, optimizer: ScheduleFreeOptimizer) -> None:
        """Reads the optimizer."""
        self.params: list[list[Tensor]] = [group["params"] for group in optimizer.param_groups]
        # A tensor subclass may stand for others, elsewhere: the compiler would have to see into it.
        self.plain = all(type(p.data) is Tensor for params in self.params for p in params)
        self.written: list[Tensor] = [home[key] for home, key in _written(optimizer)]
        self.read: list[Tensor] = [home[key] for home, key in _read(optimizer)]


def _written(optimizer: ScheduleFreeOptimizer) -> list[tuple[Any, Any]]:
    """Where the tensors are that a step may write, beside the parameters: containers and keys."""
    homes: list[tuple[Any, Any]] = [
        (group, name)
        for group in optimizer.param_groups
        for name in _capturable.SCHEDULE
        if isinstance(group.get(name), Tensor)
    ]
    homes += [(optimizer._coefs, index) for index in optimizer._coefs]
    homes += [
        (optimizer._y_beta, index) for index, beta in enumerate(optimizer._y_beta) if isinstance(beta, Tensor)
    ]
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            homes += [(state, name) for name, value in state.items() if isinstance(value, Tensor)]
    return homes


def _read(optimizer: ScheduleFreeOptimizer) -> list[tuple[Any, Any]]:
    """Where the tensors are that a step only reads, beside the gradients."""
    return [
        (group, name)
        for group in optimizer.param_groups
        for name, value in group.items()
        if isinstance(value, Tensor) and name not in _capturable.SCHEDULE
    ]


def takes(optimizer: ScheduleFreeOptimizer) -> bool:
    """Whether this is read by a compiler, into code that may hold a step of the optimizer."""
    if not torch.compiler.is_dynamo_compiling():
        return False
    _look_again(optimizer)
    return optimizer._inputs.plain


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _look_again(optimizer: ScheduleFreeOptimizer) -> None:
    # Called when code is compiled, not when it runs.
    optimizer._inputs.update(optimizer)


def _look_out(context: ComptimeContext) -> None:
    """Sees to what the compiler would get wrong. Called when a step is compiled."""
    if torch._dynamo.config.trace_autograd_ops and any(
        torch._dynamo.utils.get_static_address_type(p) == "guarded"
        for optimizer in _OPTIMIZERS.values()
        for group in optimizer.param_groups
        for p in group["params"]
    ):
        raise RuntimeError(
            "optimizer.param_groups was read in a compiled function, and with "
            "torch._dynamo.config.trace_autograd_ops torch then loses gradients of its parameters: read and "
            "set param_groups outside of compiled functions"
        )
    # A learning rate that the function has set is not in its group yet when the step runs.
    effects = context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output.side_effects
    groups = {id(group) for optimizer in _OPTIMIZERS.values() for group in optimizer.param_groups}
    for number, variable in list(effects.id_to_variable.items()):
        if number in groups and effects.is_modified(variable):
            context.graph_break("a parameter group was changed in the same graph before optimizer.step()")


def step(optimizer: ScheduleFreeOptimizer, loss: Tensor | None = None) -> None:
    """What a compiler traces in place of a step."""
    comptime(_look_out)
    inputs = optimizer._inputs
    params = [p for group in inputs.params for p in group]
    with torch.no_grad():
        _OPERATOR(
            inputs.number,
            params,
            [p.grad for p in params],
            inputs.written,
            inputs.read,
            [getattr(optimizer, name, None) for name in _AMP],
            loss,
        )


def drop_gradients(optimizer: ScheduleFreeOptimizer) -> None:
    """What a compiler traces in place of ``zero_grad()``."""
    for params in optimizer._inputs.params:
        for p in params:
            p.grad = None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _compiled_step(
    number: int,
    y: Sequence[Tensor],
    grad: Sequence[Tensor | None],
    written: Sequence[Tensor],
    read: Sequence[Tensor],
    amp: Sequence[Tensor | None],
    loss: Tensor | None,
) -> None:
    """Takes an optimizer's step, on the tensors that the compiled code has for its own.

    Those are mostly the very same. Where the compiler has made copies, they stand in for the optimizer's
    during the step: the compiled code may still need what the latter hold, and takes the result there itself.
    """
    optimizer = _OPTIMIZERS[number]
    inputs = optimizer._inputs
    params = [p for group in optimizer.param_groups for p in group["params"]]
    compiled = [p for group in inputs.params for p in group]
    if len(compiled) != len(y) or not _same(compiled, params):
        inputs.update(optimizer)
        raise RuntimeError(
            "the parameters in the optimizer's groups were replaced after a function that calls its step() "
            "had been compiled, which has no gradients of the new ones; nothing was changed, and the next "
            "call goes by the new ones"
        )
    with ExitStack() as stack:
        stack.callback(inputs.update, optimizer)
        for p, t in zip(params, y, strict=True):
            if p is not t:
                _replace(stack, p, "data", t.data)
        for p, g in zip(params, grad, strict=True):
            _replace(stack, p, "grad", g)
        for name, value in zip(_AMP, amp, strict=True):
            if value is not None:
                _replace(stack, optimizer, name, value)
        for homes, known, given in (
            (_written(optimizer), inputs.written, written),
            (_read(optimizer), inputs.read, read),
        ):
            _stand_in(stack, homes, known, given)
        optimizer._step_compiled(loss)


def _same(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


_NONE = object()


def _replace(stack: ExitStack, owner: object, name: str, value: Any) -> None:
    before = getattr(owner, name, _NONE)
    setattr(owner, name, value)
    if before is _NONE:
        stack.callback(delattr, owner, name)
    else:
        stack.callback(setattr, owner, name, before)


def _stand_in(
    stack: ExitStack, homes: list[tuple[Any, Any]], known: Sequence[Tensor], given: Sequence[Tensor]
) -> None:
    """Puts the tensors that the compiled code was given where the optimizer has those it was compiled for.

    What the optimizer has replaced since is left alone.
    """
    if _same(known, given):
        return
    where = {id(home[key]): (home, key) for home, key in homes}
    for own, other in zip(known, given, strict=True):
        if own is not other and id(own) in where:
            home, key = where[id(own)]
            home[key] = other
            stack.callback(_bring_back, home, key, own, other)


def _bring_back(home: Any, key: Any, own: Tensor, other: Tensor) -> None:
    there = key in home if isinstance(home, dict) else key < len(home)
    if there and home[key] is other:
        home[key] = own


FRAGMENT.define(  # type: ignore[no-untyped-call]
    "compiled_step_(int number, Tensor(a!)[] y, Tensor?[] grad, Tensor(b!)[] written, Tensor[] read, "
    "Tensor?[] amp, Tensor? loss) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),
)
FRAGMENT.impl("compiled_step_", _compiled_step, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
FRAGMENT.impl("compiled_step_", torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("schedulefree_cpp::compiled_step_", lambda *_: None)
_OPERATOR = torch.ops.schedulefree_cpp.compiled_step_.default
