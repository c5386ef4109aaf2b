"""Elementwise functions of the kernels: exponentials, activations, compression of network inputs, affine maps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from pyro_maf.sweep.kernels.compiler import INNER, inner
from pyro_maf.sweep.layout import Array, Layer
from pyro_maf.univariate import Affine

__all__ = ["LOG_SCALE", "activate", "affine", "affine_back", "compress", "copy", "differentiate", "exp"]
__all__ += ["expm1", "linear", "linear_back", "log", "tanh"]

RELU, TANH, ELU, SILU, GELU, LEAKY_RELU, SOFTPLUS, SIGMOID = range(8)
LOG_SCALE = Affine.BOUND
"""Bound of the log-scale of the affine map."""
LEAK, LINEAR = 0.01, 20
"""Slope of a leaky relu below 0, and the value from which on torch's softplus is the identity."""

LOG2_E = np.float32(1.44269504)
LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(-2.12194440e-4)
LOG2_E_DOUBLE = 1 / math.log(2)
LN2_HIGH_DOUBLE = math.ldexp(math.floor(math.ldexp(math.log(2), 32)), -32)
LN2_LOW_DOUBLE = 1.90821492927058770002e-10


@inner
def exp(x: Any) -> Any:
    """The exponential of x, clamped to e^-87 .. e^88 in float32 and to e^-708 .. e^709 in float64."""
    power, rest = _exp_parts(x)
    return power * rest + power


@inner
def expm1(x: Any) -> Any:
    """exp(x) - 1, to full precision around 0, with x clamped likewise."""
    power, rest = _exp_parts(x)
    return power * rest + (power - type(x)(1))


@inner
def tanh(x: Any) -> Any:
    """The hyperbolic tangent of x."""
    grown = expm1(x + x)
    return grown / (grown + type(x)(2))


def _exp_parts(x: Any) -> tuple[Any, Any]:
    """A power of two p and a remainder r such that exp(x) = p (1 + r). Loops over it are vectorised."""
    return 1.0, math.expm1(x)


@overload(_exp_parts, jit_options=INNER)  # type: ignore[arg-type]
def _compiled_exp_parts(x: Any) -> Any:
    def single(x: Any) -> Any:
        x = np.float32(88.0) if x > np.float32(88.0) else x
        x = np.float32(-87.0) if x < np.float32(-87.0) else x
        n = np.floor(x * LOG2_E + np.float32(0.5))
        r = x - n * LN2_HIGH - n * LN2_LOW
        p = np.float32(1 / 5040) * r + np.float32(1 / 720)
        p = p * r + np.float32(1 / 120)
        p = p * r + np.float32(1 / 24)
        p = p * r + np.float32(1 / 6)
        p = p * r + np.float32(0.5)
        return np.int32((np.int32(n) + 127) << 23).view(np.float32), p * r * r + r

    def double(x: Any) -> Any:
        x = 709.0 if x > 709.0 else x
        x = -708.0 if x < -708.0 else x
        n = np.floor(x * LOG2_E_DOUBLE + 0.5)
        r = x - n * LN2_HIGH_DOUBLE - n * LN2_LOW_DOUBLE
        p = r / 6227020800 + 1 / 479001600
        for factor in (39916800, 3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2):
            p = p * r + 1 / factor
        # The last digits of n + 2^52 + 1023 are the exponent of the power; a conversion would not be vectorised.
        return np.int64(np.float64(n + (2.0**52 + 1023)).view(np.int64) << 52).view(np.float64), p * r * r + r

    return single if x == types.float32 else double


def log(x: Any) -> Any:
    """The logarithm of a positive normal number; NaN for NaN. Loops over it are vectorised."""
    return math.log(x)


