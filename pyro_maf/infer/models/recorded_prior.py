"""The prior of a model as plain operations on the values of its sites, for a file without the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from operator import getitem
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.distributions.constraints import Constraint
from torch.utils._pytree import tree_leaves, tree_map_only

from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.models.coordinates import Coordinates
from pyro_maf.infer.models.latents import Latents
from pyro_maf.infer.models.location_scale import location_and_scale
from pyro_maf.infer.models.model import Call
from pyro_maf.infer.models.prior_walk import run_with
from pyro_maf.infer.models.recording import UnrecordedError, operations_of
from pyro_maf.infer.models.supports import bounds_of, support_between
from pyro_maf.saving import Savable

__all__ = ["RecordedPrior", "recorded_prior"]

SHAPES = (
    *("alias", "cat", "constant_pad_nd", "detach", "diag_embed", "diagonal", "expand", "flip", "permute", "reshape"),
    *("roll", "select.int", "slice.Tensor", "split.Tensor", "split_with_sizes", "squeeze", "squeeze.dim"),
    *("squeeze.dims", "stack", "t", "transpose.int", "tril", "triu", "unbind.int", "unfold", "unsqueeze"),
)
SELECTIONS = ("embedding", "gather", "index.Tensor", "index_select", "_to_copy")
SUMS = (
    *("_log_softmax", "_softmax", "amax", "amin", "cumprod", "cumsum", "linalg_vector_norm", "logcumsumexp"),
    *("logsumexp", "mean", "mean.dim", "prod", "prod.dim_int", "sum", "sum.dim_IntList", "var.correction"),
)
PRODUCTS = (
    *("_linalg_solve_ex", "addmm", "addmv", "baddbmm", "bmm", "cholesky_inverse", "cholesky_solve", "dot"),
    *("linalg_cholesky_ex", "linalg_inv_ex", "linalg_solve_triangular", "mm", "mv", "triangular_solve"),
)
ACTIVATIONS = (
    *("celu", "elu", "hardshrink", "hardsigmoid", "hardtanh", "leaky_relu", "mish", "selu", "softplus", "softshrink"),
    "threshold",  # earlier versions of torch do not tag these as elementwise
)
KNOWN = frozenset((*SHAPES, *SELECTIONS, *SUMS, *PRODUCTS, *ACTIVATIONS))
"""Torch operations that a recorded prior may use, besides elementwise ones."""
VIEWS = ("view", "_unsafe_view")
"""Operations on contiguous memory; `reshape` does the same on any."""
SCALES, MATRIX = "scales", "matrix"
PART = "part"
"""The operation that selects one of several results."""
OF_PLACE = ("device", "layout", "memory_format", "non_blocking", "pin_memory")
"""Arguments that determine where in memory a result is."""


@dataclass(frozen=True)
class _Number:
    """The number of a tensor."""

    number: int


class RecordedPrior(nn.Module, Savable):
    r"""The prior's location and scale, or bounds, of some sites, as functions of the values of the preceding sites.

    It is a Pyro model of latent sites in their order, which can be run with their values for any number of draws: the
    operations are those of one draw, and `torch.vmap` runs them for many. Tensors are numbered: first the sites'
    values, then constants, then the results of the operations.

    Args:
        sites: Name of every latent site, shape of its value, and number of plates around it.
        priors: For each such site, its name, the kind of its tensors, and their numbers: a location and "scales" or a
            "matrix", or the bounds of a support with this name.
        constants: Shape and dtype of each constant, whose values are in the state_dict.
        steps: The operations as JSON, each a list of its name, positional and keyword arguments, in which
            `{"tensor": 3}` stands for a tensor and `{"dtype": "float64"}` for a dtype.

    Raises:
        ValueError: For an operation that is not allowed.
    """

    def __init__(
        self,
        sites: Sequence[Sequence[Any]],
        priors: Sequence[Sequence[Any]],
        constants: Sequence[Sequence[Any]],
        steps: str,
    ) -> None:
        super().__init__()
        self._sites = {name: (tuple(shape), nests) for name, shape, nests in sites}
        self._priors: dict[str, tuple[str, Sequence[int]]] = {name: (kind, each) for name, kind, *each in priors}
        self._values = len(sites)
        self._constants = len(constants)
        for index, (shape, dtype) in enumerate(constants):
            self.register_buffer(f"constant_{index}", torch.zeros(shape, dtype=_dtype(dtype)))
        self._steps = [
            (_checked(name), _decoded(args), {key: _decoded(value) for key, value in kwargs.items()})
            for name, args, kwargs in json.loads(steps)
        ]
        self._segments = self._by_site()

    @property
    def names(self) -> list[str]:
        """The sites with a location and scale."""
        return [name for name, (kind, _) in self._priors.items() if kind in (SCALES, MATRIX)]

    @property
    def correlated(self) -> list[str]:
        """Names of the sites whose scale is a matrix."""
        return [name for name, (kind, _) in self._priors.items() if kind == MATRIX]

    @property
    def moving(self) -> list[str]:
        """The sites with bounds."""
        return [name for name, (kind, _) in self._priors.items() if kind not in (SCALES, MATRIX)]

    def _by_site(self) -> list[list[int]]:
        """For each site, the results that can be computed once it has its value, which is the last that they need."""
        segments: list[list[int]] = [[] for _ in self._sites]
        last = [*range(self._values), *[0] * self._constants]
        for number in range(len(last), len(last) + len(self._steps)):
            last.append(max((last[each] for each in self._inputs_of(number)), default=0))
            segments[last[number]].append(number)
        return segments

    def _step(self, number: int) -> tuple[str, Any, Any]:
        """Name and arguments of the operation with this result."""
        return self._steps[number - self._values - self._constants]

    def _inputs_of(self, number: int) -> list[int]:
        """Numbers of the tensors that a result is computed from."""
        leaves = tree_leaves(self._step(number)[1:])
        return [leaf.number for leaf in leaves if isinstance(leaf, _Number)]

    def forward(self, *args: object, **kwargs: object) -> None:
        """Run as a Pyro model in which every site has a value; arguments are ignored."""
        found: dict[int, Tensor] = {}
        most = max(nests for _, nests in self._sites.values())
        draws = torch.Size()
        for index, (name, (shape, nests)) in enumerate(self._sites.items()):
            fn: TorchDistribution = dist.Normal(0.0, 1.0)
            if name in self._priors:
                fn = self._distribution(name, found, (*draws, *(1,) * (most - nests)) if draws else ())
            value = pyro.sample(name, fn)
            draws = value.shape[: max(0, value.dim() - len(shape) - most + nests)]
            found[index] = value.reshape(-1, *shape)
            found |= self._results(self._segments[index], found)

    def _results(self, segment: Sequence[int], found: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Compute results for all draws at once."""
        if not segment:
            return {}

        def of_one_draw(tensors: dict[int, Tensor]) -> dict[int, Any]:
            results: dict[int, Any] = {}
            for number in segment:
                name, args, kwargs = self._step(number)
                look_up = partial(self._tensor, tensors | results)
                args, kwargs = tree_map_only(_Number, look_up, (args, kwargs))
                results[number] = args[0][args[1]] if name == PART else _operation(name)(*args, **kwargs)
            return results

        used = {number for result in segment for number in self._inputs_of(result)}
        return torch.vmap(of_one_draw)({number: found[number] for number in used if number in found})

    def _tensor(self, found: Mapping[int, Tensor], place: _Number) -> Tensor:
        constant = place.number - self._values
        return self.get_buffer(f"constant_{constant}") if 0 <= constant < self._constants else found[place.number]

    def _distribution(self, name: str, found: Mapping[int, Tensor], lead: Sequence[int]) -> TorchDistribution:
        """A distribution with a site's location and scale, or bounds, in the shape of the draws and of the site."""
        dims, (kind, numbers) = len(self._sites[name][0]), self._priors[name]
        tensors = []
        for number, width in zip(numbers, (dims, dims + (kind == MATRIX)), strict=False):
            tensor = self._tensor(found, _Number(number))
            if number in found:
                shape = tensor.shape[1:]
                tensor = tensor.reshape((*lead, *(1,) * (width - len(shape) if lead else 0), *shape))
            tensors.append(tensor)
        if kind == MATRIX:
            return dist.MultivariateNormal(tensors[0], scale_tril=tensors[1], validate_args=False)
        if kind == SCALES:
            return dist.Normal(tensors[0], tensors[1], validate_args=False)
        return dist.ImproperUniform(support_between(kind, tensors), (), ())


