"""The paper's models by name, including the Gaussian, and the candidates of a comparison."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import cast

import torch
from torch import Tensor

from pyro_maf import distributions, flows
from pyro_maf._core.checks import check_choice, check_positive, check_seed
from pyro_maf._core.options import signature_of
from pyro_maf._core.torch_state import seeded
from pyro_maf.distributions import ConditionalFlowPrior, FlowPrior
from pyro_maf.tables.moments import plain_moments_of
from pyro_maf.training.preparation import Model
from pyro_maf.transforms import ConditionalFlow, Coupling, Flow, LowerTriangularAffine, Stack

__all__ = [
    "BATCH_SIZE",
    "FLOWS",
    "PATIENCE",
    "PUBLISHED",
    "ROWS",
    "SETTINGS",
    "Candidate",
    "Settings",
    "build",
    "candidates",
    "fit_gaussian",
    "gaussian",
]

CLASSES: dict[str, tuple[type, type]] = {
    "maf": (flows.MAF, flows.ConditionalMAF),
    "nsf": (flows.NSF, flows.ConditionalNSF),
    "iaf": (flows.IAF, flows.ConditionalIAF),
    "realnvp": (flows.RealNVP, flows.ConditionalRealNVP),
    "made": (flows.MAF, flows.ConditionalMAF),
    "made-mog": (distributions.MADEMoG, distributions.ConditionalMADEMoG),
    "maf-mog": (distributions.MAFMoG, distributions.ConditionalMAFMoG),
}
"""Classes by name, without and with a context."""

FLOWS = (*CLASSES, "gaussian")
"""The names that `build` accepts."""

STACKS = ("maf", "nsf", "iaf", "realnvp", "maf-mog")
"""Flows with several layers and optional batch norm between them."""


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

    "made" has Gaussian conditionals in the natural order: a single-layer MAF. "gaussian" has a full covariance; with a
    context c the mean, and the log of each dimension's scale, are linear in c. `fit_gaussian` is its closed-form fit.

    Args:
        flow: "maf", "nsf", "iaf", "realnvp", "made", "made-mog", "maf-mog" or "gaussian".
        input_dim: D.
        context_dim: Number of context features, 0 for none; with a context, the model is a conditional form.
        num_layers: Number of layers of "maf", "nsf", "iaf", "realnvp" and "maf-mog"; fixed for the others.
        hidden_dims, activation, batch_norm, degrees: As in `MAF`, for the models that have them.
        networks: "joint" or "separate" networks for shift and scale of "realnvp".
        seed: Seed of the weights and of random degrees; the global random state is left unchanged.

    Raises:
        ValueError: For an unknown name or non-positive sizes, and as the model.

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
    check_seed("build", seed)
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


ROUNDING = 1e-6
"""A column whose residual deviation given the others is below this fraction of its deviation counts as collinear:
in float32 that much is rounding."""


def gaussian(
    input_dim: int, context_dim: int = 0, factor: Tensor | None = None, weight: Tensor | None = None
) -> Flow | ConditionalFlow:
    """Build a flow with density N(A c, L L^T), whose log-scales can be trained to be linear in the context c, too.

    Args:
        input_dim: D.
        context_dim: C, 0 for no context, in which case the mean is 0.
        factor: L, (D, D), by default the identity.
        weight: A, (D, C), by default 0.
    """
    layer = LowerTriangularAffine(input_dim, scale_tril=factor)
    return ConditionalFlow(Stack([layer, _linear_in(context_dim, input_dim, weight)])) if context_dim else layer


def _linear_in(context_dim: int, input_dim: int, weight: Tensor | None) -> Flow:
    """Layer y_i = exp((B c + b)_i) x_i + (A c + a)_i of a context c, with A = `weight`; a, B and b start at 0."""
    # If no dimension passes through, the network of a coupling sees only the context; without hidden layers it is
    # linear. Its outputs are the D shifts, then the D log-scales.
    layer = Coupling(input_dim, mask=[False] * input_dim, hidden_dims=[], context_dim=context_dim)
    if weight is not None:
        coefficients = layer.to(weight.dtype).get_parameter("networks.0.context_layers.0.weight")
        with torch.no_grad():
            coefficients[:input_dim] = weight
    return layer


def fit_gaussian(data: Tensor, context: Tensor | None = None) -> FlowPrior | ConditionalFlowPrior:
    r"""Fit N(y; m, S) or, with a context, N(y; m + A c, S): the maximum-likelihood solution in closed form.

    m and S are the mean and covariance of the rows, or of the residuals of the least-squares regression of y on c. With
    a one-hot context, that is one mean per class and a common covariance.

    Args:
        data: Rows (N, D) of finite numbers, on the CPU.
        context: Rows (N, C), or None.

    Returns:
        The density in the data's units and dtype, in eval mode.

    Cost: products over the rows and a Cholesky factor, in float64: O(N (D + C)^2 + D^3).

    Raises:
        ValueError: For rows with a singular covariance: too few of them, or a column that the others determine.

    Example:
        >>> data = 3 + 2 * torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> density = fit_gaussian(data)
        >>> round(density.log_prob(data).mean().item(), 1)  # -log(2 pi e) - 2 log 2
        -4.2
    """
    loc, scale, standard = _standardised(data)
    if context is None:
        layer = LowerTriangularAffine(data.shape[1], scale_tril=_factor(standard, data.dtype))
        return FlowPrior(layer, loc=loc, scale=scale).eval()
    context_loc, context_scale, predictors = _standardised(context)
    # The columns of a one-hot context are dependent: the pseudo-inverse gives the minimum-norm solution.
    weight = torch.linalg.pinv(predictors) @ standard
    factor = _factor(standard - predictors @ weight, data.dtype)
    model = gaussian(data.shape[1], context.shape[1], factor, weight.T.to(data.dtype))
    return ConditionalFlowPrior(
        model, loc=loc, scale=scale, context_loc=context_loc, context_scale=context_scale
    ).eval()


def _standardised(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and maximum-likelihood standard deviation of the columns, and the rows in these units."""
    loc, scale = plain_moments_of(table)
    return loc, scale, (table.double() - loc) / scale


