r"""Set-up of a guide: its options, the run of the model that lays out its vector, and its initial map."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Self, cast

import torch
from pyro import poutine
from pyro.infer.autoguide import init_to_uniform
from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_maf._core.checks import check_above_zero, check_choice, check_positive, check_sizes
from pyro_maf._core.options import ClassSignature, named_arguments
from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.guides.density import Encoder, GuideDensity
from pyro_maf.infer.guides.mixture import FlowMixture, Shares
from pyro_maf.infer.guides.path_gradient import GradientLimit
from pyro_maf.infer.guides.state import StoredWeights, digest_of
from pyro_maf.infer.models.coordinates import Coordinates
from pyro_maf.infer.models.enumeration import is_enumerated
from pyro_maf.infer.models.latents import Latents, Plates, median_or_feasible
from pyro_maf.infer.models.model import (
    FAILURES,
    Args,
    Call,
    Kwargs,
    Model,
    RefusalError,
    Site,
    Trace,
    check_set_up_call,
    latent_sites,
    without_empty_tables,
)
from pyro_maf.infer.models.plates import frames_of
from pyro_maf.infer.models.posterior import TRIES
from pyro_maf.infer.start.initialization import DENSE, Start
from pyro_maf.infer.start.normal import Normal, WideNormal
from pyro_maf.infer.start.start import start_of
from pyro_maf.nn import ACTIVATIONS, NetworkOptions
from pyro_maf.nn.layers import Tempered
from pyro_maf.sweep import OneThread
from pyro_maf.transforms import ConditionalFlow, Coupling, Flow, Stack
from pyro_maf.transforms.low_rank import LowRankHead
from pyro_maf.transforms.partial import Partial
from pyro_maf.transforms.tails import Tails
from pyro_maf.transforms.triangular import Head

__all__ = ["GuideSetUp"]

CreatePlates = Callable[..., Plates]

NARROWEST, WIDEST = 64, 512
BOUNDLESS = 1e18
"""Units of tails if those of the posterior are unknown: nothing counts as a tail within them. With small units, a tail
far out would overflow."""
SEARCHED = 32
"""Approximate number of draws that the search for a start evaluates at once."""
CAUTION = 16
"""Factor on the size of a model's operations, for those that its first run does not show."""
HELPERS = 3
"""Number of conditionally normal variables in the flow, if there are as many."""
WEIGHTS = 200 * WIDEST
"""Maximum number of weights between the latent vector and a hidden layer of default width, unless that is
`NARROWEST`."""


