r"""Initialization of a guide: of many normals along an ascent to the mode, that of the largest evidence lower bound.

A mode alone misleads: that of a funnel lies in its neck, where almost none of the probability is. So every point of the
ascent proposes normals, and the evidence lower bound of each, estimated from a few draws, decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_maf._core.optimization import Adam
from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.log_joint import FAILURES
from pyro_maf.infer.model import Args, Kwargs, leaves_of

__all__ = ["Normal", "best_normal", "best_of", "in_double", "widened"]

Score = Callable[[Tensor], Tensor]
"""Log-density of latent vectors: (rows, D) to (rows,)."""

DRAWS = 32
ITERATIONS = 300
PATIENCE, GAIN = 20, 1e-3
"""Iterations, and nats: an ascent without such a gain in so many iterations ends, as for a density without a mode."""
HALVINGS = 12
ISOTROPIC = (1.0, 0.1)
LARGEST_SCALES = (math.inf, 10.0, 1.0)
DENSE = 200
HISTORY = 20
FEW = 20
"""Maximum number of dimensions at which the curvature alone suffices."""
DIAGONAL_STEPS, DIAGONAL_RATE = 100, 0.2
ALONE, ALONE_DRAWS = 300, 4
"""For a model that has to be run for each row: approximate maximum number of runs, and draws for each bound."""
CLOSE = 1e-2
"""Maximum difference between log-densities in float64 and in float32, in nats by dimension and relative."""
SLACK = 10.0
"""Maximum loss of a normal by rounding to float32, in nats and per cent."""


class Normal(NamedTuple):
    """A normal distribution: location (D,) and lower triangular factor (D, D) of the covariance."""

    loc: Tensor
    scale_tril: Tensor

    @classmethod
    def isotropic(cls, loc: Tensor, scale: float) -> Normal:
        """Return a normal with the same scale in every direction."""
        return cls(loc, scale * _identity(loc))


def best_normal(log_density: Score, loc: Tensor, *, vectorised: bool = True) -> Normal:
    r"""Return the normal of the largest evidence lower bound among those proposed on an ascent from `loc`.

    Every point of the ascent proposes normals with the curvature there, their scales unbounded, at most 10 and at most
    1, and isotropic ones of scale 1 and 0.1. Bounds are estimated from 32 draws, the same for all. Beyond 20 dimensions
    a further candidate is the diagonal normal that variational inference reaches from `loc`: where scales depend on
    each other, as in hierarchies, no curvature has a bound as high.

    The ascent is a damped Newton iteration on |eigenvalues|, so that saddles repel it; beyond 200 dimensions it is
    BFGS, whose curvature comes from the gradients on the way. It ends where it has converged, or after 20 iterations
    without a better normal, and is computed in float64 where the model can be run so.

    Args:
        log_density: Log-density of the posterior, up to a constant.
        loc: Starting point, (D,).
        vectorised: True if many rows cost about as much as one. If not, the ascent is limited to some 300 runs.

    Reference:
        Dauphin et al., *Identifying and attacking the saddle point problem*, 2014; Zhang et al., *Pathfinder: Parallel
        quasi-Newton variational inference*, 2022.
    """
    wide = in_double(log_density, loc)
    if wide is not None:
        best, bound = _Search(wide, loc.double(), vectorised).best()
        normal = Normal(best.loc.to(loc), best.scale_tril.to(loc))
        with torch.no_grad():
            narrow = float(_bounds(log_density, [normal], _noise(loc, vectorised))[0])
        if narrow > bound - max(SLACK, SLACK / 100 * abs(bound)):
            return normal
    return _Search(log_density, loc, vectorised).best()[0]


def best_of(log_density: Score, normals: list[Normal], *, vectorised: bool = True) -> Normal:
    """Return the normal of the largest evidence lower bound among a few."""
    with torch.no_grad():
        bounds = _bounds(log_density, normals, _noise(normals[0].loc, vectorised))
    return normals[int(bounds.argmax())]


def _noise(loc: Tensor, vectorised: bool, seed: int = 0) -> Tensor:
    """Draw standard normals in antithetic pairs."""
    with seeded(seed, loc.device):
        noise = torch.randn((DRAWS if vectorised else ALONE_DRAWS) // 2, len(loc)).to(loc)
    return torch.cat([noise, -noise])


class _Search:
    """The search for a normal, in the dtype of `loc`."""

    def __init__(self, log_density: Score, loc: Tensor, vectorised: bool) -> None:
        self._log_density, self._loc, self._vectorised = log_density, loc, vectorised
        self._noise = _noise(loc, vectorised)
        self._runs = 0
        self._best, self._bound = Normal.isotropic(loc, ISOTROPIC[-1]), -math.inf

    def best(self) -> tuple[Normal, float]:
        """The best normal and its bound."""
        dense = DENSE if self._vectorised else FEW
        path = (_newton if len(self._loc) <= dense else _bfgs)(self._score, self._loc, self._vectorised)
        if self._vectorised:
            self._all_along(path)
        else:
            self._backwards(path)
        if len(self._loc) > FEW and self._vectorised:
            self._try([_diagonal(self._score, self._loc, _noise(self._loc, True, seed=1))])
        return self._best, self._bound

    def _all_along(self, path: Iterator[list[Normal]]) -> None:
        """Try the candidates of every point."""
        idle = 0
        for candidates in path:
            idle = 0 if self._try(candidates) else idle + 1
            if idle >= PATIENCE:
                return

    def _backwards(self, path: Iterator[list[Normal]]) -> None:
        """Try the candidates of some points, from the last one back, since a bound takes many more runs than a step."""
        points = []
        for candidates in path:
            points.append(candidates)
            if self._runs >= ALONE // 2:
                break
        back = 1
        while back <= len(points) and self._runs < ALONE:
            self._try(points[-back])
            back *= 2

    def _score(self, rows: Tensor) -> Tensor:
        self._runs += len(rows)
        return self._log_density(rows)

    def _try(self, candidates: list[Normal]) -> bool:
        """Try candidates; return True if one is better than the best so far."""
        with torch.no_grad():
            bound, index = _bounds(self._score, candidates, self._noise).max(0)
        better = float(bound) > self._bound + GAIN
        if float(bound) > self._bound:
            self._best, self._bound = candidates[int(index)], float(bound)
        return better


def _diagonal(log_density: Score, loc: Tensor, noise: Tensor) -> Normal:
    """Return the diagonal normal that a hundred steps of Adam, on the bound at fixed noise, reach from `loc`."""
    place = torch.stack([loc, torch.full_like(loc, math.log(ISOTROPIC[-1]))]).requires_grad_()
    optimizer = Adam([place], betas=(0.8, 0.95))
    for step in range(DIAGONAL_STEPS):
        with torch.enable_grad():
            scores = log_density(place[0] + noise * place[1].exp())
            loss = -scores.mean() - place[1].sum()
        if not loss.isfinite():
            break
        (gradient,) = torch.autograd.grad(loss, place)
        gradient.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        optimizer.step([gradient], DIAGONAL_RATE * (1 - step / DIAGONAL_STEPS))
    loc, log_scale = place.detach()
    return Normal(loc, log_scale.exp().diag())


def _bounds(log_density: Score, candidates: list[Normal], noise: Tensor) -> Tensor:
    """Evidence lower bound of each candidate, up to a common constant."""
    draws = torch.cat([each.loc + noise @ each.scale_tril.T for each in candidates])
    scores = log_density(draws).view(len(candidates), -1).mean(1)
    entropies = torch.stack([each.scale_tril.diagonal().log().sum() for each in candidates])
    return (scores + entropies).nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def _newton(log_density: Score, loc: Tensor, vectorised: bool) -> Iterator[list[Normal]]:
    """Candidates at each point of a damped Newton ascent."""
    yield _isotropic(loc)
    value = -math.inf
    for _ in range(ITERATIONS):
        try:
            gradient, hessian = _derivatives(log_density, loc, vectorised)
        except FAILURES:  # such as an operation without a second derivative
            yield from _bfgs(log_density, loc, vectorised)
            return
        if not gradient.isfinite().all():
            return
        if not hessian.isfinite().all():  # as the second derivative of torch.logaddexp is not, with one term far below
            yield from _bfgs(log_density, loc, vectorised)
            return
        curvature = _Curvature(-hessian)
        yield [curvature.normal(loc, largest) for largest in LARGEST_SCALES] + _isotropic(loc)
        step = curvature.solve(gradient)
        loc, improved = _line_search(log_density, loc, step, vectorised)
        if improved - value < 1e-4:
            return
        value = improved


def _bfgs(log_density: Score, loc: Tensor, vectorised: bool) -> Iterator[list[Normal]]:
    """Candidates at each point of a BFGS ascent with a short history."""
    yield _isotropic(loc)
    covariance = _identity(loc)
    gradient = _gradient(log_density, loc)
    value = -math.inf
    for iteration in range(4 * ITERATIONS):
        if not gradient.isfinite().all():
            return
        before, gradient_before = loc, gradient
        loc, improved = _line_search(log_density, loc, covariance @ gradient, vectorised)
        done = improved - value < 1e-4
        value, gradient = improved, _gradient(log_density, loc)
        moved, bent = loc - before, gradient_before - gradient
        if moved @ bent > 1e-8 * bent @ bent:
            if iteration % HISTORY == 0:  # forget the curvature of points far away
                covariance = _identity(loc) * ((moved @ bent) / (bent @ bent))
            covariance = _updated(covariance, moved, bent)
        if done or iteration % 4 == 3:
            factor, failed = torch.linalg.cholesky_ex(covariance)
            normals = [] if failed else [Normal(loc, factor)]
            yield normals + _isotropic(loc)
        if done:
            return


def _identity(loc: Tensor) -> Tensor:
    return torch.eye(len(loc), dtype=loc.dtype, device=loc.device)


def _isotropic(loc: Tensor) -> list[Normal]:
    return [Normal.isotropic(loc, scale) for scale in ISOTROPIC]


def _updated(covariance: Tensor, moved: Tensor, bent: Tensor) -> Tensor:
    """One BFGS update of the inverse Hessian."""
    weight = 1 / (moved @ bent)
    projected = covariance @ bent
    outer = torch.outer(moved, projected)
    return (
        covariance - weight * (outer + outer.T) + weight * (1 + weight * bent @ projected) * torch.outer(moved, moved)
    )


def _line_search(log_density: Score, loc: Tensor, step: Tensor, vectorised: bool) -> tuple[Tensor, float]:
    """Return the best of a full step and ever smaller ones, with its log-density; if not vectorised, the first gain."""
    sizes = 0.5 ** torch.arange(HALVINGS, dtype=loc.dtype, device=loc.device)
    points = torch.cat([loc[None], loc + sizes[:, None] * step])
    with torch.no_grad():
        if vectorised:
            value, index = log_density(points).max(0)
            return points[int(index)], float(value)
        present = float(log_density(points[:1]))
        for point in points[1:]:
            if (value_there := float(log_density(point[None]))) > present:
                return point, value_there
    return loc, present


class _Curvature:
    """The precision matrix |-H|, by its eigendecomposition in units in which its diagonal is one.

    Rounding errors are smallest in those units: predictors of different scales differ in the diagonal alone.
    """

    def __init__(self, precision: Tensor) -> None:
        self._like = precision.new_empty(())
        floor = 1e-4 if precision.dtype == torch.float32 else 1e-9
        precision = widened(precision)
        diagonal = precision.diagonal().abs()
        self._units = diagonal.clamp(min=max(1e-12, 1e-14 * float(diagonal.max()))).rsqrt()
        scaled = precision * self._units * self._units[:, None]
        values, self._vectors = torch.linalg.eigh((scaled + scaled.T) / 2)
        self._values = values.abs().clamp(min=floor * float(values.abs().max()))

    def solve(self, gradient: Tensor) -> Tensor:
        """The Newton step."""
        turned = self._vectors.T @ (self._units * widened(gradient))
        return (self._units * (self._vectors @ (turned / self._values))).to(self._like)

    def normal(self, loc: Tensor, largest: float) -> Normal:
        """The normal of this precision, with no scale above `largest`."""
        root = self._units[:, None] * self._vectors * self._values.rsqrt()
        covariance = root @ root.T
        if largest < math.inf:
            values, vectors = torch.linalg.eigh(covariance)
            covariance = (vectors * values.clamp(max=largest**2)) @ vectors.T
        factor, _ = torch.linalg.cholesky_ex((covariance + covariance.T) / 2)
        return Normal(loc, factor.to(self._like))


def _gradient(log_density: Score, loc: Tensor) -> Tensor:
    point = loc.clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(log_density(point[None]).sum(), point)
    return gradient


def _derivatives(log_density: Score, loc: Tensor, vectorised: bool) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian; for many rows at once by two backward passes over D copies of the point."""
    size = len(loc)
    copies = size if vectorised else 1
    points = loc.expand(copies, -1).clone().requires_grad_()
    with torch.enable_grad():
        (gradients,) = torch.autograd.grad(log_density(points).sum(), points, create_graph=True)
        if vectorised:
            (hessian,) = torch.autograd.grad(gradients.diagonal().sum(), points)
            return gradients[0].detach(), hessian
        rows = [torch.autograd.grad(entry, points, retain_graph=True)[0][0] for entry in gradients[0]]
    return gradients[0].detach(), torch.stack(rows)


