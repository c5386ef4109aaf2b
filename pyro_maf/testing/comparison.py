"""Comparisons that raise an error about a law: which one is broken, by what, by how much and at which input."""

from __future__ import annotations

from torch import Tensor

from pyro_maf.transforms import Conditioned, Flow

__all__ = ["BrokenLawError", "close", "close_by_row", "error_by_row", "name_of", "within"]


class BrokenLawError(AssertionError):
    """Error about a transform, density or guide that breaks a law: which one, by how much, at which input.

    Example:
        >>> raise BrokenLawError("Shift", "inverts", "off by 1, allowed are 1e-09")
        Traceback (most recent call last):
            ...
        pyro_maf.testing.comparison.BrokenLawError: Shift breaks the law "inverts": off by 1, allowed are 1e-09.
    """

    def __init__(self, who: str, law: str, how: str) -> None:
        super().__init__(f'{who} breaks the law "{law}": {how}.')


def close(law: str, who: object, found: Tensor, wanted: Tensor, tolerance: float, at: Tensor | None = None) -> None:
    """Raise if |found - wanted| / (1 + |wanted|) is anywhere above the tolerance."""
    within(law, who, (found - wanted).abs() / (1 + wanted.abs()), tolerance, at, (found, wanted))


def close_by_row(
    law: str, who: object, found: Tensor, wanted: Tensor, tolerance: float, at: Tensor | None = None
) -> None:
    """Raise if a row differs by more than the tolerance, relative to its norm or, if that is below 1, to 1."""
    within(law, who, error_by_row(found, wanted), tolerance, at, (found, wanted))


def error_by_row(found: Tensor, wanted: Tensor) -> Tensor:
    """Norm of the error of each row, relative to that of the row or, if that is below 1, to 1."""
    return (found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1)


def within(
    law: str, who: object, error: Tensor, tolerance: float, at: Tensor | None = None, pair: tuple[Tensor, ...] = ()
) -> None:
    """Raise if any error is NaN or above the tolerance.

    Args:
        law, who: Name of the law, and the object that should obey it.
        error: The errors.
        tolerance: The largest error allowed.
        at: Inputs; the message has the one with the largest error.
        pair: Computed and expected values.
    """
    if not error.numel() or float(error.detach().max()) <= tolerance:
        return
    worst = int(error.detach().flatten().argmax()) / error.numel()
    values = [_row(value.expand_as(pair[0]), worst) for value in pair]
    got = f"got {values[0]}, expected {values[1]}, " if values else ""
    where = "" if at is None else f", at the input {_row(at, worst)}"
    off = float(error.detach().max())
    raise BrokenLawError(name_of(who), law, f"{got}off by {off:.3g}, allowed are {tolerance:g}{where}")


def _row(values: Tensor, place: float) -> str:
    """The row of a batch, or the number, at a relative place between 0 and 1, with four digits."""
    rows = values.detach().reshape(-1, values.shape[-1]) if values.dim() > 1 else values.detach().reshape(-1, 1)
    return ", ".join(f"{value:.4g}" for value in rows[int(place * len(rows))].tolist())


def name_of(who: object) -> str:
    """Name of a flow, or of the flow inside one at a context, with its dimensions; for others, that of their class."""
    inner = who.flow if isinstance(who, Conditioned) else who
    return f"{inner.name}({inner.input_dim})" if isinstance(inner, Flow) else type(inner).__name__
