"""Data of fits: supported forms of data and context, validation rows, units and errors."""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from pyro.infer import HMC, MCMC
from torch import Tensor

from pyro_maf import MAF, ConditionalFlowPrior, ConditionalMADEMoG, ConditionalMAF, FlowPrior, fit, fit_prior
from pyro_maf._core.checks import InputError
from pyro_maf._core.processes import Processes
from pyro_maf.datasets import read_table
from pyro_maf.tables import Rows
from pyro_maf.training.batches import Batches
from pyro_maf.transforms import Permute
from tests.fits import QUICK, SMALL, gaussian_rows, mean_log_prob, same, seeded, small_maf, weights

ROWS = gaussian_rows(200).numpy()
CONTEXT = ROWS[:, :1] + gaussian_rows(200, seed=1).numpy()[:, :1]
FRAME = pd.DataFrame(ROWS, columns=["height", "weight"], index=range(1000, 1200))


def small_conditional() -> Any:
    return seeded(lambda: ConditionalMAF(2, 1, num_layers=1, hidden_dims=[8]).double())


def changed(row: int, column: int, value: float) -> Any:
    rows = ROWS.copy()
    rows[row, column] = value
    return rows


# -- supported forms ---------------------------------------------------------------------------------------------------

FORMS: dict[str, Callable[[Any], Any]] = {
    "tensor": torch.from_numpy,
    "tensor with gradient": lambda rows: torch.from_numpy(rows).requires_grad_(),
    "array": lambda rows: rows,
    "array in Fortran's order": np.asfortranarray,
    "array with a negative stride": lambda rows: rows[::-1].copy()[::-1],
    "big-endian array": lambda rows: rows.astype(">f8"),
    "frame": lambda rows: pd.DataFrame(rows, index=range(1000, 1000 + len(rows))),
    "frame of nullable numbers": lambda rows: pd.DataFrame(rows).astype("Float64"),
    "nested lists": lambda rows: rows.tolist(),
    "list of arrays": list,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_data_and_context_come_in_many_forms(form: Callable[[Any], Any]) -> None:
    expected = fit(small_conditional(), torch.tensor(ROWS), context=torch.tensor(CONTEXT), **QUICK)
    rows, context = ROWS.copy(), CONTEXT.copy()
    result = fit(small_conditional(), form(rows), context=form(context), **QUICK)
    assert result.validation_loss == expected.validation_loss
    assert np.array_equal(rows, ROWS)
    assert np.array_equal(context, CONTEXT)


def test_entries_of_data_and_context_may_have_the_same_name_but_not_the_same_values() -> None:
    rows, context = torch.tensor(ROWS), torch.tensor(CONTEXT, requires_grad=True)
    fit(small_conditional(), {"x": rows}, context={"x": context}, **QUICK)
    with pytest.raises(ValueError, match="got 'x' in both"):
        fit(small_conditional(), {"x": rows}, context={"x": rows.clone().requires_grad_()}, **QUICK)


def test_an_array_that_may_not_be_written_to_is_read() -> None:
    rows = ROWS.copy()
    rows.flags.writeable = False
    assert fit(small_maf(), rows, **QUICK).validation_loss == fit(small_maf(), ROWS, **QUICK).validation_loss


@pytest.mark.parametrize("form", [lambda column: column, torch.from_numpy, pd.Series, list])
def test_one_dimensional_data_need_no_second_axis(form: Callable[[Any], Any]) -> None:
    def model() -> Any:
        return seeded(lambda: ConditionalMAF(1, 1, **SMALL).double())

    expected = fit(model(), ROWS[:, :1], context=CONTEXT, **QUICK)
    result = fit(model(), form(ROWS[:, 0].copy()), context=form(CONTEXT[:, 0].copy()), **QUICK)
    assert result.validation_loss == expected.validation_loss


def test_whole_numbers_and_truth_values_are_numbers() -> None:
    frame = pd.DataFrame({"count": np.arange(100) % 7, "flag": np.arange(100) % 3 == 0})
    with pytest.warns(UserWarning, match="values on a grid"):
        expected, of_frame, of_tensor = (
            fit(small_maf(), rows, **QUICK)
            for rows in (frame.to_numpy(np.float64), frame, torch.tensor(frame.to_numpy(np.int64)))
        )
    assert of_frame.validation_loss == of_tensor.validation_loss == expected.validation_loss


def test_a_table_of_a_file_is_fitted_and_named() -> None:
    def table(row: int | None = None) -> Any:
        cells = [["dose", "height", "weight"], *np.concatenate([CONTEXT, ROWS], 1).tolist()]
        if row is not None:
            cells[row][2] = -1.0
        return read_table(io.BytesIO("\n".join(",".join(map(str, line)) for line in cells).encode()), context=["dose"])

    expected = fit(small_conditional(), ROWS, context=CONTEXT, **QUICK)
    result = fit(small_conditional(), table(), validation=0.1, **QUICK)
    assert result.validation_loss == pytest.approx(expected.validation_loss, rel=1e-6)
    assert torch.equal(result.score(table()), result.score(table().data, table().context))
    with pytest.warns(UserWarning, match="fit found 200 of 200 validation rows among the training rows"):
        fit(small_conditional(), table(), validation=table(), **QUICK)
    positive = {"weight": "positive"}
    with pytest.raises(InputError, match=r"^fit expected data of numbers above 0 in column 'weight'") as caught:
        fit(small_conditional(), table(), support=positive, **QUICK)
    assert f"in data row {caught.value.row + 1} (counted from 1)" in str(caught.value)
    assert caught.value.column == 1
    with pytest.raises(ValueError, match="fit got a context with a Table, which has its own: leave it out"):
        fit(small_conditional(), table(), context=CONTEXT, **QUICK)
    prior = fit_prior(table(), support={"height": "real"}, **QUICK)
    assert (prior.input_dim, prior.context_dim) == (2, 1)


# -- validation --------------------------------------------------------------------------------------------------------


def test_a_part_of_the_rows_is_set_aside_at_random() -> None:
    numbered = Rows(torch.arange(200.0).unsqueeze(-1), -torch.arange(200.0).unsqueeze(-1))
    training, held_out = numbered.split(0.25, torch.Generator().manual_seed(0))[:2]
    again = numbered.split(0.25, torch.Generator().manual_seed(0))[:2]
    other = numbered.split(0.25, torch.Generator().manual_seed(1))[:2]
    assert (len(training.data), len(held_out.data)) == (150, 50)
    assert torch.equal(torch.cat([training.data, held_out.data]).sort(0).values, numbered.data)
    assert all(torch.equal(part.context, -part.data) for part in (training, held_out))
    assert torch.equal(again[1].data, held_out.data)
    assert not torch.equal(other[1].data, held_out.data)
    assert not torch.equal(held_out.data.sort(0).values, held_out.data)


def chain(seed: int) -> Tensor:
    """1,600 draws with replacement from 400 normal rows, which repeat like those of a Metropolis chain."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(400, 2, generator=generator)[torch.randint(400, (1600,), generator=generator)]


@pytest.mark.parametrize("seed", range(3))
def test_copies_of_a_row_are_on_one_side_of_the_split(seed: int) -> None:
    rows = chain(seed)
    training, held_out = Rows(rows, None).split(0.1, torch.Generator().manual_seed(seed))[:2]
    assert len(training.data) + len(held_out.data) == len(rows)
    assert 130 <= len(held_out.data) <= 160
    both = torch.cat([training.data.unique(dim=0), held_out.data.unique(dim=0)])
    assert len(both) == len(both.unique(dim=0)) == len(rows.unique(dim=0))


def test_a_row_is_its_data_and_its_context() -> None:
    data, context = torch.arange(200.0)[:, None] // 2, torch.arange(200.0)[:, None] % 2
    _, held_out = Rows(data, context).split(0.25, torch.Generator().manual_seed(0))[:2]
    assert held_out.context is not None
    assert len(held_out.data.unique()) > 40
    _, held_out = Rows(data, 0 * context).split(0.25, torch.Generator().manual_seed(0))[:2]
    assert len(held_out.data) == 2 * len(held_out.data.unique()) == 50


def test_zero_equals_negative_zero() -> None:
    signs = torch.tensor([-1.0, 1.0]).repeat(50)[:, None]
    rows = torch.cat([0 * signs, (torch.arange(100.0) // 2)[:, None]], 1)
    _, held_out = Rows(rows, None).split(0.2, torch.Generator().manual_seed(0))[:2]
    assert len(held_out.data.unique(dim=0)) == 10


def test_a_row_of_many_copies_stays_for_training() -> None:
    rows = torch.cat([torch.zeros(500, 1), torch.arange(1.0, 501.0)[:, None]])
    for seed in range(10):
        training, held_out = Rows(rows, None).split(0.1, torch.Generator().manual_seed(seed))[:2]
        assert (len(held_out.data), int((training.data == 0).sum())) == (100, 500)


def test_categories_are_divided_row_by_row() -> None:
    rows = torch.arange(100.0)[:, None] % 3
    _, held_out = Rows(rows, None).split(0.2, torch.Generator().manual_seed(0))[:2]
    assert (len(held_out.data), len(held_out.data.unique())) == (20, 3)


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_repeat_are_validated_with_as_fresh_rows_are(seed: int) -> None:
    model = seeded(lambda: MAF(2, num_layers=1, hidden_dims=[32]))
    with pytest.warns(UserWarning, match=r"fit found 1,2\d\d of 1,600 rows to repeat an earlier one"):
        result = fit(model, chain(seed), max_epochs=60, learning_rate=1e-2, batch_size=100, progress=False)
    fresh = torch.randn(4000, 2, generator=torch.Generator().manual_seed(9))
    score = mean_log_prob(result.density, fresh)
    assert score == pytest.approx(-2.84, abs=0.1)
    assert result.validation_log_likelihood == pytest.approx(score, abs=0.5)
    assert result.repeats == 1600 - len(chain(seed).unique(dim=0))
    assert "repeat an earlier one" in result.warnings[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_validation_rows_among_the_training_rows_cause_a_warning(dtype: torch.dtype) -> None:
    rows = torch.tensor(ROWS)
    half = torch.cat([rows[:100].to(dtype), torch.randn(100, rows.shape[1]).to(dtype)])
    with pytest.warns(UserWarning, match="fit found 100 of 200 validation rows among the training rows: the valid"):
        fit(small_maf(), rows, validation=half, **QUICK)


def test_validation_rows_that_are_equal_by_chance_are_fine() -> None:
    rows, others = torch.randint(5, (2, 200, 2), generator=torch.Generator().manual_seed(0)).float()
    with pytest.warns(UserWarning, match="on a grid"):  # and no other
        fit(small_maf(), rows, validation=others, **QUICK)


@pytest.mark.parametrize(("validation", "rows"), [(None, 20), (0.25, 50), (0.001, 1), (0.999, 198)])
def test_validation_may_be_a_part(validation: float | None, rows: int) -> None:
    result = fit(small_maf(), ROWS, validation=validation, **QUICK)
    training, held_out = Rows(torch.tensor(ROWS), None).split(validation or 0.1, torch.Generator().manual_seed(0))[:2]
    assert len(held_out.data) == rows
    assert mean_log_prob(result.density, held_out.data) == pytest.approx(result.validation_log_likelihood, rel=1e-12)
    # The rows that were set aside do not affect the units.
    assert torch.allclose(result.density.loc, training.data.mean(0), rtol=1e-12)
    assert torch.allclose(result.density.scale, training.data.std(0, correction=0), rtol=1e-12)


@pytest.mark.parametrize("form", [torch.from_numpy, pd.DataFrame, lambda rows: (rows.tolist(), None)])
def test_validation_may_be_rows(form: Callable[[Any], Any]) -> None:
    rows = gaussian_rows(50, seed=1)
    result = fit(small_maf(), ROWS, validation=form(rows.numpy()), **QUICK)
    assert mean_log_prob(result.density, rows) == pytest.approx(result.validation_log_likelihood, rel=1e-12)
    assert torch.allclose(result.density.loc, torch.tensor(ROWS).mean(0), rtol=1e-12)


def test_validation_may_be_rows_with_their_context() -> None:
    rows, context = gaussian_rows(50, seed=1), gaussian_rows(50, seed=2)[:, :1]
    result = fit(small_conditional(), FRAME, context=CONTEXT, validation=(rows, context.numpy()), **QUICK)
    fitted = mean_log_prob(result.density.condition(context), rows)
    assert fitted == pytest.approx(result.validation_log_likelihood, rel=1e-12)


def test_the_result_holds_the_rows_that_were_validated_with() -> None:
    result = fit(small_maf(), gaussian_rows(), **QUICK)
    assert result.validation_rows is not None
    assert result.validation_rows.context is None
    best = mean_log_prob(result.density, result.validation_rows.data)
    assert best == pytest.approx(result.validation_log_likelihood, rel=1e-12)


@pytest.mark.parametrize("size", [1, 3, 7, 64, 1000])
def test_batches_are_even_and_leave_no_row_out(size: int) -> None:
    rows = Rows(torch.arange(100.0).unsqueeze(-1), -torch.arange(100.0).unsqueeze(-1))
    batches = Batches(rows, size, torch.Generator().manual_seed(0), Processes())
    first, second = list(batches), list(batches)
    sizes = [len(batch.data) for batch in first]
    assert len(first) == len(batches) == max(1, round(100 / size))
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) == batches.smallest
    for dealt in (first, second):
        assert torch.equal(torch.cat([batch.data for batch in dealt]).sort(0).values, rows.data)
        assert all(torch.equal(batch.context, -batch.data) for batch in dealt)
    assert not torch.equal(torch.cat([batch.data for batch in first]), torch.cat([batch.data for batch in second]))


# -- units -------------------------------------------------------------------------------------------------------------


def test_the_density_is_in_the_units_of_the_data() -> None:
    rows, new = gaussian_rows(), gaussian_rows(50, seed=1)
    plain = fit(small_maf(), rows, **QUICK)
    moved = fit(small_maf(), 100 + 5 * rows, **QUICK)
    expected = plain.density.log_prob(new) - 2 * math.log(5)
    assert torch.allclose(moved.density.log_prob(100 + 5 * new), expected, rtol=0, atol=1e-9)
    assert moved.validation_log_likelihood == pytest.approx(plain.validation_log_likelihood - 2 * math.log(5), abs=1e-9)
    assert moved.train_loss == pytest.approx([loss + 2 * math.log(5) for loss in plain.train_loss], abs=1e-9)


def test_the_context_has_units_too() -> None:
    context, new = torch.randn(300, 1).double(), torch.randn(50, 1).double()
    rows = gaussian_rows() + context

    def fitted(given: Tensor) -> Any:
        model = seeded(lambda: ConditionalMAF(2, 1, **SMALL).double())
        return fit(model, rows, context=given, **QUICK).density

    value, plain, moved = gaussian_rows(50), fitted(context), fitted(1000 * context - 7)
    expected = plain.condition(new).log_prob(value)
    assert torch.allclose(moved.condition(1000 * new - 7).log_prob(value), expected, rtol=0, atol=1e-9)


def test_a_prior_keeps_its_units() -> None:
    loc, scale = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    prior = FlowPrior(MAF(2, **SMALL), loc=loc, scale=scale)
    assert fit(prior, gaussian_rows(), **QUICK).density is prior
    assert torch.equal(prior.loc, loc)
    assert torch.equal(prior.scale, scale)


@pytest.mark.parametrize("wrap", [lambda prior: prior, lambda prior: prior.density], ids=["conditional", "its prior"])
def test_a_conditional_prior_keeps_its_units(wrap: Callable[[Any], Any]) -> None:
    units = {
        "loc": torch.tensor([1.0, 2.0]),
        "scale": torch.tensor([3.0, 4.0]),
        "context_loc": torch.tensor([5.0]),
        "context_scale": torch.tensor([6.0]),
    }
    prior = ConditionalFlowPrior(ConditionalMAF(2, 1, **SMALL), **units)
    result = fit(wrap(prior), gaussian_rows(), context=torch.randn(300, 1), **QUICK)
    assert all(torch.equal(getattr(result.density.density, name), value) for name, value in units.items())
    assert result.density.density.model is prior.density.model


# -- errors ------------------------------------------------------------------------------------------------------------

NOT_A_TABLE = "fit expected data to be a tensor, array or data frame of numbers, got"

BAD_DATA: dict[str, tuple[Any, type[Exception], str]] = {
    "NaN": (
        changed(17, 1, math.nan),
        ValueError,
        "fit expected finite data, got nan in row 17, column 1 (1 of 200 rows have such values): drop those rows or "
        "fill them in.",
    ),
    "infinity in a frame": (
        pd.DataFrame(changed(17, 1, -math.inf), columns=FRAME.columns, index=FRAME.index),
        ValueError,
        "fit expected finite data, got -inf in row 17, column 'weight' (1 of 200 rows",
    ),
    "missing in a frame": (
        pd.DataFrame({"count": pd.array([1, None, 3, None] * 5, dtype="Int64"), "weight": range(20)}),
        ValueError,
        "got nan in row 1, column 'count' (10 of 20 rows",
    ),
    "masked": (
        np.ma.masked_array(ROWS, mask=np.arange(400).reshape(200, 2) == 7),
        ValueError,
        "got nan in row 3, column 1 (1 of 200 rows",
    ),
    "constant": (
        np.where(np.arange(2) == 1, 4.5, ROWS),
        ValueError,
        "fit expected data that varies in every column, got 4.5 in every row of column 1: drop that column.",
    ),
    "constant in several": (
        np.full((200, 2), 3.0),
        ValueError,
        "got 3 in every row of column 0: drop that column, and likewise column 1.",
    ),
    "constant in a frame": (FRAME.assign(height=-2), ValueError, "got -2 in every row of column 'height': drop that"),
    "too wide": (
        np.zeros((200, 3)),
        ValueError,
        "fit expected data of shape (rows, 2), 2 being the input_dim of MAF, got (200, 3).",
    ),
    "a row": (ROWS[0], ValueError, "fit expected data of shape (rows, 2), 2 being the input_dim of MAF, got (2,)."),
    "three axes": (ROWS[None], ValueError, "2 being the input_dim of MAF, got (1, 200, 2)."),
    "a number": (3.0, ValueError, "2 being the input_dim of MAF, got ()."),
    "no rows": (ROWS[:0], ValueError, "fit expected data with rows in it, got shape (0, 2)."),
    "a frame without columns": (FRAME[[]], ValueError, "2 being the input_dim of MAF, got (200, 0)."),
    "too few rows": (ROWS[:9], ValueError, "fit expected at least 10 rows of data, got 9."),
    "chains": ({"mu": ROWS[:4]}, ValueError, "got 4: join chains of draws, as"),
    "ragged": ([[1, 2], [3]], ValueError, "fit expected data to be a table, got rows of different lengths."),
    "None": (None, TypeError, f"{NOT_A_TABLE} NoneType of object."),
    "text": ("rows.csv", TypeError, f"{NOT_A_TABLE} str of <U8: pyro_maf.datasets.read_table reads a file."),
    "a sampler": (
        MCMC(HMC(lambda: None), 1),
        TypeError,
        f"{NOT_A_TABLE} MCMC of object: pass its draws, get_samples().",
    ),
    "lists with None": (
        [[1.0, None]] * 20,
        ValueError,
        "fit expected finite data, got nan in row 0, column 1 (20 of 20 rows have such values): drop those rows or",
    ),
    "None in a frame": (
        FRAME.assign(weight=[None, *range(199)]).astype({"weight": object}),
        ValueError,
        "fit expected finite data, got nan in row 0, column 'weight' (1 of 200 rows have such values): drop those rows",
    ),
    "dates": (np.zeros((20, 2), "datetime64[s]"), TypeError, f"{NOT_A_TABLE} ndarray of datetime64[s]."),
    "complex array": (ROWS + 1j, TypeError, f"{NOT_A_TABLE} ndarray of complex128."),
    "complex tensor": (
        torch.zeros(20, 2, dtype=torch.complex64),
        TypeError,
        "fit expected data of real numbers, got torch.complex64.",
    ),
    "sparse tensor": (
        torch.eye(20, 2).to_sparse(),
        TypeError,
        "fit expected data to be a dense tensor, got torch.sparse_coo: pass it .to_dense().",
    ),
    "dates in a frame": (
        FRAME.assign(weight=pd.date_range("2020", periods=200)),
        TypeError,
        "]: put seconds or days since the first in its place, or drop it.",
    ),
    "objects in a frame": (
        FRAME.assign(weight=[object()] * 200),
        TypeError,
        "fit expected data of numeric columns, got column 'weight' of object: drop it or encode it.",
    ),
    "whole numbers that are one in float64": (
        FRAME.assign(weight=np.uint64(2**64 - 1) - np.arange(200, dtype="uint64")),
        ValueError,
        "got 1.84467e+19 in every row of column 'weight' in float64: subtract what the rows have in common while they "
        "are integers or text, or drop that column.",
    ),
    "text in a frame": (
        FRAME.assign(weight=pd.Categorical(["light", "heavy"] * 100)),
        ValueError,
        "fit expected a MAF of input_dim 1 and context_dim 2, as 'weight' holds categories, which the flow sees as "
        "2 one-hot features, got input_dim 2 and context_dim 0: build it so, or leave it out, fit(data).",
    ),
}


@pytest.mark.parametrize(("data", "error", "message"), BAD_DATA.values(), ids=BAD_DATA.keys())
def test_bad_data_is_refused(data: Any, error: type[Exception], message: str) -> None:
    model = small_maf()
    before = weights(model)
    with pytest.raises(error, match=re.escape(message)):
        fit(model, data, **QUICK)
    assert model.training
    assert same(weights(model), before)


def test_values_that_the_dtype_of_the_model_cannot_hold_are_refused() -> None:
    with pytest.warns(UserWarning, match=r"heavy tails in column 0 \(up to .* as 1e\+39\)"):
        fit(small_maf(), changed(3, 0, 1e39), **QUICK)
    with pytest.raises(ValueError, match=re.escape("got inf in row 3, column 0")):
        fit(small_maf().float(), changed(3, 0, 1e39), **QUICK)
    near, far = (fit(small_maf().float(), ROWS + offset, **QUICK) for offset in (0.0, 1e10))
    assert far.validation_log_likelihood == pytest.approx(near.validation_log_likelihood, abs=1e-3)


BAD_CONTEXT: dict[str, tuple[Any, type[Exception], str]] = {
    "missing": (
        None,
        ValueError,
        "fit expected context with 1 column (context_dim of ConditionalMAF), got none.",
    ),
    "shorter": (
        CONTEXT[:150],
        ValueError,
        "fit expected as many rows of context as of data, got 150 and 200.",
    ),
    "too wide": (
        ROWS,
        ValueError,
        "fit expected context of shape (rows, 1), 1 being the context_dim of ConditionalMAF, got (200, 2).",
    ),
    "NaN": (changed(5, 0, math.nan)[:, :1], ValueError, "fit expected finite context, got nan in row 5, column 0"),
    "constant": (
        pd.DataFrame({"dose": [1.5] * 200}),
        ValueError,
        "fit expected context that varies in every column, got 1.5 in every row of column 'dose': drop that column.",
    ),
    "text": (["a"] * 200, TypeError, "fit expected context to be a tensor, array or data frame of numbers, got list"),
    "name": ("dose", TypeError, "got str of <U4: pass the columns, as frame[['dose']]"),
}


@pytest.mark.parametrize(("context", "error", "message"), BAD_CONTEXT.values(), ids=BAD_CONTEXT.keys())
def test_a_bad_context_is_refused(context: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fit(small_conditional(), ROWS, context=context, **QUICK)


def test_data_may_be_named() -> None:
    assert torch.equal(fit(data=ROWS, **QUICK).score(ROWS), fit(ROWS, **QUICK).score(ROWS))


def test_a_superfluous_context_is_refused() -> None:
    message = "fit got context for MAF, which takes none: leave it out or build a conditional model."
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(small_maf(), ROWS, context=CONTEXT, **QUICK)


A_PART = "fit expected validation as a fraction between 0 and 1, or as data, got"
BAD_VALIDATION: dict[str, tuple[Any, type[Exception], str]] = {
    "nothing": (0.0, ValueError, f"{A_PART} 0.0."),
    "everything": (1, ValueError, f"{A_PART} 1."),
    "NaN": (math.nan, ValueError, f"{A_PART} nan."),
    "four parts": (
        (ROWS, CONTEXT, None, None),
        ValueError,
        "fit expected validation as data or a tuple (data, context) or (data, context, weights), got a tuple of 4.",
    ),
    "no context": (
        ROWS,
        ValueError,
        "fit expected validation context with 1 column (context_dim of ConditionalMAF), got none.",
    ),
    "shorter context": (
        (ROWS, CONTEXT[:3]),
        ValueError,
        "fit expected as many rows of validation context as of validation data, got 3 and 200.",
    ),
    "too wide": (
        (CONTEXT, CONTEXT),
        ValueError,
        "fit expected validation data of shape (rows, 2), 2 being the input_dim of ConditionalMAF, got (200, 1).",
    ),
    "no rows": ((ROWS[:0], CONTEXT[:0]), ValueError, "fit expected validation data with rows in it, got shape (0, 2)."),
    "a missing value": (
        (changed(2, 0, math.nan), CONTEXT),
        ValueError,
        "fit expected finite validation data, got nan in row 2, column 0",
    ),
    "text": ("0.1", TypeError, "fit expected validation data to be a tensor, array or data frame of numbers, got str"),
}


@pytest.mark.parametrize(("validation", "error", "message"), BAD_VALIDATION.values(), ids=BAD_VALIDATION.keys())
def test_bad_validation_is_refused(validation: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fit(small_conditional(), ROWS, context=CONTEXT, validation=validation, **QUICK)


BAD_OPTIONS: list[tuple[str, Any, type[Exception], str]] = [
    ("batch_size", 0, ValueError, "fit expected batch_size of at least 1, got 0."),
    ("batch_size", 2.0, TypeError, "fit expected batch_size to be an int, got 2.0."),
    ("max_epochs", 0, ValueError, "fit expected max_epochs of at least 1, got 0."),
    ("patience", True, TypeError, "fit expected patience to be an int, got True."),
    ("seed", -1, ValueError, "fit expected seed of at least 0, got -1."),
    ("seed", 2**63, ValueError, f"fit expected seed below 2**63, got {2**63}."),
    ("learning_rate", 0, ValueError, "fit expected learning_rate above 0 and finite, got 0."),
    ("learning_rate", math.inf, ValueError, "fit expected learning_rate above 0 and finite, got inf."),
    ("learning_rate", "1e-3", TypeError, "fit expected learning_rate to be a number, got '1e-3'."),
    ("max_grad_norm", -1.0, ValueError, "fit expected max_grad_norm above 0, got -1.0."),
    ("max_grad_norm", math.nan, ValueError, "fit expected max_grad_norm above 0, got nan."),
    ("weight_decay", -0.1, ValueError, "fit expected weight_decay above 0 and finite, got -0.1."),
    ("weight_decay", math.nan, ValueError, "fit expected weight_decay above 0 and finite, got nan."),
    ("progress", "yes", ValueError, "fit expected progress to be True, False or \"always\", got 'yes'."),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_OPTIONS)
def test_bad_options_are_refused(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fit(small_maf(), ROWS, **{**QUICK, name: value})


def test_gradient_clipping_can_be_disabled() -> None:
    assert fit(small_maf(), ROWS, max_grad_norm=math.inf, **QUICK).best_epoch > 0


A_CONDITION = "if that comes from a context, pass the conditional density, and context=."
BAD_MODELS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a network": (lambda: torch.nn.Linear(2, 2), TypeError, "fit expected a flow or a density, got Linear."),
    "a class": (lambda: MAF, TypeError, "fit expected a flow or a density, got type."),
    "no weights": (
        lambda: Permute([1, 0]),
        ValueError,
        "fit expected a model with weights to train, got Permute with none.",
    ),
    "frozen weights": (
        lambda: small_maf().requires_grad_(False),
        ValueError,
        "fit expected a model with weights to train, got MAF with none.",
    ),
    "a flow at contexts": (
        lambda: small_conditional().condition(torch.zeros(7, 1).double()),
        ValueError,
        f"fit expected a single density, got MAF with batch shape (7,): {A_CONDITION}",
    ),
    "a density at contexts": (
        lambda: ConditionalMADEMoG(2, 1).condition(torch.zeros(7, 1)),
        ValueError,
        f"fit expected a single density, got MADEMoG with batch shape (7,): {A_CONDITION}",
    ),
    "batch norm of single rows": (
        lambda: MAF(2, batch_norm=True, **SMALL),
        ValueError,
        "fit expected batches of at least 2 rows for a model with batch norm, got 180 training rows and batch_size 1.",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD_MODELS.values(), ids=BAD_MODELS.keys())
def test_models_that_cannot_be_fitted_are_refused(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fit(make(), ROWS, **{**QUICK, "batch_size": 1})


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    message = "fit needs lightning-fabric, which is not installed: pip install pyro-maf[all]."
    with pytest.raises(ModuleNotFoundError, match=re.escape(message)):
        fit(small_maf(), ROWS, devices=2, **QUICK)
    assert fit(small_maf(), ROWS, **QUICK).epochs  # a single process needs none


@pytest.mark.parametrize(
    "row",
    [
        {"height": None, "weight": 1.0},
        {"height": [None], "weight": [1.0]},
        pd.DataFrame({"height": [None], "weight": [1.0]}),
        pd.Series({"height": None, "weight": 1.0}),
        [[None, 1.0]],
    ],
    ids=["numbers", "lists", "frame", "series", "nested"],
)
def test_none_is_a_missing_number_in_any_form(row: Any) -> None:
    result = fit(MAF(2, num_layers=1, hidden_dims=[4]), FRAME, max_epochs=1, progress=False)
    assert result.score(row).isnan().tolist() == [True]


@pytest.mark.parametrize(
    "dtype",
    [object, pd.ArrowDtype(pa.decimal128(12, 9)), pd.SparseDtype("float64", 0.0)],
    ids=["decimals", "decimals of Arrow", "sparse"],
)
def test_numbers_of_any_dtype_are_numbers(dtype: Any) -> None:
    rounded = FRAME.round(9)
    given = [Decimal(f"{value:.9f}") for value in rounded["weight"]]
    weight = pd.Series(rounded["weight"] if isinstance(dtype, pd.SparseDtype) else given, FRAME.index).astype(dtype)
    result, plain = (fit(small_maf(), frame, **QUICK) for frame in (rounded.assign(weight=weight), rounded))
    assert result.validation_loss == plain.validation_loss
    assert result.sample(3)["weight"].shape == (3,)  # type: ignore[call-overload, index]
