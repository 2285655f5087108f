"""DTensors: the operators get the piece that this process holds.

This module does not import ``torch.distributed`` at load time: a process that has a DTensor has imported it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from schedulefree_cpp._core.types import PLAIN_TYPES


def is_dtensor(t: Tensor) -> bool:
    """True for a DTensor, of which each process of a mesh holds a piece."""
    return type(t) not in PLAIN_TYPES and hasattr(t, "device_mesh") and hasattr(t, "placements")


def local(t: Tensor) -> Tensor:
    """The piece of a DTensor that this process holds, in the same memory; any other tensor as it is."""
    return local_list([t])[0] if is_dtensor(t) else t


@torch.no_grad()
def local_list(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`local` of each."""
    return [_piece(t) if is_dtensor(t) else t for t in tensors]


@torch.no_grad()
def local_gradients(grads: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """The pieces of gradients that this process holds, placed like their parameters.

    A collective call where the placements differ, as for a gradient that has not been summed (``Partial``).
    """
    pieces = []
    for grad, p in zip(grads, params, strict=True):
        if not is_dtensor(grad):
            pieces.append(grad)
            continue
        if grad.placements != p.placements:  # type: ignore[attr-defined]
            grad = grad.redistribute(placements=p.placements)  # type: ignore[attr-defined]
        pieces.append(_piece(grad))
    return pieces


def _piece(t: Tensor) -> Tensor:
    """The piece of a DTensor. With gradients enabled it would be a node of autograd's graph."""
    piece: Tensor = t.to_local()  # type: ignore[attr-defined]
    return piece if type(piece) in PLAIN_TYPES or not hasattr(piece, "wait") else piece.wait()


def placed_like(p: Tensor, value: Tensor) -> Tensor:
    """A tensor placed like a parameter: of a whole one, this process takes its piece."""
    if not is_dtensor(p) or is_dtensor(value) or value.shape != p.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(p.device), mesh, placements, src_data_rank=None)


@torch.no_grad()
def all_gathered(piece: Tensor, p: Tensor) -> Tensor:
    """Gathers the whole of a tensor that is placed like ``p``, of which this process holds ``piece``.

    A collective call for a DTensor.
    """
    if not is_dtensor(p):
        return piece
    from torch.distributed.tensor import DTensor

    mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
    result: Tensor = DTensor.from_local(
        piece, mesh, placements, run_check=False, shape=p.shape, stride=p.stride()
    ).full_tensor()
    return result


def all_reduced(params: Sequence[Tensor], sums: Callable[[list[int]], Tensor]) -> Tensor:
    """Sums over all elements of all parameters, every element once; the same in every process.

    A collective call where there are DTensors.

    Args:
        params: the parameters.
        sums: what this process holds for the parameters at some positions, as a new tensor.
    """
    parts: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        key: Any = None
        if is_dtensor(p):
            mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
            key = (mesh, tuple(d for d, placed in enumerate(placements) if not placed.is_replicate()))
        parts.setdefault(key, []).append(i)
    result: Tensor | None = None
    for key, positions in parts.items():
        part = sums(positions)
        for dim in key[1] if key is not None else ():
            torch.distributed.all_reduce(part, group=key[0].get_group(dim))
        result = part if result is None else result + part.to(result.device)
    return sums([]) if result is None else result
