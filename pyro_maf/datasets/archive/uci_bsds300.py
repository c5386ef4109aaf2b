"""The paper's tables: POWER, GAS, HEPMASS and MINIBOONE from the UCI repository, and the patches of BSDS300."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_maf._core.messages import require
from pyro_maf.datasets.archive.formats import LEAST_ROWS, ZENODO, check_rows, locate, read_npy, read_text, reading
from pyro_maf.datasets.dataset import Dataset

__all__ = ["bsds300", "gas", "hepmass", "miniboone", "power"]

Rows: TypeAlias = NDArray[np.float64]
PARQUET, TEXT = "gas/ethylene_CO.parquet", "gas/ethylene_CO.txt"
GAS = (
    "https://archive.ics.uci.edu/dataset/322 (Gas sensor array under dynamic gas mixtures), or convert the archive's "
    "pickle, which can run any code, by pandas.read_pickle(PICKLE).to_parquet(PARQUET)"
)
NO_SENSORS = ("Meth", "Eth", "Time")
HIGHEST_CORRELATION = 0.98
MOST_REPEATS = 5


def power(root: str | os.PathLike[str]) -> Dataset:
    r"""POWER: electric power consumption of a household, by the minute; 6 dimensions.

    The 8 columns of the file are active power, reactive power, voltage, intensity, three sub-meterings and the time.
    Rows are shuffled, reactive power and intensity are dropped, and uniform noise breaks the ties caused by rounding:
    up to 0.001 for the active power, 0.01 for the voltage, 1 for each sub-metering. Shuffle and noise are drawn as in
    the published code, so the rows are the paper's. The last tenth is for testing, and the last tenth of the rest for
    validation. All are standardised by the mean and deviation of training and validation rows.

    Args:
        root: The folder that contains the published archive's `power/data.npy`.

    Returns:
        1,659,917 rows for training, 184,435 for validation and 204,928 for testing, (rows, 6).

    Raises:
        FileNotFoundError: If the file does not exist.
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


def gas(root: str | os.PathLike[str]) -> Dataset:
    r"""GAS: readings of sensors in mixtures of ethylene and carbon monoxide; 8 dimensions.

    While any of the 16 sensors has a correlation above 0.98 with another, the first such sensor is dropped. Then the
    columns are standardised by the mean and deviation of all rows; the last tenth is for testing, and the last tenth of
    the rest for validation.

    The published archive holds a quarter of the rows, drawn at random, as a pickled data frame with columns Time, Meth,
    Eth and the sensors. Loading a pickle can run arbitrary code, so the loader looks for these files, in this order:

    - `gas/ethylene_CO.parquet`: the same frame, converted by `pandas.read_pickle(...).to_parquet(...)` if you trust it.
      The rows are the paper's.
    - `gas/ethylene_CO.txt`, from UCI. A quarter of its rows is drawn with a fixed seed: as many as in the paper, from
      the same distribution, but other rows.

    Args:
        root: The folder that contains one of these files.

    Returns:
        852,174 rows for training, 94,685 for validation and 105,206 for testing, (rows, 8).

    Cost:
        The text file takes about half a minute and 0.8 GB of memory to read.

    Raises:
        FileNotFoundError, ValueError: As `power`, and if the number of remaining sensors is not 8.
        ModuleNotFoundError: For parquet without the `cli` extra.

    Reference:
        Fonollosa, Sheik, Huerta & Marco, *Reservoir computing compensates slow response of chemosensor arrays exposed
        to fast varying gas concentrations in continuous monitoring*, 2015.
    """
    path = locate("gas", root, PARQUET, TEXT, source=GAS)
    sensors = _uncorrelated(path, _quarter(path) if path.suffix == ".txt" else _frame(path))
    _standardise("gas", path, sensors, ddof=1)
    return Dataset("GAS", *_three_parts(sensors))


