r"""Conditional flows as density estimators for the package sbi: neural posterior and likelihood estimation.

    from sbi.inference import NPE
    import pyro_maf.sbi

    inference = NPE(prior, density_estimator=pyro_maf.sbi.posterior_nn("nsf", support=prior.support))
    inference.append_simulations(theta, x).train()
    posterior = inference.build_posterior()

Needs the extra `sbi`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self, TypeAlias, Unpack

import torch
from torch import Tensor, nn

from pyro_maf import flows
from pyro_maf._core.checks import check_choice
from pyro_maf._core.messages import require
from pyro_maf._core.optimization import WeightAverage
from pyro_maf._core.torch_state import uncounted_changes
from pyro_maf.distributions import ConditionedDensity, Density, FlowPrior
from pyro_maf.distributions.context_net import ContextNet
from pyro_maf.flows import StackOptions
from pyro_maf.nn import compress_tails, default_hidden_dims
from pyro_maf.support import Support, SupportLike
from pyro_maf.tables.moments import Moments, context_moments_of, moments_of
from pyro_maf.transforms import Stack
from pyro_maf.univariate import Spline

require("pyro_maf.sbi", "sbi")

from sbi.neural_nets.estimators import ConditionalDensityEstimator  # noqa: E402

__all__ = ["FlowEstimator", "likelihood_nn", "posterior_nn"]


FLOWS: dict[str, Callable[..., Stack]] = {
    "nsf": flows.NSF,
    "maf": flows.MAF,
    "iaf": flows.IAF,
    "realnvp": flows.RealNVP,
}
MANY = 4
"""Number of variables from which on the summary network has three wide hidden layers, and a spline flow 3 layers
instead of 5: layers of many variables take most of the time of sampling, and the summary network none."""
AVERAGED_STEPS = 100
AVERAGING_ORDER = 8
Builder: TypeAlias = Callable[[Tensor, Tensor], "FlowEstimator"]


class Statistics(nn.Module):
    """The flattened condition, concatenated with summary statistics that one network learns for all layers of a flow.

    Both use the condition with compressed tails: networks are linear far out, so that an observation unlike all
    simulations could get any posterior.
    """

    def __init__(self, entries: int, hidden_dims: Sequence[int]) -> None:
        super().__init__()
        widths = [entries, *hidden_dims]
        layers = [nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False)]
        self.learned = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))

    def forward(self, condition: Tensor) -> Tensor:
        """Features, (rows, entries + the last width)."""
        flat = compress_tails(condition.flatten(1))
        return torch.cat([flat, self.learned(flat)], -1)


class FlowEstimator(ConditionalDensityEstimator):
    r"""The density q(y | c) of a flow, in the units of y, given features of the condition c.

    y = T(loc + scale f(u; h)) for a standard normal u, with loc and scale the mean and standard deviation of y in the
    simulations, T the map to its support, and h the embedding of the standardised condition.

    In eval mode the weights are an average over the last 100 optimizer steps (fewer in a short training), which
    performs better than the weights of any single step. In training mode they are the weights being optimized.

    Args:
        density: The flow in the units of y, whose context is the condition, with a `context_net`.

    Shapes:
        Inputs are (samples, batch, D) or (batch, D), conditions (batch, \*condition_shape) or (samples, batch,
        \*condition_shape), where a batch of 1 broadcasts; log-densities are (samples, batch), in nats; draws
        (\*sample_shape, batch, D).

    Cost:
        The embedding is computed once per condition, not per sample. For a `MAF` or `NSF`, `log_prob` is one parallel
        pass per layer, and `sample` one sequential sweep.

    Example:
        >>> theta = torch.randn(50, 2)
        >>> estimator = posterior_nn("maf", num_layers=1)(theta, theta + 0.1 * torch.randn(50, 2))
        >>> estimator.sample(torch.Size([7]), theta[:3]).shape, estimator.log_prob(theta[:3], theta[:3]).shape
        (torch.Size([7, 3, 2]), torch.Size([1, 3]))
    """

    net: FlowPrior

    def __init__(self, density: FlowPrior) -> None:
        super().__init__(density, density.event_shape, density.context_shape)
        self._average: WeightAverage | None = None
        self._seen = (0, 0)

    @property
    def embedding_net(self) -> nn.Module:
        """The network from standardised conditions to the flow's context."""
        return nn.Identity() if self.net.context_net is None else self.net.context_net.net

    def log_prob(self, input: Tensor, condition: Tensor, **kwargs: object) -> Tensor:
        """Log-density in nats, (samples, batch)."""
        rows, conditions = self._aligned(input, condition)
        if self.training and torch.is_grad_enabled():
            self._average_weights()
        return self.net.log_density(self.net.units.support.off_bounds(rows), conditions)

    def forward(self, *_: object) -> Tensor:
        """Raise an error: trainers of ratio estimators call this, but a density is not a classifier."""
        raise TypeError(
            "FlowEstimator is a density, for sbi's NPE and NLE: trainers of ratios, as NRE, train a classifier."
        )

    def loss(self, input: Tensor, condition: Tensor, **kwargs: object) -> Tensor:
        """Negative log-density of inputs (batch, D), (batch,)."""
        return -self.log_prob(input, condition)[0]

    def sample(self, sample_shape: torch.Size, condition: Tensor, **kwargs: object) -> Tensor:
        r"""Draws (\*sample_shape, batch, D), without gradient."""
        self._check_condition_shape(condition)
        with torch.no_grad():
            flat = self._flat(condition)
            return self.net.draw(torch.Size([*sample_shape, *flat.shape[:-1]]), flat)

    def condition(self, condition: Tensor) -> Density:
        r"""The density at conditions (\*batch, \*condition_shape), as a Pyro distribution for `pyro.sample` in a model.

        Example:
            >>> theta = torch.randn(50, 2)
            >>> likelihood = likelihood_nn("maf", num_layers=1)(theta, theta.exp())
            >>> likelihood.condition(theta[:7]).log_prob(theta[:7].exp()).shape
            torch.Size([7])
        """
        self._check_condition_shape(condition)
        return ConditionedDensity(self.net, condition)

    def inverse_transform(self, input: Tensor, condition: Tensor) -> Tensor:
        r"""Noise u of inputs (\*batch, D) at conditions (\*batch, \*condition_shape), which broadcast."""
        self._check_condition_shape(condition)
        flat = self._flat(condition)
        batch = torch.broadcast_shapes(input.shape[:-1], flat.shape[:-1])
        rows = [each.expand(*batch, -1).flatten(0, -2) for each in (input, flat)]
        return self.net.noise(*rows).reshape(*batch, -1)

    def train(self, mode: bool = True) -> Self:
        """Switch to the weights being optimized or, in eval mode, to their average."""
        if self._average is not None and mode != self.training:
            if not mode:
                self._average_weights()  # the weights after the last step
            if not mode or self._changes()[1] == self._seen[1]:
                self._average.swap()
                self._seen = self._changes()
            else:  # other weights have been loaded since
                self._average = None
        return super().train(mode)

    def _average_weights(self) -> None:
        """Add the current weights to the average, if an optimizer has changed them."""
        changes = self._changes()
        if self._average is None:
            buffers = [buffer for buffer in self.buffers() if buffer.is_floating_point()]  # statistics of batch norms
            tensors = [*self.parameters(), *buffers]
            self._average = WeightAverage(tensors, AVERAGED_STEPS, order=AVERAGING_ORDER, with_initial=True)
        elif changes != self._seen:
            self._average.add()
        self._seen = changes

    def _changes(self) -> tuple[int, int]:
        """Number of changes that torch does not count, to any tensor, and of those that it does, to the weights."""
        return uncounted_changes(), sum(parameter._version for parameter in self.parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._average = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._average = None
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_average": None}

    def _aligned(self, input: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs, (samples, batch, D), and flat conditions that broadcast with them."""
        self._check_condition_shape(condition)
        self._check_input_shape(input)
        rows = input if input.dim() > 2 else input[None]
        flat = self._flat(condition)
        sizes = rows.shape[1], flat.shape[-2]
        if sizes[0] != sizes[1] and 1 not in sizes:
            raise ValueError(
                f"FlowEstimator expected as many inputs as conditions, or one of either, got {sizes[0]} and {sizes[1]} "
                "(sbi's FMPE and NPSE train a vector field, not a density)."
            )
        return rows.expand(-1, max(sizes), -1), flat

    def _flat(self, condition: Tensor) -> Tensor:
        r"""Flatten conditions to contexts of the density, (\*leading, entries)."""
        return condition.flatten(condition.dim() - len(self.condition_shape))


def posterior_nn(
    flow: str | Callable[..., Stack] = "nsf",
    *,
    embedding_net: nn.Module | None = None,
    support: SupportLike = "real",
    **options: Unpack[StackOptions],
) -> Builder:
    r"""Builder of q(theta | x), for `density_estimator=` of sbi's `NPE` trainers.

    theta is standardised column by column. So is x, except that an image or a series of several channels is
    standardised as a whole. Means and scales are robust to outliers, as in `pyro_maf.fit`.

    Args:
        flow: "nsf", "maf", "iaf" or "realnvp"; or a class of stacks, such as `pyro_maf.MAF`.
        embedding_net: From standardised x, (rows, \*x_shape), to features, (rows, C), trained with the flow. By default
            x itself, flattened and with compressed tails, and summary statistics from a network with two hidden layers,
            or three wider ones for four or more variables. It may mask NaN, which are left out of the means and scales.
        support: Support of theta: `prior.support`, which sbi does not pass to an estimator, or as in `FlowPrior`, such
            as ["positive", "unit_interval"]. All draws lie inside it, so that none is rejected.
        options: Options of the flow: `num_layers`, `hidden_dims`, `activation`, `order`, ... By default, an "nsf" of
            four or more variables has 3 layers instead of 5, three quarters of the width, and 5 bins instead of 8.

    Raises:
        ValueError: For an unknown flow. When built, for simulations outside the support, or for NaN or infinite x
            without an `embedding_net`.

    Example:
        >>> theta = torch.randn(50, 2)
        >>> posterior_nn(num_layers=2)(theta, theta.exp()).condition_shape
        torch.Size([2])

    Reference:
        Greenberg, Nonnenmacher & Macke, *Automatic Posterior Transformation for Likelihood-Free Inference*, 2019.
    """
    return _builder("posterior_nn", flow, embedding_net, support, options, is_small=True)


def likelihood_nn(
    flow: str | Callable[..., Stack] = "nsf",
    *,
    embedding_net: nn.Module | None = None,
    support: SupportLike = "real",
    **options: Unpack[StackOptions],
) -> Builder:
    r"""Builder of q(x | theta), for `density_estimator=` of sbi's `NLE` trainers.

    Args:
        flow: As in `posterior_nn`.
        options: As there; with four or more variables an "nsf" has 3 layers, of the usual width and number of bins.
        embedding_net: From standardised theta to features; by default as in `posterior_nn`.
        support: Support of x, as in `FlowPrior`.

    Raises:
        ValueError: As `posterior_nn`. When built, for x that is not a vector.

    Example:
        >>> theta = torch.randn(50, 2)
        >>> likelihood_nn(num_layers=2)(theta, theta.exp()[:, :1]).input_shape
        torch.Size([1])

    Reference:
        Papamakarios, Sterratt & Murray, *Sequential Neural Likelihood*, 2019.
    """
    build = _builder("likelihood_nn", flow, embedding_net, support, options)
    return lambda theta, x: build(x, theta)


def _builder(
    who: str,
    flow: str | Callable[..., Stack],
    embedding_net: nn.Module | None,
    support: SupportLike,
    options: StackOptions,
    is_small: bool = False,
) -> Builder:
    """Builder of the density of its first argument, (rows, D), given the second, in the units of these simulations."""
    make = FLOWS[check_choice(who, "flow", flow, FLOWS)] if isinstance(flow, str) else flow

    def build(values: Tensor, conditions: Tensor, **others: object) -> FlowEstimator:
        if others:
            raise TypeError(
                f"{who} builds flows: NPE_A, which passes {', '.join(others)}, trains a mixture of its own."
            )
        space, values = _space(who, support, values)
        loc, scale = moments_of(space.unconstrain(values)[0].cpu())
        shape = conditions.shape[1:]
        if not shape.numel() or not shape:
            raise ValueError(f"{who} expected a condition in each row, (rows, ...), got {tuple(conditions.shape)}.")
        width, is_many = default_hidden_dims(len(loc))[0], len(loc) >= MANY
        net = embedding_net
        if net is None:
            net = Statistics(shape.numel(), 3 * [2 * width] if is_many else 2 * [width]).to(conditions)
        context = _context_moments(who, conditions, embedding_net)
        embedding = ContextNet(who, net, shape)
        make_stack = make
        if flow == "nsf" and is_many:
            make_stack = partial(make, num_layers=3)
            if is_small:  # the statistics learn most of what a posterior depends on; a likelihood may be sharper
                make_stack = partial(make_stack, hidden_dims=2 * [3 * width // 4], univariate=Spline(num_bins=5))
        density = FlowPrior(
            make_stack(len(loc), context_dim=embedding.features, **options).to(values),
            support=space.name,
            loc=loc.to(values),
            scale=scale.to(values),
            context_loc=context.loc.to(conditions),
            context_scale=context.scale.to(conditions),
            **embedding.arguments,
        )
        return FlowEstimator(density)

    return build


def _context_moments(who: str, conditions: Tensor, embedding_net: nn.Module | None) -> Moments:
    """Moments of conditions; NaN marks missing values, such as trials that an embedding masks."""
    flat = conditions.cpu().flatten(1)
    if embedding_net is None and not (finite := flat.isfinite().all(1)).all():
        raise ValueError(
            f"{who} expected finite conditions, or an embedding_net that masks what is missing, got NaN or infinity in "
            f"row {int(finite.int().argmin())}."
        )
    columns = flat.unbind(1) if conditions.dim() == 2 else (flat.flatten(),)
    entries = [column[column.isfinite()] if column.isfinite().any() else column.new_zeros(1) for column in columns]
    each = [context_moments_of(column[:, None], together=True) for column in entries]
    loc, scale = (torch.cat(parts).expand(flat.shape[1]) for parts in zip(*each, strict=True))
    return Moments(loc, scale)


def _space(who: str, support: SupportLike, values: Tensor) -> tuple[Support, Tensor]:
    """Return the support and all values moved inside it, since a draw from a prior may lie on a bound."""
    if values.dim() != 2:
        raise ValueError(f"{who} expected vectors, (rows, D), to be modelled, got {tuple(values.shape)}.")
    space = Support(who, support, values.shape[1])
    if space.event_size > values.shape[1]:  # a simplex, which has one dimension less than entries
        space = Support(who, support, values.shape[1] - 1)
    inside = space.off_bounds(values)
    if (outside := space.outside(inside)).any():
        row = int(outside.int().argmax())
        raise ValueError(f"{who} expected values inside the support, {space.name!r}, got {values[row].tolist()}.")
    return space, inside
