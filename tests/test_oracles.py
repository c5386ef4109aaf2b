"""Our densities against those of zuko and nflows with the same weights, as independent references.

Networks, masks, permutations, flows and base distributions are the peer's own. It is told two things: the map of one
dimension, which the peers parametrize in other ways, and which of its hidden units is which of ours, since everybody
lays out degrees in another order. Peers know nothing of compressed tails, so the values between layers are held to
where those are the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import AffineTransform

from pyro_maf import IAF, MAF, ConditionalMAF, ConditionalRealNVP, RealNVP
from pyro_maf.nn import MADE, MLP
from pyro_maf.transforms import BatchNorm, Conditioned, Flow

DIM, CONTEXT_DIM, LAYERS, ROWS = 5, 3, 4, 40
double = torch.float64
# The start of tails and the bound of log-scales are repeated here, since stored flows would change their density with
# other numbers.
BULK, BOUND = 3.0, 3.0
# With a multiple of D - 1 units, or of D with a context, all packages have equally many units of each degree.
WIDTHS, WIDTHS_AT_A_CONTEXT = [12, 12], [15, 10]
ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "relu": (nn.ReLU, F.relu),
    "tanh": (nn.Tanh, torch.tanh),
    "elu": (nn.ELU, F.elu),
}
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
every_order = pytest.mark.parametrize("order", ["reverse", "random"])


def modest(flow: Any) -> Any:
    """The flow in float64 and eval mode with moderate weights, so that most data stay out of the tails."""
    flow = flow.double().eval()
    with torch.no_grad():
        for parameter in flow.parameters():
            spread = 1.0 / parameter.shape[1] ** 0.5 if parameter.dim() == 2 else 0.2
            parameter.copy_(spread * torch.randn(parameter.shape))
        for layer in flow.modules():
            if isinstance(layer, BatchNorm):
                layer.mean.copy_(0.2 * torch.randn(DIM))
                layer.variance.copy_(0.8 + torch.rand(DIM))
    return flow


def assert_agrees(flow: Flow, log_prob: Callable[[Tensor], Tensor], to_data: Callable[[Tensor], Tensor]) -> None:
    """Compare densities, their gradients with respect to the data, and data from given noise."""
    # For each row, the first draw whose intermediate values all lie in the bulk.
    values = values_between_layers(flow, 3 * torch.rand(100, ROWS, DIM, dtype=double) - 1.5)
    in_the_bulk = values.abs().amax((0, -1)) <= BULK
    values = values[:, in_the_bulk.int().argmax(0), torch.arange(ROWS)]
    assert float(values.abs().max()) <= BULK
    y, noise = values[0], values[-1]
    # A nearly linear flow would be a weak test.
    assert float(flow.inv.log_abs_det_jacobian(y, noise).detach().std()) > 0.1
    y.requires_grad_()
    base = dist.Normal(torch.zeros(DIM, dtype=double), 1.0).to_event(1)
    ours, theirs = dist.TransformedDistribution(base, [flow]).log_prob(y), log_prob(y)
    assert ours.shape == theirs.shape == (ROWS,)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    slopes = (torch.autograd.grad(score.sum(), y)[0] for score in (ours, theirs))
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-8)
    with torch.no_grad():
        torch.testing.assert_close(flow(noise), to_data(noise), rtol=0, atol=1e-9)


def values_between_layers(flow: Flow, y: Tensor) -> Tensor:
    """Data, the output of each layer and the noise, which include all inputs of networks."""
    context = getattr(flow, "context", None)
    stack: Any = flow if context is None else flow.flow  # type: ignore[attr-defined]
    values = [y]
    with torch.no_grad():
        for layer in reversed(list(stack)):
            own = Conditioned(layer, context) if layer.context_dim else layer
            values.append(own.inv(values[-1]))
    return torch.stack(values)


# Copying weights


class Layer(NamedTuple):
    weight: Tensor
    bias: Tensor
    mask: Tensor


def layers_of(network: Any) -> list[Layer]:
    """Linear layers of any package's network; for ours, the context is among the first layer's inputs."""
    modules = (
        network.layers if isinstance(network, (MADE, MLP)) else [m for m in network.modules() if hasattr(m, "weight")]
    )
    layers = [Layer(m.weight, m.bias, getattr(m, "mask", torch.ones_like(m.weight)).bool()) for m in modules]
    if isinstance(network, (MADE, MLP)) and network.context_dim:
        first, extra = layers[0], network.context_layers[0].weight
        layers[0] = Layer(
            torch.cat([first.weight, extra], 1), first.bias, torch.cat([first.mask, torch.ones_like(extra).bool()], 1)
        )
    return layers


def hand_over(ours: Any, theirs: Any, outputs: Tensor, inputs: Tensor | None = None) -> None:
    """Copy the weights of our network to that of a peer.

    Args:
        ours: Our network.
        theirs: The network to fill; its masks stay, and must be ours up to the order of the units.
        outputs: Which of our outputs each of theirs is.
        inputs: Likewise of inputs; by default they are in the same order.
    """
    ours, theirs = layers_of(ours), layers_of(theirs)
    columns = torch.arange(ours[0].weight.shape[1]) if inputs is None else inputs
    hidden = zip(degrees_of(ours), degrees_of(theirs), strict=True)
    rows = [*[pairing(own, other) for own, other in hidden], outputs]
    with torch.no_grad():
        for own, other, places in zip(ours, theirs, rows, strict=True):
            assert torch.equal(own.mask[places][:, columns], other.mask)
            other.weight.copy_(own.weight[places][:, columns])
            other.bias.copy_(own.bias[places])
            columns = places


def degrees_of(layers: Sequence[Layer]) -> list[Tensor]:
    """Number of inputs that each hidden unit sees, from the masks."""
    seen, counts = torch.eye(layers[0].weight.shape[1], dtype=double), []
    for layer in layers[:-1]:
        seen = (layer.mask.to(double) @ seen > 0).to(double)
        counts.append(seen.sum(1).long())
    return counts


def pairing(own: Tensor, other: Tensor) -> Tensor:
    """For each of the peer's units, one of ours with the same degree."""
    places = torch.empty_like(other)
    places[other.argsort(stable=True)] = own.argsort(stable=True)
    assert torch.equal(own[places], other)
    return places


