"""The page of a report: headline figures, tables and pictures, each picture with a text alternative."""

from __future__ import annotations

import base64
import io
import math
import os
import warnings
from collections.abc import Sequence
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pyro_maf import plotting
from pyro_maf._core.files import write_whole
from pyro_maf._core.messages import require
from pyro_maf._core.progress import check_progress
from pyro_maf._core.torch_state import reference_tensor
from pyro_maf.distributions import TableDensity
from pyro_maf.report.examination import Examination, examine
from pyro_maf.report.kolmogorov import distance_between, distance_to_uniform
from pyro_maf.tables import Rows
from pyro_maf.tables.layout import TableLike
from pyro_maf.tables.named_rows import named_rows
from pyro_maf.tables.table import Table
from pyro_maf.training import FitResult
from pyro_maf.training.preparation import FITTED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["write_report"]

MOST_VALUES_OF_A_ROW = 12
MOST_MARGINALS = 24
MOST_NOISE = 12
MOST_PAIRS = 6
CORRELATED_COLUMNS = 1000
"""Maximum number of columns among which the most correlated are searched: the cost is quadratic."""
LONGEST_NAME = 24
ABREAST = 2
"""Number of panels side by side, legible on a phone."""
DPI = 96
ROLES = {
    "test": ("test rows", "; these rows took no part in any choice"),
    "validation": ("validation rows", "; these rows also chose the epoch"),
    "": ("these rows", ""),
}
"""Wording for the rows by their role in the fit, and the headline's remark about them."""


class Headline(NamedTuple):
    """A headline figure: its name, its value, and a remark."""

    name: str
    value: str
    note: str = ""


def write_report(
    path: str | os.PathLike[str],
    result: FitResult,
    data: TableLike | Table | None = None,
    *,
    context: TableLike | None = None,
    weights: str | TableLike | None = None,
    command: str = "",
    progress: bool | str = True,
) -> None:
    r"""Write a report of a fit as a single HTML page, which needs no network and no other file.

    It shows the results and warnings of the fit; the mean log-likelihood of `data` with two standard errors; the
    calibration of the noise of `data` against the standard normal, by probability integral transforms, QQ plots and the
    largest Kolmogorov distance; histograms and pairs of columns of data and samples; log-densities of both; the rows
    with the lowest density; losses over the epochs; and the command.

    By default it uses the fit's test rows, on which no choice was based, or else its validation rows. Other rows should
    be new to the fit: rows that it was trained on look better than new ones.

    Args:
        path: The file, which by convention ends in .html. An existing file is replaced once everything is written.
        result: The result of `pyro_maf.fit`.
        data: Rows (N, D), or (N, D + 1) on a simplex, as in `fit`; by default those that the fit held out. Named
            columns are matched by name, and columns without names are called x1, x2 and so on. A `np.memmap` is read in
            blocks. For a table of `read_table` with its context, the page has the table's name in its title and refers
            to rows by their numbers in the file.
        context: Rows (N, C) of the same kinds, if the density takes a context that is not among the columns of `data`.
        weights: Weight of each row, as in `fit`, for the mean log-likelihood, the calibration and the pictures.
        command: The command of the fit, to show.
        progress: A bar on stderr: True on a terminal or in a notebook, False never, "always" in any case.

    Cost:
        One `log_prob` per row, for up to 10 million values and a random subset of the rows beyond that; and for up to
        10,000 rows a sample, its `log_prob` and the noise. A page has about a megabyte for any number of rows.

    Raises:
        TypeError: If the result is not from `fit`, or data are not numeric.
        ValueError: If data have the wrong width, no rows, or a row that is not finite or outside the support; the
            message has the row, counted from 1. If a context is missing, superfluous or of another length.
        FileNotFoundError: If the folder of `path` does not exist.
        ModuleNotFoundError: Without the `cli` extra.

    Example:
        >>> import tempfile, pyro_maf
        >>> data = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
        >>> result = pyro_maf.fit(pyro_maf.MAF(2, num_layers=1), data[:200], max_epochs=2, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = Path(folder) / "report.html"
        ...     write_report(page, result, data[200:])
        ...     "Kolmogorov" in page.read_text(encoding="utf-8")
        True
    """
    require("write_report", "jinja2", "matplotlib")
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"write_report expected an existing folder for {path.name}, got {path.parent}.")
    if not isinstance(result, FitResult) or not isinstance(result.density, FITTED):
        raise TypeError(f"write_report expected what fit returned, a FitResult, got {type(result).__name__}.")
    check_progress("write_report", progress)
    label = data.label if isinstance(data, Table) else ""
    if data is None:
        data, context, weights = _held_out(result)
    rows = named_rows("write_report", data, context, weights)
    examination = examine(
        result.density,
        rows.as_in("write_report", result.layout, result.context_layout),
        held_out={"test": result.test_rows, "validation": result.validation_rows},
        progress=progress,
    )
    write_whole(path, _page(result, examination, command, label).encode())


