"""Tables: all formats have the same values, in memory and streamed, and errors are one line."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import random
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import csv as arrow_csv
from pyarrow import feather

from pyro_maf import MAF, fit, fit_prior
from pyro_maf.datasets import read_table
from pyro_maf.tables import sources
from pyro_maf.tables import table as table_module
from pyro_maf.tables.layout import Layout
from pyro_maf.tables.spool import temporary_file

ROWS = 50
NAMES = ("length", "width", "height")
COLOURS = ("blue", "green", "red")


def numbers() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).normal(10, 2, (ROWS, 3)).astype(np.float32)


def frame() -> pd.DataFrame:
    """Three columns of data and four of context: a number, a text, a boolean and a categorical."""
    random = np.random.default_rng(1)
    table = pd.DataFrame(numbers(), columns=list(NAMES))
    table.insert(1, "colour", [COLOURS[i] for i in np.arange(ROWS) % 3])
    table.insert(0, "age", random.integers(20, 80, ROWS))
    table["is_new"] = random.random(ROWS) < 0.5
    table["size"] = pd.Categorical(np.where(random.random(ROWS) < 0.5, "small", "large"))
    return table


def write_csv(path: Path, table: pd.DataFrame, **options: Any) -> Path:
    table.to_csv(path, index=False, float_format="%.9g", **options)
    return path


def write_compressed(path: Path, table: pd.DataFrame, compress: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(compress(write_csv(path, table).read_bytes()))
    return path


def write_gzip(path: Path, table: pd.DataFrame) -> Path:
    return write_compressed(path, table, gzip.compress)


def write_parquet(path: Path, table: pd.DataFrame) -> Path:
    # Split into row groups, with an index that is not a column.
    table.set_index(np.arange(len(table)) * 2).to_parquet(path, row_group_size=7)
    return path


WITH_NAMES: dict[str, Callable[[Path, pd.DataFrame], Path]] = {
    "csv": write_csv,
    "tsv": lambda path, table: write_csv(path, table, sep="\t"),
    "semicolons": lambda path, table: write_csv(path, table, sep=";"),
    "byte order mark": lambda path, table: write_csv(path, table, encoding="utf-8-sig"),
    "Windows lines": lambda path, table: write_csv(path, table, lineterminator="\r\n"),
    "all quoted": lambda path, table: write_csv(path, table, quoting=1),
    "gzip": write_gzip,
    "bzip2": lambda path, table: write_compressed(path, table, bz2.compress),
    "xz": lambda path, table: write_compressed(path, table, lzma.compress),
    "parquet": write_parquet,
}


def save_text(path: Path, array: Any) -> Path:
    np.savetxt(path, array, fmt="%.9g")
    return path


def save_npy(path: Path, array: Any) -> Path:
    with open(path, "wb") as file:
        np.save(file, array)
    return path


def save_npz(path: Path, **arrays: Any) -> Path:
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    return path


WITHOUT_NAMES: dict[str, Callable[[Path, Any], Path]] = {
    "spaces": save_text,
    "csv": lambda path, array: write_csv(path, pd.DataFrame(array), header=False),
    "npy": save_npy,
    "npy, float64": lambda path, array: save_npy(path, array.astype(np.float64)),
    "npy, columns first": lambda path, array: save_npy(path, np.asfortranarray(array)),
    "npy, other byte order": lambda path, array: save_npy(path, array.astype(">f4")),
    "npz": lambda path, array: save_npz(path, rows=array, label=np.arange(len(array))),
}

with_names = pytest.mark.parametrize("write", WITH_NAMES.values(), ids=WITH_NAMES.keys())
without_names = pytest.mark.parametrize("write", WITHOUT_NAMES.values(), ids=WITHOUT_NAMES.keys())


def text(content: str | bytes) -> io.BytesIO:
    return io.BytesIO(content if isinstance(content, bytes) else content.encode())


# -- what is read ------------------------------------------------------------------------------------------------------


@with_names
def test_columns_with_names_are_read_from_every_format(tmp_path: Path, write: Any) -> None:
    table = read_table(write(tmp_path / "table", frame()[list(NAMES)]))
    assert table.names == NAMES
    assert table.data.dtype == np.float32
    assert np.array_equal(table.data, numbers())
    assert (table.context, table.context_names) == (None, ())


@without_names
def test_columns_without_names_are_numbered(tmp_path: Path, write: Any) -> None:
    table = read_table(write(tmp_path / "table", numbers()))
    assert table.names == ("x1", "x2", "x3")
    assert table.data.dtype == np.float32
    assert np.array_equal(table.data, numbers())


@with_names
def test_context_is_read_with_a_column_for_each_category(tmp_path: Path, write: Any) -> None:
    given = frame()
    table = read_table(write(tmp_path / "table", given), context=["size", "age", "colour", "is_new"])
    assert table.names == NAMES
    assert table.context_names == (
        *("size=large", "size=small", "age", "colour=blue", "colour=green", "colour=red"),
        *("is_new=False", "is_new=True"),
    )
    expected = [given["size"] == "large", given["size"] == "small", given["age"]]
    expected += [given["colour"] == colour for colour in COLOURS] + [~given["is_new"], given["is_new"]]
    assert table.context is not None
    assert np.array_equal(table.context, np.stack(expected, 1).astype(np.float32))


@pytest.mark.parametrize("write", [write_csv, write_parquet])
def test_numbers_become_categories_if_declared_as_labels(tmp_path: Path, write: Any) -> None:
    given = pd.DataFrame({"x": np.arange(6.0), "label": [10, 2, 2, 1, 10, 1]})
    table = read_table(write(tmp_path / "table", given), context=["label"], categories=["label"])
    assert table.context_names == ("label=1", "label=2", "label=10")
    assert table.context is not None
    assert table.context.argmax(1).tolist() == [2, 1, 1, 0, 2, 0]
    again = read_table(write(tmp_path / "other", given[::-1]), columns=table.layout, context=table.context_layout)
    assert again.context is not None
    assert np.array_equal(again.context, table.context[::-1])


@pytest.mark.parametrize("write", [write_csv, write_gzip, WITH_NAMES["parquet"]], ids=["csv", "gzip", "parquet"])
def test_text_that_repeats_among_the_data_is_categories(tmp_path: Path, write: Any) -> None:
    given = frame()[["length", "colour", "is_new", "width"]]
    table = read_table(write(tmp_path / "table", given))
    colours = tuple(sorted(given["colour"].unique()))
    assert table.categories == (None, colours, ("False", "True"), None)
    assert table.data[:, 1].tolist() == [colours.index(colour) for colour in given["colour"]]
    assert table.data[:, 2].tolist() == given["is_new"].tolist()
    again = read_table(write(tmp_path / "again", given.iloc[::-1, ::-1]), columns=table.layout)
    assert np.array_equal(again.data, table.data[::-1])
    assert again.layout == table.layout
    with pytest.raises(ValueError, match=r"got 'pink' in data row 1 \(counted from 1\) of column 'colour'"):
        read_table(text("length,colour,is_new,width\n1,pink,True,2\n"), columns=table.layout)


def test_text_that_is_no_category_is_refused_where_it_is() -> None:
    for cells in ("1,2,x,4", "a,b,c,d", "2024-01-01,2024-01-01,2024-01-02,2024-01-02", "a,a,a,a"):
        rows = "".join(f"{number},{cell}\n" for number, cell in enumerate(cells.split(",")))
        with pytest.raises(ValueError, match=r"^read_table expected numbers, got .* in data row \d .* of column 'b'"):
            read_table(text("a,b\n" + rows))
    assert read_table(text("a,b\n1,x\n2,\n3,x\n4,y\n5,y\n"), drop_missing=True).data[:, 1].tolist() == [0, 0, 1, 1]


def test_a_fit_of_a_table_with_text_is_that_of_the_frame(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    kind = np.array(["b", "a", "c"])[random.integers(3, size=200)]
    given = pd.DataFrame({"x": random.normal(size=200), "kind": kind})
    given["x"] += given["kind"] == "a"
    given.to_csv(tmp_path / "table.csv", index=False)
    table = read_table(tmp_path / "table.csv", dtype="float64")
    expected, result = (fit(data, max_epochs=3, progress=False) for data in (given, table))
    assert torch.equal(result.score(table), expected.score(given))
    assert torch.equal(result.score(given), expected.score(given))
    drawn = result.sample(20)
    assert isinstance(drawn, pd.DataFrame)
    assert set(drawn["kind"]) <= {"a", "b", "c"}
    other = read_table(text("x,kind\n1,a\n2,c\n3,a\n4,c\n"))
    with pytest.raises(ValueError, match=r"score expected rows with the categories .* of column 'kind', got"):
        result.score(other)
    with pytest.raises(ValueError, match="fit expected data of numbers, got categories in column 'kind'"):
        fit_prior(table)


def test_categories_are_context() -> None:
    with pytest.raises(ValueError, match="expected categories among the columns of context, got 'a'"):
        read_table(io.BytesIO(b"a,b\n1,2\n"), categories=["a"])


def test_columns_are_taken_in_the_order_asked_for(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "table.csv", frame())
    table = read_table(path, columns=["height", "length"], context=["age"])
    assert table.names == ("height", "length")
    assert np.array_equal(table.data, numbers()[:, [2, 0]])


def test_standard_input_and_streams_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for write in (write_csv, write_parquet):
        content = write(tmp_path / "table", frame()[list(NAMES)]).read_bytes()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert np.array_equal(read_table("-").data, numbers())
        assert np.array_equal(read_table(io.BytesIO(content)).data, numbers())


@pytest.mark.parametrize(
    ("content", "names", "rows"),
    [
        ("a,b\n1,2\n3,4\n", ("a", "b"), 2),
        ("1,2\n3,4\n", ("x1", "x2"), 2),
        ("0,1\n0.5,1.5\n", ("0", "1"), 1),
        ("0,1\n2,3\n", ("x1", "x2"), 2),
        ("2019,2020\n1.5,2.5\n", ("x1", "x2"), 2),
        ("# a,b\n1,2\n", ("a", "b"), 1),
        ("\n\na, b\n1, 2\n\n3, 4\n", ("a", "b"), 2),
        ("1 2 3\n4 5 6\n", ("x1", "x2", "x3"), 2),
        ("wind speed\n1\n2\n", ("wind speed",), 2),
        ('"a, b","c\nd"\n+1,-2e3\n', ("a, b", "c\nd"), 1),
        ("a\tb c\n1\t2\n", ("a", "b c"), 1),
        ("5,6", ("x1", "x2"), 1),
    ],
    ids=repr,
)
def test_names_and_separators_are_recognised(content: str, names: tuple[str, ...], rows: int) -> None:
    table = read_table(text(content))
    assert (table.names, len(table.data)) == (names, rows)


def test_text_without_names_may_hold_context() -> None:
    table = read_table(text("1.5,red\n2.5,blue\n"), context=["x2"])
    assert table.context_names == ("x2=blue", "x2=red")


def test_signs_and_exponents_are_numbers() -> None:
    table = read_table(text("a,b\n+1, 1e3 \n-.5,2E-3\n"))
    assert table.data.tolist() == np.array([[1, 1000], [-0.5, 0.002]], np.float32).tolist()


def test_an_array_of_an_npz_file_is_chosen_by_name(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "table.npz", train=numbers(), test=numbers()[:5] + 1)
    assert np.array_equal(read_table(path, array="test").data, numbers()[:5] + 1)
    with pytest.raises(ValueError, match=re.escape("choose one of train, test by array=")):
        read_table(path)
    with pytest.raises(ValueError, match=re.escape("no array 'tets' in table.npz, but train, test")):
        read_table(path, array="tets")


def test_a_vector_is_one_column(tmp_path: Path) -> None:
    assert read_table(save_npy(tmp_path / "vector.npy", np.arange(4.0))).data.tolist() == [[0], [1], [2], [3]]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.int8(), pa.uint64(), pa.decimal128(22, 2)], ids=str)
def test_parquet_of_every_kind_of_number_is_read(tmp_path: Path, kind: Any) -> None:
    values = pa.array(np.array([1, 2, 3], np.float16) if pa.types.is_float16(kind) else [1, 2, 3]).cast(kind)
    pq.write_table(pa.table({"a": values}), tmp_path / "table.parquet")
    assert read_table(tmp_path / "table.parquet").data.tolist() == [[1], [2], [3]]


def test_a_fit_takes_what_was_read(tmp_path: Path) -> None:
    table = read_table(write_csv(tmp_path / "table.csv", frame()), columns=NAMES, context=["age", "colour"])
    result = fit(MAF(3, context_dim=4, num_layers=1), table.data, context=table.context, max_epochs=1, progress=False)
    assert result.density.condition(torch.tensor(table.context)).log_prob(torch.tensor(table.data)).shape == (ROWS,)


# -- as precise as it is -----------------------------------------------------------------------------------------------

PRECISE = {
    "northings": [5.4e6 + 0.125 * i for i in range(50)],
    "time stamps": [1.7e9 + 10.0 * i for i in range(50)],
    "close to 1": [1 - 1e-9 * (i + 1) for i in range(50)],
    "very small": [1e-50 * (i + 1) for i in range(50)],
}


@pytest.mark.parametrize("column", PRECISE.values(), ids=PRECISE.keys())
@pytest.mark.parametrize("write", [write_csv, write_parquet])
def test_columns_that_float32_rounds_are_read_in_float64(tmp_path: Path, write: Any, column: list[float]) -> None:
    given = pd.DataFrame({"exact": np.arange(50.0), "precise": column})
    path = tmp_path / "table"
    given.to_csv(path, index=False) if write is write_csv else write(path, given)
    table = read_table(path)
    assert table.data.dtype == np.float64
    assert table.data.tolist() == given.to_numpy().tolist()
    assert read_table(path, columns=["exact"]).data.dtype == np.float32
    assert read_table(path, dtype="float32").data.tolist() == given.to_numpy(np.float32).tolist()
    assert read_table(path, columns=["exact"], dtype="float64").data.dtype == np.float64


@pytest.mark.usefixtures("small_memory")
@pytest.mark.parametrize("dtype", ["float32", "float64", None])
def test_a_large_table_is_as_precise_as_a_small_one(tmp_path: Path, dtype: str | None) -> None:
    given = pd.DataFrame({"exact": np.arange(50.0), "precise": PRECISE["northings"]})
    given.to_csv(tmp_path / "table.csv", index=False)
    for columns in (["exact"], ["exact", "precise"]):
        table = read_table(tmp_path / "table.csv", columns=columns, dtype=dtype)
        assert isinstance(table.data, np.memmap)
        expected = dtype or ("float32" if columns == ["exact"] else "float64")
        assert table.data.dtype == np.dtype(expected)
        assert np.array_equal(table.data, given[columns].to_numpy(expected))


# -- larger than memory ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little memory, and batches of few rows."""
    monkeypatch.setattr(table_module, "BYTES_IN_MEMORY", 100)
    monkeypatch.setattr(sources, "NUMBERS_IN_A_BATCH", 20)
    monkeypatch.setattr(sources, "BYTES_IN_A_BLOCK", 300)


