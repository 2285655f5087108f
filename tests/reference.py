"""The oracle: schedule-free SGD and AdamW in float64, storing x, y and z, written like the paper.

Defazio et al., "The Road Less Scheduled", arXiv 2405.15682, algorithm 1 and section 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Hyperparameters:
    """What a group is given; ``beta`` is ``momentum`` for SGD and ``betas[0]`` for AdamW."""

    adam: bool
    lr: float = 0.01
    beta: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 0
    r: float = 0.0
    weight_lr_power: float = 2.0
    decoupling_c: float = 0.0
    averaging_weight: float = 0.0
    inner_momentum: float = 0.0
    maximize: bool = False
    decay_at: str = "y"


@dataclass
class Iterate:
    """One parameter."""

    x: Tensor
    y: Tensor
    z: Tensor
    v: Tensor
    m: Tensor

    @classmethod
    def start(cls, p: Tensor) -> Iterate:
        """The state before the first step, where all iterates agree."""
        p = p.detach().double()
        return cls(p.clone(), p.clone(), p.clone(), torch.zeros_like(p), torch.zeros_like(p))


def update(
    it: Iterate, grad: Tensor, h: Hyperparameters, *, k: int, lr: float, c: float, beta: float
) -> Tensor:
    """One step of one parameter.

    Returns:
        One float32 unit in the last place of u, before weight decay: of u itself, or of the terms that m
        is made of, where they are larger.
    """
    g = -grad.double() if h.maximize else grad.double()
    u = g
    unit = ulp(u)
    if h.adam:
        t = k + 1
        old, new = h.inner_momentum * it.m, (1 - h.inner_momentum) * g
        it.m = old + new
        it.v = h.beta2 * it.v + (1 - h.beta2) * g * g
        m_hat = it.m / (1 - h.inner_momentum**t)
        v_hat = it.v / (1 - h.beta2**t)
        denominator = v_hat.sqrt() + h.eps
        u = m_hat / denominator
        unit = ulp(torch.maximum(old.abs(), new.abs())) / (1 - h.inner_momentum**t) / denominator
        unit = torch.maximum(unit, ulp(u)) if h.inner_momentum else ulp(u)
    decay_point = it.y if h.decay_at == "y" else it.z
    it.z = it.z - lr * (u + h.weight_decay * decay_point)
    it.x = (1 - c) * it.x + c * it.z
    it.y = beta * it.x + (1 - beta) * it.z
    return unit


@dataclass
class Reference:
    """The optimizer, for one group."""

    h: Hyperparameters
    iterates: list[Iterate]
    k: int = 0
    lr_max: float = -1.0
    weight_sum: float = 0.0
    scheduled_lr: float = 0.0
    history: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, params: list[Tensor], h: Hyperparameters) -> Reference:
        """The optimizer before its first step."""
        return cls(h, [Iterate.start(p) for p in params])

    def step(self, grads: list[Tensor]) -> None:
        """One step; ``h`` may have been changed since the last."""
        h = self.h
        warmup = (self.k + 1) / h.warmup_steps if self.k < h.warmup_steps else 1.0
        lr = self.scheduled_lr = h.lr * warmup
        self.lr_max = max(lr, self.lr_max)
        weight = (self.k + 1) ** h.r * self.lr_max**h.weight_lr_power
        self.weight_sum += weight
        c = weight / self.weight_sum if self.weight_sum else 0.0
        if h.decoupling_c:  # arXiv 2507.09846
            c = min(1.0, c * (1 - h.beta) * h.decoupling_c)
        if h.averaging_weight:  # arXiv 2512.17131
            c = h.averaging_weight
        for iterate, grad in zip(self.iterates, grads, strict=True):
            self.update(iterate, grad, lr=lr, c=c)
        self.k += 1

    def update(self, iterate: Iterate, grad: Tensor, *, lr: float, c: float) -> None:
        """One step of one parameter."""
        update(iterate, grad, self.h, k=self.k, lr=lr, c=c, beta=self.h.beta)


@dataclass
class MuonReference(Reference):
    """Schedule-free Muon for one group of matrices; ``h`` is that of SGD.

    Jordan et al., "Muon: An optimizer for hidden layers in neural networks"; by singular values, without a
    matrix product of the iteration. ``normalize_rows``: Apte et al., arXiv 2605.23061, algorithm 1.
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr_fn: str = "match_rms_adamw"
    normalize_rows: bool = False

    def update(self, iterate: Iterate, grad: Tensor, *, lr: float, c: float) -> None:
        """One step of one parameter: that of SGD with the orthogonalized mean in the gradient's place."""
        h = self.h
        g = (-grad if h.maximize else grad).double()
        iterate.m = self.momentum * iterate.m + (1 - self.momentum) * g
        n = self.momentum * iterate.m + (1 - self.momentum) * g if self.nesterov else iterate.m
        matrices = n if n.ndim == 3 else n.flatten(1).unsqueeze(0)
        rows, columns = matrices.shape[1:]
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        s = s / s.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-7)
        for _ in range(self.ns_steps):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        direction = u @ s.diag_embed() @ vh
        factor = 0.2 * math.sqrt(max(rows, columns))
        if self.adjust_lr_fn == "original":
            factor = max(1.0, math.sqrt(rows / columns))
        if self.normalize_rows:
            squares = iterate.v.view(len(matrices), rows, -1)[..., 0]  # of which one column is used
            squares.copy_(h.beta2 * squares + (1 - h.beta2) * (direction**2).mean(-1))
            direction = direction / (squares.sqrt() + h.eps).unsqueeze(-1)
            norm = (direction**2).sum((-2, -1), keepdim=True).sqrt()
            factor = 0.2 * math.sqrt(rows * columns) / norm
        h = replace(h, maximize=False)
        update(iterate, (factor * direction).view(grad.shape), h, k=self.k, lr=lr, c=c, beta=h.beta)


