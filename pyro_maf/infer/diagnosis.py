"""Diagnosis of a guide by Pareto-smoothed importance sampling, and reweighted draws."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_maf._core.checks import check_positive
from pyro_maf.infer.auto_flow import AutoFlow
from pyro_maf.infer.importance import NoVerdictError, Pair, arviz, smoothed
from pyro_maf.infer.model import Call, Guide, Model, check_call, check_pair, without_empty_tables

__all__ = ["Diagnosis", "diagnose", "reweight", "to_arviz"]

GOOD, USABLE = 0.5, 0.7
EVEN = 0.99
"""Above this fraction of effective draws, the weights are about equal."""
FEW = 0.1
"""Below this fraction of effective draws, a light tail only means that hardly any of it was sampled."""
CANDIDATES = 4
"""Number of weighted draws for each draw that `reweight` returns."""


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """Quality of a guide as an approximation of the posterior.

    Attributes:
        k_hat: Pareto shape of the tail of the importance weights p(x, z) / q(z): under 0.5 good, under 0.7 usable.
        ess: Effective sample size of the smoothed weights, out of `num_samples`.
        elbo: Evidence lower bound in nats.
        elbo_se: Standard error of `elbo` in nats.
        num_samples: Number of weighted draws.
        unscored: Number of those that the model could not score; they are left out.
        reason: Why there is no verdict, as a clause; "" if there is one. Without a verdict the figures are NaN.
        verdict: The conclusion, in one sentence.
    """

    k_hat: float = math.nan
    ess: float = math.nan
    elbo: float = math.nan
    elbo_se: float = math.nan
    num_samples: int = 0
    unscored: int = 0
    reason: str = ""

    @property
    def verdict(self) -> str:
        """The conclusion from the figures, in one sentence."""
        if self.reason:
            return f"No verdict: {self.reason}."
        if self.unscored > self.num_samples // 2:
            return "The model could not score most draws of this guide: it is not near the posterior."
        if self.k_hat < USABLE and self.ess < FEW * self.num_samples:
            return (
                f"k-hat {self.k_hat:.2f} would do, but only {self.ess:.0f} of {self.num_samples} draws count: the "
                "guide covers little of the posterior, and may have missed a part of it without a trace; give it more "
                "layers or steps."
            )
        if self.k_hat < GOOD:
            return f"k-hat {self.k_hat:.2f} is good: draws of this guide may be used as they are, or reweighted."
        if self._has_even_weights:
            return (
                f"The weights hardly differ, so draws may be used as they are; but k-hat {self.k_hat:.2f} says that "
                "the far tails do: do not rely on extreme quantiles."
            )
        if self.k_hat < USABLE:
            return f"k-hat {self.k_hat:.2f} is usable: means may be off a little, which `reweight` corrects."
        if self.k_hat < 1:
            return (
                f"k-hat {self.k_hat:.2f} is poor: the guide misses part of the posterior, and reweighting cannot be "
                "relied on; give it more layers or steps, reparameterise the model, or run NUTS on `neutra`."
            )
        return (
            f"k-hat {self.k_hat:.2f} is worthless: the guide is far from the posterior; reparameterise the model or "
            "sample it with NUTS."
        )

    @property
    def _has_even_weights(self) -> bool:
        return self.ess > EVEN * self.num_samples

    @property
    def can_be_reweighted(self) -> bool:
        """True if `reweight` is reliable: k-hat is below 0.7, or the weights are about equal."""
        return self.k_hat < USABLE or self._has_even_weights

    def __repr__(self) -> str:
        if self.reason:
            return f"Diagnosis({self.verdict})"
        unscored = f"; {self.unscored} draws could not be scored" if self.unscored else ""
        return (
            f"Diagnosis(ELBO {self.elbo:.3f} +- {self.elbo_se:.3f} nats, effective sample size {self.ess:.0f} of "
            f"{self.num_samples}{unscored}. {self.verdict})"
        )


def diagnose(model: Model, guide: Guide, *args: object, num_samples: int = 10_000, **kwargs: object) -> Diagnosis:
    r"""Diagnose a guide by the importance weights p(x, z) / q(z) of its draws.

    Discrete sites of the model with `infer={"enumerate": "parallel"}` are summed out. Where its plates subsample, all
    rows are scored, in runs over minibatches; where that is not possible, as with data that are a minibatch already,
    there is no verdict, and `Diagnosis.reason` says why.

    Args:
        model: A Pyro model.
        guide: Its guide: one of this package, of Pyro, or your own.
        num_samples: Number of draws to weight.
        *args, **kwargs: Arguments of model and guide.

    Returns:
        A `Diagnosis`.

    Cost: `num_samples` draws of the guide and evaluations of the model on all rows, in batches where it allows them.

    Raises:
        TypeError: If the two are swapped, or the model does not take the arguments.
        ValueError: If the guide leaves out a latent site of the model, or the model draws what no guide has.
        ModuleNotFoundError: Without the `train` extra.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> diagnosis = diagnose(model, AutoNormal(model, init_scale=0.9))
        >>> diagnosis.k_hat < 0.5, diagnosis.ess > 5_000
        (True, True)

    Reference:
        Yao et al., *Yes, but did it work? Evaluating variational inference*, 2018; Vehtari et al., *Pareto smoothed
        importance sampling*, 2024.
    """
    check_positive("diagnose", "num_samples", num_samples, least=100)
    try:
        return _diagnosed_draws("diagnose", Call(model, args, kwargs), guide, num_samples).diagnosis
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
        UserWarning: If k-hat is 0.7 or more and the weights differ: they cannot be relied on.

    Raises:
        TypeError: If the two are swapped, or the model does not take the arguments.
        ValueError: If the guide leaves out a latent site, or the model can score none of its draws or not all rows.
        ModuleNotFoundError: Without the `train` extra.

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
    draws = _diagnosed_draws("reweight", Call(model, args, kwargs), guide, max(100, CANDIDATES * num_samples))
    if not draws.log_weights.isfinite().any():
        raise ValueError("reweight found no draw of the guide that the model can score.")
    if not draws.diagnosis.can_be_reweighted:
        k_hat = draws.diagnosis.k_hat
        warnings.warn(f"k-hat is {k_hat:.2f}: reweighting cannot correct this guide.", UserWarning, stacklevel=2)
    index = _systematic(draws.log_weights.exp(), num_samples)
    return {name: value[index] for name, value in draws.values.items()}


def to_arviz(model: Model, guide: Guide, *args: object, num_samples: int = 4_000, **kwargs: object) -> Any:
    """Convert draws of a guide to arviz, for its summaries and plots.

    Args:
        model, guide, *args, **kwargs: As in `diagnose`.
        num_samples: Number of draws, as one chain.

    Returns:
        An `arviz.InferenceData`: `posterior` holds the draws as they are; `sample_stats` the smoothed log weights, as
        `log_weight`; attributes of `posterior` the diagnosis.

    Raises:
        TypeError: If the two are swapped, or the model does not take the arguments.
        ValueError: If the guide leaves out a latent site, or the model cannot score all rows.
        ModuleNotFoundError: Without the `train` extra.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> rates = lambda: pyro.sample("rate", dist.Gamma(torch.ones(3), 1.0).to_event(1))
        >>> to_arviz(rates, AutoNormal(rates)).posterior["rate"].shape
        (1, 4000, 3)
    """
    check_positive("to_arviz", "num_samples", num_samples, least=100)
    draws = _diagnosed_draws("to_arviz", Call(model, args, kwargs), guide, num_samples)
    diagnosis = draws.diagnosis
    return arviz().from_dict(
        posterior={name: value[None].cpu().numpy() for name, value in draws.values.items()},
        sample_stats={"log_weight": draws.log_weights[None].cpu().numpy()},
        posterior_attrs={"k_hat": diagnosis.k_hat, "elbo": diagnosis.elbo, "verdict": diagnosis.verdict},
    )


class _DiagnosedDraws(NamedTuple):
    """Draws of a guide, by site, with their smoothed log weights and the diagnosis."""

    values: dict[str, Tensor]
    log_weights: Tensor
    diagnosis: Diagnosis


def _diagnosed_draws(who: str, call: Call, guide: Guide, num_samples: int) -> _DiagnosedDraws:
    """Check the arguments, then weight draws of the guide and smooth the weights."""
    check_pair(who, call.program, guide)
    check_call(who, call, ("num_samples",))
    with without_empty_tables():
        if isinstance(guide, AutoFlow):
            guide.setup(*call.args, **call.kwargs)  # not in a trace, which would lengthen its error messages
        weighted = Pair(who, call, guide).weigh(num_samples)
    log_weights, k_hat = smoothed(weighted.log_weights, weighted.rounding)
    scored = weighted.log_weights[weighted.log_weights.isfinite()].double()
    squares = float((2 * log_weights).exp().sum())
    diagnosis = Diagnosis(
        k_hat=k_hat,
        ess=1 / squares if squares else 0.0,
        elbo=float(scored.mean()) if len(scored) else -math.inf,
        elbo_se=float(scored.std() / len(scored) ** 0.5) if len(scored) > 1 else math.inf,
        num_samples=len(log_weights),
        unscored=len(log_weights) - len(scored),
    )
    return _DiagnosedDraws(weighted.values, log_weights, diagnosis)


def _systematic(weights: Tensor, count: int) -> Tensor:
    """Draw indices in proportion to weights by systematic resampling, in random order."""
    edges = weights.cumsum(0)
    points = (torch.arange(count, device=weights.device) + torch.rand((), device=weights.device)) * edges[-1] / count
    index = torch.searchsorted(edges, points.to(edges)).clamp(max=len(weights) - 1)
    return index[torch.randperm(count, device=weights.device)]