def alpha_of(a: Tensor) -> Tensor:
    return BOUND * torch.tanh(a / BOUND)


def noise_to_data(shift: Tensor, a: Tensor) -> AffineTransform:
    """y = (x exp(alpha / 2) + shift) exp(alpha / 2), written as torch's own y = loc + scale x."""
    return AffineTransform(shift * torch.exp(alpha_of(a) / 2), torch.exp(alpha_of(a)))


# zuko: layers map data to noise, the first one next to the data


def zuko_options(network: Any) -> dict[str, Any]:
    return {
        "context": network.context_dim,
        "hidden_features": network.hidden_dims,
        "activation": ACTIVATIONS[network.activation][0],
        "univariate": lambda shift, a: noise_to_data(shift, a).inv,
    }


def zuko_maf(flow: Any, order: str) -> Any:
    """zuko's MAF, whose alternating orders equal ours; other orders are set."""
    zuko = pytest.importorskip("zuko")
    peer = zuko.flows.MAF(DIM, transforms=LAYERS, **zuko_options(flow[0].made)).double()
    for index, layer in enumerate(reversed(list(flow))):
        if order != "reverse":
            peer.transform.transforms[index] = zuko.flows.MaskedAutoregressiveTransform(
                DIM, order=layer.order.argsort(), **zuko_options(layer.made)
            ).double()
        hand_over(layer.made, peer.transform.transforms[index].hyper, torch.arange(2 * DIM))
    return peer


def zuko_real_nvp(flow: Any, order: str) -> Any:
    """zuko's RealNVP, whose alternating masks equal ours; other masks are set."""
    zuko = pytest.importorskip("zuko")
    peer = zuko.flows.RealNVP(DIM, transforms=LAYERS, **zuko_options(flow[0].networks[0])).double()
    for index, layer in enumerate(reversed(list(flow))):
        if order != "reverse":
            peer.transform.transforms[index] = zuko.flows.GeneralCouplingTransform(
                DIM, mask=layer.mask, **zuko_options(layer.networks[0])
            ).double()
        assert torch.equal(peer.transform.transforms[index].mask, layer.mask)
        # Ours has all shifts before all scales, zuko's a pair for each dimension.
        outputs = torch.arange(2 * int((~layer.mask).sum())).view(2, -1).T.flatten()
        hand_over(layer.networks[0], peer.transform.transforms[index].hyper, outputs)
    return peer


