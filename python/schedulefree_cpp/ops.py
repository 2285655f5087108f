"""The operators, typed and documented: what ``torch.ops.schedulefree_cpp`` holds.

They change lists of tensors in place. A call that is refused has changed nothing.

Notation, after Defazio et al., "The Road Less Scheduled" (arXiv 2405.15682): ``y`` is where gradients are
taken, ``z`` the base iterate, ``x`` the average that is evaluated, with ``y = beta*x + (1-beta)*z``; ``x``
is never stored. Per element, with ``n`` the gradient or its running mean::

    g  = grad * grad_mul
    v  = beta2*v + (1-beta2)*g*g                    adamw_step_
    m  = inner_momentum*m + (1-inner_momentum)*g    adamw_step_ with inner_momentum > 0
    u  = g                                          sgd_step_
    u  = n / (denom_scale*sqrt(v) + denom_eps)      adamw_step_
    u += weight_decay * (y if decay_at == 0 else z)
    y' = y + w*(z - y) + a*u
    z' = z - lr*u

A step then settles ``y'``: it stores the value that :func:`y_to_x_` and :func:`x_to_y_` with ``beta`` return
bit for bit.

Any other optimizer takes a schedule-free step on ``z`` between two operators::

    x  = y + (1 - 1/beta) * (z - y)                 before_base_step_, with the beta that built y
    z  = z - lr*weight_decay*y                      before_base_step_
    z' = z as the other optimizer steps it
    x' = x + w*(z' - x)                             after_base_step_, with c as w
    y' = beta*x' + (1-beta)*z'                      after_base_step_; settled, as that of a step

In between nothing holds ``y``. With ``exchange`` a parameter holds ``z``, for the optimizer that it belongs
to, and the memory of ``z`` holds ``x``; without, a parameter holds ``x``, and the optimizer is lent ``z``.

The tensors at one position of the lists belong to one parameter and have one shape. ``grad`` may be float32,
bfloat16 or float16, and is float64 for a float64 ``y``. What the rest may be, with ``csrc/storage.h`` for the
bits:

============  =======  =========  =======  ===================================================
``y``         y_lo     z          z_lo     a value of ``y``
============  =======  =========  =======  ===================================================
float32       --       float32    --       as it is
float64       --       float64    --       as it is; so are the moments and the arithmetic
bfloat16      int16    float32    --       a float32, rounded to ``y``, and the rest
float16       int16    float32    --       a float32, or below 2**-17 a multiple of 2**-40
bfloat16      int8     bfloat16   int8     16 significant bits in the range of float32
bfloat16      --       float32    --       as it is, where it is only swapped
float16       --       float32    --       as it is, where it is only swapped
============  =======  =========  =======  ===================================================

:func:`before_base_step_` and :func:`after_base_step_` take the first two, without ``exchange`` the first
four.

``exp_avg_sq`` is of the arithmetic's dtype; or uint8 beside ``exp_avg_sq_scale``, a one-dimensional float32
tensor with one element for every 128 of the parameter in the order of its memory, and then means the float32
whose bits are those of the scale plus ``code << 20``, rounded at random by the number of the step and of the
element. ``exp_avg`` is of the arithmetic's dtype. An empty list, or a tensor without elements, stands for a
tensor that a parameter does not have.

Any strides work; a parameter and its state that share them are fastest. No written tensor may share memory
with another.

The scalars are in a tensor, ``coefs``: float64, one element for each of :data:`COEFFICIENTS`. On the CPU it
is read during the call; on the parameters' device only the kernel reads it, so that a CUDA graph can capture
the call. Where ``take`` is 0 nothing changes.

``torch.compile`` traces the functions of this module as they are. They raise the version counters of the
parameters, so that autograd notices a step between forward and backward; compiled code does so by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from schedulefree_cpp import _fallback
from schedulefree_cpp._core.library import _C, FRAGMENT

TensorList = Sequence[Tensor]

DECAY_AT = {"y": 0, "z": 1}
"""Values of ``decay_at``, which says where weight decay is evaluated, by name."""

STEP_KINDS = _C.STEP_KINDS
"""Values of ``kind``, which says whose step :func:`schedule_step_` takes, by name."""

COEFFICIENTS = _C.COEFFICIENTS
"""Names of the elements of ``coefs``. The last four are the schedule before the step; no step reads them."""

_sgd_step = torch.ops.schedulefree_cpp.sgd_step_.default
_adamw_step = torch.ops.schedulefree_cpp.adamw_step_.default
_schedule_step = torch.ops.schedulefree_cpp.schedule_step_.default
_y_to_x = torch.ops.schedulefree_cpp.y_to_x_.default
_x_to_y = torch.ops.schedulefree_cpp.x_to_y_.default
_before_base_step = torch.ops.schedulefree_cpp.before_base_step_.default
_after_base_step = torch.ops.schedulefree_cpp.after_base_step_.default
_polyak_sums = torch.ops.schedulefree_cpp.polyak_sums.default
_grad_norm = torch.ops.schedulefree_cpp.grad_norm.default

_fallback.register(FRAGMENT)


def _written(parameters: TensorList) -> None:
    # The kernels write through pointers, which autograd does not see.
    if parameters and not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(parameters)


def coefs(**scalars: float) -> Tensor:
    """Makes the scalars of a step.

    Args:
        **scalars: values by name, of :data:`COEFFICIENTS`. ``beta`` must be given. Of the others ``take``,
            ``grad_mul`` and ``denom_scale`` are 1 where they are not given, and the rest 0.

    Returns:
        ``coefs`` for the operators that take it, on the CPU.

    Raises:
        TypeError: for a name that is unknown, or without ``beta``.
    """
    unknown = sorted(scalars.keys() - set(COEFFICIENTS))
    if unknown or "beta" not in scalars:
        got = f"unknown {', '.join(unknown)}" if unknown else "no beta"
        raise TypeError(f"coefs(): expected beta and any others of {', '.join(COEFFICIENTS)}, got {got}")
    values = {"take": 1.0, "grad_mul": 1.0, "denom_scale": 1.0, **scalars}
    return torch.tensor([values.get(name, 0.0) for name in COEFFICIENTS], dtype=torch.float64, device="cpu")


def sgd_step_(
    y: TensorList,
    y_lo: TensorList,
    grad: TensorList,
    z: TensorList,
    coefs: Tensor,
    *,
    z_lo: TensorList = (),
    decay_at: int = 0,
) -> None:
    """Takes one schedule-free SGD step.

    Args:
        y: parameters in train mode; changed.
        y_lo: low halves of 16-bit parameters, or empty; changed.
        grad: gradients; only read.
        z: base iterates; changed.
        coefs: the scalars, from :func:`coefs` or :func:`schedule_step_`; only read.
        z_lo: low halves of ``z``, or empty; changed.
        decay_at: 0 decays at ``y``, 1 at ``z``.

    Raises:
        RuntimeError: naming operator, argument, index, what was expected and what came.
    """
    _sgd_step(y, y_lo, grad, z, coefs, z_lo=z_lo, decay_at=decay_at)
    _written(y)


def adamw_step_(
    y: TensorList,
    y_lo: TensorList,
    grad: TensorList,
    z: TensorList,
    exp_avg_sq: TensorList,
    exp_avg: TensorList,
    coefs: Tensor,
    *,
    z_lo: TensorList = (),
    exp_avg_sq_scale: TensorList = (),
    decay_at: int = 0,
) -> None:
    """Takes one schedule-free AdamW step.

    Args:
        y: parameters in train mode; changed.
        y_lo: low halves of 16-bit parameters, or empty; changed.
        grad: gradients; only read.
        z: base iterates; changed.
        exp_avg_sq: running means of the squared gradient, ``v``; changed.
        exp_avg: running means of the gradient, ``m``; empty without inner momentum; changed.
        coefs: the scalars, from :func:`coefs` or :func:`schedule_step_`; only read.
        z_lo: low halves of ``z``, or empty; changed.
        exp_avg_sq_scale: scales of an ``exp_avg_sq`` of 8 bits, or empty; changed.
        decay_at: 0 decays at ``y``, 1 at ``z``.

    Raises:
        RuntimeError: naming operator, argument, index, what was expected and what came.
    """
    _adamw_step(
        y, y_lo, grad, z, exp_avg_sq, exp_avg, coefs,
        z_lo=z_lo, exp_avg_sq_scale=exp_avg_sq_scale, decay_at=decay_at,
    )  # fmt: skip
    _written(y)


def schedule_step_(
    coefs: Tensor,
    k: Tensor,
    weight_sum: Tensor,
    lr_max: Tensor,
    scheduled_lr: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    *,
    kind: int,
    beta: float,
    warmup_steps: float,
    r: float,
    weight_lr_power: float,
    beta2: float = 0.0,
    eps: float = 0.0,
    inner_momentum: float = 0.0,
    silent_sgd_phase: bool = True,
    maximize: bool = False,
    max_grad_norm: float | None = None,
    decoupling_c: float = 0.0,
    averaging_weight: float = 0.0,
    stochastic: bool = False,
    grad_norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Advances a schedule that is kept in tensors, and fills ``coefs`` with the scalars of its step.

    A step with ``found_inf`` is skipped: the schedule stays, and ``take`` is 0.

    Every tensor but ``coefs`` has one element. The first five are on one device; each of the others is on
    that device or on the CPU, where it is read during the call.

    Args:
        coefs: float64, one element for each of :data:`COEFFICIENTS`; written.
        k: steps taken (int64); changed.
        weight_sum: sum of the averaging weights (float64); changed.
        lr_max: largest learning rate so far, negative before the first step (float64); changed.
        scheduled_lr: learning rate of the last step, after warmup (float64); written.
        lr: learning rate before warmup (float32 or float64); only read, as are all that follow.
        weight_decay: decoupled decay coefficient (float32 or float64).
        kind: the optimizer, one of :data:`STEP_KINDS`.
        beta: interpolation weight, in (0, 1]; also the one that built the current ``y``.
        warmup_steps: steps of linear learning-rate warmup.
        r: averaging weights grow as ``step**r``.
        weight_lr_power: averaging weights grow as ``lr_max**weight_lr_power``.
        beta2: decay rate of the mean squared gradient.
        eps: added to the root of the mean squared gradient.
        inner_momentum: decay rate of the mean gradient; 0 for none.
        silent_sgd_phase: RAdam takes no step while the variance cannot be estimated.
        maximize: negates gradients.
        max_grad_norm: clips gradients to this norm, with ``grad_norm``.
        decoupling_c: above 0, the weight ``c`` of the new ``z`` becomes ``min(1, c*(1-beta)*decoupling_c)``.
        averaging_weight: above 0, ``c`` is this.
        stochastic: rounds what is stored in 24 bits at random.
        grad_norm: norm of the gradients as they are (float32 or float64).
        grad_scale: factor by which the gradients were scaled (float32 or float64); 1 if it is None.
        found_inf: anything but 0 skips the step (float32 or float64).

    Raises:
        RuntimeError: naming operator, argument, what was expected and what came; on the CPU also for an
            ``lr`` or a ``weight_sum`` outside its domain, which no other device can tell.
    """
    _schedule_step(
        coefs,
        k,
        weight_sum,
        lr_max,
        scheduled_lr,
        lr,
        weight_decay,
        grad_norm=grad_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        kind=kind,
        beta=beta,
        warmup_steps=warmup_steps,
        r=r,
        weight_lr_power=weight_lr_power,
        beta2=beta2,
        eps=eps,
        inner_momentum=inner_momentum,
        silent_sgd_phase=silent_sgd_phase,
        maximize=maximize,
        max_grad_norm=max_grad_norm,
        decoupling_c=decoupling_c,
        averaging_weight=averaging_weight,
        stochastic=stochastic,
    )


