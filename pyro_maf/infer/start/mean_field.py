"""Diagonal normals of the largest evidence lower bound."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_maf._core.optimization import Adam
from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.models.double_precision import Score

__all__ = ["DRAWS", "RATE", "diagonal_normal", "fixed_noise", "narrow_place", "second_derivatives"]

DRAWS = 32
RATE, BETAS = 0.2, (0.8, 0.95)
SCALE = 0.1
"""Initial scale in every direction."""


def fixed_noise(like: Tensor, seed: int = 0, draws: int = DRAWS) -> Tensor:
    """Draw standard normals in antithetic pairs, (draws, D), for vectors like this one."""
    with seeded(seed, like.device):
        noise = torch.randn(draws // 2, len(like)).to(like)
    return torch.cat([noise, -noise])


def narrow_place(loc: Tensor) -> Tensor:
    """Return location and log-scale, (2, D), of a narrow normal around a point."""
    return torch.stack([loc, torch.full_like(loc, math.log(SCALE))])


def diagonal_normal(
    score: Score, place: Tensor, steps: int, *, noise: Tensor | None = None, degree: Tensor | None = None
) -> Tensor:
    """Return location and log-scale, (2, D), of the diagonal normal that steps of Adam on the bound reach.

    Args:
        score: Log-density, up to a constant.
        place: Location and log-scale at first.
        steps: Number of steps.
        noise: Standard normals, (draws, D), the same at every step; by default others in each, as is needed where there
            are many more numbers than draws.
        degree: Numbers from 0 to 1 that the density depends on, changed along.
    """
    weights = [place.clone().requires_grad_()] + ([] if degree is None else [degree])
    optimizer = Adam(weights, betas=BETAS)
    for step in range(steps):
        with torch.enable_grad():
            draws = fixed_noise(place[0], seed=step) if noise is None else noise
            loss = -score(weights[0][0] + draws * weights[0][1].exp()).mean() - weights[0][1].sum()
        if not bool(loss.isfinite()):
            break
        gradients = torch.autograd.grad(loss, weights, materialize_grads=True)  # a site may have none
        for gradient in gradients:
            gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        optimizer.step(gradients, RATE * (1 - step / steps))
        if degree is not None:
            degree.detach().clamp_(0.0, 1.0)
    return weights[0].detach()


def second_derivatives(score: Score, points: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the gradient at points, (rows, D), and the product of minus the Hessian there with vectors, (rows, D)."""
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(score(points).sum(), points, create_graph=True)

    def product(vectors: Tensor) -> Tensor:
        return -torch.autograd.grad(gradient, points, vectors, retain_graph=True)[0]

    return gradient.detach(), product
