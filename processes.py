"""More than one process: `torchrun --nproc_per_node=N` of a task script. Alone, everything here does nothing.

Every process holds the whole model and takes its share of each batch; gradients are summed, so that N processes take
the steps that one would take. The first process, the writer, is the only one that
prints results and writes files.
"""

import os
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from config import InputError


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if _joined() else 0


def size() -> int:
    return dist.get_world_size() if _joined() else 1


def is_writer() -> bool:
    return rank() == 0


def join(device: torch.device) -> torch.device:
    """Join the processes that torchrun started, if it did; returns this one's device.

    Raises InputError for more processes than GPUs, and for one GPU named for all of them.
    """
    if dist.is_available() and dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1 and not _joined():
        if device.type == "cuda":
            local = int(os.environ["LOCAL_RANK"])
            if device.index is not None or local >= torch.cuda.device_count():
                raise InputError(f"{device} can't serve process {local} of torchrun: leave --device out, and start at "
                                 f"most {torch.cuda.device_count()} processes, a GPU each")  # fmt: skip
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if not is_writer():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    return device


def leave() -> None:
    """Wait until all are here; the writer goes on alone, the others end."""
    if _joined():
        writer = is_writer()
        dist.barrier()
        dist.destroy_process_group()
        if not writer:
            sys.exit()


def from_writer(make: Callable[[], object]) -> object:
    """What the writer makes, on every process; where it fails, all do."""
    made = [None]
    try:
        made = [make() if is_writer() else None]
    except (InputError, OSError) as error:
        made = [error]
    if size() > 1:
        dist.broadcast_object_list(made)
    if isinstance(made[0], Exception):
        raise made[0]
    return made[0]


def no_bar() -> bool | None:
    """tqdm's `disable`: the writer has a bar where there is a terminal, the others none."""
    return None if is_writer() else True


def from_all(value: object) -> list:
    """Every process's value, in order of rank."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def total(*numbers: float) -> list[float]:
    """The sums of these numbers over all processes."""
    return [sum(each) for each in zip(*from_all(numbers), strict=True)]


def sum_gradients(parameters: list[torch.Tensor]) -> None:
    """Replace each gradient by its sum over all processes; one that had no rows adds nothing."""
    if size() > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for work in [dist.all_reduce(parameter.grad, async_op=True) for parameter in parameters]:
            work.wait()


def parts(rows: list, count: int) -> list[list]:
    """This process's share of a batch's rows, which are in order of length, in at most `count` parts."""
    share = rows[rank() :: size()]
    step = max(1, -(-len(share) // count))
    return [share[start : start + step] for start in range(0, len(share), step)]
