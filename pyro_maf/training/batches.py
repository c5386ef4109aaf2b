"""Batches of rows in an order that can be resumed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pyro_maf._core.processes import Processes
from pyro_maf.distributions.steps import dequantised
from pyro_maf.tables import MappedRows, Rows

__all__ = ["Batches"]

BLOCKS_AT_ONCE = 64
"""Number of blocks of rows on disk, of 1 MiB each, whose rows are shuffled together."""


class Batches:
    """Batches of equal size as far as possible, without a small last batch or rows left out.

    Blocks of rows are read in random order, some 64 at a time, and their rows are shuffled together; rows in memory are
    a single block. A batch is selected from the tensors by one index. Collating it row by row, as torch's DataLoader
    does, would take longer than a training step.

    Args:
        rows: The rows, in memory or on disk.
        size: Approximate number of rows in a batch.
        generator: Generator of the order in each epoch; None to keep the order of the rows.
        processes: The processes, each of which takes a part of every batch.
        spacing: Grid spacing of each column; each epoch adds uniform noise from torch's global generator. () for none.

    Attributes:
        smallest: Number of rows in the smallest batch, however the blocks are grouped.

    Example:
        >>> rows = Rows(torch.arange(10.0).unsqueeze(-1), None)
        >>> [len(batch.data) for batch in Batches(rows, 4, None, Processes())]
        [5, 5]
    """

    def __init__(
        self,
        rows: Rows | MappedRows,
        size: int,
        generator: torch.Generator | None,
        processes: Processes,
        spacing: Sequence[float] = (),
    ) -> None:
        self.rows = rows
        self._device = torch.device("cpu")
        self._generator = generator
        self._processes = processes
        self._spacing = spacing
        self._order: Tensor | None = None
        self._passed_over = 0
        self._sizes = torch.tensor(rows.sizes)
        groups = self._groups(torch.arange(len(self._sizes)))
        self._counts = [max(1, round(int(self._sizes[group].sum()) / size)) for group in groups]
        # For any grouping of the blocks, with the last block last.
        ascending, last = self._sizes[:-1].sort().values, int(self._sizes[-1])
        fewest = [int(ascending[: len(group)].sum()) for group in groups[:-1]]
        fewest.append(int(ascending[: len(groups[-1]) - 1].sum()) + last)
        self.smallest = min(length // count for length, count in zip(fewest, self._counts, strict=True))

    def to(self, device: torch.device) -> None:
        """Move the rows to `device`; rows on disk are moved batch by batch."""
        self._device = device
        if isinstance(self.rows, Rows):
            self.rows = self.rows.to(device)

    def sample(self) -> Rows:
        """Rows for the statistics of batch norm, limited by memory and always the same."""
        return self._spread(self.rows.sample().to(self._device), torch.Generator().manual_seed(0))

    def order(self, taken: int) -> Tensor:
        """Generator state to resume from: of the current epoch, or of the next if no batches are `taken`."""
        if taken and self._order is not None:
            return self._order
        return torch.empty(0) if self._generator is None else self._generator.get_state()

    def load(self, order: Tensor, taken: int) -> None:
        """Resume from a generator state: the next epoch has its order, and skips the first `taken` batches."""
        if self._generator is not None:
            self._generator.set_state(order)
        self._passed_over = taken

    def __len__(self) -> int:
        return sum(self._counts)

    def __iter__(self) -> Iterator[Rows | tuple[()]]:
        """Iterate over batches; an empty tuple stands for a batch that was done before the fit was resumed."""
        passed_over, self._passed_over = self._passed_over, 0
        self._order = None if self._generator is None else self._generator.get_state()
        # The last block, which may be short, stays last, so that all epochs have the same number of batches.
        blocks = torch.cat([self._shuffled(len(self._sizes) - 1), torch.tensor([len(self._sizes) - 1])])
        for group, count in zip(self._groups(blocks), self._counts, strict=True):
            order = self._shuffled(int(self._sizes[group].sum()))
            if passed_over < count:
                rows = self.rows.read(group.tolist())
                order = order.to(rows.data.device)
            for number, index in enumerate(order.tensor_split(count)):
                if number < passed_over:
                    yield ()
                else:
                    yield self._spread(rows.take(self._processes.part(index)).to(self._device))
            passed_over = max(0, passed_over - count)

    def _spread(self, rows: Rows, generator: torch.Generator | None = None) -> Rows:
        """Rows with noise within their grid steps."""
        return rows._replace(data=dequantised(rows.data, self._spacing, generator)) if self._spacing else rows

    def _shuffled(self, count: int) -> Tensor:
        return torch.arange(count) if self._generator is None else torch.randperm(count, generator=self._generator)

    @staticmethod
    def _groups(blocks: Tensor) -> tuple[Tensor, ...]:
        """Group the blocks to be shuffled together, as equally as possible, so that no group has few rows."""
        return blocks.tensor_split(max(1, round(len(blocks) / BLOCKS_AT_ONCE)))
