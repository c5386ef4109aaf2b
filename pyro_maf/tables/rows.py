"""Rows of data, context and weights in memory, and their split for validation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_maf.support import Support
from pyro_maf.tables.moments import Moments, context_moments_of, moments_of

__all__ = [
    "Rows",
    "Split",
    "Standardiser",
    "copies_of",
    "hash_rows",
    "in_proportion",
    "mean_and_error",
    "mixed",
    "repeat_as_a_whole",
]

LEAST_HELD_OUT = 3

R = TypeVar("R")
Hashes = NDArray[np.uint64]
"""A hash of each row, (rows,)."""

# Constants of splitmix64, whose steps flip on average half of the bits of a number if one of them changes.
STEP = np.uint64(0x9E3779B97F4A7C15)
MIXES = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
LAST_SHIFT = np.uint64(31)


class Standardiser(Protocol):
    """A density that standardises rows, in the dtypes of its values and of its context."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""

    @property
    def context_dtype(self) -> torch.dtype:
        """Dtype of the context."""

    def standardised(self, y: Tensor) -> Tensor:
        """Standardised data, in the dtype of the density's model."""

    def standardised_context(self, context: Tensor) -> Tensor:
        """Standardised context, in the dtype of the density's model."""


class Rows(NamedTuple):
    """Data (rows, D), context (rows, C) for a conditional model, and weights (rows,), if any."""

    data: Tensor
    context: Tensor | None
    weights: Tensor | None = None

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Dtypes of data and context; without a context, the former twice."""
        return self.data.dtype, (self.data if self.context is None else self.context).dtype

    @property
    def sizes(self) -> list[int]:
        """Number of rows in each block that is read at once; rows in memory are one block."""
        return [len(self.data)]

    @property
    def counted(self) -> Rows:
        """The rows with positive weight."""
        return self if self.weights is None else self.take(self.weights > 0)

    def read(self, blocks: Iterable[int]) -> Rows:
        """Return the rows of these blocks: all of them."""
        return self

    def sample(self) -> Rows:
        """Return as many rows as fit in memory: all of them."""
        return self

    def take(self, index: Tensor | slice) -> Rows:
        """Select the rows at `index`."""
        return Rows(*(None if part is None else part[index] for part in self))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Rows:
        """Move the rows to `device`."""
        return Rows(*(None if part is None else part.to(device) for part in self))  # type: ignore[arg-type]

    def rounded_for(self, density: Standardiser) -> Rows:
        """Convert the rows to the dtypes of a density's values and context."""
        return self._replace(
            data=self.data.to(density.dtype),
            context=None if self.context is None else self.context.to(density.context_dtype),
        )

    def weighted(self, values: Tensor) -> Tensor:
        """Multiply values, one per row, by the weights of the rows."""
        return values if self.weights is None else values * self.weights.to(values.dtype)

    def mean(self, values: Tensor) -> float:
        """Weighted mean of values, one per row."""
        return mean_and_error(values, self.weights)[0]

    def normalised(self) -> Rows:
        """Divide the weights by their mean, so that a sum over rows divided by their number is a weighted mean."""
        return self if self.weights is None else self._replace(weights=self.weights / self.weights.mean())

    def moments(self, support: Support, *, together: bool = False) -> tuple[Moments, Moments | None]:
        """Return the moments of the unconstrained data and of the context, by column or, of the context, `together`."""
        context = None if self.context is None else context_moments_of(self.context, self.weights, together=together)
        return moments_of(support.unconstrain(self.data)[0], weights=self.weights), context

    def leaves_in_float32(self, support: Support) -> bool:
        """Return whether values inside the support leave it when rounded to float32, like 1 - 1e-9 and 1e-40.

        1e-40 counts because draws on a support that ends at 0 are at least the smallest normal number.
        """
        if support.name == "real" or self.data.dtype != torch.float64:
            return False
        rounded = self.data.float()
        rounded = torch.where(rounded.abs() < torch.finfo(torch.float32).tiny, 0.0, rounded)
        return bool(support.outside(rounded).any())

    def split(self, fraction: float, generator: torch.Generator, *, by_chance: bool = False) -> Split[Rows]:
        """Hold out a random fraction of the rows, at least one, for validation; none for a fraction of 0.

        Equal rows stay together, since validation rows must not be trained on. A row with more copies than there are
        validation rows goes to training. If that leaves fewer than 3 distinct validation rows, the few distinct values
        are categories, and rows are drawn individually. A row of weight 2 counts as two copies; a row of weight 0 is on
        neither side.

        With `by_chance`, rows are equal because they have few values, rather than being copies: they are drawn
        individually.
        """
        if self.weights is not None and not self.weights.all():
            counted = self.weights.nonzero()[:, 0]
            split = self.take(counted).split(fraction, generator, by_chance=by_chance)
            return split._replace(places=counted[split.places])
        total = len(self.data)
        distinct, number = (total, torch.arange(total)) if by_chance else copies_of(self)
        repeats = total - distinct
        if not fraction:
            return Split(self, self.take(slice(0)), torch.empty(0, dtype=torch.int64), repeats)
        training, places = _divide(distinct, number, self.weights, fraction, generator)
        return Split(self.take(training), self.take(places), places, repeats)


