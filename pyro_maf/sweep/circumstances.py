"""What decides how a direction is computed, beside the direction itself."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_maf.nn import Network

__all__ = ["needs_gradient", "together"]


def needs_gradient(network: Network, v: Tensor, context: Tensor | None) -> bool:
    """Whether what a network makes of v at a context is to be differentiated."""
    if not torch.is_grad_enabled():
        return False
    if v.requires_grad or (context is not None and context.requires_grad):
        return True
    # Walked by hand: `parameters()` takes longer than a small layer.
    layers = (*network._modules["layers"]._modules.values(), *network._modules["context_layers"]._modules.values())  # type: ignore[union-attr]
    return any(tensor.requires_grad for layer in layers for tensor in layer._parameters.values() if tensor is not None)


def together(v: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """V with the batch shape of both, and the context with a row for each of its rows, unless it is one for all."""
    batch = torch.broadcast_shapes(v.shape[:-1], context.shape[:-1])
    if context.dim() > 1:
        context = context.expand(*batch, -1).reshape(-1, context.shape[-1])
    return v.expand(*batch, v.shape[-1]), context
