r"""The univariate maps of the kernels, and their adjoints; no other module there depends on the map or its parameters.

The parameters of one variable are rows of a tape, whose columns are the points. `layer` is a record of `layout.LAYER`,
which says where the lists of these rows start, and which map is applied in which direction.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from pyro_maf.sweep.kernels.compiler import inner
from pyro_maf.sweep.kernels.elementwise import LOG_SCALE, affine, affine_back, copy, exp, linear, linear_back, log, tanh
from pyro_maf.sweep.layout import LINEAR, Array, Layer
from pyro_maf.univariate import Spline

__all__ = ["Adjoint", "Part", "apply", "pull_back"]

SPLINE = 1
"""Index of the spline among the maps of `layout.MAPS`."""


class Part(NamedTuple):
    """A chunk's part of the tape, for one layer.

    Attributes:
        tape: (rows, points).
        here, after, context: First rows of the layer, of its result and of the context.
        points: Number of points.
        width: Number of points, padded.
        keeps: Whether the result has a row for each variable, the first rows of the next layer, rather than a single
            row, which is copied over the variable's input.
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
        delta: With respect to pre-activations and inputs of networks; its first row is that of the layer.
        context: With respect to the context; without rows if not wanted.
        room: Two rows of scratch space.
        transposed: Scratch space for transposed inputs of a matrix, (points, columns).
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
def apply(layer: Layer, j: int, variables: Array, part: Part, logs: Array) -> Array:
    """Map the layer's variable j in its direction, add the log-derivative to `logs`, and return the result, (points,).

    Leaves what `pull_back` needs in the rows of the parameters. `variables` are the lists that the layer refers to.
    """
    tape, here, after, _, _, width, keeps = part
    row, phi = variables[layer.moved_from + j], layer.phi_from + layer.outputs * j
    x, w = tape[here + row, :width], tape[after + row if keeps else after, :width]
    if layer.univariate == SPLINE:
        _spline(layer, phi, variables, tape, here, x, w, logs)
    else:
        shifts, scales = tape[here + variables[phi], :width], tape[here + variables[phi + 1], :width]
        if layer.univariate == LINEAR:
            linear(layer, x, shifts, scales, w, logs)
        else:
            affine(layer, x, shifts, scales, w, logs)
    if not keeps:
        copy(w, x)
    return w


@inner
def pull_back(layer: Layer, j: int, variables: Array, part: Part, adjoint: Adjoint) -> None:
    """The adjoint of `apply`, called after it: turns the gradient w.r.t. the result into that w.r.t. the variable.

    Writes the gradients w.r.t. the parameters to `adjoint.delta`.
    """
    tape, here, width, logs, delta = part.tape, part.here, part.width, adjoint.logs[: part.width], adjoint.delta
    row, phi = variables[layer.moved_from + j], layer.phi_from + layer.outputs * j
    x, w, grad = tape[here + row, :width], tape[part.after + row, :width], adjoint.grad[row, :width]
    if layer.univariate == SPLINE:
        _spline_back(layer, phi, variables, part, x, w, grad, logs, delta)
        return
    shift, scale = variables[phi], variables[phi + 1]
    shifts, scales = tape[here + shift, :width], tape[here + scale, :width]
    by_shift, by_scale = delta[shift, :width], delta[scale, :width]
    if layer.univariate == LINEAR:
        linear_back(layer, x, w, scales, grad, logs, by_shift, by_scale)
    else:
        affine_back(layer, x, w, shifts, scales, grad, logs, by_shift, by_scale)


# -- splines ----------------------------------------------------------------------------------------------------------
#
# As in `pyro_maf.univariate.Spline`. With A_k and C_k the exponentials of the bounded outputs for widths and heights,
# bin k has width 2 B A_k / sum A, height 2 B A_k C_k / sum A C and chord C_k sum A / sum A C. Positions in the box are
# in units in which the width is A_k, or the height A_k C_k. The adjoint differentiates q at z, for q^-1 too. Loops run
# over rows of one flat array, `room`, at constant distances, so that LLVM can prove that they do not overlap; with
# several arrays it vectorises few loops.

