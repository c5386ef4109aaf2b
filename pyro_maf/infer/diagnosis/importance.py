"""Draws of a guide with their importance weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_maf.infer.diagnosis.missed_modes import POOL, Region, missed_modes, why_no_search
from pyro_maf.infer.diagnosis.propriety import IMPROPER, seems_improper
from pyro_maf.infer.guides.auto_flow import AutoFlow
from pyro_maf.infer.models.double_precision import promoted, scored, widened
from pyro_maf.infer.models.enumeration import is_enumerated, log_densities, total_by_draw
from pyro_maf.infer.models.latents import Latents, masked_elements
from pyro_maf.infer.models.log_joint import LogJoint
from pyro_maf.infer.models.model import (
    FAILURES,
    Call,
    Guide,
    RefusalError,
    Site,
    Trace,
    check_observes_nothing,
    data_sites,
    latent_sites,
    layers_of,
    sample_sites,
)
from pyro_maf.infer.models.plates import PartialRowsError, nesting_of

__all__ = ["NoVerdictError", "Pair", "Search", "Weighted"]

ROUNDING = 32
"""Spread of ten thousand sums due to rounding, in units in the last place of the log joint density."""
ROUNDED, LOOKED_AT = 0.1, 512
"""Rounding error of a log joint density, in nats, from which on weights are computed in float64, and the number of
draws at which it is measured."""
Score = Callable[[dict[str, Tensor]], Tensor]
"""Log joint density of draws by site, (draws,)."""
TRIES = 10
"""Number of draws of a guide at which a model is tried."""
MOST_NUMBERS = 4_000_000
"""Maximum number of log-probabilities of single sites and rows in memory."""
CIRCULAR = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)
"""Distributions of angles, whose densities repeat every 2 pi, over all real numbers."""


class NoVerdictError(RefusalError):
    """Raised if a guide cannot be diagnosed.

    Attributes:
        reason: The reason, as a clause.
    """

    def __init__(self, who: str, reason: str = "") -> None:
        # Pyro re-raises an error from a trace as a new one of the same class, with a table and the whole text.
        super().__init__(f"{who} cannot score the model as a whole: {reason}." if reason else who)
        self.reason = reason


class Weighted(NamedTuple):
    r"""Draws z of a guide q with log weights log p(x, z) - log q(z), in nats.

    Attributes:
        values: The value of each latent site, (draws, \*site).
        log_weights: (draws,); minus infinity for draws that the model could not score.
        rounding: Upper bound of their rounding error.
    """

    values: dict[str, Tensor]
    log_weights: Tensor
    rounding: float


class Search(NamedTuple):
    """Regions that a guide has missed, or why they were not searched for, as a clause; "" if they were."""

    regions: tuple[Region, ...]
    obstacle: str


class Pair:
    """A model and its guide, and the layout of their runs, from trial runs.

    Args:
        who: The caller, for error messages.
        call: The model with its arguments.
        guide: Its guide.

    Attributes:
        joint: Log joint density of the model as a function of the guide's sites.
        traces: A trace of the guide, and one of the model with the same values.
        nesting: Number of plate dimensions of both, counted from the right.
        numbers: Number of log-probabilities of a draw in one run.

    Raises:
        ValueError: If the guide leaves out a latent site of the model, or the model draws a site that no guide has.
    """

    @torch.no_grad()
    def __init__(self, who: str, call: Call, guide: Guide) -> None:
        self._who, self._call, self._guide = who, call, guide
        failure: Exception | None = None
        for _ in range(TRIES):  # the model may raise for some draws, perhaps the first
            try:
                self._lay_out()
            except RefusalError:
                raise
            except (*FAILURES, IndexError) as error:
                _check_shapes(who, call, guide)
                failure = error
            else:
                return
        raise cast("Exception", failure)

    def complete_joint(self) -> LogJoint:
        """Return the log joint density of all rows of the model.

        Raises:
            NoVerdictError: If not all rows can be scored, or if the guide scores entries that the model masks.
        """
        if self._obstacle:
            raise NoVerdictError(self._who, self._obstacle)
        return self.joint

    @torch.no_grad()
    def weigh(self, num_samples: int) -> Weighted:
        """Draw from the guide and weight the draws.

        Raises:
            NoVerdictError: As `complete_joint`, and if draws of an angle span more than one turn.
        """
        joint, who = self.complete_joint(), self._who
        most = max(1, MOST_NUMBERS // self.numbers)
        try:
            blocks = [self._weigh(joint, min(most, num_samples - start)) for start in range(0, num_samples, most)]
        except PartialRowsError as error:
            raise NoVerdictError(who, f"{error}; call it with all rows") from None
        values = {name: torch.cat([block.values[name] for block in blocks]) for name in self._shapes}
        for name in self._angles:
            if _takes_turns(values[name]):
                raise NoVerdictError(
                    who,
                    f"site {name} is an angle, and the guide's draws take more than one turn of it, which all have the "
                    "same density: draw it from Uniform(-pi, pi) and put its own density into a pyro.factor",
                )
        log_weights = torch.cat([block.log_weights for block in blocks])
        return Weighted(values, log_weights, max(block.rounding for block in blocks))

    def data(self) -> dict[str, Tensor]:
        """Values of the observed sites."""
        return {name: site["value"] for name, site in data_sites(self.traces[1]).items()}

    def log_likelihood(self, weighted: Weighted) -> dict[str, Tensor]:
        r"""As `LogJoint.log_likelihood`, for draws (draws, \*site)."""
        values = {}
        for name, value in weighted.values.items():
            place = value.dim() - self._sites[name]["fn"].event_dim
            plates = (*(1,) * (self.joint.nesting + 1 - place), *value.shape[1:place])
            values[name] = value.reshape(len(value), *plates, *value.shape[place:])
        return self.joint.log_likelihood(values)

    @property
    def most_at_once(self) -> int:
        """Number of draws that one run of the model can weight; 0 if it has to be run several times."""
        return MOST_NUMBERS // self.numbers if self.joint.is_vectorised and self.joint.runs == 1 else 0

    def unscored_sites(self) -> list[str]:
        """Names of the sites of the model that had no finite density in its trial run."""
        trace = self.traces[1]
        trace.compute_log_prob()
        return [name for name, site in sample_sites(trace).items() if not site["log_prob"].isfinite().all()]

    def modes(self, weighted: Weighted, log_evidence: float) -> Search:
        """Search for modes outside of the guide's draws, with a share of the posterior that the guide lacks.

        Not for models that have to be run for each draw, latent variables of the rows of a plate, or angles.

        Raises:
            NoVerdictError: If the posterior seems to be improper.
        """
        latents = self._latents()
        if not self.joint.is_vectorised:
            return Search((), "the model is run draw by draw")
        if latents is None:
            return Search((), "there are latent variables of rows, or under a mask, or that form no vector")
        if self._angles:
            return Search((), f"site {self._angles[0]} is an angle")

        def score(rows: Tensor) -> Tensor:
            values, log_det = latents.unpack(rows.reshape(len(rows), *(1,) * self.joint.nesting, -1))
            return self.joint(values) + log_det.reshape(len(rows))

        try:
            draws, _ = latents.pack(weighted.values)
            draws = draws[draws.isfinite().all(1)]
            if (obstacle := why_no_search(draws)) or not draws.shape[1]:
                return Search((), obstacle)
            starts = self._prior_starts(latents).to(draws)
            if seems_improper(score, starts, draws):
                raise NoVerdictError(self._who, IMPROPER)
            return Search(tuple(missed_modes(score, draws, log_evidence, starts, latents.sites)), "")
        except PartialRowsError:
            return Search((), "the model does not score all rows at once")

    def _latents(self) -> Latents | None:
        """The layout of the sites as one vector; None if that is impossible, or they belong to rows."""
        if isinstance(self._guide, AutoFlow):
            latents = self._guide.latents
            return None if latents.rows or self._all_rows else latents
        if any(masked_elements(site, site["value"]) is not None for site in self._sites.values()):
            return None
        try:
            return Latents(self._who, self._sites, torch.Size())
        except RefusalError:
            return None

    def _prior_starts(self, latents: Latents) -> Tensor:
        try:
            draws, _ = latents.pack(self.joint.prior_draws(POOL))
        except (*FAILURES, NotImplementedError):  # for instance for an improper prior
            return latents.initial()[None]
        return draws[draws.isfinite().all(1)]

    def _lay_out(self) -> None:
        """Run model and guide, and compare their sites."""
        who, call, guide = self._who, self._call, self._guide
        guide_trace = call.of(guide).trace()
        example = call.replayed(guide_trace)
        self.traces = guide_trace, example
        check_observes_nothing(who, guide_trace, example)
        latents = _shared_sites(who, guide_trace, example)
        self._sites = latents
        self._angles = [name for name, site in latents.items() if _is_angle(site["fn"])]
        self._all_rows = guide.latents.shapes_of_all_rows if isinstance(guide, AutoFlow) else {}
        self._shapes = {name: site["value"].shape for name, site in latents.items()} | self._all_rows
        self.joint = LogJoint(call, example, shapes=self._shapes)
        self.nesting = max(self.joint.nesting, nesting_of(guide_trace))
        draws, _ = self._draw(4)
        self.joint.settle(draws)
        self.joint.check_sites(who)
        _check_draws(who, self.joint)
        self._obstacle = f"{self.joint.partial}; call it with all rows" if self.joint.partial else ""
        self._check_masks(latents, guide_trace, draws)
        sites = sample_sites(example).values()
        values = sum(site["value"].numel() for site in sites if isinstance(site["value"], Tensor))
        self.numbers = max(values, self.joint.numbers)

    def _check_masks(self, latents: Mapping[str, Site], guide_trace: Trace, draws: dict[str, Tensor]) -> None:
        """Find entries that the guide scores but the model masks: the evidence lower bound has no upper limit."""
        if isinstance(self._guide, AutoFlow):
            if not self._guide.latents.has_masks_of(latents):
                raise RefusalError(
                    f"{self._who} expected latent sites masked as in the guide's set-up: use another guide."
                )
            return
        sites = sample_sites(guide_trace)
        for name, site in latents.items():
            mask = masked_elements(site, site["value"])
            of_guide = None if mask is None else masked_elements(sites[name], sites[name]["value"])
            if mask is not None and (of_guide is None or not torch.equal(of_guide, mask)):
                moved = torch.where(mask, draws[name].roll(1, 0), draws[name])
                if torch.equal(self.joint({**draws, name: moved}), self.joint(draws)):
                    self._obstacle = f"site {name} is masked in the model, and the guide scores it; mask it there too"

    def _weigh(self, joint: LogJoint, draws: int) -> Weighted:
        values, log_q = self._draw(draws)
        shaped = {name: value.reshape(draws, *self._shapes[name]) for name, value in values.items()}
        log_p = scored(*_resolving(joint, values), log_q)
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
        values, sites = {}, sample_sites(trace)
        for name in self._shapes:
            value, event = sites[name]["value"], sites[name]["fn"].event_shape
            batch = torch.broadcast_shapes(value.shape[: value.dim() - len(event)], plates)
            values[name] = value.expand(batch + event)
        return values, total_by_draw(log_densities(trace), plates)


def _resolving(joint: LogJoint, values: dict[str, Tensor]) -> tuple[Score, dict[str, Tensor]]:
    """Return a log joint density and values for it, in float64 if float32 does not resolve it at some draws."""
    if next(iter(values.values())).dtype == torch.float64 or not joint.is_vectorised or joint.runs > 1:
        return joint, values
    double = promoted(joint)
    wide = {name: widened(value) for name, value in values.items()}
    first = joint({name: value[:LOOKED_AT] for name, value in values.items()})
    try:
        errors = (double({name: value[:LOOKED_AT] for name, value in wide.items()}) - first).abs().nan_to_num(nan=0.0)
    except Exception:  # a model not written for float64 may fail in any way
        return joint, values
    return (double, wide) if bool(errors.median() < ROUNDED < errors.max()) else (joint, values)


def _check_shapes(who: str, call: Call, guide: Guide) -> None:
    """Raise for a guide whose sites differ in shape from the model's, for instance because the data have more rows."""
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


