"""The formats of ``csrc/storage.h`` in plain torch: for devices without kernels, and to convert a state.

A value is *wide* in the dtype of the arithmetic: float64 for a float64 parameter, otherwise float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
"""Elements that share a scale in a second moment of 8 bits."""


def dtype_of(p: Tensor) -> torch.dtype:
    """The dtype of the arithmetic for a parameter."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


# ---- parameters and base iterates ------------------------------------------------------------------------


class Storage(NamedTuple):
    """A format that has a low half, or none where ``join`` and ``split`` are None."""

    rounded: Callable[[Tensor], Tensor]  # the nearest wide value that the format has, of a float64
    join: Callable[[Tensor, Tensor], Tensor] | None = None
    split: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None  # of what rounded() has returned


def _bits(t: Tensor) -> Tensor:
    """The bits of a float32 as an int32, those of any NaN made canonical."""
    return torch.where(t.isnan(), 0x7FC00000, t.view(torch.int32))


def _join_bf16(word: Tensor, low: Tensor) -> Tensor:
    value = ((word.view(torch.int16).int() << 16) + low.int()).view(torch.float32)
    return torch.where(value.isnan(), word.float(), value)  # a low half of another word


def _split_bf16(wide: Tensor) -> tuple[Tensor, Tensor]:
    bits = _bits(wide)
    return ((bits + 0x8000) >> 16).short().view(torch.bfloat16), ((bits << 16) >> 16).short()


def _round_fp16(x: Tensor) -> Tensor:
    small = (x * 2.0**40).round() * 2.0**-40
    wide = torch.where(x.abs() < 2.0**-17, small, x).float()
    return torch.where(wide.abs() >= 65520, torch.copysign(torch.full_like(wide, torch.inf), wide), wide)


def _join_fp16(word: Tensor, low: Tensor) -> Tensor:
    bits = word.view(torch.int16).int()
    magnitude = bits & 0x7FFF
    count = (magnitude << 16) + low.int()
    normal = ((count >> 3) + 0x38000000).view(torch.float32)
    value = torch.where(count < 0x04000000, count.clamp(min=0).float() * 2.0**-40, normal)
    value = torch.where(bits < 0, -value, value)
    return torch.where(magnitude >= 0x7C00, word.float(), value)


def _split_fp16(wide: Tensor) -> tuple[Tensor, Tensor]:
    bits = wide.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    small = (torch.where(magnitude < 0x38800000, wide.abs(), 0.0) * 2.0**40).int()
    count = torch.where(magnitude < 0x38800000, small, (magnitude - 0x38000000) << 3)
    finite = magnitude < 0x7F800000
    special = torch.where(magnitude > 0x7F800000, 0x7E00, 0x7C00)
    word = torch.where(finite, (count + 0x8000) >> 16, special) | ((bits >> 16) & 0x8000)
    return word.short().view(torch.float16), torch.where(finite, (count << 16) >> 16, 0).short()


def _round_24(x: Tensor) -> Tensor:
    fraction, exponent = torch.frexp(x)
    unit = torch.ldexp(torch.ones_like(x), exponent.clamp_min(-125) - 16)
    wide = torch.where(x.isfinite(), (x / unit).round() * unit, x).float()
    return torch.copysign(wide, fraction.float())


def _join_24(word: Tensor, low: Tensor) -> Tensor:
    return _join_bf16(word, low.int() << 8)


def _split_24(wide: Tensor) -> tuple[Tensor, Tensor]:
    word, low = _split_bf16(wide)
    return word, (low >> 8).to(torch.int8)


FLOAT32 = Storage(Tensor.float)
FLOAT64 = Storage(Tensor.double)
SPLIT_BF16 = Storage(Tensor.float, _join_bf16, _split_bf16)
SPLIT_FP16 = Storage(_round_fp16, _join_fp16, _split_fp16)
SPLIT24 = Storage(_round_24, _join_24, _split_24)


def storage_of(t: Tensor, low: Tensor | None) -> Storage:
    """The format of a parameter or base iterate with this low half, or without one."""
    if low is None:
        return FLOAT64 if t.dtype == torch.float64 else FLOAT32
    if low.dtype == torch.int8:
        return SPLIT24
    return SPLIT_FP16 if t.dtype == torch.float16 else SPLIT_BF16


def load(t: Tensor, low: Tensor | None) -> Tensor:
    """The wide value of a parameter or base iterate."""
    join = storage_of(t, low).join
    return t.to(dtype_of(t)) if join is None or low is None else join(t, low)


