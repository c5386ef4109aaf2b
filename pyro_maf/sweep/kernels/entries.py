"""The kernels that Python calls: the two walks, and the other parts of a training step.

Weights are brought into the order of a program, and gradients out of it; Adam's step touches only entries that are not
masked out. `Tails` is compiled, too: for few draws, torch takes longer to start operations than to run them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from pyro_maf.sweep.kernels.compiler import entry, inner
from pyro_maf.sweep.kernels.elementwise import expm1, log
from pyro_maf.sweep.kernels.products import TALLEST, VECTOR, adam, pointer_to
from pyro_maf.sweep.kernels.walks import backward, forward
from pyro_maf.sweep.layout import LANES, Array, Matrix, Tables

__all__ = ["adam_step", "backward", "forward", "pack", "tails", "tails_back", "unpack"]

Settings = tuple[float, float, float, float, float, float]
SERIES = 0.01
"""Exponent below which functions are computed by their series, exact to rounding."""


@entry
def pack(addresses: Array, tables: Tables, weights: Array, biases: Array) -> None:
    """Gather masked weights, and biases, both flat, from the addresses of the parameters."""
    seen, row_order, column_order = tables.seen, tables.row_order, tables.column_order
    for matrix in tables.matrices:
        rows, columns, row_at, gain = matrix.rows, matrix.columns, matrix.rows_from, weights.dtype.type(matrix.gain)
        weight = carray(pointer_to(addresses[matrix.weight], weights), (_begins(matrix, rows) + columns,))
        bias = carray(pointer_to(addresses[matrix.addend], weights), (matrix.addend_from + rows,))
        order = np.uintp(matrix.columns_from)
        for r in range(rows):
            place, count = row_order[row_at + r], seen[row_at + r]
            if matrix.first:
                biases[matrix.bias + r] = bias[matrix.addend_from + place]
            # Unsigned indices into whole arrays: slices would be reference-counted, and keep loops from being
            # vectorised.
            at, own = np.uintp(_begins(matrix, place)), np.uintp(matrix.start + r * matrix.stride)
            if matrix.natural:
                for k in range(np.uintp(count)):
                    weights[own + k] = gain * weight[at + k]
            else:
                for k in range(np.uintp(count)):
                    weights[own + k] = gain * weight[at + np.uintp(column_order[order + k])]
            # Tiles read no further, see `height_of`.
            most = min(columns, max(seen[row_at + min(r + TALLEST, rows) - 1], count + TALLEST))
            for k in range(np.uintp(count), np.uintp(most)):
                weights[own + k] = 0


@inner
def _begins(matrix: Matrix, row: int) -> int:
    """Offset of a row of a matrix in the tensor of its weight."""
    return matrix.weight_from + (row * (row - 1) // 2 if matrix.packed else row * matrix.columns)


@entry
def unpack(tables: Tables, offsets: Array, gradients: Array, by_biases: Array, flat: Array) -> None:
    """Write gradients w.r.t. the parameters, consecutively from these offsets on, from those of `backward`."""
    seen, row_order, column_order = tables.seen, tables.row_order, tables.column_order
    for matrix in tables.matrices:
        rows, columns, gain, order = matrix.rows, matrix.columns, flat.dtype.type(matrix.gain), matrix.columns_from
        for r in range(rows):
            place, count = row_order[matrix.rows_from + r], np.uintp(seen[matrix.rows_from + r])
            at = np.uintp(offsets[matrix.weight] + _begins(matrix, place))
            own = np.uintp(matrix.start + r * matrix.stride)
            for k in range(count if matrix.natural else 0, count if matrix.packed else np.uintp(columns)):
                flat[at + k] = 0
            if matrix.natural:
                for k in range(count):
                    flat[at + k] = gain * gradients[own + k]
            else:
                for k in range(count):
                    flat[at + np.uintp(column_order[np.uintp(order) + k])] = gain * gradients[own + k]
            if matrix.first:
                flat[offsets[matrix.addend] + matrix.addend_from + place] = by_biases[matrix.bias + r]


# -- a step of Adam ---------------------------------------------------------------------------------------------------


@entry
def adam_step(
    tables: Tables,
    offsets: Array,
    gradients: Array,
    by_biases: Array,
    most: float,
    settings: Settings,
    flat: Array,
    state: tuple[Array, Array, Array],
    steps: Array,
    weights: Array,
    biases: Array,
) -> float:
    """Take an Adam step and add the result to an average of the weights; do neither if the gradient is not finite.

    Masked entries stay unchanged. Arrays that are read and written in vectors have `LANES` more entries at their end.

    Args:
        tables: The layers.
        offsets: Start of each tensor in `flat`.
        gradients, by_biases: From `backward`.
        most: Norm to which the gradient is clipped.
        settings: Learning rate, weight decay, beta1, beta2, epsilon, and the weight of the result in its average.
        flat: The concatenated tensors.
        state: Averages of their gradients, of the squares of these, and of the tensors themselves, in the same order.
        steps: The number of steps so far, incremented here.
        weights, biases: As from `pack`, before the step and after it.

    Returns:
        The gradient's norm before clipping.
    """
    norm = math.sqrt(_squares(tables, gradients, by_biases))
    if not norm < np.inf:
        return norm
    widest = 0
    for matrix in tables.matrices:
        widest = max(widest, matrix.columns + LANES, matrix.rows + LANES)
    rank, room = np.empty(widest, np.int32), np.empty((2, widest), flat.dtype)
    steps[0] += 1
    number, clipped = flat.dtype.type, most / (norm + 1e-6) if norm > most else 1.0
    others = _numbers(number, settings, steps[0])
    for matrix in tables.matrices:
        factors = (number(clipped * matrix.gain), number(matrix.gain)) + others
        order, offset = tables.column_order[matrix.columns_from :][: matrix.columns], offsets[matrix.weight]
        of_rows = tables.row_order[matrix.rows_from :], tables.seen[matrix.rows_from :]
        _step_of_matrix(matrix, False, of_rows, order, offset, gradients, factors, flat, state, weights, rank, room)
        if matrix.first:
            factors = (number(clipped), number(1)) + others
            order, offset = of_rows[0][: matrix.rows], offsets[matrix.addend] + matrix.addend_from
            _step_of_matrix(matrix, True, of_rows, order, offset, by_biases, factors, flat, state, biases, rank, room)
    return norm


@inner
def _numbers(number: Any, settings: Settings, steps: int) -> tuple[Any, ...]:
    """Constants of a step in the order in which `adam` reads them, after those of a matrix."""
    rate, decay, beta1, beta2, epsilon, share = settings
    rate, root = rate / (1 - beta1**steps), (1 - beta2**steps) ** -0.5
    averages = number(decay), number(1 - beta1), number(1 - beta2)
    return averages + (number(rate), number(root), number(epsilon), number(share))


@inner
def _squares(tables: Tables, gradients: Array, by_biases: Array) -> float:
    """Sum of the squares of a gradient."""
    total = 0.0
    for matrix in tables.matrices:
        of_matrix = 0.0
        for r in range(matrix.rows):
            of_row, first = gradients.dtype.type(0), np.uintp(matrix.start + r * matrix.stride)
            for k in range(np.uintp(tables.seen[matrix.rows_from + r])):
                of_row += gradients[first + k] * gradients[first + k]
            of_matrix += of_row
        total += of_matrix * matrix.gain * matrix.gain
        if matrix.first:
            for r in range(matrix.rows):
                total += by_biases[matrix.bias + r] * by_biases[matrix.bias + r]
    return total


@inner
def _rank(order: Array, rank: Array) -> bool:
    """Compute the rank of each entry in an order, and its length as rank beyond; return whether it is sorted."""
    is_sorted = True
    for k in range(len(order)):
        rank[order[k]] = k
        is_sorted &= order[k] == k
    rank[len(order) : len(order) + LANES] = len(order)
    return is_sorted


@inner
def _step_of_matrix(
    matrix: Matrix,
    is_bias: bool,
    of_rows: tuple[Array, Array],
    order: Array,
    offset: int,
    gradients: Array,
    factors: tuple[Any, ...],
    flat: Array,
    state: tuple[Array, Array, Array],
    weights: Array,
    rank: Array,
    room: Array,
) -> None:
    """The step for all rows of a matrix, or for its biases, which form one row, from `offset` on in `flat`.

    All in one function, since a call per row would reference-count the arrays of the state each time.
    """
    (first, second, average), (row_order, seen), in_order, result = state, of_rows, room[0], room[1]
    lanes, is_sorted = VECTOR // flat.itemsize, _rank(order, rank)
    for r in range(1 if is_bias else matrix.rows):
        if is_bias:
            count, at, own = matrix.rows, offset, matrix.bias
        else:
            count, at, own = seen[r], offset + _begins(matrix, row_order[r]), matrix.start + r * matrix.stride
        if is_sorted:
            for k in range(0, count, lanes):
                here, left = own + k, count - k
                adam(gradients, here, flat, first, second, average, at + k, weights, here, rank, 0, left, factors)
            continue
        in_order[: len(order)] = 0
        for k in range(count):
            in_order[order[k]] = gradients[own + k]
        for k in range(0, len(order), lanes):
            adam(in_order, k, flat, first, second, average, at + k, result, k, rank, k, count, factors)
        for k in range(count):
            weights[own + k] = result[order[k]]


# -- tails of learned weight ------------------------------------------------------------------------------------------


@entry
def tails(
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
        weights: Weights of the right and left tails, (2, D).
        loc, scale: (D,).
        sign: Sign of the weights.
        largest: Exponent beyond which the map is its tangent.
        y, log_det: Filled here, (points, D) and (points,).
        partials: Derivatives of y and of the log-determinant w.r.t. x, and of both w.r.t. the weight, filled here,
            (4, points, D); or without points if not wanted.
    """
    far, wanted = math.expm1(largest), partials.shape[1] > 0
    for b in range(len(x)):
        total = 0.0
        for i in range(x.shape[1]):
            unit = float(scale[i])
            z = (float(x[b, i]) - float(loc[i])) / unit
            weight = sign * float(weights[0 if z > 0 else 1, i])
            is_heavy, size = weight >= 0, abs(weight)
            limit = largest if is_heavy else far
            outside = size * z * z > limit
            edge = math.copysign(math.sqrt(limit / size), z) if outside else z
            raw = limit if outside else size * z * z
            u, grown = (raw, expm1(raw)) if is_heavy else (log(1 + raw), raw)
            ratio = 1 + u / 2 * (1 + u / 3 * (1 + u / 4 * (1 + u / 5 * (1 + u / 6)))) if u < SERIES else grown / u
            root, half, whole = math.sqrt(ratio), 0.5 * log(ratio), 1 + grown
            growth, derivative = (root, whole / root) if is_heavy else (1 / root, root / whole)
            moved = edge * growth + (z - edge) * derivative
            y[b, i] = loc[i] + unit * moved
            total += u - half if is_heavy else half - u
            if wanted:
                slope = 0.25 + u / 24 - u * u * u / 1440 if u < SERIES else 0.5 / grown + 0.5 - 0.5 / u
                # Outside, the exponent is constant, and squares of the values there may overflow.
                share = 0.0 if outside else 1.0 if is_heavy else 1 / (1 + grown)
                square, by_log = 0.0 if outside else z * z, (1 - slope) * share
                by_weight = (growth - derivative) * edge / (-2 * weight) if outside else 0.0
                partials[0, b, i] = derivative
                partials[1, b, i] = 2 * weight * z * by_log / unit
                partials[2, b, i] = unit * (moved * slope * share * square + by_weight)
                partials[3, b, i] = square * by_log
        log_det[b] = total


@entry
def tails_back(
    x: Array,
    loc: Array,
    partials: Array,
    grad_y: Array,
    grad_log_det: Array,
    sign: int,
    grad_x: Array,
    by_weights: Array,
) -> None:
    """The adjoint of `tails`: fills `grad_x`, and adds the gradient with respect to the weights to `by_weights`."""
    for b in range(len(x)):
        for i in range(x.shape[1]):
            grad_x[b, i] = grad_y[b, i] * partials[0, b, i] + grad_log_det[b] * partials[1, b, i]
            by_weight = grad_y[b, i] * partials[2, b, i] + grad_log_det[b] * partials[3, b, i]
            by_weights[0 if x[b, i] > loc[i] else 1, i] += sign * by_weight
