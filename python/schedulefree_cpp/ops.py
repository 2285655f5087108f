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

TensorList = Sequence[Tensor]

DECAY_AT = {"y": 0, "z": 1}

_sgd_step = torch.ops.schedulefree_cpp.sgd_step_.default
_adamw_step = torch.ops.schedulefree_cpp.adamw_step_.default
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
    )
    _written(y, y_lo, z, exp_avg_sq, exp_avg)


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
