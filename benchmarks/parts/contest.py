"""Fits of our models and of peers to one data set, each stored once, and their comparison."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyro_maf
from parts import recipes, rivals, simple
from parts.peers.base import UnsupportedError
from parts.sets import standardised
from pyro_maf._core.files import write_whole
from pyro_maf.datasets import Dataset
from pyro_maf.distributions import TableDensity
from pyro_maf.experiments import Candidate, Estimate, compare, estimate

OURS = "pyro-maf"
BATCH, PATIENCE, SEED = 100, 30, 0
DEFAULT = Candidate("default", "default")
"""Each package's own recommendation: for ours `fit(rows)`, for peers a recipe; simple densities are compared too."""

SHARED = ("MADE MoG", "RealNVP (5)", "MAF (5)", "MAF MoG (5)", "NSF (5)")
"""Models that peers fit too if they have them, with the largest number of hidden layers that we try."""

PAIRS = (
    ("NSF (5)", "MAF (5)"),
    ("MAF MoG (5)", "RealNVP (5)"),
    ("MAF (5)", "RealNVP (5)"),
    ("MAF (10)", "RealNVP (10)"),
    ("RealNVP (5)", "MADE"),
    ("MADE", "Gaussian"),
)
"""Pairs of models of which the first is expected to be ahead."""


@dataclass(frozen=True)
class Plan:
    """Models to fit to a data set, and the settings of their training.

    Attributes:
        candidates: Our models, with every width.
        peers: Peers that fit the shared models.
        epochs: Maximum number of epochs.
        rate: Initial learning rate of Adam.
        folder: Folder that stores fits.
        blind: Folder that stores the fits without the context, for data with one.
        recipes: Peers that are fitted by their own recipe, for as many seconds as the default takes.
        seeds: Number of seeds for the default and the recipes.
        weight_decay: Weight decay of all but the default and the recipes; `fit` lowers it if the loss stops falling.
    """

    candidates: tuple[Candidate, ...]
    peers: tuple[str, ...]
    epochs: int
    rate: float
    folder: Path
    blind: Path | None = None
    recipes: tuple[str, ...] = ()
    seeds: int = 1
    weight_decay: float | None = None


@dataclass(frozen=True)
class Fit:
    """A fitted model: test log-likelihoods in nats by row, mean validation log-likelihood, and processor seconds."""

    who: str
    candidate: Candidate
    log_prob: Tensor
    validation: float
    epochs: int
    seconds: float
    parameters: int
    seed: int = SEED


def run(data: Dataset, plan: Plan) -> Iterator[dict[str, Any]]:
    """Fit one model after another; yield a summary of all fits so far after each."""
    fits: list[Fit] = []
    for who, candidate, seed in _entrants(data, plan):
        folder = plan.folder / (f"{who}-{candidate.slug}" + f"-{seed}" * (seed > 0))
        try:
            fit = _stored(folder, who, candidate, seed) or _fitted(data, plan, (who, candidate, seed), folder, fits)
        except UnsupportedError:
            continue
        fits.append(fit)
        yield summary(data, plan, fits)


def _entrants(data: Dataset, plan: Plan) -> Iterator[tuple[str, Candidate, int]]:
    """Package, model and seed of each fit."""
    if DEFAULT in plan.candidates:
        for seed in range(plan.seeds):
            yield OURS, DEFAULT, seed
            for who in simple.DENSITIES if seed == SEED and not data.context_dim else ():
                yield who, DEFAULT, seed
            for who in plan.recipes:
                yield who, DEFAULT, seed
    models = [candidate for candidate in plan.candidates if candidate != DEFAULT]
    deepest = max((len(candidate.hidden_dims or ()) for candidate in models), default=0)
    for candidate in models:
        is_shared = candidate.name in SHARED and len(candidate.hidden_dims or ()) == deepest
        for who in (OURS, *plan.peers) if is_shared else (OURS,):
            yield who, candidate, SEED