GAIN, STEEPEST, LOG_SLOPE, LOG_CHORD = Spline.GAIN, Spline.STEEPEST, Spline.LOG_SLOPE, Spline.LOG_SLOPE / 2
STRIP = 128
"""Number of points that pass through a spline together: the length of a row of `room`."""
POINT, RESULT, LOG, WIDTHS, HEIGHTS, AT, LEFT, BOTTOM = range(0, 8 * STRIP, STRIP)
"""Rows: argument, result and log q' of the box; the sums of A and of A C; the argument's position; the partial sums."""
BIN, BIN_LEFT, BIN_BOTTOM, A, C, C_BEFORE, C_AFTER, OUTPUT, OUTPUT_AFTER = range(8 * STRIP, 17 * STRIP, STRIP)
"""Rows for the argument's bin: its number; the sums before it; its A and C; the C of its neighbours; the outputs for
the slopes at its knots."""
SLOPE, SLOPE_AFTER, PLACE, GRAD, GRAD_LOG, SHARED, SHARED_C = range(17 * STRIP, 24 * STRIP, STRIP)
"""Rows: the slopes at the bin's knots; t, the argument's relative place between them; the gradients w.r.t. the result,
later the argument, and w.r.t. log q'; and the part of the gradients w.r.t. A and A C that all bins share."""
STEP, STEP_C, RISE, BY_C, BY_C_BEFORE, BY_C_AFTER = range(24 * STRIP, 30 * STRIP, STRIP)
"""Rows: the terms of these gradients that are added for the bins before the argument's, whose own bin gets a fraction
t, or that of its height; and the gradients w.r.t. log C."""
FIRST, NEXT = 35 * STRIP, 5 * STRIP
"""Row of the A of the first bin, followed by its C, the output for the slope at its end, and the derivatives of log A
and log C w.r.t. their outputs; and the distance from one bin to the next."""
BEYOND = -1
"""The C beyond the first and the last bin: at the box's edge the slope is 1."""


@inner
def _spline(layer: Layer, phi: int, rows: Array, tape: Array, here: int, x: Array, w: Array, logs: Array) -> None:
    """`apply` for a spline. Replaces the shift by z, and scale, widths and heights by bounded outputs."""
    number, room, solve = x.dtype.type, _room(layer, x), layer.sign > 0
    for start in range(0, len(x), STRIP):
        end = min(len(x), start + STRIP)
        points, log_det = end - start, logs[start:end]
        point, result = room[POINT : POINT + points], room[RESULT : RESULT + points]
        shifts, scales = tape[here + rows[phi], start:end], tape[here + rows[phi + 1], start:end]
        if solve:
            copy(x[start:end], point)
        else:
            affine(layer, x[start:end], shifts, scales, point, log_det)
            copy(point, shifts)
        _set_bins(layer, phi, rows, tape, here, start, points, room, True)
        _find_bin(layer, points, room, solve)
        _through_box(layer, points, room, solve)
        if solve:
            affine(layer, result, shifts, scales, w[start:end], log_det)
            copy(result, shifts)
        else:
            copy(result, w[start:end])
        for t in range(points):
            log_det[t] -= number(layer.log_sign) * room[LOG + t]


@inner
def _room(layer: Layer, like: Array) -> Array:
    last = FIRST + (layer.bins - 1) * NEXT
    room = np.empty(last + 2 * NEXT, like.dtype)
    for t in range(STRIP):
        room[FIRST - NEXT + STRIP + t] = room[last + NEXT + STRIP + t] = BEYOND
        room[FIRST - NEXT + 2 * STRIP + t] = room[last + 2 * STRIP + t] = 0
    return room


