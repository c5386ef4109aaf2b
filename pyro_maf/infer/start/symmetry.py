"""Symmetries of a model under which its labels are exchanged, such as those of the components of a mixture."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, permutations

import torch
from torch import Tensor

__all__ = ["exchanges"]

MOST_LABELS = 8
"""Maximum length of an axis, and number of sites, that are taken for labels."""
ALL_ORDERS = 4
"""Maximum number of labels of which all orders are returned; of more, those that exchange two."""

Values = Mapping[str, Tensor]
"""The value of each latent site, draws along the first dimension."""
Exchange = Callable[[Values], dict[str, Tensor]]
Names = tuple[str, ...]
"""Names of the sites of one label."""


def exchanges(
    log_joint: Callable[[Values], Tensor], values: Values, events: Mapping[str, torch.Size]
) -> list[Exchange]:
    """Return the exchanges of labels that leave the density of a model as it is.

    An axis of up to eight entries may be one of labels, together with the axes of that length of other sites, the first
    of each or the last. If the density is the same at some points with the first two exchanged, and with all of them
    turned round, it is under every order. Up to eight sites of one shape may be labels too, each alone, or with those
    of the same number in their names, as m0 with s0: those which may change places with the first, in any order.

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
        tried = (partial(_exchanged, axes, order) for order in (swapped, turned))
        if all(_is_same(log_joint, each, values, expected) for each in tried):
            found += [partial(_exchanged, axes, order) for order in _orders(labels)]
    seen: set[str] = set()
    for group in _groups_of_sites(events):
        if not seen.intersection(name for names in group for name in names):
            for alike in _alike(group, log_joint, values, expected):
                seen.update(name for names in alike for name in names)
                found += [partial(_renamed, alike, order) for order in _orders(len(alike))]
    return found


def _exchanged(axes: Mapping[str, int], order: Sequence[int], values: Values) -> dict[str, Tensor]:
    """Values with labels along an axis, counted from the right, of some sites in another order."""
    return {
        name: value.index_select(axes[name], torch.tensor(order, device=value.device)) if name in axes else value
        for name, value in values.items()
    }


def _renamed(labels: Sequence[Names], order: Sequence[int], values: Values) -> dict[str, Tensor]:
    """Values with sites that are labels in another order."""
    source = dict(zip(chain(*labels), chain(*(labels[place] for place in order)), strict=True))
    return {name: values[source.get(name, name)] for name in values}


def _groups_of_sites(events: Mapping[str, torch.Size]) -> Iterator[list[Names]]:
    """Sites that may be labels, with those that go with them."""
    stems: dict[str, dict[str, str]] = defaultdict(dict)
    for name in events:
        if numbered := re.fullmatch(r"(.*?)(\d+)", name):
            stems[numbered[1]][numbered[2]] = name
    together: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for names in stems.values():
        if len({events[name] for name in names.values()}) == 1:
            together[tuple(sorted(names))].append(names)
    groups = [[tuple(each[label] for each in several) for label in labels] for labels, several in together.items()]
    shapes: dict[torch.Size, list[Names]] = defaultdict(list)
    for name, shape in events.items():
        shapes[shape].append((name,))
    yield from (group for group in (*groups, *shapes.values()) if 2 <= len(group) <= MOST_LABELS)


def _alike(
    group: Sequence[Names], log_joint: Callable[[Values], Tensor], values: Values, expected: Tensor
) -> Iterator[list[Names]]:
    """Labels of a group that may change places with one another, two of them and more."""
    while group:
        first, *others = group
        swaps = ((other, partial(_renamed, (first, other), (1, 0))) for other in others)
        alike = [first, *(other for other, swap in swaps if _is_same(log_joint, swap, values, expected))]
        if len(alike) > 1:
            yield alike
        group = [label for label in others if label not in alike]


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
