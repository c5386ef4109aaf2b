"""Rows that do not fit in memory: mapped from a file, and read a few blocks at a time."""

from __future__ import annotations

import copy
import hashlib
import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_maf.support import Support
from pyro_maf.tables.layout import NUMERIC_KINDS, TableLike, number_of_rows, part_of
from pyro_maf.tables.reader import Reader
from pyro_maf.tables.rows import LEAST_HELD_OUT, Hashes, Rows, Split, Standardiser, hash_rows, mixed

__all__ = ["MappedRows", "is_mapped"]

IN_MEMORY = 2**29
BLOCK_BYTES = 2**20
"""Size of a table, in bytes, beyond which it is read in blocks, and size of a block."""
MOST_HELD, MOST_SAMPLED = 2**18, 2**16
"""Maximum number of validation rows, and of rows sampled for units and batch norm."""
COUNTED = 0.1
"""Fraction of the rows among which copies are counted if no rows are held out."""

Mapped: TypeAlias = np.memmap[tuple[int, ...], np.dtype[np.generic]]


def is_mapped(data: object) -> TypeGuard[Mapped]:
    """Return whether `data` is mapped from a file that is too large to be read into memory."""
    return isinstance(data, np.memmap) and data.dtype.kind in NUMERIC_KINDS and data.nbytes > IN_MEMORY


