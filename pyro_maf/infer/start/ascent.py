r"""Ascents to modes of a log-density: a damped Newton iteration, or BFGS, from several points in one batch.

The Newton step uses |H|, with the absolute eigenvalues of the Hessian, so that saddles repel it. If there is no
Hessian, and in many dimensions, the inverse Hessian is estimated from the gradients along the way.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_maf.infer.models.double_precision import Score, is_resolved, nudged, widened
from pyro_maf.infer.models.model import FAILURES
from pyro_maf.infer.start.normal import Normal

__all__ = ["Ascents", "Place"]

CONVERGED = 1e-4
"""Gain of a step, in nats, below which an ascent ends."""
AT_REST = 1e-2
"""Half the squared length of a Newton step, in nats, below which a point counts as a mode."""
LARGEST_SCALES = (math.inf, 10.0, 1.0)
HALVINGS = 12
HISTORY = 20
QUASI_STEPS = 4
"""Number of BFGS iterations that replace one Newton iteration."""


class Curvature:
    """A precision matrix |-H|, by its eigendecomposition in units in which its diagonal is one.

    Rounding errors are smallest in these units: predictors with different scales differ only in the diagonal.

    Args:
        precision: Negative Hessian -H, (D, D).

    Attributes:
        is_maximum: True if the density is log-concave at the point.
    """

    def __init__(self, precision: Tensor) -> None:
        self._like = precision.new_empty(())
        floor = 1e-4 if precision.dtype == torch.float32 else 1e-9
        precision = widened(precision)
        diagonal = precision.diagonal().abs()
        self._units = diagonal.clamp(min=max(1e-12, 1e-14 * float(diagonal.max()))).rsqrt()
        scaled = precision * self._units * self._units[:, None]
        values, self._vectors = torch.linalg.eigh((scaled + scaled.T) / 2)
        self.is_maximum = bool(values[0] > 0)
        # A density without curvature, such as Laplace's, has none in any units; otherwise 1 is that of the diagonal.
        self._values = values.abs().clamp(min=floor * max(1.0, float(values.abs().max())))

    def solve(self, gradient: Tensor) -> Tensor:
        """The Newton step."""
        turned = self._vectors.T @ (self._units * widened(gradient))
        return (self._units * (self._vectors @ (turned / self._values))).to(self._like)

    def normal(self, loc: Tensor, largest: float) -> Normal:
        """The normal with this precision, with no scale above `largest`."""
        root = self._units[:, None] * self._vectors * self._values.rsqrt()
        covariance = root @ root.T
        if largest < math.inf:
            values, vectors = torch.linalg.eigh(covariance)
            covariance = (vectors * values.clamp(max=largest**2)) @ vectors.T
        factor, _ = torch.linalg.cholesky_ex((covariance + covariance.T) / 2)
        return Normal(loc, factor.to(self._like))


class _Quasi:
    """A BFGS estimate of the inverse Hessian, and the gradient that it was last updated with."""

    def __init__(self, gradient: Tensor) -> None:
        self.gradient = gradient
        self.covariance = torch.eye(len(gradient), dtype=gradient.dtype, device=gradient.device)
        self._updates = 0

    def update(self, moved: Tensor, gradient: Tensor) -> None:
        """Update the estimate after a step."""
        bent, self.gradient = self.gradient - gradient, gradient
        along, square = moved @ bent, bent @ bent
        if along > 1e-8 * square:  # the curvature is positive
            if self._updates % HISTORY == 0:  # discard the curvature of distant points
                self.covariance = torch.eye(len(moved)).to(moved) * (along / square)
            projected = self.covariance @ bent
            outer = torch.outer(moved, projected) / along
            gain = (1 + (bent @ projected) / along) / along
            self.covariance = self.covariance - (outer + outer.T) + gain * torch.outer(moved, moved)
        self._updates += 1

    def normal(self, loc: Tensor) -> Normal | None:
        """The normal with this covariance, or None if it is not positive definite."""
        factor, failed = torch.linalg.cholesky_ex(self.covariance)
        return None if failed else Normal(loc, factor)


class Place(NamedTuple):
    """A point of an ascent, with the curvature there, or a normal from an estimate of it."""

    loc: Tensor
    curvature: Curvature | None = None
    estimate: Normal | None = None

    def normals(self) -> list[Normal]:
        """Return the normals for the curvature: with unbounded scales, and with scales of at most 10 and 1."""
        if self.curvature is not None:
            return [self.curvature.normal(self.loc, largest) for largest in LARGEST_SCALES]
        return [] if self.estimate is None else [self.estimate]


class Ascents:
    r"""Ascents of a log-density from several points; a step evaluates all of them in one batch.

    Args:
        log_density: Log-density of vectors, (rows, D) to (rows,), in nats.
        points: Starting points, (ascents, D).
        vectorised: Whether many rows cost about as much as one; if not, there is a single ascent.
        newton: True for Newton's iteration, False for BFGS.

    Attributes:
        locs: Current points, (ascents, D).
        values: Log-density there, (ascents,).
        active: Mask of the ascents that have not ended.
        at_mode: Mask of those that have ended at a mode.
        paths: The places that each has passed.
    """

    def __init__(self, log_density: Score, points: Tensor, vectorised: bool, newton: bool) -> None:
        self._log_density, self._vectorised, self._newton = log_density, vectorised, newton
        self.locs = points.clone()
        self.values = points.new_full((len(points),), -math.inf)
        self.active = torch.ones(len(points), dtype=torch.bool)
        self.at_mode = torch.zeros(len(points), dtype=torch.bool)
        self.paths: list[list[Place]] = [[Place(point)] for point in points]
        self._quasi: dict[int, _Quasi] = {}

    def step(self) -> None:
        """Take a step of every active ascent."""
        rows = [row for row in self._active() if row not in self._quasi]
        rows = self._newton_step(rows) if self._newton else rows
        for row, gradient in self._gradients(rows).items():
            self._quasi[row] = _Quasi(gradient)
        ascending = [row for row in self._active() if row in self._quasi]
        for _ in range(QUASI_STEPS):
            if rows := [row for row in ascending if self.active[row]]:
                self._quasi_step(rows)
        for row in ascending:
            loc = self.locs[row].clone()
            self.paths[row].append(Place(loc, estimate=self._quasi[row].normal(loc)))

    def stop(self, rows: slice) -> None:
        """End some ascents where they are."""
        self.at_mode[rows] &= ~self.active[rows]
        self.active[rows] = False

    def _active(self) -> list[int]:
        return [int(row) for row in self.active.nonzero()[:, 0]]

    def _end(self, row: int, at_mode: bool) -> None:
        self.active[row] = False
        self.at_mode[row] = at_mode

    def _newton_step(self, rows: list[int]) -> list[int]:
        """Take a Newton step; return the rows that have no Hessian."""
        if not rows:
            return []
        before = self.locs[rows]
        try:
            gradients, hessians = _derivatives(self._log_density, before, self._vectorised)
        except FAILURES:  # for instance of an operation without a second derivative
            self._newton = False
            return rows
        moving, steps, without = [], [], []
        for row, loc, gradient, hessian in zip(rows, before, gradients, hessians, strict=True):
            if not gradient.isfinite().all():
                self._end(row, at_mode=False)
            elif not hessian.isfinite().all():  # for instance of torch.logaddexp, with one term far below
                without.append(row)
            else:
                curvature = Curvature(-hessian)
                self.paths[row].append(Place(loc, curvature))
                moving.append(row)
                steps.append(curvature.solve(gradient))
                rest = float(gradient @ steps[-1]) / 2
                self.at_mode[row] = curvature.is_maximum and rest < AT_REST
        if moving:
            self._move(moving, torch.stack(steps))
        return without

    def _quasi_step(self, rows: list[int]) -> None:
        """Take a BFGS step."""
        states = [self._quasi[row] for row in rows]
        before = self.locs[rows]
        self._move(rows, torch.stack([state.covariance @ state.gradient for state in states]))
        for row, gradient in self._gradients(rows).items():
            state = self._quasi[row]
            state.update(self.locs[row] - before[rows.index(row)], gradient)
            rest = float(gradient @ state.covariance @ gradient) / 2
            self.at_mode[row] = not self.active[row] and rest < AT_REST

    def _gradients(self, rows: list[int]) -> dict[int, Tensor]:
        """Return gradients by row; end the ascents whose gradient is not finite."""
        if not rows:
            return {}
        points = self.locs[rows].requires_grad_()
        try:
            with torch.enable_grad():
                total = self._log_density(points).sum() + 0 * points.sum()  # so that there is always a gradient
                (gradients,) = torch.autograd.grad(total, points)
        except FAILURES:  # for instance of an operation without a derivative
            gradients = torch.full_like(points, torch.nan)
        finite = {}
        for row, gradient in zip(rows, gradients, strict=True):
            if gradient.isfinite().all():
                finite[row] = gradient
            else:
                self._end(row, at_mode=False)
        return finite

    def _move(self, rows: list[int], steps: Tensor) -> None:
        """Move rows by the best of full steps and ever smaller ones; end those without a gain."""
        locs, values = _line_search(self._log_density, self.locs[rows], steps, self._vectorised)
        with torch.no_grad():
            resolved = is_resolved(values, self._log_density(nudged(locs)))
        gains = (values - self.values[rows]).where(resolved, -math.inf)
        for row, loc, value, gain in zip(rows, locs, values, gains.tolist(), strict=True):
            if gain > -math.inf:
                self.locs[row], self.values[row] = loc, value
            if not gain >= CONVERGED:
                self.active[row] = False


def _line_search(log_density: Score, locs: Tensor, steps: Tensor, vectorised: bool) -> tuple[Tensor, Tensor]:
    """Return the best of a full step and ever smaller ones, with its log-density; if not vectorised, the first gain."""
    sizes = 0.5 ** torch.arange(HALVINGS, dtype=locs.dtype, device=locs.device)
    sizes = torch.cat([sizes.new_zeros(1), sizes])[:, None, None]
    points = (locs + sizes * steps).transpose(0, 1)
    with torch.no_grad():
        if vectorised:
            values, index = log_density(points.flatten(0, 1)).view(points.shape[:2]).max(1)
            return points[torch.arange(len(locs), device=locs.device), index], values
        present = log_density(points[0, :1])
        for point in points[0, 1:]:
            if (value := log_density(point[None])) > present:
                return point[None], value
    return locs, present


def _derivatives(log_density: Score, locs: Tensor, vectorised: bool) -> tuple[Tensor, Tensor]:
    """Gradients and Hessians; for many rows at once by two backward passes over D copies of each point."""
    rows, size = locs.shape
    copies = size if vectorised else 1
    points = locs.repeat_interleave(copies, 0).requires_grad_()
    with torch.enable_grad():
        (gradients,) = torch.autograd.grad(log_density(points).sum(), points, create_graph=True)
        if vectorised:
            by_copy = gradients.view(rows, size, size)
            (hessians,) = torch.autograd.grad(by_copy.diagonal(dim1=1, dim2=2).sum(), points)
            return by_copy[:, 0].detach(), hessians.view(rows, size, size)
        second = [torch.autograd.grad(entry, points, retain_graph=True)[0][0] for entry in gradients[0]]
    return gradients.detach(), torch.stack(second)[None]