@overload(log, jit_options=INNER)  # type: ignore[arg-type]
def _compiled_log(x: Any) -> Any:
    # x = 2^n m with m within sqrt(2) of 1, and log m = 2 artanh((m - 1) / (m + 1)), an odd series.
    def double(x: Any) -> Any:
        bits = np.float64(x).view(np.int64)
        n = (bits - np.int64(0x3FE6A09E667F3BCD)) >> 52
        m = np.int64(bits - (n << 52)).view(np.float64)
        s = (m - 1.0) / (m + 1.0)
        q = s * s
        p = q / 21 + 1 / 19
        p = p * q + 1 / 17
        p = p * q + 1 / 15
        p = p * q + 1 / 13
        p = p * q + 1 / 11
        p = p * q + 1 / 9
        p = p * q + 1 / 7
        p = p * q + 1 / 5
        p = p * q + 1 / 3
        r = n * LN2_HIGH_DOUBLE + (2 * s + (2 * s * (q * p) + n * LN2_LOW_DOUBLE))
        return r if x == x else x

    def single(x: Any) -> Any:
        bits = np.float32(x).view(np.int32)
        # Cast each time, since the result of two int32 is an int64, only half as many of which fit a vector.
        n = np.int32(np.int32(bits - np.int32(0x3F3504F3)) >> np.int32(23))
        m = np.int32(bits - np.int32(n << np.int32(23))).view(np.float32)
        s = (m - np.float32(1)) / (m + np.float32(1))
        q = s * s
        p = np.float32(1 / 9) * q + np.float32(1 / 7)
        p = p * q + np.float32(1 / 5)
        p = p * q + np.float32(1 / 3)
        e = np.float32(n)
        r = e * LN2_HIGH + (np.float32(2) * s + (np.float32(2) * s * (q * p) + e * LN2_LOW))
        return r if x == x else x

    return single if x == types.float32 else double


@inner
def activate(kind: int, tape: Array, first: int, end: int, shift: int, width: int) -> None:
    """Replace pre-activations, in rows `first` .. `end` - 1 and the first `width` columns of a tape, by activations.

    For silu and gelu, whose value does not determine their derivative, the derivative is written `shift` rows further
    on. Rows are not passed as slices, each of which would be reference-counted.
    """
    columns = np.uintp(width)  # unsigned, since a possibly negative column keeps a loop from being vectorised
    one, half, zero = tape.dtype.type(1), tape.dtype.type(0.5), tape.dtype.type(0)
    for r in range(first, end):
        if kind == RELU:
            for t in range(columns):
                tape[r, t] = zero if tape[r, t] <= 0 else tape[r, t]
        elif kind == LEAKY_RELU:
            for t in range(columns):
                tape[r, t] *= one if tape[r, t] > 0 else tape.dtype.type(LEAK)
        elif kind == TANH:
            for t in range(columns):
                tape[r, t] = tanh(tape[r, t])
        elif kind == SIGMOID:
            for t in range(columns):
                tape[r, t] = one / (one + exp(-tape[r, t]))
        elif kind == ELU:
            for t in range(columns):
                grown = expm1(min(tape[r, t], zero))
                tape[r, t] = tape[r, t] if tape[r, t] > 0 else grown
        elif kind == SILU:
            for t in range(columns):
                z, gate = tape[r, t], one / (one + exp(-tape[r, t]))
                tape[r + shift, t] = gate * (one + z * (one - gate))
                tape[r, t] = z * gate
        elif kind == GELU:
            for t in range(columns):
                z = tape[r, t]
                below = half * (one + tape.dtype.type(math.erf(z * tape.dtype.type(math.sqrt(0.5)))))
                tape[r + shift, t] = below + z * exp(-half * z * z) * tape.dtype.type(1 / math.sqrt(2 * math.pi))
                tape[r, t] = z * below
        elif kind == SOFTPLUS:
            for t in range(columns):
                z = tape[r, t]
                soft = max(z, zero) + tape.dtype.type(math.log1p(exp(-abs(z))))
                tape[r, t] = z if z > LINEAR else soft


@inner
def differentiate(kind: int, tape: Array, first: int, end: int, shift: int, grad: Array, row: int, width: int) -> None:
    """Multiply rows of a gradient, from `row` on, by the derivatives of activations; arguments as in `activate`."""
    columns = np.uintp(width)
    one, zero = tape.dtype.type(1), tape.dtype.type(0)
    for r in range(first, end):
        g = row + r - first
        if kind == RELU:
            for t in range(columns):
                grad[g, t] = zero if tape[r, t] <= 0 else grad[g, t]
        elif kind == LEAKY_RELU:
            for t in range(columns):
                grad[g, t] *= one if tape[r, t] > 0 else tape.dtype.type(LEAK)
        elif kind == TANH:
            for t in range(columns):
                grad[g, t] *= one - tape[r, t] * tape[r, t]
        elif kind == SIGMOID:
            for t in range(columns):
                grad[g, t] *= tape[r, t] * (one - tape[r, t])
        elif kind == ELU:
            for t in range(columns):
                grad[g, t] *= one if tape[r, t] > 0 else tape[r, t] + one
        elif kind == SOFTPLUS:
            for t in range(columns):
                grad[g, t] *= one if tape[r, t] > LINEAR else -expm1(-tape[r, t])
        else:
            for t in range(columns):
                grad[g, t] *= tape[r + shift, t]


