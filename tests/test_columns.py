"""Columns of all kinds: counts, rounded numbers and categories have probabilities, which sum to 1."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import pyro_maf
from pyro_maf import MAF, NSF, ConditionalMAF, FlowPrior, MAFMoG, fit, fit_prior
from pyro_maf._core.checks import InputError
from pyro_maf.cli.commands import app
from pyro_maf.distributions import (
    AutoregressiveCategorical,
    ConditionalTableDensity,
    TableDensity,
)
from pyro_maf.distributions.steps import POINTS, Steps
from pyro_maf.report import write_report
from pyro_maf.support import Support
from pyro_maf.tables import Rows, disk
from pyro_maf.tables.categories import coded
from pyro_maf.tables.grid import grid_of
from pyro_maf.training.kinds import few_values, grids_of
from tests.fits import mean_log_prob, same, seeded, weights

SMALL: dict[str, Any] = {"num_layers": 2, "hidden_dims": [16]}
QUICK: dict[str, Any] = {"batch_size": 100, "max_epochs": 3, "learning_rate": 1e-2, "progress": False}
ON_GRID = pytest.mark.filterwarnings("ignore:fit found (values on a grid|few distinct values)")
ENDS = pytest.mark.filterwarnings("ignore:fit (reached max_epochs|has its best epoch)")


def counts(rows: int = 400, seed: int = 0) -> np.ndarray:
    """Rows of a number and a count that depends on it."""
    random = np.random.default_rng(seed)
    x = random.normal(size=rows)
    return np.stack([x, random.poisson(np.exp(1.5 + 0.4 * x))], 1)


def mixed(rows: int = 400, seed: int = 0) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    data = counts(rows, seed)
    red = random.random(rows) < 1 / (1 + np.exp(-2 * data[:, 0]))
    frame = pd.DataFrame({"x": data[:, 0], "count": data[:, 1].astype(int)})
    return frame.assign(colour=np.where(red, "red", "blue"), flag=red ^ (random.random(rows) < 0.2))


def trained(model: Any, scale: float = 0.4) -> Any:
    """A model with random weights, far from the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return model


GRIDS: dict[str, tuple[Any, Any]] = {
    "counts": (np.repeat(np.arange(7.0), 5), (1.0, 0.0, 6.0)),
    "halves": (np.repeat([0.5, 1.5, 2.0], 5), (0.5, 0.5, 2.0)),
    "tenths in float32": (np.repeat(np.arange(-20, 40, dtype=np.float32) / 10, 3).astype(np.float32), (0.1, -2.0, 3.9)),
    "inches": (np.repeat(np.arange(20) * 2.54 + 100, 3), (2.54, 100.0, 148.26)),
    "years": (np.repeat(np.arange(1990.0, 2020.0), 3), (1.0, 1990.0, 2019.0)),
    "far from 0": (np.repeat(5e6 + np.arange(30) / 10, 3), (0.1, 5e6, 5e6 + 2.9)),
    "thousands": (np.repeat(np.arange(5) * 5000.0, 3), (5000.0, 0.0, 20000.0)),
    "too few repeats": (np.repeat(np.arange(7.0), 2), None),
    "continuous": (np.random.default_rng(0).normal(size=300), None),
    "continuous with copies": (np.repeat(np.random.default_rng(0).normal(size=60), 5), None),
    "constant": (np.ones(30), None),
    "finer than a flow resolves": (np.repeat(np.arange(20_000) / 1e4, 3) * 7, None),
    "thirds": (np.repeat(np.arange(7) / 3, 5), None),
}


