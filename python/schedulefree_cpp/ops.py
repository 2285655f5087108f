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

Tensors in one position of the lists belong together and have one shape. ``y`` may be float32, float64,
bfloat16 or float16. ``z`` and the moments are float64 for float64 and float32 otherwise, and so is the
arithmetic. ``grad`` is float64 for float64 and any of the other three otherwise. ``y_lo`` holds, as int16,
the low half of the float32 value whose high half is a bfloat16 ``y``; it is an empty list where that is not
kept. Strides are free, and fastest where a parameter and its state share them. No written tensor may share
memory with another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from schedulefree_cpp import _fallback, _library
from schedulefree_cpp._library import _C

TensorList = Sequence[Tensor]

DECAY_AT = {"y": 0, "z": 1}

STEP_KINDS = _C.STEP_KINDS
"""The optimizers that :func:`schedule_step_` knows: ``kind`` by name."""

COEFFICIENTS = _C.COEFFICIENTS
"""Names of the elements of ``coefs``, which :func:`schedule_step_` fills."""

_sgd_step = torch.ops.schedulefree_cpp.sgd_step_.default
_adamw_step = torch.ops.schedulefree_cpp.adamw_step_.default
_sgd_step_capturable = torch.ops.schedulefree_cpp.sgd_step_.capturable
_adamw_step_capturable = torch.ops.schedulefree_cpp.adamw_step_.capturable
_schedule_step = torch.ops.schedulefree_cpp.schedule_step_.default
_y_to_x = torch.ops.schedulefree_cpp.y_to_x_.default
_x_to_y = torch.ops.schedulefree_cpp.x_to_y_.default
_y_to_x_keep = torch.ops.schedulefree_cpp.y_to_x_keep_.default
_x_to_y_restore = torch.ops.schedulefree_cpp.x_to_y_restore_.default
_polyak_sums = torch.ops.schedulefree_cpp.polyak_sums.default
_grad_norm = torch.ops.schedulefree_cpp.grad_norm.default


