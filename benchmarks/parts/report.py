"""Markdown tables of a run's results."""

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
"""The peer that is compiled as a whole, which has its own column."""
SLOW_CALL = 0.1
"""Seconds of a call above which predictions are assessed; shorter calls are dominated by overhead."""

Results = dict[str, Any]
Cell = dict[str, Any]


# Summary tables, one for each task


def summary(results: Results) -> str:
    """A table per task, a row per architecture: our time, over a dense pass, and the fastest peers' times over ours."""
    parts = [about_line(results)]
    for threads in sorted({cell["threads"] for cell in results["cells"]}):
        for task in TASKS:
            cells = [cell for cell in results["cells"] if (cell["threads"], cell["task"]) == (threads, task)]
            if cells:
                parts.append(f"**{describe(task)}** ({_threads(threads)})\n\n{_by_architecture(cells)}")
    parts += [_scaling(results["cells"]), _updates(results["updates"]), _memory(results["memory"])]
    parts.append(_predictions(results["cells"]))
    return "\n\n".join(filter(None, parts)) + "\n"


def _by_architecture(cells: list[Cell]) -> str:
    batches = sorted({cell["batch"] for cell in cells})
    heading = ["D, H", "layers"]
    columns = {"ms": _ours, "/ dense": _over_dense, "torch / ours": _torch, f"{COMPILED} / ours": _compiled}
    if any(AFFINE in cell["times"] for cell in cells):
        columns[f"/ {AFFINE}"] = _over_affine
    heading += [f"{name}, batch {batch:,}" for name in columns for batch in batches]
    by_size: dict[tuple[int, int, int], dict[int, Cell]] = {}
    for cell in cells:
        by_size.setdefault((cell["D"], cell["H"], cell["layers"]), {})[cell["batch"]] = cell
    rows = []
    for (dim, hidden, layers), by_batch in by_size.items():
        row = [f"{dim}, {hidden}", str(layers)]
        for show in columns.values():
            row += [show(by_batch[batch]) if batch in by_batch else "" for batch in batches]
        rows.append(row)
    return table(heading, rows)


def _ours(cell: Cell) -> str:
    return milliseconds(cell["times"][OURS])


def _over_dense(cell: Cell) -> str:
    return ratio(cell["times"][OURS]["over_dense"])


def _over_affine(cell: Cell) -> str:
    entry = cell["times"].get(AFFINE)
    return ratio(1 / entry["over_ours"]) if entry else ""


def _torch(cell: Cell) -> str:
    """Time of the fastest torch peer, measured or predicted, over ours."""
    peers = {name: entry for name, entry in cell["times"].items() if name not in (OURS, DENSE, COMPILED, AFFINE)}
    name = min(peers, key=lambda name: peers[name]["over_ours"], default=None)
    return f"{_over_ours(peers[name])} {name}" if name else ""


def _compiled(cell: Cell) -> str:
    entry = cell["times"].get(COMPILED)
    return _over_ours(entry) if entry else ""


def _over_ours(entry: dict[str, Any]) -> str:
    return _mark(entry) + ratio(entry["over_ours"])


# The detailed table, a row for each cell


def details(results: Results) -> str:
    """Minimum and median of every contender in every cell, in milliseconds."""
    names = sorted({name for cell in results["cells"] for name in cell["times"]}, key=_rank)
    heading = ["threads", "task", "D", "H", "layers", "batch", *names]
    rows = []
    for cell in results["cells"]:
        row = [str(cell[key]) for key in ("threads", "task", "D", "H", "layers", "batch")]
        for name in names:
            entry = cell["times"].get(name)
            row.append("" if entry is None else _both(entry))
        rows.append(row)
    notes = {f"{name} {note}" for cell in results["cells"] for name, note in cell["notes"].items()}
    for cell in results["cells"]:
        where = f"D {cell['D']}, H {cell['H']}, {cell['layers']} x, batch {cell['batch']}, {cell['task']}"
        notes |= {f"{where}: {name} {entry['note']}" for name, entry in cell["times"].items() if entry["note"]}
    listed = "".join(f"- {note}\n" for note in sorted(notes))
    return (
        f"{about_line(results)}\n\nMilliseconds, minimum / median; ~ predicted; in brackets the number of calls where "
        f"it is below 10.\n\n{table(heading, rows)}\n\n{listed}"
    )


