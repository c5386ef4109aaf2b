r"""Autoregressive layers: the univariate map of each dimension depends on the dimensions before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from torch import Tensor

from pyro_maf.nn import MADE, MADEOptions
from pyro_maf.nn.made import default_rank
from pyro_maf.sweep import Step, parallel, run, solve
from pyro_maf.transforms.base import LayerOptions, UnivariateFlow
from pyro_maf.transforms.conditional import ConditionalForm
from pyro_maf.univariate import UnivariateMap

__all__ = [
    "AutoregressiveOptions",
    "ConditionalInverseAutoregressive",
    "ConditionalMaskedAutoregressive",
    "InverseAutoregressive",
    "MaskedAutoregressive",
]


class AutoregressiveOptions(LayerOptions, MADEOptions, total=False):
    """Options of an autoregressive layer, except for its order and univariate map."""


class _Autoregressive(UnivariateFlow):
    """Base of MAF and IAF layers: a MADE outputs the parameters of each dimension's univariate map."""

    is_by_row = True
    network_class = MADE

    def __init__(
        self,
        input_dim: int,
        *,
        context_dim: int = 0,
        order: Sequence[int] | Tensor | None = None,
        univariate: str | UnivariateMap = "affine",
        **network: Unpack[MADEOptions],
    ) -> None:
        super().__init__(input_dim, context_dim, univariate)
        outputs = self.univariate.num_parameters
        self.made = MADE(input_dim, outputs_per_input=outputs, context_dim=context_dim, order=order, **network)
        if (rank := default_rank(input_dim, outputs, self.made.hidden_dims)) is not None:
            self.made.set_rank(rank)
        self.made.zero_output()

    @property
    def order(self) -> Tensor:
        """Indices of the dimensions, first to last."""
        return self.made.order

    def program_steps(self, inverse: bool) -> tuple[Step]:
        """Either direction, as a step of a compiled program."""
        made: MADE = self._modules["made"]  # type: ignore[assignment]  # the fastest access, at every call
        order: Tensor = made._buffers["order"]  # type: ignore[assignment]
        return (Step((made,), self.univariate, inverse, order, order, sequential=inverse != (self.fast == "inverse")),)

    def _through_map(self, v: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        (step,) = steps = self.program_steps(inverse)
        compiled = run(self._programs, inverse, steps, self.input_dim, v, context)
        if compiled is not None:
            return compiled
        return (solve if step.sequential else parallel)(step, v, context)


class MaskedAutoregressive(_Autoregressive):
    r"""A MAF layer: y_i = f(x_i; phi_i(y_<i)), so log |det dy/dx| = sum_i log f'(x_i).

    By default f is affine: y_i = x_i exp(alpha_i(y_<i)) + mu_i(y_<i). "< i" refers to the layer's `order`. A single
    MADE outputs all phi_i. Starts as the identity.

    Args:
        input_dim: D.
        hidden_dims: Widths of the hidden layers, by default two by `pyro_maf.nn.default_hidden_dims`.
        context_dim: Number of context features, 0 for none; with one, use `ConditionalMaskedAutoregressive`.
        activation: A name from `pyro_maf.nn.ACTIVATIONS`.
        order: Indices of the dimensions, first to last; by default 0 .. D - 1.
        univariate: f, the map of each dimension: "affine", "spline" or a map of `pyro_maf.univariate`.
        degrees: Degrees of the hidden units, "sequential" or "random".
        seed: Seed of random degrees.

    Shapes:
        x and y are (\*batch, D), log-determinants (\*batch,) in nats.

    Cost:
        y to x (the density of data): one dense pass. x to y (sampling): one sequential sweep, about half the
        multiplications of a dense pass; its gradient costs as much again.

    Raises:
        ValueError: For non-positive sizes, unknown names, an order that is not a permutation, inputs of the wrong
            width.
        TypeError: For inputs whose dtype differs from that of the parameters.

    Example:
        >>> layer = MaskedAutoregressive(3, hidden_dims=[16])
        >>> y = torch.randn(5, 3)
        >>> x = layer.inv(y)
        >>> layer.log_abs_det_jacobian(x, y).shape
        torch.Size([5])

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017.
    """

    fast = "inverse"


class InverseAutoregressive(_Autoregressive):
    r"""An IAF layer: y_i = f(x_i; phi_i(x_<i)), so log |det dy/dx| = sum_i log f'(x_i).

    By default f is affine: y_i = x_i exp(alpha_i(x_<i)) + mu_i(x_<i). "< i" refers to the layer's `order`. A single
    MADE outputs all phi_i. Starts as the identity.

    Args:
        input_dim, hidden_dims, context_dim, activation, order, univariate, degrees, seed: As in `MaskedAutoregressive`,
            as are shapes and errors.

    Cost:
        x to y (sampling, and the density of its own samples): one dense pass. y to x (the density of other points): one
        sequential sweep, about half the multiplications of a dense pass; its gradient costs as much again.

    Example:
        >>> layer = InverseAutoregressive(3, hidden_dims=[16])
        >>> x = torch.randn(5, 3)
        >>> layer.log_abs_det_jacobian(x, layer(x)).shape
        torch.Size([5])

    Reference:
        Kingma et al., *Improving Variational Inference with Inverse Autoregressive Flow*, 2016.
    """

    fast = "forward"


class ConditionalMaskedAutoregressive(ConditionalForm):
    r"""A `MaskedAutoregressive` whose network sees a context: `condition(context)` is a flow.

    Args:
        input_dim: D.
        context_dim: Number of context features, at least 1; a context of another width raises.
        hidden_dims, activation, order, univariate, degrees, seed: As in `MaskedAutoregressive`.

    Shapes:
        context is (\*batch or (), context_dim) and broadcasts with x and y, (\*batch, D).

    Cost: as `MaskedAutoregressive`; the context adds one product per hidden layer.

    Example:
        >>> layer = ConditionalMaskedAutoregressive(3, 2, hidden_dims=[16])
        >>> layer.condition(torch.zeros(5, 2)).inv(torch.zeros(3)).shape
        torch.Size([5, 3])
    """

    flow_class = MaskedAutoregressive


class ConditionalInverseAutoregressive(ConditionalForm):
    """An `InverseAutoregressive` whose network sees a context: as `ConditionalMaskedAutoregressive`.

    Args:
        input_dim, context_dim, hidden_dims, activation, order, univariate, degrees, seed: As there.

    Example:
        >>> layer = ConditionalInverseAutoregressive(3, 2, hidden_dims=[16])
        >>> layer.condition(torch.zeros(5, 2))(torch.zeros(3)).shape
        torch.Size([5, 3])
    """

    flow_class = InverseAutoregressive