def store(t: Tensor, low: Tensor | None, wide: Tensor) -> None:
    """Stores a wide value, rounded to the format."""
    storage = storage_of(t, low)
    if storage.split is None or low is None:
        t.copy_(wide)
        return
    word, rest = storage.split(storage.rounded(wide.double()))
    t.copy_(word)
    low.copy_(rest)


# ---- random numbers --------------------------------------------------------------------------------------


def _in_memory_order(t: Tensor) -> Tensor:
    """A view of a dense tensor whose elements are counted in the order of its memory."""
    strides = t.stride()
    order = sorted(range(t.ndim), key=lambda d: (-strides[d] if t.shape[d] != 1 else 0, d))
    return t.permute(order)


def _scrambled(x: Tensor) -> Tensor:
    """A permutation of 32 bits, in int64 (C. Wellons, "Prospecting for hash functions", lowbias32)."""
    mask = 0xFFFFFFFF
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & mask
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & mask
    return x ^ (x >> 16)


def random_bits(like: Tensor, k: int) -> Tensor:
    """Random bits (int64) for each element of a parameter in step ``k``, in the shape of the parameter.

    They are bits 12 to 31; below, there is a pattern.
    """
    mask = 0xFFFFFFFF
    key = _scrambled(torch.tensor((k + 1) & 0xFFFFFFFF, dtype=torch.int64)).to(like.device)
    ordered = _in_memory_order(like)
    element = torch.arange(like.numel(), device=like.device)
    bits = ((element & mask) + (element >> 32) * 0x9E3779B9 + key) & mask
    bits = (bits * 0x7FEB352D) & mask
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & mask
    result = torch.empty_like(like, dtype=torch.int64)
    _in_memory_order(result).copy_(bits.view(ordered.shape))
    return result


def rounded_at_random(wide: Tensor, random: Tensor) -> Tensor:
    """A float32 rounded to 16 significant bits by 8 random ones."""
    bits = wide.view(torch.int32)
    rounded = ((bits + random.int()) & ~0xFF).view(torch.float32)
    return torch.where(wide.isfinite(), rounded, wide)


# ---- a second moment of 8 bits ---------------------------------------------------------------------------


def scales_for(p: Tensor) -> int:
    """How many scales a second moment of 8 bits has."""
    return -(-p.numel() // BLOCK)


def _spread(scale: Tensor, like: Tensor) -> Tensor:
    """One value for each element, from one for each block, in the shape of a parameter."""
    ordered = _in_memory_order(like)
    values = scale.repeat_interleave(BLOCK)[: like.numel()]
    result = torch.empty_like(like, dtype=scale.dtype)
    _in_memory_order(result).copy_(values.view(ordered.shape))
    return result


CUT = 20
"""Low float32 bits that an 8-bit code drops."""

LARGEST = 0x7F800000 - (1 << CUT)
"""The bits of the largest float32 that has a code; larger values become that one."""


def largest_scale() -> float:
    """The scale of a block whose largest value is that of `LARGEST` or more."""
    scale = torch.empty(1, device="cpu")
    encode(torch.full((1,), torch.inf, device="cpu"), torch.empty(1, dtype=torch.uint8, device="cpu"), scale)
    return scale.item()


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The second moment (float32) of codes (uint8) and their scales."""
    return ((codes.int() << CUT) + _spread(scale.view(torch.int32), codes)).view(torch.float32)


def encode(v: Tensor, codes: Tensor, scale: Tensor, random: Tensor | None = None) -> None:
    """Writes the codes and scales of a second moment.

    Args:
        v: the second moment (float32).
        codes: written (uint8).
        scale: written (float32).
        random: of `random_bits`; None rounds to nearest.
    """
    order = torch.where(v.isnan(), torch.inf, v).view(torch.int32).clamp_max(LARGEST)
    flat = _in_memory_order(torch.empty_like(codes, dtype=torch.int32).copy_(order)).reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    most = (blocks.amax(1) + ((1 << CUT) - 1)) >> CUT if blocks.numel() else scale.int()
    least = torch.where(most > 255, most - 255, most.clamp_max(1))
    scale.copy_((least << CUT).view(torch.float32))
    added = 1 << (CUT - 1) if random is None else (random >> (32 - CUT)).int()
    codes.copy_((((order + added) >> CUT) - _spread(least, codes)).clamp_min(0))
