"""Warnings of a fit: each kind names its column and a remedy, and ordinary tables cause none."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import datasets
from typer.testing import CliRunner

from pyro_maf import MAF, ConditionalMAF, fit, fit_prior
from pyro_maf.cli.commands import app
from pyro_maf.support import Support
from pyro_maf.tables import Reader, rows_of
from pyro_maf.tables.reader import Labels
from pyro_maf.training.screening import screen_data, screen_ending
from pyro_maf.training.state import Schedule

Array = np.ndarray[Any, Any]
SHAPES: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda random, rows: random.normal(5e6, 0.1, rows),
    "uniform": lambda random, rows: random.random(rows),
    "exponential": lambda random, rows: random.exponential(3.0, rows),
    "gamma": lambda random, rows: random.gamma(2.0, 1.0, rows),
    "two modes": lambda random, rows: random.choice([-3.0, 3.0], rows) + random.normal(size=rows),
    "t (5)": lambda random, rows: random.standard_t(5, rows),
    "log-normal (0.5)": lambda random, rows: random.lognormal(0.0, 0.5, rows),
    "seconds": lambda random, rows: 1.7e9 + np.arange(rows),
}
HEAVY: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "Cauchy": lambda random, rows: random.standard_cauchy(rows),
    "t (1.5)": lambda random, rows: random.standard_t(1.5, rows),
    "log-normal (2)": lambda random, rows: random.lognormal(0.0, 2.0, rows),
    "one outlier": lambda random, rows: np.append(random.normal(size=rows - 1), 1e6),
}


def screened(data: Any, context: Any = None, support: Any = "real") -> list[str]:
    widths = [0 if table is None else np.shape(table)[1] if np.ndim(table) > 1 else 1 for table in (data, context)]
    labels = {"labels": Labels.of(data), "context_labels": Labels.of(context)}
    reader = Reader("fit", *widths, support=Support("fit", support, widths[0]), **labels)
    return screen_data(rows_of(data, context, reader), reader)


def normal(seed: int, rows: int = 500, columns: int = 3) -> Array:
    return np.random.default_rng(seed).normal(size=(rows, columns))


def quick(model: Any, *arguments: Any, **options: Any) -> Any:
    return fit(model, *arguments, **{"max_epochs": 1, "progress": False, **options})


@pytest.mark.parametrize("rows", [50, 500, 5000, 50_000])
def test_tables_without_defects_cause_no_warning(rows: int) -> None:
    for seed in range(10 if rows < 5000 else 2):
        random = np.random.default_rng(seed)
        table = np.stack([draw(random, rows) for draw in SHAPES.values()], 1)
        assert screened(table, normal(seed, rows)) == []
        assert screened(torch.from_numpy(table), np.eye(3)[random.integers(0, 3, rows)]) == []


@pytest.mark.parametrize("load", [datasets.load_iris, datasets.load_wine, datasets.load_breast_cancer])
def test_small_real_tables_cause_no_warning(load: Callable[[], Any]) -> None:
    assert screened(load().data) == []


def test_few_values_are_named_with_their_column() -> None:
    frame = pd.DataFrame(normal(0), columns=["a", "b", "c"]).assign(grade=np.arange(500) % 5)
    (line,) = screened(frame)
    assert line.startswith("fit found few distinct values in column 'grade' (5 in 500 rows): ")
    assert all(advice in line for advice in ("context", "--categories", "Dequantise"))
    hours = np.concatenate([normal(0, 5000, 1), np.arange(5000)[:, None] % 24], 1)
    assert screened(hours)[0].startswith("fit found few distinct values in column 1 (24 in 5,000 rows)")
    assert screened(pd.DataFrame({"flag": np.arange(50) % 2 == 0})) != []
    assert screened(frame.assign(grade=frame["grade"] + normal(1)[:, 0])) == []
    assert re.search(r"column 0 .* column 2 .* and 61 more columns:", screened(datasets.load_digits().data)[0])


@pytest.mark.parametrize("seed", range(3))
def test_a_value_that_many_rows_share_is_named(seed: int) -> None:
    rain = np.random.default_rng(seed).exponential(size=(500, 1)) * (np.arange(500)[:, None] % 3 > 0)
    (line,) = screened(np.concatenate([normal(seed), rain], 1))
    assert line.startswith("fit found a value that many rows share in column 3 (0 in 33% of rows): ")


@pytest.mark.parametrize("seed", range(3))
def test_columns_that_follow_from_others_are_named_with_these(seed: int) -> None:
    rows = normal(seed) * [1.0, 30.0, 1e-3] + [0.0, 1e5, 1.0]
    frame = pd.DataFrame(rows, columns=["a", "b", "c"])
    (line,) = screened(frame.assign(d=frame["b"]))
    assert line.startswith("fit found that column 'd' repeats column 'b': ")
    (line,) = screened(frame.assign(d=(frame["b"] / 2.54).round(1)))
    assert "column 'd' is a multiple, up to a shift, of column 'b'" in line
    (line,) = screened(np.concatenate([rows, rows[:, :1] + rows[:, 2:] / 1e-3, normal(seed + 9)], 1))
    assert "column 3 is a linear combination of column 0 and column 2:" in line
    one_hot = np.eye(3)[np.arange(500) % 3] + 0.01 * normal(seed)[:, :1]
    assert any("linear combination" in line for line in screened(np.concatenate([rows, one_hot], 1)))
    (line,) = screened(rows[:, :2], frame[["c", "a"]])
    assert "column 0 repeats context column 'a'" in line
    assert screened(normal(seed), one_hot.round()) == []
    # Similar but not equal columns; as many columns as rows; a shared outlier; a simplex.
    assert screened(frame.assign(d=frame["b"] + 0.9 * normal(seed + 9)[:, 0])) == []
    assert screened(normal(seed, 30, 30)) == []
    outlier = np.concatenate([rows, np.full((1, 3), -9e9)])
    assert all("heavy tails" in line for line in screened(outlier))
    assert screened(np.random.default_rng(seed).dirichlet([3.0] * 4, 500), support="simplex") == []


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_tails_are_named_with_what_compresses_them(name: str) -> None:
    for seed in range(3):
        random = np.random.default_rng(seed)
        column = HEAVY[name](random, 1000)
        (line,) = screened(np.stack([random.normal(size=1000), column], 1))
        assert line.startswith("fit found heavy tails in column 1 (up to ")
        assert ('support="positive"' in line) == (column.min() > 0)
        assert ("arcsinh" in line) == (column.min() <= 0)
        if column.min() > 0:
            assert screened(column, support="positive") == []


@pytest.mark.parametrize("seed", range(3))
def test_a_context_over_orders_of_magnitude_is_named_with_its_logarithm(seed: int) -> None:
    random = np.random.default_rng(seed)
    context = np.stack([random.exponential(size=500), np.exp(3 * random.normal(size=500))], 1)
    (line,) = screened(normal(seed), context)
    assert line.startswith("fit found values over orders of magnitude in context column 1 (a twentieth below ")
    assert line.endswith("Give its logarithm as context.")
    context[::5, 1] = 0
    assert "arcsinh" in screened(normal(seed), context)[0]
    (line,) = screened(normal(seed), pd.DataFrame({"dose": 10 ** random.uniform(-3, 3, 500)}))
    assert "context column 'dose'" in line
    assert screened(normal(seed, 1000), random.standard_t(1.5, 1000))[0].startswith("fit found heavy tails in context")


@pytest.mark.parametrize("seed", range(3))
def test_a_context_over_orders_of_magnitude_is_warned_of_and_its_logarithm_is_not(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    context = torch.exp(3 * torch.randn(1000, 1, generator=generator))
    rows = context.log() + 0.5 * torch.randn(1000, 1, generator=generator)
    with pytest.warns(UserWarning, match="context column 0 .* Give its logarithm"):
        quick(ConditionalMAF(1, 1, num_layers=1), rows, context=context)
    assert not any("context" in line for line in quick(ConditionalMAF(1, 1), rows, context=context.log()).warnings)


def ending(losses: list[float], *, first: float = 9.0, patience: int = 30, has_more: bool = True) -> list[str]:
    schedule = Schedule(1e-3, patience)
    for epoch, loss in enumerate([first, *losses]):
        schedule.improves(epoch, loss)
    return screen_ending(losses, schedule, has_more=has_more, has_skipped=False)


def test_too_few_epochs_and_a_best_epoch_of_0_are_said() -> None:
    falling = [8 - epoch / 10 for epoch in range(40)]
    (line,) = ending(falling)
    assert (
        line == "fit reached max_epochs (40) while the validation log-likelihood was still improving: raise max_epochs."
    )
    assert ending(falling, has_more=False) == []
    assert ending([*falling, *[4.2] * 10]) == []
    assert ending([*[3.0] * 30, *(3 - 1e-4 * epoch for epoch in range(10))]) == []
    assert ending([2.0]) != []
    (line,) = ending([4.0, 5.0], first=3.0)
    assert "best epoch at 0" in line
    assert "lower learning_rate" in line


def test_warnings_are_in_the_result_and_point_at_the_call() -> None:
    frame = pd.DataFrame(normal(0), columns=["a", "b", "c"]).assign(d=lambda frame: frame["a"])
    for call in (
        lambda: quick(MAF(4, num_layers=1), frame),
        lambda: fit_prior(frame, max_epochs=1, progress=False),
    ):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            result = call()
        assert "column 'd' repeats column 'a'" in str(seen[0].message)
        assert {warning.filename for warning in seen} == {__file__}
    result = quick(MAF(4, num_layers=1), normal(0, columns=4), max_epochs=3, learning_rate=1.0)
    assert (result.best_epoch, len(result.warnings)) == (0, 1)
    assert "; 1 warning, see .warnings)" in repr(result)
    assert "best epoch at 0" in result.warnings[0]


def test_a_streamed_table_is_screened_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "rows.npy", normal(0, 20_000, 2).round())
    monkeypatch.setattr("pyro_maf.tables.disk.IN_MEMORY", 0)
    with pytest.warns(UserWarning, match=r"few distinct values in column 0 \(\d+ in 10,000 rows\)"):
        quick(MAF(2, num_layers=1), np.load(tmp_path / "rows.npy", mmap_mode="r"), batch_size=5000, dequantise=False)


def test_the_command_says_them_by_name_and_the_report_shows_them(tmp_path: Path) -> None:
    frame = pd.DataFrame(normal(0, columns=2), columns=["height", "mass"]).assign(
        twice=lambda frame: 2 * frame["height"], dose=np.exp(3 * normal(1)[:, 0])
    )
    frame.to_csv(tmp_path / "rows.csv", index=False)
    command = ["fit", str(tmp_path / "rows.csv"), "--context", "dose", "--flow", "maf", "--max-epochs", "2"]
    done = CliRunner().invoke(app, [*command, "--folder", str(tmp_path / "out")])
    assert done.exit_code == 0
    lines = [
        "fit found that column 'twice' is a multiple, up to a shift, of column 'height'",
        "fit found values over orders of magnitude in context column 'dose'",
        "fit reached max_epochs (2)",
    ]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")
    facts = CliRunner().invoke(app, ["info", str(tmp_path / "out")]).stdout
    for line in lines:
        assert done.stderr.count(f"pyro-maf: {line}") == 1
        assert line in page
        assert line in facts
