"""Location and scale of a site's distribution, for families that have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Beta,
    Dirichlet,
    Distribution,
    Exponential,
    ExpTransform,
    Gamma,
    InverseGamma,
    SigmoidTransform,
    Transform,
    TransformedDistribution,
    constraints,
)
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import ComposeTransform, IndependentTransform

from pyro_maf.infer.models.model import layers_of

__all__ = ["LocationScale", "Scale", "location_and_scale"]

PARAMETERS = {"loc", "scale", "rate", "concentration", "concentration1"}
REAL, POSITIVE, UNIT, SIMPLEX = "real", "positive", "unit_interval", "simplex"
IMAGES = {ExpTransform: POSITIVE, SigmoidTransform: UNIT}
"""Maps from real numbers that are also the maps from unconstrained values to a support."""


class Scale(NamedTuple):
    r"""Elementwise scales, (\*batch), or lower triangular L of covariances L L^T of vectors, (\*batch, n, n).

    Vectors are (\*batch, n), and likewise for elementwise scales.
    """

    tensor: Tensor
    is_matrix: bool = False

    @property
    def diagonal(self) -> Tensor:
        """The elementwise scales, or the diagonal of the matrices."""
        return self.tensor.diagonal(dim1=-2, dim2=-1) if self.is_matrix else self.tensor

    def times(self, vector: Tensor) -> Tensor:
        """L times a vector."""
        return (self.tensor @ vector[..., None])[..., 0] if self.is_matrix else self.tensor * vector

    def transposed_times(self, vector: Tensor) -> Tensor:
        """L^T times a vector."""
        return (self.tensor.mT @ vector[..., None])[..., 0] if self.is_matrix else self.tensor * vector

    def solve(self, vector: Tensor) -> Tensor:
        """L^-1 times a vector."""
        if not self.is_matrix:
            return vector / self.tensor
        return torch.linalg.solve_triangular(self.tensor, vector[..., None], upper=False)[..., 0]

    def transposed_solve(self, vector: Tensor) -> Tensor:
        """L^-T times a vector."""
        if not self.is_matrix:
            return vector / self.tensor
        return torch.linalg.solve_triangular(self.tensor.mT, vector[..., None], upper=True)[..., 0]

    def scaled(self, factor: Tensor) -> Scale:
        """The scale of vectors that are multiplied elementwise by a factor."""
        if not self.is_matrix:
            return Scale(factor.abs() * self.tensor)
        return Scale(factor[..., :, None] * self.tensor * factor.sign()[..., None, :], True)


class LocationScale(NamedTuple):
    """Location and scale of a site's unconstrained values."""

    loc: Tensor
    scale: Scale


def location_and_scale(fn: TorchDistribution) -> LocationScale | None:
    """Return location and scale of a site's unconstrained values; None for other families of distributions.

    The logarithm of a positive variable with a scale has a location. Affine maps of a variable are followed, and so are
    `exp` and the logistic function, if a guide uses them as maps to the support too.
    """
    layers = list(layers_of(fn))
    index = next((index for index, each in enumerate(layers) if each.arg_constraints.keys() & PARAMETERS), None)
    if index is None:
        return None
    prior, where = _of_family(layers[index])
    for transform in _transforms(layers[:index]):
        if isinstance(transform, AffineTransform) and where == REAL and prior is not None:
            factor, loc = torch.broadcast_tensors(torch.as_tensor(transform.scale).to(prior.loc), prior.loc)
            prior = LocationScale(transform.loc + factor * loc, prior.scale.scaled(factor))
        elif type(transform) in IMAGES and where == REAL:
            where = IMAGES[type(transform)]
        else:
            return None
    return prior if where and where == _region(cast("Constraint", fn.support)) else None


def _of_family(family: Distribution) -> tuple[LocationScale | None, str]:
    """Location and scale of a distribution, of the logarithm of a positive one, or of the log-odds of a proportion.

    Also returns its region. The proportions of a Dirichlet are relative to what the preceding ones leave, as in its
    map.
    """
    region = _region(cast("Constraint", family.support))
    loc, scale = (getattr(family, name, None) for name in ("loc", "scale"))
    if loc is not None and "scale_tril" in family.arg_constraints:
        return LocationScale(loc, Scale(cast("Any", family).scale_tril, True)), region
    if loc is not None:
        return (None if scale is None else LocationScale(loc, Scale(scale))), region
    if region == POSITIVE and scale is not None:
        return LocationScale(scale.log(), Scale(torch.ones_like(scale))), region
    if isinstance(family, Exponential):
        return LocationScale(-family.rate.log(), Scale(torch.ones_like(family.rate))), region
    if isinstance(family, (Gamma, InverseGamma)):
        sign = -1 if isinstance(family, InverseGamma) else 1
        shape, rate = family.concentration, family.rate
        return LocationScale(sign * (shape.digamma() - rate.log()), Scale(shape.polygamma(1).sqrt())), region
    if isinstance(family, Beta):
        return _of_log_odds(family.concentration1, family.concentration0), region
    if isinstance(family, Dirichlet):
        shares = family.concentration
        rest = shares.flip(-1).cumsum(-1).flip(-1)[..., 1:]
        loc, scale = _of_log_odds(shares[..., :-1], rest)
        # torch's map takes equal proportions to 0: the first is one against all others.
        others = torch.arange(loc.shape[-1], 0, -1, device=loc.device).to(loc)
        return LocationScale(loc + others.log(), scale), region
    return None, region


def _of_log_odds(one: Tensor, other: Tensor) -> LocationScale:
    """Location and scale of the log-odds of a Beta variable with these concentrations."""
    return LocationScale(one.digamma() - other.digamma(), Scale((one.polygamma(1) + other.polygamma(1)).sqrt()))


def _transforms(layers: Sequence[Distribution]) -> Iterator[Transform]:
    """Iterate over the maps of transformed distributions, from the innermost."""
    for layer in reversed(layers):
        if isinstance(layer, TransformedDistribution):
            for transform in layer.transforms:
                yield from _parts(transform)


def _parts(transform: Transform) -> Iterator[Transform]:
    if isinstance(transform, IndependentTransform):
        yield from _parts(transform.base_transform)
    elif isinstance(transform, ComposeTransform):
        for part in transform.parts:
            yield from _parts(part)
    else:
        yield transform


def _region(support: Constraint) -> str:
    """Name of a support among those of families with a location or scale; "" for another one."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support in (constraints.real, constraints.simplex):
        return REAL if support is constraints.real else SIMPLEX
    bounds = {name: bound for name, bound in vars(support).items() if name.endswith("_bound")}
    if any(isinstance(bound, Tensor) for bound in bounds.values()):
        return ""
    if list(bounds) == ["lower_bound"] and bounds["lower_bound"] == 0:
        return POSITIVE
    return UNIT if bounds == {"lower_bound": 0, "upper_bound": 1} else ""
