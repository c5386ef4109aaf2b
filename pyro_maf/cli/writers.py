"""Streaming of rows to standard output, a csv or a parquet file."""

from __future__ import annotations

import csv
import io
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_maf._core.extras import require

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

__all__ = ["STANDARD_OUTPUT", "writing_rows"]

STANDARD_OUTPUT = Path("-")


@contextmanager
def writing_rows(
    path: Path, names: Sequence[str], dtype: str = "float32"
) -> Iterator[Callable[[np.ndarray[Any, Any]], None]]:
    r"""Context that yields a function to write rows, (n, columns), under the column names `names`.

    A file is replaced atomically once all is written.

    Args:
        path: "-" for standard output, as csv, or a file that ends in .csv or .parquet.
        names: Names of the columns.
        dtype: "float32" or "float64", the dtype of the output and so its number of digits.

    Raises:
        ValueError: For another ending.
        FileNotFoundError: If its folder does not exist.

    Example:
        >>> import tempfile, numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with writing_rows(Path(folder, "rows.csv"), ["a", "b"]) as write:
        ...         write(np.array([[1, 2.5]]))
        ...     Path(folder, "rows.csv").read_text()
        'a,b\n1,2.5\n'
    """
    require("pyro-maf", "pyarrow")
    writers = {".csv": _csv_writer, ".parquet": _parquet_writer}
    if path == STANDARD_OUTPUT:
        with _csv_writer(sys.stdout.buffer, _schema(names, dtype)) as write:
            yield write
        sys.stdout.flush()
        return
    if path.suffix not in writers:
        raise ValueError(f'expected --out to end in {" or ".join(writers)}, or to be "-", got {path}.')
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected an existing folder for {path.name}, got {path.parent}.")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file, writers[path.suffix](file, _schema(names, dtype)) as write:
            yield write
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _csv_writer(file: Any, schema: Any) -> Iterator[Callable[[np.ndarray[Any, Any]], None]]:
    from pyarrow.csv import CSVWriter, WriteOptions

    header = io.StringIO()
    csv.writer(header, lineterminator="\n").writerow(schema.names)
    file.write(header.getvalue().encode())
    with CSVWriter(file, schema, write_options=WriteOptions(include_header=False)) as writer:
        yield lambda rows: writer.write(_batch(rows, schema))


@contextmanager
def _parquet_writer(file: Any, schema: Any) -> Iterator[Callable[[np.ndarray[Any, Any]], None]]:
    from pyarrow.parquet import ParquetWriter

    with ParquetWriter(file, schema) as writer:
        yield lambda rows: writer.write(_batch(rows, schema))


def _schema(names: Sequence[str], dtype: str) -> Any:
    import pyarrow

    kind = pyarrow.float64() if dtype == "float64" else pyarrow.float32()
    return pyarrow.schema([(name, kind) for name in names])


def _batch(rows: np.ndarray[Any, Any], schema: Any) -> Any:
    import pyarrow

    columns = [pyarrow.array(column, field.type) for column, field in zip(rows.T, schema, strict=True)]
    return pyarrow.record_batch(columns, schema=schema)
