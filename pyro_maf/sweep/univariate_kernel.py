"""The univariate maps of the kernels, and their adjoints: nothing else there depends on the map or its parameters.

The parameters of one variable are rows of a tape, and the points its columns. `layer` is a record of `layout.LAYER`,
which says where the lists of these rows begin and which map it is, in which direction.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from pyro_maf.sweep.elementwise import INNER, exp, tanh
from pyro_maf.sweep.plan import Array
from pyro_maf.univariate import Affine

__all__ = ["affine", "apply", "pull_back"]

BOUND = Affine.BOUND


@njit(**INNER)
def apply(
    layer: Any, j: int, variables: Array, tape: Array, first: int, t0: int, x: Array, w: Array, log_det: Array
) -> None:
    """The map of one variable in the layer's direction; adds its log-derivative to log_det.

    Leaves in the rows of the parameters what `pull_back` needs.

    Args:
        layer, variables: The layer, and the lists that it refers to.
        j: Which of the variables that it maps.
        tape: Where the parameters are: the rows of the list, counted from `first`, and the columns from `t0` on.
        first, t0: As above.
        x, w, log_det: Input, output and sum of log-derivatives, (points,); w is not x.
    """
    phi = layer.phi_from + layer.outputs * j
    shift, scale = first + variables[phi], first + variables[phi + 1]
    end = t0 + len(x)
    affine(x, tape[shift, t0:end], tape[scale, t0:end], layer.sign, layer.log_sign, w, log_det)


@njit(**INNER)
def pull_back(
    layer: Any,
    j: int,
    variables: Array,
    tape: Array,
    first: int,
    t0: int,
    x: Array,
    w: Array,
    grad: Array,
    grad_log_det: Array,
    delta: Array,
    delta_first: int,
) -> None:
    """The adjoint of `apply`: turns the gradient with respect to w into that with respect to x.

    Args:
        layer, j, variables, tape, first, t0, x, w: As in `apply`, after it.
        grad: Gradient with respect to w, then x, (points,).
        grad_log_det: Gradient with respect to log_det, (points,).
        delta: Gradients with respect to the parameters are written there, in rows and columns like the tape's.
        delta_first: `first` for it.
    """
    phi = layer.phi_from + layer.outputs * j
    shift, scale = variables[phi], variables[phi + 1]
    end = t0 + len(x)
    _affine_back(
        x,
        w,
        tape[first + shift, t0:end],
        tape[first + scale, t0:end],
        layer.sign,
        layer.log_sign,
        grad,
        grad_log_det,
        delta[delta_first + shift, t0:end],
        delta[delta_first + scale, t0:end],
    )


@njit(**INNER)
def affine(x: Array, shift: Array, scale: Array, sign: int, log_sign: int, w: Array, log_det: Array) -> None:
    """w = (x e + sign s) e with e = exp(sign alpha / 2) and alpha = b tanh(a / b), for the network's outputs s and a.

    Adds log_sign alpha to log_det. Leaves e in `shift` and tanh(a / b) in `scale`, for the adjoint. One loop for each,
    since loops over many arrays are not vectorised.
    """
    number = x.dtype.type
    for t in range(len(x)):
        scale[t] = tanh(scale[t] / number(BOUND))
    for t in range(len(x)):
        log_det[t] += number(log_sign * BOUND) * scale[t]
    for t in range(len(x)):
        e = exp(number(0.5 * sign * BOUND) * scale[t])
        w[t] = (x[t] * e + number(sign) * shift[t]) * e
        shift[t] = e


@njit(**INNER)
def _affine_back(
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