def y_to_x_(y: TensorList, y_lo: TensorList, z: TensorList, *, z_lo: TensorList = (), beta: float) -> None:
    """Turns parameters from ``y`` into ``x = y + (1 - 1/beta) * (z - y)``, for evaluation.

    A ``y`` that a step with the same ``beta`` has stored comes back from :func:`x_to_y_` bit for bit.

    Args:
        y: parameters; changed.
        y_lo: low halves of 16-bit parameters, or empty; changed.
        z: base iterates; only read.
        z_lo: low halves of ``z``, or empty; only read.
        beta: interpolation weight that built ``y``, in (0, 1].

    Raises:
        RuntimeError: naming operator, argument, index, what was expected and what came.
    """
    _y_to_x(y, y_lo, z, z_lo=z_lo, beta=beta)
    _written(y)


def x_to_y_(y: TensorList, y_lo: TensorList, z: TensorList, *, z_lo: TensorList = (), beta: float) -> None:
    """Turns parameters from ``x`` into ``y = x + (1 - beta) * (z - x)``, for training.

    Args:
        y: parameters, holding ``x``; changed.
        y_lo: low halves of 16-bit parameters, or empty; changed.
        z: base iterates; only read.
        z_lo: low halves of ``z``, or empty; only read.
        beta: interpolation weight of the new ``y``, in (0, 1].

    Raises:
        RuntimeError: naming operator, argument, index, what was expected and what came.
    """
    _x_to_y(y, y_lo, z, z_lo=z_lo, beta=beta)
    _written(y)


