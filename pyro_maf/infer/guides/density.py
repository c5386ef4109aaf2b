r"""Draws of a guide of this package, and its density at values of the sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Self, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.quasirandom import SobolEngine

from pyro_maf._core.checks import check_shape
from pyro_maf.infer.guides.mixture import FlowMixture, MixturePosterior
from pyro_maf.infer.guides.path_gradient import FlowPosterior
from pyro_maf.infer.models.coordinates import Coordinates
from pyro_maf.infer.models.latents import Images, Latents, Part
from pyro_maf.infer.models.model import Args, Call, Kwargs, RefusalError, check_encoder_call
from pyro_maf.infer.models.plates import frames_of
from pyro_maf.transforms import ConditionalFlow, Flow, Stack

__all__ = ["LOG_TWO_PI", "Encoder", "GuideDensity", "in_plates"]

Encoder = Callable[..., Tensor]
LOG_TWO_PI = math.log(2 * math.pi)
QUANTILE_DRAWS = 8192
MOST_COLUMNS = 1024
"""Maximum number of columns processed at a time, since `torch.quantile` accepts at most 16 million numbers."""

Levels = float | Sequence[float] | Tensor
"""Levels of quantiles, in [0, 1]."""


class GuideDensity(AutoContinuous):
    """Draws and densities of a guide, from its map `transform` from noise to the vector that `latents` describes."""

    latents: Latents
    _first_call: Call | None = None

    @property
    def _who(self) -> str:
        return type(self).__name__

    def setup(self, *args: object, **kwargs: object) -> Self:
        """Set the guide up if necessary, and load its weights from Pyro's store; return the guide."""
        raise NotImplementedError

    def _set_up_once(self, *args: object, **kwargs: object) -> None:
        """Set the guide up if necessary; a no-op for one without a model."""

    # Modules are read here without registering their parameters with Pyro, unlike when an attribute of a guide is read.

    @property
    def _map(self) -> Stack | ConditionalFlow | FlowMixture:
        return cast("Stack | ConditionalFlow | FlowMixture", self._modules["transform"])

    @property
    def _mixture(self) -> FlowMixture | None:
        transform = self._map
        return transform if isinstance(transform, FlowMixture) else None

    @property
    def _weight(self) -> Tensor:
        """One of the weights, for its dtype and device."""
        return next(self._map.parameters())

    @property
    def _encoder(self) -> Encoder | None:
        return cast("Encoder | None", self._modules.get("encoder", self.__dict__.get("encoder")))

    def _context(self, *args: object, **kwargs: object) -> Tensor:
        encoder = cast("Encoder", self._encoder)
        try:
            context = encoder(*args, **kwargs)
        except TypeError:
            check_encoder_call(self._who, Call(encoder, args, kwargs))
            raise
        if not isinstance(context, Tensor) or context.dim() == 0:
            raise RefusalError(f"{self._who} expected encoder to return a tensor (*rows, features), got {context!r}.")
        return context

    def get_base_dist(self) -> TorchDistribution:
        """Return the standard normal distribution of the noise, with event shape (D,)."""
        return self._standard_normal(self.latent_dim)

    def get_noise_dist(self) -> TorchDistribution:
        """Return the standard normal distribution of all numbers that a draw is computed from."""
        return self._standard_normal(self.noise_dim)

    def _standard_normal(self, dim: int) -> TorchDistribution:
        zeros = self._weight.new_zeros(dim)
        return dist.Normal(zeros, torch.ones_like(zeros), validate_args=False).to_event(1)

    def get_transform(self, *args: object, **kwargs: object) -> Flow:
        """Return the map from noise to unconstrained latent variables, conditioned on the encoder's context if any.

        For a guide with several modes it is that of the heaviest, which is a change of variables for the whole space
        too.
        """
        self._set_up_once(*args, **kwargs)
        transform = self._map
        if isinstance(transform, FlowMixture):
            return transform.heaviest
        return transform if isinstance(transform, Flow) else transform.condition(self._context(*args, **kwargs))

    def get_posterior(self, *args: object, **kwargs: object) -> TorchDistribution:
        """Return the distribution of the vector of unconstrained latent variables."""
        self.setup(*args, **kwargs)
        return self._posterior(*args, **kwargs)

    def _posterior(self, *args: object, **kwargs: object) -> TorchDistribution:
        if (mixture := self._mixture) is not None:
            return MixturePosterior(mixture)
        transform = self.get_transform(*args, **kwargs)
        return FlowPosterior(self.get_base_dist(), [transform], validate_args=False)

    @property
    def noise_dim(self) -> int:
        """Number of standard normal numbers per draw: D, and one more if there are several modes."""
        return self.latent_dim if (mixture := self._mixture) is None else mixture.noise_dim

    def _of_noise(self, noise: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Callable[[], Tensor]]:
        r"""Map noise u to vectors v, (\*batch, D); also return a function for log(p(u) / q(v)), (\*batch,)."""
        if (mixture := self._mixture) is not None:
            latent = mixture.of_noise(noise)
            return latent, lambda: -0.5 * (noise.square() + LOG_TWO_PI).sum(-1) - mixture.log_density(latent)
        transform = self.get_transform(*args, **kwargs)
        latent = transform(noise)
        return latent, lambda: transform.log_abs_det_jacobian(noise, latent)

    @property
    def _coordinates(self) -> Coordinates | None:
        return cast("Coordinates | None", self._modules.get("coordinates"))

    def _call(self, args: Args, kwargs: Kwargs) -> Call:
        """Return the call of the model with these arguments, or without any, with those of the set-up."""
        if self._first_call is None:
            raise RefusalError(
                f"{self._who} expected its model, whose prior defines the coordinates of "
                f"{', '.join(cast('Coordinates', self._coordinates).names)}, got none, since it was pickled without: "
                "set up a guide of the model and load its state_dict."
            )
        return Call(self._first_call.program, args, kwargs) if args or kwargs else self._first_call

    def _map_to_sites(self, *args: object, **kwargs: object) -> Callable[[Tensor], Images]:
        """Return the map from the guide's vector to the values of the sites and their log-determinant."""
        if (coordinates := self._coordinates) is None:
            return self.latents.images
        return partial(coordinates.images, self.latents, call=self._call(args, kwargs))

    def _sites_at(
        self, latent: Tensor, plates: Mapping[str, pyro.plate], *args: object, **kwargs: object
    ) -> dict[str, Tensor]:
        """Sample each site, in its plates, from a point mass at its value for the vector."""
        values = {}
        for name, (value, log_det) in self._map_to_sites(*args, **kwargs)(latent).items():
            part = self.latents.parts[name]
            event_dim = part.site["fn"].event_dim
            with in_plates(part, plates):
                for plate, dim in part.rows.items():
                    indices = plates[plate].indices.to(value.device)
                    value, log_det = value.index_select(dim, indices), log_det.index_select(dim + event_dim, indices)
                values[name] = pyro.sample(name, dist.Delta(value, log_density=-log_det, event_dim=event_dim))
        return values

    def rsample(self, sample_shape: Sequence[int] = (), *args: object, **kwargs: object) -> dict[str, Tensor]:
        r"""Draw every site, (\*sample_shape, \*site), with gradient. Further arguments are the model's."""
        shape = check_shape(self._who, "sample_shape", sample_shape)
        latent = self.get_posterior(*args, **kwargs).rsample(shape)
        return self.latents.sites(latent, shape, self._map_to_sites(*args, **kwargs))

    def scored_draws(self, count: int, nesting: int, call: Call) -> tuple[dict[str, Tensor], Tensor]:
        """Draw every site for all rows, with plates padded to `nesting`; also return the log-density in nats."""
        posterior = self.get_posterior(*call.args, **call.kwargs)
        latent = posterior.rsample(torch.Size((count, *(1,) * nesting)))
        values, log_det = self.unpacked(latent, call)
        return values, (posterior.log_prob(latent) - log_det).reshape(count)

    def log_prob(self, values: Mapping[str, Tensor | float], *args: object, **kwargs: object) -> Tensor:
        r"""Log-density of the guide in nats, (\*batch,), at values (\*batch, \*site) of every site.

        If the encoder's context has rows, `batch` ends with them. Outside the support it is minus infinity. Further
        arguments are the model's.

        Raises:
            TypeError: If values are not numeric, or floating-point tensors whose dtype differs from the guide's.
            ValueError: If a site is missing or of another shape.
        """
        posterior = self.get_posterior(*args, **kwargs)
        tensors = self.latents.checked(values, self._weight)
        latent, log_det = self.latents.pack(tensors)
        inside = self.latents.within_supports(tensors) & latent.isfinite().all(-1)
        if (coordinates := self._coordinates) is not None:
            parts = self.latents.parts.values()
            batch = (inside.reshape(inside.shape + (1,) * part.value.dim()) for part in parts)
            scored = {
                part.site["name"]: torch.where(mask, tensors[part.site["name"]], part.value)
                for part, mask in zip(parts, batch, strict=True)
            }  # a model may raise for others
            latent, log_det = coordinates.of_values(self.latents, scored, self._call(args, kwargs))
            inside = inside & latent.isfinite().all(-1)  # a support may depend on other sites
        log_prob = posterior.log_prob(torch.where(inside[..., None], latent, 0.0)) - log_det
        return torch.where(inside, log_prob, -torch.inf)

    def unpacked(self, latent: Tensor, call: Call) -> tuple[dict[str, Tensor], Tensor]:
        """Map vectors, with ones in place of plates, to the values of the sites; also return log |det| in nats."""
        return self.latents.unpack(latent, self._map_to_sites(*call.args, **call.kwargs)(latent))

    @torch.no_grad()
    def median(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Marginal median of every latent variable; see `quantiles`."""
        return self.quantiles(0.5, *args, **kwargs)

    @torch.no_grad()
    def quantiles(self, quantiles: Levels, *args: object, **kwargs: object) -> dict[str, Tensor]:
        r"""Marginal quantiles of every latent variable, (\*levels, \*site), at levels in [0, 1].

        These are empirical quantiles of 8,192 draws of each site, on its support: elementwise for a simplex or an
        ordered vector, so that medians on a simplex need not sum to 1. The noise is a fixed Sobol sequence, so that
        repeated calls agree.

        Raises:
            TypeError: If a level is not a number.
            ValueError: If a level is outside [0, 1].
        """
        self.setup(*args, **kwargs)
        levels = _checked_levels(self._who, quantiles, self._weight)
        noise = _fixed_noise(self.noise_dim).to(levels)
        latent, _ = self._of_noise(noise.reshape(-1, *(1,) * len(self.latents.rows), self.noise_dim), *args, **kwargs)
        # On the support, since a map that mixes coordinates does not preserve marginal quantiles.
        draws = self.latents.sites(latent, torch.Size([QUANTILE_DRAWS]), self._map_to_sites(*args, **kwargs))
        return {name: _quantiles(value, levels.to(value)) for name, value in draws.items()}

    def sites_of(self, noise: Tensor, *args: object, **kwargs: object) -> dict[str, Tensor]:
        r"""Map noise u, (\*batch, `noise_dim`), to the value of each site, (\*batch, \*site)."""
        self._set_up_once(*args, **kwargs)
        latent, _ = self._of_noise(noise, *args, **kwargs)
        shape = noise.shape[: -1 - len(self.latents.rows)]
        return self.latents.sites(latent, shape, self._map_to_sites(*args, **kwargs))

    def sites_and_log_ratio(self, noise: Tensor, *args: object, **kwargs: object) -> tuple[dict[str, Tensor], Tensor]:
        r"""Map noise u to the value of each site; also return log(p(u) / q(z)) in nats, (\*batch,).

        For a guide with one mode that is log |det dz/du|. `noise` is (`noise_dim`,), or (\*batch, `noise_dim`) with
        ones in `batch` in place of the model's plates.
        """
        self._set_up_once(*args, **kwargs)
        latent, log_ratio = self._of_noise(noise, *args, **kwargs)
        values, log_det = self.latents.unpack(latent, self._map_to_sites(*args, **kwargs)(latent))
        return values, log_ratio() + log_det


@contextmanager
def in_plates(part: Part, plates: Mapping[str, pyro.plate]) -> Iterator[None]:
    """Enter the plates of a site."""
    with ExitStack() as stack:
        for frame in frames_of(part.site):
            stack.enter_context(plates[frame.name])
        yield


def _checked_levels(who: str, levels: Levels, like: Tensor) -> Tensor:
    """Convert levels to a tensor with the dtype and device of `like`.

    Raises:
        TypeError: If they are not numbers.
        ValueError: If one is outside [0, 1].
    """
    try:
        checked = torch.as_tensor(levels, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{who} expected quantiles to be numbers from 0 to 1, got {levels!r}.") from None
    outside = checked[~((checked >= 0) & (checked <= 1))].flatten()
    if len(outside):
        raise ValueError(f"{who} expected quantiles from 0 to 1, got {float(outside[0]):g}.")
    return checked


def _quantiles(draws: Tensor, levels: Tensor) -> Tensor:
    r"""Quantiles along the first dimension, (\*levels, \*event), of draws (draws, \*event)."""
    if not draws.numel():
        return draws.new_empty(levels.shape + draws.shape[1:])
    blocks = draws.reshape(len(draws), -1).split(MOST_COLUMNS, -1)
    quantiles = torch.cat([block.quantile(levels.flatten(), 0) for block in blocks], -1)
    return quantiles.reshape(levels.shape + draws.shape[1:])


def _fixed_noise(dim: int) -> Tensor:
    """Standard normal draws from a fixed Sobol sequence or, beyond its dimensions, a fixed seed."""
    if dim > SobolEngine.MAXDIM:
        return torch.randn(QUANTILE_DRAWS, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    uniform = SobolEngine(dim, scramble=True, seed=0).draw(QUANTILE_DRAWS, dtype=torch.float64)
    return torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))
