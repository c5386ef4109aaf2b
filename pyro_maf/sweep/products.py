"""Matrix products of the kernels, over rows of a tape."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from pyro_maf.sweep.elementwise import INNER
from pyro_maf.sweep.layout import Array

__all__ = ["TALLEST", "VECTOR", "add_product", "dot", "transpose"]

PANEL = 256
"""Number of terms added to all rows of y before the next ones, so that these rows of x stay in cache."""
VECTOR = 64
"""Bytes of a row that are processed together."""
TALLEST = 8 if "+avx512f" in get_host_cpu_features() else 6
"""Maximum number of rows whose sums fit the processor's registers along with the operands."""


@njit(**INNER)
def add_product(
    weights: Array,
    start: int,
    row_step: int,
    column_step: int,
    rows: Any,
    columns: Any,
    x: Array,
    x_row: int,
    y: Array,
    y_row: int,
    t0: int,
    t1: int,
) -> None:
    """y[y_row + r] += sum_k W[r, k] x[x_row + k] for r in `rows`, k in `columns` and tape columns t0 .. t1 - 1.

    W[r, k] is weights[start + r row_step + k column_step]. The tape columns are a multiple of `LANES`.
    """
    # numba compiles a function anew for each combination of arguments that are literals, here the tiny outer one.
    of_rows, of_columns = (np.intp(rows[0]), np.intp(rows[1])), (np.intp(columns[0]), np.intp(columns[1]))
    at_x, at_y, first, end = np.intp(x_row), np.intp(y_row), np.intp(t0), np.intp(t1)
    _add_product(weights, start, row_step, column_step, of_rows, of_columns, x, at_x, y, at_y, first, end)


