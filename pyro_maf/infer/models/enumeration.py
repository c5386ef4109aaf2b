"""Log-densities of the sites of a trace, with discrete sites summed out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from torch import Tensor

from pyro_maf.infer.models.model import Frame, Site, Trace, is_subsample, sample_sites
from pyro_maf.infer.models.plates import PartialRowsError, frames_of, joined, subsampled

__all__ = ["is_enumerated", "log_densities", "total_by_draw"]

Weigh = Callable[[Iterable[Frame]], Tensor | float]
"""The weight of a site in plates."""


def total_by_draw(parts: Sequence[Tensor], plates: tuple[int, ...]) -> Tensor:
    """Sum log-densities over all plates but the first, to shape (plates[0],)."""
    parts = [part.reshape(part.shape[max(0, part.dim() - len(plates)) :]) for part in parts]
    parts = [part.expand(torch.broadcast_shapes(part.shape, plates)) for part in parts]
    return torch.stack([part.reshape(plates[0], -1).sum(1) for part in parts]).sum(0)


def is_enumerated(site: Site) -> bool:
    """Return whether a latent site is to be enumerated in parallel, as by `TraceEnum_ELBO`."""
    infer = site["infer"] or {}
    return infer.get("enumerate") == "parallel" and not infer.get("num_samples") and site["fn"].has_enumerate_support


def log_densities(trace: Trace, weigh: Weigh = lambda frames: 1.0) -> list[Tensor]:
    r"""Return log-densities in nats that sum to the trace's, in the shapes of plates, with discrete sites summed out.

    There is one for each site, and one for each set of sites that depend on the same enumerated sites: the logarithm of
    the sum, over all values of these, of the product of densities, by tensor variable elimination.

    Args:
        trace: A trace with log-probabilities, of a run with or without `pyro.poutine.enum`.
        weigh: Weights by the plates around a site, in addition to Pyro's scales.

    Raises:
        ValueError: If sites that depend on the same discrete ones are scaled differently.
        NotImplementedError: If a discrete site depends on two independent plates.

    Reference:
        Obermeyer et al., *Tensor variable elimination for plated factor graphs*, 2019.
    """
    sites = [site for site in sample_sites(trace).values() if not is_subsample(site)]
    if not any(map(_is_summed_out, sites)):
        return [site["log_prob"] * weigh(site["cond_indep_stack"]) for site in sites]
    trace.pack_tensors()
    summed = set(trace.symbol_to_dim) - set(trace.plate_to_symbol.values())
    coupled: dict[frozenset[str], list[Site]] = {}
    terms = []
    for site in sites:
        if dims := summed.intersection(vars(site["packed"]["log_prob"])["_pyro_dims"]):
            coupled.setdefault(frozenset(dims), []).append(site)
        else:
            terms.append(site["log_prob"] * weigh(site["cond_indep_stack"]))
    for component in joined(coupled):
        together = [site for dims, group in coupled.items() if dims <= component for site in group]
        terms += _contracted(trace, together, set(component), weigh)
    return terms


def _is_summed_out(site: Site) -> bool:
    """Return whether a site is enumerated in its trace."""
    return "_enumerate_dim" in (site["infer"] or {})


def _contracted(trace: Trace, sites: list[Site], summed: set[str], weigh: Weigh) -> list[Tensor]:
    """Sum enumerated discrete sites out of the log-densities of all sites that depend on them."""
    factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for site in sites:
        plates = frozenset(trace.plate_to_symbol[frame.name] for frame in frames_of(site))
        factors.setdefault(plates, []).append(_factor(site))
    scale = _common_scale(sites)
    frames = {trace.plate_to_symbol[frame.name]: frame for site in sites for frame in frames_of(site)}
    return [
        packed.unpack(term, trace.symbol_to_dim) * scale * weigh(frames[symbol] for symbol in plates)
        for plates, terms in contract_tensor_tree(factors, summed).items()
        for term in terms
    ]


def _factor(site: Site) -> Tensor:
    """Return a site's log-factor. A mask removes elements, but a masked discrete site still sums to one."""
    log_prob = site["packed"]["unscaled_log_prob"]
    if _is_summed_out(site):
        return log_prob
    return packed.scale_and_mask(log_prob, mask=site["packed"]["mask"])


def _common_scale(sites: list[Site]) -> float:
    """Return the common scale of sites that are summed out together; it multiplies the logarithm of the sum."""
    scales = {}
    for site in sites:
        if isinstance(site["scale"], Tensor) and site["scale"].numel() != 1:
            raise ValueError(f"Enumeration expected a number as scale of site {site['name']}, got a tensor.")
        if any(not frame.vectorized for frame in subsampled(site)):
            raise PartialRowsError(f"site {site['name']} is summed over within a sequential plate that subsamples")
        scales[float(site["scale"])] = site["name"]
    if len(scales) > 1:
        got = ", ".join(f"{scale:g} at {name}" for scale, name in scales.items())
        raise ValueError(f"Enumeration expected one scale for all sites that depend on a discrete one, got {got}.")
    return next(iter(scales), 1.0)
