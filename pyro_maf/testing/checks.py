"""The check of a transform: the laws of flows, or those of other torch and Pyro transforms."""

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
"""Tolerance for other transforms, in float64: some of Pyro's add 1e-8 to denominators."""


def check_transform(
    make: Callable[[int], FlowOrForm | Transform],
    *,
    dimensions: Sequence[int] = (1, 2, 5),
    seed: int = 0,
    identity: bool = True,
) -> None:
    r"""Check a transform of your own against the laws that all transforms of this package, or of torch, obey.

    In float64, and in float32 where noted: the transform inverts, even 50 standard deviations out; its log-determinant
    is that of the Jacobian; densities integrate to 1; gradients and second derivatives match finite differences;
    nothing is stale after a change; it trains in any loop, accepts any batch, runs in every mode, and can be copied,
    pickled and saved. A gradient counts as wrong only if it is wrong at two inputs, since a difference may straddle a
    kink. For more than 2,000 parameters, it is compared in one random direction instead of one by one.

    A torch or Pyro transform that is not a `Flow` may have any domain and codomain. In float64 and float32, outputs
    must lie in the codomain and have the shapes, log-determinants and dtypes that torch expects, and results must not
    depend on earlier calls. In float64, the transform must invert, and its derivatives and log-determinant must match
    autograd; torch's bijections map its domain and codomain to real vectors for this. If it has no general inverse,
    like Pyro's `Planar`, the inverse of its last output is tested. The laws about staleness and training apply only to
    a `Flow`, since torch's cache does not notice changes of weights.

    Args:
        make: Function of D that builds the transform or conditional form, for events with D entries, or with D in each
            dimension. Its class must be importable, for copies.
        dimensions: The values of D to test; the integral needs one of at most 2.
        seed: Seed of random parameters and inputs; the global generator is unchanged.
        identity: Whether a flow is the identity with its initial parameters, as layers should be.

    Raises:
        BrokenLawError: For the first law that is broken: by how much, and at which input.
        TypeError: For a transform instead of a function that builds one, or for a conditional one of Pyro.

    Cost: seconds.

    Example:
        >>> from pyro_maf.transforms import ActNorm, Flow
        >>> check_transform(ActNorm, dimensions=[2])

        A log-determinant that was forgotten:

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
    with torch.no_grad():  # a cache with a graph cannot be copied
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
