"""What is compared: a stack of layers with two hidden layers each, its weights, and one dense pass through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_maf import IAF, MAF, NSF, RealNVP
from pyro_maf.nn import MADE, MLP
from pyro_maf.transforms import Flow, Stack

HIDDEN_LAYERS = 2
BINS = 8
"""Number of bins of a spline, ours by default."""


class Architecture(NamedTuple):
    """A family, "MAF", "IAF", "RealNVP" or "NSF", and the sizes of its members."""

    family: str
    dim: int
    hidden: int
    layers: int

    def flow(self) -> Stack:
        """Our flow, with the same weights every time; the peers are given copies of them."""
        torch.manual_seed(0)
        make = {"MAF": MAF, "IAF": IAF, "RealNVP": RealNVP, "NSF": NSF}[self.family]
        flow = make(self.dim, num_layers=self.layers, hidden_dims=[self.hidden] * HIDDEN_LAYERS)
        # Flows start as the identity; weights as large as a short training makes them keep samples finite everywhere.
        with torch.no_grad():
            for network in networks(flow):
                bound = 0.3 / self.hidden**0.5
                network.layers[-1].weight.uniform_(-bound, bound)
                network.layers[-1].bias.uniform_(-bound, bound)
        return flow


class Linear(NamedTuple):
    """One layer of a network: its mask is all true where there is none."""

    weight: Tensor
    bias: Tensor
    mask: Tensor


def networks(flow: Stack) -> list[MADE | MLP]:
    """The network of each layer, noise to data."""
    return [network_of(layer) for layer in flow]


def network_of(layer: Flow) -> MADE | MLP:
    """The one network of a layer."""
    return layer.made if hasattr(layer, "made") else layer.networks[0]


def linears(network: MADE | MLP) -> list[Linear]:
    """The layers of a network."""
    return [
        Linear(layer.weight.detach(), layer.bias.detach(), getattr(layer, "mask", torch.ones_like(layer.weight)).bool())
        for layer in network.layers
    ]


def paired(outputs: int) -> Tensor:
    """Where output k of a coupling network of ours lies for those who keep a pair for each dimension together."""
    return torch.arange(outputs).view(2, -1).T.flatten()


def split(outputs: int) -> Tensor:
    """Where output k of a masked network of ours lies for those who give all shifts and then all scales."""
    return torch.arange(outputs).view(-1, 2).T.flatten()


def rearranged(linear: list[Linear], *, inputs: Tensor | None = None, outputs: Tensor | None = None) -> list[Linear]:
    """The same network with its inputs and outputs in another order.

    Args:
        linear: The layers.
        inputs: Which of the old inputs each new one is.
        outputs: Likewise of outputs.
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
    """One dense pass through every layer's network in turn: masks multiplied in beforehand, nothing but products.

    It is what the sequential direction is measured against, and takes the same time whatever its input, so each
    network is given the noise.
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


def check_same_network(flow: Stack, theirs: Callable[[int, Tensor], Tensor], who: str) -> None:
    """Raise unless a peer's networks give what ours give.

    Args:
        flow: Our flow.
        theirs: The outputs of the peer's network of layer `index` for given inputs, both in our arrangement.
        who: The peer's name.
    """
    for index, (ours, network) in enumerate(_ours(flow)):
        # Where our networks see their inputs as they are.
        inputs = torch.rand(5, network.input_dim, generator=torch.Generator().manual_seed(index)) * 4 - 2
        with torch.no_grad():
            expected, found = ours(inputs), theirs(index, inputs)
        if not torch.allclose(expected, found, rtol=1e-3, atol=1e-4):
            raise RuntimeError(f"{who}: the network of layer {index} is not the one that was to be copied.")


def _ours(flow: Stack) -> Iterator[tuple[Callable[[Tensor], Tensor], MADE | MLP]]:
    for network in networks(flow):
        yield (lambda x, network=network: network.run(x, None)), network
