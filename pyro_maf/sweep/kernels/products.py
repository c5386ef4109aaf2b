"""Matrix products of the kernels, over rows of a tape, and other loops over whole processor vectors.

Loops that numba would compile to slower code are written in LLVM IR.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, overload

from pyro_maf.sweep.kernels.compiler import INNER, inner
from pyro_maf.sweep.layout import Array

__all__ = ["ADDED", "TALLEST", "VECTOR", "adam", "add_product", "dot", "height_of", "pointer_to"]
__all__ += ["transpose"]

VECTOR = 64
"""Number of bytes of a row that are processed together."""
TALLEST = 8 if "+avx512f" in get_host_cpu_features() else 6
"""Maximum number of rows whose sums fit into the processor's registers along with the operands."""
N, PLACE = types.intp, ir.IntType(32)
PANEL = 256
"""Number of terms added to all rows of y before the next ones, so that these rows of x stay in cache."""
ADDED = -1
"""Value of `initial_at` for sums that are added to the existing values."""


class _Code:
    """The code of an intrinsic, for vectors of the numbers in its arrays.

    Args:
        context, builder, signature, arguments: From numba.
        first: Index of an argument that is an array.
    """

    def __init__(self, context: Any, builder: Any, signature: Any, arguments: Sequence[Any], first: int) -> None:
        number = context.get_data_type(signature.args[first].dtype)
        self.builder, self.size = builder, context.get_abi_sizeof(number)
        self.count = VECTOR // self.size
        self.vector, self.places = ir.VectorType(number, self.count), ir.VectorType(PLACE, self.count)
        self.arrays = {
            index: context.make_array(kind)(context, builder, value)
            for index, (kind, value) in enumerate(zip(signature.args, arguments, strict=True))
            if isinstance(kind, types.Array)
        }

    def place(self, array: int, at: Any, row: Any = None, kind: Any = None) -> Any:
        """Pointer to the vector of this kind that starts at an entry of an array, or of one of its rows."""
        if row is not None:
            width = cgutils.unpack_tuple(self.builder, self.arrays[array].shape)[1]
            at = self.builder.add(self.builder.mul(row, width), at)
        entry = self.builder.gep(self.arrays[array].data, [at])
        return self.builder.bitcast(entry, (kind or self.vector).as_pointer())

    def load(self, place: Any) -> Any:
        return self.builder.load(place, align=self.size)

    def store(self, value: Any, place: Any) -> None:
        self.builder.store(value, place, align=self.size)

    def entry(self, array: int, at: Any) -> Any:
        """A vector that repeats an entry of an array."""
        return self.repeated(self.builder.load(self.builder.gep(self.arrays[array].data, [at])))

    def repeated(self, value: Any) -> Any:
        """A vector that repeats a number."""
        undefined = ir.Constant(ir.VectorType(value.type, self.count), ir.Undefined)
        one = self.builder.insert_element(undefined, value, ir.Constant(PLACE, 0))
        return self.builder.shuffle_vector(one, undefined, ir.Constant(self.places, None))


