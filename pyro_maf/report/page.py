"""Writing of the report's page."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyro_maf._core.extras import require
from pyro_maf._core.progress import check_progress
from pyro_maf._core.torch_state import reference_tensor
from pyro_maf.datasets import Table
from pyro_maf.distributions import ConditionalFlowPrior, FlowPrior
from pyro_maf.report import pictures
from pyro_maf.report.examination import Examination, examine
from pyro_maf.report.kolmogorov import calibration_of, radius_of
from pyro_maf.saving import write_whole
from pyro_maf.training import FitResult

__all__ = ["write_report"]

MOST_VALUES_OF_A_ROW = 12


class Figure(NamedTuple):
    """A headline figure: its name, its value, and a remark."""

    name: str
    value: str
    note: str = ""


def write_report(
    path: str | os.PathLike[str],
    result: FitResult,
    data: Any,
    *,
    context: Any = None,
    names: Sequence[str] | None = None,
    context_names: Sequence[str] | None = None,
    command: str = "",
    progress: bool | str = True,
) -> None:
    r"""Write a report of a fit as one HTML page, which needs no network and no other file.

    It has the figures and warnings of the fit; the mean log-likelihood of `data` with two standard errors; the
    calibration of the noise of `data` against the standard normal, by the probability integral transform, QQ plots and
    the largest Kolmogorov distance; histograms and pairs of columns of data and samples; log-densities of both; the
    rows of the lowest density; losses over the epochs; and the command.

    Pass rows that the fit has not seen: those that it was fitted to look better than new ones.

    Args:
        path: The file; by custom it ends in .html. An existing file is replaced once all is written.
        result: The result of `pyro_maf.fit`.
        data: Rows (N, D), or (N, D + 1) on a simplex, as `fit` takes them; columns with names are matched by name. A
            `np.memmap` is read in blocks. Or a table of `read_table`, with its names and context: then
            the page has the name of the table in its title, categories by their names, and rows by their numbers in the
            file.
        context: Rows (N, C) of the same kinds, if the density takes a context.
        names: Names of the columns, by default those of a data frame, or x1, x2 and so on.
        context_names: Names of the columns of the context, likewise, with c1.
        command: The command of the fit, to show.
        progress: A bar on stderr: True on a terminal or in a notebook, False never, "always" in any case.

    Cost:
        One `log_prob` a row, up to 10 million values and a random part of the rows beyond that; and for up to 10,000
        rows a sample, its `log_prob` and the noise. A page is some hundred kilobytes for any number of rows.

    Raises:
        TypeError: For a result that is not from `fit`, or data that are not numeric.
        ValueError: For data of the wrong width, without rows, not finite or outside the support, with the row; for a
            context missing, superfluous or of another length; for another number of names than of columns. Rows are
            counted from 1.
        FileNotFoundError: If the folder of `path` does not exist.
        ModuleNotFoundError: Without the `train` extra.

    Example:
        >>> import tempfile, pyro_maf
        >>> data = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
        >>> result = pyro_maf.fit(pyro_maf.MAF(2, num_layers=1), data[:200], max_epochs=2, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = Path(folder) / "report.html"
        ...     write_report(page, result, data[200:], names=["height", "weight"])
        ...     "Kolmogorov" in page.read_text(encoding="utf-8")
        True
    """
    require("write_report", "jinja2", "matplotlib", "rich")
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"write_report expected an existing folder for {path.name}, got {path.parent}.")
    if not isinstance(result, FitResult) or not isinstance(result.density, (FlowPrior, ConditionalFlowPrior)):
        raise TypeError(f"write_report expected what fit returned, a FitResult, got {type(result).__name__}.")
    check_progress("write_report", progress)
    label = data.label if isinstance(data, Table) else ""
    data = result.layout.pick("write_report", "data", data)
    context = result.context_layout.pick("write_report", "context", context)
    examination = examine(
        result.density, data, context, names, context_names, held_out=result.held_out, progress=progress
    )
    write_whole(path, _page(result, examination, command, label).encode())


def _page(result: FitResult, examination: Examination, command: str, label: str) -> str:
    """Render the page."""
    from jinja2 import Environment, StrictUndefined

    template = files("pyro_maf.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    names = _noise_names(examination)
    u = examination.noise
    if len(names) > u.shape[1]:
        u = torch.cat([u, radius_of(u)[:, None]], -1)
    pit, qq = pictures.noise(u, names)
    return environment.from_string(template).render(
        title=_title(result, examination, label),
        figures=_figures(result, examination),
        command=command,
        warnings=result.warnings,
        calibration=calibration_of(u, names),
        has_radius=len(names) > examination.noise.shape[1],
        pit=pit,
        qq=qq,
        marginals=pictures.marginals(examination),
        pairs=pictures.pairs(examination) if len(examination.names) > 1 else None,
        log_densities=pictures.log_densities(examination),
        lowest=_lowest(examination, names),
        losses=pictures.losses(result),
        model=repr(result.density),
        examination=examination,
    )


def _noise_names(examination: Examination) -> list[str]:
    """Return the names of the dimensions of the noise, and of its radius if there are several."""
    size = examination.noise.shape[1]
    # A simplex has one column more than its noise has dimensions.
    names = examination.names if len(examination.names) == size else [f"u{i + 1}" for i in range(size)]
    return [*names, "|u|²"] if size > 1 else list(names)


def _model(result: FitResult) -> Any:
    """Return the fitted flow or density."""
    density = result.density
    return (density.density if isinstance(density, ConditionalFlowPrior) else density).model


def _title(result: FitResult, examination: Examination, label: str) -> str:
    given = f" given {_count(len(examination.context_names), 'context column')}" if examination.context_names else ""
    model = f"{type(_model(result)).__name__} of {_count(len(examination.names), 'column')}{given}"
    return f"{label}: {model}, {date.today()}" if label else f"{model}, {date.today()}"


def _figures(result: FitResult, examination: Examination) -> list[Figure]:
    """Return the headline figures."""
    weight = reference_tensor(_model(result))
    parameters = sum(parameter.numel() for parameter in result.density.parameters())
    columns = f"{len(examination.names):,}"
    validation = Figure(
        "Validation in the fit", f"{result.validation_log_likelihood:.3f}", "nats, of the fit's own rows"
    )
    return [
        _log_likelihood(examination),
        *[validation] * (not examination.is_held_out),
        _rows(result, examination),
        Figure("Columns", columns, _count(len(examination.context_names), "context column", none="no context")),
        Figure("Epochs", f"{result.epochs:,}", f"best: {result.best_epoch:,}"),
        Figure("Time", _duration(result.seconds), "for the fit"),
        Figure("Stopped", result.stop_reason, _count(result.skipped_steps, "step", none="no steps") + " skipped"),
        Figure("Parameters", f"{parameters:,}", str(weight.dtype).removeprefix("torch.") if weight is not None else ""),
    ]


def _log_likelihood(examination: Examination) -> Figure:
    """Return the mean log-likelihood of the rows, with two standard errors from two rows on."""
    log_prob = examination.log_prob
    value = f"{log_prob.mean():.3f}"
    if len(log_prob) > 1 and log_prob.isfinite().all():
        value += f" ± {2 * float(log_prob.std()) / math.sqrt(len(log_prob)):.3f}"
    which = "held-out rows" if examination.is_held_out else "these rows"
    return Figure(f"Log-likelihood of {which}", value, "nats a row, ± two standard errors")


def _rows(result: FitResult, examination: Examination) -> Figure:
    """Return the number of rows, and their role in the fit."""
    scored, rows = len(examination.log_prob), examination.rows
    notes = [] if scored == rows else [f"{scored:,} of them, drawn at random, were scored"]
    if not examination.is_held_out:
        return Figure("Rows", f"{rows:,}", *notes)
    if result.held_out is None or result.held_out_places is None:
        return Figure("Rows", f"{rows:,}", "; ".join(["those to validate with; they also chose the epoch", *notes]))
    value = f"{rows:,} of {result.rows:,}"
    return Figure("Rows", value, "; ".join(["held out; they also chose the epoch", *notes]))


def _lowest(examination: Examination, noise_names: Sequence[str]) -> dict[str, Any]:
    """Return the table of the rows of the lowest density."""
    columns, contexts = (given[:MOST_VALUES_OF_A_ROW] for given in (examination.names, examination.context_names))
    digits = [_digits(column) for column in examination.data.unbind(1)[: len(columns)]]
    rows = [
        {
            "row": f"{low.row:,}",
            "log_prob": f"{low.log_prob:.2f}",
            "furthest": noise_names[low.dimension],
            "noise": f"{low.noise:+.1f}",
            "values": [f"{value:.{count}g}" for value, count in zip(low.values, digits, strict=False)],
            "context": list(zip(contexts, low.context, strict=False)),
        }
        for low in examination.lowest
    ]
    left_out = len(examination.names) - len(columns) + len(examination.context_names) - len(contexts)
    return {"columns": [*columns, *contexts], "rows": rows, "left_out": left_out}


def _digits(column: torch.Tensor) -> int:
    """Number of digits that distinguish the values of a column: 4, plus the number of leading ones that all share."""
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
