r"""The two walks over a program, compiled by numba for CPUs: forward, and back with the gradients.

A chunk of points passes through all layers before the next, so that its part of the tape stays in the processor's
cache. See `layout` for the tables.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyro_maf.sweep.kernels.compiler import entry, inner
from pyro_maf.sweep.kernels.elementwise import activate, compress, differentiate
from pyro_maf.sweep.kernels.products import ADDED, TALLEST, VECTOR, add_product, dot, transpose
from pyro_maf.sweep.kernels.sequential import Part, walk, walk_back, walk_row
from pyro_maf.sweep.kernels.univariate import apply, pull_back
from pyro_maf.sweep.layout import CONTEXT, INPUTS, LANES, Array, Tables

__all__ = ["backward", "forward"]


@inner
def _height(left: int) -> int:
    """Rows of the next tile, with so many left: those of a tile share the columns that the last one sees."""
    return TALLEST if left >= TALLEST else 4 if left >= 4 else 2 if left >= 2 else 1


@inner
def _padded(points: int) -> int:
    return (points + LANES - 1) // LANES * LANES


@inner
def _room(rows: int, columns: int, like: Array) -> Array:
    """Rows with arbitrary entries that begin where a line of the processor's cache does, if `columns` are lines."""
    line = VECTOR // like.itemsize
    flat = np.empty(rows * columns + line, like.dtype)
    first = -flat.ctypes.data // like.itemsize % line
    return flat[first : first + rows * columns].reshape((rows, columns))


@inner
def _load(values: Array, b0: int, points: int, width: int, rows: Any) -> None:
    """Points b0 .. b0 + points - 1 as columns; the padding is 0."""
    for i0 in range(0, values.shape[1], LANES):  # some variables at a time, whose rows stay in the cache
        for b in range(points):
            for i in range(i0, min(i0 + LANES, values.shape[1])):
                rows[i, b] = values[b0 + b, i]
    rows[: values.shape[1], points:width] = 0


@inner
def _store(rows: Array, result: Array, b0: int, points: int, values: Array) -> None:
    """Columns as points b0 .. b0 + points - 1; variable i is in row result[i]."""
    for i0 in range(0, values.shape[1], LANES):
        for b in range(points):
            for i in range(i0, min(i0 + LANES, values.shape[1])):
                values[b0 + b, i] = rows[result[i], b]


@inner
def _most_rows(layers: Array, dim: int) -> int:
    most = dim
    for layer in layers:
        most = max(most, layer.rows)
    return most


@inner
def _all_rows(layers: Array) -> int:
    total = 0
    for layer in layers:
        total += layer.rows
    return total


