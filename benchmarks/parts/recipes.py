"""Each peer's spline flow, built and trained as its own documentation recommends, for the time that our default took.

The epochs and patience of the documentation suit its own data; here everyone has the same processor seconds, and the
weights with the best validation loss are used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parts import rivals
from pyro_maf.datasets import Dataset


class Scores(NamedTuple):
    """Log-likelihoods of test and validation rows, number of epochs and number of parameters."""

    test: Tensor
    validation: Tensor
    epochs: int
    parameters: int


def fit(who: str, data: Dataset, seconds: float, seed: int) -> Scores:
    """Fit the recipe of package `who` to standardised rows.

    Raises:
        ImportError: If the package is not installed.
    """
    torch.manual_seed(seed)
    return _RECIPES[who](data, seconds, seed)


def _zuko(data: Dataset, seconds: float, seed: int) -> Scores:
    """The flow of zuko's README, and the loop of its first tutorial."""
    import zuko

    flow = zuko.flows.NSF(data.input_dim, data.context_dim, transforms=3, hidden_features=[128] * 3)
    return _trained(_Zuko(flow), data, seconds, seed, batch=64, rate=1e-3)


class _Zuko(nn.Module):
    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        return self.flow(context).log_prob(y)


def _nflows(data: Dataset, seconds: float, seed: int) -> Scores:
    """The autoregressive flow of its authors' spline paper, halved in layers and units, as the full one takes days."""
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.transforms.autoregressive import MaskedPiecewiseRationalQuadraticAutoregressiveTransform
    from nflows.transforms.base import CompositeTransform
    from nflows.transforms.lu import LULinear
    from nflows.transforms.permutations import RandomPermutation

    dim = data.input_dim
    layers: list[nn.Module] = []
    for _ in range(5):
        layers += [RandomPermutation(dim), LULinear(dim, identity_init=True)]
        layers.append(
            MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                dim, 128, data.context_dim or None, num_bins=8, tails="linear", tail_bound=3.0, num_blocks=2
            )
        )
    flow = Flow(CompositeTransform(layers), StandardNormal([dim]))
    return _trained(flow, data, seconds, seed, batch=512, rate=5e-4, anneals=True)


def _normflows(data: Dataset, seconds: float, seed: int) -> Scores:
    """The flow of its spline example, with a third of its 16 layers, which are for two columns."""
    import normflows as nf

    dim, context = data.input_dim, data.context_dim or None
    layers: list[nn.Module] = []
    for _ in range(5):
        layers.append(nf.flows.AutoregressiveRationalQuadraticSpline(dim, 2, 128, context))
        layers.append(nf.flows.LULinearPermute(dim))
    base = nf.distributions.DiagGaussian(dim, trainable=False)
    make = nf.ConditionalNormalizingFlow if context else nf.NormalizingFlow
    module = _Normflows(make(base, layers))
    return _trained(module, data, seconds, seed, batch=512, rate=5e-4, weight_decay=1e-5)


class _Normflows(nn.Module):
    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        return self.flow.log_prob(y) if context is None else self.flow.log_prob(y, context)


def _trained(module: Any, data: Dataset, seconds: float, seed: int, **options: Any) -> Scores:
    epochs = rivals.train(module, data, seconds=seconds, seed=seed, **options)
    return Scores(
        rivals.scores(module, data.test, data.test_context),
        rivals.scores(module, data.validation, data.validation_context),
        epochs,
        sum(weight.numel() for weight in module.parameters()),
    )


def _flowjax(data: Dataset, seconds: float, seed: int) -> Scores:
    """`masked_autoregressive_flow` with splines as transformer, and the defaults of flowjax and its `fit_to_data`."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax
    import paramax
    from flowjax.bijections import RationalQuadraticSpline
    from flowjax.distributions import Normal
    from flowjax.flows import masked_autoregressive_flow
    from flowjax.train.losses import MaximumLikelihoodLoss
    from flowjax.train.train_utils import get_batches, step

    key, of_flow = jax.random.split(jax.random.key(seed))
    flow = masked_autoregressive_flow(
        of_flow,
        base_dist=Normal(jnp.zeros(data.input_dim)),
        transformer=RationalQuadraticSpline(knots=8, interval=4),
        cond_dim=data.context_dim or None,
    )
    train, validation, test = (
        tuple(jnp.asarray(each.float().numpy()) for each in (rows, context) if each is not None)
        for rows, context in (
            (data.train, data.train_context),
            (data.validation, data.validation_context),
            (data.test, data.test_context),
        )
    )
    weights, rest = eqx.partition(
        flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )
    optimizer, loss = optax.adam(5e-4), MaximumLikelihoodLoss()
    state = optimizer.init(weights)
    score = jax.jit(lambda weights, arrays: paramax.unwrap(eqx.combine(weights, rest)).log_prob(*arrays))

    def scores(weights: Any, arrays: tuple[Any, ...]) -> Tensor:
        parts = [score(weights, tuple(a[i : i + 2048] for a in arrays)) for i in range(0, len(arrays[0]), 2048)]
        return torch.cat([torch.tensor(part.tolist(), dtype=torch.float64) for part in parts])

    best, best_weights, epochs, started = -math.inf, weights, 0, math.inf
    while time.process_time() - started < seconds or not epochs:
        key, of_order, of_steps = jax.random.split(key, 3)
        shuffled = [jax.random.permutation(of_order, array) for array in train]
        for batch in zip(*get_batches(shuffled, 100), strict=True):
            weights, state, _ = step(
                weights, rest, *batch, optimizer=optimizer, opt_state=state, loss_fn=loss, key=of_steps
            )
            if started == math.inf:
                started = time.process_time()  # compilation does not count
        epochs += 1
        mean = float(scores(weights, validation).mean())
        if mean > best:
            best, best_weights = mean, weights
    parameters = sum(leaf.size for leaf in jax.tree.leaves(weights))
    return Scores(scores(best_weights, test), scores(best_weights, validation), epochs, parameters)


_RECIPES: dict[str, Callable[[Dataset, float, int], Scores]] = {
    "zuko": _zuko,
    "nflows": _nflows,
    "normflows": _normflows,
    "flowjax": _flowjax,
}
RECIPES = tuple(_RECIPES)
"""Packages with a recipe."""