@every_order
@every_activation
def test_maf_agrees_with_zuko(order: str, activation: str) -> None:
    flow = modest(MAF(DIM, num_layers=LAYERS, hidden_dims=WIDTHS, activation=activation, order=order))
    peer = zuko_maf(flow, order)
    assert_agrees(flow, peer().log_prob, peer().transform.inv)


@every_order
@pytest.mark.parametrize("widths", [[], [4], [8, 12], [8, 16, 8]], ids=str)
def test_maf_of_any_depth_agrees_with_zuko(order: str, widths: list[int]) -> None:
    flow = modest(MAF(DIM, num_layers=LAYERS, hidden_dims=widths, activation="elu", order=order))
    peer = zuko_maf(flow, order)
    assert_agrees(flow, peer().log_prob, peer().transform.inv)


@every_order
def test_iaf_agrees_with_zuko(order: str) -> None:
    """The inverse of a MAF with the inverse univariate map is an IAF."""
    zuko = pytest.importorskip("zuko")
    flow = modest(IAF(DIM, num_layers=LAYERS, hidden_dims=WIDTHS, order=order))
    layers = []
    for layer in reversed(list(flow)):
        options = {**zuko_options(layer.made), "univariate": noise_to_data}
        forward = zuko.flows.MaskedAutoregressiveTransform(DIM, order=layer.order.argsort(), **options).double()
        hand_over(layer.made, forward.hyper, torch.arange(2 * DIM))
        layers.append(forward.inv)
    peer = zuko.flows.Flow(layers, zuko.flows.MAF(DIM).base.double())
    assert_agrees(flow, peer().log_prob, peer().transform.inv)


@every_order
@every_activation
def test_real_nvp_agrees_with_zuko(order: str, activation: str) -> None:
    flow = modest(RealNVP(DIM, num_layers=LAYERS, hidden_dims=[10, 7], activation=activation, order=order))
    peer = zuko_real_nvp(flow, order)
    assert_agrees(flow, peer().log_prob, peer().transform.inv)


@every_order
@pytest.mark.parametrize("batch", [(), (ROWS,)], ids=["one context", "a context for each row"])
@pytest.mark.parametrize("make", [ConditionalMAF, ConditionalRealNVP])
def test_conditional_flows_agree_with_zuko(make: Any, order: str, batch: tuple[int, ...]) -> None:
    """With a context that enters only the first layer, as in zuko."""
    options: dict[str, Any] = {"hidden_dims": WIDTHS_AT_A_CONTEXT, "activation": "elu", "order": order}
    conditional = modest(make(DIM, CONTEXT_DIM, num_layers=LAYERS, **options))
    with torch.no_grad():
        for network in conditional.modules():
            if isinstance(network, (MADE, MLP)):
                for layer in network.context_layers[1:]:
                    layer.weight.zero_()
    context = 0.5 * torch.randn(*batch, CONTEXT_DIM, dtype=double)
    peer = {ConditionalMAF: zuko_maf, ConditionalRealNVP: zuko_real_nvp}[make](conditional.flow, order)(context)
    assert_agrees(conditional.condition(context), peer.log_prob, peer.transform.inv)


# nflows: transforms map data to noise by z = scale y + shift


