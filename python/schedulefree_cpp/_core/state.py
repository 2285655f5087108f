"""The tensors of a state: which there are, in which dtypes, and how they follow their parameter.

:data:`TENSORS` is the one list of them. New state, conversion, checks of state dicts and the operators' lists come
from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from schedulefree_cpp._core import formats
from schedulefree_cpp._core.formats import dtype_of
from schedulefree_cpp._core.hyperparameters import PARAMETER_DTYPES
from schedulefree_cpp._core.types import State


class Bits(NamedTuple):
    """In how many bits a group keeps its state."""

    state: int = 32  # 24 for a bfloat16 parameter and its z in 24 bits each
    moment: int = 32  # or 8: those of exp_avg_sq


def bits_of(group: Mapping[str, Any]) -> Bits:
    """The bits of a parameter group."""
    return Bits(group.get("state_bits", 32), group.get("exp_avg_sq_bits", 32))


# ---- the table -----------------------------------------------------------------------------------------


def _low(p: Tensor, bits: Bits) -> torch.dtype | None:
    if p.dtype == torch.bfloat16:
        return torch.int8 if bits.state == 24 else torch.int16
    return torch.int16 if p.dtype == torch.float16 else None


def _low_of_z(p: Tensor, bits: Bits) -> torch.dtype | None:
    return torch.int8 if _low(p, bits) == torch.int8 else None


def _base(p: Tensor, bits: Bits) -> torch.dtype:
    return p.dtype if _low(p, bits) == torch.int8 else dtype_of(p)


def _wide(p: Tensor, bits: Bits) -> torch.dtype:
    return dtype_of(p)


def _has_codes(p: Tensor, bits: Bits) -> bool:
    """True for a second moment in 8 bits. Raises RuntimeError for one that would be sharded."""
    if bits.moment != 8 or dtype_of(p) != torch.float32:
        return False
    if type(p.data) is not Tensor:
        raise RuntimeError(
            f"exp_avg_sq_bits=8: expected a plain parameter, got {type(p.data).__name__}, with which the "
            "scales of 128 elements each cannot be sharded"
        )
    return True


def _second_moment(p: Tensor, bits: Bits) -> torch.dtype:
    return torch.uint8 if _has_codes(p, bits) else dtype_of(p)


def _scale(p: Tensor, bits: Bits) -> torch.dtype | None:
    return torch.float32 if _has_codes(p, bits) else None


class StateTensor(NamedTuple):
    """A tensor of a state."""

    dtype_for: Callable[[Tensor, Bits], torch.dtype | None]  # None for a parameter without it
    integers: tuple[torch.dtype, ...] = ()  # those that a state dict may hold
    floating: bool = True  # a state dict may hold any floating-point dtype
    optional_of: str | None = None  # the tensor beside which some parameters have this one
    shaped: bool = True  # it has the shape of its parameter


TENSORS: dict[str, StateTensor] = {
    "z": StateTensor(_base),
    "exp_avg_sq": StateTensor(_second_moment, (torch.uint8,)),
    "exp_avg": StateTensor(_wide),
    "momentum_buffer": StateTensor(_wide),
    "y_lo": StateTensor(_low, (torch.int16, torch.int8), floating=False, optional_of="z"),
    "z_lo": StateTensor(_low_of_z, (torch.int8,), floating=False, optional_of="z"),
    "exp_avg_sq_scale": StateTensor(_scale, optional_of="exp_avg_sq", shaped=False),
}

OPTIONAL = tuple(name for name, tensor in TENSORS.items() if tensor.optional_of)

_SCALE = "exp_avg_sq_scale"
_CONVERTED = {"z", "exp_avg_sq", *OPTIONAL}

NO_TENSOR = torch.empty(0, device="cpu")
"""Placeholder in an operator's list for a parameter without this tensor."""


# ---- state beside its parameter --------------------------------------------------------------------------


@torch.no_grad()
def new_state(p: Tensor, names: Iterable[str], bits: Bits) -> State:
    """The state before the first step: z is the parameter, moments are 0.

    Args:
        p: the parameter, only read.
        names: the tensors of the operator's lists, ``z`` among them.
        bits: those of the group.

    Raises:
        RuntimeError: for a parameter that no operator takes, or a second moment of 8 bits that would be sharded.
    """
    if p.dtype not in PARAMETER_DTYPES:
        raise RuntimeError(
            f"a parameter of dtype {p.dtype} has a gradient: expected None, or a dtype of "
            f"{', '.join(map(str, PARAMETER_DTYPES))}"
        )
    state: State = {}
    for name, tensor in TENSORS.items():
        if (tensor.optional_of or name) not in names:
            continue
        dtype = tensor.dtype_for(p, bits)
        if dtype is None:
            continue
        if name == _SCALE:
            state[name] = torch.zeros(formats.scales_for(p), dtype=dtype, device=p.device)
        elif name == "z":
            state[name] = torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(p)
        else:
            state[name] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
    return state


