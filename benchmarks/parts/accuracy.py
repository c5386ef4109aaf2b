"""Accuracy of a guide's draws, against reference draws."""

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
"""Maximum number of draws of either kind for the classifiers."""
FARTHEST = 20.0
"""Reference standard deviations at which draws are clipped for the classifiers, which reject infinities."""
CHECKED = 40
"""Maximum number of lengths of a chain at which the error of its means is measured."""
QUANTILES = (0.05, 0.5, 0.95)


def measure(posterior: Posterior, guide: Any, diagnosis: Diagnosis, draws: np.ndarray) -> dict[str, Any]:
    """All figures of a fitted guide or a chain with these draws."""
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
    """Root mean square over columns of the error of the mean, in reference standard deviations."""
    errors = (draws.mean(0) - posterior.draws.mean(0)) / posterior.scales
    return float(np.sqrt(np.mean(errors**2)))


def errors_in_time(posterior: Posterior, draws: np.ndarray, clock: Sequence[float]) -> list[list[float]]:
    """Processor seconds of a chain and the error of its means by then, at up to 40 lengths."""
    counts = np.unique(np.geomspace(1, len(clock), CHECKED).astype(int)) if clock else []
    return [[clock[count - 1], mean_error(posterior, draws[:count])] for count in counts]


def quantile_error(posterior: Posterior, guide: Any, draws: np.ndarray) -> float:
    """Largest error of a 5, 50 or 95 % quantile of any column, in reference standard deviations."""
    quantiles = np.quantile(draws, QUANTILES, axis=0)
    if posterior.has_columns_of_sites and hasattr(guide, "quantiles"):
        with contextlib.suppress(NotImplementedError):  # Pyro's flows have none
            quantiles = posterior.table(guide.quantiles(list(QUANTILES), *posterior.args))
    return float(np.abs((quantiles - np.quantile(posterior.draws, QUANTILES, axis=0)) / posterior.scales).max())


def c2st(posterior: Posterior, draws: np.ndarray, reference: np.ndarray | None = None) -> float:
    """Classifier two-sample test: cross-validated accuracy of the better of two classifiers on draws and reference."""
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
    """C2ST between two halves of the reference draws, the score of a perfect guide."""
    rows = np.random.default_rng(2).permutation(posterior.draws)
    half = len(rows) // 2
    return c2st(posterior, rows[:half], rows[half:])
