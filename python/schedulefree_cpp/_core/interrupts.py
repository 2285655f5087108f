"""Moments in which signals wait."""

from __future__ import annotations

# The functions of signal without its conversions to enumerations, which take longer than a small eval().
import _signal  # type: ignore[import-not-found]
from typing import Any

import torch

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF")
_SIGNALS = tuple(getattr(_signal, name) for name in _NAMES if hasattr(_signal, name))


class Uninterrupted:
    """A context that no signal leaves half done: Python's handlers run at the end.

    Python calls a handler as soon as an operator returns, before the next line could note what the operator
    has done: an ``eval()`` would move the parameters to ``x`` and leave the group in train mode, as a handler
    that saves would find it, and one that raises, such as that of Ctrl-C, would leave it.
    """

    __slots__ = ("_came", "_handlers")

    def __enter__(self) -> None:
        """Delays signals that have a Python handler. Does nothing outside the main thread."""
        self._came: list[tuple[int, Any]] = []
        self._handlers: dict[int, Any] = {}
        if torch.compiler.is_compiling():  # a signal cannot be traced
            return
        for number in _SIGNALS:
            handler = _signal.getsignal(number)
            if callable(handler):
                try:
                    _signal.signal(number, self._note)
                except ValueError:  # not in the main thread
                    return
                self._handlers[number] = handler

    def _note(self, number: int, frame: Any) -> None:
        self._came.append((number, frame))

    def __exit__(self, *_: object) -> None:
        """Calls the handlers of what has come: once each, as a second signal would wake asyncio twice."""
        for number, handler in self._handlers.items():
            _signal.signal(number, handler)
        if self._came:
            self._deliver()

    def _deliver(self) -> None:
        number, frame = self._came.pop(0)
        try:
            self._handlers[number](number, frame)
        finally:
            if self._came:
                self._deliver()
