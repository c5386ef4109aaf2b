"""Training, validation and test rows: the test rows affect no choice."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from pyro_maf import MAF, ConditionalMAF, fit, fit_prior
from pyro_maf.distributions import TableDensity
from pyro_maf.report import write_report
from pyro_maf.tables import disk
from pyro_maf.training import FitResult
from pyro_maf.training.parts import fractions_of
from tests.fits import SHARED, seeded

SMALL: dict[str, Any] = {"num_layers": 1, "hidden_dims": [8]}
QUICK: dict[str, Any] = {"max_epochs": 2, "batch_size": 200, "progress": False}


def rows(number: int = 1000, columns: int = 2) -> Tensor:
    return 5 + torch.randn(number, columns, generator=torch.Generator().manual_seed(0))


def fitted(data: Any, **options: Any) -> FitResult:
    return fit(seeded(lambda: MAF(2, **SMALL)), data, **{**QUICK, **options})


def check_score(result: FitResult) -> None:
    """Check that the test score is that of the reported test rows."""
    assert result.test is not None
    assert result.test_rows is not None
    data, context, weights = result.test_rows
    scores = result.score(data, context).double()
    assert result.test.rows == len(data)
    assert result.test.mean == pytest.approx(np.average(scores, weights=weights), rel=1e-6)
    if weights is None:
        assert result.test.standard_error == pytest.approx(float(scores.std()) / math.sqrt(len(data)), rel=1e-2)


def test_a_thousand_rows_have_three_parts_and_the_test_part_chose_nothing() -> None:
    result = fitted(rows())
    check_score(result)
    assert result.test_places is not None
    assert result.validation_places is not None
    aside = torch.cat([result.validation_places, result.test_places])
    assert (len(result.validation_places), len(result.test_places), len(aside.unique())) == (100, 100, 200)
    assert torch.equal(rows()[result.test_places], result.test_rows.data)  # type: ignore[union-attr]
    training = torch.ones(1000, dtype=torch.bool)
    training[aside] = False
    loc = result.density.unwrapped.loc  # type: ignore[union-attr]
    assert torch.allclose(loc, rows()[training].mean(0), rtol=1e-5)
    # Other test rows change nothing else.
    changed = rows()
    changed[result.test_places] = changed[result.test_places].flip(1) + 0.5
    again = fitted(changed, test=0.1)
    assert again.validation_loss == result.validation_loss
    assert torch.equal(again.score(rows()), result.score(rows()))
    assert again.test != result.test
    assert repr(result).startswith(f"FitResult(test log-likelihood {result.test.mean:.3f} nats, standard error ")  # type: ignore[union-attr]


@pytest.mark.filterwarnings(SHARED)
def test_when_there_is_a_test_part() -> None:
    data = rows()
    assert fitted(data[:999]).test is fitted(data, test=0).test is fitted(data, validation=data[:50]).test is None
    assert fitted(data[:200], test=0.2).test.rows == 40  # type: ignore[union-attr]
    both = fitted(data, validation=data[:50], test=0.2)
    check_score(both)
    assert (both.test.rows, len(both.validation_rows.data)) == (200, 50)  # type: ignore[union-attr]
    assert fractions_of(0.8, None, 1000) == pytest.approx((0.8, 0.1))
    with pytest.raises(ValueError, match="fit expected test as a fraction of at least 0 that leaves rows to train"):
        fitted(data, test=0.95)
    prior = fit_prior(data, MAF(2, **SMALL), max_epochs=1, progress=False)
    whole = fitted(data, test=0, max_epochs=1)
    assert torch.equal(prior.loc, whole.density.loc)  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", [3, 5, 11])
def test_a_flow_of_few_rows_has_rows_enough_to_end_by(seed: int) -> None:
    """With two validation rows of 24, the chosen epochs have far too small scales, 8 to 159 nats behind on new rows."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.tensor([[1.0, 0.5, 0.2], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
    few, new = (torch.randn(count, 3, generator=generator) @ mixing for count in (24, 2000))
    truth = torch.distributions.MultivariateNormal(torch.zeros(3), mixing.T @ mixing).log_prob(new).mean()
    result = fit(MAF(3, seed=seed), few, seed=seed, progress=False)
    assert (truth - result.score(new).mean()).item() < 1


