"""Batches of rows in an order that can be resumed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_maf.training.data import Rows
from pyro_maf.training.processes import Processes

__all__ = ["Batches", "Passes"]


class Passes:
    """Passes over rows, each in its random order, and the position in them.

    Args:
        generator: Generator of the order of each pass; None for the order of the rows.
        processes: The processes that each take a part of every batch.
    """

    def __init__(self, generator: torch.Generator | None, processes: Processes) -> None:
        self._generator = generator
        self._processes = processes
        self._order: Tensor | None = None
        self._passed_over = 0

    def order(self, taken: int) -> Tensor:
        """Generator state to resume from: of the current pass, or of the next if `taken` is 0."""
        if taken and self._order is not None:
            return self._order
        return torch.empty(0) if self._generator is None else self._generator.get_state()

    def go_on(self, order: Tensor, taken: int) -> None:
        """Resume from a generator state: the next pass has its order, with the first `taken` batches done."""
        if self._generator is not None:
            self._generator.set_state(order)
        self._passed_over = taken

    def _begin(self, count: int) -> tuple[Tensor, int]:
        """Draw the order of `count` items for a new pass; also return the number of its batches that are done."""
        passed_over, self._passed_over = self._passed_over, 0
        if self._generator is None:
            return torch.arange(count), passed_over
        self._order = self._generator.get_state()
        return torch.randperm(count, generator=self._generator), passed_over


class Batches(Passes):
    """Batches of sizes as equal as possible: no small one at the end, and no rows left out.

    A batch is cut out of the tensors by one index. Collating it row by row, as torch's DataLoader does, would take
    longer than a training step.

    Args:
        rows: The rows.
        size: Approximate number of rows in a batch.
        generator, processes: As in `Passes`.

    Example:
        >>> rows = Rows(torch.arange(10.0).unsqueeze(-1), None)
        >>> [len(batch.data) for batch in Batches(rows, 4, None, Processes())]
        [5, 5]
    """

    def __init__(self, rows: Rows, size: int, generator: torch.Generator | None, processes: Processes) -> None:
        super().__init__(generator, processes)
        self.rows = rows
        self._count = max(1, round(len(rows.data) / size))

    @property
    def smallest(self) -> int:
        """Number of rows in the smallest batch."""
        return len(self.rows.data) // self._count

    def to(self, device: torch.device) -> None:
        """Move the rows to `device`."""
        self.rows = self.rows.to(device)

    def sample(self) -> Rows:
        """Rows for the statistics of batch norm: all of them."""
        return self.rows

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Rows | tuple[()]]:
        """Iterate over batches; an empty tuple stands for one that was done before a fit was resumed."""
        order, passed_over = self._begin(len(self.rows.data))
        for number, index in enumerate(order.to(self.rows.data.device).tensor_split(self._count)):
            yield () if number < passed_over else self.rows.take(self._processes.part(index))
