"""The model that fit chooses by the numbers of rows and columns, which does not overfit few rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_maf import NSF, FlowPrior, fit, load
from pyro_maf.datasets import Dataset
from pyro_maf.distributions import MixtureFlow
from pyro_maf.distributions.gaussian_mixture import GaussianMixture
from pyro_maf.experiments import candidates, compare
from pyro_maf.tables.mixture import Mixture, fit_mixture
from pyro_maf.tables.moments import moments_of
from pyro_maf.tables.units import units_of
from pyro_maf.training.choice import DefaultFlow, default_model
from pyro_maf.training.preparation import Recipe


def test_the_default_depends_on_rows_and_columns() -> None:
    few, recipe = default_model(4, 100, seed=0)
    assert isinstance(few, MixtureFlow)
    assert recipe == Recipe(32, 0.03, relaxations=2, starts=True, joins=True)
    flow, recipe = default_model(4, 100, seed=0, default=DefaultFlow(has_rsample=True))
    assert isinstance(flow, NSF)
    assert not recipe.starts
    # One more for the linear layer.
    assert [len(cast("NSF", default_model(4, rows, seed=0)[0])) for rows in (1000, 10_000)] == [3 + 1, 5 + 1]
    wide, many, few = (
        cast("NSF", default_model(*each, seed=0)[0]) for each in ((80, 10_000), (30, 10_000), (30, 2000))
    )
    assert [(len(flow), flow[0].univariate.num_bins) for flow in (wide, many, few)] == [
        (3 + 1, 4),
        (5 + 1, 8),
        (3 + 1, 4),
    ]
    assert default_model(4, 10_000, seed=0)[1] == Recipe(78, 3e-4, relaxations=2, patience=16, joins=True)
    widths = [default_model(dim, 1000, seed=0)[0].architecture["hidden_dims"] for dim in (4, 20)]
    assert widths == [(128, 128), (160, 160)]


@pytest.mark.parametrize(
    ("rows", "context_dim", "activation"),
    [(1999, 0, "relu"), (2000, 0, "silu"), (4999, 2, "relu"), (5000, 2, "silu")],
)
def test_networks_of_many_rows_are_smooth(rows: int, context_dim: int, activation: str) -> None:
    model, _ = default_model(3, rows, context_dim, seed=0)
    assert model.architecture["activation"] == activation


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
    assert max(behind) < 0.35


def test_weight_decay_that_falls_is_ahead_of_one_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    angle = 20 * torch.rand(900, 1, generator=generator)
    rows = torch.cat([angle * angle.sin(), angle * angle.cos()], 1)  # a thin spiral
    rows += 0.1 * torch.randn(900, 2, generator=generator)
    options: dict[str, Any] = {"validation": rows[600:750], "max_epochs": 150, "progress": False}
    falls = fit(DefaultFlow(has_rsample=True), rows[:600], **options).score(rows[750:])
    monkeypatch.setattr("pyro_maf.training.choice.RELAXATIONS", 0)
    stays = fit(DefaultFlow(has_rsample=True), rows[:600], **options).score(rows[750:])
    assert float((falls - stays).mean()) > 0.1


def test_weight_decay_keeps_a_flow_of_many_columns_ahead_of_a_gaussian() -> None:
    """With this many columns and rows, a flow without weight decay is behind the Gaussian that it contains."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(40, 40, generator=generator) / 5 + torch.eye(40)
    rows = torch.randn(700, 40, generator=generator) @ factor.T
    data = Dataset("any", rows[:400], rows[400:500], rows[500:])
    with_decay, without = (
        compare(data, candidates(["MADE"]), weight_decay=decay, max_epochs=60, batch_size=50, progress=False)
        for decay in (0.05, None)
    )
    assert float((with_decay.scores[0].log_prob - without.scores[0].log_prob).mean()) > 0.5


