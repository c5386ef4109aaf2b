"""Layout of the latent sites of a model as one unconstrained vector."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide import init_to_median
from pyro.ops.tensor_utils import periodic_repeat
from torch import Tensor
from torch.distributions import Transform
from torch.distributions.constraints import Constraint, real
from torch.distributions.transforms import IndependentTransform

from pyro_maf._core.torch_state import seeded
from pyro_maf.infer.models.model import FAILURES, Call, RefusalError, Site, layers_of, sample_sites
from pyro_maf.infer.models.plates import subsampled
from pyro_maf.infer.models.supports import support_map, tensors_of, within_reach

__all__ = ["UNIFORM", "Images", "Latents", "Part", "Plates", "masked_elements", "median_or_feasible"]

MEDIAN_DRAWS = 15
"""Number of draws for a median, as in Pyro."""
STEP = 0.3
"""Displacement of latent variables, in unconstrained space, that tests whether a support moves with them."""
UNIFORM = 2.0
"""Half the width of the cube, around 0 in unconstrained space, in which Pyro and Stan start NUTS."""

Plates = pyro.plate | Iterable[pyro.plate]
"""The result of a function for `create_plates`, as in Pyro's guides."""

Images = dict[str, tuple[Tensor, Tensor]]
"""The value of each site and, by event, the log-determinant of its map, in nats."""


