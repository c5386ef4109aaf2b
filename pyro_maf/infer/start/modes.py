"""Modes at the ends of ascents: which are distinct, which matter, and their images under exchanges of labels."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, combinations, compress, permutations
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.models.double_precision import Score
from pyro_maf.infer.models.model import FAILURES
from pyro_maf.infer.models.posterior import Posterior
from pyro_maf.infer.start.normal import Normal, fixed_noise, truncated

__all__ = [
    "MOST",
    "NEGLIGIBLE",
    "End",
    "Start",
    "bounds_of",
    "covering",
    "different",
    "distance",
    "exchanges",
    "images",
]

APART = 1.0
"""Distance, in standard deviations of either normal, within which two ends are the same mode."""
DIP, PLACES = 1.0, 16
"""Nats by which the density dips on the line between two modes, and number of places there at which it is evaluated."""
NEGLIGIBLE = 1e-3
"""Share of the probability below which a mode is left out, which thousands of draws would not reveal."""
MOST = 8
"""Maximum number of modes that a guide covers."""
EVIDENCE_DRAWS = 256
EVEN = 0.2
"""Fraction of the shares that is distributed evenly, since the evidence of a normal is a rough estimate."""
MOST_LABELS = 8
"""Maximum number of entries of an axis, and of sites, that may be labels."""
ALL_ORDERS = 4
"""Maximum number of labels for which all orders are returned; for more, those that exchange two labels."""
PROBES = 4
"""Number of points at which the density is compared."""
NEAR = 0.1
"""Spread of these points, and the distance from which on an image is distinct."""

Values = Mapping[str, Tensor]
"""The value of each latent site, draws along the first dimension."""
Exchange = Callable[[Values], dict[str, Tensor]]
Label = tuple[tuple[str, int | None, int], ...]
"""A label: sites, each with an axis counted from the right and an index along it, or None for the whole site."""


class End(NamedTuple):
    """The end of an ascent at a mode: its location, log-density, and normals with the curvature there."""

    loc: Tensor
    value: float
    normals: list[Normal]


class Start(NamedTuple):
    """The initialization of a guide.

    Attributes:
        normals: One for each mode, that with the largest share first.
        shares: Estimate of each mode's share of the probability, (modes,).
        missed: Number of further modes that were seen and would matter.
        is_fitted: Whether the normals are near the posterior; false if their scale is a default, or the user's.
    """

    normals: tuple[Normal, ...]
    shares: Tensor
    missed: int = 0
    is_fitted: bool = True

    @classmethod
    def single(cls, normal: Normal) -> Start:
        """Return the initialization by one normal."""
        return cls((normal,), normal.loc.new_ones(1))


def bounds_of(log_density: Score, candidates: Sequence[Normal], noise: Tensor) -> Tensor:
    """Evidence lower bound of each candidate in nats.

    If all have draws that cannot be scored, it is that of the other draws, plus twice the log of their fraction.
    """
    draws = torch.cat([each.of_noise(noise) for each in candidates])
    scores = log_density(draws).view(len(candidates), -1)
    scored = scores.isfinite()
    means = scores.mean(1)
    if not scored.all(1).any():
        shares = scored.double().mean(1)
        means = (scores.where(scored, 0.0).mean(1) / shares + 2 * shares.log()).to(draws)
    log_dets = torch.stack([each.scale_tril.diagonal().log().sum() for each in candidates])
    entropies = log_dets + noise.shape[1] * (1 + math.log(2 * math.pi)) / 2
    return (means + entropies).nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def _evidence(log_density: Score, normal: Normal) -> float:
    """Log-evidence in nats from truncated importance weights of a normal's draws."""
    log_weights = normal.log_weights(log_density, fixed_noise(normal.loc, draws=EVIDENCE_DRAWS))
    return float(truncated(log_weights.nan_to_num(nan=-torch.inf)).logsumexp(0)) - math.log(EVIDENCE_DRAWS)


def distance(normal: Normal, loc: Tensor) -> float:
    """Distance of a point from a normal's location, in its standard deviations."""
    return float(normal.noise_of(loc[None]).norm())


def different(log_density: Score, ends: Sequence[End]) -> list[End]:
    """Return one end for each mode, in the order of their first ends."""
    modes: list[End] = []
    for end in ends:
        if not any(_is_same(log_density, mode, end) for mode in modes):
            modes.append(end)
    return modes


def _is_same(log_density: Score, one: End, other: End) -> bool:
    """Return whether two ends are the same mode: close in the units of both, or without a dip between them."""
    if max(distance(one.normals[0], other.loc), distance(other.normals[0], one.loc)) < APART:
        return True
    parts = torch.linspace(0, 1, PLACES + 2, dtype=one.loc.dtype, device=one.loc.device)[1:-1, None]
    with torch.no_grad():
        lowest = float(log_density(one.loc + parts * (other.loc - one.loc)).min())
    return lowest > min(one.value, other.value) - DIP


