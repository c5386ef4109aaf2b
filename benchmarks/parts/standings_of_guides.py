"""Markdown tables of the results of guides: one for each posterior, and one of the reliability of verdicts."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

FITTED, CONSTANT, CHAIN = "AutoIAF, fit_guide", "AutoIAF, constant rate", "NUTS"
HEADS = ("guide", "C2ST", "worst", "err", "k-hat", "ELBO, nats", "quantile error", "CPU s", "steps")
WRONG = 0.55
"""C2ST above which a guide counts as wrong."""


def tables(posteriors: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    parts = [table(name, section) for name, section in posteriors.items()]
    return "\n".join([*parts, reliability(posteriors)])


def table(name: str, section: dict[str, Any]) -> str:
    """Table of a posterior's guides: medians over seeds, and the worst C2ST."""
    lines = [
        f"**{name}** ({section['dimensions']} parameters; two sets of reference draws: C2ST "
        f"{section['c2st_of_references']:.3f})\n",
        f"| {' | '.join(HEADS)} |",
        f"| --- | {' | '.join(['---:'] * (len(HEADS) - 1))} |",
    ]
    for guide, fits in section["guides"].items():
        finished = [fit for fit in fits.values() if "error" not in fit]
        figures = cells(finished) if finished else ["raises", *[""] * (len(HEADS) - 2)]
        lines.append(f"| {guide} | {' | '.join(figures)} |")
    return "\n".join([*lines, *as_accurate(section["guides"]), ""])


def as_accurate(guides: dict[str, Any]) -> list[str]:
    """Lines on when the means of each chain reach the error of `fit_guide` with the same seed; empty without a pair."""
    lines = []
    for seed, chain in guides.get(CHAIN, {}).items():
        fit = guides.get(FITTED, {}).get(seed, {"error": ""})
        if "error" not in {**chain, **fit}:
            then = [seconds for seconds, error in chain.get("errors_in_time", []) if error <= fit["err"]]
            when = f"first after {then[0]:.1f} CPU s" if then else f"not within {chain['seconds']:.1f} CPU s"
            taken = fit["start"] + fit["seconds"]
            lines.append(f"NUTS, seed {seed}: err {fit['err']:.3f} {when}; fit_guide takes {taken:.1f}.")
    return ["", *lines] if lines else []


def cells(fits: list[dict[str, Any]]) -> list[str]:
    """Table cells of a guide's figures."""
    middle = {key: median(each[key] for each in fits) for key in fits[0] if isinstance(fits[0][key], float | int)}
    worst = max(each["c2st"] for each in fits)
    has_bound = middle["elbo"] == middle["elbo"]
    return [
        f"{middle['c2st']:.3f}",
        f"{worst:.3f}",
        f"{middle['err']:.3f}",
        f"{middle['k_hat']:.2f}" if has_bound else "",
        f"{middle['elbo']:.3f} ± {middle['elbo_se']:.3f}" if has_bound else "",
        f"{middle['quantile_error']:.3f}",
        f"{middle['start'] + middle['seconds']:.1f}",
        f"{middle['steps']:,.0f}",
    ]


def reliability(posteriors: dict[str, Any]) -> str:
    """Table of how often each verdict was given to right and to wrong guides."""
    counts: dict[str, Counter[str]] = {}
    for section in posteriors.values():
        for fits in section["guides"].values():
            for fit in fits.values():
                if fit.get("grade", "none") != "none":
                    right = "right" if fit["c2st"] <= WRONG else "wrong"
                    counts.setdefault(fit["grade"], Counter())[right] += 1
    lines = [f"| verdict | C2ST at most {WRONG} | above |", "| --- | ---: | ---: |"]
    grades = [grade for grade in ("good", "usable", "poor", "worthless") if grade in counts]
    lines += [f"| {grade} | {counts[grade]['right']} | {counts[grade]['wrong']} |" for grade in grades]
    return "\n".join([*lines, ""])