@pytest.mark.parametrize("write", [write_csv, write_gzip, write_parquet])
def test_a_large_table_is_read_in_batches_to_the_same_numbers(
    tmp_path: Path, request: pytest.FixtureRequest, write: Any
) -> None:
    path, context = write(tmp_path / "table", frame()), ["colour", "age", "is_new"]
    plain = read_table(path, columns=NAMES, context=context)
    request.getfixturevalue("small_memory")
    with open(path, "rb") as stream:
        for source in (path, stream):
            large = read_table(source, columns=NAMES, context=context)
            assert isinstance(large.data, np.memmap)
            assert isinstance(large.context, np.memmap)
            assert np.array_equal(large.data, plain.data)
            assert np.array_equal(large.context, plain.context)
            assert (large.layout, large.context_layout) == (plain.layout, plain.context_layout)


@pytest.mark.usefixtures("small_memory")
def test_a_large_array_is_mapped_and_not_copied(tmp_path: Path) -> None:
    path = save_npy(tmp_path / "table.npy", numbers())
    large = read_table(path)
    assert isinstance(large.data, np.memmap)
    assert str(large.data.filename) == str(path)
    assert np.array_equal(large.data, numbers())
    chosen = read_table(path, context=["x2"])
    assert np.array_equal(chosen.data, numbers()[:, [0, 2]])
    assert np.array_equal(chosen.context, numbers()[:, [1]])


