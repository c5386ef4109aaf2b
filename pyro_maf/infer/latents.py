"""How the latent sites of a model are laid out as one unconstrained vector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.transforms import ComposeTransform, ExpTransform, IndependentTransform, SigmoidTransform

__all__ = ["Latents", "Part"]

REACH = {torch.float32: 40.0, torch.float64: 300.0}
"""How far from 0 the logarithm of a scale may be; its exponential can be squared and divided by."""


class Part(NamedTuple):
    """One site's place in the vector.

    Attributes:
        site: The site, as in the prototype trace.
        transform: From unconstrained values to the site's support.
        plates: Shape of the plates around it, without the rows that have vectors of their own.
        event: Shape of one unconstrained event.
        start, stop: Its place.
    """

    site: dict[str, Any]
    transform: Transform
    plates: torch.Size
    event: torch.Size
    start: int
    stop: int


class Latents:
    r"""The latent sites of a model as one vector v of D real numbers.

    Args:
        who: Whose they are, for errors.
        sites: The latent sites, from a trace.
        rows: Shape of the plates whose every row has a vector of its own, or () where there is one vector in all.

    Attributes:
        rows: As given.
        size: D.
        parts: Each site's place, by name.

    Raises:
        ValueError: If a site is discrete, if there are none, or if one is not in the plates of `rows` alone.
    """

    def __init__(self, who: str, sites: Mapping[str, dict[str, Any]], rows: torch.Size) -> None:
        self.rows = rows
        self.parts: dict[str, Part] = {}
        self.size = 0
        for name, site in sites.items():
            transform = _transform_of(who, name, site)
            value = site["value"]
            batch = value.shape[: value.dim() - site["fn"].event_dim]
            if rows and batch != rows:
                raise ValueError(
                    f"{who} expected every site in plates of shape {tuple(rows)}, that of the encoder's context, "
                    f"got {name} in {tuple(batch)}."
                )
            event = transform.inverse_shape(value.shape)[len(batch) :]
            plates = torch.Size() if rows else batch
            stop = self.size + plates.numel() * event.numel()
            self.parts[name] = Part(site, transform, plates, event, self.size, stop)
            self.size = stop
        if not self.size:
            raise ValueError(f"{who} found no latent variables in the model.")

    def split(self, latent: Tensor) -> Iterator[tuple[Part, Tensor]]:
        r"""Each site's unconstrained value, for a latent of shape (\*batch, D).

        `batch` has ones where the plates of the model are, as inside a plate of particles, or ends before them.
        """
        for part in self.parts.values():
            batch = torch.broadcast_shapes(part.plates, latent.shape[:-1])
            value = latent[..., part.start : part.stop].reshape(batch + part.event)
            yield part, _within_reach(part.transform, value)

    def unpack(self, latent: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        r"""The value of each site, and log |det dz/dv| in nats, (draws,), for a latent (draws, \*ones, D)."""
        values, total = {}, latent.new_zeros(len(latent))
        for part, unconstrained in self.split(latent):
            value = values[part.site["name"]] = part.transform(unconstrained)
            log_det = part.transform.log_abs_det_jacobian(unconstrained, value)
            total = total + log_det.reshape(len(latent), -1).sum(-1)
        return values, total

    def pack(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        r"""The latent (\*batch, D) of values (\*batch, \*site), and log |det dz/dv|, (\*batch,).

        `batch` ends with the rows, where there are any.
        """
        pieces, log_dets = [], []
        for name, part in self.parts.items():
            unconstrained = part.transform.inv(values[name])
            log_det = part.transform.log_abs_det_jacobian(unconstrained, values[name])
            batch = unconstrained.shape[: unconstrained.dim() - len(part.plates) - len(part.event)]
            pieces.append(unconstrained.reshape(*batch, part.stop - part.start))
            log_dets.append(log_det.reshape(*batch, -1).sum(-1))
        batch = torch.broadcast_shapes(*(piece.shape[:-1] for piece in pieces))
        return torch.cat([piece.expand(*batch, -1) for piece in pieces], -1), torch.stack(
            [log_det.expand(batch) for log_det in log_dets]
        ).sum(0)


def _transform_of(who: str, name: str, site: dict[str, Any]) -> Transform:
    support = site["fn"].support
    if support.is_discrete:
        raise ValueError(
            f"{who} expected continuous latent variables, got the discrete site {name}: sum it out with TraceEnum_ELBO "
            f"and infer={{'enumerate': 'parallel'}}, and hide it here, {who}(poutine.block(model, hide=['{name}']))."
        )
    try:
        return biject_to(support)
    except NotImplementedError:
        raise ValueError(
            f"{who} knows no map from real numbers to the support of site {name}, {support}: "
            "reparameterise it with pyro.poutine.reparam."
        ) from None


def _within_reach(transform: Transform, unconstrained: Tensor) -> Tensor:
    """Keep scales from becoming 0 or infinite, at which a model would raise, for one draw among many."""
    while isinstance(transform, (IndependentTransform, ComposeTransform)):
        parts = transform.parts if isinstance(transform, ComposeTransform) else [transform.base_transform]
        if not parts:
            return unconstrained
        transform = parts[0]
    if not isinstance(transform, (ExpTransform, SigmoidTransform)):
        return unconstrained
    reach = REACH.get(unconstrained.dtype, 10.0)
    return unconstrained.clamp(-reach, reach)
