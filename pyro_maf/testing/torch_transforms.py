"""Laws of torch and Pyro transforms that are not a `Flow`: between any spaces, with or without parameters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to

from pyro_maf.testing.comparison import BrokenLawError, close, name_of
from pyro_maf.testing.subjects import points
from pyro_maf.transforms import Flow

__all__ = [
    "BetweenReals",
    "can_be_copied",
    "default_dtype",
    "has_a_pseudoinverse",
    "inverts_its_output",
    "maps_domain_to_codomain",
    "remembers_nothing_wrong",
]

SHAKE = 0.3
"""Standard deviation of the noise added to each parameter, over the square root of a unit's number of inputs."""


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Context manager that sets torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class BetweenReals(Flow):
    """The map w = back(t(free(z))) between real vectors, for a transform t and torch's bijections free and back.

    It makes laws of flows applicable to transforms between other spaces. Its parameters differ from their initial
    values, which may hide errors, as a scale of 1 does.
    """

    fast = "forward"

    def __init__(self, transform: Transform, input_dim: int) -> None:
        free, back = biject_to(transform.domain), biject_to(transform.codomain)
        shape = torch.Size([input_dim] * max(1, free.domain.event_dim))
        super().__init__(shape.numel())
        self.transform: Any = transform
        self.free, self.back, self.shape = free, back, shape
        self.register_buffer("zero", torch.zeros(()))
        self.to(torch.get_default_dtype()).eval()
        with torch.no_grad():
            for parameter in self.parameters():
                fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
                parameter.add_(SHAKE * torch.randn_like(parameter) / max(1, fan_in) ** 0.5)

    @property
    def name(self) -> str:
        """Name of the transform's class."""
        return type(self.transform).__name__

    def inputs(self, *batch: int) -> Tensor:
        """Random inputs of the transform."""
        return self.free(points(self, *batch).reshape(*batch, *self.shape))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return w for z, and log |det dw/dz|."""
        z = x.reshape(*x.shape[:-1], *self.shape)
        inner = self.free(z).clone()  # a cache would mistake a tensor with changed values for that of its last call
        outer = self.transform(inner)
        w = self.back.inv(outer)
        return w.reshape(x.shape), self._log_det(z, inner, outer, w, x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return z for w, and log |det dw/dz|."""
        shape = self.back.inverse_shape(self.transform.forward_shape(self.free.forward_shape(self.shape)))
        w = y.reshape(*y.shape[:-1], *shape)
        outer = self.back(w).clone()
        inner = self.transform.inv(outer)
        z = self.free.inv(inner)
        return z.reshape(y.shape), self._log_det(z, inner, outer, w, y.shape[:-1])

    def _log_det(self, z: Tensor, inner: Tensor, outer: Tensor, w: Tensor, batch: torch.Size) -> Tensor:
        of_transform = self.transform.log_abs_det_jacobian(inner, outer)
        parts = (
            self.free.log_abs_det_jacobian(z, inner),
            of_transform.expand(inner.shape[: inner.dim() - self.transform.domain.event_dim]),
            -self.back.log_abs_det_jacobian(w, outer),
        )
        totals = [part.reshape(*batch, -1).sum(-1) for part in parts]
        return totals[0] + totals[1] + totals[2]


def maps_domain_to_codomain(between: BetweenReals) -> None:
    """Outputs lie in the codomain and have the shapes and dtypes that torch expects, for batches of any shape."""
    law, who, t = "maps batches of its domain to its codomain", name_of(between), between.transform
    if t.bijective and type(t).log_abs_det_jacobian is Transform.log_abs_det_jacobian:
        raise BrokenLawError(who, law, "it is bijective and has no log_abs_det_jacobian")
    for batch in ((), (4,), (2, 3)):
        x = between.inputs(*batch)
        y = t(x)
        if y.shape != t.forward_shape(x.shape):
            raise BrokenLawError(
                who, law, f"x of {tuple(x.shape)} gives y of {tuple(y.shape)}, not {tuple(t.forward_shape(x.shape))}"
            )
        if not bool(t.codomain.check(y).all()):
            raise BrokenLawError(who, law, f"y = {y.tolist()} is not in {t.codomain}, at x = {x.tolist()}")
        log_det = t.log_abs_det_jacobian(x, y) if t.bijective else x.sum(tuple(range(-t.domain.event_dim, 0)))
        wanted = x.shape[: x.dim() - t.domain.event_dim]
        ends = zip(reversed(log_det.shape), reversed(wanted), strict=False)
        if log_det.dim() > len(wanted) or any(size not in (1, whole) for size, whole in ends):
            raise BrokenLawError(
                who,
                law,
                f"for x of {tuple(x.shape)} and a domain of event_dim {t.domain.event_dim} "
                f"log_abs_det_jacobian is of {tuple(log_det.shape)}, not {tuple(wanted)}",
            )
        if {y.dtype, log_det.dtype} != {x.dtype}:
            raise BrokenLawError(who, law, f"y and log_abs_det_jacobian are {y.dtype} and {log_det.dtype}, x {x.dtype}")
        if batch:
            rows = [t(row.clone()) for row in x.flatten(0, len(batch) - 1)]
            close(law, between, y.flatten(0, len(batch) - 1), torch.stack(rows), 1e-5, x.flatten(0, len(batch) - 1))


def remembers_nothing_wrong(between: BetweenReals) -> None:
    """Results equal those of an unused copy, whatever the transform was called with before."""
    law, t, unused = "remembers nothing that is wrong", between.transform, copy.deepcopy(between.transform)
    x, other = between.inputs(4), between.inputs(4)
    t(x)
    y = t(other)
    close(law, between, y, unused(other.clone()), 1e-5, other)
    y = t(x)
    t(other)
    if t.bijective:
        close(law, between, t.log_abs_det_jacobian(x, y), unused.log_abs_det_jacobian(x, unused(x)), 1e-5, x)


def can_be_copied(between: BetweenReals) -> None:
    """Copies and pickles are the same map."""
    x = between.inputs(5)
    y = between.transform(x.clone())
    for way, twin in {"deepcopy": copy.deepcopy, "pickle": lambda t: pickle.loads(pickle.dumps(t))}.items():
        close(f"can be copied, by {way}", between, twin(between.transform)(x), y, 0.0, x)


def has_a_pseudoinverse(between: BetweenReals) -> None:
    """For a transform that is not bijective, t(t.inv(y)) is y for y = t(x)."""
    t, x = between.transform, between.inputs(5)
    y = t(x)
    close("has a pseudoinverse", between, t(t.inv(y.clone())), y, 1e-4, x)


def inverts_its_output(between: BetweenReals) -> bool:
    """The inverse of an output is the input; return whether there is an inverse of other tensors too."""
    t, x = between.transform, between.inputs(5)
    y = t(x)
    close("inverts its last output", between, t.inv(y), x, 1e-4, x)
    try:
        t.inv(y.clone())
    except (NotImplementedError, KeyError):
        return False
    return True
