"""Both directions of autoregressive and coupling layers, and their gradients.

`run` is the engine compiled for CPUs: layers in their parallel directions, as many as follow one another, in one
operation. `solve` is the sequential direction of one autoregressive layer, one sweep over its network: compiled for
CPUs in `sequential_kernel`, for GPUs in `triton_kernel`, and in torch, for any device, dtype and univariate map, in
`reference`, which defines correctness. `parallel` is the other direction in torch.
"""

from torch import nn

from pyro_maf.sweep import pack, program
from pyro_maf.sweep.function import run
from pyro_maf.sweep.plan import plan_of
from pyro_maf.sweep.program import Step
from pyro_maf.sweep.reference import walk
from pyro_maf.sweep.solve import parallel, solve

__all__ = ["Step", "forget", "parallel", "plan_of", "run", "solve", "walk"]


def forget(module: nn.Module) -> None:
    """Drop the packed weights of a flow or a network; they are packed again at the next call."""
    pack.forget(module)
    program.forget(module)
