"""Matrix products of the kernels, over rows of a tape."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, overload

from pyro_maf.sweep.kernels.compiler import INNER, inner
from pyro_maf.sweep.layout import Array

__all__ = ["ADDED", "TALLEST", "VECTOR", "add_product", "dot", "transpose"]

PANEL = 256
"""Number of terms added to all rows of y before the next ones, so that these rows of x stay in cache."""
VECTOR = 64
"""Bytes of a row that are processed together."""
ADDED = -1
"""For sums that are added to what is there."""
TALLEST = 8 if "+avx512f" in get_host_cpu_features() else 6
"""Maximum number of rows whose sums fit the processor's registers along with the operands."""


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
        terms = min(PANEL, columns[1] - k)
        r, end = rows
        while r < end:
            left, at, own = end - r, (start + r * row_step + k * column_step, row_step, column_step), y_row + r
            begin, t = initial_at + r if initial_at >= 0 else ADDED, 0
            if left >= TALLEST:
                while t + vector < width:
                    _add_tile(TALLEST, 2, weights, at, x, x_row + k, y, own, t, terms, initial, begin)
                    t += 2 * vector
                if t < width:
                    _add_tile(TALLEST, 1, weights, at, x, x_row + k, y, own, t, terms, initial, begin)
                r += TALLEST
            elif left >= 4:
                while t < width:
                    _add_tile(4, 1, weights, at, x, x_row + k, y, own, t, terms, initial, begin)
                    t += vector
                r += 4
            elif left >= 2:
                while t < width:
                    _add_tile(2, 1, weights, at, x, x_row + k, y, own, t, terms, initial, begin)
                    t += vector
                r += 2
            else:
                while t < width:
                    _add_tile(1, 1, weights, at, x, x_row + k, y, own, t, terms, initial, begin)
                    t += vector
                r += 1
        k += PANEL
        initial_at = ADDED
        if k >= columns[1]:
            break


# As an overload it is compiled once: `njit` compiles anew for each combination of arguments that are literals.
overload(add_product, jit_options=INNER, strict=False)(lambda *_: add_product)  # type: ignore[arg-type]


def _tile(
    typing: Any,
    height: Any,
    vectors: Any,
    weights: Any,
    at: Any,
    x: Any,
    x_row: Any,
    y: Any,
    y_row: Any,
    t: Any,
    terms: Any,
    initial: Any,
    initial_at: Any,
) -> Any:
    """Signature and LLVM code generator of `_add_tile`.

    `_add_tile` is `add_product` for `height` rows of y, `vectors` vectors of tape columns from t on, and `terms` terms
    with the weights from `at` on; `at` has their steps, too. The sums stay in registers until all terms are added,
    which a loop over arrays does not achieve.
    """
    index = types.intp
    three = types.UniTuple(index, 3)
    return types.void(height, vectors, weights, three, x, index, y, index, index, index, initial, index), _generate_tile


def _generate_tile(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    _, _, _, of_weights, _, x_row, _, y_row, t, terms, _, initial_at = arguments
    arrays = [(signature.args[place], arguments[place]) for place in (2, 4, 6, 10)]
    weights, x, y, initial = (context.make_array(kind)(context, builder, array) for kind, array in arrays)
    at, row_step, column_step = cgutils.unpack_tuple(builder, of_weights)
    number = context.get_data_type(signature.args[2].dtype)
    size = context.get_abi_sizeof(number)
    vector = ir.VectorType(number, VECTOR // size)
    undefined, zeros = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), vector.count), None)

    def constant(value: int) -> Any:
        return context.get_constant(types.intp, value)

    def places(array: Any, row: Any) -> list[Any]:
        """Pointers to the vectors of a row."""
        width = cgutils.unpack_tuple(builder, array.shape)[1]
        first = builder.add(builder.mul(row, width), t)
        ends = [
            builder.add(first, constant(number * vector.count)) for number in range(signature.args[1].literal_value)
        ]
        return [builder.bitcast(builder.gep(array.data, [end]), vector.as_pointer()) for end in ends]

    def repeated(array: Any, index: Any) -> Any:
        """A vector of an entry."""
        entry = builder.load(builder.gep(array.data, [index]))
        return builder.shuffle_vector(
            builder.insert_element(undefined, entry, ir.Constant(ir.IntType(32), 0)), undefined, zeros
        )

    rows = [places(y, builder.add(y_row, constant(row))) for row in range(signature.args[0].literal_value)]
    sums = [[cgutils.alloca_once(builder, vector) for _ in row] for row in rows]
    is_added = builder.icmp_signed("<", initial_at, constant(0))
    with builder.if_else(is_added) as (then, otherwise):
        with then:
            for totals, row in zip(sums, rows, strict=True):
                for total, place in zip(totals, row, strict=True):
                    builder.store(builder.load(place, align=size), total)
        with otherwise:
            for index, totals in enumerate(sums):
                first = repeated(initial, builder.add(initial_at, constant(index)))
                for total in totals:
                    builder.store(first, total)
    with cgutils.for_range(builder, terms) as loop:
        seen = [builder.load(place, align=size) for place in places(x, builder.add(x_row, loop.index))]
        weight_at = builder.add(at, builder.mul(loop.index, column_step))
        for totals in sums:
            weight = repeated(weights, weight_at)
            weight_at = builder.add(weight_at, row_step)
            for total, factor in zip(totals, seen, strict=True):
                term = builder.fmul(weight, factor, flags=("contract",))
                builder.store(builder.fadd(builder.load(total), term, flags=("contract",)), total)
    for totals, row in zip(sums, rows, strict=True):
        for total, place in zip(totals, row, strict=True):
            builder.store(builder.load(total), place, align=size)
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


@inner
def transpose(x: Array, x_row: int, rows: int, columns: int, y: Array) -> None:
    """y[j, i] = x[x_row + i, j] for i < rows and j < columns, both rounded up to whole vectors."""
    step = VECTOR // x.itemsize
    for i in range(0, rows, step):
        for j in range(0, columns, step):
            _transpose_tile(x, x_row + i, j, y, j, i)


@inner
def dot(a: Array, a_from: int, b: Array, b_from: int, terms: int) -> Any:
    """sum_k a[a_from + k] b[b_from + k] over k < terms. Slices would be counted as references."""
    total, a_first, b_first = a.dtype.type(0), np.uintp(a_from), np.uintp(b_from)
    for k in range(np.uintp(terms)):
        total += a[a_first + k] * b[b_first + k]
    return total
