"""How far the draws of a guide are from reference draws."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.neural_network import MLPClassifier

from parts.posteriors import Posterior
from pyro_maf.infer import Diagnosis

FOLDS = 5
COMPARED = 4_000
"""Draws of either kind that the classifiers are shown."""
FARTHEST = 20.0
"""Reference standard deviations at which draws are cut off for the classifiers: infinities would stop them."""
CHECKED = 40
"""Number of lengths of a chain at which the error of its means is taken."""
QUANTILES = (0.05, 0.5, 0.95)


def measure(posterior: Posterior, guide: Any, diagnosis: Diagnosis, draws: np.ndarray) -> dict[str, Any]:
    """Everything there is to say of a fitted guide or a chain, of which `draws` are."""
    return {
        "err": mean_error(posterior, draws),
        "c2st": c2st(posterior, draws),
        "k_hat": diagnosis.k_hat,
        "ess": diagnosis.ess,
        "elbo": diagnosis.elbo,
        "elbo_se": diagnosis.elbo_se,
        "log_evidence": diagnosis.log_evidence,
        "misplaced": diagnosis.misplaced,
        "grade": diagnosis.grade,
        "verdict": diagnosis.verdict,
        "quantile_error": quantile_error(posterior, guide, draws),
    }


def mean_error(posterior: Posterior, draws: np.ndarray) -> float:
    """Root mean square, over columns, of the error of the mean in reference standard deviations."""
    errors = (draws.mean(0) - posterior.draws.mean(0)) / posterior.scales
    return float(np.sqrt(np.mean(errors**2)))


def errors_in_time(posterior: Posterior, draws: np.ndarray, clock: Sequence[float]) -> list[list[float]]:
    """Processor seconds of a chain, and the error of its means until then, at 40 numbers of draws or fewer."""
    counts = np.unique(np.geomspace(1, len(clock), CHECKED).astype(int)) if clock else []
    return [[clock[count - 1], mean_error(posterior, draws[:count])] for count in counts]


def quantile_error(posterior: Posterior, guide: Any, draws: np.ndarray) -> float:
    """The largest error of a 5, 50 or 95 % quantile of any column, in reference standard deviations."""
    found = np.quantile(draws, QUANTILES, axis=0)
    if posterior.has_columns_of_sites and hasattr(guide, "quantiles"):
        with contextlib.suppress(NotImplementedError):  # Pyro's flows have none
            found = posterior.table(guide.quantiles(list(QUANTILES), *posterior.args))
    return float(np.abs((found - np.quantile(posterior.draws, QUANTILES, axis=0)) / posterior.scales).max())


def c2st(posterior: Posterior, draws: np.ndarray, reference: np.ndarray | None = None) -> float:
    """Accuracy, over five folds, of the better of two classifiers at telling draws from reference draws."""
    reference = posterior.draws if reference is None else reference
    if len(draws) < 2 * FOLDS:
        return 1.0
    rng = np.random.default_rng(0)
    count = min(COMPARED, len(draws), len(reference))
    rows = np.concatenate([rng.permutation(each)[:count] for each in (draws, reference)])
    rows = np.nan_to_num((rows - posterior.draws.mean(0)) / posterior.scales, nan=FARTHEST)
    labels = np.repeat([0, 1], count)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    classifiers = (
        MLPClassifier((64, 64), early_stopping=True, random_state=0),
        HistGradientBoostingClassifier(random_state=0),
    )
    rows = rows.clip(-FARTHEST, FARTHEST)
    return max(float(cross_val_score(classifier, rows, labels, cv=folds).mean()) for classifier in classifiers)


def agreement_of_references(posterior: Posterior) -> float:
    """C2ST of two parts of the reference draws: what a perfect guide would score."""
    rows = np.random.default_rng(2).permutation(posterior.draws)
    half = len(rows) // 2
    return c2st(posterior, rows[:half], rows[half:])
