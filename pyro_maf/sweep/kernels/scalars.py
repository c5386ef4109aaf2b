"""Arithmetic on the numbers of a draw, one operation at a time for all draws, compiled by numba for CPUs."""

from __future__ import annotations

import numpy as np

from pyro_maf.sweep.kernels.compiler import entry, inner
from pyro_maf.sweep.layout import Array

__all__ = ["OPERATIONS", "run"]

BINARY = ("add", "mul", "sub", "div", "pow", "maximum", "minimum", "le", "lt", "ge", "gt")
UNARY = ("neg", "sqrt", "exp", "log", "log1p", "expm1", "rsqrt", "reciprocal", "tanh", "sigmoid", "sin", "cos", "abs")
OPERATIONS = (*BINARY, *UNARY, "where")
"""Names of the operations, as in torch; the code of an operation is its index. Conditions are 0 and 1."""
FIRST_UNARY, WHERE = len(BINARY), len(BINARY) + len(UNARY)


@inner
def _of_two(operation: int, x: float, y: float) -> float:
    if operation == 0:
        return x + y
    if operation == 1:
        return x * y
    if operation == 2:
        return x - y
    if operation == 3:
        return x / y
    if operation == 4:
        return x**y
    if operation <= 6:
        if x != x or y != y:
            return x + y
        return x if (x > y) == (operation == 5) else y
    if operation == 7:
        return 1.0 if x <= y else 0.0
    if operation == 8:
        return 1.0 if x < y else 0.0
    if operation == 9:
        return 1.0 if x >= y else 0.0
    return 1.0 if x > y else 0.0


@inner
def _of_one(operation: int, x: float) -> float:
    if operation == 0:
        return -x
    if operation == 1:
        return np.sqrt(x)
    if operation == 2:
        return np.exp(x)
    if operation == 3:
        return np.log(x)
    if operation == 4:
        return np.log1p(x)
    if operation == 5:
        return np.expm1(x)
    if operation == 6:
        return 1 / np.sqrt(x)
    if operation == 7:
        return 1 / x
    if operation == 8:
        return np.tanh(x)
    if operation == 9:
        return 1 / (1 + np.exp(-x))
    if operation == 10:
        return np.sin(x)
    if operation == 11:
        return np.cos(x)
    return np.abs(x)


@entry
def run(code: Array, registers: Array) -> None:
    """Run rows (operation, result, and up to three arguments) of `code` on registers, (registers, draws)."""
    draws = registers.shape[1]
    for step in range(code.shape[0]):
        operation, result = code[step, 0], registers[code[step, 1]]
        x, y, z = registers[code[step, 2]], registers[code[step, 3]], registers[code[step, 4]]
        if operation < FIRST_UNARY:
            for i in range(draws):
                result[i] = _of_two(operation, x[i], y[i])
        elif operation < WHERE:
            for i in range(draws):
                result[i] = _of_one(operation - FIRST_UNARY, x[i])
        else:
            for i in range(draws):
                result[i] = y[i] if x[i] != 0.0 else z[i]
