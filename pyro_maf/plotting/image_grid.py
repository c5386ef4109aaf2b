"""Plots of rows that are images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_maf._core.checks import check_positive
from pyro_maf.plotting.axes import new_panels, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["image_grid"]


@styled
def image_grid(images: Mapping[str, Tensor], *, columns: int = 8, title: str = "") -> Figure:
    """Square grey-scale images of each source, side by side, on the grey scale of the first.

    Args:
        images: Rows (N, D) by name, D a square number; the first `columns` squared of each are drawn.
        columns: Number of images in a row, and of rows.
        title: Title of the figure.

    Raises:
        ValueError: For rows that are not square images.
        ModuleNotFoundError: Without the `train` extra.

    Example:
        >>> figure = image_grid({"Data": torch.rand(70, 64), "MAF": torch.rand(70, 64)})
        >>> [axes.get_title() for axes in figure.axes]
        ['Data', 'MAF']
    """
    check_positive("image_grid", "columns", columns)
    sheets = {name: _sheet(name, rows, columns) for name, rows in images.items()}
    figure, panels = new_panels(len(sheets), title)
    limits: list[float] = []
    for axes, (name, sheet) in zip(panels, sheets.items(), strict=True):
        limits = limits or torch.nanquantile(sheet, torch.tensor([0.01, 0.99]).to(sheet)).tolist()
        axes.imshow(sheet.numpy(), cmap="gray", vmin=limits[0], vmax=limits[1], interpolation="nearest")
        axes.set_title(name)
        axes.set_axis_off()
    return figure


def _sheet(name: str, rows: Tensor, columns: int) -> Tensor:
    """Tile images into one, with gaps of NaN, which are drawn white."""
    side = math.isqrt(rows.shape[-1])
    if rows.dim() != 2 or side * side != rows.shape[-1]:
        raise ValueError(f"image_grid expected {name} of shape (rows, a square number), got shape {tuple(rows.shape)}.")
    sheet = torch.full((columns * (side + 1) - 1, columns * (side + 1) - 1), torch.nan)
    for index, image in enumerate(rows[: columns**2].detach().cpu().reshape(-1, side, side)):
        top, left = (side + 1) * (index // columns), (side + 1) * (index % columns)
        sheet[top : top + side, left : left + side] = image
    return sheet
