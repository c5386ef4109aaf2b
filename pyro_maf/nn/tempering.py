"""Parametrisation of networks in which a step of Adam moves a wide one no further than a narrow one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Linear", "Tempered", "gain_of"]

INPUTS, UNITS = 16, 64
"""Maximum number of inputs, and of units of a hidden layer, with a gain of 1."""


def gain_of(inputs: int, usual: int = INPUTS) -> float:
    """About usual / inputs, at most 1, rounded to a power of two, so that the multiplication is exact."""
    return 0.5 ** max(0, round(math.log2(max(1, inputs) / usual)))


class Linear(nn.Linear):
    """y = gain W x + b, with a gain of 1 until a network sets another."""

    gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; one dense product."""
        return F.linear(x if self.gain == 1.0 else self.gain * x, self.weight, self.bias)


class Tempered(nn.Module):
    """A network whose weights may be parametrised as gain * W, layer by layer.

    Adam moves each entry of W by about the learning rate, whatever the size of the gradient, and a sum over n inputs by
    up to n times that. With a gain of about 1 / n one learning rate suits every width.

    Attributes:
        gains: The gain of each layer, (layers,), part of the `state_dict`; None where all are 1.

    Reference:
        Yang & Hu, *Feature learning in infinite-width neural networks*, 2021.
    """

    layers: nn.ModuleList
    gains: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gains", None)

    @torch.no_grad()
    def temper(self) -> None:
        """Set the gains by the widths of the layers, at most 1; the network's function stays the same."""
        layers: list[nn.Linear] = list(self.layers)  # type: ignore[arg-type]
        gains = [gain_of(layer.in_features, UNITS if index else INPUTS) for index, layer in enumerate(layers)]
        if min(gains) == 1.0:
            return
        for layer, gain in zip(layers, gains, strict=True):
            layer.weight.div_(gain)
        self.gains = torch.tensor(gains).to(layers[0].weight)
        self._apply_gains()

    def _apply_gains(self) -> None:
        """Set the gain of each layer."""
        layers: list[Linear] = list(self.layers)  # type: ignore[arg-type]
        for layer, gain in zip(layers, self._gains(), strict=True):
            layer.gain = gain

    def _gains(self) -> list[float]:
        return [1.0] * len(self.layers) if self.gains is None else self.gains.tolist()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        # The gains belong to the stored weights: an untempered network is stored without any.
        self.gains = (
            next(self.layers.parameters()).new_ones(len(self.layers)) if prefix + "gains" in state_dict else None
        )
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._apply_gains()
