"""GAS: the sensors of the UCI repository under gas mixtures, from its text file or from the archive's frame."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyro_maf._core.extras import require
from pyro_maf.datasets.archive.formats import check_rows, read_parquet, read_text
from pyro_maf.datasets.archive.lookup import ask_first, find, locate, unpickling
from pyro_maf.datasets.archive.preparation import standardise, three_parts
from pyro_maf.datasets.dataset import Dataset

__all__ = ["gas"]

PARQUET, TEXT, PICKLE = "gas/ethylene_CO.parquet", "gas/ethylene_CO.txt", "gas/ethylene_CO.pickle"
UCI = "https://archive.ics.uci.edu/dataset/322 (Gas sensor array under dynamic gas mixtures)"
NO_SENSORS = ("Meth", "Eth", "Time")
HIGHEST_CORRELATION = 0.98


def gas(root: str | os.PathLike[str], *, allow_pickle: bool = False) -> Dataset:
    r"""GAS: readings of sensors in mixtures of ethylene and carbon monoxide; 8 dimensions.

    Of the 16 sensors, while any correlates with another above 0.98, the first such is dropped. Then the columns are
    standardised by the mean and deviation of all rows; the last tenth is for testing, the last tenth of the rest for
    validation.

    The published archive holds a quarter of the rows, drawn at random, as a pickled data frame of columns Time, Meth,
    Eth and the sensors. A pickle can run any code when it is loaded. So the loader looks for these, in this order:

    - `gas/ethylene_CO.parquet`: that frame, converted by someone who trusted it. The rows are those of the paper.
    - `gas/ethylene_CO.pickle`, with `allow_pickle` only. Likewise.
    - `gas/ethylene_CO.txt`, from UCI. A quarter of its rows is drawn with a fixed seed: the same number as in the
      paper and from the same distribution, but other rows.

    Args:
        root: The folder with one of these.
        allow_pickle: Load the pickle, which runs any code in it. It needs pandas.

    Returns:
        852,174 rows for training, 94,685 for validation and 105,206 for testing, (rows, 8).

    Cost:
        The text file takes about half a minute and 0.8 GB of memory to read.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, of another format or shape, or has values that are not finite; if not 8 sensors
            remain; if there is only the pickle and it is not allowed.
        ModuleNotFoundError: Without the `train` extra, or pandas for the pickle.

    Example:
        >>> import pathlib, tempfile, numpy
        >>> rows = numpy.random.rand(4000, 19)
        >>> rows[:, 11:] = rows[:, 3:11] + 0.01
        >>> with tempfile.TemporaryDirectory() as root:
        ...     pathlib.Path(root, "gas").mkdir()
        ...     numpy.savetxt(pathlib.Path(root, "gas", "ethylene_CO.txt"), rows, header="Time (seconds), sensors")
        ...     data = gas(root)
        >>> data.train.shape, data.validation.shape, data.test.shape
        (torch.Size([810, 8]), torch.Size([90, 8]), torch.Size([100, 8]))

    Reference:
        Fonollosa, Sheik, Huerta & Marco, *Reservoir computing compensates slow response of chemosensor arrays exposed
        to fast varying gas concentrations in continuous monitoring*, 2015.
    """
    pickled = find(root, PICKLE)
    plain = find(root, PARQUET, *([] if pickled and allow_pickle else [TEXT]))
    if pickled and not plain:
        ask_first("gas", pickled, allow_pickle, f"the text file from {UCI}")
    path = plain or pickled or locate("gas", root, TEXT, PARQUET, source=UCI)
    sensors = _uncorrelated(path, _quarter(path) if path.suffix == ".txt" else _frame(path))
    standardise("gas", path, sensors, ddof=1)
    return Dataset("GAS", *three_parts(sensors))


def _quarter(path: Path) -> NDArray[np.float64]:
    """Return the 16 sensors of a random quarter of the rows of UCI's file, in random order."""
    rows = read_text("gas", path, 19)
    drawn = np.random.RandomState(42).permutation(len(rows))[: round(len(rows) / 4)]
    return check_rows("gas", path, rows[drawn, 3:], 16)


def _frame(path: Path) -> NDArray[np.float64]:
    """Return the sensors of the archive's frame, (rows, sensors)."""
    columns = read_parquet("gas", path) if path.suffix == ".parquet" else _unpickled_columns(path)
    missing = [name for name in NO_SENSORS if name not in columns]
    if missing:
        raise ValueError(f"gas expected columns {', '.join(NO_SENSORS)} in {path}, got none named {missing[0]}.")
    sensors = {name: column for name, column in columns.items() if name not in NO_SENSORS}
    if not sensors:
        raise ValueError(f"gas expected sensors in {path}, got columns {', '.join(columns)} alone.")
    for name, column in sensors.items():
        if column.dtype.kind not in "fiu":
            raise ValueError(f"gas expected a number in every row of {path}, got {column.dtype} in column {name}.")
    return check_rows("gas", path, np.column_stack(list(sensors.values())).astype(np.float64), len(sensors))


def _unpickled_columns(path: Path) -> dict[str, NDArray[Any]]:
    require("gas", "pandas")
    import pandas

    with unpickling("gas", path):
        frame: Any = pandas.read_pickle(path)
    if not isinstance(frame, pandas.DataFrame):
        raise ValueError(f"gas expected a pandas data frame in {path}, got {type(frame).__name__}.")
    return {str(name): frame[name].to_numpy() for name in frame.columns}


def _uncorrelated(path: Path, sensors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Drop columns until none correlates with another above 0.98."""
    with np.errstate(invalid="ignore", divide="ignore"):  # a constant column, which is refused later
        high = np.atleast_2d(np.corrcoef(sensors, rowvar=False)) > HIGHEST_CORRELATION
    np.fill_diagonal(high, False)
    kept = np.arange(sensors.shape[1])
    while (correlated := high[np.ix_(kept, kept)].any(1)).any():
        kept = np.delete(kept, correlated.argmax())
    if len(kept) != 8:
        raise ValueError(
            f"gas expected 8 sensors of {path} to be left, none of which correlates with another above "
            f"{HIGHEST_CORRELATION}, got {len(kept)} of {sensors.shape[1]}: is it the archive's file, or UCI's?"
        )
    return sensors[:, kept]
