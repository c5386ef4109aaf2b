"""Mixtures of Gaussians, fitted to rows by expectation maximisation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Mixture", "fit_mixture", "num_parameters"]

COMPONENTS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)
LEAST_ROWS, ROWS_EACH = 20, 0.5
"""Minimum number of rows of a cluster, and of rows per parameter of a cluster. BIC, derived for many rows, would allow
too many clusters."""
SCALES = 2.0 ** torch.arange(4, dtype=torch.float64)
"""Scales of the Gaussians of a cluster. Factors of 2 are as good as finer ones, even for the tails of Student's t."""
CORE = 0.8
"""Initial weight of the first scale."""
STARTS, START_ROWS, START_ITERATIONS = 4, 1024, 10
"""Number of starts, of which the likeliest after some iterations on a subset of the rows is continued. A single start
often splits one cluster of the rows and merges two others, which no iteration mends."""
ITERATIONS, SETTLED, COARSELY = 100, 1e-4, 1e-3
"""Maximum number of iterations, and gain per iteration, in nats per row, below which to stop: for the final fit, and,
coarser, for comparing numbers of clusters."""
SCATTER = 1e-5
"""Prior scatter of a cluster, in units of the rows' variances. It keeps a cluster of few rows from collapsing, and lets
one of many rows lie as close to a plane as they do."""
SHRINKAGES = (0.0, 0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.5)
FOLDS = 5
MOST_WIDENED = 4.0
"""Maximum factor by which the covariance of a cluster with few rows is widened."""
CACHED = 2**16
"""Number of float64 values of which some tensors fit into the processor's cache."""
CANDIDATES, LLOYD = 5, 10
"""Number of candidate rows for each initial centre, as in greedy k-means++, and number of Lloyd iterations."""


