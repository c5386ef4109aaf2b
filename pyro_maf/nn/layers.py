"""Building blocks of a MADE: degrees, masks, masked layers, and weights with a width-dependent parametrisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyro_maf._core.checks import check_choice, check_permutation, check_positive, check_seed, check_sizes
from pyro_maf._core.module_state import Observed

__all__ = ["BlockLinear", "Linear", "MaskedLinear", "Tempered", "block_linear", "degrees", "gain_of", "masks"]

INPUTS, UNITS = 16, 64
"""Maximum number of inputs, and of units of a hidden layer, with a gain of 1."""


def gain_of(inputs: int, usual: int = INPUTS) -> float:
    """About usual / inputs, at most 1, rounded to a power of two so that the multiplication is exact."""
    return 0.5 ** max(0, round(math.log2(max(1, inputs) / usual)))


class Linear(Observed, nn.Linear):
    """y = gain W x + b, with a gain of 1 unless the network sets another."""

    gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; one dense product."""
        return F.linear(x if self.gain == 1.0 else self.gain * x, self.weight, self.bias)


class Tempered(Observed):
    """A network whose weights may be parametrised as gain * W, layer by layer.

    Adam moves each entry of W by about the learning rate, whatever the size of the gradient, and a sum over n inputs by
    up to n times as much. With a gain of about 1 / n, one learning rate suits every width.

    Attributes:
        gains: The gain of each layer, (layers,), stored in the `state_dict`; None if all are 1.

    Reference:
        Yang & Hu, *Feature learning in infinite-width neural networks*, 2021.
    """

    layers: nn.ModuleList
    gains: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gains", None)

    @torch.no_grad()
    def temper(self) -> None:
        """Set the gains from the layers' widths, at most 1; the network's function stays the same."""
        layers: list[nn.Linear] = list(self.layers)  # type: ignore[arg-type]
        gains = [gain_of(layer.in_features, UNITS if index else INPUTS) for index, layer in enumerate(layers)]
        # The divergence due to errors in the outputs adds up over the variables, one per input.
        gains[-1] *= gain_of(layers[0].in_features, UNITS)
        if min(gains) == 1.0:
            return
        for layer, gain in zip(layers, gains, strict=True):
            layer.weight.div_(gain)
        self.gains = torch.tensor(gains).to(layers[0].weight)
        self._apply_gains()

    def _apply_gains(self) -> None:
        """Set the gain of each layer."""
        layers: list[Linear] = list(self.layers)  # type: ignore[arg-type]
        for layer, gain in zip(layers, self._gains(), strict=True):
            layer.gain = gain

    def _gains(self) -> list[float]:
        return [1.0] * len(self.layers) if self.gains is None else self.gains.tolist()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        # The gains belong to the stored weights: an untempered network is stored without them.
        self.gains = (
            next(self.layers.parameters()).new_ones(len(self.layers)) if prefix + "gains" in state_dict else None
        )
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._apply_gains()


def degrees(
    input_dim: int, hidden_dims: Sequence[int], *, kind: str = "sequential", lowest: int = 1, seed: int = 0
) -> list[Tensor]:
    """Degrees of the hidden units of a MADE, sorted within each layer.

    A unit of degree d sees the first d inputs of the order. Degrees run from `lowest` to D - 1. A unit of degree 0 sees
    only the context, so `lowest` is 0 for a network with a context.

    Args:
        input_dim: D, the number of inputs.
        hidden_dims: Widths of the hidden layers; any positive width, also below D.
        kind: "sequential" spreads the degrees evenly; "random" draws them uniformly. Either way the last unit of each
            layer has degree D - 1, so that the last output sees every input before it.
        lowest: 0 or 1.
        seed: Seed of the random degrees.

    Returns:
        One int64 tensor per hidden layer.

    Raises:
        ValueError: For non-positive sizes, an unknown `kind` or another `lowest`.

    Example:
        >>> degrees(4, [6, 2])
        [tensor([1, 1, 2, 2, 3, 3]), tensor([2, 3])]

    Reference:
        Germain et al., *MADE: Masked Autoencoder for Distribution Estimation*, 2015.
    """
    check_positive("degrees", "input_dim", input_dim)
    check_choice("degrees", "kind", kind, ("sequential", "random"))
    check_seed("degrees", seed)
    if lowest not in (0, 1):
        raise ValueError(f"degrees expected lowest to be 0 or 1, got {lowest!r}.")
    highest = max(lowest, input_dim - 1)
    levels = highest - lowest + 1
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for width in check_sizes("degrees", "hidden_dims", hidden_dims):
        if kind == "random":
            drawn = torch.randint(lowest, highest + 1, (width,), generator=generator)
            drawn[-1] = highest
            layers.append(drawn.sort().values)
        else:
            units = torch.arange(1, width + 1)
            layers.append(torch.div(units * levels + width - 1, width, rounding_mode="floor") - 1 + lowest)
    return layers


