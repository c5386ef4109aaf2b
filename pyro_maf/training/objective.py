"""Maximum likelihood: the loss of a batch with its gradient, and the validation loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_maf._core.optimization import Adam, WeightAverage, clip
from pyro_maf._core.processes import Processes
from pyro_maf.distributions import Density
from pyro_maf.distributions.context_net import BATCH_NORMS
from pyro_maf.tables import Rows
from pyro_maf.transforms import ActNorm, BatchNorm
from pyro_maf.transforms.normalization import statistics_over_processes

__all__ = ["MaximumLikelihood", "Mean", "Step"]


class Step(NamedTuple):
    """Loss of a batch with its gradient, of all processes together.

    Attributes:
        loss: Negative log-likelihood of the rows, their (weighted) sum in nats, without gradient.
        rows: Number of rows.
        gradients: Gradient of the mean loss with respect to each weight; None for one that it does not depend on.
    """

    loss: Tensor | float
    rows: int
    gradients: list[Tensor | None]


class MaximumLikelihood:
    """Mean negative log-likelihood of rows under a density.

    Rows may have weights of mean 1 over a pass: sums over a batch are weighted, and divided by its number of rows. That
    is an unbiased gradient for any weights, which a division by the weights of the batch would not be.

    Args:
        density: The density to fit, in the data's units.
        processes: The processes that each have a part of every batch.

    Attributes:
        weights: The weights that are trained.
    """

    def __init__(self, density: Density, processes: Processes) -> None:
        self.density = density
        self.weights: list[Tensor] = [weight for weight in density.parameters() if weight.requires_grad]
        self._processes = processes
        self._batch_norms = [member for member in density.modules() if isinstance(member, (BatchNorm, BATCH_NORMS))]
        self._has_act_norm = any(isinstance(member, ActNorm) for member in density.modules())
        self._taken_gradients()

    def step(self, batch: Rows) -> Step:
        """Loss and gradient of a batch, by one pass through the density and back."""
        rows, loss = self._backward(batch)
        gradients = self._taken_gradients()
        if self._processes.are_several:
            self._processes.add_up(self._checked(gradients))
        return Step(loss, int(rows), gradients)

    def descend(
        self, batch: Rows, adam: Adam, average: WeightAverage, learning_rate: float, max_norm: float
    ) -> tuple[Tensor | float, int] | None:
        """Take a step of Adam, and add the weights to their average, unless the loss or its gradient is not finite.

        Args:
            batch: The rows.
            adam, average: Of the weights.
            learning_rate: Learning rate.
            max_norm: Norm to which the gradient is clipped.

        Returns:
            `loss` and `rows` of `Step`, or None if no step was taken.
        """
        return self._along(self.step(batch), adam, average, learning_rate, max_norm)

    def _along(
        self, step: Step, adam: Adam, average: WeightAverage, learning_rate: float, max_norm: float
    ) -> tuple[Tensor | float, int] | None:
        """Take a step along a gradient, as `descend`."""
        norm = clip(step.gradients, max_norm)
        if not math.isfinite(norm + float(step.loss)):
            return None
        adam.step(step.gradients, learning_rate)
        average.add()
        return step.loss, step.rows

    def _backward(self, batch: Rows) -> tuple[Tensor | float, Tensor | float]:
        """Add the gradient to the weights; number of rows and their loss, in all processes."""
        with statistics_over_processes() if self._processes.are_several else nullcontext():
            log_likelihood = batch.weighted(self.density.log_density(batch.data, batch.context)).sum()
        rows, loss = self._processes.total(len(batch.data), -log_likelihood.detach())
        (-log_likelihood * (1 / rows)).backward()
        return rows, loss

    @torch.no_grad()
    def losses(self, batches: Iterable[Rows | tuple[()]]) -> Tensor:
        """Loss of each row of this process, (rows,), on the CPU."""
        losses = [
            -batch.weighted(self.density.log_density(batch.data, batch.context))
            for batch in batches
            if isinstance(batch, Rows)
        ]
        return torch.cat(losses).cpu() if losses else torch.empty(0)

    def mean(self, losses: Tensor) -> float:
        """Mean over the rows of all processes.

        Args:
            losses: Loss of each row of this process, (rows,).
        """
        total, rows = map(float, self._processes.total(losses.sum(dtype=torch.float64), len(losses)))
        return total / rows

    def doubt(self, gain: Tensor) -> float:
        """Two standard deviations of a mean gain given those of the rows, by Student's t: infinite of up to three rows.

        Args:
            gain: Gain of each row of this process, (rows,).
        """
        rows, total, squares = map(float, self._processes.total(len(gain), gain.sum(), gain.square().sum()))
        variance = max(0.0, squares / rows - (total / rows) ** 2)
        return 2 * math.sqrt(variance / (rows - 3)) if rows > 3 else math.inf

    def fit_statistics(self, sample: Callable[[], Rows], *, initial: bool = False) -> None:
        """Set the statistics that layers take from data, if there are any.

        Args:
            sample: Called for training rows.
            initial: Whether to set also those that are set once, before the first step.
        """
        if self._batch_norms or (initial and self._has_act_norm):
            self.density.fit_statistics(*sample()[:2])

    def split(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors for each weight of the density that is trained, from tensors for each of `weights`."""
        return list(tensors)

    def close(self) -> None:
        """Leave the density with tensors of its own."""

    def _taken_gradients(self) -> list[Tensor | None]:
        """Take the gradients from the weights, which are left without, so that none is added to later."""
        gradients = [weight.grad for weight in self.weights]
        for weight in self.weights:
            weight.grad = None
        return gradients

    def _checked(self, gradients: list[Tensor | None]) -> list[Tensor]:
        """Refuse weights without a gradient, which could be some in one process and others in the next."""
        names = [name for name, weight in self.density.named_parameters() if weight.requires_grad]
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is None:
                raise ValueError(
                    f"fit with several processes expected log_prob to depend on every weight, but not on {name}: "
                    "freeze it by requires_grad_(False)."
                )
        return [gradient for gradient in gradients if gradient is not None]


class Mean:
    """Mean over rows. Its sum stays on the device until it is taken, since reading synchronises.

    Attributes:
        total: Sum so far.
        count: Number of rows so far.
    """

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, total: Tensor | float, count: int) -> None:
        """Add the sum over `count` rows."""
        self.total = self.total + total
        self.count += count

    def take(self) -> float:
        """Return the mean, NaN of no rows, and reset."""
        total, count = self.total, self.count
        self.total, self.count = 0.0, 0
        return float(total) / count if count else float("nan")
