"""scikit-learn's sample images, prepared like the paper's MNIST and BSDS300."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from pyro_maf._core.checks import check_event, check_positive
from pyro_maf._core.messages import require
from pyro_maf.datasets.dataset import Dataset, LogitPixels

__all__ = ["complete_patches", "digits", "patches"]

SIDE = 8
TILE = 16


def digits(*, margin: float = 1e-6, seed: int = 0) -> Dataset:
    r"""scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, prepared like the paper's MNIST: logits of 64 pixels.

    The rows are shuffled; the last 10 % are for testing, and 10 % of the rest for validation. The context is the
    one-hot label. `pixels` of the result converts log-likelihoods to pixel space and to bits per pixel.

    Args:
        margin: The paper's lambda.
        seed: Seed of the shuffle and of the noise.

    Raises:
        ModuleNotFoundError: Without the `all` extra.

    Example:
        >>> data = digits()
        >>> data.train.shape, data.test.shape, data.train_context.shape
        (torch.Size([1455, 64]), torch.Size([180, 64]), torch.Size([1455, 10]))
    """
    require("digits", "sklearn")
    from sklearn.datasets import load_digits

    values, labels = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
    shuffle = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    pixels = LogitPixels(levels=17, margin=margin)
    rows = pixels.to_logits(pixels.dequantise(values[shuffle], seed)).float()
    context = F.one_hot(labels[shuffle].long(), 10).float()
    test = round(len(rows) / 10)
    validation = round((len(rows) - test) / 10)
    sizes = [len(rows) - validation - test, validation, test]
    parts, contexts = rows.split(sizes), context.split(sizes)
    return Dataset("Digits", parts[0], parts[1], parts[2], contexts[0], contexts[1], contexts[2], pixels)


def patches(*, train: int = 30_000, validation: int = 5_000, test: int = 5_000, seed: int = 0) -> Dataset:
    r"""Patches of 8 x 8 pixels of scikit-learn's two photographs, prepared like the paper's BSDS300: 63 dimensions.

    Grey levels 0 .. 255 become (v + U(0, 1)) / 256, the patch's mean is subtracted, and the last pixel, which the
    others then determine, is dropped; `complete_patches` restores it. The photographs are cut into tiles of 16 x 16
    pixels, 80 % of them for training. Each patch lies within one tile, so no two parts share a pixel. Patches of the
    same part overlap, but no two are at the same position.

    Args:
        train: Number of patches for training.
        validation: Number of patches for validation.
        test: Number of patches for testing.
        seed: Seed of the split, the positions and the noise.

    Raises:
        ValueError: If there are fewer patches than requested.
        ModuleNotFoundError: Without the `all` extra.

    Example:
        >>> data = patches(train=100, validation=10, test=10)
        >>> data.train.shape, complete_patches(data.test).shape
        (torch.Size([100, 63]), torch.Size([10, 64]))

    Reference:
        Zoran & Weiss, *From Learning Models of Natural Image Patches to Whole Image Restoration*, 2011.
    """
    photographs = _grey_photographs()
    generator = torch.Generator().manual_seed(seed)
    sizes = {"train": train, "validation": validation, "test": test}
    places = _patch_places(photographs.shape, sizes, generator)
    first, second, third = (_centred(_cut(photographs, part), generator) for part in places)
    return Dataset("Patches", first, second, third)


def complete_patches(y: Tensor) -> Tensor:
    r"""Restore all 64 pixels, (\*batch, 64), of `patches` rows y, (\*batch, 63); the pixels of a patch sum to 0.

    Raises:
        ValueError: If the last dimension of `y` is not 63.

    Example:
        >>> complete_patches(torch.ones(63))[-1]
        tensor(-63.)
    """
    check_event("complete_patches", "y", y, SIDE * SIDE - 1, "all pixels but the last")
    return torch.cat([y, -y.sum(-1, keepdim=True)], -1)


def _grey_photographs() -> Tensor:
    """Luma of the photographs, (photographs, rows, columns), integers of 0 .. 255."""
    require("patches", "sklearn")
    from sklearn.datasets import load_sample_images

    images: Sequence[NDArray[np.uint8]] = load_sample_images().images
    colours = torch.stack([torch.from_numpy(image.copy()) for image in images]).double()
    return (colours @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)).round()


def _patch_places(shape: Sequence[int], sizes: dict[str, int], generator: torch.Generator) -> list[Tensor]:
    """Draw photograph, row and column of the first pixel of each patch, (patches, 3), for each part."""
    tiles = _shuffled(_grid(shape[0], shape[1] // TILE, shape[2] // TILE), generator)
    corners = tiles * torch.tensor([1, TILE, TILE])
    held_out = len(tiles) // 10
    shares = torch.split(corners, [len(tiles) - 2 * held_out, held_out, held_out])
    offsets = _grid(1, TILE - SIDE + 1, TILE - SIDE + 1)
    parts = []
    for (name, size), share in zip(sizes.items(), shares, strict=True):
        places = (share[:, None] + offsets).reshape(-1, 3)
        if check_positive("patches", name, size) > len(places):
            raise ValueError(f"patches expected {name} of at most {len(places)}, the number of positions, got {size}.")
        parts.append(_shuffled(places, generator)[:size])
    return parts


def _grid(*sizes: int) -> Tensor:
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes))


def _shuffled(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)]


def _cut(photographs: Tensor, places: Tensor) -> Tensor:
    """Cut out the grey levels of patches, (patches, 64)."""
    windows = photographs.unfold(1, SIDE, 1).unfold(2, SIDE, 1)
    return windows[places[:, 0], places[:, 1], places[:, 2]].flatten(1)


def _centred(values: Tensor, generator: torch.Generator) -> Tensor:
    """Dequantise patches, subtract their mean and drop the last pixel."""
    pixels = (values + torch.rand(values.shape, generator=generator, dtype=torch.float64)) / 256
    return (pixels - pixels.mean(-1, keepdim=True))[:, :-1].float()