@njit(**INNER)
def _add_product(
    weights: Array,
    start: int,
    row_step: int,
    column_step: int,
    rows: Any,
    columns: Any,
    x: Array,
    x_row: int,
    y: Array,
    y_row: int,
    t0: int,
    t1: int,
) -> None:
    for k in range(columns[0], columns[1], PANEL):
        terms = min(PANEL, columns[1] - k)
        r, end = rows
        while r < end:
            left, at = end - r, start + r * row_step + k * column_step
            for t in range(t0, t1, VECTOR // y.itemsize):
                if left >= TALLEST:
                    _add_tile(TALLEST, weights, at, row_step, column_step, x, x_row + k, y, y_row + r, t, terms)
                elif left >= 4:
                    _add_tile(4, weights, at, row_step, column_step, x, x_row + k, y, y_row + r, t, terms)
                elif left >= 2:
                    _add_tile(2, weights, at, row_step, column_step, x, x_row + k, y, y_row + r, t, terms)
                else:
                    _add_tile(1, weights, at, row_step, column_step, x, x_row + k, y, y_row + r, t, terms)
            r += TALLEST if left >= TALLEST else 4 if left >= 4 else 2 if left >= 2 else 1


def _tile(
    typing: Any,
    height: Any,
    weights: Any,
    at: Any,
    row_step: Any,
    column_step: Any,
    x: Any,
    x_row: Any,
    y: Any,
    y_row: Any,
    t: Any,
    terms: Any,
) -> Any:
    """Signature and LLVM code generator of `_add_tile`.

    `_add_tile` is `add_product` for `height` rows of y, one vector of tape columns from t on, and `terms` terms with
    the weights from `at` on. The sums stay in registers until all terms are added, which a loop over arrays does not
    achieve.
    """
    index = types.intp
    return types.void(height, weights, index, index, index, x, index, y, index, index, index), _generate_tile


def _generate_tile(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    _, _, at, row_step, column_step, _, x_row, _, y_row, t, terms = arguments
    weights, x, y = (
        context.make_array(signature.args[position])(context, builder, arguments[position]) for position in (1, 5, 7)
    )
    number = context.get_data_type(signature.args[1].dtype)
    size = context.get_abi_sizeof(number)
    vector = ir.VectorType(number, VECTOR // size)
    undefined, zeros = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None)

    def place(array: Any, row: Any) -> Any:
        """Pointer to the vector of a row."""
        width = cgutils.unpack_tuple(builder, array.shape)[1]
        first = builder.gep(array.data, [builder.add(builder.mul(row, width), t)])
        return builder.bitcast(first, vector.as_pointer())

    rows = range(signature.args[0].literal_value)
    places = [place(y, builder.add(y_row, context.get_constant(types.intp, row))) for row in rows]
    sums = [cgutils.alloca_once_value(builder, builder.load(at_row, align=size)) for at_row in places]
    with cgutils.for_range(builder, terms) as loop:
        seen = builder.load(place(x, builder.add(x_row, loop.index)), align=size)
        weight_at = builder.add(at, builder.mul(loop.index, column_step))
        for total in sums:
            weight = builder.load(builder.gep(weights.data, [weight_at]))
            weight_at = builder.add(weight_at, row_step)
            first = builder.insert_element(undefined, weight, ir.Constant(ir.IntType(32), 0))
            term = builder.fmul(builder.shuffle_vector(first, undefined, zeros), seen, flags=("contract",))
            builder.store(builder.fadd(builder.load(total), term, flags=("contract",)), total)
    for total, at_row in zip(sums, places, strict=True):
        builder.store(builder.load(total), at_row, align=size)
    return context.get_dummy_value()


_add_tile: Any = intrinsic(prefer_literal=True)(_tile)


def _transpose(typing: Any, x: Any, x_row: Any, t: Any, y: Any, y_row: Any, column: Any) -> Any:
    """Signature and LLVM code generator of `_transpose_tile`: y[y_row + j, column + i] = x[x_row + i, t + j].

    i and j run over one vector's worth; in registers, as no loop over arrays would do.
    """
    index = types.intp
    return types.void(x, index, index, y, index, index), _generate_transpose


def _generate_transpose(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    _, x_row, t, _, y_row, column = arguments
    x, y = (context.make_array(signature.args[position])(context, builder, arguments[position]) for position in (0, 3))
    number = context.get_data_type(signature.args[0].dtype)
    size = context.get_abi_sizeof(number)
    count = VECTOR // size
    vector = ir.VectorType(number, count)

    def place(array: Any, first_row: Any, row: int, at: Any) -> Any:
        width = cgutils.unpack_tuple(builder, array.shape)[1]
        at_row = builder.mul(builder.add(first_row, context.get_constant(types.intp, row)), width)
        return builder.bitcast(builder.gep(array.data, [builder.add(at_row, at)]), vector.as_pointer())

    def interleaved(half: int) -> Any:
        lanes = [lane for j in range(half * count // 2, (half + 1) * count // 2) for lane in (j, count + j)]
        return ir.Constant(ir.VectorType(ir.IntType(32), count), [ir.Constant(ir.IntType(32), lane) for lane in lanes])

    rows = [builder.load(place(x, x_row, row, t), align=size) for row in range(count)]
    for _ in range(count.bit_length() - 1):  # interleaving rows half the tile apart, log2 of its size times
        pairs = zip(rows[: count // 2], rows[count // 2 :], strict=True)
        rows = [builder.shuffle_vector(*pair, interleaved(half)) for pair in pairs for half in (0, 1)]
    for row, value in enumerate(rows):
        builder.store(value, place(y, y_row, row, column), align=size)
    return context.get_dummy_value()


_transpose_tile: Any = intrinsic(_transpose)


@njit(**INNER)
def transpose(x: Array, x_row: int, rows: int, columns: int, y: Array) -> None:
    """y[j, i] = x[x_row + i, j] for i < rows and j < columns, both rounded up to whole vectors."""
    step = VECTOR // x.itemsize
    for i in range(0, rows, step):
        for j in range(0, columns, step):
            _transpose_tile(x, x_row + i, j, y, j, i)


@njit(**INNER)
def dot(a: Array, a_from: int, b: Array, b_from: int, terms: int) -> Any:
    """sum_k a[a_from + k] b[b_from + k] over k < terms. Slices would be counted as references."""
    total, a_first, b_first = a.dtype.type(0), np.uintp(a_from), np.uintp(b_from)
    for k in range(np.uintp(terms)):
        total += a[a_first + k] * b[b_first + k]
    return total
