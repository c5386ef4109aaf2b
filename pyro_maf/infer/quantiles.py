"""Marginal quantiles of draws, and their levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

__all__ = ["QUANTILE_DRAWS", "checked_levels", "even_noise", "quantiles_of"]

QUANTILE_DRAWS = 8192
MOST_COLUMNS = 1024
"""Maximum number of columns at a time: `torch.quantile` takes no more than 16 million numbers."""


def checked_levels(who: str, levels: float | Sequence[float] | Tensor, like: Tensor) -> Tensor:
    """Convert levels to a tensor of the dtype and device of `like`.

    Raises:
        TypeError: If they are not numbers.
        ValueError: If one is outside [0, 1].
    """
    try:
        wanted = torch.as_tensor(levels, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{who} expected quantiles to be numbers from 0 to 1, got {levels!r}.") from None
    outside = wanted[~((wanted >= 0) & (wanted <= 1))]
    if len(outside := outside.flatten()):
        raise ValueError(f"{who} expected quantiles from 0 to 1, got {float(outside[0]):g}.")
    return wanted


def quantiles_of(draws: Tensor, levels: Tensor) -> Tensor:
    r"""Quantiles along the first dimension, (\*levels, \*event), of draws (draws, \*event)."""
    columns = draws.reshape(len(draws), -1)
    found = torch.cat([part.quantile(levels.flatten(), 0) for part in columns.split(MOST_COLUMNS, -1)], -1)
    return found.reshape(levels.shape + draws.shape[1:])


def even_noise(draws: int, dim: int) -> Tensor:
    """Standard normal draws of a fixed Sobol sequence; beyond its dimensions, of a fixed seed."""
    if dim > SobolEngine.MAXDIM:
        return torch.randn(draws, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    uniform = SobolEngine(dim, scramble=True, seed=0).draw(draws, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))
