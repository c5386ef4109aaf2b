"""The model that fit chooses: by rows and columns, and without overfitting of few rows."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch

from pyro_maf import NSF, FlowPrior, fit
from pyro_maf.distributions import MixtureFlow
from pyro_maf.training.choice import default_model
from pyro_maf.training.preparation import Recipe


def test_the_default_heeds_rows_and_columns() -> None:
    few, recipe = default_model(4, 100, seed=0)
    assert isinstance(few, MixtureFlow)
    assert recipe == Recipe(32, 0.03, relaxations=2, starts=True)
    flow, recipe = default_model(4, 100, seed=0, has_rsample=True)
    assert isinstance(flow, NSF)
    assert not recipe.starts
    assert [len(cast("NSF", default_model(4, rows, seed=0)[0])) for rows in (1000, 10_000)] == [3, 5]
    wide = cast("NSF", default_model(80, 10_000, seed=0)[0])
    assert (len(wide), wide[0].univariate.num_bins) == (3, 4)
    assert default_model(4, 10_000, seed=0)[1] == Recipe(256, 3e-4, relaxations=2)
    widths = [default_model(dim, 1000, seed=0)[0].architecture["hidden_dims"] for dim in (4, 20)]
    assert widths == [(128, 128), (160, 160)]


def test_a_table_of_few_rows_starts_as_a_mixture_of_its_training_rows() -> None:
    rows = torch.randn(120, 2, generator=torch.Generator().manual_seed(0)) / 4
    rows += torch.tensor([[-3.0, 1.0], [3.0, 2.0]]).repeat(60, 1)
    result = fit(rows, max_epochs=1, learning_rate=1e-9, progress=False)
    density = result.density
    assert isinstance(density, FlowPrior)
    assert isinstance(density.model, MixtureFlow)
    assert len(density.model.base.shares) == 2
    new = torch.randn(1000, 2, generator=torch.Generator().manual_seed(1)) / 4
    new += torch.tensor([[-3.0, 1.0], [3.0, 2.0]]).repeat(500, 1)
    truth = -math.log(2) - 2 * math.log(0.25) - math.log(2 * math.pi) - 1
    assert float(result.score(new).mean()) > truth - 0.1
    again = fit(rows, max_epochs=1, learning_rate=1e-9, progress=False)
    assert torch.equal(again.score(new), result.score(new))


def test_thirty_rows_of_a_normal_distribution_are_not_overfitted() -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.4, 0.0], [-0.5, 0.5, 0.7]])
    truth = torch.distributions.MultivariateNormal(torch.zeros(3), scale_tril=factor)
    new = torch.randn(2000, 3, generator=generator) @ factor.T
    behind = []
    for seed in range(4):
        rows = torch.randn(30, 3, generator=generator) @ factor.T
        behind.append(float((truth.log_prob(new) - fit(rows, seed=seed, progress=False).score(new)).mean()))
    assert sum(behind) / len(behind) < 0.5


def test_weight_decay_that_falls_is_ahead_of_one_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    angle = 20 * torch.rand(900, 1, generator=generator)
    rows = torch.cat([angle * angle.sin(), angle * angle.cos()], 1)  # a thin spiral
    rows += 0.1 * torch.randn(900, 2, generator=generator)
    falls = fit(rows[:600], validation=rows[600:750], max_epochs=150, progress=False).score(rows[750:])
    monkeypatch.setattr("pyro_maf.training.choice.RELAXATIONS", 0)
    stays = fit(rows[:600], validation=rows[600:750], max_epochs=150, progress=False).score(rows[750:])
    assert float((falls - stays).mean()) > 0.1


def test_noise_of_a_mixture_flow_is_standard_normal() -> None:
    torch.manual_seed(0)
    flow = MixtureFlow(2, num_layers=1, hidden_dims=[16])
    with torch.no_grad():
        for weight in flow.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    flow.base.start_at(torch.randn(600, 2) / 4 + torch.tensor([[-1.0, 1.0], [1.0, 1.0], [0.0, -1.0]]).repeat(200, 1))
    u = flow.noise(flow.sample([5000]))
    assert len(flow.base.shares) == 3
    assert (u.mean(0).abs() < 0.06).all()
    assert (torch.cov(u.T) - torch.eye(2)).abs().max() < 0.08


@pytest.mark.filterwarnings("ignore:fit")
def test_one_row_far_out_does_not_widen_the_mixture() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, new = torch.randn(200, 2, generator=generator), torch.randn(2000, 2, generator=generator)
    far = torch.cat([rows, torch.tensor([[1e6, 0.0]])])
    without, beside = (fit(each, max_epochs=1, learning_rate=1e-9, progress=False) for each in (rows, far))
    assert float((without.score(new) - beside.score(new)).mean()) < 0.2
