"""Rows on disk, too many for memory: checked, measured and dealt out in batches from a few blocks of them at a time."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_maf.distributions.support import Support
from pyro_maf.training.batches import Passes
from pyro_maf.training.data import Rows, check_varying, read_rows
from pyro_maf.training.processes import Processes
from pyro_maf.training.units import Moments, Units

__all__ = ["StoredBatches", "StoredRows", "is_stored"]

IN_MEMORY = 2**29
BLOCK_BYTES = 2**20
MIXED_BYTES = 2**26
MOST_HELD = 2**18


def is_stored(data: Any) -> bool:
    """Whether `data` is mapped from a file that is too large to be read into memory as a whole."""
    return isinstance(data, np.memmap) and data.dtype.kind in "fiub" and data.nbytes > IN_MEMORY


class StoredRows:
    """A table that is mapped from a file and, for a conditional model, one of its context.

    A random choice of rows in each block, always the same, is held out for validation.

    Args:
        model: Whose `input_dim` and `context_dim` the widths must be.
        data: (rows, D), a `numpy.memmap`.
        context: (rows, C), or None.
        support: What the data must lie inside of.
        dtype: Of the tensors that are read.
        fraction: What part of the rows to hold out, as far as memory should hold them; 0 for none.
        seed: Of the choice.

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
        self.dtype = dtype
        self.seed = seed
        self.block = max(64, BLOCK_BYTES // ((support.event_size + model.context_dim) * dtype.itemsize))
        self.starts = range(0, len(data), self.block)
        self._model = model
        self._fraction = min(fraction, MOST_HELD / len(data))
        self.read(0)

    @property
    def sizes(self) -> list[int]:
        """Training rows in each block."""
        lengths = [min(self.block, len(self.data) - start) for start in self.starts]
        return [length - self._held(length) for length in lengths]

    def read(self, start: int) -> Rows:
        """All rows of the block that begins at row `start`.

        Raises:
            ValueError: For values that are not finite or not inside the support.
        """
        block = slice(start, start + self.block)
        context = None if self.context is None else self.context[block]
        try:
            return read_rows(
                self._model, self.data[block], context, support=self.support, dtype=self.dtype, first=start
            )
        finally:
            for table in (self.data, self.context):
                _forget(table)

    def training(self, start: int) -> Rows:
        """The training rows of a block."""
        rows = self.read(start)
        return rows.take(self._shuffle(start, rows)[self._held(len(rows.data)) :])

    def held_out(self) -> Rows:
        """The validation rows of all blocks."""
        return self._gather(lambda start, rows: rows.take(self._shuffle(start, rows)[: self._held(len(rows.data))]))

    def sample(self) -> Rows:
        """As many training rows as memory should hold, from all over the file."""
        share = min(1.0, MOST_HELD / sum(self.sizes))

        def some(start: int, rows: Rows) -> Rows:
            first = self._held(len(rows.data))
            return rows.take(self._shuffle(start, rows)[first : first + math.ceil(share * (len(rows.data) - first))])

        return self._gather(some)

    def measured(self) -> tuple[Units, Units | None]:
        """Mean and deviation of the columns of data (unconstrained) and context, over the training rows.

        Raises:
            ValueError: As in `read`, which sees every row, and for columns that do not vary.
        """
        of_data, of_context = Moments(), Moments()
        for start in self.starts:
            rows = self.training(start)
            of_data.add(self.support.unconstrain(rows.data)[0])
            if rows.context is not None:
                of_context.add(rows.context)
        check_varying("data", of_data.low, of_data.high, self.data)
        if self.context is None:
            return of_data.units(self.dtype), None
        check_varying("context", of_context.low, of_context.high, self.context)
        return of_data.units(self.dtype), of_context.units(self.dtype)

    def _held(self, length: int) -> int:
        # The same in all blocks but the last, so that a group of them has as many rows whichever they are.
        return min(math.ceil(self._fraction * length), length - 1)

    def _shuffle(self, start: int, rows: Rows) -> Tensor:
        return torch.randperm(len(rows.data), generator=torch.Generator().manual_seed(self.seed + start))

    def _gather(self, choose: Callable[[int, Rows], Rows]) -> Rows:
        return _joined([choose(start, self.read(start)) for start in self.starts])


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
        self._lengths = [int(self._sizes[group].sum()) for group in self._groups(torch.arange(len(rows.sizes)))]
        self._counts = [max(1, round(length / size)) for length in self._lengths]

    @property
    def smallest(self) -> int:
        """Rows in the smallest batch."""
        return min(length // count for length, count in zip(self._lengths, self._counts, strict=True))

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
        for group, length, count in zip(groups, self._lengths, self._counts, strict=True):
            shuffle = torch.randperm(length, generator=self._generator)
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
