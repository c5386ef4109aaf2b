"""A mixture of Gaussians and kernels beside a fitted flow, where the validation rows favour it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_maf._core.torch_state import reference_tensor
from pyro_maf.distributions import Density, FlowPrior
from pyro_maf.distributions.mixture_flow import MixtureFlow
from pyro_maf.distributions.steps import dequantised
from pyro_maf.flows import NSF
from pyro_maf.tables import MappedRows, Rows
from pyro_maf.tables.mixture import Mixture
from pyro_maf.training.baselines import SCORED_ROWS, gaussians_of, in_units, like, prior_of, spread
from pyro_maf.training.preparation import Fitted, Prepared
from pyro_maf.training.start import FENCE
from pyro_maf.transforms import Flow

__all__ = ["Joined", "with_mixture"]

WIDTHS, MOST_KERNELS = (0.02, 0.06, 0.2, 0.6), 2**18
"""Widths of kernels, in units of N^(-1 / (D + 4)), and the maximum number of values in the factors of one width."""
SHARE_ITERATIONS, LEAST_SHARE = 100, 0.01
"""Iterations for the weights of a mixture, and the minimum weight of a member."""
NOTICEABLE = 0.02
"""Minimum gain, in nats per row, for which a mixture is added, since it may have a component at each row."""


class Joined(NamedTuple):
    """A fitted flow, or a mixture that contains it.

    Attributes:
        density: The density.
        lines: A message about the mixture beside the flow, if there is one.
        gaussians: The mixture of Gaussians fitted to the training rows in their units, if any.
    """

    density: Fitted
    lines: tuple[str, ...] = ()
    gaussians: Mixture | None = None


def with_mixture(prepared: Prepared) -> Joined:
    """Put a mixture of Gaussians and of kernels at the training rows beside a fitted flow if validation rows favour it.

    This helps where a flow has to learn what these start with: clusters, if there are few rows, and the locations of
    near copies, such as points of trajectories. The weights maximise the likelihood of the validation rows. They are
    accepted if they gain 0.02 nats and by Akaike's criterion for few rows, gain > taken / (rows - taken - 1). No more
    is required, because the same rows chose the flow's epoch, and the mixture can cost at most minus the logarithm of
    the flow's weight.

    Args:
        prepared: The fitted density and its rows.

    Cost: fitting a mixture of Gaussians, unless the flow started at one, and of kernels.
    """
    inner, training = prepared.density.unwrapped, prepared.training
    prior = prior_of(inner)
    flow = _as_mixture_flow(prior.model)
    if flow is None or isinstance(training, MappedRows) or prior.context_dim:
        return Joined(prepared.density)
    held_out = spread(prepared.validation.rows, SCORED_ROWS)
    z, new = (_standardised(rows, prior, prepared.spacing) for rows in (training, held_out))
    if flow is prior.model:  # a flow that started at a mixture
        gaussians = Mixture(*map(Tensor.double, flow.base.mixture))
    else:
        gaussians = gaussians_of(training._replace(data=z))
    mixtures = [gaussians, *_kernels(z, training.weights)]
    with torch.no_grad():
        of_flow = flow.log_density(new.to(like(prior))).cpu().double()
        log_probs = torch.stack([of_flow, *(mixture.log_prob(new) for mixture in mixtures)], 1)
    shares = _shares(log_probs, held_out)
    gain = held_out.mean((shares.log() + log_probs).logsumexp(1) - of_flow)
    if not _is_worth(gain, len(new), int((shares[1:] > 0).sum())):
        return Joined(prepared.density, gaussians=gaussians)
    beside = 1 - float(shares[0])
    whole = flow.put_beside(_combined(mixtures, shares[1:], beside), beside).eval()
    joined = in_units(whole, prior, inner)
    joined.name_columns(inner.layout, inner.context_layout)
    line = (
        f"fit put a mixture beside the flow, with shares of {shares[1]:.2f} for Gaussians and {shares[2:].sum():.2f} "
        f"for kernels at the training rows: the validation rows gain {gain:.3f} nats by it, which happens if rows form "
        "clusters or follow trajectories."
    )
    return Joined(joined, (line,), gaussians)


def _as_mixture_flow(model: Flow | Density) -> MixtureFlow | None:
    """A default model in a form that allows a mixture beside it, or None."""
    if isinstance(model, MixtureFlow):
        return model
    if not isinstance(model, NSF) or model.input_dim == 1 or model.context_dim:
        return None
    around = MixtureFlow(**model.architecture)  # type: ignore[arg-type]
    around.base.to(reference_tensor(model))
    around.flow = model
    return around.eval()


def _standardised(rows: Rows, prior: FlowPrior, spacing: tuple[float, ...]) -> Tensor:
    """Dequantised rows in the units of a fit, in float64 on the CPU."""
    data = dequantised(rows.data, spacing, torch.Generator().manual_seed(0)) if spacing else rows.data
    return prior.standardised(data.to(like(prior).device)).cpu().double().clamp(-FENCE, FENCE)


def _kernels(z: Tensor, weights: Tensor | None) -> list[Mixture]:
    """Mixtures of kernels of several widths at the rows, if there are few rows."""
    rows, dim = z.shape
    if rows * dim**2 > MOST_KERNELS:
        return []
    shares = torch.ones(rows, dtype=torch.float64) if weights is None else weights.double()
    scale = rows ** (-1 / (dim + 4)) * z.std(0, correction=0).clamp(min=1e-12)
    return [Mixture(shares / shares.sum(), z, (width * scale).diag().expand(rows, dim, dim)) for width in WIDTHS]


def _shares(log_probs: Tensor, rows: Rows) -> Tensor:
    """Weights of a mixture's members, the flow first, at the maximum likelihood of rows, from log-densities, (N, M)."""
    members = log_probs.shape[1]
    shares = torch.full((members,), 1 / members, dtype=torch.float64)
    for _ in range(SHARE_ITERATIONS):
        shares = rows.weighted((shares.log() + log_probs).softmax(1).T).mean(1)
        shares = torch.where(shares > LEAST_SHARE, shares, 0)
        shares[0] = max(LEAST_SHARE, float(shares[0]))  # for rows far from all others
        shares = shares / shares.sum()
    return shares


def _is_worth(gain: float, rows: int, members: int) -> bool:
    """Return whether a gain per row pays for a number of members beside the flow."""
    return gain >= NOTICEABLE and gain * max(0, rows - members - 1) > members


def _combined(mixtures: Sequence[Mixture], shares: Tensor, total: float) -> Mixture:
    """The mixture of mixtures with weights of this sum, without those of weight 0."""
    parts = [
        Mixture(mixture.shares * share / total, mixture.means, mixture.factors)
        for mixture, share in zip(mixtures, shares, strict=True)
        if share
    ]
    return Mixture(*map(torch.cat, zip(*parts, strict=True)))
