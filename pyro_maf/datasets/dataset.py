"""A data set in three parts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyro_maf.datasets.pixels import LogitPixels

__all__ = ["Dataset"]


@dataclass(frozen=True)
class Dataset:
    r"""Data in three parts, one row an event: float32, or float64 if float32 is too coarse.

    Attributes:
        name: Its name in tables and pictures.
        train, validation, test: (rows, D) each.
        train_context, validation_context, test_context: (rows, C) each, or None without a context.
        pixels: The map from pixels to rows, or None.
    """

    name: str
    train: Tensor
    validation: Tensor
    test: Tensor
    train_context: Tensor | None = None
    validation_context: Tensor | None = None
    test_context: Tensor | None = None
    pixels: LogitPixels | None = None

    @property
    def input_dim(self) -> int:
        """D."""
        return self.train.shape[-1]

    @property
    def context_dim(self) -> int:
        """C, 0 without a context."""
        return 0 if self.train_context is None else self.train_context.shape[-1]
