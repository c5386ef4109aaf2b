"""Supports of priors, and the maps to them from vectors of real numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from numbers import Real
from typing import Any, TypeAlias, TypeGuard

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import biject_to, transform_to
from torch.distributions.transforms import CatTransform
from torch.nn import functional as F

from pyro_maf.constrained import ANGLE, GROUP, KINDS, NAMES, ORDERED, Kind, kind_of, parsed

__all__ = ["Columns", "Support", "SupportLike"]

SupportOfColumn: TypeAlias = str | constraints.Constraint | Sequence[float | None]
"""A name, a constraint, or a pair of bounds (low, high), where None means unbounded."""
SupportLike: TypeAlias = SupportOfColumn | Sequence[SupportOfColumn] | Mapping[Any, SupportOfColumn]
"""Forms of a support: one for all columns, one for each, or one for some columns by name."""

SIMPLEX = "simplex"

ENDS = {"lower_bound": -math.inf, "upper_bound": math.inf}
CLOSED_OR_OPEN = (  # for a density it makes no difference whether the bound belongs to the support
    constraints.interval(0, 1),
    constraints.half_open_interval(0, 1),
    constraints.greater_than(0),
    constraints.greater_than_eq(0),
    constraints.less_than(0),
)
BOUNDED_CONSTRAINTS = tuple(map(type, CLOSED_OR_OPEN))


class Support:
    r"""Support of a prior over vectors y, and the map to it from vectors z of D real numbers.

    Elementwise: y = z ("real"), exp z ("positive") or 1 / (1 + exp(-z)) ("unit_interval"); between bounds a and b,
    a + (b - a) / (1 + exp(-z)); with one bound, a + exp z or b - exp z. "simplex" has D + 1 columns, by stick-breaking:
    y_k = s_k (1 - y_1 - ... - y_{k-1}) with s_k = sigmoid(z_k - log(D + 1 - k)), and y_{D+1} is the rest. Two or more
    adjacent "ordered" columns increase: y_1 = z_1, y_k = y_{k-1} + exp z_k; "ordered(NAME)" distinguishes adjacent
    groups. These are the maps of `biject_to(constraint)`, so NUTS samples in the space in which the flow is defined.
    "angle" is in radians, [-pi, pi), and "angle(0, 360)" in degrees; z is the same angle in radians. For a density that
    is periodic in them, use an `AngleFlow`.

    Args:
        who: The caller, for error messages.
        support: A name, a pair of bounds (low, high) where None or an infinity means unbounded, a constraint equivalent
            to one of these, or a sequence with one for each of D columns.
        input_dim: D.

    Attributes:
        name: A name or, if columns differ, a tuple with one per column; valid JSON.
        event_size: Number of columns of y: D, or D + 1 for the simplex.
        constraint: The corresponding constraint of torch and Pyro, with event_dim 1.

    Cost: a few elementwise operations per column.
    Cost: a few elementwise operations a column.

    Raises:
        ValueError: For an unknown support, or a sequence whose length is not D.

    Example:
        >>> support = Support("FlowPrior", ["real", "positive"], 2)
        >>> support.constrain(torch.zeros(2))
        (tensor([0., 1.]), tensor(0.))
        >>> Support("FlowPrior", constraints.simplex, 2).constrain(torch.zeros(2))[0]
        tensor([0.3333, 0.3333, 0.3333])
    """

    _runs: list[tuple[str, int]]

    def __init__(self, who: str, support: object, input_dim: int) -> None:
        names = _grouped(who, _names(who, support, input_dim))
        self.name: str | tuple[str, ...] = names[0] if len(set(names)) == 1 else names
        self.event_size = input_dim + (self.name == SIMPLEX)
        self.__setstate__({"_runs": [(name, len(list(run))) for name, run in groupby(names)]})

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        for name, _ in self._runs:  # build bounded kinds here rather than during tracing
            if name != SIMPLEX:
                kind_of(name)

    @property
    def _kinds(self) -> list[Kind]:
        return [kind_of(name) for name, _ in self._runs]

    @property
    def constraint(self) -> constraints.Constraint:
        """The constraint of y, of event_dim 1."""
        if self.name == "real":
            return constraints.real_vector
        if self.name == SIMPLEX:
            return constraints.simplex
        each = [kind.constraint for kind in self._kinds]
        parts = [constraint if constraint.event_dim else constraints.independent(constraint, 1) for constraint in each]
        return parts[0] if len(parts) == 1 else Columns(parts, -1, [length for _, length in self._runs])

    @property
    def angles(self) -> tuple[int, ...]:
        """Indices of the columns of angles."""
        is_angle = [name.startswith(ANGLE) for name, length in self._runs for _ in range(length)]
        return tuple(index for index, is_one in enumerate(is_angle) if is_one)

    def constrain(self, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map z, (\*batch, D), to y, strictly inside; returns y and log |det dy/dz|, (\*batch,)."""
        if self.name == SIMPLEX:
            return _break_stick(z)
        return self._by_column("constrain", z)

    def unconstrain(self, y: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map y inside the support, (\*batch, event_size), to z; returns z and log |det dy/dz|, (\*batch,)."""
        if self.name == SIMPLEX:
            return _join_stick(y)
        return self._by_column("unconstrain", y)

    def outside(self, y: Tensor) -> Tensor:
        r"""Return whether each y is outside, on the boundary, or infinite, (\*batch,)."""
        wrong = self.outside_by_column(y).any(-1)
        return wrong | _off_plane(y) if self.name == SIMPLEX else wrong

    def outside_by_column(self, y: Tensor) -> Tensor:
        """Mask of the entries of y that lie outside the support, of the same shape as y."""
        if self.name == SIMPLEX:
            return y <= 0
        parts = y.split([length for _, length in self._runs], -1)
        return torch.cat([kind.outside(part) for kind, part in zip(self._kinds, parts, strict=True)], -1)

    def off_bounds(self, y: Tensor) -> Tensor:
        """Move values on a bound, where rounding may have put them, to the adjacent number inside."""
        if self.name in ("real", SIMPLEX):
            return y
        parts = []
        for kind, part in zip(self._kinds, y.split([length for _, length in self._runs], -1), strict=True):
            low, high = (getattr(kind.constraint, *end) for end in ENDS.items())
            next_inside = torch.nextafter(part, part.new_tensor(kind.middle))
            parts.append(torch.where((part == low) | (part == high), next_inside, part))
        return torch.cat(parts, -1)

    def inside(self, y: Tensor, outside: Tensor) -> Tensor:
        """Replace points y outside the support by one at which the density and its gradient are finite."""
        if self.name == SIMPLEX:
            return torch.where(outside.unsqueeze(-1), torch.full_like(y, 1 / self.event_size), y)
        middle = torch.tensor(list(map(self.middle_of, range(self.event_size))), dtype=y.dtype, device=y.device)
        return torch.where(outside.unsqueeze(-1), middle, y)

    def values_of(self, column: int) -> str:
        """Description of a column's values, for messages."""
        name = self.name_of(column)
        return kind_of("positive" if name == SIMPLEX else name).values

    def middle_of(self, column: int) -> float:
        """A typical value of a column."""
        name = self.name_of(column)
        if name == SIMPLEX:
            return 1 / self.event_size
        return kind_of(name).middle + (column if GROUP.fullmatch(name) else 0)

    def name_of(self, column: int) -> str:
        """The name of one column's support."""
        return self.name if isinstance(self.name, str) else self.name[column]

    def _by_column(self, direction: str, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.name == "real":  # a shortcut that matters for small batches
            return value, value.new_zeros(value.shape[:-1])
        parts = value.split([length for _, length in self._runs], -1)
        mapped = [getattr(kind, direction)(part) for kind, part in zip(self._kinds, parts, strict=True)]
        if len(mapped) == 1:
            return mapped[0][0], mapped[0][1].sum(-1)
        values, log_slopes = zip(*mapped, strict=True)
        return torch.cat(values, -1), torch.cat(log_slopes, -1).sum(-1)


class Columns(constraints.cat):
    """Constraints of adjacent columns, each of event_dim 1, combined into one of event_dim 1.

    Unlike `constraints.cat`, `check` returns one result per vector, not one per part.
    """

    def check(self, value: Tensor) -> Tensor:
        """Return whether each vector satisfies the constraints of all its parts."""
        checks = [part.check(each) for part, each in zip(self.cseq, value.split(self.lengths, -1), strict=True)]
        return torch.stack(checks).all(0)

    def __repr__(self) -> str:
        return f"Columns({self.cseq}, lengths={self.lengths})"


def _columns_transform(constraint: Columns) -> CatTransform:
    return CatTransform([biject_to(part) for part in constraint.cseq], constraint.dim, constraint.lengths)


for registry in (biject_to, transform_to):
    registry.register(Columns, _columns_transform)


def _names(who: str, support: object, input_dim: int) -> tuple[str, ...]:
    """A name for each of the D columns of z."""
    if isinstance(support, constraints.independent) and support.event_dim <= 1:
        support = support.base_constraint
    if isinstance(support, constraints.cat):
        ordered = type(constraints.ordered_vector)
        parts = [f"{ORDERED}({place})" if type(part) is ordered else part for place, part in enumerate(support.cseq)]
        each = (_names(who, part, length) for part, length in zip(parts, support.lengths, strict=True))
        support = [name for names in each for name in names]
    elif type(support) in BOUNDED_CONSTRAINTS and not _are_numbers(support):
        support = _bounds_of_columns(support, input_dim)
    if isinstance(support, Sequence) and not isinstance(support, str) and not _is_pair(support):
        names = tuple(_name(who, each) for each in support)
        if SIMPLEX in names and names != (SIMPLEX,):
            raise ValueError(
                f"{who} expected support simplex for all columns or none, got it for {names.count(SIMPLEX)} of "
                f"{len(names)}: leave these shares out, or fit them alone."
            )
        if len(names) != input_dim:
            raise ValueError(
                f"{who} expected support with {', '.join(NAMES)} for each of {input_dim} columns, got {list(names)}."
            )
        return names
    return (_name(who, support),) * input_dim


def _bounds_of_columns(support: object, input_dim: int) -> list[tuple[float, float]]:
    """Bounds of each column, from a constraint with bounds of shape (D,) or (1,), such as a uniform prior."""
    ends = [torch.as_tensor(getattr(support, name, inf)) for name, inf in ENDS.items()]
    low, high = (end.flatten() for end in torch.broadcast_tensors(*ends))
    repeats = input_dim if len(low) == 1 else 1
    return repeats * [*zip(low.tolist(), high.tolist(), strict=True)]


def _name(who: str, support: object) -> str:
    choices = (*NAMES, ANGLE, SIMPLEX)
    if isinstance(support, str) and (support in choices or GROUP.fullmatch(support)):
        return support
    constraint = support
    if isinstance(support, constraints.independent) and support.event_dim <= 1:
        constraint = support.base_constraint
    for name, named in ((SIMPLEX, constraints.simplex), *((name, KINDS[name].constraint) for name in NAMES)):
        # Compares type and bounds exactly: `greater_than(0)` is "positive", `greater_than(1)` is not.
        if type(constraint) is type(named) and _are_numbers(constraint) and vars(constraint) == vars(named):
            return name
    form, low, high = _bounds(constraint)
    if form == ANGLE and -math.inf < low < high < math.inf:
        return f"{ANGLE}({low!r}, {high!r})"
    if form != ANGLE and low < high:
        return _named(low, high)
    raise ValueError(
        f"{who} expected support to be one of {', '.join(choices)}, a pair of bounds (low, high), a constraint that is "
        f"one of these, or a sequence with one for each column, got {support!r}."
    )


def _grouped(who: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Replace ordered names by numbered groups; the first group has no number."""
    runs = [(name, len(list(run))) for name, run in groupby(names)]
    groups = [name for name, _ in runs if GROUP.fullmatch(name)]
    for name, length in runs:
        if name in groups and (length == 1 or groups.count(name) > 1):
            raise ValueError(
                f"{who} expected columns of support {name} side by side, two or more, from the least to the largest, "
                f"got {list(names)}: reorder the columns, or name groups apart, as {ORDERED}(a) and {ORDERED}(b)."
            )
    number = {name: f"{ORDERED}({place})" if place > 1 else ORDERED for place, name in enumerate(groups, 1)}
    return tuple(number.get(name, name) for name in names)


def _are_numbers(constraint: object) -> bool:
    """Return whether no bound of a constraint is a tensor, whose entries may differ."""
    return not any(isinstance(value, Tensor) for value in vars(constraint).values())


def _named(low: float, high: float) -> str:
    """Name of the support between two bounds, one of which may be infinite."""
    if (low, high) == (-math.inf, math.inf):
        return "real"
    if (low, high) in ((0.0, math.inf), (0.0, 1.0)):
        return "positive" if high == math.inf else "unit_interval"
    if math.isinf(high):
        return f"greater_than({low!r})"
    return f"less_than({high!r})" if math.isinf(low) else f"interval({low!r}, {high!r})"


def _bounds(support: object) -> tuple[str, float, float]:
    """As `parsed`, but also for a pair of bounds or a constraint."""
    if isinstance(support, str):
        return parsed(support)
    if type(support) in BOUNDED_CONSTRAINTS:
        support = tuple(getattr(support, name, None) for name in ENDS)
    if not _is_pair(support):
        return "", math.nan, math.nan
    low, high = support
    return "interval", -math.inf if low is None else float(low), math.inf if high is None else float(high)


def _is_pair(support: object) -> TypeGuard[Sequence[float | None]]:
    """Return whether `support` is a pair of bounds, each a number or None."""
    return (
        isinstance(support, Sequence)
        and not isinstance(support, str)
        and len(support) == 2
        and all(each is None or (isinstance(each, Real) and not isinstance(each, bool)) for each in support)
    )


def _break_stick(z: Tensor) -> tuple[Tensor, Tensor]:
    z = z - _offset(z)
    log_rest = F.logsigmoid(-z).cumsum(-1)
    log_y = torch.cat([F.logsigmoid(z) + F.pad(log_rest[..., :-1], (1, 0)), log_rest[..., -1:]], -1)
    return log_y.exp().clamp(min=torch.finfo(z.dtype).tiny), log_y.sum(-1)


def _join_stick(y: Tensor) -> tuple[Tensor, Tensor]:
    # The rest of the stick is the sum of the later entries; 1 minus the earlier ones would cancel. The determinant's
    # factors 1 - s_k multiply to the last entry, so the determinant is the product of all entries.
    rest = y.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    log_y = y.log()
    z = log_y[..., :-1] - rest.log()
    return z + _offset(z), log_y.sum(-1)


def _offset(z: Tensor) -> Tensor:
    """Offset of z such that z = 0 maps to the centre of the simplex."""
    return torch.arange(z.shape[-1], 0, -1, dtype=z.dtype, device=z.device).log()


def _off_plane(y: Tensor) -> Tensor:
    """Return whether the sum of the entries differs from 1 by more than rounding."""
    return (y.sum(-1) - 1).abs() > max(1e-6, 10 * torch.finfo(y.dtype).eps * y.shape[-1])
