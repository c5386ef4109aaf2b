"""Rows on disk are streamed, and fits are equal to those of the same rows in memory."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_maf import MAF, ConditionalMAF, fit
from pyro_maf._core.processes import Processes
from pyro_maf.support import Support
from pyro_maf.tables import MappedRows, Reader, disk
from pyro_maf.tables.moments import moments_of
from pyro_maf.tables.rows import Split
from pyro_maf.tables.units import units_of
from pyro_maf.training import batches as batches_module
from pyro_maf.training.batches import Batches
from tests.fits import GAUSSIAN, gaussian_rows, mean_log_prob, same, seeded, weights

ROWS = 3001
QUICK: dict[str, Any] = {"batch_size": 100, "max_epochs": 3, "learning_rate": 1e-2, "progress": False}


@pytest.fixture(autouse=True)
def _small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit memory to a few hundred rows."""
    monkeypatch.setattr(disk, "IN_MEMORY", 0)
    monkeypatch.setattr(disk, "BLOCK_BYTES", 64 * 2 * 8)
    monkeypatch.setattr(batches_module, "BLOCKS_AT_ONCE", 6)


def mapped(path: Path, rows: Any, mode: Any = "r") -> Any:
    np.save(path, np.asarray(rows))
    return np.load(path, mmap_mode=mode)


def model(context_dim: int = 0) -> Any:
    shape: dict[str, Any] = {"num_layers": 1, "hidden_dims": [8]}
    return seeded(lambda: ConditionalMAF(1, 1, **shape) if context_dim else MAF(2, **shape))


def unsplit(table: Any) -> MappedRows:
    return MappedRows(table, None, Reader("fit", 2, 0, support=Support("fit", "real", 2)))


def divided(path: Path, table: Any, seed: int = 0) -> Split:
    return unsplit(mapped(path / "rows.npy", table)).split(0.1, torch.Generator().manual_seed(seed))


def numbered_rows(path: Path, rows: int = ROWS) -> tuple[Any, Tensor]:
    """Divided rows on disk, numbered in their first column, and the same in memory."""
    table = torch.stack([torch.arange(float(rows)), torch.randn(rows, generator=torch.Generator().manual_seed(0))], 1)
    return divided(path, table.double()), table.double()


def numbers(batches: Any) -> list[list[int]]:
    return [batch.data[:, 0].long().tolist() for batch in batches]


def test_every_training_row_is_visited_once_per_pass(tmp_path: Path) -> None:
    rows, _ = numbered_rows(tmp_path)
    batches = Batches(rows.training, 100, torch.Generator().manual_seed(0), Processes())
    held_out = set(rows.held_out.data[:, 0].long().tolist())
    first, second = numbers(batches), numbers(batches)
    assert 0.09 * ROWS < len(held_out) < 0.12 * ROWS
    for dealt in (first, second):
        assert len(dealt) == len(batches)
        assert sorted(itertools.chain.from_iterable(dealt)) == sorted(set(range(ROWS)) - held_out)
        assert batches.smallest <= min(map(len, dealt))
        assert max(map(len, dealt)) < 150
    assert first != second


@pytest.mark.parametrize("more", [1, 2, 60])
def test_a_small_remainder_is_not_a_batch(more: int, tmp_path: Path) -> None:
    rows, _ = numbered_rows(tmp_path, rows=64 * 6 * 2 + more)
    batches = Batches(rows.training, 100, torch.Generator().manual_seed(0), Processes())
    assert batches.smallest > 50
    assert min(map(len, numbers(batches))) >= batches.smallest


def test_rows_may_have_any_memory_layout(tmp_path: Path) -> None:
    table = gaussian_rows(ROWS).numpy()
    for number, laid_out in enumerate([table, np.asfortranarray(table), table.astype(">f8")]):
        for mode in ("r", "r+", "c"):
            rows = mapped(tmp_path / f"{number}.npy", laid_out, mode)
            for view in (slice(None), slice(None, None, -1), slice(5, None, 3)):
                assert disk.is_mapped(rows[view])
                assert np.array_equal(unsplit(rows[view]).take(slice(64, 128)).data, table[view][64:128])


