"""Rows that do not fit in memory: written to temporary files, and read a few blocks at a time."""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BufferedWriter
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_maf.support import Support
from pyro_maf.tables.layout import NUMERIC_KINDS, FloatArray, TableLike, number_of_rows, part_of
from pyro_maf.tables.reader import Reader
from pyro_maf.tables.rows import LEAST_HELD_OUT, Hashes, Rows, Split, Standardiser, hash_rows, mixed

if TYPE_CHECKING:
    from _typeshed import SupportsRead

__all__ = ["MappedRows", "Spool", "copied", "is_mapped", "temporary_file"]

IN_MEMORY = 2**29
BLOCK_BYTES = 2**20
"""Size of a table, in bytes, beyond which it is read in blocks, and size of a block."""
MOST_HELD, MOST_SAMPLED = 2**18, 2**16
"""Maximum number of validation rows, and of rows sampled for units and batch norm."""
SPOOLED_ROWS = 2**14
RESOLUTION = 1e-4
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
        self._total_weight = float(len(data))
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
        fraction = min(fraction, MOST_HELD / len(self.data))
        training = copy.copy(self)
        repeats = training._survey(fraction, generator.initial_seed(), by_chance)
        self.weights = training.weights  # None if all are equal
        held_out, places, sample, training.sizes = [], [], [], []
        share = min(1.0, MOST_SAMPLED / ((1 - fraction) * len(self.data)))
        for start in self.starts:
            rows = self._whole(start)
            aside = training._choice.mask(start, rows)
            held_out.append(rows.take(aside))
            places.append(start + aside.nonzero()[:, 0])
            rest = rows.take(~aside)
            training.sizes.append(len(rest.data))
            sample.append(rest.take(training._choice.shuffled(start, rest)[: math.ceil(share * len(rest.data))]))
        training._sample, aside_rows = _joined(sample), _joined(held_out)
        if aside_rows.weights is not None:
            training._total_weight -= float(aside_rows.weights.sum())
            self._reader.check_some_weight(training._total_weight)
        return Split(training, aside_rows, torch.cat(places), repeats)

    def _survey(self, fraction: float, seed: int, by_chance: bool) -> int:
        """Scan every row once: choose the validation rows, and return the number of repeats."""
        extremes, weights, total = list[Rows](), hashlib.sha256(), 0.0
        # Somewhat more than are to be held out, as a margin for chance.
        share = min(1.0, 1.5 * (fraction or min(COUNTED, MOST_HELD / len(self.data))) + 30 / len(self.data))
        counted, first, are_equal = [], None, True
        for start in self.starts:
            rows = self._whole(start)
            extremes.append(_extremes(rows.counted))
            if rows.weights is not None:
                weights.update(rows.weights.numpy().tobytes())
                total += float(rows.weights.sum())
                first = rows.weights[0] if first is None else first
                are_equal = are_equal and bool((rows.weights == first).all())
            self._leaves = self._leaves or (
                self._reader.support is not None and rows.leaves_in_float32(self._reader.support)
            )
            hashes = hash_rows(rows)
            counted.append(np.unique(hashes[_uniform_of(hashes, seed) < share], return_counts=True))
        if self.weights is not None:
            self._reader.check_some_weight(total)
            self._total_weight, self.digest = total, weights.digest()
            if are_equal:
                self.weights, self._total_weight, self.digest = None, float(len(self.data)), b""
        self._reader.check_varying(_joined(extremes))
        if by_chance:
            self._choice = _Choice(fraction, seed)
            return 0
        each, copies = map(np.concatenate, zip(*counted, strict=True))
        hashes, place = np.unique(each, return_inverse=True)
        number = np.bincount(place, copies).astype(np.int64)
        self._choice = _Choice.of(hashes, number, fraction, len(self.data), seed)
        # The copies of a row are counted either all or not at all.
        return round(len(self.data) * (1 - len(number) / max(1, number.sum())))

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
        if rows.weights is None:
            return rows
        return rows._replace(weights=rows.weights * (sum(self.sizes) / self._total_weight))


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


