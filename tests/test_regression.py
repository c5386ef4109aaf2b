"""Rows as a triangular linear map of residuals, and fits that start from that regression."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyro_maf import MAF, ConditionalNSF, fit
from pyro_maf.tables.regression import triangular_regression
from pyro_maf.transforms import LowerTriangularAffine


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cholesky(rows: Tensor) -> Tensor:
    return torch.linalg.cholesky(rows.T.cov())


def sharp(count: int, seed: int = 0) -> Tensor:
    """Three columns, each nearly linear in those before it."""
    x = noise(count, 3, seed=seed)
    return torch.stack([x[:, 0], x[:, 0] + x[:, 1] / 10, x[:, 0] - x[:, 1] + x[:, 2] / 20], 1)


def of_columns(model: torch.nn.Module) -> LowerTriangularAffine:
    return next(layer for layer in model.modules() if isinstance(layer, LowerTriangularAffine))


@given(st.integers(2, 6), st.integers(0, 10**6))
def test_for_correlated_normal_columns_it_is_the_covariance_factor(dim: int, seed: int) -> None:
    mixing = torch.eye(dim, dtype=torch.float64) / 2 + torch.ones(dim, dim, dtype=torch.float64).tril()
    rows = noise(500, dim, seed=seed) @ mixing.T / dim
    rows = (rows - rows.mean(0)) / rows.std(0)
    loc, factor, _ = triangular_regression(rows + 1)
    unexplained = factor.diagonal() / cholesky(rows).diagonal()  # scales are those of new rows, larger than in-sample
    assert unexplained.min() > 1 - 1e-3
    assert unexplained.max() < 1 + (dim + 2) / 500
    torch.testing.assert_close(factor / unexplained, cholesky(rows), rtol=1e-3, atol=1e-3)
    residuals = torch.linalg.solve_triangular(factor, (rows + 1 - loc).T, upper=False)
    torch.testing.assert_close(residuals.mean(1), torch.eye(dim).double()[0], rtol=1e-3, atol=1e-3)


def test_independent_columns_stay_as_they_are() -> None:
    loc, factor, _ = triangular_regression(1 + noise(400, 4) * torch.tensor([0.5, 1.0, 2.0, 1.0]))
    assert torch.equal(loc, torch.zeros_like(loc))
    assert torch.equal(factor, torch.eye(4).double())


def test_a_column_of_few_values_is_not_smeared() -> None:
    rows = sharp(1000)
    rows[:, 1] = rows[:, 1].round()
    _, factor, _ = triangular_regression(rows)
    assert factor[1].tolist() == [0.0, 1.0, 0.0]
    assert abs(factor[2, 0]) > 0.1


def test_columns_that_follow_from_others_leave_a_scale() -> None:
    rows = sharp(300)[:, [0, 1, 1, 2]]
    loc, factor, _ = triangular_regression(rows)
    residuals = torch.linalg.solve_triangular(factor, (rows - loc).T, upper=False)
    assert residuals.isfinite().all()
    assert factor.diagonal().min() >= 1e-3
    assert factor.abs().max() < 10


def test_more_columns_than_rows_are_left_alone() -> None:
    _, factor, _ = triangular_regression(noise(20, 40))
    assert factor.isfinite().all()
    assert factor.tril(-1).abs().max() == 0


def test_a_fit_starts_as_the_normal_distribution_of_its_columns() -> None:
    model = MAF(3, num_layers=2, hidden_dims=[8], linear=True)
    result = fit(model, sharp(2000), learning_rate=1e-12, max_epochs=1, progress=False)
    new = sharp(2000, seed=1)
    entropy = 1.5 * (1 + math.log(2 * math.pi)) - math.log(200)
    assert float(result.score(new).mean()) == pytest.approx(-entropy, abs=0.05)


def test_a_trained_linear_layer_is_not_reinitialised() -> None:
    model = MAF(3, num_layers=1, hidden_dims=[8], linear=True)
    factor = torch.eye(3) + torch.ones(3, 3).tril(-1) / 4
    model.become_linear(torch.zeros(3), factor, torch.zeros(3, 0))
    fit(model, sharp(200), learning_rate=1e-12, max_epochs=1, progress=False)
    torch.testing.assert_close(of_columns(model).below.detach(), torch.full((3,), 0.25))


def test_rows_count_as_often_as_their_weights_say() -> None:
    rows = torch.cat([sharp(200), noise(200, 3)])  # the latter, independent, get weight 0
    model = MAF(3, num_layers=1, hidden_dims=[8], linear=True)
    weights = (torch.arange(400) < 200).double()
    fit(model, rows, weights=weights, learning_rate=1e-12, max_epochs=1, progress=False)
    assert of_columns(model).log_diagonal.tolist() == pytest.approx(
        [0.0, math.log(0.1), math.log(0.05 / 2**0.5)], abs=0.15
    )


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_given_a_context_it_is_the_regression_on_it(dim: int, context_dim: int, seed: int) -> None:
    context, slopes = noise(500, context_dim, seed=seed), 1 + noise(dim, context_dim, seed=seed + 1).abs()
    mixing = torch.eye(dim, dtype=torch.float64) + torch.ones(dim, dim, dtype=torch.float64).tril(-1)
    rows = 2 + context @ slopes.T + noise(500, dim, seed=seed + 2) @ mixing.T / 10
    loc, factor, found = triangular_regression(rows, context)
    torch.testing.assert_close(loc, torch.full((dim,), 2.0).double(), rtol=0, atol=0.1)
    torch.testing.assert_close(found, slopes, rtol=0, atol=0.1)
    torch.testing.assert_close(factor, mixing / 10, rtol=0, atol=0.1)


def test_an_uninformative_context_is_left_out() -> None:
    _, factor, slopes = triangular_regression(noise(400, 2), noise(400, 3, seed=1))
    assert torch.equal(slopes, torch.zeros(2, 3).double())
    assert torch.equal(factor, torch.eye(2).double())


def test_with_nearly_as_many_features_as_rows_the_scale_is_that_of_new_rows() -> None:
    context, new, slopes = noise(400, 300), noise(400, 300, seed=1), torch.zeros(300, 1).double()
    slopes[:10] = 1.0
    loc, factor, found = triangular_regression(context @ slopes + noise(400, 1, seed=2) / 3, context)
    residuals = (new @ slopes + noise(400, 1, seed=3) / 3 - loc - new @ found.T) / factor[0, 0]
    assert 0.8 < float(residuals.std()) < 1.25


@pytest.mark.parametrize("rows", [100, 500])  # starts as a mixture, or with a linear layer
@pytest.mark.parametrize("features", [2, 20])
def test_a_column_that_is_linear_in_its_context_is_fitted_at_once(rows: int, features: int) -> None:
    context, new = noise(rows, features), noise(2000, features, seed=1)
    slopes = torch.linspace(-1, 1, features).double()[:, None]
    result = fit(context @ slopes + noise(rows, 1, seed=2) / 5, context=context, max_epochs=1, progress=False)
    entropy = 0.5 * (1 + math.log(2 * math.pi)) - math.log(5)
    score = float(result.score(new @ slopes + noise(2000, 1, seed=3) / 5, new).mean())
    assert score > -entropy - 0.02 - 1.5 * features / rows


def test_a_fit_with_a_context_and_angles_starts_there_too() -> None:
    rows = torch.cat([noise(200, 1) % 6.28 - 3.14, sharp(200)[:, :2]], 1)
    result = fit(rows, context=noise(200, 1, seed=1), support=["angle", "real", "real"], max_epochs=1, progress=False)
    assert result.score(rows, noise(200, 1, seed=1)).isfinite().all()
    conditional = ConditionalNSF(3, 1, num_layers=1, hidden_dims=[8], linear=True)
    fit(conditional, sharp(200), context=noise(200, 1), learning_rate=1e-12, max_epochs=1, progress=False)
    assert float(of_columns(conditional).log_diagonal.detach()[1]) < -1.5
