"""Markdown tables of the paper's comparison."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from parts.contest import DEFAULT, OURS
from parts.report import ratio, table
from parts.scaling import costs
from pyro_maf.experiments import ROWS, SETTINGS, Estimate

Section = dict[str, Any]


def everything(results: dict[str, Any]) -> str:
    """All tables that have results."""
    sets = results["sets"]
    parts = [_about(results["about"])] if results["about"] else []
    if sets:
        parts += [_scores(sets), _bits(sets), _settings(sets), _order(sets), _given(sets), _default(sets), _peers(sets)]
    parts += [_speed(results["speed"]), costs(results["speed"]), _figure_one(results["figure_one"])]
    return "\n\n".join(filter(None, parts)) + "\n"


def _about(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{about['date']}; {about['processor']}, one thread; Python {about['python']}, {versions}."


def _scores(sets: dict[str, Section]) -> str:
    heading, columns = ["", *map(_column, sets.items())], [_by_model(section) for section in sets.values()]
    published = [SETTINGS[name].published if name in SETTINGS else {} for name in sets]
    rows = []
    for model in (*ROWS, DEFAULT.name):
        cells = [model]
        for column, paper in zip(columns, published, strict=True):
            cells.append(_estimate(column.get(model)) + (f" (paper {paper[model]:.2f})" if model in paper else ""))
        rows.append(cells)
    title = "**Test log-likelihood in nats, with two standard errors** (of the widths tried, those that validate best)"
    return f"{title}\n\n{table(heading, rows)}"


def _column(item: tuple[str, Section]) -> str:
    name, section = item
    return f"{name} ({section['input_dim']})"


def _by_model(section: Section) -> dict[str, Any]:
    return {line["model"]: line for line in section["models"]}


def _estimate(line: dict[str, float] | None) -> str:
    return "" if line is None else str(Estimate(line["mean"], line["error"]))


def _bits(sets: dict[str, Section]) -> str:
    images = {name: section for name, section in sets.items() if any("bits" in line for line in section["models"])}
    if not images:
        return ""
    columns = [_by_model(section) for section in images.values()]
    rows = [
        [model, *(str(Estimate(c[model]["bits"], c[model]["bits_error"])) if model in c else "" for c in columns)]
        for model in ROWS
        if any(model in column for column in columns)
    ]
    return "**Bits per pixel, with two standard errors**\n\n" + table(["", *images], rows)


def _settings(sets: dict[str, Section]) -> str:
    heading = ["", "rows", "validation", "test", "learning rate", "epochs at most", "widths chosen"]
    rows = []
    for name, section in sets.items():
        chosen = ", ".join(f"{line['model']} {line['hidden']}" for line in section["models"] if line["hidden"])
        sizes = [f"{count:,}" for count in section["rows"]]
        rows.append([name, *sizes, f"{section['learning_rate']:g}", str(section["epochs"]), chosen])
    return "**What was fitted**\n\n" + table(heading, rows)


def _order(sets: dict[str, Section]) -> str:
    pairs = list(dict.fromkeys((line["first"], line["second"]) for each in sets.values() for line in each["order"]))
    rows = []
    for first, second in pairs:
        cells = [f"{first} over {second}"]
        for section in sets.values():
            lines = [line for line in section["order"] if (line["first"], line["second"]) == (first, second)]
            cells.append(_judged(lines[0]) if lines else "")
        rows.append(cells)
    title = "**Who is ahead of whom**: nats a test row, paired by row, two standard errors; bold where it is not so"
    return f"{title}\n\n{table(['', *sets], rows)}" if rows else ""


def _judged(line: dict[str, float]) -> str:
    """A difference that should be positive, in bold unless it is by more than two standard errors."""
    shown = str(Estimate(line["difference"], line["difference_error"]))
    return shown if line["difference"] > line["difference_error"] else f"**{shown}**"


def _given(sets: dict[str, Section]) -> str:
    """Gain from the context, for data sets with one."""
    informed = {name: section for name, section in sets.items() if section.get("given_context")}
    if not informed:
        return ""
    columns = [{line["model"]: line for line in section["given_context"]} for section in informed.values()]
    rows = [
        [model, *(_judged(column[model]) if model in column else "" for column in columns)]
        for model in ROWS
        if any(model in column for column in columns)
    ]
    title = "**What the class is worth**: nats a test row over the model without it, paired by row; bold where none"
    return f"{title}\n\n{table(['', *informed], rows)}"


def _peers(sets: dict[str, Section]) -> str:
    lines = [(name, line) for name, each in sets.items() for line in each["against_peers"]]
    lines = [(name, line) for name, line in lines if line["model"] != DEFAULT.name]
    names = sorted({who for _, line in lines for who in line["test"]} - {OURS})
    if not names:
        return ""
    heading = ["", "model", "hidden", "ours", *names, "ours - best peer", "s, ours", *(f"s, {name}" for name in names)]
    rows = []
    for name, line in lines:
        cells = [name, line["model"], line["hidden"], _estimate(line["test"][OURS])]
        cells += [_estimate(line["test"].get(peer)) for peer in names]
        cells += [_not_behind(line), *_seconds(line, [OURS, *names])]
        rows.append(cells)
    title = (
        "**Against the peers**: the same widths, learning rate, batches and most epochs; nats, paired by row, with two "
        "standard errors; processor seconds; bold where ours is behind by more than two standard errors"
    )
    return f"{title}\n\n{table(heading, rows)}"


def _default(sets: dict[str, Section]) -> str:
    """The default against each peer's recipe and simple densities."""
    lines = {name: line for name, each in sets.items() for line in each["against_peers"] if line["model"] == "default"}
    others = list(dict.fromkeys(who for line in lines.values() for who in line["ahead"]))
    if not others:
        return ""
    heading = ["", "seeds", "default", "s", *(f"over {who}" for who in others), *(f"s, {who}" for who in others)]
    rows = []
    for name, line in lines.items():
        seeds = {each["seed"] for each in sets[name]["tried"] if each["model"] == "default"}
        cells = [name, str(len(seeds)), _estimate(line["test"][OURS]), *_seconds(line, [OURS])]
        cells += [_not_behind(line["ahead"][who]) if who in line["ahead"] else "" for who in others]
        cells += _seconds(line, others)
        rows.append(cells)
    title = (
        "**The default, `fit(rows)`, over others by recipes of their own**: nats a test row, paired by row, with two "
        "standard errors, means over seeds; processor seconds; bold where it is behind by more than two standard errors"
    )
    return f"{title}\n\n{table(heading, rows)}"


