"""Shares of a guide's modes, kept up to date while the guide is trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pyro import poutine

from pyro_maf._core.torch_state import is_traced
from pyro_maf.infer.guides.mixture import FlowMixture
from pyro_maf.infer.guides.posterior import Posterior
from pyro_maf.infer.models.log_joint import FAILURES
from pyro_maf.infer.models.model import Call

__all__ = ["Shares"]

EVERY, DRAWS = 100, 256
"""Number of draws of a guide in training between two updates, and of weighted draws of each mode in one."""
RATE = 0.5
"""Part of the way that an update goes: the noise of the last ones is averaged."""
FINAL_DRAWS = 4096


class Shares:
    """Updates of the shares of a mixture by the evidence of its modes.

    An update takes a few hundred draws of each mode, scored by the model in one run.
    """

    def __init__(self) -> None:
        self._draws = 0
        self._last: Call | None = None
        self._posterior: Posterior | None = None

    def count(self, mixture: FlowMixture, call: Call, posterior_of: Callable[[Call], Posterior]) -> None:
        """Count a draw in training, and update the shares if that is due."""
        if not torch.is_grad_enabled() or is_traced() or not next(mixture.parameters()).requires_grad:
            return
        self._draws += 1
        if self._draws % EVERY == 0:
            self._update(mixture, self._of(call, posterior_of), DRAWS, RATE)

    def settle(self, mixture: FlowMixture, call: Call, posterior_of: Callable[[Call], Posterior]) -> None:
        """Set the shares by many draws, after training."""
        self._update(mixture, self._of(call, posterior_of), FINAL_DRAWS, 1.0)

    def _of(self, call: Call, posterior_of: Callable[[Call], Posterior]) -> Posterior | None:
        """Return the posterior for these arguments; that of the last ones is cached. None if it cannot be scored."""
        if self._posterior is None or not call.has_arguments_of(self._last):
            try:
                with poutine.block():  # an update must be invisible to handlers around the guide
                    self._posterior = posterior_of(call)
            except FAILURES:
                return None
            self._last = call
        return self._posterior if self._posterior.is_complete else None

    def _update(self, mixture: FlowMixture, posterior: Posterior | None, draws: int, rate: float) -> None:
        if posterior is None:
            return
        with torch.no_grad(), poutine.block():
            shares = mixture.evident_shares(posterior, draws)
            if shares is not None:
                mixture.set_shares(shares if rate == 1.0 else mixture.shares.lerp(shares, rate))
