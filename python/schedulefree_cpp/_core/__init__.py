"""The optimizers' common parts, in layers: no module imports one that is listed after it.

``library``, ``types``, ``interrupts``, ``sharded``, ``formats``, then ``ops`` of the package,
``hyperparameters``, ``nonfinite``, ``state``, ``group``, ``capturable``, ``compiled``, ``samples``,
``modes``, ``state_dict``, ``wrapped``, ``backward``, ``optimizer``.
"""
