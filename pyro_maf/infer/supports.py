"""Check that the supports of a model's latent sites do not change after the guide is set up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions.constraints import Constraint

from pyro_maf._core.random import seeded
from pyro_maf.infer.latents import Latents
from pyro_maf.infer.log_joint import FAILURES
from pyro_maf.infer.model import Call, RefusalError, sample_sites

__all__ = ["check_supports"]

STEP = 0.3
"""Displacement of latent variables, in unconstrained space, for the test if a support moves with them."""


@torch.no_grad()
def check_supports(who: str, call: Call, latents: Latents) -> None:
    """Refuse a support with a bound that depends on latent variables, or that is trained.

    A guide maps to each support as it was in the model's first run: if it moves, draws leave it, and the guide's
    posterior is wrong.

    Cost: one run of the model if a support has a tensor for a bound, and none if all bounds are plain numbers.

    Raises:
        ValueError: For such a support, with its site.
    """
    before = {name: list(_bounds(part.site["fn"].support)) for name, part in latents.parts.items()}
    for name, bounds in before.items():
        if any(bound.requires_grad for bound in bounds):
            raise RefusalError(_said(who, name, "a parameter of the model"))
    if not any(before.values()):
        return
    moved = {
        name: part.transform(part.transform.inv(part.site["value"]) + STEP) for name, part in latents.parts.items()
    }
    try:
        with poutine.block(), seeded(0, next(iter(moved.values())).device):
            sites = sample_sites(call.conditioned(moved))
    except FAILURES:
        return  # which does not concern supports
    for name, bounds in before.items():
        now = list(_bounds(sites[name]["fn"].support)) if name in sites else bounds
        if len(now) != len(bounds) or not all(map(_same, now, bounds)):
            raise RefusalError(_said(who, name, "other latent variables, or on a draw"))


def _said(who: str, name: str, cause: str) -> str:
    return (
        f"{who} expected supports that stay as they are, got that of site {name}, which depends on {cause}: draw a "
        "number with a fixed support, such as the unit interval, and scale it."
    )


def _bounds(support: Any) -> Iterator[Tensor]:
    """Iterate over the tensors of a constraint."""
    for value in getattr(support, "__dict__", {}).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Constraint):
            yield from _bounds(value)
        elif isinstance(value, (list, tuple)):
            for item in value:
                yield from _bounds(item) if isinstance(item, Constraint) else ()


def _same(now: Tensor, before: Tensor) -> bool:
    return now.shape == before.shape and torch.equal(now, before)
