"""A fitted model from its folder, or from a model file alone."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_maf._core.files import recover
from pyro_maf._core.text import shown
from pyro_maf.cli.folder import COLUMNS, MODEL, RECORD, Record, read_json
from pyro_maf.cli.options import read

if TYPE_CHECKING:
    import torch

    from pyro_maf.datasets import Table

__all__ = ["Fitted", "read_fitted"]


@dataclass(frozen=True)
class Fitted:
    """A fitted density, its columns and its record.

    Attributes:
        density: The density, on the CPU, in eval mode.
        columns: Description of the columns of a table for it, as `Table.columns`; None for a model without its folder.
        record: Record of the fit; None for a model without its folder.
    """

    density: Any
    columns: dict[str, Any] | None
    record: Record | None

    @property
    def inner(self) -> Any:
        """The density inside a conditional one, or the density itself."""
        return getattr(self.density, "density", self.density)

    @property
    def dtype(self) -> str:
        """Dtype of the rows that it draws and takes, "float32" or "float64"."""
        return _name_of(self.density.dtype)

    @property
    def table_dtype(self) -> str:
        """Dtype of a table of data and context for it: the more precise of the two."""
        return max(self.dtype, _name_of(self.density.context_dtype))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns of data."""
        if self.columns is None:
            return tuple(f"x{i}" for i in range(1, self.inner.event_shape[0] + 1))
        return tuple(self.columns["data"])

    @property
    def context(self) -> tuple[tuple[str, list[str] | None], ...]:
        """Names and categories of the columns of context."""
        if self.columns is None:
            return tuple((f"c{i}", None) for i in range(1, self.inner.context_dim + 1))
        return tuple((column["name"], column["categories"]) for column in self.columns["context"])

    def read(self, source: str, **text: Any) -> Table:
        """Read the table in `source` for this model; `text` as in `pyro_maf.cli.options.read`.

        Raises:
            ValueError: As `read_table`, and for a table of another width if there are no names.
        """
        if self.columns is not None:
            return read(source, columns=self.columns, dtype=self.table_dtype, **text)
        table = read(source, dtype=self.table_dtype, **text)
        data, context = len(self.names), len(self.context)
        if len(table.names) != data + context:
            raise ValueError(
                f"score expected {data + context} columns, {data} of data and then {context} of context, "
                f"got {len(table.names)}: the model has no {COLUMNS} beside it to choose by."
            )
        return replace(table, data=table.data[:, :data], context=table.data[:, data:] if context else None)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_fitted(path: Path) -> Fitted:
    """Read a model and the files of its folder.

    Args:
        path: The folder of a fit, or a model file of any name.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If a file is damaged or of another format.
    """
    from pyro_maf.saving import load

    if path.is_dir():
        recover(path)
    model = path / MODEL if path.is_dir() else path
    if not model.is_file():
        found = f"a folder without {MODEL}" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"expected a fit's folder or a .safetensors file at {path}, found {found}.")
    density = _as_density(load(model), model).eval()
    columns = read_json(model.with_name(COLUMNS)) if model.name == MODEL else None
    facts = read_json(model.with_name(RECORD)) if model.name == MODEL else None
    if columns is not None and not _is_description(columns):
        raise ValueError(
            f"found {model.with_name(COLUMNS)} damaged: expected names of columns, each a text and each once, and "
            "categories or null for each of context."
        )
    fitted = Fitted(density, columns, None if facts is None else _record(facts, model.with_name(RECORD)))
    _check_columns(fitted, path)
    return fitted


def _record(facts: dict[str, Any], path: Path) -> Record:
    """Check and return the record in a file.

    Raises:
        ValueError: For entries that are missing, unknown or of another type.
    """
    try:
        record = Record(**facts)
    except TypeError as error:
        raise ValueError(f"found {path} damaged: {error}.") from None
    for field in fields(Record):
        value = getattr(record, field.name)
        if not _is_of(str(field.type), value):
            raise ValueError(
                f"found {path} damaged: expected {field.name} of type {field.type}, got {shown(repr(value))}."
            )
    return record


def _is_of(kind: str, value: Any) -> bool:
    """True if a JSON value is of the type of a field of `Record`."""
    if kind == "list[str]":
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
    return isinstance(value, kinds[kind]) and not isinstance(value, bool)


def _is_description(columns: dict[str, Any]) -> bool:
    """True if a JSON value is a description of columns, as `Table.columns`."""
    data, context = columns.get("data"), columns.get("context")
    if not isinstance(data, list) or not isinstance(context, list):
        return False
    if not all(isinstance(column, dict) and {"name", "categories"} <= column.keys() for column in context):
        return False
    categories = [column["categories"] for column in context if column["categories"] is not None]
    lists = [[*data, *(column["name"] for column in context)], *categories]
    return all(
        isinstance(texts, list) and all(isinstance(text, str) for text in texts) and len({*texts}) == len(texts)
        for texts in lists
    )


def _as_density(model: Any, path: Path) -> Any:
    """Convert a loaded model to a density: a flow is on standard normal noise."""
    from pyro_maf.distributions import ConditionalDensity, ConditionalFlowPrior, Density, FlowPrior
    from pyro_maf.transforms import ConditionalFlow, Flow

    if isinstance(model, ConditionalFlow):
        return ConditionalFlowPrior(model)
    if isinstance(model, Flow):
        return ConditionalFlowPrior(model) if model.context_dim else FlowPrior(model)
    if isinstance(model, Density):
        return ConditionalDensity(model) if model.context_dim else model
    if isinstance(model, ConditionalDensity):
        return model
    raise ValueError(f"expected a flow or a density in {path}, found {type(model).__name__}.")


def _check_columns(fitted: Fitted, path: Path) -> None:
    """Refuse the columns of another model."""
    widths = len(fitted.names), sum(1 if categories is None else len(categories) for _, categories in fitted.context)
    expected = fitted.inner.event_shape[0], fitted.inner.context_dim
    if widths != expected:
        raise ValueError(
            f"expected {COLUMNS} in {path} with {expected[0]} columns of data and {expected[1]} of context, as the "
            f"model has, found {widths[0]} and {widths[1]}."
        )
