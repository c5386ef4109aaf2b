"""Mixtures of Gaussians with full covariances: a density, and expectation maximisation that fits one to rows."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_maf._core.checks import check_positive
from pyro_maf.distributions.density import Density, drawn_index

__all__ = ["GaussianMixture", "Mixture", "fit_mixture"]

COMPONENTS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
LEAST_ROWS, ROWS_EACH = 20, 0.5
"""Least number of rows of a component, and least share of a row for each of its parameters: BIC, which counts
parameters for many rows, takes too many."""
ITERATIONS, SETTLED = 100, 1e-4
SCATTER = 1e-5
"""Scatter of a component before any rows, in units of the rows' variances: its few rows cannot collapse, and many may
lie as close to a plane as they do."""
SHRINKAGES = (0.0, 0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.5)
FOLDS = 5
MOST_WIDENED = 4.0
"""Maximum factor by which the covariance of a component of few rows is widened."""
CANDIDATES, LLOYD = 5, 10
"""Rows of which the one with the least distances becomes a centre, and iterations of Lloyd's from these centres."""


class Mixture(NamedTuple):
    """A mixture of K Gaussians in D dimensions.

    Attributes:
        shares: Shares of the components, (K,).
        means: Their means, (K, D).
        factors: Cholesky factors of their covariances, (K, D, D).
    """

    shares: Tensor
    means: Tensor
    factors: Tensor

    def standardised(self, rows: Tensor) -> Tensor:
        r"""L_k^-1 (y - m_k), (\*batch, K, D), of rows y, (\*batch, D)."""
        components, dim = self.means.shape
        whitening = torch.linalg.solve_triangular(self.factors, torch.eye(dim).to(rows), upper=False)
        shift = (whitening @ self.means[..., None]).reshape(-1)
        return (rows @ whitening.reshape(components * dim, dim).T - shift).unflatten(-1, (components, dim))

    def log_joint(self, rows: Tensor) -> Tensor:
        r"""Log-density of each row and component together, (\*batch, K)."""
        log_det = self.factors.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = 0.5 * rows.shape[-1] * math.log(2 * math.pi)
        return self.shares.log() - log_det - constant - 0.5 * self.standardised(rows).square().sum(-1)

    def log_prob(self, rows: Tensor) -> Tensor:
        r"""Log-density of each row, (\*batch,)."""
        return self.log_joint(rows).logsumexp(-1)


