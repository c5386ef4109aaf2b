"""Comparison of several models fitted to the same data: the paper's table, for any data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from pyro_maf._core.checks import check_seed
from pyro_maf._core.files import CHECKPOINT, MODEL, write_whole
from pyro_maf.datasets import Dataset
from pyro_maf.distributions import ConditionalFlowPrior, FlowPrior
from pyro_maf.experiments.models import Candidate, candidates, fit_gaussian
from pyro_maf.experiments.results import Comparison, Score
from pyro_maf.saving import Kind, pack, unpack
from pyro_maf.tables import Rows
from pyro_maf.tables.layout import TableLike, number_of_rows, numbers
from pyro_maf.tables.named_rows import named_rows
from pyro_maf.tables.reader import check_paired
from pyro_maf.tables.rows import copies_of
from pyro_maf.tables.table import Table
from pyro_maf.training import FitResult, fit
from pyro_maf.training.scores import log_prob_of

__all__ = ["compare", "divide"]

CLOSED_FORM = "closed form"
SCORE = "score.safetensors"
FILE = Kind("pyro_maf.score", "score of a comparison", "compare", "Remove its folder to fit the model anew.")
FACTS = ("validation", "parameters", "epochs", "seconds", "stop_reason")
LEAST_ROWS = 10

Facts: TypeAlias = dict[str, Any]
"""JSON values by name."""


def compare(
    data: Dataset,
    models: Sequence[Candidate] | None = None,
    *,
    folder: str | Path | None = None,
    batch_size: int | None = None,
    max_epochs: int = 1000,
    patience: int | None = None,
    learning_rate: float = 2e-3,
    weight_decay: float | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool | str = True,
    tell: Callable[[Score], None] | None = None,
) -> Comparison:
    r"""Fit each model to the same training rows, and score it on the same test rows.

    Every fit uses `pyro_maf.fit`, except for the Gaussian, which has a closed form. If `data` has a context, the models
    are conditional.

    Args:
        data: Training, validation and test rows, and their contexts.
        models: The models to fit, by default every row of the paper's table.
        folder: Folder with a subfolder for each model, with its density, its score and the log of its fit. Results in
            it are read rather than fitted again, and an interrupted fit is resumed.
        batch_size, max_epochs, patience, learning_rate, weight_decay, progress: As in `fit`; a candidate's learning
            rate takes precedence.
        seed: Seed of the initial weights and of the batches.
        device: Device of the fits.
        tell: Callback for each score.

    Returns:
        A `Comparison`. Ctrl-C ends it, without the current model and those after it; with a folder, the same call
        resumes from there.

    Cost: that of the fits; reading stored results is free.

    Raises:
        ValueError: As `fit` for its options, or if a model in the folder was fitted to other data or with other
            options.
        TypeError: As `fit`.

    Example:
        >>> from pyro_maf.datasets import FigureOne
        >>> data = FigureOne().dataset(train=500, validation=100, test=100)
        >>> comparison = compare(data, candidates(["Gaussian", "MADE"]), max_epochs=2, progress=False)
        >>> [score.candidate.name for score in comparison.scores]
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
        "weight_decay": weight_decay,
        "seed": seed,
    }
    contest = _Contest(data, options, None if folder is None else Path(folder), torch.device(device), progress)
    scores: list[Score] = []
    for score in contest.scores(models):
        scores.append(score)
        if tell is not None:
            tell(score)
    done = {score.candidate for score in scores}
    return Comparison(
        data.name,
        data.input_dim,
        data.context_dim,
        (len(data.train), len(data.validation), len(data.test)),
        tuple(scores),
        contest.failed,
        tuple(dict.fromkeys(one.name for one in models if one not in done and one.name not in contest.failed)),
    )


