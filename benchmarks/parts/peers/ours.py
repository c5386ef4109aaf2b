"""This package."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from parts.architecture import Architecture, networks
from parts.peers.base import TorchPeer
from pyro_maf import FlowPrior
from pyro_maf.transforms import Stack


class Ours(TorchPeer):
    """`pyro_maf.MAF` and `pyro_maf.RealNVP`."""

    def __init__(self, architecture: Architecture, flow: Stack, device: torch.device) -> None:
        super().__init__(architecture, flow, device)
        self.module = self.flow = copy.deepcopy(flow).to(device)
        self.distribution = FlowPrior(self.flow)
        self._ready()

    def _to_data(self, noise: Tensor) -> Tensor:
        return self.flow(noise)

    def _to_data_and_log_det(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        data = self.flow(noise)
        return data, self.flow.log_abs_det_jacobian(noise, data)

    def _log_prob(self, data: Tensor) -> Tensor:
        return self.distribution.log_prob(data)

    def outputs(self, index: int, inputs: Tensor) -> Tensor:
        return networks(self.flow)[index].run(inputs.to(self.device), None).cpu()

    def change_weights(self) -> None:
        """What an optimizer step does to the weights, as the versions of parameters count it."""
        with torch.no_grad():
            for parameter in self.flow.parameters():
                parameter.add_(1e-9)
