"""Data parallelism with `torchrun --nproc_per_node=N`; a no-op with a single process.

Every process holds the model and takes its share of each batch, and gradients are averaged, so N
processes take the same steps as one. Only the main process (rank 0) prints and writes, and after
the first step only it evaluates.
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


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def init(device: torch.device) -> torch.device:
    """Join the processes that torchrun started; returns the device of this one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    # The others wait while the main process evaluates or writes a large model.
    backend = dist.get_default_backend_for_device(device)
    dist.init_process_group(backend, timeout=timedelta(hours=2))
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    return device


def shutdown() -> None:
    """Wait for all processes; the main process continues alone and the others exit."""
    if dist.is_initialized():
        is_main = rank() == 0
        dist.barrier()
        dist.destroy_process_group()
        if not is_main:
            sys.exit()


def from_main(make: Callable[[], Any]) -> Any:
    """The value that `make` returns in the main process. If it fails, torchrun ends the others."""
    result = [make() if rank() == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    return result[0]


class Loss(nn.Sequential):
    """The loss of a model as a module's forward, which DistributedDataParallel needs."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self[0].loss(**batch)


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
