"""A comparison as a table: on the terminal, in Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from pyro_maf.experiments.comparison import Comparison
from pyro_maf.experiments.scores import Estimate, Score

__all__ = ["as_csv", "as_json", "as_markdown", "as_table", "lines"]

Line = dict[str, Any]


def lines(found: Comparison, published: Mapping[str, float] | None = None) -> list[Line]:
    """Return a flat record for each model, the source of all forms of the table.

    Log-likelihoods are in nats, `error` and the like are two standard errors; `behind` is the mean gain of the best
    model for a test row, paired by row.

    Args:
        found: The comparison.
        published: Published figures to show beside ours, by name.
    """
    best = found.best
    records = []
    for score in found.scores:
        record = _record(score, None if score is best or best is None else best.ahead_of(score))
        if published is not None:
            record["published"] = published.get(score.candidate.name)
        records.append(record)
    return records


def _record(score: Score, behind: Estimate | None) -> Line:
    bits = score.bits
    record: Line = {"model": score.candidate.name, "test": score.test.mean, "error": score.test.error}
    if bits is not None:
        record |= {"bits_per_pixel": bits.mean, "bits_error": bits.error}
    return record | {
        "behind": None if behind is None else behind.mean,
        "behind_error": None if behind is None else behind.error,
        "validation": score.validation,
        "hidden": score.candidate.widths,
        "parameters": score.parameters,
        "epochs": score.epochs,
        "seconds": score.seconds,
        "stop_reason": score.stop_reason,
    }


def as_json(found: Comparison, published: Mapping[str, float] | None = None) -> str:
    """Format the records as JSON."""
    about = {"data": found.data, "input_dim": found.input_dim, "context_dim": found.context_dim}
    rows = dict(zip(("train", "validation", "test"), found.rows, strict=True))
    rest = {"models": lines(found, published), "failed": found.failed, "missing": list(found.missing)}
    return json.dumps(about | {"rows": rows} | rest, indent=1) + "\n"


def as_csv(found: Comparison, published: Mapping[str, float] | None = None) -> str:
    """Format the records as CSV, with a header."""
    records = lines(found, published)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]) if records else ["model"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def as_markdown(found: Comparison, published: Mapping[str, float] | None = None) -> str:
    """Format the table of `as_table` in Markdown, the best model in bold."""
    heading, rows = _cells(found, published)
    ruled = [heading, ["---", *["---:"] * (len(heading) - 1)]]
    for cells, is_best in rows:
        ruled.append([f"**{cells[0]}**", f"**{cells[1]}**", *cells[2:]] if is_best else cells)
    return "".join(f"| {' | '.join(row)} |\n" for row in ruled)


def as_table(found: Comparison, published: Mapping[str, float] | None = None) -> Table:
    """Format the table for rich, the best model in bold."""
    given = f", {found.context_dim} of context" if found.context_dim else ""
    title = f"{found.data} ({found.input_dim}{given}): nats a test row, two standard errors"
    heading, rows = _cells(found, published)
    # Not a str, in which rich would interpret markup in a name.
    table = Table(title=Text(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(heading):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for cells, is_best in rows:
        table.add_row(*cells, style="bold" if is_best else None)
    return table


def _cells(found: Comparison, published: Mapping[str, float] | None) -> tuple[list[str], list[tuple[list[str], bool]]]:
    """Return the header, and each row with a flag for the best model."""
    images = any(score.bits is not None for score in found.scores)
    heading = ["model", "test", *["bits per pixel"] * images, "behind the best", "hidden", "weights", "s"]
    heading += ["paper"] * (published is not None)
    rows = []
    for score in found.scores:
        is_best = score is found.best
        name = score.candidate.name
        cells = [name, str(score.test), *[str(score.bits)] * images]
        cells += ["" if is_best or found.best is None else str(found.best.ahead_of(score)), score.candidate.widths]
        cells += [f"{score.parameters:,}", f"{score.seconds:.0f}"]
        if published is not None:
            cells.append(f"{published[name]:.2f}" if name in published else "")
        rows.append((cells, is_best))
    return heading, rows
