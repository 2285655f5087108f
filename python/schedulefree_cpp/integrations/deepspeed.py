"""Schedule-free optimizers inside a DeepSpeed engine, which trains flat copies of the parameters.

``optimizer.eval()`` on the optimizer that was given to ``deepspeed.initialize`` would switch those copies and
leave the module at ``y``; it warns of that. The functions here switch the copies, and then have the engine
write the module's parameters from them, as after a step.

Example::

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    deepspeed.train(engine)
    ...
    deepspeed.eval(engine)
"""

from __future__ import annotations

from typing import Any

from schedulefree_cpp._core.modes import TwoModeOptimizer


def train(engine: Any, mode: bool = True) -> None:
    """Sets the module's parameters to ``y`` in every process. Idempotent. A collective call.

    Args:
        engine: what ``deepspeed.initialize`` returned first, around one of this package's optimizers.
        mode: ``False`` means `eval`.

    Raises:
        TypeError: for an engine around another optimizer, or whose own optimizer is not known here.
        ValueError: for an engine that would step one part of the parameters after the other, which would
            count each part as a step; the message names what to change.
    """
    outer = engine.optimizer
    if isinstance(outer, TwoModeOptimizer):  # the engine trains the module's own parameters
        outer.train(mode)
        return
    inner = getattr(outer, "optimizer", None)
    kind = type(outer).__name__
    known = ("DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3", "BF16_Optimizer")
    if not isinstance(inner, TwoModeOptimizer) or kind not in known:
        raise TypeError(
            "Invalid engine: expected one of ZeRO 1, 2 or 3, of bfloat16 or without either, around one of "
            f"schedulefree_cpp's optimizers, got {kind} around {type(inner).__name__}"
        )
    if kind != "BF16_Optimizer" and len(inner.param_groups) > 1:
        raise ValueError(
            f"Invalid engine: its optimizer has {len(inner.param_groups)} parameter groups, expected 1: ZeRO "
            "steps one group after the other, and each would count as a step of all. Put the parameters into "
            "one group, or use FSDP2"
        )
    if kind != "DeepSpeedZeroOptimizer_Stage3":
        inner.train(mode)
        outer.update_lp_params()
        return
    parts = len(outer.fp16_groups)
    if parts > 1:
        raise ValueError(
            f"Invalid engine: ZeRO 3 steps {parts} parts of the parameters one after the other, and each "
            "would count as a step of all: set sub_group_size to the number of parameters"
        )
    if outer.swap_optimizer or outer.params_in_nvme_and_cpu:
        raise ValueError("Invalid engine: ZeRO 3 keeps parameters or state on disk, expected in memory")
    outer.checkpoint_event_prologue()  # no process keeps more than its own pieces
    outer._set_fp32_optimizer_param_groups()  # the groups are empty between steps
    try:
        inner.train(mode)
    finally:
        outer._clear_fp32_optimizer_param_groups()
    for part in range(parts):
        outer._reassign_or_swap_out_partitioned_parameters(part)
    outer.checkpoint_event_epilogue()  # small parameters are kept whole everywhere


def eval(engine: Any) -> None:
    """Sets the module's parameters to the average ``x`` in every process. Idempotent. A collective call.

    Args:
        engine: what ``deepspeed.initialize`` returned first, around one of this package's optimizers.

    Raises:
        TypeError: for an engine around another optimizer, or whose own optimizer is not known here.
        ValueError: for an engine that would step one part of the parameters after the other.
    """
    train(engine, False)
