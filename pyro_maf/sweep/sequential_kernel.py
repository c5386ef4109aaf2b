r"""The sequential direction of one layer and its adjoint, compiled by numba for CPUs.

They fill a tape: one row for each unit of the network, level by level, inputs first and outputs last, and one column
for each point of the batch. Arrays that describe the network:

- `weights`, flat: the matrix of level l, (units, units below), begins at `starts[l]`. Level 0 is the inputs.
- `levels[l]`: the tape's row at which level l begins; the last entry is the number of rows.
- `final[l, i + 1]`: the number of units of level l that are final at step i, when the variables before i are
  determined; `final[l, 0]` is 0. Step i thus completes units final[l, i] .. final[l, i + 1] - 1.

Variables are processed in blocks: one matrix product adds the contributions of all earlier blocks to a block's units;
inside the block, small products follow the variables one by one. A chunk of columns passes through all blocks before
the next, so that its part of the tape stays in the processor's cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from pyro_maf.sweep.compile_cache import stored
from pyro_maf.sweep.elementwise import INNER, activate, compress, differentiate
from pyro_maf.sweep.plan import LANES, Array
from pyro_maf.sweep.products import add_product, dot
from pyro_maf.sweep.univariate_kernel import affine

__all__ = ["backward", "forward_columns", "forward_rows"]

ENTRY = {"fastmath": INNER["fastmath"], "error_model": "numpy", "nogil": True}
"""Compiler options of functions that Python calls; they release the interpreter's lock."""
CHUNK = 256
"""Number of points that pass through the sweep together."""


@stored
@njit(**ENTRY)
def forward_columns(
    v: Array,
    order: Array,
    weights: Array,
    starts: Array,
    levels: Array,
    final: Array,
    kind: int,
    biases: Array,
    sign: int,
    block: int,
    first: int,
    end: int,
    tape: Array,
    slopes: Array,
    w: Array,
    log_det: Array,
) -> None:
    """The direction for points `first` .. `end` - 1: fills w, log_det and, for the adjoint, tape and slopes.

    Args:
        v: The input, (points, D).
        order: The variables, first to last.
        weights, starts, levels, final: The network, as above.
        kind: The activation.
        biases: (units above the inputs, 1 or points).
        sign: 1 for y from x, -1 for x from y.
        block: Number of variables in a block.
        w, log_det: (points, D) and (points,).
        first, end: Range of points; `first` is a multiple of `LANES`.
        tape: (units, points padded to a multiple of `LANES`); with no rows if nothing is saved for the adjoint.
        slopes: Derivatives, laid out as the tape: of `compress_tails`, and of the activations that need them.
    """
    dim, top = v.shape[1], len(starts) - 1
    keep = tape.shape[0] > 0
    room = _padded(min(CHUNK, end - first))
    work = tape if keep else np.empty((levels[-1], room), v.dtype)
    logs, nowhere = np.empty(room, v.dtype), np.empty(room, v.dtype)
    found = np.empty((block, room), v.dtype)
    for b0 in range(first, end, CHUNK):
        points = min(CHUNK, end - b0)
        t0 = b0 if keep else 0
        t1 = t0 + _padded(points)
        logs[:] = 0
        for i0 in range(0, dim, block):
            i1 = min(dim, i0 + block)
            _gather(v, order, i0, i1, b0, points, found)
            known = final[:, i0].copy()
            for level in range(1, top + 1):
                own, below = levels[level], levels[level - 1]
                rows = (final[level, i0], final[level, i1])
                _set_biases(biases, own - dim, rows, work, own, b0, points, t0, t1)
                columns = (0, known[level - 1])
                add_product(weights, starts[level], own - below, 1, rows, columns, work, below, work, own, t0, t1)
            for i in range(i0, i1):
                for level in range(1, top + 1):
                    own, below = levels[level], levels[level - 1]
                    rows, columns = (final[level, i], final[level, i + 1]), (known[level - 1], final[level - 1, i + 1])
                    add_product(weights, starts[level], own - below, 1, rows, columns, work, below, work, own, t0, t1)
                    if level < top:
                        activate(kind, work, own + rows[0], own + rows[1], slopes, 0, t0, t1)
                x, shift = found[i - i0, : t1 - t0], levels[top] + 2 * i
                # Not in place, which would keep the loops of `affine` from being vectorised.
                affine(x, work[shift, t0:t1], work[shift + 1, t0:t1], sign, 1, work[i, t0:t1], logs[: t1 - t0])
                for t in range(t0, t1):
                    found[i - i0, t - t0] = work[i, t]
                compress(x, work[i, t0:t1], slopes[i, t0:t1] if keep else nowhere[: t1 - t0])
            _scatter(found, order, i0, i1, b0, points, w)
        log_det[b0 : b0 + points] = logs[:points]
        _clear_unseen(levels, final, work, t0, t1)