class GaussianMixture(Density):
    r"""Mixture of K Gaussians, p(y) = sum_k s_k N(y; m_k, L_k L_k^T), or of y given a context c, p(c, y) / p(c).

    Given a context it is a mixture of linear regressions: shares s_k N(c; k), means that are linear in c, and
    covariances that do not depend on it. A new one is standard normal for any context; it is not trained.

    Args:
        input_dim: D.
        num_components: K.
        context_dim: C, the number of context features, 0 for none.

    Attributes:
        shares, means, factors: Shares s, means m and Cholesky factors L of the components, of c and y together, (K,),
            (K, C + D), (K, C + D, C + D).
    """

    shares: Tensor
    means: Tensor
    factors: Tensor

    def __init__(self, input_dim: int, *, num_components: int = 1, context_dim: int = 0) -> None:
        super().__init__(input_dim, context_dim)
        check_positive(self.name, "num_components", num_components)
        size = context_dim + input_dim
        self._set(
            torch.full((num_components,), 1 / num_components),
            torch.zeros(num_components, size),
            torch.eye(size).repeat(num_components, 1, 1),
        )

    def _set(self, shares: Tensor, means: Tensor, factors: Tensor) -> None:
        self.register_buffer("shares", shares)
        self.register_buffer("means", means)
        self.register_buffer("factors", factors)

    @torch.no_grad()
    def start_at(self, rows: Tensor, weights: Tensor | None = None, context: Tensor | None = None) -> None:
        """Become the mixture of rows, (rows, D), with weights (rows,): as many components as BIC says.

        Args:
            rows, weights: The rows.
            context: Their context, (rows, C). Without, and with fewer rows than a component has parameters, it
                is the same mixture for any context.
        """
        joined = rows if context is None else torch.cat([context, rows], 1)
        if len(rows) < _parameters_of(joined.shape[1]):
            joined = rows
        shares, means, factors = fit_mixture(joined.cpu(), None if weights is None else weights.cpu())
        spare = self.context_dim + self.input_dim - joined.shape[1]
        whole = torch.eye(spare + joined.shape[1], dtype=factors.dtype).repeat(len(shares), 1, 1)
        whole[:, spare:, spare:] = factors
        self.become(Mixture(shares, torch.nn.functional.pad(means, (spare, 0)), whole))

    def become(self, mixture: Mixture) -> None:
        """Have these components, of context and value together."""
        self._set(*(each.to(self.shares) for each in mixture))

    @property
    def mixture(self) -> Mixture:
        """The components, of context and value together."""
        return Mixture(self.shares, self.means, self.factors)

    def log_density(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Log-density (\*batch,) in nats, unchecked; O(K (C + D)^2)."""
        each = self._log_factors(value, context)
        # One by one rather than as a difference of log-densities, which is inexact for a context far out.
        log_share = (self.shares.log() + each[..., : self.context_dim].sum(-1)).log_softmax(-1)
        return (log_share + each[..., self.context_dim :].sum(-1)).logsumexp(-1)

    @torch.no_grad()
    def draw(self, shape: torch.Size, context: Tensor | None = None) -> Tensor:
        r"""Draws (\*shape, D), unchecked and without gradient."""
        count, seen = shape.numel(), self.context_dim
        means, factors = self.means[:, seen:], self.factors[:, seen:, seen:]
        if context is None:
            component = torch.multinomial(self.shares, max(1, count), replacement=True)[:count]
            mean = means[component]
        else:
            rows = context.expand(*shape, seen).reshape(count, seen)
            of_context = Mixture(self.shares, self.means[:, :seen], self.factors[:, :seen, :seen])
            component = drawn_index(of_context.log_joint(rows))
            standard = of_context.standardised(rows)[torch.arange(count), component]
            mean = means[component] + (self.factors[component, seen:, :seen] @ standard[..., None])[..., 0]
        normal = torch.randn(count, self.input_dim, 1, dtype=means.dtype, device=means.device)
        return (mean + (factors[component] @ normal)[..., 0]).reshape(*shape, self.input_dim)

    def noise(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Noise u_i = Phi^-1(F_i(y_i | y_<i)), (rows, D)."""
        standard = self.mixture.standardised(self._joined(y, context)).double()
        each = self._log_factors(y, context).double()
        # Share of each component at dimension i, after those before it: N(y_<i; k) is a product of normals.
        before = self.shares.double().log()[:, None] + each.cumsum(-1) - each
        log_share = before.log_softmax(-2)
        # erfc keeps its relative precision in the tail.
        below = (log_share.exp() * torch.erfc(-standard / math.sqrt(2))).sum(-2) / 2
        above = (log_share.exp() * torch.erfc(standard / math.sqrt(2))).sum(-2) / 2
        noise = torch.where(below < above, torch.special.ndtri(below), -torch.special.ndtri(above))
        return noise[..., self.context_dim :].to(y.dtype)

    def _joined(self, value: Tensor, context: Tensor | None) -> Tensor:
        """Context and value together."""
        if context is None:
            return value
        shape = torch.broadcast_shapes(context.shape[:-1], value.shape[:-1])
        return torch.cat([context.expand(*shape, -1), value.expand(*shape, -1)], -1)

    def _log_factors(self, value: Tensor, context: Tensor | None) -> Tensor:
        r"""Log-densities of each entry of context and value given those before it, (\*batch, K, C + D)."""
        standard = self.mixture.standardised(self._joined(value, context))
        log_scale = self.factors.diagonal(dim1=1, dim2=2).log()
        return -0.5 * standard.square() - log_scale - 0.5 * math.log(2 * math.pi)


def fit_mixture(rows: Tensor, weights: Tensor | None = None, *, most: int = COMPONENTS[-1]) -> Mixture:
    r"""Fit a mixture of Gaussians, with the number of components that BIC is lowest for.

    No more components are tried than leave each 20 rows, and half a row for each of its 1 + D + D (D + 1) / 2
    parameters. Of the highest likelihood, Gaussians of few rows are too narrow. So the correlations within components
    are multiplied by 1 - s, with the s of 0 .. 0.5 of the highest likelihood in five-fold cross-validation; and the
    covariance of a component of n rows is multiplied by (n + 1) / (n - D - 2), as the squared distance of new rows is
    by these.

    Args:
        rows: Rows (N, D), in units in which their variances are about 1.
        weights: How often each row counts, (N,), of mean 1.
        most: Maximum number of components.

    Returns:
        The mixture, in float64. The same rows have the same one.

    Cost: O(N D^2) an iteration and component.

    Example:
        >>> noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
        >>> two = noise / 4 + torch.tensor([[-1.0], [1.0]]).repeat(200, 1)
        >>> len(fit_mixture(noise).shares), len(fit_mixture(two).shares)
        (1, 2)
    """
    rows = rows.double()
    weights = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights.double() / weights.mean()
    dim = rows.shape[1]
    each = _parameters_of(dim)
    least = max(LEAST_ROWS, ROWS_EACH * each)
    score, shares, worse = math.inf, weights[:, None], 0
    for components in COMPONENTS:
        if components > most or (components > 1 and least * components > len(rows)) or worse > 1:
            break
        mixture, responsibilities = _climb(rows, weights, components)
        log_likelihood = float(weights @ mixture.log_prob(rows))
        bic = (each * components - 1) * math.log(len(rows)) - 2 * log_likelihood
        worse += 1
        if bic < score:
            score, shares, worse = bic, responsibilities, 0
    return _shrunk(rows, shares)


def _parameters_of(dim: int) -> int:
    """Number of parameters of a component."""
    return 1 + dim + dim * (dim + 1) // 2


def _climb(rows: Tensor, weights: Tensor, components: int) -> tuple[Mixture, Tensor]:
    """Expectation maximisation from clusters; also the (weighted) responsibilities, (rows, K)."""
    responsibilities = torch.nn.functional.one_hot(_clusters(rows, components), components).double() * weights[:, None]
    last = -math.inf
    mixture = _maximised(rows, responsibilities)
    for _ in range(ITERATIONS if components > 1 else 0):
        log_joint = mixture.log_joint(rows)
        log_prob = log_joint.logsumexp(1)
        responsibilities = (log_joint - log_prob[:, None]).exp() * weights[:, None]
        mixture = _maximised(rows, responsibilities)
        mean = float(weights @ log_prob) / len(rows)
        if mean - last < SETTLED:
            break
        last = mean
    return mixture, responsibilities


def _clusters(rows: Tensor, components: int) -> Tensor:
    """Number of the cluster of each row: centres far from one another, then Lloyd's iterations."""
    generator = torch.Generator().manual_seed(0)
    nearest = torch.ones(len(rows), dtype=rows.dtype)
    chosen = []
    for number in range(components):
        drawn = torch.multinomial(nearest, CANDIDATES, replacement=True, generator=generator)
        distances = torch.cdist(rows[drawn], rows).square()
        distances = torch.minimum(distances, nearest) if number else distances
        best = int(distances.sum(1).argmin())
        nearest = distances[best]
        chosen.append(drawn[best])
    centres = rows[torch.stack(chosen)]
    numbers = torch.zeros(len(rows), dtype=torch.int64)
    for _ in range(LLOYD):
        numbers = torch.cdist(rows, centres).argmin(1)
        present = numbers.bincount(minlength=components)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, numbers, rows)
        centres = torch.where(present > 0, sums / present.clamp(min=1), centres)
    return numbers


