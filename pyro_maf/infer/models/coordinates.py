r"""Coordinates of latent sites whose prior has a location or scale that depends on other latent sites.

In a hierarchy v ~ Normal(loc, scale), with loc and scale latent, the posterior of v is a funnel where data say little
about v, and that of (v - loc) / scale is one where they say much. With a degree of centring d for each entry,

    c = loc_0 + d (loc - loc_0) + (v - loc) (scale_0 / scale)^(1 - d)

is v for d = 1 and (v - loc) / scale in fixed units for d = 0. loc_0 and scale_0 are a usual location and scale, at
which c is v for every d. For normal data the share of the data in the precision of v is the d for which c depends least
on the rest.

Reference: Gorinova, Moore & Hoffman, *Automatic reparameterisation of probabilistic programs*, 2020; Papaspiliopoulos,
Roberts & Skold, *A general framework for the parametrization of hierarchical models*, 2007.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import cast

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import Exponential, Gamma, InverseGamma, constraints
from torch.distributions.constraints import Constraint

from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.models.latents import Images, Latents, Part, masked_elements, within_reach
from pyro_maf.infer.models.log_joint import FAILURES
from pyro_maf.infer.models.model import Call, Site, layers_of

__all__ = ["Coordinates", "coordinates_of", "location_and_scale", "run_with"]

Rule = Callable[[str, TorchDistribution], Tensor]
"""The value of a latent site, by its name and its distribution in this run."""

DEGREE = 0.5
"""Degree of centring before anything is known of the posterior."""
LOST = 0.1
"""Relative error of a residual by rounding at which the prior's density is corrected."""
FARTHEST = 1e9
"""Maximum correction, in nats."""
SPREAD, POINTS = 0.1, 3
"""Spread of latent variables in the trial of a map, and the number of their vectors."""


