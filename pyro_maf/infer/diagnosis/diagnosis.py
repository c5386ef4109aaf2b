"""Diagnosis of a guide by Pareto-smoothed importance sampling, and reweighted draws."""

from __future__ import annotations

import math
import warnings
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyro_maf._core.checks import check_positive
from pyro_maf._core.messages import require
from pyro_maf.infer.diagnosis.importance import NoVerdictError, Pair, Weighted
from pyro_maf.infer.diagnosis.missed_modes import LEAST, Region, missed_sentence, percent, places
from pyro_maf.infer.diagnosis.pareto import smoothed_log_weights
from pyro_maf.infer.guides.auto_flow import AutoFlow
from pyro_maf.infer.models.model import Call, Guide, Model, check_call, check_pair, without_empty_tables

__all__ = ["Diagnosis", "diagnose", "reweight", "to_arviz"]

Grade = Literal["good", "usable", "poor", "worthless", "none"]

GOOD, USABLE = 0.5, 0.7
"""Values of k-hat below which an importance-weighted estimate converges fast, and at all."""
MISPLACED = 0.08
"""Maximum fraction of misplaced probability of a good guide: no classifier is right about more than 54 draws in 100."""
HALF = 0.5
"""Fraction of misplaced probability from which on a guide is far from the posterior."""
EVEN = 0.95
"""Fraction of effective draws above which the shape of the weights' tail does not matter."""
FEW = 0.1
"""Fraction of effective draws below which a light tail only means that hardly any of it was sampled."""
MORE, SURE = 10, 2
"""Factor by which the number of draws is raised if k-hat is not `SURE` standard errors below `GOOD` or above `USABLE`.
That halves the error of k-hat, which is too large if weights hardly differ and few draws are in their tail."""
CANDIDATES = 4
"""Number of weighted draws for each draw that `reweight` returns."""


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """Quality of a guide as an approximation of the posterior.

    Attributes:
        k_hat: Pareto shape of the tail of the importance weights p(x, z) / q(z): below 0.5 good, below 0.7 usable. If
            the weights hardly differ, with 95 % of the draws effective, it only concerns extreme quantiles.
        ess: Effective sample size of the smoothed weights, out of `num_samples`.
        elbo: Evidence lower bound in nats.
        elbo_se: Standard error of `elbo` in nats.
        num_samples: Number of weighted draws.
        unscored: Number of draws that the model could not score; they are left out.
        reason: Why there is no verdict, as a clause; "" if there is one. Without a verdict the figures are NaN.
        log_evidence: Logarithm of the mean of the smoothed weights in nats, log p(x); as reliable as `reweight`.
        log_evidence_se: Standard error of `log_evidence` in nats.
        misplaced: Total variation distance from the posterior, as far as the guide's draws reach: the fraction of
            probability that is in the wrong place. No classifier distinguishes the guide's draws from the posterior's
            with an accuracy above (1 + misplaced) / 2.
        missed: Modes outside of the guide's draws, the largest first, each with `values` of the sites, `log_joint` and
            its `share` of the posterior, if this is above 5 % or so far away that standard deviations depend on it. If
            there are none, what lies around the draws, with `is_mode` false.
        unsearched: Why such modes were not searched for, as a clause; "" if they were.
        k_hat_se: Standard error of `k_hat`.
        grade: The conclusion in one word: "good", "usable", "poor", "worthless", or "none" without a verdict.
        verdict: The conclusion in one sentence.
    """

    k_hat: float = math.nan
    ess: float = math.nan
    elbo: float = math.nan
    elbo_se: float = math.nan
    num_samples: int = 0
    unscored: int = 0
    reason: str = ""
    log_evidence: float = math.nan
    log_evidence_se: float = math.nan
    misplaced: float = math.nan
    missed: tuple[Region, ...] = field(default=(), compare=False)
    unsearched: str = ""

    @property
    def k_hat_se(self) -> float:
        """Standard error of k-hat, as for the shape of a generalised Pareto distribution at maximum likelihood."""
        if not math.isfinite(self.k_hat):
            return 0.0 if self.k_hat == -math.inf else self.k_hat
        scored = max(1, self.num_samples - self.unscored)
        return (1 + max(0.0, self.k_hat)) / min(scored / 5, 3 * scored**0.5) ** 0.5

    @property
    def grade(self) -> Grade:
        """The conclusion from the figures, in one word."""
        if self.reason:
            return "none"
        if self.unscored > self.num_samples // 2:
            return "worthless"
        if self.k_hat < USABLE and self._covers_little:
            return "poor"
        if self._misses_much and not self._covers_little:
            return "poor"
        if self._is_close and self.can_be_reweighted:
            return "good"
        if self._is_close or self.can_be_reweighted:
            return "usable"
        return "worthless" if self.k_hat >= 1 and self._most_misplaced > HALF else "poor"

    @property
    def verdict(self) -> str:
        """The conclusion from the figures, in one sentence."""
        if self.reason:
            return f"No verdict: {self.reason}."
        if self.unscored > self.num_samples // 2:
            return "The model could not score most draws of this guide: it is not near the posterior."
        if self._misses_much and not self._covers_little:
            return missed_sentence(self.missed)
        if self.k_hat < USABLE and self._covers_little:
            return (
                f"k-hat {self.k_hat:.2f} would do, but only {self.ess:.0f} of {self.num_samples} draws count: the "
                "guide covers little of the posterior, and may have missed a part of it without a trace; give it more "
                "layers or steps."
            )
        clause = f"; {self.caveat}" if self.caveat else ""
        return f"{self._sentence().rstrip('.')}{clause}."

    @property
    def caveat(self) -> str:
        """A reservation about a guide that may be used, as a clause; "" if there is none."""
        if self.grade not in ("good", "usable"):
            return ""
        if self.missed:
            return (
                f"{percent(self._missed_share)} of the posterior, {places(self.missed)}, is so far away that standard "
                "deviations are larger than the guide's by a tenth or more, though quantiles hardly differ"
            )
        return f"other modes were not looked for, since {self.unsearched}" if self.unsearched else ""

    def _sentence(self) -> str:
        k_hat, share = f"k-hat {self.k_hat:.2f}", f"{percent(self._most_misplaced)} of the probability is misplaced"
        match self.grade:
            case "good" if self.k_hat == -math.inf:
                return "The weights are equal, so the guide is good: it is the posterior, as far as its draws reach."
            case "good" if self.k_hat < GOOD:
                return f"{k_hat} is good, and {share}: draws of this guide may be used as they are, or reweighted."
            case "good" if not self._are_even:
                return f"The guide is good: {share}, so that its draws may be used as they are, or reweighted."
            case "good":
                return (
                    "The weights hardly differ, so the guide is good: "
                    f"{100 * self.ess / self.num_samples:.1f} % of the draws are effective and {share}, so that they "
                    f"may be used as they are; {k_hat} is the shape of the tail of these weights, not its size, and "
                    "concerns extreme quantiles alone."
                )
            case "usable" if self.can_be_reweighted:
                return f"{k_hat} is usable: {share}, which `reweight` corrects."
            case "usable":
                return (
                    f"The guide is usable: {share}, so means and intervals will do; but {k_hat} says that its tails "
                    "are too light to be corrected by `reweight`."
                )
            case "poor":
                return (
                    f"{k_hat} is poor: the guide misses part of the posterior, and reweighting cannot be relied on; "
                    "give it more layers or steps, reparameterise the model, or run NUTS on `neutra`."
                )
        return (
            f"{k_hat} is worthless: the guide is far from the posterior; reparameterise the model or sample it with "
            "NUTS."
        )

    @property
    def _most_misplaced(self) -> float:
        """The fraction of misplaced probability or, if unknown, its upper bound from the effective sample size."""
        if not math.isnan(self.misplaced):
            return self.misplaced
        return min(1.0, 0.5 * math.sqrt(max(0.0, self.num_samples / self.ess - 1))) if self.ess else 1.0

    @property
    def _is_close(self) -> bool:
        return self._most_misplaced <= MISPLACED

    @property
    def _are_even(self) -> bool:
        """True if the weights hardly differ, so that the shape of their tail does not matter."""
        return self.ess > EVEN * self.num_samples

    @property
    def _missed_share(self) -> float:
        return sum(region.share for region in self.missed)

    @property
    def _misses_much(self) -> bool:
        return self._missed_share > LEAST

    @property
    def _covers_little(self) -> bool:
        return self.ess < FEW * self.num_samples

    @property
    def can_be_reweighted(self) -> bool:
        """True if `reweight` is reliable: k-hat is below 0.7, or the weights are about equal."""
        return self.k_hat < USABLE or self._are_even

    def __repr__(self) -> str:
        if self.reason:
            return f"Diagnosis({self.verdict})"
        unscored = f"; {self.unscored} draws could not be scored" if self.unscored else ""
        evidence = ""
        if self.can_be_reweighted and math.isfinite(self.log_evidence):
            evidence = f", log evidence {self.log_evidence:.3f} +- {self.log_evidence_se:.3f}"
        is_read = math.isfinite(self.k_hat) and not (self._are_even and self.k_hat >= USABLE)
        k_hat = f", k-hat {self.k_hat:.2f} +- {self.k_hat_se:.2f}" if is_read else ""
        return (
            f"Diagnosis(ELBO {self.elbo:.3f} +- {self.elbo_se:.3f} nats{evidence}, effective sample size "
            f"{self.ess:.0f} of {self.num_samples}{unscored}{k_hat};\n  {self.verdict})"
        )


