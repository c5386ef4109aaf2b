"""The command line: files, output and exit codes of each command."""

from __future__ import annotations

import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import pyro_maf
import pyro_maf.report
from pyro_maf.cli import fit as fit_module
from pyro_maf.cli import score_and_sample
from pyro_maf.cli.commands import app
from pyro_maf.experiments import build
from pyro_maf.experiments.models import FLOWS, STACKS

ROOT = Path(__file__).parent.parent
NAMES = ["length", "width"]
QUICK = ("--flow", "maf", "--max-epochs", "2", "--hidden-dims", "16", "--num-layers", "2", "--batch-size", "50")
FILES = {"model.safetensors", "fit.json", "log.csv", "checkpoint.safetensors", "report.html"}


def frame() -> pd.DataFrame:
    """200 rows with two columns of data and two of context, a text and a number."""
    random = np.random.default_rng(0)
    age = random.integers(20, 80, 200)
    colour = np.array(["blue", "red"])[np.arange(200) % 2]
    length = random.normal(10, 2, 200) + age / 10
    rows = {"length": length, "width": random.normal(1, 0.1, 200) * length, "age": age}
    return pd.DataFrame(rows).astype(np.float32).assign(colour=colour)


def run(*arguments: Any, code: int = 0, given: bytes | None = None) -> Any:
    """Run a command, check its exit code and return its result."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=given)
    assert result.exit_code == code, (result.stderr, result.exception)
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table as csv, and fits to two of its columns without and with the others as context."""
    folder = tmp_path_factory.mktemp("cli")
    frame().to_csv(folder / "table.csv", index=False, float_format="%.9g")
    run("fit", folder / "table.csv", "--columns", "length,width", "--folder", folder / "plain", *QUICK)
    run(
        *("fit", folder / "table.csv", "--columns", "length", "--columns", "width", "--context", "colour,age"),
        *("--folder", folder / "given", *QUICK),
    )
    return folder


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with only the table."""
    (tmp_path / "table.csv").write_bytes((folder / "table.csv").read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def quick_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the report by a stub, to save time."""
    monkeypatch.setattr(pyro_maf.report, "write_report", lambda path, *rest, **options: path.write_text("a report"))


def rows_of(columns: list[str]) -> torch.Tensor:
    return torch.tensor(frame()[columns].to_numpy(np.float32))


def given_rows() -> torch.Tensor:
    """The table's context in the columns of the model: blue, red, age."""
    table = frame()
    columns = [table["colour"] == "blue", table["colour"] == "red", table["age"]]
    return torch.tensor(np.stack(columns, 1).astype(np.float32))


# -- fit ---------------------------------------------------------------------------------------------------------------


def test_fit_writes_a_complete_folder(here: Path) -> None:
    command = ["fit", "table.csv", "--columns", "length,width", "--context", "colour", "--seed", "3", *QUICK]
    result = run(*command)
    assert result.stdout == ""
    assert "200 rows of length, width given colour=blue, colour=red, to table-maf." in result.stderr
    assert {path.name for path in (here / "table-maf").iterdir() if path.is_file()} == FILES
    # As text first, since versions of pandas parse the last digit differently.
    log = pd.read_csv("table-maf/log.csv", dtype=str, usecols=["epoch", "validation_loss"]).astype(float)
    assert log["epoch"].tolist() == [1, 2]
    record = json.loads(Path("table-maf/fit.json").read_text())
    assert record["command"] == f"pyro-maf {' '.join(command)}"
    assert (record["rows"], record["data"], record["epochs"]) == (200, "table.csv", 2)
    assert record["validation_log_likelihood"] == -log["validation_loss"].min()
    model = pyro_maf.load("table-maf/model.safetensors")
    assert (type(model).__name__, model.input_dim, model.context_dim) == ("ConditionalFlowPrior", 2, 2)
    assert model.density.layout.columns == [("length", None), ("width", None)]
    assert model.density.context_layout.columns == [("colour", ["blue", "red"])]
    report = Path("table-maf/report.html").read_text()
    assert record["command"] in report
    assert "<h1>table.csv: MAF of 2 columns given 1 context column, 20" in report
    assert "<b>20 of 200</b><small>held out for validation</small>" in report
    assert "Log-likelihood of validation rows" in report
    assert "two standard errors; these rows also chose the epoch" in report
    lowest = [int(number) for number in re.findall(r"<tr><td>(\d+)</td>", report)]
    density = model.condition(given_rows()[:, :2])
    log_prob = density.log_prob(rows_of(NAMES)).detach()
    printed = [float(value) for value in re.findall(r"<tr><td>\d+</td><td>(.*?)</td>", report)]
    assert printed == pytest.approx([log_prob[row - 1].item() for row in lowest], abs=0.006)
    assert "colour=red" in report


