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
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Transform

from pyro_maf._core.torch_state import is_traced
from pyro_maf.infer.models.latents import Images, Latents, Part
from pyro_maf.infer.models.location_scale import LocationScale, Scale, location_and_scale
from pyro_maf.infer.models.model import Call
from pyro_maf.infer.models.prior_walk import WAYS, walk
from pyro_maf.infer.models.supports import entry_map, within_reach

__all__ = ["Coordinates"]

DEGREE = 0.5
"""Initial degree of centring, before anything is known about the posterior."""
LOST = 0.1
"""Relative rounding error of a residual from which on the prior's density is corrected."""
FARTHEST = 1e9
"""Maximum correction, in nats."""


class _Place(NamedTuple):
    """A site's shape, its entries in the concatenated buffers and, if its scale is a matrix, those of P."""

    shape: torch.Size
    entries: slice
    matrix: slice | None

    @property
    def scale_shape(self) -> torch.Size:
        """Shape of the prior's scale."""
        return self.shape if self.matrix is None else self.shape + self.shape[-1:]


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
        self._places: dict[str, _Place] = {}
        size = square = 0
        for name in names:
            shape = latents.parts[name].shape
            entries, matrix = slice(size, size := size + shape.numel()), None
            if name in correlated:
                matrix = slice(square, square := square + shape.numel() * shape[-1])
            self._places[name] = _Place(shape, entries, matrix)
        like = latents.initial()
        self.degree = nn.Parameter(torch.full((size,), DEGREE).to(like))
        for buffer, length in {"loc": size, "log_scale": size, "shift": size, "precision": square}.items():
            self.register_buffer(buffer, torch.zeros(length).to(like))

    @property
    def names(self) -> list[str]:
        """The sites with a degree of centring, or with a support that moves."""
        return [*self._places, *self.moving]

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
            site_map = self._map(part, fn)
            if site_map is None:
                value, log_det = latents.mapped(part, piece)
                return value, (value, log_det)
            entries, log_slope = site_map.forward(piece)
            value, log_det = latents.mapped(part, entries)
            events = part.site["fn"].event_dim
            return value, (value, log_det + (log_slope.flatten(-events).sum(-1) if events else log_slope))

        return walk(latents, coordinates, call, outward, self.way, strict)

    def of_values(
        self, latents: Latents, values: Mapping[str, Tensor], call: Call, *, strict: bool = False
    ) -> tuple[Tensor, Tensor]:
        r"""Map values of all sites, (\*batch, \*site), to coordinates (\*batch, D), and log |det dz/dc|, (\*batch,)."""
        entries, log_det = latents.pack(values)
        batch = entries.shape[:-1]
        flat = entries.reshape(-1, *(1,) * latents.nesting, entries.shape[-1])

        def inward(part: Part, piece: Tensor, fn: TorchDistribution | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            value, _ = latents.mapped(part, piece)
            site_map = self._map(part, fn)
            return value, (piece, torch.zeros_like(piece)) if site_map is None else site_map.inverse(piece)

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
        found: set[str] = set()

        def prior(part: Part, piece: Tensor, fn: TorchDistribution | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            name, value = part.site["name"], latents.mapped(part, piece)[0]
            prior = location_and_scale(fn) if fn is not None and name in self._places else None
            if prior is None:
                return value, (piece, piece)
            found.add(name)
            batch = piece.shape[: piece.dim() - len(part.shape)]
            of_scale = batch + self._places[name].scale_shape
            return value, (prior.loc.expand(batch + part.shape), prior.scale.tensor.expand(of_scale))

        entries = latents.pack(values)[0]
        flat = entries.reshape(-1, *(1,) * latents.nesting, entries.shape[-1])
        sites = walk(latents, flat, call, prior, self.way, strict=True)
        priors = {}
        for name, place in self._places.items():
            if name in found:
                loc, scale = sites[name][0].reshape(-1, *place.shape), sites[name][1].reshape(-1, *place.scale_shape)
                priors[name] = LocationScale(loc, Scale(scale, place.matrix is not None))
        return priors

    def settle(self, priors: Mapping[str, LocationScale]) -> None:
        """Set the usual location and scale to their means over draws."""
        for name, (loc, scale) in priors.items():
            entries = self._places[name].entries
            self.loc[entries] = loc.mean(0).flatten()
            self.log_scale[entries] = scale.diagonal.log().mean(0).flatten()

    def slope(self, part: Part, prior: LocationScale) -> Scale:
        """dv/dc of a site with a degree, given all others."""
        return self._centring(part, prior).slope

    def fix(self, name: str, pull: Tensor, value: Tensor, share: Tensor) -> None:
        """Fix the degree of a site from its data.

        Args:
            name: The site.
            pull: Gradient of the data's log-density with respect to the site's v, (*site), averaged over draws.
            value: v of the site, averaged likewise.
            share: Precision of the data about each entry, in units of the prior's at the usual scale, (*site).
        """
        entries = self._places[name].entries
        degree = (1 - 1 / (1 + share.flatten())).nan_to_num(nan=DEGREE)
        away = value.flatten() - self.loc[entries]
        shift = (1 - degree) * (2 * self.log_scale[entries]).exp() * pull.flatten() + degree * away
        self._set(entries, degree, shift)

    def fix_matrix(self, name: str, pull: Tensor, value: Tensor, precision: Tensor) -> None:
        """Fix P, (*site, n), and q of a site whose scale is a matrix; the other arguments are as in `fix`."""
        _, entries, matrix = self._places[name]
        self.precision[matrix] = precision.flatten().to(self.precision)
        shift = (pull + (precision @ value[..., None])[..., 0]).flatten()
        odds = precision.diagonal(dim1=-2, dim2=-1).flatten() * (2 * self.log_scale[entries]).exp()
        self._set(entries, 1 - 1 / (1 + odds), shift)

    def _set(self, entries: slice, degree: Tensor, shift: Tensor) -> None:
        """Set degrees, which are not trained from then on, and shifts."""
        if isinstance(self.degree, nn.Parameter):
            self.register_buffer("degree", self._parameters.pop("degree").detach())  # type: ignore[union-attr]
        self.degree[entries] = degree.to(self.degree)
        self.shift[entries] = shift.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).to(self.shift)

    def _map(self, part: Part, fn: TorchDistribution | None) -> _Centring | _ToSupport | None:
        """The map of a site with this distribution in the run, if any; None for a site that is not transformed."""
        name = part.site["name"]
        if name in self.moving:
            return _ToSupport(entry_map(part.site["fn"] if fn is None else fn))
        if name in self._places:
            return self._centring(part, None if fn is None else location_and_scale(fn))
        return None

    def _centring(self, part: Part, prior: LocationScale | None) -> _Centring:
        """The map of a site with a degree at this location and scale; at the usual ones if `prior` is None."""
        shape, entries, matrix = self._places[part.site["name"]]
        buffers = self.loc, self.log_scale, self.degree, self.shift
        usual, log_unit, degree, shift = (each[entries].reshape(shape) for each in buffers)
        unit = log_unit.exp()
        if matrix is None:
            return _elementwise(prior or LocationScale(usual, Scale(unit)), usual, unit, degree.clamp(0.0, 1.0), shift)
        precision = self.precision[matrix].reshape(shape + shape[-1:])
        return _multivariate(prior or LocationScale(usual, Scale(unit.diag_embed(), True)), precision, shift)


class _ToSupport(NamedTuple):
    """The map of a site to a support that depends on other sites."""

    transform: Transform

    def forward(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return v and log |dv/dc| of each entry."""
        inside = within_reach(self.transform, c)
        v = self.transform(inside)
        return v, self.transform.log_abs_det_jacobian(inside, v) - (c - inside).abs()

    def inverse(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return c, NaN where a value is outside of its support, and log |dv/dc| of each entry."""
        c = self.transform.inv(v)
        is_inside = torch.isclose(self.transform(c), v, rtol=1e-3, atol=1e-5)  # some inverses clamp
        return torch.where(is_inside, c, torch.nan), self.transform.log_abs_det_jacobian(c, v)


class _Centring(NamedTuple):
    """The map v = loc + away + slope (c - origin) of a site, and its prior's scale."""

    loc: Tensor
    away: Tensor
    slope: Scale
    origin: Tensor
    scale: Scale

    def forward(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return v and log |dv/dc| of each entry."""
        residual = self.away + self.slope.times(c - self.origin)
        v = self.loc + residual
        return v, self._log_slope(v) + _lost_to_rounding(self.loc, self.scale, residual, v)

    def inverse(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return c and log |dv/dc| of each entry."""
        return self.origin + self.slope.solve(v - self.loc - self.away), self._log_slope(v)

    def _log_slope(self, like: Tensor) -> Tensor:
        return self.slope.diagonal.log().expand(like.shape)


def _elementwise(prior: LocationScale, usual: Tensor, unit: Tensor, degree: Tensor, shift: Tensor) -> _Centring:
    """The map at a prior's location and scale, from loc_0, scale_0, d and b."""
    ratio = (prior.scale.tensor / unit).square()
    variance = ratio / (1 - degree + degree * ratio)
    away = variance * (shift - degree * (prior.loc - usual))
    return _Centring(prior.loc, away, Scale(variance.sqrt()), usual + shift, prior.scale)


def _multivariate(prior: LocationScale, precision: Tensor, shift: Tensor) -> _Centring:
    """The map at a prior's location and triangular scale, from P and q."""
    loc, scale = prior
    dtype = torch.promote_types(scale.tensor.dtype, precision.dtype)  # matrix products do not promote dtypes
    precision = precision.to(dtype)
    slope = _posterior_scale(scale.tensor.to(dtype), precision)
    aim = shift - (precision @ loc.to(dtype)[..., None])[..., 0]
    return _Centring(loc, slope.times(slope.transposed_times(aim)), slope, torch.zeros_like(shift), scale)


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
