"""Rows in memory, dealt out in batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pyro_maf.training.data import Rows

__all__ = ["Batches"]


class Batches:
    """Rows in batches of as equal a size as can be: no small one at the end, and none left out.

    A batch is cut out of the tensors by one index. Collating it row by row, as torch's DataLoader does, would take
    longer than a training step.

    Args:
        rows: What to deal out.
        size: Rows in a batch, give or take.
        generator: Where the order of each pass is drawn from; without one the rows come as they are.

    Example:
        >>> rows = Rows(torch.arange(10.0).unsqueeze(-1), None)
        >>> [len(batch.data) for batch in Batches(rows, 4)]
        [5, 5]
    """

    def __init__(self, rows: Rows, size: int, generator: torch.Generator | None = None) -> None:
        self.rows = rows
        self.generator = generator
        self._count = max(1, round(len(rows.data) / size))

    @property
    def smallest(self) -> int:
        """Rows in the smallest batch."""
        return len(self.rows.data) // self._count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Rows]:
        total = len(self.rows.data)
        order = torch.arange(total) if self.generator is None else torch.randperm(total, generator=self.generator)
        for index in order.to(self.rows.data.device).tensor_split(self._count):
            yield self.rows.take(index)