def _fitted(data: Dataset, plan: Plan, entrant: tuple[str, Candidate, int], folder: Path, fits: list[Fit]) -> Fit:
    who, candidate, seed = entrant
    if who == OURS:
        fit = _default(data, seed) if candidate == DEFAULT else _ours(data, plan, candidate)
    elif candidate == DEFAULT:
        (ours,) = (fit for fit in fits if (fit.who, fit.candidate, fit.seed) == (OURS, DEFAULT, seed))
        fit = _by_recipe(data, who, seed, ours.seconds)
    else:
        fit = _by_peer(data, plan, who, candidate)
    array = io.BytesIO()
    np.save(array, fit.log_prob.numpy(), allow_pickle=False)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "log_prob.npy", array.getvalue())
    figures = {name: getattr(fit, name) for name in ("validation", "epochs", "seconds", "parameters")}
    write_whole(folder / "fit.json", json.dumps(figures).encode())
    return fit


def _stored(folder: Path, who: str, candidate: Candidate, seed: int = SEED) -> Fit | None:
    if not (folder / "fit.json").is_file():
        return None
    figures = json.loads((folder / "fit.json").read_text(encoding="utf-8"))
    log_prob = torch.from_numpy(np.load(folder / "log_prob.npy", allow_pickle=False))
    return Fit(who, candidate, log_prob, **figures, seed=seed)


def _default(data: Dataset, seed: int) -> Fit:
    started = time.process_time()
    result = pyro_maf.fit(
        data.train,
        context=data.train_context,
        validation=(data.validation, data.validation_context),
        seed=seed,
        progress=False,
    )
    if isinstance(result.density.unwrapped, TableDensity):
        raise ValueError(f"{data.name} has discrete columns, whose probabilities cannot be compared with densities.")
    log_prob = result.score(data.test, data.test_context).double()
    seconds = time.process_time() - started
    parameters = sum(weight.numel() for weight in result.density.parameters())
    validation = result.validation_log_likelihood
    return Fit(OURS, DEFAULT, log_prob, validation, result.epochs, seconds, parameters, seed)


def _by_recipe(data: Dataset, who: str, seed: int, budget: float) -> Fit:
    standard, gain = standardised(data)
    started = time.process_time()
    if who in simple.DENSITIES:
        scores = simple.fit(who, standard)
    else:
        try:
            scores = recipes.fit(who, standard, budget, seed)
        except ImportError as error:
            raise UnsupportedError(str(error)) from None
    seconds = time.process_time() - started
    validation = scores.validation.mean().item() - gain
    return Fit(who, DEFAULT, scores.test - gain, validation, scores.epochs, seconds, scores.parameters, seed)


def _ours(data: Dataset, plan: Plan, candidate: Candidate) -> Fit:
    started = time.process_time()
    comparison = compare(
        data,
        [candidate],
        folder=plan.folder / "densities",
        batch_size=BATCH,
        max_epochs=plan.epochs,
        patience=PATIENCE,
        learning_rate=plan.rate,
        weight_decay=plan.weight_decay,
        seed=SEED,
    )
    if comparison.missing:
        raise KeyboardInterrupt
    if comparison.failed:
        raise UnsupportedError(comparison.failed[candidate.name])
    (score,) = comparison.tried
    seconds = time.process_time() - started
    return Fit(OURS, candidate, score.log_prob, score.validation, score.epochs, seconds, score.parameters)


def _by_peer(data: Dataset, plan: Plan, who: str, candidate: Candidate) -> Fit:
    started = time.process_time()
    standard, gain = standardised(data)
    torch.manual_seed(SEED)
    module = rivals.RIVALS[who](candidate, data.input_dim, data.context_dim)
    epochs = rivals.train(
        module,
        standard,
        epochs=plan.epochs,
        patience=PATIENCE,
        batch=BATCH,
        rate=plan.rate,
        seed=SEED,
        weight_decay=plan.weight_decay or 0.0,
    )
    log_prob = rivals.scores(module, standard.test, standard.test_context) - gain
    validation = rivals.scores(module, standard.validation, standard.validation_context).mean().item() - gain
    parameters = sum(weight.numel() for weight in module.parameters())
    return Fit(who, candidate, log_prob, validation, epochs, time.process_time() - started, parameters)


