"""Draws of a guide with their importance weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_maf.infer.guides import AutoFlow
from pyro_maf.infer.latents import masked_elements
from pyro_maf.infer.log_joint import FAILURES, LogJoint, is_enumerated, log_densities, total_by_draw
from pyro_maf.infer.model import (
    Call,
    Guide,
    RefusalError,
    Site,
    Trace,
    check_observes_nothing,
    latent_sites,
    layers_of,
    sample_sites,
)
from pyro_maf.infer.plates import PartialRowsError, nesting_of

__all__ = ["NoVerdictError", "Pairing", "Weighted", "arviz", "joint_of", "pairing", "smoothed", "weigh"]

ROUNDING = 32
"""Spread by rounding of ten thousand sums, in units in the last place of the log joint density."""
NEGLIGIBLE = 0.1
"""Spread of log weights, in nats, at which 99.7 % of the draws are effective: larger ones never count as equal."""
MOST_NUMBERS = 4_000_000
"""Maximum number of log-probabilities of single sites and rows in memory."""


class NoVerdictError(RefusalError):
    """Raised where a guide cannot be diagnosed.

    Attributes:
        reason: Why, as a clause.
    """

    def __init__(self, who: str, reason: str) -> None:
        super().__init__(f"{who} can not score the model as a whole: {reason}.")
        self.reason = reason


class Pairing(NamedTuple):
    """Layout of the runs of a model with its guide.

    Attributes:
        nesting: Number of their plate dimensions, counted from the right.
        is_vectorised: True if one run, inside a plate, scores many draws.
        enumerated: True if the model has discrete sites to sum out.
        runs: Number of runs that score all rows.
        numbers: Number of log-probabilities of a draw in a run.
    """

    nesting: int
    is_vectorised: bool
    enumerated: bool
    runs: int
    numbers: int


CIRCULAR = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)
"""Distributions of angles: their densities repeat every 2 pi, over all real numbers."""


class Weighted(NamedTuple):
    r"""Draws z of a guide q with log weights log p(x, z) - log q(z), in nats.

    Attributes:
        values: The value of each latent site, (draws, \*site).
        log_weights: (draws,); minus infinity where the model could not score a draw.
        rounding: Bound on their rounding error.
    """

    values: dict[str, Tensor]
    log_weights: Tensor
    rounding: float


@torch.no_grad()
def weigh(
    who: str,
    call: Call,
    guide: Guide,
    num_samples: int,
) -> Weighted:
    """Draw from the guide of a model and weight the draws.

    Raises:
        NoVerdictError: If not all rows of the model can be scored, or if draws of an angle take more than one turn.
        ValueError: If the guide leaves out a latent site of the model, or the model draws what no guide has.
    """
    pair = _Pair(who, call, guide)
    if pair.reason:
        raise NoVerdictError(who, pair.reason)
    chunk = max(1, min(num_samples, MOST_NUMBERS // pair.size))
    try:
        found = [pair.weigh(min(chunk, num_samples - start)) for start in range(0, num_samples, chunk)]
    except PartialRowsError as error:
        raise NoVerdictError(who, f"{error}; call it with all rows") from None
    values = {name: torch.cat([each.values[name] for each in found]) for name in pair.shapes}
    if name := next((name for name in pair.angles if _takes_turns(values[name])), ""):
        raise NoVerdictError(
            who,
            f"site {name} is an angle, and the guide's draws take more than one turn of it, which all have the same "
            "density: draw it from Uniform(-pi, pi) and put its own density into a pyro.factor",
        )
    return Weighted(
        values,
        torch.cat([each.log_weights for each in found]),
        max(each.rounding for each in found),
    )


@torch.no_grad()
def pairing(who: str, call: Call, guide: Guide) -> Pairing:
    """Determine the layout of the runs of a model with its guide, by trial runs.

    Raises:
        ValueError: If the guide leaves out a latent site of the model, or the model draws what no guide has.
    """
    pair = _Pair(who, call, guide)
    return Pairing(pair.nesting, pair.joint.is_vectorised, pair.joint.enumerated, pair.joint.runs, pair.size)


@torch.no_grad()
def joint_of(who: str, call: Call, guide: Guide) -> LogJoint:
    """Return the log joint density of a model as a function of its guide's sites.

    Raises:
        ValueError: As in `weigh`.
    """
    pair = _Pair(who, call, guide)
    if pair.reason:
        raise NoVerdictError(who, pair.reason)
    return pair.joint


class _Pair:
    """A model and its guide, with their traces."""

    def __init__(self, who: str, call: Call, guide: Guide) -> None:
        self._call, self._guide = call, guide
        try:
            self._try_out(who)
        except RefusalError:
            raise
        except (*FAILURES, IndexError):
            _check_shapes(who, call, guide)
            raise

    def _try_out(self, who: str) -> None:
        """Run both, and lay out their sites."""
        call, guide = self._call, self._guide
        guide_trace = call.of(guide).trace()
        example = call.replayed(guide_trace)
        check_observes_nothing(who, guide_trace, example)
        latents = latent_sites(example)
        missing = [name for name in latents if name not in guide_trace.nodes and not is_enumerated(latents[name])]
        if missing:
            raise RefusalError(
                f"{who} expected a guide of every latent site, got none of {', '.join(sorted(missing))}: add these to "
                "the guide, or sum discrete ones of finitely many values out with infer={'enumerate': 'parallel'}."
            )
        _check_guide_sites(who, guide_trace, latents)
        latents = {name: site for name, site in latents.items() if name in guide_trace.nodes}
        self.angles = [name for name, site in latents.items() if _is_angle(site["fn"])]
        self.shapes = {name: site["value"].shape for name, site in latents.items()}
        self._all_rows = guide.latents.shapes_of_all_rows if isinstance(guide, AutoFlow) else {}
        self.shapes.update(self._all_rows)
        self.joint = LogJoint(call, example, shapes=self.shapes)
        self.nesting = max(self.joint.nesting, nesting_of(guide_trace))
        draws, _ = self._draw(4)
        self.joint.settle(draws)
        check_draws(who, self.joint)
        self.reason = f"{self.joint.partial}; call it with all rows" if self.joint.partial else ""
        self._check_masks(who, latents, guide_trace, draws)
        sites = sample_sites(example).values()
        values = sum(site["value"].numel() for site in sites if isinstance(site["value"], Tensor))
        self.size = max(values, self.joint.numbers)

    def _check_masks(self, who: str, latents: Mapping[str, Site], guide_trace: Trace, draws: dict[str, Tensor]) -> None:
        """Raise if a guide scores entries that a mask excludes from the model: its bound has no upper limit."""
        masks = {name: masked_elements(site, site["value"]) for name, site in latents.items()}
        if isinstance(self._guide, AutoFlow):
            if not self._guide.latents.has_masks_of(latents):
                raise RefusalError(f"{who} expected latent sites masked as in the guide's set-up: use another guide.")
            return
        sites = sample_sites(guide_trace)
        for name, mask in masks.items():
            site = sites[name]
            own = None if mask is None else masked_elements(site, site["value"])
            if mask is not None and (own is None or not torch.equal(own, mask)):
                moved = torch.where(mask, draws[name].roll(1, 0), draws[name])
                if torch.equal(self.joint({**draws, name: moved}), self.joint(draws)):
                    self.reason = f"site {name} is masked in the model, and the guide scores it; mask it there too"

    def weigh(self, draws: int) -> Weighted:
        values, log_q = self._draw(draws)
        shaped = {name: value.reshape(draws, *self.shapes[name]) for name, value in values.items()}
        log_p = self.joint(values)
        size = torch.where(log_p.isfinite(), log_p.abs(), 0.0).max()
        return Weighted(shaped, log_p - log_q, ROUNDING * torch.finfo(log_p.dtype).eps * float(size))

    def _draw(self, draws: int) -> tuple[dict[str, Tensor], Tensor]:
        """Draw the latent sites, padded to the number of plates; also return their log-density."""
        if isinstance(self._guide, AutoFlow) and self._all_rows:
            return self._guide.scored_draws(draws, self.nesting, self._call)
        with pyro.plate("_draws", draws, dim=-self.nesting - 1):
            trace = self._call.of(self._guide).trace()
        trace.compute_log_prob()
        plates = (draws, *(1,) * self.nesting)
        values = {}
        sites = sample_sites(trace)
        for name in self.shapes:
            site = sites[name]
            value, event = site["value"], site["fn"].event_shape
            batch = torch.broadcast_shapes(value.shape[: value.dim() - len(event)], plates)
            values[name] = value.expand(batch + event)
        return values, total_by_draw(log_densities(trace), plates)


def _check_shapes(who: str, call: Call, guide: Guide) -> None:
    """Raise for a guide whose sites have other shapes than the model's, as of data with more rows."""
    try:
        drawn, alone = latent_sites(call.of(guide).trace()), latent_sites(call.trace())
    except FAILURES:
        return
    for name in drawn.keys() & alone.keys():
        got, expected = (tuple(sites[name]["value"].shape) for sites in (drawn, alone))
        if got != expected:
            raise RefusalError(
                f"{who} expected a guide whose site {name} has the shape {expected}, as in the model with these "
                f"arguments, got {got}: make another guide for data of another size."
            )


