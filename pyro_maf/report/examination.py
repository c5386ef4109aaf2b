"""Examination of a density with rows: their log-densities, their noise, and samples to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_maf._core.progress import bar
from pyro_maf._core.torch_state import reference_tensor, seeded, without_autocast
from pyro_maf.datasets import Table as NamedTable
from pyro_maf.distributions import ConditionalFlowPrior, FlowPrior
from pyro_maf.report.table import Given, Table, given_columns

__all__ = ["Examination", "LowRow", "examine"]

MOST_VALUES = 10_000_000
"""Maximum number of values that are scored; of more rows, a random part."""
PICTURED_ROWS = 10_000
PICTURED_VALUES = 2_500_000
LEAST_SAMPLES = 2000
LOWEST = 10
SEED = 0


@dataclass(frozen=True)
class LowRow:
    """A row of low density.

    Attributes:
        row: Its number in the table, from 1.
        log_prob: Log-density in nats.
        values: Its values.
        context: Its context as text, a category by its name; empty without one.
        dimension: The dimension of its noise that is furthest from 0.
        noise: That dimension's noise.
    """

    row: int
    log_prob: float
    values: list[float]
    context: list[str]
    dimension: int
    noise: float


@dataclass(frozen=True)
class Examination:
    """A density and the rows of its examination. Tensors are on the CPU, in float64.

    Attributes:
        names, context_names: Names of the columns.
        rows: Number of rows.
        is_held_out: True if they are the fit's validation rows.
        log_prob: Log-densities of the scored rows, (scored,), in nats.
        lowest: The rows with the lowest of them, in ascending order.
        data: A random part of them for pictures, (pictured, columns).
        noise: The noise of those, (pictured, D).
        samples: The same number of samples, or 2,000 if that is more, at the contexts of those; finite ones.
        samples_log_prob: Log-densities of the samples.
    """

    names: list[str]
    context_names: list[str]
    rows: int
    is_held_out: bool
    log_prob: Tensor
    lowest: list[LowRow]
    data: Tensor
    noise: Tensor
    samples: Tensor
    samples_log_prob: Tensor


def examine(
    density: FlowPrior | ConditionalFlowPrior,
    data: Any,
    context: Any,
    names: Sequence[str] | None,
    context_names: Sequence[str] | None,
    *,
    held_out: Any = None,
    progress: bool | str = False,
) -> Examination:
    """Examine a density with rows of data; the global random state is left unchanged.

    Memory is bounded for any number of rows: they are read in blocks, and pictures are of a part.

    Args:
        density: A density with a model that `fit` can fit.
        data, context, names, context_names, progress: As in `write_report`.
        held_out: The fit's validation rows, a pair (data, context), or None if unavailable.

    Raises:
        TypeError, ValueError: As `write_report`.
    """
    tables = _tables(density, data, context, names, context_names)
    given = given_columns(data, tables)
    numbers = None if not isinstance(data, NamedTable) else data.rows
    generator = np.random.default_rng(SEED)
    width = len(tables[0].names)
    scored = _some(np.arange(len(tables[0])), MOST_VALUES // width, generator)
    pictured = _some(scored, min(PICTURED_ROWS, PICTURED_VALUES // width), generator)
    # More than one sample for each of a few rows, or the samples' histograms would be mostly noise.
    sampled = pictured.repeat(math.ceil(LEAST_SAMPLES / len(pictured)))
    total = len(scored) + len(pictured) + len(sampled)
    with torch.no_grad(), bar(progress, "{task.description}", "{task.percentage:.0f} %") as shown:
        looked = _Reader(density, tables, lambda done: shown.show("report", done, total))
        log_prob = looked.log_prob(scored)
        data_rows, noise = looked.noise(pictured)
        samples, samples_log_prob = looked.samples(sampled)
        order = log_prob.argsort()[:LOWEST].numpy()
        lowest = looked.low_rows(scored[order], log_prob[order], given, numbers)
        is_held_out = looked.is_all(held_out)
    return Examination(
        names=tables[0].names,
        context_names=[column.name for column in given],
        rows=len(tables[0]),
        is_held_out=is_held_out,
        log_prob=log_prob,
        lowest=lowest,
        data=data_rows,
        noise=noise,
        samples=samples,
        samples_log_prob=samples_log_prob,
    )


class _Reader:
    """Reader of rows of the tables, with their log-densities, noise and samples."""

    def __init__(
        self, density: FlowPrior | ConditionalFlowPrior, tables: list[Table], show: Callable[[int], None]
    ) -> None:
        self.density = density
        self.prior: FlowPrior = density.unwrapped
        self.tables = tables
        self.show = show
        self.done = 0
        like = reference_tensor(density)
        self.like = torch.zeros(()) if like is None else like
        self.likes = [self.like.to(dtype) for dtype in (density.dtype, density.context_dtype)]

    def read(self, index: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor | None]:
        """Read data and context at `index`, and check them."""
        data, *context = (table.take(index, like) for table, like in zip(self.tables, self.likes, strict=False))
        support = self.prior.units.support
        outside = support.outside(data)
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"write_report expected data inside the support, {support.name}, where the density is not 0, got data "
                f"row {index[row] + 1} (counted from 1) outside: leave such rows out."
            )
        return data, context[0] if context else None

    def at(self, context: Tensor | None) -> Any:
        """Condition the density on a context, if any."""
        return self.density if context is None else self.density.condition(context)  # type: ignore[operator]

    def blocks(self, index: np.ndarray[Any, Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Iterate over blocks of data and context at `index`."""
        for block in self.tables[0].blocks(index):
            yield self.read(block)
            self.done += len(block)
            self.show(self.done)

    def log_prob(self, index: np.ndarray[Any, Any]) -> Tensor:
        """Return the log-densities of the rows at `index`."""
        return torch.cat([self.at(context).log_prob(data).double().cpu() for data, context in self.blocks(index)])

    def noise(self, index: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        """Return the rows at `index`, and their noise."""
        parts = []
        for data, context in self.blocks(index):
            # As `log_prob` does for itself: a rounded network would be a different density.
            u = without_autocast(self.prior.noise, data, context, like=self.like)
            parts.append((data.double().cpu(), u.double().cpu()))
        data, noise = map(torch.cat, zip(*parts, strict=True))
        return data, noise

    def samples(self, index: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        """Draw a sample at the context of each row at `index`; return the finite ones and their log-densities."""
        parts = []
        with seeded(SEED, self.like.device):
            for data, context in self.blocks(index):
                density = self.at(context)
                samples = density.sample((len(data),) if context is None else ())
                parts.append((samples.double().cpu(), density.log_prob(samples).double().cpu()))
        samples, log_prob = map(torch.cat, zip(*parts, strict=True))
        finite = samples.isfinite().all(-1)
        return samples[finite], log_prob[finite]

    def is_all(self, rows: Any) -> bool:
        """True if the tables hold exactly these rows, a pair (data, context)."""
        if rows is None or len(rows[0]) != len(self.tables[0]):
            return False
        index = np.arange(len(self.tables[0]))
        return all(
            torch.equal(table.take(block, self.like), part[torch.from_numpy(block)].to(self.like))
            for table, part in zip(self.tables, rows, strict=False)
            for block in table.blocks(index)
        )

    def low_rows(self, index: np.ndarray[Any, Any], log_prob: Tensor, given: list[Given], numbers: Any) -> list[LowRow]:
        """Return the rows at `index`, with their numbers in their table."""
        data, context = self.read(index)
        noise = without_autocast(self.prior.noise, data, context, like=self.like)
        furthest = noise.abs().argmax(-1)
        return [
            LowRow(
                row=int(index[i] + 1 if numbers is None else numbers[index[i]]),
                log_prob=float(log_prob[i]),
                values=data[i].tolist(),
                context=[] if context is None else [column.text(context[i].tolist()) for column in given],
                dimension=int(furthest[i]),
                noise=float(noise[i, furthest[i]]),
            )
            for i in range(len(index))
        ]


def _tables(density: Any, data: Any, context: Any, names: Any, context_names: Any) -> list[Table]:
    """Return the tables of data and, for a conditional density, of context."""
    if isinstance(data, NamedTable):
        if any(value is not None for value in (context, names, context_names)):
            raise ValueError("write_report got a context or names beside a Table, which has its own: leave them out.")
        names, context = data.names, data.context
        context_names = None if context is None else data.context_names
        data = data.data
    if not isinstance(density, ConditionalFlowPrior):
        if context is not None or context_names is not None:
            raise ValueError("write_report got a context for a density that takes none: leave it out.")
        return [Table("data", data, density.event_shape[0], names)]
    if context is None:
        raise ValueError(f"write_report expected a context with {density.context_dim} columns, got none.")
    tables = [
        Table("data", data, density.density.event_shape[0], names),
        Table("context", context, density.context_dim, context_names),
    ]
    if len(tables[0]) != len(tables[1]):
        raise ValueError(
            f"write_report expected as many rows of context as of data, got {len(tables[1])} and {len(tables[0])}."
        )
    return tables


def _some(index: np.ndarray[Any, Any], most: int, generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """Draw at most `most` of an index, at least one, in their order."""
    if len(index) <= most:
        return index
    return np.sort(generator.choice(index, max(1, most), replace=False))
