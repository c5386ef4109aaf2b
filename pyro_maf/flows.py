r"""Stacks of layers: MAF, IAF, RealNVP and neural spline flows, each with a conditional form.

Layers run from noise to data: `flow[0]` acts on the noise, `flow[-1]` outputs the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import TypeAlias, Unpack, cast

import torch
from torch import Tensor

from pyro_maf._core.checks import check_permutation, check_positive, check_seed
from pyro_maf.nn import reseeded
from pyro_maf.transforms import (
    BatchNorm,
    ConditionalForm,
    Coupling,
    Flow,
    InverseAutoregressive,
    LowerTriangularAffine,
    MaskedAutoregressive,
    Stack,
)
from pyro_maf.transforms.autoregressive import AutoregressiveOptions
from pyro_maf.transforms.coupling import CouplingOptions
from pyro_maf.univariate import Affine, UnivariateMap

__all__ = ["IAF", "MAF", "NSF", "ConditionalIAF", "ConditionalMAF", "ConditionalNSF", "ConditionalRealNVP", "RealNVP"]

Orders: TypeAlias = str | Sequence[int] | Sequence[Sequence[int]] | Tensor
"""Orders of the variables in the layers of a stack: "reverse", "random", one permutation, or one for each layer."""


class StackOptions(AutoregressiveOptions, total=False):
    """Options of a stack of autoregressive layers, except for the univariate map."""

    num_layers: int
    order: Orders
    batch_norm: bool
    linear: bool


def _orders(
    who: str, input_dim: int, num_layers: int, order: Orders, seed: int, *, flips: bool = True
) -> Iterator[Tensor]:
    """Order of the variables in each layer, noise to data; without `flips`, "reverse" is natural in every layer."""
    check_positive(who, "input_dim", input_dim)
    check_positive(who, "num_layers", num_layers)
    check_seed(who, seed)
    natural = torch.arange(input_dim)
    expected = f'{who} expected order "reverse", "random", or permutations, got {order!r}.'
    if isinstance(order, str):
        if order == "reverse":
            # The layer next to the data has the natural order, as in the paper.
            flipped = natural.flip(0) if flips else natural
            return (flipped if (num_layers - 1 - layer) % 2 else natural for layer in range(num_layers))
        if order == "random":
            generator = torch.Generator().manual_seed(seed)
            return (torch.randperm(input_dim, generator=generator) for _ in range(num_layers))
        raise ValueError(expected)
    try:
        permutations = torch.as_tensor(order)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(expected) from None
    if permutations.dim() not in (1, 2):
        raise ValueError(expected)
    if permutations.dim() == 1:
        return repeat(check_permutation(who, "order", permutations, input_dim), num_layers)
    if len(permutations) != num_layers:
        raise ValueError(f"{who} expected one order for each of {num_layers} layers, got {len(permutations)}.")
    return (check_permutation(who, "every order", permutation, input_dim) for permutation in permutations)


def _with_batch_norm(layers: Sequence[Flow], batch_norm: bool) -> list[Flow]:
    """Put a batch norm on the noise side of each layer: after it, seen from the data."""
    if not batch_norm:
        return list(layers)
    return [member for layer in layers for member in (BatchNorm(layer.input_dim), layer)]


class _AutoregressiveStack(Stack):
    layer_class: type[MaskedAutoregressive] | type[InverseAutoregressive]

    def __init__(
        self,
        input_dim: int,
        *,
        num_layers: int = 5,
        order: Orders = "reverse",
        batch_norm: bool = False,
        linear: bool = False,
        univariate: str | UnivariateMap = "affine",
        **layer: Unpack[AutoregressiveOptions],
    ) -> None:
        seed = layer.get("seed", 0)
        orders = _orders(type(self).__name__, input_dim, num_layers, order, seed)
        layers = [
            self.layer_class(input_dim, order=layer_order, univariate=univariate, **reseeded(layer, seed + index))
            for index, layer_order in enumerate(orders)
        ]
        members = _with_batch_norm(layers, batch_norm)
        added: list[Flow] = []
        if linear:
            added.append(LowerTriangularAffine(input_dim))
            if context_dim := layer.get("context_dim", 0):
                added.append(self.layer_class(input_dim, hidden_dims=(), context_dim=context_dim))
        middle = num_layers // 2 * (1 + batch_norm)
        members[middle:middle] = added
        super().__init__(members)
        self._linear = slice(middle, middle + len(added))

    @property
    def linear(self) -> list[Flow]:
        """The linear layers, if any: a `LowerTriangularAffine` and, with a context, a layer without hidden units."""
        return list(self)[self._linear]

    @torch.no_grad()
    def become_linear(self, loc: Tensor, scale_tril: Tensor, slopes: Tensor) -> None:
        """Set the linear layers to y = loc + scale_tril x + slopes c, with slopes (D, C); C may be 0."""
        of_columns, *of_context = self.linear
        cast(LowerTriangularAffine, of_columns).become(loc, scale_tril)
        for layer in of_context if slopes.numel() else ():
            last = cast(MaskedAutoregressive, layer).made.context_layers[-1]
            cast(Tensor, last.weight)[:: Affine.num_parameters].copy_(slopes)


class MAF(_AutoregressiveStack):
    r"""Masked autoregressive flow: `num_layers` layers of `MaskedAutoregressive`.

    Each maps y_i = f(x_i; phi_i(y_<i)) in its own order of the variables, f affine by default: y_i = x_i
    exp(alpha_i(y_<i)) + mu_i(y_<i). Starts as the identity.

    Args:
        input_dim: D.
        num_layers: Number of autoregressive layers.
        hidden_dims: Widths of each network's hidden layers, by default two by `pyro_maf.nn.default_hidden_dims`.
        activation: A name from `pyro_maf.nn.ACTIVATIONS`.
        order: "reverse", which is natural in the layer next to the data and flips from layer to layer; "random"; one
            permutation for all layers; or one permutation per layer, noise to data.
        batch_norm: Put a `BatchNorm` after every layer, as seen from the data.
        linear: Put a `LowerTriangularAffine` in the middle and, with a context, a layer without hidden units. `fit`
            initialises them to the regression of each column on the context and the preceding columns, so that the
            layers on the noise side need not learn linear dependence, and the layers on the data side see the raw
            columns.
        context_dim: Number of context features; 0 for none. With a context, use `ConditionalMAF`.
        univariate: f, the map of each dimension: "affine", "spline" or a map of `pyro_maf.univariate`.
        degrees: Degrees of the hidden units, "sequential" or "random".
        seed: Seed of random orders and degrees. Weights are drawn from torch's global generator.

    Shapes:
        x and y are (\*batch, D), log-determinants (\*batch,) in nats.

    Cost:
        `flow.inv(y)` and the density of data: one dense pass per layer. `flow(x)` and sampling: one sequential sweep
        per layer, which takes about half the multiplications of a dense pass.

    Raises:
        ValueError: For non-positive sizes, unknown names, orders that are not permutations, inputs of the wrong width.
        TypeError: For inputs whose dtype differs from that of the parameters.

    Example:
        >>> import pyro.distributions as dist
        >>> flow = MAF(5, num_layers=2, hidden_dims=[32, 32])
        >>> base = dist.Normal(torch.zeros(5), torch.ones(5)).to_event(1)
        >>> dist.TransformedDistribution(base, [flow]).log_prob(torch.zeros(7, 5)).shape
        torch.Size([7])

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017.
    """

    layer_class = MaskedAutoregressive


class NSF(MAF):
    r"""Autoregressive neural spline flow: a `MAF` whose univariate map is a monotone rational-quadratic spline.

    Starts as the identity. With D = 1 it is a spline with learned knots.

    Args:
        univariate: A `pyro_maf.univariate.Spline`, by default with 8 bins.
        input_dim, num_layers, hidden_dims, activation, order, batch_norm, linear, context_dim, degrees, seed: As in
            `MAF`, as are shapes and errors.

    Cost: as `MAF`, with 25 network outputs per dimension instead of 2. If the last layer would have more than 200,000
    weights, it has 8 outputs per dimension, and the 25 are linear functions of them.

    Example:
        >>> from pyro_maf.univariate import Spline
        >>> flow = NSF(5, num_layers=2, hidden_dims=[32, 32], univariate=Spline(num_bins=16))
        >>> flow.inv(torch.zeros(7, 5)).shape
        torch.Size([7, 5])

    Reference:
        Durkan et al., *Neural Spline Flows*, 2019.
    """

    stack_class = MAF

    def __init__(
        self, input_dim: int, *, univariate: str | UnivariateMap = "spline", **stack: Unpack[StackOptions]
    ) -> None:
        super().__init__(input_dim, univariate=univariate, **stack)


class IAF(_AutoregressiveStack):
    r"""Inverse autoregressive flow: `num_layers` layers of `InverseAutoregressive`.

    Each maps y_i = f(x_i; phi_i(x_<i)) in its own order of the variables, f affine by default: y_i = x_i
    exp(alpha_i(x_<i)) + mu_i(x_<i). Starts as the identity.

    Args:
        input_dim, num_layers, hidden_dims, activation, order, batch_norm, linear, context_dim: As in `MAF`.
        univariate, degrees, seed: As in `MAF`, as are shapes and errors.

    Cost:
        `flow(x)`, sampling and the density of its own samples: one dense pass per layer. `flow.inv(y)` and the density
        of other points: one sequential sweep per layer, about half the multiplications of a dense pass.

    Example:
        >>> flow = IAF(5, num_layers=2, hidden_dims=[32, 32])
        >>> y = flow(torch.randn(7, 5))
        >>> flow.fast, y.shape
        ('forward', torch.Size([7, 5]))

    Reference:
        Kingma et al., *Improving Variational Inference with Inverse Autoregressive Flow*, 2016.
    """

    layer_class = InverseAutoregressive


class RealNVP(Stack):
    r"""RealNVP: `num_layers` layers of `Coupling`, with masks that alternate between even and odd dimensions.

    Starts as the identity.

    Args:
        order: As in `MAF`, but "reverse" is the natural order in every layer. In the layer next to the data, the even
            places of its order pass through and the odd ones are transformed; the next layer swaps them, and so on.
        networks: "joint", or, as in the paper, "separate" networks for mu and alpha; see `Coupling`.
        input_dim, num_layers, hidden_dims, activation, batch_norm, context_dim, univariate, seed: As in `MAF`, as are
            shapes and errors.

    Cost: one dense pass per layer in either direction.

    Example:
        >>> flow = RealNVP(5, num_layers=2, hidden_dims=[32, 32])
        >>> [layer.mask.int().tolist() for layer in flow]
        [[0, 1, 0, 1, 0], [1, 0, 1, 0, 1]]

    Reference:
        Dinh, Sohl-Dickstein & Bengio, *Density Estimation Using Real NVP*, 2017.
    """

    layer_class = Coupling

    def __init__(
        self,
        input_dim: int,
        *,
        num_layers: int = 5,
        order: Orders = "reverse",
        batch_norm: bool = False,
        seed: int = 0,
        **layer: Unpack[CouplingOptions],
    ) -> None:
        masks = _alternating_masks(type(self).__name__, input_dim, num_layers, order, seed)
        layers = [Coupling(input_dim, mask=mask, **layer) for mask in masks]
        super().__init__(_with_batch_norm(layers, batch_norm))


def _alternating_masks(who: str, input_dim: int, num_layers: int, order: Orders, seed: int) -> Iterator[Tensor]:
    """Masks, true where a dimension passes through: alternately at the even and odd places of the order."""
    return (
        (layer_order.argsort() % 2 == (num_layers - 1 - layer) % 2) & (input_dim > 1)
        for layer, layer_order in enumerate(_orders(who, input_dim, num_layers, order, seed, flips=False))
    )


class ConditionalMAF(ConditionalForm):
    r"""A `MAF` whose networks see a context: `condition(context)` is a flow.

    Args:
        input_dim: D.
        context_dim: Number of context features, at least 1; a context of another width raises.
        num_layers, hidden_dims, activation, order, batch_norm, linear, univariate, degrees, seed: As in `MAF`.

    Shapes:
        context is (\*batch or (), context_dim) and broadcasts with x and y, (\*batch, D).

    Cost: as `MAF`; the terms of the context are computed once per layer.

    Example:
        >>> flow = ConditionalMAF(5, 2, num_layers=2, hidden_dims=[32, 32])
        >>> flow.condition(torch.zeros(7, 2)).inv(torch.zeros(7, 5)).shape
        torch.Size([7, 5])

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017, section 3.4.
    """

    flow_class = MAF


class ConditionalNSF(ConditionalForm):
    """An `NSF` whose networks see a context: `condition(context)` is a flow.

    Args:
        input_dim, context_dim: As in `ConditionalMAF`.
        num_layers, hidden_dims, activation, order, batch_norm, linear, univariate, degrees, seed: As in `NSF`.

    Example:
        >>> flow = ConditionalNSF(1, 2, num_layers=3)
        >>> flow.condition(torch.zeros(2))(torch.zeros(4, 1)).shape
        torch.Size([4, 1])
    """

    flow_class = NSF


class ConditionalIAF(ConditionalForm):
    """An `IAF` whose networks see a context: `condition(context)` is a flow.

    Args:
        input_dim, context_dim: As in `ConditionalMAF`.
        num_layers, hidden_dims, activation, order, batch_norm, linear, univariate, degrees, seed: As in `IAF`.

    Example:
        >>> flow = ConditionalIAF(5, 2, num_layers=2, hidden_dims=[32, 32])
        >>> flow.condition(torch.zeros(7, 2))(torch.zeros(7, 5)).shape
        torch.Size([7, 5])
    """

    flow_class = IAF


class ConditionalRealNVP(ConditionalForm):
    """A `RealNVP` whose networks see a context: `condition(context)` is a flow.

    Args:
        input_dim, context_dim: As in `ConditionalMAF`.
        num_layers, hidden_dims, activation, order, batch_norm, univariate, networks, seed: As in `RealNVP`.

    Example:
        >>> flow = ConditionalRealNVP(5, 2, num_layers=2, hidden_dims=[32, 32])
        >>> flow.condition(torch.zeros(2)).inv(torch.zeros(5)).shape
        torch.Size([5])
    """

    flow_class = RealNVP
