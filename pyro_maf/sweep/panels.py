"""Products with a masked weight in panels of rows, which skip most of the entries that the mask removes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_maf.nn import MADE

__all__ = ["FEWEST", "MOST", "ROWS", "Panel", "Product", "panels_of"]

ROWS, FEWEST, MOST = 128, 2, 8
"""Rows of a panel, and the minimum and maximum number of panels: more panels skip more zeros, in slower products."""
Panel = tuple[slice, slice]
"""Rows of a mask, and the columns outside of which it is false in these rows."""

# A network replaces its list `ready` whenever its order or degrees change.
_known: weakref.WeakKeyDictionary[MADE, tuple[list[list[int]], list[list[Panel]]]] = weakref.WeakKeyDictionary()


def panels_of(made: MADE) -> list[list[Panel]]:
    """The panels of each layer of a network."""
    known = _known.get(made)
    if known is None or known[0] is not made.ready:
        known = _known[made] = made.ready, [_panels(layer.mask) for layer in made.masked_layers]
    return known[1]


def _panels(mask: Tensor) -> list[Panel]:
    count = max(FEWEST, min(MOST, len(mask) // ROWS))
    edges = [len(mask) * part // count for part in range(count + 1)]
    panels = []
    for first, end in zip(edges, edges[1:], strict=False):
        seen = mask[first:end].any(0).nonzero().flatten().tolist() or [0, -1]
        panels.append((slice(first, end), slice(seen[0], seen[-1] + 1)))
    return panels


class Product(NamedTuple):
    """A masked layer, y = x (M * W)^T + b, and its gradients. x, y and their gradients have a row for each point.

    Attributes:
        mask: M, (units out, units in).
        panels: Panels of the mask.
        pieces: The masked weight, panel by panel.
    """

    mask: Tensor
    panels: Sequence[Panel]
    pieces: Sequence[Tensor]

    @classmethod
    def of(cls, weight: Tensor, mask: Tensor, panels: Sequence[Panel]) -> Product:
        """Mask a weight."""
        return cls(mask, panels, [weight[panel] * mask[panel] for panel in panels])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Output y, (points, units out), for b of (units out,) or (points, units out)."""
        y = x.new_empty(len(x), len(self.mask))
        for piece, (rows, columns) in zip(self.pieces, self.panels, strict=True):
            torch.addmm(bias[..., rows], x[:, columns], piece.T, out=y[:, rows])
        return y

    def forward_transposed(self, x: Tensor, bias: Tensor) -> Tensor:
        """Output y transposed, (units out, points), contiguous."""
        bias = bias.T if bias.dim() == 2 else bias[:, None]
        y = x.new_empty(len(self.mask), len(x))
        for piece, (rows, columns) in zip(self.pieces, self.panels, strict=True):
            torch.addmm(bias[rows], piece, x[:, columns].T, out=y[rows])
        return y

    def by_input(self, grad: Tensor) -> Tensor:
        """Gradient with respect to x from the gradient with respect to y."""
        total = grad.new_zeros(len(grad), self.mask.shape[1])
        for piece, (rows, columns) in zip(self.pieces, self.panels, strict=True):
            total[:, columns].addmm_(grad[:, rows], piece)
        return total

    def by_weight(self, grad: Tensor, x: Tensor) -> Tensor:
        """Gradient with respect to W from the gradient with respect to y."""
        total = torch.zeros_like(self.mask)
        for panel in self.panels:
            rows, columns = panel
            torch.mm(grad[:, rows].T, x[:, columns], out=total[panel]).mul_(self.mask[panel])
        return total
