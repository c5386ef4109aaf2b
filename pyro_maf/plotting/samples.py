"""Plots of data and samples of models, side by side or overlaid: points, histograms, images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_maf._core.checks import check_positive
from pyro_maf.plotting.axes import (
    COLOURS,
    DARK,
    GREY,
    POINTS,
    Window,
    bins_of,
    check_by_name,
    dimension_names,
    dots,
    histogram,
    label,
    limits_of,
    new_figure,
    new_panels,
    some_rows,
    styled,
)
from pyro_maf.tables.layout import Layout, TableLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["image_grid", "marginals", "pairs", "scatter"]


@styled
def scatter(
    data: TableLike, samples: Mapping[str, TableLike], *, dims: tuple[int, int] = (0, 1), title: str = ""
) -> Figure:
    """Data next to each model's samples, in two of their dimensions, on the same axes.

    Args:
        data: Rows (N, D).
        samples: Rows (M, D) of each model, by name. At most 4,000 rows of each are drawn.
        dims: The two dimensions to show.

    Raises:
        ValueError: For rows that are not (rows, D), or lack these dimensions.

    Example:
        >>> figure = scatter(torch.randn(50, 2), {"MAF": torch.randn(50, 2)})
        >>> [axes.get_title() for axes in figure.axes]
        ['Data', 'MAF']
    """
    check_by_name("scatter", "samples", samples)
    layout = Layout.of(data)
    picked = {name: layout.pick("scatter", name, rows, "the data") for name, rows in samples.items()}
    everything = {name: some_rows("scatter", name, rows, dims) for name, rows in {"Data": data, **picked}.items()}
    figure, panels = new_panels(len(everything), title)
    limits = limits_of(everything["Data"])
    for index, (axes, (name, rows)) in enumerate(zip(panels, everything.items(), strict=True)):
        dots(axes, rows, COLOURS[0] if index else GREY)
        label(axes, name, dims, "x", limits)
    return figure


@styled
def marginals(
    data: TableLike, samples: TableLike, *, names: Sequence[str] | None = None, columns: int = 3, title: str = ""
) -> Figure:
    """The histogram of each dimension, with data and samples of one model overlaid, in the same bins.

    Heights are fractions of all rows, including those beyond the outermost bins, about a thousandth of the data.

    Args:
        data: Rows (N, D), in the dimensions to show.
        samples: Rows (M, D).
        names, columns: As in `pit`.

    Raises:
        ValueError: For rows of another shape, or if there are not D names.

    Example:
        >>> figure = marginals(torch.randn(50, 2), torch.randn(80, 2), names=["height", "weight"])
        >>> [axes.get_title() for axes in figure.axes]
        ['height', 'weight']
    """
    data, samples, names = _compared("marginals", data, samples, names, most=None)
    figure, panels = new_panels(len(names), title, height=1.8, of="dimension", columns=columns)
    for i, (axes, name) in enumerate(zip(panels, names, strict=True)):
        edges = bins_of(data[:, i], samples[:, i])
        histogram(axes, data[:, i], edges, GREY, filled=True, name="" if i else "data")
        histogram(axes, samples[:, i], edges, COLOURS[0], filled=False, name="" if i else "samples")
        axes.set_title(name)
        axes.set_yticks([])
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def pairs(data: TableLike, samples: TableLike, *, names: Sequence[str] | None = None, title: str = "") -> Figure:
    """Every pair of dimensions, data over samples of one model, with the histogram of each dimension.

    Args:
        data: Rows (N, D), in the few dimensions to show.
        samples: Rows (M, D). At most 4,000 of either are drawn.
        names: Names of the dimensions, by default the column names of a data frame.

    Raises:
        ValueError: For rows of another shape, or if there are not D names.

    Example:
        >>> figure = pairs(torch.randn(50, 3), torch.randn(50, 3))
        >>> len(figure.axes)
        6
    """
    data, samples, names = _compared("pairs", data, samples, names)
    size = len(names)
    figure = new_figure(1.6 * size + 0.6, 1.6 * size + 0.3, title)
    grid = figure.subplots(size, size, squeeze=False)
    limits = [limits_of(data[:, [i, i]])[0] for i in range(size)]
    for i in range(size):
        for j in range(size):
            if j > i:
                grid[i, j].remove()
                continue
            _pair(grid[i, j], data[:, [j, i]], samples[:, [j, i]], (limits[j], limits[i]))
            grid[i, j].set(xlabel=names[j] if i == size - 1 else "", ylabel=names[i] if j == 0 and i else "")
            grid[i, j].label_outer()
    handles = [grid[0, 0].plot([], [], ".", color=colour, markersize=6)[0] for colour in (DARK, COLOURS[0])]
    figure.legend(handles, ["data", "samples"], loc="upper right")
    return figure


@styled
def image_grid(images: Mapping[str, TableLike], *, columns: int = 8, title: str = "") -> Figure:
    """Square grey-scale images from each source, side by side, on the grey scale of the first.

    Args:
        images: Rows (N, D) by name, with D a square number; the first `columns` squared images of each are drawn.
        columns: Number of images per row, and of rows.

    Raises:
        ValueError: For rows that are not square images.

    Example:
        >>> figure = image_grid({"Data": torch.rand(70, 64), "MAF": torch.rand(70, 64)})
        >>> [axes.get_title() for axes in figure.axes]
        ['Data', 'MAF']
    """
    check_by_name("image_grid", "images", images)
    check_positive("image_grid", "columns", columns)
    sheets = {
        name: _tiled(name, some_rows("image_grid", name, rows, most=columns**2), columns)
        for name, rows in images.items()
    }
    figure, panels = new_panels(len(sheets), title)
    limits: list[float] = []
    for axes, (name, sheet) in zip(panels, sheets.items(), strict=True):
        limits = limits or torch.nanquantile(sheet, torch.tensor([0.01, 0.99]).to(sheet)).tolist()
        axes.imshow(sheet.numpy(), cmap="gray", vmin=limits[0], vmax=limits[1], interpolation="nearest")
        axes.set_title(name)
        axes.set_axis_off()
    return figure


def _compared(
    who: str, data: TableLike, samples: TableLike, names: Sequence[str] | None, most: int | None = POINTS
) -> tuple[Tensor, Tensor, list[str]]:
    """Rows of data and samples with the same dimensions, matched by name if possible, and the dimensions' names."""
    rows = some_rows(who, "data", data, most=most)
    names = dimension_names(who, names, data, rows.shape[-1])
    picked = Layout.of(data).pick(who, "samples", samples, "the data")
    return rows, some_rows(who, "samples", picked, range(len(names)), most), names