def hepmass(root: str | os.PathLike[str]) -> Dataset:
    r"""HEPMASS: collisions that produce a particle of mass 1000; 21 dimensions.

    The rows are those of class 1, and their columns the 27 features after the class; the test file's further columns
    are dropped. Features are standardised by the mean and deviation of all rows of the training file. A feature whose
    smallest value occurs more than 5 times in them is partly discrete, and is dropped. The last tenth of the training
    file is for validation.

    Args:
        root: The folder that contains the published archive's `hepmass/1000_train.csv` and `hepmass/1000_test.csv`.

    Returns:
        315,123 rows for training, 35,013 for validation and 174,987 for testing, (rows, 21).

    Raises:
        FileNotFoundError, ValueError: As `power`, and if the number of remaining features is not 21.

    Reference:
        Baldi, Cranmer, Faucett, Sadowski & Whiteson, *Parameterized Machine Learning for High-Energy Physics*, 2016.
    """
    paths = [locate("hepmass", root, f"hepmass/1000_{part}.csv", source=ZENODO) for part in ("train", "test")]
    train, test = (_signal(path) for path in paths)
    repeats = (train == train.min(0)).sum(0)
    continuous = repeats <= MOST_REPEATS
    if continuous.sum() != 21:
        raise ValueError(
            f"hepmass expected 21 features of {paths[0]} whose smallest value occurs at most {MOST_REPEATS} times, "
            f"got {continuous.sum()}: is it the archive's file?"
        )
    train, test = train[:, continuous], test[:, continuous]
    _standardise("hepmass", paths[0], train, test, ddof=1)
    train, validation = _hold_out(train)
    return Dataset("HEPMASS", _tensor(train), _tensor(validation), _tensor(test))


def miniboone(root: str | os.PathLike[str]) -> Dataset:
    r"""MINIBOONE: particles in a neutrino detector; 43 dimensions.

    The file already lacks outliers and discrete columns. Rows are split and standardised as in `power`.

    Args:
        root: The folder that contains the published archive's `miniboone/data.npy`.

    Returns:
        29,556 rows for training, 3,284 for validation and 3,648 for testing, (rows, 43).

    Raises:
        FileNotFoundError, ValueError: As `power`.

    Reference:
        Roe, *MiniBooNE particle identification*, UCI Machine Learning Repository, 2010.
    """
    path = locate("miniboone", root, "miniboone/data.npy", source=ZENODO)
    return _standardised_parts("MINIBOONE", path, read_npy("miniboone", path, 43).astype(np.float64))


def bsds300(root: str | os.PathLike[str]) -> Dataset:
    r"""BSDS300: patches of 8 x 8 pixels of natural images, with their mean subtracted; 63 dimensions.

    The file holds the three parts ready to use, without the last pixel, which `complete_patches` restores.

    Args:
        root: The folder that contains the published archive's `BSDS300/BSDS300.hdf5`.

    Returns:
        1,000,000 rows for training, 50,000 for validation and 250,000 for testing, (rows, 63): 330 MB.

    Raises:
        FileNotFoundError, ValueError: As `power`.
        ModuleNotFoundError: Without the `all` extra.

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
                raise ValueError(f"{part} is not a table")
            parts[part] = file[part].astype(np.float32)[...]
    train, validation, test = (_tensor(check_rows("bsds300", path, rows, 63)) for rows in parts.values())
    return Dataset("BSDS300", train, validation, test)


def _quarter(path: Path) -> Rows:
    """Return the 16 sensors of a random quarter of the rows of UCI's file, in random order."""
    rows = check_rows("gas", path, read_text("gas", path), 19)
    drawn = np.random.RandomState(42).permutation(len(rows))[: round(len(rows) / 4)]
    return check_rows("gas", path, rows[drawn, 3:], 16)


