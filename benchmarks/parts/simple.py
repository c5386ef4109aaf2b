"""Simple densities: a mixture of Gaussians chosen by BIC, and a kernel density with its bandwidth by validation."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from parts.recipes import Scores
from pyro_maf.datasets import Dataset

COMPONENTS = (1, 2, 3, 5, 8, 12, 20, 30, 50)
BANDWIDTHS = np.geomspace(0.02, 1.5, 18)
CHUNK, CHOOSING = 256, 1000


def fit(who: str, data: Dataset) -> Scores:
    """Fit the named density to standardised rows without a context."""
    return _DENSITIES[who](data)


def _mixture(data: Dataset) -> Scores:
    """Mixture with full covariances; the number of components is increased until BIC stops falling."""
    from sklearn.mixture import GaussianMixture

    rows, dim = data.train.double().numpy(), data.input_dim
    each = 1 + dim + dim * (dim + 1) // 2
    best, lowest = None, np.inf
    for components in COMPONENTS:
        if components > 1 and each * components > len(rows) * dim / 2:  # half as many parameters as entries
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ConvergenceWarning
            mixture = GaussianMixture(components, random_state=0, reg_covar=1e-6).fit(rows)
        if (bic := mixture.bic(rows)) >= lowest:
            break
        best, lowest = mixture, bic
    test, validation = (torch.from_numpy(best.score_samples(part.double())) for part in (data.test, data.validation))
    return Scores(test, validation, 0, best.n_components * each - 1)


def _kernels(data: Dataset) -> Scores:
    """A Gaussian kernel at each row, whose bandwidth maximises the likelihood of some validation rows."""
    some = _kernel_density(data.validation[:CHOOSING], data.train, BANDWIDTHS)
    width = BANDWIDTHS[[int(some.mean(1).argmax())]]
    test, validation = (_kernel_density(part, data.train, width)[0] for part in (data.test, data.validation))
    return Scores(test, validation, 0, 1)


def _kernel_density(rows: Tensor, centres: Tensor, widths: np.ndarray) -> Tensor:
    """Log-density of rows, (widths, rows)."""
    sums = []
    for part in rows.split(CHUNK):
        squared = torch.cdist(part, centres).square()
        sums.append(torch.stack([(squared / (-2 * width**2)).logsumexp(1) for width in widths]).double())
    constants = np.log(len(centres)) + rows.shape[1] / 2 * np.log(2 * np.pi * widths**2)
    return torch.cat(sums, 1) - torch.from_numpy(constants)[:, None]


_DENSITIES: dict[str, Callable[[Dataset], Scores]] = {"mixture of Gaussians": _mixture, "kernel density": _kernels}
DENSITIES = tuple(_DENSITIES)
"""Names of the densities."""
