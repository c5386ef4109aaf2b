"""Autoregressive categorical distributions over several columns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_maf._core.checks import check_positive, check_sizes
from pyro_maf.distributions.density import Density, drawn_index
from pyro_maf.nn.made import MLP

__all__ = ["AutoregressiveCategorical"]


class AutoregressiveCategorical(Density):
    r"""Probabilities of categories, p(k) = prod_j softmax(logits_j(k_<j, context))[k_j], with one network per column.

    Each network sees the preceding columns one-hot, through a hidden layer and through a linear skip connection; the
    first column's network sees only the context. At initialisation all categories are equally likely. `start_at` sets
    the probabilities to frequencies in some rows: of each column given its most informative predecessor.

    Args:
        num_categories: Number of categories of each column, at least 1.
        hidden_dims: Widths of the hidden layers of each network.
        activation: A name from `pyro_maf.nn.ACTIVATIONS`.
        context_dim: Number of context features, 0 for none.

    Shapes:
        Values are indices 0 .. K_j - 1 as floating-point numbers, (\*batch, columns). Log-probabilities are (\*batch,),
        in nats, and -inf for values that are not categories.

    Cost: a small dense pass per column, for `log_prob` and for `sample`.

    Raises:
        ValueError: For numbers of categories or widths that are not positive.

    Example:
        >>> colours = AutoregressiveCategorical([3, 2])
        >>> colours.log_prob(torch.tensor([[2.0, 1.0], [3.0, 0.0]])).exp()
        tensor([0.1667, 0.0000], grad_fn=<ExpBackward0>)

    Reference:
        Germain et al., *MADE: Masked Autoencoder for Distribution Estimation*, 2015.
    """

    def __init__(
        self,
        num_categories: Sequence[int],
        *,
        hidden_dims: Sequence[int] = (32,),
        activation: str = "relu",
        context_dim: int = 0,
    ) -> None:
        super().__init__(max(1, len(num_categories)), context_dim)
        self.num_categories = check_sizes(self.name, "num_categories", num_categories)
        check_positive(self.name, "number of columns", len(self.num_categories))
        before = [0, *itertools.accumulate(self.num_categories)]
        self.conditionals = nn.ModuleList(
            MLP(seen, hidden_dims if seen + context_dim else (), count, context_dim=context_dim, activation=activation)
            for seen, count in zip(before, self.num_categories, strict=False)
        )
        for network in self.conditionals:
            cast(MLP, network).zero_output()
        self.direct = nn.ParameterList(
            torch.zeros(count, seen) for seen, count in zip(before, self.num_categories, strict=False)
        )

    @property
    def width(self) -> int:
        """Total number of one-hot features."""
        return sum(self.num_categories)

    @property
    def support(self) -> constraints.Constraint:
        """Indices of categories, from 0 in each column."""
        most = self.value_like.new_tensor(self.num_categories) - 1  # type: ignore[union-attr]
        return constraints.independent(constraints.integer_interval(0, most), 1)

    def start_at(self, value: Tensor, weights: Tensor | None = None) -> None:
        """Set the probabilities of each column to frequencies in rows, given one preceding column or none.

        The column to condition on is the one with the largest mutual information, provided that the Bayesian
        information criterion justifies its parameters. Frequencies have half a pseudo-count per category, so that none
        is impossible; conditional ones also have one pseudo-row distributed like the column's marginal.

        Args:
            value: The rows, (rows, columns).
            weights: Weight of each row, (rows,); by default 1.

        Reference:
            Chow & Liu, *Approximating Discrete Probability Distributions with Dependence Trees*, 1968.
        """
        columns, before = value.long().unbind(-1), [0, *itertools.accumulate(self.num_categories)]
        for number, count in enumerate(self.num_categories):
            counts = torch.bincount(columns[number], weights, minlength=count).double() + 0.5
            share = counts / counts.sum()
            best, gain = None, 0.0
            for other, others in enumerate(self.num_categories[:number]):
                pairs = torch.bincount(columns[other] * count + columns[number], weights, minlength=others * count)
                table = pairs.double().view(others, count)
                given = ((table + share) / (table.sum(1, keepdim=True) + 1)).log() - share.log()
                worth = float((table * given).sum()) - 0.5 * (others - 1) * (count - 1) * math.log(len(value))
                if worth > gain:
                    best, gain = (other, given), worth
            with torch.no_grad():
                cast(nn.Linear, cast(MLP, self.conditionals[number]).layers[-1]).bias.copy_(share.log())
                self.direct[number].zero_()
                if best is not None:
                    first = before[best[0]]
                    self.direct[number][:, first : first + len(best[1])] = best[1].T.to(self.direct[number])

    def one_hot(self, value: Tensor) -> Tensor:
        r"""Encode all categories one-hot, (\*batch, width), in the density's dtype; out-of-range values are clamped."""
        index = value.long().unbind(-1)
        parts = [
            F.one_hot(column.clamp(0, count - 1), count)
            for column, count in zip(index, self.num_categories, strict=True)
        ]
        return torch.cat(parts, -1).to(self.value_like)

    def log_density(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Log-probability (\*batch,) in nats, unchecked."""
        seen, total = self.one_hot(value), value.new_zeros(())
        outside = (value != value.round()).any(-1)
        before = 0
        for number, count in enumerate(self.num_categories):
            logits = self._logits(number, seen[..., :before], context)
            index = value[..., number].long()
            outside = outside | (index < 0) | (index >= count)
            index = index.clamp(0, count - 1).expand(logits.shape[:-1])
            total = total + logits.log_softmax(-1).gather(-1, index[..., None])[..., 0]
            before += count
        return torch.where(outside, -torch.inf, total)

    def draw(self, shape: torch.Size, context: Tensor | None = None) -> Tensor:
        r"""Draws (\*shape, columns), unchecked and without gradient."""
        like = cast(Tensor, self.value_like)
        seen, drawn = like.new_zeros(*shape, 0), []
        with torch.no_grad():
            for number, count in enumerate(self.num_categories):
                logits = self._logits(number, seen, context).expand(*shape, count)
                index = drawn_index(logits)
                seen = torch.cat([seen, F.one_hot(index, count).to(like)], -1)
                drawn.append(index.to(like))
        return torch.stack(drawn, -1)

    def _logits(self, number: int, seen: Tensor, context: Tensor | None) -> Tensor:
        return cast(MLP, self.conditionals[number]).run(seen, context) + seen @ self.direct[number].T