class _OperationSizes(TorchFunctionMode):
    """Mode that records the size of the largest operation.

    The size is the geometric mean of the numbers of entries of its tensors to the power 1.5: m n k for a matrix
    product.

    Attributes:
        largest: The size; 0 without operations.
    """

    largest = 0.0

    def __torch_function__(
        self, func: Callable[..., object], types: object, args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result._is_view():
            counts = [each.numel() for each in (*args, result) if isinstance(each, Tensor)]
            self.largest = max(self.largest, math.prod(counts) ** (1.5 / len(counts)))
        return result


class GuideSetUp(GuideDensity):
    """Options and set-up of a guide."""

    flow_class: Callable[..., Stack]
    default_num_layers = 3
    __signature__ = ClassSignature()

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """Create an instance; raise for an option that the class does not have."""
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
        self._plain_model = (model,)  # in a tuple, as in Pyro: a model that is a module is not a submodule of its guide
        num_layers = self.default_num_layers if num_layers is None else num_layers
        self._num_layers = check_positive(who, "num_layers", num_layers)
        self._hidden_dims = None if hidden_dims is None else check_sizes(who, "hidden_dims", hidden_dims)
        self._activation = check_choice(who, "activation", activation, ACTIVATIONS)
        self._init_scale = init_scale
        self.encoder = encoder
        self.transform: Stack | ConditionalFlow | FlowMixture | None = None
        self.coordinates: Coordinates | None = None
        self._missed_modes = 0
        self._largest_operation = math.inf
        self._shares = Shares()
        self._limit = GradientLimit()
        self._stored = StoredWeights()
        self._data = ""

    @property
    def name(self) -> str:
        """Name in Pyro, the prefix of its parameters and auxiliary sites."""
        return str(self._pyro_name)

    def setup(self, *args: object, **kwargs: object) -> Self:
        """Run the model, create the parameters and initialise them near the posterior; return the guide.

        The first call of the guide does the same. Call it earlier if an optimizer needs the parameters, or
        `load_state_dict` a target. Arguments are the model's.
        """
        self._set_up_once(*args, **kwargs)
        self._stored.load(self._who, self._stored_modules())
        return self

    def renew(self, *args: object, **kwargs: object) -> bool:
        """Set the guide up again if it was set up with other data; return whether it was.

        The start, modes and degrees of centring depend on the data. A guide with an encoder, which is for any data, or
        one that was pickled, which has no model, is left unchanged.
        """
        is_other = self._data not in ("", digest_of(args, kwargs))
        if self.prototype_trace is None or not is_other or self.is_amortised or self._plain_model is None:
            return False
        self.prototype_trace = None
        self._stored = self._stored.of_a_copy()
        self.setup(*args, **kwargs)
        return True

    @property
    def is_amortised(self) -> bool:
        """True if an encoder makes the guide a function of the model's arguments."""
        return self._encoder is not None

    def threads(self, draws: int) -> OneThread:
        """Context manager with one torch thread, if the model's operations are small for this number of draws."""
        return OneThread(CAUTION * self._largest_operation * draws**1.5)

    def _set_up_once(self, *args: object, **kwargs: object) -> None:
        if self.prototype_trace is None:
            with without_empty_tables():
                self._setup_prototype(*args, **kwargs)
            if weights := self._stored.loaded(f"{self.name}.transform"):
                self._compose_for(weights)

    def _compose_for(self, weights: Mapping[str, Tensor]) -> None:
        """Compose the map again if weights to be loaded, by their names in it, have another number of modes."""
        transform = self._map
        if isinstance(transform, ConditionalFlow):
            return
        components = len(weights["shares"]) if "shares" in weights else 0
        if components == (len(transform.components) if isinstance(transform, FlowMixture) else 0):
            return
        like = transform.heaviest if isinstance(transform, FlowMixture) else transform
        copies = [copy.deepcopy(like) for _ in range(max(1, components))]
        shares = self._weight.new_full((len(copies),), 1 / len(copies))
        self.transform = FlowMixture(copies, shares) if components else copies[0]
        self._stored = self._stored.of_a_copy()

    def _setup_prototype(self, *args: object, **kwargs: object) -> None:
        if self._plain_model is None:
            raise RefusalError(
                f"{self._who} expected a model to set itself up with, got none, since it was pickled before: "
                "call guide.setup() with the model's arguments, then pickle it."
            )
        call = Call(self._plain_model[0], args, kwargs)
        check_set_up_call(self._who, call)
        try:
            self._run_prototype(call)
            context = None if self._encoder is None else self._context(*args, **kwargs)
            with poutine.block(), self.threads(SEARCHED):  # trial runs must be invisible to handlers around the guide
                start = self._start(call, context)
            self.latent_dim = self.latents.size
            self.transform = self._map_from(start, 0 if context is None else context.shape[-1])
            self._data = digest_of(args, kwargs)
            self._missed_modes = 0 if isinstance(start, WideNormal) else start.missed
        except BaseException:
            self.prototype_trace = None  # so that the next call tries again
            raise

    @staticmethod
    def _prototype_hide_fn(msg: Site) -> bool:
        # Discrete sites that are summed out are not part of the guide, as in NUTS.
        return bool(prototype_hide_fn(msg)) or is_enumerated(msg)

    def _run_prototype(self, call: Call) -> None:
        """Run the model at initial values; if it raises, at points of the cube in which Stan starts NUTS."""
        run = partial(self._trace_prototype, call)
        try:
            run()
        except (ValueError, ArithmeticError, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
            if self._start_is_chosen:
                raise
            initial, self._model = self._model, (InitMessenger(init_to_uniform)(call.program),)
            try:
                if not any(_succeeds(run, seed) for seed in range(TRIES)):
                    raise
            finally:
                self._model = initial

    def _trace_prototype(self, call: Call) -> None:
        """Set the prototype from a run of the model, as Pyro does; sites in sequential plates raise an error."""
        model = poutine.block(self.model, cast("Callable[[object], bool]", self._prototype_hide_fn))
        with poutine.block(), _OperationSizes() as sizes:
            self.prototype_trace = call.of(model).trace()
        self._largest_operation = sizes.largest
        if self.master is not None:
            self.master()._check_prototype(self.prototype_trace)
        sites = latent_sites(self.prototype_trace).values()
        self._prototype_frames = {frame.name: frame for site in sites for frame in frames_of(site)}

    def _start(self, call: Call, context: Tensor | None) -> Start | WideNormal:
        """Lay out the latent sites as a vector; return the normals that the guide starts as."""
        prototype = cast("Trace", self.prototype_trace)
        create_plates: CreatePlates | None = (self if self.master is None else self.master()).create_plates
        plates = () if create_plates is None else create_plates(*call.args, **call.kwargs)
        rows = torch.Size() if context is None else context.shape[:-1]
        self.latents = Latents(self._who, latent_sites(prototype), rows, plates)
        self._create_plates(*call.args, **call.kwargs)
        scale = 1.0 if self._init_scale is None and context is not None else self._init_scale
        start, self.coordinates = start_of(call, prototype, self.latents, scale, self._start_is_chosen)
        self._first_call = None if self.coordinates is None else call
        return start

    def _map_from(self, start: Start | WideNormal, context_dim: int) -> Stack | ConditionalFlow | FlowMixture:
        """Compose a map that starts as a normal, or a mixture of such maps, one for each mode."""
        if isinstance(start, WideNormal):
            stack = self._stack_from(start, context_dim)
            return ConditionalFlow(stack) if context_dim else stack
        stacks = [self._stack_from(normal, context_dim, is_fitted=start.is_fitted) for normal in start.normals]
        if len(stacks) > 1:
            return FlowMixture(stacks, start.shares)
        return ConditionalFlow(stacks[0]) if context_dim else stacks[0]

    def _stack_from(self, start: Normal | WideNormal, context_dim: int, *, is_fitted: bool = False) -> Stack:
        """Compose flow, head and tails into a map that starts as a normal and trains at a guide's learning rate."""
        size = len(start.loc)
        variables = self._variables()
        count = len(variables)
        widths = 2 * (_width(count),) if self._hidden_dims is None else self._hidden_dims
        options: NetworkOptions = {"hidden_dims": widths, "activation": self._activation}
        # Without another variable to depend on, affine layers would be a single affine map.
        univariate = "spline" if count == 1 else "affine"
        flow = self.flow_class(
            count, num_layers=self._num_layers, context_dim=context_dim, univariate=univariate, **options
        )
        if count <= DENSE and not context_dim and count > 1:
            # A spline for each variable separately: the shape of many skewed ones, which affine layers model through
            # one another.
            with seeded(0):  # its weights are all 0, and must not advance the random state
                spline = Coupling(count, mask=torch.zeros(count, dtype=torch.bool), hidden_dims=(), univariate="spline")
            flow = Stack([*flow, spline])
        bends = [*flow] if count == size else [Partial(size, flow, variables)]
        layers = [*bends, _head(start, context_dim, options)]
        if isinstance(start, Normal) and not context_dim:
            # After the head, so that the tail of one variable is not shared by others; in units of the marginals. Tails
            # that are too heavy bound importance weights; lighter ones would bend the bulk, which the flow can do.
            scale = start.scale_tril.norm(dim=-1) if is_fitted else torch.full_like(start.loc, BOUNDLESS)
            layers.append(Tails(size, loc=start.loc, scale=scale, lighter=False))
        stack = Stack(layers).to(start.loc)
        for module in stack.modules():
            if isinstance(module, Tempered):
                module.temper()
                if isinstance(start, WideNormal) and count == size:
                    # Shifts and scales of the head do the same, and errors of thousands of such numbers add up.
                    last = getattr(module, "head", None) or module.layers[-1]
                    cast("nn.Linear", last).bias.requires_grad_(False)
        return stack

    def _variables(self) -> list[int]:
        """Variables that the flow acts on: those that are not conditionally normal, and some of the others."""
        parts, idle = self.latents.parts.values(), self.latents.idle
        is_normal = torch.zeros_like(idle)
        for part in parts:
            if self.coordinates is not None and part.site["name"] in self.coordinates.normal:
                is_normal[part.start : part.stop] = True
        is_normal = is_normal[~idle]
        helpers = is_normal.nonzero()[:HELPERS, 0]  # an affine flow bends a variable through others
        is_normal[helpers] = False
        return [int(index) for index in (~is_normal).nonzero()]

    def _stored_modules(self) -> dict[str, nn.Module]:
        """The modules that have weights, by their names in Pyro's store."""
        modules = {role: self._modules.get(role) for role in ("transform", "coordinates", "encoder")}
        return {f"{self.name}.{role}": module for role, module in modules.items() if module is not None}


def _succeeds(run: Callable[[], object], seed: int) -> bool:
    """Run a program with this seed; return False if it raises."""
    try:
        with seeded(seed):
            run()
    except FAILURES:
        return False
    return True


def _width(size: int) -> int:
    """Default width of hidden layers: four units per latent variable, but few enough that memory is linear in these."""
    return max(NARROWEST, min(WIDEST, 4 * size, WEIGHTS // size // 16 * 16))


def _head(start: Normal | WideNormal, context_dim: int, options: NetworkOptions) -> Flow:
    """Last layer of a guide: its initial normal, and the linear maps around it."""
    size = len(start.loc)
    if isinstance(start, WideNormal):
        if not context_dim:
            return LowRankHead(size, start.directions.shape[-1], **start._asdict())
        start = Normal(start.loc, start.scale.diag())  # with an encoder there are no directions
    return Head(size, loc=start.loc, scale_tril=start.scale_tril, context_dim=context_dim, **options)
