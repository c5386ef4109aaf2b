r"""Initialization of a guide: among many normals along ascents to modes, those with the largest evidence lower bounds.

A mode alone misleads: that of a funnel lies in its neck, where almost none of the probability is. So every point of an
ascent proposes normals, and the evidence lower bound of each, estimated from a few draws, decides. A single ascent
misleads if there are several modes: so there are ascents from other points, and each mode that matters has its normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.models.double_precision import Score, in_double, is_resolved, nudged, promoted
from pyro_maf.infer.models.latents import UNIFORM
from pyro_maf.infer.start.ascent import Ascents, Place
from pyro_maf.infer.start.modes import End, Start, bounds_of, covering, different, distance
from pyro_maf.infer.start.normal import DRAWS, Normal, diagonal_normal, fixed_noise, narrow_place

__all__ = ["DENSE", "Start", "best_normal", "best_start", "other_points"]

ITERATIONS, OTHERS_ITERATIONS = 300, 100
PATIENCE, GAIN = 20, 1e-3
"""Number of iterations, and nats: an ascent without such a gain in so many iterations ends, even if there is no
mode."""
LEAST_ITERATIONS = 30
"""Minimum number of iterations of the other ascents, even if the first has ended."""
BETTER = 1.0
"""Nats by which the normal of another ascent has to be better if it is not at a separate mode."""
ISOTROPIC = (1.0, 0.1)
DENSE = 200
"""Maximum number of dimensions for which D x D matrices are used."""
FEW = 20
"""Maximum number of dimensions for which the curvature suffices."""
DIAGONAL_STEPS = 100
ALONE, ALONE_DRAWS = 300, 4
"""For a model that has to be run for each row: approximate maximum number of runs, and draws for each bound."""
ALONE_BY_OTHER, ALONE_POOL = 40, 16
"""For such a model: runs of an ascent from another point, and number of points of each kind from which it is chosen."""
SLACK = 10.0
"""Maximum loss of a typical draw due to rounding to float32, in nats and per cent."""
OTHERS, LEAST_OTHERS, ROWS = 11, 3, 600
"""Number of other ascents, in few dimensions and at least, and number of rows in which all their Hessians are
computed."""
POOL = 64
"""Number of points in that cube from which the starting points are chosen."""
MOST_MODES, MOST_IMAGES = 8, 24
"""Maximum number of modes whose images under symmetries are examined, and of these images."""
BLOCK = 12
"""Number of places of an ascent whose candidates are tried in one batch."""


def best_normal(log_density: Score, loc: Tensor, *, vectorised: bool = True) -> Normal:
    r"""Return the normal with the largest evidence lower bound among those proposed along an ascent from `loc`.

    Arguments are those of `best_start`.
    """
    return best_start(log_density, loc, vectorised=vectorised).normals[0]


def best_start(
    log_density: Score,
    loc: Tensor,
    others: Tensor | None = None,
    *,
    proposals: Sequence[Normal] = (),
    images: Callable[[Tensor], Tensor] | None = None,
    vectorised: bool = True,
) -> Start:
    r"""Return the normals with the largest evidence lower bounds of those proposed along ascents from several points.

    Every point of the ascent from `loc` proposes normals with the curvature there, with scales unbounded, at most 10
    and at most 1, and isotropic ones of scale 1 and 0.1. Bounds are estimated from 32 draws, the same for all. Beyond
    20 dimensions, another candidate is the diagonal normal that variational inference reaches from `loc`: if scales
    depend on each other, as in hierarchies, no curvature has as high a bound. Ascents from other points reveal further
    modes; those that matter have a normal each.

    An ascent is a damped Newton iteration on |eigenvalues|, so that saddles repel it. Beyond 200 dimensions it is BFGS,
    whose curvature comes from the gradients along the way. It ends when it has converged, or after 20 iterations
    without a better normal, and is computed in float64 if the model supports that.

    Args:
        log_density: Log-density of the posterior, up to a constant.
        loc: Starting point, (D,).
        others: Further starting points, (points, D).
        proposals: Normals that compete with those of the first ascent.
        images: Maps points to their images under symmetries of the density, (points, D) to (images, D), which are
            examined for further modes.
        vectorised: Whether many rows cost about as much as one. If not, an ascent takes some 300 runs, and one from
            another point 40.

    Reference:
        Dauphin et al., *Identifying and attacking the saddle point problem*, 2014; Zhang et al., *Pathfinder: Parallel
        quasi-Newton variational inference*, 2022.
    """
    others = loc.new_empty(0, len(loc)) if others is None else others
    wide = in_double(log_density, loc)
    if wide is not None:
        exact = loc.double()
        moved = None if images is None else promoted(images)
        best = _start(wide, exact, others.to(exact), [each.to(exact) for each in proposals], moved, vectorised)
        normals = tuple(each.to(loc) for each in best.normals)
        if all(_survives(log_density, wide, normal, vectorised) for normal in normals):
            return best._replace(normals=normals, shares=best.shares.to(loc))
    return _start(log_density, loc, others, proposals, images, vectorised)


@torch.no_grad()
def other_points(log_density: Score, loc: Tensor, prior: Tensor | None, *, vectorised: bool = True) -> Tensor:
    """Return further starting points, (points, D): draws of the prior, and of the cube in which NUTS is started.

    Half of them are those with the highest density among 64 of each kind, and half are chosen without evaluating it. In
    many dimensions there are fewer, since a Hessian of each is computed at every step. For a density that has to be
    evaluated row by row, there is only the best of sixteen of each kind.

    Args:
        log_density: Log-density of latent vectors, (rows, D) to (rows,).
        loc: The first starting point, (D,).
        prior: Draws of the prior, (draws, D), or None if it cannot be sampled.
        vectorised: As in `best_start`.
    """
    if len(loc) > DENSE:
        return loc.new_empty(0, len(loc))
    count = min(OTHERS, max(LEAST_OTHERS, ROWS // len(loc) - 1)) if vectorised else 0
    with seeded(0, loc.device):
        cube = (UNIFORM * (2 * torch.rand(POOL, len(loc), device=loc.device) - 1)).to(loc)
    pools = [cube] if prior is None else [cube, prior]
    chosen = []
    for index, pool in enumerate(pools):
        part = (count + index) // len(pools) if vectorised else 2
        pool = pool if vectorised else pool[:ALONE_POOL]
        scores = log_density(pool)
        pool, scores = pool[scores.isfinite()], scores[scores.isfinite()]
        best = scores.argsort(descending=True)[: part // 2].tolist()
        rest = [row for row in range(len(pool)) if row not in best][: part - len(best) if vectorised else 0]
        chosen.append(pool[[*best, *rest]])
    return torch.cat(chosen)


def _draws(vectorised: bool) -> int:
    return DRAWS if vectorised else ALONE_DRAWS


@torch.no_grad()
def _survives(log_density: Score, wide: Score, normal: Normal, vectorised: bool) -> bool:
    """Return whether rounding to the model's dtype costs a typical draw of a normal little."""
    draws = normal.of_noise(fixed_noise(normal.loc, draws=_draws(vectorised)))
    exact = wide(draws.double())
    losses = exact - log_density(draws)
    return bool((losses < (SLACK / 100 * exact.abs()).clamp(min=SLACK)).double().mean() > 0.5)


