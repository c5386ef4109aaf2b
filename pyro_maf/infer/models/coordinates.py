r"""Coordinates of latent sites whose prior has a location or scale that depends on other latent sites.

In a hierarchy v ~ Normal(loc, scale), with loc and scale latent, the posterior of v is a funnel if the data say little
about v, and that of (v - loc) / scale is one if they say much. Data that are normal given v, and that contribute a
fraction d of the precision of v at a usual scale_0, leave v with a normal posterior given loc and scale: with
r = (scale / scale_0)^2,

    variance (relative) V = r / (1 - d + d r),   mean M = loc_0 + (1 - d) / (1 - d + d r) (loc - loc_0) + V b,

where b is the shift of the mean due to the data at loc_0 and scale_0. The coordinates are
c = loc_0 + b + (v - M) / V^(1/2): v for d = 1, (v - loc) / scale in fixed units for d = 0 and b = 0, and v for every d
at loc = loc_0 and scale = scale_0. In a hierarchy with normal data they do not depend on loc and scale at all.

If the scale is a triangular matrix L, as for a Gaussian process whose kernel has latent parameters, data with precision
P that put v at y, with q = P y, leave a normal with covariance L S^-1 L^T, where S = 1 + L^T P L. With the upper
triangular W of S = W W^T, the coordinates are c in

    v = loc + T T^T (q - P loc) + T c,   T = L W^-T,

standard normal in the posterior given loc and L, and (v - loc) / L if the data say nothing.
Reference: Gorinova, Moore & Hoffman, *Automatic reparameterisation of probabilistic programs*, 2020; Papaspiliopoulos,
Roberts & Skold, *A general framework for the parametrization of hierarchical models*, 2007.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import product
from typing import NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_maf._core.torch_state import is_traced, seeded
from pyro_maf.infer.models.latents import Images, Latents, Part, masked_elements
from pyro_maf.infer.models.location_scale import LocationScale, Scale, location_and_scale
from pyro_maf.infer.models.model import FAILURES, Call
from pyro_maf.infer.models.prior_walk import WAYS, run_with, walk
from pyro_maf.infer.models.supports import entry_map, within_reach

__all__ = ["Coordinates", "coordinates_of"]

DEGREE = 0.5
"""Initial degree of centring, before anything is known about the posterior."""
LOST = 0.1
"""Relative rounding error of a residual from which on the prior's density is corrected."""
FARTHEST = 1e9
"""Maximum correction, in nats."""
SPREAD, POINTS = 0.1, 3
"""Spread of latent variables in the trial of a map, and number of trial vectors."""
TOLERANCE = 1e-3
"""Maximum error of a map and its inverse in the trial, relative and absolute."""


class _Map(NamedTuple):
    """The map v = loc + away + slope (c - origin) of a site, and its prior's scale."""

    loc: Tensor
    away: Tensor | float
    slope: Scale
    origin: Tensor
    scale: Scale

    def log_slope(self, like: Tensor) -> Tensor:
        """log |dv/dc| by entry, in the shape of `like`."""
        return self.slope.diagonal.log().expand(like.shape)


