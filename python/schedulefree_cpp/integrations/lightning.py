"""Schedule-free optimizers in Lightning, which has no train and eval mode for optimizers of its own."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:  # the older distribution of the same
    from pytorch_lightning.callbacks import Callback  # type: ignore[assignment]


class ScheduleFreeCallback(Callback):
    """Switches optimizers to train and eval mode with the trainer; after training the model is ``x``.

    Every checkpoint that is made between two training batches holds ``x``, weights-only ones included: the
    module's state dict switches the optimizers to eval mode there, until the next batch. A checkpoint that is
    made within a batch holds ``y``. Either resumes exactly. Optimizers without modes are left alone.

    Example::

        trainer = lightning.Trainer(callbacks=[ScheduleFreeCallback()])
    """

    def __init__(self) -> None:
        """Has no hook before :meth:`setup`."""
        self._hook: Any = None
        self._within_batch = False

    def _set(self, trainer: Any, mode: bool) -> None:
        for optimizer in trainer.optimizers:
            switch = getattr(optimizer, "train" if mode else "eval", None)
            if switch is not None:
                switch()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Adds a hook to the module's ``state_dict()``."""
        if stage != "fit":
            return

        # on_save_checkpoint runs after the state was collected, and not for every checkpoint.
        def before_state_dict(module: Any, prefix: str, keep_vars: bool) -> None:
            # A caller with keep_vars=True, such as averaged_state_dict(), does not save the result.
            if not self._within_batch and not keep_vars:
                self._set(trainer, False)

        self._unhook()
        self._within_batch = False
        self._hook = pl_module.register_state_dict_pre_hook(before_state_dict)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Removes the hook."""
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
        """From here on a state dict switches to eval mode."""
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