class Part(NamedTuple):
    """Position of one site in the vector.

    Attributes:
        site: The site, as in the prototype trace.
        value: Its value in that trace; within subsampling plates, for all rows.
        rows: The dimension of the value for each subsampling plate.
        transform: The map from unconstrained values to the site's support.
        plates: Shape of the plates around it, excluding rows with separate vectors.
        event: Shape of one unconstrained event.
        start, stop: Its range among all entries, including those that are left out.
    """

    site: Site
    value: Tensor
    rows: dict[str, int]
    transform: Transform
    plates: torch.Size
    event: torch.Size
    start: int
    stop: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the unconstrained value."""
        return self.plates + self.event


class Latents:
    r"""The latent sites of a model as one vector v of D real numbers.

    Args:
        who: Name of the guide, for error messages.
        sites: The latent sites, from a trace.
        rows: Shape of the plates in which each row has its own vector, or () for a single vector.
        created: The plates that `create_plates` creates; if these subsample, v covers all their rows.

    Attributes:
        who, rows: As in the arguments.
        size: D.
        parts: Position of each site, by name.
        idle: Mask over the entries of all sites, (entries,), true for constants that are not part of v; see
            `leave_out`.
        masked: Mask over the entries, true where the model masked them when `leave_out` was called.

    Raises:
        ValueError: If a site is discrete, if there are none, if one is in other plates than those of `rows`, or if one
            is in another subsampling plate.
    """

    def __init__(self, who: str, sites: Mapping[str, Site], rows: torch.Size, created: Plates = ()) -> None:
        if not rows:
            _check_plates(who, sites, created)
        self.who = who
        self.rows = rows
        self.parts: dict[str, Part] = {}
        self.size = 0
        for name, site in sites.items():
            transform = _transform_of(who, name, site)
            value, dims = (site["value"].detach(), {}) if rows else _of_all_rows(site)
            batch = value.shape[: value.dim() - site["fn"].event_dim]
            if rows and batch != rows:
                raise RefusalError(
                    f"{who} expected every site in plates of shape {tuple(rows)}, that of the encoder's context, "
                    f"got {name} in {tuple(batch)}."
                )
            event = transform.inverse_shape(value.shape)[len(batch) :]
            plates = torch.Size() if rows else batch
            stop = self.size + plates.numel() * event.numel()
            self.parts[name] = Part(site, value, dims, transform, plates, event, self.size, stop)
            self.size = stop
        if not self.size:
            raise RefusalError(f"{who} found no latent variables in the model.")
        self.idle = torch.zeros(self.size, dtype=torch.bool, device=value.device)
        self.masked = self.idle
        self._constants = torch.zeros(self.size).to(value)

    @property
    def leaves_out(self) -> bool:
        """True if some entries are not part of v."""
        return self.size < len(self.idle)

    @property
    def values(self) -> dict[str, Tensor]:
        """Values in the prototype."""
        return {name: part.value for name, part in self.parts.items()}

    @property
    def shapes_of_all_rows(self) -> dict[str, torch.Size]:
        """Shape of every site's value if one of them is in a subsampling plate; otherwise empty."""
        by_row = any(part.rows for part in self.parts.values())
        return {name: value.shape for name, value in self.values.items()} if by_row else {}

    def leave_out(self, idle: Tensor, masked: Tensor) -> None:
        """Fix entries of v that a mask excludes from the model's density at their initial values.

        From then on they are not part of v or of log |det dz/dv|.

        Raises:
            ValueError: If no entry of v remains.
        """
        self._constants, _ = self.pack(self.values)
        self.idle, self.masked, self.size = idle, masked, int((~idle).sum())
        if not self.size:
            raise RefusalError(f"{self.who} found no latent variables in the model that are not masked.")

    def release(self, names: Iterable[str]) -> None:
        """Use identity maps for sites whose supports move; coordinates keep their values inside."""
        for name in names:
            self.parts[name] = self.parts[name]._replace(transform=support_map(real))

    @torch.no_grad()
    def release_moving(self, call: Call) -> list[str]:
        """Release the sites whose supports have a bound that depends on latent variables, or is trained; return these.

        Cost: one run of the model if a support has a tensor as a bound, and none if all bounds are plain numbers.
        """
        before = {name: list(tensors_of(part.site["fn"].support)) for name, part in self.parts.items()}
        if not any(before.values()):
            return []
        moved = {
            name: part.transform(part.transform.inv(part.site["value"]) + STEP) for name, part in self.parts.items()
        }
        try:
            with poutine.block(), seeded(0, self.idle.device):
                sites = sample_sites(call.conditioned(moved))
        except FAILURES:
            sites = {}
        moving = []
        for name, bounds in before.items():
            now = list(tensors_of(sites[name]["fn"].support)) if name in sites else bounds
            is_same = len(now) == len(bounds) and all(map(torch.equal, now, bounds))
            if not is_same or any(bound.requires_grad for bound in bounds):
                moving.append(name)
        self.release(moving)
        return moving

    def initial(self) -> Tensor:
        """Return the values in the prototype as one vector, (D,)."""
        return self.pack(self.values)[0].reshape(-1, self.size).mean(0)

    def has_masks(self) -> bool:
        """Return whether there are masked entries.

        Raises:
            ValueError: If these are in plates whose rows change from call to call.
        """
        masked = [
            name for name, part in self.parts.items() if masked_elements(part.site, part.site["value"]) is not None
        ]
        for name in masked:
            if self.rows or self.parts[name].rows:
                raise RefusalError(
                    f"{self.who} expected latent sites without a mask if rows have their own latent variables, got "
                    f"{name}: leave masked rows out of the model."
                )
        return bool(masked)

    def has_masks_of(self, sites: Mapping[str, Site]) -> bool:
        """Return whether sites have the masks that they had at the set-up; with rows there are none."""
        return bool(self.rows) or torch.equal(self.masked_in(sites), self.masked)

    def masked_in(self, sites: Mapping[str, Site]) -> Tensor:
        """Mask of the entries of all sites, from the masks of these sites or, if missing, of the prototype's."""
        return torch.cat([_masked_entries(part, sites.get(name, part.site)) for name, part in self.parts.items()])

    def split(self, latent: Tensor) -> Iterator[tuple[Part, Tensor]]:
        r"""Split a latent of shape (\*batch, D) into the unconstrained value of each site.

        `batch` has ones in place of the model's plates, as inside a plate of particles, or ends before them.
        """
        if self.leaves_out:
            entries = self._constants.to(latent).expand(*latent.shape[:-1], -1).clone()
            entries[..., ~self.idle] = latent
            latent = entries
        for part in self.parts.values():
            batch = torch.broadcast_shapes(part.plates, latent.shape[:-1])
            yield part, latent[..., part.start : part.stop].reshape(batch + part.event)

    def images(self, latent: Tensor) -> Images:
        r"""Map a latent (\*batch, D), as in `split`, to the value of each site."""
        return {part.site["name"]: self.mapped(part, unconstrained) for part, unconstrained in self.split(latent)}

    def unpack(self, latent: Tensor, images: Images | None = None) -> tuple[dict[str, Tensor], Tensor]:
        r"""Map a latent (\*batch, D), as in `split`, to the value of each site; also return log |det dz/dv| in nats.

        With `images`, the values of the same latent under another map, the log-determinant is that of this map.
        """
        images = self.images(latent) if images is None else images
        total = latent.new_zeros(latent.shape[:-1])
        for name, (_, log_det) in images.items():
            plates = tuple(range(-len(self.parts[name].plates), 0))
            total = total + (log_det.sum(plates, keepdim=latent.dim() > 1) if plates else log_det)
        return {name: value for name, (value, _) in images.items()}, total

    @property
    def nesting(self) -> int:
        """Number of dimensions of the plates around sites, excluding rows with separate vectors."""
        return max(len(part.plates) for part in self.parts.values())

    def sites(
        self,
        latent: Tensor,
        shape: torch.Size = torch.Size(),  # noqa: B008
        images: Callable[[Tensor], Images] | None = None,
    ) -> dict[str, Tensor]:
        r"""Map a latent (\*shape, \*rows, D) to the value of each site, (\*shape, \*site), by `images` if given."""
        batch = latent.reshape(-1, *(1,) * self.nesting, *latent.shape[len(shape) :])
        values = {name: value for name, (value, _) in (images or self.images)(batch).items()}
        if self.rows:
            return values
        return {name: value.reshape(shape + self.parts[name].value.shape) for name, value in values.items()}

    def mapped(self, part: Part, unconstrained: Tensor) -> tuple[Tensor, Tensor]:
        r"""Map unconstrained values to a site; also return log |det dz/dv| in nats by event, without idle entries.

        Beyond the reach of a map, where values stay constant, it falls by a nat per unit, so the density is integrable.
        """
        inside = within_reach(part.transform, unconstrained)
        value = part.transform(inside)
        beyond = 0.0 if inside is unconstrained else sum_rightmost((unconstrained - inside).abs(), len(part.event))
        return value, self._log_det(part, inside, value) - beyond

    def _log_det(self, part: Part, unconstrained: Tensor, value: Tensor) -> Tensor:
        transform = part.transform
        while self.leaves_out and isinstance(transform, IndependentTransform):
            transform = transform.base_transform
        log_det = transform.log_abs_det_jacobian(unconstrained, value)
        if self.leaves_out:
            idle = self.idle[part.start : part.stop].reshape(part.shape)
            events = idle.shape[: idle.dim() - transform.domain.event_dim]
            log_det = torch.where(idle.reshape(*events, -1).all(-1), 0.0, log_det)
        return sum_rightmost(log_det, log_det.dim() - value.dim() + part.site["fn"].event_dim)

    def pack(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        r"""Return the latent (\*batch, D) of values (\*batch, \*site), and log |det dz/dv| in nats, (\*batch,).

        `batch` ends with the rows, if there are any.
        """
        pieces, log_dets = [], []
        for name, part in self.parts.items():
            unconstrained = part.transform.inv(values[name])
            log_det = self._log_det(part, unconstrained, values[name])
            batch = unconstrained.shape[: unconstrained.dim() - len(part.plates) - len(part.event)]
            pieces.append(unconstrained.reshape(*batch, part.stop - part.start))
            log_dets.append(log_det.reshape(*batch, -1).sum(-1))
        batch = torch.broadcast_shapes(*(piece.shape[:-1] for piece in pieces))
        entries = torch.cat([piece.expand(*batch, -1) for piece in pieces], -1)
        latent = entries[..., ~self.idle] if self.leaves_out else entries
        return latent, torch.stack([log_det.expand(batch) for log_det in log_dets]).sum(0)

    def checked(self, values: object, like: Tensor) -> dict[str, Tensor]:
        r"""Convert a user's values of every site, (\*batch, \*site), to tensors with a common batch shape.

        Args:
            values: By name: tensors, or numbers and arrays, which become tensors.
            like: A weight of the guide, whose dtype and device the tensors get.

        Raises:
            TypeError: If they are not a mapping, not numbers, or floating-point tensors of another dtype.
            ValueError: If a site is missing, or if a shape differs from its site's or does not broadcast.
        """
        who = self.who
        if not isinstance(values, Mapping):
            raise TypeError(
                f"{who} expected values of the sites by name, as a dictionary, got {type(values).__name__}."
            )
        if missing := sorted(self.parts.keys() - values.keys()):
            raise ValueError(f"{who} expected values of every site, got none of {missing}.")
        checked = {name: _tensor(who, name, values[name], like) for name in self.parts}
        batches = {}
        for name, part in self.parts.items():
            # The rows of an encoder's context differ from batch to batch.
            shape, site = checked[name].shape, part.value.shape[len(self.rows) :]
            batches[name] = shape[: len(shape) - len(site)]
            if batches[name] + site != shape:
                expected = ", ".join(["*batch", *map(str, site)])
                raise ValueError(f"{who} expected {name} of shape ({expected}), got {tuple(shape)}.")
        try:
            torch.broadcast_shapes(*batches.values())
        except RuntimeError:
            shapes = ", ".join(f"{tuple(batch)} of {name}" for name, batch in batches.items())
            raise ValueError(f"{who} expected values whose batch shapes broadcast, got {shapes}.") from None
        return checked

    @torch.no_grad()
    def within_supports(self, values: Mapping[str, Tensor]) -> Tensor:
        r"""Test whether all sites' values, (\*batch, \*site), are on their supports; (\*batch,), boolean."""
        inside = []
        for name, part in self.parts.items():
            value = values[name]
            # Some inverses clamp, so compare the round trip.
            back = part.transform(part.transform.inv(value))
            batch = value.shape[: value.dim() - len(part.value.shape) + len(self.rows)]
            inside.append(torch.isclose(back, value, rtol=1e-3, atol=1e-5).reshape(*batch, -1).all(-1))
        return torch.stack(torch.broadcast_tensors(*inside)).all(0)


def _check_plates(who: str, sites: Mapping[str, Site], created: Plates) -> None:
    """Raise for latent variables in plates that resample their rows each time, unless they cover all rows."""
    names = {plate.name for plate in ([created] if isinstance(created, pyro.plate) else created)}
    for name, site in sites.items():
        for frame in subsampled(site):
            if frame.name not in names:
                raise RefusalError(
                    f"{who} expected latent sites outside of plates that subsample, got {name} in plate {frame.name} "
                    f"with {frame.size} of its {frame.full_size} rows: pass encoder=, for a guide of each row, or "
                    f"create_plates=, for latent variables of all {frame.full_size}."
                )


def _of_all_rows(site: Site) -> tuple[Tensor, dict[str, int]]:
    """Return the value of a site, repeated to all rows of subsampling plates, and their dimensions by name."""
    value, dims = site["value"].detach(), {}
    for frame in subsampled(site):
        if frame.dim is not None:
            dims[frame.name] = frame.dim - site["fn"].event_dim
            value = periodic_repeat(value, frame.full_size, dims[frame.name])
    return value, dims


def _tensor(who: str, name: str, value: object, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        try:
            return torch.as_tensor(value, dtype=like.dtype, device=like.device)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{who} expected numbers for {name}, got {value!r}.") from None
    if not value.is_floating_point():
        return value.to(like.dtype)
    if value.dtype != like.dtype:
        ours, theirs = (str(dtype).removeprefix("torch.") for dtype in (like.dtype, value.dtype))
        raise TypeError(f"{who} has {ours} parameters, got {name} of {theirs}: convert it with .to(torch.{ours}).")
    return value


def median_or_feasible(site: Site) -> Tensor:
    """Pyro's `init_to_median`, or the median in unconstrained space for supports that Pyro does not know.

    For improper priors, which cannot be sampled, it is the image of 0.
    """
    with suppress(NotImplementedError):
        return init_to_median(site)
    fn = site["fn"]
    try:
        transform = support_map(cast("Constraint", fn.support))
    except NotImplementedError:  # the layout of the sites, which follows, raises an error that names the site
        return torch.zeros(fn.shape())
    try:
        return transform(transform.inv(fn.sample(torch.Size([MEDIAN_DRAWS]))).median(0).values)
    except NotImplementedError:
        return transform(torch.zeros(transform.inverse_shape(fn.shape())))


def masked_elements(site: Site, value: Tensor) -> Tensor | None:
    """Mask of the elements of a site's value without a prior density, (*site); None if all have one.

    They are masked by `pyro.poutine.mask` or `fn.mask`, or are the observed part of a site with `obs_mask`.
    """
    fn = site["fn"]
    masks = [(site["mask"], fn.event_dim)]
    masks += [(layer._mask, layer.event_dim) for layer in layers_of(fn) if isinstance(layer, MaskedDistribution)]
    seen = torch.ones_like(value, dtype=torch.bool)
    for mask, event_dim in masks:
        if mask is not None:
            mask = torch.as_tensor(mask, device=value.device)
            mask = mask.reshape(mask.shape + (1,) * event_dim)
            extra = max(0, mask.dim() - value.dim())
            # If a mask is wider than the site, an element counts if it does anywhere.
            seen = seen & (mask.flatten(0, extra).any(0) if extra else mask)
    return None if seen.all() else ~seen


def _masked_entries(part: Part, site: Site) -> Tensor:
    masked = None if part.rows else masked_elements(site, part.value)
    if masked is None:
        return torch.zeros(part.shape.numel(), dtype=torch.bool, device=part.value.device)
    if masked.shape == part.shape:
        return masked.flatten()
    # An event whose shape differs from its unconstrained one, such as a simplex, is masked as a whole.
    whole = masked.reshape(*part.plates, -1).all(-1)
    return whole.reshape(part.plates + (1,) * len(part.event)).expand(part.shape).flatten()


def _transform_of(who: str, name: str, site: Site) -> Transform:
    if any(isinstance(layer, Delta) for layer in layers_of(site["fn"])):
        raise RefusalError(
            f"{who} expected latent variables with a density, got the site {name} of Delta, which has one value: "
            "write it with pyro.deterministic."
        )
    support = cast("Constraint", site["fn"].support)
    if support.is_discrete and not site["fn"].has_enumerate_support:
        raise RefusalError(
            f"{who} expected continuous latent variables, got the discrete site {name}, whose infinitely many "
            "values cannot be summed out: replace it by a Categorical over the first of them."
        )
    if support.is_discrete:
        raise RefusalError(
            f"{who} expected continuous latent variables, got the discrete site {name}: sum it out with "
            "infer={'enumerate': 'parallel'}, in fit_guide or by TraceEnum_ELBO."
        )
    try:
        return support_map(support)
    except NotImplementedError:
        raise RefusalError(
            f"{who} has no map from real numbers to the support of site {name}, {support}: "
            "reparameterise it with pyro.poutine.reparam."
        ) from None
