r"""The sweep on a CUDA device, for the affine map in float32: each walk is one launch of a Triton kernel, for any D.

A program owns a few points and walks over the variables, so no two programs wait for each other. Each step reads the
results of the previous one from global memory, where a barrier makes them visible to the whole program.

The tables are int32. `levels[l]` is the row where the units of level l start in a tape, (units, points), from the
inputs up to the outputs; `starts[l]` is the offset of its weights in the flat buffer; `final[l, i + 1]` is the number
of its units that are final once the first i variables are determined, and `final[l, 0]` is 0.

Constants of a launch: `tile`, points per program; `rows`, units at a time, and `few`, the same if there are no more
than the outputs of one variable; `block`, units below at a time. All are powers of two.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from pyro_maf.nn import ACTIVATIONS, BULK, MADE
from pyro_maf.sweep.layout import Array
from pyro_maf.sweep.torch_engine.sweep import Activations, TorchSweep
from pyro_maf.univariate import Affine

__all__ = ["TritonSweep", "walk", "walk_back"]

TILES = ((256, (2, 8, 256)), (4096, (4, 8, 128)), (None, (8, 8, 64)))
"""Maximum number of points, then points per program, units at a time and units below at a time, measured on an H200:
few points are spread over the whole device, many share the weights that a program reads."""
FEW = 2

# Stored outside the networks, as packs are. A network replaces its list `ready` whenever its order or degrees change.
_tables: weakref.WeakKeyDictionary[MADE, tuple[list[list[int]], torch.device, list[Tensor]]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class TritonSweep(TorchSweep):
    """The sweep of one network, `made`, with the affine map, and its adjoint; with `inverse`, v is y and w is x."""

    made: MADE
    inverse: bool

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor, Activations]:
        """w, log-determinant and the tensors saved for the adjoint, for v (batch, D)."""
        plan, points = self.plan, len(v)
        tape, before = v.new_zeros(2, sum(self._widths), points)
        w, log_det = torch.empty_like(v, memory_format=torch.contiguous_format), v.new_empty(points)
        columns = max(bias.shape[1] for bias in plan.biases)
        biases = torch.cat([bias.expand(-1, columns) for bias in plan.biases])
        weights = torch.cat([weight.flatten() for weight in plan.weights])
        kind = list(ACTIVATIONS).index(self.made.activation)
        programs, tiles = _tiles(points)
        if points:
            walk[programs](
                v.contiguous(), plan.order, weights, biases, *self._tables(v.device), w, log_det, tape, before,
                points, columns, plan.dim, self.inverse, Affine.BOUND, BULK, kind, len(plan.weights), *tiles,
            )  # fmt: skip
        phi = before[-self._widths[-1] :].view(plan.dim, plan.num_outputs, points)
        hidden = before[plan.dim : -self._widths[-1]]
        return w, log_det, Activations(w[:, plan.order].T.contiguous(), phi, hidden)

    def walk_back(
        self, total_w: Tensor, total_phi: Tensor, dw_dphi: Tensor, seen_slope: Tensor, slope: Tensor
    ) -> list[Tensor]:
        """As `TorchSweep.walk_back`."""
        plan, points = self.plan, total_w.shape[1]
        delta = total_w.new_zeros(sum(self._widths), points)
        delta[-self._widths[-1] :] = total_phi.view(self._widths[-1], points)
        weights = torch.cat([weight.T.flatten() for weight in plan.weights])
        programs, tiles = _tiles(points)
        if points:
            walk_back[programs](
                weights, *self._tables(total_w.device), dw_dphi.contiguous(), torch.cat([seen_slope, slope]), delta,
                total_w, points, plan.dim, plan.num_outputs, len(plan.weights), *tiles,
            )  # fmt: skip
        return list(delta.split(self._widths)[1:])

    @property
    def _widths(self) -> list[int]:
        return [self.plan.dim, *self.plan.hidden_widths, self.plan.dim * self.plan.num_outputs]

    def _tables(self, device: torch.device) -> list[Tensor]:
        """`starts`, `levels` and `final` on the device, copied there once per layout."""
        entry = _tables.get(self.made)
        if entry is None or entry[0] is not self.made.ready or entry[1] != device:
            tables = [torch.as_tensor(table.astype("int32"), device=device) for table in _layout(self.made)]
            entry = _tables[self.made] = self.made.ready, device, tables
        return entry[2]


def _tiles(points: int) -> tuple[tuple[int], tuple[int, int, int, int]]:
    """The number of programs, and `tile`, `rows`, `few` and `block` of the kernels."""
    tile, rows, block = next(sizes for most, sizes in TILES if most is None or points <= most)
    return (-(-points // tile),), (tile, rows, FEW, block)


def _layout(made: MADE) -> tuple[Array, Array, Array]:
    """`starts`, `levels` and `final`, as described above."""
    dim, outputs = made.input_dim, made.outputs_per_input
    widths = [dim, *made.hidden_dims, dim * outputs]
    starts = np.cumsum([0, 0, *(below * own for below, own in zip(widths[:-2], widths[1:-1], strict=True))])
    final = np.zeros((len(widths), dim + 1), np.int64)
    final[0, 1:] = np.arange(dim)
    final[1:-1, 1:] = np.reshape(made.ready, (-1, dim))
    final[-1] = outputs * np.arange(dim + 1)
    return starts, np.cumsum([0, *widths]), final


# -- the kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _expm1(x):
    # Kahan's method: the rounding of exp(x) cancels, and every digit is right near 0.
    e = tl.exp(x)
    plain = (e == 1) | (e == 0)
    return tl.where(plain, tl.where(e == 1, x, -1.0), (e - 1) * x / tl.log(tl.where(plain, 2.0, e)))


@triton.jit
def _log1p(x):
    # Kahan's method, for x >= 0.
    u = 1 + x
    plain = (u == 1) | (u == float("inf"))
    return tl.where(plain, x, tl.log(u) * (x / tl.where(plain, 1.0, u - 1)))


@triton.jit
def _tanh(x):
    e = _expm1(-2 * tl.abs(x))
    size = -e / (2 + e)
    return tl.where(x < 0, -size, size)


@triton.jit
def _activate(x, kind: tl.constexpr):
    # `kind` is the index of the activation in `nn.ACTIVATIONS`.
    if kind == 0:
        return tl.where(x < 0, 0.0, x)
    if kind == 1:
        return _tanh(x)
    if kind == 2:
        return tl.where(x > 0, x, _expm1(tl.where(x > 0, 0.0, x)))
    if kind == 3:
        return x / (1 + tl.exp(-x))
    if kind == 4:
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    if kind == 5:
        return tl.where(x > 0, x, 0.01 * x)
    if kind == 6:
        return tl.where(x > 20, x, tl.where(x > 0, x, 0.0) + _log1p(tl.exp(-tl.abs(x))))
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _compress(x, bulk: tl.constexpr):
    # `nn.compress_tails`.
    beyond = tl.abs(x) - bulk
    tail = bulk + _log1p(tl.where(beyond > 0, beyond, 0.0))
    return tl.where(beyond > 0, tl.where(x < 0, -tail, tail), x)


@triton.jit
def _product(
    weights, width, row, inside, tape, below, first, last, point, stride, points,
    rows: tl.constexpr, tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    # weights[row, first:last] @ tape[below + first : below + last, point], (rows, tile); 0 outside. The terms are
    # summed once at the end: a reduction across threads costs more than the products.
    total = tl.zeros((rows, block, tile), dtype=tl.float32)
    for start in range(first, last, block):
        column = start + tl.arange(0, block)
        seen = column < last
        weight = tl.load(
            weights + row[:, None] * width + column[None, :], mask=inside[:, None] & seen[None, :], other=0.0
        )
        place = (below + column)[:, None] * stride[None, :] + point[None, :]
        value = tl.load(tape + place, mask=seen[:, None] & (point < points)[None, :], other=0.0)
        total += weight[:, :, None] * value[None, :, :]
    return tl.sum(total, 1)


@triton.jit
def _complete(
    weights, own, row, inside, tape, below, seen, biases, before, point, points, bias_stride, dim,
    rows: tl.constexpr, tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    # Pre-activations, (rows, tile), of rows of the level that starts at `own`; they are stored in `before`.
    stride = tl.zeros((tile,), dtype=tl.int64) + points
    here = point < points
    value = _product(
        weights, own - below, row, inside, tape, below, 0, seen, point, stride, points, rows, tile, block
    )  # fmt: skip
    bias_point = tl.where(here, point, 0) % bias_stride
    bias_place = (own - dim + row)[:, None] * bias_stride + bias_point[None, :]
    value += tl.load(biases + bias_place, mask=inside[:, None], other=0.0)
    place = (own + row)[:, None] * stride[None, :] + point[None, :]
    tl.store(before + place, value, mask=inside[:, None] & here[None, :])
    return value


@triton.jit
def _affine(x, shift, alpha, inverse: tl.constexpr):
    # y from x, or x from y, for the bounded log-scale alpha.
    half = tl.exp(0.5 * alpha)
    if inverse:
        return (x / half - shift) / half
    return (x * half + shift) * half


@triton.jit
def walk(
    v, order, weights, biases, starts, levels, final, w, log_det, tape, before, points, bias_stride, dim,
    inverse: tl.constexpr, bound: tl.constexpr, bulk: tl.constexpr, kind: tl.constexpr, top: tl.constexpr,
    tile: tl.constexpr, rows: tl.constexpr, few: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """w and log-determinant of v, (points, dim), for the affine map.

    Fills `tape`, (units, points), with the compressed w and the activations, and `before` with pre-activations and
    outputs. `biases` are (units, 1), with `bias_stride` 1, or (units, points). `top` is the level of the outputs.
    """
    point = (tl.program_id(0) * tile + tl.arange(0, tile)).to(tl.int64)
    stride = tl.zeros((tile,), dtype=tl.int64) + points
    here = point < points
    total_alpha = tl.zeros((tile,), dtype=tl.float32)
    for i in range(dim):
        for level in tl.static_range(1, top):
            first = tl.load(final + level * (dim + 1) + i)
            last = tl.load(final + level * (dim + 1) + i + 1)
            seen = tl.load(final + (level - 1) * (dim + 1) + i + 1)
            below = tl.load(levels + level - 1)
            own = tl.load(levels + level)
            start = tl.load(starts + level)
            for row_start in range(first, last, rows):
                row = row_start + tl.arange(0, rows)
                value = _complete(
                    weights + start, own, row, row < last, tape, below, seen, biases, before, point, points,
                    bias_stride, dim, rows, tile, block,
                )  # fmt: skip
                place = (own + row)[:, None] * stride[None, :] + point[None, :]
                tl.store(tape + place, _activate(value, kind), mask=(row < last)[:, None] & here[None, :])
            tl.debug_barrier()
        output = 2 * i + tl.arange(0, few)
        phi = _complete(
            weights + tl.load(starts + top), tl.load(levels + top), output, output < 2 * i + 2, tape,
            tl.load(levels + top - 1), tl.load(final + (top - 1) * (dim + 1) + i + 1), biases, before, point, points,
            bias_stride, dim, few, tile, block,
        )  # fmt: skip
        shift = tl.sum(tl.where((output == 2 * i)[:, None], phi, 0.0), 0)
        scale = tl.sum(tl.where((output == 2 * i + 1)[:, None], phi, 0.0), 0)
        variable = tl.load(order + i)
        entry = tl.load(v + point * dim + variable, mask=here, other=0.0)
        alpha = bound * _tanh(scale / bound)
        entry = _affine(entry, shift, alpha, inverse)
        total_alpha += alpha
        tl.store(w + point * dim + variable, entry, mask=here)
        tl.store(tape + i * stride + point, _compress(entry, bulk), mask=here)
        tl.debug_barrier()
    tl.store(log_det + point, total_alpha, mask=here)


@triton.jit
def _complete_back(
    level, i, weights, starts, levels, final, slopes, delta, point, stride, points, dim,
    rows: tl.constexpr, tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    # The adjoint of `_complete` for the units of a level that step i completes.
    here = point < points
    own = tl.load(levels + level)
    above = tl.load(levels + level + 1)
    width = tl.load(levels + level + 2) - above
    first = tl.load(final + level * (dim + 1) + i)
    last = tl.load(final + level * (dim + 1) + i + 1)
    seen_from = tl.load(final + (level + 1) * (dim + 1) + i)
    seen_to = tl.load(final + (level + 1) * (dim + 1) + dim)
    start = tl.load(starts + level + 1)
    for row_start in range(first, last, rows):
        row = row_start + tl.arange(0, rows)
        inside = row < last
        value = _product(
            weights + start, width, row, inside, delta, above, seen_from, seen_to, point, stride, points,
            rows, tile, block,
        )  # fmt: skip
        place = (own + row)[:, None] * stride[None, :] + point[None, :]
        slope = tl.load(slopes + place, mask=inside[:, None] & here[None, :], other=0.0)
        tl.store(delta + place, value * slope, mask=inside[:, None] & here[None, :])


@triton.jit
def walk_back(
    weights, starts, levels, final, dw_dphi, slopes, delta, total_w, points, dim,
    outputs_per_input: tl.constexpr, top: tl.constexpr,
    tile: tl.constexpr, rows: tl.constexpr, few: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The adjoint of `walk`: fills `delta`, (units, points), and completes `total_w`, (dim, points).

    `weights` are transposed, (units in, units out) per level; `slopes` are dw/dseen and the derivatives of the
    activations, (units, points); `delta` initially holds the log-determinant's gradient w.r.t. the outputs.
    """
    point = (tl.program_id(0) * tile + tl.arange(0, tile)).to(tl.int64)
    stride = tl.zeros((tile,), dtype=tl.int64) + points
    here = point < points
    outputs = tl.load(levels + top)
    for back in range(dim):
        i = dim - 1 - back
        total = tl.load(total_w + i * stride + point, mask=here, other=0.0)
        for parameter in tl.static_range(outputs_per_input):
            output = (i * outputs_per_input + parameter) * stride + point
            of_output = delta + outputs * stride + output
            gain = tl.load(dw_dphi + output, mask=here, other=0.0)
            tl.store(of_output, tl.load(of_output, mask=here, other=0.0) + gain * total, mask=here)
        tl.debug_barrier()
        for down in tl.static_range(1, top):
            _complete_back(
                top - down, i, weights, starts, levels, final, slopes, delta, point, stride, points, dim,
                rows, tile, block,
            )  # fmt: skip
            tl.debug_barrier()
        if i > 0:
            first_hidden = tl.load(levels + 1)
            first_width = tl.load(levels + 2) - first_hidden
            variable = i - 1 + tl.arange(0, few)
            from_hidden = _product(
                weights + tl.load(starts + 1), first_width, variable, variable < i, delta, first_hidden,
                tl.load(final + dim + 1 + i), tl.load(final + dim + 1 + dim), point, stride, points, few, tile, block,
            )  # fmt: skip
            of_w = (i - 1) * stride + point
            moved = tl.sum(from_hidden, 0) * tl.load(slopes + of_w, mask=here, other=0.0)
            tl.store(total_w + of_w, tl.load(total_w + of_w, mask=here, other=0.0) + moved, mask=here)
        tl.debug_barrier()