class Coordinates(nn.Module):
    r"""The map between coordinates c, (\*batch, D), and the values of all latent sites, in one run of the prior.

    Sites are mapped in the order of the model, each with the location and scale that the model computes from the
    preceding sites. So the map is triangular, and its log-determinant is the sum of (1 - d) log(scale / scale_0) over
    the entries of the sites with a degree of centring, plus those of the maps to supports.

    Args:
        latents: The layout of the latent vector.
        names: The sites with a degree of centring.
        correlated: Those of them whose scale is a matrix.
        moving: The sites whose supports depend on other sites; each is mapped to its support in the run.

    Attributes:
        degree: The degree of centring of each entry of these sites. It is trained with the guide, unless it is set from
            the data's precision, which the noise of training would only disturb.
        loc, log_scale: loc_0 and log scale_0 of each, fixed by the initialization; for a matrix, scale_0 is the
            diagonal.
        shift: b of each, likewise; for matrices q.
        precision: The concatenated matrices P; zero before anything is known about the posterior.
        normal: Names of sites whose coordinates are normal given all others.
        moving: As in the arguments.
        way: How the model is run for many draws, one of `WAYS`; by default draws are batch dimensions.
    """

    degree: Tensor
    loc: Tensor
    log_scale: Tensor
    shift: Tensor
    precision: Tensor

    def __init__(
        self, latents: Latents, names: Sequence[str], correlated: Collection[str] = (), moving: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.moving = frozenset(moving)
        self.normal: list[str] = []
        self.way = WAYS[0]
        self._slices: dict[str, slice] = {}
        self._squares: dict[str, slice] = {}
        size = square = 0
        for name in names:
            shape = latents.parts[name].shape
            self._slices[name] = slice(size, size := size + shape.numel())
            if name in correlated:
                self._squares[name] = slice(square, square := square + shape.numel() * shape[-1])
        like = latents.initial()
        self.degree = nn.Parameter(torch.full((size,), DEGREE).to(like))
        for buffer, length in {"loc": size, "log_scale": size, "shift": size, "precision": square}.items():
            self.register_buffer(buffer, torch.zeros(length).to(like))

    @property
    def names(self) -> list[str]:
        """The sites with a degree of centring, or with a support that moves."""
        return [*self._slices, *self.moving]

    def batched(self) -> Coordinates:
        """Return a copy for a model that takes draws as batch dimensions, whatever the original uses."""
        twin = copy.deepcopy(self)
        twin.way = WAYS[0]
        return twin

    def images(self, latents: Latents, coordinates: Tensor, call: Call, *, strict: bool = False) -> Images:
        r"""Map coordinates, in the shape that `Latents.split` takes, to the values of all sites.

        If the model raises at a draw, for instance because a covariance is numerically singular, sites from there on
        get their usual location and scale; with `strict`, the error is raised.
        """

        def outward(part: Part, piece: Tensor, fn: TorchDistribution | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            entries, log_slope = self._to_latent(part, piece, fn)
            value, log_det = latents.mapped(part, entries)
            if log_slope is not None:
                events = part.site["fn"].event_dim
                log_det = log_det + (log_slope.flatten(-events).sum(-1) if events else log_slope)
            return value, (value, log_det)

        return walk(latents, coordinates, call, outward, self.way, strict)

    def of_values(
        self, latents: Latents, values: Mapping[str, Tensor], call: Call, *, strict: bool = False
    ) -> tuple[Tensor, Tensor]:
        r"""Map values of all sites, (\*batch, \*site), to coordinates (\*batch, D), and log |det dz/dc|, (\*batch,)."""
        entries, log_det = latents.pack(values)
        batch = entries.shape[:-1]
        flat = entries.reshape(-1, *(1,) * latents.nesting, entries.shape[-1])

        def inward(part: Part, piece: Tensor, fn: TorchDistribution | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            inside, log_slope = self._to_coordinates(part, piece, fn)
            return latents.mapped(part, piece)[0], (inside, torch.zeros_like(piece) if log_slope is None else log_slope)

        sites = walk(latents, flat, call, inward, self.way, strict)
        pairs = [[each.reshape(len(flat), -1) for each in sites[name]] for name in latents.parts]
        packed, log_slopes = (torch.cat(each, -1) for each in zip(*pairs, strict=True))
        return packed[:, ~latents.idle].reshape(*batch, -1), log_det + log_slopes.sum(-1).reshape(batch)

    @torch.no_grad()
    def centre(self, latents: Latents, values: Mapping[str, Tensor], call: Call) -> Tensor:
        """Set the usual location and scale to those at these values of all sites; return the coordinates, (D,)."""
        self.settle(self.priors(latents, {name: value[None] for name, value in values.items()}, call))
        return self.of_values(latents, values, call)[0].reshape(latents.size)

    def priors(self, latents: Latents, values: Mapping[str, Tensor], call: Call) -> dict[str, LocationScale]:
        r"""Location and scale of the sites with a degree, at draws of all sites, (draws, \*site)."""
        shapes = {name: (latents.parts[name].shape, latents.parts[name].shape) for name in self._slices}
        shapes |= {name: (shape, shape + shape[-1:]) for name, (shape, _) in shapes.items() if name in self._squares}
        found: set[str] = set()

        def prior(part: Part, piece: Tensor, fn: TorchDistribution | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            name, value = part.site["name"], latents.mapped(part, piece)[0]
            if fn is None or name not in shapes or (prior := location_and_scale(fn)) is None:
                return value, (piece, piece)
            found.add(name)
            of_loc, of_scale = (piece.shape[: piece.dim() - len(part.shape)] + shape for shape in shapes[name])
            return value, (prior.loc.expand(of_loc), prior.scale.tensor.expand(of_scale))

        entries = latents.pack(values)[0]
        flat = entries.reshape(-1, *(1,) * latents.nesting, entries.shape[-1])
        sites = walk(latents, flat, call, prior, self.way, strict=True)
        return {
            name: LocationScale(loc, Scale(scale, name in self._squares))
            for name, pair in shapes.items()
            if name in found
            for loc, scale in [[each.reshape(-1, *shape) for each, shape in zip(sites[name], pair, strict=True)]]
        }

    def settle(self, priors: Mapping[str, LocationScale]) -> None:
        """Set the usual location and scale to their means over draws."""
        for name, (loc, scale) in priors.items():
            self.loc[self._slices[name]] = loc.mean(0).flatten()
            self.log_scale[self._slices[name]] = scale.diagonal.log().mean(0).flatten()

    def slope(self, part: Part, prior: LocationScale) -> Scale:
        """dv/dc of a site with a degree, given all others."""
        return self._map(part, prior).slope

    def fix(self, name: str, pull: Tensor, value: Tensor, share: Tensor) -> None:
        """Fix the degree of a site from its data.

        Args:
            name: The site.
            pull: Gradient of the data's log-density with respect to the site's v, (*site), averaged over draws.
            value: v of the site, averaged likewise.
            share: Precision of the data about each entry, in units of the prior's at the usual scale, (*site); for a
                site with a matrix, the data's precision P, (*site, n).
        """
        if isinstance(self.degree, nn.Parameter):
            self.register_buffer("degree", self._parameters.pop("degree").detach())  # type: ignore[union-attr]
        place = self._slices[name]
        if name in self._squares:
            self.precision[self._squares[name]] = share.flatten().to(self.precision)
            shift = (pull + (share @ value[..., None])[..., 0]).flatten()
            odds = share.diagonal(dim1=-2, dim2=-1).flatten() * (2 * self.log_scale[place]).exp()
            degree = 1 - 1 / (1 + odds)
        else:
            degree = (1 - 1 / (1 + share.flatten())).nan_to_num(nan=DEGREE)
            away = value.flatten() - self.loc[place]
            shift = (1 - degree) * (2 * self.log_scale[place]).exp() * pull.flatten() + degree * away
        self.degree[place] = degree.to(self.degree)
        self.shift[place] = shift.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).to(self.shift)

    def _to_latent(self, part: Part, piece: Tensor, fn: TorchDistribution | None) -> tuple[Tensor, Tensor | None]:
        """Map c to v; also return log |dv/dc|, in the shape of the site, or None for a site that is not transformed."""
        if part.site["name"] in self.moving:
            transform = entry_map(part.site["fn"] if fn is None else fn)
            inside = within_reach(transform, piece)
            entries = transform(inside)
            return entries, transform.log_abs_det_jacobian(inside, entries) - (piece - inside).abs()
        if part.site["name"] not in self._slices:
            return piece, None
        site = self._map(part, None if fn is None else location_and_scale(fn))
        residual = site.away + site.slope.times(piece - site.origin)
        entries = site.loc + residual
        log_slope = site.log_slope(entries) + _lost_to_rounding(site.loc, site.scale, residual, entries)
        return entries, log_slope

    def _to_coordinates(
        self, part: Part, entries: Tensor, fn: TorchDistribution | None
    ) -> tuple[Tensor, Tensor | None]:
        """Map v to c, NaN where a value is outside of its support; also return log |dv/dc|."""
        if part.site["name"] in self.moving:
            transform = entry_map(part.site["fn"] if fn is None else fn)
            piece = transform.inv(entries)
            is_inside = torch.isclose(transform(piece), entries, rtol=1e-3, atol=1e-5)  # some inverses clamp
            return torch.where(is_inside, piece, torch.nan), transform.log_abs_det_jacobian(piece, entries)
        if part.site["name"] not in self._slices:
            return entries, None
        site = self._map(part, None if fn is None else location_and_scale(fn))
        return site.origin + site.slope.solve(entries - site.loc - site.away), site.log_slope(entries)

    def _map(self, part: Part, prior: LocationScale | None) -> _Map:
        """The map of a site with a degree at this location and scale; at the usual ones if `prior` is None."""
        name = part.site["name"]
        place = self._slices[name]
        degree, usual, log_unit = (each[place].reshape(part.shape) for each in (self.degree, self.loc, self.log_scale))
        unit, is_matrix = log_unit.exp(), name in self._squares
        if prior is None:
            prior = LocationScale(usual, Scale(unit.diag_embed() if is_matrix else unit, is_matrix))
        loc, scale = prior
        if is_matrix:
            # Matrix products do not promote dtypes.
            dtype = torch.promote_types(scale.tensor.dtype, self.precision.dtype)
            precision = self.precision[self._squares[name]].reshape(part.shape + part.shape[-1:]).to(dtype)
            slope = _posterior_scale(scale.tensor.to(dtype), precision)
            aim = self.shift[place].reshape(part.shape) - (precision @ loc.to(dtype)[..., None])[..., 0]
            return _Map(loc, slope.times(slope.transposed_times(aim)), slope, torch.zeros_like(usual), scale)
        shift, degree = self.shift[place].reshape(part.shape), degree.clamp(0.0, 1.0)
        ratio = (scale.tensor / unit).square()
        total = 1 - degree + degree * ratio
        variance = ratio / total
        away = variance * (shift - degree * (loc - usual))
        return _Map(loc, away, Scale(variance.sqrt()), usual + shift, scale)


def _posterior_scale(scale: Tensor, precision: Tensor) -> Scale:
    """Triangular T of the posterior covariance T T^T, from a prior's L L^T and data with a precision."""
    within = scale.mT @ precision @ scale
    within = within + torch.eye(within.shape[-1]).to(within)
    # The factor W is upper triangular: the Cholesky factor of the reversed matrix, reversed.
    last_first, failed = torch.linalg.cholesky_ex(within.flip(-2, -1))
    last_first = last_first.where((failed == 0)[..., None, None], torch.nan)
    return Scale(torch.linalg.solve_triangular(last_first.flip(-2, -1), scale.mT, upper=True).mT, True)


def _lost_to_rounding(loc: Tensor, scale: Scale, residual: Tensor, entries: Tensor) -> Tensor | float:
    """Correction of the prior's log-density where rounding removes the residual from loc + residual, as for a normal.

    Without it, scales far below the location's last digit would have an unlimited bound: the prior is 1 / scale there,
    however many scales the residual is.
    """
    rounded = entries - loc
    lost = (rounded - residual).abs() > LOST * residual.abs()
    if not is_traced() and not bool(lost.any()):
        return 0.0
    missing = (scale.solve(rounded).square() - scale.solve(residual).square()) / 2
    lost = lost.any(-1, keepdim=True) if scale.is_matrix else lost
    return torch.where(lost, missing.clamp(min=-FARTHEST, max=0.0), 0.0)


def coordinates_of(call: Call, latents: Latents, moving: Collection[str]) -> Coordinates | None:
    """Return coordinates for sites whose prior's location or scale depends on other latent sites, if there are any.

    They also cover sites whose supports do, listed in `moving`. There are none if rows have separate vectors, in a
    model that has to be run for each draw, or whose prior depends on random numbers that are not part of the vector. A
    model that does not broadcast is run under `vmap`.

    Cost: a run of the model up to its last latent site if there are no such sites.
    """
    if latents.rows or any(part.rows for part in latents.parts.values()):
        return None
    try:
        with seeded(0, latents.idle.device):
            found = _dependent(call, latents)
        correlated = [name for name, is_matrix in found.items() if is_matrix]
        if not found and not moving:
            return None
        coordinates = Coordinates(latents, list(found), correlated, moving)
        # For a prior that says nothing, such as a gamma distribution of shape 0.001, the median overflows. Scales e^v
        # are tried at which a 1 added to their squares is not lost to rounding.
        centre = latents.initial()
        most = math.log(TOLERANCE / torch.finfo(centre.dtype).eps) / 2
        bounded = centre.clamp(-most, most)
    except (*FAILURES, NotImplementedError):
        return None
    for way, point in product(WAYS, [centre] if torch.equal(centre, bounded) else [centre, bounded]):
        with suppress(Exception):  # a model not written for a batch may fail in any way
            coordinates.way = way
            if _is_sound(coordinates, latents, call, point):
                return coordinates
    return None


def _dependent(call: Call, latents: Latents) -> dict[str, bool]:
    """Return the sites whose prior has a location or scale that depends on other latent sites; True for matrices."""
    pieces = {part.site["name"]: (part, piece) for part, piece in latents.split(latents.initial())}
    leaves: list[Tensor] = []
    found: dict[str, bool] = {}

    def value_of(name: str, fn: TorchDistribution) -> Tensor:
        part, piece = pieces[name]
        prior = location_and_scale(fn)
        # Masked entries are constants, which coordinates would move by rounding.
        is_whole = masked_elements(part.site, part.value) is None
        if is_whole and prior is not None and any(_reaches(each, leaves) for each in (prior.loc, prior.scale.tensor)):
            found[name] = prior.scale.is_matrix
        leaf = piece.detach().clone().requires_grad_()
        leaves.append(leaf)
        return latents.mapped(part, leaf)[0]

    with torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True")  # as by `if float(z) > 0`
        run_with(call, pieces, value_of)
    return found


def _reaches(tensor: Tensor, leaves: Sequence[Tensor]) -> bool:
    """Return whether a tensor was computed from one of the leaves."""
    if not (tensor.requires_grad and leaves):
        return False
    found = torch.autograd.grad(tensor.sum(), leaves, retain_graph=True, allow_unused=True)
    return any(each is not None for each in found)


@torch.no_grad()
def _is_sound(coordinates: Coordinates, latents: Latents, call: Call, like: Tensor) -> bool:
    """Return whether a run for several vectors agrees with single runs, for any random numbers, and can be inverted."""
    with seeded(0, like.device):
        points = like + SPREAD * torch.randn(POINTS, *(1,) * latents.nesting, len(like)).to(like)
    with seeded(1, like.device):
        values, log_det = latents.unpack(points, coordinates.images(latents, points, call, strict=True))
    values = {name: value.reshape(POINTS, *latents.parts[name].value.shape) for name, value in values.items()}
    back, log_det_back = coordinates.of_values(latents, values, call, strict=True)
    pairs = [(log_det_back, log_det.reshape(POINTS)), (back, points.reshape(POINTS, -1))]
    for index, point in enumerate(points):
        with seeded(2 + index, like.device):
            alone, _ = latents.unpack(point.flatten(), coordinates.images(latents, point.flatten(), call, strict=True))
        pairs += [(values[name][index], value) for name, value in alone.items()]
    return all(
        left.shape == right.shape and torch.allclose(left, right, rtol=TOLERANCE, atol=TOLERANCE)
        for left, right in pairs
    )
