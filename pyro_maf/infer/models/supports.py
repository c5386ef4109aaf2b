"""Maps from real numbers to the supports of sites, and descriptions of supports as plain values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import (
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    SigmoidTransform,
    StickBreakingTransform,
)

__all__ = [
    "bounds_of",
    "described_support",
    "entry_map",
    "support_between",
    "support_map",
    "support_of",
    "tensors_of",
    "within_reach",
]

PLAIN = (
    "real",
    "positive",
    "nonnegative",
    "unit_interval",
    "simplex",
    "corr_cholesky",
    "corr_matrix",
    "lower_cholesky",
    "positive_definite",
    "ordered_vector",
    "positive_ordered_vector",
    "softplus_positive",
    "softplus_lower_cholesky",
    "unit_lower_cholesky",
)
"""Names of constraints without bounds."""

BOUNDED = {
    "greater_than": ("lower_bound",),
    "greater_than_eq": ("lower_bound",),
    "less_than": ("upper_bound",),
    "interval": ("lower_bound", "upper_bound"),
    "half_open_interval": ("lower_bound", "upper_bound"),
}
"""Constraints with bounds, and the names of their bounds."""

REACH = {torch.float32: 40.0, torch.float64: 300.0}
"""Maximum absolute log-scale; its exponential can be squared and divided by."""

MIXTURE = getattr(constraints, "MixtureSameFamilyConstraint", ())
"""Class of the supports of mixtures; none before torch 2.8, where a mixture has the support of its components."""


class _LowerCholesky(Transform):
    """Bijection from n (n + 1) / 2 real numbers to lower triangular n x n matrices with a positive diagonal.

    torch's map takes all n x n numbers, and ignores half of them.
    """

    domain = constraints.real_vector
    codomain: Constraint = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _LowerCholesky)

    def _call(self, x: Tensor) -> Tensor:
        size = self._size(x.shape[-1])
        rows, columns = torch.tril_indices(size, size, device=x.device)
        matrix = x.new_zeros(*x.shape[:-1], size, size)
        matrix[..., rows, columns] = torch.where(rows == columns, x.exp(), x)
        return matrix

    def _inverse(self, y: Tensor) -> Tensor:
        rows, columns = torch.tril_indices(y.shape[-1], y.shape[-1], device=y.device)
        entries = y[..., rows, columns]
        return torch.where(rows == columns, entries.where(rows == columns, torch.ones_like(entries)).log(), entries)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of the logarithms of the diagonal."""
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the matrices."""
        size = self._size(shape[-1])
        return torch.Size([*shape[:-1], size, size])

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the numbers."""
        return torch.Size([*shape[:-2], shape[-1] * (shape[-1] + 1) // 2])

    @staticmethod
    def _size(numbers: int) -> int:
        return (math.isqrt(8 * numbers + 1) - 1) // 2


class _PositiveDefinite(_LowerCholesky):
    """Bijection from n (n + 1) / 2 real numbers to positive definite n x n matrices, by their Cholesky factor L."""

    codomain = constraints.positive_definite

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _PositiveDefinite)

    def _call(self, x: Tensor) -> Tensor:
        factor = super()._call(x)
        return factor @ factor.mT

    def _inverse(self, y: Tensor) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(y)
        return super()._inverse(factor.where((failed == 0)[..., None, None], torch.nan))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Also of L to L L^T: 2^n times the product of the diagonal's powers, from n for the first entry to 1."""
        size = y.shape[-1]
        diagonal = torch.arange(size, device=x.device)
        logs = x[..., (diagonal + 1) * (diagonal + 2) // 2 - 1]
        # One more for the logarithm of the diagonal.
        return size * math.log(2) + ((size - diagonal + 1) * logs).sum(-1)


def support_map(support: Constraint) -> Transform:
    """Return the bijection from real numbers to a support.

    It is torch's, except for matrices, for which torch has no bijection with a log-determinant, and for mixtures, whose
    support is that of their components.

    Raises:
        NotImplementedError: If there is no bijection.
    """
    if isinstance(support, MIXTURE):
        return support_map(support.base_constraint)
    if isinstance(support, constraints.independent):
        return IndependentTransform(support_map(support.base_constraint), support.reinterpreted_batch_ndims)
    if type(support) is type(constraints.lower_cholesky):
        return _LowerCholesky()
    if type(support) is type(constraints.positive_definite):
        return _PositiveDefinite()
    return cast("Transform", biject_to(support))


def entry_map(fn: Distribution) -> Transform:
    """Return the bijection from a real number to each entry of an elementwise support, such as an interval."""
    return support_map(_of_entries(cast("Constraint", fn.support)))


def _of_entries(support: Constraint) -> Constraint:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def within_reach(transform: Transform, unconstrained: Tensor) -> Tensor:
    """Clamp scales away from 0 and infinity, where a model would raise for one draw among many."""
    while isinstance(transform, (IndependentTransform, ComposeTransform)):
        parts = transform.parts if isinstance(transform, ComposeTransform) else [transform.base_transform]
        if not parts:
            return unconstrained
        transform = parts[0]
    if not isinstance(transform, (ExpTransform, SigmoidTransform, StickBreakingTransform)):
        return unconstrained
    reach = REACH.get(unconstrained.dtype, 10.0)
    return unconstrained.clamp(-reach, reach)


def tensors_of(value: object) -> Iterator[Tensor]:
    """Iterate over the tensors of a constraint."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Constraint, list, tuple)):
        for item in vars(value).values() if isinstance(value, Constraint) else value:
            yield from tensors_of(item)


def bounds_of(support: Constraint) -> tuple[str, list[float | Tensor]]:
    """Name and bounds of an elementwise support with bounds.

    Raises:
        TypeError: If the support is unknown.
    """
    support = _of_entries(support)
    for name, bounds in BOUNDED.items():
        if type(support) is getattr(constraints, name):
            return name, [getattr(support, bound) for bound in bounds]
    raise TypeError(f"the support {support} has no description")


def support_between(name: str, bounds: Sequence[float | Tensor]) -> Constraint:
    """Return the support of entries with this name and bounds."""
    if name not in BOUNDED:
        raise ValueError(f"{name} is not a support with bounds")
    return cast("Constraint", getattr(constraints, name)(*bounds))


def described_support(support: Constraint) -> Any:
    """Describe a support as JSON values: a name, or a dictionary.

    Raises:
        TypeError: If the support is unknown.
    """
    if isinstance(support, MIXTURE):
        return described_support(support.base_constraint)
    if isinstance(support, constraints.independent):
        base = described_support(support.base_constraint)
        return {"independent": base, "dims": support.reinterpreted_batch_ndims}
    with suppress(TypeError):  # first, since some of the others are special cases
        name, bounds = bounds_of(support)
        return {"name": name, **dict(zip(BOUNDED[name], map(_plain, bounds), strict=True))}
    for name in PLAIN:
        if type(support) is type(getattr(constraints, name)):
            return name
    raise TypeError(f"the support {support} has no description")


def support_of(described: Any) -> Constraint:
    """Return the support described by `described_support`.

    Raises:
        LookupError, TypeError, ValueError: If it is not such a description.
    """
    if isinstance(described, str):
        if described not in PLAIN:
            raise ValueError(f"{described} is not a known support")
        return cast("Constraint", getattr(constraints, described))
    if not isinstance(described, Mapping):
        raise ValueError(f"{described!r} is not a support")
    if "independent" in described:
        return constraints.independent(support_of(described["independent"]), int(described["dims"]))
    return support_between(described["name"], [_bound(described[bound]) for bound in BOUNDED[described["name"]]])


def _plain(bound: float | Tensor) -> Any:
    """A bound as JSON: a number, or the dtype and the values of a tensor."""
    if isinstance(bound, Tensor):
        return {"dtype": str(bound.dtype).removeprefix("torch."), "values": bound.tolist()}
    return float(bound)


def _bound(plain: Any) -> float | Tensor:
    if isinstance(plain, Mapping):
        dtype = getattr(torch, plain["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{plain['dtype']} is not a dtype")
        return torch.tensor(plain["values"], dtype=dtype)
    return float(plain)
