r"""The sequential direction of a layer and its adjoint, over the tables of a program, compiled by numba for CPUs.

Level 0 of a layer is its inputs, the last its outputs. `final[l, i + 1]` is the number of units of level l that are
final at step i, when the variables before i are determined; `final[l, 0]` is 0. Step i thus completes units
final[l, i] .. final[l, i + 1] - 1, and each of them sees exactly the first final[l - 1, i + 1] units below.

Variables are processed in blocks: one matrix product adds the contributions of all earlier blocks to a block's units;
inside the block, small products follow the variables one by one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from pyro_maf.sweep.kernels.compiler import inner
from pyro_maf.sweep.kernels.elementwise import activate, compress, differentiate
from pyro_maf.sweep.kernels.products import ADDED, add_product, dot
from pyro_maf.sweep.kernels.univariate import apply, pull_back
from pyro_maf.sweep.layout import Array, Tables

__all__ = ["Part", "walk", "walk_back", "walk_row"]


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


@inner
def _steps(layer: Any, steps: Array) -> Array:
    """The table `final` of a layer."""
    levels, columns = layer.levels + 1, layer.moved + 1
    return steps[layer.steps_from : layer.steps_from + levels * columns].reshape((levels, columns))


@inner
def _index(layer: Any, level: int) -> int:
    """Number of the matrix between a level and the one below; that of the context, if there is one, precedes it."""
    return layer.first + layer.matrices * level - 1


@inner
def walk(layer: Any, tables: Tables, weights: Array, part: Part, logs: Array, nowhere: Array) -> None:
    """w from v and phi(w), one variable after another, where units hold their biases and the products of the context.

    Args:
        layer, tables, weights, part: The layer, and what it refers to.
        logs: Log-determinants, (points,), to which the layer's are added.
        nowhere: Room for as many numbers.
    """
    final, dim = _steps(layer, tables.steps), layer.moved
    matrices, variables = tables.matrices, tables.variables  # each use of a record's array is counted as a reference
    tape, here, width = part.tape, part.here, part.width
    for i0 in range(0, dim, layer.block):
        i1 = min(dim, i0 + layer.block)
        _add(layer, matrices, final, (i0, i1), (0, i0), weights, tape, here, width, False)
        for i in range(i0, i1):
            _add(layer, matrices, final, (i, i + 1), (i0, i + 1), weights, tape, here, width, True)
            _map(layer, variables, i, part, logs, nowhere)
    for level in range(1, layer.levels):  # units of so high a degree that no output sees them
        matrix = matrices[_index(layer, level)]
        tape[here + matrix.own + final[level, dim] : here + matrix.own + matrix.rows, :width] = 0


@inner
def _add(
    layer: Any,
    matrices: Array,
    final: Array,
    own: Any,
    below: Any,
    weights: Array,
    tape: Array,
    here: int,
    width: int,
    completes: bool,
) -> None:
    """Add the products of the units below of some steps, `below`, to the units of others, `own`."""
    for level in range(1, layer.levels + 1):
        matrix = matrices[_index(layer, level)]
        start, step, lower, row = matrix.start, matrix.stride, here + matrix.below, here + matrix.own
        low, high = final[level, own[0]], final[level, own[1]]
        columns = (final[level - 1, below[0]], final[level - 1, below[1]])
        add_product(weights, start, step, 1, (low, high), columns, tape, lower, tape, row, width, weights, ADDED)
        if completes and level < layer.levels:
            activate(matrix.kind, tape, row + low, row + high, tape, matrix.slopes - matrix.own, 0, width)


@inner
def _map(layer: Any, variables: Array, i: int, part: Part, logs: Array, nowhere: Array) -> None:
    """w of a variable from its v and parameters, and what the network sees of it."""
    tape, here, after, _, _, width, keeps = part
    row = variables[layer.moved_from + i]
    x, w = tape[here + row, :width], tape[after + row if keeps else after, :width]
    apply(layer, i, variables, tape, here, 0, x, w, logs)
    compress(w, tape[here + layer.inputs + i, :width], nowhere, layer.bulk)
    if not keeps:
        for t in range(width):
            x[t] = w[t]


@inner
def walk_row(layer: Any, tables: Tables, weights: Array, part: Part, logs: Array, nowhere: Array) -> None:
    """As `walk` for one point; faster than tiles of many for a few."""
    matrices, variables, tape, here = tables.matrices, tables.variables, part.tape, part.here
    final, column = _steps(layer, tables.steps), tape.reshape(-1)
    for i in range(layer.moved):
        for level in range(1, layer.levels + 1):
            matrix = matrices[_index(layer, level)]
            own, start, step = here + matrix.own, matrix.start, matrix.stride
            low, high, seen = final[level, i], final[level, i + 1], final[level - 1, i + 1]
            for r in range(low, high):
                column[own + r] += dot(weights, start + r * step, column, here + matrix.below, seen)
            if level < layer.levels:
                activate(matrix.kind, tape, own + low, own + high, tape, matrix.slopes - matrix.own, 0, part.width)
        _map(layer, variables, i, part, logs, nowhere)


@inner
def walk_back(
    layer: Any, tables: Tables, weights: Array, part: Part, grad: Array, logs: Array, delta: Array, room: Array
) -> None:
    """The adjoint of `walk`: turns gradients by w into those by v, and writes those by pre-activations to `delta`.

    Args:
        layer, tables, weights, part: As in `walk`, after it.
        grad: By the variables, (D, points).
        logs: By the log-determinants, (points,).
        delta: (rows, points); its first row is that of the layer.
        room: (2, points).
    """
    final, dim, block = _steps(layer, tables.steps), layer.moved, 2 * layer.block  # as weights are read down columns
    matrices, variables = tables.matrices, tables.variables
    tape, here, after, _, _, width, _ = part
    for i0 in range((dim - 1) // block * block, -1, -block):
        i1 = min(dim, i0 + block)
        for level in range(layer.levels - 1, -1, -1):
            upper = matrices[_index(layer, level + 1)]
            own = (final[level, i0], final[level, i1]) if level else (i0, i1)
            delta[upper.below + own[0] : upper.below + own[1], :width] = 0
            _add_back(upper, weights, own, (final[level + 1, i1], final[level + 1, dim]), delta, width)
        for i in range(i1 - 1, i0 - 1, -1):
            upper = matrices[_index(layer, 1)]
            _add_back(upper, weights, (i, i + 1), (final[1, i + 1], final[1, i1]), delta, width)
            _map_back(layer, variables, i, tape, here, after, width, grad, logs, delta, room)
            for level in range(layer.levels - 1, 0, -1):
                upper = matrices[_index(layer, level + 1)]
                own, above = (final[level, i], final[level, i + 1]), (final[level + 1, i], final[level + 1, i1])
                _add_back(upper, weights, own, above, delta, width)
                row, slopes = upper.below + own[0], upper.below_slopes - upper.below
                end = here + upper.below + own[1]
                differentiate(upper.below_kind, tape, here + row, end, tape, slopes, delta, row, 0, width)
    for level in range(1, layer.levels):
        matrix = matrices[_index(layer, level)]
        delta[matrix.own + final[level, dim] : matrix.own + matrix.rows, :width] = 0


@inner
def _add_back(matrix: Any, weights: Array, own: Any, above: Any, delta: Array, width: int) -> None:
    """Add to the gradients of some of a matrix's inputs the products with those of some of its outputs."""
    row, lower = matrix.own, matrix.below
    step = matrix.stride
    add_product(weights, matrix.start, 1, step, own, above, delta, row, delta, lower, width, weights, ADDED)


@inner
def _map_back(
    layer: Any,
    variables: Array,
    i: int,
    tape: Array,
    here: int,
    after: int,
    width: int,
    grad: Array,
    logs: Array,
    delta: Array,
    room: Array,
) -> None:
    """The adjoint of `_map`."""
    row = variables[layer.moved_from + i]
    x, w, slope = tape[here + row, :width], tape[after + row, :width], room[1, :width]
    compress(w, room[0, :width], slope, layer.bulk)
    for t in range(width):
        grad[row, t] += delta[layer.inputs + i, t] * slope[t]
    pull_back(layer, i, variables, tape, here, 0, x, w, grad[row, :width], logs, delta, 0)
