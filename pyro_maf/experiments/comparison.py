"""Several models fitted to the same data: the paper's table, on any data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyro_maf.datasets import Dataset
from pyro_maf.experiments.candidates import Candidate, candidates
from pyro_maf.experiments.gaussian import fit_gaussian
from pyro_maf.experiments.scores import Score, bits_of, fingerprint, log_prob_of, read_score, write_score
from pyro_maf.training import FitResult, fit

__all__ = ["Comparison", "compare"]

CLOSED_FORM = "closed form"
INTERRUPTED = "interrupted"
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Comparison:
    """The models fitted to a data set, with the test score of each.

    Attributes:
        data: Name of the data.
        input_dim, context_dim: D and C.
        rows: Number of rows for training, validation and testing.
        tried: Every fit.
        failed: Why a model has no score, by its name.
        missing: Names of the models that were not reached before an interruption.
    """

    data: str
    input_dim: int
    context_dim: int
    rows: tuple[int, int, int]
    tried: tuple[Score, ...]
    failed: dict[str, str]
    missing: tuple[str, ...]

    @property
    def scores(self) -> tuple[Score, ...]:
        """One score for each name, in the requested order: of the widths tried, that with the best validation score."""
        chosen: dict[str, Score] = {}
        for score in self.tried:
            held = chosen.get(score.candidate.name)
            if held is None or score.validation > held.validation:
                chosen[score.candidate.name] = score
        return tuple(chosen.values())

    @property
    def best(self) -> Score | None:
        """The score of the highest test log-likelihood, if any."""
        return max(self.scores, key=lambda score: score.test.mean, default=None)


def compare(
    data: Dataset,
    models: Sequence[Candidate] | None = None,
    *,
    folder: str | Path | None = None,
    batch_size: int = 256,
    max_epochs: int = 1000,
    patience: int = 30,
    learning_rate: float = 2e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool | str = True,
    tell: Callable[[Score], None] | None = None,
) -> Comparison:
    r"""Fit each model to the same training rows, and score it on the same test rows.

    Every fit is one of `pyro_maf.fit`, apart from the Gaussian, which has a closed form. With a context in `data` the
    models are conditional.

    Args:
        data: Training, validation and test rows, and their contexts.
        models: The models to fit, by default every row of the paper's table.
        folder: Folder with a subfolder for each model, with its density, its score and the log of its fit. Results
            in it are read back and not fitted again, and an interrupted fit is resumed.
        batch_size, max_epochs, patience, learning_rate, progress: As in `fit`; a candidate's learning rate has
            priority.
        seed: Seed of the initial weights, and of the batches.
        device: Device of the fits.
        tell: Callback with each score.

    Returns:
        A `Comparison`. Ctrl-C ends it, without the present model and those after it; with a folder, the same call
        resumes from there.

    Cost: that of the fits; results that are read back are free.

    Raises:
        ValueError: As `fit` for its options; and for a folder in which a model was fitted to other data or with other
            options.
        TypeError: As `fit`.

    Example:
        >>> from pyro_maf.datasets import FigureOne
        >>> data = FigureOne().dataset(train=500, validation=100, test=100)
        >>> found = compare(data, candidates(["Gaussian", "MADE"]), max_epochs=2, progress=False)
        >>> [score.candidate.name for score in found.scores]
        ['Gaussian', 'MADE']

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017, section 4.
    """
    models = candidates() if models is None else tuple(models)
    options = {
        "batch_size": batch_size,
        "max_epochs": max_epochs,
        "patience": patience,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    contest = _Contest(data, options, None if folder is None else Path(folder), torch.device(device), progress)
    tried: list[Score] = []
    for score in contest.scores(models):
        tried.append(score)
        if tell is not None:
            tell(score)
    done = {score.candidate for score in tried}
    return Comparison(
        data.name,
        data.input_dim,
        data.context_dim,
        (len(data.train), len(data.validation), len(data.test)),
        tuple(tried),
        contest.failed,
        tuple(dict.fromkeys(one.name for one in models if one not in done and one.name not in contest.failed)),
    )


@dataclass
class _Contest:
    """State that the fits of a comparison share."""

    data: Dataset
    options: dict[str, Any]
    folder: Path | None
    device: torch.device
    progress: bool | str

    def __post_init__(self) -> None:
        self.failed: dict[str, str] = {}
        self.interrupted = False

    def scores(self, models: Sequence[Candidate]) -> Iterator[Score]:
        """Iterate over scores until all fits are done or one is interrupted."""
        for model in models:
            # A closed form uses none of them.
            options = {} if model.flow == "gaussian" else dict(self.options)
            if model.learning_rate is not None and options:
                options["learning_rate"] = model.learning_rate
            known_by = fingerprint(self.data, model, options)
            own = None if self.folder is None else self.folder / model.slug
            score = None if own is None else read_score(own, self.data, model, known_by)
            if score is None:
                score = self._fit(model, options, own, known_by)
            if self.interrupted:
                return
            if score is not None:
                yield score

    def _fit(
        self, model: Candidate, options: dict[str, Any], own: Path | None, known_by: dict[str, Any]
    ) -> Score | None:
        """Fit and score a model; None if there is nothing to score."""
        if own is not None:
            own.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        if model.flow == "gaussian":
            try:
                density = fit_gaussian(self.data.train, self.data.train_context)
            except ValueError as error:
                self.failed[model.name] = str(error)
                return None
            score = self._score(model, density, 0, time.monotonic() - started, CLOSED_FORM)
        else:
            result = self._train(model, options, own)
            if result.stop_reason == INTERRUPTED:
                self.interrupted = True
                return None
            density = result.density
            score = self._score(model, density, result.epochs, result.seconds, result.stop_reason)
        if own is not None:
            write_score(own, score, density, known_by)
            # Four times the size of the model, and of no further use.
            (own / CHECKPOINT).unlink(missing_ok=True)
        return score

    def _train(self, model: Candidate, options: dict[str, Any], own: Path | None) -> FitResult:
        data = self.data
        validation = data.validation if data.validation_context is None else (data.validation, data.validation_context)
        return fit(
            model.build(data.input_dim, data.context_dim, options["seed"]).to(self.device),
            data.train,
            context=data.train_context,
            validation=validation,
            progress=self.progress,
            folder=own,
            resume=own is not None,
            **options,
        )

    def _score(self, model: Candidate, density: Any, epochs: int, seconds: float, stop_reason: str) -> Score:
        data = self.data
        log_prob = log_prob_of(density, data.test, data.test_context)
        return Score(
            model,
            log_prob,
            bits_of(data, log_prob),
            validation=log_prob_of(density, data.validation, data.validation_context).mean().item(),
            parameters=sum(weight.numel() for weight in density.parameters()),
            epochs=epochs,
            seconds=seconds,
            stop_reason=stop_reason,
        )
