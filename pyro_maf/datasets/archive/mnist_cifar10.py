"""The paper's images, MNIST and CIFAR-10, as logits of dequantised pixels, with the label as context."""

from __future__ import annotations

import gzip
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pyro_maf.datasets.archive.formats import locate, reading
from pyro_maf.datasets.dataset import Dataset, LogitPixels

__all__ = ["cifar10", "mnist"]

MNIST = "http://yann.lecun.com/exdb/mnist (The MNIST database of handwritten digits)"
CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html (CIFAR-10 binary version)"
BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
ROWS_AT_A_TIME = 1000
LABELS = 10
LEAST_IMAGES = 10
BYTE = 0x08  # the code of unsigned bytes in idx files


def mnist(root: str | os.PathLike[str]) -> Dataset:
    r"""MNIST: handwritten digits of 28 x 28 pixels; 784 dimensions, and 10 of context.

    Grey levels v become y = logit(lambda + (1 - 2 lambda) x) with x = (v + U(0, 1)) / 256 and lambda = 1e-6, with the
    same noise as in the published code. The context is the one-hot label. The last sixth of the training images is for
    validation. `pixels` of the result converts log-likelihoods to pixel space and to bits per pixel.

    The loader reads the four idx files, plain or compressed as .gz, instead of the published archive's pickle of the
    same images, which could run arbitrary code. The rows are the same.

    Args:
        root: The folder with `mnist/train-images-idx3-ubyte`, `mnist/train-labels-idx1-ubyte`,
            `mnist/t10k-images-idx3-ubyte` and `mnist/t10k-labels-idx1-ubyte`.

    Returns:
        50,000 rows for training, 10,000 for validation and 10,000 for testing, (rows, 784), with context (rows, 10).

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file is damaged, of another format or shape, or the numbers of labels and images differ.

    Reference:
        LeCun, Bottou, Bengio & Haffner, *Gradient-Based Learning Applied to Document Recognition*, 1998.
    """
    whole, test = (_idx_part(root, name) for name in ("train", "t10k"))
    return _dataset("MNIST", [*whole.hold_out(6), test], LogitPixels(levels=256, margin=1e-6))


def cifar10(root: str | os.PathLike[str]) -> Dataset:
    r"""CIFAR-10: colour photographs of 32 x 32 pixels; 3072 dimensions, and 10 of context.

    Levels v become y = logit(lambda + (1 - 2 lambda) x) with x = (v + U(0, 1)) / 256 and lambda = 0.05, with the same
    noise as in the published code. Red, green and blue follow one another, each row by row. The context is the one-hot
    label. The last tenth of the training images is for validation; the others are augmented by their mirror images.
    `pixels` of the result converts log-likelihoods to pixel space and to bits per pixel.

    The loader reads the binary version, six files that end in .bin, instead of the published archive's pickles of the
    same images, which could run arbitrary code. The rows are the same.

    Args:
        root: The folder with `cifar10/data_batch_1.bin` to `cifar10/data_batch_5.bin` and
            `cifar10/test_batch.bin`.

    Returns:
        90,000 rows for training, 5,000 for validation and 10,000 for testing, (rows, 3072), with context (rows, 10).

    Cost:
        The rows take 1.3 GB of memory, and their preparation 0.6 GB more.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a file is damaged, or of another format or shape.

    Reference:
        Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
    """
    batches = [_read_batch(locate("cifar10", root, f"cifar10/{name}.bin", source=CIFAR)) for name in BATCHES]
    whole = _Images(*map(np.concatenate, zip(*batches[:-1], strict=True)))
    parts = [*whole.hold_out(10), batches[-1]]
    return _dataset("CIFAR-10", parts, LogitPixels(levels=256, margin=0.05), mirrored=True)


