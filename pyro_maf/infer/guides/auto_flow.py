r"""Base class of the guides: a flow over all latent variables where Pyro expects a guide."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple, Self, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_maf.infer.guides.density import LOG_TWO_PI
from pyro_maf.infer.guides.mixture import FlowMixture
from pyro_maf.infer.guides.path_gradient import GradientLimit
from pyro_maf.infer.guides.posterior import Posterior
from pyro_maf.infer.guides.saved import saved_guide
from pyro_maf.infer.guides.set_up import GuideSetUp
from pyro_maf.infer.guides.shares import Shares
from pyro_maf.infer.guides.state import bare_latents, bare_trace, check_is_set_up
from pyro_maf.infer.models.latents import Part
from pyro_maf.infer.models.model import Call, RefusalError, Site, Trace
from pyro_maf.infer.models.plates import frames_of
from pyro_maf.infer.start.initialization import best_normal
from pyro_maf.infer.start.modes import MOST
from pyro_maf.saving import drop_weak_references
from pyro_maf.transforms import ConditionalFlow

__all__ = ["AutoFlow", "Modes"]


class Modes(NamedTuple):
    """Modes of a posterior that matter.

    Attributes:
        seen: Number of modes that ascents ended at, those of the set-up and of a fit, as far as they matter.
        covered: Number of those that the guide has a component for, with a share above a thousandth.
    """

    seen: int
    covered: int


class AutoFlow(GuideSetUp):
    """Base class of the three guides; see `AutoIAF`."""

    @property
    def modes(self) -> Modes:
        """How many modes of the posterior were seen, and how many of them the guide covers."""
        if (mixture := self._mixture) is None:
            return Modes(1 + self._missed_modes, 1)
        return Modes(len(mixture.components) + self._missed_modes, len(mixture.covered))

    def draw(self, count: int, call: Call) -> Tensor:
        """Draw vectors, (count, D), with gradient, as the posterior does; without checks and caches."""
        if (mixture := self._mixture) is not None:
            self._shares.count(mixture, call, self._density_of)
            return self._limited(mixture.draw(count))
        like = self._weight
        noise = torch.randn(count, self.latent_dim, dtype=like.dtype, device=like.device)
        latent, _ = self.get_transform(*call.args, **call.kwargs).forward_and_log_det(noise)
        return self._limited(latent)

    def log_density(self, latent: Tensor, call: Call) -> Tensor:
        """Return the log-density of vectors, (count, D), in nats, (count,), likewise."""
        if (mixture := self._mixture) is not None:
            return mixture.log_density(latent)
        noise, log_det = self.get_transform(*call.args, **call.kwargs).inverse_and_log_det(latent)
        return -0.5 * (noise.square().sum(-1) + self.latent_dim * LOG_TWO_PI) - log_det

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Draw every latent site; return the values by name."""
        self._set_up_once(*args, **kwargs)
        self._stored.register(self._who, self._stored_modules())
        self._create_plates(*args, **kwargs)
        latent = self.sample_latent(*args, **kwargs)
        images = self._map_to_sites(*args, **kwargs)(latent)
        return {name: self._sample(self.latents.parts[name], *image) for name, image in images.items()}

    def _sample(self, part: Part, value: Tensor, log_det: Tensor) -> Tensor:
        """Draw a site from the distribution that has all its mass at an image of the latent vector."""
        event_dim = part.site["fn"].event_dim
        with self._in_plates(part):
            for plate, dim in part.rows.items():
                indices = self.plates[plate].indices.to(value.device)
                value, log_det = value.index_select(dim, indices), log_det.index_select(dim + event_dim, indices)
            return pyro.sample(part.site["name"], dist.Delta(value, log_density=-log_det, event_dim=event_dim))

    def sample_latent(self, *args: object, **kwargs: object) -> Tensor:
        """Draw the unconstrained latent variables, as an auxiliary site of Pyro's."""
        if (mixture := self._mixture) is not None and self._plain_model is not None:
            self._shares.count(mixture, Call(self._plain_model[0], args, kwargs), self._density_of)
        posterior = self._posterior(*args, **kwargs)  # the weights are already read, in a call
        first = next(iter(self.latents.parts.values()))
        with self._in_plates(first) if self.latents.rows else nullcontext():
            latent = pyro.sample(f"_{self.name}_latent", posterior, infer={"is_auxiliary": True})
        return self._limited(latent)

    def _limited(self, latent: Tensor) -> Tensor:
        """Limit the gradient of draws."""
        if latent.grad_fn is not None:
            # On the operation: a hook on the tensor would bypass the cache, and the density would be computed again.
            latent.grad_fn.register_prehook(partial(self._limit, latent.output_nr))
        return latent

    def weigh_modes(self, call: Call) -> None:
        """Set the share of each mode by its evidence, once the guide is trained; nothing, for a guide with one."""
        if (mixture := self._mixture) is not None:
            self._shares.settle(mixture, call, self._density_of)

    def cover(self, modes: Sequence[Mapping[str, Tensor]], call: Call) -> bool:
        """Add a component for each mode near these values of the sites; return False if there is none, or no way to.

        There is none with an encoder, nor where the user has chosen where to start.
        """
        transform = self._map
        if self._start_is_chosen or self._init_scale is not None or isinstance(transform, ConditionalFlow):
            return False
        components = [*transform.components] if isinstance(transform, FlowMixture) else [transform]
        modes = modes[: MOST - len(components)]
        if not modes:
            return False
        posterior = self._density_of(call)
        points = posterior.packed({name: torch.stack([mode[name] for mode in modes]) for name in modes[0]})
        components += [self._stack_from(best_normal(posterior, point), 0, is_fitted=True) for point in points]
        self.transform = FlowMixture(components, self._weight.new_full((len(components),), 1 / len(components)))
        self._stored = self._stored.of_a_copy()
        self.weigh_modes(call)
        return True

    def _density_of(self, call: Call) -> Posterior:
        posterior = Posterior(call, cast("Trace", self.prototype_trace), self.latents)
        return posterior if (coordinates := self._coordinates) is None else posterior.within(coordinates)

    @contextmanager
    def _in_plates(self, part: Part) -> Iterator[None]:
        """Enter the plates of a site."""
        with ExitStack() as stack:
            for frame in frames_of(part.site):
                stack.enter_context(self.plates[frame.name])
            yield

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Site, Tensor]]:
        return ((part.site, unconstrained) for part, unconstrained in self.latents.split(latent))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the guide to a file from which `pyro_maf.load` restores it, without model or data.

        The file is safetensors and JSON: weights, names, supports and shapes of the sites, and their plates. Where the
        guide is in coordinates by the model's prior, the file holds that as a list of torch's operations, with the
        arguments of the set-up. Loading it runs no code. `torch.save` keeps what cannot be saved so.

        Args:
            path: A file, by convention with suffix .safetensors; one that exists is replaced once all is written.

        Raises:
            ValueError: If the guide is not set up.
            TypeError: If it has an encoder, a site whose support is not one of Pyro's, or coordinates by a prior that
                is no plain function of values, as one that branches on them.
            FileNotFoundError: If the folder does not exist.
        """
        if self.prototype_trace is None:
            raise RefusalError(f"{self._who} expected to be set up before it is saved: fit it, or call guide.setup().")
        coordinates = self._coordinates
        call = None if coordinates is None else self._call((), {})
        saved_guide(self.latents, self._map, coordinates, call).save(path)

    # -- copies ---------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        if self.prototype_trace is None:
            check_is_set_up(self._who, state_dict, f"{prefix}transform.")
        else:
            own = f"{prefix}transform."
            if weights := {name.removeprefix(own): state_dict[name] for name in state_dict if name.startswith(own)}:
                self._compose_for(weights)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        # Pyro's method would remove the model from the original. What is fixed once set up is shared.
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        copied = ("_modules", "_parameters", "_buffers", "training", "_pyro_context")
        twin.__dict__.update(self.__dict__, **{name: copy.deepcopy(self.__dict__[name], memo) for name in copied})
        twin.__dict__.update(_stored=self._stored.of_a_copy(), _shares=Shares(), _limit=GradientLimit())
        return twin

    def __getstate__(self) -> dict[str, object]:
        # Without the model, as Pyro's guides are pickled, but leaving this one as it is; its data stay behind too.
        drop_weak_references(self)
        state = {**self.__dict__, "_model": None, "_plain_model": None, "_first_call": None, "master": None}
        state |= {"_stored": self._stored.of_a_copy(), "_shares": Shares(), "_limit": GradientLimit()}
        if self.prototype_trace is not None:
            # Not used again once set up, and often functions that cannot be pickled.
            state |= {"init_loc_fn": None, "plates": {}}
            state |= {"prototype_trace": bare_trace(self.prototype_trace), "latents": bare_latents(self.latents)}
        return state
