r"""Flows as guides: `AutoMAF`, `AutoIAF` and `AutoRealNVP`."""

from __future__ import annotations

from pyro_maf.flows import IAF, MAF, RealNVP
from pyro_maf.infer.guides.auto_flow import AutoFlow

__all__ = ["AutoIAF", "AutoMAF", "AutoRealNVP"]


class AutoIAF(AutoFlow):
    r"""Inverse autoregressive flow over all latent variables of a model, as a guide.

    With v the latent variables in unconstrained space as one vector, v = tails(loc + L (b + A flow(u))), u standard
    normal. loc and L are fixed by the initialization: the normal of the largest evidence lower bound among many along
    an ascent to the mode. b, the lower triangular A, the flow and the weights of the tails, as of
    `pyro_maf.transforms.Tails` in units of that normal, are trained, and start as the identity; so a new guide is
    that normal, and the family contains every full-rank normal, and Student's t of independent variables nearly. Beyond
    200 latent variables, L and A are a diagonal, up to 300 directions and a chain along the vector, memory is linear in
    their number, and tails stay as they are; so they do with `init_scale` or an encoder.

    There are ascents from the prior's median, from draws of the prior and from the cube (-2, 2) in unconstrained space.
    If they end at several modes that each hold at least a thousandth of the probability, as label switching has them,
    the guide is a mixture, with a flow for each of at most eight: q(v) = sum_k s_k q_k(v). Draws are stratified over
    the modes, the density is exact, and the shares s_k are set by evidence, every hundred draws in training.

    Where the prior of a site has a location or scale that depends on other latent variables, as in a hierarchy, v are
    coordinates between centred and non-centred: with a degree of centring for each entry, the share of the data in its
    precision. Sites that are normal given all others in these stay out of the flow, but for three entries. Models are
    written centred, whatever their data.

    Args:
        model: A Pyro model.
        num_layers: Number of autoregressive layers, by default 3.
        hidden_dims: Widths of each network's hidden layers, by default two of 64 to 512 units, depending on the number
            of latent variables.
        activation: A name from `pyro_maf.nn.ACTIVATIONS`.
        init_loc_fn: Starting point of the ascent, site by site, as for other guides of Pyro; by default the prior's
            median, or the middle of the support of an improper prior.
        init_scale: Start with this scale in every direction, at the point of `init_loc_fn`, without an ascent.
        encoder: Amortises the guide: a function or a module that maps the model's arguments to the context of a
            conditional flow. A context of shape (features,) is for all latent variables together. One of shape
            (\*rows, features) is for each row of a plate, which all latent variables are in; if batches differ in
            size, `create_plates` has to create that plate.
        create_plates: As in Pyro's guides: creates plates that subsample from the model's arguments. The guide has the
            latent variables of all rows of these.

    Attributes:
        latent_dim: D, the number of unconstrained latent variables, or those of one row.
        transform: The map from u to v, once set up.
        coordinates: The map from v to the sites of a hierarchy, or None for a model without one.

    Cost:
        Drawing, and scoring the draws, is one pass a layer, `log_prob` of other points one sweep; a step is both, for
        the path gradient, which `Trace_ELBO` takes from the guide. Setting up takes some tens of Hessians of the model
        and some thousand evaluations, in batches; of a model that has to be run for each draw, some 300 runs, and one
        ascent. With K modes a draw costs as much as with one, and its density K times as much.

    Raises:
        ValueError: For a model without latent variables, with discrete ones, or with some in a plate that subsamples
            and that neither `encoder` nor `create_plates` is for; for options out of range.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer import SVI, Trace_ELBO
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     with pyro.plate("rows", len(y)):
        ...         pyro.sample("y", dist.Normal(0.0, scale), obs=y)
        >>> guide = AutoIAF(model, num_layers=2)
        >>> svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 1e-2}), Trace_ELBO())
        >>> loss = svi.step(torch.tensor([0.5, -0.2, 0.1]))
        >>> guide.rsample((7,))["scale"].shape, sorted(guide.median())
        (torch.Size([7]), ['scale'])

    Reference:
        Kingma et al., *Improving Variational Inference with Inverse Autoregressive Flow*, 2016.
    """

    flow_class = IAF


class AutoMAF(AutoFlow):
    r"""Masked autoregressive flow over all latent variables of a model, as a guide.

    Args:
        model, num_layers, hidden_dims, activation, init_loc_fn, init_scale, encoder, create_plates: As in `AutoIAF`.

    Cost:
        Drawing is one sweep a layer, `log_prob` one pass; a step is both, and their adjoints.

    Raises:
        ValueError: As in `AutoIAF`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> guide = AutoMAF(lambda: pyro.sample("z", dist.Gamma(2.0, 1.0)), num_layers=2)
        >>> guide.setup().rsample((7,))["z"].shape
        torch.Size([7])

    Reference:
        Papamakarios, Pavlakou & Murray, *Masked Autoregressive Flow for Density Estimation*, 2017.
    """

    flow_class = MAF


class AutoRealNVP(AutoFlow):
    r"""RealNVP over all latent variables of a model, as a guide. Six layers by default.

    Args:
        model, num_layers, hidden_dims, activation, init_loc_fn, init_scale, encoder, create_plates: As in `AutoIAF`.

    Cost: one pass a layer for draws, and one for `log_prob` of any points; a step is both.

    Raises:
        ValueError: As in `AutoIAF`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> guide = AutoRealNVP(lambda: pyro.sample("z", dist.Beta(2.0, 3.0)), hidden_dims=[32, 32])
        >>> sorted(guide.setup().quantiles([0.1, 0.9]))
        ['z']

    Reference:
        Dinh, Sohl-Dickstein & Bengio, *Density Estimation Using Real NVP*, 2017.
    """

    flow_class = RealNVP
    default_num_layers = 6