def _pair(axes: Axes, data: Tensor, samples: Tensor, limits: Window) -> None:
    """Draw two dimensions of data and samples, or histograms if both are the same dimension."""
    axes.set_xlim(limits[0])
    if torch.equal(data[:, 0], data[:, 1]):
        edges = bins_of(data[:, 0], samples[:, 0])
        histogram(axes, data[:, 0], edges, GREY, filled=True)
        histogram(axes, samples[:, 0], edges, COLOURS[0], filled=False)
        axes.set_yticks([])
        return
    # Data are drawn last, so that samples do not hide them.
    dots(axes, samples, COLOURS[0])
    dots(axes, data, DARK)
    axes.set_ylim(limits[1])


def _tiled(name: str, rows: Tensor, columns: int) -> Tensor:
    """Tile images into one, with gaps of NaN, which are drawn white."""
    side = math.isqrt(rows.shape[-1])
    if side * side != rows.shape[-1]:
        raise ValueError(f"image_grid expected {name} of shape (rows, a square number), got shape {tuple(rows.shape)}.")
    sheet = torch.full((columns * (side + 1) - 1, columns * (side + 1) - 1), torch.nan)
    for index, image in enumerate(rows.reshape(-1, side, side)):
        top, left = (side + 1) * (index // columns), (side + 1) * (index % columns)
        sheet[top : top + side, left : left + side] = image
    return sheet
