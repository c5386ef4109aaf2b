"""Annealing: steps of optimizers over a guide's weights shorten as their number grows.

Steps of Adam are about a learning rate long however small the gradient is. The path gradient of a guide near the
posterior is small; where the rate does not fall, the weights keep moving, and now and then away from the posterior.
With a rate that falls as one over the square root of the number of steps they settle, and still get any distance.

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
"""Number of steps after which they are shorter by the square root of two: of the order of those that Adam averages."""


class _Annealed:
    """A weight whose steps shorten.

    Attributes:
        weight: Weak reference to it.
        taken: Number of its steps.
        before: Its values before the step that is being taken.
    """

    def __init__(self, weight: Tensor) -> None:
        key = id(weight)
        self.weight = weakref.ref(weight, lambda _: _annealed.pop(key, None))
        self.taken = 0
        self.before = weight.data


_annealed: dict[int, _Annealed] = {}
"""Annealed weights by their identity: a dictionary of torch's by weak references takes ten times as long."""


def anneal(weights: Iterable[Tensor]) -> None:
    """Have step n + 1 of any optimizer of torch or Pyro move each weight by 1 / sqrt(1 + n / 500) of what it would.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> anneal([weight])
        >>> optimizer = torch.optim.SGD([weight], lr=1e-4)
        >>> for _ in range(2_000):
        ...     weight.grad = torch.ones(1)
        ...     optimizer.step()
        >>> round(1 - weight.item(), 3)  # in place of 0.2
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
    """Go back by a part of the step that an optimizer has taken."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if (annealed := _annealed.get(id(weight))) is not None:
                # Uncounted as a change, of which the step is one.
                weight.data.lerp_(annealed.before, 1 - (1 + annealed.taken / STEPS) ** -0.5)
                annealed.taken += 1


register_optimizer_step_pre_hook(_record)
register_optimizer_step_post_hook(_shorten)
