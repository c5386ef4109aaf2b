"""The tables of the paper: POWER, GAS, HEPMASS and MINIBOONE of the UCI repository, and the patches of BSDS300."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_maf._core.extras import require
from pyro_maf.datasets.archive.formats import LEAST_ROWS, check_rows, read_csv, read_npy
from pyro_maf.datasets.archive.lookup import ZENODO, locate, reading
from pyro_maf.datasets.archive.preparation import hold_out, standardise, tensor, three_parts
from pyro_maf.datasets.dataset import Dataset

__all__ = ["bsds300", "hepmass", "miniboone", "power"]

MOST_REPEATS = 5


def power(root: str | os.PathLike[str]) -> Dataset:
    r"""POWER: electric power consumption of a household, by the minute; 6 dimensions.

    The 8 columns of the file are active power, reactive power, voltage, intensity, three sub-meterings and the time.
    Rows are shuffled, reactive power and intensity are dropped, and uniform noise breaks the ties that rounding left:
    up to 0.001 for the active power, 0.01 for the voltage, 1 for each sub-metering. Shuffle and noise are drawn as in
    the published code, so the rows are those of the paper. The last tenth is for testing, the last tenth of the rest
    for validation, and all are standardised by the mean and deviation of training and validation rows.

    Args:
        root: The folder that holds `power/data.npy` of the published archive.

    Returns:
        1,659,917 rows for training, 184,435 for validation and 204,928 for testing, (rows, 6).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, of another format or shape, or has values that are not finite.

    Example:
        >>> import pathlib, tempfile, numpy
        >>> with tempfile.TemporaryDirectory() as root:
        ...     pathlib.Path(root, "power").mkdir()
        ...     numpy.save(pathlib.Path(root, "power", "data.npy"), numpy.random.rand(1000, 8))
        ...     data = power(root)
        >>> data.train.shape, data.validation.shape, data.test.shape
        (torch.Size([810, 6]), torch.Size([90, 6]), torch.Size([100, 6]))

    Reference:
        Hebrail & Berard, *Individual household electric power consumption*, UCI Machine Learning Repository, 2012.
    """
    path = locate("power", root, "power/data.npy", source=ZENODO)
    table = read_npy("power", path, 8)
    random = np.random.RandomState(42)
    rows = table[random.permutation(len(table))][:, [0, 2, 4, 5, 6, 7]].astype(np.float64)
    # In the order in which the published code draws them.
    rows[:, 1] += 0.01 * random.random_sample(len(rows))
    rows[:, 0] += 0.001 * random.random_sample(len(rows))
    rows[:, 2:5] += random.random_sample((len(rows), 3))
    return _standardised_parts("POWER", path, rows)


def hepmass(root: str | os.PathLike[str]) -> Dataset:
    r"""HEPMASS: collisions that produce a particle of mass 1000; 21 dimensions.

    The rows are those of class 1, and their columns the 27 features after the class; further columns, as in the test
    file, are dropped. Features are standardised by the mean and deviation of all rows of the training file. A feature
    whose smallest value occurs more than 5 times among these is dropped: it is partly discrete. The last tenth of the
    training file is for validation.

    Args:
        root: The folder that holds `hepmass/1000_train.csv` and `hepmass/1000_test.csv` of the published archive.

    Returns:
        315,123 rows for training, 35,013 for validation and 174,987 for testing, (rows, 21).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If one is damaged, of another format or shape, or has values that are not finite, or if not 21
            features remain.
        ModuleNotFoundError: Without the `train` extra.

    Example:
        >>> import pathlib, tempfile, numpy
        >>> rows = numpy.random.rand(100, 29)
        >>> rows[:, 0], rows[:, 10:16] = numpy.arange(100) % 2, rows[:, 10:16].round()
        >>> with tempfile.TemporaryDirectory() as root:
        ...     folder = pathlib.Path(root, "hepmass")
        ...     folder.mkdir()
        ...     numpy.savetxt(folder / "1000_train.csv", rows[:, :28], delimiter=",", header="label")
        ...     numpy.savetxt(folder / "1000_test.csv", rows, delimiter=",", header="label")
        ...     data = hepmass(root)
        >>> data.train.shape, data.validation.shape, data.test.shape
        (torch.Size([45, 21]), torch.Size([5, 21]), torch.Size([50, 21]))

    Reference:
        Baldi, Cranmer, Faucett, Sadowski & Whiteson, *Parameterized Machine Learning for High-Energy Physics*, 2016.
    """
    paths = [locate("hepmass", root, f"hepmass/1000_{part}.csv", source=ZENODO) for part in ("train", "test")]
    train, test = (_signal(path) for path in paths)
    repeats = (train == train.min(0)).sum(0)
    kept = repeats <= MOST_REPEATS
    if kept.sum() != 21:
        raise ValueError(
            f"hepmass expected 21 features of {paths[0]} whose smallest value occurs at most {MOST_REPEATS} times, "
            f"got {kept.sum()}: is it the archive's file?"
        )
    train, test = train[:, kept], test[:, kept]
    standardise("hepmass", paths[0], train, test, ddof=1)
    train, validation = hold_out(train)
    return Dataset("HEPMASS", tensor(train), tensor(validation), tensor(test))


def miniboone(root: str | os.PathLike[str]) -> Dataset:
    r"""MINIBOONE: particles in a detector of neutrinos; 43 dimensions.

    The file is already without outliers and discrete columns. The last tenth is for testing, the last tenth of the rest
    for validation, and all are standardised by the mean and deviation of training and validation rows.

    Args:
        root: The folder that holds `miniboone/data.npy` of the published archive.

    Returns:
        29,556 rows for training, 3,284 for validation and 3,648 for testing, (rows, 43).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, of another format or shape, or has values that are not finite.

    Example:
        >>> import pathlib, tempfile, numpy
        >>> with tempfile.TemporaryDirectory() as root:
        ...     pathlib.Path(root, "miniboone").mkdir()
        ...     numpy.save(pathlib.Path(root, "miniboone", "data.npy"), numpy.random.rand(1000, 43))
        ...     data = miniboone(root)
        >>> data.train.shape, data.validation.shape, data.test.shape
        (torch.Size([810, 43]), torch.Size([90, 43]), torch.Size([100, 43]))

    Reference:
        Roe, *MiniBooNE particle identification*, UCI Machine Learning Repository, 2010.
    """
    path = locate("miniboone", root, "miniboone/data.npy", source=ZENODO)
    return _standardised_parts("MINIBOONE", path, read_npy("miniboone", path, 43).astype(np.float64))


def bsds300(root: str | os.PathLike[str]) -> Dataset:
    r"""BSDS300: patches of 8 x 8 pixels of natural images, their mean removed; 63 dimensions.

    The file holds the three parts ready to use. The last pixel is not in it: `complete_patches` restores it.

    Args:
        root: The folder that holds `BSDS300/BSDS300.hdf5` of the published archive.

    Returns:
        1,000,000 rows for training, 50,000 for validation and 250,000 for testing, (rows, 63): 330 MB.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, of another format, without one of its parts or of another shape, or has values
            that are not finite.
        ModuleNotFoundError: Without the `train` extra.

    Example:
        >>> import pathlib, tempfile, h5py, numpy
        >>> with tempfile.TemporaryDirectory() as root:
        ...     pathlib.Path(root, "BSDS300").mkdir()
        ...     with h5py.File(pathlib.Path(root, "BSDS300", "BSDS300.hdf5"), "w") as file:
        ...         for part, rows in {"train": 90, "validation": 20, "test": 30}.items():
        ...             file[part] = numpy.random.rand(rows, 63)
        ...     data = bsds300(root)
        >>> data.train.shape, data.validation.shape, data.test.shape
        (torch.Size([90, 63]), torch.Size([20, 63]), torch.Size([30, 63]))

    Reference:
        Martin, Fowlkes, Tal & Malik, *A Database of Human Segmented Natural Images*, 2001.
    """
    require("bsds300", "h5py")
    import h5py

    path = locate("bsds300", root, "BSDS300/BSDS300.hdf5", source=ZENODO)
    parts = {}
    with reading("bsds300", path, "an HDF5 file with train, validation and test"), h5py.File(path, "r") as file:
        for part in ("train", "validation", "test"):
            if not isinstance(file[part], h5py.Dataset):
                raise ValueError(f"{part} is no table")
            parts[part] = file[part].astype(np.float32)[...]
    train, validation, test = (tensor(check_rows("bsds300", path, rows, 63)) for rows in parts.values())
    return Dataset("BSDS300", train, validation, test)


def _standardised_parts(name: str, path: Path, rows: NDArray[np.float64]) -> Dataset:
    """Split rows by tenths, and standardise by all but the test rows."""
    standardise(name.lower(), path, rows, by=len(hold_out(rows)[0]))
    return Dataset(name, *three_parts(rows))


def _signal(path: Path) -> NDArray[Any]:
    """Read the 27 features of the rows of class 1."""
    rows = read_csv("hepmass", path)
    if rows.shape[1] not in (28, 29):
        raise ValueError(f"hepmass expected a class and 27 features in {path}, got {rows.shape[1]} columns.")
    check_rows("hepmass", path, rows[:, :28], 28)
    signal = rows[rows[:, 0] == 1, 1:28]
    if len(signal) < LEAST_ROWS:
        raise ValueError(f"hepmass expected at least {LEAST_ROWS} rows of class 1 in {path}, got {len(signal)}.")
    return signal
