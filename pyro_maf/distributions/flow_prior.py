"""A flow, or another density, in the units of the data it was fitted to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_maf.checks import check_event
from pyro_maf.distributions.base import ConditionalDensity, Density
from pyro_maf.precision import like_of
from pyro_maf.transforms import ConditionalFlow, Flow, Stack

__all__ = ["ConditionalFlowPrior", "FlowPrior"]


class FlowPrior(Density):
    r"""Density of y = loc + scale z, where z is what the model describes.

    For a flow, z = flow(u) with u standard normal:
    log p(y) = log N(u; 0, I) - log |det dz/du| - sum_i log scale_i. For a density, z ~ model.

    Args:
        model: A `Flow` or a `Density`. For one with `context_dim` > 0 use `ConditionalFlowPrior`.
        loc: Shift of each dimension, (D,); by default 0. A buffer, as are the next three: not trained.
        scale: Positive scale of each dimension, (D,); by default 1.
        context_loc: Shift, (context_dim,), that is taken from the context before the model sees it; by default 0.
        context_scale: Positive scale, (context_dim,), that the context is then divided by; by default 1.

    Shapes:
        Values are (\*batch, D), log-densities (\*batch,) in nats.

    Cost:
        That of the model. `log_prob` is `flow.inv`: one dense pass a layer for a MAF or RealNVP; one sweep a layer for
        an IAF, except for the draws that its `rsample` gave last, whose density is at hand. Drawing is `flow(u)`: one
        sweep a layer for a MAF, one dense pass a layer for an IAF or RealNVP.

    Raises:
        TypeError: If the model is neither flow nor density, or a statistic is no tensor.
        ValueError: For statistics of the wrong shape, infinite ones, scales that are not positive, or context
            statistics for a model without context.

    Example:
        >>> import pyro
        >>> from pyro_maf import MAF
        >>> prior = FlowPrior(MAF(3, num_layers=2), loc=torch.tensor([1.0, 2.0, 3.0]), scale=torch.full((3,), 0.1))
        >>> with pyro.plate("rows", 5):
        ...     z = pyro.sample("z", prior)
        >>> z.shape, prior.log_prob(z).shape
        (torch.Size([5, 3]), torch.Size([5]))

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017.
    """

    context_loc: Tensor
    context_scale: Tensor
    _flow: Stack

    def __init__(
        self,
        model: Flow | Density,
        *,
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        context_loc: Tensor | None = None,
        context_scale: Tensor | None = None,
    ) -> None:
        _check_model(self.name, model)
        if not model.context_dim and (context_loc is not None or context_scale is not None):
            raise ValueError(f"{self.name} got context_loc or context_scale for a model that takes no context.")
        super().__init__(model.input_dim, model.context_dim, _batch_shape(model))
        like = like_of(model)
        like = torch.zeros(()) if like is None else like
        self.model: Flow | Density = model
        self.units = _Units(
            _statistic(self.name, "loc", loc, model.input_dim, like),
            _statistic(self.name, "scale", scale, model.input_dim, like),
        )
        for name, value in (("context_loc", context_loc), ("context_scale", context_scale)):
            self.register_buffer(name, _statistic(self.name, name, value, model.context_dim, like))
        self.has_rsample = isinstance(model, Flow) or model.has_rsample
        if isinstance(model, Flow):
            # One map from noise to the data's units, so that its cache knows what was drawn. Not registered as a
            # submodule: its layers are already.
            self.__dict__["_flow"] = Stack([model, self.units])

    @property
    def loc(self) -> Tensor:
        """Shift of each dimension, (D,)."""
        return self.units.loc

    @property
    def scale(self) -> Tensor:
        """Scale of each dimension, (D,)."""
        return self.units.scale

    def fit_statistics(self, y: Tensor, context: Tensor | None = None) -> None:
        r"""Set the statistics that the model keeps from data `y`, (rows, D), in the data's own units."""
        y = check_event(self.name, "y", y, self.input_dim, "input_dim", like_of(self))
        with torch.no_grad():
            self.model.fit_statistics(self.units._pull(y)[0], self._standardised(context))

    def _log_prob(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        context = self._standardised(context)
        model, units = self.model, self.units
        if not isinstance(model, Flow):
            z, log_scale = units._pull(value)
            return model._log_prob(z, context) - log_scale
        if context is None and model.fast == "forward":
            u = self._flow._inv_call(value)
            log_det = self._flow.log_abs_det_jacobian(u, value)
            return torch.add(log_det, u.square().sum(-1), alpha=0.5).neg() - self._log_normaliser
        scale = units.scale
        u, log_det = model._pull((value - units.loc) / scale, context)  # type: ignore[operator]
        highest = torch.rsub(scale.log().sum(), -self._log_normaliser)
        return highest - torch.add(log_det, u.square().sum(-1), alpha=0.5)

    @property
    def _log_normaliser(self) -> float:
        return 0.5 * self.input_dim * math.log(2 * math.pi)

    def _sample(self, shape: torch.Size, context: Tensor | None = None) -> Tensor:
        context = self._standardised(context)
        if isinstance(self.model, Density):
            return self.units._push(self.model._sample(shape, context))[0]
        u = torch.randn(*shape, self.input_dim, dtype=self.loc.dtype, device=self.loc.device)
        return self._flow(u) if context is None else self._flow._push(u, context)[0]

    def _standardised(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else (context - self.context_loc) / self.context_scale

    def __repr__(self) -> str:
        return f"{self.name} of {self.model!r}"


class ConditionalFlowPrior(ConditionalDensity):
    r"""A `FlowPrior` of a model that takes a context: `condition(context)` is a density.

    Args:
        model: A flow or density with `context_dim` > 0, or a `ConditionalFlow` or `ConditionalDensity`.
        loc, scale, context_loc, context_scale: As in `FlowPrior`.

    Shapes:
        context is (\*batch or (), context_dim), in its own units, and broadcasts with values, (\*batch, D).

    Cost: as `FlowPrior`, but an IAF takes a sweep a layer for its own draws too.

    Raises:
        TypeError: As in `FlowPrior`.
        ValueError: As in `FlowPrior`, and for a model that takes no context.

    Example:
        >>> from pyro_maf import ConditionalMAF
        >>> prior = ConditionalFlowPrior(ConditionalMAF(3, 2), context_scale=torch.tensor([10.0, 0.1]))
        >>> prior.condition(torch.zeros(7, 2)).sample().shape
        torch.Size([7, 3])
    """

    def __init__(
        self,
        model: Flow | Density | ConditionalFlow | ConditionalDensity,
        *,
        loc: Tensor | None = None,
        scale: Tensor | None = None,
        context_loc: Tensor | None = None,
        context_scale: Tensor | None = None,
    ) -> None:
        inner = _unwrapped(model)
        _check_model(type(self).__name__, inner)
        super().__init__(FlowPrior(inner, loc=loc, scale=scale, context_loc=context_loc, context_scale=context_scale))


class _Units(Flow):
    """y = loc + scale x, with nothing to train."""

    loc: Tensor
    scale: Tensor

    def __init__(self, loc: Tensor, scale: Tensor) -> None:
        super().__init__(len(loc))
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)

    def _push(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.loc + self.scale * x, self._log_scale(x)

    def _pull(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (y - self.loc) / self.scale, self._log_scale(y)

    def _log_scale(self, value: Tensor) -> Tensor:
        return self.scale.log().sum().expand(value.shape[:-1])


def _unwrapped(model: Any) -> Any:
    """The flow or density that a conditional form holds."""
    if isinstance(model, ConditionalFlow):
        return model.flow
    return model.density if isinstance(model, ConditionalDensity) else model


def _check_model(who: str, model: Any) -> None:
    if isinstance(model, (ConditionalFlow, ConditionalDensity)):
        raise TypeError(
            f"{who} expected a flow or a density, got {type(model).__name__}, which waits for a context: "
            "use ConditionalFlowPrior."
        )
    if not isinstance(model, (Flow, Density)):
        raise TypeError(f"{who} expected a flow or a density, got {type(model).__name__}.")


def _batch_shape(model: Any) -> torch.Size:
    """That of a density; a flow has one where it holds a context."""
    if isinstance(model, Flow):
        return model.forward_shape(torch.Size([model.input_dim]))[:-1]
    return model.batch_shape


def _statistic(who: str, name: str, value: Tensor | None, size: int, like: Tensor) -> Tensor:
    """Shifts or, where the name says so, positive scales as a vector like `like`."""
    if value is None:
        return torch.full((size,), float(name.endswith("scale")), dtype=like.dtype, device=like.device)
    check_event(who, name, value, size, "context_dim" if name.startswith("context") else "input_dim")
    value = value.detach().to(like).clone()
    if value.dim() != 1 or not value.isfinite().all():
        raise ValueError(f"{who} expected {name} to be {size} finite numbers, got {value.tolist()}.")
    if name.endswith("scale") and not (value > 0).all():
        raise ValueError(f"{who} expected {name} to be positive, got {value.tolist()}.")
    return value
