"""Builder of the tables of `sweep.layout`, from the layers of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from pyro_maf.nn import ACTIVATIONS, BULK, MADE
from pyro_maf.nn.layers import Linear
from pyro_maf.sweep.layout import (
    CONTEXT,
    INPUTS,
    LANES,
    LAYER,
    LINEAR,
    MAPS,
    MATRIX,
    UNITS,
    Array,
    Layer,
    Matrix,
    Step,
    Tables,
    Triangular,
)
from pyro_maf.univariate import Spline

__all__ = ["TableBuilder", "UnfitError", "gain_of", "map_of"]

NOT_BY_VALUE = ("silu", "gelu")
"""Activations whose derivative is stored in its own rows, since the value does not determine it."""


class UnfitError(Exception):
    """Error for a mask that is not a staircase, or for wrong sizes."""


class _Networks(NamedTuple):
    """Networks of a layer whose matrices are in the tables.

    Attributes:
        first: Index of the first matrix.
        heads: Number of matrices that map the outputs of a variable to its parameters.
        rows: Number of tape rows of the layer.
        phi: Tape rows of the map's parameters, variable by variable.
        levels: Number of levels above the inputs in the sequential direction, otherwise 0.
    """

    first: int
    heads: int
    rows: int
    phi: Array
    levels: int


class _Level(NamedTuple):
    """Units of a network: their first tape row, their number, their activation or -1, and its derivatives' row."""

    row: int
    width: int
    kind: int = -1
    slopes: int = 0


