"""Maximum likelihood as a Lightning module: the step, the averaged weights, and their checkpoints."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from pyro_maf._core.averaging import WeightAverage
from pyro_maf._core.interruption import Interruption
from pyro_maf.distributions import Density
from pyro_maf.training.batches import Batches
from pyro_maf.training.checkpoint import Checkpoint, Keeper, generator_states, set_generator_states
from pyro_maf.training.data import Rows
from pyro_maf.training.log import Epoch
from pyro_maf.training.plateau import Schedule
from pyro_maf.training.processes import Processes
from pyro_maf.training.stored import StoredBatches
from pyro_maf.transforms import ActNorm, BatchNorm

__all__ = ["MaximumLikelihood"]

AVERAGED_EPOCHS = 2
AVERAGED_STEPS = 50
AVERAGING_ORDER = 8
WEIGHT_DECAY = 1e-6
SKIPPED_IN_A_ROW = 5
MOST_LOWERINGS = 10
INTERRUPTED = "interrupted"


class MaximumLikelihood(LightningModule):
    """Minimisation of the mean negative log-likelihood with Adam, with the weights of the best validation loss.

    An exponential average of the weights is validated: it is better than any of them, and allows a high learning
    rate.

    Args:
        density: The density to fit, in the data's units.
        batches: The training rows.
        held_out: The validation rows.
        schedule: Learning rate and patience.
        max_grad_norm: Norm to which a step's gradient is clipped.
        interruption: Request to stop by the user.
        processes: The processes that take part.
        keeper: Writer of checkpoints, if any.

    Attributes:
        history: The epochs so far.
        skipped_steps: Number of steps left out because their loss or gradient was not finite.
        stop_reason: Why it ended before the last epoch, if it did.
    """

    def __init__(
        self,
        density: Density,
        batches: Batches | StoredBatches,
        held_out: Batches,
        *,
        schedule: Schedule,
        max_grad_norm: float,
        interruption: Interruption,
        processes: Processes,
        keeper: Keeper | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.density = density
        self.batches = batches
        self.held_out = held_out
        self.schedule = schedule
        self.max_grad_norm = max_grad_norm
        self.interruption = interruption
        self.processes = processes
        self.keeper = keeper
        self.history: list[Epoch] = []
        self.skipped_steps = 0
        self.stop_reason: str | None = None
        self._began = time.monotonic()
        self._weights = [weight for weight in density.parameters() if weight.requires_grad]
        self._average = WeightAverage(
            self._weights, max(AVERAGED_STEPS, AVERAGED_EPOCHS * len(batches)), order=AVERAGING_ORDER, with_initial=True
        )
        self._kept: dict[str, Tensor] = {}
        self._training_mean = _Mean()
        self._validation_mean = _Mean()
        self._batch_norms = [member for member in density.modules() if isinstance(member, BatchNorm)]
        self._has_act_norm = any(isinstance(member, ActNorm) for member in density.modules())
        self._skipped_in_a_row = 0
        self._lowerings_in_a_row = 0
        self._found = None if keeper is None else keeper.found
        if keeper is not None and self._found is not None:
            self._check(self._found, keeper.path)
            self._go_on(self._found)

    @property
    def seconds(self) -> float:
        """Duration in seconds, including the time before it was resumed."""
        return time.monotonic() - self._began

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam, fused over all weights if the device supports that."""
        fused = self._weights[0].device.type in ("cpu", "cuda")
        self._optimizer = torch.optim.Adam(
            self._weights, lr=self.schedule.learning_rate, weight_decay=WEIGHT_DECAY, fused=fused
        )
        return self._optimizer

    def transfer_batch_to_device(self, batch: Rows, device: torch.device, dataloader_idx: int) -> Rows:
        """Return the batch, which is on the device already."""
        return batch

    # -- training -------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Record the initial weights as the best so far, in case no others validate; or resume."""
        found = int(self.processes.total(float(self._found is not None))[0])
        if 0 < found < self.processes.count:
            raise ValueError(
                f"fit expected a folder that all processes share, but only {found} of {self.processes.count} found a "
                "fit to go on with there."
            )
        for rows in (self.batches, self.held_out):
            rows.to(self.device)
        self._share_statistics(self.processes.are_several)
        if self._found is not None:
            self._put_in_place(self._found)
            return
        if self._has_act_norm or self._batch_norms:
            self.density.fit_statistics(*self.batches.sample())
        self._average.restart()
        self.density.eval()
        with torch.no_grad():
            for index, batch in enumerate(self.held_out):
                self.validation_step(batch, index)
        self.density.train()
        self.schedule.improves(0, self._validation_mean.take(self.processes))
        self._keep()
        self.save(taken=0)

    def training_step(self, batch: Rows | tuple[()], index: int) -> None:
        """Take one step of Adam, unless the loss or its gradient is not finite."""
        if not isinstance(batch, Rows):
            return
        self._optimizer.zero_grad()
        log_prob = self.density.log_density(*batch)
        # Each of several processes has a part of the batch, and the gradient is the mean over them.
        rows, log_likelihood = self.processes.total(len(log_prob), log_prob.detach().sum())
        loss = -log_prob.sum() * (self.processes.count / rows)
        if self.processes.are_several:
            self.manual_backward(loss)
            self._check_gradients()
        else:
            # Not Lightning's backward: its hooks would take a tenth of the step, and nothing here uses them.
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self._weights, self.max_grad_norm)
        if not torch.isfinite(norm + log_likelihood):
            self._skip()
            return
        self._skipped_in_a_row = self._lowerings_in_a_row = 0
        self._optimizer.step()
        self._average.add()
        self._training_mean.add(-log_likelihood, int(rows))

    def on_train_batch_end(self, outputs: object, batch: Rows | tuple[()], batch_idx: int) -> None:
        """Write a checkpoint if one is due. After Ctrl-C, stop and validate the weights in the middle of an epoch."""
        if not batch:
            return
        interrupted = self._is_interrupted()
        if interrupted or (self.keeper is not None and self.keeper.is_due):
            self.save(batch_idx + 1)
        if interrupted:
            # The rest is for the result alone: a resumed fit starts here.
            self.keeper = None
            self._stop(INTERRUPTED)

    def _skip(self) -> None:
        """Skip a step; after several in a row, return to the best weights with half the learning rate."""
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row < SKIPPED_IN_A_ROW:
            return
        self._skipped_in_a_row = 0
        self._lowerings_in_a_row += 1
        if self._lowerings_in_a_row > MOST_LOWERINGS:
            self._stop("no step had a finite loss and gradient, however low the learning rate")
            return
        self.schedule.lower()
        self._set_learning_rate()
        self.density.load_state_dict(self._kept)
        self._optimizer.state.clear()
        self._average.restart()
        warnings.warn(
            f"fit skipped {SKIPPED_IN_A_ROW} steps in a row without a finite loss and gradient: it goes on from the "
            f"best weights so far, with a learning rate of {self.schedule.learning_rate:.3g}.",
            stacklevel=2,
        )

    # -- validation -----------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Swap in the averaged weights, with their statistics."""
        self._average.swap()
        if self._batch_norms:
            self.density.fit_statistics(*self.batches.sample())

    def validation_step(self, batch: Rows | tuple[()], index: int) -> None:
        """Accumulate the log-likelihood of a batch."""
        if not isinstance(batch, Rows):
            return
        self._validation_mean.add(-self.density.log_density(*batch).sum(), len(batch.data))

    def on_validation_epoch_end(self) -> None:
        """Record the averaged weights if they are the best so far; return to training."""
        all_skipped = not self._training_mean.count
        learning_rate = self.schedule.learning_rate
        losses = self._training_mean.take(), self._validation_mean.take(self.processes)
        self.history.append(Epoch(self.seconds, *losses, learning_rate, self.skipped_steps))
        epoch = len(self.history)
        if self.schedule.improves(epoch, losses[1]):
            self._keep()
        self._average.swap()
        if all_skipped:
            self._stop(f"no step of epoch {epoch} had a finite loss and gradient")
        elif self._is_interrupted():
            self._stop(INTERRUPTED)
        elif self.schedule.reason:
            self._stop(self.schedule.reason)
        self._set_learning_rate()

    def on_validation_end(self) -> None:
        """Write a checkpoint, after the log, which may be ahead of it but not behind."""
        is_last = self.trainer.current_epoch + 1 == self.trainer.max_epochs
        if self.keeper is not None and (self.keeper.is_due or self.trainer.should_stop or is_last):
            self.save(taken=0)

    # -- checkpoints and resumption --------------------------------------------------------------------------------

    def save(self, taken: int) -> None:
        """Write a checkpoint.

        Args:
            taken: Number of batches of the present epoch that are done.
        """
        if self.keeper is None or not self.processes.is_first:
            return
        checkpoint = self._checkpoint(taken)
        checkpoint.tensors.update(_named("kept", self._kept))
        for number, state in self._optimizer.state_dict()["state"].items():
            checkpoint.tensors.update(_named(f"optimizer/{number}", state))
        self.keeper.write(checkpoint)

    def _checkpoint(self, taken: int) -> Checkpoint:
        """Return a checkpoint without the best weights and the state of the optimizer."""
        tensors = {
            **_named("density", self.density.state_dict()),
            **_named("average", dict(enumerate(self._average.values))),
            **_named("global", generator_states(self.device)),
            "order": self.batches.order(taken),
            "training_loss": torch.as_tensor(self._training_mean.total),
        }
        facts = {
            "taken": taken,
            "history": self.history,
            "seconds": self.seconds,
            "schedule": self.schedule.state(),
            "averaged": self._average.taken,
            "training_rows": self._training_mean.count,
            "skipped": [self.skipped_steps, self._skipped_in_a_row, self._lowerings_in_a_row],
            # As for other reasons, an interruption is over, and patience may be raised.
            "stop_reason": None if self.stop_reason in (INTERRUPTED, self.schedule.reason) else self.stop_reason,
        }
        return Checkpoint(tensors, facts)

    def _check(self, checkpoint: Checkpoint, path: Path) -> None:
        """Refuse a checkpoint that this fit could not have written."""
        like = self._checkpoint(0)
        like.facts["history"] = [Epoch(0.0, 0.0, 0.0, 0.0, 0)]
        like.tensors.update(_named("kept", self.density.state_dict()))
        for number, weight in enumerate(self._weights):
            adam = {"step": torch.tensor(0.0), "exp_avg": weight, "exp_avg_sq": weight}
            like.tensors.update(_named(f"optimizer/{number}", adam))
        checkpoint.check(path, like)

    def _go_on(self, checkpoint: Checkpoint) -> None:
        """Load `checkpoint`, except the state that is set when training starts."""
        facts = checkpoint.facts
        self.history = [Epoch(*epoch) for epoch in facts["history"]]
        self.schedule.go_on(facts["schedule"])
        self.skipped_steps, self._skipped_in_a_row, self._lowerings_in_a_row = facts["skipped"]
        self.batches.go_on(checkpoint.tensors["order"], facts["taken"])
        self.stop_reason = facts["stop_reason"]
        self._began -= facts["seconds"]
        self._kept = checkpoint.under("kept")

    def _put_in_place(self, checkpoint: Checkpoint) -> None:
        facts = checkpoint.facts
        self.density.load_state_dict(checkpoint.under("density"))
        average = checkpoint.under("average")
        self._average.load([average[str(number)].to(self.device) for number in range(len(average))], facts["averaged"])
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in checkpoint.under("optimizer").items():
            number, _, field = name.partition("/")
            states.setdefault(int(number), {})[field] = tensor
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": states})
        self._set_learning_rate()
        if facts["training_rows"]:
            self._training_mean.add(checkpoint.tensors["training_loss"].to(self.device), facts["training_rows"])
        set_generator_states(checkpoint.under("global"), self.device)

    def restore_best(self) -> None:
        """Set the weights and statistics to those with the best validation loss, if any were validated."""
        self._share_statistics(False)
        if self._kept:
            self.density.load_state_dict(self._kept)

    def _share_statistics(self, together: bool) -> None:
        for layer in self._batch_norms:
            layer.together = together

    def _check_gradients(self) -> None:
        """Refuse weights without a gradient, on which torch's reduction over several processes would hang."""
        for name, weight in self.density.named_parameters():
            if weight.requires_grad and weight.grad is None:
                raise ValueError(
                    f"fit with several processes expected log_prob to depend on every weight, but not on {name}: "
                    "freeze it by requires_grad_(False)."
                )

    def _keep(self) -> None:
        self._kept = {name: tensor.detach().clone() for name, tensor in self.density.state_dict().items()}

    def _set_learning_rate(self) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.schedule.learning_rate

    def _is_interrupted(self) -> bool:
        """True if any of the processes was interrupted."""
        return bool(self.processes.total(float(self.interruption.requested))[0])

    def _stop(self, reason: str) -> None:
        self.stop_reason = self.stop_reason or reason
        self.trainer.should_stop = True


class _Mean:
    """Mean over rows. Its sum stays on the device until it is taken, since reading synchronises."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, total: Tensor | float, count: int) -> None:
        """Add the sum over `count` rows."""
        self.total = self.total + total
        self.count += count

    def take(self, processes: Processes | None = None) -> float:
        """Return the mean, NaN of no rows, and reset.

        Args:
            processes: The processes that each have a part of the sum, if any.
        """
        total, count = (self.total, self.count) if processes is None else processes.total(self.total, self.count)
        self.total, self.count = 0.0, 0
        return float(total) / int(count) if count else float("nan")


def _named(prefix: str, tensors: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}
