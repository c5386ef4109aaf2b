"""Maximum likelihood with all weights in one tensor, for densities that one compiled program differentiates."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from pyro_maf._core.processes import Processes
from pyro_maf.distributions import Density, FlowPrior
from pyro_maf.sweep import Alone, Run
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
        self._run = run
        self._parameters: Sequence[Tensor] = self.weights
        self._sizes = [tensor.numel() for tensor in run.tensors]
        numbers = {id(tensor): number for number, tensor in enumerate(run.tensors)}
        self._places = [numbers[id(parameter)] for parameter in self._parameters]
        with torch.no_grad():
            joined = torch.cat([tensor.flatten() for tensor in run.tensors])
        self.weights = [joined]
        self._gradient = torch.zeros_like(joined)
        for parameter, view in zip(self._parameters, self.split(self.weights), strict=True):
            parameter.data = view

    def step(self, batch: Rows) -> Step:
        """Loss and gradient of a batch, by one pass through the program and back."""
        count = len(batch.data)
        factors = batch.weighted(batch.data.new_full((count,), -1 / count, dtype=self._gradient.dtype))
        density = self.density.differentiate(self._run, batch.data, batch.context, factors, self._gradient)
        if density is None:
            rows, loss = self._backward(batch)
            parts = self.split([self._gradient])
            for parameter, part in zip(self._parameters, parts, strict=True):
                part.copy_(parameter.grad) if parameter.grad is not None else part.zero_()
                parameter.grad = None
        else:
            rows, loss = self._processes.total(count, -batch.weighted(density).sum())
        if self._processes.are_several:
            if density is not None:
                self._gradient.mul_(count / float(rows))
            self._processes.add_up([self._gradient])
        return Step(loss, int(rows), [self._gradient])

    def split(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Views of the parts of a tensor that belong to each weight."""
        (joined,) = tensors
        parts = joined.split(self._sizes)
        return [parts[at].view_as(own) for at, own in zip(self._places, self._parameters, strict=True)]

    def between_steps(self) -> AbstractContextManager[None]:
        """Context with one thread of torch's."""
        return Alone()

    def close(self) -> None:
        """Let each weight be a tensor of its own again."""
        for parameter in self._parameters:
            parameter.data = parameter.data.clone()


def _may_be_a_view(weight: Tensor) -> bool:
    """Return whether nobody notices that a weight is a view for a while: no hook waits for its gradient."""
    hooks = weight._backward_hooks, getattr(weight, "_post_accumulate_grad_hooks", None)
    return isinstance(weight, nn.Parameter) and weight.is_contiguous() and not any(hooks)
