"""Maximum likelihood with all weights in one tensor, for densities that one compiled program differentiates."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_maf._core.optimization import Adam, WeightAverage
from pyro_maf._core.processes import Processes
from pyro_maf.distributions import Density, FlowPrior
from pyro_maf.sweep import Alone, Descent, Run
from pyro_maf.tables import Rows
from pyro_maf.training.objective import MaximumLikelihood, Step
from pyro_maf.transforms import BatchNorm

__all__ = ["JoinedLikelihood", "objective_of"]


def objective_of(density: Density, processes: Processes) -> MaximumLikelihood:
    """The objective of a fit: with joined weights if a compiled program is all of the density, and reads all of them.

    Args:
        density, processes: As in `MaximumLikelihood`.
    """
    run = density.run() if type(density) is FlowPrior else None
    # In training a batch norm is not that of the program, which may have been laid out in eval mode.
    if run is not None and not any(isinstance(member, BatchNorm) for member in density.modules()):
        weights = [id(weight) for weight in density.parameters() if weight.requires_grad]
        if sorted(map(id, run.tensors)) == sorted(weights) and all(map(_may_be_a_view, run.tensors)):
            return JoinedLikelihood(density, processes, run)
    return MaximumLikelihood(density, processes)


class JoinedLikelihood(MaximumLikelihood):
    """`MaximumLikelihood` whose gradient the compiled program computes, without a graph.

    Until it is closed, the density's weights are views of one tensor, and so are its average and Adam's: what a fit
    does with them takes one operation, however many layers there are. The numbers are those of `MaximumLikelihood`, up
    to rounding.

    Args:
        density: The prior to fit, in the data's units.
        processes: As in `MaximumLikelihood`.
        run: The program that is all of its flow.
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
        """Loss and gradient of a batch by torch, where the program does not take it."""
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
        """As of `MaximumLikelihood`, by the program alone."""
        if (mean := self._differentiate(batch)) is None:
            return self._along(self.step(batch), adam, average, learning_rate, max_norm)
        count = batch.data.shape[0]
        rows, loss = self._processes.total(count, count * mean)
        if self._processes.are_several:
            packed = self._descent.packed_gradient()
            torch._foreach_mul_(packed, count / float(rows))
            self._processes.add_up(packed)
        if not math.isfinite(loss) or not self._descent.take(adam, average, learning_rate, max_norm):
            return None
        return loss, int(rows)

    def _along(
        self, step: Step, adam: Adam, average: WeightAverage, learning_rate: float, max_norm: float
    ) -> tuple[Tensor | float, int] | None:
        with Alone():
            return super()._along(step, adam, average, learning_rate, max_norm)

    def _differentiate(self, batch: Rows) -> float | None:
        """The mean loss, with its gradient in the descent; or None, for torch to do it."""
        count = batch.data.shape[0]
        if self._share.shape[0] != count:
            self._share = self.weights[0].new_full((count,), -1 / count)
        factors = batch.weighted(self._share)
        return self.density.differentiate(self._descent, batch.data, batch.context, factors)

    def split(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of the parts of a tensor that belong to each weight."""
        (joined,) = tensors
        parts = joined.split([*self._sizes, Descent.SPARE])
        return [parts[at].view_as(own) for at, own in zip(self._places, self._parameters, strict=True)]

    def close(self) -> None:
        """Let each weight be a tensor of its own again."""
        for parameter in self._parameters:
            parameter.data = parameter.data.clone()


def _may_be_a_view(weight: Tensor) -> bool:
    """Return whether nobody notices that a weight is a view for a while: no hook waits for its gradient."""
    hooks = weight._backward_hooks, getattr(weight, "_post_accumulate_grad_hooks", None)
    return isinstance(weight, nn.Parameter) and weight.is_contiguous() and not any(hooks)
