r"""The two walks over a program, compiled by numba for CPUs: forward, and back with the gradients.

A chunk of points passes through all layers before the next, so that its part of the tape stays in the processor's
cache. See `layout` for the tables.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types  # type: ignore[attr-defined]
from numba.extending import intrinsic

from pyro_maf.sweep.compile_cache import stored
from pyro_maf.sweep.elementwise import INNER, activate, compress, differentiate
from pyro_maf.sweep.plan import CONTEXT, INPUTS, LANES, Array
from pyro_maf.sweep.products import TALLEST, add_product, dot, transpose
from pyro_maf.sweep.sequential_kernel import walk, walk_back, walk_row
from pyro_maf.sweep.univariate_kernel import apply, pull_back

__all__ = ["backward", "forward", "pack", "unpack"]

ENTRY = {"fastmath": INNER["fastmath"], "error_model": "numpy", "nogil": True}
"""Compiler options of functions that Python calls; they release the interpreter's lock."""


def _memory(typing: Any, address: Any, like: Any) -> Any:
    """Signature and LLVM code generator of `_at`: a pointer to an address, of the type of an array's entries."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.intp, like), generate


_at: Any = intrinsic(_memory)


@stored
@njit(**ENTRY)
def pack(
    addresses: Array, matrices: Array, seen: Array, row_order: Array, column_order: Array, weights: Array, biases: Array
) -> None:
    """Gather masked weights, and biases, from the memory of the parameters.

    Args:
        addresses: Where each tensor begins.
        matrices, seen, row_order, column_order: As in `Tables`.
        weights, biases: Flat, filled here.
    """
    for matrix in matrices:
        rows, columns, row_at, gain = matrix.rows, matrix.columns, matrix.rows_from, weights.dtype.type(matrix.gain)
        weight = carray(_at(addresses[matrix.weight], weights), (rows, columns))
        bias = carray(_at(addresses[matrix.addend], weights), (rows,))
        order = column_order[matrix.columns_from : matrix.columns_from + columns]
        for r in range(rows):
            place, count = row_order[row_at + r], seen[row_at + r]
            if matrix.first:
                biases[matrix.bias + r] = bias[place]
            given, out = weight[place], weights[matrix.start + r * columns : matrix.start + (r + 1) * columns]
            if matrix.natural:
                for k in range(count):
                    out[k] = gain * given[k]
            else:
                for k in range(count):
                    out[k] = gain * given[order[k]]
            # Tiles read no further, see `_height`.
            for k in range(count, min(columns, max(seen[row_at + min(r + TALLEST, rows) - 1], count + TALLEST))):
                out[k] = 0


@njit(**INNER)
def _height(left: int) -> int:
    """Rows of the next tile, with so many left: those of a tile share the columns that the last one sees."""
    return TALLEST if left >= TALLEST else 4 if left >= 4 else 2 if left >= 2 else 1


@njit(**INNER)
def _padded(points: int) -> int:
    return (points + LANES - 1) // LANES * LANES


@njit(**INNER)
def _load(values: Array, b0: int, points: int, width: int, rows: Any) -> None:
    """Points b0 .. b0 + points - 1 as columns; the padding is 0."""
    for b in range(points):
        for i in range(values.shape[1]):
            rows[i, b] = values[b0 + b, i]
    rows[: values.shape[1], points:width] = 0


@njit(**INNER)
def _most_rows(layers: Array, dim: int) -> int:
    most = dim
    for layer in layers:
        most = max(most, layer.rows)
    return most


@stored
@njit(**ENTRY)
def forward(
    v: Array,
    context: Array,
    weights: Array,
    biases: Array,
    layers: Array,
    matrices: Array,
    variables: Array,
    seen: Array,
    steps: Array,
    result: Array,
    rows: int,
    first: int,
    end: int,
    few: int,
    tape: Array,
    w: Array,
    log_det: Array,
) -> None:
    """Points `first` .. `end` - 1 through all layers: fills w, log_det and, for `backward`, the tape.

    Args:
        v: The input, (points, D).
        context: (points, features), with no features for none.
        weights, biases: From `pack`.
        layers, matrices, variables, seen, steps, result: As in `Tables`.
        rows: Rows of the tape for one chunk.
        first, end: Range of points; `first` is a multiple of `chunk`.
        few: Greatest number of points that pass one by one, if nothing is saved.
        tape: (rows of all chunks, chunk); with no rows if nothing is saved for `backward`.
        w, log_det: (points, D) and (points,).
    """
    dim, keep = v.shape[1], tape.shape[0] > 0
    most = _most_rows(layers, dim)
    chunk = tape.shape[1] if keep or end - first > few else 1
    # If nothing is saved, layers take turns in two areas.
    work = tape if keep else np.empty((2 * most + context.shape[1], chunk), v.dtype)
    logs, nowhere = np.empty(chunk, v.dtype), np.empty(chunk, v.dtype)
    for b0 in range(first, end, chunk):
        points = min(chunk, end - b0)
        width = min(_padded(points), chunk)
        here = b0 // chunk * rows if keep else 0
        at_context = 2 * most
        if keep:
            at_context = here + dim
            for layer in layers:
                at_context += layer.rows
        _load(v, b0, points, width, work[here:])
        _load(context, b0, points, width, work[at_context:])
        logs[:] = 0
        for layer in layers:
            after = here + layer.rows if keep else most - here
            if layer.levels:
                for m in range(layer.first, layer.end):
                    _begin(matrices[m], seen, weights, biases, work, here, at_context, width)
                if width == 1:
                    walk_row(layer, matrices, variables, steps, weights, work, here, after, logs, nowhere)
                else:
                    walk(layer, matrices, variables, steps, weights, work, here, after, width, logs, nowhere)
                here = after
                continue
            for j in range(layer.seen):
                row = here + variables[layer.seen_from + j]
                compress(work[row, :width], work[here + layer.inputs + j, :width], nowhere[:width])
            for m in range(layer.first, layer.end):
                _multiply(matrices[m], seen, weights, biases, work, here, at_context, width)
            for j in range(layer.moved):
                row = variables[layer.moved_from + j]
                x, out = work[here + row, :width], work[after + row, :width]
                apply(layer, j, variables, work, here, 0, x, out, logs[:width])
            for j in range(layer.rest):
                row = variables[layer.rest_from + j]
                for t in range(width):
                    work[after + row, t] = work[here + row, t]
            here = after
        log_det[b0 : b0 + points] = logs[:points]
        for b in range(points):
            for i in range(dim):
                w[b0 + b, i] = work[here + result[i], b]


@njit(**INNER)
def _begin(
    matrix: Any, seen: Array, weights: Array, biases: Array, work: Array, layer: int, at_context: int, width: int
) -> None:
    """Set a level's units to what does not depend on the variables: biases, and the product with the context."""
    if matrix.source == CONTEXT:
        _multiply(matrix, seen, weights, biases, work, layer, at_context, width)
    elif matrix.first:
        for r in range(matrix.rows):
            work[layer + matrix.own + r, :width] = biases[matrix.bias + r]


