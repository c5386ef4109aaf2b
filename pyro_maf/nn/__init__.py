"""Masked networks: degrees, masks, MADE and the networks of couplings."""

from pyro_maf.nn.made import (
    ACTIVATIONS,
    BULK,
    MADE,
    MLP,
    MaskedLinear,
    compress_tails,
    default_hidden_dims,
    degrees,
    masks,
)

__all__ = [
    "ACTIVATIONS",
    "BULK",
    "MADE",
    "MLP",
    "MaskedLinear",
    "compress_tails",
    "default_hidden_dims",
    "degrees",
    "masks",
]