class Spool:
    """Rows of float64, collected in memory or, beyond a bound, in a temporary file; a context manager.

    Example:
        >>> with Spool(2, bound=16) as spool:
        ...     for start in range(0, 6, 2):
        ...         spool.append(np.arange(start, start + 2, dtype=np.float64).reshape(1, 2))
        >>> rows = spool.rows()
        >>> type(rows).__name__, rows.dtype.name, rows.tolist()
        ('memmap', 'float32', [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    """

    def __init__(self, width: int, bound: int) -> None:
        self.length = 0
        self._width = width
        self._bound = bound
        self._parts: list[NDArray[np.float64]] = []
        self._file: BufferedWriter | None = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, rows: NDArray[np.float64]) -> None:
        """Add rows, (n, width)."""
        self._parts.append(np.ascontiguousarray(rows, np.float64))
        self.length += len(rows)
        if self._file is None and 8 * self.length * self._width > self._bound:
            self._file = open(temporary_file(".float64"), "wb")  # noqa: SIM115 (closed by `__exit__`)
        if self._file is not None:
            for block in self._parts:
                self._file.write(block.data)
            self._parts.clear()

    def rows(self, dtype: str | None = None) -> FloatArray:
        """Return all rows, (length, width), as an array or a read-only `np.memmap` of the file; ends appending.

        Their dtype is `dtype`, by default float32 if `float32_suffices`.
        """
        if self._file is None:
            rows = np.concatenate(self._parts or [np.empty((0, self._width))])
        else:
            rows = np.memmap(self._file.name, np.float64, "r", shape=(self.length, self._width))
        if dtype is None:
            dtype = "float32" if float32_suffices(rows) else "float64"
        if dtype == "float64":
            return rows
        if self._file is None:
            return rows.astype(np.float32)
        with open(temporary_file(".float32"), "wb") as file:
            for block in _blocks(rows):
                file.write(block.astype(np.float32).tobytes())
        with suppress(OSError):  # some systems do not remove mapped files: it is removed at exit
            os.unlink(self._file.name)
        return np.memmap(file.name, np.float32, "r", shape=(self.length, self._width))


def float32_suffices(rows: NDArray[np.float64]) -> bool:
    """Return whether float32 is exact for every column, or resolves its interquartile range to 1e-4 of its width.

    Not if another value would round to 0 or 1, where some supports end.

    Example:
        >>> float32_suffices(np.array([[20.1], [21.2], [22.3]])), float32_suffices(np.array([[5e6 + 0.1], [5e6]]))
        (True, False)
    """
    exact = np.ones(rows.shape[1], bool)
    for block in _blocks(rows):
        rounded = block.astype(np.float32)
        same = rounded == block
        if (~same & ((rounded == 0) | (rounded == 1))).any():
            return False
        exact &= same.all(0)
    low, high = np.quantile(rows[:: 1 + len(rows) // MOST_SAMPLED], [0.25, 0.75], axis=0)
    magnitude = np.maximum(abs(low), abs(high))
    return bool((exact | (np.finfo(np.float32).eps * magnitude <= RESOLUTION * (high - low))).all())


def _blocks(rows: NDArray[np.float64]) -> Iterator[NDArray[np.float64]]:
    return (rows[start : start + SPOOLED_ROWS] for start in range(0, len(rows), SPOOLED_ROWS))


def temporary_file(suffix: str) -> Path:
    """Create an empty file that is deleted when the program ends."""
    descriptor, name = tempfile.mkstemp(suffix, dir=_folder().name)
    os.close(descriptor)
    return Path(name)


def copied(stream: SupportsRead[bytes]) -> Path:
    """Copy a binary stream to a temporary file."""
    path = temporary_file(".table")
    with open(path, "wb") as file:
        shutil.copyfileobj(stream, file)
    return path


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    # Windows cannot delete a file that is still mapped.
    return tempfile.TemporaryDirectory(prefix="pyro-maf-", ignore_cleanup_errors=True)
