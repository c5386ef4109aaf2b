"""This package."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from parts.architecture import Architecture, networks
from parts.peers.base import LEARNING_RATE, TorchPeer
from pyro_maf import FlowPrior
from pyro_maf._core.interruption import Interruption
from pyro_maf._core.processes import Processes
from pyro_maf.tables import Rows
from pyro_maf.training.batches import Batches
from pyro_maf.training.loop import Loop
from pyro_maf.training.preparation import Trained
from pyro_maf.training.state import Schedule
from pyro_maf.transforms import Stack


class Ours(TorchPeer):
    """`pyro_maf.MAF`, `pyro_maf.IAF`, `pyro_maf.RealNVP` and `pyro_maf.NSF`."""

    families = ("MAF", "IAF", "RealNVP", "NSF")

    def __init__(self, architecture: Architecture, flow: Stack, device: torch.device) -> None:
        super().__init__(architecture, flow, device)
        self.module = self.flow = copy.deepcopy(flow).to(device)
        self.distribution = FlowPrior(self.flow)
        self._loop: Loop | None = None
        self._ready()

    def _to_data(self, noise: Tensor) -> Tensor:
        return self.flow(noise)

    def _to_data_and_log_det(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        data = self.flow(noise)
        return data, self.flow.log_abs_det_jacobian(noise, data)

    def _log_prob(self, data: Tensor) -> Tensor:
        return self.distribution.log_prob(data)

    def fit_step(self, data: Tensor) -> None:
        """Take a step of the loop of `fit`."""
        if self._loop is None:
            prior, one, processes = FlowPrior(copy.deepcopy(self.flow)), Rows(data[:1], None), Processes()
            batches, schedule = Batches(one, 1, None, processes), Schedule(LEARNING_RATE, patience=1, weight_decay=1e-6)
            limits = {"max_epochs": 1, "max_grad_norm": 100.0}
            together = {"schedule": schedule, "interruption": Interruption(), "processes": processes}
            trained = Trained(prior, prior, one, one, (0.0, 0.0))
            self._loop = Loop(trained, batches, batches, **limits, **together)
        self._loop.step(Rows(data, None))
        self._finished(data)

    def outputs(self, index: int, inputs: Tensor) -> Tensor:
        return networks(self.flow)[index].run(inputs.to(self.device), None).cpu()

    def change_weights(self) -> None:
        """Update all weights in place, as an optimizer step does."""
        with torch.no_grad():
            for parameter in self.flow.parameters():
                parameter.add_(1e-9)
