"""Initial degrees of centring of a guide's coordinates, and a diagonal normal in these coordinates.

The degree of an entry is the data's share of its precision, d = p / (1 + p), where p is the precision of the data about
it given all other coordinates, in units of the prior's. Precisions are those of Hessians at draws of the normal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.models.coordinates import Coordinates
from pyro_maf.infer.models.double_precision import Score, in_double, promoted
from pyro_maf.infer.models.latents import Latents
from pyro_maf.infer.models.location_scale import LocationScale, Scale
from pyro_maf.infer.models.model import FAILURES, Call
from pyro_maf.infer.start.initialization import best_normal
from pyro_maf.infer.start.normal import RATE, diagonal_normal, fixed_noise, narrow_place, second_derivatives

__all__ = ["fit_degrees", "normal_sites"]

Product = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Products of directions of some sites, (draws, *site), with their precision given all other coordinates."""

ROUNDS, STEPS = 3, 60
FAR = RATE * STEPS / 4
"""Distance that takes half of the steps of a round, whose rate falls."""
FEW = 200
"""Maximum number of dimensions for which all steps use the same noise, and there are ascents with Hessians."""
PROBES, FULL = 8, 50
"""Number of random vectors for the diagonal of a precision, at each draw; and the size of a matrix up to which all
entries are computed. A process with data at its points has a diagonal one."""
REACH, TOLERANCE = 2.0, 3e-3
"""Factor of a normal's noise within which a site is tested, and relative error of a precision; for a thousand entries
with that error, the divergence is 0.002 nats."""


def fit_degrees(coordinates: Coordinates, latents: Latents, call: Call, score: Score, loc: Tensor) -> Tensor:
    """Set degrees of centring to the data's share of the precision of each entry, at draws of a diagonal normal.

    The normal maximises the bound at fixed noise. It is fitted in rounds: first with degrees that are fitted as well,
    then in the coordinates that result from the draws of the previous round.

    Args:
        coordinates: The coordinates.
        latents: The layout of the latent vector.
        call: The model with its arguments.
        score: Log-density of coordinates, (rows, D), up to a constant.
        loc: The point at which they are centred, (D,).

    Returns:
        Location and log-scale of the normal, (2, D), in the final coordinates.

    Cost: 180 gradients for 32 rows each, and 16 Hessian-vector products; if the normal is far from `loc`, an ascent and
        60 more gradients.
    """
    noise = fixed_noise(loc)
    fixed = None if len(loc) > FEW else noise
    place = diagonal_normal(score, narrow_place(loc), STEPS, noise=fixed, degree=coordinates.degree)
    if len(loc) <= FEW and bool(((place[0] - loc).abs() > FAR).any()):
        # Adam's steps have the units of the latent variables, and end half-way to an intercept of hundreds.
        normal = best_normal(score, loc)
        scale = torch.cholesky_inverse(normal.scale_tril).diagonal().rsqrt()
        place = torch.stack([normal.loc, scale.log()])
        place = diagonal_normal(score, place, STEPS, noise=fixed, degree=coordinates.degree)
    update = partial(_fix_degrees, coordinates, latents, call, score)
    for _ in range(ROUNDS - 1):
        place = _moved(update, score, place[0] + noise * place[1].exp(), place)
        place = diagonal_normal(score, place, STEPS, noise=fixed)
    return place


def _moved(update: Callable[[Tensor], Tensor], score: Score, draws: Tensor, place: Tensor) -> Tensor:
    """Update the degrees from draws; return their new location and log-scale, or `place` where that fails."""
    try:
        # The data's contribution to the precision of a smooth process is a millionth of it.
        is_wide = in_double(score, draws[0]) is not None
        moved = (promoted(update)(draws.double()) if is_wide else update(draws)).to(place)
    except FAILURES:  # for instance of an operation without a second derivative
        return place
    if not bool(moved.isfinite().all()):
        return place
    return torch.stack([moved.mean(0), moved.std(0).clamp(min=1e-6).log()])


def _fix_degrees(coordinates: Coordinates, latents: Latents, call: Call, score: Score, draws: Tensor) -> Tensor:
    """Fix each degree at the data's share of the precision given the rest, at draws; return them in new coordinates.

    The rest are coordinates. For a site that is the location of others, the contribution of these is then that of their
    data, since they would move along with it.
    """
    with torch.no_grad():
        values = latents.sites(draws, draws.shape[:1], partial(coordinates.images, latents, call=call))
    gradient, product = second_derivatives(score, draws)
    with torch.no_grad():
        priors = coordinates.priors(latents, values, call)
        slopes = {name: coordinates.slope(latents.parts[name], prior) for name, prior in priors.items()}
        along = partial(_precision_along, latents, slopes, gradient, product)
        matrices = {name: prior for name, prior in priors.items() if prior.scale.is_matrix}
        shares = _shares({name: prior for name, prior in priors.items() if name not in matrices}, along)
        precisions = _precisions(matrices, along)
        coordinates.settle(priors)
        entries, pulls = latents.pack(values)[0], _by_entry(latents, gradient)
        for name, (loc, scale) in priors.items():
            span = _span(latents, name)
            value, pull = entries[:, span].reshape(loc.shape), pulls[:, span].reshape(loc.shape)
            of_data = slopes[name].transposed_solve(pull) + scale.transposed_solve(scale.solve(value - loc))
            if name in matrices:
                coordinates.fix_matrix(name, of_data.mean(0), value.mean(0), precisions[name])
            else:
                coordinates.fix(name, of_data.mean(0), value.mean(0), shares[name])
        return coordinates.of_values(latents, values, call)[0]