@pytest.mark.usefixtures("small_memory")
def test_rows_are_counted_across_batches(tmp_path: Path) -> None:
    table = frame()
    table.loc[40, "width"] = np.nan
    table.loc[45, "colour"] = None
    path = write_csv(tmp_path / "table.csv", table)
    with pytest.raises(ValueError, match=r"an empty cell in data row 41 \(counted from 1\) of column 'width'"):
        read_table(path, columns=NAMES)
    with pytest.raises(ValueError, match=r"an empty cell in data row 46 \(counted from 1\) of column 'colour'"):
        read_table(path, columns=["length"], context=["colour"])
    array = numbers()
    array[33, 2] = np.inf
    with pytest.raises(ValueError, match=r"got inf in data row 34 \(counted from 1\) of column 'x3'"):
        read_table(save_npy(tmp_path / "table.npy", array))


def test_temporary_files_are_gone_when_the_program_ends() -> None:
    code = "from pyro_maf.tables.spool import temporary_file; print(temporary_file('.table'))"
    path = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert os.path.basename(os.path.dirname(path)).startswith("pyro-maf-")
    assert not os.path.exists(os.path.dirname(path))
    assert temporary_file(".table").exists()


# -- another table, in the same way ------------------------------------------------------------------------------------


@with_names
def test_another_table_is_read_in_the_same_way(tmp_path: Path, write: Any) -> None:
    first = read_table(write(tmp_path / "first", frame()), columns=["width", "length"], context=["colour", "is_new"])
    other = frame()[frame()["colour"] == "red"].iloc[:, ::-1].assign(extra="text")
    second = read_table(write(tmp_path / "second", other), columns=first.layout, context=first.context_layout)
    assert (second.layout, second.context_layout) == (first.layout, first.context_layout)
    chosen = np.arange(ROWS) % 3 == 2
    assert np.array_equal(second.data, first.data[chosen])
    assert first.context is not None
    assert np.array_equal(second.context, first.context[chosen])


