"""From the results of a run: tables in Markdown and a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from parts.cells import AFFINE, DENSE, describe
from parts.memory import LOOP
from parts.peers import OURS
from parts.plan import TASKS

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
PAPER = ("<!-- paper: begin -->", "<!-- paper: end -->")
COMPILED = "flowjax"
"""The peer that is compiled as a whole, and has a column of its own."""
SLOW_CALL = 0.1
"""Seconds from which on predictions are judged: below, the time of a call is not that of its products."""

Results = dict[str, Any]
Cell = dict[str, Any]


# The short tables: one for each task


def summary(results: Results) -> str:
    """A row for each architecture, with our time, what it is of a dense pass and what the fastest peer's is of ours."""
    parts = [about_line(results)]
    for threads in sorted({cell["threads"] for cell in results["cells"]}):
        for task in TASKS:
            found = [cell for cell in results["cells"] if (cell["threads"], cell["task"]) == (threads, task)]
            if found:
                parts.append(f"**{describe(task)}** ({_threads(threads)})\n\n{_by_architecture(found)}")
    parts += [_scaling(results["cells"]), _updates(results["updates"]), _memory(results["memory"])]
    parts.append(_predictions(results["cells"]))
    return "\n\n".join(filter(None, parts)) + "\n"


def _by_architecture(found: list[Cell]) -> str:
    batches = sorted({cell["batch"] for cell in found})
    heading = ["D, H", "layers"]
    columns = {"ms": _ours, "/ dense": _over_dense, "torch / ours": _torch, f"{COMPILED} / ours": _compiled}
    if any(AFFINE in cell["times"] for cell in found):
        columns[f"/ {AFFINE}"] = _over_affine
    heading += [f"{name}, batch {batch:,}" for name in columns for batch in batches]
    by_size: dict[tuple[int, int, int], dict[int, Cell]] = {}
    for cell in found:
        by_size.setdefault((cell["D"], cell["H"], cell["layers"]), {})[cell["batch"]] = cell
    rows = []
    for (dim, hidden, layers), cells in by_size.items():
        row = [f"{dim}, {hidden}", str(layers)]
        for show in columns.values():
            row += [show(cells[batch]) if batch in cells else "" for batch in batches]
        rows.append(row)
    return table(heading, rows)


def _ours(cell: Cell) -> str:
    return milliseconds(cell["times"][OURS])


def _over_dense(cell: Cell) -> str:
    return ratio(cell["times"][OURS]["over_dense"])


def _over_affine(cell: Cell) -> str:
    own = cell["times"].get(AFFINE)
    return ratio(1 / own["over_ours"]) if own else ""


def _torch(cell: Cell) -> str:
    """The torch peer that takes the least time, measured or predicted, over ours."""
    peers = {name: own for name, own in cell["times"].items() if name not in (OURS, DENSE, COMPILED, AFFINE)}
    name = min(peers, key=lambda name: peers[name]["over_ours"], default=None)
    return f"{_over_ours(peers[name])} {name}" if name else ""


def _compiled(cell: Cell) -> str:
    own = cell["times"].get(COMPILED)
    return _over_ours(own) if own else ""


def _over_ours(own: dict[str, Any]) -> str:
    return _mark(own) + ratio(own["over_ours"])


# The long one: a row for each cell


def details(results: Results) -> str:
    """Minimum and median of everybody everywhere, in milliseconds."""
    names = sorted({name for cell in results["cells"] for name in cell["times"]}, key=_rank)
    heading = ["threads", "task", "D", "H", "layers", "batch", *names]
    rows = []
    for cell in results["cells"]:
        row = [str(cell[key]) for key in ("threads", "task", "D", "H", "layers", "batch")]
        for name in names:
            own = cell["times"].get(name)
            row.append("" if own is None else _both(own))
        rows.append(row)
    notes = {f"{name} {note}" for cell in results["cells"] for name, note in cell["notes"].items()}
    notes |= {
        f"D {cell['D']}, H {cell['H']}, {cell['layers']} x, batch {cell['batch']}, {cell['task']}: {name} {own['note']}"
        for cell in results["cells"]
        for name, own in cell["times"].items()
        if own["note"]
    }
    listed = "".join(f"- {note}\n" for note in sorted(notes))
    return (
        f"{about_line(results)}\n\nMilliseconds, minimum / median; ~ predicted; in brackets the number of calls where "
        f"it is below 10.\n\n{table(heading, rows)}\n\n{listed}"
    )


def _both(own: dict[str, Any]) -> str:
    if not own["measured"]:
        return milliseconds(own)
    few = f" ({own['repetitions']})" if own["repetitions"] < 10 else ""
    return f"{milliseconds(own)} / {_digits(1e3 * own['median'])}{few}"


def _rank(name: str) -> tuple[int, str]:
    return {DENSE: 0, OURS: 1, AFFINE: 2}.get(name, 3), name


# Smaller ones


