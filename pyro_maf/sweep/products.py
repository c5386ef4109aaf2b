"""Matrix products of the kernels, over rows of a tape."""

from __future__ import annotations

from typing import Any

from numba import njit

from pyro_maf.sweep.elementwise import INNER

__all__ = ["add_product", "dot"]

PANEL = 96
"""Terms that are added to all rows before the next: so many rows of x stay near the processor."""


@njit(**INNER)
def add_product(
    weights: Any,
    start: int,
    row_step: int,
    column_step: int,
    rows: Any,
    columns: Any,
    x: Any,
    x_row: int,
    y: Any,
    y_row: int,
    t0: int,
    t1: int,
) -> None:
    """y[y_row + r] += sum_k W[r, k] x[x_row + k] for r in `rows`, k in `columns` and tape columns t0 .. t1 - 1.

    W[r, k] is weights[start + r row_step + k column_step]. Four rows by three terms at a time is what sixteen vector
    registers hold.
    """
    for k0 in range(columns[0], columns[1], PANEL):
        panel = (k0, min(k0 + PANEL, columns[1]))
        r, end = rows
        while r + 4 <= end:
            _four_rows(weights, start + r * row_step, row_step, column_step, panel, x, x_row, y, y_row + r, t0, t1)
            r += 4
        if r + 2 <= end:
            _two_rows(weights, start + r * row_step, row_step, column_step, panel, x, x_row, y, y_row + r, t0, t1)
            r += 2
        if r < end:
            _one_row(weights, start + r * row_step, column_step, panel, x, x_row, y[y_row + r, t0:t1], t0, t1)


@njit(**INNER)
def _four_rows(
    w: Any, at: int, down: int, step: int, columns: Any, x: Any, x_row: int, y: Any, r: int, t0: int, t1: int
) -> None:
    y0, y1, y2, y3 = y[r, t0:t1], y[r + 1, t0:t1], y[r + 2, t0:t1], y[r + 3, t0:t1]
    k, end = columns
    while k + 3 <= end:
        x0, x1, x2 = x[x_row + k, t0:t1], x[x_row + k + 1, t0:t1], x[x_row + k + 2, t0:t1]
        a, b, c, d = at + k * step, at + down + k * step, at + 2 * down + k * step, at + 3 * down + k * step
        a0, a1, a2 = w[a], w[a + step], w[a + 2 * step]
        b0, b1, b2 = w[b], w[b + step], w[b + 2 * step]
        c0, c1, c2 = w[c], w[c + step], w[c + 2 * step]
        d0, d1, d2 = w[d], w[d + step], w[d + 2 * step]
        for t in range(t1 - t0):
            u0, u1, u2 = x0[t], x1[t], x2[t]
            y0[t] += a0 * u0 + a1 * u1 + a2 * u2
            y1[t] += b0 * u0 + b1 * u1 + b2 * u2
            y2[t] += c0 * u0 + c1 * u1 + c2 * u2
            y3[t] += d0 * u0 + d1 * u1 + d2 * u2
        k += 3
    while k < end:
        x0 = x[x_row + k, t0:t1]
        a0, b0, c0, d0 = (
            w[at + k * step],
            w[at + down + k * step],
            w[at + 2 * down + k * step],
            w[at + 3 * down + k * step],
        )
        for t in range(t1 - t0):
            y0[t] += a0 * x0[t]
            y1[t] += b0 * x0[t]
            y2[t] += c0 * x0[t]
            y3[t] += d0 * x0[t]
        k += 1


@njit(**INNER)
def _two_rows(
    w: Any, at: int, down: int, step: int, columns: Any, x: Any, x_row: int, y: Any, r: int, t0: int, t1: int
) -> None:
    y0, y1 = y[r, t0:t1], y[r + 1, t0:t1]
    k, end = columns
    while k + 4 <= end:
        x0, x1, x2, x3 = x[x_row + k, t0:t1], x[x_row + k + 1, t0:t1], x[x_row + k + 2, t0:t1], x[x_row + k + 3, t0:t1]
        a, b = at + k * step, at + down + k * step
        a0, a1, a2, a3 = w[a], w[a + step], w[a + 2 * step], w[a + 3 * step]
        b0, b1, b2, b3 = w[b], w[b + step], w[b + 2 * step], w[b + 3 * step]
        for t in range(t1 - t0):
            y0[t] += a0 * x0[t] + a1 * x1[t] + a2 * x2[t] + a3 * x3[t]
            y1[t] += b0 * x0[t] + b1 * x1[t] + b2 * x2[t] + b3 * x3[t]
        k += 4
    while k < end:
        x0 = x[x_row + k, t0:t1]
        a0, b0 = w[at + k * step], w[at + down + k * step]
        for t in range(t1 - t0):
            y0[t] += a0 * x0[t]
            y1[t] += b0 * x0[t]
        k += 1


@njit(**INNER)
def _one_row(w: Any, at: int, step: int, columns: Any, x: Any, x_row: int, y: Any, t0: int, t1: int) -> None:
    k, end = columns
    while k + 4 <= end:
        x0, x1, x2, x3 = x[x_row + k, t0:t1], x[x_row + k + 1, t0:t1], x[x_row + k + 2, t0:t1], x[x_row + k + 3, t0:t1]
        a = at + k * step
        a0, a1, a2, a3 = w[a], w[a + step], w[a + 2 * step], w[a + 3 * step]
        for t in range(t1 - t0):
            y[t] += a0 * x0[t] + a1 * x1[t] + a2 * x2[t] + a3 * x3[t]
        k += 4
    while k < end:
        x0, a0 = x[x_row + k, t0:t1], w[at + k * step]
        for t in range(t1 - t0):
            y[t] += a0 * x0[t]
        k += 1


@njit(**INNER)
def dot(a: Any, b: Any) -> Any:
    """sum_k a_k b_k."""
    total = a.dtype.type(0)
    for k in range(len(a)):
        total += a[k] * b[k]
    return total