def ulp(x: Tensor) -> Tensor:
    """Distance to the next float32 above ``|x|``, in float64."""
    x = x.abs().float()
    return torch.nextafter(x, torch.full_like(x, math.inf)).double() - x.double()


@dataclass
class PlusReference:
    """ScheduleFree+ (arXiv 2605.19095), storing x, y and z; for one group."""

    iterates: list[Iterate]
    paper: bool
    options: dict[str, Any]
    k: int = 0
    ema: float = 0.0
    lr: float = 0.0
    lr_max: float = 1e-8
    weight_sum: float = 0.0

    @classmethod
    def of(cls, params: list[Tensor], *, paper: bool, **options: Any) -> PlusReference:
        """The optimizer before its first step; ``paper`` carries the corrected mean on, as its authors do."""
        return cls([Iterate.start(p) for p in params], paper, options)

    def step(self, grads: list[Tensor], loss: float) -> None:
        """One step."""
        o, t = self.options, self.k + 1
        beta = o["sf_beta1"]
        if o["sf_beta1_anneal_steps"]:
            done = min(self.k / o["sf_beta1_anneal_steps"], 1)
            beta = 1 - (1 - beta) ** (1 - done) * (1 - o["sf_beta1_max"]) ** done
        grads = [grad.double() for grad in grads]
        l1 = sum(grad.abs().sum().item() for grad in grads)
        ip = beta * sum((g * (it.z - it.x)).sum().item() for g, it in zip(grads, self.iterates, strict=True))
        self.ema = o["polyak_beta"] * self.ema + (1 - o["polyak_beta"]) * l1 * math.sqrt(math.pi / 2)
        corrected = self.ema / (1 - o["polyak_beta"] ** t)
        if self.paper:
            self.ema = corrected
        lr = self.lr = max(o["lr"], 1e-8) * max(0.0, loss + ip) / corrected
        self.lr_max = max(lr, self.lr_max)
        c = 1.0
        if self.k >= o["c_warmup"]:
            weight = t ** o["r"] * self.lr_max ** o["weight_lr_power"]
            self.weight_sum += weight
            c = weight / self.weight_sum
        beta1, beta2 = o["betas"]
        for g, it in zip(grads, self.iterates, strict=True):
            it.m = beta1 * it.m + (1 - beta1) * g
            it.v = beta2 * it.v + (1 - beta2) * g * g
            u = it.m / (1 - beta1**t) / ((it.v / (1 - beta2**t)).sqrt() + 1e-8)
            it.z = it.z - lr * lr * o["weight_decay"] * it.y - lr * u
            it.x = (1 - c) * it.x + c * it.z
            it.y = beta * it.x + (1 - beta) * it.z
        self.k = t


# ---- the whole family, with groups ---------------------------------------------------------------------


def annealed(k: int, first: float, last: float, steps: int) -> float:
    """ScheduleFree+'s beta at step k."""
    done = min(k / steps, 1) if steps else 0.0
    return 1 - (1 - first) ** (1 - done) * (1 - last) ** done


