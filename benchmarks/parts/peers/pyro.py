"""Pyro's flows."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import transforms as T
from pyro.nn import AutoRegressiveNN, DenseNN
from torch import Tensor, nn

from parts.architecture import HIDDEN_LAYERS, Architecture, linears, network_of, rearranged, split
from parts.peers.base import TorchPeer, UnsupportedError
from parts.peers.weights import fill
from pyro_maf.transforms import Coupling, MaskedAutoregressive, Stack


class Pyro(TorchPeer):
    """`AffineAutoregressive(...).inv`, as Pyro's layer maps noise to data in one pass, and `AffineCoupling`."""

    def __init__(self, architecture: Architecture, flow: Stack, device: torch.device) -> None:
        super().__init__(architecture, flow, device)
        make = self._autoregressive if architecture.family == "MAF" else self._coupling
        layers = [make(layer, architecture) for layer in flow]
        self.networks = [getattr(layer, "arn", None) or layer.nn for layer in layers]
        self.module = nn.ModuleList(layers)
        self._ready()
        if architecture.family == "MAF":
            self.transforms = [layer.inv for layer in layers]
        else:
            self.transforms = self._with_swaps(layers)
        zeros = torch.zeros(architecture.dim, device=device)
        base = dist.Normal(zeros, zeros + 1).to_event(1)
        self.distribution = dist.TransformedDistribution(base, self.transforms)

    @staticmethod
    def _autoregressive(layer: MaskedAutoregressive, architecture: Architecture) -> T.AffineAutoregressive:
        widths = [architecture.hidden] * HIDDEN_LAYERS
        try:
            network = AutoRegressiveNN(architecture.dim, widths, permutation=layer.order)
        except ValueError as error:
            raise UnsupportedError(str(error)) from None
        fill(network.layers, rearranged(linears(layer.made), outputs=split(2 * architecture.dim)))
        return T.AffineAutoregressive(network)

    @staticmethod
    def _coupling(layer: Coupling, architecture: Architecture) -> T.AffineCoupling:
        kept = int(layer.mask.sum())
        moved = architecture.dim - kept
        network = DenseNN(kept, [architecture.hidden] * HIDDEN_LAYERS, [moved, moved])
        fill(network.layers, linears(network_of(layer)))
        return T.AffineCoupling(kept, network)

    def _with_swaps(self, layers: list[T.AffineCoupling]) -> list[T.Transform]:
        """The layers with the halves swapped in between, since a layer's identity half comes first."""
        transforms: list[T.Transform] = []
        for layer in layers:
            places = torch.arange(self.architecture.dim, device=self.device)
            transforms += [layer, T.Permute(places.roll(-layer.split_dim))]
        return transforms[:-1]

    def _to_data(self, noise: Tensor) -> Tensor:
        for transform in self.transforms:
            noise = transform(noise)
        return noise

    def _to_data_and_log_det(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        total = noise.new_zeros(len(noise))
        for transform in self.transforms:
            data = transform(noise)
            total = total + transform.log_abs_det_jacobian(noise, data)
            noise = data
        return noise, total

    def _log_prob(self, data: Tensor) -> Tensor:
        return self.distribution.log_prob(data)

    def outputs(self, index: int, inputs: Tensor) -> Tensor:
        outputs = self.networks[index](inputs.to(self.device))
        if self.architecture.family == "MAF":
            return torch.stack(outputs, -1).flatten(1).cpu()
        return torch.cat(outputs, -1).cpu()