class Mixture(NamedTuple):
    """A mixture of K Gaussians in D dimensions.

    Attributes:
        shares: Weights of the components, (K,).
        means: Means of the components, (K, D).
        factors: Cholesky factors of their covariances, (K, D, D).
    """

    shares: Tensor
    means: Tensor
    factors: Tensor

    def standardised(self, rows: Tensor) -> Tensor:
        r"""L_k^-1 (y - m_k), (\*batch, K, D), for rows y, (\*batch, D)."""
        whitening, shift = self._whitening(rows)
        return (rows @ whitening.T - shift).unflatten(-1, self.means.shape)

    def squared_distances(self, rows: Tensor) -> Tensor:
        r"""|L_k^-1 (y - m_k)|^2, (\*batch, K), for rows y, (\*batch, D)."""
        whitening, shift = self._whitening(rows)
        # Sums over D adjacent numbers, and tensors larger than the cache, take several times as long.
        parts = rows.reshape(-1, rows.shape[-1]).split(max(1, CACHED // len(whitening)))
        standardised = (torch.addmm(shift[:, None], whitening, part.T, beta=-1) for part in parts)
        squares = [each.square().unflatten(0, self.means.shape).sum(1) for each in standardised]
        return torch.cat(squares, 1).T.contiguous().reshape(*rows.shape[:-1], len(self.shares))

    def _whitening(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """L_k^-1 of all components, (K D, D), and L_k^-1 m_k, (K D,)."""
        dim = self.means.shape[1]
        whitening = torch.linalg.solve_triangular(self.factors, torch.eye(dim).to(rows), upper=False)
        return whitening.reshape(-1, dim), (whitening @ self.means[..., None]).reshape(-1)

    def log_joint(self, rows: Tensor) -> Tensor:
        r"""Joint log-density of each row and component, (\*batch, K)."""
        log_det = self.factors.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = 0.5 * rows.shape[-1] * math.log(2 * math.pi)
        return self.shares.log() - log_det - constant - 0.5 * self.squared_distances(rows)

    def log_prob(self, rows: Tensor) -> Tensor:
        r"""Log-density of each row, (\*batch,)."""
        return self.log_joint(rows).logsumexp(-1)


class _Clusters(NamedTuple):
    """Mixture of K clusters, each of S Gaussians that share a mean and whose covariances are multiples of one another.

    Attributes:
        cores: The Gaussians of scale 1, (K,).
        scales: Scales of the Gaussians of a cluster, (S,).
        scale_shares: Weights of the scales, the same in each cluster, (S,).
    """

    cores: Mixture
    scales: Tensor
    scale_shares: Tensor

    def log_joint(self, rows: Tensor) -> Tensor:
        """Joint log-density of each row, (N, D), cluster and scale, (N, K, S)."""
        dim = rows.shape[1]
        squares = self.cores.squared_distances(rows)
        log_det = self.cores.factors.diagonal(dim1=1, dim2=2).log().sum(1)
        log_core = self.cores.shares.log() - log_det - 0.5 * dim * math.log(2 * math.pi)
        log_scale = self.scale_shares.log() - dim * self.scales.log()
        return log_core[:, None] + log_scale - 0.5 * squares[..., None] / self.scales.square()

    def mixture(self) -> Mixture:
        """The K S Gaussians, without scales of negligible weight."""
        used = self.scale_shares > SETTLED
        scales, scale_shares = self.scales[used], self.scale_shares[used]
        shares = self.cores.shares[:, None] * scale_shares / scale_shares.sum()
        factors = self.cores.factors[:, None] * scales[:, None, None]
        return Mixture(shares.flatten(), self.cores.means.repeat_interleave(len(scales), 0), factors.flatten(0, 1))


def fit_mixture(
    rows: Tensor, weights: Tensor | None = None, *, most: int = COMPONENTS[-1], has_tails: bool = True
) -> Mixture:
    r"""Fit a mixture of Gaussians, with the number of clusters that minimises BIC.

    A cluster is a single Gaussian or, if that lowers BIC, four with the same mean, and covariances that are 1, 4, 16
    and 64 times the first, with weights that all clusters share. Such clusters are heavy-tailed in every direction,
    like Student's t.

    Each cluster must have at least 20 rows, and half a row for each of its 1 + D + D (D + 1) / 2 parameters. At maximum
    likelihood, Gaussians with few rows are too narrow. So correlations within clusters are multiplied by 1 - s, with
    the s in 0 .. 0.5 that has the highest likelihood in five-fold cross-validation; and the covariance of a cluster
    with n rows is multiplied by (n + 1) / (n - D - 2), the ratio by which squared distances of new rows are larger.

    Args:
        rows: Rows (N, D), in units in which their variances are about 1.
        weights: Weight of each row, (N,), with mean 1.
        most: Maximum number of clusters.
        has_tails: Whether clusters of four Gaussians are considered.

    Returns:
        The mixture, in float64. The result is deterministic.

    Cost: O(N D^2) per iteration and cluster.

    Example:
        >>> noise = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
        >>> two = noise / 4 + torch.tensor([[-1.0], [1.0]]).repeat(200, 1)
        >>> len(fit_mixture(noise).shares), len(fit_mixture(two).shares)
        (1, 2)
    """
    rows = rows.double()
    weights = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights.double() / weights.mean()
    lowest, best = _by_bic(rows, weights, most, SCALES[:1])
    if has_tails:  # needs no more clusters than without tails
        bic, clusters = _by_bic(rows, weights, len(best.cores.shares), SCALES)
        best = clusters if bic < lowest else best
    _, _, responsibilities = _climb(best, rows, weights, ITERATIONS)
    return _shrunk(rows, responsibilities, best.scales).mixture()


def num_parameters(dim: int) -> int:
    """Number of parameters of a Gaussian and its weight."""
    return 1 + dim + dim * (dim + 1) // 2


def _by_bic(rows: Tensor, weights: Tensor, most: int, scales: Tensor) -> tuple[float, _Clusters]:
    """Return the lowest BIC and its clusters."""
    each = num_parameters(rows.shape[1])
    least = max(LEAST_ROWS, ROWS_EACH * each)
    generator = torch.Generator().manual_seed(0)
    lowest, worse = math.inf, 0
    for number in COMPONENTS:
        if number > most or (number > 1 and least * number > len(rows)) or worse > 1:
            break
        start = _likeliest_start(rows, weights, number, scales, generator)
        clusters, log_likelihood, _ = _climb(start, rows, weights, ITERATIONS, COARSELY)
        bic = (each * number + len(scales) - 2) * math.log(len(rows)) - 2 * log_likelihood
        worse += 1
        if bic < lowest:
            lowest, best, worse = bic, clusters, 0
    return lowest, best


def _likeliest_start(
    rows: Tensor, weights: Tensor, number: int, scales: Tensor, generator: torch.Generator
) -> _Clusters:
    """The likeliest of several starts on a subset of the rows."""
    if len(rows) > START_ROWS:
        some = torch.linspace(0, len(rows) - 1, START_ROWS).long()
        rows, weights = rows[some], weights[some]
    begun = torch.full_like(scales, (1 - CORE) / max(1, len(scales) - 1))
    begun[0] = 1 - begun[1:].sum()
    starts = []
    for _ in range(STARTS if number > 1 else 1):
        in_cluster = torch.nn.functional.one_hot(_nearest_centres(rows, number, generator), number)
        responsibilities = in_cluster[..., None] * begun * weights[:, None, None]
        starts.append(_climb(_maximised(rows, responsibilities, scales), rows, weights, START_ITERATIONS))
    return max(starts, key=lambda start: start[1])[0]


def _climb(
    clusters: _Clusters, rows: Tensor, weights: Tensor, iterations: int, settled: float = SETTLED
) -> tuple[_Clusters, float, Tensor]:
    """Expectation maximisation; returns also the log-likelihood and weighted responsibilities before the last step."""
    last = -math.inf
    for _ in range(iterations):
        log_joint = clusters.log_joint(rows)
        highest = log_joint.amax((1, 2), keepdim=True)
        each = (log_joint - highest).exp_()
        total = each.sum((1, 2), keepdim=True)
        responsibilities = each.mul_(weights[:, None, None] / total)
        clusters = _maximised(rows, responsibilities, clusters.scales)
        log_likelihood = float(weights @ (highest + total.log()).flatten())
        if log_likelihood - last < settled * len(rows):
            break
        last = log_likelihood
    return clusters, log_likelihood, responsibilities


def _nearest_centres(rows: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Index of the nearest centre to each row, by k-means++ and Lloyd's iterations."""
    nearest = torch.ones(len(rows), dtype=rows.dtype)
    chosen = []
    for count in range(number):
        drawn = torch.multinomial(nearest, CANDIDATES, replacement=True, generator=generator)
        distances = torch.cdist(rows[drawn], rows).square()
        distances = torch.minimum(distances, nearest) if count else distances
        best = int(distances.sum(1).argmin())
        nearest = distances[best]
        chosen.append(drawn[best])
    centres = rows[torch.stack(chosen)]
    index = torch.zeros(len(rows), dtype=torch.int64)
    for _ in range(LLOYD):
        index = torch.cdist(rows, centres).argmin(1)
        present = index.bincount(minlength=number)[:, None]
        sums = torch.zeros_like(centres).index_add_(0, index, rows)
        centres = torch.where(present > 0, sums / present.clamp(min=1), centres)
    return index


def _maximised(rows: Tensor, responsibilities: Tensor, scales: Tensor, shrinkage: float | None = None) -> _Clusters:
    """The maximum-likelihood clusters for responsibilities, (N, K, S); with `shrinkage`, shrunk and widened."""
    of_scale = responsibilities.sum((0, 1))
    count = responsibilities.sum((0, 2)).clamp(min=1e-10)
    pull = responsibilities @ scales**-2.0  # small for a row far out in a wide Gaussian
    means = pull.T @ rows / pull.sum(0).clamp(min=1e-10)[:, None]
    scatter, columns = [], rows.T.contiguous()
    for mean, of_row in zip(means, pull.T.contiguous(), strict=True):  # half the time of all at once
        centred = columns - mean[:, None]
        scatter.append((centred * of_row) @ centred.T)
    covariance = torch.stack(scatter) / count[:, None, None]
    if shrinkage is not None:
        diagonal = covariance.diagonal(dim1=1, dim2=2).diag_embed()
        covariance = (1 - shrinkage) * covariance + shrinkage * diagonal
        inside = torch.maximum(count - rows.shape[1] - 2, (count + 1) / MOST_WIDENED)
        covariance = covariance * ((count + 1) / inside)[:, None, None]
    covariance = covariance + SCATTER / count[:, None, None] * torch.eye(rows.shape[1], dtype=rows.dtype)
    cores = Mixture(count / count.sum(), means, torch.linalg.cholesky(covariance))
    return _Clusters(cores, scales, of_scale / of_scale.sum())


def _shrunk(rows: Tensor, responsibilities: Tensor, scales: Tensor) -> _Clusters:
    """The clusters for these responsibilities, with the shrinkage that cross-validation prefers."""
    fold = torch.arange(len(rows)) % FOLDS
    best, chosen = -math.inf, SHRINKAGES[0]
    for shrinkage in SHRINKAGES:
        score = 0.0
        for number in range(FOLDS if len(rows) > FOLDS else 0):
            inside, outside = fold != number, fold == number
            clusters = _maximised(rows[inside], responsibilities[inside], scales, shrinkage)
            each = responsibilities[outside] * clusters.log_joint(rows[outside])
            score += float(each.nansum())  # NaN for a scale without rows
        if score <= best:
            break
        best, chosen = score, shrinkage
    return _maximised(rows, responsibilities, scales, chosen)
