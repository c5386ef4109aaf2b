"""Snapshots of modules: any change that may alter a call's result, other than parameter values, is detected."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from pyro_maf import MAF, FlowPrior
from pyro_maf._core.module_state import Structure


def _call(module: Any, *_: object) -> None:
    return None


CHANGES: dict[str, Callable[[Any], object]] = {
    "eval mode of a part": lambda flow: flow[0].made.eval(),
    "hook of a part": lambda flow: flow[0].made.layers[0].register_forward_hook(_call),
    "hook of the whole": lambda flow: flow.register_forward_pre_hook(_call),
    "hook before the call of a part": lambda flow: flow[0].made.register_forward_pre_hook(_call),
    "hook before the backward of a part": lambda flow: flow[0].register_full_backward_pre_hook(_call),
    "a buffer where there was none": lambda flow: flow[0].register_buffer("late", torch.zeros(1)),
    "a parameter where there was none": lambda flow: flow[0].register_parameter("late", nn.Parameter(torch.zeros(1))),
    "a module in an empty list": lambda flow: flow[0].made.context_layers.append(nn.Linear(2, 8)),
    "a parameter swapped in its table": lambda flow: (
        flow[0].made.layers[0]._parameters.update(bias=nn.Parameter(torch.zeros(8)))
    ),
    "backward hook": lambda flow: flow[1].made.register_full_backward_hook(_call),
    "parametrization": lambda flow: weight_norm(flow[0].made.layers[0]),
    "a call of one's own": lambda flow: setattr(flow[0].made.layers[1], "forward", _call),
    "activation": lambda flow: setattr(flow[0].made, "activation", "tanh"),
    "another layer": lambda flow: flow.layers.insert(0, flow[0]),
    "another parameter": lambda flow: setattr(flow[0].made.layers[0], "bias", nn.Parameter(torch.zeros(8))),
    "no parameter": lambda flow: setattr(flow[0].made.layers[0], "bias", None),
    "dtype of a part": lambda flow: flow[0].made.double(),
    "shape": lambda flow: setattr(flow[0].made.layers[0].bias, "data", torch.zeros(9)),
    "mask, in place": lambda flow: flow[0].made.layers[0].mask.zero_(),
    "another mask": lambda flow: flow[0].made.layers[0].register_buffer("mask", torch.ones(8, 3)),
    "a loaded state": lambda flow: flow.load_state_dict(flow.state_dict()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_detected(change: str) -> None:
    flow = MAF(3, num_layers=2, hidden_dims=[8])
    structure = Structure.of(flow)
    kinds = structure.kinds()
    assert (structure.kinds(), Structure.of(flow, structure), Structure.of(flow)) == (kinds, structure, structure)
    CHANGES[change](flow)
    for now in (Structure.of(flow, structure), Structure.of(flow)):
        assert now != structure or now.kinds() != kinds


def test_parameter_values_and_calls_are_not_a_change() -> None:
    flow = MAF(3, num_layers=2, hidden_dims=[8])
    structure = Structure.of(flow)
    kinds = structure.kinds()
    (-FlowPrior(flow).log_prob(torch.randn(5, 3)).mean()).backward()
    torch.optim.Adam(flow.parameters()).step()
    flow.inv(flow(torch.randn(4, 3)))
    assert Structure.of(flow, structure) is structure
    assert structure.kinds() == kinds
    assert structure.is_plain


def test_a_state_does_not_keep_its_module_alive() -> None:
    flow = MAF(3, num_layers=2, hidden_dims=[8])
    prior = FlowPrior(flow)
    with torch.no_grad():
        prior.log_prob(torch.zeros(2, 3))
    weight = weakref.ref(flow[0].made.layers[0].weight)  # type: ignore[union-attr,index]
    gc.disable()
    try:
        del prior, flow
        assert weight() is None
    finally:
        gc.enable()
