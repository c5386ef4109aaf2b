"""A flow over some of the variables."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_maf.transforms.base import Flow

__all__ = ["Partial"]


class Partial(Flow):
    r"""A flow over some of the variables; the others pass through and do not affect it.

    Args:
        input_dim: D.
        flow: A flow of k dimensions without context.
        variables: Indices of the variables it acts on, k distinct ones from 0 .. D - 1; stored in the `state_dict`.

    Shapes:
        x and y are (\*batch, D), log-determinants (\*batch,) in nats.

    Cost: that of the flow, and a copy of the vector.

    Raises:
        ValueError: For indices that are out of range or repeated, or whose number is not k.

    Example:
        >>> from pyro_maf.transforms import Permute
        >>> Partial(3, Permute([1, 0]), [0, 2])(torch.tensor([10.0, 11.0, 12.0]))
        tensor([12., 11., 10.])
    """

    variables: Tensor

    def __init__(self, input_dim: int, flow: Flow, variables: Sequence[int]) -> None:
        super().__init__(input_dim)
        indices = torch.as_tensor(variables, dtype=torch.long)
        if indices.shape != (flow.input_dim,) or not set(indices.tolist()) <= set(range(input_dim)):
            raise ValueError(f"Partial expected {flow.input_dim} variables of 0 to {input_dim - 1}, got {variables!r}.")
        if len(indices.unique()) < len(indices):
            raise ValueError(f"Partial expected distinct variables, got {variables!r}.")
        self.inner = flow
        self.is_by_row = flow.is_by_row
        self.register_buffer("variables", indices)

    @property
    def fast(self) -> str:  # type: ignore[override]
        """Fast direction of the flow."""
        return self.inner.fast

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y and log |det dy/dx|."""
        y, log_det = self.inner.forward_and_log_det(x.index_select(-1, self.variables))
        return x.index_copy(-1, self.variables, y), log_det

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x and log |det dy/dx|."""
        x, log_det = self.inner.inverse_and_log_det(y.index_select(-1, self.variables))
        return y.index_copy(-1, self.variables, x), log_det
