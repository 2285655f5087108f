"""Steps within ``backward()``."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.utils.hooks import RemovableHandle


class Stepping(Protocol):
    """An optimizer that can step one parameter alone."""

    param_groups: list[dict[str, Any]]

    def step_parameter(self, p: Tensor) -> None:
        """Takes the step of one parameter."""


class BackwardHandle:
    """What :meth:`schedulefree_cpp.AdamWScheduleFree.step_in_backward` returns; also a context manager."""

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
        """Calls :meth:`remove`."""
        self.remove()


def step_in_backward(optimizer: Stepping) -> BackwardHandle:
    """Has every parameter take its step, and lose its gradient, as soon as the gradient is complete."""
    reference = weakref.ref(optimizer)  # or parameters and optimizer would keep each other alive

    def take(p: Tensor) -> None:
        optimizer = reference()
        if optimizer is not None:
            optimizer.step_parameter(p)
            p.grad = None

    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    return BackwardHandle([p.register_post_accumulate_grad_hook(take) for p in params])