def _seconds(line: dict[str, dict[str, float]], names: list[str]) -> list[str]:
    return [f"{line['seconds'][who]:.0f}" if who in line["seconds"] else "" for who in names]


def _not_behind(line: dict[str, float]) -> str:
    shown = str(Estimate(line["difference"], line["difference_error"]))
    return f"**{shown}**" if line["difference"] < -line["difference_error"] else shown


def _speed(cells: list[dict[str, Any]]) -> str:
    if not cells:
        return ""
    names = list(dict.fromkeys(name for cell in cells for name in cell["ratio"]))
    heading = ["D, H", "ours, rows/s", "`fit`, rows/s", *(f"{name} / ours" for name in names)]
    rows = [
        [
            f"{cell['D']}, {cell['H']}",
            f"{cell['rows_per_second'][OURS]:,.0f}",
            f"{cell['fit_rows_per_second']:,.0f}",
            *(ratio(cell["ratio"][name]) if name in cell["ratio"] else "" for name in names),
        ]
        for cell in cells
    ]
    title = (
        "**Rows per second of training**: MAF (5), two hidden layers of H, batches of 100, one thread; processor "
        "seconds of steps in turns, and of whole epochs of `fit`, validation included; a peer's step over ours"
    )
    return f"{title}\n\n{table(heading, rows)}"


def _figure_one(scores: dict[str, Any] | None) -> str:
    if not scores:
        return ""
    rows: Iterable[list[str]] = [
        ["the density itself", _estimate(scores["exact"]), ""],
        *(
            [name, _estimate(score), _estimate(score["short_of_exact"])]
            for name, score in scores.items()
            if isinstance(score, dict) and "short_of_exact" in score
        ),
    ]
    title = f"**Figure 1**: nats on the test points; no model can expect more than {-scores['entropy']:.3f}"
    return f"{title}\n\n{table(['', 'test log-likelihood', 'short of the density'], rows)}"
