"""The operators in plain torch, for devices that have no kernels.

The formula is that of ``csrc/update_math.h``, in several passes over memory and without fused roundings:
results agree with the kernels' to a few units in the last place, not bit for bit. Parameters that share
memory are not recognised.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from schedulefree_cpp._core import formats
from schedulefree_cpp._core.formats import Storage
from schedulefree_cpp._core.library import _C, CUDA_MISSING

TensorList = Sequence[Tensor]

# Dispatch keys of devices that may meet the fallback. Any other device is refused by name.
KEYS = ("CUDA", "XPU", "MPS", "HPU", "MTIA", "PrivateUse1")

_warned: set[str] = set()


def _begin(
    name: str, lists: Sequence[TensorList], parts: dict[str, TensorList], *others: Any, **scalars: Any
) -> None:
    """Checks a call as the kernels do, and warns of the first on a device.

    The tensors of one parameter must be on one device; different parameters may be on different devices.
    """
    for tensors in (*lists[1:], *parts.values()):
        for i, (t, first) in enumerate(zip(tensors, lists[0], strict=False)):
            if t.device != first.device and t.numel():
                raise RuntimeError(
                    f"schedulefree_cpp::{name}: tensor {i} of a list: expected device {first.device} like "
                    f"that of its parameter, got {t.device}"
                )
    shadows = [[_shadow(name, t) for t in tensors] for tensors in lists]
    of_parts = {part: [_shadow(name, t) for t in tensors] for part, tensors in parts.items()}
    getattr(torch.ops.schedulefree_cpp, name)(*shadows, *others, **of_parts, **scalars)
    device = lists[0][0].device.type if lists[0] else "cpu"
    if device not in _warned and lists[0]:
        _warned.add(device)
        reason = f" ({CUDA_MISSING})" if device == "cuda" else ""
        warnings.warn(
            f"schedulefree_cpp has no kernels for {device} here{reason}: steps on that device run as plain "
            "torch operations, which are slower and not bit-identical to the kernels. "
            "`python -m schedulefree_cpp` tells what has loaded.",
            RuntimeWarning,
            stacklevel=2,
        )


def _shadow(name: str, t: Tensor) -> Tensor:
    if t.layout is not torch.strided:
        raise RuntimeError(f"{name}: expected dense tensors, but got one of layout {t.layout}")
    reach = t.storage_offset() + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    needed, got = (reach + 1) * t.itemsize, t.untyped_storage().nbytes()
    if t.numel() and needed > got:
        raise RuntimeError(
            f"{name}: expected a storage of {needed} bytes or more, got one of {got}, which was made smaller "
            "than its tensor"
        )
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


# ---- parameters ----------------------------------------------------------------------------------------


def _each(*lists: TensorList) -> Iterator[tuple[Any, ...]]:
    """Tensors that belong together; None for those that a parameter does not have."""
    absent: list[None] = [None] * len(lists[0])
    for tensors in zip(*(tensors or absent for tensors in lists), strict=True):
        present = tensors[0].numel() > 0
        yield tuple(None if t is None or (present and not t.numel()) else t for t in tensors)


def _double(t: Tensor) -> Tensor:
    """In float64, which mps does not have."""
    return (t.cpu() if t.device.type == "mps" else t).double()


def _swapped(p: Tensor, z: Tensor, weight: float, storage: Storage) -> Tensor:
    """``p + weight * (z - p)`` in float64, rounded once to a parameter's format."""
    wide = _double(p)
    return storage.rounded(wide + weight * (_double(z) - wide)).to(device=p.device)


def _settled(y: Tensor, z: Tensor, beta: float, storage: Storage) -> Tensor:
    """The value that a swap to x and one back return; ``y`` where one of them is not finite."""
    y = storage.rounded(_double(y)).to(device=y.device)
    for _ in range(2):
        x = _swapped(y, z, _C.y_to_x_weight(beta)[0], storage)
        back = _swapped(x, z, _C.x_to_y_weight(beta)[0], storage)
        y = torch.where(back.isfinite(), back, y)
    return y


# ---- the operators -------------------------------------------------------------------------------------


