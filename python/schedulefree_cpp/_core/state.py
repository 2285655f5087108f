"""The tensors of a state: which there are, in which dtypes, and how they follow their parameter.

`TENSORS` is the one list of them, for new state, conversion and the checks of state dicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from schedulefree_cpp._core import formats
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


def _wide(dtype: torch.dtype, bits: Bits) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _low(dtype: torch.dtype, bits: Bits) -> torch.dtype | None:
    if dtype == torch.bfloat16 and bits.state == 24:
        return torch.int8
    return torch.int16 if dtype in (torch.bfloat16, torch.float16) else None


def _low_of_z(dtype: torch.dtype, bits: Bits) -> torch.dtype | None:
    return torch.int8 if _low(dtype, bits) == torch.int8 else None


def _base(dtype: torch.dtype, bits: Bits) -> torch.dtype:
    return _wide(dtype, bits) if _low_of_z(dtype, bits) is None else dtype


def _scale(dtype: torch.dtype, bits: Bits) -> torch.dtype | None:
    return torch.float32 if bits.moment == 8 and dtype != torch.float64 else None


def _second_moment(dtype: torch.dtype, bits: Bits) -> torch.dtype:
    return _wide(dtype, bits) if _scale(dtype, bits) is None else torch.uint8


def matrix_shape(p: Tensor) -> tuple[int, ...]:
    """The shape as which Muon sees a parameter: a matrix, or a batch of them where it has three dimensions.

    Weights of convolutions, of more dimensions, are matrices with a row for each output channel.
    """
    return tuple(p.shape) if p.ndim <= 3 else (p.shape[0], math.prod(p.shape[1:]))


class StateTensor(NamedTuple):
    """A tensor of a state."""

    dtype_for: Callable[[torch.dtype, Bits], torch.dtype | None]  # of the parameter's; None where it has none
    integers: tuple[torch.dtype, ...] = ()  # those that a state dict may hold
    floating: bool = True  # a state dict may hold any floating-point dtype
    beside: str | None = None  # the tensor beside which some parameters have this one
    shape_for: Callable[[Tensor], tuple[int, ...]] | None = None  # None: the shape of its parameter


TENSORS: dict[str, StateTensor] = {
    "z": StateTensor(_base),
    "exp_avg_sq": StateTensor(_second_moment, (torch.uint8,)),
    "exp_avg": StateTensor(_wide),
    "momentum_buffer": StateTensor(_wide),
    "row_exp_avg_sq": StateTensor(_wide, shape_for=lambda p: matrix_shape(p)[:-1]),
    "x": StateTensor(_wide),  # of a class that stores it, and so on
    "y": StateTensor(_wide),
    "y_lo": StateTensor(_low, (torch.int16, torch.int8), floating=False, beside="z"),
    "z_lo": StateTensor(_low_of_z, (torch.int8,), floating=False, beside="z"),
    "exp_avg_sq_scale": StateTensor(
        _scale, beside="exp_avg_sq", shape_for=lambda p: (formats.scales_for(p),)
    ),
}

_SCALE = "exp_avg_sq_scale"
_CONVERTED = {"z", "exp_avg_sq", "y_lo", "z_lo", _SCALE}

NO_TENSOR = torch.empty(0, device="cpu")
"""Placeholder in an operator's list for a parameter without this tensor."""

# The dtype of each low half's parameter: bfloat16 and float16 both have halves of int16, and each its own.
_homes: MutableMapping[Tensor, torch.dtype] = WeakTensorKeyDictionary()


def note_format(p: Tensor, low: Tensor) -> None:
    """Notes that a low half is that of a parameter as it is now, unless that of another dtype is known."""
    _homes.setdefault(low, p.dtype)


_dtypes: dict[tuple[torch.dtype, Bits], dict[str, torch.dtype | None]] = {}


def _dtypes_for(p: Tensor, bits: Bits) -> dict[str, torch.dtype | None]:
    """The dtypes of all tensors of `TENSORS` beside a parameter."""
    key = p.dtype, bits
    if key not in _dtypes:
        _dtypes[key] = {name: tensor.dtype_for(*key) for name, tensor in TENSORS.items()}
    _require_unsharded(p, bits)
    return _dtypes[key]


def _require_unsharded(p: Tensor, bits: Bits) -> None:
    """Raises RuntimeError for a second moment of 8 bits that would be sharded."""
    if bits.moment == 8 and p.dtype != torch.float64 and type(p.data) is not Tensor:
        raise RuntimeError(
            f"exp_avg_sq_bits=8: expected a plain parameter, got {type(p.data).__name__}, with which the "
            "scales of 128 elements each cannot be sharded"
        )


# ---- state beside its parameter --------------------------------------------------------------------------


