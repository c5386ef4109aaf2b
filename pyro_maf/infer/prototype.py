"""The part of a prototype trace that is pickled with a guide: shapes and plates, and no data."""

from __future__ import annotations

import copy
from typing import cast

from pyro import poutine
from pyro.distributions import Delta

from pyro_maf.infer.latents import Latents
from pyro_maf.infer.model import Site, latent_sites
from pyro_maf.infer.path_gradient import detached

__all__ = ["bare_latents", "bare_trace"]


def bare_latents(latents: Latents) -> Latents:
    """Strip a layout of the model's tensors, which may be parameters or part of its graph."""
    twin = copy.copy(latents)
    twin.parts = {
        name: part._replace(site=_bare_site(part.site), transform=detached(part.transform, []))
        for name, part in latents.parts.items()
    }
    return twin


def bare_trace(trace: poutine.Trace) -> poutine.Trace:
    """Reduce a trace to its latent sites."""
    twin = poutine.Trace()
    for name, site in latent_sites(trace).items():
        twin.add_node(name, **_bare_site(site))
    return twin


def _bare_site(site: Site) -> Site:
    """Copy a site with its value and a distribution of its shapes, without the distribution's parameters."""
    value = site["value"].detach().clone()
    shapes = Delta(value, event_dim=site["fn"].event_dim)
    scale, mask = (detached(site[name], []) for name in ("scale", "mask"))
    twin = {**site, "fn": shapes, "value": value, "args": (), "kwargs": {}, "scale": scale, "mask": mask}
    return cast("Site", twin)
