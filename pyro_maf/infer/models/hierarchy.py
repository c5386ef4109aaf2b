"""Sites of a model whose prior or support depends on other latent sites, and the coordinates for them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.models.coordinates import Coordinates, run_with
from pyro_maf.infer.models.latents import Latents, masked_elements
from pyro_maf.infer.models.location_scale import location_and_scale
from pyro_maf.infer.models.log_joint import FAILURES
from pyro_maf.infer.models.model import Call

__all__ = ["coordinates_of"]

SPREAD, POINTS = 0.1, 3
"""Spread of latent variables in the trial of a map, and the number of their vectors."""
TOLERANCE = 1e-3
"""Maximum error of a map and its inverse in the trial, relative and absolute."""


def coordinates_of(call: Call, latents: Latents, moving: Collection[str]) -> Coordinates | None:
    """Return the coordinates for sites whose prior's location or scale depends on other latent sites, if there are any.

    Also for those whose supports do, which are `moving`.

    They are left as they are where rows have vectors of their own, and in a model that has to be run for each draw, or
    whose prior depends on random numbers that are no part of the vector.

    Cost: a run of the model up to its last latent site if there are no such sites.
    """
    if latents.rows or any(part.rows for part in latents.parts.values()):
        return None
    try:
        with seeded(0, latents.idle.device):
            found = _dependent(call, latents)
        correlated = [name for name, is_matrix in found.items() if is_matrix]
        coordinates = Coordinates(latents, list(found), correlated, moving) if found or moving else None
        # Where a prior says nothing, as a gamma distribution of shape 0.001, its median overflows. Scales e^v are tried
        # where a 1 beside their squares is not lost to rounding.
        centre = latents.initial()
        most = math.log(TOLERANCE / torch.finfo(centre.dtype).eps) / 2
        centres = (centre, centre.clamp(-most, most))
        is_sound = coordinates is not None and any(_is_sound(coordinates, latents, call, each) for each in centres)
        return coordinates if is_sound else None
    except (*FAILURES, NotImplementedError):
        return None


def _dependent(call: Call, latents: Latents) -> dict[str, bool]:
    """Return the sites whose prior has a location or scale that depends on other latent sites; True for matrices."""
    pieces = {part.site["name"]: (part, piece) for part, piece in latents.split(latents.initial())}
    leaves: dict[int, Tensor] = {}
    found: dict[str, bool] = {}

    def value_of(name: str, fn: TorchDistribution) -> Tensor:
        part, piece = pieces[name]
        prior = location_and_scale(fn)
        # Masked entries are constants, which coordinates would move by rounding.
        is_whole = masked_elements(part.site, part.value) is None
        if is_whole and prior is not None and any(_reaches(each, leaves) for each in (prior.loc, prior.scale.tensor)):
            found[name] = prior.scale.is_matrix
        leaf = piece.detach().clone().requires_grad_()
        leaves[id(leaf)] = leaf
        return latents.mapped(part, leaf)[0]

    with torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Converting a tensor with requires_grad=True")  # as by `if float(z) > 0`
        run_with(call, pieces, value_of)
    return found


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
def _is_sound(coordinates: Coordinates, latents: Latents, call: Call, like: Tensor) -> bool:
    """Test that a run for several vectors is that for each of them, whatever the random numbers, and has an inverse."""
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
