r"""Masked autoregressive flows for Pyro.

MAF, its inverse (IAF) and RealNVP as Pyro transforms with exact log-determinants: guides for variational inference,
learned priors, and density estimators. Every flow maps noise x to data y; densities are in nats.
"""

from pyro_maf import infer
from pyro_maf.distributions import (
    ConditionalFlowPrior,
    ConditionalMADEMoG,
    ConditionalMAFMoG,
    FlowPrior,
    MADEMoG,
    MAFMoG,
)
from pyro_maf.flows import IAF, MAF, ConditionalIAF, ConditionalMAF, ConditionalRealNVP, RealNVP
from pyro_maf.nn import MADE
from pyro_maf.saving import load
from pyro_maf.training import fit

__all__ = [
    "IAF",
    "MADE",
    "MAF",
    "ConditionalFlowPrior",
    "ConditionalIAF",
    "ConditionalMADEMoG",
    "ConditionalMAF",
    "ConditionalMAFMoG",
    "ConditionalRealNVP",
    "FlowPrior",
    "MADEMoG",
    "MAFMoG",
    "RealNVP",
    "fit",
    "infer",
    "load",
]
__version__ = "0.1.0"
