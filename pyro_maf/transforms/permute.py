"""Reordering of dimensions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyro_maf._core.checks import check_permutation
from pyro_maf.sweep import Step
from pyro_maf.transforms.base import Flow

__all__ = ["Permute"]


class Permute(Flow):
    r"""y_i = x_{p(i)}, with log-determinant 0. The permutation p is stored in the `state_dict`.

    Args:
        permutation: p, with each of 0 .. D - 1 once.

    Shapes:
        x and y are (\*batch, D), log-determinants (\*batch,).

    Cost: one copy in either direction.

    Raises:
        ValueError: If `permutation` is not a permutation.

    Example:
        >>> import torch
        >>> Permute([2, 0, 1])(torch.tensor([10.0, 11.0, 12.0]))
        tensor([12., 10., 11.])
    """

    is_by_row = True
    permutation: Tensor
    _inverse_permutation: Tensor

    def __init__(self, permutation: Sequence[int] | Tensor) -> None:
        permutation = check_permutation("Permute", "permutation", permutation)
        super().__init__(permutation.numel())
        self.register_buffer("permutation", permutation.clone())
        self._derive()

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y_i = x_permutation[i], and a log-determinant of 0."""
        return x.index_select(-1, self.permutation), x.new_zeros(x.shape[:-1])

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x from y, and a log-determinant of 0."""
        return y.index_select(-1, self._inverse_permutation), y.new_zeros(y.shape[:-1])

    def program_steps(self, inverse: bool) -> tuple[Step]:
        """A step that only renames variables, for programs with other layers before or after it."""
        order = self._inverse_permutation if inverse else self.permutation
        return (Step((), None, inverse, order, order),)

    def _derive(self) -> None:
        check_permutation("Permute", "permutation", self.permutation)
        self.register_buffer("_inverse_permutation", self.permutation.argsort(), persistent=False)
