"""Densities of scikit-learn that are no flows: a mixture of Gaussians chosen by BIC, a kernel density by validation."""

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
    """Fit to standardised rows without a context."""
    return _DENSITIES[who](data)


def _mixture(data: Dataset) -> Scores:
    """Full covariances; the first number of components after which BIC is higher ends the search."""
    from sklearn.mixture import GaussianMixture

    rows, dim = data.train.double().numpy(), data.input_dim
    each = 1 + dim + dim * (dim + 1) // 2
    best, lowest = None, np.inf
    for components in COMPONENTS:
        if components > 1 and each * components > len(rows) * dim / 2:  # as many parameters as half of the numbers
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of not having converged
            mixture = GaussianMixture(components, random_state=0, reg_covar=1e-6).fit(rows)
        if (bic := mixture.bic(rows)) >= lowest:
            break
        best, lowest = mixture, bic
    test, validation = (torch.from_numpy(best.score_samples(part.double())) for part in (data.test, data.validation))
    return Scores(test, validation, 0, best.n_components * each - 1)


def _kernels(data: Dataset) -> Scores:
    """A Gaussian kernel at each row, of the width that some validation rows are likeliest under."""
    some = _kernel_density(data.validation[:CHOOSING], data.train, BANDWIDTHS)
    width = BANDWIDTHS[[int(some.mean(1).argmax())]]
    test, validation = (_kernel_density(part, data.train, width)[0] for part in (data.test, data.validation))
    return Scores(test, validation, 0, 1)


def _kernel_density(rows: Tensor, centres: Tensor, widths: np.ndarray) -> Tensor:
    """Log-density of rows, (widths, rows)."""
    found = []
    for part in rows.split(CHUNK):
        squared = torch.cdist(part, centres).square()
        found.append(torch.stack([(squared / (-2 * width**2)).logsumexp(1) for width in widths]).double())
    constants = np.log(len(centres)) + rows.shape[1] / 2 * np.log(2 * np.pi * widths**2)
    return torch.cat(found, 1) - torch.from_numpy(constants)[:, None]


_DENSITIES: dict[str, Callable[[Dataset], Scores]] = {"mixture of Gaussians": _mixture, "kernel density": _kernels}
DENSITIES = tuple(_DENSITIES)
"""Their names."""