def _apply(
    y: Tensor,
    y_lo: Tensor | None,
    z: Tensor,
    z_lo: Tensor | None,
    u: Tensor,
    c: dict[str, float],
    decay_at: int,
) -> None:
    wide, base = formats.load(y, y_lo), formats.load(z, z_lo)
    if c["weight_decay"]:
        u = u.add(wide if decay_at == 0 else base, alpha=c["weight_decay"])
    wide = wide.lerp(base, c["w"]).add_(u, alpha=c["a"])
    base = base.sub(u, alpha=c["lr"])
    storage, of_z = formats.storage_of(y, y_lo), formats.storage_of(z, z_lo)
    if c["stochastic"] and storage is formats.SPLIT24:
        random = formats.random_bits(y, int(c["k"]))
        wide = formats.rounded_at_random(wide, random >> 12 & 0xFF)
        base = formats.rounded_at_random(base, random >> 20 & 0xFF)
    base = of_z.rounded(_double(base)).to(device=z.device)
    formats.store(z, z_lo, base)
    formats.store(y, y_lo, _settled(wide, base, c["beta"], storage))


def _begin_step(
    name: str, lists: Sequence[TensorList], parts: dict[str, TensorList], coefs: Tensor, **options: Any
) -> dict[str, float]:
    """Checks a step, and reads its scalars on the host."""
    here = coefs.cpu()
    _begin(name, lists, parts, here, **options)
    return dict(zip(_C.COEFFICIENTS, here.tolist(), strict=True))


@torch.no_grad()
def sgd_step_(
    y: TensorList,
    y_lo: TensorList,
    grad: TensorList,
    z: TensorList,
    coefs: Tensor,
    z_lo: TensorList = (),
    *,
    decay_at: int = 0,
) -> None:
    """See :func:`schedulefree_cpp.ops.sgd_step_`."""
    lists, parts = (y, y_lo, grad, z), {"z_lo": z_lo}
    c = _begin_step("sgd_step_", lists, parts, coefs, decay_at=decay_at)
    if not c["take"]:
        return
    for p, lo, g, base, base_lo in _each(*lists, z_lo):
        u = g.to(formats.dtype_of(p)) * c["grad_mul"]
        _apply(p, lo, base, base_lo, u, c, decay_at)


@torch.no_grad()
def adamw_step_(
    y: TensorList,
    y_lo: TensorList,
    grad: TensorList,
    z: TensorList,
    exp_avg_sq: TensorList,
    exp_avg: TensorList,
    coefs: Tensor,
    z_lo: TensorList = (),
    exp_avg_sq_scale: TensorList = (),
    *,
    decay_at: int = 0,
) -> None:
    """See :func:`schedulefree_cpp.ops.adamw_step_`."""
    lists = (y, y_lo, grad, z, exp_avg_sq, exp_avg)
    parts = {"z_lo": z_lo, "exp_avg_sq_scale": exp_avg_sq_scale}
    c = _begin_step("adamw_step_", lists, parts, coefs, decay_at=decay_at)
    if not c["take"]:
        return
    for p, lo, gradient, base, v, m, base_lo, scale in _each(*lists, *parts.values()):
        g = gradient.to(formats.dtype_of(p)) * c["grad_mul"]
        # Scales and random bits count elements as the memory of the parameter does.
        codes = v if scale is None else torch.empty_like(p, dtype=v.dtype).copy_(v)
        mean = v if scale is None else formats.decode(codes, scale)
        mean.mul_(c["beta2"]).addcmul_(g, g, value=1 - c["beta2"])
        if m is not None:
            g = m.mul_(c["inner_momentum"]).add_(g, alpha=1 - c["inner_momentum"])
        denominator = mean.sqrt().mul_(c["denom_scale"]).add_(c["denom_eps"])
        if scale is not None:
            formats.encode(mean, codes, scale, formats.random_bits(codes, int(c["k"])))
            v.copy_(codes)
        _apply(p, lo, base, base_lo, g / denominator, c, decay_at)


@torch.no_grad()
def schedule_step_(*tensors: Tensor, **options: Any) -> None:
    """See :func:`schedulefree_cpp.ops.schedule_step_`. Runs on the CPU, where there is a kernel."""
    here = [t.cpu() for t in tensors]
    options = {name: v.cpu() if isinstance(v, Tensor) else v for name, v in options.items()}
    torch.ops.schedulefree_cpp.schedule_step_(*here, **options)
    for t, value in zip(tensors[:5], here[:5], strict=True):
        if value is not t:
            t.copy_(value)


