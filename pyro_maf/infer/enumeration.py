"""Log densities of traces whose discrete sites are enumerated in parallel, summed over these."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from pyro.poutine import Trace
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_maf.infer.minibatches import PartialRowsError, frames_of, joined, subsampled

__all__ = ["is_enumerated", "log_densities", "without_blocks"]

Weigh = Callable[[Iterable[Any]], Tensor | float]
"""The weight of a site in plates."""


def is_enumerated(site: Mapping[str, Any]) -> bool:
    """True if a latent site is to be enumerated in parallel, as by `TraceEnum_ELBO`."""
    infer = site["infer"] or {}
    return infer.get("enumerate") == "parallel" and not infer.get("num_samples") and site["fn"].has_enumerate_support


def log_densities(trace: Trace, weigh: Weigh = lambda frames: 1.0) -> list[Tensor]:
    r"""Return log-densities in nats that sum to that of a trace, in the shapes of plates, discrete sites summed out.

    There is one for each site, and one for each set of sites that depend on the same enumerated ones: the logarithm of
    the sum, over all their values, of the product of densities, by tensor variable elimination.

    Args:
        trace: A trace whose log-probabilities are computed, of a run under `pyro.poutine.enum` or without it.
        weigh: Weights by the plates around a site, in addition to Pyro's scales.

    Raises:
        ValueError: If sites that depend on the same discrete ones are scaled differently.
        NotImplementedError: If a discrete site depends on two independent plates.

    Reference:
        Obermeyer et al., *Tensor variable elimination for plated factor graphs*, 2019.
    """
    sites: list[Any] = [
        site for site in trace.nodes.values() if site["type"] == "sample" and not site_is_subsample(site)
    ]
    if not any("_enumerate_dim" in site["infer"] for site in sites):
        return [site["log_prob"] * weigh(site["cond_indep_stack"]) for site in sites]
    trace.pack_tensors()
    summed = set(trace.symbol_to_dim) - set(trace.plate_to_symbol.values())
    coupled: dict[frozenset[str], list[Any]] = {}
    found = []
    for site in sites:
        if dims := summed.intersection(site["packed"]["log_prob"]._pyro_dims):
            coupled.setdefault(frozenset(dims), []).append(site)
        else:
            found.append(site["log_prob"] * weigh(site["cond_indep_stack"]))
    for component in joined(coupled):
        together = [site for dims, group in coupled.items() if dims <= component for site in group]
        found += _contracted(trace, together, set(component), weigh)
    return found


def _contracted(trace: Trace, sites: list[Any], summed: set[str], weigh: Weigh) -> list[Tensor]:
    """Sum enumerated discrete sites out of the log-densities of all sites that depend on them."""
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for site in sites:
        factors.setdefault(_plates_of(trace, site), []).append(_factor(site))
    scale = _common_scale(sites)
    frames = {trace.plate_to_symbol[frame.name]: frame for site in sites for frame in frames_of(site)}
    return [
        packed.unpack(term, trace.symbol_to_dim) * scale * weigh(frames[symbol] for symbol in plates)
        for plates, terms in contract_tensor_tree(factors, summed).items()
        for term in terms
    ]


def _plates_of(trace: Trace, site: Any) -> frozenset[str]:
    return frozenset(trace.plate_to_symbol[frame.name] for frame in frames_of(site))


def _factor(site: Any) -> Tensor:
    """Return a site's log-factor. A mask removes elements, but a masked discrete site still sums to one."""
    log_prob = site["packed"]["unscaled_log_prob"]
    if "_enumerate_dim" in site["infer"]:
        return log_prob
    return packed.scale_and_mask(log_prob, mask=site["packed"]["mask"])


def _common_scale(sites: list[Any]) -> float:
    """Return the common scale of sites that are summed out together; it multiplies the logarithm of the sum."""
    scales = {}
    for site in sites:
        if isinstance(site["scale"], Tensor) and site["scale"].numel() != 1:
            raise ValueError(f"Enumeration expected a number as scale of site {site['name']}, got a tensor.")
        if any(not frame.vectorized for frame in subsampled(site)):
            raise PartialRowsError(f"site {site['name']} is summed over within a sequential plate that subsamples")
        scales[float(site["scale"])] = site["name"]
    if len(scales) > 1:
        found = ", ".join(f"{scale:g} at {name}" for scale, name in scales.items())
        raise ValueError(f"Enumeration expected one scale for all sites that depend on a discrete one, got {found}.")
    return next(iter(scales), 1.0)


def without_blocks(model: Callable[..., Any]) -> Callable[..., Any]:
    """Unwrap handlers that hide sites: for `poutine.block(model, hide=["z"])` return `model`."""
    layers = []
    while isinstance(model, partial):
        inner = model.func if isinstance(model.func, partial) else model
        if len(inner.args) < 2 or not isinstance(inner.args[0], Messenger):
            break
        layers.append(inner.args[0])
        model = inner.args[1]
    for layer in reversed(layers):
        if not isinstance(layer, BlockMessenger):
            model = layer(model)
    return model
