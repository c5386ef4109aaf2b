"""The full-rank affine map at the end of a guide's flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pyro_maf.infer.initialization import Normal
from pyro_maf.nn.tempering import Tempered
from pyro_maf.transforms import Stack
from pyro_maf.transforms.triangular import Head

__all__ = ["FlowClass", "with_head"]

ACTIVATION = "elu"


class FlowClass(Protocol):
    """A class of flows that a guide can be built on."""

    def __call__(
        self, input_dim: int, *, num_layers: int, hidden_dims: Sequence[int], activation: str, context_dim: int
    ) -> Stack:
        """Build the layers before the head."""
        ...


def with_head(
    flow_class: FlowClass,
    start: Normal,
    num_layers: int,
    hidden_dims: Sequence[int] | None,
    context_dim: int,
) -> Stack:
    """Compose a flow with a head: one map that starts as a normal and can be trained at a guide's learning rate.

    `hidden_dims` of None means two layers of 64 to 512 units, depending on the number of dimensions.
    """
    size = len(start.loc)
    if hidden_dims is None:
        hidden_dims = 2 * (min(512, max(64, 4 * size)),)
    flow = flow_class(
        size, num_layers=num_layers, hidden_dims=hidden_dims, activation=ACTIVATION, context_dim=context_dim
    )
    head = Head(
        size,
        loc=start.loc,
        scale_tril=start.scale_tril,
        hidden_dims=hidden_dims,
        activation=ACTIVATION,
        context_dim=context_dim,
    )
    stack = Stack([*flow, head]).to(start.loc)
    for module in stack.modules():
        if isinstance(module, Tempered):
            module.temper()
    return stack
