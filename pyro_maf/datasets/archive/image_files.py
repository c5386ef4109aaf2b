"""The files of MNIST and CIFAR-10: idx, binary batches, and pickles of either."""

from __future__ import annotations

import gzip
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_maf.datasets.archive.lookup import reading, unpickling

__all__ = ["LABELS", "Images", "read_batch", "read_idx", "unpickle_batch", "unpickle_mnist"]

LABELS = 10
LEAST_IMAGES = 10
BYTE = 0x08  # the code of unsigned bytes in idx files


@dataclass(frozen=True)
class Images:
    """Levels of 0 .. 255, (images, pixels), and labels of 0 .. 9, (images,), in int64."""

    levels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.levels)

    def split(self, first: int) -> tuple[Images, Images]:
        """Split off the first `first` images."""
        return (
            Images(self.levels[:first], self.labels[:first]),
            Images(self.levels[first:], self.labels[first:]),
        )

    @staticmethod
    def join(parts: Sequence[Images]) -> Images:
        """Concatenate."""
        return Images(np.concatenate([part.levels for part in parts]), np.concatenate([part.labels for part in parts]))


def read_idx(images: Path, labels: Path) -> Images:
    """Read MNIST's images and labels from two idx files, compressed by gzip if the name ends in .gz."""
    levels = _read_idx(images, 3)
    if levels.shape[1:] != (28, 28):
        raise ValueError(f"mnist expected images of 28 x 28 pixels in {images}, got shape {levels.shape}.")
    return _checked("mnist", labels, levels.reshape(len(levels), 784), _read_idx(labels, 1), 784)


def read_batch(path: Path) -> Images:
    """Read CIFAR-10's images from a file of the binary version: records of one byte of label and 3072 of pixels."""
    size = path.stat().st_size
    if size % 3073 or not size:
        raise ValueError(f"cifar10 expected {path} to hold images of 3073 bytes each, got {size} bytes in all.")
    records = np.fromfile(path, dtype=np.uint8).reshape(-1, 3073)
    return _checked("cifar10", path, records[:, 1:], records[:, 0], 3072)


def unpickle_mnist(path: Path) -> list[Images]:
    """Read the three parts of MNIST from the archive's pickle, whose pixels are v / 256. Unpickling can run code."""
    with unpickling("mnist", path), gzip.open(path) as file:
        parts = [(np.asarray(x) * 256, np.asarray(labels)) for x, labels in pickle.load(file, encoding="latin1")]
    if len(parts) != 3:
        raise ValueError(f"mnist expected three parts in {path}, got {len(parts)}.")
    for levels, _ in parts:
        if levels.dtype.kind != "f" or not ((levels >= 0) & (levels < 256) & (levels == levels.round())).all():
            raise ValueError(f"mnist expected pixels that are 0 .. 255 over 256 in {path}, got others.")
    return [_checked("mnist", path, levels.astype(np.uint8), labels, 784) for levels, labels in parts]


def unpickle_batch(path: Path) -> Images:
    """Read CIFAR-10's images from a file of the Python version. Unpickling can run code."""
    with unpickling("cifar10", path), open(path, "rb") as file:
        batch = pickle.load(file, encoding="latin1")
        levels, labels = np.asarray(batch["data"]), np.asarray(batch["labels"])
    if levels.dtype != np.uint8:
        raise ValueError(f"cifar10 expected pixels of uint8 in {path}, got {levels.dtype}.")
    return _checked("cifar10", path, levels, labels, 3072)


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    length, kind = 4 + 4 * dimensions, "images" if dimensions == 3 else "labels"
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with reading("mnist", path, f"an idx file of {kind}"), opened(path, "rb") as file:
        content = file.read()
        if len(content) < length or content[:4] != bytes([0, 0, BYTE, dimensions]):
            raise ValueError(f"it begins with {content[:4].hex(' ')}")
        shape = [int(size) for size in np.frombuffer(content, ">u4", dimensions, 4)]
        if len(content) - length != math.prod(shape):
            raise ValueError(f"{math.prod(shape)} bytes should follow its head, {len(content) - length} do")
    return np.frombuffer(content, np.uint8, offset=length).reshape(shape)


def _checked(who: str, path: Path, levels: NDArray[Any], labels: NDArray[Any], columns: int) -> Images:
    """Return images if they have `columns` pixels and valid labels, or raise."""
    if levels.ndim != 2 or levels.shape[1] != columns:
        raise ValueError(f"{who} expected images of {columns} pixels in {path}, got shape {levels.shape}.")
    if len(levels) < LEAST_IMAGES:
        raise ValueError(f"{who} expected at least {LEAST_IMAGES} images, those of {path}, got {len(levels)}.")
    if labels.shape != (len(levels),):
        raise ValueError(f"{who} expected {len(levels)} labels in {path}, one an image, got shape {labels.shape}.")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= LABELS:
        raise ValueError(
            f"{who} expected labels of 0 .. {LABELS - 1} in {path}, got {labels.dtype} up to {labels.max()}."
        )
    return Images(np.asarray(levels, dtype=np.uint8), labels.astype(np.int64))
