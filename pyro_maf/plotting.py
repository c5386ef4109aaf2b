r"""Pictures of densities: samples, the noise that data come from, contours, losses, images.

Each function returns a matplotlib `Figure` that no global state knows: save it with `figure.savefig(path)`; at the end
of a notebook's cell it shows itself. Where several models are compared they share their axes, and their colours are
those of Okabe and Ito or of cividis, which colour-blind readers tell apart.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from pyro_maf.checks import check_positive
from pyro_maf.distributions import ConditionedDensity, FlowPrior, MADEMoG, MAFMoG
from pyro_maf.transforms import Flow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from pyro_maf.training import FitResult

__all__ = ["contours", "image_grid", "losses", "noise", "pairs", "scatter"]

GREY = "#8c8c8c"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
STYLE: dict[Any, Any] = {
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
GRID = 200

P = ParamSpec("P")
R = TypeVar("R")


def _styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw in this module's style, and leave the user's own as it was."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


@_styled
def scatter(data: Tensor, samples: Mapping[str, Tensor], *, dims: tuple[int, int] = (0, 1), title: str = "") -> Figure:
    """Data beside each model's samples, in two of their dimensions, on the same axes.

    Args:
        data: Rows (N, D).
        samples: Rows (M, D) of each model, by name. At most 4,000 rows of each are drawn.
        dims: The two dimensions to show.
        title: Of the figure.

    Raises:
        ValueError: For rows that are not (rows, D), or have not these dimensions.
        ModuleNotFoundError: Without the `train` extra.

    Example:
        >>> figure = scatter(torch.randn(50, 2), {"MAF": torch.randn(50, 2)})
        >>> [axes.get_title() for axes in figure.axes]
        ['Data', 'MAF']
    """
    everything = {name: _rows("scatter", name, rows, dims) for name, rows in {"Data": data, **samples}.items()}
    figure, panels = _panels(len(everything), title)
    limits = _limits(everything["Data"])
    for index, (axes, (name, rows)) in enumerate(zip(panels, everything.items(), strict=True)):
        _dots(axes, rows, COLOURS[0] if index else GREY)
        _label(axes, name, dims, "x", limits)
    return figure


@_styled
def noise(densities: Mapping[str, Any], data: Tensor, *, dims: tuple[int, int] = (0, 1), title: str = "") -> Figure:
    r"""The noise u that each model takes data to be made of; under a perfect model it is standard normal.

    For a flow u = flow.inv(y). For mixtures of Gaussians u_i = Phi^-1(F_i(y_i | y_<i)), with F_i the distribution
    function of the conditional. Circles of radius 1, 2 and 3 hold 39, 86 and 99 % of a standard normal.

    Args:
        densities: Densities by name, each a flow, a `FlowPrior`, a `MADEMoG` or a `MAFMoG`.
        data: Rows (N, D). At most 4,000 of them are drawn.
        dims: The two dimensions of u to show.
        title: Of the figure.

    Raises:
        TypeError: For a density whose noise is not known.
        ValueError: For data that are not (rows, D), or have not these dimensions.
        ModuleNotFoundError: Without the `train` extra.

    Example:
        >>> from pyro_maf import MAF
        >>> figure = noise({"MAF": MAF(2)}, torch.randn(50, 2))
        >>> figure.axes[0].get_xlabel()
        '$u_{1}$'

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017, figure 1.
    """
    _rows("noise", "data", data, dims)
    figure, panels = _panels(len(densities), title)
    for axes, (name, density) in zip(panels, densities.items(), strict=True):
        with torch.no_grad():
            u = _noise_of(density, data[:POINTS])
        _dots(axes, _rows("noise", name, u, dims), COLOURS[0])
        _circles(axes)
        _label(axes, name, dims, "u", ((-4.5, 4.5), (-4.5, 4.5)))
        axes.set(aspect="equal", xticks=range(-4, 5, 2), yticks=range(-4, 5, 2))
    return figure


@_styled
def contours(
    densities: Mapping[str, Any],
    window: tuple[tuple[float, float], tuple[float, float]],
    *,
    title: str = "",
) -> Figure:
    """Densities over the plane, all to the scale of the first.

    Args:
        densities: By name, whatever has a `log_prob` of points (rows, 2).
        window: The lowest and highest x1, and of x2.
        title: Of the figure.

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
    figure, panels = _panels(len(densities), title)
    levels: list[float] = []
    for axes, (name, density) in zip(panels, densities.items(), strict=True):
        with torch.no_grad():
            height = density.log_prob(points).exp().reshape(GRID, GRID).T
        levels = levels or torch.linspace(0, float(height.max()), 11).tolist()
        grid = (axis1.numpy(), axis2.numpy(), height.numpy())
        filled = axes.contourf(*grid, levels=levels, cmap="cividis", extend="max")
        _label(axes, name, (0, 1), "x", window)
    figure.colorbar(filled, ax=panels, label="density", format="%.2g", shrink=0.9)
    return figure


