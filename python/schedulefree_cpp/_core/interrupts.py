"""Moments in which Ctrl-C waits."""

from __future__ import annotations

# The functions of signal without its conversions to enumerations, which take longer than a small eval().
import _signal  # type: ignore[import-not-found]
from typing import Any

import torch


class Uninterrupted:
    """A context that SIGINT does not leave half done: it takes effect at the end.

    Python raises KeyboardInterrupt as soon as an operator returns, before the next line could note what the
    operator has done: an ``eval()`` would move the parameters to ``x`` and leave the group in train mode.
    """

    __slots__ = ("_before", "_came")

    def __enter__(self) -> None:
        """Has SIGINT wait, in the main thread, which alone is interrupted."""
        self._came = False
        self._before: Any = None
        if torch.compiler.is_compiling():  # a signal cannot be traced
            return
        self._before = _signal.getsignal(_signal.SIGINT)
        if self._before is not None:  # a handler that Python could not set again
            try:
                _signal.signal(_signal.SIGINT, self._note)
            except ValueError:  # not in the main thread
                self._before = None

    def _note(self, *_: object) -> None:
        self._came = True

    def __exit__(self, *_: object) -> None:
        """Lets what has come take effect."""
        if self._before is not None:
            _signal.signal(_signal.SIGINT, self._before)
            if self._came:
                _signal.raise_signal(_signal.SIGINT)
