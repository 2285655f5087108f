"""Schedule-Free around any other optimizer, which then steps ``z``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from schedulefree_cpp import _state_dict, ops
from schedulefree_cpp._groups import (
    check_number,
    check_parameters,
    drop_duplicates,
    refuse_known_parameters,
)
from schedulefree_cpp._library import _C
from schedulefree_cpp._modes import MOVED, Group, Loss, Memory, State, TwoModeOptimizer
from schedulefree_cpp._sharded import local
from schedulefree_cpp._traced import eager


class ScheduleFreeWrapper(TwoModeOptimizer):
    """Makes any optimizer schedule-free (Defazio et al., arXiv 2405.15682).

    Groups and state are the base optimizer's, to which the wrapper adds its own entries, ``z`` among them: so
    learning-rate schedulers and state dicts treat both as one optimizer. For the base optimizer's step a
    parameter and its ``z`` exchange their memory, so nothing is copied. Prefer the classes that are fused,
    where there is one.

    Example::

        base = torch.optim.RMSprop(model.parameters(), lr=0.0025)
        optimizer = ScheduleFreeWrapper(base, weight_decay_at_y=0.1)

    Args:
        base: the optimizer, best without momentum of its own. Its ``lr`` is the learning rate.
        weight_decay_at_y: decay coefficient, evaluated at ``y``, >= 0. The base optimizer's own weight decay
            is evaluated at ``z``.
        momentum: interpolation weight of ``y = momentum*x + (1-momentum)*z``, in (0, 1].
        weight_lr_power: averaging weights grow as ``lr_max**weight_lr_power``.
        r: averaging weights grow as ``step**r``.

    Raises:
        TypeError: if ``base`` is no ``torch.optim.Optimizer``, or a schedule-free one.
        ValueError: naming the hyperparameter, its value and its domain.
    """

    base: Optimizer

    _iterates: ClassVar[tuple[str, ...]] = ("z",)  # what it adds to a state

    def __init__(
        self,
        base: Optimizer,
        weight_decay_at_y: float = 0.0,
        momentum: float = 0.9,
        weight_lr_power: float = 2,
        r: float = 0,
    ) -> None:
        """Checks the hyperparameters and adopts the base optimizer's groups."""
        if not isinstance(base, Optimizer):
            raise TypeError(f"Invalid base: expected a torch.optim.Optimizer, got {type(base)}")
        if any("weight_sum" in group for group in base.param_groups):
            raise TypeError(
                f"Invalid base: expected an optimizer that is not schedule-free itself, got {type(base)}"
            )
        check_number("momentum", momentum)
        check_number("weight_decay_at_y", weight_decay_at_y)
        check_number("r", r)
        check_number("weight_lr_power", weight_lr_power)
        self.base = base
        self.momentum = momentum
        self.weight_decay_at_y = weight_decay_at_y
        self.r = r
        self.weight_lr_power = weight_lr_power
        self._memory = Memory()
        for index, group in enumerate(base.param_groups):
            self._check(group, f" in parameter group {index}")
        # Optimizer.__init__ would make groups of its own; this is the rest of what it does.
        self.__setstate__({})
        self._warned_capturable_if_run_uncaptured = True
        self._adopt_groups(train_mode=False)

    @staticmethod
    def _check(group: Group, where: str) -> None:
        """Raises ValueError for a number outside its domain, or a parameter of an unsupported dtype."""
        for name in group.keys() & {"lr", "weight_decay_at_y"}:
            check_number(name, group[name], where)
        check_parameters({"params": [], **group}, where)

    # ---- around a step of the base optimizer ----------------------------------------------------------

    def _new_state(self, p: Tensor) -> State:
        """The wrapper's state of a parameter before its first step."""
        return {"z": p.detach().clone()}

    def _set_to_z(self, p: Tensor, state: State, decay: float) -> Callable[[], None]:
        """Has a parameter hold z, decayed at y by ``decay``. Returns what undoes it."""
        before = state["z"].clone() if decay else None
        if before is not None:
            state["z"].sub_(p, alpha=decay)
        self._interpolate(ops.y_to_x_, p, state["z"] if before is None else before)
        _exchange(p, state)

        def undo() -> None:
            _exchange(p, state)
            if before is not None:
                state["z"].copy_(before)
            self._interpolate(ops.x_to_y_, p, state["z"])

        return undo

    def _set_to_next_y(self, p: Tensor, state: State, c: float) -> None:
        """Has a parameter that holds the next z hold the next y; ``c`` is the weight of z in x."""
        _exchange(p, state)
        p.lerp_(state["z"], c)
        # Back and forth, until y is settled (csrc/update_math.h).
        for swap in (ops.x_to_y_, ops.y_to_x_, ops.x_to_y_, ops.y_to_x_, ops.x_to_y_):
            self._interpolate(swap, p, state["z"])

    def _interpolate(self, swap: Callable[..., None], p: Tensor, z: Tensor) -> None:
        # The operators want z of 16-bit parameters in float32.
        wide = local(z if z.dtype == torch.float64 else z.float())
        swap([local(p)], [], [wide], beta=self.momentum)

    def _swap(self, index: int, group: Group, to_train: bool) -> None:
        self._move_state(group)
        to, back = (ops.x_to_y_, ops.y_to_x_) if to_train else (ops.y_to_x_, ops.x_to_y_)
        swapped: list[Tensor] = []
        try:
            for p in group["params"]:
                if "z" in self.state.get(p, ()):
                    self._interpolate(to, p, self.state[p]["z"])
                    swapped.append(p)
        except BaseException:
            for p in reversed(swapped):
                self._interpolate(back, p, self.state[p]["z"])
            raise

    # ---- one optimizer of two -------------------------------------------------------------------------

    @property
    def param_groups(self) -> list[Group]:
        """The base optimizer's groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
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
        return self._trains(self.param_groups[0])

    def _y_beta(self, index: int) -> float:
        return self.momentum

    def _adopt_groups(self, train_mode: bool) -> None:
        for group in self.param_groups:
            drop_duplicates(group)
            group.setdefault("weight_decay_at_y", self.weight_decay_at_y)
            group.setdefault("train_mode", train_mode)
            group.setdefault("k", 0)
            group.setdefault("weight_sum", 0.0)
            group.setdefault("lr_max", 0.0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer, in the mode the wrapper is in."""
        train_mode = self.train_mode
        where = f" in parameter group {len(self.param_groups)}"
        try:
            self.base.add_param_group(param_group)
        except ValueError as error:
            refuse_known_parameters(self.param_groups, param_group, where, error)
            raise
        try:
            self._check(self.param_groups[-1], where)
        except ValueError:
            del self.param_groups[-1]
            raise
        self.param_groups[-1].pop("train_mode", None)
        self._adopt_groups(train_mode)

    def _move_state(self, group: Group) -> None:
        for p in group["params"]:
            state = self.state.get(p, {})
            for name in state.keys() & {"x", "y", "z"}:
                state[name] = state[name].to(device=p.device, dtype=p.dtype)

    # ---- step -----------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @eager
    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """Takes one optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or ``None`` without one.

        Raises:
            RuntimeError: in eval mode, or for a state on another device or of another dtype than its
                parameter (:meth:`train` moves it).
            ValueError: for a hyperparameter that has been moved outside its domain.
        """
        memory = self._memory
        if closure is None and self._is_probe():
            self.base.step()
            for p in self._with_gradient():
                self.state[p].update(self._new_state(p))
            memory.probed = True
            return None
        self._require_train_mode()
        loss: Loss | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if memory.probed:
            self.state.clear()  # the parameters may have been loaded since
            memory.probed = False
        # Many optimizers see a parameter's first step by its empty state, so ours is added after theirs.
        own: dict[Tensor, State] = {}
        for p in self._with_gradient():
            state: State = self.state.get(p, {})
            own[p] = state if "z" in state else self._new_state(p)
            if (own[p]["z"].dtype, own[p]["z"].device) != (p.dtype, p.device):
                raise RuntimeError(MOVED)
        for index, group in enumerate(self.param_groups):
            self._schedule(index, group)  # refuses what it would refuse after the base optimizer's step
        undo: list[Callable[[], None]] = []
        try:
            for group in self.param_groups:
                decay = float(group["lr"]) * float(group["weight_decay_at_y"])
                for p in group["params"]:
                    if p in own:
                        undo.append(self._set_to_z(p, own[p], decay))
            self.base.step()
        except BaseException:
            for action in reversed(undo):
                action()
            raise
        for index, group in enumerate(self.param_groups):
            step = self._schedule(index, group)
            for p in group["params"]:
                if p in own:
                    self._set_to_next_y(p, own[p], step.c)
                    self.state[p].update(own[p])
            group["lr_max"] = step.lr_max
            group["weight_sum"] = step.weight_sum
            group["k"] = step.k
        return loss

    def _schedule(self, index: int, group: Group) -> _C.ScheduleStep:
        where = f" in parameter group {index}"
        for name in ("lr", "weight_decay_at_y"):
            check_number(name, group[name], where)
        try:
            return _C.schedule_step(
                kind=ops.STEP_KINDS["sgd"],
                k=group["k"],
                weight_sum=group["weight_sum"],
                lr_max=group["lr_max"],
                lr=float(group["lr"]),
                lr_factor=float(group.get("d", 1.0)),  # the estimate of optimizers such as Prodigy
                r=self.r,
                weight_lr_power=self.weight_lr_power,
                beta=self.momentum,
                beta_next=self.momentum,
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}{where}") from error

    def _with_gradient(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    # ---- checkpoints ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep."""
        names = ("base", "momentum", "weight_decay_at_y", "r", "weight_lr_power", "_memory")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict with the wrapper's entries, mode included."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = self.base.state_dict()
        samples = None if self._memory.probed else self._memory.expected or _state_dict.sample(self)
        _state_dict.complete(state_dict, samples, None)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    @eager
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of its namesake in ``schedulefree``, which has no mode.

        Args:
            state_dict: what :meth:`state_dict` returned; it is copied.

        Raises:
            ValueError: for a state dict of other parameters or of another schedule-free optimizer; nothing
                has been loaded. That of a base optimizer alone starts the average afresh.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        train_mode = self.train_mode
        samples = _state_dict.Samples.of(state_dict.get(_state_dict.OURS, {}).get("fingerprint"))
        _state_dict.check_wrapped(self.param_groups, state_dict, type(self).__name__, self._iterates)
        self.base.load_state_dict(state_dict)
        self._adopt_groups(train_mode)
        saved = {id(t) for state in state_dict["state"].values() for t in state.values()}
        for state in self.state.values():
            for name, value in state.items():
                if isinstance(value, Tensor) and id(value) in saved:
                    state[name] = value.clone()
        self._memory.expected = samples
        self._memory.probed = False
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


class ScheduleFreeWrapperReference(ScheduleFreeWrapper):
    """:class:`ScheduleFreeWrapper` that stores ``x``, ``y`` and ``z``: simple to modify.

    Its arguments too, but for their order, which is upstream's.
    """

    _iterates: ClassVar[tuple[str, ...]] = ("x", "y", "z")

    def __init__(
        self,
        base: Optimizer,
        momentum: float = 0.9,
        weight_decay_at_y: float = 0.0,
        r: float = 0,
        weight_lr_power: float = 2,
    ) -> None:
        """Checks the hyperparameters and adopts the base optimizer's groups."""
        super().__init__(base, weight_decay_at_y, momentum, weight_lr_power, r)

    def _new_state(self, p: Tensor) -> State:
        return {name: p.detach().clone() for name in self._iterates}

    def _set_to_z(self, p: Tensor, state: State, decay: float) -> Callable[[], None]:
        before = state["z"].clone()
        p.copy_(state["z"].sub_(state["y"], alpha=decay))

        def undo() -> None:
            state["z"].copy_(before)
            p.copy_(state["y"])

        return undo

    def _set_to_next_y(self, p: Tensor, state: State, c: float) -> None:
        x, y, z = state["x"], state["y"], state["z"]
        z.copy_(p)
        x.copy_((1 - c) * x + c * z)
        y.copy_(self.momentum * x + (1 - self.momentum) * z)
        p.copy_(y)

    @torch.no_grad()
    def _swap(self, index: int, group: Group, to_train: bool) -> None:
        self._move_state(group)
        for p in group["params"]:
            if "z" in self.state.get(p, ()):
                p.copy_(self._stored(p)["y" if to_train else "x"])

    def _stored(self, p: Tensor) -> State:
        state: State = self.state[p]
        if not {"x", "y"} <= state.keys():
            raise RuntimeError(
                f"{type(self).__name__} has been given a state without x and y: it comes from a class that "
                "does not store them"
            )
        return state


def _exchange(p: Tensor, state: State) -> None:
    """Exchanges the contents of a parameter and of its z."""
    if type(p.data) is Tensor:
        p.data, state["z"] = state["z"], p.data
    else:
        # A tensor subclass may hold its memory elsewhere.
        z = state["z"].clone()
        state["z"].copy_(p)
        p.copy_(z)