@pytest.mark.parametrize("kind", [np.int16, np.bool_, np.float16])
def test_numbers_of_any_kind_are_streamed(kind: Any, tmp_path: Path) -> None:
    table = (gaussian_rows(ROWS).numpy() > 0).astype(kind)
    rows = mapped(tmp_path / "rows.npy", table)
    assert disk.is_mapped(rows)
    assert np.array_equal(unsplit(rows).take(slice(128, 192)).data, table[128:192])


def test_structured_arrays_are_refused(tmp_path: Path) -> None:
    rows = np.zeros(ROWS, [("x", "f8"), ("y", "f8")])
    with pytest.raises(TypeError, match="expected data to be a tensor, array or data frame of numbers, got memmap"):
        fit(model(), mapped(tmp_path / "rows.npy", rows), **QUICK)


def test_a_file_that_changes_during_a_fit_is_not_trusted(tmp_path: Path) -> None:
    rows, _ = numbered_rows(tmp_path)
    other = np.load(tmp_path / "rows.npy", mmap_mode="r+")
    batches = Batches(rows.training, 100, torch.Generator().manual_seed(0), Processes())
    other[2345, 1] = math.nan
    other.flush()
    with pytest.raises(ValueError, match="got nan in row 2345, column 1"):
        list(batches)


def test_rows_from_far_apart_share_a_batch(tmp_path: Path) -> None:
    rows, _ = numbered_rows(tmp_path)
    batches = numbers(Batches(rows.training, 100, torch.Generator().manual_seed(0), Processes()))
    spread = [max(batch) - min(batch) for batch in batches]
    assert sum(spread) / len(spread) > ROWS / 2


def test_a_pass_is_resumed_where_it_was(tmp_path: Path) -> None:
    rows, _ = numbered_rows(tmp_path)
    batches = Batches(rows.training, 100, torch.Generator().manual_seed(0), Processes())
    order = batches.order(0)
    whole = numbers(batches)
    for taken in (1, 5, len(whole) - 1):
        batches.load(order, taken)
        again = list(batches)
        assert again[:taken] == [()] * taken
        assert numbers(again[taken:]) == whole[taken:]


