"""A table cut into the three parts of a comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_maf.checks import check_positive
from pyro_maf.datasets import Dataset

__all__ = ["divide"]

LEAST_ROWS = 10


def divide(
    name: str, data: Any, context: Any = None, *, test: float = 0.1, validation: float = 0.1, seed: int = 0
) -> Dataset:
    r"""Shuffle rows and set some of them aside: a part for testing, and a part of the rest for validation.

    Args:
        name: What the data are called in tables.
        data: Rows (N, D): an array or a tensor of numbers.
        context: Rows (N, C), or None.
        test: The part of the rows to test with, between 0 and 1.
        validation: The part of the others to validate with.
        seed: Of the shuffle.

    Returns:
        A `Dataset`, in float32.

    Raises:
        ValueError: For parts that are no parts, or too few rows for all three.

    Example:
        >>> data = divide("rows", torch.randn(100, 2))
        >>> len(data.train), len(data.validation), len(data.test)
        (81, 9, 10)

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017, section 4.2.
    """
    for role, part in (("test", test), ("validation", validation)):
        if not 0 < part < 1:
            raise ValueError(f"divide expected {role} as a part between 0 and 1, got {part!r}.")
    check_positive("divide", "seed", seed, least=0)
    total = len(data)
    for_test = round(test * total)
    for_validation = round(validation * (total - for_test))
    sizes = [total - for_test - for_validation, for_validation, for_test]
    if sizes[0] < LEAST_ROWS or min(sizes[1:]) < 2:
        raise ValueError(
            f"divide expected at least {LEAST_ROWS} rows to train with and 2 each to validate and test with, "
            f"got {total} rows, which make {sizes[0]}, {sizes[1]} and {sizes[2]}."
        )
    shuffle = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    parts = _rows(data)[shuffle].split(sizes)
    contexts = (None, None, None) if context is None else _rows(context)[shuffle].split(sizes)
    return Dataset(name, *parts, *contexts)


def _rows(table: Any) -> Tensor:
    return torch.tensor(table, dtype=torch.float32) if not isinstance(table, Tensor) else table.float()
