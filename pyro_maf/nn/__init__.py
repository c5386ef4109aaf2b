"""Masked networks: degrees, masks, MADE and the networks of couplings."""

from pyro_maf.nn.made import (
    ACTIVATIONS,
    BULK,
    MADE,
    MLP,
    MADEOptions,
    NetworkOptions,
    compress_tails,
    default_hidden_dims,
    reseeded,
)
from pyro_maf.nn.masks import MaskedLinear, degrees, masks

__all__ = [
    "ACTIVATIONS",
    "BULK",
    "MADE",
    "MLP",
    "MADEOptions",
    "MaskedLinear",
    "NetworkOptions",
    "compress_tails",
    "default_hidden_dims",
    "degrees",
    "masks",
    "reseeded",
]
