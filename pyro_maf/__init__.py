r"""Masked autoregressive flows for Pyro.

MAF, its inverse (IAF) and RealNVP as Pyro transforms with exact log-determinants: guides for variational inference,
learned priors, and density estimators. Every flow maps noise x to data y; densities are in nats.
"""

from pyro_maf.flows import IAF, MAF, ConditionalIAF, ConditionalMAF, ConditionalRealNVP, RealNVP
from pyro_maf.nn import MADE
from pyro_maf.saving import load

__all__ = [
    "IAF",
    "MADE",
    "MAF",
    "ConditionalIAF",
    "ConditionalMAF",
    "ConditionalRealNVP",
    "RealNVP",
    "load",
]
__version__ = "0.1.0"