def test_copies_are_in_one_part() -> None:
    draws = rows(500)[torch.randint(500, (2000,), generator=torch.Generator().manual_seed(1))]
    with pytest.warns(UserWarning, match="repeat an earlier one"):
        result = fitted(draws)
    check_score(result)
    tested, validated = result.test_rows.data, result.validation_rows.data  # type: ignore[union-attr]
    parts = torch.cat([tested.unique(dim=0), validated.unique(dim=0)])
    assert len(parts) == len(parts.unique(dim=0)) > 80
    assert len(result.test_places) == sum(int((draws == row).all(1).sum()) for row in tested.unique(dim=0))  # type: ignore[arg-type]


def test_weights_and_contexts_have_a_test_part_too() -> None:
    often = torch.arange(2000.0) % 4
    result = fitted(rows(2000), weights=often)
    check_score(result)
    assert result.test_rows.weights.min() > 0  # type: ignore[union-attr]
    assert 0.05 < often[result.test_places].sum() / often.sum() < 0.15  # type: ignore[index]
    model = seeded(lambda: ConditionalMAF(2, 1, **SMALL))
    check_score(fit(model, rows(), context=rows(1000, 1), **QUICK))


def test_streamed_rows_have_a_test_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "IN_MEMORY", 0)
    monkeypatch.setattr(disk, "BLOCK_BYTES", 64 * 2 * 8)
    table = rows(3000).numpy()
    np.save(tmp_path / "rows.npy", table)
    result = fitted(np.load(tmp_path / "rows.npy", mmap_mode="r"))
    check_score(result)
    places = torch.cat([result.validation_places, result.test_places])  # type: ignore[list-item]
    assert len(places.unique()) == len(places)
    assert len(result.test_places) == pytest.approx(300, rel=0.2)  # type: ignore[arg-type]
    assert np.array_equal(table[result.test_places], result.test_rows.data)  # type: ignore[index, union-attr]


def test_a_table_of_counts_is_tested_by_its_probabilities() -> None:
    counts = torch.poisson(4 * torch.ones(1200), torch.Generator().manual_seed(0))
    frame = pd.DataFrame({"n": counts.numpy(), "x": rows(1200)[:, 0].numpy()})
    with pytest.warns(UserWarning, match="fit found values on a grid"):
        result = fit(seeded(lambda: MAF(2, **SMALL)), frame, **QUICK)
    assert isinstance(result.density, TableDensity)
    check_score(result)


def test_another_test_part_is_another_fit(tmp_path: Path) -> None:
    fitted(rows(), folder=tmp_path)
    with pytest.raises(ValueError, match="or validation rows"):
        fitted(rows(), folder=tmp_path, resume=True, test=0.2)
    again = fitted(rows(), folder=tmp_path, resume=True, max_epochs=3)
    assert again.test == fitted(rows(), max_epochs=3).test


def test_the_report_is_about_the_test_rows(tmp_path: Path) -> None:
    result = fitted(rows())
    write_report(tmp_path / "report.html", result, progress=False)
    page = (tmp_path / "report.html").read_text()
    assert "<dt>Log-likelihood of test rows</dt>" in page
    assert f"<b>{result.test.mean:.3f} ± {2 * result.test.standard_error:.3f}</b>" in page  # type: ignore[union-attr]
    assert "these rows took no part in any choice" in page
    assert "<b>100 of 1,000</b><small>held out for test</small>" in page
    assert "of rows that chose the epoch" in page


def test_a_test_row_far_out_is_left_out_and_named() -> None:
    place = int(fitted(rows()).test_places[0])  # type: ignore[index]
    far = rows()
    far[place] = 1e6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warning of heavy tails
        result = fitted(far)
    assert any(f"fit left 1 of the test rows out, the first of them row {place}:" in line for line in result.warnings)
    assert result.test.rows == 99  # type: ignore[union-attr]
