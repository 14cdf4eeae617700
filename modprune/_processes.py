"""What the processes of torch.distributed tell each other. With one process there is nobody to ask."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

T = TypeVar("T")


def meet(device: torch.device) -> bool:
    """Join the processes that `torchrun` or `accelerate launch` has started, if any; whether this one is the first."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=device.type == "cpu")
    return place()[0] == 0


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


def exchange(rows: Tensor, counts: Sequence[int]) -> None:
    """Give all processes all rows of (N, ...), contiguous, of which each has made as many as `counts` says, in turn."""
    if len(counts) > 1:
        for rank, part in enumerate(rows.split(list(counts))):
            dist.broadcast(part, src=rank)


def from_first(tensors: Iterable[Tensor]) -> None:
    """Give all processes the values that rank 0 has."""
    if place()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def check_alike(values: Sequence[object], what: str, mend: str) -> None:
    """Raises RuntimeError, in every process, if what the processes have is not one thing; names the odd ones.

    Args:
        values: of each process, from `everyones`.
        what: they are.
        mend: how.
    """
    odd = [str(rank) for rank, value in enumerate(values) if value != values[0]]
    if odd:
        raise RuntimeError(f"{what} of rank {', '.join(odd)} is not that of rank 0: {mend}")
