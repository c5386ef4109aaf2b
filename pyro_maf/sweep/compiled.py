"""The sweep by compiled kernels, where they can be had: on the CPU, in float32 or float64, for the affine map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_maf.nn import MADE
from pyro_maf.sweep.loading import kernels
from pyro_maf.sweep.pack import LANES, Pack, flat, pack_of
from pyro_maf.sweep.plan import Plan, biases_of
from pyro_maf.sweep.scalar import Affine, ScalarMap
from pyro_maf.sweep.threads import in_parts

__all__ = ["KernelSweep", "evaluate", "takes"]

FEW_POINTS = 8
"""Below this many points they are swept one after another."""


def takes(scalar: ScalarMap, v: Tensor) -> bool:
    """Whether the kernels know the map, and run on this device, in this precision and on this machine."""
    return (
        type(scalar) is Affine
        and v.device.type == "cpu"
        and v.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and kernels() is not None
    )


def evaluate(made: MADE, v: Tensor, context: Tensor | None, sign: int) -> tuple[Tensor, Tensor]:
    """w and log-determinant of points v (batch, D), without gradient and keeping nothing.

    `sign` is 1 for y of x, -1 for x of y.
    """
    pack = pack_of(made)
    if context is not None:
        pack = pack._replace(biases=flat(biases_of(made, context)))
    v = v.detach().contiguous()
    w, log_det = torch.empty_like(v), v.new_empty(len(v))
    given, found, logs = v.numpy(), w.numpy(), log_det.numpy()
    if len(v) < FEW_POINTS:
        kernels().sweep_rows(given, *pack, sign, Affine.BOUND, found, logs)
        return w, log_det
    nothing = np.empty((0, 0), given.dtype)
    block = _block(made.input_dim)

    def run(first: int, end: int) -> None:
        kernels().sweep_columns(given, *pack, sign, Affine.BOUND, block, first, end, nothing, nothing, found, logs)

    in_parts(run, len(v), LANES, pack.weights.size)
    return w, log_det


class Kept(NamedTuple):
    """What the adjoint needs: each unit's activation and derivative, (units, batch and idle points)."""

    tape: Tensor
    slopes: Tensor


@dataclass(frozen=True)
class KernelSweep:
    """The sweep of one pack, and its adjoint.

    Args:
        pack: The network.
        sign: 1 for y of x, -1 for x of y.
    """

    pack: Pack
    sign: int

    def sweep(self, plan: Plan, v: Tensor) -> tuple[Tensor, Tensor, Kept]:
        """w, log-determinant and what the adjoint needs, for v (batch, D)."""
        v, pack = v.contiguous(), self.pack
        w, log_det = torch.empty_like(v), v.new_empty(len(v))
        tape, slopes = v.new_empty(2, int(pack.levels[-1]), -(-len(v) // LANES) * LANES)
        arrays = [tensor.numpy() for tensor in (tape, slopes, w, log_det)]
        given, block = v.numpy(), _block(plan.dim)

        def run(first: int, end: int) -> None:
            kernels().sweep_columns(given, *pack, self.sign, Affine.BOUND, block, first, end, *arrays)

        in_parts(run, len(v), LANES, pack.weights.size)
        return w, log_det, Kept(tape, slopes)

    def adjoint(
        self, plan: Plan, v: Tensor, w: Tensor, kept: Kept, grad_w: Tensor, grad_log_det: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Derivatives of <grad_w, w> + <grad_log_det, log_det> by v, the plan's weights and its biases."""
        tape, slopes = kept
        delta, grad_v = torch.empty_like(tape), torch.empty_like(w)
        given = [tensor.contiguous().numpy() for tensor in (v, w)]
        wanted = [tensor.contiguous().numpy() for tensor in (slopes, grad_w, grad_log_det)]
        network, block = self.pack[: Pack._fields.index("kind")], _block(plan.dim)

        def run(first: int, end: int) -> None:
            kernels().reverse(*given, *network, *wanted, self.sign, block, first, end, delta.numpy(), grad_v.numpy())

        in_parts(run, len(v), LANES, self.pack.weights.size)
        sizes = np.diff(self.pack.levels).tolist()
        own, below = delta.split(sizes)[1:], tape.split(sizes)[:-1]
        grad_weights = [unit @ seen.T for unit, seen in zip(own, below, strict=True)]
        grad_biases = [unit[:, : len(v)].sum_to_size(bias.shape) for unit, bias in zip(own, plan.biases, strict=True)]
        return grad_v, grad_weights, grad_biases


def _block(dim: int) -> int:
    """Variables in a block, by measurement."""
    return 4 if dim <= 12 else 8 if dim <= 100 else 32
