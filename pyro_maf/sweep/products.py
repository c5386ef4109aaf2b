"""Matrix products of the kernels, over rows of a tape."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from pyro_maf.sweep.elementwise import INNER

__all__ = ["add_product", "dot"]

PANEL = 256
"""Terms that are added to all rows before the next: so many numbers of some rows of W stay near the processor."""
VECTOR = 64
"""Bytes of a row that are worked on together."""


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

    W[r, k] is weights[start + r row_step + k column_step]. There are whole vectors of tape columns.
    """
    for k in range(columns[0], columns[1], PANEL):
        terms = min(PANEL, columns[1] - k)
        r, end = rows
        while r < end:
            left, at = end - r, start + r * row_step + k * column_step
            for t in range(t0, t1, VECTOR // y.itemsize):
                if left >= 8:
                    _add_tile(8, weights, at, row_step, column_step, x, x_row + k, y, y_row + r, t, terms)
                elif left >= 4:
                    _add_tile(4, weights, at, row_step, column_step, x, x_row + k, y, y_row + r, t, terms)
                elif left >= 2:
                    _add_tile(2, weights, at, row_step, column_step, x, x_row + k, y, y_row + r, t, terms)
                else:
                    _add_tile(1, weights, at, row_step, column_step, x, x_row + k, y, y_row + r, t, terms)
            r += 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1


@intrinsic(prefer_literal=True)
def _add_tile(
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
    """`add_product` for `height` rows of y, one vector of tape columns from t on, and terms from `at` on.

    Written for the compiler below numba: sums stay in registers until all terms are in, which no loop over arrays does.
    """
    index = types.intp
    signature = types.void(height, weights, index, index, index, x, index, y, index, index, index)
    rows = height.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at, row_step, column_step = arguments[1 + 1 : 1 + 4]
        x_row, y_row, t, terms = arguments[6], *arguments[8:]
        number = context.get_data_type(signature.args[1].dtype)
        size = context.get_abi_sizeof(number)
        vector = ir.VectorType(number, VECTOR // size)
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None)

        def array(position: int) -> Any:
            return context.make_array(signature.args[position])(context, builder, arguments[position])

        w_data, x_array, y_array = array(1).data, array(5), array(7)

        def place(array: Any, row: Any) -> Any:
            """Where the vector lies in a row."""
            width = cgutils.unpack_tuple(builder, array.shape)[1]
            first = builder.gep(array.data, [builder.add(builder.mul(row, width), t)])
            return builder.bitcast(first, vector.as_pointer())

        places, sums = [], []
        for r in range(rows):
            places.append(place(y_array, builder.add(y_row, index_constant(r))))
            sums.append(cgutils.alloca_once(builder, vector))
            builder.store(builder.load(places[r], align=size), sums[r])
        with cgutils.for_range(builder, terms) as loop:
            seen = builder.load(place(x_array, builder.add(x_row, loop.index)), align=size)
            w_at = builder.add(at, builder.mul(loop.index, column_step))
            for r in range(rows):
                weight = builder.load(builder.gep(w_data, [w_at]))
                w_at = builder.add(w_at, row_step)
                one = builder.insert_element(ir.Constant(vector, ir.Undefined), weight, ir.IntType(32)(0))
                each = builder.shuffle_vector(one, one, zeros)
                term = builder.fmul(each, seen, flags=("contract",))
                builder.store(builder.fadd(builder.load(sums[r]), term, flags=("contract",)), sums[r])
        for r in range(rows):
            builder.store(builder.load(sums[r]), places[r], align=size)
        return context.get_dummy_value()

    def index_constant(value: int) -> Any:
        return ir.IntType(types.intp.bitwidth)(value)

    return signature, generate


@njit(**INNER)
def dot(a: Any, b: Any) -> Any:
    """sum_k a_k b_k."""
    total = a.dtype.type(0)
    for k in range(len(a)):
        total += a[k] * b[k]
    return total
