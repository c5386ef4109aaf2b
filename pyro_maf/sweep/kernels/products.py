"""Matrix products of the kernels, over rows of a tape."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import overload

from pyro_maf.sweep.kernels.compiler import INNER, inner
from pyro_maf.sweep.kernels.vectors import TALLEST, VECTOR, add_tile, transpose_tile
from pyro_maf.sweep.layout import Array

__all__ = ["ADDED", "add_product", "dot", "height_of", "transpose"]

PANEL = 256
"""Number of terms added to all rows of y before the next ones, so that these rows of x stay in cache."""
ADDED = -1
"""For sums that are added to what is there."""


@inner
def height_of(left: int) -> int:
    """Rows of the next tile, with so many left: those of a tile share the columns that the last one sees."""
    return TALLEST if left >= TALLEST else 4 if left >= 4 else 2 if left >= 2 else 1


def add_product(
    weights: Array,
    start: int,
    row_step: int,
    column_step: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
    x: Array,
    x_row: int,
    y: Array,
    y_row: int,
    width: int,
    initial: Array,
    initial_at: int,
) -> None:
    """y[y_row + r] += sum_k W[r, k] x[x_row + k] for r in `rows`, k in `columns` and the first `width` tape columns.

    W[r, k] is weights[start + r row_step + k column_step]. `width` is a multiple of `LANES`. Unless `initial_at` is
    `ADDED`, y[y_row + r] is replaced: the sum is added to initial[initial_at + r].
    """
    if columns[0] >= columns[1] and initial_at < 0:
        return
    vector, k = VECTOR // y.itemsize, columns[0]
    while True:
        terms, r = min(PANEL, columns[1] - k), rows[0]
        while r < rows[1]:
            height, at = height_of(rows[1] - r), (start + r * row_step + k * column_step, row_step, column_step)
            own, begin, t = y_row + r, initial_at + r if initial_at >= 0 else ADDED, 0
            while t < width:
                if height < TALLEST or t + vector >= width:
                    if height == TALLEST:
                        add_tile(TALLEST, 1, weights, at, x, x_row + k, y, own, t, terms, initial, begin)
                    elif height == 4:
                        add_tile(4, 1, weights, at, x, x_row + k, y, own, t, terms, initial, begin)
                    elif height == 2:
                        add_tile(2, 1, weights, at, x, x_row + k, y, own, t, terms, initial, begin)
                    else:
                        add_tile(1, 1, weights, at, x, x_row + k, y, own, t, terms, initial, begin)
                    t += vector
                else:
                    add_tile(TALLEST, 2, weights, at, x, x_row + k, y, own, t, terms, initial, begin)
                    t += 2 * vector
            r += height
        k += PANEL
        initial_at = ADDED
        if k >= columns[1]:
            break


# As an overload it is compiled once: `njit` compiles anew for each combination of arguments that are literals.
overload(add_product, jit_options=INNER, strict=False)(lambda *_: add_product)  # type: ignore[arg-type]


@inner
def transpose(x: Array, x_row: int, rows: int, columns: int, y: Array) -> None:
    """y[j, i] = x[x_row + i, j] for i < rows and j < columns, both rounded up to whole vectors."""
    step = VECTOR // x.itemsize
    for i in range(0, rows, step):
        for j in range(0, columns, step):
            transpose_tile(x, x_row + i, j, y, j, i)


@inner
def dot(a: Array, a_from: int, b: Array, b_from: int, terms: int) -> Any:
    """sum_k a[a_from + k] b[b_from + k] over k < terms. Slices would be counted as references."""
    total, a_first, b_first = a.dtype.type(0), np.uintp(a_from), np.uintp(b_from)
    for k in range(np.uintp(terms)):
        total += a[a_first + k] * b[b_first + k]
    return total