@inner
def _set_bins(
    layer: Layer, phi: int, rows: Array, tape: Array, here: int, t0: int, points: int, room: Array, fresh: bool
) -> None:
    """Fill the rows of all bins, and their sums; if `fresh`, replace the outputs for A and C by their tanh."""
    number = tape.dtype.type
    one, gain, end = number(1), number(GAIN), t0 + points
    for t in range(points):
        room[WIDTHS + t] = room[HEIGHTS + t] = 0
    for k in range(layer.bins):
        at, phi_k = FIRST + k * NEXT, phi + 2 + k
        for part in range(2):  # A and C one at a time, since otherwise no loop is vectorised
            outputs, row = tape[here + rows[phi_k + part * layer.bins], t0:end], at + part * STRIP
            if fresh:
                for t in range(points):
                    outputs[t] = tanh(number(GAIN / LOG_CHORD) * outputs[t])
            else:
                for t in range(points):
                    room[row + 3 * STRIP + t] = gain * (one - outputs[t] * outputs[t])
            for t in range(points):
                room[row + t] = exp(number(LOG_CHORD) * outputs[t])
        if k < layer.bins - 1:
            outputs = tape[here + rows[phi_k + 2 * layer.bins], t0:end]
            for t in range(points):
                room[at + 2 * STRIP + t] = outputs[t]
        for t in range(points):
            room[WIDTHS + t] += room[at + t]
            room[HEIGHTS + t] += room[at + t] * room[at + STRIP + t]


@inner
def _find_bin(layer: Layer, points: int, room: Array, solve: bool) -> None:
    """Fill in the argument's position, clipped to the box, and the rows that describe its bin."""
    number = room.dtype.type
    bound, zero = number(layer.bound), number(0)
    for t in range(points):
        inside = min(max(room[POINT + t], -bound), bound) + bound
        width, height = room[WIDTHS + t], room[HEIGHTS + t]
        room[AT + t] = inside * (height if solve else width) / (bound + bound)
        room[LEFT + t] = room[BOTTOM + t] = zero
        room[BIN + t], room[BIN_LEFT + t], room[BIN_BOTTOM + t] = number(-1), zero, zero
        room[A + t] = room[C + t] = room[C_BEFORE + t] = room[C_AFTER + t] = zero
        room[OUTPUT + t] = room[OUTPUT_AFTER + t] = zero
    for k in range(layer.bins):
        a, is_first, is_last = FIRST + k * NEXT, k == 0, k == layer.bins - 1
        # Sums with zeros, since a choice between two entries is compiled to a slow choice between their addresses. All
        # are read beforehand: loops that may skip reading an entry are not vectorised.
        for t in range(points):
            at, left, bottom, width = room[AT + t], room[LEFT + t], room[BOTTOM + t], room[a + t]
            c_before, c, c_after = room[a + STRIP - NEXT + t], room[a + STRIP + t], room[a + STRIP + NEXT + t]
            next_left, next_bottom = left + width, bottom + width * c
            is_behind = (at >= (bottom if solve else left)) | is_first
            is_it = is_behind & ((at < (next_bottom if solve else next_left)) | is_last)
            room[BIN + t] += number(k + 1) if is_it else zero
            room[BIN_LEFT + t] += left if is_it else zero
            room[BIN_BOTTOM + t] += bottom if is_it else zero
            room[A + t] += width if is_it else zero
            room[C + t] += c if is_it else zero
            room[C_BEFORE + t] += c_before if is_it else zero
            room[C_AFTER + t] += c_after if is_it else zero
            room[LEFT + t], room[BOTTOM + t] = next_left, next_bottom
        for t in range(points):
            is_it, here, after = room[BIN + t] == number(k), room[a + 2 * STRIP - NEXT + t], room[a + 2 * STRIP + t]
            room[OUTPUT + t] += here if is_it else zero
            room[OUTPUT_AFTER + t] += after if is_it else zero