@dataclass
class _Contest:
    """State shared by the fits of a comparison."""

    data: Dataset
    options: Facts
    folder: Path | None
    device: torch.device
    progress: bool | str
    failed: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    def scores(self, models: Sequence[Candidate]) -> Iterator[Score]:
        """Iterate over scores until all fits are done or one is interrupted."""
        for model in models:
            # A closed form uses none of them.
            options = {} if model.flow == "gaussian" else dict(self.options)
            if model.learning_rate is not None and options:
                options["learning_rate"] = model.learning_rate
            fingerprint = _fingerprint(self.data, model, options)
            folder = None if self.folder is None else self.folder / model.slug
            score = None if folder is None else _read_score(folder, self.data, model, fingerprint)
            if score is None:
                score = self._fit(model, options, folder, fingerprint)
            if self.interrupted:
                return
            if score is not None:
                yield score

    def _fit(self, model: Candidate, options: Facts, folder: Path | None, fingerprint: Facts) -> Score | None:
        """Fit and score a model; None if there is nothing to score."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        if model.flow == "gaussian":
            try:
                density = fit_gaussian(self.data.train, self.data.train_context)
            except ValueError as error:
                self.failed[model.name] = str(error)
                return None
            score = self._score(model, density, 0, time.monotonic() - started, CLOSED_FORM)
        else:
            result = self._train(model, options, folder)
            if result.interrupted:
                self.interrupted = True
                return None
            density = cast("FlowPrior | ConditionalFlowPrior", result.density)
            score = self._score(model, density, result.epochs, result.seconds, result.stop_reason)
        if folder is not None:
            density.name_columns(self.data.layout, self.data.context_layout)
            _write_score(folder, score, density, fingerprint)
            # Four times the size of the model, and no longer needed.
            (folder / CHECKPOINT).unlink(missing_ok=True)
        return score

    def _train(self, model: Candidate, options: Facts, folder: Path | None) -> FitResult:
        data = self.data
        names, context_names = data.layout.labels, data.context_layout.encoded_labels
        rows, validation = (_by_name(names, part) for part in (data.train, data.validation))
        context = validation_context = None
        if data.train_context is not None and data.validation_context is not None:
            context = _by_name(context_names, data.train_context)
            validation_context = _by_name(context_names, data.validation_context)
        return fit(
            model.build(data.input_dim, data.context_dim, options["seed"]).to(self.device),
            rows,
            context=context,
            validation=(validation, validation_context),
            dequantise=False,  # densities, comparable with the paper's
            progress=self.progress,
            folder=folder,
            resume=folder is not None,
            **options,
        )

    def _score(
        self, model: Candidate, density: FlowPrior | ConditionalFlowPrior, epochs: int, seconds: float, stop_reason: str
    ) -> Score:
        data = self.data
        test, validation = (
            torch.cat([*log_prob_of(density, rows, context)]).double()
            for rows, context in ((data.test, data.test_context), (data.validation, data.validation_context))
        )
        return Score(
            model,
            test,
            _bits_of(data, test),
            validation=validation.mean().item(),
            parameters=sum(weight.numel() for weight in density.parameters()),
            epochs=epochs,
            seconds=seconds,
            stop_reason=stop_reason,
        )


def _by_name(names: Sequence[str], rows: Tensor) -> TableLike:
    """Return rows as named columns, if they have names, for the messages of `fit`."""
    return dict(zip(names, rows.unbind(1), strict=True)) if names else rows


def _fingerprint(data: Dataset, candidate: Candidate, options: Facts) -> Facts:
    """The facts that a stored score must share with the requested one."""
    digest = hashlib.sha256()
    contexts = data.train_context, data.validation_context, data.test_context
    for part in (data.train, data.validation, data.test, *contexts):
        digest.update(b"none" if part is None else part.contiguous().numpy().tobytes())
    facts = {"data": digest.hexdigest(), "candidate": dataclasses.asdict(candidate), "options": options}
    # As in JSON, where a tuple is a list.
    return dict(json.loads(json.dumps(facts)))


def _write_score(folder: Path, score: Score, density: FlowPrior | ConditionalFlowPrior, fingerprint: Facts) -> None:
    """Write density and score to `folder`; the score comes last, since it marks the result as complete."""
    density.save(folder / MODEL)
    facts = {"fingerprint": fingerprint, **{name: getattr(score, name) for name in FACTS}}
    write_whole(folder / SCORE, pack({"log_prob": score.log_prob}, FILE, json.dumps(facts)))


def _read_score(folder: Path, data: Dataset, candidate: Candidate, fingerprint: Facts) -> Score | None:
    """Read the score in `folder`; None if there is none.

    Raises:
        ValueError: If it belongs to other data or other options, or is damaged.
    """
    if not (folder / SCORE).is_file():
        return None
    contents = unpack(folder / SCORE, FILE)
    facts, log_prob = json.loads(contents.text), contents.tensors["log_prob"]
    other = facts.pop("fingerprint")
    if other != fingerprint:
        what = ", ".join(name for name in fingerprint if other.get(name) != fingerprint[name])
        raise ValueError(
            f"compare found {candidate.name} in {folder} fitted with other {what}: "
            "name another folder, or remove that one to fit it anew."
        )
    return Score(candidate, log_prob, _bits_of(data, log_prob), **facts)


def _bits_of(data: Dataset, log_prob: Tensor) -> Tensor | None:
    """Bits per pixel of each test row, if the rows are images; otherwise None."""
    return None if data.pixels is None else data.pixels.bits_per_pixel(log_prob, data.test.double())


def divide(
    name: str,
    data: TableLike | Table,
    context: TableLike | None = None,
    *,
    test: float = 0.1,
    validation: float = 0.1,
    seed: int = 0,
) -> Dataset:
    r"""Shuffle rows and hold some out: a fraction for testing, and a fraction of the rest for validation.

    Equal rows stay together, as in `fit`.

    Args:
        name: Name of the data in tables.
        data: Rows (N, D): an array, a tensor or a data frame of numbers; or a table of `read_table`, with its context.
        context: Rows (N, C), or None.
        test: Fraction of the rows for testing, between 0 and 1.
        validation: Fraction of the remaining rows for validation.
        seed: Seed of the shuffle.

    Returns:
        A `Dataset`, in the dtype of `data` if that is float32 or float64, and in float64 otherwise.

    Raises:
        TypeError: For columns of a data frame that are not numeric.
        ValueError: For fractions outside (0, 1), too few rows for all three parts, or data frames with the same index
            in different order.

    Example:
        >>> data = divide("rows", torch.randn(100, 2))
        >>> len(data.train), len(data.validation), len(data.test)
        (81, 9, 10)

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017, section 4.2.
    """
    for role, part in (("test", test), ("validation", validation)):
        if not 0 < part < 1:
            raise ValueError(f"divide expected {role} as a fraction between 0 and 1, got {part!r}.")
    check_seed("divide", seed)
    source = named_rows("divide", data, context)
    if source.layout.in_categories:
        column = source.labels.column(source.layout.in_categories[0])
        raise ValueError(f"divide expected data of numbers, got text in {column}: leave it out or make it context.")
    total = number_of_rows(source.data)
    sizes = _sizes(total, test, validation)
    rows = Rows(_numbers("data", source.data), None if source.context is None else _numbers("context", source.context))
    if source.context is not None:
        check_paired("divide", "data", source.data, "context", source.context)
    generator = torch.Generator().manual_seed(seed)
    distinct, _ = copies_of(rows)
    if distinct < total:
        others, testing, *_ = rows.split(test, generator)
        train, validating, *_ = others.split(validation, generator)
    else:
        shuffle = torch.randperm(total, generator=generator)
        train, validating, testing = (rows.take(index) for index in shuffle.split(sizes))
    return Dataset(
        name,
        *(train.data, validating.data, testing.data),
        *(train.context, validating.context, testing.context),
        layout=source.layout,
        context_layout=source.context_layout,
    )


def _sizes(total: int, test: float, validation: float) -> list[int]:
    """Return the numbers of rows for training, validation and testing."""
    for_test = round(test * total)
    for_validation = round(validation * (total - for_test))
    sizes = [total - for_test - for_validation, for_validation, for_test]
    if sizes[0] < LEAST_ROWS or min(sizes[1:]) < 2:
        raise ValueError(
            f"divide expected at least {LEAST_ROWS} rows to train with and 2 each to validate and test with, "
            f"got {total} rows, which make {sizes[0]}, {sizes[1]} and {sizes[2]}."
        )
    return sizes


def _numbers(name: str, table: TableLike) -> Tensor:
    rows = numbers("divide", name, table)
    is_single = str(getattr(table, "dtype", "")).endswith("float32")
    return (rows if is_single else rows.double()).reshape(len(rows), -1)
