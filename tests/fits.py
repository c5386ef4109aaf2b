"""Helpers for tests of fitting: data with a known density, small models, and a layer with a hook in each step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyro_maf import MAF
from pyro_maf.training import FitResult, fit
from pyro_maf.transforms import MaskedAutoregressive

SMALL: dict[str, Any] = {"num_layers": 2, "hidden_dims": [16]}
QUICK: dict[str, Any] = {"batch_size": 50, "max_epochs": 3, "progress": False}
SHARED = "ignore:fit found .* validation rows among the training rows"
"""Warning filter for tests that validate on training rows."""
GAUSSIAN = MultivariateNormal(
    torch.tensor([3.0, -2.0], dtype=torch.float64),
    scale_tril=torch.tensor([[1.0, 0.0], [1.2, 0.5]], dtype=torch.float64),
)
"""A correlated normal with a total correlation of 0.96 nats, which a fit gains over a flow's independent start."""


def since_torch(minor: int) -> pytest.MarkDecorator:
    """Mark that skips a test of torch's compiler before torch 2.`minor`, which cannot trace the program as a whole."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    return pytest.mark.skipif(version < (2, minor), reason=f"torch before 2.{minor} does not trace it whole")


def gaussian_rows(rows: int = 300, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    return GAUSSIAN.loc + noise @ GAUSSIAN.scale_tril.T


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make()


def small_maf() -> Any:
    return seeded(lambda: MAF(2, num_layers=1, hidden_dims=[8]).double())


def weights(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def mean_log_prob(density: Any, rows: Tensor) -> float:
    with torch.no_grad():
        return density.log_prob(rows).mean().item()


def long_fit(folder: Path | str) -> FitResult:
    """A fit of several seconds that resumes; it uses one thread, so that results are equal in any process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = torch.randn(3000, 4, generator=torch.Generator().manual_seed(1)).cumsum(1)
        model = seeded(lambda: MAF(4, num_layers=2, hidden_dims=[16], batch_norm=True))
        return fit(model, rows, batch_size=20, max_epochs=6, folder=folder, resume=True, progress=False)
    finally:
        torch.set_num_threads(threads)


class Hooked(MaskedAutoregressive):
    """A layer that calls a function at each training step."""

    def __init__(self, at_step: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__(2, hidden_dims=[8])
        self.double()
        self.at_step = at_step
        self.steps = 0

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_det = super().inverse_and_log_det(y, context)
        if self.training:
            self.steps += 1
            log_det = self.at_step(self.steps, log_det)
        return x, log_det
