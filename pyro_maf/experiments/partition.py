"""Split of a table into the three parts of a comparison."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_maf._core.checks import check_positive
from pyro_maf.datasets import Dataset
from pyro_maf.tables.layout import check_paired, is_frame, numbers
from pyro_maf.training.data import Rows, split
from pyro_maf.training.repeats import copies_of

__all__ = ["divide"]

LEAST_ROWS = 10


def divide(
    name: str, data: Any, context: Any = None, *, test: float = 0.1, validation: float = 0.1, seed: int = 0
) -> Dataset:
    r"""Shuffle rows and hold some out: a fraction for testing, and a fraction of the rest for validation.

    Equal rows stay together, as in `fit`.

    Args:
        name: Name of the data in tables.
        data: Rows (N, D): an array, a tensor or a data frame of numbers.
        context: Rows (N, C), or None.
        test: Fraction of the rows for testing, between 0 and 1.
        validation: Fraction of the others for validation.
        seed: Seed of the shuffle.

    Returns:
        A `Dataset`, in the dtype of `data` if that is float32 or float64, and in float64 otherwise.

    Raises:
        TypeError: For columns of a data frame that are not numeric.
        ValueError: For fractions outside (0, 1), too few rows for all three, or data frames with the same index in
            another order.

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
    rows = Rows(_numbers("data", data), None if context is None else _numbers("context", context))
    check_paired("divide", "data", data, context)
    generator = torch.Generator().manual_seed(seed)
    if copies_of(rows).distinct < total:
        others, for_testing = split(rows, test, generator)
        parts = [*split(others, validation, generator), for_testing]
    else:
        shuffle = torch.randperm(total, generator=generator)
        parts = [rows.take(index) for index in shuffle.split(sizes)]
    train, validating, testing = parts
    return Dataset(
        name,
        *(train.data, validating.data, testing.data),
        *(train.context, validating.context, testing.context),
    )


def _numbers(name: str, table: Any) -> Tensor:
    if hasattr(table, "iloc"):
        frame = table if is_frame(table) else table.to_frame()
        return numbers("divide", name, frame).double()
    table = table if isinstance(table, Tensor) else torch.tensor(table)
    return table if table.dtype == torch.float32 else table.double()
