"""Maximum likelihood as a Lightning module: the step, the averaged weights, and what is kept of them."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from pyro_maf.distributions import Density
from pyro_maf.interruption import Interruption
from pyro_maf.training.batches import Batches
from pyro_maf.training.data import Rows
from pyro_maf.training.schedule import Schedule
from pyro_maf.transforms import ActNorm, BatchNorm

__all__ = ["MaximumLikelihood"]

AVERAGED_EPOCHS = 2
AVERAGED_STEPS = 50


class MaximumLikelihood(LightningModule):
    """Minimises the mean negative log-likelihood with Adam, and keeps the weights that validate best.

    What is validated and kept is an exponential average of the weights: it is better than any of them, and lets the
    learning rate be high.

    Args:
        density: What is fitted, in the data's own units.
        batches: The training rows, on the density's device.
        held_out: The validation rows, likewise.
        schedule: Learning rate and patience.
        max_grad_norm: Norm that a step's gradient is cut down to.
        interruption: Whether to stop for another reason.

    Attributes:
        train_loss, validation_loss: One loss an epoch.
        skipped_steps: Steps left out because their loss or gradient was not finite.
        stop_reason: Why it ended before the last epoch, if it did.
    """

    def __init__(
        self,
        density: Density,
        batches: Batches,
        held_out: Batches,
        *,
        schedule: Schedule,
        max_grad_norm: float,
        interruption: Interruption,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.density = density
        self.batches = batches
        self.held_out = held_out
        self.schedule = schedule
        self.max_grad_norm = max_grad_norm
        self.interruption = interruption
        self.train_loss: list[float] = []
        self.validation_loss: list[float] = []
        self.skipped_steps = 0
        self.stop_reason: str | None = None
        self._weights = [weight for weight in density.parameters() if weight.requires_grad]
        self._average = WeightAverage(self._weights, max(AVERAGED_STEPS, AVERAGED_EPOCHS * len(batches)))
        self._kept: dict[str, Tensor] = {}
        self._training_mean = _Mean()
        self._validation_mean = _Mean()
        self._has_batch_norm = any(isinstance(member, BatchNorm) for member in density.modules())
        self._has_act_norm = any(isinstance(member, ActNorm) for member in density.modules())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, all weights in one call where the device can."""
        fused = self._weights[0].device.type in ("cpu", "cuda")
        self._optimizer = torch.optim.Adam(self._weights, lr=self.schedule.learning_rate, fused=fused)
        return self._optimizer

    def transfer_batch_to_device(self, batch: Rows, device: torch.device, dataloader_idx: int) -> Rows:
        """Batches are on the device already."""
        return batch

    # -- training -------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Take the given weights for the best so far, to be put back if no others validate."""
        if self._has_act_norm or self._has_batch_norm:
            self.density.fit_statistics(*self.batches.rows)
        self._average.start()
        self.density.eval()
        with torch.no_grad():
            for index, batch in enumerate(self.held_out):
                self.validation_step(batch, index)
        self.density.train()
        self.schedule.improves(0, self._validation_mean.take())
        self._keep()

    def training_step(self, batch: Rows, index: int) -> None:
        """One step of Adam, unless the loss or its gradient is not finite."""
        self._optimizer.zero_grad()
        loss = -self.density._log_prob(*batch).mean()
        # Not Lightning's own backward: its hooks would take a tenth of the step, and are for what is not used here.
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._weights, self.max_grad_norm)
        loss = loss.detach()
        if not torch.isfinite(norm + loss):
            self.skipped_steps += 1
            return
        self._optimizer.step()
        self._average.follow()
        self._training_mean.add(loss * len(batch.data), len(batch.data))

    def on_train_batch_end(self, outputs: object, batch: Rows, batch_idx: int) -> None:
        """Heed a Ctrl-C: the weights are validated as they are, in the middle of an epoch."""
        if self.interruption.requested:
            self._stop("interrupted")

    # -- validation -----------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Put the averaged weights in place, with their statistics."""
        self._average.swap()
        if self._has_batch_norm:
            self.density.fit_statistics(*self.batches.rows)

    def validation_step(self, batch: Rows, index: int) -> None:
        """Add up the log-likelihood of a batch."""
        self._validation_mean.add(-self.density._log_prob(*batch).sum(), len(batch.data))

    def on_validation_epoch_end(self) -> None:
        """Keep the averaged weights if they are the best yet; take up training where it was."""
        all_skipped = not self._training_mean.count
        self.train_loss.append(self._training_mean.take())
        self.validation_loss.append(self._validation_mean.take())
        epoch = len(self.validation_loss)
        if self.schedule.improves(epoch, self.validation_loss[-1]):
            self._keep()
        self._average.swap()
        if all_skipped:
            self._stop(f"no step of epoch {epoch} had a finite loss and gradient")
        elif self.interruption.requested:
            self._stop("interrupted")
        elif self.schedule.is_over:
            self._stop(f"no better validation log-likelihood for {self.schedule.patience} epochs")
        for group in self._optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate

    # -- ending ---------------------------------------------------------------------------------------------------

    def restore_best(self) -> None:
        """Put the weights and statistics in place that validated best, if it came to that."""
        if self._kept:
            self.density.load_state_dict(self._kept)

    def _keep(self) -> None:
        self._kept = {name: tensor.detach().clone() for name, tensor in self.density.state_dict().items()}

    def _stop(self, reason: str) -> None:
        self.stop_reason = self.stop_reason or reason
        self.trainer.should_stop = True


class WeightAverage:
    """An exponential average of weights.

    Args:
        weights: What it follows.
        steps: How many of the last steps it averages over, give or take.
    """

    def __init__(self, weights: list[nn.Parameter], steps: int) -> None:
        self._weights = weights
        self._steps = steps
        self.start()

    def start(self) -> None:
        """Begin with the weights as they are."""
        self._average = [weight.detach().clone() for weight in self._weights]
        self._taken = 0

    def follow(self) -> None:
        """Take in the weights after a step. Early on it averages over fewer, so that it forgets the start."""
        self._taken += 1
        fraction = max(1 / self._steps, 9 / (self._taken + 9))
        torch._foreach_lerp_(self._average, [weight.detach() for weight in self._weights], fraction)

    def swap(self) -> None:
        """Exchange the weights and their average."""
        with torch.no_grad():
            for weight, average in zip(self._weights, self._average, strict=True):
                held = weight.clone()
                weight.copy_(average)
                average.copy_(held)


class _Mean:
    """A mean over rows. Its sum stays where it is computed until it is taken: to read it is to wait for the device."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, total: Tensor, count: int) -> None:
        self.total = self.total + total
        self.count += count

    def take(self) -> float:
        """The mean, NaN of nothing; starts again."""
        mean = float(self.total) / self.count if self.count else float("nan")
        self.total, self.count = 0.0, 0
        return mean
