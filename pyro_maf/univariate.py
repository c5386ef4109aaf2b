"""Univariate maps, parametrised by the outputs of a network."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_maf._core.checks import check_above_zero, check_choice, check_positive
from pyro_maf._core.options import OBJECTS
from pyro_maf.saving import Savable

__all__ = ["UNIVARIATE", "Affine", "Spline", "UnivariateMap", "soft_bound", "univariate_map"]


@runtime_checkable
class UnivariateMap(Protocol):
    """An increasing elementwise map of the real line: the interface to implement for a map of your own.

    A map that derives from `pyro_maf.saving.Savable` is saved with its flow.

    Attributes:
        num_parameters: P, the number of network outputs per dimension. If all of them are 0, the map is the identity.

    Example:
        >>> from pyro_maf import MAF
        >>> from pyro_maf.saving import Savable
        >>> class SinhArcsinh(Savable):
        ...     num_parameters, settings = 2, ()
        ...     def forward(self, x, phi):
        ...         shift, log_tail = phi.unbind(-1)
        ...         v = torch.asinh(x)
        ...         w = v * log_tail.exp() + shift
        ...         return torch.sinh(w), log_tail + torch.log(torch.cosh(w) / torch.cosh(v))
        ...     def inverse(self, y, phi):
        ...         shift, log_tail = phi.unbind(-1)
        ...         v = (torch.asinh(y) - shift) * (-log_tail).exp()
        ...         x = torch.sinh(v)
        ...         return x, self.forward(x, phi)[1]
        >>> MAF(3, univariate=SinhArcsinh())(torch.zeros(3)).tolist()  # the identity at initialisation
        [0.0, 0.0, 0.0]
    """

    @property
    def num_parameters(self) -> int:
        """P."""
        ...

    @property
    def settings(self) -> tuple[int, ...]:
        """Integers that define the map besides its parameters; a layer stores them in its `state_dict`."""
        ...

    def forward(self, x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dx; phi has one more dimension than x, of size P."""
        ...

    def inverse(self, y: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dy/dx."""
        ...


class Affine(Savable):
    r"""y = x exp(alpha) + mu, with log dy/dx = alpha.

    The network outputs (s, a). alpha = b tanh(a / b) with b = `BOUND`, the same in both directions, so the inverse is
    exact; and mu = s exp(alpha / 2). If mu itself were the output, x would be lost to the rounding of a large mu at a
    small scale, and y in the inverse at a large scale; applying exp(alpha / 2) before and after the shift serves both.
    The inverse divides by the same exp(alpha / 2), whose rounding thus cancels.

    Example:
        >>> y, log_derivative = Affine().forward(torch.tensor(1.0), torch.tensor([0.5, 0.0]))
        >>> y.item(), log_derivative.item()
        (1.5, 0.0)
    """

    BOUND = 3.0
    num_parameters = 2
    settings: tuple[int, ...] = ()

    def forward(self, x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dx = alpha."""
        shift, a = phi.unbind(-1)
        alpha = soft_bound(a, self.BOUND)
        half = torch.exp(0.5 * alpha)
        return torch.addcmul(shift, x, half) * half, alpha

    def inverse(self, y: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dy/dx = alpha."""
        shift, a = phi.unbind(-1)
        alpha = soft_bound(a, self.BOUND)
        half = torch.exp(0.5 * alpha)
        return (y / half - shift) / half, alpha

    def __repr__(self) -> str:
        return "Affine()"


class Spline(Savable):
    r"""y = affine(q^-1(x)): an `Affine` map after a monotone rational-quadratic spline on a box.

    q maps [-B, B] to itself in K bins and is the identity outside. Bin k has width w_k, height h_k and slopes d_k and
    d_k+1 at its ends. With s = h_k / w_k, t = (z - z_k) / w_k and z = affine^-1(y),

        q(z) = q_k + h_k (s t^2 + d_k t (1 - t)) / (s + (d_k + d_k+1 - 2 s) t (1 - t)).

    Data to noise evaluates this formula; noise to data solves a quadratic for t. Both are exact. The network outputs
    the 2 parameters of `Affine`, K for the widths, K for the heights and K - 1 for the slopes at the inner knots; with
    all spline parameters 0, the map is affine. Knot slopes and chord slopes s are within e^-2 .. e^2, and a knot's
    slope is at most e times that of either adjacent chord. Hence q' is at least about e^-3.5, and float32 can invert a
    stack of these maps. The affine map contributes slopes of e^-3 .. e^3.

    Args:
        num_bins: K, at least 2.
        bound: B, in units of the noise.

    Raises:
        TypeError: If `num_bins` is not an int or `bound` not a number.
        ValueError: If `num_bins` is below 2 or `bound` is not positive.

    Example:
        >>> spline = Spline(num_bins=4)
        >>> y, log_derivative = spline.forward(torch.tensor(1.0), torch.zeros(spline.num_parameters))
        >>> spline.num_parameters, round(y.item(), 4), round(log_derivative.item(), 4)
        (13, 1.0, 0.0)

    Reference:
        Durkan et al., *Neural Spline Flows*, 2019.
    """

    LOG_SLOPE = 2.0
    STEEPEST = math.e
    GAIN = 0.35
    """Factor on the network's outputs. Each output moves all knots: with a factor of 1, a random four-layer network
    would change the map so quickly from point to point that float32 could not invert the stack."""

    def __init__(self, num_bins: int = 8, bound: float = 3.0) -> None:
        self.num_bins = check_positive("Spline", "num_bins", num_bins, least=2)
        check_above_zero("Spline", "bound", bound, finite=True)
        self.bound = float(bound)
        self.affine = Affine()
        self.num_parameters = self.affine.num_parameters + 3 * num_bins - 1

    @property
    def settings(self) -> tuple[int, ...]:
        """Numbers that define the map: K, and B in thousandths."""
        return self.num_bins, round(1_000 * self.bound)

    def forward(self, x: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """y and log dy/dx; solves a quadratic."""
        affine, knots = self._split(x, phi)
        z, log_slope = self._through_box(x, knots, solve=True)
        y, alpha = self.affine.forward(z, affine)
        return y, alpha - log_slope

    def inverse(self, y: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """x and log dy/dx."""
        affine, knots = self._split(y, phi)
        z, alpha = self.affine.inverse(y, affine)
        x, log_slope = self._through_box(z, knots, solve=False)
        return x, alpha - log_slope

    def __repr__(self) -> str:
        return f"Spline(num_bins={self.num_bins}, bound={self.bound:g})"

    def _split(self, value: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        """Split the parameters into those of the affine map and those of the spline, for each value."""
        phi = phi.expand(*torch.broadcast_shapes(value.shape, phi.shape[:-1]), -1)
        return phi[..., : self.affine.num_parameters], phi[..., self.affine.num_parameters :]

    def _bins(self, phi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Widths and heights of the bins, (..., K), and slopes at all knots, (..., K + 1)."""
        widths, heights, slopes = (self.GAIN * phi).split([self.num_bins, self.num_bins, self.num_bins - 1], -1)
        # A ratio of two softmax outputs is a ratio of terms times a ratio of sums: each gets half of the bound.
        log_width = soft_bound(widths, self.LOG_SLOPE / 2)
        log_height = log_width + soft_bound(heights, self.LOG_SLOPE / 2)
        width, height = 2 * self.bound * log_width.softmax(-1), 2 * self.bound * log_height.softmax(-1)
        chord = height / width
        slope = soft_bound(slopes, self.LOG_SLOPE).exp()
        slope = slope.minimum(self.STEEPEST * chord[..., :-1].minimum(chord[..., 1:]))
        return width, height, F.pad(slope, (1, 1), value=1.0)

    def _through_box(self, value: Tensor, phi: Tensor, *, solve: bool) -> tuple[Tensor, Tensor]:
        """q(value) or, with `solve`, q^-1(value); and log q' at the argument of q."""
        width, height, slope = self._bins(phi)
        left, bottom = (F.pad(size.cumsum(-1)[..., :-1], (1, 0)) - self.bound for size in (width, height))
        # Clipped before the arithmetic, so that the branch that `where` discards has a finite gradient.
        inside = value.clamp(-self.bound, self.bound).expand(phi.shape[:-1])
        bin_of = ((bottom if solve else left)[..., 1:] <= inside[..., None]).sum(-1, keepdim=True)
        w, h, z_k, q_k, d_k = (part.gather(-1, bin_of)[..., 0] for part in (width, height, left, bottom, slope))
        d_next = slope.gather(-1, bin_of + 1)[..., 0]
        s = h / w
        excess = d_k + d_next - 2 * s
        if solve:
            rise = inside - q_k
            t = _root(h * (s - d_k) + rise * excess, h * d_k - rise * excess, -s * rise)
        else:
            t = (inside - z_k) / w
        denominator = s + excess * t * (1 - t)
        result = z_k + w * t if solve else q_k + h * (s * t * t + d_k * t * (1 - t)) / denominator
        numerator = d_next * t * t + 2 * s * t * (1 - t) + d_k * (1 - t) ** 2
        log_slope = 2 * s.log() + numerator.log() - 2 * denominator.log()
        is_outside = ~(value.abs() < self.bound)  # true for NaN
        return torch.where(is_outside, value, result), torch.where(is_outside, 0.0, log_slope)


UNIVARIATE: dict[str, type[Affine] | type[Spline]] = {"affine": Affine, "spline": Spline}
"""Univariate maps, by name."""
OBJECTS["univariate"] = Spline  # `Affine` has no options


def univariate_map(who: str, univariate: str | UnivariateMap) -> UnivariateMap:
    """The map with this name, or the map itself.

    Raises:
        ValueError: For an unknown name.
        TypeError: For anything else.
    """
    if isinstance(univariate, str):
        return UNIVARIATE[check_choice(who, "univariate", univariate, UNIVARIATE)]()
    if isinstance(univariate, type) or not isinstance(univariate, UnivariateMap):
        raise TypeError(f"{who} expected univariate to be a map or its name, got {univariate!r}.")
    return univariate


def soft_bound(value: Tensor, bound: float) -> Tensor:
    """b tanh(value / b): close to the value near 0, and within +-b everywhere."""
    return bound * torch.tanh(value / bound)


def _root(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The root of a t^2 + b t + c in [0, 1], in the form that loses no digits when a is small."""
    discriminant = (b * b - 4 * a * c).clamp(min=torch.finfo(b.dtype).tiny)
    return 2 * c / (-b - discriminant.sqrt())
