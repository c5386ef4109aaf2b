"""`pyro-maf info`: description of a model and of its fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import typer

from pyro_maf._core.text import shown
from pyro_maf.cli.options import Model

if TYPE_CHECKING:
    from pyro_maf.cli.model import Fitted

__all__ = ["EXAMPLES", "run"]

EXAMPLES = """**Examples**

```
pyro-maf info wine-maf
```
"""


def run(model: Model) -> None:
    """Describe a model: its layers, its columns, its scores, and its fit."""
    from pyro_maf.cli.model import read_fitted

    facts = [(name, _plain(value)) for name, value in _facts(read_fitted(model))]
    width = max(len(name) for name, _ in facts) + 2
    for name, value in facts:
        typer.echo(f"{name:<{width}}{value}".replace("\n", "\n" + " " * width))


def _plain(value: str) -> str:
    """Strip control characters of the terminal: names may come from an untrusted file."""
    return "\n".join(shown(line, len(line)) for line in value.split("\n"))


def _joined(names: Sequence[str]) -> str:
    return ", ".join(name.replace("\n", "\\n") for name in names)


def _facts(fitted: Fitted) -> Iterator[tuple[str, str]]:
    inner, record = fitted.inner, fitted.record
    yield "model", repr(fitted.density)
    yield "dimensions", str(inner.event_shape[0])
    if fitted.context:
        yield "context", f"{inner.context_dim} numbers"
    yield "parameters", f"{sum(parameter.numel() for parameter in inner.parameters()):,}"
    if fitted.columns is not None:
        yield "columns", _joined(fitted.names)
    for name, categories in fitted.context if fitted.columns is not None else ():
        yield "given", name if categories is None else f"{name}: {_joined(categories)}"
    if record is not None:
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
