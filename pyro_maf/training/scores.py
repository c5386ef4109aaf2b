"""Log-likelihoods of rows under a density, individually and as a mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor

from pyro_maf._core.torch_state import reference_tensor
from pyro_maf.distributions import ConditionalDensity, Density, FlowPrior, TableDensity
from pyro_maf.tables import Rows
from pyro_maf.tables.layout import TableLike, number_of_rows, part_of
from pyro_maf.tables.reader import table_of
from pyro_maf.tables.rows import mean_and_error

__all__ = ["LogLikelihood", "log_likelihood_of", "log_prob_of"]

ROWS_AT_ONCE, VALUES_AT_ONCE = 2**14, 2**18


class LogLikelihood(NamedTuple):
    """Mean log-likelihood of rows in nats, its standard error (NaN for a single row), and the number of rows."""

    mean: float
    standard_error: float
    rows: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} nats, standard error {self.standard_error:.3f}"


def log_likelihood_of(density: Density | ConditionalDensity, rows: Rows) -> LogLikelihood:
    """Weighted mean log-likelihood of rows."""
    log_prob = torch.cat([*log_prob_of(density, rows.data, rows.context)])
    return LogLikelihood(*mean_and_error(log_prob, rows.weights), len(rows.data))


def log_prob_of(
    density: Density | ConditionalDensity, rows: TableLike, context: TableLike | None = None
) -> Iterator[Tensor]:
    """Iterate over the log-densities of blocks of rows, (block,) each, in nats; without gradient, on the CPU.

    Rows and context may have any form that `numbers` reads; a memory-mapped array is read one block at a time. The
    density is 0 at infinity, where networks compute NaN.

    Raises:
        TypeError: For values that are not numeric.
        ValueError: For rows or a context of another width.
    """
    inner = density.unwrapped
    like = reference_tensor(inner)
    (width,), device = inner.event_shape, None if like is None else like.device
    # A prior rounds by itself, and raises for rows that are too coarse for it.
    dtype, context_dtype = (
        (None, None) if isinstance(inner, (FlowPrior, TableDensity)) else (density.dtype, density.context_dtype)
    )
    size = max(1, min(ROWS_AT_ONCE, VALUES_AT_ONCE // width))
    for start in range(0, number_of_rows(rows), size):
        block = slice(start, start + size)
        with torch.no_grad():
            at = inner
            if isinstance(density, ConditionalDensity) and context is not None:
                features = _table("context", part_of(context, block), inner.context_dim, inner.context_shape)
                at = cast("ConditionalDensity", density).condition(features.to(device, context_dtype))
            table = _table("rows", part_of(rows, block), width)
            infinite = table.to(density.dtype).isinf().any(-1) & ~table.isnan().any(-1)
            yield at.log_prob(table.to(device, dtype)).cpu().masked_fill(infinite, -torch.inf)


def _table(role: str, value: TableLike, width: int, shape: tuple[int, ...] = ()) -> Tensor:
    return table_of("score", role, value, width, "as in the fit", shape=shape)