@pytest.mark.parametrize(("column", "expected"), GRIDS.values(), ids=GRIDS.keys())
def test_grids_are_detected(column: Any, expected: Any) -> None:
    grid = grid_of(column)
    assert (grid is None) == (expected is None)
    if grid is not None:
        assert tuple(grid) == pytest.approx(expected, rel=1e-12)
        assert not grid.misses(column)
        assert grid.misses(column + column.dtype.type(grid.spacing / 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["spline", "mixture"])
def test_the_probability_of_a_step_of_one_column_is_exact(kind: str, dtype: torch.dtype) -> None:
    model = trained(NSF(1, hidden_dims=()) if kind == "spline" else MAFMoG(1, num_layers=1)).to(dtype)
    prior = FlowPrior(model, loc=torch.tensor([3.0]), scale=torch.tensor([4.0]))
    density = TableDensity(prior, grids=[(0.5, 0.0, 9.0)])
    values = torch.arange(-4000, 4000, dtype=dtype)[:, None] / 2
    with torch.no_grad():
        total = density.log_prob(values).exp().sum().item()
        fine = torch.linspace(-0.25, 0.25, 2001, dtype=torch.float64)
        heights = FlowPrior.log_prob(prior.double(), 3.5 + fine[:, None]).exp()
        expected = torch.trapezoid(heights, fine).log().item()
        assert density.to(dtype).log_prob(torch.tensor([3.5], dtype=dtype)).item() == pytest.approx(expected, abs=1e-4)
    assert total == pytest.approx(1.0, abs=2e-5)
    assert density.log_prob_error(values[:3]).tolist() == [0, 0, 0]
    far = density.log_prob(torch.tensor([[2000.0], [-2000.0]], dtype=dtype))
    assert far.isfinite().all()
    assert (far < -20).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probabilities_of_a_grid_sum_to_one_within_their_error(dtype: torch.dtype) -> None:
    model = trained(MAF(2, **SMALL), 0.1).to(dtype)
    density = TableDensity(
        FlowPrior(model, loc=torch.tensor([2.0, 3.0]), scale=torch.tensor([1.5, 2.5])),
        grids=[(1.0, 0.0, 5.0), (1.0, 0.0, 9.0)],
    )
    values = torch.tensor(list(itertools.product(range(-40, 44), range(-60, 66))), dtype=dtype)
    with torch.no_grad():
        log_prob, error = density.log_prob(values), density.log_prob_error(values)
        coarse = log_prob.exp()
        off = (error * coarse).square().sum().sqrt().item()
        assert coarse.sum().item() == pytest.approx(1.0, abs=4 * off)
        assert off < 0.02
        # Against an average over many more points.
        some = values[coarse.argsort(descending=True)[:40]]
        places = torch.rand(40, 4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
        exact = density.prior.double().log_prob(some[:, None].double() + places).logsumexp(1) - math.log(4000)
        gap = density.to(dtype).log_prob(some).double() - exact
    # The error and Jensen gap of independent points bound those of Sobol points from above.
    assert gap.abs().max().item() < 0.05
    assert abs(gap.mean().item()) < 0.01
    assert gap.square().mean().sqrt().item() < error[coarse.argsort(descending=True)[:40]].mean().item()


def test_a_number_and_a_count_integrate_and_sum_to_one() -> None:
    density = TableDensity(FlowPrior(trained(MAF(2, **SMALL), 0.1).double()), grids=[None, (0.5, -2.0, 2.0)])
    x = torch.linspace(-12, 12, 1201, dtype=torch.float64)
    values = torch.stack(torch.meshgrid(x, torch.arange(-30.0, 31).double() / 2, indexing="ij"), -1)
    with torch.no_grad():
        total = torch.trapezoid(density.log_prob(values).exp().sum(-1), x).item()
    assert total == pytest.approx(1.0, abs=1e-3)


def table(dtype: torch.dtype = torch.float64, context_dim: int = 0) -> Any:
    """A density of a number, a category with three values, a count and a boolean."""
    prior = FlowPrior(trained(MAF(2, context_dim=5 + context_dim, **SMALL), 0.1).to(dtype))
    categorical = trained(AutoregressiveCategorical([3, 2], context_dim=context_dim)).to(dtype)
    levels = [None, [0.0, 1.0, 2.0], None, [0.0, 5.0]]
    form = ConditionalTableDensity if context_dim else TableDensity
    return form(prior, levels=levels, grids=[None, None, (1.0, 0.0, 3.0), None], categorical=categorical)


def test_categories_a_count_and_a_number_have_a_density_that_is_one() -> None:
    x = torch.linspace(-12, 12, 801, dtype=torch.float64)
    grids = [x, torch.arange(3.0), torch.arange(-15.0, 16), torch.tensor([0.0, 5.0])]
    values = torch.stack(torch.meshgrid(*(grid.double() for grid in grids), indexing="ij"), -1)
    with torch.no_grad():
        heights = table().log_prob(values).exp()
    assert torch.trapezoid(heights.sum((1, 2, 3)), x).item() == pytest.approx(1.0, abs=1e-3)


def test_draws_are_those_of_the_probabilities() -> None:
    density = table()
    torch.manual_seed(0)
    draws = density.sample((20_000,))
    assert (density.support.check(draws)).all()
    with torch.no_grad():
        shares = density.categorical.log_prob(torch.tensor(list(itertools.product(range(3), range(2)))).double()).exp()
    for (one, two), share in zip(itertools.product(range(3), (0.0, 5.0)), shares.tolist(), strict=True):
        drawn = ((draws[:, 1] == one) & (draws[:, 3] == two)).double().mean().item()
        assert drawn == pytest.approx(share, abs=5 * math.sqrt(share / 20_000) + 1e-3)
    assert set(draws[:, 2].tolist()) <= {0.0, 1.0, 2.0, 3.0}


@pytest.mark.parametrize(
    "row", [[0.0, 3.0, 1.0, 5.0], [0.0, 1.0, 0.5, 5.0], [0.0, 1.0, 1.0, 1.0], [0.0, 0.5, 1.0, 0.0]]
)
def test_values_off_the_grid_and_unknown_categories_have_probability_zero(row: list[float]) -> None:
    assert table().log_prob(torch.tensor(row).double()).item() == -math.inf
    assert not table().support.check(torch.tensor(row).double())


def test_a_missing_value_gives_nan_and_no_gradient_of_nan() -> None:
    density = table()
    rows = torch.tensor([[math.nan, 1, 1, 0], [0, math.nan, 1, 5], [0, 1, 1, 5], [0, 1, 0.3, 5]], dtype=torch.float64)
    scores = density.log_prob(rows)
    assert scores.isnan().tolist() == [True, True, False, False]
    scores[2:3].sum().backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in density.parameters())


@pytest.mark.parametrize("missing", [None, float("nan"), np.nan, pd.NaT, pd.NA])
def test_any_missing_value_is_a_category(missing: Any) -> None:
    codes = coded(pd.Series([np.str_("a"), missing, 2.5, np.float64(2.5), "z"], dtype=object), ("a", 2.5))
    np.testing.assert_array_equal(codes, [0, np.nan, 1, 1, -1])


@pytest.mark.parametrize("batch", [(), (3,), (0,), (2, 3)])
def test_batches_have_any_shape(batch: tuple[int, ...]) -> None:
    rows = table().sample(batch)
    assert rows.shape == (*batch, 4)
    assert table().log_prob(rows).shape == batch
    at = table(context_dim=2).condition(torch.zeros(*batch, 2, dtype=torch.float64))
    assert at.sample((5,)).shape == (5, *batch, 4)
    assert at.log_prob(at.sample((5,))).shape == (5, *batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tables_are_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    for density in (table(dtype), table(dtype, context_dim=2)):
        density.save(tmp_path / "table.safetensors")
        again = pyro_maf.load(tmp_path / "table.safetensors")
        one, other = (
            each.condition(torch.ones(2, dtype=dtype)) if density.context_dim else each for each in (density, again)
        )
        rows = one.sample((9,))
        assert torch.equal(one.log_prob(rows), other.log_prob(rows))
        assert again.unwrapped.grids == density.unwrapped.grids
        assert again.dtype == dtype


def test_inconsistent_arguments_are_refused() -> None:
    prior = FlowPrior(MAF(2))
    with pytest.raises(ValueError, match="expected levels of 2 columns"):
        TableDensity(prior, levels=[None])
    with pytest.raises(ValueError, match="expected grids of 2 columns"):
        TableDensity(prior, grids=[None])
    with pytest.raises(ValueError, match="expected a prior with a context of at least 3 features"):
        TableDensity(prior, levels=[None, None, [0.0, 1.0, 2.0]], categorical=AutoregressiveCategorical([3]))


def test_categories_start_at_the_frequencies_of_a_tree() -> None:
    random = np.random.default_rng(0)
    first = random.integers(0, 3, 4000)
    second = np.where(random.random(4000) < 0.7, first, random.integers(0, 3, 4000))
    third = random.integers(0, 2, 4000)
    fourth = np.where(random.random(4000) < 0.9, second > 0, third)
    rows = torch.tensor(np.stack([first, second, third, fourth], 1)).float()
    density = AutoregressiveCategorical([3, 3, 2, 2])
    density.start_at(rows)
    log_prob = density.log_prob(rows).mean().item()
    tree = [(0, None), (1, 0), (2, None), (3, 1)]
    expected = 0.0
    for column, parent in tree:
        names = [column] if parent is None else [parent, column]
        frame = pd.DataFrame(rows.numpy()).astype(int)
        counts_of = frame.groupby(names)[names[0]].transform("size")
        given = len(frame) if parent is None else frame.groupby(parent)[parent].transform("size")
        expected += float(np.log(counts_of / given).mean())
    assert log_prob == pytest.approx(expected, abs=1e-3)
    density.start_at(rows, torch.arange(4000) % 2)
    other = AutoregressiveCategorical([3, 3, 2, 2])
    other.start_at(rows[1::2])
    torch.testing.assert_close(density.log_prob(rows[:50]), other.log_prob(rows[:50]))


@ON_GRID
@ENDS
def test_a_count_is_fitted_as_a_count() -> None:
    result = fit(seeded(lambda: MAF(2, **SMALL).double()), counts(), **QUICK)
    assert isinstance(result.density, TableDensity)
    assert result.density.grids == [None, (1.0, 0.0, counts()[:, 1].max())]
    draws = result.sample(200)
    assert isinstance(draws, Tensor)
    assert torch.equal(draws[:, 1], draws[:, 1].round())
    assert draws[:, 1].min() >= 0
    assert result.validation_rows is not None
    assert mean_log_prob(result.density, result.validation_rows.data) == pytest.approx(
        result.validation_log_likelihood, rel=1e-9
    )
    # The objective of the fit is a lower bound.
    assert min(result.validation_loss) > -result.validation_log_likelihood - 0.01


def test_columns_on_a_grid_are_reported() -> None:
    with pytest.warns(UserWarning, match=r"fit found values on a grid in column 1 \(steps of 1\): log-likelihoods are"):
        fit(MAF(2, **SMALL), counts(), **{**QUICK, "max_epochs": 1})


@ENDS
@pytest.mark.filterwarnings("ignore:fit found few")
def test_densities_may_be_asked_for() -> None:
    result = fit(MAF(2, **SMALL), counts(), dequantise=False, **QUICK)
    assert isinstance(result.density, FlowPrior)
    assert isinstance(fit_prior(counts(), MAF(2, **SMALL), **QUICK), FlowPrior)
    prior = FlowPrior(MAF(2, **SMALL))
    assert fit(prior, counts(), **QUICK).density is prior


@ON_GRID
@ENDS
def test_the_probability_of_counts_is_learnt() -> None:
    """A binomial distribution, to within 0.02 nats with 4,000 rows."""
    random = np.random.default_rng(0)
    train, test = (random.binomial(20, 0.3, (rows, 1)) for rows in (4000, 2000))
    truth = torch.distributions.Binomial(20, torch.tensor(0.3))
    result = fit(NSF(1, hidden_dims=()), train, max_epochs=12, learning_rate=1e-2, progress=False)
    best = truth.log_prob(torch.tensor(test).float()).mean().item()
    assert result.score(test).mean().item() == pytest.approx(best, abs=0.02)


@ON_GRID
@ENDS
def test_a_frame_comes_back_as_it_was(tmp_path: Path) -> None:
    frame = mixed()
    result = fit(frame, **{**QUICK, "max_epochs": 8})
    assert isinstance(result.density, TableDensity)
    torch.manual_seed(0)
    drawn: Any = result.sample(2000)
    assert list(drawn.columns) == list(frame.columns)
    assert drawn.dtypes["count"] == frame.dtypes["count"]
    assert str(drawn.dtypes["flag"]) == "bool"
    assert set(drawn["colour"]) == {"red", "blue"}
    assert (drawn["colour"] == "red").mean() == pytest.approx((frame["colour"] == "red").mean(), abs=0.08)
    same_flag = ((drawn["colour"] == "red") == drawn["flag"]).mean()
    assert same_flag == pytest.approx(0.8, abs=0.1)
    scores = result.score(frame)
    assert scores.isfinite().all()
    assert result.score(frame.iloc[3]).item() == pytest.approx(scores[3].item(), abs=1e-5)
    row = {"colour": "red", "x": 0.1, "count": 3, "flag": True}
    assert result.score(row).isfinite().all()
    assert result.score({**row, "colour": "green"}).item() == -math.inf
    assert result.score(frame.assign(x=np.nan)).isnan().all()
    result.density.save(tmp_path / "table.safetensors")
    assert torch.equal(
        pyro_maf.load(tmp_path / "table.safetensors").log_prob(drawn_numbers(drawn)), result.score(drawn)
    )


def drawn_numbers(frame: pd.DataFrame) -> Tensor:
    """A frame of draws as a tensor, with categories numbered in alphabetical order."""
    numbers = frame.assign(colour=(frame["colour"] == "red"), flag=frame["flag"]).astype(np.float32)
    return torch.tensor(numbers.to_numpy())


@ON_GRID
@ENDS
def test_a_flow_of_the_right_sizes_takes_categories() -> None:
    frame = mixed()
    of_context = fit(ConditionalMAF(2, 4, **SMALL), frame, **QUICK)
    assert of_context.score(frame).isfinite().all()
    given = fit(ConditionalMAF(1, 5, **SMALL), frame.drop(columns="x"), context=frame[["x"]], **QUICK)
    assert given.score(frame).isfinite().all()
    drawn: Any = given.sample(3, context={"x": [0.0]})
    assert list(drawn.columns) == ["count", "colour", "flag"]
    with pytest.raises(
        ValueError, match="fit expected a MAF of input_dim 2 and context_dim 4, as 'colour', 'flag' hold"
    ):
        fit(MAF(4), frame, **QUICK)


def test_unknown_categories_are_refused() -> None:
    frame = mixed(60)
    with pytest.raises(InputError, match="got a missing value in row 7, column 'colour'") as error:
        fit(frame.assign(colour=frame["colour"].where(np.arange(60) != 7)))
    assert (error.value.row, error.value.column) == (7, 2)
    with pytest.raises(ValueError, match="got 60 in 60 rows of column 'name'"):
        fit(frame.assign(name=[f"row {i}" for i in range(60)]))
    with pytest.raises(ValueError, match="fit expected a column of numbers besides the categories"):
        fit(frame[["colour", "flag"]])
    with pytest.raises(TypeError, match="column 'day' of datetime64"):
        fit(frame.assign(day=pd.Timestamp("2020-01-01")))
    with pytest.raises(InputError, match="got 'q' in every row of column 'u': drop that column") as error:
        fit(frame.assign(u="q"))
    assert error.value.column == 4
    with pytest.raises(ValueError, match="expected at least 10 rows of data, got 0"):
        fit(frame.iloc[:0])
    other = "of the data, got 'green' in row 0, column 'colour': leave that validation row out"
    with pytest.raises(InputError, match=other):
        fit(frame, validation=frame.iloc[:20].assign(colour="green"))


def test_columns_of_the_same_name_are_refused() -> None:
    frame = mixed(60)[["x", "count"]]
    twice = pd.concat([frame, frame[["x"]] + 1], axis=1)
    for data in (twice, frame.set_axis([1, "1"], axis=1), {"b": np.zeros((20, 1)), "b[0]": np.zeros(20)}):
        with pytest.raises(ValueError, match="fit expected data whose columns have names that differ, got 2 columns"):
            fit(data)
    with pytest.raises(ValueError, match="fit expected context whose columns have names that differ"):
        fit(ConditionalMAF(2, 3), frame, context=twice)
    with pytest.raises(ValueError, match="got 2 columns 'x'"):
        fit(twice, weights="x")


def test_few_values_are_categories_where_fit_chooses_the_flow() -> None:
    random = np.random.default_rng(0)
    rows = torch.tensor(np.stack([random.normal(size=300), random.choice([0.1, 2.0, 7.5], 300)], 1))
    assert few_values(rows) == [None, (0.1, 2.0, 7.5)]
    assert few_values(rows[:, 1:]) == [None]
    with pytest.warns(UserWarning, match=r"few distinct values in column 1 \(3\): it treats them as categories"):
        result = fit(rows, **QUICK)
    assert set(result.sample(50)[:, 1].tolist()) <= {0.1, 2.0, 7.5}  # type: ignore[index, union-attr]


def test_few_values_are_categories_also_beside_a_column_on_another_support() -> None:
    random = np.random.default_rng(0)
    counts = random.choice([0, 1, 2, 3], 300)
    frame = pd.DataFrame({"mass": random.gamma(2.0, size=300), "other": random.normal(size=300), "count": counts})
    with pytest.warns(UserWarning, match="few distinct values in column 'count'"):
        density: Any = fit(frame, support={"mass": "positive"}, **QUICK).density
    assert density.levels == [None, None, (0.0, 1.0, 2.0, 3.0)]
    assert density.support.check(density.sample((50,))).all()
    with pytest.warns(UserWarning, match="column 'count'"):
        on_steps: Any = fit(frame, support={"count": (-1, 4)}, **QUICK).density
    assert on_steps.levels == [None, None, None]


@ON_GRID
@ENDS
def test_a_fit_of_a_table_is_resumed_to_the_same_weights(tmp_path: Path) -> None:
    whole = fit(mixed(), **{**QUICK, "max_epochs": 4})
    fit(mixed(), folder=tmp_path, **{**QUICK, "max_epochs": 2})
    resumed = fit(mixed(), folder=tmp_path, resume=True, **{**QUICK, "max_epochs": 4})
    assert same(weights(whole.density), weights(resumed.density))
    assert resumed.validation_loss == whole.validation_loss
    assert same(weights(pyro_maf.load(tmp_path / "model.safetensors")), weights(whole.density))
    with pytest.raises(ValueError, match="another"):
        fit(mixed(seed=1), folder=tmp_path, resume=True, **QUICK)


@ON_GRID
@ENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_of_rounded_numbers_equal_those_of_the_data(dtype: torch.dtype) -> None:
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"x": random.normal(size=600), "rounded": random.normal(10.0, 2.0, 600).round(1)})
    drawn: Any = fit(MAF(2, **SMALL).to(dtype), frame, **{**QUICK, "max_epochs": 1}).sample(200)["rounded"]
    assert drawn.dtype == np.float64
    assert (drawn == drawn.round(1)).all()  # 23.7, which is 23.700000762939453 in float32


