"""Rows that repeat, such as draws of a Markov chain: they are told by a hash of their numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Copies", "Counts", "Hashes", "copies_of", "hash_rows", "lot_of", "repeat_as_a_whole", "tallied"]

Hashes = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]
"""A hash of each row, (rows,)."""
Counts = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
"""How often each of some hashes came, (hashes,)."""


class Copies(NamedTuple):
    """Which rows are the same.

    Attributes:
        distinct: How many rows differ.
        number: Of each row, (rows,), the same for those that are the same.
    """

    distinct: int
    number: Tensor


# Of the splitmix64 generator, whose steps change half of the bits of a number wherever one bit of it changes.
STEP = np.uint64(0x9E3779B97F4A7C15)
MIXES = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
LAST_SHIFT = np.uint64(31)


def hash_rows(tables: Iterable[Tensor | None]) -> Hashes:
    """A hash of 64 bits of each row across tables side by side; those that are None are passed over.

    Rows of the same numbers have the same hash, 0 and -0 being one number; of a million that differ, two share a hash
    with a probability of 3e-8.

    Cost: some ten elementwise operations on a column.

    Example:
        >>> hashes = hash_rows([torch.tensor([[0.0, 1.0], [1.0, 0.0], [-0.0, 1.0]]), None])
        >>> hashes[0] == hashes[2], hashes[0] == hashes[1]
        (np.True_, np.False_)
    """
    hashes: Hashes = np.zeros(1, np.uint64)
    for table in tables:
        if table is None:
            continue
        numbers = (table + 0.0).numpy()  # which makes 0 of -0
        bits = np.uint32 if numbers.dtype.itemsize == 4 else np.uint64
        for column in numbers.T:
            hashes = _mixed(hashes + STEP ^ np.ascontiguousarray(column).view(bits))
    return hashes


def lot_of(hashes: Hashes, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """A number between 0 and 1 for each hash, as good as drawn at random; another `seed` gives others."""
    return _mixed(hashes ^ np.uint64(seed)) / 2.0**64


def copies_of(tables: Iterable[Tensor | None]) -> Copies:
    """Which rows across tables side by side are the same.

    Cost: that of `hash_rows`, and a sort.

    Example:
        >>> copies_of([torch.tensor([[7.0], [9.0], [7.0]])]).distinct
        2
    """
    values, number = np.unique(hash_rows(tables), return_inverse=True)
    return Copies(len(values), torch.from_numpy(number))


def repeat_as_a_whole(tables: Iterable[Tensor | None]) -> bool:
    """Whether rows repeat as wholes, not because their columns have so few values that the same ones meet again.

    Then some column has about as many different values as there are different rows.

    Example:
        >>> draws = torch.arange(60.0)[:, None]
        >>> repeat_as_a_whole([draws.repeat(2, 3)]), repeat_as_a_whole([torch.cat([draws % 4, draws % 5], 1)])
        (True, False)
    """
    present = [table for table in tables if table is not None]
    values = (len(np.unique(column)) for table in present for column in table.numpy().T)
    return 2 * max(values) > copies_of(present).distinct


def tallied(hashes: Iterable[Hashes], numbers: Iterable[Counts]) -> tuple[Hashes, Counts]:
    """The different hashes of several lots in ascending order, and how often each came in all of them.

    Example:
        >>> lots = [np.array([5, 7], np.uint64), np.array([5], np.uint64)]
        >>> tallied(lots, [np.array([1, 1]), np.array([3])])
        (array([5, 7], dtype=uint64), array([4, 1]))
    """
    different, place = np.unique(np.concatenate([*hashes]), return_inverse=True)
    total = np.zeros(len(different), np.int64)
    np.add.at(total, place, np.concatenate([*numbers]))
    return different, total


def _mixed(hashes: Hashes) -> Hashes:
    for shift, factor in MIXES:
        hashes = (hashes ^ hashes >> shift) * factor
    return hashes ^ hashes >> LAST_SHIFT