def scale_and_shift(a: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    return torch.exp(-alpha_of(a)), -shift * torch.exp(-alpha_of(a) / 2)


def nflows_flow(transforms: list[Any]) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """nflows' density, and its map from noise to data."""
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow as NFlow
    from nflows.transforms.base import CompositeTransform

    composite = CompositeTransform(transforms).double().eval()
    return NFlow(composite, StandardNormal([DIM])).log_prob, lambda noise: composite.inverse(noise)[0]


def nflows_maf_layer(made: Any) -> list[Any]:
    """A layer in the natural order between a permutation and its inverse."""
    from nflows.transforms.autoregressive import MaskedAffineAutoregressiveTransform
    from nflows.transforms.base import InverseTransform
    from nflows.transforms.permutations import Permutation

    class Bounded(MaskedAffineAutoregressiveTransform):
        """An autoregressive transform whose unconstrained scales yield ours."""

        def _unconstrained_scale_and_shift(self, autoregressive_params: Tensor) -> tuple[Tensor, Tensor]:
            scale, shift = scale_and_shift(*super()._unconstrained_scale_and_shift(autoregressive_params))
            return torch.log(torch.expm1(scale - self._epsilon)), shift

    width, *others = made.hidden_dims
    assert others == [width] * len(others)
    layer = Bounded(
        DIM,
        width,
        num_blocks=len(others),
        use_residual_blocks=False,
        activation=ACTIVATIONS[made.activation][1],
    ).double()
    # Ours has pairs of shift and scale, nflows pairs of scale and shift.
    outputs = torch.arange(2 * DIM).view(DIM, 2)[made.order].flip(1).flatten()
    hand_over(made, layer.autoregressive_net, outputs, inputs=made.order)
    permutation = Permutation(made.order)
    return [permutation, layer, InverseTransform(permutation)]


def nflows_batch_norm(layer: BatchNorm) -> Any:
    from nflows.transforms.normalization import BatchNorm as Peer

    peer = Peer(DIM, eps=layer.EPS).double()
    with torch.no_grad():
        peer.unconstrained_weight.copy_(torch.log(torch.expm1(torch.exp(layer.log_gamma) - peer.eps)))
        peer.bias.copy_(layer.beta)
        peer.running_mean.copy_(layer.mean)
        peer.running_var.copy_(layer.variance)
    return peer


def nflows_coupling(layer: Any) -> Any:
    from nflows.nn.nets.mlp import MLP
    from nflows.transforms.coupling import AffineCouplingTransform

    class Bounded(AffineCouplingTransform):
        """With our scale and shift."""

        def _scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
            shift, a = transform_params.chunk(2, -1)
            return scale_and_shift(a, shift)

    class SideBySide(nn.Module):
        """One network, or one for shifts and one for scales, without a context."""

        def __init__(self, kept: int, outputs: int) -> None:
            super().__init__()
            self.networks = nn.ModuleList(
                MLP([kept], [outputs // len(layer.networks)], network.hidden_dims, ACTIVATIONS[network.activation][1])
                for network in layer.networks
            )

        def forward(self, kept: Tensor, context: None = None) -> Tensor:
            return torch.cat([network(kept) for network in self.networks], -1)

    peer = Bounded((~layer.mask).int(), SideBySide).double()
    for own, other in zip(layer.networks, peer.transform_net.networks, strict=True):
        hand_over(own, other, torch.arange(layers_of(own)[-1].weight.shape[0]))
    return peer


@every_order
@every_activation
@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch norm"])
def test_maf_agrees_with_nflows(order: str, activation: str, batch_norm: bool) -> None:
    pytest.importorskip("nflows")
    options: dict[str, Any] = {"activation": activation, "order": order, "batch_norm": batch_norm}
    flow = modest(MAF(DIM, num_layers=LAYERS, hidden_dims=WIDTHS, **options))
    transforms = []
    for layer in reversed(list(flow)):
        transforms += [nflows_batch_norm(layer)] if isinstance(layer, BatchNorm) else nflows_maf_layer(layer.made)
    assert_agrees(flow, *nflows_flow(transforms))


@every_order
@every_activation
@pytest.mark.parametrize("networks", ["joint", "separate"])
def test_real_nvp_agrees_with_nflows(order: str, activation: str, networks: str) -> None:
    pytest.importorskip("nflows")
    options: dict[str, Any] = {"activation": activation, "order": order, "networks": networks}
    flow = modest(RealNVP(DIM, num_layers=LAYERS, hidden_dims=[10, 7], **options))
    assert_agrees(flow, *nflows_flow([nflows_coupling(layer) for layer in reversed(list(flow))]))
