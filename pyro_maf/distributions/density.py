"""Base classes of densities: input checks, shapes, sampling, scoring, and conditioning on a context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.conditional import ConditionalDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_maf._core.checks import check_context, check_event, check_positive, check_shape, check_takes_gradient
from pyro_maf._core.torch_state import converted, reference_tensor, seeded, without_autocast
from pyro_maf.saving import Savable
from pyro_maf.tables.layout import TableLike
from pyro_maf.transforms.conditional import AtContext, Conditional

__all__ = ["ConditionalDensity", "ConditionalDensityForm", "ConditionedDensity", "Density", "drawn_index"]

DRAWS, ROWS = 10_000, 100_000
"""Number of draws per estimate of a moment, and maximum number of rows, over all batches, drawn at a time."""

UNLISTED = ("mean", "mode", "stddev", "variance")
"""Left out of `dir`: `torch.jit.trace` and `inspect.getmembers` read all listed attributes, and each would sample."""


class Density(Savable, TorchDistribution, nn.Module):
    r"""A distribution over vectors of D real numbers whose parameters are those of a module.

    It is both a Pyro distribution, which draws a value when called and which `pyro.sample` accepts, and a torch module.
    A subclass implements `log_density`, `draw` and, where possible, `noise`; this class implements everything else.

    Args:
        input_dim: D.
        context_dim: Number of context features that `log_density` and `draw` take; 0 for none.
        batch_shape: Batch shape of the distribution itself; () for most.
        event_size: Number of columns of a value, if it differs from D.

    Attributes:
        event_shape: (D,), or (event_size,).
        support: Real vectors, unless a subclass overrides it.
        has_rsample: Whether `rsample` exists: draws with a gradient with respect to the parameters.
        angles: Indices of the columns in which the density has period 2 pi; most densities have none.

    Example:
        >>> class Uniform(Density):
        ...     def log_density(self, value, context=None):
        ...         return torch.where(((value > 0) & (value < 1)).all(-1), 0.0, -torch.inf)
        ...     def draw(self, shape, context=None):
        ...         return torch.rand(*shape, self.input_dim)
        >>> square = Uniform(2)
        >>> square().shape, square.expand([7]).log_prob(torch.tensor([0.5, 0.5])).shape
        (torch.Size([2]), torch.Size([7]))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    angles: tuple[int, ...] = ()

    def __init__(
        self, input_dim: int, context_dim: int = 0, batch_shape: Sequence[int] = (), event_size: int | None = None
    ) -> None:
        check_positive(type(self).__name__, "input_dim", input_dim)
        check_positive(type(self).__name__, "context_dim", context_dim, least=0)
        # This chain of constructors ends with that of nn.Module.
        super().__init__(torch.Size(batch_shape), torch.Size([input_dim if event_size is None else event_size]))
        self.input_dim = input_dim
        self.context_dim = context_dim

    # -- implemented by subclasses ---------------------------------------------------------------------------------

    def log_density(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Log-density (\*batch,) in nats of `value` (\*batch, D); batch is the broadcast shape of value and context.

        Called by other densities and by `fit`. Unlike `log_prob`, it checks nothing.
        """
        raise NotImplementedError

    def draw(self, shape: torch.Size, context: Tensor | None = None) -> Tensor:
        r"""Draws (\*shape, D), unchecked; the batch shape of `context` broadcasts to `shape`."""
        raise NotImplementedError

    def noise(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Noise u, (rows, D), that the density maps to y; standard normal if y follows the density.

        For a flow u = flow.inv(y). For mixtures of Gaussians u_i = Phi^-1(F_i(y_i | y_<i)), with F_i the conditional
        distribution function.

        Args:
            y: Rows (rows, D), or (rows, D + 1) on a simplex, inside the support, with the density's dtype and device.
            context: Rows (rows, C), for a density that takes a context.

        Cost: as `log_prob`.

        Raises:
            TypeError: For a density without such a map.

        Reference:
            Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017, section 3.1.
        """
        raise TypeError(f"noise expected a density with a map to noise, got {self.name}, which has none.")

    def fit_statistics(self, y: Tensor, context: Tensor | None = None) -> None:
        """Set data statistics from data `y`, (rows, D); a no-op for most densities."""

    # -- drawing and scoring --------------------------------------------------------------------------------------

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Log-density in nats, (\*batch,), of `value`, (\*batch, D), which broadcasts with `batch_shape`."""
        like = self._like()
        value = self.as_value(value, like)
        if not self._batch_shape:
            return without_autocast(self.log_density, value, like=like)
        try:
            batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        except RuntimeError:
            raise ValueError(
                f"{self.name} expected value with a batch shape that broadcasts with its own, "
                f"{tuple(self.batch_shape)}, got {tuple(value.shape[:-1])}."
            ) from None
        return without_autocast(self.log_density, value, like=like).expand(batch)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        r"""Draws without gradient, (\*sample_shape, \*batch_shape, D)."""
        with torch.no_grad():
            return self._draw_checked(sample_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        r"""Draws with gradient, (\*sample_shape, \*batch_shape, D), if `has_rsample` is true.

        Raises:
            NotImplementedError: If it is false, as for mixtures.
        """
        if not self.has_rsample:
            raise NotImplementedError(f"{self.name} has no reparameterised draws: use sample.")
        return self._draw_checked(sample_shape)

    # -- estimates ------------------------------------------------------------------------------------------------

    @property
    def mean(self) -> Tensor:
        r"""Monte Carlo estimate of E[y], (\*batch_shape, D), with a standard error of 1 % of the standard deviation.

        Uses 10,000 draws with a fixed seed: it is the same at every access and leaves the random state unchanged. It
        has a gradient with respect to the parameters if `has_rsample` is true. The same holds for `variance`, `stddev`
        and `entropy`.

        Cost: 10,000 draws per element of `batch_shape`, at every access.
        """
        return torch.cat(self._drawn()).mean(0)

    @property
    def variance(self) -> Tensor:
        r"""Monte Carlo estimate of the variance of each column, (\*batch_shape, D), from the draws of `mean`."""
        return torch.cat(self._drawn()).var(0)

    def entropy(self) -> Tensor:
        r"""Monte Carlo estimate of -E[log p(y)] in nats, (\*batch_shape,), from the draws of `mean`.

        Cost: as `mean`, and `log_prob` of each draw.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.has_rsample):
            return -torch.cat([self.log_prob(draws) for draws in self._drawn()]).mean(0)

    def _drawn(self) -> list[Tensor]:
        """Draws for estimates, (DRAWS, *batch_shape, D) in parts."""
        like = reference_tensor(self)
        draws = max(1, ROWS // max(1, self.batch_shape.numel()))
        with seeded(0, None if like is None else like.device):
            draw = self._draw_checked if self.has_rsample else self.sample
            return [draw((min(draws, DRAWS - start),)) for start in range(0, DRAWS, draws)]

    # -- inputs ---------------------------------------------------------------------------------------------------

    @property
    def value_like(self) -> Tensor | None:
        """Tensor with the dtype and device of values, or None."""
        return reference_tensor(self)

    @property
    def context_like(self) -> Tensor | None:
        """Tensor with the dtype and device of contexts, or None."""
        return reference_tensor(self)

    def as_value(self, value: TableLike, like: Tensor | None, role: str = "value") -> Tensor:
        """Convert a value to a tensor of the right width, dtype and device.

        Args:
            value: A tensor; a `FlowPrior` takes other forms too.
            like: `value_like`, or None to check only the width.
            role: Name of the value, for error messages.

        Raises:
            TypeError: For a value that is not a tensor or has another dtype.
            ValueError: For another width or device.
        """
        (size,) = self.event_shape
        size_name = "input_dim" if size == self.input_dim else "event_shape"
        return check_event(self.name, role, converted(value, like), size, size_name, like)

    @property
    def context_shape(self) -> torch.Size:
        """Shape of one context: (context_dim,), except for a density with a `context_net`."""
        return torch.Size([self.context_dim])

    def as_context(self, context: TableLike) -> Tensor:
        r"""Convert a context, (\*batch, \*context_shape) or flat, to a flat tensor of the right dtype and device.

        Raises as `as_value`.
        """
        like, shape, size_name = self.context_like, self.context_shape, "context_dim"
        context = converted(context, like)
        if len(shape) > 1:
            size_name = f"the entries of a context of shape {tuple(shape)}"
            if isinstance(context, Tensor) and context.shape[-len(shape) :] == shape:
                context = context.flatten(-len(shape))
        return check_event(self.name, "context", context, self.context_dim, size_name, like)

    def _draw_checked(self, sample_shape: Sequence[int]) -> Tensor:
        like = self._like()
        shape = check_shape(self.name, "sample_shape", sample_shape) + self.batch_shape
        return without_autocast(self.draw, shape, like=like)

    def _like(self) -> Tensor | None:
        """`value_like`; raises for a density without its context, or if it takes no gradient."""
        if self.context_dim:
            check_context(self.name, None, self.context_dim, advice=": condition its conditional form on one")
        like = self.value_like
        check_takes_gradient(self, like)
        return like

    # -- conventions of Distribution ------------------------------------------------------------------------------

    @property
    def support(self) -> constraints.Constraint:
        """Constraint that every value satisfies, of event_dim 1."""
        return constraints.real_vector

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values that `log_prob` takes and `sample` returns."""
        return _dtype_of(self.value_like)

    @property
    def context_dtype(self) -> torch.dtype:
        """Dtype of the context that the conditional form takes."""
        return _dtype_of(self.context_like)

    @property
    def name(self) -> str:
        """Name of the class, for error messages."""
        return type(self).__name__

    @property
    def unwrapped(self) -> Self:
        """The density itself; a conditional form returns the density inside it."""
        return self

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> Self:
        """This density with a larger batch shape: a shallow copy that shares every parameter.

        Raises:
            ValueError: If the current batch shape does not broadcast to `batch_shape`.
        """
        shape = check_shape(self.name, "batch_shape", batch_shape)
        try:
            fits = torch.broadcast_shapes(self.batch_shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"{self.name} expected a batch_shape to which its own, {tuple(self.batch_shape)}, broadcasts, "
                f"got {tuple(shape)}."
            )
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._batch_shape = shape
        return twin

    def __dir__(self) -> list[str]:
        """The attributes, without those that are estimated at every access."""
        return [name for name in super().__dir__() if name not in UNLISTED]

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.parameters())
        context = f", context_dim={self.context_dim}" if self.context_dim else ""
        return f"{self.name}(input_dim={self.input_dim}{context}, {parameters:,} parameters)"


class ConditionedDensity(AtContext, Density):
    r"""A density at one context: an ordinary density, with the batch shape of the context.

    Args:
        density: A density with `context_dim` > 0.
        context: (\*batch or (), context_dim); its batch shape broadcasts with that of values.
    """

    def __init__(self, density: Density, context: Tensor) -> None:
        context = density.as_context(context)
        super().__init__(density.input_dim, batch_shape=context.shape[:-1], event_size=density.event_shape[0])
        self.density: Density = density
        self.has_rsample = density.has_rsample
        self.register_buffer("context", context, persistent=False)

    @property
    def conditional(self) -> Density:
        """The density that takes the context as an argument."""
        return self.density

    @property
    def support(self) -> constraints.Constraint:
        """Support of the density."""
        return self.density.support

    @property
    def value_like(self) -> Tensor | None:
        """As the density's."""
        return self.density.value_like

    def as_value(self, value: TableLike, like: Tensor | None, role: str = "value") -> Tensor:
        """As the density's."""
        return self.density.as_value(value, like, role)

    def log_density(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        """As the density's, at the context."""
        return self.density.log_density(value, self.context)

    def draw(self, shape: torch.Size, context: Tensor | None = None) -> Tensor:
        """As the density's, at the context."""
        return self.density.draw(shape, self.context)

    def noise(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """As the density's, at the context; of a context with several rows, the first ones are used."""
        return self.density.noise(y, self.context[: len(y)] if self.batch_shape else self.context)

    def fit_statistics(self, y: Tensor, context: Tensor | None = None) -> None:
        """Set the density's data statistics from data y at this context."""
        self.density.fit_statistics(y, self.context)


class ConditionalDensity(Conditional[Density], ConditionalDistribution, nn.Module):
    r"""A density that needs a context: `condition(context)` returns the density at that context.

    It holds a density with `context_dim` > 0; one without a context raises a ValueError.

    Example:
        >>> from pyro_maf import MADEMoG
        >>> density = ConditionalDensity(MADEMoG(3, context_dim=2))
        >>> density.condition(torch.zeros(5, 2)).log_prob(torch.zeros(3)).shape
        torch.Size([5])
    """

    density: Density

    def __init__(self, density: Density) -> None:
        super().__init__()
        self.density = self._checked(density)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        if name in ("log_prob", "sample", "rsample"):
            raise AttributeError(
                f"{type(self).__name__} has no {name}, as it depends on a context: use condition(context).{name}."
            )
        return super().__getattr__(name)

    @property
    def unwrapped(self) -> Density:
        """The wrapped density, which takes the context as an argument."""
        return self.density

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the values."""
        return self.density.dtype

    @property
    def context_dtype(self) -> torch.dtype:
        """Dtype of the context."""
        return self.density.context_dtype

    def condition(self, context: Tensor) -> Density:
        r"""The density at `context`, (\*batch or (), context_dim)."""
        return ConditionedDensity(self.density, context)


class ConditionalDensityForm(ConditionalDensity):
    """Conditional form of a class of densities, its `density_class`; built like `ConditionalForm`."""

    density_class: ClassVar[Callable[..., Density]]

    def __init__(self, input_dim: int, context_dim: int, **density: object) -> None:
        super().__init__(self.density_class(input_dim, context_dim=context_dim, **density))


def drawn_index(logits: Tensor) -> Tensor:
    r"""Draw an index of the last dimension with probabilities softmax(logits), (\*batch, K) to (\*batch,)."""
    # The argmax of logits plus Gumbel noise has the softmax probabilities.
    return (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)


def _dtype_of(like: Tensor | None) -> torch.dtype:
    return torch.get_default_dtype() if like is None else like.dtype
