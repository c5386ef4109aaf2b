"""Tables of the results of guides: each posterior's, and how far verdicts can be relied on."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

FITTED, CONSTANT, CHAIN = "AutoIAF, fit_guide", "AutoIAF, constant rate", "NUTS"
HEADS = ("guide", "C2ST", "worst", "err", "k-hat", "ELBO, nats", "quantile error", "CPU s", "steps")
WRONG = 0.55
"""C2ST from which on a guide is not the posterior."""


def tables(posteriors: dict[str, Any]) -> str:
    """All tables, in Markdown."""
    parts = [table(name, found) for name, found in posteriors.items()]
    return "\n".join([*parts, reliability(posteriors)])


def table(name: str, found: dict[str, Any]) -> str:
    """The guides of one posterior: medians over seeds, and the worst C2ST."""
    lines = [
        f"**{name}** ({found['dimensions']} parameters; two sets of reference draws: C2ST "
        f"{found['c2st_of_references']:.3f})\n",
        f"| {' | '.join(HEADS)} |",
        f"| --- | {' | '.join(['---:'] * (len(HEADS) - 1))} |",
    ]
    for guide, fits in found["guides"].items():
        own = [each for each in fits.values() if "error" not in each]
        lines.append(f"| {guide} | {' | '.join(cells(own) if own else ['raises', *[''] * (len(HEADS) - 2)])} |")
    return "\n".join([*lines, *as_accurate(found["guides"]), ""])


def as_accurate(guides: dict[str, Any]) -> list[str]:
    """A line on when the means of chains have the error of the fit with the same seed; none without such a pair."""
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
    """A guide's figures."""
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
    """How often each verdict came, and how often with draws that are not the posterior's."""
    counts: dict[str, Counter[str]] = {}
    for found in posteriors.values():
        for fits in found["guides"].values():
            for own in fits.values():
                if own.get("grade", "none") != "none":
                    right = "right" if own["c2st"] <= WRONG else "wrong"
                    counts.setdefault(own["grade"], Counter())[right] += 1
    lines = [f"| verdict | C2ST at most {WRONG} | above |", "| --- | ---: | ---: |"]
    grades = [grade for grade in ("good", "usable", "poor", "worthless") if grade in counts]
    lines += [f"| {grade} | {counts[grade]['right']} | {counts[grade]['wrong']} |" for grade in grades]
    return "\n".join([*lines, ""])
