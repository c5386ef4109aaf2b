"""A fixed change of units, for a vector whose parts have unlike scales and are strongly correlated."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_maf.transforms import Flow

__all__ = ["Whitening"]


class Whitening(Flow):
    r"""y = loc + L x with a fixed location and a fixed lower triangular L: buffers, which are not trained.

    What is trained before it lives in units where the posterior is about standard normal, so that one learning rate
    suits every model.

    Args:
        input_dim: D.
        loc: (D,); by default 0.
        scale_tril: L, (D, D), with a positive diagonal; by default the identity.

    Cost: one product forward, one triangular solve inverse.
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, input_dim: int, *, loc: Tensor | None = None, scale_tril: Tensor | None = None) -> None:
        super().__init__(input_dim)
        self.register_buffer("loc", torch.zeros(input_dim) if loc is None else loc.detach().clone())
        self.register_buffer("scale_tril", torch.eye(input_dim) if scale_tril is None else scale_tril.detach().clone())

    def _push(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.loc + x @ self.scale_tril.T, self._log_det(x)

    def _pull(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        columns = (y - self.loc).reshape(-1, self.input_dim).T
        x = torch.linalg.solve_triangular(self.scale_tril, columns, upper=False).T.reshape(y.shape)
        return x, self._log_det(y)

    def _log_det(self, like: Tensor) -> Tensor:
        return self.scale_tril.diagonal().log().sum().expand(like.shape[:-1])