@njit(**INNER)
def _padded(points: int) -> int:
    return (points + LANES - 1) // LANES * LANES


@njit(**INNER)
def _gather(v: Array, order: Array, i0: int, i1: int, b0: int, points: int, found: Array) -> None:
    """Gather variables i0 .. i1 - 1 of the points into rows; the padding is 0."""
    for b in range(points):
        for i in range(i0, i1):
            found[i - i0, b] = v[b0 + b, order[i]]
    found[: i1 - i0, points:] = 0


@njit(**INNER)
def _scatter(found: Array, order: Array, i0: int, i1: int, b0: int, points: int, w: Array) -> None:
    """Scatter rows of variables i0 .. i1 - 1 back to the columns of w."""
    for b in range(points):
        for i in range(i0, i1):
            w[b0 + b, order[i]] = found[i - i0, b]


@njit(**INNER)
def _set_biases(
    biases: Array, bias_row: int, rows: Any, tape: Array, row: int, b0: int, points: int, t0: int, t1: int
) -> None:
    for r in range(rows[0], rows[1]):
        if biases.shape[1] == 1:
            tape[row + r, t0:t1] = biases[bias_row + r, 0]
        else:
            tape[row + r, t0 : t0 + points] = biases[bias_row + r, b0 : b0 + points]
            tape[row + r, t0 + points : t1] = 0


@njit(**INNER)
def _clear_unseen(levels: Array, final: Array, tape: Array, t0: int, t1: int) -> None:
    """Zero the units that were never computed: of so high a degree that no output sees them."""
    for level in range(1, len(levels) - 1):
        for r in range(levels[level] + final[level, -1], levels[level + 1]):
            tape[r, t0:t1] = 0


@stored
@njit(**ENTRY)
def forward_rows(
    v: Array,
    order: Array,
    weights: Array,
    starts: Array,
    levels: Array,
    final: Array,
    kind: int,
    biases: Array,
    sign: int,
    w: Array,
    log_det: Array,
) -> None:
    """Compute the direction point by point, as `forward_columns` does for many at once; faster for a few points."""
    dim, top = v.shape[1], len(starts) - 1
    column, nothing = np.empty((levels[-1], 1), v.dtype), np.empty((0, 1), v.dtype)
    x, nowhere = np.empty(1, v.dtype), np.empty(1, v.dtype)
    units = column.reshape(-1)
    for b in range(len(v)):
        bias_column = b if biases.shape[1] > 1 else 0
        log_det[b] = 0
        for i in range(dim):
            for level in range(1, top + 1):
                own, below = levels[level], levels[level - 1]
                low, high, seen = final[level, i], final[level, i + 1], final[level - 1, i + 1]
                inputs = units[below : below + seen]
                for r in range(low, high):
                    at = starts[level] + r * (own - below)
                    units[own + r] = biases[own - dim + r, bias_column] + dot(weights[at : at + seen], inputs)
                if level < top:
                    activate(kind, column, own + low, own + high, nothing, 0, 0, 1)
            shift = levels[top] + 2 * i
            x[0] = v[b, order[i]]
            affine(x, units[shift : shift + 1], units[shift + 1 : shift + 2], sign, 1, x, log_det[b : b + 1])
            w[b, order[i]] = x[0]
            compress(x, units[i : i + 1], nowhere)


