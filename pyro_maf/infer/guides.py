r"""Flows as guides: `AutoMAF`, `AutoIAF` and `AutoRealNVP`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Self, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor, nn

from pyro_maf._core.checks import check_above_zero, check_choice, check_positive, check_shape, check_sizes
from pyro_maf._core.options import ClassSignature, named_arguments
from pyro_maf.flows import IAF, MAF, RealNVP
from pyro_maf.infer.guide_state import StoredWeights, bare_latents, bare_trace, check_is_set_up
from pyro_maf.infer.initialization import Normal
from pyro_maf.infer.latents import Latents, Part, Plates, median_or_feasible
from pyro_maf.infer.model import (
    Call,
    Model,
    RefusalError,
    Site,
    Trace,
    check_set_up_call,
    latent_sites,
    without_empty_tables,
)
from pyro_maf.infer.path_gradient import zero_bad_gradients
from pyro_maf.infer.posterior import Levels, checked_levels, marginal_quantiles, start_of
from pyro_maf.nn import ACTIVATIONS, NetworkOptions
from pyro_maf.nn.layers import Tempered
from pyro_maf.saving import drop_weak_references
from pyro_maf.transforms import ConditionalFlow, Flow, Stack
from pyro_maf.transforms.triangular import Head

__all__ = ["AutoFlow", "AutoIAF", "AutoMAF", "AutoRealNVP"]

Encoder = Callable[..., Tensor]
CreatePlates = Callable[..., Plates]


class AutoFlow(AutoContinuous):
    """Base class of the three guides; see `AutoIAF`."""

    flow_class: Callable[..., Stack]
    default_num_layers = 3
    latents: Latents
    __signature__ = ClassSignature()

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Create an instance, or refuse an option that the class does not have."""
        named_arguments(cls, args, kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        model: Model,
        *,
        num_layers: int | None = None,
        hidden_dims: Sequence[int] | None = None,
        activation: str = "elu",
        init_loc_fn: Callable[[Site], Tensor] | None = None,
        init_scale: float | None = None,
        encoder: Encoder | None = None,
        create_plates: CreatePlates | None = None,
    ) -> None:
        who = self._who
        if not callable(model):
            raise TypeError(f"{who} expected a model to call, got {type(model).__name__}.")
        if init_scale is not None:
            check_above_zero(who, "init_scale", init_scale, finite=True)
        super().__init__(model, median_or_feasible if init_loc_fn is None else init_loc_fn)
        self._start_is_chosen = init_loc_fn is not None
        self.create_plates = create_plates
        self._plain_model = (model,)  # in a tuple, as Pyro does: a model that is a module is no part of its guide
        num_layers = self.default_num_layers if num_layers is None else num_layers
        self._num_layers = check_positive(who, "num_layers", num_layers)
        self._hidden_dims = None if hidden_dims is None else check_sizes(who, "hidden_dims", hidden_dims)
        self._activation = check_choice(who, "activation", activation, ACTIVATIONS)
        self._init_scale = init_scale
        self.encoder = encoder
        self.transform: Stack | ConditionalFlow | None = None
        self._stored = StoredWeights()

    @property
    def name(self) -> str:
        """Name in Pyro, with which the names of its parameters and auxiliary sites begin."""
        return str(self._pyro_name)

    @property
    def _who(self) -> str:
        return type(self).__name__

    # -- setting up -----------------------------------------------------------------------------------------------

    def setup(self, *args: object, **kwargs: object) -> Self:
        """Run the model, create the parameters and initialise them near the posterior; return the guide.

        The first call of the guide does the same. Call it before that where an optimizer needs the parameters, or
        `load_state_dict` a target. Arguments are the model's.
        """
        self._set_up_once(*args, **kwargs)
        self._stored.load(self._who, self._stored_modules())
        return self

    def _set_up_once(self, *args: object, **kwargs: object) -> None:
        if self.prototype_trace is None:
            with without_empty_tables():
                self._setup_prototype(*args, **kwargs)

    def _setup_prototype(self, *args: object, **kwargs: object) -> None:
        if self._plain_model is None:
            raise RefusalError(
                f"{self._who} expected a model to set itself up with, got none, since it was pickled before: "
                "call guide.setup() with the model's arguments, then pickle it."
            )
        call = Call(self._plain_model[0], args, kwargs)
        check_set_up_call(self._who, call)
        try:
            super(AutoContinuous, self)._setup_prototype(*args, **kwargs)
            context = None if self._encoder is None else self._context(*args, **kwargs)
            with poutine.block():  # trial runs must be invisible to handlers around the guide
                start = self._start(call, context)
            self.latent_dim = self.latents.size
            self.transform = self._map_from(start, 0 if context is None else context.shape[-1])
        except BaseException:
            self.prototype_trace = None  # so that the next call tries again
            raise

    def _start(self, call: Call, context: Tensor | None) -> Normal:
        """Lay out the latent sites as a vector; return the normal that the guide starts as."""
        prototype = cast("Trace", self.prototype_trace)
        create_plates: CreatePlates | None = (self if self.master is None else self.master()).create_plates
        plates = () if create_plates is None else create_plates(*call.args, **call.kwargs)
        rows = torch.Size() if context is None else context.shape[:-1]
        self.latents = Latents(self._who, latent_sites(prototype), rows, plates)
        self._create_plates(*call.args, **call.kwargs)
        scale = 1.0 if self._init_scale is None and context is not None else self._init_scale
        return start_of(call, prototype, self.latents, scale, self._start_is_chosen)

    def _map_from(self, start: Normal, context_dim: int) -> Stack | ConditionalFlow:
        """Compose the flow with a head: a map that starts as a normal, and trains at a guide's learning rate."""
        size = len(start.loc)
        widths = 2 * (min(512, max(64, 4 * size)),) if self._hidden_dims is None else self._hidden_dims
        options: NetworkOptions = {"hidden_dims": widths, "activation": self._activation}
        flow = self.flow_class(size, num_layers=self._num_layers, context_dim=context_dim, **options)
        head = Head(size, loc=start.loc, scale_tril=start.scale_tril, context_dim=context_dim, **options)
        stack = Stack([*flow, head]).to(start.loc)
        for module in stack.modules():
            if isinstance(module, Tempered):
                module.temper()
        return ConditionalFlow(stack) if context_dim else stack

    def _context(self, *args: object, **kwargs: object) -> Tensor:
        context = cast("Encoder", self._encoder)(*args, **kwargs)
        if not isinstance(context, Tensor) or context.dim() == 0:
            raise RefusalError(f"{self._who} expected encoder to return a tensor (*rows, features), got {context!r}.")
        return context

    # -- Pyro's interface of a guide ------------------------------------------------------------------------------

    def get_base_dist(self) -> TorchDistribution:
        """Return the standard normal distribution of the noise, of event shape (D,)."""
        zeros = self._weight.new_zeros(self.latent_dim)
        return dist.Normal(zeros, torch.ones_like(zeros), validate_args=False).to_event(1)

    def get_transform(self, *args: object, **kwargs: object) -> Flow:
        """Return the map from noise to unconstrained latent variables, conditioned on the encoder's context if any."""
        self._set_up_once(*args, **kwargs)
        transform = self._map
        return transform if isinstance(transform, Flow) else transform.condition(self._context(*args, **kwargs))

    def get_posterior(self, *args: object, **kwargs: object) -> TorchDistribution:
        """Return the distribution of the vector of unconstrained latent variables."""
        self.setup(*args, **kwargs)
        return self._posterior(*args, **kwargs)

    def _posterior(self, *args: object, **kwargs: object) -> TorchDistribution:
        transform = self.get_transform(*args, **kwargs)
        return dist.TransformedDistribution(self.get_base_dist(), [transform], validate_args=False)

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Draw every latent site; return the values by name."""
        self._set_up_once(*args, **kwargs)
        self._stored.register(self._who, self._stored_modules())
        self._create_plates(*args, **kwargs)
        latent = self.sample_latent(*args, **kwargs)
        return {part.site["name"]: self._sample(part, value) for part, value in self.latents.split(latent)}

    def _sample(self, part: Part, unconstrained: Tensor) -> Tensor:
        """Draw a site from the distribution that has all its mass at an image of the latent vector."""
        event_dim = part.site["fn"].event_dim
        value, log_det = self.latents.mapped(part, unconstrained)
        with self._in_plates(part):
            for plate, dim in part.rows.items():
                indices = self.plates[plate].indices.to(value.device)
                value, log_det = value.index_select(dim, indices), log_det.index_select(dim + event_dim, indices)
            return pyro.sample(part.site["name"], dist.Delta(value, log_density=-log_det, event_dim=event_dim))

    def sample_latent(self, *args: object, **kwargs: object) -> Tensor:
        """Draw the unconstrained latent variables, as an auxiliary site of Pyro's."""
        posterior = self._posterior(*args, **kwargs)  # the weights are already read, in a call
        first = next(iter(self.latents.parts.values()))
        with self._in_plates(first) if self.latents.rows else nullcontext():
            latent = pyro.sample(f"_{self.name}_latent", posterior, infer={"is_auxiliary": True})
        if latent.grad_fn is not None:
            # On the operation: a hook on the tensor would bypass the cache, and the density would be computed again.
            latent.grad_fn.register_prehook(partial(zero_bad_gradients, latent.output_nr))
        return latent

    @contextmanager
    def _in_plates(self, part: Part) -> Iterator[None]:
        """Enter the plates of a site."""
        with ExitStack() as stack:
            for frame in part.site["cond_indep_stack"]:
                stack.enter_context(self.plates[frame.name])
            yield

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Site, Tensor]]:
        return ((part.site, unconstrained) for part, unconstrained in self.latents.split(latent))

    # Modules are read here without registering their parameters with Pyro, as reading an attribute of a guide would.

    @property
    def _map(self) -> Stack | ConditionalFlow:
        return cast("Stack | ConditionalFlow", self._modules["transform"])

    @property
    def _encoder(self) -> Encoder | None:
        return cast("Encoder | None", self._modules.get("encoder", self.__dict__.get("encoder")))

    @property
    def _weight(self) -> Tensor:
        """A weight, for its dtype and device."""
        return next(self._map.parameters())

    def _stored_modules(self) -> dict[str, nn.Module]:
        """The modules that have weights, by their names in Pyro's store."""
        modules = {role: self._modules.get(role) for role in ("transform", "encoder")}
        return {f"{self.name}.{role}": module for role, module in modules.items() if module is not None}

    # -- draws and densities --------------------------------------------------------------------------------------

    def rsample(self, sample_shape: Sequence[int] = (), *args: object, **kwargs: object) -> dict[str, Tensor]:
        r"""Draw every site, (\*sample_shape, \*site), with gradient. Further arguments are the model's."""
        shape = check_shape(self._who, "sample_shape", sample_shape)
        latent = self.get_posterior(*args, **kwargs).rsample(shape)
        return self.latents.sites(latent, shape)

    def scored_draws(self, count: int, nesting: int, call: Call) -> tuple[dict[str, Tensor], Tensor]:
        """Draw every site for all rows, plates padded to `nesting`; also return the log-density in nats."""
        posterior = self.get_posterior(*call.args, **call.kwargs)
        latent = posterior.rsample(torch.Size((count, *(1,) * nesting)))
        values, log_det = self.latents.unpack(latent)
        return values, (posterior.log_prob(latent) - log_det).reshape(count)

    def log_prob(self, values: Mapping[str, Tensor | float], *args: object, **kwargs: object) -> Tensor:
        r"""Log-density of the guide in nats, (\*batch,), at values (\*batch, \*site) of every site.

        With an encoder whose context has rows, `batch` ends with them. Outside the support it is minus infinity.
        Further arguments are the model's.

        Raises:
            TypeError: If values are not numeric, or floating-point tensors of another dtype than the guide's.
            ValueError: If a site is missing or of another shape.
        """
        posterior = self.get_posterior(*args, **kwargs)
        tensors = self.latents.checked(values, self._weight)
        latent, log_det = self.latents.pack(tensors)
        inside = self.latents.within_supports(tensors) & latent.isfinite().all(-1)
        log_prob = posterior.log_prob(torch.where(inside[..., None], latent, 0.0)) - log_det
        return torch.where(inside, log_prob, -torch.inf)

    @torch.no_grad()
    def median(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Marginal median of every latent variable; see `quantiles`."""
        return self.quantiles(0.5, *args, **kwargs)

    @torch.no_grad()
    def quantiles(self, quantiles: Levels, *args: object, **kwargs: object) -> dict[str, Tensor]:
        r"""Marginal quantiles of every latent variable, (\*levels, \*site), at levels in [0, 1].

        Empirical quantiles of 8,192 draws of each site, on its support: by component for a simplex or an ordered
        vector, so that medians of shares need not sum to 1. The noise is a fixed Sobol sequence, so that repeated calls
        agree.

        Raises:
            TypeError: If a level is not a number.
            ValueError: If a level is outside [0, 1].
        """
        (transform,) = self.get_posterior(*args, **kwargs).transforms
        return marginal_quantiles(self.latents, transform, checked_levels(self._who, quantiles, self._weight))

    def sites_of(self, noise: Tensor, *args: object, **kwargs: object) -> dict[str, Tensor]:
        r"""Map noise u, (\*batch, D), to the value of each site, (\*batch, \*site)."""
        latent = self.get_transform(*args, **kwargs)(noise)
        return self.latents.sites(latent, noise.shape[: -1 - len(self.latents.rows)])

    def sites_and_log_det(self, noise: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        r"""Map noise u to the value of each site, and return log |det dz/du| in nats, (\*batch,), with it.

        `noise` is (D,), or (\*batch, D) with ones in `batch` where the plates of the model are.
        """
        transform = self.get_transform()
        latent = transform(noise)
        values, log_det = self.latents.unpack(latent)
        return values, transform.log_abs_det_jacobian(noise, latent) + log_det

    # -- copies ---------------------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: object) -> None:
        if self.prototype_trace is None:
            check_is_set_up(self._who, state_dict, f"{prefix}transform.")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        # Pyro's method would remove the model from the original. What is fixed once set up is shared.
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        copied = ("_modules", "_parameters", "_buffers", "training", "_pyro_context")
        twin.__dict__.update(self.__dict__, **{name: copy.deepcopy(self.__dict__[name], memo) for name in copied})
        twin.__dict__["_stored"] = self._stored.of_a_copy()
        return twin

    def __getstate__(self) -> dict[str, object]:
        # Without the model, as Pyro's guides are pickled, but leaving this one as it is; its data stay behind too.
        drop_weak_references(self)
        state = {**self.__dict__, "_model": None, "_plain_model": None, "master": None}
        state["_stored"] = self._stored.of_a_copy()
        if self.prototype_trace is not None:
            # Not used again once set up, and often functions that cannot be pickled.
            state |= {"init_loc_fn": None, "plates": {}}
            state |= {"prototype_trace": bare_trace(self.prototype_trace), "latents": bare_latents(self.latents)}
        return state


class AutoIAF(AutoFlow):
    r"""Inverse autoregressive flow over all latent variables of a model, as a guide.

    With v the latent variables in unconstrained space as one vector, v = loc + L (b + A flow(u)), u standard normal.
    loc and L are fixed by the initialization: the normal of the largest evidence lower bound among many along an
    ascent to the mode. b, the lower triangular A and the flow are trained, and start as the identity; so a new guide is
    that normal, and the family contains every full-rank normal.

    Args:
        model: A Pyro model.
        num_layers: Number of autoregressive layers, by default 3.
        hidden_dims: Widths of each network's hidden layers, by default two of 64 to 512 units, depending on the number
            of latent variables.
        activation: A name from `pyro_maf.nn.ACTIVATIONS`.
        init_loc_fn: Starting point of the ascent, site by site, as for other guides of Pyro; by default the prior's
            median, or the middle of the support of an improper prior.
        init_scale: Start with this scale in every direction, at the point of `init_loc_fn`, without an ascent.
        encoder: Amortises the guide: a function or a module that maps the model's arguments to the context of a
            conditional flow. A context of shape (features,) is for all latent variables together. One of shape
            (\*rows, features) is for each row of a plate, which all latent variables are in; if batches differ in
            size, `create_plates` has to create that plate.
        create_plates: As in Pyro's guides: creates plates that subsample from the model's arguments. The guide has the
            latent variables of all rows of these.

    Attributes:
        latent_dim: D, the number of unconstrained latent variables, or those of one row.
        transform: The map from u to v, once set up.

    Cost:
        A step, as drawing and scoring its draws, is one pass a layer. `log_prob` of other points is one sweep a
        layer. Setting up takes some tens of Hessians of the model and some thousand evaluations, in batches; of a model
        that has to be run for each draw, some 300 runs.

    Raises:
        ValueError: For a model without latent variables, with discrete ones, or with some in a plate that subsamples
            and that neither `encoder` nor `create_plates` is for; for options out of range.

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
        A step is one sweep a layer and its adjoint. `log_prob` of other points is one pass a layer.

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
    r"""RealNVP over all latent variables of a model, as a guide. Six layers by default.

    Args:
        model, num_layers, hidden_dims, activation, init_loc_fn, init_scale, encoder, create_plates: As in `AutoIAF`.

    Cost: one pass a layer, for a step and for `log_prob` of any points.

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
