"""Archive files that are missing, damaged, of another format or of wrong content are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from pyro_maf.datasets import ARCHIVE
from tests import archives
from tests.archives import WRITERS

MNIST_FILES = [
    f"mnist/{part}-ubyte" for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
]
FILES = [
    ("power", "power/data.npy"),
    ("gas", "gas/ethylene_CO.txt"),
    ("hepmass", "hepmass/1000_train.csv"),
    ("hepmass", "hepmass/1000_test.csv"),
    ("miniboone", "miniboone/data.npy"),
    ("bsds300", "BSDS300/BSDS300.hdf5"),
    *(("mnist", file) for file in MNIST_FILES),
    ("cifar10", "cifar10/data_batch_3.bin"),
    ("cifar10", "cifar10/test_batch.bin"),
]
OTHER_FORMS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "parquet": ("gas", "gas/ethylene_CO.parquet", archives.write_gas_parquet),
    "idx.gz": ("mnist", "mnist/train-images-idx3-ubyte.gz", lambda root: archives.write_mnist(root, ".gz")),
}
WRITTEN = [(name, file, WRITERS[name]) for name, file in FILES] + list(OTHER_FORMS.values())
every_file = pytest.mark.parametrize(("name", "file", "write"), WRITTEN, ids=[file for _, file, _ in WRITTEN])


def refusal(name: str, root: Path, error: type[Exception] = ValueError) -> str:
    """The loader's error message, which must be one line."""
    with pytest.raises(error) as caught:
        ARCHIVE[name](root)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{name} expected ")
    return message


@pytest.mark.parametrize(("name", "file"), FILES, ids=[file for _, file in FILES])
def test_a_missing_file_is_named_with_its_source_and_its_place(tmp_path: Path, name: str, file: str) -> None:
    WRITERS[name](tmp_path)
    (tmp_path / file).unlink()
    message = refusal(name, tmp_path, FileNotFoundError)
    assert f"a file at {(tmp_path / file).parent}" in message
    assert Path(file).name in message
    assert any(source in message for source in ("zenodo.org", "uci.edu", "lecun.com", "cs.toronto.edu"))
    assert message.endswith(" and put it there.")


def test_a_folder_in_the_place_of_a_file_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "power" / "data.npy").mkdir(parents=True)
    assert "found a folder" in refusal("power", tmp_path, FileNotFoundError)


@every_file
def test_an_empty_file_is_refused(tmp_path: Path, name: str, file: str, write: Callable[[Path], Any]) -> None:
    write(tmp_path)
    (tmp_path / file).write_bytes(b"")
    assert str(tmp_path / file) in refusal(name, tmp_path)


@every_file
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, file: str, write: Callable[[Path], Any]) -> None:
    write(tmp_path)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:-30] if len(content) > 60 else content[:-5])
    assert str(tmp_path / file) in refusal(name, tmp_path)


@every_file
@pytest.mark.parametrize("content", [b"GIF89a" + bytes(range(256)) * 9, b"a,b\nc,d\n" * 40], ids=["binary", "words"])
def test_a_file_of_another_format_is_refused(
    tmp_path: Path, name: str, file: str, write: Callable[[Path], Any], content: bytes
) -> None:
    write(tmp_path)
    (tmp_path / file).write_bytes(content)
    assert str(tmp_path / file) in refusal(name, tmp_path)


def spoil(table: np.ndarray, value: float) -> np.ndarray:
    table[31, 2] = value
    return table


def save_npy(root: Path, array: Any) -> None:
    np.save(archives.folder_of(root, "power") / "data.npy", array)


def save_csv(root: Path, table: np.ndarray) -> None:
    archives.write_hepmass(root)
    np.savetxt(root / "hepmass" / "1000_train.csv", table, delimiter=",", header="label")


def save_hdf5(root: Path, **tables: Any) -> None:
    with h5py.File(archives.folder_of(root, "BSDS300") / "BSDS300.hdf5", "w") as file:
        for part, table in tables.items():
            file[part] = table


def save_frame(root: Path, **changes: Any) -> None:
    frame = archives.sensor_frame(groups=7)
    for name, value in changes.items():
        frame = frame.drop(columns=name) if value is None else frame.assign(**{name: value})
    archives.write_gas_parquet(root, frame)


def save_idx(root: Path, part: str, array: np.ndarray) -> None:
    archives.write_mnist(root)
    (root / "mnist" / f"{part}-ubyte").write_bytes(archives.idx(array))


def label_of_cifar(root: Path, label: int) -> None:
    archives.write_cifar10(root)
    path = root / "cifar10" / "data_batch_4.bin"
    path.write_bytes(bytes([label]) + path.read_bytes()[1:])


