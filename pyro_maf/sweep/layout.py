r"""Integer tables that describe a run of layers, each in its parallel or sequential direction, to the kernels.

A layer consists of networks and an elementwise map: the networks see some variables and output the parameters of the
map of others. With sorted degrees every mask is a staircase: row r of a matrix sees columns 0 .. seen[r] - 1, and
column k is seen by the rows from heard[k] on. The matrix of a coupling is a staircase with one step. A context is a
separate matrix, whose product is added. A triangular map is a network with one level: its matrix is L below the
diagonal, its biases are the location, and a matrix without columns has the log-scales as biases. So layers of all kinds
are rows of the same tables.

The tape has a row for each quantity and a column for each point. The rows of a layer are its D variables, the inputs of
its networks, and the units of each level; the outputs are overwritten as described in `kernels.univariate`. The rows of
the context precede the first layer, and the D rows of the result follow the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from pyro_maf.univariate import Affine, Spline, UnivariateMap

__all__ = ["CONTEXT", "INPUTS", "LANES", "LAYER", "LINEAR", "MAPS", "MATRIX", "UNITS"] + [
    "Array",
    "Layer",
    "Matrix",
    "Step",
    "Tables",
    "Triangular",
]

LANES = 16
"""Tape columns and weight columns are padded to a multiple of this, so that loops over them are vectorised."""
INPUTS, UNITS, CONTEXT = range(3)
"""Sources of the inputs of a matrix."""
Array = np.ndarray[Any, Any]
MAPS = (Affine, Spline)
"""Univariate maps that the kernels support."""
LINEAR = len(MAPS)
"""Number of the map of a triangular layer: y = x exp(a) + s, with P = 2 parameters s and a; a is shared by all
points."""


@dataclass(kw_only=True)
class Layer:
    """A layer: fields of a record."""

    rows: int  # number of tape rows
    first: int  # index of its first matrix
    heads: int  # index of the first matrix that maps the r outputs of a variable to its P parameters, otherwise `end`
    end: int  # index after its last matrix
    inputs: int  # tape row of the first input
    seen_from: int  # start, in `variables`, of the variables that its networks see
    seen: int  # number of these
    moved_from: int  # start, in `variables`, of the variables that are mapped
    moved: int  # number of these
    rest_from: int  # start, in `variables`, of the other variables
    rest: int  # number of these
    phi_from: int  # start, in `variables`, of the tape rows of the map's parameters, variable by variable
    sign: int  # direction: 1 for y from x, -1 for x from y
    log_sign: int  # sign of the log-derivatives in the log-determinant
    levels: int  # number of levels above the inputs in the sequential direction, otherwise 0
    matrices: int  # number of matrices per level
    steps_from: int  # start, in `steps`, of the numbers of final units
    block: int  # number of variables per block
    univariate: int  # index of the map in `MAPS`
    outputs: int  # number of parameters per variable, P
    bins: int  # number of bins of a spline
    bound: float  # half the width of a spline's box
    bulk: float  # value from which on the inputs of its networks are compressed


@dataclass(kw_only=True)
class Matrix:
    """A matrix: fields of a record."""

    start: int = 0  # offset in the flat weights and in their gradient
    rows: int
    columns: int = 0
    bias: int  # offset of its level's biases
    source: int  # source of its inputs: `INPUTS`, `UNITS` or `CONTEXT`
    below: int = 0  # tape row of its inputs, relative to the layer
    own: int  # tape row of its outputs, relative to the layer
    rows_from: int = 0  # start of its rows in the lists of `Tables`
    columns_from: int = 0  # start of its columns there
    stride: int = 0  # length of a row in the flat weights
    kind: int = -1  # activation after it, or -1
    slopes: int  # tape row of that activation's derivatives
    below_kind: int = -1  # activation before it, or -1
    below_slopes: int = 0  # tape row of that activation's derivatives
    first: int = 1  # whether it is the first to be added to its level
    fresh: int = 1  # whether it is the first to add to the gradient of its inputs
    natural: int = 0  # whether its columns are in their natural order
    weight: int  # index of its weight among the tensors
    addend: int  # index of its bias among the tensors
    weight_from: int = 0  # offset of its weight in the tensor
    addend_from: int = 0  # offset of its bias in the tensor
    packed: int = 0  # whether the weight holds only visible entries, those of a triangle, row by row
    gain: float = 1.0  # factor of the weight


def _kind_of(record: type) -> np.dtype[Any]:
    """Structured dtype of a record with these fields."""
    kinds = {"int": np.int64, "float": np.float64}
    return np.dtype([(name, kinds[kind]) for name, kind in record.__annotations__.items()])


LAYER, MATRIX = _kind_of(Layer), _kind_of(Matrix)


class Step(NamedTuple):
    """A layer in one direction, as input of a program.

    Attributes:
        networks: Networks that output the map's parameters; none for a permutation.
        univariate: The map of each variable; None for a permutation.
        inverse: Whether the inverse map is applied.
        seen, moved: The variables that the networks see, and those that are mapped, one per group of outputs; for a
            permutation, `moved` is the permutation.
        log_sign: Sign of the layer's log-determinant: -1 if the layer stands for its inverse.
        sequential: Whether the networks see the result rather than the input, so that variables are solved one by one.
    """

    networks: Sequence[nn.Module]
    univariate: UnivariateMap | None
    inverse: bool
    seen: Tensor
    moved: Tensor
    log_sign: int = 1
    sequential: bool = False


class Triangular(NamedTuple):
    """A map y = loc + (diag(exp(log_scale)) + gain below) x in one direction, as input of a program.

    Attributes:
        tensors: loc and log_scale, (D,), and, unless the map is elementwise, `below`: (D, D), or its entries row by
            row, (D (D - 1) / 2,). Or a single tensor that concatenates all three.
    """

    tensors: tuple[Tensor, ...]
    inverse: bool
    gain: float = 1.0
    log_sign: int = 1

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """Networks that output the parameters of the map: none."""
        return ()

    @property
    def sequential(self) -> bool:
        """True if variables are solved one by one."""
        return self.inverse and len(self.tensors) != 2

    def parts(self, tensors: Sequence[Tensor], dim: int) -> Sequence[Tensor]:
        """loc, log_scale and, unless the map is elementwise, `below`, from tensors that replace its own."""
        return tensors if len(tensors) > 1 else tensors[0].split([dim, dim, dim * (dim - 1) // 2])


class Tables(NamedTuple):
    """The arrays that the kernels follow.

    Attributes:
        layers, matrices: Records of `Layer` and `Matrix`.
        variables: Lists of variables and of tape rows, to which the layers refer.
        seen: For each row of each matrix, the number of columns that it sees, ascending.
        heard: For each column, the first row that sees it.
        row_order, column_order: For each row and column, its index in the weight.
        steps: For each sequential layer, the numbers of final units, (levels + 1, D + 1).
        result: The tape row of each variable after the last layer.
    """

    layers: Array
    matrices: Array
    variables: Array
    seen: Array
    heard: Array
    row_order: Array
    column_order: Array
    steps: Array
    result: Array
