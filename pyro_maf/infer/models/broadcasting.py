"""Explanations of why a model fails inside a plate of draws."""

from __future__ import annotations

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_maf.infer.models.model import Call, Guide, Site, Trace, latent_sites, sample_sites
from pyro_maf.infer.models.plates import nesting_of

__all__ = ["why_alone"]

DRAWS = 7
"""Number of draws in the trial, unlikely to equal any size in a model."""
SHOWN = 2
"""Maximum number of latent sites whose shapes are shown."""
LONGEST = 120
"""Maximum number of characters quoted from an error."""


@torch.no_grad()
def why_alone(call: Call, guide: Guide, drawn: Trace, single: Trace) -> str:
    """Describe how a model fails when it is run for several draws of its guide at once, and name the site.

    Args:
        call: The model with its arguments.
        guide: Its guide.
        drawn, single: Traces of the guide for one draw, and of the model with its values.

    Returns:
        A clause such as "with 7 draws at once site y has batch shape (7, 1, 20), expected (7, 20)"; "" if nothing
        fails, for instance if the density is NaN in any case.
    """
    trial = _Trial(single, max(nesting_of(single), nesting_of(drawn)))
    try:
        with pyro.plate("_draws", DRAWS, dim=-trial.nesting - 1):
            draws = call.of(guide).trace()
            with trial:
                many = call.replayed(draws)
        failure = trial.wrong_shape() or trial.wrong_density(call, many)
    except Exception as error:  # a model that was never meant for a batch may fail in any way
        failure = trial.wrong_shape() or trial.raised(error)
    return f"with {DRAWS} draws at once {failure}" if failure else ""


class _Trial(Messenger):
    """Handler of a run inside a plate of draws: records its sample sites, and compares them with those of one draw."""

    def __init__(self, single: Trace, nesting: int) -> None:
        super().__init__()
        self._single, self.nesting = sample_sites(single), nesting
        self._latents = {name: site["value"].shape for name, site in latent_sites(single).items()}
        self._batches: dict[str, torch.Size] = {}
        self._values: dict[str, torch.Size] = {}

    def _pyro_sample(self, msg: Site) -> None:
        if hasattr(msg["fn"], "batch_shape"):
            self._batches[msg["name"]] = msg["fn"].batch_shape

    def _pyro_post_sample(self, msg: Site) -> None:
        if isinstance(msg["value"], Tensor):
            self._values[msg["name"]] = msg["value"].shape

    def wrong_shape(self) -> str:
        """Name the sites whose batch shape does not broadcast to the expected one; "" if there are none."""
        return " and ".join(
            f"site {name} has batch shape {tuple(batch)}, expected {tuple(expected)}"
            for name, batch in self._batches.items()
            if name in self._single and not _broadcasts(batch, expected := self._expected(name))
        )

    def wrong_density(self, call: Call, many: Trace) -> str:
        """Name the sites whose log-density of the first draw differs between a run for all draws and one for it."""
        sites = sample_sites(many)
        alone = call.conditioned(
            {name: _first(sites[name]["value"]).reshape(self._latents[name]) for name in self._latents}
        )
        for trace in (alone, many):
            trace.compute_log_prob()
        totals = {name: site["log_prob_sum"] for name, site in sample_sites(alone).items() if name in sites}
        firsts = {name: _first(sites[name]["log_prob"]).sum() for name in totals}
        tolerance = {"rtol": 1e-3, "atol": 1e-3}
        wrong = [name for name in totals if not torch.allclose(firsts[name], totals[name], equal_nan=True, **tolerance)]
        if not wrong:
            return ""
        subject = f"site {wrong[0]} has" if len(wrong) == 1 else f"sites {', '.join(wrong)} have"
        return f"{subject} a different density than for each draw alone{self._shapes()}"

    def raised(self, error: Exception) -> str:
        """Describe the error that the model raised, and before which site."""
        sites = (name for name, site in self._single.items() if hasattr(site["fn"], "batch_shape"))
        name = next((name for name in sites if name not in self._values), None)
        before = f" before site {name}, whose batch shape should be {tuple(self._expected(name))}" if name else ""
        message = str(error).partition("\n")[0][:LONGEST].rstrip(".")
        return f"it raises {type(error).__name__}{before}{self._shapes()}: {message}"

    def _expected(self, name: str) -> torch.Size:
        """Return the expected batch shape of a site for several draws."""
        alone = self._single[name]["fn"].batch_shape
        return torch.Size([DRAWS, *[1] * (self.nesting - len(alone)), *alone])

    def _shapes(self) -> str:
        """Format the shapes of the last latent sites of the run, for all draws and for one, in brackets."""
        shapes = [
            f"there {name} has shape {tuple(self._values[name])}, alone {tuple(shape)}"
            for name, shape in self._latents.items()
            if name in self._values
        ]
        return f" ({'; '.join(shapes[-SHOWN:])})" if shapes else ""


def _first(draws: Tensor) -> Tensor:
    """Return the first of several draws, which may be a single one for all."""
    return draws.expand(DRAWS, *draws.shape[1:])[0]


def _broadcasts(batch: torch.Size, expected: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(batch, expected) == expected
    except RuntimeError:
        return False
