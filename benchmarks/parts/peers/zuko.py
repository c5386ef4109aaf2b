"""zuko: layers map data to noise, and the first is next to the data."""

from __future__ import annotations

import torch
import zuko
from torch import Tensor

from parts.architecture import BINS, HIDDEN_LAYERS, Architecture, linears, network_of, paired, rearranged
from parts.peers.base import TorchPeer
from parts.peers.weights import fill
from pyro_maf.transforms import Stack


class Zuko(TorchPeer):
    """`zuko.flows.MAF`, `RealNVP` and `NSF`, whose orders and masks alternate like ours."""

    families = ("MAF", "RealNVP", "NSF")

    def __init__(self, architecture: Architecture, flow: Stack, device: torch.device) -> None:
        super().__init__(architecture, flow, device)
        make = {"MAF": zuko.flows.MAF, "RealNVP": zuko.flows.RealNVP, "NSF": zuko.flows.NSF}[architecture.family]
        sizes = {"transforms": architecture.layers, "hidden_features": [architecture.hidden] * HIDDEN_LAYERS}
        bins = {"bins": BINS} if architecture.family == "NSF" else {}
        self.module = make(architecture.dim, **sizes, **bins)
        self.hyper = [layer.hyper for layer in self.module.transform.transforms][::-1]
        for layer, hyper in zip(flow, self.hyper, strict=True) if not bins else ():
            copied = linears(network_of(layer))
            self.width = len(copied[-1].bias)
            fill(hyper, copied if architecture.family == "MAF" else rearranged(copied, outputs=paired(self.width)))
        self._ready()
        self.distribution = self.module()
        self.to_data = self.distribution.transform.inv

    def _to_data(self, noise: Tensor) -> Tensor:
        return self.to_data(noise)

    def _to_data_and_log_det(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_data.call_and_ladj(noise)

    def _log_prob(self, data: Tensor) -> Tensor:
        return self.distribution.log_prob(data)

    def outputs(self, index: int, inputs: Tensor) -> Tensor:
        outputs = self.hyper[index](inputs.to(self.device)).cpu()
        return outputs if self.architecture.family == "MAF" else outputs.unflatten(-1, (-1, 2)).mT.flatten(1)