def _held_out(result: FitResult) -> Rows:
    """Return the test rows of a fit, or else the validation rows."""
    rows = result.validation_rows if result.test_rows is None else result.test_rows
    if rows is None:
        raise ValueError("write_report expected rows, as this result holds none: give them as data.")
    return rows


def _page(result: FitResult, examination: Examination, command: str, label: str) -> str:
    from jinja2 import Environment, StrictUndefined

    template = files("pyro_maf.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pit, qq = _noise(examination)
    comparison = result.comparison
    return environment.from_string(template).render(
        title=_title(result, examination, label),
        figures=_figures(result, examination),
        command=command,
        warnings=[*result.warnings, *(comparison.warnings if comparison else ())],
        comparison=str(comparison) if comparison else "",
        calibration=examination.calibration,
        has_radius=examination.has_radius,
        pit=pit,
        qq=qq,
        marginals=_marginals(examination),
        pairs=_pairs(examination) if len(examination.names) > 1 else None,
        log_densities=_log_densities(examination),
        lowest=_lowest(result, examination),
        losses=_losses(result),
        model=repr(result.density),
        examination=examination,
    )


def _title(result: FitResult, examination: Examination, label: str) -> str:
    given = f" given {_count(len(examination.context_names), 'context column')}" if examination.context_names else ""
    inner = result.density.unwrapped
    flow = (inner.prior if isinstance(inner, TableDensity) else inner).model
    model = f"{type(flow).__name__} of {_count(len(examination.names), 'column')}{given}"
    return f"{label}: {model}, {date.today()}" if label else f"{model}, {date.today()}"


def _figures(result: FitResult, examination: Examination) -> list[Headline]:
    weight = reference_tensor(result.density)
    dtype = "" if weight is None else str(weight.dtype).removeprefix("torch.")
    parameters = f"{sum(parameter.numel() for parameter in result.density.parameters()):,}"
    columns = f"{len(examination.names):,}"
    validation = Headline(
        "Validation in the fit", f"{result.validation_log_likelihood:.3f}", "nats, of rows that chose the epoch"
    )
    return [
        _log_likelihood(examination),
        *[validation] * (examination.role != "validation"),
        _rows(result, examination),
        Headline("Columns", columns, _count(len(examination.context_names), "context column", none="no context")),
        Headline("Epochs", f"{result.epochs:,}", f"best: {result.best_epoch:,}"),
        Headline("Time", _duration(result.seconds), "for the fit"),
        Headline("Stopped", result.stop_reason, _count(result.skipped_steps, "step", none="no steps") + " skipped"),
        Headline("Parameters", parameters, dtype),
    ]


def _log_likelihood(examination: Examination) -> Headline:
    """Return the mean log-likelihood of the rows, with two standard errors if there are two rows or more."""
    mean, error = examination.mean_log_prob
    value = f"{mean:.3f}"
    if math.isfinite(error):
        value += f" ± {2 * error:.3f}"
    role, note = ROLES[examination.role]
    return Headline(f"Log-likelihood of {role}", value, f"nats per row, ± two standard errors{note}")


def _rows(result: FitResult, examination: Examination) -> Headline:
    scored, rows = len(examination.log_prob), examination.rows
    notes = [f"held out for {examination.role}"] * bool(examination.role)
    notes += [f"{scored:,} of them, drawn at random, were scored"] * (scored < rows)
    is_part = examination.role == "test" or (examination.role and result.validation_places is not None)
    return Headline("Rows", f"{rows:,} of {result.rows:,}" if is_part else f"{rows:,}", "; ".join(notes))


def _lowest(result: FitResult, examination: Examination) -> dict[str, object]:
    inner = result.density.unwrapped
    labels = (inner.layout.as_labels() if isinstance(inner, TableDensity) else []) or [None] * len(examination.names)
    columns, contexts = (names[:MOST_VALUES_OF_A_ROW] for names in (examination.names, examination.context_names))
    digits = [_digits(column) for column in examination.data.unbind(1)[: len(columns)]]
    rows = [
        {
            "row": f"{low.row:,}",
            "log_prob": f"{low.log_prob:.2f}",
            "furthest": examination.score_names[low.dimension],
            "noise": f"{low.noise:+.1f}",
            "values": [
                f"{value:.{count}g}" if among is None else str(among[int(value)])
                for value, count, among in zip(low.values, digits, labels, strict=False)
            ],
            "context": list(zip(contexts, low.context, strict=False)),
        }
        for low in examination.lowest
    ]
    left_out = len(examination.names) - len(columns) + len(examination.context_names) - len(contexts)
    return {"columns": [*columns, *contexts], "rows": rows, "left_out": left_out}


def _digits(column: torch.Tensor) -> int:
    """Number of digits that distinguish the values of a column: 4, plus the number of leading digits they all share."""
    low, middle, high = column.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=column.dtype)).tolist()
    common = math.log10(abs(middle) / (high - low)) if middle and high > low else 0.0
    return 4 + max(0, math.floor(common) - 1)


