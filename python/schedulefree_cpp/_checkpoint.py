"""Checkpoints that survive a crash: a file that exists is replaced by a whole one or not at all."""

from __future__ import annotations

import os
import secrets
import zipfile
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import Optimizer


def save_checkpoint(
    path: str | os.PathLike[str], model: torch.nn.Module, optimizer: Optimizer, **more: Any
) -> None:
    """Writes model, optimizer and anything more to a file, which is whole at any moment.

    The file holds ``x``, the average, whatever mode the optimizer is in, and nothing of the optimizer is
    changed. It is written beside ``path`` under a name that ends with ``.partial``, flushed to disk, read
    back, and renamed. A process that is killed meanwhile leaves the ``.partial`` file, which may be deleted,
    and at ``path`` what was there before. Any program reads it::

        checkpoint = torch.load(path, weights_only=True)  # {"model": ..., "optimizer": ..., **more}

    Args:
        path: the file.
        model: the module whose ``state_dict()`` is saved.
        optimizer: the optimizer of its parameters.
        **more: what else belongs to the run, such as ``step=step, sampler=sampler.state_dict()``: tensors,
            numbers, texts, and lists, tuples and dicts of such.

    Raises:
        ValueError: for something in ``more`` that ``torch.load(weights_only=True)`` would not read; the file
            at ``path`` is what it was.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with getattr(optimizer, "averaged", nullcontext)():
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **more}
            with partial.open("xb") as file:
                torch.save(saved, file)
                file.flush()
                os.fsync(file.fileno())
        _read(partial, mmap=True)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    with suppress(OSError):  # of file systems that cannot flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # where the new name stands
        finally:
            os.close(folder)


def load_checkpoint(
    path: str | os.PathLike[str], model: torch.nn.Module, optimizer: Optimizer
) -> dict[str, Any]:
    """Reads what :func:`save_checkpoint` wrote into a model and an optimizer.

    The parameters are ``x`` then and the optimizer is in eval mode: call ``optimizer.train()`` to go on.

    Args:
        path: the file.
        model: a module of the same parameters and buffers; changed.
        optimizer: an optimizer of the same class and groups; changed.

    Returns:
        What else was saved, by name, with tensors on the CPU.

    Raises:
        ValueError: for a file of another kind, and for a model or an optimizer that it does not belong to;
            neither has been changed.
    """
    checkpoint = _read(path)
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    if not all(isinstance(parts.get(name), dict) for name in ("model", "optimizer")):
        raise ValueError(f"Invalid checkpoint {path}: expected dicts under 'model' and 'optimizer'")
    saved, own = parts.pop("model"), model.state_dict()
    for name in sorted(own.keys() | saved.keys()):
        if name not in saved or name not in own:
            which = "the file lacks" if name in own else "the model lacks"
            raise ValueError(f"Invalid checkpoint {path}: {which} {name!r}")
        shapes = [tuple(getattr(state[name], "shape", ())) for state in (saved, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"Invalid checkpoint {path}: {name!r} of the model has shape {shapes[0]}, expected "
                f"{shapes[1]}"
            )
        kinds = [_kind(state[name]) for state in (saved, own)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"Invalid checkpoint {path}: {name!r} of the model is {kinds[0]}, expected {kinds[1]}"
            )
    _load(model, saved, optimizer, parts.pop("optimizer"))
    return parts


def _kind(value: Any) -> str:
    """What a value must have in common with the one that it is loaded into."""
    if not isinstance(value, torch.Tensor):
        return "no tensor"
    if value.is_meta:
        return "a tensor without values"
    number = "complex" if value.is_complex() else "real" if value.is_floating_point() else "integer"
    return f"a {number} tensor of layout {value.layout}"


def _load(model: torch.nn.Module, saved: dict[str, Any], optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Loads a model and an optimizer, both or neither."""
    before = {key: t.detach().clone() for key, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    try:
        model.load_state_dict(saved)
        optimizer.load_state_dict(state)
    except BaseException:
        with torch.no_grad():
            for key, t in model.state_dict().items():
                if key in before:
                    t.copy_(before[key])
        raise


def _read(path: str | os.PathLike[str], mmap: bool = False) -> Any:
    """Reads a file of ``torch.save``, from which nothing can run."""
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} is not that of its contents")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged file makes of torch.load
        raise ValueError(
            f"Invalid checkpoint {path}: torch.load(weights_only=True) cannot read it: {error}"
        ) from error
