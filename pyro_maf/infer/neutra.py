"""A model in the coordinates of a guide's noise, where NUTS walks easily."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor

from pyro_maf.infer.guides import AutoFlow

__all__ = ["NeuTra", "neutra"]


class NeuTra:
    """A model whose latent variables are made of a guide's noise: call it as the model. Made by `neutra`.

    Args:
        model: A Pyro model.
        guide: Its guide, set up and fitted.
    """

    def __init__(self, model: Callable[..., Any], guide: AutoFlow) -> None:
        self._guide = guide
        self._reparam = NeuTraReparam(guide)
        self._model = self._reparam.reparam(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, its latent variables made of noise."""
        return self._model(*args, **kwargs)

    @torch.no_grad()
    def draws(self, samples: dict[str, Tensor]) -> dict[str, Tensor]:
        r"""Draws of the model's own sites, (\*draws, \*site), of samples as `MCMC.get_samples` returns them."""
        (noise,) = (value for name, value in samples.items() if name.endswith("_shared_latent"))
        return self._guide.sites_of(noise)


def neutra(model: Callable[..., Any], guide: AutoFlow) -> NeuTra:
    r"""A model in the coordinates of a guide's noise, for NUTS: z = t(u), and the target is p(x, t(u)) |det dt/du|.

    The better the guide, the nearer the density of u is to a standard normal, whatever the posterior's shape; and as
    MCMC it is exact with any guide.

    Args:
        model: A Pyro model.
        guide: Its guide, from this module, fitted and without an encoder. Its weights are held fixed from now on:
            `guide.requires_grad_(True)` would let them train again.

    Returns:
        A `NeuTra`: run NUTS on it, and let its `draws` turn the samples into those of the model's sites.

    Cost: beside the model's own density and gradient, those of the guide's map: one pass a layer for an `AutoIAF`.

    Raises:
        TypeError: For a guide from elsewhere.
        ValueError: For a guide that is not set up, or one with an encoder.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import MCMC, NUTS
        >>> from pyro_maf.infer import AutoIAF
        >>> def model():
        ...     pyro.sample("z", dist.Gamma(2.0, 1.0))
        >>> warped = neutra(model, AutoIAF(model, num_layers=1).setup())
        >>> mcmc = MCMC(NUTS(warped), num_samples=20, warmup_steps=20, disable_progbar=True)
        >>> mcmc.run()
        >>> warped.draws(mcmc.get_samples())["z"].shape
        torch.Size([20])

    Reference:
        Hoffman et al., *NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural Transport*, 2019.
    """
    if not isinstance(guide, AutoFlow):
        raise TypeError(f"neutra expected a guide of pyro_maf.infer, got {type(guide).__name__}.")
    if guide.prototype_trace is None:
        raise ValueError("neutra expected a guide that is set up and fitted: call fit_guide first.")
    if guide.encoder is not None:
        raise ValueError("neutra expected a guide without an encoder.")
    guide.requires_grad_(False)
    return NeuTra(model, guide)
