"""flowjax: all functions are compiled with the weights as arguments; bijections map data to noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
import torch
from flowjax.bijections import (
    AbstractBijection,
    Affine,
    Chain,
    Coupling,
    Flip,
    Invert,
    MaskedAutoregressive,
    Permute,
    RationalQuadraticSpline,
)
from flowjax.distributions import AbstractDistribution, Normal, Transformed
from torch import Tensor

from parts.architecture import BINS, HIDDEN_LAYERS, Architecture, Linear, linears, network_of, paired, rearranged
from parts.peers.base import LEARNING_RATE, Peer, UnsupportedError
from parts.peers.natural import in_natural_order, in_our_order
from pyro_maf import transforms
from pyro_maf.transforms import Stack

TAIL_BOUND = 5.0
"""Half the width of a spline's box, zuko's default."""


class Flowjax(Peer):
    """`MaskedAutoregressive` and `Coupling` in a `Chain`, no slower than the `Scan` of flowjax's predefined flows."""

    families = ("MAF", "IAF", "RealNVP", "NSF")
    compiles = True

    def __init__(self, architecture: Architecture, flow: Stack, device: torch.device) -> None:
        super().__init__(architecture, flow, device)
        if device.type != jax.default_backend().replace("gpu", "cuda"):
            raise UnsupportedError(f"jax was installed for {jax.default_backend()}")
        self.layers = list(flow)
        self.networks: list[eqx.nn.MLP] = []
        make = self._coupling if architecture.family == "RealNVP" else self._autoregressive
        bijections: list[AbstractBijection] = []
        for layer in self.layers:
            bijections += make(layer)
        base = Normal(jnp.zeros(architecture.dim))
        is_parallel = architecture.family == "IAF"  # from noise to data
        self._compile(Transformed(base, Chain(bijections[1:]) if is_parallel else Invert(Chain(bijections[:0:-1]))))

    def _autoregressive(self, layer: transforms.MaskedAutoregressive) -> list[AbstractBijection]:
        """A reversal, which is dropped for the layer next to the noise, and the layer."""
        is_spline = self.architecture.family == "NSF"
        bijection = MaskedAutoregressive(
            jax.random.key(0),
            transformer=RationalQuadraticSpline(knots=BINS, interval=TAIL_BOUND) if is_spline else Affine(),
            dim=self.architecture.dim,
            nn_width=self.architecture.hidden,
            nn_depth=HIDDEN_LAYERS,
        )
        if is_spline:
            return [Flip((self.architecture.dim,)), bijection]
        network = _filled(bijection.masked_autoregressive_mlp, in_natural_order(layer, scale_first=False), masked=True)
        self.networks.append(paramax.unwrap(network))
        bijection = eqx.tree_at(lambda it: it.masked_autoregressive_mlp, bijection, network)
        return [Flip((self.architecture.dim,)), bijection]

    def _coupling(self, layer: transforms.Coupling) -> list[AbstractBijection]:
        """A rotation that puts the identity half first, dropped for the layer next to the noise, and the layer."""
        kept = int(layer.mask.sum())
        bijection = Coupling(
            jax.random.key(0),
            transformer=Affine(),
            untransformed_dim=kept,
            dim=self.architecture.dim,
            nn_width=self.architecture.hidden,
            nn_depth=HIDDEN_LAYERS,
        )
        copied = rearranged(linears(network_of(layer)), outputs=paired(2 * (self.architecture.dim - kept)))
        network = _filled(bijection.conditioner, copied, masked=False)
        self.networks.append(network)
        bijection = eqx.tree_at(lambda it: it.conditioner, bijection, network)
        return [Permute(jnp.roll(jnp.arange(self.architecture.dim), -kept)), bijection]

    def _compile(self, distribution: AbstractDistribution) -> None:
        # Without gradients, masks are multiplied in beforehand. Plain lists of arrays are the fastest arguments.
        self.fixed, rebuilt = _taken_apart(paramax.unwrap(distribution))
        self.free, trainable = _taken_apart(distribution)

        def reverse_divergence(free: list[Any], noise: Any) -> Any:
            bijection = paramax.unwrap(trainable(free)).bijection
            data, log_det = jax.vmap(bijection.transform_and_log_det)(noise)
            return (0.5 * jnp.square(data).sum(-1) - log_det).mean()

        def negative_log_prob(free: list[Any], data: Any) -> Any:
            return -trainable(free).log_prob(data).mean()

        optimizer = optax.adam(LEARNING_RATE)

        def step_on(objective: Callable[[list[Any], Any], Any]) -> Any:
            def step(free: list[Any], state: Any, values: Any) -> tuple[list[Any], Any, Any]:
                loss, gradient = jax.value_and_grad(objective)(free, values)
                updates, state = optimizer.update(gradient, state)
                return optax.apply_updates(free, updates), state, loss

            return jax.jit(step, donate_argnums=(0, 1))

        self._sample = jax.jit(lambda fixed, noise: jax.vmap(rebuilt(fixed).bijection.transform)(noise))
        self._log_prob = jax.jit(lambda fixed, data: rebuilt(fixed).log_prob(data))
        self._differentiate = jax.jit(jax.value_and_grad(reverse_divergence))
        self._train_step, self._guide_step = step_on(negative_log_prob), step_on(reverse_divergence)
        # Steps donate their buffers, so they get copies.
        self.state = [jnp.array(value) for value in self.free], jax.tree.map(jnp.array, optimizer.init(self.free))

    def set_training(self, training: bool) -> None:
        """Do nothing, since no function depends on it."""

    def prepare(self, values: Tensor) -> Any:
        return jnp.array(values.numpy())

    def sample(self, noise: Any) -> Any:
        return self._sample(self.fixed, noise).block_until_ready()

    def sample_and_differentiate(self, noise: Any) -> Any:
        return jax.block_until_ready(self._differentiate(self.free, noise))

    def log_prob(self, data: Any) -> Any:
        return self._log_prob(self.fixed, data).block_until_ready()

    def train_step(self, data: Any) -> Any:
        return self._stepped(self._train_step, data)

    def guide_step(self, noise: Any) -> Any:
        return self._stepped(self._guide_step, noise)

    def _stepped(self, step: Any, values: Any) -> Any:
        *state, loss = step(*self.state, values)
        self.state = tuple(state)
        return loss.block_until_ready()

    def outputs(self, index: int, inputs: Tensor) -> Tensor:
        def network(values: Tensor) -> Tensor:
            return torch.from_numpy(np.array(jax.vmap(self.networks[index])(jnp.array(values.numpy()))))

        outputs = in_our_order(self.layers[index], network, inputs, scale_first=False)
        return outputs if self.architecture.family in ("MAF", "IAF") else outputs.unflatten(-1, (-1, 2)).mT.flatten(1)


def _filled(network: eqx.nn.MLP, copied: list[Linear], *, masked: bool) -> eqx.nn.MLP:
    layers = []
    for layer, linear in zip(network.layers, copied, strict=True):
        weight, bias, mask = (jnp.array(value.contiguous().numpy()) for value in linear)
        weight = paramax.Parameterize(jnp.where, mask, weight, 0) if masked else weight
        layers.append(eqx.tree_at(lambda it: (it.weight, it.bias), layer, (weight, bias)))
    return eqx.tree_at(lambda it: it.layers, network, tuple(layers))


def _taken_apart(distribution: AbstractDistribution) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Trainable arrays of a distribution, and a function that rebuilds it from such arrays."""
    trained, static = eqx.partition(
        distribution, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )
    leaves, structure = jax.tree.flatten(trained)
    return leaves, lambda values: eqx.combine(
        jax.tree.unflatten(structure, values), static, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )
