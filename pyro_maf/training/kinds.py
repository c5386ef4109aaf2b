"""Kinds of columns in a fit: categories, numbers on a grid, and real numbers; and the density of a table of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_maf._core.torch_state import seeded
from pyro_maf.constrained import ANGLE, ORDERED, kind_of
from pyro_maf.distributions import (
    AutoregressiveCategorical,
    ConditionalTableDensity,
    FlowPrior,
    TableDensity,
)
from pyro_maf.support import Support
from pyro_maf.tables import MappedRows, Rows
from pyro_maf.tables.grid import Grid, describe, grid_of
from pyro_maf.tables.reader import Labels
from pyro_maf.tables.rows import repeat_as_a_whole
from pyro_maf.tables.units import Units

__all__ = ["Kinds", "few_values", "grids_of"]

MOST_LEVELS, ROWS_EACH = 10, 10
"""Maximum number of values of a numeric column that counts as categorical, like truth values and grades, and minimum
average number of rows per value. A flow would have to model every gap between the values."""
MOST_NAMED = 3


class Kinds(NamedTuple):
    """Kinds of a table's columns: for each its categories as numbers, or None, and its grid, or None."""

    levels: tuple[tuple[float, ...] | None, ...]
    grids: tuple[Grid | None, ...] = ()

    @property
    def are_plain(self) -> bool:
        """True if all columns are real numbers."""
        return not any(self.levels) and not any(self.grids)

    @property
    def numeric(self) -> list[int]:
        """Indices of the columns that are not categorical."""
        return [index for index, level in enumerate(self.levels) if level is None]

    @property
    def categories(self) -> list[int]:
        """Indices of the categorical columns."""
        return [index for index, level in enumerate(self.levels) if level is not None]

    @property
    def num_categories(self) -> list[int]:
        """Number of categories of each categorical column."""
        return [len(level) for level in self.levels if level is not None]

    @property
    def spacing(self) -> tuple[float, ...]:
        """Spacing of each column, 0 if it is not on a grid; () if no column is."""
        return tuple(0.0 if grid is None else grid.spacing for grid in self.grids) if any(self.grids) else ()

    def repeat_by_chance(self, rows: Rows | MappedRows) -> bool:
        """Return whether equal rows need not be copies: a single column on a grid, or several with few values."""
        if self.are_plain or not all(level or grid for level, grid in zip(self.levels, self.grids, strict=True)):
            return False
        return len(self.levels) == 1 or not repeat_as_a_whole(rows.sample())

    def support_of_numbers(self, support: Support) -> Support:
        """Support of the columns that are not categorical."""
        if not self.categories:
            return support
        return Support("fit", [support.name_of(index) for index in self.numeric], len(self.numeric))

    def units_of_numbers(self, units: Units, support: Support) -> Units:
        """Units of the columns that are not categorical, for dequantised numbers."""
        scale = units.scale.clone()
        for index, spacing in enumerate(self.spacing):
            if spacing and support.name_of(index) == "real":
                scale[index] = math.hypot(float(scale[index]), spacing / math.sqrt(12))
        units = units._replace(scale=scale)
        # A simplex has one column more than its units.
        return units.take(self.numeric) if self.categories else units

    def around(self, prior: FlowPrior, rows: Rows, seed: int) -> TableDensity | ConditionalTableDensity:
        """The density of the table around that of its numbers, with category frequencies from the rows."""
        context_dim = prior.model.context_dim - sum(self.num_categories)
        categorical = None
        if self.categories:
            with seeded(seed):
                categorical = AutoregressiveCategorical(self.num_categories, context_dim=context_dim)
            columns = rows.data.numpy().T
            index = [np.searchsorted(self.levels[column] or (), columns[column]) for column in self.categories]
            categorical.start_at(torch.from_numpy(np.stack(index, -1)), rows.weights)
            categorical = categorical.to(prior.units.inner)
        form = ConditionalTableDensity if context_dim else TableDensity
        return form(prior, levels=self.levels, grids=self.grids or None, categorical=categorical)

    def lines(self, labels: Labels, named: Sequence[int]) -> list[str]:
        """Messages about columns whose likelihood is a probability, including numeric columns treated as categories."""
        lines = []
        on_grid = [f"{labels.column(i)} ({describe(grid)})" for i, grid in enumerate(self.grids) if grid is not None]
        if on_grid:
            lines.append(
                f"fit found values on a grid in {_listed(on_grid)}: log-likelihoods are of the probability of a step "
                "there, not of a density, noise within a step takes their place in training, and draws lie on the "
                "grid. dequantise=False fits a density instead."
            )
        if named:
            numbers = [f"{labels.column(i)} ({len(self.levels[i] or ())})" for i in named]
            lines.append(
                f"fit found few distinct values in {_listed(numbers)}: it treats them as categories, with a "
                "probability for each and none for other values. dequantise=False fits a density instead."
            )
        return lines


def few_values(data: Tensor) -> list[tuple[float, ...] | None]:
    """Levels of the columns, (rows, columns), that have few values; None for others, or for all if all have few."""
    levels = [_levels(column) for column in data.unbind(1)]
    return [None] * len(levels) if all(levels) else levels


def _levels(column: Tensor) -> tuple[float, ...] | None:
    # A few rows settle most columns, without sorting all rows.
    if len(column[: 20 * MOST_LEVELS].unique()) > MOST_LEVELS:
        return None
    values = column.unique()
    if len(values) > MOST_LEVELS or len(values) * ROWS_EACH > len(column) or not values.isfinite().all():
        return None
    return tuple(values.tolist())


def grids_of(
    rows: Rows | MappedRows, validation: Rows | None, support: Support, levels: Sequence[tuple[float, ...] | None]
) -> tuple[Grid | None, ...]:
    """Grids of the columns, provided that the support contains every step.

    Separate validation rows must lie on them too. Categorical columns, which have levels, have no grid.

    Cost: a sort of each column; for rows on disk, a pass over them if a sample lies on a grid.
    """
    if support.name == "simplex":
        return (None,) * len(levels)
    columns = rows.sample().data.numpy().T
    grids = [None if level is not None else grid_of(column) for column, level in zip(columns, levels, strict=True)]
    if isinstance(rows, MappedRows) and any(grids):
        for start in rows.starts:
            grids = _extended(grids, rows.take(slice(start, start + rows.block)))
    if validation is not None:
        grids = _extended(grids, validation)
    return tuple(
        grid if grid is not None and _is_inside(grid, support.name_of(i)) else None for i, grid in enumerate(grids)
    )


def _extended(grids: Sequence[Grid | None], rows: Rows) -> list[Grid | None]:
    """The grids on which these rows lie too."""
    columns = rows.data.numpy().T
    return [
        None if grid is None or grid.misses(column) else grid.joined(column)
        for grid, column in zip(grids, columns, strict=True)
    ]


def _is_inside(grid: Grid, support: str) -> bool:
    """Return whether a support contains all steps."""
    # Steps of ordered columns may overlap, and those of angles may not divide a turn evenly.
    if support.startswith((ANGLE, ORDERED)):
        return False
    low, high = grid.low - grid.spacing / 2, grid.high + grid.spacing / 2
    return not kind_of(support).outside(torch.tensor([low, high], dtype=torch.float64)).any()


def _listed(parts: Sequence[str]) -> str:
    shown = ", ".join(parts[:MOST_NAMED])
    more = len(parts) - MOST_NAMED
    return shown + (f" and {more} more column{'s' * (more > 1)}" if more > 0 else "")