class Split(NamedTuple, Generic[R]):
    """Training rows, validation rows with their indices in the table, and number of rows that repeat earlier ones."""

    training: R
    held_out: Rows
    places: Tensor
    repeats: int


def copies_of(rows: Rows) -> tuple[int, Tensor]:
    """Group equal rows: return the number of groups, and the group number of each row, (rows,).

    Example:
        >>> copies_of(Rows(torch.tensor([[7.0], [9.0], [7.0]]), None))
        (2, tensor([1, 0, 1]))
    """
    values, number = np.unique(hash_rows(rows), return_inverse=True)
    return len(values), torch.from_numpy(number)


def repeat_as_a_whole(rows: Rows) -> bool:
    """Return whether repeated rows are copies: a column has about as many distinct values as there are distinct rows.

    Otherwise rows are equal by chance, because their columns have few values.
    """
    values = (len(np.unique(column)) for table in rows[:2] if table is not None for column in table.numpy().T)
    return 2 * max(values) > copies_of(rows)[0]


def mean_and_error(values: Tensor, weights: Tensor | None = None) -> tuple[float, float]:
    """Weighted mean of values, (rows,), and its standard error, NaN for a single row.

    Example:
        >>> mean_and_error(torch.tensor([1.0, 3.0]))
        (2.0, 1.0)
    """
    values = values.double()
    share = torch.ones_like(values) if weights is None else weights.double()
    share = share / share.sum()
    mean = share @ values
    # For equal weights, the standard deviation over the square root of the number of rows.
    squares = share.square()
    return float(mean), float((squares @ (values - mean).square() / (1 - squares.sum())).sqrt())


def in_proportion(weights: Tensor, number: int, start: float = 0.5) -> Tensor:
    """Indices of rows in proportion to their weights, (number,): a systematic sample with an offset in [0, 1).

    Example:
        >>> in_proportion(torch.tensor([1.0, 0.0, 2.0, 1.0]), 8)
        tensor([0, 0, 2, 2, 2, 2, 3, 3])
    """
    below = weights.double().cumsum(0)
    places = (torch.arange(number, dtype=torch.float64) + start) * (below[-1] / number)
    return torch.searchsorted(below, places, right=True).clamp(max=int(weights.nonzero().max()))


def hash_rows(rows: Rows) -> Hashes:
    """Hash each row, with its context, to 64 bits; 0 equals -0.

    Among a million distinct rows, two share a hash with a probability of 3e-8.

    Example:
        >>> hashes = hash_rows(Rows(torch.tensor([[0.0, 1.0], [1.0, 0.0], [-0.0, 1.0]]), None))
        >>> (hashes[:2] == hashes[2]).tolist()
        [True, False]
    """
    hashes: Hashes = np.zeros(1, np.uint64)
    for table in rows[:2]:
        if table is None:
            continue
        numbers = (table + 0.0).numpy()  # turns -0 into 0
        bits = np.uint32 if numbers.dtype.itemsize == 4 else np.uint64
        for column in numbers.T:
            hashes = mixed(hashes + STEP ^ np.ascontiguousarray(column).view(bits))
    return hashes


def mixed(hashes: Hashes) -> Hashes:
    """Flip on average half of the bits of each number if one of them changes."""
    for shift, factor in MIXES:
        hashes = (hashes ^ hashes >> shift) * factor
    return hashes ^ hashes >> LAST_SHIFT


def _divide(
    distinct: int, number: Tensor, weights: Tensor | None, fraction: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Indices of training and validation rows, from the number of groups, and the group and weight of each row."""
    total = len(number)
    aside: float = min(max(1, round(fraction * total)), total - 2)
    if distinct < total or weights is not None:
        count = number.bincount(weights)
        if weights is not None:
            aside = fraction * float(count.sum())
        order = torch.randperm(distinct, generator=generator)
        order = order[count[order] <= aside]
        held_out = order[count[order].cumsum(0) <= aside]
        if len(held_out) >= LEAST_HELD_OUT:
            is_held_out = torch.isin(number, held_out)
            shuffled = torch.randperm(total, generator=generator)
            return shuffled[~is_held_out[shuffled]], shuffled[is_held_out[shuffled]]
    shuffled = torch.randperm(total, generator=generator)
    return shuffled[int(aside) :], shuffled[: int(aside)]
