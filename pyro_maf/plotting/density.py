"""Plots of densities and of log-densities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyro_maf.plotting.axes import COLOURS, GREY, edges_of, histogram, label, new_panels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["contours", "log_densities"]

GRID = 200


@styled
def contours(
    densities: Mapping[str, Any],
    window: tuple[tuple[float, float], tuple[float, float]],
    *,
    title: str = "",
) -> Figure:
    """Densities over the plane, on the colour scale of the first.

    Args:
        densities: Densities by name, with a `log_prob` of points (rows, 2).
        window: Minimum and maximum of x1, and of x2.
        title: Title of the figure.

    Raises:
        ValueError: If there are no densities, or a window is empty.
        ModuleNotFoundError: Without the `train` extra.

    Example:
        >>> from pyro_maf.datasets import FigureOne
        >>> figure = contours({"Exact": FigureOne()}, ((-4, 12), (-6, 6)))
        >>> figure.axes[0].get_title()
        'Exact'
    """
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
def log_densities(heights: Mapping[str, Tensor], *, title: str = "") -> Figure:
    """Histograms of log-densities of rows, for instance of data and of samples, in the same bins.

    If a model has learnt the data's density, its samples and the data have the same distribution of log-densities.
    The axis leaves out the lowest thousandth of the first, and values that are not finite.

    Args:
        heights: Log-densities (rows,), in nats, by name.
        title: Title of the figure.

    Raises:
        ValueError: If there are none.
        ModuleNotFoundError: Without the `train` extra.

    Example:
        >>> figure = log_densities({"data": torch.randn(50), "samples": torch.randn(80)})
        >>> figure.axes[0].get_xlabel()
        'log-density in nats'
    """
    finite = {name: value[value.isfinite()].detach().cpu().double() for name, value in heights.items()}
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


def _axis(low: float, high: float) -> Tensor:
    if not low < high:
        raise ValueError(f"contours expected a window with low < high on each axis, got ({low}, {high}).")
    return torch.linspace(low, high, GRID, dtype=torch.float64)
