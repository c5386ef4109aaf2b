"""Copies of weights into torch modules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from parts.architecture import Linear


def fill(layers: Iterable[nn.Module], linears: Sequence[Linear]) -> None:
    """Copy weights, biases and masks into layers, skipping those without weights.

    Packages assign degrees to hidden units differently. With the masks copied too, all run the same network; the number
    of zero weights does not affect the time of a dense product.
    """
    targets = [layer for layer in layers if hasattr(layer, "weight")]
    with torch.no_grad():
        for layer, linear in zip(targets, linears, strict=True):
            layer.weight.copy_(linear.weight)
            layer.bias.copy_(linear.bias)
            if hasattr(layer, "mask"):
                layer.mask.copy_(linear.mask)
