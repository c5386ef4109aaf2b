"""Neural transport: a model in the coordinates of a guide's noise, in which NUTS mixes well."""

from __future__ import annotations

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_maf.infer.diagnosis.importance import Pair
from pyro_maf.infer.guides.auto_flow import AutoFlow
from pyro_maf.infer.models.log_joint import LogJoint
from pyro_maf.infer.models.model import Call, Model, check_pair

__all__ = ["NeuTra", "neutra"]


class NeuTra:
    """A model reparameterised by a guide's noise; called like the model. Returned by `neutra`.

    Args:
        model: A Pyro model.
        guide: Its guide, set up and fitted.
    """

    def __init__(self, model: Model, guide: AutoFlow) -> None:
        self._model, self._guide = model, guide
        self._joint: LogJoint | None = None
        self._last: Call | None = None

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the model, with its latent variables computed from noise.

        Raises:
            ValueError: If the model draws random numbers outside of its sites, or if subsampling plates do not allow
                all rows to be scored.
        """
        call = Call(self._model, args, kwargs)
        with Messenger():  # without any handler, Pyro treats factors as observations outside of inference
            return self._run(call, self._joint_of(call))

    def _run(self, call: Call, joint: LogJoint) -> object:
        name = self._guide.name
        of_noise = self._guide.get_noise_dist()
        # NUTS moves in the dtype of the potential energy, which is that of the model's data.
        noise = pyro.sample(f"{name}_shared_latent", of_noise.mask(False)).to(of_noise.mean.dtype)
        values, log_ratio = self._guide.sites_and_log_ratio(noise, *call.args, **call.kwargs)
        pyro.factor(f"{name}_log_ratio", log_ratio)
        if joint.runs == 1:
            return call.of(poutine.condition(self._model, data=values))()
        rows = noise.reshape(-1, *(1,) * joint.nesting, noise.shape[-1])
        padded, _ = self._guide.sites_and_log_ratio(rows, *call.args, **call.kwargs)
        with poutine.block():
            scores = joint(padded)
            result = joint.returned(padded)
        pyro.factor(f"{name}_all_rows", scores.reshape(noise.shape[:-1]))
        return result

    def _joint_of(self, call: Call) -> LogJoint:
        """Return the log joint density for these arguments; the last one is cached."""
        if self._joint is None or not call.has_arguments_of(self._last):
            with poutine.block():
                self._joint = Pair("neutra", call, self._guide).complete_joint()
            self._last = call
        return self._joint

    @torch.no_grad()
    def draws(self, samples: dict[str, Tensor]) -> dict[str, Tensor]:
        r"""Map samples of `MCMC.get_samples` to draws of the model's sites, (\*draws, \*site)."""
        (noise,) = (value for name, value in samples.items() if name.endswith("_shared_latent"))
        return self._guide.sites_of(noise)


def neutra(model: Model, guide: AutoFlow) -> NeuTra:
    r"""Reparameterise a model by a guide's noise, for NUTS: z = t(u), and the target is p(x, t(u)) |det dt/du|.

    The better the guide, the closer u is to a standard normal, for a posterior of any shape. As MCMC, it is exact with
    any guide.

    Discrete sites with `infer={"enumerate": "parallel"}` are left to the sampler, which sums them out. If plates of the
    model subsample, every evaluation scores all rows, minibatch by minibatch.

    Args:
        model: A Pyro model.
        guide: A fitted guide from this module, without an encoder. Its weights are frozen; undo that by
            `guide.requires_grad_(True)`.

    Returns:
        The model to run NUTS on, whose `draws` maps the samples to the sites of the original.

    Cost: the model's density and gradient, and those of the guide's map: one pass per layer for an `AutoIAF`.

    Raises:
        TypeError: For a guide that is not from this package.
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
    check_pair("neutra", model, guide)
    if not isinstance(guide, AutoFlow):
        raise TypeError(f"neutra expected a guide of pyro_maf.infer, got {type(guide).__name__}.")
    if guide.prototype_trace is None:
        raise ValueError("neutra expected a guide that is set up and fitted: call fit_guide first.")
    if guide.encoder is not None:
        raise ValueError("neutra expected a guide without an encoder.")
    guide.requires_grad_(False)
    return NeuTra(model, guide)
