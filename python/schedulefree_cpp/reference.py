"""SGD and AdamW that store ``x``, ``y`` and ``z`` and read like the paper: where a variant begins.

Plain torch, in this file alone: copy it and change it. The native classes compute the same with one fused
kernel and without storing ``x``, and have what these lack: float32 state for 16-bit parameters, checks of
hyperparameters, clipping, ``averaged()`` and ``averaged_state_dict()``, the refusal of mixed modes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT


class ReferenceOptimizer(Optimizer):
    """Schedule-free learning around a direction ``u`` (Defazio et al., arXiv 2405.15682, algorithm 1)."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        """Begins in train mode, as upstream's reference does."""
        schedule = {"k": 0, "train_mode": True, "weight_sum": 0.0, "lr_max": -1.0, "scheduled_lr": 0.0}
        super().__init__(params, {**schedule, **defaults})

    def _beta(self, group: dict[str, Any]) -> float:
        """Interpolation weight of ``y = beta*x + (1-beta)*z``."""
        raise NotImplementedError

    def _direction(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """``u``, before weight decay."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> None:
        """Sets the parameters to ``y``, where gradients are taken."""
        for group in self.param_groups:
            group["train_mode"] = mode
            for p in group["params"]:
                if p in self.state:
                    p.data.copy_(self.state[p]["y" if mode else "x"])

    def eval(self) -> None:
        """Sets the parameters to ``x``, the average."""
        self.train(False)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; raises ValueError for a complex parameter."""
        super().add_param_group(param_group)
        index = len(self.param_groups) - 1
        for i, p in enumerate(self.param_groups[index]["params"]):
            if p.requires_grad and p.is_complex():
                del self.param_groups[index]
                raise ValueError(
                    f"Invalid params[{i}] in parameter group {index}: dtype {p.dtype}, expected a real one"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or ``None`` without one.

        Raises:
            RuntimeError: in eval mode, or for a sparse gradient; nothing has changed.
        """
        for index, group in enumerate(self.param_groups):
            if not group["train_mode"]:
                raise RuntimeError(
                    f"step() was called while parameter group {index} is in eval mode, not in train mode"
                )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is not None and p.grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"grad[{i}] in parameter group {index}: expected a dense gradient, got one of layout "
                        f"{p.grad.layout}"
                    )
        for group in self.param_groups:
            # The learning rate, and the weight c of the new z in the average x.
            k, warmup_steps = group["k"], group["warmup_steps"]
            warmup = (k + 1) / warmup_steps if k < warmup_steps else 1.0
            lr = group["scheduled_lr"] = float(group["lr"]) * warmup
            group["lr_max"] = max(lr, group["lr_max"])
            weight = (k + 1) ** group["r"] * group["lr_max"] ** group["weight_lr_power"]
            group["weight_sum"] += weight
            c = weight / group["weight_sum"] if group["weight_sum"] else 0.0
            beta = self._beta(group)
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update({name: p.clone() for name in "xyz"})
                x, y, z = state["x"], state["y"], state["z"]
                u = self._direction(-p.grad if group.get("maximize", False) else p.grad, state, group)
                u = u + group["weight_decay"] * (z if group.get("decay_at_z", False) else y)
                z -= lr * u
                x.copy_((1 - c) * x + c * z)
                y.copy_(beta * x + (1 - beta) * z)
                p.copy_(y)
            group["k"] = k + 1
        return loss


def _given(**extras: Any) -> dict[str, Any]:
    """What upstream's groups lack, as far as it differs from the default."""
    return {name: value for name, value in extras.items() if value}


class SGDScheduleFreeReference(ReferenceOptimizer):
    """`SGDScheduleFree` in a form that is simple to modify, at three times the state.

    Example::

        import torch
        from schedulefree_cpp import SGDScheduleFreeReference

        weights = torch.nn.Parameter(torch.zeros(8))
        optimizer = SGDScheduleFreeReference([weights], lr=0.1)
        for _ in range(100):
            optimizer.zero_grad()
            (weights - 1).square().sum().backward()
            optimizer.step()
        optimizer.eval()

    Args:
        params: parameters, or dicts that define parameter groups.
        lr: learning rate, a float or a one-element tensor.
        momentum: interpolation weight of ``y = momentum*x + (1-momentum)*z``.
        weight_decay: decay coefficient.
        warmup_steps: steps of linear learning-rate warmup.
        r: averaging weights grow as ``step**r``.
        weight_lr_power: averaging weights grow as ``lr_max**weight_lr_power``.
        foreach: accepted for compatibility.
        decay_at_z: evaluate decay at ``z`` and not at ``y``.
        maximize: maximize the objective.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        warmup_steps: float = 0,
        r: float = 0.0,
        weight_lr_power: float = 2,
        foreach: bool | None = True,
        *,
        decay_at_z: bool = False,
        maximize: bool = False,
    ) -> None:
        """Builds the groups."""
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "foreach": foreach}
        defaults |= {"warmup_steps": warmup_steps, "r": r, "weight_lr_power": weight_lr_power}
        super().__init__(params, {**defaults, **_given(decay_at_z=decay_at_z, maximize=maximize)})

    def _beta(self, group: dict[str, Any]) -> float:
        return float(group["momentum"])

    def _direction(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        return grad


class AdamWScheduleFreeReference(ReferenceOptimizer):
    """`AdamWScheduleFree` in a form that is simple to modify, at twice the state.

    Example::

        import torch
        from schedulefree_cpp import AdamWScheduleFreeReference

        weights = torch.nn.Parameter(torch.zeros(8))
        optimizer = AdamWScheduleFreeReference([weights], lr=0.1)
        for _ in range(100):
            optimizer.zero_grad()
            (weights - 1).square().sum().backward()
            optimizer.step()
        optimizer.eval()

    Args:
        params: parameters, or dicts that define parameter groups.
        lr: learning rate, a float or a one-element tensor.
        betas: interpolation weight of ``y = beta*x + (1-beta)*z``, and decay rate of the mean squared
            gradient.
        eps: added to the root of the mean squared gradient.
        weight_decay: decay coefficient.
        warmup_steps: steps of linear learning-rate warmup.
        r: averaging weights grow as ``step**r``.
        weight_lr_power: averaging weights grow as ``lr_max**weight_lr_power``.
        decay_at_z: evaluate decay at ``z`` and not at ``y``.
        foreach: accepted for compatibility.
        inner_momentum: decay rate of a running mean that replaces the gradient in the update. At 0 no such
            mean is kept.
        maximize: maximize the objective.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: float = 0,
        r: float = 0,
        weight_lr_power: float = 2,
        decay_at_z: bool = False,
        foreach: bool | None = False,
        *,
        inner_momentum: float = 0.0,
        maximize: bool = False,
    ) -> None:
        """Builds the groups."""
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"warmup_steps": warmup_steps, "r": r, "weight_lr_power": weight_lr_power}
        defaults |= {"decay_at_z": decay_at_z}
        super().__init__(params, {**defaults, **_given(inner_momentum=inner_momentum, maximize=maximize)})

    def _beta(self, group: dict[str, Any]) -> float:
        return float(group["betas"][0])

    def _direction(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        t, beta2, inner = group["k"] + 1, group["betas"][1], group.get("inner_momentum", 0.0)
        v = state.setdefault("exp_avg_sq", torch.zeros_like(grad))
        v.copy_(beta2 * v + (1 - beta2) * grad * grad)
        m_hat = grad
        if inner:
            m = state.setdefault("exp_avg", torch.zeros_like(grad))
            m.copy_(inner * m + (1 - inner) * grad)
            m_hat = m / (1 - inner**t)
        denominator: Tensor = (v / (1 - beta2**t)).sqrt() + group["eps"]
        return m_hat / denominator
