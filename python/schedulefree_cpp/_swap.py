"""The swaps between ``y`` and ``x``, and what they keep so that the way back is exact."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from schedulefree_cpp import ops
from schedulefree_cpp._modes import State

# State of a parameter in eval mode: elements of y that x_to_y_ alone would not bring back.
KEPT_AT, KEPT = "y_kept_at", "y_kept"


def to_x(
    y: Sequence[Tensor], y_lo: Sequence[Tensor], z: Sequence[Tensor], states: Sequence[State], *, beta: float
) -> None:
    """Takes parameters from ``y``, built by ``beta``, to ``x``."""
    at, value, count = ops.y_to_x_keep_(y, y_lo, z, beta=beta)
    if not len(at):
        return
    begin = 0
    for state, n in zip(states, count.tolist(), strict=True):
        if n:
            state[KEPT_AT] = at[begin : begin + n].clone()
            state[KEPT] = value[begin : begin + n].clone()
            begin += n


def to_y(
    y: Sequence[Tensor],
    y_lo: Sequence[Tensor],
    z: Sequence[Tensor],
    states: Sequence[State],
    *,
    beta: float,
    before: float,
) -> None:
    """Takes parameters from ``x`` to ``y``: to the very one they left if ``beta`` built that ``before``."""
    ops.x_to_y_(y, y_lo, z, beta=beta)
    kept = [i for i, state in enumerate(states) if KEPT in state]
    if kept and beta == before:
        ops.restore_y_(
            [y[i] for i in kept],
            [y_lo[i] for i in kept] if y_lo else [],
            [z[i] for i in kept],
            [states[i][KEPT_AT] for i in kept],
            [states[i][KEPT] for i in kept],
            beta=beta,
        )
    for i in kept:
        del states[i][KEPT_AT], states[i][KEPT]