def about_line(results: Results) -> str:
    """Date, machine and versions of a run, and what was missing."""
    about = results["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    load = f", load {about['load']:.1f} at the start" if about["load"] is not None else ""
    machine = f"{about['processor']}, {about['cores']} cores{load}"
    lines = [f"{about['date']}; {machine}; Python {about['python']}, {versions}.", *results.get("missing", [])]
    return "\n".join(lines)


def _scaling(cells: list[Cell]) -> str:
    """Our time with one thread over that with more, in cells that were measured with both."""
    keys = ("task", "D", "H", "layers", "batch")
    by_cell: dict[tuple[Any, ...], dict[int, float]] = {}
    for cell in cells:
        times = by_cell.setdefault(tuple(cell[key] for key in keys), {})
        times[cell["threads"]] = cell["times"][OURS]["minimum"]
    more = sorted({threads for times in by_cell.values() for threads in times if threads > 1 and 1 in times})
    rows = []
    for threads in more:
        for task in TASKS:
            ratios = {
                key: t[1] / t[threads] for key, t in by_cell.items() if key[0] == task and {1, threads} <= t.keys()
            }
            if ratios:
                worst, best = (pick(ratios, key=lambda key: ratios[key]) for pick in (min, max))
                rows.append(
                    [str(threads), describe(task), *(f"{ratio(ratios[k])} at {_where(k)}" for k in (worst, best))]
                )
    if not rows:
        return ""
    return "**One thread / more threads, our fastest calls**\n\n" + table(["threads", "", "least", "most"], rows)


def _where(key: tuple[Any, ...]) -> str:
    _, dim, hidden, layers, batch = key
    return f"({dim}, {hidden}, {batch}), {layers} x"


def _updates(updates: list[dict[str, Any]]) -> str:
    rows = [
        [
            str(update["threads"]),
            f"{update['D']}, {update['H']}",
            f"{update['batch']:,}",
            _digits(1e3 * update["first"]),
            _digits(1e3 * update["warm"]),
            ratio(update["ratio"]),
        ]
        for update in updates
    ]
    if not rows:
        return ""
    heading = ["threads", "D, H", "batch", "first, ms", "next, ms", "first / next"]
    return "**Sampling right after a change of all weights, and the call after that** (1 layer)\n\n" + table(
        heading, rows
    )


def _memory(memory: dict[str, Any] | None) -> str:
    if not memory:
        return ""
    dim, hidden, batch = memory["sizes"]
    ours = memory["bytes"].get(OURS)
    rows = [
        [name, f"{count / 2**20:,.1f}", ratio(count / ours) if ours else ""] for name, count in memory["bytes"].items()
    ]
    title = (
        f"**Peak memory of sampling and its gradient** ({dim}, {hidden}, {batch:,}; 1 layer; {LOOP}: the plain loop)"
    )
    return f"{title}\n\n" + table(["", "MiB", "/ ours"], rows)


def _predictions(cells: list[Cell]) -> str:
    """How good predictions are, where a call was both predicted and measured."""
    found = [
        own["median"] / own["predicted"]
        for cell in cells
        for own in cell["times"].values()
        if own["measured"] and own["predicted"] and own["median"] > SLOW_CALL
    ]
    marked = "~ marks what was not run but predicted: D times the fastest of the peer's own single passes"
    if len(found) < 3:
        return f"{marked}."
    tenths = statistics.quantiles(found, n=10)
    return (
        f"{marked}. Of {len(found)} calls above {SLOW_CALL:g} s that were both predicted and run, the time was "
        f"{tenths[0]:.2f} to {tenths[-1]:.2f} of the prediction (first and last tenth), {statistics.median(found):.2f} "
        "in the median."
    )


def line(cell: Cell) -> str:
    """A cell in one line."""
    ours = cell["times"][OURS]
    where = f"{_threads(cell['threads'])}, D {cell['D']}, H {cell['H']}, {cell['layers']} x, batch {cell['batch']}"
    shown = [f"{milliseconds(ours)} ms", f"{ratio(ours['over_dense'])} of a dense pass"]
    shown += [f"{text} of ours" for text in (_torch(cell), _compiled(cell) and f"{_compiled(cell)} {COMPILED}") if text]
    return f"{where}, {cell['task']}: {'; '.join(shown)}"


# Figures and tables


def milliseconds(own: dict[str, Any]) -> str:
    """The fastest call of a contender."""
    return _mark(own) + _digits(1e3 * own["minimum"])


def ratio(value: float) -> str:
    """Two digits, or as many as there are before the point."""
    return f"{value:.2f}" if value < 9.95 else f"{value:,.0f}"


def _digits(value: float) -> str:
    return (
        f"{value:.3f}"
        if value < 1
        else f"{value:.2f}"
        if value < 10
        else f"{value:,.1f}"
        if value < 100
        else f"{value:,.0f}"
    )


def _mark(own: dict[str, Any]) -> str:
    return "" if own["measured"] else "~"


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, its figures to the right."""
    rule = ["---:" if name else "---" for name in heading]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, rule, *rows))


def put_between_markers(path: Path, text: str, markers: tuple[str, str] = (BEGIN, END)) -> None:
    """Replace what stands between two markers of a file.

    Raises:
        ValueError: If the file has no markers.
    """
    begin, end = markers
    old = path.read_text(encoding="utf-8")
    if begin not in old or end not in old:
        raise ValueError(f"{path} has no lines {begin} and {end} to put the table between.")
    head, tail = old.split(begin, 1)[0], old.split(end, 1)[1]
    path.write_text(f"{head}{begin}\n\n{text}\n{end}{tail}", encoding="utf-8")
