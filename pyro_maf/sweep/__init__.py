"""Both directions of an autoregressive layer, and their gradients.

`solve` is the sequential one, as one sweep over the network, and `parallel` the other. `reference` is the sweep in
torch, which runs for any device, dtype and map and defines what is right; `kernel` has both directions compiled by
numba, for CPUs; `unrolled` is plain passes, differentiable to any order.
"""

from pyro_maf.sweep.pack import forget
from pyro_maf.sweep.scalar import Affine, ScalarMap
from pyro_maf.sweep.solve import parallel, solve

__all__ = ["Affine", "ScalarMap", "forget", "parallel", "solve"]
