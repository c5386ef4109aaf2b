"""Elementwise functions of the kernels: activations, the univariate map, the compression of a network's inputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from pyro_maf.nn import BULK

__all__ = ["INNER", "activate", "compress", "transform"]

# Not the full fastmath: infinities and NaNs must pass through.
INNER: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "nsz"},
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
"""Compiler options of functions that other kernels call."""
RELU, TANH, ELU, SILU, GELU, LEAKY_RELU, SOFTPLUS, SIGMOID = range(8)
LEAK = 0.01

LOG2_E = np.float32(1.44269504)
LN2_HIGH = np.float32(0.693359375)
LN2_LOW = np.float32(-2.12194440e-4)


@njit(**INNER)
def _exp(x: Any) -> Any:
    """exp(x), clamped to e^-87 .. e^88 in float32."""
    power, rest = _exp_parts(x)
    return power * rest + power


@njit(**INNER)
def _expm1(x: Any) -> Any:
    """exp(x) - 1, to full precision around 0."""
    power, rest = _exp_parts(x)
    return power * rest + (power - type(x)(1))


@njit(**INNER)
def _tanh(x: Any) -> Any:
    """tanh(x), which rounds to 1 long before 20."""
    limit = type(x)(20)
    x = limit if x > limit else x
    x = -limit if x < -limit else x
    grown = _expm1(x + x)
    return grown / (grown + type(x)(2))


def _exp_parts(x: Any) -> tuple[Any, Any]:
    """A power p of two and a rest r such that exp(x) = p (1 + r). Loops of it in float32 are vectorised."""
    return 1.0, math.expm1(x)


@overload(_exp_parts)
def _compiled_exp_parts(x: Any) -> Any:
    def double(x: Any) -> Any:
        return 1.0, math.expm1(x)

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

    return single if x == types.float32 else double


@njit(**INNER)
def activate(kind: Any, z: Any, slope: Any, keep: bool) -> None:
    """Replace the pre-activation z by its activation and write the derivative to `slope`, needed only if `keep`."""
    one, half = z.dtype.type(1), z.dtype.type(0.5)
    if kind == RELU:
        if keep:
            for t in range(len(z)):
                slope[t] = 0 if z[t] <= 0 else 1
        for t in range(len(z)):
            z[t] = 0 if z[t] <= 0 else z[t]
    elif kind == LEAKY_RELU:
        for t in range(len(z)):
            slope[t] = one if z[t] > 0 else z.dtype.type(LEAK)
            z[t] *= slope[t]
    elif kind == TANH:
        for t in range(len(z)):
            z[t] = _tanh(z[t])
            slope[t] = one - z[t] * z[t]
    elif kind == SIGMOID:
        for t in range(len(z)):
            z[t] = one / (one + _exp(-z[t]))
            slope[t] = z[t] * (one - z[t])
    elif kind == ELU:
        for t in range(len(z)):
            grown = _expm1(min(z[t], z.dtype.type(0)))
            slope[t] = one if z[t] > 0 else grown + one
            z[t] = z[t] if z[t] > 0 else grown
    elif kind == SILU:
        for t in range(len(z)):
            gate = one / (one + _exp(-z[t]))
            slope[t] = gate * (one + z[t] * (one - gate))
            z[t] *= gate
    elif kind == GELU:
        for t in range(len(z)):
            below = half * (one + z.dtype.type(math.erf(z[t] * z.dtype.type(math.sqrt(0.5)))))
            slope[t] = below + z[t] * _exp(-half * z[t] * z[t]) * z.dtype.type(1 / math.sqrt(2 * math.pi))
            z[t] *= below
    elif kind == SOFTPLUS:
        for t in range(len(z)):
            slope[t] = one / (one + _exp(-z[t]))
            z[t] = max(z[t], z.dtype.type(0)) + z.dtype.type(math.log1p(_exp(-abs(z[t]))))


@njit(**INNER)
def transform(x: Any, shift: Any, a: Any, sign: int, bound: float, log_det: Any, scale: Any, alpha_slope: Any) -> None:
    """Replace x by (x e + sign s) e with e = exp(sign alpha / 2), and add alpha = b tanh(a / b) to log_det.

    Leaves alpha in `a`, its derivative with respect to `a` in `alpha_slope` and e in `scale`. One loop for each, since
    loops over many arrays are not vectorised.
    """
    one, half, signed, limit = x.dtype.type(1), x.dtype.type(0.5 * sign), x.dtype.type(sign), x.dtype.type(bound)
    for t in range(len(a)):
        a[t] = _tanh(a[t] / limit)
    for t in range(len(a)):
        alpha_slope[t] = one - a[t] * a[t]
    for t in range(len(a)):
        a[t] *= limit
    for t in range(len(a)):
        log_det[t] += a[t]
    for t in range(len(a)):
        scale[t] = _exp(half * a[t])
    for t in range(len(x)):
        x[t] = (x[t] * scale[t] + signed * shift[t]) * scale[t]


@njit(**INNER)
def compress(x: Any, slope: Any) -> None:
    """Replace x by its `compress_tails` and write the derivative to `slope`."""
    one, bulk = x.dtype.type(1), x.dtype.type(BULK)
    for t in range(len(x)):
        slope[t] = one
        if abs(x[t]) > bulk:
            beyond = abs(x[t]) - bulk
            slope[t] = one / (one + beyond)
            x[t] = math.copysign(bulk + math.log1p(beyond), x[t])
