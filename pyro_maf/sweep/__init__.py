"""Both directions of autoregressive and coupling layers, and their gradients.

`run` is the engine compiled for CPUs: layers in either direction, as many as follow one another, in one operation. A
`Descent` fits them without torch.
The others compute one autoregressive layer in torch, for any device, dtype and univariate map, which defines
correctness: `solve` its sequential direction, one sweep over the network, by Triton on a GPU; and `parallel`
the other.
"""

from pyro_maf.sweep.descent import Descent
from pyro_maf.sweep.function import Run, run
from pyro_maf.sweep.layout import Step, Triangular
from pyro_maf.sweep.program import Programs
from pyro_maf.sweep.threads import OneThread
from pyro_maf.sweep.torch_engine.layers import parallel, plan_of, solve, walk

__all__ = [
    "Descent",
    "OneThread",
    "Programs",
    "Run",
    "Step",
    "Triangular",
    "parallel",
    "plan_of",
    "run",
    "solve",
    "walk",
]
