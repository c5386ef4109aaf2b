"""A data set split into three parts, and the map between image pixels and rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_maf._core.checks import check_positive
from pyro_maf.tables.layout import NAMELESS, Layout

__all__ = ["Dataset", "LogitPixels"]


@dataclass(frozen=True)
class Dataset:
    r"""Data in three parts, one event per row: float32, or float64 if float32 is too coarse.

    Attributes:
        name: Name in tables and figures.
        train, validation, test: (rows, D) each.
        train_context, validation_context, test_context: (rows, C) each, or None without a context.
        pixels: The map from pixels to rows, or None.
        layout, context_layout: Names of the columns, and categories of one-hot columns; none by default.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    train_context: Tensor | None = None
    validation_context: Tensor | None = None
    test_context: Tensor | None = None
    pixels: LogitPixels | None = None
    layout: Layout = NAMELESS
    context_layout: Layout = NAMELESS

    @property
    def input_dim(self) -> int:
        """D."""
        return self.train.shape[-1]

    @property
    def context_dim(self) -> int:
        """C, 0 without a context."""
        return 0 if self.train_context is None else self.train_context.shape[-1]


@dataclass(frozen=True)
class LogitPixels:
    r"""The paper's map from grey levels to the real line and back, with its Jacobian.

    A level v of 0 .. levels - 1 becomes a pixel x = (v + U(0, 1)) / levels in [0, 1), and then a logit
    y = logit(margin + (1 - 2 margin) x). Densities of logits transform by p(x) = p(y) prod_i dy_i/dx_i.

    Args:
        levels: Number of grey levels: 256 for a byte, 17 for scikit-learn's digits.
        margin: The paper's lambda; it keeps the logits finite.

    Raises:
        ValueError: If `levels` is below 2 or `margin` is outside (0, 0.5).

    Example:
        >>> pixels = LogitPixels(levels=17)
        >>> y = pixels.to_logits(torch.full((1, 64), 0.5))
        >>> y.abs().max().item(), pixels.to_pixels(y)[0, 0].item()
        (0.0, 0.5)
    """

    levels: int = 256
    margin: float = 1e-6

    def __post_init__(self) -> None:
        check_positive("LogitPixels", "levels", self.levels, least=2)
        if not 0 < self.margin < 0.5:
            raise ValueError(f"LogitPixels expected a margin between 0 and 0.5, got {self.margin!r}.")

    def dequantise(self, values: Tensor, seed: int = 0) -> Tensor:
        """Dequantise integer grey levels to pixels in [0, 1), in float64: uniform within each level.

        Raises:
            ValueError: If a value is not a level.
        """
        # A byte cannot be compared with 256.
        values = values.double()
        if not bool(((values >= 0) & (values < self.levels) & (values == values.round())).all()):
            raise ValueError(
                f"LogitPixels expected whole values of 0 .. {self.levels - 1}, "
                f"got values from {values.min().item():g} to {values.max().item():g}."
            )
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand(values.shape, generator=generator, dtype=torch.float64)
        return (values + noise) / self.levels

    def to_logits(self, x: Tensor) -> Tensor:
        """Map pixels x to logits y, elementwise."""
        return torch.logit(self.margin + (1 - 2 * self.margin) * x)

    def to_pixels(self, y: Tensor) -> Tensor:
        """Map logits y to pixels x, elementwise; samples of a model may be outside [0, 1] by up to `margin`."""
        return (torch.sigmoid(y) - self.margin) / (1 - 2 * self.margin)

    def log_jacobian(self, y: Tensor) -> Tensor:
        r"""log |det dy/dx| in nats, (\*batch,), at logits y, (\*batch, D)."""
        return (F.softplus(y) + F.softplus(-y) + math.log1p(-2 * self.margin)).sum(-1)

    def bits_per_pixel(self, log_prob: Tensor, y: Tensor) -> Tensor:
        r"""Bits per pixel, (\*batch,): log2(levels) - log p(x) / (D log 2).

        On average an upper bound on the length of a lossless code of the levels. A uniform density over the pixels has
        log2(levels): 8 for a byte, 4.087 for the 17 levels of scikit-learn's digits.

        Args:
            log_prob: The log-density of the logits, in nats, (\*batch,).
            y: The logits, (\*batch, D).
        """
        return math.log2(self.levels) - (log_prob + self.log_jacobian(y)) / (y.shape[-1] * math.log(2))
