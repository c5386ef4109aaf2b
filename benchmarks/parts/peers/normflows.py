"""normflows: flows map noise to data, so a MAF that scores data in one pass needs reversed layers."""

from __future__ import annotations

import normflows as nf
import torch
from torch import Tensor, nn

from parts.architecture import HIDDEN_LAYERS, Architecture, linears, network_of, paired, rearranged
from parts.peers.base import TorchPeer
from parts.peers.natural import in_natural_order, in_our_order
from parts.peers.weights import fill
from pyro_maf.transforms import Coupling, MaskedAutoregressive, Stack


class Normflows(TorchPeer):
    """`MaskedAffineAutoregressive` in a `Reverse`, and `AffineCouplingBlock`."""

    def __init__(self, architecture: Architecture, flow: Stack, device: torch.device) -> None:
        super().__init__(architecture, flow, device)
        self.layers = list(flow)
        self.networks: list[nn.Module] = []
        make = self._autoregressive if architecture.family == "MAF" else self._coupling
        flows: list[nn.Module] = []
        for index, layer in enumerate(self.layers):
            if architecture.family == "MAF" and index:
                flows.append(self._reversal())
            flows.append(make(layer))
        self.module = nf.NormalizingFlow(nf.distributions.DiagGaussian(architecture.dim, trainable=False), flows)
        self._ready()

    def _autoregressive(self, layer: MaskedAutoregressive) -> nn.Module:
        flow = nf.flows.MaskedAffineAutoregressive(
            self.architecture.dim, self.architecture.hidden, num_blocks=HIDDEN_LAYERS - 1, use_residual_blocks=False
        )
        network = flow.autoregressive_net
        fill(
            [network.initial_layer, *(block.linear for block in network.blocks), network.final_layer],
            in_natural_order(layer),
        )
        # Without residual blocks, normflows omits the activation after the first layer.
        network.initial_layer = nn.Sequential(network.initial_layer, nn.ReLU())
        self.networks.append(network)
        return nf.flows.Reverse(flow)

    def _coupling(self, layer: Coupling) -> nn.Module:
        kept = int(layer.mask.sum())
        moved = self.architecture.dim - kept
        network = nf.nets.MLP([kept, *[self.architecture.hidden] * HIDDEN_LAYERS, 2 * moved])
        fill(network.net, rearranged(linears(network_of(layer)), outputs=paired(2 * moved)))
        self.networks.append(network)
        # It splits into halves, of which the first has our even dimensions.
        return nf.flows.AffineCouplingBlock(network, split_mode="channel" if layer.mask[0] else "channel_inv")

    def _reversal(self) -> nn.Module:
        reversal = nf.flows.Permute(self.architecture.dim)
        for places in (reversal.perm, reversal.inv_perm):
            places.copy_(torch.arange(self.architecture.dim).flip(0))
        return reversal

    def _to_data(self, noise: Tensor) -> Tensor:
        return self.module.forward(noise)

    def _to_data_and_log_det(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.module.forward_and_log_det(noise)

    def _log_prob(self, data: Tensor) -> Tensor:
        return self.module.log_prob(data)

    def outputs(self, index: int, inputs: Tensor) -> Tensor:
        outputs = in_our_order(self.layers[index], self.networks[index], inputs.to(self.device)).cpu()
        return outputs if self.architecture.family == "MAF" else outputs.unflatten(-1, (-1, 2)).mT.flatten(1)