def _factor(centred: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the Cholesky factor of the covariance of rows whose mean is 0."""
    factor = torch.linalg.cholesky_ex(centred.T @ centred / len(centred)).L
    # Beyond the first non-positive pivot, the factor holds the original matrix or NaN.
    collinear = ~(factor.diagonal() > ROUNDING)
    if collinear.any():
        raise ValueError(
            f"fit_gaussian expected rows with a covariance of full rank, got {len(centred)} rows in which column "
            f"{int(collinear.int().argmax())} follows from those before it: drop that column or add rows."
        )
    return factor.to(dtype)


ROWS: dict[str, tuple[str, int]] = {
    "Gaussian": ("gaussian", 1),
    "MADE": ("made", 1),
    "MADE MoG": ("made-mog", 1),
    "RealNVP (5)": ("realnvp", 5),
    "RealNVP (10)": ("realnvp", 10),
    "MAF (5)": ("maf", 5),
    "MAF (10)": ("maf", 10),
    "MAF MoG (5)": ("maf-mog", 5),
    "NSF (5)": ("nsf", 5),
}
"""The rows of the paper's table, followed by a spline flow: the flow of each, and its number of layers."""

SPELLINGS = {
    re.sub(r"[^a-z0-9]", "", spelling.casefold()): row
    for row, (flow, layers) in ROWS.items()
    for spelling in (row, *([] if layers == 10 else [flow]))
}
"""Each row by its letters and digits: maf-mog is MAF MoG (5), as for `build`, and realnvp-10 is RealNVP (10)."""

BATCH_SIZE = 100
PATIENCE = 30
ONE_NETWORK_RATE, FLOW_RATE = 1e-3, 1e-4
"""The paper's learning rates: for MADE and MADE MoG, and for the flows."""

PUBLISHED: dict[str, dict[str, float]] = {
    name: dict(zip(ROWS, column, strict=False))
    for name, column in {
        "POWER": (-7.74, -3.08, 0.40, -0.02, 0.17, 0.14, 0.24, 0.30),
        "GAS": (-3.58, 3.56, 8.47, 4.78, 8.33, 9.07, 10.08, 9.59),
        "HEPMASS": (-27.93, -20.98, -15.15, -19.62, -18.71, -17.70, -17.73, -17.39),
        "MINIBOONE": (-37.24, -15.59, -12.27, -13.55, -13.84, -11.75, -12.24, -11.68),
        "BSDS300": (96.67, 148.85, 153.71, 152.97, 153.28, 155.69, 154.93, 156.36),
    }.items()
}
"""Test log-likelihood in nats by set and model: the paper's table 1, which has no spline flows."""


@dataclass(frozen=True)
class Candidate:
    """A model to fit. Among candidates with the same name, which differ in width, the best validation score counts.

    Attributes:
        name: Name in the table.
        flow, num_layers, hidden_dims, activation, batch_norm, degrees, networks: As in `build`.
        learning_rate: Initial learning rate of Adam, or None for that of the comparison.

    Example:
        >>> Candidate("MAF (5)", "maf", hidden_dims=(100, 100)).slug
        'maf-5-100x100'
    """

    name: str
    flow: str
    num_layers: int = 5
    hidden_dims: tuple[int, ...] | None = None
    activation: str = "relu"
    batch_norm: bool = False
    degrees: str = "sequential"
    networks: str = "joint"
    learning_rate: float | None = None

    @property
    def slug(self) -> str:
        """Name of the candidate's folder."""
        layers = f"-{self.num_layers}" if self.flow in STACKS else ""
        return f"{self.flow}{layers}" + (f"-{self.widths}" if self.widths else "")

    @property
    def widths(self) -> str:
        """Widths of the hidden layers; "" by default or if there are none."""
        return "x".join(map(str, self.hidden_dims or ())) if self.flow != "gaussian" else ""

    def build(self, input_dim: int, context_dim: int, seed: int) -> Model:
        """Build the untrained model."""
        options = asdict(self)
        del options["name"], options["learning_rate"]
        return build(input_dim=input_dim, context_dim=context_dim, seed=seed, **options)


def candidates(
    names: Sequence[str] = tuple(ROWS), *, hidden_dims: Sequence[Sequence[int]] = (), batch_norm: bool = False
) -> tuple[Candidate, ...]:
    """Return the paper's models, for any data.

    Args:
        names: Rows of the paper's table, by default all, named as there or as in `build`: "MADE MoG" or "made-mog",
            "MAF (5)", "maf-5" or "maf".
        hidden_dims: Alternatives for the widths of a network's hidden layers; by default the choice of `build`.
        batch_norm: Put a `BatchNorm` after every layer of the flows.

    Raises:
        ValueError: For a name that is not in the table, or no names.

    Example:
        >>> [one.slug for one in candidates(["Gaussian", "MADE"], hidden_dims=[[32], [32, 32]])]
        ['gaussian', 'made-32', 'made-32x32']
    """
    spelt = [re.sub(r"[^a-z0-9]", "", name.casefold()) for name in names]
    unknown = [name for name, spelling in zip(names, spelt, strict=True) if spelling not in SPELLINGS]
    if unknown or not names:
        raise ValueError(f"candidates expected names among {', '.join(ROWS)}, got {', '.join(unknown) or 'none'}.")
    widths: list[tuple[int, ...] | None] = [tuple(each) for each in hidden_dims]
    return tuple(
        Candidate(name, flow, num_layers, each, batch_norm=batch_norm)
        for name in dict.fromkeys(SPELLINGS[spelling] for spelling in spelt)
        for flow, num_layers in [ROWS[name]]
        for each in (widths if widths and flow != "gaussian" else [None])
    )


@dataclass(frozen=True)
class Settings:
    """The paper's settings for one data set.

    Its weight decay, 1e-6, is the default of `fit`.

    Attributes:
        name: Name in the paper.
        loader: The function of `pyro_maf.datasets` that reads the set.
        units: Numbers of hidden units that were tried, each in one layer and in two.
        activation: Activation of the masked networks; couplings use tanh for the scale and ReLU for the shift.
        degrees: Degrees of the masked networks' hidden units.

    Example:
        >>> [one.slug for one in SETTINGS["GAS"].candidates(["Gaussian", "MAF (5)"])]
        ['gaussian', 'maf-5-100', 'maf-5-100x100']
    """

    name: str
    loader: str
    units: tuple[int, ...]
    activation: str = "relu"
    degrees: str = "sequential"

    @property
    def published(self) -> dict[str, float]:
        """The paper's results by model; empty if its table 1 has none."""
        return PUBLISHED.get(self.name, {})

    @property
    def widths(self) -> tuple[tuple[int, ...], ...]:
        """The widths of hidden layers that were tried."""
        return tuple((units,) * layers for units in self.units for layers in (1, 2))

    def candidates(self, names: Sequence[str] = tuple(ROWS)) -> tuple[Candidate, ...]:
        """Return rows of the table with every width that was tried, at the paper's learning rates."""
        return tuple(
            replace(
                one,
                activation="relu" if one.flow == "realnvp" else self.activation,
                batch_norm=one.flow in STACKS,
                degrees=self.degrees,
                networks="separate" if one.flow == "realnvp" else "joint",
                learning_rate=FLOW_RATE if one.flow in STACKS else ONE_NETWORK_RATE,
            )
            for one in candidates(names, hidden_dims=self.widths)
        )


SETTINGS = {
    each.name: each
    for each in (
        Settings("POWER", "power", (100,)),
        Settings("GAS", "gas", (100,), activation="tanh"),
        Settings("HEPMASS", "hepmass", (512,)),
        Settings("MINIBOONE", "miniboone", (512,)),
        Settings("BSDS300", "bsds300", (512, 1024)),
        Settings("MNIST", "mnist", (1024,)),
        Settings("CIFAR-10", "cifar10", (1024, 2048), degrees="random"),
    )
}
"""Settings by the paper's name for each set."""