def _frame(path: Path) -> Rows:
    """Return the sensors of the archive's frame, (rows, sensors)."""
    require("gas", "pyarrow")
    from pyarrow import parquet

    with reading("gas", path, "a parquet file"):
        table = parquet.read_table(path)
        columns = {name: table[name].to_numpy() for name in table.column_names if not name.startswith("__index_level_")}
    missing = [name for name in NO_SENSORS if name not in columns]
    if missing:
        raise ValueError(f"gas expected columns {', '.join(NO_SENSORS)} in {path}, got none named {missing[0]}.")
    sensors = {name: column for name, column in columns.items() if name not in NO_SENSORS}
    if not sensors:
        raise ValueError(f"gas expected sensors in {path}, got only columns {', '.join(columns)}.")
    for name, column in sensors.items():
        if column.dtype.kind not in "fiu":
            raise ValueError(f"gas expected a number in every row of {path}, got {column.dtype} in column {name}.")
    return check_rows("gas", path, np.column_stack(list(sensors.values())).astype(np.float64), len(sensors))


def _uncorrelated(path: Path, sensors: Rows) -> Rows:
    """Drop columns until none correlates with another above 0.98."""
    with np.errstate(invalid="ignore", divide="ignore"):  # for a constant column, which raises later
        high = np.atleast_2d(np.corrcoef(sensors, rowvar=False)) > HIGHEST_CORRELATION
    np.fill_diagonal(high, False)
    remaining = np.arange(sensors.shape[1])
    while (correlated := high[np.ix_(remaining, remaining)].any(1)).any():
        remaining = np.delete(remaining, correlated.argmax())
    if len(remaining) != 8:
        raise ValueError(
            f"gas expected 8 sensors of {path} to be left, none of which correlates with another above "
            f"{HIGHEST_CORRELATION}, got {len(remaining)} of {sensors.shape[1]}: is it the archive's file, or UCI's?"
        )
    return sensors[:, remaining]


def _signal(path: Path) -> Rows:
    """Read the 27 features of the rows of class 1."""
    rows = read_text("hepmass", path, ",")
    if rows.shape[1] not in (28, 29):
        raise ValueError(f"hepmass expected a class and 27 features in {path}, got {rows.shape[1]} columns.")
    check_rows("hepmass", path, rows[:, :28], 28)
    signal = rows[rows[:, 0] == 1, 1:28]
    if len(signal) < LEAST_ROWS:
        raise ValueError(f"hepmass expected at least {LEAST_ROWS} rows of class 1 in {path}, got {len(signal)}.")
    return signal


def _standardised_parts(name: str, path: Path, rows: Rows) -> Dataset:
    """Split rows by tenths, and standardise by all but the test rows."""
    _standardise(name.lower(), path, rows, by=len(_hold_out(rows)[0]))
    return Dataset(name, *_three_parts(rows))


def _hold_out(rows: Rows) -> tuple[Rows, Rows]:
    """Split off the last tenth of the rows, rounded down."""
    return rows[: len(rows) - len(rows) // 10], rows[len(rows) - len(rows) // 10 :]


def _three_parts(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Split rows, as float32: the last tenth is for testing, the last tenth of the rest for validation."""
    rest, test = _hold_out(rows)
    train, validation = _hold_out(rest)
    return _tensor(train), _tensor(validation), _tensor(test)


def _standardise(who: str, path: Path, rows: Rows, *others: Rows, by: int | None = None, ddof: int = 0) -> None:
    """Standardise rows, and others, in place by the mean and deviation of the rows, or of the first `by`."""
    reference = rows[:by]
    constant = np.flatnonzero(reference.min(0) == reference.max(0))
    if len(constant):
        raise ValueError(
            f"{who} expected every column it keeps of {path} to vary, "
            f"got {reference[0, constant[0]]:g} in every row of one."
        )
    mean, deviation = reference.mean(0), reference.std(0, ddof=ddof)
    for part in (rows, *others):
        part -= mean
        part /= deviation


def _tensor(rows: Rows) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.float32))
