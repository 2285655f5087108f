"""Schedule-free optimizers in Lightning, which has no train and eval mode for optimizers of its own."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:  # the older distribution of the same
    from pytorch_lightning.callbacks import Callback  # type: ignore[assignment]


class ScheduleFreeCallback(Callback):
    """Puts optimizers in the mode in which the trainer is, and leaves the model at ``x`` in the end.

    Optimizers without modes are left alone. Checkpoints made in validation hold ``x``, those made in training
    ``y``; both resume exactly.

    Example::

        trainer = lightning.Trainer(callbacks=[ScheduleFreeCallback()])
    """

    def _set(self, trainer: Any, mode: bool) -> None:
        for optimizer in trainer.optimizers:
            switch = getattr(optimizer, "train" if mode else "eval", None)
            if switch is not None:
                switch()

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        """Train mode."""
        self._set(trainer, True)

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        """Train mode."""
        self._set(trainer, True)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Train mode, also after a validation within the epoch."""
        self._set(trainer, True)

    def on_validation_start(self, trainer: Any, *_: Any) -> None:
        """Eval mode."""
        self._set(trainer, False)

    def on_test_start(self, trainer: Any, *_: Any) -> None:
        """Eval mode."""
        self._set(trainer, False)

    def on_predict_start(self, trainer: Any, *_: Any) -> None:
        """Eval mode."""
        self._set(trainer, False)

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        """Eval mode: the model is left at the average."""
        self._set(trainer, False)
