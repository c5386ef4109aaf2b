r"""The parallel direction of a wide layer, and its gradient, as one operation that skips the zeros of the weights.

Variables and outputs are feature-major, (units, batch); hidden units are (batch, units):
the fastest layouts for the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyro_maf._core.torch_state import is_intercepted, without_autocast
from pyro_maf.nn import ACTIVATIONS, BULK, MADE, compress_tails
from pyro_maf.sweep.panels import Product, panels_of
from pyro_maf.sweep.slopes import activate, differentiate
from pyro_maf.univariate import Affine, UnivariateMap

__all__ = ["differentiable", "takes"]

NARROW = 256
LEAST_UNITS = 32_000
"""Minimum width of every hidden layer, and minimum width times batch size: below either, plain autograd with dense
products is faster."""

aten: Any = torch.ops.aten


class Kept(NamedTuple):
    """Tensors saved for the backward pass.

    Attributes:
        v, w: Variables before and after the map, (D, batch).
        half: The square root of dw/dv.
        tanh: The log-scale divided by its bound.
        growth: The derivative of a variable with respect to its `compress_tails`.
    """

    v: Tensor
    w: Tensor
    half: Tensor
    tanh: Tensor
    growth: Tensor


class Pass(NamedTuple):
    """Intermediate results of a pass through the network.

    Attributes:
        below: Input of each layer, (batch, units).
        given: Tensor that each activation's backward needs, its value or pre-activation, (batch, units).
        products: Masked product of each layer.
    """

    below: list[Tensor]
    given: list[Tensor]
    products: list[Product]


def takes(made: MADE, univariate: UnivariateMap, v: Tensor) -> bool:
    """Return whether this pass supports the map, network and device, and no tracer or compiler is active."""
    width = min(made.hidden_dims, default=0)
    return (
        width >= NARROW
        and width * v.shape[:-1].numel() >= LEAST_UNITS
        and type(univariate) is Affine
        and v.device.type == "cpu"
        and not is_intercepted()
    )


def differentiable(
    made: MADE, v: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, inverse: bool
) -> tuple[Tensor, Tensor]:
    """w, (batch, D), and log-determinant, (batch,), of v, (batch, D).

    Args:
        made: The network.
        v: The input.
        weights, biases: Those of the network, from `plan.weights_of` and `plan.biases_of`.
        inverse: Whether v is y and w is x, rather than the reverse.
    """
    return _Dense.apply(made, inverse, v, *weights, *biases)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, made: MADE, inverse: bool, v: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        layers = len(tensors) // 2
        columns = v.T.contiguous()
        seen, growth = _compress(columns)
        outputs, taken = _through(made, seen.T, tensors[:layers], tensors[layers:])
        w, log_det, half, tanh = _map(columns, outputs, -1 if inverse else 1)
        ctx.made, ctx.inverse = made, inverse
        ctx.products = [product._replace(pieces=()) for product in taken.products]
        lists = [taken.below, taken.given, *(list(product.pieces) for product in taken.products)]
        ctx.sizes = [len(tensors), len(Kept._fields), *map(len, lists)]
        ctx.save_for_backward(v, *tensors, columns, w, half, tanh, growth, *(x for part in lists for x in part))
        return w.T.contiguous(), log_det

    @staticmethod
    def backward(ctx: Any, grad_w: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        v, *saved = ctx.saved_tensors
        tensors, kept, below, given, *pieces = _in_lists(saved, ctx.sizes)
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() or is_intercepted():
            return None, None, *_by_plain_operations(ctx, (v, *tensors), needed, (grad_w, grad_log_det))
        products = [product._replace(pieces=own) for product, own in zip(ctx.products, pieces, strict=True)]
        taken = Pass(below, given, products)
        biases = tensors[len(products) :]
        found = without_autocast(_backward, ctx, Kept(*kept), taken, biases, needed, grad_w, grad_log_det, like=v)
        return None, None, *found


def _in_lists(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    every = iter(tensors)
    return [[next(every) for _ in range(size)] for size in sizes]


def _compress(x: Tensor) -> tuple[Tensor, Tensor]:
    """`compress_tails` of x, and one over its derivative."""
    inside = x.clamp(-BULK, BULK)
    beyond = x - inside
    growth = beyond.abs().add_(1)
    return growth.log().copysign_(beyond).add_(inside), growth


def _through(made: MADE, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, Pass]:
    """Outputs, (units, batch), for inputs x, (batch, D), and the intermediate results."""
    taken = Pass([x], [], [])
    for layer, weight, bias, panels in zip(made.masked_layers, weights, biases, panels_of(made), strict=True):
        product = Product.of(weight, layer.mask, panels)
        taken.products.append(product)
        if len(taken.products) < len(weights):
            value, known = activate(made.activation, product.forward(taken.below[-1], bias))
            taken.below.append(value)
            taken.given.append(known)
    return product.forward_transposed(taken.below[-1], biases[-1]), taken


def _map(v: Tensor, outputs: Tensor, sign: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The affine map of v (D, batch): w, log-determinant, e^(sign alpha / 2), and alpha divided by its bound."""
    tanh = (outputs[1::2] / Affine.BOUND).tanh_()
    half = (tanh * (0.5 * Affine.BOUND * sign)).exp_()
    w = (v * half).add_(outputs[::2], alpha=sign).mul_(half)
    return w, tanh.sum(0).mul_(Affine.BOUND), half, tanh


