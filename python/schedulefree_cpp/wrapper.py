"""Schedule-Free around any other optimizer, which then steps ``z``.

Entries of the wrapper have names that begin with ``sf_``, and stand beside the base optimizer's in its groups
and states: schedulers, trainers and checkpoints then see one optimizer, and no name can be both's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from schedulefree_cpp import ops
from schedulefree_cpp._core import capturable, sharded, wrapped
from schedulefree_cpp._core import nonfinite as nonfinite_
from schedulefree_cpp._core.compiled import eager
from schedulefree_cpp._core.group import require_shapes
from schedulefree_cpp._core.hyperparameters import (
    SCHEDULE,
    check_group,
    check_number,
    check_parameters,
    drop_duplicates,
    refuse_known_parameters,
    store_plain_numbers,
    store_plain_schedule,
)
from schedulefree_cpp._core.interrupts import Uninterrupted
from schedulefree_cpp._core.library import _C
from schedulefree_cpp._core.modes import Memory, TwoModeOptimizer, holds_parameters
from schedulefree_cpp._core.samples import take_samples
from schedulefree_cpp._core.state_dict import own_entry
from schedulefree_cpp._core.types import Loss, Nonfinite, ParamGroup
from schedulefree_cpp._core.wrapped import PREFIX, Exchange, Own, OwnStates, Part, WrappedGroup
from schedulefree_cpp.closure import ClosureForm

_SETTINGS = ("momentum", "weight_decay_at_y", "weight_lr_power", "r", "max_grad_norm", "nonfinite")
_CHECKED = (*_SETTINGS, "momentum_of_y")


T = TypeVar("T")


class _Setting(Generic[T]):
    """An attribute for a setting of the first group; setting it sets that of all."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, optimizer: Any, owner: Any = None) -> T:
        return self if optimizer is None else optimizer.param_groups[0][PREFIX + self.name]  # type: ignore[return-value]

    def __set__(self, optimizer: Any, value: T) -> None:
        check_group({self.name: value}, _SETTINGS, "", {})
        for group in optimizer.param_groups:
            group[PREFIX + self.name] = value


