"""Symmetries of a model under which its labels are exchanged, such as those of the components of a mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import permutations

import torch
from torch import Tensor

__all__ = ["exchanges"]

MOST_LABELS = 8
"""Maximum length of an axis that is taken for one of labels."""
ALL_ORDERS = 4
"""Maximum number of labels of which all orders are returned; of more, those that exchange two."""

Values = Mapping[str, Tensor]
"""The value of each latent site, draws along the first dimension."""
Exchange = Callable[[Values], dict[str, Tensor]]


def exchanges(
    log_joint: Callable[[Values], Tensor], values: Values, events: Mapping[str, torch.Size]
) -> list[Exchange]:
    """Return the exchanges of labels that leave the density of a model as it is.

    An axis of up to eight entries may be one of labels, together with the axes of that length of other sites, the first
    of each or the last. If the density is the same at some points with the first two exchanged, and with all of them
    turned round, it is under every order.

    Args:
        log_joint: Log joint density as a function of the values, (draws,).
        values: Values at which it is compared.
        events: The shape of each site.
    """
    found: list[Exchange] = []
    expected = log_joint(values)
    for axes, labels in _groups(events):
        turned = [*range(1, labels), 0]
        swapped = [1, 0, *range(2, labels)]
        same = (_is_same(log_joint, _Exchange(axes, order), values, expected) for order in (swapped, turned))
        if all(same):
            found += [_Exchange(axes, list(order)) for order in _orders(labels)]
    return found


class _Exchange:
    """An order of labels along an axis, counted from the right, of some sites."""

    def __init__(self, axes: Mapping[str, int], order: list[int]) -> None:
        self._axes, self._order = axes, order

    def __call__(self, values: Values) -> dict[str, Tensor]:
        """Return the values in this order of labels."""
        axes, order = self._axes, self._order
        return {
            name: value.index_select(axes[name], torch.tensor(order, device=value.device)) if name in axes else value
            for name, value in values.items()
        }


def _groups(events: Mapping[str, torch.Size]) -> Iterator[tuple[dict[str, int], int]]:
    """Sites with an axis of the same length: the axis of each, counted from the right, and the length."""
    lengths = sorted({length for shape in events.values() for length in shape if 2 <= length <= MOST_LABELS})
    for length in lengths:
        sites = {name: shape for name, shape in events.items() if length in shape}
        first = {name: shape.index(length) - len(shape) for name, shape in sites.items()}
        last = {name: -1 - shape[::-1].index(length) for name, shape in sites.items()}
        yield first, length
        if last != first:
            yield last, length


def _is_same(log_joint: Callable[[Values], Tensor], exchange: Exchange, values: Values, expected: Tensor) -> bool:
    found = log_joint(exchange(values))
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-3) and bool(expected.isfinite().all())


def _orders(labels: int) -> Iterator[tuple[int, ...]]:
    """Orders of labels other than the usual one."""
    if labels <= ALL_ORDERS:
        yield from list(permutations(range(labels)))[1:]
        return
    for one in range(labels):
        for other in range(one):
            order = list(range(labels))
            order[one], order[other] = other, one
            yield tuple(order)
