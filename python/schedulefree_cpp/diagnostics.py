"""Checks of a run, on request."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from schedulefree_cpp._core import formats, sharded
from schedulefree_cpp._core.types import quoted_name

_SAMPLE = 4096


class Stalled(NamedTuple):
    """Shares of a parameter's elements that a step has not moved, though their gradients are not zero."""

    y: float
    """Of what the parameter holds in train mode, low half included."""
    z: float
    """Of the base iterate."""


@contextlib.contextmanager
def stalled_updates(optimizer: Any) -> Iterator[dict[str, Stalled]]:
    """Tells where a step does not move parameters, since updates are rounded away.

    An update that is smaller than half a unit in the last place of what it is added to is lost. Looks at up
    to 4096 elements of each parameter before and after the step within the ``with`` block, bit for bit: the
    cost is that of so many elements, and of waiting for the device. Training keeps its bits.

    Example::

        with stalled_updates(optimizer) as stalled:
            optimizer.step()
        worst = max(stalled, key=lambda name: stalled[name].z, default=None)

    Args:
        optimizer: any optimizer of this package, wrappers included.

    Yields:
        A dict that is filled when the block ends: a :class:`Stalled` for each parameter that took a step, by
        its name, or by its place where it has none. Parameters whose gradients are zero are left out, as are
        those of groups that round at random, where an element rests most of the time and moves far enough at
        others. Of a DTensor each process sees its own piece.
    """
    result: dict[str, Stalled] = {}
    states = getattr(optimizer, "_states", optimizer.state)
    groups = [(index, group, _steps_of(group)) for index, group in enumerate(optimizer.param_groups)]
    before = {
        p: _sampled(p, states.get(p, {}))
        for _, group, _ in groups
        for p in group["params"]
        if group.get("rounding", "nearest") == "nearest"
    }
    yield result
    for index, group, k in groups:
        if _steps_of(group) == k:
            continue  # no step, or one that was skipped
        for i, p in enumerate(group["params"]):
            if p.grad is None or p not in before:
                continue
            (grad,) = sharded.local_gradients([p.grad], [p])
            moving = _sample(grad) != 0
            count = int(moving.sum())
            if count:
                after = _sampled(p, states.get(p, {}))
                shares = [
                    int((moving & (a == b)).sum()) / count for a, b in zip(before[p], after, strict=True)
                ]
                name = quoted_name(group, i)[3:-2] or f"params[{i}] in parameter group {index}"
                result[name] = Stalled(*shares)


def _steps_of(group: dict[str, Any]) -> int:
    """The steps that a group has taken, also one of a wrapper."""
    return int(group.get("sf_k", group.get("k", 0)))


def _sample(t: Tensor) -> Tensor:
    """Up to :data:`_SAMPLE` elements of a tensor, evenly spaced."""
    flat = t.detach().reshape(-1)
    return flat[:: -(-max(len(flat), 1) // _SAMPLE)].clone()


def _sampled(p: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Elements of y and z with all their bits; before the first step z is the parameter."""

    def wide(t: Tensor, low: Tensor | None) -> Tensor:
        return formats.load(_sample(sharded.local(t)), None if low is None else _sample(sharded.local(low)))

    y = wide(p, state.get("y_lo"))
    return y, wide(state["z"], state.get("z_lo")) if "z" in state else y