def fits(p: Tensor, state: State, bits: Bits) -> bool:
    """True where a state is on the device, and in the formats, of its parameter as it is now.

    Raises:
        RuntimeError: for a second moment of 8 bits beside a parameter that is sharded.
    """
    device, wide = p.device, dtype_of(p)
    for name, value in state.items():
        if not isinstance(value, Tensor):
            continue
        known = TENSORS.get(name)
        expected = known.dtype_for(p, bits) if known else wide if value.is_floating_point() else value.dtype
        if value.dtype != expected or value.device != device:
            return False
    for name in OPTIONAL:
        known = TENSORS[name]
        if name not in state and known.optional_of in state and known.dtype_for(p, bits) is not None:
            return False
    return _SCALE not in state or _in_order_of(state["exp_avg_sq"], p)


def _in_order_of(codes: Tensor, p: Tensor) -> bool:
    """True where codes lie in the order of a parameter's memory, in which scales count the elements."""
    strides = codes.stride()
    return bool(strides == p.stride() or strides == torch.empty_like(p, device="meta").stride())


@torch.no_grad()
def convert(p: Tensor, state: State, bits: Bits) -> bool:
    """Moves and converts a state, in place, until it fits its parameter. Returns True where that changed it.

    Raises:
        RuntimeError: for a second moment of 8 bits beside a parameter that is sharded.
    """
    if fits(p, state, bits):
        return False
    wide = dtype_of(p)
    before = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    tensors = {name: value.to(p.device) for name, value in before.items()}
    converted = {
        name: value.to(wide) if value.is_floating_point() else value
        for name, value in tensors.items()
        if name not in _CONVERTED
    }
    low = _low(p, bits)
    if low is not None:
        converted["y_lo"] = _converted_low(p, tensors.get("y_lo"), low)
    if "z" in tensors:
        converted |= _converted_z(p, tensors["z"], tensors.get("z_lo"), bits)
    if "exp_avg_sq" in tensors:
        converted |= _converted_moment(p, tensors["exp_avg_sq"], tensors.get(_SCALE), bits)
    for name in before:
        del state[name]
    state.update(converted)
    return True


def _converted_low(p: Tensor, low: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A low half of a bfloat16 in another width, exact or to nearest; zeros where there was none."""
    if low is None:
        return torch.zeros_like(p, dtype=dtype, requires_grad=False)
    if low.dtype == dtype:
        return low
    if dtype == torch.int16:
        return low.short() << 8
    return ((low.int() + 128) >> 8).clamp(-128, 127).to(torch.int8)


def _converted_z(p: Tensor, z: Tensor, z_lo: Tensor | None, bits: Bits) -> State:
    if _low_of_z(p, bits) is None:
        return {"z": (z if z_lo is None else formats.load(z, z_lo)).to(dtype_of(p))}
    if z_lo is None:
        wide = z
        z, z_lo = (torch.empty_like(wide, dtype=dtype) for dtype in (torch.bfloat16, torch.int8))
        formats.store(z, z_lo, wide)
    return {"z": z, "z_lo": z_lo}


def _converted_moment(p: Tensor, v: Tensor, scale: Tensor | None, bits: Bits) -> State:
    wide = dtype_of(p)
    if not _has_codes(p, bits):
        return {"exp_avg_sq": v.to(wide) if scale is None else formats.decode(v, scale).to(wide)}
    if scale is None or not _in_order_of(v, p):
        mean = v if scale is None else formats.decode(v, scale)
        v = torch.empty_like(p, dtype=torch.uint8, requires_grad=False)
        scale = torch.empty(formats.scales_for(p), dtype=torch.float32, device=p.device)
        formats.encode(mean.float(), v, scale)
    return {"exp_avg_sq": v, _SCALE: scale}


# ---- the operators' lists ----------------------------------------------------------------------------------


def optional_list(states: Sequence[State], name: str) -> list[Tensor]:
    """An operator's list of a tensor that only some formats have; empty where no parameter has it."""
    if any([name in state for state in states]):
        return [state.get(name, NO_TENSOR) for state in states]
    return []
