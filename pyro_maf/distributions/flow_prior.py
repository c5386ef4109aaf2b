"""A flow, or another density, in the units of the data it was fitted to and on their support."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.distributions.constraints import Constraint, real_vector

from pyro_maf._core.torch_state import reference_tensor
from pyro_maf.constrained import ANGLE
from pyro_maf.distributions.context_net import ContextNet
from pyro_maf.distributions.data_units import (
    DataUnits,
    NoiseToData,
    keep_float64,
    statistics,
    tail_weights,
    widen_for,
)
from pyro_maf.distributions.density import ConditionalDensity, Density
from pyro_maf.distributions.named_density import Entries, Labels, NamedDensity
from pyro_maf.support import Support, SupportLike
from pyro_maf.sweep import Descent, OneThread, Run
from pyro_maf.tables.layout import Layout
from pyro_maf.transforms import ConditionalFlow, Flow, Stack
from pyro_maf.transforms.cache import caching_is_possible
from pyro_maf.transforms.conditional import Conditional

__all__ = ["ConditionalFlowPrior", "FlowPrior"]

CONTEXT_UNITS = ("context_loc", "context_scale")


class FlowPrior(NamedDensity):
    r"""Density of y = T(loc + scale t(z)), where z follows the model, t sets the tails and T maps to the support.

    For a flow, z = flow(u) with u standard normal, and with w = loc + scale t(z),
    log p(y) = log N(u; 0, I) - log |det dz/du| - log |det dt/dz| - sum_i log scale_i - log |det dT/dw|. For a density,
    z ~ model. T is elementwise the identity, exp or the logistic function, or stick-breaking for the simplex; t is the
    identity, or the map of `Tails` with fixed weights.
    `pyro_maf.fit_prior` fits such a prior to draws or data.

    Args:
        model: A `Flow` or a `Density`. For one with `context_dim` > 0 use `ConditionalFlowPrior`.
        support: "real", "positive", "unit_interval", "ordered" or "simplex"; a pair of bounds such as (18, None); the
            corresponding constraint of torch; or a sequence of these, without "simplex", one per column; or a
            dictionary by column name, or by number if `columns` has no names, in which columns left out are real. The
            density is 0, and the log-density -inf, outside the support and on its boundary. A simplex has D + 1
            entries, and its density is that of the first D.
        loc: Shift of each dimension, (D,), in units of w; by default 0. Like the next four, a buffer: not trained.
        scale: Positive scale of each dimension, (D,); by default 1. Both are converted to the model's dtype, unless
            they are float64 and float32 does not resolve a thousandth of the scale, as for 5.4e6 +- 0.1. In that case
            values y are float64, and z is rounded to the model's dtype. `dtype` is the dtype of y.
        tails: Weights of the right and left tails, (2, D), as in `pyro_maf.transforms.Tails`: inverse degrees of
            freedom of Student's t, where 0 leaves z unchanged. By default all are 0.
        context_loc: Shift, (context_dim,), subtracted from the context before the model; by default 0.
        context_scale: Positive scale, (context_dim,), by which the context is then divided; by default 1. The dtype of
            a context, `context_dtype`, follows the same rule as `dtype`.
        context_net: A trainable network from contexts in these units, (rows, \*context_shape), to the model's context,
            (rows, model.context_dim), with the model's dtype and device. If the model takes more features than the
            network outputs, a flat context has further entries at its end, which bypass the network. A saved file holds
            only the network's weights: `load(path, context_net=...)`. By default None.
        context_shape: Shape of one context of `context_net`, such as (1, 28, 28).
        columns: Names of a value's columns or sites, in order, each with its shape, () for a number; set by `fit` to
            the columns of a data frame or the sites of a posterior. By default none.
        context_columns: Likewise for the context.
        context_labels: For each of `context_columns`, the categories of a data frame's column, which is one-hot in the
            context, or None for numbers.

    Shapes:
        Values are (\*batch, D), or (\*batch, D + 1) for a simplex; log-densities are (\*batch,), in nats.
        `log_prob` also takes the forms of data that `fit` takes, (rows, D): arrays, lists, other dtypes if exact, and
        data frames and dictionaries of draws, with columns matched by name.

    Cost:
        The model's, plus a few elementwise operations for the support. `log_prob` is `flow.inv`: one dense pass per
        layer for a MAF or RealNVP; one sweep per layer for an IAF, except for the last draws of its `rsample`, whose
        density is cached. Sampling is `flow(u)`: one sweep per layer for a MAF, one dense pass per layer for an IAF or
        RealNVP.

    Raises:
        TypeError: If the model is neither a flow nor a density, or a statistic is not a tensor.
        ValueError: For statistics of the wrong shape or infinite ones, scales that are not positive, context statistics
            for a model without context, an unknown support, or a model that has a support already.

    Example:
        >>> import pyro
        >>> from pyro_maf import MAF
        >>> prior = FlowPrior(MAF(3, num_layers=2), loc=torch.tensor([1.0, 2.0, 3.0]), scale=torch.full((3,), 0.1))
        >>> with pyro.plate("rows", 5):
        ...     z = pyro.sample("z", prior)
        >>> z.shape, prior.log_prob(z).shape
        (torch.Size([5, 3]), torch.Size([5]))
        >>> rates = FlowPrior(MAF(2, num_layers=1), support=["positive", "unit_interval"])
        >>> rates.log_prob(torch.tensor([[1.0, 0.5], [-1.0, 0.5]])).isfinite()
        tensor([ True, False])

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017.
    """

    context_loc: Tensor
    context_scale: Tensor
    noise_to_data: NoiseToData
    _supplied = ("context_net",)

    def __init__(
        self,
        model: Flow | Density,
        *,
        support: SupportLike = "real",
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        tails: Tensor | None = None,
        context_loc: Tensor | None = None,
        context_scale: Tensor | None = None,
        context_net: nn.Module | None = None,
        context_shape: Sequence[int] = (),
        columns: Entries = (),
        context_columns: Entries = (),
        context_labels: Labels = (),
    ) -> None:
        _check_model(self.name, model)
        if not model.context_dim and (context_loc is not None or context_scale is not None):
            raise ValueError(f"{self.name} got context_loc or context_scale for a model that takes no context.")
        if isinstance(support, Mapping):
            support = Layout.named(columns).spread(self.name, "support", support, "real", model.input_dim)
        target = Support(self.name, support, model.input_dim)
        _check_angles(self.name, target, model)
        net = None if context_net is None else ContextNet(self.name, context_net, context_shape)
        context_dim = model.context_dim if net is None else net.context_dim_of(self.name, model)
        super().__init__(model.input_dim, context_dim, model.batch_shape, target.event_size)
        self.name_columns(Layout.named(columns), Layout.named(context_columns, context_labels)._replace(one_hot=True))
        like = reference_tensor(model)
        if like is None:  # a model that only permutes has a device, but no dtype
            like = torch.zeros((), device=getattr(reference_tensor(model, floating=False), "device", None))
        self.model: Flow | Density = model
        of_data = statistics(self.name, "", (loc, scale), model.input_dim, like, target)
        self.units = DataUnits(*of_data, target, like, tail_weights(self.name, tails, model.input_dim))
        of_context = statistics(self.name, "context_", (context_loc, context_scale), context_dim, like)
        for name, value in zip(CONTEXT_UNITS, of_context, strict=True):
            self.register_buffer(name, value)
        self.context_net: ContextNet | None = None if net is None else net.to(like)
        self.has_rsample = isinstance(model, Flow) or model.has_rsample
        if isinstance(model, Flow):
            # A single map from noise to data, so that its cache holds the last draws. It bypasses nn.Module, which
            # would register it as a submodule although its layers are registered already.
            object.__setattr__(self, "noise_to_data", NoiseToData([model, self.units]))

    @property
    def architecture(self) -> dict[str, object]:
        """Constructor arguments, with support and columns by name, as JSON values."""
        by_name = {"support": self.units.support.name, **self.names_of_columns}
        return {**{name: value for name, value in self._arguments.items() if name not in by_name}, **by_name}

    def unpack(self, value: Tensor) -> dict[str, Tensor]:
        r"""Split a value, (\*batch, D), into named columns or, for a prior fitted to draws, sites, (\*batch, ...).

        Raises:
            ValueError: If the columns have no names.

        Example:
            >>> from pyro_maf import MAF
            >>> prior = FlowPrior(MAF(3), columns=[("mu", ()), ("b", (2,))])
            >>> {site: tuple(value.shape) for site, value in prior.unpack(prior.sample((7,))).items()}
            {'mu': (7,), 'b': (7, 2)}
        """
        if not self.layout.names:
            raise ValueError(
                f"{self.name} has no names for the columns of a value: fit it to a data frame or a dictionary of "
                "draws, or build it with columns=."
            )
        return self.layout.entries(self.as_value(value, None))

    @property
    def support(self) -> Constraint:
        """Constraint of the values, with event_dim 1; the density is 0 elsewhere."""
        return self.units.support.constraint

    @property
    def support_name(self) -> str:
        """The support in words, for messages."""
        return str(self.units.support.name)

    def outside(self, value: Tensor) -> Tensor:
        r"""Return whether each value is outside the support, (\*batch,)."""
        return self.units.support.outside(value)

    @property
    def loc(self) -> Tensor:
        """Shift of each dimension, (D,)."""
        return self.units.loc

    @property
    def scale(self) -> Tensor:
        """Scale of each dimension, (D,)."""
        return self.units.scale

    @property
    def tails(self) -> Tensor | None:
        """Weights of the right and left tails, (2, D), or None."""
        return self.units.tails

    def standardised(self, y: Tensor) -> Tensor:
        r"""Standardised values z, (\*batch, D), in the model's dtype, for values y inside the support."""
        return self.units.inverse_and_log_det(y)[0]

    def standardised_context(self, context: Tensor) -> Tensor:
        r"""Standardised context, (\*batch, context_dim), in the model's dtype."""
        return ((context - self.context_loc) / self.context_scale).to(self.units.inner.dtype)

    def features(self, context: Tensor) -> Tensor:
        r"""Features of the context that the model takes, (\*batch, model.context_dim)."""
        standard = self.standardised_context(context)
        return standard if self.context_net is None else self.context_net(standard)

    @property
    def context_shape(self) -> torch.Size:
        """Shape of one context."""
        net = self.context_net
        return super().context_shape if net is None or net.size < self.context_dim else net.shape

    @property
    def embedding(self) -> dict[str, Any]:
        """Arguments for a prior that shares the `context_net`; {} without one."""
        return {} if self.context_net is None else self.context_net.arguments

    def fit_statistics(self, y: Tensor, context: Tensor | None = None) -> None:
        r"""Set data statistics of the model and `context_net` from data `y`, (rows, D), in the data's units."""
        y = self.as_value(y, self.value_like, "y")
        with torch.no_grad():
            if self.context_net is not None and context is not None:
                self.context_net.fit_statistics(self.standardised_context(context))
            self.model.fit_statistics(self.standardised(y), self._features(context))

    def log_density(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Log-density (\*batch,) in nats, unchecked."""
        units: DataUnits = self._modules["units"]  # type: ignore[assignment]  # the fastest access, at each call
        support = units.support
        if support.name == "real":
            return self._log_density_inside(value, context)
        outside = support.outside(value)
        # The cache recognises the last draws by identity; a copy of them would have to be inverted.
        if not caching_is_possible() or torch._C._is_tracing() or outside.any():
            value = support.inside(value, outside)
        return torch.where(outside, -torch.inf, self._log_density_inside(value, context))

    def _log_density_inside(self, value: Tensor, context: Tensor | None) -> Tensor:
        context = self._features(context)
        model: Flow | Density = self._modules["model"]  # type: ignore[assignment]  # as in `log_density`
        units: DataUnits = self._modules["units"]  # type: ignore[assignment]
        if not isinstance(model, Flow):  # quick to check, unlike a class of Pyro's distributions
            z, log_det = units.inverse_and_log_det(value)
            return model.log_density(z, context) - log_det
        u = self.noise_to_data.cached_input(value) if context is None else None
        if u is not None and model.fast == "forward":
            log_det = self.noise_to_data.log_abs_det_jacobian(u, value)
        else:
            if (run := self.run()) is not None and (scaled := units.scaled(value)) is not None:
                z, log_volume = scaled
                density = run.log_density(z, context, -self._log_normaliser - log_volume)
                if density is not None:
                    return density
            z, log_units = units.inverse_and_log_det(value)
            u, log_det = self.noise_to_data[0].inverse_and_log_det(z, context)
            log_det = log_det + log_units
        return torch.rsub(torch.add(log_det, u.square().sum(-1), alpha=0.5), -self._log_normaliser)

    def run(self) -> Run | None:
        """The compiled program from standardised values to noise, if one covers the whole flow."""
        model = self._modules["model"]  # the fastest access, at every call
        return model.run(inverse=True) if isinstance(model, Stack) else None

    @torch.no_grad()
    def differentiate(self, descent: Descent, value: Tensor, context: Tensor | None, factors: Tensor) -> float | None:
        """Weighted sum of log-densities, computed without a graph; its gradient stays in `descent`.

        Args:
            descent: The `Descent` of `run()`.
            value: Rows (rows, D) inside the support.
            context: Context of the rows, if the model takes one.
            factors: Weights of the log-densities, (rows,).

        Returns:
            The sum, or None if torch has to compute and differentiate it.
        """
        units, constant, context = self.units, -self._log_normaliser, self._features(context)
        if (scaled := units.scaled(value)) is not None:
            (z, log_volume), of_units = scaled, 0.0
            constant -= log_volume
        else:
            with OneThread():
                z, log_units = units.inverse_and_log_det(value)
                of_units = float((factors * log_units).sum())
        total = descent.differentiate(z, context, constant, factors)
        return None if total is None else total - of_units

    @property
    def _log_normaliser(self) -> float:
        return 0.5 * self.input_dim * math.log(2 * math.pi)

    def draw(self, shape: torch.Size, context: Tensor | None = None) -> Tensor:
        r"""Draws (\*shape, D), unchecked."""
        context = self._features(context)
        if isinstance(self.model, Density):
            return self.units.forward_and_log_det(self.model.draw(shape, context))[0]
        inner = self.units.inner
        u = torch.randn(*shape, self.input_dim, dtype=inner.dtype, device=inner.device)
        return self.noise_to_data(u) if context is None else self.noise_to_data.forward_and_log_det(u, context)[0]

    def noise(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Noise u, (rows, D), that the model maps to the standardised y, in any form that `log_prob` takes.

        Example:
            >>> from pyro_maf import MAF
            >>> prior = FlowPrior(MAF(2), loc=torch.tensor([5.0, 5.0]))
            >>> prior.noise(torch.tensor([[5.0, 6.0]])).shape
            torch.Size([1, 2])
        """
        y = self.as_value(y, self.value_like, "y")
        return self.model.noise(self.standardised(y), self._features(context))

    def _features(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else self.features(context)

    @property
    def value_like(self) -> Tensor:
        """Tensor with the dtype and device of values."""
        return self._modules["units"]._buffers["loc"]  # type: ignore[union-attr,return-value]  # the fastest access

    @property
    def context_like(self) -> Tensor:
        """Tensor with the dtype and device of contexts."""
        return self.context_loc

    def is_rounded(self, like: Tensor) -> bool:
        """Return whether the dtype of `like` is the model's, rather than a finer one."""
        return like.dtype == self.units.inner.dtype

    def check_precise(self, role: str, value: object) -> None:
        """Raise if a value was already rounded to a dtype that does not resolve the columns."""
        self.units.check_precise(self.name, role, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.context_loc, self.context_scale
        if isinstance(self.model, Flow):
            self.noise_to_data.clear_cache()  # not a submodule, so nothing else would reach it
        super()._apply(fn, recurse)
        keep_float64(self._buffers, CONTEXT_UNITS, before, None)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        widen_for(self._buffers, CONTEXT_UNITS, state_dict, prefix, None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        name = self.units.support.name
        on = "" if name == "real" else f" on {name if isinstance(name, str) else ', '.join(name)}"
        return f"{self.name}{on} of {self.model!r}"


class ConditionalFlowPrior(ConditionalDensity):
    r"""A `FlowPrior` of a model that takes a context: `condition(context)` is a density.

    Args:
        model: A flow or density with `context_dim` > 0, or a `ConditionalFlow` or `ConditionalDensity`.
        support, loc, scale, tails, columns: As in `FlowPrior`.
        context_loc, context_scale, context_net, context_shape, context_columns, context_labels: As there.

    Shapes:
        context is (\*batch or (), context_dim), or with a `context_net` (\*batch or (), \*context_shape), in the units
        of the context data. It broadcasts with values, (\*batch, D), or (\*batch, D + 1) for a simplex.

    Cost: as `FlowPrior`, but `log_prob` of an IAF takes a sweep per layer even for its own draws.

    Raises:
        TypeError: As in `FlowPrior`.
        ValueError: As in `FlowPrior`, and for a model that takes no context.

    Example:
        >>> from pyro_maf import ConditionalMAF
        >>> prior = ConditionalFlowPrior(ConditionalMAF(3, 2), context_scale=torch.tensor([10.0, 0.1]))
        >>> prior.condition(torch.zeros(7, 2)).sample().shape
        torch.Size([7, 3])
    """

    density_class: ClassVar[Callable[..., FlowPrior]] = FlowPrior
    density: FlowPrior
    _supplied = FlowPrior._supplied

    def __init__(self, model: Flow | Density | ConditionalFlow | ConditionalDensity, **density: object) -> None:
        inner = getattr(model, "unwrapped", model)
        _check_model(type(self).__name__, inner)
        super().__init__(self.density_class(inner, **density))

    @property
    def unwrapped(self) -> FlowPrior:
        """The wrapped prior, which takes the context as an argument."""
        return self.density

    @property
    def architecture(self) -> dict[str, object]:
        """As `FlowPrior.architecture`, with the model that this form was built from."""
        return {**self.density.architecture, "model": self._arguments["model"]}

    def name_columns(self, layout: Layout, context_layout: Layout) -> None:
        """As `FlowPrior.name_columns`."""
        self.density.name_columns(layout, context_layout)

    def unpack(self, value: Tensor) -> dict[str, Tensor]:
        r"""Split a value, (\*batch, D), by the names of its columns, like `FlowPrior.unpack`."""
        return self.density.unpack(value)


def _check_angles(who: str, support: Support, model: Flow | Density) -> None:
    """Raise for columns of angles whose density would not be periodic."""
    if set(support.angles) - set(model.angles if isinstance(model, Density) else ()):
        raise ValueError(
            f"{who} expected an AngleFlow, whose density is periodic, of columns {list(support.angles)} on {ANGLE}, "
            f"got {type(model).__name__}: build one around the flow of the other columns, or leave it to pyro_maf.fit."
        )


def _check_model(who: str, model: object) -> None:
    if isinstance(model, Conditional):
        raise TypeError(
            f"{who} expected a flow or a density, got {type(model).__name__}, which needs a context: "
            "use ConditionalFlowPrior."
        )
    if not isinstance(model, (Flow, Density)):
        raise TypeError(f"{who} expected a flow or a density, got {type(model).__name__}.")
    if isinstance(model, Density) and model.support is not real_vector:
        raise ValueError(
            f"{who} expected a model of real vectors, got {model.name} with support {model.support}: "
            f"give {who} that support, and the model none."
        )