def test_units_are_those_of_the_training_rows(tmp_path: Path) -> None:
    rows, table = numbered_rows(tmp_path)
    kept = torch.ones(ROWS, dtype=torch.bool)
    kept[rows.held_out.data[:, 0].long()] = False
    units, context = rows.training.sample().moments(Support("fit", "real", 2))
    expected = moments_of(table[kept])
    torch.testing.assert_close(units.loc, expected.loc, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(units.scale, expected.scale, rtol=1e-12, atol=1e-12)
    assert context is None


def test_tails_are_those_of_the_training_rows(tmp_path: Path) -> None:
    rows = gaussian_rows(800)
    rows[:, 0] /= gaussian_rows(800, seed=1)[:, 0]
    result = fit(model().double(), mapped(tmp_path / "rows.npy", rows), validation=0.4, **QUICK)
    training = rows.clone()[~torch.isin(torch.arange(800), torch.as_tensor(result.validation_places))]
    expected = units_of(moments_of(training), training).tails
    assert expected is not None
    assert torch.allclose(result.density.tails, expected, rtol=1e-6)


def test_copies_of_a_row_are_on_one_side_of_the_split(tmp_path: Path) -> None:
    drawn = gaussian_rows(500)[torch.randint(500, (ROWS,), generator=torch.Generator().manual_seed(0))]
    rows = divided(tmp_path, drawn)
    batches = Batches(rows.training, 100, torch.Generator().manual_seed(0), Processes())
    dealt, held_out = torch.cat([batch.data for batch in batches]), rows.held_out.data
    assert 0.09 * ROWS < len(held_out) < 0.11 * ROWS
    assert len(dealt) == ROWS - len(held_out) == sum(rows.training.sizes)
    both = torch.cat([dealt.unique(dim=0), held_out.unique(dim=0)])
    assert len(both) == len(both.unique(dim=0)) == len(drawn.unique(dim=0))
    assert rows.repeats == pytest.approx(ROWS - len(drawn.unique(dim=0)), rel=0.02)


def test_rows_that_repeat_are_counted_while_they_are_streamed(tmp_path: Path) -> None:
    table = mapped(tmp_path / "rows.npy", gaussian_rows(600).repeat_interleave(5, 0))
    with pytest.warns(UserWarning, match=r"fit found 2,4\d\d of 3,000 rows to repeat an earlier one"):
        result = fit(model(), table, validation=gaussian_rows(50, seed=1), **QUICK)
    assert result.repeats == pytest.approx(2400, abs=50)


@pytest.mark.parametrize("values", [1, 3])
def test_a_row_of_many_copies_stays_for_training(values: int, tmp_path: Path) -> None:
    table, repeats = gaussian_rows(ROWS), torch.arange(ROWS) % 4 > 0
    table[repeats] = gaussian_rows(values, seed=1)[torch.arange(int(repeats.sum())) % values]
    for seed in range(4):
        rows = divided(tmp_path, table, seed)
        held_out = rows.held_out.data
        assert 0.03 * ROWS < len(held_out) == len(held_out.unique(dim=0)) < 0.11 * ROWS


def test_a_fit_says_which_rows_it_held_out(tmp_path: Path) -> None:
    rows = gaussian_rows()
    for data in (mapped(tmp_path / "rows.npy", rows), rows):
        result = fit(model(), data, max_epochs=1, validation=0.2, progress=False)
        assert result.rows == len(rows)
        assert result.validation_places is not None
        assert 0 < len(result.validation_places) < len(rows) / 2
        assert result.validation_rows is not None
        assert torch.equal(
            result.validation_rows.data, torch.as_tensor(rows)[result.validation_places].to(torch.float32)
        )
    result = fit(model(), rows, max_epochs=1, validation=gaussian_rows(seed=1)[:50], progress=False)
    assert (result.rows, result.validation_places) == (len(rows), None)


def test_categories_are_divided_row_by_row(tmp_path: Path) -> None:
    table = torch.stack([torch.arange(ROWS) % 2, torch.arange(ROWS) % 3], 1).double()
    rows = divided(tmp_path, table)
    assert len(rows.held_out.data.unique(dim=0)) == 6
    assert sum(rows.training.sizes) == ROWS - len(rows.held_out.data)


def test_a_sample_is_of_as_many_rows_as_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = numbered_rows(tmp_path)
    assert len(rows.training.sample().data) == sum(rows.training.sizes)
    for limit in ("MOST_HELD", "MOST_SAMPLED"):
        monkeypatch.setattr(disk, limit, 500)
    rows, _ = numbered_rows(tmp_path)
    sample = rows.training.sample().data
    assert 500 <= len(sample) <= 500 + len(rows.training.starts)
    assert sample[:, 0].mean() == pytest.approx(ROWS / 2, rel=0.1)
    assert len(rows.held_out.data) <= 0.12 * ROWS


@pytest.mark.parametrize("support", ["real", "positive"])
def test_a_fit_to_a_mapped_file_learns(support: str, tmp_path: Path) -> None:
    rows = gaussian_rows(ROWS)
    data = rows.exp() if support == "positive" else rows
    result = fit(model().double(), mapped(tmp_path / "rows.npy", data), support=support, **{**QUICK, "max_epochs": 15})
    known = GAUSSIAN.log_prob(rows).mean().item() - (rows.sum(1).mean().item() if support == "positive" else 0.0)
    assert mean_log_prob(result.density, data) == pytest.approx(known, abs=0.05)


def test_a_context_is_streamed_with_its_data(tmp_path: Path) -> None:
    table = mapped(tmp_path / "rows.npy", gaussian_rows(ROWS))
    result = fit(model(1).double(), table[:, 1:], context=table[:, :1], **{**QUICK, "max_epochs": 15})
    rows = torch.from_numpy(np.array(table))
    given = result.density.condition(rows[:, :1]).log_prob(rows[:, 1:]).mean().item()
    apart = GAUSSIAN.log_prob(rows) - torch.distributions.Normal(3.0, 1.0).log_prob(rows[:, 0])
    assert given == pytest.approx(apart.mean().item(), abs=0.05)


def test_a_fit_to_a_mapped_file_resumes_bit_for_bit(tmp_path: Path) -> None:
    table = mapped(tmp_path / "rows.npy", gaussian_rows(ROWS))
    whole = fit(model(), table, **QUICK)
    fit(model(), table, folder=tmp_path / "fit", **{**QUICK, "max_epochs": 1})
    again = fit(model(), table, folder=tmp_path / "fit", resume=True, **QUICK)
    assert same(weights(whole.density), weights(again.density))


def test_the_sample_is_read_from_the_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = numbered_rows(tmp_path)
    batches = Batches(rows.training, 100, torch.Generator().manual_seed(0), Processes())
    first = batches.sample()
    monkeypatch.setattr(MappedRows, "take", lambda *_: pytest.fail("the file was read again"))
    assert torch.equal(batches.sample().data, first.data)


def test_batch_norm_takes_its_statistics_from_the_sample(tmp_path: Path) -> None:
    flow = seeded(lambda: MAF(2, num_layers=1, hidden_dims=[8], batch_norm=True))
    result = fit(flow, mapped(tmp_path / "rows.npy", gaussian_rows(ROWS)), **QUICK)
    assert math.isfinite(result.validation_log_likelihood)
    assert not torch.equal(flow[0].mean, torch.zeros(2))


def test_writes_to_a_private_copy_stay(tmp_path: Path) -> None:
    table = mapped(tmp_path / "rows.npy", gaussian_rows(ROWS), "c")
    table[:] = np.asarray(gaussian_rows(ROWS, seed=1))
    fit(model(), table, **QUICK)
    assert np.array_equal(table, np.asarray(gaussian_rows(ROWS, seed=1)))


def test_a_row_that_is_wrong_is_named_by_its_place_in_the_file(tmp_path: Path) -> None:
    rows = gaussian_rows(ROWS)
    rows[2345, 1] = math.nan
    with pytest.raises(ValueError, match=r"^fit expected finite data, got nan in row 2345, column 1: drop"):
        fit(model(), mapped(tmp_path / "rows.npy", rows), **QUICK)
    rows[2345, 1] = 1.0
    with pytest.raises(ValueError, match=r"got -.* in row \d+: move those rows inside"):
        fit(model(), mapped(tmp_path / "rows.npy", rows), support="positive", **QUICK)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (gaussian_rows(ROWS)[:, :1], r"expected data of shape \(rows, 2\)"),
        (torch.cat([gaussian_rows(ROWS)[:, :1], torch.ones(ROWS, 1)], 1), "got 1 in every row of column 1"),
    ],
    ids=["width", "constant"],
)
def test_bad_tables_are_refused(rows: Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        fit(model(), mapped(tmp_path / "rows.npy", rows), **QUICK)


def test_a_context_of_another_length_is_refused(tmp_path: Path) -> None:
    table = mapped(tmp_path / "rows.npy", gaussian_rows(ROWS))
    with pytest.raises(ValueError, match=f"as many rows of context as of data, got {ROWS - 1} and {ROWS}"):
        fit(model(1), table[:, :1], context=table[1:, 1:], **QUICK)


def test_a_small_file_is_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    table = mapped(tmp_path / "rows.npy", gaussian_rows(ROWS))
    assert not disk.is_mapped(table)
    assert same(weights(fit(model(), table, **QUICK).density), weights(fit(model(), np.array(table), **QUICK).density))