def _count(number: int, what: str, none: str = "") -> str:
    if not number and none:
        return none
    return f"{number:,} {what}" + "s" * (number != 1)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


# -- pictures ----------------------------------------------------------------------------------------------------------


class Picture(NamedTuple):
    """A picture for an HTML page.

    Attributes:
        source: The picture as a data: URL.
        alt: Text alternative.
        note: What is left out; "" if nothing is.
    """

    source: str
    alt: str
    note: str = ""


def _losses(result: FitResult) -> Picture:
    figure = plotting.losses({"validation": result})
    return _embedded(figure, f"Losses in training and validation over {result.epochs} epochs.")


def _marginals(examination: Examination) -> Picture:
    data, samples, names = examination.data, examination.samples, examination.names
    shown, note = _highest(distance_between(data, samples), MOST_MARGINALS, "whose data and samples differ most")
    figure = plotting.marginals(data[:, shown], samples[:, shown], names=_drawn(names, shown), columns=ABREAST)
    return _embedded(figure, f"Histograms of data and samples of {_listed(names, shown)}.", note)


def _noise(examination: Examination) -> tuple[Picture, Picture]:
    u, names = examination.scores, examination.score_names
    distances = distance_to_uniform(torch.special.ndtr(u))
    shown, note = _highest(distances, MOST_NOISE, "that are furthest from uniform", "panels")
    listed, drawn = _listed(names, shown), _drawn(names, shown)
    return (
        _embedded(
            plotting.pit(u[:, shown], names=drawn, columns=ABREAST), f"PIT histograms of the noise of {listed}.", note
        ),
        _embedded(
            plotting.qq(u[:, shown], names=drawn, columns=ABREAST), f"Normal QQ plots of the noise of {listed}.", note
        ),
    )


def _pairs(examination: Examination) -> Picture:
    data, samples, names = examination.data, examination.samples, examination.names
    shown = _most_correlated(data[:, :CORRELATED_COLUMNS])
    note = ""
    if len(shown) < len(names):
        among = f" of the first {CORRELATED_COLUMNS:,}" if len(names) > CORRELATED_COLUMNS else ""
        note = f"{len(shown)} of {len(names):,} columns, the most correlated{among}: {_listed(names, shown)}."
    figure = plotting.pairs(data[:, shown], samples[:, shown], names=_drawn(names, shown))
    return _embedded(figure, f"Data over samples for every pair of {_listed(names, shown)}.", note)


def _log_densities(examination: Examination) -> Picture:
    heights = {"data": examination.log_prob, "samples": examination.samples_log_prob}
    return _embedded(plotting.log_densities(heights), "Histograms of the log-densities of data and of samples.")


def _highest(score: Tensor, most: int, which: str, what: str = "columns") -> tuple[list[int], str]:
    """Return the indices of the highest scores, ascending, and a note on those left out."""
    if len(score) <= most:
        return list(range(len(score))), ""
    return sorted(score.topk(most).indices.tolist()), f"{most} of {len(score):,} {what}, those {which}."


def _most_correlated(data: Tensor) -> list[int]:
    """Select correlated columns: the most correlated pair, then repeatedly the column most correlated with any of them.

    If there are few columns, all of them in order.
    """
    width = data.shape[1]
    if width <= MOST_PAIRS:
        return list(range(width))
    if len(data) < 2:
        return list(range(MOST_PAIRS))
    correlation = torch.corrcoef(data.T).abs().nan_to_num(0.0).fill_diagonal_(-1.0)
    shown = [int(correlation.amax(0).argmax())]
    while len(shown) < MOST_PAIRS:
        nearness = correlation[shown].amax(0)
        nearness[shown] = -1.0
        shown.append(int(nearness.argmax()))
    return sorted(shown)


def _drawn(names: Sequence[str], shown: Sequence[int]) -> list[str]:
    """Escape names for matplotlib, and shorten them to fit a panel."""
    drawn = []
    for index in shown:
        name = "".join(letter if letter.isprintable() else " " for letter in names[index])
        name = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
        drawn.append(name.replace("$", r"\$"))
    return drawn


def _listed(names: Sequence[str], shown: Sequence[int]) -> str:
    return ", ".join(names[index] for index in shown)


def _embedded(figure: Figure, alt: str, note: str = "") -> Picture:
    """Embed a figure as SVG with text elements, reproducible byte for byte."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pyro_maf"}), warnings.catch_warnings():
        # Ignores warnings about glyphs missing from matplotlib's font: browser fonts have them.
        warnings.filterwarnings("ignore", r"Glyph .* missing from (current )?font")
        figure.savefig(buffer, format="svg", dpi=DPI, metadata={"Date": None})
    encoded = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Picture(f"data:image/svg+xml;base64,{encoded}", alt, note)