class Coordinates(nn.Module):
    r"""The map between coordinates c, (\*batch, D), and the values of all latent sites, in one run of the prior.

    Sites are mapped in the order of the model, each with the location and scale that the model computes from the sites
    before it: the map is triangular, and its log-determinant the sum of (1 - d) log(scale / scale_0) over the entries
    of the sites with a degree, besides those of the maps to supports.

    Args:
        latents: The layout of the latent vector.
        names: The sites with a degree of centring.

    Attributes:
        degree: The degree of centring of each of their entries, trained with the guide.
        loc, log_scale: loc_0 and log scale_0 of each, fixed by the initialization.
    """

    loc: Tensor
    log_scale: Tensor

    def __init__(self, latents: Latents, names: list[str]) -> None:
        super().__init__()
        self._slices: dict[str, slice] = {}
        size = 0
        for name in names:
            part = latents.parts[name]
            self._slices[name] = slice(size, size + part.stop - part.start)
            size += part.stop - part.start
        like = latents.initial()
        self.degree = nn.Parameter(torch.full((size,), DEGREE).to(like))
        self.register_buffer("loc", torch.zeros(size).to(like))
        self.register_buffer("log_scale", torch.zeros(size).to(like))

    @property
    def names(self) -> list[str]:
        """The sites with a degree of centring."""
        return list(self._slices)

    def entries(self, latents: Latents) -> Tensor:
        """Mask over the latent vector, (D,): true for entries of sites with a degree."""
        mask = torch.zeros_like(latents.idle)
        for name in self._slices:
            mask[latents.parts[name].start : latents.parts[name].stop] = True
        return mask[~latents.idle]

    def images(self, latents: Latents, coordinates: Tensor, call: Call) -> Images:
        r"""Map coordinates, in the shape that `Latents.split` takes, to the values of all sites."""
        pieces = {part.site["name"]: (part, piece) for part, piece in latents.split(coordinates)}
        images: Images = {}

        def value_of(name: str, fn: TorchDistribution) -> Tensor:
            part, piece = pieces[name]
            entries, log_slope = self._outward(latents, part, piece, fn)
            value, log_det = latents.mapped(part, entries)
            if log_slope is not None:
                events = part.site["fn"].event_dim
                log_det = log_det + (log_slope.flatten(-events).sum(-1) if events else log_slope)
            images[name] = value, log_det
            return value

        run_with(call, pieces, value_of)
        for name, (part, piece) in pieces.items():
            if name not in images:  # a branch of the model without it
                images[name] = latents.mapped(part, piece)
        return images

    def of_values(self, latents: Latents, values: Mapping[str, Tensor], call: Call) -> tuple[Tensor, Tensor]:
        r"""Map values of all sites, (\*batch, \*site), to coordinates (\*batch, D), and log |det dz/dc|, (\*batch,)."""
        entries, log_det = latents.pack(values)
        batch = entries.shape[:-1]
        flat = entries.reshape(-1, *(1,) * latents.nesting, entries.shape[-1])
        pieces = {part.site["name"]: (part, piece) for part, piece in latents.split(flat)}
        inside = {}
        log_slopes = [log_det]

        def value_of(name: str, fn: TorchDistribution) -> Tensor:
            part, piece = pieces[name]
            inside[name], log_slope = self._inward(latents, part, piece, fn)
            if log_slope is not None:
                log_slopes.append(log_slope.reshape(len(flat), -1).sum(-1).reshape(batch))
            return latents.mapped(part, piece)[0]

        run_with(call, pieces, value_of)
        packed = [
            inside.get(name, piece).reshape(len(flat), part.stop - part.start) for name, (part, piece) in pieces.items()
        ]
        coordinates = torch.cat(packed, -1)[:, ~latents.idle].reshape(*batch, -1)
        return coordinates, torch.stack(log_slopes).sum(0)

    @torch.no_grad()
    def centre(self, latents: Latents, values: Mapping[str, Tensor], call: Call) -> Tensor:
        """Let c be v for every degree at these values of all sites; return it, (D,)."""

        def value_of(name: str, fn: TorchDistribution) -> Tensor:
            if (place := self._slices.get(name)) is not None and (prior := location_and_scale(fn)) is not None:
                shape = latents.parts[name].shape
                self.loc[place] = prior[0].expand(shape).flatten()
                self.log_scale[place] = prior[1].log().expand(shape).flatten()
            return values[name]

        run_with(call, latents.parts, value_of)
        return latents.pack(values)[0].reshape(latents.size)

    @torch.no_grad()
    def set_by_precision(self, latents: Latents, precision: Tensor, values: Mapping[str, Tensor], call: Call) -> None:
        r"""Set each degree to the share of the data in the precision of v given the rest, and c to v at mean values.

        Args:
            latents: The layout of the latent vector.
            precision: Minus the second derivative of the log-density with respect to each entry of v, (draws, D).
            values: The draws, (draws, \*site), of every site.
            call: The model with its arguments.
        """
        count = len(precision)
        entries = precision.new_zeros(count, len(latents.idle))
        entries[:, ~latents.idle] = precision

        def value_of(name: str, fn: TorchDistribution) -> Tensor:
            part = latents.parts[name]
            if (place := self._slices.get(name)) is not None and (prior := location_and_scale(fn)) is not None:
                shape = (count, *(1,) * (latents.nesting - len(part.plates)), *part.shape)
                loc, scale = (tensor.expand(shape).reshape(count, -1) for tensor in prior)
                share = 1 - 1 / (entries[:, part.start : part.stop] * scale.square()).mean(0)
                self.degree[place] = share.clamp(0.0, 1.0).nan_to_num(nan=DEGREE)
                self.loc[place], self.log_scale[place] = loc.mean(0), scale.log().mean(0)
            return latents.padded(name, values[name])

        run_with(call, latents.parts, value_of)

    def _outward(
        self, latents: Latents, part: Part, piece: Tensor, fn: TorchDistribution
    ) -> tuple[Tensor, Tensor | None]:
        """Map c to v; also return log |dv/dc|, in the shape of the site, or None for a site without a degree."""
        if (prior := self._prior(latents, part, fn)) is None:
            return piece, None
        degree, loc, scale, centre, log_slope = prior
        residual = log_slope.exp() * (piece - centre - degree * (loc - centre))
        entries = loc + residual
        log_slope = log_slope.expand(entries.shape) + _lost_to_rounding(loc, scale, residual, entries)
        return within_reach(part.transform, entries), log_slope

    def _inward(
        self, latents: Latents, part: Part, entries: Tensor, fn: TorchDistribution
    ) -> tuple[Tensor, Tensor | None]:
        """Map v to c; also return log |dv/dc|."""
        if (prior := self._prior(latents, part, fn)) is None:
            return entries, None
        degree, loc, _, centre, log_slope = prior
        piece = centre + degree * (loc - centre) + (entries - loc) * (-log_slope).exp()
        return piece, log_slope.expand(entries.shape)

    def _prior(self, latents: Latents, part: Part, fn: TorchDistribution) -> tuple[Tensor, ...] | None:
        """Return degree, location, scale, loc_0 and (1 - degree) log(scale / scale_0)."""
        place = self._slices.get(part.site["name"])
        prior = None if place is None else location_and_scale(fn)
        if prior is None:
            return None
        loc, scale = prior
        degree, centre, log_unit = (
            tensor[place].reshape(part.shape) for tensor in (self.degree, self.loc, self.log_scale)
        )
        if latents.leaves_out:  # entries without a posterior stay as they are
            degree = torch.where(latents.idle[part.start : part.stop].reshape(part.shape), 1.0, degree)
        return degree, loc, scale, centre, (1 - degree) * (scale.log() - log_unit)


def _lost_to_rounding(loc: Tensor, scale: Tensor, residual: Tensor, entries: Tensor) -> Tensor | float:
    """Log-density that a prior does not lose where rounding removes the residual from loc + residual, as a normal's.

    Without it, scales far below the location's last digit had a bound without limit: the prior is 1 / scale there,
    however many scales the residual has.
    """
    rounded = entries - loc
    lost = (rounded - residual).abs() > LOST * residual.abs()
    if not bool(lost.any()):
        return 0.0
    missing = ((rounded / scale).square() - (residual / scale).square()) / 2
    return torch.where(lost, missing.clamp(min=-FARTHEST, max=0.0), 0.0)


