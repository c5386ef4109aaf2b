"""Both directions of autoregressive and coupling layers, and their gradients.

`run` uses the engine compiled for CPUs, and applies a run of layers, each in either direction, in one operation. A
`Descent` trains them without torch. The other functions compute a single autoregressive layer in torch, for any device,
dtype and univariate map, and define correctness: `solve` its sequential direction, in one sweep over the network, by
Triton on a GPU; and `parallel` the other.
"""

from pyro_maf.sweep.descent import Descent
from pyro_maf.sweep.function import Run, run
from pyro_maf.sweep.layout import Step, Triangular
from pyro_maf.sweep.program import Programs
from pyro_maf.sweep.threads import OneThread
from pyro_maf.sweep.torch_engine.layers import parallel, solve
from pyro_maf.sweep.torch_engine.sweep import plan_of, walk

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