def _start(
    log_density: Score,
    loc: Tensor,
    others: Tensor,
    proposals: Sequence[Normal],
    images: Callable[[Tensor], Tensor] | None,
    vectorised: bool,
) -> Start:
    """Return the initialization, in the dtype of `loc`."""
    search = _Search(log_density, torch.cat([loc[None], others]) if vectorised else loc[None], vectorised)
    normal, bound = search.best(proposals)
    for point in others if not vectorised else ():
        other, other_bound = _Search(log_density, point[None], False, ALONE_BY_OTHER).best(())
        if other_bound > bound + BETTER:
            normal, bound = other, other_bound
    if not (vectorised and len(others)):
        return Start.single(normal)
    other, other_bound = search.best_of_others()
    if other_bound > bound + BETTER:
        normal, bound = other, other_bound
    modes = different(log_density, search.ends())
    if images is not None and modes:
        moved = images(torch.stack([mode.loc for mode in modes[:MOST_MODES]]))[:MOST_IMAGES]
        if len(moved):
            # Not only moved themselves: in unconstrained space a symmetry may be nonlinear, and the mode is near its
            # image.
            modes = different(log_density, [*modes, *_Search(log_density, moved, vectorised).ascended()])
    return Start.single(normal) if len(modes) < 2 else _of_modes(log_density, modes, normal, bound)


def _of_modes(log_density: Score, modes: list[End], normal: Normal, bound: float) -> Start:
    """Return the initialization from the modes that matter; the best normal is at one of them."""
    noise = fixed_noise(normal.loc)
    nearest = min(range(len(modes)), key=lambda index: distance(normal, modes[index].loc))
    normals, bounds = [], []
    for index, mode in enumerate(modes):
        with torch.no_grad():
            largest, place = bounds_of(log_density, mode.normals, noise).max(0)
        is_best = index == nearest and bound > float(largest)
        normals.append(normal if is_best else mode.normals[int(place)])
        bounds.append(bound if is_best else float(largest))
    return covering(log_density, normals, bounds)


