"""Tails of learned weight, compiled: for few draws torch takes longer to start operations than to run them."""

from __future__ import annotations

import math

from pyro_maf.sweep.kernels.compiler import entry
from pyro_maf.sweep.layout import Array

__all__ = ["bend", "bend_back"]

SERIES = 0.01
"""Exponent up to which functions are summed as series, exact to rounding."""


@entry
def bend(
    x: Array,
    weights: Array,
    loc: Array,
    scale: Array,
    sign: int,
    largest: float,
    y: Array,
    log_det: Array,
    partials: Array,
) -> None:
    """The map of `Tails`, or its inverse for sign -1, in double precision, with its derivatives.

    Args:
        x: (points, D).
        weights: Of the right and of the left tails, (2, D).
        loc, scale: (D,).
        sign: Of the weights.
        largest: Exponent from which on the map is its tangent.
        y, log_det: Filled here, (points, D) and (points,).
        partials: Derivatives of y and of the log-determinant by x, and of both by the weight, filled here,
            (4, points, D); or with no points if not wanted.
    """
    for b in range(len(x)):
        total = 0.0
        for i in range(x.shape[1]):
            unit = float(scale[i])
            z = (float(x[b, i]) - float(loc[i])) / unit
            weight = sign * float(weights[0 if z > 0 else 1, i])
            side, size = (1.0, weight) if weight >= 0 else (-1.0, -weight)
            raw = size * z * z
            limit = largest if weight >= 0 else math.expm1(largest)
            outside = raw > limit
            raw = limit if outside else raw
            exponent = raw if weight >= 0 else math.log1p(raw)
            if exponent < SERIES:
                half = exponent / 4 + exponent * exponent / 48
                slope = 0.25 + exponent / 24 - exponent * exponent * exponent / 1440
            else:
                half = 0.5 * math.log(math.expm1(exponent) / exponent)
                slope = -0.5 / math.expm1(-exponent) - 0.5 / exponent
            log_derivative = side * (exponent - half)
            growth, derivative = math.exp(side * half), math.exp(log_derivative)
            edge = math.copysign(math.sqrt(limit / size), z) if outside else z
            moved = edge * growth + (z - edge) * derivative
            y[b, i] = loc[i] + unit * moved
            total += log_derivative
            if partials.shape[1] > 0:
                share = 0.0 if outside else 1.0 if weight >= 0 else math.exp(-exponent)
                by_log = (1 - slope) * share
                by_size = (growth - derivative) * edge / (2 * size) if outside else 0.0
                partials[0, b, i] = derivative
                partials[1, b, i] = 2 * weight * z * by_log / unit
                partials[2, b, i] = unit * (moved * slope * share * z * z - side * by_size)
                partials[3, b, i] = z * z * by_log
        log_det[b] = total


@entry
def bend_back(
    x: Array,
    loc: Array,
    partials: Array,
    grad_y: Array,
    grad_log_det: Array,
    sign: int,
    grad_x: Array,
    by_weights: Array,
) -> None:
    """The adjoint of `bend`: fills `grad_x`, and adds the gradient with respect to the weights to `by_weights`."""
    for b in range(len(x)):
        for i in range(x.shape[1]):
            grad_x[b, i] = grad_y[b, i] * partials[0, b, i] + grad_log_det[b] * partials[1, b, i]
            by_weight = grad_y[b, i] * partials[2, b, i] + grad_log_det[b] * partials[3, b, i]
            by_weights[0 if x[b, i] > loc[i] else 1, i] += sign * by_weight
