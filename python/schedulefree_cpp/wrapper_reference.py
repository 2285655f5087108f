"""The wrapper in plain torch, with ``x``, ``y`` and ``z`` in its state: where a variant begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from schedulefree_cpp import ops
from schedulefree_cpp._core import formats
from schedulefree_cpp._core.types import Nonfinite, State
from schedulefree_cpp._core.wrapped import Part, WrappedGroup
from schedulefree_cpp.wrapper import ScheduleFreeWrapper


class StoredGroup(WrappedGroup):
    """A group of a wrapper whose states hold ``x``, ``y`` and ``z``."""

    iterates: ClassVar[tuple[str, ...]] = ("x", "y", "z")
    exchanges: ClassVar[bool] = False

    def new_state(self, p: Tensor) -> State:
        """``x``, ``y`` and ``z`` before the first step."""
        dtype = formats.dtype_of(p)
        return {name: torch.empty_like(p, dtype=dtype).copy_(p).detach() for name in self.iterates}

    @torch.no_grad()
    def swap(self, all_state: Any, to_train: bool) -> None:
        """Has parameters hold ``y``, or ``x``."""
        self.follow_parameters(all_state, True)
        for p in self.group["params"]:
            state = all_state.get(p)
            if state:
                p.copy_(state["y" if to_train else "x"])

    def before_base_step(self, part: Part, coefs: Tensor) -> None:
        """Decays ``z``, which the base optimizer then steps as it is."""
        for p, z in zip(part.params, part.lists["z"], strict=True):
            if p.shape != z.shape:
                raise RuntimeError(
                    f"a parameter has shape {tuple(p.shape)}, expected that of its z, {tuple(z.shape)}"
                )
        lr, decay = (coefs[ops.COEFFICIENTS.index(name)] for name in ("lr", "weight_decay"))
        for y, z in zip(part.lists["y"], part.lists["z"], strict=True):
            z.sub_(lr * decay * y)

    def after_base_step(self, part: Part, coefs: Tensor) -> None:
        """Averages ``z`` into ``x``, and has parameters hold the ``y`` between the two."""
        c, beta = (coefs[ops.COEFFICIENTS.index(name)] for name in ("w", "beta"))
        for p, *iterates in zip(part.params, *(part.lists[name] for name in self.iterates), strict=True):
            x, y, z = iterates
            x += c * (z - x)
            _store_y(p, x, y, z, beta)

    def change_beta(self, beta: float, all_state: Any, positions: Sequence[int]) -> None:
        """Moves ``y`` to another beta."""
        for p in (self.group["params"][i] for i in positions):
            state = all_state.get(p)
            if state:
                _store_y(p, state["x"], state["y"], state["z"], beta)
        self.y_beta = beta


def _store_y(p: Tensor, x: Tensor, y: Tensor, z: Tensor, beta: Any) -> None:
    p.copy_(y.copy_(x + (1 - beta) * (z - x)))


class ScheduleFreeWrapperReference(ScheduleFreeWrapper):
    """`ScheduleFreeWrapper` that stores ``x``, ``y`` and ``z``, and lends ``z`` to the base optimizer.

    Its arguments are those of `ScheduleFreeWrapper`, in the order of ``schedulefree``.

    Example::

        import torch
        from schedulefree_cpp import ScheduleFreeWrapperReference

        weights = torch.nn.Parameter(torch.zeros(8))
        optimizer = ScheduleFreeWrapperReference(torch.optim.RMSprop([weights], lr=0.1))
        optimizer.train()
        for _ in range(100):
            optimizer.zero_grad()
            (weights - 1).square().sum().backward()
            optimizer.step()
        optimizer.eval()
        print(weights.mean().item())  # nearly 1
    """

    _group_type: ClassVar[type[WrappedGroup]] = StoredGroup

    def __init__(
        self,
        base: Optimizer,
        momentum: float = 0.9,
        weight_decay_at_y: float = 0.0,
        r: float = 0,
        weight_lr_power: float = 2,
        *,
        max_grad_norm: float | None = None,
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        """Checks the hyperparameters and adds the wrapper's entries to the base optimizer's groups."""
        more: dict[str, Any] = {"max_grad_norm": max_grad_norm, "nonfinite": nonfinite}
        super().__init__(base, weight_decay_at_y, momentum, weight_lr_power, r, **more)
