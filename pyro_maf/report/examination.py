"""Examination of a density on rows: their log-densities, their noise, and samples to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, cast

import torch
from torch import Tensor

from pyro_maf._core.checks import InputError
from pyro_maf._core.progress import bar
from pyro_maf._core.torch_state import reference_tensor, seeded, without_autocast
from pyro_maf.distributions import ConditionalDensity, FlowPrior, TableDensity
from pyro_maf.report.kolmogorov import Calibration, calibration_of, radius_of
from pyro_maf.tables import MappedRows, Reader, Rows, rows_of
from pyro_maf.tables.categories import Label
from pyro_maf.tables.named_rows import NamedRows
from pyro_maf.tables.reader import Labels
from pyro_maf.tables.rows import in_proportion, mean_and_error
from pyro_maf.training.preparation import Fitted
from pyro_maf.training.scores import log_prob_of

__all__ = ["Examination", "LowRow", "examine"]

MOST_VALUES = 10_000_000
"""Maximum number of values that are scored; if there are more, a random subset of the rows is."""
VALUES_AT_ONCE = 2**18
ROWS_AT_ONCE = 4096
PICTURED_ROWS = 10_000
PICTURED_VALUES = 2_500_000
LEAST_SAMPLES = 2000
LOWEST = 10
NOTHING: Mapping[str, Rows | None] = {}
SEED = 0
MANY_DIGITS = 10_000
"""Size from which on values, such as time stamps, may share more than the four digits shown for others."""


@dataclass(frozen=True)
class LowRow:
    """A row of low density.

    Attributes:
        row: Number of the row in the table, from 1.
        log_prob: Log-density in nats.
        values: Values of the row.
        context: Context of the row as text, with categories by name; empty without context.
        dimension: The dimension of its noise that is furthest from 0.
        noise: Noise in that dimension.
    """

    row: int
    log_prob: float
    values: list[float]
    context: list[str]
    dimension: int
    noise: float


@dataclass(frozen=True)
class Examination:
    """A density and the rows on which it is examined. Tensors are on the CPU, in float64.

    Attributes:
        names, context_names: Names of the columns.
        noise_names: Names of the columns that have noise: all that are not categorical.
        rows: Number of rows.
        role: "test" or "validation" if they are rows that the fit held out for this purpose, otherwise "".
        log_prob: Log-densities of the scored rows, (scored,), in nats.
        weights: Weights of the scored rows, (scored,), or None.
        lowest: The rows with the lowest log-densities, in ascending order.
        data: A random subset of the rows for pictures, (pictured, columns), in proportion to the weights.
        noise: Noise of these rows, (pictured, D).
        samples: Finite samples at the contexts of these rows, as many as they are, but at least 2,000.
        samples_log_prob: Log-densities of the samples.
    """

    names: list[str]
    context_names: list[str]
    noise_names: list[str]
    rows: int
    role: str
    log_prob: Tensor
    weights: Tensor | None
    lowest: list[LowRow]
    data: Tensor
    noise: Tensor
    samples: Tensor
    samples_log_prob: Tensor

    @property
    def mean_log_prob(self) -> tuple[float, float]:
        """Weighted mean log-density of the scored rows, and its standard error, NaN for a single row."""
        return mean_and_error(self.log_prob, self.weights)

    @property
    def has_radius(self) -> bool:
        """True if the noise has several dimensions, and hence a radius."""
        return self.noise.shape[1] > 1

    @property
    def scores(self) -> Tensor:
        """The noise and, if it has several dimensions, the normal scores of its radius, (pictured, D or D + 1)."""
        return torch.cat([self.noise, radius_of(self.noise)[:, None]], -1) if self.has_radius else self.noise

    @property
    def score_names(self) -> list[str]:
        """Names of the columns of `scores`."""
        size = self.noise.shape[1]
        # A simplex has one column more than its noise has dimensions.
        names = self.noise_names if len(self.noise_names) == size else [f"u{i + 1}" for i in range(size)]
        return [*names, *["|u|²"] * self.has_radius]

    @property
    def calibration(self) -> Calibration:
        """Calibration of the noise and of its radius."""
        return calibration_of(self.scores, self.score_names)


def examine(
    density: Fitted, source: NamedRows, *, held_out: Mapping[str, Rows | None] = NOTHING, progress: bool | str = False
) -> Examination:
    """Examine a density on rows of data; the global random state is unchanged.

    Memory is bounded for any number of rows: they are read in blocks, and pictures show a subset.

    Args:
        density: A density with a model that `fit` can fit.
        source: The rows, with the columns of the density.
        held_out: The rows that the fit held out, by role; None if unavailable.
        progress: As in `write_report`.

    Raises:
        TypeError, ValueError: As `write_report`.
    """
    table = _read(density, source)
    total, width = table.rows.data.shape
    generator = torch.Generator().manual_seed(SEED)
    scored = _subset(torch.arange(total), MOST_VALUES // width, generator)
    weights = None if source.weights is None else table.rows.take(scored).weights
    most = min(PICTURED_ROWS, PICTURED_VALUES // width)
    if weights is None:
        pictured = _subset(scored, most, generator)
    else:
        pictured = scored[in_proportion(weights, max(1, min(most, len(scored))))]
    # Several samples per row if there are few rows, since the samples' histograms would be mostly noise.
    sampled = pictured.repeat_interleave(math.ceil(LEAST_SAMPLES / len(pictured)))
    with torch.no_grad(), bar(progress, "report", "{task.percentage:.0f} %") as shown:
        work = len(scored) + len(pictured) + len(sampled)
        scorer = _Scorer(density, table, lambda done: shown.show("", done, work))
        log_prob = scorer.log_prob(scored)
        lowest = log_prob.argsort()[:LOWEST]
        return Examination(
            table.names,
            [name for name, _ in table.context_columns],
            _noise_names(density, table.names),
            total,
            next((role for role, rows in held_out.items() if rows is not None and scorer.are_all(rows)), ""),
            log_prob,
            weights,
            scorer.low_rows(scored[lowest], log_prob[lowest]),
            *scorer.noise(pictured),
            *scorer.samples(sampled),
        )


def _noise_names(density: Fitted, names: list[str]) -> list[str]:
    """Names of the columns that have noise."""
    inner = density.unwrapped
    return [names[index] for index in inner.numeric] if isinstance(inner, TableDensity) else names


# -- rows -------------------------------------------------------------------------------------------------------------


class _Table(NamedTuple):
    """Rows, with the names of their columns and the number of each.

    Attributes:
        rows: The rows, in memory or on disk.
        names: Names of the columns of data.
        context_columns: Names of the context columns, with the categories of one-hot columns, or None.
        number: Number of the row at an index, counted from 1.
    """

    rows: Rows | MappedRows
    names: list[str]
    context_columns: list[tuple[str, list[Label] | None]]
    number: Callable[[int], int]


def _read(density: Fitted, source: NamedRows) -> _Table:
    """Read the rows with their weights and, for a conditional density, their context."""
    prior = density.unwrapped
    (width,), context_width, shape = prior.event_shape, prior.context_dim, prior.context_shape
    names = _labels(source.layout.labels, "x", width)
    columns = source.context_layout.columns
    if len(source.context_layout.encoded_labels) != context_width:
        columns = [(name, None) for name in _labels([], "c", context_width)]
    if len(shape) > 1:
        columns = []  # an image has none
    number = source.labels.count or (lambda index: index + 1)
    labels = Labels(names, number), Labels([name for name, _ in columns], number)
    reader = Reader(
        "write_report", width, context_width, labels=labels[0], context_labels=labels[1], context_shape=shape
    )
    return _Table(rows_of(source.data, source.context, reader, source.weights), names, columns, number)


def _labels(labels: list[str], letter: str, width: int) -> list[str]:
    """Return the names of the columns if there are `width`, otherwise x1, x2 and so on."""
    return labels if len(labels) == width else [f"{letter}{i + 1}" for i in range(width)]


def _subset(index: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Draw at most `most` elements of an index, at least one, keeping their order."""
    if len(index) <= most:
        return index
    return index[torch.randperm(len(index), generator=generator)[: max(1, most)]].sort().values


