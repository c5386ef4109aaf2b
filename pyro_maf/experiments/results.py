"""Scores of fitted models, and their comparison as a table: on the terminal, in Markdown and in JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from pyro_maf.experiments.models import Candidate

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Comparison", "Estimate", "Score", "as_json", "as_markdown", "as_table", "estimate"]

Published: TypeAlias = Mapping[str, float] | None
"""Published results by model, shown for comparison."""


@dataclass(frozen=True)
class Estimate:
    """A mean and two standard errors."""

    mean: float
    error: float

    def __str__(self) -> str:
        digits = 3 if self.error < 0.02 else 2
        return f"{self.mean:.{digits}f} ± {self.error:.{digits}f}"


@dataclass(frozen=True)
class Score:
    """A fitted candidate and its scores.

    Attributes:
        candidate: The candidate.
        log_prob: The log-density of each test row, in nats, (rows,), in float64.
        bits_per_pixel: Bits per pixel of each test row, for images, or None.
        validation: Mean log-likelihood of the validation rows, in nats.
        parameters: Number of fitted parameters.
        epochs: Number of epochs, 0 for a closed form.
        seconds: Duration of the fit.
        stop_reason: Reason for stopping.
    """

    candidate: Candidate
    log_prob: Tensor = field(repr=False)
    bits_per_pixel: Tensor | None = field(repr=False)
    validation: float
    parameters: int
    epochs: int
    seconds: float
    stop_reason: str

    @property
    def test(self) -> Estimate:
        """Test log-likelihood in nats."""
        return estimate(self.log_prob)

    @property
    def bits(self) -> Estimate | None:
        """Bits per pixel of the test rows, for images."""
        return None if self.bits_per_pixel is None else estimate(self.bits_per_pixel)

    def ahead_of(self, other: Score) -> Estimate:
        """Mean gain over another score, in nats per test row, paired by row so that common difficulty cancels."""
        return estimate(self.log_prob - other.log_prob)


def estimate(values: Tensor) -> Estimate:
    """Return the mean of independent values, and two standard errors.

    Example:
        >>> estimate(torch.tensor([1.0, 3.0]))
        Estimate(mean=2.0, error=2.0)
    """
    error = 2 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), error)


@dataclass(frozen=True)
class Comparison:
    """The models fitted to a data set, with the test score of each.

    Attributes:
        data: Name of the data.
        input_dim, context_dim: D and C.
        rows: Number of rows for training, validation and testing.
        tried: All fits.
        failed: Reasons why models have no score, by name.
        missing: Names of the models that were not reached before an interruption.
    """

    data: str
    input_dim: int
    context_dim: int
    rows: tuple[int, int, int]
    tried: tuple[Score, ...]
    failed: dict[str, str]
    missing: tuple[str, ...]

    @property
    def scores(self) -> tuple[Score, ...]:
        """One score per name, in the requested order; among the widths tried, that with the best validation score."""
        chosen: dict[str, Score] = {}
        for score in self.tried:
            best = chosen.get(score.candidate.name)
            if best is None or score.validation > best.validation:
                chosen[score.candidate.name] = score
        return tuple(chosen.values())

    @property
    def best(self) -> Score | None:
        """The score with the highest test log-likelihood, if any."""
        return max(self.scores, key=lambda score: score.test.mean, default=None)

    def __str__(self) -> str:
        return as_markdown(self)


def as_json(comparison: Comparison, published: Published = None) -> str:
    """Format the comparison as JSON, with a flat record for each model.

    Log-likelihoods are in nats; `error` and similar entries are two standard errors; `behind` is the best model's mean
    gain per test row, paired by row.
    """
    about = {name: getattr(comparison, name) for name in ("data", "input_dim", "context_dim")}
    about["rows"] = dict(zip(("train", "validation", "test"), comparison.rows, strict=True))
    best, models = comparison.best, []
    for score in comparison.scores:
        bits, behind = score.bits, None if best is None or score is best else best.ahead_of(score)
        record: dict[str, str | float | None] = {
            "model": score.candidate.name,
            "test": score.test.mean,
            "error": score.test.error,
        }
        if bits is not None:
            record |= {"bits_per_pixel": bits.mean, "bits_error": bits.error}
        record |= {
            "behind": None if behind is None else behind.mean,
            "behind_error": None if behind is None else behind.error,
            "validation": score.validation,
            "hidden": score.candidate.widths,
            "parameters": score.parameters,
            "epochs": score.epochs,
            "seconds": score.seconds,
            "stop_reason": score.stop_reason,
        }
        if published is not None:
            record["published"] = published.get(score.candidate.name)
        models.append(record)
    about |= {"models": models, "failed": comparison.failed, "missing": list(comparison.missing)}
    return json.dumps(about, indent=1) + "\n"


def as_markdown(comparison: Comparison, published: Published = None) -> str:
    """Format the table of `as_table` in Markdown, the best model in bold."""
    heading, rows = _cells(comparison, published)
    ruled = [heading, ["---", *["---:"] * (len(heading) - 1)]]
    for cells, is_best in rows:
        ruled.append([f"**{cells[0]}**", f"**{cells[1]}**", *cells[2:]] if is_best else cells)
    return "".join(f"| {' | '.join(row)} |\n" for row in ruled)


def as_table(comparison: Comparison, published: Published = None) -> Table:
    """Format the table for rich, the best model in bold."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    context = f", {comparison.context_dim} of context" if comparison.context_dim else ""
    title = f"{comparison.data} ({comparison.input_dim}{context}): nats a test row, two standard errors"
    heading, rows = _cells(comparison, published)
    # Not a str, in which rich would interpret markup in a name.
    table = Table(title=Text(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(heading):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for cells, is_best in rows:
        table.add_row(*cells, style="bold" if is_best else None)
    return table


def _cells(comparison: Comparison, published: Published) -> tuple[list[str], list[tuple[list[str], bool]]]:
    """Return the header, and each row with a flag for the best model."""
    scores, best = comparison.scores, comparison.best
    heading = ["model", "test", *["bits per pixel"] * any(score.bits is not None for score in scores)]
    heading += ["behind the best", "hidden", "weights", "s", *["paper"] * (published is not None)]
    rows = []
    for score in scores:
        is_best = score is best
        name = score.candidate.name
        cells = [name, str(score.test), *[str(score.bits)] * ("bits per pixel" in heading)]
        cells += ["" if is_best or best is None else str(best.ahead_of(score)), score.candidate.widths]
        cells += [f"{score.parameters:,}", f"{score.seconds:.0f}"]
        if published is not None:
            cells.append(f"{published[name]:.2f}" if name in published else "")
        rows.append((cells, is_best))
    return heading, rows
