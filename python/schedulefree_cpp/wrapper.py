"""Schedule-Free around any other optimizer, which then steps ``z``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from schedulefree_cpp import _checkpoint, ops
from schedulefree_cpp._base import FINITE, INTERPOLATION, NON_NEGATIVE, check_dtypes
from schedulefree_cpp._library import _C
from schedulefree_cpp._modes import OURS, Group, State, StoredIterates, TwoModeOptimizer
from schedulefree_cpp._sharded import local
from schedulefree_cpp._swap import KEPT, KEPT_AT, Kept, to_x, to_y


class WrapperOptimizer(TwoModeOptimizer):
    """Base of the wrappers; not used directly.

    Groups and state are the base optimizer's, to which the wrapper adds its own entries: so learning-rate
    schedulers and state dicts treat both as one optimizer.
    """

    base: Optimizer

    def __init__(
        self,
        base: Optimizer,
        *,
        momentum: float,
        weight_decay_at_y: float,
        r: float,
        weight_lr_power: float,
    ) -> None:
        """Checks the hyperparameters and adopts the base optimizer's groups."""
        if not isinstance(base, Optimizer):
            raise TypeError(f"Invalid base: expected a torch.optim.Optimizer, got {type(base)}")
        INTERPOLATION.check("momentum", momentum)
        NON_NEGATIVE.check("weight_decay_at_y", weight_decay_at_y)
        FINITE.check("r", r)
        FINITE.check("weight_lr_power", weight_lr_power)
        self.base = base
        self.momentum = momentum
        self.weight_decay_at_y = weight_decay_at_y
        self.r = r
        self.weight_lr_power = weight_lr_power
        # Optimizer.__init__ would make groups of its own; this is the rest of what it does.
        for index, group in enumerate(base.param_groups):
            check_dtypes(group, f" in parameter group {index}")
        self.__setstate__({})
        self._warned_capturable_if_run_uncaptured = True
        self._adopt_groups(train_mode=False)

    # ---- what a subclass says -------------------------------------------------------------------------

    def _to_z(self, p: Tensor, state: State, decay: float) -> None:
        """Has a parameter hold z, decayed at y by ``decay``, for the base optimizer's step."""
        raise NotImplementedError

    def _to_next_y(self, p: Tensor, state: State, c: float) -> None:
        """Has a parameter that holds the next z hold the next y; ``c`` is the weight of z in x."""
        raise NotImplementedError

    def _undo(self, p: Tensor, state: State, decay: float) -> None:
        """Undoes :meth:`_to_z`, but for rounding."""
        raise NotImplementedError

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
        """Whether parameters are at ``y``."""
        return self._mode(self.param_groups[0])

    def _adopt_groups(self, train_mode: bool) -> None:
        for group in self.param_groups:
            group.setdefault("weight_decay_at_y", self.weight_decay_at_y)
            group.setdefault("train_mode", train_mode)
            group.setdefault("k", 0)
            group.setdefault("weight_sum", 0.0)
            group.setdefault("lr_max", 0.0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer, in the mode the wrapper is in."""
        train_mode = self.train_mode
        self.base.add_param_group(param_group)
        try:
            check_dtypes(self.param_groups[-1], f" in parameter group {len(self.param_groups) - 1}")
        except ValueError:
            del self.param_groups[-1]
            raise
        self.param_groups[-1].pop("train_mode", None)
        self._adopt_groups(train_mode)

    # ---- step -----------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or ``None`` without one.

        Raises:
            RuntimeError: in eval mode.
        """
        if closure is None and self._probed():
            self.base.step()
            for p in self._with_gradient():
                self.state[p].update(self._new_state(p))
            self._allocated = True
            return None
        loss: float | None = self._loss_of(closure)

        if self._allocated:
            # State that was made before the first step begins where the parameters now are.
            self.state.clear()
            self._allocated = False
        # Many optimizers see a parameter's first step by its empty state, so ours is added after theirs.
        own: dict[Tensor, State] = {}
        for p in self._with_gradient():
            state = self._own_state(p)
            own[p] = state if "z" in state else self._new_state(p)
        at_z: list[tuple[Tensor, float]] = []
        try:
            for group in self.param_groups:
                decay = float(group["lr"]) * group["weight_decay_at_y"]
                for p in group["params"]:
                    if p in own:
                        self._to_z(p, own[p], decay)
                        at_z.append((p, decay))
            self.base.step()
        except BaseException:
            for p, decay in at_z:
                self._undo(p, own[p], decay)
            raise
        for group in self.param_groups:
            schedule = _C.advance(
                k=group["k"],
                weight_sum=group["weight_sum"],
                lr_max=group["lr_max"],
                lr=float(group["lr"]),
                lr_factor=float(group.get("d", 1.0)),  # the estimate of optimizers such as Prodigy
                warmup_steps=0,
                r=self.r,
                weight_lr_power=self.weight_lr_power,
                beta=self.momentum,
                beta_next=self.momentum,
            )
            for p in group["params"]:
                if p in own:
                    self._to_next_y(p, own[p], schedule.c)
                    self.state[p].update(own[p])
            group["lr_max"] = schedule.lr_max
            group["weight_sum"] = schedule.weight_sum
            group["k"] = schedule.k
        return loss

    def _with_gradient(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _own_state(self, p: Tensor) -> State:
        """The state of a parameter, the wrapper's part of which follows it to its device and dtype."""
        state: State = self.state.get(p, {})
        for name in state.keys() & {"x", "y", "z"}:
            state[name] = state[name].to(device=p.device, dtype=p.dtype)
        return state

    def _new_state(self, p: Tensor) -> State:
        """The wrapper's state of a parameter before its first step."""
        return {"z": p.detach().clone()}

    # ---- checkpoints ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep."""
        names = ("base", "momentum", "weight_decay_at_y", "r", "weight_lr_power", "_expected", "_allocated")
        return {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state dict with the wrapper's entries, mode included."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state_dict = self.base.state_dict()
        if _checkpoint.is_distributed():
            # Of sizes that differ between processes, which have no place there.
            for name, state in state_dict["state"].items():
                state_dict["state"][name] = {k: v for k, v in state.items() if k not in (KEPT_AT, KEPT)}
        self._add_fingerprint(state_dict)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of its namesake in ``schedulefree``, which has no mode.

        Args:
            state_dict: what :meth:`state_dict` returned; it is copied.
        """
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        train_mode = self.train_mode
        self.base.load_state_dict(state_dict)
        self._adopt_groups(train_mode)
        packed = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(packed, params, strict=True):
            saved = state_dict["state"].get(number, {})
            for name, value in self.state.get(p, {}).items():
                if name in (KEPT_AT, KEPT):
                    # The base class has cast them to the parameter's dtype.
                    self.state[p][name] = saved[name].to(device=p.device, copy=True)
                elif isinstance(value, Tensor) and value is saved[name]:
                    self.state[p][name] = value.clone()
        self._expected = state_dict.get(OURS, {}).get("fingerprint")
        self._allocated = False
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)


class ScheduleFreeWrapper(WrapperOptimizer):
    """Makes any optimizer schedule-free (Defazio et al., arXiv 2405.15682).

    Beside the base optimizer's state it keeps ``z``. For the base optimizer's step a parameter and its ``z``
    exchange their memory, so nothing is copied. Prefer the classes that are fused, where there is one.

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
        TypeError: if ``base`` is no ``torch.optim.Optimizer``.
        ValueError: naming the hyperparameter, its value and its domain.
    """

    def __init__(
        self,
        base: Optimizer,
        weight_decay_at_y: float = 0.0,
        momentum: float = 0.9,
        weight_lr_power: float = 2,
        r: float = 0,
    ) -> None:
        """Checks the hyperparameters and adopts the base optimizer's groups."""
        super().__init__(
            base, momentum=momentum, weight_decay_at_y=weight_decay_at_y, r=r, weight_lr_power=weight_lr_power
        )

    def _to_z(self, p: Tensor, state: State, decay: float) -> None:
        x, z = p.lerp_(state["z"], _C.y_to_x_weight(self.momentum)), state["z"]
        if decay:
            z.sub_(torch.lerp(x, z, _C.x_to_y_weight(self.momentum)), alpha=decay)
        _exchange(p, state)

    def _undo(self, p: Tensor, state: State, decay: float) -> None:
        _exchange(p, state)
        z = state["z"]
        if decay:
            z.add_(p, alpha=decay * self.momentum).div_(1 - decay * (1 - self.momentum))
        p.lerp_(z, _C.x_to_y_weight(self.momentum))

    def _to_next_y(self, p: Tensor, state: State, c: float) -> None:
        _exchange(p, state)
        # The next x is x + c*(z - x); from there the way to y, both in one.
        p.lerp_(state["z"], 1 - self.momentum * (1 - c))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _swap(self, group: Group, index: int, to_train: bool) -> None:
        for p in group["params"]:
            state = self._own_state(p)
            if "z" in state:
                # One at a time: the operators want z of 16-bit parameters in float32.
                y, z = local(p), _wide(local(state["z"]))
                if to_train:
                    to_y([y], [], [z], Kept.from_states([p], [state]), beta=self.momentum)
                elif kept := to_x([p], [y], [], [z], beta=self.momentum):
                    kept.to_states([state])

    def _counterpart(
        self, group: Group, index: int, p: Tensor, part: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        state = self.state.get(p, {})
        if "z" not in state:
            return None
        other = part(p.detach()).clone()
        swap = ops.y_to_x_ if self._mode(group) else ops.x_to_y_
        z = _wide(local(part(state["z"]).to(device=other.device, dtype=other.dtype)))
        swap([local(other)], [], [z], beta=self.momentum)
        return other


class ScheduleFreeWrapperReference(StoredIterates, WrapperOptimizer):
    """:class:`ScheduleFreeWrapper` that stores ``x``, ``y`` and ``z``: simple to modify.

    Args:
        base: the optimizer, best without momentum of its own. Its ``lr`` is the learning rate.
        momentum: interpolation weight of ``y = momentum*x + (1-momentum)*z``, in (0, 1].
        weight_decay_at_y: decay coefficient, evaluated at ``y``, >= 0.
        r: averaging weights grow as ``step**r``.
        weight_lr_power: averaging weights grow as ``lr_max**weight_lr_power``.

    Raises:
        TypeError: if ``base`` is no ``torch.optim.Optimizer``.
        ValueError: naming the hyperparameter, its value and its domain.
    """

    def __init__(
        self,
        base: Optimizer,
        momentum: float = 0.9,
        weight_decay_at_y: float = 0.0,
        r: float = 0,
        weight_lr_power: float = 2,
    ) -> None:
        """Checks the hyperparameters and adopts the base optimizer's groups."""
        super().__init__(
            base, momentum=momentum, weight_decay_at_y=weight_decay_at_y, r=r, weight_lr_power=weight_lr_power
        )

    def _new_state(self, p: Tensor) -> State:
        return {name: p.detach().clone() for name in ("x", "y", "z")}

    def _to_z(self, p: Tensor, state: State, decay: float) -> None:
        state["z"].sub_(state["y"], alpha=decay)
        p.copy_(state["z"])

    def _undo(self, p: Tensor, state: State, decay: float) -> None:
        state["z"].add_(state["y"], alpha=decay)
        p.copy_(state["y"])

    def _to_next_y(self, p: Tensor, state: State, c: float) -> None:
        state["z"].copy_(p)
        self._average(p, state, c, self.momentum)


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def _exchange(p: Tensor, state: State) -> None:
    """Exchanges the contents of a parameter and of its z."""
    if type(p.data) is Tensor:
        p.data, state["z"] = state["z"], p.data
    else:
        # A tensor subclass may hold its memory elsewhere.
        z = state["z"].clone()
        state["z"].copy_(p)
        p.copy_(z)
