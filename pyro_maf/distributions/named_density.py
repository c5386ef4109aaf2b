"""Densities of tables with named columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from pyro_maf._core.torch_state import as_far_as_exact
from pyro_maf.distributions.density import Density
from pyro_maf.tables.categories import Label
from pyro_maf.tables.layout import Layout, TableLike, numbers

__all__ = ["Entries", "Labels", "NamedDensity"]

Entries: TypeAlias = Sequence[tuple[str, Sequence[int]]]
Labels: TypeAlias = Sequence[Sequence[Label] | None]


class NamedDensity(Density):
    """A density that takes values and contexts in the forms of data that `fit` takes, with columns matched by name."""

    _layouts: dict[str, Layout]

    def name_columns(self, layout: Layout, context_layout: Layout) -> None:
        """Set the names of the columns of values and context, for `log_prob`, `unpack` and saving."""
        self._layouts = {"value": layout, "context": context_layout}

    @property
    def layout(self) -> Layout:
        """Names, categories and dtypes of the columns, if any."""
        return self._layouts["value"]

    @property
    def context_layout(self) -> Layout:
        """Names and categories of the context's columns, if any."""
        return self._layouts["context"]

    @property
    def names_of_columns(self) -> dict[str, object]:
        """Constructor arguments for the names, as JSON values."""
        return {
            "columns": self.layout.as_entries(),
            "context_columns": self.context_layout.as_entries(),
            "context_labels": self.context_layout.as_labels(),
        }

    def check_precise(self, role: str, value: object) -> None:
        """Raise if a value was already rounded too coarsely; a no-op for most densities."""

    def is_rounded(self, like: Tensor) -> bool:
        """Return whether floating-point numbers are rounded to the dtype of `like`, that of values or contexts."""
        return True

    def as_value(self, value: TableLike, like: Tensor | None, role: str = "value") -> Tensor:
        """Convert a value to a tensor, also from the other forms of data that `fit` takes if that is exact."""
        if like is not None:
            if type(value) is Tensor and (value.dtype, value.shape[-1:]) == (like.dtype, self._event_shape):
                return value if value.device == like.device else super().as_value(value, like, role)
            value = self._converted("value", value, like, self.event_shape[0])
        self.check_precise(role, value)
        return super().as_value(value, like, role)

    def as_context(self, context: TableLike) -> Tensor:
        """Convert a context to a tensor, from the same forms as values."""
        like = self.context_like
        if like is not None:
            context = self._converted("context", context, like, self.context_dim)
        return super().as_context(context)

    def _converted(self, role: str, value: TableLike, like: Tensor, width: int) -> Tensor:
        if isinstance(value, Tensor):
            return value if value.dtype == like.dtype else as_far_as_exact(like, value, as_model=self.is_rounded(like))
        table = numbers(self.name, role, self._layouts[role].pick(self.name, role, value)).to(like.device)
        if width == 1 and table.dim() < 2 and table.shape != (1,):
            table = table[..., None]
        return as_far_as_exact(like, table, as_model=self.is_rounded(like))