def diagnose(model: Model, guide: Guide, *args: object, num_samples: int = 10_000, **kwargs: object) -> Diagnosis:
    r"""Diagnose a guide by the importance weights p(x, z) / q(z) of its draws.

    Discrete sites of the model with `infer={"enumerate": "parallel"}` are summed out. If its plates subsample, all rows
    are scored, in runs over minibatches; if that is not possible, for instance because the data are a minibatch
    already, there is no verdict, and `Diagnosis.reason` says why. Weights are computed only where the guide has mass,
    so ascents from dispersed points search for modes elsewhere and estimate their share of the posterior:
    `Diagnosis.missed`. There is no search if the model is run draw by draw or has more than 200 latent variables; the
    verdict says so, and `Diagnosis.unsearched` why. If float32 does not resolve the density at the draws, weights are
    computed in float64.

    Args:
        model: A Pyro model.
        guide: Its guide: one of this package, of Pyro, or your own.
        num_samples: Number of draws to weight; up to ten times as many, in one run of the model, if k-hat is within two
            standard errors of 0.5 to 0.7.
        *args, **kwargs: Arguments of model and guide.

    Returns:
        A `Diagnosis`.

    Cost: `num_samples` draws of the guide and evaluations of the model on all rows, in batches if the model allows
        them.
    The search for modes, with up to 200 latent variables, takes about 5,000 more evaluations and a few dozen gradients
    of 16 rows.

    Raises:
        TypeError: If model and guide are swapped, or the model does not accept the arguments.
        ValueError: If the guide leaves out a latent site of the model, or the model draws a site that no guide has.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> diagnosis = diagnose(model, AutoNormal(model, init_scale=0.9))
        >>> diagnosis.grade, abs(diagnosis.log_evidence) < 0.02
        ('good', True)

    Reference:
        Yao et al., *Yes, but did it work? Evaluating variational inference*, 2018; Vehtari et al., *Pareto smoothed
        importance sampling*, 2024; Ionides, *Truncated importance sampling*, 2008.
    """
    check_positive("diagnose", "num_samples", num_samples, least=100)
    try:
        pair = _pair("diagnose", Call(model, args, kwargs), guide)
        weighted, _, diagnosis = _diagnosed_draws(pair, num_samples)
        margin, more = SURE * diagnosis.k_hat_se, min(MORE * num_samples, pair.most_at_once)
        if GOOD - margin < diagnosis.k_hat < USABLE + margin and more > num_samples:
            diagnosis = _diagnosed_draws(pair, more).diagnosis
        search = pair.modes(weighted, diagnosis.log_evidence)
        return replace(diagnosis, missed=search.regions, unsearched=search.obstacle)
    except NoVerdictError as error:
        return Diagnosis(reason=error.reason)


