"""Conditional flows: flows that need a context, and flows at one context."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Generic, Protocol, TypeVar

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from torch import Tensor

from pyro_maf._core.checks import check_context
from pyro_maf._core.torch_state import converted, reference_tensor
from pyro_maf.saving import Savable
from pyro_maf.transforms.base import Flow

__all__ = ["AtContext", "Conditional", "ConditionalFlow", "ConditionalForm", "Conditioned", "TakesContext"]


class TakesContext(Protocol):
    """A flow or density whose methods take a context of `context_dim` features as their last argument."""

    input_dim: int
    context_dim: int

    @property
    def name(self) -> str:
        """Name of the class."""

    def fit_statistics(self, y: Tensor, context: Tensor | None = None) -> None:
        """Set the statistics of the data."""

    def noise(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Noise that is mapped to y."""


Wrapped = TypeVar("Wrapped", bound=TakesContext)


class Conditional(Savable, Generic[Wrapped]):
    """Base of modules that need a context: each wraps a flow or density with `context_dim` > 0."""

    @property
    def unwrapped(self) -> Wrapped:
        """The wrapped flow or density, which takes the context as an argument."""
        raise NotImplementedError

    @property
    def input_dim(self) -> int:
        """D."""
        return self.unwrapped.input_dim

    @property
    def context_dim(self) -> int:
        """Number of context features."""
        return self.unwrapped.context_dim

    def fit_statistics(self, y: Tensor, context: Tensor) -> None:
        r"""Set data statistics (batch norm, act norm) from data `y`, (rows, D), and its context."""
        self.unwrapped.fit_statistics(y, context)

    def noise(self, y: Tensor, context: Tensor) -> Tensor:
        r"""Noise u, (rows, D), that is mapped to y, (rows, D), given the context of each row, (rows, context_dim)."""
        return self.unwrapped.noise(y, context)

    def _checked(self, wrapped: Wrapped) -> Wrapped:
        if not wrapped.context_dim:
            raise ValueError(f"{type(self).__name__} expected context_dim of at least 1, got {wrapped.context_dim}.")
        return wrapped

    def __repr__(self) -> str:
        return repr(self.unwrapped).replace(self.unwrapped.name, type(self).__name__, 1)


class AtContext(Savable):
    """Base of flows and densities at one context: wraps the flow or density that takes the context."""

    context: Tensor
    _unsavable = "save the conditional form and condition it anew"

    @property
    def conditional(self) -> TakesContext:
        """The flow or density that takes the context as an argument."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Name of the flow or density."""
        return self.conditional.name

    def __repr__(self) -> str:
        return f"{self.conditional!r} at a context of shape {tuple(self.context.shape)}"


class Conditioned(AtContext, Flow):
    r"""A conditional flow at one context: an ordinary flow.

    Args:
        flow: A flow with `context_dim` > 0.
        context: (\*batch or (), context_dim); its batch shape broadcasts with that of x and y.
    """

    def __init__(self, flow: Flow, context: Tensor) -> None:
        super().__init__(flow.input_dim)
        self.flow = flow
        like = reference_tensor(flow)
        context = converted(context, like)
        check_context(flow.name, context, flow.context_dim, like)
        self.register_buffer("context", context, persistent=False)

    @property
    def conditional(self) -> Flow:
        """The flow that takes the context as an argument."""
        return self.flow

    @property
    def fast(self) -> str:  # type: ignore[override]
        """Fast direction of the flow."""
        return self.flow.fast

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As the flow's, at the stored context."""
        return self.flow.forward_and_log_det(x, self.context)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As the flow's, at the stored context."""
        return self.flow.inverse_and_log_det(y, self.context)

    def _fit_statistics(self, y: Tensor, context: Tensor | None = None) -> None:
        self.flow.fit_statistics(y, self.context)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the output: that of the input, broadcast with the context's batch shape."""
        super().forward_shape(shape)
        return self._broadcast(shape) + (self.input_dim,)

    def _checked(self, role: str, value: Tensor, like: Tensor | None) -> Tensor:
        value = super()._checked(role, value, like)
        self._broadcast(value.shape)
        return value

    def _broadcast(self, shape: torch.Size) -> torch.Size:
        batch = self.context.shape[:-1]
        if not batch or batch == shape[:-1]:  # the common cases, checked first at every call
            return shape[:-1]
        try:
            return torch.broadcast_shapes(shape[:-1], batch)
        except RuntimeError:
            raise ValueError(
                f"{self.name} expected x and context with batch shapes that broadcast, "
                f"got {tuple(shape[:-1])} and {tuple(batch)}."
            ) from None


class ConditionalFlow(Conditional[Flow], ConditionalTransformModule):
    r"""A flow that needs a context: `condition(context)` returns the flow at that context.

    Args:
        flow: A flow with `context_dim` > 0, registered as a submodule.

    Raises:
        ValueError: If the flow takes no context.

    Example:
        >>> from pyro_maf import MAF
        >>> flow = ConditionalFlow(MAF(3, num_layers=1, context_dim=2))
        >>> flow.condition(torch.zeros(5, 2)).inv(torch.zeros(5, 3)).shape
        torch.Size([5, 3])
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = self._checked(flow)

    @property
    def unwrapped(self) -> Flow:
        """The wrapped flow, which takes the context as an argument."""
        return self.flow

    def condition(self, context: Tensor) -> Flow:
        r"""The flow at `context`, (\*batch or (), context_dim)."""
        return Conditioned(self.flow, context)

    def forward(self, *args: object, **kwargs: object) -> Tensor:
        """Raise an error: a call needs a context."""
        raise TypeError(f"{type(self).__name__} depends on a context: call {type(self).__name__}.condition(context).")


class ConditionalForm(ConditionalFlow):
    """Conditional form of a class of flows; a subclass sets the class as its `flow_class`.

    Args:
        input_dim: D.
        context_dim: Number of context features, at least 1.
        flow: Other options of `flow_class`.

    Example:
        >>> from pyro_maf import MAF
        >>> class ConditionalDeepMAF(ConditionalForm):
        ...     flow_class = MAF
        >>> ConditionalDeepMAF(3, 2, num_layers=10).condition(torch.zeros(2))(torch.zeros(3)).shape
        torch.Size([3])
    """

    flow_class: ClassVar[Callable[..., Flow]]

    def __init__(self, input_dim: int, context_dim: int, **flow: object) -> None:
        super().__init__(self.flow_class(input_dim, context_dim=context_dim, **flow))
