"""A saved model with the record of its fit, and `pyro-maf info`, which shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from pyro_maf._core.files import MODEL, RECORD, recover
from pyro_maf._core.messages import shown
from pyro_maf.cli.errors import CommandError, input_errors
from pyro_maf.cli.shared_options import ModelPath, TextOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pyro_maf.datasets import Table
    from pyro_maf.distributions import ConditionalDensity, Density
    from pyro_maf.tables.layout import Layout

__all__ = ["INFO_EXAMPLES", "Record", "SavedModel", "info", "read_model"]

INFO_EXAMPLES = """**Examples**

```
pyro-maf info wine-maf
```
"""


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
    """A saved density and the record of its fit.

    Attributes:
        density: The density, on the CPU, in eval mode.
        record: Names and values of facts about the fit; empty for a model without its folder.
    """

    density: ConditionalDensity | Density
    record: Sequence[tuple[str, str]]

    @property
    def inner(self) -> Density:
        """The density inside a conditional one, or the density itself."""
        return self.density.unwrapped

    @property
    def dtype(self) -> str:
        """Dtype of the rows that it draws and scores, "float32" or "float64"."""
        return _name_of(self.density.dtype)

    @property
    def layout(self) -> Layout:
        """Names and categories of the data columns: the density's, or x1, x2, ..."""
        return self._held("layout") or _numbered("x", self.inner.event_shape[0])

    @property
    def context_layout(self) -> Layout:
        """Names and categories of the context columns: the density's, or c1, c2, ..."""
        return self._held("context_layout") or _numbered("c", self.inner.context_dim)

    def _held(self, attribute: str) -> Layout | None:
        """A layout of the density, if it has names."""
        layout: Layout | None = getattr(self.inner, attribute, None)
        return layout if layout is not None and layout.names else None

    @property
    def has_names(self) -> bool:
        """True if the density has names for its data columns."""
        return self._held("layout") is not None

    def at(self, context: Tensor | None) -> Density:
        """The density at a context, if it takes one."""
        return self.inner if context is None else cast("ConditionalDensity", self.density).condition(context)

    def read(self, source: str, text: TextOptions) -> Table:
        """Read the table in `source` for this model; `text` describes its form.

        Raises:
            CommandError: As `read_table`, and if the density has no names and the table has another width.
        """
        # The more precise dtype of data and context.
        dtype = max(self.dtype, _name_of(self.density.context_dtype))
        layouts = self.layout, self.context_layout
        if self.has_names:
            return text.read_from(source, columns=layouts[0], context=layouts[1], dtype=dtype)
        table = text.read_from(source, dtype=dtype)
        data, context = (len(layout.labels) for layout in layouts)
        if len(table.names) != data + context:
            raise CommandError(
                f"score expected {data + context} columns, {data} of data and then {context} of context, "
                f"got {len(table.names)}: the model has no names to choose by."
            )
        return replace(
            table,
            data=table.data[:, :data],
            context=table.data[:, data:] if context else None,
            layout=layouts[0],
            context_layout=layouts[1],
        )


def _numbered(letter: str, width: int) -> Layout:
    from pyro_maf.tables.layout import Layout

    return Layout.named([(f"{letter}{i}", ()) for i in range(1, width + 1)])


def read_model(path: Path) -> SavedModel:
    """Read a model and the files of its folder.

    Args:
        path: The folder of a fit, or a model file with any name.

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
    return SavedModel(density, _read_record(file.with_name(RECORD)) if file.name == MODEL else ())


def _read_record(path: Path) -> list[tuple[str, str]]:
    """The facts in a record file, if it exists."""
    if not path.is_file():
        return []
    try:
        return list(_facts_of_fit(Record(**json.loads(path.read_text(encoding="utf-8")))))
    except (TypeError, ValueError, RecursionError) as error:
        raise CommandError(f"found {path} damaged: {error}.") from None


def _as_density(model: object, path: Path) -> Density | ConditionalDensity:
    """Convert a loaded model to a density; a flow gets standard normal noise."""
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


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def info(model: ModelPath) -> None:
    """Describe a model: its layers, its columns, its scores, and its fit."""
    facts = [(name, _printable(value)) for name, value in _facts(read_model(model))]
    width = max(len(name) for name, _ in facts) + 2
    for name, value in facts:
        typer.echo(f"{name:<{width}}{value}".replace("\n", "\n" + " " * width))


def _printable(value: str) -> str:
    """Escape control characters of the terminal, since names may come from an untrusted file."""
    return "\n".join(shown(line, len(line)) for line in value.split("\n"))


def _joined(names: Sequence[object]) -> str:
    return ", ".join(str(name).replace("\n", "\\n") for name in names)


def _facts(model: SavedModel) -> Iterator[tuple[str, str]]:
    """Iterate over names and values of facts; a value may have several lines."""
    inner = model.inner
    yield "model", repr(model.density)
    yield "dimensions", str(inner.event_shape[0])
    if inner.context_dim:
        yield "context", f"{inner.context_dim} numbers"
    yield "parameters", f"{sum(parameter.numel() for parameter in inner.parameters()):,}"
    if model.has_names:
        yield "columns", _joined(model.layout.labels)
        for name, categories in model.layout.columns:
            if categories is not None:
                yield "among", f"{name}: {_joined(categories)}"
        for name, categories in model.context_layout.columns:
            yield "given", _joined([name]) if categories is None else f"{_joined([name])}: {_joined(categories)}"
    yield from model.record


def _facts_of_fit(record: Record) -> Iterator[tuple[str, str]]:
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
