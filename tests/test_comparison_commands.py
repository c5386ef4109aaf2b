"""`pyro-maf compare` and `pyro-maf paper`: their files, their resumption and their errors."""

from __future__ import annotations

import dataclasses
import json
from typing import get_args

import numpy as np
import pytest
from typer.testing import CliRunner

from pyro_maf.cli.commands import app
from pyro_maf.cli.compare import DataSet
from pyro_maf.cli.shared_options import Row
from pyro_maf.experiments import ROWS, SETTINGS, candidates, comparison
from pyro_maf.saving import unpack

QUICK = ["--max-epochs", "2", "--models", "Gaussian,MADE", "--hidden-dims", "8", "--hidden-dims", "16"]


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture
def wine(tmp_path):
    rng = np.random.default_rng(0)
    colours = rng.integers(2, size=200)
    rows = rng.normal(size=(200, 2)) + 3 * colours[:, None]
    lines = [f"{a:.5f},{b:.5f},{('red', 'white')[c]}" for (a, b), c in zip(rows, colours, strict=True)]
    path = tmp_path / "wine.csv"
    path.write_text("\n".join(["acid,sugar,colour", *lines]))
    return path


def test_compare_writes_a_table_in_two_formats_and_models_for_score(invoke, wine, tmp_path):
    result = invoke("compare", wine, "--context", "colour", *QUICK)
    assert result.exit_code == 0, result.output
    assert "Gaussian" in result.stdout
    assert "MADE 16: " in result.stderr
    folder = tmp_path / "wine-comparison"
    found = json.loads((folder / "comparison.json").read_text())
    assert (found["data"], found["context_dim"], found["rows"]["test"]) == ("wine", 2, 20)
    assert [line["model"] for line in found["models"]] == ["Gaussian", "MADE"]
    assert "| MADE |" in (folder / "comparison.md").read_text().replace("**", "")
    scored = invoke("score", folder / "made-8", wine)
    assert scored.exit_code == 0, scored.output
    assert len(scored.stdout.splitlines()) == 201


def test_help_lists_the_models_in_the_spelling_of_the_table(invoke):
    assert get_args(Row) == tuple(ROWS)
    text = " ".join(invoke("compare", "--help").stdout.replace("│", " ").split())
    assert ", ".join(ROWS) in text


def test_models_are_taken_in_either_spelling():
    for name, slug in {
        "made-mog": "made-mog",
        "maf": "maf-5",
        "MAF-10": "maf-10",
        "realnvp (10)": "realnvp-10",
    }.items():
        assert [one.slug for one in candidates([name])] == [slug]
    assert [one.name for one in candidates(["maf", "MAF (5)"])] == ["MAF (5)"]
    with pytest.raises(ValueError, match=r"expected names among Gaussian, .*, got iaf, maf-7"):
        candidates(["iaf", "maf-7"])


def test_a_name_of_a_table_is_no_markup(invoke, wine, tmp_path):
    wine.rename(tmp_path / "a[bold] [")
    result = invoke("compare", "a[bold] [", "--columns", "acid,sugar", "--models", "gaussian", "--folder", "out")
    assert result.exit_code == 0, result.output
    assert "a[bold] [ (2)" in result.stdout


def test_compare_resumes_after_an_interruption(invoke, wine, monkeypatch):
    fit = comparison.fit
    with monkeypatch.context() as patched:
        patched.setattr(
            comparison,
            "fit",
            lambda *args, **named: dataclasses.replace(
                fit(*args, **named), stop_reason="interrupted", interrupted=True
            ),
        )
        result = invoke("compare", wine, "--columns", "acid,sugar", *QUICK)
    assert result.exit_code == 130
    assert "interrupted before MADE. The same command resumes from there." in result.stderr
    again = invoke("compare", wine, "--columns", "acid,sugar", *QUICK)
    assert again.exit_code == 0, again.output
    assert "MADE" in again.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden-dims", "wide"], "compare expected --hidden-dims as numbers such as 128,128, got wide."),
        (["--models", "NAF"], "candidates expected names among Gaussian, MADE"),
        (["--test", "2", "--context", "colour"], "divide expected test as a fraction between 0 and 1, got 2.0"),
        (["--columns", "salt"], "read_table found no column 'salt'"),
    ],
)
def test_compare_refuses_in_one_line(invoke, wine, options, message):
    result = invoke("compare", wine, *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_without_a_single_score_compare_fails(invoke, tmp_path):
    (tmp_path / "line.csv").write_text("\n".join(["a,b", *(f"{i},{2 * i}" for i in range(40))]))
    result = invoke("compare", tmp_path / "line.csv", "--models", "Gaussian")
    assert result.exit_code == 2
    assert "Gaussian is left out: fit_gaussian expected rows with a covariance of full rank" in result.stderr


def test_compare_calls_columns_by_name(invoke, wine, tmp_path):
    wine.write_text("\n".join(["acid,sugar", *(f"{value},1" for value in range(100))]))
    result = invoke("compare", wine, "--models", "MADE")
    assert result.exit_code == 2
    assert "column 'sugar'" in result.stderr


def test_paper_repeats_an_experiment_next_to_the_published_figures(invoke, tmp_path):
    folder = tmp_path / "archive" / "miniboone"
    folder.mkdir(parents=True)
    np.save(folder / "data.npy", np.random.default_rng(0).normal(size=(300, 43)))
    options = ["--models", "Gaussian,MADE", "--max-epochs", "1", "--learning-rate", "0.01"]
    result = invoke("paper", "miniboone", "--root", tmp_path / "archive", *options)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "miniboone-paper" / "unconditional.json").read_text())
    assert [line["published"] for line in found["models"]] == [-37.24, -15.59]
    assert "-37.24" in result.stdout
    tried = sorted(path.name for path in (tmp_path / "miniboone-paper" / "unconditional").iterdir())
    assert tried == ["gaussian", "made-512", "made-512x512"]
    score = tmp_path / "miniboone-paper" / "unconditional" / "made-512" / "score.safetensors"
    options = json.loads(unpack(score, comparison.FILE).text)["fingerprint"]["options"]
    assert (options["learning_rate"], options["batch_size"]) == (0.01, 100)


def test_paper_knows_every_set_of_the_settings(invoke):
    assert list(DataSet.__args__) == list(SETTINGS)
    result = invoke("paper", "POWER", "--root", "nowhere")
    assert result.exit_code == 2
    assert "power" in result.stderr