def _idx_part(root: str | os.PathLike[str], part: str) -> _Images:
    names = [f"mnist/{part}-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
    return _read_idx(*(locate("mnist", root, name, f"{name}.gz", source=MNIST) for name in names))


def _dataset(name: str, parts: Sequence[_Images], pixels: LogitPixels, *, mirrored: bool = False) -> Dataset:
    """Return logits and one-hot labels of training, validation and test images, with the noise drawn in that order."""
    random = np.random.RandomState(42)
    contexts = [F.one_hot(torch.from_numpy(part.labels), LABELS).float() for part in parts]
    train = torch.empty((2 if mirrored else 1) * len(parts[0].levels), parts[0].levels.shape[1])
    _dequantise(parts[0].levels, pixels, random, train)
    if mirrored:
        _mirror(*train.chunk(2))
        contexts[0] = contexts[0].repeat(2, 1)
    validation, test = (torch.empty(part.levels.shape) for part in parts[1:])
    _dequantise(parts[1].levels, pixels, random, validation)
    _dequantise(parts[2].levels, pixels, random, test)
    return Dataset(name, train, validation, test, contexts[0], contexts[1], contexts[2], pixels)


def _dequantise(levels: NDArray[np.uint8], pixels: LogitPixels, random: np.random.RandomState, out: Tensor) -> None:
    """Write logits of levels with noise to the first rows of `out`, in blocks, since the noise is in float64."""
    for start in range(0, len(levels), ROWS_AT_A_TIME):
        block = levels[start : start + ROWS_AT_A_TIME]
        noisy = torch.from_numpy((block + random.random_sample(block.shape)) / pixels.levels)
        out[start : start + len(block)] = pixels.to_logits(noisy)


def _mirror(images: Tensor, out: Tensor) -> None:
    """Write CIFAR-10's images, (images, 3072), to `out`, mirrored left to right."""
    for some, mirrored in zip(images.split(ROWS_AT_A_TIME), out.split(ROWS_AT_A_TIME), strict=True):
        mirrored.copy_(some.unflatten(1, (3, 32, 32)).flip(-1).flatten(1))


class _Images(NamedTuple):
    """Levels of 0 .. 255, (images, pixels), and labels of 0 .. 9, (images,), in int64."""

    levels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def hold_out(self, part: int) -> tuple[_Images, _Images]:
        """Split off the last of `part` equal parts, rounded down."""
        first = len(self.levels) - len(self.levels) // part
        return _Images(self.levels[:first], self.labels[:first]), _Images(self.levels[first:], self.labels[first:])


def _read_idx(images: Path, labels: Path) -> _Images:
    """Read MNIST's images and labels from two idx files, compressed by gzip if the name ends in .gz."""
    levels = _read_array(images, 3)
    if levels.shape[1:] != (28, 28):
        raise ValueError(f"mnist expected images of 28 x 28 pixels in {images}, got shape {levels.shape}.")
    return _checked("mnist", labels, levels.reshape(len(levels), 784), _read_array(labels, 1))


def _read_batch(path: Path) -> _Images:
    """Read CIFAR-10's images from a file of the binary version: records of 1 byte of label and 3072 of pixels."""
    size = path.stat().st_size
    if size % 3073 or not size:
        raise ValueError(f"cifar10 expected {path} to hold images of 3073 bytes each, got {size} bytes in all.")
    records = np.fromfile(path, dtype=np.uint8).reshape(-1, 3073)
    return _checked("cifar10", path, records[:, 1:], records[:, 0])


def _read_array(path: Path, dimensions: int) -> NDArray[np.uint8]:
    length, kind = 4 + 4 * dimensions, "images" if dimensions == 3 else "labels"
    with reading("mnist", path, f"an idx file of {kind}"):
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if len(content) < length or content[:4] != bytes([0, 0, BYTE, dimensions]):
            raise ValueError(f"it begins with {content[:4].hex(' ')}")
        shape = [int(size) for size in np.frombuffer(content, ">u4", dimensions, 4)]
        if len(content) - length != math.prod(shape):
            raise ValueError(f"{math.prod(shape)} bytes should follow its head, {len(content) - length} do")
    return np.frombuffer(content, np.uint8, offset=length).reshape(shape)


def _checked(who: str, path: Path, levels: NDArray[np.uint8], labels: NDArray[np.uint8]) -> _Images:
    """Return the images if there are enough of them, with valid labels; otherwise raise."""
    if len(levels) < LEAST_IMAGES:
        raise ValueError(f"{who} expected at least {LEAST_IMAGES} images, those of {path}, got {len(levels)}.")
    if labels.shape != (len(levels),):
        raise ValueError(f"{who} expected {len(levels)} labels in {path}, one per image, got shape {labels.shape}.")
    if labels.max() >= LABELS:
        raise ValueError(f"{who} expected labels of 0 .. {LABELS - 1} in {path}, got labels up to {labels.max()}.")
    return _Images(levels, labels.astype(np.int64))