@_styled
def losses(results: Mapping[str, FitResult], *, marks: Mapping[str, float] | None = None, title: str = "") -> Figure:
    """Validation and training loss of each fit against its epochs.

    The axis of losses leaves the first tenth of the epochs out, so that the ends can be told apart.

    Args:
        results: What `pyro_maf.fit` returned, by name.
        marks: Losses to compare with, in nats, by name, such as that of the true density on the validation rows.
        title: Of the figure.

    Raises:
        ValueError: If there are no results.
        ModuleNotFoundError: Without the `train` extra.

    Example:
        >>> from pyro_maf.training import FitResult
        >>> result = FitResult(None, (2.0, 1.5, 1.3), (1.9, 1.5, 1.4), 3, -1.4, 0.1, "reached max_epochs (3)")
        >>> losses({"MAF": result}).axes[0].get_xlabel()
        'epoch'
    """
    if not results:
        raise ValueError("losses expected at least one result, got none.")
    figure, (axes,) = _panels(1, title, width=5.5, height=3.6)
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


@_styled
def image_grid(images: Mapping[str, Tensor], *, columns: int = 8, title: str = "") -> Figure:
    """Square grey-scale images of each source, side by side, all to the grey levels of the first.

    Args:
        images: Rows (N, D) by name, D a square number; the first `columns` squared of each are drawn.
        columns: Images in a row, and rows of them.
        title: Of the figure.

    Raises:
        ValueError: For rows that are no square images.
        ModuleNotFoundError: Without the `train` extra.

    Example:
        >>> figure = image_grid({"Data": torch.rand(70, 64), "MAF": torch.rand(70, 64)})
        >>> [axes.get_title() for axes in figure.axes]
        ['Data', 'MAF']
    """
    check_positive("image_grid", "columns", columns)
    sheets = {name: _sheet(name, rows, columns) for name, rows in images.items()}
    figure, panels = _panels(len(sheets), title)
    limits: list[float] = []
    for axes, (name, sheet) in zip(panels, sheets.items(), strict=True):
        limits = limits or torch.nanquantile(sheet, torch.tensor([0.01, 0.99]).to(sheet)).tolist()
        axes.imshow(sheet.numpy(), cmap="gray", vmin=limits[0], vmax=limits[1], interpolation="nearest")
        axes.set_title(name)
        axes.set_axis_off()
    return figure


@_styled
def pairs(data: Tensor, samples: Tensor, *, names: Sequence[str] | None = None, title: str = "") -> Figure:
    """Every pair of dimensions, data under samples of one model, with the histogram of each dimension.

    Args:
        data: Rows (N, D), of the few dimensions to show.
        samples: Rows (M, D). At most 4,000 of either are drawn.
        names: Of the dimensions.
        title: Of the figure.

    Raises:
        ValueError: For rows of another shape, or as many names as there are not dimensions.
        ModuleNotFoundError: Without the `train` extra.

    Example:
        >>> figure = pairs(torch.randn(50, 3), torch.randn(50, 3))
        >>> len(figure.axes)
        6
    """
    size = data.shape[-1]
    data, samples = (_rows("pairs", name, rows, range(size)) for name, rows in (("data", data), ("samples", samples)))
    names = [f"$x_{{{i + 1}}}$" for i in range(size)] if names is None else list(names)
    if len(names) != size:
        raise ValueError(f"pairs expected {size} names, one for each dimension, got {len(names)}.")
    figure = _figure(1.6 * size + 0.6, 1.6 * size + 0.3, title)
    grid = figure.subplots(size, size, squeeze=False)
    limits = [_limits(data[:, [i, i]])[0] for i in range(size)]
    for i in range(size):
        for j in range(size):
            if j > i:
                grid[i, j].remove()
                continue
            _pair(grid[i, j], data[:, [j, i]], samples[:, [j, i]], (limits[j], limits[i]))
            grid[i, j].set(xlabel=names[j] if i == size - 1 else "", ylabel=names[i] if j == 0 and i else "")
            grid[i, j].label_outer()
    handles = [grid[0, 0].plot([], [], color=colour)[0] for colour in (GREY, COLOURS[0])]
    figure.legend(handles, ["data", "samples"], loc="upper right")
    return figure


# -- what they are made of --------------------------------------------------------------------------------------------


@functools.cache
def _figure_class() -> type[Figure]:
    """Matplotlib's, made to show itself at the end of a notebook's cell: of its own it does so only by pyplot."""
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        def _repr_png_(self) -> bytes:
            picture = io.BytesIO()
            self.savefig(picture, format="png", dpi=SCREEN_DPI)
            return picture.getvalue()

    return ShownFigure