class _Search:
    """The search for normals, in the dtype of the points, the first of which belongs to the ascent with bounds."""

    def __init__(self, log_density: Score, points: Tensor, vectorised: bool, alone: int = ALONE) -> None:
        self._log_density, self._loc, self._vectorised, self._alone = log_density, points[0], vectorised, alone
        self._noise = fixed_noise(points[0], draws=_draws(vectorised))
        self._runs = 0
        self._best, self._bound = Normal.isotropic(points[0], ISOTROPIC[-1]), -math.inf
        newton = points.shape[1] <= (DENSE if vectorised else FEW)
        self._ascents = Ascents(self._score, points, vectorised, newton)

    def best(self, proposals: Sequence[Normal]) -> tuple[Normal, float]:
        """Ascend; return the best normal, including the proposed ones, and its bound."""
        if self._vectorised:
            self._try_whole_path()
        else:
            self._backwards()
        if len(self._loc) > FEW and self._vectorised:
            place, noise = narrow_place(self._loc), fixed_noise(self._loc, seed=1)
            loc, log_scale = diagonal_normal(self._score, place, DIAGONAL_STEPS, noise=noise)
            self._try([Normal(loc, log_scale.exp().diag())])
        if proposals:
            self._try(proposals)
        return self._best, self._bound

    def ascended(self) -> list[End]:
        """Ascend without bounds; return the ends at modes."""
        for _ in range(LEAST_ITERATIONS):
            if self._ascents.active.any():
                self._ascents.step()
        self._ascents.stop(slice(None))
        return self.ends()

    def ends(self) -> list[End]:
        """The ends at modes, the highest density first."""
        ascents = self._ascents
        rows = [int(row) for row in ascents.at_mode.nonzero()[:, 0]]
        rows.sort(key=lambda row: -float(ascents.values[row]))
        normals = {row: ascents.paths[row][-1].normals() for row in rows}
        return [End(ascents.locs[row], float(ascents.values[row]), normals[row]) for row in rows if normals[row]]

    def best_of_others(self) -> tuple[Normal, float]:
        """The best normal, and its bound, along the ascent (other than the first) whose end has the best one."""
        paths = self._ascents.paths[1:]
        ends = [self._best_of(_candidates(path[-1]))[1] for path in paths]
        path = paths[max(range(len(ends)), key=ends.__getitem__)]
        blocks = [path[start : start + BLOCK] for start in range(0, len(path), BLOCK)]
        found = [self._best_of([each for place in block for each in _candidates(place)]) for block in blocks]
        return max(found, key=lambda normal_and_bound: normal_and_bound[1])

    def _try_whole_path(self) -> None:
        """Ascend, and try the candidates of every point of the first ascent."""
        ascents = self._ascents
        self._try(_candidates(ascents.paths[0][0]))
        idle, last = 0, OTHERS_ITERATIONS
        for iteration in range(ITERATIONS):
            ascending = bool(ascents.active[0])
            ascents.step()
            if ascending:
                idle = 0 if self._try(_candidates(ascents.paths[0][-1])) else idle + 1
                if idle >= PATIENCE:
                    ascents.stop(slice(0, 1))
                if not ascents.active[0]:
                    last = min(last, max(LEAST_ITERATIONS, iteration))
            if iteration >= last:
                ascents.stop(slice(1, None))
            if not ascents.active.any():
                return

    def _backwards(self) -> None:
        """Try the candidates of some points, from the last one back, since a bound takes many more runs than a step."""
        path = self._ascents.paths[0]
        while self._ascents.active.any() and self._runs < self._alone // 2:
            self._ascents.step()
        back = 1
        while back <= len(path) and self._runs < self._alone:
            self._try(_candidates(path[-back]))
            back *= 2

    def _score(self, rows: Tensor) -> Tensor:
        self._runs += len(rows)
        return self._log_density(rows)

    def _try(self, candidates: Sequence[Normal]) -> bool:
        """Try candidates; return whether one is better than the best so far."""
        normal, bound = self._best_of(candidates)
        better = bound > self._bound + GAIN
        if bound > self._bound:
            self._best, self._bound = normal, bound
        return better

    def _best_of(self, candidates: Sequence[Normal]) -> tuple[Normal, float]:
        """The candidate with the largest bound, and that bound, or minus infinity if it is not meaningful."""
        with torch.no_grad():
            bounds = bounds_of(self._score, candidates, self._noise)
            while float(bounds.max()) > self._bound:
                best = candidates[int(bounds.argmax())]
                draws = best.of_noise(self._noise)
                if is_resolved(self._score(draws), self._score(nudged(draws))).all():
                    break
                bounds[bounds.argmax()] = -torch.inf
        return candidates[int(bounds.argmax())], float(bounds.max())


def _candidates(place: Place) -> list[Normal]:
    """The normals that a place of an ascent proposes."""
    return place.normals() + [Normal.isotropic(place.loc, scale) for scale in ISOTROPIC]