@ON_GRID
@ENDS
def test_a_series_with_a_name_is_drawn_in_its_dtype() -> None:
    series = pd.Series(np.random.default_rng(0).poisson(20, 300), name="count")
    assert fit(series, **{**QUICK, "max_epochs": 1}).sample(4)["count"].dtype == series.dtype


@ON_GRID
@ENDS
def test_weights_count_in_tables() -> None:
    frame = mixed()
    often = (frame["colour"] == "red").to_numpy() * 3 + 1
    result = fit(frame, weights=often, **QUICK)
    share = (often * (frame["colour"] == "red")).sum() / often.sum()
    torch.manual_seed(0)
    drawn: Any = result.sample(4000)
    assert (drawn["colour"] == "red").mean() == pytest.approx(share, abs=0.05)


@ON_GRID
@ENDS
def test_streamed_counts_are_found_and_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "IN_MEMORY", 0)
    monkeypatch.setattr(disk, "BLOCK_BYTES", 64 * 2 * 8)
    rows = counts(1500)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    result: Any = fit(MAF(2, **SMALL), mapped, **QUICK)
    assert result.density.grids == [None, (1.0, 0.0, rows[:, 1].max())]
    rows[1400, 1] = 2.3456789
    np.save(tmp_path / "other.npy", rows)
    monkeypatch.setattr("pyro_maf.tables.disk.MOST_SAMPLED", 300)
    plain = fit(MAF(2, **SMALL), np.load(tmp_path / "other.npy", mmap_mode="r"), **QUICK)
    assert isinstance(plain.density, FlowPrior)


