"""Plots of densities on the plane, of log-densities of rows, and of losses over epochs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from pyro_maf.plotting.axes import COLOURS, GREY, Window, check_by_name, edges_of, histogram, label, new_panels, styled
from pyro_maf.tables.layout import TableLike, numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyro_maf.training import FitResult

__all__ = ["contours", "log_densities", "losses"]

GRID = 200


class HasLogProb(Protocol):
    """A density: a distribution of torch or Pyro, or a toy."""

    def log_prob(self, value: Tensor, /) -> Tensor: ...


@styled
def contours(densities: Mapping[str, HasLogProb], window: Window, *, title: str = "") -> Figure:
    """Densities on the plane, on the colour scale of the first.

    Args:
        densities: Densities by name, each with a `log_prob` for points (rows, 2).
        window: Minimum and maximum of x1, and of x2.

    Raises:
        ValueError: If there are no densities, or a window is empty.

    Example:
        >>> from pyro_maf.datasets import FigureOne
        >>> figure = contours({"Exact": FigureOne()}, ((-4, 12), (-6, 6)))
        >>> figure.axes[0].get_title()
        'Exact'
    """
    check_by_name("contours", "densities", densities)
    if not densities:
        raise ValueError("contours expected at least one density, got none.")
    axis1, axis2 = (_axis(*ends) for ends in window)
    points = torch.cartesian_prod(axis1, axis2)
    figure, panels = new_panels(len(densities), title)
    levels: list[float] = []
    for axes, (name, density) in zip(panels, densities.items(), strict=True):
        with torch.no_grad():
            height = density.log_prob(points.to(getattr(density, "dtype", torch.float32)))
            height = height.exp().reshape(GRID, GRID).T
        levels = levels or torch.linspace(0, float(height.max()), 11).tolist()
        grid = (axis1.numpy(), axis2.numpy(), height.numpy())
        filled = axes.contourf(*grid, levels=levels, cmap="cividis", extend="max")
        label(axes, name, (0, 1), "x", window)
    figure.colorbar(filled, ax=panels, label="density", format="%.2g", shrink=0.9)
    return figure


@styled
def log_densities(heights: Mapping[str, TableLike], *, title: str = "") -> Figure:
    """Histograms of log-densities of rows, for instance of data and of samples, with the same bins.

    If a model has learnt the density of the data, samples and data have the same distribution of log-densities. The
    axis leaves out the lowest thousandth of the first histogram, and values that are not finite.

    Args:
        heights: Log-densities (rows,), in nats, by name.

    Raises:
        ValueError: If there are none.

    Example:
        >>> figure = log_densities({"data": torch.randn(50), "samples": torch.randn(80)})
        >>> figure.axes[0].get_xlabel()
        'log-density in nats'
    """
    check_by_name("log_densities", "heights", heights)
    tables = {name: numbers("log_densities", name, value).double() for name, value in heights.items()}
    finite = {name: value[value.isfinite()] for name, value in tables.items()}
    if not all(map(len, finite.values())) or not finite:
        raise ValueError("log_densities expected finite log-densities of at least one row of each, got none.")
    first = next(iter(finite.values()))
    low = float(first.quantile(0.001))
    high = max(float(value.max()) for value in finite.values())
    edges = edges_of(low, high + 1e-6 * (1 + abs(high)), len(first))
    figure, (axes,) = new_panels(1, title, width=5.5, height=2.8)
    for index, (name, value) in enumerate(finite.items()):
        histogram(axes, value, edges, COLOURS[index - 1] if index else GREY, filled=not index, name=name)
    axes.set(xlabel="log-density in nats", ylabel="part of the rows")
    axes.legend(loc="upper left")
    return figure


@styled
def losses(results: Mapping[str, FitResult], *, marks: Mapping[str, float] | None = None, title: str = "") -> Figure:
    """Validation and training loss of each fit against its epochs.

    The limits of the loss axis ignore the first tenth of the epochs, so that the final losses can be distinguished.

    Args:
        results: Results of `pyro_maf.fit`, by name.
        marks: Losses to compare with, in nats, by name, such as the true density's on the validation rows.

    Raises:
        ValueError: If there are no results.

    Example:
        >>> from pyro_maf.training import FitResult
        >>> result = FitResult(None, (2.0, 1.5, 1.3), (1.9, 1.5, 1.4), 3, -1.4, 0.1, "reached max_epochs (3)")
        >>> losses({"MAF": result}).axes[0].get_xlabel()
        'epoch'
    """
    check_by_name("losses", "results", results)
    if not results:
        raise ValueError("losses expected at least one result, got none.")
    figure, (axes,) = new_panels(1, title, width=5.5, height=3.6)
    marks = marks or {}
    shown = list(marks.values())
    for colour, (name, result) in zip(itertools.cycle(COLOURS), results.items(), strict=False):
        epochs = range(1, result.epochs + 1)
        axes.plot(epochs, result.validation_loss, color=colour, label=name)
        axes.plot(epochs, result.train_loss, color=colour, linestyle=":", linewidth=1.0)
        started = slice(math.ceil(result.epochs / 10), None)
        shown += filter(math.isfinite, (*result.validation_loss[started], *result.train_loss[started]))
    for dashes, (name, value) in zip(itertools.cycle(("--", "-.")), marks.items(), strict=False):
        axes.axhline(value, color="black", linewidth=0.8, linestyle=dashes, label=name)
    axes.plot([], [], color=GREY, linestyle=":", linewidth=1.0, label="in training")
    axes.set(xlabel="epoch", ylabel="negative log-likelihood in nats")
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    margin = 0.05 * (high - low) or 0.5
    axes.set_ylim(low - margin, high + margin)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _axis(low: float, high: float) -> Tensor:
    if not low < high:
        raise ValueError(f"contours expected a window with low < high on each axis, got ({low}, {high}).")
    return torch.linspace(low, high, GRID, dtype=torch.float64)
