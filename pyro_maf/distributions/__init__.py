"""Densities built from flows and masked networks: Pyro distributions that are torch modules too."""

from pyro_maf.distributions.density import ConditionalDensity, ConditionalDensityForm, ConditionedDensity, Density
from pyro_maf.distributions.flow_prior import ConditionalFlowPrior, FlowPrior
from pyro_maf.distributions.made_mog import ConditionalMADEMoG, MADEMoG
from pyro_maf.distributions.maf_mog import ConditionalMAFMoG, MAFMoG

__all__ = [
    "ConditionalDensity",
    "ConditionalDensityForm",
    "ConditionalFlowPrior",
    "ConditionalMADEMoG",
    "ConditionalMAFMoG",
    "ConditionedDensity",
    "Density",
    "FlowPrior",
    "MADEMoG",
    "MAFMoG",
]
