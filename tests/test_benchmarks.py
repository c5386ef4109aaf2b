"""The benchmarks: they run, on a tiny size, and their arithmetic is right."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from parts import report, timing

    return report, timing


@pytest.fixture
def posteriors(tmp_path):
    """A folder with one posterior whose model is known, and one whose model is not."""
    rng = np.random.default_rng(0)
    names = [*(f"theta[{school}]" for school in range(1, 9)), "mu", "tau"]
    draws = rng.normal(4, 5, (400, 10))
    draws[:, -1] = np.abs(draws[:, -1]) + 0.1
    data = {"data_J": 8, "data_y": rng.integers(-5, 25, 8), "data_sigma": rng.integers(9, 18, 8)}
    folder = tmp_path / "posteriors"
    folder.mkdir()
    for name in ("eight_schools_centered", "another"):
        np.savez(folder / f"{name}.npz", names=np.array(names), draws=draws, **data)
    return folder


def test_a_quick_run_measures_every_task_and_writes_results_table_and_picture(tmp_path):
    command = [sys.executable, BENCHMARKS / "directions.py", "--quick", "--peers", "zuko", "--out", tmp_path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    results = json.loads((tmp_path / "directions.json").read_text())
    tasks = {"log_prob", "train", "sample", "sample_backward", "coupling_log_prob", "coupling_sample"}
    assert {cell["task"] for cell in results["cells"]} == tasks
    for cell in results["cells"]:
        assert cell["times"].keys() == {"pyro-maf", "zuko", "dense pass"}
        assert all(0 < own["minimum"] <= own["median"] < math.inf for own in cell["times"].values())
    assert results["updates"][0]["ratio"] > 0
    assert results["memory"]["bytes"].keys() == {"pyro-maf", "D passes", "zuko"}
    assert "zuko" in (tmp_path / "directions.md").read_text()
    assert (tmp_path / "directions.png").stat().st_size > 0


def test_guides_are_fitted_measured_and_drawn_where_the_model_is_known(posteriors, tmp_path):
    out = tmp_path / "results"
    options = ["--steps", "3", "--guides", "AutoIAF", "AutoIAF, fit_guide", "AutoNormal", "AutoIAFNormal", "--out", out]
    command = [sys.executable, BENCHMARKS / "guides.py", posteriors, *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert "another.npz is skipped" in run.stdout
    assert "AutoIAFNormal" in run.stdout
    found = json.loads((out / "guides.json").read_text())["posteriors"]["eight_schools_centered"]
    assert list(found["guides"]) == ["AutoIAF", "AutoIAF, fit_guide", "AutoNormal", "AutoIAFNormal"]
    for own in found["guides"].values():
        assert own["steps"] == 3
        assert 0.4 < own["c2st"] <= 1
        assert all(math.isfinite(own[name]) for name in ("err", "elbo", "elbo_se", "quantile_error"))
    for objectives in found["gradients"].values():
        assert all(own["variance"] > 0 and own["ms"] > 0 for own in objectives.values())
    assert found["step_ms"].keys() == {"AutoIAF", "AutoIAFNormal"}
    assert (out / "guides.png").stat().st_size > 0


def test_columns_are_found_in_the_sites_by_their_names(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import torch
    from parts.posteriors import Posterior

    posterior = Posterior("any", print, (), ("theta[2]", "tau", "beta[1]"), np.ones((3, 3)))
    sites = {"theta": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "tau": torch.tensor([5.0, 6.0])}
    sites["beta"] = torch.tensor([[[7.0, 8.0]], [[9.0, 10.0]]])
    assert posterior.table(sites).tolist() == [[2.0, 5.0, 7.0], [4.0, 6.0, 9.0]]


def test_accuracy_is_none_of_the_references_own_and_grows_with_the_distance(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from parts import accuracy
    from parts.posteriors import Posterior

    rng = np.random.default_rng(0)
    posterior = Posterior("any", print, (), ("a", "b"), rng.normal(5, [1.0, 10.0], (800, 2)))
    shifted = posterior.draws + posterior.scales * [1.0, 0.0]
    assert accuracy.mean_error(posterior, posterior.draws) == 0
    assert accuracy.mean_error(posterior, shifted) == pytest.approx(0.5**0.5)
    assert accuracy.c2st(posterior, rng.normal(5, [1.0, 10.0], (800, 2))) < 0.56
    assert accuracy.c2st(posterior, shifted + 4 * posterior.scales) > 0.95


def test_ratios_are_taken_within_a_round(parts):
    _, timing = parts
    busy_at_first = timing.Times({0: [10.0], 1: [1.0], 2: [1.0]})
    slower = timing.Times({0: [20.0], 1: [2.0]})
    assert timing.paired_ratio(slower, busy_at_first) == 2.0


def test_a_contender_too_slow_or_too_large_is_predicted(parts):
    _, timing = parts
    calls = []
    contenders = [
        timing.Contender("slow", lambda: calls.append("slow"), predicted=100.0),
        timing.Contender("large", lambda: calls.append("large"), predicted=1.0, needs=2**40),
        timing.Contender("fine", lambda: calls.append("fine")),
    ]
    times = timing.take_turns(contenders, seconds=0.01, longest_call=10.0, memory=2**30, rounds=1)
    assert set(calls) == {"fine"}
    assert (times["slow"].minimum, times["slow"].measured) == (100.0, False)
    assert "100 s" in times["slow"].note
    assert "1024 GiB" in times["large"].note
    assert times["fine"].measured


def test_the_table_replaces_what_stands_between_the_markers_only(parts, tmp_path):
    report, _ = parts
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.put_between_markers(path, "new")
    assert path.read_text() == f"before\n{report.BEGIN}\n\nnew\n{report.END}\nafter\n"
    path.write_text("no markers")
    with pytest.raises(ValueError, match="put the table between"):
        report.put_between_markers(path, "new")
