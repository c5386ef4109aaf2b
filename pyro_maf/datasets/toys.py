"""Toy densities on the plane, with exact log-densities.

Each has samples, log-densities and, if it has a closed form, the entropy: minus the mean log-likelihood of a perfect
model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_maf._core.checks import check_event, check_positive
from pyro_maf.datasets.dataset import Dataset

__all__ = ["TOYS", "FigureOne", "Funnel", "Moons", "Pinwheel", "Ring", "Toy"]

LOG_2PI_E = math.log(2 * math.pi) + 1


class Toy:
    r"""A density on the plane with an exact log-density. A subclass defines `_draw` and `_log_density`.

    Attributes:
        name: Name in tables and figures.
        entropy: Entropy in nats, or None if there is no closed form.

    Example:
        >>> toy = FigureOne()
        >>> toy.sample(3, seed=0).shape, toy.log_prob(torch.zeros(5, 2)).shape
        (torch.Size([3, 2]), torch.Size([5]))
    """

    name: str
    entropy: float | None = None

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """Draw `n` points, (n, 2), in float32; they depend only on `seed`.

        Raises:
            ValueError: If `n` is below 1.
        """
        check_positive(f"{type(self).__name__}.sample", "n", n)
        return self._draw(n, torch.Generator().manual_seed(seed)).float()

    def log_prob(self, y: Tensor) -> Tensor:
        r"""Log-density in nats, (\*batch,), of points (\*batch, 2), in their dtype.

        Raises:
            ValueError: If the last dimension of `y` is not 2.
            TypeError: If `y` is not a floating-point tensor.
        """
        who = type(self).__name__
        check_event(who, "y", y, 2, "a point of the plane")
        if not y.is_floating_point():
            raise TypeError(f"{who} expected y to be floating-point, got {y.dtype}: convert it with .float().")
        return self._log_density(y)

    def dataset(self, train: int = 10_000, validation: int = 2_000, test: int = 10_000, seed: int = 0) -> Dataset:
        """Draw three independent parts of these sizes."""
        sizes = [check_positive(type(self).__name__, "the size of every part", n) for n in (train, validation, test)]
        first, second, third = torch.split(self.sample(sum(sizes), seed), sizes)
        return Dataset(self.name, first, second, third)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        raise NotImplementedError

    def _log_density(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class FigureOne(Toy):
    r"""The density of the paper's Figure 1: p(x1, x2) = N(x2 | 0, 4) N(x1 | x2^2 / 4, 1), N(mean, variance).

    Each factor is Gaussian. In the order (x1, x2), however, the second factor p(x2 | x1) is not: it has two modes.
    Entropy log(2 pi e) + log 2 = 3.531 nats.

    Example:
        >>> round(FigureOne().entropy, 3)
        3.531

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017.
    """

    name = "Figure 1"
    entropy = LOG_2PI_E + math.log(2)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        u = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        x2 = 2 * u[:, 1]
        return torch.stack([x2**2 / 4 + u[:, 0], x2], -1)

    def _log_density(self, y: Tensor) -> Tensor:
        x1, x2 = y.unbind(-1)
        return _normal(x2, 0.0, 2.0) + _normal(x1, x2**2 / 4, 1.0)


class Funnel(Toy):
    r"""Neal's funnel in the plane: p(x1, x2) = N(x1 | 0, 9) N(x2 | 0, exp(x1)), N(mean, variance).

    Entropy log(2 pi e) + log 3 = 3.936 nats, since x1, twice the log-scale of x2, has mean 0.

    Reference:
        Neal, *Slice Sampling*, 2003.
    """

    name = "Funnel"
    entropy = LOG_2PI_E + math.log(3)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        u = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        x1 = 3 * u[:, 0]
        return torch.stack([x1, (x1 / 2).exp() * u[:, 1]], -1)

    def _log_density(self, y: Tensor) -> Tensor:
        x1, x2 = y.unbind(-1)
        return _normal(x1, 0.0, 3.0) + _normal(x2 * (-x1 / 2).exp(), 0.0, 1.0) - x1 / 2


class Ring(Toy):
    r"""A ring about the origin: log-radius normal with mean log 2 and standard deviation 0.1, angle uniform.

    p(x) = p(r) / (2 pi r) with r = |x|. Entropy log(2 pi) + log(2 pi e) / 2 + log 0.1 + 2 log 2 = 2.340 nats.

    Example:
        >>> Ring().log_prob(torch.tensor([[2.0, 0.0], [0.0, 0.0]]))
        tensor([-1.8405,    -inf])
    """

    name = "Ring"
    entropy = math.log(2 * math.pi) + LOG_2PI_E / 2 + math.log(0.1) + 2 * math.log(2)

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        radius = (math.log(2) + 0.1 * torch.randn(n, generator=generator, dtype=torch.float64)).exp()
        angle = 2 * math.pi * torch.rand(n, generator=generator, dtype=torch.float64)
        return torch.stack([radius * angle.cos(), radius * angle.sin()], -1)

    def _log_density(self, y: Tensor) -> Tensor:
        # The log is clamped, so that the density at the centre is 0 rather than undefined.
        log_radius = y.norm(dim=-1).clamp_min(torch.finfo(y.dtype).tiny).log()
        log_prob = _normal(log_radius, math.log(2), 0.1) - 2 * log_radius - math.log(2 * math.pi)
        return torch.where((y == 0).all(-1), -torch.inf, log_prob)


class Moons(Toy):
    r"""Two interleaved half circles of radius 1, blurred: an equal mixture of 64 isotropic Gaussians of scale 0.1.

    The means are closer together than the scale, so the moons look smooth. The entropy has no closed form.

    Example:
        >>> Moons().log_prob(torch.tensor([0.0, 1.0]))
        tensor(-0.4847)
    """

    name = "Moons"

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        places = _moon_places()
        chosen = torch.randint(len(places), (n,), generator=generator)
        return places[chosen] + 0.1 * torch.randn(n, 2, generator=generator, dtype=torch.float64)

    def _log_density(self, y: Tensor) -> Tensor:
        places = _moon_places().to(y)
        return _normal(y[..., None, :], places, 0.1).sum(-1).logsumexp(-1) - math.log(len(places))


class Pinwheel(Toy):
    r"""Five elongated Gaussians like the blades of a wheel, rotated by an angle that grows with the radius.

    A rotation by an angle that depends only on the radius preserves area, so the density is the mixture's at the point
    rotated back. The entropy has no closed form.

    Reference:
        Johnson et al., *Composing Graphical Models with Neural Networks for Structured Representations*, 2016.
    """

    name = "Pinwheel"

    def _draw(self, n: int, generator: torch.Generator) -> Tensor:
        u = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        blade = torch.stack([2 + 0.5 * u[:, 0], 0.2 * u[:, 1]], -1)
        arm = torch.randint(5, (n,), generator=generator)
        return _turned(blade, arm * (2 * math.pi / 5) + blade.norm(dim=-1))

    def _log_density(self, y: Tensor) -> Tensor:
        back = -torch.arange(5, device=y.device) * (2 * math.pi / 5) - y.norm(dim=-1, keepdim=True)
        x1, x2 = _turned(y[..., None, :], back).unbind(-1)
        return (_normal(x1, 2.0, 0.5) + _normal(x2, 0.0, 0.2)).logsumexp(-1) - math.log(5)


TOYS: tuple[Toy, ...] = (FigureOne(), Funnel(), Ring(), Moons(), Pinwheel())
"""One of each toy."""


def _normal(x: Tensor, mean: Tensor | float, scale: float) -> Tensor:
    return -0.5 * ((x - mean) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


def _moon_places() -> Tensor:
    angle = torch.linspace(0, math.pi, 32, dtype=torch.float64)
    upper = torch.stack([angle.cos(), angle.sin()], -1)
    return torch.cat([upper, torch.tensor([1.0, 0.5]) - upper])


def _turned(points: Tensor, angle: Tensor) -> Tensor:
    x1, x2 = points.unbind(-1)
    return torch.stack([x1 * angle.cos() - x2 * angle.sin(), x1 * angle.sin() + x2 * angle.cos()], -1)
