"""Processes of a distributed fit: each takes its part of every batch, and all have the same weights."""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, distributed

__all__ = ["Processes"]

ACCELERATORS = {"cpu": "cpu", "cuda": "gpu", "mps": "mps"}


class Processes:
    """The processes started by torchrun, or to be started by `launch`; or only this one.

    They communicate through `torch.distributed` once `launch` has set it up.

    Attributes:
        by_torchrun: Whether torchrun started them.
        here: Number of processes on this machine, `devices` unless torchrun has set it.
        machines: Number of machines.
    """

    def __init__(self, devices: int = 1) -> None:
        self.by_torchrun = distributed.is_available() and distributed.is_torchelastic_launched()
        self.here = int(os.environ["LOCAL_WORLD_SIZE"]) if self.by_torchrun else devices
        self.machines = int(os.environ["WORLD_SIZE"]) // self.here if self.by_torchrun else 1

    @property
    def count(self) -> int:
        """Number of processes."""
        return self.here * self.machines

    @property
    def are_several(self) -> bool:
        """True if there is more than one."""
        return self.count > 1

    @property
    def is_first(self) -> bool:
        """True in the process that writes files and shows progress."""
        # Ranks as numbered by torchrun, or by Fabric for processes that it starts.
        rank = os.environ.get("RANK") if self.by_torchrun else os.environ.get("LOCAL_RANK")
        return not self.are_several or int(rank or 0) == 0

    def launch(self, device: torch.device) -> torch.device:
        """Start the other processes, or join them; return this one's device, which is its own GPU if there are several.

        Uses Lightning Fabric, which a fit with one process never imports.
        """
        if not self.are_several:
            return device
        from lightning_fabric import Fabric
        from lightning_fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment

        # Fabric's internals, and the device, which the caller chose, are not worth a message.
        logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(GPU|TPU|MPS) available but not used")
            fabric = Fabric(
                accelerator=ACCELERATORS[device.type],
                devices=self.here,
                num_nodes=self.machines,
                strategy="ddp",
                plugins=[TorchElasticEnvironment() if self.by_torchrun else LightningEnvironment()],
            )
            is_new = not distributed.is_initialized()
            fabric.launch()
        if is_new:
            atexit.register(_leave)
        return fabric.device

    def part(self, index: Tensor) -> Tensor:
        """Return this process's part of the rows of a batch."""
        return index.tensor_split(self.count)[distributed.get_rank()] if self.are_several else index

    def wait(self) -> None:
        """Barrier over all processes; no-op before `launch`."""
        if self.are_several and distributed.is_initialized():
            self.total(0.0)

    def total(self, *values: Tensor | float) -> tuple[Tensor | float, ...]:
        """Sum each of `values` over all processes, without a gradient."""
        if not self.are_several:
            return values
        together = torch.stack([torch.as_tensor(value, dtype=torch.float64).detach().cpu() for value in values])
        # NCCL supports only GPUs.
        together = together.cuda() if distributed.get_backend() == "nccl" else together
        distributed.all_reduce(together)
        return tuple(together)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in one exchange."""
        together = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(together)
        for tensor, part in zip(tensors, together.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    @torch.no_grad()
    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by that of the first process."""
        for tensor in tensors if self.are_several else ():
            first = tensor.clone()
            distributed.broadcast(first, 0)
            tensor.copy_(first)


def _leave() -> None:
    """Leave the process group: its threads abort the program if they outlive Python."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
