"""Architectures to compare: stacks of layers with two hidden layers each, their weights, and their dense pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_maf import IAF, MAF, NSF, RealNVP
from pyro_maf.nn import MADE, MLP
from pyro_maf.transforms import Flow, Stack

HIDDEN_LAYERS = 2
BINS = 8
"""Number of bins of a spline, the default of `NSF`."""


class Architecture(NamedTuple):
    """A family, "MAF", "IAF", "RealNVP" or "NSF", and the sizes of its members."""

    family: str
    dim: int
    hidden: int
    layers: int

    def flow(self) -> Stack:
        """Our flow, with the same weights every time, which the peers copy."""
        torch.manual_seed(0)
        make = {"MAF": MAF, "IAF": IAF, "RealNVP": RealNVP, "NSF": NSF}[self.family]
        flow = make(self.dim, num_layers=self.layers, hidden_dims=[self.hidden] * HIDDEN_LAYERS)
        # Flows start as the identity. Random output weights of the size that a short training gives avoid that special
        # case and keep samples finite.
        with torch.no_grad():
            for network in networks(flow):
                bound = 0.3 / self.hidden**0.5
                network.layers[-1].weight.uniform_(-bound, bound)
                network.layers[-1].bias.uniform_(-bound, bound)
        return flow


class Linear(NamedTuple):
    """One linear layer of a network; without a mask, `mask` is all true."""

    weight: Tensor
    bias: Tensor
    mask: Tensor


def networks(flow: Stack) -> list[MADE | MLP]:
    """The network of each layer, from noise to data."""
    return [network_of(layer) for layer in flow]


def network_of(layer: Flow) -> MADE | MLP:
    """The network of a layer."""
    return layer.made if hasattr(layer, "made") else layer.networks[0]


def linears(network: MADE | MLP) -> list[Linear]:
    """The linear layers of a network."""
    return [
        Linear(layer.weight.detach(), layer.bias.detach(), getattr(layer, "mask", torch.ones_like(layer.weight)).bool())
        for layer in network.layers
    ]


def paired(outputs: int) -> Tensor:
    """Permutation of our coupling networks' outputs for peers that interleave shift and scale of each dimension."""
    return torch.arange(outputs).view(2, -1).T.flatten()


def split(outputs: int) -> Tensor:
    """Permutation of our masked networks' outputs for peers that put all shifts before all scales."""
    return torch.arange(outputs).view(-1, 2).T.flatten()


def rearranged(linear: list[Linear], *, inputs: Tensor | None = None, outputs: Tensor | None = None) -> list[Linear]:
    """The same network with its inputs and outputs permuted.

    Args:
        linear: The layers.
        inputs: Index of the old input for each new one.
        outputs: Index of the old output for each new one.
    """
    linear = list(linear)
    if inputs is not None:
        first = linear[0]
        linear[0] = Linear(first.weight[:, inputs], first.bias, first.mask[:, inputs])
    if outputs is not None:
        last = linear[-1]
        linear[-1] = Linear(last.weight[outputs], last.bias[outputs], last.mask[outputs])
    return linear


def dense_pass(flow: Stack, device: torch.device) -> Callable[[Tensor], None]:
    """One dense pass through every layer's network, without univariate maps and with masks multiplied in beforehand.

    It is the unit for the sequential direction. Its time does not depend on its input, so each network is given the
    noise.
    """
    passes = []
    for network in networks(flow):
        weights = [((linear.weight * linear.mask).to(device), linear.bias.to(device)) for linear in linears(network)]
        passes.append((network.input_dim, weights))

    def run(noise: Tensor) -> None:
        for width, ((first, a), (second, b), (last, c)) in passes:
            hidden = F.relu(F.linear(noise[:, :width], first, a))
            F.linear(F.relu(F.linear(hidden, second, b)), last, c)

    return run


def check_same_network(flow: Stack, outputs: Callable[[int, Tensor], Tensor], name: str) -> None:
    """Raise `RuntimeError` unless a peer's networks have the outputs of ours.

    Args:
        flow: Our flow.
        outputs: Function of a layer's index and inputs that returns the outputs of the peer's network, both arranged as
            ours.
        name: The peer's name.
    """
    for index, network in enumerate(networks(flow)):
        # Small enough that our networks do not compress the inputs.
        inputs = torch.rand(5, network.input_dim, generator=torch.Generator().manual_seed(index)) * 4 - 2
        with torch.no_grad():
            expected, actual = network.run(inputs, None), outputs(index, inputs)
        if not torch.allclose(expected, actual, rtol=1e-3, atol=1e-4):
            raise RuntimeError(f"{name}: the network of layer {index} differs from ours, which it should copy.")