def test_with_few_rows_a_flow_must_gain_over_the_mixture_significantly(tmp_path: Path) -> None:
    rows = torch.rand(200, 2, generator=torch.Generator().manual_seed(1)) ** 3  # with an edge that no Gaussians have
    whole = fit(rows, max_epochs=40, progress=False)
    fit(rows, max_epochs=20, folder=tmp_path, progress=False)
    resumed = fit(rows, max_epochs=40, folder=tmp_path, resume=True, progress=False)
    assert torch.equal(resumed.score(rows), whole.score(rows))
    assert whole.best_epoch
    assert whole.validation_log_likelihood == pytest.approx(-whole.validation_loss[whole.best_epoch - 1], abs=1e-5)
    few = fit(rows[:30], max_epochs=40, progress=False)  # three validation rows, which are uninformative
    assert (few.best_epoch, len(few.validation_rows.data)) == (0, 3)
    assert not few.warnings


@pytest.mark.filterwarnings("ignore:fit put a mixture beside")
def test_clusters_of_more_rows_than_a_flow_starts_with_have_their_mixture_beside() -> None:
    random: Any = np.random.default_rng(3)
    centres = np.array([[0.0, 0.0], [6.0, 1.0], [2.0, 7.0]])
    rows, new = (centres[random.integers(3, size=count)] + random.normal(size=(count, 2)) for count in (600, 5000))
    squares = np.square(new[:, None] - centres).sum(2)
    truth = np.log(np.exp(-squares / 2).sum(1) / (6 * np.pi)).mean()
    assert truth - float(fit(rows, progress=False).score(new).mean()) < 0.04  # 0.08 for the flow alone


@pytest.mark.filterwarnings("ignore:fit")
def test_a_table_of_near_copies_has_kernels_at_its_rows_beside_the_flow(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    places = 3 * torch.randn(150, 3, generator=generator).repeat(4, 1)
    rows = places + 0.02 * torch.randn(600, 3, generator=generator)
    order = torch.randperm(600, generator=generator)
    frame = pd.DataFrame(rows[order[:500]].numpy(), columns=["x", "y", "z"])
    new = pd.DataFrame(rows[order[500:]].numpy(), columns=["x", "y", "z"])
    whole = fit(frame, max_epochs=10, progress=False)
    alone = fit(DefaultFlow(has_rsample=True), frame, max_epochs=10, progress=False)
    assert "a mixture beside the flow" in whole.warnings[-1]
    assert float((whole.score(new) - alone.score(new)).mean()) > 3
    assert whole.validation_log_likelihood == pytest.approx(
        float(whole.score(whole.validation_rows.data).mean()), abs=1e-5
    )
    assert list(whole.sample(5).columns) == ["x", "y", "z"]
    whole.density.save(tmp_path / "copies.safetensors")
    again = load(tmp_path / "copies.safetensors")
    assert torch.equal(again.log_prob(new), whole.density.log_prob(new))


def test_an_ordinary_table_has_no_kernels() -> None:
    rows = torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    result = fit(rows, max_epochs=10, progress=False)
    assert isinstance(cast(FlowPrior, result.density).model, NSF)


def test_a_mixture_is_as_narrow_as_its_rows_and_has_as_many_components_as_they_ask_for() -> None:
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(1000, 1, generator=generator)
    rows = torch.cat([line, line + 0.01 * torch.randn(1000, 1, generator=generator)], 1)
    truth = -math.log(0.01) - math.log(2 * math.pi) - 1
    assert float(fit_mixture(rows[:500]).log_prob(rows[500:].double()).mean()) > truth - 0.1
    places = torch.arange(16.0).repeat_interleave(60)[:, None]
    apart = torch.cat([places, places % 4], 1) + 0.05 * torch.randn(960, 2, generator=generator)
    assert len(fit_mixture(apart / apart.std(0)).shares) == 16


def test_a_mixture_has_as_many_components_as_there_are_small_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(8, 8, generator=generator)
    rows = centres.repeat(130, 1) + 0.5 * torch.randn(1040, 8, generator=generator)
    alike, fitted = fit_mixture(torch.randn(240, 8, generator=generator)), fit_mixture(rows[:480])
    assert (len(alike.shares), len(fitted.shares)) == (1, 8)
    truth = -4 * math.log(2 * math.pi) - 8 * math.log(0.5) - 4 - math.log(8)
    assert float(fitted.log_prob(rows[480:].double()).mean()) > truth - 1


def test_a_density_of_numbers_alone_has_a_mixture_beside_the_flow() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).repeat(100, 1) + torch.randn(200, 2, generator=generator) / 4
    density = fit(rows, dequantise=False, max_epochs=5, progress=False).density
    assert isinstance(cast(FlowPrior, density).model, MixtureFlow)


