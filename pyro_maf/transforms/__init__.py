"""Invertible layers, one per file, each of which maps noise x to data y."""

from pyro_maf.transforms.autoregressive import (
    ConditionalInverseAutoregressive,
    ConditionalMaskedAutoregressive,
    InverseAutoregressive,
    MaskedAutoregressive,
)
from pyro_maf.transforms.base import Flow, Inverse
from pyro_maf.transforms.conditional import ConditionalFlow, ConditionalForm, Conditioned
from pyro_maf.transforms.coupling import ConditionalCoupling, Coupling
from pyro_maf.transforms.normalization import ActNorm, BatchNorm
from pyro_maf.transforms.permute import Permute
from pyro_maf.transforms.stack import Stack
from pyro_maf.transforms.tails import Tails
from pyro_maf.transforms.triangular import ConditionalLowerTriangularAffine, LowerTriangularAffine

__all__ = [
    "ActNorm",
    "BatchNorm",
    "ConditionalCoupling",
    "ConditionalFlow",
    "ConditionalForm",
    "ConditionalInverseAutoregressive",
    "ConditionalLowerTriangularAffine",
    "ConditionalMaskedAutoregressive",
    "Conditioned",
    "Coupling",
    "Flow",
    "Inverse",
    "InverseAutoregressive",
    "LowerTriangularAffine",
    "MaskedAutoregressive",
    "Permute",
    "Stack",
    "Tails",
]
