"""Steps in code that ``torch.compile`` has made, and what Dynamo must not trace.

While Dynamo traces a step, the step operators are traced as they are. The schedule is not: every number that
traced code reads from ``param_groups`` becomes a constant of the compiled code. So one opaque operator,
``advance_``, is given the key of the optimizer, and reads and writes its groups when the compiled code runs.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import set_eval_frame

from schedulefree_cpp._core import capturable
from schedulefree_cpp._core.group import same_items
from schedulefree_cpp._core.hyperparameters import TENSORS
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


@functools.cache
def _skip_frames_of_eager() -> None:
    # Compiled code calls them with Dynamo's hook in place. They share one code object.
    from torch._dynamo.eval_frame import skip_code

    skip_code(_advance.__code__)


_numbers = itertools.count()
_optimizers: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def register(optimizer: Any) -> str:
    """Returns the key by which compiled code finds an optimizer: text, as Dynamo makes symbols of numbers."""
    _skip_frames_of_eager()
    key = str(next(_numbers))
    _optimizers[key] = optimizer
    return key


def prepare_tracing(key: str) -> bool:
    """Brings up to date what traced code reads of an optimizer. True where it can be traced.

    Dynamo calls this while it traces; the compiled code has the result as a constant.
    """
    optimizer = _optimizers[key]
    _refresh(optimizer)
    return all(record.traceable for record in optimizer._memory.groups)


# As torch.compiler.assume_constant_result, which imports Dynamo.
prepare_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refresh(optimizer: Any) -> bool:
    """Updates the records for compiled code. Returns True if no constant of compiled code has changed."""
    memory, records = optimizer._memory, optimizer._records()
    groups = optimizer.param_groups
    if optimizer.capturable:
        for record in records:
            capturable.to_device(record)
    unchanged = all([record.prepare_tracing(optimizer.state) for record in records])
    measures, tensors = memory.measures, memory.tensors
    memory.measures = any(record.measures for record in records)
    found = [group[name] for group in groups for name in TENSORS if isinstance(group[name], Tensor)]
    if not same_items(found, tensors):
        memory.tensors, unchanged = found, False
    return unchanged and measures == memory.measures


def step_traced(optimizer: Any, loss: Any) -> None:
    """The step, while Dynamo traces it."""
    memory = optimizer._memory
    records = memory.groups
    gathered = [record.lists_of(record.params, [*record.states]) for record in records]
    if not any([lists.params for lists in gathered]):
        # Where a function reads param_groups, Dynamo marks the parameters and may lose gradients that
        # backward() leaves in the same function.
        raise RuntimeError(
            "step() is being compiled where no parameter has a gradient: read and set param_groups "
            "outside of compiled functions"
        )
    observed = optimizer._observe(records, gathered, loss, memory.measures)
    # Two numbers for each parameter that takes no step: its group and its position there.
    resting = [n for index, lists in enumerate(gathered) for i in lists.resting for n in (index, i)]
    coefs = [record.coefs for record in records]
    # What this refuses must find gradients enabled: compiled code does not undo no_grad() where it raises.
    torch.ops.schedulefree_cpp.advance_.default(memory.key, coefs, observed, memory.tensors, resting)
    with torch.no_grad():
        for index, (record, lists) in enumerate(zip(records, gathered, strict=True)):
            record.update(lists, optimizer.state)
            for i, _, state in lists.created:
                record.states[i] = state
            if memory.capturable:
                y, y_lo, _, z = lists.lists[:4]
                torch.ops.schedulefree_cpp.move_beta_.default(
                    memory.key, index, y, y_lo, z, lists.parts.get("z_lo", []), lists.resting
                )


@eager
def _advance(
    key: str,
    coefs: Sequence[Tensor],
    observed: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    resting: Sequence[int],
) -> None:
    """Advances the schedule of every group and fills its ``coefs``, when compiled code runs."""
    optimizer = _optimizers[key]
    optimizer._require_train_mode()
    memory = optimizer._memory
    known, before = memory.tensors, [*memory.groups]
    if not _refresh(optimizer) or not same_items(before, memory.groups):
        raise RuntimeError(
            "parameters, tensors, max_grad_norm, decay_at or inner_momentum of a group were replaced "
            "after a function that calls step() had been compiled; nothing was changed, and the next "
            "call goes by the new ones"
        )
    # What the compiled code has written into a hyperparameter reaches the group when the code ends.
    written = {id(own): given for own, given in zip(known, tensors, strict=True) if own is not given}
    for param_group in optimizer.param_groups if written else ():
        for name in TENSORS:
            if id(param_group[name]) in written:
                param_group[name].copy_(written[id(param_group[name])])
    groups = memory.groups
    if observed[2] is not None and optimizer._is_skipped(observed):
        for tensor in (*coefs, *(group.coefs for group in groups)):
            tensor.zero_()  # an operator takes no step where `take` is 0
        return
    rest: list[list[int]] = [[] for _ in groups]
    for index, i in zip(resting[::2], resting[1::2], strict=True):
        rest[index].append(i)
    counted = [
        len(positions) < len(group.params) or group.counts_at_rest(())
        for group, positions in zip(groups, rest, strict=True)
    ]
    steps = optimizer._next_steps(groups, observed, counted)
    for group, given, step, positions, takes in zip(groups, coefs, steps, rest, counted, strict=True):
        if not memory.capturable:
            group.store(step, optimizer.state, positions, takes)
        if given is not group.coefs:
            given.copy_(group.coefs)
    optimizer._keep_norm(observed)


@eager
def _move_beta(
    key: str,
    index: int,
    y: Sequence[Tensor],
    y_lo: Sequence[Tensor],
    z: Sequence[Tensor],
    z_lo: Sequence[Tensor],
    resting: Sequence[int],
) -> None:
    """Moves the parameters of a capturable group to its new beta, once compiled code has taken their step."""
    optimizer = _optimizers[key]
    record = optimizer._memory.groups[index]
    beta = record.beta()
    if beta == record.y_beta:
        return
    for swap, at in record.swaps_to(beta) if y else ():
        swap(y, y_lo, z, z_lo=z_lo, beta=at)
    record.change_beta(beta, optimizer.state, resting)


# Not for a CUDA graph that Inductor records: the schedule of one step would be replayed.
for _name, _arguments, _function in (
    ("advance_", "Tensor(a!)[] coefs, Tensor?[] observed, Tensor[] tensors, int[] resting", _advance),
    (
        "move_beta_",
        "int index, Tensor(a!)[] y, Tensor(b!)[] y_lo, Tensor[] z, Tensor[] z_lo, int[] resting",
        _move_beta,
    ),
):
    FRAGMENT.define(  # type: ignore[no-untyped-call]
        f"{_name}(str key, {_arguments}) -> ()", tags=(torch.Tag.cudagraph_unsafe,)
    )
    FRAGMENT.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    FRAGMENT.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"schedulefree_cpp::{_name}", lambda *_: None)
