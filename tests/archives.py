"""Writers of small files in the formats of the published archive, for tests of its loaders."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
UCI_HEADER = "Time (seconds), CO conc (ppm), Ethylene conc (ppm), sensor readings (16 channels)"
DISCRETE = (9, 10, 14, 18, 22, 25)
"""Features of HEPMASS with few distinct values."""


def folder_of(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir(exist_ok=True)
    return folder


def write_power(root: Path, rows: int = 200, columns: int = 8) -> np.ndarray:
    random = np.random.RandomState(1)
    table = random.gamma(2.0, size=(rows, columns)).round(2) * np.arange(1, columns + 1)
    np.save(folder_of(root, "power") / "data.npy", table)
    return table


def write_miniboone(root: Path, rows: int = 150, columns: int = 43) -> np.ndarray:
    table = np.random.RandomState(2).normal(7, 3, size=(rows, columns))
    np.save(folder_of(root, "miniboone") / "data.npy", table)
    return table


def hepmass_rows(rows: int, columns: int, seed: int) -> np.ndarray:
    """Rows of a class, 27 features of which six are discrete, and further columns."""
    random = np.random.RandomState(seed)
    table = random.normal(1, 2, size=(rows, columns))
    table[:, 0] = random.randint(2, size=rows)
    for feature in DISCRETE:
        table[:, 1 + feature] = random.randint(3, size=rows)
    table[:5, 3] = table[:, 3].min() - 1  # a continuous feature's minimum may recur five times
    table[5:30, 7] = table[:, 7].max() + 1  # its maximum may recur any number of times
    table[:30, 0] = 1
    return table


def write_hepmass(root: Path, rows: int = 300, columns: int = 28) -> tuple[np.ndarray, np.ndarray]:
    folder, header = folder_of(root, "hepmass"), ",".join(["label", *(f"f{i}" for i in range(27))])
    tables = hepmass_rows(rows, columns, 3), hepmass_rows(rows // 2, 29, 4)
    for part, table in zip(("train", "test"), tables, strict=True):
        np.savetxt(folder / f"1000_{part}.csv", table, delimiter=",", header=header)
    return tables


def write_bsds300(root: Path, columns: int = 63) -> dict[str, np.ndarray]:
    random = np.random.RandomState(5)
    tables = {
        part: random.normal(size=(rows, columns)) for part, rows in (("train", 40), ("validation", 20), ("test", 31))
    }
    with h5py.File(folder_of(root, "BSDS300") / "BSDS300.hdf5", "w") as file:
        for part, table in tables.items():
            file[part] = table
    return tables


def sensor_frame(rows: int = 400, groups: int = 8, seed: int = 6) -> pd.DataFrame:
    """Time, Meth, Eth and 16 sensors in strongly correlated groups."""
    random = np.random.RandomState(seed)
    causes = random.gamma(2.0, size=(rows, groups)) * 100
    sensors = causes[:, np.arange(16) % groups] + random.normal(size=(rows, 16))
    named = {name: random.gamma(1.0, size=rows) for name in ("Time", "Meth", "Eth")}
    return pd.DataFrame({**named, **{f"R{i}": sensors[:, i] for i in range(16)}})


def write_gas_text(root: Path, rows: int = 400, groups: int = 8) -> pd.DataFrame:
    frame = sensor_frame(rows, groups)
    with open(folder_of(root, "gas") / "ethylene_CO.txt", "w", encoding="utf-8") as file:
        file.write(UCI_HEADER + "\n")
        for row in frame.to_numpy():
            file.write("   ".join(f"{value:.17g}" for value in row) + " \n")
    return frame


def write_gas_parquet(root: Path, frame: pd.DataFrame | None = None) -> pd.DataFrame:
    # The archive's rows are a sample, so pandas writes their index as an additional column.
    frame = sensor_frame().sample(frac=0.5, random_state=0) if frame is None else frame
    parquet.write_table(pa.Table.from_pandas(frame), folder_of(root, "gas") / "ethylene_CO.parquet")
    return frame


def mnist_images() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Levels, (images, 28, 28), and labels; the first two images are all 0 and all 255."""
    random = np.random.RandomState(7)
    images = {}
    for part, size in (("train", 66), ("t10k", 13)):
        levels = random.randint(256, size=(size, 28, 28)).astype(np.uint8)
        levels[0], levels[1] = 0, 255
        images[part] = levels, random.randint(10, size=size).astype(np.uint8)
    return images


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_mnist(root: Path, suffix: str = "") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    images, folder = mnist_images(), folder_of(root, "mnist")
    for part, arrays in images.items():
        for kind, array in zip(("images-idx3", "labels-idx1"), arrays, strict=True):
            content = idx(array)
            path = folder / f"{part}-{kind}-ubyte{suffix}"
            path.write_bytes(gzip.compress(content) if suffix else content)
    return images


def cifar_images() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    random = np.random.RandomState(8)
    return {
        name: (random.randint(256, size=(12, 3072)).astype(np.uint8), random.randint(10, size=12).astype(np.uint8))
        for name in BATCHES
    }


def write_cifar10(root: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    images, folder = cifar_images(), folder_of(root, "cifar10")
    for name, (levels, labels) in images.items():
        np.hstack([labels[:, None], levels]).tofile(folder / f"{name}.bin")
    return images


WRITERS: Mapping[str, Callable[[Path], Any]] = MappingProxyType(
    {
        "power": write_power,
        "gas": write_gas_text,
        "hepmass": write_hepmass,
        "miniboone": write_miniboone,
        "bsds300": write_bsds300,
        "mnist": write_mnist,
        "cifar10": write_cifar10,
    }
)