@torch.no_grad()
def covering(log_density: Score, normals: Sequence[Normal], bounds: Sequence[float]) -> Start:
    """Return the initialization from the normals of those modes that matter.

    A mode matters if its evidence is at least a thousandth of that of all, for which the largest bound is a lower
    estimate.
    """
    evidence = [max(bound, _evidence(log_density, normal)) for normal, bound in zip(normals, bounds, strict=True)]
    within = [index for index, each in enumerate(evidence) if each > max(bounds) + math.log(NEGLIGIBLE)]
    within.sort(key=lambda index: -evidence[index])
    covered = within[:MOST]
    shares = torch.tensor([evidence[index] for index in covered], dtype=torch.float64).softmax(0)
    shares = (1 - EVEN) * shares + EVEN / len(covered)
    kept = tuple(normals[index] for index in covered)
    return Start(kept, shares.to(kept[0].loc), missed=len(within) - len(covered))


@torch.no_grad()
def images(posterior: Posterior, latents: Tensor) -> Tensor:
    """Return the images, (images, D), of latent vectors under exchanges of labels, if they are distinct."""
    with seeded(0, latents.device):
        noise = torch.randn(PROBES, latents.shape[1]).to(latents)
    probes, padded = (posterior.unpacked(each)[0] for each in (latents[:1] + NEAR * noise, latents))
    values = {name: padded[name].reshape(len(latents), *shape) for name, shape in posterior.shapes.items()}
    try:
        symmetries = exchanges(posterior.joint, probes, posterior.shapes)
        found = [posterior.packed(exchange(values)) for exchange in symmetries]
    except (*FAILURES, IndexError):
        return latents[:0]
    return torch.cat([latents[:0], *(image[(image - latents).abs().amax(1) > NEAR] for image in found)])


def exchanges(
    log_joint: Callable[[Values], Tensor], values: Values, events: Mapping[str, torch.Size]
) -> list[Exchange]:
    """Return the exchanges of labels that leave the density of a model unchanged.

    An axis of up to eight entries may be one of labels, together with axes of the same length in other sites, the first
    axis of each or the last. Up to eight sites of the same shape may be labels too, alone or together with those that
    have the same number in their names, such as m0 with s0. Labels are interchangeable if the density is the same, at
    some points, with each in the place of the first; it is then the same under every order.

    Args:
        log_joint: Log joint density as a function of the values, (draws,).
        values: Values at which it is compared.
        events: The shape of each site.
    """
    expected = log_joint(values)
    found: list[Exchange] = []
    seen: set[tuple[str, int | None, int]] = set()
    for group in _groups(events) if bool(expected.isfinite().all()) else ():
        labels = [] if seen.intersection(chain(*group)) else group
        while len(labels) > 1:
            first, *others = labels
            scores = [log_joint(_exchanged((first, other), (1, 0), values)) for other in others]
            same = [torch.allclose(score, expected, rtol=1e-4, atol=1e-3) for score in scores]
            alike = [first, *compress(others, same)]
            seen.update(chain(*alike) if len(alike) > 1 else ())
            found += [partial(_exchanged, alike, order) for order in _orders(len(alike))]
            labels = [label for label in labels if label not in alike]
    return found


def _groups(events: Mapping[str, torch.Size]) -> Iterator[list[Label]]:
    """Groups of possible labels."""
    for length in sorted({length for shape in events.values() for length in shape if 2 <= length <= MOST_LABELS}):
        sites = {name: shape for name, shape in events.items() if length in shape}
        first = {name: shape.index(length) - len(shape) for name, shape in sites.items()}
        last = {name: -1 - shape[::-1].index(length) for name, shape in sites.items()}
        for axes in [first] if first == last else [first, last]:
            yield [tuple((name, axis, index) for name, axis in axes.items()) for index in range(length)]
    stems: dict[str, dict[str, str]] = defaultdict(dict)
    shapes: dict[torch.Size, list[Label]] = defaultdict(list)
    for name, shape in events.items():
        shapes[shape].append(((name, None, 0),))
        if numbered := re.fullmatch(r"(.*?)(\d+)", name):
            stems[numbered[1]][numbered[2]] = name
    together: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for names in stems.values():
        if len({events[name] for name in names.values()}) == 1:
            together[tuple(sorted(names))].append(names)
    groups: list[list[Label]] = [*shapes.values()]
    groups[:0] = [[tuple((each[n], None, 0) for each in several) for n in order] for order, several in together.items()]
    yield from (group for group in groups if 2 <= len(group) <= MOST_LABELS)


def _exchanged(labels: Sequence[Label], order: Sequence[int], values: Values) -> dict[str, Tensor]:
    """Values with labels in another order."""
    result = {name: value.clone() for name, value in values.items()}
    for label, place in zip(labels, order, strict=True):
        for (name, axis, index), (source, _, other) in zip(label, labels[place], strict=True):
            if axis is None:
                result[name] = values[source]
            else:
                result[name].select(axis, index).copy_(values[source].select(axis, other))
    return result


def _orders(labels: int) -> Iterator[tuple[int, ...]]:
    """Orders of labels other than the original one."""
    if labels <= ALL_ORDERS:
        yield from list(permutations(range(labels)))[1:]
        return
    for one, other in combinations(range(labels), 2):
        yield tuple({one: other, other: one}.get(label, label) for label in range(labels))
