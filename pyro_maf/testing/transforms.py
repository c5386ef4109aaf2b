"""Laws of transforms: functions of a flow in eval mode, each of which raises if its law is broken.

Laws may change the weights of the flow they are called with, and leave gradients.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from pyro_maf.saving import load
from pyro_maf.testing.comparison import BrokenLawError, close, close_by_row, error_by_row, name_of, within
from pyro_maf.testing.subjects import FlowOrForm, at_context, fresh, layers_of, points
from pyro_maf.transforms import BatchNorm, Conditioned, Flow, InverseAutoregressive, MaskedAutoregressive

AUTOREGRESSIVE = (MaskedAutoregressive, InverseAutoregressive)
HALVINGS = 10
"""Maximum number of times that a cell of an integral is halved."""
SEPARATELY = 2_000
"""Maximum number of parameters whose derivatives are tested one by one; beyond it, a random combination is tested."""


def _jacobian(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(function, at)


# -- laws ------------------------------------------------------------------------------------------------------------


def inverts(flow: Flow, scale: float = 1.0, tolerance: float = 1e-9) -> None:
    """Check that each direction undoes the other: to the tolerance in float64, to 1e-4 in float32, at any scale.

    In float32 a larger error is allowed only up to ten times what a single rounding after each layer causes, which no
    implementation of a steep map can avoid.
    """
    flow = fresh(flow)
    x = points(flow, 20, scale=scale)
    for way, there in (("x to y and back", flow), ("y to x and back", flow.inv)):
        found = there.inv(there(x))
        allowed = tolerance if x.dtype == torch.float64 else 1e-4
        if x.dtype == torch.float32 and bool((error_by_row(found, x) > allowed).any()):
            allowed = max(allowed, 10 * _cost_of_rounding(there, x))
        close_by_row(f"inverts, {way}", flow, found, x, allowed, x)


@torch.no_grad()
def _cost_of_rounding(flow: Flow, x: Tensor) -> float:
    """Error of x mapped there and back in float64, with a random error of up to one epsilon after each layer.

    Relative to the length of a row of x, the largest of all rows in 64 tries.
    """
    there, epsilon = layers_of(fresh(flow).double()), torch.finfo(x.dtype).eps
    x = x.double().expand(64, *x.shape)
    z = x
    for layer in [*there, *(layer.inv for layer in reversed(there))]:
        z = layer(z)
        z = z * (1 + epsilon * (2 * torch.rand_like(z) - 1))
    return float(error_by_row(z, x).max())


def is_triangular(flow: Flow) -> None:
    """The Jacobian of an autoregressive layer is triangular in its order; a stack's is the product of its layers'."""
    x = points(flow)
    total = _jacobian(fresh(flow), x)
    product = torch.eye(flow.input_dim, dtype=x.dtype, device=x.device)
    for layer in layers_of(flow):
        each, inner = _jacobian(layer, x), getattr(layer, "flow", layer)
        if isinstance(inner, AUTOREGRESSIVE):
            ordered = each[inner.order][:, inner.order]
            close("is triangular in its order", layer, ordered.triu(1), torch.zeros_like(ordered), 0.0, x)
            if not bool((ordered.diagonal() > 0).all()):
                raise BrokenLawError(name_of(layer), "increases in each variable", f"not at x = {x.tolist()}")
        product, x = each @ product, layer(x).detach()
    largest = total.abs().max()
    close("is the composition of its layers", flow, product / largest, total / largest, 1e-9)


def has_the_log_det_of_its_jacobian(flow: Flow, tolerance: float = 1e-9) -> None:
    """log |det dy/dx| matches the Jacobian by autograd, cached or not, for any pair (x, y); in float64."""
    law = "has the log-determinant of its Jacobian"
    x, wanted = points(flow), torch.zeros(1, dtype=torch.float64)
    at = x
    for layer in layers_of(flow):  # their determinants are far better conditioned than the product's
        wanted = wanted.to(x) + torch.linalg.slogdet(_jacobian(layer, at))[1]
        at = layer(at).detach()
    x, other = x[None], points(flow, 1)
    y, other_y = flow(x), fresh(flow)(other)
    close(law, flow, flow.log_abs_det_jacobian(x, y), wanted, tolerance, x)
    close(law, flow, flow.log_abs_det_jacobian(x.clone(), y.clone()), wanted, max(tolerance, 1e-7), x)
    found = flow.log_abs_det_jacobian(other, other_y)
    close(law, flow, found, fresh(flow).log_abs_det_jacobian(other, other_y), 1e-9, other)


def integrates_to_one(flow: Flow) -> None:
    """The density of the images of standard normal noise integrates to 1, to 2e-3, in one or two dimensions.

    The box covers the image of nearly all noise, so the expected mass in it is 1 up to the part cut off.
    """
    flow, tolerance = fresh(flow), 2e-3

    def density(y: Tensor) -> Tensor:
        x = flow.inv(y)
        log_normal = -0.5 * (x**2).sum(-1) - 0.5 * flow.input_dim * math.log(2 * math.pi)
        return (log_normal - flow.log_abs_det_jacobian(x, y)).exp()

    with torch.no_grad():
        reach = flow(points(flow, 20_000)).abs().amax(0) * 1.5
        total = _integral(density, reach, {1: 5_000, 2: 100}[flow.input_dim], tolerance)
    within("gives densities that integrate to 1", flow, (total - 1).abs(), tolerance)


def _integral(function: Callable[[Tensor], Tensor], reach: Tensor, side: int, tolerance: float) -> Tensor:
    """The integral over the box |y| <= reach, from side^D cells, halved where that changes their part of it."""
    width, share = 2 * reach / side, tolerance / side ** len(reach)
    axis = 2 * (torch.arange(side).to(reach) + 0.5) / side - 1
    cells = torch.cartesian_prod(*axis.expand(len(reach), side)).reshape(-1, len(reach)) * reach
    halves = torch.cartesian_prod(*reach.new_tensor([[-0.5, 0.5]]).expand(len(reach), 2)).reshape(-1, len(reach))
    coarse, total = function(cells) * width.prod(), reach.new_zeros(())
    for _ in range(HALVINGS):
        width, share = width / 2, share / len(halves)
        parts = cells[:, None] + halves * width
        fine = function(parts.flatten(0, 1)).reshape(parts.shape[:2]) * width.prod()
        rough = (fine.sum(1) - coarse).abs() > share * len(halves)  # converged cells are off by less than they changed
        total = total + fine[~rough].sum()
        cells, coarse = parts[rough].flatten(0, 1), fine[rough].flatten()
    return total + coarse.sum()


STEPS = ("optimizer", "fused", "state_dict", "x", "y", "replaced", "data")
"""Changes after which nothing may be stale."""


def is_never_stale(flow: Flow, step: str) -> None:
    """After any change of weights, x or y, results equal those of a fresh copy; in float64."""
    x = points(flow, 5)
    y = flow(x)
    flow.log_abs_det_jacobian(x, y)
    y = flow(x)
    _change(flow, x, y, step)
    law, wanted = f"is never stale, after a change of {step}", fresh(flow)
    # In the grad mode in which y was computed, where the cache may have an entry.
    close(law, flow, flow.log_abs_det_jacobian(x, y), wanted.log_abs_det_jacobian(x, y), 1e-9)
    close(law, flow, flow.inv(y), wanted.inv(y), 1e-9)
    close(law, flow, flow(x), wanted(x), 1e-9)


def _change(flow: Flow, x: Tensor, y: Tensor, step: str) -> None:
    parameters = list(flow.parameters())
    if step == "state_dict":
        flow.load_state_dict({key: value + value.is_floating_point() * 0.1 for key, value in flow.state_dict().items()})
    elif step == "x":
        x += 0.5
    elif step == "y":
        with torch.no_grad():
            y += 0.5
    elif not parameters:
        return
    elif step == "fused":
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(parameters, lr=0.1, fused=True).step()
    elif step == "optimizer":
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        (y.sum() + flow.log_abs_det_jacobian(x, y).sum()).backward()
        optimizer.step()
    elif step == "replaced":
        owner, key = next((module, key) for module in flow.modules() for key in module._parameters)
        setattr(owner, key, nn.Parameter(getattr(owner, key).detach() + 0.1))
    else:
        for parameter in parameters:
            parameter.data += 0.1
        flow.clear_cache()


def keeps_no_tensor_alive(flow: Flow) -> None:
    """The input of a map is freed once it is deleted; a log-determinant computed from the output would keep it."""
    x = points(flow, 5)
    y = flow(x)
    flow.inv(y)
    watched = [weakref.ref(x), weakref.ref(y)]
    del x, y
    if any(reference() is not None for reference in watched):
        raise BrokenLawError(name_of(flow), "keeps no tensor alive", "x or y stays in memory")


def trains_on_one_batch(flow: Flow) -> None:
    """The same tensor can be trained on at every step, and its gradients accumulate over several backward passes."""
    law, flow = "trains on the same batch at every step", flow.train()
    data, parameters = points(flow, 8), list(flow.parameters())
    if not parameters:
        return

    def loss() -> Tensor:
        x = flow.inv(data)
        return (x**2).sum() + flow.log_abs_det_jacobian(x, data).sum()

    optimizer = torch.optim.Adam(parameters, 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    if not bool(torch.isfinite(value)):
        raise BrokenLawError(name_of(flow), law, f"the loss is {float(value)} after three steps")
    flow.eval()
    optimizer.zero_grad()
    loss().backward()
    once = [torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in parameters]
    first, second = loss(), loss()
    first.backward()
    second.backward(retain_graph=True)
    second.backward()
    for parameter, gradient in zip(parameters, once, strict=True):
        if parameter.grad is not None:
            close("accumulates gradients", flow, parameter.grad, 4 * gradient, 1e-9)


def scores_its_own_draws(flow: Flow) -> None:
    """The gradient of a loss of a draw and its score, whose inverse is cached, equals that without a cache."""
    parameters, noise = list(flow.parameters()), points(flow, 8)
    if not parameters:
        return

    def gradients(cache_size: int) -> list[Tensor]:
        member = flow.with_cache(cache_size)
        y = member(noise)
        x = member.inv(y)
        loss = (x**2).sum() + member.log_abs_det_jacobian(x, y).sum() + (y**3).sum()
        return list(torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True))

    for found, wanted in zip(gradients(1), gradients(0), strict=True):
        law, scale = "scores its draws with the right gradient", float(1 + wanted.norm())
        close(law, flow, found / scale, wanted / scale, 1e-6)


def gives_two_losses_of_one_draw(flow: Flow) -> None:
    """Two losses of one draw can each have a backward pass; so can those of a scored draw, with `retain_graph`."""
    if not list(flow.parameters()):
        return
    with torch.no_grad():
        y = flow(points(flow, 8))
    first, second = flow.inv(y).sum(), flow.inv(y).pow(2).sum()
    first.backward()
    second.backward()
    y = flow(points(flow, 8))
    x = flow.inv(y)
    (y.sum() + flow.log_abs_det_jacobian(x, y).sum()).backward(retain_graph=True)
    (y.sum() + flow.log_abs_det_jacobian(x, y).sum()).backward()


def runs_in_every_mode(flow: Flow) -> None:
    """Without gradients, in inference mode and under autocast, values and dtypes are the same; in float32."""
    law, x = "runs without gradients and under autocast", points(flow, 8)
    wanted = flow(x).detach()
    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast(x.device.type, dtype=torch.bfloat16)):
        with mode:
            y = flow(x)
            back = flow.inv(y.clone())
            log_det = flow.log_abs_det_jacobian(x, y)
        close_by_row(law, flow, y, wanted, 1e-5, x)  # kernels and torch round differently; bfloat16 is off by 1e-2
        close_by_row(law, flow, back, x, 1e-4, x)
        if {y.dtype, back.dtype, log_det.dtype} != {x.dtype}:
            raise BrokenLawError(name_of(flow), law, f"dtypes are {y.dtype}, {back.dtype} and {log_det.dtype}")


def has_derivatives(flow: Flow, inverted: bool = False) -> None:
    """First derivatives w.r.t. input, context and parameters, and second ones w.r.t. the input, match differences."""
    names = [key for key, _ in flow.named_parameters()] + (["context"] if isinstance(flow, Conditioned) else [])
    tensors = dict([*flow.named_parameters(), *flow.named_buffers()])
    values = [tensors[key].detach().clone().requires_grad_() for key in names]
    many = sum(value.numel() for value in values) > SEPARATELY
    module = _Direction(flow, inverted)

    def function(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        swapped = {f"flow.{key}": value for key, value in zip(names, values, strict=True)}
        y, log_det = functional_call(module, swapped, (x,))
        return y, log_det + 0 * x.sum()  # gradcheck skips outputs without a gradient

    for once_more in (True, False):  # a difference may straddle a kink, such as a spline's knot, but hardly twice
        x = points(flow, 2, scale=0.7).requires_grad_()
        try:
            torch.autograd.gradcheck(function, (x, *values), fast_mode=many)
            torch.autograd.gradgradcheck(lambda x: function(x, *values), (x,))
            return
        except RuntimeError as error:
            if not once_more:
                direction = "from y to x" if inverted else "from x to y"
                how = " ".join(str(error).split()).rstrip(".")
                raise BrokenLawError(name_of(flow), f"has the derivatives of differences, {direction}", how) from None


class _Direction(nn.Module):
    """Output and log-determinant of one direction of a flow, as a module."""

    def __init__(self, flow: Flow, inverted: bool) -> None:
        super().__init__()
        self.flow, self.inverted = flow, inverted

    def forward(self, value: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow.inverse_and_log_det(value) if self.inverted else self.flow.forward_and_log_det(value)


def can_be_copied(transform: FlowOrForm, other: FlowOrForm | None = None) -> None:
    """Copies, pickles and saved files, taken after use, are the same map; so is `other`, once it has the state."""
    flow = at_context(transform, 5)
    x = points(flow, 5)
    y = flow(x)
    with tempfile.TemporaryDirectory() as folder:
        transform.save(path := Path(folder) / "flow.safetensors")
        saved = load(path).to(x.device)
    twins = {"deepcopy": copy.deepcopy(transform), "pickle": pickle.loads(pickle.dumps(transform)), "save": saved}
    if other is not None:
        file = io.BytesIO()
        torch.save(transform.state_dict(), file)
        file.seek(0)
        other.load_state_dict(torch.load(file, weights_only=True))
        twins["state_dict"] = other
    for way, twin in twins.items():
        at = twin.condition(flow.context) if isinstance(flow, Conditioned) else twin
        close(f"can be copied, by {way}", flow, at(x), y, 0.0, x)


def takes_any_batch(flow: Flow, *batch: int) -> None:
    """Leading dimensions are batch dimensions, including none and empty ones; rows do not depend on one another."""
    law, flow = f"takes batches of any shape, such as {batch}", fresh(flow)
    for member in (flow, flow.inv):
        x = points(flow, *batch)
        y, log_det = member.forward_and_log_det(x)
        if y.shape != x.shape or log_det.shape != x.shape[:-1]:
            raise BrokenLawError(
                name_of(flow), law, f"shapes are {tuple(y.shape)} and {tuple(log_det.shape)} for x of {tuple(x.shape)}"
            )
        rows = x.reshape(-1, flow.input_dim)
        if len(rows):
            close(law, flow, y.reshape(rows.shape), torch.stack([member(row) for row in rows]), 1e-9, rows)


def broadcasts_its_context(transform: FlowOrForm) -> None:
    """The batch shape of a context broadcasts with that of the input."""
    if isinstance(transform, Flow):
        return
    like = next(transform.parameters())
    context = torch.randn(4, 1, transform.context_dim, dtype=like.dtype, device=like.device)
    law, bound = "broadcasts its context", transform.condition(context)
    x = points(bound, 3)
    for there in (lambda flow: flow, lambda flow: flow.inv):
        y = there(bound)(x)
        if y.shape != (4, 3, x.shape[-1]) or there(bound).log_abs_det_jacobian(x, y).shape != (4, 3):
            raise BrokenLawError(name_of(bound), law, f"the shape is {tuple(y.shape)} for 4 contexts and 3 rows")
        for row in range(4):
            close(law, bound, there(transform.condition(context[row, 0]))(x), y[row], 1e-9, x)


def can_be_vectorised(flow: Flow) -> None:
    """`torch.func.vmap` and `jacrev` agree with a batch and with autograd, in both directions."""
    x = points(flow, 3)
    for member in (flow, flow.inv):
        close("can be vectorised by vmap", flow, vmap(member)(x), member(x), 1e-9, x)
        close("can be differentiated by jacrev", flow, jacrev(member)(x[0]), _jacobian(member, x[0]), 1e-9, x[0])


def starts_as_the_identity(flow: Flow) -> None:
    """With its initial parameters a flow is the identity: to 1e-12, or to 1e-4 with batch norms, which add 1e-5."""
    x = points(flow, 5)
    tolerance = 1e-4 if any(isinstance(member, BatchNorm) for member in flow.modules()) else 1e-12
    close_by_row("starts as the identity", flow, flow(x), x, tolerance, x)
    close_by_row("starts as the identity", flow, flow.inv(x), x, tolerance, x)
