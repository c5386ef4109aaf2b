"""An embedding network between a context of any shape and the features that a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_maf._core.checks import check_shape
from pyro_maf._core.torch_state import reference_tensor
from pyro_maf.transforms.conditional import TakesContext

__all__ = ["BATCH_NORMS", "ContextNet"]

BATCH_NORMS = nn.modules.batchnorm._BatchNorm
ROWS_AT_ONCE = 1024


class ContextNet(nn.Module):
    r"""Features h = [net(c), k] of a context c of any shape, followed by further numbers k that pass through.

    Args:
        who: The caller, for error messages.
        net: From contexts (rows, \*shape) to features (rows, C).
        shape: Shape of one context: (1, 28, 28) for an image, (points, coordinates) for a set, (columns,) for a vector.

    Attributes:
        net: The network.
        shape: Shape of one context.
        size: Number of entries of one context.
        features: C.

    Shapes:
        Contexts are flat, (\*batch, size + k); features are (\*batch, C + k).

    Raises:
        TypeError: For a net that is not a module.
        ValueError: For a shape that the network does not accept, or an output that is not (rows, C).

    Example:
        >>> embedded = ContextNet("fit", nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), (2, 3))
        >>> embedded.features, embedded(torch.zeros(5, 6)).shape
        (4, torch.Size([5, 4]))
    """

    def __init__(self, who: str, net: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"{who} expected context_net to be a torch module, got {type(net).__name__}.")
        self.net = net
        self.shape = torch.Size(check_shape(who, "context_shape", shape))
        if not self.shape.numel() or not self.shape:
            raise ValueError(
                f"{who} expected context_shape, the shape of one context for context_net, with entries in it, got "
                f"{tuple(self.shape)}."
            )
        self.size = self.shape.numel()
        self.features = self._count(who)

    def _count(self, who: str) -> int:
        """Number of features, from a pass of two zero contexts in eval mode, which leaves all statistics unchanged."""
        like = reference_tensor(self.net)
        dtype, device = (torch.get_default_dtype(), None) if like is None else (like.dtype, like.device)
        training = [member for member in self.net.modules() if member.training]
        try:
            with torch.no_grad():
                output = self.net.eval()(torch.zeros(2, *self.shape, dtype=dtype, device=device))
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{who} expected context_net to take contexts of shape {('rows', *self.shape)}, got an error from "
                f"{type(self.net).__name__}: {reason}"
            ) from error
        finally:
            for member in training:
                member.training = True
        shape = tuple(getattr(output, "shape", ()))
        if len(shape) != 2 or shape[0] != 2:
            raise ValueError(
                f"{who} expected context_net to map contexts of shape {('rows', *self.shape)} to features (rows, C), "
                f"got {shape} from {type(self.net).__name__} for 2 rows."
            )
        return shape[1]

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments `context_net` and `context_shape` for a density that shares the network."""
        return {"context_net": self.net, "context_shape": tuple(self.shape)}

    def context_dim_of(self, who: str, model: TakesContext) -> int:
        """Number of entries of a flat context, for the network in front of a model.

        Raises:
            ValueError: For a model that takes fewer features than the network outputs.
        """
        if model.context_dim < self.features:
            raise ValueError(
                f"{who} expected a model of context_dim {self.features}, the number of features of its context_net, "
                f"{type(self.net).__name__}, got one of context_dim {model.context_dim}."
            )
        return model.context_dim - self.features + self.size

    def fit_statistics(self, context: Tensor) -> None:
        """Set the running statistics of the network's batch norms to those of flat contexts, (rows, size + k).

        Otherwise they would belong to the weights of earlier steps, not to averaged weights.
        """
        norms = [member for member in self.net.modules() if isinstance(member, BATCH_NORMS)]
        if not norms:
            return
        momenta, training = [norm.momentum for norm in norms], [norm.training for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # averages over all batches
            norm.training = True
        for part in context.split(ROWS_AT_ONCE):
            if len(part) > 1:
                self(part)
        for norm, momentum, was_training in zip(norms, momenta, training, strict=True):
            norm.momentum, norm.training = momentum, was_training

    def forward(self, context: Tensor) -> Tensor:
        r"""Features, (\*batch, C + k), of flat contexts, (\*batch, size + k)."""
        entries, further = context[..., : self.size], context[..., self.size :]
        features = self.net(entries.reshape(-1, *self.shape)).reshape(*context.shape[:-1], self.features)
        return torch.cat([features, further], -1) if further.shape[-1] else features