def _check_guide_sites(who: str, guide_trace: Trace, latents: Mapping[str, Site]) -> None:
    """Raise for a guide that draws a site that the model does not: no density in the model would match it."""
    sites = latent_sites(guide_trace)
    extra = [name for name in sites.keys() - latents if not (sites[name]["infer"] or {}).get("is_auxiliary")]
    if extra:
        raise RefusalError(
            f"{who} expected a guide of the model's latent sites alone, got one that draws {', '.join(sorted(extra))}: "
            "make a guide of this model, with the arguments that it is called with here, or mark what only the guide "
            "needs with infer={'is_auxiliary': True}."
        )


def _is_angle(fn: Distribution) -> bool:
    """True if a distribution is of angles, though its declared support is the real numbers."""
    return any(isinstance(layer, CIRCULAR) for layer in layers_of(fn))


def _takes_turns(angles: Tensor) -> bool:
    r"""True if draws of angles, (draws, \*site), span more than a turn: each further turn raises the bound."""
    return bool((angles.amax(0) - angles.amin(0) > 2 * math.pi).any())


def check_draws(who: str, joint: LogJoint) -> None:
    """Raise for a model that draws random numbers outside of its sites: its density differs from run to run."""
    if joint.hidden:
        raise RefusalError(
            f"{who} expected a model that draws no site but those of its guide, got draws of the hidden site "
            f"{', '.join(joint.hidden)}: pass the model without poutine.block, which sums discrete sites out that have "
            "infer={'enumerate': 'parallel'}."
        )
    if joint.is_random:
        raise RefusalError(
            f"{who} expected a model with one density at one value of its sites, got one that differs from run to run: "
            "put what it draws into sites that the guide has, and modules with dropout into eval mode."
        )