# -- the adjoint ------------------------------------------------------------------------------------------------------


@stored
@njit(**ENTRY)
def backward(
    v: Array,
    w: Array,
    order: Array,
    weights: Array,
    starts: Array,
    levels: Array,
    final: Array,
    kind: int,
    tape: Array,
    slopes: Array,
    grad_w: Array,
    grad_log_det: Array,
    sign: int,
    block: int,
    first: int,
    end: int,
    delta: Array,
    grad_v: Array,
) -> None:
    """Gradients of <grad_w, w> + <grad_log_det, log_det>: w.r.t. pre-activations in `delta`, w.r.t. v in `grad_v`.

    Args:
        v, w: Input and output of the direction, (points, D).
        tape, slopes: From `forward_columns`.
        grad_w, grad_log_det: (points, D) and (points,).
        delta: Laid out as the tape.
        grad_v: (points, D).
        order, weights, starts, levels, final, kind, sign, block, first, end: As in `forward_columns`.
    """
    dim, top = v.shape[1], len(starts) - 1
    for b0 in range(first, end, CHUNK):
        points = min(CHUNK, end - b0)
        b1 = b0 + _padded(points)
        for i0 in range((dim - 1) // block * block, -1, -block):
            i1 = min(dim, i0 + block)
            # First the gradient from later blocks to the whole block, then the block's variables, last to first.
            for i in range(i1, i0 - 1, -1):
                whole = i == i1
                for step in range(top):
                    # The variable first, then the units that it is computed from, the last level first.
                    level = 0 if step == 0 else top - step
                    if whole:
                        rows = (final[level, i0], final[level, i1]) if level else (i0, i1)
                        above = (final[level + 1, i1], final[level + 1, dim])
                        delta[levels[level] + rows[0] : levels[level] + rows[1], b0:b1] = 0
                    elif level == 0:
                        rows, above = (i, i + 1), (final[1, i + 1], final[1, i1])
                    else:
                        rows = (final[level, i], final[level, i + 1])
                        above = (final[level + 1, i], final[level + 1, i1])
                    own, upper = levels[level], levels[level + 1]
                    add_product(
                        weights, starts[level + 1], 1, upper - own, rows, above, delta, upper, delta, own, b0, b1
                    )
                    if whole:
                        continue
                    if level == 0:
                        shift = levels[top] + 2 * i
                        _transform_back(
                            v,
                            w,
                            order[i],
                            tape,
                            slopes,
                            i,
                            shift,
                            grad_w,
                            grad_log_det,
                            sign,
                            b0,
                            points,
                            delta,
                            grad_v,
                        )
                    else:
                        first_row, end_row = own + rows[0], own + rows[1]
                        differentiate(kind, tape, first_row, end_row, slopes, 0, delta, first_row, b0, b1)
        _clear_unseen(levels, final, delta, b0, b1)


@njit(**INNER)
def _transform_back(
    v: Array,
    w: Array,
    column: int,
    tape: Array,
    slopes: Array,
    i: int,
    shift: int,
    grad_w: Array,
    grad_log_det: Array,
    sign: int,
    b0: int,
    points: int,
    delta: Array,
    grad_v: Array,
) -> None:
    """Adjoint of the univariate map: propagate the gradient of w to v and to the map's two parameters."""
    one, signed, half = v.dtype.type(1), v.dtype.type(sign), v.dtype.type(0.5 * sign)
    for b in range(b0, b0 + points):
        total = grad_w[b, column] + slopes[i, b] * delta[i, b]
        e, tanh = tape[shift, b], tape[shift + 1, b]
        grad_v[b, column] = total * e * e
        delta[shift, b] = signed * total * e
        delta[shift + 1, b] = (one - tanh * tanh) * (
            grad_log_det[b] + total * half * (w[b, column] + v[b, column] * e * e)
        )
    idle = slice(b0 + points, b0 + _padded(points))
    delta[shift, idle] = 0
    delta[shift + 1, idle] = 0
