"""The check of a transform: the laws of flows, or those of other transforms of torch and Pyro."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn
from torch.distributions import Transform

from pyro_maf._core.torch_state import seeded
from pyro_maf.testing import torch_transforms as other_laws
from pyro_maf.testing import transforms as laws
from pyro_maf.testing.comparison import name_of
from pyro_maf.testing.subjects import FlowOrForm, at_context, points, shaken
from pyro_maf.testing.torch_transforms import BetweenReals, default_dtype
from pyro_maf.transforms import ConditionalFlow, Flow

__all__ = ["check_transform"]

TOLERANCE = 1e-6
"""Of transforms of others, in float64: some of Pyro add 1e-8 to what they divide by."""


def check_transform(
    make: Callable[[int], FlowOrForm | Transform],
    *,
    dimensions: Sequence[int] = (1, 2, 5),
    seed: int = 0,
    identity: bool = True,
) -> None:
    r"""Hold a transform of your own to the laws that every transform of this package keeps, or every one of torch.

    In float64, and in float32 where it says so: it inverts, also 50 standard deviations out; its log-determinant is
    that of the Jacobian; densities integrate to 1; gradients and second derivatives are those of differences; nothing
    is stale after a change; it trains in any loop, takes any batch, runs in every mode, can be copied, pickled, saved.
    Gradients count as wrong only where they are so at two inputs, since a difference may straddle a kink; those of more
    than 2,000 parameters are compared in one random direction instead of one by one.

    A transform of torch or Pyro that is no `Flow` may have any domain and codomain. In float64 and in float32 outputs
    lie in the codomain and have the shapes, log-determinants and dtypes that torch expects, and results do not depend
    on earlier calls; in float64 it inverts and has the derivatives and the log-determinant that autograd has, between
    real vectors, which bijections of torch map to its domain and codomain. Of one without an inverse, such as Pyro's
    `Planar`, that of the last output is tested. The laws of staleness and training are those of a `Flow` alone: the
    cache of torch does not know when weights change.

    Args:
        make: Function of D that builds the transform or conditional form, for events of D entries, or of D in each
            dimension. Its class must be importable, for copies.
        dimensions: The D to test; one of them at most 2 for the integral.
        seed: Of parameters and inputs, which are drawn at random; the global generator is left alone.
        identity: Whether a flow is the identity with its initial parameters, as layers should be.

    Raises:
        BrokenLawError: For the first law that is broken: by how much, and at which input.
        TypeError: For a transform in place of a function that builds one, and for a conditional one of Pyro.

    Cost: seconds.

    Example:
        >>> from pyro_maf.transforms import ActNorm, Flow
        >>> check_transform(ActNorm, dimensions=[2])

        A log-determinant that is forgotten:

        >>> class Twice(Flow):
        ...     def forward_and_log_det(self, x, context=None):
        ...         return 2 * x, x.new_zeros(x.shape[:-1])
        ...     def inverse_and_log_det(self, y, context=None):
        ...         return y / 2, y.new_zeros(y.shape[:-1])
        >>> check_transform(Twice, identity=False)
        Traceback (most recent call last):
            ...
        pyro_maf.testing.comparison.BrokenLawError: Twice(1) breaks the law "has the log-determinant of its Jacobian":
        got 0, expected 0.6931, off by 0.409, allowed are 1e-09, at the input -0.7699.
    """
    if isinstance(make, (nn.Module, Transform)):
        kind = type(make).__name__
        raise TypeError(
            f"check_transform expected a function that builds a transform of D dimensions, got {name_of(make)}: "
            f"pass the class {kind}, or lambda d: {kind}(d, ...)."
        )
    for input_dim in dimensions:
        with seeded(seed):
            transform = make(input_dim)
            if isinstance(transform, (Flow, ConditionalFlow)):
                _check_flow(cast("Callable[[int], FlowOrForm]", make), input_dim, identity)
            elif isinstance(transform, Transform):
                for dtype in (torch.float64, torch.float32):
                    with default_dtype(dtype):
                        _check_other(BetweenReals(cast("Callable[[int], Transform]", make)(input_dim), input_dim))
            else:
                raise TypeError(
                    "check_transform expected make to build a transform of torch, Pyro or pyro_maf, got "
                    f"{type(transform).__name__}: condition a conditional one, lambda d: Kind(...).condition(context)."
                )


def _check_flow(make: Callable[[int], FlowOrForm], input_dim: int, identity: bool) -> None:
    def built(gain: float = 1.0) -> FlowOrForm:
        flow = make(input_dim).double().eval()
        return shaken(flow, gain) if gain else flow

    if identity:
        laws.starts_as_the_identity(at_context(built(0.0)))
    for scale in (1.0, 50.0):
        laws.inverts(at_context(built(), 20), scale)
        laws.inverts(at_context(built(0.5).float(), 20), scale)
    for batch in ((), (0,), (2, 3)):
        laws.takes_any_batch(at_context(built()), *batch)
    laws.is_triangular(at_context(built()))
    for flow in (at_context(built()), at_context(built()).inv):
        laws.has_the_log_det_of_its_jacobian(flow)
    if (flow := at_context(built(0.3))).input_dim <= 2:
        laws.integrates_to_one(flow)
    for inverted in (False, True):
        laws.has_derivatives(at_context(built(0.5), 2), inverted)
    for step in laws.STEPS:
        laws.is_never_stale(at_context(built(), 5), step)
    laws.keeps_no_tensor_alive(at_context(built(), 5))
    for law in (laws.trains_on_one_batch, laws.scores_its_own_draws, laws.gives_two_losses_of_one_draw):
        law(at_context(built(), 8))
    laws.runs_in_every_mode(at_context(built(0.5).float(), 8))
    laws.can_be_copied(built(), built())
    laws.broadcasts_its_context(built())
    laws.can_be_vectorised(at_context(built()))


def _check_other(between: BetweenReals) -> None:
    with torch.no_grad():  # a cache with a graph has no copy
        other_laws.maps_domain_to_codomain(between)
        other_laws.remembers_nothing_wrong(between)
        other_laws.can_be_copied(between)
        if not between.transform.bijective:
            other_laws.has_a_pseudoinverse(between)
            return
        if has_inverse := other_laws.inverts_its_output(between):
            laws.inverts(between, tolerance=TOLERANCE)
        if points(between).dtype == torch.float32:
            return
        laws.has_the_log_det_of_its_jacobian(between, TOLERANCE)
    for inverted in (False, True)[: 1 + has_inverse]:
        laws.has_derivatives(between, inverted)
