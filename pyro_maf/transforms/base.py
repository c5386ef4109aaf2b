"""Base class of flows: input checks, the cache, and the inverse as a module."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Self, TypedDict, cast

import torch
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor
from torch.distributions import constraints

from pyro_maf._core.checks import check_context, check_event, check_positive, check_takes_gradient
from pyro_maf._core.module_state import Observed, Structure
from pyro_maf._core.torch_state import converted, count_change, reference_tensor, without_autocast
from pyro_maf.saving import Savable
from pyro_maf.sweep import Programs, Step, Triangular
from pyro_maf.transforms.cache import Cache, caching_is_possible
from pyro_maf.univariate import UnivariateMap, univariate_map

__all__ = ["Flow", "Inverse", "LayerOptions", "UnivariateFlow"]


class LayerOptions(TypedDict, total=False):
    """Options of every layer with a network, besides the network's; a stack forwards them to its layers.

    Attributes:
        context_dim: Number of context features, 0 for none.
    """

    context_dim: int


class Flow(Savable, Observed, TransformModule):
    r"""An invertible map from noise x to data y, both of D dimensions, with its log-determinant.

    A subclass implements `forward_and_log_det` and `inverse_and_log_det`, which return their output and
    log |det dy/dx|. This class implements everything else, for layers and stacks alike.

    Args:
        input_dim: D.
        context_dim: Number of context features that `forward_and_log_det` and `inverse_and_log_det` take; 0 for none.

    Attributes:
        domain, codomain: Real vectors, so `event_dim` is 1.
        fast: "both", "forward" (x to y) or "inverse" (y to x): the directions that take one parallel pass.
        is_by_row: Whether a batch may be flattened to rows (N, D); false if the flow has, or may have, a batch shape.

    Example:
        >>> class Shift(Flow):
        ...     def forward_and_log_det(self, x, context=None):
        ...         return x + 1, x.new_zeros(x.shape[:-1])
        ...     def inverse_and_log_det(self, y, context=None):
        ...         return y - 1, y.new_zeros(y.shape[:-1])
        >>> Shift(2).inv(torch.ones(2))
        tensor([0., 0.])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    fast = "both"
    is_by_row = False

    def __init__(self, input_dim: int, context_dim: int = 0) -> None:
        super().__init__(cache_size=1)
        self.input_dim = check_positive(type(self).__name__, "input_dim", input_dim)
        self.context_dim = check_positive(type(self).__name__, "context_dim", context_dim, least=0)
        self._cache = Cache()
        self._programs: Programs = {}
        self._inverse_state: dict[str, object] | None = None

    # -- implemented by subclasses ---------------------------------------------------------------------------------

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""y for noise x (\*batch, D), and log |det dy/dx| (\*batch,) in nats; implemented by each flow.

        Called by layers and densities. Unlike a call of the flow, it neither checks nor caches.
        """
        raise NotImplementedError(f"{self.name} has no method forward_and_log_det, from noise to data.")

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""x for data y (\*batch, D), and log |det dy/dx| (\*batch,) in nats, as in the forward direction."""
        raise NotImplementedError(f"{self.name} has no method inverse_and_log_det, from data to noise.")

    def noise(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Noise x, (\*batch, D), that the flow maps to y: `inverse_and_log_det` without the log-determinant."""
        return self.inverse_and_log_det(y, context)[0]

    def program_steps(self, inverse: bool) -> Sequence[Step | Triangular] | None:
        """One direction as steps of a compiled program, or None if only the flow's methods can compute it.

        The tensors of triangular steps are parameters or buffers, or computed from buffers only.

        Args:
            inverse: Whether y to x, rather than x to y.
        """
        return None

    def fit_statistics(self, y: Tensor, context: Tensor | None = None) -> None:
        r"""Set data statistics (batch norm, act norm); a no-op for most flows.

        Args:
            y: Data, (\*batch, D), at least two rows.
            context: The context of y, if the flow takes one.

        Raises:
            ValueError: If data or context have the wrong width, or there are too few rows.
            TypeError: If the dtype of data or context differs from that of the parameters.
        """
        like = reference_tensor(self)
        check_event(self.name, "y", y, self.input_dim, "input_dim", like)
        check_context(self.name, context, self.context_dim, like)
        if (rows := y.shape[:-1].numel()) < 2:
            raise ValueError(f"{self.name} expected at least 2 rows of data, got {rows}.")
        self._fit_statistics(y, context)

    def _fit_statistics(self, y: Tensor, context: Tensor | None = None) -> None:
        """`fit_statistics` after the checks; overridden by subclasses with statistics."""

    # -- the two directions ---------------------------------------------------------------------------------------

    def __call__(self, x: Tensor) -> Tensor:
        r"""Map noise x (\*batch, D) to data y."""
        return self._through("x", x, inverse=False)

    def _inv_call(self, y: Tensor) -> Tensor:
        return self._through("y", y, inverse=True)

    def _call(self, x: Tensor) -> Tensor:
        return self.forward_and_log_det(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_log_det(y)[0]

    def _through(self, role: str, value: Tensor, *, inverse: bool) -> Tensor:
        value = self._checked(role, value, self._like())
        caches = self._caches()
        if caches and (cached := self._cache.input_of(self, value)) is not None:
            return cached
        structure, result = self._compiled(value, inverse)
        if result is None:
            structure, result = None, self._computed(value, inverse)
        if caches:
            self._cache.store(structure or self._cache.structure(self), value, *result)
        return result[0]

    def _compiled(self, value: Tensor, inverse: bool) -> tuple[Structure | None, tuple[Tensor, Tensor] | None]:
        """The structure, and the output and log-determinant from a compiled program if one covers the whole flow."""
        return None, None

    def _computed(self, value: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        direction = self.inverse_and_log_det if inverse else self.forward_and_log_det
        result = without_autocast(direction, value, like=value)
        if type(result) is not tuple:  # unpacking a tensor would split it by row
            raise TypeError(
                f"{self.name} expected {direction.__name__} to return a pair, the output and the log-determinant, "
                f"got {type(result).__name__}."
            )
        return result

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        r"""log |det dy/dx| in nats, (\*batch,), for y = self(x).

        Computed in the fast direction: from x if that is "forward", from y if it is "inverse". If it is "both", from y,
        unless y is the cached output for x; a batch norm in training mode then uses the stored statistics.
        """
        cache = self._cache
        if caching_is_possible() and (log_det := cache.log_det_of(self, x, y)) is not None:
            return log_det
        like = self._like()
        x, y = self._checked("x", x, like), self._checked("y", y, like)
        if self.fast == "forward" or (self.fast == "both" and cache.joins(self, x, y)):
            return self._computed(x, inverse=False)[1]
        return self._computed(y, inverse=True)[1]

    def cached_input(self, y: Tensor) -> Tensor | None:
        """The x from which y was last computed, if nothing has changed since."""
        return self._cache.input_of(self, y) if self._caches() else None

    def _caches(self) -> bool:
        return self._cache_size > 0 and caching_is_possible()

    def _like(self) -> Tensor | None:
        """Tensor whose dtype and device inputs must match, or None; raises for a flow without its context."""
        if self.context_dim:
            check_context(self.name, None, self.context_dim, advice=": use ConditionalFlow(flow).condition(context)")
        like = reference_tensor(self)
        check_takes_gradient(self, like)
        return like

    def _checked(self, role: str, value: Tensor, like: Tensor | None) -> Tensor:
        value = converted(value, like)
        like = reference_tensor(self, floating=False) if like is None else like
        return check_event(self.name, role, value, self.input_dim, "input_dim", like)

    # -- conventions of Transform ---------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Name of the class, for error messages."""
        return type(self).__name__

    @property
    def batch_shape(self) -> torch.Size:
        """Batch shape of the flow itself: that of the context if the flow is at one, otherwise ()."""
        return self.forward_shape(torch.Size([self.input_dim]))[:-1]

    @property
    def unwrapped(self) -> Self:
        """The flow itself; a conditional form returns the flow inside it."""
        return self

    @property
    def inv(self) -> Flow:
        """The inverse, a module that shares this flow's parameters and cache."""
        inverse: Any = self._inv() if self._inv is not None else None  # type: ignore[call-arg]
        if inverse is None:
            inverse = self._new_inverse()
            # A weak reference: a strong one would make a cycle, and `modules()` must not find the inverse.
            self._inv = weakref.ref(inverse)  # type: ignore[assignment]
        return inverse

    def _new_inverse(self) -> Inverse:
        # Rebuilt whenever no reference to the last one is left, so it must be fast: its other attributes are stored.
        if self._inverse_state is None:
            self._inverse_state = {**vars(Inverse(self)), "_modules": None, "_arguments": None}
        inverse: Inverse = object.__new__(Inverse)
        for name, value in self._inverse_state.items():
            inverse.__dict__[name] = value.copy() if isinstance(value, dict) else value
        inverse.__dict__.update(_modules={"flow": self}, _arguments={"flow": self})
        return inverse

    @property
    def sign(self) -> int:
        """+1: every flow in this package is increasing in each dimension."""
        return 1

    def with_cache(self, cache_size: int = 1) -> Flow:
        """The same flow, sharing parameters, with caching on (1) or off (0)."""
        if cache_size not in (0, 1):
            raise ValueError(f"{self.name} expected cache_size 0 or 1, got {cache_size!r}.")
        if cache_size == self._cache_size:
            return self
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__getstate__())
        twin._cache_size = cache_size
        return twin

    def clear_cache(self) -> None:
        """Clear the cache.

        Needed only after writes that torch's version counters miss: through `.data`, through memory shared with numpy
        or another library (`.numpy()`, `torch.from_numpy`, DLPack), or by another process to inputs and outputs in
        shared memory. Nothing is cached while the parameters are in shared memory.
        """
        for member in self.modules():
            if isinstance(member, Flow):
                member._forget()
        count_change()  # a prior, or a stack that contains this flow, has a cache too

    def _forget(self) -> None:
        self._cache.clear()
        self._programs.clear()

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of y for x of `shape`."""
        if not shape or shape[-1] != self.input_dim:
            raise ValueError(
                f"{self.name} expected a last dimension of {self.input_dim} (input_dim), got shape {tuple(shape)}."
            )
        return torch.Size(shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of x for y of `shape`."""
        return self.forward_shape(shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._forget()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        with torch.inference_mode(False):  # no later graph could save an inference tensor
            self._derive()

    def _derive(self) -> None:
        """Recompute what depends on the loaded state; overridden by subclasses that need it."""

    def __repr__(self) -> str:
        return f"{self.name}({self.input_dim})"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_inv": None, "_cache": Cache(), "_programs": {}, "_inverse_state": None}

    __hash__ = object.__hash__  # faster than Pyro's


class UnivariateFlow(Flow):
    """Base of layers whose networks output the parameters of a univariate map."""

    def __init__(self, input_dim: int, context_dim: int, univariate: str | UnivariateMap) -> None:
        super().__init__(input_dim, context_dim)
        self.univariate = univariate_map(self.name, univariate)
        if settings := self.univariate.settings:
            self.register_buffer("univariate_settings", torch.tensor(settings))

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y and log |det dy/dx|."""
        return self._through_map(x, context, False)

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x and log |det dy/dx|."""
        return self._through_map(y, context, True)

    def _through_map(self, value: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        """Either direction."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        stored, error_messages = state_dict.get(prefix + "univariate_settings"), cast("list[str]", args[-1])
        # Not compared with the buffer, which `to_empty` leaves uninitialised.
        settings = list(self.univariate.settings)
        if stored is not None and (numbers := [int(number) for number in stored]) != settings:
            error_messages.append(
                f"univariate map of {prefix[:-1]}: one with settings {numbers} was stored, {self.univariate!r}, with "
                f"{settings}, is built here."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


class Inverse(Flow):
    r"""The inverse of a flow: maps y to x, with log-determinant log |det dx/dy|.

    Holds the flow as its submodule `flow`, including its parameters, and shares its cache. Usually obtained as
    `flow.inv`.

    Example:
        >>> from pyro_maf import MAF
        >>> flow = MAF(3)
        >>> flow.inv.inv is flow, len(list(flow.inv.parameters())) == len(list(flow.parameters()))
        (True, True)
    """

    def __init__(self, flow: Flow) -> None:
        super().__init__(flow.input_dim, flow.context_dim)
        self.flow = flow
        self._cache_size = flow._cache_size

    @property
    def fast(self) -> str:  # type: ignore[override]
        """The flow's fast direction, reversed."""
        return {"forward": "inverse", "inverse": "forward"}.get(self.flow.fast, self.flow.fast)

    @property
    def is_by_row(self) -> bool:  # type: ignore[override]
        """As for the flow."""
        return self.flow.is_by_row

    def __call__(self, x: Tensor) -> Tensor:
        """Map the flow's data to its noise."""
        return self.flow._inv_call(x)

    def _inv_call(self, y: Tensor) -> Tensor:
        return self.flow(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        r"""Negative log-determinant of the flow at (y, x), in nats, (\*batch,)."""
        return -self.flow.log_abs_det_jacobian(y, x)

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map the flow's y to its x, with the negative log |det|."""
        y, log_det = self.flow.inverse_and_log_det(x, context)
        return y, -log_det

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map the flow's x to its y, with the negative log |det|."""
        x, log_det = self.flow.forward_and_log_det(y, context)
        return x, -log_det

    @property
    def inv(self) -> Flow:
        """The flow."""
        # After copying or loading, the flow does not refer to its inverse yet.
        if self.flow._inv is None or self.flow._inv() is None:  # type: ignore[call-arg]
            self.flow._inv = weakref.ref(self)  # type: ignore[assignment]
        return self.flow

    def __repr__(self) -> str:
        return f"Inverse of {self.flow!r}"

    def with_cache(self, cache_size: int = 1) -> Flow:
        """The inverse of the flow with this cache size."""
        return self if cache_size == self._cache_size else self.flow.with_cache(cache_size).inv

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the output for an input of `shape`: that of the flow's input."""
        return self.flow.inverse_shape(shape)

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the input for an output of `shape`: that of the flow's output."""
        return self.flow.forward_shape(shape)
