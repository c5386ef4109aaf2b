"""Tables of numbers: rows in memory and on disk for a density, and tables in files."""

from __future__ import annotations

from pyro_maf.tables.disk import MappedRows, is_mapped
from pyro_maf.tables.layout import TableLike
from pyro_maf.tables.reader import Reader
from pyro_maf.tables.rows import Rows

__all__ = ["MappedRows", "Reader", "Rows", "is_mapped", "rows_of"]


def rows_of(
    data: TableLike, context: TableLike | None, reader: Reader, weights: TableLike | None = None
) -> Rows | MappedRows:
    """Return the rows of a table in memory or, if it is mapped from a file that is too large for that, on disk.

    Raises:
        ValueError, TypeError: As `Reader.read`; of rows on disk when they are read.

    Example:
        >>> rows_of([[1, 2], [3, 4]], None, Reader("fit", 2, 0))
        Rows(data=tensor([[1., 2.], [3., 4.]], dtype=torch.float64), context=None, weights=None)
    """
    if is_mapped(data):
        return MappedRows(data, context, reader, weights)
    return reader.read(data, context, weights)