@inner
def compress(x: Array, seen: Array, slope: Array, end_of_bulk: float) -> None:
    """Write `compress_tails` of x, and its derivative to `slope`; x itself if the bulk is infinite."""
    number = x.dtype.type
    one, zero, bulk, infinity = number(1), number(0), number(end_of_bulk), number(np.inf)
    far = False
    for t in range(len(x)):
        seen[t] = x[t]
        far |= abs(x[t]) > bulk
    slope[: len(x)] = one
    if far:
        for t in range(len(x)):
            beyond = abs(x[t]) - bulk if abs(x[t]) > bulk else zero
            compressed = math.copysign(bulk + log(one + beyond), x[t])
            seen[t] = compressed if (beyond > 0) & (beyond < infinity) else x[t]
            slope[t] = one / (one + beyond)


@inner
def copy(values: Array, place: Array) -> None:
    """Copy entries to another array; an assignment of slices would take a second to compile."""
    for t in range(len(values)):
        place[t] = values[t]


# -- affine maps, bounded or linear with one scale for all points -----------------------------------------------------


@inner
def affine(layer: Layer, x: Array, shift: Array, scale: Array, w: Array, logs: Array) -> None:
    """w = (x e + s) e or, for sign -1, (x / e - s) / e, with e = exp(alpha / 2), alpha = b tanh(a / b).

    s and a are the network's outputs. Leaves exp(sign alpha / 2) in `shift` and tanh(a / b) in `scale`. Uses separate
    loops, since loops over many arrays are not vectorised.
    """
    number = x.dtype.type
    one = number(1)
    for t in range(len(x)):
        scale[t] = tanh(scale[t] / number(LOG_SCALE))
    for t in range(len(x)):
        logs[t] += number(layer.log_sign * LOG_SCALE) * scale[t]
    if layer.sign > 0:
        for t in range(len(x)):
            e = exp(number(0.5 * LOG_SCALE) * scale[t])
            w[t] = (x[t] * e + shift[t]) * e
            shift[t] = e
    else:
        for t in range(len(x)):
            e = exp(number(0.5 * LOG_SCALE) * scale[t])
            w[t] = (x[t] / e - shift[t]) / e
            shift[t] = one / e


@inner
def affine_back(
    layer: Layer, x: Array, w: Array, e: Array, bounded: Array, grad: Array, logs: Array, by_shift: Array, by_a: Array
) -> None:
    """The adjoint of `affine`, which left e and `bounded`, tanh(a / b)."""
    number = x.dtype.type
    one, half, signed, of_log = number(1), number(0.5 * layer.sign), number(layer.sign), number(layer.log_sign)
    for t in range(len(x)):
        by_shift[t] = signed * grad[t] * e[t]
    for t in range(len(x)):
        by_alpha = of_log * logs[t] + grad[t] * half * (w[t] + x[t] * e[t] * e[t])
        by_a[t] = (one - bounded[t] * bounded[t]) * by_alpha
    for t in range(len(x)):
        grad[t] *= e[t] * e[t]


@inner
def linear(layer: Layer, x: Array, shift: Array, scale: Array, w: Array, logs: Array) -> None:
    """w = x e + s, or (x - s) / e for sign -1, with e = exp(a), for the shift s and an a shared by all points."""
    number = x.dtype.type
    e, log_derivative = exp(scale[0]), number(layer.log_sign) * scale[0]
    if layer.sign > 0:
        for t in range(len(x)):
            w[t] = x[t] * e + shift[t]
    else:
        for t in range(len(x)):
            w[t] = (x[t] - shift[t]) / e
    for t in range(len(x)):
        logs[t] += log_derivative


@inner
def linear_back(
    layer: Layer, x: Array, w: Array, scale: Array, grad: Array, logs: Array, by_shift: Array, by_a: Array
) -> None:
    """The adjoint of `linear`."""
    number = x.dtype.type
    e, of_log = exp(number(layer.sign) * scale[0]), number(layer.log_sign)
    if layer.sign > 0:
        for t in range(len(x)):
            by_shift[t] = grad[t]
            by_a[t] = of_log * logs[t] + grad[t] * x[t] * e
    else:
        for t in range(len(x)):
            by_shift[t] = -grad[t] * e
            by_a[t] = of_log * logs[t] - grad[t] * w[t]
    for t in range(len(x)):
        grad[t] *= e
