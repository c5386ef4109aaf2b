"""The affine maps of the kernels, and their adjoints, of one variable: bounded, or linear with one scale for all."""

from __future__ import annotations

from pyro_maf.sweep.kernels.compiler import inner
from pyro_maf.sweep.kernels.elementwise import exp, tanh
from pyro_maf.sweep.layout import Array
from pyro_maf.univariate import Affine

__all__ = ["LOG_SCALE", "affine", "affine_back", "linear", "linear_back"]

LOG_SCALE = Affine.BOUND
"""Bound of the log-scale."""


@inner
def affine(x: Array, shift: Array, scale: Array, sign: int, log_sign: int, w: Array, log_det: Array) -> None:
    """w = (x e + sign s) e with e = exp(sign alpha / 2) and alpha = b tanh(a / b), for the network's outputs s and a.

    Adds log_sign alpha to log_det. Leaves e in `shift` and tanh(a / b) in `scale`, for the adjoint. One loop for each,
    since loops over many arrays are not vectorised.
    """
    number = x.dtype.type
    for t in range(len(x)):
        scale[t] = tanh(scale[t] / number(LOG_SCALE))
    for t in range(len(x)):
        log_det[t] += number(log_sign * LOG_SCALE) * scale[t]
    for t in range(len(x)):
        e = exp(number(0.5 * sign * LOG_SCALE) * scale[t])
        w[t] = (x[t] * e + number(sign) * shift[t]) * e
        shift[t] = e


@inner
def affine_back(
    x: Array,
    w: Array,
    e: Array,
    bounded: Array,
    sign: int,
    log_sign: int,
    grad: Array,
    grad_log_det: Array,
    grad_shift: Array,
    grad_scale: Array,
) -> None:
    """The adjoint of `affine`, which leaves e and `bounded`, tanh(a / b)."""
    number = x.dtype.type
    one, half, signed, of_log = number(1), number(0.5 * sign), number(sign), number(log_sign)
    for t in range(len(x)):
        grad_shift[t] = signed * grad[t] * e[t]
    for t in range(len(x)):
        by_alpha = of_log * grad_log_det[t] + grad[t] * half * (w[t] + x[t] * e[t] * e[t])
        grad_scale[t] = (one - bounded[t] * bounded[t]) * by_alpha
    for t in range(len(x)):
        grad[t] *= e[t] * e[t]


@inner
def linear(x: Array, shift: Array, scale: Array, sign: int, log_sign: int, w: Array, log_det: Array) -> None:
    """w = x e + s, or (x - s) e for sign -1, with e = exp(sign a), for the shift s and an a that all points share.

    Adds log_sign a to log_det.
    """
    number = x.dtype.type
    a = scale[0]
    e = exp(number(sign) * a)
    if sign > 0:
        for t in range(len(x)):
            w[t] = x[t] * e + shift[t]
    else:
        for t in range(len(x)):
            w[t] = (x[t] - shift[t]) * e
    for t in range(len(x)):
        log_det[t] += number(log_sign) * a


@inner
def linear_back(
    x: Array,
    w: Array,
    scale: Array,
    sign: int,
    log_sign: int,
    grad: Array,
    grad_log_det: Array,
    grad_shift: Array,
    grad_scale: Array,
) -> None:
    """The adjoint of `linear`."""
    number = x.dtype.type
    e, of_log = exp(number(sign) * scale[0]), number(log_sign)
    if sign > 0:
        for t in range(len(x)):
            grad_shift[t] = grad[t]
            grad_scale[t] = of_log * grad_log_det[t] + grad[t] * x[t] * e
    else:
        for t in range(len(x)):
            grad_shift[t] = -grad[t] * e
            grad_scale[t] = of_log * grad_log_det[t] - grad[t] * w[t]
    for t in range(len(x)):
        grad[t] *= e