def masks(order: Sequence[int] | Tensor, hidden_degrees: Sequence[Tensor], outputs_per_input: int = 1) -> list[Tensor]:
    """Masks that make a network autoregressive in `order`.

    Entry (k, j) of a hidden layer's mask is true where the degree of unit k is at least that of unit j. In the last
    layer it must be greater, so that output i depends only on the inputs before i in `order`.

    Args:
        order: Indices of the inputs, first to last.
        hidden_degrees: Degrees of the hidden units, as returned by `degrees`.
        outputs_per_input: Number of outputs per input; they are adjacent.

    Returns:
        One bool tensor per layer, of shape (units out, units in).

    Raises:
        ValueError: If `order` is not a permutation.

    Example:
        >>> hidden, last = masks([0, 1, 2], degrees(3, [2]))
        >>> (last.int() @ hidden.int()).tolist()  # the number of paths from each input to each output
        [[0, 0, 0], [1, 0, 0], [2, 1, 0]]

    Reference:
        Germain et al., *MADE: Masked Autoencoder for Distribution Estimation*, 2015.
    """
    position = check_permutation("masks", "order", order).argsort() + 1
    chain = [position, *hidden_degrees]
    hidden = [after[:, None] >= before[None, :] for before, after in zip(chain, chain[1:], strict=False)]
    last = position.repeat_interleave(outputs_per_input)[:, None] > chain[-1][None, :]
    return [*hidden, last]


class MaskedLinear(Observed, nn.Linear):
    r"""A linear layer with a masked weight: y = (M * W) x + b.

    Weights and biases are drawn uniformly within +- 1 / sqrt(n), where n is the number of inputs that the unit sees.

    Args:
        mask: M, of shape (units out, units in); false or 0 where a weight is masked out.

    Shapes:
        x is (\*batch, units in), y is (\*batch, units out).

    Raises:
        ValueError: If the mask is not a matrix.

    Example:
        >>> layer = MaskedLinear(torch.tensor([[1, 0], [1, 1]]))
        >>> torch.autograd.functional.jacobian(layer, torch.zeros(2))[0, 1].item()
        0.0
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        if mask.dim() != 2:
            raise ValueError(f"MaskedLinear expected mask to be a matrix, got shape {tuple(mask.shape)}.")
        nn.Module.__init__(self)
        self.out_features, self.in_features = mask.shape
        self.weight = nn.Parameter(torch.empty(mask.shape))
        self.bias = nn.Parameter(torch.empty(self.out_features))
        # Not in the state_dict: the network stores the degrees, from which the mask follows.
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the weights and biases at random."""
        bound = self.mask.sum(1).clamp(min=1).rsqrt()
        with torch.no_grad():
            self.weight.uniform_(-1, 1).mul_(bound[:, None])
            self.bias.uniform_(-1, 1).mul_(bound)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer; one dense product."""
        if not self.in_features:  # an empty product has no gradient under torch.jit
            return (self.bias + self.weight.sum(-1)).expand(*x.shape[:-1], -1)
        return F.linear(x, self.weight * self.mask, self.bias)


class BlockLinear(Observed):
    r"""One small linear layer per block: y_i = A_i z_i + b_i.

    At initialisation the first r outputs are the inputs themselves, such as the shift and log-scale of an affine map,
    and the others are sums of them with random weights.

    Args:
        blocks: D, the number of blocks.
        inputs: r, the number of inputs per block.
        outputs: P, the number of outputs per block.

    Shapes:
        z is (\*batch, D, r), y is (\*batch, D, P).

    Example:
        >>> BlockLinear(3, 2, 5)(torch.zeros(4, 3, 2)).shape
        torch.Size([4, 3, 5])
    """

    is_linear = True

    def __init__(self, blocks: int, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = torch.randn(blocks, outputs, inputs) / inputs**0.5
        weight[:, :inputs] = torch.eye(outputs, inputs)[:inputs]
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(blocks, outputs))

    def forward(self, z: Tensor) -> Tensor:
        """Apply the layer; D small products."""
        return block_linear(z, self.weight, self.bias)


def block_linear(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a `BlockLinear` with this weight, (D, P, r), and bias, (D, P), to z."""
    return torch.einsum("ipr,...ir->...ip", weight, z) + bias