def _map_backward(kept: Kept, grad_w: Tensor, grad_log_det: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """Gradients of the affine map w.r.t. v, (D, batch), and the outputs of the network, (2 D, batch)."""
    by_outputs = grad_w.new_empty(2 * len(grad_w), grad_w.shape[1])
    halfway = grad_w * kept.half
    torch.mul(halfway, sign, out=by_outputs[::2])
    by_v = halfway.mul_(kept.half)
    # dw/dalpha = sign (w + v dw/dv) / 2
    by_alpha = (grad_w * kept.w).addcmul_(kept.v, by_v).mul_(0.5 * sign).add_(grad_log_det)
    by_outputs[1::2] = aten.tanh_backward(by_alpha, kept.tanh)
    return by_v, by_outputs


def _backward(
    ctx: Any,
    kept: Kept,
    taken: Pass,
    biases: Sequence[Tensor],
    needed: Sequence[bool],
    grad_w: Tensor,
    grad_log_det: Tensor,
) -> list[Tensor | None]:
    """Gradients with respect to v, the weights and the biases; None where not needed."""
    layers = len(biases)
    by_weights: list[Tensor | None] = [None] * layers
    by_biases: list[Tensor | None] = [None] * layers
    by_v, by_outputs = _map_backward(kept, grad_w.T.contiguous(), grad_log_det, -1 if ctx.inverse else 1)
    grad = by_outputs.T
    for index in reversed(range(layers)):
        if needed[1 + index]:
            by_weights[index] = taken.products[index].by_weight(grad, taken.below[index])
        if needed[1 + layers + index]:
            by_biases[index] = grad if biases[index].dim() == 2 else grad.sum(0)
        if index or needed[0]:
            grad = taken.products[index].by_input(grad)
        if index:
            grad = differentiate(ctx.made.activation, grad, taken.given[index - 1])
    if not needed[0]:
        return [None, *by_weights, *by_biases]
    return [by_v.addcdiv_(grad.T, kept.growth).T.contiguous(), *by_weights, *by_biases]


def _by_plain_operations(
    ctx: Any, inputs: Sequence[Tensor], needed: Sequence[bool], grads: tuple[Tensor, Tensor]
) -> list[Tensor | None]:
    """The same gradients by plain operations, which can be differentiated again."""
    layers, again = len(inputs) // 2, torch.is_grad_enabled()
    with torch.enable_grad():
        results = _plain(ctx.made, ctx.inverse, inputs[0], inputs[1 : 1 + layers], inputs[1 + layers :])
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(results, wanted, grads, create_graph=again, allow_unused=True))
    return [next(found) if need else None for need in needed]


def _plain(
    made: MADE, inverse: bool, v: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    x = compress_tails(v)
    for index, (layer, weight, bias) in enumerate(zip(made.masked_layers, weights, biases, strict=True)):
        x = F.linear(x, weight * layer.mask) + bias
        if index < len(weights) - 1:
            x = ACTIVATIONS[made.activation](x)
    direction = Affine().inverse if inverse else Affine().forward
    w, log_derivative = direction(v, x.unflatten(-1, (v.shape[-1], 2)))
    return w, log_derivative.sum(-1)
