"""The optimizers' common parts, in layers: no module imports one that is listed after it.

``library``, ``types``, ``interrupts``, ``sharded``, ``formats``, ``fallback``, (``ops``), ``hyperparameters``,
``state``, ``compiled``, ``group``, ``samples``, ``modes``, ``state_dict``, ``backward``, ``optimizer``.
"""
