"""The random generators that data are drawn from, as one state of plain values."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar, cast

import numpy as np
import torch

T = TypeVar("T")


def random_state() -> dict[str, Any]:
    """Of Python, NumPy, and torch on all devices."""
    kind, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state(), "cuda": cuda
    }  # fmt: skip


def set_random_state(state: dict[str, Any]) -> None:
    """What `random_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


def from_batch(loader: Iterable[T], first: int, start: dict[str, Any]) -> Iterator[T]:
    """The batches of an epoch from number `first` on, counted from 0, as if those before had just been used.

    They are drawn again, from `start`, the state in which the epoch began; what is random afterwards goes on from the
    state that is found.
    """
    found = random_state()
    set_random_state(start)
    for number, batch in enumerate(loader):
        if number >= first:
            yield batch
        elif number == first - 1:
            set_random_state(found)
