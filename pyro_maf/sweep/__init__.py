"""The sequential direction of an autoregressive layer, as one sweep over its network, and its gradient.

`solve` is the whole interface. `reference` is the sweep in torch, which runs for any device, dtype and activation and
defines what is right; `unrolled` is D plain passes, differentiable to any order.
"""

from pyro_maf.sweep.plan import Plan, ScalarMap
from pyro_maf.sweep.solve import solve

__all__ = ["Plan", "ScalarMap", "solve"]
