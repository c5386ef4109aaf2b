"""Conversions for peers whose masked layers support only the natural order, with permutations between layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from parts.architecture import Linear, linears, rearranged
from pyro_maf.transforms import Flow, InverseAutoregressive, MaskedAutoregressive


def in_natural_order(layer: MaskedAutoregressive | InverseAutoregressive, scale_first: bool = True) -> list[Linear]:
    """The layer's network for variables permuted into the layer's order, and outputs in pairs of scale and shift."""
    order = layer.order
    pairs = torch.arange(2 * len(order)).view(-1, 2)[order]
    return rearranged(linears(layer.made), inputs=order, outputs=(pairs.flip(1) if scale_first else pairs).flatten())


def in_our_order(layer: Flow, network: Callable[[Tensor], Tensor], inputs: Tensor, scale_first: bool = True) -> Tensor:
    """Outputs of such a network with inputs and outputs arranged as ours; other networks are called unchanged."""
    if not isinstance(layer, (InverseAutoregressive, MaskedAutoregressive)):
        return network(inputs)
    pairs = network(inputs[:, layer.order]).unflatten(-1, (-1, 2))
    pairs = pairs.flip(-1) if scale_first else pairs
    return pairs[:, layer.order.argsort()].flatten(1)
