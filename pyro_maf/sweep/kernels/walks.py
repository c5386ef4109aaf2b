r"""The two walks over a program, forward and back with the gradients, compiled by numba for CPUs.

A chunk of points passes through all layers before the next, so that its part of the tape stays in the processor's
cache. See `layout` for the tables.

In the sequential direction of a layer, level 0 is its inputs and the last level its outputs. `final[l, i + 1]` is the
number of units of level l that are final at step i, when the variables before i are determined; `final[l, 0]` is 0.
Step i thus completes units final[l, i] .. final[l, i + 1] - 1, each of which sees exactly the first final[l - 1, i + 1]
units below. Variables are processed in blocks: one matrix product adds the contributions of all earlier blocks to a
block's units; inside the block, small products follow the variables one by one.
"""

from __future__ import annotations

import numpy as np

from pyro_maf.sweep.kernels.compiler import entry, inner
from pyro_maf.sweep.kernels.elementwise import activate, compress, differentiate
from pyro_maf.sweep.kernels.products import ADDED, VECTOR, add_product, dot, height_of, transpose
from pyro_maf.sweep.kernels.univariate import Adjoint, Part, apply, pull_back
from pyro_maf.sweep.layout import CONTEXT, INPUTS, LANES, Array, Layer, Matrix, Tables

__all__ = ["backward", "forward"]

Pair = tuple[Array, Array]
Range = tuple[int, int]


@inner
def _room(rows: int, columns: int, like: Array) -> Array:
    """Uninitialised rows that start at cache lines if `columns` is a whole number of lines."""
    line = VECTOR // like.itemsize
    flat = np.empty(rows * columns + line, like.dtype)
    first = -flat.ctypes.data // like.itemsize % line
    return flat[first : first + rows * columns].reshape((rows, columns))


@inner
def _load(values: Array, place: Array, b0: int, points: int, width: int, rows: Array) -> None:
    """Load points b0 .. b0 + points - 1 as columns, with variable i in row place[i]; the padding is 0."""
    offset = np.uintp(b0)  # possibly negative indices take twice as long
    for t0 in range(0, points, LANES):  # as many points at a time as fit into one cache line of a row
        for i in range(values.shape[1]):
            row, column = place[i], np.uintp(i)
            for b in range(np.uintp(t0), np.uintp(min(t0 + LANES, points))):
                rows[row, b] = values[offset + b, column]
    rows[: values.shape[1], points:width] = 0


@inner
def _store(rows: Array, place: Array, b0: int, points: int, values: Array) -> None:
    """Store columns as points b0 .. b0 + points - 1; variable i is in row place[i]."""
    offset = np.uintp(b0)
    for t0 in range(0, points, LANES):
        for i in range(values.shape[1]):
            row, column = place[i], np.uintp(i)
            for b in range(np.uintp(t0), np.uintp(min(t0 + LANES, points))):
                values[offset + b, column] = rows[row, b]


@inner
def _most_rows(layers: Array, dim: int) -> int:
    most = dim
    for layer in layers:
        most = max(most, layer.rows)
    return most


