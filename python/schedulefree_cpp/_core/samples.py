"""Samples of the parameters in both modes, by which a model saved in the other mode is recognised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from schedulefree_cpp import ops
from schedulefree_cpp._core.sharded import local
from schedulefree_cpp._core.state import Bits, convert, optional_list
from schedulefree_cpp._core.types import State

_PARAMETERS = 64
_ELEMENTS = 8


def trains(record: Any) -> bool:
    """True for a group in train mode; ``at_y`` tells where the group's dict does not."""
    return bool(record.group.get("train_mode", record.at_y))


class Samples(NamedTuple):
    """A few elements of some parameters, in both modes."""

    params: list[int]  # numbers, counted through all groups
    y: Tensor  # float64, on the CPU
    x: Tensor

    @classmethod
    def of(cls, entry: dict[str, Any] | None) -> Samples | None:
        """Reads an entry of a state dict, wherever ``torch.load`` has put its tensors."""
        if entry is None:
            return None
        params, y, x = map(entry.get, cls._fields) if isinstance(entry, dict) else [None] * 3
        if not (
            isinstance(params, list)
            and {*map(type, params)} <= {int}
            and min(params, default=0) >= 0
            and isinstance(y, Tensor)
            and isinstance(x, Tensor)
            and y.layout == x.layout == torch.strided
            and len(y.shape) == 1
            and y.shape == x.shape
            and y.numel() <= _PARAMETERS * _ELEMENTS
        ):
            raise ValueError(
                "Invalid fingerprint in the state dict: expected parameter numbers and two vectors y and x "
                "of one length"
            )
        if y.is_meta:
            return None
        return cls(params, *(t.to(device="cpu", dtype=torch.float64) for t in (y, x)))


def _numbered(records: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]:
    return ((record, p) for record in records for p in record.group["params"])


def _can_be_sampled(p: Tensor) -> bool:
    p = local(p)
    return type(p.data) is Tensor and p.device.type != "meta" and p.is_contiguous()


def _few(t: Tensor) -> Tensor:
    """A few elements of what this process holds, evenly spread, on the CPU."""
    flat = local(t).detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // _ELEMENTS))].to(device="cpu", copy=True)


def take_samples(records: Sequence[Any], all_state: Any) -> Samples | None:
    """Samples an optimizer's parameters; None where none has a state."""
    homes = [
        (number, record, p)
        for number, (record, p) in enumerate(_numbered(records))
        if "z" in all_state.get(p, ())
    ]
    homes = [home for home in homes[:: max(1, -(-len(homes) // _PARAMETERS))] if _can_be_sampled(home[2])]
    if not homes:
        return None
    own = [_few(p) for _, _, p in homes]
    others = [t.clone() for t in own]
    alike: dict[tuple[bool, float], list[tuple[Tensor, State]]] = {}
    for other, (_, record, p) in zip(others, homes, strict=True):
        few: State = {n: _few(all_state[p][n]) for n in ("y_lo", "z", "z_lo") if n in all_state[p]}
        convert(other, few, Bits(24 if "z_lo" in few else 32))
        alike.setdefault((trains(record), record.y_beta), []).append((other, few))
    for (at_y, beta), pairs in alike.items():
        tensors, states = [t for t, _ in pairs], [few for _, few in pairs]
        y_lo, z_lo = optional_list(states, "y_lo"), optional_list(states, "z_lo")
        swap = ops.y_to_x_ if at_y else ops.x_to_y_
        swap(tensors, y_lo, [few["z"] for few in states], z_lo=z_lo, beta=beta)
    modes: dict[bool, list[Tensor]] = {True: [], False: []}
    for here, there, (_, record, _) in zip(own, others, homes, strict=True):
        modes[trains(record)].append(here.double())
        modes[not trains(record)].append(there.double())
    return Samples([number for number, _, _ in homes], torch.cat(modes[True]), torch.cat(modes[False]))


def check_samples(records: Sequence[Any], expected: Samples) -> None:
    """Raises RuntimeError for parameters that are at ``x`` where the state says ``y``, or the reverse.

    Parameters that are neither are accepted: who replaced them knows why.
    """
    homes = [*_numbered(records)]
    chosen = [homes[number] for number in expected.params if number < len(homes)]
    samples = [_few(p).double() for _, p in chosen if _can_be_sampled(p)]
    if len(samples) != len(expected.params) or sum(map(len, samples)) != len(expected.y):
        return
    in_train = torch.cat(
        [torch.full_like(s, trains(record)) for (record, _), s in zip(chosen, samples, strict=True)]
    ).bool()
    now = torch.cat(samples)
    own = (now - torch.where(in_train, expected.y, expected.x)).abs().sum()
    other = (now - torch.where(in_train, expected.x, expected.y)).abs().sum()
    if not 10 * other < own:
        return
    record = chosen[0][0]
    has, says = ("x", "y") if trains(record) else ("y", "x")
    names = {"x": "eval mode (x, the average)", "y": "train mode (y)"}
    key = next((key for key in record.entries if key.endswith("train_mode")), None)
    remedy = (
        f"set group['{key}'] = {has == 'y'} in every group of optimizer.param_groups first"
        if key
        else "load it into the class that has modes, call eval() and save it again"
    )
    raise RuntimeError(
        f"the parameters are those of {names[has]}, but the loaded optimizer state says {names[says]}: the "
        "model was saved in one mode and the optimizer in the other. Save both in the same mode. To use this "
        f"checkpoint as it is, {remedy}."
    )
