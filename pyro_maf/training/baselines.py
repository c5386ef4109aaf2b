"""Simple densities of a fit's rows, in its units and scored on its held-out rows, for comparison with the flow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_maf._core.torch_state import reference_tensor
from pyro_maf.distributions import Density, FlowPrior, TableDensity
from pyro_maf.distributions.steps import POINTS
from pyro_maf.sweep import OneThread
from pyro_maf.tables import MappedRows, Rows
from pyro_maf.tables.mixture import Mixture, fit_mixture
from pyro_maf.tables.rows import mean_and_error
from pyro_maf.training.preparation import Fitted
from pyro_maf.training.scores import log_prob_of

__all__ = ["Baseline", "Comparison", "compare", "fitted_rows", "gaussians_of", "in_units", "like", "prior_of", "spread"]

MOST_ROWS, MOST_VALUES = 2**15, 2**21
"""Maximum number of training rows, and of values in them, that baselines are fitted to."""
MIXTURE_ROWS, SCORED_ROWS, SCORED_STEPS = 2**12, 1000, 200
"""Maximum numbers of rows that a mixture is fitted to, that are scored, and that are scored by a mean over their
steps."""
MOST_PAIRS = 2**26
"""Maximum number of pairs of rows for a kernel density; more would take some seconds."""
BANDWIDTHS, QUERIES = (0.1, 0.2, 0.3, 0.45, 0.65, 0.9, 1.2), 256
"""Bandwidths that are tried, in units of N^(-1 / (D + 4)), and number of rows by which one is chosen."""
BEHIND = 2.0
"""Number of standard errors from which on a flow is reported to be behind."""


class Baseline(NamedTuple):
    """A simple density on held-out rows.

    Attributes:
        name: Name, such as "Gaussian".
        mean: Mean log-likelihood of the rows, in nats.
        gain: Mean difference between the flow's log-likelihood and this one's.
        standard_error: Standard error of that difference, paired by row.
    """

    name: str
    mean: float
    gain: float
    standard_error: float

    def __str__(self) -> str:
        where = "behind" if self.gain >= 0 else "ahead"
        return f"{self.name} {self.mean:.3f} ({where} by {abs(self.gain):.3f} ± {self.standard_error:.3f})"


class Comparison(NamedTuple):
    """A flow and baselines on the same held-out rows.

    Attributes:
        role: "test" or "validation".
        rows: Number of rows.
        mean: Mean log-likelihood of these rows under the flow, in nats.
        baselines: The baselines.
    """

    role: str
    rows: int
    mean: float
    baselines: tuple[Baseline, ...]

    def __str__(self) -> str:
        others = ", ".join(map(str, self.baselines))
        return f"{self.rows:,} {self.role} rows, in nats ± standard errors: flow {self.mean:.3f}; {others}."

    @property
    def warnings(self) -> list[str]:
        """A warning if the flow is behind one of the baselines."""
        ahead = [each for each in self.baselines if each.gain < -BEHIND * each.standard_error]
        if not ahead:
            return []
        best = max(ahead, key=lambda each: each.mean)
        return [
            f"fit is behind a simpler density, {best.name}, by {-best.gain:.3f} nats (standard error "
            f"{best.standard_error:.3f}) on the {self.role} rows: raise max_epochs if that ended it, try another flow, "
            "such as MixtureFlow or MAFMoG, or use the simpler density."
        ]


def fitted_rows(training: Rows | MappedRows, density: Fitted) -> Rows:
    """Training rows for baselines: all of them or, of a large table, some from all over it."""
    return spread(training.sample().rounded_for(density.unwrapped), _most(training.data.shape[1]))


def _most(width: int) -> int:
    return min(MOST_ROWS, max(1, MOST_VALUES // width))


def spread(rows: Rows, most: int) -> Rows:
    """At most `most` of the rows, evenly spaced."""
    total = len(rows.data)
    return rows if total <= most else rows.take(torch.linspace(0, total - 1, most).long())


def gaussians_of(rows: Rows) -> Mixture:
    """A mixture of Gaussians, with the number of components chosen by BIC."""
    some = spread(rows, MIXTURE_ROWS)
    return fit_mixture(some.data, some.weights)


def compare(density: Fitted, training: Rows, rows: Rows, role: str, *, gaussians: Mixture | None = None) -> Comparison:
    """Compare a fitted density with baselines on held-out rows.

    The baselines are a Gaussian, a mixture of Gaussians fitted to up to 4,096 rows, with the number of components
    chosen by BIC, and, if there are not too many rows, a kernel density whose bandwidth maximises the leave-one-out
    likelihood of training rows. All are densities of the numeric columns in the fit's units and on its support, after a
    linear regression on the context and the categories, if any. Categories have the fit's probabilities, and a number
    on a grid has the probability of its step.

    Args:
        density: The fitted density, on the CPU.
        training: Training rows, as returned by `fitted_rows`.
        rows: The held-out rows.
        role: "test" or "validation".
        gaussians: A mixture of Gaussians fitted to the training rows in their units, if available.

    Cost: at most some two seconds.
    """
    inner = density.unwrapped
    points = POINTS if isinstance(inner, TableDensity) and not inner.steps.is_exact else 1
    most = SCORED_STEPS if points > 1 else SCORED_ROWS
    if len(rows.data) > most:
        rows = rows.take(torch.randperm(len(rows.data), generator=torch.Generator().manual_seed(0))[:most])
    flow = torch.cat([*log_prob_of(density, rows.data, rows.context)]).double()
    baselines = []
    with torch.no_grad(), OneThread():
        for name, baseline in _baselines(inner, training, points * len(rows.data), gaussians):
            scores = baseline.log_density(rows.data, rows.context).double()
            gain = mean_and_error(flow - scores, rows.weights)
            baselines.append(Baseline(name, rows.mean(scores), *gain))
    return Comparison(role, len(rows.data), rows.mean(flow), tuple(baselines))


def _baselines(
    inner: FlowPrior | TableDensity, training: Rows, queries: int, gaussians: Mixture | None
) -> list[tuple[str, Density]]:
    """The baselines by name, in the units of a fitted density."""
    prior = prior_of(inner)
    data, context = training.data, training.context
    if isinstance(inner, TableDensity):
        data, context = inner.of_prior(data, context)
    z = prior.standardised(data).double()
    features = z.new_zeros(len(z), 0) if context is None else prior.features(context).double()
    coefficients, residuals = _regressed(z, features, training.weights)
    scale = residuals.std(0, correction=0).clamp(min=1e-12)
    rows = Rows(residuals / scale, None, training.weights)
    if gaussians is None:
        gaussians = gaussians_of(rows)
    else:
        gaussians = Mixture(
            gaussians.shares, (gaussians.means - coefficients[0]) / scale, gaussians.factors / scale[:, None]
        )
    each = {
        "Gaussian": fit_mixture(rows.data, rows.weights, most=1, has_tails=False).log_prob,
        "mixture of Gaussians": gaussians.log_prob,
    }
    if len(z) < _most(inner.event_shape[0]) and len(z) * queries <= MOST_PAIRS:
        each["KDE"] = _KernelDensity(rows.data.float(), rows.weights).log_prob
    angles = prior.model.angles if isinstance(prior.model, Density) else ()
    models = ((name, _Regression(coefficients, scale, log_prob, angles)) for name, log_prob in each.items())
    return [(name, in_units(model.to(like(prior)), prior, inner)) for name, model in models]


def in_units(model: Density, prior: FlowPrior, inner: FlowPrior | TableDensity) -> FlowPrior | TableDensity:
    """A density of standardised numbers, converted to the units of a fitted one, with its categories and grids."""
    units = ("loc", "scale", "tails", *(("context_loc", "context_scale") if prior.context_dim else ()))
    baseline = FlowPrior(
        model,
        support=prior.units.support.name,
        **{name: getattr(prior, name) for name in units},
        **prior.embedding,
    )
    if not isinstance(inner, TableDensity):
        return baseline
    return TableDensity(baseline, levels=inner.levels, grids=inner.grids, categorical=inner.categorical)


def prior_of(inner: FlowPrior | TableDensity) -> FlowPrior:
    """The density of a table's numbers."""
    return inner.prior if isinstance(inner, TableDensity) else inner


