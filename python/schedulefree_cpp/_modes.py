"""Two modes: parameters at ``y`` for training, at the average ``x`` for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from schedulefree_cpp import _checkpoint
from schedulefree_cpp._sharded import local

Group: TypeAlias = dict[str, Any]
State: TypeAlias = dict[str, Any]

# A state dict's entry for what `schedulefree` does not know, beside "state" and "param_groups".
OURS = "schedulefree_cpp"

_SAMPLED_PARAMETERS = 64
_SAMPLED_ELEMENTS = 8


class TwoModeOptimizer(Optimizer):
    """An optimizer whose parameters hold ``y`` in train mode and ``x`` in eval mode; not used directly."""

    # What a state dict said of the parameters that belong to it, until they are first used.
    _expected: dict[str, Any] | None = None

    # Whether the state was only made to be looked at, before the first step: see _probed().
    _allocated = False

    # ---- what a subclass says -------------------------------------------------------------------------

    def _mode(self, group: Group) -> bool:
        """Whether the group is in train mode."""
        return bool(group["train_mode"])

    def _set_mode(self, group: Group, train: bool) -> None:
        group["train_mode"] = train

    def _swap(self, group: Group, index: int, to_train: bool) -> None:
        """Takes the parameters of a group to where they are in the mode that it is not in."""
        raise NotImplementedError

    def _counterpart(
        self, group: Group, index: int, p: Tensor, part: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        """A part of a parameter as it would be in the other mode; None if it is the same.

        Args:
            group: the parameter's group, number ``index``.
            index: the group's number.
            p: the parameter, which is not changed.
            part: selects elements, of the parameter and of its state alike.
        """
        raise NotImplementedError

    # ---- modes ----------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def train(self, mode: bool = True) -> None:
        """Puts the parameters at ``y``, where gradients are taken. Idempotent.

        After :meth:`eval` the parameters are what they were before it, bit for bit.

        Args:
            mode: ``False`` means :meth:`eval`, as in ``torch.nn.Module.train``.

        Raises:
            RuntimeError: if a state dict was loaded that belongs to parameters in the other mode.
        """
        self._check_expected()
        for index, group in enumerate(self.param_groups):
            if self._mode(group) != mode:
                self._switch(group, index, mode)

    def eval(self) -> None:
        """Puts the parameters at the average ``x``, which is to be evaluated and saved. Idempotent."""
        self.train(False)

    def _switch(self, group: Group, index: int, to_train: bool) -> None:
        if not self._allocated:
            self._swap(group, index, to_train)
        self._set_mode(group, to_train)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def averaged(self) -> AbstractContextManager[None]:
        """The parameters are ``x`` inside, and bit for bit what they were after.

        Example::

            with optimizer.averaged():
                validate(model)
        """
        return self._averaged()

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        modes = [self._mode(group) for group in self.param_groups]
        try:
            self.eval()
            yield
        finally:
            for index, group in enumerate(self.param_groups):
                # A group that has been added inside goes the way of the first.
                if modes[index if index < len(modes) else 0] and not self._mode(group):
                    self._switch(group, index, True)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def averaged_state_dict(self, model: torch.nn.Module) -> dict[str, Any]:
        """The model's state dict with ``x`` in place of its parameters, in either mode.

        Neither the model nor the optimizer is changed. All tensors are copies; beside them, memory is needed
        for the state of one 16-bit parameter at a time, and for nothing else.

        Args:
            model: a module, wrapped or not, that holds parameters of this optimizer.

        Returns:
            What ``model.state_dict()`` returns in eval mode: its names, its buffers, ``x``.

        Raises:
            RuntimeError: if ``model.state_dict()`` returns copies in place of parameters.
        """
        self._check_expected()
        homes = {p: (index, group) for index, group in enumerate(self.param_groups) for p in group["params"]}
        ours = [p for p in model.parameters() if p in homes]
        in_memory = {_memory(p): p for p in ours}
        copies: dict[Tensor, Tensor] = {}
        state_dict = model.state_dict(keep_vars=True)
        for name, value in state_dict.items():
            if not isinstance(value, Tensor):
                continue
            # A module may return its parameters detached.
            p = value if value in homes else in_memory.get(_memory(value), value)
            if p not in copies:
                x = None
                if p in homes and self._mode(homes[p][1]) and not self._allocated:
                    index, group = homes[p]
                    x = self._counterpart(group, index, p, lambda t: t)
                copies[p] = p.detach().clone() if x is None else x
            state_dict[name] = copies[p]
        missing = sum(p not in copies for p in ours if p.numel())
        if missing:
            raise RuntimeError(
                f"model.state_dict() returned something else than {missing} of the model's parameters that "
                "this optimizer has, so their average would be missing. Use optimizer.averaged() around it."
            )
        return state_dict

    def _probed(self) -> bool:
        """Whether a step without closure is the one by which ``torch.distributed.checkpoint`` sees the state.

        It meets no state and a learning rate of 0 everywhere, in any mode. Its gradients, nothing but zeros,
        tell nothing: those of a first step may be so too, in one process and not in another.
        """
        if self.state or any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        return _checkpoint.is_probe()

    def _loss_of(self, closure: Callable[[], Any] | None) -> Any:
        """Evaluates a step's closure, in train mode only."""
        self._require_train_mode()
        if closure is None:
            return None
        with torch.enable_grad():
            return closure()

    def _require_train_mode(self) -> None:
        self._check_expected()
        for index, group in enumerate(self.param_groups):
            if not self._mode(group):
                raise RuntimeError(
                    f"step() was called while parameter group {index} is in eval mode, where the "
                    "parameters are the average x. Call optimizer.train() before training and "
                    "optimizer.eval() before evaluating or saving."
                )

    # ---- do parameters and state belong together? -----------------------------------------------------

    def _add_fingerprint(self, state_dict: dict[str, Any]) -> None:
        # What has been loaded but not met its parameters yet is passed on.
        fingerprint = self._fingerprint() if self._expected is None else self._expected
        if fingerprint is not None:
            state_dict[OURS] = {"fingerprint": fingerprint}

    @torch.no_grad()
    def _fingerprint(self) -> dict[str, Any] | None:
        """A few elements of the parameters in both modes, to be compared with those that meet this state."""
        if self._allocated:
            return None
        homes = [
            (number, index, group, p)
            for number, (index, group, p) in enumerate(
                (index, group, p) for index, group in enumerate(self.param_groups) for p in group["params"]
            )
            if "z" in self.state.get(p, ()) and _sampled(p)
        ]
        stride = max(1, -(-len(homes) // _SAMPLED_PARAMETERS))
        numbers, here, there = [], [], []
        for number, index, group, p in homes[::stride]:
            other = self._counterpart(group, index, p, _sample)
            if other is not None:
                now, other = _sample(p).cpu().double(), other.cpu().double()
                numbers.append(number)
                here.append(now if self._mode(group) else other)
                there.append(other if self._mode(group) else now)
        if not numbers:
            return None
        return {"params": numbers, "y": torch.cat(here), "x": torch.cat(there)}

    def _check_expected(self) -> None:
        """Refuses parameters that are at x where the state says y, or the reverse.

        Parameters that are neither are accepted: who replaced them knows why.
        """
        if self._expected is None:
            return
        expected, params = self._expected, [(g, p) for g in self.param_groups for p in g["params"]]
        chosen = [params[number] for number in expected["params"] if number < len(params)]
        samples = [_sample(p.detach()).cpu().double() for _, p in chosen if _sampled(p)]
        if len(samples) == len(expected["params"]) and sum(map(len, samples)) == len(expected["y"]):
            in_train = torch.cat(
                [torch.full((len(s),), self._mode(g)) for (g, _), s in zip(chosen, samples, strict=True)]
            )
            own = torch.where(in_train, expected["y"], expected["x"])
            other = torch.where(in_train, expected["x"], expected["y"])
            now = torch.cat(samples)
            if 10 * (now - other).abs().sum() < (now - own).abs().sum():
                has, says = ("x", "y") if self._mode(chosen[0][0]) else ("y", "x")
                names = {"x": "eval mode (x, the average)", "y": "train mode (y)"}
                remedy = (
                    f"set group['train_mode'] = {has == 'y'} in every group of optimizer.param_groups first"
                    if "train_mode" in chosen[0][0]
                    else "load it into the class that has modes, call eval() and save it again"
                )
                raise RuntimeError(
                    f"the parameters are those of {names[has]}, but the loaded optimizer state says "
                    f"{names[says]}: the model was saved in one mode and the optimizer in the other. Save "
                    f"both in the same mode. To use this checkpoint as it is, {remedy}."
                )
        self._expected = None


class StoredIterates(TwoModeOptimizer):
    """With ``x``, ``y`` and ``z`` in the state, as reference implementations have them."""

    @staticmethod
    def _average(p: Tensor, state: State, c: float, beta: float) -> None:
        """From the next z to the next x, y and parameter (arXiv 2405.15682, algorithm 1)."""
        x, y, z = state["x"], state["y"], state["z"]
        x.mul_(1 - c).add_(z, alpha=c)
        y.copy_(beta * x + (1 - beta) * z)
        p.copy_(y)

    @torch.no_grad()
    def _swap(self, group: Group, index: int, to_train: bool) -> None:
        stored = [(p, self._iterates(p)) for p in group["params"]]
        for p, iterates in stored:
            if iterates is not None:
                p.copy_(iterates["y" if to_train else "x"])

    def _iterates(self, p: Tensor) -> State | None:
        """The state of a parameter that has taken a step."""
        state: State = self.state.get(p, {})
        if "z" not in state:
            return None
        self._require_iterates(state)
        return state

    def _require_iterates(self, state: State) -> None:
        if not {"x", "y"} <= state.keys():
            raise RuntimeError(
                f"{type(self).__name__} has been given a state without x and y: it comes from a class that "
                "does not store them"
            )

    def _counterpart(
        self, group: Group, index: int, p: Tensor, part: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        state = self._iterates(p)
        if state is None:
            return None
        other = part(state["x" if self._mode(group) else "y"])
        return other.to(device=p.device, dtype=p.dtype, copy=True)


def _memory(t: Tensor) -> tuple[Any, ...]:
    """What tells two views of the same elements; the tensor itself where it has no memory to speak of."""
    plain = type(t.data) is Tensor and t.layout is torch.strided and t.numel() > 0
    return (t.data_ptr(), t.shape, t.stride()) if plain else (id(t),)


def _sampled(p: Tensor) -> bool:
    p = local(p)
    return type(p.data) is Tensor and p.numel() > 0 and p.is_contiguous()


def _sample(t: Tensor) -> Tensor:
    """A few elements of what this process holds, evenly spread."""
    flat = local(t).reshape(-1)
    return flat[:: max(1, -(-flat.numel() // _SAMPLED_ELEMENTS))]
