"""For those whose masked layers have the natural order only, scale first and shift second, with the data reversed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from parts.architecture import Linear, linears, rearranged
from pyro_maf.transforms import Flow, InverseAutoregressive, MaskedAutoregressive


def in_natural_order(layer: MaskedAutoregressive | InverseAutoregressive, scale_first: bool = True) -> list[Linear]:
    """The network as one sees it who has put the variables in the layer's order."""
    order = layer.order
    pairs = torch.arange(2 * len(order)).view(-1, 2)[order]
    return rearranged(linears(layer.made), inputs=order, outputs=(pairs.flip(1) if scale_first else pairs).flatten())


def ours_again(layer: Flow, network: Callable[[Tensor], Tensor], inputs: Tensor, scale_first: bool = True) -> Tensor:
    """Outputs of such a network for inputs in our arrangement, and in our arrangement; of others as they are."""
    if not isinstance(layer, (InverseAutoregressive, MaskedAutoregressive)):
        return network(inputs)
    pairs = network(inputs[:, layer.order]).unflatten(-1, (-1, 2))
    pairs = pairs.flip(-1) if scale_first else pairs
    return pairs[:, layer.order.argsort()].flatten(1)
