"""Registry of all transforms. `test_contract.py` tests every law for every entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from pyro_maf import (
    IAF,
    MAF,
    NSF,
    ConditionalIAF,
    ConditionalMAF,
    ConditionalNSF,
    ConditionalRealNVP,
    RealNVP,
    transforms,
)
from pyro_maf.nn import ACTIVATIONS, MADE
from pyro_maf.testing.subjects import shaken
from pyro_maf.transforms import ConditionalFlow, Flow
from pyro_maf.transforms.low_rank import LowRankHead
from pyro_maf.transforms.partial import Partial
from pyro_maf.transforms.triangular import Head
from pyro_maf.univariate import Spline


@dataclass(frozen=True)
class Architecture:
    """Sizes, order, depth and seed of a transform, as drawn by hypothesis."""

    input_dim: int
    context_dim: int
    num_layers: int
    hidden_dims: list[int]
    activation: str
    order: Any
    seed: int

    @property
    def network(self) -> dict[str, Any]:
        return {"hidden_dims": self.hidden_dims, "activation": self.activation}

    @property
    def permutation(self) -> Tensor:
        return torch.randperm(self.input_dim, generator=torch.Generator().manual_seed(self.seed))

    @property
    def layer(self) -> dict[str, Any]:
        return {**self.network, "order": self.permutation, "degrees": "random", "seed": self.seed}

    @property
    def stack(self) -> dict[str, Any]:
        order = self.permutation.tolist() if self.order == "given" else self.order
        return {**self.network, "num_layers": self.num_layers, "order": order, "seed": self.seed}

    @property
    def normal(self) -> dict[str, Tensor]:
        """A location and a lower triangular factor."""
        generator = torch.Generator().manual_seed(self.seed)
        loc, factor = torch.randn(2, self.input_dim, self.input_dim, generator=generator) / self.input_dim**0.5
        return {"loc": loc[0], "scale_tril": factor.tril(-1) + loc.diagonal().exp().diag()}

    @property
    def mask(self) -> Tensor:
        return self.permutation < self.input_dim // 2


@st.composite
def architectures(draw: Any, largest: int = 12) -> Architecture:
    """Architectures with 1 to `largest` dimensions, 1 to 4 layers and up to three hidden layers of 1 to 64 units."""
    return Architecture(
        input_dim=draw(st.integers(1, largest)),
        context_dim=draw(st.integers(1, 3)),
        num_layers=draw(st.integers(1, 4)),
        hidden_dims=draw(st.lists(st.integers(1, 64), min_size=0, max_size=3)),
        activation=draw(st.sampled_from(list(ACTIVATIONS))),
        order=draw(st.sampled_from(["reverse", "random", "given"])),
        seed=draw(st.integers(0, 10**6)),
    )


def of_rank(rank: int, flow: Any) -> Any:
    """Set the rank of all output layers, as wide flows have it."""
    for network in flow.modules():
        if isinstance(network, MADE):
            network.set_rank(rank)
            network.zero_output()
    return flow


Builder = Callable[[Architecture], "Flow | ConditionalFlow"]

REGISTRY: dict[str, Builder] = {
    "MaskedAutoregressive": lambda a: transforms.MaskedAutoregressive(a.input_dim, **a.layer),
    "InverseAutoregressive": lambda a: transforms.InverseAutoregressive(a.input_dim, **a.layer),
    "Coupling": lambda a: transforms.Coupling(a.input_dim, mask=a.mask, **a.network),
    "Coupling separate": lambda a: transforms.Coupling(a.input_dim, networks="separate", **a.network),
    "MaskedAutoregressive spline": lambda a: transforms.MaskedAutoregressive(
        a.input_dim, univariate="spline", **a.layer
    ),
    "InverseAutoregressive spline": lambda a: transforms.InverseAutoregressive(
        a.input_dim, univariate=Spline(num_bins=5, bound=3.0), **a.layer
    ),
    "MaskedAutoregressive of rank 3": lambda a: of_rank(
        3, transforms.MaskedAutoregressive(a.input_dim, univariate="spline", **a.layer)
    ),
    "Coupling spline": lambda a: transforms.Coupling(a.input_dim, mask=a.mask, univariate="spline", **a.network),
    "BatchNorm": lambda a: transforms.BatchNorm(a.input_dim),
    "ActNorm": lambda a: transforms.ActNorm(a.input_dim),
    "Tails": lambda a: transforms.Tails(a.input_dim),
    "Tails of units": lambda a: transforms.Tails(
        a.input_dim, loc=torch.linspace(-0.5, 0.5, a.input_dim), scale=torch.linspace(1, 2, a.input_dim)
    ),
    "Permute": lambda a: transforms.Permute(a.permutation),
    "Partial": lambda a: Partial(
        a.input_dim,
        transforms.MaskedAutoregressive((a.input_dim + 1) // 2, **a.network),
        a.permutation[: (a.input_dim + 1) // 2].tolist(),
    ),
    "LowRankHead": lambda a: LowRankHead(a.input_dim, min(a.input_dim, 3)),
    "LowerTriangularAffine": lambda a: transforms.LowerTriangularAffine(a.input_dim),
    "MAF": lambda a: MAF(a.input_dim, **a.stack),
    "MAF batch norm": lambda a: MAF(a.input_dim, batch_norm=True, **a.stack),
    "IAF": lambda a: IAF(a.input_dim, **a.stack),
    "RealNVP": lambda a: RealNVP(a.input_dim, **a.stack),
    "NSF": lambda a: NSF(a.input_dim, linear=True, **a.stack),
    "IAF spline": lambda a: IAF(a.input_dim, univariate="spline", **a.stack),
    "RealNVP spline": lambda a: RealNVP(a.input_dim, univariate="spline", **a.stack),
    "Stack": lambda a: transforms.Stack(  # at most four layers, like all others: float32 does not invert more to 1e-4
        [
            MAF(a.input_dim, **{**a.stack, "num_layers": (a.num_layers + 1) // 2}),
            transforms.Permute(a.permutation),
            IAF(a.input_dim, **{**a.stack, "num_layers": (a.num_layers + 1) // 2}).inv,
        ]
    ),
    "Stack with affine layers": lambda a: transforms.Stack(
        [
            transforms.ActNorm(a.input_dim),
            transforms.Permute(a.permutation),
            transforms.LowerTriangularAffine(a.input_dim),
            transforms.MaskedAutoregressive(a.input_dim, **a.layer),
            transforms.BatchNorm(a.input_dim).inv,
            Head(a.input_dim, **a.normal),
        ]
    ),
    "ConditionalMaskedAutoregressive": lambda a: transforms.ConditionalMaskedAutoregressive(
        a.input_dim, a.context_dim, **a.layer
    ),
    "ConditionalInverseAutoregressive": lambda a: transforms.ConditionalInverseAutoregressive(
        a.input_dim, a.context_dim, **a.layer
    ),
    "ConditionalInverseAutoregressive of rank 3": lambda a: of_rank(
        3, transforms.ConditionalInverseAutoregressive(a.input_dim, a.context_dim, univariate="spline", **a.layer)
    ),
    "ConditionalCoupling": lambda a: transforms.ConditionalCoupling(
        a.input_dim, a.context_dim, mask=a.mask, **a.network
    ),
    "ConditionalLowerTriangularAffine": lambda a: transforms.ConditionalLowerTriangularAffine(
        a.input_dim, a.context_dim, **a.network
    ),
    "ConditionalMAF": lambda a: ConditionalMAF(a.input_dim, a.context_dim, **a.stack),
    "ConditionalNSF": lambda a: ConditionalNSF(a.input_dim, a.context_dim, **a.stack),
    "ConditionalNSF linear": lambda a: ConditionalNSF(  # three layers
        a.input_dim, a.context_dim, linear=True, **{**a.stack, "num_layers": 1}
    ),
    "ConditionalIAF": lambda a: ConditionalIAF(a.input_dim, a.context_dim, **a.stack),
    "ConditionalRealNVP": lambda a: ConditionalRealNVP(a.input_dim, a.context_dim, networks="separate", **a.stack),
}


def build(name: str, a: Architecture, dtype: torch.dtype, device: str, gain: float = 1.0) -> Flow | ConditionalFlow:
    """The transform in eval mode with random parameters and statistics, like a trained one."""
    torch.manual_seed(a.seed)
    flow = shaken(REGISTRY[name](a).to(device=device, dtype=dtype).eval(), gain)
    with torch.no_grad():
        for member in flow.modules():
            if isinstance(member, Head):
                member.free.div_(a.input_dim**0.5)
    return flow