def _shared_sites(who: str, guide_trace: Trace, model_trace: Trace) -> dict[str, Site]:
    """Return the latent sites of the model that its guide has.

    Raises:
        ValueError: If the guide lacks one that is not enumerated, or draws a site that the model does not, to which no
            density in the model would correspond.
    """
    latents, drawn = latent_sites(model_trace), latent_sites(guide_trace)
    missing = [name for name in latents if name not in guide_trace and not is_enumerated(latents[name])]
    if missing:
        raise RefusalError(
            f"{who} expected a guide of every latent site, got none of {', '.join(sorted(missing))}: add these to "
            "the guide, or sum discrete ones of finitely many values out with infer={'enumerate': 'parallel'}."
        )
    extra = [name for name in drawn.keys() - latents if not (drawn[name]["infer"] or {}).get("is_auxiliary")]
    if extra:
        raise RefusalError(
            f"{who} expected a guide of only the model's latent sites, got one that draws {', '.join(sorted(extra))}: "
            "make a guide of this model, with the arguments that it is called with here, or mark what only the guide "
            "needs with infer={'is_auxiliary': True}."
        )
    return {name: site for name, site in latents.items() if name in guide_trace}


def _is_angle(fn: Distribution) -> bool:
    """Return whether a distribution is over angles, although its declared support is the real numbers."""
    return any(isinstance(layer, CIRCULAR) for layer in layers_of(fn))


def _takes_turns(angles: Tensor) -> bool:
    r"""Return whether draws of angles, (draws, \*site), span more than a turn: each further turn raises the bound."""
    return bool((angles.amax(0) - angles.amin(0) > 2 * math.pi).any())


def _check_draws(who: str, joint: LogJoint) -> None:
    """Raise for a model that draws random numbers outside of its sites, so that its density differs from run to run."""
    if joint.hidden:
        raise RefusalError(
            f"{who} expected a model that draws only the sites of its guide, got draws of the hidden site "
            f"{', '.join(joint.hidden)}: pass the model without poutine.block, which sums discrete sites out that have "
            "infer={'enumerate': 'parallel'}."
        )
    if joint.is_random:
        raise RefusalError(
            f"{who} expected a model whose density depends on its sites only, got one that differs from run to run: "
            "put what it draws into sites that the guide has, and modules with dropout into eval mode."
        )
