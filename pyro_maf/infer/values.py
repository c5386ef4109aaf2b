"""Values of a guide's sites as a user passes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_maf.infer.latents import Latents

__all__ = ["checked_values", "within_supports"]


def checked_values(who: str, latents: Latents, values: Any, like: Tensor) -> dict[str, Tensor]:
    r"""Convert values of every site, (\*batch, \*site), to tensors of one batch shape and of the dtype of `like`.

    Args:
        who: The guide's class, for errors.
        latents: Its sites.
        values: By name: tensors, or numbers and arrays, which become tensors.
        like: A weight of the guide.

    Raises:
        TypeError: If they are not a mapping, not numbers, or floating-point tensors of another dtype.
        ValueError: If a site is missing, or if a shape is not that of its site or does not broadcast with the others.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{who} expected values of the sites by name, as a dictionary, got {type(values).__name__}.")
    if missing := sorted(latents.parts.keys() - values.keys()):
        raise ValueError(f"{who} expected values of every site, got none of {missing}.")
    checked, batches = {}, {}
    for name, part in latents.parts.items():
        value = checked[name] = _tensor(who, name, values[name], like)
        # The rows of an encoder's context differ from batch to batch.
        site = part.value.shape[len(latents.rows) :]
        batch = value.dim() - len(site)
        if batch < 0 or value.shape[batch:] != site:
            shape = ", ".join(["*batch", *map(str, site)])
            raise ValueError(f"{who} expected {name} of shape ({shape}), got {tuple(value.shape)}.")
        batches[name] = value.shape[:batch]
    try:
        torch.broadcast_shapes(*batches.values())
    except RuntimeError:
        shapes = ", ".join(f"{tuple(batch)} of {name}" for name, batch in batches.items())
        raise ValueError(f"{who} expected values whose batch shapes broadcast, got {shapes}.") from None
    return checked


@torch.no_grad()
def within_supports(latents: Latents, values: Mapping[str, Tensor]) -> Tensor:
    r"""Test if all sites' values, (\*batch, \*site), are on their supports; (\*batch,), boolean."""
    inside = []
    for name, part in latents.parts.items():
        value = values[name]
        # Some inverses clamp, so compare the round trip.
        back = part.transform(part.transform.inv(value))
        batch = value.dim() - len(part.value.shape) + len(latents.rows)
        inside.append(torch.isclose(back, value, rtol=1e-3, atol=1e-5).reshape(*value.shape[:batch], -1).all(-1))
    return torch.stack(torch.broadcast_tensors(*inside)).all(0)


def _tensor(who: str, name: str, value: Any, like: Tensor) -> Tensor:
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