@inner
def _slope(output: Any, c: Any, beside: Any, ratio: Any) -> tuple[Any, Any, Any]:
    """The slope at a knot between bins with these C, whether it is the limit, and its log over its bound otherwise."""
    bounded = tanh(type(output)(GAIN / LOG_SLOPE) * output)
    free = exp(type(c)(LOG_SLOPE) * bounded)
    limit = type(c)(STEEPEST) * ratio * min(c, beside)
    is_limit = (limit < free) & (beside > 0)
    return limit if is_limit else free, is_limit, bounded


@inner
def _through_box(layer: Layer, points: int, room: Array, solve: bool) -> None:
    """Fill in the result, q or with `solve` q^-1 of the argument, log q', and t."""
    number = room.dtype.type
    one, two, bound, least = number(1), number(2), number(layer.bound), np.finfo(room.dtype).tiny
    for t in range(points):
        # In units of z, where float32 subtracts neighbours exactly; in a loop before, or LLVM would reorder the sums.
        room[LEFT + t] = room[BIN_LEFT + t] * (two * bound / room[WIDTHS + t]) - bound
        room[BOTTOM + t] = room[BIN_BOTTOM + t] * (two * bound / room[HEIGHTS + t]) - bound
        ratio, c = room[WIDTHS + t] / room[HEIGHTS + t], room[C + t]
        room[SLOPE + t] = _slope(room[OUTPUT + t], c, room[C_BEFORE + t], ratio)[0]
        room[SLOPE_AFTER + t] = _slope(room[OUTPUT_AFTER + t], c, room[C_AFTER + t], ratio)[0]
    if solve:
        for t in range(points):
            s, slope = room[C + t] * room[WIDTHS + t] / room[HEIGHTS + t], room[SLOPE + t]
            excess = slope + room[SLOPE_AFTER + t] - two * s
            inside, unit = min(max(room[POINT + t], -bound), bound), two * bound / room[HEIGHTS + t]
            rise = (inside - room[BOTTOM + t]) / (room[A + t] * room[C + t] * unit)
            b = slope - rise * excess
            discriminant = b * b + number(4) * (s - slope + rise * excess) * s * rise
            root = math.sqrt(least if discriminant < least else discriminant)
            room[PLACE + t] = two * s * rise / (b + root)
    else:
        for t in range(points):
            inside, unit = min(max(room[POINT + t], -bound), bound), two * bound / room[WIDTHS + t]
            room[PLACE + t] = (inside - room[LEFT + t]) / (room[A + t] * unit)
    for t in range(points):
        s, slope, place = room[C + t] * room[WIDTHS + t] / room[HEIGHTS + t], room[SLOPE + t], room[PLACE + t]
        rest = one - place
        denominator = s + (slope + room[SLOPE_AFTER + t] - two * s) * place * rest
        rise = place * (s * place + slope * rest) / denominator
        unit, unit_q = two * bound / room[WIDTHS + t], two * bound / room[HEIGHTS + t]
        z = room[LEFT + t] + room[A + t] * unit * place
        q = room[BOTTOM + t] + room[A + t] * room[C + t] * unit_q * rise
        numerator = room[SLOPE_AFTER + t] * place * place + two * s * place * rest + slope * rest * rest
        is_inside = abs(room[POINT + t]) < bound  # false for NaN
        result = z if solve else q
        room[RESULT + t] = result if is_inside else room[POINT + t]
        slope = s * s * numerator / (denominator * denominator)
        room[LOG + t] = slope if is_inside else one
    for t in range(points):
        room[LOG + t] = log(room[LOG + t])