def test_a_mixture_finds_unequal_clusters() -> None:
    generator = torch.Generator().manual_seed(1)
    means = 4 * torch.randn(5, 5, generator=generator, dtype=torch.float64)
    factors = torch.randn(5, 5, 5, generator=generator, dtype=torch.float64).tril() / 2
    factors.diagonal(dim1=1, dim2=2).abs_().clamp_(min=0.01)
    truth = Mixture(torch.tensor([0.1, 0.35, 0.2, 0.05, 0.3], dtype=torch.float64), means, factors)
    number = torch.multinomial(truth.shares, 4000, replacement=True, generator=generator)
    noise = torch.randn(4000, 5, 1, generator=generator, dtype=torch.float64)
    rows = means[number] + (factors[number] @ noise)[..., 0]
    scale, fitted = rows.std(0), fit_mixture(rows[:2000] / rows.std(0))
    assert len(fitted.shares) == 5
    found = fitted.log_prob(rows[2000:] / scale) - scale.log().sum()
    assert (truth.log_prob(rows[2000:]) - found).mean() < 0.06


def long_tailed_clusters(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of three clusters with Student's t distributions of three degrees of freedom, and their log-densities."""
    generator = torch.Generator().manual_seed(2)
    centres = 2 * torch.randn(3, 4, generator=generator, dtype=torch.float64)
    factors = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64).tril() / 2
    factors.diagonal(dim1=1, dim2=2).abs_().clamp_(min=0.2)
    number = torch.randint(3, (rows,), generator=generator)
    normal = torch.randn(rows, 4, 1, generator=generator, dtype=torch.float64)
    squared = torch.randn(rows, 3, generator=generator, dtype=torch.float64).square().sum(1)
    y = centres[number] + (factors[number] @ normal)[..., 0] / (squared / 3).sqrt()[:, None]
    distance = torch.linalg.solve_triangular(factors, (y[:, None] - centres).permute(1, 2, 0), upper=False)
    constant = math.lgamma(3.5) - math.lgamma(1.5) - 2 * math.log(3 * math.pi) - math.log(3)
    log_det = factors.diagonal(dim1=1, dim2=2).log().sum(1)
    return y, (constant - log_det[:, None] - 3.5 * (distance.square().sum(1) / 3).log1p()).logsumexp(0)


def test_clusters_with_long_tails_have_four_gaussians_each_and_keep_their_units() -> None:
    rows, log_density = long_tailed_clusters(4000)
    scale = rows.std(0)
    fitted = fit_mixture(rows[:1500] / scale)
    assert len(fitted.shares) == 12
    assert float((log_density[1500:] - fitted.log_prob(rows[1500:] / scale) + scale.log().sum()).mean()) < 0.08
    assert units_of(moments_of(rows[:1500]), rows[:1500]).tails is None


def bent_flow() -> MixtureFlow:
    """A flow with random weights, drawn after seeding the global generator."""
    torch.manual_seed(0)
    flow = MixtureFlow(2, num_layers=1, hidden_dims=[16])
    with torch.no_grad():
        for weight in flow.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    return flow


