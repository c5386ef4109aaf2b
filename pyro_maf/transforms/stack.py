"""Composition of flows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pyro_maf.transforms.base import Flow

__all__ = ["Stack"]


class Stack(Flow):
    r"""Composition of flows: y = t_L(... t_1(x)), with the sum of their log-determinants.

    Args:
        layers: From noise to data. They agree on D; those that take a context agree on its width.

    Raises:
        ValueError: For no layers, or layers that disagree on a width.

    Example:
        >>> from pyro_maf.transforms import ActNorm, Permute
        >>> flow = Stack([ActNorm(3), Permute([2, 1, 0])])
        >>> len(flow), flow[1].permutation.tolist()
        (2, [2, 1, 0])
    """

    def __init__(self, layers: Sequence[Flow]) -> None:
        layers = list(layers)
        if not layers:
            raise ValueError(f"{type(self).__name__} expected at least one layer, got none.")
        for layer in layers:
            if not isinstance(layer, Flow):
                raise TypeError(f"{type(self).__name__} expected flows, got {type(layer).__name__}.")
        for size in ("input_dim", "context_dim"):
            found = {getattr(layer, size) for layer in layers} - ({0} if size == "context_dim" else set())
            if len(found) > 1:
                raise ValueError(f"{type(self).__name__} expected layers of one {size}, got {sorted(found)}.")
        super().__init__(layers[0].input_dim, max(layer.context_dim for layer in layers))
        self.layers = nn.ModuleList(layers)

    @property
    def fast(self) -> str:  # type: ignore[override]
        """The direction in which all layers are fast, or else the one in which more of them are."""
        speeds = [layer.fast for layer in self if layer.fast != "both"]
        if not speeds:
            return "both"
        return max(("inverse", "forward"), key=speeds.count)

    @property
    def is_by_row(self) -> bool:  # type: ignore[override]
        """True if it is for all layers."""
        return all(layer.is_by_row for layer in self)

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Flow]:
        return iter(self._modules["layers"]._modules.values())  # type: ignore[union-attr,arg-type]

    def __getitem__(self, index: int) -> Flow:
        return self.layers[index]  # type: ignore[return-value]

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the output: that of the input, mapped by every layer in turn."""
        shape = super().forward_shape(shape)
        for layer in self:
            shape = layer.forward_shape(shape)
        return shape

    def _fit_statistics(self, y: Tensor, context: Tensor | None = None) -> None:
        modes = [(member, member.training) for member in self.modules()]
        self.eval()
        try:
            with torch.no_grad():
                for layer in reversed(list(self)):
                    of_layer = context if layer.context_dim else None
                    layer.fit_statistics(y, of_layer)
                    y = layer.inverse_and_log_det(y, of_layer)[0]
        finally:
            for member, training in modes:
                member.training = training

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y after every layer, noise to data, and the sum of their log |det dy/dx|."""
        return self._through_rows("forward_and_log_det", list(self), x, context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x after the inverse of every layer, data to noise, and the sum of their log |det dy/dx|."""
        return self._through_rows("inverse_and_log_det", list(self)[::-1], y, context)

    def _through_rows(
        self, direction: str, layers: list[Flow], value: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Apply the layers in turn; flatten a batch of several dimensions once, not in every layer."""
        if value.dim() < 3 or context is not None or not self.is_by_row:
            return self._in_turn(direction, layers, value, context)
        output, log_det = self._in_turn(direction, layers, value.flatten(0, -2), None)
        batch = value.shape[:-1]
        return output.unflatten(0, batch), log_det.unflatten(0, batch)

    @staticmethod
    def _in_turn(direction: str, layers: list[Flow], value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        value, total = getattr(layers[0], direction)(value, context if layers[0].context_dim else None)
        for layer in layers[1:]:
            value, log_det = getattr(layer, direction)(value, context if layer.context_dim else None)
            total = total + log_det
        return value, total

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.parameters())
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        fast = {
            "inverse": "log_prob of data is one parallel pass, sampling one sequential sweep",
            "forward": "sampling is one parallel pass, log_prob of data one sequential sweep",
            "both": "log_prob and sampling are one parallel pass each",
        }[self.fast]
        if {"inverse", "forward"} <= _speeds(self):
            fast = "log_prob and sampling take sequential sweeps"
        described = (_describe(layer).replace("\n", "\n  ") for layer in self)
        layers = "".join(f"\n  ({index}): {layer}" for index, layer in enumerate(described))
        return f"{self.name}(input_dim={self.input_dim}{context}, {parameters:,} parameters; {fast}){layers}"


def _speeds(flow: Flow) -> set[str]:
    """Fast directions of all layers, including those of nested stacks."""
    return {speed for layer in flow for speed in _speeds(layer)} if isinstance(flow, Stack) else {flow.fast}


def _describe(layer: Flow) -> str:
    network = getattr(layer, "made", None) or next(iter(getattr(layer, "networks", [])), None)
    if network is None:
        return repr(layer)
    widths = [network.input_dim, *network.hidden_dims, network.layers[-1].out_features]
    return f"{layer.name}({' -> '.join(map(str, widths))}, {network.activation})"
