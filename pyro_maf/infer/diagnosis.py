"""Whether to trust a guide, and what to do about it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_maf.checks import check_positive
from pyro_maf.infer.importance import Weighted, arviz, smoothed, weigh

__all__ = ["Diagnosis", "diagnose", "reweight", "to_arviz"]

GOOD, USABLE = 0.5, 0.7
EVEN = 0.99
"""Beyond this part of effective draws, weights hardly differ."""
FEW = 0.1
"""Below this part of effective draws, a tail that seems light is one that was hardly seen."""
CANDIDATES = 4
"""How many draws are weighed for each that `reweight` returns."""


@dataclass(frozen=True, repr=False)
class Diagnosis:
    """How far a guide is from the posterior.

    Attributes:
        k_hat: Pareto shape of the tail of the importance weights p(x, z) / q(z): under 0.5 good, under 0.7 usable.
        ess: Effective sample size of the smoothed weights, out of `num_samples`.
        elbo: Evidence lower bound in nats.
        elbo_se: Its standard error.
        num_samples: How many draws were weighed.
        unscored: How many of them the model could not score; they are left out.
        verdict: One sentence.
    """

    k_hat: float
    ess: float
    elbo: float
    elbo_se: float
    num_samples: int
    unscored: int

    @property
    def verdict(self) -> str:
        """What the figures say, in one sentence."""
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
        if self.ess > EVEN * self.num_samples:
            return (
                f"The weights hardly differ, so draws may be used as they are; but k-hat {self.k_hat:.2f} says that "
                "the far tails do: do not rely on extreme quantiles."
            )
        if self.k_hat < USABLE:
            return f"k-hat {self.k_hat:.2f} is usable: means may be off a little, which `reweight` corrects."
        if self.k_hat < 1:
            return (
                f"k-hat {self.k_hat:.2f} is poor: the guide misses part of the posterior, and reweighting can not be "
                "relied on; give it more layers or steps, reparameterise the model, or run NUTS on `neutra`."
            )
        return (
            f"k-hat {self.k_hat:.2f} is worthless: the guide is far from the posterior; reparameterise the model or "
            "sample it with NUTS."
        )

    def __repr__(self) -> str:
        unscored = f"; {self.unscored} draws could not be scored" if self.unscored else ""
        return (
            f"Diagnosis(ELBO {self.elbo:.3f} +- {self.elbo_se:.3f} nats, effective sample size {self.ess:.0f} of "
            f"{self.num_samples}{unscored}. {self.verdict})"
        )


def diagnose(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, num_samples: int = 10_000, **kwargs: Any
) -> Diagnosis:
    r"""Weigh draws of a guide by p(x, z) / q(z), and say what the weights tell.

    Args:
        model: A Pyro model.
        guide: Its guide: one of this package, of Pyro, or one's own.
        num_samples: How many draws to weigh.
        *args, **kwargs: What model and guide are called with.

    Returns:
        A `Diagnosis`.

    Cost: `num_samples` draws of the guide and evaluations of the model, in batches where the model allows them.

    Raises:
        ValueError: If the guide leaves out a latent site of the model.
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
    weighted = weigh("diagnose", model, guide, args, kwargs, num_samples)
    return _diagnosis(weighted, *smoothed(weighted.log_weights))


def reweight(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, num_samples: int = 4_000, **kwargs: Any
) -> dict[str, Tensor]:
    r"""Draws of the posterior: those of a guide, resampled by their Pareto-smoothed importance weights.

    Args:
        model, guide, *args, **kwargs: As in `diagnose`.
        num_samples: How many draws to return, out of four times as many that are weighed.

    Returns:
        The value of each latent site, (num_samples, \*site). A draw may come more than once.

    Cost: as `diagnose` with four times `num_samples`.

    Warns:
        UserWarning: If k-hat is 0.7 or more and weights differ at all: they can not be relied on.

    Raises:
        ValueError: If the guide leaves out a latent site, or the model can score none of its draws.
        ModuleNotFoundError: Without the `train` extra.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> draws = reweight(model, AutoNormal(model, init_scale=0.9))["z"]
        >>> bool(abs(draws.std() - 1) < 0.05)
        True

    Reference:
        Vehtari et al., *Pareto smoothed importance sampling*, 2024.
    """
    check_positive("reweight", "num_samples", num_samples)
    weighted = weigh("reweight", model, guide, args, kwargs, max(100, CANDIDATES * num_samples))
    log_weights, k_hat = smoothed(weighted.log_weights)
    if not log_weights.isfinite().any():
        raise ValueError("reweight found no draw of the guide that the model can score.")
    if k_hat >= USABLE and _diagnosis(weighted, log_weights, k_hat).ess <= EVEN * len(log_weights):
        warnings.warn(f"k-hat is {k_hat:.2f}: reweighting can not correct this guide.", UserWarning, stacklevel=2)
    index = _systematic(log_weights.exp(), num_samples)
    return {name: value[index] for name, value in weighted.values.items()}


def to_arviz(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, num_samples: int = 4_000, **kwargs: Any
) -> Any:
    """Draws of a guide as arviz has them, for its summaries and plots.

    Args:
        model, guide, *args, **kwargs: As in `diagnose`.
        num_samples: How many draws, as one chain.

    Returns:
        An `arviz.InferenceData`: `posterior` holds the draws as they are; `sample_stats` the smoothed log weights, as
        `log_weight`; attributes of `posterior` the diagnosis.

    Raises:
        ValueError: If the guide leaves out a latent site.
        ModuleNotFoundError: Without the `train` extra.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> to_arviz(model, AutoNormal(model)).posterior["z"].shape
        (1, 4000)
    """
    check_positive("to_arviz", "num_samples", num_samples, least=100)
    weighted = weigh("to_arviz", model, guide, args, kwargs, num_samples)
    log_weights, k_hat = smoothed(weighted.log_weights)
    diagnosis = _diagnosis(weighted, log_weights, k_hat)
    return arviz().from_dict(
        posterior={name: value[None].cpu().numpy() for name, value in weighted.values.items()},
        sample_stats={"log_weight": log_weights[None].cpu().numpy()},
        posterior_attrs={"k_hat": diagnosis.k_hat, "elbo": diagnosis.elbo, "verdict": diagnosis.verdict},
    )


def _diagnosis(weighted: Weighted, log_weights: Tensor, k_hat: float) -> Diagnosis:
    """What draws tell, with their smoothed log weights."""
    scored = weighted.log_weights[weighted.log_weights.isfinite()].double()
    squares = float((2 * log_weights).exp().sum())
    return Diagnosis(
        k_hat=k_hat,
        ess=1 / squares if squares else 0.0,
        elbo=float(scored.mean()) if len(scored) else float("-inf"),
        elbo_se=float(scored.std() / len(scored) ** 0.5) if len(scored) > 1 else float("inf"),
        num_samples=len(log_weights),
        unscored=len(log_weights) - len(scored),
    )


def _systematic(weights: Tensor, count: int) -> Tensor:
    """Indices drawn in proportion to weights, as evenly as can be, in random order."""
    edges = weights.cumsum(0)
    points = (torch.arange(count, device=weights.device) + torch.rand((), device=weights.device)) * edges[-1] / count
    index = torch.searchsorted(edges, points.to(edges)).clamp(max=len(weights) - 1)
    return index[torch.randperm(count, device=weights.device)]