def test_steps_lie_in_the_support() -> None:
    rows = Rows(torch.tensor([[0.0, 1.0, 0.0], [1.0, 2.0, 0.5], [2.0, 3.0, 1.0]]).repeat(10, 1).double(), None)
    for name, expected in (("real", 3), ("positive", 2), ("unit_interval", 1)):
        support = Support("fit", ["real", name, name], 3) if name != "real" else Support("fit", "real", 3)
        found = grids_of(rows, None, support, [None] * 3)
        assert sum(grid is not None for grid in found) == expected


def test_a_spike_in_a_continuous_column_causes_a_warning() -> None:
    random = np.random.default_rng(0)
    rain = np.where(random.random(500) < 0.4, 0.0, random.gamma(2.0, size=500))
    with pytest.warns(UserWarning, match=r"a value that many rows share in column 0 \(0 in "):
        fit(MAF(2, **SMALL), np.stack([rain, random.normal(size=500)], 1), **QUICK)


def test_the_number_of_points_bounds_the_cost() -> None:
    prior = FlowPrior(MAF(2, **SMALL))
    assert Steps(prior, [0.0, 0.0]).is_exact
    assert not Steps(prior, [0.0, 1.0]).is_exact
    assert Steps(prior, [0.5, 2.0]).log_volume == pytest.approx(0.0)
    assert POINTS == 64


