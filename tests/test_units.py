"""Units of columns in a fit: those of the bulk, in float64 if float32 cannot represent the values."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_maf
from pyro_maf import IAF, MAF, ConditionalFlowPrior, ConditionalMAF, FlowPrior, MADEMoG, RealNVP, fit, fit_prior
from pyro_maf.distributions.data_units import float32_holds
from pyro_maf.support import Support
from pyro_maf.tables import disk
from pyro_maf.tables.moments import context_moments_of, moments_of
from pyro_maf.tables.units import units_of
from tests.fits import mean_log_prob, same, seeded, weights

OFFSET, SCALE = 5.4e6, 0.1
TRUTH = -(1 + math.log(2 * math.pi)) - math.log(SCALE)
QUICK: dict[str, Any] = {"batch_size": 100, "max_epochs": 3, "progress": False}


def normal(rows: int = 500, columns: int = 2, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((rows, columns))


def northings(rows: int = 500, seed: int = 0) -> np.ndarray[Any, Any]:
    """Rows of 5.4e6 +- 0.1, which float32 resolves to a few values, and of 0 +- 1."""
    return normal(rows, seed=seed) * [SCALE, 1] + [OFFSET, 0]


def model(family: Any = MAF, dim: int = 2, context_dim: int = 0) -> Any:
    shape: dict[str, Any] = {"num_layers": 1, "hidden_dims": [8]}
    return seeded(lambda: family(dim, context_dim, **shape) if context_dim else family(dim, **shape))


# -- a bulk and what lies beyond it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("far", [1e6, -1e30, 40.0])
def test_ordinary_columns_have_mean_and_deviation_and_an_outlier_hardly_moves_them(far: float) -> None:
    rows = torch.from_numpy(3 + 2 * normal(1000))
    loc, scale = moments_of(rows)
    assert torch.allclose(loc, rows.mean(0), rtol=1e-12)
    assert torch.allclose(scale, rows.std(0, correction=0), rtol=1e-12)
    rows[7, 0] = far
    moved = moments_of(rows)
    assert torch.allclose(moved.loc, loc, atol=0.05)
    assert torch.allclose(moved.scale, scale, rtol=0.1)


@pytest.mark.parametrize(
    ("column", "scale"),
    [
        ((np.arange(1000) % 2).astype(float), 0.5),
        ((np.arange(1000) % 20 == 0).astype(float), math.sqrt(0.05 * 0.95)),
        (np.where(np.arange(1000) % 10 < 7, 0.0, 5 + normal(1000)[:, 0]), 2.4),
        (np.where(np.arange(1000) % 50 == 0, np.where(np.arange(1000) == 0, 1e9, 2 + normal(1000)[:, 0]), 0.0), 0.7),
        (np.where(np.arange(1000) % 10 < 6, 1e-9, 1.0) * normal(1000)[:, 0], math.sqrt(0.4)),
        (np.where(np.arange(1000) % 20 == 0, -9999.0, normal(1000)[:, 0]), 2.4),
        (np.full(1000, 4.0), 1.0),
    ],
    ids=["two values", "rare value", "many zeros", "nearly all zeros", "narrow and wide", "a code for missing", "one"],
)
def test_a_scale_is_that_of_the_bulk_whatever_the_quartiles(column: Any, scale: float) -> None:
    assert moments_of(torch.from_numpy(column)[:, None]).scale.item() == pytest.approx(scale, rel=0.25)


def test_a_context_has_a_fence_against_outliers_and_none_against_a_tail() -> None:
    rows = torch.from_numpy(normal(1000, 1))
    rows[0] = 1e6
    assert context_moments_of(rows).scale.item() == pytest.approx(1.0, rel=0.1)
    tail = torch.from_numpy(np.exp(3 * normal(1000, 1)))
    assert context_moments_of(tail).scale.item() == pytest.approx(tail.std(correction=0).item())
    assert moments_of(tail).scale.item() < tail.std().item() / 2


@pytest.mark.parametrize("seed", range(3))
def test_an_outlier_costs_the_other_rows_nothing(seed: int) -> None:
    rows = normal(300, seed=seed)
    rows[5, 0] = 1e6
    with pytest.warns(UserWarning, match="heavy tails in column 0"):
        result = fit(model(), rows, **{**QUICK, "max_epochs": 10})
    fresh = torch.from_numpy(normal(4000, seed=9)).float()
    assert mean_log_prob(result.density, fresh) == pytest.approx(-1 - math.log(2 * math.pi), abs=0.1)


def test_an_outlier_among_the_validation_rows_does_not_choose_the_epoch() -> None:
    rows = normal(600)
    rows[:, 1] = np.sin(2 * rows[:, 0]) + 0.3 * rows[:, 1]
    options = {**QUICK, "max_epochs": 15, "learning_rate": 2e-2}
    plain = fit(model(), rows, **options)
    moved = rows.copy()
    outlier = np.abs(rows - plain.validation_rows.data[0].numpy()).sum(1).argmin()
    moved[outlier, 0] = 1e6
    with pytest.warns(UserWarning, match="heavy tails in column 0|left 1 of the validation rows out"):
        result = fit(model(), moved, **options)
    assert f"the first of them row {outlier}:" in " ".join(result.warnings)
    assert len(result.validation_rows.data) == len(plain.validation_rows.data) - 1
    assert result.best_epoch > 5
    assert result.validation_log_likelihood == pytest.approx(plain.validation_log_likelihood, abs=0.2)


def test_an_outlier_of_a_context_does_not_suppress_other_features() -> None:
    context = normal(600, 1)
    rows = context + 0.3 * normal(600, 1, seed=1)
    context[3] = 1e6
    with pytest.warns(UserWarning, match="context column 0"):
        result = fit(
            model(ConditionalMAF, 1, 1), rows, context=context, learning_rate=2e-2, **{**QUICK, "max_epochs": 25}
        )
    fresh = torch.from_numpy(normal(1000, 1, seed=2)).float()
    at = result.density.condition(fresh)
    assert mean_log_prob(at, fresh) > -1.0  # -1.5 without a context


# -- tails -------------------------------------------------------------------------------------------------------------


def test_columns_have_weights_of_tails_where_they_are_heavy() -> None:
    random = np.random.default_rng(0)
    columns = [
        random.standard_normal(1000),
        random.random(1000),
        random.choice([-2.0, 2.0], 1000) + random.standard_normal(1000) / 2,
        random.standard_t(2, 1000),
        random.lognormal(0, 1, 1000),
    ]
    rows = 7 + 3 * torch.from_numpy(np.stack(columns, 1))
    units = units_of(moments_of(rows), rows)
    assert units.tails is not None
    assert not units.tails[:, :3].any()
    torch.testing.assert_close(units.loc[:3], moments_of(rows).loc[:3])
    assert ((units.tails[:, 3] - 0.5).abs() < 0.15).all()
    assert units.tails[0, 4] > 0.3
    assert units.tails[1, 4] < 0.1
    assert units_of(moments_of(rows[:, :3]), rows[:, :3]).tails is None


def test_a_weight_is_that_of_copies_and_one_row_has_no_influence() -> None:
    random = np.random.default_rng(1)
    rows, often = torch.from_numpy(random.standard_t(2, (2000, 1))), torch.from_numpy(random.integers(0, 4, 2000))
    copies = rows.repeat_interleave(often, 0)
    weighted = units_of(moments_of(rows, weights=often.double()), rows, often.double()).tails
    torch.testing.assert_close(weighted, units_of(moments_of(copies), copies).tails, atol=0.05, rtol=0)
    ordinary = torch.from_numpy(normal(2000, 1))
    ordinary[3] = 1e6
    assert units_of(moments_of(ordinary), ordinary).tails is None


def test_clusters_beyond_others_are_no_tail() -> None:
    random = np.random.default_rng(6)
    centres, factors = 4 * random.standard_normal((5, 5)), random.standard_normal((5, 5, 5)) / 2
    number = random.choice(5, 3200, p=random.dirichlet(np.full(5, 2.0)))
    noise = np.einsum("nij,nj->ni", factors[number], random.standard_normal((3200, 5)))
    rows = torch.from_numpy(centres[number] + noise)
    assert units_of(moments_of(rows), rows).tails is None
    tailed = torch.cat([rows, torch.from_numpy(random.standard_t(2, (3200, 1)))], 1)
    tails = units_of(moments_of(tailed), tailed).tails
    assert tails is not None
    assert tails.any(0).nonzero()[:, 0].tolist() == [5]


def test_columns_of_few_skewed_factors_keep_their_units() -> None:
    random = np.random.default_rng(1)
    factors = random.standard_gamma(2, (1000, 4)) @ random.standard_normal((4, 30))
    rows = torch.from_numpy(factors + 0.3 * random.standard_normal((1000, 30)))
    units = units_of(moments_of(rows), rows)
    assert units.tails is None or units.tails.any(0).sum() < 3
    together = random.standard_normal((2000, 20)) / np.sqrt(random.chisquare(2, (2000, 1)) / 2)
    tails = units_of(moments_of(torch.from_numpy(together)), torch.from_numpy(together)).tails
    assert tails is not None
    assert tails.any(0).all()


def test_a_row_that_outweighs_its_side_has_no_tail() -> None:
    rows = torch.from_numpy(normal(200, 1))
    weights = torch.ones(200, dtype=torch.float64)
    weights[rows[:, 0].argmax()] = 90.0
    assert units_of(moments_of(rows, weights=weights), rows, weights).tails is None


def test_columns_that_are_linear_and_long_tailed_together_keep_their_units() -> None:
    """Like neighbouring pixels, whose linear relation tail weights would destroy."""
    generator = torch.Generator().manual_seed(0)
    smooth = torch.linspace(0, 6, 48)
    mixing = (-(smooth[:, None] - smooth).abs()).exp()
    contrast = (1.5 * torch.randn(3_000, 1, generator=generator)).exp()
    rows = (contrast * (torch.randn(3_000, 48, generator=generator) @ torch.linalg.cholesky(mixing).T)).double()
    assert units_of(moments_of(rows[:, ::47]), rows[:, ::47]).tails is not None
    assert units_of(moments_of(rows), rows).tails is None
    ratio = torch.randn(3_000, 1, generator=generator) / torch.randn(3_000, 1, generator=generator)
    mixed = torch.cat([rows, ratio.double()], 1)
    tails = units_of(moments_of(mixed), mixed).tails
    assert tails is not None
    assert tails.any(0).nonzero()[:, 0].tolist() == [48]


@pytest.mark.parametrize("rows", [300, 4000])
def test_a_heavy_tailed_column_is_fitted_as_well_as_any(rows: int) -> None:
    random = np.random.default_rng(0)
    result = fit(random.standard_t(2, (rows, 1)), progress=False)
    assert not result.warnings
    fresh = torch.from_numpy(random.standard_t(2, (20_000, 1))).float()
    truth = torch.distributions.StudentT(2.0).log_prob(fresh[:, 0]).mean().item()
    assert truth - mean_log_prob(result.density, fresh) < 0.05


@pytest.mark.parametrize("loc", [0.0, OFFSET])
@pytest.mark.parametrize("support", ["real", ["positive", "real"]])
def test_a_prior_with_tails_is_exact_saved_and_differentiable(loc: float, support: Any, tmp_path: Path) -> None:
    tails = torch.tensor([[0.5, 1.0], [0.0, 0.3]])
    where, scale = torch.tensor([0.5, loc], dtype=torch.float64), torch.tensor([2.0, SCALE], dtype=torch.float64)
    prior = FlowPrior(model(), support=support, loc=where, scale=scale, tails=tails)
    u = torch.tensor([[-3.0, -5.0], [0.0, 0.1], [2.5, 5.0]])
    y = prior.noise_to_data(u)
    z, log_det = prior.units.inverse_and_log_det(y)
    torch.testing.assert_close(z, prior.noise_to_data[0](u), atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(log_det, prior.units.forward_and_log_det(z)[1], atol=1e-2, rtol=1e-3)
    prior.save(tmp_path / "prior.safetensors")
    for other in (pyro_maf.load(tmp_path / "prior.safetensors"), pickle.loads(pickle.dumps(prior))):
        assert torch.equal(other.tails, tails)
        assert torch.equal(other.log_prob(y), prior.log_prob(y))
    slope = torch.autograd.grad(prior.log_prob(y.detach().requires_grad_()).sum(), list(prior.model.parameters()))
    assert all(each.isfinite().all() for each in slope)
    plain = FlowPrior(model(), support=support, loc=where, scale=scale)
    plain.load_state_dict(prior.state_dict())
    assert torch.equal(plain.log_prob(y), prior.log_prob(y))


@pytest.mark.parametrize("tails", [torch.zeros(2), torch.zeros(3, 2), torch.full((2, 2), torch.nan)])
def test_weights_of_tails_are_two_for_each_column(tails: Any) -> None:
    with pytest.raises(ValueError, match=r"FlowPrior expected tails to be finite numbers \(2, 2\)"):
        FlowPrior(model(), tails=tails)


# -- columns that float32 does not hold --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loc", "scale", "support", "holds"),
    [
        (0.0, 1.0, "real", True),
        (2000.0, 10.0, "real", True),
        (OFFSET, SCALE, "real", False),
        (1.7e9, 3600.0, "real", False),
        (1e-42, 1e-43, "real", False),
        (1e38, 1e37, "real", False),
        (0.0, 1.0, "positive", True),
        (0.0, 1e-6, "positive", False),
        (200.0, 1.0, "positive", False),
        (0.0, 1.0, "unit_interval", True),
        (20.0, 1.0, "unit_interval", False),
        (-20.0, 1.0, "unit_interval", True),
        (0.0, 1e-6, "simplex", False),
        (0.0, 1.0, "simplex", True),
    ],
)
def test_what_float32_holds(loc: float, scale: float, support: str, holds: bool) -> None:
    size = 2 if support == "simplex" else 1
    units = (torch.full((size,), value, dtype=torch.float64) for value in (loc, scale))
    assert bool(float32_holds(*units, Support("fit", support, size)).all()) == holds


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", [MAF, IAF, RealNVP, lambda dim, **_: MADEMoG(dim, hidden_dims=[8])])
def test_a_model_of_float32_is_fitted_to_any_offset(family: Any, seed: int) -> None:
    rows = northings(seed=seed)
    near, far = (fit(model(family), each, **QUICK) for each in (rows - [OFFSET, 0], rows))
    assert far.density.dtype == torch.float64
    assert next(far.density.parameters()).dtype == torch.float32
    assert far.validation_log_likelihood == pytest.approx(near.validation_log_likelihood, abs=1e-3)
    assert far.validation_log_likelihood == pytest.approx(TRUTH, abs=0.4)
    torch.manual_seed(seed)
    drawn = far.density.sample((3000,))
    assert drawn.dtype == torch.float64
    assert drawn[:, 0].std().item() == pytest.approx(SCALE, rel=0.1)
    assert len(drawn[:, 0].unique()) > 2900
    score = mean_log_prob(far.density, torch.from_numpy(rows))
    assert score == pytest.approx(mean_log_prob(near.density, torch.from_numpy(rows - [OFFSET, 0]).float()), abs=1e-3)


@pytest.mark.parametrize(
    ("offset", "scale"),
    [(1e9, 1.0), (1.7e9, 20.0), (-9.19e9, 0.5), (1e-41, 1e-42), (1e39, 1e38), (0.0, 1e-200), (1e200, 1e199)],
)
def test_offsets_and_sizes_of_any_kind(offset: float, scale: float) -> None:
    result = fit(model(), offset + scale * normal(), **QUICK)
    expected = -1 - math.log(2 * math.pi) - 2 * math.log(scale)
    assert result.validation_log_likelihood == pytest.approx(expected, abs=0.4)
    assert (result.density.sample((2000,)) / scale).std(0).tolist() == pytest.approx([1.0, 1.0], rel=0.1)


@pytest.mark.parametrize("support", ["positive", "unit_interval", "simplex"])
def test_values_are_mapped_from_their_support_before_they_are_rounded(support: str) -> None:
    z = torch.from_numpy(normal(500, 2))
    rows = {
        "positive": (15.0 + 1e-7 * z).exp(),
        "unit_interval": 1 - (-18.0 + z).sigmoid(),
        "simplex": torch.cat([(1e-7 * z).exp(), torch.ones(500, 1)], 1).double(),
    }[support]
    rows = rows / rows.sum(1, keepdim=True) if support == "simplex" else rows
    single, double = (fit(each, rows, support=support, **QUICK) for each in (model(), model().double()))
    assert single.validation_log_likelihood == pytest.approx(double.validation_log_likelihood, abs=1e-2)


def test_a_few_values_at_the_edge_of_a_support_stay_inside() -> None:
    rows = torch.from_numpy(normal(500)).sigmoid()
    rows[7, 1] = 1 - 1e-9
    result = fit(model(), rows, support="unit_interval", **QUICK)
    assert result.density.log_prob(rows).isfinite().all()


def test_draws_of_tiny_positive_values_differ() -> None:
    rows = 1e-40 * np.exp(normal(500))
    result = fit(model(), rows, support="positive", **QUICK)
    drawn = result.density.sample((2000,)).double().log() - math.log(1e-40)
    assert drawn.std(0).tolist() == pytest.approx([1.0, 1.0], rel=0.1)
    assert mean_log_prob(result.density, torch.from_numpy(rows)) == pytest.approx(2 * 40 * math.log(10) - 2.84, abs=0.4)


def test_a_context_of_time_stamps_is_told_apart() -> None:
    seconds = 1.7e9 + 10 * normal(500, 1)
    rows = (seconds - 1.7e9) / 10 + 0.3 * normal(500, 1, seed=1)
    given = [seconds, seconds - 1.7e9]
    far, near = (fit(model(ConditionalMAF, 1, 1), rows, context=each, **QUICK) for each in given)
    assert (far.density.dtype, far.density.context_dtype) == (torch.float32, torch.float64)
    assert far.validation_log_likelihood == pytest.approx(near.validation_log_likelihood, abs=1e-3)
    at = far.density.condition(torch.from_numpy(seconds))
    assert at.sample().dtype == torch.float32
    expected = mean_log_prob(near.density.condition(torch.from_numpy(given[1]).float()), torch.from_numpy(rows).float())
    assert mean_log_prob(at, torch.from_numpy(rows).float()) == pytest.approx(expected, abs=1e-3)


def wide(family: Any = MAF) -> FlowPrior:
    units = {"loc": torch.tensor([OFFSET, 0.0]).double(), "scale": torch.tensor([SCALE, 1.0]).double()}
    return FlowPrior(model(family), **units)


@pytest.mark.parametrize(
    "change",
    [
        lambda units: None,
        lambda units: units.loc.add_(0.5),
        lambda units: units.scale.mul_(2.0),
        lambda units: units.register_buffer("loc", torch.tensor([1.0, 0.0])),
        lambda units: units.register_buffer("scale", torch.tensor([1.0, 3.0])),
    ],
)
def test_units_that_change_nothing_are_left_out_until_they_are_changed(change: Any) -> None:
    prior, y = FlowPrior(MAF(2, num_layers=1, hidden_dims=[8])), torch.randn(5, 2)
    assert torch.equal(prior.log_prob(y), FlowPrior(prior.model).log_prob(y))
    change(prior.units)
    expected = FlowPrior(prior.model, loc=prior.loc, scale=prior.scale).log_prob(y)
    torch.testing.assert_close(prior.log_prob(y), expected)
    prior.loc.requires_grad_()
    (gradient,) = torch.autograd.grad(prior.log_prob(y).sum(), prior.loc)
    assert gradient.abs().sum() > 0


def test_a_density_of_float64_values_keeps_them_wherever_it_goes(tmp_path: Path) -> None:
    prior, rows = wide(), torch.from_numpy(northings(7))
    expected = prior.log_prob(rows)
    prior.save(tmp_path / "prior.safetensors")
    copies = [
        pyro_maf.load(tmp_path / "prior.safetensors"),
        copy.deepcopy(prior),
        pickle.loads(pickle.dumps(prior)),
        copy.deepcopy(prior).float(),
        copy.deepcopy(prior).to(torch.float32),
    ]
    for each in copies:
        assert (each.dtype, each.units.inner.dtype) == (torch.float64, torch.float32)
        assert torch.equal(each.log_prob(rows), expected)
    assert torch.allclose(copy.deepcopy(prior).double().log_prob(rows), expected, atol=1e-4)
    assert copy.deepcopy(prior).double().float().dtype == torch.float64


def test_units_of_float64_are_loaded_into_a_prior_of_float32() -> None:
    prior, rows = wide(), torch.from_numpy(northings(7))
    other = FlowPrior(model())
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other.log_prob(rows), prior.log_prob(rows))
    units = {"context_loc": torch.tensor([1.7e9]).double(), "context_scale": torch.tensor([10.0]).double()}
    given, empty = (ConditionalFlowPrior(model(ConditionalMAF, 2, 1), **each) for each in (units, {}))
    empty.load_state_dict(given.state_dict())
    assert (empty.dtype, empty.context_dtype) == (torch.float32, torch.float64)
    narrow = FlowPrior(model())
    narrow.load_state_dict(FlowPrior(model().double()).state_dict())
    assert narrow.dtype == torch.float32


def test_units_that_float32_represents_keep_its_dtype() -> None:
    units = {"loc": torch.tensor([3.0, 0.0]).double(), "scale": torch.tensor([SCALE, 1.0]).double()}
    assert FlowPrior(model(), **units).dtype == torch.float32
    assert FlowPrior(model().double(), **units).float().dtype == torch.float32


@pytest.mark.parametrize("family", [MAF, IAF, RealNVP])
def test_draws_of_float64_carry_gradients_and_are_remembered(family: Any) -> None:
    prior = FlowPrior(
        model(family), loc=torch.tensor([OFFSET, 0.0]).double(), scale=torch.tensor([SCALE, 1.0]).double()
    )
    drawn = prior.rsample((3, 4, 5))
    score = prior.log_prob(drawn)
    assert (score.shape, score.dtype) == ((3, 4, 5), torch.float64)
    assert torch.allclose(score, prior.log_prob(drawn.detach().clone()), atol=1e-4)
    (drawn[..., 0] + score).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in prior.parameters())


def test_values_that_were_rounded_are_refused() -> None:
    message = r"FlowPrior expected value of float64, got float32: that rounds column 0, about 5400000 \+- 0.1"
    with pytest.raises(TypeError, match=message):
        wide().log_prob(torch.from_numpy(northings(7)).float())


@pytest.mark.parametrize("form", [torch.from_numpy, np.asarray, pd.DataFrame])
def test_rows_that_come_in_float32_are_scored_in_float32(form: Any) -> None:
    rows = normal().astype(np.float32) + np.float32(1e5)
    result = fit(model(), form(rows), **QUICK)
    assert result.density.dtype == torch.float32
    assert mean_log_prob(result.density, torch.from_numpy(rows)) == pytest.approx(-1 - math.log(2 * math.pi), abs=0.4)


def test_a_prior_whose_units_are_too_coarse_says_so() -> None:
    given = FlowPrior(model(), loc=torch.tensor([OFFSET, 0.0]), scale=torch.tensor([SCALE, 1.0]))
    message = r"fit takes column 0 in float32, which has few different values there, 5400000 \+- 0\.\d+:"
    with pytest.warns(UserWarning, match=message):
        result = fit(given, northings(), **QUICK)
    assert result.density is given


@pytest.mark.filterwarnings("ignore:fit ")
def test_integers_that_float64_cannot_distinguish_are_reported() -> None:
    rows = np.stack([2**60 + np.arange(200) * 37 % 5000, np.arange(200) * 7 % 200], 1)
    message = r"fit takes column 0 in float64, which has few different values there, 1\.1529215e\+18 \+- .*: subtract"
    with pytest.warns(UserWarning, match=message):
        fit(rows, **QUICK)


@pytest.mark.parametrize("size", [1e37, 1e-36])
def test_a_size_near_the_end_of_float32_is_no_offset(size: float) -> None:
    rows = torch.from_numpy(normal().astype(np.float32)) * torch.tensor([size, 1.0])
    with pytest.warns(UserWarning, match=r"in float32, which ends at 1e-38 and 3e38, near .*: take units of about"):
        fit(model(), rows, **QUICK)


def test_a_prior_of_float64_values_is_fitted_further() -> None:
    first = fit(model(), northings(), **QUICK)
    again = fit(first.density, northings(seed=1), **QUICK)
    assert again.density is first.density
    assert again.validation_log_likelihood == pytest.approx(TRUTH, abs=0.4)


def test_a_fit_in_two_dtypes_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = fit(model(), northings(), **QUICK)
    fit(model(), northings(), folder=tmp_path / "fit", **{**QUICK, "max_epochs": 1})
    again = fit(model(), northings(), folder=tmp_path / "fit", resume=True, **QUICK)
    assert same(weights(whole.density), weights(again.density))
    loaded = pyro_maf.load(tmp_path / "fit" / "model.safetensors")
    assert torch.equal(loaded.log_prob(again.validation_rows.data), again.density.log_prob(again.validation_rows.data))


def test_a_mapped_table_is_rounded_after_its_units_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "IN_MEMORY", 0)
    monkeypatch.setattr(disk, "BLOCK_BYTES", 2000)
    np.save(tmp_path / "rows.npy", northings(2000))
    result = fit(model(), np.load(tmp_path / "rows.npy", mmap_mode="r"), **QUICK)
    assert result.validation_log_likelihood == pytest.approx(TRUTH, abs=0.3)
    assert result.density.sample((3000,))[:, 0].std().item() == pytest.approx(SCALE, rel=0.1)


def test_a_prior_from_draws_is_as_precise_as_they_are() -> None:
    prior = fit_prior(northings(), model(), **QUICK)
    assert prior.sample((2000,))[:, 0].std().item() == pytest.approx(SCALE, rel=0.1)
