r"""The univariate maps of the kernels, and their adjoints: nothing else there depends on the map or its parameters.

The parameters of one variable are rows of a tape, and the points its columns. `layer` is a record of `layout.LAYER`,
which says where the lists of these rows begin and which map it is, in which direction.
"""

from __future__ import annotations

from pyro_maf.sweep.kernels.compiler import inner
from pyro_maf.sweep.kernels.elementwise import affine, affine_back, linear, linear_back
from pyro_maf.sweep.kernels.spline import spline, spline_back
from pyro_maf.sweep.layout import LINEAR, Array, Layer

__all__ = ["apply", "pull_back"]

SPLINE = 1
"""Index of the spline among the maps of `layout.MAPS`."""


@inner
def apply(layer: Layer, j: int, variables: Array, tape: Array, here: int, x: Array, w: Array, log_det: Array) -> None:
    """The map of one variable in the layer's direction; adds its log-derivative to log_det.

    Leaves in the rows of the parameters what `pull_back` needs.

    Args:
        layer, variables: The layer, and the lists that it refers to.
        j: Which of the variables that it maps.
        tape, here: Where the parameters are: the rows of the list, counted from `here`.
        x, w, log_det: Input, output and sum of log-derivatives, (points,); w is not x.
    """
    phi = layer.phi_from + layer.outputs * j
    if layer.univariate == SPLINE:
        spline(layer, phi, variables, tape, here, x, w, log_det)
        return
    shifts, scales = tape[here + variables[phi], : len(x)], tape[here + variables[phi + 1], : len(x)]
    if layer.univariate == LINEAR:
        linear(x, shifts, scales, layer.sign, layer.log_sign, w, log_det)
        return
    affine(x, shifts, scales, layer.sign, layer.log_sign, w, log_det)


@inner
def pull_back(
    layer: Layer,
    j: int,
    variables: Array,
    tape: Array,
    here: int,
    x: Array,
    w: Array,
    grad: Array,
    grad_log_det: Array,
    delta: Array,
) -> None:
    """The adjoint of `apply`: turns the gradient with respect to w into that with respect to x.

    Args:
        layer, j, variables, tape, here, x, w: As in `apply`, after it.
        grad: Gradient with respect to w, then x, (points,).
        grad_log_det: Gradient with respect to log_det, (points,).
        delta: Gradients with respect to the parameters are written there, in rows from the layer's first on.
    """
    phi = layer.phi_from + layer.outputs * j
    if layer.univariate == SPLINE:
        spline_back(layer, phi, variables, tape, here, x, w, grad, grad_log_det, delta)
        return
    shift, scale, points = variables[phi], variables[phi + 1], len(x)
    shifts, scales = tape[here + shift, :points], tape[here + scale, :points]
    by_shift, by_scale = delta[shift, :points], delta[scale, :points]
    if layer.univariate == LINEAR:
        linear_back(x, w, scales, layer.sign, layer.log_sign, grad, grad_log_det, by_shift, by_scale)
        return
    affine_back(x, w, shifts, scales, layer.sign, layer.log_sign, grad, grad_log_det, by_shift, by_scale)
