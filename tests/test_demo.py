"""The demo at a small size, and its reproduction of the paper's Figure 1."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from pyro_maf.datasets import Dataset, FigureOne


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", Path(__file__).parent.parent / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # where dataclasses look up their types
    spec.loader.exec_module(module)
    return module


def test_five_layers_learn_figure_one_and_one_layer_in_the_same_order_does_not(demo):
    toy = FigureOne()
    task = demo.figure_one(toy)
    models = {name: task.models[name] for name in ("MADE", "MAF (5)")}
    _, scores, _ = demo.run(dataclasses.replace(task, models=models, epochs=dict.fromkeys(models, 4)))
    true = demo.score(toy, task.data)
    assert len(task.data.test) == 10_000
    assert scores["MAF (5)"].mean == pytest.approx(-toy.entropy, abs=0.03)
    assert true.mean - scores["MAF (5)"].mean < 0.03
    # 0.23 in units in which the long tail of x1 looks normal, 0.1 more without them.
    assert true.mean - scores["MADE"].mean > 0.2
    assert true.mean - scores["Gaussian"].mean > 0.5


@pytest.mark.filterwarnings("ignore:fit found heavy tails:UserWarning")
def test_the_demo_prints_its_table_and_writes_its_pictures(demo, tmp_path, monkeypatch):
    toy = FigureOne()
    full = demo.figure_one(toy), demo.image_patches()
    # Normal rows instead of patches, whose 63 columns would take seconds of tail estimation in each fit.
    data = toy.dataset(300, 100, 100), Dataset(full[1].data.name, *torch.randn(500, 63).split([300, 100, 100]))
    small = [
        dataclasses.replace(task, data=part, epochs=dict.fromkeys(task.models, 1))
        for task, part in zip(full, data, strict=True)
    ]
    monkeypatch.setattr(demo, "figure_one", lambda toy: small[0])
    monkeypatch.setattr(demo, "image_patches", lambda: small[1])
    with demo.CONSOLE.capture() as capture:
        demo.main(["--out", str(tmp_path / "pictures")])
    printed = capture.get()
    assert all(name in printed for name in ("Gaussian", "MADE", "RealNVP (5)", "MAF (5)", "MAF MoG (5)"))
    assert "3.5310" in printed
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "figure1-contours.png",
        "figure1-losses.png",
        "figure1-noise.png",
        "figure1-samples.png",
        "patches-losses.png",
        "patches-noise.png",
        "patches-samples.png",
    ]
