r"""The sequential direction of a layer and its adjoint, over the tables of a program, compiled by numba for CPUs.

Level 0 of a layer is its inputs, the last its outputs. `final[l, i + 1]` is the number of units of level l that are
final at step i, when the variables before i are determined; `final[l, 0]` is 0. Step i thus completes units
final[l, i] .. final[l, i + 1] - 1, and each of them sees exactly the first final[l - 1, i + 1] units below.

Variables are processed in blocks: one matrix product adds the contributions of all earlier blocks to a block's units;
inside the block, small products follow the variables one by one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import njit

from pyro_maf.sweep.elementwise import INNER, activate, compress, differentiate
from pyro_maf.sweep.plan import Array, Tables
from pyro_maf.sweep.products import add_product, dot
from pyro_maf.sweep.univariate_kernel import apply, pull_back

__all__ = ["Part", "walk", "walk_back", "walk_row"]


class Part(NamedTuple):
    """A chunk's part of the tape, for one layer.

    Attributes:
        tape: (rows, points).
        here, after, context: First rows of the layer, of the next one and of the context.
        width: Number of points, padded.
    """

    tape: Array
    here: int
    after: int
    context: int
    width: int


@njit(**INNER)
def _steps(layer: Any, steps: Array) -> Array:
    """The table `final` of a layer."""
    levels, columns = layer.levels + 1, layer.moved + 1
    return steps[layer.steps_from : layer.steps_from + levels * columns].reshape((levels, columns))


@njit(**INNER)
def _index(layer: Any, level: int) -> int:
    """Number of the matrix between a level and the one below; that of the context, if there is one, precedes it."""
    return layer.first + (layer.end - layer.first) // layer.levels * level - 1


@njit(**INNER)
def walk(layer: Any, tables: Tables, weights: Array, part: Part, logs: Array, nowhere: Array) -> None:
    """w from v and phi(w), one variable after another, where units hold their biases and the products of the context.

    Args:
        layer, tables, weights, part: The layer, and what it refers to.
        logs: Log-determinants, (points,), to which the layer's are added.
        nowhere: Room for as many numbers.
    """
    final, dim = _steps(layer, tables.steps), layer.moved
    for i0 in range(0, dim, layer.block):
        i1 = min(dim, i0 + layer.block)
        _add(layer, tables.matrices, final, (i0, i1), (0, i0), weights, part, False)
        for i in range(i0, i1):
            _add(layer, tables.matrices, final, (i, i + 1), (i0, i + 1), weights, part, True)
            _map(layer, tables.variables, i, part, logs, nowhere)
    for level in range(1, layer.levels):  # units of so high a degree that no output sees them
        matrix = tables.matrices[_index(layer, level)]
        own = part.here + matrix.own
        part.tape[own + final[level, dim] : own + matrix.rows, : part.width] = 0


@njit(**INNER)
def _add(
    layer: Any, matrices: Array, final: Array, own: Any, below: Any, weights: Array, part: Part, completes: bool
) -> None:
    """Add the products of the units below of some steps, `below`, to the units of others, `own`."""
    tape, width = part.tape, part.width
    for level in range(1, layer.levels + 1):
        matrix = matrices[_index(layer, level)]
        start, step, lower, row = matrix.start, matrix.columns, part.here + matrix.below, part.here + matrix.own
        low, high = final[level, own[0]], final[level, own[1]]
        columns = (final[level - 1, below[0]], final[level - 1, below[1]])
        add_product(weights, start, step, 1, (low, high), columns, tape, lower, tape, row, 0, width)
        if completes and level < layer.levels:
            activate(matrix.kind, tape, row + low, row + high, tape, matrix.slopes - matrix.own, 0, width)


@njit(**INNER)
def _map(layer: Any, variables: Array, i: int, part: Part, logs: Array, nowhere: Array) -> None:
    """w of a variable from its v and parameters, and what the network sees of it."""
    row = variables[layer.moved_from + i]
    x, w = part.tape[part.here + row, : part.width], part.tape[part.after + row, : part.width]
    apply(layer, i, variables, part.tape, part.here, 0, x, w, logs)
    compress(w, part.tape[part.here + layer.inputs + i, : part.width], nowhere)


@njit(**INNER)
def walk_row(layer: Any, tables: Tables, weights: Array, part: Part, logs: Array, nowhere: Array) -> None:
    """As `walk` for one point; faster than tiles of many for a few."""
    final, tape, column = _steps(layer, tables.steps), part.tape, part.tape.reshape(-1)
    for i in range(layer.moved):
        for level in range(1, layer.levels + 1):
            matrix = tables.matrices[_index(layer, level)]
            own, start, step = part.here + matrix.own, matrix.start, matrix.columns
            low, high, seen = final[level, i], final[level, i + 1], final[level - 1, i + 1]
            inputs = column[part.here + matrix.below : part.here + matrix.below + seen]
            for r in range(low, high):
                column[own + r] += dot(weights[start + r * step : start + r * step + seen], inputs)
            if level < layer.levels:
                activate(matrix.kind, tape, own + low, own + high, tape, matrix.slopes - matrix.own, 0, 1)
        _map(layer, tables.variables, i, part, logs, nowhere)


@njit(**INNER)
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
    for i0 in range((dim - 1) // block * block, -1, -block):
        i1 = min(dim, i0 + block)
        for level in range(layer.levels - 1, -1, -1):
            upper = tables.matrices[_index(layer, level + 1)]
            own = (final[level, i0], final[level, i1]) if level else (i0, i1)
            delta[upper.below + own[0] : upper.below + own[1], : part.width] = 0
            _add_back(upper, weights, own, (final[level + 1, i1], final[level + 1, dim]), delta, part.width)
        for i in range(i1 - 1, i0 - 1, -1):
            upper = tables.matrices[_index(layer, 1)]
            _add_back(upper, weights, (i, i + 1), (final[1, i + 1], final[1, i1]), delta, part.width)
            _map_back(layer, tables.variables, i, part, grad, logs, delta, room)
            for level in range(layer.levels - 1, 0, -1):
                upper = tables.matrices[_index(layer, level + 1)]
                own, above = (final[level, i], final[level, i + 1]), (final[level + 1, i], final[level + 1, i1])
                _add_back(upper, weights, own, above, delta, part.width)
                _differentiate(upper, own, part, delta)
    for level in range(1, layer.levels):
        matrix = tables.matrices[_index(layer, level)]
        delta[matrix.own + final[level, dim] : matrix.own + matrix.rows, : part.width] = 0


@njit(**INNER)
def _add_back(matrix: Any, weights: Array, own: Any, above: Any, delta: Array, width: int) -> None:
    """Add to the gradients of some of a matrix's inputs the products with those of some of its outputs."""
    add_product(weights, matrix.start, 1, matrix.columns, own, above, delta, matrix.own, delta, matrix.below, 0, width)


@njit(**INNER)
def _differentiate(matrix: Any, own: Any, part: Part, delta: Array) -> None:
    """Multiply the gradients of some of a matrix's inputs by the derivatives of their activations."""
    row, slopes = matrix.below + own[0], matrix.below_slopes - matrix.below
    first, end = part.here + row, part.here + matrix.below + own[1]
    differentiate(matrix.below_kind, part.tape, first, end, part.tape, slopes, delta, row, 0, part.width)


@njit(**INNER)
def _map_back(
    layer: Any, variables: Array, i: int, part: Part, grad: Array, logs: Array, delta: Array, room: Array
) -> None:
    """The adjoint of `_map`."""
    tape, here, width = part.tape, part.here, part.width
    row = variables[layer.moved_from + i]
    x, w, slope = tape[here + row, :width], tape[part.after + row, :width], room[1, :width]
    compress(w, room[0, :width], slope)
    for t in range(width):
        grad[row, t] += delta[layer.inputs + i, t] * slope[t]
    pull_back(layer, i, variables, tape, here, 0, x, w, grad[row, :width], logs, delta, 0)