def _y_to_x_keep_fake(
    y: TensorList, y_lo: TensorList, z: TensorList, *, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    at = torch.empty(kept, dtype=torch.int64, device=y[0].device if y else "cpu")
    return at, torch.empty_like(at, dtype=torch.float64), at.new_empty(len(y))


torch.library.register_fake("schedulefree_cpp::y_to_x_keep_", _y_to_x_keep_fake)
_fallback.register(_library.FRAGMENT)


def _written(*lists: TensorList) -> None:
    # The kernels write through pointers, which autograd does not see.
    for tensors in lists:
        if tensors:
            torch.autograd.graph.increment_version(tensors)


def sgd_step_(
    y: TensorList,
    y_lo: TensorList,
    grad: TensorList,
    z: TensorList,
    *,
    lr: float,
    w: float,
    a: float,
    weight_decay: float = 0.0,
    decay_at: int = 0,
    grad_mul: float = 1.0,
    grad_norm: Tensor | None = None,
    max_grad_norm: float | None = None,
) -> None:
    """Takes one schedule-free SGD step.

    Args:
        y: parameters in train mode; changed.
        y_lo: low halves of bfloat16 parameters (int16), or empty; changed.
        grad: gradients; only read.
        z: base iterates; changed.
        lr: step size of ``z``.
        w: weight of ``z`` in the interpolation.
        a: coefficient of the update in ``y``.
        weight_decay: decoupled decay coefficient.
        decay_at: 0 decays at ``y``, 1 at ``z``.
        grad_mul: factor on every gradient; -1 maximizes.
        grad_norm: norm of the gradients (float64, one element, on their device or on the CPU), or None.
        max_grad_norm: clips gradients of that norm to this one, as ``torch.nn.utils.clip_grad_norm_`` would;
            given together with it.

    Raises:
        RuntimeError: naming operator, argument, index, what was expected and what came.
    """
    _sgd_step(
        y,
        y_lo,
        grad,
        z,
        lr=lr,
        w=w,
        a=a,
        weight_decay=weight_decay,
        decay_at=decay_at,
        grad_mul=grad_mul,
        grad_norm=grad_norm,
        max_grad_norm=max_grad_norm,
    )
    _written(y, y_lo, z)


def adamw_step_(
    y: TensorList,
    y_lo: TensorList,
    grad: TensorList,
    z: TensorList,
    exp_avg_sq: TensorList,
    exp_avg: TensorList,
    *,
    lr: float,
    w: float,
    a: float,
    beta2: float,
    denom_scale: float,
    denom_eps: float,
    inner_momentum: float = 0.0,
    weight_decay: float = 0.0,
    decay_at: int = 0,
    grad_mul: float = 1.0,
    grad_norm: Tensor | None = None,
    max_grad_norm: float | None = None,
) -> None:
    """Takes one schedule-free AdamW step.

    Args:
        y: parameters in train mode; changed.
        y_lo: low halves of bfloat16 parameters (int16), or empty; changed.
        grad: gradients; only read.
        z: base iterates; changed.
        exp_avg_sq: running means of the squared gradient, ``v``; changed.
        exp_avg: running means of the gradient, ``m``; empty when ``inner_momentum`` is 0; changed.
        lr: step size of ``z``.
        w: weight of ``z`` in the interpolation.
        a: coefficient of the update in ``y``.
        beta2: decay rate of ``exp_avg_sq``.
        denom_scale: factor on ``sqrt(v)``, with the bias corrections.
        denom_eps: added to the denominator, with the bias correction.
        inner_momentum: decay rate of ``exp_avg``.
        weight_decay: decoupled decay coefficient.
        decay_at: 0 decays at ``y``, 1 at ``z``.
        grad_mul: factor on every gradient; -1 maximizes.
        grad_norm: norm of the gradients (float64, one element, on their device or on the CPU), or None.
        max_grad_norm: clips gradients of that norm to this one, as ``torch.nn.utils.clip_grad_norm_`` would;
            given together with it.

    Raises:
        RuntimeError: naming operator, argument, index, what was expected and what came.
    """
    _adamw_step(
        y,
        y_lo,
        grad,
        z,
        exp_avg_sq,
        exp_avg,
        lr=lr,
        w=w,
        a=a,
        beta2=beta2,
        denom_scale=denom_scale,
        denom_eps=denom_eps,
        inner_momentum=inner_momentum,
        weight_decay=weight_decay,
        decay_at=decay_at,
        grad_mul=grad_mul,
        grad_norm=grad_norm,
        max_grad_norm=max_grad_norm,
    )
    _written(y, y_lo, z, exp_avg_sq, exp_avg)


def sgd_step_capturable_(
    y: TensorList,
    y_lo: TensorList,
    grad: TensorList,
    z: TensorList,
    coefs: Tensor,
    *,
    decay_at: int = 0,
) -> None:
    """Takes one schedule-free SGD step whose scalars are in a tensor: overload ``sgd_step_.capturable``.

    The host does not see them, so the call may stand in a CUDA graph. Where ``take`` is 0 nothing changes.

    Args:
        y: parameters in train mode; changed.
        y_lo: low halves of bfloat16 parameters (int16), or empty; changed.
        grad: gradients; only read.
        z: base iterates; changed.
        coefs: what :func:`schedule_step_` has filled: float64, one element for each of
            :data:`COEFFICIENTS`, on the device of the parameters; only read.
        decay_at: 0 decays at ``y``, 1 at ``z``.

    Raises:
        RuntimeError: naming operator, argument, index, what was expected and what came.
    """
    _sgd_step_capturable(y, y_lo, grad, z, coefs, decay_at=decay_at)
    _written(y, y_lo, z)


def adamw_step_capturable_(
    y: TensorList,
    y_lo: TensorList,
    grad: TensorList,
    z: TensorList,
    exp_avg_sq: TensorList,
    exp_avg: TensorList,
    coefs: Tensor,
    *,
    decay_at: int = 0,
) -> None:
    """Takes one schedule-free AdamW step whose scalars are in a tensor: overload ``adamw_step_.capturable``.

    The host does not see them, so the call may stand in a CUDA graph. Where ``take`` is 0 nothing changes.

    Args:
        y: parameters in train mode; changed.
        y_lo: low halves of bfloat16 parameters (int16), or empty; changed.
        grad: gradients; only read.
        z: base iterates; changed.
        exp_avg_sq: running means of the squared gradient, ``v``; changed.
        exp_avg: running means of the gradient, ``m``; empty for none: ``inner_momentum`` is then not looked
            at; changed.
        coefs: what :func:`schedule_step_` has filled: float64, one element for each of
            :data:`COEFFICIENTS`, on the device of the parameters; only read.
        decay_at: 0 decays at ``y``, 1 at ``z``.

    Raises:
        RuntimeError: naming operator, argument, index, what was expected and what came.
    """
    _adamw_step_capturable(y, y_lo, grad, z, exp_avg_sq, exp_avg, coefs, decay_at=decay_at)
    _written(y, y_lo, z, exp_avg_sq, exp_avg)


def schedule_step_(
    coefs: Tensor,
    k: Tensor,
    weight_sum: Tensor,
    lr_max: Tensor,
    scheduled_lr: Tensor,
    beta: Tensor,
    lr: Tensor,
    weight_decay: Tensor,
    *,
    kind: int,
    beta_next: float,
    warmup_steps: int,
    r: float,
    weight_lr_power: float,
    beta2: float = 0.0,
    eps: float = 0.0,
    inner_momentum: float = 0.0,
    silent_sgd_phase: bool = True,
    maximize: bool = False,
    max_grad_norm: float | None = None,
    grad_norm: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Advances a schedule that is kept in tensors, and fills ``coefs`` with the scalars of its step.

    A step with ``found_inf`` is skipped: the schedule stays, and ``take`` is 0. The last five of ``coefs``
    are what the schedule's tensors held before.

    All tensors have one element but ``coefs``. The first six are on one device; each of the others is there
    or on the CPU, where it is read during the call.

    Args:
        coefs: float64, one element for each of :data:`COEFFICIENTS`; written.
        k: steps taken (int64); changed.
        weight_sum: sum of the averaging weights (float64); changed.
        lr_max: largest learning rate so far, negative before the first step (float64); changed.
        scheduled_lr: learning rate of the last step, after warmup (float64); written.
        beta: interpolation weight that built the current ``y`` (float64); becomes ``beta_next``.
        lr: learning rate before warmup (float32 or float64); only read, as are all that follow.
        weight_decay: decoupled decay coefficient (float32 or float64).
        kind: the optimizer, one of :data:`STEP_KINDS`.
        beta_next: interpolation weight of the next ``y``, in (0, 1].
        warmup_steps: steps of linear learning-rate warmup.
        r: averaging weights grow as ``step**r``.
        weight_lr_power: averaging weights grow as ``lr_max**weight_lr_power``.
        beta2: decay rate of the mean squared gradient.
        eps: added to the root of the mean squared gradient.
        inner_momentum: decay rate of the mean gradient; 0 for none.
        silent_sgd_phase: RAdam takes no step while the variance cannot be estimated.
        maximize: negates gradients.
        max_grad_norm: clips gradients to this norm, with ``grad_norm``.
        grad_norm: norm of the gradients as they are (float32 or float64).
        grad_scale: what the gradients have been multiplied with (float32 or float64); 1 if it is None.
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
        beta,
        lr,
        weight_decay,
        grad_norm=grad_norm,
        grad_scale=grad_scale,
        found_inf=found_inf,
        kind=kind,
        beta_next=beta_next,
        warmup_steps=warmup_steps,
        r=r,
        weight_lr_power=weight_lr_power,
        beta2=beta2,
        eps=eps,
        inner_momentum=inner_momentum,
        silent_sgd_phase=silent_sgd_phase,
        maximize=maximize,
        max_grad_norm=max_grad_norm,
    )
    _written((coefs, k, weight_sum, lr_max, scheduled_lr, beta))


def y_to_x_(y: TensorList, y_lo: TensorList, z: TensorList, *, beta: float) -> None:
    """Turns parameters from ``y`` into ``x = y + (1 - 1/beta) * (z - y)``, for evaluation.

    Args:
        y: parameters; changed.
        y_lo: low halves of bfloat16 parameters (int16), or empty; changed.
        z: base iterates; only read.
        beta: interpolation weight that built ``y``, in (0, 1].

    Raises:
        RuntimeError: naming operator, argument, index, what was expected and what came.
    """
    _y_to_x(y, y_lo, z, beta=beta)
    _written(y, y_lo)


def x_to_y_(y: TensorList, y_lo: TensorList, z: TensorList, *, beta: float) -> None:
    """Turns parameters from ``x`` into ``y = x + (1 - beta) * (z - x)``, for training.

    Args:
        y: parameters, holding ``x``; changed.
        y_lo: low halves of bfloat16 parameters (int16), or empty; changed.
        z: base iterates; only read.
        beta: interpolation weight of the new ``y``, in (0, 1].

    Raises:
        RuntimeError: naming operator, argument, index, what was expected and what came.
    """
    _x_to_y(y, y_lo, z, beta=beta)
    _written(y, y_lo)


def y_to_x_keep_(
    y: TensorList, y_lo: TensorList, z: TensorList, *, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`y_to_x_`, and returns what is needed to undo it exactly.

    Rounding makes ``x_to_y_`` miss some elements by a unit in the last place: few where ``x`` is near ``y``.

    Args:
        y: parameters; changed.
        y_lo: low halves of bfloat16 parameters (int16), or empty; changed.
        z: base iterates; only read.
        beta: interpolation weight that built ``y``, in (0, 1].

    Returns:
        ``(at, value, count)``: of those elements, one parameter after the other, positions in the flattened
        parameter (int64) and values of ``y`` with its low half (float64); and how many each parameter has
        (int64). On the parameters' device.

    Raises:
        RuntimeError: naming operator, argument, index, what was expected and what came.
    """
    kept: tuple[Tensor, Tensor, Tensor] = _y_to_x_keep(y, y_lo, z, beta=beta)
    _written(y, y_lo)
    return kept


def x_to_y_restore_(
    y: TensorList,
    y_lo: TensorList,
    z: TensorList,
    at: Tensor,
    value: Tensor,
    count: Tensor,
    *,
    beta: float,
) -> None:
    """As :func:`x_to_y_`, and undoes :func:`y_to_x_keep_` exactly with what that returned.

    An element that is no longer what ``y_to_x_keep_`` made of the value it kept has been changed in between,
    and is treated as by ``x_to_y_``.

    Args:
        y: parameters, holding ``x``; changed.
        y_lo: low halves of bfloat16 parameters (int16), or empty; changed.
        z: base iterates; only read.
        at: positions (int64), ascending within each parameter.
        value: values of ``y`` (float64).
        count: how many of them each parameter has (int64).
        beta: interpolation weight of the new ``y``, in (0, 1].

    Raises:
        RuntimeError: naming operator, argument, index, what was expected and what came.
    """
    _x_to_y_restore(y, y_lo, z, at, value, count, beta=beta)
    _written(y, y_lo)


def polyak_sums(y: TensorList, y_lo: TensorList, grad: TensorList, z: TensorList) -> Tensor:
    """Two sums over all elements, from which ScheduleFree+ takes its step size (arXiv 2605.19095).

    Added in float64, in an order that does not depend on threads or the instruction set.

    Args:
        y: parameters in train mode; only read, as is everything else.
        y_lo: low halves of bfloat16 parameters (int16), or empty.
        grad: gradients.
        z: base iterates.

    Returns:
        ``[sum |grad|, sum grad * (z - y)]``, float64, on the parameters' device.

    Raises:
        RuntimeError: naming operator, argument, index, what was expected and what came.
    """
    sums: Tensor = _polyak_sums(y, y_lo, grad, z)
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
