"""A saved model with the columns and the record of its fit, and `pyro-maf info`, which shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import typer

from pyro_maf._core.files import COLUMNS, MODEL, RECORD, recover, write_whole
from pyro_maf._core.messages import shown
from pyro_maf.cli.errors import CommandError, input_errors
from pyro_maf.cli.frames import arranged, description
from pyro_maf.cli.shared_options import ModelPath, TextOptions, read

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pyro_maf.datasets import Table
    from pyro_maf.distributions import ConditionalDensity, Density
    from pyro_maf.tables.layout import Layout

__all__ = ["INFO_EXAMPLES", "Record", "SavedModel", "info", "read_model", "write_json"]

INFO_EXAMPLES = """**Examples**

```
pyro-maf info wine-maf
```
"""

JSON: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """Record of a fit, in JSON values."""

    command: str
    version: str
    data: str
    rows: int
    validation_log_likelihood: float
    best_epoch: int
    epochs: int
    seconds: float
    stop_reason: str
    warnings: list[str] = field(default_factory=list)
    test_log_likelihood: float | None = None
    test_standard_error: float | None = None


@dataclass(frozen=True)
class SavedModel:
    """A saved density, its columns and the record of its fit.

    Attributes:
        density: The density, on the CPU, in eval mode.
        columns: Description of the columns of a table for it, as `Table.columns`; None for a model without its folder.
        record: Record of the fit; None for a model without its folder.
    """

    density: ConditionalDensity | Density
    columns: JSON | None
    record: Record | None

    @property
    def inner(self) -> Density:
        """The density inside a conditional one, or the density itself."""
        return self.density.unwrapped

    @property
    def dtype(self) -> str:
        """Dtype of the rows that it draws and takes, "float32" or "float64"."""
        return _name_of(self.density.dtype)

    @property
    def layout(self) -> Layout | None:
        """Names and categories of the columns of data that the density holds; None if it holds none."""
        from pyro_maf.distributions import TableDensity

        inner = self.inner
        return inner.layout if isinstance(inner, TableDensity) and inner.layout.names else None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns of data."""
        if self.layout is not None:
            return tuple(self.layout.labels)
        if self.columns is None:
            return tuple(f"x{i}" for i in range(1, self.inner.event_shape[0] + 1))
        return tuple(name for name, _ in map(_named, self.columns["data"]))

    @property
    def context(self) -> tuple[tuple[str, list[str] | None], ...]:
        """Names and categories of the columns of context."""
        from pyro_maf.distributions import FlowPrior, TableDensity

        if self.columns is None:
            layout = self.inner.context_layout if isinstance(self.inner, (FlowPrior, TableDensity)) else None
            if layout is None or not layout.names:
                return tuple((f"c{i}", None) for i in range(1, self.inner.context_dim + 1))
            labels = layout.as_labels() or [None] * len(layout.labels)
            each = (None if among is None else list(map(str, among)) for among in labels)
            return tuple(zip(layout.labels, each, strict=True))
        return tuple((column["name"], column["categories"]) for column in self.columns["context"])

    def at(self, context: Tensor | None) -> Density:
        """The density at a context, if it takes one."""
        return self.inner if context is None else cast("ConditionalDensity", self.density).condition(context)

    def read(self, source: str, text: TextOptions) -> Table:
        """Read the table in `source` for this model; `text` as in `pyro_maf.cli.shared_options.read`.

        Raises:
            CommandError: As `read_table`, and for a table of another width if there are no names.
        """
        # Of data and context, the more precise.
        dtype = max(self.dtype, _name_of(self.density.context_dtype))
        layout = self.layout
        if layout is not None and self.columns is None:
            columns = description(layout, self.context)
            return arranged(read(source, text, columns=columns, dtype=dtype), layout)
        table = read(source, text, columns=self.columns, dtype=dtype)
        if self.columns is not None:
            return table
        data, context = len(self.names), len(self.context)
        if len(table.names) != data + context:
            raise CommandError(
                f"score expected {data + context} columns, {data} of data and then {context} of context, "
                f"got {len(table.names)}: the model has no {COLUMNS} beside it to choose by."
            )
        return replace(table, data=table.data[:, :data], context=table.data[:, data:] if context else None)


def read_model(path: Path) -> SavedModel:
    """Read a model and the files of its folder.

    Args:
        path: The folder of a fit, or a model file of any name.

    Raises:
        FileNotFoundError: If there is none.
        CommandError: If a file is damaged or of another format.
    """
    from pyro_maf.saving import load

    if path.is_dir():
        with input_errors():
            recover(path)
    file = path / MODEL if path.is_dir() else path
    if not file.is_file():
        found = f"a folder without {MODEL}" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"expected a fit's folder or a .safetensors file at {path}, found {found}.")
    with input_errors():
        density = _as_density(load(file), file).eval()
    is_in_folder = file.name == MODEL
    columns = _read_json(file.with_name(COLUMNS)) if is_in_folder else None
    facts = _read_json(file.with_name(RECORD)) if is_in_folder else None
    if columns is not None and not _is_description(columns):
        raise CommandError(
            f"found {file.with_name(COLUMNS)} damaged: expected names of columns, each a text and each once, and "
            "categories or null for each of context."
        )
    model = SavedModel(density, columns, None if facts is None else _record(facts, file.with_name(RECORD)))
    _check_columns(model, path)
    return model


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON file atomically."""
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def _read_json(path: Path) -> JSON | None:
    """Read a JSON file; None if there is none."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CommandError(f"found {path} damaged: {error}.") from None
    if not isinstance(value, dict):
        raise CommandError(f"found {path} damaged: it holds no object.")
    return value