def _span(latents: Latents, name: str) -> slice:
    """Entries of a site."""
    return slice(latents.parts[name].start, latents.parts[name].stop)


def _by_entry(latents: Latents, vectors: Tensor) -> Tensor:
    """Vectors, (draws, D), with zeros for idle entries."""
    entries = vectors.new_zeros(len(vectors), len(latents.idle))
    entries[:, ~latents.idle] = vectors
    return entries


def _precision_along(
    latents: Latents,
    slopes: Mapping[str, Scale],
    gradient: Tensor,
    product: Callable[[Tensor], Tensor],
    directions: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Products of directions of some sites, (draws, *site), with their precision given all other coordinates.

    They are products of coordinates with minus the Hessian of the log-density, divided by dv/dc on either side.
    """
    vectors = gradient.new_zeros(len(gradient), len(latents.idle))
    for name, direction in directions.items():
        vectors[:, _span(latents, name)] = slopes[name].solve(direction).reshape(len(gradient), -1)
    image = _by_entry(latents, product(vectors[:, ~latents.idle]))
    return {
        name: slopes[name].transposed_solve(image[:, _span(latents, name)].reshape(direction.shape))
        for name, direction in directions.items()
    }


def _signs(like: Tensor) -> Tensor:
    """Random signs in the shape of a tensor."""
    return 2.0 * torch.randint(0, 2, like.shape).to(like) - 1


def _shares(priors: Mapping[str, LocationScale], along: Product) -> dict[str, Tensor]:
    """Precision of the data about each entry given all other coordinates, relative to the prior's at the mean scale.

    Uses Hutchinson's estimate of the diagonal. Sites are probed in turn, so that dependence between neighbours in the
    model does not add noise.
    """
    total: dict[str, Tensor] = {}
    turns = min(PROBES, len(priors))
    for turn in range(turns):
        names, probes = list(priors)[turn::turns], range(turn, PROBES, turns)
        for probe in probes:
            with seeded(probe, priors[names[0]].loc.device):
                signs = {name: _signs(priors[name].loc) for name in names}
            for name, image in along({name: priors[name].scale.times(sign) for name, sign in signs.items()}).items():
                square = (signs[name] * priors[name].scale.times(image)).mean(0)
                total[name] = total.get(name, 0.0) + square / len(probes)
    usual = {name: (2 * scale.tensor.log().mean(0)).exp() for name, (_, scale) in priors.items()}
    return {
        name: (each - 1).clamp(min=0.0) * usual[name] / priors[name].scale.tensor.square().mean(0)
        for name, each in total.items()
    }


def _precisions(priors: Mapping[str, LocationScale], along: Product) -> dict[str, Tensor]:
    """Precision matrix of the data about each site given all other coordinates, (*site, n); in turn, as above."""
    with seeded(0, next((prior.loc.device for prior in priors.values()), None)):
        probes = {name: _probes(prior.loc[0]) for name, prior in priors.items()}
    columns: dict[str, list[Tensor]] = {name: [] for name in priors}
    for turn in range(PROBES):
        names = list(priors)[turn::PROBES]
        for number in range(max((len(probes[name]) for name in names), default=0)):
            probed = [name for name in names if number < len(probes[name])]
            directions = {name: probes[name][number].expand_as(priors[name].loc) for name in probed}
            for name, image in along(directions).items():
                scale = priors[name].scale
                of_prior = scale.transposed_solve(scale.solve(directions[name]))
                columns[name].append((image - of_prior).mean(0))
    return {name: _positive(_of_columns(probes[name], torch.stack(each))) for name, each in columns.items()}


def _probes(like: Tensor) -> Tensor:
    """Directions in the shape of a site, (probes, *site): each unit vector or, of many entries, random signs.

    Unit vectors have a random sign in each plate. Neighbours in plates depend on each other only through other sites:
    their signs add no noise.
    """
    signs = torch.stack([_signs(like) for _ in range(PROBES)])
    if like.shape[-1] > FULL:
        return signs
    return torch.stack([signs[0, ..., :1] * unit for unit in torch.eye(like.shape[-1]).to(signs)])


def _of_columns(probes: Tensor, columns: Tensor) -> Tensor:
    """The matrix, or its diagonal, from its products with the probes, (probes, *site)."""
    if probes.shape[-1] <= FULL:
        return (columns * probes.sum(-1, keepdim=True)).movedim(0, -1)
    return (probes * columns).mean(0).diag_embed()


def _positive(matrix: Tensor) -> Tensor:
    """The symmetric part of a matrix, with negative eigenvalues set to 0; 0 if it is not finite."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) / 2)
    return (vectors * values.clamp(min=0.0)[..., None, :]) @ vectors.mT


def normal_sites(
    coordinates: Coordinates, latents: Latents, score: Score, place: Callable[[Tensor], Tensor]
) -> list[str]:
    """Return the sites with a degree whose entries are all normal given the others, with linear mean and fixed scale.

    For such an entry, the gradients at two points differ by the product of the Hessian, at either of them, with their
    difference. The points are pairs of draws of a normal, twice as far out.

    Args:
        coordinates, latents, score: As in `fit_degrees`.
        place: The normal, as a function of standard normal noise, (rows, D).

    Cost: one gradient and one Hessian-vector product.
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