class TableBuilder:
    """Builder of the tables of a run.

    Args:
        dim: D.
        context_dim: Number of context features that the layers see.
        tensors: Weights and biases of the layers, in their order.

    Attributes:
        weights, biases: Numbers of packed weights and of biases so far.
    """

    def __init__(self, dim: int, context_dim: int, tensors: Sequence[Tensor]) -> None:
        self._place = np.arange(dim)
        """The row of each variable among the D rows of a layer; permutations change only this."""
        self.weights = self.biases = 0
        self._context_dim, self._tensors = context_dim, tensors
        self._tensor = self._rows = self._columns = 0  # counts of tensors, and of rows and columns of matrices
        self._layers: list[Layer] = []
        self._matrices: list[Matrix] = []
        self._variables: list[int] = []
        self._steps = [np.zeros(0, np.int64)]
        self._seen, self._heard = list[Array](), list[Array]()
        self._row_order, self._column_order = list[Array](), list[Array]()

    def add(self, step: Step | Triangular) -> None:
        """Append a layer.

        Raises:
            UnfitError: For masks that are not staircases, and for networks whose layers do not fit together.
        """
        if isinstance(step, Triangular):
            self._add_triangular(step)
        elif not step.networks:
            self._place = self._place[step.moved.numpy()]
        elif isinstance(step.networks[0], MADE):
            self._add_autoregressive(step, step.networks[0])
        else:
            self._add_coupling(step)

    def tables(self) -> Tables:
        """The finished tables."""
        lists = self._seen, self._heard, self._row_order, self._column_order, self._steps
        seen, heard, row_order, column_order, steps = (np.concatenate(each).astype(np.int64) for each in lists)
        layers, matrices = _records(self._layers, LAYER), _records(self._matrices, MATRIX)
        variables, result = np.array(self._variables, np.int64), self._place.astype(np.int64)
        return Tables(layers, matrices, variables, seen, heard, row_order, column_order, steps, result)

    def _add_autoregressive(self, step: Step, made: MADE) -> None:
        first, order, dim = len(self._matrices), step.seen.numpy(), len(self._place)
        rows, phi = self._add_network(made, order, dim, 2 * dim)
        if made.head is not None:
            rows, phi = self._add_heads(order, made.head, rows)
        levels = len(made.layers) if step.sequential else 0
        networks = _Networks(first, 0 if made.head is None else dim, rows, phi, levels)
        layer = self._add_layer(step, networks, self._place[order], self._place[step.moved.numpy()])
        if step.sequential:
            self._add_steps(_final(made), layer)

    def _add_coupling(self, step: Step) -> None:
        first, dim, seen = len(self._matrices), len(self._place), self._place[step.seen.numpy()]
        moved, rows, outputs = self._place[step.moved.numpy()], dim + len(seen), []
        for network in step.networks:
            is_last = network is step.networks[-1]
            rows, of_network = self._add_network(network, np.arange(len(seen)), dim, rows, is_last=is_last)
            outputs.append(of_network)
        phi = np.concatenate(outputs)
        if len(phi) % len(moved):
            raise UnfitError
        networks = _Networks(first, 0, rows, phi.reshape(-1, len(moved)).T.ravel(), 0)
        self._add_layer(step, networks, seen, moved)

    def _add_triangular(self, step: Triangular) -> None:
        """Append a triangular layer: a network of one level with outputs in two parts, locations and log-scales."""
        dim, first, is_joined = len(self._place), len(self._matrices), len(step.tensors) == 1
        is_diagonal = len(step.tensors) == 2
        is_packed = is_joined or (not is_diagonal and step.tensors[2].dim() == 1)
        entries = dim * (dim - 1) // 2
        if is_joined:
            self._check((2 * dim + entries,))
            loc, log_scale, below = ((self._tensor, start) for start in (0, dim, 2 * dim))
        else:
            shapes = [(dim,), (dim,), (entries,) if is_packed else (dim, dim)]
            self._check(*shapes[: len(step.tensors)])
            loc, log_scale, below = ((self._tensor + index, 0) for index in range(3))
        every = np.arange(dim)
        seen = every[:0] if is_diagonal else every
        own = dim + len(seen)
        # The matrix of a level is its last one.
        for row, addend, weight in ((own + dim, log_scale, None), (own, loc, None if is_diagonal else below)):
            tensor, offset = weight or addend
            matrix = Matrix(
                rows=dim, bias=self.biases, source=INPUTS, below=dim, own=row, slopes=row, weight=tensor,
                weight_from=offset, addend=addend[0], addend_from=addend[1],
            )  # fmt: skip
            if weight is None:
                self._add_matrix(matrix, np.zeros_like(every), every, every[:0])
            else:
                matrix.packed, matrix.gain = is_packed, step.gain
                self._add_matrix(matrix, every, every, every)
            self.biases += dim
        self._tensor += len(step.tensors)
        phi = (own + np.arange(2 * dim)).reshape(2, dim).T.ravel()
        networks = _Networks(first, 0, own + 2 * dim, phi, int(step.sequential))
        layer = self._add_layer(step, networks, self._place[seen], self._place)
        if step.sequential:
            self._add_steps(np.array([[0, *every], np.arange(dim + 1)]), layer)

    def _add_layer(self, step: Step | Triangular, networks: _Networks, seen: Array, moved: Array) -> Layer:
        """Append a layer with the last matrices, from the variables that its networks see and those it maps."""
        if isinstance(step, Triangular):
            univariate, outputs, bins, bound, bulk = LINEAR, 2, 0, 0.0, math.inf
        else:
            univariate, outputs, bins, bound, bulk = *map_of(step.univariate), BULK
        if len(networks.phi) != outputs * len(moved):
            raise UnfitError
        dim, end = len(self._place), len(self._matrices)
        rest, heads, levels = np.setdiff1d(np.arange(dim), moved), end - networks.heads, networks.levels
        layer = Layer(
            rows=networks.rows, first=networks.first, heads=heads, end=end, inputs=dim,
            seen_from=self._listed(seen), seen=len(seen), moved_from=self._listed(moved), moved=len(moved),
            rest_from=self._listed(rest), rest=len(rest), phi_from=self._listed(networks.phi),
            sign=-1 if step.inverse else 1, log_sign=step.log_sign,
            levels=levels, matrices=(heads - networks.first) // levels if levels else 0,
            steps_from=sum(map(len, self._steps)), block=_block(dim),
            univariate=univariate, outputs=outputs, bins=bins, bound=bound, bulk=bulk,
        )  # fmt: skip
        self._layers.append(layer)
        return layer

    def _add_steps(self, final: Array, layer: Layer) -> None:
        """Append the numbers of final units of a layer."""
        matrices = range(layer.first + layer.matrices - 1, layer.heads, layer.matrices)
        for number, below, own in zip(matrices, final, final[1:], strict=False):
            seen = self._seen[number][: own[-1]]
            if not np.array_equal(seen, np.repeat(below[1:], np.diff(own))):
                raise UnfitError
        self._steps.append(final.ravel())

    def _listed(self, entries: Array) -> int:
        """Append to the list of variables and tape rows; return the start of these entries."""
        start = len(self._variables)
        self._variables += entries.tolist()
        return start

    def _add_network(
        self, network: Any, order: Array, inputs: int, units: int, *, is_last: bool = True
    ) -> tuple[int, Array]:
        """Append a network of inputs in this order, from the first tape rows of its inputs and of its units.

        Returns the row after its last, and the rows of its outputs. The last network is the first to add to the
        gradient of the inputs.
        """
        below, top = _Level(inputs, len(order)), len(network.layers) - 1
        for index, (layer, context) in enumerate(zip_longest(network.layers, network.context_layers)):
            rows = layer.out_features
            row_order, column_order = np.arange(rows), np.arange(layer.in_features) if index else order
            if index == top and isinstance(network, MADE):
                row_order = row_order.reshape(len(order), -1)[order].ravel()
            sees_context = context is not None and self._context_dim > 0
            self._check((rows, below.width), (rows,), *[(rows, self._context_dim)] * sees_context)
            kind = -1 if index == top else list(ACTIVATIONS).index(network.activation)
            has_slopes = index < top and network.activation in NOT_BY_VALUE
            own = _Level(units, rows, kind, units + rows if has_slopes else units)
            if sees_context:
                self._add_context(own, row_order)
            seen, gain = _staircase(layer, row_order, column_order)
            matrix = Matrix(
                rows=rows, bias=self.biases, source=UNITS if index else INPUTS, below=below.row, own=own.row,
                kind=kind, slopes=own.slopes, below_kind=below.kind, below_slopes=below.slopes, first=not sees_context,
                fresh=bool(index) or is_last, weight=self._tensor, addend=self._tensor + 1, gain=gain,
            )  # fmt: skip
            self._add_matrix(matrix, seen, row_order, column_order)
            self.biases += rows
            self._tensor += 2 if context is None else 3
            below, units = own, own.slopes + rows
        return units, np.arange(below.row, below.row + below.width)

    def _add_context(self, own: _Level, row_order: Array) -> None:
        """Append the matrix of the context of a level, whose tensor follows weight and bias."""
        matrix = Matrix(
            rows=own.width, bias=self.biases, source=CONTEXT, own=own.row, slopes=own.slopes, fresh=0,
            weight=self._tensor + 2, addend=self._tensor + 1,
        )  # fmt: skip
        self._add_matrix(matrix, np.full(own.width, self._context_dim), row_order, np.arange(self._context_dim))

    def _add_heads(self, order: Array, head: Any, units: int) -> tuple[int, Array]:
        """Append the matrices of a `BlockLinear`, in this order of the variables; results are as in `_add_network`."""
        dim, outputs, rank = shape = head.weight.shape
        self._check(shape, (dim, outputs))
        for place, variable in enumerate(order):
            own = units + place * outputs
            matrix = Matrix(
                rows=outputs, bias=self.biases, source=UNITS, below=units - (dim - place) * rank, own=own, slopes=own,
                weight=self._tensor, weight_from=variable * outputs * rank,
                addend=self._tensor + 1, addend_from=variable * outputs,
            )  # fmt: skip
            self._add_matrix(matrix, np.full(outputs, rank), np.arange(outputs), np.arange(rank))
            self.biases += outputs
        self._tensor += 2
        return units + dim * outputs, units + np.arange(dim * outputs)

    def _add_matrix(self, matrix: Matrix, seen: Array, row_order: Array, column_order: Array) -> None:
        """Append a matrix, from the columns that each row sees, and the index of each row and column in the weight."""
        columns = np.arange(len(column_order))
        stride = max(1, -(-len(columns) // LANES)) * LANES
        stride += LANES * (stride > 128 and stride // LANES % 2 == 0)  # else rows compete for the same cache lines
        matrix.start, matrix.columns, matrix.stride = self.weights, len(columns), stride
        matrix.rows_from, matrix.columns_from = self._rows, self._columns
        matrix.natural = bool((column_order == columns).all())
        self._matrices.append(matrix)
        self._seen.append(seen)
        self._heard.append(np.searchsorted(seen, columns, side="right"))
        self._row_order.append(row_order)
        self._column_order.append(column_order)
        self.weights += len(row_order) * stride
        self._rows += len(row_order)
        self._columns += len(columns)

    def _check(self, *shapes: tuple[int, ...]) -> None:
        """Raise unless the next tensors have these shapes, since the kernels read that much of them."""
        if any(self._tensors[self._tensor + index].shape != shape for index, shape in enumerate(shapes)):
            raise UnfitError


def _final(made: Any) -> Array:
    """The number of units of each level of a network that are final at each step."""
    dim = made.input_dim
    if len(made.ready) != len(made.layers) - 1:
        raise UnfitError
    outputs = made.rank * np.arange(dim + 1)
    final = np.array([np.arange(-1, dim), *([0, *ready] for ready in made.ready), outputs])
    final[0, 0] = 0
    return final


def _block(dim: int) -> int:
    """Number of variables in a block of a sequential layer, chosen by measurement."""
    if dim > 100:
        return 16
    return 8 if dim > 12 else 4


def _records(entries: Sequence[Layer | Matrix], kind: np.dtype[Any]) -> Array:
    return np.array([tuple(getattr(entry, name) for name in kind.names or ()) for entry in entries], kind)


def map_of(univariate: Any) -> tuple[int, int, int, float]:
    """Index in `MAPS`, number of parameters, bins and bound of a univariate map."""
    bins, bound = (univariate.num_bins, univariate.bound) if type(univariate) is Spline else (0, 0.0)
    return MAPS.index(type(univariate)), univariate.num_parameters, bins, bound


def gain_of(layer: Any) -> float:
    """The factor of the weight of a layer without a mask."""
    return layer.gain if isinstance(layer, Linear) else 1.0


def _staircase(layer: Any, row_order: Array, column_order: Array) -> tuple[Array, float]:
    """The number of columns that each row of a layer's weight sees, and the factor of the weight."""
    shape = len(row_order), len(column_order)
    if (mask := layer._buffers.get("mask")) is None:
        return np.full(shape[0], shape[1]), gain_of(layer)
    entries = mask.numpy()[row_order][:, column_order]
    gain = float(entries.max(initial=0.0)) or 1.0
    seen = (entries != 0).sum(1)
    if not np.array_equal(entries, gain * (np.arange(shape[1]) < seen[:, None])) or (np.diff(seen) < 0).any():
        raise UnfitError
    return seen, gain
