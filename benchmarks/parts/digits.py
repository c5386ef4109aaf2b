"""Samples of a conditional model of images, one sheet per class."""

from __future__ import annotations

from pathlib import Path

import torch

from parts.contest import Plan
from pyro_maf import load, plotting
from pyro_maf.datasets import Dataset

SIDE = 6
SHOWN = "maf"


def draw(data: Dataset, plan: Plan, path: Path) -> bool:
    """Plot test images beside samples of every class by the plan's last fitted MAF of five layers.

    Returns:
        Whether there was a fitted MAF to sample from.
    """
    fitted = [plan.folder / "densities" / one.slug / "model.safetensors" for one in plan.candidates]
    fitted = [file for file in fitted if file.is_file() and file.parent.name.startswith(f"{SHOWN}-5")]
    pixels, context = data.pixels, data.test_context
    if not fitted or pixels is None or context is None:
        return False
    density = load(fitted[-1])
    torch.manual_seed(0)
    sheets = {"test images": pixels.to_pixels(data.test[: SIDE**2])}
    for index, one_hot in enumerate(torch.eye(data.context_dim)):
        sheets[f"class {index}"] = pixels.to_pixels(density.condition(one_hot).sample((SIDE**2,))).clamp(0, 1)
    plotting.image_grid(sheets, columns=SIDE, title="MAF (5) given the class: samples").savefig(path)
    return True
