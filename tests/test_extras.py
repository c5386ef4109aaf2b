"""The package without extras: what works, and one-line errors that say what to install."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import pyro_maf
from pyro_maf import datasets, plotting
from pyro_maf.cli.score_and_sample import writing_rows
from pyro_maf.report import write_report
from pyro_maf.training import FitResult

ROOT = Path(__file__).parent.parent
EXTRA = ("lightning_fabric", "sklearn", "matplotlib", "jinja2", "typer", "pyarrow", "h5py", "arviz", "pandas")
ROWS = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)

WITHOUT = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({EXTRA}))
import pyro_maf
import torch, pyro, pyro.distributions as dist
pyro_maf.MAF(2, num_layers=1).save("flow.safetensors")
print(pyro_maf.load("flow.safetensors").input_dim)
print(pyro_maf.fit(pyro_maf.MAF(2, num_layers=1), torch.randn(50, 2), max_epochs=1, progress=False).epochs)
model = lambda: pyro.sample("z", dist.Normal(0, 1))
print(pyro_maf.infer.fit_guide(model, pyro_maf.infer.AutoIAF(model), steps=1, progress=False).stop_reason)
import numpy
from pyro_maf.datasets import read_table
numpy.save("table.npy", numpy.ones((3, 2)))
print(len(read_table("table.npy").data))
runpy.run_module("pyro_maf", run_name="__main__")
"""


def test_the_core_works_alone_and_the_command_says_what_to_install(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.stdout == "2\n1\nreached steps (1)\n3\n"
    message = "pyro-maf: pyro-maf needs typer, which is not installed: pip install pyro-maf[cli]."
    assert result.stderr.splitlines()[-1] == message
    assert result.returncode == 2


def model() -> None:
    pyro.sample("z", dist.Normal(0, 1))


def report(folder: Path) -> None:
    density = pyro_maf.FlowPrior(pyro_maf.MAF(2, num_layers=1, hidden_dims=[8]))
    write_report(folder / "report.html", FitResult(density, (1.0,), (1.0,), 1, -1.0, 0.1, "interrupted"), ROWS)


def rows(folder: Path) -> None:
    with writing_rows(folder / "rows.csv", ["a"]) as write:
        write(ROWS[:, :1])


def table(folder: Path, **options: Any) -> None:
    np.save(folder / "table.npy", ROWS)
    (folder / "table.csv").write_text("a,b\n1,2\n")
    datasets.read_table(folder / ("table.npy" if options else "table.csv"), **options)


NEEDS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "fit by several processes": (
        "lightning_fabric",
        "fit",
        lambda _: pyro_maf.fit(pyro_maf.MAF(2), ROWS, devices=2),
    ),
    "draws for arviz": ("arviz", "to_arviz", lambda _: pyro_maf.infer.to_arviz(model, AutoNormal(model))),
    "the report's page": ("jinja2", "write_report", report),
    "the report's pictures": ("matplotlib", "write_report", report),
    "a picture": ("matplotlib", "scatter", lambda _: plotting.scatter(torch.tensor(ROWS), {})),
    "digits": ("sklearn", "digits", lambda _: datasets.digits()),
    "photographs": ("sklearn", "patches", lambda _: datasets.patches()),
    "csv": ("pyarrow", "read_table", table),
    "categories": ("pyarrow", "read_table", lambda folder: table(folder, context=["x1"], categories=["x1"])),
    "rows as csv": ("pyarrow", "pyro-maf", rows),
    "HDF5": ("h5py", "bsds300", datasets.bsds300),
}


@pytest.mark.parametrize(("package", "who", "call"), NEEDS.values(), ids=NEEDS.keys())
def test_a_part_that_is_missing_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, who: str, call: Callable[[Path], Any]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    name = {"sklearn": "scikit-learn", "lightning_fabric": "lightning-fabric"}.get(package, package)
    extra = {"matplotlib": "plot", "pyarrow": "cli", "jinja2": "cli"}.get(package, "all")
    message = f"{who} needs {name}, which is not installed: pip install pyro-maf[{extra}]."
    with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(message)}$"):
        call(tmp_path)