@entry
def forward(
    tables: Tables,
    weights: Array,
    biases: Array,
    v: Array,
    context: Array,
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
        tables: The layers.
        weights, biases: From `pack`.
        v: The input, (points, D).
        context: (points, features), with no features for none.
        rows: Rows of the tape for one chunk.
        first, end: Range of points; `first` is a multiple of the chunk's length.
        few: Greatest number of points that pass one by one, if nothing is saved.
        tape: (rows of all chunks, points of a chunk); with no rows if nothing is saved for `backward`.
        w, log_det: (points, D) and (points,).
    """
    dim, keep, most = v.shape[1], len(tape) > 0, _most_rows(tables.layers, v.shape[1])
    chunk = tape.shape[1] if keep or end - first > few else 1
    # If nothing is saved, every layer has the same rows, and one more for a variable's result.
    work = tape if keep else _room(most + 1 + context.shape[1], chunk, v)
    both = _room(2, chunk, v)
    logs, nowhere = both[0], both[1]
    for b0 in range(first, end, chunk):
        points = min(chunk, end - b0)
        width, here = min(_padded(points), chunk), b0 // chunk * rows if keep else 0
        at_context = here + _all_rows(tables.layers) + dim if keep else most + 1
        _load(v, b0, points, width, work[here:])
        _load(context, b0, points, width, work[at_context:])
        logs[:] = 0
        for layer in tables.layers:
            part = Part(work, here, here + layer.rows if keep else most, at_context, points, width, keep)
            if layer.levels == 0:
                _pass(layer, tables, weights, biases, part, logs[:width], nowhere[:width])
            else:
                _begin(layer, tables, weights, biases, part)
                if width == 1:
                    walk_row(layer, tables, weights, part, logs, nowhere)
                else:
                    walk(layer, tables, weights, part, logs[:width], nowhere[:width])
            here += layer.rows if keep else 0
        for b in range(points):  # between arrays, an assignment of slices takes a second to compile
            log_det[b0 + b] = logs[b]
        _store(work[here:], tables.result, b0, points, w)


@inner
def _pass(layer: Any, tables: Tables, weights: Array, biases: Array, part: Part, logs: Array, nowhere: Array) -> None:
    """A layer in its parallel direction."""
    variables, matrices, seen = tables.variables, tables.matrices, tables.seen
    tape, here, after, context, _, width, keeps = part
    for j in range(layer.seen):
        row = here + variables[layer.seen_from + j]
        compress(tape[row, :width], tape[here + layer.inputs + j, :width], nowhere, layer.bulk)
    for m in range(layer.first, layer.end):
        _multiply(matrices[m], seen, weights, biases, tape, here, context, width)
    for j in range(layer.moved):
        row = variables[layer.moved_from + j]
        x, w = tape[here + row, :width], tape[after + row if keeps else after, :width]
        apply(layer, j, variables, tape, here, 0, x, w, logs)
        if not keeps:
            for t in range(width):
                x[t] = w[t]
    for j in range(layer.rest if keeps else 0):
        row = variables[layer.rest_from + j]
        for t in range(width):
            tape[after + row, t] = tape[here + row, t]


@inner
def _begin(layer: Any, tables: Tables, weights: Array, biases: Array, part: Part) -> None:
    """Set all units to what does not depend on the variables: their biases, and the products with the context."""
    tape, here, _, context, _, width, _ = part
    for m in range(layer.first, layer.end):
        matrix = tables.matrices[m]
        if matrix.source == CONTEXT:
            _multiply(matrix, tables.seen, weights, biases, tape, here, context, width)
        elif matrix.first:
            for r in range(matrix.rows):
                own, bias = here + matrix.own + r, biases[matrix.bias + r]  # read once, or the loop is not vectorised
                for t in range(width):
                    tape[own, t] = bias


@inner
def _multiply(
    matrix: Any, seen: Array, weights: Array, biases: Array, tape: Array, here: int, context: int, width: int
) -> None:
    """Add a matrix's product to its level and, if it is the last to be added, apply the activation."""
    own, slopes = here + matrix.own, here + matrix.slopes
    below = context if matrix.source == CONTEXT else here + matrix.below
    start, step, first = matrix.start, matrix.stride, matrix.bias if matrix.first else ADDED
    r = 0
    while r < matrix.rows:
        last = r + _height(matrix.rows - r)
        if width == 1:
            column = tape.reshape(-1)
            for q in range(r, last):
                at, count = matrix.start + q * step, seen[matrix.rows_from + q]
                before = biases[matrix.bias + q] if matrix.first else column[own + q]
                column[own + q] = before + dot(weights, at, column, below, count)
        else:
            columns = (0, seen[matrix.rows_from + last - 1])
            add_product(weights, start, step, 1, (r, last), columns, tape, below, tape, own, width, biases, first)
        if matrix.kind >= 0:
            activate(matrix.kind, tape, own + r, own + last, tape, slopes - own, 0, width)
        r = last


# -- the adjoint ------------------------------------------------------------------------------------------------------


@entry
def backward(
    tables: Tables,
    weights: Array,
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
    added: bool,
) -> None:
    """Gradients of <grad_w, w> + <grad_log_det, log_det> for points `first` .. `end` - 1.

    Args:
        tables, weights, rows, first, end, tape: As in `forward`.
        wanted: For each matrix, whether the gradient with respect to its weight or bias is.
        grad_w, grad_log_det: (points, D) and (points,).
        grad_v, grad_context: (points, D) and (points, features); with no columns if not wanted.
        gradients, by_biases: Flat, with respect to the packed weights and biases; filled here.
        added: Whether these gradients are added to what is there.
    """
    layers, chunk = tables.layers, tape.shape[1]
    transposed = _room(chunk, _widest(tables.matrices), tape)
    delta = _room(_most_rows(layers, grad_w.shape[1]), chunk, tape)
    zeros = np.zeros(len(delta), tape.dtype)
    grad, logs, room = _room(grad_w.shape[1], chunk, tape), _room(1, chunk, tape)[0], _room(2, chunk, tape)
    of_context = _room(grad_context.shape[1], chunk, tape)
    for b0 in range(first, end, chunk):
        points = min(chunk, end - b0)
        width, after = _padded(points), b0 // chunk * rows + _all_rows(layers)
        at_context = after + grad_w.shape[1]
        _load_gradients(grad_w, grad_log_det, tables.result, b0, points, width, grad, logs)
        of_context[:] = 0
        for index in range(len(layers) - 1, -1, -1):
            layer = layers[index]
            part = Part(tape, after - layer.rows, after, at_context, points, width, True)
            to_variables = index > 0 or grad_v.shape[1] > 0
            if layer.levels:
                walk_back(layer, tables, weights, part, grad, logs[:width], delta, room)
            else:
                _map_back(layer, tables.variables, part, grad, logs[:width], delta)
            for m in range(layer.end - 1, layer.first - 1, -1):
                matrix = tables.matrices[m]
                if wanted[m]:
                    fresh = b0 == first and not added
                    _add_gradient(matrix, tables.seen, delta, part, transposed, zeros, fresh, gradients, by_biases)
                is_context = matrix.source == CONTEXT
                is_parallel = layer.levels == 0 and (matrix.source != INPUTS or to_variables)
                if len(of_context) > 0 if is_context else is_parallel:
                    out, row = (of_context, 0) if is_context else (delta, matrix.below)
                    _multiply_back(matrix, tables.heard, weights, zeros, delta, out, row, part)
            if layer.levels == 0 and to_variables:
                _compress_back(layer, tables.variables, part, grad, delta, room)
            after = part.here
        _store(grad, np.arange(grad_v.shape[1]), b0, points, grad_v)
        _store(of_context, np.arange(len(of_context)), b0, points, grad_context)


@inner
def _widest(matrices: Array) -> int:
    """Length of the rows of transposed inputs: an odd number of vectors."""
    widest = LANES
    for matrix in matrices:
        widest = max(widest, matrix.stride)
    return widest + LANES * (widest // LANES % 2 == 0)


@inner
def _load_gradients(
    grad_w: Array, grad_log_det: Array, result: Array, b0: int, points: int, width: int, grad: Array, logs: Array
) -> None:
    """Gradients of points b0 .. b0 + points - 1 as columns; the padding is 0."""
    for b in range(points):
        logs[b] = grad_log_det[b0 + b]
    for i0 in range(0, len(grad), LANES):
        for b in range(points):
            for i in range(i0, min(i0 + LANES, len(grad))):
                grad[result[i], b] = grad_w[b0 + b, i]
    logs[points:width] = 0
    grad[:, points:width] = 0


@inner
def _map_back(layer: Any, variables: Array, part: Part, grad: Array, logs: Array, delta: Array) -> None:
    """The adjoint of a layer's map: gradients with respect to its input and the networks' outputs."""
    tape, here, width = part.tape, part.here, part.width
    for j in range(layer.moved):
        row = variables[layer.moved_from + j]
        x, w = tape[here + row, :width], tape[part.after + row, :width]
        pull_back(layer, j, variables, tape, here, 0, x, w, grad[row, :width], logs, delta, 0)


@inner
def _compress_back(layer: Any, variables: Array, part: Part, grad: Array, delta: Array, room: Array) -> None:
    """Add the gradients with respect to what the networks see to those with respect to the variables."""
    nowhere, slope = room[0, : part.width], room[1, : part.width]
    for j in range(layer.seen):
        row = variables[layer.seen_from + j]
        compress(part.tape[part.here + row, : part.width], nowhere, slope, layer.bulk)
        for t in range(part.width):
            grad[row, t] += delta[layer.inputs + j, t] * slope[t]


@inner
def _add_gradient(
    matrix: Any,
    seen: Array,
    delta: Array,
    part: Part,
    transposed: Array,
    zeros: Array,
    fresh: bool,
    gradients: Array,
    by_biases: Array,
) -> None:
    """Add the gradient with respect to a matrix, from that of its outputs and from its inputs.

    With `fresh` nothing was added before.
    """
    width, below = part.width, part.context if matrix.source == CONTEXT else part.here + matrix.below
    transpose(part.tape, below, matrix.columns, width, transposed)
    transposed[:width, matrix.columns : matrix.stride] = 0
    own = gradients[matrix.start : matrix.start + matrix.rows * matrix.stride].reshape((matrix.rows, matrix.stride))
    flat, start, step = delta.reshape(-1), matrix.own * delta.shape[1], delta.shape[1]
    r = 0
    while r < matrix.rows:
        last = r + _height(matrix.rows - r)
        columns = seen[matrix.rows_from + last - 1]
        terms, first = (0, part.points), 0 if fresh else ADDED
        add_product(flat, start, step, 1, (r, last), terms, transposed, 0, own, 0, columns, zeros, first)
        r = last
    if matrix.first:
        for r in range(matrix.rows):
            total = delta.dtype.type(0)
            for t in range(part.points):
                total += delta[matrix.own + r, t]
            by_biases[matrix.bias + r] = total if fresh else total + by_biases[matrix.bias + r]


@inner
def _multiply_back(
    matrix: Any, heard: Array, weights: Array, zeros: Array, delta: Array, out: Array, out_row: int, part: Part
) -> None:
    """Add the transposed matrix's product with the gradient of its outputs to that of its inputs."""
    width, start, step, own, first = part.width, matrix.start, matrix.stride, matrix.own, 0 if matrix.fresh else ADDED
    k = 0
    while k < matrix.columns:
        last = k + _height(matrix.columns - k)
        rows = (heard[matrix.columns_from + k], matrix.rows)
        add_product(weights, start, 1, step, (k, last), rows, delta, own, out, out_row, width, zeros, first)
        if matrix.below_kind >= 0:
            below, slopes = part.here + matrix.below + k, matrix.below_slopes - matrix.below
            end = below + last - k
            differentiate(matrix.below_kind, part.tape, below, end, part.tape, slopes, out, out_row + k, 0, width)
        k = last