class _Promoting(TorchFunctionMode):
    """Type promotion of mixed products, as of sums: float32 times float64 is float64, matrix products included."""

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        kwargs = kwargs or {}
        dtypes = {leaf.dtype for leaf in leaves_of((args, *kwargs.values())) if isinstance(leaf, Tensor)}
        if dtypes >= {torch.float32, torch.float64} and not _writes(func, kwargs):
            args = tuple(map(_promoted, args))
            kwargs = {name: _promoted(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _writes(func: Callable[..., object], kwargs: Kwargs) -> bool:
    """True if a function writes into one of its arguments; written into a float64 copy, that would be lost."""
    name = getattr(func, "__name__", "")
    return "out" in kwargs or (name.endswith("_") and not name.endswith("__")) or name.startswith(("__i", "__set"))


def _promoted(value: object) -> object:
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        return type(value)(_promoted(item) for item in value)
    return value


def widened(tensor: Tensor) -> Tensor:
    """Convert a tensor to float64, on its device or, if the device has no float64, on the CPU."""
    try:
        return tensor.double()
    except (TypeError, RuntimeError):
        return tensor.cpu().double()


def in_double(score: Score, loc: Tensor) -> Score | None:
    """Return the log-density for latent vectors in float64, or None if the model cannot be run so.

    Data and parameters of the model stay float32; everything computed from them and the latents is float64.

    Args:
        score: Log-density of latent vectors in the dtype of `loc`.
        loc: The point at which both are compared, (D,).
    """
    wide = widened(loc)
    if loc.dtype == torch.float64 or wide.device != loc.device:
        return None

    def promoted(latents: Tensor) -> Tensor:
        with _Promoting():
            return score(latents).double()

    try:
        with torch.no_grad():
            result, expected = promoted(wide[None]), score(loc[None])
    except Exception:  # a model not written for float64 may fail in any way
        return None
    same = torch.allclose(result.to(expected), expected, rtol=CLOSE, atol=CLOSE * len(loc))
    return promoted if same else None