def reweight(
    model: Model, guide: Guide, *args: object, num_samples: int = 4_000, **kwargs: object
) -> dict[str, Tensor]:
    r"""Draw from the posterior: resample draws of a guide by their Pareto-smoothed importance weights.

    Args:
        model, guide, *args, **kwargs: As in `diagnose`.
        num_samples: Number of draws to return, out of four times as many weighted ones.

    Returns:
        The value of each latent site, (num_samples, \*site). A draw may occur more than once.

    Cost: as `diagnose` with four times `num_samples`.

    Warns:
        UserWarning: If k-hat is 0.7 or more and less than 95 % of the draws are effective: the weights are unreliable.

    Raises:
        TypeError: If model and guide are swapped, or the model does not accept the arguments.
        ValueError: If the guide leaves out a latent site, or the model can score none of its draws or not all rows.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> model = lambda: pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> draws = reweight(model, AutoNormal(model, init_scale=0.9))
        >>> bool(abs(draws["z"].std() - 1) < 0.05)
        True

    Reference:
        Vehtari et al., *Pareto smoothed importance sampling*, 2024.
    """
    check_positive("reweight", "num_samples", num_samples)
    draws = _diagnosed_draws(_pair("reweight", Call(model, args, kwargs), guide), max(100, CANDIDATES * num_samples))
    if not draws.log_weights.isfinite().any():
        raise ValueError("reweight found no draw of the guide that the model can score.")
    if not draws.diagnosis.can_be_reweighted:
        k_hat = draws.diagnosis.k_hat
        warnings.warn(f"k-hat is {k_hat:.2f}: reweighting cannot correct this guide.", UserWarning, stacklevel=2)
    index = _systematic(draws.log_weights.exp(), num_samples)
    return {name: value[index] for name, value in draws.weighted.values.items()}