def _add_tile(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    code, (height, vectors) = _Code(context, builder, signature, arguments, 2), signature.args[:2]
    _, _, _, of_weights, _, x_row, _, y_row, t, terms, _, initial_at = arguments
    at, row_step, column_step = cgutils.unpack_tuple(builder, of_weights)

    def number(value: int) -> Any:
        return context.get_constant(N, value)

    def row_of(array: int, row: Any) -> list[Any]:
        ends = [builder.add(t, number(index * code.count)) for index in range(vectors.literal_value)]
        return [code.place(array, end, row) for end in ends]

    rows = [row_of(6, builder.add(y_row, number(row))) for row in range(height.literal_value)]
    sums = [[cgutils.alloca_once(builder, code.vector) for _ in row] for row in rows]
    pairs = [pair for totals, row in zip(sums, rows, strict=True) for pair in zip(totals, row, strict=True)]
    with builder.if_else(builder.icmp_signed("<", initial_at, number(0))) as (then, otherwise):
        with then:
            for total, place in pairs:
                builder.store(code.load(place), total)
        with otherwise:
            for index, totals in enumerate(sums):
                first = code.entry(10, builder.add(initial_at, number(index)))
                for total in totals:
                    builder.store(first, total)
    with cgutils.for_range(builder, terms) as loop:
        seen = [code.load(place) for place in row_of(4, builder.add(x_row, loop.index))]
        weight_at = builder.add(at, builder.mul(loop.index, column_step))
        for totals in sums:
            weight = code.entry(2, weight_at)
            weight_at = builder.add(weight_at, row_step)
            for total, factor in zip(totals, seen, strict=True):
                term = builder.fmul(weight, factor, flags=("contract",))
                builder.store(builder.fadd(builder.load(total), term, flags=("contract",)), total)
    for total, place in pairs:
        code.store(builder.load(total), place)
    return context.get_dummy_value()


add_tile: Any = intrinsic(prefer_literal=True)(
    lambda _, height, vectors, weights, at, x, x_row, y, y_row, t, terms, initial, initial_at: (
        types.void(height, vectors, weights, types.UniTuple(N, 3), x, N, y, N, N, N, initial, N),
        _add_tile,
    )
)
"""`products.add_product` for `height` rows of y, `vectors` vectors of tape columns from t on, and `terms` terms.

`at` is the place of the first weight, with the strides to the next row and column. The sums stay in registers until all
terms are added, which a loop over arrays does not achieve.
"""


def _transpose_tile(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    code, (_, x_row, t, _, y_row, column) = _Code(context, builder, signature, arguments, 0), arguments
    half = code.count // 2

    def row_of(first: Any, row: int) -> Any:
        return builder.add(first, context.get_constant(N, row))

    def interleaved(first: int) -> Any:
        lanes = [lane for j in range(first, first + half) for lane in (j, code.count + j)]
        return ir.Constant(code.places, [ir.Constant(PLACE, lane) for lane in lanes])

    rows = [code.load(code.place(0, t, row_of(x_row, row))) for row in range(code.count)]
    for _ in range(code.count.bit_length() - 1):  # interleave rows half a tile apart, log2 of the tile's size times
        pairs = zip(rows[:half], rows[half:], strict=True)
        rows = [builder.shuffle_vector(*pair, interleaved(first)) for pair in pairs for first in (0, half)]
    for row, value in enumerate(rows):
        code.store(value, code.place(3, column, row_of(y_row, row)))
    return context.get_dummy_value()


transpose_tile: Any = intrinsic(
    lambda _, x, x_row, t, y, y_row, column: (types.void(x, N, N, y, N, N), _transpose_tile)
)
"""y[y_row + j, column + i] = x[x_row + i, t + j] for i and j over one vector each; in registers, unlike any loop over
arrays."""


def _adam(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    code = _Code(context, builder, signature, arguments, 0)
    _, own, _, _, _, _, at, _, packed_at, _, rank_at, count, of_factors = arguments
    places = [code.place(array, at) for array in (2, 3, 4, 5)] + [code.place(7, packed_at)]
    gradient, old = code.load(code.place(0, own)), [code.load(place) for place in places]
    weight, first, second, average, _ = old
    rank = builder.load(code.place(9, rank_at, kind=code.places), align=4)
    is_seen = builder.icmp_signed("<", rank, code.repeated(builder.trunc(count, PLACE)))
    factors = map(code.repeated, cgutils.unpack_tuple(builder, of_factors))
    scale, gain, decay, of_first, of_second, rate, root, epsilon, share = factors

    def towards(start: Any, end: Any, factor: Any) -> Any:
        return builder.fadd(start, builder.fmul(factor, builder.fsub(end, start)))

    kind, name = ir.FunctionType(code.vector, [code.vector]), f"llvm.sqrt.v{code.count}f{8 * code.size}"
    sqrt = cgutils.get_or_insert_function(builder.module, kind, name)
    gradient = builder.fadd(builder.fmul(gradient, scale), builder.fmul(weight, decay))
    first = towards(first, gradient, of_first)
    second = towards(second, builder.fmul(gradient, gradient), of_second)
    spread = builder.fadd(builder.fmul(builder.call(sqrt, [second]), root), epsilon)
    weight = builder.fsub(weight, builder.fdiv(builder.fmul(rate, first), spread))
    new = weight, first, second, towards(average, weight, share), builder.fmul(gain, weight)
    for place, value, before in zip(places, new, old, strict=True):
        code.store(builder.select(is_seen, value, before), place)
    return context.get_dummy_value()


adam: Any = intrinsic(
    lambda _, gradients, own, flat, first, second, average, at, weights, packed_at, rank, rank_at, count, factors: (
        types.void(gradients, N, flat, first, second, average, N, weights, N, rank, N, N, factors),
        _adam,
    )
)
"""An Adam step for a vector of entries, those with a rank below `count`; arguments as in `entries.adam_step`.

It uses six arrays, more than a compiler assumes to be disjoint in a loop: rows of numba's loops took four times as
long, 120 us instead of 30 for five layers of 6 variables and 100 units.
"""
pointer_to: Any = intrinsic(
    lambda _, address, like: (
        types.CPointer(like.dtype)(N, like),
        lambda context, builder, signature, arguments: builder.inttoptr(
            arguments[0], context.get_value_type(signature.return_type)
        ),
    )
)
"""A pointer to an address, with the type of an array's entries."""


# -- loops over tiles -------------------------------------------------------------------------------------------------


@inner
def height_of(left: int) -> int:
    """Number of rows in the next tile, with `left` rows left; they share the columns that the last one sees."""
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


# An overload is compiled once, whereas `njit` compiles for each combination of literal arguments.
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
    """sum_k a[a_from + k] b[b_from + k] over k < terms. Slices would be reference-counted."""
    total, a_first, b_first = a.dtype.type(0), np.uintp(a_from), np.uintp(b_from)
    for k in range(np.uintp(terms)):
        total += a[a_first + k] * b[b_first + k]
    return total
