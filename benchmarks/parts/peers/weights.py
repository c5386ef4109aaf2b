"""Copying weights into modules of torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from parts.architecture import Linear


def fill(layers: Iterable[nn.Module], linears: Sequence[Linear]) -> None:
    """Copy weights, biases and masks into layers; those without weights are passed over.

    Everybody lays out the degrees of hidden units in another way. The masks go along with the weights, so that all run
    the same network; how many of its weights are zero makes no difference to the time of a dense product.
    """
    targets = [layer for layer in layers if hasattr(layer, "weight")]
    with torch.no_grad():
        for layer, linear in zip(targets, linears, strict=True):
            layer.weight.copy_(linear.weight)
            layer.bias.copy_(linear.bias)
            if hasattr(layer, "mask"):
                layer.mask.copy_(linear.mask)
