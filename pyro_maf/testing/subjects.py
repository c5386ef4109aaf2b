"""Flows as the laws need them: with random parameters, at a context, layer by layer, and their inputs."""

from __future__ import annotations

import copy
from typing import TypeAlias

import torch
from torch import Tensor, nn

from pyro_maf._core.torch_state import reference_tensor
from pyro_maf.transforms import BatchNorm, ConditionalFlow, Conditioned, Flow, Inverse, LowerTriangularAffine, Stack

__all__ = ["FlowOrForm", "at_context", "fresh", "layers_of", "points", "shaken"]

FlowOrForm: TypeAlias = "Flow | ConditionalFlow"


def shaken(transform: FlowOrForm, gain: float = 1.0) -> FlowOrForm:
    """Randomise all parameters and statistics, with outputs of moderate size: a stand-in for a trained transform."""
    with torch.no_grad():
        for parameter in transform.parameters():
            fan_in = parameter.shape[1] if parameter.dim() == 2 else 4
            parameter.copy_(gain * torch.randn_like(parameter) / max(1, fan_in) ** 0.5)
        for member in transform.modules():
            if isinstance(member, BatchNorm):
                member.mean.copy_(torch.randn(member.input_dim))
                member.variance.copy_(torch.rand(member.input_dim) + 0.1)
            if isinstance(member, LowerTriangularAffine):
                # From ten rows on, a triangular matrix with entries of size 1 is numerically singular.
                last = member.network.layers[-1] if member.context_dim else nn.Module()
                for parameter in (member.below, *last.parameters()):
                    parameter.div_(member.input_dim**0.5)
    return transform


def at_context(transform: FlowOrForm, *batch: int) -> Flow:
    """The flow itself, or a conditional one at a random context with this batch shape."""
    if isinstance(transform, Flow):
        return transform
    like = next(transform.parameters())
    return transform.condition(torch.randn(*batch, transform.context_dim, dtype=torch.float64).to(like))


def points(flow: Flow, *batch: int, scale: float = 1.0) -> Tensor:
    """Standard normal inputs of a flow, times `scale`, with its dtype and device."""
    like, held = reference_tensor(flow), reference_tensor(flow, floating=False)
    dtype, device = (torch.float64 if like is None else like.dtype), (None if held is None else held.device)
    return scale * torch.randn(*batch, flow.input_dim, dtype=dtype, device=device)


def fresh(flow: Flow) -> Flow:
    """A copy with the same weights and an empty cache."""
    return copy.deepcopy(flow).with_cache(0)


def layers_of(flow: Flow) -> list[Flow]:
    """The layers of a flow, noise to data, each at the flow's context."""
    if isinstance(flow, Conditioned):
        return [
            Conditioned(layer, flow.context).with_cache(0) if layer.context_dim else layer
            for layer in layers_of(flow.flow)
        ]
    if isinstance(flow, Inverse):
        return [layer.inv for layer in reversed(layers_of(flow.flow))]
    if isinstance(flow, Stack):
        return [inner for layer in flow for inner in layers_of(layer)]
    return [flow.with_cache(0)]