def test_a_category_that_is_not_known_is_refused_by_name() -> None:
    table = read_table(text("y,colour\n1,red\n2,blue\n"), context=["colour"])
    with pytest.raises(
        ValueError,
        match=re.escape(
            "read_table expected one of 'blue', 'red', got 'green' in data row 2 (counted from 1) "
            "of column 'colour' of the stream."
        ),
    ):
        read_table(text("y,colour\n1,red\n2,green\n"), columns=table.layout, context=table.context_layout)


def test_a_table_without_names_fits_a_layout_of_as_many_columns(tmp_path: Path) -> None:
    columns = read_table(write_csv(tmp_path / "table.csv", frame()[list(NAMES)])).layout
    table = read_table(save_npy(tmp_path / "table.npy", numbers()), columns=columns)
    assert table.names == NAMES
    assert np.array_equal(table.data, numbers())
    with pytest.raises(ValueError, match=r"no column 'length' in wide\.npy, whose columns have no names"):
        read_table(save_npy(tmp_path / "wide.npy", np.ones((3, 4))), columns=columns)


# -- what is refused ---------------------------------------------------------------------------------------------------


WRONG_TEXT = {
    "empty": ("", {}, "read_table found the stream empty."),
    "blank": ("\n\n", {}, "read_table found the stream empty."),
    "names alone": ("a,b\n", {}, "read_table expected rows of data, got none in the stream."),
    "ragged": (
        "a,b\n1,2\n3\n",
        {},
        "read_table found the stream ragged: data row 2 (counted from 1) has 1 cells where 2 were expected.",
    ),
    "ragged without names": (
        "1,2\n3,4\n5,6,7\n",
        {},
        "read_table found the stream ragged: data row 3 (counted from 1) has 3 cells where 2 were expected.",
    ),
    "ragged below an empty line": (
        '"a","b"\n1,2\n\n"3\n",4\n5,6,7\n',
        {},
        "read_table found the stream ragged: data row 3 (counted from 1) has 3 cells where 2 were expected.",
    ),
    "text among the data": (
        "a,colour\n1,red\n2,blue\n",
        {},
        "read_table expected numbers, got 'red' in data row 1 (counted from 1) of column 'colour' of the stream: leave "
        "the column out or make it context.",
    ),
    "decimal commas": (
        "a;b\n1;2\n1;2,5\n",
        {},
        "read_table expected numbers with a decimal point, got '2,5' in data row 2 (counted from 1) of column 'b' of "
        "the stream: replace the comma.",
    ),
    "commas between thousands": (
        "a;b\n1;2\n1;2,500\n",
        {},
        "read_table expected numbers with a decimal point, got '2,500' in data row 2 (counted from 1) of column 'b' of "
        "the stream: replace the comma, or take it out if it is between thousands.",
    ),
    "missing": (
        "a,b\n1,2\n3,\n",
        {},
        "read_table expected finite numbers, got an empty cell in data row 2 (counted from 1) of column 'b' of the "
        "stream: fill it in, drop that row or leave the column out.",
    ),
    "not available": ("a,b\n1,2\n3,NA\n", {}, "got 'NA' in data row 2 (counted from 1) of column 'b'"),
    "not a number": ("a,b\nnan,2\n", {}, "got 'nan' in data row 1 (counted from 1) of column 'a'"),
    "infinite": ("a,b\n1,2\n3,-inf\n", {}, "got '-inf' in data row 2 (counted from 1) of column 'b'"),
    "too large": (
        "a,b\n1,2\n3,1e39\n",
        {},
        "read_table expected numbers that float32 holds, got '1e39' in data row 2 (counted from 1) of column 'b'",
    ),
    "missing context": ("a,b\n1,2\n3,NA\n", {"context": ["b"]}, "got 'NA' in data row 2 (counted from 1)"),
    "same names": ("a,b,a\n1,2,3\n", {}, "read_table expected names that differ, got two columns 'a' in the stream."),
    "no name": (
        ",a,b\n0,1,2\n",
        {},
        "read_table expected a name for every column, got none for column 1 of the stream: name it, or choose "
        "which columns to read.",
    ),
    "unknown column": (
        "length,width\n1,2\n",
        {"columns": ["lenght"]},
        "read_table found no column 'lenght' in the stream: did you mean 'length'?",
    ),
    "unknown context": (
        "length,width\n1,2\n",
        {"context": ["colour"]},
        "read_table found no column 'colour' in the stream: it has length, width.",
    ),
    "twice": (
        "a,b\n1,2\n",
        {"columns": ["a", "b"], "context": ["b"]},
        "read_table expected each column once, in columns or in context, got 'b' twice.",
    ),
    "context alone": (
        "a\n1\n",
        {"context": ["a"]},
        "read_table expected columns of data besides the context, got none in the stream.",
    ),
    "numbers and text": (
        "y,age\n1,30\n2,old\n3,NA\n",
        {"context": ["age"]},
        "read_table expected numbers or text, got both in column 'age' of the stream, as '30' and 'old'.",
    ),
    "no value": (
        "y,colour\n1,\n2,\n",
        {"context": ["colour"], "categories": ["colour"]},
        "read_table expected context with values, got none in column 'colour' of the stream: leave it out.",
    ),
    "one category": (
        "y,colour\n1,red\n2,red\n",
        {"context": ["colour"]},
        "read_table expected context that varies, got 'red' in every row of column 'colour' of the stream: leave it "
        "out.",
    ),
    "an array of a text": (
        "a\n1\n",
        {"array": "train"},
        "read_table got array='train' for the stream, which is not an .npz file: leave it out.",
    ),
    "names of context beside a layout": (
        "a,b\n1,2\n",
        {"columns": Layout.named([("a", ())]), "context": ["b"]},
        "read_table expected columns and context as the two layouts of a table, got names with one.",
    ),
    "a layout of context beside names": (
        "a,b\n1,2\n",
        {"columns": ["a"], "context": Layout.named([("b", ())])},
        "read_table expected columns and context as the two layouts of a table, got names with one.",
    ),
}


