"""Normalising layers: by the statistics of each batch, or by those of the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import FunctionCtx

from pyro_maf.nn.weights import current, is_hooked
from pyro_maf.sweep import Triangular
from pyro_maf.transforms.base import Flow

__all__ = ["ActNorm", "BatchNorm", "statistics_over_processes"]


class BatchNorm(Flow):
    r"""Normalizes in the data-to-noise direction: x = exp(log_gamma) (y - m) / sqrt(v + eps) + beta.

    m and v are the mean and variance of y. In training mode the data-to-noise direction uses the batch's statistics and
    updates the running statistics with momentum 0.1. Everything else uses the stored statistics: running ones, or,
    after `fit_statistics`, those of the training set. log |det dy/dx| = sum_i (log(v_i + eps) / 2 - log_gamma_i).

    In training mode the two directions are inverses only for a pair computed together, since the statistics belong to
    the batch. Starts near the identity: m = 0, v = 1.

    Args:
        input_dim: D.

    Shapes:
        x and y are (\*batch, D), log-determinants (\*batch,) in nats.

    Cost: elementwise in either direction.

    Raises:
        ValueError: For a training batch of a single row, which has no variance.

    Example:
        >>> layer = BatchNorm(2)
        >>> x = layer.inv(10 + 5 * torch.randn(1000, 2))
        >>> x.mean().abs().item() < 1e-3
        True

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017, section 3.5 and
        appendix B.
    """

    is_by_row = True
    EPS = 1e-5
    MOMENTUM = 0.1
    mean: Tensor
    variance: Tensor

    def __init__(self, input_dim: int) -> None:
        super().__init__(input_dim)
        self.log_gamma = nn.Parameter(torch.zeros(input_dim))
        self.beta = nn.Parameter(torch.zeros(input_dim))
        self.register_buffer("mean", torch.zeros(input_dim))
        self.register_buffer("variance", torch.ones(input_dim))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y, using the stored statistics, and log |det dy/dx|."""
        log_scale = self._log_scale(self.variance)
        return (x - self.beta) * log_scale.exp() + self.mean, log_scale.sum().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x, by the batch's statistics in training mode, otherwise by the stored ones, and log |det dy/dx|."""
        mean, variance = self._batch_statistics(y) if self.training and y.numel() else (self.mean, self.variance)
        log_scale = self._log_scale(variance)
        return (y - mean) * (-log_scale).exp() + self.beta, log_scale.sum().expand(y.shape[:-1])

    def program_steps(self, inverse: bool) -> tuple[Triangular, ...] | None:
        """Two maps, one by the stored statistics and one by the parameters; None where batch statistics are used."""
        if (inverse and self.training) or is_hooked(self) or self.variance.requires_grad:
            return None
        # Outside inference mode, whose tensors no later graph could save.
        with torch.inference_mode(False), torch.no_grad():
            stored = Triangular((self.mean, 0.5 * (self.variance + self.EPS).log()), inverse)
        trained = Triangular((self.beta, self.log_gamma), not inverse, log_sign=-1)
        return (stored, trained) if inverse else (trained, stored)

    def _fit_statistics(self, y: Tensor, context: Tensor | None = None) -> None:
        with torch.no_grad():
            variance, mean = torch.var_mean(y.reshape(-1, self.input_dim), 0, correction=0)
            self.mean.copy_(mean)
            self.variance.copy_(variance)

    def _log_scale(self, variance: Tensor) -> Tensor:
        return 0.5 * (variance + self.EPS).log() - current(self).log_gamma

    def _batch_statistics(self, y: Tensor) -> tuple[Tensor, Tensor]:
        rows = y.reshape(-1, self.input_dim)
        if _over_processes:
            mean, variance = _moments_of_all(rows)
        elif len(rows) < 2:
            raise ValueError(
                "BatchNorm expected at least 2 rows in training mode, got 1: call .eval() to score single rows."
            )
        else:
            variance, mean = torch.var_mean(rows, 0, correction=0)
        with torch.no_grad():
            self.mean.lerp_(mean, self.MOMENTUM)
            self.variance.lerp_(variance, self.MOMENTUM)
        return mean, variance


_over_processes = False


@contextmanager
def statistics_over_processes() -> Iterator[None]:
    """Context manager in which batch statistics cover the rows of all processes of `torch.distributed`.

    Each process has part of the batch, and must run the same layers in the same order.
    """
    global _over_processes
    _over_processes = True
    try:
        yield
    finally:
        _over_processes = False


def _moments_of_all(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over the rows of all processes, with gradient."""
    count = _Total.apply(rows.new_tensor(len(rows)))
    mean = _Total.apply(rows.sum(0)) / count
    return mean, _Total.apply((rows - mean).square().sum(0)) / count


class _Total(torch.autograd.Function):
    """Sum over all processes; the gradient is summed too, since the loss of each process depends on every term."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor) -> Tensor:
        total = value.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


class ActNorm(Flow):
    r"""y = x exp(log_scale) + loc, with log |det dy/dx| = sum_i log_scale_i.

    The first batch in the data-to-noise direction in training mode sets loc and log_scale to its mean and log standard
    deviation; from then on they are ordinary parameters. Starts as the identity.

    Args:
        input_dim: D.

    Shapes:
        x and y are (\*batch, D), log-determinants (\*batch,) in nats.

    Cost: elementwise in either direction.

    Example:
        >>> layer = ActNorm(2)
        >>> x = layer.inv(10 + 5 * torch.randn(1000, 2))
        >>> round(x.std().item(), 2)
        1.0

    Reference:
        Kingma & Dhariwal, *Glow: Generative Flow with Invertible 1x1 Convolutions*, 2018.
    """

    is_by_row = True
    SMALLEST_SCALE = 1e-6
    initialized: Tensor

    def __init__(self, input_dim: int) -> None:
        super().__init__(input_dim)
        self.loc = nn.Parameter(torch.zeros(input_dim))
        self.log_scale = nn.Parameter(torch.zeros(input_dim))
        self.register_buffer("initialized", torch.tensor(False))
        # A copy of the buffer, since reading that at every call would synchronise with the device; in an object, which
        # flows with and without a cache share.
        self._host = SimpleNamespace(initialized=False)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y = x exp(log_scale) + loc, and log |det dy/dx|."""
        layer = current(self)
        return x * layer.log_scale.exp() + layer.loc, layer.log_scale.sum().expand(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x = (y - loc) exp(-log_scale), and log |det dy/dx|; sets both from the first batch in training."""
        if self.training and not self._host.initialized and y.numel() > self.input_dim:
            self._fit_statistics(y)
        layer = current(self)
        return (y - layer.loc) * (-layer.log_scale).exp(), layer.log_scale.sum().expand(y.shape[:-1])

    def program_steps(self, inverse: bool) -> tuple[Triangular] | None:
        """A map, except where a batch is to set the parameters first."""
        if (inverse and self.training and not self._host.initialized) or is_hooked(self):
            return None
        return (Triangular((self.loc, self.log_scale), inverse),)

    def _fit_statistics(self, y: Tensor, context: Tensor | None = None) -> None:
        if self._host.initialized:
            return
        with torch.no_grad():
            deviation, mean = torch.std_mean(y.reshape(-1, self.input_dim), 0)
            self.loc.copy_(mean)
            self.log_scale.copy_(deviation.clamp(min=self.SMALLEST_SCALE).log())
            self.initialized.fill_(True)
        self._derive()

    def _derive(self) -> None:
        self._host.initialized = bool(self.initialized)