@torch.no_grad()
def new_state(p: Tensor, names: Iterable[str], bits: Bits) -> State:
    """The state before the first step: z is the parameter, moments are 0.

    Args:
        p: the parameter, only read.
        names: the tensors of the operator's lists, ``z`` among them.
        bits: those of the group.

    Raises:
        RuntimeError: for a parameter that no operator takes, or a sharded second moment of 8 bits.
    """
    if p.dtype not in PARAMETER_DTYPES:
        raise RuntimeError(
            f"a parameter of dtype {p.dtype} has a gradient: expected None, or a dtype of "
            f"{', '.join(map(str, PARAMETER_DTYPES))}"
        )
    state: State = {}
    for name, tensor in TENSORS.items():
        dtype = tensor.dtype_for(p.dtype, bits)
        if dtype is None or (tensor.beside or name) not in names:
            continue
        if name == _SCALE:
            _require_unsharded(p, bits)
        if name == "z":
            state[name] = torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(p)
        else:
            state[name] = zeros_for(p, name, dtype)
    if "y_lo" in state and not torch.compiler.is_compiling():
        _homes[state["y_lo"]] = p.dtype
    return state


def zeros_for(p: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor of :data:`TENSORS` beside a parameter, filled with zeros."""
    shape_for = TENSORS[name].shape_for
    if shape_for is None:
        return torch.zeros_like(p, dtype=dtype, requires_grad=False)
    return torch.zeros(shape_for(p), dtype=dtype, device=p.device)


def fits(p: Tensor, state: State, bits: Bits) -> bool:
    """True where a state is on the device, and in the formats, of its parameter as it is now.

    Raises:
        RuntimeError: for a second moment of 8 bits beside a parameter that is sharded.
    """
    device, wide, dtypes = p.device, formats.dtype_of(p), _dtypes_for(p, bits)
    if "y_lo" in state and _homes.setdefault(state["y_lo"], p.dtype) != p.dtype:
        return False
    for name, value in state.items():
        if isinstance(value, Tensor):
            others = wide if value.is_floating_point() else value.dtype
            if value.device != device or value.dtype != dtypes.get(name, others):
                return False
    for name in ("y_lo", "z_lo", _SCALE) if "x" not in state else ():  # with x, y is stored whole
        if dtypes[name] is not None and name not in state and TENSORS[name].beside in state:
            return False
    # Scales count the elements as the memory of the parameter does.
    return _SCALE not in state or _has_order_of(state["exp_avg_sq"], p)


def _has_order_of(codes: Tensor, p: Tensor) -> bool:
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
    wide, dtypes = formats.dtype_of(p), _dtypes_for(p, bits)
    before = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    tensors = {name: value.to(p.device) for name, value in before.items()}
    converted = {
        name: value.to(wide) if value.is_floating_point() else value
        for name, value in tensors.items()
        if name not in _CONVERTED
    }
    if dtypes["y_lo"] is not None and "x" not in state:
        low = _converted_low(p, before.get("y_lo"), dtypes["y_lo"]).to(p.device)
        _homes[low] = p.dtype
        converted["y_lo"] = low
    if "z" in tensors:
        converted |= _converted_z(tensors["z"], tensors.get("z_lo"), wide, whole=dtypes["z_lo"] is None)
    if "exp_avg_sq" in tensors:
        whole = dtypes[_SCALE] is None
        converted |= _converted_moment(p, tensors["exp_avg_sq"], tensors.get(_SCALE), whole)
    for name in before:
        del state[name]
    state.update(converted)
    return True


def _converted_low(p: Tensor, low: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A low half in another width, exact or to nearest; zeros where there was none of this dtype."""
    if low is None or _homes.get(low, p.dtype) != p.dtype:
        return torch.zeros_like(p, dtype=dtype, requires_grad=False)
    if low.dtype == dtype:
        return low
    if dtype == torch.int16:
        return low.short() << 8
    return ((low.int() + 128) >> 8).clamp(-128, 127).to(torch.int8)


def _converted_z(z: Tensor, z_lo: Tensor | None, wide: torch.dtype, whole: bool) -> State:
    if whole:
        return {"z": (z if z_lo is None else formats.load(z, z_lo)).to(wide)}
    if z_lo is None:
        value = z
        z, z_lo = (torch.empty_like(value, dtype=dtype) for dtype in (torch.bfloat16, torch.int8))
        formats.store(z, z_lo, value)
    return {"z": z, "z_lo": z_lo}


def _converted_moment(p: Tensor, v: Tensor, scale: Tensor | None, whole: bool) -> State:
    if whole:
        return {"exp_avg_sq": (v if scale is None else formats.decode(v, scale)).to(formats.dtype_of(p))}
    if scale is None or not _has_order_of(v, p):
        mean = v if scale is None else formats.decode(v, scale)
        v = torch.empty_like(p, dtype=torch.uint8, requires_grad=False)
        scale = torch.empty(formats.scales_for(p), dtype=torch.float32, device=p.device)
        formats.encode(mean.float(), v, scale)
    return {"exp_avg_sq": v, _SCALE: scale}


# ---- the operators' lists --------------------------------------------------------------------------------


def optional_list(states: Iterable[State], name: str) -> list[Tensor]:
    """An operator's list of a tensor that only some formats have; empty where no parameter has it."""
    result, present = [], False
    for state in states:
        present = present or name in state
        result.append(state.get(name, NO_TENSOR))
    return result if present else []
