"""Normals near a posterior: dense, diagonal with the largest bound, or, in many dimensions, with a few directions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_maf._core.optimization import Adam
from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.models.double_precision import Score, widened
from pyro_maf.infer.models.model import FAILURES
from pyro_maf.infer.models.recording import Derivatives, Recording, plain_derivatives, record
from pyro_maf.transforms.low_rank import along_chain

__all__ = [
    "DRAWS",
    "RATE",
    "Normal",
    "WideNormal",
    "diagonal_normal",
    "fixed_noise",
    "narrow_place",
    "second_derivatives",
    "truncated",
    "wide_start",
]

DRAWS = 32
RATE, BETAS = 0.2, (0.8, 0.95)
SCALE = 0.1
"""Initial scale in every direction."""
STEPS, MOST_ROUNDS, GAIN = 200, 10, 1.0
"""Number of steps for a diagonal normal, number of rounds, and the nats that each round has to gain."""
RANK = 300
"""Maximum number of directions, which then take as many multiplications per variable as a layer of the flow."""
PROBES = 8
"""Number of products with the Hessian for each third of the entries next to its diagonal."""
FLOOR, STEEPEST = 1e-4, 0.995
"""Minimum conditional precision, in units of the diagonal normal's, and maximum slope of a chain."""
LARGEST, SMALLEST = 10.0, 0.01
"""Bounds of the stretches."""


class Normal(NamedTuple):
    """A normal distribution: location (D,) and lower triangular factor (D, D) of the covariance."""

    loc: Tensor
    scale_tril: Tensor

    @classmethod
    def isotropic(cls, loc: Tensor, scale: float) -> Normal:
        """Return a normal with the same scale in every direction."""
        return cls(loc, scale * torch.eye(len(loc), dtype=loc.dtype, device=loc.device))

    def to(self, like: Tensor) -> Normal:
        """Convert both to the dtype and device of a tensor."""
        return Normal(self.loc.to(like), self.scale_tril.to(like))

    def of_noise(self, noise: Tensor) -> Tensor:
        """Map standard normal noise, (rows, D), to points."""
        return self.loc + noise @ self.scale_tril.T

    def noise_of(self, points: Tensor) -> Tensor:
        """Map points, (rows, D), to noise: their distance from the location in standard deviations."""
        return torch.linalg.solve_triangular(self.scale_tril, (points - self.loc).T, upper=False).T

    def log_weights(self, score: Score, noise: Tensor) -> Tensor:
        """Log-density minus that of this normal in nats, (rows,), at the points of some noise."""
        scores, noise = widened(score(self.of_noise(noise))), widened(noise)
        log_det = widened(self.scale_tril.diagonal()).log().sum()
        return scores + (noise.square() + math.log(2 * math.pi)).sum(1) / 2 + log_det


class WideNormal(NamedTuple):
    r"""The normal of loc + scale * C^-1 R (e^d * x) for a standard normal x, as which a `LowRankHead` starts.

    Attributes:
        loc, scale: (D,).
        chain: Minus the entries below the diagonal of C, (D - 1,).
        directions: Q, (D, k), with orthonormal columns.
        stretches: r, (k,).
        log_diagonal: d, (D,).
    """

    loc: Tensor
    scale: Tensor
    chain: Tensor
    directions: Tensor
    stretches: Tensor
    log_diagonal: Tensor

    @classmethod
    def diagonal(cls, loc: Tensor, scale: Tensor) -> WideNormal:
        """Return a normal without directions."""
        zeros = torch.zeros_like(loc)
        return cls(loc, scale, zeros[1:], loc.new_zeros(len(loc), 0), loc.new_ones(0), zeros)

    def linked(self, x: Tensor) -> Tensor:
        r"""loc + scale * C^-1 x, for x (\*batch, D)."""
        return self.loc + self.scale * (along_chain(self.chain, x) if bool(self.chain.any()) else x)

    def stretched(self, x: Tensor) -> Tensor:
        r"""loc + scale * C^-1 R x, for x (\*batch, D)."""
        along = (x @ self.directions) * (self.stretches - 1)
        return self.linked(x + along @ self.directions.T)

    def of_noise(self, noise: Tensor) -> Tensor:
        """Map standard normal noise, (rows, D), to points."""
        return self.stretched(self.log_diagonal.exp() * noise)

    def bound(self, score: Score, noise: Tensor) -> float:
        """Evidence lower bound at some noise, up to a constant; minus infinity if it is not finite."""
        scores = score(self.of_noise(noise))
        bound = scores.mean() + self.scale.log().sum() + self.stretches.log().sum() + self.log_diagonal.sum()
        return float(bound) if bool(bound.isfinite()) else -torch.inf


