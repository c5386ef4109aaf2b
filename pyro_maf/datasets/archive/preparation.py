"""Preparation shared by several sets: the split into tenths and the standardisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["hold_out", "standardise", "tensor", "three_parts"]

Rows = NDArray[Any]


def hold_out(rows: Rows) -> tuple[Rows, Rows]:
    """Split off the last tenth of the rows, rounded down."""
    return rows[: len(rows) - len(rows) // 10], rows[len(rows) - len(rows) // 10 :]


def three_parts(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Split rows in float32: the last tenth is for testing, the last tenth of the rest for validation."""
    rest, test = hold_out(rows)
    train, validation = hold_out(rest)
    return tensor(train), tensor(validation), tensor(test)


def standardise(who: str, path: Path, rows: Rows, *others: Rows, by: int | None = None, ddof: int = 0) -> None:
    """Standardise by the mean and standard deviation of the first rows, in place, in float64.

    Args:
        who: The loader, for errors.
        path: The file of the rows.
        rows: The rows that define mean and standard deviation, and are standardised.
        others: Further rows to standardise by them.
        by: Number of the first `rows` that define mean and standard deviation, by default all.
        ddof: Delta degrees of freedom of the variance.

    Raises:
        ValueError: If a column is constant.
    """
    given = rows[:by]
    same = np.flatnonzero(given.min(0) == given.max(0))
    if len(same):
        raise ValueError(
            f"{who} expected every column it keeps of {path} to vary, got {given[0, same[0]]:g} in every row of one."
        )
    mean, deviation = given.mean(0), given.std(0, ddof=ddof)
    for part in (rows, *others):
        part -= mean
        part /= deviation


def tensor(rows: Rows) -> Tensor:
    """Convert rows to a float32 tensor."""
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