def before_base_step_(
    y: TensorList, y_lo: TensorList, z: TensorList, coefs: Tensor, *, beta: float, exchange: bool = True
) -> None:
    """Turns ``y`` into ``x`` and decays ``z``, for another optimizer to step ``z``.

    ``x`` is what :func:`y_to_x_` gives. Without weight decay ``z`` keeps its bits, and
    :func:`after_base_step_` with ``w=0`` undoes the call: a ``y`` that a step with the same ``beta`` has
    stored comes back bit for bit, where ``x`` and ``z`` are finite.

    Args:
        y: parameters in train mode; they then hold ``z`` with ``exchange``, else ``x``.
        y_lo: low halves of 16-bit parameters, or empty; changed.
        z: base iterates; they then hold ``x`` with ``exchange``, else ``z``.
        coefs: the scalars ``take``, ``lr`` and ``weight_decay``, from :func:`coefs`; only read.
        beta: interpolation weight that built ``y``, in (0, 1].
        exchange: whether ``y`` and ``z`` change places, which 16-bit parameters refuse: they cannot hold
            ``z``.

    Raises:
        RuntimeError: naming operator, argument, index, what was expected and what came.
    """
    _before_base_step(y, y_lo, z, coefs, beta=beta, exchange=exchange)
    _written(y)
    _written(z)


