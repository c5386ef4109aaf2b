"""Detection of latent sites whose prior depends on other latent sites, and a trial of their coordinates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import product

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.models.coordinates import Coordinates
from pyro_maf.infer.models.latents import Latents, masked_elements
from pyro_maf.infer.models.location_scale import location_and_scale
from pyro_maf.infer.models.model import FAILURES, Call
from pyro_maf.infer.models.prior_walk import WAYS, run_with

__all__ = ["coordinates_of"]

SPREAD, POINTS = 0.1, 3
"""Spread of latent variables in the trial of a map, and number of trial vectors."""
TOLERANCE = 1e-3
"""Maximum error of a map and its inverse in the trial, relative and absolute."""


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
