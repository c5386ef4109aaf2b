"""Whether tensors are still what they were: what caches have to know.

torch counts in-place changes of each tensor, with exceptions: fused optimizers write without counting, so every step of
an optimizer counts as a change, whatever it was of; and nobody counts what another process writes into shared memory,
so such tensors are never taken for unchanged.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["Snapshot", "count_change"]

_steps = 0


def count_change(*_: Any) -> None:
    """Count a change of any tensors: one that torch does not."""
    global _steps
    _steps += 1


register_optimizer_step_post_hook(count_change)


class Snapshot(NamedTuple):
    """Tensors as they were at some moment.

    Attributes:
        tensors: The tensors themselves, so that none of them can be taken for another.
        marks: The number of optimizer steps and the like so far; then each tensor's count of changes, and its address.
        storages: What the tensors lie in. As long as these are held, no other numbers can come to lie at an address.

    Example:
        >>> x = torch.zeros(3)
        >>> before = Snapshot.of([x])
        >>> before.holds_for([x]), before.holds_for([x.add_(1)])
        (True, False)
    """

    tensors: Sequence[Tensor]
    marks: list[int]
    storages: list[torch.UntypedStorage]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> Snapshot | None:
        """The present state of tensors, or None where one of them can change uncounted.

        That is one of inference mode, one that other processes can write to, and one without memory of its own.
        """
        try:
            marks = _marks(tensors)
            storages = list(map(torch.Tensor.untyped_storage, tensors))
        except (RuntimeError, NotImplementedError):
            return None
        # Of all storages on a GPU torch says that they are shared.
        if any(map(torch.UntypedStorage.is_shared, storages)) and any(map(_is_shared_on_cpu, storages)):
            return None
        return cls(tensors, marks, storages)

    def holds_for(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, unchanged since."""
        # In this order: tensors of inference mode, which count nothing, are never those of a snapshot.
        return (
            len(self.tensors) == len(tensors)
            and all(map(operator.is_, self.tensors, tensors))
            and self.marks == _marks(tensors)
        )


def _marks(tensors: Sequence[Tensor]) -> list[int]:
    return [_steps, *[tensor._version for tensor in tensors], *map(torch.Tensor.data_ptr, tensors)]


def _is_shared_on_cpu(storage: torch.UntypedStorage) -> bool:
    return storage.device.type == "cpu" and storage.is_shared()
