"""Rows dealt out in batches, in an order that can be taken up again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_maf.training.data import Rows
from pyro_maf.training.processes import Processes

__all__ = ["Batches", "Passes"]


class Passes:
    """Passes over rows, each in an order of its own, and where they are.

    Args:
        generator: Where the order of each pass is drawn from; without one the rows come as they are.
        processes: Those that each take a part of every batch.
    """

    def __init__(self, generator: torch.Generator | None, processes: Processes) -> None:
        self._generator = generator
        self._processes = processes
        self._order: Tensor | None = None
        self._passed_over = 0

    def order(self, taken: int) -> Tensor:
        """What to go on with after `taken` batches of the pass under way, or with the next one after none."""
        if taken and self._order is not None:
            return self._order
        return torch.empty(0) if self._generator is None else self._generator.get_state()

    def go_on(self, order: Tensor, taken: int) -> None:
        """Make the next pass the one that `order` is of, its first `taken` batches dealt already."""
        if self._generator is not None:
            self._generator.set_state(order)
        self._passed_over = taken

    def _begin(self, count: int) -> tuple[Tensor, int]:
        """The order of `count` things for a new pass, and how many batches of it were dealt already."""
        passed_over, self._passed_over = self._passed_over, 0
        if self._generator is None:
            return torch.arange(count), passed_over
        self._order = self._generator.get_state()
        return torch.randperm(count, generator=self._generator), passed_over


class Batches(Passes):
    """Rows in batches of as equal a size as can be: no small one at the end, and none left out.

    A batch is cut out of the tensors by one index. Collating it row by row, as torch's DataLoader does, would take
    longer than a training step.

    Args:
        rows: What to deal out.
        size: Rows in a batch, give or take.
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
        """Rows in the smallest batch."""
        return len(self.rows.data) // self._count

    def to(self, device: torch.device) -> None:
        """Deal the batches out on `device`."""
        self.rows = self.rows.to(device)

    def sample(self) -> Rows:
        """Rows to set statistics from: all of them."""
        return self.rows

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Rows | tuple[()]]:
        """The batches; an empty tuple in the place of one that was dealt before a fit was taken up again."""
        order, passed_over = self._begin(len(self.rows.data))
        for number, index in enumerate(order.to(self.rows.data.device).tensor_split(self._count)):
            yield () if number < passed_over else self.rows.take(self._processes.part(index))
