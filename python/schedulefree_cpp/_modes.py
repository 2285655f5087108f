"""Two modes: parameters at ``y`` for training, at the average ``x`` for evaluation."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.optim.optimizer import Optimizer

from schedulefree_cpp import _formats, _sharded, _state_dict
from schedulefree_cpp._interrupts import Uninterrupted
from schedulefree_cpp._traced import eager

Group: TypeAlias = dict[str, Any]
State: TypeAlias = dict[str, Any]
Loss = TypeVar("Loss")

MOVED = "A parameter has moved since its state was made: optimizer.train() moves the state along"


@dataclass
class Memory:
    """The data of an optimizer beside its groups and state.

    One object for the life of an optimizer, changed in place: trainers put optimizers behind proxies that
    share the attributes of the optimizer but not assignments to them.
    """

    # Samples of the parameters that belong to a loaded state, until the parameters are first used.
    expected: _state_dict.Samples | None = None
    # True after a first step that only made the state (_is_probe), until the next step.
    probed: bool = False
    # True once a group has held a torch.nn.Parameter.
    had_parameters: bool = False


def has_values(t: Tensor) -> bool:
    """False for a meta or fake tensor, which has a shape and a dtype only."""
    return not (t.is_meta or isinstance(t, FakeTensor))


def holds_parameters(group: Group) -> bool:
    """True where a group holds a ``torch.nn.Parameter``, not only other tensors."""
    return any(isinstance(p, torch.nn.Parameter) for p in group["params"])


def _is_zero(value: object) -> bool:
    """False for what is no number, too, which a step then refuses by name."""
    return isinstance(value, (Real, Tensor)) and float(value) == 0


def values(t: Tensor) -> list[float]:
    """The elements of a tensor, read by the host; zeros where it has none."""
    result: list[float] = t.reshape(-1).tolist() if has_values(t) else [0.0] * t.numel()
    return result


class TwoModeOptimizer(Optimizer):
    """An optimizer whose parameters hold ``y`` in train mode and ``x`` in eval mode; not used directly."""

    _memory: Memory

    # ---- what a subclass says -------------------------------------------------------------------------

    def _trains(self, group: Group) -> bool:
        """True in train mode."""
        return bool(group["train_mode"])

    def _set_mode(self, group: Group, train: bool) -> None:
        group["train_mode"] = train

    def _swap(self, index: int, group: Group, to_train: bool) -> None:
        """Changes the parameters of a group from ``x`` to ``y``, or from ``y`` to ``x``."""
        raise NotImplementedError

    def _y_beta(self, index: int) -> float:
        """The interpolation weight that built the current y of a group."""
        raise NotImplementedError

    def _move_state(self, group: Group) -> None:
        """Moves and casts the state of a group to where its parameters are."""

    def _follow_groups(self) -> None:
        """Notices groups that users have added to ``param_groups``, removed or put in another order."""

    def _require_closed_step(self, what: str) -> None:
        """Raises RuntimeError where only some parameters have taken the step of an iteration."""

    # ---- modes ----------------------------------------------------------------------------------------

    @eager
    def train(self, mode: bool = True) -> None:
        """Sets the parameters to ``y``, where gradients are taken. Idempotent.

        After :meth:`eval` the parameters are what they were before it, bit for bit; on a device without
        kernels, those of float64 may lose their last bit. State follows parameters that were moved to another
        device or dtype.

        Args:
            mode: ``False`` means :meth:`eval`, as in ``torch.nn.Module.train``.

        Raises:
            RuntimeError: if a state dict was loaded that belongs to parameters in the other mode, or a state
                has another shape than its parameter; all parameters are then what they were.
        """
        self._require_closed_step("train() or eval()")
        self._follow_groups()
        self._check_samples()
        switched: list[int] = []
        try:
            for index, group in enumerate(self.param_groups):
                if self._trains(group) != mode:
                    self._switch(index, group, mode)
                    switched.append(index)
                else:
                    self._move_state(group)
        except BaseException:
            for index in reversed(switched):
                self._switch(index, self.param_groups[index], not mode)
            raise

    def eval(self) -> None:
        """Sets the parameters to the average ``x``, which is to be evaluated and saved. Idempotent."""
        self._warn_of_copies()
        self.train(False)

    @eager
    def _warn_of_copies(self) -> None:
        """Warns where a trainer has put tensors of its own in the place of a module's parameters."""
        if self._memory.had_parameters and not any(map(holds_parameters, self.param_groups)):
            warnings.warn(
                "eval() switches the tensors that this optimizer holds now, and the parameters it was made "
                "with stay at y: a trainer has replaced them by copies. With DeepSpeed call eval(engine) and "
                "train(engine) of schedulefree_cpp.integrations.deepspeed.",
                RuntimeWarning,
                stacklevel=4,
            )

    def _switch(self, index: int, group: Group, to_train: bool) -> None:
        with Uninterrupted():
            if not self._memory.probed:
                self._swap(index, group, to_train)
            self._set_mode(group, to_train)

    @eager
    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the parameters are ``x``; afterwards they are bit for bit what they were.

        Example::

            with optimizer.averaged():
                validate(model)
        """
        modes = [self._trains(group) for group in self.param_groups]
        try:
            self.eval()
            yield
        finally:
            # A group that was added inside takes the mode of the first.
            modes += modes[:1] * (len(self.param_groups) - len(modes))
            for index, (group, trained) in enumerate(zip(self.param_groups, modes, strict=True)):
                if trained and not self._trains(group):
                    self._switch(index, group, True)

    def averaged_state_dict(
        self, model: torch.nn.Module, *, dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        """The model's state dict with ``x`` in place of its parameters, in either mode.

        The parameters are ``x`` while it is made, as within :meth:`averaged`, and then what they were.

        Args:
            model: a module, wrapped or not, that holds parameters of this optimizer.
            dtype: the dtype of all floating-point tensors; ``None`` keeps theirs. In float32, parameters of
                16 bits are ``x`` with all its digits.

        Returns:
            What ``model.state_dict()`` returns in eval mode, with copies of all tensors.
        """
        with self.averaged():
            if dtype is None:
                return copy.deepcopy(model.state_dict())
            kept = model.state_dict(keep_vars=True)
            for key, value in kept.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    low = self.state.get(value, {}).get("y_lo")
                    kept[key] = _formats.load(value.detach(), low).to(dtype, copy=True)
                elif isinstance(value, Tensor):
                    kept[key] = value.detach().clone()
            return kept

    def _require_train_mode(self) -> None:
        self._check_samples()
        for index, group in enumerate(self.param_groups):
            if not self._trains(group):
                raise RuntimeError(
                    f"step() was called while parameter group {index} is in eval mode, where the "
                    "parameters are the average x. Call optimizer.train() before training and "
                    "optimizer.eval() before evaluating or saving."
                )

    def _check_samples(self) -> None:
        """Refuses parameters that are at ``x`` where the loaded state says ``y``, or the reverse."""
        if self._memory.expected is not None:
            _state_dict.check_samples(self, self._memory.expected)
            self._memory.expected = None

    def _is_probe(self) -> bool:
        """True for a first step that only makes the state, so that its entries can be seen.

        ``torch.distributed.checkpoint`` takes one before it saves or loads, in either mode, with a learning
        rate of 0 in every group and gradients of zeros. Such a step is not counted.
        """
        if self.state or not all(_is_zero(group["lr"]) for group in self.param_groups):
            return False
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = [_sharded.local(p.grad) for p in params]

        def nonzeros(positions: list[int]) -> Tensor:
            counts = [torch.count_nonzero(grads[i]) for i in positions] or [torch.zeros((), device="cpu")]
            return torch.stack([count.to(counts[0].device) for count in counts]).sum()

        return not any(values(_sharded.total(params, nonzeros)))
