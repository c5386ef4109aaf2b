"""Trained flows in float32 invert far out, where rounding matters most."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor

from pyro_maf import IAF, MAF, RealNVP, fit
from pyro_maf.datasets import FigureOne, Pinwheel
from pyro_maf.transforms import Flow


def tumours() -> Tensor:
    """Ten strongly correlated columns, such as radius, perimeter and area."""
    return torch.from_numpy(load_breast_cancer().data[:, :10])


DATA = {"Figure 1": lambda: FigureOne().sample(4000), "Pinwheel": lambda: Pinwheel().sample(4000), "tumours": tumours}


def error(found: Tensor, wanted: Tensor) -> float:
    """Largest relative distance between corresponding rows."""
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1)).max())


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("family", [MAF, IAF, RealNVP])
def test_a_trained_flow_inverts_at_fifty_deviations(family: type[Flow], name: str) -> None:
    data = DATA[name]()
    epochs = 5 if family is IAF else 25
    result = fit(family(data.shape[1]), data, max_epochs=epochs, learning_rate=5e-3, progress=False)
    start = fit(family(data.shape[1]), data, max_epochs=1, learning_rate=1e-12, progress=False)
    assert result.validation_log_likelihood > start.validation_log_likelihood + 0.2
    flow = result.density.model.with_cache(0)
    for scale in (1, 10, 50):
        x = scale * torch.randn(2000, flow.input_dim)
        with torch.no_grad():
            assert error(flow.inv(flow(x)), x) < 1e-4
            assert error(flow(flow.inv(x)), x) < 1e-4
