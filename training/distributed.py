"""Data parallelism with `torchrun --nproc_per_node=N`; a no-op with a single process.

Every process holds the model and takes its share of each batch, and gradients are averaged, so N
processes take the same steps as one. Only the main process (rank 0) evaluates, prints and writes.
"""

import math
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import InputError


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def init(device: torch.device) -> torch.device:
    """Join the processes that torchrun started; returns the device of this one.

    Raises InputError for an incomplete environment, or more processes than GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or world_size() > 1:
        return device
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise InputError(f"WORLD_SIZE is set, but {name} is not: start processes with torchrun")
    if device.type == "cuda":
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            raise InputError(f"{gpus} GPUs cannot serve local process {local_rank}: start fewer")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    # The others wait while the main process evaluates or writes a large model.
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    return device


def shutdown() -> None:
    """Wait for all processes; the main process continues alone and the others exit."""
    if world_size() > 1:
        is_main = rank() == 0
        dist.barrier()
        dist.destroy_process_group()
        if not is_main:
            sys.exit()


def from_main(make: Callable[[], Any]) -> Any:
    """The value that `make` returns in the main process; if it fails, all processes end."""
    if world_size() == 1:
        return make()
    result = [None]
    if rank() == 0:
        try:
            result = [make()]
        except (InputError, OSError, FloatingPointError) as error:
            result = [error]
    dist.broadcast_object_list(result)
    if isinstance(result[0], Exception):
        if rank() == 0:
            raise result[0]
        sys.exit(1)  # the main process reports the error
    return result[0]


class Loss(nn.Module):
    """The loss of a model as a module's forward, which DistributedDataParallel needs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model.loss(**batch)


def data_parallel(model: nn.Module) -> nn.Module:
    """The loss of a model; backward averages gradients over all processes."""
    loss = Loss(model)
    return DistributedDataParallel(loss) if world_size() > 1 else loss


def micro_batches(indices: list[int], count: int) -> list[list[int]]:
    """This process's share of a batch in at most `count` micro-batches, some of which may be empty.

    All processes have the same number of micro-batches.
    """
    share = math.ceil(len(indices) / world_size())  # the largest of a process
    size = math.ceil(share / count)
    mine = indices[rank() :: world_size()]
    return [mine[start : start + size] for start in range(0, share, size)]
