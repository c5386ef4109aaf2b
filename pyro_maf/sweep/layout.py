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

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from pyro_maf.nn import ACTIVATIONS, BULK, MADE
from pyro_maf.nn.layers import Linear
from pyro_maf.univariate import Affine, Spline, UnivariateMap

__all__ = ["CONTEXT", "INPUTS", "LANES", "LINEAR", "MAPS", "UNITS"] + [
    "Array",
    "Layer",
    "Layout",
    "Matrix",
    "Step",
    "Tables",
    "Triangular",
    "UnfitError",
    "gain_of",
    "map_of",
]

LANES = 16
"""Tape columns and weight columns are padded to a multiple of this, so that loops over them are vectorised."""
INPUTS, UNITS, CONTEXT = range(3)
"""Sources of the inputs of a matrix."""
Array = np.ndarray[Any, Any]
NOT_BY_VALUE = ("silu", "gelu")
"""Activations whose derivative is stored in its own rows, since the value does not determine it."""
MAPS = (Affine, Spline)
"""Univariate maps that the kernels support."""
LINEAR = len(MAPS)
"""Number of the map of a triangular layer: y = x exp(a) + s, with P = 2 parameters s and a; a is shared by all
points."""


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


class Matrix:
    """A matrix: fields of a record."""

    start: int  # offset in the flat weights and in their gradient
    rows: int
    columns: int
    bias: int  # offset of its level's biases
    source: int  # source of its inputs: `INPUTS`, `UNITS` or `CONTEXT`
    below: int  # tape row of its inputs, relative to the layer
    own: int  # tape row of its outputs, relative to the layer
    rows_from: int  # start of its rows in the lists of `Tables`
    columns_from: int  # start of its columns there
    stride: int  # length of a row in the flat weights
    kind: int  # activation after it, or -1
    slopes: int  # tape row of that activation's derivatives
    below_kind: int  # activation before it, or -1
    below_slopes: int  # tape row of that activation's derivatives
    first: int  # whether it is the first to be added to its level
    fresh: int  # whether it is the first to add to the gradient of its inputs
    natural: int  # whether its columns are in their natural order
    weight: int  # index of its weight among the tensors
    addend: int  # index of its bias among the tensors
    weight_from: int  # offset of its weight in the tensor
    addend_from: int  # offset of its bias in the tensor
    packed: int  # whether the weight holds only visible entries, those of a triangle, row by row
    gain: float  # factor of the weight


def _kind_of(record: type) -> np.dtype[Any]:
    """Structured dtype of a record with these fields."""
    kinds = {"int": np.int64, "float": np.float64}
    return np.dtype([(name, kinds[kind]) for name, kind in record.__annotations__.items()])


LAYER, MATRIX, MAP_FIELDS = _kind_of(Layer), _kind_of(Matrix), ["univariate", "outputs", "bins", "bound"]
DEFAULTS = {"below": 0, "below_slopes": 0, "fresh": 0, "weight_from": 0, "addend_from": 0, "packed": 0, "gain": 1.0}


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


class UnfitError(Exception):
    """Error for a mask that is not a staircase, or for wrong sizes."""


