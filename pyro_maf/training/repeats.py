"""Repeated rows, such as draws of a Markov chain, by a hash of their values."""

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
"""Number of occurrences of each hash, (hashes,)."""


class Copies(NamedTuple):
    """Groups of equal rows.

    Attributes:
        distinct: Number of distinct rows.
        number: Number of the group of each row, (rows,).
    """

    distinct: int
    number: Tensor


# Constants of splitmix64, whose steps flip half of the bits of a number on average if one bit of it changes.
STEP = np.uint64(0x9E3779B97F4A7C15)
MIXES = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
LAST_SHIFT = np.uint64(31)


def hash_rows(tables: Iterable[Tensor | None]) -> Hashes:
    """Hash each row across tables side by side to 64 bits; tables that are None are skipped.

    Equal rows have the same hash, with 0 equal to -0; among a million distinct rows, two share a hash with a
    probability of 3e-8.

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
        numbers = (table + 0.0).numpy()  # turns -0 into 0
        bits = np.uint32 if numbers.dtype.itemsize == 4 else np.uint64
        for column in numbers.T:
            hashes = _mixed(hashes + STEP ^ np.ascontiguousarray(column).view(bits))
    return hashes


def lot_of(hashes: Hashes, seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return a pseudo-random number between 0 and 1 for each hash; it depends on `seed`."""
    return _mixed(hashes ^ np.uint64(seed)) / 2.0**64


def copies_of(tables: Iterable[Tensor | None]) -> Copies:
    """Group equal rows across tables side by side.

    Cost: that of `hash_rows`, and a sort.

    Example:
        >>> copies_of([torch.tensor([[7.0], [9.0], [7.0]])]).distinct
        2
    """
    values, number = np.unique(hash_rows(tables), return_inverse=True)
    return Copies(len(values), torch.from_numpy(number))


def repeat_as_a_whole(tables: Iterable[Tensor | None]) -> bool:
    """True if rows repeat as copies, rather than by chance since their columns have few values.

    Then some column has about as many distinct values as there are distinct rows.

    Example:
        >>> draws = torch.arange(60.0)[:, None]
        >>> repeat_as_a_whole([draws.repeat(2, 3)]), repeat_as_a_whole([torch.cat([draws % 4, draws % 5], 1)])
        (True, False)
    """
    present = [table for table in tables if table is not None]
    values = (len(np.unique(column)) for table in present for column in table.numpy().T)
    return 2 * max(values) > copies_of(present).distinct


def tallied(hashes: Iterable[Hashes], numbers: Iterable[Counts]) -> tuple[Hashes, Counts]:
    """Merge several lots of hashes: the distinct ones in ascending order, and their total counts.

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
