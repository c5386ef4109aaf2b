"""Density of a table with categorical columns and columns on a grid, built around a flow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias, cast

import torch
from pyro.distributions import constraints
from torch import Tensor

from pyro_maf._core.messages import shown
from pyro_maf.distributions.categorical import AutoregressiveCategorical
from pyro_maf.distributions.data_units import has_float64
from pyro_maf.distributions.density import ConditionalDensity, Density
from pyro_maf.distributions.flow_prior import FlowPrior
from pyro_maf.distributions.named_density import Entries, Labels, NamedDensity
from pyro_maf.distributions.steps import Steps, dequantised
from pyro_maf.tables.layout import Layout, TableLike

__all__ = ["ConditionalTableDensity", "DequantisedDensity", "TableDensity"]

NEAR = 1e-3
"""Distance from the grid, in steps, up to which a value counts as on it, because of rounding."""

Grids: TypeAlias = Sequence[Sequence[float] | None]
Levels: TypeAlias = Sequence[Sequence[float] | None]


class TableDensity(NamedDensity):
    r"""Distribution of rows with categories k, numbers n on a grid of spacing h, and other numbers x, around a flow.

    p(k, n, x) = p(k) \int p(n + h (v - 1/2), x | k) dv prod_j h_j, over v in the unit cube. The categories are
    autoregressive, the flow takes them one-hot as context, and a number on a grid has the probability that the flow
    assigns to its step. So `log_prob` is a log-probability in the categorical and grid columns and a log-density in the
    others; it sums and integrates to 1. A value off its grid, or that is not a category, has probability 0.

    The integral is exact, by the flow's distribution function, if only one column is not categorical. Otherwise it is a
    mean over 64 points of a scrambled Sobol sequence within the step, the same for all rows. The probability is
    unbiased over the scrambling, so log_prob is too low on average, by half the squared relative standard error of that
    mean. `log_prob_error` is its standard error.

    Args:
        prior: The density of the non-categorical columns, dequantised. Its context is that of this density, if any,
            followed by the categories one-hot.
        levels: For each column, its categories as numbers, in order, or None for other columns. By default none are.
        grids: For each column, (spacing, lowest, highest) of its grid, or None. The grid continues beyond both ends;
            draws beyond an end are moved to it.
        categorical: The distribution of the categories, if there are any.
        columns, context_columns, context_labels: Names, as in `FlowPrior`.
        labels: For each named column, the categories of a data frame, numbered 0, 1, ..., or None for numbers.
        dtypes: Dtypes of the columns of a data frame, by name, for writing drawn rows to files.

    Shapes:
        Values are (\*batch, D), log-probabilities (\*batch,) in nats. Forms of data are as in `FlowPrior`.

    Cost:
        `log_prob`: 64 times the prior's if there are columns on a grid, twice if there is a single one, otherwise once.
        `sample`: the prior's. There is no `rsample`.

    Raises:
        ValueError: For specifications that do not fit the prior.

    Example:
        >>> from pyro_maf import NSF
        >>> counts = TableDensity(FlowPrior(NSF(1, hidden_dims=())), grids=[(1.0, 0.0, 3.0)])
        >>> counts.log_prob(torch.arange(-9.0, 10.0)[:, None]).exp().sum()
        tensor(1., grad_fn=<SumBackward0>)
        >>> counts.log_prob(torch.tensor([0.5]))
        tensor(-inf, grad_fn=<WhereBackward0>)

    Reference:
        Theis, van den Oord & Bethge, *A Note on the Evaluation of Generative Models*, 2016, section 3.1.
    """

    def __init__(
        self,
        prior: FlowPrior,
        *,
        levels: Levels | None = None,
        grids: Grids | None = None,
        categorical: AutoregressiveCategorical | None = None,
        columns: Entries = (),
        context_columns: Entries = (),
        context_labels: Labels = (),
        labels: Labels = (),
        dtypes: Sequence[str] = (),
    ) -> None:
        width = prior.event_shape[0] + (0 if categorical is None else categorical.input_dim)
        self.levels = [None if each is None else tuple(each) for each in levels or [None] * width]
        self.grids = [None if each is None else tuple(each) for each in grids or [None] * width]
        one_hot = 0 if categorical is None else categorical.width
        self._check(prior, categorical, width, one_hot)
        super().__init__(width, prior.context_dim - one_hot)
        self.prior = prior
        self.categorical = categorical
        _check_names(Layout.named(columns), self.levels, labels, dtypes)
        layout = Layout.named(columns, labels)._replace(dtypes=tuple(dtypes))
        self.name_columns(layout, Layout.named(context_columns, context_labels)._replace(one_hot=True))

    def _check(self, prior: FlowPrior, categorical: AutoregressiveCategorical | None, width: int, one_hot: int) -> None:
        sizes = [len(each) for each in self.levels if each is not None]
        expected = [] if categorical is None else list(categorical.num_categories)
        if len(self.levels) != width or sizes != expected:
            raise ValueError(
                f"TableDensity expected levels of {width} columns, of which {len(expected)} have {expected} "
                f"categories, got {len(self.levels)} columns with {sizes}."
            )
        if len(self.grids) != width or any(grid and level for grid, level in zip(self.grids, self.levels, strict=True)):
            raise ValueError(f"TableDensity expected grids of {width} columns, None for categories, got {self.grids}.")
        if prior.context_dim < one_hot:
            raise ValueError(
                f"TableDensity expected a prior with a context of at least {one_hot} features, one for each category, "
                f"got {prior.context_dim}."
            )

    @property
    def architecture(self) -> dict[str, object]:
        """Constructor arguments, with names as JSON values."""
        kinds = {"labels": self.layout.as_labels(), "dtypes": self.layout.dtypes}
        return {**self._arguments, **self.names_of_columns, **kinds}

    @property
    def numeric(self) -> list[int]:
        """Indices of the columns that are not categorical."""
        return [index for index, level in enumerate(self.levels) if level is None]

    @property
    def spacing(self) -> list[float]:
        """Grid spacing of each column, 0 for a column without a grid."""
        return [0.0 if grid is None else grid[0] for grid in self.grids]

    @property
    def steps(self) -> Steps:
        """Probabilities of the steps of the numeric columns."""
        return Steps(self.prior, [self.spacing[index] for index in self.numeric])

    @property
    def dequantised(self) -> DequantisedDensity:
        """The density of dequantised rows, which `fit` trains."""
        return DequantisedDensity(self)

    @property
    def support(self) -> constraints.Constraint:
        """Constraint of the values, with event_dim 1; the probability is 0 elsewhere."""
        return _OnTable(self)

    @property
    def support_name(self) -> str:
        """The support in words, for messages."""
        return "the grids and categories of the fit"

    @property
    def value_like(self) -> Tensor:
        """Tensor with the dtype and device of values."""
        return self.prior.value_like

    @property
    def context_like(self) -> Tensor:
        """Tensor with the dtype and device of contexts."""
        return self.prior.context_like

    @property
    def context_shape(self) -> torch.Size:
        """Shape of one context."""
        return super().context_shape if self.prior.context_net is None else self.prior.context_net.shape

    def standardised(self, y: Tensor) -> Tensor:
        r"""Standardised numbers, (\*batch, D), as in `FlowPrior.standardised`; 0 for categories."""
        z = self.prior.standardised(y[..., self.numeric])
        full = z.new_zeros(y.shape)
        full[..., self.numeric] = z
        return full

    def standardised_context(self, context: Tensor) -> Tensor:
        r"""Standardised context, (\*batch, context_dim)."""
        return self.prior.standardised_context(self._filled(context))[..., : self.context_dim]

    def features(self, context: Tensor) -> Tensor:
        r"""Context features that the prior's model takes besides the categories, (\*batch, features)."""
        features = self.prior.features(self._filled(context))
        return features[..., : features.shape[-1] - (self.prior.context_dim - self.context_dim)]

    def _filled(self, context: Tensor) -> Tensor:
        """Pad the context with zeros for the categories."""
        return torch.nn.functional.pad(context, (0, self.prior.context_dim - self.context_dim))

    def outside(self, value: Tensor) -> Tensor:
        r"""Return whether each value has probability 0, e.g. because it is off its grid, (\*batch,); false for NaN."""
        wrong = self.prior.units.support.outside(value[..., self.numeric])
        for column, grid, level in zip(value.unbind(-1), self.grids, self.levels, strict=True):
            if grid is not None:
                steps = (column - grid[1]) / grid[0]
                tolerance = max(NEAR, 4 * torch.finfo(column.dtype).eps * abs(grid[2]) / grid[0])
                wrong = wrong | ((steps - steps.round()).abs() > tolerance)
            elif level is not None:
                wrong = wrong | (_index(column, level) < 0)
        return wrong & ~value.isnan().any(-1)

    def log_density(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Log-probability (\*batch,) in nats, unchecked."""
        outside = self.outside(value)
        missing = value.isnan().any(-1)
        inside = torch.where((outside | missing).unsqueeze(-1), self._row_inside(value), value)
        parts, context = self.parts(inside, context)
        total = parts if self.categorical is not None else 0.0
        total = total + self.steps.log_prob(inside[..., self.numeric], context)
        total = torch.where(missing, torch.nan, total)
        return torch.where(outside, -torch.inf, total)

    def parts(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        r"""Log-probability of the categories, (\*batch,), 0 if there are none, and the context of the prior."""
        if self.categorical is None:
            return value.new_zeros(value.shape[:-1]), context
        columns = zip(value.unbind(-1), self.levels, strict=True)
        index = torch.stack([_index(column, level) for column, level in columns if level is not None], -1)
        index = index.to(cast(Tensor, self.categorical.value_like))
        of_categories = None if context is None else self.features(context)
        log_prob = self.categorical.log_density(index, of_categories)
        return log_prob, self._joined(context, self.categorical.one_hot(index))

    def _joined(self, context: Tensor | None, one_hot: Tensor) -> Tensor:
        """The context of the prior."""
        one_hot = one_hot.to(self.context_like.dtype)
        if context is None:
            return one_hot
        shape = torch.broadcast_shapes(context.shape[:-1], one_hot.shape[:-1])
        return torch.cat([context.expand(*shape, -1), one_hot.expand(*shape, -1)], -1)

    def log_prob_error(self, value: TableLike, context: TableLike | None = None) -> Tensor:
        r"""Standard error of `log_prob` in nats, (\*batch,), from the spread over the points; 0 where it is exact.

        Half its square estimates how far `log_prob` is below the log-probability on average. The formula holds for
        independent points; these are spread more evenly, so it is an upper estimate.

        Args:
            value: Rows, as for `log_prob`.
            context: Context of the rows, for a density that takes one.
        """
        row = self.as_value(value, self.value_like)
        given = None if context is None else self.as_context(context)
        with torch.no_grad():
            return self.steps.error(row[..., self.numeric], self.parts(row, given)[1])

    def _row_inside(self, value: Tensor) -> Tensor:
        """A row inside the support, (D,)."""
        support, places = self.prior.units.support, iter(range(len(self.levels)))
        numbers = [0.0 if level else support.middle_of(next(places)) for level in self.levels]
        row = [
            level[0] if level else grid[1] if grid else number
            for level, grid, number in zip(self.levels, self.grids, numbers, strict=True)
        ]
        return torch.tensor(row, dtype=value.dtype, device=value.device)

    def draw(self, shape: torch.Size, context: Tensor | None = None) -> Tensor:
        r"""Draws (\*shape, D), unchecked and without gradient."""
        with torch.no_grad():
            rows = self.value_like.new_zeros(*shape, self.input_dim)
            if self.categorical is not None:
                of_categories = None if context is None else self.features(context)
                index = self.categorical.draw(shape, of_categories)
                chosen = [(column, level) for column, level in enumerate(self.levels) if level is not None]
                for (column, level), drawn in zip(chosen, index.unbind(-1), strict=True):
                    rows[..., column] = rows.new_tensor(level)[drawn.long()]
                context = self._joined(context, self.categorical.one_hot(index))
            rows[..., self.numeric] = self.prior.draw(shape, context)
            return self.on_grid(rows)

    def on_grid(self, rows: Tensor) -> Tensor:
        r"""Move each number on a grid to the nearest grid point between lowest and highest, in rows (\*batch, D)."""
        columns = []
        for column, grid in zip(rows.unbind(-1), self.grids, strict=True):
            if grid is not None:
                spacing, low, high = grid
                steps = ((column - low) / spacing).round().clamp(0, round((high - low) / spacing))
                decimals = _decimals(spacing, low)
                if decimals is None or not has_float64(column.device):
                    column = low + spacing * steps
                else:  # gives the number that was rounded: 0.3 rather than 3 * 0.1
                    column = (low + spacing * steps.double()).round(decimals=decimals).to(column.dtype)
            columns.append(column)
        return torch.stack(columns, -1)

    def noise(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Noise u, (rows, numbers), of the prior, for numbers at random but reproducible places within their steps.

        Standard normal if y follows the density. For a discrete distribution these are the randomised residuals of Dunn
        and Smyth (1996).
        """
        return self.prior.noise(*self.of_prior(self.as_value(y, self.value_like, "y"), context))

    def of_prior(self, y: Tensor, context: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor | None]:
        r"""Dequantise the numbers of rows y, (\*batch, numbers), and return them with the context of the prior."""
        generator = torch.Generator().manual_seed(seed)
        return dequantised(y[..., self.numeric], self.steps.spacing, generator), self.parts(y, context)[1]

    def fit_statistics(self, y: Tensor, context: Tensor | None = None) -> None:
        r"""Set the model's data statistics from data `y`, (rows, D), in the data's units."""
        self.prior.fit_statistics(y[..., self.numeric], self.parts(y, context)[1])

    def __repr__(self) -> str:
        grids = sum(grid is not None for grid in self.grids)
        categories = "" if self.categorical is None else f", {self.categorical.input_dim} of categories"
        return f"{self.name} of {self.input_dim} columns ({grids} on a grid{categories}) around {self.prior!r}"


def _decimals(*numbers: float) -> int | None:
    """Number of decimals of the numbers, at most 9, or None."""
    return next((d for d in range(10) if all(math.isclose(round(n, d), n, abs_tol=1e-12) for n in numbers)), None)


class DequantisedDensity(Density):
    r"""A `TableDensity` before quantisation: log p(k) + log p(n, x | k), with n anywhere within its step.

    Its mean over uniform noise in the steps, plus sum_j log h_j, is a lower bound of the log-probability, which `fit`
    maximises.

    Args:
        table: The density of the table.
    """

    _unsavable = "save the TableDensity around it"

    def __init__(self, table: TableDensity) -> None:
        super().__init__(table.input_dim, table.context_dim)
        self.table = table

    @property
    def value_like(self) -> Tensor:
        """Tensor with the dtype and device of values."""
        return self.table.value_like

    @property
    def context_like(self) -> Tensor:
        """Tensor with the dtype and device of contexts."""
        return self.table.context_like

    def log_density(self, value: Tensor, context: Tensor | None = None) -> Tensor:
        r"""Log-density (\*batch,) in nats, unchecked."""
        log_prob, context = self.table.parts(value, context)
        return log_prob + self.table.prior.log_density(value[..., self.table.numeric], context)

    def draw(self, shape: torch.Size, context: Tensor | None = None) -> Tensor:
        r"""Draws (\*shape, D) of the table."""
        return self.table.draw(shape, context)

    def fit_statistics(self, y: Tensor, context: Tensor | None = None) -> None:
        r"""As the table's."""
        self.table.fit_statistics(y, context)


class ConditionalTableDensity(ConditionalDensity):
    r"""A `TableDensity` that takes a context: `condition(context)` is a density.

    Args:
        prior, levels, grids, categorical, columns, context_columns: As in `TableDensity`, as are shapes and cost.

    Raises:
        ValueError: As in `TableDensity`, and for a prior that takes no context besides the categories.

    Example:
        >>> from pyro_maf import MAF
        >>> prior = FlowPrior(MAF(2, context_dim=1))
        >>> density = ConditionalTableDensity(prior, grids=[None, (1.0, 0.0, 9.0)])
        >>> density.condition(torch.zeros(7, 1)).sample().shape
        torch.Size([7, 2])
    """

    density_class: ClassVar[Callable[..., TableDensity]] = TableDensity
    density: TableDensity

    def __init__(self, prior: FlowPrior, **density: object) -> None:
        super().__init__(self.density_class(prior, **density))

    @property
    def unwrapped(self) -> TableDensity:
        """The density inside, which takes the context as an argument."""
        return self.density

    @property
    def architecture(self) -> dict[str, object]:
        """As `TableDensity.architecture`."""
        return self.density.architecture

    def name_columns(self, layout: Layout, context_layout: Layout) -> None:
        """As `TableDensity.name_columns`."""
        self.density.name_columns(layout, context_layout)


class _OnTable(constraints.Constraint):
    """Rows to which a table density assigns a probability above 0."""

    event_dim = 1

    def __init__(self, density: TableDensity) -> None:
        self._density = density
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Return whether each row has a probability above 0."""
        return ~self._density.outside(value) & ~value.isnan().any(-1)


def _check_names(layout: Layout, levels: Levels, labels: Labels, dtypes: Sequence[str]) -> None:
    """Raise for labels and dtypes that do not fit the columns."""
    width = len(levels)
    for name, each, kind in (("labels", labels, (list, tuple, type(None))), ("dtypes", dtypes, (str,))):
        is_sequence = isinstance(each, (list, tuple)) and all(isinstance(entry, kind) for entry in each)
        if not is_sequence or (each and not width == len(each) == len(layout.labels) == len(layout.names)):
            raise ValueError(
                f"TableDensity expected {name} of {width} named columns, got {shown(repr(each))} of "
                f"{len(layout.labels)}."
            )
    for label, level, among in zip(layout.labels if labels else (), levels if labels else (), labels, strict=True):
        if among is None:
            continue
        are_labels = all(isinstance(each, (str, bool, int, float)) for each in among)
        if not are_labels or len({*among}) != len(among) or tuple(level or ()) != tuple(range(len(among))):
            raise ValueError(
                f"TableDensity expected labels of column {label!r} that differ, texts, truth values or numbers, one "
                f"for each level 0, 1, ... of {level}, got {shown(repr(among))}."
            )


def _index(column: Tensor, levels: Sequence[float]) -> Tensor:
    """Index of each value of a column in the levels, -1 if it is not there."""
    is_level = column[..., None] == column.new_tensor(levels)
    return torch.where(is_level.any(-1), is_level.int().argmax(-1), -1)