def recorded_prior(latents: Latents, coordinates: Coordinates, call: Call, dtype: torch.dtype) -> RecordedPrior:
    """Record the prior of the sites that coordinates map: location and scale, or bounds.

    Args:
        latents: The layout of the latent vector.
        coordinates: The coordinates.
        call: The model with its arguments.
        dtype: The dtype of the values.

    Raises:
        UnrecordedError: If it draws random numbers, branches on values or uses operations that are not allowed.
        TypeError: If a support that moves is not one of those with bounds.
    """
    values = {name: value.detach().to(dtype, copy=True) for name, value in latents.values.items()}
    kinds: dict[str, tuple[str, int]] = {}

    def priors() -> list[Tensor]:
        found: list[Tensor] = []

        def value_of(name: str, fn: TorchDistribution) -> Tensor:
            if name in coordinates.moving:
                kind, tensors = bounds_of(cast("Constraint", fn.support))
            elif name in coordinates.names and (prior := location_and_scale(fn)) is not None:
                kind, tensors = MATRIX if prior.scale.is_matrix else SCALES, [prior.loc, prior.scale.tensor]
            else:
                return values[name]
            kinds[name] = kind, len(tensors)
            found.extend(torch.as_tensor(each) for each in tensors)
            return values[name]

        run_with(call, values, value_of)
        return found

    with seeded(0, latents.idle.device):
        graph, constants = operations_of(priors, list(values.values()))
    steps, outputs = _described(graph, len(values) + len(constants))
    rest = iter(outputs)
    prior = RecordedPrior(
        [(name, tuple(part.value.shape), len(part.plates)) for name, part in latents.parts.items()],
        [(name, kind, *islice(rest, count)) for name, (kind, count) in kinds.items()],
        [(tuple(constant.shape), _name(constant.dtype)) for constant in constants],
        json.dumps(steps),
    )
    prior.load_state_dict({f"constant_{index}": constant for index, constant in enumerate(constants)})
    return prior


