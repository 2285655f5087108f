"""Two modes: parameters at ``y`` for training, at the average ``x`` for evaluation."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from schedulefree_cpp._core import formats, sharded
from schedulefree_cpp._core.compiled import eager
from schedulefree_cpp._core.interrupts import Uninterrupted
from schedulefree_cpp._core.samples import Samples, check_samples, trains
from schedulefree_cpp._core.types import ParamGroup, read_values


@dataclass
class Memory:
    """The data of an optimizer beside its groups and state.

    One object for the life of an optimizer, changed in place: trainers put optimizers behind proxies that
    share the attributes of the optimizer but not assignments to them.
    """

    # Samples of the parameters that belong to a loaded state, until the parameters are first used.
    expected: Samples | None = None
    # True after a first step that only made the state (_is_probe), until the next step.
    probed: bool = False
    # True once a group has held a torch.nn.Parameter.
    had_parameters: bool = False
    # True after a step that was refused: a parameter may have moved from its state.
    moved: bool = False
    # The norm of all gradients in the last step that measured it.
    grad_norm: Tensor | None = None
    # Read through _records(), which follows param_groups.
    groups: list[Any] = field(default_factory=list)
    # An iteration in which only some parameters have stepped (backward.py).
    iteration: Any = None
    # What the wrapper has no use for:
    key: str = ""  # by which compiled code finds the optimizer
    # Read by compiled code: hyperparameters that are tensors, and whether a step needs the norm of gradients.
    tensors: list[Tensor] = field(default_factory=list)
    measures: bool = False
    capturable: bool = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickle, which may lack what came later."""
        self.__init__()  # type: ignore[misc]
        vars(self).update(state)


def _is_zero(value: object) -> bool:
    """Also False for a non-number; the step then raises, naming it."""
    return isinstance(value, (Real, Tensor)) and float(value) == 0


def holds_parameters(group: ParamGroup) -> bool:
    """True where a group holds a ``torch.nn.Parameter``, not only other tensors."""
    return torch.nn.Parameter in map(type, group["params"]) or any(
        isinstance(p, torch.nn.Parameter) for p in group["params"]
    )


_entries_of = attrgetter("entries")


