"""What of a model's prototype trace goes with a guide into another process: shapes and plates, and no data."""

from __future__ import annotations

import copy
from typing import Any

from pyro import poutine
from pyro.distributions import Delta

from pyro_maf.infer.latents import Latents
from pyro_maf.infer.log_joint import latent_sites
from pyro_maf.infer.path_gradient import detached

__all__ = ["bare_latents", "bare_trace"]


def bare_latents(latents: Latents) -> Latents:
    """The layout of latent sites without the model's tensors, which may be parameters, or hang from its graph."""
    twin = copy.copy(latents)
    twin.parts = {
        name: part._replace(site=_bare_site(part.site), transform=detached(part.transform, []))
        for name, part in latents.parts.items()
    }
    return twin


def bare_trace(trace: poutine.Trace) -> poutine.Trace:
    """A trace of the latent sites alone."""
    twin = poutine.Trace()
    for name, site in latent_sites(trace).items():
        twin.add_node(name, **_bare_site(site))
    return twin


def _bare_site(site: dict[str, Any]) -> dict[str, Any]:
    """A site at its value, with a distribution of its shapes, and without what the distribution was called with."""
    value = site["value"].detach().clone()
    shapes = Delta(value, event_dim=site["fn"].event_dim)
    scale, mask = (detached(site[name], []) for name in ("scale", "mask"))
    return {**site, "fn": shapes, "value": value, "args": (), "kwargs": {}, "scale": scale, "mask": mask}
