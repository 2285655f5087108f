"""Schedule-free optimizers in Lightning, which has no train and eval mode for optimizers of its own."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:  # the older distribution of the same
    from pytorch_lightning.callbacks import Callback  # type: ignore[assignment]


class ScheduleFreeCallback(Callback):
    """Puts optimizers in the mode in which the trainer is, and leaves the model at ``x`` in the end.

    Every checkpoint that is made between two training batches holds ``x``, weights-only ones included:
    whoever takes the module's state dict there finds optimizers in eval mode, until the next batch. Within a
    batch, where parameters must stay ``y``, it holds ``y``. Either resumes exactly. Optimizers without
    modes are left alone.

    Example::

        trainer = lightning.Trainer(callbacks=[ScheduleFreeCallback()])
    """

    def __init__(self) -> None:
        """Waits for a trainer."""
        self._hook: Any = None
        self._within_batch = False

    def _set(self, trainer: Any, mode: bool) -> None:
        for optimizer in trainer.optimizers:
            switch = getattr(optimizer, "train" if mode else "eval", None)
            if switch is not None:
                switch()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Watches for state dicts of the module."""
        if stage != "fit":
            return

        # A hook of checkpoints comes too late: it sees what has been collected already, and not always.
        def before_state_dict(module: Any, prefix: str, keep_vars: bool) -> None:
            # Who keeps variables, as averaged_state_dict() does, saves nothing by it.
            if not self._within_batch and not keep_vars:
                self._set(trainer, False)

        self._unhook()
        self._within_batch = False
        self._hook = pl_module.register_state_dict_pre_hook(before_state_dict)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Watches no more."""
        self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        """Train mode."""
        self._set(trainer, True)

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        """Train mode."""
        self._set(trainer, True)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        """Train mode, also after a validation or a checkpoint within the epoch."""
        self._set(trainer, True)
        self._within_batch = True

    def on_train_batch_end(self, *_: Any) -> None:
        """The mode may change again."""
        self._within_batch = False

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