def _swap(y: TensorList, y_lo: TensorList, z: TensorList, z_lo: TensorList, weight: float) -> None:
    for p, lo, base, base_lo in _each(y, y_lo, z, z_lo):
        storage = formats.storage_of(p, lo)
        x = _swapped(formats.load(p, lo), formats.load(base, base_lo), weight, storage)
        formats.store(p, lo, x)


@torch.no_grad()
def y_to_x_(y: TensorList, y_lo: TensorList, z: TensorList, *, z_lo: TensorList = (), beta: float) -> None:
    """See :func:`schedulefree_cpp.ops.y_to_x_`."""
    _begin("y_to_x_", (y, y_lo, z), {"z_lo": z_lo}, beta=beta)
    _swap(y, y_lo, z, z_lo, _C.y_to_x_weight(beta)[0])


@torch.no_grad()
def x_to_y_(y: TensorList, y_lo: TensorList, z: TensorList, *, z_lo: TensorList = (), beta: float) -> None:
    """See :func:`schedulefree_cpp.ops.x_to_y_`."""
    _begin("x_to_y_", (y, y_lo, z), {"z_lo": z_lo}, beta=beta)
    _swap(y, y_lo, z, z_lo, _C.x_to_y_weight(beta)[0])


@torch.no_grad()
def before_base_step_(
    y: TensorList, y_lo: TensorList, z: TensorList, coefs: Tensor, *, beta: float, exchange: bool = True
) -> None:
    """See :func:`schedulefree_cpp.ops.before_base_step_`."""
    c = _begin_step("before_base_step_", (y, y_lo, z), {}, coefs, beta=beta, exchange=exchange)
    if not c["take"]:
        return
    decay = c["lr"] * c["weight_decay"]
    for p, lo, base in _each(y, y_lo, z):
        wide = formats.load(p, lo)
        x = _swapped(wide, base, _C.y_to_x_weight(beta)[0], formats.storage_of(p, lo))
        decayed = base.sub(wide, alpha=decay) if decay else base.clone()
        formats.store(p, lo, decayed if exchange else x)
        base.copy_(x if exchange else decayed)


@torch.no_grad()
def after_base_step_(
    y: TensorList, y_lo: TensorList, z: TensorList, coefs: Tensor, *, exchange: bool = True
) -> None:
    """See :func:`schedulefree_cpp.ops.after_base_step_`."""
    c = _begin_step("after_base_step_", (y, y_lo, z), {}, coefs, exchange=exchange)
    if not c["take"]:
        return
    for p, lo, base in _each(y, y_lo, z):
        storage = formats.storage_of(p, lo)
        x, stepped = (base.clone(), p.clone()) if exchange else (formats.load(p, lo), base)
        # Where the other is not finite, lerp() has neither end.
        x = x if c["w"] == 0 else stepped if c["w"] == 1 else x.lerp(stepped, c["w"])
        new = _swapped(x, stepped, _C.x_to_y_weight(c["beta"])[0], storage)
        formats.store(p, lo, _settled(new, stepped, c["beta"], storage))
        base.copy_(stepped)


@torch.no_grad()
def polyak_sums(
    y: TensorList, y_lo: TensorList, grad: TensorList, z: TensorList, *, z_lo: TensorList = ()
) -> Tensor:
    """See :func:`schedulefree_cpp.ops.polyak_sums`."""
    _begin("polyak_sums", (y, y_lo, grad, z), {"z_lo": z_lo})
    sums = torch.zeros(2, dtype=torch.float64, device=_double(y[0]).device)
    for p, lo, g, base, base_lo in _each(y, y_lo, grad, z, z_lo):
        wide = _double(g)
        sums[0] += wide.abs().sum().to(sums.device)
        apart = _double(formats.load(base, base_lo)) - _double(formats.load(p, lo))
        sums[1] += (wide * apart).sum().to(sums.device)
    return sums


@torch.no_grad()
def grad_norm(grad: TensorList) -> Tensor:
    """See :func:`schedulefree_cpp.ops.grad_norm`."""
    _begin("grad_norm", (grad,), {})
    home = _double(grad[0]).device
    squares = [_double(g).square().sum().to(home) for g in grad]
    return torch.stack(squares).sum().sqrt()


OPERATORS: dict[str, Callable[..., Any]] = {
    "sgd_step_": sgd_step_,
    "adamw_step_": adamw_step_,
    "schedule_step_": schedule_step_,
    "y_to_x_": y_to_x_,
    "x_to_y_": x_to_y_,
    "before_base_step_": before_base_step_,
    "after_base_step_": after_base_step_,
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
