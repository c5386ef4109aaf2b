r"""Flows as guides: `AutoMAF`, `AutoIAF` and `AutoRealNVP`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor, nn

from pyro_maf._core.checks import check_above_zero, check_positive, check_shape, check_sizes
from pyro_maf.flows import IAF, MAF, RealNVP
from pyro_maf.infer.guide_state import StoredWeights, bare_latents, bare_trace, check_is_set_up
from pyro_maf.infer.head import FlowClass, with_head
from pyro_maf.infer.latents import Latents, median_or_feasible, names_of_plates
from pyro_maf.infer.model import Call, RefusalError, Site, check_set_up_call, latent_sites, without_empty_tables
from pyro_maf.infer.posterior import masked_in_vector, start_of
from pyro_maf.infer.quantiles import QUANTILE_DRAWS, checked_levels, even_noise, quantiles_of
from pyro_maf.infer.supports import check_supports
from pyro_maf.infer.values import checked_values, within_supports
from pyro_maf.saving import drop_weak_references
from pyro_maf.transforms import ConditionalFlow, Flow

__all__ = ["AutoFlow", "AutoIAF", "AutoMAF", "AutoRealNVP"]

Self = TypeVar("Self", bound="AutoFlow")


class AutoFlow(AutoContinuous):
    """Base class of the three guides; see `AutoIAF`."""

    flow_class: FlowClass
    default_num_layers = 3

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_layers: int | None = None,
        hidden_dims: Sequence[int] | None = None,
        init_loc_fn: Callable[..., Any] | None = None,
        init_scale: float | None = None,
        encoder: Callable[..., Tensor] | None = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        who = type(self).__name__
        if not callable(model):
            raise TypeError(f"{who} expected a model to call, got {type(model).__name__}.")
        if init_scale is not None:
            check_above_zero(who, "init_scale", init_scale, finite=True)
        super().__init__(model, median_or_feasible if init_loc_fn is None else init_loc_fn)
        self._is_told = init_loc_fn is not None
        self.create_plates = create_plates
        self._plain_model = (model,)  # in a tuple, as Pyro does: a model that is a module is no part of its guide
        self._num_layers = check_positive(
            who, "num_layers", self.default_num_layers if num_layers is None else num_layers
        )
        self._hidden_dims = None if hidden_dims is None else check_sizes(who, "hidden_dims", hidden_dims)
        self._init_scale = init_scale
        self.encoder = encoder
        self.transform: Any = None
        self._stored = StoredWeights()

    # -- setting up -----------------------------------------------------------------------------------------------

    def setup(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Run the model, create the parameters and initialise them near the posterior; return the guide.

        The first call of the guide does the same. Call it before that where an optimizer needs the parameters, or
        `load_state_dict` a target. Arguments are the model's.
        """
        self._set_up_once(args, kwargs)
        self._stored.load(type(self).__name__, self._stored_modules())
        return self

    def _set_up_once(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if self.prototype_trace is None:
            with without_empty_tables():
                self._setup_prototype(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        if self._plain_model is None:
            raise RefusalError(
                f"{type(self).__name__} expected a model to set itself up with, got none, since it was pickled before: "
                "call guide.setup() with the model's arguments, then pickle it."
            )
        call = Call(self._plain_model[0], args, kwargs)
        check_set_up_call(type(self).__name__, call)
        try:
            super(AutoContinuous, self)._setup_prototype(*args, **kwargs)
            prototype: Any = self.prototype_trace
            sites = latent_sites(prototype)
            context = None if self.encoder is None else self._context(args, kwargs)
            rows = torch.Size() if context is None else context.shape[:-1]
            with poutine.block():  # trial runs must be invisible to handlers around the guide
                create_plates = self.create_plates if self.master is None else self.master().create_plates
                created = names_of_plates(create_plates, args, kwargs)
                self._latents = Latents(type(self).__name__, sites, rows, created)
                check_supports(type(self).__name__, call, self._latents)
                self._create_plates(*args, **kwargs)
                scale = 1.0 if self._init_scale is None and self.encoder is not None else self._init_scale
                start = start_of(call, prototype, self._latents, scale, self._is_told)
            self.latent_dim = self._latents.size
            context_dim = 0 if context is None else context.shape[-1]
            stack = with_head(self.flow_class, start, self._num_layers, self._hidden_dims, context_dim)
            self.transform = ConditionalFlow(stack) if context_dim else stack
        except BaseException:
            self.prototype_trace = None  # so that the next call tries again
            raise

    def _context(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        context = self._held("encoder")(*args, **kwargs)
        if not isinstance(context, Tensor) or context.dim() == 0:
            raise RefusalError(
                f"{type(self).__name__} expected encoder to return a tensor (*rows, features), got {context!r}."
            )
        return context

    # -- Pyro's interface of a guide ------------------------------------------------------------------------------

    def get_base_dist(self) -> Any:
        """Return the standard normal distribution of the noise, of event shape (D,)."""
        like = next(self._held("transform").parameters())
        normal = dist.Normal(like.new_zeros(self.latent_dim), like.new_ones(self.latent_dim), validate_args=False)
        return normal.to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Flow:
        """Return the map from noise to unconstrained latent variables, conditioned on the encoder's context if any."""
        self._set_up_once(args, kwargs)
        transform = self._held("transform")
        return transform if self._held("encoder") is None else transform.condition(self._context(args, kwargs))

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """Return the distribution of the vector of unconstrained latent variables."""
        self.setup(*args, **kwargs)
        return self._posterior(args, kwargs)

    def _posterior(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        transform = self.get_transform(*args, **kwargs)
        return dist.TransformedDistribution(self.get_base_dist(), [transform], validate_args=False)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every latent site; return the values by name."""
        self._set_up_once(args, kwargs)
        self._stored.register(type(self).__name__, self._stored_modules())
        self._create_plates(*args, **kwargs)
        latent = self.sample_latent(*args, **kwargs)
        sites = {}
        for part, unconstrained in self._latents.split(latent):
            name, event_dim = part.site["name"], part.site["fn"].event_dim
            value, log_det = self._latents.mapped(part, unconstrained)
            with self._in_plates(name):
                for plate, dim in part.rows.items():
                    indices = self.plates[plate].indices.to(value.device)
                    value, log_det = value.index_select(dim, indices), log_det.index_select(dim + event_dim, indices)
                sites[name] = pyro.sample(name, dist.Delta(value, log_density=-log_det, event_dim=event_dim))
        return sites

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draw the unconstrained latent variables, as an auxiliary site of Pyro's."""
        posterior = self._posterior(args, kwargs)  # the weights are already read, in a call
        with self._in_plates(next(iter(self._latents.parts))) if self._latents.rows else nullcontext():
            latent = pyro.sample(f"_{self._pyro_name}_latent", posterior, infer={"is_auxiliary": True})
        if latent.grad_fn is not None:
            # On the operation: a hook on the tensor would bypass the cache, and the density would be computed again.
            latent.grad_fn.register_prehook(partial(_without_bad_draws, latent.output_nr))
        return latent

    @contextmanager
    def _in_plates(self, name: str) -> Iterator[None]:
        """Enter the plates of a site."""
        with ExitStack() as stack:
            for frame in self._latents.parts[name].site["cond_indep_stack"]:
                stack.enter_context(self.plates[frame.name])
            yield

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[Site, Tensor]]:
        for part, unconstrained in self._latents.split(latent):
            yield part.site, unconstrained

    def _stored_modules(self) -> dict[str, nn.Module]:
        """The modules that have weights, by their names in Pyro's store."""
        held = {role: self._held(role) for role in ("transform", "encoder")}
        return {f"{self._pyro_name}.{role}": module for role, module in held.items() if isinstance(module, nn.Module)}

    def _held(self, role: str) -> Any:
        """Return an attribute without registering its parameters with Pyro, as reading it would."""
        return self._modules.get(role, self.__dict__.get(role))

    # -- draws and densities --------------------------------------------------------------------------------------

    def rsample(self, sample_shape: Sequence[int] = (), *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        r"""Draw every site, (\*sample_shape, \*site), with gradient. Further arguments are the model's."""
        shape = check_shape(type(self).__name__, "sample_shape", sample_shape)
        latent = self.get_posterior(*args, **kwargs).rsample(shape)
        return self._as_sites(latent, shape)

    @property
    def shapes_of_all_rows(self) -> dict[str, torch.Size]:
        """Return the shape of every site if one is in a plate that subsamples; empty otherwise."""
        parts = self._latents.parts
        return {name: part.value.shape for name, part in parts.items()} if any(p.rows for p in parts.values()) else {}

    def scored_draws(
        self, count: int, nesting: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Draw every site for all rows, plates padded to `nesting`; also return the log-density in nats."""
        posterior = self.get_posterior(*args, **kwargs)
        latent = posterior.rsample((count, *(1,) * nesting))
        values, log_det = self._latents.unpack(latent)
        return values, posterior.log_prob(latent).reshape(count) - log_det

    def has_masks_of(self, sites: Mapping[str, Any]) -> bool:
        """True if the sites of a trace have the masks that they had when the guide was set up."""
        if self._latents.rows:
            return True  # where masks are refused
        return torch.equal(masked_in_vector(self._latents, sites), self._latents.masked)

    def log_prob(self, values: Mapping[str, Tensor | float], *args: Any, **kwargs: Any) -> Tensor:
        r"""Log-density of the guide in nats, (\*batch,), at values (\*batch, \*site) of every site.

        With an encoder whose context has rows, `batch` ends with them. Outside the support it is minus infinity.
        Further arguments are the model's.

        Raises:
            TypeError: If values are not numeric, or floating-point tensors of another dtype than the guide's.
            ValueError: If a site is missing or of another shape.
        """
        posterior = self.get_posterior(*args, **kwargs)
        like = next(self._held("transform").parameters())
        checked = checked_values(type(self).__name__, self._latents, values, like)
        latent, log_det = self._latents.pack(checked)
        inside = within_supports(self._latents, checked) & latent.isfinite().all(-1)
        log_prob = posterior.log_prob(torch.where(inside[..., None], latent, 0.0)) - log_det
        return torch.where(inside, log_prob, -torch.inf)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal median of every latent variable; see `quantiles`."""
        return self.quantiles(0.5, *args, **kwargs)

    @torch.no_grad()
    def quantiles(self, quantiles: float | Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        r"""Marginal quantiles of every latent variable, (\*levels, \*site), at levels in [0, 1].

        Empirical quantiles of 8,192 draws of each site, on its support: by component for a simplex or an ordered
        vector, so that medians of shares need not sum to 1. The noise is a fixed Sobol sequence, so that repeated calls
        agree.

        Raises:
            TypeError: If a level is not a number.
            ValueError: If a level is outside [0, 1].
        """
        posterior = self.get_posterior(*args, **kwargs)
        (transform,) = posterior.transforms
        like = next(self._held("transform").parameters())
        levels = checked_levels(type(self).__name__, quantiles, like)
        noise = even_noise(QUANTILE_DRAWS, self.latent_dim).to(like)
        latent = transform(noise.reshape(-1, *(1,) * len(self._latents.rows), self.latent_dim))
        # On the support, not before the map: a map that mixes coordinates does not preserve marginal quantiles.
        draws = self._as_sites(latent, torch.Size([QUANTILE_DRAWS]))
        return {name: quantiles_of(value, levels.to(value)) for name, value in draws.items()}

    def sites_of(self, noise: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        r"""Map noise u, (\*batch, D), to the value of each site, (\*batch, \*site)."""
        return self._as_sites(self.get_transform(*args, **kwargs)(noise), noise.shape[: -1 - len(self._latents.rows)])

    def sites_and_log_det(self, noise: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        r"""Map noise u to the value of each site, and return log |det dz/du| in nats, (\*batch,), with it.

        `noise` is (D,), or (\*batch, D) with ones in `batch` where the plates of the model are.
        """
        transform = self.get_transform()
        latent = transform(noise)
        total = transform.log_abs_det_jacobian(noise, latent)
        values = {}
        for part, unconstrained in self._latents.split(latent):
            values[part.site["name"]], log_det = self._latents.mapped(part, unconstrained)
            plates = tuple(range(-len(part.plates), 0))
            total = total + (log_det.sum(plates, keepdim=noise.dim() > 1) if plates else log_det)
        return values, total

    def _as_sites(self, latent: Tensor, shape: torch.Size) -> dict[str, Tensor]:
        rows = self._latents.rows
        plates = 0 if rows else max(len(part.plates) for part in self._latents.parts.values())
        batch = latent.reshape(-1, *(1,) * plates, *latent.shape[len(shape) :])
        sites = {}
        for part, unconstrained in self._latents.split(batch):
            value = part.transform(unconstrained)
            sites[part.site["name"]] = value if rows else value.reshape(shape + part.value.shape)
        return sites

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self.prototype_trace is None:
            check_is_set_up(type(self).__name__, state_dict, f"{prefix}transform.")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    # -- copies ---------------------------------------------------------------------------------------------------

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        # Pyro's method would remove the model from the original. What is fixed once set up is shared.
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        copied = ("_modules", "_parameters", "_buffers", "training", "_pyro_context")
        twin.__dict__.update(self.__dict__, **{name: copy.deepcopy(self.__dict__[name], memo) for name in copied})
        twin.__dict__["_stored"] = self._stored.of_a_copy()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        # Without the model, as Pyro's guides are pickled, but leaving this one as it is; its data stay behind too.
        drop_weak_references(self)
        lacking: dict[str, Any] = {
            "_model": None,
            "_plain_model": None,
            "master": None,
            "_stored": self._stored.of_a_copy(),
        }
        if self.prototype_trace is None:
            return {**self.__dict__, **lacking}
        # Not used again once set up, and often functions that cannot be pickled.
        lacking |= {"init_loc_fn": None, "plates": {}}
        lacking |= {"prototype_trace": bare_trace(self.prototype_trace), "_latents": bare_latents(self._latents)}
        return {**self.__dict__, **lacking}


class AutoIAF(AutoFlow):
    r"""Inverse autoregressive flow over all latent variables of a model, as a guide.

    With v the latent variables in unconstrained space as one vector, v = loc + L (b + A flow(u)), u standard normal.
    loc and L are fixed by the initialization: the normal of the largest evidence lower bound among many along an
    ascent to the mode. b, the lower triangular A and the flow are trained, and start as the identity; so a new guide is
    that normal, and the family contains every full-rank normal.

    Args:
        model: A Pyro model.
        num_layers: Number of autoregressive layers.
        hidden_dims: Widths of each network's hidden layers, by default two of 64 to 512 units, depending on the number
            of latent variables.
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
        model, num_layers, hidden_dims, init_loc_fn, init_scale, encoder, create_plates: As in `AutoIAF`.

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
        model, num_layers, hidden_dims, init_loc_fn, init_scale, encoder, create_plates: As in `AutoIAF`.

    Cost: one pass a layer, for a step and for `log_prob` of any points.

    Raises:
        ValueError: As in `AutoIAF`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> guide = AutoRealNVP(lambda: pyro.sample("z", dist.Gamma(2.0, 1.0)), num_layers=2)
        >>> guide.setup().rsample((7,))["z"].shape
        torch.Size([7])

    Reference:
        Dinh, Sohl-Dickstein & Bengio, *Density Estimation Using Real NVP*, 2017.
    """

    flow_class = RealNVP
    default_num_layers = 6


def _without_bad_draws(output: int, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Zero the gradient of draws where it is not finite, so that they do not reach the parameters."""
    gradient = gradients[output]
    if gradient is None or (gradient.device.type == "cpu" and math.isfinite(float(gradient.sum()))):
        return gradients
    clean = torch.where(gradient.isfinite().all(-1, keepdim=True), gradient, 0.0)
    return *gradients[:output], clean, *gradients[output + 1 :]
