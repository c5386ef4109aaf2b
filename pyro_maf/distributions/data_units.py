"""The map from the standardised space of a prior's model to the units and support of the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor

from pyro_maf._core.checks import check_event
from pyro_maf.support import Support
from pyro_maf.sweep import OneThread
from pyro_maf.transforms import Flow, Stack
from pyro_maf.transforms.tails import with_tails

__all__ = [
    "DataUnits",
    "NoiseToData",
    "float32_holds",
    "float32_reaches",
    "has_float64",
    "keep_float64",
    "statistics",
    "tail_weights",
    "widen_for",
]

RESOLUTION = 1e-3


class DataUnits(Flow):
    r"""y = T(loc + scale t(x)), where T maps to the support and t is the map of `Tails`; without trainable parameters.

    loc, scale and y share a dtype, which differs from the model's, that of x, if the model is in float32 and the
    columns need float64: for 5.4e6 +- 0.1, for example, float32 resolves only three values. Then y is standardised in
    float64 and rounded afterwards.

    Args:
        loc, scale: Location and scale, (D,) each.
        support: The image of T.
        like: A tensor with the dtype and device of x.
        tails: Weights of the right and left tails, (2, D), or None for t(x) = x.
    """

    is_by_row = True
    loc: Tensor
    scale: Tensor
    inner: Tensor
    tails: Tensor | None

    def __init__(self, loc: Tensor, scale: Tensor, support: Support, like: Tensor, tails: Tensor | None = None) -> None:
        super().__init__(len(loc))
        self.support = support
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)
        self.register_buffer("tails", None if tails is None else tails.to(loc))
        # An empty tensor that follows the model's dtype and device.
        self.register_buffer("inner", like.new_empty(0), persistent=False)
        self._constants: _Constants | None = None

    def widen(self) -> None:
        """Convert loc and scale, and thus y, to float64 if the device supports it, whatever the dtype of x."""
        if has_float64(self.loc.device):
            self.loc, self.scale = self.loc.double(), self.scale.double()

    def check_precise(self, who: str, role: str, value: object) -> None:
        """Raise if values were already rounded to a dtype that does not resolve them.

        Args:
            who, role: As in `check_event`.
            value: The value of y.
        """
        if not isinstance(value, Tensor) or value.dtype == self.loc.dtype or self.loc.dtype == self.inner.dtype:
            return
        column = int(float32_holds(self.loc, self.scale, self.support).int().argmin())
        raise TypeError(
            f"{who} expected {role} of float64, got {str(value.dtype).removeprefix('torch.')}: that rounds column "
            f"{column}, about {self.loc[column].item():.7g} +- {self.scale[column].item():.2g} before the support, too "
            "coarsely. Read the values in float64 to begin with."
        )

    def scaled(self, y: Tensor) -> tuple[Tensor, float] | None:
        """x and log |det dy/dx| if that is constant: for real y with the dtype of x, on the CPU; otherwise None."""
        buffers = cast("dict[str, Tensor]", self._buffers)  # the fastest access, at each call
        loc, scale = buffers["loc"], buffers["scale"]
        if self.support.name != "real" or scale.dtype is not buffers["inner"].dtype or not scale.is_cpu:
            return None
        if buffers["tails"] is not None or scale.requires_grad or scale.is_inference() or loc.is_inference():
            return None
        constants, versions = self._constants, (loc._version, scale._version)
        if (
            constants is None
            or constants.versions != versions
            or constants.scale is not scale
            or constants.loc is not loc
        ):
            is_identity = not (loc.any() or (scale != 1).any())
            self._constants = constants = _Constants(loc, scale, versions, scale.log().sum().item(), is_identity)
        if constants.is_identity and not loc.requires_grad:
            return y, constants.volume
        with OneThread():
            return (y - loc) / scale, constants.volume

    def forward_and_log_det(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return y = c(loc + scale t(x)), with c the map to the support, and log |det dy/dx|."""
        if self.tails is None:
            y, log_det = self.support.constrain(self.loc + self.scale * x)
        else:
            x, log_tails = self._with_tails(x.to(self.loc.dtype), self.tails, 1)
            y, log_det = self.support.constrain(self.loc + self.scale * x)
            log_det = log_det + log_tails
        return y, log_det + self.scale.log().sum()

    def inverse_and_log_det(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return x = t^-1((c^-1(y) - loc) / scale) and log |det dy/dx|."""
        w, log_det = self.support.unconstrain(y)
        x = (w - self.loc) / self.scale
        if self.tails is not None:
            x, log_tails = self._with_tails(x, self.tails, -1)
            log_det = log_det - log_tails
        return x.to(self.inner.dtype), log_det + self.scale.log().sum()

    def _with_tails(self, x: Tensor, tails: Tensor, sign: int) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros_like(self.loc)
        return with_tails(x, tails.to(zeros), zeros, zeros + 1, sign)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.loc, self.scale
        super()._apply(fn, recurse)
        keep_float64(self._buffers, ("loc", "scale"), before, self.support)
        return self

    def _forget(self) -> None:
        super()._forget()
        self._constants = None

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        widen_for(self._buffers, ("loc", "scale"), state_dict, prefix, self.support)
        tails = state_dict.get(prefix + "tails")
        with torch.inference_mode(False):  # no later graph could save an inference tensor
            self.tails = None if tails is None else torch.zeros_like(tails, device=self.loc.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Constants(NamedTuple):
    """Numbers that follow from location and scale, at these versions of the two tensors."""

    loc: Tensor
    scale: Tensor
    versions: tuple[int, int]
    volume: float
    is_identity: bool


class NoiseToData(Stack):
    """A flow followed by the units of its data; y may have one column more than x, and another dtype."""

    @property
    def units(self) -> DataUnits:
        """The units, the last layer."""
        return cast("DataUnits", self[-1])

    def _checked(self, role: str, value: Tensor, like: Tensor | None) -> Tensor:
        if role == "x":
            return super()._checked(role, value, self.units.inner)
        size = self.units.support.event_size
        return check_event(self.name, role, value, size, "event_size of its support", self.units.loc)


def float32_holds(loc: Tensor, scale: Tensor, support: Support | None = None, resolution: float = RESOLUTION) -> Tensor:
    """Return whether float32 resolves the values of each column to a fraction of their scale, (D,).

    Args:
        loc, scale: Location and scale of the unconstrained values, (D,) each.
        support: Support of the values; by default they are real.
        resolution: The fraction.

    Example:
        >>> float32_holds(torch.tensor([5.4e6, 2000.0]).double(), torch.tensor([0.1, 10.0]).double())
        tensor([False,  True])
    """
    loc, scale = loc.detach().double().cpu(), scale.detach().double().cpu()
    single = torch.finfo(torch.float32)
    rounding = single.eps * loc.abs()
    holds = float32_reaches(loc, scale)
    if support is not None and support.name != "real":
        y = support.constrain(loc)[0]
        # Alternately up and down, because a simplex is invariant to a common factor of its entries.
        signs = torch.arange(y.shape[-1], dtype=y.dtype) % 2 * 2 - 1
        nudged = support.unconstrain(y * (1 + single.eps * signs))[0]
        rounding = rounding.maximum((nudged - loc).abs())
        holds = holds & support.unconstrain(y.float().double())[0].isfinite()
    return holds & (rounding <= resolution * scale)


def float32_reaches(loc: Tensor, scale: Tensor) -> Tensor:
    """Return whether each column's float64 values are far from the limits of float32's range, (D,)."""
    single = torch.finfo(torch.float32)
    return (scale > single.tiny / single.eps) & (loc.abs() + scale < single.max * single.eps)


def has_float64(device: torch.device) -> bool:
    """Return whether a device supports float64 tensors."""
    return device.type != "mps"


def keep_float64(
    buffers: dict[str, Tensor | None], names: Sequence[str], before: tuple[Tensor, Tensor], support: Support | None
) -> None:
    """Restore the location and scale from `before` a module's conversion if float32 does not resolve them."""
    now = buffers[names[0]]
    if now is None or now.dtype == torch.float64 or before[0].dtype != torch.float64 or not has_float64(now.device):
        return
    if not float32_holds(*before, support).all():
        buffers.update((name, value.to(now.device)) for name, value in zip(names, before, strict=True))


def widen_for(
    buffers: dict[str, Tensor | None],
    names: tuple[str, str],
    state: Mapping[str, Tensor],
    prefix: str,
    support: Support | None,
) -> None:
    """Convert location and scale to float64 before loading values that float32 does not resolve."""
    now, coming = buffers[names[0]], [state.get(prefix + name) for name in names]
    if now is None or now.dtype == torch.float64 or not has_float64(now.device):
        return
    loc, scale = coming
    if not (isinstance(loc, Tensor) and isinstance(scale, Tensor)) or loc.dtype != torch.float64:
        return
    if loc.shape == scale.shape == now.shape and not float32_holds(loc, scale, support).all():
        for name in names:
            buffer = buffers[name]
            buffers[name] = None if buffer is None else buffer.double()


def statistics(
    who: str,
    prefix: str,
    values: tuple[Tensor | None, Tensor | None],
    size: int,
    like: Tensor,
    support: Support | None = None,
) -> tuple[Tensor, Tensor]:
    """Location and scale, (size,), by default 0 and 1, like `like`, or in float64 if float32 does not resolve them.

    Args:
        who, prefix: The caller, and "" or "context_", the prefix of "loc" and "scale", for error messages.
        values: Location and scale, each a tensor or None.
        size, like: Their length, and a tensor of the model's dtype and device.
        support: As in `float32_holds`.

    Raises:
        TypeError: For values that are not tensors.
        ValueError: For the wrong shape, infinite numbers or scales that are not positive.
    """
    size_name = "context_dim" if prefix else "input_dim"
    loc, scale = values
    loc = torch.zeros(size) if loc is None else check_event(who, f"{prefix}loc", loc, size, size_name)
    scale = torch.ones(size) if scale is None else check_event(who, f"{prefix}scale", scale, size, size_name)
    dtype = like.dtype
    is_bounded = support is not None and support.name != "real"
    is_fine = is_bounded or torch.float64 in (loc.dtype, scale.dtype)
    if (
        is_fine
        and dtype != torch.float64
        and has_float64(like.device)
        and loc.shape == scale.shape
        and not float32_holds(loc, scale, support).all()
    ):
        dtype = torch.float64
    return _statistic(who, f"{prefix}loc", loc, like, dtype), _statistic(who, f"{prefix}scale", scale, like, dtype)


def tail_weights(who: str, tails: Tensor | None, size: int) -> Tensor | None:
    """A copy of the weights of the right and left tails, (2, size), or None.

    Raises:
        TypeError: For weights that are not a tensor.
        ValueError: For the wrong shape or infinite weights.
    """
    if tails is None:
        return None
    check_event(who, "tails", tails, size, "input_dim")
    if tails.shape != (2, size) or not tails.isfinite().all():
        raise ValueError(f"{who} expected tails to be finite numbers (2, {size}), got {tails.tolist()}.")
    return tails.detach().clone()


def _statistic(who: str, name: str, value: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.detach().to(dtype).clone()
    if value.dim() != 1 or not value.isfinite().all():
        raise ValueError(f"{who} expected {name} to be {value.shape[-1]} finite numbers, got {value.tolist()}.")
    if name.endswith("scale") and not (value > 0).all():
        raise ValueError(f"{who} expected {name} to be positive, got {value.tolist()}.")
    return value.to(like.device)
