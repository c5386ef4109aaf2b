"""Posterior of a guide's latent vector: its density, a normal to start the guide with, and quantiles of draws."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from pyro import poutine
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions.constraints import Constraint
from torch.quasirandom import SobolEngine

from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.models.coordinates import Coordinates, coordinates_of
from pyro_maf.infer.models.enumeration import is_enumerated
from pyro_maf.infer.models.latents import UNIFORM, Images, Latents, Part
from pyro_maf.infer.models.log_joint import FAILURES, LogJoint
from pyro_maf.infer.models.model import Call, Model, RefusalError, Trace, latent_sites, sample_sites
from pyro_maf.infer.start.degrees import fit_degrees, normal_sites
from pyro_maf.infer.start.initialization import ALONE_POOL, DENSE, Normal, Start, best_start, other_points
from pyro_maf.infer.start.mean_field import narrow_place
from pyro_maf.infer.start.symmetry import exchanges
from pyro_maf.infer.start.wide_normal import WideNormal, wide_start

__all__ = ["Levels", "Posterior", "checked_levels", "even_noise", "marginal_quantiles", "start_of", "without_blocks"]

PRIOR_DRAWS = 64
TRIES = 100
"""Maximum number of points at which a model is tried, as in NUTS, that raises or is improbable at initial values."""
POINTS = 4
"""Number of points at which the effect of masked entries is tested."""
MINIBATCHES = 8
"""Maximum number of minibatches of a plate that subsamples; they stand for the others."""
NEAR = 0.1
"""Spread of points for the test of a symmetry, and the distance from which on an image is elsewhere."""
STEP = 0.3
"""Displacement of latent variables, in unconstrained space, for the test if a support moves with them."""
QUANTILE_DRAWS = 8192
MOST_COLUMNS = 1024
"""Maximum number of columns at a time: `torch.quantile` takes no more than 16 million numbers."""

Levels = float | Sequence[float] | Tensor
"""Levels of quantiles, in [0, 1]."""


def start_of(
    call: Call, prototype: Trace, latents: Latents, scale: float | None, start_is_chosen: bool
) -> tuple[Start | WideNormal, Coordinates | None]:
    """Initialise a guide: return its normals, and the coordinates that it is in, or None.

    Leave out of `latents` entries that a mask excludes from the model: they have no posterior.

    Args:
        call, prototype, latents: As in `Posterior`.
        scale: Scale of an isotropic normal at the initial values, or None for the best normal of an ascent.
        start_is_chosen: True if the user chose the starting point. If not, there are ascents from other points too,
            for a model that scores many draws in one run.

    Raises:
        ValueError: For a support that moves in a model that cannot be run for many draws, or if all entries are left
            out.
    """
    moving = _moving_supports(call, latents)
    latents.release(moving)
    has_masks = latents.has_masks()
    posterior = Posterior(call, prototype, latents) if scale is None or has_masks else None
    if has_masks and posterior is not None:
        posterior.leave_out_idle()
    coordinates = coordinates_of(call, latents, moving)
    if moving and coordinates is None:
        raise RefusalError(
            f"{latents.who} expected a model that can be run for many draws at once up to its last latent site, since "
            f"the support of {moving[0]} depends on other sites: draw a number with a fixed support, such as the unit "
            "interval, and scale it."
        )
    loc = latents.initial() if posterior is None else posterior.centre
    if coordinates is not None:
        if posterior is not None and not start_is_chosen:
            loc = _moderate(posterior, loc)
        values = {name: value[0] for name, value in latents.sites(loc[None], torch.Size([1])).items()}
        loc = coordinates.centre(latents, values, call)
    if scale is not None or posterior is None or not posterior.is_complete:
        return _isotropic(loc, 0.1 if scale is None else scale), coordinates
    if not posterior.is_vectorised:
        others = posterior.centre[None, :][:0]
        if not start_is_chosen:
            others = other_points(posterior, posterior.centre, posterior.prior_vectors(ALONE_POOL), vectorised=False)
        if moving and coordinates is not None:
            start = best_start(posterior.within(coordinates), loc, vectorised=False)
        else:
            start, coordinates = best_start(posterior, posterior.centre, others, vectorised=False), None
        posterior.check_sites()
        return start, coordinates
    if coordinates is None:
        return _start_near(posterior, narrow_place(loc), [], start_is_chosen), None
    place, posterior = narrow_place(loc), posterior.within(coordinates)
    if coordinates.degree.numel():
        place = fit_degrees(coordinates, latents, call, posterior, loc)
    near = _start_near(posterior, place, [Normal(place[0], place[1].exp().diag())], start_is_chosen)
    normals = (near,) if isinstance(near, WideNormal) else near.normals
    if len(normals) == 1:
        coordinates.normal = normal_sites(coordinates, latents, posterior, normals[0].of_noise)
    return near, coordinates


@torch.no_grad()
def _moderate(posterior: Posterior, loc: Tensor) -> Tensor:
    """Return a point, or the nearest one of the cube in which NUTS is started if that is more probable."""
    points = torch.stack([loc, loc.clamp(-UNIFORM, UNIFORM)])
    return points[int(posterior(points).argmax())]


def _start_near(posterior: Posterior, place: Tensor, proposals: list[Normal], is_chosen: bool) -> Start | WideNormal:
    """Initialise a guide of a model that scores many draws in one run, from a diagonal normal, (2, D)."""
    if place.shape[1] > DENSE:
        return wide_start(posterior, place)
    if is_chosen:
        return best_start(posterior, place[0], proposals=proposals)
    others = other_points(posterior, place[0], posterior.prior_vectors(PRIOR_DRAWS))
    return best_start(posterior, place[0], others, proposals=proposals, images=posterior.images)


def _isotropic(loc: Tensor, scale: float) -> Start | WideNormal:
    """Return a normal with the same scale in every direction."""
    if len(loc) > DENSE:
        return WideNormal.diagonal(loc, torch.full_like(loc, scale))
    return Start.single(Normal.isotropic(loc, scale))._replace(is_fitted=False)


class Posterior:
    r"""log p(x, z(v)) |det dz/dv| in nats, (draws,), for latent vectors v, (draws, D).

    Discrete sites that are enumerated in parallel are summed out, including those that `pyro.poutine.block` hides from
    a guide. Where a plate subsamples data, the rows of some minibatches stand for all.

    Args:
        call: The model of the guide, with its arguments.
        prototype: The trace that defines the guide's layout.
        latents: The layout of the latent vector.

    Attributes:
        centre: A latent vector that the model can score, (D,): that of the initial values if it is one.
        is_complete: True if it is the posterior: no other random draws, and the latent variables of all rows.
        is_vectorised: True if one run of the model scores many draws.
    """

    def __init__(self, call: Call, prototype: Trace, latents: Latents) -> None:
        for candidate in (call.of(without_blocks(call.program)), call):
            example = candidate.replayed(prototype)
            hidden = [site for name, site in latent_sites(example).items() if name not in latents.parts]
            if all(map(is_enumerated, hidden)):
                break  # and there are latent variables that belong to another guide
        by_row = bool(latents.shapes_of_all_rows)
        shapes = {name: value.shape for name, value in latents.values.items()}
        most = math.inf if by_row else MINIBATCHES
        self._latents, self._call = latents, call
        self._coordinates: Coordinates | None = None
        self._joint = LogJoint(candidate, example, shapes=shapes, most_minibatches=most)
        self.centre = self._centre()
        near = self.centre + torch.tensor([[0.0], [0.01]]).to(self.centre)
        self._joint.settle(self._unpacked(near)[0])
        self.is_vectorised = self._joint.is_vectorised
        self.is_complete = not self._joint.is_random and not (by_row and self._joint.partial)

    def _centre(self) -> Tensor:
        """The initial values, or else the first point of the cube that the model can score, as one vector."""
        initial = self._latents.initial()
        with seeded(0, initial.device):
            cube = UNIFORM * (2 * torch.rand(TRIES, len(initial), device=initial.device) - 1).to(initial)
        points = torch.cat([initial[None], cube])
        return next((point for point in points if self._joint.can_score(self._unpacked(point[None])[0])), initial)

    def within(self, coordinates: Coordinates) -> Posterior:
        """Return the same density, as one of coordinates."""
        twin = copy.copy(self)
        twin._coordinates = coordinates
        return twin

    def __call__(self, latents: Tensor) -> Tensor:
        """Return the log-density of latent vectors, (draws, D), in nats, (draws,)."""
        values, log_det = self._unpacked(latents)
        return self._joint(values) + log_det

    def check_sites(self) -> None:
        """Check that all runs so far had the same sites, as `LogJoint`."""
        self._joint.check_sites(self._latents.who)

    def prior_vectors(self, count: int) -> Tensor | None:
        """Draw latent vectors from the prior, (count, D); None if that is not possible, as with an improper one."""
        try:
            return self.packed(self._joint.prior_draws(count))
        except (*FAILURES, NotImplementedError, KeyError):  # the last of a site that not every run has
            return None

    @torch.no_grad()
    def images(self, latents: Tensor) -> Tensor:
        """Return the images, (images, D), of latent vectors under exchanges of labels, as far as they are elsewhere."""
        with seeded(0, latents.device):
            noise = torch.randn(POINTS, latents.shape[1]).to(latents)
        probes, values = self._unpacked(latents[:1] + NEAR * noise)[0], self._unpacked(latents)[0]
        shapes = {name: value.shape for name, value in self._latents.values.items()}
        try:
            exchanged = [exchange(values) for exchange in exchanges(self._joint, probes, shapes)]
            found = [
                self.packed({name: each[name].reshape(-1, *shape) for name, shape in shapes.items()})
                for each in exchanged
            ]
        except (*FAILURES, IndexError):
            return latents[:0]
        return torch.cat([latents[:0], *(image[(image - latents).abs().amax(1) > NEAR] for image in found)])

    def packed(self, values: Mapping[str, Tensor]) -> Tensor:
        r"""Return the latent vectors, (draws, D), of values of the sites, (draws, \*site)."""
        if self._coordinates is None:
            return self._latents.pack(values)[0]
        return self._coordinates.of_values(self._latents, values, self._call)[0]

    def leave_out_idle(self) -> None:
        """Leave out of the latent vector the entries that a mask excludes from the model.

        Other masked entries, such as those of a flat prior, have a posterior by their likelihood. The test of an idle
        entry: the gradient of the log joint density with respect to it is zero, and another value of it gives the same
        density.
        """
        latents, loc = self._latents, self._latents.initial()
        masked = latents.masked_in({})
        with seeded(0, loc.device):
            noise = torch.randn(2 * POINTS, len(loc), dtype=loc.dtype, device=loc.device)
        points = (loc + 0.5 * noise[:POINTS]).requires_grad_()
        with torch.enable_grad():
            scores = self._joint(self._unpacked(points)[0])
            total = scores.sum() + 0 * points.sum()  # so that there is a gradient in any case
            (gradient,) = torch.autograd.grad(total, points)
        idle = masked & (gradient == 0).all(0)
        idle = torch.cat([_whole_events(part, idle) for part in latents.parts.values()])
        with torch.no_grad():
            others = self._joint(self._unpacked(torch.where(idle, loc + noise[POINTS:], points))[0])
        is_idle = torch.allclose(scores, others, rtol=1e-5, atol=1e-5)
        latents.leave_out(idle if is_idle else torch.zeros_like(idle), masked)
        self.centre = self.centre[~latents.idle]

    def _unpacked(self, latents: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        padded = latents.reshape(len(latents), *(1,) * self._joint.nesting, -1)
        images = None if self._coordinates is None else self._coordinates.images(self._latents, padded, self._call)
        values, log_det = self._latents.unpack(padded, images)
        return values, log_det.reshape(len(latents))


def without_blocks(model: Model) -> Model:
    """Unwrap handlers that hide sites: for `poutine.block(model, hide=["z"])` return `model`."""
    layers = []
    while isinstance(model, partial):
        inner = model.func if isinstance(model.func, partial) else model
        if len(inner.args) < 2 or not isinstance(inner.args[0], Messenger):
            break
        layers.append(inner.args[0])
        model = inner.args[1]
    for layer in reversed(layers):
        if not isinstance(layer, BlockMessenger):
            model = layer(model)
    return model


def _whole_events(part: Part, idle: Tensor) -> Tensor:
    """Restrict the idle entries of a site to transform events that are idle as a whole."""
    idle = idle[part.start : part.stop].reshape(part.shape)
    transform = part.transform
    while hasattr(transform, "base_transform"):
        transform = transform.base_transform
    event = transform.domain.event_dim
    whole = idle.reshape(*idle.shape[: idle.dim() - event], -1).all(-1)
    return whole.reshape(whole.shape + (1,) * event).expand(part.shape).flatten()


@torch.no_grad()
def _moving_supports(call: Call, latents: Latents) -> list[str]:
    """Return the sites whose supports have a bound that depends on latent variables, or that is trained.

    Cost: one run of the model if a support has a tensor for a bound, and none if all bounds are plain numbers.
    """
    before = {name: list(_bounds(part.site["fn"].support)) for name, part in latents.parts.items()}
    if not any(before.values()):
        return []
    moved = {
        name: part.transform(part.transform.inv(part.site["value"]) + STEP) for name, part in latents.parts.items()
    }
    try:
        with poutine.block(), seeded(0, next(iter(moved.values())).device):
            sites = sample_sites(call.conditioned(moved))
    except FAILURES:
        sites = {}
    moving = []
    for name, bounds in before.items():
        now = list(_bounds(sites[name]["fn"].support)) if name in sites else bounds
        is_same = len(now) == len(bounds) and all(map(torch.equal, now, bounds))
        if not is_same or any(bound.requires_grad for bound in bounds):
            moving.append(name)
    return moving


def _bounds(value: object) -> Iterator[Tensor]:
    """Iterate over the tensors of a constraint."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Constraint, list, tuple)):
        for item in vars(value).values() if isinstance(value, Constraint) else value:
            yield from _bounds(item)


