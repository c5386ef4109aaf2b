"""What the benchmark asks of each peer."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from parts.architecture import Architecture
from pyro_maf.transforms import Stack

LEARNING_RATE = 1e-6
"""Small enough that no number of measured steps changes what is measured."""


class UnsupportedError(Exception):
    """A peer cannot do this; the message says why."""


class Peer(abc.ABC):
    """A flow of somebody's, with the weights of ours.

    Data and noise are what `prepare` makes of a tensor. Every method returns when the work is done, and not before.

    Args:
        architecture: Family and sizes.
        flow: Our flow, whose weights are copied.
        device: Where it runs.

    Raises:
        UnsupportedError: If the peer has no such flow.
    """

    def __init__(self, architecture: Architecture, flow: Stack, device: torch.device) -> None:
        self.architecture = architecture
        self.device = device

    families: ClassVar[tuple[str, ...]] = ("MAF", "RealNVP")
    """The families of which the peer has members here."""
    compiles = False
    """Whether the first call of a kind compiles something, and takes much longer for it."""

    @abc.abstractmethod
    def set_training(self, training: bool) -> None:
        """Told before work that trains, or that does not."""

    @abc.abstractmethod
    def prepare(self, values: Tensor) -> Any:
        """A float32 matrix as the peer takes it."""

    @abc.abstractmethod
    def sample(self, noise: Any) -> Any:
        """Noise to data, without gradients. For a MAF this is the sequential direction."""

    @abc.abstractmethod
    def sample_and_differentiate(self, noise: Any) -> Any:
        """Noise to data and log-determinant, and the gradient of a loss of both to all weights.

        The loss is the reverse Kullback-Leibler divergence to a standard normal, up to a constant: what a guide is
        trained with.
        """

    @abc.abstractmethod
    def log_prob(self, data: Any) -> Any:
        """Log-density of data, without gradients."""

    @abc.abstractmethod
    def train_step(self, data: Any) -> Any:
        """One step of Adam on the mean negative log-density of data."""

    @abc.abstractmethod
    def guide_step(self, noise: Any) -> Any:
        """One step of Adam on the loss of `sample_and_differentiate`."""

    def fit_step(self, data: Any) -> Any:
        """What the peer's user does for a step of `fit`: a training step."""
        return self.train_step(data)

    @abc.abstractmethod
    def outputs(self, index: int, inputs: Tensor) -> Tensor:
        """Outputs of the network of layer `index`, counted from the noise, in our arrangement.

        For a network of D inputs in another order than ours, this puts inputs and outputs right.
        """

    def bytes_per_pass(self, batch: int) -> int:
        """About what one pass through the networks keeps for its gradient."""
        return 4 * batch * (3 * self.architecture.hidden + 8 * self.architecture.dim)


class TorchPeer(Peer):
    """One made of torch modules: `module` holds all parameters."""

    module: nn.Module

    def _ready(self) -> None:
        """To be called when `module` is there."""
        self.module.to(self.device)
        self.optimizer = torch.optim.Adam(self.module.parameters(), LEARNING_RATE, fused=True)

    @abc.abstractmethod
    def _to_data(self, noise: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def _to_data_and_log_det(self, noise: Tensor) -> tuple[Tensor, Tensor]: ...

    @abc.abstractmethod
    def _log_prob(self, data: Tensor) -> Tensor: ...

    def prepare(self, values: Tensor) -> Tensor:
        return values.to(self.device, copy=True)

    def set_training(self, training: bool) -> None:
        self.module.train(training)

    def sample(self, noise: Tensor) -> Tensor:
        with torch.inference_mode():
            return self._finished(self._to_data(noise))

    def sample_and_differentiate(self, noise: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        data, log_det = self._to_data_and_log_det(noise)
        loss = (0.5 * data.square().sum(-1) - log_det).mean()
        loss.backward()
        return self._finished(loss)

    def guide_step(self, noise: Tensor) -> Tensor:
        loss = self.sample_and_differentiate(noise)
        self.optimizer.step()
        return self._finished(loss)

    def log_prob(self, data: Tensor) -> Tensor:
        with torch.inference_mode():
            return self._finished(self._log_prob(data))

    def train_step(self, data: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = -self._log_prob(data).mean()
        loss.backward()
        self.optimizer.step()
        return self._finished(loss)

    def bytes_per_pass(self, batch: int) -> int:
        # The product of weights and mask is made anew, and kept, in every pass.
        weights = sum(parameter.numel() for parameter in self.module.parameters()) // self.architecture.layers
        return super().bytes_per_pass(batch) + 4 * weights

    def _finished(self, result: Tensor) -> Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return result