def smoothed(log_weights: Tensor, rounding: float = 0.0) -> tuple[Tensor, float]:
    """Return the normalised, Pareto-smoothed log weights, and k-hat, the shape of their tail.

    Log weights that differ by at most `rounding`, and by less than `NEGLIGIBLE`, count as equal.

    Reference:
        Vehtari et al., *Pareto smoothed importance sampling*, 2024.
    """
    scored = log_weights.isfinite()
    if int(scored.sum()) < 10:
        return log_weights.new_full(log_weights.shape, -torch.inf), float("inf")
    weights = log_weights[scored].double().cpu().numpy()
    if np.ptp(weights) < max(1e-10, min(rounding, NEGLIGIBLE)):  # the guide is the posterior
        return torch.where(scored, -scored.sum().log(), -torch.inf), float("-inf")
    with np.errstate(over="ignore"):  # for hopeless candidates of the tail's shape, arviz overflows
        found, k_hat = arviz().psislw(weights)
    result = torch.full(log_weights.shape, -torch.inf, dtype=torch.float64)
    result[scored.cpu()] = torch.as_tensor(np.asarray(found))
    return result.to(log_weights.device), float(k_hat)


def arviz() -> Any:
    """Import arviz lazily: it prints a notice, and two processes that import it at once can collide."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            for _ in range(2):
                with suppress(FileNotFoundError):
                    return import_module("arviz")
            return import_module("arviz")
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "Diagnosing a guide needs arviz, which is not installed: pip install pyro-maf[train].", name="arviz"
            ) from None
