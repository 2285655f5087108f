"""The operators in plain torch, for devices that have no kernels.

The formula is that of ``csrc/update_math.h``, in several passes over memory and without fused roundings:
results agree with the kernels' to a few units in the last place, not bit for bit. Memory that parameters
share is not seen.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from schedulefree_cpp._library import _C, CUDA_MISSING

TensorList = Sequence[Tensor]

# Dispatch keys of devices that may meet the fallback. Any other device is refused by name.
KEYS = ("CUDA", "XPU", "MPS", "HPU", "MTIA", "PrivateUse1")

_warned: set[str] = set()


def _begin(name: str, lists: Sequence[TensorList], *others: Tensor, **scalars: Any) -> None:
    """Checks a call as the kernels do, and warns of the first on a device.

    What belongs to one parameter must be on one device; parameters may be on several.
    """
    for tensors in lists[1:]:
        for i, (t, first) in enumerate(zip(tensors, lists[0], strict=False)):
            if t.device != first.device:
                raise RuntimeError(
                    f"schedulefree_cpp::{name}: tensor {i} of a list: expected device {first.device} like "
                    f"that of its parameter, got {t.device}"
                )
    shadows = [[_shadow(name, t) for t in tensors] for tensors in lists]
    scalars = {key: _shadow(name, v) if isinstance(v, Tensor) else v for key, v in scalars.items()}
    _operator(name)(*shadows, *(_shadow(name, t) for t in others), **scalars)
    device = lists[0][0].device.type
    if device not in _warned:
        _warned.add(device)
        reason = f" ({CUDA_MISSING})" if device == "cuda" else ""
        warnings.warn(
            f"schedulefree_cpp has no kernels for {device} here{reason}: steps on that device run as plain "
            "torch operations, which are slower and not bit-identical to the kernels. "
            "`python -m schedulefree_cpp` tells what has loaded.",
            RuntimeWarning,
            stacklevel=2,
        )


def _operator(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.schedulefree_cpp, packet), overload or "default")


def _shadow(name: str, t: Tensor) -> Tensor:
    if t.layout is not torch.strided:
        raise RuntimeError(f"{name}: expected dense tensors, but got one of layout {t.layout}")
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


# ---- 16-bit parameters -------------------------------------------------------------------------------


def _load(y: Tensor, lo: Tensor | None) -> Tensor:
    """A parameter in the precision of the arithmetic: itself where that is its own."""
    if lo is not None:
        return ((y.view(torch.int16).int() << 16) + lo.int()).view(torch.float32)
    return y if y.dtype in (torch.float32, torch.float64) else y.float()


def _store(y: Tensor, lo: Tensor | None, wide: Tensor) -> None:
    """The way back. A bfloat16 with a low half is rounded to nearest, ties away from zero."""
    if lo is None:
        if wide is not y:
            y.copy_(wide)
        return
    bits = wide.view(torch.int32)
    bits = torch.where(wide.isnan(), 0x7FC00000, bits)
    y.view(torch.int16).copy_((bits + 0x8000) >> 16)
    lo.copy_((bits << 16) >> 16)


def _each(y: TensorList, y_lo: TensorList, *lists: TensorList) -> Iterator[tuple[Any, ...]]:
    """Tensors that belong together; None for those of an absent list."""
    absent: list[None] = [None] * len(y)
    return zip(y, y_lo or absent, *(tensors or absent for tensors in lists), strict=True)


def _list(lo: Tensor | None) -> list[Tensor]:
    return [] if lo is None else [lo]


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Where two have equal bits; NaNs are all one."""
    return ((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())


# ---- the operators -----------------------------------------------------------------------------------


def _scaled(grad: Tensor, z: Tensor, scalars: dict[str, Any]) -> Tensor:
    """The gradient as it counts, in the precision of the arithmetic. The host does not read its norm."""
    scaled = grad.to(z.dtype)
    factor, norm, limit = scalars["grad_mul"], scalars["grad_norm"], scalars["max_grad_norm"]
    if norm is None or limit == math.inf:
        return scaled.mul(factor)
    clipped = (limit / (norm.view(()) + 1e-6)).clamp(max=1) * factor
    return scaled.mul(clipped.to(z.dtype).to(z.device))


def _apply(y: Tensor, lo: Tensor | None, z: Tensor, u: Tensor, scalars: dict[str, Any]) -> None:
    wide = _load(y, lo)
    if scalars["weight_decay"]:
        u = u.add(wide if scalars["decay_at"] == 0 else z, alpha=scalars["weight_decay"])
    _store(y, lo, wide.lerp_(z, scalars["w"]).add_(u, alpha=scalars["a"]))
    z.sub_(u, alpha=scalars["lr"])


_DEFAULTS = {
    "weight_decay": 0.0,
    "decay_at": 0,
    "grad_mul": 1.0,
    "grad_norm": None,
    "max_grad_norm": None,
}


@torch.no_grad()
def sgd_step_(y: TensorList, y_lo: TensorList, grad: TensorList, z: TensorList, **scalars: Any) -> None:
    """See :func:`schedulefree_cpp.ops.sgd_step_`."""
    _begin("sgd_step_", (y, y_lo, grad, z), **scalars)
    _sgd_step((y, y_lo, grad, z), scalars)


def _sgd_step(lists: tuple[TensorList, ...], scalars: dict[str, Any]) -> None:
    scalars = _DEFAULTS | scalars
    for p, lo, g, base in _each(*lists):
        _apply(p, lo, base, _scaled(g, base, scalars), scalars)


@torch.no_grad()
def adamw_step_(
    y: TensorList,
    y_lo: TensorList,
    grad: TensorList,
    z: TensorList,
    exp_avg_sq: TensorList,
    exp_avg: TensorList,
    **scalars: Any,
) -> None:
    """See :func:`schedulefree_cpp.ops.adamw_step_`."""
    lists = (y, y_lo, grad, z, exp_avg_sq, exp_avg)
    _begin("adamw_step_", lists, **scalars)
    _adamw_step(lists, scalars)


def _adamw_step(lists: tuple[TensorList, ...], scalars: dict[str, Any]) -> None:
    scalars = _DEFAULTS | scalars
    for p, lo, gradient, base, v, m in _each(*lists):
        g = _scaled(gradient, base, scalars)
        v.mul_(scalars["beta2"]).addcmul_(g, g, value=1 - scalars["beta2"])
        if m is not None:
            g = m.mul_(scalars["inner_momentum"]).add_(g, alpha=1 - scalars["inner_momentum"])
        denominator = v.sqrt().mul_(scalars["denom_scale"]).add_(scalars["denom_eps"])
        _apply(p, lo, base, g / denominator, scalars)


def _scalars_of(coefs: Tensor, decay_at: int) -> dict[str, Any] | None:
    """What the operators without ``coefs`` take as scalars; None where the step is to be skipped."""
    scalars: dict[str, Any] = dict(zip(_C.COEFFICIENTS, coefs.tolist(), strict=True))
    return {**scalars, "decay_at": decay_at} if scalars["take"] else None


@torch.no_grad()
def sgd_step_capturable_(
    y: TensorList,
    y_lo: TensorList,
    grad: TensorList,
    z: TensorList,
    coefs: Tensor,
    *,
    decay_at: int = 0,
) -> None:
    """See :func:`schedulefree_cpp.ops.sgd_step_capturable_`. Here the host reads ``coefs``."""
    if not y:
        return
    lists = (y, y_lo, grad, z)
    _begin("sgd_step_.capturable", lists, coefs, decay_at=decay_at)
    scalars = _scalars_of(coefs, decay_at)
    if scalars is not None:
        _sgd_step(lists, scalars)


@torch.no_grad()
def adamw_step_capturable_(
    y: TensorList,
    y_lo: TensorList,
    grad: TensorList,
    z: TensorList,
    exp_avg_sq: TensorList,
    exp_avg: TensorList,
    coefs: Tensor,
    *,
    decay_at: int = 0,
) -> None:
    """See :func:`schedulefree_cpp.ops.adamw_step_capturable_`. Here the host reads ``coefs``."""
    if not y:
        return
    lists = (y, y_lo, grad, z, exp_avg_sq, exp_avg)
    _begin("adamw_step_.capturable", lists, coefs, decay_at=decay_at)
    scalars = _scalars_of(coefs, decay_at)
    if scalars is not None:
        _adamw_step(lists, scalars)


@torch.no_grad()
def schedule_step_(*tensors: Tensor, **options: Any) -> None:
    """See :func:`schedulefree_cpp.ops.schedule_step_`. Runs on the CPU, where there is a kernel."""
    here = [t.cpu() for t in tensors]
    options = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in options.items()}
    torch.ops.schedulefree_cpp.schedule_step_(*here, **options)
    for t, value in zip(tensors[:6], here[:6], strict=True):
        if value is not t:
            t.copy_(value)