def like(prior: FlowPrior) -> Tensor:
    """A tensor in the dtype and on the device of a prior's model."""
    tensor = reference_tensor(prior.model)
    return torch.zeros(()) if tensor is None else tensor


def _regressed(z: Tensor, features: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Least-squares coefficients, (1 + C, D), of z on features (rows, C), and the residuals."""
    design = torch.cat([torch.ones(len(z), 1, dtype=z.dtype), features], 1)
    root = torch.ones(len(z), 1, dtype=z.dtype) if weights is None else weights.double().sqrt()[:, None]
    coefficients = torch.linalg.lstsq(root * design, root * z, driver="gelsd").solution
    return coefficients, z - design @ coefficients


class _Regression(Density):
    """Density of the residuals of a linear regression on the context.

    Args:
        coefficients: (1 + C, D).
        scale: Scale of the residuals, (D,).
        log_prob: Log-density of residuals in units of the scale.
        angles: Columns of angles, in which the density covers one turn.
    """

    coefficients: Tensor
    residual_scale: Tensor
    _unsavable = "it is one of the baselines of a comparison"

    def __init__(
        self, coefficients: Tensor, scale: Tensor, log_prob: Callable[[Tensor], Tensor], angles: tuple[int, ...] = ()
    ) -> None:
        super().__init__(len(scale), len(coefficients) - 1)
        self.register_buffer("coefficients", coefficients)
        self.register_buffer("residual_scale", scale)
        self._log_prob: Callable[[Tensor], Tensor] = log_prob
        self.angles = angles

    def log_density(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Log-density (\*batch,) in nats."""
        mean, slopes = self.coefficients[0], self.coefficients[1:]
        residual = value - mean if context is None else value - mean - context @ slopes
        rows = (residual / self.residual_scale).reshape(-1, self.input_dim).double()
        return (self._log_prob(rows) - self.residual_scale.double().log().sum()).reshape(value.shape[:-1]).to(value)


class _KernelDensity:
    """Mixture of a Gaussian kernel at each row, (rows, D).

    Args:
        rows: The rows, in float32.
        weights: (rows,), or None.

    Attributes:
        bandwidth: Standard deviation of the kernels.
    """

    def __init__(self, rows: Tensor, weights: Tensor | None) -> None:
        self._rows = rows
        weights = torch.ones(len(rows)) if weights is None else weights
        self._log_share = (weights / weights.sum()).log().float()
        dim = rows.shape[1]
        bandwidths = [factor * len(rows) ** (-1 / (dim + 4)) for factor in BANDWIDTHS]
        queries = torch.linspace(0, len(rows) - 1, min(QUERIES, len(rows))).long()
        distances = self._squared_distances(rows[queries])
        distances[torch.arange(len(queries)), queries] = torch.inf
        likelihoods = [self._log_prob(distances, bandwidth).mean() for bandwidth in bandwidths]
        self.bandwidth = bandwidths[int(torch.stack(likelihoods).argmax())]

    def log_prob(self, rows: Tensor) -> Tensor:
        """Log-density of rows, (rows,)."""
        parts = rows.float().split(max(1, 2**23 // len(self._rows)))
        return torch.cat([self._log_prob(self._squared_distances(part), self.bandwidth) for part in parts]).double()

    def _squared_distances(self, rows: Tensor) -> Tensor:
        return torch.cdist(rows, self._rows).square_()

    def _log_prob(self, distances: Tensor, bandwidth: float) -> Tensor:
        dim = self._rows.shape[1]
        constant = dim * math.log(bandwidth * math.sqrt(2 * math.pi))
        return (self._log_share - distances / (2 * bandwidth**2)).logsumexp(1) - constant
