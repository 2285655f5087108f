"""The swaps between ``y`` and ``x``, and what they keep so that the way back is exact.

What a swap has kept stays in one piece for all its parameters. Only where a checkpoint is made does it go to
their state, parameter by parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from schedulefree_cpp import ops
from schedulefree_cpp._modes import State

# Entries in the state of a parameter in eval mode: positions and values of those elements of y that x_to_y_
# alone would not bring back.
KEPT_AT, KEPT = "y_kept_at", "y_kept"


class Kept(NamedTuple):
    """What ``y_to_x_keep_`` returned for some parameters."""

    params: list[Tensor]
    at: Tensor
    value: Tensor
    counts: Tensor

    def to_states(self, states: Sequence[State]) -> None:
        """Goes to the parameters' states."""
        begin = 0
        for state, n in zip(states, self.counts.tolist(), strict=True):
            if n:
                state[KEPT_AT] = self.at[begin : begin + n].clone()
                state[KEPT] = self.value[begin : begin + n].clone()
                begin += n

    @classmethod
    def from_states(cls, params: list[Tensor], states: Sequence[State]) -> Kept | None:
        """Comes back from the parameters' states, which then have it no more; None if there is nothing."""
        count = [len(state.get(KEPT, ())) for state in states]
        if not any(count):
            return None
        at = torch.cat([state.pop(KEPT_AT) for state in states if KEPT in state])
        value = torch.cat([state.pop(KEPT) for state in states if KEPT in state])
        return cls(params, at, value, torch.tensor(count, device=at.device))


def to_x(
    params: list[Tensor], y: Sequence[Tensor], y_lo: Sequence[Tensor], z: Sequence[Tensor], *, beta: float
) -> Kept | None:
    """Takes parameters from ``y``, built by ``beta``, to ``x``. Returns what is kept of them, if anything."""
    kept = Kept(params, *ops.y_to_x_keep_(y, y_lo, z, beta=beta))
    return kept if len(kept.at) else None


def to_y(
    y: Sequence[Tensor], y_lo: Sequence[Tensor], z: Sequence[Tensor], kept: Kept | None, *, beta: float
) -> None:
    """Takes parameters from ``x`` to ``y``: to the very one they left if ``beta`` is the same."""
    if kept is None:
        ops.x_to_y_(y, y_lo, z, beta=beta)
    else:
        ops.x_to_y_restore_(y, y_lo, z, kept.at, kept.value, kept.counts, beta=beta)
