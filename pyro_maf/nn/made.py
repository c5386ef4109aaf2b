"""Networks and their options: MADE, and the plain network of couplings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_maf._core.checks import (
    check_choice,
    check_context,
    check_event,
    check_permutation,
    check_positive,
    check_sizes,
)
from pyro_maf.nn.layers import BlockLinear, Linear, MaskedLinear, Tempered, masks
from pyro_maf.nn.layers import degrees as spread_degrees

__all__ = [
    "ACTIVATIONS",
    "MADE",
    "MLP",
    "MADEOptions",
    "NetworkOptions",
    "compress_tails",
    "default_hidden_dims",
    "default_rank",
    "reseeded",
]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "softplus": F.softplus,
    "sigmoid": torch.sigmoid,
}
"""Activations of `MADE` and `MLP`, by name."""


class NetworkOptions(TypedDict, total=False):
    """Options of a network, which a layer or stack forwards to it.

    Attributes:
        hidden_dims: Widths of the hidden layers.
        activation: A name from `ACTIVATIONS`.
    """

    hidden_dims: Sequence[int] | None
    activation: str


class MADEOptions(NetworkOptions, total=False):
    """Options of a `MADE`, which a layer, stack or mixture forwards to it.

    Attributes:
        degrees: "sequential" or "random", as in the function of that name.
        seed: Seed of random degrees.
    """

    degrees: str
    seed: int


Options = TypeVar("Options", bound=MADEOptions)


def reseeded(options: Options, seed: int) -> Options:
    """The options with another seed, so that networks with equal options have different random degrees."""
    options = options.copy()
    options["seed"] = seed
    return options


BULK = 3.0
LEAST_RANK, MOST_WEIGHTS = 8, 200_000
"""For splines with 25 parameters and 63 to 80 variables, rank 8 learns as much as full rank; rank 4 loses a nat."""


def compress_tails(x: Tensor) -> Tensor:
    r"""Compress the tails of a network's inputs: x itself for |x| <= 3, sign(x) (3 + log(1 + |x| - 3)) beyond.

    A network grows linearly far from its training data. Without compression, a point 50 standard deviations out gets a
    location and a scale so extreme that float32 cannot invert the map, and an outlier in a test set can cost a
    thousand nats. The compression is continuously differentiable and strictly increasing, so no information is lost.

    Example:
        >>> compress_tails(torch.tensor([-2.0, 1.5, 50.0]))
        tensor([-2.0000,  1.5000,  6.8712])
    """
    beyond = F.softshrink(x, BULK)
    return x.clamp(-BULK, BULK) + beyond.detach().sign() * beyond.abs().log1p()


def default_hidden_dims(input_dim: int) -> tuple[int, int]:
    """Widths of two hidden layers: eight units per dimension, at least 64 and at most 512.

    Example:
        >>> default_hidden_dims(6), default_hidden_dims(21), default_hidden_dims(784)
        ((64, 64), (168, 168), (512, 512))
    """
    width = min(512, max(64, 8 * input_dim))
    return width, width


def default_rank(input_dim: int, outputs_per_input: int, hidden_dims: Sequence[int]) -> int | None:
    """Rank of the outputs of a `MADE` with a large last layer: a third of P, and at least 8.

    None, for full rank, if the last layer has at most 200,000 weights or the rank would not even halve it.

    Example:
        >>> default_rank(8, 25, [100, 100]), default_rank(63, 25, [512, 512]), default_rank(63, 2, [512, 512])
        (None, 8, None)
    """
    weights = input_dim * outputs_per_input * [input_dim, *hidden_dims][-1]
    rank = max(LEAST_RANK, outputs_per_input // 3)
    return rank if weights > MOST_WEIGHTS and 2 * rank < outputs_per_input else None


class Network(Tempered):
    """Base of `MADE` and `MLP`: compressed tails, a named activation, and a context that every layer sees."""

    context_layers: nn.ModuleList
    activation_index: Tensor

    def __init__(self, activation: str, context_dim: int) -> None:
        super().__init__()
        check_choice(type(self).__name__, "activation", activation, ACTIVATIONS)
        self.context_dim = check_positive(type(self).__name__, "context_dim", context_dim, least=0)
        self.activation = activation
        # In the state_dict, so that weights are never silently combined with another activation.
        self.register_buffer("activation_index", torch.tensor(list(ACTIVATIONS).index(activation)))

    def _make(self, layers: Sequence[nn.Linear]) -> None:
        self.layers = nn.ModuleList(layers)
        self.context_layers = nn.ModuleList(self._context_layer(layer) for layer in layers if self.context_dim)

    def _context_layer(self, layer: nn.Linear) -> nn.Linear:
        """Linear layer from the context to a layer's units; each feature starts with about the weight of an input."""
        made = Linear(self.context_dim, layer.out_features, bias=False)
        visible = layer.mask.sum(1) if isinstance(layer, MaskedLinear) else torch.full((1,), float(layer.in_features))
        with torch.no_grad():
            # With the default initialisation, for the context alone, it would drown out hundreds of inputs.
            made.weight.mul_((self.context_dim / (self.context_dim + visible)).sqrt()[:, None])
        return made

    def zero_output(self) -> None:
        """Set the last layer to zero, so that every output starts at 0 for any input."""
        with torch.no_grad():
            for layer in (self.layers[-1], *self.context_layers[-1:]):
                for parameter in layer.parameters():
                    parameter.zero_()

    def context_terms(self, context: Tensor | None) -> list[Tensor | None]:
        """Terms that the context adds to each layer's pre-activations; None for each without a context."""
        if context is None:
            return [None] * len(self.layers)
        return [layer(context) for layer in self.context_layers]

    def run(self, x: Tensor, context: Tensor | None) -> Tensor:
        """The layers in turn, unchecked."""
        activation = ACTIVATIONS[self.activation]
        terms = self.context_terms(context)
        last = len(self.layers) - 1
        x = compress_tails(x)
        for index, (layer, term) in enumerate(zip(self.layers, terms, strict=True)):
            x = layer(x)
            if term is not None:
                x = x + term
            if index < last:
                x = activation(x)
        return x

    def check_input(self, x: object, context: object, input_dim: int) -> None:
        """Raise if an input or a context is invalid."""
        who, like = type(self).__name__, next(self.layers.parameters())
        check_event(who, "x", x, input_dim, "input_dim", like)
        check_context(who, context, self.context_dim, like)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        stored = state_dict.get(prefix + "activation_index")
        error_messages = cast("list[str]", args[-1])
        # Not compared with the buffer, which `to_empty` leaves uninitialised.
        if stored is not None and int(stored) != list(ACTIVATIONS).index(self.activation):
            name = dict(enumerate(map(repr, ACTIVATIONS))).get(int(stored), "one unknown here")
            error_messages.append(f"activation of {prefix[:-1]}: {name} was stored, {self.activation!r} is built here.")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


