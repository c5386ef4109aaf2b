"""Triangular linear maps from residuals and context to rows: regressions of the columns for which they pay off."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["triangular_regression"]

LEAST_GAIN, BY_CHANCE = 0.1, 2.0
"""Minimum decrease of a column's entropy for it to be regressed, in nats; with few rows, 2 / sqrt(N). A column with few
values in large steps has a low entropy, and is not regressed even if others predict it: its residual would blur
them."""
RIDGE = 1e-6
"""Variance of the noise on each regressor, in units of the columns."""
MOST_VALUES = 2**24
"""Maximum number of values, in rows from all over the table, that the regressions use."""
LEAST_SCALE = 1e-3
"""Minimum scale of a residual; a column that follows from others would have scale 0."""


def triangular_regression(rows: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    r"""m, lower triangular L and slopes V of rows y = m + L r + V c, where r_i is a residual or, unscaled, y_i itself.

    Column i is regressed on the context c and all preceding columns if the entropy of its leave-one-out residual is
    lower than its own by at least 0.1 nats or 2 / sqrt(N). Both entropies are Vasicek's estimates, from spacings. The
    leave-one-out residuals, like those of new rows, have variance 1.

    Args:
        rows: Rows (N, D), in units in which they are about 1.
        context: Context c of the rows, (N, C), likewise; by default none.

    Returns:
        m, (D,), L, (D, D), and V, (D, C), in float64.

    Cost: O(N (C + D)^2), using at most some 16 million values.

    Example:
        >>> x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> x[:, 1] = x[:, 0] + x[:, 1] / 10
        >>> loc, factor, _ = triangular_regression(x)
        >>> [[round(entry, 1) for entry in row] for row in factor.tolist()]
        [[1.0, 0.0], [1.0, 0.1]]

    Reference:
        Vasicek, *A Test for Normality Based on Sample Entropy*, 1976.
    """
    joined = rows if context is None else torch.cat([context, rows], 1)
    size, seen = joined.shape[1], joined.shape[1] - rows.shape[1]
    count = min(len(rows), max(1, MOST_VALUES // size))
    joined = joined[torch.linspace(0, len(rows) - 1, count, dtype=torch.float64).long()].double()
    mean = joined.mean(0)
    centred = joined - mean
    # All regressions at once: with Z = Q R, the residual of a column is R_ii q_i, and its leverages are the sums of
    # squares of the preceding columns of Q. The rows appended below are those of a ridge penalty.
    padded = torch.cat([centred, math.sqrt(RIDGE * count) * torch.eye(size, dtype=centred.dtype)])
    orthogonal, triangle = torch.linalg.qr(padded)
    orthogonal = orthogonal[:count]
    diagonal = triangle.diagonal()
    leverage = 1 / count + orthogonal.square().cumsum(1) - orthogonal.square()
    unseen = diagonal * orthogonal / (1 - leverage).clamp(min=RIDGE)
    falls = _entropy(centred) - _entropy(unseen) >= max(LEAST_GAIN, BY_CHANCE / math.sqrt(count))
    falls[: max(1, seen)] = False
    # The unit triangular map from columns to residuals.
    unscaled = torch.where(falls[:, None], diagonal[:, None] * torch.linalg.inv(triangle).T, torch.eye(size).double())
    scale = torch.where(falls, unseen.std(0).clamp(min=LEAST_SCALE), 1.0)
    intercept = torch.where(falls, unscaled @ mean, 0.0)
    of_rows, of_context = unscaled[seen:, seen:], unscaled[seen:, :seen]
    both = torch.cat([intercept[seen:, None], -of_context, scale[seen:].diag()], 1)
    loc, slopes, factor = torch.linalg.solve_triangular(of_rows, both, upper=False).split([1, seen, size - seen], 1)
    return loc[:, 0], factor, slopes


def _entropy(columns: Tensor) -> Tensor:
    """Entropy of each column up to a constant, (D,), in nats: the mean logarithm of its spacings."""
    step = max(1, math.isqrt(len(columns)))
    ordered = columns.sort(0).values
    return (ordered[step:] - ordered[:-step]).clamp(min=1e-12).log().mean(0)
