r"""The sequential direction of a layer and its adjoint, over the tables of a program, compiled by numba for CPUs.

Level 0 of a layer is its inputs, the last its outputs. `final[l, i + 1]` is the number of units of level l that are
final at step i, when the variables before i are determined; `final[l, 0]` is 0. Step i thus completes units
final[l, i] .. final[l, i + 1] - 1, and each of them sees exactly the first final[l - 1, i + 1] units below.

Variables are processed in blocks: one matrix product adds the contributions of all earlier blocks to a block's units;
inside the block, small products follow the variables one by one.
"""

from __future__ import annotations

from typing import NamedTuple

from pyro_maf.sweep.kernels.compiler import inner
from pyro_maf.sweep.kernels.elementwise import activate, compress, differentiate
from pyro_maf.sweep.kernels.products import ADDED, add_product, dot
from pyro_maf.sweep.kernels.univariate import apply, pull_back
from pyro_maf.sweep.layout import Array, Layer, Matrix, Tables

__all__ = ["Adjoint", "Part", "walk", "walk_back"]


class Part(NamedTuple):
    """A chunk's part of the tape, for one layer.

    Attributes:
        tape: (rows, points).
        here, after, context: First rows of the layer, of its result and of the context.
        points: Number of points.
        width: The same, padded.
        keeps: Whether the result is that of all variables, the first rows of the next layer; or one row for all, which
            is copied over the variable's input.
    """

    tape: Array
    here: int
    after: int
    context: int
    points: int
    width: int
    keeps: bool


class Adjoint(NamedTuple):
    """Gradients of a chunk of points on their way back: (rows, points), or (points,) for `logs`.

    Attributes:
        grad: With respect to the variables.
        logs: With respect to the log-determinants.
        delta: With respect to pre-activations and what networks see; its first row is that of the layer.
        context: With respect to the context; with no rows if not wanted.
        room: Two rows.
        transposed: Room for transposed inputs of a matrix, (points, columns).
        zeros: (rows,).
    """

    grad: Array
    logs: Array
    delta: Array
    context: Array
    room: Array
    transposed: Array
    zeros: Array


@inner
def _steps(layer: Layer, steps: Array) -> Array:
    """The table `final` of a layer."""
    levels, columns = layer.levels + 1, layer.moved + 1
    return steps[layer.steps_from : layer.steps_from + levels * columns].reshape((levels, columns))


@inner
def _index(layer: Layer, level: int) -> int:
    """Number of the matrix between a level and the one below; that of the context, if there is one, precedes it."""
    return layer.first + layer.matrices * level - 1


@inner
def walk(layer: Layer, tables: Tables, weights: Array, part: Part, logs: Array, nowhere: Array) -> None:
    """w from v and phi(w), one variable after another, where units hold their biases and the products of the context.

    Args:
        layer, tables, weights, part: The layer, and what it refers to.
        logs: Log-determinants, (points,), to which the layer's are added.
        nowhere: Room for as many numbers.
    """
    final, dim, column = _steps(layer, tables.steps), layer.moved, part.tape.reshape(-1)
    # Each use of a record's array is counted as a reference.
    matrices, variables, tape, here, width = tables.matrices, tables.variables, part.tape, part.here, part.width
    for i0 in range(0, dim, layer.block):
        i1 = min(dim, i0 + layer.block)
        if width > 1:
            _add(layer, matrices, final, (i0, i1), (0, i0), weights, tape, column, here, width, False)
        for i in range(i0, i1):
            below = (i0 if width > 1 else 0, i + 1)  # one row with one column is as fast whatever its length
            _add(layer, matrices, final, (i, i + 1), below, weights, tape, column, here, width, True)
            _map(layer, variables, i, part, logs, nowhere)
    for level in range(1, layer.levels):  # units of so high a degree that no output sees them
        matrix = matrices[_index(layer, level)]
        tape[here + matrix.own + final[level, dim] : here + matrix.own + matrix.rows, :width] = 0


@inner
def _add(
    layer: Layer,
    matrices: Array,
    final: Array,
    own: tuple[int, int],
    below: tuple[int, int],
    weights: Array,
    tape: Array,
    column: Array,
    here: int,
    width: int,
    completes: bool,
) -> None:
    """Add the products of the units below of some steps, `below`, to the units of others, `own`."""
    for level in range(1, layer.levels + 1):
        matrix = matrices[_index(layer, level)]
        start, step, lower, row = matrix.start, matrix.stride, here + matrix.below, here + matrix.own
        low, high = final[level, own[0]], final[level, own[1]]
        first, end = final[level - 1, below[0]], final[level - 1, below[1]]
        if width > 1:
            columns = first, end
            add_product(weights, start, step, 1, (low, high), columns, tape, lower, tape, row, width, weights, ADDED)
        else:
            for r in range(low, high):
                column[row + r] += dot(weights, start + r * step, column, lower, end)
        if completes and level < layer.levels:
            activate(matrix.kind, tape, row + low, row + high, matrix.slopes - matrix.own, width)


@inner
def _map(layer: Layer, variables: Array, i: int, part: Part, logs: Array, nowhere: Array) -> None:
    """w of a variable from its v and parameters, and what the network sees of it."""
    tape, here, after, _, _, width, keeps = part
    row = variables[layer.moved_from + i]
    x, w = tape[here + row, :width], tape[after + row if keeps else after, :width]
    apply(layer, i, variables, tape, here, x, w, logs)
    compress(w, tape[here + layer.inputs + i, :width], nowhere, layer.bulk)
    if not keeps:
        for t in range(width):
            x[t] = w[t]


@inner
def walk_back(layer: Layer, tables: Tables, weights: Array, part: Part, adjoint: Adjoint) -> None:
    """The adjoint of `walk`: turns gradients by w into those by v, and writes those by pre-activations to `delta`.

    Args:
        layer, tables, weights, part: As in `walk`, after it.
        adjoint: The gradients.
    """
    final, dim, block = _steps(layer, tables.steps), layer.moved, 2 * layer.block  # as weights are read down columns
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
            _map_back(layer, variables, i, part, adjoint)
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
def _add_back(
    matrix: Matrix, weights: Array, own: tuple[int, int], above: tuple[int, int], delta: Array, width: int
) -> None:
    """Add to the gradients of some of a matrix's inputs the products with those of some of its outputs."""
    start, step, row, lower = matrix.start, matrix.stride, matrix.own, matrix.below
    add_product(weights, start, 1, step, own, above, delta, row, delta, lower, width, weights, ADDED)


@inner
def _map_back(layer: Layer, variables: Array, i: int, part: Part, adjoint: Adjoint) -> None:
    """The adjoint of `_map`."""
    tape, here, width, grad, delta = part.tape, part.here, part.width, adjoint.grad, adjoint.delta
    row = variables[layer.moved_from + i]
    x, w, slope = tape[here + row, :width], tape[part.after + row, :width], adjoint.room[1, :width]
    compress(w, adjoint.room[0, :width], slope, layer.bulk)
    for t in range(width):
        grad[row, t] += delta[layer.inputs + i, t] * slope[t]
    pull_back(layer, i, variables, tape, here, x, w, grad[row, :width], adjoint.logs[:width], delta)