def test_a_mixture_beside_a_flow_is_a_density_of_its_draws() -> None:
    flow = bent_flow()
    means = torch.tensor([[3.0, 0.0], [0.0, -3.0]])
    beside = Mixture(torch.tensor([0.3, 0.7]), means, 0.5 * torch.eye(2).expand(2, 2, 2))
    density = flow.put_beside(beside, 0.4)
    line = torch.linspace(-9, 9, 241)
    grid = torch.cartesian_prod(line, line)
    probability = density.log_density(grid).exp()
    assert float(probability.sum().detach()) * 0.075**2 == pytest.approx(1, abs=5e-3)
    draws = density.sample([20_000])
    mean = (probability[:, None] * grid).sum(0).detach() * 0.075**2
    assert torch.allclose(draws.mean(0), mean, atol=0.05)
    noise = density.noise(draws)
    assert noise.mean(0).abs().max() < 0.04
    assert (torch.cov(noise.T) - torch.eye(2)).abs().max() < 0.05
    assert torch.equal(noise, density.noise(draws))
    with pytest.raises(ValueError, match="MixtureFlow expected no context"):
        MixtureFlow(2, context_dim=1, num_beside=3)


def test_noise_of_a_mixture_flow_is_standard_normal() -> None:
    flow = bent_flow()
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


def test_the_mixture_of_few_rows_sees_their_context() -> None:
    """The components regress on the context."""
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(200, 2, generator=generator)
    slopes = torch.tensor([[1.0, -0.5], [0.3, 2.0]])
    rows = context @ slopes + 0.3 * torch.randn(200, 2, generator=generator)
    result = fit(rows, context=context, max_epochs=1, progress=False)
    new = torch.randn(2000, 2, generator=generator)
    truth = -2 * (math.log(0.3) + 0.5 * math.log(2 * math.pi * math.e))
    at_new = new @ slopes + 0.3 * torch.randn(2000, 2, generator=generator)
    assert result.score(at_new, new).mean() > truth - 0.4  # one epoch, in which a flow alone learns little
    with_text = pd.DataFrame({"x": rows[:, 0].numpy(), "y": rows[:, 1].numpy(), "kind": ["a", "b"] * 100})
    kind = (torch.arange(200) % 2)[:, None] * 5.0
    with_text["x"] += kind[:, 0].numpy()
    table = fit(with_text, max_epochs=2, progress=False)
    model = table.density.unwrapped.prior.model  # type: ignore[union-attr]
    assert isinstance(model, MixtureFlow)
    assert model.base.means.shape[1] == 4


def test_a_mixture_given_a_context_is_a_density_of_its_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(600, 1, generator=generator)
    side = torch.where(torch.rand(600, 1, generator=generator) < 0.3, -2.0, 1.0)
    rows = torch.cat([side * context, context + 0.4 * torch.randn(600, 1, generator=generator)], 1)
    mixture = GaussianMixture(2, context_dim=1).double()
    mixture.start_at(rows + 0.2 * torch.randn(600, 2, generator=generator), None, context)
    assert len(mixture.shares) > 1
    at = torch.tensor([1.5], dtype=torch.float64)
    line = torch.linspace(-8, 8, 161, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    assert float(mixture.log_density(grid, at).exp().sum()) * 0.01 == pytest.approx(1, abs=1e-3)
    torch.manual_seed(0)
    draws = mixture.draw(torch.Size([4000]), at)
    density = mixture.log_density(grid, at).exp()
    assert torch.allclose(draws.mean(0), (density[:, None] * grid).sum(0) * 0.01, atol=0.1)
    noise = mixture.noise(draws, at.expand(4000, 1))
    assert noise.mean(0).abs().max() < 0.06
    assert (noise.std(0) - 1).abs().max() < 0.05
    far = mixture.float().log_density(torch.zeros(1, 2), torch.tensor([[1e4]]))
    assert far.isfinite().all()
    without = GaussianMixture(2, context_dim=3)
    without.start_at(rows)
    torch.testing.assert_close(without.log_density(rows, torch.zeros(3)), without.log_density(rows, torch.ones(600, 3)))