@inner
def _spline_back(
    layer: Layer, phi: int, rows: Array, part: Part, x: Array, w: Array, grad: Array, logs: Array, delta: Array
) -> None:
    """`pull_back` for a spline."""
    number, room, e, solve = x.dtype.type, _room(layer, x), np.empty(STRIP, x.dtype), layer.sign > 0
    shift, scale, tape, here = rows[phi], rows[phi + 1], part.tape, part.here
    for start in range(0, len(x), STRIP):
        end = min(len(x), start + STRIP)
        points = end - start
        inputs, z, scales = x[start:end], tape[here + shift, start:end], tape[here + scale, start:end]
        log_det, by_shift, by_scale = logs[start:end], delta[shift, start:end], delta[scale, start:end]
        point, inner_grad = room[POINT : POINT + points], room[GRAD : GRAD + points]
        for t in range(points):
            e[t] = exp(number(0.5 * layer.sign * LOG_SCALE) * scales[t])
        for t in range(points):
            room[GRAD_LOG + t] = number(-layer.log_sign) * log_det[t]
        copy(z, point)
        copy(grad[start:end], inner_grad)
        if solve:
            affine_back(layer, z, w[start:end], e[:points], scales, inner_grad, log_det, by_shift, by_scale)
        _set_bins(layer, phi, rows, tape, here, start, points, room, False)
        _find_bin(layer, points, room, False)
        if solve:
            copy(inputs, point)  # the argument of q^-1 decides whether it is in the box
        _box_back(layer, points, room, solve)
        _bins_back(layer, phi, rows, start, points, room, delta)
        if not solve:
            affine_back(layer, inputs, z, e[:points], scales, inner_grad, log_det, by_shift, by_scale)
        copy(inner_grad, grad[start:end])


@inner
def _box_back(layer: Layer, points: int, room: Array, solve: bool) -> None:
    """Turn the gradient w.r.t. the result of the box into that w.r.t. its argument.

    Fills in the rows from which `_bins_back` computes gradients w.r.t. the outputs.
    """
    number = room.dtype.type
    zero, two, bound = number(0), number(2), number(layer.bound)
    for t in range(points):
        a, c, ratio = room[A + t], room[C + t], room[WIDTHS + t] / room[HEIGHTS + t]
        c_before, c_after = room[C_BEFORE + t], room[C_AFTER + t]
        slope, is_limit, bounded = _slope(room[OUTPUT + t], c, c_before, ratio)
        slope_after, is_limit_after, bounded_after = _slope(room[OUTPUT_AFTER + t], c, c_after, ratio)
        s, place = c * ratio, (room[AT + t] - room[BIN_LEFT + t]) / a
        rise, of_rise, of_log = _derivatives(s, slope, slope_after, place)
        # q' with respect to z, in the units in which the bin has width A.
        derivative, unit = s * of_rise[0], room[WIDTHS + t] / (two * bound)
        is_inside = abs(room[POINT + t]) < bound
        grad, grad_log = room[GRAD + t], room[GRAD_LOG + t] if is_inside else zero
        by_z = grad_log * of_log[0] * unit / a
        if solve:
            by_z = (grad + by_z) / derivative
            grad_q = -by_z
        else:
            grad_q = grad
            by_z += grad * derivative
        grad_q = grad_q if is_inside else zero
        room[GRAD + t] = by_z if is_inside else grad
        # W.r.t. the quantities that determine q and log q' in the bin.
        height = two * bound / room[HEIGHTS + t]
        by_rise = grad_q * height * a * c
        by_place = by_rise * of_rise[0] + grad_log * of_log[0]
        by_chord = s * (by_rise * of_rise[1] + grad_log * of_log[1])
        by_slope = slope * (by_rise * of_rise[2] + grad_log * of_log[2])
        by_slope_after = slope_after * (by_rise * of_rise[3] + grad_log * of_log[3])
        room[OUTPUT + t], by_limit, before = _knot_back(by_slope, is_limit, bounded, c, c_before)
        by_knot = _knot_back(by_slope_after, is_limit_after, bounded_after, c, c_after)
        room[OUTPUT_AFTER + t], by_limit_after, after = by_knot
        room[BY_C_BEFORE + t], room[BY_C_AFTER + t] = before, after
        room[BY_C + t] = by_chord + by_limit - before + by_limit_after - after
        by_ratio = by_chord + by_limit + by_limit_after
        room[PLACE + t], room[RISE + t] = place, rise
        room[STEP + t], room[STEP_C + t] = -by_place / a, grad_q * height
        room[SHARED + t] = (by_ratio + by_place / a * room[AT + t]) / room[WIDTHS + t]
        room[SHARED_C + t] = -(by_ratio + grad_q * height * (room[BIN_BOTTOM + t] + a * c * rise)) / room[HEIGHTS + t]


