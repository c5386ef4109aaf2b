"""Formatting of external texts, such as names of columns and files, for messages of one line."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["MOST_LISTED", "listed", "quoted", "shown"]

LONGEST_TEXT = 60
MOST_LISTED = 10


def shown(text: str, most: int = LONGEST_TEXT) -> str:
    r"""Escape control characters in a text, and shorten it to `most` characters.

    Example:
        >>> shown("a\x1b[2Jb"), shown("a" * 9, most=4)
        ('a\\x1b[2Jb', 'aaa…')
    """
    cut = text if len(text) <= most else f"{text[: most - 1]}…"
    return "".join(mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in cut)


def quoted(text: str) -> str:
    """Quote a text, escaped and shortened."""
    return repr(text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…")


def listed(names: Sequence[str]) -> str:
    """Names separated by commas: all, or the first ones and the last of many.

    Example:
        >>> listed("ab"), listed("abcdefghijklmn")
        ('a, b', 'a, b, c, d, e, f, g, h, i, ... n')
    """
    if len(names) <= MOST_LISTED:
        return ", ".join(map(shown, names))
    return f"{', '.join(map(shown, names[: MOST_LISTED - 1]))}, ... {shown(names[-1])}"
