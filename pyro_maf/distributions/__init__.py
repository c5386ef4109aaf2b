"""Densities built from flows and masked networks: Pyro distributions that are torch modules too."""

from pyro_maf.distributions.angle_flow import AngleFlow
from pyro_maf.distributions.categorical import AutoregressiveCategorical
from pyro_maf.distributions.density import ConditionalDensity, ConditionalDensityForm, ConditionedDensity, Density
from pyro_maf.distributions.flow_prior import ConditionalFlowPrior, FlowPrior
from pyro_maf.distributions.made_mog import ConditionalMADEMoG, MADEMoG
from pyro_maf.distributions.maf_mog import ConditionalMAFMoG, MAFMoG
from pyro_maf.distributions.mixture_flow import ConditionalMixtureFlow, MixtureFlow
from pyro_maf.distributions.table_density import ConditionalTableDensity, TableDensity

__all__ = [
    "AngleFlow",
    "AutoregressiveCategorical",
    "ConditionalDensity",
    "ConditionalDensityForm",
    "ConditionalFlowPrior",
    "ConditionalMADEMoG",
    "ConditionalMAFMoG",
    "ConditionalMixtureFlow",
    "ConditionalTableDensity",
    "ConditionedDensity",
    "Density",
    "FlowPrior",
    "MADEMoG",
    "MAFMoG",
    "MixtureFlow",
    "TableDensity",
]