class ScheduleFreeWrapper(TwoModeOptimizer):
    """Makes any optimizer schedule-free (Defazio et al., arXiv 2405.15682).

    Groups and state are the base optimizer's, with the wrapper's entries beside its own, such as ``sf_z`` in
    a state and ``sf_momentum`` in a group. For the base optimizer's step the parameters hold ``z``; those of
    16 bits are replaced by float32 ones. Prefer the classes that are fused, where there is one.

    Example::

        import torch
        from schedulefree_cpp import ScheduleFreeWrapper

        model = torch.nn.Linear(8, 1)
        base = torch.optim.RMSprop(model.parameters(), lr=0.01)
        optimizer = ScheduleFreeWrapper(base, weight_decay_at_y=0.01)
        for epoch in range(3):
            optimizer.train()
            for inputs in torch.randn(100, 16, 8):
                optimizer.zero_grad()
                (model(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
                optimizer.step()
            optimizer.eval()
            print(model(torch.ones(1, 8)).item())  # nearly 8

    Args:
        base: the optimizer, best without momentum of its own. Its ``lr`` is the learning rate.
        weight_decay_at_y: decay coefficient, evaluated at ``y``, >= 0. The base optimizer's own weight decay
            is evaluated at ``z``. Above 0, a step keeps a copy of ``z``.
        momentum: interpolation weight of ``y = momentum*x + (1-momentum)*z``, in (0, 1].
        weight_lr_power: averaging weights grow as ``lr_max**weight_lr_power``.
        r: averaging weights grow as ``step**r``.
        max_grad_norm: clips the norm of all gradients, which are scaled in place as by
            ``torch.nn.utils.clip_grad_norm_``; ``None`` for no clipping.
        nonfinite: what a step does where a gradient is not finite. ``"propagate"`` takes it, ``"skip"``
            leaves everything as it was, the base optimizer too, ``"raise"`` does so and names the parameter.
            Of a closure that the base optimizer calls several times, the first call decides.

    Groups hold all but ``base`` under names that begin with ``sf_``, where they may be moved between steps;
    attributes of the optimizer move them in all groups.

    Raises:
        TypeError: if ``base`` is no ``torch.optim.Optimizer``, a schedule-free one, or one whose state dict
            has another form than torch's.
        ValueError: naming the hyperparameter, its value and its domain, or a group without ``lr``.
    """

    base: Optimizer

    _group_type: ClassVar[type[WrappedGroup]] = WrappedGroup

    momentum: _Setting[float] = _Setting("momentum")
    weight_decay_at_y: _Setting[float] = _Setting("weight_decay_at_y")
    weight_lr_power: _Setting[float] = _Setting("weight_lr_power")
    r: _Setting[float] = _Setting("r")
    max_grad_norm: _Setting[float | None] = _Setting("max_grad_norm")
    nonfinite: _Setting[Nonfinite] = _Setting("nonfinite")

    def __init__(
        self,
        base: Optimizer,
        weight_decay_at_y: float = 0.0,
        momentum: float = 0.9,
        weight_lr_power: float = 2,
        r: float = 0,
        *,
        max_grad_norm: float | None = None,
        nonfinite: Nonfinite = "propagate",
    ) -> None:
        """Checks the hyperparameters and adds the wrapper's entries to the base optimizer's groups."""
        given = locals()
        if not isinstance(base, Optimizer):
            raise TypeError(f"Invalid base: expected a torch.optim.Optimizer, got {type(base)}")
        schedules = ({"weight_sum", "weight_lr_power"}, {PREFIX + "k"})
        if any(group.keys() >= names for group in base.param_groups for names in schedules):
            raise TypeError(
                f"Invalid base: expected an optimizer that is not schedule-free itself, got {type(base)}"
            )
        if not (saved := base.state_dict().keys()) >= {"state", "param_groups"}:
            raise TypeError(
                f"Invalid base: the state dict of {type(base)} has {sorted(saved)}, expected state and "
                "param_groups"
            )
        settings = {name: given[name] for name in _SETTINGS}
        check_group(settings, _SETTINGS, "", {})
        store_plain_numbers(settings)
        self.base = base
        self._memory = Memory()
        groups = [self._completed(group, settings) for group in base.param_groups]
        for index, group in enumerate(groups):
            self._check_group(group, f" in parameter group {index}")
        nonfinite_.policy_of([*map(Own, groups)])
        for group, entries in zip(base.param_groups, groups, strict=True):
            group.update(entries)
        for p in wrapped.of_16_bits(base.param_groups):  # whose state is float32 from here on
            state = base.state.get(p, {})
            state.update({k: t.float() for k, t in state.items() if getattr(t, "dtype", None) == p.dtype})
        # Optimizer.__init__ would make groups of its own; this is the rest of what it does.
        self.__setstate__({})

    # ---- one optimizer of two -------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[ParamGroup]:
        """The base optimizer's groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[ParamGroup]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base optimizer's state, with the wrapper's entries."""
        return self.base.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base optimizer's hyperparameters."""
        return self.base.defaults

    @property
    def train_mode(self) -> bool:
        """True in train mode, where the parameters are ``y``."""
        return bool(self.param_groups[0][PREFIX + "train_mode"])

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients in the last step that needed it, before clipping, as in the fused classes."""
        return self._memory.grad_norm

    def _new_record(self, group: ParamGroup) -> WrappedGroup:
        """The record of a group; one that was added to the base optimizer itself becomes like the first."""
        group.update(self._completed(group, Own(self.param_groups[0])))
        drop_duplicates(group)
        self._memory.had_parameters |= holds_parameters(group)
        return self._group_type(group)

    @staticmethod
    def _completed(group: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
        """A group with what it lacks of the wrapper's entries, at the start of an average."""
        own = {name: kind() for name, kind in SCHEDULE.items()} | {name: settings[name] for name in _SETTINGS}
        own["train_mode"] = settings.get("train_mode", False)
        result = {**{PREFIX + name: value for name, value in own.items()}, **group}
        result.setdefault(PREFIX + "momentum_of_y", result[PREFIX + "momentum"])
        return result

    def _check_group(self, group: ParamGroup, where: str) -> None:
        """Raises ValueError for a number outside its domain, or a parameter of an unsupported dtype."""
        self._check_hyperparameters(group, where)
        store_plain_schedule(Own(group), where)  # type: ignore[arg-type]
        check_parameters(group, where)

    def _check_hyperparameters(self, group: dict[str, Any], where: str) -> None:
        if "lr" not in group:
            raise ValueError(f"Invalid base: it has no lr{where}, by which the average is weighted")
        captures = bool(group.get("capturable", False))
        if not (captures and isinstance(group["lr"], Tensor)):
            check_number("lr", group["lr"], where)
        settings = {name: group[PREFIX + name] for name in _CHECKED}
        check_group(settings, _CHECKED, where, {"momentum_of_y": "momentum"}, PREFIX)
        policy = settings["nonfinite"]
        if captures and policy != nonfinite_.DEFAULT:
            raise ValueError(
                f"Invalid {PREFIX}nonfinite{where}: {policy!r}, expected {nonfinite_.DEFAULT!r} with "
                "capturable: the host does not look at gradients, and only it could leave out a step"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer, in the mode and with the settings of the first.

        Args:
            param_group: ``params`` and what is to differ: the base optimizer's hyperparameters, and the
                wrapper's under names that begin with ``sf_``.

        Raises:
            ValueError: naming the entry or parameter, the group, what was expected and what came; no group
                has been added.
        """
        groups, where = self.param_groups, f" in parameter group {len(self.param_groups)}"
        try:
            self.base.add_param_group(param_group)
        except ValueError as error:
            refuse_known_parameters(groups, param_group, where, error)
            raise
        first = Own(groups[0])
        entries = self._completed(groups[-1], first)
        entries[PREFIX + "train_mode"] = first["train_mode"]
        try:
            self._check_group(entries, where)
            nonfinite_.require_same(first, Own(entries), where)
        except ValueError:
            del groups[-1]
            raise
        groups[-1].update(entries)

    @property
    def _states(self) -> OwnStates:
        return OwnStates(self.base.state)

    # ---- step -----------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @eager
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Takes one optimization step.

        Args:
            closure: reevaluates the model and returns the loss. It is called with the parameters at ``y``,
                as often as the base optimizer asks: once by most, several times by ``torch.optim.LBFGS``,
                each time at the ``y`` of the ``z`` that is tried.

        Returns:
            What the closure returned first, or ``None`` without one.

        Raises:
            RuntimeError: in eval mode, for a state on another device or of another dtype than its parameter
                (`train` moves it), or with ``nonfinite="raise"`` for a gradient that is not finite.
            ValueError: for a hyperparameter that has been moved outside its domain.
        """
        return self._step(closure)  # type: ignore[no-any-return]

    _take_step = step  # torch puts its hooks around `step`

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        memory = self._memory
        if closure is None and self._is_probe():
            return self._make_state()
        self._require_train_mode()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self._require_train_mode()
        if memory.probed:
            self._forget_probe()
        records = [*self._records()]  # without groups that a later call of the closure adds
        steps = self._next_steps(records)
        of_groups = self._gather(records)
        exchange = Exchange(self.base, (part for parts in of_groups for part in parts))
        norm = self._norm_of(exchange.parts)
        if norm is not None and nonfinite_.is_skipped([record.group for record in records], norm):
            return loss
        counted = [bool(parts) or r.counts_at_rest(()) for r, parts in zip(records, of_groups, strict=True)]
        advanced: list[WrappedGroup] = []
        # With a closure the base optimizer may run for long, and Ctrl-C ends it.
        with Uninterrupted() if closure is None else nullcontext():
            try:
                with Uninterrupted():
                    for record, step, counts in zip(records, steps, counted, strict=True):
                        if step is None and counts:
                            record.advance()
                            advanced.append(record)
                    exchange.to_z(norm)
                if closure is None:
                    self.base.step()
                else:
                    self.base.step(self._closure_at_y(closure, loss, exchange))  # type: ignore[arg-type]
                with Uninterrupted():
                    exchange.to_y()
                    exchange.store()
                    for record, *of_group in zip(records, steps, of_groups, counted, strict=True):
                        record.finish(*of_group, self._states)
                    advanced = []
            except BaseException:
                with Uninterrupted():
                    exchange.undo()
                    capturable.restore(advanced)
                raise
        return loss

    def _make_state(self) -> None:
        exchange = Exchange(self.base, (part for parts in self._gather(self._records()) for part in parts))
        with Uninterrupted():
            exchange.lend()
            try:
                self.base.step()
            finally:
                exchange.take_back()
            exchange.store()
        self._memory.probed = True

    def _next_steps(self, records: list[WrappedGroup]) -> list[_C.ScheduleStep | None]:
        """The next step of each group, or None where its device knows it."""
        steps = []
        for index, record in enumerate(records):
            where = f" in parameter group {index}"
            self._check_hyperparameters(record.entries, where)
            try:
                steps.append(record.next_step())
            except (TypeError, ValueError) as error:
                raise type(error)(f"{error}{where}") from error
            if record.beta() != record.y_beta:
                require_shapes(record.group, self._states, range(len(record.group["params"])))
        if torch.version.cuda is not None and None not in steps:
            capturable.require_no_capture()
        return steps

    def _gather(self, records: list[WrappedGroup]) -> list[list[Part]]:
        try:
            return [record.gather_parts(self.state) for record in records]
        except RuntimeError:
            self._memory.moved = True
            raise

    def _norm_of(self, parts: list[Part]) -> Tensor | None:
        """The norm of all gradients, where a step needs it. A collective call where there are DTensors."""
        groups = [record.group for record in self._records()]
        clips = any(group["max_grad_norm"] is not None for group in groups)
        if nonfinite_.policy_of(groups) == nonfinite_.DEFAULT and not clips:
            return None
        params = [p for part in parts for p in part.params if p.grad is not None]
        grads = sharded.local_gradients([p.grad for p in params], params)  # type: ignore[misc]
        square = sharded.all_reduced(params, lambda at: ops.grad_norm([grads[i] for i in at]).square())
        self._memory.grad_norm = square.sqrt()
        return self._memory.grad_norm

    def _closure_at_y(
        self, closure: Callable[[], Loss], loss: Loss | None, exchange: Exchange
    ) -> Callable[[], Loss | None]:
        """The closure that the base optimizer gets.

        Its first call returns the loss that is known, unless the base has changed a parameter or gradient.
        """
        known, before = [loss], exchange.versions()

        @torch.no_grad()
        def call() -> Loss | None:
            # A base optimizer that has moved or cleared something before, as SAM does, needs another.
            if known and exchange.versions() == before:
                return known.pop()
            known.clear()
            norm = None
            try:
                with Uninterrupted():
                    exchange.to_y(back=True)
                with torch.enable_grad():
                    result = closure()
                self._require_train_mode()
                norm = self._norm_of(exchange.parts)
                return result
            finally:
                with Uninterrupted():
                    self._set_mode(True)
                    exchange.to_z(norm, back=True)

        return call

    # ---- checkpoints ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep."""
        return {"base": self.base, "_memory": replace(self._memory, groups=[])}  # records are made anew

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what `__getstate__` kept."""
        super().__setstate__(state)
        for record in self._records():
            record.note_formats(self._states)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict with the wrapper's entries, mode included."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        saved = self.base.state_dict()
        # The optimizer's own dicts stay its own.
        saved["state"] = {k: dict(v) if isinstance(v, dict) else v for k, v in saved["state"].items()}
        for group in saved["param_groups"]:
            capturable.to_numbers(Own(group))
            plain = {key: value for key, value in group.items() if key != "betas"}  # which may be anything
            store_plain_numbers(plain)
            group |= plain
        memory = self._memory
        samples = None if memory.probed else memory.expected or take_samples(self._records(), self._states)
        saved |= own_entry(samples, None)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            saved = post_hook(self, saved) or saved
        return saved

    @eager
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, of its namesake in ``schedulefree``, or of the base optimizer.

        The namesake's has no mode: it is loaded in the mode that this optimizer is in. That of a base
        optimizer alone starts the average afresh.

        Args:
            state_dict: what `state_dict` returned; it is copied.

        Raises:
            ValueError: for a state dict of other parameters or of another schedule-free optimizer; nothing
                has been loaded.
        """
        wrapped.load(self, state_dict)


class ScheduleFreeWrapperClosure(ClosureForm, ScheduleFreeWrapper):
    """`ScheduleFreeWrapper` with ``step(closure)`` and no need of ``train()`` and ``eval()``.

    Parameters are ``x`` but while ``step()`` calls the closure, when they are ``y``.

    Example::

        import torch
        from schedulefree_cpp import ScheduleFreeWrapperClosure

        weights = torch.nn.Parameter(torch.zeros(8))
        optimizer = ScheduleFreeWrapperClosure(torch.optim.RMSprop([weights], lr=0.1))

        def closure():
            optimizer.zero_grad()
            loss = (weights - 1).square().sum()
            loss.backward()
            return loss

        for _ in range(100):
            optimizer.step(closure)
        print(weights.mean().item())  # nearly 1
    """
