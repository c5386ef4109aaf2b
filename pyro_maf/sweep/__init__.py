"""Both directions of an autoregressive layer, and their gradients.

`solve` is the sequential direction, one sweep over the network; `parallel` is the other. `reference`, the sweep in
torch, runs on any device, for any dtype and univariate map, and defines correctness; `kernel` has both directions
compiled by numba, for CPUs; `unrolled` runs plain passes, differentiable to any order.
"""

from pyro_maf.sweep.pack import forget
from pyro_maf.sweep.plan import plan_of
from pyro_maf.sweep.reference import walk
from pyro_maf.sweep.solve import parallel, solve
from pyro_maf.univariate import Affine, UnivariateMap

__all__ = ["Affine", "UnivariateMap", "forget", "parallel", "plan_of", "solve", "walk"]
