"""Weights of rows: a row counts as often as its weight says."""

from __future__ import annotations

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
from pyro_maf import MAF, ConditionalMAF, FlowPrior, fit, fit_prior
from pyro_maf._core.checks import InputError
from pyro_maf._core.processes import Processes
from pyro_maf.cli.commands import app
from pyro_maf.datasets import read_table
from pyro_maf.report import write_report
from pyro_maf.support import Support
from pyro_maf.tables import MappedRows, Reader, Rows, disk
from pyro_maf.tables.moments import context_moments_of, moments_of
from pyro_maf.training.batches import Batches
from pyro_maf.training.screening import screen_data
from tests.fits import gaussian_rows, same, small_maf, weights

WHOLE: dict[str, Any] = {"batch_size": 10_000, "max_epochs": 5, "learning_rate": 1e-2, "progress": False}
DATA, NEW = gaussian_rows(120), gaussian_rows(40, seed=1)
OFTEN = torch.arange(120) % 4


def copies(rows: Tensor, often: Tensor = OFTEN) -> Tensor:
    return rows.repeat_interleave(often, 0)


def test_a_row_of_weight_k_is_k_rows() -> None:
    # In these units the first gradients are well above rounding, which Adam would amplify to noticeable steps.
    weighted, repeated = FlowPrior(small_maf()), FlowPrior(small_maf())
    one = fit(weighted, DATA, weights=OFTEN, validation=(NEW, None, OFTEN[:40]), **WHOLE)
    with pytest.warns(UserWarning, match="repeat an earlier one"):
        other = fit(repeated, copies(DATA), validation=copies(NEW, OFTEN[:40]), **WHOLE)
    assert one.train_loss == pytest.approx(other.train_loss, rel=1e-9)
    assert one.validation_loss == pytest.approx(other.validation_loss, rel=1e-9)
    for name, tensor in weights(weighted).items():
        torch.testing.assert_close(tensor, weights(repeated)[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("factor", [2.0**-20, 1.0, 2.0**20])
def test_only_ratios_of_weights_matter(factor: float) -> None:
    one, other = small_maf(), small_maf()
    fit(one, DATA, weights=OFTEN, **WHOLE)
    fit(other, DATA, weights=factor * OFTEN, **WHOLE)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(tensor, weights(other)[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("is_mapped", [False, True])
def test_equal_weights_are_none(is_mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: Any = DATA
    if is_mapped:
        monkeypatch.setattr(disk, "IN_MEMORY", 0)
        np.save(tmp_path / "rows.npy", DATA.numpy())
        rows = np.load(tmp_path / "rows.npy", mmap_mode="r")
    models = [small_maf() for _ in range(3)]
    results = [fit(models[0], rows, **WHOLE)]
    results += [
        fit(model, rows, weights=each * np.ones(120), **WHOLE) for model, each in zip(models[1:], (1, 0.3), strict=True)
    ]
    for model, result in zip(models[1:], results[1:], strict=True):
        assert same(weights(models[0]), weights(model))
        assert result.validation_loss == results[0].validation_loss
        assert torch.equal(result.validation_places, results[0].validation_places)


def test_units_are_those_of_copies() -> None:
    result: Any = fit(small_maf(), DATA, weights=OFTEN, validation=NEW, **WHOLE)
    expected = moments_of(copies(DATA))
    torch.testing.assert_close(result.density.loc, expected.loc, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.density.scale, expected.scale, rtol=1e-12, atol=0)


def test_batches_of_weighted_rows_have_an_unbiased_loss() -> None:
    rows = Rows(DATA, None, OFTEN.double()).normalised()
    batches = list(Batches(rows, 7, torch.Generator().manual_seed(0), Processes()))
    values = [batch.weighted(batch.data[:, 0]).sum() for batch in batches if isinstance(batch, Rows)]
    assert float(sum(values)) / 120 == pytest.approx(copies(DATA)[:, 0].mean().item(), rel=1e-12)
    assert rows.mean(DATA[:, 0]) == pytest.approx(copies(DATA)[:, 0].mean().item(), rel=1e-12)


@pytest.mark.parametrize("moments", [moments_of, context_moments_of])
def test_moments_are_those_of_copies(moments: Any) -> None:
    rows = torch.cat([gaussian_rows(500), torch.full((4, 2), 1e6, dtype=torch.float64)])
    often = torch.arange(504) % 3
    one = moments(rows, weights=often)
    other = moments(copies(rows, often), weights=torch.ones(int(often.sum())))
    plain = moments(copies(rows, often))
    for mine, its, about in zip(one, other, plain, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=0)
        torch.testing.assert_close(mine, about, rtol=0.05, atol=0)


def test_the_score_of_validation_is_weighted() -> None:
    result = fit(small_maf(), DATA, weights=1 + OFTEN, **WHOLE)
    assert result.validation_rows is not None
    assert result.validation_places is not None
    assert result.validation_rows.weights is not None
    assert torch.allclose(
        result.validation_rows.weights * 2.5, (1.0 + OFTEN)[result.validation_places].double(), rtol=0.3
    )
    scores = result.score(result.validation_rows.data)
    assert result.validation_rows.mean(scores) == pytest.approx(result.validation_log_likelihood, rel=1e-12)
    assert scores.mean().item() != pytest.approx(result.validation_log_likelihood, rel=1e-3)


def test_rows_without_weight_are_on_neither_side() -> None:
    far = torch.cat([DATA, torch.full((30, 2), 1e9, dtype=torch.float64)])
    often = torch.cat([torch.ones(120), torch.zeros(30)])
    result = fit(small_maf(), far, weights=often, **WHOLE)
    assert not any("repeat" in line or "tails" in line for line in result.warnings)
    assert result.validation_rows is not None
    assert result.validation_rows.data.max() < 100
    assert result.density.scale.max() < 5


def test_a_heavy_row_is_for_training() -> None:
    often = torch.ones(120, dtype=torch.float64)
    often[7] = 1000.0
    for seed in range(5):
        training, _, places, _ = Rows(DATA, None, often).split(0.1, torch.Generator().manual_seed(seed))
        assert 7 not in places
        assert len(training.data) + len(places) == 120


def test_weights_may_be_a_column_of_any_table(tmp_path: Path) -> None:
    frame = pd.DataFrame(DATA.numpy(), columns=["a", "b"]).assign(often=OFTEN.numpy())
    frame.to_csv(tmp_path / "rows.csv", index=False)
    table = read_table(tmp_path / "rows.csv", weights="often", dtype="float64")
    assert table.names == ("a", "b")
    assert table.weights is not None
    models = [small_maf() for _ in range(5)]
    fit(models[0], DATA, weights=OFTEN.numpy(), **WHOLE)
    result = fit(models[1], frame, weights="often", **WHOLE)
    assert list(result.sample(2).columns) == ["a", "b"]
    assert result.score(frame).shape == (120,)
    fit(models[2], {"b": DATA, "often": OFTEN}, weights="often", **WHOLE)
    fit(models[3], table, **WHOLE)
    fit_prior(frame, models[4], weights="often", **WHOLE)
    assert all(same(weights(models[0]), weights(model)) for model in models)


TO_REFUSE: dict[str, tuple[Any, str]] = {
    "negative": (OFTEN - 1, "expected finite weights of at least 0, got -1.0 in row 0 (30 of 120 rows"),
    "infinite": (OFTEN.double() * math.inf, "got nan in row 0"),
    "nothing": (0 * OFTEN, "expected some weights above 0, got 0 for every row."),
    "short": (OFTEN[1:], "expected weights of shape (120,), one for each row of data, got (119,)."),
    "unknown": ("often", "expected weights as one of several columns or as an array, got 'often' of columns"),
    "few": (torch.arange(120) < 9, "expected at least 10 rows of data with a weight above 0, got 9."),
}


@pytest.mark.parametrize(("often", "message"), TO_REFUSE.values(), ids=TO_REFUSE.keys())
def test_bad_weights_are_refused(often: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^fit ") as error:
        fit(small_maf(), DATA, weights=often, **WHOLE)
    assert message in str(error.value)


def test_the_row_of_a_bad_weight_is_said() -> None:
    often = torch.ones(120)
    often[17] = -2
    with pytest.raises(InputError) as error:
        fit(small_maf(), DATA, weights=often, **WHOLE)
    assert error.value.row == 17


def test_weights_beside_those_of_a_table_are_refused(tmp_path: Path) -> None:
    pd.DataFrame({"a": range(40), "often": 1}).to_csv(tmp_path / "rows.csv", index=False)
    table = read_table(tmp_path / "rows.csv", weights="often")
    with pytest.raises(ValueError, match=r"^fit got weights with a Table that has its own: leave them out.$"):
        fit(MAF(1), table, weights=np.ones(40))
    with pytest.raises(ValueError, match=r"^read_table expected weights that are neither data nor context"):
        read_table(tmp_path / "rows.csv", context=["often"], weights="often")


def test_another_weight_is_another_fit(tmp_path: Path) -> None:
    fit(small_maf(), DATA, weights=OFTEN, folder=tmp_path, **WHOLE)
    longer = {**WHOLE, "max_epochs": 6}
    swapped = OFTEN.clone()
    swapped[1:3] = OFTEN[[2, 1]]
    with pytest.raises(ValueError, match=r"other data in .* \(other rows, weights"):
        fit(small_maf(), DATA, weights=swapped, folder=tmp_path, resume=True, **longer)
    resumed, whole = small_maf(), small_maf()
    assert fit(resumed, DATA, weights=OFTEN, folder=tmp_path, resume=True, **longer).epochs == 6
    fit(whole, DATA, weights=OFTEN, **longer)
    assert same(weights(resumed), weights(whole))


def test_streamed_rows_have_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "IN_MEMORY", 0)
    monkeypatch.setattr(disk, "BLOCK_BYTES", 64 * 2 * 8)
    data, often = gaussian_rows(1000), (torch.arange(1000) % 4).double()
    np.save(tmp_path / "rows.npy", data.numpy())
    np.save(tmp_path / "weights.npy", often.numpy())
    mapped, on_disk = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("rows", "weights"))
    reader = Reader("fit", 2, 0, support=Support("fit", "real", 2))
    training, held_out, places, _ = MappedRows(mapped, None, reader, on_disk).split(
        0.1, torch.Generator().manual_seed(0)
    )
    assert held_out.weights is not None
    assert torch.equal(held_out.weights, often[places])
    model = small_maf()
    result = fit(model, mapped, weights=on_disk, test=0, **WHOLE)
    read = training.rounded_for(result.density).read(range(len(training.sizes)))
    assert read.weights is not None
    assert read.weights.sum().item() == pytest.approx(sum(training.sizes))
    assert read.mean(read.data[:, 0]) == pytest.approx(result.density.loc[0].item(), abs=1e-9)
    again = small_maf()
    fit(again, mapped, weights=often, test=0, **WHOLE)
    assert same(weights(model), weights(again))
    with pytest.raises(ValueError, match=r"as many weights as rows of data, got 999 and 1000."):
        fit(small_maf(), mapped, weights=often[1:], **WHOLE)


def test_what_a_table_is_warned_of_depends_on_weights() -> None:
    tail = torch.randn(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tail[:10] = 1e4
    reader = Reader("fit", 1, 0, support=Support("fit", "real", 1))
    light = torch.ones(500)
    light[:10] = 0
    assert "heavy tails" in "".join(screen_data(Rows(tail, None), reader))
    assert screen_data(Rows(tail, None, light), reader) == []


def test_a_context_has_weighted_units() -> None:
    model = ConditionalMAF(1, 1, num_layers=1, hidden_dims=[8]).double()
    result: Any = fit(
        model, DATA[:, :1], context=DATA[:, 1:], weights=OFTEN, validation=(NEW[:, :1], NEW[:, 1:]), **WHOLE
    )
    assert result.density.unwrapped.context_loc.item() == pytest.approx(copies(DATA)[:, 1].mean().item(), rel=1e-9)


def test_a_report_weighs_its_rows(tmp_path: Path) -> None:
    result = fit(small_maf(), DATA, **WHOLE)
    write_report(tmp_path / "one.html", result, NEW, weights=OFTEN[:40], progress=False)
    write_report(tmp_path / "two.html", result, copies(NEW, OFTEN[:40]), progress=False)
    expected = f"{result.score(copies(NEW, OFTEN[:40])).mean():.3f}"
    assert all(expected in (tmp_path / name).read_text() for name in ("one.html", "two.html"))


def test_the_command_weighs_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pd.DataFrame(DATA.numpy(), columns=["a", "b"]).assign(often=OFTEN.numpy()).to_csv("rows.csv", index=False)
    options = ["--folder", "weighted", "--max-epochs", "2", "--num-layers", "1", "--hidden-dims", "8"]
    result = CliRunner().invoke(app, ["fit", "rows.csv", "--weights", "often", *options])
    assert result.exit_code == 0, result.output
    density = pyro_maf.load("weighted/model.safetensors")
    assert density.input_dim == 2
    assert density.loc[0].item() == pytest.approx(copies(DATA)[:, 0].mean().item(), abs=0.3)
    score = CliRunner().invoke(app, ["score", "weighted", "rows.csv", "--out", "scores.csv"])
    assert score.exit_code == 0, score.output
    unknown = CliRunner().invoke(app, ["fit", "rows.csv", "--weights", "oftn", "--folder", "other"])
    assert unknown.exit_code == 2
    assert "did you mean" in unknown.output
