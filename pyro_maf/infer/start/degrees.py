"""Initial degrees of centring of a guide's coordinates, and a diagonal normal in them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_maf.infer.models.coordinates import Coordinates
from pyro_maf.infer.models.double_precision import Score
from pyro_maf.infer.models.latents import Latents
from pyro_maf.infer.models.log_joint import FAILURES
from pyro_maf.infer.models.model import Call
from pyro_maf.infer.start.mean_field import diagonal_normal, fixed_noise, narrow_place, second_derivatives

__all__ = ["fit_degrees", "normal_sites"]

ROUNDS, STEPS = 3, 60
REACH, TOLERANCE = 2.0, 3e-3
"""Factor of a normal's noise within which a site is tested, and relative error of a precision: of a thousand entries
with that, the divergence is 0.002 nats."""
FEW = 200
"""Maximum number of dimensions for which the noise of all steps is the same."""


def fit_degrees(coordinates: Coordinates, latents: Latents, call: Call, score: Score, loc: Tensor) -> Tensor:
    """Set degrees of centring to the share of the data in the precision of each entry, at draws of a diagonal normal.

    The normal is that of the largest bound at fixed noise, fitted in rounds: first with degrees that are fitted along,
    then in the coordinates that the draws of the round before led to.

    Args:
        coordinates: The coordinates.
        latents: The layout of the latent vector.
        call: The model with its arguments.
        score: Log-density of coordinates, (rows, D), up to a constant.
        loc: The point at which they are centred, (D,).

    Returns:
        Location and log-scale of the normal, (2, D), in the final coordinates.

    Cost: 180 gradients for 32 rows each, and 16 products of a Hessian and a vector.
    """
    noise, place = fixed_noise(loc), narrow_place(loc)
    for number in range(ROUNDS):
        degree = coordinates.degree if number == 0 else None
        place = diagonal_normal(score, place, STEPS, noise=None if len(loc) > FEW else noise, degree=degree)
        if number + 1 < ROUNDS:
            place = _updated(coordinates, latents, call, score, place[0] + noise * place[1].exp(), place)
    return place


def _updated(
    coordinates: Coordinates, latents: Latents, call: Call, score: Score, draws: Tensor, place: Tensor
) -> Tensor:
    """Update the degrees by draws; return location and log-scale of the draws in the new coordinates."""
    with torch.no_grad():
        padded = draws.reshape(len(draws), *(1,) * latents.nesting, -1)
        images = coordinates.images(latents, padded, call)
        values = {
            name: value.reshape(len(draws), *latents.parts[name].value.shape) for name, (value, _) in images.items()
        }
    try:
        coordinates.set_by_precision(latents, *second_derivatives(score, draws), values, call)
    except FAILURES:  # such as an operation without a second derivative
        return place
    with torch.no_grad():
        moved, _ = coordinates.of_values(latents, values, call)
    if not bool(moved.isfinite().all()):
        return place
    return torch.stack([moved.mean(0), moved.std(0).clamp(min=1e-6).log()])


def normal_sites(
    coordinates: Coordinates, latents: Latents, score: Score, place: Callable[[Tensor], Tensor]
) -> list[str]:
    """Return the sites with a degree of which every entry is normal given all others, with linear mean and fixed scale.

    Of such an entry the gradient between two points differs by the product of the Hessian, at either of them, with
    their distance. The points are pairs in draws of a normal, twice as far out.

    Args:
        coordinates, latents, score: As in `fit_degrees`.
        place: The normal, as a function of standard normal noise, (rows, D).

    Cost: one gradient and one product of a Hessian and a vector.
    """
    noise = REACH * fixed_noise(latents.initial(), seed=1)
    try:
        gradient, product = second_derivatives(lambda rows: score(place(rows)), noise)
        apart, predicted = gradient - gradient.roll(len(noise) // 2, 0), 2 * product(noise)
    except FAILURES:
        return []
    errors = (apart + predicted).square().mean(0).sqrt() / (2 * REACH)
    is_normal = torch.ones_like(latents.idle)
    is_normal[~latents.idle] = errors < TOLERANCE  # False if NaN
    parts = (latents.parts[name] for name in coordinates.names)
    return [part.site["name"] for part in parts if bool(is_normal[part.start : part.stop].all())]