@entry
def forward(
    tables: Tables, pack: Pair, inputs: Pair, rows: int, first: int, end: int, constant: float, tape: Array, out: Pair
) -> None:
    """Pass points `first` .. `end` - 1 through all layers; fills `out` and, for `backward`, the tape.

    Args:
        tables: The layers.
        pack: Weights and biases, from `pack`.
        inputs: v, (points, D), and the context, (points, features), without features if there is none; if nothing is
            saved for `backward`, (1, features) for a context shared by all points.
        rows: Number of tape rows for one chunk, the last `LANES` of which are padding.
        first, end: Range of points; `first` is a multiple of the chunk's length.
        constant: NaN, or the constant of the log-densities constant - |w|^2 / 2 - log_det that replace log_det.
        tape: (rows of all chunks, points per chunk); without rows if nothing is saved for `backward`. Points per chunk
            are a multiple of `LANES`, or 1 if nothing is saved.
        out: w, (points, D), and log_det, (points,).
    """
    (weights, biases), (v, context), (w, log_det) = pack, inputs, out
    dim, keep, most = v.shape[1], len(tape) > 0, _most_rows(tables.layers, v.shape[1])
    chunk, number = tape.shape[1], v.dtype.type
    # If nothing is saved, all layers share rows, with one more for a variable's result.
    work = tape if keep else _room(most + 1 + context.shape[1], chunk, v)
    both, natural = _room(2, chunk, v), np.arange(max(dim, context.shape[1]))
    logs, nowhere, is_one = both[0], both[1], len(context) < len(v)
    if is_one:
        tables, biases = _at_one_context(tables, weights, biases, context[0])
    for b0 in range(first, end, chunk):
        points = min(chunk, end - b0)
        width, at_context = min(-(-points // LANES) * LANES, chunk), b0 // chunk * rows if keep else most + 1
        here = at_context + context.shape[1] if keep else 0
        _load(v, natural, b0, points, width, work[here:])
        if not is_one:
            _load(context, natural, b0, points, width, work[at_context:])
        logs[:] = 0
        for layer in tables.layers:
            part = Part(work, here, here + layer.rows if keep else most, at_context, points, width, keep)
            if layer.levels == 0:
                _pass(layer, tables, weights, biases, part, logs[:width], nowhere[:width])
            else:
                _walk(layer, tables, weights, biases, part, logs[:width], nowhere[:width])
            here += layer.rows if keep else 0
        for b in range(points):  # an assignment of slices would take a second to compile
            log_det[b0 + b] = logs[b]
        _store(work[here:], tables.result, b0, points, w)
        for b in range(b0, b0 + points if constant == constant else b0):
            squares = number(0)
            for i in range(dim):
                squares += w[b, i] * w[b, i]
            log_det[b] = number(constant) - number(0.5) * squares - log_det[b]


@inner
def _at_one_context(tables: Tables, weights: Array, biases: Array, context: Array) -> tuple[Tables, Array]:
    """Tables and biases at one context, (features,).

    The biases include its terms and those of the first units of sequential layers, which see only the context.
    """
    layers, matrices, variables, seen, heard, row_order, column_order, steps, result = tables
    matrices, steps, biases = matrices.copy(), steps.copy(), biases.copy()
    for m in range(len(matrices)):
        matrices[m].first = 1
        if matrices[m].source == CONTEXT:
            _add_to_biases(matrices[m], weights, biases, context, 0, len(context))
            matrices[m].rows = 0
    for layer in layers:
        final = _steps(layer, steps) if layer.levels > 1 else steps.reshape((1, -1))
        for level in range(1, layer.levels):  # the first units' biases become their values
            own, above, count = matrices[_index(layer, level)], matrices[_index(layer, level + 1)], final[level, 1]
            activate(own.kind, biases.reshape((-1, 1)), own.bias, own.bias + count, 0, 1)
            _add_to_biases(above, weights, biases, biases, own.bias, count)
            final[level, 0] = count
    return Tables(layers, matrices, variables, seen, heard, row_order, column_order, steps, result), biases


@inner
def _add_to_biases(matrix: Matrix, weights: Array, biases: Array, inputs: Array, first: int, count: int) -> None:
    """Add a matrix's products with its first `count` inputs, stored from `first` on, to its biases."""
    for r in range(matrix.rows):
        biases[matrix.bias + r] += dot(weights, matrix.start + r * matrix.stride, inputs, first, count)


@inner
def _pass(layer: Layer, tables: Tables, weights: Array, biases: Array, part: Part, logs: Array, nowhere: Array) -> None:
    """Apply a layer in its parallel direction."""
    variables, matrices, seen = tables.variables, tables.matrices, tables.seen
    tape, here, after, context, _, width, keeps = part
    for j in range(layer.seen):
        row = here + variables[layer.seen_from + j]
        compress(tape[row, :width], tape[here + layer.inputs + j, :width], nowhere, layer.bulk)
    for m in range(layer.first, layer.end):
        _multiply(matrices[m], seen, weights, biases, tape, here, context, width)
    for j in range(layer.moved):
        apply(layer, j, variables, part, logs)
    for j in range(layer.rest if keeps else 0):
        row = variables[layer.rest_from + j]
        for t in range(width):
            tape[after + row, t] = tape[here + row, t]


@inner
def _multiply(
    matrix: Matrix, seen: Array, weights: Array, biases: Array, tape: Array, here: int, context: int, width: int
) -> None:
    """Add a matrix's product to its level and, if it is the last one to be added, apply the activation."""
    own, slopes = here + matrix.own, here + matrix.slopes
    below = context if matrix.source == CONTEXT else here + matrix.below
    start, step, first = matrix.start, matrix.stride, matrix.bias if matrix.first else ADDED
    r = 0
    while r < matrix.rows:
        last = r + height_of(matrix.rows - r)
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
            activate(matrix.kind, tape, own + r, own + last, slopes - own, width)
        r = last


@inner
def _steps(layer: Layer, steps: Array) -> Array:
    """The table `final` of a layer."""
    levels, columns = layer.levels + 1, layer.moved + 1
    return steps[layer.steps_from : layer.steps_from + levels * columns].reshape((levels, columns))


@inner
def _index(layer: Layer, level: int) -> int:
    """Index of the matrix between a level and the one below; that of the context, if there is one, precedes it."""
    return layer.first + layer.matrices * level - 1


@inner
def _walk(layer: Layer, tables: Tables, weights: Array, biases: Array, part: Part, logs: Array, nowhere: Array) -> None:
    """Solve for w given v and phi(w), one variable at a time; units hold their biases and the context's products.

    Args:
        layer, tables, weights, biases, part: The layer, and what it refers to.
        logs: Log-determinants, (points,), to which the layer's are added.
        nowhere: Scratch space for as many numbers.
    """
    final, dim, column = _steps(layer, tables.steps), layer.moved, part.tape.reshape(-1)
    # Each use of a record's array is reference-counted.
    matrices, variables, tape, here, width = tables.matrices, tables.variables, part.tape, part.here, part.width
    for m in range(layer.first, layer.heads):
        if (m + 1 - layer.first) % layer.matrices > 0:  # not of the context, nor of the scales of a triangular map
            _multiply(matrices[m], tables.seen, weights, biases, tape, here, part.context, width)
    for i0 in range(0, dim, layer.block):
        i1 = min(dim, i0 + layer.block)
        if width > 1 and i0 > 0:
            _add(layer, matrices, final, (i0, i1), (0, i0), weights, biases, tape, column, here, width, False)
        for i in range(i0, i1):
            below = (i0 if width > 1 else 0, i + 1)  # a row with one column takes the same time for any length
            _add(layer, matrices, final, (i, i + 1), below, weights, biases, tape, column, here, width, True)
            if layer.heads < layer.end:
                _multiply(matrices[layer.heads + i], tables.seen, weights, biases, tape, here, part.context, width)
            w = apply(layer, i, variables, part, logs)
            compress(w, tape[here + layer.inputs + i, :width], nowhere, layer.bulk)
    for level in range(1, layer.levels):  # units whose degree is so high that no output sees them
        matrix = matrices[_index(layer, level)]
        tape[here + matrix.own + final[level, dim] : here + matrix.own + matrix.rows, :width] = 0


@inner
def _add(
    layer: Layer, matrices: Array, final: Array, own: Range, below: Range, weights: Array, biases: Array, tape: Array,
    column: Array, here: int, width: int, completes: bool,
) -> None:  # fmt: skip
    """Add the products with the units below of some steps, `below`, to the units of others, `own`.

    Products with the first units below are added to the biases, unless the context's precede them.
    """
    for level in range(1, layer.levels + 1):
        matrix = matrices[_index(layer, level)]
        start, step, lower, row = matrix.start, matrix.stride, here + matrix.below, here + matrix.own
        low, high = final[level, own[0]], final[level, own[1]]
        first, end = final[level - 1, below[0]], final[level - 1, below[1]]
        bias = matrix.bias if matrix.first and below[0] == 0 else ADDED
        if width > 1:
            columns = first, end
            add_product(weights, start, step, 1, (low, high), columns, tape, lower, tape, row, width, biases, bias)
        else:
            for r in range(low, high):
                before = biases[bias + r] if bias >= 0 else column[row + r]
                at = start + r * step + first
                column[row + r] = before + dot(weights, at, column, lower + first, end - first)
        if completes and level < layer.levels:
            activate(matrix.kind, tape, row + low, row + high, matrix.slopes - matrix.own, width)


# -- the adjoint ------------------------------------------------------------------------------------------------------


@entry
def backward(
    tables: Tables, weights: Array, rows: int, first: int, end: int, tape: Array, grads: Pair, of_density: bool,
    by_inputs: Pair, by_pack: Pair, wanted: Array, added: bool,
) -> None:  # fmt: skip
    """Gradients of <grad_w, w> + <grad_log_det, log_det> for points `first` .. `end` - 1.

    Args:
        tables, weights, rows, first, end, tape: As in `forward`.
        grads: grad_w and grad_log_det, (points, D) and (points,).
        of_density: Whether `grads` are instead w and the gradient w.r.t. log-densities.
        by_inputs: Gradients w.r.t. v and the context, filled here; without columns if not wanted.
        by_pack: Gradients w.r.t. the packed weights and biases, flat, filled here.
        wanted: For each matrix, whether the gradient w.r.t. its weight or bias is wanted.
        added: Whether gradients are added to existing values.
    """
    (grad_w, grad_log_det), (grad_v, grad_context) = grads, by_inputs
    layers, chunk, dim = tables.layers, tape.shape[1], grad_w.shape[1]
    delta, natural = _room(_most_rows(layers, dim), chunk, tape), np.arange(max(dim, grad_context.shape[1]))
    both, of_context = _room(2, chunk, tape), _room(grad_context.shape[1], chunk, tape)
    transposed, zeros = _room(chunk, _widest(tables.matrices), tape), np.zeros(len(delta), tape.dtype)
    grad, logs = _room(dim, chunk, tape), _room(1, chunk, tape)[0]
    adjoint = Adjoint(grad, logs, delta, of_context, both, transposed, zeros)
    for b0 in range(first, end, chunk):
        points = min(chunk, end - b0)
        width, at_context = min(-(-points // LANES) * LANES, chunk), b0 // chunk * rows
        after, fresh = at_context + rows - LANES - dim, b0 == first and not added
        _load(grad_w, tables.result, b0, points, width, grad)
        for b in range(width):
            logs[b] = (-grad_log_det[b0 + b] if of_density else grad_log_det[b0 + b]) if b < points else 0
        for i in range(dim if of_density else 0):
            for b in range(width):
                grad[i, b] *= logs[b]
        of_context[:] = 0
        for index in range(len(layers) - 1, -1, -1):
            part = Part(tape, after - layers[index].rows, after, at_context, points, width, True)
            to_variables = index > 0 or grad_v.shape[1] > 0
            _back(layers[index], tables, weights, part, adjoint, to_variables, wanted, fresh, by_pack)
            after = part.here
        _store(grad, natural, b0, points, grad_v)
        _store(of_context, natural, b0, points, grad_context)


@inner
def _back(
    layer: Layer, tables: Tables, weights: Array, part: Part, adjoint: Adjoint, to_variables: bool, wanted: Array,
    fresh: bool, by_pack: Pair,
) -> None:  # fmt: skip
    """The adjoint of one layer; computes the gradient w.r.t. its variables if `to_variables`."""
    variables, is_parallel = tables.variables, layer.levels == 0
    if is_parallel:
        for j in range(layer.moved):
            pull_back(layer, j, variables, part, adjoint)
    else:
        _walk_back(layer, tables, weights, part, adjoint)
    for m in range(layer.end - 1, layer.first - 1, -1):
        matrix = tables.matrices[m]
        if wanted[m]:
            _add_gradient(matrix, tables.seen, part, adjoint, fresh, by_pack)
        if matrix.source == CONTEXT:
            if len(adjoint.context) > 0:
                _multiply_back(matrix, tables, weights, part, adjoint, adjoint.context, 0)
        elif is_parallel and (matrix.source != INPUTS or to_variables):
            _multiply_back(matrix, tables, weights, part, adjoint, adjoint.delta, matrix.below)
    for j in range(layer.seen if is_parallel and to_variables else 0):
        _compress_back(layer, j, variables[layer.seen_from + j], part.here, part, adjoint)


@inner
def _widest(matrices: Array) -> int:
    """Length of the rows of transposed inputs: an odd number of vectors."""
    widest = LANES
    for matrix in matrices:
        widest = max(widest, matrix.stride)
    return widest + LANES * (widest // LANES % 2 == 0)


@inner
def _compress_back(layer: Layer, i: int, row: int, first: int, part: Part, adjoint: Adjoint) -> None:
    """Add the gradient w.r.t. input i of the networks to that w.r.t. its variable, in `row`.

    `first` is the tape row of the first variable.
    """
    width, grad, delta = part.width, adjoint.grad, adjoint.delta
    nowhere, slope = adjoint.room[0, :width], adjoint.room[1, :width]
    compress(part.tape[first + row, :width], nowhere, slope, layer.bulk)
    for t in range(width):
        grad[row, t] += delta[layer.inputs + i, t] * slope[t]


@inner
def _add_gradient(matrix: Matrix, seen: Array, part: Part, adjoint: Adjoint, fresh: bool, by_pack: Pair) -> None:
    """Add the gradient w.r.t. a matrix, computed from the gradient of its outputs and from its inputs.

    With `fresh`, nothing was added before.
    """
    (gradients, by_biases), delta, transposed, width = by_pack, adjoint.delta, adjoint.transposed, part.width
    below = part.context if matrix.source == CONTEXT else part.here + matrix.below
    if matrix.first:
        for r in range(matrix.rows):
            total = delta.dtype.type(0)
            for t in range(part.points):
                total += delta[matrix.own + r, t]
            by_biases[matrix.bias + r] = total if fresh else total + by_biases[matrix.bias + r]
    transpose(part.tape, below, matrix.columns, width, transposed)
    transposed[:width, matrix.columns : matrix.stride] = 0
    own = gradients[matrix.start : matrix.start + matrix.rows * matrix.stride].reshape((matrix.rows, matrix.stride))
    flat, start, step = delta.reshape(-1), matrix.own * delta.shape[1], delta.shape[1]
    r = 0
    while r < matrix.rows:
        last = r + height_of(matrix.rows - r)
        columns = seen[matrix.rows_from + last - 1]
        terms, first = (0, part.points), 0 if fresh else ADDED
        add_product(flat, start, step, 1, (r, last), terms, transposed, 0, own, 0, columns, adjoint.zeros, first)
        r = last


@inner
def _multiply_back(
    matrix: Matrix, tables: Tables, weights: Array, part: Part, adjoint: Adjoint, out: Array, out_row: int
) -> None:
    """Add the transposed matrix's product with the gradient of its outputs to that of its inputs."""
    delta, zeros = adjoint.delta, adjoint.zeros
    width, start, step, own, first = part.width, matrix.start, matrix.stride, matrix.own, 0 if matrix.fresh else ADDED
    k = 0
    while k < matrix.columns:
        last = k + height_of(matrix.columns - k)
        rows = (tables.heard[matrix.columns_from + k], matrix.rows)
        add_product(weights, start, 1, step, (k, last), rows, delta, own, out, out_row, width, zeros, first)
        if matrix.below_kind >= 0:
            below, slopes = part.here + matrix.below + k, matrix.below_slopes - matrix.below
            end = below + last - k
            differentiate(matrix.below_kind, part.tape, below, end, slopes, out, out_row + k, width)
        k = last


@inner
def _walk_back(layer: Layer, tables: Tables, weights: Array, part: Part, adjoint: Adjoint) -> None:
    """The adjoint of `_walk`: turns gradients w.r.t. w into those w.r.t. v; writes those of pre-activations to `delta`.

    Args:
        layer, tables, weights, part: As in `_walk`, after it.
        adjoint: The gradients.
    """
    final, dim, block = _steps(layer, tables.steps), layer.moved, 2 * layer.block  # since weights are read by column
    matrices, variables, delta, width = tables.matrices, tables.variables, adjoint.delta, part.width
    for i0 in range((dim - 1) // block * block, -1, -block):
        i1 = min(dim, i0 + block)
        for level in range(layer.levels - 1, -1, -1):
            upper = matrices[_index(layer, level + 1)]
            own = (final[level, i0], final[level, i1]) if level else (i0, i1)
            delta[upper.below + own[0] : upper.below + own[1], :width] = 0
            _add_back(upper, weights, own, (final[level + 1, i1], final[level + 1, dim]), delta, width)
        for i in range(i1 - 1, i0 - 1, -1):
            _add_back(matrices[_index(layer, 1)], weights, (i, i + 1), (final[1, i + 1], final[1, i1]), delta, width)
            _compress_back(layer, i, variables[layer.moved_from + i], part.after, part, adjoint)
            pull_back(layer, i, variables, part, adjoint)
            if layer.heads < layer.end:
                head = matrices[layer.heads + i]
                _multiply_back(head, tables, weights, part, adjoint, delta, head.below)
            for level in range(layer.levels - 1, 0, -1):
                upper = matrices[_index(layer, level + 1)]
                own, above = (final[level, i], final[level, i + 1]), (final[level + 1, i], final[level + 1, i1])
                _add_back(upper, weights, own, above, delta, width)
                row, slopes = upper.below + own[0], upper.below_slopes - upper.below
                first, end = part.here + row, part.here + upper.below + own[1]
                differentiate(upper.below_kind, part.tape, first, end, slopes, delta, row, width)
    for level in range(1, layer.levels):
        matrix = matrices[_index(layer, level)]
        delta[matrix.own + final[level, dim] : matrix.own + matrix.rows, :width] = 0


@inner
def _add_back(matrix: Matrix, weights: Array, own: Range, above: Range, delta: Array, width: int) -> None:
    """Add products with the gradients of some of a matrix's outputs to the gradients of some of its inputs."""
    start, step, row, lower = matrix.start, matrix.stride, matrix.own, matrix.below
    add_product(weights, start, 1, step, own, above, delta, row, delta, lower, width, weights, ADDED)
