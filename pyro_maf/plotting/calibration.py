"""Calibration plots: the noise of data under a model, compared with the standard normal distribution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from pyro_maf._core.torch_state import reference_tensor
from pyro_maf.distributions import Density, FlowPrior, TableDensity
from pyro_maf.plotting.axes import (
    COLOURS,
    GREY,
    POINTS,
    check_by_name,
    dimension_names,
    dots,
    label,
    new_panels,
    some_rows,
    styled,
)
from pyro_maf.tables.layout import TableLike, numbers, part_of
from pyro_maf.transforms import Flow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["noise", "pit", "qq"]

MOST_BINS = 20
ROWS_IN_A_BIN = 10
QUANTILES = 200


@styled
def noise(
    densities: Mapping[str, Flow | Density], data: TableLike, *, dims: tuple[int, int] = (0, 1), title: str = ""
) -> Figure:
    r"""The noise u = t^-1(y) of data under each model, which is standard normal under a perfect model.

    For a flow u = flow.inv(y). For mixtures of Gaussians u_i = Phi^-1(F_i(y_i | y_<i)), with F_i the conditional
    distribution function. Circles of radius 1, 2 and 3 contain 39, 86 and 99 % of a standard normal.

    Args:
        densities: Densities by name, each a flow, a `FlowPrior`, a `MADEMoG` or a `MAFMoG`.
        data: Rows (N, D), possibly as a data frame. At most 4,000 of them are drawn.
        dims: The two dimensions of u to show.

    Raises:
        TypeError: For a density without a map to noise.
        ValueError: For data that are not (rows, D) or lack these dimensions.

    Example:
        >>> from pyro_maf import MAF
        >>> figure = noise({"MAF": MAF(2)}, torch.randn(50, 2))
        >>> figure.axes[0].get_xlabel()
        '$u_{1}$'

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017, figure 1.
    """
    check_by_name("noise", "densities", densities)
    data = part_of(data, slice(POINTS))
    table = numbers("noise", "data", data)
    some_rows("noise", "data", table, dims)
    for density in densities.values():
        if not isinstance(density, (Flow, Density)):
            raise TypeError(f"noise expected flows or densities with a map to noise, got {type(density).__name__}.")
    figure, panels = new_panels(len(densities), title)
    for axes, (name, density) in zip(panels, densities.items(), strict=True):
        with torch.no_grad():
            # A density in the data's units reads tables itself, and selects the columns it was fitted to.
            reads = isinstance(density, (FlowPrior, TableDensity))
            u = density.noise(cast(Tensor, data) if reads else table.to(reference_tensor(density)))
        dots(axes, some_rows("noise", name, u, dims), COLOURS[0])
        _circles(axes)
        label(axes, name, dims, "u", ((-4.5, 4.5), (-4.5, 4.5)))
        axes.set(aspect="equal", xticks=range(-4, 5, 2), yticks=range(-4, 5, 2))
    return figure


@styled
def pit(u: TableLike, *, names: Sequence[str] | None = None, columns: int = 3, title: str = "") -> Figure:
    r"""Probability integral transforms: a histogram of Phi(u_i) for each dimension of the noise of data.

    Under a perfect model Phi(u_i) is uniform, and the band contains 95 % of the bars: two standard errors of a
    binomial count on either side of 1. A hump means that the density is too wide, a trough that it is too narrow, a
    slope that it is biased.

    Args:
        u: Noise of the data, (N, D), in the dimensions to show, as in `noise`.
        names: Names of the dimensions, by default the column names of a data frame.
        columns: Maximum number of panels side by side.

    Raises:
        ValueError: For noise of another shape, or if there are not D names.

    Example:
        >>> figure = pit(torch.randn(500, 3))
        >>> [axes.get_title() for axes in figure.axes]
        ['$u_{1}$', '$u_{2}$', '$u_{3}$']

    Reference:
        Dawid, *Statistical Theory: The Prequential Approach*, 1984.
    """
    uniform = torch.special.ndtr(some_rows("pit", "u", u, most=None).double())
    total, size = uniform.shape
    names = dimension_names("pit", names, u, size, "u")
    bins = max(4, min(MOST_BINS, total // ROWS_IN_A_BIN))
    margin = 2 * math.sqrt((bins - 1) / total)
    heights = [torch.histc(column, bins, 0, 1).max() * bins / total for column in uniform.T]
    top = 1.1 * max(1 + margin, *map(float, heights))
    figure, panels = new_panels(size, title, height=1.8, of="dimension", columns=columns)
    for i, (axes, name) in enumerate(zip(panels, names, strict=True)):
        axes.hist(uniform[:, i].numpy(), bins=bins, range=(0, 1), weights=[bins / total] * total, color=COLOURS[4])
        axes.axhspan(max(0.0, 1 - margin), 1 + margin, color=GREY, alpha=0.35, linewidth=0)
        axes.axhline(1, color="black", linewidth=0.7)
        axes.set_title(name)
        axes.set(xlim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 1))
        axes.set_ylim(0, top)
    return figure


@styled
def qq(u: TableLike, *, names: Sequence[str] | None = None, columns: int = 3, title: str = "") -> Figure:
    r"""Quantiles of each dimension of the noise of data against those of the standard normal.

    Under a perfect model they lie on the diagonal. The band is two standard errors of a quantile on either side,
    sqrt(p (1 - p) / N) / phi(z_p). The tails, which a histogram hides, are at the ends.

    Args:
        u, names, columns: As in `pit`.

    Raises:
        ValueError: As in `pit`.

    Example:
        >>> figure = qq(torch.randn(500, 2), names=["height", "weight"])
        >>> [axes.get_title() for axes in figure.axes]
        ['height', 'weight']
    """
    ordered = some_rows("qq", "u", u, most=None).double().sort(0).values
    total, size = ordered.shape
    names = dimension_names("qq", names, u, size, "u")
    places, normal, error = _normal_order(total)
    observed = ordered[places]
    edge = max(2.0, float(normal[-1])) + 1
    figure, panels = new_panels(size, title, height=2.3, of="dimension", columns=columns)
    for i, (axes, name) in enumerate(zip(panels, names, strict=True)):
        axes.fill_between(normal, normal - 2 * error, normal + 2 * error, color=GREY, alpha=0.35, linewidth=0)
        axes.plot((-edge, edge), (-edge, edge), color="black", linewidth=0.7)
        axes.plot(normal, observed[:, i], ".", color=COLOURS[0], markersize=2.5)
        axes.set_title(name)
        axes.set(xlim=(-edge, edge), ylim=(-edge, edge), aspect="equal")
        axes.set(xticks=range(-int(edge), int(edge) + 1, 2), yticks=range(-int(edge), int(edge) + 1, 2))
    figure.supxlabel("standard normal quantiles", fontsize=9)
    figure.supylabel("quantiles of the noise", fontsize=9)
    return figure


def _normal_order(total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of some of `total` sorted standard normal draws, their expected quantiles, and their standard errors."""
    count = min(total, QUANTILES)
    # Evenly spaced in z, not in p: the tails matter most.
    edge = torch.special.ndtri(torch.tensor(0.5 / total, dtype=torch.float64))
    places = torch.linspace(float(edge), -float(edge), count, dtype=torch.float64)
    places = torch.special.ndtr(places).mul(total).sub(0.5).round().clamp(0, total - 1).long().unique()
    p = (places.double() + 0.5) / total
    z = torch.special.ndtri(p)
    return places, z, (p * (1 - p) / total).sqrt() / torch.exp(-0.5 * z.square()) * math.sqrt(2 * math.pi)


def _circles(axes: Axes) -> None:
    from matplotlib.patches import Circle

    for radius in (1, 2, 3):
        axes.add_patch(Circle((0, 0), radius, fill=False, edgecolor="black", linewidth=0.7))
