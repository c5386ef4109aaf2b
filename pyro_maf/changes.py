"""Detection of changes to tensors, for caches.

torch counts in-place changes of each tensor, with exceptions: fused optimizers write without counting, so every step of
any optimizer counts as a change of all tensors; and writes of another process to shared memory are not counted, so such
tensors are never taken for unchanged.
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
    """Record a change that torch does not count, of any tensors."""
    global _steps
    _steps += 1


register_optimizer_step_post_hook(count_change)


class Snapshot(NamedTuple):
    """State of tensors at one moment.

    Attributes:
        tensors: The tensors themselves, which are compared by identity.
        marks: The number of uncounted changes so far; then each tensor's version, and its address.
        storages: Storages of the tensors. While these are held, no other tensor can get one of the addresses.

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
        """The current state of tensors, or None if one of them can change without a version count.

        Such are tensors of inference mode, in shared memory, and without a storage.
        """
        try:
            marks = _marks(tensors)
            storages = list(map(torch.Tensor.untyped_storage, tensors))
        except (RuntimeError, NotImplementedError):
            return None
        # torch reports every storage on a GPU as shared.
        if any(map(torch.UntypedStorage.is_shared, storages)) and any(map(_is_shared_on_cpu, storages)):
            return None
        return cls(tensors, marks, storages)

    def holds_for(self, tensors: Sequence[Tensor]) -> bool:
        """Return whether these are the same tensors, unchanged since."""
        # In this order: tensors of inference mode, which have no version, are never those of a snapshot.
        return (
            len(self.tensors) == len(tensors)
            and all(map(operator.is_, self.tensors, tensors))
            and self.marks == _marks(tensors)
        )


def _marks(tensors: Sequence[Tensor]) -> list[int]:
    return [_steps, *[tensor._version for tensor in tensors], *map(torch.Tensor.data_ptr, tensors)]


def _is_shared_on_cpu(storage: torch.UntypedStorage) -> bool:
    return storage.device.type == "cpu" and storage.is_shared()
