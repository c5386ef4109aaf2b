"""Both directions of autoregressive and coupling layers, and their gradients.

`run` is the engine compiled for CPUs: layers in either direction, as many as follow one another, in one operation.
The others compute one autoregressive layer in torch, for any device, dtype and univariate map, which defines
correctness: `solve` its sequential direction, one sweep over the network, by `triton_kernel` on a GPU; and `parallel`
the other.
"""

from pyro_maf.sweep.function import Run, run
from pyro_maf.sweep.layout import Step
from pyro_maf.sweep.plan import plan_of
from pyro_maf.sweep.program import forget
from pyro_maf.sweep.reference import walk
from pyro_maf.sweep.solve import parallel, solve

__all__ = ["Run", "Step", "forget", "parallel", "plan_of", "run", "solve", "walk"]
