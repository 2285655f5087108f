"""Schedule-free optimizers by name in timm."""

from __future__ import annotations

from schedulefree_cpp._create import CLASSES
from schedulefree_cpp.sgd import SGDScheduleFree

NAMES = {cls.__name__.lower(): cls for cls in CLASSES}
"""What `register` makes known: the classes by their names in lower case."""


def register() -> None:
    """Adds the optimizers to timm's registry, under the keys of `NAMES`.

    timm's own training script knows no modes of optimizers: loops that train with these call
    ``optimizer.train()`` and ``optimizer.eval()``. The closure forms need neither, but a closure, and
    ScheduleFree+ needs the loss, by a closure or ``step_func(loss)``.

    Example::

        register()
        optimizer = timm.optim.create_optimizer_v2(model, "adamwschedulefree", lr=0.0025, weight_decay=0.05)

    Raises:
        ImportError: without timm.
    """
    from timm.optim._optim_factory import OptimInfo, default_registry

    for name, cls in NAMES.items():
        sgd = issubclass(cls, SGDScheduleFree)
        default_registry.register(
            OptimInfo(
                name=name,
                opt_class=cls,
                description=f"schedulefree_cpp.{cls.__name__}",
                has_eps=not sgd,
                has_momentum=sgd,
                has_betas=not sgd,
            )
        )
