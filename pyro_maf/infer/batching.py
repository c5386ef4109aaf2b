"""Diagnosis of a model that cannot be run for many draws at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_maf.infer.log_joint import latent_sites, nesting_of

__all__ = ["why_alone"]

DRAWS = 7
"""Number of draws of the trial: unlikely to equal any size of a model."""
SHOWN = 2
"""Maximum number of latent sites whose shapes are shown."""
LONGEST = 120
"""Maximum number of characters quoted from an error."""


class _Sites(Messenger):
    """Handler that records the sample statements in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: dict[str, torch.Size] = {}
        self.values: dict[str, torch.Size] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if hasattr(msg["fn"], "batch_shape"):
            self.batches[msg["name"]] = msg["fn"].batch_shape

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["value"], Tensor):
            self.values[msg["name"]] = msg["value"].shape


@torch.no_grad()
def why_alone(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
    """Describe the failure of a model that is run for several draws of its guide at once, and name the site.

    Args:
        model, guide, args, kwargs: A model that can be run for one draw of the guide, and the arguments of
            both.

    Returns:
        A clause such as "with 7 draws at once site y has batch shape (7, 1, 20), expected (7, 20)"; "" if nothing
        fails, as for a density that is NaN in any case.
    """
    drawn = poutine.trace(guide).get_trace(*args, **kwargs)
    single = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)
    nesting = max(nesting_of(single), nesting_of(drawn))
    sites = _Sites()
    where, other = f"with {DRAWS} draws at once", None
    try:
        with pyro.plate("_draws", DRAWS, dim=-nesting - 1):
            draws = poutine.trace(guide).get_trace(*args, **kwargs)
            with sites:
                many = poutine.trace(poutine.replay(model, trace=draws)).get_trace(*args, **kwargs)
        if not _misshapen(single, sites, nesting):
            other = _other_density(model, args, kwargs, single, many)
    except Exception as error:  # a model that was never meant for a batch may fail in any way
        if not _misshapen(single, sites, nesting):
            scored = [name for name, site in single.nodes.items() if hasattr(site.get("fn"), "batch_shape")]
            missing = [name for name in scored if name not in sites.values]
            before = ""
            if missing:
                expected = tuple(_expected(single.nodes[missing[0]], nesting))
                before = f" before site {missing[0]}, whose batch shape should be {expected}"
            said = str(error).partition("\n")[0][:LONGEST].rstrip(".")
            return f"{where} it raises {type(error).__name__}{before}{_shapes(single, sites)}: {said}"
    for name, (batch, expected) in _misshapen(single, sites, nesting).items():
        return f"{where} site {name} has batch shape {tuple(batch)}, expected {tuple(expected)}"
    if other is None:
        return ""
    return f"{where} site {other} has another density than for each draw alone{_shapes(single, sites)}"


def _misshapen(single: Any, sites: _Sites, nesting: int) -> dict[str, tuple[torch.Size, torch.Size]]:
    """Return the sites whose batch shape does not broadcast to the expected one, with both shapes."""
    found = {}
    for name, batch in sites.batches.items():
        if name in single.nodes:
            expected = _expected(single.nodes[name], nesting)
            if not _broadcasts(batch, expected):
                found[name] = batch, expected
    return found


def _expected(site: Any, nesting: int) -> torch.Size:
    """Return the expected batch shape of a site for several draws."""
    alone = site["fn"].batch_shape
    return torch.Size([DRAWS, *[1] * (nesting - len(alone)), *alone])


def _broadcasts(batch: torch.Size, expected: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(batch, expected) == expected
    except RuntimeError:
        return False


def _other_density(
    model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], single: Any, many: Any
) -> str | None:
    """Return the first site whose log-density differs between several draws together and the first of them alone."""
    first = {
        name: many.nodes[name]["value"]
        .expand(DRAWS, *many.nodes[name]["value"].shape[1:])[0]
        .reshape(site["value"].shape)
        for name, site in latent_sites(single).items()
    }
    alone: Any = poutine.trace(poutine.condition(model, data=first)).get_trace(*args, **kwargs)
    for trace in (alone, many):
        trace.compute_log_prob()
    for name, site in alone.nodes.items():
        if site["type"] == "sample" and name in many.nodes:
            found = many.nodes[name]["log_prob"]
            if not torch.allclose(
                found.expand(DRAWS, *found.shape[1:])[0].sum(),
                site["log_prob_sum"],
                rtol=1e-3,
                atol=1e-3,
                equal_nan=True,
            ):
                return str(name)
    return None


def _shapes(single: Any, sites: _Sites) -> str:
    """Format the shapes of the last latent sites of the run, together and alone, in brackets."""
    met = [(name, site) for name, site in latent_sites(single).items() if name in sites.values]
    shown = [
        f"there {name} has shape {tuple(sites.values[name])}, alone {tuple(site['value'].shape)}"
        for name, site in met[-SHOWN:]
    ]
    return f" ({'; '.join(shown)})" if shown else ""
