"""Start of a guide: normals near the posterior, and the coordinates in which they are defined."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from pyro_maf.infer.models.coordinates import Coordinates
from pyro_maf.infer.models.hierarchy import coordinates_of
from pyro_maf.infer.models.latents import Latents
from pyro_maf.infer.models.model import Call, RefusalError, Trace
from pyro_maf.infer.models.posterior import Posterior
from pyro_maf.infer.start.degrees import fit_degrees, normal_sites
from pyro_maf.infer.start.initialization import ALONE_POOL, DENSE, Start, best_start, other_points
from pyro_maf.infer.start.modes import images
from pyro_maf.infer.start.normal import Normal, WideNormal, narrow_place, wide_start

__all__ = ["start_of"]

PRIOR_DRAWS = 64


def start_of(
    call: Call, prototype: Trace, latents: Latents, scale: float | None, start_is_chosen: bool
) -> tuple[Start | WideNormal, Coordinates | None]:
    """Initialise a guide: return its normals, and their coordinates or None.

    Entries that a mask excludes from the model have no posterior; they are removed from `latents`.

    Args:
        call, prototype, latents: As in `Posterior`.
        scale: Scale of an isotropic normal at the initial values, or None for the best normal of an ascent.
        start_is_chosen: Whether the user chose the starting point. If not, there are ascents from other points too, for
            a model that scores many draws in one run.

    Raises:
        ValueError: For a support that moves in a model that cannot be run for many draws, or if all entries are left
            out.
    """
    moving = latents.release_moving(call)
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
        loc = coordinates.centre(latents, latents.sites(loc), call)
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


def _start_near(posterior: Posterior, place: Tensor, proposals: list[Normal], is_chosen: bool) -> Start | WideNormal:
    """Initialise a guide of a model that scores many draws in one run, from a diagonal normal, (2, D)."""
    if place.shape[1] > DENSE:
        return wide_start(posterior, place)
    if is_chosen:
        return best_start(posterior, place[0], proposals=proposals)
    others = other_points(posterior, place[0], posterior.prior_vectors(PRIOR_DRAWS))
    return best_start(posterior, place[0], others, proposals=proposals, images=partial(images, posterior))


def _isotropic(loc: Tensor, scale: float) -> Start | WideNormal:
    """Return a normal with the same scale in every direction."""
    if len(loc) > DENSE:
        return WideNormal.diagonal(loc, torch.full_like(loc, scale))
    return Start.single(Normal.isotropic(loc, scale))._replace(is_fitted=False)
