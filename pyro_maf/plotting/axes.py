"""Style of the figures, figures with several panels, and the rows shown in a panel."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor

from pyro_maf._core.checks import check_positive
from pyro_maf._core.messages import require
from pyro_maf.tables.layout import Layout, TableLike, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

__all__ = [
    "COLOURS",
    "DARK",
    "GREY",
    "Window",
    "bins_of",
    "check_by_name",
    "dimension_names",
    "dots",
    "edges_of",
    "histogram",
    "label",
    "limits_of",
    "new_figure",
    "new_panels",
    "some_rows",
    "styled",
]

GREY = "#8c8c8c"
DARK = "#262626"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
STYLE: dict[RcKeyType, object] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
}
COLUMNS = 3
DPI = 160
SCREEN_DPI = 80
POINTS = 4000
MOST_BINS = 40
SMALLEST_DOT, LARGEST_DOT = 2.5, 12.0
FEW_ROWS = 1000

P = ParamSpec("P")
R = TypeVar("R")
Window: TypeAlias = tuple[tuple[float, float], tuple[float, float]]


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function to draw in this module's style, leaving the user's style unchanged."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        require(draw.__name__, "matplotlib")
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


@functools.cache
def _figure_class() -> type[Figure]:
    """Subclass of matplotlib's figure that displays itself at the end of a notebook cell, without pyplot."""
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        def _repr_png_(self) -> bytes:
            picture = io.BytesIO()
            self.savefig(picture, format="png", dpi=SCREEN_DPI)
            return picture.getvalue()

    return ShownFigure


def new_figure(width: float, height: float, title: str) -> Figure:
    """Create a figure that is not registered with pyplot; sizes are in inches."""
    figure = _figure_class()(figsize=(width, height), dpi=DPI, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def new_panels(
    count: int, title: str, *, width: float = 2.7, height: float = 2.6, of: str = "model", columns: int = COLUMNS
) -> tuple[Figure, list[Axes]]:
    """Create a figure of `count` panels, at most `columns` in a row."""
    if count < 1:
        raise ValueError(f"A picture expects at least one {of}, got none.")
    columns = min(count, check_positive("A picture", "columns", columns))
    rows = math.ceil(count / columns)
    figure = new_figure(width * columns, height * rows + 0.3 * bool(title), title)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def some_rows(
    who: str, name: str, rows: TableLike, dims: Sequence[int] | None = None, most: int | None = POINTS
) -> Tensor:
    """Return the columns `dims`, by default all, of at most `most` rows, on the CPU."""
    table = numbers(who, name, rows)
    least = max(dims or (0,)) + 1
    if table.dim() != 2 or table.shape[-1] < least:
        raise ValueError(f"{who} expected {name} of shape (rows, {least} or more), got shape {tuple(table.shape)}.")
    return table[:most] if dims is None else table[:most, list(dims)]


def check_by_name(who: str, name: str, value: object) -> None:
    """Check that a value is a dictionary.

    Raises:
        TypeError: If it is not.
    """
    if not isinstance(value, Mapping):
        raise TypeError(f'{who} expected {name} by name, as {{"MAF": ...}}, got {type(value).__name__}.')


def dimension_names(who: str, names: Sequence[str] | None, rows: TableLike, size: int, symbol: str = "x") -> list[str]:
    """Return the names of the dimensions, by default the column names or the symbol with an index."""
    if names is None:
        names = Layout.of(rows).labels or [f"${symbol}_{{{i + 1}}}$" for i in range(size)]
    if len(names) != size:
        raise ValueError(f"{who} expected {size} names, one for each dimension, got {len(names)}.")
    return list(names)


def limits_of(rows: Tensor) -> Window:
    """Limits of two axes that contain all but the outermost thousandth of the rows, with a margin."""
    low, high = torch.quantile(rows.double(), torch.tensor([0.0005, 0.9995], dtype=torch.float64), dim=0)
    margin = 0.08 * (high - low) + 1e-6 * high.abs() + 1e-9
    first, second = torch.stack([low - margin, high + margin], -1).tolist()
    return tuple(first), tuple(second)


def dots(axes: Axes, rows: Tensor, colour: str) -> None:
    """Draw a dot for each row, (rows, 2), larger and darker if there are few."""
    first, second = rows.T.numpy()
    area = min(LARGEST_DOT, max(SMALLEST_DOT, SMALLEST_DOT * FEW_ROWS / max(1, len(rows))))
    alpha = 0.35 * math.sqrt(area / SMALLEST_DOT)
    axes.scatter(first, second, s=area, color=colour, alpha=alpha, linewidths=0, rasterized=True)


def bins_of(data: Tensor, samples: Tensor) -> list[float]:
    """Edges of histogram bins for the data, (rows,), over its limits; their number depends on the number of rows.

    They start and end inside the range of the values, so that positive data have no edge below 0.
    """
    (low, high), _ = limits_of(data[:, None].expand(-1, 2))
    everything = torch.cat([data, samples]).double()
    everything = everything[everything.isfinite()]
    low, high = max(low, float(everything.min())), min(high, float(everything.max()))
    # Constant values have a bin too.
    return edges_of(low, max(high, low + 1e-9 + 1e-6 * abs(low)), len(data))


def edges_of(low: float, high: float, total: int) -> list[float]:
    """Edges of histogram bins from low to high for `total` rows."""
    bins = min(MOST_BINS, math.ceil(2 * total ** (1 / 3)))
    return torch.linspace(low, high, bins + 1, dtype=torch.float64).tolist()


def histogram(axes: Axes, values: Tensor, edges: list[float], colour: str, *, filled: bool, name: str = "") -> None:
    """Draw the fraction of all values, (rows,), including those outside the edges, in each bin; filled or as a line."""
    axes.hist(
        values.numpy(),
        bins=edges,
        weights=[1 / len(values)] * len(values),
        histtype="stepfilled" if filled else "step",
        color=colour,
        alpha=0.4 if filled else 1.0,
        label=name or None,
    )


def label(axes: Axes, name: str, dims: tuple[int, int], symbol: str, limits: Window) -> None:
    """Set the title, the limits and the names of two dimensions."""
    axes.set_title(name)
    axes.set(xlim=limits[0], ylim=limits[1])
    axes.set_xlabel(f"${symbol}_{{{dims[0] + 1}}}$")
    axes.set_ylabel(f"${symbol}_{{{dims[1] + 1}}}$")
