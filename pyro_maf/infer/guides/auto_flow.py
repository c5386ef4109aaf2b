r"""Flows as guides: `AutoMAF`, `AutoIAF` and `AutoRealNVP`, over all latent variables of a Pyro model."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple, Self, cast

import pyro
import torch
from torch import Tensor

from pyro_maf.flows import IAF, MAF, RealNVP
from pyro_maf.infer.guides.density import LOG_TWO_PI, in_plates
from pyro_maf.infer.guides.mixture import FlowMixture, Shares
from pyro_maf.infer.guides.path_gradient import GradientLimit
from pyro_maf.infer.guides.saved import saved_guide
from pyro_maf.infer.guides.set_up import GuideSetUp
from pyro_maf.infer.guides.state import bare_latents, bare_trace, check_is_set_up
from pyro_maf.infer.models.model import Call, RefusalError, Site, Trace
from pyro_maf.infer.models.posterior import Posterior
from pyro_maf.infer.models.supports import within_reach
from pyro_maf.infer.start.initialization import best_normal
from pyro_maf.infer.start.modes import MOST
from pyro_maf.saving import drop_weak_references
from pyro_maf.transforms import ConditionalFlow

__all__ = ["AutoFlow", "AutoIAF", "AutoMAF", "AutoRealNVP", "Modes"]


class Modes(NamedTuple):
    """Modes of a posterior that matter.

    Attributes:
        seen: Number of modes that ascents ended at, in the set-up and in a fit, if they matter.
        covered: Number of modes that the guide has a component for, with a share above a thousandth.
    """

    seen: int
    covered: int


class AutoFlow(GuideSetUp):
    """Base class of the three guides; see `AutoIAF`."""

    @property
    def modes(self) -> Modes:
        """Numbers of posterior modes that were seen, and that the guide covers."""
        if (mixture := self._mixture) is None:
            return Modes(1 + self._missed_modes, 1)
        return Modes(len(mixture.components) + self._missed_modes, len(mixture.covered))

    def draw(self, count: int, call: Call) -> Tensor:
        """Draw vectors, (count, D), with gradient, as `get_posterior` does but without checks and caches."""
        if (mixture := self._mixture) is not None:
            self._shares.count(mixture, call, self._density_of)
            return self._limited(mixture.draw(count))
        like = self._weight
        noise = torch.randn(count, self.latent_dim, dtype=like.dtype, device=like.device)
        latent, _ = self.get_transform(*call.args, **call.kwargs).forward_and_log_det(noise)
        return self._limited(latent)

    def log_density(self, latent: Tensor, call: Call) -> Tensor:
        """Log-density of vectors, (count, D), in nats, (count,), without checks and caches."""
        if (mixture := self._mixture) is not None:
            return mixture.log_density(latent)
        noise, log_det = self.get_transform(*call.args, **call.kwargs).inverse_and_log_det(latent)
        return -0.5 * (noise.square().sum(-1) + self.latent_dim * LOG_TWO_PI) - log_det

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Draw every latent site; return the values by name."""
        self._set_up_once(*args, **kwargs)
        # With an encoder, there may always be new data to learn from.
        self._stored.register(self._who, self._stored_modules(), anneals=not self.is_amortised)
        self._create_plates(*args, **kwargs)
        latent = self.sample_latent(*args, **kwargs)
        return self._sites_at(latent, self.plates, *args, **kwargs)

    def sample_latent(self, *args: object, **kwargs: object) -> Tensor:
        """Draw the unconstrained latent variables, as an auxiliary site."""
        if (mixture := self._mixture) is not None and self._plain_model is not None:
            self._shares.count(mixture, Call(self._plain_model[0], args, kwargs), self._density_of)
        posterior = self._posterior(*args, **kwargs)  # in a call, the weights have been read already
        first = next(iter(self.latents.parts.values()))
        with in_plates(first, self.plates) if self.latents.rows else nullcontext():
            latent = pyro.sample(f"_{self.name}_latent", posterior, infer={"is_auxiliary": True})
        return self._limited(latent)

    def _limited(self, latent: Tensor) -> Tensor:
        """Limit the gradient of draws."""
        if latent.grad_fn is not None:
            # On the operation: a hook on the tensor would bypass the cache, and the density would be recomputed.
            latent.grad_fn.register_prehook(partial(self._limit, latent.output_nr))
        return latent

    def weigh_modes(self, call: Call) -> None:
        """Set the share of each mode from its evidence, once the guide is trained; a no-op for a single mode."""
        if (mixture := self._mixture) is not None:
            self._shares.settle(mixture, call, self._density_of)

    def cover(self, modes: Sequence[Mapping[str, Tensor]], call: Call) -> bool:
        """Add a component for each mode near these values of the sites; return whether any was added.

        None is added with an encoder, or if the user has chosen where to start.
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

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Site, Tensor]]:
        return ((part.site, within_reach(part.transform, each)) for part, each in self.latents.split(latent))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the guide to a file from which `pyro_maf.load` restores it, without model or data.

        The file is safetensors with JSON: weights, names, supports and shapes of the sites, and their plates. If the
        guide's coordinates depend on the model's prior, the file holds the prior as a list of torch operations, with
        the arguments of the set-up. Loading it runs no code. `torch.save` also works for a guide with an encoder, and a
        `state_dict` for any guide, to be loaded into a new guide of the same model.

        Args:
            path: A file, by convention with suffix .safetensors; an existing file is replaced once all is written.

        Raises:
            ValueError: If the guide is not set up.
            TypeError: If it has an encoder, a site whose support is not one of Pyro's, or coordinates from a prior that
                is not a plain function of values, for instance because it branches on them.
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
        # Pyro's method would remove the model from the original. What is fixed after the set-up is shared.
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        copied = ("_modules", "_parameters", "_buffers", "training", "_pyro_context")
        twin.__dict__.update(self.__dict__, **{name: copy.deepcopy(self.__dict__[name], memo) for name in copied})
        twin.__dict__.update(_stored=self._stored.of_a_copy(), _shares=Shares(), _limit=GradientLimit())
        return twin

    def __getstate__(self) -> dict[str, object]:
        # Without model and data, as Pyro's guides are pickled, but leaving this one unchanged.
        drop_weak_references(self)
        state = {**self.__dict__, "_model": None, "_plain_model": None, "_first_call": None, "master": None}
        state |= {"_stored": self._stored.of_a_copy(), "_shares": Shares(), "_limit": GradientLimit()}
        if self.prototype_trace is not None:
            # Not needed after the set-up, and often functions that cannot be pickled.
            state |= {"init_loc_fn": None, "plates": {}}
            state |= {"prototype_trace": bare_trace(self.prototype_trace), "latents": bare_latents(self.latents)}
        return state


class AutoIAF(AutoFlow):
    r"""Inverse autoregressive flow over all latent variables of a model, as a guide.

    With v the latent variables in unconstrained space as one vector, v = tails(loc + L (b + A flow(u))), u standard
    normal. loc and L are fixed by the initialization: the normal with the largest evidence lower bound among many along
    an ascent to the mode. The trained parameters, b, the lower triangular A, the flow and the tail weights (see
    `pyro_maf.transforms.Tails`, in units of that normal), start as the identity. So a new guide is that normal, and the
    family contains every full-rank normal and, nearly, Student's t of independent variables. Beyond 200 latent
    variables, L and A consist of a diagonal, up to 300 directions and a chain along the vector, memory is linear in
    their number, and tails are not trained; nor are they with `init_scale` or an encoder.

    Ascents start from the prior's median, from draws of the prior and from the cube (-2, 2) in unconstrained space. If
    they end at several modes that each hold at least a thousandth of the probability, as with label switching, the
    guide is a mixture with a flow for each of at most eight modes: q(v) = sum_k s_k q_k(v). Draws are stratified over
    the modes, the density is exact, and the shares s_k are set from the evidence, every hundred draws during training.

    If the prior of a site has a location or scale that depends on other latent variables, as in a hierarchy, v are
    coordinates between centred and non-centred, with a degree of centring for each entry: the fraction of its precision
    that is due to the data. Sites that are normal in these coordinates given all others are left out of the flow,
    except for three entries. Models can thus be written centred, whatever their data.

    Optimizer steps shorten with their number: step n + 1 moves the weights by 1 / sqrt(1 + n / 500) of what the
    optimizer would, so that a guide settles at a constant learning rate. With an encoder they are not shortened, since
    there may always be new data; `fit_guide` has its own schedule.

    Args:
        model: A Pyro model.
        num_layers: Number of autoregressive layers, by default 3.
        hidden_dims: Widths of each network's hidden layers, by default two of 64 to 512 units, depending on the number
            of latent variables.
        activation: A name from `pyro_maf.nn.ACTIVATIONS`.
        init_loc_fn: Starting point of the ascent, site by site, as for Pyro's guides; by default the prior's median, or
            the middle of the support of an improper prior.
        init_scale: Start with this scale in every direction, at the point of `init_loc_fn`, without an ascent.
        encoder: Amortises the guide: a function or a module that maps the model's arguments to the context of a
            conditional flow. A context of shape (features,) is shared by all latent variables. One of shape (\*rows,
            features) has a row for each row of a plate that contains all latent variables; if batches differ in size,
            `create_plates` has to create that plate.
        create_plates: As in Pyro's guides: creates subsampling plates from the model's arguments. The guide has the
            latent variables of all rows of these plates.

    Attributes:
        latent_dim: D, the number of unconstrained latent variables, or of those in one row.
        transform: The map from u to v, once set up.
        coordinates: The map from v to the sites of a hierarchy, or None for other models.

    Cost:
        Drawing and scoring the draws is one pass per layer; `log_prob` of other points is one sweep per layer. A
        training step takes both, for the path gradient, which `Trace_ELBO` gets from the guide. The set-up takes some
        tens of Hessians of the model and some thousand evaluations, in batches; for a model that has to be run for each
        draw, some 300 runs and a single ascent. With K modes, a draw costs the same as with one, and its density K
        times as much.

    Raises:
        ValueError: For a model without latent variables, with discrete ones, or with some in a subsampling plate that
            neither `encoder` nor `create_plates` covers; for options out of range.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> guide = AutoIAF(model, num_layers=2)
        >>> svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 1e-2}), Trace_ELBO())
        >>> loss = svi.step(torch.tensor([0.5, -0.2, 0.1]))
        >>> guide.rsample((7,))["scale"].shape, sorted(guide.median())
        (torch.Size([7]), ['scale'])

    Reference:
        Kingma et al., *Improving Variational Inference with Inverse Autoregressive Flow*, 2016.
    """

    flow_class = IAF


class AutoMAF(AutoFlow):
    r"""Masked autoregressive flow over all latent variables of a model, as a guide.

    Args:
        model, num_layers, hidden_dims, activation, init_loc_fn, init_scale, encoder, create_plates: As in `AutoIAF`.

    Cost:
        Drawing is one sweep per layer, `log_prob` one pass; a training step takes both, and their adjoints.

    Raises:
        ValueError: As in `AutoIAF`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> guide = AutoMAF(lambda: pyro.sample("z", dist.Gamma(2.0, 1.0)), num_layers=2)
        >>> guide.setup().rsample((7,))["z"].shape
        torch.Size([7])

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017.
    """

    flow_class = MAF


class AutoRealNVP(AutoFlow):
    r"""RealNVP over all latent variables of a model, as a guide; six layers by default.

    Args:
        model, num_layers, hidden_dims, activation, init_loc_fn, init_scale, encoder, create_plates: As in `AutoIAF`.

    Cost: one pass per layer for draws, and one for `log_prob` of any points; a training step takes both.

    Raises:
        ValueError: As in `AutoIAF`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> guide = AutoRealNVP(lambda: pyro.sample("z", dist.Beta(2.0, 3.0)), hidden_dims=[32, 32])
        >>> sorted(guide.setup().quantiles([0.1, 0.9]))
        ['z']

    Reference:
        Dinh, Sohl-Dickstein & Bengio, *Density Estimation Using Real NVP*, 2017.
    """

    flow_class = RealNVP
    default_num_layers = 6
