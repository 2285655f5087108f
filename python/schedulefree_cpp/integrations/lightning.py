"""Schedule-free optimizers in Lightning, which has no train and eval mode for optimizers of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable as Function
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback
else:
    try:
        from lightning.pytorch.callbacks import Callback
    except ImportError:  # the older distribution of the same
        from pytorch_lightning.callbacks import Callback

# The hooks that callbacks and modules have in common, and that switch modes while a model is fitted.
_SHARED_HOOKS = (
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_train_end",
)


class ScheduleFreeCallback(Callback):
    """Switches optimizers to train and eval mode with the trainer; after training the model is ``x``.

    Every checkpoint that is made between two training batches holds ``x``, weights-only ones included: the
    module's state dict switches the optimizers to eval mode there, until the next batch. A checkpoint that is
    made within a batch holds ``y``. Either resumes exactly. Optimizers without modes are left alone.

    The callback goes to the front of the trainer's, so what others make of the model at the end of training,
    such as ``EMAWeightAveraging`` and ``StochasticWeightAveraging``, stays.

    Lightning's tuners replace the trainer's callbacks while they try learning rates and batch sizes. The
    module's own hooks then call those of this callback.

    Example::

        trainer = lightning.Trainer(callbacks=[ScheduleFreeCallback()])
    """

    def __init__(self) -> None:
        """Has no hooks before `setup`."""
        self._undo: list[Function[[], None]] = []
        self._within_batch = False

    def _set(self, trainer: Any, mode: bool) -> None:
        for optimizer in trainer.optimizers:
            switch = getattr(optimizer, "train" if mode else "eval", None)
            if switch is not None:
                switch()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Adds a hook to the module's ``state_dict()``, and to the hooks of the module."""
        if stage != "fit":
            return
        # A callback that copies its own average into the model, as EMA's, does so after the switch to x.
        if self in trainer.callbacks:
            trainer.callbacks.remove(self)
            trainer.callbacks.insert(0, self)

        # on_save_checkpoint runs after the state was collected, and not for every checkpoint.
        def before_state_dict(module: Any, prefix: str, keep_vars: bool) -> None:
            # A fit that an exception has ended leaves its hooks; a copy of the module has them, too.
            current = module is pl_module and module._trainer is trainer
            # A caller with keep_vars=True, such as averaged_state_dict(), does not save the result.
            if current and not self._within_batch and not keep_vars:
                self._set(trainer, False)

        self._unhook()
        self._within_batch = False
        self._undo.append(pl_module.register_state_dict_pre_hook(before_state_dict).remove)
        for name in _SHARED_HOOKS:
            self._extend(trainer, pl_module, name)

    def _extend(self, trainer: Any, pl_module: Any, name: str) -> None:
        """Has a hook of the module call ours first where the trainer's callbacks were replaced."""
        attributes = vars(pl_module)
        before = attributes.get(name)
        own, ours = getattr(pl_module, name), getattr(self, name)

        @functools.wraps(own)  # Lightning looks through it for what the user has overridden
        def extended(*args: Any, **kwargs: Any) -> Any:
            replaced = all(callback is not self for callback in trainer.callbacks)
            if replaced and pl_module._trainer is trainer:
                ours(trainer, pl_module)
            return own(*args, **kwargs)

        def undo() -> None:
            if attributes.get(name) is extended:
                del attributes[name]
                if before is not None:
                    attributes[name] = before

        attributes[name] = extended
        self._undo.append(undo)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Removes the hooks."""
        self._unhook()

    def _unhook(self) -> None:
        while self._undo:
            self._undo.pop()()

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