def to_arviz(model: Model, guide: Guide, *args: object, num_samples: int = 4_000, **kwargs: object) -> Any:
    """Convert draws of a guide to arviz, for its summaries and plots.

    Args:
        model, guide, *args, **kwargs: As in `diagnose`.
        num_samples: Number of draws, as one chain.

    Returns:
        An `xarray.DataTree`, or an `arviz.InferenceData` before arviz 1. `posterior` holds the unweighted draws, and
        its attributes the diagnosis; `sample_stats` holds the smoothed log weights, as `log_weight`; `observed_data`
        the observed sites; `log_likelihood` the log-densities of their rows, for `arviz.loo` and `arviz.compare`. The
        latter is left out if rows have no separate densities, because discrete sites are summed out, or if there would
        be more than 10^8 numbers.

    Cost: a run of the model for many draws, or one for each draw of a model that does not broadcast.

    Raises:
        TypeError: If model and guide are swapped, or the model does not accept the arguments.
        ValueError: If the guide leaves out a latent site, or the model cannot score all rows.
        ModuleNotFoundError: Without the `all` extra.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> rates = lambda: pyro.sample("rate", dist.Gamma(torch.ones(3), 1.0).to_event(1))
        >>> to_arviz(rates, AutoNormal(rates)).posterior["rate"].shape
        (1, 4000, 3)
    """
    check_positive("to_arviz", "num_samples", num_samples, least=100)
    pair = _pair("to_arviz", Call(model, args, kwargs), guide)
    draws = _diagnosed_draws(pair, num_samples)
    diagnosis = draws.diagnosis
    tables = {
        "posterior": draws.weighted.values,
        "sample_stats": {"log_weight": draws.log_weights},
        "log_likelihood": pair.log_likelihood(draws.weighted),
    }
    groups = {
        group: {name: value[None].cpu().numpy() for name, value in values.items()}
        for group, values in tables.items()
        if values
    }
    if data := {name: value.cpu().numpy() for name, value in pair.data().items()}:
        groups["observed_data"] = data
    attributes = {name: getattr(diagnosis, name) for name in ("k_hat", "elbo", "log_evidence", "verdict")}
    library = _arviz()
    if "InferenceData" in vars(library):  # before arviz 1, which warns about the lookup
        return library.from_dict(**groups, posterior_attrs=attributes)
    return library.from_dict(groups, attrs={"posterior": attributes})