def after_base_step_(
    y: TensorList, y_lo: TensorList, z: TensorList, coefs: Tensor, *, exchange: bool = True
) -> None:
    """Makes the next ``y`` of ``x`` and of the ``z`` that another optimizer has stepped.

    ``x`` becomes ``x + w*(z - x)``, which is exactly ``x`` where ``w`` is 0 and ``z`` where ``w`` is 1, and
    ``y`` is stored as a step with this ``beta`` stores it.

    Args:
        y: parameters that hold what :func:`before_base_step_` left there and the other optimizer stepped;
            they then hold ``y``.
        y_lo: low halves of 16-bit parameters, or empty; changed.
        z: the same of base iterates; they then hold ``z``.
        coefs: the scalars ``take``, ``w`` and ``beta``, from :func:`coefs`; only read.
        exchange: as in the call of :func:`before_base_step_`.

    Raises:
        RuntimeError: naming operator, argument, index, what was expected and what came.
    """
    _after_base_step(y, y_lo, z, coefs, exchange=exchange)
    _written(y)
    _written(z)


def polyak_sums(
    y: TensorList, y_lo: TensorList, grad: TensorList, z: TensorList, *, z_lo: TensorList = ()
) -> Tensor:
    """Two sums over all elements, from which ScheduleFree+ takes its step size (arXiv 2605.19095).

    Added in float64, in an order that does not depend on threads or the instruction set.

    Args:
        y: parameters in train mode; only read, as is everything else.
        y_lo: low halves of 16-bit parameters, or empty.
        grad: gradients.
        z: base iterates.
        z_lo: low halves of ``z``, or empty.

    Returns:
        ``[sum |grad|, sum grad * (z - y)]``, float64, on the parameters' device.

    Raises:
        RuntimeError: naming operator, argument, index, what was expected and what came.
    """
    sums: Tensor = _polyak_sums(y, y_lo, grad, z, z_lo=z_lo)
    return sums


def grad_norm(grad: TensorList) -> Tensor:
    """Euclidean norm of all elements together, as ``torch.nn.utils.get_total_norm`` has it, in one pass.

    Added in float64, in an order that does not depend on threads or the instruction set.

    Args:
        grad: float32, float64, bfloat16 or float16; only read.

    Returns:
        The norm, float64, without dimensions, on the device of the tensors; 0 for none.

    Raises:
        RuntimeError: naming operator, argument, index, what was expected and what came.
    """
    norm: Tensor = _grad_norm(grad)
    return norm