def _described(graph: fx.Graph, first: int) -> tuple[list[object], list[int]]:
    """Describe the operations of a graph, and the numbers of its outputs, as JSON values."""
    nodes = list(graph.nodes)
    _, *outputs = nodes[-1].args[0]  # without the conditions
    needed = set(outputs)
    for node in reversed(nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    numbers = {node: index for index, node in enumerate(graph.find_nodes(op="placeholder"))}
    steps: list[object] = []
    for node in nodes[:-1]:
        if node in needed and node not in numbers:
            numbers[node] = first + len(steps)
            steps.append(_described_step(node, numbers))
    return steps, [numbers[each] for each in outputs]


def _described_step(node: fx.Node, numbers: Mapping[fx.Node, int]) -> object:
    def plain(value: object) -> object:
        if isinstance(value, fx.Node):
            return {"tensor": numbers[value]}
        if isinstance(value, torch.dtype):
            return {"dtype": _name(value)}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise UnrecordedError(f"an argument of {type(value).__name__}")

    if node.target is getitem:
        return [PART, plain(node.args), {}]
    namespace, _, name = str(node.target).removesuffix(".default").partition(".")
    name = "reshape" if name in VIEWS else name
    if namespace != "aten" or not _is_known(name):
        raise UnrecordedError(f"the operation {name}")
    kwargs = {key: plain(value) for key, value in node.kwargs.items() if key not in OF_PLACE}
    return [name, plain(node.args), kwargs]


def _decoded(value: Any) -> Any:
    """Convert the description of an argument; tensors become numbers."""
    if isinstance(value, dict):
        return _Number(int(value["tensor"])) if "tensor" in value else _dtype(value["dtype"])
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is not a dtype")
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checked(name: str) -> str:
    if name != PART and not _is_known(name):
        raise ValueError(f"{name} is not an allowed operation")
    return name


def _is_known(name: str) -> bool:
    """Return whether an operation is allowed: listed or elementwise, without random numbers or in-place changes."""
    operation = _operation(name)
    if not isinstance(operation, OpOverload):
        return False
    by_element = torch.Tag.pointwise in operation.tags and torch.Tag.nondeterministic_seeded not in operation.tags
    return (name in KNOWN or by_element) and not operation._schema.is_mutable


@cache
def _operation(name: str) -> Any:
    """The torch operation with a name such as `exp` or `add.Tensor`; something else if there is none."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