@pytest.mark.parametrize(("content", "options", "message"), WRONG_TEXT.values(), ids=WRONG_TEXT.keys())
def test_errors_are_one_line(content: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_table(text(content), **options)
    assert "\n" not in str(caught.value)


def test_a_reader_is_closed_before_the_error_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    # If left to the garbage collector, it may still run at the interpreter's exit and abort it.
    readers: list[Any] = []
    open_csv = arrow_csv.open_csv

    class Watched:
        def __init__(self, *arguments: Any) -> None:
            self.reader = open_csv(*arguments)
            self.is_closed = False
            readers.append(self)

        def __enter__(self) -> Any:
            return self.reader.__enter__()

        def __exit__(self, *error: Any) -> Any:
            self.is_closed = True
            return self.reader.__exit__(*error)

    monkeypatch.setattr(arrow_csv, "open_csv", Watched)
    monkeypatch.setattr(sources, "BYTES_IN_A_BLOCK", 300)
    content = "a;b\n" + "1,5;2\n" * 500
    for options in ({}, {"columns": ["b"], "context": ["a"], "categories": ["a"]}):
        with pytest.raises(ValueError, match="read_table expected") as caught:
            read_table(text(content), **options)
        assert caught.value.__traceback__ is not None
    assert [reader.is_closed for reader in readers] == [True] * 4  # columns that may be text are read first


def test_bad_cells_do_not_abort_the_interpreter(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a;b;c\n" + "0,5;1,5;2,5\n" * 100_000)
    code = (
        "from pyro_maf.datasets import read_table\n"
        "from pyro_maf.tables import sources\nsources.BYTES_IN_A_BLOCK = 100_000\nread_table('table.csv')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith(
        "pyro_maf._core.checks.InputError: read_table expected numbers with a decimal point"
    )


def test_reading_is_linear_in_the_number_of_columns() -> None:
    def seconds(width: int) -> float:
        content = (",".join(f"c{i}" for i in range(width)) + "\n" + ",".join("1" * width) + "\n").encode()
        began = time.process_time()
        table = read_table(io.BytesIO(content), context=["c3"])
        assert table.data.shape == (1, width - 1)
        return time.process_time() - began

    seconds(100)
    # A quadratic implementation would take 12 s.
    assert seconds(20_000) < 5


def test_a_pipe_with_a_name_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_bytes(b"a,b\n1,2\n"))
    writer.start()
    assert read_table(path).data.tolist() == [[1, 2]]
    writer.join()
    with pytest.raises(FileNotFoundError, match="found a device"):
        read_table("/dev/null")


def test_too_many_categories_are_refused() -> None:
    rows = "".join(f"{i},name {i}\n" for i in range(1001))
    with pytest.raises(ValueError, match="at most 1000 categories, got more in column 'name' of the stream"):
        read_table(text("y,name\n" + rows), context=["name"])


def test_missing_values_are_counted_with_their_columns_and_rows() -> None:
    content = "a,b,c,colour\n1,2,3,red\n,2,3,blue\n1,NA,3,\n1, n/a ,3,red\n1,?,3,red\n1,null,3,red\n"
    with pytest.raises(
        ValueError, match=r"^read_table expected finite numbers, got an empty cell in data row 2"
    ) as caught:
        read_table(text(content), context=["colour"])
    message = str(caught.value)
    assert message.endswith(
        "In all, of 6 rows, 5 rows have a missing value: 'b' 4 (rows 3, 4, 5, ...), 'a' 1 (row 2), 'colour' 1 (row 3). "
        "drop_missing=True, or --drop-missing, leaves such rows out."
    )
    names = content.replace("3,red", "3,rose", 1).replace("n/a ,3,red", "n/a ,3,ruby").replace("?,3,red", "?,3,rust")
    with pytest.raises(ValueError, match=r"got 'rose' in data row 1 .*colour"):
        read_table(text(names))
    with pytest.raises(ValueError, match=r"of 6 rows, 1 row has a missing value: 'a' 1 \(row 2\)\."):
        read_table(text(content), columns=["a"])
    with pytest.raises(ValueError, match="expected rows without missing values, got none in the stream: of 2 rows, 2"):
        read_table(text("a,b\n1,\n,2\n"), drop_missing=True)


@pytest.mark.parametrize("write", [write_csv, write_parquet])
def test_rows_with_missing_values_are_dropped_when_asked_and_the_others_remember_their_numbers(
    tmp_path: Path, request: pytest.FixtureRequest, write: Any
) -> None:
    given = frame()
    given.loc[[3, 40], "width"] = np.nan
    given.loc[[0, 40], "colour"] = None
    path = write(tmp_path / "table", given)
    for small in (False, True):
        if small:
            request.getfixturevalue("small_memory")
        table = read_table(path, columns=NAMES, context=["colour"], drop_missing=True)
        whole = np.setdiff1d(np.arange(ROWS), [0, 3, 40])
        assert np.array_equal(table.data, numbers()[whole])
        assert table.rows is not None
        assert table.rows.tolist() == (whole + 1).tolist()
        assert table.numbers(0) == 2
        assert table.missing is not None
        assert str(table.missing) == (
            "of 50 rows, 3 rows have a missing value: 'width' 2 (rows 4, 41), 'colour' 2 (rows 1, 41)"
        )
        assert table.context is not None
        assert table.context.sum() == len(whole)
    plain = read_table(write(tmp_path / "whole", frame()), columns=NAMES, drop_missing=True)
    assert (plain.rows, plain.missing) == (None, None)
    assert plain.numbers(np.array([0, 4])).tolist() == [1, 5]


def test_missing_values_of_an_array_are_dropped_when_asked(tmp_path: Path) -> None:
    array = numbers()
    array[[2, 7], [0, 1]] = np.nan
    table = read_table(save_npy(tmp_path / "table.npy", array), drop_missing=True)
    assert np.array_equal(table.data, np.delete(array, [2, 7], 0))
    array[9, 0] = np.inf
    with pytest.raises(ValueError, match="got inf in data row 10"):
        read_table(save_npy(tmp_path / "table.npy", array), drop_missing=True)


def test_decimals_may_come_after_a_comma() -> None:
    table = read_table(text("a;b;size\n1,5;-2,5e3;0,5\n3;4; 1,5\n"), decimal=",", context=["size"])
    assert table.data.tolist() == [[1.5, -2500], [3, 4]]
    assert table.context is not None
    assert table.context.tolist() == [[0.5], [1.5]]
    assert read_table(text("1,5;2\n3;4\n"), decimal=",").names == ("x1", "x2")
    assert read_table(text("1,5\n3\n"), decimal=",").data.tolist() == [[1.5], [3]]
    with pytest.raises(ValueError, match=r"with a decimal comma, got '1\.234' in data row 1 .*: replace the point"):
        read_table(text("a;b\n1.234;2\n"), decimal=",")
    with pytest.raises(ValueError, match=r"replace the comma\. decimal=',', or --decimal ,, reads such numbers"):
        read_table(text("a;b\n1,5;2\n"))
    for number, decimal, mark in (("3,525.13", ".", "comma"), ("3.525,13", ",", "point")):
        with pytest.raises(ValueError, match=f": take the {mark} between thousands out"):
            read_table(text(f"a;b\n{number};2\n"), decimal=decimal)
    with pytest.raises(ValueError, match=r'expected decimal "\." or ",", got \';\''):
        read_table(text("a\n1\n"), decimal=";")


def test_text_may_have_another_encoding() -> None:
    content = "größe;farbe\n1,5;grün\n2,5;blau\n"
    for encoding in ("latin-1", "cp1252", "utf-16", "utf-8-sig"):
        table = read_table(text(content.encode(encoding)), decimal=",", encoding=encoding, context=["farbe"])
        assert (table.names, table.context_names) == (("größe",), ("farbe=blau", "farbe=grün"))
    with pytest.raises(ValueError, match="encoding= or --encoding reads text of another encoding"):
        read_table(text(content.encode("latin-1")))
    with pytest.raises(ValueError, match="not to be text in utf-16: "):
        read_table(text(content.encode() + b"x"), encoding="utf-16")
    for encoding in ("klingon", "base64"):
        with pytest.raises(ValueError, match=f"an encoding that Python knows, .* got '{encoding}'"):
            read_table(text(content), encoding=encoding)


@pytest.mark.parametrize(
    "moment",
    ["2024-02-29", "29.02.2024", "2/29/24", "2024-02-29 08:15:00", "2024-02-29T08:15Z", "9-Feb-2024", "8:15"],
)
def test_dates_and_times_are_refused_with_what_to_do(moment: str) -> None:
    content = f"x,day\n1,{moment}\n2,{moment}\n"
    advice = "put numbers in their place, such as days or seconds since the first of them"
    with pytest.raises(ValueError, match=f"expected numbers, got '{moment}' in data row 1 .*: {advice}, or leave the"):
        read_table(text(content))
    with pytest.raises(
        ValueError, match=f"got dates or times, as '{moment}', in column 'day' .*: {advice}, or name it"
    ):
        read_table(text(content), context=["day"])
    labels = read_table(text(f"{content}3,2000-01-01\n"), context=["day"], categories=["day"])
    assert len(labels.context_names) == 2


def test_tables_with_thousands_of_columns_are_read() -> None:
    rows = np.random.default_rng(0).normal(size=(20, 300)).astype(np.float32)
    content = "\n".join([",".join(f"c{i}" for i in range(300)), *(",".join(map(str, row)) for row in rows.tolist())])
    assert np.array_equal(read_table(text(content)).data, rows)
    with pytest.raises(ValueError, match=r"got '\+' in data row 21 \(counted from 1\) of column 'c7'"):
        read_table(text(content + "\n" + ",".join(["1"] * 7 + ["+"] + [" +1"] * 292)))
    table = read_table(text(content + "\n" + ",".join(["1"] * 8 + [" +1"] * 292)))
    assert table.data[-1].tolist() == [1] * 300


WRONG_BYTES = {
    "truncated parquet": lambda path: write_parquet(path, frame()).read_bytes()[:-20],
    "parquet of noise": lambda path: b"PAR1" + bytes(range(200)) + b"PAR1",
    "truncated npy": lambda path: save_npy(path, numbers()).read_bytes()[:-20],
    "npy cut in its header": lambda path: save_npy(path, numbers()).read_bytes()[:30],
    "npy of objects": lambda path: save_npy(path, np.array([[1, "a"]], object)).read_bytes(),
    "npy of text": lambda path: save_npy(path, np.array([["a"]])).read_bytes(),
    "npy of three dimensions": lambda path: save_npy(path, np.ones((2, 2, 2))).read_bytes(),
    "npy of complex numbers": lambda path: save_npy(path, np.ones((2, 2), complex)).read_bytes(),
    "truncated npz": lambda path: save_npz(path, a=numbers()).read_bytes()[:-20],
    "zip without arrays": lambda path: save_npz(path, a=numbers()).read_bytes().replace(b"a.npy", b"a.txt"),
    "truncated gzip": lambda path: write_gzip(path, frame()).read_bytes()[:-20],
    "bytes of no text": lambda path: bytes([0, 1, 2, 3] * 50),
    "text in latin-1": lambda path: "größe,b\n1,2\n".encode("latin-1"),
    "text in latin-1, further down": lambda path: ("a,b\n" + "1,2\n" * 9000 + "1,größe\n").encode("latin-1"),
}


@pytest.mark.parametrize("content", WRONG_BYTES.values(), ids=WRONG_BYTES.keys())
def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "table"
    path.write_bytes(content(path))
    with pytest.raises(ValueError, match=r"^read_table (found|expected) .*table") as caught:
        read_table(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array(["a", "b"]), "read_table expected data of numbers, got text in column 'b' of table.parquet"),
        (pa.array([True, False]), "read_table expected data of numbers, got text in column 'b' of table.parquet"),
        (pa.array([1, None]), "got an empty cell in data row 2 (counted from 1) of column 'b' of table.parquet"),
        (pa.array([1.0, np.nan]), "got nan in data row 2 (counted from 1) of column 'b' of table.parquet"),
        (
            pa.array([0, 1], pa.timestamp("ms")),
            "got 'b' of timestamp[ms] in table.parquet: leave it out or convert it.",
        ),
        (pa.array([[1], [2]]), "got 'b' of list<"),
    ],
    ids=["text", "truth values", "null", "nan", "times", "lists"],
)
def test_errors_of_parquet_columns_name_the_column(tmp_path: Path, column: Any, message: str) -> None:
    pq.write_table(pa.table({"a": [1.0, 2.0], "b": column}), tmp_path / "table.parquet")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_table(tmp_path / "table.parquet")
    assert read_table(tmp_path / "table.parquet", columns=["a"]).data.tolist() == [[1], [2]]