class TwoModeOptimizer(Optimizer):
    """An optimizer whose parameters hold ``y`` in train mode and ``x`` in eval mode; not used directly."""

    _memory: Memory

    # ---- what a subclass says -------------------------------------------------------------------------

    def _new_record(self, group: ParamGroup) -> Any:
        """The record of a parameter group that has none yet."""
        raise NotImplementedError

    def _require_whole_iteration(self, what: str) -> None:
        """Raises RuntimeError where only some parameters have taken the step of an iteration."""
        if self._memory.iteration is not None:
            raise RuntimeError(
                f"{what} was called between step_parameter() and the step() that ends the iteration: some "
                "parameters have taken the step and others have not. Call optimizer.step() first."
            )

    @property
    def _states(self) -> Any:
        """The state of each parameter, by the names that the fused classes have for its entries."""
        return self.state

    # ---- groups ---------------------------------------------------------------------------------------

    def _records(self) -> list[Any]:
        """The record of each parameter group, as ``param_groups`` is now."""
        groups, records = self.param_groups, self._memory.groups
        if len(groups) != len(records) or not all(map(is_, map(_entries_of, records), groups)):
            known = {id(record.entries): record for record in records}
            records[:] = [known.get(id(group)) or self._new_record(group) for group in groups]
        return records

    # ---- modes ----------------------------------------------------------------------------------------

    @eager
    def train(self, mode: bool = True) -> None:
        """Sets the parameters to ``y``, where gradients are taken. Idempotent.

        After `eval` the parameters are what they were before it, bit for bit; on a device without
        kernels, those of float64 may lose their last bit. State follows parameters that were moved to another
        device or dtype.

        Args:
            mode: ``False`` means `eval`, as in ``torch.nn.Module.train``.

        Raises:
            RuntimeError: if a state dict was loaded that belongs to parameters in the other mode, or a state
                has another shape than its parameter; all parameters are then what they were.
        """
        self._set_mode(bool(mode))

    @eager
    def eval(self) -> None:
        """Sets the parameters to the average ``x``, which is to be evaluated and saved. Idempotent."""
        if self._memory.had_parameters and not any(map(holds_parameters, self.param_groups)):
            warnings.warn(
                "eval() switches the tensors that this optimizer holds now, and the parameters it was made "
                "with stay at y: a trainer has replaced them by copies. With DeepSpeed call eval(engine) and "
                "train(engine) of schedulefree_cpp.integrations.deepspeed.",
                RuntimeWarning,
                stacklevel=3,
            )
        self._set_mode(False)

    def _set_mode(self, train: bool) -> None:
        memory, records = self._memory, self._records()
        if memory.iteration is not None:
            self._require_whole_iteration("train() or eval()")
        if memory.expected is not None:
            self._check_samples(records)
        switched: list[Any] = []
        try:
            for record in records:
                if bool(record.group.get("train_mode", record.at_y)) != train:
                    self._switch(record, train)
                    switched.append(record)
                else:
                    record.follow_parameters(self._states, memory.moved)
        except BaseException:
            for record in reversed(switched):
                self._switch(record, not train)
            raise
        memory.moved = False

    def _switch(self, record: Any, to_train: bool) -> None:
        with Uninterrupted():
            if not self._memory.probed:
                record.swap(self._states, to_train)
            if "train_mode" in record.group:
                record.group["train_mode"] = to_train
            else:
                record.at_y = to_train

    @eager
    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the parameters are ``x``; afterwards they are bit for bit what they were.

        Example::

            with optimizer.averaged():
                validate(model)
        """
        modes = [*map(trains, self._records())]
        try:
            self.eval()
            yield
        finally:
            records = self._records()
            # A group that was added inside takes the mode of the first.
            modes += modes[:1] * (len(records) - len(modes))
            for record, trained in zip(records, modes, strict=True):
                if trained and not trains(record):
                    self._switch(record, True)

    def averaged_state_dict(
        self, model: torch.nn.Module, *, dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        """The model's state dict with ``x`` in place of its parameters, in either mode.

        The parameters are ``x`` while it is made, as within `averaged`, and then what they were.

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
                    low = self._states.get(value, {}).get("y_lo")
                    kept[key] = formats.load(value.detach(), low).to(dtype, copy=True)
                elif isinstance(value, Tensor):
                    kept[key] = value.detach().clone()
            return kept

    def _check_samples(self, records: Sequence[Any]) -> None:
        """Refuses parameters that are at ``x`` where the loaded state says ``y``, or the reverse."""
        if self._memory.expected is not None:
            check_samples(records, self._memory.expected)
            self._memory.expected = None

    def _require_train_mode(self) -> None:
        records = self._records()
        self._check_samples(records)
        for index, record in enumerate(records):
            if not trains(record):
                raise RuntimeError(
                    f"step() was called while parameter group {index} is in eval mode, where the "
                    "parameters are the average x, and not in train mode. Call optimizer.train() before "
                    "training and optimizer.eval() before evaluating or saving."
                )

    def _forget_probe(self) -> None:
        self.state.clear()  # the parameters may have been loaded since
        self._memory.probed = False

    def _is_probe(self) -> bool:
        """True for a first step that only makes the state, so that its entries can be seen.

        ``torch.distributed.checkpoint`` takes one before it saves or loads, in either mode, with a learning
        rate of 0 in every group and gradients of zeros. Such a step is not counted.
        """
        if self.state or not all(_is_zero(group["lr"]) for group in self.param_groups):
            return False
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        grads = [sharded.local(p.grad) for p in params]

        def nonzeros(positions: list[int]) -> Tensor:
            counts = [torch.count_nonzero(grads[i]) for i in positions] or [torch.zeros((), device="cpu")]
            return torch.stack([count.to(counts[0].device) for count in counts]).sum()

        return not any(read_values(sharded.all_reduced(params, nonzeros)))