def _arviz() -> ModuleType:
    """Import arviz lazily: it prints a notice, and two processes that import it at the same time can collide."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for _ in range(2):
            with suppress(FileNotFoundError):
                require("to_arviz", "arviz")
        return import_module("arviz")


class _DiagnosedDraws(NamedTuple):
    """Draws of a guide with their weights, the smoothed log weights, and the diagnosis."""

    weighted: Weighted
    log_weights: Tensor
    diagnosis: Diagnosis


def _pair(who: str, call: Call, guide: Guide) -> Pair:
    """Check the arguments, and lay out the runs of model and guide."""
    check_pair(who, call.program, guide)
    check_call(who, call, ("num_samples",))
    with without_empty_tables():
        if isinstance(guide, AutoFlow):
            guide.setup(*call.args, **call.kwargs)  # not in a trace, which would lengthen its error messages
        return Pair(who, call, guide)


def _diagnosed_draws(pair: Pair, num_samples: int) -> _DiagnosedDraws:
    """Weight draws of the guide and smooth the weights."""
    with without_empty_tables():
        weighted = pair.weigh(num_samples)
    log_weights, k_hat = smoothed_log_weights(weighted.log_weights, weighted.rounding)
    return _DiagnosedDraws(weighted, log_weights, _diagnosis(weighted.log_weights.double(), log_weights, k_hat))


def _diagnosis(raw: Tensor, smooth: Tensor, k_hat: float) -> Diagnosis:
    """Summarise log weights, given the normalised smoothed ones and the shape of their tail."""
    count, scored = len(raw), raw[raw.isfinite()]
    squares = float((2 * smooth).exp().sum())
    ess = 1 / squares if squares else 0.0
    # The smallest weight is not in the tail, so smoothing has changed it only by the normalisation.
    lowest = int(torch.where(smooth.isfinite(), raw, torch.inf).argmin())
    return Diagnosis(
        k_hat=k_hat,
        ess=ess,
        elbo=float(scored.mean()) if len(scored) else -math.inf,
        elbo_se=float(scored.std() / len(scored) ** 0.5) if len(scored) > 1 else math.inf,
        num_samples=count,
        unscored=count - len(scored),
        unsearched="`diagnose` does that",
        log_evidence=float(raw[lowest] - smooth[lowest]) - math.log(count) if ess else -math.inf,
        log_evidence_se=max(0.0, 1 / ess - 1 / count) ** 0.5 if ess else math.inf,
        misplaced=0.5 * float((smooth.double().exp() - 1 / count).abs().sum()) if ess else 1.0,
    )


def _systematic(weights: Tensor, count: int) -> Tensor:
    """Draw indices in proportion to weights by systematic resampling, in random order."""
    edges = weights.cumsum(0)
    points = (torch.arange(count, device=weights.device) + torch.rand((), device=weights.device)) * edges[-1] / count
    index = torch.searchsorted(edges, points.to(edges)).clamp(max=len(weights) - 1)
    return index[torch.randperm(count, device=weights.device)]
