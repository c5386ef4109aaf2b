"""Draws of a guide with their importance weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_maf.infer.log_joint import LogJoint, latent_sites, nesting_of, total_by_draw

__all__ = ["Weighted", "arviz", "smoothed", "weigh"]

MOST_NUMBERS = 4_000_000
"""How many log-probabilities of single sites and rows are held at a time."""


class Weighted(NamedTuple):
    r"""Draws z of a guide q with log weights log p(x, z) - log q(z), in nats.

    Attributes:
        values: The value of each latent site, (draws, \*site).
        log_weights: (draws,); minus infinity where the model could not score a draw.
    """

    values: dict[str, Tensor]
    log_weights: Tensor


@torch.no_grad()
def weigh(
    who: str,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_samples: int,
) -> Weighted:
    """Draw from a guide and weigh the draws.

    Raises:
        ValueError: If the guide leaves out a latent site of the model.
    """
    pair = _Pair(who, model, guide, args, kwargs)
    chunk = max(1, min(num_samples, MOST_NUMBERS // pair.size))
    found = [pair.weigh(min(chunk, num_samples - start)) for start in range(0, num_samples, chunk)]
    return Weighted(
        {name: torch.cat([each.values[name] for each in found]) for name in pair.shapes},
        torch.cat([each.log_weights for each in found]),
    )


@torch.no_grad()
def nesting_of_batches(
    who: str, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> int | None:
    """How many plates model and guide have where one run, inside a plate, scores many draws; None where it does not."""
    pair = _Pair(who, model, guide, args, kwargs)
    return pair.nesting if pair.joint.is_vectorised else None


class _Pair:
    """A model and its guide."""

    def __init__(
        self,
        who: str,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        self._guide, self._args, self._kwargs = guide, args, kwargs
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        example = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        self.shapes = {name: site["value"].shape for name, site in latent_sites(example).items()}
        if missing := sorted(self.shapes.keys() - guide_trace.nodes.keys()):
            raise ValueError(
                f"{who} expected a guide of every latent site, got none of {', '.join(missing)}: "
                "sum these out of the model."
            )
        sites = [site for site in example.nodes.values() if site["type"] == "sample"]
        self.size = sum(site["value"].numel() for site in sites if isinstance(site["value"], Tensor))
        self.joint = LogJoint(model, example, args, kwargs)
        self.nesting = max(self.joint.nesting, nesting_of(guide_trace))
        self.joint.settle(self._draw(4)[0])

    def weigh(self, draws: int) -> Weighted:
        values, log_q = self._draw(draws)
        shaped = {name: value.reshape(draws, *self.shapes[name]) for name, value in values.items()}
        return Weighted(shaped, self.joint(values) - log_q)

    def _draw(self, draws: int) -> tuple[dict[str, Tensor], Tensor]:
        """Values of the latent sites, padded to as many plates as there are, and their log-density."""
        with pyro.plate("_draws", draws, dim=-self.nesting - 1):
            trace = poutine.trace(self._guide).get_trace(*self._args, **self._kwargs)
        trace.compute_log_prob()
        plates = (draws, *(1,) * self.nesting)
        values = {}
        for name in self.shapes:
            site: Any = trace.nodes[name]
            value, event = site["value"], site["fn"].event_shape
            batch = torch.broadcast_shapes(value.shape[: value.dim() - len(event)], plates)
            values[name] = value.expand(batch + event)
        return values, total_by_draw(trace, plates)


def smoothed(log_weights: Tensor) -> tuple[Tensor, float]:
    """Normalised log weights, Pareto-smoothed, and k-hat, the shape of their tail.

    Reference:
        Vehtari et al., *Pareto smoothed importance sampling*, 2024.
    """
    scored = log_weights.isfinite()
    if int(scored.sum()) < 10:
        return log_weights.new_full(log_weights.shape, -torch.inf), float("inf")
    weights = log_weights[scored].double().cpu().numpy()
    if np.ptp(weights) < 1e-10:  # the guide is the posterior
        return torch.where(scored, -scored.sum().log(), -torch.inf), float("-inf")
    with np.errstate(over="ignore"):  # arviz lets candidates for the tail's shape that are out of the question overflow
        found, k_hat = arviz().psislw(weights)
    result = torch.full(log_weights.shape, -torch.inf, dtype=torch.float64)
    result[scored.cpu()] = torch.as_tensor(np.asarray(found))
    return result.to(log_weights.device), float(k_hat)


def arviz() -> Any:
    """The package, imported late; it announces itself, and two processes that import it at once can collide."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            for _ in range(2):
                with suppress(FileNotFoundError):
                    return import_module("arviz")
            return import_module("arviz")
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "Diagnosing a guide needs arviz, which is not installed: pip install pyro-maf[train].", name="arviz"
            ) from None
