"""Export of densities: `torch.jit.trace` and `torch.export` of a module that contains one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyro_maf.distributions import (
    ConditionalFlowPrior,
    ConditionalMADEMoG,
    Density,
    FlowPrior,
    MADEMoG,
    MAFMoG,
    density,
)
from pyro_maf.flows import IAF, MAF, ConditionalIAF, ConditionalMAF, ConditionalRealNVP, RealNVP

SMALL: dict[str, Any] = {"hidden_dims": [8]}
LAYER: dict[str, Any] = {"num_layers": 1, **SMALL}


class Scored(nn.Module):
    """Log-density of rows, given a context if the density has one."""

    def __init__(self, density: Any) -> None:
        super().__init__()
        self.density = density

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        density = self.density if context is None else self.density.condition(context)
        return density.log_prob(x)


DENSITIES: dict[str, Callable[[], Any]] = {
    "MAF": lambda: FlowPrior(MAF(2, **LAYER)),
    "IAF": lambda: FlowPrior(IAF(2, **LAYER)),
    "RealNVP": lambda: FlowPrior(RealNVP(2, **LAYER)),
    "batch norm": lambda: FlowPrior(MAF(2, batch_norm=True, **LAYER), support=["positive", "unit_interval"]),
    "MADEMoG": lambda: MADEMoG(2, **SMALL),
    "MAFMoG": lambda: MAFMoG(2, **LAYER),
    "ConditionalMAF": lambda: ConditionalFlowPrior(ConditionalMAF(2, 3, **LAYER)),
    "ConditionalIAF": lambda: ConditionalFlowPrior(ConditionalIAF(2, 3, **LAYER)),
    "ConditionalRealNVP": lambda: ConditionalFlowPrior(ConditionalRealNVP(2, 3, **LAYER)),
    "ConditionalMADEMoG": lambda: ConditionalMADEMoG(2, 3, **SMALL),
    "at one context": lambda: ConditionalFlowPrior(ConditionalMAF(2, 3, **LAYER)).condition(torch.ones(3)),
}
EXPORTED = ("MAF", "RealNVP", "IAF", "ConditionalMAF", "ConditionalRealNVP", "ConditionalIAF")
TRAINABLE = ("IAF", "MAF")


def trained(name: str) -> tuple[Scored, Callable[[int], tuple[Tensor, ...]]]:
    """A density with random weights, as if trained, and rows for it."""
    torch.manual_seed(0)
    density = DENSITIES[name]()
    with torch.no_grad():
        for parameter in density.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))

    def rows(count: int) -> tuple[Tensor, ...]:
        x = torch.rand(count, 2)
        return (x,) if isinstance(density, Density) else (x, torch.randn(count, 3))

    return Scored(density.eval()), rows


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("name", "frozen"), [*((name, True) for name in DENSITIES), *((name, False) for name in TRAINABLE)]
)
def test_a_module_that_holds_a_density_is_traced(name: str, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing reads every listed attribute, so these must not draw or raise."""
    scored, rows = trained(name)
    scored.requires_grad_(not frozen)
    monkeypatch.setattr(density, "DRAWS", None)  # so that sampling fails
    traced = torch.jit.trace(scored, rows(4))
    for count in (7, 300):
        torch.testing.assert_close(traced(*(given := rows(count))), scored(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "frozen"), [*((name, True) for name in EXPORTED), ("IAF", False)])
def test_scoring_is_exported_for_any_number_of_rows(name: str, frozen: bool) -> None:
    scored, rows = trained(name)
    scored.requires_grad_(not frozen)
    number = torch.export.Dim("number", min=2, max=100_000)
    example = rows(4)
    shapes = {name: {0: number} for name in ("x", "context")[: len(example)]}
    exported = torch.export.export(scored, example, dynamic_shapes=shapes, strict=False).module()
    for count in (2, 7, 1_000):  # the last of which reaches the networks' tails
        given = tuple(10 * part for part in rows(count))
        torch.testing.assert_close(exported(*given), scored(*given), rtol=1e-4, atol=1e-4)


def test_every_listed_attribute_of_a_density_can_be_read() -> None:
    density = FlowPrior(MAF(2, **LAYER))
    members = dict(inspect.getmembers(density))
    assert "support" in members
    assert not {"mean", "variance", "stddev", "mode"} & members.keys()
