"""The sequential direction of an autoregressive layer, as one sweep over its network, and its gradient.

`solve` is the whole interface. `reference` is the sweep in torch, which runs for any device, dtype and map and defines
what is right; `kernel` is the same compiled by numba, for CPUs; `unrolled` is D plain passes, differentiable to any
order.
"""

from pyro_maf.sweep.pack import forget
from pyro_maf.sweep.scalar import Affine, ScalarMap
from pyro_maf.sweep.solve import solve

__all__ = ["Affine", "ScalarMap", "forget", "solve"]