def checked_levels(who: str, levels: Levels, like: Tensor) -> Tensor:
    """Convert levels to a tensor of the dtype and device of `like`.

    Raises:
        TypeError: If they are not numbers.
        ValueError: If one is outside [0, 1].
    """
    try:
        checked = torch.as_tensor(levels, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{who} expected quantiles to be numbers from 0 to 1, got {levels!r}.") from None
    outside = checked[~((checked >= 0) & (checked <= 1))].flatten()
    if len(outside):
        raise ValueError(f"{who} expected quantiles from 0 to 1, got {float(outside[0]):g}.")
    return checked


def marginal_quantiles(
    latents: Latents, latent: Tensor, levels: Tensor, images: Callable[[Tensor], Images]
) -> dict[str, Tensor]:
    r"""Marginal quantiles of each site, (\*levels, \*site), from the vectors that `even_noise` is mapped to."""
    # On the support, not before the map: a map that mixes coordinates does not preserve marginal quantiles.
    draws = latents.sites(latent, torch.Size([QUANTILE_DRAWS]), images)
    return {name: _quantiles(value, levels.to(value)) for name, value in draws.items()}


def _quantiles(draws: Tensor, levels: Tensor) -> Tensor:
    r"""Quantiles along the first dimension, (\*levels, \*event), of draws (draws, \*event)."""
    if not draws.numel():
        return draws.new_empty(levels.shape + draws.shape[1:])
    blocks = draws.reshape(len(draws), -1).split(MOST_COLUMNS, -1)
    quantiles = torch.cat([block.quantile(levels.flatten(), 0) for block in blocks], -1)
    return quantiles.reshape(levels.shape + draws.shape[1:])


def even_noise(dim: int) -> Tensor:
    """Standard normal draws of a fixed Sobol sequence; beyond its dimensions, of a fixed seed."""
    if dim > SobolEngine.MAXDIM:
        return torch.randn(QUANTILE_DRAWS, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    uniform = SobolEngine(dim, scramble=True, seed=0).draw(QUANTILE_DRAWS, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))
