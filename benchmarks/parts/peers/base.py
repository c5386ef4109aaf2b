"""Interface of a peer."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from parts.architecture import Architecture
from pyro_maf.transforms import Stack

LEARNING_RATE = 1e-6
"""So small that training steps do not change the weights noticeably during a measurement."""


class UnsupportedError(Exception):
    """The peer does not support this; the message says why."""


class Peer(abc.ABC):
    """A package's flow with the weights of ours.

    Methods take data and noise in the form that `prepare` returns, and return when the work is done.

    Args:
        architecture: Family and sizes.
        flow: Our flow, whose weights are copied.
        device: Device to run on.

    Raises:
        UnsupportedError: If the peer has no such flow.
    """

    def __init__(self, architecture: Architecture, flow: Stack, device: torch.device) -> None:
        self.architecture = architecture
        self.device = device

    families: ClassVar[tuple[str, ...]] = ("MAF", "RealNVP")
    """Families that the peer supports."""
    compiles = False
    """Whether the first call of a kind compiles something and takes much longer."""

    @abc.abstractmethod
    def set_training(self, training: bool) -> None:
        """Switch between training and evaluation, before the work."""

    @abc.abstractmethod
    def prepare(self, values: Tensor) -> Any:
        """Convert a float32 matrix to the peer's input."""

    @abc.abstractmethod
    def sample(self, noise: Any) -> Any:
        """Map noise to data without gradients, the sequential direction of a MAF."""

    @abc.abstractmethod
    def sample_and_differentiate(self, noise: Any) -> Any:
        """Map noise to data and log-determinant, and compute the gradient of a loss with respect to all weights.

        The loss is the reverse Kullback-Leibler divergence to a standard normal, up to a constant, as for a guide.
        """

    @abc.abstractmethod
    def log_prob(self, data: Any) -> Any:
        """Log-density of data without gradients."""

    @abc.abstractmethod
    def train_step(self, data: Any) -> Any:
        """Take a step of Adam on the mean negative log-density of data."""

    @abc.abstractmethod
    def guide_step(self, noise: Any) -> Any:
        """Take a step of Adam on the loss of `sample_and_differentiate`."""

    def fit_step(self, data: Any) -> Any:
        """Take the counterpart of a step of `fit`, a training step."""
        return self.train_step(data)

    @abc.abstractmethod
    def outputs(self, index: int, inputs: Tensor) -> Tensor:
        """Outputs of the network of layer `index`, counted from the noise, with inputs and outputs arranged as ours."""

    def bytes_per_pass(self, batch: int) -> int:
        """Approximate memory that one pass through a network stores for its gradient."""
        return 4 * batch * (3 * self.architecture.hidden + 8 * self.architecture.dim)


class TorchPeer(Peer):
    """A peer built of torch modules, whose parameters are all in `module`."""

    module: nn.Module

    def _ready(self) -> None:
        """Move `module` to the device and create its optimizer; to be called once `module` is set."""
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
        # Every pass computes the product of weights and mask and stores it.
        weights = sum(parameter.numel() for parameter in self.module.parameters()) // self.architecture.layers
        return super().bytes_per_pass(batch) + 4 * weights

    def _finished(self, result: Tensor) -> Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return result
