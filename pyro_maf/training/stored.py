"""Rows on disk, too many for memory: checked, measured and dealt out in batches from a few blocks of them at a time."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_maf.distributions import FlowPrior
from pyro_maf.distributions.support import Support
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
"""Of how many rows the copies are counted where none are to be held out, as a part of all."""


def is_stored(data: Any) -> bool:
    """Whether `data` is mapped from a file that is too large to be read into memory as a whole."""
    return isinstance(data, np.memmap) and data.dtype.kind in "fiub" and data.nbytes > IN_MEMORY


class StoredRows:
    """A table that is mapped from a file and, for a conditional model, one of its context.

    A random choice of rows, always the same, is held out for validation. It is by the numbers of a row, so that rows
    which repeat stay together. A row with more copies than there are to be validation rows stays for training; where
    that leaves fewer than 3 different rows to validate with, the choice is by the place of a row in its block.

    Args:
        model: Whose `input_dim` and `context_dim` the widths must be.
        data: (rows, D), a `numpy.memmap`.
        context: (rows, C), or None.
        support: What the data must lie inside of.
        dtype: Of the tensors that are read, until `round_for` says better.
        fraction: What part of the rows to hold out, as far as memory should hold them; 0 for none.
        seed: Of the choice.

    Attributes:
        repeats: About how many rows repeat an earlier one, once all have been read.
        stored_dtypes: Of data and context as they are read.
        stray: Whether values leave the support where they are rounded to float32, likewise.
        places: Of the validation rows in the table, from 0, likewise.

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
        """Training rows in each block."""
        if not self._sizes:
            self._survey()
        return self._sizes

    def round_for(self, prior: FlowPrior) -> None:
        """Read rows in the dtypes that `prior` takes, and refuse those too far out for its model's."""
        self._prior = prior
        self.dtypes = prior.dtype, prior.context_dtype

    def read(self, start: int) -> Rows:
        """All rows of the block that begins at row `start`.

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
        """A block as precise as it is stored."""
        block = slice(start, start + self.block)
        context = None if self.context is None else self.context[block]
        try:
            return read_rows(self._model, self.data[block], context, support=self.support, first=start)
        finally:
            for table in (self.data, self.context):
                _forget(table)

    def training(self, start: int) -> Rows:
        """The training rows of a block."""
        rows = self._whole(start)
        return self._rounded(start, rows).take(~self._is_held_out(start, rows))

    def held_out(self) -> Rows:
        """The validation rows of all blocks, as precise as they are stored."""
        if self._held_out is not None:
            return self._held_out
        return self._hold_out((start, rows, self._is_held_out(start, rows)) for start, rows in self._blocks())

    def sample(self) -> Rows:
        """As many training rows as memory should hold, from all over the file."""
        share = min(1.0, MOST_HELD / sum(self.sizes))
        return _joined([self._some(share, start, self.training(start)) for start in self.starts])

    def measured(self) -> tuple[Units, Units | None]:
        """Location and scale of the columns of data (unconstrained) and context, of a sample of the training rows.

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
        """The validation rows, from blocks with their starts and which of their rows are some; for later too."""
        held_out, places = [], []
        for start, rows, aside in blocks:
            held_out.append(rows.take(aside))
            places.append(start + aside.nonzero()[:, 0])
        self._held_out, self.places = _joined(held_out), torch.cat(places)
        return self._held_out

    def _blocks(self) -> Iterator[tuple[int, Rows]]:
        return ((start, self._whole(start)) for start in self.starts)

    def _survey(self) -> None:
        """Look at every row once: whether columns vary, which rows repeat, and how many of each block are for training.

        Raises:
            ValueError: As in `read`, and for columns that do not vary.
        """
        of_data, of_context = Moments(), Moments()
        # Somewhat more than are to be held out: what is by chance has to reach.
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
        # All copies of a row are among those that were counted, or none is.
        self.repeats = round(len(self.data) * (1 - len(number) / max(1, number.sum())))
        self._choose(hashes, number)
        self._sizes = [
            self._length(start) - self._chosen(start, *own) for start, own in zip(self.starts, counted, strict=True)
        ]

    def _choose(self, hashes: Hashes, number: Counts) -> None:
        """Settle which rows are for validation.

        Args:
            hashes: Of a part of the rows by lot, and of all that are to be held out.
            number: Of the copies of each.
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
        """How many rows of a block are for validation, its hashes that may be being these."""
        if not self._fraction:
            return 0
        return self._at_a_place(self._length(start)) if self._by_place else int(number[self._is_drawn(hashes)].sum())

    def _is_drawn(self, hashes: Hashes) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
        return (lot_of(hashes, self.seed) <= self._threshold) & ~np.isin(hashes, self._for_training)

    def _is_held_out(self, start: int, rows: Rows) -> Tensor:
        """Which rows of a block are for validation, which to say takes a look at all."""
        if not self._sizes:
            self._survey()
        if not self._fraction:
            return torch.zeros(len(rows.data), dtype=torch.bool)
        if self._by_place:
            shuffled = torch.randperm(len(rows.data), generator=torch.Generator().manual_seed(self.seed + start))
            return shuffled < self._at_a_place(len(rows.data))
        return torch.from_numpy(self._is_drawn(hash_rows(rows)))

    def _at_a_place(self, length: int) -> int:
        """How many rows of so many in a block are for validation, where their place decides."""
        return min(math.ceil(self._fraction * length), length - 1)

    def _some(self, share: float, start: int, rows: Rows) -> Rows:
        shuffled = torch.randperm(len(rows.data), generator=torch.Generator().manual_seed(self.seed + start))
        return rows.take(shuffled[: math.ceil(share * len(rows.data))])


class StoredBatches(Passes):
    """Stored rows in batches; the same to a fit as `Batches`.

    Blocks are taken in random order, some 64 MiB of them at a time, and their rows are mixed.

    Args:
        rows: What to deal out.
        size: Rows in a batch, give or take.
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
        # Whichever blocks come together, but for the last one, which comes last.
        ascending, last = self._sizes[:-1].sort().values, int(self._sizes[-1])
        fewest = [int(ascending[: len(group)].sum()) for group in groups[:-1]]
        fewest.append(int(ascending[: len(groups[-1]) - 1].sum()) + last)
        self._smallest = min(length // count for length, count in zip(fewest, self._counts, strict=True))

    @property
    def smallest(self) -> int:
        """Rows in the smallest batch, whichever blocks are mixed with each other."""
        return self._smallest

    def to(self, device: torch.device) -> None:
        """Deal the batches out on `device`."""
        self.device = device

    def sample(self) -> Rows:
        """Rows to set statistics from: as many as memory should hold, always the same, and read once."""
        if self._sample is None:
            self._sample = self.rows.sample()
        return self._sample.to(self.device)

    def __len__(self) -> int:
        return sum(self._counts)

    def __iter__(self) -> Iterator[Rows | tuple[()]]:
        """The batches; an empty tuple in the place of one that was dealt before a fit was taken up again."""
        # The last block, which may be a short one, stays last, so that each pass has as many batches.
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
        """Blocks that are mixed with each other: groups as equal as can be, so that none is of a few rows."""
        return blocks.tensor_split(max(1, round(len(blocks) * BLOCK_BYTES / MIXED_BYTES)))


def _forget(table: Any) -> None:
    """Let go of the pages that were read, which stay resident otherwise, until the whole file is."""
    mapped: Any = getattr(table, "_mmap", None)
    # What was written to a private copy would be lost.
    if hasattr(mapped, "madvise") and table.mode != "c":
        mapped.madvise(mmap.MADV_DONTNEED)


def _joined(parts: list[Rows]) -> Rows:
    data = torch.cat([rows.data for rows in parts])
    context = [rows.context for rows in parts if rows.context is not None]
    return Rows(data, torch.cat(context) if context else None)