@njit(**INNER)
def _multiply(
    matrix: Any, seen: Array, weights: Array, biases: Array, work: Array, layer: int, at_context: int, width: int
) -> None:
    """Add a matrix's product to its level and, if it is the last to be added, apply the activation."""
    below = at_context if matrix.source == CONTEXT else layer + matrix.below
    own, slopes = layer + matrix.own, layer + matrix.slopes
    r = 0
    while r < matrix.rows:
        last = r + _height(matrix.rows - r)
        if matrix.first:
            for q in range(r, last):
                bias = biases[matrix.bias + q]
                for t in range(width):
                    work[own + q, t] = bias
        if width == 1:
            column = work.reshape(-1)
            for q in range(r, last):
                at, count = matrix.start + q * matrix.columns, seen[matrix.rows_from + q]
                column[own + q] += dot(weights[at : at + count], column[below : below + count])
        else:
            columns = (0, seen[matrix.rows_from + last - 1])
            add_product(weights, matrix.start, matrix.columns, 1, (r, last), columns, work, below, work, own, 0, width)
        if matrix.kind >= 0:
            activate(matrix.kind, work, own + r, own + last, work, slopes - own, 0, width)
        r = last


@stored
@njit(**ENTRY)
def backward(
    weights: Array,
    layers: Array,
    matrices: Array,
    variables: Array,
    seen: Array,
    heard: Array,
    steps: Array,
    result: Array,
    wanted: Array,
    rows: int,
    first: int,
    end: int,
    tape: Array,
    grad_w: Array,
    grad_log_det: Array,
    grad_v: Array,
    grad_context: Array,
    gradients: Array,
    by_biases: Array,
) -> None:
    """Gradients of <grad_w, w> + <grad_log_det, log_det> for points `first` .. `end` - 1.

    Args:
        weights, layers, matrices, variables, seen, heard, steps, result, rows, first, end, tape: As in `forward`.
        wanted: For each matrix, whether the gradient with respect to its weight or bias is.
        grad_w, grad_log_det: (points, D) and (points,).
        grad_v, grad_context: (points, D) and (points, features); with no columns if not wanted.
        gradients, by_biases: Flat, with respect to the packed weights and biases; filled here.
    """
    dim, number = grad_w.shape[1], grad_w.dtype
    most = _most_rows(layers, dim)
    widest = LANES
    for matrix in matrices:
        widest = max(widest, matrix.stride)
    widest += LANES * (widest // LANES % 2 == 0)
    chunk = tape.shape[1]
    delta, transposed = np.empty((most, chunk), number), np.empty((chunk, widest), number)
    grad, logs = np.empty((dim, chunk), number), np.empty(chunk, number)
    slope, nowhere = np.empty(chunk, number), np.empty(chunk, number)
    of_context = np.empty((grad_context.shape[1], chunk), number)
    for b0 in range(first, end, chunk):
        points = min(chunk, end - b0)
        width = _padded(points)
        here = b0 // chunk * rows
        for layer in layers:
            here += layer.rows
        at_context = here + dim
        for b in range(points):
            logs[b] = grad_log_det[b0 + b]
            for i in range(dim):
                grad[result[i], b] = grad_w[b0 + b, i]
        logs[points:width] = 0
        grad[:, points:width] = 0
        of_context[:] = 0
        for index in range(len(layers) - 1, -1, -1):
            layer, after = layers[index], here
            here -= layer.rows
            to_variables = (index > 0 or grad_v.shape[1] > 0) and layer.levels == 0
            if layer.levels:
                network = layer, matrices, variables, steps, weights
                walk_back(*network, tape, here, after, width, grad, logs, delta, slope, nowhere)
            for j in range(0 if layer.levels else layer.moved):
                row = variables[layer.moved_from + j]
                x, out = tape[here + row, :width], tape[after + row, :width]
                pull_back(layer, j, variables, tape, here, 0, x, out, grad[row, :width], logs[:width], delta, 0)
            for m in range(layer.end - 1, layer.first - 1, -1):
                matrix = matrices[m]
                below = at_context if matrix.source == CONTEXT else here + matrix.below
                if wanted[m]:
                    transpose(tape, below, matrix.columns, width, transposed)
                    transposed[:width, matrix.columns : matrix.stride] = 0
                    _add_gradient(matrix, seen, delta, transposed, width, b0 == first, gradients, by_biases)
                if matrix.source == CONTEXT:
                    if len(of_context):
                        _multiply_back(matrix, heard, weights, delta, of_context, 0, tape, here, width)
                elif layer.levels == 0 and (matrix.source != INPUTS or to_variables):
                    _multiply_back(matrix, heard, weights, delta, delta, matrix.below, tape, here, width)
            if to_variables:
                for j in range(layer.seen):
                    row = variables[layer.seen_from + j]
                    compress(tape[here + row, :width], nowhere[:width], slope[:width])
                    for t in range(width):
                        grad[row, t] += delta[layer.inputs + j, t] * slope[t]
        for b in range(points):
            for i in range(grad_v.shape[1]):
                grad_v[b0 + b, i] = grad[i, b]
            for i in range(len(of_context)):
                grad_context[b0 + b, i] = of_context[i, b]


@njit(**INNER)
def _add_gradient(
    matrix: Any, seen: Array, delta: Array, inputs: Array, width: int, fresh: bool, gradients: Array, by_biases: Array
) -> None:
    """Add the gradient with respect to a matrix, from that of its outputs and from its inputs, (points, columns).

    With `fresh` nothing was added before.
    """
    own = gradients[matrix.grad : matrix.grad + matrix.rows * matrix.stride].reshape((matrix.rows, matrix.stride))
    flat, start = delta.reshape(-1), matrix.own * delta.shape[1]
    r = 0
    while r < matrix.rows:
        last = r + _height(matrix.rows - r)
        columns = seen[matrix.rows_from + last - 1]
        if fresh:
            for q in range(r, last):
                for k in range(_padded(columns)):
                    own[q, k] = 0
        add_product(flat, start, delta.shape[1], 1, (r, last), (0, width), inputs, 0, own, 0, 0, columns)
        r = last
    if matrix.first:
        for r in range(matrix.rows):
            total = delta.dtype.type(0)
            for t in range(width):
                total += delta[matrix.own + r, t]
            by_biases[matrix.bias + r] = total if fresh else total + by_biases[matrix.bias + r]


@njit(**INNER)
def _multiply_back(
    matrix: Any,
    heard: Array,
    weights: Array,
    delta: Array,
    out: Array,
    out_row: int,
    tape: Array,
    layer: int,
    width: int,
) -> None:
    """Add the transposed matrix's product with the gradient of its outputs to that of its inputs."""
    k = 0
    while k < matrix.columns:
        last = k + _height(matrix.columns - k)
        if matrix.fresh:
            for q in range(out_row + k, out_row + last):
                for t in range(width):
                    out[q, t] = 0
        rows = (heard[matrix.columns_from + k], matrix.rows)
        add_product(
            weights, matrix.start, 1, matrix.columns, (k, last), rows, delta, matrix.own, out, out_row, 0, width
        )
        if matrix.below_kind >= 0:
            below, slopes = layer + matrix.below + k, matrix.below_slopes - matrix.below
            differentiate(matrix.below_kind, tape, below, below + last - k, tape, slopes, out, out_row + k, 0, width)
        k = last


@stored
@njit(**ENTRY)
def unpack(
    matrices: Array,
    seen: Array,
    row_order: Array,
    column_order: Array,
    offsets: Array,
    gradients: Array,
    by_biases: Array,
    flat: Array,
) -> None:
    """Gradients with respect to the parameters, one after another.

    Args:
        matrices, seen, row_order, column_order: As in `Tables`.
        offsets: Where the gradient of each tensor begins.
        gradients, by_biases: From `backward`.
        flat: Filled here.
    """
    for matrix in matrices:
        rows, columns, gain = matrix.rows, matrix.columns, flat.dtype.type(matrix.gain)
        order = column_order[matrix.columns_from : matrix.columns_from + columns]
        for r in range(rows):
            place, count = row_order[matrix.rows_from + r], seen[matrix.rows_from + r]
            at = offsets[matrix.weight] + place * columns
            start = matrix.grad + r * matrix.stride
            out, own = flat[at : at + columns], gradients[start : start + count]
            if matrix.natural:
                for k in range(count):
                    out[k] = gain * own[k]
                for k in range(count, columns):
                    out[k] = 0
            else:
                for k in range(count):
                    out[order[k]] = gain * own[k]
                for k in range(count, columns):
                    out[order[k]] = 0
            if matrix.first:
                flat[offsets[matrix.addend] + place] = by_biases[matrix.bias + r]
