"""Whether tensors are still what they were: what caches have to know.

torch counts in-place changes of each tensor, with one exception: fused optimizers write without counting. So every
step of an optimizer counts as a change, whatever it was of.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["Snapshot"]

_steps = 0


def _count_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class Snapshot(NamedTuple):
    """Tensors as they were at some moment.

    Attributes:
        tensors: The tensors themselves, so that none of them can be taken for another.
        marks: The number of optimizer steps so far; then each tensor's count of changes, and where each lies.

    Example:
        >>> x = torch.zeros(3)
        >>> before = Snapshot.of([x])
        >>> before.holds_for(Snapshot.of([x])), before.holds_for(Snapshot.of([x.add_(1)]))
        (True, False)
    """

    tensors: list[Tensor | None]
    marks: list[int]

    @classmethod
    def of(cls, tensors: list[Tensor | None]) -> Snapshot:
        """The present state of tensors that count their changes: any but those of inference mode."""
        present = [tensor for tensor in tensors if tensor is not None]
        versions = [tensor._version for tensor in present]
        return cls(tensors, [_steps, *versions, *[tensor.data_ptr() for tensor in present]])

    def holds_for(self, now: Snapshot) -> bool:
        """Whether nothing has changed between the two."""
        return (
            self.marks == now.marks
            and len(self.tensors) == len(now.tensors)
            and all(map(operator.is_, self.tensors, now.tensors))
        )
