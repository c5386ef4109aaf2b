"""nflows: transforms map data to noise; layers have the natural order, and the data is reversed between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nflows.distributions.normal import StandardNormal
from nflows.flows.base import Flow
from nflows.nn.nets.mlp import MLP
from nflows.transforms.autoregressive import (
    MaskedAffineAutoregressiveTransform,
    MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
)
from nflows.transforms.base import CompositeTransform, Transform
from nflows.transforms.coupling import AffineCouplingTransform
from nflows.transforms.permutations import ReversePermutation
from torch import Tensor

from parts.architecture import BINS, HIDDEN_LAYERS, Architecture, linears, network_of
from parts.peers.base import TorchPeer
from parts.peers.natural import in_natural_order, in_our_order
from parts.peers.weights import fill
from pyro_maf.transforms import Coupling, MaskedAutoregressive, Stack

TAIL_BOUND = 5.0
"""Half the width of a spline's box, zuko's default."""


class _Conditioner(MLP):
    """An `MLP` with the signature that coupling layers call."""

    def forward(self, inputs: Tensor, context: None = None) -> Tensor:
        return super().forward(inputs)


class Nflows(TorchPeer):
    """`MaskedAffineAutoregressiveTransform`, its rational-quadratic counterpart, and `AffineCouplingTransform`."""

    families = ("MAF", "RealNVP", "NSF")

    def __init__(self, architecture: Architecture, flow: Stack, device: torch.device) -> None:
        super().__init__(architecture, flow, device)
        self.layers = list(flow)
        self.networks = []
        make = {"MAF": self._autoregressive, "RealNVP": self._coupling, "NSF": self._spline}[architecture.family]
        transforms: list[Transform] = []
        for index, layer in enumerate(reversed(self.layers)):
            if architecture.family != "RealNVP" and index:
                transforms.append(ReversePermutation(architecture.dim))
            transforms.append(make(layer))
        self.networks.reverse()
        self.transform = CompositeTransform(transforms)
        self.module = Flow(self.transform, StandardNormal([architecture.dim]))
        self._ready()

    def _autoregressive(self, layer: MaskedAutoregressive) -> Transform:
        transform = MaskedAffineAutoregressiveTransform(
            self.architecture.dim, self.architecture.hidden, num_blocks=HIDDEN_LAYERS - 1, use_residual_blocks=False
        )
        network = transform.autoregressive_net
        fill(
            [network.initial_layer, *(block.linear for block in network.blocks), network.final_layer],
            in_natural_order(layer),
        )
        self.networks.append(network)
        return transform

    def _spline(self, layer: MaskedAutoregressive) -> Transform:
        blocks = {"num_blocks": HIDDEN_LAYERS - 1, "use_residual_blocks": False}
        spline = {"num_bins": BINS, "tails": "linear", "tail_bound": TAIL_BOUND}
        return MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            self.architecture.dim, self.architecture.hidden, **blocks, **spline
        )

    def _coupling(self, layer: Coupling) -> Transform:
        widths = [self.architecture.hidden] * HIDDEN_LAYERS
        transform = AffineCouplingTransform(
            (~layer.mask).int(), lambda inputs, outputs: _Conditioner([inputs], [outputs], widths, F.relu)
        )
        network = transform.transform_net
        fill([network._input_layer, *network._hidden_layers, network._output_layer], linears(network_of(layer)))
        self.networks.append(network)
        return transform

    def _to_data(self, noise: Tensor) -> Tensor:
        return self.transform.inverse(noise)[0]

    def _to_data_and_log_det(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(noise)

    def _log_prob(self, data: Tensor) -> Tensor:
        return self.module.log_prob(data)

    def outputs(self, index: int, inputs: Tensor) -> Tensor:
        return in_our_order(self.layers[index], self.networks[index], inputs.to(self.device)).cpu()
