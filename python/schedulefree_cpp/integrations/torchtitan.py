"""Schedule-free optimizers in torchtitan's container of optimizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import schedulefree_cpp

if TYPE_CHECKING:

    class OptimizersContainer(torch.optim.Optimizer):
        """What is used of torchtitan's, which has no types."""

        optimizers: list[Any]

        class Config:
            """The configuration of a container."""

        @staticmethod
        def _resolve_optimizer_factory(name: str) -> Callable[..., Any]: ...

else:
    from torchtitan.components.optimizer import OptimizersContainer

NAMES = {
    cls.__name__: cls
    for cls in (
        schedulefree_cpp.AdamWScheduleFree,
        schedulefree_cpp.AdamWScheduleFreePaper,
        schedulefree_cpp.RAdamScheduleFree,
        schedulefree_cpp.SGDScheduleFree,
    )
}
"""The classes that a configuration may name, whose step needs neither a closure nor the loss."""


class ScheduleFreeOptimizersContainer(OptimizersContainer):
    """torchtitan's container, which knows the names of `NAMES` and has both modes.

    Example::

        optimizer=ScheduleFreeOptimizersContainer.Config(
            param_groups=[
                ParamGroupConfig(
                    pattern=r".*", optimizer_name="AdamWScheduleFree", optimizer_kwargs={"lr": 0.0025}
                )
            ]
        )
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """As torchtitan's."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Any]:
        return NAMES.get(name) or OptimizersContainer._resolve_optimizer_factory(name)

    def train(self, mode: bool = True) -> None:
        """Sets the parameters to ``y``. Idempotent; optimizers without modes are left alone.

        Args:
            mode: ``False`` means `eval`.
        """
        for optimizer in self.optimizers:
            if type(optimizer) in NAMES.values():
                optimizer.train(mode)

    def eval(self) -> None:
        """Sets the parameters to the average ``x``. Idempotent; optimizers without modes are left alone."""
        self.train(False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a flattened state dict, which says nothing of ``capturable``: that stays as it is."""
        kept = {
            f"param_groups.{name}.capturable": group["capturable"]
            for optimizer in self.optimizers
            if type(optimizer) in NAMES.values()
            for group in optimizer.param_groups
            if "capturable" in group
            for name in group["param_names"]
        }
        super().load_state_dict(kept | state_dict)
