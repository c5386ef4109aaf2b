"""The benchmark of both directions: it runs, on a tiny size, and its arithmetic is right."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from parts import report, timing

    return report, timing


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