def _figure(width: float, height: float, title: str) -> Figure:
    figure = _figure_class()(figsize=(width, height), dpi=DPI, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _panels(count: int, title: str, *, width: float = 2.7, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, left to right and then down."""
    if count < 1:
        raise ValueError("A picture expects at least one model, got none.")
    columns = min(count, COLUMNS)
    rows = math.ceil(count / columns)
    figure = _figure(width * columns, height * rows + 0.3 * bool(title), title)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.remove()
    return figure, panels[:count]


def _rows(who: str, name: str, rows: Any, dims: Sequence[int]) -> Tensor:
    """The columns `dims` of a few rows, on the CPU."""
    rows = torch.as_tensor(rows).detach().cpu()
    if rows.dim() != 2 or rows.shape[-1] <= max(dims):
        raise ValueError(
            f"{who} expected {name} of shape (rows, {max(dims) + 1} or more), got shape {tuple(rows.shape)}."
        )
    return rows[:POINTS, list(dims)]


def _limits(rows: Tensor) -> tuple[tuple[float, float], tuple[float, float]]:
    """Ends of two axes that hold all but the outermost thousandth of the rows, with a margin."""
    low, high = torch.quantile(rows.double(), torch.tensor([0.0005, 0.9995], dtype=torch.float64), dim=0)
    margin = 0.08 * (high - low) + 1e-9
    first, second = torch.stack([low - margin, high + margin], -1).tolist()
    return tuple(first), tuple(second)


def _axis(low: float, high: float) -> Tensor:
    if not low < high:
        raise ValueError(f"contours expected a window with low < high on each axis, got ({low}, {high}).")
    return torch.linspace(low, high, GRID)


def _dots(axes: Axes, rows: Tensor, colour: str) -> None:
    first, second = rows.T.numpy()
    axes.scatter(first, second, s=2.5, color=colour, alpha=0.35, linewidths=0, rasterized=True)


def _circles(axes: Axes) -> None:
    from matplotlib.patches import Circle

    for radius in (1, 2, 3):
        axes.add_patch(Circle((0, 0), radius, fill=False, edgecolor="black", linewidth=0.7))


def _label(axes: Axes, name: str, dims: tuple[int, int], symbol: str, limits: Any) -> None:
    axes.set_title(name)
    axes.set(xlim=limits[0], ylim=limits[1])
    axes.set_xlabel(f"${symbol}_{{{dims[0] + 1}}}$")
    axes.set_ylabel(f"${symbol}_{{{dims[1] + 1}}}$")


def _pair(axes: Axes, data: Tensor, samples: Tensor, limits: Any) -> None:
    """Two dimensions of data and samples, or one dimension's histograms where the two are the same."""
    axes.set_xlim(limits[0])
    if torch.equal(data[:, 0], data[:, 1]):
        for rows, colour in ((data, GREY), (samples, COLOURS[0])):
            axes.hist(rows[:, 0].numpy(), bins=40, range=limits[0], density=True, histtype="step", color=colour)
        axes.set_yticks([])
        return
    _dots(axes, data, GREY)
    _dots(axes, samples, COLOURS[0])
    axes.set_ylim(limits[1])


def _sheet(name: str, rows: Tensor, columns: int) -> Tensor:
    """Images laid out as one, with gaps of NaN, which are drawn white."""
    side = math.isqrt(rows.shape[-1])
    if rows.dim() != 2 or side * side != rows.shape[-1]:
        raise ValueError(f"image_grid expected {name} of shape (rows, a square number), got shape {tuple(rows.shape)}.")
    sheet = torch.full((columns * (side + 1) - 1, columns * (side + 1) - 1), torch.nan)
    for index, image in enumerate(rows[: columns**2].detach().cpu().reshape(-1, side, side)):
        top, left = (side + 1) * (index // columns), (side + 1) * (index % columns)
        sheet[top : top + side, left : left + side] = image
    return sheet


def _noise_of(model: Any, y: Tensor, context: Tensor | None = None) -> Tensor:
    """The noise that `model` makes `y` of: standard normal, were the model right."""
    if isinstance(model, ConditionedDensity):
        return _noise_of(model.density, y, model.context[: len(y)])
    if isinstance(model, FlowPrior):
        return _noise_of(model.model, model.units._pull(y)[0], model._standardised(context))
    if isinstance(model, MAFMoG):
        return _noise_of(model.base, model.flow._pull(y, context)[0], context)
    if isinstance(model, MADEMoG):
        return _normal_quantiles(*model.mixtures(y, context), y)
    if isinstance(model, Flow):
        return model._pull(y, context)[0]
    raise TypeError(f"noise expected flows, FlowPriors, MADEMoGs or MAFMoGs, got {type(model).__name__}.")


def _normal_quantiles(log_pi: Tensor, mu: Tensor, log_sigma: Tensor, y: Tensor) -> Tensor:
    """Phi^-1 of each mixture's distribution function at y, from whichever tail is the smaller."""
    # erfc keeps its relative precision in the tail, where torch.special.ndtr rounds to 0.
    standard = ((y[..., None] - mu) * (-log_sigma).exp()).double() / math.sqrt(2)
    below = (log_pi.double().exp() * torch.erfc(-standard)).sum(-1) / 2
    above = (log_pi.double().exp() * torch.erfc(standard)).sum(-1) / 2
    return torch.where(below < above, torch.special.ndtri(below), -torch.special.ndtri(above)).to(y.dtype)
