"""Exact, periodic densities of angles, followed by a flow of the other columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pyro_maf._core.checks import check_positive, check_sizes
from pyro_maf._core.torch_state import reference_tensor
from pyro_maf.distributions.density import Density, drawn_index
from pyro_maf.nn import MLP
from pyro_maf.transforms import Flow
from pyro_maf.univariate import soft_bound

__all__ = ["AngleFlow"]

BOUND = 8.0
"""Bound on the log-concentration: no component is narrower than about a degree."""
NODES = 512


class AngleFlow(Density):
    r"""Angles a, by autoregressive mixtures of von Mises distributions, and other columns x, by a flow that sees them.

    p(a, x | c) = prod_j [sum_k pi_jk vM(a_j; m_jk, kappa_jk)] p_flow(x | c, cos a, sin a), with the von Mises density
    exp(kappa cos(a - m)) / (2 pi I_0(kappa)). The parameters of a_j come from a network of the context c and of the
    cosines and sines of the preceding angles. The density and all its derivatives are periodic in every angle, and it
    integrates to 1 over a period. At initialisation it is almost uniform in the angles.

    Args:
        flow: The flow, or density, of the other columns, whose context is c followed by the cosines and the sines; None
            if all columns are angles.
        angles: Indices of the columns that are angles, in radians.
        context_dim: Number of context features c, 0 for none.
        num_components: K, the number of components per angle.
        hidden_dims: Widths of the hidden layers of each angle's network.

    Shapes:
        Values are (\*batch, D); angles may be any number, and drawn ones are in [-pi, pi). Log-densities are
        (\*batch,), in nats.

    Cost: the flow's, and a small dense pass per angle. Sampling picks components, so there is no `rsample`.

    Raises:
        ValueError: For indices that are not columns, or a flow whose context has another width.

    Example:
        >>> from pyro_maf import MAF
        >>> density = AngleFlow(MAF(2, num_layers=1, context_dim=2), [0])
        >>> row = torch.tensor([[0.5, 1.0, 2.0]])
        >>> torch.allclose(density.log_prob(row), density.log_prob(row + torch.tensor([2 * torch.pi, 0.0, 0.0])))
        True

    Reference:
        Mardia & Jupp, *Directional Statistics*, 2000, section 3.5.4.
    """

    flow: Flow | Density | None

    def __init__(
        self,
        flow: Flow | Density | None,
        angles: Sequence[int],
        *,
        context_dim: int = 0,
        num_components: int = 8,
        hidden_dims: Sequence[int] = (64,),
    ) -> None:
        columns = len(angles) + (0 if flow is None else flow.input_dim)
        super().__init__(columns, context_dim)
        self.angles = tuple(angles)
        check_sizes(self.name, "hidden_dims", hidden_dims)
        self.num_components = check_positive(self.name, "num_components", num_components)
        if not angles or len(set(angles)) < len(angles) or not all(0 <= index < columns for index in angles):
            raise ValueError(f"{self.name} expected angles as indices of some of {columns} columns, got {angles}.")
        if flow is not None and flow.context_dim != context_dim + 2 * len(angles):
            raise ValueError(
                f"{self.name} expected a flow of context_dim {context_dim + 2 * len(angles)}, the context and cosine "
                f"and sine of each angle, got {flow.context_dim}."
            )
        self.flow = flow
        self.others = [index for index in range(columns) if index not in self.angles]
        self.conditionals = nn.ModuleList(
            MLP(2 * before, hidden_dims if before or context_dim else (), 4 * num_components, context_dim=context_dim)
            for before in range(len(angles))
        )
        turns = 2 * math.pi * torch.arange(num_components) / num_components
        for network in self.conditionals:
            cast(MLP, network).zero_output()
            with torch.no_grad():  # means all around the circle, with equal weights
                bias = cast(nn.Linear, cast(MLP, network).layers[-1]).bias.view(4, num_components)
                bias[1:3] = torch.stack([turns.cos(), turns.sin()])
        like = None if flow is None else reference_tensor(flow)
        if like is not None:
            self.to(like)

    def for_flow(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        r"""Split a value into the other columns, (\*batch, others), and the context of their flow."""
        return value[..., self.others], self._joined(self._seen(value[..., self.angles]), context)

    def fit_statistics(self, y: Tensor, context: Tensor | None = None) -> None:
        r"""Set the flow's data statistics from data `y`, (rows, D)."""
        if self.flow is not None:
            self.flow.fit_statistics(*self.for_flow(y, context))

    def log_density(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Log-density (\*batch,) in nats, unchecked."""
        seen = self._seen(value[..., self.angles])
        total = torch.stack([self._log_prob(j, seen, context) for j in range(len(self.angles))]).sum(0)
        if self.flow is None:
            return total
        x, features = self.for_flow(value, context)
        if isinstance(self.flow, Density):
            return total + self.flow.log_density(x, features)
        u, log_det = cast(Flow, self.flow).inverse_and_log_det(x, features)
        return total - log_det - 0.5 * (u.square() + math.log(2 * math.pi)).sum(-1)

    @torch.no_grad()
    def draw(self, shape: torch.Size, context: Tensor | None = None) -> Tensor:
        r"""Draws (\*shape, D), unchecked and without gradient; angles in [-pi, pi)."""
        like = cast(Tensor, reference_tensor(self))
        rows = like.new_zeros(*shape, self.input_dim)
        if not rows.numel():
            return rows
        for j, column in enumerate(self.angles):
            seen = self._seen(rows[..., self.angles[:j]])
            parameters = self._mixture(j, seen, context)
            log_share, direction = (part.expand(*shape, *part.shape[-2:]) for part in parameters)
            drawn = drawn_index(log_share[..., 0])
            x, y = direction.gather(-2, drawn[..., None, None].expand(*shape, 1, 2))[..., 0, :].unbind(-1)
            rows[..., column] = torch.distributions.VonMises(torch.atan2(y, x), torch.hypot(x, y)).sample()
        if self.flow is not None:
            features = self._joined(self._seen(rows[..., self.angles]), context)
            if isinstance(self.flow, Density):
                rows[..., self.others] = self.flow.draw(shape, features)
            else:
                u = torch.randn(*shape, len(self.others), dtype=like.dtype, device=like.device)
                rows[..., self.others] = cast(Flow, self.flow).forward_and_log_det(u, features)[0]
        return rows

    def noise(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Noise u, (rows, D). For an angle, Phi^-1(F(a)), with the CDF F from -pi computed as a sum of 512 terms."""
        noise = torch.empty_like(y)
        seen = self._seen(y[..., self.angles])
        places = (torch.arange(NODES, dtype=y.dtype, device=y.device) + 0.5) / NODES
        for j, column in enumerate(self.angles):
            turned = torch.remainder(y[:, column] + math.pi, 2 * math.pi)
            nodes = self._seen((turned[:, None] * places - math.pi)[..., None])
            log_share, direction = (part[:, None] for part in self._mixture(j, seen[..., : 2 * j], context))
            below = turned * _log_mixture(log_share, direction, nodes).exp().mean(1)
            noise[:, column] = torch.special.ndtri(below.double().clamp(1e-12, 1 - 1e-12)).to(y)
        if self.flow is not None:
            noise[:, self.others] = self.flow.noise(*self.for_flow(y, context))
        return noise

    def _seen(self, angles: Tensor) -> Tensor:
        r"""Cosine and sine of each angle, (\*batch, 2 angles)."""
        return torch.stack([angles.cos(), angles.sin()], -1).flatten(-2)

    def _joined(self, seen: Tensor, context: Tensor | None) -> Tensor:
        """The context of the flow."""
        if context is None:
            return seen
        shape = torch.broadcast_shapes(context.shape[:-1], seen.shape[:-1])
        return torch.cat([context.expand(*shape, -1), seen.expand(*shape, -1)], -1)

    def _mixture(self, j: int, before: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        r"""Log-weights, (\*batch, K, 1), and concentration times mean direction, (\*batch, K, 2), of angle j."""
        outputs = cast(MLP, self.conditionals[j]).run(before, context)
        share, x, y, size = outputs.unflatten(-1, (4, self.num_components)).unbind(-2)
        direction = torch.stack([x, y], -1)
        length = direction.square().sum(-1, keepdim=True).clamp(min=1e-12).sqrt()
        return share.log_softmax(-1)[..., None], direction / length * soft_bound(size, BOUND).exp()[..., None]

    def _log_prob(self, j: int, seen: Tensor, context: Tensor | None) -> Tensor:
        parameters = self._mixture(j, seen[..., : 2 * j], context)
        return _log_mixture(*parameters, seen[..., 2 * j : 2 * j + 2])


def _log_mixture(log_share: Tensor, direction: Tensor, at: Tensor) -> Tensor:
    r"""Log-density of a mixture of von Mises distributions at unit vectors, (\*batch, 2)."""
    # Keeps the gradient at concentration 0 finite; exact to rounding, since I_0 is even.
    size = (direction.square().sum(-1) + 1e-30).sqrt()
    exponent = (direction * at[..., None, :]).sum(-1) - size
    normaliser = torch.special.i0e(size).log() + math.log(2 * math.pi)
    return (log_share[..., 0] + exponent - normaliser).logsumexp(-1)
