"""Invertible layers, one per file, each of which maps noise x to data y."""

from pyro_maf.transforms.act_norm import ActNorm
from pyro_maf.transforms.autoregressive import (
    ConditionalInverseAutoregressive,
    ConditionalMaskedAutoregressive,
    InverseAutoregressive,
    MaskedAutoregressive,
)
from pyro_maf.transforms.base import ConditionalFlow, Conditioned, Flow, Inverse
from pyro_maf.transforms.batch_norm import BatchNorm
from pyro_maf.transforms.coupling import AffineCoupling, ConditionalAffineCoupling
from pyro_maf.transforms.permute import Permute
from pyro_maf.transforms.stack import Stack
from pyro_maf.transforms.triangular import ConditionalLowerTriangularAffine, LowerTriangularAffine

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "BatchNorm",
    "ConditionalAffineCoupling",
    "ConditionalFlow",
    "ConditionalInverseAutoregressive",
    "ConditionalLowerTriangularAffine",
    "ConditionalMaskedAutoregressive",
    "Conditioned",
    "Flow",
    "Inverse",
    "InverseAutoregressive",
    "LowerTriangularAffine",
    "MaskedAutoregressive",
    "Permute",
    "Stack",
]