def summary(data: Dataset, plan: Plan, fits: list[Fit]) -> dict[str, Any]:
    """Results of the fits, ready for JSON."""
    best: dict[str, Fit] = {}
    averaged = list(_over_seeds(fits))
    for fit in averaged:
        name = fit.candidate.name
        if fit.who == OURS and (name not in best or fit.validation > best[name].validation):
            best[name] = fit
    section = {
        "date": date.today().isoformat(),
        "input_dim": data.input_dim,
        "context_dim": data.context_dim,
        "rows": [len(data.train), len(data.validation), len(data.test)],
        "epochs": plan.epochs,
        "learning_rate": plan.rate,
        "weight_decay": plan.weight_decay,
        "models": [_line(data, fit) for fit in best.values()],
        "tried": [_line(data, fit) for fit in fits],
        "against_peers": list(_against(averaged)),
        "order": [
            {"first": one, "second": other, **_difference(best[one], best[other])}
            for one, other in PAIRS
            if one in best and other in best
        ],
    }
    if plan.blind is not None:
        section["given_context"] = list(_gains(best.values(), plan.blind))
    return section


def _line(data: Dataset, fit: Fit) -> dict[str, Any]:
    line = {"who": fit.who, "model": fit.candidate.name, "hidden": fit.candidate.widths}
    line |= asdict(estimate(fit.log_prob))
    if data.pixels is not None:
        bits: Estimate = estimate(data.pixels.bits_per_pixel(fit.log_prob, data.test.double()))
        line |= {"bits": bits.mean, "bits_error": bits.error}
    rest = ("validation", "epochs", "seconds", "parameters", "seed")
    return line | {name: getattr(fit, name) for name in rest}


def _over_seeds(fits: list[Fit]) -> Iterator[Fit]:
    """One fit for each package and model, with the mean over seeds of each row's log-likelihood."""
    for who, candidate in dict.fromkeys((fit.who, fit.candidate) for fit in fits):
        seeds = [fit for fit in fits if (fit.who, fit.candidate) == (who, candidate)]
        means = {name: float(np.mean([getattr(fit, name) for fit in seeds])) for name in ("validation", "seconds")}
        yield replace(seeds[0], log_prob=torch.stack([fit.log_prob for fit in seeds]).mean(0), **means)


def _against(fits: list[Fit]) -> Iterator[dict[str, Any]]:
    """Comparison of each of our fits with the peers' fits of the same model and widths."""
    for ours in fits:
        others = {fit.who: fit for fit in fits if fit.candidate == ours.candidate and fit.who != OURS}
        if ours.who != OURS or not others:
            continue
        # A fit that diverged has a mean of NaN.
        best = max(others.values(), key=lambda fit: fit.log_prob.nan_to_num(nan=-torch.inf).mean().item())
        yield {
            "model": ours.candidate.name,
            "hidden": ours.candidate.widths,
            "test": {fit.who: asdict(estimate(fit.log_prob)) for fit in (ours, *others.values())},
            "seconds": {fit.who: fit.seconds for fit in (ours, *others.values())},
            "ahead": {who: _difference(ours, fit) for who, fit in others.items()},
            "best_peer": best.who,
            **_difference(ours, best),
        }


def _gains(fits: Iterable[Fit], blind: Path) -> Iterator[dict[str, Any]]:
    """Gain in test log-likelihood of each of our models from the context, at the same widths."""
    for fit in fits:
        without = _stored(blind / f"{OURS}-{fit.candidate.slug}", OURS, fit.candidate)
        if without is not None:
            yield {"model": fit.candidate.name, "hidden": fit.candidate.widths, **_difference(fit, without)}


def _difference(one: Fit, other: Fit) -> dict[str, float]:
    difference = estimate(one.log_prob - other.log_prob)
    return {"difference": difference.mean, "difference_error": difference.error}