def _swap(y: TensorList, y_lo: TensorList, z: TensorList, weight: float) -> None:
    for p, lo, base in _each(y, y_lo, z):
        _store(p, lo, _load(p, lo).lerp_(base, weight))


@torch.no_grad()
def y_to_x_(y: TensorList, y_lo: TensorList, z: TensorList, *, beta: float) -> None:
    """See :func:`schedulefree_cpp.ops.y_to_x_`."""
    _begin("y_to_x_", (y, y_lo, z), beta=beta)
    _swap(y, y_lo, z, _C.y_to_x_weight(beta))


@torch.no_grad()
def x_to_y_(y: TensorList, y_lo: TensorList, z: TensorList, *, beta: float) -> None:
    """See :func:`schedulefree_cpp.ops.x_to_y_`."""
    _begin("x_to_y_", (y, y_lo, z), beta=beta)
    _swap(y, y_lo, z, _C.x_to_y_weight(beta))


@torch.no_grad()
def y_to_x_keep_(
    y: TensorList, y_lo: TensorList, z: TensorList, *, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`schedulefree_cpp.ops.y_to_x_keep_`. Keeps every element that the way back would miss."""
    _begin("y_to_x_", (y, y_lo, z), beta=beta)
    if y[0].device.type == "mps":  # which has no float64 to keep values in
        _swap(y, y_lo, z, _C.y_to_x_weight(beta))
        return (
            torch.empty(0, dtype=torch.int64),
            torch.empty(0, dtype=torch.float64),
            torch.zeros(len(y)).long(),
        )
    home = y[0].device
    at, value = [], []
    for p, lo, base in _each(y, y_lo, z):
        before = _load(p, lo).clone()
        _swap([p], _list(lo), [base], _C.y_to_x_weight(beta))
        again, again_lo = p.clone(), None if lo is None else lo.clone()
        _swap([again], _list(again_lo), [base], _C.x_to_y_weight(beta))
        after = _load(again, again_lo)
        lost = ((~_same(after, before)).flatten().nonzero()).flatten()
        at.append(lost.to(home))
        value.append(before.flatten()[lost].double().to(home))
    count = torch.tensor([len(positions) for positions in at], device=home)
    return torch.cat(at), torch.cat(value), count


@torch.no_grad()
def x_to_y_restore_(
    y: TensorList, y_lo: TensorList, z: TensorList, at: Tensor, value: Tensor, count: Tensor, *, beta: float
) -> None:
    """See :func:`schedulefree_cpp.ops.x_to_y_restore_`."""
    if not y:
        return
    _begin("x_to_y_restore_", (y, y_lo, z), at, value, count, beta=beta)
    counts = count.tolist()
    if min(counts) < 0 or sum(counts) != len(at):
        raise RuntimeError(
            f"schedulefree_cpp::x_to_y_restore_: count: expected a sum of {len(at)} like the length of at, "
            f"got {counts}"
        )
    pieces = list(zip(torch.split(at, counts), torch.split(value, counts), strict=True))
    for i, (p, (positions, _)) in enumerate(zip(y, pieces, strict=True)):
        inside = positions.numel() == 0 or bool((positions.min() >= 0) & (positions.max() < p.numel()))
        if not inside or bool((positions.diff() <= 0).any()):
            raise RuntimeError(
                "schedulefree_cpp::x_to_y_restore_: at: expected ascending positions from 0 to "
                f"{p.numel() - 1} for y[{i}]"
            )
    for (p, lo, base), (positions, kept) in zip(_each(y, y_lo, z), pieces, strict=True):
        positions, kept = positions.to(p.device), kept.to(p.device)
        old = _load(p, lo).clone().flatten()[positions]
        _swap([p], _list(lo), [base], _C.x_to_y_weight(beta))
        # Elements that are no longer what the kept value became have been changed in between.
        kept = kept.to(old.dtype)
        trip = torch.empty_like(old, dtype=p.dtype)
        trip_lo = None if lo is None else torch.empty_like(old, dtype=lo.dtype)
        _store(trip, trip_lo, kept)
        _swap([trip], _list(trip_lo), [base.flatten()[positions]], _C.y_to_x_weight(beta))
        same = _same(_load(trip, trip_lo), old)
        flat = _load(p, lo).flatten().clone()
        flat[positions[same]] = kept[same]
        _store(p, lo, flat.view(p.shape))


@torch.no_grad()
def polyak_sums(y: TensorList, y_lo: TensorList, grad: TensorList, z: TensorList) -> Tensor:
    """See :func:`schedulefree_cpp.ops.polyak_sums`."""
    _begin("polyak_sums", (y, y_lo, grad, z))
    sums = torch.zeros(2, dtype=torch.float64, device=_double(y[0]).device)
    for p, lo, g, base in _each(y, y_lo, grad, z):
        wide = _double(g)
        sums[0] += wide.abs().sum().to(sums.device)
        sums[1] += (wide * (_double(base) - _double(_load(p, lo)))).sum().to(sums.device)
    return sums


@torch.no_grad()
def grad_norm(grad: TensorList) -> Tensor:
    """See :func:`schedulefree_cpp.ops.grad_norm`."""
    _begin("grad_norm", (grad,))
    home = _double(grad[0]).device
    squares = [_double(g).square().sum().to(home) for g in grad]
    return torch.stack(squares).sum().sqrt()


def _double(t: Tensor) -> Tensor:
    return (t.cpu() if t.device.type == "mps" else t).double()


OPERATORS: dict[str, Callable[..., Any]] = {
    "sgd_step_": sgd_step_,
    "adamw_step_": adamw_step_,
    "sgd_step_.capturable": sgd_step_capturable_,
    "adamw_step_.capturable": adamw_step_capturable_,
    "schedule_step_": schedule_step_,
    "y_to_x_": y_to_x_,
    "x_to_y_": x_to_y_,
    "y_to_x_keep_": y_to_x_keep_,
    "x_to_y_restore_": x_to_y_restore_,
    "polyak_sums": polyak_sums,
    "grad_norm": grad_norm,
}


def register(fragment: torch.library.Library, keys: Sequence[str] = KEYS) -> None:
    """Registers the operators for devices that have no kernels of their own.

    Args:
        fragment: a library of the namespace ``schedulefree_cpp``.
        keys: dispatch keys of the devices.
    """
    for name, function in OPERATORS.items():
        for key in keys:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"schedulefree_cpp::{name}", key):
                fragment.impl(name, function, key)  # type: ignore[no-untyped-call]