REFUSED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "too few columns of POWER": (
        "power",
        lambda root: archives.write_power(root, columns=7),
        r"rows of 8 numbers in .*data.npy, got float64 of shape \(200, 7\)",
    ),
    "columns of MINIBOONE": (
        "miniboone",
        lambda root: archives.write_miniboone(root, columns=50),
        r"rows of 43 numbers in .*data.npy, got .*\(150, 50\)",
    ),
    "too few rows": (
        "power",
        lambda root: archives.write_power(root, rows=19),
        r"at least 20 rows in .*data.npy, got 19",
    ),
    "one dimension": ("power", lambda root: save_npy(root, np.zeros(8)), r"got float64 of shape \(8,\)"),
    "words": ("power", lambda root: save_npy(root, np.full((30, 8), "x")), r"rows of 8 numbers in .*, got <U1"),
    "complex numbers": ("power", lambda root: save_npy(root, np.zeros((30, 8), complex)), r"got complex128"),
    "objects": ("power", lambda root: save_npy(root, np.full((30, 8), None)), r"to be an .npy file, got .*object"),
    "nan": (
        "power",
        lambda root: save_npy(root, spoil(np.ones((40, 8)), np.nan)),
        r"finite numbers in .*, got nan in row 31, column 2",
    ),
    "inf": ("power", lambda root: save_npy(root, spoil(np.ones((40, 8)), np.inf)), r"got inf in row 31, column 2"),
    "constant": (
        "power",
        lambda root: save_npy(root, np.ones((40, 8))),
        r"every column it keeps of .*data.npy to vary, got 1 in",
    ),
    "columns of HEPMASS": (
        "hepmass",
        lambda root: archives.write_hepmass(root, columns=27),
        r"a class and 27 features in .*1000_train.csv, got 27",
    ),
    "no signal": (
        "hepmass",
        lambda root: save_csv(root, np.random.rand(50, 28)),
        r"at least 20 rows of class 1 in .*1000_train.csv, got 0",
    ),
    "nan of HEPMASS": (
        "hepmass",
        lambda root: save_csv(root, spoil(np.ones((50, 28)), np.nan)),
        r"got nan in row 31, column 2",
    ),
    "other features": (
        "hepmass",
        lambda root: save_csv(root, np.ones((50, 1)) + np.arange(28) * 0),
        r"21 features of .*1000_train.csv .*, got 0",
    ),
    "columns of BSDS300": (
        "bsds300",
        lambda root: archives.write_bsds300(root, columns=64),
        r"rows of 63 numbers in .*hdf5, got float32 of shape \(40, 64\)",
    ),
    "a missing part": (
        "bsds300",
        lambda root: save_hdf5(root, train=np.ones((5, 63)), test=np.ones((5, 63))),
        r"with train, validation and test, got .*validation",
    ),
    "a group for a part": (
        "bsds300",
        lambda root: save_hdf5(root, **{"train/rows": np.ones((5, 63))}),
        r"BSDS300.hdf5 to be an HDF5 file .*train is not a table",
    ),
    "no rows of a part": (
        "bsds300",
        lambda root: save_hdf5(root, train=np.ones((20, 63)), validation=np.ones((0, 63)), test=np.ones((20, 63))),
        r"at least 20 rows in .*, got 0",
    ),
    "sensors that go together": (
        "gas",
        lambda root: archives.write_gas_text(root, groups=7),
        r"8 sensors of .*ethylene_CO.txt .*, got 7 of 16",
    ),
    "no column of time": (
        "gas",
        lambda root: save_frame(root, Time=None),
        r"columns Meth, Eth, Time in .*parquet, got none named Time",
    ),
    "a sensor of words": (
        "gas",
        lambda root: save_frame(root, R3="high"),
        r"a number in every row of .*parquet, got object in column R3",
    ),
    "a sensor without a value": (
        "gas",
        lambda root: save_frame(root, R3=np.nan),
        r"finite numbers in .*parquet, got nan in row 0, column 3",
    ),
    "a constant sensor": (
        "gas",
        lambda root: save_frame(root, R0=3.0),
        r"every column it keeps of .*parquet to vary, got 3 in",
    ),
    "no sensor": (
        "gas",
        lambda root: save_frame(root, **{f"R{i}": None for i in range(16)}),
        r"sensors in .*parquet, got only columns Time, Meth, Eth",
    ),
    "images of another size": (
        "mnist",
        lambda root: save_idx(root, "train-images-idx3", np.zeros((66, 32, 32), np.uint8)),
        r"28 x 28 pixels in .*train-images-idx3-ubyte, got shape \(66, 32, 32\)",
    ),
    "labels for images": (
        "mnist",
        lambda root: save_idx(root, "train-images-idx3", np.zeros(66, np.uint8)),
        r"an idx file of images, got .*it begins with 00 00 08 01",
    ),
    "too few labels": (
        "mnist",
        lambda root: save_idx(root, "t10k-labels-idx1", np.zeros(12, np.uint8)),
        r"13 labels in .*t10k-labels-idx1-ubyte, .* got shape \(12,\)",
    ),
    "a label of 10": (
        "mnist",
        lambda root: save_idx(root, "t10k-labels-idx1", np.full(13, 10, np.uint8)),
        r"labels of 0 .. 9 in .*, got labels up to 10",
    ),
    "a label of CIFAR-10": (
        "cifar10",
        lambda root: label_of_cifar(root, 77),
        r"labels of 0 .. 9 in .*data_batch_4.bin, got labels up to 77",
    ),
}


@pytest.mark.parametrize(("name", "write", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_content_that_does_not_fit_is_refused_in_words(
    tmp_path: Path, name: str, write: Callable[[Path], Any], words: str
) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=words):
        ARCHIVE[name](tmp_path)
    refusal(name, tmp_path)


@pytest.mark.parametrize(("name", "file"), [("gas", "gas/ethylene_CO.txt"), ("hepmass", "hepmass/1000_test.csv")])
def test_a_table_without_its_header_is_refused(tmp_path: Path, name: str, file: str) -> None:
    WRITERS[name](tmp_path)
    header, rest = (tmp_path / file).read_text(encoding="utf-8").split("\n", 1)
    assert header
    (tmp_path / file).write_text(rest, encoding="utf-8")
    assert "its first line holds no names of columns" in refusal(name, tmp_path)


def test_a_pickle_is_neither_accepted_nor_opened(tmp_path: Path) -> None:
    (archives.folder_of(tmp_path, "gas") / "ethylene_CO.pickle").write_bytes(b"any code")
    message = refusal("gas", tmp_path, FileNotFoundError)
    assert "pandas.read_pickle(PICKLE).to_parquet(PARQUET)" in message
