"""Rows on disk, too many for memory: checks, moments and batches from a few blocks of them at a time."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_maf.distributions import FlowPrior
from pyro_maf.support import Support
from pyro_maf.training.batches import Passes
from pyro_maf.training.data import LEAST_HELD_OUT, Rows, check_rounded, check_varying, measured, read_rows, strays
from pyro_maf.training.processes import Processes
from pyro_maf.training.repeats import Counts, Hashes, hash_rows, lot_of, tallied
from pyro_maf.training.units import Moments, Units

__all__ = ["StoredBatches", "StoredRows", "is_stored"]

IN_MEMORY = 2**29
BLOCK_BYTES = 2**20
MIXED_BYTES = 2**26
MOST_HELD = 2**18
MOST_MEASURED = 2**16
COUNTED = 0.1
"""Fraction of the rows whose copies are counted if none are held out."""


def is_stored(data: Any) -> bool:
    """True if `data` is mapped from a file that is too large to be read into memory as a whole."""
    return isinstance(data, np.memmap) and data.dtype.kind in "fiub" and data.nbytes > IN_MEMORY


class StoredRows:
    """A table that is mapped from a file and, for a conditional model, one of its context.

    A random choice of rows, always the same, is held out for validation. It depends on the values of a row, so that
    equal rows stay together. A row with more copies than the number of validation rows is for training; if that leaves
    fewer than 3 distinct validation rows, the choice depends on the position of a row in its block.

    Args:
        model: The model, whose `input_dim` and `context_dim` the widths must match.
        data: (rows, D), a `numpy.memmap`.
        context: (rows, C), or None.
        support: The support of the data.
        dtype: Dtype of the tensors that are read, until `round_for` changes it.
        fraction: Fraction of the rows to hold out, up to a limit of memory; 0 for none.
        seed: Seed of the choice.

    Attributes:
        repeats: Approximate number of rows that repeat an earlier one, once all have been read.
        stored_dtypes: Dtypes of data and context as they are read.
        stray: True if values leave the support when rounded to float32, likewise.
        places: Indices of the validation rows in the table, from 0, likewise.

    Raises:
        ValueError: For wrong shapes, and for a context missing, superfluous or of another length.
    """

    def __init__(
        self,
        model: Any,
        data: Any,
        context: Any,
        *,
        support: Support,
        dtype: torch.dtype,
        fraction: float,
        seed: int,
    ) -> None:
        if context is not None and len(context) != len(data):
            raise ValueError(f"fit expected as many rows of context as of data, got {len(context)} and {len(data)}.")
        self.data = data
        self.context = context
        self.support = support
        self.dtypes = dtype, dtype
        self.seed = seed
        self.repeats = 0
        self.stray = False
        self.block = max(64, BLOCK_BYTES // ((support.event_size + model.context_dim) * dtype.itemsize))
        self.starts = range(0, len(data), self.block)
        self._model = model
        self._fraction = min(fraction, MOST_HELD / len(data))
        self._prior: FlowPrior | None = None
        self._sizes: list[int] = []
        self._by_place = False
        self._threshold = 0.0
        self._for_training: Hashes = np.empty(0, np.uint64)
        self._held_out: Rows | None = None
        self.places: Tensor | None = None
        self.stored_dtypes = self._whole(0).dtypes

    @property
    def sizes(self) -> list[int]:
        """Number of training rows in each block."""
        if not self._sizes:
            self._survey()
        return self._sizes

    def round_for(self, prior: FlowPrior) -> None:
        """Set the dtypes of rows to those of `prior`, and refuse rows too far out for that of its model."""
        self._prior = prior
        self.dtypes = prior.dtype, prior.context_dtype

    def read(self, start: int) -> Rows:
        """Read all rows of the block that begins at row `start`.

        Raises:
            ValueError: For values that are not finite or not inside the support.
        """
        return self._rounded(start, self._whole(start))

    def _rounded(self, start: int, rows: Rows) -> Rows:
        rows = rows.rounded(self.dtypes)
        if self._prior is not None:
            check_rounded(rows, self._prior, self.data, self.context, first=start)
        return rows

    def _whole(self, start: int) -> Rows:
        """Read a block in its stored precision."""
        block = slice(start, start + self.block)
        context = None if self.context is None else self.context[block]
        try:
            return read_rows(self._model, self.data[block], context, support=self.support, first=start)
        finally:
            for table in (self.data, self.context):
                _forget(table)

    def training(self, start: int) -> Rows:
        """Read the training rows of a block."""
        rows = self._whole(start)
        return self._rounded(start, rows).take(~self._is_held_out(start, rows))

    def held_out(self) -> Rows:
        """Return the validation rows of all blocks, in their stored precision."""
        if self._held_out is not None:
            return self._held_out
        return self._hold_out((start, rows, self._is_held_out(start, rows)) for start, rows in self._blocks())

    def sample(self) -> Rows:
        """Return training rows from all over the file, up to a limit of memory."""
        share = min(1.0, MOST_HELD / sum(self.sizes))
        return _joined([self._some(share, start, self.training(start)) for start in self.starts])

    def measured(self) -> tuple[Units, Units | None]:
        """Location and scale of the columns of data (unconstrained) and context, from a sample of the training rows.

        Raises:
            ValueError: As in `read`, which sees every row, and for columns that do not vary.
        """
        share = min(1.0, MOST_MEASURED / sum(self.sizes))
        training = []

        def blocks() -> Iterator[tuple[int, Rows, Tensor]]:
            for start, rows in self._blocks():
                aside = self._is_held_out(start, rows)
                training.append(self._some(share, start, rows.take(~aside)))
                yield start, rows, aside

        self._hold_out(blocks())
        return measured(_joined(training), self.support)

    def _hold_out(self, blocks: Iterable[tuple[int, Rows, Tensor]]) -> Rows:
        """Collect and store the validation rows, from blocks with their starts and masks of those rows."""
        held_out, places = [], []
        for start, rows, aside in blocks:
            held_out.append(rows.take(aside))
            places.append(start + aside.nonzero()[:, 0])
        self._held_out, self.places = _joined(held_out), torch.cat(places)
        return self._held_out

    def _blocks(self) -> Iterator[tuple[int, Rows]]:
        return ((start, self._whole(start)) for start in self.starts)

    def _survey(self) -> None:
        """Scan every row once: for constant columns, repeated rows, and the number of training rows of each block.

        Raises:
            ValueError: As in `read`, and for columns that do not vary.
        """
        of_data, of_context = Moments(), Moments()
        # Somewhat more than are to be held out, as a margin for chance.
        share = min(1.0, 1.5 * (self._fraction or min(COUNTED, MOST_HELD / len(self.data))) + 30 / len(self.data))
        counted = []
        for _, rows in self._blocks():
            of_data.add(rows.data)
            if rows.context is not None:
                of_context.add(rows.context)
            self.stray = self.stray or strays(rows.data, self.support)
            hashes = hash_rows(rows)
            counted.append(np.unique(hashes[lot_of(hashes, self.seed) < share], return_counts=True))
        check_varying("data", of_data.low, of_data.high, self.data)
        if self.context is not None:
            check_varying("context", of_context.low, of_context.high, self.context)
        hashes, number = tallied(*zip(*counted, strict=True))
        # Either all copies of a row are counted or none.
        self.repeats = round(len(self.data) * (1 - len(number) / max(1, number.sum())))
        self._choose(hashes, number)
        self._sizes = [
            self._length(start) - self._chosen(start, *own) for start, own in zip(self.starts, counted, strict=True)
        ]

    def _choose(self, hashes: Hashes, number: Counts) -> None:
        """Choose the validation rows.

        Args:
            hashes: Hashes of a random part of the rows, and of all that are to be held out.
            number: Number of copies of each.
        """
        most = self._fraction * len(self.data)
        many = number > most
        self._for_training = hashes[many]
        lots = lot_of(hashes[~many], self.seed)
        order = lots.argsort()
        within = int((number[~many][order].cumsum() <= most).sum())
        self._by_place = within < LEAST_HELD_OUT
        self._threshold = 0.0 if self._by_place else float(lots[order[within - 1]])

    def _length(self, start: int) -> int:
        return min(self.block, len(self.data) - start)

    def _chosen(self, start: int, hashes: Hashes, number: Counts) -> int:
        """Count the validation rows of a block, with these hashes of candidates."""
        if not self._fraction:
            return 0
        return self._at_a_place(self._length(start)) if self._by_place else int(number[self._is_drawn(hashes)].sum())

    def _is_drawn(self, hashes: Hashes) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        return (lot_of(hashes, self.seed) <= self._threshold) & ~np.isin(hashes, self._for_training)

    def _is_held_out(self, start: int, rows: Rows) -> Tensor:
        """Mask of the validation rows of a block, after a scan of all of them."""
        if not self._sizes:
            self._survey()
        if not self._fraction:
            return torch.zeros(len(rows.data), dtype=torch.bool)
        if self._by_place:
            shuffled = torch.randperm(len(rows.data), generator=torch.Generator().manual_seed(self.seed + start))
            return shuffled < self._at_a_place(len(rows.data))
        return torch.from_numpy(self._is_drawn(hash_rows(rows)))

    def _at_a_place(self, length: int) -> int:
        """Number of validation rows in a block of some length, if the choice depends on the position."""
        return min(math.ceil(self._fraction * length), length - 1)

    def _some(self, share: float, start: int, rows: Rows) -> Rows:
        shuffled = torch.randperm(len(rows.data), generator=torch.Generator().manual_seed(self.seed + start))
        return rows.take(shuffled[: math.ceil(share * len(rows.data))])


class StoredBatches(Passes):
    """Batches of stored rows, with the interface of `Batches`.

    Blocks are read in random order, some 64 MiB of them at a time, and their rows are mixed.

    Args:
        rows: The rows.
        size: Approximate number of rows in a batch.
        generator, processes: As in `Passes`.
    """

    def __init__(self, rows: StoredRows, size: int, generator: torch.Generator | None, processes: Processes) -> None:
        super().__init__(generator, processes)
        self.rows = rows
        self.device = torch.device("cpu")
        self._sample: Rows | None = None
        self._sizes = torch.tensor(rows.sizes)
        groups = self._groups(torch.arange(len(rows.sizes)))
        self._counts = [max(1, round(int(self._sizes[group].sum()) / size)) for group in groups]
        # For any grouping of the blocks, with the last one last.
        ascending, last = self._sizes[:-1].sort().values, int(self._sizes[-1])
        fewest = [int(ascending[: len(group)].sum()) for group in groups[:-1]]
        fewest.append(int(ascending[: len(groups[-1]) - 1].sum()) + last)
        self._smallest = min(length // count for length, count in zip(fewest, self._counts, strict=True))

    @property
    def smallest(self) -> int:
        """Number of rows in the smallest batch, for any grouping of the blocks."""
        return self._smallest

    def to(self, device: torch.device) -> None:
        """Move the batches to `device`."""
        self.device = device

    def sample(self) -> Rows:
        """Rows for the statistics of batch norm: up to a limit of memory, always the same, and read once."""
        if self._sample is None:
            self._sample = self.rows.sample()
        return self._sample.to(self.device)

    def __len__(self) -> int:
        return sum(self._counts)

    def __iter__(self) -> Iterator[Rows | tuple[()]]:
        """Iterate over batches; an empty tuple stands for one that was done before a fit was resumed."""
        # The last block, which may be short, stays last, so that all passes have the same number of batches.
        blocks, passed_over = self._begin(len(self._sizes) - 1)
        groups = self._groups(torch.cat([blocks, torch.tensor([len(blocks)])]))
        for group, count in zip(groups, self._counts, strict=True):
            shuffle = torch.randperm(int(self._sizes[group].sum()), generator=self._generator)
            if passed_over >= count:
                passed_over -= count
                yield from [()] * count
                continue
            mixed = _joined([self.rows.training(self.rows.starts[block]) for block in group.tolist()])
            for number, index in enumerate(shuffle.tensor_split(count)):
                yield () if number < passed_over else mixed.take(self._processes.part(index)).to(self.device)
            passed_over = 0

    @staticmethod
    def _groups(blocks: Tensor) -> tuple[Tensor, ...]:
        """Group the blocks to be mixed: as equally as possible, so that no group is of a few rows."""
        return blocks.tensor_split(max(1, round(len(blocks) * BLOCK_BYTES / MIXED_BYTES)))


def _forget(table: Any) -> None:
    """Release the pages that were read; otherwise the whole file would become resident."""
    mapped: Any = getattr(table, "_mmap", None)
    # Not for a private copy, whose changes would be lost.
    if hasattr(mapped, "madvise") and table.mode != "c":
        mapped.madvise(mmap.MADV_DONTNEED)


def _joined(parts: list[Rows]) -> Rows:
    data = torch.cat([rows.data for rows in parts])
    context = [rows.context for rows in parts if rows.context is not None]
    return Rows(data, torch.cat(context) if context else None)
