"""Masked networks: degrees, masks, MADE and the networks of couplings."""

from pyro_maf.nn.layers import MaskedLinear, degrees, masks
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