def _maximised(rows: Tensor, responsibilities: Tensor, shrinkage: float | None = None) -> Mixture:
    """The likeliest mixture of responsibilities, (rows, K), and scatter; with a shrinkage, that of new rows."""
    count = responsibilities.sum(0).clamp(min=1e-10)
    means = responsibilities.T @ rows / count[:, None]
    centred = rows[None] - means[:, None]
    covariance = (centred * responsibilities.T[..., None]).mT @ centred / count[:, None, None]
    if shrinkage is not None:
        diagonal = covariance.diagonal(dim1=1, dim2=2).diag_embed()
        covariance = (1 - shrinkage) * covariance + shrinkage * diagonal
        inside = torch.maximum(count - rows.shape[1] - 2, (count + 1) / MOST_WIDENED)
        covariance = covariance * ((count + 1) / inside)[:, None, None]
    covariance = covariance + SCATTER / count[:, None, None] * torch.eye(rows.shape[1], dtype=rows.dtype)
    return Mixture(count / count.sum(), means, torch.linalg.cholesky(covariance))


def _shrunk(rows: Tensor, responsibilities: Tensor) -> Mixture:
    """The mixture of these responsibilities, with the shrinkage of the highest likelihood in cross-validation."""
    fold = torch.arange(len(rows)) % FOLDS
    scores = torch.zeros(len(SHRINKAGES), dtype=torch.float64)
    for number in range(FOLDS if len(rows) > FOLDS else 0):
        inside, outside = fold != number, fold == number
        for index, shrinkage in enumerate(SHRINKAGES):
            mixture = _maximised(rows[inside], responsibilities[inside], shrinkage)
            scores[index] += (responsibilities[outside] * mixture.log_joint(rows[outside])).sum()
    return _maximised(rows, responsibilities, SHRINKAGES[int(scores.argmax())])
