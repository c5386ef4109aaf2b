"""Texts from elsewhere, such as names of columns and of files, as a message of one line shows them."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["MOST_LISTED", "listed", "quoted", "shown"]

LONGEST_TEXT = 60
MOST_LISTED = 10


def shown(text: str, most: int = LONGEST_TEXT) -> str:
    r"""A text without what moves a terminal's cursor, and not too long.

    Example:
        >>> shown("a\x1b[2Jb"), shown("a" * 9, most=4)
        ('a\\x1b[2Jb', 'aaa…')
    """
    cut = text if len(text) <= most else f"{text[: most - 1]}…"
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in cut)


def quoted(text: str) -> str:
    """The same in quotes."""
    return repr(text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…")


def listed(names: Sequence[str]) -> str:
    """Names with commas between them: all, or the first and the last of many.

    Example:
        >>> listed("ab"), listed("abcdefghijklmn")
        ('a, b', 'a, b, c, d, e, f, g, h, i, ... n')
    """
    if len(names) <= MOST_LISTED:
        return ", ".join(map(shown, names))
    return f"{', '.join(map(shown, names[: MOST_LISTED - 1]))}, ... {shown(names[-1])}"