# -- scores -----------------------------------------------------------------------------------------------------------


class _Scorer:
    """Log-densities, noise and samples of rows of a table.

    Args:
        density: The density.
        table: The rows.
        show: Function to call with the number of finished rows.
    """

    def __init__(self, density: Fitted, table: _Table, show: Callable[[int], None]) -> None:
        self.density = density
        self.prior: FlowPrior | TableDensity = density.unwrapped
        self.table = table
        self.show = show
        self.done = 0
        like = reference_tensor(density)
        self.like = torch.zeros(()) if like is None else like

    def read(self, index: Tensor) -> Rows:
        """Read data and context at `index`, and check that the data are inside the support."""
        rows = self.table.rows.take(index).rounded_for(self.prior)
        outside = self.prior.outside(rows.data).nonzero()
        if len(outside):
            row = int(index[outside[0, 0]])
            raise InputError(
                f"write_report expected data inside the support, {self.prior.support_name}, where the density is not "
                f"0, got data row {self.table.number(row)} (counted from 1) outside: leave such rows out.",
                row=row,
            )
        return rows

    def blocks(self, index: Tensor) -> Iterator[Rows]:
        """Iterate over blocks of the rows at `index`."""
        for block in self._split(index):
            yield self.read(block)
            self.done += len(block)
            self.show(self.done)

    def _split(self, index: Tensor) -> tuple[Tensor, ...]:
        return index.split(max(1, min(ROWS_AT_ONCE, VALUES_AT_ONCE // len(self.table.names))))

    def log_prob(self, index: Tensor) -> Tensor:
        """Return the log-densities of the rows at `index`."""
        parts = (part for rows in self.blocks(index) for part in log_prob_of(self.density, rows.data, rows.context))
        return torch.cat([part.double() for part in parts])

    def noise(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows at `index`, and their noise."""
        parts = [(rows.data.double(), self._noise(rows)) for rows in self.blocks(index)]
        data, noise = map(torch.cat, zip(*parts, strict=True))
        return data, noise

    def _noise(self, rows: Rows) -> Tensor:
        data, context, _ = rows.to(self.like.device)
        # As in `log_prob`: a rounded network would be a different density.
        return without_autocast(self.prior.noise, data, context, like=self.like).double().cpu()

    def samples(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a sample at the context of each row at `index`; return the finite ones and their log-densities."""
        parts = []
        with seeded(SEED, self.like.device):
            for rows in self.blocks(index):
                data, context, _ = rows.to(self.like.device)
                at = self.prior if context is None else cast("ConditionalDensity", self.density).condition(context)
                samples = at.sample((len(data),) if context is None else ())
                parts.append((samples.double().cpu(), at.log_prob(samples).double().cpu()))
        samples, log_prob = map(torch.cat, zip(*parts, strict=True))
        finite = samples.isfinite().all(-1)
        return samples[finite], log_prob[finite]

    def are_all(self, rows: Rows) -> bool:
        """Return whether the table holds exactly these rows."""
        table, total = self.table.rows, len(self.table.rows.data)
        return len(rows.data) == total and all(
            torch.equal(one, other)
            for block in self._split(torch.arange(total))
            for one, other in zip(
                table.take(block).rounded_for(self.prior)[:2], rows.take(block).rounded_for(self.prior)[:2], strict=True
            )
            if one is not None and other is not None
        )

    def low_rows(self, index: Tensor, log_prob: Tensor) -> list[LowRow]:
        """Return the rows at `index`, with their numbers in the table."""
        rows = self.read(index)
        noise = self._noise(rows)
        furthest = noise.abs().argmax(-1)
        contexts = [[]] * len(index) if rows.context is None else rows.context.tolist()
        return [
            LowRow(
                row=self.table.number(int(index[i])),
                log_prob=float(log_prob[i]),
                values=rows.data[i].tolist(),
                context=_texts(contexts[i], self.table.context_columns),
                dimension=int(furthest[i]),
                noise=float(noise[i, furthest[i]]),
            )
            for i in range(len(index))
        ]


def _texts(context: Sequence[float], columns: Sequence[tuple[str, list[Label] | None]]) -> list[str]:
    """The values of a row of context, with one-hot columns shown as the name of the category."""
    numbers, texts = iter(context), []
    for _, categories in columns:
        if categories is not None:
            hot = list(islice(numbers, len(categories))).index(1.0)
            texts.append(str(categories[hot]))
        else:
            number = next(numbers)
            texts.append(f"{number:.4g}" if abs(number) < MANY_DIGITS else f"{number:.10g}")
    return texts