def test_a_terminal_shows_a_message_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = SimpleNamespace(stderr=SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(fit_module, "sys", terminal)
    monkeypatch.chdir(tmp_path)
    message = run("fit", "nothing.csv", code=2).stderr
    assert message.startswith("pyro-maf: loading torch, some seconds.\n")


def test_fit_trains_as_the_library_does(folder: Path) -> None:
    model = build("maf", 2, num_layers=2, hidden_dims=[16])
    result = pyro_maf.fit(model, rows_of(NAMES), max_epochs=2, batch_size=50, progress=False)
    assert torch.equal(
        pyro_maf.load(folder / "plain" / "model.safetensors").log_prob(rows_of(NAMES)),
        result.density.log_prob(rows_of(NAMES)),
    )


@pytest.mark.usefixtures("quick_report")
def test_without_a_flow_fit_chooses_as_the_library_does(here: Path) -> None:
    run("fit", "table.csv", "--columns", "length,width", "--max-epochs", 2)
    result = pyro_maf.fit(frame()[NAMES], max_epochs=2, progress=False)
    saved = pyro_maf.load("table-fit/model.safetensors")
    assert repr(saved) == repr(result.density)
    assert torch.equal(saved.log_prob(rows_of(NAMES)), result.density.log_prob(rows_of(NAMES)))
    log = pd.read_csv("table-fit/log.csv")
    assert log["validation_loss"].tolist() == list(result.validation_loss)


@pytest.mark.usefixtures("quick_report")
def test_layers_widths_and_precision_override_the_choice_and_nothing_else(here: Path) -> None:
    run("fit", "table.csv", "--columns", "length,width", *QUICK[2:], "--precision", "double")
    model = pyro_maf.load("table-fit/model.safetensors").model
    assert (model.name, len(model.flow), model.dtype) == ("MixtureFlow", 2, torch.float64)
    assert "MaskedAutoregressive(2 -> 16 -> " in repr(model)


def test_text_among_the_data_is_categories_and_is_drawn_as_text(here: Path) -> None:
    frame().assign(is_old=frame()["age"] > 50).to_parquet("table.parquet")
    for ending, flow in (("csv", []), ("parquet", ["--flow", "maf"])):
        name = f"table.{ending}"
        result = run("fit", name, "--columns", "length,colour,width", "--max-epochs", 2, *flow)
        assert "200 rows of length, colour (2 categories), width, to table-" in result.stderr
        fitted = "table-maf" if flow else "table-fit"
        drawn = pd.read_csv(io.StringIO(run("sample", fitted, "-n", 50).stdout))
        assert drawn.columns.tolist() == ["length", "colour", "width"]
        assert set(drawn["colour"]) == {"blue", "red"}
        out = f"scores.{ending}"
        run("score", fitted, name, "--out", out)
        scores = (pd.read_csv if ending == "csv" else pd.read_parquet)(out)["log_density"]
        density = pyro_maf.load(f"{fitted}/model.safetensors")
        expected = density.log_prob(frame()).detach().numpy()
        assert scores.to_numpy() == pytest.approx(expected, abs=1e-4)
        assert "colour: blue, red" in run("info", fitted).stdout
    report = Path("table-fit/report.html").read_text()
    assert "<td>blue</td>" in report or "<td>red</td>" in report
    frame().assign(colour="green").to_csv("green.csv", index=False)
    assert "expected one of 'blue', 'red', got 'green'" in run("score", "table-fit", "green.csv", code=2).stderr


@pytest.mark.usefixtures("quick_report")
def test_labels_may_be_numbers_and_a_model_of_double_precision(here: Path) -> None:
    table = frame().assign(label=lambda rows: (rows["age"] > 40) * 10 + 2)
    table.to_csv(here / "labels.csv", index=False)
    shared = ("--columns", "length,width", "--precision", "double", "--max-epochs", 1)
    result = run("fit", "labels.csv", *shared, "--categories", "label", "--folder", "labels")
    assert "given label=2, label=12" in result.stderr
    model = pyro_maf.load(here / "labels" / "model.safetensors")
    assert (model.context_dim, next(model.parameters()).dtype) == (2, torch.float64)
    assert len(run("sample", "labels", "-n", 3, "--context", "label=12").stdout.splitlines()) == 4
    assert len(run("score", "labels", "labels.csv").stdout.splitlines()) == len(table) + 1


@pytest.mark.usefixtures("quick_report")
@pytest.mark.parametrize("flow", FLOWS)
def test_every_flow_is_fitted_with_and_without_context(here: Path, flow: str) -> None:
    for context in ([], ["--context", "age"]):
        folder = f"{flow}-{len(context)}"
        run(
            "fit",
            "table.csv",
            "--columns",
            "length,width",
            *context,
            "--flow",
            flow,
            "--folder",
            folder,
            "--max-epochs",
            1,
        )
        arguments = ["--context", "age=50"] if context else []
        assert len(run("sample", folder, "-n", 3, *arguments).stdout.splitlines()) == 4


@pytest.mark.usefixtures("quick_report")
def test_the_folder_is_named_after_the_data_and_the_flow(here: Path) -> None:
    np.savez(here / "all.npz", train=rows_of(NAMES).numpy(), test=rows_of(NAMES).numpy())
    run("fit", "all.npz:train", "--max-epochs", 1, "--flow", "gaussian")
    run("fit", "-", "--max-epochs", 1, "--flow", "made", given=frame()[NAMES].to_csv(index=False).encode())
    assert (here / "all-train-gaussian").is_dir()
    assert (here / "table-made").is_dir()
    assert json.loads((here / "table-made" / "fit.json").read_text())["data"] == "standard input"


@pytest.mark.usefixtures("quick_report")
def test_rows_to_validate_with_may_be_another_table(here: Path) -> None:
    frame()[:50][["width", "age", "length"]].to_parquet("other.parquet")
    run("fit", "table.csv", "--columns", "length,width", "--validation", "other.parquet", "--folder", "fit", *QUICK)
    density = pyro_maf.load("fit/model.safetensors")
    mean = density.log_prob(rows_of(NAMES)[:50]).mean().item()
    record = json.loads(Path("fit/fit.json").read_text())
    assert record["validation_log_likelihood"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.usefixtures("quick_report")
@pytest.mark.parametrize(
    ("asked", "support"),
    [
        (["positive"], ("positive", "positive")),
        (["real,positive"], ("real", "positive")),
        (["width=positive"], ("real", "positive")),
        (["positive", "width=real"], ("positive", "real")),
        (["length=interval(-5, 50),width=greater_than(-1)"], ("interval(-5.0, 50.0)", "greater_than(-1.0)")),
    ],
    ids=str,
)
def test_the_support_is_given_for_all_columns_or_by_name(
    here: Path, asked: list[str], support: tuple[str, ...]
) -> None:
    options = [word for item in asked for word in ("--support", item)]
    run("fit", "table.csv", "--columns", "length,width", *options, "--folder", "fit", *QUICK)
    samples = pyro_maf.load("fit/model.safetensors")
    name = samples.units.support.name
    assert (name if isinstance(name, tuple) else (name,) * 2) == support


@pytest.mark.usefixtures("quick_report")
def test_a_simplex_has_a_dimension_less_than_columns(here: Path) -> None:
    shares = np.random.default_rng(0).dirichlet([2, 3, 4], 200)
    pd.DataFrame(shares, columns=["a", "b", "c"]).to_csv("shares.csv", index=False)
    run("fit", "shares.csv", "--support", "simplex", "--folder", "fit", *QUICK)
    run("sample", "fit", "-n", 5, "--out", "drawn.csv")
    drawn = pd.read_csv("drawn.csv")
    assert drawn.columns.tolist() == ["a", "b", "c"]
    assert drawn.sum(axis=1).to_numpy() == pytest.approx(1, abs=1e-5)


@pytest.mark.usefixtures("quick_report")
def test_a_fit_is_not_overwritten_unasked(here: Path) -> None:
    command = ["fit", "table.csv", "--columns", "length,width", "--folder", "fit", *QUICK]
    run(*command)
    (here / "fit" / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in (here / "fit").iterdir() if path.is_file()}
    assert "found a fit in fit" in run(*command, code=2).stderr
    # Options that are validated only when the fit begins.
    assert "learning_rate above 0" in run(*command, "--overwrite", "--learning-rate", "-1", code=2).stderr
    after = {path.name: path.read_bytes() for path in (here / "fit").iterdir() if path.is_file()}
    assert after == before
    run(*command, "--overwrite", "--seed", "1")
    assert json.loads((here / "fit" / "fit.json").read_text())["command"].endswith("--overwrite --seed 1")
    assert (here / "fit" / "notes.txt").read_text() == "mine"
    assert {path.name for path in (here / "fit").iterdir() if path.is_file()} == {*FILES, "notes.txt"}
    assert [path.name for path in (here / "fit").glob(".*")] == []


@pytest.mark.usefixtures("quick_report")
def test_an_interrupted_fit_resumes_to_the_same_model(here: Path) -> None:
    command = ["fit", "table.csv", "--columns", "length,width", *QUICK[:2], *QUICK[4:], "--patience", "1000"]

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        log = here / "halves" / "log.csv"
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    result = run(*command, "--max-epochs", 10_000, "--folder", "halves", code=130)
    thread.join()
    line = result.stderr.strip().splitlines()[-1]
    assert re.fullmatch(r"pyro-maf: interrupted\. To resume: pyro-maf fit table\.csv .* --folder halves --resume", line)
    assert (here / "halves" / "model.safetensors").exists()
    epochs = len(pd.read_csv("halves/log.csv")) + 2
    run(*command, "--max-epochs", epochs, "--folder", "halves", "--resume")
    run(*command, "--max-epochs", epochs, "--folder", "whole")
    halves, whole = (pd.read_csv(f"{name}/log.csv").drop(columns="seconds") for name in ("halves", "whole"))
    assert halves.equals(whole)
    assert len(whole) == epochs
    models = [pyro_maf.load(f"{name}/model.safetensors").log_prob(rows_of(NAMES)) for name in ("halves", "whole")]
    assert torch.equal(*models)
    assert (here / "halves" / "report.html").exists()


def test_an_interrupted_fit_says_how_to_resume(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["fit", "table.csv", "--columns", "length,width", *QUICK]

    def cut_off(*rest: Any, folder: Path, **options: Any) -> None:
        folder.mkdir()
        (folder / "checkpoint.safetensors").write_text("a checkpoint")
        raise KeyboardInterrupt

    monkeypatch.setattr(pyro_maf.training, "fit", cut_off)
    result = run(*command, "--overwrite", code=130)
    assert result.stderr.splitlines()[-1].endswith(f"To resume: pyro-maf {' '.join(command)} --resume")


@pytest.mark.usefixtures("quick_report")
def test_resume_without_a_fit_starts_one(here: Path) -> None:
    run("fit", "table.csv", "--columns", "length,width", "--resume", "--folder", "fit", *QUICK)
    assert len(pd.read_csv("fit/log.csv")) == 2


def test_options_are_those_of_the_library() -> None:
    ours, theirs = (inspect.signature(function).parameters for function in (fit_module.FitOptions, pyro_maf.fit))
    for name in ("batch_size", "learning_rate", "weight_decay", "max_epochs", "patience", "seed", "devices"):
        assert ours[name].default == theirs[name].default
    assert get_args(fit_module.FlowName) == FLOWS
    assert fit_module.LAYERED == STACKS
    assert inspect.signature(build).parameters["num_layers"].default == fit_module.DEFAULT_LAYERS


# -- score -------------------------------------------------------------------------------------------------------------


def test_score_gives_the_log_density_of_every_row(folder: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        expected = pyro_maf.load(folder / "plain" / "model.safetensors").log_prob(rows_of(NAMES)).numpy()
    result = run("score", folder / "plain", folder / "table.csv")
    assert f"200 rows, mean log-density {expected.mean():.3f} nats" in result.stderr
    printed = pd.read_csv(io.StringIO(result.stdout))
    assert printed.columns.tolist() == ["log_density"]
    assert np.array_equal(printed["log_density"].to_numpy(np.float32), expected)
    for name in ("scores.csv", "scores.parquet"):
        result = run("score", folder / "plain", folder / "table.csv", "--out", tmp_path / name)
        read = pd.read_csv(tmp_path / name) if name.endswith("csv") else pd.read_parquet(tmp_path / name)
        assert np.array_equal(read["log_density"].to_numpy(np.float32), expected)
        assert result.stdout == ""


def test_score_reads_standard_input_and_finds_columns_by_name(folder: Path) -> None:
    table = frame()[["colour", "width", "age", "length"]].assign(note="text").to_csv(index=False, float_format="%.9g")
    density = pyro_maf.load(folder / "given" / "model.safetensors").condition(given_rows())
    with torch.no_grad():
        expected = density.log_prob(rows_of(NAMES)).numpy()
    printed = run("score", folder / "given", "-", given=table.encode()).stdout.split()[1:]
    assert np.array_equal(np.array(printed, np.float32), expected)


def test_large_tables_are_scored_in_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model in ("plain", "given"):
        whole = run("score", folder / model, folder / "table.csv").stdout.split()[1:]
        with monkeypatch.context() as patched:
            patched.setattr("pyro_maf.training.scores.VALUES_AT_ONCE", 14)
            parts = run("score", folder / model, folder / "table.csv").stdout.split()[1:]
        # Kernels round differently for other batch sizes.
        assert np.array(parts, np.float32) == pytest.approx(np.array(whole, np.float32), rel=1e-5)


@pytest.mark.usefixtures("quick_report")
def test_rows_outside_the_support_have_density_zero(here: Path) -> None:
    run("fit", "table.csv", "--columns", "length,width", "--support", "positive", "--folder", "fit", *QUICK)
    result = run("score", "fit", "-", given=b"length,width\n10,10\n-1,10\n")
    assert result.stdout.split()[2] == "-inf"
    assert re.search(r"2 rows, of which 1 has density 0 \(data row 2, counted from 1, is the first\)", result.stderr)


def test_a_model_without_its_folder_is_as_good(folder: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((folder / "given" / "model.safetensors").read_bytes())
    whole = run("score", folder / "given", folder / "table.csv")
    assert run("score", alone, folder / "table.csv").stdout == whole.stdout
    by_name = pyro_maf.load(alone).condition({"colour": "red", "age": 30.0})
    assert by_name.log_prob(torch.zeros(2)).isfinite()


def test_a_model_without_names_takes_columns_by_their_order(tmp_path: Path) -> None:
    rows = np.concatenate([rows_of(NAMES).numpy(), given_rows().numpy()], 1)
    np.save(tmp_path / "rows.npy", rows)
    density = pyro_maf.ConditionalFlowPrior(pyro_maf.ConditionalMAF(2, 3))
    density.save(tmp_path / "model.safetensors")
    scores = np.array(run("score", tmp_path, tmp_path / "rows.npy").stdout.split()[1:], float)
    with torch.no_grad():
        expected = density.eval().condition(given_rows()).log_prob(rows_of(NAMES)).numpy()
    assert scores == pytest.approx(expected, rel=1e-5)
    np.save(tmp_path / "rows.npy", rows[:, :4])
    message = "score expected 5 columns, 2 of data and then 3 of context, got 4"
    assert message in run("score", tmp_path, tmp_path / "rows.npy", code=2).stderr


@pytest.mark.usefixtures("quick_report")
@pytest.mark.parametrize("precision", ["single", "double"])
def test_columns_far_from_zero_are_fitted_scored_and_drawn_as_precisely_as_they_are(here: Path, precision: str) -> None:
    noise = np.random.default_rng(0).standard_normal((400, 3))
    table = pd.DataFrame(noise * [0.1, 1, 10] + [5.4e6, 0, 1.7e9], columns=["northing", "height", "time"])
    table.to_csv("utm.csv", index=False, float_format="%.6f")
    told = run("fit", "utm.csv", "--context", "time", "--precision", precision, "--folder", "fit", *QUICK).stderr
    truth = -(1 + np.log(2 * np.pi)) - np.log(0.1)
    assert float(re.search(r"log-likelihood (\S+) nats", told)[1]) == pytest.approx(truth, abs=0.4)
    scored = run("score", "fit", "utm.csv").stdout.split()[1:]
    assert np.array(scored, float).mean() == pytest.approx(truth, abs=0.2)
    # The model knows the precision of the columns, which one or two rows do not show.
    table[:2].to_csv("two.csv", index=False, float_format="%.6f")
    two = run("score", "fit", "two.csv").stdout.split()[1:]
    assert np.array(two, float) == pytest.approx(np.array(scored[:2], float), abs=1e-3)
    for out in ("drawn.csv", "drawn.parquet"):
        run("sample", "fit", "-n", 500, "--context", "time=1700000003", "--out", out)
        drawn = pd.read_csv(out) if out.endswith("csv") else pd.read_parquet(out)
        assert drawn["northing"].std() == pytest.approx(0.1, rel=0.15)
        assert drawn["northing"].nunique() > 490


def test_rows_on_disk_that_are_too_coarse_for_a_model_are_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = 5.4e6 + 0.1 * torch.randn(200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = pyro_maf.fit(build("made", 1), far, max_epochs=1, progress=False).density
    model.save(here / "far.safetensors")
    np.save(here / "coarse.npy", far.float().numpy())
    monkeypatch.setattr("pyro_maf.tables.table.BYTES_IN_MEMORY", 0)
    assert "Read the values in float64" in run("score", "far.safetensors", "coarse.npy", code=2).stderr


# -- sample ------------------------------------------------------------------------------------------------------------


def test_sample_draws_rows_with_their_names(folder: Path, tmp_path: Path) -> None:
    plain = folder / "plain"
    printed = run("sample", plain, "-n", 7, "--seed", 1).stdout
    lines = printed.splitlines()
    assert (lines[0], len(lines)) == ("length,width", 8)
    assert run("sample", plain, "-n", 7, "--seed", 1).stdout == printed
    assert run("sample", plain, "-n", 7, "--seed", 2).stdout != printed
    run("sample", plain, "-n", 7, "--seed", 1, "--out", tmp_path / "drawn.parquet")
    drawn = pd.read_parquet(tmp_path / "drawn.parquet")
    assert drawn.columns.tolist() == NAMES
    assert np.array_equal(drawn, pd.read_csv(io.StringIO(printed)).astype(np.float32))


def test_samples_are_those_of_the_density(folder: Path) -> None:
    printed = run("sample", folder / "given", "-n", 5, "--context", "age=30,colour=red", "--seed", 4).stdout
    density = pyro_maf.load(folder / "given" / "model.safetensors").condition(torch.tensor([0.0, 1.0, 30.0]))
    torch.manual_seed(4)
    drawn = np.array([line.split(",") for line in printed.splitlines()[1:]], np.float32)
    assert np.array_equal(drawn, density.sample((5,)).numpy())


def test_many_rows_are_drawn_in_batches(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_and_sample, "VALUES_AT_ONCE", 6)
    lines = run("sample", folder / "plain", "-n", 8).stdout.splitlines()
    assert len(lines) == 9
    assert len(set(lines)) == 9


# -- info --------------------------------------------------------------------------------------------------------------


def test_info_says_what_a_model_is_and_how_it_was_made(folder: Path) -> None:
    facts = run("info", folder / "given").stdout
    likelihood = json.loads((folder / "given" / "fit.json").read_text())["validation_log_likelihood"]
    for fact in (
        "ConditionalFlowPrior of MAF(input_dim=2, context_dim=3",
        "(1): MaskedAutoregressive(2 -> 16 -> 4, relu)",
        "columns     length, width",
        "given       colour: blue, red",
        "given       age",
        f"validation  log-likelihood {likelihood:.4f} nats after epoch",
        "stopped     reached max_epochs (2)",
        "data        200 rows of ",
        "made by     pyro-maf fit ",
    ):
        assert fact in facts
    alone = run("info", folder / "plain" / "model.safetensors").stdout
    assert "columns     length, width" in alone


def test_names_and_categories_of_context_may_hold_commas_and_equals_signs(tmp_path: Path) -> None:
    flow = pyro_maf.ConditionalMAF(2, 3, num_layers=1)
    labels = {"context_columns": [("x=1", ()), ("city", ())], "context_labels": [None, ["Paris, FR", "Rome"]]}
    pyro_maf.distributions.ConditionalFlowPrior(flow, **labels).save(tmp_path / "density.safetensors")
    for context in (["x=1=2,city=Paris, FR"], ["city=Paris, FR", "--context", "x=1=2"]):
        drawn = run("sample", tmp_path / "density.safetensors", "-n", 1, "--context", *context).stdout
        assert drawn.startswith("x1,x2\n")


def test_a_flow_that_was_saved_alone_is_a_density_too(tmp_path: Path) -> None:
    pyro_maf.MAF(2, num_layers=1).save(tmp_path / "flow.safetensors")
    pyro_maf.ConditionalMAF(2, 1, num_layers=1).save(tmp_path / "given.safetensors")
    assert "FlowPrior of MAF(input_dim=2" in run("info", tmp_path / "flow.safetensors").stdout
    assert run("sample", tmp_path / "flow.safetensors", "-n", 1).stdout.startswith("x1,x2\n")
    assert run("sample", tmp_path / "given.safetensors", "-n", 1, "--context", "c1=2").stdout.startswith("x1,x2\n")


# -- how it ends -------------------------------------------------------------------------------------------------------


FIT = ("fit", "{}/table.csv", "--columns", "length,width", "--folder", "new")
WRONG = {
    "no data": (("fit", "{}/none.csv"), "read_table expected a file at .*none.csv, found nothing"),
    "names among the data": (
        ("fit", "{}/names.csv"),
        r"got 'row 0' in data row 1 \(counted from 1\) of column 'name' of names.csv",
    ),
    "text to compare by": (("compare", "{}/table.csv"), "divide expected data of numbers, got text in column 'colour'"),
    "an unknown column": ((*FIT, "--context", "colours"), "no column 'colours' in table.csv: did you mean 'colour'?"),
    "a constant column": (
        ("fit", "{}/constant.csv", "--folder", "new"),
        "fit expected data that varies in every column, got 7 in every row of column 'b': drop that column",
    ),
    "outside the support": (
        (*FIT, "--support", "width=unit_interval"),
        r"in column 'width' \(support unit_interval\), got .* in data row \d+ \(counted from 1\)",
    ),
    "an unknown support": ((*FIT, "--support", "widht=positive"), "no column 'widht': the columns are length, width"),
    "two supports": ((*FIT, "--support", "real,real,width=positive"), "with 2 for all other columns"),
    "layers of one without": ((*FIT, "--flow", "made", "--num-layers", "3"), "fit got --num-layers for made"),
    "hidden layers of one without": (
        (*FIT, "--flow", "gaussian", "--hidden-dims", "3"),
        "fit got --hidden-dims for gaussian",
    ),
    "widths that are none": (
        (*FIT, "--hidden-dims", "16,x"),
        "fit expected --hidden-dims as widths such as 128,128, got 16,x",
    ),
    "no such part": ((*FIT, "--validation", "2"), "fit expected validation as a fraction between 0 and 1"),
    "no epochs": ((*FIT, "--max-epochs", "0"), "fit expected max_epochs of at least 1, got 0"),
    "a file for a folder": (
        ("fit", "{}/table.csv", "--folder", "table.csv"),
        "fit expected --folder to be a folder, got the file table.csv",
    ),
    "resume and overwrite": ((*FIT, "--resume", "--overwrite"), "fit got both --resume and --overwrite"),
    "several processes and a pipe": (("fit", "-", "--devices", "2"), "expected a file for several --devices"),
    "no model": (("score", "{}", "{}/table.csv"), "found a folder without model.safetensors"),
    "no model at all": (("info", "{}/none"), "expected a fit's folder or a .safetensors file at .*none, found nothing"),
    "a model that is none": (("info", "{}/table.csv"), "load found .*table.csv damaged, truncated or not a safe"),
    "a column that is missing": (("score", "{}/plain", "{}/constant.csv"), "no column 'length' in constant.csv"),
    "an ending": (
        ("score", "{}/plain", "{}/table.csv", "--out", "new.txt"),
        "expected --out to end in .csv or .parquet",
    ),
    "no folder": (("sample", "{}/plain", "--out", "none/new.csv"), "expected an existing folder for new.csv, got none"),
    "scores in place of the data": (
        ("score", "{}/plain", "table.csv", "--out", "./table.csv"),
        "score expected --out to be another file than the data",
    ),
    "no rows": (("sample", "{}/plain", "-n", "0"), "sample expected --number of at least 1, got 0"),
    "a negative seed": (("sample", "{}/plain", "--seed", "-1"), "sample expected --seed of at least 0, got -1"),
    "a seed beyond any generator": (("sample", "{}/plain", "--seed", str(2**63)), r"--seed below 2\*\*63, got 9223"),
    "no context": (("sample", "{}/given", "--context", "age=3"), "sample expected --context colour=VALUE"),
    "an unknown context": (("sample", "{}/given", "--context", "ages=3"), "got --context ages=3, which is not a"),
    "a context twice": (("sample", "{}/given", "--context", "age=3,age=4"), "got --context age=4, twice"),
    "a context without a value": (("sample", "{}/given", "--context", "age"), "got --context age, without a value"),
    "an unknown category": (
        ("sample", "{}/given", "--context", "age=3,colour=green"),
        "expected --context colour to be one of blue, red, got 'green'",
    ),
    "a context that is no number": (
        ("sample", "{}/given", "--context", "age=old,colour=red"),
        "expected --context age to be a finite number, got 'old'",
    ),
    "a superfluous context": (("sample", "{}/plain", "--context", "age=3"), "the model takes no context"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG.keys())
def test_bad_input_is_one_line_and_exit_code_two(
    folder: Path, here: Path, arguments: tuple[str, ...], message: str
) -> None:
    frame()[NAMES].assign(a=frame()["age"], b=7).drop(columns=NAMES).to_csv(folder / "constant.csv", index=False)
    frame().assign(name=[f"row {i}" for i in range(200)]).to_csv(folder / "names.csv", index=False)
    result = run(*(argument.format(folder) for argument in arguments), code=2)
    lines = [line for line in result.stderr.splitlines() if " rows of " not in line or "expected" in line]
    assert len(lines) == 1
    assert re.search(message, lines[0])
    assert lines[0].startswith("pyro-maf: ")
    assert result.stdout == ""
    assert [path.name for path in here.iterdir()] == ["table.csv"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused(here: Path) -> None:
    assert "torch finds no CUDA device" in run("fit", "table.csv", "--device", "cuda", code=2).stderr


def test_damaged_files_beside_a_model_are_refused(folder: Path, here: Path) -> None:
    for name in FILES:
        (here / name).write_bytes((folder / "plain" / name).read_bytes())
    for name, content, message in (
        ("fit.json", "{}", "fit.json damaged"),
        (
            "fit.json",
            (folder / "plain" / "fit.json").read_text().replace('"rows": 200', '"rows": "200"'),
            "fit.json damaged",
        ),
    ):
        whole = (here / name).read_bytes()
        (here / name).write_text(content)
        assert message in run("info", here, code=2).stderr
        (here / name).write_bytes(whole)


def test_a_bug_is_not_reported_as_bad_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyro_maf.FlowPrior, "sample", lambda *_: json.loads("no JSON"))
    result = CliRunner().invoke(app, ["sample", str(folder / "plain")])
    assert isinstance(result.exception, json.JSONDecodeError)


def test_control_characters_in_names_are_escaped(folder: Path, here: Path) -> None:
    names = [("length\x1b[2J", ()), ("wid\nth", ())]
    pyro_maf.FlowPrior(pyro_maf.MAF(2), columns=names).save(here / "model.safetensors")
    facts = run("info", here).stdout
    assert "columns     length\\x1b[2J, wid\\nth\n" in facts
    assert facts.replace("\n", "").isprintable()
    result = run("score", here, here / "none\x1b.csv", code=2)
    assert "none\\x1b.csv" in result.stderr
    result = run("fit", here / ("n" * 200 + "/" + "n" * 200 + "/" + "n" * 2000), code=2)
    assert len(result.stderr) < 1100


@pytest.mark.usefixtures("quick_report")
def test_rows_with_missing_values_are_dropped_when_asked(
    folder: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = frame()
    table.loc[[0, 17, 199], "width"] = np.nan
    table.to_csv("gaps.csv", index=False, float_format="%.9g")
    options = ("--columns", "length,width")
    found = "of 200 rows, 3 rows have a missing value: 'width' 3 (rows 1, 18, 200)"
    assert found in run("fit", "gaps.csv", *options, *QUICK, code=2).stderr
    for command in ("fit", "compare"):
        quick = QUICK if command == "fit" else ("--models", "gaussian")
        result = run(command, "gaps.csv", *options, "--drop-missing", "--folder", command, *quick)
        assert f"left out of gaps.csv: {found}." in result.stderr
    assert json.loads(Path("fit/fit.json").read_text())["rows"] == 197
    table.loc[5, "width"] = 1e9
    table.to_csv("far.csv", index=False)
    result = run("fit", "far.csv", *options, "--drop-missing", "--support", "width=unit_interval", code=2)
    assert "in data row 2 (counted from 1)" in result.stderr
    assert found in run("score", folder / "plain", "gaps.csv", code=2).stderr
    whole = run("score", folder / "plain", "table.csv").stdout.split()
    for size in (2**18, 14):
        monkeypatch.setattr("pyro_maf.training.scores.VALUES_AT_ONCE", size)
        result = run("score", folder / "plain", "gaps.csv", "--drop-missing")
        scores = result.stdout.split()
        assert [place for place, score in enumerate(scores) if score == "nan"] == [1, 18, 200]
        kept = [place for place in range(1, 201) if place not in (1, 18, 200)]
        expected = [float(whole[place]) for place in kept]
        assert [float(scores[place]) for place in kept] == pytest.approx(expected, rel=1e-4)
        assert f"nan for some rows: {found}." in result.stderr
        assert "197 rows, mean log-density" in result.stderr


def test_errors_in_validation_tables_have_their_row_numbers(here: Path) -> None:
    table = frame()
    table.loc[0, "width"] = np.nan
    table.loc[5, "width"] = -1.0
    table.to_csv("other.csv", index=False, float_format="%.9g")
    options = ("--columns", "length,width", "--support", "positive", "--validation", "other.csv", "--drop-missing")
    result = run("fit", "table.csv", *options, *QUICK, code=2)
    assert "fit expected validation data of" in result.stderr
    assert "in column 'width' (support positive), got -1.0 in data row 6 (counted from 1)" in result.stderr


@pytest.mark.usefixtures("quick_report")
def test_text_may_have_commas_and_another_encoding(folder: Path, here: Path) -> None:
    content = frame()[NAMES].to_csv(index=False, sep=";", decimal=",", float_format="%.9g")
    (here / "comma.csv").write_bytes(content.replace("width", "größe").encode("latin-1"))
    how = ("--decimal", ",", "--encoding", "latin-1")
    run("fit", "comma.csv", *how, "--folder", "fit", "--validation", "comma.csv", *QUICK)
    (here / "plain.csv").write_text(content)
    assert run("score", folder / "plain", "plain.csv", "--decimal", ",").stdout == (
        run("score", folder / "plain", "table.csv").stdout
    )
    assert "--encoding" in run("fit", "comma.csv", code=2).stderr


def test_errors_name_a_column_that_is_called_like_a_row(here: Path) -> None:
    frame().rename(columns={"width": "row 3"})[["length", "row 3"]].to_csv("rows.csv", index=False)
    result = run("fit", "rows.csv", "--support", "unit_interval", code=2)
    assert "column 'length'" in result.stderr
    result = run("fit", "rows.csv", "--support", "row 3=unit_interval", code=2)
    assert "in column 'row 3' (support unit_interval)" in result.stderr


@pytest.mark.usefixtures("quick_report")
def test_resume_with_another_table_says_so(here: Path) -> None:
    run("fit", "table.csv", "--columns", "length,width", "--folder", "fit", *QUICK)
    frame()[:150].to_csv("other.csv", index=False)
    result = run("fit", "other.csv", "--columns", "length,width", "--folder", "fit", *QUICK, "--resume", code=2)
    line = result.stderr.splitlines()[-1]
    assert "fit found a fit with other data in fit (other rows" in line
    assert not re.search(r"[0-9a-f]{8}", line)


def test_completion_knows_the_commands_and_their_options() -> None:
    assert "--install-completion" in run("--help").stdout
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_PYRO_MAF_COMPLETE": "complete_bash", "COMP_CWORD": "2"}
    completed = subprocess.run(
        [sys.executable, "-m", "pyro_maf"],
        env=environment | {"COMP_WORDS": "pyro-maf fit --prec"},
        capture_output=True,
        text=True,
    )
    assert completed.stdout.split() == ["--precision"]


def test_usage_errors_end_with_two(folder: Path) -> None:
    assert "--flow" in run("fit", folder / "table.csv", "--flow", "none", code=2).stderr
    assert "none" in run("none", code=2).stderr


def test_every_command_has_help_with_examples() -> None:
    assert run("--version").stdout == f"pyro-maf {pyro_maf.__version__}\n"
    for command in ("fit", "score", "sample", "info"):
        assert command in run("--help").stdout
        assert f"pyro-maf {command}" in run(command, "--help").stdout


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from pyro_maf.cli.commands import app; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


def test_a_closed_pipe_is_no_error(folder: Path) -> None:
    command = [sys.executable, "-m", "pyro_maf", "sample", folder / "plain", "-n", "200000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"length,width\n"
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait() == 0
    assert b"Error" not in errors


@pytest.mark.skipif(sys.platform == "win32", reason="closes its streams by a shell")
def test_a_stream_that_is_closed_from_the_start_is_empty(folder: Path) -> None:
    program = f"{sys.executable} -m pyro_maf"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for arguments, code in ((f"info {folder / 'plain'} >&- 2>&-", 0), (f"score {folder / 'plain'} - <&-", 2)):
        done = subprocess.run(f"{program} {arguments}", shell=True, env=environment, capture_output=True, text=True)
        assert done.returncode == code
        assert done.stdout == ""
        assert done.stderr == ("pyro-maf: read_table found standard input empty.\n" if code else "")
