"""Schedule-free optimizers inside ``torch.distributed.optim.ZeroRedundancyOptimizer``, which has no modes.

A process has the state of some parameters only: it switches those, and the other processes then receive them.
``max_grad_norm`` and ScheduleFree+ do not work there, since they need a sum over all gradients: clip with
``torch.nn.utils.clip_grad_norm_``.

Example::

    optimizer = ZeroRedundancyOptimizer(model.parameters(), AdamWScheduleFree, lr=0.0025)
    distributed.train(optimizer)
    ...
    distributed.eval(optimizer)
"""

from __future__ import annotations

from torch.distributed.optim import ZeroRedundancyOptimizer

from schedulefree_cpp._core.modes import TwoModeOptimizer


def train(optimizer: ZeroRedundancyOptimizer, mode: bool = True) -> None:
    """Sets the parameters to ``y`` in every process. Idempotent. A collective call.

    Args:
        optimizer: around one of this package's optimizers.
        mode: ``False`` means :func:`eval`.

    Raises:
        TypeError: unless it is around one of this package's optimizers; nothing has been changed.
    """
    inner = getattr(optimizer, "optim", None)
    if not isinstance(inner, TwoModeOptimizer):
        raise TypeError(
            "Invalid optimizer: expected a ZeroRedundancyOptimizer around one of schedulefree_cpp's, got "
            f"{type(optimizer).__name__} around {type(inner).__name__}"
        )
    inner.train(mode)
    # A step copies the outer groups over the inner ones.
    for group in optimizer.param_groups:
        for key in group.keys() & {"train_mode", "sf_train_mode"}:
            group[key] = mode
    optimizer._sync_params()  # type: ignore[attr-defined]


def eval(optimizer: ZeroRedundancyOptimizer) -> None:
    """Sets the parameters to the average ``x`` in every process. Idempotent. A collective call.

    Args:
        optimizer: around one of this package's optimizers.

    Raises:
        TypeError: unless it is around one of this package's optimizers; nothing has been changed.
    """
    train(optimizer, False)