@ON_GRID
@ENDS
def test_a_table_is_reported(tmp_path: Path) -> None:
    frame = mixed()
    result = fit(frame, **QUICK)
    write_report(tmp_path / "report.html", result, mixed(100, seed=1), progress=False)
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in ("x", "count", "colour", "flag"))
    assert "values on a grid" in page


@ON_GRID
@ENDS
def test_the_command_fits_scores_and_draws_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pd.DataFrame(counts(300), columns=["x", "count"]).to_csv("rows.csv", index=False)
    options = ["--folder", "fit", "--max-epochs", "2", "--num-layers", "1", "--hidden-dims", "8"]
    fitted = CliRunner().invoke(app, ["fit", "rows.csv", *options])
    assert fitted.exit_code == 0, fitted.output
    assert "values on a grid in column 'count' (steps of 1)" in fitted.output
    for command in (
        ["score", "fit", "rows.csv", "--out", "scores.csv"],
        ["sample", "fit", "-n", "50", "--out", "new.csv"],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    assert np.isfinite(pd.read_csv("scores.csv")["log_density"]).all()
    drawn = pd.read_csv("new.csv")["count"]
    assert (drawn == drawn.round()).all()
    assert "TableDensity" in CliRunner().invoke(app, ["info", "fit"]).output


@ON_GRID
@ENDS
def test_a_saved_table_takes_frames_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    frame = mixed(300).assign(few=np.arange(300) % 5 / 2, band=pd.cut(mixed(300)["x"], [-9, 0, 9]), c=[1, 2] * 150)
    frame["c"] = frame["c"].astype("category")
    result = fit(frame, folder="fit", **QUICK)
    result.density.save("table.safetensors")
    for path in ("table.safetensors", "fit/model.safetensors"):
        again = pyro_maf.load(path)
        shuffled = frame[list(frame.columns[::-1])]
        assert torch.equal(again.log_prob(shuffled), result.score(frame))
        assert again.log_prob(frame.assign(colour="green"))[0].item() == -math.inf
        with pytest.raises(ValueError, match="with column 'colour', as in the fit"):
            again.log_prob(frame.drop(columns="colour"))
    again.save("twice.safetensors")
    assert torch.equal(pyro_maf.load("twice.safetensors").log_prob(frame), result.score(frame))
    frame.to_csv("rows.csv", index=False)
    for out, source in (("new.csv", "rows.csv"), ("new.parquet", "new.csv")):
        drawn = CliRunner().invoke(app, ["sample", "fit", "-n", "300", "--out", out])
        assert drawn.exit_code == 0, drawn.output
        scored = CliRunner().invoke(app, ["score", "table.safetensors", source, "--out", "scores.csv"])
        assert scored.exit_code == 0, scored.output
        rows = frame if source == "rows.csv" else pd.read_csv(source)
        assert np.allclose(pd.read_csv("scores.csv")["log_density"], again.log_prob(rows).detach(), atol=1e-4)
    assert CliRunner().invoke(app, ["score", "fit", "new.parquet", "--out", "scores.csv"]).exit_code == 0
    new = pd.read_parquet("new.parquet")
    assert list(new.columns) == list(frame.columns)
    assert set(new["colour"]) == {"red", "blue"}
    assert [new[name].dtype.kind for name in ("x", "count", "flag", "few", "c")] == list("fibfi")
    frame.assign(colour="green").to_csv("rows.csv", index=False)
    refused = CliRunner().invoke(app, ["score", "fit", "rows.csv"])
    assert refused.exit_code != 0
    assert "expected one of 'blue', 'red', got 'green' in data row 1" in refused.output.replace("\n", " ")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([["a"], None], "labels of column 'k' that differ"),
        ([["a", "a"], None], "labels of column 'k' that differ"),
        ([["a", None], None], "labels of column 'k' that differ"),
        ([["a", "b"]], "expected labels of 2 named columns"),
        ([["a", "b"], ["a", "b"]], "labels of column 'x' that differ"),
        ("ab", "expected labels of 2 named columns"),
        ([3, None], "expected labels of 2 named columns"),
    ],
)
def test_labels_of_another_table_are_refused(labels: Any, message: str) -> None:
    prior = FlowPrior(MAF(1, context_dim=2, **SMALL))
    options: Any = {"levels": [(0.0, 1.0), None], "categorical": AutoregressiveCategorical([2])}
    names = (("k", ()), ("x", ()))
    TableDensity(prior, columns=names, labels=[["a", "b"], None], **options)
    with pytest.raises(ValueError, match=message):
        TableDensity(prior, columns=names, labels=labels, **options)
    with pytest.raises(ValueError, match="expected labels of 2 named columns"):
        TableDensity(prior, labels=[["a", "b"], None], **options)


