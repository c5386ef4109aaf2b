"""Conditions on which the method for a direction depends: gradients needed, batch shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_maf.nn import MADE
from pyro_maf.nn.weights import is_hooked

__all__ = ["needs_gradient", "together"]


def needs_gradient(made: MADE, own: Sequence[Tensor] | None, v: Tensor, context: Tensor | None) -> bool:
    """Return whether the outputs of a network at v and a context may require a gradient.

    Args:
        made: The network.
        own: Its `own_tensors`; with None it may depend on other tensors, and the answer is yes.
        v: The variables.
        context: The context, or None.
    """
    if not torch.is_grad_enabled():
        return False
    if own is None or v.requires_grad or any(tensor.requires_grad for tensor in own):
        return True
    return context is not None and (context.requires_grad or any(map(_may_need_gradient, made.context_layers)))


def _may_need_gradient(layer: nn.Module) -> bool:
    weight = layer._parameters.get("weight")
    return type(layer) is not nn.Linear or is_hooked(layer) or weight is None or weight.requires_grad


def together(v: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Broadcast v to the common batch shape, and a batched context to one row for each row of v."""
    batch = torch.broadcast_shapes(v.shape[:-1], context.shape[:-1])
    if context.dim() > 1:
        context = context.expand(*batch, -1).reshape(-1, context.shape[-1])
    return v.expand(*batch, v.shape[-1]), context