def location_and_scale(fn: TorchDistribution) -> tuple[Tensor, Tensor] | None:
    """Return location and scale of a site's unconstrained values, by entry; None for another family of distributions.

    The logarithm of a positive variable with a scale is one with a location.
    """
    family = next((layer for layer in layers_of(fn) if layer.arg_constraints.keys() & {"loc", "scale", "rate"}), fn)
    loc, scale, rate = (getattr(family, name, None) for name in ("loc", "scale", "rate"))
    support = cast("Constraint", fn.support)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    bounds = {name: bound for name, bound in vars(support).items() if name.endswith("_bound")}
    is_positive = (
        list(bounds) == ["lower_bound"] and not isinstance(bounds["lower_bound"], Tensor) and not any(bounds.values())
    )
    if loc is not None and scale is not None:
        return (loc, scale) if is_positive or support is constraints.real else None  # as of a LogNormal
    if not is_positive:
        return None
    if scale is not None:
        return scale.log(), torch.ones_like(scale)
    if isinstance(family, (Exponential, Gamma, InverseGamma)) and rate is not None:
        sign = 1 if isinstance(family, InverseGamma) else -1
        return sign * rate.log(), torch.ones_like(rate)
    return None


class _AllValuedError(Exception):
    """Raised in a run of a model once all latent sites have values: the rest of it is not needed."""


class _Walk(Messenger):
    """Handler that sets the values of latent sites by a rule, in the order of the model."""

    def __init__(self, names: Collection[str], rule: Rule) -> None:
        super().__init__()
        self._missing, self._rule = set(names), rule

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] in self._missing and not msg["is_observed"]:
            self._missing.remove(msg["name"])
            msg["value"], msg["done"] = self._rule(msg["name"], msg["fn"]), True
            if not self._missing:
                raise _AllValuedError


def run_with(call: Call, names: Collection[str], rule: Rule) -> None:
    """Run a model up to its last latent site, unseen by handlers around, each latent site with a value by a rule."""
    with poutine.block(), suppress(_AllValuedError), _Walk(names, rule):
        call()


def coordinates_of(call: Call, latents: Latents) -> Coordinates | None:
    """Return the coordinates for sites whose prior's location or scale depends on other latent sites, if there are any.

    They are left as they are where rows have vectors of their own, and in a model that has to be run for each draw, or
    whose prior depends on random numbers that are no part of the vector.

    Cost: a run of the model up to its last latent site if there are no such sites.
    """
    if latents.rows or any(part.rows for part in latents.parts.values()):
        return None
    try:
        with seeded(0, latents.idle.device):
            names = _dependent(call, latents)
        coordinates = Coordinates(latents, names) if names else None
        return coordinates if coordinates is not None and _is_sound(coordinates, latents, call) else None
    except (*FAILURES, NotImplementedError):
        return None


def _dependent(call: Call, latents: Latents) -> list[str]:
    """Return the sites whose prior has a location or scale that depends on other latent sites."""
    pieces = {part.site["name"]: (part, piece) for part, piece in latents.split(latents.initial())}
    leaves: dict[int, Tensor] = {}
    names = []

    def value_of(name: str, fn: TorchDistribution) -> Tensor:
        part, piece = pieces[name]
        # Masked entries are constants, which coordinates would move by rounding.
        is_whole = masked_elements(part.site, part.value) is None
        if is_whole and any(_reaches(tensor, leaves) for tensor in location_and_scale(fn) or ()):
            names.append(name)
        leaf = piece.detach().clone().requires_grad_()
        leaves[id(leaf)] = leaf
        return latents.mapped(part, leaf)[0]

    with torch.enable_grad():
        run_with(call, pieces, value_of)
    return names


def _reaches(tensor: Tensor, leaves: Collection[int]) -> bool:
    """True if a tensor was computed from one of the leaves, by their addresses."""
    nodes, seen = [tensor.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in leaves:
            return True
        nodes.extend(after for after, _ in node.next_functions)
    return False


@torch.no_grad()
def _is_sound(coordinates: Coordinates, latents: Latents, call: Call) -> bool:
    """Test that a run for several vectors is that for each of them, whatever the random numbers, and has an inverse."""
    like = latents.initial()
    with seeded(0, like.device):
        points = like + SPREAD * torch.randn(POINTS, *(1,) * latents.nesting, len(like)).to(like)
    with seeded(1, like.device):
        values, log_det = latents.unpack(points, coordinates.images(latents, points, call))
    values = {name: value.reshape(POINTS, *latents.parts[name].value.shape) for name, value in values.items()}
    back, log_det_back = coordinates.of_values(latents, values, call)
    pairs = [(log_det_back, log_det.reshape(POINTS)), (back, points.reshape(POINTS, -1))]
    for index, point in enumerate(points):
        with seeded(2 + index, like.device):
            alone, _ = latents.unpack(point.flatten(), coordinates.images(latents, point.flatten(), call))
        pairs += [(values[name][index], value) for name, value in alone.items()]
    return all(left.shape == right.shape and torch.allclose(left, right, rtol=1e-3, atol=1e-3) for left, right in pairs)
