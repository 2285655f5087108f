"""What the state dicts of ``torch.distributed`` have no keys for, carried by those they have.

``torch.distributed.checkpoint`` reads exactly the keys that the loading optimizer has, which cannot know what
was saved; and a tensor must be of its parameter's shape, in the same pieces. So

- ``z`` of a parameter at ``x`` goes as float64, which rounds to the float32 that it is. The bits below say by
  how many units in the last place ``x_to_y_`` would miss the ``y`` that the parameter had;
- where a beta that is not the group's has built ``y``, ``scheduled_lr``, which nothing reads, goes as a tuple
  ``(scheduled_lr, beta, ((position, beta), ...))`` with the parameters that have another one still.

Upstream's classes load both.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from schedulefree_cpp import _fallback, ops
from schedulefree_cpp._sharded import local

_PACKAGES = ("torch.distributed.checkpoint.", "torch.distributed.fsdp.", "torch.distributed.optim.")

# Functions in them that take a step without closure only to see the state.
_PROBES = ("_init_optim_state", "init_state")

# State beside z that is float32 where z is.
MOMENTS = ("exp_avg_sq", "exp_avg", "x", "y")

# A miss has its sign in the lowest bit, and so many bits: fewer than half a unit in the last place of z.
_MISS_BITS = 28


def _called_by(functions: tuple[str, ...] = ()) -> bool:
    frame = sys._getframe(1)
    while (caller := frame.f_back) is not None:
        frame = caller
        named = not functions or frame.f_code.co_name in functions
        if named and f"{frame.f_globals.get('__name__', '')}.".startswith(_PACKAGES):
            return True
    return False


def is_distributed() -> bool:
    """Whether ``torch.distributed`` asks, which has its own idea of what a state dict may hold."""
    return _called_by()


def is_probe() -> bool:
    """Whether ``torch.distributed`` asks for a step only to see the state. It must not count."""
    return _called_by(_PROBES)


# ---- misses in z ---------------------------------------------------------------------------------------


def _order(value: Tensor) -> Tensor:
    """Consecutive integers for consecutive float32."""
    bits = value.contiguous().view(torch.int32).long()
    return torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits)


def _from_order(order: Tensor) -> Tensor:
    bits = torch.where(order < 0, (-1 - order) - 0x80000000, order)
    return bits.to(torch.int32).view(torch.float32)


def _back(p: Tensor, y_lo: Tensor | None, z: Tensor, at: Tensor, beta: float) -> Tensor:
    """Where `x_to_y_` takes some elements of a parameter, in float32."""
    y = local(p).flatten()[at]
    lo = [] if y_lo is None else [local(y_lo).flatten()[at]]
    ops.x_to_y_([y], lo, [local(z).flatten()[at]], beta=beta)
    return _fallback._load(y, lo[0] if lo else None)


@torch.no_grad()
def widened(p: Tensor, state: dict[str, Any], kept: tuple[Tensor, Tensor] | None, beta: float) -> Tensor:
    """``z`` in float64, with what the swap to ``x`` has kept.

    Args:
        p: a parameter that is at ``x``.
        state: its state.
        kept: positions and values of elements of ``y``.
        beta: what built ``y``.
    """
    z: Tensor = state["z"]
    wide = torch.empty_like(z, dtype=torch.float64).copy_(z)
    if kept is not None:
        at, value = kept
        miss = _order(value.float()) - _order(_back(p, state.get("y_lo"), z, at, beta))
        code = torch.where(miss < 0, -1 - 2 * miss, 2 * miss)
        piece = local(wide)
        flat = piece.flatten()
        here = flat[at]
        fits = (code < 2**_MISS_BITS) & here.isfinite()
        flat[at] = (here.view(torch.int64) + torch.where(fits, code, 0)).view(torch.float64)
        piece.copy_(flat.view(piece.shape))
    return wide


@torch.no_grad()
def misses(wide: Tensor, z: Tensor) -> tuple[Tensor, Tensor] | None:
    """Positions and misses that are in a ``z`` of float64; None for none."""
    flat = local(wide).flatten()
    code = flat.view(torch.int64) - local(z).flatten().double().view(torch.int64)
    # What was double from the start may hold anything.
    code[(code < 0) | (code >= 2**_MISS_BITS) | ~flat.isfinite()] = 0
    at = code.nonzero().flatten()
    if not len(at):
        return None
    found = code[at]
    return at, torch.where(found % 2 == 1, -((found + 1) // 2), found // 2)


@torch.no_grad()
def to_kept(p: Tensor, state: dict[str, Any], at: Tensor, miss: Tensor, beta: float) -> Tensor:
    """The values of ``y`` at positions, from where ``x_to_y_`` misses them."""
    order = _order(_back(p, state.get("y_lo"), state["z"], at, beta)) + miss
    return _from_order(order.clamp(-(2**31), 2**31 - 1)).double()


# ---- betas in scheduled_lr -----------------------------------------------------------------------------


def with_betas(scheduled_lr: float, beta: float | None, own: list[tuple[int, float]]) -> Any:
    """A group's ``scheduled_lr`` with the betas that built ``y``, if there is any to tell.

    Args:
        scheduled_lr: the value alone.
        beta: the group's, if it is not the one that its hyperparameters tell.
        own: positions and betas of parameters that have another one.
    """
    return scheduled_lr if beta is None and not own else (scheduled_lr, beta, tuple(own))


def betas_of(scheduled_lr: Any) -> tuple[float, float | None, list[tuple[int, float]]]:
    """The arguments of :func:`with_betas`, from its result."""
    if not isinstance(scheduled_lr, tuple | list):
        return scheduled_lr, None, []
    value, beta, own = scheduled_lr
    return value, beta, [(int(position), float(b)) for position, b in own]