def fixed_noise(like: Tensor, seed: int = 0, draws: int = DRAWS) -> Tensor:
    """Draw standard normals in antithetic pairs, (draws, D), with the dtype and device of a vector."""
    with seeded(seed, like.device):
        noise = torch.randn(draws // 2, len(like)).to(like)
    return torch.cat([noise, -noise])


def truncated(log_weights: Tensor) -> Tensor:
    r"""Truncate n log weights, (n,), at the logarithm of \sqrt n times their mean, so that no single one dominates.

    Reference:
        Ionides, *Truncated importance sampling*, 2008.
    """
    return log_weights.clamp(max=float(log_weights.logsumexp(0)) - 0.5 * math.log(len(log_weights)))


def narrow_place(loc: Tensor) -> Tensor:
    """Return location and log-scale, (2, D), of a narrow normal around a point."""
    return torch.stack([loc, torch.full_like(loc, math.log(SCALE))])


def diagonal_normal(
    score: Score, place: Tensor, steps: int, *, noise: Tensor | None = None, degree: Tensor | None = None
) -> Tensor:
    """Return location and log-scale, (2, D), of the diagonal normal that Adam steps on the bound reach.

    Args:
        score: Log-density, up to a constant.
        place: Initial location and log-scale.
        steps: Number of steps.
        noise: Standard normals, (draws, D), used at every step; by default each step draws new ones, which is necessary
            if there are many more parameters than draws.
        degree: Numbers from 0 to 1 that the density depends on, optimised as well.
    """
    place = place.detach().clone()
    trained = [] if degree is None else [degree]
    optimizer = Adam([place, *trained], betas=BETAS)
    recording: Recording | None = None
    for step in range(steps):
        draws = fixed_noise(place[0], seed=step) if noise is None else noise
        points = place[0] + draws * place[1].exp()
        if step == 0:
            recording = record(score, points, trained)
        found = _recorded(recording, points) or plain_derivatives(score, points, trained)
        if not bool(found.values.mean().isfinite()):
            break
        loc, scale = found.gradient.mean(0), (found.gradient * draws).mean(0) * place[1].exp()
        gradients = [torch.stack([-loc, -scale - 1])]
        pairs = zip(trained, found.of_weights, strict=True)
        gradients += [torch.zeros_like(each) if pull is None else -pull / len(draws) for each, pull in pairs]
        for gradient in gradients:
            gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        optimizer.step(gradients, RATE * (1 - step / steps))
        for each in trained:
            each.detach().clamp_(0.0, 1.0)
    return place


def _recorded(recording: Recording | None, points: Tensor) -> Derivatives | None:
    """Derivatives from a recording; None if there is none, it fails, or a condition differs."""
    try:
        return None if recording is None else recording(points)
    except FAILURES:
        return None


def second_derivatives(score: Score, points: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the gradient at points, (rows, D), and the product of minus the Hessian there with vectors, (rows, D)."""
    points = points.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(score(points).sum(), points, create_graph=True)

    def product(vectors: Tensor) -> Tensor:
        return -torch.autograd.grad(gradient, points, vectors, retain_graph=True)[0]

    return gradient.detach(), product


def wide_start(score: Score, place: Tensor) -> WideNormal:
    """Return the normal with the largest bound of a diagonal one and some with directions, each fitted from the last.

    The directions are those in which the Hessian, averaged over draws, differs most from a diagonal. They come from a
    Krylov space of at most 300 products with a vector. A chain links neighbours in the vector.

    Args:
        score: Log-density, up to a constant.
        place: Initial location and log-scale, (2, D).

    Cost: for each normal that is tried, 200 gradients for 32 rows and up to 300 Hessian products for 16 rows; memory
        for 300 vectors.

    Reference:
        Lanczos, *An iteration method for the solution of the eigenvalue problem*, 1950.
    """
    loc, log_scale = diagonal_normal(score, place, STEPS)
    search = _Search(score, WideNormal.diagonal(loc, log_scale.exp()))
    try:
        for _ in range(MOST_ROUNDS):
            linked = _linked(score, search.best)
            if not (search.tries(linked) | search.tries(_fitted(score, linked))):
                break
        for _ in range(MOST_ROUNDS):
            if not search.tries(_fitted(score, _curved(score, search.best))):
                break
    except FAILURES:  # for instance of an operation without a second derivative
        pass
    return search.best


class _Search:
    """The normal with the largest bound so far, at noise that none was fitted to."""

    def __init__(self, score: Score, first: WideNormal) -> None:
        self._score, self.best = score, first
        self._noise = fixed_noise(first.loc, seed=STEPS)
        self._bound = -math.inf
        self.tries(first)

    @torch.no_grad()
    def tries(self, normal: WideNormal) -> bool:
        """Try a normal; return whether it gains enough for another round."""
        bound = normal.bound(self._score, self._noise)
        gains = bound > self._bound + GAIN
        if bound > self._bound:
            self.best, self._bound = normal, bound
        return gains


def _linked(score: Score, normal: WideNormal) -> WideNormal:
    """Return the normal with a chain, from the precision's entries on the diagonal and next to it."""
    product = _precision(lambda rows: score(normal.loc + normal.scale * rows), torch.zeros_like(normal.loc))
    diagonal, beside = torch.zeros_like(normal.loc), torch.zeros_like(normal.chain)
    with seeded(4, normal.loc.device):
        signs = 2.0 * torch.randint(0, 2, (PROBES, len(normal.loc))).to(normal.loc) - 1
    for sign in signs:
        for colour in range(3):  # so that neighbours of an entry are not in the same probe
            probe = torch.zeros_like(sign)
            probe[colour::3] = sign[colour::3]
            image = product(probe)
            diagonal += probe * image / PROBES
            beside += (probe[:-1] * image[1:] + probe[1:] * image[:-1]) / (2 * PROBES)
    chain, variances = _chain_of(diagonal.tolist(), beside.tolist())
    zeros = torch.zeros_like(normal.loc)
    return normal._replace(chain=zeros[1:] + chain.to(zeros), log_diagonal=variances.to(zeros).log() / 2)


def _chain_of(diagonal: list[float], beside: list[float]) -> tuple[Tensor, Tensor]:
    """Return a_i and w_i of z_i = a_i z_(i-1) + sqrt(w_i) x_i, whose precision is tridiagonal with these entries."""
    precision = max(diagonal[-1], FLOOR)
    chain, variances = [], [1 / precision]
    for here, link in zip(reversed(diagonal[:-1]), reversed(beside), strict=True):
        slope = max(-STEEPEST, min(STEEPEST, -link / precision))
        chain.append(slope)
        precision = max(here - slope**2 * precision, FLOOR)
        variances.append(1 / precision)
    return torch.tensor(chain[::-1]), torch.tensor(variances[::-1])


def _curved(score: Score, normal: WideNormal) -> WideNormal:
    """Return the normal with directions and stretches from the Hessian around it, in units of its scales."""
    base = normal._replace(scale=normal.scale * normal.log_diagonal.exp(), log_diagonal=torch.zeros_like(normal.loc))
    units = normal.log_diagonal.exp()
    # In units of the diagonal, in which the chain links neighbours.
    base = base._replace(chain=(normal.chain * units[:-1] / units[1:]).clamp(-STEEPEST, STEEPEST))
    values, directions = _spectrum(_precision(lambda rows: score(base.linked(rows)), base.loc * 0), base.loc)
    stretches = values.abs().clamp(LARGEST**-2, SMALLEST**-2).rsqrt()
    return base._replace(directions=directions.to(base.loc), stretches=stretches.to(base.loc))


def _fitted(score: Score, normal: WideNormal) -> WideNormal:
    """Return the normal with the location and diagonal that maximise the bound."""
    place = torch.stack([torch.zeros_like(normal.loc), normal.log_diagonal])
    shift, log_diagonal = diagonal_normal(lambda rows: score(normal.stretched(rows)), place, STEPS)
    return normal._replace(loc=normal.stretched(shift), log_diagonal=log_diagonal)


def _precision(score: Score, loc: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the product of a vector with minus the Hessian, averaged over standard normal draws around a point."""
    points = loc + fixed_noise(loc, seed=STEPS + 1)[::2]
    _, product = second_derivatives(score, points)
    return lambda vector: product(vector.expand_as(points)).mean(0)


def _spectrum(product: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values and orthonormal vectors of a symmetric matrix, from its products with vectors, in float64."""
    with seeded(3, like.device):
        vector = torch.randn(len(like)).to(like.device, torch.float64)
    basis = vector[None] / vector.norm()
    images: list[Tensor] = []
    for _ in range(min(RANK, len(like))):
        image = product(basis[-1].to(like)).double()
        images.append(image)
        rest = image - basis.T @ (basis @ image)
        rest = rest - basis.T @ (basis @ rest)  # remove what rounding left
        if float(rest.norm()) < 1e-5 * float(image.norm()) or len(images) == RANK:
            break
        basis = torch.cat([basis, rest[None] / rest.norm()])
    projected = basis[: len(images)] @ torch.stack(images).T
    values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    return values, basis[: len(images)].T @ vectors
