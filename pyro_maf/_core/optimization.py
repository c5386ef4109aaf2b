"""Adam in one torch call per step, gradient clipping, and an average of weights that oscillate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

from pyro_maf._core.torch_state import count_change

__all__ = ["Adam", "WeightAverage", "clip"]

BETAS = (0.9, 0.999)
EPSILON = 1e-8
FUSED = ("cpu", "cuda")
"""Types of devices on which torch has a fused Adam step for many weights."""


class Adam:
    """Adam over a fixed list of weights; the learning rate is an argument of each step.

    It computes the same values as `torch.optim.Adam`, bit for bit with `fused=True`, in two thirds of the time per
    step. Unlike `torch.optim.Adam`, it does not import torch's compiler when first built: a second, and 200 MiB.

    Attributes:
        weight_decay: Weight decay of the next step.
        steps: Number of steps of each weight.
        states: `step`, `exp_avg` and `exp_avg_sq` of each weight; write to them in place to resume from stored ones.
    """

    def __init__(
        self, weights: Sequence[Tensor], weight_decay: float = 0.0, betas: tuple[float, float] = BETAS
    ) -> None:
        self._weights = [weight.detach() for weight in weights]
        self.weight_decay, self._betas = weight_decay, betas
        # torch takes weights of one dtype and device at once.
        kinds = [(weight.dtype, weight.device) for weight in weights]
        self._groups = [[i for i, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)]
        self.reset()

    def reset(self) -> None:
        """Discard all moments and step counts."""
        # In a single tensor, since counting in 30 would take as long as the step.
        device = self._weights[0].device if self._weights else None
        self.steps = torch.zeros(len(self._weights), dtype=torch.float32, device=device)
        self.states = [
            {"step": step, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
            for step, weight in zip(self.steps, self._weights, strict=True)
        ]

    def settings(self, learning_rate: float) -> tuple[float, float, float, float, float]:
        """Constants of a step that is taken elsewhere: learning rate, weight decay, both betas and epsilon."""
        return learning_rate, self.weight_decay, *self._betas, EPSILON

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], learning_rate: float) -> None:
        """Take one step; weights without a gradient stay unchanged."""
        present = {index: gradient for index, gradient in enumerate(gradients) if gradient is not None}
        for indices in self._groups:
            taking = [index for index in indices if index in present]
            if not taking:
                continue
            states = [self.states[index] for index in taking]
            steps = [state["step"] for state in states]
            is_fused = steps[0].device.type in FUSED
            if is_fused and len(taking) == len(self._weights):
                self.steps.add_(1)
            elif is_fused:  # the other counts for itself
                torch._foreach_add_(steps, 1)
            (torch._fused_adam_ if is_fused else adam)(
                [self._weights[index] for index in taking],
                [present[index] for index in taking],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
                lr=learning_rate,
                beta1=self._betas[0],
                beta2=self._betas[1],
                weight_decay=self.weight_decay,
                eps=EPSILON,
                amsgrad=False,
                maximize=False,
            )
        # The fused step changes weights without incrementing their versions.
        count_change()


def clip(gradients: Sequence[Tensor | None], most: float) -> float:
    """Scale gradients in place to a norm of at most `most`; return the original norm, which may not be finite."""
    present = [gradient for gradient in gradients if gradient is not None]
    if not present:
        return 0.0
    if len(present) == 1:
        norm = torch.linalg.vector_norm(present[0])
    else:
        norms = torch._foreach_norm(present)
        norm = torch.linalg.vector_norm(torch.stack([each.to(norms[0].device) for each in norms]))
    if (size := float(norm)) > most:
        factor = most / (norm + 1e-6)
        for device in {gradient.device for gradient in present}:
            torch._foreach_mul_([each for each in present if each.device == device], factor.to(device))
    return size


class WeightAverage:
    r"""Exponential average of weights that initially spans fewer steps, to forget the initial weights.

    Step n moves the average a to a + f (w - a) with f = max(1 / steps, (1 + q) / (n + s + q)). Until it spans `steps`
    weights, this is a polynomial-decay average of order q over the s = 1 or 0 initial weights and those after each
    step. After Shamir & Zhang, *Stochastic Gradient Descent for Non-smooth Optimization*, 2013, section 4.

    Args:
        weights: The weights to average, which the optimizer changes in place.
        steps: Approximate number of last steps that the average spans.
        order: q: 0 initially gives the plain mean, higher values forget faster.
        with_initial: Whether the initial weights are included in the average.
    """

    def __init__(self, weights: Sequence[Tensor], steps: int, *, order: int = 0, with_initial: bool = False) -> None:
        self._weights = list(weights)
        self._steps = steps
        self._order = order
        self._initial = int(with_initial)
        self._best: list[Tensor] | None = None
        self.restart()

    def restart(self) -> None:
        """Restart the average from the current weights; the best average is retained."""
        self.load([weight.detach().clone() for weight in self._weights], 0)

    def load(self, values: list[Tensor], taken: int) -> None:
        """Resume from the values and the number of steps of another average."""
        self.values = values
        self.taken = taken

    @property
    def share(self) -> float:
        """Fraction that the weights after the next step will have in the average."""
        return max(1 / self._steps, (1 + self._order) / (self.taken + 1 + self._initial + self._order))

    @torch.no_grad()
    def add(self) -> None:
        """Add the weights after a step."""
        torch._foreach_lerp_(self.values, self._weights, self.share)
        self.taken += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the weights and their average."""
        for weight, average in zip(self._weights, self.values, strict=True):
            before = weight.clone()
            weight.copy_(average)
            average.copy_(before)
        count_change()  # also of parameters that are views of these weights

    def record_best(self) -> None:
        """Record the current average as the best."""
        self._best = [value.clone() for value in self.values]

    @torch.no_grad()
    def use_best(self) -> None:
        """Set the weights to the best average, or to the current one if none was recorded."""
        for weight, value in zip(self._weights, self._best or self.values, strict=True):
            weight.copy_(value)
        count_change()
