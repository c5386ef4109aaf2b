r"""Kolmogorov distances of noise from the standard normal, and their limits under chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Calibration", "calibration_of", "distance_between", "distance_to_uniform", "radius_of"]

LEVEL = 0.05
LOUD = 4.0
"""Number of standard errors beyond which a deviation of a moment of Phi(u) is reported."""


@dataclass(frozen=True)
class Calibration:
    r"""The largest distance of Phi(u_i) from the uniform distribution, over dimensions i and the radius.

    Attributes:
        distance: The largest sup_t |F_N(t) - t|.
        where: Name of that dimension.
        expected: Mean of a single distance for N draws from the uniform distribution, 0.87 / sqrt(N).
        limit: Upper limit of the largest distance in at least 95 % of data sets from the model, for any N.
        rows: N.
        shape: The form of that dimension's departure, in words; "" if there is none.
    """

    distance: float
    where: str
    expected: float
    limit: float
    rows: int
    shape: str

    @property
    def departs(self) -> bool:
        """True if the distance is significant."""
        return self.distance > self.limit


def calibration_of(u: Tensor, names: list[str]) -> Calibration:
    r"""Compute the calibration of noise u, (rows, columns), each column of which should be standard normal.

    The limit is the bound of Dvoretzky, Kiefer and Wolfowitz with Massart's constant, P(distance > t) <=
    2 exp(-2 N t^2), with a Bonferroni correction for the number of columns, which need not be independent.

    Example:
        >>> draws = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> calibration_of(draws, ["a", "b"]).departs, calibration_of(draws + 0.5, ["a", "b"]).departs
        (False, True)

    Reference:
        Massart, *The Tight Constant in the Dvoretzky-Kiefer-Wolfowitz Inequality*, 1990.
    """
    uniform = torch.special.ndtr(u.double())
    distances = distance_to_uniform(uniform)
    worst = int(distances.argmax())
    rows, columns = u.shape
    limit = math.sqrt(math.log(2 * columns / LEVEL) / (2 * rows))
    return Calibration(
        distance=float(distances[worst]),
        where=names[worst],
        # The mean of Kolmogorov's distribution.
        expected=math.sqrt(math.pi / 2) * math.log(2) / math.sqrt(rows),
        limit=limit,
        rows=rows,
        shape=_shape(uniform[:, worst]) if distances[worst] > limit else "",
    )


def distance_to_uniform(values: Tensor) -> Tensor:
    """The Kolmogorov distance of each column of values in [0, 1], (rows, D), from the uniform distribution, (D,).

    Example:
        >>> distance_to_uniform(torch.tensor([[0.25], [0.75]]))
        tensor([0.2500])
    """
    ordered = values.sort(0).values
    steps = torch.arange(len(ordered) + 1, dtype=ordered.dtype, device=ordered.device)[:, None] / len(ordered)
    return torch.maximum((steps[1:] - ordered).amax(0), (ordered - steps[:-1]).amax(0))


def distance_between(one: Tensor, other: Tensor) -> Tensor:
    """The Kolmogorov distance between each column of two samples, (rows, D) each: (D,).

    Example:
        >>> distance_between(torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [2.0]]))
        tensor([0.5000])
    """
    ordered = [rows.T.contiguous().sort(-1).values for rows in (one, other)]
    places = torch.cat(ordered, -1)
    parts = [torch.searchsorted(rows, places, right=True) / rows.shape[-1] for rows in ordered]
    return (parts[0] - parts[1]).abs().amax(-1)


def radius_of(u: Tensor) -> Tensor:
    r"""Normal scores of |u|^2, (rows,), which is chi-squared with D degrees of freedom if u is standard normal."""
    half, degrees = u.double().square().sum(-1) / 2, torch.tensor(u.shape[-1] / 2, dtype=torch.float64)
    below, above = torch.special.gammainc(degrees, half), torch.special.gammaincc(degrees, half)
    return torch.where(below < above, torch.special.ndtri(below), -torch.special.ndtri(above))


def _shape(uniform: Tensor) -> str:
    """Describe the departure of values from uniformity."""
    shift = (float(uniform.mean()) - 1 / 2) * math.sqrt(12 * len(uniform))
    spread = (float((uniform - 1 / 2).square().mean()) - 1 / 12) * math.sqrt(180 * len(uniform))
    if max(abs(shift), abs(spread)) < LOUD:
        return "neither shifted nor too wide or narrow as a whole, but of another shape"
    if abs(shift) > abs(spread):
        return f"the data lie {'above' if shift > 0 else 'below'} where the density has them"
    return "the density is too narrow for the data" if spread > 0 else "the density is too wide for the data"