@inner
def _derivatives(s: Any, slope: Any, slope_after: Any, place: Any) -> tuple[Any, Any, Any]:
    """The rise of q in a bin, over its height, and derivatives of it and of log q' w.r.t. t, s and the two slopes."""
    one, two = type(s)(1), type(s)(2)
    rest, excess = one - place, slope + slope_after - two * s
    across, turned = place * rest, one - two * place
    over = one / (s + excess * across)
    rise = place * (s * place + slope * rest) * over
    numerator = slope_after * place * place + two * s * across + slope * rest * rest
    under, far = one / numerator, one - two * across
    of_place, of_s = s * numerator * over * over, (place * place - rise * far) * over
    log_of_place = two * ((slope_after * place + s * turned - slope * rest) * under - excess * turned * over)
    log_of_s = two * (one / s + across * under - far * over)
    both = two * across * over
    of_log = log_of_place, log_of_s, rest * rest * under - both, place * place * under - both
    return rise, (of_place, of_s, across * (one - rise) * over, -across * rise * over), of_log


@inner
def _knot_back(by_slope: Any, is_limit: Any, bounded: Any, c: Any, beside: Any) -> tuple[Any, Any, Any]:
    """Gradients w.r.t. a knot's output, the logarithm of its limit, and, through that, log C of the adjacent bin."""
    number = type(c)
    by_limit = by_slope if is_limit else number(0)
    share = number(1) if beside < c else number(0.5) if beside == c else number(0)  # of the smaller C
    return number(GAIN) * (number(1) - bounded * bounded) * (by_slope - by_limit), by_limit, share * by_limit


@inner
def _bins_back(layer: Layer, phi: int, rows: Array, t0: int, points: int, room: Array, delta: Array) -> None:
    """Gradients w.r.t. the outputs for widths, heights and slopes."""
    number = room.dtype.type
    one, zero = number(1), number(0)
    for k in range(layer.bins):
        at, this, before, after = FIRST + k * NEXT, number(k), number(k + 1), number(k - 1)
        row, row_c = rows[phi + 2 + k], rows[phi + 2 + layer.bins + k]
        out, out_c = delta[row, t0 : t0 + points], delta[row_c, t0 : t0 + points]
        for t in range(points):
            a, ac, found = room[at + t], room[at + t] * room[at + STRIP + t], room[BIN + t]
            place, rise = room[PLACE + t], room[RISE + t]
            by_c, by_c_before, by_c_after = room[BY_C + t], room[BY_C_BEFORE + t], room[BY_C_AFTER + t]
            part = one if found > this else place if found == this else zero
            part_c = one if found > this else rise if found == this else zero
            by_ac = ac * (room[SHARED_C + t] + room[STEP_C + t] * part_c)
            own = by_c if found == this else by_c_before if found == before else by_c_after if found == after else zero
            by_a = a * (room[SHARED + t] + room[STEP + t] * part)
            out[t] = room[at + 3 * STRIP + t] * (by_a + by_ac)
            out_c[t] = room[at + 4 * STRIP + t] * (by_ac + own)
    for k in range(1, layer.bins):
        out = delta[rows[phi + 1 + 2 * layer.bins + k], t0 : t0 + points]
        knot, before = number(k), number(k - 1)
        for t in range(points):
            found, here, after = room[BIN + t], room[OUTPUT + t], room[OUTPUT_AFTER + t]
            out[t] = here if found == knot else after if found == before else zero
