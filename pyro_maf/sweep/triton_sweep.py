"""The sweep on a CUDA device: each walk as one Triton kernel, for the affine map in float32."""

from __future__ import annotations

import functools
import importlib.util
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_maf.nn import ACTIVATIONS, BULK, MADE
from pyro_maf.sweep.plan import Array
from pyro_maf.sweep.reference import Activations, TorchSweep, hidden_widths
from pyro_maf.univariate import Affine, UnivariateMap

__all__ = ["TritonSweep", "takes"]

TILES = ((256, (2, 8, 256)), (4096, (4, 8, 128)), (None, (8, 8, 64)))
"""Maximum number of points, then points per program, units at a time and units below at a time, measured on an H200:
few points are spread over the whole device, many share the weights that a program reads."""
FEW = 2

# Outside the networks, as packs are. A network replaces its list `ready` whenever its order or degrees change.
_tables: weakref.WeakKeyDictionary[MADE, tuple[list[list[int]], torch.device, list[Tensor]]] = (
    weakref.WeakKeyDictionary()
)


def takes(univariate: UnivariateMap, v: Tensor) -> bool:
    """Return whether there are kernels for this univariate map, device and dtype."""
    return type(univariate) is Affine and v.device.type == "cuda" and v.dtype == torch.float32 and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class TritonSweep(TorchSweep):
    """The sweep of one network with the affine map, and its adjoint.

    Args:
        plan: The network.
        direction: One direction of the univariate map.
        made: The network of the plan.
        inverse: Whether v is y and w is x, rather than the reverse.
    """

    made: MADE
    inverse: bool

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor, Activations]:
        """w, log-determinant and the tensors saved for the adjoint, for v (batch, D)."""
        from pyro_maf.sweep import triton_kernel

        plan, points = self.plan, len(v)
        tape, before = v.new_zeros(2, sum(self._widths), points)
        w, log_det = torch.empty_like(v, memory_format=torch.contiguous_format), v.new_empty(points)
        columns = max(bias.shape[1] for bias in plan.biases)
        biases = torch.cat([bias.expand(-1, columns) for bias in plan.biases])
        weights = torch.cat([weight.flatten() for weight in plan.weights])
        kind = list(ACTIVATIONS).index(self.made.activation)
        programs, tiles = _tiles(points)
        if points:
            triton_kernel.walk[programs](
                v.contiguous(), plan.order, weights, biases, *self._tables(v.device), w, log_det, tape, before,
                points, columns, plan.dim, self.inverse, Affine.BOUND, BULK, kind, len(plan.weights), *tiles,
            )  # fmt: skip
        phi = before[-self._widths[-1] :].view(plan.dim, plan.num_parameters, points)
        hidden = before[plan.dim : -self._widths[-1]]
        return w, log_det, Activations(w[:, plan.order].T.contiguous(), phi, hidden)

    def walk_back(
        self, total_w: Tensor, total_phi: Tensor, dw_dphi: Tensor, seen_slope: Tensor, slope: Tensor
    ) -> list[Tensor]:
        """As `TorchSweep.walk_back`."""
        from pyro_maf.sweep import triton_kernel

        plan, points = self.plan, total_w.shape[1]
        delta = total_w.new_zeros(sum(self._widths), points)
        delta[-self._widths[-1] :] = total_phi.view(self._widths[-1], points)
        weights = torch.cat([weight.T.flatten() for weight in plan.weights])
        programs, tiles = _tiles(points)
        if points:
            triton_kernel.walk_back[programs](
                weights, *self._tables(total_w.device), dw_dphi.contiguous(), torch.cat([seen_slope, slope]), delta,
                total_w, points, plan.dim, plan.num_parameters, len(plan.weights), *tiles,
            )  # fmt: skip
        return list(delta.split(self._widths)[1:])

    @property
    def _widths(self) -> list[int]:
        return [self.plan.dim, *hidden_widths(self.plan), self.plan.dim * self.plan.num_parameters]

    def _tables(self, device: torch.device) -> list[Tensor]:
        """`starts`, `levels` and `final` on the device, copied there once for each layout."""
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
    """`starts`, `levels` and `final`, as `triton_kernel` describes them."""
    dim, outputs = made.input_dim, made.outputs_per_input
    widths = [dim, *made.hidden_dims, dim * outputs]
    starts = np.cumsum([0, 0, *(below * own for below, own in zip(widths[:-2], widths[1:-1], strict=True))])
    final = np.zeros((len(widths), dim + 1), np.int64)
    final[0, 1:] = np.arange(dim)
    final[1:-1, 1:] = np.reshape(made.ready, (-1, dim))
    final[-1] = outputs * np.arange(dim + 1)
    return starts, np.cumsum([0, *widths]), final