def damaged(random: random.Random, content: bytes) -> bytes:
    """A file with a few bytes changed, cut off, inserted or removed, often near its beginning."""
    place = random.randrange(min(len(content), random.choice([140, len(content)])))
    other = bytes(random.randrange(256) for _ in range(random.randrange(1, 9)))
    rest = random.choice([content[place + len(other) :], content[place:], b"", content[place + 1 :]])
    return content[:place] + random.choice([other, b"", bytes(len(other)), b"(", b"'"]) + rest


def refusal(source: Any, **options: Any) -> str:
    """Error message of `read_table`, or ""."""
    try:
        read_table(source, **options)
    except ValueError as error:
        return str(error)
    return ""


def wholes(folder: Path) -> list[bytes]:
    path, array = folder / "table", numbers()
    save_npy(path, array)
    contents = [path.read_bytes(), save_npz(path, a=array, b=array, c=array[:, 0]).read_bytes()]
    with open(path, "wb") as file:
        np.savez_compressed(file, a=array)
    contents.append(path.read_bytes())
    with open(path, "wb") as file:
        np.lib.format.write_array(file, array, version=(2, 0))
    return [*contents, path.read_bytes(), *(write(path, frame()).read_bytes() for write in WITH_NAMES.values())]


def test_a_damaged_file_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    chance = random.Random(0)
    layouts = {"columns": Layout.named([("length", ())]), "context": Layout.named([("colour", ())], [["blue", "red"]])}
    contents = wholes(tmp_path)
    refusals = []
    for _ in range(400):
        options = chance.choice([{}, layouts, {"context": ["colour"]}])
        refusals.append(refusal(io.BytesIO(damaged(chance, chance.choice(contents))), **options))
    lines = [line for line in refusals if line]
    assert len(lines) > 200
    assert all(line.startswith("read_table ") and line.isprintable() and len(line) < 600 for line in lines)