class Layout:
    """The tables of a run under construction."""

    def __init__(self, dim: int, context_dim: int, tensors: Sequence[Tensor]) -> None:
        self.place = np.arange(dim)
        """The row of each variable among the D rows of a layer; permutations change only this."""
        self.context_dim, self.tensors, self.number = context_dim, tensors, 0
        self.weights = self.biases = self.rows = self.columns = 0
        self.layers: list[dict[str, float]] = []
        self.matrices: list[dict[str, float]] = []
        self.variables: list[int] = []
        self.steps = [np.zeros(0, np.int64)]
        self.lists: dict[str, list[Array]] = {"seen": [], "heard": [], "row_order": [], "column_order": []}

    def add(self, step: Step | Triangular) -> None:
        """Append a layer."""
        if isinstance(step, Triangular):
            self._add_triangular(step)
            return
        if not step.networks:
            self.place = self.place[step.moved.numpy()]
            return
        first = len(self.matrices)
        seen, moved = self.place[step.seen.numpy()], self.place[step.moved.numpy()]
        own, phi, heads = len(self.place) + len(seen), [], 0
        for network in step.networks:
            is_made = isinstance(network, MADE)
            order = step.seen.numpy() if is_made else np.arange(len(seen))
            fresh = network is step.networks[-1]
            own, outputs = self._add_network(network, order, len(self.place), own, fresh=fresh)
            if is_made and network.head is not None:
                own, outputs, heads = *self._add_heads(order, network.head, own), len(order)
            phi.append(outputs)
        rows = np.concatenate(phi)
        univariate = map_of(step.univariate)
        if len(rows) != univariate[1] * len(moved):
            raise UnfitError
        rows = rows.reshape(len(moved), -1) if is_made else rows.reshape(-1, len(moved)).T
        levels = len(network.layers) if step.sequential else 0  # type: ignore[arg-type]
        self._add_layer(step, first, own, (seen, moved, rows.ravel()), univariate, BULK, levels, heads)
        if step.sequential:
            self._add_steps(_final(network), self.layers[-1])

    def _add_layer(
        self,
        step: Step | Triangular,
        first: int,
        own: int,
        lists: tuple[Array, Array, Array],
        univariate: tuple[int, int, int, float],
        bulk: float,
        levels: int,
        heads: int = 0,
    ) -> None:
        """Append a layer with `own` rows, whose matrices are the last ones, from `first` on.

        `lists` are the variables that its networks see, those that are mapped, and the tape rows of the map's
        parameters.
        """
        dim, (seen, moved, phi), end = len(self.place), lists, len(self.matrices)
        rest = np.setdiff1d(np.arange(dim), moved)
        layer = {**dict(zip(MAP_FIELDS, univariate, strict=True)), "bulk": bulk}
        layer |= {"rows": own, "first": first, "heads": end - heads, "end": end, "inputs": dim}
        layer |= {"seen": len(seen), "moved": len(moved), "rest": len(rest)}
        layer |= {"sign": -1 if step.inverse else 1, "log_sign": step.log_sign}
        layer |= {"levels": levels, "matrices": (end - heads - first) // levels if levels else 0}
        layer |= {"steps_from": sum(map(len, self.steps)), "block": _block(dim)}
        for name, entries in zip(("seen", "moved", "rest", "phi"), (seen, moved, rest, phi), strict=True):
            layer[f"{name}_from"] = len(self.variables)
            self.variables += entries.tolist()
        self.layers.append(layer)

    def _add_steps(self, final: Array, layer: dict[str, Any]) -> None:
        """Append the numbers of final units of a layer."""
        each = layer["matrices"]
        matrices = range(layer["first"] + each - 1, layer["heads"], each)
        for number, below, own in zip(matrices, final, final[1:], strict=False):
            seen = self.lists["seen"][number][: own[-1]]
            if not np.array_equal(seen, np.repeat(below[1:], np.diff(own))):
                raise UnfitError
        self.steps.append(final.ravel())

    def _add_triangular(self, step: Triangular) -> None:
        """Append a triangular layer: a network of one level with outputs in two parts."""
        dim, first, count = len(self.place), len(self.matrices), len(step.tensors)
        every, triangle = np.arange(dim), dim * (dim - 1) // 2
        seen = every if count != 2 else every[:0]
        packed = count == 1 or (count == 3 and step.tensors[2].dim() == 1)
        shapes = [(dim,), (dim,), (triangle,) if packed else (dim, dim)]
        self._check(self.number, *([(2 * dim + triangle,)] if count == 1 else shapes[:count]))
        places = [(self.number, dim * part) if count == 1 else (self.number + part, 0) for part in range(3)]
        inputs = {"source": INPUTS, "below": dim, "kind": -1, "below_kind": -1, "first": 1, "fresh": 1, "rows": dim}
        outputs = dim + len(seen) + np.arange(2 * dim)
        # The matrix of a level is its last one.
        for (addend, start), own, sees in ((places[1], outputs[dim], False), (places[0], outputs[0], count != 2)):
            weight, weight_from = places[2] if sees else (addend, start)
            entry = {**inputs, "bias": self.biases, "own": own, "slopes": own, "addend": addend, "addend_from": start}
            entry |= {"weight": weight, "weight_from": weight_from, "packed": packed and sees}
            entry |= {"gain": step.gain if sees else 1.0}
            self._add_matrix(entry, every if sees else 0 * every, every, seen if sees else every[:0])
            self.biases += dim
        self.number += count
        lists = self.place[seen], self.place, outputs.reshape(2, dim).T.ravel()
        levels = int(step.sequential)
        self._add_layer(step, first, dim + len(seen) + 2 * dim, lists, (LINEAR, 2, 0, 0.0), math.inf, levels)
        if levels:
            self._add_steps(np.array([[0, *every], np.arange(dim + 1)]), self.layers[-1])

    def _add_network(self, network: Any, order: Array, below: int, own: int, *, fresh: bool) -> tuple[int, Array]:
        """Append a network with the rows of its inputs starting at `below`, and those of its units at `own`.

        Returns the row after its last, and the rows of its outputs.
        """
        contexts = iter(network.context_layers)
        kind, slopes, top, width = -1, 0, len(network.layers) - 1, len(order)
        for index, layer in enumerate(network.layers):
            rows, columns = layer.out_features, layer.in_features
            self._check(self.number, (rows, width), (rows,))
            row_order, column_order = np.arange(rows), np.arange(columns)
            if index == 0:
                column_order = order
            if index == top and isinstance(network, MADE):
                row_order = row_order.reshape(len(order), -1)[order].ravel()
            above = -1 if index == top else list(ACTIVATIONS).index(network.activation)
            own_slopes = own + rows if index < top and network.activation in NOT_BY_VALUE else own
            entry = {"rows": rows, "bias": self.biases, "own": own, "slopes": own_slopes, "addend": self.number + 1}
            context = next(contexts, None)
            if is_seen := context is not None and self.context_dim > 0:
                features = np.arange(self.context_dim)
                self._check(self.number + 2, (rows, self.context_dim))
                self._add_matrix(
                    {**entry, "source": CONTEXT, "kind": -1, "below_kind": -1, "first": 1, "weight": self.number + 2},
                    np.full(rows, len(features)), row_order, features,
                )  # fmt: skip
            source = {"source": UNITS if index else INPUTS, "below": below, "below_kind": kind, "below_slopes": slopes}
            seen, gain = _staircase(layer, row_order, column_order)
            state = {"kind": above, "first": not is_seen, "fresh": bool(index) or fresh, "gain": gain}
            self._add_matrix({**entry, **source, **state, "weight": self.number}, seen, row_order, column_order)
            self.biases += rows
            self.number += 2 + (context is not None)
            below, own, kind, slopes, width = own, own_slopes + rows, above, own_slopes, rows
        return own, np.arange(below, below + rows)

    def _add_heads(self, order: Array, head: Any, own: int) -> tuple[int, Array]:
        """Append the matrices of a `BlockLinear`, in this order of the variables; arguments and results as above."""
        dim, outputs, rank = shape = head.weight.shape
        self._check(self.number, shape, (dim, outputs))
        inputs = {"source": UNITS, "below_kind": -1, "kind": -1, "first": 1, "fresh": 1, "rows": outputs}
        every, columns = np.arange(outputs), np.arange(rank)
        for i, variable in enumerate(order):
            row = own + i * outputs
            entry = {**inputs, "below": own - (dim - i) * rank, "own": row, "slopes": row, "bias": self.biases}
            entry |= {"weight": self.number, "weight_from": variable * outputs * rank}
            entry |= {"addend": self.number + 1, "addend_from": variable * outputs}
            self._add_matrix(entry, np.full(outputs, rank), every, columns)
            self.biases += outputs
        self.number += 2
        return own + dim * outputs, np.arange(own, own + dim * outputs)

    def _check(self, number: int, *shapes: tuple[int, ...]) -> None:
        """Raise unless the tensors from this index on have these shapes, since the kernels read that much of them."""
        if any(self.tensors[number + index].shape != shape for index, shape in enumerate(shapes)):
            raise UnfitError

    def _add_matrix(self, entry: dict[str, Any], seen: Array, row_order: Array, column_order: Array) -> None:
        rows, columns = len(row_order), len(column_order)
        stride = max(1, -(-columns // LANES)) * LANES
        stride += LANES * (stride > 128 and stride // LANES % 2 == 0)  # else rows compete for the same cache lines
        heard = np.searchsorted(seen, np.arange(columns), side="right")
        place = {"start": self.weights, "columns": columns, "stride": stride}
        place |= {"rows_from": self.rows, "columns_from": self.columns}
        natural = bool((column_order == np.arange(columns)).all())
        self.matrices.append({**DEFAULTS, **entry, **place, "natural": natural})
        for name, entries in zip(self.lists, (seen, heard, row_order, column_order), strict=True):
            self.lists[name].append(entries)
        self.weights += rows * stride
        self.rows += rows
        self.columns += columns

    def tables(self) -> Tables:
        """The finished tables."""
        layers, matrices = _records(self.layers, LAYER), _records(self.matrices, MATRIX)
        seen, heard, row_order, column_order = (np.concatenate(each).astype(np.int64) for each in self.lists.values())
        variables = np.array(self.variables, np.int64)
        steps, result = np.concatenate(self.steps).astype(np.int64), self.place.astype(np.int64)
        return Tables(layers, matrices, variables, seen, heard, row_order, column_order, steps, result)


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


def _records(entries: Sequence[dict[str, Any]], kind: np.dtype[Any]) -> Array:
    return np.array([tuple(entry[name] for name in kind.names or ()) for entry in entries], kind)


def map_of(univariate: Any) -> tuple[int, int, int, float]:
    """`MAP_FIELDS` of a univariate map."""
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
