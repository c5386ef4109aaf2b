"""Kinds of constrained columns, and the maps to them from real numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn import functional as F

__all__ = ["ANGLE", "GROUP", "KINDS", "NAMES", "ORDERED", "Kind", "kind_of", "parsed"]

ORDERED = "ordered"
GROUP = re.compile(rf"{ORDERED}(\(([^()]+)\))?")
"""Supports of increasing columns; a name in parentheses distinguishes adjacent groups."""
ANGLE = "angle"
BOUNDED = re.compile(r"(angle|interval|greater_than|less_than)\(([^,()]+)(?:,([^,()]+))?\)")
"""Supports with bounds."""


class Kind(NamedTuple):
    """Constraint of adjacent columns and the map z -> y to it, elementwise except for ordered columns.

    Attributes:
        constraint: Constraint of one number, or of a vector.
        values: Description of the values, for messages.
        middle: A typical value; for ordered columns that of the first, and each later one has 1 more.
        constrain: Maps z to y, strictly inside, and log dy/dz.
        unconstrain: Maps y to z, and log dy/dz.
        outside: Maps y to true where the density is 0. NaN does not count as outside: its density is NaN.
    """

    constraint: constraints.Constraint
    values: str
    middle: float
    constrain: Callable[[Tensor], tuple[Tensor, Tensor]]
    unconstrain: Callable[[Tensor], tuple[Tensor, Tensor]]
    outside: Callable[[Tensor], Tensor]


def _identity(z: Tensor) -> tuple[Tensor, Tensor]:
    return z, torch.zeros_like(z)


def _exp(z: Tensor, largest: float = math.inf) -> Tensor:
    """exp z, clamped to the finite numbers of the dtype and to `largest`."""
    ends = torch.finfo(z.dtype)
    # Clamps z, not exp z: where exp z is infinite, a gradient of 0 would become NaN.
    low, high = math.log(ends.tiny), math.log(min(ends.max, largest))
    return z.clamp(low * (1 - ends.eps), high * (1 - ends.eps)).exp()


def _positive(z: Tensor) -> tuple[Tensor, Tensor]:
    return _exp(z), z


def _log(y: Tensor) -> tuple[Tensor, Tensor]:
    z = y.log()
    return z, z


def _sigmoid(z: Tensor) -> tuple[Tensor, Tensor]:
    ends = torch.finfo(z.dtype)
    return z.sigmoid().clamp(ends.tiny, 1 - ends.eps), F.logsigmoid(z) + F.logsigmoid(-z)


def _logit(y: Tensor) -> tuple[Tensor, Tensor]:
    log_y, log_rest = y.log(), torch.log1p(-y)
    return log_y - log_rest, log_y + log_rest


def _increase(z: Tensor) -> tuple[Tensor, Tensor]:
    most = torch.finfo(z.dtype).max / (2 * z.shape[-1])
    columns = [z[..., 0].clamp(-most, most)]
    for step in _exp(z[..., 1:], most).unbind(-1):
        least = torch.nextafter(columns[-1].detach(), columns[-1].new_tensor(math.inf))
        columns.append(torch.maximum(columns[-1] + step, least))  # a step may be lost in rounding
    return torch.stack(columns, -1), _with_zero_first(z)


def _steps(y: Tensor) -> tuple[Tensor, Tensor]:
    z = torch.cat([y[..., :1], y.diff(dim=-1).log()], -1)
    return z, _with_zero_first(z)


def _with_zero_first(z: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(z[..., :1]), z[..., 1:]], -1)


def _not_above_last(y: Tensor) -> Tensor:
    last = torch.cat([torch.full_like(y[..., :1], -math.inf), y[..., :-1]], -1)
    return (y <= last) | y.isinf()


KINDS = {
    "real": Kind(
        constraints.real, "real numbers", 0.5, _identity, _identity, lambda y: torch.zeros_like(y, dtype=torch.bool)
    ),
    "positive": Kind(
        constraints.positive, "numbers above 0", 0.5, _positive, _log, lambda y: (y <= 0) | (y == torch.inf)
    ),
    "unit_interval": Kind(
        constraints.unit_interval,
        "numbers between 0 and 1, both excluded",
        0.5,
        _sigmoid,
        _logit,
        lambda y: (y <= 0) | (y >= 1),
    ),
    ORDERED: Kind(
        constraints.ordered_vector,
        "numbers that increase from column to column",
        0.0,
        _increase,
        _steps,
        _not_above_last,
    ),
}
NAMES = tuple(KINDS)
"""Kinds without bounds; `kind_of` adds those with bounds to `KINDS`."""


def interval_kind(low: float, high: float) -> Kind:
    """Numbers between two bounds, y = low + (high - low) / (1 + exp(-z))."""
    width, between = high - low, _strictly_between(low, high)

    def constrain(z: Tensor) -> tuple[Tensor, Tensor]:
        return between(low + width * z.sigmoid()), F.logsigmoid(z) + F.logsigmoid(-z) + math.log(width)

    def unconstrain(y: Tensor) -> tuple[Tensor, Tensor]:
        below, above = (y - low).log(), (high - y).log()
        return below - above, below + above - math.log(width)

    values = f"numbers between {low:g} and {high:g}, both excluded"
    middle = low + width / 2
    return Kind(
        constraints.interval(low, high), values, middle, constrain, unconstrain, lambda y: (y <= low) | (y >= high)
    )


def angle_kind(low: float, high: float) -> Kind:
    """Angles with a full turn of high - low: y = low + (z + pi) (high - low) / (2 pi), in [low, high)."""
    rate = (high - low) / (2 * math.pi)

    def constrain(z: Tensor) -> tuple[Tensor, Tensor]:
        y = low + torch.remainder(z + math.pi, 2 * math.pi) * rate
        end = torch.nextafter(y.new_tensor(high), y.new_tensor(low))
        return y.minimum(end), torch.full_like(z, math.log(rate))  # rounding may reach the end

    def unconstrain(y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.remainder((y - low) / rate, 2 * math.pi) - math.pi, torch.full_like(y, math.log(rate))

    values = f"finite angles, a turn of which is {high - low:g}"
    return Kind(constraints.interval(low, high), values, (low + high) / 2, constrain, unconstrain, torch.isinf)


def half_line_kind(bound: float, sign: int) -> Kind:
    """Numbers above a bound (sign 1) or below it (-1), y = bound + sign exp z."""
    between = _strictly_between(bound, math.inf) if sign > 0 else _strictly_between(-math.inf, bound)

    def constrain(z: Tensor) -> tuple[Tensor, Tensor]:
        return between(bound + sign * _exp(z)), z

    def unconstrain(y: Tensor) -> tuple[Tensor, Tensor]:
        z = (sign * (y - bound)).log()
        return z, z

    constraint = constraints.greater_than(bound) if sign > 0 else constraints.less_than(bound)
    values = f"numbers {'above' if sign > 0 else 'below'} {bound:g}"
    return Kind(
        constraint, values, bound + sign, constrain, unconstrain, lambda y: (sign * (y - bound) <= 0) | y.isinf()
    )


def _strictly_between(low: float, high: float) -> Callable[[Tensor], Tensor]:
    """Return a function that moves values strictly inside the bounds, which rounding may reach."""
    ends = {}
    for dtype in (torch.float32, torch.float64):
        bounds = torch.tensor([low, high], dtype=dtype)
        ends[dtype] = torch.nextafter(bounds, bounds.flip(0)).tolist()
    return lambda y: y.clamp(*ends.get(y.dtype, ends[torch.float32]))


def kind_of(name: str) -> Kind:
    """The kind with this name.

    Example:
        >>> kind_of("interval(0, 120)").values
        'numbers between 0 and 120, both excluded'
    """
    if GROUP.fullmatch(name):
        return KINDS[ORDERED]
    if name not in KINDS:
        form, low, high = (ANGLE, -math.pi, math.pi) if name == ANGLE else parsed(name)
        if form == ANGLE:
            KINDS[name] = angle_kind(low, high)
        elif math.isinf(low) or math.isinf(high):
            KINDS[name] = half_line_kind(low, 1) if math.isinf(high) else half_line_kind(high, -1)
        else:
            KINDS[name] = interval_kind(low, high)
    return KINDS[name]


def parsed(name: str) -> tuple[str, float, float]:
    """The form and both bounds of a support with bounds, infinite where there is none; NaN for other names."""
    match = BOUNDED.fullmatch(name.strip())
    if match is None:
        return "", math.nan, math.nan
    form, first, second = match.groups("nan")
    ends = {"greater_than": (first, "inf"), "less_than": ("-inf", first)}.get(form, (first, second))
    try:
        low, high = map(float, ends)
    except ValueError:
        return "", math.nan, math.nan
    return form, low, high
