"""Data parallelism with `torchrun --nproc_per_node=N`; a no-op with a single process.

Every process holds the model and takes its share of each batch, and gradients are summed, so N
processes take the same steps as one. Only the main process (rank 0) prints and writes files.
"""

import math
import os
import sys

import torch
import torch.distributed as dist

from config import InputError


def is_initialized():
    return dist.is_available() and dist.is_initialized()


def rank():
    return dist.get_rank() if is_initialized() else 0


def world_size():
    return dist.get_world_size() if is_initialized() else 1


def is_main_process():
    return rank() == 0


def init(device):
    """Join the processes that torchrun started; returns the device of this one.

    Raises InputError for more processes than GPUs, or if one GPU is named for all.
    """
    launched = dist.is_available() and dist.is_torchelastic_launched()
    if not launched or int(os.environ["WORLD_SIZE"]) == 1 or is_initialized():
        return device
    if device.type == "cuda":
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device.index is not None or local_rank >= gpus:
            advice = f"leave --device out and start at most {gpus} processes"
            raise InputError(f"{device} cannot serve local process {local_rank}: {advice}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    if not is_main_process():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    return device


def shutdown():
    """Wait for all processes; the main process continues alone and the others exit."""
    if is_initialized():
        main = is_main_process()
        dist.barrier()
        dist.destroy_process_group()
        if not main:
            sys.exit()


def from_main_process(make):
    """The value that `make` returns in the main process; if it fails there, all processes fail."""
    result = None
    if is_main_process():
        try:
            result = make()
        except (InputError, OSError) as error:
            result = error
    result = all_gather(result)[0]
    if isinstance(result, Exception):
        raise result
    return result


def no_bar():
    """tqdm's `disable`: the main process shows a bar if there is a terminal."""
    return None if is_main_process() else True


def all_gather(value):
    """The values of all processes in the order of ranks."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def all_reduce(tensor):
    """Replace a tensor by its sum over all processes; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def flat_gradients(parameters):
    """Make all gradients views of one tensor, which one all-reduce sums; returns it.

    None with a single process, which needs no second copy of the gradients. Gradients have the
    layout of their parameters: torch 2.13's fused AdamW computes wrong updates on a CPU otherwise.
    """
    if world_size() == 1:
        return None
    sizes = [parameter.numel() for parameter in parameters]
    flat = parameters[0].new_zeros(sum(sizes))
    for parameter, part in zip(parameters, flat.split(sizes), strict=True):
        parameter.grad = part.as_strided(parameter.shape, parameter.stride())
    return flat


def micro_batches(indices, count):
    """This process's share of a batch (sorted by length) in at most `count` micro-batches."""
    share = indices[rank() :: world_size()]
    size = math.ceil(len(share) / count) or 1
    return [share[start : start + size] for start in range(0, len(share), size)]
