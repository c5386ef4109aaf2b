"""What the preparation of several sets has in common: the split into tenths and the standardisation."""

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
    """All but the last tenth of the rows, rounded down, and that tenth."""
    return rows[: len(rows) - len(rows) // 10], rows[len(rows) - len(rows) // 10 :]


def three_parts(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test rows in float32: the last tenth for testing, that of the rest for validation."""
    rest, test = hold_out(rows)
    train, validation = hold_out(rest)
    return tensor(train), tensor(validation), tensor(test)


def standardise(who: str, path: Path, rows: Rows, *others: Rows, by: int | None = None, ddof: int = 0) -> None:
    """Subtract the mean and divide by the deviation of the first rows, in place, in float64.

    Args:
        who: The loader that prepares.
        path: The file the rows are from.
        rows: They give mean and deviation, and are standardised.
        others: More rows to standardise by them.
        by: How many of `rows` give mean and deviation, by default all.
        ddof: What the number of rows is lessened by in the variance.

    Raises:
        ValueError: If a column has the same value in all rows.
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
    """Rows as a float32 tensor."""
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