def test_an_encrypted_array_is_refused_in_one_line(tmp_path: Path) -> None:
    content = bytearray(save_npz(tmp_path / "table.npz", a=numbers()).read_bytes())
    for start, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(start) + flags] |= 1
    (tmp_path / "table.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"^read_table found table\.npz damaged, truncated or locked: .*encrypted"):
        read_table(tmp_path / "table.npz")


OF_ALL_TYPES = [
    *(pa.array(["1", "2"], kind) for kind in (pa.string(), pa.large_string(), pa.binary())),
    *(pa.array(["red", "blue"], kind) for kind in (pa.string(), pa.large_string(), pa.binary())),
    *(
        pa.array([1, 2], kind)
        for kind in (pa.int8(), pa.uint64(), pa.float64(), pa.decimal128(9, 2), pa.decimal256(50, 2))
    ),
    *(pa.array([1, 2], kind) for kind in (pa.date32(), pa.timestamp("ns", "UTC"), pa.time32("s"), pa.duration("s"))),
    *(pa.array(values).dictionary_encode() for values in (["red", "blue"], [1, 2], [b"1", b"2"])),
    *(pa.array(values) for values in ([True, False], [None, None], [[1], [2]], [{"x": 1}, {"x": 2}])),
    *(pa.array([None, None], kind) for kind in (pa.int8(), pa.string(), pa.bool_(), pa.float64())),
    pa.array([1, 2], pa.date32()).dictionary_encode(),
]


@pytest.mark.parametrize("cells", OF_ALL_TYPES, ids=lambda cells: str(cells.type))
def test_parquet_of_every_type_is_read_or_refused_in_one_line_whatever_is_asked(tmp_path: Path, cells: Any) -> None:
    pq.write_table(pa.table({"x": [1.0, 2.0], "c": cells}), tmp_path / "table.parquet")
    asked: list[dict[str, Any]] = [{}, {"context": ["c"]}, {"context": ["c"], "categories": ["c"]}]
    asked += [{"columns": Layout.named([("x", ()), ("c", ())])}]
    asked += [
        {"columns": Layout.named([("x", ())]), "context": Layout.named([("c", ())], [categories])}
        for categories in (None, ["1", "2"], ["blue", "red"])
    ]
    for options in asked:
        line = refusal(tmp_path / "table.parquet", **options)
        assert line == "" or (line.startswith("read_table ") and line.isprintable())


def test_names_and_cells_cannot_move_a_terminals_cursor_or_fill_it(tmp_path: Path) -> None:
    path = tmp_path / "a\x1b[2J.csv"
    for content in ("a,\x1b[31mb\n1,x\n", f"a,{'b' * 9999}\n1,x\n", f"a,b\n1,{'x' * 99999}\n", "a,b\n1,\x1b[31m\n"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"^read_table expected numbers, got") as caught:
            read_table(path)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400
    with pytest.raises(ValueError, match="found no column") as caught:
        read_table(path, columns=["z\x1b"])
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("mark", [" ", ",", "|", "\t"])
def test_names_in_a_comment_of_numpy_are_read(mark: str, tmp_path: Path) -> None:
    np.savetxt(tmp_path / "rows.txt", numbers(), delimiter=mark, header=mark.join(NAMES), fmt="%.9g")
    table = read_table(tmp_path / "rows.txt")
    assert table.names == NAMES
    assert np.array_equal(table.data, numbers())


def write_workbook(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as workbook:
        workbook.writestr("xl/workbook.xml", "<workbook/>")


def write_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["rows"] = numbers()


OTHER_FORMATS: dict[str, Callable[[Path], Any]] = {
    "a workbook": write_workbook,
    "an HDF5 file": write_hdf5,
    "a Feather file": lambda path: feather.write_feather(frame(), path),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(numbers())),
    "JSON": lambda path: frame().to_json(path, orient="records"),
    "compressed by zstd": lambda path: path.write_bytes(pa.compress(b"a,b", "zstd", asbytes=True)),
}


@pytest.mark.parametrize(("name", "write"), OTHER_FORMATS.items())
def test_other_formats_are_named_with_what_to_do(name: str, write: Callable[[Path], Any], tmp_path: Path) -> None:
    write(tmp_path / "table")
    with pytest.raises(ValueError, match=f"found table to be {name}: save the table as csv or parquet"):
        read_table(tmp_path / "table")


def test_the_format_is_recognised_by_content_rather_than_suffix(tmp_path: Path) -> None:
    (tmp_path / "plain.csv.gz").write_bytes(b"a,b\n1,2\n")
    assert read_table(tmp_path / "plain.csv.gz").names == ("a", "b")


def test_invalid_sources_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"read_table expected a file at .*none.csv, found nothing"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match="found a folder"):
        read_table(tmp_path)
    for source in (3, io.StringIO("a\n1\n")):
        with pytest.raises(TypeError, match=r"expected a path, \"-\" for standard input or a binary stream, got"):
            read_table(source)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected context to be a sequence of names, got 'a'"):
        read_table(text("a\n1\n"), context="a")
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: SIM115 (closed by the next line)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(ValueError, match="standard input, which is a terminal"):
        read_table("-")
    sys.stdin.close()
