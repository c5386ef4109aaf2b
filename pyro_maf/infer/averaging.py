"""Exponential average of weights that oscillate around an optimum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Average"]

MEMORY = 100


class Average:
    """Exponential average of parameters over about 100 steps, and the best such average so far.

    Args:
        parameters: The parameters that the optimizer changes.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._average = [parameter.detach().clone() for parameter in parameters]
        self._kept: list[Tensor] | None = None
        self._count = 0

    @torch.no_grad()
    def add(self) -> None:
        """Add the present parameters to the average."""
        self._count += 1
        torch._foreach_lerp_(self._average, self._parameters, max(1 / self._count, 1 / MEMORY))

    def restart(self) -> None:
        """Restart the average from the next parameters on; until then it is the present ones. The best stays."""
        self._count = 0
        self._average = [parameter.detach().clone() for parameter in self._parameters]

    def keep(self) -> None:
        """Record the present average as the best."""
        self._kept = [value.clone() for value in self._average]

    @torch.no_grad()
    def use(self) -> None:
        """Set the parameters to the best average, or to the present one if none was recorded."""
        for parameter, value in zip(self._parameters, self._kept or self._average, strict=True):
            parameter.copy_(value)