def _record(facts: JSON, path: Path) -> Record:
    """Check and return the record in a file.

    Raises:
        CommandError: For entries that are missing, unknown or of another type.
    """
    try:
        record = Record(**facts)
    except TypeError as error:
        raise CommandError(f"found {path} damaged: {error}.") from None
    for each in fields(Record):
        value = getattr(record, each.name)
        if not _is_of(str(each.type), value):
            raise CommandError(
                f"found {path} damaged: expected {each.name} of type {each.type}, got {shown(repr(value))}."
            )
    return record


def _is_of(kind: str, value: object) -> bool:
    """True if a JSON value is of the type of a field of `Record`."""
    if kind == "list[str]":
        return isinstance(value, list) and all(isinstance(text, str) for text in value)
    if kind == "float | None":
        return value is None or _is_of("float", value)
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
    return isinstance(value, kinds[kind]) and not isinstance(value, bool)


def _named(column: str | JSON) -> tuple[str, list[str] | None]:
    """Name and categories of a column in a description, which may be its name alone."""
    return (column, None) if isinstance(column, str) else (column["name"], column["categories"])


def _is_description(columns: JSON) -> bool:
    """True if a JSON value is a description of columns, as `Table.columns`."""
    data, context = columns.get("data"), columns.get("context")
    if not isinstance(data, list) or not isinstance(context, list):
        return False
    described = [column for column in data if not isinstance(column, str)] + context
    if not all(isinstance(column, dict) and {"name", "categories"} <= column.keys() for column in described):
        return False
    each = list(map(_named, [*data, *context]))
    lists = [[name for name, _ in each], *(categories for _, categories in each if categories is not None)]
    return all(
        isinstance(texts, list) and all(isinstance(text, str) for text in texts) and len({*texts}) == len(texts)
        for texts in lists
    )


def _as_density(model: object, path: Path) -> Density | ConditionalDensity:
    """Convert a loaded model to a density: a flow is on standard normal noise."""
    from pyro_maf.distributions import ConditionalDensity, ConditionalFlowPrior, Density, FlowPrior
    from pyro_maf.transforms import Flow

    if isinstance(model, ConditionalDensity):
        return model
    inner = getattr(model, "unwrapped", None)
    if isinstance(inner, Flow):
        return ConditionalFlowPrior(inner) if inner.context_dim else FlowPrior(inner)
    if isinstance(inner, Density):
        return ConditionalDensity(inner) if inner.context_dim else inner
    raise CommandError(f"expected a flow or a density in {path}, found {type(model).__name__}.")


def _check_columns(model: SavedModel, path: Path) -> None:
    """Refuse the columns of another model."""
    widths = len(model.names), sum(1 if categories is None else len(categories) for _, categories in model.context)
    expected = model.inner.event_shape[0], model.inner.context_dim
    if widths != expected:
        raise CommandError(
            f"expected {COLUMNS} in {path} with {expected[0]} columns of data and {expected[1]} of context, as the "
            f"model has, found {widths[0]} and {widths[1]}."
        )


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def info(model: ModelPath) -> None:
    """Describe a model: its layers, its columns, its scores, and its fit."""
    facts = [(name, _printable(value)) for name, value in _facts(read_model(model))]
    width = max(len(name) for name, _ in facts) + 2
    for name, value in facts:
        typer.echo(f"{name:<{width}}{value}".replace("\n", "\n" + " " * width))


def _printable(value: str) -> str:
    """Escape control characters of the terminal: names may come from an untrusted file."""
    return "\n".join(shown(line, len(line)) for line in value.split("\n"))


def _joined(names: Sequence[str]) -> str:
    return ", ".join(name.replace("\n", "\\n") for name in names)


def _facts(model: SavedModel) -> Iterator[tuple[str, str]]:
    """Iterate over names and values of facts, of which a value may have several lines."""
    inner, record = model.inner, model.record
    yield "model", repr(model.density)
    yield "dimensions", str(inner.event_shape[0])
    if model.context:
        yield "context", f"{inner.context_dim} numbers"
    yield "parameters", f"{sum(parameter.numel() for parameter in inner.parameters()):,}"
    if model.columns is not None or model.layout is not None:
        yield "columns", _joined(model.names)
        for name, categories in map(_named, (model.columns or {"data": ()})["data"]):
            if categories is not None:
                yield "among", f"{name}: {_joined(categories)}"
        for name, categories in model.context:
            yield "given", name if categories is None else f"{name}: {_joined(categories)}"
    if record is not None:
        if record.test_log_likelihood is not None:
            score = f"log-likelihood {record.test_log_likelihood:.4f} nats"
            yield "test", f"{score}, standard error {record.test_standard_error:.4f}"
        yield (
            "validation",
            f"log-likelihood {record.validation_log_likelihood:.4f} nats after epoch {record.best_epoch} of "
            f"{record.epochs}",
        )
        yield "stopped", f"{record.stop_reason}, after {record.seconds:.1f} s"
        for line in record.warnings:
            yield "warning", line
        yield "data", f"{record.rows:,} rows of {record.data}"
        yield "made by", f"{record.command} (version {record.version})"
