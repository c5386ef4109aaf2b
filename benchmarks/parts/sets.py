"""Data sets of the paper's comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pyro_maf import datasets
from pyro_maf.datasets import Dataset, LogitPixels
from pyro_maf.experiments import SETTINGS
from pyro_maf.tables.moments import moments_of

NARROW, WIDE, WIDEST = 100, 512, 1024
"""Units of a hidden layer in the paper: up to 8 dimensions, from 21 to 63, and for images."""


def stored(folder: Path) -> Iterator[Dataset]:
    """Data sets of a folder's .npz files that have arrays train, val and test, or uint8 images and labels."""
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            if {"train", "val", "test"} <= set(arrays):
                parts = (torch.from_numpy(arrays[name]).float() for name in ("train", "val", "test"))
                yield Dataset(path.stem, *parts)
            elif {"images", "labels"} <= set(arrays):
                yield images(path.stem, torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]))


def images(name: str, levels: torch.Tensor, labels: torch.Tensor) -> Dataset:
    """Images prepared as the paper prepares MNIST, a tenth for testing and a tenth of the rest for validation."""
    shuffle = torch.randperm(len(levels), generator=torch.Generator().manual_seed(0))
    pixels = LogitPixels()
    rows = pixels.to_logits(pixels.dequantise(levels[shuffle].flatten(1).long())).float()
    context = F.one_hot(labels[shuffle].long()).float()
    test = len(rows) // 10
    validation = (len(rows) - test) // 10
    sizes = [len(rows) - validation - test, validation, test]
    return Dataset(name, *rows.split(sizes), *context.split(sizes), pixels=pixels)


def published(root: Path, names: list[str]) -> Iterator[Dataset]:
    """The paper's data sets, from its published archive."""
    for name in names:
        yield getattr(datasets, SETTINGS[name].loader)(root)


def shortened(data: Dataset, rows: int | None) -> Dataset:
    """The data set with the first `rows` training rows only."""
    if rows is None or rows >= len(data.train):
        return data
    context = None if data.train_context is None else data.train_context[:rows]
    return dataclasses.replace(data, train=data.train[:rows], train_context=context)


def without_context(data: Dataset) -> Dataset:
    """The data set without its context."""
    return dataclasses.replace(data, train_context=None, validation_context=None, test_context=None)


def standardised(data: Dataset) -> tuple[Dataset, float]:
    """The standardised data set, and the nats by which that raises a log-density."""
    loc, scale = moments_of(data.train)
    parts = {name: (getattr(data, name) - loc) / scale for name in ("train", "validation", "test")}
    return dataclasses.replace(data, **parts), scale.double().log().sum().item()


def units(data: Dataset, most: int | None) -> int:
    """Units of a hidden layer, as in the paper for a similar number of dimensions, but at most `most`."""
    if data.name in SETTINGS:
        paper = max(SETTINGS[data.name].units)
    else:
        paper = NARROW if data.input_dim < 20 else WIDE if data.input_dim < 100 else WIDEST
    return min(paper, most or paper)
