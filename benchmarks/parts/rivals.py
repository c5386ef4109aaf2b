"""The paper's models by the peers, built as their users build them, and a loop that trains them."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parts.peers.base import UnsupportedError
from pyro_maf.datasets import Dataset
from pyro_maf.experiments import Candidate

MAX_GRAD_NORM = 5.0
COMPONENTS = 10
BINS, BOUND = 8, 5.0
"""Bins and tail bound of nflows' splines, zuko's defaults."""


class Zuko(nn.Module):
    """`zuko.flows.MAF`, `zuko.flows.NSF` and `zuko.flows.RealNVP`."""

    def __init__(self, candidate: Candidate, dim: int, context_dim: int) -> None:
        super().__init__()
        import zuko

        makers = {"made": zuko.flows.MAF, "maf": zuko.flows.MAF, "nsf": zuko.flows.NSF, "realnvp": zuko.flows.RealNVP}
        if candidate.flow not in makers:
            raise UnsupportedError(f"zuko has no {candidate.name}.")
        self.flow = makers[candidate.flow](
            dim, context_dim, transforms=candidate.num_layers, hidden_features=candidate.hidden_dims
        )

    def log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        return self.flow(context).log_prob(y)


class Nflows(nn.Module):
    """Masked autoregressive layers with reversals between, affine or spline, on a normal or `MADEMoG`; couplings."""

    def __init__(self, candidate: Candidate, dim: int, context_dim: int) -> None:
        super().__init__()
        from nflows.distributions.mixture import MADEMoG
        from nflows.distributions.normal import StandardNormal
        from nflows.flows.base import Flow
        from nflows.transforms.base import CompositeTransform
        from nflows.transforms.permutations import ReversePermutation

        width, *others = candidate.hidden_dims
        layers: list[Any] = []
        if candidate.flow != "made-mog":
            for index in range(candidate.num_layers):
                layers += [ReversePermutation(dim)] if index else []
                layers.append(self._layer(candidate, dim, context_dim, index))
        if candidate.flow in ("made-mog", "maf-mog"):
            layers = layers or [ReversePermutation(dim)]
            base = MADEMoG(
                dim,
                width,
                context_dim or None,
                num_blocks=len(others),
                num_mixture_components=COMPONENTS,
                use_residual_blocks=False,
                custom_initialization=True,
            )
        else:
            base = StandardNormal([dim])
        self.flow = Flow(CompositeTransform(layers), base)

    @staticmethod
    def _layer(candidate: Candidate, dim: int, context_dim: int, index: int) -> Any:
        from nflows.nn.nets.mlp import MLP
        from nflows.transforms.autoregressive import (
            MaskedAffineAutoregressiveTransform,
            MaskedPiecewiseRationalQuadraticAutoregressiveTransform,
        )
        from nflows.transforms.base import CompositeTransform
        from nflows.transforms.coupling import AffineCouplingTransform
        from nflows.transforms.normalization import ActNorm

        width, *others = candidate.hidden_dims
        if candidate.flow == "nsf":
            return MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                dim,
                width,
                context_dim or None,
                num_bins=BINS,
                tails="linear",
                tail_bound=BOUND,
                num_blocks=len(others),
                use_residual_blocks=False,
            )
        if candidate.flow != "realnvp":
            return MaskedAffineAutoregressiveTransform(
                dim, width, context_dim or None, num_blocks=len(others), use_residual_blocks=False
            )
        if context_dim:
            raise UnsupportedError("nflows has no plain network with a context for couplings.")

        class Conditioner(MLP):
            def forward(self, inputs: Tensor, context: None = None) -> Tensor:
                return super().forward(inputs)

        moved = (torch.arange(dim) + index) % 2
        coupling = AffineCouplingTransform(
            moved, lambda inputs, outputs: Conditioner([inputs], [outputs], candidate.hidden_dims, F.relu)
        )
        # The coupling's scale is a sigmoid, so without another layer no data could be narrower than the noise.
        return CompositeTransform([ActNorm(dim), coupling])

    def log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        return self.flow.log_prob(y, context)


class Pyro(nn.Module):
    """`affine_autoregressive(...).inv` and `affine_coupling`, with the variables reversed between layers."""

    def __init__(self, candidate: Candidate, dim: int, context_dim: int) -> None:
        super().__init__()
        from pyro.distributions import transforms as T

        if candidate.flow not in ("made", "maf", "realnvp"):
            raise UnsupportedError(f"Pyro has no {candidate.name}.")
        widths = list(candidate.hidden_dims)
        if candidate.flow != "realnvp" and min(widths) < dim:
            raise UnsupportedError(f"Pyro refuses hidden layers narrower than {dim} inputs.")
        if candidate.flow != "realnvp":
            make = T.conditional_affine_autoregressive if context_dim else T.affine_autoregressive
        else:
            make = T.conditional_affine_coupling if context_dim else T.affine_coupling
        sizes = (dim, context_dim) if context_dim else (dim,)
        # From noise to data. Autoregressive layers go that way in one pass; inverted, they score in one.
        self.layers = nn.ModuleList(make(*sizes, hidden_dims=widths) for _ in range(candidate.num_layers))
        self.is_inverse = candidate.flow != "realnvp"
        self.dim = dim
        self.permute = T.Permute

    def log_prob(self, y: Tensor, context: Tensor | None) -> Tensor:
        transforms: list[Any] = []
        for index, layer in enumerate(self.layers):
            transforms += [self.permute(torch.arange(self.dim).flip(0))] if index else []
            at = layer if context is None else layer.condition(context)
            transforms.append(at.inv if self.is_inverse else at)
        base = dist.Normal(y.new_zeros(self.dim), y.new_ones(self.dim)).to_event(1)
        return dist.TransformedDistribution(base, transforms).log_prob(y)


RIVALS: dict[str, type[nn.Module]] = {"zuko": Zuko, "nflows": Nflows, "pyro": Pyro}


def train(
    module: Any,
    data: Dataset,
    *,
    batch: int,
    rate: float,
    seed: int,
    epochs: float = math.inf,
    patience: float = math.inf,
    seconds: float = math.inf,
    weight_decay: float = 0.0,
    anneals: bool = False,
) -> int:
    """Train by Adam with clipped gradients and restore the weights with the best validation loss.

    Training ends after the epoch in which `epochs`, `patience` or processor `seconds` is reached.

    Args:
        anneals: Whether the rate falls to zero over the seconds by a cosine schedule.

    Returns:
        Number of epochs.
    """
    generator, started = torch.Generator().manual_seed(seed), time.process_time()
    optimizer = torch.optim.Adam(module.parameters(), rate, weight_decay=weight_decay, fused=True)
    best, best_weights, best_epoch, epoch = float("inf"), copy.deepcopy(module.state_dict()), 0, 0
    while epoch < epochs and epoch - best_epoch < patience and time.process_time() - started < seconds:
        epoch += 1
        module.train()
        for index in torch.randperm(len(data.train), generator=generator).split(batch):
            if anneals:
                spent = min(seconds, time.process_time() - started)
                optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * spent / seconds)) / 2
            optimizer.zero_grad()
            loss = -_log_prob(module, data.train[index], data.train_context, index).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), MAX_GRAD_NORM)
            optimizer.step()
        module.eval()
        held_out = -scores(module, data.validation, data.validation_context).mean().item()
        if held_out < best:
            best, best_weights, best_epoch = held_out, copy.deepcopy(module.state_dict()), epoch
    module.load_state_dict(best_weights)
    module.eval()
    return epoch


def scores(module: Any, rows: Tensor, context: Tensor | None) -> Tensor:
    """Log-density of each row, in float64."""
    log_probs = []
    with torch.no_grad():
        for start in range(0, len(rows), 2048):
            part = slice(start, start + 2048)
            log_probs.append(_log_prob(module, rows[part], context, part).double())
    return torch.cat(log_probs)


def _log_prob(module: Any, rows: Tensor, context: Tensor | None, part: Tensor | slice) -> Tensor:
    """Log-density of rows, in float32, given the rows `part` of the context."""
    return module.log_prob(rows.float(), None if context is None else context[part].float())