@dataclass
class GroupReference:
    """A group of any optimizer of the family: its hyperparameters by the names of its own group."""

    options: dict[str, Any]
    iterates: list[Iterate]
    k: int = 0
    lr_max: float = -1.0
    weight_sum: float = 0.0

    def lr_and_u(self, kind: str, g: Tensor, it: Iterate) -> tuple[float, Tensor]:
        """The factor of the learning rate, and u before decay; advances the moments."""
        if kind == "sgd":
            return 1.0, g
        o, t = self.options, self.k + 1
        inner = o.get("inner_momentum", 0.0) if kind != "plus" else o["betas"][0]
        beta2, eps = o["betas"][1], o["eps"]
        it.m = inner * it.m + (1 - inner) * g
        it.v = beta2 * it.v + (1 - beta2) * g * g
        if kind == "adamw_paper":
            return math.sqrt(1 - beta2**t), g / (it.v.sqrt() + eps)
        factor = self.radam_factor(beta2, t) if kind == "radam" else 1.0
        if factor is None:
            return (0.0 if o.get("silent_sgd_phase", True) else 1.0), g
        return factor, it.m / (1 - inner**t) / ((it.v / (1 - beta2**t)).sqrt() + eps)

    @staticmethod
    def radam_factor(beta2: float, t: int) -> float | None:
        """Liu et al., arXiv 1908.03265, algorithm 2; None where the variance cannot be estimated."""
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        if rho <= 4:
            return None
        return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))

    def step(self, kind: str, grads: list[Tensor | None], clip: float, factor: float, beta: float) -> None:
        """One step: ``beta`` is that of the next y, ``factor`` of the learning rate beside what is its own.

        A group none of whose parameters has a gradient takes none; but ScheduleFree+ has one step for all groups.
        """
        if kind != "plus" and all(g is None for g in grads):
            for it in self.iterates:
                it.y = beta * it.x + (1 - beta) * it.z
            return
        o = self.options
        sign = -1.0 if o.get("maximize", False) else 1.0
        warmup = o.get("warmup_steps", 0)
        own = (self.k + 1) / warmup if self.k < warmup else 1.0
        base = max(float(o["lr"]), o["eps"]) if kind == "plus" else float(o["lr"])
        scratch = Iterate.start(torch.zeros(1))
        of_kind, _ = GroupReference(o, [], self.k).lr_and_u(kind, torch.ones(1).double(), scratch)
        lr = base * own * factor * of_kind
        self.lr_max = max(lr, self.lr_max)
        c = 1.0
        if self.k >= o.get("c_warmup", 0):
            weight = (self.k + 1) ** o.get("r", 0.0) * self.lr_max ** o.get("weight_lr_power", 2.0)
            self.weight_sum += weight
            c = weight / self.weight_sum if self.weight_sum else 0.0
            if o.get("decoupling_c", 0.0):
                c = min(1.0, c * (1 - beta) * o["decoupling_c"])
            c = o.get("averaging_weight", 0.0) or c
        decay = float(o.get("weight_decay", 0.0)) * (lr if kind == "plus" else 1.0)
        for it, grad in zip(self.iterates, grads, strict=True):
            if grad is not None:
                _, u = self.lr_and_u(kind, sign * clip * grad.double(), it)
                it.z = it.z - lr * (u + decay * (it.y if o.get("decay_at", "y") == "y" else it.z))
                it.x = (1 - c) * it.x + c * it.z
            it.y = beta * it.x + (1 - beta) * it.z
        self.k += 1


@dataclass
class FamilyReference:
    """Any optimizer of the family in float64, storing x, y and z.

    ``kind`` is a name of ``ops.STEP_KINDS``. Parameters without a gradient rest: their x and z stay, and their
    y is that of the group's beta.
    """

    kind: str
    groups: list[GroupReference]
    ema: float = 0.0
    corrected: bool = False  # ScheduleFree+ whose running mean goes on from its corrected value

    def beta(self, group: GroupReference) -> float:
        """The interpolation weight of a group's next y."""
        if self.kind == "plus":
            first = self.groups[0]
            o = first.options
            return annealed(first.k, o["sf_beta1"], o["sf_beta1_max"], o["sf_beta1_anneal_steps"])
        o = group.options
        return float(o["momentum"] if "momentum" in o else o["betas"][0])

    def step(self, grads: list[list[Tensor | None]], loss: float = 0.0) -> None:
        """One step with the gradients of every group."""
        present = [g.double() for of_group in grads for g in of_group if g is not None]
        norm = math.sqrt(sum(float((g * g).sum()) for g in present))
        factor = self.polyak(grads, loss) if self.kind == "plus" else 1.0
        betas = [self.beta(group) for group in self.groups]
        for group, of_group, beta in zip(self.groups, grads, betas, strict=True):
            limit = group.options.get("max_grad_norm")
            clip = 1.0 if limit is None or math.isinf(limit) else limit / (norm + 1e-6)
            group.step(self.kind, of_group, 1.0 if clip > 1 else clip, factor, beta)

    def polyak(self, grads: list[list[Tensor | None]], loss: float) -> float:
        """ScheduleFree+'s factor of the learning rate."""
        first = self.groups[0]
        l1 = ip = 0.0
        for group, of_group in zip(self.groups, grads, strict=True):
            for g, it in zip(of_group, group.iterates, strict=True):
                if g is not None:
                    l1 += float(g.double().abs().sum())
                    ip += float((g.double() * (it.z - it.x)).sum())
        rate = first.options["polyak_beta"]
        self.ema = rate * self.ema + (1 - rate) * l1 * math.sqrt(math.pi / 2)
        mean = self.ema / (1 - rate ** (first.k + 1))
        if self.corrected:
            self.ema = mean
        return max(0.0, loss + self.beta(first) * ip) / mean if mean > 0 else 0.0