@ON_GRID
@ENDS
@pytest.mark.filterwarnings("ignore:fit found that")
def test_a_table_that_is_fitted_again_keeps_its_categories() -> None:
    frame = mixed(300)
    frame["colour"] = np.where(np.arange(300) % 3 == 0, "green", frame["colour"])
    density = fit(frame, **QUICK).density
    fewer = frame[frame["colour"] != "blue"]
    again = fit(density, fewer[["flag", "colour", "count", "x"]], **QUICK)
    assert again.layout.categories == density.unwrapped.layout.categories
    assert list(again.layout.names) == list(frame.columns)
    assert again.score(frame).isfinite().all()
    drawn: Any = again.sample(500)
    assert set(drawn["colour"]) <= {"blue", "green", "red"}
    assert drawn.dtypes.astype(str).tolist() == frame.dtypes.astype(str).tolist()
    with pytest.raises(InputError, match="got 'pink' in row 0, column 'colour'"):
        fit(density, frame.assign(colour="pink"), **QUICK)


def frames_with_context(rows: int = 300) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Heights, and a context of species and age, of which one is text and one boolean."""
    generator = np.random.default_rng(0)
    species = generator.choice(["oak", "elm", "ash"], rows)
    age = generator.uniform(1, 9, rows)
    height = age + pd.Series(species).map({"oak": 0, "elm": 20, "ash": 40}) + generator.normal(0, 2.5, rows)
    data = pd.DataFrame({"height": height.to_numpy(), "width": generator.normal(0, 1, rows)})
    return data, pd.DataFrame({"species": species, "age": age, "sick": generator.random(rows) > 0.5})


@ON_GRID
@ENDS
def test_text_in_the_context_of_a_frame_is_one_hot(tmp_path: Path) -> None:
    data, context = frames_with_context()
    result = fit(data, context=context, max_epochs=8, progress=False)
    assert result.density.unwrapped.context_dim == 5
    elm = {"species": "elm", "age": 5.0, "sick": False}
    assert abs(result.sample(300, elm)["height"].mean() - 25) < 5  # type: ignore[call-overload, index]
    scores = result.score(data, context)
    assert torch.equal(scores, result.score(data.join(context)))
    assert torch.equal(scores, result.density.condition(context).log_prob(data).detach())  # type: ignore[union-attr]
    result.density.save(tmp_path / "trees.safetensors")
    again = pyro_maf.load(tmp_path / "trees.safetensors")
    assert torch.equal(scores, again.condition(context[["sick", "age", "species"]]).log_prob(data).detach())
    assert torch.equal(again.condition(elm).log_prob(torch.zeros(2)), again.condition(elm).log_prob(torch.zeros(1, 2)))
    with pytest.raises(ValueError, match=r"categories \('ash', 'elm', 'oak'\) in column 'species', got 'yew' in row 0"):
        again.condition({**elm, "species": "yew"})
    with pytest.raises(ValueError, match="in another order"):
        result.score(data, context.iloc[::-1])
    one = fit(data, context=context["species"], max_epochs=1, progress=False)
    assert torch.equal(one.score(data, context["species"]), one.score(data, context[["species"]]))
    assert len(one.sample(2, context["species"].iloc[:2])) == 2


@ENDS
def test_text_in_the_context_of_a_fit_goes_with_every_form_of_it(tmp_path: Path) -> None:
    data, context = frames_with_context()
    with pytest.raises(ValueError, match="in another order"):
        fit(data, context=context.iloc[::-1], max_epochs=1, progress=False)
    prior = fit_prior(data, context=context, max_epochs=1, progress=False)
    assert prior.unwrapped.context_layout.encoded_labels[:3] == ["species=ash", "species=elm", "species=oak"]
    few = context[context["species"] != "oak"]
    again = fit(prior.requires_grad_(True), data.loc[few.index], context=few, max_epochs=1, progress=False)
    assert again.density.unwrapped.context_dim == 5  # the categories of the prior, not of the new rows
    validation = data.iloc[:30], context.iloc[:30]
    flow = ConditionalMAF(2, 5, num_layers=1, hidden_dims=[8])
    rest = data.iloc[30:], context.iloc[30:]
    result = fit(flow, rest[0], context=rest[1], validation=validation, dequantise=False, **QUICK)
    assert result.score(*validation).shape == (30,)
    with pytest.warns(UserWarning, match="grid"):
        table = fit(data.round(1), context=context, max_epochs=1, progress=False)
    assert table.sample(5, context.iloc[:5]).shape == (5, 2)  # type: ignore[union-attr]
    write_report(tmp_path / "report.html", table, data.round(1), context=context, progress=False)
    assert "species=oak" in (tmp_path / "report.html").read_text()
