"""Test score of a fitted model: one row of a comparison, and its files."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_maf.datasets import Dataset
from pyro_maf.experiments.candidates import Candidate
from pyro_maf.saving import write_whole

__all__ = ["Estimate", "Score", "estimate", "log_prob_of", "read_score", "write_score"]

BATCH = 2048
DENSITY, LOG_PROB, SCORE = "model.safetensors", "log_prob.npy", "score.json"


@dataclass(frozen=True)
class Estimate:
    """A mean and two standard errors."""

    mean: float
    error: float

    def __str__(self) -> str:
        digits = 3 if self.error < 0.02 else 2
        return f"{self.mean:.{digits}f} ± {self.error:.{digits}f}"


@dataclass(frozen=True)
class Score:
    """A fitted candidate and its scores.

    Attributes:
        candidate: The candidate.
        log_prob: The log-density of each test row, in nats, (rows,), in float64.
        bits_per_pixel: Bits per pixel of each, for images, or None.
        validation: Mean log-likelihood of the validation rows, in nats.
        parameters: Number of fitted parameters.
        epochs: Number of epochs, 0 for a closed form.
        seconds: Duration of the fit.
        stop_reason: Reason for stopping.
    """

    candidate: Candidate
    log_prob: Tensor
    bits_per_pixel: Tensor | None
    validation: float
    parameters: int
    epochs: int
    seconds: float
    stop_reason: str

    @property
    def test(self) -> Estimate:
        """Test log-likelihood in nats."""
        return estimate(self.log_prob)

    @property
    def bits(self) -> Estimate | None:
        """Bits per pixel of the test rows, for images."""
        return None if self.bits_per_pixel is None else estimate(self.bits_per_pixel)

    def ahead_of(self, other: Score) -> Estimate:
        """Mean gain in nats of a test row over another score, paired by row, so that common difficulty cancels."""
        return estimate(self.log_prob - other.log_prob)


def estimate(values: Tensor) -> Estimate:
    """Return the mean of independent values, and two standard errors.

    Example:
        >>> estimate(torch.tensor([1.0, 3.0]))
        Estimate(mean=2.0, error=2.0)
    """
    error = 2 * values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(values.mean().item(), error)


def log_prob_of(density: Any, rows: Tensor, context: Tensor | None) -> Tensor:
    """Log-density of every row, (rows,), in nats, in float64 on the CPU."""
    device = next(density.parameters()).device
    found = []
    with torch.no_grad():
        for start in range(0, len(rows), BATCH):
            batch = slice(start, start + BATCH)
            at = density if context is None else density.condition(context[batch].to(device, density.context_dtype))
            found.append(at.log_prob(rows[batch].to(device, density.dtype)).double().cpu())
    return torch.cat(found)


def fingerprint(data: Dataset, candidate: Candidate, options: dict[str, Any]) -> dict[str, Any]:
    """The facts that a stored score must share with the requested one."""
    parts = (data.train, data.validation, data.test, data.train_context, data.validation_context, data.test_context)
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"none" if part is None else part.contiguous().numpy().tobytes())
    found = {"data": digest.hexdigest(), "candidate": dataclasses.asdict(candidate), "options": options}
    # As in JSON, where a tuple is a list.
    return json.loads(json.dumps(found))


def write_score(folder: Path, score: Score, density: Any, known_by: dict[str, Any]) -> None:
    """Write density and score to `folder`; `score.json`, which marks it as complete, comes last."""
    density.save(folder / DENSITY)
    array = io.BytesIO()
    np.save(array, score.log_prob.numpy(), allow_pickle=False)
    write_whole(folder / LOG_PROB, array.getvalue())
    own = {name: getattr(score, name) for name in ("validation", "parameters", "epochs", "seconds", "stop_reason")}
    facts = {"fingerprint": known_by, **own}
    facts["digest"] = _digest(score.log_prob, facts)
    write_whole(folder / SCORE, json.dumps(facts, indent=1).encode())


def read_score(folder: Path, data: Dataset, candidate: Candidate, known_by: dict[str, Any]) -> Score | None:
    """Read the score in `folder`; None if there is none.

    Raises:
        ValueError: If it is from other data or other options, or is damaged.
    """
    if not (folder / SCORE).is_file():
        return None
    try:
        stored = json.loads((folder / SCORE).read_text(encoding="utf-8"))
        log_prob = torch.from_numpy(np.load(folder / LOG_PROB, allow_pickle=False))
        if not isinstance(stored, dict) or stored.pop("digest", None) != _digest(log_prob, stored):
            raise ValueError("its content is not what was written")
        other = stored.pop("fingerprint")
        score = Score(candidate, log_prob, bits_of(data, log_prob), **stored)
    except (ValueError, TypeError, KeyError, OSError, EOFError, RecursionError) as error:
        raise ValueError(f"compare found {folder} damaged ({error}): remove it to fit {candidate.name} anew.") from None
    if other != known_by:
        what = ", ".join(name for name in known_by if other.get(name) != known_by[name])
        raise ValueError(
            f"compare found {candidate.name} in {folder} fitted with other {what}: "
            "name another folder, or remove that one to fit it anew."
        )
    return score


def _digest(log_prob: Tensor, facts: dict[str, Any]) -> str:
    """Fingerprint of the scores and facts."""
    hashed = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    hashed.update(log_prob.numpy().tobytes())
    return hashed.hexdigest()


def bits_of(data: Dataset, log_prob: Tensor) -> Tensor | None:
    """Bits per pixel of each test row, if the rows are images; else None."""
    return None if data.pixels is None else data.pixels.bits_per_pixel(log_prob, data.test.double())