class MappedRows:
    """A table that is mapped from a file, with its context for a conditional model, read in blocks of rows.

    `split` holds out a pseudo-random, reproducible choice of rows. The choice depends on the values of a row, so that
    equal rows stay together. A row with more copies than there are validation rows goes to training; if that leaves
    fewer than 3 distinct validation rows, the choice depends on the position of a row in its block.

    Args:
        data: (rows, D), a `numpy.memmap`.
        context: (rows, C), or None.
        reader: Conversion and checks of the rows.
        weights: (rows,), or None. `split` holds out a fraction of the rows regardless of their weights, and rows with
            weight 0 are read like others.

    Attributes:
        block: Number of rows in a block.
        starts: Index of the first row of each block.
        sizes: Number of training rows in each block; before `split`, of all rows.
        dtypes: Dtypes of data and context as they are read.
        digest: Fingerprint of the weights, after `split`; empty without weights.

    Raises:
        ValueError: For wrong shapes, or a context that is missing, superfluous or of another length.
    """

    def __init__(
        self, data: Mapped, context: TableLike | None, reader: Reader, weights: TableLike | None = None
    ) -> None:
        if context is not None:
            reader.check_paired(data, context)
        self.data = data
        self.context = context
        self.weights = weights
        if weights is not None and number_of_rows(weights) != len(data):
            raise ValueError(
                f"{reader.who} expected as many weights as rows of data, got {number_of_rows(weights)} and {len(data)}."
            )
        self.block = max(64, BLOCK_BYTES // ((reader.width + reader.context_width) * data.dtype.itemsize))
        self.starts = range(0, len(data), self.block)
        self.sizes = [min(self.block, len(data) - start) for start in self.starts]
        self._reader = reader
        self._choice = _Choice()
        self._sample: Rows | None = None
        self._leaves = False
        self._density: Standardiser | None = None
        self._weight_factor = 1.0
        self.digest = b""
        self.dtypes = self.take(slice(0, self.block)).dtypes

    def take(self, index: slice | Tensor) -> Rows:
        """Read rows, in their stored precision.

        Raises:
            InputError: For values that are not finite or not inside the support.
        """
        places: Sequence[int] = range(len(self.data))[index] if isinstance(index, slice) else index.tolist()
        at = index if isinstance(index, slice) else index.numpy()
        context, weights = (None if part is None else part_of(part, at) for part in (self.context, self.weights))
        try:
            return self._reader.at(places).read(part_of(self.data, at), context, weights)
        finally:
            for table in (self.data, self.context, self.weights):
                _release(table)

    def read(self, blocks: Iterable[int]) -> Rows:
        """Read the training rows of these blocks, in the dtypes set by `rounded_for`; weights have mean 1."""
        return _joined([self._training(self.starts[number]) for number in blocks])

    def sample(self) -> Rows:
        """Rows from all over the file, limited by memory; after `split`, training rows that were collected there."""
        if self._sample is None:
            total = len(self.data)
            drawn = np.random.default_rng(0).choice(total, min(total, MOST_SAMPLED), replace=False)
            self._sample = self.take(torch.from_numpy(np.sort(drawn)))
        return self._sample if self._density is None else self._sample.rounded_for(self._density)

    def rounded_for(self, density: Standardiser) -> MappedRows:
        """Return the rows in the dtypes of `density`; values too far out for its model's dtype raise when read."""
        rounded = copy.copy(self)
        rounded._density = density
        return rounded

    def normalised(self) -> MappedRows:
        """Return the rows; their weights have mean 1 when they are read."""
        return self

    def leaves_in_float32(self, support: Support) -> bool:
        """Return whether values leave the support, like `Rows.leaves_in_float32`; valid after `split`."""
        return self._leaves

    def split(self, fraction: float, generator: torch.Generator, *, by_chance: bool = False) -> Split[MappedRows]:
        """Hold out rows like `Rows.split`, with the seed of `generator`, up to a limit set by memory.

        Cost: two passes over the file; the first one checks every row.

        Raises:
            InputError: As `take`, and for columns that do not vary.
        """
        fraction, seed = min(fraction, MOST_HELD / len(self.data)), generator.initial_seed()
        survey = self._survey(fraction, seed)
        hashes, copies = np.unique(np.concatenate(survey.hashes), return_counts=True)
        training = copy.copy(self)
        training._leaves = survey.leaves_in_float32
        training._choice = _Choice(fraction, seed)
        if not by_chance:
            training._choice = _Choice.of(hashes, copies, fraction, len(self.data), seed)
        if survey.lightest < survey.heaviest:
            training.digest = survey.digest.digest()
        else:
            training.weights = None
        share = min(1.0, MOST_SAMPLED / ((1 - fraction) * len(self.data)))
        blocks = [training._divided(start, share) for start in self.starts]
        aside, places, sample, training.sizes = map(list, zip(*blocks, strict=True))
        held_out, training._sample = _joined(aside), _joined(sample)
        if held_out.weights is not None:
            total = survey.total_weight - float(held_out.weights.sum())
            self._reader.check_some_weight(total)
            training._weight_factor = sum(training.sizes) / total
        # The copies of a row are counted either all or not at all.
        repeats = 0 if by_chance else round(len(self.data) * (1 - len(hashes) / max(1, copies.sum())))
        return Split(training, held_out, torch.cat(places), repeats)

    def _survey(self, fraction: float, seed: int) -> _Survey:
        """Read and check every row once."""
        # Somewhat more rows are counted than are to be held out, as a margin for chance.
        share = min(1.0, 1.5 * (fraction or min(COUNTED, MOST_HELD / len(self.data))) + 30 / len(self.data))
        survey = _Survey(self._reader.support, share, seed)
        for start in self.starts:
            survey.add(self._whole(start))
        if self.weights is not None:
            self._reader.check_some_weight(survey.total_weight)
        self._reader.check_varying(_joined(survey.extremes))
        return survey

    def _divided(self, start: int, share: float) -> tuple[Rows, Tensor, Rows, int]:
        """Divide the block that starts at row `start`.

        Returns:
            Validation rows and their indices in the table, a share of the training rows, and the number of these.
        """
        rows = self._whole(start)
        aside = self._choice.mask(start, rows)
        rest = rows.take(~aside)
        sample = rest.take(self._choice.shuffled(start, rest)[: math.ceil(share * len(rest.data))])
        return rows.take(aside), start + aside.nonzero()[:, 0], sample, len(rest.data)

    def _whole(self, start: int) -> Rows:
        return self.take(slice(start, start + self.block))

    def _training(self, start: int) -> Rows:
        """Read the training rows of the block that starts at row `start`."""
        rows = self._whole(start)
        aside = self._choice.mask(start, rows)
        if self._density is not None:
            rows = rows.rounded_for(self._density)
            self._reader.at(range(start, start + self.block)).check_rounded(rows, self._density)
        rows = rows.take(~aside)
        return rows if rows.weights is None else rows._replace(weights=rows.weights * self._weight_factor)


@dataclass
class _Survey:
    """Statistics of all rows, collected block by block.

    Attributes:
        support: Support of the data.
        share: Fraction of the distinct rows whose hashes are collected.
        seed: Seed of that choice.
        leaves_in_float32: Whether values leave the support, like `Rows.leaves_in_float32`.
        extremes: Minimum and maximum of each column, block by block.
        hashes: Hashes of the chosen rows; of equal rows, all or none.
        total_weight, lightest, heaviest: Sum, minimum and maximum of the weights.
        digest: Fingerprint of the weights.
    """

    support: Support | None
    share: float
    seed: int
    leaves_in_float32: bool = False
    extremes: list[Rows] = field(default_factory=list)
    hashes: list[Hashes] = field(default_factory=list)
    total_weight: float = 0.0
    lightest: float = math.inf
    heaviest: float = -math.inf
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def add(self, rows: Rows) -> None:
        """Add a block."""
        self.extremes.append(_extremes(rows.counted))
        if self.support is not None and not self.leaves_in_float32:
            self.leaves_in_float32 = rows.leaves_in_float32(self.support)
        hashes = hash_rows(rows)
        self.hashes.append(hashes[_uniform_of(hashes, self.seed) < self.share])
        if rows.weights is not None:
            self.total_weight += float(rows.weights.sum())
            self.lightest = min(self.lightest, float(rows.weights.min()))
            self.heaviest = max(self.heaviest, float(rows.weights.max()))
            self.digest.update(rows.weights.numpy().tobytes())


@dataclass(frozen=True)
class _Choice:
    """Choice of validation rows, by default none.

    Attributes:
        fraction, seed: Fraction of the rows, and seed of the choice.
        threshold: Rows with a lower lot are chosen; None if the choice depends on the position in a block.
        for_training: Hashes of the rows that have too many copies.
    """

    fraction: float = 0.0
    seed: int = 0
    threshold: float | None = None
    for_training: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))

    @classmethod
    def of(cls, hashes: Hashes, number: NDArray[np.int64], fraction: float, rows: int, seed: int) -> _Choice:
        """Choose among `rows` rows, from the hashes of a random part of them and the number of copies of each."""
        most = fraction * rows
        many = number > most
        lots = _uniform_of(hashes[~many], seed)
        order = lots.argsort()
        within = int((number[~many][order].cumsum() <= most).sum())
        threshold = None if within < LEAST_HELD_OUT else float(lots[order[within - 1]])
        return cls(fraction, seed, threshold, hashes[many])

    def mask(self, start: int, rows: Rows) -> Tensor:
        """Mask of the validation rows in the whole block that starts at row `start`."""
        length = len(rows.data)
        if not self.fraction:
            return torch.zeros(length, dtype=torch.bool)
        if self.threshold is None:
            return self.shuffled(start, rows) < min(math.ceil(self.fraction * length), length - 1)
        hashes = hash_rows(rows)
        is_drawn = (_uniform_of(hashes, self.seed) <= self.threshold) & ~np.isin(hashes, self.for_training)
        return torch.from_numpy(is_drawn)

    def shuffled(self, start: int, rows: Rows) -> Tensor:
        """Indices of the rows in a random order that depends on `start`."""
        return torch.randperm(len(rows.data), generator=torch.Generator().manual_seed(self.seed + start))


def _uniform_of(hashes: Hashes, seed: int) -> NDArray[np.float64]:
    """Return a pseudo-random number between 0 and 1 for each hash, depending on `seed`."""
    return mixed(hashes ^ np.uint64(seed)) / 2.0**64


def _release(table: object) -> None:
    """Release pages that have been read; otherwise the whole file would become resident."""
    file = getattr(table, "_mmap", None)
    # Not for a private copy, which would lose its changes.
    if isinstance(file, mmap.mmap) and hasattr(file, "madvise") and getattr(table, "mode", None) != "c":
        file.madvise(mmap.MADV_DONTNEED)


def _joined(parts: Sequence[Rows]) -> Rows:
    joined = [[part for part in column if part is not None] for column in zip(*parts, strict=True)]
    return Rows(*(torch.cat(column) if column else None for column in joined))  # type: ignore[arg-type]


def _extremes(rows: Rows) -> Rows:
    """Two rows: the minimum and the maximum of each column; none if there are no rows."""
    if not len(rows.data):
        return rows
    return rows._replace(
        data=torch.stack(rows.data.aminmax(dim=0)),
        context=None if rows.context is None else torch.stack(rows.context.aminmax(dim=0)),
    )
