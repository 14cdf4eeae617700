"""What the processes of torch.distributed tell each other. With one process there is nobody to ask."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

T = TypeVar("T")


def started() -> int:
    """How many processes `torchrun` or `accelerate launch` has started, whether they have met or not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def meet(device: torch.device | str) -> bool:
    """Join the processes that were started with this one, if any; whether this one is the first."""
    if started() > 1 and not dist.is_initialized():
        # Imported later, its default arguments keep a reference to the group, whose threads then outlive it.
        import torch.distributed.nn.functional

        PartialState(cpu=torch.device(device).type == "cpu")
        atexit.register(_part)
    return place()[0] == 0


def _part() -> None:
    """End the group and its threads: left to a process's last moments, they may abort it, and its launcher the others.

    What has been trained by it, in a cycle of references, holds on to it.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def place() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def everyones(value: T) -> list[T]:
    """The value that each process has, in the order of their ranks; all processes call this together."""
    _, processes = place()
    if processes == 1:
        return [value]
    values: list[T] = [value] * processes
    dist.all_gather_object(values, value)
    return values


def to_owners(arrays: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Bring the rows of arrays together, each array in one process, and give those of this process.

    Args:
        arrays: (N, ...) each, contiguous, in every process; of the rows of process 0, 1, ... each has only its own.
        counts: how many rows are of which process.

    Returns:
        The 1st, (1 + processes)th, ... of the arrays for rank 0, the next ones for rank 1: whole.
    """
    rank, processes = place()
    transfers = []
    for i, parts in enumerate(array.split(list(counts)) for array in arrays):
        if i % processes == rank:
            others = [other for other in range(processes) if other != rank]
            transfers += [dist.P2POp(dist.irecv, parts[other], other, tag=i) for other in others]
        else:
            transfers.append(dist.P2POp(dist.isend, parts[rank], i % processes, tag=i))
    for transfer in dist.batch_isend_irecv(transfers) if transfers else ():
        transfer.wait()
    return list(arrays[rank::processes])


def total(value: Tensor) -> Tensor:
    """The sum of what all processes have, in place."""
    if place()[1] > 1:
        dist.all_reduce(value)
    return value


def from_first(tensors: Iterable[Tensor]) -> None:
    """Give all processes the values that rank 0 has."""
    if place()[1] > 1:
        for tensor in tensors:
            # Of an expanded tensor, what is there but once: past it, gloo would read and write somebody's memory.
            once = tensor.detach()[tuple(slice(None if stride else 1) for stride in tensor.stride())]
            values = once.contiguous()
            dist.broadcast(values, src=0)
            once.copy_(values)


def check_alike(values: Sequence[object], what: str, mend: str) -> None:
    """Raises RuntimeError, in every process, if what the processes have is not one thing; names the odd ones.

    Args:
        values: one of each process, in the order of their ranks, as `everyones` gives them.
        what: what they are, for the message.
        mend: what to do about it, for the message.
    """
    odd = [str(rank) for rank, value in enumerate(values) if value != values[0]]
    if odd:
        raise RuntimeError(f"{what} of rank {', '.join(odd)} is not that of rank 0: {mend}")
