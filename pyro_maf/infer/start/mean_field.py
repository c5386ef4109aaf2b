"""Diagonal normals of the largest evidence lower bound."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_maf._core.optimization import Adam
from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.models.double_precision import Score
from pyro_maf.infer.models.log_joint import FAILURES
from pyro_maf.infer.models.recording import Derivatives, Recording, plain_derivatives, record

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
    place = place.detach().clone()
    trained = [] if degree is None else [degree]
    optimizer = Adam([place, *trained], betas=BETAS)
    recording: Recording | None = None
    for step in range(steps):
        draws = fixed_noise(place[0], seed=step) if noise is None else noise
        points = place[0] + draws * place[1].exp()
        if step == 0:
            recording = record(score, points, trained)
        found = _recorded(recording, points) or plain_derivatives(score, points, trained)
        if not bool(found.values.mean().isfinite()):
            break
        loc, scale = found.gradient.mean(0), (found.gradient * draws).mean(0) * place[1].exp()
        gradients = [torch.stack([-loc, -scale - 1])]
        pairs = zip(trained, found.of_weights, strict=True)
        gradients += [torch.zeros_like(each) if pull is None else -pull / len(draws) for each, pull in pairs]
        for gradient in gradients:
            gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        optimizer.step(gradients, RATE * (1 - step / steps))
        for each in trained:
            each.detach().clamp_(0.0, 1.0)
    return place


def _recorded(recording: Recording | None, points: Tensor) -> Derivatives | None:
    """Derivatives by a recording; None without one, or where it fails or is of another outcome."""
    try:
        return None if recording is None else recording(points)
    except FAILURES:
        return None


def second_derivatives(score: Score, points: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the gradient at points, (rows, D), and the product of minus the Hessian there with vectors, (rows, D)."""
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(score(points).sum(), points, create_graph=True)

    def product(vectors: Tensor) -> Tensor:
        return -torch.autograd.grad(gradient, points, vectors, retain_graph=True)[0]

    return gradient.detach(), product
