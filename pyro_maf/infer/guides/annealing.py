"""Annealing: optimizer steps on a guide's weights shorten as their number grows.

Adam's steps have about the length of the learning rate, however small the gradient. The path gradient of a guide near
the posterior is small; at a constant rate, the weights keep moving, and occasionally away from the posterior. With a
rate proportional to one over the square root of the number of steps they settle, and can still get any distance.

Reference:
    Kingma & Ba, *Adam: A Method for Stochastic Optimization*, 2015, section 4.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

__all__ = ["anneal"]

STEPS = 500
"""Number of steps after which they are shorter by the square root of two, of the order of Adam's averaging window."""


class _Annealed:
    """A weight whose steps shorten.

    Attributes:
        weight: Weak reference to the weight.
        taken: Number of steps so far.
        before: Value before the current step.
    """

    def __init__(self, weight: Tensor) -> None:
        key = id(weight)
        self.weight = weakref.ref(weight, lambda _: _annealed.pop(key, None))
        self.taken = 0
        self.before = weight.data


_annealed: dict[int, _Annealed] = {}
"""Annealed weights by identity: torch's dictionary with weak references takes ten times as long."""


def anneal(weights: Iterable[Tensor]) -> None:
    """Scale step n + 1 of any torch or Pyro optimizer on these weights by 1 / sqrt(1 + n / 500).

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> anneal([weight])
        >>> optimizer = torch.optim.SGD([weight], lr=1e-4)
        >>> for _ in range(2_000):
        ...     weight.grad = torch.ones(1)
        ...     optimizer.step()
        >>> round(1 - weight.item(), 3)  # instead of 0.2
        0.124
    """
    for weight in weights:
        if id(weight) not in _annealed:
            _annealed[id(weight)] = _Annealed(weight)


def _record(optimizer: Optimizer, *_: object) -> None:
    """Record the annealed weights that an optimizer is about to change."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if (annealed := _annealed.get(id(weight))) is not None:
                annealed.before = weight.data.clone()


def _shorten(optimizer: Optimizer, *_: object) -> None:
    """Undo part of the step that an optimizer has taken."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if (annealed := _annealed.get(id(weight))) is not None:
                # Not counted as a change, since the step itself is.
                weight.data.lerp_(annealed.before, 1 - (1 + annealed.taken / STEPS) ** -0.5)
                annealed.taken += 1


register_optimizer_step_pre_hook(_record)
register_optimizer_step_post_hook(_shorten)
