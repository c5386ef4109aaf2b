"""Data screening: properties of a table, or of the end of a fit, that make a density fail without an error.

The statistics use at most 10,000 rows drawn at random, each repeated in proportion to its weight. All thresholds are
below, with examples that pass them.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pyro_maf.support import Support
from pyro_maf.tables import MappedRows, Reader, Rows
from pyro_maf.tables.rows import in_proportion
from pyro_maf.training.state import Schedule

__all__ = ["announce", "screen_data", "screen_ending"]

Array = NDArray[np.float64]

MOST_ROWS = 10_000
MOST_NUMBERS = 4_000_000
"""Maximum number of values of a table that are screened, which takes a fraction of a second."""

FEW_VALUES, FEW_REPEATS = 20, 3
SOME_VALUES, SOME_REPEATS = 100, 50
"""A column has few distinct values if there are up to 20 that occur 3 times each on average, or up to 100 that occur 50
times each: ratings, counts, hours, ages in years. Iris, in steps of a millimetre (22 values, 7 times each), passes."""

ATOM_SHARE, ATOM_RATIO, ATOM_ROWS = 0.05, 10, 10
"""An atom, such as the 0 of a dry day: a value in 5 % of the rows, at least 10, and 10 times as frequent as any
other."""

UNEXPLAINED = 1e-4
SPARE_ROWS = 10
MOST_COLUMNS = 1000
"""A column follows from others, or from the context, if a linear combination leaves a residual of 1 % of its standard
deviation and of its median deviation, which is robust to a shared outlier. Units converted and rounded are detected;
the radius and perimeter of a cell (2.6e-4 of the variance) pass. With fewer rows than columns + 10, or more than 1,000
columns, there is no test: it would be underdetermined or take too long."""

TAIL_RATIO, TAIL_INDEX, TAIL_SHARE, TAIL_ROWS = 2.0, 2.0, 0.05, 50
OUTLIER_RATIO = 12.0
"""A tail is heavy if, among 50 rows or more, the furthest in a thousand (the fifth furthest of few rows) lies twice as
far from the median as under a Laplace distribution with the same median deviation, and the furthest 5 % fall off like a
power of 2 or less (Hill's estimator); or if the furthest row lies 12 times as far as under that distribution. With 200
rows or more, less than one in 300 columns that are normal, uniform, exponential, gamma, bimodal or t (3 degrees) is a
false positive. With 1,000 rows, Cauchy, t (1.5) and log-normal (sigma 1.5) columns are detected in 98 of 100 cases,
t (2) in half, log-normal (sigma 1) in a third."""

MAGNITUDES, MAGNITUDE_SKEW, CONTEXT_ROWS = 100.0, 8.0, 20
"""A context spans orders of magnitude if its 95 % quantile is 100 times the 5 % quantile, and 8 times as far from the
median: log-normal with sigma 1.5, three decades. Uniform, exponential and normal contexts pass."""

STILL_IMPROVING = 0.01
"""Gain in nats over the last epochs, a quarter of the patience or half of all, that counts as still improving."""

UNBOUNDED = "a density of real numbers rises without bound there"
FEW_ADVICE = (
    "Dequantise by uniform noise as wide as a step, or make it context (by --categories where numbers are labels)"
)
ATOMS_ADVICE = "Leave those rows out, or say by a column of context which they are and add noise to them"
LOGARITHM_ADVICE = (
    'the few far values set the fit. Fit the logarithm, by support="positive" for the column, or remove rows that are '
    "errors"
)
TAIL_ADVICE = (
    "the few far values set the fit. Compress them, as by arcsinh or a logarithm, or remove rows that are errors"
)

MOST_NAMED = 3


class _Finding(NamedTuple):
    """A column and its anomaly."""

    column: int
    detail: str


def screen_data(
    rows: Rows | MappedRows,
    reader: Reader,
    categories: Sequence[int] = (),
    on_grid: Sequence[int] = (),
    in_tails: Sequence[int] = (),
) -> list[str]:
    """Warnings about the data and context columns of a fit, one line each.

    Args:
        rows: The rows.
        reader: Their reader, for the names of columns and the support. Tails refer to the unconstrained values.
        categories: Categorical columns, which cause no warnings.
        on_grid: Columns whose likelihood accounts for a grid, so that values may repeat.
        in_tails: Heavy-tailed columns whose units account for the tails, so that they need no warning.

    Cost: some sorting of at most 10,000 rows.

    Example:
        >>> reader = Reader("fit", 2, 0, support=Support("fit", "real", 2))
        >>> rows = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> screen_data(Rows(rows, None), reader)
        []
        >>> screen_data(Rows(rows.round(), None), reader)[0].partition(":")[0]
        'fit found few distinct values in column 0 (7 in 500 rows) and column 1 (8 in 500 rows)'
    """
    width, context_width = reader.width, reader.context_columns
    drawn = _some_rows(rows, min(MOST_ROWS, max(100, MOST_NUMBERS // (width + context_width))))
    data = drawn.data.double().numpy()
    labels = [reader.labels.column(column) for column in range(width)]
    context = np.zeros((len(data), 0))
    if drawn.context is not None and context_width:
        context = drawn.context.double().numpy()
    context_labels = [f"context {reader.context_labels.column(column)}" for column in range(context_width)]
    support = reader.support or Support("fit", "real", width)
    unconstrained = support.unconstrain(torch.from_numpy(data))[0].numpy()
    free = data[:, : unconstrained.shape[1]].copy()  # the last column of a simplex follows from the others
    free[:, list(categories)] = 0.0
    ordered = np.sort(data, 0)
    may_repeat = [_Finding(column, "") for column in (*categories, *on_grid)]
    few = _without(_few_values(ordered), may_repeat)
    atoms = _without(_atoms(ordered), [*few, *may_repeat])
    with_other_tails = [_Finding(column, "") for column in (*categories, *in_tails)]
    tails = _without(_heavy_tails(unconstrained), [*few, *atoms, *with_other_tails])
    lines = [
        _line("few distinct values", few, labels, f"{UNBOUNDED}. {FEW_ADVICE}"),
        _line("a value that many rows share", atoms, labels, f"{UNBOUNDED}. {ATOMS_ADVICE}"),
        _dependent(np.concatenate([context, free], 1), [*context_labels, *labels], context_width),
        *_tail_lines(
            tails, labels, [support.name_of(i) == "real" and bool(low > 0) for i, low in enumerate(ordered[0])]
        ),
        *(_screen_context(context, context_labels) if context_width else ()),
    ]
    return [line for line in lines if line]


def _some_rows(rows: Rows | MappedRows, most: int) -> Rows:
    """Draw rows, always the same for a given number of rows; of rows on disk, only these are read."""
    total = len(rows.data)
    random = np.random.default_rng(0)
    index = slice(None) if total <= most else torch.from_numpy(np.sort(random.choice(total, most, replace=False)))
    drawn = rows.take(index)
    if drawn.weights is None or not drawn.weights.any():
        return drawn
    return drawn.take(in_proportion(drawn.weights, len(drawn.data), random.random()))


def screen_ending(losses: Sequence[float], schedule: Schedule, *, has_more: bool, has_skipped: bool) -> list[str]:
    """Warnings about the end of a fit, one line each.

    Args:
        losses: The validation loss after each epoch.
        schedule: The schedule after the last epoch.
        has_more: Whether more epochs would have followed.
        has_skipped: Whether some steps had no finite loss or gradient.

    Example:
        >>> schedule = Schedule(learning_rate=1e-3, patience=30)
        >>> losses = [3.0, 2.0, 1.5]
        >>> [schedule.improves(epoch, loss) for epoch, loss in enumerate(losses, 1)]
        [True, True, True]
        >>> screen_ending(losses, schedule, has_more=True, has_skipped=False)
        ['fit reached max_epochs (3) while the validation log-likelihood was still improving: raise max_epochs.']
    """
    lines = []
    if losses and not schedule.best_epoch:
        remedy = "look for outliers, lower" if has_skipped else "lower"
        lines.append(
            "fit has its best epoch at 0, since no later epoch improved on the initial weights (of a new flow, a "
            f"normal distribution of independent columns): unless the rows are like that, {remedy} learning_rate, take "
            "a smaller model or more rows."
        )
    recent = max(1, min(schedule.patience // 4, len(losses) // 2))
    if has_more and schedule.best_epoch > len(losses) - recent:
        gain = min(losses[:-recent], default=math.inf) - schedule.best
        if gain > STILL_IMPROVING:
            lines.append(
                f"fit reached max_epochs ({len(losses)}) while the validation log-likelihood was still improving: "
                "raise max_epochs."
            )
    return lines


def announce(lines: Sequence[str]) -> None:
    """Issue each line as a warning, at the location where this package was called."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("pyro_maf", "torch"):
        level, frame = level + 1, frame.f_back
    for line in lines:
        warnings.warn(line, UserWarning, stacklevel=level)


def _tail_lines(tails: Sequence[_Finding], labels: Sequence[str], takes_logarithm: Sequence[bool]) -> list[str]:
    """Messages about heavy tails, with different advice for columns that may be log-transformed."""
    return [
        _line("heavy tails", [tail for tail in tails if takes_logarithm[tail.column] is takes], labels, advice)
        for takes, advice in ((True, LOGARITHM_ADVICE), (False, TAIL_ADVICE))
    ]


def _screen_context(rows: Array, labels: Sequence[str]) -> list[str]:
    wide = _magnitudes(rows)
    tails = _without(_heavy_tails(rows), [*wide, *_few_values(np.sort(rows, 0))])
    return [
        _line(
            "values over orders of magnitude",
            [finding for finding in wide if rows[:, finding.column].min() > 0],
            labels,
            "once standardised, the small ones are all the same. Give its logarithm as context",
        ),
        _line(
            "values over orders of magnitude",
            [finding for finding in wide if rows[:, finding.column].min() <= 0],
            labels,
            "once standardised, the small ones are all the same. Give arcsinh(c / s) as context, a logarithm "
            "on either side of 0, with s the size of the small ones",
        ),
        _line(
            "heavy tails",
            tails,
            labels,
            "once standardised, all but the far values are much the same. Compress them, as by arcsinh or a logarithm",
        ),
    ]


def _few_values(ordered: Array) -> list[_Finding]:
    rows = len(ordered)
    counts = 1 + (ordered[1:] != ordered[:-1]).sum(0)
    few = (counts <= FEW_VALUES) & (counts * FEW_REPEATS <= rows)
    few |= (counts <= SOME_VALUES) & (counts * SOME_REPEATS <= rows)
    return [_Finding(int(column), f"{counts[column]} in {rows:,} rows") for column in few.nonzero()[0]]


def _atoms(ordered: Array) -> list[_Finding]:
    rows = len(ordered)
    least = max(ATOM_ROWS, math.ceil(ATOM_SHARE * rows))
    # After sorting, a value in so many rows is at both ends of some window of that length.
    candidates = (ordered[least - 1 :] == ordered[: rows - least + 1]).any(0) if least <= rows else np.zeros(0, bool)
    findings = []
    for column in candidates.nonzero()[0]:
        values, counts = np.unique(ordered[:, column], return_counts=True)
        second = np.sort(counts)[-2] if len(counts) > 1 else rows
        if counts.max() >= ATOM_RATIO * second:
            findings.append(
                _Finding(int(column), f"{values[counts.argmax()]:.6g} in {counts.max() / rows:.0%} of rows")
            )
    return findings


def _dependent(rows: Array, labels: Sequence[str], first: int) -> str:
    """Description of the columns, from `first` on, that are linear combinations of earlier ones."""
    count, width = rows.shape
    if not 2 <= width <= MOST_COLUMNS or count < width + SPARE_ROWS:
        return ""
    # By a power of two first, which is exact: squares of 1e200 overflow, and those of 1e-200 underflow.
    sized = np.ldexp(rows, -np.frexp(np.abs(rows).max(0))[1])
    scale = sized.std(0)
    standard = (sized - sized.mean(0)) / np.where(scale > 0, scale, 1.0)
    correlation = torch.from_numpy(standard.T @ standard / count)
    # A Cholesky factor, row by row, of the columns that do not follow from others.
    factor = torch.zeros(width, width, dtype=torch.float64)
    free, lines = list[int](), list[str]()
    for column in scale.nonzero()[0].tolist():
        lower = factor[: len(free), : len(free)]
        solved = torch.linalg.solve_triangular(lower, correlation[free, column, None], upper=False)
        left = float(correlation[column, column] - solved.square().sum())
        if free and left <= UNEXPLAINED:
            weights = torch.linalg.solve_triangular(lower.T, solved, upper=True).numpy()[:, 0]
            if _explains(standard[:, free] @ weights, standard[:, column]):
                lines += [_combination(rows, column, free, weights, labels)] * (column >= first)
                continue
        factor[len(free), : len(free)] = solved[:, 0]
        factor[len(free), len(free)] = math.sqrt(max(left, torch.finfo(torch.float64).eps))
        free.append(column)
    if not lines:
        return ""
    named = ", ".join(lines[:MOST_NAMED]) + _and_more(len(lines) - MOST_NAMED)
    return (
        f"fit found that {named}: the rows lie on a plane, where a density rises without bound. Leave such columns out."
    )


def _explains(predicted: Array, column: Array) -> bool:
    """Return whether the residual is small for most rows too: an outlier in all columns makes any two collinear."""
    deviation = np.median(np.abs(column - np.median(column)))
    rest = column - predicted
    return bool(np.median(np.abs(rest - np.median(rest))) <= math.sqrt(UNEXPLAINED) * deviation) or not deviation


def _combination(rows: Array, column: int, free: Sequence[int], weights: Array, labels: Sequence[str]) -> str:
    """Description of a column as a combination of independent ones."""
    parts = [free[place] for place in np.argsort(-np.abs(weights), kind="stable") if abs(weights[place]) > 0.02]
    if len(parts) == 1:
        is_same = np.array_equal(rows[:, column], rows[:, parts[0]])
        relation = "repeats" if is_same else "is a multiple, up to a shift, of"
        return f"{labels[column]} {relation} {labels[parts[0]]}"
    named = [labels[part] for part in sorted(parts[:MOST_NAMED])]
    return f"{labels[column]} is a linear combination of {_joined(named)}" + _and_more(len(parts) - len(named))


def _heavy_tails(rows: Array) -> list[_Finding]:
    count = len(rows)
    far, furthest = max(5, count // 1000), max(5, math.ceil(TAIL_SHARE * count))
    if count <= furthest:
        return []
    median = np.median(rows, 0)
    away = -np.sort(-np.abs(rows - median), 0)
    middle = np.median(away, 0)
    spread = np.subtract(*np.quantile(rows, [0.75, 0.25], 0))
    ok = (middle > 0) & (spread > 0) & (away[furthest] > 0)
    scale = np.where(ok, middle, 1.0) / math.log(2)  # of a Laplace distribution with this median deviation
    ratio = away[far - 1] / (scale * math.log(count / far))
    outlier = away[0] / (scale * math.log(count))
    excess = np.log(np.where(ok, away[:furthest] / np.where(ok, away[furthest], 1.0), 1.0)).mean(0)
    heavy = ok & (((count >= TAIL_ROWS) & (ratio > TAIL_RATIO) & (excess * TAIL_INDEX > 1)) | (outlier > OUTLIER_RATIO))
    extremes = np.abs(rows - median).argmax(0)
    return [
        _Finding(
            int(column),
            f"up to {away[0, column] / spread[column]:.3g} quartile ranges from the median, "
            f"as {rows[extremes[column], column]:.4g}",
        )
        for column in heavy.nonzero()[0]
    ]


def _magnitudes(rows: Array) -> list[_Finding]:
    findings = []
    for column, values in enumerate(np.abs(rows.T)):
        positive = values[values > 0]
        if len(positive) < CONTEXT_ROWS:
            continue
        low, middle, high = np.quantile(positive, [0.05, 0.5, 0.95])
        if high > MAGNITUDES * low and high - middle > MAGNITUDE_SKEW * (middle - low):
            findings.append(_Finding(column, f"a twentieth below {low:.2g}, a twentieth above {high:.2g}"))
    return findings


def _without(findings: Sequence[_Finding], others: Sequence[_Finding]) -> list[_Finding]:
    """Drop the findings about columns that have another finding."""
    columns = {finding.column for finding in others}
    return [finding for finding in findings if finding.column not in columns]


def _line(what: str, findings: Sequence[_Finding], labels: Sequence[str], advice: str) -> str:
    """A one-line warning, or "" without findings."""
    if not findings:
        return ""
    named = [f"{labels[column]} ({detail})" for column, detail in findings[:MOST_NAMED]]
    return f"fit found {what} in {_joined(named)}{_and_more(len(findings) - len(named))}: {advice}."


def _joined(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _and_more(count: int) -> str:
    return f" and {count} more column{'s' * (count != 1)}" if count > 0 else ""
