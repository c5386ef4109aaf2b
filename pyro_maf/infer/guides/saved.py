"""Guides without their models: the content of a guide's file, and the result of `pyro_maf.load`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Self, cast

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.guides.density import GuideDensity
from pyro_maf.infer.guides.mixture import FlowMixture
from pyro_maf.infer.models.coordinates import Coordinates
from pyro_maf.infer.models.latents import Latents, Part
from pyro_maf.infer.models.model import FAILURES, Args, Call, Frame, Kwargs, Site
from pyro_maf.infer.models.recorded_prior import RecordedPrior, recorded_prior
from pyro_maf.infer.models.recording import UnrecordedError
from pyro_maf.infer.models.supports import described_support, support_of
from pyro_maf.saving import Savable
from pyro_maf.transforms import Stack

__all__ = ["SavedGuide", "saved_guide"]

CHECKED, WIDEST = 64, 3.0
"""Number of draws at which a recorded prior is compared with the model's, and the largest factor of their noise."""
TOLERANCE = 1e3
"""Maximum difference between the two, relative and absolute, in units of the last digit."""

Plate = Sequence[Any]
"""Name, dimension and size of a plate."""


class SavedGuide(GuideDensity, Savable):
    r"""A fitted guide without model and data, as `pyro_maf.load` returns it from a file written by `guide.save`.

    It has the guide's `rsample`, `log_prob`, `quantiles` and `median`, and can itself be used as a guide in
    `Predictive`, `diagnose` and `reweight`, which take the model. Arguments of the model are accepted and ignored.

    Args:
        components: The map from noise to the vector of unconstrained latent variables; with several modes, one for
            each, with shares in the state_dict.
        names: Name of each site.
        supports: Support of each site, as JSON.
        shapes: Shape of each site's value.
        event_dims: Number of event dimensions of each site.
        plates: The plates around each site, with name, dimension and size.
        idle: Indices of entries that a mask left out of the vector, fixed at the values in the state_dict.
        prior: For a guide with coordinates, the prior's locations and scales from which they are computed.

    Cost: draws and densities cost the same as the original guide's; loading runs no code from the file.

    Example:
        >>> import os, tempfile, pyro, pyro.distributions as dist, pyro_maf
        >>> from pyro_maf.infer import AutoIAF
        >>> guide = AutoIAF(lambda: pyro.sample("rate", dist.Gamma(2.0, 1.0)), num_layers=1).setup()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     guide.save(os.path.join(folder, "guide.safetensors"))
        ...     again = pyro_maf.load(os.path.join(folder, "guide.safetensors"))
        >>> again.rsample((7,))["rate"].shape, sorted(again.quantiles([0.1, 0.9]))
        (torch.Size([7]), ['rate'])
    """

    def __init__(
        self,
        components: Sequence[Stack],
        names: Sequence[str],
        supports: Sequence[str],
        shapes: Sequence[Sequence[int]],
        event_dims: Sequence[int],
        plates: Sequence[Sequence[Plate]],
        idle: Sequence[int] = (),
        prior: RecordedPrior | None = None,
    ) -> None:
        super().__init__(_no_model)
        shares = next(components[0].parameters()).new_full((len(components),), 1 / len(components))
        self.transform = components[0] if len(components) == 1 else FlowMixture(components, shares)
        self._idle = list(idle)
        self._sites = {each[0]: _site(*each) for each in zip(names, supports, shapes, event_dims, plates, strict=True)}
        for index, site in enumerate(self._sites.values()):
            self.register_buffer(f"value_{index}", site["value"])
        self.prior = prior
        self._lay_out()
        self.coordinates = (
            None if prior is None else Coordinates(self.latents, prior.names, prior.correlated, prior.moving)
        )

    def _lay_out(self) -> None:
        """Lay out the sites with the current values of the buffers."""
        for index, site in enumerate(self._sites.values()):
            site["value"] = self.get_buffer(f"value_{index}")
        self.latents = Latents(self._who, self._sites, torch.Size())
        if (prior := self._modules.get("prior")) is not None:
            self.latents.release(cast("RecordedPrior", prior).moving)
        if self._idle:
            mask = torch.zeros(self.latents.size, dtype=torch.bool)
            mask[self._idle] = True
            self.latents.leave_out(mask, mask)
        self.latent_dim = self.latents.size

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._lay_out()
        if (coordinates := self._coordinates) is not None:  # so that a prior fails now rather than at the first draw
            coordinates.images(self.latents, self._weight.new_zeros(self.latent_dim), self._call((), {}), strict=True)

    def _call(self, args: Args, kwargs: Kwargs) -> Call:
        return Call(cast("RecordedPrior", self._modules["prior"]))

    def setup(self, *args: object, **kwargs: object) -> Self:
        """Return the guide, which is set up already."""
        return self

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Draw every latent site; return the values by name."""
        latent = pyro.sample(f"_{self._pyro_name}_latent", self.get_posterior(), infer={"is_auxiliary": True})
        frames = {frame for part in self.latents.parts.values() for frame in part.site["cond_indep_stack"]}
        plates = {frame.name: pyro.plate(frame.name, frame.size, dim=frame.dim) for frame in sorted(frames)}
        return self._sites_at(latent, plates)


def _no_model() -> None:
    """Placeholder for the model of a guide without one."""


def _site(name: str, support: str, shape: Sequence[int], event_dim: int, plates: Sequence[Plate]) -> Site:
    """A latent site with this support and shape, and without a density."""
    shape = torch.Size(shape)
    batch, event = shape[: len(shape) - event_dim], shape[len(shape) - event_dim :]
    fn = dist.ImproperUniform(support_of(json.loads(support)), batch, event)
    site = {"type": "sample", "name": name, "fn": fn, "value": torch.zeros(shape), "infer": {}, "scale": 1.0}
    frames = tuple(Frame(str(plate), int(dim), int(size), 0, int(size)) for plate, dim, size in plates)
    return cast("Site", {**site, "is_observed": False, "mask": None, "cond_indep_stack": frames, "done": True})


def saved_guide(
    latents: Latents, transform: nn.Module, coordinates: Coordinates | None, call: Call | None
) -> SavedGuide:
    """Return the guide without a model that has this layout, map and coordinates.

    Args:
        latents: The layout of the sites.
        transform: The map from noise to the guide's vector.
        coordinates: The coordinates of the vector, or None.
        call: The model with its arguments, for the prior from which coordinates are computed.

    Raises:
        TypeError: If it cannot be saved.
    """
    who, parts = latents.who, latents.parts.values()
    if not isinstance(transform, (Stack, FlowMixture)) or latents.rows:
        raise TypeError(f"{who} cannot be saved: it is a function of the model's arguments, by its encoder.")
    try:
        supports = [json.dumps(described_support(cast("Any", part.site["fn"].support))) for part in parts]
    except TypeError as error:
        raise TypeError(f"{who} cannot be saved: {error}; pickle it with torch.save.") from None
    components = list(transform.components) if isinstance(transform, FlowMixture) else [transform]
    prior = None
    if coordinates is not None and call is not None:
        prior = _checked_prior(latents, cast("Stack", components[0]), coordinates, call)
    guide = SavedGuide(
        cast("list[Stack]", components),
        list(latents.parts),
        supports,
        [tuple(part.value.shape) for part in parts],
        [part.site["fn"].event_dim for part in parts],
        [_plates(part) for part in parts],
        torch.nonzero(latents.idle).flatten().tolist(),
        prior,
    )
    guide.coordinates = None if coordinates is None else coordinates.batched()
    if isinstance(transform, FlowMixture):
        cast("FlowMixture", guide.transform).set_shares(transform.shares)
    for index, part in enumerate(parts):
        vars(guide)["_buffers"][f"value_{index}"] = part.value.detach().clone()
    return guide


@torch.no_grad()
def _checked_prior(latents: Latents, transform: Stack, coordinates: Coordinates, call: Call) -> RecordedPrior:
    """Record the prior from which coordinates are computed, and compare both at draws of a guide and at wider ones.

    Raises:
        TypeError: If it cannot be recorded, or the recording differs from the model's.
    """
    weight = next(transform.parameters())
    with seeded(0, weight.device):
        noise = torch.randn(CHECKED, latents.size, dtype=weight.dtype, device=weight.device)
    points = transform(noise * torch.linspace(0.0, WIDEST, CHECKED).to(noise)[:, None])
    points = points.reshape(CHECKED, *(1,) * latents.nesting, -1)
    try:
        prior = recorded_prior(latents, coordinates, call, weight.dtype)
        ours = coordinates.batched().images(latents, points, Call(prior), strict=True)
        theirs = coordinates.images(latents, points, call, strict=True)
    except (UnrecordedError, *FAILURES, NotImplementedError, TypeError) as error:
        reason = " ".join(str(error).split()) or "as it draws random numbers, or branches on values"
    else:
        tolerance = TOLERANCE * torch.finfo(weight.dtype).eps
        pairs = ((ours[name][index], theirs[name][index]) for name in theirs for index in (0, 1))
        if all(torch.allclose(*pair, rtol=tolerance, atol=tolerance, equal_nan=True) for pair in pairs):
            return prior
        reason = "its operations differ between runs"
    raise TypeError(
        f"{latents.who} cannot be saved: coordinates of {', '.join(coordinates.names)} are computed with the model's "
        f"prior, which is not a plain function of values ({reason}): keep its state_dict for a new guide of the "
        "model, or save draws of it."
    )


def _plates(part: Part) -> tuple[tuple[str, int, int], ...]:
    """The vectorised plates around a site, with all their rows."""
    return tuple(
        (frame.name, frame.dim, int(frame.full_size or frame.size))
        for frame in part.site["cond_indep_stack"]
        if frame.dim is not None
    )
