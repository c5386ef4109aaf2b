"""Maximum likelihood: the loss of a batch and its gradient, an optimizer step, and the validation loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_maf._core.optimization import Adam, WeightAverage, clip
from pyro_maf._core.processes import Processes
from pyro_maf.distributions import Density, FlowPrior
from pyro_maf.distributions.context_net import BATCH_NORMS
from pyro_maf.sweep import Descent, Run
from pyro_maf.tables import Rows
from pyro_maf.transforms import ActNorm, BatchNorm
from pyro_maf.transforms.normalization import statistics_over_processes

__all__ = ["JoinedLikelihood", "MaximumLikelihood", "Step", "objective_of"]


class Step(NamedTuple):
    """Loss of a batch and its gradient, over all processes.

    Attributes:
        loss: Negative log-likelihood of the rows, a (weighted) sum in nats, without gradient.
        rows: Number of rows.
        gradients: Gradient of the mean loss with respect to each weight; None if the loss does not depend on it.
    """

    loss: Tensor | float
    rows: int
    gradients: list[Tensor | None]


def objective_of(density: Density, processes: Processes) -> MaximumLikelihood:
    """The objective of a fit; weights are joined if a compiled program covers the density and reads all of them."""
    run = density.run() if type(density) is FlowPrior else None
    # In training mode, batch norm differs from that of the program, which may have been built in eval mode.
    if run is not None and not any(isinstance(member, BatchNorm) for member in density.modules()):
        weights = [id(weight) for weight in density.parameters() if weight.requires_grad]
        if sorted(map(id, run.tensors)) == sorted(weights) and all(map(_may_be_a_view, run.tensors)):
            return JoinedLikelihood(density, processes, run)
    return MaximumLikelihood(density, processes)


class MaximumLikelihood:
    """Mean negative log-likelihood of rows under a density.

    Rows may have weights with mean 1 over an epoch: sums over a batch are weighted and divided by its number of rows.
    That gives an unbiased gradient for any weights, unlike dividing by the sum of the batch's weights.

    Args:
        density: The density to fit, in the data's units.
        processes: The processes, each of which has a part of every batch.

    Attributes:
        weights: The parameters that are trained.
    """

    def __init__(self, density: Density, processes: Processes) -> None:
        self.density = density
        self.weights: list[Tensor] = [weight for weight in density.parameters() if weight.requires_grad]
        self._processes = processes
        self._batch_norms = [member for member in density.modules() if isinstance(member, (BatchNorm, BATCH_NORMS))]
        self._has_act_norm = any(isinstance(member, ActNorm) for member in density.modules())
        self._taken_gradients()

    def step(self, batch: Rows) -> Step:
        """Loss and gradient of a batch, from a forward and a backward pass through the density."""
        rows, loss = self._backward(batch)
        gradients = self._taken_gradients()
        if self._processes.are_several:
            self._processes.add_up(self._checked(gradients))
        return Step(loss, int(rows), gradients)

    def descend(
        self, batch: Rows, adam: Adam, average: WeightAverage, learning_rate: float, max_norm: float
    ) -> tuple[Tensor | float, int] | None:
        """Take an Adam step with the gradient clipped to a norm, and add the weights to their average.

        Returns:
            `loss` and `rows` of `Step`, or None if loss or gradient were not finite, and no step was taken.
        """
        loss, rows, gradients = self.step(batch)
        if not math.isfinite(clip(gradients, max_norm) + float(loss)):
            return None
        adam.step(gradients, learning_rate)
        average.add()
        return loss, rows

    def _backward(self, batch: Rows) -> tuple[Tensor | float, Tensor | float]:
        """Accumulate the gradient in the weights; return the number of rows and their loss, over all processes."""
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
        """Mean loss over the rows of all processes, from the losses of this one, (rows,)."""
        total, rows = map(float, self._processes.total(losses.sum(dtype=torch.float64), len(losses)))
        return total / rows

    def doubt(self, gain: Tensor) -> float:
        """Two standard deviations of the mean of gains, (rows,), by Student's t; infinite for up to three rows."""
        rows, total, squares = map(float, self._processes.total(len(gain), gain.sum(), gain.square().sum()))
        variance = max(0.0, squares / rows - (total / rows) ** 2)
        return 2 * math.sqrt(variance / (rows - 3)) if rows > 3 else math.inf

    def fit_statistics(self, sample: Callable[[], Rows], *, initial: bool = False) -> None:
        """Set layer statistics, if any, from a sample of training rows; the `initial` ones only once."""
        if self._batch_norms or (initial and self._has_act_norm):
            self.density.fit_statistics(*sample()[:2])

    def split(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Split tensors for each of `weights` into tensors for each trained parameter of the density."""
        return list(tensors)

    def close(self) -> None:
        """Release the density's parameters from shared storage; a no-op here."""

    def _taken_gradients(self) -> list[Tensor | None]:
        """Take the gradients from the weights and reset them, so that nothing is added to them later."""
        gradients = [weight.grad for weight in self.weights]
        for weight in self.weights:
            weight.grad = None
        return gradients

    def _checked(self, gradients: list[Tensor | None]) -> list[Tensor]:
        """Raise if a weight has no gradient: which weights have one might differ between processes."""
        names = [name for name, weight in self.density.named_parameters() if weight.requires_grad]
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is None:
                raise ValueError(
                    f"fit with several processes expected log_prob to depend on every weight, but not on {name}: "
                    "freeze it by requires_grad_(False)."
                )
        return [gradient for gradient in gradients if gradient is not None]


class JoinedLikelihood(MaximumLikelihood):
    """`MaximumLikelihood` whose gradient is computed by the compiled program, without a graph.

    Until it is closed, the density's parameters are views of a single tensor, as are their average and Adam's state, so
    that each update is one operation, however many layers there are. Results equal those of `MaximumLikelihood` up to
    rounding.

    Args:
        density, processes: As in `MaximumLikelihood`.
        run: The program, which covers the density's whole flow.
    """

    density: FlowPrior

    def __init__(self, density: FlowPrior, processes: Processes, run: Run) -> None:
        super().__init__(density, processes)
        self._parameters: Sequence[Tensor] = self.weights
        self._sizes = [tensor.numel() for tensor in run.tensors]
        numbers = {id(tensor): number for number, tensor in enumerate(run.tensors)}
        self._places = [numbers[id(parameter)] for parameter in self._parameters]
        with torch.no_grad():
            spare = run.tensors[0].new_zeros(Descent.SPARE)
            self.weights = [torch.cat([*(tensor.flatten() for tensor in run.tensors), spare])]
        for parameter, view in zip(self._parameters, self.split(self.weights), strict=True):
            parameter.data = view
        self._descent = Descent(run, *self.weights)
        self._share = spare[:0]
        """-1 / rows for each row of a batch."""

    def step(self, batch: Rows) -> Step:
        """Loss and gradient of a batch by torch, for batches that the program does not support."""
        rows, loss = self._backward(batch)
        gradient = torch.zeros_like(*self.weights)
        for parameter, part in zip(self._parameters, self.split([gradient]), strict=True):
            if parameter.grad is not None:
                part.copy_(parameter.grad)
            parameter.grad = None
        if self._processes.are_several:
            self._processes.add_up([gradient])
        return Step(loss, int(rows), [gradient])

    def descend(
        self, batch: Rows, adam: Adam, average: WeightAverage, learning_rate: float, max_norm: float
    ) -> tuple[Tensor | float, int] | None:
        """As in `MaximumLikelihood`, entirely by the program if it supports the batch."""
        count = batch.data.shape[0]
        if self._share.shape[0] != count:
            self._share = self.weights[0].new_full((count,), -1 / count)
        factors = batch.weighted(self._share)
        mean = self.density.differentiate(self._descent, batch.data, batch.context, factors)
        if mean is None:
            return super().descend(batch, adam, average, learning_rate, max_norm)
        rows, loss = self._processes.total(count, count * mean)
        if self._processes.are_several:
            packed = self._descent.packed_gradient()
            torch._foreach_mul_(packed, count / float(rows))
            self._processes.add_up(packed)
        if not math.isfinite(loss) or not self._descent.step(adam, average, learning_rate, max_norm):
            return None
        return loss, int(rows)

    def split(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of the parts of a tensor that belong to each parameter."""
        (joined,) = tensors
        parts = joined.split([*self._sizes, Descent.SPARE])
        return [parts[at].view_as(parameter) for at, parameter in zip(self._places, self._parameters, strict=True)]

    def close(self) -> None:
        """Give each parameter its own tensor again."""
        for parameter in self._parameters:
            parameter.data = parameter.data.clone()


def _may_be_a_view(weight: Tensor) -> bool:
    """Return whether a parameter may be a view for a while unnoticed: no hook waits for its gradient."""
    hooks = weight._backward_hooks, getattr(weight, "_post_accumulate_grad_hooks", None)
    return isinstance(weight, nn.Parameter) and weight.is_contiguous() and not any(hooks)
