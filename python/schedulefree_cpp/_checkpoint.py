"""Checkpoints that survive a crash: a file that exists is replaced by a whole one or not at all."""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from operator import is_not
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer

from schedulefree_cpp._core.interrupts import Uninterrupted


def save_checkpoint(
    path: str | os.PathLike[str], model: torch.nn.Module, optimizer: Optimizer, **more: Any
) -> None:
    """Writes model, optimizer and anything more to a file, which is whole at any moment.

    The file holds ``x``, the average, whatever mode the optimizer is in, and nothing of the optimizer is
    changed. It is written beside ``path`` under a name that ends with ``.partial``, flushed to disk, read
    back, compared by checksums, and renamed. A process that is killed meanwhile leaves at ``path`` what was
    there before, and a ``.partial`` file, which the next call removes. The mode of a file that exists is
    kept, and a link is followed. Any program reads the file::

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
    target = Path(os.path.realpath(path))
    mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
    _remove_partials(target)
    partial = target.with_name(f"{target.name}.{secrets.token_hex(4)}.partial")

    def create(name: str, flags: int) -> int:
        return os.open(name, flags, 0o666 if mode is None else 0o600)

    try:
        with open(partial, "xb", opener=create) as file:
            _lock(file)
            with getattr(optimizer, "averaged", nullcontext)(), _checksums():
                saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **more}
                torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
            _read(partial, mmap=True)
            if mode is not None:
                partial.chmod(mode)
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    with suppress(OSError):  # of file systems that cannot flush a folder
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # where the new name stands
        finally:
            os.close(folder)


def load_checkpoint(
    path: str | os.PathLike[str] | IO[bytes], model: torch.nn.Module, optimizer: Optimizer
) -> dict[str, Any]:
    """Reads what `save_checkpoint` wrote into a model and an optimizer.

    The parameters are ``x`` then and the optimizer is in eval mode: call ``optimizer.train()`` to go on.
    Where anything raises, neither model nor optimizer has been changed.

    Args:
        path: the file, or one that is open for reading bytes.
        model: a module of the same parameters and buffers; changed.
        optimizer: an optimizer of the same class and groups; changed.

    Returns:
        What else was saved, by name, with tensors on the CPU.

    Raises:
        ValueError: for a damaged file, one of another kind, and for a model or an optimizer that it does not
            belong to.
    """
    checkpoint = _read(path)
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    if not all(isinstance(parts.get(name), dict) for name in ("model", "optimizer")):
        raise ValueError(f"Invalid checkpoint {path}: expected dicts under 'model' and 'optimizer'")
    saved = parts.pop("model")
    _check_model(path, saved, model.state_dict())
    with _undone_on_error(model, optimizer):
        model.load_state_dict(saved)
        optimizer.load_state_dict(parts.pop("optimizer"))
    return parts


# ---- files -----------------------------------------------------------------------------------------------


def _lock(file: IO[bytes]) -> bool:
    """Marks a file as one that is being written, until it is closed. False where another writer did so."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_partials(target: Path) -> None:
    """Removes what processes that were killed have left beside a file."""
    for partial in target.parent.glob(f"{glob.escape(target.name)}.{'[0-9a-f]' * 8}.partial"):
        with suppress(OSError), partial.open("rb") as file:
            if _lock(file):
                partial.unlink()


@contextmanager
def _checksums() -> Iterator[None]:
    """A context in which ``torch.save`` writes a checksum for every entry, as it does by default."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _read(path: str | os.PathLike[str] | IO[bytes], mmap: bool = False) -> Any:
    """Reads a file of ``torch.save``, from which nothing can run, if its checksums match."""
    try:
        with open(path, "rb") if isinstance(path, str | os.PathLike) else nullcontext(path) as file:
            start = file.tell()
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            file.seek(start)
            if damaged is None:
                source = path if mmap else file
                return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever a damaged file makes of zipfile and torch.load
        raise ValueError(
            f"Invalid checkpoint {path}: torch.load(weights_only=True) cannot read it: {error}"
        ) from error
    raise ValueError(f"Invalid checkpoint {path}: the checksum of its entry {damaged!r} does not match")


# ---- loading ---------------------------------------------------------------------------------------------


def _check_model(path: object, saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Raises ValueError for the state dict of another model."""
    for name in sorted(own.keys() | saved.keys()):
        if name not in saved or name not in own:
            which = "the file lacks" if name in own else "the model lacks"
            raise ValueError(f"Invalid checkpoint {path}: {which} {name!r}")
        theirs, ours = saved[name], own[name]
        if not isinstance(ours, Tensor) or is_lazy(ours):
            continue
        found = expected = ""
        if not isinstance(theirs, Tensor):
            found, expected = f"type {type(theirs).__name__}", "a tensor"
        elif theirs.shape != ours.shape:
            found, expected = f"shape {tuple(theirs.shape)}", f"{tuple(ours.shape)}"
        elif _kind(theirs) != _kind(ours):
            found, expected = f"dtype {theirs.dtype}", f"{ours.dtype} or one of its kind"
        elif theirs.layout != ours.layout:
            found, expected = f"layout {theirs.layout}", f"{ours.layout}"
        elif theirs.is_meta and not ours.is_meta:
            found, expected = "device meta", "one that holds values"
        if found:
            raise ValueError(
                f"Invalid checkpoint {path}: {name!r} of the model has {found}, expected {expected}"
            )


def _kind(t: Tensor) -> tuple[bool, bool]:
    return t.is_floating_point(), t.is_complex()


@contextmanager
def _undone_on_error(model: torch.nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """A context that leaves a model and an optimizer as they were where it raises."""
    attributes = [vars(module) for module in model.modules()]
    dicts = [d for own in attributes for d in (own, *own.values()) if isinstance(d, dict)]
    entries = [d.copy() for d in dicts]
    tensors = [t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t)]
    values = [t.detach().clone() for t in tensors]
    state, groups = optimizer.state_dict(), [*optimizer.param_groups]
    try:
        yield
    except BaseException:
        with Uninterrupted(), torch.no_grad():
            for d, before in zip(dicts, entries, strict=True):
                d.clear()
                d.update(before)
            for t, value in zip(tensors, values, strict=True):
                if (t.shape, t.dtype, t.device) == (value.shape, value.dtype, value.device):
                    t.copy_(value)
                else:
                    t.data = value
            if any(map(is_not, optimizer.param_groups, groups)):
                with suppress(Exception):  # of a hook that follows what is loaded
                    optimizer.load_state_dict(state)
        raise
