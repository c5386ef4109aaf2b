"""Several processes have the results of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_maf
from tests import several_fits
from tests.several_fits import MODELS

ROOT = Path(__file__).parent.parent


def run(folder: Path, launcher: str) -> list[str]:
    """Output of each of two processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    devices = "2" if launcher == "fabric" else "1"
    program = [several_fits.__file__, str(folder), devices]
    command = [sys.executable, *(torchrun if launcher == "torchrun" else []), *program]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert made.returncode == 0, made.stderr
    assert "deprecated" not in made.stderr
    return sorted(line for line in made.stdout.splitlines() if line.startswith("rank"))


NEUTRAL = "model.layers.0.beta"
"""The shift of a batch norm next to the noise. Its gradient is its value, so at the optimum, 0, the gradient is only
rounding, which Adam amplifies to noticeable steps."""


def apart(one: Path, other: Path) -> float:
    """Distance between the weights of two fits, relative to their size if that exceeds 1."""
    mine, its = (pyro_maf.load(folder / "model.safetensors").state_dict() for folder in (one, other))
    assert mine.keys() == its.keys()
    return max(
        ((weight - its[name]).abs() / weight.abs().clamp(min=1)).max().item()
        for name, weight in mine.items()
        if weight.is_floating_point() and weight.numel() and name != NEUTRAL
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    several_fits.fit_all(str(folder), list(MODELS), devices=1)
    return folder


def test_two_processes_of_torchrun_fit_what_one_does(alone: Path, tmp_path: Path) -> None:
    printed = run(tmp_path, "torchrun")
    for kind in MODELS:
        first, second = (line.split(":")[1] for line in printed if f" {kind}:" in line)
        assert first == second
        assert first.endswith(" False")  # nothing is shared any longer
        assert apart(alone / kind, tmp_path / kind) < 1e-8, kind
        assert (tmp_path / kind / "log.csv").read_text().count("\n") == 4
    refusals = [
        "a folder that all processes share, but only 1 of 2 found a fit to resume there.",
        "a row of each batch for every process, got 1 rows for 2 processes.",
        "log_prob to depend on every weight, but not on model.idle: freeze it by requires_grad_(False).",
    ]
    for rank in (0, 1):
        refused = [line for line in printed if line.startswith(f"rank {rank} refused: fit ")]
        assert len(refused) == 3
        assert all(any(line.endswith(refusal) for line in refused) for refusal in refusals)


def test_two_processes_of_fabric_fit_what_one_does(alone: Path, tmp_path: Path) -> None:
    printed = run(tmp_path, "fabric")
    assert [line.split(":")[0] for line in printed] == ["rank 0 maf", "rank 1 maf"]
    assert apart(alone / "maf", tmp_path / "maf") < 1e-8
