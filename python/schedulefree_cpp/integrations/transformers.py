"""Schedule-free optimizers in the Trainer of Transformers.

The Trainer switches modes for training steps and evaluations by itself, but saves the model in either mode.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class ScheduleFreeCallback(TrainerCallback):
    """Has every saved model be ``x``, also the one that training ends with; put it last among the callbacks.

    A checkpoint resumes exactly, whether it was made with this callback or without.

    Example::

        trainer = Trainer(model, arguments, optimizers=(optimizer, None), callbacks=[ScheduleFreeCallback()])
    """

    def _eval(self, optimizer: Any) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
        if hasattr(inner, "eval"):
            inner.eval()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Eval mode before a checkpoint; the trainer goes back to train mode with its next step."""
        if control.should_save:
            self._eval(optimizer)

    def on_epoch_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Eval mode at the end of an epoch, also of the last, after which the best model may be loaded."""
        self._eval(optimizer)

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Eval mode: the model is left at the average."""
        self._eval(optimizer)
