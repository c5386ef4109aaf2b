"""The sequential direction by compiled kernels: on the CPU, in float32 or float64, for the affine map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_maf.sweep.loading import kernels, loaded
from pyro_maf.sweep.pack import Pack
from pyro_maf.sweep.plan import LANES, Array
from pyro_maf.sweep.threads import in_parts
from pyro_maf.univariate import Affine, UnivariateMap

__all__ = ["KernelSweep", "evaluate", "takes"]

ROWS, FEWEST, MOST = 128, 2, 8
"""Rows of a panel of a weight's gradient, and the minimum and maximum number of panels: more of them skip more of the
zeros, in slower products."""

FEW_POINTS = 8
"""Smaller batches are computed point by point."""


def takes(univariate: UnivariateMap, v: Tensor) -> bool:
    """Return whether the kernels support this univariate map, device, dtype and machine."""
    return (
        type(univariate) is Affine
        and v.device.type == "cpu"
        and v.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and kernels() is not None
    )


def evaluate(pack: Pack, v: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
    """w and log-determinant for v (batch, D), without gradient: nothing is saved for the adjoint."""
    v = v.detach().contiguous()
    if len(v) < FEW_POINTS:
        w, log_det = torch.empty_like(v), v.new_empty(len(v))
        loaded().sequential.forward_rows(v.numpy(), *pack, _sign(inverse), w.numpy(), log_det.numpy())
        return w, log_det
    nothing = v.new_empty(0, 0)
    return _forward_columns(pack, v, inverse, nothing, nothing)


class Kept(NamedTuple):
    """Tensors saved for the adjoint: activations and their derivatives, (units, batch padded to `LANES`)."""

    tape: Tensor
    slopes: Tensor


@dataclass(frozen=True)
class KernelSweep:
    """The sweep of one network, and its adjoint.

    Args:
        pack: The network.
        inverse: Whether v is y and w is x, rather than the reverse.
    """

    pack: Pack
    inverse: bool

    def forward(self, v: Tensor) -> tuple[Tensor, Tensor, Kept]:
        """w, log-determinant and the tensors saved for the adjoint, for v (batch, D)."""
        tape, slopes = v.new_empty(2, int(self.pack.levels[-1]), -(-len(v) // LANES) * LANES)
        w, log_det = _forward_columns(self.pack, v.contiguous(), self.inverse, tape, slopes)
        return w, log_det, Kept(tape, slopes)

    def adjoint(
        self, v: Tensor, w: Tensor, kept: Kept, grad_w: Tensor, grad_log_det: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Gradients of <grad_w, w> + <grad_log_det, log_det> w.r.t. v, the weights and the pre-activations."""
        tape, slopes = kept
        delta, grad_v = torch.empty_like(tape), torch.empty_like(w)
        given = [tensor.contiguous().numpy() for tensor in (v, w)]
        wanted = [tensor.contiguous().numpy() for tensor in (tape, slopes, grad_w, grad_log_det)]
        # Blocks twice as wide: weights are read down their columns here.
        network, block = self.pack[: Pack._fields.index("biases")], 2 * _block(v.shape[1])
        results = delta.numpy(), grad_v.numpy()

        def run(first: int, end: int) -> None:
            loaded().sequential.backward(*given, *network, *wanted, _sign(self.inverse), block, first, end, *results)

        in_parts(run, len(v), LANES, self.pack.weights.size)
        sizes = np.diff(self.pack.levels).tolist()
        own, below = delta.split_with_sizes(sizes)[1:], tape.split_with_sizes(sizes)[:-1]
        steps = zip(own, below, self.pack.final[1:], self.pack.final, strict=False)
        return grad_v, [_by_weights(*step) for step in steps], [unit[:, : len(v)] for unit in own]


def _forward_columns(pack: Pack, v: Tensor, inverse: bool, tape: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
    """w and log-determinant of contiguous v (batch, D); fills tape and slopes unless they have no rows."""
    w, log_det = torch.empty_like(v), v.new_empty(len(v))
    given, *results = (tensor.numpy() for tensor in (v, tape, slopes, w, log_det))
    sign, block = _sign(inverse), _block(v.shape[1])

    def run(first: int, end: int) -> None:
        loaded().sequential.forward_columns(given, *pack, sign, block, first, end, *results)

    in_parts(run, len(v), LANES, pack.weights.size)
    return w, log_det


def _by_weights(unit: Tensor, seen: Tensor, final: Array, final_below: Array) -> Tensor:
    """unit @ seen.T, in panels of rows; entries that the mask removes are 0 or arbitrary."""
    panels = min(MOST, len(unit) // ROWS)
    if panels < FEWEST:
        return unit @ seen.T
    total = unit.new_zeros(len(unit), len(seen))
    edges = [len(unit) * panel // panels for panel in range(panels + 1)]
    for first, end in zip(edges, edges[1:], strict=False):
        columns = final_below[min(int(np.searchsorted(final, end - 1, side="right")), len(final) - 1)]
        torch.mm(unit[first:end], seen[:columns].T, out=total[first:end, :columns])
    return total


def _sign(inverse: bool) -> int:
    """Direction as the kernels encode it: 1 for y from x, -1 for x from y."""
    return -1 if inverse else 1


def _block(dim: int) -> int:
    """Number of variables in a block, by measurement."""
    if dim > 100:
        return 16
    return 8 if dim > 12 else 4
