"""The paper's models by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from pyro_maf._core.checks import check_choice, check_positive
from pyro_maf._core.options import signature_of
from pyro_maf._core.torch_state import seeded
from pyro_maf.distributions import ConditionalMADEMoG, ConditionalMAFMoG, MADEMoG, MAFMoG
from pyro_maf.experiments.gaussian import gaussian
from pyro_maf.flows import IAF, MAF, NSF, ConditionalIAF, ConditionalMAF, ConditionalNSF, ConditionalRealNVP, RealNVP
from pyro_maf.training.preparation import Model

__all__ = ["FLOWS", "build"]

CLASSES: dict[str, tuple[type, type]] = {
    "maf": (MAF, ConditionalMAF),
    "nsf": (NSF, ConditionalNSF),
    "iaf": (IAF, ConditionalIAF),
    "realnvp": (RealNVP, ConditionalRealNVP),
    "made": (MAF, ConditionalMAF),
    "made-mog": (MADEMoG, ConditionalMADEMoG),
    "maf-mog": (MAFMoG, ConditionalMAFMoG),
}
"""The classes by name, without and with a context."""

FLOWS = (*CLASSES, "gaussian")
"""The names that `build` accepts."""

STACKS = ("maf", "nsf", "iaf", "realnvp", "maf-mog")
"""The flows with several layers, and optional batch norm between them."""


def build(
    flow: str,
    input_dim: int,
    *,
    context_dim: int = 0,
    num_layers: int = 5,
    hidden_dims: Sequence[int] | None = None,
    activation: str = "relu",
    batch_norm: bool = False,
    degrees: str = "sequential",
    networks: str = "joint",
    seed: int = 0,
) -> Model:
    r"""Build one of the paper's models or a neural spline flow, "nsf", untrained, for `pyro_maf.fit`.

    "made" has Gaussian conditionals in the natural order: a MAF of one layer. "gaussian" is normal with a full
    covariance; with a context c the mean, and the log of each dimension's scale, are linear in c. Its closed form is
    `fit_gaussian`.

    Args:
        flow: "maf", "nsf", "iaf", "realnvp", "made", "made-mog", "maf-mog" or "gaussian".
        input_dim: D.
        context_dim: Number of context features, 0 for none; with one, the model is a conditional form.
        num_layers: Number of layers of "maf", "nsf", "iaf", "realnvp" and "maf-mog"; fixed for the others.
        hidden_dims: Widths of each network's hidden layers, by default two by `pyro_maf.nn.default_hidden_dims`.
        activation: A name from `pyro_maf.nn.ACTIVATIONS`.
        batch_norm: Put a `BatchNorm` after every layer of the flows with several layers.
        degrees: Degrees of the hidden units of masked networks, "sequential" or "random".
        networks: "joint" or "separate" networks for shift and scale of "realnvp".
        seed: Seed of the weights and of random degrees; the global random state is left unchanged.

    Raises:
        ValueError: For an unknown name, non-positive sizes, and as the model.

    Example:
        >>> type(build("maf", 3)).__name__, type(build("made-mog", 3, context_dim=2)).__name__
        ('MAF', 'ConditionalMADEMoG')
        >>> len(build("made", 3)), len(build("realnvp", 3, num_layers=10))
        (1, 10)

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017, section 4.
    """
    check_choice("build", "flow", flow, FLOWS)
    check_positive("build", "input_dim", input_dim)
    check_positive("build", "context_dim", context_dim, least=0)
    check_positive("build", "seed", seed, least=0)
    if flow == "gaussian":
        return gaussian(input_dim, context_dim)
    options = {
        "num_layers": num_layers,
        "hidden_dims": hidden_dims,
        "activation": activation,
        "batch_norm": batch_norm,
        "degrees": degrees,
        "networks": networks,
        "seed": seed,
    }
    if flow == "made":
        options |= {"num_layers": 1, "batch_norm": False}
    model_class = CLASSES[flow][bool(context_dim)]
    takes = signature_of(model_class).parameters
    with seeded(seed):
        return cast("Callable[..., Model]", model_class)(
            input_dim, context_dim=context_dim, **{name: value for name, value in options.items() if name in takes}
        )
