"""Several processes fit what one would fit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_maf

ROOT = Path(__file__).parent.parent
PROGRAM = """
import os, sys
import torch
from pyro_maf import ConditionalMAF, MAF, MAFMoG, RealNVP, fit

torch.set_num_threads(1)
torch.manual_seed(0)
folder, devices = sys.argv[1], int(sys.argv[2])
rows = torch.randn(301, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).cumsum(1)
shape = {"num_layers": 2, "hidden_dims": [16]}
models = {
    "maf": lambda: MAF(3, **shape),
    "batch norm": lambda: MAF(3, batch_norm=True, **shape),
    "maf-mog": lambda: MAFMoG(3, **shape),
    "realnvp": lambda: RealNVP(3, **shape),
    "conditional": lambda: ConditionalMAF(2, 1, **shape),
}
for kind, model in models.items() if devices == 1 else [("maf", models["maf"])]:
    context, data = (rows[:, :1], rows[:, 1:]) if kind == "conditional" else (None, rows)
    options = {"batch_size": 33, "max_epochs": 3, "learning_rate": 1e-2, "progress": False, "devices": devices}
    result = fit(model().double(), data, context=context, folder=f"{folder}/{kind}", resume=True, **options)
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    print(f"rank {rank} {kind}: {result.validation_loss}", flush=True)
"""
KINDS = ("maf", "batch norm", "maf-mog", "realnvp", "conditional")


def run(folder: Path, launcher: str = "") -> list[str]:
    """What each process prints."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = folder.parent / "program.py"
    program.write_text(PROGRAM)
    devices = "2" if launcher == "lightning" else "1"
    command = [sys.executable, *(torchrun if launcher == "torchrun" else []), str(program), str(folder), devices]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    made = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert made.returncode == 0, made.stderr
    return sorted(line for line in made.stdout.splitlines() if line.startswith("rank"))


NEUTRAL = "model.layers.0.beta"
"""The shift of a batch norm next to the noise: its gradient is its own value, so at its optimum, 0, it is nothing but
rounding, which Adam blows up to steps of some size."""


def apart(one: Path, other: Path) -> float:
    """How far the weights of two fits are from each other, relative to the larger of 1 and their size."""
    mine, its = (pyro_maf.load(folder / "model.safetensors").state_dict() for folder in (one, other))
    assert mine.keys() == its.keys()
    return max(
        ((weight - its[name]).abs() / weight.abs().clamp(min=1)).max().item()
        for name, weight in mine.items()
        if weight.is_floating_point() and weight.numel() and name != NEUTRAL
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "one"
    assert len(run(folder)) == len(KINDS)
    return folder


def test_two_processes_of_torchrun_fit_what_one_does(alone: Path, tmp_path: Path) -> None:
    said = run(tmp_path / "two", "torchrun")
    assert len(said) == 2 * len(KINDS)
    for kind in KINDS:
        first, second = (line.split(":")[1] for line in said if f" {kind}:" in line)
        assert first == second
        assert apart(alone / kind, tmp_path / "two" / kind) < 1e-8, kind
        assert (tmp_path / "two" / kind / "log.csv").read_text().count("\n") == 4


def test_two_processes_of_lightning_fit_what_one_does(alone: Path, tmp_path: Path) -> None:
    said = run(tmp_path / "two", "lightning")
    assert [line.split(":")[0] for line in said] == ["rank 0 maf", "rank 1 maf"]
    assert apart(alone / "maf", tmp_path / "two" / "maf") < 1e-8
