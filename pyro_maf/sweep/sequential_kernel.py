r"""The sequential direction of a layer and its adjoint, over the tables of a program, compiled by numba for CPUs.

Level 0 of a layer is its inputs, the last its outputs. `final[l, i + 1]` is the number of units of level l that are
final at step i, when the variables before i are determined; `final[l, 0]` is 0. Step i thus completes units
final[l, i] .. final[l, i + 1] - 1, and each of them sees exactly the first final[l - 1, i + 1] units below.

Variables are processed in blocks: one matrix product adds the contributions of all earlier blocks to a block's units;
inside the block, small products follow the variables one by one.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from pyro_maf.sweep.elementwise import INNER, activate, compress, differentiate
from pyro_maf.sweep.plan import Array
from pyro_maf.sweep.products import add_product, dot
from pyro_maf.sweep.univariate_kernel import apply, pull_back

__all__ = ["walk", "walk_back", "walk_row"]


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
def walk(
    layer: Any,
    matrices: Array,
    variables: Array,
    steps: Array,
    weights: Array,
    work: Array,
    here: int,
    after: int,
    width: int,
    logs: Array,
    nowhere: Array,
) -> None:
    """w from v and phi(w), one variable after another, where units hold their biases and the products of the context.

    Args:
        layer, matrices, variables, steps, weights: The layer, and what it refers to.
        work: The tape, (rows, points).
        here, after: First rows of the layer and of the next one.
        width: Number of points, padded.
        logs: Log-determinants, to which the layer's are added.
        nowhere: Room for a derivative of each point.
    """
    final, dim = _steps(layer, steps), layer.moved
    for i0 in range(0, dim, layer.block):
        i1 = min(dim, i0 + layer.block)
        _add(layer, matrices, final, (i0, i1), (0, i0), weights, work, here, width, False)
        for i in range(i0, i1):
            _add(layer, matrices, final, (i, i + 1), (i0, i + 1), weights, work, here, width, True)
            _map(layer, variables, i, work, here, after, width, logs, nowhere)
    for level in range(1, layer.levels):  # units of so high a degree that no output sees them
        matrix = matrices[_index(layer, level)]
        work[here + matrix.own + final[level, dim] : here + matrix.own + matrix.rows, :width] = 0


@njit(**INNER)
def _add(
    layer: Any,
    matrices: Array,
    final: Array,
    own: Any,
    below: Any,
    weights: Array,
    work: Array,
    here: int,
    width: int,
    completes: bool,
) -> None:
    """Add the products of the units below of some steps, `below`, to the units of others, `own`."""
    for level in range(1, layer.levels + 1):
        matrix = matrices[_index(layer, level)]
        row, low, high = here + matrix.own, final[level, own[0]], final[level, own[1]]
        columns = (final[level - 1, below[0]], final[level - 1, below[1]])
        add_product(
            weights,
            matrix.start,
            matrix.columns,
            1,
            (low, high),
            columns,
            work,
            here + matrix.below,
            work,
            row,
            0,
            width,
        )
        if completes and level < layer.levels:
            activate(matrix.kind, work, row + low, row + high, work, matrix.slopes - matrix.own, 0, width)


@njit(**INNER)
def _map(
    layer: Any,
    variables: Array,
    i: int,
    work: Array,
    here: int,
    after: int,
    width: int,
    logs: Array,
    nowhere: Array,
) -> None:
    """w of a variable from its v and parameters, and what the network sees of it."""
    row = variables[layer.moved_from + i]
    x, w = work[here + row, :width], work[after + row, :width]
    apply(layer, i, variables, work, here, 0, x, w, logs[:width])
    compress(w, work[here + layer.inputs + i, :width], nowhere[:width])


@njit(**INNER)
def walk_row(
    layer: Any,
    matrices: Array,
    variables: Array,
    steps: Array,
    weights: Array,
    work: Array,
    here: int,
    after: int,
    logs: Array,
    nowhere: Array,
) -> None:
    """As `walk` for one point; faster than tiles of many for a few."""
    final, column = _steps(layer, steps), work.reshape(-1)
    for i in range(layer.moved):
        for level in range(1, layer.levels + 1):
            matrix = matrices[_index(layer, level)]
            low, high, seen = final[level, i], final[level, i + 1], final[level - 1, i + 1]
            own, inputs = here + matrix.own, column[here + matrix.below : here + matrix.below + seen]
            for r in range(low, high):
                at = matrix.start + r * matrix.columns
                column[own + r] += dot(weights[at : at + seen], inputs)
            if level < layer.levels:
                activate(matrix.kind, work, own + low, own + high, work, matrix.slopes - matrix.own, 0, 1)
        _map(layer, variables, i, work, here, after, 1, logs, nowhere)


@njit(**INNER)
def walk_back(
    layer: Any,
    matrices: Array,
    variables: Array,
    steps: Array,
    weights: Array,
    tape: Array,
    here: int,
    after: int,
    width: int,
    grad: Array,
    logs: Array,
    delta: Array,
    slope: Array,
    nowhere: Array,
) -> None:
    """The adjoint of `walk`: turns gradients by w into those by v, and writes those by pre-activations to `delta`.

    Args:
        layer, matrices, variables, steps, weights, here, after, width: As in `walk`.
        tape: As `walk` left it.
        grad: By the variables, (D, points).
        logs: By the log-determinants.
        delta: (rows, points); its first row is that of the layer.
        slope, nowhere: Room for a number of each point.
    """
    final, dim, block = _steps(layer, steps), layer.moved, 2 * layer.block  # wider, as weights are read down columns
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
            _map_back(layer, variables, i, tape, here, after, width, grad, logs, delta, slope, nowhere)
            for level in range(layer.levels - 1, 0, -1):
                upper = matrices[_index(layer, level + 1)]
                low, high = final[level, i], final[level, i + 1]
                _add_back(upper, weights, (low, high), (final[level + 1, i], final[level + 1, i1]), delta, width)
                first, end, slopes = (
                    here + upper.below + low,
                    here + upper.below + high,
                    upper.below_slopes - upper.below,
                )
                differentiate(upper.below_kind, tape, first, end, tape, slopes, delta, first - here, 0, width)
    for level in range(1, layer.levels):
        matrix = matrices[_index(layer, level)]
        delta[matrix.own + final[level, dim] : matrix.own + matrix.rows, :width] = 0


@njit(**INNER)
def _add_back(matrix: Any, weights: Array, own: Any, above: Any, delta: Array, width: int) -> None:
    """Add to the gradients of some of a matrix's inputs the products with those of some of its outputs."""
    add_product(weights, matrix.start, 1, matrix.columns, own, above, delta, matrix.own, delta, matrix.below, 0, width)


@njit(**INNER)
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
    slope: Array,
    nowhere: Array,
) -> None:
    """The adjoint of `_map`."""
    row = variables[layer.moved_from + i]
    x, w = tape[here + row, :width], tape[after + row, :width]
    compress(w, nowhere[:width], slope[:width])
    for t in range(width):
        grad[row, t] += delta[layer.inputs + i, t] * slope[t]
    pull_back(layer, i, variables, tape, here, 0, x, w, grad[row, :width], logs[:width], delta, 0)
