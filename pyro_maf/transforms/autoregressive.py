r"""Autoregressive layers: each dimension's affine map depends on the dimensions before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pyro_maf.nn import MADE
from pyro_maf.sweep import solve
from pyro_maf.transforms.base import ConditionalFlow, Flow
from pyro_maf.transforms.scalar import Affine

__all__ = [
    "ConditionalInverseAutoregressive",
    "ConditionalMaskedAutoregressive",
    "InverseAutoregressive",
    "MaskedAutoregressive",
]


class _Autoregressive(Flow):
    def __init__(
        self,
        input_dim: int,
        *,
        hidden_dims: Sequence[int] | None = None,
        context_dim: int = 0,
        activation: str = "relu",
        order: Sequence[int] | Tensor | None = None,
        degrees: str = "sequential",
        seed: int = 0,
    ) -> None:
        super().__init__(input_dim, context_dim)
        self.scalar = Affine()
        self.made = MADE(
            input_dim,
            hidden_dims,
            outputs_per_input=self.scalar.num_parameters,
            context_dim=context_dim,
            activation=activation,
            order=order,
            degrees=degrees,
            seed=seed,
        )
        self.made.zero_output()

    @property
    def order(self) -> Tensor:
        """The dimensions' indices, first to last."""
        return self.made.order

    def _parallel(self, scalar_map: Any, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        w, log_derivative = scalar_map(v, *self.made.parameters_of(v, context).unbind(-1))
        return w, log_derivative.sum(-1)

    def _sequential(self, scalar_map: Any, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return solve(self.made, scalar_map, v, context)


class MaskedAutoregressive(_Autoregressive):
    fast = "inverse"

    def _push(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._sequential(self.scalar.forward, x, context)

    def _pull(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._parallel(self.scalar.inverse, y, context)


class InverseAutoregressive(_Autoregressive):
    fast = "forward"

    def _push(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._parallel(self.scalar.forward, x, context)

    def _pull(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._sequential(self.scalar.inverse, y, context)


class ConditionalMaskedAutoregressive(ConditionalFlow):
    def __init__(self, input_dim: int, context_dim: int, **options: Any) -> None:
        super().__init__(MaskedAutoregressive(input_dim, context_dim=context_dim, **options))


class ConditionalInverseAutoregressive(ConditionalFlow):
    def __init__(self, input_dim: int, context_dim: int, **options: Any) -> None:
        super().__init__(InverseAutoregressive(input_dim, context_dim=context_dim, **options))
