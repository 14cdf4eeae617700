"""What a loader draws its data from: random generators, as one state of plain values, and a pass under way."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate.state import GradientState
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
COUNTS = ("epoch", "iteration", "end_of_dataloader", "remainder")


@contextmanager
def undisturbed(loader: object) -> Iterator[None]:
    """A loader may be read inside the block; its owner then goes on as if it had not been, amid an epoch too.

    Put back are all random generators, what an `ImageLoader`, or accelerate's loaders and samplers, count passes by and
    whether accelerate is in one, and the pass of a DataLoader whose workers persist, or that it has none yet: it has
    only one at a time, a new one would take the workers of the old one away, and later ones its own.
    """
    counts = [(part, {n: v for n, v in vars(part).items() if n in COUNTS}) for part in _parts(loader)]
    passes = GradientState().dataloader_references
    state, under_way = random_state(None), getattr(loader, "_iterator", None)
    own = [(generator, generator.get_state()) for generator in _generators(loader)]  # accelerate's gets one in a pass
    if persists := hasattr(loader, "_iterator"):
        loader._iterator = None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        set_random_state(state, None)
        for generator, found in own:
            generator.set_state(found)
        for part, found_counts in counts:
            vars(part).update(found_counts)
        GradientState().dataloader_references = passes
        if persists:
            loader._iterator = under_way  # type: ignore[attr-defined]


def random_state(loader: object) -> dict[str, Any]:
    """Of Python, NumPy, torch on the CPU and CUDA, and the generators that a loader has of its own."""
    kind, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "own": own_state(loader),
    }


def is_untouched(state: dict[str, Any]) -> bool:
    """Whether no generator has been drawn from since `state = random_state(None)`."""
    before, now = tree_leaves(state), tree_leaves(random_state(None))
    same = (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(before, now, strict=False))
    return len(before) == len(now) and all(same)


def own_state(loader: object) -> list[torch.Tensor]:
    """Of the generators that a loader has of its own: accelerate gives it one in several processes."""
    return [generator.get_state() for generator in _generators(loader)]


def set_own_state(state: list[torch.Tensor], loader: object) -> None:
    """Put back what `own_state` gave."""
    for generator, own in zip(_generators(loader), state, strict=True):
        generator.set_state(own)


def set_random_state(state: dict[str, Any], loader: object) -> None:
    """Put back what `random_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    set_own_state(state["own"], loader)


def _generators(loader: object) -> list[torch.Generator]:
    """Those of a loader and its samplers, each once."""
    named = (getattr(part, name, None) for part in _parts(loader) for name in ("generator", "synchronized_generator"))
    return list({id(found): found for found in named if isinstance(found, torch.Generator)}.values())


def _parts(loader: object) -> list[Any]:
    """A loader and its samplers, those with attributes of their own."""
    parts = [loader]
    for part in parts:
        inner = [getattr(part, name, None) for name in ("sampler", "batch_sampler")]
        parts += [one for one in inner if one is not None and all(one is not other for other in parts)]
    return [part for part in parts if hasattr(part, "__dict__")]


def from_batch(loader: Iterable[T], batches: Iterable[T], first: int, start: dict[str, Any]) -> Iterator[T]:
    """The `batches` of a loader from number `first` on, counted from 0, as if those before had just been used.

    They are drawn again, from `start`, the state in which the epoch began; what is random afterwards goes on from the
    state that is found.
    """
    found = random_state(loader)
    set_random_state(start, loader)
    for number, batch in enumerate(batches):
        if number >= first:
            yield batch
        elif number == first - 1:
            set_random_state(found, loader)