def _both(entry: dict[str, Any]) -> str:
    if not entry["measured"]:
        return milliseconds(entry)
    few = f" ({entry['repetitions']})" if entry["repetitions"] < 10 else ""
    return f"{milliseconds(entry)} / {_digits(1e3 * entry['median'])}{few}"


def _rank(name: str) -> tuple[int, str]:
    return {DENSE: 0, OURS: 1, AFFINE: 2}.get(name, 3), name


# Other tables


def about_line(results: Results) -> str:
    """Date, machine and versions of a run, and what it left out."""
    about = results["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    load = f", load {about['load']:.1f} at the start" if about["load"] is not None else ""
    machine = f"{about['processor']}, {about['cores']} cores{load}"
    lines = [f"{about['date']}; {machine}; Python {about['python']}, {versions}.", *results.get("missing", [])]
    return "\n".join(lines)


def _scaling(cells: list[Cell]) -> str:
    """Our time with one thread over that with more, in cells measured with both."""
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
    """Accuracy of predictions, from calls that were both predicted and measured."""
    ratios = [
        entry["median"] / entry["predicted"]
        for cell in cells
        for entry in cell["times"].values()
        if entry["measured"] and entry["predicted"] and entry["median"] > SLOW_CALL
    ]
    marked = "~ marks what was not run but predicted: D times the fastest of the peer's own single passes"
    if len(ratios) < 3:
        return f"{marked}."
    tenths, median = statistics.quantiles(ratios, n=10), statistics.median(ratios)
    return (
        f"{marked}. Of {len(ratios)} calls above {SLOW_CALL:g} s that were both predicted and run, the time was "
        f"{tenths[0]:.2f} to {tenths[-1]:.2f} of the prediction (first and last tenth), {median:.2f} in the median."
    )


def line(cell: Cell) -> str:
    """One-line summary of a cell."""
    ours = cell["times"][OURS]
    where = f"{_threads(cell['threads'])}, D {cell['D']}, H {cell['H']}, {cell['layers']} x, batch {cell['batch']}"
    shown = [f"{milliseconds(ours)} ms", f"{ratio(ours['over_dense'])} of a dense pass"]
    shown += [f"{text} of ours" for text in (_torch(cell), _compiled(cell) and f"{_compiled(cell)} {COMPILED}") if text]
    return f"{where}, {cell['task']}: {'; '.join(shown)}"


# Formatting


def milliseconds(entry: dict[str, Any]) -> str:
    """Milliseconds of a contender's fastest call."""
    return _mark(entry) + _digits(1e3 * entry["minimum"])


def ratio(value: float) -> str:
    """A ratio with two decimals, or rounded to an integer from 10."""
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


def _mark(entry: dict[str, Any]) -> str:
    return "" if entry["measured"] else "~"


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns with a heading are aligned right."""
    rule = ["---:" if name else "---" for name in heading]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, rule, *rows))


def put_between_markers(path: Path, text: str, markers: tuple[str, str] = (BEGIN, END)) -> None:
    """Replace the text between two markers of a file.

    Raises:
        ValueError: If the file has no markers.
    """
    begin, end = markers
    old = path.read_text(encoding="utf-8")
    if begin not in old or end not in old:
        raise ValueError(f"{path} has no lines {begin} and {end} to put the table between.")
    head, tail = old.split(begin, 1)[0], old.split(end, 1)[1]
    path.write_text(f"{head}{begin}\n\n{text}\n{end}{tail}", encoding="utf-8")