class MLP(Network):
    r"""A plain network with a named activation, and a context that every layer sees.

    Args:
        input_dim: Number of inputs; 0 if the output depends only on the context or is constant.
        hidden_dims: Widths of the hidden layers.
        output_dim: Number of outputs.
        context_dim: Number of context features, 0 for none.
        activation: A name from `ACTIVATIONS`.

    Shapes:
        x is (\*batch, input_dim), context (\*batch or (), context_dim), the output (\*batch, output_dim).

    Raises:
        ValueError: For non-positive sizes, an unknown activation, or an input of the wrong width.

    Example:
        >>> MLP(3, [8], 2)(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int],
        output_dim: int,
        *,
        context_dim: int = 0,
        activation: str = "relu",
    ) -> None:
        super().__init__(activation, context_dim)
        self.input_dim = check_positive("MLP", "input_dim", input_dim, least=0)
        self.hidden_dims = check_sizes("MLP", "hidden_dims", hidden_dims)
        widths = [self.input_dim, *self.hidden_dims, check_positive("MLP", "output_dim", output_dim)]
        # A mask of ones is a plain layer; nn.Linear would warn about an input without columns.
        self._make([_plain(before, after) for before, after in zip(widths, widths[1:], strict=False)])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """One dense pass."""
        self.check_input(x, context, self.input_dim)
        return self.run(x, context)


class MADE(Network):
    r"""Masked autoencoder for distribution estimation: output i depends on the inputs before i, in one pass.

    Args:
        input_dim: D, the number of inputs.
        hidden_dims: Widths of the hidden layers, by default two by `default_hidden_dims`.
        outputs_per_input: P, the number of outputs per input.
        context_dim: Number of context features, 0 for none. Every unit sees all of them.
        activation: A name from `ACTIVATIONS`.
        order: Indices of the inputs, first to last; by default 0 .. D - 1.
        degrees: "sequential" or "random", as in `pyro_maf.nn.degrees`.
        seed: Seed of random degrees.

    Shapes:
        x is (\*batch, D), context (\*batch or (), context_dim), the output (\*batch, D, P).

    Cost: one dense pass for any D; the masks are multiplied in beforehand.

    Raises:
        ValueError: For non-positive sizes, an unknown activation, an order that is not a permutation, an input or
            context of the wrong width, a missing or superfluous context.
        TypeError: For an input whose dtype differs from that of the parameters.

    Example:
        >>> made = MADE(3, [16, 16], outputs_per_input=2)
        >>> made(torch.zeros(5, 3)).shape
        torch.Size([5, 3, 2])

    Reference:
        Germain et al., *MADE: Masked Autoencoder for Distribution Estimation*, 2015.
    """

    order: Tensor

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int] | None = None,
        *,
        outputs_per_input: int = 1,
        context_dim: int = 0,
        activation: str = "relu",
        order: Sequence[int] | Tensor | None = None,
        degrees: str = "sequential",
        seed: int = 0,
    ) -> None:
        super().__init__(activation, context_dim)
        self.head: BlockLinear | None
        self.input_dim = check_positive("MADE", "input_dim", input_dim)
        hidden_dims = default_hidden_dims(input_dim) if hidden_dims is None else hidden_dims
        self.hidden_dims = check_sizes("MADE", "hidden_dims", hidden_dims)
        self.outputs_per_input = check_positive("MADE", "outputs_per_input", outputs_per_input)
        self.rank, self.head = self.outputs_per_input, None
        order = torch.arange(input_dim) if order is None else order
        self.register_buffer("order", check_permutation("MADE", "order", order, input_dim).clone())
        lowest = 0 if context_dim else 1
        hidden = spread_degrees(input_dim, self.hidden_dims, kind=degrees, lowest=lowest, seed=seed)
        for index, layer_degrees in enumerate(hidden):
            self.register_buffer(f"degrees_{index}", layer_degrees)
        self._make([MaskedLinear(mask) for mask in self.masks()])
        self._derive()

    def set_rank(self, rank: int | None) -> None:
        """Replace the last layer by one with r outputs per input; the P outputs are linear functions of them.

        The linear functions are a `BlockLinear`, the `head`. The last layer then takes r / P of the time.

        Args:
            rank: r, or None for P outputs and no head.

        Raises:
            ValueError: If r is not positive.
        """
        like, self.rank, self.head = self.last_layer.weight, self.outputs_per_input, None
        if rank is not None:
            self.rank = check_positive("MADE", "rank", rank)
            self.head = BlockLinear(self.input_dim, rank, self.outputs_per_input)
        self.layers[-1] = MaskedLinear(self.masks()[-1])
        if self.context_dim:
            self.context_layers[-1] = self._context_layer(self.last_layer)
        self.to(like)
        self._derive()

    @property
    def hidden_degrees(self) -> list[Tensor]:
        """Degrees of the hidden units, one sorted int64 tensor per layer."""
        return [getattr(self, f"degrees_{index}") for index in range(len(self.hidden_dims))]

    @property
    def masked_layers(self) -> list[MaskedLinear]:
        """All layers, first to last."""
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def last_layer(self) -> nn.Linear:
        """The last masked layer; its rows are the r outputs for input 0, then those for input 1, ..."""
        return self.layers[-1]  # type: ignore[return-value]

    def masks(self) -> list[Tensor]:
        """The bool mask of each layer."""
        return masks(self.order, self.hidden_degrees, self.rank)

    def zero_output(self) -> None:
        """Set the last masked layer and the biases after it to zero, so that every output starts at 0."""
        super().zero_output()
        if self.head is not None:
            torch.nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """One dense pass through all layers."""
        self.check_input(x, context, self.input_dim)
        return self.parameters_of(x, context)

    def parameters_of(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`forward` without its checks."""
        outputs = self.run(x, context)
        outputs = outputs.view(*outputs.shape[:-1], self.input_dim, self.rank)
        return outputs if self.head is None else self.head(outputs)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        # The rank belongs to the stored weights, whatever rank a layer would choose by default.
        stored = state_dict.get(f"{prefix}layers.{len(self.layers) - 1}.weight")
        head = state_dict.get(prefix + "head.weight")
        rank = None if head is None else head.shape[-1]
        rows = self.input_dim * (rank or self.outputs_per_input)
        if stored is not None and rows == len(stored) != self.last_layer.out_features:
            self.set_rank(rank)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _derive(self) -> None:
        """Recompute what follows from order and degrees: the masks, and the number of final units at each step."""
        self.is_natural = self.order.tolist() == list(range(self.input_dim))
        with torch.inference_mode(False):  # no later graph could save an inference tensor
            for layer, mask, gain in zip(self.masked_layers, self.masks(), self._gains(), strict=True):
                # On the device of the order. Being part of the mask, the gain applies wherever the mask does.
                layer.mask = gain * mask.to(layer.mask.dtype)
        steps = torch.arange(self.input_dim, device=self.order.device)
        self.ready = [torch.searchsorted(d, steps, right=True).tolist() for d in self.hidden_degrees]

    def _apply_gains(self) -> None:
        self._derive()


def _plain(input_dim: int, output_dim: int) -> nn.Linear:
    if input_dim:
        return Linear(input_dim, output_dim)
    return MaskedLinear(torch.ones(output_dim, 0))
